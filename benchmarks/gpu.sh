#!/usr/bin/env bash
# What a GPU has to show, most valuable first, in at most MINUTES: bash benchmarks/gpu.sh [folder]
# Each part writes its JSON cell by cell and goes on there when started again; one that fails does not keep the next one waiting.
#   DEVICE=cpu TINY=1 runs the same lines in a minute where there is no GPU.
set -uo pipefail
out=${1:-results/bench/gpu}
device=${DEVICE:-cuda}
minutes=${MINUTES:-12}
python=${PYTHON:-python}
end=$((SECONDS + 60 * minutes))
failed=0
mkdir -p "$out"

part() { # name, most seconds, command
    local name=$1 most=$2 left=$((end - SECONDS))
    shift 2
    if ((left < 20)); then
        echo "== $name: no time left; start this script again"
        failed=1
        return
    fi
    echo "== $name ($((most < left ? most : left)) s at most)"
    timeout --signal=INT $((most < left ? most : left)) "$@" || { echo "== $name ended with exit code $?"; failed=1; }
}

bench() { part "$1" "$2" "$python" -m duallora bench "${@:3}" --device "$device"; }

if [[ ${TINY:-} ]]; then
    sizes=(--width 64 --rounds 3 --seconds 1)
    tokens=(--tokens 16)
    model=(--rows 1 --length 16 --rounds 3 --seconds 1 --no-memory)
else
    sizes=(--width 4096 --seconds 15)
    tokens=(--tokens 4096 --tokens 1024 --tokens 8192 --tokens 16384)
    model=(--seconds 45)
    if [[ -z ${MODEL:-} && $device == cuda ]]; then # widths at which a step of a 7B model is one
        MODEL=${TMPDIR:-/tmp}/llama-7b-width-4-layers
        part "a model of four layers of LLaMA-7B's widths" 60 "$python" benchmarks/wide_model.py "$MODEL"
        model+=(--rows 4 --length 1024)
    fi
fi

bench "every kernel against float64" 120 kernel "${sizes[@]}" -o "$out/kernel.json"
bench "a layer as launched and replayed" 240 layer "${sizes[@]}" "${tokens[@]}" --rank 16 --dtype bfloat16 -o "$out/layer.json"
bench "the host's share" 40 host --rounds "$([[ ${TINY:-} ]] && echo 3 || echo 15)" -o "$out/host.json"
bench "a training step, as launched and replayed, and its memory" 240 step "${model[@]}" --dtype bfloat16 --model "${MODEL:-builtin:smollm2-135m}" -o "$out/step.json"
if [[ $device == cuda && -z ${TINY:-} ]]; then
    part "G that never leaves the product" 60 "$python" benchmarks/epilogue.py -o "$out/epilogue.json"
    part "tiles" 120 "$python" benchmarks/tiles.py -o "$out/tiles.json"
fi
exit $failed
