# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""What a probe of some tens of trajectories says about a run: its numbers, and a verdict with recommended options.

[`measure`] computes the numbers from audits with branches, and [`judge`] the verdict from the numbers alone. Neither
asks a teacher.

A fork has the branches `b_0, ..., b_K` of the student and the rollouts `r_1, ..., r_n` of the teacher. With a
similarity phi, `s_j = mean_i phi(b_j, r_i)`. The floor of every number is `s'_j`, the same with the rollouts of
another fork: what phi gives to texts that have nothing to do with each other.
"""

import math
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from omniopd_trl.accounting.forecast import least_stopped_share
from omniopd_trl.audits.auditor import Answered, Auditor
from omniopd_trl.audits.types import Audit, AuditSettings, Fork, PolicyScores, Tokenizer, Trajectory
from omniopd_trl.method.chunks import Chunk
from omniopd_trl.method.similarity import Similarity, get_similarity, similarity_matrix
from omniopd_trl.teachers.base import Rollout, TeacherReply
from omniopd_trl.teachers.scripted import ScriptedTeacher

VerdictKind = Literal["will teach", "will not", "uncertain"]

# The similarities that are compared with the recipe's: no model, and no two that measure the same.
SIMILARITIES = ("exact", "edit", "rouge1", "rougeL")
# The chunk lengths that are compared, as shares of the recipe's. A rollout can be cut shorter, not longer.
_LENGTHS = (1.0, 0.5, 0.25)

# Standard errors that an effect must be away from 0. Four similarities and three lengths are tried, so 2 would be
# passed by chance by one of them in a quarter of all probes of a useless teacher, and 3 in one of sixty (one-sided).
SIGMAS = 3.0
# Below this many trajectories, a standard error over trajectories is itself uncertain by more than a quarter
# (1 / sqrt(2 (n - 1))).
MIN_TRAJECTORIES = 9
# A gate may cost this share of what the forks teach: less than the standard error of a probe.
_LOST_TO_GATE = 0.05
_GATES = (0.05, 0.1, 0.2, 0.5)
# Of the forks that K + 1 branches show to have alternatives, fewer branches must find this share.
_FOUND = 0.9
# The largest standard deviation of numbers in [0, 1] is 0.5.
_HALF_OF_THE_LARGEST_SPREAD = 0.25
# The share of the squared weights that the student's choices decide in the paper's form. Below it, a hundred chunks
# or more must cancel out what one of them adds in noise.
_DECIDED = 0.01
# A spread up to this is rounding.
_ROUNDING = 1e-9
# Waiting for the first rollouts must save this share of all rollouts.
_SAVED = 0.1
# More rollouts than in the paper are not recommended.
_MOST_ROLLOUTS = 10


class Estimate(NamedTuple):
    """A mean over forks, with its standard error over trajectories (infinite for a single one)."""

    value: float
    error: float

    @property
    def sigmas(self) -> float:
        """How many standard errors the mean is above 0. A mean of 0 without an error is 0 away."""
        if self.error == 0:
            return math.copysign(math.inf, self.value) if self.value else 0.0
        return self.value / self.error

    def __str__(self) -> str:
        return f"{self.value:.3f} ± {self.error:.3f}"


_UNKNOWN = Estimate(0.0, math.inf)


@dataclass(frozen=True)
class Signal:
    """What one similarity with one chunk length sees.

    Attributes:
        similarity: name of the similarity.
        chunk_length: length of the chunks, in student tokens.
        matched: mean of `s_j`.
        unrelated: mean of `s'_j`, the floor.
        gap: `matched - unrelated`. 0 for a teacher whose text has nothing to do with the student's.
        spread: standard deviation of the `s_j` of a fork, averaged over forks. 0 if nothing can be learned.
        spread_unrelated: the same for the `s'_j`.
        variance: variance of the `s_j` of a fork, averaged.
        signal: variance of the `s_j` of a fork, minus that of the `s'_j`, which any text gives.
        decided: share of the squared similarities that is variance within forks. The rest is the same for all choices
            of the student: the paper's form pays it, a baseline or branches subtract it.
        decided_centered: the same after the mean of all chunks is subtracted, as `posterior_baseline: batch` does.
        noise: variance of one rollout's verdict on the branches of a fork; `None` with a single rollout.
        preferred: `variance` without what the noise of the rollouts adds to it: how much the teacher's preferences
            differ. Below 0 if all of it is noise.
    """

    similarity: str
    chunk_length: int
    matched: float
    unrelated: float
    gap: Estimate
    spread: float
    spread_unrelated: float
    variance: float
    signal: Estimate
    decided: float
    decided_centered: float
    noise: float | None
    preferred: float

    @property
    def is_clear(self) -> bool:
        """Whether the rollouts are about their forks, and tell the student's choices apart."""
        return self.gap.sigmas >= SIGMAS and self.signal.sigmas >= SIGMAS


