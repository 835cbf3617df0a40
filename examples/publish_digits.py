"""Publishes handwritten digits the way a stranger would: nothing here but nats-py.

    python examples/publish_digits.py --nats nats://127.0.0.1:4222 --count 1200

The data are the 1,797 digits in scikit-learn's wheel: 8x8 pixels of 0 to 16, in an order that a
seed fixes, so that --offset and --count name the same digits everywhere.
"""

import argparse
import asyncio
import json
from typing import Any

import nats
import numpy as np
from sklearn.datasets import load_digits

SUBJECT = "records.default.digits"
ORDER_SEED = 7
DRIFT_SEED = 11
DRIFT_NOISE_SIGMA = 1.0


def drifted(pixels: np.ndarray) -> np.ndarray:
    """A scanner that was replaced: ink and paper change places, and it adds noise.

    16 - pixels, plus uniform noise of standard deviation 1, within 0 to 16. A model of the plain
    digits fails on these; a model that sees them learns them as well as the plain ones.
    """
    half_width = DRIFT_NOISE_SIGMA * 3**0.5
    noise = np.random.default_rng(DRIFT_SEED).uniform(-half_width, half_width, pixels.shape)
    return np.clip(16 - pixels + noise, 0, 16).round(3)


def records(offset: int, count: int, drift: bool) -> list[dict[str, Any]]:
    """Digits `offset` to `offset + count` of the seeded order."""
    digits = load_digits()
    order = np.random.default_rng(ORDER_SEED).permutation(len(digits.target))
    pixels = drifted(digits.data) if drift else digits.data
    chosen = order[offset : offset + count]
    return [{"pixels": pixels[i].tolist(), "label": int(digits.target[i])} for i in chosen]


async def publish(url: str, chosen: list[dict[str, Any]], first_id: str, batch: int) -> int:
    """Sends arrays of `batch` records; an ack means that they cannot be lost any more."""
    acked = 0
    client = await nats.connect(url)
    jetstream = client.jetstream()
    for start in range(0, len(chosen), batch):
        some = chosen[start : start + batch]
        headers = {"Nats-Msg-Id": f"{first_id}-{start}-{len(some)}"}
        await jetstream.publish(SUBJECT, json.dumps(some).encode(), headers=headers)
        acked += len(some)
    await client.close()
    return acked


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nats", default="nats://127.0.0.1:4222", help="URL, with a token if any")
    parser.add_argument("--offset", type=int, default=0, help="first digit of the seeded order")
    parser.add_argument("--count", type=int, default=1200)
    parser.add_argument("--batch", type=int, default=50, help="records in a message")
    parser.add_argument("--drift", action="store_true", help="invert the contrast and add noise")
    parser.add_argument("--run", default="", help="publish again under ids of its own")
    parser.add_argument("--print-records", action="store_true", help="JSON lines, no publishing")
    given = parser.parse_args()
    chosen = records(given.offset, given.count, given.drift)
    if given.print_records:
        for record in chosen:
            print(json.dumps(record))
        return
    kind = "drifted" if given.drift else "plain"
    first_id = f"digits-{given.run}{kind}-{given.offset}"
    acked = asyncio.run(publish(given.nats, chosen, first_id, given.batch))
    print(f"{acked} records acked on {SUBJECT}")


if __name__ == "__main__":
    main()
