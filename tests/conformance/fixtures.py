"""The models that the public clients' examples ask for, written as a Triton model repository.

Names, tensors and what they compute are what those clients expect; graphs and configurations are
made here. The image models are small stand-ins of the same signature.
"""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

OPSET, IR_VERSION = 17, 8
ELEMENTS = 16
CLASSES = 1000
INCEPTION_CLASSES = 1001
Element = tuple[int, Sequence[int | str]]
"""(type, shape); a text is a free dimension."""
Named = Mapping[str, Element]
ROW: Element = (TensorProto.INT32, ["rows", 1])


def graph(inputs: Named, outputs: Named, nodes: Sequence[onnx.NodeProto], **held: object) -> bytes:
    """`held`: constants of the graph, by name."""
    made = helper.make_graph(
        nodes,
        "fixture",
        [helper.make_tensor_value_info(n, *one) for n, one in inputs.items()],
        [helper.make_tensor_value_info(n, *one) for n, one in outputs.items()],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in held.items()],
    )
    opsets = [helper.make_opsetid("", OPSET)]
    model = helper.make_model(made, opset_imports=opsets, ir_version=IR_VERSION)
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString()


def add_and_subtract(element: int) -> bytes:
    """OUTPUT0 = INPUT0 + INPUT1, OUTPUT1 = INPUT0 - INPUT1; texts are numbers written out."""
    node, names = helper.make_node, ("INPUT0", "INPUT1")
    nodes = [node("Cast", [one], [f"{one}_number"], to=TensorProto.INT32) for one in names]
    numbers = [f"{one}_number" for one in names]
    for operation, output in (("Add", "OUTPUT0"), ("Sub", "OUTPUT1")):
        nodes.append(node(operation, numbers, [f"{output}_number"]))
        nodes.append(node("Cast", [f"{output}_number"], [output], to=element))
    tensor: Element = (element, ["rows", ELEMENTS])
    return graph(dict.fromkeys(names, tensor), {"OUTPUT0": tensor, "OUTPUT1": tensor}, nodes)


def running_value() -> bytes:
    """OUTPUT = INPUT, and 1 more at the start of a sequence."""
    node, row = helper.make_node, ROW
    nodes = [
        node("Mul", ["START", "READY"], ["counted"]),
        node("Add", ["INPUT", "counted"], ["OUTPUT"]),
    ]
    return graph({"INPUT": row, "START": row, "READY": row}, {"OUTPUT": row}, nodes)


def running_value_and_id() -> bytes:
    """As `running_value`; the last answer of a sequence has its correlation id added."""
    node, row = helper.make_node, ROW
    nodes = [
        node("Cast", ["CORRID"], ["id"], to=TensorProto.INT32),
        node("Mul", ["END", "id"], ["last"]),
        node("Mul", ["START", "READY"], ["first"]),
        node("Add", ["first", "last"], ["more"]),
        node("Add", ["INPUT", "more"], ["OUTPUT"]),
    ]
    controls = dict.fromkeys(("INPUT", "START", "END", "READY"), row)
    inputs: Named = {**controls, "CORRID": (TensorProto.UINT64, ["rows", 1])}
    return graph(inputs, {"OUTPUT": row}, nodes)


def running_sum() -> bytes:
    """OUTPUT = the sum of a sequence's values so far; its last answer has the correlation id
    added, which is a number written out."""
    node = helper.make_node
    nodes = [
        node("Sub", ["one", "START"], ["goes_on"]),
        node("Mul", ["before", "goes_on"], ["kept"]),
        node("Add", ["INPUT", "kept"], ["after"]),
        node("Cast", ["CORRID"], ["id"], to=TensorProto.INT32),
        node("Mul", ["END", "id"], ["last"]),
        node("Add", ["after", "last"], ["OUTPUT"]),
    ]
    rows = dict.fromkeys(("INPUT", "START", "END", "before"), ROW)
    inputs: Named = {**rows, "CORRID": (TensorProto.STRING, ["rows", 1])}
    one = np.ones((1, 1), np.int32)
    return graph(inputs, {"OUTPUT": ROW, "after": ROW}, nodes, one=one)


