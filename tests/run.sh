#!/usr/bin/env bash
# bash tests/run.sh [pytest arguments]: sets up, then runs the tests, two files at a time (-n 1: one, -n 0: in pytest's own process).
# Paths in the arguments are relative to the checkout.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../experiments/setup_env.sh"
set_up dev

cd "$ROOT"
if ! "$PYTHON" -m ruff format --check --quiet . || ! "$PYTHON" -m ruff check --quiet .; then
    echo "tests/run.sh: the lines above are not in the style of .ruff.toml: '$PYTHON -m ruff format .' formats them" >&2
    exit 1
fi
"$PYTHON" -m mypy --no-error-summary recr1 kernels
# hundreds of processes start in the tests: all but the first find recr1 compiled
unset PYTHONDONTWRITEBYTECODE
start=$SECONDS
status=0
# testpaths, not a path: a file named in the arguments then runs alone. loadfile: what a file's tests share is made once; conftest.py has the
# order. One thread: workers with more would wait for each other's
OMP_NUM_THREADS=1 "$PYTHON" -m pytest -q --durations=5 -n 2 --dist loadfile --no-loadscope-reorder -o testpaths=tests "$@" || status=$?
echo "set-up $SETUP_SECONDS s, tests $((SECONDS - start)) s"
exit $status
