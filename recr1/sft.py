"""Supervised fine-tuning on completions: cross-entropy of the targets, the prompt masked (RecLLM-R1 stage 1, section 3.2)."""
from __future__ import annotations

from typing import Callable

from tqdm import tqdm

from .config import Optimizer as OptimizerConfig
from .model import Decoder
from .optim import Optimizer
from .packing import pack
from .policy import score
from .records import Rollout


def fit(model: Decoder, examples: Callable[[int], list[Rollout]], steps: int, config: OptimizerConfig, max_tokens: int) -> list[float]:
    """Trains in place on examples(0), examples(1), ...; returns the mean loss per target token (nats) of each step."""
    optimizer, losses = Optimizer(model, config, steps), []
    bar = tqdm(range(steps), disable=None, desc="sft")
    for step in bar:
        batch_list = pack(examples(step), max_tokens)
        total = sum(len(batch.target) for batch in batch_list)
        loss_sum = 0.0
        for batch in batch_list:
            logp, _ = score(model, batch, temperature=1.0)
            loss = -logp.sum() / total
            loss.backward()
            loss_sum += loss.item()
        norm, lr = optimizer.step()
        losses.append(loss_sum)
        bar.set_postfix(loss=f"{loss_sum:.4f}", norm=f"{norm:.2f}")
        if bar.disable and step % 100 == 0:
            print(f"step {step} loss {loss_sum:.4f} grad norm {norm:.2f}", flush=True)
    return losses
