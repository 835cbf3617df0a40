"""Publishes Fashion-MNIST as Arrow batches: nothing here but nats-py and pyarrow.

    apt-get install dataset-fashion-mnist      # or give a folder with the four IDX files
    python examples/publish_fashion_mnist.py --nats nats://127.0.0.1:4222

70,000 images of 28x28 uint8 (Xiao, Rasul and Vollgraf, 2017), the 60,000 of the training files
first.
"""

import argparse
import asyncio
import gzip
from pathlib import Path

import nats
import numpy as np
import pyarrow as pa

SUBJECT = "records.default.fashion_mnist"
FOLDER = Path("/usr/share/datasets/fashion-mnist")
PIXELS = 28 * 28
BATCH_MAX = 1000


def idx(path: Path) -> np.ndarray:
    """An IDX file of unsigned bytes: two zero bytes, a type, the rank, the sizes, the values."""
    content = gzip.decompress(path.read_bytes())
    kind, rank = content[2], content[3]
    if content[:2] != b"\0\0" or kind != 8:
        raise SystemExit(f"{path}: not an IDX file of unsigned bytes")
    shape = np.frombuffer(content, ">u4", rank, offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * rank).reshape(shape)


def load(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """(images [70000, 28, 28], labels [70000])."""
    names = ("train", "t10k")
    images = [idx(folder / f"{name}-images-idx3-ubyte.gz") for name in names]
    labels = [idx(folder / f"{name}-labels-idx1-ubyte.gz") for name in names]
    return np.concatenate(images), np.concatenate(labels)


def message(images: np.ndarray, labels: np.ndarray) -> bytes:
    """An Arrow IPC stream of one batch; an image is the row-major list of its values."""
    pixels = pa.FixedSizeListArray.from_arrays(pa.array(images.ravel()), PIXELS)
    batch = pa.record_batch({"image": pixels, "label": pa.array(labels.astype(np.int64))})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return bytes(sink.getvalue())


async def publish(url: str, images: np.ndarray, labels: np.ndarray, offset: int, batch: int) -> int:
    acked = 0
    client = await nats.connect(url)
    jetstream = client.jetstream()
    for start in range(0, len(labels), batch):
        some = slice(start, start + batch)
        payload = message(images[some], labels[some])
        count = len(labels[some])
        headers = {"Nats-Msg-Id": f"fashion-mnist-{offset + start}-{count}"}
        await jetstream.publish(SUBJECT, payload, headers=headers)
        acked += count
    await client.close()
    return acked


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nats", default="nats://127.0.0.1:4222", help="URL, with a token if any")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="of the four IDX .gz files")
    parser.add_argument("--offset", type=int, default=0)
    parser.add_argument("--count", type=int, default=70_000)
    parser.add_argument("--batch", type=int, default=500, help="images in a message, at most 1000")
    given = parser.parse_args()
    if not 1 <= given.batch <= BATCH_MAX:
        parser.error(f"--batch is 1 to {BATCH_MAX}, got {given.batch}")
    if not given.folder.is_dir():
        parser.error(f"no folder {given.folder}: install dataset-fashion-mnist, or use --folder")
    images, labels = load(given.folder)
    some = slice(given.offset, given.offset + given.count)
    acked = asyncio.run(publish(given.nats, images[some], labels[some], given.offset, given.batch))
    print(f"{acked} records acked on {SUBJECT}")


if __name__ == "__main__":
    main()