def classifier(name: str, output: str, shape: Sequence[int], axes: Sequence[int], n: int) -> bytes:
    """Colour means of the image, a fixed matrix, softmax."""
    node = helper.make_node
    weights = np.random.default_rng(0).normal(size=(3, n)).astype(np.float32)
    nodes = [
        node("ReduceMean", [name], ["colours"], axes=list(axes), keepdims=0),
        node("MatMul", ["colours", "weights"], ["scores"]),
        node("Softmax", ["scores"], [output], axis=1),
    ]
    inputs: Named = {name: (TensorProto.FLOAT, ["rows", *shape])}
    return graph(inputs, {output: (TensorProto.FLOAT, ["rows", n])}, nodes, weights=weights)


def tensors(kind: str, datatype: str, dims: Sequence[int], *names: str, more: str = "") -> str:
    each = f"data_type: TYPE_{datatype} dims: {list(dims)} {more}".rstrip()
    return "\n".join(f'{kind} {{ name: "{name}" {each} }}' for name in names)


def control(name: str, id_type: str = "UINT64") -> str:
    """`name` is the last word of its kind, too."""
    said = f"data_type: TYPE_{id_type}" if name == "CORRID" else "int32_false_true: [0, 1]"
    kind = f"CONTROL_SEQUENCE_{name}"
    return f'control_input {{ name: "{name}" control {{ kind: {kind} {said} }} }}'


def config(name: str, rows_max: int, *parts: str, platform: str = "onnxruntime_onnx") -> str:
    kind = "backend" if platform == "python" else "platform"
    head = f'name: "{name}"\n{kind}: "{platform}"\nmax_batch_size: {rows_max}'
    return "\n".join((head, *parts)) + "\n"


def labels(count: int) -> str:
    return "".join(f"LABEL {number}\n" for number in range(count))


def put(folder: Path, configuration: str, model: bytes, file: str = "model.onnx") -> Path:
    (folder / "1").mkdir(parents=True)
    (folder / "config.pbtxt").write_text(configuration)
    (folder / "1" / file).write_bytes(model)
    return folder


def put_arithmetic(root: Path, name: str, datatype: str, element: int) -> None:
    parts = (
        tensors("input", datatype, [ELEMENTS], "INPUT0", "INPUT1"),
        tensors("output", datatype, [ELEMENTS], "OUTPUT0", "OUTPUT1"),
    )
    put(root / name, config(name, 8, *parts), add_and_subtract(element))


def simple(root: Path) -> None:
    put_arithmetic(root, "simple", "INT32", TensorProto.INT32)


def simple_int8(root: Path) -> None:
    put_arithmetic(root, "simple_int8", "INT8", TensorProto.INT8)


def simple_string(root: Path) -> None:
    put_arithmetic(root, "simple_string", "STRING", TensorProto.STRING)


def put_sequence(root: Path, name: str, graph: bytes, scheduling: str) -> None:
    parts = (
        f"sequence_batching {{\n{scheduling}\n}}",
        tensors("input", "INT32", [1], "INPUT"),
        tensors("output", "INT32", [1], "OUTPUT"),
    )
    put(root / name, config(name, 8, *parts), graph)


def simple_sequence(root: Path) -> None:
    controls = "\n".join(control(name) for name in ("START", "READY"))
    put_sequence(root, "simple_sequence", running_value(), controls)


def simple_dyna_sequence(root: Path) -> None:
    controls = "\n".join(control(name) for name in ("START", "END", "READY", "CORRID"))
    scheduling = (
        "max_sequence_idle_microseconds: 10000000\n"
        "oldest { max_candidate_sequences: 1024 max_queue_delay_microseconds: 10000 }\n"
    )
    graph = running_value_and_id()
    put_sequence(root, "simple_dyna_sequence", graph, scheduling + controls)


