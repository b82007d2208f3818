#!/usr/bin/env bash
# What one machine runs: environment, training, certification. Safe to start again after an interruption; each step
# resumes where it was.
#
#   CONFIG=configs/cifar10_small.py WORKDIR=runs/cifar launch/host.sh [--config.field=value ...]
#
# EXTRA=cuda or EXTRA=tpu installs JAX for that hardware. Flags are given to training; the certification takes its
# configuration from the workdir.
set -euo pipefail
cd "$(dirname "$0")/.."

CONFIG=${CONFIG:?which experiment, e.g. CONFIG=configs/digits.py or configs/digits.py:isrs}
WORKDIR=${WORKDIR:?folder for checkpoints and certificates, e.g. WORKDIR=runs/digits}
PYTHON=${PYTHON:-python3}
EXTRA=${EXTRA:-}

stamp=.venv/ready-plots${EXTRA:+-$EXTRA}
if [ ! -e "$stamp" ]; then
  "$PYTHON" -m venv .venv
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --editable ".[plots${EXTRA:+,$EXTRA}]"
  touch "$stamp"
fi
.venv/bin/python -m lsrs_jax.train --config="$CONFIG" --workdir="$WORKDIR" "$@"
.venv/bin/python -m lsrs_jax.certify --workdir="$WORKDIR"
