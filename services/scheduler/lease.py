"""Who leads: whoever's connection holds a lock of Postgres's.

A leader that dies lets go of it at once: the kernel closes its connection. One that stands still,
or whose machine has gone without a word, does not; so a leader renews a lease beside the lock, and
a standby that finds it run out has Postgres end that connection. What a leader commits goes over
the connection that holds the lock, so two can never both commit.
"""

import asyncio
import contextlib
import functools
import hashlib
import logging
from collections.abc import AsyncIterator
from importlib.util import find_spec
from pathlib import Path

import psycopg
from psycopg.rows import DictRow

from libs.contracts import events
from libs.database import TRANSIENT, Database
from services.scheduler.native_pool import EXTENSION

log = logging.getLogger(__name__)
LEADER = "leptonic.scheduler"
"""Name of the lock."""
RENEW_S = 1.0
LEASE_S = 5.0
"""Longer than a busy machine lets a leader wait for its turn."""
RENEW = """
    insert into lease (pid, at) values (%s, clock_timestamp())
    on conflict (single) do update set pid = excluded.pid, at = excluded.at
"""
HOLDERS = """
    select held.pid from pg_locks held join pg_database own on own.oid = held.database
    where held.granted and held.locktype = 'advisory'
        and own.datname = current_database() and held.objsubid = 1
        and (held.classid::bigint << 32) | held.objid::bigint = hashtext(%s)
"""
UNSEAT = f"""
    select pid, pg_terminate_backend(pid) as ended from lease
    where at < clock_timestamp() - make_interval(secs => %s) and pid in ({HOLDERS})
"""  # noqa: S608 - our own words
"""Only the one that holds the lock: after a restart of Postgres its pid is somebody else's."""
SAY_WHO = "select set_config('application_name', %s, false)"
LEADS_ALIKE = f"""
    select from pg_stat_activity where pid in ({HOLDERS}) and application_name = %s
"""


@contextlib.asynccontextmanager
async def seat(db: Database) -> AsyncIterator[psycopg.AsyncConnection[DictRow]]:
    """Waits for its turn to lead; leads for as long as the connection lasts."""
    waiting = asyncio.create_task(unseat(db))
    try:
        async with db.exclusively(LEADER) as connection:
            waiting.cancel()
            await connection.execute(SAY_WHO, (code(),))
            yield connection
    finally:
        waiting.cancel()


@functools.cache
def code() -> str:
    """A name of what decides: another release may decide the same, and remember something else."""
    files = [Path(events.__file__), *sorted(Path(__file__).parent.glob("*.py"))]
    native = find_spec(EXTENSION)
    if native is not None and native.origin is not None:
        files.append(Path(native.origin))
    together = hashlib.sha256(b"".join(file.read_bytes() for file in files))
    return f"{LEADER} {together.hexdigest()[:16]}"


async def leads_alike(db: Database) -> bool:
    """Whether somebody leads by the code that we have."""
    async with db.transaction() as tx:
        return await tx.one(LEADS_ALIKE, (LEADER, code())) is not None


async def unseat(db: Database) -> None:
    """Ends a leader that has not renewed its lease, until cancelled."""
    while True:
        try:
            async with db.transaction() as tx:
                for row in await tx.all(UNSEAT, (LEASE_S, LEADER)):
                    if row["ended"]:
                        log.warning("the leader at %s stands still, and leads no more", row["pid"])
        except TRANSIENT as error:
            log.warning("lease: %s", error)
        await asyncio.sleep(RENEW_S)


async def renew(db: Database, connection: psycopg.AsyncConnection[DictRow]) -> None:
    """On another connection: a commit that takes long is no reason to lose the lead."""
    while True:
        try:
            async with db.transaction() as tx:
                await tx.execute(RENEW, (connection.info.backend_pid,))
        except TRANSIENT as error:
            log.warning("lease: %s", error)
        await asyncio.sleep(RENEW_S)
