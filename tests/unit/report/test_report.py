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
# What no report may have: a way from text to markup or code, or to another address.
FORBIDDEN = (
    r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new "
    r"Function|fetch\(|XMLHttpRequest|https?://(?!www\.w3\.org/2000/svg)"
)


def write_rows(path, rows: list[dict]) -> None:
    """Write rows as JSON lines, gzipped where the file's name ends in .gz."""
    lines = [json.dumps(row) + "\n" for row in rows]
    data = "".join(lines).encode()
    if path.suffix == ".gz":
        data = gzip.compress(data)
    path.write_bytes(data)


def content(path) -> dict:
    """Read the data of a page."""
    page = path.read_text(encoding="utf-8")
    script = r'<script type="application/json" id="data">(.*?)</script>'
    text = re.search(script, page, re.DOTALL)[1]
    assert text.isascii()
    assert not re.search("[<>&]", text)
    return json.loads(text)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Make a finished run of four steps, two of them with tokens, with a reference and two
    optimizer steps per batch.
    """
    folder = tmp_path_factory.mktemp("report")
    settings = {
        "train.steps": 4,
        "loss.kl_coef": 0.01,
        "train.num_mini_batches": 2,
        "log.tokens_every": 1,
    }
    path = write_yaml(folder, **settings)
    assert run_guarded(train.main, [path]) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def hostile(run, tmp_path_factory):
    """Make the same run with hostile text wherever data is text."""
    folder = tmp_path_factory.mktemp("hostile") / "run"
    shutil.copytree(run, folder)
    poison_rollouts(folder / "rollouts.jsonl.gz")
    poison_evaluation(folder / "eval_before.jsonl")
    poison_evaluation(folder / "eval_after.jsonl")
    poison_versions(folder / "versions.json")
    return folder


def poison_rollouts(path) -> None:
    rows = jsonl(path)
    answer = json.dumps(dict(query=EVIL + " lamp"))
    for row in rows:
        row["prompt"] += EVIL
        row["text"] = f"</think><answer>{answer}</answer>"
        row["error"] = EVIL
    write_rows(path, rows)


def poison_evaluation(path) -> None:
    rows = jsonl(path)
    for row in rows:
        row["raw"] = f"{row['raw']} {EVIL}"
        row["rewrite"] = f"{EVIL} {row['rewrite']} \ud800"
    write_rows(path, rows)


def poison_versions(path) -> None:
    first_start = json.loads(path.read_text())[0]
    first_start["machine"] = EVIL
    path.write_text(json.dumps([first_start]))


# ---- The data of a page --------------------------------------------------------------------------


def test_a_run_ends_with_its_report(run):
    page = content(run / "report.html")
    summary = json.loads((run / "summary.json").read_text())
    metrics = jsonl(run / "metrics.jsonl")
    logged_rollouts = jsonl(run / "rollouts.jsonl.gz")

    [page_run] = page["runs"]
    assert page_run["steps"] == 4
    assert page_run["notes"] == []
    assert page_run["rollouts"]["rows"] == len(logged_rollouts)

    results = page_run["results"]
    over_raw = [summary["gain"], *summary["gain_ci95"]]
    over_before = [summary["after_minus_before"], *summary["after_minus_before_ci95"]]
    assert results["after_minus_raw"] == pytest.approx(over_raw)
    assert results["after_minus_before"] == pytest.approx(over_before)

    reward_curve = page_run["curves"]["reward"]
    logged_rewards = [row["reward"] for row in metrics]
    assert reward_curve["mean"] == pytest.approx(logged_rewards, rel=1e-4)

    evaluated_steps = [evaluation["step"] for evaluation in page_run["evaluations"]]
    assert evaluated_steps == [2, 4]
    assert page["ranking"]["why"] == ""

    [start] = page_run["versions"]
    versions = collect_versions()
    assert start["packages"]["torch"] == torch.__version__
    assert start.keys() == versions.keys()


def restore_names(row: dict, names: dict[str, str]) -> dict:
    """Give a row the names that version 0.1 logged."""
    old_names = {new: old for old, new in names.items()}
    return rename_keys(row, old_names)


def test_a_run_that_version_0_1_has_logged_gives_the_same_report(run, tmp_path):
    old_run = tmp_path / "run"
    shutil.copytree(run, old_run)
    new_metrics = jsonl(run / "metrics.jsonl")
    new_rollouts = jsonl(run / "rollouts.jsonl.gz")
    new_summary = json.loads((run / "summary.json").read_text())

    old_metrics = [restore_names(row, RENAMED_METRICS) for row in new_metrics]
    old_rollouts = [restore_names(row, RENAMED_ROLLOUT_KEYS) for row in new_rollouts]
    old_summary = restore_names(new_summary, RENAMED_SUMMARY_KEYS)
    write_rows(old_run / "metrics.jsonl", old_metrics)
    write_rows(old_run / "rollouts.jsonl.gz", old_rollouts)
    (old_run / "summary.json").write_text(json.dumps(old_summary))
    assert old_metrics[0].keys() != new_metrics[0].keys()
    assert "adv" in old_rollouts[0]

    new_page = content(report.write_report([str(run)]))
    old_page = content(report.write_report([str(old_run)]))
    assert old_page["runs"] == new_page["runs"]


def list_shown_rollouts(page: dict) -> list[dict]:
    """List the rollouts of a page of one run."""
    [page_run] = page["runs"]
    shown = []
    for phase in page_run["rollouts"]["phases"]:
        shown += phase["rollouts"]
    return shown


def list_group(rows: list[dict], rollout: dict) -> list[dict]:
    """List the logged rows of the rollout's group."""
    group = []
    for row in rows:
        same_step = row["step"] == rollout["step"]
        same_prompt = row["prompt"] == rollout["prompt"]
        if same_step and same_prompt:
            group.append(row)
    return group


