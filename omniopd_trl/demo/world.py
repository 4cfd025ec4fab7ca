# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""A small world of word problems with worked solutions in plain words.

A problem is a number of things and two to four events that change it:

    Mia has 27 stickers. Mia finds 24 stickers. Mia gives away 15 stickers. How many stickers does Mia have now?

Its solution can be written in three styles. `"student"` and `"teacher"` differ in wording and layout:

    Mia starts with 27 stickers.                               Let us count the stickers.
    Mia finds 24: 27 + 24 = 51, so Mia has 51 stickers.        - Begin with 27.
    Mia gives away 15: 51 - 15 = 36, so Mia has 36 stickers.   - Finding 24, 27 plus 24 makes 51.
    Answer: 36                                                 - Giving away 15, 51 minus 15 leaves 36.
                                                               Answer: 36

Given the problem, the wording of these two is fixed. Only the results of calculations can be wrong or uncertain for a
model that is trained on such solutions. A chunk of the student's text is compared with the teacher's continuation from
the same position, and with fixed wording the comparison measures the result.

The third style, `"varied"`, is for a second teacher, with which the comparison also measures chance. Its wording is
random, and never the student's:

    Our count begins with 27 of them.
    After finding 24, 27 plus 24 gives 51; hence we count 51 pieces.
    15 are taken by giving away, 51 less 15 comes to 36. Thus there are 36 stickers at hand.
    Answer: 36

A `Slip` holds the probabilities of wrong calculations: a forgotten carry of a sum, a forgotten borrow of a difference,
or one group too few or too many in a product. A wrong result is carried forward.

The module needs only the standard library, and the same seed always gives the same problems.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, get_args

Style = Literal["student", "teacher", "varied"]
STYLES: tuple[Style, ...] = get_args(Style)

NAMES = ("Mia", "Tom", "Ana", "Ben", "Eva", "Leo", "Ida", "Max", "Zoe", "Sam", "Lea", "Jon")
ITEMS = ("stickers", "marbles", "apples", "coins", "cards", "shells", "pencils", "beads", "stamps", "cookies")
CONTAINERS = ("boxes", "bags", "packs", "jars")

# How an event reads in the question and in the student's style, and the noun form that the teacher's style uses.
_GAINS = (("finds", "Finding"), ("buys", "Buying"), ("wins", "Winning"), ("makes", "Making"))
_LOSSES = (("loses", "Losing"), ("sells", "Selling"), ("gives away", "Giving away"), ("uses", "Using"))

LOWEST_TOTAL, HIGHEST_TOTAL = 10, 99


@dataclass(frozen=True)
class Event:
    """One thing that happens to the number of items.

    Attributes:
        sign: `"+"` when items come, `"-"` when items go.
        verb: the verb of the question and of the student's style, such as `"finds"`.
        gerund: the word that the teacher's style opens with, such as `"Finding"`.
        size: the number of items, or the number of items in each container when `count` is not 0.
        count: the number of containers, 0 when the items come loose.
        container: the plural of the container, empty when the items come loose.
    """

    sign: Literal["+", "-"]
    verb: str
    gerund: str
    size: int
    count: int = 0
    container: str = ""

    @property
    def change(self) -> int:
        """The signed change of the total."""
        amount = self.size * self.count if self.count else self.size
        return amount if self.sign == "+" else -amount


@dataclass(frozen=True)
class Problem:
    """A word problem: a person, a number of items, and events that change the number.

    Attributes:
        name: the owner of the items.
        item: the counted items, in the plural.
        start: the number of items at first.
        events: the events, in order.
    """

    name: str
    item: str
    start: int
    events: tuple[Event, ...]

    @property
    def question(self) -> str:
        """The problem in words, one line."""
        sentences = [f"{self.name} has {self.start} {self.item}."]
        for event in self.events:
            amount = f"{event.count} {event.container} of {event.size}" if event.count else str(event.size)
            sentences.append(f"{self.name} {event.verb} {amount} {self.item}.")
        sentences.append(f"How many {self.item} does {self.name} have now?")
        return " ".join(sentences)

    @property
    def answer(self) -> str:
        """The correct number, in decimal digits."""
        return str(self.start + sum(event.change for event in self.events))


@dataclass(frozen=True)
class Slip:
    """How often a writer gets a calculation wrong, as probabilities in [0, 1].

    Attributes:
        carry: probability of a forgotten carry in a sum that has one: 27 + 24 = 41.
        borrow: probability of a forgotten borrow in a difference that has one: 51 - 15 = 46.
        group: probability of one group too few or too many in a product: 3 * 8 = 16 or 32.
    """

    carry: float = 0.0
    borrow: float = 0.0
    group: float = 0.0


