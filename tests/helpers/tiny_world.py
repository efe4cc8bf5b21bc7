"""A small world for tests: tokenizer, policy, corpus and config, made in memory or written into a
folder in well under a second.
"""

from __future__ import annotations

import functools
import gzip
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Callable

import torch
import yaml
from tokenizers import AddedToken, pre_tokenizers, trainers
from transformers import Qwen2Tokenizer

from recr1 import train
from recr1.data.readers import is_validation
from recr1.model.decoder import Decoder
from recr1.model.hf_weights import save_model
from recr1.model.rope import DecoderConfig, RopeScaling
from recr1.training.launch import run_guarded

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROLES = ["<|endoftext|>", "<|end|>", "<|im_end|>", "<|system|>", "<|user|>", "<|assistant|>"]
CONTRACT = ["<think>", "</think>", "<answer>", "</answer>", '{"query": "', '"}']
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
COLOURS = ["red", "green", "blue", "black", "white"]
THINGS = ["lamp", "chair", "table", "shirt", "kettle", "guitar", "camera", "bicycle"]
MORE = (
    "find buy the a cheap good for my house and with old new small big "
    "naïve café ユーザー 12 345 don't Assistant: user"
).split()


@functools.cache
def vocabulary():
    core = Qwen2Tokenizer()._tokenizer
    texts = [f"a {c} {t} {m}" for c in COLOURS for t in THINGS for m in MORE]
    core.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=400 - len(ROLES) - len(CONTRACT),
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    model = json.loads(core.to_str())["model"]
    return model["vocab"], [tuple(m) for m in model["merges"]]


def tiny_tokenizer() -> Qwen2Tokenizer:
    """Qwen2's byte-level BPE over about 400 ids; roles are special tokens, the answer contract's
    pieces are added but not special.
    """
    vocab, merges = vocabulary()
    tokenizer = Qwen2Tokenizer(
        vocab=dict(vocab),
        merges=list(merges),
        unk_token=ROLES[0],
        pad_token=ROLES[0],
        eos_token="<|end|>",
    )
    tokenizer.add_tokens([AddedToken(t, special=True, normalized=False) for t in ROLES])
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in CONTRACT])
    tokenizer.chat_template = TEMPLATE
    return tokenizer


FAMILIES = {  # overrides of tiny_config, each with what only this family has
    "qwen2": dict(family="qwen2"),
    "qwen3": dict(family="qwen3", head_dim=16, tie_word_embeddings=True),
    # of the six pairs one turns more than 4 times in 48 positions, one between, four less than once
    "llama": dict(
        family="llama",
        rope_scaling=RopeScaling(
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=48,
        ),
    ),
}


def tiny_config(**overrides) -> DecoderConfig:
    base = dict(
        family="qwen2",
        vocab_size=len(tiny_tokenizer()),
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        rms_norm_eps=1e-6,
        rope_theta=10000.0,
        rope_scaling=None,
        tie_word_embeddings=False,
        max_position_embeddings=512,
    )
    return DecoderConfig(**base | overrides)


def tiny_model(
    seed: int = 0, std: float = 0.2, reachable: int | None = None, **overrides
) -> Decoder:
    """Random weights, none of them at a value that hides a missing term: biases are not 0, norms
    not 1.
    """
    model = Decoder(tiny_config(**overrides), reachable)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(0, std, generator=generator)
            if "norm" in name:
                p += 1
    return model


def oracle(model: Decoder) -> PreTrainedModel:
    """transformers' model with the same shape and weights. Its generation settings are cleared."""
    # seconds, which a rank of a torchrun job does not wait for
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = asdict(model.config)
    family = settings.pop("family")
    scaling = settings.pop("rope_scaling")
    rope = dict(rope_theta=settings.pop("rope_theta"), rope_type="default")
    if scaling:
        rope |= dict(rope_type="llama3", **scaling)
    no_tokens = dict(bos_token_id=None, eos_token_id=None, pad_token_id=None)
    config = AutoConfig.for_model(family, **settings, rope_parameters=rope, **no_tokens)
    hf_model = AutoModelForCausalLM.from_config(config)
    state = dict(model.state_dict())
    if settings["tie_word_embeddings"]:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    hf_model.to(model.head_weight.dtype).load_state_dict(state)
    return hf_model.eval()


def answering_model(seed: int = 0, **overrides) -> Decoder:
    """A random model that mostly writes well-formed answers of the corpus' words: rewards differ
    between siblings.
    """
    model = tiny_model(seed, std=0.05, **overrides)
    tokenizer = tiny_tokenizer()
    think, close_think, answer, close_answer, start, end = tokenizer.convert_tokens_to_ids(CONTRACT)
    words = [tokenizer(" " + w)["input_ids"][0] for w in COLOURS + THINGS]
    follows = [
        (think, [close_think], 9.0),
        (close_think, [answer], 9.0),
        (answer, [start], 9.0),
        (start, words, 8.0),
        (end, [close_answer], 9.0),
        (close_answer, [tokenizer.eos_token_id], 9.0),
    ]
    follows += [(w, words, 5.0) for w in words] + [(w, [end], 8.0) for w in words]
    with torch.no_grad():
        embed = model.model.embed_tokens.weight.normal_(
            0, 1, generator=torch.Generator().manual_seed(seed)
        )
        # hidden is close to embed[a] of length sqrt(C): logit(next) is about `logit`
        for a, nexts, logit in follows:
            model.lm_head.weight[nexts] += logit * embed[a] / embed[a].norm() ** 2
    return model


