# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""A small world of word problems with worked solutions in plain words.

A problem is a number of things and two to four events that change it:

    Mia has 27 stickers. Mia finds 24 stickers. Mia gives away 15 stickers. How many stickers does Mia have now?

Its solution can be written in two styles, `"student"` and `"teacher"`, that differ in wording and layout:

    Mia starts with 27 stickers.                               Let us count the stickers.
    Mia finds 24: 27 + 24 = 51, so Mia has 51 stickers.        - Begin with 27.
    Mia gives away 15: 51 - 15 = 36, so Mia has 36 stickers.   - Finding 24, 27 plus 24 makes 51.
    Answer: 36                                                 - Giving away 15, 51 minus 15 leaves 36.
                                                               Answer: 36

Given the problem, the wording of a style is fixed. Only the results of calculations can be wrong or uncertain
for a model that is trained on such solutions. This is deliberate: a chunk of the student's text is compared with
the teacher's continuation from the same position. With random wording the comparison would measure chance, with fixed
wording it measures the result.

A `Slip` holds the probabilities of wrong calculations: a forgotten carry of a sum, a forgotten borrow of a difference,
or one group too few or too many in a product. A wrong result is carried forward.

The module needs only the standard library, and the same seed always gives the same problems.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

Style = Literal["student", "teacher"]
STYLES: tuple[Style, ...] = ("student", "teacher")

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


def _opening(problem: Problem, style: Style) -> str:
    if style == "student":
        return f"{problem.name} starts with {problem.start} {problem.item}.\n"
    return f"Let us count the {problem.item}.\n- Begin with {problem.start}.\n"


def _product_line(problem: Problem, style: Style, event: Event, result: int) -> str:
    if style == "student":
        work = f"{event.count} * {event.size} = {result}, so that is {result} {problem.item}"
        return f"{problem.name} {event.verb} {event.count} {event.container}: {work}.\n"
    return (
        f"- {event.count} {event.container} with {event.size} each, {event.count} times {event.size} makes {result}.\n"
    )


def _total_line(problem: Problem, style: Style, event: Event, total: int, amount: int, result: int) -> str:
    if style == "student":
        work = f"{total} {event.sign} {amount} = {result}, so {problem.name} has {result} {problem.item}"
        return f"{problem.name} {event.verb} {amount}: {work}.\n"
    work = f"{total} plus {amount} makes {result}" if event.sign == "+" else f"{total} minus {amount} leaves {result}"
    return f"- {event.gerund} {amount}, {work}.\n"


def _lines(problem: Problem, style_at: Callable[[int], Style], calculate_at: Callable[[int], _Calculate]) -> list[str]:
    """The lines of a solution. The two functions give the style and the calculation of line `i`."""
    lines = [_opening(problem, style_at(0))]
    total = problem.start
    for event in problem.events:
        amount = event.size
        if event.count:
            amount = calculate_at(len(lines))(event.count, "*", event.size)
            lines.append(_product_line(problem, style_at(len(lines)), event, amount))
        result = calculate_at(len(lines))(total, event.sign, amount)
        lines.append(_total_line(problem, style_at(len(lines)), event, total, amount, result))
        total = result
    return [*lines, f"Answer: {total}"]


def solution(problem: Problem, style: Style, slip: Slip = NO_SLIP, rng: random.Random | None = None) -> str:
    """Write the whole solution in one style; its last line is `Answer: N`.

    Args:
        problem: the problem to solve.
        style: `"student"` or `"teacher"`.
        slip: probabilities of wrong calculations. Wrong results are carried forward. Defaults to none.
        rng: random generator of the slips. Required if `slip` is not `NO_SLIP`.

    Raises:
        ValueError: when `slip` is given without `rng`.
    """
    if slip != NO_SLIP and rng is None:
        raise ValueError(f"slip={slip} needs a source of randomness; pass rng=random.Random(seed).")
    calculate = _exact if rng is None else _slipping(slip, rng)
    return "".join(_lines(problem, lambda i: style, lambda i: calculate))


def mixed_solution(
    problem: Problem,
    cut: int | float,
    first: Style = "student",
    then: Style = "teacher",
    slip: Slip = NO_SLIP,
    rng: random.Random | None = None,
) -> tuple[str, str]:
    """A solution that begins in one style, perhaps with slips, and is finished correctly in the other style.

    The second writer keeps all written results. It finishes the partial line in the style of that line, and writes the
    later lines in its own style, with correct calculations from the numbers before.

    Args:
        problem: the problem to solve.
        cut: where the writer changes, as a character position (int) or a fraction of the first solution (float).
        first: the style before the cut.
        then: the style of the lines after it.
        slip: probabilities of the first writer's wrong calculations.
        rng: random generator of the slips. Required if `slip` is not `NO_SLIP`.

    Returns:
        The text before the cut and the text after it.

    Raises:
        ValueError: when `cut` lies outside the first solution, or `slip` is given without `rng`.
    """
    if slip != NO_SLIP and rng is None:
        raise ValueError(f"slip={slip} needs a source of randomness; pass rng=random.Random(seed).")
    state = rng.getstate() if rng is not None else None
    slipping = _exact if rng is None else _slipping(slip, rng)
    draft = _lines(problem, lambda i: first, lambda i: slipping)
    length = sum(map(len, draft))
    position = int(cut * length) if isinstance(cut, float) else cut
    if not 0 <= position <= length:
        raise ValueError(f"cut={cut} lies outside the solution, which has {length} characters.")

    begun = offset = 0
    for line in draft:
        begun += position > offset
        offset += len(line)
    written = "".join(draft)[:position]

    def finish(settled: int) -> str:
        """The whole text. Its first `settled` lines keep the results of the first writer."""
        if rng is not None and state is not None:
            rng.setstate(state)
        slips = _exact if rng is None else _slipping(slip, rng)
        return "".join(
            _lines(problem, lambda i: first if i < begun else then, lambda i: slips if i < settled else _exact)
        )

    # The partial line is finished correctly, unless its written part already holds a wrong result.
    whole = finish(max(begun - 1, 0))
    if not whole.startswith(written):
        whole = finish(begun)
    return whole[:position], whole[position:]
