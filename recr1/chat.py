"""Prompt ids from the tokenizer's chat template and the user's text. The text of the data is data (DESIGN decision 12)."""
from __future__ import annotations

import json
import re

import jinja2
from tokenizers import Tokenizer

from .records import Prompt

MARK = "\x1auser-text\x1a"      # stands for the user's text while the template is rendered


class ChatError(ValueError):
    """The prompt cannot be built. The message says which setting to change."""


class Chat:
    """Encodes prompts. `tokenizer` from transformers; system, user (with {query}) and assistant are the config's prompt texts.

    The template's pieces are tokenised as they are, with the assistant prefix at the end; the user's text so that no added
    token, special or not, can come out of it. The ids are joined once and never detokenised.
    """

    def __init__(self, tokenizer, system: str, user: str, assistant: str):
        if user.count("{query}") != 1:
            raise ChatError("prompt.user: must hold {query} exactly once, where the user's text goes")
        messages = ([{"role": "system", "content": system}] if system else []) + [{"role": "user", "content": user.replace("{query}", MARK)}]
        try:
            # the date: Llama 3.2's template asks the clock, and the prompts of a run would change at midnight; Llama 3.1's own default
            rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, date_string="26 Jul 2024")
        except jinja2.TemplateError as e:
            raise ChatError(f"the chat template refuses these messages ({e}); change prompt.system or use another model") from None
        if rendered.count(MARK) != 1:
            raise ChatError(f"the chat template shows the user's message {rendered.count(MARK)} times; it must show it once, unchanged")
        before, after = rendered.split(MARK)
        if "<think>" in assistant and re.search(r"<think>\s*</think>\s*$", after):
            raise ChatError("the chat template ends in a thought that is closed already, and prompt.assistant opens a second one; "
                            "set prompt.assistant='' for answers without a thought, or use a template that leaves the thought open")
        if assistant.endswith("<think>") and rendered.rstrip().endswith("<think>"):
            assistant = assistant.removesuffix("<think>")      # the template has opened the thought already
        # a space before the user's text belongs to its first word, as it would in the joined text: " word" is one token, " " + "word" two
        self.lead = " " if before.endswith(" ") else ""
        before = before.removesuffix(" ")
        self.before, end, prefix = (tokenizer(text, add_special_tokens=False)["input_ids"] if text else [] for text in (before, after, assistant))
        self.after = end + prefix
        backend = json.loads(tokenizer.backend_tokenizer.to_str())
        self.plain = Tokenizer.from_str(json.dumps(backend | {"added_tokens": []}))

    def prompt(self, text: str) -> tuple[int, ...]:
        """The ids the policy continues."""
        return (*self.before, *self.user_ids(self.lead + text), *self.after)

    def user_ids(self, text: str) -> list[int]:
        """Ids of data text by a tokenizer that has no added tokens: `<think>` in it is letters, never the control token."""
        return self.plain.encode(text, add_special_tokens=False).ids


def make_prompts(queries: dict[str, str], chat: Chat, max_tokens: int, on_long: str) -> tuple[list[Prompt], list[str]]:
    """Queries {id: text} -> their prompts in file order, and a message for each one that on_long = drop left out. On stop it raises ChatError."""
    prompts, dropped = [], []
    for id, text in queries.items():
        ids = chat.prompt(text)
        if len(ids) > max_tokens:
            message = f"query {id!r}: its prompt has {len(ids)} tokens, prompt.max_tokens is {max_tokens}; raise it or set data.on_long_prompt=drop"
            if on_long == "stop":
                raise ChatError(message)
            dropped.append(message)
        else:
            prompts.append(Prompt(id, len(prompts), text, ids))
    return prompts, dropped
