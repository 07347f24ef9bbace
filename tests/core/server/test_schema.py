"""The OpenAPI description against the server: schemathesis makes requests that it allows or forbids."""

from __future__ import annotations

import json
from types import ModuleType
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


BODIES: dict[str, Any] = {
    "/v1/chat/completions": {
        "model": "tiny",
        "messages": [
            {"role": "system", "content": "short"},
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": "data:image/gif;base64,R0lGODlhAQABAAAAACw="}},
                    {"type": "text", "text": "what?"},
                ],
            },
        ],
        "max_tokens": 2,
        "n": 1,
        "seed": 1,
        "stop": ["a"],
        "temperature": 1,
        "top_p": 0.5,
        "stream": True,
        "stream_options": {"include_usage": True},
        "settings": {"top_k": 3},
    },
    "/v1/images/generations": {
        "prompt": "a",
        "n": 1,
        "size": "auto",
        "seed": 1,
        "guidance": 2,
        "stream": True,
        "partial_images": 1,
        "output_format": "webp",
        "output_compression": 50,
        "settings": {"prefix": [1, 2]},
    },
    "/v1/responses": {
        "model": "tiny",
        "input": [{"role": "user", "content": [{"type": "input_text", "text": "draw"}]}],
        "tools": [{"type": "image_generation", "size": "auto"}],
        "max_output_tokens": 2,
        "stream": True,
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("path", BODIES)
def test_a_damaged_body_is_answered_or_refused(served: Any, mutations: ModuleType, path: str):
    """Values are replaced, removed and renamed, and bytes of the JSON are: no 500, and no connection ends."""
    from hypothesis import HealthCheck, given, settings

    whole = json.dumps(BODIES[path]).encode()
    damaged = mutations.damaged_json(BODIES[path]).map(lambda body: json.dumps(body).encode())

    with httpx.Client(base_url=served.address, trust_env=False, timeout=60) as client:

        @settings(max_examples=max(50, settings().max_examples // 5), suppress_health_check=[*HealthCheck])
        @given(content=damaged | mutations.damaged_bytes(whole))
        def answered(content: bytes) -> None:
            response = client.post(path, content=content, headers={"content-type": "application/json"})
            assert response.status_code < 500
            if response.status_code >= 400:
                assert response.json()["error"]["message"]

        answered()
    assert served.service.engine.stats().failed == 0


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
        max_examples=max(40, settings().max_examples // 10),  # of each operation; 500 for `make proof`
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