@dataclass(frozen=True)
class Measured:
    """The numbers of a probe.

    Attributes:
        num_trajectories: audited trajectories.
        num_forks: forks whose branches were sampled.
        num_agreed: forks whose branches all have one text. The teacher was not asked.
        num_asked: the other forks.
        num_dropped: asked forks with fewer than `min_rollouts` rollouts.
        chunks_per_trajectory: chunks that the recipe selects per trajectory.
        asked_per_trajectory: how many of them have branches that differ.
        completion_tokens: mean length of a trajectory, in student tokens.
        signals: one for each similarity and chunk length, the recipe's first. Empty if no fork was answered.
        self_agreement: mean similarity of two rollouts of a fork, by the recipe's; `None` with a single rollout.
        duplicates: share of pairs of rollouts of a fork that have one text; `None` with a single rollout.
        student_agreement: mean similarity of two branches of a fork.
        difference: how far the teacher's texts are from the student's: `E phi(r, r') + E phi(b, b') - 2 E phi(b, r)`,
            which is 0 for equal distributions.
        own_chunk: `s_0` minus the mean of the other `s_j`. All branches are draws from one distribution, so it is 0,
            unless the teacher has seen the student's text.
        gates: for each entropy in nats, the share of forks at or below it, and their share of what all forks teach.
        found: for each number of branches, the share of the asked forks whose branches would still differ.
    """

    num_trajectories: int
    num_forks: int
    num_agreed: int
    num_asked: int
    num_dropped: int
    chunks_per_trajectory: float
    asked_per_trajectory: float
    completion_tokens: float
    signals: tuple[Signal, ...] = ()
    self_agreement: float | None = None
    duplicates: float | None = None
    student_agreement: float = 0.0
    difference: Estimate = _UNKNOWN
    own_chunk: Estimate = _UNKNOWN
    gates: tuple[tuple[float, float, float], ...] = ()
    found: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Form:
    """The settings of a recipe that the verdict depends on; see `OmniOPDConfig` for the meaning of each field."""

    num_chunks: int
    num_rollouts: int
    min_rollouts: int
    num_branches: int
    fork_candidates: int | None
    teacher_temperature: float
    min_anchor_entropy: float
    posterior_baseline: str
    prior: str
    scale_advantages: bool
    max_failed_chunks: float
    first_rollouts: int = 0


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


# ---- From numbers to the verdict ----


