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
import random
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

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
    rnd = random.Random(0)
    train = list(readers.read_queries(cfg.data.train_queries)[0].items())
    test = list(readers.read_queries(cfg.data.test_queries)[0].items())
    qrels = readers.read_qrels(cfg.data.test_qrels)[0]
    k = cfg.reward.k_eval

    def scores(queries: list[str]) -> list[float]:
        found = retriever.search(queries, k)[0].tolist()
        return [
            compute_ndcg([retriever.doc_ids[row] for row in rows if row >= 0], qrels.get(id, {}), k)
            for (id, _), rows in zip(test, found)
        ]

    raws = [text for _, text in test]
    rewrites = [" ".join([text, rnd.choice(text.split())]) for text in raws]
    raw = scores(raws)
    after = scores(rewrites)
    folder.mkdir()
    (folder / "config.yaml").write_text(configs.dump_config(cfg), encoding="utf-8")
    for name, answers, own in (("eval_before", raws, raw), ("eval_after", rewrites, after)):
        rows = [
            dict(id=id, raw=text, rewrite=answer, ndcg_raw=r, ndcg=score, text=answer, error=None)
            for (id, text), answer, r, score in zip(test, answers, raw, own)
        ]
        (folder / f"{name}.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8"
        )
    with open(folder / "metrics.jsonl", "w", encoding="utf-8") as file:
        for step in range(1, steps + 1):
            row = {name: rnd.random() for name in report.record.CURVES} | dict(
                step=step, ndcg=rnd.random(), skipped_steps=0
            )
            more = (
                dict(
                    val_ndcg=0.5,
                    val_raw=0.5,
                    val_gain=rnd.gauss(0, 0.01),
                    val_gain_ci95=[-0.02, 0.02],
                    val_format_errors=0,
                )
                if step % 10 == 0
                else {}
            )
            file.write(
                json.dumps(
                    row | more | dict(timing_s=dict(sample=1.0, reward=0.1, train=1.0, step=2.2))
                )
                + "\n"
            )
    with gzip.open(folder / "rollouts.jsonl.gz", "wt", compresslevel=1, encoding="utf-8") as file:
        for step in range(1, steps + 1):
            for id, text in rnd.sample(train, PROMPTS):
                for sibling in range(SIBLINGS):
                    thought = " ".join(
                        rnd.choices(text.split() + ["about", "films", "ideas"], k=tokens // 2)
                    )
                    logp = [-round(rnd.expovariate(1), 6) for _ in range(tokens)]
                    reward = rnd.random()
                    file.write(
                        json.dumps(
                            dict(
                                step=step,
                                prompt=id,
                                sibling=sibling,
                                count=1,
                                text=f'{thought}</think><answer>{{"query": '
                                f'"{text} {rnd.randrange(10**6)}"}}</answer>',
                                finished=True,
                                reward=reward,
                                reward_terms=dict(ndcg=reward),
                                error=None,
                                advantage=rnd.gauss(0, 1),
                                prompt_ids=rnd.choices(range(300, 4000), k=64),
                                ids=rnd.choices(range(300, 4000), k=tokens),
                                sampler_logp=logp,
                                trainer_logp=logp,
                                ref_logp=logp,
                                old_logp=logp,
                                entropy=logp,
                            )
                        )
                        + "\n"
                    )
    (folder / "summary.json").write_text(
        json.dumps(dict(steps=steps, n_eval=len(test), unparsable_before=0, unparsable_after=0)),
        encoding="utf-8",
    )


def main() -> int:
    """Write the page, open it in a browser and print the bars."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=157)
    parser.add_argument("--tokens", type=int, default=512)
    args = parser.parse_args()
    if not installed():
        print("no browser on PATH; install chromium (apt-get install chromium)", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "run"
        quickstart = str(ROOT / "experiments/quickstart.yaml")
        files = [
            f"data.{name}={ROOT / path}"
            for name, path in vars(configs.load_config(quickstart, []).data).items()
            if str(path).startswith("experiments/")
        ]
        cfg = configs.load_config(
            quickstart,
            [
                *files,
                f"model.path={ROOT / 'experiments/policy'}",
                f"run.dir={folder}",
                f"train.steps={args.steps}",
                "log.tokens_every=1",
                "loss.kl_coef=0.01",
            ],
        )
        retriever, _ = build_retriever(cfg.retriever)(cfg.data.corpus, "stop", None, print)
        make_run(folder, cfg, retriever, args.steps, args.tokens)
        start = time.perf_counter()
        cpu = time.process_time()
        page = report.write_report([str(folder)], retriever=retriever)
        rollouts = args.steps * PROMPTS * SIBLINGS
        print(
            f"{rollouts:,} rollouts of {args.tokens} tokens, "
            f"{(folder / 'rollouts.jsonl.gz').stat().st_size / 1e6:.0f} MB: written in "
            f"{time.perf_counter() - start:.1f} s ({time.process_time() - cpu:.1f} s of CPU)"
        )
        with Browser(installed(), 600) as browser:
            browser.look(1280, 900, False)
            browser.call("Performance.enable", timeDomain="threadTicks")
            seconds = []
            busy = []
            for _ in range(3):
                browser.open(page.as_uri())
                seconds.append(browser.value(OPENED))
                busy.append(
                    next(
                        m["value"]
                        for m in browser.call("Performance.getMetrics")["metrics"]
                        if m["name"] == "TaskDuration"
                    )
                )
            complaints = browser.complaints()
            asked = {url for url in browser.requests() if not url.startswith("data:")} - {
                page.as_uri()
            }
        print(
            f"page of {page.stat().st_size:,} bytes, opened in "
            f"{', '.join(f'{s:.2f}' for s in seconds)} s "
            f"({', '.join(f'{s:.2f}' for s in busy)} s of its main thread's CPU time); "
            f"the browser reported {complaints or 'nothing'}"
        )
        bars = [
            dict(name=name, value=value, bar=bar, ok=value <= bar)
            for name, value, bar in (
                ("page, MB", round(page.stat().st_size / 1e6, 3), 5),
                ("opening, s", round(median(seconds), 3), 2),
                ("console messages", len(complaints), 0),
                ("requests beside the file", len(asked), 0),
            )
        ]
    print(json.dumps({"bars": bars}))
    return 0 if all(bar["ok"] for bar in bars) else 1


if __name__ == "__main__":
    sys.exit(main())
