"""What all requests have in common: unknown fields are errors, and known ones that have no effect here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

from janus_modular.server.api_errors import no_effect

Neutral = Mapping[str, tuple[tuple[Any, ...], str]]
"""Fields of OpenAI's API that have no effect here: values that ask for nothing, and why others fail."""

ModelName = Annotated[str | None, Field(description="The served model; null: whatever is served.")]
User = Annotated[
    str | None, Field(max_length=256, description="The sender's name for its user, written into the log.")
]
Seed = Annotated[
    int | None,
    Field(ge=0, le=2**63 - 1, description="Of the noise; null: a random one, which the answer reports."),
]
SamplerSettings = Annotated[
    dict[str, Any] | None, Field(description="Any other settings of the model's sampler, by name.")
]


class ApiModel(BaseModel):
    """A part of a request, in strict JSON types."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    neutral: ClassVar[Neutral] = {}

    @model_validator(mode="before")
    @classmethod
    def drop_neutral_fields(cls, values: Any) -> Any:
        """Drop fields that ask for nothing, and refuse others that would have no effect, with the reason.

        Raises:
            ApiError: a field asks for something that the server does not do.
        """
        if not isinstance(values, Mapping) or not cls.neutral.keys() & values.keys():
            return values
        for name in cls.neutral.keys() & values.keys():
            accepted, reason = cls.neutral[name]
            value = values[name]
            is_neutral = value is None or any(
                type(value) is type(neutral) and value == neutral for neutral in accepted
            )
            if not is_neutral:
                raise no_effect(name, reason)
        return {name: value for name, value in values.items() if name not in cls.neutral}
