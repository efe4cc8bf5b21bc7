#!/usr/bin/env bash
# bash tests/repo/same_bits.sh BASE [WORD ...]: do the working tree's runs leave the same bits as those of commit BASE?
# With WORDs only the jobs whose name holds one of them. PYTHON: the interpreter, by default the checkout's own.
set -euo pipefail

root="$(CDPATH= cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
base="${1:?"usage: bash tests/repo/same_bits.sh BASE [WORD ...]"}"
shift
if ! git -C "$root" rev-parse --quiet --verify "$base^{commit}" >/dev/null; then
    echo "same_bits: $base is no commit of this repository" >&2
    exit 2
fi

# a worktree has no environment of its own: the first checkout's serves
first="$(dirname "$(git -C "$root" rev-parse --path-format=absolute --git-common-dir)")"
for python in "${PYTHON:-}" "$root/.venv/bin/python" "$first/.venv/bin/python"; do
    [[ -x "$python" ]] && break
done
if [[ ! -x "$python" ]]; then
    echo "same_bits: no .venv/bin/python here; make one with bash tests/run.sh, or name an interpreter in PYTHON" >&2
    exit 2
fi

# bits that a GPU would not repeat
export CUDA_VISIBLE_DEVICES=

folder="$(mktemp -d "${TMPDIR:-/tmp}/same_bits.XXXXXX")"
trap 'git -C "$root" worktree remove --force "$folder/base" 2>/dev/null || true' EXIT
git -C "$root" worktree add --quiet --detach "$folder/base" "$base"

status=0
"$python" -P "$root/tests/repo/same_bits.py" compare "$folder/base" "$root" "$folder/jobs" "$@" || status=$?
if [[ $status == 0 ]]; then
    rm -rf "$folder/jobs"
    git -C "$root" worktree remove --force "$folder/base"
    rmdir "$folder"
elif [[ -d "$folder/jobs" ]]; then
    echo "what the jobs left is kept in $folder/jobs" >&2
fi
exit $status
