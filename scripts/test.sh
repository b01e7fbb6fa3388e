#!/usr/bin/env bash
# Install what the tests need, check the style, then run all tests, one file at a time on each core.
# --fast: skip the installation, the style check and the slow test files (FAST in
# tests/conftest.py). Other arguments go to pytest: -n 0 for one process.
set -euo pipefail
cd "$(dirname "$0")/.."

# Files in the order of LONGEST in tests/conftest.py, not by their number of tests.
pytest=(.venv/bin/python -m pytest -n auto --dist loadfile --no-loadscope-reorder)
if [[ "${1:-}" == --fast ]]; then
    exec "${pytest[@]}" -m "not slow" "${@:2}"
fi
./scripts/setup.sh requirements-test.lock
.venv/bin/ruff check .
.venv/bin/ruff format --check .
exec "${pytest[@]}" "$@"
