# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""The verdict of a probe and the recommended options, from its numbers alone."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

from omniopd_trl.accounting.forecast import least_stopped_share
from omniopd_trl.evals.probe.measurement import MARKS, ROUNDING, SIGMAS, Estimate, Measured, Signal

VerdictKind = Literal["will teach", "will not", "uncertain"]

# Below this many trajectories, a standard error over trajectories is itself uncertain by more than a quarter
# (1 / sqrt(2 (n - 1))).
MIN_TRAJECTORIES = 9
# A gate may cost this share of what the forks teach: less than the standard error of a probe.
_LOST_TO_GATE = 0.05
# Of the forks that K + 1 branches show to have alternatives, fewer branches must find this share.
_FOUND = 0.9
# The largest standard deviation of numbers in [0, 1] is 0.5.
_HALF_OF_THE_LARGEST_SPREAD = 0.25
# The share of the squared weights that the student's choices decide in the paper's form. Below it, a hundred chunks
# or more must cancel out what one of them adds in noise.
_DECIDED = 0.01
# Waiting for the first rollouts must save this share of all rollouts.
_SAVED = 0.1
# More rollouts than in the paper are not recommended.
_MOST_ROLLOUTS = 10


@dataclass(frozen=True)
class Form:
    """The settings of a recipe that the verdict depends on; see `OmniOPDConfig` for the meaning of each field."""

    num_chunks: int
    num_rollouts: int
    min_rollouts: int
    num_branches: int
    fork_candidates: int
    teacher_temperature: float
    min_anchor_entropy: float
    posterior_baseline: str
    prior: str
    scale_advantages: bool
    max_failed_chunks: float
    first_rollouts: int = 0
    signal: str = "rollouts"


class Advice(NamedTuple):
    """An option of the recipe, a value, and the reason in one line."""

    option: str
    value: Any
    reason: str


@dataclass(frozen=True)
class Verdict:
    """Whether a recipe will teach, and what to set.

    Attributes:
        kind: the verdict on the recipe as it is.
        reason: one line.
        advice: recommended options. With them a recipe of verdict `"will not"` may teach: `reason` then says so.
    """

    kind: VerdictKind
    reason: str
    advice: tuple[Advice, ...] = ()

    def __str__(self) -> str:
        return f"{self.kind}: {self.reason}"


# For a teacher that does not continue texts.
_ASK_FOR_MARKS = Advice(
    "signal", "judge", "a mark needs no continuation. Marks are not measured: `--signal judge` probes them"
)


def judge(measured: Measured, form: Form, failure: str | None = None, unwilling: float = 0.0) -> Verdict:
    """The verdict on a recipe and the recommended options, from the numbers of a probe alone.

    A verdict is about agreement with this teacher. Whether the teacher is right is not measured: `evaluate_teacher`
    does that.

    Args:
        measured: the numbers.
        form: the settings of the recipe.
        failure: a reason for missing rollouts, in the words of the service.
        unwilling: share of the samples that the teacher refused, or in which it did not continue the text.

    Returns:
        The verdict. The first cause counts, in the order of the code.
    """
    why = f" ({failure})" if failure else ""
    if not measured.num_trajectories:
        return Verdict("uncertain", f"no audit was finished{why}. Raise `--max_usd`")
    if not measured.num_forks:
        return Verdict(
            "will not",
            f"the completions have no chunk: they are shorter than `min_chunk_length`, or no entropy is above "
            f"min_anchor_entropy={form.min_anchor_entropy:g} nats. Lower both",
        )
    if not measured.num_asked:
        return Verdict(
            "will not",
            f"at all {measured.num_forks} forks the branches of the student have one text: it has no choice that a "
            "teacher could prefer. Raise `temperature`, or use harder problems",
        )
    has_marks = form.signal != "rollouts"
    dropped = measured.num_dropped / measured.num_asked
    if dropped > form.max_failed_chunks:
        return Verdict(
            "will not",
            f"{dropped:.0%} of the forks got {'no marks' if has_marks else 'too few rollouts'}, and a run stops at "
            f"max_failed_chunks={form.max_failed_chunks:g}{why}",
            (_ASK_FOR_MARKS,) if unwilling > form.max_failed_chunks and not has_marks else (),
        )
    if measured.num_trajectories < MIN_TRAJECTORIES:
        return Verdict(
            "uncertain",
            f"{measured.num_trajectories} trajectories are too few for a standard error; {MIN_TRAJECTORIES} are "
            "needed. Raise `--num_prompts`, or `--max_usd` if the cap stopped the probe",
        )
    if not measured.signals:
        return Verdict(
            "uncertain",
            f"fewer than two forks were {'marked twice' if has_marks else 'answered'}, and there is nothing to "
            "compare. Raise `--num_prompts`, or lower `min_anchor_entropy`",
        )
    asked, (best, alike) = measured.signals[0], _best(measured)
    of_teacher = _of_teacher(measured)
    verdict = of_teacher or _of_signal(asked, form)
    if form.signal == "cascade" and measured.middling and not of_teacher and verdict.kind != "will teach":
        reason = f"{verdict.reason}. {measured.middling:.0%} of the forks would get rollouts, which are not measured"
        verdict = Verdict("uncertain", f"{reason}. `--signal rollouts` probes them")
    if verdict.kind == "will teach" and not has_marks and (too_similar := _too_similar(measured)):
        verdict = Verdict("uncertain", too_similar)
    if not best.is_clear or measured.own_chunk.sigmas >= SIGMAS:
        return verdict
    advice = tuple(_advice(measured, form, best, alike))
    if verdict.kind != "will teach" and not asked.is_clear:
        named = f"{best.similarity!r} with chunks of {best.chunk_length} tokens sees a difference"
        verdict = replace(verdict, reason=f"{verdict.reason}. With the options below it may: {named}")
    return replace(verdict, advice=advice)


