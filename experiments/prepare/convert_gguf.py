"""Convert a GGUF file of Llama, Qwen2 or Qwen3 into a Hugging Face folder, in float32.

The file is read by `gguf` and transformers, which unpack quantized weights; what is written is
checked against transformers' own reading of it. Twice the model in float32 has to fit in memory.

The script is not called gguf.py: Python looks for `import gguf` in the script's own folder first.
"""

import importlib.util
import io
import json
import sys
from argparse import ArgumentParser, Namespace
from contextlib import ExitStack, redirect_stderr
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from checks import PrepareError
from safetensors import safe_open
from safetensors.torch import save_file
from writing import run_command_line, write_index

from recr1.model.hf_config import parse_config
from recr1.model.hf_weights import load_model
from recr1.model.packed_attention import PackedAttention
from recr1.utils.files import fingerprint_file
from recr1.utils.hf_hub import ModelFolderError, load_tokenizer, read_stop_token_ids

PACKAGES = ("gguf", "accelerate")  # what transformers needs to read the file

CONTROL, USER_DEFINED = 3, 4  # llama.cpp's kinds of tokens that are no pieces of words

ARCHITECTURES = ("llama", "qwen2", "qwen3")

WEIGHTS = "model.safetensors"

# What transformers raises for a file that it cannot read; RuntimeError: a tensor of another shape.
UNREADABLE = (ValueError, KeyError, OSError, RuntimeError)

# What the two models read. Of several lengths; digits, accents and other scripts among the words.
TEXTS = (
    "The capital of France is",
    "In 1984, seven naïve friends meet at the café; 3,000 miles away ユーザー is asleep.",
    "a",
    "def add(a, b):\n    return a + b\n\n\nprint(add(2, 3))",
)

# Largest difference of two float32 logits of one token, as a share of the logits' spread.
TOLERANCE = 1e-3


class Header(NamedTuple):
    """What the metadata of a GGUF says."""

    num_tensors: int
    added_tokens: dict[str, int]  # their ids, by their texts


def prepare(args: Namespace, out: Path) -> None:
    """Write the model's folder into `out`."""
    source = dict(name=args.file.name, **fingerprint_file(args.file))
    checks = convert_gguf(args.file, out, args.chat_template)
    write_model_index(out, source, checks, list_options(args))


def list_options(args: Namespace) -> dict:
    """Return the options that decide what is written, for prepared.json."""
    if args.chat_template is None:
        return {}
    return dict(chat_template=fingerprint_file(args.chat_template)["sha256"])


def write_model_index(out: Path, source: dict, checks: list[str], options: dict) -> None:
    """Write prepared.json of a model's folder: source, options, checks, number of weights."""
    num_weights = 0
    with safe_open(out / WEIGHTS, framework="pt") as tensors:
        for name in tensors.keys():
            num_weights += int(np.prod(tensors.get_slice(name).get_shape()))
    write_index(out, [source], options, checks, dict(weights=num_weights))


def convert_gguf(file: Path, folder: Path, chat_template: Path | None = None) -> list[str]:
    """Write the Hugging Face folder of a GGUF file.

    chat_template: a Jinja file, in place of the template that the GGUF holds. Returns the names of
    the checks, all passed. Raises PrepareError.
    """
    _require_packages()
    header = _read_header(file)
    tokenizer = _read_tokenizer(file, header, chat_template)
    model = _read_model(file)
    config = _make_config(model, file)
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if config["tie_word_embeddings"]:
        del weights["lm_head.weight"]
    if len(weights) != header.num_tensors:
        raise PrepareError(
            f"{file}: has {header.num_tensors} tensors, and the model that transformers makes of "
            f"it has {len(weights)}: something of it is not understood (as rope_freqs, Llama 3.1's "
            "rope scaling); take the model's Hugging Face folder instead"
        )
    _write_json(folder / "config.json", config)
    stops = {name: config.get(name) for name in ("eos_token_id", "pad_token_id")}
    _write_json(folder / "generation_config.json", stops)
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    # Notes on how it was loaded, no settings.
    for name in ("is_local", "local_files_only"):
        tokenizer.init_kwargs.pop(name, None)
    tokenizer.save_pretrained(folder)
    return check_folder(folder, model)


