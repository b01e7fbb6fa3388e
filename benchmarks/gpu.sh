#!/usr/bin/env bash
# All that is to be measured on a machine with one NVIDIA H200, in less than nine minutes:
# versions, correctness, an 8B shape eager, compiled and in int8 and int4, its products beside
# tinygemm's, a decode step's kernels.
#
#     ./benchmarks/gpu.sh                                   # to benchmarks/results/gpu-decode-DATE
#     ./benchmarks/gpu.sh speculate                         # a second run: 8B, with 1B as its draft
#     ./benchmarks/gpu.sh offload                           # a third: OPT-30B's shape in 16 GB
#     ./benchmarks/gpu.sh flash                             # a fourth: neurons from disk, the demo
#     ./benchmarks/gpu.sh ranks                             # a fifth: several GPUs of one machine
#     DEVICE=cpu CONFIG=small.json ./benchmarks/gpu.sh      # tries the script itself
#
# Needs no network. PYTHON: which python. OUT: where to write. Files: log.txt (all that was said),
# results.jsonl (a line for each part), kernels.txt, summary.json (also the last line of stdout).
# Each part has a time limit of its own; one that fails does not stop the others.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2

python=${PYTHON:-.venv/bin/python}
[[ -n ${PYTHON:-} || -x $python ]] || python=python3
what=${1:-decode}
out=${OUT:-benchmarks/results/gpu-$what-$(date +%F)}
device=${DEVICE:-cuda}
config=${CONFIG:-benchmarks/configs/llama-3.1-8b.json}
draft=${DRAFT_CONFIG:-benchmarks/configs/llama-3.2-1b.json}
deadline=520 # seconds from the start; a part that would run beyond it is cut short
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
trap 'echo stopped >&2; exit 130' INT
mkdir -p "$out" && : > "$out/log.txt" && : > "$out/results.jsonl" || exit 2

say() { echo "$*" | tee -a "$out/log.txt" >&2; }

# limited SECONDS COMMAND...: its stderr joins the log; 124: it ran out of time
limited() {
    local left=$((deadline - SECONDS)) limit=$1
    shift
    ((left < limit)) && limit=$left
    ((limit > 5)) || return 124
    timeout --foreground --signal=INT --kill-after=5 "$limit" "$@" 2> >(tee -a "$out/log.txt" >&2)
}

# part NAME SECONDS COMMAND...: the last line of its stdout, where that is JSON, is its result
part() {
    local name=$1 limit=$2 started=$SECONDS rc=0 figures
    shift 2
    say "== $name: $*"
    limited "$limit" "$@" > "$scratch/stdout" || rc=$?
    figures=$(tail -n 1 "$scratch/stdout")
    [[ $figures == "{"* ]] || figures=null
    printf '{"part": "%s", "rc": %d, "seconds": %d, "figures": %s}\n' \
        "$name" "$rc" "$((SECONDS - started))" "$figures" >> "$out/results.jsonl"
    ((rc == 0)) || say "== $name failed with code $rc"
}

# bench NAME SECONDS OPTION...: prefill and decode of the 8B shape with random weights
bench() {
    part "$1" "$2" "$python" generate.py --bench --json --random_weights "$config" \
        --device "$device" --temperature 0 "${@:3}"
}

missing() {
    "$python" - << 'END'
from importlib.util import find_spec
needed = "torch numpy safetensors tokenizers sentencepiece huggingface_hub jinja2 tqdm".split()
print(*(name for name in needed if find_spec(name) is None))
END
}

install_missing() {
    local wheels lacking
    lacking=$(missing) || { say "gpu.sh: $python does not run; set PYTHON"; exit 2; }
    for wheels in shared/wheels ../shared/wheels; do
        if [[ -n $lacking && -d $wheels ]]; then
            say "installing $lacking from $wheels"
            # shellcheck disable=SC2086  # a list of names
            "$python" -m pip install --quiet --no-index --find-links "$wheels" \
                --target "$scratch/site" $lacking >> "$out/log.txt" 2>&1
            export PYTHONPATH=$scratch/site${PYTHONPATH:+:$PYTHONPATH}
            lacking=$(missing)
        fi
    done
    [[ -z $lacking ]] || say "missing, and not in shared/wheels: $lacking"
}

versions() {
    nvidia-smi || echo "there is no nvidia-smi"
    "$python" -c 'import sys, torch; print(sys.version, torch.__version__, torch.version.cuda)'
    "$python" -m pip list 2> /dev/null | grep -i -E '^(triton|tokenizers|safetensors|numpy) '
}

