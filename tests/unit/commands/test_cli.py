"""The recr1 command against pytrec_eval on the bundled corpora, and on a tiny world: what it
prints, and how it refuses.
"""

import gzip
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import pytrec_eval
import yaml
from helpers.tiny_world import jsonl, write_yaml

from recr1 import cli, train
from recr1.config import loader as configs
from recr1.data.readers import read_corpus, read_qrels, read_queries
from recr1.retrieval.bm25.searcher import BM25Searcher
from recr1.tasks.answer_parser import parse_query
from recr1.training.launch import run_guarded

ROOT = Path(__file__).resolve().parents[3]
DATA = ROOT / "experiments/data"
# corpus, queries, judgements; raw NDCG@10 and @100 as measured without this code, and how near
MSRD = (
    DATA / "msrd/corpus.jsonl.gz",
    DATA / "msrd/test.queries.jsonl",
    DATA / "msrd/test.qrels.tsv.gz",
    0.73,
    0.78,
    0.01,
)
ESCI_SMALL = (
    DATA / "esci_small/corpus.jsonl.gz",
    DATA / "esci_small/test.queries.jsonl",
    DATA / "esci_small/test.qrels.tsv",
    0.714,
    0.788,
    0.005,
)
SETS = {"msrd": MSRD, "esci_small": ESCI_SMALL}
# the names of the metrics here and in pytrec_eval
METRICS = {
    "ndcg@10": "ndcg_cut_10",
    "ndcg@100": "ndcg_cut_100",
    "recall@100": "recall_100",
    "mrr@100": "recip_rank",
}


def run(capsys, *argv) -> str:
    """Run the command, which must succeed; return its output."""
    capsys.readouterr()
    exit_code = run_guarded(cli.main, [str(word) for word in argv])
    assert exit_code == 0
    return capsys.readouterr().out


def run_json(capsys, *argv) -> dict:
    """Run the command with --json, and return the object that its last line holds."""
    out = run(capsys, *argv, "--json")
    return json.loads(out.splitlines()[-1])


def refused(capsys, *argv) -> str:
    """Run the command, which must refuse; return the one line of its error."""
    capsys.readouterr()
    exit_code = run_guarded(cli.main, [str(word) for word in argv])
    assert exit_code == 2
    err = capsys.readouterr().err
    assert err.startswith("recr1: ")
    assert err.count("\n") == 1
    return err


def list_flags(corpus, queries, qrels):
    return ["--corpus", corpus, "--queries", queries, "--qrels", qrels]


@pytest.mark.parametrize("name", SETS)
def test_raw_queries_of_the_bundled_sets_score_as_pytrec_eval_says(name, capsys):
    """Same ranking, trec_eval's own figures; and near the raw figures that were measured before
    this code existed.
    """
    corpus, queries, qrels, ndcg_at_10, ndcg_at_100, tolerance = SETS[name]
    flags = list_flags(corpus, queries, qrels)

    result = run_json(capsys, "eval-queries", *flags, "--metrics", ",".join(METRICS))

    rows = score_by_pytrec_eval(corpus, queries, qrels)
    metrics = result["metrics"]
    assert result["n"] == len(rows)
    for metric, name_there in METRICS.items():
        want = sum(row[name_there] for row in rows) / len(rows)
        assert metrics[metric] == pytest.approx(want, abs=1e-6), metric
        low, high = result["ci95"][metric]
        assert low < metrics[metric] < high
    assert metrics["ndcg@10"] == pytest.approx(ndcg_at_10, abs=tolerance)
    assert metrics["ndcg@100"] == pytest.approx(ndcg_at_100, abs=tolerance)


