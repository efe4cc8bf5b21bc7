"""`recr1 generate`: what it streams, when, and what it says of what it cannot do. The sampled ids
themselves: test_sampling.py.
"""

import json
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
    """(argv of a policy with its prompt, the corpus' flags, the policy's folder, the config)."""
    folder = tmp_path_factory.mktemp("generate")
    config = write_yaml(folder, **{"sampling.max_new_tokens": 40})
    model = str(folder / "policy")
    corpus = ["--corpus", str(folder / "data/corpus.jsonl")]
    return (
        ["generate", "--model", model, "--config", config],
        corpus,
        model,
        load_config(config, []),
    )


def run(capsys, *argv, code=0) -> tuple[str, str]:
    """What it wrote to the output and the error output, having ended with the code (None: any)."""
    capsys.readouterr()
    assert run_guarded(cli.main, list(argv)) == code or code is None
    return capsys.readouterr()


def decoded(ids) -> str:
    return TOKENIZER.decode([i for i in ids if i != EOS], clean_up_tokenization_spaces=False)


def generated(world, query, temperature=0.0, seed=0) -> str:
    """The text that the sampler writes for the query, without the command."""
    *_, model, cfg = world
    chat = ChatTemplate(TOKENIZER, cfg.prompt.system, cfg.prompt.user, cfg.prompt.assistant)
    new = cfg.sampling.max_new_tokens
    u = draw_uniforms(seed, 0, np.array([0]), 1, new) if temperature else None
    [rollout] = generate(
        load_model(model, len(TOKENIZER)),
        [Prompt("", 0, query, chat.prompt(query))],
        1,
        temperature or 1.0,
        new,
        frozenset([EOS]),
        u,
    )
    return decoded(rollout.ids)


@pytest.mark.parametrize("how", [{}, dict(temperature=0.3, seed=3), dict(temperature=0.3)])
def test_the_text_is_the_samplers_and_the_hits_are_those_of_search(world, capsys, how):
    argv, corpus, *_ = world
    options = [f"--{name}={value}" for name, value in how.items()]
    text = generated(world, "red lamp", **how)
    query, error = parse_query(text)
    assert error is None
    assert "\n" not in text
    out, err = run(capsys, *argv, *corpus, *options, "red lamp", "-k", "3")
    raw, rewritten = (
        run(capsys, "search", *corpus, words, "-k", "3")[0] for words in ("red lamp", query)
    )
    assert out == f"{text}\n{query}\n\nraw: red lamp\n{raw}\nrewritten: {query}\n{rewritten}"
    assert not err
    assert run(capsys, *argv, *options, "red lamp")[0] == f"{text}\n{query}\n"


def test_a_seed_draws_one_text_and_seeds_differ(world, capsys):
    argv = world[0]
    texts = {
        seed: run(
            capsys,
            *argv,
            "--temperature=1",
            *([f"--seed={seed}"] if seed else []),
            "lamp",
            code=None,
        )[0]
        for seed in ("", *"012")
    }
    assert texts[""] == texts["0"]
    assert len(set(texts.values())) == 3
    assert all(
        texts[str(seed)].startswith(
            cli.make_printable(generated(world, "lamp", 1.0, seed), keep="\n") + "\n"
        )
        for seed in range(3)
    )


@pytest.mark.parametrize("text", [HARD, "\ufffd", "a \ufffd", "😀😀", ""])
def test_characters_are_written_once_they_are_whole(text):
    ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    written = []
    with TextStream(decoded, written.append) as stream:
        for n, id in enumerate(ids, 1):
            stream.hear(id)
            # nothing is held back that is whole
            assert "".join(written) == decoded(ids[:n]).rstrip("\ufffd")
    assert "".join(written) == text + "\n"
    assert "\ufffd" in text or not any("\ufffd" in piece for piece in written)
    if text == HARD:
        split = [i for i in ids if "\ufffd" in decoded([i])]
        assert len(split) > 10 and len(written) > 20, (
            "the tiny tokenizer has whole tokens for these: the test says nothing"
        )


