"""Builds experiments/policy: tokenizer and SFT cold start of the quickstart's small Qwen2 policy. 2
cores, about 15 minutes.

It reads the train split's query texts (validation tenth left out) and the catalogue: no relevance
label, no retriever score. Stage 1 learns to copy the query into the answer contract; stage 2 copies
with edits, so that sampling explores while the greedy answer stays the query: words skipped, and
words of the query repeated at its end.
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

HERE = Path(__file__).parent
CONTRACT = ["<think>", "</think>", "<answer>", "</answer>", '{"query": "', '"}']
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
NOTICE = """The weights and the vocabulary in this folder were made by experiments/make_policy.py from the query texts and the film
descriptions of the Movie Search Ranking Dataset (MSRD) by Metarank Labs, CC BY-SA 4.0: see experiments/data/msrd/LICENSE.msrd.md
and NOTICE.elastic.txt beside it. They are offered under the same licence.
"""
LONGEST = 24  # tokens of a query that is practised


def make_tokenizer(texts: list[str]) -> Qwen2Tokenizer:
    """Qwen2's byte-level BPE with a vocabulary of our own. AutoTokenizer gives every qwen2 folder
    Qwen2's word splitting, so we learn with it.
    """
    core = Qwen2Tokenizer()._tokenizer
    learned = SHAPE.vocab_size - len(ROLES) - len(CONTRACT)
    core.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=learned,
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    model = json.loads(core.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=model["vocab"],
        merges=[tuple(m) for m in model["merges"]],
        unk_token=ROLES[0],
        pad_token=ROLES[0],
        eos_token="<|end|>",
    )
    tokenizer.add_tokens([AddedToken(t, special=True, normalized=False) for t in ROLES])
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in CONTRACT])
    tokenizer.chat_template = TEMPLATE
    if len(tokenizer) != SHAPE.vocab_size:
        raise SystemExit(f"the tokenizer has {len(tokenizer)} ids, the model {SHAPE.vocab_size}")
    return tokenizer


class Examples:
    """(query, answer) pairs as rollouts of one sibling; batch `step` is a function of (seed, step)."""

    def __init__(
        self,
        tokenizer,
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
        self.words = sorted({w for text in documents for w in text.split()})
        self.ordinary = [
            i
            for i in range(SHAPE.vocab_size)
            if tokenizer.convert_ids_to_tokens(i) not in {*ROLES, *CONTRACT}
        ]
        ids = tokenizer.convert_tokens_to_ids
        self.open = [ids(t) for t in ("</think>", "<answer>", '{"query": "')]
        self.close = [ids(t) for t in ('"}', "</answer>", "<|end|>")]

    def __call__(self, step: int) -> list[Rollout]:
        rng = random.Random(f"{self.seed}/{step}")
        rollouts = []
        while len(rollouts) < self.batch:
            source, target = self.pair(rng)
            prompt = self.chat.prompt(source)
            answer = self.chat.user_ids(" " + json.dumps(target, ensure_ascii=False)[1:-1])
            if not target or len(prompt) > LONGEST + 8 or len(answer) > LONGEST:
                continue
            ids = (*self.open, *answer, *self.close)
            rollouts.append(
                Rollout(
                    Prompt("", len(rollouts), source, prompt),
                    len(rollouts),
                    0,
                    ids,
                    (0.0,) * len(ids),
                    True,
                )
            )
        return rollouts

    def pair(self, rng: random.Random) -> tuple[str, str]:
        """A text and what to answer. Copies of unusual strings teach copying itself; real queries
        teach where it is used.
        """
        kind = rng.random()
        if kind < 0.30:
            text = (
                self.tokenizer.decode(rng.choices(self.ordinary, k=rng.randint(1, 10)))
                .replace("\ufffd", "")
                .strip()
            )
        elif kind < 0.55:
            text = " ".join(rng.choices(self.words, k=rng.randint(1, 7)))
        elif kind < 0.75:
            words = rng.choice(self.documents).split()
            start = rng.randrange(len(words))
            text = " ".join(words[start : start + rng.randint(1, 8)])
        else:
            text = rng.choice(self.queries)
        text = " ".join(text.split())
        plain = not self.edits or (kind < 0.30 and rng.random() < 0.60)
        return text, text if plain else edited(text.split(), rng)


def edited(words: list[str], rng: random.Random) -> str:
    """Each word left out with p = .07; then 1, 2 or 3 words of the query again at its END with p =
    .17, .05, .02.

    At the end, never in place: a repeat in the middle makes the greedy decoder loop.
    """
    kept = [w for w in words if rng.random() >= 0.07] or words
    again = rng.choices([0, 1, 2, 3], weights=[0.76, 0.17, 0.05, 0.02])[0]
    return " ".join(kept + [rng.choice(words) for _ in range(again)]) if words else ""


def initialised(seed: int) -> Decoder:
    """GPT-2's initialisation: normal .02, residual projections scaled down by sqrt(2 * layers)."""
    torch.manual_seed(seed)
    model = Decoder(SHAPE)
    for name, p in model.named_parameters():
        if p.ndim == 2:
            std = (
                0.02 / (2 * SHAPE.num_hidden_layers) ** 0.5
                if "o_proj" in name or "down_proj" in name
                else 0.02
            )
            torch.nn.init.normal_(p, std=std)
        elif name.endswith("bias"):
            torch.nn.init.zeros_(p)
    return model


