# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Instructed continuation, for services that refuse to continue a given beginning.

`render_messages` asks for the text that comes immediately next. `repair` turns what the model wrote into a
continuation that joins on. Both are pure, and `repair` only ever removes text or adds one space at the joint.

The rules of `repair` weigh two mistakes against each other: to keep an echo, and to eat text that was meant. A split
between two tokens is the common case, so that a joint may be inside a word, a number or a formula; where the evidence
is not clear, the output stays as it is.
"""

import re
from collections.abc import Iterable
from functools import lru_cache
from typing import Any, NamedTuple

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

    A constant instruction, then the problem, then the partial solution, then words about where it stops. Nothing
    before the partial solution depends on it, so that two prefixes of one trajectory render to texts that are equal
    up to the end of the shorter one, and a prompt cache can serve them.

    Every text stands between tags byte for byte. A tag that the text itself holds gets a number that it does not hold:
    a problem with `</problem>` in it is put between `<problem-2>` and `</problem-2>`. Of the partial solution only the
    closing tag is numbered after its content, and the words behind it name that tag.

    Args:
        prompt: plain text, or chat messages; of the messages a single user turn is the problem, anything longer is
            rendered as a conversation, turn by turn.
        completion: the student's text so far; empty asks for the beginning of the solution.

    Returns:
        A system and a user message. Example, of the second one's end: `...</problem>\\n\\n<partial_solution>So the
        ang</partial_solution>\\n\\nThe partial solution stops right before ...`.

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
    """Say in words where a partial solution stops, white space included, and what to begin with.

    Example: `describe_end("So the ang")` names the letter "g", and asks for the rest of the word or, if the word is
    whole, for the space that follows it.
    """
    if not completion:
        return "The partial solution is still empty: write the beginning of the solution, from its first character."
    stop = f"The partial solution stops right before `</{tag}>`"
    space = completion[len(completion.rstrip()) :]
    last = completion[-1]
    if "\n" in space:
        breaks = space.count("\n")
        line = "one line break" if breaks == 1 else f"{breaks} line breaks"
        indent = len(space.rpartition("\n")[2])
        if indent:
            where = f"after {line} and {indent} white-space characters of the new line, which belong to it"
        else:
            where = f"after {line}, which belong{'s' * (breaks == 1)} to it"
        after = "Continue on that new line; do not repeat its white space."
    elif space:
        where = "after a space, which belongs to it" if space == " " else "after white space, which belongs to it"
        after = "Begin with the next word, number or symbol, without another space."
    elif last.isdigit():
        where = f'right after the digit "{last}"'
        after = "If that number is not complete, write its next digit first; if it is, begin with what follows it."
    elif last.isalpha() and not _CJK.match(last):
        where = f'right after the letter "{last}" of "{_last_word(completion)}"'
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


class Repaired(NamedTuple):
    """A model's answer as a continuation.

    Attributes:
        text: what joins on to the prefix; empty when nothing is left.
        restarted: whether the answer began the solution anew or talked about the task. The text is then the best that
            could be made of it.
    """

    text: str
    restarted: bool = False


def repair(prefix: str, output: str) -> Repaired:
    """Turn what an instructed model wrote into the continuation of `prefix`.

    In this order: an answer without text is empty, and a refusal is returned as it is. What is wrapped around the
    answer goes (`_unwrap`), then what it repeats of the prefix (`_overlap`). If nothing was repeated, the answer may
    be a restart (`_restarts`). Last, the joint gets its space (`_join`). Everything else stays byte for byte.

    Args:
        prefix: the student's text, as it stood in `render_messages`.
        output: the model's answer.

    Example: `repair("The sum of the ang", "Sure, here is the continuation:\\n\\nthe angles is 180")` returns the text
    `"les is 180"`.
    """
    if not output.strip():
        return Repaired("")
    if _REFUSAL.match(output.lstrip()):
        return Repaired(output)
    text = _unwrap(prefix, output)
    if not text.strip():
        return Repaired("")
    skip = _overlap(prefix, text)
    if skip:
        text = _trim_joint(prefix, text[skip:])
        restarted = False
    else:
        restarted = _restarts(prefix, text)
    if not text.strip() and skip:
        return Repaired("")
    return Repaired(text if restarted else _join(prefix, text), restarted)


_REFUSAL = re.compile(
    r"(?:I['’]m (?:really |very |so )?sorry|I am sorry|Sorry|I apologi[sz]e|Unfortunately)?[,.;]?\s*(?:but )?"
    r"I(?: can(?:['’]t|not)|['’]m (?:not able|unable)| am (?:not able|unable)| won['’]t)(?: to)? "
    r"(?:assist|help|comply|fulfil|provide|continue|do that)",
    re.IGNORECASE,
)

# -- What is wrapped around an answer --

_GREETING = (
    r"(?:sure(?: thing)?|certainly|of course|absolutely|okay|ok|alright|all right|understood|got it|no problem|gladly|"
    r"hello|hi(?: there)?|thank you|thanks|natürlich|gerne|klar|selbstverständlich|bien sûr|d'accord|certainement|"
    r"claro(?: que s[íi])?|por supuesto|certo|certamente|com certeza|конечно|хорошо|好的|当然(?:可以)?|没问题|"
    r"はい|承知しました|わかりました|물론(?:입니다|이죠)?|네)"
)
_WHERE = (
    r"(?:where|at the (?:exact )?point|from the (?:exact )?(?:point|partial|given)|the (?:partial |given )?solution)"
)
_META = "|".join(
    (
        r"here(?:['’]s| is| are| comes)(?: (?:the|a|my|your|an))?"
        r"(?: (?:exact|direct|natural|seamless|immediate|requested))*"
        r" (?:continuation|continued|next part|rest of the|remainder of the|text that comes|completion of the)"
        r"[^\n:]{0,100}",
        rf"(?:i['’]ll|i will|let me|let['’]s|let us)(?: now)? (?:continue|pick up|carry on|resume|go on)"
        rf"(?: \w+){{0,3}}? {_WHERE}[^\n:]{{0,100}}",
        r"continuing(?: \w+)? (?:from|with) [^\n:]{0,40}(?:partial solution|left off|stopped|the point|given text)"
        r"[^\n:]{0,60}",
        r"\**(?:the )?continuation(?: of the (?:partial )?solution)?\**",
        r"hier (?:ist|kommt|folgt) (?:die|der|das)[^\n:]{0,40}(?:fortsetzung|weitere text|nächste teil)[^\n:]{0,60}",
        r"voici (?:la|le)[^\n:]{0,30}(?:suite|continuation)[^\n:]{0,60}",
        r"(?:aqu[íi] (?:está|tienes|va)|ecco|segue)[^\n:]{0,30}(?:continuación|continuação|continuazione|seguito)"
        r"[^\n:]{0,60}",
        r"вот[^\n:]{0,30}продолжение[^\n:]{0,60}",
        r"(?:以下是|下面是|这是)[^\n:：]{0,12}(?:续写|续文|后续|接续|继续|延续)[^\n:：]{0,12}",
        r"(?:以下は|以下に)?[^\n:：]{0,8}続き(?:です|は(?:次|以下)の(?:通り|とおり)です)?",
        r"(?:다음은|아래는)[^\n:]{0,12}(?:이어지는|계속|연속)[^\n:]{0,16}",
    )
)
# A greeting counts on a line of its own or with an exclamation mark; "Of course, x > 0" may be the solution's text. A
# meta line has to end like one, with a colon or with the line.
_CHATTER = re.compile(
    rf"\s*(?:(?:{_GREETING}[,.!;，。！、]?\s*)?(?:{_META})(?:\**[:：]\**[ \t]*\n?|[.。]?[ \t]*\n)|"
    rf"{_GREETING}(?:[!！]\s+|[.,:。，：]?[ \t]*\n))[\r\n]*",
    re.IGNORECASE,
)
_FENCE = re.compile(r"[ \t]*(```+|~~~+)[ \t]*([\w+#.-]*)[ \t]*\r?\n")
# Languages that a model names when it wraps prose; a fence of code may be part of the solution.
_PROSE = {"", "markdown", "md", "text", "txt", "plaintext", "plain", "latex", "tex", "math"}
_TAG_NAMES = (
    r"(?:partial_solution|problem|conversation|continuation|continued|continue|completion|next_text|next|output|response)"
    r"(?:-\d+)?"
)
_OPEN_TAG = re.compile(rf"\s*</?({_TAG_NAMES})>\n?", re.IGNORECASE)
_CLOSE_TAG = re.compile(rf"\n?</({_TAG_NAMES})>\s*\Z", re.IGNORECASE)
_QUOTES = {'"': '"', "“": "”", "„": "“", "«": "»", "「": "」", "『": "』", "`": "`"}


def _unwrap(prefix: str, text: str) -> str:
    """Drop meta lines, fences, tags and quotation marks around an answer, in any order.

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
    """Drop a Markdown fence around the answer, unless it may be the solution's own.

    A fence begins a line. It is a wrapper when the prefix stops inside a line, or when it names prose ("markdown").
    A prefix that stops inside a code block is special: a fence that names a language opens it once more and goes, and
    the closing fence is the block's own; a bare fence at the beginning of a line closes the block and stays.
    """
    opening = _FENCE.match(text)
    if not opening:
        return text
    mark, language = opening[1], opening[2].lower()
    at_line_start = not prefix.rpartition("\n")[2].strip()
    rest = text[opening.end() :]
    if _in_fence(prefix):
        return rest if language or not at_line_start else text
    if at_line_start and language not in _PROSE - {""}:
        return text
    stripped = rest.rstrip()
    if stripped.endswith(mark):
        body = stripped[: -len(mark)].rstrip(" \t")
        return body[:-1] if body.endswith("\n") else body if body else ""
    closing = rest.find("\n" + mark + "\n")
    return rest if closing < 0 else rest[:closing] + rest[closing + 1 + len(mark) :]


