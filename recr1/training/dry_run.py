"""`--dry-run`: the whole run of a config, one step long, on a tiny random model of its architecture
and tiny data of its formats. No hub, no GPU.

Family and shape come from the model folder's config.json, or from the config's shapes.yaml
(find_shapes_table says where that lies); where both are there they must agree. The tokenizer has
the 256 bytes and eight whole answers of the task, which the random model favors: rewards differ, so
the step has a gradient. (A task of a user's own may ask for other answers: then none of them is
parsable, and the gradient is 0.)
"""

from __future__ import annotations

import gzip
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

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

NUM_CANDIDATES = 8  # of a row

WORDS = "lamp chair table shirt kettle guitar camera bicycle".split()
NUM_TEST_QUERIES = 8
DOCUMENTS_PER_WORD = 3
TRAIN_QUERIES = [f"train{i}" for i in range(64)]
TEST_QUERIES = [f"test{i}" for i in range(NUM_TEST_QUERIES)]

# settings of data.* that name files -> what the files are called here
DATA_FILES = dict(
    corpus="corpus.jsonl",
    train_queries="train.queries.jsonl",
    train_qrels="train.qrels.tsv",
    test_queries="test.queries.jsonl",
    test_qrels="test.qrels.tsv",
)

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
END_TOKEN = SPECIAL_TOKENS[2]

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

HIDDEN_SIZE = 48
HEAD_DIM = 8
LORA_RANK = 4  # at most
MAX_POSITIONS = 8192


@contextmanager
def shrunk_config(cfg: Config, path: str) -> Iterator[Config]:
    """Yield the config (read from the file `path`) with everything large made tiny.

    It runs in a temporary folder of its own. Raises ConfigError.
    """
    shape = read_model_shape(cfg.model.path, path)
    check_lengths(cfg, shape.max_position_embeddings)
    with tempfile.TemporaryDirectory(prefix="recr1-dry-run-") as local_folder:
        folder = Path(dist.broadcast_from_rank0(local_folder))  # rank 0's serves all
        with dist.fail_together():
            if dist.rank() == 0:
                _write_world(cfg, shape, folder)
        yield _shrink(cfg, folder)


def _write_world(cfg: Config, shape: DecoderConfig, folder: Path) -> None:
    """Write all files that the shrunk config names."""
    answers = _list_answers(cfg)
    _write_policy(shape, folder / "policy", answers)
    _write_data(cfg, folder)
    teacher = _locate_teacher(cfg, folder)
    if teacher not in ("", "self"):
        _write_teacher(Path(teacher), answers)
    if cfg.retriever.encoder:
        _write_encoder(folder)


def _shrink(cfg: Config, folder: Path) -> Config:
    """Return the config with the paths of `folder`, and one short step."""
    data_files: dict[str, Any] = {}
    for key in DATA_FILES:
        path = getattr(cfg.data, key)
        if path:
            data_files[key] = str(folder / _name_data_file(key, path))
    encoder = cfg.retriever.encoder and str(folder / "encoder")
    teacher = _locate_teacher(cfg, folder)
    return replace(
        cfg,
        run=replace(cfg.run, dir=str(folder / "run")),
        model=replace(cfg.model, path=str(folder / "policy"), adapter=""),
        lora=replace(cfg.lora, rank=min(cfg.lora.rank, LORA_RANK)),
        data=replace(cfg.data, **data_files),
        retriever=replace(cfg.retriever, index_dir=str(folder / "index"), encoder=encoder),
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
        sft=replace(cfg.sft, teacher=teacher, filter="all", min_score=0.0, epochs=0),
    )


def read_model_shape(model: str, config_path: str) -> DecoderConfig:
    """Read the shape that model.path stands for, without a download. Raises ConfigError.

    It is that of the config's shapes.yaml, or of the model folder's config.json.
    """
    table = find_shapes_table(config_path)

    # What the table says, and what the folder says.
    shapes = {}
    if table.exists():
        shapes = yaml.safe_load(table.read_text(encoding="utf-8"))
    listed = None
    if shapes.get(model):
        listed = parse_config(shapes[model], f"{table}: {model}")
    read = None
    if (Path(model) / "config.json").exists():
        read = read_config(model)

    if listed and read and listed != read:
        raise ConfigError(
            f"{table}: {model} is said to be {listed}, its config.json says {read}; "
            "correct the table"
        )
    shape = read or listed
    if not shape:
        raise ConfigError(
            f"model.path: {model!r} is no model folder here and {table} has no entry of that name; "
            "add its shape there for --dry-run"
        )
    return shape


