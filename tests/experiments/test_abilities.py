"""experiments/analysis/abilities.py on tiny policies: log-likelihoods and KL against transformers,
the checks of instructions against answers written by hand, intervals against a bootstrap, and whole
audits: exactly 0 against itself, stopped and gone on, refused.
"""

import functools
import gzip
import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.tiny_world import tiny_tokenizer, write_policy
from transformers import AutoModelForCausalLM

from recr1.training.launch import run_guarded

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "experiments/analysis"))
import abilities  # noqa: E402
import ability_texts  # noqa: E402
import verifiable  # noqa: E402

LIMIT = 5


@pytest.fixture(scope="module")
def policies(tmp_path_factory):
    """Three tiny models of one tokenizer."""
    folder = tmp_path_factory.mktemp("policies")
    return {name: write_policy(folder / name, seed) for seed, name in enumerate("abc")}


def run_abilities(out, initial, *models, limit=LIMIT) -> int:
    argv = ["--initial", initial, "--out", str(out), "--limit", str(limit)]
    for name, folder in models:
        argv += ["--model", f"{name}={folder}"]
    return run_guarded(abilities.main, argv)


@pytest.fixture(scope="module")
def audit_of_three(policies, tmp_path_factory):
    """The folder of an audit of b, c and a itself against a."""
    out = tmp_path_factory.mktemp("audit") / "out"
    models = [("b", policies["b"]), ("c", policies["c"]), ("again", policies["a"])]
    assert run_abilities(out, policies["a"], *models) == 0
    return out


def read_part(out, name, part) -> list[dict]:
    return json.loads((out / name / f"{part}.json").read_text())["rows"]


def read_figures(out) -> dict[str, dict]:
    figures = json.loads((out / "abilities.json").read_text())["figures"]
    return {figure["ability"]: figure for figure in figures}


@pytest.fixture(scope="module")
def texts():
    return abilities.collect_texts(LIMIT)


@pytest.fixture(scope="module")
def tokens(texts):
    return abilities.encode_texts(texts, tiny_tokenizer())


# texts


def test_the_plots_are_those_of_the_test_split():
    overviews = []
    with gzip.open(ROOT / "experiments/data/msrd/corpus.jsonl.gz", "rt") as file:
        for line in file:
            film = json.loads(line)
            digest = hashlib.sha256(b"plot" + film["id"].encode()).hexdigest()
            if int(digest, 16) % 20 == 0:
                overview = film["text"].split("Director:")[0]
                overviews.append(" ".join(overview.split()))

    assert set(ability_texts.read_texts("plots")) == set(overviews)


@pytest.mark.parametrize("source", abilities.NUM_PASSAGES)
def test_there_are_as_many_passages_as_are_taken(source):
    passages = ability_texts.make_passages(source, abilities.NUM_PASSAGES[source])

    assert len(set(passages)) == abilities.NUM_PASSAGES[source]
    for passage in passages:
        assert 150 <= len(passage) <= 400
        assert passage == " ".join(passage.split())
    assert passages[:7] == ability_texts.make_passages(source, 7)


@pytest.mark.parametrize("source", abilities.NUM_QUESTIONS)
def test_a_sentence_is_right_once_and_wrong_three_times(source):
    questions = ability_texts.make_questions(source, abilities.NUM_QUESTIONS[source])
    texts = ability_texts.read_texts(source)

    assert len(questions) == abilities.NUM_QUESTIONS[source]
    right = []
    wrong = []
    for question in questions:
        choices = list(question.choices)
        right.append(choices.pop(question.answer))
        wrong += choices
        assert any(text.startswith(f"{question.context} {right[-1]}") for text in texts)
    assert len(set(right)) == len(right)
    assert sorted(wrong) == sorted(right * 3)


def test_neutral_prompts_are_sixty_different_ones():
    prompts = ability_texts.read_neutral_prompts()
    assert len(prompts) == len(set(prompts)) == 60
    assert all(prompts)


