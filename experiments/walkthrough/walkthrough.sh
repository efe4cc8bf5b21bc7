#!/usr/bin/env bash
# bash experiments/walkthrough/walkthrough.sh [OUT.ipynb] [name=value ...]: sets up, then runs walkthrough.ipynb and writes it with its pictures.
# OUT.ipynb (default: runs/walkthrough/walkthrough.ipynb in the checkout) is relative to where you are.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../setup_env.sh"
set_up docs
"$PYTHON" "$ROOT/experiments/walkthrough/run_notebook.py" "$@"
