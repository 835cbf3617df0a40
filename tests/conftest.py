"""What the tests of a running server have in common."""

import pytest

from services.inference import native


@pytest.fixture(params=["native", "python"])
def front(request: pytest.FixtureRequest) -> str:
    if request.param == "native" and not native.available():
        pytest.skip("leptonic_native is not built: make native")
    return str(request.param)
