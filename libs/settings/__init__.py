"""A service's configuration: one frozen object, read from the environment once.

A field of `Common` is the variable `LEPTONIC_<FIELD>`; a field a service adds is
`LEPTONIC_<SERVICE>_<FIELD>`. A variable with one of these prefixes that nobody knows is an error.
A secret may be a file: where `LEPTONIC_SECRETS_DIR` names a folder, a file in it that is called as
a variable holds its value.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, TypeVar

import msgspec
from msgspec import Meta

SECRETS_DIR = "LEPTONIC_SECRETS_DIR"
SERVICES = ("ingest", "preprocess", "trainer", "registry", "inference", "scheduler")
PREFIXES = (*SERVICES, "agent")
"""Whose settings may stand in one environment: the engines' agents are no services of the stack."""


class Unknown(ValueError):
    """A variable that no setting reads, or a value that does not fit its type."""


class Common(msgspec.Struct, frozen=True, kw_only=True):
    """What every service needs in order to find the others."""

    host: Annotated[str, Meta(description="address every door listens on")] = "127.0.0.1"
    nats_url: Annotated[str, Meta(description="NATS server")] = "nats://127.0.0.1:4222"
    nats_token: Annotated[str, Meta(description="NATS token; empty for none")] = ""
    postgres_dsn: Annotated[str, Meta(description="Postgres connection string")] = ""
    s3_endpoint: Annotated[str, Meta(description="host:port of the S3 server")] = "127.0.0.1:9000"
    s3_access_key: Annotated[str, Meta(description="S3 access key")] = ""
    s3_secret_key: Annotated[str, Meta(description="S3 secret key")] = ""
    s3_bucket: Annotated[str, Meta(description="bucket for parts and artifacts")] = "leptonic"
    s3_secure: Annotated[bool, Meta(description="use TLS towards S3")] = False
    otlp_endpoint: Annotated[str, Meta(description="host:port for OTLP/gRPC; empty: none")] = ""
    registry_grpc: Annotated[str, Meta(description="the registry's gRPC door")] = "127.0.0.1:9013"
    ingest_grpc: Annotated[str, Meta(description="ingest's gRPC door")] = "127.0.0.1:9010"
    machine: Annotated[str, Meta(description="node that the agents here are together")] = ""
    share_ports: Annotated[bool, Meta(description="a newer process may take the doors over")] = (
        False
    )
    drain_s: Annotated[float, Meta(description="seconds a balancer has to notice a SIGTERM")] = 0.0
    log_level: Annotated[str, Meta(description="DEBUG, INFO, WARNING or ERROR")] = "INFO"


S = TypeVar("S", bound=Common)


def variables(kind: type[Common], service: str) -> dict[str, msgspec.structs.FieldInfo]:
    """Environment variable -> the field it sets, in declaration order."""
    shared = set(Common.__struct_fields__)
    return {
        (f"LEPTONIC_{f.name}" if f.name in shared else f"LEPTONIC_{service}_{f.name}").upper(): f
        for f in msgspec.structs.fields(kind)
    }


def load(kind: type[S], service: str, environment: Mapping[str, str]) -> S:
    """Environment -> settings. Raises `Unknown`, which names the variable."""
    known = variables(kind, service)
    values = {}
    for name, text in {**secrets(environment), **environment}.items():
        if not name.startswith("LEPTONIC_") or is_of_another_service(name, service):
            continue
        if name == SECRETS_DIR:
            continue
        if name not in known:
            raise Unknown(f"{name}: no such setting; docs/settings.md lists them all")
        values[known[name].name] = text
    try:
        return msgspec.convert(values, kind, strict=False)
    except msgspec.ValidationError as error:
        raise Unknown(f"settings of {service}: {error}") from error


def secrets(environment: Mapping[str, str]) -> dict[str, str]:
    """Variable -> value, from the folder of files. Raises `Unknown` when it cannot be read."""
    folder = environment.get(SECRETS_DIR)
    if not folder:
        return {}
    try:
        files = sorted(Path(folder).glob("LEPTONIC_*"))
        found = {file.name: file.read_text().strip() for file in files}
    except OSError as error:
        raise Unknown(f"{SECRETS_DIR}: {error}") from error
    if not found:
        raise Unknown(f"{SECRETS_DIR}: no file in {folder} is called LEPTONIC_...")
    return found


def is_of_another_service(name: str, service: str) -> bool:
    shared = {f"LEPTONIC_{field}".upper() for field in Common.__struct_fields__}
    others = [s for s in PREFIXES if s != service]
    return name not in shared and any(name.startswith(f"LEPTONIC_{s.upper()}_") for s in others)