def test_bytes_that_never_become_a_character_are_written_at_the_end():
    half = TOKENIZER("😀")["input_ids"][:2]
    written = []
    with TextStream(decoded, written.append) as stream:
        for id in TOKENIZER("a")["input_ids"] + half:
            stream.hear(id)
        assert written == ["a"]
    assert written == ["a", "\ufffd\n"]


def chain(folder, ids, new) -> list[str]:
    """A policy that writes these ids one after the other, each a different one, and then again from
    the second; its command.
    """
    model = answering_model()
    with torch.no_grad():
        embed = model.model.embed_tokens.weight
        for a, b in zip(ids, ids[1:]):
            model.lm_head.weight[b] += 40 * embed[a] / embed[a].norm() ** 2
    save(model, folder / "policy", TOKENIZER, frozenset([EOS]))
    (folder / "recipe.yaml").write_text(
        f"prompt: {{user: 'find: {{query}}', max_tokens: 64}}\n"
        f"sampling: {{max_new_tokens: {new}}}\n"
    )
    return ["generate", "--model", str(folder / "policy"), "--config", str(folder / "recipe.yaml")]


# The command, waiting after each piece of text that it has written: what is to come while it is
# at work comes in time, however busy the machine is. A shell starts what it runs in the background
# with SIGINT ignored, and the tests may run there: the command must hear it all the same.
SLOWLY = """
import signal
import time
from recr1 import cli
signal.signal(signal.SIGINT, signal.default_int_handler)
write = cli.print_now
cli.print_now = lambda text: (write(text), time.sleep(0.1))
cli.run_console_script()
"""


def subprocess_of(argv, program=("-m", "recr1.cli"), **how) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, *program, *argv],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1"),
        **how,
    )


def test_a_pipe_gets_whole_characters_while_the_text_is_sampled(tmp_path, monkeypatch):
    """A thought of an emoji, each of whose bytes is a token of its own: in process what is written
    and flushed when, and the bytes of a pipe.
    """
    think, close_think, answer, close_answer, start, end = TOKENIZER.convert_tokens_to_ids(CONTRACT)
    emoji, [word] = TOKENIZER("😀")["input_ids"], TOKENIZER(" lamp")["input_ids"]
    argv = chain(
        tmp_path, [think, *emoji, close_think, answer, start, word, end, close_answer, EOS], 40
    )
    text = '😀</think><answer>{"query": " lamp"}</answer>'
    assert len(set(emoji)) == len(emoji) == 4

    class Terminal(list):
        def write(self, piece):
            self.append(piece)

        def flush(self):
            self.append(None)

    with monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", Terminal())
        assert run_guarded(cli.main, [*argv, "x"]) == 0
        pieces = sys.stdout
    pieces = pieces[: pieces.index("\n") + 1]
    assert [p for p in pieces if p] == [
        "😀",
        "</think>",
        "<answer>",
        '{"query": "',
        " lamp",
        '"}',
        "</answer>",
        "\n",
    ]
    assert all(pieces[i + 1] is None for i, p in enumerate(pieces[:-1]) if p), (
        "a piece was not flushed"
    )
    out, err = subprocess_of([*argv, "x"]).communicate(timeout=120)
    assert out.decode("utf-8") == f"{text}\nlamp\n"
    assert b"Traceback" not in err


def test_control_characters_of_the_policy_do_not_reach_the_terminal_but_lines_do(tmp_path, capsys):
    think, close_think, *_ = TOKENIZER.convert_tokens_to_ids(CONTRACT)
    [escape], [line], [x] = (TOKENIZER(c)["input_ids"] for c in ("\x1b", "\n", "x"))
    out, err = run(capsys, *chain(tmp_path, [think, escape, line, x, EOS], 10), "q", code=2)
    assert out == " \nx\n"
    assert "no_think_end" in err