def score_by_pytrec_eval(corpus_path, queries_path, qrels_path) -> list[dict]:
    """Return pytrec_eval's row of figures for each query, of BM25's first 100 documents."""
    ids, texts, _ = read_corpus(corpus_path)
    queries, _ = read_queries(queries_path)
    qrels, _ = read_qrels(qrels_path)
    index = BM25Searcher.build(ids, texts)
    rankings, _ = index.search(list(queries.values()), 100)

    # scores that fall with the rank, so that trec_eval, which sorts again, keeps our order
    scores = {}
    for query, ranking in zip(queries, rankings.tolist()):
        scores[query] = {}
        for rank, document in enumerate(ranking):
            if document >= 0:
                scores[query][index.doc_ids[document]] = -float(rank)

    # trec_eval takes whole numbers only
    gains = {}
    for query, judgements in qrels.items():
        gains[query] = {document: int(gain) for document, gain in judgements.items()}
    assert gains == qrels

    measures = {"ndcg_cut.10,100", "recall.100", "recip_rank"}
    rows = pytrec_eval.RelevanceEvaluator(gains, measures).evaluate(scores)
    assert len(rows) == len(queries)
    return list(rows.values())


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Return (config of a finished run, its folder)."""
    config = write_yaml(tmp_path_factory.mktemp("world"))
    folder = tmp_path_factory.mktemp("runs") / "run"
    exit_code = run_guarded(train.main, [config, f"run.dir={folder}"])
    assert exit_code == 0
    return configs.load_config(config, []), folder


def list_tiny_flags(cfg):
    return list_flags(cfg.data.corpus, cfg.data.test_queries, cfg.data.test_qrels)


def test_plain_and_gzipped_files_say_the_same(world, tmp_path, capsys):
    cfg, _ = world
    flags = list_tiny_flags(cfg)
    packed_flags = []
    for flag, path in zip(flags[::2], flags[1::2]):
        plain = Path(path)
        packed = tmp_path / f"{plain.name}.gz"
        packed.write_bytes(gzip.compress(plain.read_bytes()))
        packed_flags += [flag, packed]
    index = tmp_path / "index"
    other_bm25 = ["--variant", "okapi", "--k1", "2"]

    of_plain = run(capsys, "eval-queries", *flags, "--json")
    of_packed = run(capsys, "eval-queries", *packed_flags, "--json")
    of_saved_index = run(capsys, "eval-queries", *flags, "--json", "--index-dir", index)
    of_other_bm25 = run(capsys, "eval-queries", *flags, "--json", *other_bm25)

    assert of_packed == of_plain
    assert of_saved_index == of_plain
    assert (index / "index.json").exists()
    assert of_other_bm25 != of_plain


def test_eval_scores_the_trained_policy_as_its_run_did(world, capsys):
    cfg, folder = world
    flags = list_tiny_flags(cfg)
    metric = f"ndcg@{cfg.reward.k_eval}"

    result = run_json(capsys, "eval", "--model", folder / "model", *flags, "--metrics", metric)

    rows = jsonl(folder / "eval_after.jsonl")
    summary = json.loads((folder / "summary.json").read_text())
    raw = result["raw"]
    difference = result["difference"]
    errors = [row for row in rows if row["error"] is not None]
    assert result["n"] == 12
    assert result["metrics"][metric] == pytest.approx(summary["after"], abs=1e-9)
    assert raw["metrics"][metric] == pytest.approx(summary["raw"], abs=1e-9)
    assert difference["metrics"][metric] == pytest.approx(summary["gain"], abs=1e-9)
    assert difference["ci95"][metric] == summary["gain_ci95"]
    assert result["unparsable"] == len(errors)


def test_eval_on_two_ranks_is_eval_on_one(world, capsys):
    cfg, folder = world
    model = str(folder / "model")
    argv = ["eval", "--model", model, *list_tiny_flags(cfg), "--json"]
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, "-m", *launcher, "-m", "recr1.cli", *argv]

    on_two_ranks = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | dict(OMP_NUM_THREADS="1"),
        capture_output=True,
        text=True,
        timeout=300,
    )
    on_one_rank = run(capsys, *argv)

    assert on_two_ranks.returncode == 0, on_two_ranks.stderr
    assert on_two_ranks.stdout == on_one_rank


def test_generate_prints_text_and_rewrite_of_the_evaluation_and_both_hit_lists(world, capsys):
    cfg, folder = world
    rows = jsonl(folder / "eval_after.jsonl")
    row = next(row for row in rows if row["rewrite"])
    raw = row["raw"]
    rewrite = row["rewrite"]
    argv = ["generate", "--model", folder / "model", raw]

    without_hits = run(capsys, *argv)
    with_hits = run(capsys, *argv, "--corpus", cfg.data.corpus, "-k", 2)

    answer = f"{row['text']}\n{rewrite}\n"
    query, _ = parse_query(row["text"])
    assert without_hits == answer
    assert query == rewrite
    assert with_hits.startswith(f"{answer}\nraw: {raw}\n")
    assert f"rewritten: {rewrite}" in with_hits


def test_search_shows_terms_that_add_up_to_the_score(world, capsys):
    corpus = world[0].data.corpus

    out = run(capsys, "search", "--corpus", corpus, "red lamp for my house", "-k", 4)
    without_hits = run(capsys, "search", "--corpus", corpus, "xyzzy")

    hits = out.splitlines()[::2]
    terms = out.splitlines()[1::2]
    assert len(hits) == 4
    assert "red lamp" in hits[0]
    for hit, terms_of_hit in zip(hits, terms):
        score = float(hit.split()[1])
        scores = [float(number) for number in re.findall(r"\d\.\d{3}", terms_of_hit)]
        assert sum(scores) == pytest.approx(score, abs=2e-3)
    assert without_hits.strip() == "no hits"


def test_control_characters_of_the_data_do_not_reach_the_terminal(tmp_path, capsys):
    document = dict(id="a", title="red \x1b[31m lamp\x07\u009b2J\u202e")
    corpus = tmp_path / "c.jsonl"
    corpus.write_text(json.dumps(document) + "\n")

    out = run(capsys, "search", "--corpus", corpus, "lamp")

    assert "lamp" in out
    assert not set(out) & set("\x1b\x07\u009b\u202e")


def test_queries_without_judgement_are_left_out_aloud(world, tmp_path, capsys):
    cfg, _ = world
    queries = Path(cfg.data.test_queries).read_text()
    more_queries = tmp_path / "q.jsonl"
    more_queries.write_text(queries + '{"id": "extra", "text": "lamp"}\n')
    qrels = Path(cfg.data.test_qrels).read_text()
    more_qrels = tmp_path / "r.tsv"
    more_qrels.write_text(qrels + "ghost\td1\t1\n")
    flags = list_flags(cfg.data.corpus, more_queries, more_qrels)

    out = run(capsys, "eval-queries", *flags, "--json")

    result = json.loads(out.splitlines()[-1])
    assert "first: extra" in out
    assert "first: ghost" in out
    assert result["n"] == 12


def test_more_hits_than_documents_are_no_more_than_documents(world, capsys):
    cfg, _ = world
    flags = list_tiny_flags(cfg)

    hits = run(capsys, "search", "--corpus", cfg.data.corpus, "lamp house", "-k", 10**9)
    figures = run(capsys, "eval-queries", *flags, "--metrics", "recall@1000000000")

    assert len(hits.splitlines()) == 2 * 40
    assert "recall@1000000000" in figures


def test_a_closed_pipe_and_a_poor_terminal_end_in_no_traceback(world):
    corpus = world[0].data.corpus
    command = (
        f"{sys.executable} -m recr1.cli search --corpus {corpus} "
        "'ユーザー lamp house' -k 40 | head -1"
    )

    process = subprocess.run(
        ["bash", "-c", command],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | dict(PYTHONIOENCODING="ascii"),
    )

    assert process.stdout.startswith("  1 ")
    assert "Traceback" not in process.stderr


def test_bad_input_is_one_line(world, tmp_path, capsys):
    cfg, folder = world
    corpus = cfg.data.corpus
    queries = cfg.data.test_queries
    model = folder / "model"

    err = refused(capsys, "search", "--corpus", "nowhere.jsonl", "x")
    assert "nowhere.jsonl: no such file" in err

    qrels = tmp_path / "bad.tsv"
    qrels.write_text("query\tdoc\tgain\n")
    err = refused(capsys, "eval-queries", *list_flags(corpus, queries, qrels))
    assert "bad.tsv:1" in err

    qrels = tmp_path / "none.tsv"
    qrels.write_text("ghost\td1\t1\n")
    err = refused(capsys, "eval-queries", *list_flags(corpus, queries, qrels))
    assert "none of its query ids is judged" in err

    err = refused(capsys, "search", "--corpus", corpus, "x", "--k1", "-1")
    assert "k1" in err

    once = ("--retriever", "mine:f", "--repeat-terms", "once")
    err = refused(capsys, "search", "--corpus", corpus, "x", *once)
    assert "repeat_terms" in err

    err = refused(capsys, "generate", "--model", "no/such/folder", "x")
    assert "no/such/folder" in err

    config = tmp_path / "long.yaml"
    config.write_text("prompt: {max_tokens: 64}\nsampling: {max_new_tokens: 100000}\n")
    err = refused(capsys, "generate", "--model", model, "x", "--config", config)
    assert "max_position_embeddings" in err

    config.write_text("prompt: {max_tokens: 64}\nsampling: {max_new_tokens: 1}\n")
    err = refused(capsys, "generate", "--model", model, "x", "--config", config)
    assert "holds no query" in err

    recipe = model / "recr1.yaml"
    recipe_elsewhere = tmp_path / "recr1.yaml"
    recipe.rename(recipe_elsewhere)
    try:
        err = refused(capsys, "generate", "--model", model, "x")
        assert "recr1.yaml" in err
        assert "--config" in err
        out = run(capsys, "generate", "--model", model, "lamp", "--config", recipe_elsewhere)
        assert out
    finally:
        recipe_elsewhere.rename(recipe)


@pytest.mark.parametrize("metrics", ["ndcg", "ndcg@0", "map@10", "ndcg@-1", ""])
def test_unknown_metrics_are_refused(metrics, capsys):
    argv = ["eval-queries", *list_flags("c", "q", "r"), "--metrics", metrics]

    with pytest.raises(SystemExit) as exit:
        cli.main(argv)

    assert exit.value.code == 2
    assert "ndcg@10" in capsys.readouterr().err


def test_a_renamed_flag_is_refused_with_its_new_name(capsys):
    message = "--upstream-wrapping is called --reproduce-upstream-query-bug now"

    with pytest.raises(SystemExit) as exit:
        cli.main(["search", "lamp", "--corpus", "x.jsonl", "--upstream-wrapping"])

    assert exit.value.code == 2
    assert message in capsys.readouterr().err


def test_help_fits_one_screen():
    process = subprocess.run(
        [sys.executable, "-m", "recr1.cli", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | dict(COLUMNS="80"),
    )

    assert process.returncode == 0
    lines = process.stdout.splitlines()
    assert len(lines) <= 24
    for line in lines:
        assert len(line) <= 80
    for name in ("eval-queries", "eval ", "search", "generate"):
        assert name in process.stdout


def test_the_bundled_policy_answers_as_the_quickstart_asks():
    path = ROOT / "experiments/policy/recr1.yaml"
    recipe = configs.load_config(str(path), [])
    quickstart = configs.load_config(str(ROOT / "experiments/quickstart.yaml"), [])

    dumped = configs.dump_answering_config(quickstart)

    assert yaml.safe_load(dumped) == yaml.safe_load(path.read_text())
    assert recipe.prompt == quickstart.prompt
    assert recipe.sampling.max_new_tokens == quickstart.sampling.max_new_tokens