def fit(
    model: Decoder,
    examples: Callable[[int], list[Rollout]],
    steps: int,
    config: OptimizerConfig,
    max_tokens: int,
) -> list[float]:
    """Trains in place on examples(0), examples(1), ...: a step of recr1/sft.py without a run around
    it, on whole weights, which Muon needs.

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
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--config",
        default=str(HERE / "quickstart.yaml"),
        help="whose prompt text and data are practised",
    )
    parser.add_argument("--out", default=str(HERE / "policy"))
    parser.add_argument("--copy-steps", type=int, default=1500)
    parser.add_argument("--edit-steps", type=int, default=1800)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    cfg = configs.load_config(args.config, [])
    torch.set_num_threads(cfg.run.threads or torch.get_num_threads())
    queries = [
        text
        for id, text in readers.read_queries(cfg.data.train_queries)[0].items()
        if not readers.is_validation(id)
    ]
    _, documents, _ = readers.read_corpus(cfg.data.corpus)
    documents = [" ".join(text.lower().split()) for text in documents]
    tokenizer = make_tokenizer(queries * 3 + documents)
    chat = ChatTemplate(tokenizer, cfg.prompt.system, cfg.prompt.user, cfg.prompt.assistant)
    model = initialised(args.seed)
    stages = [("copy", args.copy_steps, 2e-3, 0.02), ("edit", args.edit_steps, 1e-3, 0.01)]
    for i, (name, steps, lr, muon_lr) in enumerate(stages):
        optimizer = OptimizerConfig(
            kind="muon",
            lr=lr,
            muon_lr=muon_lr,
            betas=(0.9, 0.95),
            weight_decay=0.0,
            warmup_steps=50,
            final_lr=0.02,
        )
        examples = Examples(
            tokenizer, chat, queries, documents, args.batch, name == "edit", args.seed + i
        )
        print(f"stage {name}: {steps} steps of {args.batch} examples")
        fit(model, examples, steps, optimizer, max_tokens=1024)
    save_model(
        model.config,
        model.state_dict().items(),
        tokenizer,
        frozenset([tokenizer.eos_token_id]),
        args.out,
    )
    (Path(args.out) / "NOTICE").write_text(NOTICE, encoding="utf-8")
    (Path(args.out) / "recr1.yaml").write_text(configs.dump_answering_config(cfg), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
