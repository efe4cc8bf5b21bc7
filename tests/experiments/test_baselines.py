"""experiments/baselines on small prepared folders that the tests make: what each method ranks,
worked by hand or by another's code, and the one table.
"""

import gzip
import json
import math
import random
import subprocess
import sys
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


def prepare(
    folder: Path,
    users: dict[str, list[str]],
    length: int = 10,
    cold: dict[str, list[str]] | None = None,
) -> str:
    """A folder as experiments/prepare/movielens.py writes it: windows over all items of a user but
    the last, which is the transductive test; `cold` users are the inductive one. A user is whole in
    the validation tenth or not at all.
    """
    cold = cold or {}
    folder.mkdir(parents=True, exist_ok=True)
    items = sorted({item for row in (*users.values(), *cold.values()) for item in row})
    with gzip.open(folder / "corpus.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(
            json.dumps(dict(id=item, title=f"Title {item}", text="a film")) + "\n" for item in items
        )
    splits = {name: [] for name in ("train", "test_transductive", "test_inductive")}

    def window(split, user, name, row, end):
        id = next(
            id
            for n in range(1000)
            if is_validation(id := f"{user}-{name}.{n}") == is_validation(user)
        )
        splits[split].append(
            (
                dict(
                    id=id,
                    text=f"Title {row[end - 1]}",
                    user=user,
                    history=row[max(0, end - length) : end],
                ),
                row[end],
            )
        )

    for user, row in users.items():
        for end in range(1, len(row) - 1):
            window("train", user, f"w{end}", row, end)
        window("test_transductive", user, "last", row, len(row) - 1)
    for user, row in cold.items():
        window("test_inductive", user, "cold", row, len(row) - 1)
    for name, rows in splits.items():
        (folder / f"{name}.queries.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row, _ in rows)
        )
        (folder / f"{name}.qrels.tsv").write_text(
            "".join(f"{row['id']}\t{target}\t1\n" for row, target in rows)
        )
    return str(folder)


TRAINED = [user for user in map("u{}".format, range(100)) if not is_validation(user)]
HELD = [user for user in map("u{}".format, range(100)) if is_validation(user)]


def walks(n_users: int, n_items: int, length: int, seed: int = 0) -> dict[str, list[str]]:
    """Users who walk along one ring of items, mostly one step at a time: what follows depends on
    the last item, popularity says nothing.
    """
    rng = random.Random(seed)
    users = {}
    for u in range(n_users):
        at = rng.randrange(n_items)
        users[f"u{u}"] = [f"i{(at + step) % n_items:02}" for step in range(length)]
    return users


@pytest.fixture(scope="module")
def ring(tmp_path_factory):
    return prepare(
        tmp_path_factory.mktemp("ring") / "sequential",
        walks(60, 40, 25),
        cold=dict(c1=["x1", "x2", "x3"], c2=["x2", "x4", "x1"]),
    )


# sequences


def test_windows_become_the_sequences_they_were_cut_from(tmp_path):
    """Also where a sequence is longer than a window; a user of the validation tenth is looked at
    and not trained on.
    """
    rng = random.Random(1)
    users = {
        user: rng.sample([f"i{i:03}" for i in range(200)], rng.choice([3, 9, 12, 40]))
        for user in (*TRAINED[:6], HELD[0])
    }
    found = sequences.load_data_set(prepare(tmp_path / "s", users), "transductive")
    for user, row in users.items():
        [sequence] = found.sequences[user]
        assert [found.items[i] for i in sequence.items] == row[:-1]
        assert sequence.trained == [user != HELD[0]] * (len(row) - 1)
    assert {query.user for query in found.validation} == {HELD[0]}
    assert len(found.validation) == len(users[HELD[0]]) - 2
    counted = {
        item: sum(item in row[:-1] for user, row in users.items() if user != HELD[0])
        for item in found.items
    }
    assert found.counts == [counted[item] for item in found.items]
    assert found.items == sorted(counted, key=lambda item: (-counted[item], item))
    query = next(query for query in found.test if query.user == TRAINED[0])
    assert query.gains == {users[TRAINED[0]][-1]: 1.0}
    assert [found.items[i] for i in query.history] == users[TRAINED[0]][:-1][-10:]


