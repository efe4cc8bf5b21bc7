"""`recr1 generate`: what it streams, when, and what it says of what it cannot do. The sampled ids
themselves: test_sampling.py.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.tiny_world import CONTRACT, answering_model, save, tiny_tokenizer, write_yaml

from recr1 import cli
from recr1.commands.rewrite import TextStream
from recr1.config.loader import load_config
from recr1.data.chat_template import ChatTemplate
from recr1.data_types import Prompt
from recr1.model.hf_weights import load_model
from recr1.sampling.generate import generate
from recr1.tasks.answer_parser import parse_query
from recr1.training.launch import run_guarded
from recr1.utils.counter_rng import draw_uniforms

ROOT = Path(__file__).resolve().parents[3]
TOKENIZER = tiny_tokenizer()
EOS = TOKENIZER.eos_token_id
HARD = "naïve 😀 ユーザー 👩‍👩‍👧 don't  two  spaces\nand a line ﬁn é"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Return (argv of a policy with its prompt, the corpus' flags, the policy's folder, config)."""
    folder = tmp_path_factory.mktemp("generate")
    config = write_yaml(folder, **{"sampling.max_new_tokens": 40})
    model = str(folder / "policy")
    argv = ["generate", "--model", model, "--config", config]
    corpus = ["--corpus", str(folder / "data/corpus.jsonl")]
    return argv, corpus, model, load_config(config, [])


def run(capsys, *argv, code=0) -> tuple[str, str]:
    """Run the command; return its output and error output, once it has ended with the code (None:
    with any).
    """
    capsys.readouterr()
    exit_code = run_guarded(cli.main, list(argv))
    assert code in (exit_code, None)
    return capsys.readouterr()


def decode(ids) -> str:
    text_ids = [id for id in ids if id != EOS]
    return TOKENIZER.decode(text_ids, clean_up_tokenization_spaces=False)


def sample_text(world, query, temperature=0.0, seed=0) -> str:
    """Return the text that the sampler writes for the query, without the command."""
    _, _, model, cfg = world
    chat = ChatTemplate(TOKENIZER, cfg.prompt.system, cfg.prompt.user, cfg.prompt.assistant)
    prompt = Prompt("", 0, query, chat.prompt(query))
    max_new_tokens = cfg.sampling.max_new_tokens
    uniforms = None
    if temperature:
        uniforms = draw_uniforms(seed, 0, np.array([0]), 1, max_new_tokens)

    [rollout] = generate(
        load_model(model, len(TOKENIZER)),
        [prompt],
        1,
        temperature or 1.0,
        max_new_tokens,
        frozenset([EOS]),
        uniforms,
    )
    return decode(rollout.ids)


@pytest.mark.parametrize("how", [{}, dict(temperature=0.3, seed=3), dict(temperature=0.3)])
def test_the_text_is_the_samplers_and_the_hits_are_those_of_search(world, capsys, how):
    argv, corpus, *_ = world
    options = [f"--{name}={value}" for name, value in how.items()]
    text = sample_text(world, "red lamp", **how)
    query, error = parse_query(text)
    assert error is None
    assert "\n" not in text

    out, err = run(capsys, *argv, *corpus, *options, "red lamp", "-k", "3")
    without_hits, _ = run(capsys, *argv, *options, "red lamp")

    raw, _ = run(capsys, "search", *corpus, "red lamp", "-k", "3")
    rewritten, _ = run(capsys, "search", *corpus, query, "-k", "3")
    assert out == f"{text}\n{query}\n\nraw: red lamp\n{raw}\nrewritten: {query}\n{rewritten}"
    assert not err
    assert without_hits == f"{text}\n{query}\n"


def test_a_seed_draws_one_text_and_seeds_differ(world, capsys):
    argv = world[0]

    without_seed, _ = run(capsys, *argv, "--temperature=1", "lamp", code=None)
    texts = []
    for seed in range(3):
        text, _ = run(capsys, *argv, "--temperature=1", f"--seed={seed}", "lamp", code=None)
        texts.append(text)

    assert without_seed == texts[0]
    assert len(set(texts)) == 3
    for seed, text in enumerate(texts):
        sampled = sample_text(world, "lamp", 1.0, seed)
        assert text.startswith(cli.make_printable(sampled, keep="\n") + "\n")


