"""Use a trained policy: rewrite many queries at once, or one query with its text shown while it is
sampled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

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
    """The policy of a model folder or hub id, with the prompt that it was trained with.

    The prompt is that of the YAML `recipe`, by default the folder's own recr1.yaml. Raises
    ConfigError where the recipe is missing, of another task, or too long for the model.
    """

    def __init__(self, model: str, recipe: str | None):
        folder = resolve_model_folder(model)
        self.recipe = recipe or str(Path(folder) / "recr1.yaml")
        if not recipe and not Path(self.recipe).exists():
            raise ConfigError(
                f"{self.recipe}: no such file; it says with which prompt the policy was trained: "
                "name a config with --config X.yaml"
            )
        self.config = configs.load_config(self.recipe, [])
        if self.config.task != "product_search":
            raise ConfigError(
                f"{self.recipe}: the policy was trained for the task {self.config.task}, "
                "and this command rewrites queries; its run has scored it in eval_after.jsonl, "
                "and `recr1 reward` scores completions of any task"
            )

        self.tokenizer = load_tokenizer(folder)
        self.stops = read_stop_token_ids(folder, self.tokenizer)

        prompt = self.config.prompt
        self.max_new_tokens = self.config.sampling.max_new_tokens
        max_positions = read_config(folder).max_position_embeddings
        if prompt.max_tokens + self.max_new_tokens > max_positions:
            raise ConfigError(
                f"{self.recipe}: prompt.max_tokens + sampling.max_new_tokens exceeds "
                f"the model's max_position_embeddings = {max_positions}"
            )
        self.chat = ChatTemplate(self.tokenizer, prompt.system, prompt.user, prompt.assistant)
        self.policy = load_policy(folder, len(self.tokenizer), resolve_compute_dtype("auto"))

    def rewrite(self, prompts: list[Prompt]) -> list[str | None]:
        """Return the queries of the most likely answers, None where an answer holds none.

        A collective of all ranks.
        """
        rollouts = generate_greedily(self.policy, prompts, self.stops, self.max_new_tokens)
        queries = []
        for rollout in rollouts:
            query, _error = self.parse_answer(rollout)
            queries.append(query)
        return queries

    def parse_answer(self, rollout: Rollout) -> tuple[str | None, str | None]:
        """Return (query, None) or (None, error), as in training."""
        completion = self.decode_completion(rollout)
        if self.chat.thought_closed:
            completion = "</think>" + completion
        return parse_query(completion)

    def make_prompt(self, query: str) -> Prompt:
        """Make the prompt of a query. Raises ConfigError when it is too long."""
        ids = self.chat.prompt(query)
        max_tokens = self.config.prompt.max_tokens
        if len(ids) > max_tokens:
            raise ConfigError(
                f"the query makes a prompt of {len(ids)} tokens, "
                f"prompt.max_tokens is {max_tokens}; shorten it, or raise that in {self.recipe}"
            )
        return Prompt("query", 0, query, ids)

    def stream_answer(
        self, prompt: Prompt, temperature: float, seed: int, write: Callable[[str], None]
    ) -> Rollout:
        """Sample one answer, and write its text while it is sampled.

        At temperature 0 the most likely token is taken each time, and `seed` is not used.
        """
        uniforms = None
        if temperature:
            prompt_indices = np.array([prompt.index])
            uniforms = counter_rng.draw_uniforms(seed, 0, prompt_indices, 1, self.max_new_tokens)

        with unsharded(self.policy), TextStream(self.decode_ids, write) as stream:

            def show_token(_: int, token_id: int) -> None:
                if token_id not in self.stops:
                    stream.hear(token_id)

            [rollout] = generate(
                self.policy,
                [prompt],
                1,
                temperature or 1.0,
                self.max_new_tokens,
                self.stops,
                uniforms,
                on_token=show_token,
            )
        return rollout

    def decode_ids(self, ids: Sequence[int]) -> str:
        """Decode token ids as they were sampled: Llama's clean-up would drop spaces."""
        return self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)

    def decode_completion(self, rollout: Rollout) -> str:
        """Decode the completion without its end token."""
        ids = rollout.ids
        if ids[-1] in self.stops:
            ids = ids[:-1]
        return self.decode_ids(ids)


class TextStream:
    """Write the text of the token ids it hears, each character as soon as it is complete.

    On exit it writes the rest and the end of the line.

    The bytes of a character may be spread over tokens. So all ids are decoded anew each time, and
    U+FFFD at the end is held back: it may yet become a character.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], write: Callable[[str], None]):
        self.decode = decode
        self.write = write
        self.ids: list[int] = []
        self.num_shown = 0  # characters

    def __enter__(self) -> TextStream:
        return self

    def hear(self, token_id: int) -> None:
        """Add a token, and write the characters that are now complete."""
        self.ids.append(token_id)
        text = self.decode(self.ids)
        self._show(text.rstrip("\ufffd"))

    def __exit__(self, *error: object) -> None:
        text = self.decode(self.ids)
        self._show(text + "\n")

    def _show(self, text: str) -> None:
        """Write what of `text` is not written yet."""
        if len(text) > self.num_shown:
            self.write(text[self.num_shown :])
            self.num_shown = len(text)