def find_shapes_table(config_path: str) -> Path:
    """Return the path of a config's shapes.yaml, the only one that is read.

    It is the first that exists: beside the config, in the folder configs/ beside it, in the folder
    above. Where none does, it is the path beside the config, for a message to name.
    """
    folder = Path(config_path).parent
    above = Path(os.path.normpath(folder / ".."))
    candidates = [place / "shapes.yaml" for place in (folder, folder / "configs", above)]
    for candidate in candidates:
        if candidate.exists():
            return candidate
    return candidates[0]


# --- The policy -----------------------------------------------------------------------------------


def _list_answers(cfg: Config) -> list[str]:
    """List whole completions of the task; where the prompt closes the thought, without its end."""
    bodies: list[dict[str, Any]]
    if cfg.task == "rerank":
        bodies = [{"reranked_items": order} for order in _list_item_orders()]
    elif cfg.task == "recommend_list":
        bodies = [{"items": order} for order in _list_item_orders()]
    else:
        bodies = [{"query": word} for word in WORDS]
    thought_end = "" if ends_thought(cfg.prompt.assistant) else "</think>"
    return [f"{thought_end}<answer>{json.dumps(body)}</answer>" for body in bodies]


def _list_item_orders() -> list[list[str]]:
    """List eight orders of the candidates."""
    orders = []
    for step in (1, 3, 5, 7):
        for shift in (0, 2):
            numbers = [1 + (i * step + shift) % NUM_CANDIDATES for i in range(NUM_CANDIDATES)]
            orders.append([f"Item_{number}" for number in numbers])
    return orders


def _write_policy(shape: DecoderConfig, folder: Path, answers: list[str]) -> None:
    """Write a random model of the family that favors `answers`.

    Its kv heads, tying and rope scaling are those of `shape`, its widths are tiny.
    """
    tokenizer = _build_tokenizer(answers)

    # The family's config with the relations that the code distinguishes, and everything else tiny.
    num_kv_heads = min(2, shape.num_key_value_heads)
    queries_per_kv_head = min(3, shape.num_attention_heads // shape.num_key_value_heads)
    config = replace(
        shape,
        vocab_size=len(tokenizer) + 5,
        hidden_size=HIDDEN_SIZE,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=num_kv_heads * queries_per_kv_head,
        num_key_value_heads=num_kv_heads,
        head_dim=HEAD_DIM,
        max_position_embeddings=MAX_POSITIONS,
    )

    model = Decoder(config)
    _initialize_weights(model, tokenizer.convert_tokens_to_ids([*answers, END_TOKEN]))
    save_model(
        config,
        model.state_dict().items(),
        tokenizer,
        frozenset([tokenizer.eos_token_id]),
        str(folder),
    )


def _build_tokenizer(answers: list[str]) -> Any:
    """Build a tokenizer of the 256 bytes, with each answer as a token."""
    from transformers import Qwen2Tokenizer

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Qwen2Tokenizer(
        vocab={character: id for id, character in enumerate(alphabet)},
        merges=[],
        unk_token=SPECIAL_TOKENS[0],
        pad_token=SPECIAL_TOKENS[0],
        eos_token=END_TOKEN,
    )
    special = [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]
    tokenizer.add_tokens(special)
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in answers])
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _initialize_weights(model: Decoder, favored_ids: list[int]) -> None:
    """Fill the weights with random numbers, but favor some ids; the last is the end token."""
    config = model.config
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, weight in model.named_parameters():
            if weight.ndim > 1:
                weight.normal_(0, 0.02, generator=generator)

        # All hidden states lie near one direction. A token is written the more often the further
        # its row of the head reaches along it.
        reach = torch.zeros(config.vocab_size).fill_(0.3)
        reach[favored_ids] = torch.tensor([1.0] * (len(favored_ids) - 1) + [1.3])
        direction = torch.randn(HIDDEN_SIZE, generator=generator)
        direction = torch.nn.functional.normalize(direction, dim=0)
        model.model.embed_tokens.weight += reach[:, None] * direction
        if not config.tie_word_embeddings:
            model.lm_head.weight += reach[:, None] * direction


