"""`recr1 report`: a run, or two side by side, as one HTML file that needs nothing else: no network,
no server, no other file.

Data goes into the page as JSON and from there into text nodes only; a Content-Security-Policy names
the hash of the one script that may run.
"""

from __future__ import annotations

import base64
import hashlib
import json
import time
from importlib import resources
from pathlib import Path

from recr1.config.schema import ConfigError
from recr1.data import readers
from recr1.distributed import collectives as dist
from recr1.report import groups, ranking, record, rollouts
from recr1.retrieval.interface import Retriever
from recr1.utils.files import write_text
from recr1.utils.hf_hub import ModelFolderError, load_tokenizer
from recr1.utils.terminal import describe_exception

# bytes of rollouts.jsonl.gz whose report a run's end writes while other ranks wait: about .3 s of
# CPU per MB
AT_ONCE = 300 * 2**20

SCRIPTS = (
    "dom.js",
    "charts.js",
    "curves.js",
    "overview.js",
    "tokens.js",
    "ranking.js",
    "tables.js",
    "main.js",
)


def write_report(
    runs: list[str], out: str = "", retriever: Retriever | None = None, tokenizer=None
) -> Path:
    """The report of one run, or of two compared: RUN/report.html, or the first one's
    compare_NAME.html. Returns where it is.

    retriever, tokenizer: the (single) run's own where they are at hand. Raises DataError,
    ConfigError, WriteError.
    """
    if len(runs) not in (1, 2):
        raise ConfigError(
            f"recr1 report takes one run's folder, or two to compare them, not {len(runs)}"
        )
    read = [record.read_run(Path(run)) for run in runs]
    pages = []
    for r in read:
        pages.append(record.describe_run(r) | dict(rollouts=_describe_rollouts(r, tokenizer)))
    content = dict(
        made=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        runs=pages,
        **(_compare_to_raw(read[0], retriever) if len(read) == 1 else _compare_runs(*read)),
    )
    name = "report.html" if len(read) == 1 else f"compare_{read[1].folder.resolve().name}.html"
    path = Path(out) if out else read[0].folder / name
    write_text(path, render_page(content, " and ".join(r.folder.resolve().name for r in read)))
    return path


def write_report_at_end(run: Path, retriever: Retriever, tokenizer) -> str:
    """The report of a run that has just finished, and one line that says where it is; or why it is
    not there: a report must never cost the run.
    """
    try:
        log = run / "rollouts.jsonl.gz"  # SFT has none
        if dist.world_size() > 1 and (size := log.stat().st_size if log.exists() else 0) > AT_ONCE:
            return f"{run}: {size >> 20} MiB of rollouts; `recr1 report {run}` makes its report"
        return f"report: {write_report([str(run)], retriever=retriever, tokenizer=tokenizer)}"
    except Exception as e:
        return f"recr1: the run is whole, but its report was not written ({describe_exception(e)}); `recr1 report {run}` tries again"


def render_page(content: dict, title: str) -> str:
    """The whole HTML. The JSON is ASCII, and holds neither <, > nor &: nothing in it can end the
    element it stands in.
    """
    folder = resources.files(__package__) / "page"
    script = "".join((folder / name).read_text(encoding="utf-8") for name in SCRIPTS)
    style = (folder / "style.css").read_text(encoding="utf-8")
    text = json.dumps(record.replace_nonfinite(content), allow_nan=False, separators=(",", ":"))
    parts = dict(
        TITLE=_to_plain(title),
        STYLE=style,
        SCRIPT=script,
        STYLE_HASH=_hash_script(style),
        SCRIPT_HASH=_hash_script(script),
        DATA=text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"),
    )
    # text, name, text, name, ..., text
    pieces = (folder / "report.html").read_text(encoding="utf-8").split("@@")
    return "".join(parts[piece] if i % 2 else piece for i, piece in enumerate(pieces))


def _compare_to_raw(r: record.RunRecord, retriever: Retriever | None) -> dict:
    """The raw answer against the policy after training."""
    if not r.after:
        return dict(groups=[], ranking=None)
    ids, raws, answers = ([row[name] for row in r.after] for name in ("id", "raw", "rewrite"))
    raw = r.scores(r.after, "_raw")
    before = r.scores(r.before)
    after = r.scores(r.after)
    picks = ranking.choose_queries(after - raw, [a != b for a, b in zip(raws, answers)])
    search = ranking.open_search(r.config, r.folder, retriever)
    found = ranking.describe_rankings(
        search,
        picks,
        ids,
        raws,
        (raws, answers),
        (raw, after),
        lambda i: dict(
            before=[ranking.format_answer(r.before[i]["rewrite"], raws[i]), float(before[i])]
        ),
    )
    tables = groups.describe_groups(
        ids,
        raws,
        answers,
        raw,
        dict(raw=raw, before=before, after=after),
        "after",
        _get_row_finder(search),
        record.format_metric(r.metric),
    )
    return dict(groups=tables, ranking=found | dict(sides=record.name_task_words(r.config)))


