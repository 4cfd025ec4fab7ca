# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""The table of audits that `log_completions` prints, saves, and sends to the trackers of `report_to`."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from operator import attrgetter
from pathlib import Path
from typing import Any

import pandas as pd
from accelerate import Accelerator
from accelerate.utils import gather_object
from rich.console import Console
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase
from transformers.trainer_callback import CallbackHandler
from transformers.utils import logging
from trl.trainer.utils import log_table_to_comet_experiment

from omniopd_trl.audits.types import Audit
from omniopd_trl.journal.browse import AuditedTrajectory, ShownBranch, ShownChunk
from omniopd_trl.journal.schema import Shown
from omniopd_trl.report.runs import control_of, text_of_prompt, token_texts
from omniopd_trl.report.terminal import CONTEXT, AuditedChunk, as_json, chunks_of, print_audits
from omniopd_trl.trainer.omniopd_config import OmniOPDConfig
from omniopd_trl.trainer.step_audits import Collected, PendingAudit
from omniopd_trl.trainer.trackers import to_tensorboard, to_trackio, to_wandb

logger = logging.get_logger(__name__)

# Chunks that are printed without `num_completions_to_print`, as many as `omniopd audits` shows.
NUM_PRINTED = 5

# Separates the student's text before the token with the highest entropy from the rest of the chunk.
FORK = "▏"