def _write_encoder(folder: Path) -> None:
    """Write a random BERT on the policy's tokenizer.

    Of an encoder that retriever.encoder names nothing is known without a download.
    """
    # seconds, which a run that is none of these does not wait for
    from transformers import AutoTokenizer, BertConfig, BertModel

    tokenizer = AutoTokenizer.from_pretrained(folder / "policy")
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=MAX_POSITIONS,
    )
    # Without a list it would open a context on every GPU, from every rank that calls it.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = BertModel(config)
    model.save_pretrained(folder / "encoder")
    tokenizer.save_pretrained(folder / "encoder")


# --- The data -------------------------------------------------------------------------------------


def _locate_teacher(cfg: Config, folder: Path) -> str:
    """Return sft.teacher, its file in the folder."""
    teacher = cfg.sft.teacher
    if teacher in ("", "self"):
        return teacher
    return str(folder / _keep_gz("teacher.jsonl", teacher))


def _name_data_file(key: str, path: str) -> str:
    return _keep_gz(DATA_FILES[key], path)


def _keep_gz(name: str, path: str) -> str:
    """Return the name with .gz behind it where `path` has that."""
    return f"{name}.gz" if path.endswith(".gz") else name


def _write_teacher(path: Path, answers: list[str]) -> None:
    """Write a whole answer to each train query that is not held out.

    The rule of sft.filter is left to the real texts: these are all as good as the query.
    """
    lines = []
    for number, query in enumerate(TRAIN_QUERIES):
        if not is_validation(query) and not is_test(query):
            lines.append(json.dumps(dict(id=query, text=answers[number % len(answers)])))
    _write_lines(path, lines)


def _write_data(cfg: Config, folder: Path) -> None:
    """Write queries of one word each; every document of that word is relevant.

    There are as many that no split is empty. Rows have the keys of every task.
    """
    assert any(map(is_validation, TRAIN_QUERIES)) and any(map(is_test, TRAIN_QUERIES))
    lines = {
        "corpus": _format_documents(),
        "train_queries": _format_queries(TRAIN_QUERIES),
        "train_qrels": _format_qrels(TRAIN_QUERIES),
        "test_queries": _format_queries(TEST_QUERIES),
        "test_qrels": _format_qrels(TEST_QUERIES),
    }
    for key, lines_of_file in lines.items():
        path = getattr(cfg.data, key)
        if path:
            _write_lines(folder / _name_data_file(key, path), lines_of_file)


def _format_documents() -> list[str]:
    lines = []
    for number, word in enumerate(WORDS * DOCUMENTS_PER_WORD):
        document = dict(
            id=f"d{number}",
            title=f"{word} {number}",
            text=f"a {word} and a {WORDS[number % 5]}",
            category=word,
            genres=[word, WORDS[number % 3]],
            popularity=number,
        )
        lines.append(json.dumps(document))
    return lines


def _format_queries(ids: list[str]) -> list[str]:
    lines = []
    for number, id in enumerate(ids):
        word = WORDS[number % len(WORDS)]
        row = dict(
            id=id,
            text=f"a {word}",
            profile=f"likes a {word}",
            history=[[f"d{number % 3}", "2024-01-01"]],
            candidates=[f"d{document}" for document in range(NUM_CANDIDATES)],
        )
        lines.append(json.dumps(row))
    return lines


def _format_qrels(ids: list[str]) -> list[str]:
    lines = []
    for number, id in enumerate(ids):
        first = number % len(WORDS)
        for document in range(first, len(WORDS) * DOCUMENTS_PER_WORD, len(WORDS)):
            lines.append(f"{id}\td{document}\t{1 + document % 2}")
    return lines


def _write_lines(path: Path, lines: list[str]) -> None:
    """Write a text file, compressed where its name says so."""
    content = "".join(line + "\n" for line in lines).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
