#!/usr/bin/env bash
# Trains on SLURM, and goes on by itself after a time limit or a preemption.
#
#   sbatch examples/cluster/slurm.sh CONFIG.yaml [section.key=value ...]
#   sbatch --nodes=64 examples/cluster/slurm.sh examples/mug/vit_g14_64node.yaml data.train=/data/shards ...
#
# Submit from the folder that the paths of the configuration start from; run_dir must be on a file system that all nodes
# see. Options of sbatch win over the lines below; set account, partition and qos there.
#
#SBATCH --job-name=megamug
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8   # one process for each GPU ...
#SBATCH --gpus-per-node=8     # ... each seeing all GPUs of its node: a process takes that of its local rank
#SBATCH --cpus-per-task=12    # data.threads decode images; leave some for the process itself
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@600   # ten minutes before the limit, to this script alone (B): longer than a step and a save
#SBATCH --requeue             # a failed node puts the job back into the queue, too
#SBATCH --open-mode=append    # the log of the requeued job follows that of the first
#SBATCH --output=%x-%j.log
#
# CONTAINER=IMAGE  runs in a container (pyxis/enroot: a squashfs file or an image's name)
# MOUNTS=FROM:TO   adds folders to those that the container sees, with commas between them
# PYTHON=PROGRAM   the interpreter that megamug is installed for (default: python)
set -euo pipefail

if [ $# -eq 0 ]; then
    echo "usage: sbatch $0 CONFIG.yaml [section.key=value ...]" >&2
    exit 2
fi

# Rendezvous: all processes meet at the first node. A job number gives a port that few others take.
mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
export MASTER_ADDR=${hosts[0]}
export MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
export WORLD_SIZE=$SLURM_NTASKS
export LOCAL_WORLD_SIZE=${SLURM_NTASKS_PER_NODE:-1}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}  # many processes share a node
export CUDA_DEVICE_MAX_CONNECTIONS=1          # tensor parallelism: communication is queued before what overlaps it

# The first process that ends gives the others two minutes: they end within seconds of each other, after a save as well.
options=(--kill-on-bad-exit=0 --wait=120)
if [ -n "${CONTAINER:-}" ]; then
    options+=("--container-image=$CONTAINER" "--container-workdir=$PWD")
    options+=("--container-mounts=$PWD:$PWD${MOUNTS:+,$MOUNTS}")
fi

# USR1 comes before the time limit, TERM with a preemption. srun hands USR1 on to every process (TERM would make it end
# them by force); they finish their step, save a checkpoint and exit with 3. bash runs a trap only between commands, so
# srun is in the background and the script waits.
step=
asked=no
interrupted=no
# shellcheck disable=SC2329  # the traps call it
hand_on() {
    asked=yes
    interrupted=yes
    echo "$(date '+%F %T') $1: asking the processes to save and stop"
    [ -z "$step" ] || kill -USR1 "$step" 2>/dev/null || true
}
trap 'hand_on USR1' USR1
trap 'hand_on TERM' TERM

echo "$(date '+%F %T') job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)):" \
    "$SLURM_NTASKS processes on ${#hosts[@]} node(s), the first being ${hosts[0]}"
# The ranks are known only to the processes that srun starts: the quotes keep them for those.
# shellcheck disable=SC2016
srun "${options[@]}" bash -c 'export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID; exec "$@"' rank \
    "${PYTHON:-python}" -m megamug train "$@" &
step=$!

code=0
wait "$step" || code=$?
while [ "$interrupted" = yes ]; do  # a trapped signal ends `wait` before srun has ended
    interrupted=no
    again=0
    wait "$step" || again=$?
    [ "$again" -eq 127 ] || code=$again # 127: it had ended already
done
echo "$(date '+%F %T') exit code $code"

# 3: stopped on request, with a checkpoint. Asked before training had begun, a process ends by the signal itself
# (128 + 10 or 15): nothing was done that could be lost. All other codes are for a person to look at.
requeue=no
case $code in
3) requeue=yes ;;
138 | 143) requeue=$asked ;;
esac
if [ "$requeue" = yes ]; then
    if [[ $(scontrol show job "$SLURM_JOB_ID") == *JobState=CANCELLED* ]]; then
        echo "the job was cancelled: not put back into the queue"
    elif scontrol requeue "$SLURM_JOB_ID"; then
        echo "put back into the queue; it goes on from the newest complete checkpoint"
    else
        echo "could not be put back into the queue; submit the same command again to go on" >&2
    fi
fi
exit "$code"
