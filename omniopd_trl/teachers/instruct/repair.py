# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Instructed continuation, for services that do not continue a given beginning.

`render_messages` asks for the text that comes next. `repair` turns the answer into a continuation of the prefix. Both
are pure, and `repair` only removes text or adds one space at the joint. A prefix may end inside a word, a number or a
formula; where the evidence is unclear, the answer stays. `benchmarks/instruct_repair.py` measures the rules.
"""

import re
from collections.abc import Iterable
from itertools import accumulate
from typing import Any, Literal, NamedTuple

from omniopd_trl.teachers.base import Prompt, text_of_content

# ---- The request ----

# The same for every request of a run, so that it is the first thing a prompt cache shares.
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

_PROBLEM, _CONVERSATION, _PARTIAL = "problem", "conversation", "partial_solution"


def render_messages(prompt: Prompt, completion: str) -> list[dict[str, str]]:
    """The messages that ask a chat model for what comes right after `completion`.

    A constant instruction, the problem, the partial solution, and words about where it stops. Two prefixes of one
    trajectory render alike up to the end of the shorter one, so a prompt cache can serve them.

    Every text is between tags, byte for byte. A tag that a text itself holds gets a number that it does not hold, such
    as `<problem-2>`. Of the partial solution only the closing tag is numbered after its content.

    Args:
        prompt: plain text, or chat messages; of the messages a single user turn is the problem, anything longer is
            rendered as a conversation, turn by turn.
        completion: the student's text so far; empty asks for the beginning of the solution.

    Returns:
        A system and a user message; the second one ends like `<partial_solution>So the ang</partial_solution>\\n\\nThe
        partial solution stops right before ...`.

    Raises:
        DataError: when a message holds something else than text.
    """
    turns = [("user", prompt)] if isinstance(prompt, str) else [_turn(message) for message in prompt]
    texts = [text for turn in turns for text in turn]
    if len(turns) == 1 and turns[0][0] == "user":
        tag = _free_tag(_PROBLEM, texts)
        problem = f"<{tag}>\n{turns[0][1]}\n</{tag}>"
    else:
        outer, inner = _free_tag(_CONVERSATION, texts), _free_tag("message", texts)
        blocks = [f'<{inner} role="{role}">\n{text}\n</{inner}>' for role, text in turns]
        problem = "\n".join([f"<{outer}>", *blocks, f"</{outer}>"])
    opening = _free_tag(_PARTIAL, texts)
    # The closing tag may differ from the opening one, which must not depend on the completion.
    closing = _free_tag(_PARTIAL, [*texts, completion])
    text = f"{problem}\n\n<{opening}>{completion}</{closing}>\n\n{describe_end(completion, closing)}"
    return [{"role": "system", "content": INSTRUCTION}, {"role": "user", "content": text}]


def describe_end(completion: str, tag: str = _PARTIAL) -> str:
    """Say in words where a partial solution stops, white space included, and what to begin with."""
    if not completion:
        return "The partial solution is still empty: write the beginning of the solution, from its first character."
    stop = f"The partial solution stops right before `</{tag}>`"
    space = completion[len(completion.rstrip()) :]
    last = completion[-1]
    if "\n" in space:
        breaks, indent = space.count("\n"), len(space.rpartition("\n")[2])
        where = "after one line break" if breaks == 1 else f"after {breaks} line breaks"
        where += f" and {indent} white-space characters of the new line" if indent else ""
        where += ", which belongs to it" if breaks == 1 and not indent else ", which belong to it"
        after = "Continue on that new line; do not repeat its white space."
    elif space:
        where = "after a space, which belongs to it" if space == " " else "after white space, which belongs to it"
        after = "Begin with the next word, number or symbol, without another space."
    elif last.isdigit():
        where = f'right after the digit "{last}"'
        after = "If that number is not complete, write its next digit first; if it is, begin with what follows it."
    elif last.isalpha() and not _CJK.match(last):
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


def _turn(message: dict[str, Any]) -> tuple[str, str]:
    content = text_of_content(message.get("content"))
    return str(message.get("role", "user")), "" if content is None else str(content)


def _free_tag(name: str, texts: Iterable[str]) -> str:
    """`name`, or the first of `name-2`, `name-3`, ... whose opening and closing tags no text holds."""
    texts = [text.lower() for text in texts]
    tag, number = name, 1
    while any(f"<{tag}" in text or f"</{tag}" in text for text in texts):
        number += 1
        tag = f"{name}-{number}"
    return tag


# ---- The repair ----

Outcome = Literal["ok", "restarted", "refused", "empty"]


class Repaired(NamedTuple):
    """An answer as a continuation.

    Attributes:
        text: what continues the prefix; empty unless the outcome is `"ok"` or `"restarted"`.
        outcome: `"restarted"` when the answer starts the solution over or talks about the task, `"refused"` when the
            model declined, `"empty"` when nothing is left.
    """

    text: str
    outcome: Outcome = "ok"

    @property
    def restarted(self) -> bool:
        """Whether `outcome` is `"restarted"`."""
        return self.outcome == "restarted"


def repair(prefix: str, output: str, prompt: Prompt = "") -> Repaired:
    """Turn the answer of an instructed model into the continuation of `prefix`, in linear time.

    Removes what is wrapped around the answer (`_unwrap`), then what it repeats of the prefix (`_overlap`). An answer
    that repeats nothing there may be a restart (`_restarts`), which stays as it is. Any other gets a missing space at
    the joint (`_join`).

    Args:
        prefix: the student's text, as given to `render_messages`.
        output: the model's answer.
        prompt: the problem, as given to `render_messages`. With it, an answer that repeats the problem is a restart.

    Example:
        >>> repair("The sum of the ang", "Sure, here is the continuation:\\n\\nthe angles is 180")
        Repaired(text='les is 180', outcome='ok')
    """
    if _REFUSAL.match(output):
        return Repaired("", "refused")
    text = _unwrap(prefix, output)
    skip = _overlap(prefix, text)
    if not skip and _restarts(prefix, text, prompt):
        return Repaired(text, "restarted")
    text = text[skip:]
    if skip and (space := prefix[len(prefix.rstrip()) :]):
        text = text.removeprefix(space) if text.startswith(space) else text.lstrip()
    if not text.strip() or _ELLIPSES.fullmatch(text):
        return Repaired("", "empty")
    return Repaired(_join(prefix, text))


# A refusal apologizes, or names the help that it refuses: "I can't divide by 0" is part of a solution.
_REFUSAL = re.compile(
    r"\s*+(?:(?P<sorry>(?:I['’]?m |I am )?(?:very |so |really )?sorry|I apologi[sz]e)[,.;]?\s+(?:but )?|"
    r"unfortunately,? )?I(?:['’]m| am|) ?(?:can['’]?t|can ?not|won['’]t|(?:not able|unable) to) "
    r"(?(sorry)\w|(?:assist|help|comply|fulfil)\b)",
    re.IGNORECASE,
)
_ELLIPSES = re.compile(r"\s*+(?:(?:\.\.\.|…)\s*+){2,}")

# -- Wrappers --

_GREETING = (
    r"(?:sure|certainly|of course|absolutely|okay|ok|alright|understood|got it|natürlich|gerne|klar|bien sûr|claro|"
    r"por supuesto|certo|конечно|хорошо|好的|当然|はい|承知しました|물론(?:입니다|이죠)?|네)"
)
# "Here is the continuation", "I will continue from where it stopped", "Continuation", in some languages.
_ANNOUNCEMENT = (
    r"(?:(?:here|hier|voici|aqu[íi]|ecco|вот|以下|下面|这是|다음은|아래는)[^\n:：]{0,60}(?:continu|next part|rest of|"
    r"text that comes|fortsetzung|suite|продолжение|续|继续|이어지는|계속)|(?:i['’]ll|i will|let me|let['’]s)"
    r"(?: \w+){0,3} from (?:where|the)|continuing from|(?:the )?continuation|続き)[^\n:：]{0,100}"
)
# A greeting counts with an exclamation mark or on a line of its own: "Of course, x > 0" may be the solution's text. An
# announcement ends with a colon or with its line.
_CHATTER = re.compile(
    rf"\s*+(?:(?:{_GREETING}[,.!;，。！、]?\s*+)?\**+{_ANNOUNCEMENT}(?:[:：]\**[ \t]*|[.。]?[ \t]*\n)|"
    rf"{_GREETING}(?:[!！]\s+|[.,:。，：]?[ \t]*\n))[\r\n]*",
    re.IGNORECASE,
)
# A fence; the languages that a model names when it wraps prose.
_FENCE = re.compile(r"[ \t]*(```+|~~~+)[ \t]*([\w+#.-]*)[ \t]*\r?\n")
_PROSE = ("markdown", "md", "text", "txt", "plaintext", "plain", "latex", "tex", "math")
_TAG = r"</?((?:partial_solution|continuation|continue|completion|output|response)(?:-\d+)?)>"
_OPENING_TAG = re.compile(rf"\s*+{_TAG}\n?", re.IGNORECASE)
_CLOSING_TAG = re.compile(rf"\n?{_TAG}\s*\Z", re.IGNORECASE)
_QUOTES = ('""', "“”", "„“", "«»", "「」", "『』", "``")


def _unwrap(prefix: str, text: str) -> str:
    """Remove greetings, announcements, a fence, tags and quotation marks around an answer, in any order.

    Example: "Sure! Here is the continuation:\\n```\\n= 4\\n```" becomes "= 4".
    """
    for _ in range(4):  # deeper wrapping has not been seen
        before = text
        chatter = _CHATTER.match(text)
        if chatter and not text.lstrip()[0].islower():  # "sure." may be the rest of "trea"
            text = text[chatter.end() :]
        text = _unquote(prefix, _untag(prefix, _unfence(prefix, text)))
        if text == before:
            break
    return text


def _unfence(prefix: str, text: str) -> str:
    """Remove a Markdown fence around the answer, unless it may be the solution's own.

    That one begins a line and names a programming language. Inside a code block of the prefix, a fence with a language
    opens the block again and is removed; one without closes the block and stays.
    """
    fence = _FENCE.match(text)
    if not fence:
        return text
    begins_line, rest = not prefix.rpartition("\n")[2].strip(), text[fence.end() :]
    if prefix.count("```") % 2:
        return rest if fence[2] or not begins_line else text
    if begins_line and fence[2].lower() not in _PROSE:
        return text
    body, _, behind = rest.partition(fence[1])
    return body.removesuffix("\n") + behind.rstrip()


def _untag(prefix: str, text: str) -> str:
    """Remove a tag of the request, or one like it, at each end, unless the prefix holds the same tag."""
    if (tag := _OPENING_TAG.match(text)) and f"{tag[1]}>" not in prefix:
        text = text[tag.end() :]
    tag = _CLOSING_TAG.search(text, max(0, len(text) - 64))
    return text[: tag.start()] if tag and f"{tag[1]}>" not in prefix else text


def _unquote(prefix: str, text: str) -> str:
    """Remove quotation marks around the whole answer, where they cannot be the solution's own.

    They wrap it when no quotation begins there (right after a letter or digit), or when the quoted text has several
    lines, begins with white space, or repeats the prefix: '"les is 180."' after "the ang", not '"yes"' after "said ".
    """
    body = text.strip()
    opening, inner, closing = body[:1], body[1:-1], body[-1:]
    if opening + closing not in _QUOTES or opening in inner or closing in inner or not inner.strip():
        return text
    line = prefix.rpartition("\n")[2]
    if line.count(opening) % 2 if opening == closing else line.count(opening) > line.count(closing):
        return text  # it closes what the prefix opened
    glued = opening != "`" and prefix[-1:].isalnum() and not _CJK.match(prefix[-1])
    return inner if glued or "\n" in inner or inner[0].isspace() or _overlap(prefix, inner) else text


# -- Echoes --

_WINDOW = 4096  # characters; a longer echo is not looked for
_ELLIPSIS = re.compile(r"\s*+(?:\.\.\.|…)[\s.…]*")
_RELATION = re.compile(r"\s*(?:[=≈≤≥<>→⇒]|\\(?:approx|leq?|geq?|implies|Rightarrow|equiv)\b)|(?<![!<>+*/-])=")
_WORD = re.compile(r"(?<![\\A-Za-z])[^\W\d_]{2,}")
_CJK = re.compile("[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff00-\uffef\u3000-\u303f\u0e00-\u0e7f]")


def _overlap(prefix: str, text: str) -> int:
    """How many characters at the beginning of `text` are an echo of the end of `prefix`.

    Compared without white space and case. Text may also repeat itself on purpose: "very very", "2 + 2 +", rows of a
    table. So an echo begins at the beginning of a word, is not in the prefix twice in a row, and has at least four
    characters with a word among them, or seven that end with a letter or digit, or is a part of a relation ("= 4").

    Example: the overlap of "so the sum" and "the sum is" is "the sum"; "x = 4" and "4 + 2" have none.
    """
    ellipsis = _ELLIPSIS.match(text)  # "... the sum is"
    lead = ellipsis.end() if ellipsis and not prefix.rstrip().endswith(("...", "…")) else 0
    window = min(_WINDOW, 2 * len(text) + 64)  # the prefix may have more white space than its echo
    head, tail = _squeeze(text[lead : lead + window]), _squeeze(prefix[-window:])
    start = tail.find(head[:2]) if len(head) > 1 else -1
    while start >= 0:
        echo, size = tail[start:], len(tail) - start
        if head.startswith(echo):
            if tail.endswith(echo + echo) or echo in (echo + echo)[1:-1]:
                return 0
            begin = len(prefix) - _position(prefix[: -window - 1 : -1], size)
            if _is_echo(prefix[:begin][-1:], prefix[begin:].rstrip(), size):
                return lead + _position(text[lead:], size)
        start = tail.find(head[:2], start + 1)
    return 0


def _is_echo(before: str, piece: str, size: int) -> bool:
    if before == "\\" or (piece[0].isalnum() and before.isalnum() and not _CJK.match(before)):
        return False  # it begins inside a word
    if piece[0] in "([{<" and piece[-1] in ")]}>":
        return False  # a factor: "(x + 1)(x + 1)"
    if _WORD.search(piece):
        return size >= 4
    if _RELATION.search(piece):
        return any(character.isalnum() for character in piece)
    return size >= 7 and piece[-1].isalnum()  # rows and terms may be meant: "0 & 0 \\", "2 + 2 +"


def _squeeze(text: str) -> str:
    """Without white space, in lower case unless that changes the number of characters."""
    text = "".join(text.split())
    return lower if len(lower := text.lower()) == len(text) else text


def _position(text: str, count: int) -> int:
    """The index right after the first `count` characters that are not white space."""
    counts = accumulate(not character.isspace() for character in text)
    return next((index for index, n in enumerate(counts, 1) if n == count), len(text))


# -- Restarts --

# Talk about the task.
_TALK = re.compile(
    r"[\s\"'*]*+(?:(?:sure|certainly|absolutely)[,!.]? (?:let|here|i\b)|</?(?:solution|problem|conversation)\b|"
    r"(?:i['’]ll|i will|let me) (?:now )?(?:continue|pick up|complete|finish) (?:from|where|the|writing)|"
    r"continuing from (?:where|the)|as (?:instructed|requested)\b|here(?:['’]s| is) (?:the |a |my |your )?"
    r"(?:[\w-]+ ){0,2}(?:continuation|solution)|给定的?部分解|部分解答|以下是完整)",
    re.IGNORECASE,
)
_REQUEST = re.compile(r"\bpartial[ _](?:solution|answer|text)|\b(?:the|a) partia\Z", re.IGNORECASE)
# The opening of a solution, which the prefix is past; the second only counts where the prefix stops inside a sentence.
_OPENING = re.compile(
    r"[\s*#]*+(?:let['’]?s|let us|let me|(?:i|we)['’]ll|(?:i|we) (?:will|need to|have to)|to) (?:\w+ ){0,2}?(?:solve|"
    r"answer|work through|tackle|approach|analy[sz]e|break down) (?:this|the) (?:problem|question|exercise|task)\b",
    re.IGNORECASE,
)
_WEAK_OPENING = re.compile(
    r"\s*+(?:Let['’]?s (?:solve|start|begin|break|analy[sz]e|consider|denote)|Let us|To (?:solve|find|determine)|"
    r"We (?:need to|are given|want to)|First,|Given(?: that|:| the)|Step 1\b|Here(?:['’]s| is)|\**Solution|#+ [A-Z])"
)


def _restarts(prefix: str, text: str, prompt: Prompt) -> bool:
    """Whether an answer without an echo starts the solution over or talks about the task.

    It starts over when the prefix is past its opening and it begins like the prefix or the problem, opens a solution
    ("To solve this problem"), or, where the prefix stops inside a sentence, may open one ("To find").
    """
    if _TALK.match(text) or (_REQUEST.search(text, 0, 200) and not _REQUEST.search(prefix)):
        return True
    stripped = prefix.rstrip()
    if len(stripped) < 60 and not re.search(r"[.!?:]\s+\S", stripped):
        return False
    inside = stripped[-1] not in ".!?:;。！？：*`)]}$>|#\"”'" and "\n" not in prefix[len(stripped) :] + text[:1]
    problem = prompt if isinstance(prompt, str) else _turn(prompt[-1])[1] if prompt else ""
    return bool(
        any(_begins_like(text, start, inside) and prefix.count(start.strip()[:30]) < 2 for start in (prefix, problem))
        or _OPENING.match(text)
        or (inside and _WEAK_OPENING.match(text))
    )


def _begins_like(text: str, start: str, inside: bool) -> bool:
    """Whether a text begins with 40 characters or the first line of another; inside a sentence, with two words."""
    text, line = text.lstrip()[:120], start.lstrip()[:40].partition("\n")[0].rstrip()
    if text[:1].lower() != line[:1].lower() or sum(character.isalpha() for character in line) < 8 or line[0] == "`":
        return False
    two_words = line[0].isupper() and " " in line and text.split()[:2] == line.split()[:2]
    return (inside and two_words) or _squeeze(text).startswith(_squeeze(line))


# -- The joint --

# What has a space at the joint, here "\0": "= 4", "5 +", ", so", ". So", "is 9", "3 apples".
_SPACE = re.compile(
    r"\s[=+×·≤≥≈→]\0[^\s=]|[\w)\]}]\0[=+*×·≤≥≈→-]\s|(?<!\\)[,;:!?]\0[A-Za-zÀ-ӿ]|\.\0[A-Z]|"
    r"(?:^|[\s(])[A-Za-zÀ-ӿ]{2,}\0\d|\d\0[A-Za-zÀ-ӿ]{3}"
)


def _join(prefix: str, text: str) -> str:
    """Remove a space that the prefix ends with already, or add one that is missing between two signs (`_SPACE`).

    Services and chat models leave out the first space of an answer. Between two words it stays missing: the first may
    be a part of one ("contin"). The similarities ignore outer white space, so a missing space only moves the place
    where a rollout is cut to its chunk's length.
    """
    if prefix.endswith(" ") and prefix.rpartition("\n")[2].strip():
        return text.lstrip(" ")
    return " " + text if _SPACE.search(f"{prefix[-16:]}\0{text[:3]}") else text
