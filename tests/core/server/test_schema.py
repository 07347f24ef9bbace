"""The OpenAPI description against the server: schemathesis makes requests that it allows or forbids."""

from __future__ import annotations

from typing import Any

import httpx
import pytest


@pytest.fixture(scope="module")
def description(served: Any) -> dict[str, Any]:
    return httpx.get(f"{served.address}/openapi.json", trust_env=False).json()


def test_the_description_has_every_path_and_no_422(description: dict[str, Any]):
    assert set(description["paths"]) == {
        *("/v1/chat/completions", "/v1/images/generations", "/v1/images/edits", "/v1/images/variations"),
        *("/v1/responses", "/v1/models", "/v1/models/{model}", "/health", "/ready", "/metrics"),
    }
    answers = [o["responses"] for operations in description["paths"].values() for o in operations.values()]
    assert all("422" not in responses for responses in answers)


@pytest.mark.slow
def test_made_up_requests_are_answered_as_described(served: Any):
    """Whatever is sent: no 500, the described status and form, and nothing accepted that the schema forbids.

    What the schema allows may be refused: images that are damaged, another model, settings out of range.
    """
    import schemathesis
    from hypothesis import HealthCheck, Phase, given, settings
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi import checks

    schema = schemathesis.openapi.from_url(f"{served.address}/openapi.json")
    options = settings(
        max_examples=40,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=[*HealthCheck],
    )
    for operation in schema.get_all_operations():
        strategy = operation.ok().as_strategy() | operation.ok().as_strategy(
            generation_mode=schemathesis.GenerationMode.NEGATIVE
        )

        @options
        @given(case=strategy)
        def answered(case: Any) -> None:
            response = case.call(timeout=60)
            case.validate_response(
                response,
                checks=[
                    not_a_server_error,
                    checks.status_code_conformance,
                    checks.content_type_conformance,
                    checks.response_schema_conformance,
                    checks.negative_data_rejection,
                ],
            )

        answered()