def test_tokens_are_the_log(run):
    """Pieces join to the text; ratio and clip by the definitions; the reference's log-probs are
    there.
    """
    page = content(run / "report.html")
    logged = jsonl(run / "rollouts.jsonl.gz")
    tokenizer = tiny_tokenizer()
    decode = functools.partial(tokenizer.decode, clean_up_tokenization_spaces=False)

    shown = list_shown_rollouts(page)
    ranks = {rollout["rank"] for rollout in shown}
    assert ranks == {"best", "median", "worst"}

    for rollout in shown:
        ids = rollout["ids"]
        group = list_group(logged, rollout)
        [row] = [row for row in group if row["ids"] == ids]
        assert "".join(rollout["pieces"]) == decode(ids)
        assert rollout["prompt_text"] == decode(row["prompt_ids"])
        assert rollout["ref_logp"] == pytest.approx(row["ref_logp"], rel=1e-5)
        assert rollout["advantage"] == row["advantage"]
        assert rollout["ratio"] == [1.0] * len(ids)
        assert not any(rollout["clipped"])

        rewards = []
        for sibling in group:
            rewards += [sibling["reward"]] * sibling["count"]
        assert rollout["group"]["size"] == 4
        assert rollout["group"]["mean"] == pytest.approx(np.mean(rewards))
        assert rollout["group"]["std"] == pytest.approx(np.std(rewards, ddof=1))


@pytest.mark.parametrize(
    "kind, adv, want",
    [
        ("grpo", 1.0, [False, False, True]),
        ("grpo", -1.0, [True, False, False]),
        ("cispo", 1.0, [False, False, False]),
        ("reinforce", 1.0, [False, False, False]),
        ("gspo", 1.0, [False, False, False]),
    ],
)
def test_clipped_means_no_gradient(run, kind, adv, want):
    """Ratios .5, 1, 2 under clip .2."""
    overrides = [f"loss.kind={kind}", "loss.clip_ratio_low=0.2", "model.head=recompute"]
    config = load_config(str(run / "config.yaml"), overrides)
    row = dict(
        prompt="q",
        prompt_ids=[7, 8],
        ids=[9, 10, 11],
        sampler_logp=[-1.0] * 3,
        finished=True,
        advantage=adv,
    )
    trainer_logp = np.log([0.5, 1.0, 2.0]) - 1
    values = dict(old_logp=[-1.0] * 3, trainer_logp=list(trainer_logp))

    view = rollouts.TokenView(config, None)
    clipped, ratio_of_text = view.find_clipped(row, values)

    assert clipped == want
    if kind == "gspo":
        assert ratio_of_text == pytest.approx(1.0)
    else:
        assert ratio_of_text is None


def test_pieces_of_characters_spread_over_tokens(run):
    """Bytes of one character over several tokens, and bytes that never become one."""
    tokenizer = tiny_tokenizer()
    config = load_config(str(run / "config.yaml"), [])
    view = rollouts.TokenView(config, tokenizer)
    ids = tokenizer("naïve 龍 café ユーザー")["input_ids"]

    for some_ids in (ids, ids[:-1], ids[1:], ids[:1] + ids[-2:]):
        pieces = view.split_text(some_ids)
        assert "".join(pieces) == tokenizer.decode(some_ids)
        assert len(pieces) == len(some_ids)

    assert "" in view.split_text(ids)
    view_of_numbers = rollouts.TokenView(config, None)
    assert view_of_numbers.split_text([3, 4]) == ["[3]", "[4]"]


