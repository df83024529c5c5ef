#!/usr/bin/env bash
# Measures everything on one GPU: training steps of MUG and JAM in bf16 and FP8 against transformers, losses, the loader
# with decoding on the GPU, checkpoints. Figures go to OUTPUT/*.json, traces and what steps are made of to OUTPUT/profile.
#
#   examples/benchmark/one_gpu.sh [OUTPUT]
#
# DATA=PATH       photographs for the loader (shards, or a folder of images with captions); without it that is left out
# PYTHON=PROGRAM  the interpreter that megamug is installed for (default: python)
# BEFORE=FOLDER   the OUTPUT of an earlier run, to whose figures these are compared
set -euo pipefail

output=${1:-benchmark-one-gpu}
root=$(cd "$(dirname "$0")/../.." && pwd)
mkdir -p "$output/profile"

# measure RESULT BENCHMARK [option ...]: what cannot be measured here (exit code 2, told in a sentence) is left out.
measure() {
    local result=$1 code=0
    shift
    local options=(--json "$output/$result.json" --profile "$output/profile/$result")
    [ -z "${BEFORE:-}" ] || options+=(--compare "$BEFORE/$result.json")
    "${PYTHON:-python}" "$root/tools/benchmark.py" "$@" "${options[@]}" || code=$?
    [ "$code" -ne 2 ] || echo "== left out: $result"
    [ "$code" -eq 0 ] || [ "$code" -eq 2 ] || exit "$code"
}

measure mug-vit-l-bf16 mug --preset vit_l16 --batch 256 --dtypes bf16 --steps 20
measure mug-vit-h-bf16 mug --preset vit_h14 --batch 128 --dtypes bf16 --steps 20
measure mug-vit-h-fp8 mug --preset vit_h14 --batch 128 --dtypes fp8 --steps 20
sizes=(--layers 24 --width 2048 --heads 16 --ffn-width 5632 --tokens 2048 --batch 8 --steps 10)
measure jam-bf16 jam "${sizes[@]}" --dtypes bf16
measure jam-fp8 jam "${sizes[@]}" --dtypes fp8
measure losses losses --device cuda --rows 8192 --columns 131072 --batch 256 --repeats 10
measure checkpoint checkpoint --preset vit_l16 --folder "$output"
if [ -n "${DATA:-}" ]; then
    measure loader loader --data "$DATA" --workers "${WORKERS:-8}" --batch 256
    # the same step, fed by the loader: how long it waits for data
    measure mug-vit-l-data mug --preset vit_l16 --batch 256 --dtypes bf16 --steps 20 \
        "data.train=$DATA" "data.threads=${WORKERS:-8}"
else
    echo "== left out: loader (DATA is not set)"
fi
