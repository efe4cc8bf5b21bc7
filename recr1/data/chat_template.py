"""Prompt ids from the tokenizer's chat template and the user's text. The text of the data is data
(DESIGN decision 12).
"""

from __future__ import annotations

import json
import re
from typing import Callable, Iterable, Sequence

import jinja2
from tokenizers import Tokenizer

from recr1.data_types import Prompt

USER_TEXT_MARK = (
    "\x1auser-text-{}\x1a"  # stands for the text of a place while the template is rendered
)

PLACEHOLDER = ("query", "history", "candidates", "profile")


class ChatError(ValueError):
    """The prompt cannot be built. The message says which setting to change."""


class ChatTemplate:
    """Encodes prompts. `tokenizer` from transformers; system, user and assistant are the config's
    prompt texts; user holds the places ({query}) that data text goes to.

    The template's pieces are tokenised as they are, with the assistant prefix at the end; the
    user's text so that no added token, special or not, can come out of it. The ids are joined once
    and never detokenised.
    """

    def __init__(
        self, tokenizer, system: str, user: str, assistant: str, places: Sequence[str] = ("query",)
    ):
        for name in places:
            if user.count(f"{{{name}}}") != 1:
                raise ChatError(
                    f"prompt.user: must hold {{{name}}} exactly once, where the user's text goes; this task fills in {_format_placeholders(places)}"
                )
        if strange := [
            name for name in PLACEHOLDER if name not in places and f"{{{name}}}" in user
        ]:
            raise ChatError(
                f"prompt.user: holds {_format_placeholders(strange)}, which this task does not fill in, only {_format_placeholders(places)}"
            )
        self.order = sorted(range(len(places)), key=lambda i: user.index(f"{{{places[i]}}}"))
        for i, name in enumerate(places):
            user = user.replace(f"{{{name}}}", USER_TEXT_MARK.format(i))
        messages = ([{"role": "system", "content": system}] if system else []) + [
            {"role": "user", "content": user}
        ]
        try:
            # the date: Llama 3.2's template asks the clock, and the prompts of a run would change
            # at midnight; Llama 3.1's own default
            rendered = tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, date_string="26 Jul 2024"
            )
        except jinja2.TemplateError as e:
            raise ChatError(
                f"the chat template refuses these messages ({e}); change prompt.system or use another model"
            ) from None
        pieces = [rendered]
        for i in self.order:
            if (times := rendered.count(USER_TEXT_MARK.format(i))) != 1 or USER_TEXT_MARK.format(
                i
            ) not in pieces[-1]:
                raise ChatError(
                    f"the chat template shows the user's message {times} times; it must show it once, unchanged"
                )
            pieces[-1:] = pieces[-1].split(USER_TEXT_MARK.format(i))
        *before, after = pieces
        if "<think>" in assistant and re.search(r"<think>\s*</think>\s*$", after):
            raise ChatError(
                "the chat template ends in a thought that is closed already, and prompt.assistant opens a second one; "
                "set prompt.assistant='' for answers without a thought, or use a template that leaves the thought open"
            )
        if assistant.endswith("<think>") and rendered.rstrip().endswith("<think>"):
            # the template has opened the thought already
            assistant = assistant.removesuffix("<think>")
        self.thought_closed = ends_thought(after + assistant)
        # a space before the user's text belongs to its first word, as it would in the joined text:
        # " word" is one token, " " + "word" two
        self.leads = [" " if piece.endswith(" ") else "" for piece in before]
        before = [piece.removesuffix(" ") for piece in before]
        *self.before, end, prefix = (
            tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
            for text in (*before, after, assistant)
        )
        self.after = end + prefix
        backend = json.loads(tokenizer.backend_tokenizer.to_str())
        self.plain = Tokenizer.from_str(json.dumps(backend | {"added_tokens": []}))

    def prompt(self, *texts: str) -> tuple[int, ...]:
        """The ids the policy continues. texts: one for each of the places, in their order."""
        ids = []
        for before, lead, i in zip(self.before, self.leads, self.order):
            ids += before + self.user_ids(lead + texts[i])
        return (*ids, *self.after)

    def user_ids(self, text: str) -> list[int]:
        """Ids of data text by a tokenizer that has no added tokens: `<think>` in it is letters,
        never the control token.
        """
        return self.plain.encode(text, add_special_tokens=False).ids


def ends_thought(text: str) -> bool:
    """Whether what stands before the sampled text ends a thought, so that the completion is the
    answer alone.
    """
    return text.rstrip().endswith("</think>")


def make_prompts(
    rows: dict[str, dict],
    texts: Callable[[dict], Sequence[str]],
    chat: ChatTemplate,
    max_tokens: int,
    on_long: str,
) -> tuple[list[Prompt], list[str]]:
    """Queries {id: row} -> their prompts in file order, and a message for each one that on_long =
    drop left out. On stop it raises ChatError.

    texts: row -> the texts for the chat's places.
    """
    prompts = []
    dropped = []
    for id, row in rows.items():
        ids = chat.prompt(*texts(row))
        if len(ids) > max_tokens:
            message = f"query {id!r}: its prompt has {len(ids)} tokens, prompt.max_tokens is {max_tokens}; raise it or set data.on_long_prompt=drop"
            if on_long == "stop":
                raise ChatError(message)
            dropped.append(message)
        else:
            prompts.append(Prompt(id, len(prompts), row["text"], ids, row))
    return prompts, dropped


def _format_placeholders(names: Iterable[str]) -> str:
    return ", ".join(f"{{{name}}}" for name in names)
