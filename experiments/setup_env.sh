# Sourced by quickstart.sh, walkthrough.sh, tests/run.sh and others: `set_up [EXTRA]` leaves $ROOT, $PYTHON and $SETUP_SECONDS behind.
# Installs recr1 once into the active virtual environment, or into .venv in the checkout; the next call is instant.

ROOT="$(CDPATH= cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

fail() {
    echo "set-up failed: $*" >&2
    exit 1
}

in_range() {  # setup.py's python_requires
    "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null
}

find_python() {
    local name
    for name in python3 python3.13 python3.12 python3.11; do
        # run it: the name alone may be a version manager's stub for an interpreter that is switched off
        if in_range "$name"; then
            PYTHON="$(command -v "$name")"
            "$PYTHON" -c 'import venv, ensurepip' 2>/dev/null ||
                fail "$PYTHON cannot make virtual environments (on Debian and Ubuntu: apt install python3-venv)"
            return
        fi
    done
    python3 -c '' 2>/dev/null || fail "no python3 found; recr1 needs Python 3.11, 3.12 or 3.13"
    fail "recr1 needs Python 3.11, 3.12 or 3.13; python3 is $(python3 --version 2>&1)"
}

gpu_torch() {  # prints the version of a torch to keep: this machine has a GPU and that torch is in setup.py's range
    nvidia-smi >/dev/null 2>&1 || return 0
    "$PYTHON" - <<'PY' 2>/dev/null || true
import torch
if (2, 11) <= tuple(map(int, torch.__version__.split(".")[:2])) < (2, 16):
    print(torch.__version__)
PY
}

choose_python() {
    if [[ -n "${VIRTUAL_ENV:-}" ]]; then
        PYTHON="$VIRTUAL_ENV/bin/python"
        [[ -x "$PYTHON" ]] || fail "VIRTUAL_ENV is $VIRTUAL_ENV, but it holds no bin/python; run 'unset VIRTUAL_ENV' or activate another"
    elif [[ -x "$ROOT/.venv/bin/python" ]] && "$ROOT/.venv/bin/python" -m pip --version >/dev/null 2>&1; then
        PYTHON="$ROOT/.venv/bin/python"
    else  # none, or one whose making was interrupted: venv repairs it
        find_python
        local share=()
        [[ -z "$(gpu_torch)" ]] || share=(--system-site-packages)
        "$PYTHON" -m venv ${share[@]+"${share[@]}"} "$ROOT/.venv" || fail "could not make $ROOT/.venv; remove that folder and try again"
        PYTHON="$ROOT/.venv/bin/python"
    fi
    in_range "$PYTHON" || fail "$PYTHON is $("$PYTHON" --version 2>&1); recr1 needs Python 3.11, 3.12 or 3.13. Leave or remove that environment"
}

set_up() {
    local extra="${1:-}" start=$SECONDS venv stamp want kept torch pins
    choose_python
    venv="$(dirname "$(dirname "$PYTHON")")"
    stamp="$venv/.recr1-setup"
    # the path too: one environment can serve two checkouts in turn
    want="$({ echo "$ROOT"; cat "$ROOT/setup.py" "$ROOT/experiments/constraints.txt"; } | cksum)"
    # what the tests need includes what a run needs
    if [[ -f "$stamp" ]] && { grep -qxF "$want dev" "$stamp" || grep -qxF "$want $extra" "$stamp"; }; then
        SETUP_SECONDS=$((SECONDS - start))
        return
    fi
    "$PYTHON" -m pip --version >/dev/null 2>&1 || fail "$venv has no pip; add it with '$PYTHON -m ensurepip'"
    kept="$(gpu_torch)"
    torch="${kept:-2.13.0}"
    echo "setting up $venv with torch $torch (once; minutes when torch has to be downloaded)"
    rm -f "$stamp"
    pins="$venv/.recr1-constraints.txt"
    # a GPU machine's torch names the one Triton it works with
    { grep -v -e '^torch==' ${kept:+-e '^triton=='} "$ROOT/experiments/constraints.txt"; echo "torch==$torch"; } >"$pins"
    # torch is named in this command, not only pinned: left to the dependencies, pip may choose another build of it
    "$PYTHON" -m pip install --quiet --disable-pip-version-check -c "$pins" "torch==$torch" -e "$ROOT${extra:+[$extra]}" ||
        fail "pip could not install recr1 into $venv; its lines above say why (it needs network access and some gigabytes of disk)"
    printf '%s\n' "$want " "$want $extra" >"$stamp"
    SETUP_SECONDS=$((SECONDS - start))
}