def judge(measured: Measured, form: Form, failure: str | None = None) -> Verdict:
    """The verdict on a recipe and the recommended options, from the numbers of a probe alone.

    A verdict is about agreement with this teacher. Whether the teacher is right is not measured: `evaluate_teacher`
    does that.

    Args:
        measured: the numbers.
        form: the settings of the recipe.
        failure: a reason for missing rollouts, in the words of the service.

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
            f"at all {measured.num_forks} forks the student writes the same text {_most_branches(measured) + 1} times:"
            " it has no choice that a teacher could prefer. Raise `temperature`, or use harder problems",
        )
    dropped = measured.num_dropped / measured.num_asked
    if dropped > form.max_failed_chunks:
        return Verdict(
            "will not",
            f"{dropped:.0%} of the forks got too few rollouts, and a run stops at "
            f"max_failed_chunks={form.max_failed_chunks:g}{why}",
        )
    if measured.num_trajectories < MIN_TRAJECTORIES:
        return Verdict(
            "uncertain",
            f"{measured.num_trajectories} trajectories are too few for a standard error; {MIN_TRAJECTORIES} are "
            "needed. Raise `--num_prompts`, or `--max_usd` if the cap stopped the probe",
        )
    asked, best = measured.signals[0], _best(measured)
    verdict = _of_teacher(measured) or _of_signal(asked, form)
    if verdict.kind == "will teach" and (too_similar := _too_similar(measured)):
        verdict = Verdict("uncertain", too_similar)
    if not best.is_clear or measured.own_chunk.sigmas >= SIGMAS:
        return verdict
    advice = tuple(_advice(measured, form, best))
    if verdict.kind != "will teach" and not asked.is_clear:
        named = f"{best.similarity!r} with chunks of {best.chunk_length} tokens sees a difference"
        verdict = replace(verdict, reason=f"{verdict.reason}. With the options below it may: {named}")
    return replace(verdict, advice=advice)


def _of_teacher(measured: Measured) -> Verdict | None:
    """A verdict that no similarity changes."""
    if measured.own_chunk.sigmas >= SIGMAS and measured.own_chunk.value > measured.signals[0].spread / 2:
        return Verdict(
            "will not",
            f"the rollouts agree with the student's own chunk by {measured.own_chunk} more than with its other "
            "branches, which are draws of the same kind: the teacher repeats text that it has seen, and prefers "
            "whatever was written",
        )
    return None


def _of_signal(asked: Signal, form: Form) -> Verdict:
    """The verdict on the recipe's similarity and chunk length."""
    name = f"`{asked.similarity}`"
    if asked.spread <= _ROUNDING:
        return Verdict(
            "will not",
            f"by {name}, all branches of each fork agree equally with the teacher ({asked.matched:.2f} on average), "
            "so no choice of the student is preferred",
        )
    # What an effect of the size of the branches' own differences would be: if even that could not be seen, the probe
    # is too small to say no.
    for estimate, size, problem in (
        (
            asked.gap,
            asked.spread,
            f"by {name}, the student's text agrees with its own rollouts ({asked.matched:.3f}) no more than with "
            f"those of other chunks ({asked.unrelated:.3f}; the difference is {asked.gap}): the teacher does not "
            "continue this text",
        ),
        (
            asked.signal,
            asked.variance,
            f"by {name}, the teacher's rollouts tell the branches apart (a spread of {asked.spread:.3f}) no better "
            f"than unrelated rollouts do ({asked.spread_unrelated:.3f})",
        ),
    ):
        if estimate.sigmas >= SIGMAS:
            continue
        if SIGMAS * estimate.error > size and estimate.value > 0:
            return Verdict("uncertain", f"{problem}, but the probe is too small to be sure. Raise `--num_prompts`")
        return Verdict("will not", problem)
    if not form.num_branches:
        centered = form.posterior_baseline != "none"
        decided = asked.decided_centered if centered else asked.decided
        if decided < _DECIDED:
            return Verdict(
                "uncertain",
                f"by {name}, similarities are {asked.matched:.2f} on average whatever the student writes, and its "
                f"choices decide {decided:.1%} of the squared weights: the rest is noise",
            )
    return Verdict(
        "will teach",
        f"by {name}, the teacher prefers some branches to others: a spread of {asked.spread:.3f}, and "
        f"{asked.spread_unrelated:.3f} with unrelated rollouts; agreement {asked.matched:.3f}, and "
        f"{asked.unrelated:.3f} with unrelated rollouts",
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


def _best(measured: Measured) -> Signal:
    """The signal to recommend: the recipe's, unless another one is clearly further above its noise."""
    asked, *others = measured.signals
    clear = [signal for signal in others if signal.is_clear]
    best = max(clear, key=lambda signal: signal.signal.sigmas, default=asked)
    # Each number of standard errors has an error of about 1.
    return asked if asked.is_clear and best.signal.sigmas < asked.signal.sigmas + 2 else best


def _most_branches(measured: Measured) -> int:
    return measured.found[-1][0] if measured.found else 0


def _advice(measured: Measured, form: Form, best: Signal) -> Iterator[Advice]:
    asked = measured.signals[0]
    yield Advice(
        "similarity",
        best.similarity,
        f"differences between branches are {best.signal.sigmas:.1f} standard errors above those of unrelated rollouts"
        + (f", and {asked.signal.sigmas:.1f} by {asked.similarity} on {asked.chunk_length} tokens" * (best != asked)),
    )
    yield Advice("chunk_length", best.chunk_length, "C at which this similarity was measured")
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
    if best.similarity != "exact" and best.spread < _HALF_OF_THE_LARGEST_SPREAD:
        reason = f"similarities of a fork differ by {best.spread:.3f} only, of at most 0.5"
        yield Advice("scale_advantages", True, reason)
    elif form.scale_advantages:
        yield Advice("scale_advantages", False, f"similarities of a fork differ by {best.spread:.3f} without it")
    gate = next((g for g in reversed(measured.gates) if g[2] <= _LOST_TO_GATE and g[1] >= _LOST_TO_GATE), None)
    if gate is not None and gate[0] > form.min_anchor_entropy:
        reason = f"{gate[1]:.0%} of the forks have at most this entropy, and {gate[2]:.0%} of what all forks teach"
        yield Advice("min_anchor_entropy", gate[0], reason)
    if form.fork_candidates is None and measured.asked_per_trajectory < form.num_chunks / 2:
        yield Advice(
            "fork_candidates",
            2 * form.num_chunks,
            f"only {measured.asked_per_trajectory:.1f} of {measured.chunks_per_trajectory:.1f} chunks have branches "
            "that differ; more candidates cost the student's time, not the teacher's tokens",
        )
    share = measured.num_asked / measured.num_forks
    more = "; more chunks would teach as well, at their price" * (share > _FOUND)
    reason = f"M: {share:.0%} of the chunks have branches that differ, and only for these is the teacher asked{more}"
    yield Advice("num_chunks", form.num_chunks, reason)
    yield from _rollout_advice(measured, form, best)


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


# ---- From audits to numbers ----


class _Judged(NamedTuple):
    """A fork with its similarities.

    Attributes:
        group: index of the trajectory.
        entropy: entropy at the anchor, in nats.
        branches: texts of the branches, the trajectory's own chunk first.
        rollouts: texts of the rollouts.
        matched: `(n, K + 1)`, similarity of each rollout and branch.
        unrelated: `(K + 1,)`, mean similarity of each branch to the rollouts of another fork.
    """

    group: int
    entropy: float
    branches: list[str]
    rollouts: tuple[str, ...]
    matched: NDArray[np.float64]
    unrelated: NDArray[np.float64]


def measure(
    audits: Sequence[tuple[Trajectory, PolicyScores, Audit]],
    tokenizer: Tokenizer,
    settings: AuditSettings,
    similarity: str | Similarity,
) -> Measured:
    """The numbers of a probe, from its audits.

    Args:
        audits: trajectories with forks, their scores, and their audits.
        tokenizer: the student's tokenizer.
        settings: the settings of chunks of the recipe. Its forks may be more than the trajectories have.
        similarity: the similarity of the recipe, a name or a function.

    Returns:
        The numbers. With fewer than two answered forks there is nothing to compare, and no signal.
    """
    forks = [fork for trajectory, _, _ in audits for fork in trajectory.forks or ()]
    asked = [fork for fork in forks if fork.diversity > 0]
    auditor = _auditor(tokenizer, settings, similarity)
    selected = [len(auditor.select(trajectory, scores)) for trajectory, scores, _ in audits]
    chunks = _mean(selected)
    numbers = Measured(
        num_trajectories=len(audits),
        num_forks=len(forks),
        num_agreed=len(forks) - len(asked),
        num_asked=len(asked),
        num_dropped=sum(audit.num_dropped for _, _, audit in audits),
        chunks_per_trajectory=chunks,
        asked_per_trajectory=chunks * len(asked) / len(forks) if forks else 0.0,
        completion_tokens=_mean([len(trajectory.completion_ids) for trajectory, _, _ in audits]),
        found=_found(asked),
    )
    if sum(len(audit.chunks) for _, _, audit in audits) < 2:
        return numbers
    names = [similarity, *(name for name in SIMILARITIES if name != similarity)]
    lengths = {max(round(settings.chunk_length * share), settings.min_chunk_length) for share in _LENGTHS}
    signals: list[Signal] = []
    own: list[_Judged] = []
    for length in sorted(lengths, reverse=True):
        for name in names:
            judged = _judge_forks(audits, _auditor(tokenizer, settings, name), length)
            own = own or judged
            signals.append(_signal(judged, name if isinstance(name, str) else "custom", length))
    return replace(numbers, signals=tuple(signals), **_own_numbers(own, similarity), gates=_gates(audits, own))


def _auditor(tokenizer: Tokenizer, settings: AuditSettings, similarity: str | Similarity) -> Auditor:
    # Its teacher is not asked.
    return Auditor(ScriptedTeacher(), tokenizer, replace(settings, min_rollouts=1), get_similarity(similarity))


def _judge_forks(
    audits: Sequence[tuple[Trajectory, PolicyScores, Audit]], auditor: Auditor, length: int
) -> list[_Judged]:
    """All answered forks, cut to a length in tokens, scored against their own rollouts and those of another fork."""
    rows: list[tuple[Trajectory, PolicyScores, list[Fork]]] = []
    given: list[tuple[str, ...]] = []
    for trajectory, scores, audit in audits:
        answered = {chunk.chunk: chunk.rollouts for chunk in audit.chunks}
        kept = [fork for fork in trajectory.forks or () if fork.chunk in answered]
        given += [answered[fork.chunk] for fork in kept]
        rows.append((trajectory, scores, _shortened(auditor, trajectory, kept, length)))
    most = max(map(len, given))
    # Half of the list away is another trajectory, unless one has more than half of all forks.
    shift = len(given) // 2
    others = _similarities(auditor, rows, [given[(k + shift) % len(given)] for k in range(len(given))])
    by_rollout = [_similarities(auditor, rows, [texts[i : i + 1] for texts in given]) for i in range(most)]
    forks = [(k, trajectory, scores, fork) for k, (trajectory, scores, kept) in enumerate(rows) for fork in kept]
    return [
        _Judged(
            group,
            float(scores.entropy[fork.chunk.anchor]),
            [branch.text for branch in fork.branches],
            given[k],
            np.array([row[k] for row in by_rollout[: len(given[k])]]),
            np.array(others[k]),
        )
        for k, (group, _, scores, fork) in enumerate(forks)
    ]


def _shortened(auditor: Auditor, trajectory: Trajectory, forks: Sequence[Fork], length: int) -> list[Fork]:
    shorter = []
    for fork in forks:
        chunk = replace(fork.chunk, end=min(fork.chunk.end, fork.chunk.start + length))
        if chunk != fork.chunk:
            before = trajectory.prompt_ids + trajectory.completion_ids[: chunk.start]
            texts: dict[tuple[int, ...], str] = {}
            for branch in fork.branches:
                ids = branch.token_ids[:length]
                if ids not in texts:
                    ((_, texts[ids]),) = auditor.alignment.split_texts([*ids], [Chunk(0, len(ids), 0)], before)
            cut = [(branch, branch.token_ids[:length]) for branch in fork.branches]
            fork = Fork(chunk, tuple(replace(branch, token_ids=ids, text=texts[ids]) for branch, ids in cut))
        shorter.append(fork)
    return shorter


def _similarities(
    auditor: Auditor, rows: Sequence[tuple[Trajectory, PolicyScores, list[Fork]]], rollouts: Sequence[Sequence[str]]
) -> list[list[float]]:
    """The similarity of each branch of each fork to these rollouts of the fork; NaN without rollouts."""
    rest = iter(rollouts)
    result: list[list[float]] = []
    for trajectory, scores, forks in rows:
        replies = [TeacherReply(tuple(map(Rollout, next(rest)))) for _ in forks]
        chunks = [fork.chunk for fork in forks]
        texts = [("", fork.branches[0].text) for fork in forks]
        with_forks = replace(trajectory, forks=tuple(forks))
        audit = auditor.score(Answered(with_forks, scores, chunks, texts, replies))
        known = {chunk.chunk: [branch.similarity or 0.0 for branch in chunk.branches] for chunk in audit.chunks}
        result += [known.get(fork.chunk, [math.nan] * len(fork.branches)) for fork in forks]
    return result


def _signal(forks: Sequence[_Judged], similarity: str, length: int) -> Signal:
    groups = [fork.group for fork in forks]
    own = [fork.matched.mean(0) for fork in forks]
    gaps = [float(s.mean() - fork.unrelated.mean()) for s, fork in zip(own, forks, strict=True)]
    variances = [float(s.var()) for s in own]
    floors = [float(fork.unrelated.var()) for fork in forks]
    noises = [(_noise(fork.matched), len(fork.matched)) for fork in forks if len(fork.matched) > 1]
    everything = np.concatenate(own)
    variance, square = _mean(variances), float((everything**2).mean())
    total = float(everything.var())
    return Signal(
        similarity,
        length,
        matched=_mean([float(s.mean()) for s in own]),
        unrelated=_mean([float(fork.unrelated.mean()) for fork in forks]),
        gap=estimate(gaps, groups),
        spread=_mean(np.sqrt(variances)),
        spread_unrelated=_mean(np.sqrt(floors)),
        variance=variance,
        signal=estimate(np.subtract(variances, floors), groups),
        decided=variance / square if square else 0.0,
        decided_centered=variance / total if total else 0.0,
        noise=_mean([noise for noise, _ in noises]) if noises else None,
        # The `s_j` of n rollouts have 1/n of the noise of one.
        preferred=variance - _mean([noise / n for noise, n in noises]),
    )


def _noise(similarities: NDArray[np.float64]) -> float:
    """Variance of a rollout's verdict on the branches around that of all rollouts, without its mean.

    A mean over n rollouts has 1/n of it in the variance of the `s_j`.
    """
    centered = similarities - similarities.mean(1, keepdims=True)
    rest = centered - centered.mean(0)
    return float((rest**2).sum() / ((len(rest) - 1) * rest.shape[1]))


def _own_numbers(forks: Sequence[_Judged], similarity: str | Similarity) -> dict[str, Any]:
    """How the student and the teacher agree with themselves and with each other, by the recipe's similarity."""
    of_student = [_off_diagonal(_pairs(fork.branches, similarity)) for fork in forks]
    several = [k for k, fork in enumerate(forks) if len(fork.rollouts) > 1]
    of_teacher = [_off_diagonal(_pairs(forks[k].rollouts, similarity)) for k in several]
    equal = [_mean([a.strip() == b.strip() for a, b in combinations(forks[k].rollouts, 2)]) for k in several]
    differences = [
        own + of_student[k] - 2 * float(forks[k].matched.mean()) for k, own in zip(several, of_teacher, strict=True)
    ]
    of_branches = [fork.matched.mean(0) for fork in forks]
    numbers: dict[str, Any] = {
        "student_agreement": _mean(of_student),
        "own_chunk": estimate([s[0] - s[1:].mean() for s in of_branches], [fork.group for fork in forks]),
    }
    if several:
        numbers |= {
            "self_agreement": _mean(of_teacher),
            "duplicates": _mean(equal),
            "difference": estimate(differences, [forks[k].group for k in several]),
        }
    return numbers


def _pairs(texts: Sequence[str], similarity: str | Similarity) -> NDArray[np.float64]:
    distinct = list(dict.fromkeys(texts))
    matrix = np.array(similarity_matrix(distinct, [distinct] * len(distinct), similarity))
    index = [distinct.index(text) for text in texts]
    return matrix[np.ix_(index, index)]


def _off_diagonal(matrix: NDArray[np.float64]) -> float:
    n = len(matrix)
    return float((matrix.sum() - np.trace(matrix)) / (n * (n - 1)))


def _gates(
    audits: Sequence[tuple[Trajectory, PolicyScores, Audit]], forks: Sequence[_Judged]
) -> tuple[tuple[float, float, float], ...]:
    entropies = np.array(
        [float(scores.entropy[fork.chunk.anchor]) for t, scores, _ in audits for fork in t.forks or ()]
    )
    variances = np.array([fork.matched.mean(0).var() for fork in forks])
    below = np.array([fork.entropy for fork in forks])
    total = float(variances.sum())
    return tuple(
        (gate, float((entropies <= gate).mean()), float(variances[below <= gate].sum()) / total if total else 0.0)
        for gate in _GATES
    )


def _found(asked: Sequence[Fork]) -> tuple[tuple[int, float], ...]:
    """For fewer branches, the expected share of the asked forks with two texts or more, over random subsets."""
    if not asked:
        return ()
    most = len(asked[0].branches) - 1
    counts = [Counter(branch.text.strip() for branch in fork.branches).values() for fork in asked]
    return tuple(
        (k, _mean([1 - sum(math.comb(n, k + 1) for n in texts) / math.comb(most + 1, k + 1) for texts in counts]))
        for k in sorted({k for k in (3, 7) if k < most} | {most})
    )


def estimate(values: Sequence[float] | NDArray[np.float64], groups: Sequence[Hashable]) -> Estimate:
    """The mean of values, and its standard error from the differences between groups.

    `error^2 = G / (G - 1) sum_g (sum_{i in g} (x_i - mean))^2 / n^2`, the cluster-robust form: forks of one trajectory
    depend on each other.

    Args:
        values: n values.
        groups: the trajectory of each.

    Example:
        >>> estimate([1.0, 1.0, 0.0, 0.0], ["a", "a", "b", "b"])
        Estimate(value=0.5, error=0.5)
    """
    x = np.asarray(values, np.float64)
    mean = float(x.mean())
    sums: dict[Hashable, float] = {}
    for group, value in zip(groups, x - mean, strict=True):
        sums[group] = sums.get(group, 0.0) + float(value)
    if len(sums) < 2:
        return Estimate(mean, math.inf)
    square = sum(total**2 for total in sums.values()) * len(sums) / (len(sums) - 1)
    return Estimate(mean, math.sqrt(square) / len(x))


def _mean(values: Any) -> float:
    return float(np.mean(values)) if len(values) else 0.0
