"""`--dry-run`: the whole run of a config, one step long, on a tiny random model of its architecture
and tiny data of its formats. No hub, no GPU.

Family and shape come from the model folder's config.json, or from shapes.yaml beside the config;
where both are there they must agree. The tokenizer has the 256 bytes and eight whole answers of the
task, which the random model favours: rewards differ, so the step has a gradient. (A task of a
user's own may ask for other answers: then none of them is parsable, and the gradient is 0.)
"""

from __future__ import annotations

import gzip
import json
import tempfile
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Iterator

import torch
import yaml
from tokenizers import AddedToken, pre_tokenizers

from recr1.config.schema import Config, ConfigError
from recr1.data.chat_template import ends_thought
from recr1.data.readers import is_test, is_validation
from recr1.distributed import collectives as dist
from recr1.model.decoder import Decoder
from recr1.model.hf_config import parse_config, read_config
from recr1.model.hf_weights import save_model
from recr1.model.rope import DecoderConfig
from recr1.training.checks import check_lengths

SHOWN = 8  # candidates of a row

ORDERS = [
    [f"Item_{1 + (i * step + shift) % SHOWN}" for i in range(SHOWN)]
    for step in (1, 3, 5, 7)
    for shift in (0, 2)
]

WORDS = "lamp chair table shirt kettle guitar camera bicycle".split()

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@contextmanager
def shrunk_config(cfg: Config, path: str) -> Iterator[Config]:
    """The config (read from the file `path`) with everything large made tiny, in a temporary folder
    of its own. Raises ConfigError.
    """
    shape = read_model_shape(cfg.model.path, path)
    check_lengths(cfg, shape.max_position_embeddings)
    with tempfile.TemporaryDirectory(prefix="recr1-dry-run-") as own:
        folder = Path(dist.broadcast_from_rank0(own))  # rank 0's serves all
        with dist.fail_together():
            if dist.rank() == 0:
                _write_policy(shape, folder / "policy", _list_answers(cfg))
                _write_data(cfg, folder)
                if (teacher := _prepare_teacher(cfg, folder)) not in ("", "self"):
                    _write_teacher(Path(teacher), _list_answers(cfg))
                if cfg.retriever.encoder:
                    _write_encoder(folder)
        d = cfg.data
        r = cfg.retriever
        yield replace(
            cfg,
            run=replace(cfg.run, dir=str(folder / "run")),
            model=replace(cfg.model, path=str(folder / "policy")),
            data=replace(
                d,
                **{
                    key: str(folder / _name_data_file(key, getattr(d, key)))
                    for key in _FILES
                    if getattr(d, key)
                },
            ),
            retriever=replace(
                r, index_dir=str(folder / "index"), encoder=r.encoder and str(folder / "encoder")
            ),
            prompt=replace(cfg.prompt, max_tokens=4096),
            sampling=replace(cfg.sampling, max_new_tokens=8),
            train=replace(
                cfg.train,
                steps=1,
                prompts_per_step=4,
                tokens_per_micro_batch=8192,
                eval_every=min(1, cfg.train.eval_every),
            ),
            save=replace(cfg.save, every=1),
            log=replace(cfg.log, track="none"),
            sft=replace(
                cfg.sft, teacher=_prepare_teacher(cfg, folder), keep="all", least=0.0, epochs=0
            ),
        )


def read_model_shape(model: str, config_path: str) -> DecoderConfig:
    """The shape that model.path stands for, without a download."""
    table = Path(config_path).parent / "shapes.yaml"
    shape = None
    raw = (yaml.safe_load(table.read_text(encoding="utf-8")) if table.exists() else {}).get(model)
    listed = parse_config(raw, f"{table}: {model}") if raw else None
    if (Path(model) / "config.json").exists():
        shape = read_config(model)
    if listed and shape and listed != shape:
        raise ConfigError(
            f"{table}: {model} is said to be {listed}, its config.json says {shape}; correct the table"
        )
    if not (listed or shape):
        raise ConfigError(
            f"model.path: {model!r} is no model folder here and {table} has no entry of that name; add its shape there for --dry-run"
        )
    return shape or listed


def _list_answers(cfg: Config) -> list[str]:
    """Whole completions; where the prompt closes the thought, without its end."""
    bodies = [{"query": word} for word in WORDS]
    if key := {"rerank": "reranked_items", "recommend_list": "items"}.get(cfg.task):
        bodies = [{key: order} for order in ORDERS]
    return [
        "</think>" * (not ends_thought(cfg.prompt.assistant))
        + f"<answer>{json.dumps(body)}</answer>"
        for body in bodies
    ]