def _of_teacher(measured: Measured) -> Verdict | None:
    """A verdict that no similarity changes."""
    if measured.own_chunk.sigmas >= SIGMAS and measured.own_chunk.value > measured.signals[0].spread / 2:
        if measured.signals[0].similarity == MARKS:
            return Verdict(
                "will not",
                f"the marks prefer the student's own chunk by {measured.own_chunk} to its other branches, which are "
                "draws of the same kind: the judge prefers what the solution continues",
            )
        return Verdict(
            "will not",
            f"the rollouts agree with the student's own chunk by {measured.own_chunk} more than with its other "
            "branches, which are draws of the same kind: the teacher repeats text that it has seen, and prefers "
            "whatever was written",
        )
    return None


def _of_signal(asked: Signal, form: Form) -> Verdict:
    """The verdict on the recipe's similarity and chunk length."""
    if asked.similarity == MARKS:
        return _of_marks(asked, form)
    name = f"`{asked.similarity}`"
    assert asked.gap is not None  # of a similarity
    if asked.spread <= ROUNDING:
        return Verdict(
            "will not",
            f"by {name}, all branches of each fork agree equally with the teacher ({asked.matched:.2f} on average), "
            "so no choice of the student is preferred",
        )
    return (
        _below_its_floor(
            asked.gap,
            asked.spread,
            f"by {name}, the student's text agrees with its own rollouts ({asked.matched:.3f}) no more than with "
            f"those of other chunks ({asked.unrelated:.3f}; the difference is {asked.gap}): the teacher does not "
            "continue this text",
        )
        or _below_its_floor(
            asked.signal,
            asked.variance,
            f"by {name}, the teacher's rollouts tell the branches apart (a spread of {asked.spread:.3f}) no better "
            f"than unrelated rollouts do ({asked.spread_unrelated:.3f})",
        )
        or _saturated(asked, form, f"by {name}, similarities")
        or Verdict(
            "will teach",
            f"by {name}, the teacher prefers some branches to others: a spread of {asked.spread:.3f}, and "
            f"{asked.spread_unrelated:.3f} with unrelated rollouts; agreement {asked.matched:.3f}, and "
            f"{asked.unrelated:.3f} with unrelated rollouts",
        )
    )


def _of_marks(asked: Signal, form: Form) -> Verdict:
    """The verdict on the marks of a judge."""
    if max(asked.spread, asked.spread_unrelated) <= ROUNDING:
        return Verdict(
            "will not",
            f"all branches of each fork have equal marks ({asked.matched:.2f} on average), so no choice of the "
            "student is preferred",
        )
    noise = f"{asked.spread_unrelated:.3f} of noise, correlation {asked.repeated}"
    return (
        _below_its_floor(
            asked.signal,
            asked.variance,
            f"the judge does not repeat its marks when the candidates are in reverse order (a spread of "
            f"{asked.spread:.3f}, {noise})",
        )
        or _saturated(asked, form, "marks")
        or Verdict(
            "will teach",
            f"the judge prefers some branches to others, also when the candidates are in reverse order: a spread of "
            f"{asked.spread:.3f}, {noise}; {asked.matched:.3f} on average",
        )
    )