def save(model: Decoder, folder, tokenizer=None, stops=frozenset([5]), **settings) -> None:
    save_model(
        model.config,
        model.state_dict().items(),
        tokenizer or tiny_tokenizer(),
        stops,
        str(folder),
        **settings,
    )


def write_policy(folder, seed: int = 0, **overrides) -> str:
    """An HF folder with the answering model (untied)."""
    tokenizer = tiny_tokenizer()
    save(answering_model(seed, **overrides), folder, tokenizer, frozenset([tokenizer.eos_token_id]))
    return str(folder)


def write_data(folder) -> dict[str, str]:
    """Write 40 products, each a color and a thing; 60 train and 12 test queries.

    The judgements of a query are the products of its color and thing. Returns the data settings.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    products = [(color, thing) for color in COLOURS for thing in THINGS]
    lines = {"corpus.jsonl": format_products(products)}
    for split, count, step in (("train", 60, 7), ("test", 12, 11)):
        # (query id, the product it looks for)
        wanted = [(f"{split}{i}", i * step % len(products)) for i in range(count)]
        lines[f"{split}.queries.jsonl"] = format_queries(wanted, products)
        lines[f"{split}.qrels.tsv"] = [
            f"{query}\td{product}\t{1 + i % 3}" for i, (query, product) in enumerate(wanted)
        ]
    for name, lines_of_file in lines.items():
        text = "".join(line + "\n" for line in lines_of_file)
        (folder / name).write_text(text, encoding="utf-8")

    held_out = [is_validation(f"train{i}") for i in range(60)]
    assert any(held_out)
    assert not all(held_out)
    return dict(
        corpus=str(folder / "corpus.jsonl"),
        train_queries=str(folder / "train.queries.jsonl"),
        train_qrels=str(folder / "train.qrels.tsv"),
        test_queries=str(folder / "test.queries.jsonl"),
        test_qrels=str(folder / "test.qrels.tsv"),
    )


def format_products(products: list[tuple[str, str]]) -> list[str]:
    """Format a document per product as lines of JSON."""
    lines = []
    for i, (color, thing) in enumerate(products):
        text = f"a {MORE[i % len(MORE)]} {thing} for my house"
        document = dict(id=f"d{i}", title=f"{color} {thing}", text=text)
        lines.append(json.dumps(document, ensure_ascii=False))
    return lines


def format_queries(wanted: list[tuple[str, int]], products: list[tuple[str, str]]) -> list[str]:
    """Format a query per (id, product) as lines of JSON: the color, or the thing, and a word."""
    lines = []
    for i, (query, product) in enumerate(wanted):
        word = products[product][i % 2]
        row = dict(id=query, text=f"{word} {MORE[i % len(MORE)]}")
        lines.append(json.dumps(row, ensure_ascii=False))
    return lines


def write_yaml(folder, **dotted_overrides) -> str:
    """A config of three quick GRPO steps, with its policy and data beside it. Overrides:
    write_yaml(f, **{"train.steps": 2}).
    """
    folder = Path(folder)
    tree = dict(
        task="product_search",
        run=dict(dir=str(folder / "run"), seed=0, threads=1),
        model=dict(path=write_policy(folder / "policy")),
        data=write_data(folder / "data"),
        retriever=dict(index_dir=str(folder / "index")),
        prompt=dict(user="find: {query}", max_tokens=64),
        reward=dict(k_train=20, k_eval=10, bonus=0.0, miss=0.0, unparsable=-1.0),
        sampling=dict(group_size=4, temperature=1.0, max_new_tokens=12),
        loss=dict(advantage_eps=0.1),
        optimizer=dict(lr=1e-3, weight_decay=0.0),
        train=dict(steps=3, prompts_per_step=4, tokens_per_micro_batch=256, eval_every=2),
        log=dict(tokens_every=2),
    )
    for key, value in dotted_overrides.items():
        *sections, last = key.split(".")
        node = tree
        for name in sections:
            node = node.setdefault(name, {})
        node[last] = value
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(tree, allow_unicode=True), encoding="utf-8")
    return str(path)


def write_sft_yaml(folder, **dotted_overrides) -> str:
    """The same world for recr1.sft: by default three steps on the policy's own best of 4."""
    return write_yaml(folder, **{"loss": {}, "log": {}, "sft.teacher": "self"} | dotted_overrides)


def runs_of(main, config: str, folders) -> Callable[..., Path]:
    """run(overrides...) -> the folder of a finished run of the config; the same overrides run once,
    `again=1` once more. folders: tmp_path_factory.
    """

    @functools.cache
    def run(*overrides, again=0):
        folder = folders.mktemp("runs") / "run"
        assert run_guarded(main, [config, *overrides, f"run.dir={folder}"]) == 0
        return folder

    return run


def jsonl(path: Path) -> list[dict]:
    raw = path.read_bytes()
    return [
        json.loads(line)
        for line in (gzip.decompress(raw) if path.suffix == ".gz" else raw).split(b"\n")
        if line
    ]


def refused(argv, capsys, main=train.main) -> str:
    """The one line on stderr of a run that exits with 2."""
    capsys.readouterr()
    assert run_guarded(main, argv) == 2
    err = capsys.readouterr().err
    assert err.startswith("recr1: ")
    assert err.count("\n") == 1
    assert err.endswith("\n")
    assert "Traceback" not in err
    return err