@pytest.mark.parametrize("text", [HARD, "\ufffd", "a \ufffd", "😀😀", ""])
def test_characters_are_written_once_they_are_whole(text):
    ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]

    written = []
    with TextStream(decode, written.append) as stream:
        for count, id in enumerate(ids, 1):
            stream.hear(id)
            # nothing is held back that is a character already
            assert "".join(written) == decode(ids[:count]).rstrip("\ufffd")

    assert "".join(written) == text + "\n"
    if "\ufffd" not in text:
        for piece in written:
            assert "\ufffd" not in piece
    if text == HARD:
        # or the tiny tokenizer has tokens of these characters, and the test says nothing
        parts_of_characters = [id for id in ids if "\ufffd" in decode([id])]
        assert len(parts_of_characters) > 10
        assert len(written) > 20


def test_bytes_that_never_become_a_character_are_written_at_the_end():
    letter = TOKENIZER("a")["input_ids"]
    half_emoji = TOKENIZER("😀")["input_ids"][:2]

    written = []
    with TextStream(decode, written.append) as stream:
        for id in letter + half_emoji:
            stream.hear(id)
        assert written == ["a"]

    assert written == ["a", "\ufffd\n"]


def write_chain_policy(folder, ids, max_new_tokens) -> list[str]:
    """Write a policy that samples these ids one after the other, each a different one, and then
    again from the second; return its command.
    """
    model = answering_model()
    with torch.no_grad():
        embed = model.model.embed_tokens.weight
        for id, next_id in zip(ids, ids[1:]):
            direction = embed[id] / embed[id].norm() ** 2
            model.lm_head.weight[next_id] += 40 * direction
    policy = folder / "policy"
    save(model, policy, TOKENIZER, frozenset([EOS]))

    recipe = folder / "recipe.yaml"
    recipe.write_text(
        f"prompt: {{user: 'find: {{query}}', max_tokens: 64}}\n"
        f"sampling: {{max_new_tokens: {max_new_tokens}}}\n"
    )
    return ["generate", "--model", str(policy), "--config", str(recipe)]


# The command, waiting after each piece of text that it has written: what is to come while it is
# at work comes in time, however busy the machine is. A shell starts what it runs in the background
# with SIGINT ignored, and the tests may run there: the command must hear it all the same.
SLOWLY = """
import signal
import time
from recr1 import cli
signal.signal(signal.SIGINT, signal.default_int_handler)
write = cli.print_now
def write_slowly(text):
    write(text)
    time.sleep(0.1)
cli.print_now = write_slowly
cli.run_console_script()
"""


def start_process(argv, program=("-m", "recr1.cli")) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, *program, *argv],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1"),
    )


class Terminal(list):
    """An output that lists what is written to it, and a None for every flush."""

    def write(self, piece):
        self.append(piece)

    def flush(self):
        self.append(None)


def test_a_pipe_gets_whole_characters_while_the_text_is_sampled(tmp_path, monkeypatch):
    """A thought of an emoji, each of whose bytes is a token of its own: in process what is written
    and flushed when, and the bytes of a pipe.
    """
    think, close_think, answer, close_answer, start, end = TOKENIZER.convert_tokens_to_ids(CONTRACT)
    emoji = TOKENIZER("😀")["input_ids"]
    [word] = TOKENIZER(" lamp")["input_ids"]
    assert len(emoji) == 4
    assert len(set(emoji)) == len(emoji)
    ids = [think, *emoji, close_think, answer, start, word, end, close_answer, EOS]
    argv = write_chain_policy(tmp_path, ids, 40)

    terminal = Terminal()
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", terminal)
        exit_code = run_guarded(cli.main, [*argv, "x"])
    assert exit_code == 0
    end_of_text = terminal.index("\n") + 1
    pieces = terminal[:end_of_text]
    assert [piece for piece in pieces if piece] == [
        "😀",
        "</think>",
        "<answer>",
        '{"query": "',
        " lamp",
        '"}',
        "</answer>",
        "\n",
    ]
    for piece, after in zip(pieces, pieces[1:]):
        if piece:
            assert after is None, "a piece was not flushed"

    out, err = start_process([*argv, "x"]).communicate(timeout=120)
    text = '😀</think><answer>{"query": " lamp"}</answer>'
    assert out.decode("utf-8") == f"{text}\nlamp\n"
    assert b"Traceback" not in err


def test_control_characters_of_the_policy_do_not_reach_the_terminal_but_lines_do(tmp_path, capsys):
    think = TOKENIZER.convert_tokens_to_ids("<think>")
    [escape] = TOKENIZER("\x1b")["input_ids"]
    [line_end] = TOKENIZER("\n")["input_ids"]
    [letter] = TOKENIZER("x")["input_ids"]
    argv = write_chain_policy(tmp_path, [think, escape, line_end, letter, EOS], 10)

    out, err = run(capsys, *argv, "q", code=2)

    assert out == " \nx\n"
    assert "no_think_end" in err