def _write_policy(shape: DecoderConfig, folder: Path, answers: list[str]) -> None:
    """A random model of the family, which writes `answers`: kv heads, tying, rope scaling as in
    `shape`, widths tiny.
    """
    from transformers import Qwen2Tokenizer

    vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Qwen2Tokenizer(
        vocab=vocab, merges=[], unk_token=SPECIAL[0], pad_token=SPECIAL[0], eos_token=SPECIAL[2]
    )
    tokenizer.add_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in answers])
    tokenizer.chat_template = TEMPLATE
    kv = min(2, shape.num_key_value_heads)
    heads = kv * min(3, shape.num_attention_heads // shape.num_key_value_heads)
    tiny = replace(
        shape,
        vocab_size=len(tokenizer) + 5,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        head_dim=8,
        max_position_embeddings=8192,
    )
    model = Decoder(tiny)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim > 1:
                p.normal_(0, 0.02, generator=g)
        # all hidden states lie near one direction; a token is written the more often the further
        # its row reaches along it
        along = torch.zeros(tiny.vocab_size).fill_(0.3)
        along[tokenizer.convert_tokens_to_ids([*answers, SPECIAL[2]])] = torch.tensor(
            [1.0] * len(answers) + [1.3]
        )
        direction = torch.nn.functional.normalize(torch.randn(48, generator=g), dim=0)
        model.model.embed_tokens.weight += along[:, None] * direction
        if not tiny.tie_word_embeddings:
            model.lm_head.weight += along[:, None] * direction
    save_model(
        tiny,
        model.state_dict().items(),
        tokenizer,
        frozenset([tokenizer.eos_token_id]),
        str(folder),
    )


def _write_encoder(folder: Path) -> None:
    """A random BERT on the policy's tokenizer: of an encoder that retriever.encoder names nothing
    is known without a download.
    """
    # seconds, which a run that is none of these does not wait for
    from transformers import AutoTokenizer, BertConfig, BertModel

    tokenizer = AutoTokenizer.from_pretrained(folder / "policy")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = BertModel(
            BertConfig(
                vocab_size=len(tokenizer),
                hidden_size=32,
                num_hidden_layers=1,
                num_attention_heads=2,
                intermediate_size=32,
                max_position_embeddings=8192,
            )
        )
    model.save_pretrained(folder / "encoder")
    tokenizer.save_pretrained(folder / "encoder")


def _prepare_teacher(cfg: Config, folder: Path) -> str:
    given = cfg.sft.teacher
    return (
        given
        if given in ("", "self")
        else str(folder / f"teacher.jsonl{'.gz' * given.endswith('.gz')}")
    )


def _write_teacher(path: Path, answers: list[str]) -> None:
    """A whole answer to each train query that is not held out. The rule of sft.keep is left to the
    real texts: these are all as good as the query.
    """
    ids = [q for q in TRAIN_QUERIES if not is_validation(q) and not is_test(q)]
    rows = [dict(id=q, text=answers[TRAIN_QUERIES.index(q) % len(answers)]) for q in ids]
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)


TRAIN_QUERIES = [f"train{i}" for i in range(64)]

_FILES = dict(
    corpus="corpus.jsonl",
    train_queries="train.queries.jsonl",
    train_qrels="train.qrels.tsv",
    test_queries="test.queries.jsonl",
    test_qrels="test.qrels.tsv",
)


def _name_data_file(key: str, like: str) -> str:
    return _FILES[key] + (".gz" if like.endswith(".gz") else "")


def _write_data(cfg: Config, folder: Path) -> None:
    """Queries of one word; every document of that word is relevant. As many that no split is empty.
    Rows have the keys of every task.
    """

    def ids(split, n):
        return [f"{split}{i}" for i in range(n)]

    assert any(map(is_validation, TRAIN_QUERIES)) and any(map(is_test, TRAIN_QUERIES))
    word = {
        q: WORDS[i % len(WORDS)]
        for n, split in ((64, "train"), (8, "test"))
        for i, q in enumerate(ids(split, n))
    }
    lines = {
        "corpus": [
            json.dumps(
                dict(
                    id=f"d{i}",
                    title=f"{w} {i}",
                    text=f"a {w} and a {WORDS[i % 5]}",
                    category=w,
                    genres=[w, WORDS[i % 3]],
                    popularity=i,
                )
            )
            for i, w in enumerate(WORDS * 3)
        ]
    }
    for split in ("train", "test"):
        mine = [q for q in word if q.startswith(split)]
        lines[f"{split}_queries"] = [
            json.dumps(
                dict(
                    id=q,
                    text=f"a {word[q]}",
                    profile=f"likes a {word[q]}",
                    history=[[f"d{i % 3}", "2024-01-01"]],
                    candidates=[f"d{d}" for d in range(SHOWN)],
                )
            )
            for i, q in enumerate(mine)
        ]
        lines[f"{split}_qrels"] = [
            f"{q}\td{d}\t{1 + d % 2}"
            for q in mine
            for d in range(len(WORDS) * 3)
            if WORDS[d % len(WORDS)] == word[q]
        ]
    for key, rows in lines.items():
        like = getattr(cfg.data, key)
        if like:
            text = "".join(row + "\n" for row in rows).encode()
            (folder / _name_data_file(key, like)).write_bytes(
                gzip.compress(text) if like.endswith(".gz") else text
            )
