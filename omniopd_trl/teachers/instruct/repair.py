# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Turn the answer of an instructed chat model into a continuation of the prefix.

`repair` only removes text. A prefix may end inside a word, a number or a formula. When the evidence is unclear, the
answer is kept. `benchmarks/instruct_repair.py` measures the rules.
"""

import re
from itertools import accumulate
from typing import Literal, NamedTuple

from omniopd_trl.teachers.base import Prompt
from omniopd_trl.teachers.instruct.prompt import CJK, role_and_text

Outcome = Literal["ok", "restarted", "refused", "empty"]


class Repaired(NamedTuple):
    """An answer as a continuation.

    Attributes:
        text: the continuation of the prefix; empty unless the outcome is `"ok"` or `"restarted"`.
        outcome: `"restarted"` when the answer starts the solution over or talks about the task, `"refused"` when the
            model declined, `"empty"` when nothing is left.
    """

    text: str
    outcome: Outcome = "ok"


def repair(prefix: str, output: str, prompt: Prompt = "") -> Repaired:
    """Turn the answer of an instructed model into the continuation of `prefix`, in linear time.

    Removes wrappers around the answer (`_unwrap`), then text repeated from the prefix (`_overlap`). An answer that
    repeats nothing may be a restart (`_restarts`) and is then kept unchanged. White space at the joint is kept, too:
    it affects neither the cut of a rollout nor its similarity.

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
    greeting = _GREETING_BEFORE_OPENING.match(output)
    greets = greeting is not None and text == output[greeting.end() :]
    if not skip and (greets or _restarts(prefix, text, prompt)):
        return Repaired(text, "restarted")
    text = text[skip:]
    if not text.strip() or _ELLIPSES.fullmatch(text):
        return Repaired("", "empty")
    return Repaired(text)


# A refusal apologizes, or names the help that it refuses: "I can't divide by 0" is part of a solution.
_REFUSAL = re.compile(
    r"\s*+(?:(?P<sorry>(?:I['’]?m |I am )?(?:very |so |really )?sorry|I apologi[sz]e)[,.;]?\s+(?:but )?|"
    r"unfortunately,? )?I(?:['’]m| am|) ?(?:can['’]?t|can ?not|won['’]t|(?:not able|unable) to) "
    r"(?(sorry)\w|(?:assist|help|comply|fulfil)\b)",
    re.IGNORECASE,
)
# A refusal to answer at all, which a continuation does not contain by chance.
_DECLINES = re.compile(
    r"\s*+(?:(?:I['’]?m|I am) (?:very |so |really )?sorry|sorry|I apologi[sz]e)[,.;]?\s+(?:but )?"
    r"I(?:['’]m| am|) ?(?:can['’]?t|can ?not|won['’]t|(?:not able|unable) to) (?:assist|help|comply|fulfil)\b",
    re.IGNORECASE,
)
_ELLIPSES = re.compile(r"\s*+(?:(?:\.\.\.|…)\s*+){2,}")


def declines(text: str) -> bool:
    """Whether a continuation that no instruction asked for refuses to answer, as in "I'm sorry, but I can't help"."""
    return _DECLINES.match(text) is not None


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
# A greeting counts with an exclamation mark or on a separate line: "Of course, x > 0" may be the solution's text. An
# announcement ends with a colon or with its line.
_CHATTER = re.compile(
    rf"\s*+(?:(?:{_GREETING}[,.!;，。！、]?\s*+)?\**+{_ANNOUNCEMENT}(?:[:：]\**[ \t]*|[.。]?[ \t]*\n)|"
    rf"{_GREETING}(?:[!！]\s+|[.,:。，：]?[ \t]*\n))[\r\n]*",
    re.IGNORECASE,
)
# A fence, and the languages that models name when they wrap prose.
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
    for _ in range(4):  # deeper nesting was not observed
        before = text
        chatter = _CHATTER.match(text)
        if chatter and not text.lstrip()[0].islower():  # "sure." may be the rest of "trea"
            text = text[chatter.end() :]
        text = _unquote(prefix, _untag(prefix, _unfence(prefix, text)))
        if text == before:
            break
    return text