# reward, advantage, count of the prompts q0, q1, ...
TRACED = [
    (0.1, -1, 1),
    (0.2, -1, 1),
    (0.5, 1, 9),
    (0.9, 1, 1),
    (0.9, 2, 1),
    (0.8, 0, 9),
    (0.3, -1, 1),
]
CHOSEN = [
    ("best", "q4"),
    ("best", "q3"),
    ("median", "q2"),
    ("median", "q6"),
    ("worst", "q0"),
    ("worst", "q1"),
]


def test_best_median_and_worst():
    """By reward, then advantage; the median by rollouts, not by rows; rows without an advantage
    only where there are no others.
    """
    rows = []
    for i, (reward, advantage, count) in enumerate(TRACED):
        row = rollouts.TracedRollout(reward, advantage, -i, count, 1, f"q{i}")
        rows.append(row)

    chosen = rollouts.choose_rollouts(rows)

    names = [(rank, row.prompt) for rank, row in chosen]
    assert names == CHOSEN
    alone = rollouts.TracedRollout(0.8, 0, -1, 1, 1, "a")
    assert rollouts.choose_rollouts([alone]) == [("best", alone)]
    assert rollouts.choose_rollouts([]) == []


# rewrite of "star wars" -> what it did
REWRITES = {
    None: "no answer",
    "Star wars": "unchanged",
    "wars star": "other order",
    "star": "left words out",
    "star wars wars": "repeated words",
    "star star": "left out and repeated",
    "star trek": "brought new words",
    "": "left words out",
}


def test_what_a_rewrite_did():
    for rewrite, want in REWRITES.items():
        assert groups.classify_rewrite("star wars", rewrite) == want

    ids = ["a", "b", "c", "d"]
    queries = ["x", "x y", "x y", "z y w"]
    rewrites = ["x x", "x y", "y", None]
    raw = np.array([0.0, 0.5, 1.0, 1.0])
    after = np.array([0.5, 0.5, 0.5, 1.0])
    scores = dict(raw=raw, after=after)
    tables = groups.describe_groups(ids, queries, rewrites, raw, scores, "after")

    [all_queries] = tables[0]["rows"]
    assert all_queries["n"] == 4
    assert all_queries["helped"] == 1
    assert all_queries["hurt"] == 1
    assert all_queries["change"][0] == 0.0

    by_title = {table["title"]: table for table in tables}
    bands = by_title["NDCG of the raw query"]["rows"]
    by_name = {band["name"]: band for band in bands}
    assert by_name["1"]["n"] == 2
    assert by_name["0"]["change"][0] == 0.5


def test_queries_chosen_by_rule():
    changes = np.array([0.0, 0.3, -0.2, 0.0, 0.1])
    is_another_answer = [True, True, True, False, True]

    chosen = ranking.choose_queries(changes, is_another_answer)

    assert chosen == [
        ("largest gains", 1),
        ("largest gains", 4),
        ("largest losses", 2),
        ("another answer, same score", 0),
    ]


def check_list(query: dict, side: int, search) -> None:
    """Check one list of a query, raw or rewritten, against the retriever's own search."""
    retriever = search.retriever
    rows, scores = retriever.search([query["texts"][side]], 10)
    by_place = {}
    for document in query["documents"]:
        place = document["places"][side]
        if place and place <= 10:
            by_place[place] = document

    want_ids = [retriever.doc_ids[row] for row in rows[0].tolist() if row >= 0]
    places = range(1, len(by_place) + 1)
    actual_ids = [by_place[place]["id"] for place in places]
    assert actual_ids == want_ids

    judged = search.qrels[query["id"]]
    for place, document in by_place.items():
        terms = [term[side + 1] for term in document["terms"]]
        assert sum(terms) == pytest.approx(scores[0][place - 1], rel=1e-3)
        assert document["gain"] == judged.get(document["id"], 0)


def test_lists_are_the_retrievers(run):
    """Places, gains and terms; what the terms add up to is the score."""
    shown = content(run / "report.html")["ranking"]
    config = load_config(str(run / "config.yaml"), [])
    search = ranking.open_search(config, run)

    assert shown["queries"]
    assert shown["explained"]
    for query in shown["queries"]:
        check_list(query, 0, search)
        check_list(query, 1, search)


