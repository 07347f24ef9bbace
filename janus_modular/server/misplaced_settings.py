"""Names the place of a sampler's setting that a request gives as a field of its own."""

from __future__ import annotations

from dataclasses import fields

from janus_modular.errors import JanusError
from janus_modular.registry import slot_label
from janus_modular.server.api_errors import ApiError
from janus_modular.server.chat_schema import ChatRequest
from janus_modular.server.image_schema import EditRequest, ImageRequest
from janus_modular.server.requests import ApiModel
from janus_modular.server.responses_schema import ResponseRequest
from janus_modular.server.service import RESERVED, Service

ROUTES: dict[str, tuple[type[ApiModel], str]] = {
    "/v1/chat/completions": (ChatRequest, "text_samplers"),
    "/v1/images/generations": (ImageRequest, "image_samplers"),
    "/v1/images/edits": (EditRequest, "image_samplers"),
    "/v1/responses": (ResponseRequest, "text_samplers"),
}
"""By path: the schema of a request, and the slot of the sampler that its field ``settings`` is for."""


def misplaced_setting(service: Service, path: str, error: ApiError) -> ApiError | None:
    """Return an error that says where a setting goes, for one of a field that is unknown or has no effect.

    Returns None where the sampler has no setting of the field's name, or the field is known.
    """
    if error.param is None or error.code not in ("unknown_parameter", "unsupported_parameter"):
        return None
    schema, slot = next((route for end, route in ROUTES.items() if path.endswith(end)), (None, ""))
    parent, _, name = error.param.rpartition(".")
    if schema is None or name in RESERVED or (not parent and name in schema.model_fields):
        return None
    if parent:
        if not parent.startswith("tools."):  # no other part of a request has settings
            return None
        slot = "image_samplers"
    runtime = service.janus.runtime
    sampler = runtime.image_sampler if slot == "image_samplers" else runtime.text_sampler
    try:
        known = {each.name for each in fields(service.janus.plugins.entry(slot, sampler).config)}
    except JanusError:  # a model whose sampler is not installed is served all the same
        return None
    if name not in known:
        return None
    field = f"{parent}.settings" if parent else "settings"
    return ApiError(
        error.status,
        f"{error.param}: no field, but a setting of the {slot_label(slot)} '{sampler}'. Put it into the field"
        f' `{field}`: {{"settings": {{"{name}": ...}}}}',
        code=error.code,
        param=error.param,
    )