def _require_packages() -> None:
    """Raise PrepareError where a package is missing that transformers needs for a GGUF."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise PrepareError(
            f"reading a GGUF needs {' and '.join(missing)}, not installed here: "
            "pip install 'recr1[models]' (in a checkout: pip install -e '.[models]')"
        )


def _read_header(file: Path) -> Header:
    """Read what the metadata says. Raises PrepareError for a file that cannot be used."""
    from gguf import GGUFReader

    if not file.is_file():
        raise PrepareError(f"{file}: no such file; check the path")
    try:
        reader = GGUFReader(file)
        fields = {name: field.contents() for name, field in reader.fields.items()}
    except (ValueError, KeyError, IndexError, UnicodeDecodeError) as e:
        raise PrepareError(f"{file}: torn, or no GGUF ({' '.join(str(e).split())})") from None
    architecture = fields.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise PrepareError(
            f"{file}: its architecture is {architecture!r}; known: {', '.join(ARCHITECTURES)}"
        )
    scaling = fields.get(f"{architecture}.rope.scaling.type", "none")
    if scaling != "none":
        raise PrepareError(
            f"{file}: has rope scaling {scaling!r}, which transformers does not read from a GGUF; "
            "take the model's Hugging Face folder instead"
        )
    tokens = fields.get("tokenizer.ggml.tokens", [])
    kinds = fields.get("tokenizer.ggml.token_type", [])
    added_tokens = {}
    for id, (token, kind) in enumerate(zip(tokens, kinds)):
        if kind in (CONTROL, USER_DEFINED):
            added_tokens[token] = id
    return Header(len(reader.tensors), added_tokens)


def _read_tokenizer(file: Path, header: Header, chat_template: Path | None) -> Any:
    """Return transformers' tokenizer of a GGUF, with a chat template.

    Raises PrepareError, also where an added token does not come out of it as one id.
    """
    from transformers import AutoTokenizer

    folder = str(file.absolute().parent)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file.name)
    except UNREADABLE as e:
        raise _say_unreadable(file, e) from None
    for token, id in header.added_tokens.items():  # such as Qwen3's <think>
        if tokenizer(token, add_special_tokens=False)["input_ids"] != [id]:
            raise PrepareError(
                f"{file}: its token {token!r} does not come out of the tokenizer that transformers "
                "makes of it; take the model's Hugging Face folder instead"
            )
    if chat_template is not None:
        tokenizer.chat_template = chat_template.read_text(encoding="utf-8")
    if not tokenizer.chat_template:
        raise PrepareError(
            f"{file}: holds no chat template, and prompts need one; give a Jinja file with "
            "--chat-template"
        )
    return tokenizer


def _read_model(file: Path) -> Any:
    """Return transformers' model of a GGUF, in float32. Raises PrepareError."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder = str(file.absolute().parent)
    with ExitStack() as stack:
        if not sys.stderr.isatty():  # the bar of unpacking is for a terminal
            stack.enter_context(redirect_stderr(io.StringIO()))
        try:
            model, loading = AutoModelForCausalLM.from_pretrained(
                folder, gguf_file=file.name, dtype=torch.float32, output_loading_info=True
            )
        except UNREADABLE as e:
            raise _say_unreadable(file, e) from None
    missing = set(loading["missing_keys"]) - {"lm_head.weight"}
    if missing:
        raise PrepareError(f"{file}: has no weights for {len(missing)} tensors, {min(missing)}")
    return model.eval()


def _say_unreadable(file: Path, error: Exception) -> PrepareError:
    reason = " ".join(str(error).split())
    return PrepareError(
        f"{file}: transformers cannot read it ({reason}); take the model's Hugging Face folder"
    )


