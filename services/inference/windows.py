"""Windows that slide over images: of a convolution and of a pool, as ONNX writes them down."""

from typing import Any, NamedTuple

import onnx

from services.inference.graphs import attributes


class Window(NamedTuple):
    """Along one axis, in pixels."""

    size: int
    stride: int
    before: int
    after: int

    def places(self, length: int) -> int:
        return (length + self.before + self.after - self.size) // self.stride + 1


def windows_of(
    node: onnx.NodeProto, sizes: tuple[int, ...] | None = None
) -> tuple[Window, Window] | None:
    """Of its rows and its columns; `sizes`: its weights', which it may leave out.

    None for what a plain window has not: groups, dilations, SAME, sizes that are rounded up.
    """
    said: dict[str, Any] = {
        "kernel_shape": sizes, "strides": [1, 1], "pads": [0] * 4, "dilations": [1, 1],
        "auto_pad": b"NOTSET", "group": 1, "ceil_mode": 0,
    } | attributes(node)  # fmt: skip
    is_plain = said["auto_pad"] == b"NOTSET" and said["group"] == 1 and said["ceil_mode"] == 0
    if not is_plain or list(said["dilations"]) != [1, 1] or len(said["kernel_shape"]) != 2:
        return None
    if sizes is not None and tuple(said["kernel_shape"]) != sizes:
        return None
    rows, columns = zip(
        said["kernel_shape"], said["strides"], said["pads"][:2], said["pads"][2:], strict=True
    )
    found = Window(*rows), Window(*columns)
    is_possible = all(min(one[:2]) >= 1 and min(one[2:]) >= 0 for one in found)
    return found if is_possible else None
