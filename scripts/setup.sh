#!/usr/bin/env bash
# Makes .venv with everything the platform, its tests and its demo need, and says what it cost.
set -euo pipefail
cd "$(dirname "$0")/.."
started=$SECONDS
[ -x .uv/bin/uv ] || { python3 -m venv .uv && .uv/bin/pip install -q uv; }
export UV_LINK_MODE=copy
links=$(.uv/bin/python -m pip config get global.find-links 2>/dev/null || true)
torch=()
if [ -n "$links" ]; then export UV_FIND_LINKS=$links; else torch=(--torch-backend=auto); fi
[ -d .venv ] || .uv/bin/uv venv -q .venv
.uv/bin/uv pip install -q -p .venv "${torch[@]}" -c constraints.txt \
  -e libs/leptonic --group dev \
  -e '.[ingest,preprocess,trainer,inference,scheduler,agent,kernels,embedded,examples]'
# The first start finds its bytecode: half of a service's start-up is imports, and torch without it
# costs a training worker 10 s.
export PYTHONDONTWRITEBYTECODE=
.venv/bin/python -c 'import stack.app, stack.collector, leptonic.cli
import services.ingest.app, services.preprocess.app, services.trainer.app
import services.registry.app, services.inference.app, services.scheduler.app
import ray.train.torch, services.trainer.member'
.venv/bin/python -c 'import sklearn.datasets, tritonclient.grpc'
scripts/native.sh || echo "not all of native/ compiles here; Python takes over from what does not"
touch .venv/.ready
echo "set-up: $((SECONDS - started)) s, $(du -sh .venv | cut -f1) in .venv"
