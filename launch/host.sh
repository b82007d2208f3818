#!/usr/bin/env bash
# Installs the package, trains and certifies, as one process of a run, on any machine. After an interruption the same
# command resumes.
#
#   CONFIG=configs/cifar10_small.py WORKDIR=runs/cifar launch/host.sh [--config.field=value ...]
#
# EXTRA=cuda or EXTRA=tpu installs JAX for that hardware. The flags go to the training; the certification takes its
# configuration from the workdir. TASK=train only trains, TASK=certify only certifies, TASK=setup only installs. docs/scale.md
# says how several processes of one run find each other; all of them must see the same WORKDIR.
set -euo pipefail
cd "$(dirname "$0")/.."

TASK=${TASK:-all}
case "$TASK" in
all | train | certify | setup) ;;
*)
  echo "error: TASK must be all, train, certify or setup, not $TASK" >&2
  exit 2
  ;;
esac
if [ "$TASK" != setup ]; then
  WORKDIR=${WORKDIR:?folder for checkpoints and certificates, e.g. WORKDIR=runs/digits}
fi
if [ "$TASK" = all ] || [ "$TASK" = train ]; then
  CONFIG=${CONFIG:?which experiment, e.g. CONFIG=configs/digits.py or configs/digits.py:isrs}
fi
PYTHON=${PYTHON:-python3}
EXTRA=${EXTRA:-}

stamp=.venv/ready-run${EXTRA:+-$EXTRA}
if [ -z "$EXTRA" ] && [ -e .venv/ready ]; then
  stamp=.venv/ready # of `make`, which installs more
fi
install() {
  [ ! -e "$stamp" ] || return 0
  "$PYTHON" -m venv .venv
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --editable ".${EXTRA:+[$EXTRA]}"
  touch "$stamp"
}
if [ ! -e "$stamp" ]; then
  # Processes that share this folder install once, one after the other.
  if command -v flock >/dev/null; then
    exec 9>.install.lock
    flock 9
    install
    exec 9>&-
  else
    install
  fi
fi

# A container or a scheduler may send a signal to this shell only. The shell forwards it and exits with the code of the
# command.
forwarding() {
  local child code=0
  "$@" &
  child=$!
  trap 'kill -TERM "$child" 2>/dev/null || true' TERM
  trap 'kill -INT "$child" 2>/dev/null || true' INT
  wait "$child" || code=$?
  while kill -0 "$child" 2>/dev/null; do # a signal ends the first wait, not the command
    code=0
    wait "$child" || code=$?
  done
  trap - TERM INT
  [ "$code" -eq 0 ] || exit "$code"
}

if [ "$TASK" = all ] || [ "$TASK" = train ]; then
  forwarding .venv/bin/python -m lsrs_jax.train --config="$CONFIG" --workdir="$WORKDIR" "$@"
fi
if [ "$TASK" = all ] || [ "$TASK" = certify ]; then
  forwarding .venv/bin/python -m lsrs_jax.certify --workdir="$WORKDIR"
fi
