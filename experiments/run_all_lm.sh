#!/usr/bin/env bash
# bash experiments/run_all_lm.sh [OUT] [key=value ...]: the questions of RESULTS.md asked of a real language model, SmolLM2-135M, then OUT/RESULTS.md (OUT: runs/lm).
# About 16 hours on 2 cores, the first 9 for every question once (added up from the configs' headers, not measured); no training takes more than 51 minutes.
# Stop it when you like and start it again: what is finished is skipped, a training goes on from its checkpoint. After each row OUT/RESULTS.md is written anew.
# key=value goes to every training and evaluation, as train.steps=2 for a trial. LM_MODEL, LM_ENCODER: folders in place of SmolLM2's and MiniLM's.
# language_model.sh's own run is seed 0 of the first row: cp -r runs/language_model/sft OUT/plots_sft_seed0; cp -r runs/language_model/grpo OUT/plots_bm25_seed0
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"
source "$(dirname "${BASH_SOURCE[0]}")/run_steps.sh"
if [[ "${1:-}" == -* ]]; then sed -n '2,6s/^# //p' "${BASH_SOURCE[0]}"; exit 2; fi
out="runs/lm"
if [[ $# -gt 0 && "$1" != *=* ]]; then out="$1"; shift; fi
more=("$@")
set_up fast,dense,models
cd "$ROOT"

cpu=experiments/configs/cpu
model="${LM_MODEL:-"~/.cache/recr1/models/smollm2"}"    # the programs expand ~, so that no table shows whose home it is
encoder="${LM_ENCODER:-"~/.cache/recr1/models/minilm"}"
plots=runs/data/plots

evaluate() {  # evaluate FOLDER ROWS CONFIG MODEL key=value...: OUT/FOLDER/eval_ROWS.jsonl
    local folder="$1" rows="$2" config="$3" policy="$4"; shift 4
    script "${folder}_$rows" analysis/evaluate.py "experiments/$config.yaml" --model "$policy" --out "$out/$folder/eval_$rows.jsonl" "$@" ${more[@]+"${more[@]}"}
}
compare() { local name="$1"; shift; script "$name" analysis/compare_runs.py "$@"; }

# the data and the two models
[[ -n "${LM_MODEL:-}" ]] || script data_smollm2 prepare/smollm2.py
[[ -n "${LM_ENCODER:-}" ]] || script data_minilm prepare/minilm.py
script data_plots prepare/plots.py --out "$plots"
script data_esci_small prepare/esci_small.py --out runs/data/esci_small
script data_movielens prepare/movielens.py --out runs/data/movielens

# the film by its plot: SFT, then GRPO with BM25, or with the dense retriever
plots_sft() { sft "plots_sft_seed$1" configs/cpu/plots_sft "model.path=$model" "run.seed=$1"; }
plots_bm25() { train "plots_bm25_seed$1" configs/cpu/plots_grpo "model.path=$out/plots_sft_seed$1/model" "run.seed=$1"; }
plots_dense() {  # plots_dense INDEX SEED: exact or hnsw
    train "plots_$1_seed$2" configs/cpu/lm_plots_dense "model.path=$out/plots_sft_seed$2/model" "retriever.encoder=$encoder" "retriever.index=$1" "run.seed=$2"
}
transfer() {  # transfer SEED INDEX...: each one's rewrites searched by the others' retrievers, the raw plots beside them
    local seed="$1" index runs; shift
    runs=("$out/plots_bm25_seed$seed")
    for index in "$@"; do runs+=("$out/plots_${index}_seed$seed"); done
    script "transfer_$(IFS=_; echo "$*")_seed$seed" analysis/cross_retriever.py "${runs[@]}" --json
}

plots_sft 0
plots_bm25 0
write_results
start="$out/plots_sft_seed0/model"    # what several rows go on from
bm25="$out/plots_bm25_seed0"

# zero-shot: a prompt that shows the form of an answer; SFT's own prompt without SFT is the column `before` of plots_sft
evaluate zero_shot after configs/cpu/lm_plots_alone "$model"
write_results

plots_dense exact 0
transfer 0 exact
write_results

# only plots whose film lies beyond rank 100
script sparse_queries analysis/sparse_queries.py "$cpu/plots_grpo.yaml" --beyond 100 --out "$out/beyond100.jsonl" "model.path=$model" ${more[@]+"${more[@]}"}
train plots_sparse configs/cpu/lm_plots_sparse "model.path=$start" "data.train_queries=$out/beyond100.jsonl"
script by_raw_rank analysis/by_raw_rank.py "$bm25" "$out/plots_sparse" --json
write_results

# a thought that names the film, on and off, and perturbed
cold plots_thought configs/cpu/lm_plots_thought_sft --answers "$plots/teacher.jsonl" --thought title
sft plots_thought_sft configs/cpu/lm_plots_thought_sft "model.path=$model" "sft.teacher=$out/cold/plots_thought.jsonl"
train plots_thought configs/cpu/lm_plots_thought "model.path=$out/plots_thought_sft/model"
compare thought_or_not "$bm25" "$out/plots_thought"
script perturbed analysis/perturb_thoughts.py "$cpu/lm_plots_thought.yaml" --model "$out/plots_thought/model" --out "$out/perturbed.json" ${more[@]+"${more[@]}"}
write_results

# rejection SFT, alone and with GRPO for what is left of the time that GRPO had
script sample_queries analysis/sample_queries.py "$cpu/plots_grpo.yaml" --queries 960 --out "$out/sample.jsonl"
sft plots_rejection configs/cpu/lm_plots_rejection "model.path=$start" "data.train_queries=$out/sample.jsonl"
left() { "$PYTHON" experiments/analysis/steps_left.py "$bm25" "$out/plots_rejection"; }
steps=20    # where one of the two has failed
[[ -f "$out/done/plots_rejection_grpo" || ! -f "$bm25/summary.json" || ! -f "$out/plots_rejection/summary.json" ]] || steps=$(left)
train plots_rejection_grpo configs/cpu/plots_grpo "model.path=$out/plots_rejection/model" "train.steps=$steps"
script time_to_match analysis/time_to_match.py "$out/plots_rejection" "$bm25" --json
compare sft_or_grpo "$bm25" "$out/plots_sft_seed0" "$out/plots_rejection" "$out/plots_rejection_grpo"
write_results

# products
cold esci configs/cpu/lm_esci_sft --copies 4
sft esci_sft configs/cpu/lm_esci_sft "model.path=$model" "sft.teacher=$out/cold/esci.jsonl"
train esci configs/cpu/lm_esci "model.path=$out/esci_sft/model"
evaluate plots_to_products after configs/cpu/lm_esci "$bm25/model"
evaluate products_to_plots after configs/cpu/plots_grpo "$out/esci/model"
write_results

# the titles of the last films -> a query -> the next film; the strict inductive test too
inductive=(data.test_queries=runs/data/movielens/sequential/test_inductive.queries.jsonl data.test_qrels=runs/data/movielens/sequential/test_inductive.qrels.tsv)
cold next_film configs/cpu/lm_next_film_sft --target --stir 0 --queries 4000
sft next_film_sft configs/cpu/lm_next_film_sft "model.path=$model" "sft.teacher=$out/cold/next_film.jsonl"
train next_film configs/cpu/lm_next_film "model.path=$out/next_film_sft/model"
evaluate next_film_inductive before configs/cpu/lm_next_film "$out/next_film_sft/model" "${inductive[@]}"
evaluate next_film_inductive after configs/cpu/lm_next_film "$out/next_film/model" "${inductive[@]}"
script by_history analysis/by_history.py "$out/next_film_inductive/eval_after.jsonl" runs/data/movielens/sequential/test_inductive.queries.jsonl --json
write_results

# lists: 8 products in a better order; RecLLM-R1's two stages with the composite reward
cold rerank configs/cpu/lm_rerank_sft --copies 20 --stir 0.2
sft rerank_sft configs/cpu/lm_rerank_sft "model.path=$model" "sft.teacher=$out/cold/rerank.jsonl"
train rerank configs/cpu/lm_rerank "model.path=$out/rerank_sft/model"
write_results
cold list configs/cpu/lm_list_sft --most 6 --queries 2000
sft list_sft configs/cpu/lm_list_sft "model.path=$model" "sft.teacher=$out/cold/list.jsonl"
train list configs/cpu/lm_list "model.path=$out/list_sft/model"
write_results

# the first two rows again, with other seeds and by the graph
for seed in 1 2; do
    plots_sft "$seed"
    plots_bm25 "$seed"
    plots_dense exact "$seed"
    transfer "$seed" exact
    write_results
done
for seed in 0 1 2; do
    plots_dense hnsw "$seed"
    transfer "$seed" exact hnsw
    write_results
done

# GRPO without SFT; the sweep of the composite reward's weights
train plots_alone configs/cpu/lm_plots_alone "model.path=$model"
compare alone_or_not "$bm25" "$out/plots_alone"
write_results
train list_accuracy configs/cpu/lm_list "model.path=$out/list_sft/model" "reward.weights={ndcg: 1.0, diversity: 0.0, novelty: 0.0}"
train list_diverse configs/cpu/lm_list "model.path=$out/list_sft/model" "reward.weights={ndcg: 1.0, diversity: 0.5, novelty: 0.5}"

end_steps