# instructions


def find_check(kind: str, number: int):
    """Return the check of the kind's instruction on a task."""
    instructions = verifiable.make_instructions()
    return [item for item in instructions if item.kind == kind][number].is_followed


# kind, number of the task, an answer that follows, some that do not
ANSWERS = [
    ("lower_case", 0, "rain falls, 3 times.", ["Rain falls.", "123", "rain falls on Paris"]),
    ("capitals", 0, "RAIN FALLS. 3!", ["RAIN Falls", "rain", "..."]),
    ("no_comma", 0, "Rain falls and falls.", ["Rain, rain."]),
    ("bullets", 0, "* one\n* two", ["* one", "* one\n* two\n* three", "one\ntwo", "1. a\n2. b"]),
    ("bullets", 1, "Here:\n- one\n - two\n* three", ["* one\n* two", "** one\n** two\n** three"]),
    ("ending", 0, "It rains. That is all.", ["That is all. It rains.", "It rains."]),
    ("ending", 1, 'Sleep well. "have a nice day."', ["Have a nice day. Sleep well."]),
    ("opening", 0, "In short, it rains.", ["It rains, in short.", "Well, in short"]),
    ("json", 0, '{"answer": "rain"}', ["rain", '["answer"]', '{"a": 1}', 'So: {"answer": 1}']),
    ("json", 1, '```json\n{"answer": 1}\n```', ['```json\n{"answer": 1\n```', "```"]),
    ("at_least_words", 0, "rain " * 20, ["rain " * 19, ". " * 30]),
    ("at_least_words", 1, "rain, " * 30, ["rain " * 29]),
    ("at_most_words", 0, "it's well-known - rain " * 3, ["rain " * 11]),
    ("at_most_words", 2, "rain " * 30, ["rain " * 31]),
    ("keyword", 0, "A street. The Street!", ["A street.", "streets and streets", "Rain."]),
    ("keyword", 1, "body, body and body", ["body and body"]),
    ("no_word", 0, "No umbrellas here.", ["An umbrella.", "UMBRELLA!"]),
    ("quotation", 0, '"It rains."', ["It rains.", '"It" rains, "he" said', '"It rains.', '""']),
    ("title", 0, "<<Rain>>\nIt rains.", ["It rains. <<Rain>>", "<Rain> It rains.", "<<>> Rain"]),
]


@pytest.mark.parametrize("kind, number, right, wrong", ANSWERS)
def test_checks_on_answers_written_by_hand(kind, number, right, wrong):
    is_followed = find_check(kind, number)

    assert is_followed(right)
    for answer in (*wrong, "", " \n"):
        assert not is_followed(answer), answer


def test_every_kind_has_twelve_prompts_and_an_example_here():
    instructions = verifiable.make_instructions()
    kinds = [instruction.kind for instruction in instructions]
    prompts = {instruction.prompt for instruction in instructions}

    assert len(prompts) == len(instructions) == 156
    assert {kind for kind, *_ in ANSWERS} == set(kinds)
    for kind in set(kinds):
        assert kinds.count(kind) == 12
    assert len(set(kinds[:13])) == 13  # the first of them are balanced too


# numbers against transformers


@functools.cache
def load_oracle(path: str):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)


def compute_logits(path: str, rollout) -> torch.Tensor:
    """Compute by transformers the logits that predict a rollout's ids, (T, V) in float64."""
    model = load_oracle(path)
    ids = [*rollout.prompt.ids, *rollout.ids]
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0]
    return logits[-len(rollout.ids) - 1 : -1, : len(tiny_tokenizer())]


def sum_logp(path: str, rollout) -> float:
    logps = compute_logits(path, rollout).log_softmax(-1)
    target = torch.tensor(rollout.ids)[:, None]
    return float(logps.gather(-1, target).sum())


