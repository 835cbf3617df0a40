"""What every kernel must compute, in float64 and as plainly as it can be said."""

import numpy as np
from numpy.typing import NDArray


def normalise(
    images: NDArray[np.uint8], mean: NDArray[np.float64], std: NDArray[np.float64]
) -> NDArray[np.float64]:
    """uint8 [N, H, W, C] -> float64 [N, C, H, W]: `(x / 255 - mean[c]) / std[c]`."""
    return ((images / 255.0 - mean) / std).transpose(0, 3, 1, 2)