def _untag(prefix: str, text: str) -> str:
    """Drop tags of the request, or of an answer, at both ends; text whose prefix holds the same tag keeps it."""
    if "<" not in text:
        return text
    for pattern in (_OPEN_TAG, _CLOSE_TAG):
        found = pattern.match(text) if pattern is _OPEN_TAG else pattern.search(text, max(0, len(text) - 64))
        if found and f"<{found[1]}" not in prefix and f"</{found[1]}" not in prefix:
            text = text[found.end() :] if pattern is _OPEN_TAG else text[: found.start()]
    return text


def _unquote(prefix: str, text: str) -> str:
    """Drop quotation marks around the whole answer, where they cannot be the solution's own.

    They are a wrapper when the mark occurs nowhere else and the prefix stops right after a letter or digit (no
    quotation begins there), or when the quoted text has several lines, begins with white space, or repeats the prefix.
    Example: after "the ang", '"les is 180."' is wrapped; after "she said ", '"yes"' is not.
    """
    body = text.strip()
    if len(body) < 2 or _QUOTES.get(body[0]) != body[-1]:
        return text
    opening, closing, inner = body[0], body[-1], body[1:-1]
    if opening in inner or closing in inner or not inner.strip():
        return text
    line = prefix.rpartition("\n")[2]
    if line.count(opening) > line.count(closing) or (opening == closing and line.count(opening) % 2):
        return text  # it closes what the prefix opened
    glued = prefix[-1:].isalnum() and not _CJK.match(prefix[-1])
    if (glued and opening != "`") or "\n" in inner or inner[0].isspace() or _overlap(prefix, inner):
        return inner
    return text