class AuditTable:
    """The audited chunks of the last training step, or of an evaluation, over all processes.

    The main process alone keeps and shows them. An error of the terminal or of a tracker is logged, and the run
    continues.

    Args:
        accelerator: accelerator of the run.
        args: configuration of the run.
        tokenizer: the student's tokenizer.
        teacher: name of the teacher.
        callbacks: callbacks of the trainer, for the writer of TensorBoard.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        args: OmniOPDConfig,
        tokenizer: PreTrainedTokenizerBase,
        teacher: str,
        callbacks: CallbackHandler,
    ):
        self._accelerator = accelerator
        self._args = args
        self._tokenizer = getattr(tokenizer, "backend_tokenizer", None)
        self._teacher = teacher
        self._callbacks = callbacks
        self._audited: dict[str, list[AuditedTrajectory]] = {"train": [], "eval": []}

    @property
    def control(self) -> str | None:
        """What a control did to the numbers of the audits; `None` for another run."""
        return control_of(self._args.posterior_baseline, self._args.num_branches > 0)

    def pieces(self, trajectory: AuditedTrajectory) -> list[str]:
        """The text of each token of a completion; empty for a tokenizer that is not a fast one."""
        return [] if self._tokenizer is None else token_texts(self._tokenizer, trajectory.completion_ids)

    def add(self, rows: Sequence[PendingAudit], collected: Collected, mode: str, step: int) -> None:
        """Add the audits of a batch or micro-batch. Those of an earlier training step are removed.

        Every process has to call it at the same point.
        """
        place = (step, self._accelerator.process_index, self._teacher)
        own = [
            _audited(place, row, audit, shown)
            for row, audit, shown in zip(rows, collected.audits, collected.shown, strict=True)
        ]
        if mode == "eval":  # without the samples that pad the last batch of several processes
            everywhere = self._accelerator.gather_for_metrics(own, use_gather_object=True)
        else:
            everywhere = gather_object(own)
        if self._accelerator.is_main_process:
            known = self._audited[mode]
            self._audited[mode] = [one for one in known if mode == "eval" or one.step == step] + everywhere

    def discard(self, mode: str) -> None:
        """Remove what an interrupted training or evaluation has left."""
        self._audited[mode] = []

    def show(self, mode: str, step: int, prefix: str = "") -> None:
        """Print some chunks, save all to `completions/`, send them to the trackers, and start again.

        Args:
            mode: `"train"` or `"eval"`.
            step: the optimizer step at which they are logged.
            prefix: prefix of the metrics of an evaluation.
        """
        chunks = list(chunks_of(self._audited[mode]))
        self.discard(mode)
        if not chunks:
            return
        number = self._args.num_completions_to_print
        printed = spread(chunks, NUM_PRINTED if number is None else number)
        name = f"{prefix}_audits" if prefix else "audits"
        shown = f"{len(printed)} of {len(chunks)} chunks, evenly spaced by their {chunks[0].order}"
        title = f"{name}, step {step}: {shown}"
        path = Path(self._args.output_dir, "completions", f"{name}_{step:05d}.parquet")
        rows = [table_row(chunk, self.pieces) for chunk in chunks]
        key = f"{prefix}/audits" if prefix else "audits"
        targets: dict[str, Callable[[], None]] = {
            "terminal": lambda: self._print(title, printed),
            "Parquet file": lambda: pd.DataFrame(rows).to_parquet(path),
            "wandb": lambda: to_wandb(key, data_frame(rows)),
            "trackio": lambda: to_trackio(key, data_frame(rows), [trace_of(chunk) for chunk in printed]),
            "comet_ml": lambda: log_table_to_comet_experiment(f"{path.stem}.csv", data_frame(rows)),
            "tensorboard": lambda: to_tensorboard(self._callbacks, key, self._as_text(title, printed), step),
        }
        for target in ("terminal", "Parquet file", *self._args.report_to):
            try:
                targets.get(target, lambda: None)()
            except Exception as error:
                why = f"{type(error).__name__}: {error}"
                logger.warning(f"The audits of step {step} do not reach the {target} ({why}). The run continues.")

    def _print(self, title: str, chunks: Iterable[AuditedChunk], console: Console | None = None) -> None:
        console = console or Console()
        with tqdm.external_write_mode(console.file):
            console.print(title, markup=False, highlight=False)
            print_audits(self, chunks, console)

    def _as_text(self, title: str, chunks: Iterable[AuditedChunk]) -> str:
        """The chunks as they are printed."""
        console = Console(width=100, force_terminal=False, color_system=None)
        with console.capture() as capture:
            self._print(title, chunks, console)
        return capture.get()


def spread(chunks: Iterable[AuditedChunk], number: int) -> list[AuditedChunk]:
    """At most `number` chunks, evenly spaced by preference from the lowest on. One alone is the median."""
    ordered = sorted(chunks, key=attrgetter("preference"))
    last = len(ordered) - 1
    if number > last:
        return ordered
    if number <= 1:
        return ordered[last // 2 : last // 2 + number]
    return [ordered[round(index * last / (number - 1))] for index in range(number)]


def table_row(audited: AuditedChunk, pieces: Callable[[AuditedTrajectory], list[str]]) -> dict[str, Any]:
    """A chunk as a row of the table. Tokens and dollars are those of its whole trajectory."""
    values = as_json(audited)
    fork = audited.chunk.fork(pieces(audited.trajectory))
    usage = audited.trajectory.usage
    context, verified = audited.trajectory.teacher_context, audited.trajectory.verified
    return {
        **{name: values[name] for name in ("step", "rank", "index")},
        "prompt": text_of_prompt(values["prompt"]),
        **({} if context is None else {"teacher_context": context}),
        "context": values["context"][-CONTEXT:],
        "chunk": values["student"][:fork] + FORK + values["student"][fork:],
        **{name: values[name] for name in ("rollouts", "k_sem", "num_rollouts", "prior", "posterior", "weight")},
        **({} if audited.chunk.mark is None else {"mark": audited.chunk.mark}),
        **({"branches": values["branches"]} if audited.chunk.branches else {}),
        **({} if verified is None else {name: verified[name] for name in ("reward", "advantage")}),
        "trajectory_tokens": usage.prompt_tokens + usage.completion_tokens,
        "trajectory_usd": values["trajectory_usd"],
    }


def data_frame(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """The rows as a data frame for a tracker, with the rollouts of a chunk, and its branches, as one text each."""

    def as_text(texts: list[dict[str, Any]]) -> str:
        def facts(one: dict[str, Any]) -> str:
            advantage = f" (advantage {one['advantage']:+.3f})" if "advantage" in one else ""
            return f"{advantage} (imitated: {one['imitated']!r})" if one.get("imitated") else advantage

        return "\n".join(f"{one['count']} x {one['similarity']:.3f}: {one['text']}{facts(one)}" for one in texts)

    return pd.DataFrame(
        [{**row, **{name: as_text(row[name]) for name in ("rollouts", "branches") if name in row}} for row in rows]
    )


def trace_of(audited: AuditedChunk) -> dict[str, Any]:
    """A chunk as the arguments of Trackio's `Trace`.

    The messages are the prompt and the student's text, which ends with the chunk. Each distinct rollout is a span.
    """
    trajectory, chunk = audited.trajectory, audited.chunk
    prompt = trajectory.prompt
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    values = as_json(audited)
    names = ("step", "rank", "index", "k_sem", "prior", "posterior", "weight", *(["branches"] * bool(chunk.branches)))
    metadata = {name: values[name] for name in names}
    spans = [
        {
            "id": str(number),
            "name": f"{one['count']} x, similarity {one['similarity']:.3f}",
            "kind": "generation",
            "model": trajectory.teacher,
            "input": chunk.prefix[-CONTEXT:],
            "output": one["text"],
            "metadata": {"count": one["count"], "similarity": one["similarity"]},
        }
        for number, one in enumerate(values["rollouts"])
    ]
    written = f"{chunk.prefix}{FORK}{chunk.text}"
    return {
        "messages": [*messages, {"role": "assistant", "content": written}],
        "metadata": metadata | {"cost_usd": trajectory.usd},
        "spans": spans,
    }


def _audited(place: tuple[int, int, str], row: PendingAudit, audit: Audit, shown: Shown) -> AuditedTrajectory:
    """An audit in memory as the journal holds it."""
    step, rank, teacher = place
    chunks = [
        ShownChunk(
            *(chunk.chunk.start, chunk.chunk.end, chunk.chunk.anchor, chunk.prefix, chunk.text),
            *(chunk.rollouts, chunk.similarities, chunk.prior, chunk.posterior),
            weight=weight,
            branches=tuple(ShownBranch(b.text, b.similarity or 0.0, b.advantage, b.token_ids) for b in chunk.branches),
            mark=chunk.mark,
            imitated=tuple(imitated),
        )
        for chunk, weight, imitated in zip(
            audit.chunks, shown.weights, shown.imitated or [[]] * len(audit.chunks), strict=True
        )
    ]
    return AuditedTrajectory(
        step,
        rank,
        row.index,
        teacher,
        row.trajectory.prompt,
        tuple(row.trajectory.completion_ids),
        tuple(chunks),
        usage=audit.usage,
        usd=audit.usd,
        num_dropped=audit.num_dropped,
        failures=audit.failures,
        outcomes=audit.outcomes,
        teacher_context=row.trajectory.teacher_context,
        answers=audit.answers,
        verified=None if row.trajectory.verified is None else asdict(row.trajectory.verified),
    )
