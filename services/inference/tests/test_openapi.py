"""The OpenAPI document of port 8000: every route is in it, and everything it refers to is there."""

import json
import logging
import re
from typing import Any

import jsonschema
import pytest

from services.inference import controls, openapi
from services.inference.openapi import HEALTH, document, operations
from services.inference.rest import Rest

REFERENCE = re.compile(r'"#/components/schemas/([^"]+)"')


@pytest.mark.parametrize("asks_for_token", [False, True])
def test_it_refers_only_to_what_it_defines(asks_for_token: bool) -> None:
    made = document(asks_for_token)
    defined = set(made["components"]["schemas"])
    assert set(REFERENCE.findall(json.dumps(made))) == defined
    for schema in made["components"]["schemas"].values():
        jsonschema.Draft202012Validator.check_schema(schema)


def test_every_operation_has_a_method_and_a_name_of_its_own() -> None:
    table = operations()
    assert all(callable(getattr(Rest, one.handler)) for one in table)
    made = document(asks_for_token=False)
    names = [one["operationId"] for path in made["paths"].values() for one in path.values()]
    assert len(names) == len(set(names)) == len(table)


def test_one_path_has_one_handler() -> None:
    handlers: dict[str, set[str]] = {}
    for one in operations():
        handlers.setdefault(one.path, set()).add(one.handler)
    assert all(len(same) == 1 for same in handlers.values())


def test_what_asks_for_a_token_says_401() -> None:
    for path, verbs in document(asks_for_token=True)["paths"].items():
        for one in verbs.values():
            assert (
                ("401" in one["responses"]) == (not path.startswith(HEALTH)) == ("security" in one)
            )
    assert "401" not in json.dumps(document(asks_for_token=False)["paths"])


def test_a_body_is_described_by_what_decodes_it() -> None:
    schemas: dict[str, Any] = document(asks_for_token=False)["components"]["schemas"]
    assert schemas["InferRequest"]["required"] == ["inputs"]
    assert schemas["Registration"]["required"] == ["key", "byte_size"]
    assert schemas["Registration"]["properties"]["offset"]["maximum"] == (1 << 63) - 1
    assert set(openapi.REASONS) >= {code for one in operations() for code in one.statuses}


def test_every_setting_that_is_told_may_be_sent_back() -> None:
    """The settings' schemas are closed: one that is missing there could not be changed."""
    trace = jsonschema.Draft202012Validator(openapi.TRACED)
    known = {"trace_level": ["OFF"], "trace_rate": "1", "trace_count": "-1", **controls.FIXED}
    assert not list(trace.iter_errors(known))
    assert not list(trace.iter_errors(dict.fromkeys(known)))
    assert list(trace.iter_errors({"trace_shape": "round"}))
    log = jsonschema.Draft202012Validator(openapi.LOGGED)
    for level in (logging.DEBUG, logging.ERROR):
        assert not list(log.iter_errors(controls.log_settings_at(level)))
