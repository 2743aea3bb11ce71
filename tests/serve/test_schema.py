"""The OpenAPI document is true: what it allows is answered as it says, and nothing else breaks."""

from __future__ import annotations

from typing import Any

import pytest

from tests.serve.conftest import Serving

schemathesis = pytest.importorskip("schemathesis")
from hypothesis import HealthCheck, Phase, given, settings  # noqa: E402
from schemathesis.specs.openapi.checks import positive_data_acceptance  # noqa: E402


def test_requests_of_the_schema_get_answers_of_the_schema(
    serving: Serving, request: pytest.FixtureRequest
) -> None:
    """Any number of requests with `--fuzz-examples`, a few for each route by default."""
    examples = request.config.getoption("--fuzz-examples") or 15
    with serving(max_pixels=4096, max_steps=1) as url:
        schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
        operations = [each.ok() for each in schema.get_all_operations()]
        assert {operation.path for operation in operations} >= {
            "/v1/images/generations",
            "/v1/images/edits",
        }
        for operation in operations:

            @given(case=operation.as_strategy())
            @settings(
                max_examples=examples,
                deadline=None,
                database=None,
                derandomize=True,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )
            def check(case: Any) -> None:
                # What a bundle and a server's limits allow is more than a schema can say.
                case.call_and_validate(excluded_checks=[positive_data_acceptance])

            check()