# -- What an answer repeats of the prefix --

# No overlap is longer than the answer; of white space, which is not counted, the prefix may hold more.
_WINDOW = 8192
_SEED = 2
_MAX_CANDIDATES = 16
_ELLIPSIS = re.compile(r"\s*(?:\.\.\.|…)\s*")
_EQUALS = re.compile(r"(?<![=!<>+*/-])=(?!=)")
_RELATION = re.compile(r"(?:(?<!=)=(?!=)|≈|≤|≥|<|>|→|⇒|\\(?:approx|leq?|geq?|implies|Rightarrow|equiv)\b)")
_CJK = re.compile("[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff00-\uffef\u3000-\u303f\u0e00-\u0e7f]")
_PROSE_WORD = re.compile(r"(?<![\\A-Za-z])[^\W\d_]{2,}")


def _overlap(prefix: str, text: str) -> int:
    """How many characters at the beginning of `text` repeat the end of `prefix`.

    The longest repetition that counts, compared without white space and without regard to case. Text may repeat itself
    on purpose ("1" and "1", "very very", "2 + 2 +", rows of a table), so that a repetition counts only if

    - it has at least two characters besides white space and begins at the beginning of a word,
    - the prefix does not already repeat it (then it is a pattern, which goes on), and
    - it is evidently an echo (`_is_echo`).

    After "x = 4", the text "4 + 2" stays as it is, and of "= 4 + 2" only " + 2" is left. Example: the overlap of "so
    the sum" and "the sum is" is "the sum".
    """
    lead = _ELLIPSIS.match(text)  # "... the sum is" echoes with an ellipsis before it
    if lead and not prefix.rstrip().endswith(("...", "…")):
        inner = _overlap(prefix, text[lead.end() :])
        if inner:
            return lead.end() + inner
    head = _squeeze(text)
    if len(head) >= _WINDOW // 2 and len(head) >= len(prefix) // 2:
        whole = _squeeze(prefix)  # a long prefix, repeated from its very beginning
        if head.startswith(whole):
            return _position(text, len(whole))
    tail = _squeeze(prefix[-min(_WINDOW, 2 * len(text) + 64) :])
    if len(head) < _SEED or len(tail) < _SEED:
        return 0
    seed, last = head[:_SEED], tail[-1]
    start = tail.find(seed, max(0, len(tail) - len(head)))
    candidates = 0
    while start >= 0 and candidates < _MAX_CANDIDATES:
        size = len(tail) - start
        # The last character is compared first: it spares most of the copies that the full comparison makes.
        if head[size - 1] == last and head.startswith(tail[start:]):
            candidates += 1
            if _is_pattern(tail, size):
                return 0
            end = _position(text, size)
            if _is_echo(prefix, text, size, end):
                return end
        start = tail.find(seed, start + 1)
    return 0


