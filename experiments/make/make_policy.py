"""Build experiments/policy: tokenizer and SFT cold start of the quickstart's small Qwen2 policy.

It takes about 15 minutes on 2 cores. It reads the train split's query texts (validation tenth left
out) and the catalog: no relevance label, no retriever score. Stage 1 learns to copy the query into
the answer contract; stage 2 copies with edits, so that sampling explores while the greedy answer
stays the query: words skipped, and words of the query repeated at its end.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path
from typing import Callable

import torch
from tokenizers import AddedToken, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import Qwen2Tokenizer

from recr1.config import loader as configs
from recr1.config.schema import ModelConfig, OptimizerConfig
from recr1.data import readers
from recr1.data.chat_template import ChatTemplate
from recr1.data_types import Prompt, Rollout
from recr1.model.decoder import Decoder
from recr1.model.hf_weights import save_model
from recr1.model.rope import DecoderConfig
from recr1.rl.losses import resolve_objective
from recr1.sft import CROSS_ENTROPY, compute_cross_entropy, make_update
from recr1.training.optimizer import Optimizer

EXPERIMENTS = Path(__file__).resolve().parents[1]
CONTRACT = ["<think>", "</think>", "<answer>", "</answer>", '{"query": "', '"}']
ANSWER_START = ["</think>", "<answer>", '{"query": "']
ANSWER_END = ['"}', "</answer>", "<|end|>"]
ROLES = ["<|endoftext|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SHAPE = DecoderConfig(
    family="qwen2",
    vocab_size=4096,
    hidden_size=160,
    intermediate_size=448,
    num_hidden_layers=4,
    num_attention_heads=5,
    num_key_value_heads=5,
    head_dim=32,
    rms_norm_eps=1e-6,
    rope_theta=10000.0,
    rope_scaling=None,
    tie_word_embeddings=True,
    max_position_embeddings=2048,
)
NOTICE = (
    "The weights and the vocabulary in this folder were made by experiments/make/make_policy.py "
    "from the query texts and the film\n"
    "descriptions of the Movie Search Ranking Dataset (MSRD) by Metarank Labs, CC BY-SA 4.0: see "
    "experiments/data/msrd/LICENSE.msrd.md\n"
    "and NOTICE.elastic.txt beside it. They are offered under the same licence.\n"
)
MAX_QUERY_TOKENS = 24  # of a query that is practiced


def make_tokenizer(texts: list[str]) -> Qwen2Tokenizer:
    """Learn Qwen2's byte-level BPE with a vocabulary of our own.

    AutoTokenizer gives every qwen2 folder Qwen2's word splitting, so we learn with it.
    """
    core = Qwen2Tokenizer()._tokenizer
    vocab_size = SHAPE.vocab_size - len(ROLES) - len(CONTRACT)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, show_progress=False, initial_alphabet=alphabet
    )
    core.train_from_iterator(texts, trainer)
    model = json.loads(core.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    tokenizer = Qwen2Tokenizer(
        vocab=model["vocab"],
        merges=merges,
        unk_token=ROLES[0],
        pad_token=ROLES[0],
        eos_token="<|end|>",
    )
    role_tokens = [AddedToken(text, special=True, normalized=False) for text in ROLES]
    contract_tokens = [AddedToken(text, special=False, normalized=False) for text in CONTRACT]
    tokenizer.add_tokens(role_tokens)
    tokenizer.add_tokens(contract_tokens)
    tokenizer.chat_template = TEMPLATE
    if len(tokenizer) != SHAPE.vocab_size:
        raise SystemExit(f"the tokenizer has {len(tokenizer)} ids, the model {SHAPE.vocab_size}")
    return tokenizer


class Examples:
    """Make batches of (query, answer) pairs, as rollouts of one sibling.

    The batch of a step is a function of (seed, step).
    """

    def __init__(
        self,
        tokenizer: Qwen2Tokenizer,
        chat: ChatTemplate,
        queries: list[str],
        documents: list[str],
        batch: int,
        edits: bool,
        seed: int,
    ):
        self.tokenizer = tokenizer
        self.chat = chat
        self.batch = batch
        self.edits = edits
        self.seed = seed
        self.queries = queries
        self.documents = documents
        words: set[str] = set()
        for text in documents:
            words.update(text.split())
        self.words = sorted(words)
        special_tokens = {*ROLES, *CONTRACT}
        self.ordinary_ids = []
        for id in range(SHAPE.vocab_size):
            if tokenizer.convert_ids_to_tokens(id) not in special_tokens:
                self.ordinary_ids.append(id)
        self.answer_start = tokenizer.convert_tokens_to_ids(ANSWER_START)
        self.answer_end = tokenizer.convert_tokens_to_ids(ANSWER_END)

    def __call__(self, step: int) -> list[Rollout]:
        """Return the batch of a step."""
        rng = random.Random(f"{self.seed}/{step}")
        rollouts = []
        while len(rollouts) < self.batch:
            source, target = self.make_pair(rng)
            prompt_ids = self.chat.prompt(source)
            escaped = json.dumps(target, ensure_ascii=False)[1:-1]
            answer_ids = self.chat.user_ids(" " + escaped)
            is_long = len(prompt_ids) > MAX_QUERY_TOKENS + 8 or len(answer_ids) > MAX_QUERY_TOKENS
            if not target or is_long:
                continue
            ids = (*self.answer_start, *answer_ids, *self.answer_end)
            index = len(rollouts)
            rollout = Rollout(
                prompt=Prompt("", index, source, prompt_ids),
                group=index,
                sibling=0,
                ids=ids,
                sampler_logp=(0.0,) * len(ids),
                finished=True,
            )
            rollouts.append(rollout)
        return rollouts

    def make_pair(self, rng: random.Random) -> tuple[str, str]:
        """Return a text and what to answer.

        Copies of unusual strings teach copying itself; real queries teach where it is used.
        """
        kind = rng.random()
        if kind < 0.30:
            length = rng.randint(1, 10)
            ids = rng.choices(self.ordinary_ids, k=length)
            text = self.tokenizer.decode(ids).replace("\ufffd", "")
        elif kind < 0.55:
            length = rng.randint(1, 7)
            text = " ".join(rng.choices(self.words, k=length))
        elif kind < 0.75:
            words = rng.choice(self.documents).split()
            start = rng.randrange(len(words))
            end = start + rng.randint(1, 8)
            text = " ".join(words[start:end])
        else:
            text = rng.choice(self.queries)
        words = text.split()
        text = " ".join(words)
        is_copy = not self.edits or (kind < 0.30 and rng.random() < 0.60)
        if is_copy:
            return text, text
        return text, edit_words(words, rng)


def edit_words(words: list[str], rng: random.Random) -> str:
    """Leave each word out with p = .07; repeat 1, 2 or 3 words at the END with p = .17, .05, .02.

    At the end, never in place: a repeat in the middle makes the greedy decoder loop.
    """
    kept_words = [word for word in words if rng.random() >= 0.07] or words
    [num_repeats] = rng.choices([0, 1, 2, 3], weights=[0.76, 0.17, 0.05, 0.02])
    if not words:
        return ""
    repeated_words = [rng.choice(words) for _ in range(num_repeats)]
    return " ".join(kept_words + repeated_words)


def initialize_model(seed: int) -> Decoder:
    """Initialize as GPT-2: normal .02, residual projections scaled down by sqrt(2 * layers)."""
    torch.manual_seed(seed)
    model = Decoder(SHAPE)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            std = 0.02
            if "o_proj" in name or "down_proj" in name:
                std = 0.02 / (2 * SHAPE.num_hidden_layers) ** 0.5
            torch.nn.init.normal_(parameter, std=std)
        elif name.endswith("bias"):
            torch.nn.init.zeros_(parameter)
    return model


def fit(
    model: Decoder,
    examples: Callable[[int], list[Rollout]],
    steps: int,
    config: OptimizerConfig,
    max_tokens: int,
) -> list[float]:
    """Train in place on examples(0), examples(1), ...

    A step is that of recr1/sft.py without a run around it, on full weights, which Muon needs.
    Returns the mean loss per target token (nats) of each step.
    """
    losses = []
    optimizer = Optimizer(model, config, steps)
    loss = resolve_objective(CROSS_ENTROPY, ModelConfig())
    bar = tqdm(range(steps), disable=None, desc="sft")
    for step in bar:
        total, batches = make_update(examples(step), max_tokens)
        loss_sum = 0.0
        for batch in batches:
            value, _ = compute_cross_entropy(model, batch, total, 1.0, loss)
            value.backward()
            loss_sum += value.item()
        norm, _ = optimizer.step(loss_sum)
        losses.append(loss_sum)
        bar.set_postfix(loss=f"{loss_sum:.4f}", norm=f"{norm:.2f}")
        if bar.disable and step % 100 == 0:
            print(f"step {step} loss {loss_sum:.4f} grad norm {norm:.2f}", flush=True)
    return losses


def main(argv: list[str]) -> None:
    """Train both stages and write the policy's folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--config",
        default=str(EXPERIMENTS / "quickstart.yaml"),
        help="whose prompt text and data are practiced",
    )
    parser.add_argument("--out", default=str(EXPERIMENTS / "policy"))
    parser.add_argument("--copy-steps", type=int, default=1500)
    parser.add_argument("--edit-steps", type=int, default=1800)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    cfg = configs.load_config(args.config, [])
    torch.set_num_threads(cfg.run.threads or torch.get_num_threads())
    all_queries, *_ = readers.read_queries(cfg.data.train_queries)
    queries = [text for id, text in all_queries.items() if not readers.is_validation(id)]
    _, texts, _ = readers.read_corpus(cfg.data.corpus)
    documents = []
    for text in texts:
        words = text.lower().split()
        documents.append(" ".join(words))
    tokenizer = make_tokenizer(queries * 3 + documents)
    chat = ChatTemplate(tokenizer, cfg.prompt.system, cfg.prompt.user, cfg.prompt.assistant)
    model = initialize_model(args.seed)
    stages = [("copy", args.copy_steps, 2e-3, 0.02), ("edit", args.edit_steps, 1e-3, 0.01)]
    for i, (name, steps, lr, muon_lr) in enumerate(stages):
        optimizer = OptimizerConfig(
            kind="muon",
            lr=lr,
            muon_lr=muon_lr,
            betas=(0.9, 0.95),
            weight_decay=0.0,
            warmup_steps=50,
            min_lr_ratio=0.02,
        )
        edits = name == "edit"
        seed = args.seed + i
        examples = Examples(tokenizer, chat, queries, documents, args.batch, edits, seed)
        print(f"stage {name}: {steps} steps of {args.batch} examples")
        fit(model, examples, steps, optimizer, max_tokens=1024)
    weights = model.state_dict().items()
    stop_token_ids = frozenset([tokenizer.eos_token_id])
    save_model(model.config, weights, tokenizer, stop_token_ids, args.out)
    out = Path(args.out)
    answering_config = configs.dump_answering_config(cfg)
    (out / "NOTICE").write_text(NOTICE, encoding="utf-8")
    (out / "recr1.yaml").write_text(answering_config, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
