"""A small world for tests: tokenizer, policy, corpus and config, made in memory or written into a
folder in well under a second.
"""

from __future__ import annotations

import copy
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
    """Train byte-level BPE on the corpus' words. Returns {token: id} and the merges."""
    texts = []
    for color in COLOURS:
        for thing in THINGS:
            for word in MORE:
                texts.append(f"a {color} {thing} {word}")
    trainer = trainers.BpeTrainer(
        vocab_size=400 - len(ROLES) - len(CONTRACT),
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    core = Qwen2Tokenizer()._tokenizer
    core.train_from_iterator(texts, trainer)

    model = json.loads(core.to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    return model["vocab"], merges


def tiny_tokenizer() -> Qwen2Tokenizer:
    """Build Qwen2's byte-level BPE over about 400 ids.

    Roles are special tokens, the answer contract's pieces are added but not special.
    """
    vocab, merges = vocabulary()
    tokenizer = Qwen2Tokenizer(
        vocab=dict(vocab),
        merges=list(merges),
        unk_token=ROLES[0],
        pad_token=ROLES[0],
        eos_token="<|end|>",
    )
    roles = [AddedToken(text, special=True, normalized=False) for text in ROLES]
    pieces = [AddedToken(text, special=False, normalized=False) for text in CONTRACT]
    tokenizer.add_tokens(roles)
    tokenizer.add_tokens(pieces)
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


DECODER_SHAPE = dict(
    family="qwen2",
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


def tiny_config(**overrides) -> DecoderConfig:
    settings = DECODER_SHAPE | overrides
    if "vocab_size" not in settings:
        settings["vocab_size"] = len(tiny_tokenizer())
    return DecoderConfig(**settings)


def tiny_model(
    seed: int = 0, std: float = 0.2, reachable: int | None = None, **overrides
) -> Decoder:
    """Draw random weights, none of them at a value that hides a missing term: biases are not 0,
    norms not 1.
    """
    config = tiny_config(**overrides)
    model = Decoder(config, reachable)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0, std, generator=generator)
            if "norm" in name:
                parameter += 1
    return model


def oracle(model: Decoder) -> PreTrainedModel:
    """Build transformers' model with the same shape and weights.

    Its generation settings are cleared.
    """
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
    hf_model.to(model.head_weight.dtype)
    hf_model.load_state_dict(state)
    return hf_model.eval()


def answering_model(seed: int = 0, **overrides) -> Decoder:
    """Build a random model that mostly writes well-formed answers of the corpus' words: rewards
    differ between siblings.
    """
    model = tiny_model(seed, std=0.05, **overrides)
    follows = list_likely_tokens(tiny_tokenizer())
    generator = torch.Generator().manual_seed(seed)
    embeddings = model.model.embed_tokens.weight
    with torch.no_grad():
        embeddings.normal_(0, 1, generator=generator)
        # hidden is close to embedding of length sqrt(C): logit(next) is about `logit`
        for token, next_tokens, logit in follows:
            embedding = embeddings[token]
            model.lm_head.weight[next_tokens] += logit * embedding / embedding.norm() ** 2
    return model


def list_likely_tokens(tokenizer: Qwen2Tokenizer) -> list[tuple[int, list[int], float]]:
    """List (token, tokens that are likely after it, their logit) of a well-formed answer."""
    think, close_think, answer, close_answer, start, end = tokenizer.convert_tokens_to_ids(CONTRACT)
    words = []
    for text in COLOURS + THINGS:
        first_id = tokenizer(" " + text)["input_ids"][0]
        words.append(first_id)
    follows = [
        (think, [close_think], 9.0),
        (close_think, [answer], 9.0),
        (answer, [start], 9.0),
        (start, words, 8.0),
        (end, [close_answer], 9.0),
        (close_answer, [tokenizer.eos_token_id], 9.0),
    ]
    for word in words:
        follows.append((word, words, 5.0))
    for word in words:
        follows.append((word, [end], 8.0))
    return follows


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
    """Write an HF folder with the answering model (untied); return its path."""
    model = answering_model(seed, **overrides)
    tokenizer = tiny_tokenizer()
    stops = frozenset([tokenizer.eos_token_id])
    save(model, folder, tokenizer, stops)
    return str(folder)


def write_data(folder) -> dict[str, str]:
    """Write 40 products, each a color and a thing; 60 train and 12 test queries.

    The judgements of a query are the products of its color and thing. Returns the data settings.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    products = []
    for color in COLOURS:
        for thing in THINGS:
            products.append((color, thing))
    corpus = format_products(products)
    write_lines(folder / "corpus.jsonl", corpus)
    write_split(folder, "train", 60, 7, products)
    write_split(folder, "test", 12, 11, products)

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


def write_split(
    folder: Path, split: str, count: int, step: int, products: list[tuple[str, str]]
) -> None:
    """Write `count` queries of a split, each looking for the product `step` places further on."""
    wanted = []
    qrels = []
    for i in range(count):
        query = f"{split}{i}"
        product = i * step % len(products)
        grade = 1 + i % 3
        wanted.append((query, product))
        qrels.append(f"{query}\td{product}\t{grade}")
    queries = format_queries(wanted, products)
    write_lines(folder / f"{split}.queries.jsonl", queries)
    write_lines(folder / f"{split}.qrels.tsv", qrels)


def write_lines(path: Path, lines: list[str]) -> None:
    text = "".join(line + "\n" for line in lines)
    path.write_text(text, encoding="utf-8")


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


# sections of write_yaml's config; run, model, data and retriever name files of its folder
SECTIONS = dict(
    prompt=dict(user="find: {query}", max_tokens=64),
    reward=dict(k_train=20, k_eval=10, bonus=0.0, miss=0.0, unparsable=-1.0),
    sampling=dict(group_size=4, temperature=1.0, max_new_tokens=12),
    loss=dict(advantage_eps=0.1),
    optimizer=dict(lr=1e-3, weight_decay=0.0),
    train=dict(steps=3, prompts_per_step=4, tokens_per_micro_batch=256, eval_every=2),
    log=dict(tokens_every=2),
)


def write_yaml(folder, **dotted_overrides) -> str:
    """Write a config of three quick GRPO steps, with its policy and data beside it.

    Overrides: write_yaml(f, **{"train.steps": 2}). Returns the config's path.
    """
    folder = Path(folder)
    policy = write_policy(folder / "policy")
    data = write_data(folder / "data")
    tree = dict(
        task="product_search",
        run=dict(dir=str(folder / "run"), seed=0, threads=1),
        model=dict(path=policy),
        data=data,
        retriever=dict(index_dir=str(folder / "index")),
    )
    tree |= copy.deepcopy(SECTIONS)
    for key, value in dotted_overrides.items():
        *sections, last = key.split(".")
        node = tree
        for name in sections:
            node = node.setdefault(name, {})
        node[last] = value
    text = yaml.safe_dump(tree, allow_unicode=True)
    path = folder / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def write_sft_yaml(folder, **dotted_overrides) -> str:
    """Write the same world for recr1.sft: by default three steps on the policy's own best of 4."""
    overrides = {"loss": {}, "log": {}, "sft.teacher": "self"}
    overrides |= dotted_overrides
    return write_yaml(folder, **overrides)


def runs_of(main, config: str, folders) -> Callable[..., Path]:
    """Return run(overrides...) -> the folder of a finished run of the config; the same overrides
    run once, `again=1` once more. folders: tmp_path_factory.
    """

    @functools.cache
    def run(*overrides, again=0):
        folder = folders.mktemp("runs") / "run"
        code = run_guarded(main, [config, *overrides, f"run.dir={folder}"])
        assert code == 0
        return folder

    return run


def jsonl(path: Path) -> list[dict]:
    """Read a file of JSON lines, compressed or not."""
    data = path.read_bytes()
    if path.suffix == ".gz":
        data = gzip.decompress(data)
    return [json.loads(line) for line in data.split(b"\n") if line]


def refused(argv, capsys, main=train.main) -> str:
    """Return the one line on stderr of a run that exits with 2."""
    capsys.readouterr()
    code = run_guarded(main, argv)
    assert code == 2
    err = capsys.readouterr().err
    assert err.startswith("recr1: ")
    assert err.count("\n") == 1
    assert err.endswith("\n")
    assert "Traceback" not in err
    return err
