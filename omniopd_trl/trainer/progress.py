# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""What a run prints while it runs: one line per logged step, and progress bars."""

import time
from collections.abc import Mapping
from typing import Any

from transformers import Trainer
from transformers.trainer_callback import PrinterCallback, ProgressCallback, TrainerCallback
from transformers.utils import logging

logger = logging.get_logger(__name__)

# The requests in flight are shown this often, in seconds: in a terminal, and in a file, where each time is a line.
REFRESH_SECONDS, REFRESH_SECONDS_IN_FILE = 1.0, 60.0


def scores_in(logs: Mapping[str, Any]) -> list[str]:
    """The scores of an evaluation in its logged metrics, each with its name.

    A name of an evaluation set, or of a function, is a part of the metric's name.
    """
    return [
        f"{name.removeprefix('eval_').replace('_pass@1', ' pass@1')} {score:.3f}"
        for name, score in logs.items()
        if name.startswith("eval_") and "pass@1" in name and score is not None
    ]


def describe(logs: Mapping[str, Any], step: int, num_steps: int, scores: str | None = None) -> str | None:
    """The metrics of a logging step in one line; `None` for entries that the end of a run sums up itself.

    Args:
        logs: the logged metrics.
        step: the optimizer step.
        num_steps: number of optimizer steps of the run.
        scores: scores of the last evaluation, in words.

    Example:
        >>> describe({"chunk_loss": 0.25, "kl/unaudited": 0.0031, "teacher/wait_seconds": 2.5}, 3, 40)
        'step 3 of 40 | chunk loss 0.25 | KL 0.0031 | waited 2.5 s'
    """
    if "train_runtime" in logs:
        return None
    is_evaluation = any(name.startswith("eval_") for name in logs)
    epoch = f" (epoch {logs['epoch']:.3g})" if "epoch" in logs else ""
    parts = [f"evaluation at step {step}" if is_evaluation else f"step {step} of {num_steps}{epoch}"]
    if is_evaluation:
        parts += scores_in(logs)
        if (length := logs.get("eval_completions/mean_length")) is not None:
            parts.append(f"{length:.0f} tokens")
        return " | ".join(parts)
    if scores is not None:
        parts.append(scores)
    if (loss := logs.get("chunk_loss")) is not None:
        parts.append(f"chunk loss {loss:.3g}")
    elif (loss := logs.get("loss")) is not None and "kl/unaudited" not in logs:  # of a baseline
        parts.append(f"loss {loss:.3g}")
    if (reward := logs.get("reward")) is not None:
        parts.append(f"reward {reward:.3f}")
    if (mean := logs.get("audit/posterior")) is not None:
        spread = logs.get("audit/posterior_std")
        parts.append(f"posterior {mean:.3f}" + (f" ± {spread:.3f}" if spread is not None else ""))
    if (spread := logs.get("branches/advantage_std")) is not None:
        parts.append(f"advantages ± {spread:.3f}")
    if (kl := logs.get("kl/unaudited")) is not None:
        parts.append(f"KL {kl:.3g}")
    if (chunks := logs.get("audit/num_chunks")) is not None:
        parts.append(f"{chunks:.3g} chunks each")
    tokens = [logs.get(f"teacher/{kind}_tokens") for kind in ("prompt", "completion")]
    if None not in tokens and any(tokens):
        parts.append(f"teacher read {tokens[0]:,.0f}, wrote {tokens[1]:,.0f}")
    if (usd := logs.get("teacher/usd_total")) is not None:
        left = logs.get("teacher/usd_left")
        parts.append(f"{usd:.2f} dollars" + (f", {left:.2f} left" if left is not None else ""))
    if (tokens_left := logs.get("teacher/tokens_left")) is not None:
        parts.append(f"{tokens_left:,.0f} tokens left")
    if (waited := logs.get("teacher/wait_seconds")) is not None:
        parts.append(f"waited {waited:.1f} s")
    return " | ".join(parts)


class _Described(TrainerCallback):
    """Prints `describe` of the logs, and all of them at the log level `info`."""

    def __init__(self) -> None:
        super().__init__()
        self._scores: tuple[int, list[str]] | None = None  # step and scores of the last evaluation

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        self._scores = None
        for entry in state.log_history:  # a resumed run has an earlier evaluation
            self._keep_scores(entry, entry.get("step", 0))

    def _keep_scores(self, logs: Mapping[str, Any], step: int) -> None:
        """Keep the scores of the last evaluation. Several sets are logged one after the other."""
        if scores := scores_in(logs):
            earlier = self._scores[1] if self._scores is not None and self._scores[0] == step else []
            self._scores = step, [*earlier, *scores]

    def _print(self, line: str) -> None:
        raise NotImplementedError

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or not logs:
            return
        logger.info(str({name: value for name, value in logs.items() if name != "total_flos"}))
        self._keep_scores(logs, state.global_step)
        scores = None if self._scores is None else f"{', '.join(self._scores[1])} at step {self._scores[0]}"
        line = describe(logs, state.global_step, state.max_steps, scores)
        if line is not None:
            self._print(line)


class RunPrinter(_Described, PrinterCallback):
    """Replaces transformers' callback for runs without progress bars."""

    def _print(self, line: str) -> None:
        print(line, flush=True)  # noqa: T201, as the callback that it replaces


class RunProgress(_Described, ProgressCallback):
    """Replaces transformers' callback for runs with progress bars, which say what they count."""

    def __init__(self) -> None:
        super().__init__()
        self._shown_at = time.monotonic()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.set_description("Optimizer steps")

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_prediction_step(args, state, control, **kwargs)
        if self.prediction_bar is not None:
            self.prediction_bar.set_description("Batches of the evaluation")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.training_bar is not None:
            self.training_bar.set_postfix_str("", refresh=False)
        super().on_step_end(args, state, control, **kwargs)

    def show_in_flight(self, number: int) -> None:
        """Show the number of requests in flight on the bar of the evaluation, or else of training."""
        bar = self.prediction_bar if self.prediction_bar is not None else self.training_bar
        if bar is None:  # another process than the first
            return
        seconds = REFRESH_SECONDS if bar.fp.isatty() else REFRESH_SECONDS_IN_FILE
        if (now := time.monotonic()) - self._shown_at >= seconds:
            self._shown_at = now
            bar.set_postfix_str(f"{number} requests in flight")

    def _print(self, line: str) -> None:
        bar = self.training_bar if self.training_bar is not None else self.prediction_bar
        if bar is not None:
            bar.write(line)


def use_readable_lines(trainer: Trainer) -> RunProgress | None:
    """Replace transformers' callbacks that print the logs. Those of notebooks show a table, and stay.

    Returns:
        The callback with the progress bars, if the run has some.
    """
    progress = None
    for theirs, ours in ((ProgressCallback, RunProgress), (PrinterCallback, RunPrinter)):
        if any(type(callback) is theirs for callback in trainer.callback_handler.callbacks):
            trainer.remove_callback(theirs)
            callback = ours()
            trainer.add_callback(callback)
            progress = callback if isinstance(callback, RunProgress) else progress
    return progress
