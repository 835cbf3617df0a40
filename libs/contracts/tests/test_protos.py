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

def fields(message):
    own = {field.name: [field.number, field.type, field.is_repeated] for field in message.fields}
    inner = {f"{message.name}.{one.name}": one for one in message.nested_types}
    found = {message.full_name: own}
    for one in inner.values():
        found |= fields(one)
    return found

file = importlib.import_module(sys.argv[1]).DESCRIPTOR
messages = {}
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


def described(module: str) -> tuple[dict[str, dict[str, list[int]]], dict[str, list[object]]]:
    """Messages and methods of a module, read in a process of its own: both say `inference`."""
    done = subprocess.run(
        [sys.executable, "-c", FIELDS_OF, module], cwd=ROOT, capture_output=True, check=True
    )
    messages, methods = json.loads(done.stdout)
    return messages, methods


@pytest.mark.parametrize("kind", ["messages", "methods"])
def test_open_inference_has_the_numbers_of_triton(kind: str) -> None:
    """Whatever we define is defined the same there; they define more."""
    index = 0 if kind == "messages" else 1
    ours = described("libs.contracts.protos.open_inference_pb2")[index]
    theirs = described("tritonclient.grpc.service_pb2")[index]
    assert ours
    for name, content in ours.items():
        if isinstance(content, dict):
            their_fields = theirs[name]
            assert isinstance(their_fields, dict)
            assert {f: their_fields.get(f) for f in content} == content, name
        else:
            assert theirs[name] == content
