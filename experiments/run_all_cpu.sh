#!/usr/bin/env bash
# bash experiments/run_all_cpu.sh [OUT] [key=value ...]: every CPU experiment, then OUT/RESULTS.md (OUT: runs/cpu). Minutes on 2 cores: see RESULTS.md.
# What is finished is skipped; a training that was stopped goes on from its checkpoint. key=value goes to every training, as train.steps=2 for a trial.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"
source "$(dirname "${BASH_SOURCE[0]}")/run_steps.sh"
out="runs/cpu"
if [[ $# -gt 0 && "$1" != *=* ]]; then out="$1"; shift; fi
more=("$@")
set_up fast,dense
cd "$ROOT"

script data_esci_small prepare/esci_small.py --out runs/data/esci_small
script data_movielens prepare/movielens.py --out runs/data/movielens

# film search and products, GRPO from the bundled policy
train msrd quickstart train.steps=800
train esci_small configs/cpu/esci_small

# SFT against GRPO at equal wall time: the best of the policy's own samples, then GRPO for what is left of the time that GRPO alone had
sft msrd_sft configs/cpu/msrd_sft
left() { "$PYTHON" experiments/analysis/steps_left.py "$out/msrd" "$out/msrd_sft"; }
[[ -f "$out/done/msrd_sft_grpo" || ! -f "$out/msrd_sft/summary.json" ]] || steps=$(left)
train msrd_sft_grpo quickstart "model.path=$out/msrd_sft/model" "train.steps=${steps:-600}"
script time_to_match analysis/time_to_match.py "$out/msrd_sft" "$out/msrd" --json

# the user's past -> a query -> the next film
cold sequential configs/cpu/movielens_sequential_sft
sft sequential_sft configs/cpu/movielens_sequential_sft "sft.teacher=$out/cold/sequential.jsonl"
train sequential configs/cpu/movielens_sequential "model.path=$out/sequential_sft/model"
inductive=(data.test_queries=runs/data/movielens/sequential/test_inductive.queries.jsonl data.test_qrels=runs/data/movielens/sequential/test_inductive.qrels.tsv)
script inductive_before analysis/evaluate.py experiments/configs/cpu/movielens_sequential.yaml --model "$out/sequential_sft/model" --out "$out/sequential_inductive/eval_before.jsonl" "${inductive[@]}"
script inductive_after analysis/evaluate.py experiments/configs/cpu/movielens_sequential.yaml --model "$out/sequential/model" --out "$out/sequential_inductive/eval_after.jsonl" "${inductive[@]}"
script by_history analysis/by_history.py "$out/sequential_inductive/eval_after.jsonl" runs/data/movielens/sequential/test_inductive.queries.jsonl --json    # 1 to 10 films; transductive all 10

# lists: re-ranking of 8 products; RecLLM-R1's two stages with the composite reward, and the sweep of its weights
cold rerank configs/cpu/esci_rerank_sft --copies 20 --stir 0.2
sft rerank_sft configs/cpu/esci_rerank_sft "sft.teacher=$out/cold/rerank.jsonl"
train rerank configs/cpu/esci_rerank "model.path=$out/rerank_sft/model"
cold list configs/cpu/movielens_list_sft --most 6
sft list_sft configs/cpu/movielens_list_sft "sft.teacher=$out/cold/list.jsonl"
train list configs/cpu/movielens_list "model.path=$out/list_sft/model"
train list_accuracy configs/cpu/movielens_list "model.path=$out/list_sft/model" "reward.weights={ndcg: 1.0, diversity: 0.0, novelty: 0.0}"
train list_diverse configs/cpu/movielens_list "model.path=$out/list_sft/model" "reward.weights={ndcg: 1.0, diversity: 0.5, novelty: 0.5}"

# thoughts on, off, perturbed
cold msrd_thought configs/cpu/msrd_thought_sft --thought
sft msrd_thought_sft configs/cpu/msrd_thought_sft "sft.teacher=$out/cold/msrd_thought.jsonl"
train msrd_thought configs/cpu/msrd_thought "model.path=$out/msrd_thought_sft/model"
train msrd_no_thought quickstart train.steps=150 train.eval_every=50
script perturbed analysis/perturb_thoughts.py experiments/configs/cpu/msrd_thought.yaml --model "$out/msrd_thought/model" --out "$out/perturbed.json"

# only queries whose targets lie beyond rank 10 of the raw query; another catalog
script sparse_queries analysis/sparse_queries.py experiments/quickstart.yaml --beyond 10 --out "$out/sparse.jsonl"
train msrd_sparse quickstart "data.train_queries=$out/sparse.jsonl" train.steps=400
script films_to_products analysis/evaluate.py experiments/configs/cpu/esci_small.yaml --model "$out/msrd/model" --out "$out/films_to_products/eval_after.jsonl"
script products_to_films analysis/evaluate.py experiments/quickstart.yaml --model "$out/esci_small/model" --out "$out/products_to_films/eval_after.jsonl"

# what takes no language model, on the same films; SASRec takes its minutes
script baselines_transductive baselines/run.py runs/data/movielens/sequential --setting transductive --remove-seen --dropout 0.2 --out "$out/baselines_transductive.json"
script baselines_inductive baselines/run.py runs/data/movielens/sequential --setting inductive --remove-seen --out "$out/baselines_inductive.json"

end_steps