def test_validation_may_also_be_single_windows(tmp_path):
    """Where the tenth is drawn by window, an item is trained on unless the window that asks for it
    is validation.
    """
    row = [f"i{i}" for i in range(12)]
    folder = Path(prepare(tmp_path / "s", {TRAINED[0]: row, TRAINED[1]: row[::-1]}))
    lines = [json.loads(line) for line in (folder / "train.queries.jsonl").read_text().splitlines()]
    qrels = (folder / "train.qrels.tsv").read_text()
    old, new = lines[4]["id"], next(id for n in range(1000) if is_validation(id := f"v{n}"))
    lines[4]["id"] = new
    (folder / "train.queries.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "train.qrels.tsv").write_text(qrels.replace(f"{old}\t", f"{new}\t"))
    [sequence] = sequences.load_data_set(str(folder), "transductive").sequences[TRAINED[0]]
    assert sequence.trained == [i != 5 for i in range(11)]  # window 4 of the user asks for item 5


def test_a_gap_begins_another_sequence(tmp_path):
    folder = Path(
        prepare(
            tmp_path / "s",
            {TRAINED[0]: [f"i{i}" for i in range(30)], HELD[0]: ["i1", "i2", "i3"]},
            length=3,
        )
    )
    for name in ("queries.jsonl", "qrels.tsv"):
        lines = (folder / f"train.{name}").read_text().splitlines(keepends=True)
        (folder / f"train.{name}").write_text("".join(lines[:5] + lines[15:]))
    found = sequences.load_data_set(str(folder), "transductive")
    first, second = ([found.items[i] for i in s.items] for s in found.sequences[TRAINED[0]])
    assert first == [f"i{i}" for i in range(6)]
    assert second == [f"i{i}" for i in range(13, 29)]
    query = next(query for query in found.test if query.user == TRAINED[0])
    assert len(query.history) == 3
    assert [found.items[i] for i in sequences.extend_history(query, found.sequences, 50)] == second
    assert sequences.extend_history(query, found.sequences, 2) == query.history[-2:]
    assert sequences.extend_history(query, {}, 50) == query.history


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda row: row.pop("user"), ("train.queries.jsonl:2", "'user' is missing")),
        (lambda row: row.update(user=7), (":2", "'user' is no string")),
        (lambda row: row.pop("history"), (":2", "'history' is missing")),
        (lambda row: row.update(history=[]), (":2", "'history' is no list")),
        (lambda row: row.update(history=["i00", 3]), (":2", "'history' is no list")),
        (lambda row: row.update(history=["nobody"]), (":2", "'nobody'", "corpus")),
        (lambda row: row.update(id="other"), (":2", "'other'", "no relevant document")),
    ],
)
def test_bad_windows_are_named(change, says, ring, tmp_path, capsys):
    for path in Path(ring).iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    lines = (tmp_path / "train.queries.jsonl").read_text().splitlines()
    row = json.loads(lines[1])
    change(row)
    (tmp_path / "train.queries.jsonl").write_text(
        "\n".join([lines[0], json.dumps(row), *lines[2:]]) + "\n"
    )
    assert run_guarded(baselines.main, [str(tmp_path), "--setting", "transductive"]) == 2
    err = capsys.readouterr().err
    assert (
        err.startswith("recr1: ") and err.count("\n") == 1 and all(part in err for part in says)
    ), err


def test_a_folder_that_is_not_there_or_has_no_validation(tmp_path, capsys):
    assert run_guarded(baselines.main, [str(tmp_path / "none"), "--setting", "inductive"]) == 2
    assert "corpus.jsonl: no such file" in capsys.readouterr().err
    folder = prepare(tmp_path / "s", {TRAINED[0]: ["a", "b", "c"]})
    assert run_guarded(baselines.main, [folder, "--setting", "transductive"]) == 2
    assert "0 of them in the validation tenth" in capsys.readouterr().err


# methods that count


def test_popularity_and_what_is_not_ranked():
    row = counts.make_popularity([5, 2, 2, 0])([[0], [1]], ["", ""])
    assert row.shape == (2, 4)
    assert baselines.rank_items(row[0]).tolist() == [0, 1, 2]
    assert (row[0] == row[1]).all()


