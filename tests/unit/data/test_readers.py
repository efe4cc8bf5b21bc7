"""Readers: every kind of bad line at its line number, plain and gzip, stop and drop. Order and
random numbers: their promises.
"""

import gzip
import hashlib
import json

import numpy as np
import pytest

from recr1.data.prompt_order import choose_prompts, count_steps_per_epoch, shuffle_words
from recr1.data.readers import DataError, is_validation, read_corpus, read_qrels, read_queries
from recr1.utils.counter_rng import draw_uniforms, hash_keys, to_unit_interval

DOCS = [
    '{"id": "d0", "title": "T0", "text": "words é 0", "year": 1999}'.encode(),
    '{"id": "d1", "title": "T1", "text": "words é 1", "year": 1999}'.encode(),
    '{"id": "d2", "title": "T2", "text": "words é 2", "year": 1999}'.encode(),
    '{"id": "d3", "title": "T3", "text": "words é 3", "year": 1999}'.encode(),
]
QUERIES = [
    b'{"id": "q0", "text": "query 0"}',
    b'{"id": "q1", "text": "query 1"}',
    b'{"id": "q2", "text": "query 2"}',
    b'{"id": "q3", "text": "query 3"}',
]
QRELS = [
    b"q0\td0\t1",
    b"q0\td1\t2.5",
    b"q1\td0\t0",
    b"q2\td2\t3",
]
GOOD = {read_corpus: DOCS, read_queries: QUERIES, read_qrels: QRELS}


@pytest.fixture(params=["data", "data.gz"])
def write(tmp_path, request):
    """Return the function lines -> path of a file of them, plain or compressed."""

    def write_lines(lines, end=b"\n"):
        path = tmp_path / request.param
        open_file = gzip.open if path.suffix == ".gz" else open
        with open_file(path, "wb") as file:
            file.write(end.join(lines) + end)
        return path

    return write_lines


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_good_files(write, end, mark):
    path = write([mark + DOCS[0], *DOCS[1:]], end)
    ids, texts, dropped = read_corpus(path)
    assert ids == ["d0", "d1", "d2", "d3"]
    assert texts == ["T0 words é 0", "T1 words é 1", "T2 words é 2", "T3 words é 3"]
    assert dropped == []

    path = write([mark + QUERIES[0], *QUERIES[1:]], end)
    queries, dropped = read_queries(path)
    assert queries == {"q0": "query 0", "q1": "query 1", "q2": "query 2", "q3": "query 3"}
    assert dropped == []

    path = write([mark + QRELS[0], *QRELS[1:]], end)
    qrels, dropped = read_qrels(path)
    assert qrels == {"q0": {"d0": 1, "d1": 2.5}, "q1": {"d0": 0}, "q2": {"d2": 3}}
    assert dropped == []


def test_title_or_text_is_enough_and_unicode_line_ends_end_no_line(write):
    only_title = b'{"id": "a", "title": "T"}'
    only_text = '{"id": "b", "text": "x\u2028y\u0085z"}'.encode()
    empty_title = b'{"id": "c", "title": "", "text": "w"}'
    path = write([only_title, only_text, empty_title])

    ids, texts, dropped = read_corpus(path)

    assert ids == ["a", "b", "c"]
    assert texts == ["T", "x\u2028y\u0085z", "w"]
    assert dropped == []