def test_marks():
    rows = []
    for step in range(1, 9):
        row = dict(
            step=step,
            frac_reward_zero_std=float(step > 2),
            clip_ratio=0.001,
            skipped_steps=int(step > 6),
            grad_norm=float("nan"),
        )
        rows.append(row)
    rows[4]["clip_ratio"] = 0.02  # of step 5

    marks = record.list_marks(rows)

    places = [(mark["kind"], mark["step"]) for mark in marks]
    assert places == [("frac_reward_zero_std", 3), ("clip_spike", 5), ("skipped", 7)]
    assert "grad_norm" not in record.make_curves(rows)
    many_rows = rows * 200
    assert record.make_curves(many_rows)["per"] == 4


# ---- Runs that are not whole ---------------------------------------------------------------------


def test_a_run_that_is_not_finished(run, tmp_path):
    """No scores after training, a torn log, no model, index and corpus gone: the page says so."""
    for name in ("config.yaml", "metrics.jsonl", "eval_before.jsonl"):
        shutil.copy(run / name, tmp_path)
    log = (run / "rollouts.jsonl.gz").read_bytes()
    (tmp_path / "rollouts.jsonl.gz").write_bytes(log[:-20])
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "rew')

    [page_run] = content(report.write_report([str(tmp_path)]))["runs"]

    assert "torn" in page_run["rollouts"]["note"]
    assert page_run["rollouts"]["rows"] > 0
    notes = "\n".join(page_run["notes"])
    assert "not finished" in notes
    assert "last line" in notes
    overrides = [f"retriever.index_dir={tmp_path / 'nowhere'}"]
    config = load_config(str(run / "config.yaml"), overrides)
    assert "no longer" in ranking.open_search(config, tmp_path)


SCORE_IS_TEXT = b'{"id": "a", "raw": "b", "rewrite": "b", "ndcg_raw": 0, "ndcg": "x"}\n'
ANOTHER_QUERY = b'{"id": "a", "raw": "b", "rewrite": "b", "ndcg_raw": 0, "ndcg": 1}\n'
# what the refusal says -> file, and what it holds (None: it is gone)
DAMAGES = {
    "no config.yaml": ("config.yaml", None),
    "not finished a step": ("metrics.jsonl", None),
    "without its step": ("metrics.jsonl", b"{}\n"),
    "metrics.jsonl:1": ("metrics.jsonl", b"x\n{}\n"),
    "eval_after.jsonl:1": ("eval_after.jsonl", SCORE_IS_TEXT),
    "not those of eval_before": ("eval_after.jsonl", ANOTHER_QUERY),
    "rollouts.jsonl.gz:1": ("rollouts.jsonl.gz", gzip.compress(b"[]\n")),
}


@pytest.mark.parametrize("says", DAMAGES)
def test_damaged_runs_are_refused_in_one_line(says, run, tmp_path, capsys):
    name, data = DAMAGES[says]
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    if data is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(data)

    assert run_guarded(cli.main, ["report", str(folder)]) == 2

    errors = capsys.readouterr().err
    assert says in errors
    assert errors.count("\n") == 1
    assert "Traceback" not in errors


def test_a_report_never_costs_the_run(run, tmp_path, monkeypatch):
    message = report.write_report_at_end(tmp_path, None, None)
    assert "the run is whole" in message
    assert "\n" not in message

    monkeypatch.setattr(report, "AT_ONCE", 10)
    monkeypatch.setattr(dist, "world_size", lambda: 2)
    message = report.write_report_at_end(run, None, None)
    assert "recr1 report" in message


def test_hostile_text_cannot_leave_its_place(hostile):
    """In the file: no < of the data, one script with the hash that the policy names."""
    page = report.write_report([str(hostile)])
    text = page.read_text(encoding="utf-8")

    script = re.search(r"<script>(.*?)</script>", text, re.DOTALL)[1]
    digest = hashlib.sha256(script.encode()).digest()
    encoded_digest = b64encode(digest).decode()
    assert f"script-src 'sha256-{encoded_digest}'" in text
    assert text.count("</script>") == 2
    assert "onerror" in text
    assert "<img" not in text
    assert "\x1b" not in text
    assert not re.search(FORBIDDEN, text)

    first_query = content(page)["ranking"]["queries"][0]
    assert first_query["raw"].endswith(EVIL)


# ---- In a browser --------------------------------------------------------------------------------

