"""The recr1 command against pytrec_eval on the bundled corpora, and on a tiny world: what it
prints, and how it refuses.
"""

import functools
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
# corpus, queries, judgements, gains to whole numbers for trec_eval; raw NDCG@10 and @100 as
# measured without this code
SETS = {
    "msrd": (
        "msrd/corpus.jsonl.gz",
        "msrd/test.queries.jsonl",
        "msrd/test.qrels.tsv.gz",
        0.73,
        0.78,
        0.01,
    ),
    "esci_small": (
        "esci_small/corpus.jsonl.gz",
        "esci_small/test.queries.jsonl",
        "esci_small/test.qrels.tsv",
        0.714,
        0.788,
        0.005,
    ),
}


def run(capsys, *argv) -> str:
    capsys.readouterr()
    assert run_guarded(cli.main, [str(a) for a in argv]) == 0
    return capsys.readouterr().out


def refused(capsys, *argv) -> str:
    capsys.readouterr()
    assert run_guarded(cli.main, [str(a) for a in argv]) == 2
    err = capsys.readouterr().err
    assert err.startswith("recr1: ")
    assert err.count("\n") == 1
    return err


@functools.cache
def files(name):
    return [str(DATA / path) for path in SETS[name][:3]]


def flags(corpus, queries, qrels):
    return ["--corpus", corpus, "--queries", queries, "--qrels", qrels]


@pytest.mark.parametrize("name", SETS)
def test_raw_queries_of_the_bundled_sets_score_as_pytrec_eval_says(name, capsys):
    """Same ranking, trec_eval's own figures; and near the raw figures that were measured before
    this code existed.
    """
    out = run(
        capsys,
        "eval-queries",
        *flags(*files(name)),
        "--metrics",
        "ndcg@10,ndcg@100,recall@100,mrr@100",
        "--json",
    )
    result = json.loads(out.splitlines()[-1])
    (ids, texts, _), (queries, _), (qrels, _) = (
        read_corpus(files(name)[0]),
        read_queries(files(name)[1]),
        read_qrels(files(name)[2]),
    )
    index = BM25Searcher.build(ids, texts)
    rows, _ = index.search(list(queries.values()), 100)
    # scores that fall with the rank, so that trec_eval, which sorts again, keeps our order
    found = {
        q: {index.doc_ids[r]: -float(rank) for rank, r in enumerate(row) if r >= 0}
        for q, row in zip(queries, rows.tolist())
    }
    whole = {q: {d: int(gain) for d, gain in judged.items()} for q, judged in qrels.items()}
    assert all(int(gain) == gain for judged in qrels.values() for gain in judged.values())
    theirs = pytrec_eval.RelevanceEvaluator(
        whole, {"ndcg_cut.10,100", "recall.100", "recip_rank"}
    ).evaluate(found)
    assert result["n"] == len(queries) == len(theirs)
    for ours, name_there in (
        ("ndcg@10", "ndcg_cut_10"),
        ("ndcg@100", "ndcg_cut_100"),
        ("recall@100", "recall_100"),
        ("mrr@100", "recip_rank"),
    ):
        assert result["metrics"][ours] == pytest.approx(
            sum(row[name_there] for row in theirs.values()) / len(theirs), abs=1e-6
        ), ours
        low, high = result["ci95"][ours]
        assert low < result["metrics"][ours] < high
    *_, ten, hundred, tolerance = SETS[name]
    assert result["metrics"]["ndcg@10"] == pytest.approx(ten, abs=tolerance)
    assert result["metrics"]["ndcg@100"] == pytest.approx(hundred, abs=tolerance)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """(config of a finished run, its folder)."""
    config = write_yaml(tmp_path_factory.mktemp("world"))
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert run_guarded(train.main, [config, f"run.dir={folder}"]) == 0
    return configs.load_config(config, []), folder


def tiny_flags(cfg):
    return flags(cfg.data.corpus, cfg.data.test_queries, cfg.data.test_qrels)


def test_plain_and_gzipped_files_say_the_same(world, tmp_path, capsys):
    cfg, _ = world
    plain = tiny_flags(cfg)
    packed = []
    for flag, path in zip(plain[::2], plain[1::2]):
        (tmp_path / f"{Path(path).name}.gz").write_bytes(gzip.compress(Path(path).read_bytes()))
        packed += [flag, tmp_path / f"{Path(path).name}.gz"]
    one = run(capsys, "eval-queries", *plain, "--json")
    assert (
        one
        == run(capsys, "eval-queries", *packed, "--json")
        == run(capsys, "eval-queries", *plain, "--json", "--index-dir", tmp_path / "index")
    )
    assert (tmp_path / "index/index.json").exists()
    assert one != run(capsys, "eval-queries", *plain, "--json", "--variant", "okapi", "--k1", "2")