def test_last_item_counts_what_followed():
    parts = [Sequence([0, 1, 2, 1, 2], [True] * 5), Sequence([0, 1, 3], [True, True, False])]
    row = counts.make_last_item(parts, 5)([[4, 1], [2], [4]], [""] * 3)
    assert row[0, 2] == 2 and row[0, 3] == -np.inf  # 1 -> 3 is validation's
    assert baselines.rank_items(row[1]).tolist() == [1]
    assert baselines.rank_items(row[2]).tolist() == []


def test_item_knn_is_the_cosine_of_the_co_occurrence_matrix():
    rng = np.random.default_rng(0)
    x = (rng.random((30, 12)) < 0.3).astype(float)  # (users, items)
    x[:, 11] = 0  # nobody has it
    parts = [
        [Sequence(items := np.flatnonzero(row).tolist(), [True] * len(items))] for row in x
    ] + [[Sequence([11, 0], [False, False])]]
    norms = np.maximum(np.linalg.norm(x, axis=0), 1e-9)
    cosine = x.T @ x / np.outer(norms, norms)
    np.fill_diagonal(cosine, 0)
    histories = [[0], [3, 5, 7], [2, 11, 2]]
    got = counts.make_item_knn(parts, 12)(histories, [""] * 3)
    want = np.stack([cosine[sorted(set(history))].sum(0) for history in histories])
    assert np.allclose(np.where(got == -np.inf, 0, got), want, atol=1e-6)
    assert (got[:, 11] == -np.inf).all()


def test_last_title_is_the_products_own_bm25():
    items = ["b", "a", "c"]
    row = counts.make_last_title(items, ["red lamp shade", "red lamp", "blue chair"])(
        [[0], [0]], ["red lamp", "chair"]
    )
    assert [items[i] for i in baselines.rank_items(row[0])] == ["a", "b"]
    assert [items[i] for i in baselines.rank_items(row[1])] == ["c"]


def test_the_best_are_a_stable_sort_of_all():
    rng = np.random.default_rng(3)
    for n in (5, 100, 101, 900):
        # many ties, some across the hundredth place
        row = rng.integers(0, 40, n).astype(np.float32)
        row[rng.random(n) < 0.2] = -np.inf
        want = [int(i) for i in np.argsort(-row, kind="stable") if row[i] > -np.inf][:100]
        assert baselines.rank_items(row).tolist() == want


# SASRec


def test_sasrec_is_torchs_own_pre_norm_encoder():
    """The same weights in nn.TransformerEncoderLayer: same hidden states; and no position sees the
    ones after it.
    """
    torch.manual_seed(0)
    s = sasrec.Settings(width=32, heads=2, inner=48, length=12)
    model = sasrec.SASRec(20, s).eval()
    items = torch.randint(20, (3, 12))
    x = model.item(items) + model.position.weight
    for block in model.blocks:
        theirs = nn.TransformerEncoderLayer(
            32, 2, 48, activation="gelu", batch_first=True, norm_first=True
        ).eval()
        theirs.load_state_dict(
            {
                "self_attn.in_proj_weight": block.qkv.weight,
                "self_attn.in_proj_bias": block.qkv.bias,
                "self_attn.out_proj.weight": block.out.weight,
                "self_attn.out_proj.bias": block.out.bias,
                "linear1.weight": block.up.weight,
                "linear1.bias": block.up.bias,
                "linear2.weight": block.down.weight,
                "linear2.bias": block.down.bias,
                "norm1.weight": block.norm1.weight,
                "norm1.bias": block.norm1.bias,
                "norm2.weight": block.norm2.weight,
                "norm2.bias": block.norm2.bias,
            }
        )
        x = theirs(x, src_mask=nn.Transformer.generate_square_subsequent_mask(12), is_causal=True)
    assert torch.allclose(model(items), model.norm(x), atol=1e-5)
    later = items.clone()
    later[:, 7:] = (later[:, 7:] + 1) % 20
    assert torch.equal(model(items)[:, :7], model(later)[:, :7])


