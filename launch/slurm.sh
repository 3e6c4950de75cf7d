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
# Either way the same command goes on from the newest checkpoint. A run that fails, or a job that is cancelled,
# is not queued again.
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

# SLURM warns this shell only. scancel reaches the processes; srun would answer SIGTERM by killing them, and
# a second SIGTERM would end them before the checkpoint is written.
trap 'trap : USR1; scancel --signal=TERM "$SLURM_JOB_ID"' USR1
trap : TERM # the processes have got it too

status=0
wait "$step" || status=$?
while kill -0 "$step" 2>/dev/null; do # a signal has ended `wait`, not the step
  status=0
  wait "$step" || status=$?
done

# 143: stopped by SIGTERM, the checkpoint is written. A job that is being cancelled does not run any more.
if [[ $status -eq 143 && $(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T) == RUNNING ]]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