# a line, and what its error says
JSONL_BAD = [
    (b'{"id": "d9", "text": "\xff"}', "not UTF-8 at byte 23"),
    (b'{"id": "d9", "text": "wo', "not JSON (Unterminated string"),
    (b'{"id": "d9", "text": "a"} {}', "not JSON (Extra data"),
    (b"\xef\xbb\xbf" + b'{"id": "d9", "text": "a"}', "not JSON"),  # a mark in the middle is none
    (b'["d9", "a"]', "JSON, but a list and not an object"),
    (b"null", "JSON, but a NoneType"),
    (b"[" * 100_000, "brackets too deep"),
    (b'{"id": ' + b"9" * 5_000 + b"}", "integer too long"),
    (b'{"text": "a"}', "no key 'id'"),
    (b'{"id": 7, "text": "a"}', "'id' is a int, not a string"),
    (b'{"id": "", "text": "a"}', "id '' is empty"),
    (b'{"id": " d9", "text": "a"}', "white space around"),
    (b'{"id": "\\ud800", "text": "a"}', "'id' holds a lone surrogate"),
    (b'{"id": "d9", "text": "a \\udfff"}', "'text' holds a lone surrogate"),
    (b'{"id": "d9", "text": null}', "'text' is a NoneType, not a string"),
    (b"", "empty line"),
    (b" \t", "empty line"),
]
CORPUS_BAD = JSONL_BAD + [
    (DOCS[0], "id 'd0' came before"),
    (b'{"id": "d9"}', "neither 'title' nor 'text'"),
    (b'{"id": "d9", "title": " ", "text": ""}', "neither"),
    (b'{"id": "d9", "title": ["a"], "text": "a"}', "'title' is a list, not a string"),
]
QUERIES_BAD = JSONL_BAD + [
    (QUERIES[0], "id 'q0' came before"),
    (b'{"id": "q9"}', "no key 'text'"),
    (b'{"id": "q9", "text": " "}', "'text' is empty"),
]
QRELS_BAD = [
    (b"q9\td\xff\t1", "not UTF-8 at byte 5"),
    (b"", "empty line"),
    (b"q9\td9", "2 tab-separated columns; want 3"),
    (b"q9 d9 1", "1 tab-separated columns"),
    (b"q9\t0\td9\t1", "4 tab-separated columns"),
    (b"query-id\tcorpus-id\tscore", "'score' is not a number"),
    (b"q9\td9\t", "'' is not a number"),
    (b"q9\td9\tnan", "gain nan is not a finite"),
    (b"q9\td9\tinf", "gain inf is not"),
    (b"q9\td9\t-1", "gain -1.0 is not"),
    (b"\td9\t1", "id '' is empty"),
    (b"q9\t \t1", "id ' ' is empty"),
    (b"q0\td0\t2", "'q0', 'd0' was judged 1.0 before, now 2.0"),
]
BAD = []
BAD += [(read_corpus, *case) for case in CORPUS_BAD]
BAD += [(read_queries, *case) for case in QUERIES_BAD]
BAD += [(read_qrels, *case) for case in QRELS_BAD]
BAD_IDS = [f"{case[0].__name__}-{number}" for number, case in enumerate(BAD)]


@pytest.mark.parametrize("reader, line, why", BAD, ids=BAD_IDS)
def test_bad_line(write, reader, line, why):
    good = GOOD[reader]
    path = write([*good[:3], line, good[3], line])  # lines 4 and 6

    with pytest.raises(DataError) as stopped:
        reader(path, "stop")
    *values, dropped = reader(path, "drop")

    message = str(stopped.value)
    assert message.startswith(f"{path}:4: ")
    assert why in message
    assert ";" in message
    assert len(message) < 400
    assert len(dropped) == 2
    assert dropped[0] == message
    assert dropped[1].startswith(f"{path}:6: ")
    *good_values, _ = reader(write(good))
    assert values == good_values  # what was good is all there, and nothing else


def test_an_identical_judgement_is_left_out_and_listed_even_under_stop(write):
    good, _ = read_qrels(write(QRELS))
    path = write([*QRELS, QRELS[1]])

    for policy in ("stop", "drop"):
        qrels, dropped = read_qrels(path, policy)

        assert qrels == good
        assert len(dropped) == 1
        assert dropped[0].startswith(f"{path}:5: ")
        assert "judged the same before" in dropped[0]


def test_a_line_of_ten_megabytes(write):
    text = "long " * 2_000_000
    long_line = json.dumps({"id": "x", "text": text}).encode()
    torn_line = b'{"id": "y", "text": "' + b"z" * 10_000_000
    path = write([DOCS[0], long_line, torn_line])

    ids, texts, dropped = read_corpus(path, "drop")

    assert ids == ["d0", "x"]
    assert texts[1] == text
    assert len(dropped) == 1
    assert dropped[0].startswith(f"{path}:3: ")
    assert len(dropped[0]) < 400


def write_many_lines(reader) -> bytes:
    """Return 2,000 good lines for the reader, of text that gzip cannot make much smaller."""
    lines = []
    for number in range(2_000):
        text = hashlib.sha256(b"%d" % number).hexdigest()
        if reader is read_qrels:
            lines.append(f"q{number}\td{text}\t1")
        else:
            lines.append(f'{{"id": "x{number}", "text": "{text}"}}')
    return "\n".join(lines).encode()