def _squeeze(text: str) -> str:
    """Without white space, in lower case; a case that changes the length is left alone, so that counts still agree."""
    text = "".join(text.split())
    lower = text.lower()
    return lower if len(lower) == len(text) else text


def _position(text: str, count: int) -> int:
    """The index right after the first `count` characters that are not white space."""
    for word in re.finditer(r"\S+", text):
        if count <= word.end() - word.start():
            return word.start() + count
        count -= word.end() - word.start()
    return len(text)


def _is_pattern(tail: str, size: int) -> bool:
    """Whether the last `size` characters are repetitive, by themselves or together with those before them."""
    piece = tail[-size:]
    return tail.endswith(piece + piece) or piece in (piece + piece)[1:-1]


def _is_echo(prefix: str, text: str, size: int, end: int) -> bool:
    """Whether a repetition is evidently an echo.

    It is one if it holds several words of prose, or four characters of Chinese or Japanese; or one word that cannot
    stand twice without a space ("therefore" + "therefore 4"), or that was only begun ("contin" + "continuation"); or a
    formula that holds "=" or begins with another relation; or three different numbers or names, or two from the
    beginning of a line or formula. Terms, factors, rows and lists that may stand twice do not count.
    """
    piece = text[:end].strip()
    start = len(prefix) - _position(prefix[: -(2 * len(text) + 64) - 1 : -1], size)
    before = prefix[start - 1 : start]
    cjk = len(_CJK.findall(piece))
    if cjk >= 4:
        return True
    if before == "\\" or (piece[0].isalnum() and before.isalnum() and not _CJK.match(before)):
        return False  # it begins inside a word
    words = _PROSE_WORD.findall(piece)
    glued = prefix[-1:].isalnum() and text[:1].isalnum()
    line, stripped = prefix[:start].rpartition("\n")[2], prefix[:start].rstrip()
    begins_line = not line.strip(" \t*#>-") or stripped.endswith((".", "!", "?"))
    if len(words) >= 3 and size >= 8:
        return True
    apart = not prefix[-1].isspace() and not text[0].isspace()
    if len(words) == 2 and size >= (6 if apart else 8 if begins_line else 10):
        return True
    factor = piece[-1] in ")}]>"  # "(x + 1)(x + 1)", "<br><br>"
    if (
        len(words) == 1
        and size >= 6
        and apart
        and not factor
        and piece[0].isalnum()
        and 3 <= len(words[0]) < len(piece)
    ):
        return True
    if glued:
        if len(words) == 1 and len(piece) == len(words[0]):
            # One word: whole ("therefore" + "therefore 4"), or begun ("contin" + "continuation"). A begun one that is
            # a word of its own ("with" + "without") is more likely to lack its space.
            inside = text[end : end + 1].isalpha()
            return len(piece) >= 4 and not (inside and piece.lower() in _COMMON)
        if size >= 6 and not piece.isdigit():
            return True
    if _RELATION.match(piece) or _EQUALS.search(piece):
        return any(character.isalnum() for character in piece)
    whole_lines = prefix.endswith("\n") and begins_line  # rows of tables and lines of code repeat themselves
    if factor or whole_lines:
        return False
    names = len(set(re.findall(r"(?<!\\)\b\w+", piece)))
    in_formula = stripped.endswith(("$", "\\(", "\\["))
    if (begins_line or in_formula) and size >= 8 and names >= 2 and piece[-1].isalnum():
        return True
    # Three different numbers or names; but a list may go round: "7, 9, 3, 1, 7, 9, 3, 1".
    return size >= 7 and names >= 3 and "," not in piece


def _trim_joint(prefix: str, rest: str) -> str:
    """White space that followed the echo, less that which the prefix ends with."""
    have = prefix[len(prefix.rstrip()) :]
    space = rest[: len(rest) - len(rest.lstrip())]
    if not have or not space:
        return rest
    if space.startswith(have):
        return rest[len(have) :]
    if space.count("\n") > have.count("\n"):
        position = 0
        for _ in range(have.count("\n")):
            position = rest.index("\n", position) + 1
        return rest[position:]
    return rest[len(space) :]


# -- Restarts --