def test_the_loss_is_torchs_cross_entropy():
    torch.manual_seed(0)
    hidden = torch.randn(50, 8, dtype=torch.float64)
    weight = torch.randn(21, 8, dtype=torch.float64)
    target = torch.randint(21, (50,))
    found = []
    for loss in (
        sasrec.compute_cross_entropy,
        lambda h, w, t: nn.functional.cross_entropy(h @ w.T, t),
    ):
        h = hidden.clone().requires_grad_()
        w = weight.clone().requires_grad_()
        value = loss(h, w, target)
        value.backward()
        found.append((value.detach(), h.grad, w.grad))
    assert all(torch.allclose(ours, theirs, atol=1e-12) for ours, theirs in zip(*found))


def test_an_epoch_asks_for_every_trained_item_once():
    rng = np.random.default_rng(0)
    s = sasrec.Settings(length=7, batch=3)
    rows = [
        [(i, True) for i in range(30)],
        [(i, i != 34) for i in range(30, 38)],
        [(40, True)],
        [(41, True), (42, True)],
    ]
    for _ in range(20):
        seen = []
        for inputs, targets in sasrec.iterate_batches(rows, s, rng):
            assert inputs.shape[1] <= 7
            for a, b in zip(inputs[targets >= 0].tolist(), targets[targets >= 0].tolist()):
                assert b == a + 1
                seen.append(b)
        assert sorted(seen) == [*range(1, 30), *(i for i in range(31, 38) if i != 34), 42]


def test_a_history_scores_the_same_alone_or_among_longer_ones():
    torch.manual_seed(0)
    model = sasrec.SASRec(9, sasrec.Settings(width=16, inner=16, length=5)).eval()
    scores = sasrec.make_scorer(
        model, {item: i for i, item in enumerate([3, 4, 5, 6, 7, 8, 9, 10, 11])}, 14
    )
    histories = [[3, 4, 5, 6, 7, 8, 9], [4], [0, 4, 13], [0, 13], [9, 11]]
    together = scores(histories, [""] * 5)
    for history, row in zip(histories, together):
        assert np.allclose(scores([history], [""])[0], row, atol=1e-5, equal_nan=True)
    assert np.array_equal(together[1], together[2])  # what train has not is left out
    assert (together[3] == -np.inf).all()
    assert (together[0][[0, 1, 2, 12, 13]] == -np.inf).all()
    assert np.isfinite(together[0][3:12]).all()
    assert np.allclose(scores([[3, 4, 5, 6, 7, 8, 9][-5:]], [""])[0], together[0], atol=1e-5)


def fitted(ring, seed=0, **settings):
    found = sequences.load_data_set(ring, "transductive")
    flat = [s for user in found.sequences.values() for s in user]
    known = np.flatnonzero(np.array(found.counts) > 0)
    histories = [query.history for query in found.validation]
    return sasrec.fit(
        flat,
        known,
        len(found.items),
        sasrec.Settings(**dict(lr=3e-3, dropout=0.1) | settings),
        seed,
        lambda scorer: float(
            baselines.evaluate(scorer, found.items, found.validation, histories, False)[
                "ndcg@10"
            ].mean()
        ),
    )


def test_training_is_seeded_and_stops_early(ring):
    """The same seed, the same weights; another seed, others; the best epoch's are kept, and
    `patience` epochs without a better one are the last.
    """
    scorer, log = fitted(ring, epochs=8)
    again, log_again = fitted(ring, epochs=8)
    _, other = fitted(ring, seed=1, epochs=8)
    histories = [[0, 1, 2], [5]]
    assert log == log_again
    assert log[0]["loss"] != other[0]["loss"]
    assert np.array_equal(scorer(histories, ["", ""]), again(histories, ["", ""]))
    scores = iter([0.1, 0.3, 0.2, 0.3, 0.1, 0.9])
    kept = []
    found = sequences.load_data_set(ring, "transductive")
    flat = [s for user in found.sequences.values() for s in user]
    known = np.flatnonzero(np.array(found.counts) > 0)

    def validate(scorer):
        kept.append(scorer(histories, ["", ""]))
        return next(scores)

    scorer, log = sasrec.fit(
        flat, known, len(found.items), sasrec.Settings(patience=3), 0, validate
    )
    # the second epoch was best, three more did not beat it
    assert [row["validation"] for row in log] == [0.1, 0.3, 0.2, 0.3, 0.1]
    assert np.array_equal(scorer(histories, ["", ""]), kept[1])
    assert not np.array_equal(kept[1], kept[4])