def _below_its_floor(estimate: Estimate, size: float, problem: str) -> Verdict | None:
    """A verdict on an effect that is not clearly above 0.

    `size` is what an effect of the size of the branches' own differences would be: if even that could not be seen, the
    probe is too small to say no.
    """
    if estimate.sigmas >= SIGMAS:
        return None
    if SIGMAS * estimate.error > size and estimate.value > 0:
        return Verdict("uncertain", f"{problem}, but the probe is too small to be sure. Raise `--num_prompts`")
    return Verdict("will not", problem)


def _saturated(asked: Signal, form: Form, what: str) -> Verdict | None:
    """A verdict on a form without branches in which the student's choices decide next to nothing."""
    decided = asked.decided_centered if form.posterior_baseline != "none" else asked.decided
    if form.num_branches or decided >= _DECIDED:
        return None
    return Verdict(
        "uncertain",
        f"{what} are {asked.matched:.2f} on average whatever the student writes, and its choices decide "
        f"{decided:.1%} of the squared weights: the rest is noise",
    )


def _too_similar(measured: Measured) -> str | None:
    # Two standard errors: one number is tested, not the best of many.
    if measured.difference.sigmas >= 2:
        return None
    return (
        "the teacher writes what the student writes, within the error of the probe (difference "
        f"{measured.difference}): training sharpens the student, and may teach nothing. Measure the teacher with "
        "`omniopd eval`"
    )


def _best(measured: Measured) -> tuple[Signal, list[Signal]]:
    """The signal to recommend, and others of its chunk length that the probe cannot tell from it.

    It is the recipe's, unless it is not clear or another one is repeated better by two standard errors. How far a
    signal is above 0 is not compared: similarities have different scales, which `scale_advantages` removes.
    """
    asked = measured.signals[0]
    clear = [signal for signal in measured.signals if signal.is_clear]
    top = max(clear, key=lambda signal: _repeated(signal).value, default=asked)
    alike = [signal for signal in clear if not _is_less(_repeated(signal), _repeated(top))]
    best = asked if asked in alike else max(alike, key=lambda signal: signal.signal.sigmas, default=asked)
    return best, [s for s in alike if s is not best and s.chunk_length == best.chunk_length]


def _repeated(signal: Signal) -> Estimate:
    """With a single rollout nothing is known."""
    return signal.repeated or Estimate(0.0, math.inf)


def _is_less(one: Estimate, other: Estimate) -> bool:
    # Both are of the same forks, so the error of their difference is smaller than this if they are correlated.
    return other.value - one.value > 2 * math.hypot(one.error, other.error)


def _is_scaled(signal: Signal) -> bool:
    """Whether branches by this similarity need `scale_advantages`."""
    return signal.similarity != "exact" and signal.spread < _HALF_OF_THE_LARGEST_SPREAD


def _named(signal: Signal) -> str:
    return (
        f"{signal.similarity}{' with scaled advantages' * _is_scaled(signal)}"
        f"{f' ({signal.repeated})' * (signal.repeated is not None)}"
    )


