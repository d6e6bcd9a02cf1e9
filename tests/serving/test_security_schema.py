"""Requests made from the description of the interface, by schemathesis: no status that it does not declare, no 500.

Half of them keep to the description and half break it. Of the former some are refused nevertheless (a random text is no
picture, and words must not be blank), so only how they are refused is checked.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.waiting import LIMIT

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    negative_data_rejection,
]


def description(address: str) -> Any:
    """Fetch the description; of models in paths, name the one that is there, or few would get past them."""
    page = httpx.get(f"{address}/openapi.json", timeout=LIMIT, trust_env=False).json()
    for operations in page["paths"].values():
        for operation in operations.values():
            for parameter in operation.get("parameters", ()):
                parameter["schema"] = {"type": "string", "enum": ["my_classifier"]}
    return page


def refused_in_place(response: Any) -> bool:
    """Tell whether an answer says of single examples what is wrong with them."""
    content = response.json() if response.status_code == 200 and response.content.startswith(b"{") else {}
    return isinstance(content, dict) and any("error" in result for result in content.get("data", ()))


def fuzz(address: str, count: int) -> Counter[tuple[str, int]]:
    """Send requests to every route and check the answers; return how often each gave which status."""
    seen: Counter[tuple[str, int]] = Counter()
    schema = schemathesis.openapi.from_dict(description(address))
    for found in schema.get_all_operations():
        operation = found.ok()
        for mode in (schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE):

            @settings(
                max_examples=count,
                deadline=None,
                derandomize=True,
                database=None,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )
            @given(case=operation.as_strategy(generation_mode=mode))
            def send(case: Any) -> None:
                response = case.call(base_url=address, timeout=LIMIT)
                seen[case.operation.label, response.status_code] += 1
                excluded = [negative_data_rejection] if refused_in_place(response) else []
                case.validate_response(response, checks=[check for check in CHECKS if check not in excluded])

            try:
                send()
            except Unsatisfiable:
                assert mode is schemathesis.GenerationMode.NEGATIVE, "only what takes nothing cannot be broken"
    return seen


def check_covered(address: str, seen: Counter[tuple[str, int]]) -> None:
    """Make sure that every route was asked, and that those which classify were both understood and not."""
    labels = {
        (f"{method.upper()} {path}", "requestBody" in operation, {"admin": []} in operation.get("security", []))
        for path, operations in description(address)["paths"].items()
        for method, operation in operations.items()
    }
    assert {label for label, _ in seen} == {label for label, _, _ in labels}
    for label, has_body, needs_admin in labels:
        if needs_admin:
            assert {status for seen_label, status in seen if seen_label == label} == {403}, "there is no admin key"
        elif has_body:
            assert seen[label, 400] or seen[label, 422], label
        else:
            assert seen[label, 200], label


def test_some_requests(server_url: str) -> None:
    check_covered(server_url, fuzz(server_url, 6))


@pytest.mark.soak
def test_many_requests(server_url: str) -> None:
    seen = fuzz(server_url, 100)
    check_covered(server_url, seen)
    assert seen["POST /v1/classify", 200]
    assert seen["POST /v1/moderations", 200]
    assert seen["POST /v1/systemone", 422]