DRAWN = "new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))"
EMBEDDED = "document.querySelectorAll('img, iframe, object, embed').length"
PAGE_WIDTH = "document.documentElement.scrollWidth"
BACKGROUND = "getComputedStyle(document.body).backgroundColor"
CHART_VALUE = "document.querySelector('.legend .value').textContent"
CURSOR = "document.querySelector('svg.plot .cursor').getAttribute('visibility')"
SECOND_TOKEN_IS_READ = (
    "document.activeElement === document.querySelectorAll('.tokens .token')[1] && "
    "document.activeElement.classList.contains('read')"
)
SECOND_QUERY = "document.querySelectorAll('.queries button')[1].getAttribute('aria-pressed')"
READOUT = "document.querySelector('.readout').innerText.includes('log p reference')"
FOCUSED_SECTION = "document.activeElement.closest('section')?.id || document.activeElement.tagName"
CHOICES = "document.querySelectorAll('#audit .choice button, .queries button')"
KEY_CODES = {"Tab": 9, "ArrowRight": 39, "ArrowDown": 40, "Home": 36}


@pytest.fixture(scope="module")
def browser():
    path = installed()
    if path is None:
        pytest.skip(
            "NOT TESTED: no browser on PATH; install chromium (apt-get install chromium) to have "
            "the report opened in one"
        )
    with Browser(path) as tab:
        yield tab


def set_network(browser, offline: bool) -> None:
    browser.call(
        "Network.emulateNetworkConditions",
        offline=offline,
        latency=0,
        downloadThroughput=-1,
        uploadThroughput=-1,
    )


def open_page(browser, path) -> list[str]:
    """Open a page and list its sections, after checks that every opening must pass: nothing asked
    for but the file, nothing reported, all of it drawn.
    """
    browser.events.clear()
    browser.open(path.as_uri())
    browser.value(DRAWN)

    assert browser.complaints() == []
    addresses = [url for url in browser.requests() if not url.startswith("data:")]
    assert addresses == [path.as_uri()]
    assert browser.value("window.hit") is None
    assert browser.value(EMBEDDED) == 0
    text = browser.value("document.body.innerText")
    assert not re.search(r"\bundefined\b|\bNaN\b|\[object ", text), text[:2000]
    return browser.value("[...document.querySelectorAll('section')].map((s) => s.id)")


def choose_theme(browser, theme: str) -> None:
    """Click on the button that says light or dark."""
    buttons = "[...document.querySelectorAll('header .choice button')]"
    browser.value(f"{buttons}.find((b) => b.textContent === '{theme}').click()")


def test_a_browser_opens_it(run, browser):
    set_network(browser, offline=True)
    for dark, width in ((False, 1280), (True, 1280), (False, 390)):
        browser.look(width, 900, dark, phone=width < 500)
        assert open_page(browser, run / "report.html") == SECTIONS
        assert browser.value(PAGE_WIDTH) <= width
        assert browser.value("document.querySelectorAll('svg.plot .line').length") >= 9
        assert browser.value("document.querySelectorAll('.tokens .token').length") > 20

        background = browser.value(BACKGROUND)
        other_theme = "light" if dark else "dark"
        choose_theme(browser, other_theme)
        assert browser.value(BACKGROUND) != background


def press(browser, key: str) -> None:
    """Press a key and let it go."""
    for kind in ("keyDown", "keyUp"):
        browser.call(
            "Input.dispatchKeyEvent",
            type=kind,
            key=key,
            code=key,
            windowsVirtualKeyCode=KEY_CODES[key],
        )


def test_the_keyboard_reaches_everything(run, browser):
    """Tab stops at every chart, one token of each rollout, one query; the arrow keys go on from
    there.
    """
    browser.look(1280, 900, False)
    open_page(browser, run / "report.html")

    # in a chart
    browser.value("document.querySelector('svg.plot').focus()")
    press(browser, "Home")
    assert browser.value(CURSOR) == "visible"
    first_value = browser.value(CHART_VALUE)
    press(browser, "ArrowRight")
    assert browser.value(CHART_VALUE) != first_value

    # in a rollout's tokens
    browser.value("document.querySelector('.tokens .token').focus()")
    press(browser, "ArrowRight")
    assert browser.value(SECOND_TOKEN_IS_READ)
    assert browser.value(READOUT)

    # in the list of queries
    browser.value("document.querySelector('.queries button').focus()")
    press(browser, "ArrowDown")
    assert browser.value(SECOND_QUERY) == "true"

    # from section to section
    reached = set()
    browser.value("document.activeElement.blur()")
    for _ in range(120):
        press(browser, "Tab")
        reached.add(browser.value(FOCUSED_SECTION))
    assert reached >= set(SECTIONS) - {"overview"}


