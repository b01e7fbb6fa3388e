#!/usr/bin/env bash
# All that is to be measured on a machine with one NVIDIA GPU, unattended, in less than nine
# minutes: first, side by side, whether it is right, and all that must be compiled; then each
# timing, with nothing else running; last a table, with what each figure is to reach.
#
#     ./benchmarks/gpu.sh                                   # to benchmarks/results/gpu-DATE
#     ./benchmarks/gpu.sh speculate offload                 # some parts alone: of PARTS below
#     ./benchmarks/gpu.sh ranks                             # several GPUs of one machine
#     GPTFAST=~/gpt-fast ./benchmarks/gpu.sh                # gpt-fast's checkout, beside ours
#     DEVICE=cpu CONFIG=small.json ./benchmarks/gpu.sh      # tries the script itself
#
# Needs no network. PYTHON: which python. OUT: where to write. DEADLINE: seconds for all, which
# a card of less than 80 GB needs more of, as less goes on side by side there.
# Files: log.txt (all that was said), results.jsonl (a line for each part), summary.json (also the
# last line of stdout). Each part has a time limit of its own; one that fails does not stop the
# others. Exit code: 0 where no part and no check failed; whether a figure reaches its bar is said,
# and does not matter for it.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2

PARTS="check decode speculate offload flash gptq gptfast products ranks"
python=${PYTHON:-.venv/bin/python}
[[ -n ${PYTHON:-} || -x $python ]] || python=python3
device=${DEVICE:-cuda}
configs=benchmarks/configs
config=${CONFIG:-$configs/llama-3.1-8b.json}
[[ -f $config || ! -f $configs/$config ]] || config=$configs/$config
draft=${DRAFT_CONFIG:-$([[ -n ${CONFIG:-} ]] && echo "$config" || echo $configs/llama-3.2-1b.json)}
gptfast=${GPTFAST:-}
lanes() { # how many processes share the device: all together need some 65 GB of its memory
    local mib
    mib=$(nvidia-smi --query-gpu=memory.total --format=csv,noheader,nounits 2> /dev/null | head -n1)
    if ((${mib:-0} > 70000)); then echo 20; elif ((${mib:-0} > 35000)); then echo 3; else echo 1; fi
}
if [[ $device == cpu ]]; then # little of everything
    big=${BIG_CONFIG:-$config} deadline=${DEADLINE:-1500} slow=4 side_by_side=2
    decode=(--rows 1 --new 16 --rounds 1) speculate=(--new_tokens 16 --rounds 1)
    offload=(--rounds 1) gptq=(--samples 8 --length 128) policies=2 texts=4
    models=(demo-opt) kinds=(int4) check=() fast=(--modes bf16 int8 --shape stories15M --new 16)
else
    big=${BIG_CONFIG:-$configs/opt-13b.json} slow=1 side_by_side=$(lanes)
    deadline=${DEADLINE:-$([[ -n $gptfast ]] && echo 575 || echo 525)}
    decode=(--rows 1 8 64 --rounds 3) speculate=(--rounds 3)
    offload=(--rounds 2) gptq=() policies=12 texts=32
    models=(demo-opt demo) kinds=(int4 int8 dense) check=(--drafts) fast=()
fi

wanted=${*:-check decode speculate offload flash gptq ${gptfast:+gptfast}}
for what in $wanted; do
    [[ " $PARTS " == *" $what "* ]] || { echo "gpu.sh: $what is not one of $PARTS" >&2; exit 2; }
