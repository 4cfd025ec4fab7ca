# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""The order of the prompts in each epoch."""

from collections.abc import Callable, Iterator

import torch
from torch.utils.data import Sampler


class EpochSampler(Sampler[int]):
    """A sampler whose order depends on the seed and the epoch only.

    TRL's sampler draws the orders of all epochs from one generator, which is not saved in checkpoints: a run that is
    resumed after the first epoch would repeat the order of the first. The first epoch has the same order as with TRL.

    The epoch is a function, since with several processes accelerate does not call `set_epoch` in a resumed epoch.

    Args:
        sampler: sampler with its own `generator`, which shuffles each time it is iterated over.
        seed: seed of the first epoch. The seed of epoch k, counted from 0, is `seed + k`.
        epoch: function that returns the index of the current epoch; called at the start of each epoch.
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
