#!/usr/bin/env bash
# Trains on all GPUs of this machine; without GPUs, on PROCESSES processes of its CPU.
#
#   examples/cluster/torchrun.sh CONFIG.yaml [section.key=value ...]
#   PROCESSES=2 examples/cluster/torchrun.sh CONFIG.yaml parallel.tensor=2
#
# On several machines without a scheduler: on each of them, with the same HEAD and NODES.
#
#   HEAD=first-host NODES=4 NODE_RANK=0 examples/cluster/torchrun.sh CONFIG.yaml [section.key=value ...]
#
# HEAD is a name of the first machine that all can reach, PORT a free port there; NODE_RANK counts the machines from 0.
# run_dir and the shards must be on a file system that all of them see.
#
# Start the same command again to go on from the newest complete checkpoint.
set -euo pipefail

if [ $# -eq 0 ]; then
    echo "usage: [HEAD=HOST NODES=N NODE_RANK=K] $0 CONFIG.yaml [section.key=value ...]" >&2
    exit 2
fi

machines=(--standalone)
if [ -n "${HEAD-}${NODES-}${NODE_RANK-}" ]; then
    machines=(
        --nnodes "${NODES:?set NODES to the number of machines}"
        --node-rank "${NODE_RANK:?set NODE_RANK: 0 on HEAD, 1, 2, ... on the others}"
        --master-addr "${HEAD:?set HEAD to the first machine}" --master-port "${PORT:-29500}"
    )
fi

export CUDA_DEVICE_MAX_CONNECTIONS=1 # tensor parallelism: communication is queued before what overlaps it
# torchrun hands SIGTERM on to its processes and kills them this many seconds later (30 if nothing is said): time to
# finish a step and to save. Its own exit code is then not megamug's 3.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}

exec "${PYTHON:-python}" -m torch.distributed.run "${machines[@]}" --nproc-per-node "${PROCESSES:-gpu}" \
    -m megamug train "$@"
