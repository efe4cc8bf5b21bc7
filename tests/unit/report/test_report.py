"""The report: one file, its sections, hostile data that stays text, and a browser that opens it
without a complaint or a request.
"""

import functools
import gzip
import hashlib
import http.server
import json
import re
import shutil
import threading
from base64 import b64encode

import numpy as np
import pytest
import torch
from helpers.browser import Browser, installed
from helpers.tiny_world import jsonl, tiny_tokenizer, write_yaml

from recr1 import cli, report, train
from recr1.config.loader import load_config
from recr1.distributed import collectives as dist
from recr1.report import groups, ranking, record, rollouts
from recr1.tracking.versions import collect_versions
from recr1.training.launch import run_guarded
from recr1.utils.renamed import (
    RENAMED_METRICS,
    RENAMED_ROLLOUT_KEYS,
    RENAMED_SUMMARY_KEYS,
    rename_keys,
)

SECTIONS = ["overview", "curves", "rollouts", "recommendations", "audit", "groups", "configuration"]
EVIL = (
    '</script><img src=x onerror="window.hit=1">\x1b[31mred\u202e<!--<script>window.hit=1</script>'
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of four steps, two of them with tokens, with a reference and two optimizer
    steps per batch.
    """
    folder = tmp_path_factory.mktemp("report")
    path = write_yaml(
        folder,
        **{
            "train.steps": 4,
            "loss.kl_coef": 0.01,
            "train.num_mini_batches": 2,
            "log.tokens_every": 1,
        },
    )
    assert run_guarded(train.main, [path]) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def hostile(run, tmp_path_factory):
    """The same run with hostile text wherever data is text."""
    folder = tmp_path_factory.mktemp("hostile") / "run"
    shutil.copytree(run, folder)
    rows = [
        row
        | dict(
            prompt=row["prompt"] + EVIL,
            text=f"</think><answer>{json.dumps(dict(query=EVIL + ' lamp'))}</answer>",
            error=EVIL,
        )
        for row in jsonl(folder / "rollouts.jsonl.gz")
    ]
    (folder / "rollouts.jsonl.gz").write_bytes(
        gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode())
    )
    for name in ("eval_before.jsonl", "eval_after.jsonl"):
        rows = [
            row | dict(raw=f"{row['raw']} {EVIL}", rewrite=f"{EVIL} {row['rewrite']} \ud800")
            for row in jsonl(folder / name)
        ]
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    starts = json.loads((folder / "versions.json").read_text())
    (folder / "versions.json").write_text(json.dumps([starts[0] | dict(machine=EVIL)]))
    return folder


def content(path) -> dict:
    """The data of a page."""
    text = re.search(
        r'<script type="application/json" id="data">(.*?)</script>',
        path.read_text(encoding="utf-8"),
        re.DOTALL,
    )[1]
    assert text.isascii()
    assert not re.search("[<>&]", text)
    return json.loads(text)


def test_a_run_ends_with_its_report(run):
    page = content(run / "report.html")
    [mine] = page["runs"]
    assert mine["steps"] == 4
    assert mine["notes"] == []
    assert mine["rollouts"]["rows"] == len(jsonl(run / "rollouts.jsonl.gz"))
    summary = json.loads((run / "summary.json").read_text())
    assert mine["results"]["after_minus_raw"] == pytest.approx(
        [summary["gain"], *summary["gain_ci95"]]
    )
    assert mine["results"]["after_minus_before"] == pytest.approx(
        [summary["after_minus_before"], *summary["after_minus_before_ci95"]]
    )
    metrics = jsonl(run / "metrics.jsonl")
    assert mine["curves"]["reward"]["mean"] == pytest.approx(
        [row["reward"] for row in metrics], rel=1e-4
    )
    assert [e["step"] for e in mine["evaluations"]] == [2, 4]
    assert page["ranking"]["why"] == ""
    [start] = mine["versions"]
    assert start["packages"]["torch"] == torch.__version__
    assert start.keys() == collect_versions().keys()


def test_a_run_that_version_0_1_has_logged_gives_the_same_report(run, tmp_path):
    def restore(row: dict, names: dict[str, str]) -> dict:
        old_names = {new: old for old, new in names.items()}
        return rename_keys(row, old_names)

    old_run = tmp_path / "run"
    shutil.copytree(run, old_run)
    metrics = [restore(row, RENAMED_METRICS) for row in jsonl(run / "metrics.jsonl")]
    (old_run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
    rows = [restore(row, RENAMED_ROLLOUT_KEYS) for row in jsonl(run / "rollouts.jsonl.gz")]
    with gzip.open(old_run / "rollouts.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))
    summary = json.loads((run / "summary.json").read_text())
    (old_run / "summary.json").write_text(json.dumps(restore(summary, RENAMED_SUMMARY_KEYS)))
    assert metrics[0].keys() != jsonl(run / "metrics.jsonl")[0].keys()
    assert "adv" in rows[0]

    new_page = content(report.write_report([str(run)]))
    old_page = content(report.write_report([str(old_run)]))
    assert old_page["runs"] == new_page["runs"]


def test_tokens_are_the_log(run):
    """Pieces join to the text; ratio and clip by the definitions; the reference's log-probs are
    there.
    """
    [mine], logged = content(run / "report.html")["runs"], jsonl(run / "rollouts.jsonl.gz")
    shown = [r for phase in mine["rollouts"]["phases"] for r in phase["rollouts"]]
    assert {r["rank"] for r in shown} == {"best", "median", "worst"}
    tokenizer = tiny_tokenizer()
    for r in shown:
        [row] = [
            row
            for row in logged
            if (row["step"], row["prompt"], row["ids"]) == (r["step"], r["prompt"], r["ids"])
        ]
        assert "".join(r["pieces"]) == tokenizer.decode(
            r["ids"], clean_up_tokenization_spaces=False
        )
        assert r["prompt_text"] == tokenizer.decode(
            row["prompt_ids"], clean_up_tokenization_spaces=False
        )
        assert r["ref_logp"] == pytest.approx(row["ref_logp"], rel=1e-5)
        assert r["advantage"] == row["advantage"]
        assert r["ratio"] == [1.0] * len(r["ids"])
        assert not any(r["clipped"])
        group = [row for row in logged if (row["step"], row["prompt"]) == (r["step"], r["prompt"])]
        rewards = np.repeat([row["reward"] for row in group], [row["count"] for row in group])
        assert r["group"]["size"] == 4
        assert r["group"]["mean"] == pytest.approx(rewards.mean())
        assert r["group"]["std"] == pytest.approx(rewards.std(ddof=1))


@pytest.mark.parametrize(
    "kind, adv, want",
    [
        ("grpo", 1.0, [0, 0, 1]),
        ("grpo", -1.0, [1, 0, 0]),
        ("cispo", 1.0, [0, 0, 0]),
        ("reinforce", 1.0, [0, 0, 0]),
        ("gspo", 1.0, [0, 0, 0]),
    ],
)
def test_clipped_means_no_gradient(run, kind, adv, want):
    """Ratios .5, 1, 2 under clip .2."""
    config = load_config(
        str(run / "config.yaml"),
        [f"loss.kind={kind}", "loss.clip_ratio_low=0.2", "model.head=recompute"],
    )
    row = dict(
        prompt="q",
        prompt_ids=[7, 8],
        ids=[9, 10, 11],
        sampler_logp=[-1.0] * 3,
        finished=True,
        advantage=adv,
    )
    values = dict(old_logp=[-1.0] * 3, trainer_logp=[-1 + np.log(r) for r in (0.5, 1.0, 2.0)])
    found, of_text = rollouts.TokenView(config, None).find_clipped(row, values)
    assert found == [bool(w) for w in want]
    assert of_text == pytest.approx(1.0) if kind == "gspo" else of_text is None


def test_pieces_of_characters_spread_over_tokens(run):
    """Bytes of one character over several tokens, and bytes that never become one."""
    tokenizer = tiny_tokenizer()
    lens = rollouts.TokenView(load_config(str(run / "config.yaml"), []), tokenizer)
    ids = tokenizer("naïve 龍 café ユーザー")["input_ids"]
    for some in (ids, ids[:-1], ids[1:], ids[:1] + ids[-2:]):
        assert "".join(lens.split_text(some)) == tokenizer.decode(some)
        assert len(lens.split_text(some)) == len(some)
    assert "" in lens.split_text(ids)
    assert rollouts.TokenView(lens.config, None).split_text([3, 4]) == ["[3]", "[4]"]


def test_best_median_and_worst():
    """By reward, then advantage; the median by rollouts, not by rows; rows without an advantage
    only where there are no others.
    """
    rows = [
        rollouts.TracedRollout(reward, adv, -i, count, 1, f"q{i}")
        for i, (reward, adv, count) in enumerate(
            [
                (0.1, -1, 1),
                (0.2, -1, 1),
                (0.5, 1, 9),
                (0.9, 1, 1),
                (0.9, 2, 1),
                (0.8, 0, 9),
                (0.3, -1, 1),
            ]
        )
    ]
    picked = rollouts.choose_rollouts(rows)
    assert [(rank, row.prompt) for rank, row in picked] == [
        ("best", "q4"),
        ("best", "q3"),
        ("median", "q2"),
        ("median", "q6"),
        ("worst", "q0"),
        ("worst", "q1"),
    ]
    alone = rollouts.TracedRollout(0.8, 0, -1, 1, 1, "a")
    assert rollouts.choose_rollouts([alone]) == [("best", alone)]
    assert rollouts.choose_rollouts([]) == []


def test_what_a_rewrite_did():
    assert [
        groups.classify_rewrite("star wars", r)
        for r in (
            None,
            "Star wars",
            "wars star",
            "star",
            "star wars wars",
            "star star",
            "star trek",
            "",
        )
    ] == [
        "no answer",
        "unchanged",
        "other order",
        "left words out",
        "repeated words",
        "left out and repeated",
        "brought new words",
        "left words out",
    ]
    raw = np.array([0.0, 0.5, 1.0, 1.0])
    after = np.array([0.5, 0.5, 0.5, 1.0])
    tables = groups.describe_groups(
        list("abcd"),
        ["x", "x y", "x y", "z y w"],
        ["x x", "x y", "y", None],
        raw,
        dict(raw=raw, after=after),
        "after",
    )
    [whole], bands = (
        tables[0]["rows"],
        {
            row["name"]: row
            for row in next(t for t in tables if t["title"] == "NDCG of the raw query")["rows"]
        },
    )
    assert (whole["n"], whole["helped"], whole["hurt"], whole["change"][0]) == (4, 1, 1, 0.0)
    assert bands["1"]["n"] == 2
    assert bands["0"]["change"][0] == 0.5


def test_queries_chosen_by_rule():
    picks = ranking.choose_queries(
        np.array([0.0, 0.3, -0.2, 0.0, 0.1]), [True, True, True, False, True]
    )
    assert picks == [
        ("largest gains", 1),
        ("largest gains", 4),
        ("largest losses", 2),
        ("another answer, same score", 0),
    ]


def test_lists_are_the_retrievers(run):
    """Places, gains and terms; what the terms add up to is the score."""
    shown = content(run / "report.html")["ranking"]
    config = load_config(str(run / "config.yaml"), [])
    search = ranking.open_search(config, run)
    assert shown["queries"]
    assert shown["explained"]
    for q in shown["queries"]:
        for side in (0, 1):
            rows, scores = search.retriever.search([q["texts"][side]], 10)
            best = {
                d["places"][side]: d
                for d in q["documents"]
                if d["places"][side] and d["places"][side] <= 10
            }
            assert [best[i + 1]["id"] for i in range(len(best))] == [
                search.retriever.doc_ids[r] for r in rows[0].tolist() if r >= 0
            ]
            for place, d in best.items():
                assert sum(t[side + 1] for t in d["terms"]) == pytest.approx(
                    scores[0][place - 1], rel=1e-3
                )
                assert d["gain"] == search.qrels[q["id"]].get(d["id"], 0)


def test_marks():
    rows = [
        dict(
            step=i,
            frac_reward_zero_std=float(i > 2),
            clip_ratio=0.02 if i == 5 else 0.001,
            skipped_steps=int(i > 6),
            grad_norm=float("nan"),
        )
        for i in range(1, 9)
    ]
    assert [(m["kind"], m["step"]) for m in record.list_marks(rows)] == [
        ("frac_reward_zero_std", 3),
        ("clip_spike", 5),
        ("skipped", 7),
    ]
    assert "grad_norm" not in record.make_curves(rows)
    assert record.make_curves(rows * 200)["per"] == 4


def test_a_run_that_is_not_finished(run, tmp_path):
    """No scores after training, a torn log, no model, index and corpus gone: the page says so."""
    for name in ("config.yaml", "metrics.jsonl", "eval_before.jsonl"):
        shutil.copy(run / name, tmp_path)
    raw = (run / "rollouts.jsonl.gz").read_bytes()
    (tmp_path / "rollouts.jsonl.gz").write_bytes(raw[: len(raw) - 20])
    with open(tmp_path / "metrics.jsonl", "a") as f:
        f.write('{"step": 5, "rew')
    [mine] = content(report.write_report([str(tmp_path)]))["runs"]
    assert "torn" in mine["rollouts"]["note"]
    assert mine["rollouts"]["rows"] > 0
    assert any("not finished" in n for n in mine["notes"])
    assert any("last line" in n for n in mine["notes"])
    config = load_config(str(run / "config.yaml"), [f"retriever.index_dir={tmp_path / 'nowhere'}"])
    assert "no longer" in ranking.open_search(config, tmp_path)


@pytest.mark.parametrize(
    "spoil, says",
    [
        (lambda d: (d / "config.yaml").unlink(), "no config.yaml"),
        (lambda d: (d / "metrics.jsonl").unlink(), "not finished a step"),
        (lambda d: (d / "metrics.jsonl").write_text("{}\n"), "without its step"),
        (lambda d: (d / "metrics.jsonl").write_text("x\n{}\n"), "metrics.jsonl:1"),
        (
            lambda d: (d / "eval_after.jsonl").write_text(
                '{"id": "a", "raw": "b", "rewrite": "b", "ndcg_raw": 0, "ndcg": "x"}\n'
            ),
            "eval_after.jsonl:1",
        ),
        (
            lambda d: (d / "eval_after.jsonl").write_text(
                '{"id": "a", "raw": "b", "rewrite": "b", "ndcg_raw": 0, "ndcg": 1}\n'
            ),
            "not those of eval_before",
        ),
        (
            lambda d: (d / "rollouts.jsonl.gz").write_bytes(gzip.compress(b"[]\n")),
            "rollouts.jsonl.gz:1",
        ),
    ],
)
def test_damaged_runs_are_refused_in_one_line(spoil, says, run, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "run")
    spoil(tmp_path / "run")
    assert run_guarded(cli.main, ["report", str(tmp_path / "run")]) == 2
    err = capsys.readouterr().err
    assert says in err
    assert err.count("\n") == 1
    assert "Traceback" not in err


def test_a_report_never_costs_the_run(run, tmp_path, monkeypatch):
    said = report.write_report_at_end(tmp_path, None, None)
    assert "the run is whole" in said
    assert "\n" not in said
    monkeypatch.setattr(report, "AT_ONCE", 10)
    monkeypatch.setattr(dist, "world_size", lambda: 2)
    assert "recr1 report" in report.write_report_at_end(run, None, None)


def test_hostile_text_cannot_leave_its_place(hostile):
    """In the file: no < of the data, one script with the hash that the policy names."""
    text = report.write_report([str(hostile)]).read_text(encoding="utf-8")
    script = re.search(r"<script>(.*?)</script>", text, re.DOTALL)[1]
    assert (
        f"script-src 'sha256-{b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
        in text
    )
    assert text.count("</script>") == 2
    assert "onerror" in text
    assert "<img" not in text
    assert "\x1b" not in text
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new "
        r"Function|fetch\(|XMLHttpRequest|https?://(?!www\.w3\.org/2000/svg)",
        text,
    )
    assert content(hostile / "report.html")["ranking"]["queries"][0]["raw"].endswith(EVIL)


@pytest.fixture(scope="module")
def browser():
    path = installed()
    if path is None:
        pytest.skip(
            "NOT TESTED: no browser on PATH; install chromium (apt-get install chromium) to have "
            "the report opened in one"
        )
    with Browser(path) as found:
        yield found


def opened(browser, path) -> list[str]:
    """The page's sections, after checks that every opening must pass: nothing asked for but the
    file, nothing reported, all of it drawn.
    """
    browser.events.clear()
    browser.open(path.as_uri())
    browser.value("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
    assert browser.complaints() == []
    assert [url for url in browser.requests() if not url.startswith("data:")] == [path.as_uri()]
    assert browser.value("window.hit") is None
    assert browser.value("document.querySelectorAll('img, iframe, object, embed').length") == 0
    text = browser.value("document.body.innerText")
    assert not re.search(r"\bundefined\b|\bNaN\b|\[object ", text), text[:2000]
    return browser.value("[...document.querySelectorAll('section')].map((s) => s.id)")


def test_a_browser_opens_it(run, browser):
    browser.call(
        "Network.emulateNetworkConditions",
        offline=True,
        latency=0,
        downloadThroughput=-1,
        uploadThroughput=-1,
    )
    for dark, width in ((False, 1280), (True, 1280), (False, 390)):
        browser.look(width, 900, dark, phone=width < 500)
        assert opened(browser, run / "report.html") == SECTIONS
        assert browser.value("document.documentElement.scrollWidth") <= width
        assert browser.value("document.querySelectorAll('svg.plot .line').length") >= 9
        assert browser.value("document.querySelectorAll('.tokens .token').length") > 20
        light = browser.value("getComputedStyle(document.body).backgroundColor")
        browser.value(
            "[...document.querySelectorAll('header .choice button')].find((b) => b.textContent "
            f"=== '{'light' if dark else 'dark'}').click()"
        )
        assert browser.value("getComputedStyle(document.body).backgroundColor") != light


def test_the_keyboard_reaches_everything(run, browser):
    """Tab stops at every chart, one token of each rollout, one query; the arrow keys go on from
    there.
    """
    browser.look(1280, 900, False)
    opened(browser, run / "report.html")

    def press(key):
        for kind in ("keyDown", "keyUp"):
            browser.call(
                "Input.dispatchKeyEvent",
                type=kind,
                key=key,
                code=key,
                windowsVirtualKeyCode={"Tab": 9, "ArrowRight": 39, "ArrowDown": 40, "Home": 36}[
                    key
                ],
            )

    browser.value("document.querySelector('svg.plot').focus()")
    press("Home")
    assert (
        browser.value("document.querySelector('svg.plot .cursor').getAttribute('visibility')")
        == "visible"
    )
    first = browser.value("document.querySelector('.legend .value').textContent")
    press("ArrowRight")
    assert browser.value("document.querySelector('.legend .value').textContent") != first
    browser.value("document.querySelector('.tokens .token').focus()")
    press("ArrowRight")
    assert browser.value(
        "document.activeElement === document.querySelectorAll('.tokens .token')[1] && "
        "document.activeElement.classList.contains('read')"
    )
    assert browser.value("document.querySelector('.readout').innerText.includes('log p reference')")
    browser.value("document.querySelector('.queries button').focus()")
    press("ArrowDown")
    assert (
        browser.value(
            "document.querySelectorAll('.queries button')[1].getAttribute('aria-pressed')"
        )
        == "true"
    )
    reached = set()
    browser.value("document.activeElement.blur()")
    for _ in range(120):
        press("Tab")
        reached.add(
            browser.value(
                "document.activeElement.closest('section')?.id || document.activeElement.tagName"
            )
        )
    assert reached >= set(SECTIONS) - {"overview"}


def test_hostile_text_stays_text(hostile, browser):
    browser.look(1280, 900, False)
    path = report.write_report([str(hostile)])
    assert opened(browser, path) == SECTIONS
    assert browser.value("document.documentElement.scrollWidth") <= 1280
    text = browser.value("document.body.textContent")
    assert "</script><img src=x onerror=" in text
    assert "\\x1b[31mred\\u202e" in text
    assert "\x1b" not in browser.value("document.querySelector('main').textContent")
    assert "\\ud800" in browser.value("document.querySelector('#recommendations').textContent")
    for button in range(
        browser.value("document.querySelectorAll('#audit .choice button, .queries button').length")
    ):
        browser.value(
            f"document.querySelectorAll('#audit .choice button, .queries button')[{button}].click()"
        )
    assert browser.complaints() == []
    assert browser.value("window.hit") is None


def test_two_runs_compared(run, hostile, browser, tmp_path):
    browser.look(1280, 900, False)
    other = tmp_path / "other"
    shutil.copytree(run, other)
    rows = jsonl(other / "eval_after.jsonl")
    rows[0] |= dict(ndcg=1.0, rewrite="red lamp")
    (other / "eval_after.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert (
        run_guarded(cli.main, ["report", str(run), str(other), "--out", str(tmp_path / "two.html")])
        == 0
    )
    page = content(tmp_path / "two.html")
    mine = jsonl(run / "eval_after.jsonl")
    assert page["compare"]["queries"] == 12
    assert page["compare"]["difference"][0] == pytest.approx(
        np.mean([b["ndcg"] - a["ndcg"] for a, b in zip(mine, rows)])
    )
    assert opened(browser, tmp_path / "two.html") == SECTIONS
    # no query in common
    assert (
        run_guarded(
            cli.main, ["report", str(run), str(hostile), "--out", str(tmp_path / "three.html")]
        )
        == 0
    )
    assert content(tmp_path / "three.html")["compare"]["queries"] == 0
    assert opened(browser, tmp_path / "three.html") == SECTIONS


def test_behind_a_server_it_asks_for_nothing_more(run, browser):
    """Not even an icon."""
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            asked.append(self.path)

    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Handler, directory=run)
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        browser.call(
            "Network.emulateNetworkConditions",
            offline=False,
            latency=0,
            downloadThroughput=-1,
            uploadThroughput=-1,
        )
        browser.open(f"http://127.0.0.1:{server.server_port}/report.html")
        browser.value("new Promise((done) => setTimeout(done, 300))")
        assert asked == ["/report.html"]
    finally:
        server.shutdown()
        server.server_close()
