#!/usr/bin/env bash
# bash experiments/quickstart.sh [OUT_DIR] [key=value ...]: sets up, then trains the bundled policy by quickstart.yaml.
# OUT_DIR (default: runs/quickstart in the checkout) is relative to where you are; paths in key=value are relative to the checkout.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"

out="$ROOT/runs/quickstart"
if [[ $# -gt 0 && "$1" != *=* ]]; then
    case "$1" in
        -*) sed -n '2,3s/^# //p' "${BASH_SOURCE[0]}"; exit 2 ;;
        /*) out="$1" ;;
        *) out="$PWD/$1" ;;
    esac
    shift
fi
set_up

cd "$ROOT"
start=$SECONDS
quote="'"
# values are YAML: in quotes a path may hold any character
"$PYTHON" -m recr1.train experiments/quickstart.yaml "run.dir='${out//$quote/$quote$quote}'" "$@"
echo "set-up $SETUP_SECONDS s, run $((SECONDS - start)) s; results in $out"
