"""Measure size and opening time of the report of a run of 10,000 rollouts.

python experiments/benchmarks/report.py [--steps 157] [--tokens 512]

The run is made up: 64 rollouts per step, all distinct, all logged with their tokens; test queries
and corpus are the bundled msrd's, searched by BM25 as they are and with a word repeated. Its page
is written, then opened three times from the file in a headless Chromium (on PATH). The opening time
is the browser's own: from the start of the navigation to the load event or the first contentful
paint, whichever is later. Ends with one line of JSON: the bars and whether they hold. The seconds
need a quiet machine.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
import tempfile
import time
from pathlib import Path
from random import Random
from statistics import median
from typing import TextIO

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from helpers.browser import Browser, installed  # noqa: E402

from recr1 import report  # noqa: E402
from recr1.config import loader as configs  # noqa: E402
from recr1.config.schema import Config  # noqa: E402
from recr1.data import readers  # noqa: E402
from recr1.retrieval.factory import build_retriever  # noqa: E402
from recr1.retrieval.interface import Retriever  # noqa: E402
from recr1.tasks.ranking_metrics import compute_ndcg  # noqa: E402

PROMPTS = 8
SIBLINGS = 8
EXTRA_WORDS = ["about", "films", "ideas"]
SECONDS = dict(sample=1.0, reward=0.1, train=1.0, step=2.2)
OPENINGS = 3
OPENED = """new Promise((done) => { const look = () => {
  const navigation = performance.getEntriesByType("navigation")[0];
  const paint = performance.getEntriesByName("first-contentful-paint")[0];
  if (navigation.loadEventEnd && paint) {
    done(Math.max(navigation.loadEventEnd, paint.startTime) / 1000);
  } else {
    requestAnimationFrame(look);
  }
}; look(); })"""


def make_run(folder: Path, cfg: Config, retriever: Retriever, steps: int, tokens: int) -> None:
    """Write the files of a finished run that is made up."""
    random = Random(0)
    train_queries, _ = readers.read_queries(cfg.data.train_queries)
    test_queries, _ = readers.read_queries(cfg.data.test_queries)
    folder.mkdir()
    (folder / "config.yaml").write_text(configs.dump_config(cfg), encoding="utf-8")
    write_evaluations(folder, cfg, retriever, test_queries, random)
    write_metrics(folder / "metrics.jsonl", steps, random)
    write_rollouts(folder / "rollouts.jsonl.gz", train_queries, steps, tokens, random)
    summary = dict(steps=steps, n_eval=len(test_queries), unparsable_before=0, unparsable_after=0)
    (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")


def write_evaluations(
    folder: Path, cfg: Config, retriever: Retriever, queries: dict[str, str], random: Random
) -> None:
    """Write eval_before and eval_after: the queries, and the queries with a word repeated."""
    qrels, _ = readers.read_qrels(cfg.data.test_qrels)
    raws = list(queries.values())
    rewrites = []
    for text in raws:
        word = random.choice(text.split())
        rewrites.append(f"{text} {word}")

    depth = cfg.reward.k_eval
    query_ids = list(queries)
    raw_scores = score_queries(retriever, raws, query_ids, qrels, depth)
    rewrite_scores = score_queries(retriever, rewrites, query_ids, qrels, depth)
    write_answers(folder / "eval_before.jsonl", queries, raws, raw_scores, raw_scores)
    write_answers(folder / "eval_after.jsonl", queries, rewrites, raw_scores, rewrite_scores)


def write_answers(
    path: Path,
    queries: dict[str, str],
    answers: list[str],
    raw_scores: list[float],
    scores: list[float],
) -> None:
    """Write a row for each query with its answer and their scores."""
    with open(path, "w", encoding="utf-8") as file:
        for number, (query_id, text) in enumerate(queries.items()):
            answer = answers[number]
            row = dict(
                id=query_id,
                raw=text,
                rewrite=answer,
                ndcg_raw=raw_scores[number],
                ndcg=scores[number],
                text=answer,
                error=None,
            )
            write_row(file, row)


def score_queries(
    retriever: Retriever, texts: list[str], query_ids: list[str], qrels: dict, depth: int
) -> list[float]:
    """Return the NDCG of each text, searched as its query."""
    rows_of_queries, *_ = retriever.search(texts, depth)
    scores = []
    for query_id, rows in zip(query_ids, rows_of_queries.tolist()):
        doc_ids = [retriever.doc_ids[row] for row in rows if row >= 0]
        scores.append(compute_ndcg(doc_ids, qrels.get(query_id, {}), depth))
    return scores


def write_metrics(path: Path, steps: int, random: Random) -> None:
    """Write a row of random metrics for each step."""
    with open(path, "w", encoding="utf-8") as file:
        for step in range(1, steps + 1):
            row = {name: random.random() for name in report.record.CURVES}
            row |= dict(step=step, ndcg=random.random(), skipped_steps=0)
            if step % 10 == 0:
                row |= dict(
                    val_ndcg=0.5,
                    val_raw=0.5,
                    val_gain=random.gauss(0, 0.01),
                    val_gain_ci95=[-0.02, 0.02],
                    val_format_errors=0,
                )
            row["timing_s"] = SECONDS
            write_row(file, row)


def write_rollouts(
    path: Path, queries: dict[str, str], steps: int, tokens: int, random: Random
) -> None:
    """Write the rollouts of all steps, all distinct."""
    population = list(queries.items())
    with gzip.open(path, "wt", compresslevel=1, encoding="utf-8") as file:
        for step in range(1, steps + 1):
            for query_id, text in random.sample(population, PROMPTS):
                for sibling in range(SIBLINGS):
                    row = dict(step=step, prompt=query_id, sibling=sibling, count=1)
                    row |= make_rollout(text, tokens, random)
                    write_row(file, row)


def make_rollout(query: str, tokens: int, random: Random) -> dict:
    """Return a rollout's text, reward and tokens."""
    words = query.split() + EXTRA_WORDS
    thought = " ".join(random.choices(words, k=tokens // 2))
    logp = []
    for _ in range(tokens):
        logp.append(-round(random.expovariate(1), 6))
    reward = random.random()
    rewrite = f"{query} {random.randrange(10**6)}"
    return dict(
        text=f'{thought}</think><answer>{{"query": "{rewrite}"}}</answer>',
        finished=True,
        reward=reward,
        reward_terms=dict(ndcg=reward),
        error=None,
        advantage=random.gauss(0, 1),
        prompt_ids=random.choices(range(300, 4000), k=64),
        ids=random.choices(range(300, 4000), k=tokens),
        sampler_logp=logp,
        trainer_logp=logp,
        ref_logp=logp,
        old_logp=logp,
        entropy=logp,
    )


def write_row(file: TextIO, row: dict) -> None:
    """Write a line of JSON."""
    file.write(json.dumps(row) + "\n")


def load_quickstart(folder: Path, steps: int) -> Config:
    """Return the quickstart's config with the paths of this checkout."""
    quickstart = str(ROOT / "experiments/quickstart.yaml")
    data = configs.load_config(quickstart, []).data
    overrides = []
    for name, path in vars(data).items():
        if str(path).startswith("experiments/"):
            overrides.append(f"data.{name}={ROOT / path}")
    overrides += [
        f"model.path={ROOT / 'experiments/policy'}",
        f"run.dir={folder}",
        f"train.steps={steps}",
        "log.tokens_every=1",
        "loss.kl_coef=0.01",
    ]
    return configs.load_config(quickstart, overrides)


def write_page(folder: Path, retriever: Retriever, steps: int, tokens: int) -> Path:
    """Write the report's page and print the seconds that it takes."""
    start = time.perf_counter()
    cpu_start = time.process_time()
    page = report.write_report([str(folder)], retriever=retriever)
    seconds = time.perf_counter() - start
    cpu_seconds = time.process_time() - cpu_start
    rollouts = steps * PROMPTS * SIBLINGS
    file = folder / "rollouts.jsonl.gz"
    size = file.stat().st_size / 1e6
    print(
        f"{rollouts:,} rollouts of {tokens} tokens, "
        f"{size:.0f} MB: written in "
        f"{seconds:.1f} s ({cpu_seconds:.1f} s of CPU)"
    )
    return page


def open_page(page: Path) -> list[dict]:
    """Open the page in a browser, print its figures and return its bars."""
    address = page.as_uri()
    with Browser(installed(), 600) as browser:
        browser.look(1280, 900, False)
        browser.call("Performance.enable", timeDomain="threadTicks")
        seconds = []
        cpu_seconds = []
        for _ in range(OPENINGS):
            browser.open(address)
            opening = browser.value(OPENED)
            seconds.append(opening)
            cpu_seconds.append(read_task_duration(browser))
        complaints = browser.complaints()
        requests = {url for url in browser.requests() if not url.startswith("data:")}
    requests.discard(address)

    size = page.stat().st_size
    opening = median(seconds)
    print(
        f"page of {size:,} bytes, opened in "
        f"{format_seconds(seconds)} s "
        f"({format_seconds(cpu_seconds)} s of its main thread's CPU time); "
        f"the browser reported {complaints or 'nothing'}"
    )
    return [
        make_bar("page, MB", round(size / 1e6, 3), 5),
        make_bar("opening, s", round(opening, 3), 2),
        make_bar("console messages", len(complaints), 0),
        make_bar("requests beside the file", len(requests), 0),
    ]


def read_task_duration(browser: Browser) -> float:
    """Return the CPU seconds of the page's main thread."""
    for metric in browser.call("Performance.getMetrics")["metrics"]:
        if metric["name"] == "TaskDuration":
            return metric["value"]
    raise RuntimeError("the browser gave no TaskDuration among Performance.getMetrics")


def format_seconds(values: list[float]) -> str:
    """Format several seconds in a row."""
    return ", ".join(f"{value:.2f}" for value in values)


def make_bar(name: str, value: float, most: float) -> dict:
    """Return a bar for the line of JSON."""
    return dict(name=name, value=value, bar=most, ok=value <= most)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=157)
    parser.add_argument("--tokens", type=int, default=512)
    return parser.parse_args()


def main() -> int:
    """Write the page, open it in a browser and print the bars."""
    args = parse_arguments()
    if not installed():
        print("no browser on PATH; install chromium (apt-get install chromium)", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "run"
        cfg = load_quickstart(folder, args.steps)
        make_retriever = build_retriever(cfg.retriever)
        retriever, _ = make_retriever(cfg.data.corpus, "stop", None, print)
        make_run(folder, cfg, retriever, args.steps, args.tokens)
        page = write_page(folder, retriever, args.steps, args.tokens)
        bars = open_page(page)
    print(json.dumps({"bars": bars}))
    return 0 if all(bar["ok"] for bar in bars) else 1


if __name__ == "__main__":
    sys.exit(main())