def _advice(measured: Measured, form: Form, best: Signal, alike: Sequence[Signal]) -> Iterator[Advice]:
    if form.signal == "rollouts":
        yield from _similarity_advice(measured, best, alike)
    else:
        yield from _mark_advice(measured, form, best)
    what = "similarities" if form.signal == "rollouts" else "marks"
    branches = next(k for k, share in measured.found if share >= _FOUND)
    shares = ", ".join(f"{share:.0%} with {k}" for k, share in measured.found)
    yield Advice("num_branches", branches, f"K: of the forks with alternatives, the branches show {shares}")
    yield Advice(
        "posterior_baseline",
        "none",
        f"branches have their own baseline: the student's choices decide {best.decided:.1%} of the squared weights of "
        f"the paper's form, and {best.decided_centered:.1%} with a batch mean",
    )
    if form.prior != "policy":
        yield Advice("prior", "policy", "branches do not use the prior")
    if _is_scaled(best):
        reason = f"{what} of a fork differ by {best.spread:.3f} only, of at most 0.5"
        yield Advice("scale_advantages", True, reason)
    elif form.scale_advantages:
        yield Advice("scale_advantages", False, f"{what} of a fork differ by {best.spread:.3f} without it")
    gate = next((g for g in reversed(measured.gates) if g[2] <= _LOST_TO_GATE and g[1] >= _LOST_TO_GATE), None)
    if gate is not None and gate[0] > form.min_anchor_entropy:
        reason = f"{gate[1]:.0%} of the forks have at most this entropy, and {gate[2]:.0%} of what all forks teach"
        yield Advice("min_anchor_entropy", gate[0], reason)
    # At least half of the trajectories have M chunks. One with fewer has no other anchors, and no other candidates.
    is_full = measured.chunks_per_trajectory >= form.num_chunks - 0.5
    if not form.fork_candidates and is_full and measured.asked_per_trajectory < form.num_chunks / 2:
        yield Advice(
            "fork_candidates",
            2 * form.num_chunks,
            f"only {measured.asked_per_trajectory:.1f} of {measured.chunks_per_trajectory:.1f} chunks have branches "
            f"that differ; of more candidates, the teacher is asked about up to {form.num_chunks} that do",
        )
    share = measured.num_asked / measured.num_forks
    more = "; more chunks would teach as well, at their price" * (share > _FOUND)
    reason = f"M: {share:.0%} of the chunks have branches that differ, and only for these is the teacher asked{more}"
    yield Advice("num_chunks", form.num_chunks, reason)
    if form.signal == "rollouts":
        yield from _rollout_advice(measured, form, best)


def _similarity_advice(measured: Measured, best: Signal, alike: Sequence[Signal]) -> Iterator[Advice]:
    asked = measured.signals[0]
    reason = "they tell the branches apart. Marks would be cheaper: `--signal judge` probes them"
    yield Advice("signal", "rollouts", reason)
    reason = f"two rollouts prefer the same branches by {_named(best)}"
    if best != asked:
        reason += f"; the recipe has {_named(asked)} on {asked.chunk_length} tokens"
        reason += ", and sees too little" * (not asked.is_clear)
    if alike:
        others = ", ".join(map(_named, alike))
        reason += f". The probe cannot tell it from {others}: only training can, with a run of each, at the same price"
    yield Advice("similarity", best.similarity, reason)
    yield Advice("chunk_length", best.chunk_length, "C at which this similarity was measured")


def _mark_advice(measured: Measured, form: Form, best: Signal) -> Iterator[Advice]:
    rest = "Rollouts are not measured: `--signal rollouts` probes them"
    if form.signal == "cascade":
        rest = f"{measured.middling:.0%} of the forks have one between the thresholds, and would get rollouts. {rest}"
    yield Advice("signal", form.signal, f"the marks tell the branches apart ({best.repeated}). {rest}")
    if form.signal == "judge" and form.teacher_temperature > 0:
        yield Advice(
            "teacher_temperature",
            0,
            "one mark is kept, so it should be the likeliest one (leave it out if the service takes no temperature)",
        )


def _rollout_advice(measured: Measured, form: Form, best: Signal) -> Iterator[Advice]:
    if best.noise is None:
        return
    needed = next((n for n in range(1, _MOST_ROLLOUTS) if best.noise / n <= best.preferred), _MOST_ROLLOUTS)
    ratio = f"{best.noise / best.preferred:.2f} times" if best.preferred > 0 else "more than"
    yield Advice(
        "num_rollouts",
        needed,
        f"N: the noise of one rollout is {ratio} the variance of the teacher's preferences; beyond this, another fork "
        "tells more than another rollout",
    )
    first = max(2, needed // 2)
    stopped = least_stopped_share(measured.duplicates or 0.0, first)
    if first < needed and stopped * (needed - first) >= _SAVED * needed:
        reason = f"at {stopped:.0%} of the forks or more the first {first} rollouts are equal: the rest adds nothing"
        yield Advice("first_rollouts", first, reason)
        needed = first
    elif form.first_rollouts:
        yield Advice("first_rollouts", 0, "the first rollouts are too rarely equal to wait for them")
    if form.min_rollouts > needed:
        yield Advice("min_rollouts", needed, "no more than are requested")
    if needed == 1 and form.teacher_temperature > 0:
        yield Advice(
            "teacher_temperature",
            0,
            f"one greedy answer: {measured.duplicates:.0%} of pairs of rollouts are equal (leave it out if the "
            "service takes no temperature)",
        )
    if needed > 1 and form.teacher_temperature == 0:
        yield Advice("teacher_temperature", 1.0, "the probe's: greedy rollouts are equal")
