#!/usr/bin/env bash
# Builds the images and runs every test that is about containers. Needs a Docker engine, or what
# scripts/engine.sh needs to start one.
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/engine.sh
base=python:3.11-slim-bookworm
docker image inspect "$base" >/dev/null 2>&1 || timeout 60 docker pull -q "$base" 2>/dev/null \
  || scripts/images_offline.sh
started=$SECONDS
docker compose build --quiet
echo "built in $((SECONDS - started)) s:"
docker image ls --format '{{.Repository}}:{{.Tag}}  {{.Size}}' | grep '^leptonic/'
exec .venv/bin/python -m pytest --timeout 600 -m "compose and not long" "$@"
