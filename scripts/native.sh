#!/usr/bin/env bash
# The native front, operators and pool: compiled into .venv when what they are made from has changed.
#   scripts/native.sh          where a compiler and, for the front, libnghttp2's headers are; else
#                              says so, and is well
#   scripts/native.sh wheel    installs them where it may (root, apt), and leaves wheels in dist/native
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-$PWD/.venv/bin/python}
missing() {
  command -v g++ >/dev/null || echo g++
  [ -e /usr/include/nghttp2/nghttp2.h ] || [ -e /usr/local/include/nghttp2/nghttp2.h ] || echo libnghttp2-dev
}
lacks=$(missing)
if [ -n "$lacks" ] && [ "${1:-}" = wheel ]; then
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    apt-get update -q && apt-get install -y -q --no-install-recommends $lacks
  else
    echo "install ${lacks//$'\n'/ and } first" >&2
    exit 1
  fi
elif [ -n "$lacks" ]; then
  echo "native front: not built, ${lacks//$'\n'/ and } is missing; the Python front takes over"
  command -v g++ >/dev/null || { echo "native operators and pool: not built either"; exit 0; }
  exec "$python" native/build.py install leptonic_ops leptonic_placement
fi
"$python" native/build.py install
[ "${1:-}" != wheel ] || "$python" native/build.py wheel
