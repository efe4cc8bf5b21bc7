# Sourced by run_all_cpu.sh and run_all_lm.sh: a script of many steps, each of which is done once. It needs set_up's $PYTHON and these variables:
#   out    the folder of all that the steps leave; it is made        more   an array of key=value for every training
# What is finished is skipped. After Ctrl-C or a TERM the step that runs is asked to stop (a training saves a checkpoint) and the script ends;
# the same command goes on from there.

failed=()    # the steps that failed this time
child=""     # the process of the step that runs
stopped=""   # not empty: asked to stop
news=""      # not empty: a step was finished since the results were written

ask_to_stop() {
    stopped=yes
    if [[ -n "$child" ]]; then kill -TERM "$child" 2>/dev/null || true; fi
}
trap ask_to_stop INT TERM

run_child() {  # run_child COMMAND...: its exit status; the trap interrupts `wait`, not the process
    local code=0
    "$@" &
    child=$!
    wait "$child" || code=$?
    while kill -0 "$child" 2>/dev/null; do
        code=0
        wait "$child" || code=$?
    done
    child=""
    return "$code"
}

is_unfinished_run() {  # a training that was asked to stop ends with 0, and without a summary
    [[ -f "$out/$1/config.yaml" && ! -f "$out/$1/summary.json" ]]
}

step() {  # step NAME COMMAND...: once; its output in OUT/NAME.log, seconds and command in OUT/done/NAME
    local name="$1" start=$SECONDS code=0; shift
    if [[ -n "$stopped" ]]; then exit 130; fi
    mkdir -p "$out/done"
    if [[ -f "$out/done/$name" || -f "$out/$name/summary.json" ]]; then echo "$name: done before"; return; fi
    echo "== $name: $*"
    run_child "$@" >"$out/$name.log" 2>&1 || code=$?
    if [[ -n "$stopped" ]]; then
        echo "   stopped after $((SECONDS - start)) s; run the same command again to go on"
        exit 130
    fi
    if [[ "$code" == 0 ]] && ! is_unfinished_run "$name"; then
        printf '%s\t%s\n' "$((SECONDS - start))" "${*/#$PYTHON/python}" >"$out/done/$name"
        tail -n 4 "$out/$name.log" | sed 's/^/   /'; echo "   $((SECONDS - start)) s"
        news=yes
    else
        echo "   failed after $((SECONDS - start)) s: $(tail -n 1 "$out/$name.log")"; failed+=("$name")
    fi
}

loop() {  # loop MODULE NAME CONFIG key=value...
    local module="$1" name="$2" config="$3"; shift 3
    step "$name" "$PYTHON" -m "$module" "experiments/$config.yaml" "run.dir=$out/$name" "$@" ${more[@]+"${more[@]}"}
}
train() { loop recr1.train "$@"; }
sft() { loop recr1.sft "$@"; }
script() { local name="$1"; shift; step "$name" "$PYTHON" "experiments/$@"; }
cold() { local name="$1" config="$2"; shift 2; script "cold_$name" make/cold_start.py "experiments/$config.yaml" --out "$out/cold/$name.jsonl" "$@"; }

write_results() {  # OUT/RESULTS.md of what there is; the old one stays where nothing is new
    if [[ -z "$news" && -f "$out/RESULTS.md" ]]; then return; fi
    local code=0
    run_child "$PYTHON" experiments/analysis/table.py "$out" >"$out/RESULTS.md.partial" || code=$?
    if [[ -n "$stopped" ]]; then exit 130; fi
    if [[ "$code" == 0 ]]; then
        mv "$out/RESULTS.md.partial" "$out/RESULTS.md"
        news=""
    else
        failed+=("RESULTS.md")
    fi
}

end_steps() {  # the last line of a script
    news=yes
    write_results
    echo "$out/RESULTS.md; $(find "$out/done" -type f -exec cat {} + | awk -F '\t' '{s += $1} END {print s + 0}') s in all"
    if [[ ${#failed[@]} -gt 0 ]]; then echo "failed: ${failed[*]}"; exit 1; fi
}
