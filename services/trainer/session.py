"""What has to be there before Ray is imported: its environment, its folder, its reaper."""

import contextlib
import os
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from services.trainer.reaper import PREFIX

MARK = "RAY_OF_TRAINER"
REAPER = Path(__file__).with_name("reaper.py")
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_AUTH_MODE": "token",
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_memory_monitor_refresh_ms": "0",
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "5000",
    "RAY_health_check_failure_threshold": "5",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "15",
    "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
    # Ray would write a process's title over the beginning of its environment, at times over our
    # mark: after 3 of 5 kills two agents stayed for 62 s.
    "SPT_NOENV": "1",
    # Ray counts nothing here, and would hide GPUs from who has asked it for none.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # What torch's deterministic algorithms ask for on a GPU.
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    "OMP_NUM_THREADS": "1",
}


@contextlib.contextmanager
def opened(token: str = "") -> Iterator[str]:
    """Ray's folder: short, since Ray's sockets lie below it and the path of one has 107 bytes.

    Nothing of Ray outlives this process, however it ends: see `reaper.py`, which runs in a session
    of its own so that what kills our process group does not kill it first. `token`: the cluster's;
    a Ray of our own gets a new one.
    """
    folder = tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-")
    mark = f"{MARK}={secrets.token_hex(16)}"
    os.environ.update(ENVIRONMENT)
    os.environ[MARK] = mark.removeprefix(f"{MARK}=")
    os.environ["RAY_AUTH_TOKEN"] = token or secrets.token_hex(32)
    command = [sys.executable, "-I", "-S", str(REAPER), mark, folder]
    environment = {name: value for name, value in os.environ.items() if name != MARK}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, start_new_session=True, env=environment
    ) as process:
        assert process.stdin is not None
        try:
            yield folder
        finally:
            process.stdin.close()
