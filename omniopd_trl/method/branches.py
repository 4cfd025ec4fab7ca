# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Branches: several continuations of the student at one fork, compared with the same rollouts. Not in the paper."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from omniopd_trl.errors import ConfigError

# Similarities that differ by no more than this are equal: what remains is rounding.
_ROUNDING = 1e-9


@dataclass(frozen=True, slots=True)
class Suffix:
    """The part of a branch, or of an imitated rollout, that the trajectory does not hold.

    Attributes:
        start: index of its first token in the chunk.
        token_ids: its tokens, at least one.
        weight: weight of each token's negative log-likelihood in the chunk loss. 0 if no branch has these tokens.
        sampling_logprobs: log-probabilities that the tokens were sampled with, in nats; `None` where they are not
            known. Empty if the policy itself sampled.
        imitation: weight of each token's negative log-likelihood in the imitation loss. Empty for 0.
    """

    start: int
    token_ids: tuple[int, ...]
    weight: float
    sampling_logprobs: tuple[float | None, ...] = ()
    imitation: tuple[float, ...] = ()


def num_shared(own: Sequence[int], other: Sequence[int]) -> int:
    """Number of tokens that two continuations of one prefix have in common before they differ."""
    return next((t for t, (a, b) in enumerate(zip(own, other, strict=False)) if a != b), min(len(own), len(other)))


def diversity(texts: Sequence[str]) -> float:
    r"""How much the branches of a fork differ: the probability that two draws from them are different texts.

    `1 - sum_v (n_v / n)^2`, where `n_v` of the `n = K + 1` branches have the text `v`.

    Args:
        texts: the texts of the branches, at least one. Outer white space does not count, as for the similarities.

    Returns:
        A number in [0, 1). 0 if all texts are equal: no rollout could then prefer one of them.

    Example:
        >>> diversity(["7", "7", "8", "9"])
        0.625
    """
    counts = Counter(map(str.strip, texts)).values()
    return 1.0 - sum(count * count for count in counts) / len(texts) ** 2


def most_diverse(diversities: Sequence[float], entropies: Sequence[float], count: int) -> list[int]:
    """Indices of the `count` forks with the most diverse branches, in ascending order.

    Equal diversities are taken by the entropy at the anchor, and then from left to right.

    Args:
        diversities: `diversity` of each fork, in [0, 1).
        entropies: entropy at the anchor of each fork, in nats.
        count: number of forks to keep.

    Example:
        >>> most_diverse([0.0, 0.5, 0.5, 0.0], [1.0, 0.2, 0.3, 2.0], 3)
        [1, 2, 3]
    """
    order = sorted(range(len(diversities)), key=lambda i: (-diversities[i], -entropies[i], i))
    return sorted(order[:count])


def leave_one_out(similarities: Sequence[float], scale: bool = False) -> list[float]:
    r"""Advantage of each branch of a fork over the other branches.

    `A_j = s_j - 1/K sum_{l != j} s_l`, for the `K + 1` branches of a fork. With `scale`, `A_j / sigma`, where `sigma`
    is the standard deviation of the `s_j` (of the population: `sigma^2 = 1/(K+1) sum_j (s_j - mean)^2`).

    The baseline of a branch does not depend on it, so `1/(K+1) sum_j A_j grad log pi(b_j)` is an unbiased estimate of
    the gradient of the expected similarity at the fork, when all branches are drawn from the policy. The advantages of
    a fork add up to 0: a fork that the teacher finds easy pays no more than one that it finds hard.

    Args:
        similarities: `s_j`, the mean similarity of each branch to the rollouts of the fork, in [0, 1].
        scale: whether to divide by the standard deviation. It weights all forks alike, and makes the expected update
            another one than the gradient of the similarity.

    Returns:
        The advantages. 0 for equal similarities, and for a single branch.

    Raises:
        ConfigError: when a similarity is not a finite number.

    Example:
        >>> leave_one_out([1.0, 0.0, 0.5])
        [0.75, -0.75, 0.0]
    """
    s = np.asarray(similarities, np.float64)
    if s.ndim != 1 or not np.isfinite(s).all():
        raise ConfigError(
            f"`similarities` is {similarities!r}, but it holds one finite number for each branch of a fork. Check the "
            "similarity function."
        )
    if len(s) < 2 or np.ptp(s) <= _ROUNDING:
        return [0.0] * len(s)
    advantages = (s - s.mean()) * (len(s) / (len(s) - 1))
    return [float(value) for value in (advantages / s.std() if scale else advantages)]


def branch_weights(
    branches: Sequence[Sequence[int]],
    advantages: Sequence[float],
    sampling_logprobs: Sequence[Sequence[float | None]] = (),
) -> tuple[list[float], list[Suffix]]:
    r"""The loss of a fork as weights of the trajectory's own tokens, and of what the other branches do not share.

    `L_c = - 1/(K+1) sum_j A_j sum_t log pi(b_j,t | x, y_<c, b_j,<t) = - sum_(tokens) w log pi(token)`.

    Branches that begin as the trajectory's own chunk share these tokens' log-probabilities, so their weights add up
    there. Equal branches are merged into one.

    Args:
        branches: token ids of the `K + 1` branches. The first is the trajectory's own chunk. A branch is shorter than
            the chunk if it ended.
        advantages: `A_j`.
        sampling_logprobs: as [`Suffix`], for each branch; empty if the policy itself sampled.

    Returns:
        The weights of the chunk's own tokens, and one suffix for each distinct branch that leaves the trajectory. What
        has no weight is left out.

    Example:
        >>> branch_weights([[5, 6], [5, 7], [5, 7]], [0.6, -0.3, -0.3])
        ([0.0, 0.2], [Suffix(start=1, token_ids=(7,), weight=-0.2, sampling_logprobs=(), imitation=())])
    """
    own = branches[0]
    weights = np.zeros(len(own))
    merged: dict[tuple[int, tuple[int, ...]], list[float]] = {}
    known: dict[tuple[int, tuple[int, ...]], tuple[float | None, ...]] = {}
    for j, (branch, advantage) in enumerate(zip(branches, advantages, strict=True)):
        shared = num_shared(own, branch)
        weights[:shared] += advantage / len(branches)
        if shared < len(branch):
            key = shared, tuple(branch[shared:])
            merged.setdefault(key, []).append(advantage / len(branches))
            known.setdefault(key, tuple(sampling_logprobs[j][shared:]) if sampling_logprobs else ())
    weights[np.abs(weights) <= _ROUNDING] = 0.0  # advantages that cancel
    suffixes = [Suffix(*key, sum(parts), known[key]) for key, parts in merged.items()]
    return weights.tolist(), [suffix for suffix in suffixes if abs(suffix.weight) > _ROUNDING]
