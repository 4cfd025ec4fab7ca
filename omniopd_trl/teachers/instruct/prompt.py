# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""The prompt that asks for a continuation, for chat models without a prefill."""

import re
from collections.abc import Iterable, Sequence
from typing import Any

from omniopd_trl.teachers.base import Prompt, text_of_content

# Constant for all requests of a run, and first in the prompt, so a prompt cache shares it.
INSTRUCTION = """\
You continue a text. The user message holds a problem (or a conversation that ends with one) and the beginning of a \
solution to it, the partial solution, each between tags. Write the text that comes immediately next in the solution, \
as if the partial solution were your own words and you had never stopped writing.

- Start at the exact character where the partial solution stops, even if that is in the middle of a sentence, a word, \
a number, a formula or a line of code. Start with the space or line break that belongs there, or without one.
- Do not repeat anything that is already written, and do not start the solution anew.
- Write only the solution's text: no greeting, no introduction, no comment on the task or on the partial solution, no \
quotation marks, tags or Markdown fence around your answer.
- Keep the language, notation, format and style of the partial solution.
- Go on in its line of thought even where it seems wrong or strange to you; you may notice a mistake only in the way \
its author would, as part of the solution.
- When the solution is complete, stop."""

CJK = re.compile("[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff00-\uffef\u3000-\u303f\u0e00-\u0e7f]")
_PROBLEM, _CONVERSATION, _PARTIAL = "problem", "conversation", "partial_solution"


def render_messages(prompt: Prompt, completion: str) -> list[dict[str, str]]:
    """Messages that ask a chat model to continue right after `completion`.

    They hold a constant instruction, the problem, the partial solution, and a sentence on where it stops. Two prefixes
    of one trajectory render identically up to the end of the shorter one, so a prompt cache can serve them.

    Every text is between tags, byte for byte. A tag that occurs in a text gets a number, such as `<problem-2>`. Only
    the closing tag of the partial solution depends on its content.

    Args:
        prompt: plain text, or chat messages. A single user message is rendered as the problem, anything else as a
            conversation, turn by turn.
        completion: the student's text so far. When empty, the beginning of the solution is requested.

    Returns:
        A system and a user message. The user message ends like `<partial_solution>So the
        ang</partial_solution>\\n\\nThe partial solution stops right before ...`.

    Raises:
        DataError: when a message holds anything but text.
    """
    turns = turns_of(prompt)
    texts = [text for turn in turns for text in turn]
    opening = free_tag(_PARTIAL, texts)
    # The closing tag may differ from the opening one. The opening one must not depend on the completion.
    closing = free_tag(_PARTIAL, [*texts, completion])
    text = f"{render_problem(turns)}\n\n<{opening}>{completion}</{closing}>\n\n{describe_end(completion, closing)}"
    return [{"role": "system", "content": INSTRUCTION}, {"role": "user", "content": text}]


def turns_of(prompt: Prompt) -> list[tuple[str, str]]:
    """Role and text of each turn of a prompt; plain text is one turn of the user."""
    return [("user", prompt)] if isinstance(prompt, str) else [role_and_text(message) for message in prompt]


def render_problem(turns: Sequence[tuple[str, str]], others: Iterable[str] = ()) -> str:
    """A prompt between tags, byte for byte.

    Args:
        turns: the result of [`turns_of`].
        others: other texts of the same message, in which no tag may occur either.
    """
    texts = [text for turn in turns for text in turn] + list(others)
    if len(turns) == 1 and turns[0][0] == "user":
        tag = free_tag(_PROBLEM, texts)
        return f"<{tag}>\n{turns[0][1]}\n</{tag}>"
    outer, inner = free_tag(_CONVERSATION, texts), free_tag("message", texts)
    blocks = [f'<{inner} role="{role}">\n{text}\n</{inner}>' for role, text in turns]
    return "\n".join([f"<{outer}>", *blocks, f"</{outer}>"])


def describe_end(completion: str, tag: str = _PARTIAL) -> str:
    """Describe where a partial solution stops, and what to begin with."""
    if not completion:
        return "The partial solution is still empty: write the beginning of the solution, from its first character."
    stop = f"The partial solution stops right before `</{tag}>`"
    space, last = completion[len(completion.rstrip()) :], completion[-1]
    if space:
        kind = "line break" if "\n" in space else "space"
        where = f"after a {kind}, which belongs to it"
        after = "Begin with the next word, number or symbol; do not repeat the white space."
    elif last.isdigit():
        where = f'right after the digit "{last}"'
        after = "If that number is not complete, write its next digit first; if it is, begin with what follows it."
    elif last.isalpha() and not CJK.match(last):
        word = re.search(r"[^\W\d_]+\Z", completion[-64:])
        where = f'right after the letter "{last}" of "{word[0] if word else last}"'
        after = (
            "If that is not a whole word, write the rest of the word first; if it is whole, begin with the space or "
            "the punctuation mark that follows it."
        )
    else:
        where = f'right after the character "{last}"'
        after = "Begin with what follows it, with a space or a line break first where one belongs."
    return f"{stop}, {where}. {after} Write only what comes immediately next."


def role_and_text(message: dict[str, Any]) -> tuple[str, str]:
    content = text_of_content(message.get("content"))
    return str(message.get("role", "user")), "" if content is None else str(content)


def free_tag(name: str, texts: Iterable[str]) -> str:
    """`name`, or the first of `name-2`, `name-3`, ... whose tags occur in no text."""
    texts = [text.lower() for text in texts]
    tag, number = name, 1
    while any(f"<{tag}" in text or f"</{tag}" in text for text in texts):
        number += 1
        tag = f"{name}-{number}"
    return tag
