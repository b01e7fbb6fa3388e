#!/usr/bin/env bash
# Install what the tests need, then run them all, a file at a time on each core. Arguments go to
# pytest: -n 0 for one process.
set -euo pipefail
cd "$(dirname "$0")/.."

./scripts/setup.sh requirements-test.lock
.venv/bin/ruff check .
.venv/bin/ruff format --check .
exec .venv/bin/python -m pytest -n auto --dist loadfile "$@"
