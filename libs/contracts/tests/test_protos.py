"""Generated code is what the protos say, and our Open Inference Protocol is everybody's."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
PROTOS = Path("libs/contracts/protos")
GENERATED = ("*_pb2.py", "*_pb2_grpc.py", "*_pb2.pyi")
FIELDS_OF = """
import importlib, json, sys

def kind_of(field):
    named = field.message_type or field.enum_type
    return [field.number, field.type, field.is_repeated, named.full_name if named else ""]

def numbers(enum):
    return {enum.full_name: {value.name: value.number for value in enum.values}}

def fields(message):
    found = {message.full_name: {field.name: kind_of(field) for field in message.fields}}
    for one in message.enum_types:
        found |= numbers(one)
    for one in message.nested_types:
        found |= fields(one)
    return found

file = importlib.import_module(sys.argv[1]).DESCRIPTOR
messages = {}
for enum in file.enum_types_by_name.values():
    messages |= numbers(enum)
for message in file.message_types_by_name.values():
    messages |= fields(message)
methods = {
    f"{service.full_name}/{method.name}": [
        method.input_type.full_name,
        method.output_type.full_name,
        method.client_streaming,
        method.server_streaming,
    ]
    for service in file.services_by_name.values()
    for method in service.methods
}
print(json.dumps([messages, methods]))
"""


def test_generating_again_changes_nothing(tmp_path: Path) -> None:
    subprocess.run(
        [str(ROOT / "scripts/generate.sh"), str(tmp_path)],
        env={**os.environ, "PYTHON": sys.executable},
        check=True,
    )
    committed = {p.name: p.read_text() for one in GENERATED for p in (ROOT / PROTOS).glob(one)}
    generated = {p.name: p.read_text() for one in GENERATED for p in (tmp_path / PROTOS).glob(one)}
    assert committed.keys() == generated.keys()
    assert not [name for name in committed if committed[name] != generated[name]]
    assert len(committed) == 3 * len(list((ROOT / PROTOS).glob("*.proto")))


def described(module: str) -> tuple[dict[str, dict[str, object]], dict[str, list[object]]]:
    """Messages and methods of a module, read in a process of its own: both say `inference`."""
    done = subprocess.run(
        [sys.executable, "-c", FIELDS_OF, module], cwd=ROOT, capture_output=True, check=True
    )
    messages, methods = json.loads(done.stdout)
    return messages, methods


@pytest.mark.parametrize(
    ("ours", "theirs"), [("open_inference", "service"), ("model_config", "model_config")]
)
def test_open_inference_has_the_names_and_numbers_of_triton(ours: str, theirs: str) -> None:
    """Every one of theirs is ours; we know the fields of later Tritons too."""
    our_messages, our_methods = described(f"libs.contracts.protos.{ours}_pb2")
    their_messages, their_methods = described(f"tritonclient.grpc.{theirs}_pb2")
    assert our_methods == their_methods
    assert len(their_messages) > 20
    for name, fields in their_messages.items():
        assert {field: our_messages[name].get(field) for field in fields} == fields, name
