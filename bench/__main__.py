"""`make bench`: every figure is a ratio against a floor measured in the same run."""

import asyncio
import json
import tempfile
from pathlib import Path

from bench import ingest, predict
from bench.rows import show
from tests.running import running_stack

RESULTS = Path(__file__).with_name("results.json")


async def main() -> None:
    with tempfile.TemporaryDirectory(prefix="leptonic-bench-") as folder:
        async with running_stack(Path(folder) / "data") as stack:
            rows = [*await ingest.measure(stack), *await predict.measure(stack)]
    show(rows)
    RESULTS.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    print(f"{'(medians)':<58} {'ours':>12} {'floor':>12} {'ratio':>8}")
    asyncio.run(main())
