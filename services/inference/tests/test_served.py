"""What is noted of requests reaches the loop in few calls, and all of it when the version goes."""

from collections.abc import Sequence

import numpy as np
import pytest

from libs.contracts.pipeline import Batching
from services.inference import modelconfig
from services.inference.served import Noted, Rates, Served
from services.inference.tests.desk import double
from services.inference.tests.fronts import kinds, opened

REQUESTS = 40
TRACED = "00-0123456789abcdef0123456789abcdef-0123456789abcdef-01"


@pytest.mark.parametrize("kind", kinds())
async def test_what_is_noted_is_told_together_and_all_of_it_before_the_version_is_gone(
    kind: str,
) -> None:
    told: list[Sequence[Noted]] = []
    model, front = double(), await opened(kind, lambda call: None)
    config = modelconfig.made("double", model, Batching())
    served = Served(
        front, "double", "1", model, 1, told.append, lambda *_: None, Rates(0.0, 0.0), config
    )
    served.configure(Batching(), 0)
    tensor = served.signature.inputs[0]
    for n in range(REQUESTS):
        inputs = {tensor.name: np.full((1, 2), n, np.float32)}
        await served.infer(inputs, 1, id=f"r{n}", traceparent=TRACED)
    await served.close()
    await front.close(0)
    assert [one.note.id for noted in told for one in noted] == [f"r{n}" for n in range(REQUESTS)]
    assert len(told) < REQUESTS
