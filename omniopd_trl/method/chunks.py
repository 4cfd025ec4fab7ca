# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Selection of the spans of a trajectory that the teacher audits (Eq. 7)."""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from omniopd_trl.errors import ConfigError, NonFiniteError

Overlap = Literal["resample", "merge"]
Placement = Literal["start", "center"]
Selection = Literal["entropy", "uniform"]

_Positions = NDArray[np.intp]


@dataclass(frozen=True, slots=True)
class Chunk:
    """A span of completion positions that is audited as one unit.

    Args:
        start: first position.
        end: position after the last one.
        anchor: the position that the chunk was formed for, `start <= anchor < end`.
    """

    start: int
    end: int
    anchor: int


def select_chunks(
    entropy: Tensor | NDArray[Any] | Sequence[float],
    mask: Tensor | NDArray[Any] | Sequence[bool] | None = None,
    *,
    num_chunks: int,
    chunk_length: int,
    min_chunk_length: int = 8,
    overlap: Overlap = "resample",
    placement: Placement = "start",
    selection: Selection = "entropy",
    seed: int | None = None,
    min_anchor_entropy: float = 0.0,
) -> list[Chunk]:
    r"""Places up to `num_chunks` disjoint chunks on the positions of highest entropy.

    `A = argmax_{|A| = M} sum_{t in A} H_t`, one window of `C` tokens for each anchor `t` in `A`.

    A chunk lies inside one run of unmasked tokens. The window of an anchor is `[t, t + C)`, or is centered on the
    anchor, and is shifted to stay inside the run. A run shorter than `C` is one window of its own length, or is
    skipped if it is shorter than `min_chunk_length`. Equal entropies are taken from left to right, so the same
    entropies always give the same chunks.

    Args:
        entropy: `(T,)`, in nats, one value for each completion token. Values at masked positions are ignored.
        mask: `(T,)`, true where the student wrote the token. Tool results and padding are false: they are never
            anchors and never inside a chunk. `None` includes all tokens.
        num_chunks: `M`, at least 1. A short trajectory may hold fewer.
        chunk_length: `C`, in student tokens, at least 1.
        min_chunk_length: a run shorter than `chunk_length` needs at least this many tokens to be audited.
        overlap: `"resample"` skips an anchor whose window overlaps a chosen chunk and tries the next one, until `M`
            chunks are chosen or none fits. `"merge"` takes exactly the `M` best anchors and joins windows that overlap
            or touch into longer chunks; the best of the joined anchors becomes the anchor.
        placement: `"start"` puts the anchor first in its window, `"center"` at index `C // 2` of it.
        selection: `"entropy"` ranks the anchors by entropy. `"uniform"` draws their order at random.
        seed: seed of the uniform draw. `None` draws differently at each call.
        min_anchor_entropy: only positions whose entropy is above this are anchors, in nats. 0 is no limit: it admits
            positions whose entropy is 0 as well. It is not in the paper.

    Returns:
        The chunks, sorted by `start`. Empty when no chunk can be formed.

    Raises:
        ConfigError: when an argument is out of range, or the shapes of `entropy` and `mask` differ.
        NonFiniteError: when an unmasked entropy is NaN.

    Example:
        >>> select_chunks([0.1, 0.9, 0.2, 0.1, 0.3, 0.8], num_chunks=2, chunk_length=2)
        [Chunk(start=1, end=3, anchor=1), Chunk(start=4, end=6, anchor=5)]

    Reference: Eq. 7 and Section 3.2.3.
    """
    _at_least("num_chunks", num_chunks, 1)
    _at_least("chunk_length", chunk_length, 1)
    _at_least("min_chunk_length", min_chunk_length, 0)
    _one_of("overlap", overlap, get_args(Overlap))
    _one_of("placement", placement, get_args(Placement))
    _one_of("selection", selection, get_args(Selection))
    if seed is not None:
        _at_least("seed", seed, 0)
    if not 0 <= min_anchor_entropy < float("inf"):
        raise ConfigError(
            f"`min_anchor_entropy` is {min_anchor_entropy!r}, but it must be a finite number of nats of at least 0. "
            "Use 0 for no limit."
        )
    scores = _vector("entropy", entropy).astype(np.float64)
    unmasked = np.ones(scores.shape, bool) if mask is None else _vector("mask", mask).astype(bool)
    if unmasked.shape != scores.shape:
        raise ConfigError(
            f"`mask` has {unmasked.size} positions and `entropy` {scores.size}, but they describe the same tokens. "
            "Pass one mask value for each completion token."
        )
    if np.isnan(scores[unmasked]).any():
        first_nan = int(np.flatnonzero(unmasked & np.isnan(scores))[0])
        raise NonFiniteError(
            f"`entropy` is nan at position {first_nan}, but anchors are ranked by it. "
            "Check the logits that it was computed from."
        )

    # A candidate is a position that has a window. Candidates are in reading order: `start` and `end` never decrease.
    run_start, run_end = _runs(unmasked)
    length = run_end - run_start
    # A run of C tokens or more always holds a whole chunk. The minimum applies to shorter runs only.
    usable = length >= min(chunk_length, min_chunk_length)
    run_start, run_end, length = run_start[usable], run_end[usable], length[usable]
    first, last = np.repeat(run_start, length), np.repeat(run_end, length)
    positions = np.flatnonzero(_inside(run_start, run_end, scores.size))
    shift = chunk_length // 2 if placement == "center" else 0
    start = np.maximum(np.minimum(positions - shift, last - chunk_length), first)
    end = np.minimum(start + chunk_length, last)

    if selection == "uniform":
        order = np.random.default_rng(seed).permutation(positions.size)
    else:
        order = np.argsort(-scores[positions], kind="stable")
    if min_anchor_entropy > 0:
        order = order[scores[positions[order]] > min_anchor_entropy]
    choose = _merge if overlap == "merge" else _resample
    return choose(start, end, positions, order, num_chunks)


