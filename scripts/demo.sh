#!/usr/bin/env bash
# Install what is needed and let the embedded demo model tell a story. Arguments go to generate.py.
set -euo pipefail
cd "$(dirname "$0")/.."

./scripts/setup.sh
exec .venv/bin/python generate.py --prompt "Once upon a time" --max_new_tokens 250 "$@"
