"""A task of a user's own that goes wrong, in its methods or while it is imported: one line with the
method and the query.
"""

import pytest
from test_tasks import TITLES, make_prompt, make_rollout, make_scorer

from recr1.config.schema import Config, ConfigError
from recr1.retrieval.interface import RetrieverError
from recr1.tasks.registry import build_task
from recr1.utils.interrupts import Stopped

ROW = dict(text="lamps")
USER_TASK = Config(task="test_user_task:UserTask")


class UserTask:
    """A task of a user's own; `change` makes a method do something else."""

    placeholders = ("query",)
    required_fields = ()
    uses_retriever = True
    change = {}

    def __init__(self, rule):
        pass

    def __getattribute__(self, name):
        change = object.__getattribute__(self, "change")
        if name in change:
            return change[name]
        return object.__getattribute__(self, name)

    def render(self, row, title):
        return (row["text"],)

    def parse(self, completion, row):
        if not completion:
            return None, "empty"
        return [completion], None

    def baseline_answer(self, row):
        return [row["text"]]

    def rank(self, answers, rows, k, search):
        queries = [" ".join(words) for words in answers]
        return search(queries, k)


def fail_with(error: BaseException):
    """Make a method that raises an error."""

    def raise_error(*_):
        raise error

    return raise_error


def return_always(value):
    """Make a method that returns a value."""
    return lambda *_: value


def render_an_unknown_title(row, title):
    return (title("nowhere"),)


def search_for_a_number(answers, rows, k, search):
    return search([3], k)


CHANGES = [  # attribute, what takes its place, message
    (
        "render",
        fail_with(KeyError("day")),
        "render raised KeyError: 'day' for the query 'lamps'",
    ),
    (
        "render",
        return_always("lamps"),
        "render returned 'lamps', must be 1 strings, one for each of query,",
    ),
    ("render", return_always(("a", "b")), "must be 1 strings"),
    ("render", return_always(("\ud800",)), "which cannot be written as JSON in UTF-8"),
    ("render", render_an_unknown_title, "render raised KeyError: 'nowhere'"),
    (
        "parse",
        fail_with(ValueError("no\n\x1b[2Jlist")),
        r"parse raised ValueError: no \[2Jlist for the query 'lamps'",
    ),
    ("parse", fail_with(SystemExit(3)), "parse raised SystemExit: 3"),
    ("parse", return_always(None), "parse returned None, must be"),
    ("parse", return_always(("a", "b")), "must be"),
    ("parse", return_always((None, 3)), "must be"),
    ("parse", return_always((None, "")), "must be"),
    (
        "parse",
        return_always(({1, 2}, None)),
        r"parse returned \({1, 2}, None\), which cannot be written",
    ),
    ("parse", return_always((float("nan"), None)), "which cannot be written as JSON"),
    ("baseline_answer", fail_with(IndexError("x")), "baseline_answer raised IndexError"),
    ("baseline_answer", return_always(b"x"), "baseline_answer returned b'x', which cannot"),
    (
        "rank",
        fail_with(RecursionError("deep")),
        "rank raised RecursionError: deep for 1 queries, the first 'lamps'",
    ),
    ("rank", return_always([]), "a list of document ids for each of the 1 answers"),
    ("rank", return_always([[3]]), "a list of document ids for each"),
    ("rank", return_always(None), "rank returned None"),
    ("rank", search_for_a_number, "rank raised AttributeError"),
    ("placeholders", "query", "placeholders must be a tuple of strings, is 'query'"),
    ("required_fields", None, "required_fields must be a tuple"),
]


def use_the_task():
    """Call every method of the task: (scores of its baseline, rewards of two completions)."""
    task = build_task(USER_TASK)
    task.render(ROW, TITLES.__getitem__)
    scorer = make_scorer(task, {"q": {"d1": 1.0}})
    answer = task.baseline_answer(ROW)
    baseline = scorer.score_answers([make_prompt(row=ROW)], [answer])
    parsed = make_rollout("1", row=ROW)
    unparsed = make_rollout("", row=ROW)
    return baseline, scorer.score([parsed, unparsed])


@pytest.mark.parametrize("name, replacement, message", CHANGES)
def test_a_task_of_ones_own_that_fails_is_named_with_its_method_and_query(
    name, replacement, message, monkeypatch
):
    [raw], [parsed, unparsed] = use_the_task()
    assert raw["ndcg"] == 0
    assert parsed.answer == ["1"]
    assert parsed.error is None
    assert parsed.terms["ndcg"] > 0
    assert unparsed.answer is None
    assert unparsed.error == "empty"

    monkeypatch.setattr(UserTask, "change", {name: replacement})
    with pytest.raises(ConfigError, match=message) as error:
        use_the_task()
    text = str(error.value)
    assert "test_user_task:UserTask" in text
    assert text.isprintable()


@pytest.mark.parametrize(
    "through", [Stopped("now"), KeyboardInterrupt(), RetrieverError("call 3 raised")]
)
def test_a_stop_and_the_retrievers_own_error_pass_through_a_users_task(through, monkeypatch):
    rank = fail_with(through)
    monkeypatch.setattr(UserTask, "change", {"rank": rank})
    task = build_task(USER_TASK)

    with pytest.raises(type(through)) as error:
        task.rank(["x"], [ROW], 3, None)
    assert error.value is through


BROKEN_MODULES = [  # name, what its file says, message
    ("typo", "def f(:\n", "SyntaxError: .*typo.py, line 1"),
    ("zero", "1 / 0", "ZeroDivisionError"),
    ("leaves", "import sys\nsys.exit(0)", "SystemExit"),
]


def test_a_module_that_fails_while_it_is_imported_is_named(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    for name, text, message in BROKEN_MODULES:
        (tmp_path / f"own_{name}.py").write_text(text)
        task = f"own_{name}:T"
        with pytest.raises(ConfigError, match=f"task: '{task}' cannot be loaded: {message}") as e:
            build_task(Config(task=task))
        assert "\n" not in str(e.value)