def _unfence(prefix: str, text: str) -> str:
    """Remove a Markdown fence around the answer, unless it may belong to the solution.

    A fence of the solution names a programming language or begins a line. Inside a code block of the prefix, a fence
    with a language reopens the block and is removed. A fence without a language closes the block and is kept, unless
    another one follows.
    """
    fence = _FENCE.match(text)
    if not fence:
        return text
    begins_line, rest = not prefix.rpartition("\n")[2].strip(), text[fence.end() :]
    if prefix.count("```") % 2:
        return rest if fence[2] or (not begins_line and fence[1] in rest) else text
    if fence[2].lower() not in _PROSE and (fence[2] or begins_line):
        return text
    body, _, behind = rest.partition(fence[1])
    return body.removesuffix("\n") + behind.rstrip()


def _untag(prefix: str, text: str) -> str:
    """Remove a tag of the request, or a similar one, at each end, unless the prefix holds the same tag."""
    if (tag := _OPENING_TAG.match(text)) and f"{tag[1]}>" not in prefix:
        text = text[tag.end() :]
    tag = _CLOSING_TAG.search(text, max(0, len(text) - 64))
    return text[: tag.start()] if tag and f"{tag[1]}>" not in prefix else text


def _unquote(prefix: str, text: str) -> str:
    """Remove quotation marks around the whole answer, unless they may belong to the solution.

    They are a wrapper when no quotation can begin there (right after a letter or digit), or when the quoted text has
    several lines, begins with white space, or repeats the prefix: '"les is 180."' after "the ang", not '"yes"' after
    "said ".
    """
    body = text.strip()
    opening, inner, closing = body[:1], body[1:-1], body[-1:]
    if opening + closing not in _QUOTES or opening in inner or closing in inner or not inner.strip():
        return text
    line = prefix.rpartition("\n")[2]
    if line.count(opening) % 2 if opening == closing else line.count(opening) > line.count(closing):
        return text  # it closes a quotation of the prefix
    glued = opening != "`" and prefix[-1:].isalnum() and not CJK.match(prefix[-1])
    return inner if glued or "\n" in inner or inner[0].isspace() or _overlap(prefix, inner) else text


# -- Echoes --

_WINDOW = 4096  # characters; longer echoes are not searched for
_ELLIPSIS = re.compile(r"\s*+(?:\.\.\.|…)[\s.…]*")
_RELATION = re.compile(r"\s*(?:[=≈≤≥<>→⇒]|\\(?:approx|leq?|geq?|implies|Rightarrow|equiv)\b)|(?<![!<>+*/-])=")
_WORD = re.compile(r"(?<![\\A-Za-z])[^\W\d_]{2,}")


