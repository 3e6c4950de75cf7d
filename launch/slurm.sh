#!/usr/bin/env bash
#SBATCH --job-name=jaxlab
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@300
#
# Trains under SLURM, over as many processes as the job has tasks, and across preemption and time limits.
#
#   sbatch [OPTIONS OF SBATCH] launch/slurm.sh CONFIG WORKDIR [--config.key=value ...]
#
#   sbatch --nodes=4 --ntasks-per-node=8 --gpus-per-node=8 --cpus-per-task=12 --time=24:00:00 \
#     launch/slurm.sh configs/ood_detection/cifar.py:paper runs/cifar
#
# Submit it from the repository. Take one task for each GPU of a node and give the GPUs to the node (as above;
# not --gpus-per-task: each task must see all of them), or one task for each node without GPUs. WORKDIR must
# be on a file system that all nodes see. PYTHON names another interpreter than .venv/bin/python.
#
# Five minutes before the time limit (--signal=B:USR1@300), and where SLURM preempts the job with notice, the
# run writes a checkpoint and the job goes back into the queue. Where a node fails SLURM itself puts it back.
# Either way the same command goes on from the newest checkpoint. A run that fails is not queued again.
set -euo pipefail

if [[ $# -lt 2 || -z ${SLURM_JOB_ID:-} ]]; then
  echo "usage: sbatch [OPTIONS OF SBATCH] launch/slurm.sh CONFIG WORKDIR [--config.key=value ...]" >&2
  exit 2
fi
config=$1 workdir=$2
shift 2

# Each process ends by itself where another one fails, with a line that says so: SLURM need not kill it.
srun --kill-on-bad-exit=0 ${SLURM_CPUS_PER_TASK:+"--cpus-per-task=$SLURM_CPUS_PER_TASK"} \
  "${PYTHON:-.venv/bin/python}" -m launch.train --config "$config" --workdir "$workdir" "$@" &
step=$!

# scancel reaches the processes; srun itself would answer SIGTERM by killing them.
preempted=
trap 'preempted=yes; scancel --signal=TERM "$SLURM_JOB_ID"' USR1 TERM

status=0
wait "$step" || status=$?
while kill -0 "$step" 2>/dev/null; do # the signal has ended `wait`, not the step
  status=0
  wait "$step" || status=$?
done

if [[ -n $preempted && $status -ne 0 ]]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
