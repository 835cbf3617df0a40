#!/bin/sh
# As the official image: a cluster on the first start, then the server as the user postgres.
set -e
mkdir -p "$PGDATA"
chown postgres "$PGDATA"
chmod 700 "$PGDATA"
as_postgres() { setpriv --reuid=postgres --regid=postgres --clear-groups "$@"; }
if [ ! -s "$PGDATA/PG_VERSION" ]; then
  password=$(mktemp)
  cat "${POSTGRES_PASSWORD_FILE:?names the file with the password}" >"$password"
  chown postgres "$password"
  as_postgres initdb -D "$PGDATA" -U "${POSTGRES_USER:-postgres}" --pwfile="$password" \
    --auth=scram-sha-256 --encoding=UTF8 --locale=C.UTF-8 --no-instructions >/dev/null
  rm "$password"
  [ -z "$POSTGRES_DB" ] || echo "create database $POSTGRES_DB" | as_postgres postgres --single -D "$PGDATA" postgres >/dev/null
  echo "host all all all scram-sha-256" >>"$PGDATA/pg_hba.conf"
fi
exec setpriv --reuid=postgres --regid=postgres --clear-groups "$@" -c listen_addresses='*' \
  -c unix_socket_directories=/tmp
