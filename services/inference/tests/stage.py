"""Small ONNX models in a real object store, and the platform's hand: placements, deployments."""

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from libs.bus import EVENTS
from libs.bus.jetstream import JetStreamBus
from libs.contracts.artifacts import (
    Lineage,
    ModelManifest,
    Signature,
    Tensor,
    canonical,
)
from libs.contracts.envelope import decode, encode
from libs.contracts.events import (
    AttemptPlaced,
    AttemptStopped,
    DeploymentUpdated,
    Event,
    Target,
    subject_of,
)
from libs.objectstore import ObjectStore, key_of

REGISTERED = "00-" + "a" * 32 + "-" + "b" * 16 + "-01"
DEPLOYED = "00-" + "c" * 32 + "-" + "d" * 16 + "-01"
ELEMENTS = {
    "BOOL": TensorProto.BOOL,
    "UINT8": TensorProto.UINT8,
    "INT32": TensorProto.INT32,
    "INT64": TensorProto.INT64,
    "FP32": TensorProto.FLOAT,
    "FP64": TensorProto.DOUBLE,
    "BYTES": TensorProto.STRING,
}
WIDTH = 4
DIGITS = Signature(
    [Tensor("pixels", "FP32", [-1, WIDTH])],
    [Tensor("label", "INT64", [-1]), Tensor("probabilities", "FP32", [-1, WIDTH])],
)
EVERY_TYPE = Signature(
    [Tensor(name.lower(), name, [-1, 2]) for name in ELEMENTS],
    [Tensor(f"{name.lower()}_out", name, [-1, 2]) for name in ELEMENTS],
)
LOOKUP = Signature([Tensor("index", "INT64", [-1])], [Tensor("prediction", "FP32", [-1])])


def info(tensor: Tensor) -> Any:
    shape = ["batch" if size == -1 else size for size in tensor.shape]
    return helper.make_tensor_value_info(tensor.name, ELEMENTS[tensor.datatype], shape)


def graph(nodes: list[Any], signature: Signature, constants: dict[str, Any]) -> bytes:
    made = helper.make_graph(
        nodes,
        "graph",
        [info(tensor) for tensor in signature.inputs],
        [info(tensor) for tensor in signature.outputs],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


def digits(offset: int = 0) -> bytes:
    """label = argmax(pixels) + offset: the answer says which version gave it."""
    nodes = [
        helper.make_node("ArgMax", ["pixels"], ["largest"], axis=1, keepdims=0),
        helper.make_node("Add", ["largest", "offset"], ["label"]),
        helper.make_node("Softmax", ["pixels"], ["probabilities"], axis=1),
    ]
    return graph(nodes, DIGITS, {"offset": np.array(offset, np.int64)})


def every_type() -> bytes:
    pairs = zip(EVERY_TYPE.inputs, EVERY_TYPE.outputs, strict=True)
    nodes = [helper.make_node("Identity", [one.name], [other.name]) for one, other in pairs]
    return graph(nodes, EVERY_TYPE, {})


def lookup() -> bytes:
    """prediction = [0, 10, 20][index]; another index makes the graph raise."""
    node = helper.make_node("Gather", ["table", "index"], ["prediction"])
    return graph([node], LOOKUP, {"table": np.array([0, 10, 20], np.float32)})


async def register(
    objects: ObjectStore,
    number: int,
    percent: int,
    onnx_graph: bytes,
    signature: Signature = DIGITS,
    model: str = "digits",
) -> Target:
    """A version as the trainer leaves it, to be served at that share."""
    manifest = ModelManifest(
        model=model,
        weights=await objects.put_blob(b"weights"),
        graph=await objects.put_blob(onnx_graph),
        transform=await objects.put_blob(b"transform"),
        signature=signature,
        metrics={},
        lineage=Lineage(
            dataset=model,
            dataset_version=number,
            dataset_digest="d" * 64,
            pipeline=model,
            revision=1,
            recipe="mlp",
            params={},
            seed=number,
            workers=1,
            libraries={},
        ),
    )
    blob = await objects.put_blob(canonical(manifest))
    return Target(number, percent, blob.digest, REGISTERED)


async def corrupt(objects: ObjectStore, target: Target) -> bytes:
    """Other bytes under the manifest's digest; returns the right ones."""
    right = await objects.get_blob(target.digest)
    await objects.put(key_of(target.digest), right.replace(b"mlp", b"cnn"))
    return right


class Platform:
    """The scheduler's and the registry's hand, on the bus."""

    def __init__(self, bus: JetStreamBus) -> None:
        self.bus = bus
        self.published = 0

    async def publish(self, event: Event) -> None:
        self.published += 1
        message_id = f"{event.verb}-{self.published}"
        time = "2026-11-21T00:00:00+00:00"
        payload = encode(event, id=message_id, service="test", time=time, traceparent=DEPLOYED)
        await self.bus.publish(subject_of(event), payload, id=message_id)

    async def place(self, model: str = "digits", token: int = 1, node: str = "inference") -> None:
        await self.publish(
            AttemptPlaced(
                project="default",
                job=f"serve-{model}",
                attempt=token,
                token=token,
                node=node,
                kind="serve",
                workers=1,
                spec={"model": model},
            )
        )

    async def stop(self, model: str = "digits", token: int = 1) -> None:
        await self.publish(
            AttemptStopped(
                project="default",
                job=f"serve-{model}",
                attempt=token,
                token=token,
                node="inference",
            )
        )

    async def deploy(
        self, generation: int, *targets: Target, model: str = "digits", **batching: int
    ) -> None:
        await self.publish(deployment(generation, *targets, model=model, **batching))

    async def seen(self, kind: type[Event]) -> list[Any]:
        events = [decode(one.payload)[1] for one in await self.bus.read(EVENTS, "events.>", 0, 500)]
        return [event for event in events if isinstance(event, kind)]


def deployment(
    generation: int, *targets: Target, model: str = "digits", **batching: int
) -> DeploymentUpdated:
    return DeploymentUpdated(
        project="default",
        model=model,
        generation=generation,
        replicas=1,
        targets=list(targets),
        batching=batching,
    )
