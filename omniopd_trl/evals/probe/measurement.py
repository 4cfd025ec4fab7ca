# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""The numbers of a probe, from its audits with branches."""

import math
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from omniopd_trl.audits.auditor import Answered, Auditor
from omniopd_trl.audits.types import Audit, AuditSettings, Fork, PolicyScores, Tokenizer, Trajectory
from omniopd_trl.method.chunks import Chunk
from omniopd_trl.method.similarity import Similarity, get_similarity, similarity_matrix
from omniopd_trl.teachers.base import Rollout, TeacherReply
from omniopd_trl.teachers.instruct.judge import is_middling
from omniopd_trl.teachers.scripted import ScriptedTeacher

# The similarities that are compared with the recipe's: no model, and no two that measure the same.
SIMILARITIES = ("exact", "edit", "rouge1", "rougeL")
# The chunk lengths that are compared, as shares of the recipe's. A rollout can be cut shorter, not longer.
_LENGTHS = (1.0, 0.5, 0.25)

# Standard errors that an effect must be away from 0. Four similarities and three lengths are tried, so 2 would be
# passed by chance by one of them in a quarter of all probes of a useless teacher, and 3 in one of sixty (one-sided).
SIGMAS = 3.0
# The name of a judge's marks, in the place of a similarity.
MARKS = "marks"
# Similarities that differ by no more are equal: the rest is rounding.
ROUNDING = 1e-9
# Candidates for `min_anchor_entropy`, in nats.
_GATES = (0.05, 0.1, 0.2, 0.5)


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
    """What one similarity with one chunk length sees, or a judge.

    The marks of a judge have no floor from another fork: the judge was not asked what it thinks of a text in another
    place. Their floor is their noise, from two markings of each fork.

    Attributes:
        similarity: name of the similarity; `MARKS` for the marks of a judge.
        chunk_length: length of the chunks, in student tokens.
        matched: mean of `s_j`.
        unrelated: mean of `s'_j`, the floor; `None` for marks.
        gap: `matched - unrelated`. 0 for a teacher whose text has nothing to do with the student's. `None` for marks.
        spread: standard deviation of the `s_j` of a fork, averaged over forks. 0 if nothing can be learned.
        spread_unrelated: the same for the `s'_j`; for marks, what the noise of the markings alone gives.
        variance: variance of the `s_j` of a fork, averaged.
        signal: variance of the `s_j` of a fork, minus that of the `s'_j`, which any text gives. For marks, minus what
            their noise adds: the covariance of the two markings.
        decided: share of the squared similarities that is variance within forks. The rest is the same for all choices
            of the student: the paper's form pays it, a baseline or branches subtract it.
        decided_centered: the same after the mean of all chunks is subtracted, as `posterior_baseline: batch` does.
        noise: variance of one rollout's verdict on the branches of a fork; `None` with a single rollout.
        preferred: `variance` without what the noise of the rollouts adds to it: how much the teacher's preferences
            differ. Below 0 if all of it is noise.
        repeated: whether two rollouts of a fork prefer the same branches, by much or by little: the correlation of
            their similarities over the branches, averaged, minus that of a rollout and the `s'_j`. 0 where one of them
            prefers no branch. It compares similarities of different scales; `None` with a single rollout. For marks,
            the correlation of the two markings.
    """

    similarity: str
    chunk_length: int
    matched: float
    unrelated: float | None
    gap: Estimate | None
    spread: float
    spread_unrelated: float
    variance: float
    signal: Estimate
    decided: float
    decided_centered: float
    noise: float | None
    preferred: float
    repeated: Estimate | None = None

    @property
    def is_clear(self) -> bool:
        """Whether the rollouts are about their forks, and tell the student's choices apart."""
        return (self.gap is None or self.gap.sigmas >= SIGMAS) and self.signal.sigmas >= SIGMAS