def test_hostile_text_stays_text(hostile, browser):
    browser.look(1280, 900, False)
    path = report.write_report([str(hostile)])

    assert open_page(browser, path) == SECTIONS
    assert browser.value(PAGE_WIDTH) <= 1280
    text = browser.value("document.body.textContent")
    assert "</script><img src=x onerror=" in text
    assert "\\x1b[31mred\\u202e" in text
    main_text = browser.value("document.querySelector('main').textContent")
    assert "\x1b" not in main_text
    recommendations = browser.value("document.querySelector('#recommendations').textContent")
    assert "\\ud800" in recommendations

    for button in range(browser.value(f"{CHOICES}.length")):
        browser.value(f"{CHOICES}[{button}].click()")
    assert browser.complaints() == []
    assert browser.value("window.hit") is None


def compare_runs(first, second, path) -> dict:
    """Write a report of two runs to path and read its data."""
    arguments = ["report", str(first), str(second), "--out", str(path)]
    assert run_guarded(cli.main, arguments) == 0
    return content(path)


def test_two_runs_compared(run, hostile, browser, tmp_path):
    browser.look(1280, 900, False)
    other = tmp_path / "other"
    shutil.copytree(run, other)
    rows = jsonl(run / "eval_after.jsonl")
    other_rows = jsonl(other / "eval_after.jsonl")
    other_rows[0] |= dict(ndcg=1.0, rewrite="red lamp")
    write_rows(other / "eval_after.jsonl", other_rows)

    comparison = compare_runs(run, other, tmp_path / "two.html")["compare"]

    assert comparison["queries"] == 12
    differences = []
    for row, other_row in zip(rows, other_rows):
        differences.append(other_row["ndcg"] - row["ndcg"])
    assert comparison["difference"][0] == pytest.approx(np.mean(differences))
    assert open_page(browser, tmp_path / "two.html") == SECTIONS

    # no query in common
    comparison = compare_runs(run, hostile, tmp_path / "three.html")["compare"]
    assert comparison["queries"] == 0
    assert open_page(browser, tmp_path / "three.html") == SECTIONS


def test_behind_a_server_it_asks_for_nothing_more(run, browser):
    """Not even an icon."""
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            asked.append(self.path)

    handler = functools.partial(Handler, directory=run)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        set_network(browser, offline=False)
        browser.open(f"http://127.0.0.1:{server.server_port}/report.html")
        browser.value("new Promise((done) => setTimeout(done, 300))")
        assert asked == ["/report.html"]
    finally:
        server.shutdown()
        server.server_close()


def test_stuffing_is_the_share_of_words_that_repeat_an_earlier_one():
    """By hand: 0 of 2 and 1 of 4 words before; 3 of 4 and 2 of 4 after."""
    before = [dict(rewrite="star wars"), dict(rewrite="the end of The"), dict(rewrite=None)]
    after = [dict(rewrite="lisa Lisa LISA lisa"), dict(rewrite="a b a b"), dict(rewrite="")]
    assert rollouts.measure_repeats(before, after) == dict(before=0.125, after=0.625, flagged=True)


@pytest.mark.parametrize(
    "before, after",
    [
        ("a b c d e f g h i a", "a b c d e f g h i a"),  # 10%: little
        ("a a a b", "a a b c"),  # 25%: much, but less than before
    ],
)
def test_stuffing_is_flagged_where_it_is_much_and_grew(before, after):
    repeats = rollouts.measure_repeats([dict(rewrite=before)], [dict(rewrite=after)])
    assert not repeats["flagged"]


def test_answers_that_are_no_texts_have_no_words_to_repeat():
    rows = [dict(rewrite=["Item_1", "Item_1"]), dict(rewrite=None)]
    assert rollouts.measure_repeats(rows, rows) is None


def test_the_audit_of_the_page_names_stuffing(run, tmp_path):
    """A run whose answers repeat words: the share stands in the page's data."""
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    rows = [
        row | dict(rewrite="lamp lamp lamp chair") for row in jsonl(folder / "eval_after.jsonl")
    ]
    (folder / "eval_after.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = report.write_report([str(folder)]).read_text()
    assert re.search(r'"repeats":{"before":[^}]*"after":0.5,"flagged":true}', page)
