#!/usr/bin/env bash
# bash tests/faults/run.sh [--lora] [N] [kind ...]: makes the 336 faults of faults.py (about a quarter of an hour on two cores), or N of each kind, or only some kinds.
# --lora: to runs with LoRA.
# Prints a table and ends with a line of JSON; exit code 1 if a run was lost or anything went wrong in silence.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../../experiments/setup_env.sh"
set_up dev

cd "$ROOT"
# the faults compare bytes, which a CPU repeats
export CUDA_VISIBLE_DEVICES=
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false PYTHONPATH="$ROOT:$ROOT/tests"
exec "$PYTHON" tests/faults/faults.py "$@"