def simple_string_dyna_sequence(root: Path) -> None:
    controls = "\n".join(control(name, "STRING") for name in ("START", "END", "CORRID"))
    names = 'input_name: "before" output_name: "after"'
    state = f"state {{ {names} data_type: TYPE_INT32 dims: [1] }}\n"
    put_sequence(root, "simple_string_dyna_sequence", running_sum(), state + controls)


def densenet_onnx(root: Path) -> None:
    """The graph's own output has two dimensions more than its clients see."""
    parts = (
        tensors("input", "FP32", [3, 224, 224], "data_0", more="format: FORMAT_NCHW"),
        tensors("output", "FP32", [CLASSES], "fc6_1", more='label_filename: "labels.txt"'),
    )
    graph = classifier("data_0", "fc6_1", [3, 224, 224], [2, 3], CLASSES)
    folder = put(root / "densenet_onnx", config("densenet_onnx", 8, *parts), graph)
    (folder / "labels.txt").write_text(labels(CLASSES))


def inception_onnx(root: Path) -> None:
    output = "InceptionV3/Predictions/Softmax"
    label = 'label_filename: "labels.txt"'
    parts = (
        tensors("input", "FP32", [299, 299, 3], "input", more="format: FORMAT_NHWC"),
        tensors("output", "FP32", [INCEPTION_CLASSES], output, more=label),
    )
    graph = classifier("input", output, [299, 299, 3], [1, 2], INCEPTION_CLASSES)
    folder = put(root / "inception_onnx", config("inception_onnx", 128, *parts), graph)
    (folder / "labels.txt").write_text(labels(INCEPTION_CLASSES))


REPEAT = '''"""Answers a request once for each value of IN, the given milliseconds apart."""

from time import sleep

import numpy
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def execute(self, requests):
        for request in requests:
            sender = request.get_response_sender()
            values, delays_ms, wait_ms = (
                pb_utils.get_input_tensor_by_name(request, name).as_numpy()
                for name in ("IN", "DELAY", "WAIT")
            )
            for index, (value, delay_ms) in enumerate(zip(values, delays_ms)):
                sleep(delay_ms / 1000)
                outputs = [
                    pb_utils.Tensor("OUT", value.reshape(1)),
                    pb_utils.Tensor("IDX", numpy.array([index], "uint32")),
                ]
                sender.send(pb_utils.InferenceResponse(outputs))
            sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
            sleep(wait_ms.item() / 1000)
        return None
'''


def simple_identity(root: Path) -> None:
    """Texts, with what they hold of NULs."""
    texts: Element = (TensorProto.STRING, ["rows", "texts"])
    nodes = [helper.make_node("Identity", ["INPUT0"], ["OUTPUT0"])]
    parts = (
        tensors("input", "STRING", [-1], "INPUT0"),
        tensors("output", "STRING", [-1], "OUTPUT0"),
    )
    made = graph({"INPUT0": texts}, {"OUTPUT0": texts}, nodes)
    put(root / "simple_identity", config("simple_identity", 8, *parts), made)


def repeat_int32(root: Path) -> None:
    parts = (
        "model_transaction_policy { decoupled: true }",
        tensors("input", "INT32", [-1], "IN"),
        tensors("input", "UINT32", [-1], "DELAY"),
        tensors("input", "UINT32", [1], "WAIT"),
        tensors("output", "INT32", [1], "OUT"),
        tensors("output", "UINT32", [1], "IDX"),
    )
    configuration = config("repeat_int32", 0, *parts, platform="python")
    put(root / "repeat_int32", configuration, REPEAT.encode(), "model.py")


MODELS = (
    simple,
    simple_identity,
    simple_int8,
    simple_sequence,
    simple_dyna_sequence,
    simple_string,
    simple_string_dyna_sequence,
    densenet_onnx,
    inception_onnx,
    repeat_int32,
)
NAMES = tuple(model.__name__ for model in MODELS)


def write(root: Path, names: Collection[str] = NAMES) -> None:
    for model in MODELS:
        if model.__name__ in names:
            model(root)
