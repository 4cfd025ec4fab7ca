# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""The order of the prompts, one for each epoch."""

from collections.abc import Callable, Iterator

import torch
from torch.utils.data import Sampler


class EpochSampler(Sampler[int]):
    """A sampler whose shuffling depends on nothing but the seed and the epoch.

    TRL's sampler draws the order of each epoch from a generator that goes on from one to the next, and that no
    checkpoint keeps: a run that is resumed after the first epoch would begin with the first one's order again.
    The first epoch's order is TRL's own.

    Args:
        sampler: shuffles with a `generator` of its own, each time that it is iterated over.
        seed: of the first epoch; each following one has the next.
        epoch: which epoch it is, asked for as an epoch begins. Not `set_epoch`: in a resumed epoch, with several
            processes, accelerate does not hand it on to the sampler.
    """

    def __init__(self, sampler: Sampler[int], seed: int, epoch: Callable[[], int]):
        self.sampler = sampler
        self.seed = seed
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator: torch.Generator = self.sampler.generator  # type: ignore[attr-defined]
        generator.manual_seed(self.seed + self.epoch())
        yield from self.sampler

    def __len__(self) -> int:
        return len(self.sampler)  # type: ignore[arg-type]
