"""Write a run, or two side by side, as one HTML file: `recr1 report`.

The file needs nothing else: no network, no server, no other file. Data goes into the page as JSON
and from there into text nodes only; a Content-Security-Policy names the hash of the one script
that may run.
"""

from __future__ import annotations

import base64
import hashlib
import json
import time
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from recr1.config.schema import ConfigError
from recr1.data import readers
from recr1.distributed import collectives as dist
from recr1.report import groups, ranking, record, rollouts
from recr1.report.record import RunRecord
from recr1.retrieval.interface import Retriever
from recr1.utils.files import write_text
from recr1.utils.hf_hub import ModelFolderError, load_tokenizer
from recr1.utils.terminal import describe_exception

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# bytes of rollouts.jsonl.gz whose report the end of a run writes while other ranks wait: about
# .3 s of CPU per MB
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

# versions.json's fields that differ between any two runs
ALWAYS_DIFFERENT = ("started",)


def write_report(
    runs: list[str],
    out: str = "",
    retriever: Retriever | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Path:
    """Write the report of one run, or of two compared, and return its path.

    Args:
        runs: the folders of one run or two.
        out: the report's path; by default RUN/report.html, for two runs compare_NAME.html in the
            first one's folder.
        retriever, tokenizer: the (single) run's own; by default they are loaded.

    Raises:
        DataError, ConfigError, WriteError.
    """
    if len(runs) not in (1, 2):
        raise ConfigError(
            f"recr1 report takes one run's folder, or two to compare them, not {len(runs)}"
        )
    records = [record.read_run(Path(run)) for run in runs]
    pages = []
    for run in records:
        page = record.describe_run(run)
        page["rollouts"] = _describe_rollouts(run, tokenizer)
        page["repeats"] = rollouts.measure_repeats(run.before, run.after)
        pages.append(page)
    names = [run.folder.resolve().name for run in records]
    made_time = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    content = dict(made=made_time, runs=pages)
    if len(records) == 1:
        content |= _compare_to_raw(records[0], retriever)
        file_name = "report.html"
    else:
        content |= _compare_runs(*records)
        file_name = f"compare_{names[1]}.html"
    path = Path(out) if out else records[0].folder / file_name
    write_text(path, render_page(content, title=" and ".join(names)))
    return path


def write_report_at_end(
    run: Path, retriever: Retriever | None, tokenizer: PreTrainedTokenizerBase | None
) -> str:
    """Write the report of a run that has just finished, and return one line for the user.

    The line says where the report is, or why there is none: a report must never cost the run.
    """
    try:
        rollout_log = run / "rollouts.jsonl.gz"
        # SFT has no rollouts.
        log_bytes = rollout_log.stat().st_size if rollout_log.exists() else 0
        if dist.world_size() > 1 and log_bytes > AT_ONCE:
            return (
                f"{run}: {log_bytes >> 20} MiB of rollouts; `recr1 report {run}` makes its report"
            )
        path = write_report([str(run)], retriever=retriever, tokenizer=tokenizer)
        return f"report: {path}"
    except Exception as e:
        return (
            f"recr1: the run is whole, but its report was not written ({describe_exception(e)}); "
            f"`recr1 report {run}` tries again"
        )


def render_page(content: dict, title: str) -> str:
    """Return the full HTML.

    The JSON is ASCII and has neither <, > nor &: nothing in it can end the element that holds it.
    """
    folder = resources.files(__package__) / "page"
    script = "".join((folder / name).read_text(encoding="utf-8") for name in SCRIPTS)
    style = (folder / "style.css").read_text(encoding="utf-8")
    finite_content = record.replace_nonfinite(content)
    data = json.dumps(finite_content, allow_nan=False, separators=(",", ":"))
    data = data.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
    values = dict(
        TITLE=_to_plain(title),
        STYLE=style,
        SCRIPT=script,
        STYLE_HASH=_hash_script(style),
        SCRIPT_HASH=_hash_script(script),
        DATA=data,
    )
    # The template splits into text, name, text, name, ..., text.
    pieces = (folder / "report.html").read_text(encoding="utf-8").split("@@")
    for index in range(1, len(pieces), 2):
        pieces[index] = values[pieces[index]]
    return "".join(pieces)


def _compare_to_raw(run: RunRecord, retriever: Retriever | None) -> dict:
    """Compare the raw answers with the policy's after training."""
    if not run.after:
        return dict(groups=[], ranking=None)
    ids = [row["id"] for row in run.after]
    raws = [row["raw"] for row in run.after]
    answers = [row["rewrite"] for row in run.after]
    raw_scores = run.scores(run.after, "_raw")
    before_scores = run.scores(run.before)
    after_scores = run.scores(run.after)

    def describe_before(index: int) -> dict:
        answer = ranking.format_answer(run.before[index]["rewrite"], raws[index])
        return dict(before=[answer, float(before_scores[index])])

    is_changed = [raw != answer for raw, answer in zip(raws, answers)]
    picks = ranking.choose_queries(after_scores - raw_scores, is_changed)
    search = ranking.open_search(run.config, run.folder, retriever)
    rankings = ranking.describe_rankings(
        search,
        picks,
        ids,
        raws,
        answers=(raws, answers),
        logged=(raw_scores, after_scores),
        more=describe_before,
    )
    rankings["sides"] = record.name_task_words(run.config)
    tables = groups.describe_groups(
        ids,
        raws,
        answers,
        raw_scores,
        scores=dict(raw=raw_scores, before=before_scores, after=after_scores),
        of="after",
        rows=_get_data_rows(search),
        metric=record.format_metric(run.metric),
    )
    return dict(groups=tables, ranking=rankings)


def _compare_runs(a: RunRecord, b: RunRecord) -> dict:
    """Compare the second run's policy with the first one's.

    They are compared on the test queries that both have, where both have the same metric.
    """
    rows_a = {row["id"]: row for row in a.after}
    rows_b = {row["id"]: row for row in b.after}
    common_ids = []
    if a.metric == b.metric:
        for id, row in rows_a.items():
            if id in rows_b and row["raw"] == rows_b[id]["raw"]:
                common_ids.append(id)
    comparison = dict(
        queries=len(common_ids),
        only=[len(rows_a) - len(common_ids), len(rows_b) - len(common_ids)],
        metrics=[a.metric, b.metric],
        difference=None,
        versions=_list_differences(_get_last_versions(a), _get_last_versions(b)),
    )
    if not common_ids:
        return dict(compare=comparison, groups=[], ranking=None)

    # Answers and scores of the common queries.
    common_a = [rows_a[id] for id in common_ids]
    common_b = [rows_b[id] for id in common_ids]
    raws = [row["raw"] for row in common_a]
    answers_a = [row["rewrite"] for row in common_a]
    answers_b = [row["rewrite"] for row in common_b]
    raw_scores = a.scores(common_a, "_raw")
    scores_a = a.scores(common_a)
    scores_b = b.scores(common_b)
    comparison["difference"] = record.compute_interval(scores_b - scores_a)

    differ = [answer_a != answer_b for answer_a, answer_b in zip(answers_a, answers_b)]
    picks = ranking.choose_queries(scores_b - scores_a, differ)
    search = ranking.open_search(b.config, b.folder)
    rankings = ranking.describe_rankings(
        search,
        picks,
        common_ids,
        raws,
        answers=(answers_a, answers_b),
        logged=(scores_a, scores_b),
        more=lambda index: dict(score=float(raw_scores[index])),
    )
    answer_word = record.name_task_words(b.config)[1].removeprefix("policy's ")
    rankings["sides"] = [f"{answer_word} of A", f"{answer_word} of B"]
    tables = groups.describe_groups(
        common_ids,
        raws,
        answers_b,
        raw_scores,
        scores=dict(A=scores_a, B=scores_b),
        of="B",
        rows=_get_data_rows(search),
        metric=record.format_metric(b.metric),
    )
    # What the answer did to the raw one explains no difference between two policies.
    tables = [table for table in tables if table["title"] != "what the answer did"]
    return dict(compare=comparison, groups=tables, ranking=rankings)


def _get_data_rows(search: ranking.RankingSearch | str) -> dict[str, dict]:
    """Return {id: the query's line of the data}; {} where the data could not be read."""
    return {} if isinstance(search, str) else search.rows


def _get_last_versions(run: RunRecord) -> dict:
    """Return the versions of the run's last start, the packages as text."""
    if not run.versions:
        return {}
    versions = run.versions[-1]
    return versions | dict(packages=json.dumps(versions.get("packages")))


def _list_differences(a: dict, b: dict) -> list[dict]:
    """Return [{"key", "values": [a's, b's]}] of the keys whose values differ."""
    differences = []
    for key in a.keys() | b.keys():
        values = [a.get(key), b.get(key)]
        if values[0] != values[1] and key not in ALWAYS_DIFFERENT:
            differences.append(dict(key=key, values=values))
    return differences


def _describe_rollouts(run: RunRecord, tokenizer: PreTrainedTokenizerBase | None) -> dict:
    """Return what the run sampled in training. SFT samples nothing, it learns a teacher's texts."""
    if run.loop == "sft":
        return dict(
            why="SFT samples nothing in training: "
            "there are no rollouts, rewards or advantages to show.",
            rows=0,
            rollouts=0,
            note="",
        )
    return rollouts.describe_rollouts(
        run.folder / "rollouts.jsonl.gz",
        run.steps,
        run.config,
        tokenizer or _load_tokenizer(run),
        _read_queries(run),
    )


def _read_queries(run: RunRecord) -> dict[str, str]:
    """Return {id: text} of the train queries; note where their file cannot be read any more."""
    try:
        texts, *_ = readers.read_queries(run.config.data.train_queries, "drop")
    except (ValueError, OSError) as e:
        run.notes.append(f"The queries' texts are missing, their ids stand for them: {e}")
        return {}
    return texts


def _load_tokenizer(run: RunRecord) -> PreTrainedTokenizerBase | None:
    """Load the tokenizer of the run's model, else of the model that it began from.

    Returns None, and notes it, where neither is a folder with a tokenizer.
    """
    model_path = run.config.model.path
    if model_path:
        for folder in (run.folder / "model", Path(model_path)):
            if not (folder / "tokenizer_config.json").is_file():
                continue
            try:
                return load_tokenizer(str(folder))
            except ModelFolderError:
                continue
    run.notes.append("No tokenizer was found beside the run: tokens are shown as their ids.")
    return None


def _hash_script(text: str) -> str:
    """Return the source expression that lets a Content-Security-Policy allow this text."""
    digest = hashlib.sha256(text.encode()).digest()
    return "sha256-" + base64.b64encode(digest).decode()


def _to_plain(text: str) -> str:
    """Replace by a space what HTML could read as anything but text."""
    characters = [character if _is_plain(character) else " " for character in text]
    return "".join(characters)


def _is_plain(character: str) -> bool:
    return character.isalnum() or character in " -_."