NO_SLIP = Slip()
# Training data of the demo's student. With these values about every third solution is right.
STUDENT_SLIP = Slip(carry=0.6, borrow=0.6, group=0.4)


def _crosses_ten(left: int, sign: str, right: int) -> bool:
    """Whether a sum has a carry, or a difference a borrow, out of the last digit."""
    return left % 10 + right % 10 >= 10 if sign == "+" else left % 10 < right % 10


_EVENT = re.compile(rf"\w+ ({'|'.join(verb for verb, _ in _GAINS + _LOSSES)}) (?:(\d+) (\w+) of )?(\d+) \w+\.")


def read_problem(question: str) -> Problem | None:
    """The problem whose [`Problem.question`] is this text; `None` if it is no question of this world.

    Example:
        >>> read_problem("Mia has 27 stickers. Mia finds 24 stickers. How many stickers does Mia have now?").answer
        '51'
    """
    begin = re.match(r"(\w+) has (\d+) (\w+)\.", question)
    if begin is None:
        return None
    events = []
    for verb, count, container, size in _EVENT.findall(question):
        sign: Literal["+", "-"] = "+" if verb in dict(_GAINS) else "-"
        gerund = dict(_GAINS + _LOSSES)[verb]
        events.append(Event(sign, verb, gerund, int(size), int(count or 0), container))
    problem = Problem(begin[1], begin[3], int(begin[2]), tuple(events))
    return problem if problem.question == question else None


def make_problem(rng: random.Random) -> Problem:
    """Draw one problem with two to four calculations. Every total lies in [10, 99].

    Args:
        rng: the random generator. The same state gives the same problem.
    """
    while True:
        # Loose items take one calculation, containers take two (how many they hold, then the new total).
        shape = rng.choice(("LL", "LLL", "LLL", "CL", "LC", "LLLL"))
        start = rng.randint(12, 88)
        events: list[Event] = []
        total = start
        for kind in shape:
            sign: Literal["+", "-"] = rng.choice(("+", "-"))
            verb, gerund = rng.choice(_GAINS if sign == "+" else _LOSSES)
            if kind == "L":
                # Two draws, with preference for one that crosses a ten: carries and borrows make the problems hard.
                sizes = rng.randint(5, 59), rng.randint(5, 59)
                size = next((size for size in sizes if _crosses_ten(total, sign, size)), sizes[0])
                event = Event(sign, verb, gerund, size)
            else:
                event = Event(sign, verb, gerund, rng.randint(3, 9), rng.randint(3, 9), rng.choice(CONTAINERS))
            total += event.change
            events.append(event)
            if not LOWEST_TOTAL <= total <= HIGHEST_TOTAL:
                break
        else:
            return Problem(rng.choice(NAMES), rng.choice(ITEMS), start, tuple(events))


def problems(seed: int | str, exclude: frozenset[str] | set[str] = frozenset()) -> Iterator[Problem]:
    """An endless stream of distinct problems.

    Args:
        seed: seed of the stream. Two streams with the same seed and `exclude` are equal.
        exclude: questions that are skipped, for example those of a test set.
    """
    rng = random.Random(f"omniopd-demo-{seed}")
    seen = set(exclude)
    while True:
        problem = make_problem(rng)
        if problem.question not in seen:
            seen.add(problem.question)
            yield problem


# A calculation maps two numbers and an operator to the result that is written.
_Calculate = Callable[[int, str, int], int]


def _exact(left: int, operator: str, right: int) -> int:
    return {"+": left + right, "-": left - right, "*": left * right}[operator]


def _slipping(slip: Slip, rng: random.Random) -> _Calculate:
    """A calculation that is wrong with the probabilities of `slip`."""

    def calculate(left: int, operator: str, right: int) -> int:
        result = _exact(left, operator, right)
        # One draw for every calculation, even if it cannot slip: the random numbers of later ones do not shift.
        draw, direction = rng.random(), rng.choice((-1, 1))
        if operator == "*":
            return result + direction * right if draw < slip.group else result
        if not _crosses_ten(left, operator, right):
            return result
        if operator == "+":
            return result - 10 if draw < slip.carry else result
        return result + 10 if draw < slip.borrow else result

    return calculate