def test_eval_scores_the_trained_policy_as_its_run_did(world, capsys):
    cfg, folder = world
    out = run(
        capsys,
        "eval",
        "--model",
        folder / "model",
        *tiny_flags(cfg),
        "--metrics",
        f"ndcg@{cfg.reward.k_eval}",
        "--json",
    )
    result = json.loads(out.splitlines()[-1])
    rows = jsonl(folder / "eval_after.jsonl")
    summary = json.loads((folder / "summary.json").read_text())
    name = f"ndcg@{cfg.reward.k_eval}"
    assert result["n"] == 12
    assert result["metrics"][name] == pytest.approx(summary["after"], abs=1e-9)
    assert result["raw"]["metrics"][name] == pytest.approx(summary["raw"], abs=1e-9)
    assert result["difference"]["metrics"][name] == pytest.approx(summary["gain"], abs=1e-9)
    assert result["difference"]["ci95"][name] == summary["gain_ci95"]
    assert result["unparsable"] == sum(row["error"] is not None for row in rows)


def test_eval_on_two_ranks_is_eval_on_one(world, capsys):
    cfg, folder = world
    argv = [str(a) for a in ("eval", "--model", folder / "model", *tiny_flags(cfg), "--json")]
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
            "-m",
            "recr1.cli",
            *argv,
        ],
        cwd=ROOT,
        env=os.environ | dict(OMP_NUM_THREADS="1"),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == run(capsys, *argv)


def test_generate_prints_text_and_rewrite_of_the_evaluation_and_both_hit_lists(world, capsys):
    cfg, folder = world
    row = next(row for row in jsonl(folder / "eval_after.jsonl") if row["rewrite"])
    shown = f"{row['text']}\n{row['rewrite']}\n"
    assert run(capsys, "generate", "--model", folder / "model", row["raw"]) == shown
    assert parse_query(row["text"])[0] == row["rewrite"]
    out = run(
        capsys,
        "generate",
        "--model",
        folder / "model",
        row["raw"],
        "--corpus",
        cfg.data.corpus,
        "-k",
        2,
    )
    assert out.startswith(f"{shown}\nraw: {row['raw']}\n")
    assert f"rewritten: {row['rewrite']}" in out


def test_search_shows_terms_that_add_up_to_the_score(world, capsys):
    out = run(capsys, "search", "--corpus", world[0].data.corpus, "red lamp for my house", "-k", 4)
    hits = out.splitlines()[::2]
    terms = out.splitlines()[1::2]
    assert len(hits) == 4
    assert "red lamp" in hits[0]
    for hit, parts in zip(hits, terms):
        assert sum(float(x) for x in re.findall(r"\d\.\d{3}", parts)) == pytest.approx(
            float(hit.split()[1]), abs=2e-3
        )
    assert run(capsys, "search", "--corpus", world[0].data.corpus, "xyzzy").strip() == "no hits"


def test_control_characters_of_the_data_do_not_reach_the_terminal(tmp_path, capsys):
    (tmp_path / "c.jsonl").write_text(
        json.dumps(dict(id="a", title="red \x1b[31m lamp\x07\u009b2J\u202e")) + "\n"
    )
    out = run(capsys, "search", "--corpus", tmp_path / "c.jsonl", "lamp")
    assert "lamp" in out
    assert not set(out) & set("\x1b\x07\u009b\u202e")


def test_queries_without_judgement_are_left_out_aloud(world, tmp_path, capsys):
    cfg, _ = world
    (tmp_path / "q.jsonl").write_text(
        Path(cfg.data.test_queries).read_text() + '{"id": "extra", "text": "lamp"}\n'
    )
    (tmp_path / "r.tsv").write_text(Path(cfg.data.test_qrels).read_text() + "ghost\td1\t1\n")
    out = run(
        capsys,
        "eval-queries",
        *flags(cfg.data.corpus, tmp_path / "q.jsonl", tmp_path / "r.tsv"),
        "--json",
    )
    assert "first: extra" in out
    assert "first: ghost" in out
    assert json.loads(out.splitlines()[-1])["n"] == 12


def test_more_hits_than_documents_are_no_more_than_documents(world, capsys):
    assert (
        len(
            run(
                capsys, "search", "--corpus", world[0].data.corpus, "lamp house", "-k", 10**9
            ).splitlines()
        )
        == 2 * 40
    )
    assert "recall@1000000000" in run(
        capsys, "eval-queries", *tiny_flags(world[0]), "--metrics", "recall@1000000000"
    )