@pytest.mark.parametrize("reader", GOOD)
@pytest.mark.parametrize("policy", ["stop", "drop"])
def test_a_file_that_cannot_be_used_always_stops(tmp_path, reader, policy):
    plain = write_many_lines(reader)
    packed = gzip.compress(plain)
    middle = len(packed) // 2
    flipped = bytearray(packed)
    flipped[middle] ^= 0xFF
    cases = [
        ("empty", b"", "the file is empty"),
        ("empty.gz", gzip.compress(b""), "the file is empty"),
        ("zero.gz", b"", "the file is empty"),
        ("torn.gz", packed[:middle], "torn, or not gzip"),
        ("no_checksum.gz", packed[:-8], "torn, or not gzip"),
        ("holed.gz", packed[:15] + bytes(200) + packed[215:], "torn, or not gzip"),
        ("flipped.gz", bytes(flipped), "torn, or not gzip"),
        ("plain.gz", plain, "torn, or not gzip"),
        ("packed", packed, "ends in .gz"),
    ]

    for name, content, why in cases:
        path = tmp_path / name
        path.write_bytes(content)
        message = f"{name}: .*{why}"
        if name in ("flipped.gz", "holed.gz") and policy == "stop":
            # a damaged byte may spoil a line before gzip notices: that line is the error then
            message += rf"|{name}:\d+: "
        with pytest.raises(DataError, match=message):
            reader(path, policy)

    undamaged = tmp_path / "undamaged.gz"
    undamaged.write_bytes(packed)
    values, *_ = reader(undamaged, policy)
    assert len(values) == 2_000

    with pytest.raises(DataError, match="absent.jsonl: no such file"):
        reader(tmp_path / "absent.jsonl", policy)
    with pytest.raises(DataError, match="cannot be read"):
        reader(tmp_path, policy)


@pytest.mark.parametrize("reader", GOOD)
def test_nothing_but_bad_lines_always_stops(write, reader):
    path = write([b"?", b"?"])

    with pytest.raises(DataError, match="none of its 2 lines is good; the first: .*:1: "):
        reader(path, "drop")


def test_an_unknown_policy_is_refused(write):
    path = write(QUERIES)

    with pytest.raises(ValueError, match="want 'stop' or 'drop'"):
        read_queries(path, "skip")


def test_validation_is_the_hash_tenth():
    ids = [f"qid:{number}" for number in range(20_000)]

    chosen = {id for id in ids if is_validation(id)}

    # the last decimal digit of the digest, found by another way than the code's
    want = set()
    for id in ids:
        digest = hashlib.sha256(id.encode()).digest()
        decimals = str(int.from_bytes(digest, "big"))
        if decimals.endswith("0"):
            want.add(id)
    assert chosen == want
    assert 0.09 < len(chosen) / len(ids) < 0.11


@pytest.mark.parametrize("n, per_step", [(10, 3), (12, 4), (7, 7), (5, 1), (1000, 64)])
def test_an_epoch_is_a_permutation(n, per_step):
    steps = count_steps_per_epoch(n, per_step)
    assert steps == n // per_step

    epochs = []
    for epoch in range(4):
        first_step = epoch * steps
        order = choose_prompts_of_steps(n, per_step, 5, range(first_step, first_step + steps))
        assert order.dtype == np.int64
        assert order.shape == (steps * per_step,)
        assert len(set(order)) == len(order)
        assert set(order) <= set(range(n))
        epochs.append(tuple(order))
    if n > 7:
        assert len(set(epochs)) == 4
        first_of_another_seed = choose_prompts(n, per_step, 6, 0)
        assert tuple(first_of_another_seed) != epochs[0][:per_step]


def choose_prompts_of_steps(n, per_step, seed, steps):
    """Return the prompts of the steps, one step's behind the other's, (len(steps) * per_step,)."""
    return np.concatenate([choose_prompts(n, per_step, seed, step) for step in steps])


def test_the_epoch_does_not_depend_on_the_step_size_or_on_what_was_asked_before():
    by_five = choose_prompts_of_steps(40, 5, 1, range(8))
    by_eight = choose_prompts_of_steps(40, 8, 1, range(5))
    assert (by_five == by_eight).all()

    later = choose_prompts(40, 5, 1, 1003)
    later_copy = later.copy()
    later[:] = -1  # the caller's array is its own
    assert (choose_prompts(40, 5, 1, 1003) == later_copy).all()


def test_every_prompt_stands_everywhere_equally_often():
    counts = np.zeros((8, 8))
    places = np.arange(8)

    for epoch in range(4000):
        prompts = choose_prompts(8, 8, 3, epoch)
        counts[places, prompts] += 1

    chi_square = ((counts - 500) ** 2 / 500).sum()
    assert chi_square < 85  # 49 degrees of freedom, p = 0.001


@pytest.mark.parametrize("per_step", [0, 11])
def test_a_step_larger_than_the_data_is_refused(per_step):
    with pytest.raises(ValueError, match="ask for 1 to 10 a step"):
        choose_prompts(10, per_step, 0, 0)


