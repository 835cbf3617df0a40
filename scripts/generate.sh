#!/usr/bin/env bash
# Generates the gRPC code beside the protos. A test runs it and compares.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH=$(dirname "$PYTHON"):$PATH
out=${1:-.}
common=$("$PYTHON" -c 'import importlib.util as u; print(list(u.find_spec("google").submodule_search_locations)[0] + "/..")')
"$PYTHON" -m grpc_tools.protoc -I . -I "$common" \
  --python_out="$out" --grpc_python_out="$out" --mypy_out="readable_stubs:$out" libs/contracts/protos/*.proto