done
parts=$*
out=${OUT:-benchmarks/results/gpu${parts:+-${parts// /-}}-$(date +%F)}
mkdir -p "$out" && : > "$out/log.txt" && : > "$out/results.jsonl" ||
    exit 2
scratch=$(mktemp -d)
mkdir "$scratch/running"
export TORCHINDUCTOR_CACHE_DIR=$scratch/inductor TRITON_CACHE_DIR=$scratch/triton

stop() { # what runs is told to end, with all that it has started
    local file
    for file in "$scratch"/running/*; do
        [[ ! -f $file ]] || kill -TERM "$(< "$file")" 2> /dev/null
    done
}
trap 'stop; rm -rf "$scratch"' EXIT
trap 'echo stopped >&2; exit 130' INT TERM

say() { echo "$*" | tee -a "$out/log.txt" >&2; }
named() { [[ " $wanted " == *" $1 "* ]]; }

# limited NAME SECONDS COMMAND...: stdout to a file, stderr to the log; 124: it ran out of time
limited() {
    local name=$1 limit=$(($2 * slow)) left=$((deadline - SECONDS)) pid rc
    shift 2
    ((left < limit)) && limit=$left
    ((limit > 5)) || { say "$name: there is no time left"; return 124; }
    timeout --signal=INT --kill-after=5 "$limit" "$@" > "$scratch/$name.out" \
        2> >(sed -u -e 's/.*\r//' -e "s/^/$name: /" | tee -a "$out/log.txt" >&2) &
    pid=$!
    echo $pid > "$scratch/running/$name"
    wait $pid
    rc=$?
    rm -f "$scratch/running/$name"
    return $rc
}

# part NAME SECONDS COMMAND...: the last line of its stdout, where that is JSON, is its result
part() {
    local name=$1 started=$SECONDS rc=0 figures
    say "== $name: ${*:3}"
    : > "$scratch/$name.out"
    limited "$@" || rc=$?
    figures=$(tail -n 1 "$scratch/$name.out")
    [[ $figures == "{"*"}" ]] || figures=null
    {
        flock 9
        printf '{"part": "%s", "rc": %d, "seconds": %d, "figures": %s}\n' \
            "$name" "$rc" "$((SECONDS - started))" "$figures" >> "$out/results.jsonl"
    } 9> "$scratch/lock"
    ((rc == 0)) || say "== $name failed with code $rc; the end of its output:" \
        "$(tail -n 30 "$scratch/$name.out" | sed "s/^/$name: /")"
    return $rc
}

# aside COMMAND...: beside what runs already, as soon as there is room
aside() {
    while (($(jobs -rp | wc -l) >= side_by_side)); do wait -n; done
    "$@" &
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

check() { # MODEL MODE: what the GPU says, beside what the CPU says
    part "check_$1_$2" 200 "$python" benchmarks/gpu_check.py --device "$device" --models "$1" \
        --modes "$2" "${check[@]}"
}

tests() { # FILE: those of its tests that a GPU is for; kernels are compiled by three processes
    local together=()
    ! "$python" -c 'import xdist' 2> /dev/null || together=(-n 3)
    part "$(basename "$1" .py)" 200 "$python" -m pytest -q -p no:cacheprovider -m gpu \
        "${together[@]}" "$1"
}

check_offload() {
    part check_offload 200 "$python" benchmarks/offload.py check --device "$device" \
        --policies "$policies" --directory "$scratch/offload"
}

check_flash() { # what the demo itself tells is the text that it learns from
    local opt=$scratch/opt how
    cp -r checkpoints/demo-opt "$opt" && part flash_text 100 "$python" generate.py \
        --checkpoint_path "$opt" --device "$device" --num_samples "$texts" \
        --max_new_tokens 400 --ignore_eos || return
    mv "$scratch/flash_text.out" "$opt/text.txt"
    part flash_pack 120 "$python" flash.py --checkpoint_path "$opt" --device "$device" \
        --calibration_file "$opt/text.txt" || return
    for how in "" --compile; do
        part "flash_decode${how/--/_}" 100 "$python" generate.py --checkpoint_path "$opt" \
            --device "$device" --flash --dram_budget 80% --bench --json --prompt 64 \
            --max_new_tokens 64 ${how:+"$how"}
    done
}

timing() { # MODE SECONDS OPTION...: of one precision
    part "decode_$1" "$2" "$python" benchmarks/gpu_decode.py --mode "$1" --config "$config" \
        --device "$device" "${decode[@]}" "${@:3}"
}

warm() { # MODE: the same, compiled and not timed
    part "warm_$1" 200 "$python" benchmarks/gpu_decode.py --mode "$1" --config "$config" \
        --device "$device" "${decode[@]}" --warm
}

speculation() { # NAME SECONDS OPTION...
    part "$1" "$2" "$python" benchmarks/gpu_speculate.py --config "$config" --device "$device" \
        --draft_config "$draft" --acceptance 0.8 "${speculate[@]}" "${@:3}"
}

theirs() { # NAME SECONDS OPTION...
    part "$1" "$2" "$python" benchmarks/gpt_fast_worker.py --directory "$gptfast" \
        --device "$device" "${fast[@]}" "${@:3}"
}

warm_theirs() { # one after the other, as all together would not fit beside the rest
    local mode
    for mode in int8 bf16 int4; do
        [[ $device == cuda || $mode != int4 ]] || continue
        theirs "warm_gptfast_$mode" 120 --warm --modes "$mode"
    done
}

first_phase() {
    local mode model file
    export TORCHINDUCTOR_COMPILE_THREADS=4
    [[ $device == cpu ]] || export OMP_NUM_THREADS=2
    deadline=$((deadline * 45 / 100)) # what takes longer is cut short
    if named decode; then
        for mode in int4 bf16 int8; do aside warm "$mode"; done
        ! named speculate || aside speculation warm_speculate 200 --warm
    fi
    ! named gptfast || aside warm_theirs
    if named check; then
        for model in "${models[@]}"; do
            for mode in "${kinds[@]}"; do aside check "$model" "$mode"; done
        done
        while read -r file; do aside tests "$file"; done < <(grep -l 'mark\.gpu' tests/test_*.py)
    fi
    ! named flash || aside check_flash
    ! named offload || aside check_offload
    wait
    # Which of several kernels is the fastest was found in a crowd: it is to be found again.
    find "$scratch/inductor" -name '*.best_config' -delete 2> /dev/null
}

one_by_one() {
    local compiling=170 # more for what is not warm
    if named decode; then
        compiling=0
        timing bf16 130 --cold
        timing int8 100
        timing int4 100
    fi
    ! named speculate || speculation speculate $((130 + compiling))
    ! named offload || part offload 130 "$python" benchmarks/gpu_offload.py --config "$big" \
        --device "$device" --directory "$scratch/offload" "${offload[@]}"
    ! named gptq || part gptq 90 "$python" benchmarks/gpu_gptq.py --config "$config" \
        --device "$device" "${gptq[@]}"
    ! named gptfast || theirs gptfast 150
    ! named products || part products 90 "$python" benchmarks/gpu_products.py \
        --device "$device" --config "$config"
}

ranks() {
    local count ranks mode torchrun
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
}

install_missing
(versions 2>&1 | tee -a "$out/log.txt" >&2) &
first_phase & # in the background, as only there bash hears of a signal while it waits
wait
say "== side by side until second $SECONDS; from here on one by one"
one_by_one
! named ranks || ranks
say "== measured until second $SECONDS"
"$python" benchmarks/gpu_report.py summary "$out/results.jsonl" \
    2> >(tee -a "$out/log.txt" >&2) | tee "$out/summary.json"
grep -q '"ok": true' "$out/summary.json"
