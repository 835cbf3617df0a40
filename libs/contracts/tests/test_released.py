"""What was released of the protos stays: a client one version behind speaks to us, and we to it.

`python -m libs.contracts.tests.test_released` writes down what is there, when a release is made.
"""

import json
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.descriptor import Descriptor, FileDescriptor
from google.protobuf.json_format import MessageToJson, Parse

from libs.contracts.protos import registry_pb2

PROTOS = Path(__file__).resolve().parents[1] / "protos"
RELEASED = Path(__file__).with_name("released.json")


def files() -> Iterator[FileDescriptor]:
    for path in sorted(PROTOS.glob("*.proto")):
        yield import_module(f"libs.contracts.protos.{path.stem}_pb2").DESCRIPTOR


def fields_of(message: Descriptor) -> dict[str, list[object]]:
    """`<message>.<field>` -> what is on the wire, of a message and those within it."""
    found: dict[str, list[object]] = {
        f"{message.full_name}.{field.name}": [
            field.number,
            field.type,
            field.is_repeated,
            field.message_type.full_name if field.message_type else "",
        ]
        for field in message.fields
    }
    for inner in message.nested_types:
        found |= fields_of(inner)
    return found


def spoken() -> dict[str, list[object]]:
    """Fields and methods."""
    found: dict[str, list[object]] = {}
    for file in files():
        for message in file.message_types_by_name.values():
            found |= fields_of(message)
        for service in file.services_by_name.values():
            for method in service.methods:
                kinds = [method.input_type.full_name, method.output_type.full_name]
                found[method.full_name] = [*kinds, method.client_streaming, method.server_streaming]
    return found


def released() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(RELEASED.read_text())
    return found


def test_what_was_released_is_spoken_as_it_was() -> None:
    now = spoken()
    assert {name: now.get(name) for name in released()} == released()


@pytest.mark.parametrize("name", ["leptonic.v1.Scheduler.SubmitJob", "leptonic.v1.Model.model"])
def test_the_baseline_is_not_empty(name: str) -> None:
    assert name in released()


def test_a_field_of_the_next_release_is_passed_over() -> None:
    newer = registry_pb2.ListModelsRequest(project="p").SerializeToString() + b"\xfa\x07\x03new"
    assert registry_pb2.ListModelsRequest.FromString(newer).project == "p"
    asked = Parse('{"project": "p", "new": 1}', registry_pb2.ListModelsRequest(), True)
    assert json.loads(MessageToJson(asked)) == {"project": "p"}


if __name__ == "__main__":
    RELEASED.write_text(json.dumps(spoken(), indent=0, sort_keys=True) + "\n")
