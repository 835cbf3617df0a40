#!/usr/bin/env bash
# Prints where promtool is. Where it is not installed it is taken out of Debian's package of
# Prometheus, which is not installed for that: it would start a server.
set -euo pipefail
cd "$(dirname "$0")/.."
command -v promtool && exit
mine=$PWD/.venv/bin/promtool
if [[ ! -x $mine ]]; then
  command -v apt-get >/dev/null || { echo "promtool is not installed, and there is no apt" >&2; exit 1; }
  folder=$(mktemp -d)
  trap 'rm -rf "$folder"' EXIT
  chmod 755 "$folder"
  (cd "$folder" && { apt-get -q download prometheus || { apt-get -q update && apt-get -q download prometheus; }; }) >&2
  dpkg-deb -x "$folder"/prometheus_*.deb "$folder/unpacked"
  install "$folder/unpacked/usr/bin/promtool" "$mine"
fi
echo "$mine"
