# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""What a run prints while it runs: one line per logged step."""

from collections.abc import Mapping
from typing import Any

from transformers import Trainer
from transformers.trainer_callback import PrinterCallback, ProgressCallback, TrainerCallback
from transformers.utils import logging

logger = logging.get_logger(__name__)


def describe(logs: Mapping[str, Any], step: int, num_steps: int) -> str | None:
    """The metrics of a logging step in one line; `None` for entries that the end of a run sums up itself.

    Args:
        logs: the logged metrics.
        step: the optimizer step.
        num_steps: number of optimizer steps of the run.

    Example:
        >>> describe({"chunk_loss": 0.25, "kl/unaudited": 0.0031, "teacher/wait_seconds": 2.5}, 3, 40)
        'step 3 of 40 | chunk loss 0.25 | KL 0.0031 | waited 2.5 s'
    """
    if "train_runtime" in logs:
        return None
    scores = {name: value for name, value in logs.items() if name.startswith("eval_") and "pass@1" in name}
    is_evaluation = any(name.startswith("eval_") for name in logs)
    epoch = f" (epoch {logs['epoch']:.3g})" if "epoch" in logs else ""
    parts = [f"evaluation at step {step}" if is_evaluation else f"step {step} of {num_steps}{epoch}"]
    # A name of an evaluation set, or of a function, is a part of the metric's name.
    parts += [
        f"{name.removeprefix('eval_').replace('_pass@1', ' pass@1')} {score:.3f}" for name, score in scores.items()
    ]
    if is_evaluation:
        if (length := logs.get("eval_completions/mean_length")) is not None:
            parts.append(f"{length:.0f} tokens")
        return " | ".join(parts)
    if (loss := logs.get("chunk_loss")) is not None:
        parts.append(f"chunk loss {loss:.3g}")
    elif (loss := logs.get("loss")) is not None and "kl/unaudited" not in logs:  # of a baseline
        parts.append(f"loss {loss:.3g}")
    if (reward := logs.get("reward")) is not None:
        parts.append(f"reward {reward:.3f}")
    if (mean := logs.get("audit/posterior")) is not None:
        spread = logs.get("audit/posterior_std")
        parts.append(f"posterior {mean:.3f}" + (f" ± {spread:.3f}" if spread is not None else ""))
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
    if (waited := logs.get("teacher/wait_seconds")) is not None:
        parts.append(f"waited {waited:.1f} s")
    return " | ".join(parts)


class _Described(TrainerCallback):
    """Prints `describe` of the logs, and all of them at the log level `info`."""

    def _print(self, line: str) -> None:
        raise NotImplementedError

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or not logs:
            return
        logger.info(str({name: value for name, value in logs.items() if name != "total_flos"}))
        line = describe(logs, state.global_step, state.max_steps)
        if line is not None:
            self._print(line)


class RunPrinter(_Described, PrinterCallback):
    """Replaces transformers' callback for runs without progress bars."""

    def _print(self, line: str) -> None:
        print(line, flush=True)  # noqa: T201, as the callback that it replaces


class RunProgress(_Described, ProgressCallback):
    """Replaces transformers' callback for runs with progress bars, which say what they count."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.set_description("Optimizer steps")

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_prediction_step(args, state, control, **kwargs)
        if self.prediction_bar is not None:
            self.prediction_bar.set_description("Batches of the evaluation")

    def _print(self, line: str) -> None:
        bar = self.training_bar if self.training_bar is not None else self.prediction_bar
        if bar is not None:
            bar.write(line)


def use_readable_lines(trainer: Trainer) -> None:
    """Replace transformers' callbacks that print the logs. Those of notebooks show a table, and stay."""
    for theirs, ours in ((ProgressCallback, RunProgress), (PrinterCallback, RunPrinter)):
        if any(type(callback) is theirs for callback in trainer.callback_handler.callbacks):
            trainer.remove_callback(theirs)
            trainer.add_callback(ours())
