# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Imitation of rollouts: cross-entropy on their first tokens, after the student's own prefix. Not in the paper."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from omniopd_trl.method.branches import Suffix, num_shared


def add_imitation(
    own: Sequence[int], suffixes: Sequence[Suffix], rollouts: Sequence[Sequence[int] | None], weight: float
) -> tuple[list[float], list[Suffix]]:
    r"""The imitation loss of a chunk as weights of tokens that the row holds, and of what is added to it.

    `L_imit = - weight * 1/n sum_i sum_t log pi(r_i,t | x, y_<c, r_i,<t) = - sum_(tokens) w log pi(token)`.

    Tokens that a rollout shares with the trajectory, with a branch or with another rollout, up to where they differ,
    are one token with the sum of the weights.

    Args:
        own: token ids of the trajectory's own chunk.
        suffixes: what is trained of the branches, from [`branch_weights`]. Empty without branches.
        rollouts: the first tokens of each of the `n` rollouts. `None` for one that is left out: it counts in `n`.
        weight: weight of the imitation loss.

    Returns:
        The weights of the chunk's own tokens, and the suffixes: those that were given, with the weights of their
        tokens, and one for each rollout that none of them holds.

    Example:
        >>> add_imitation([5, 6], [], [(5, 7), (5, 6), (5,), None], weight=4.0)
        ([3.0, 1.0], [Suffix(start=1, token_ids=(7,), weight=0.0, sampling_logprobs=(), imitation=(1.0,))])
    """
    weights = [0.0] * len(own)
    found = list(suffixes)
    added = [[0.0] * len(suffix.token_ids) for suffix in found]
    counts = Counter(tuple(tokens) for tokens in rollouts if tokens is not None)
    # The longest first, since another may be its beginning.
    for tokens, count in sorted(counts.items(), key=lambda item: (-len(item[0]), item[0])):
        share, start = weight * count / len(rollouts), num_shared(own, tokens)
        rest = tokens[start:]
        for t in range(start):
            weights[t] += share
        if rest and not any(_begins_with(suffix, start, rest) for suffix in found):
            found.append(Suffix(start, rest, 0.0))
            added.append([0.0] * len(rest))
        for t in range(len(rest)):
            index = next(i for i, suffix in enumerate(found) if _begins_with(suffix, start, rest[: t + 1]))
            added[index][t] += share
    pairs = zip(found, added, strict=True)
    return weights, [replace(suffix, imitation=tuple(more)) if any(more) else suffix for suffix, more in pairs]


def _begins_with(suffix: Suffix, start: int, tokens: tuple[int, ...]) -> bool:
    return suffix.start == start and suffix.token_ids[: len(tokens)] == tokens
