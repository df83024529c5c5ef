#!/usr/bin/env bash
# Measures training and checkpoints on the GPUs of this machine, eight by default, under torchrun: MUG and JAM in bf16
# and FP8, data-parallel and in layouts that share layers. Figures go to OUTPUT/*.json, traces to OUTPUT/profile.
#
#   examples/benchmark/eight_gpus.sh [OUTPUT]
#
# DATA=SHARDS     indexed shards, to measure a step that is fed by the loader; without it that is left out
# PROCESSES=N     processes (default 8)
# PYTHON=PROGRAM  the interpreter that megamug is installed for (default: python)
# BEFORE=FOLDER   the OUTPUT of an earlier run, to whose figures these are compared
set -euo pipefail

output=${1:-benchmark-eight-gpus}
processes=${PROCESSES:-8}
root=$(cd "$(dirname "$0")/../.." && pwd)
mkdir -p "$output/profile"
export CUDA_DEVICE_MAX_CONNECTIONS=1 # tensor parallelism: communication is queued before what overlaps it

# measure RESULT BENCHMARK [option ...]. torchrun does not hand exit codes on: a failure is told, and the rest goes on.
failed=()
measure() {
    local result=$1
    shift
    local options=(--json "$output/$result.json" --profile "$output/profile/$result")
    [ -z "${BEFORE:-}" ] || options+=(--compare "$BEFORE/$result.json")
    "${PYTHON:-python}" -m torch.distributed.run --standalone --nproc-per-node "$processes" \
        "$root/tools/benchmark.py" "$@" "${options[@]}" || failed+=("$result")
}

overlapped=(parallel.distributed_optimizer=true parallel.overlap_grad_reduce=true parallel.overlap_param_gather=true)
measure mug-vit-l-bf16 mug --preset vit_l16 --batch $((256 * processes)) --dtypes bf16 --steps 20 "${overlapped[@]}"
measure mug-vit-h-bf16 mug --preset vit_h14 --batch $((128 * processes)) --dtypes bf16 --steps 20 "${overlapped[@]}"
measure mug-vit-h-fp8 mug --preset vit_h14 --batch $((128 * processes)) --dtypes fp8 --steps 20 "${overlapped[@]}"
measure mug-vit-h-tp2 mug --preset vit_h14 --batch $((128 * processes)) --dtypes bf16 --steps 20 "${overlapped[@]}" \
    parallel.tensor=2 parallel.sequence=false
sizes=(--layers 32 --width 4096 --heads 32 --ffn-width 11008 --tokens 2048 --batch 32 --steps 10)
measure lm-7b-bf16 jam "${sizes[@]}" --dtypes bf16 "${overlapped[@]}" parallel.tensor=2 parallel.sequence=true \
    data.micro_batch_size=2
measure lm-7b-fp8 jam "${sizes[@]}" --dtypes fp8 "${overlapped[@]}" parallel.tensor=2 parallel.sequence=true \
    data.micro_batch_size=2
measure jam-2x7b-bf16 jam --model jam_cross "${sizes[@]}" --dtypes bf16 parallel.distributed_optimizer=true \
    parallel.tensor=4 parallel.sequence=true data.micro_batch_size=1 parallel.recompute=full
measure checkpoint checkpoint --preset vit_h14 --folder "$output" parallel.distributed_optimizer=true
if [ -n "${DATA:-}" ]; then
    measure mug-vit-l-data mug --preset vit_l16 --batch $((256 * processes)) --dtypes bf16 --steps 20 \
        "${overlapped[@]}" "data.train=$DATA" "data.threads=${WORKERS:-8}"
else
    echo "== left out: a step with data (DATA is not set)"
fi

if [ ${#failed[@]} -gt 0 ]; then
    echo "== failed, see above: ${failed[*]}" >&2
    exit 1
fi