_TALK = re.compile(
    r"[\s\"'*]*(?:(?:the|this|your|in the|from the) (?:given |provided )?"
    r"(?:partial (?:solution|answer|text)|solution so far)|"
    r"(?:i['’]ll|i will|let me) (?:now )?(?:continue|pick up|complete|finish) "
    r"(?:from|where|the (?:partial )?solution|writing)|"
    r"continuing from (?:where|the)|as (?:instructed|requested)\b|"
    r"here(?:['’]s| is) (?:the |a |my |your )?"
    r"(?:(?:complete|full|corrected|revised|whole|final|detailed|step-by-step) )*"
    r"(?:continuation|continued|solution to|solution:|rest of the solution|complete solution|full solution|corrected)|"
    r"(?:it )?(?:looks|seems|appears) (?:like|that) (?:the|your) (?:partial |message|text|solution|prompt)|"
    r"(?:i (?:notice|see)|there (?:is|seems to be) an? (?:error|mistake))[^\n.]{0,40} (?:the|your) partial|"
    r"给定的?部分解|部分解答|以下是完整)",
    re.IGNORECASE,
)
_ANEW = re.compile(
    r"[\s*#]*(?:(?:let['’]?s|let us|let me|i['’]ll|i will|we['’]ll|we will|i need to|we need to|we have to)"
    r"(?: (?:now|first|carefully|try to))* (?:solve|work through|tackle|break down|approach|think about|analy[sz]e|"
    r"break) (?:this|the|it)(?: (?:problem|question|exercise|task|step|down)\b|[.:!])|"
    r"to (?:solve|answer|approach|tackle) (?:this|the) (?:problem|question|exercise|task)|"
    r"to solve this(?:,| step)|(?:first, )?let me (?:re-?start|start over|begin again)|"
    r"starting (?:over|from the beginning))",
    re.IGNORECASE,
)
_ANEW_INSIDE = re.compile(
    r"\s*(?:Let['’]?s (?:solve|start|begin|break|analy[sz]e|consider|denote)|Let us|"
    r"To (?:solve|find|determine|answer)|"
    r"We (?:need to|are given|want to)|First,|Given(?: that|:| the)|Step 1\b|Here(?:['’]s| is)|Solution:|\*\*Solution|"
    r"#+ [A-Z])"
)
_STEP_ONE = re.compile(r"[\s*#]*Step 1\b", re.IGNORECASE)


def _restarts(prefix: str, text: str) -> bool:
    """Whether an answer that repeats nothing at the joint begins the solution anew or talks about the task.

    - It talks about the task: "The partial solution ...", "I will continue from ...", "Here is the full solution".
    - It begins like the prefix, by 30 characters besides white space or by its whole first line, unless that line is
      a refrain of the prefix.
    - It opens like a solution ("Let's solve this problem", "To solve this problem") though the prefix is past its
      opening; or it has a weaker opening ("To find", "Step 1", "Let us") though the prefix stops inside a sentence.
    - It begins with step 1 though the prefix has that already.
    """
    if _TALK.match(text):
        return True
    past, line = _beginning(prefix)
    if not past:
        return False
    first = text.lstrip().partition("\n")[0].strip()
    if line[:1].lower() == first[:1].lower():  # few pass, and the comparison costs more
        beginning, head = _squeeze(prefix[:400]), _squeeze(text[:400])
        if len(beginning) >= 30 and head[:30] == beginning[:30] and any(c.isalpha() for c in head[:30]):
            return prefix.count(prefix.lstrip()[:30]) < 2
    if line and line == first and sum(c.isalpha() for c in line) >= 8 and not line.startswith("```"):
        return prefix.count(line) < 2
    if _ANEW.match(text):
        return True
    if _STEP_ONE.match(text) and re.search(r"^[\s*#]*step 1\b", prefix, re.IGNORECASE | re.MULTILINE):
        return True
    if text.startswith("\n") or not _ANEW_INSIDE.match(text):
        return False
    stripped = prefix.rstrip()
    return "\n" not in prefix[len(stripped) :] and stripped[-1] not in '.!?:;。！？：*`)]}$>|#"”'


@lru_cache(maxsize=8)  # all samples of a request have one prefix
def _beginning(prefix: str) -> tuple[bool, str]:
    """Whether the prefix is past its opening, and its first line."""
    past = len(prefix.strip()) >= 60 or bool(re.search(r"[.!?:]\s+\S", prefix[:200]))
    return past, prefix.lstrip().partition("\n")[0].strip()


# -- The joint --