def _resample(
    start: _Positions, end: _Positions, anchor: _Positions, order: _Positions, num_chunks: int
) -> list[Chunk]:
    starts, ends, anchors = start.tolist(), end.tolist(), anchor.tolist()
    taken = bytearray(len(anchors))  # 1 where a candidate's window overlaps a chosen chunk
    chosen: list[int] = []
    for candidate in order.tolist():
        if taken[candidate]:
            continue
        chosen.append(candidate)
        if len(chosen) == num_chunks:
            break
        # Windows that overlap this one end after its start and start before its end: one slice of the candidates.
        low, high = bisect_right(ends, starts[candidate]), bisect_left(starts, ends[candidate])
        taken[low:high] = b"\x01" * (high - low)
    return [Chunk(starts[candidate], ends[candidate], anchors[candidate]) for candidate in sorted(chosen)]


def _merge(start: _Positions, end: _Positions, anchor: _Positions, order: _Positions, num_chunks: int) -> list[Chunk]:
    best = order[:num_chunks]
    by_place = np.argsort(best)  # place in reading order -> rank
    candidates = best[by_place]
    # A chunk starts where a window does not touch the previous one. Windows in different runs never touch: at least
    # one masked token lies between them.
    begins = np.flatnonzero(start[candidates] > np.append([-1], end[candidates][:-1]))
    if begins.size == 0:
        return []
    stops = np.append(begins[1:], candidates.size) - 1
    best_rank = np.minimum.reduceat(by_place, begins)
    chunks = start[candidates[begins]], end[candidates[stops]], anchor[best[best_rank]]
    return [Chunk(*chunk) for chunk in zip(*(column.tolist() for column in chunks), strict=True)]


def _runs(unmasked: NDArray[np.bool_]) -> tuple[_Positions, _Positions]:
    """First position of each run of true values, and the position after its last one."""
    edges = np.diff(np.concatenate(([0], unmasked.astype(np.int8), [0])))
    return np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)


def _inside(run_start: _Positions, run_end: _Positions, size: int) -> NDArray[np.bool_]:
    """True at the positions of the given runs; undoes `_runs`."""
    edges = np.zeros(size + 1, np.intp)
    edges[run_start] = 1
    edges[run_end] = -1
    return np.cumsum(edges[:size]).astype(bool)


def _vector(name: str, values: Any) -> NDArray[Any]:
    # A tensor leaves its device before its dtype changes: not every device has float64, and numpy has no bfloat16.
    array = values.detach().cpu().double().numpy() if isinstance(values, Tensor) else np.asarray(values)
    if array.ndim != 1:
        raise ConfigError(
            f"`{name}` has shape {array.shape}, but it holds one value for each token of one trajectory. "
            "Pass a one-dimensional sequence."
        )
    return array


def _at_least(name: str, value: int, low: int) -> None:
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < low:
        raise ConfigError(
            f"`{name}` is {value!r}, but it must be an integer of at least {low}. Set it to {low} or more."
        )


def _one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"`{name}` is {value!r}, but it must be one of {', '.join(choices)}. Choose one of these.")
