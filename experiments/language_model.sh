#!/usr/bin/env bash
# bash experiments/language_model.sh [OUT] [key=value ...]: a real language model, SmolLM2-135M, learns to find films by their plots.
# Prepares model and data, then SFT, then GRPO; table, examples and report.html in OUT/grpo (OUT: runs/language_model, relative to where you are).
# What is finished is skipped and a training that was stopped goes on: run the same command again. key=value goes to both trainings, as run.seed=1.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"

out="$ROOT/runs/language_model"
if [[ $# -gt 0 && "$1" != *=* ]]; then
    case "$1" in
        -*) sed -n '2,4s/^# //p' "${BASH_SOURCE[0]}"; exit 2 ;;
        /*) out="$1" ;;
        *) out="$PWD/$1" ;;
    esac
    shift
fi
more=("$@")
set_up fast,models
cd "$ROOT"
mkdir -p "$out"
export PYTHONUNBUFFERED=1    # a line is shown when it is printed, though tee stands between

prepare() {  # prepare WHAT SCRIPT ARGUMENT...: the scripts keep what is whole
    echo "== $1, after $SECONDS s"
    local script="$2"; shift 2
    "$PYTHON" "experiments/prepare/$script.py" "$@"
}

quote="'"
yaml() {  # the path as a YAML value: in quotes it may hold any character
    echo "'${1//$quote/$quote$quote}'"
}

run() {  # run WHAT LOOP NAME key=value...: output also in OUT/NAME.log; a run with a summary is finished; steps and time left stand in the bar
    local what="$1" loop="$2" name="$3"; shift 3
    if [[ -f "$out/$name/summary.json" ]]; then
        echo "== $what: finished before, in $out/$name"
        return
    fi
    echo "== $what, after $SECONDS s"
    "$PYTHON" -m "recr1.$loop" "experiments/configs/cpu/plots_$name.yaml" "run.dir=$(yaml "$out/$name")" "$@" ${more[@]+"${more[@]}"} |
        tee -a "$out/$name.log"
}

prepare "1 of 4: the model, downloaded and converted once" smollm2
prepare "2 of 4: the plots" plots --out runs/data/plots
run "3 of 4: SFT, the form of an answer" sft sft
run "4 of 4: GRPO" train grpo "model.path=$(yaml "$out/sft/model")"

echo
sed -n '/^ndcg@100 on .* test queries/,/^$/p' "$out/grpo.log"
echo "set-up $SETUP_SECONDS s, $SECONDS s in all this time; examples in $out/grpo.log, the page is $out/grpo/report.html"