# Whole words that solutions are full of: evidence that a run of letters is a word and not a piece of one.
_COMMON = frozenset(
    """
    about above add added adding after again all along already also although always amount and angle another answer any
    apply are area around because been before below between both but calculate can cannot case cases check combine
    common compute consider correct cost could day days degrees denote determine did difference different divide
    divided does each either elements equal equals equation equations even every exactly example expression factor find
    finally first follows for formula found four fraction from function get gets give given gives had half has have
    hence her here his hold hours how however hundred implies important indeed inside instead integer integers into its
    itself know known large larger last least left length less let line list make makes many means method might more
    most much multiply must need needs next not note now number numbers obtain obtained obtains odd one only other our
    over per point points positive possible probability problem product prove question rate ratio real remaining
    remember result return right same second see set several should show shows side sides similarly simplify
    simplifying since six smaller solution solutions solve solving some square start step steps still substitute
    substituting subtract such suppose take takes ten than that the their them then there therefore these they thing
    third this those three through thus time times together total triangle true twice two under until use used using
    value values variable very was way were what when where whether which while whole will with within without work
    would write year years yes you your she him who during just minutes dollars people students miles inches feet
    pounds weeks months books apples eggs money price cents buys bought sells sold spends spent pays paid earns gave
    started finished is of to we it be by so if or an as at on in no do he my
    """.split()
)
# Words after which a run of letters is a word of its own, unless it begins with one of these: "the" + "orem".
_AFTER = {
    word: tuple(beginnings.split())
    for word, beginnings in {
        "the": "orem oret ory ori ocr olog rm rap refore reby rein reof reaf sis ses saur matic mselves irs ism ist "
        "ft ater atre ta nce",
        "and": "r e a o y i",
        "of": "f t",
        "that": "c s",
        "this": "t",
        "which": "e s",
        "with": "i o d h s e",
        "from": "a",
        "are": "a n s",
        "was": "h t p",
        "is": "l s o n h r",
        "we": "a b d e i l n p r s t",
        "have": "n r s",
        "has": "h t s",
        "had": "a r",
        "did": "a n",
        "does": "n",
        "because": "",
        "equals": "",
        "where": "a b e i o u v w f",
        "when": "c e",
        "then": "c",
        "than": "k e a o",
        "into": "n x l",
        "these": "s",
        "each": "",
        "every": "o d t w b",
        "both": "e",
        "since": "r",
        "their": "s",
        "they": "",
        "also": "",
        "only": "",
        "his": "t s p",
        "two": "f s",
        "three": "f s",
        "for": "tun tn tif tr th tw ty ma mer med mi mu ge gi ga ce ci ei ever es eca wa kl um bi ba ear ert",
        "to": "da wa ge ta ol pi wn we ma ne ng nn no uc ur us ss ke oth rn rc rq rt ry ok ny il le mb pp ps pl xi al",
        "per": "c em en f h i j k m n o p ra s ta te ti tu us v",
        "all": "o e i a u",
        "you": "r n t",
        "our": "s",
        "its": "e",
        "more": "o",
        "but": "t c l a e",
        "how": "e l i",
        "there": "f b i o m u a s",
        "here": "b i a t d",
        "she": "l a d r p e i n",
        "if": "f",
        "will": "i o p y s f b e",
        "must": "a e y i",
        "total": "i l s",
        "number": "s e i",
        "gives": "",
        "need": "l e y i s",
    }.items()
}
# How long a run of letters must be that ends before these words: none of that length ends with them ("wal" + "king").
_BEFORE = {
    **dict.fromkeys(
        (
            "which that because from with equals this were when should would could must after before they their there "
            "these those for was will where therefore since also times plus during between every however while"
        ).split(),
        2,
    ),
    **dict.fromkeys("have we".split(), 3),
    **dict.fromkeys("of has had not but".split(), 4),
    "the": 5,
}
# Words that other words end with: "fact" + "or", "tens" + "or", "ga" + "in".
_ENDINGS = frozenset("or an as in on it at is he his her so ten one able all own real to and are be she".split())
_WHOLE = re.compile(r"(?:[ts]ion|ing|ment|ness|ity|ance|ence|ous|ive|ly|ed|ies|able)\Z")
_SUFFIX = re.compile(
    r"(?:ed|er|est|ing|ly|it[yi]|ness|abl|al|ial|iab|ion|ive|is[tem]|i[sz]|ful|less|ment|ship|der|en[ct]|an[ct]|at[io]|"
    r"ary|ory|ous|wise|ward|fold|m[ae]n|person|works?)"
)
# Words that are made of two words of the lists above.
_COMPOUNDS = frozenset(
    """
    without within into onto therefore thereby therefrom therein thereof thereat whenever wherever whereas whereby
    wherein whereof cannot another itself themselves himself herself myself yourself ourselves something anything
    everything nothing someone anyone everyone sometime sometimes anytime everyday everybody become became because
    before behind below beside besides between beyond being inside outside input output instance income intend
    incorrect often also always although already almost altogether today together tonight forever forget forgot forgive
    forgiven format former formal forward island issue isolate oneself online ongoing overall overlap overcome overtime
    overuse overwork overtake undergo undertake understand underline underway update upset upright maybe percent
    percentage somewhere somewhat nowhere anywhere everywhere elsewhere whichever whatever however whoever toward
    towards throughout timeline halfway subset notebook weekend classroom birthday daytime daylight nearby standby
    thereto hereby hereto areas area factor operator tensor lesson season reason person function number outline
    sidelines surplus nonplus meanwhile meantime worthwhile lifetime lifetimes hereafter thereafter wherefor therefor
    herewith forthwith soon door theme themes themed beat bean asset assets byproduct bypass byline notable tenor canon
    atone noon init onset sunday afternoon otherwise peruse waterproof disproof workout workday bookshelf furthermore
    anymore evermore driveway notebooks soit leftover leftovers indirect
    """.split()
)
_FOLLOWS = re.compile(r"[^\W\d_]+")
_NAME_GOES_ON = frozenset("(_[=0123456789")
_APOSTROPHE = re.compile(r"[^\W\d_](?:['’]s|n['’]t)\Z")
_OPERATOR = re.compile(r"\s(?:=|\+|≈|≤|≥|→|⇒|×|·|÷)\Z")
_SPACED = re.compile(r"(?:[=+*≈≤≥→⇒×·÷-]|\\(?:times|cdot|approx|leq?|geq?|div|pm)) \S")


