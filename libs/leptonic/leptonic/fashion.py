"""`leptonic demo --fashion-mnist FOLDER`: the articles' CNN on Fashion-MNIST, to its accuracy."""

import runpy
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from leptonic import launch, rounds, show, stackfile
from leptonic.client import Client
from leptonic.demo import stop_on_signals
from leptonic.errors import Error
from leptonic.predictor import Predictor
from leptonic.watch import Watch

DATASET = MODEL = "fashion_mnist"
PUBLISHED_COUNT = 60_000
"""The training files; the 10,000 images of the test files are held out."""
PUBLISH_S = 600.0
TRAINING_S = 1800.0
ACCURACY_OF_ARTICLES = 0.8679
BATCH = 64
"""Rows of one request: what the deployment takes at once."""


def run(
    starting: AbstractContextManager[stackfile.Stack], folder: Path, console: Console
) -> dict[str, Any]:
    """Returns what was measured. Raises `Error`."""
    if not folder.is_dir():
        problem = f"no folder {folder} with the four IDX files"
        raise Error(f"{problem}: apt-get install dataset-fashion-mnist, or name another")
    stop_on_signals()
    examples = launch.platform_root() / "examples"
    watch = Watch(console, time.time())
    with watch.status:
        watch.doing("starting the servers and the six services")
        with starting as stack, Client(stack) as client:
            watch.mark("stack ready", f"{len(stack.processes)} processes of {stack.source}")
            watch.attach(client)
            accuracy = measured(watch, client, examples, folder)
    text = f"accuracy {accuracy:.4f}; the articles report {ACCURACY_OF_ARTICLES}"
    console.print(Text(text, style="bold green"))
    stages = [{"stage": mark.stage, "seconds": mark.seconds} for mark in watch.marks]
    return {"accuracy": accuracy, "stages": stages}


def measured(watch: Watch, client: Client, examples: Path, folder: Path) -> float:
    applied = client.apply(examples / "fashion_mnist.yaml")
    rounds.until_known(client, DATASET)
    watch.mark("pipeline applied", f"fashion_mnist.yaml, revision {applied['revision']}")
    watch.doing("publishing 60,000 images as Arrow batches")
    script = str(examples / "publish_fashion_mnist.py")
    where = ["--nats", client.stack.endpoint("nats"), "--folder", str(folder)]
    said = rounds.output_of([script, *where, "--count", str(PUBLISHED_COUNT)], PUBLISH_S)
    watch.mark("published", said.strip())
    deployed = rounds.follow(watch, DATASET, MODEL, TRAINING_S)
    images, labels = runpy.run_path(script)["load"](folder)
    images, labels = images[PUBLISHED_COUNT:, :, :, None], labels[PUBLISHED_COUNT:]
    watch.doing("predicting the test images")
    right = 0
    with Predictor(client.stack.endpoint("inference_grpc")) as predictor:
        for start in range(0, len(labels), BATCH):
            some = slice(start, start + BATCH)
            answer = predictor.predict(MODEL, "image", images[some], "UINT8")
            right += int((labels[some] == answer.labels).sum())
    accuracy = right / len(labels)
    share = "" if deployed.percent == show.CHAMPION_PERCENT else " (a canary answers some)"
    watch.mark("test images", f"accuracy {accuracy:.4f} of {len(labels)} images{share}")
    return accuracy
