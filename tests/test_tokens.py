"""Where tokens are asked for, nobody gets an answer without one, and our own client brings it."""

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
import pytest_asyncio
from leptonic.client import Client
from leptonic.errors import Error
from leptonic.stackfile import Stack

from services.inference.tests.stage import digits
from tests.serving import FRONTS, Server, answer, request, serving, write_adding

pytestmark = pytest.mark.parametrize("front", FRONTS)
TOKEN = "let-me-in"
PREDICT = """
import sys
from leptonic.predictor import Predictor

with Predictor(sys.argv[1]) as predictor:
    print(predictor.predict("digits", "pixels", [[0.0, 3.0, 1.0, 2.0]]).labels)
"""


@pytest_asyncio.fixture
async def guarded(front: str, tmp_path: Path) -> AsyncIterator[Server]:
    write_adding(tmp_path / "models", [1])
    version = tmp_path / "models" / "digits" / "1"
    version.mkdir(parents=True)
    (version / "model.onnx").write_bytes(digits())
    tokens = ("--token=other", f"--token={TOKEN}")
    async with serving(tmp_path / "models", tmp_path, *tokens, front=front) as server:
        yield server


async def test_without_a_token_only_health_answers(guarded: Server) -> None:
    for metadata in ((), (("authorization", "Bearer wrong"),), (("authorization", TOKEN),)):
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await guarded.stub.ModelInfer(request(1), metadata=metadata)
        assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
    assert (await guarded.http.get("/v2/models/adding")).status_code == 401
    assert (await guarded.http.get("/v2/health/ready")).status_code == 200


async def test_with_one_of_them_everybody_answers(guarded: Server) -> None:
    metadata = (("authorization", f"Bearer {TOKEN}"),)
    assert answer(await guarded.stub.ModelInfer(request(1), metadata=metadata)) == [1001]
    headers = {"Authorization": f"Bearer {TOKEN}"}
    assert (await guarded.http.get("/v2/models/adding", headers=headers)).status_code == 200


async def test_our_client_brings_the_token_it_was_given(
    guarded: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    stack = Stack("test", {"inference_http": str(guarded.http.base_url)})
    with Client(stack) as stranger, pytest.raises(Error, match="authorization: Bearer"):
        stranger.predict("adding", {"x": [[1.0] * 4]})
    monkeypatch.setenv("LEPTONIC_TOKEN", TOKEN)
    with Client(stack) as known:
        outputs = known.predict("adding", {"x": [[1.0] * 4]})["outputs"]
    assert outputs == {"y": [[1001.0] * 4]}
    command = [sys.executable, "-c", PREDICT, guarded.address]
    told = await asyncio.to_thread(subprocess.check_output, command, text=True, timeout=60)
    assert told == "[1]\n"
