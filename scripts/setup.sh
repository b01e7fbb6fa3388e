#!/usr/bin/env bash
# Make or reuse .venv with what a lock file pins: setup.sh [requirements.lock]. PYTHON: which python.
set -euo pipefail
cd "$(dirname "$0")/.."

lock=${1:-requirements.lock}
python=${PYTHON:-python3}
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "setup.sh: needs Python 3.11 or newer: set PYTHON to one" >&2
    exit 2
fi
[[ -x .venv/bin/python ]] || "$python" -m venv .venv
# Written last: an installation that broke off is done again.
stamp=.venv/$lock.installed
if ! cat requirements*.lock | cmp -s - "$stamp"; then
    echo "setup.sh: installing $lock into .venv (some 250 MB where torch is a CPU build) ..." >&2
    .venv/bin/python -m pip install --disable-pip-version-check --quiet -r "$lock" >&2
    cat requirements*.lock > "$stamp"
fi
