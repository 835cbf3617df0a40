"""The client installs and imports without the platform."""

import subprocess
import sys

HEAVY = ("torch", "ray", "numpy", "grpc", "pyarrow", "nats", "msgspec", "libs", "services", "stack")


def test_importing_the_client_and_its_commands_loads_nothing_heavy() -> None:
    program = f"import leptonic, leptonic.cli, sys; print([m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
