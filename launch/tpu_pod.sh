#!/usr/bin/env bash
#
# Trains on all hosts of a Cloud TPU, spot ones included: one that is preempted is made again.
#
#   launch/tpu_pod.sh NAME ZONE CONFIG WORKDIR [--config.key=value ...]
#
#   ACCELERATOR=v4-32 VERSION=tpu-ubuntu2204-base PYTHON=python3.11 \
#     SETUP='sudo apt-get install -qq -y python3.11-venv nfs-common &&
#       { mountpoint -q /mnt || sudo mount 10.0.0.2:/runs /mnt; }' \
#     launch/tpu_pod.sh my-pod us-central2-b configs/ood_detection/cifar.py:paper /mnt/cifar
#
# Run it from the repository, where gcloud is logged in. It makes the TPU if there is none (ACCELERATOR and
# VERSION say of which kind; CREATE has more options, default --spot), copies the commit that is checked out
# to every host, runs SETUP there, installs with PYTHON (3.11 or newer, which SETUP can bring), and starts the
# same command on each. WORKDIR must be on a file system that all hosts see, which SETUP can mount; SETUP is
# run at every start and must bear it.
#
# When the TPU is preempted its hosts get SIGTERM and the run writes a checkpoint; this script waits until
# there is a TPU again and the same command goes on from the newest checkpoint. It ends when the run is
# complete, or fails while the TPU is up. The TPU stays: `gcloud compute tpus tpu-vm delete NAME --zone=ZONE`.
set -euo pipefail

if [[ $# -lt 4 ]]; then
  echo "usage: launch/tpu_pod.sh NAME ZONE CONFIG WORKDIR [--config.key=value ...]" >&2
  exit 2
fi
name=$1 zone=$2 config=$3 workdir=$4
shift 4

tpu() { gcloud compute tpus tpu-vm "$@" --zone="$zone"; }
state() { tpu describe "$name" --format='value(state)' 2>/dev/null || echo ABSENT; }
on_all_hosts() { tpu ssh "$name" --worker=all --command="$1"; }

bring_up() {
  case $(state) in
    READY) return ;;
    ABSENT) ;;
    *) tpu delete "$name" --quiet ;;
  esac
  : "${ACCELERATOR:?there is no TPU $name: set ACCELERATOR and VERSION for it to be made}"
  : "${VERSION:?there is no TPU $name: set ACCELERATOR and VERSION for it to be made}"
  # shellcheck disable=SC2086 # several options
  until tpu create "$name" --accelerator-type="$ACCELERATOR" --version="$VERSION" ${CREATE---spot}; do
    echo "no $ACCELERATOR in $zone now; trying again in a minute" >&2
    sleep 60
  done
}

install() {
  git archive --output="$code" HEAD &&
    tpu scp "$code" "$name:jaxlab.tar" --worker=all &&
    on_all_hosts "{ ${SETUP:-true}; } && mkdir -p jaxlab && tar -xf jaxlab.tar -C jaxlab &&
      make -C jaxlab PYTHON=${PYTHON:-python3} .venv/.installed-tpu"
}

code=$(mktemp --suffix=.tar)
trap 'rm -f "$code"' EXIT
train=$(printf '%q ' .venv/bin/python -m launch.train --config "$config" --workdir "$workdir" "$@")
while true; do
  status=0
  bring_up
  { install && on_all_hosts "cd jaxlab && $train"; } || status=$?
  if [[ $status -eq 0 || $(state) == READY ]]; then
    exit "$status"
  fi
  echo "the TPU is $(state); the run goes on when there is one again" >&2
done
