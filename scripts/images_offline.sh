#!/usr/bin/env bash
# Stand-ins for the base images, from Debian and wheels, under the names that compose.yaml and the
# Dockerfile use: for machines that reach no image registry. An image that is there stays.
set -euo pipefail
cd "$(dirname "$0")/.."
started=$SECONDS
scripts/engine.sh
work=$PWD/.offline
slim=python:3.11-slim-bookworm full=python:3.11-bookworm
there() { docker image inspect "$1" >/dev/null 2>&1; }
image_of() { docker compose -f compose.yaml -f compose.replicas.yaml --profile '*' config --format json \
  | python3 -c 'import json, sys; print(json.load(sys.stdin)["services"][sys.argv[1]]["image"])' "$1"; }

if ! there "$slim"; then
  command -v debootstrap >/dev/null || { apt-get update -q && apt-get install -y -q --no-install-recommends debootstrap; } >"$work/apt.log" 2>&1
  mirror=$(awk '/^URIs/ {print $2; exit}' /etc/apt/sources.list.d/debian.sources)
  root=$work/root
  rm -rf "$root"
  debootstrap --variant=minbase --include=ca-certificates,python3,wget bookworm "$root" "$mirror" >"$work/debootstrap.log" 2>&1
  rm -rf "$root"/var/cache/apt/archives/*.deb "$root"/var/lib/apt/lists/* "$root"/var/cache/apt/*.bin \
    "$root"/usr/share/{doc,man,locale}
  ln -sf /usr/bin/python3.11 "$root/usr/local/bin/python3.11"
  ln -sf python3.11 "$root/usr/local/bin/python3"
  ln -sf python3.11 "$root/usr/local/bin/python"
  tar -C "$root" --numeric-owner -c . | docker import -c 'ENV LANG=C.UTF-8' -c 'CMD ["python3"]' - "$slim" >/dev/null
  rm -rf "$root"
fi
if ! there "$full"; then
  # The build image knows what this machine's pip knows: its certificates and its folder of wheels.
  context=$work/full
  rm -rf "$context"
  mkdir -p "$context/wheels"
  cp /etc/ssl/certs/ca-certificates.crt "$context/"
  links=$(python3 -m pip config get global.find-links 2>/dev/null || true)
  [ -z "$links" ] || cp "$links"/*.whl "$context/wheels/"
  cat >"$context/Dockerfile" <<DOCKERFILE
FROM $slim
COPY ca-certificates.crt /etc/ssl/certs/ca-certificates.crt
COPY wheels /wheels
ENV SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt PIP_CERT=/etc/ssl/certs/ca-certificates.crt
RUN apt-get update -q && apt-get install -y -q --no-install-recommends python3-venv python3-pip \
    && rm -rf /var/lib/apt/lists/* /usr/lib/python3.11/EXTERNALLY-MANAGED \
    && ln -sf /usr/bin/pip3 /usr/local/bin/pip
${links:+ENV UV_FIND_LINKS=/wheels}
DOCKERFILE
  docker build -q -t "$full" "$context" >/dev/null
  rm -rf "$context"
fi
for folder in deploy/offline/*/; do
  service=$(basename "$folder")
  image=$(image_of "$service")
  there "$image" || docker build -q -t "$image" "$folder" >/dev/null
done
echo "stand-in images in $((SECONDS - started)) s:"
docker image ls --format '{{.Repository}}:{{.Tag}}  {{.Size}}' | grep -vE '^(leptonic/|<none>)'
