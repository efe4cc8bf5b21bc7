"""experiments/baselines on small prepared folders that the tests make: what each method ranks,
worked by hand or by another's code, and the one table.
"""

import gzip
import json
import math
import random
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from recr1.data.readers import is_validation
from recr1.training.launch import run_guarded

FOLDER = Path(__file__).resolve().parents[2] / "experiments/baselines"
sys.path.insert(0, str(FOLDER))
import counts  # noqa: E402
import run as baselines  # noqa: E402
import sasrec  # noqa: E402
import sequences  # noqa: E402
from sequences import Query, Sequence  # noqa: E402

SPLITS = ("train", "test_transductive", "test_inductive")


def write_jsonl(path: Path, rows) -> None:
    lines = [json.dumps(row) + "\n" for row in rows]
    path.write_text("".join(lines))


def find_id(start: str, validation: bool) -> str:
    """Find an id that begins so and lies in the validation tenth, or does not."""
    numbered = (f"{start}{n}" for n in range(1000))
    return next(id for id in numbered if is_validation(id) == validation)


def write_corpus(folder: Path, items) -> None:
    with gzip.open(folder / "corpus.jsonl.gz", "wt", encoding="utf-8") as file:
        for item in sorted(items):
            row = dict(id=item, title=f"Title {item}", text="a film")
            file.write(json.dumps(row) + "\n")


def make_window(user: str, name: str, row: list[str], end: int, length: int) -> tuple[dict, str]:
    """Make a query that shows the items before `end`; and the item there, its target."""
    id = find_id(f"{user}-{name}.", is_validation(user))
    history = row[max(0, end - length) : end]
    query = dict(id=id, text=f"Title {history[-1]}", user=user, history=history)
    return query, row[end]


def prepare(
    folder: Path,
    users: dict[str, list[str]],
    length: int = 10,
    cold: dict[str, list[str]] | None = None,
) -> str:
    """Write a folder as experiments/prepare/movielens.py does: windows over all items of a user but
    the last, which is the transductive test; `cold` users are the inductive one. A user is whole in
    the validation tenth or not at all.
    """
    cold = cold or {}
    folder.mkdir(parents=True, exist_ok=True)
    items = set().union(*users.values(), *cold.values())
    write_corpus(folder, items)

    splits = {name: [] for name in SPLITS}
    for user, row in users.items():
        last = len(row) - 1
        for end in range(1, last):
            splits["train"].append(make_window(user, f"w{end}", row, end, length))
        splits["test_transductive"].append(make_window(user, "last", row, last, length))
    for user, row in cold.items():
        window = make_window(user, "cold", row, len(row) - 1, length)
        splits["test_inductive"].append(window)

    for name, windows in splits.items():
        write_jsonl(folder / f"{name}.queries.jsonl", [query for query, _ in windows])
        qrels = [f"{query['id']}\t{target}\t1\n" for query, target in windows]
        (folder / f"{name}.qrels.tsv").write_text("".join(qrels))
    return str(folder)


USERS = [f"u{n}" for n in range(100)]
TRAINED = [user for user in USERS if not is_validation(user)]
HELD = [user for user in USERS if is_validation(user)]


def draw_walks(n_users: int, n_items: int, length: int, seed: int = 0) -> dict[str, list[str]]:
    """Draw users who walk along one ring of items, one step at a time: what follows depends on the
    last item, popularity says nothing.
    """
    rng = random.Random(seed)
    users = {}
    for u in range(n_users):
        begin = rng.randrange(n_items)
        users[f"u{u}"] = [f"i{(begin + step) % n_items:02}" for step in range(length)]
    return users


COLD = dict(c1=["x1", "x2", "x3"], c2=["x2", "x4", "x1"])