# the table


def test_the_table_of_a_ring(ring, tmp_path, capsys):
    """Items follow each other on a ring: SASRec and the last item know it, popularity does not.
    Every figure again from the file's queries.
    """
    out = tmp_path / "table.json"
    assert (
        run_guarded(
            baselines.main,
            [
                ring,
                "--setting",
                "transductive",
                "--out",
                str(out),
                "--dropout",
                "0.1",
                "--epochs",
                "40",
                "--remove-seen",
            ],
        )
        == 0
    )
    text = capsys.readouterr().out
    result = json.loads(out.read_text())
    assert "full ranking of 44 items, 40 of them in train" in text
    assert "left out of the rankings" in text
    assert result["n"] == 60
    ndcg = {name: row["ndcg@10"]["mean"] for name, row in result["methods"].items()}
    assert ndcg["last item"] > 0.95 and ndcg["SASRec"] > 0.9 and ndcg["popularity"] < 0.5, ndcg
    low, high = result["differences"]["SASRec - popularity"]["ndcg@10"]["ci95"]
    assert 0 < low < high
    for name, row in result["methods"].items():
        for metric, entry in row.items():
            values = [query[name][metric] for query in result["queries"].values()]
            assert entry["mean"] == pytest.approx(np.mean(values))
            assert entry["ci95"][0] <= entry["mean"] <= entry["ci95"][1]
            assert f"{entry['mean']:.4f}" in next(
                line for line in text.splitlines() if line.startswith(name + " ")
            )
    assert [run["dropout"] for run in result["sasrec"]["runs"]] == [0.1]
    assert result["sasrec"]["settings"]["dropout"] == 0.1


def test_the_better_dropout_is_taken(ring, tmp_path, monkeypatch):
    monkeypatch.setattr(
        baselines.sasrec,
        "fit",
        lambda flat, known, n, s, seed, validate, title: (
            (s.dropout, n),
            [dict(epoch=1, loss=1.0, validation=1 - s.dropout)],
        ),
    )
    found = sequences.load_data_set(ring, "transductive")
    args = type(
        "Args", (), dict(history=10, remove_seen=False, seed=0, epochs=1, dropout=[0.5, 0.2, 0.4])
    )
    scorer, fitted = baselines.tune_sasrec(found, [], args)
    assert scorer == (0.2, 44)
    assert fitted["settings"]["dropout"] == 0.2
    assert len(fitted["runs"]) == 3


def test_seen_items_are_ranked_unless_removed():
    queries = [Query("q", "u", "", [0, 1], {"c": 1.0})]

    def scorer(histories, texts):
        return np.array([[3.0, 2.0, 1.0]], np.float32)

    for removed, rank in ((False, 3), (True, 1)):
        got = baselines.evaluate(scorer, ["a", "b", "c"], queries, [[0, 1]], removed)
        assert got["ndcg@10"] == [1 / math.log2(rank + 1)]
        assert got["mrr@100"] == [1 / rank]
        assert got["hit@10"] == got["recall@10"] == [1.0]


def test_the_strict_inductive_setting_by_the_command(ring, tmp_path):
    """No item of the test is in train: whatever learns from items scores exactly 0, only the text
    can find anything.
    """
    done = subprocess.run(
        [
            sys.executable,
            FOLDER / "run.py",
            ring,
            "--setting",
            "inductive",
            "--out",
            "t.json",
            "--history",
            "50",
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "t.json").read_text())
    assert all(
        row["ndcg@100"]["mean"] == 0
        for name, row in result["methods"].items()
        if name != "last title"
    )
    assert result["methods"]["last title"]["ndcg@100"]["mean"] > 0
    assert "SASRec: not trained" in done.stdout
    assert result["history"] == 50


@pytest.mark.parametrize(
    "option",
    [
        ["--dropout", "1"],
        ["--dropout", "0.1,x"],
        ["--history", "0"],
        ["--setting", "both"],
        ["--seed", "-1"],
    ],
)
def test_bad_options(option, ring, capsys):
    with pytest.raises(SystemExit) as end:
        baselines.main([ring, "--setting", "transductive", *option])
    assert end.value.code == 2
    assert option[0] in capsys.readouterr().err
