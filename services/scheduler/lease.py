"""Who leads: whoever's connection holds a lock of Postgres's.

A leader that dies lets go of it at once: the kernel closes its connection. One that stands still,
or whose machine has gone without a word, does not; so a leader renews a lease beside the lock, and
a standby that finds it run out has Postgres end that connection. What a leader commits goes over
the connection that holds the lock, so two can never both commit.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator

import psycopg
from psycopg.rows import DictRow

from libs.database import TRANSIENT, Database

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
UNSEAT = """
    select pid, pg_terminate_backend(pid) as ended from lease
    where at < clock_timestamp() - make_interval(secs => %s) and exists (
        select from pg_locks held join pg_database own on own.oid = held.database
        where held.pid = lease.pid and held.granted and held.locktype = 'advisory'
            and own.datname = current_database() and held.objsubid = 1
            and (held.classid::bigint << 32) | held.objid::bigint = hashtext(%s)
    )
"""
"""Only the one that holds the lock: after a restart of Postgres its pid is somebody else's."""


@contextlib.asynccontextmanager
async def seat(db: Database) -> AsyncIterator[psycopg.AsyncConnection[DictRow]]:
    """Waits for its turn to lead; leads for as long as the connection lasts."""
    waiting = asyncio.create_task(unseat(db))
    try:
        async with db.exclusively(LEADER) as connection:
            waiting.cancel()
            yield connection
    finally:
        waiting.cancel()


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