def test_perplexity_is_that_of_transformers(audit_of_three, policies, tokens):
    rollouts = tokens.passages
    rows = read_part(audit_of_three, "b", "perplexity")

    assert len(rows) == len(rollouts) == 3 * LIMIT
    for row, rollout in zip(rows, rollouts):
        expected = -sum_logp(policies["b"], rollout)
        assert row["nats"] / row["tokens"] == pytest.approx(expected / len(rollout.ids), abs=1e-5)


def test_a_passage_is_scored_from_its_second_token_to_its_last(audit_of_three, texts, tokens):
    tokenizer = tiny_tokenizer()
    rows = read_part(audit_of_three, "b", "perplexity")
    for (_, text), rollout, row in zip(texts.passages, tokens.passages, rows):
        [first_id] = rollout.prompt.ids  # the tokenizer has no BOS
        first = tokenizer.decode([first_id])
        assert first + tokenizer.decode(rollout.ids) == text
        assert row["bytes"] == len(text.encode()) - len(first.encode())


def test_the_chosen_sentence_is_the_likeliest_per_byte(audit_of_three, policies, texts, tokens):
    rollouts = tokens.choices
    rows = read_part(audit_of_three, "c", "next_sentence")

    assert len(rows) == 2 * LIMIT
    for number, (row, (_, question)) in enumerate(zip(rows, texts.questions)):
        expected = []
        for choice, rollout in zip(question.choices, rollouts[4 * number :]):
            expected.append(-sum_logp(policies["c"], rollout) / len(choice.encode()))
        assert row["nats_per_byte"] == pytest.approx(expected, abs=1e-5)
        assert row["correct"] == (int(np.argmin(expected)) == row["answer"])


def test_kl_is_that_of_transformers_distributions(audit_of_three, policies, tokens):
    continuations = read_part(audit_of_three, "initial", "continuations")
    rows = read_part(audit_of_three, "b", "kl")

    assert len(rows) == len(continuations) == LIMIT
    for row, prompt, continuation in zip(rows, tokens.neutral_prompts, continuations):
        rollout = abilities.make_rollout(prompt, 0, continuation["ids"])
        log_p = compute_logits(policies["a"], rollout).log_softmax(-1)
        log_q = compute_logits(policies["b"], rollout).log_softmax(-1)
        expected = (log_p.exp() * (log_p - log_q)).sum(-1)
        assert row["tokens"] == len(expected)
        assert row["nats"] / row["tokens"] == pytest.approx(float(expected.mean()), rel=1e-4)
        assert float(expected.mean()) > 0.01  # there is something to measure


# figures


def test_a_ratio_and_its_interval():
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(400):
        tokens = int(rng.integers(5, 60))
        rows.append(dict(tokens=tokens, nats=tokens * float(rng.gamma(4.0, 0.5))))
    ability = abilities.Ability("x", "perplexity", None, "nats", "tokens", False)

    values = abilities.make_values(rows, ability)
    mean, (low, high) = abilities.compute_mean_ci(values)

    nats = np.array([row["nats"] for row in rows])
    tokens = np.array([row["tokens"] for row in rows])
    draws = rng.integers(400, size=(20_000, 400))
    ratios = nats[draws].sum(1) / tokens[draws].sum(1)
    assert mean == pytest.approx(nats.sum() / tokens.sum(), rel=1e-12)
    assert high - low == pytest.approx(np.subtract(*np.percentile(ratios, [97.5, 2.5])), rel=0.05)


def test_a_model_against_itself_differs_by_exactly_0(audit_of_three):
    for figure in read_figures(audit_of_three).values():
        [itself] = [row for row in figure["differences"] if row["models"] == ["again", "initial"]]
        assert itself["mean"] == 0
        assert itself["ci95"] == [0, 0]
    assert all(row["nats"] == 0 for row in read_part(audit_of_three, "again", "kl"))


