#!/usr/bin/env bash
# Download a model and convert it: checkpoints/REPO/model.pth, under the current directory.
set -euo pipefail

if [[ $# -lt 1 || $1 == -* ]]; then
    echo "usage: $0 REPO [--dtype bfloat16|float16|float32]" >&2
    exit 2
fi
repo=$1
shift
root=$(cd "$(dirname "$0")/.." && pwd)
python=$root/.venv/bin/python
[[ -x $python ]] || python=python3

folder=$("$python" "$root/scripts/download.py" --repo_id "$repo")
"$python" "$root/scripts/convert_hf_checkpoint.py" --checkpoint_dir "$folder" "$@"