@pytest.fixture(scope="module")
def ring(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ring") / "sequential"
    return prepare(folder, draw_walks(60, 40, 25), cold=COLD)


# sequences


def name_items(data_set, numbers) -> list[str]:
    return [data_set.items[number] for number in numbers]


def find_query(data_set, user):
    return next(query for query in data_set.test if query.user == user)


def test_windows_become_the_sequences_they_were_cut_from(tmp_path):
    """Also where a sequence is longer than a window; a user of the validation tenth is looked at
    and not trained on.
    """
    rng = random.Random(1)
    items = [f"i{i:03}" for i in range(200)]
    users = {}
    for user in (*TRAINED[:6], HELD[0]):
        num_items = rng.choice([3, 9, 12, 40])
        users[user] = rng.sample(items, num_items)

    data = sequences.load_data_set(prepare(tmp_path / "s", users), "transductive")

    counted = dict.fromkeys(data.items, 0)
    for user, row in users.items():
        is_trained = user != HELD[0]
        [sequence] = data.sequences[user]
        assert name_items(data, sequence.items) == row[:-1]
        assert sequence.trained == [is_trained] * (len(row) - 1)
        if is_trained:
            for item in row[:-1]:
                counted[item] += 1
    assert {query.user for query in data.validation} == {HELD[0]}
    assert len(data.validation) == len(users[HELD[0]]) - 2
    assert data.counts == [counted[item] for item in data.items]
    assert data.items == sorted(counted, key=lambda item: (-counted[item], item))

    row = users[TRAINED[0]]
    query = find_query(data, TRAINED[0])
    assert query.gains == {row[-1]: 1.0}
    assert name_items(data, query.history) == row[:-1][-10:]


def test_validation_may_also_be_single_windows(tmp_path):
    """Where the tenth is drawn by window, an item is trained on unless the window that asks for it
    is validation.
    """
    row = [f"i{i}" for i in range(12)]
    folder = Path(prepare(tmp_path / "s", {TRAINED[0]: row, TRAINED[1]: row[::-1]}))
    lines = (folder / "train.queries.jsonl").read_text().splitlines()
    queries = [json.loads(line) for line in lines]
    qrels = (folder / "train.qrels.tsv").read_text()
    old = queries[4]["id"]
    new = find_id("v", validation=True)
    queries[4]["id"] = new
    write_jsonl(folder / "train.queries.jsonl", queries)
    (folder / "train.qrels.tsv").write_text(qrels.replace(f"{old}\t", f"{new}\t"))

    data = sequences.load_data_set(str(folder), "transductive")

    [sequence] = data.sequences[TRAINED[0]]
    assert sequence.trained == [i != 5 for i in range(11)]  # window 4 of the user asks for item 5


def test_a_gap_begins_another_sequence(tmp_path):
    row = [f"i{i}" for i in range(30)]
    users = {TRAINED[0]: row, HELD[0]: ["i1", "i2", "i3"]}
    folder = Path(prepare(tmp_path / "s", users, length=3))
    for name in ("train.queries.jsonl", "train.qrels.tsv"):
        lines = (folder / name).read_text().splitlines(keepends=True)
        (folder / name).write_text("".join(lines[:5] + lines[15:]))

    data = sequences.load_data_set(str(folder), "transductive")

    first, second = data.sequences[TRAINED[0]]
    assert name_items(data, first.items) == row[:6]
    assert name_items(data, second.items) == row[13:29]
    query = find_query(data, TRAINED[0])
    assert len(query.history) == 3
    extended = sequences.extend_history(query, data.sequences, 50)
    assert name_items(data, extended) == row[13:29]
    assert sequences.extend_history(query, data.sequences, 2) == query.history[-2:]
    assert sequences.extend_history(query, {}, 50) == query.history


# key, its new value (None: no such key), what is said
BAD_WINDOWS = [
    ("user", None, ["train.queries.jsonl:2", "'user' is missing"]),
    ("user", 7, [":2", "'user' is no string"]),
    ("history", None, [":2", "'history' is missing"]),
    ("history", [], [":2", "'history' is no list"]),
    ("history", ["i00", 3], [":2", "'history' is no list"]),
    ("history", ["nobody"], [":2", "'nobody'", "corpus"]),
    ("id", "other", [":2", "'other'", "no relevant document"]),
]


@pytest.mark.parametrize("key, value, parts", BAD_WINDOWS)
def test_bad_windows_are_named(key, value, parts, ring, tmp_path, capsys):
    for path in Path(ring).iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    lines = (tmp_path / "train.queries.jsonl").read_text().splitlines()
    queries = [json.loads(line) for line in lines]
    if value is None:
        del queries[1][key]
    else:
        queries[1][key] = value
    write_jsonl(tmp_path / "train.queries.jsonl", queries)

    assert run_guarded(baselines.main, [str(tmp_path), "--setting", "transductive"]) == 2

    err = capsys.readouterr().err
    assert err.startswith("recr1: ")
    assert err.count("\n") == 1
    for part in parts:
        assert part in err


def test_a_folder_that_is_not_there_or_has_no_validation(tmp_path, capsys):
    assert run_guarded(baselines.main, [str(tmp_path / "none"), "--setting", "inductive"]) == 2
    assert "corpus.jsonl: no such file" in capsys.readouterr().err

    folder = prepare(tmp_path / "s", {TRAINED[0]: ["a", "b", "c"]})
    assert run_guarded(baselines.main, [folder, "--setting", "transductive"]) == 2
    assert "0 of them in the validation tenth" in capsys.readouterr().err


# methods that count


def test_popularity_and_what_is_not_ranked():
    score = counts.make_popularity([5, 2, 2, 0])

    first, second = score([[0], [1]], ["", ""])

    assert first.shape == (4,)
    assert baselines.rank_items(first).tolist() == [0, 1, 2]
    assert (first == second).all()


def test_last_item_counts_what_followed():
    trained = Sequence([0, 1, 2, 1, 2], [True] * 5)
    validated = Sequence([0, 1, 3], [True, True, False])
    score = counts.make_last_item([trained, validated], 5)

    scores = score([[4, 1], [2], [4]], [""] * 3)

    assert scores[0, 2] == 2
    assert scores[0, 3] == -np.inf  # 1 -> 3 is validation's
    assert baselines.rank_items(scores[1]).tolist() == [1]
    assert baselines.rank_items(scores[2]).tolist() == []


def test_item_knn_is_the_cosine_of_the_co_occurrence_matrix():
    rng = np.random.default_rng(0)
    x = (rng.random((30, 12)) < 0.3).astype(float)  # (users, items)
    x[:, 11] = 0  # nobody has it
    of_users = []
    for row in x:
        items = np.flatnonzero(row).tolist()
        of_users.append([Sequence(items, [True] * len(items))])
    of_users.append([Sequence([11, 0], [False, False])])
    histories = [[0], [3, 5, 7], [2, 11, 2]]

    actual = counts.make_item_knn(of_users, 12)(histories, [""] * 3)

    norms = np.maximum(np.linalg.norm(x, axis=0), 1e-9)
    cosine = x.T @ x / np.outer(norms, norms)
    np.fill_diagonal(cosine, 0)
    expected = [cosine[sorted(set(history))].sum(0) for history in histories]
    finite = np.where(actual == -np.inf, 0, actual)
    assert np.allclose(finite, np.stack(expected), atol=1e-6)
    assert (actual[:, 11] == -np.inf).all()


def test_last_title_is_the_products_own_bm25():
    items = ["b", "a", "c"]
    titles = ["red lamp shade", "red lamp", "blue chair"]
    score = counts.make_last_title(items, titles)

    lamp, chair = score([[0], [0]], ["red lamp", "chair"])

    assert [items[i] for i in baselines.rank_items(lamp)] == ["a", "b"]
    assert [items[i] for i in baselines.rank_items(chair)] == ["c"]


def test_the_best_are_a_stable_sort_of_all():
    rng = np.random.default_rng(3)
    for n in (5, 100, 101, 900):
        # many ties, some across the hundredth place
        row = rng.integers(0, 40, n).astype(np.float32)
        row[rng.random(n) < 0.2] = -np.inf

        actual = baselines.rank_items(row).tolist()

        order = np.argsort(-row, kind="stable")
        expected = [int(i) for i in order if row[i] > -np.inf]
        assert actual == expected[:100]


# SASRec


# torch's names of a block's weights, ours
ENCODER_NAMES = {
    "self_attn.in_proj_weight": "qkv.weight",
    "self_attn.in_proj_bias": "qkv.bias",
    "self_attn.out_proj.weight": "out.weight",
    "self_attn.out_proj.bias": "out.bias",
    "linear1.weight": "up.weight",
    "linear1.bias": "up.bias",
    "linear2.weight": "down.weight",
    "linear2.bias": "down.bias",
    "norm1.weight": "norm1.weight",
    "norm1.bias": "norm1.bias",
    "norm2.weight": "norm2.weight",
    "norm2.bias": "norm2.bias",
}


def build_torch_encoder(block) -> nn.TransformerEncoderLayer:
    """Build torch's own layer of width 32 with the block's weights."""
    layer = nn.TransformerEncoderLayer(
        32, 2, 48, activation="gelu", batch_first=True, norm_first=True
    )
    weights = {theirs: block.get_parameter(ours) for theirs, ours in ENCODER_NAMES.items()}
    layer.load_state_dict(weights)
    return layer.eval()


def test_sasrec_is_torchs_own_pre_norm_encoder():
    """The same weights in nn.TransformerEncoderLayer: same hidden states; and no position sees the
    ones after it.
    """
    torch.manual_seed(0)
    settings = sasrec.Settings(width=32, heads=2, inner=48, length=12)
    model = sasrec.SASRec(20, settings).eval()
    items = torch.randint(20, (3, 12))
    mask = nn.Transformer.generate_square_subsequent_mask(12)

    x = model.item(items) + model.position.weight
    for block in model.blocks:
        x = build_torch_encoder(block)(x, src_mask=mask, is_causal=True)
    assert torch.allclose(model(items), model.norm(x), atol=1e-5)

    later = items.clone()
    later[:, 7:] = (later[:, 7:] + 1) % 20
    assert torch.equal(model(items)[:, :7], model(later)[:, :7])


def compute_with_gradients(loss, hidden, weight, target) -> list[torch.Tensor]:
    hidden = hidden.clone().requires_grad_()
    weight = weight.clone().requires_grad_()
    value = loss(hidden, weight, target)
    value.backward()
    return [value.detach(), hidden.grad, weight.grad]


def compute_torch_cross_entropy(hidden, weight, target):
    return nn.functional.cross_entropy(hidden @ weight.T, target)


def test_the_loss_is_torchs_cross_entropy():
    torch.manual_seed(0)
    hidden = torch.randn(50, 8, dtype=torch.float64)
    weight = torch.randn(21, 8, dtype=torch.float64)
    target = torch.randint(21, (50,))

    actual = compute_with_gradients(sasrec.compute_cross_entropy, hidden, weight, target)
    expected = compute_with_gradients(compute_torch_cross_entropy, hidden, weight, target)

    for ours, theirs in zip(actual, expected):
        assert torch.allclose(ours, theirs, atol=1e-12)


def test_an_epoch_asks_for_every_trained_item_once():
    rng = np.random.default_rng(0)
    settings = sasrec.Settings(length=7, batch=3)
    rows = [
        [(i, True) for i in range(30)],
        [(i, i != 34) for i in range(30, 38)],
        [(40, True)],
        [(41, True), (42, True)],
    ]
    expected = [*range(1, 30), 31, 32, 33, 35, 36, 37, 42]

    for _ in range(20):
        seen = []
        for inputs, targets in sasrec.iterate_batches(rows, settings, rng):
            is_asked = targets >= 0
            before = inputs[is_asked].tolist()
            after = targets[is_asked].tolist()
            assert inputs.shape[1] <= 7
            assert after == [item + 1 for item in before]
            seen += after
        assert sorted(seen) == expected


LONG_HISTORY = [3, 4, 5, 6, 7, 8, 9]


def test_a_history_scores_the_same_alone_or_among_longer_ones():
    torch.manual_seed(0)
    settings = sasrec.Settings(width=16, inner=16, length=5)
    model = sasrec.SASRec(9, settings).eval()
    known = {item: place for place, item in enumerate(range(3, 12))}
    score = sasrec.make_scorer(model, known, 14)
    histories = [LONG_HISTORY, [4], [0, 4, 13], [0, 13], [9, 11]]

    together = score(histories, [""] * 5)

    for history, row in zip(histories, together):
        [alone] = score([history], [""])
        assert np.allclose(alone, row, atol=1e-5, equal_nan=True)
    assert np.array_equal(together[1], together[2])  # what train has not is left out
    assert (together[3] == -np.inf).all()
    assert (together[0][[0, 1, 2, 12, 13]] == -np.inf).all()
    assert np.isfinite(together[0][3:12]).all()
    [of_last_five] = score([LONG_HISTORY[-5:]], [""])
    assert np.allclose(of_last_five, together[0], atol=1e-5)


def load_training_data(ring):
    """Load the ring; its sequences in one list, and the items that train knows."""
    data = sequences.load_data_set(ring, "transductive")
    flat = []
    for of_user in data.sequences.values():
        flat += of_user
    known = np.flatnonzero(np.array(data.counts) > 0)
    return data, flat, known


def fit_ring(ring, seed=0, epochs=8):
    data, flat, known = load_training_data(ring)
    histories = [query.history for query in data.validation]
    settings = sasrec.Settings(lr=3e-3, dropout=0.1, epochs=epochs)

    def validate(scorer):
        metrics = baselines.evaluate(scorer, data.items, data.validation, histories, False)
        return float(metrics["ndcg@10"].mean())

    return sasrec.fit(flat, known, len(data.items), settings, seed, validate)


def test_training_is_seeded_and_stops_early(ring):
    """The same seed, the same weights; another seed, others; the best epoch's are kept, and
    `patience` epochs without a better one are the last.
    """
    histories = [[0, 1, 2], [5]]
    texts = ["", ""]

    scorer, log = fit_ring(ring)
    again, log_again = fit_ring(ring)
    _, other = fit_ring(ring, seed=1)
    assert log == log_again
    assert log[0]["loss"] != other[0]["loss"]
    assert np.array_equal(scorer(histories, texts), again(histories, texts))

    data, flat, known = load_training_data(ring)
    settings = sasrec.Settings(patience=3)
    values = iter([0.1, 0.3, 0.2, 0.3, 0.1, 0.9])
    scores = []

    def validate(scorer):
        scores.append(scorer(histories, texts))
        return next(values)

    scorer, log = sasrec.fit(flat, known, len(data.items), settings, 0, validate)
    # the second epoch was best, three more did not beat it
    assert [row["validation"] for row in log] == [0.1, 0.3, 0.2, 0.3, 0.1]
    assert np.array_equal(scorer(histories, texts), scores[1])
    assert not np.array_equal(scores[1], scores[4])


# the table


def find_line(text: str, start: str) -> str:
    return next(line for line in text.splitlines() if line.startswith(start))


def test_the_table_of_a_ring(ring, tmp_path, capsys):
    """Items follow each other on a ring: SASRec and the last item know it, popularity does not.
    Every figure again from the file's queries.
    """
    out = tmp_path / "table.json"
    options = ["--setting", "transductive", "--out", str(out), "--remove-seen"]
    training = ["--dropout", "0.1", "--epochs", "40"]

    assert run_guarded(baselines.main, [ring, *options, *training]) == 0

    text = capsys.readouterr().out
    result = json.loads(out.read_text())
    assert "full ranking of 44 items, 40 of them in train" in text
    assert "left out of the rankings" in text
    assert result["n"] == 60
    ndcg = {name: row["ndcg@10"]["mean"] for name, row in result["methods"].items()}
    assert ndcg["last item"] > 0.95
    assert ndcg["SASRec"] > 0.9
    assert ndcg["popularity"] < 0.5
    low, high = result["differences"]["SASRec - popularity"]["ndcg@10"]["ci95"]
    assert 0 < low < high

    for name, row in result["methods"].items():
        line = find_line(text, name + " ")
        for metric, entry in row.items():
            values = [query[name][metric] for query in result["queries"].values()]
            low, high = entry["ci95"]
            assert entry["mean"] == pytest.approx(np.mean(values))
            assert low <= entry["mean"] <= high
            assert f"{entry['mean']:.4f}" in line
    assert [run["dropout"] for run in result["sasrec"]["runs"]] == [0.1]
    assert result["sasrec"]["settings"]["dropout"] == 0.1


def test_the_better_dropout_is_taken(ring, tmp_path, monkeypatch):
    def fit(flat, known, n, settings, seed, validate, title):
        log = [dict(epoch=1, loss=1.0, validation=1 - settings.dropout)]
        return (settings.dropout, n), log

    monkeypatch.setattr(baselines.sasrec, "fit", fit)
    data = sequences.load_data_set(ring, "transductive")
    args = Namespace(history=10, remove_seen=False, seed=0, epochs=1, dropout=[0.5, 0.2, 0.4])

    scorer, fitted = baselines.tune_sasrec(data, [], args)

    assert scorer == (0.2, 44)
    assert fitted["settings"]["dropout"] == 0.2
    assert len(fitted["runs"]) == 3


def test_seen_items_are_ranked_unless_removed():
    queries = [Query("q", "u", "", [0, 1], {"c": 1.0})]

    def score(histories, texts):
        return np.array([[3.0, 2.0, 1.0]], np.float32)

    for removed, rank in ((False, 3), (True, 1)):
        metrics = baselines.evaluate(score, ["a", "b", "c"], queries, [[0, 1]], removed)
        assert metrics["ndcg@10"] == [1 / math.log2(rank + 1)]
        assert metrics["mrr@100"] == [1 / rank]
        assert metrics["hit@10"] == [1.0]
        assert metrics["recall@10"] == [1.0]


def test_the_strict_inductive_setting_by_the_command(ring, tmp_path):
    """No item of the test is in train: whatever learns from items scores exactly 0, only the text
    can find anything.
    """
    command = [sys.executable, FOLDER / "run.py", ring]
    options = ["--setting", "inductive", "--out", "t.json", "--history", "50"]

    completed = subprocess.run([*command, *options], cwd=tmp_path, capture_output=True, text=True)

    assert completed.returncode == 0, completed.stderr
    result = json.loads((tmp_path / "t.json").read_text())
    methods = result["methods"]
    last_title = methods.pop("last title")
    assert last_title["ndcg@100"]["mean"] > 0
    for row in methods.values():
        assert row["ndcg@100"]["mean"] == 0
    assert "SASRec: not trained" in completed.stdout
    assert result["history"] == 50


BAD_OPTIONS = [
    ("--dropout", "1"),
    ("--dropout", "0.1,x"),
    ("--history", "0"),
    ("--setting", "both"),
    ("--seed", "-1"),
]


@pytest.mark.parametrize("option, value", BAD_OPTIONS)
def test_bad_options(option, value, ring, capsys):
    with pytest.raises(SystemExit) as end:
        baselines.main([ring, "--setting", "transductive", option, value])
    assert end.value.code == 2
    assert option in capsys.readouterr().err
