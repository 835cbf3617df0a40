"""What a client began and does not wait for comes to its end: nothing is loaded by half."""

import asyncio
import os
from pathlib import Path

import pytest

from libs.contracts.protos import open_inference_pb2 as oip
from services.inference.repository import Repository
from services.inference.tests.desk import Desk, double, opened
from services.inference.tests.fronts import kinds
from stack.testing import eventually

SLOW = """
import pathlib
class TritonPythonModel:
    def initialize(self, args):
        here = pathlib.Path({place!r})
        (here / "begun").touch()
        (here / "go on").read_text()
    def execute(self, requests):
        return []
"""
CONFIG = """
backend: "python"
input { name: "x" data_type: TYPE_FP32 dims: [1] }
output { name: "y" data_type: TYPE_FP32 dims: [1] }
"""


@pytest.mark.parametrize("kind", kinds())
async def test_a_load_goes_on_without_who_asked(kind: str, tmp_path: Path) -> None:
    version = tmp_path / "models" / "slow" / "1"
    version.mkdir(parents=True)
    (version / "model.py").write_text(SLOW.format(place=str(tmp_path)))
    (version.parent / "config.pbtxt").write_text(CONFIG)
    os.mkfifo(tmp_path / "go on")
    async with opened(kind=kind) as desk:
        allow_loads(desk, tmp_path / "models")
        call = desk.stub.RepositoryModelLoad(oip.RepositoryModelLoadRequest(model_name="slow"))
        await eventually((tmp_path / "begun").exists, timeout_s=60)
        call.cancel()
        await eventually(lambda: not desk.host.running)
        await asyncio.to_thread((tmp_path / "go on").write_text, "now")
        await eventually(lambda: desk.endpoints.is_ready("slow", "1"), timeout_s=60)


@pytest.mark.parametrize("kind", kinds())
async def test_an_unload_goes_on_without_who_asked(kind: str, tmp_path: Path) -> None:
    async with opened(kind=kind) as desk:
        allow_loads(desk, tmp_path)
        await desk.serve("double", double())
        served = desk.endpoints.served("double", "")
        served.quiet.clear()  # as if a stream held it
        call = desk.stub.RepositoryModelUnload(
            oip.RepositoryModelUnloadRequest(model_name="double")
        )
        await eventually(lambda: not desk.endpoints.by_key)
        call.cancel()
        await eventually(lambda: not desk.host.running)
        served.quiet.set()
        await eventually(lambda: not any(thread.is_alive() for thread in served.threads))


def allow_loads(desk: Desk, root: Path) -> None:
    desk.service.repository = Repository(root, "explicit", desk.endpoints)
