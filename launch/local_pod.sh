#!/usr/bin/env bash
# Tries a run of several processes on one machine: N processes, each with DEVICES simulated devices, over localhost.
#
#   launch/local_pod.sh N CONFIG [--config.field=value ...]
#   launch/local_pod.sh 4 configs/digits.py
#
# Trains with all of them, kills one with SIGKILL at the first checkpoint, resumes with all, certifies with all, certifies
# the same checkpoint with one process, and compares the certificates. WORKDIR (runs/pod) must not hold a training yet;
# the output of every process is in $WORKDIR.log/. DEVICES=2, PORT=12321.
set -euo pipefail
cd "$(dirname "$0")/.."

N=${1:?how many processes, e.g. launch/local_pod.sh 2 configs/digits.py}
CONFIG=${2:?which experiment, e.g. launch/local_pod.sh 2 configs/digits.py}
shift 2
case "$N" in
'' | *[!0-9]* | 0 | 1)
  echo "error: the number of processes must be at least 2, got $N" >&2
  exit 2
  ;;
esac
DEVICES=${DEVICES:-2}
WORKDIR=${WORKDIR:-runs/pod}
PORT=${PORT:-12321}
export CONFIG WORKDIR
if [ -e "$WORKDIR" ]; then
  echo "error: $WORKDIR exists; remove it, or choose another WORKDIR" >&2
  exit 2
fi
mkdir -p "$WORKDIR.log"
TASK=setup launch/host.sh

# start TASK [flags]: all processes of one run in the background; their numbers are in $pids.
start() {
  local task=$1 index
  shift
  pids=()
  for ((index = 0; index < N; index++)); do
    TASK=$task JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=$DEVICES JAX_COORDINATOR_ADDRESS=localhost:$PORT \
      JAX_NUM_PROCESSES=$N JAX_PROCESS_ID=$index \
      setsid launch/host.sh "$@" >>"$WORKDIR.log/$task.$index.txt" 2>&1 &
    pids+=($!)
  done
  PORT=$((PORT + 1))
}

# finish: waits for all processes of the run; fails where one of them failed.
finish() {
  local pid failed=0
  for pid in "${pids[@]}"; do
    { wait "$pid"; } 2>/dev/null || failed=1
  done
  return $failed
}

stop() {
  local pid
  for pid in "${pids[@]:-}"; do
    [ -z "$pid" ] || kill -KILL -- "-$pid" 2>/dev/null || true
  done
}
trap stop EXIT

# Succeeds if there is a complete checkpoint; an incomplete one has a longer name.
checkpoint() {
  compgen -G "$WORKDIR/checkpoints/[0-9]*" | grep -qE '/[0-9]+$'
}

echo "training with $N processes of $DEVICES devices"
start train "$@"
until checkpoint || ! kill -0 "${pids[0]}" 2>/dev/null; do sleep 0.1; done
if kill -KILL -- "-${pids[N - 1]}" 2>/dev/null; then
  echo "process $((N - 1)) is killed; the others end when they miss it"
else
  echo "error: the training ended before a process could be killed: give it more steps" >&2
  exit 1
fi
finish || true
echo "training again: it resumes"
start train "$@"
finish || {
  echo "error: the training failed; see $WORKDIR.log/" >&2
  exit 1
}
if ! grep -rq "resuming after step" "$WORKDIR.log"; then
  echo "error: the training did not resume; see $WORKDIR.log/" >&2
  exit 1
fi
echo "certifying with $N processes, then with one"
start certify
finish || {
  echo "error: the certification failed; see $WORKDIR.log/" >&2
  exit 1
}
JAX_PLATFORMS=cpu .venv/bin/python -m lsrs_jax.certify --workdir="$WORKDIR" --config.certify.name=alone \
  >"$WORKDIR.log/alone.txt" 2>&1

# Certificates without the column of seconds.
certificates() {
  local column
  column=$(head -n 1 "$1" | tr '\t' '\n' | grep -nx time | cut -d: -f1)
  cut --complement -f "$column" "$1"
}
pod=$WORKDIR/certify/default/certificates.tsv
if cmp <(certificates "$pod") <(certificates "$WORKDIR/certify/alone/certificates.tsv"); then
  echo "$(($(wc -l <"$pod") - 1)) certificates, the same with $N processes and with one"
else
  echo "error: the certificates differ" >&2
  exit 1
fi
