#!/usr/bin/env bash
# Creates a Cloud TPU slice, runs on it and deletes it, through gcloud. docs/scale.md explains the steps and the costs.
#
#   export TPU_NAME=lsrs ZONE=europe-west4-b PROJECT=my-project
#   launch/tpu_vm.sh create                    # TYPE=v5litepod-16 (v4-8, v5p-8, v6e-8 ...), SPOT=1 for spot capacity
#   launch/tpu_vm.sh setup                     # copies this checkout's last commit to every host and installs it
#   CONFIG=configs/digits.py WORKDIR=gs://bucket/run launch/tpu_vm.sh run [--config.field=value ...]
#   launch/tpu_vm.sh status                    # state of the slice, last lines of every host
#   WORKDIR=gs://bucket/run launch/tpu_vm.sh collect      # certificates to runs/$TPU_NAME/
#   launch/tpu_vm.sh delete                    # ends the costs of the slice
#
# `run` again resumes. `launch/tpu_vm.sh --dry-run STEP` prints the commands of a step and runs none.
set -euo pipefail
cd "$(dirname "$0")/.."

dry=
words=()
for word in "$@"; do
  if [ "$word" = --dry-run ]; then dry=1; else words+=("$word"); fi
done
set -- ${words[@]+"${words[@]}"}
step=${1:?which step: create, setup, run, status, collect or delete}
shift
if [ "$step" != run ] && [ $# -gt 0 ]; then
  echo "error: $step takes nothing more, got $*" >&2
  exit 2
fi
TPU_NAME=${TPU_NAME:?name of the slice, e.g. TPU_NAME=lsrs}
ZONE=${ZONE:?where it is, e.g. ZONE=europe-west4-b}
PROJECT=${PROJECT:?who pays, e.g. PROJECT=my-project}
TYPE=${TYPE:-v5litepod-16}

# call COMMAND ...: runs a command, or prints it so that a shell would read it back.
call() {
  if [ -n "$dry" ]; then
    printf '%q ' "$@"
    printf '\n'
  else
    "$@"
  fi
}

tpu() {
  local verb=$1
  shift
  call gcloud compute tpus tpu-vm "$verb" "$TPU_NAME" --zone="$ZONE" --project="$PROJECT" "$@"
}

everywhere() {
  tpu ssh --worker=all --command="$1"
}

case "$step" in
create)
  case "$TYPE" in
  v6e-*) version=v2-alpha-tpuv6e ;;
  v5p-*) version=v2-alpha-tpuv5 ;;
  v5litepod-*) version=v2-alpha-tpuv5-lite ;;
  v4-*) version=tpu-ubuntu2204-base ;;
  *)
    echo "error: TYPE must be v4-N, v5litepod-N, v5p-N or v6e-N, not $TYPE; newer chips: launch/gke_job.yaml" >&2
    exit 2
    ;;
  esac
  tpu create --accelerator-type="$TYPE" --version="${VERSION:-$version}" ${SPOT:+--spot}
  ;;
setup)
  archive=$(mktemp)
  trap 'rm -f "$archive"' EXIT
  call git archive --format=tar.gz --output="$archive" HEAD
  call gcloud compute tpus tpu-vm scp "$archive" "$TPU_NAME:lsrs_jax.tar.gz" --worker=all --zone="$ZONE" --project="$PROJECT"
  # The images come with Python 3.10.
  everywhere "sudo apt-get update -qq && sudo apt-get install -qq -y python3.11 python3.11-venv \
&& mkdir -p lsrs_jax && tar -xzf lsrs_jax.tar.gz -C lsrs_jax \
&& TASK=setup EXTRA=tpu,gcs PYTHON=python3.11 lsrs_jax/launch/host.sh"
  ;;
run)
  CONFIG=${CONFIG:?which experiment, e.g. CONFIG=configs/cifar10.py}
  WORKDIR=${WORKDIR:?a folder that all hosts see, e.g. WORKDIR=gs://bucket/run}
  case "$WORKDIR" in
  gs://*) ;;
  *) echo "note: the hosts of a slice share no disk; WORKDIR=$WORKDIR must be a mount that all of them see" >&2 ;;
  esac
  settings=$(printf '%q ' "CONFIG=$CONFIG" "WORKDIR=$WORKDIR" "EXTRA=tpu,gcs" PYTHON=python3.11 JAX_DISTRIBUTED=auto)
  [ -z "${TFDS_DATA_DIR:-}" ] || settings+=$(printf '%q ' "TFDS_DATA_DIR=$TFDS_DATA_DIR")
  flags=
  [ $# -eq 0 ] || flags=$(printf '%q ' "$@")
  everywhere "nohup env ${settings}lsrs_jax/launch/host.sh $flags>lsrs_jax.log 2>&1 </dev/null &"
  ;;
status)
  tpu describe --format="value(state,health)"
  everywhere "tail -n 3 lsrs_jax.log"
  ;;
collect)
  WORKDIR=${WORKDIR:?the workdir of the run, e.g. WORKDIR=gs://bucket/run}
  call mkdir -p "runs/$TPU_NAME"
  call gcloud storage rsync --recursive --project="$PROJECT" "$WORKDIR/certify" "runs/$TPU_NAME/certify"
  call gcloud storage cp --project="$PROJECT" "$WORKDIR/config.json" "$WORKDIR/metrics.jsonl" "runs/$TPU_NAME/"
  ;;
delete)
  tpu delete --quiet
  ;;
*)
  echo "error: unknown step $step: create, setup, run, status, collect or delete" >&2
  exit 2
  ;;
esac