def test_the_hash_is_splitmix64():
    # the first three outputs for seed 0 of the published generator: other machines and versions
    # must agree
    want = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]

    hashes = hash_keys(np.arange(3))

    assert hashes.tolist() == want


def test_uniforms_are_functions_of_their_keys_alone():
    prompts = np.array([3, 141, 59, 26, 2**40])
    block = draw_uniforms(7, 11, prompts, 8, 64)
    assert block.shape == (5, 8, 64)
    assert block.dtype == np.float64

    in_reverse = draw_uniforms(7, 11, prompts[::-1], 8, 64)
    fewer = draw_uniforms(7, 11, prompts[2:3], 3, 10)
    more = draw_uniforms(7, 11, prompts, 16, 100)
    of_a_list = draw_uniforms(7, 11, prompts.tolist(), 8, 64)
    of_no_prompt = draw_uniforms(7, 11, [], 8, 64)

    assert (in_reverse[::-1] == block).all()
    assert (fewer == block[2:3, :3, :10]).all()
    assert (more[:, :8, :64] == block).all()
    assert (of_a_list == block).all()
    assert of_no_prompt.shape == (0, 8, 64)

    blocks = [
        block,
        draw_uniforms(8, 11, prompts, 8, 64),
        draw_uniforms(7, 12, prompts, 8, 64),
        draw_uniforms(11, 7, prompts, 8, 64),
        draw_uniforms(-7, 11, prompts, 8, 64),
    ]
    uniforms = np.stack(blocks)
    assert len(np.unique(uniforms)) == uniforms.size


def test_uniforms_are_uniform():
    u = draw_uniforms(0, 0, np.arange(50), 40, 100).ravel()
    n = len(u)
    assert u.min() > 0
    assert u.max() < 1

    mean_error = abs(u.mean() - 1 / 2)
    variance_error = abs(u.var() - 1 / 12)
    assert mean_error < 4 * (1 / 12 / n) ** 0.5
    assert variance_error < 4 * (1 / 180 / n) ** 0.5

    ordered = np.sort(u)
    ranks = np.arange(n)
    above = (ordered - ranks / n).max()
    below = ((ranks + 1) / n - ordered).max()
    kolmogorov_smirnov = max(above, below) * n**0.5
    assert kolmogorov_smirnov < 1.95  # p = 0.001


def test_neighbours_are_unrelated_along_every_axis():
    block = np.empty((12, 12, 12, 12, 20))  # seed, step, prompt, sibling, token
    for seed in range(12):
        for step in range(12):
            block[seed, step] = draw_uniforms(seed, step, np.arange(12), 12, 20)

    for axis in range(5):
        size = block.shape[axis]
        for lag in (1, 2):
            a = np.take(block, range(size - lag), axis).ravel()
            b = np.take(block, range(lag, size), axis).ravel()
            bound = 4 / len(a) ** 0.5
            assert abs(correlate(a, b)) < bound, (axis, lag)
            assert abs(correlate((a - 0.5) ** 2, (b - 0.5) ** 2)) < bound, (axis, lag)


def correlate(a, b):
    """Return Pearson's correlation of two arrays (n,)."""
    return np.corrcoef(a, b)[0, 1]


def test_the_extremes_of_the_hash_stay_inside_zero_and_one():
    extremes = np.array([0, 2**64 - 1], np.uint64)

    low, high = to_unit_interval(extremes)

    assert 0 < low < 1e-15
    assert 1 - 1e-15 < high < 1


def test_shuffle_words():
    text = "one  two three four five six seven"
    for step in range(50):
        assert shuffle_words(text, 0.0, 0, step, 1) == text

    changed = 0
    for prompt in range(4000):
        shuffled = shuffle_words(text, 0.3, 1, 5, prompt)
        again = shuffle_words(text, 0.3, 1, 5, prompt)
        assert sorted(shuffled.split()) == sorted(text.split())
        assert shuffled == again
        changed += shuffled != text
    share_error = abs(changed / 4000 - 0.3)
    assert share_error < 4 * (0.3 * 0.7 / 4000) ** 0.5

    orders = [shuffle_words("a b c", 1.0, 0, step, 2) for step in range(6000)]
    for order in ("a b c", "a c b", "b a c", "b c a", "c a b", "c b a"):
        error = abs(orders.count(order) - 1000)
        assert error < 4 * 1000**0.5

    assert shuffle_words("", 1.0, 0, 0, 0) == ""
    assert shuffle_words("one", 1.0, 0, 0, 0) == "one"
    with pytest.raises(ValueError, match=r"in \[0, 1\]"):
        shuffle_words(text, 1.5, 0, 0, 0)