def _compare_runs(a: record.RunRecord, b: record.RunRecord) -> dict:
    """The second run's policy against the first one's, on the test queries that both have."""
    mine, theirs = ({row["id"]: row for row in r.after} for r in (a, b))
    metrics = [r.metric for r in (a, b)]
    both = (
        [id for id in mine if id in theirs and mine[id]["raw"] == theirs[id]["raw"]]
        if metrics[0] == metrics[1]
        else []
    )
    compared = dict(
        queries=len(both),
        only=[len(mine) - len(both), len(theirs) - len(both)],
        metrics=metrics,
        difference=None,
        versions=_list_differences(
            *(
                {**r.versions[-1], "packages": json.dumps(r.versions[-1].get("packages"))}
                if r.versions
                else {}
                for r in (a, b)
            )
        ),
    )
    if not both:
        return dict(compare=compared, groups=[], ranking=None)
    raws = [mine[id]["raw"] for id in both]
    answers = ([mine[id]["rewrite"] for id in both], [theirs[id]["rewrite"] for id in both])
    ours, others = (r.scores([rows[id] for id in both]) for r, rows in ((a, mine), (b, theirs)))
    raw = a.scores([mine[id] for id in both], "_raw")
    picks = ranking.choose_queries(others - ours, [x != y for x, y in zip(*answers)])
    search = ranking.open_search(b.config, b.folder)
    answer = record.name_task_words(b.config)[1].removeprefix("policy's ")
    found = ranking.describe_rankings(
        search, picks, both, raws, answers, (ours, others), lambda i: dict(score=float(raw[i]))
    )
    compared["difference"] = record.compute_interval(others - ours)
    tables = [
        t
        for t in groups.describe_groups(
            both,
            raws,
            answers[1],
            raw,
            dict(A=ours, B=others),
            "B",
            _get_row_finder(search),
            record.format_metric(b.metric),
        )
        if t["title"] != "what the answer did"
    ]
    return dict(
        compare=compared,
        groups=tables,
        ranking=found | dict(sides=[f"{answer} of A", f"{answer} of B"]),
    )


def _get_row_finder(search: ranking.RankingSearch | str) -> dict[str, dict]:
    return {} if isinstance(search, str) else search.rows


def _list_differences(a: dict, b: dict) -> list[dict]:
    return [
        dict(key=key, values=[a.get(key), b.get(key)])
        for key in a.keys() | b.keys()
        if a.get(key) != b.get(key) and key != "started"
    ]


def _describe_rollouts(r: record.RunRecord, tokenizer) -> dict:
    """What the run sampled in training; SFT has nothing of the kind, but texts of a teacher."""
    if r.loop == "sft":
        return dict(
            why="SFT samples nothing in training: there are no rollouts, rewards or advantages to show.",
            rows=0,
            rollouts=0,
            note="",
        )
    return rollouts.describe_rollouts(
        r.folder / "rollouts.jsonl.gz",
        r.steps,
        r.config,
        tokenizer or _load_tokenizer(r),
        _read_queries(r),
    )


def _read_queries(r: record.RunRecord) -> dict[str, str]:
    """{id: text} of the train queries; a note where the file is not there any more."""
    try:
        return readers.read_queries(r.config.data.train_queries, "drop")[0]
    except (ValueError, OSError) as e:
        r.notes.append(f"The queries' texts are missing, their ids stand for them: {e}")
        return {}


def _load_tokenizer(r: record.RunRecord):
    """That of the run's model, or of the model it began from where that is a folder; None."""
    for folder in (r.folder / "model", Path(r.config.model.path)):
        if r.config.model.path and (folder / "tokenizer_config.json").is_file():
            try:
                return load_tokenizer(str(folder))
            except ModelFolderError:
                pass
    r.notes.append("No tokenizer was found beside the run: tokens are shown as their ids.")
    return None


def _hash_script(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _to_plain(text: str) -> str:
    return "".join(c if c.isalnum() or c in " -_." else " " for c in text)
