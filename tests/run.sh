#!/usr/bin/env bash
# bash tests/run.sh [pytest arguments]: sets up, then runs the tests. Paths in the arguments are relative to the checkout.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../experiments/setup_env.sh"
set_up dev

cd "$ROOT"
start=$SECONDS
status=0
# testpaths, not a path: a file named in the arguments then runs alone
"$PYTHON" -m pytest -q --durations=5 -o testpaths=tests "$@" || status=$?
echo "set-up $SETUP_SECONDS s, tests $((SECONDS - start)) s"
exit $status
