"""Make prompt ids from the tokenizer's chat template and the user's text. The text of the data is
data, never control tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence

import jinja2
from tokenizers import Tokenizer

from recr1.data_types import Prompt

# Stands for the text of a placeholder while the template is rendered.
USER_TEXT_MARK = "\x1auser-text-{}\x1a"

PLACEHOLDERS = ("query", "history", "candidates", "profile")


class ChatError(ValueError):
    """The prompt cannot be built. The message says which setting to change."""


class ChatTemplate:
    """Encode prompts.

    The template's pieces are tokenized as they are, with the assistant prefix at the end; the
    user's text so that no added token, special or not, can come out of it. The ids are joined once
    and never detokenized.

    Attributes:
        order: which placeholder comes first in the prompt, which second, ...
        before: the ids of the template's piece before each placeholder, in that order.
        leads: " " for each placeholder whose text begins with the space before it, else "".
        after: the ids behind the last placeholder, the assistant prefix included.
        thought_closed: whether the prompt has ended the thought already.
    """

    def __init__(
        self,
        tokenizer,
        system: str,
        user: str,
        assistant: str,
        placeholders: Sequence[str] = ("query",),
    ):
        """Split the template at the placeholders.

        Args:
            tokenizer: one of transformers.
            system, user, assistant: the config's prompt texts. `user` holds the placeholders
                ({query}) that the data's text replaces.
        """
        _check_placeholders(user, placeholders)
        positions = [user.index(f"{{{name}}}") for name in placeholders]
        self.order = sorted(range(len(placeholders)), key=positions.__getitem__)
        for i, name in enumerate(placeholders):
            user = user.replace(f"{{{name}}}", USER_TEXT_MARK.format(i))

        rendered = _render(tokenizer, system, user)
        *before, after = _split_at_marks(rendered, self.order)
        if "<think>" in assistant and re.search(r"<think>\s*</think>\s*$", after):
            raise ChatError(
                "the chat template ends in a thought that is closed already, "
                "and prompt.assistant opens a second one; "
                "set prompt.assistant='' for answers without a thought, "
                "or use a template that leaves the thought open"
            )
        if assistant.endswith("<think>") and rendered.rstrip().endswith("<think>"):
            assistant = assistant.removesuffix("<think>")  # the template has opened the thought
        self.thought_closed = ends_thought(after + assistant)

        # A space before the user's text belongs to its first word, as it would in the joined text:
        # " word" is one token, " " + "word" two.
        self.leads = [" " if piece.endswith(" ") else "" for piece in before]

        def encode(text: str) -> list[int]:
            return tokenizer(text, add_special_tokens=False)["input_ids"] if text else []

        self.before = [encode(piece.removesuffix(" ")) for piece in before]
        self.after = encode(after) + encode(assistant)

        # The user's text is encoded by a tokenizer without added tokens.
        backend = json.loads(tokenizer.backend_tokenizer.to_str())
        without_added = json.dumps(backend | {"added_tokens": []})
        self.plain = Tokenizer.from_str(without_added)

    def prompt(self, *texts: str) -> tuple[int, ...]:
        """Return the ids that the policy continues. `texts`: one for each placeholder, in the order
        in which the placeholders were given.
        """
        ids: list[int] = []
        for before, lead, i in zip(self.before, self.leads, self.order):
            ids += before
            ids += self.user_ids(lead + texts[i])
        return (*ids, *self.after)

    def user_ids(self, text: str) -> list[int]:
        """Return the ids of data text by a tokenizer that has no added tokens: `<think>` in it is
        letters, never the control token.
        """
        return self.plain.encode(text, add_special_tokens=False).ids


def _check_placeholders(user: str, placeholders: Sequence[str]) -> None:
    """Raise ChatError unless `user` holds each of the placeholders once, and no other."""
    for name in placeholders:
        if user.count(f"{{{name}}}") != 1:
            raise ChatError(
                f"prompt.user: must hold {{{name}}} exactly once, where the user's text goes; "
                f"this task fills in {_format_placeholders(placeholders)}"
            )
    others = [name for name in PLACEHOLDERS if name not in placeholders]
    unfilled = [name for name in others if f"{{{name}}}" in user]
    if unfilled:
        raise ChatError(
            f"prompt.user: holds {_format_placeholders(unfilled)}, "
            f"which this task does not fill in, only {_format_placeholders(placeholders)}"
        )


def _render(tokenizer, system: str, user: str) -> str:
    """Return the template's text of the messages, up to where the answer begins."""
    messages = [{"role": "user", "content": user}]
    if system:
        messages.insert(0, {"role": "system", "content": system})
    try:
        # The date is Llama 3.1's own default. Llama 3.2's template asks the clock, and the prompts
        # of a run would change at midnight.
        return tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, date_string="26 Jul 2024"
        )
    except jinja2.TemplateError as e:
        raise ChatError(
            f"the chat template refuses these messages ({e}); "
            "change prompt.system or use another model"
        ) from None


def _split_at_marks(rendered: str, order: Sequence[int]) -> list[str]:
    """Split the rendered text at the placeholders' marks, which come in this order.

    Raises ChatError unless each is there once.
    """
    pieces = []
    rest = rendered
    for i in order:
        mark = USER_TEXT_MARK.format(i)
        times = rendered.count(mark)
        if times != 1 or mark not in rest:
            raise ChatError(
                f"the chat template shows the user's message {times} times; "
                "it must show it once, unchanged"
            )
        piece, rest = rest.split(mark)
        pieces.append(piece)
    return [*pieces, rest]


def ends_thought(text: str) -> bool:
    """Return whether the text before the sampled one ends a thought, so that the completion is the
    answer alone.
    """
    return text.rstrip().endswith("</think>")


def make_prompts(
    rows: dict[str, dict],
    get_texts: Callable[[dict], Sequence[str]],
    chat: ChatTemplate,
    max_tokens: int,
    on_long: str,
) -> tuple[list[Prompt], list[str]]:
    """Make the prompts of queries {id: row}, in file order.

    `get_texts(row)` returns the texts for the chat's placeholders. A prompt of more than
    `max_tokens` is left out where `on_long` is drop, and raises ChatError where it is stop. Returns
    the prompts, and a message for each one that was left out.
    """
    prompts: list[Prompt] = []
    dropped: list[str] = []
    for query_id, row in rows.items():
        ids = chat.prompt(*get_texts(row))
        if len(ids) <= max_tokens:
            prompts.append(Prompt(query_id, len(prompts), row["text"], ids, row))
            continue
        message = (
            f"query {query_id!r}: its prompt has {len(ids)} tokens, "
            f"prompt.max_tokens is {max_tokens}; raise it or set data.on_long_prompt=drop"
        )
        if on_long == "stop":
            raise ChatError(message)
        dropped.append(message)
    return prompts, dropped


def _format_placeholders(names: Iterable[str]) -> str:
    return ", ".join(f"{{{name}}}" for name in names)