def test_every_two_models_are_compared_in_pairs(audit_of_three):
    figure = read_figures(audit_of_three)["nats per byte, products"]
    pairs = [row["models"] for row in figure["differences"]]
    assert len(pairs) == 6
    assert ["c", "b"] in pairs

    means = {}
    for name in ("b", "c"):
        rows = read_part(audit_of_three, name, "perplexity")
        rows = [row for row in rows if row["source"] == "products"]
        means[name] = sum(row["nats"] for row in rows) / sum(row["bytes"] for row in rows)
        assert figure["models"][name]["mean"] == pytest.approx(means[name])
    difference = figure["differences"][pairs.index(["c", "b"])]
    assert difference["mean"] == pytest.approx(means["c"] - means["b"])
    assert difference["ci95"][0] <= difference["mean"] <= difference["ci95"][1]
    assert figure["n"] == LIMIT


# what stays, what is measured again, what is refused


def test_what_is_measured_stays(policies, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    assert run_abilities(out, policies["a"], ("b", policies["b"]), limit=2) == 0
    first = (out / "abilities.json").read_text()
    table = capsys.readouterr().out.partition("ability ")[2]

    # A part is missing: it alone is measured, and everything comes out as before.
    (out / "b/kl.json").unlink()
    assert run_abilities(out, policies["a"], ("b", policies["b"]), limit=2) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("b: kl, 2 rows")
    assert printed.partition("ability ")[2] == table
    assert (out / "abilities.json").read_text() == first

    # Nothing is missing: no model is loaded.
    monkeypatch.setattr(abilities, "load_reference", lambda *_: pytest.fail("loaded a model"))
    assert run_abilities(out, policies["a"], ("b", policies["b"]), limit=2) == 0
    assert (out / "abilities.json").read_text() == first


def test_another_model_of_the_same_name_is_measured_again(policies, tmp_path, capsys):
    out = tmp_path / "out"
    assert run_abilities(out, policies["a"], ("b", policies["b"]), limit=2) == 0
    before = read_part(out, "b", "perplexity")
    capsys.readouterr()

    assert run_abilities(out, policies["a"], ("b", policies["c"]), limit=2) == 0

    printed = capsys.readouterr().out
    assert printed.count("measured again") == 4
    assert "initial" not in printed.partition("ability ")[0]
    assert read_part(out, "b", "perplexity") != before


def read_error(capsys) -> str:
    err = capsys.readouterr().err
    assert err.startswith("recr1: ")
    assert err.count("\n") == 1
    return err


def test_what_cannot_be_compared_is_refused(policies, tmp_path, capsys):
    model = ("b", policies["b"])
    out = tmp_path / "out"
    assert run_abilities(out, policies["a"], model, model) == 2
    assert "'b' names two models" in read_error(capsys)
    assert run_abilities(out, policies["a"], ("initial", policies["b"])) == 2
    assert "name of the initial model" in read_error(capsys)
    assert run_abilities(out, policies["a"], ("b", str(tmp_path / "none"))) == 2
    assert "neither a folder nor a hub id" in read_error(capsys)
    with pytest.raises(SystemExit):
        run_abilities(out, policies["a"], ("../b", policies["b"]))
    assert "must be NAME=DIR" in capsys.readouterr().err

    other = Path(write_policy(tmp_path / "other"))
    template = other / "chat_template.jinja"
    template.write_text("Be brief. " + template.read_text())
    assert run_abilities(out, policies["a"], ("b", str(other))) == 2
    assert "take models of one tokenizer" in read_error(capsys)
    assert not out.exists()


def test_a_file_of_something_else_is_named(policies, tmp_path, capsys):
    out = tmp_path / "out"
    (out / "initial").mkdir(parents=True)
    (out / "initial/perplexity.json").write_text('{"rows"')
    assert run_abilities(out, policies["a"], ("b", policies["b"])) == 2
    error = read_error(capsys)
    assert str(out / "initial/perplexity.json") in error
    assert "delete it" in error