def test_a_text_without_an_answer_is_shown_and_said_to_hold_none(world, tmp_path, capsys):
    argv, corpus, model, cfg = world
    (tmp_path / "short.yaml").write_text(
        "prompt: {user: 'find: {query}', max_tokens: 64}\nsampling: {max_new_tokens: 2}\n"
    )
    out, err = run(
        capsys,
        "generate",
        "--model",
        model,
        "--config",
        str(tmp_path / "short.yaml"),
        *corpus,
        "lamp",
        code=2,
    )
    assert len(out.splitlines()) == 1
    assert generated(world, "lamp").startswith(out.rstrip("\n"))
    assert err.startswith("recr1: ")
    assert err.count("\n") == 1
    assert "holds no query (" in err
    assert "sampling.max_new_tokens = 2" in err


def test_ctrl_c_and_a_closed_pipe_end_in_what_was_written(tmp_path):
    words = [TOKENIZER(f" {w}")["input_ids"][0] for w in ("lamp", "chair")]
    # without an end
    argv = chain(tmp_path, [TOKENIZER.convert_tokens_to_ids("<think>"), *words, words[0]], 440)
    asked = subprocess_of([*argv, "x"], ("-c", SLOWLY))
    assert asked.stdout.read(5) == b" lamp"
    asked.send_signal(signal.SIGINT)
    rest, err = asked.communicate(timeout=120)
    assert asked.returncode == 130
    assert not err.strip()
    assert rest.endswith(b"\n")
    assert set(rest.split()) <= {b"lamp", b"chair"} and len(rest.split()) < 439, (
        "the text was finished before the signal came"
    )
    closed = subprocess_of([*argv, "x"], ("-c", SLOWLY))
    assert closed.stdout.read(5) == b" lamp"
    closed.stdout.close()
    assert b"Traceback" not in closed.stderr.read()
    assert closed.wait(120) == 0


def test_bad_input_is_one_line_before_anything_is_sampled(world, tmp_path, capsys):
    argv, corpus, model, _ = world

    def refused(*args) -> str:
        out, err = run(capsys, *args, code=2)
        assert not out
        assert err.startswith("recr1: ")
        assert err.count("\n") == 1
        return err

    assert "no/such/folder" in refused("generate", "--model", "no/such/folder", "x")
    assert (
        "recr1.yaml: no such file" in (err := refused("generate", "--model", model, "x"))
        and "--config" in err
    )
    assert "nowhere.yaml: no such file" in refused(
        "generate", "--model", model, "--config", "nowhere.yaml", "x"
    )
    assert "nowhere.jsonl: no such file" in refused(*argv, "--corpus", "nowhere.jsonl", "x")
    (tmp_path / "bad.jsonl").write_text(json.dumps(dict(title="no id")) + "\n")
    assert "bad.jsonl:1" in refused(*argv, "--corpus", str(tmp_path / "bad.jsonl"), "x")
    assert "prompt.max_tokens is 64" in (err := refused(*argv, "lamp " * 100)) and argv[-1] in err
    assert "--temperature 1" in refused(*argv, "--seed", "1", "x")


@pytest.mark.parametrize(
    "options, said",
    [
        (["--temperature", "-1"], "from 0.001"),
        (["--temperature", "nan"], "from 0.001"),
        (["--temperature", "1e-9"], "from 0.001"),
        (["--temperature", "hot"], "from 0.001"),
        (["--seed", "-1", "--temperature", "1"], "whole number"),
        (["--seed", str(2**64)], "whole number"),
        (["-k", "0"], "from 1"),
        (["a\udcff"], "not UTF-8"),
    ],
)
def test_bad_options_are_refused(options, said, capsys):
    with pytest.raises(SystemExit) as e:
        cli.main(["generate", "--model", "m", *options, *([] if "a\udcff" in options else ["x"])])
    assert e.value.code == 2
    assert said in capsys.readouterr().err
