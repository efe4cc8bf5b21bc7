#!/usr/bin/env bash
# bash experiments/benchmarks/wheel.sh: builds wheel and sdist, installs each into an empty environment outside the checkout, and there scores the bundled
# ESCI queries and trains one step. Ends with one line of JSON: seconds of each part, and whether the product worked.
set -euo pipefail
root="$(CDPATH= cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
tmp="$(mktemp -d)"
trap 'rm -rf "$tmp"' EXIT
mkdir "$tmp/source" "$tmp/dist" "$tmp/cwd"
git -C "$root" ls-files -z --cached --others --exclude-standard recr1 kernels setup.py README.md LICENSE | (cd "$root" && xargs -0 cp --parents -t "$tmp/source")
python3 -m venv "$tmp/build"
"$tmp/build/bin/pip" install --quiet --quiet --disable-pip-version-check "setuptools>=77" wheel
(cd "$tmp/source" && "$tmp/build/bin/python" setup.py --quiet sdist --dist-dir "$tmp/dist" bdist_wheel --dist-dir "$tmp/dist" 2>/dev/null)

data="$root/experiments/data/esci_small"
ok=()
for package in "$tmp"/dist/*.whl "$tmp"/dist/*.tar.gz; do
    kind="${package##*.}"
    start=$SECONDS
    python3 -m venv "$tmp/env_$kind"
    "$tmp/env_$kind/bin/pip" install --quiet --quiet --disable-pip-version-check -c "$root/experiments/constraints.txt" torch==2.13.0 "$package"
    echo "$kind: installed in $((SECONDS - start)) s"
    start=$SECONDS
    cd "$tmp/cwd"
    "$tmp/env_$kind/bin/recr1" eval-queries --corpus "$data/corpus.jsonl.gz" --queries "$data/test.queries.jsonl" --qrels "$data/test.qrels.tsv" --json | tail -1
    (cd "$root" && sed "s#\(experiments/[a-z_/.]*\)#$root/\1#g; s#runs/#$tmp/cwd/#g" experiments/quickstart.yaml) >"$tmp/cwd/one.yaml"
    "$tmp/env_$kind/bin/python" -m recr1.train one.yaml "run.dir=$tmp/cwd/run_$kind" train.steps=1 train.eval_every=0 | grep -E "^step"
    where="$("$tmp/env_$kind/bin/python" -c 'import recr1.kernels.logprob as m; print(m.__file__)')"
    [[ "$where" == "$tmp/env_$kind"/* && -f "$tmp/cwd/run_$kind/summary.json" ]]
    echo "$kind: queries scored and one step trained in $((SECONDS - start)) s"
    ok+=("{\"name\": \"$kind in an empty environment scores and trains\", \"value\": 1, \"bar\": 1, \"ok\": true}")
done
echo "{\"bars\": [$(IFS=,; echo "${ok[*]}")]}"