install_missing
versions 2>&1 | tee -a "$out/log.txt" >&2
if [[ $what == speculate ]]; then
    part check 200 "$python" benchmarks/gpu_check.py --device "$device" --drafts
    part speculate 320 "$python" benchmarks/speculate.py --device "$device" --config "$config" \
        --draft_config "$draft" --parts verify synthetic --acceptance 0.8 --rounds 3
elif [[ $what == offload ]]; then
    part check 120 "$python" benchmarks/offload.py check --device "$device" --policies 15 \
        --directory "$scratch"
    part link 300 "$python" benchmarks/offload.py link --device "$device" --rows 32 --prompt 256 \
        --new 16 --config "${BIG_CONFIG:-benchmarks/configs/opt-30b.json}" --directory "$scratch"
    part auto 300 "$python" generate.py --offload auto --device "$device" --device_memory 16GB \
        --random_weights "${BIG_CONFIG:-benchmarks/configs/opt-30b.json}" --prompt 256 \
        --num_samples 256 --max_new_tokens 32 --ignore_eos --output "$scratch/out.jsonl" \
        --offload_dir "$scratch"
elif [[ $what == flash ]]; then
    cp -r checkpoints/demo-opt "$scratch/opt"
    text=${TEXT:-$scratch/text.txt} # by default what the demo itself tells
    [[ -f $text ]] || "$python" generate.py --checkpoint_path checkpoints/demo-opt --device "$device" \
        --num_samples 64 --max_new_tokens 400 --ignore_eos > "$text"
    part pack 120 "$python" flash.py --checkpoint_path "$scratch/opt" --device "$device" \
        --calibration_file "$text"
    part check 120 "$python" -m pytest -q -m gpu tests/test_flash.py
    for how in "" --compile; do
        part "decode$how" 100 "$python" generate.py --checkpoint_path "$scratch/opt" \
            --device "$device" --flash --dram_budget 80% --bench --json --prompt 64 \
            --max_new_tokens 64 ${how:+"$how"}
    done
elif [[ $what == ranks ]]; then
    count=$("$python" -c 'import torch; print(torch.cuda.device_count())')
    ((count > 1)) || say "there are $count GPUs here, and this takes two"
    for ranks in 2 4 8; do
        ((ranks <= count)) || continue
        torchrun=("$python" -m torch.distributed.run --standalone "--nproc_per_node=$ranks")
        for mode in "" int8 int4; do
            part "decode_${mode:-bf16}_$ranks" 120 "${torchrun[@]}" generate.py --bench --json \
                --random_weights "$config" ${mode:+--random_mode "$mode"} --device "$device" \
                --temperature 0 --compile --prompt 128 --max_new_tokens 128 --repeats 3
        done
        part "pipeline_$ranks" 120 "${torchrun[@]}" generate.py --bench --json --pipeline \
            --random_weights "$config" --device "$device" --temperature 0 --prompt 128 \
            --max_new_tokens 64 --batch_size 64 --repeats 3
    done
else
    part check 150 "$python" benchmarks/gpu_check.py --device "$device"
    bench decode_b1_compiled 110 --compile --prompt 128 --max_new_tokens 256 --repeats 3
    bench decode_b1_int8 60 --compile --random_mode int8 --prompt 128 --max_new_tokens 128 --repeats 3
    bench decode_b1_int4 60 --compile --random_mode int4 --prompt 128 --max_new_tokens 128 --repeats 3
    part products 60 "$python" benchmarks/gpu_products.py --device "$device" --config "$config"
    bench decode_b1_eager 60 --prompt 128 --max_new_tokens 64 --repeats 3
    bench prefill_compiled 70 --compile --compile_prefill --prompt 2048 --max_new_tokens 8 --repeats 5
    bench prefill_eager 50 --prompt 2048 --max_new_tokens 8 --repeats 5
    bench decode_b8_compiled 50 --compile --prompt 128 --max_new_tokens 128 --repeats 3 --batch_size 8
    bench decode_b64_compiled 60 --compile --prompt 128 --max_new_tokens 128 --repeats 3 --batch_size 64
    part profile 70 "$python" generate.py --random_weights "$config" --device "$device" --compile \
        --prompt 64 --max_new_tokens 33 --temperature 0 --ignore_eos --profile "$scratch/trace.json"
    limited 40 "$python" benchmarks/gpu_report.py kernels "$scratch/trace.json" > /dev/null \
        2> "$out/kernels.txt"
    cat "$out/kernels.txt" >&2
fi
"$python" benchmarks/gpu_report.py summary "$out/results.jsonl" \
    2> >(tee -a "$out/log.txt" >&2) | tee "$out/summary.json"