def _join(prefix: str, text: str) -> str:
    """Mend the white space at the joint; nothing behind it changes.

    - After white space the text loses its leading spaces, in the indentation of a line only as many as are there
      already; a line break stays, and so do spaces that belong (`_wide`).
    - Two words that stand without a space between them get one where the evidence is that both are whole
      (`_lacks_space`), as in "the" + "answer"; "contin" + "uation" and "the" + "orem" stay as they are.
    """
    if not prefix or not text:
        return text
    if prefix[-1] in " \t":
        spaces = len(text) - len(text.lstrip(" \t"))
        if spaces == 0 or text[spaces : spaces + 1] in ("\n", "\r"):
            return text
        return text if _wide(prefix, spaces) else text[min(spaces, _indent(prefix) or spaces) :]
    if prefix[-1].isspace() or text[0].isspace():
        return text
    return " " + text if _lacks_space(prefix, text) else text


def _indent(prefix: str) -> int:
    """The white space of a line that holds nothing else yet; 0 where the line holds text."""
    line = prefix.rpartition("\n")[2]
    return 0 if line.strip() or "\n" not in prefix else len(line)


def _wide(prefix: str, spaces: int) -> bool:
    """Whether the white space at the end of the prefix goes on by so many spaces, rather than being written twice.

    Inside a line: in code, or if the prefix has as many after the same character elsewhere (two spaces after a full
    stop). In an indentation: after an odd number of spaces, since tokenizers leave the last space to the word, or if
    other lines begin with that many and none with what is there.
    """
    indent = _indent(prefix)
    tail = prefix[-_WINDOW:]
    if not indent:
        stripped = prefix.rstrip(" \t")
        total = len(prefix) - len(stripped) + spaces
        return _in_fence(prefix) or (
            total <= 64 and bool(re.search(re.escape(stripped[-1:]) + rf" {{{total}}}\S", tail))
        )
    if indent % 2 or "\t" in prefix[-indent:]:
        return True
    if indent + spaces > 256:
        return False
    return bool(re.search(rf"\n {{{indent + spaces}}}\S", tail)) and not re.search(rf"\n {{{indent}}}\S", tail)


def _lacks_space(prefix: str, text: str) -> bool:
    """Whether two texts that meet without white space are evidently two words, or a word and a formula.

    Never in code, nor in Chinese or Japanese. The evidence, by what the prefix ends with:

    - a letter: see `_two_words`; before a digit or a formula, a common word.
    - a number: a word of four letters, or a common one of three (not "2nd", "4cm").
    - a comma, where the prefix has no comma without a space; the end of a sentence, a closing mark: a common word.
    - " =" and its like, with a space before them: anything.

    An operator with a space after it gets one before it, if the prefix writes its operators so.
    """
    last = prefix[-1]
    if not (last + text[0]).isascii() and (_CJK.match(last) or _CJK.match(text[0])):
        return False
    if _in_code(prefix):
        return False
    if _OPERATOR.search(prefix[-2:]):
        return text[0].isalnum() or text[0] in "\\$("
    if (last.isalnum() or last in ")]}") and _SPACED.match(text):
        operator = text.partition(" ")[0]
        tail = prefix[-_WINDOW:]
        return bool(re.search(r"\S [=+*/<>×·-] \S", tail)) and not re.search(rf"\S{re.escape(operator)} \S", tail)
    match = _FOLLOWS.match(text)
    # A name that goes on ("sin(x)", "a_1") is no word.
    follows = match[0] if match and text[match.end() : match.end() + 1] not in _NAME_GOES_ON else ""
    lower = follows.lower()
    if last.isalpha():
        word = _last_word(prefix)
        if len(follows) > 1 and _APOSTROPHE.search(prefix[-5:]):
            return True
        if prefix.endswith(("\\", "_", ".", "/", "-"), 0, len(prefix) - len(word)):
            return False  # a command of LaTeX or a part of a name
        common = len(word) > 1 and word.lower() in _COMMON
        if text[0].isdigit():
            return common
        if text[0] in "$`*" or text.startswith("\\("):
            return common and _opens(prefix, text)
        return bool(follows) and _two_words(prefix, word.lower(), follows)
    if last.isdigit():
        return bool(re.search(r"(?:^|[\s($£€])[\d.,]+\Z", prefix[-24:])) and (
            (len(lower) >= 4 and follows == lower) or (len(lower) == 3 and lower in _COMMON)
        )
    if len(lower) < 2:
        return False
    if last == "," and prefix[-2:-1].isalpha() and not re.search(r",[^\W\d_]", prefix[-_WINDOW:]):
        return True
    if not (lower in _COMMON or _occurs(prefix, follows)):
        return False
    if last in ".!?:":
        # A numbered item, or a sentence; "www.example" and "math.floor" are neither.
        return follows[0].isupper() or last in "!?" or bool(re.search(r"(?:^|\n)\s*\d+\.\Z", prefix[-12:]))
    if last in "$`*":
        return _closes(prefix)
    return last in ",;)"


