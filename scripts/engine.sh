#!/usr/bin/env bash
# Starts a Docker engine with Compose where there is none: Debian 12, as root. Says so and exits with
# 3 where it cannot.
set -euo pipefail
cd "$(dirname "$0")/.."
work=$PWD/.offline
mkdir -p "$work"
cannot() { echo "no Docker engine here: $*" >&2; exit 3; }
answers() { docker info >/dev/null 2>&1; }

if ! answers; then
  [ "$(id -u)" = 0 ] || cannot "none answers, and starting one needs root"
  command -v apt-get >/dev/null || command -v dockerd >/dev/null || cannot "there is no dockerd and no apt-get"
  command -v dockerd >/dev/null || {
    apt-get update -q >"$work/apt.log" 2>&1 || cannot "apt-get update failed: $(tail -1 "$work/apt.log")"
    DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends docker.io iptables tini \
      >>"$work/apt.log" 2>&1 || cannot "docker.io cannot be installed: $(tail -1 "$work/apt.log")"
  }
  # In a session of its own: it outlives this script, as a service would.
  setsid nohup dockerd --storage-driver=overlay2 </dev/null >"$work/dockerd.log" 2>&1 &
  echo $! >"$work/dockerd.pid"
  for _ in $(seq 150); do answers && break; sleep 0.2; done
  answers || cannot "dockerd does not start: $(tail -1 "$work/dockerd.log")"
fi

# Compose v2 and buildx, where the engine's package lacks them: the plugins of the next Debian are
# static enough to run here.
if ! docker compose version >/dev/null 2>&1; then
  mirror=$(awk '/^URIs/ {print $2; exit}' /etc/apt/sources.list.d/debian.sources)
  apt=$work/apt
  mkdir -p "$apt/lists/partial" "$apt/cache/archives/partial"
  echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror trixie main" >"$apt/sources.list"
  options=(-o "Dir::State::lists=$apt/lists" -o "Dir::Etc::sourcelist=$apt/sources.list"
    -o Dir::Etc::sourceparts=/dev/null -o "Dir::Cache=$apt/cache" -o APT::Sandbox::User=root)
  apt-get "${options[@]}" update -q >"$work/apt.log" 2>&1 || cannot "no list of Debian trixie"
  (cd "$apt" && apt-get "${options[@]}" download -q docker-compose docker-buildx >>"$work/apt.log" 2>&1 \
    && for package in *.deb; do dpkg -x "$package" x; done) || cannot "no Compose v2"
  plugins=${DOCKER_CONFIG:-$HOME/.docker}/cli-plugins
  mkdir -p "$plugins"
  cp "$apt"/x/usr/libexec/docker/cli-plugins/* "$plugins/"
  rm -rf "$apt"
fi
docker compose version >/dev/null