def _overlap(prefix: str, text: str) -> int:
    """How many characters at the beginning of `text` are an echo of the end of `prefix`.

    White space and case are ignored. Text may also repeat itself on purpose: "very very", "2 + 2 +", rows of a table.
    So an echo begins at the beginning of a word and does not occur twice in a row in the prefix. It has at least four
    characters with a word among them, or at least seven that end with a letter or digit, or it is part of a relation
    ("= 4").

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
    if before == "\\" or (piece[0].isalnum() and before.isalnum() and not CJK.match(before)):
        return False  # it begins inside a word
    if piece[0] in "([{<" and piece[-1] in ")]}>":
        return False  # a factor: "(x + 1)(x + 1)"
    if _WORD.search(piece):
        return size >= 4
    if _RELATION.search(piece):
        return any(character.isalnum() for character in piece)
    return size >= 7 and piece[-1].isalnum()  # rows and terms may be intended: "0 & 0 \\", "2 + 2 +"


def _squeeze(text: str) -> str:
    """Remove white space, and convert to lower case unless that changes the number of characters."""
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
    r"(?:i['’]ll|i will|let me) (?:now )?(?:continue|pick up|complete|finish)(?: (?:from|where|the|writing)|\Z)|"
    r"(?:it (?:looks|seems) like )?you(?:['’]ve| have)? (?:provided|given me|asked|stopped|started)\b|"
    r"continuing from (?:where|the)|as (?:instructed|requested)\b|here(?:['’]s| is) (?:the |a |my |your )?"
    r"(?:[\w-]+ ){0,2}(?:continuation|solution)|给定的?部分解|部分解答|以下是完整)",
    re.IGNORECASE,
)
_REQUEST = re.compile(r"\bpartial[ _](?:solution|answer|text)|\b(?:the|a) partial?\Z", re.IGNORECASE)
# After a greeting, which `_unwrap` removes, these words open a solution or announce one.
_GREETING_BEFORE_OPENING = re.compile(
    rf"\s*+{_GREETING}!\s+(?=(?:let['’]?s|let us|let me|here(?:['’]s| is| are)|i['’]ll|i will)\b)", re.IGNORECASE
)
# Openings of a solution. The weak ones count only when the prefix stops inside a sentence.
_OPENING = re.compile(
    r"[\s*#]*+(?:(?:okay|ok|alright|great|well)[,.!]? (?:so )?)?(?:let['’]?s|let us|let me|(?:i|we)['’]ll|"
    r"(?:i|we) (?:will|need to|have to)|to) (?:\w+ ){0,2}?(?:solve|answer|work through|tackle|approach|analy[sz]e|"
    r"break down) (?:this|the) (?:problem|question|exercise|task)\b",
    re.IGNORECASE,
)
_WEAK_OPENING = re.compile(
    r"\s*+(?:Let['’]?s (?:solve|start|begin|break|analy[sz]e|consider|denote)|Let us|To (?:solve|find|determine)|"
    r"We (?:need to|are given|want to)|First,|Given(?: that|:| the)|Step 1\b|Here(?:['’]s| is)|\**Solution|#+ [A-Z])"
)


def _restarts(prefix: str, text: str, prompt: Prompt) -> bool:
    """Whether an answer without an echo starts the solution over or talks about the task.

    It starts over when the prefix is past its opening and the answer begins like the prefix or the problem, or opens a
    solution ("To solve this problem"). When the prefix stops inside a sentence, a weak opening ("To find") is enough.
    """
    if _TALK.match(text) or (_REQUEST.search(text, 0, 200) and not _REQUEST.search(prefix)):
        return True
    stripped = prefix.rstrip()
    if len(stripped) < 60 and not re.search(r"[.!?:]\s+\S", stripped):
        return False
    inside = stripped[-1] not in ".!?:;。！？：*`)]}$>|#\"”'" and "\n" not in prefix[len(stripped) :] + text[:1]
    problem = prompt if isinstance(prompt, str) else role_and_text(prompt[-1])[1] if prompt else ""
    return bool(
        any(_begins_like(text, start, inside) and prefix.count(start.strip()[:30]) < 2 for start in (prefix, problem))
        or _OPENING.match(text)
        or (inside and _WEAK_OPENING.match(text))
    )


def _begins_like(text: str, start: str, inside: bool) -> bool:
    """Whether `text` begins with 40 characters or the first line of `start`; inside a sentence, with two words."""
    text, line = text.lstrip()[:120], start.lstrip()[:40].partition("\n")[0].rstrip()
    if text[:1].lower() != line[:1].lower() or sum(character.isalpha() for character in line) < 8 or line[0] == "`":
        return False
    two_words = line[0].isupper() and " " in line and text.split()[:2] == line.split()[:2]
    return (inside and two_words) or _squeeze(text).startswith(_squeeze(line))