def _two_words(prefix: str, word: str, follows: str) -> bool:
    """Whether a word that the prefix ends with, and the first word of the answer, are two words and not one.

    Example: "the" + "answer" and "equation" + "is" are two; "contin" + "uation" and "the" + "orem" are one.
    """
    after = follows.lower()
    together = word + after
    if together in _COMPOUNDS or together in _COMMON or _occurs(prefix, word + follows):
        return False
    # One letter is a word only beside a common one.
    if after == "a":
        return word in _COMMON and word != "are"
    if len(word) < 2:
        return word == "a" and len(after) > 3 and after in _COMMON
    if len(after) < 2:
        return False
    if len(word) >= _BEFORE.get(after, 99):
        return True
    if word in _AFTER:
        if not after.startswith(_AFTER[word]):
            return True
    elif word in _COMMON and len(word) >= 5 and len(after) >= 4 and not _SUFFIX.match(after):
        return True
    if word in _COMMON:
        return after in _COMMON or (len(word) > 3 and len(after) > 2 and _occurs(prefix, follows))
    if len(word) < 3 or after not in _COMMON:
        return False
    if after in _ENDINGS:
        return len(word) > 4 and (bool(_WHOLE.search(word)) or _occurs(prefix[: -len(word)], word))
    return bool(_WHOLE.search(word)) or _occurs(prefix[: -len(word)], word)


def _occurs(prefix: str, word: str) -> bool:
    """Whether the last pages of the prefix use a word by itself, elsewhere than at their end."""
    tail, word = _last_pages(prefix), word.lower()
    start = tail.find(word)
    while start >= 0:
        end = start + len(word)
        if end == len(tail):
            return False
        before, behind = tail[start - 1 : start], tail[end]
        if not (before.isalnum() or before in ("_", "\\") or behind.isalnum() or behind == "_"):
            return True
        start = tail.find(word, start + 1)
    return False


@lru_cache(maxsize=8)
def _last_pages(prefix: str) -> str:
    return prefix[-4000:].lower()


@lru_cache(maxsize=8)
def _last_word(text: str) -> str:
    match = _FOLLOWS.match(text[:-65:-1])  # backwards, from where it ends
    return match[0][::-1] if match else ""


def _in_fence(prefix: str) -> bool:
    """Whether a text stops inside a fenced code block."""
    return bool(prefix.count("```") % 2)


def _in_code(prefix: str) -> bool:
    """Whether a text stops inside a fenced code block or inside a span of code."""
    return "`" in prefix and (_in_fence(prefix) or bool(prefix.rpartition("\n")[2].replace("```", "").count("`") % 2))


def _opens(prefix: str, text: str) -> bool:
    """Whether a mark at the beginning of `text` opens something, because the prefix has nothing to close."""
    paragraph = prefix.rpartition("\n\n")[2]
    if text[0] == "$":
        return not paragraph.replace("\\$", "").count("$") % 2
    if text[0] == "`":
        return not paragraph.count("`") % 2
    if text.startswith("**"):
        return not paragraph.count("**") % 2
    return text.startswith(("\\(", "(")) and paragraph.count("\\(") == paragraph.count("\\)")


def _closes(prefix: str) -> bool:
    """Whether the mark at the end of a text closes what the same mark opened before."""
    paragraph = prefix.rpartition("\n\n")[2]
    if prefix[-1] == "$":
        count = paragraph.replace("\\$", "").replace("$$", "").count("$")
        return count > 0 and not count % 2
    mark = "**" if prefix.endswith("**") else prefix[-1]
    return paragraph.count(mark) > 0 and not paragraph.count(mark) % 2
