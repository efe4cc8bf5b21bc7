"""A policy at work: the rewrites of queries, of many at once, or of one with its text shown while
it is sampled.
"""

from __future__ import annotations

from pathlib import Path
from typing import Callable, Sequence

import numpy as np

from recr1.config import loader as configs
from recr1.config.schema import ConfigError
from recr1.data.chat_template import ChatTemplate
from recr1.data_types import Prompt, Rollout
from recr1.distributed.fsdp import unsharded
from recr1.evaluation.evaluate import generate_greedily
from recr1.model.hf_config import read_config
from recr1.sampling.generate import generate
from recr1.tasks.answer_parser import parse_query
from recr1.training.load_model import load_policy, resolve_compute_dtype
from recr1.utils import counter_rng
from recr1.utils.hf_hub import load_tokenizer, read_stop_token_ids, resolve_model_folder


class Rewriter:
    """The policy of a model folder or hub id, with the prompt it was trained with: that of the YAML
    `recipe`, by default its own recr1.yaml.
    """

    def __init__(self, model: str, recipe: str | None):
        folder = resolve_model_folder(model)
        self.recipe = recipe or str(Path(folder) / "recr1.yaml")
        if not recipe and not Path(self.recipe).exists():
            raise ConfigError(
                f"{self.recipe}: no such file; it says with which prompt the policy was trained: name a config with --config X.yaml"
            )
        self.config = configs.load_config(self.recipe, [])
        if self.config.task != "product_search":
            raise ConfigError(
                f"{self.recipe}: the policy was trained for the task {self.config.task}, and this command rewrites queries; "
                "its run has scored it in eval_after.jsonl, and `recr1 reward` scores completions of any task"
            )
        self.tokenizer = load_tokenizer(folder)
        self.stops = read_stop_token_ids(folder, self.tokenizer)
        prompt = self.config.prompt
        most = read_config(folder).max_position_embeddings
        if prompt.max_tokens + self.config.sampling.max_new_tokens > most:
            raise ConfigError(
                f"{self.recipe}: prompt.max_tokens + sampling.max_new_tokens exceeds the model's max_position_embeddings = {most}"
            )
        self.chat = ChatTemplate(self.tokenizer, prompt.system, prompt.user, prompt.assistant)
        self.policy = load_policy(folder, len(self.tokenizer), resolve_compute_dtype("auto"))

    def rewrite(self, prompts: list[Prompt]) -> list[str | None]:
        """The queries of the most likely answers, None where one holds none. A collective of all
        ranks.
        """
        return [
            self.parsed(r)[0]
            for r in generate_greedily(
                self.policy, prompts, self.stops, self.config.sampling.max_new_tokens
            )
        ]

    def parsed(self, rollout: Rollout) -> tuple[str | None, str | None]:
        """(query, None) or (None, error), as in training."""
        return parse_query("</think>" * self.chat.thought_closed + self.decode(rollout))

    def prompt(self, query: str) -> Prompt:
        """Raises ConfigError when it is too long."""
        ids = self.chat.prompt(query)
        most = self.config.prompt.max_tokens
        if len(ids) > most:
            raise ConfigError(
                f"the query makes a prompt of {len(ids)} tokens, prompt.max_tokens is {most}; shorten it, or raise that in {self.recipe}"
            )
        return Prompt("query", 0, query, ids)

    def stream(
        self, prompt: Prompt, temperature: float, seed: int, write: Callable[[str], None]
    ) -> Rollout:
        """One answer, written while it is sampled. Temperature 0: the most likely token each time."""
        new = self.config.sampling.max_new_tokens
        uniforms = (
            counter_rng.draw_uniforms(seed, 0, np.array([prompt.index]), 1, new)
            if temperature
            else None
        )
        with unsharded(self.policy), TextStream(self.text, write) as stream:

            def heard(_, id: int) -> None:
                if id not in self.stops:
                    stream.hear(id)

            [rollout] = generate(
                self.policy, [prompt], 1, temperature or 1.0, new, self.stops, uniforms, on_token=heard
            )
        return rollout

    def text(self, ids: Sequence[int]) -> str:
        # as sampled: Llama's would drop spaces
        return self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)

    def decode(self, rollout: Rollout) -> str:
        """Its text, without the end token."""
        return self.text(rollout.ids[:-1] if rollout.ids[-1] in self.stops else rollout.ids)


class TextStream:
    """Writes the text of the ids it hears, each character as soon as it is whole; at the end what
    is left of it, and the line's end.

    The bytes of a character may be spread over tokens: all ids are decoded anew, and U+FFFD at the
    end, which may yet become a character, is held back.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], write: Callable[[str], None]):
        self.decode = decode
        self.write = write
        self.ids: list[int] = []
        self.shown = 0  # characters

    def __enter__(self) -> TextStream:
        return self

    def hear(self, id: int) -> None:
        self.ids.append(id)
        self._show(self.decode(self.ids).rstrip("\ufffd"))

    def __exit__(self, *error) -> None:
        self._show(self.decode(self.ids) + "\n")

    def _show(self, text: str) -> None:
        if len(text) > self.shown:
            self.write(text[self.shown :])
            self.shown = len(text)
