# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Tables for the trackers of `report_to`, through the runs that the integrations of transformers have started."""

import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import CallbackHandler

from omniopd_trl.trainer.omniopd_config import OmniOPDConfig


def to_wandb(key: str, table: Any) -> None:
    """Send a data frame to the current run of W&B, if there is one."""
    import wandb

    if wandb.run is not None:
        wandb.log({key: wandb.Table(dataframe=table)})


def to_trackio(key: str, table: Any, traces: Sequence[dict[str, Any]]) -> None:
    """Send a data frame to the current run of Trackio, if there is one, and the arguments of some traces."""
    import trackio

    if not trackio_runs():
        return
    logged: dict[str, Any] = {key: trackio.Table(dataframe=table)}
    if hasattr(trackio, "Trace"):  # not in the first versions
        logged[f"{key}/traces"] = [trackio.Trace(**trace) for trace in traces]
    trackio.log(logged)


def to_tensorboard(callbacks: CallbackHandler, key: str, text: str, step: int) -> None:
    """Write a text as it is: as a block of code, since TensorBoard reads texts as Markdown."""
    for callback in callbacks.callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
            callback.tb_writer.add_text(key, textwrap.indent(text, "    ", lambda line: True), step)
            callback.tb_writer.flush()


def trackio_runs() -> bool:
    """Whether Trackio has a current run."""
    import trackio

    return trackio.context_vars.current_run.get() is not None


@contextmanager
def unprofiled(args: OmniOPDConfig) -> Iterator[None]:
    """Context without `"trackio"` in `report_to` while Trackio has no run: before and after training.

    TRL sends the time of each generation and forward pass to Trackio, which raises an error without a run.
    """
    before = args.report_to
    if "trackio" in before and not trackio_runs():
        args.report_to = [name for name in before if name != "trackio"]
    try:
        yield
    finally:
        args.report_to = before