@dataclass(frozen=True)
class Measured:
    """The numbers of a probe.

    Attributes:
        num_trajectories: audited trajectories.
        num_forks: forks whose branches were sampled.
        num_agreed: forks whose branches all have one text. The teacher was not asked.
        num_asked: the other forks.
        num_dropped: asked forks with fewer than `min_rollouts` rollouts, or without marks.
        chunks_per_trajectory: chunks that the recipe selects per trajectory.
        asked_per_trajectory: how many of them have branches that differ.
        completion_tokens: mean length of a trajectory, in student tokens.
        signals: one for each similarity and chunk length, the recipe's first; the marks alone for a judge. Empty if
            fewer than two forks were answered, or marked twice.
        self_agreement: mean similarity of two rollouts of a fork, by the recipe's; `None` with a single rollout.
        duplicates: share of pairs of rollouts of a fork that have one text; `None` with a single rollout.
        student_agreement: mean similarity of two branches of a fork.
        difference: how far the teacher's texts are from the student's: `E phi(r, r') + E phi(b, b') - 2 E phi(b, r)`,
            which is 0 for equal distributions.
        own_chunk: `s_0` minus the mean of the other `s_j`. All branches are draws from one distribution, so it is 0,
            unless the teacher has seen the student's text.
        gates: for each entropy in nats, the share of forks at or below it, and their share of what all forks teach.
        found: for each number of branches, the share of the asked forks whose branches would still differ.
        middling: share of the marked forks with a mark between the thresholds of a cascade; `None` without marks.
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
    middling: float | None = None


class _Judged(NamedTuple):
    """A fork with its similarities.

    Attributes:
        group: index of the trajectory.
        entropy: entropy at the anchor, in nats.
        branches: texts of the branches, the trajectory's own chunk first.
        rollouts: texts of the rollouts; empty for marks.
        matched: `(n, K + 1)`, similarity of each rollout and branch; for marks, a row for each of the two markings.
        unrelated: `(K + 1,)`, mean similarity of each branch to the rollouts of another fork; `None` for marks.
    """

    group: int
    entropy: float
    branches: list[str]
    rollouts: tuple[str, ...]
    matched: NDArray[np.float64]
    unrelated: NDArray[np.float64] | None


def measure(
    audits: Sequence[tuple[Trajectory, PolicyScores, Audit]],
    tokenizer: Tokenizer,
    settings: AuditSettings,
    similarity: str | Similarity,
) -> Measured:
    """The numbers of a probe, from its audits with rollouts.

    Args:
        audits: trajectories with forks, their scores, and their audits.
        tokenizer: the student's tokenizer.
        settings: the settings of chunks of the recipe. Its forks may be more than the trajectories have.
        similarity: the similarity of the recipe, a name or a function.

    Returns:
        The numbers. With fewer than two answered forks there is nothing to compare, and no signal.
    """
    numbers = _counts(audits, tokenizer, settings)
    if _num_answered(audits) < 2:
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


def measure_marks(
    audits: Sequence[tuple[Trajectory, PolicyScores, Audit]],
    again: Sequence[Audit | None],
    tokenizer: Tokenizer,
    settings: AuditSettings,
    thresholds: tuple[float, float],
) -> Measured:
    """The numbers of a probe, from its audits with marks.

    Args:
        audits: as in [`measure`].
        again: a second audit of each trajectory and its forks; `None` where there is none. Only forks with both are
            measured.
        tokenizer: as in [`measure`].
        settings: as in [`measure`].
        thresholds: the lower and the upper threshold of a cascade.

    Returns:
        The numbers. With fewer than two forks that were marked twice there is nothing to compare, and no signal.
    """
    numbers = _counts(audits, tokenizer, settings)
    if _num_answered(audits) < 2:
        return numbers
    marks = [{b.text: b.similarity or 0.0 for b in chunk.branches} for *_, audit in audits for chunk in audit.chunks]
    numbers = replace(numbers, middling=_mean([is_middling(of_fork, *thresholds) for of_fork in marks]))
    marked = [*_marked_forks(audits, again)]
    if len(marked) < 2:
        return numbers
    signal = _signal(marked, MARKS, settings.chunk_length)
    return replace(numbers, signals=(signal,), own_chunk=_own_chunk(marked), gates=_gates(audits, marked))


def _counts(
    audits: Sequence[tuple[Trajectory, PolicyScores, Audit]], tokenizer: Tokenizer, settings: AuditSettings
) -> Measured:
    """The numbers that need no answer of the teacher, and no similarity."""
    forks = [fork for trajectory, _, _ in audits for fork in trajectory.forks or ()]
    asked = [fork for fork in forks if fork.diversity > 0]
    auditor = _auditor(tokenizer, settings, "exact")
    chunks = _mean([len(auditor.select(trajectory, scores)) for trajectory, scores, _ in audits])
    return Measured(
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


def _num_answered(audits: Sequence[tuple[Trajectory, PolicyScores, Audit]]) -> int:
    return sum(len(audit.chunks) for _, _, audit in audits)


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


def _marked_forks(
    audits: Sequence[tuple[Trajectory, PolicyScores, Audit]], again: Sequence[Audit | None]
) -> Iterator[_Judged]:
    """All forks that a judge has marked twice."""
    for group, ((_, scores, audit), second) in enumerate(zip(audits, again, strict=True)):
        others = {chunk.chunk: chunk for chunk in second.chunks} if second is not None else {}
        for chunk in audit.chunks:
            if chunk.chunk in others:
                entropy = float(scores.entropy[chunk.chunk.anchor])
                texts = [branch.text for branch in chunk.branches]
                marks = [[branch.similarity for branch in c.branches] for c in (chunk, others[chunk.chunk])]
                yield _Judged(group, entropy, texts, (), np.array(marks, np.float64), None)


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
    unrelated = [fork.unrelated for fork in forks if fork.unrelated is not None]  # of all forks, or of none
    gaps = [float(s.mean() - other.mean()) for s, other in zip(own, unrelated, strict=False)]
    variances = [float(s.var()) for s in own]
    floors = [float(other.var()) for other in unrelated]
    several = [fork for fork in forks if len(fork.matched) > 1]
    noises = [(_noise(fork.matched), len(fork.matched)) for fork in several]
    floors = floors or [noise / n for noise, n in noises]
    everything = np.concatenate(own)
    variance, square = _mean(variances), float((everything**2).mean())
    total = float(everything.var())
    return Signal(
        similarity,
        length,
        matched=_mean([float(s.mean()) for s in own]),
        unrelated=_mean([float(other.mean()) for other in unrelated]) if unrelated else None,
        gap=estimate(gaps, groups) if gaps else None,
        spread=_mean(np.sqrt(variances)),
        spread_unrelated=_mean(np.sqrt(floors)),
        variance=variance,
        signal=estimate(np.subtract(variances, floors), groups),
        decided=variance / square if square else 0.0,
        decided_centered=variance / total if total else 0.0,
        noise=_mean([noise for noise, _ in noises]) if noises else None,
        # The `s_j` of n rollouts have 1/n of the noise of one.
        preferred=variance - _mean([noise / n for noise, n in noises]),
        repeated=estimate([*map(_repeated, several)], [fork.group for fork in several]) if several else None,
    )


def _noise(similarities: NDArray[np.float64]) -> float:
    """Variance of a rollout's verdict on the branches around that of all rollouts, without its mean.

    A mean over n rollouts has 1/n of it in the variance of the `s_j`.
    """
    centered = similarities - similarities.mean(1, keepdims=True)
    rest = centered - centered.mean(0)
    return float((rest**2).sum() / ((len(rest) - 1) * rest.shape[1]))


def _repeated(fork: _Judged) -> float:
    """Mean correlation of pairs of rollouts over the branches, minus that of rollouts and unrelated ones."""
    rollouts = [*map(_standardized, fork.matched)]
    pairs = [float((a * b).mean()) for a, b in combinations(rollouts, 2)]
    if fork.unrelated is None:
        return _mean(pairs)
    unrelated = _standardized(fork.unrelated)
    return _mean(pairs) - _mean([float((a * unrelated).mean()) for a in rollouts])


def _standardized(similarities: NDArray[np.float64]) -> NDArray[np.float64]:
    """With mean 0 and variance 1; 0 where all are equal."""
    centered = similarities - similarities.mean()
    return centered / centered.std() if np.ptp(similarities) > ROUNDING else np.zeros_like(centered)


def _own_numbers(forks: Sequence[_Judged], similarity: str | Similarity) -> dict[str, Any]:
    """How the student and the teacher agree with themselves and with each other, by the recipe's similarity."""
    of_student = [_off_diagonal(_pairs(fork.branches, similarity)) for fork in forks]
    several = [k for k, fork in enumerate(forks) if len(fork.rollouts) > 1]
    of_teacher = [_off_diagonal(_pairs(forks[k].rollouts, similarity)) for k in several]
    equal = [_mean([a.strip() == b.strip() for a, b in combinations(forks[k].rollouts, 2)]) for k in several]
    differences = [
        own + of_student[k] - 2 * float(forks[k].matched.mean()) for k, own in zip(several, of_teacher, strict=True)
    ]
    numbers: dict[str, Any] = {"student_agreement": _mean(of_student), "own_chunk": _own_chunk(forks)}
    if several:
        numbers |= {
            "self_agreement": _mean(of_teacher),
            "duplicates": _mean(equal),
            "difference": estimate(differences, [forks[k].group for k in several]),
        }
    return numbers


def _own_chunk(forks: Sequence[_Judged]) -> Estimate:
    of_branches = [fork.matched.mean(0) for fork in forks]
    return estimate([s[0] - s[1:].mean() for s in of_branches], [fork.group for fork in forks])


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
