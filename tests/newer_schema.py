"""A pytest plugin: whatever a test migrates is migrated once more, as the next release might."""

from collections.abc import Iterator, Sequence

import psycopg
import pytest
from psycopg import sql
from psycopg.rows import DictRow

from libs import database

TABLES = "select table_name from information_schema.tables where table_schema = %s"
added = 0


async def migrate_once_more(
    connection: psycopg.AsyncConnection[DictRow], service: str, migrations: Sequence[str]
) -> None:
    global added  # a plugin's only memory
    await ours(connection, service, migrations)
    for row in await (await connection.execute(TABLES, (service,))).fetchall():
        column = "add column if not exists of_the_next_release text not null default 'new'"
        names = sql.Identifier(service, row["table_name"])
        await connection.execute(sql.SQL(f"alter table {{}} {column}").format(names))
        added += 1
    number = len(migrations) + 1
    query = "insert into migration (number) values (%s) on conflict do nothing"
    await connection.execute(query, (number,))


ours = database.migrate


@pytest.fixture(scope="session", autouse=True)
def newer_schema() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(database, "migrate", migrate_once_more)
        yield


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    terminalreporter.write_line(f"{added} columns of the next release")