# A line of a solution, in parts. A style that takes over from another one in the middle of a line starts with a part.
_Line = tuple[str, ...]


def _closing(words: random.Random, item: str, result: int, subjects: tuple[str, ...]) -> _Line:
    """The end of a line of a calculation in the style `"varied"`, from its result."""
    return (
        f" {words.choice(('makes', 'gives', 'comes to', 'is'))} {result}",
        words.choice(("; hence", ". Thus", ", which means", " and")),
        f" {words.choice(subjects)}",
        f" {result}",
        f" {words.choice(('of them', 'pieces', item + ' in all', item + ' at hand'))}.\n",
    )


def _opening(problem: Problem, style: Style, words: random.Random) -> _Line:
    if style == "teacher":
        return (f"Let us count the {problem.item}.\n- Begin with {problem.start}.\n",)
    if style == "student":
        return f"{problem.name} starts with", f" {problem.start}", f" {problem.item}.\n"
    first = words.choice(
        ("Our count begins with", "Initially there are", "In the beginning we see", "We set out from")
    )
    ends = "of them", "pieces", f"{problem.item} at hand", f"{problem.item} at first"
    return first, f" {problem.start}", f" {words.choice(ends)}.\n"


def _product_line(problem: Problem, style: Style, words: random.Random, event: Event, result: int) -> _Line:
    count, container, size = event.count, event.container, event.size
    if style == "teacher":
        return (f"- {count} {container} with {size} each, {count} times {size} makes {result}.\n",)
    if style == "student":
        begin = f"{problem.name} {event.verb} {count} {container}", f": {count} * {size}"
        return (*begin, f" = {result}", ", so", " that is", f" {result}", f" {problem.item}.\n")
    first = f"Look at the {count} {container}", f"{count} {container} are opened", f"As for the {count} {container}"
    work = f", {count} times {size}", f", {count} groups of {size}", f", {count} lots of {size}"
    closing = _closing(words, problem.item, result, ("they hold", "we find", "this brings"))
    return (words.choice(first), words.choice(work), *closing)


def _total_line(
    problem: Problem, style: Style, words: random.Random, event: Event, total: int, amount: int, result: int
) -> _Line:
    if style == "student":
        begin = f"{problem.name} {event.verb} {amount}", f": {total} {event.sign} {amount}"
        return (*begin, f" = {result}", ", so", f" {problem.name} has", f" {result}", f" {problem.item}.\n")
    if style == "teacher":
        sign, verb = ("plus", "makes") if event.sign == "+" else ("minus", "leaves")
        return (f"- {event.gerund} {amount}, {total} {sign} {amount} {verb} {result}.\n",)
    gerund = event.gerund.lower()
    if event.sign == "+":
        first = f"After {gerund} {amount}", f"{amount} are added by {gerund}", f"Next, {amount} come from {gerund}"
        work = f", {total} plus {amount}", f", {total} and {amount}", f", {total} with {amount} more"
    else:
        first = f"After {gerund} {amount}", f"{amount} are taken by {gerund}", f"Next, {amount} go by {gerund}"
        work = f", {total} minus {amount}", f", {total} less {amount}", f", {total} without {amount}"
    closing = _closing(words, problem.item, result, ("there are", "we count", f"{problem.name} owns"))
    return (words.choice(first), words.choice(work), *closing)


def _lines(problem: Problem, style: Style, calculate_at: Callable[[int], _Calculate], seed: int) -> list[_Line]:
    """The lines of a solution. The function gives the calculation of line `i`, and `seed` chooses random words."""
    words = random.Random(seed)
    lines = [_opening(problem, style, words)]
    total = problem.start
    for event in problem.events:
        amount = event.size
        if event.count:
            amount = calculate_at(len(lines))(event.count, "*", event.size)
            lines.append(_product_line(problem, style, words, event, amount))
        result = calculate_at(len(lines))(total, event.sign, amount)
        lines.append(_total_line(problem, style, words, event, total, amount, result))
        total = result
    return [*lines, (f"Answer: {total}",)]


def _join(lines: list[_Line]) -> str:
    return "".join(map("".join, lines))


def _seed_of_words(slip: Slip, rng: random.Random | None, *styles: Style) -> int:
    """A seed for the words of a text with slips in some styles.

    Raises:
        ValueError: when these need random numbers and there are none.
    """
    if rng is None and (slip != NO_SLIP or "varied" in styles):
        raise ValueError(
            f"slip={slip} in the style {' and '.join(styles)} needs a source of randomness; pass "
            "rng=random.Random(seed)."
        )
    return rng.getrandbits(64) if rng is not None and "varied" in styles else 0