def _make_config(model: Any, file: Path) -> dict:
    """Return config.json of the model, unquantized. Raises PrepareError for another decoder."""
    config = json.loads(model.config.to_json_string())
    for name in ("quantization_config", "_model_name_or_path"):
        config.pop(name, None)
    config["architectures"] = [type(model).__name__]
    # A GGUF holds it in float32: the shortest decimal that means the same float32, 1e-05.
    config["rms_norm_eps"] = float(str(np.float32(config["rms_norm_eps"])))
    try:
        parse_config(config, str(file))
    except ModelFolderError as e:
        raise PrepareError(str(e)) from None
    return config


def _write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def check_folder(folder: Path, model: Any) -> list[str]:
    """Check what was written against transformers' model, and return the names of the checks.

    Raises PrepareError.
    """
    from transformers import AutoModelForCausalLM

    path = str(folder)
    read_back = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    expected = model.state_dict()
    for name, tensor in read_back.state_dict().items():
        if not torch.equal(tensor, expected[name]):
            raise PrepareError(f"{folder}: {name} does not read back as it was written")

    tokenizer = load_tokenizer(path)
    if not read_stop_token_ids(path, tokenizer):
        raise PrepareError(f"{folder}: no token ends a text")
    sequences = []
    for text in TEXTS:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if tokenizer.decode(ids, clean_up_tokenization_spaces=False) != text:
            raise PrepareError(f"{folder}: the tokenizer does not give back {text[:30]!r}")
        sequences.append(torch.tensor(ids))
    gap = compare_logits(path, read_back, sequences)
    if gap > TOLERANCE:
        raise PrepareError(
            f"{folder}: logits differ from transformers' by {gap:.1e} of their spread, more than "
            f"{TOLERANCE:g}; do not use it, and report the model's name"
        )
    return [
        "weights read back bit for bit",
        "texts come back from the tokenizer",
        f"logits equal transformers' within {TOLERANCE:g} of their spread",
    ]


@torch.no_grad()
def compare_logits(path: str, theirs: Any, sequences: list[torch.Tensor]) -> float:
    """Return the largest difference of our logits from transformers', as a share of their spread.

    Args:
        path: the folder that our decoder is loaded from.
        theirs: transformers' model.
        sequences: token ids, (n,) each; our decoder reads them packed.
    """
    ours = load_model(path)
    lengths = torch.tensor([len(ids) for ids in sequences])
    positions = torch.cat([torch.arange(len(ids)) for ids in sequences])
    no_rows = torch.zeros(0, dtype=torch.int64)
    attention = PackedAttention(lengths, no_rows, no_rows)
    hidden = ours(torch.cat(sequences), positions, attention)  # (N, C)
    our_logits = hidden @ ours.head_weight.T  # (N, V)
    their_logits = torch.cat([theirs(input_ids=ids[None]).logits[0] for ids in sequences])
    largest = (our_logits - their_logits).abs().max()
    return float(largest / their_logits.std())


def add_options(parser: ArgumentParser) -> None:
    """Add the script's own options."""
    parser.add_argument("file", type=Path, metavar="FILE", help="the GGUF file")
    parser.add_argument(
        "--chat-template",
        type=Path,
        metavar="FILE",
        help="a Jinja file, in place of the template that the GGUF holds",
    )


def describe_wanted(args: Namespace) -> dict:
    """Return what the finished folder of these arguments says of itself."""
    if not args.file.is_file():
        raise PrepareError(f"{args.file}: no such file; check the path")
    return dict(sha256=[fingerprint_file(args.file)["sha256"]], options=list_options(args))


def main(argv: list[str] | None = None) -> int:
    """Run the script; return its exit code."""
    return run_command_line(
        __file__, __doc__, prepare, add_options, argv, describe_wanted=describe_wanted
    )


if __name__ == "__main__":
    sys.exit(main())
