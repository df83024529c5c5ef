#!/usr/bin/env bash
# Trains on all GPUs of this machine; without GPUs, on PROCESSES processes of its CPU.
#
#   examples/cluster/torchrun_node.sh CONFIG.yaml [section.key=value ...]
#   PROCESSES=2 examples/cluster/torchrun_node.sh CONFIG.yaml parallel.tensor=2
#
# Start the same command again to go on from the newest complete checkpoint.
set -euo pipefail

if [ $# -eq 0 ]; then
    echo "usage: $0 CONFIG.yaml [section.key=value ...]" >&2
    exit 2
fi

export CUDA_DEVICE_MAX_CONNECTIONS=1 # tensor parallelism: communication is queued before what overlaps it
# torchrun hands SIGTERM on to its processes and kills them this many seconds later (30 if nothing is said): time to
# finish a step and to save. Its own exit code is then not megamug's 3.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}

exec "${PYTHON:-python}" -m torch.distributed.run --standalone --nproc-per-node "${PROCESSES:-gpu}" \
    -m megamug train "$@"