def solution(problem: Problem, style: Style, slip: Slip = NO_SLIP, rng: random.Random | None = None) -> str:
    """Write the whole solution in one style; its last line is `Answer: N`.

    Args:
        problem: the problem to solve.
        style: `"student"`, `"teacher"` or `"varied"`.
        slip: probabilities of wrong calculations. Wrong results are carried forward. Defaults to none.
        rng: random generator of the slips and of the words. Required if `slip` is not `NO_SLIP`, and for `"varied"`.

    Raises:
        ValueError: when there is no `rng` and it is required.
    """
    seed = _seed_of_words(slip, rng, style)
    calculate = _exact if rng is None or slip == NO_SLIP else _slipping(slip, rng)
    return _join(_lines(problem, style, lambda i: calculate, seed))


def finished_solution(problem: Problem, written: str) -> str:
    """The solution in the style `"student"` that keeps the results in a text, and is right in everything else.

    Args:
        problem: the problem to solve.
        written: the beginning of a solution in this style. A number at its very end is not kept: it may go on.

    Example:
        >>> problem = Problem("Mia", "stickers", 27, (Event("+", "finds", "Finding", 24),))
        >>> print(finished_solution(problem, "Mia starts with 27 stickers.\\nMia finds 24: 27 + 24 = 41, so"))
        Mia starts with 27 stickers.
        Mia finds 24: 27 + 24 = 41, so Mia has 41 stickers.
        Answer: 41
    """
    found = enumerate(re.search(r" = (\d+)(?=\D)", line) for line in written.split("\n"))
    results = {index: int(match[1]) for index, match in found if match}

    def calculate_at(line: int) -> _Calculate:
        return (lambda *_: results[line]) if line in results else _exact

    return _join(_lines(problem, "student", calculate_at, 0))


def mixed_solution(
    problem: Problem,
    cut: int | float,
    first: Style = "student",
    then: Style = "teacher",
    slip: Slip = NO_SLIP,
    rng: random.Random | None = None,
) -> tuple[str, str]:
    """A solution that begins in one style, perhaps with slips, and is finished correctly in the other style.

    The second writer keeps all written results, and calculates correctly from the numbers before. It finishes the
    partial line in the style of that line, and writes the later lines in its own style. The style `"varied"` finishes
    no more than the partial part of the line: the word, the number, or the short clause.

    Args:
        problem: the problem to solve.
        cut: where the writer changes, as a character position (int) or a fraction of the first solution (float).
        first: the style before the cut.
        then: the style after it.
        slip: probabilities of the first writer's wrong calculations.
        rng: random generator of the slips and of the words. Required if `slip` is not `NO_SLIP`, and for `"varied"`.

    Returns:
        The text before the cut and the text after it.

    Raises:
        ValueError: when `cut` lies outside the first solution, or there is no `rng` and it is required.
    """
    seed = _seed_of_words(slip, rng, first, then)
    state = rng.getstate() if rng is not None else None

    def write(style: Style, settled: int) -> list[_Line]:
        """The text in one style. Its first `settled` lines have the results of the first writer."""
        if rng is not None and state is not None:
            rng.setstate(state)
        slips = _exact if rng is None else _slipping(slip, rng)
        return _lines(problem, style, lambda i: slips if i < settled else _exact, seed)

    draft = write(first, len(problem.events) * 2 + 1)
    length = len(_join(draft))
    position = int(cut * length) if isinstance(cut, float) else cut
    if not 0 <= position <= length:
        raise ValueError(f"cut={cut} lies outside the solution, which has {length} characters.")

    begun = parts = offset = 0  # lines that are begun, and parts of the last of them
    for line in draft:
        if position > offset:
            begun, parts = begun + 1, 0
            for part in line:
                parts += position > offset
                offset += len(part)
    written = _join(draft)[:position]

    def finish(settled: int) -> str:
        """The whole text. Its first `settled` lines keep the results of the first writer."""
        lines = write(then, settled)
        own = write(first, settled)[:begun]
        if own and then == "varied":
            own[-1] = own[-1][:parts] + lines[begun - 1][parts:]
        return _join(own + lines[begun:])

    # The partial line is finished correctly, unless its written part already holds a wrong result.
    whole = finish(max(begun - 1, 0))
    if not whole.startswith(written):
        whole = finish(begun)
    return whole[:position], whole[position:]