def test_a_closed_pipe_and_a_poor_terminal_end_in_no_traceback(world):
    command = (
        f"{sys.executable} -m recr1.cli search --corpus {world[0].data.corpus} "
        "'ユーザー lamp house' -k 40 | head -1"
    )
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | dict(PYTHONIOENCODING="ascii"),
    )
    assert done.stdout.startswith("  1 ")
    assert "Traceback" not in done.stderr


def test_bad_input_is_one_line(world, tmp_path, capsys):
    cfg, folder = world
    assert "nowhere.jsonl: no such file" in refused(
        capsys, "search", "--corpus", "nowhere.jsonl", "x"
    )
    (tmp_path / "bad.tsv").write_text("query\tdoc\tgain\n")
    assert "bad.tsv:1" in refused(
        capsys, "eval-queries", *flags(cfg.data.corpus, cfg.data.test_queries, tmp_path / "bad.tsv")
    )
    (tmp_path / "none.tsv").write_text("ghost\td1\t1\n")
    assert "none of its query ids is judged" in refused(
        capsys,
        "eval-queries",
        *flags(cfg.data.corpus, cfg.data.test_queries, tmp_path / "none.tsv"),
    )
    assert "k1" in refused(capsys, "search", "--corpus", cfg.data.corpus, "x", "--k1", "-1")
    once = ("--retriever", "mine:f", "--repeat-terms", "once")
    assert "repeat_terms" in refused(capsys, "search", "--corpus", cfg.data.corpus, "x", *once)
    assert "no/such/folder" in refused(capsys, "generate", "--model", "no/such/folder", "x")
    long = tmp_path / "long.yaml"
    long.write_text("prompt: {max_tokens: 64}\nsampling: {max_new_tokens: 100000}\n")
    assert "max_position_embeddings" in refused(
        capsys, "generate", "--model", folder / "model", "x", "--config", long
    )
    long.write_text("prompt: {max_tokens: 64}\nsampling: {max_new_tokens: 1}\n")
    assert "holds no query" in refused(
        capsys, "generate", "--model", folder / "model", "x", "--config", long
    )
    (folder / "model/recr1.yaml").rename(tmp_path / "recr1.yaml")
    try:
        assert (
            "recr1.yaml" in (line := refused(capsys, "generate", "--model", folder / "model", "x"))
            and "--config" in line
        )
        assert run(
            capsys,
            "generate",
            "--model",
            folder / "model",
            "lamp",
            "--config",
            tmp_path / "recr1.yaml",
        )
    finally:
        (tmp_path / "recr1.yaml").rename(folder / "model/recr1.yaml")


@pytest.mark.parametrize("metrics", ["ndcg", "ndcg@0", "map@10", "ndcg@-1", ""])
def test_unknown_metrics_are_refused(metrics, capsys):
    with pytest.raises(SystemExit) as e:
        cli.main(
            [
                "eval-queries",
                "--corpus",
                "c",
                "--queries",
                "q",
                "--qrels",
                "r",
                "--metrics",
                metrics,
            ]
        )
    assert e.value.code == 2
    assert "ndcg@10" in capsys.readouterr().err


def test_a_renamed_flag_is_refused_with_its_new_name(capsys):
    with pytest.raises(SystemExit) as e:
        cli.main(["search", "lamp", "--corpus", "x.jsonl", "--upstream-wrapping"])
    assert e.value.code == 2
    message = "--upstream-wrapping is called --reproduce-upstream-query-bug now"
    assert message in capsys.readouterr().err


def test_help_fits_one_screen():
    done = subprocess.run(
        [sys.executable, "-m", "recr1.cli", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | dict(COLUMNS="80"),
    )
    lines = done.stdout.splitlines()
    assert done.returncode == 0
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 80
    assert all(name in done.stdout for name in ("eval-queries", "eval ", "search", "generate"))


def test_the_bundled_policy_answers_as_the_quickstart_asks():
    recipe, quickstart = (
        configs.load_config(str(ROOT / path), [])
        for path in ("experiments/policy/recr1.yaml", "experiments/quickstart.yaml")
    )
    assert yaml.safe_load(configs.dump_answering_config(quickstart)) == yaml.safe_load(
        (ROOT / "experiments/policy/recr1.yaml").read_text()
    )
    assert recipe.prompt == quickstart.prompt
    assert recipe.sampling.max_new_tokens == quickstart.sampling.max_new_tokens
