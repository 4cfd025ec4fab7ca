# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Numbers that are written as numbers, and not as a calculation.

A text that repeats the question (`12 + 30 - 5`) has the value of the right answer (`37`) without answering it.
"""

import re
from dataclasses import dataclass
from fractions import Fraction
from math import gcd, prod
from unicodedata import normalize

_BOXED = re.compile(r"\\boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
# Formatting that is removed, in this order, before the number is read.
_FORMATTING = (
    (re.compile(r"[\u2010\u2011\u2212\u2013]"), "-"),
    (re.compile(r"[\u00a0\u2007\u2009\u202f]|\\[ ;:,!]|~"), " "),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\\(?:text|mathrm|textbf|mathbf|textit|operatorname|mbox)\s*\{([^{}]*)\}"), r" \1 "),
    (re.compile(r"\\(?:left|right|displaystyle|textstyle|quad|qquad|circ|degree)\b|\\[()\[\]]"), " "),
    (re.compile(r"(?<=\d)[_'\u2019](?=\d{3})"), ""),
    # A fraction in one character, also after a whole number.
    (
        re.compile(r"[\u00bc-\u00be\u2150-\u215e]"),
        lambda found: f" {normalize('NFKC', found[0])} ".replace("\u2044", "/"),
    ),
    (
        re.compile(r"(-\s*)?\\[dt]?frac\s*(?:\{\s*(-?)\s*(\d+)\s*\}\s*\{\s*(-?)\s*(\d+)\s*\}|(\d)\s*(\d))"),
        lambda found: _written_fraction(*found.groups()),
    ),
    (re.compile(r"\\times\b|\\cdot\b|[\u00d7\u00b7]"), "*"),
    (re.compile(r"\\approx\b|\u2248"), "="),
    (re.compile(r"\\[%$€£]|[$€£]|\*\*"), lambda found: "%" if "%" in found[0] else " "),
    # The exponent of a unit, and indices.
    (
        re.compile(
            r"(?<=[^\W\d_])(?:\s*\^\s*\{?-?[1-4]\}?|\u207b?[\u00b9\u00b2\u00b3\u2074]|_\{?\w+\}?)|\^\s*\{?\s*\}?(?=\s|$)|\u00b0"
        ),
        " ",
    ),
)
_INTEGER = r"(?:\d{1,3}(?:,\d{2,3})*,\d{3}|\d{1,3}(?:[ ]\d{3})+|\d+)"
# `42 million` is another number than 42. In `5 hundred-dollar bills`, the word belongs to the unit.
_SCALES = {"hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_SCALE = rf"(?:[\s-]*\b(?:{'|'.join(_SCALES)})s?\b(?!-))"
_NUMBER = re.compile(
    rf"""(?P<sign>[+-]\s?)?
    (?:(?P<whole>\d+)\s+(?P<part>\d+)\s?/\s?(?P<parts>\d+)           # 1 1/2
      |(?P<numerator>{_INTEGER})\s?/\s?(?P<denominator>{_INTEGER})   # 1/2
      |(?P<decimal>{_INTEGER}(?:\.\d*)?|\.\d+)
       (?:(?:\s?[*x]\s?10\s?\^\s?\{{?|[eE])(?P<exponent>[+-]?\d{{1,3}})\}}?)?
    )(?!\d)(?:\s?(?P<percent>%|percent\b)|\s*(?P<dozen>dozens?\b)|(?P<scales>{_SCALE}+))?""",
    re.VERBOSE | re.IGNORECASE,
)
# What a text may not hold beside its number: other numbers, operators, commands, and words that calculate.
_CALCULATES = re.compile(
    r"[\d+*^=<>!|\\√∛∜÷±∓≠≤≥\u00b9\u00b2\u00b3\u2070-\u2079]"
    r"|\b(?:sqrt|log|ln|exp|sin|cos|tan|abs|mod|half|double|twice|squared|cubed|factorial|minus|plus|times|negative)\b",
    re.IGNORECASE,
)
# `not 37` is no answer, and neither is `isn't equal to 37`.
_NEGATED = re.compile(
    r"(?:\b(?:not|never|neither|cannot)|n['\u2019]t)"
    r"(?:\s+(?:be|equals?|to|the|an?|number|answer|exactly|necessarily|actually|really))*\s*$",
    re.IGNORECASE,
)
# Nor is `37 is wrong`, or `37 isn't the right answer`. `37 is not prime` says something else of it.
_DENIED = re.compile(
    r"[\s)}]*(?:is|was)(?:\s+(?:wrong|incorrect|false)"
    r"|(?:\s+not|n['\u2019]t)(?:\s+(?:the|a|an|my|our|final|right|correct))*\s+(?:answer|solution|right|correct))\b",
    re.IGNORECASE,
)
# Before the last equals sign: one of several numbers, and the variable that has the value.
_CHOICE = re.compile(r"\d.*\bor\b", re.IGNORECASE | re.DOTALL)
_NAME = re.compile(r"([^\W\d_]+)\s*$")
# Units that math-verify takes for variables when they have an exponent.
_UNITS = re.compile(r"\b[mgshlLNJWVK]\b")


@dataclass(frozen=True)
class PlainNumber:
    """A number that is written as one.

    Attributes:
        values: its value; for a percentage also the value without its sign, and for dozens also their number, since
            both are written.
        is_fraction: whether it is written as `a/b`.
        is_reduced: whether it is a decimal, a mixed number, or a fraction in lowest terms that is not an integer.
        has_words: whether letters stand beside it that are not a unit of one letter. They may name a variable.
    """

    values: frozenset[Fraction]
    is_fraction: bool
    is_reduced: bool
    has_words: bool

    def equals(self, answer: "PlainNumber", lenient: bool = False) -> bool:
        """Whether an answer gives this number, to six decimals.

        `74/2` is a calculation where the number is 37 or 0.5, unless the reading is lenient, and a number where it is
        itself written as a fraction.
        """
        is_number = lenient or answer.is_reduced or self.is_fraction
        return is_number and bool(
            {round(value, 6) for value in self.values} & {round(value, 6) for value in answer.values}
        )


def plain_number(text: str) -> PlainNumber | None:
    r"""The number that a text consists of, apart from its formatting and words without a number.

    Formatting is a thousands separator, a trailing zero, a unit, a currency, a percent sign, `\boxed{}`, `\text{}`,
    `$...$` and the like, scientific notation, and everything before the last equals sign (`x = 37`). `42 million` is
    42,000,000, and neither `not 37` nor `37 is wrong` is a number.

    Returns:
        The number; `None` if the text has none, several, or a calculation.

    Example:
        ```python
        plain_number(r"\boxed{1{,}234.50\text{ cm}^2}")  # 1234.5
        plain_number("12 + 30 - 5")  # None
        ```
    """
    if boxed := [*_BOXED.finditer(text)]:
        last = boxed[-1]
        return number_in(last[1], text[: last.start()], text[last.end() :])
    text = _without_formatting(text)
    defined, _, text = text.rpartition("=")
    if _CHOICE.search(defined):
        return None
    found = _NUMBER.search(text)
    if found is None:
        return None
    before, after = text[: found.start()], text[found.end() :]
    if _NEGATED.search(before) or _DENIED.match(after):
        return None
    if _CALCULATES.search(before) or _CALCULATES.search(after) or re.match(r"\s*[/-](?!\s?[^\W\d_])", after):
        return None
    number = _value(found)
    if number is None:
        return None
    value, is_reduced = number
    if name := _NAME.search(defined):
        for other in re.split(rf"(?<!\w){name[1]}\s*=", defined)[1:]:
            if (earlier := plain_number(other)) is not None and value not in earlier.values:
                return None  # `x = 37, x = 38`
    scale = prod(_SCALES[word.removesuffix("s")] for word in re.findall(r"\w+", (found["scales"] or "").lower()))
    other = value / 100 if found["percent"] else 12 * value if found["dozen"] else value
    return PlainNumber(
        frozenset({value * scale, other * scale}),
        is_fraction=found["numerator"] is not None,
        is_reduced=is_reduced,
        has_words=bool(re.search(r"[^\W\d_]", _UNITS.sub("", f"{before}|{after}"))),
    )


def number_in(source: str, before: str, after: str) -> PlainNumber | None:
    """The plain number that is written somewhere in a text, with what stands directly before and after it.

    Args:
        source: the number, without its box.
        before: the text before it.
        after: the text after it.
    """
    after = _without_formatting(after)
    if _NEGATED.search(re.sub(r"(?:\\boxed)?[\s({]*$", "", _without_formatting(before))) or _DENIED.match(after):
        return None
    scale = re.match(rf"[\s)}}]*({_SCALE}+)", after, re.IGNORECASE)
    return plain_number(source + (f" {scale[1]}" if scale else ""))


def _without_formatting(text: str) -> str:
    for pattern, replacement in _FORMATTING:
        text = pattern.sub(replacement, text)
    return text


def _written_fraction(minus: str | None, *parts: str | None) -> str:
    """A fraction in LaTeX as `a/b`, with one sign for those before it and in it."""
    sign_above, above, sign_below, below, *digits = (part or "" for part in parts)
    is_negative = (bool(minus) + len(sign_above) + len(sign_below)) % 2
    return f" {'-' * is_negative}{above or digits[0]}/{below or digits[1]} "


def _value(found: re.Match[str]) -> tuple[Fraction, bool] | None:
    """The value and whether it is in lowest terms; `None` for a division by zero or an unusual exponent."""

    def integer(name: str) -> int:
        return int(re.sub(r"[ ,]", "", found[name]))

    sign = -1 if (found["sign"] or "").startswith("-") else 1
    if found["parts"] is not None:
        return (
            (sign * (integer("whole") + Fraction(integer("part"), integer("parts"))), True)
            if integer("parts")
            else None
        )
    if found["denominator"] is not None:
        numerator, denominator = integer("numerator"), integer("denominator")
        if not denominator:
            return None
        return sign * Fraction(numerator, denominator), denominator > 1 and gcd(numerator, denominator) == 1
    value = Fraction(re.sub(r"[ ,]", "", found["decimal"]).rstrip(".") or "0")
    if found["exponent"] is not None:
        if not 1 <= value < 10:
            return None  # a product, and not scientific notation
        value *= Fraction(10) ** int(found["exponent"])
    return sign * value, True