def test_a_text_without_an_answer_is_shown_and_said_to_hold_none(world, tmp_path, capsys):
    _, corpus, model, _ = world
    short = tmp_path / "short.yaml"
    short.write_text(
        "prompt: {user: 'find: {query}', max_tokens: 64}\nsampling: {max_new_tokens: 2}\n"
    )
    argv = ["generate", "--model", model, "--config", str(short), *corpus, "lamp"]

    out, err = run(capsys, *argv, code=2)

    text = out.rstrip("\n")
    assert len(out.splitlines()) == 1
    assert sample_text(world, "lamp").startswith(text)
    assert err.startswith("recr1: ")
    assert err.count("\n") == 1
    assert "holds no query (" in err
    assert "sampling.max_new_tokens = 2" in err


def test_ctrl_c_and_a_closed_pipe_end_in_what_was_written(tmp_path):
    think = TOKENIZER.convert_tokens_to_ids("<think>")
    lamp = TOKENIZER(" lamp")["input_ids"][0]
    chair = TOKENIZER(" chair")["input_ids"][0]
    # without an end
    argv = write_chain_policy(tmp_path, [think, lamp, chair, lamp], 440)

    interrupted = start_process([*argv, "x"], ("-c", SLOWLY))
    assert interrupted.stdout.read(5) == b" lamp"
    interrupted.send_signal(signal.SIGINT)
    rest, err = interrupted.communicate(timeout=120)
    words = rest.split()
    assert interrupted.returncode == 130
    assert not err.strip()
    assert rest.endswith(b"\n")
    assert set(words) <= {b"lamp", b"chair"}
    assert len(words) < 439, "the text was finished before the signal came"

    closed = start_process([*argv, "x"], ("-c", SLOWLY))
    assert closed.stdout.read(5) == b" lamp"
    closed.stdout.close()
    assert b"Traceback" not in closed.stderr.read()
    assert closed.wait(120) == 0


def test_bad_input_is_one_line_before_anything_is_sampled(world, tmp_path, capsys):
    argv, _, model, _ = world
    config = argv[-1]
    bad_corpus = tmp_path / "bad.jsonl"
    bad_corpus.write_text('{"title": "no id"}\n')

    err = read_refusal(capsys, "generate", "--model", "no/such/folder", "x")
    assert "no/such/folder" in err

    err = read_refusal(capsys, "generate", "--model", model, "x")
    assert "recr1.yaml: no such file" in err
    assert "--config" in err

    err = read_refusal(capsys, "generate", "--model", model, "--config", "nowhere.yaml", "x")
    assert "nowhere.yaml: no such file" in err

    err = read_refusal(capsys, *argv, "--corpus", "nowhere.jsonl", "x")
    assert "nowhere.jsonl: no such file" in err

    err = read_refusal(capsys, *argv, "--corpus", str(bad_corpus), "x")
    assert "bad.jsonl:1" in err

    err = read_refusal(capsys, *argv, "lamp " * 100)
    assert "prompt.max_tokens is 64" in err
    assert config in err

    err = read_refusal(capsys, *argv, "--seed", "1", "x")
    assert "--temperature 1" in err


def read_refusal(capsys, *argv) -> str:
    """Run the command; return the one line of its error, once it has ended with 2 and no output."""
    out, err = run(capsys, *argv, code=2)
    assert not out
    assert err.startswith("recr1: ")
    assert err.count("\n") == 1
    return err


# words of the command line, and what the error says
BAD_OPTIONS = [
    (["x", "--temperature", "-1"], "from 0.001"),
    (["x", "--temperature", "nan"], "from 0.001"),
    (["x", "--temperature", "1e-9"], "from 0.001"),
    (["x", "--temperature", "hot"], "from 0.001"),
    (["x", "--seed", "-1", "--temperature", "1"], "whole number"),
    (["x", "--seed", str(2**64)], "whole number"),
    (["x", "-k", "0"], "from 1"),
    (["a\udcff"], "not UTF-8"),
]


@pytest.mark.parametrize("options, message", BAD_OPTIONS)
def test_bad_options_are_refused(options, message, capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main(["generate", "--model", "m", *options])

    assert exit.value.code == 2
    assert message in capsys.readouterr().err
