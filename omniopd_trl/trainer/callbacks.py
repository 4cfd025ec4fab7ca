# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Callbacks of the trainer."""

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState


class PosteriorAverage(TrainerCallback, ExportableState):
    """Mean posterior of earlier batches, for `posterior_baseline="moving_average"`, saved in checkpoints.

    An exponential moving average over generation batches with decay 0.9.
    """

    DECAY = 0.9

    def __init__(self) -> None:
        self.total = 0.0
        self.weight = 0.0

    @property
    def value(self) -> float | None:
        """The average, or `None` before the first batch."""
        return self.total / self.weight if self.weight else None

    def update(self, posterior_sum: float, num_chunks: float) -> None:
        """Add a batch to the average, unless it has no audited chunk."""
        if num_chunks:
            self.total = self.DECAY * self.total + (1 - self.DECAY) * posterior_sum / num_chunks
            self.weight = self.DECAY * self.weight + (1 - self.DECAY)

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"total": self.total, "weight": self.weight}}

    def on_train_begin(self, args, state, control, **kwargs):
        # `Trainer` saves the state of callbacks but by default does not restore it. A checkpoint that was written with
        # another baseline has no entry for this callback, and `Trainer` needs one when it saves.
        saved = state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        for name, value in saved["attributes"].items():
            setattr(self, name, value)


class OnTrainBegin(TrainerCallback):
    """Calls a function at the start of training, when the back end has wrapped the student.

    Args:
        function: function without arguments.
    """

    def __init__(self, function: Callable[[], None]):
        self.function = function

    def on_train_begin(self, args, state, control, **kwargs):
        self.function()
