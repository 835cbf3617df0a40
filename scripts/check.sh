#!/usr/bin/env bash
# The only gate: format, lint, types, import rules; the tidy and docs tests run with pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
PATH=$PWD/.venv/bin:$PATH
ruff format --check --quiet .
ruff check --quiet .
lint-imports --no-cache >/dev/null || { lint-imports --no-cache; exit 1; }
mypy --no-error-summary services libs stack kernels bench tests
python -m pytest tests/test_tidy.py tests/test_docs.py
