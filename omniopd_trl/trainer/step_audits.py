# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""The audits of a step: send them to the teacher, wait for them, and compute the weight of each token."""

import random
import time
import weakref
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from transformers.trainer_callback import CallbackHandler
from transformers.utils import logging

from omniopd_trl.audits.auditor import Auditor
from omniopd_trl.audits.event_loop import EventLoopThread, release
from omniopd_trl.audits.types import Audit, Branch, ChunkAudit, Fork, PolicyScores, Trajectory, Verified
from omniopd_trl.errors import TeacherError
from omniopd_trl.journal.browse import preference_of
from omniopd_trl.journal.recorder import Recorder
from omniopd_trl.journal.resume import audit_or_replay
from omniopd_trl.journal.schema import JournalError, Shown
from omniopd_trl.method.branches import Suffix, branch_weights
from omniopd_trl.method.imitation import add_imitation
from omniopd_trl.method.weights import StepChunks, WeightFunction, get_chunk_weights
from omniopd_trl.trainer.callbacks import PosteriorAverage
from omniopd_trl.trainer.distributed import Failure, first_failure, raise_together, together
from omniopd_trl.trainer.exported import Export, ExportedTrajectory, check_prompt_ids, rescore
from omniopd_trl.trainer.fingerprint import hash_of_row
from omniopd_trl.trainer.metrics import sum_over_processes
from omniopd_trl.trainer.omniopd_config import OmniOPDConfig

logger = logging.get_logger(__name__)

T = TypeVar("T")

# `StepAudits.on_wait` is called this often during a wait, in seconds.
WAIT_SECONDS = 1.0
# Function from prefixes, with the lengths of their chunks, to the branches of each, without their texts.
Sampler = Callable[[list[tuple[list[int], int]]], list[list[Branch]]]


@dataclass(frozen=True)
class PendingAudit:
    """A trajectory whose audit is in flight, with its index in the generation batch and its scores."""

    index: int
    trajectory: Trajectory
    scores: PolicyScores
    future: "Future[Audit]"


@dataclass(frozen=True)
class Collected:
    """The audits of a batch or micro-batch, with the tensors that the loss needs.

    Attributes:
        audits: audits in the order of the rows.
        scores: scores of the rows.
        shown: the weights of the chunks of each row, with its entropies.
        weights: `(B, T)`, float32, the weight of the chunk on audited tokens and 0 elsewhere.
        audited: `(B, T)`, true on audited tokens.
        waited: time spent waiting for the audits, in seconds.
        suffixes: for each row, what is trained of its branches and rollouts besides the trajectory. Their `start` is a
            position in the completion.
        imitation: `(B, T)`, float32, the weight of the trajectories' tokens in the imitation loss.
    """

    audits: list[Audit]
    scores: list[PolicyScores]
    shown: list[Shown]
    weights: torch.Tensor
    audited: torch.Tensor
    waited: float
    suffixes: list[list[Suffix]] = field(default_factory=list)
    imitation: torch.Tensor = field(default_factory=lambda: torch.empty(0))


class StepAudits:
    """The audits in flight, from trajectories to weights.

    An error of a teacher is returned, not raised, and no checkpoint is saved here: both are left to the trainer.

    Args:
        auditor: auditor that asks the teacher.
        recorder: recorder of the journal.
        accelerator: accelerator of the run.
        args: configuration of the run. A generation batch fails when more than `max_failed_chunks` of its chunks have
            fewer than `min_rollouts` rollouts.
        callbacks: callbacks of the trainer; [`PosteriorAverage`] is added if the weights need a moving average.
        step: function that returns the current optimizer step.
        chunk_weights: custom weight function; `None` uses `args.posterior_baseline`.
        is_stream: whether the training set is a stream, which has no fingerprint.

    Attributes:
        custom_weights: the argument `chunk_weights`.
        chunk_weights: the weight function in use.
        rows: rows of the generation batch, which [`replay`] compares.
        on_wait: called about once a second while training waits for audits.
        known_verified: what the journal or an export holds of a verifier, for the trajectories that [`replay`] has
            returned; `None` if there is nothing.
    """

    def __init__(
        self,
        auditor: Auditor,
        recorder: Recorder,
        accelerator: Accelerator,
        args: OmniOPDConfig,
        *,
        callbacks: CallbackHandler,
        step: Callable[[], int],
        chunk_weights: WeightFunction | None = None,
        is_stream: bool = False,
    ):
        self._auditor = auditor
        self._recorder = recorder
        self._accelerator = accelerator
        self._args = args
        self._callbacks = callbacks
        self._step = step
        self.custom_weights = chunk_weights
        self.rows: list[dict[str, Any]] = []
        self._hashes_rows = is_stream and args.uses_rewards
        self.on_wait: Callable[[], None] = lambda: None
        self.chunk_weights = get_chunk_weights(args.posterior_baseline if chunk_weights is None else chunk_weights)
        if self.chunk_weights.needs_average:
            callbacks.add_callback(PosteriorAverage())
        self._loop = EventLoopThread()
        weakref.finalize(self, self._loop.close)
        if accelerator.device.type in ("cuda", "xpu"):
            # The current device is set per thread, and the kernels of a teacher in this process run on it. Without a
            # launcher, the accelerator's device has no index and is the current device of this thread.
            index = accelerator.device.index
            index = torch.accelerator.current_device_index() if index is None else index
            self._loop.run(_compute_on(index))
            auditor.scoring.submit(torch.accelerator.set_device_index, index).result()
        self.start()

    def start(self) -> None:
        """Reset the counts, since an earlier generation batch may have been interrupted."""
        self._asked = self._dropped = 0
        self._failures: list[str] = []
        self._posteriors = (0.0, 0.0)  # sum and number
        self._waited = 0.0
        self._replays = False  # whether the batch comes from the journal
        self._exported: list[ExportedTrajectory] = []  # the batch, if it comes from an export
        self._known_forks: dict[int, tuple[Fork, ...]] = {}  # of the journal, by index of the trajectory
        self.known_verified: list[Verified] | None = None

    @property
    def overlap(self) -> bool:
        """Whether a micro-batch waits for its own audits only, while later ones are still in flight."""
        needs_whole_step = self.chunk_weights.needs_whole_step or self._args.loss_normalization == "components"
        return self._auditor.teacher.is_remote and not needs_whole_step

    # ---- Trajectories ----

    def replay(self, prompt_ids: list[list[int]]) -> list[Trajectory] | None:
        """Trajectories of the current step that the journal or an export holds for these prompts; `None` to generate.

        Every process has to call it: generation is collective, so either all processes replay the step or none does.
        A stream has no fingerprint, so its prompts are compared here, with what the teacher and the verifier see of
        `rows`.

        Raises:
            JournalError: on every process, when the records of one are damaged.
            DataError: on every process, when the export does not hold these prompts.
        """
        journal, accelerator, step = self._recorder.journal, self._accelerator, self._step()
        self._known_forks, self.known_verified = {}, None
        if isinstance(self._auditor.teacher, Export):
            return self._from_export(self._auditor.teacher, prompt_ids)
        if journal is None:
            return None
        stored: list[Trajectory] | None = None
        num_audits, error = 0, None
        try:
            stored = self._recorder.stored()
            num_audits = journal.num_audits(step)
        except JournalError as caught:  # tell the other processes before raising, or they would wait for this one
            error = caught
        now = [(list(ids), *self._seen(row)) for ids, row in zip(prompt_ids, self.rows, strict=True)]
        if differs := stored is not None and [(t.prompt_ids, t.teacher_context, t.row) for t in stored] != now:
            stored = None
        counts = (stored is not None, error is not None, differs, num_audits, len(stored or ()))
        num_stored, failed, others, num_audits, num_trajectories = map(int, sum_over_processes(accelerator, *counts))
        if failed:
            raise_together(error, accelerator.process_index)
        if others and accelerator.is_main_process:
            self._recorder.warn_about_other_prompts()
        self._replays = num_stored == accelerator.num_processes
        if self._replays:
            self._known_forks = {i: t.forks for i, t in enumerate(stored or ()) if t.forks is not None}
            self.known_verified = _all_verified(stored or ())
        if self._replays and accelerator.is_main_process:
            logger.warning(f"step {step}: {num_audits} of {num_trajectories} audits from the journal")
        return stored if self._replays else None

    def _seen(self, row: dict[str, Any]) -> tuple[str | None, str | None]:
        """What only the teacher sees of a row, and what identifies the row for a verifier."""
        return self._args.teacher_context.of(row), hash_of_row(row) if self._hashes_rows else None

    def _from_export(self, export: Export, prompt_ids: list[list[int]]) -> list[Trajectory]:
        first = self._accelerator.process_index * len(prompt_ids)
        with together(self._accelerator.process_index):
            self._exported = export.trajectories(self._step(), first, len(prompt_ids))
            check_prompt_ids(export, self._step(), self._exported, prompt_ids)
        trajectories = [exported.trajectory for exported in self._exported]
        self.known_verified = _all_verified(trajectories)
        return trajectories

    def trajectories(
        self,
        rows: list[dict[str, Any]],
        batch: dict[str, Any],
        mode: str,
        sampling_logprobs: list[list[float | None]] | None = None,
    ) -> list[Trajectory]:
        """The trajectories of a batch of TRL, each with its own seed.

        Args:
            rows: rows of the dataset.
            batch: batch with the ids and masks of prompts and completions, and with `verified` of a verifier.
            mode: `"train"` or `"eval"`.
            sampling_logprobs: log-probabilities that each completion was sampled with; see [`Trajectory`].
        """
        prompt_masks, completion_masks = batch["prompt_mask"].bool(), batch["completion_mask"].bool()
        key = (self._args.seed, mode, self._step(), self._accelerator.process_index)
        verified = batch.get("verified")
        seen = [self._seen(row) for row in rows]
        return [
            Trajectory(
                prompt=row["prompt"],
                prompt_ids=batch["prompt_ids"][b][prompt_masks[b]].tolist(),
                completion_ids=batch["completion_ids"][b][completion_masks[b]].tolist(),
                seed=random.Random(repr((*key, b))).getrandbits(31),
                sampling_logprobs=None if sampling_logprobs is None else sampling_logprobs[b],
                teacher_context=seen[b][0],
                verified=None if verified is None else verified[b],
                row=seen[b][1],
            )
            for b, row in enumerate(rows)
        ]

    def record(self, trajectories: list[Trajectory]) -> None:
        """Write the trajectories of a step to the journal before they are audited, unless they come from it."""
        if self._recorder.journal is not None and not self._replays:
            self._recorder.journal.record_trajectories(self._step(), trajectories)

    def fork(
        self, trajectories: Sequence[Trajectory], scores: Mapping[int, PolicyScores], sample: Sampler
    ) -> dict[int, Trajectory]:
        """Trajectories with their forks: those of the journal, or new ones, which are recorded before the audits.

        Every process has to call it at the same point, and calls `sample` if any of them does.

        Args:
            trajectories: all trajectories of this process's generation batch.
            scores: scores of the trajectories that get forks now, by index, each `(T,)` on the CPU.
            sample: samples the branches.
        """
        missing = [index for index in scores if index not in self._known_forks]
        (num_missing,) = sum_over_processes(self._accelerator, len(missing))
        if num_missing:
            chunks = {index: self._auditor.candidates(trajectories[index], scores[index]) for index in missing}
            prefixes = [
                (trajectories[i].prompt_ids + trajectories[i].completion_ids[: chunk.start], chunk.end - chunk.start)
                for i in missing
                for chunk in chunks[i]
            ]
            branches = iter(sample(prefixes))
            forks = {
                i: self._auditor.forks(trajectories[i], scores[i], chunks[i], islice(branches, len(chunks[i])))
                for i in missing
            }
            if self._recorder.journal is not None:
                self._recorder.journal.record_forks(self._step(), forks)
            self._known_forks |= forks
        return {index: replace(trajectories[index], forks=self._known_forks[index]) for index in scores}

    # ---- In flight ----

    def submit(
        self, trajectories: Sequence[Trajectory], scores: Mapping[int, PolicyScores], mode: str
    ) -> dict[int, PendingAudit]:
        """Start audits together in one iteration of the event loop.

        Args:
            trajectories: all trajectories of this process's generation batch.
            scores: scores of the trajectories to audit now, by index, each `(T,)` on the CPU.
            mode: `"train"` or `"eval"`. Audits of evaluation are neither recorded nor replayed.

        Returns:
            The audits in flight, by index.
        """
        step, journal = self._step(), self._recorder.journal
        if mode == "train" and self._exported:
            audits = [
                rescore(self._auditor, self._exported[index], trajectories[index], row, journal, step, index)
                for index, row in scores.items()
            ]
        elif mode == "train":
            audits = [
                audit_or_replay(self._auditor, trajectories[index], row, journal, step, index)
                for index, row in scores.items()
            ]
        else:
            ledger = self._recorder
            audits = [self._auditor.audit(trajectories[index], row, ledger) for index, row in scores.items()]
        futures = self._loop.submit(*audits)
        pairs = zip(scores, futures, strict=True)
        return {index: PendingAudit(index, trajectories[index], scores[index], future) for index, future in pairs}

    def ask(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine that asks the teacher outside of an audit, and return its result."""
        return self._loop.run(coroutine)

    def first_ready(self, batches: Sequence[Sequence[PendingAudit]]) -> int:
        """Wait until all audits of a batch are done, and return the index of the first such batch."""
        start = time.perf_counter()
        while True:
            for index, audits in enumerate(batches):
                if all(audit.future.done() for audit in audits):
                    self._waited += time.perf_counter() - start
                    return index
            open_futures = [a.future for audits in batches for a in audits if not a.future.done()]
            wait(open_futures, WAIT_SECONDS, FIRST_COMPLETED)
            self.on_wait()

    def cancel(self) -> None:
        """Cancel the audits in flight and wait until they have ended."""
        self._loop.cancel()

    def release(self) -> None:
        """Cancel the audits in flight and close the teacher's connections. It can be asked again afterwards."""
        release(self._auditor.teacher, self._loop)

    # ---- Results ----

    def collect(
        self, rows: Sequence[PendingAudit], length: int, mode: str, *, is_last: bool = True
    ) -> Collected | Failure:
        """Wait for the audits of a batch or micro-batch. Every process has to call it at the same point.

        Args:
            rows: the B audits in flight.
            length: length T of the padded completions.
            mode: `"train"` or `"eval"`.
            is_last: whether this is the end of the generation batch. The fraction of dropped chunks is checked then.

        Returns:
            The audits with their weights. When a process got a permanent error, when too many chunks were dropped, or
            when a custom weight function failed, the failure instead, the same on every process.
        """
        start = time.perf_counter()
        audits: list[Audit] = []
        error: Exception | None = None
        try:
            for row in rows:
                while not wait([row.future], WAIT_SECONDS).done:
                    self.on_wait()
                audits.append(row.future.result())
        except Exception as caught:  # tell the other processes before raising, or they would wait for this one
            error = caught
        waited, self._waited = self._waited + time.perf_counter() - start, 0.0
        failure = self._count(audits, error, is_last)
        if failure is not None:
            return failure
        weights = torch.zeros(len(rows), length)
        audited = torch.zeros(len(rows), length, dtype=torch.bool)
        imitation = torch.zeros(len(rows), length)
        suffixes: list[list[Suffix]] = [[] for _ in rows]
        of_chunks = self._weigh(audits, rows, mode, is_last)
        if isinstance(of_chunks, Failure):
            return of_chunks
        of_chunk = iter(of_chunks.tolist())
        imitated = [self._imitated(audit, row.trajectory, mode) for audit, row in zip(audits, rows, strict=True)]
        for b, audit in enumerate(audits):
            for chunk, rollouts in zip(audit.chunks, imitated[b], strict=True):
                span = slice(chunk.chunk.start, chunk.chunk.end)
                weights[b, span], audited[b, span] = next(of_chunk), True
                others: list[Suffix] = []
                if chunk.branches:
                    own, others = self._weigh_branches(chunk, rows[b].trajectory.seed)
                    weights[b, span] = torch.tensor(own)
                if rollouts:
                    ids = rows[b].trajectory.completion_ids[span]
                    own, others = add_imitation(ids, others, rollouts, self._args.rollout_imitation)
                    imitation[b, span] = torch.tensor(own)
                suffixes[b] += [replace(suffix, start=suffix.start + chunk.chunk.start) for suffix in others]
            for agreed in audit.agreed:
                audited[b, agreed.start : agreed.end] = True
        texts = [[self._auditor.alignment.texts_of(of_one) for of_one in of_row] for of_row in imitated]
        shown = list(_shown(audits, rows, of_chunks.tolist(), texts))
        if mode == "train":
            self._recorder.show(shown)
        scores = [row.scores for row in rows]
        return Collected(audits, scores, shown, weights, audited, waited, suffixes, imitation)

    def _imitated(self, audit: Audit, trajectory: Trajectory, mode: str) -> list[list[tuple[int, ...] | None]]:
        """The tokens of each rollout that are imitated, for each chunk; see `Alignment.continuations`.

        They follow from the recorded texts, so a replayed audit has the same ones. Evaluation imitates none.
        """
        if not self._args.rollout_imitation or mode != "train":
            return [[] for _ in audit.chunks]
        return self._auditor.alignment.continuations(
            trajectory.completion_ids,
            [chunk.chunk for chunk in audit.chunks],
            [chunk.text for chunk in audit.chunks],
            [chunk.rollouts for chunk in audit.chunks],
            prompt_ids=trajectory.prompt_ids,
            max_tokens=self._args.rollout_imitation_tokens,
        )

    def _count(self, audits: list[Audit], error: Exception | None, is_last: bool) -> Failure | None:
        self._dropped += sum(audit.num_dropped for audit in audits)
        self._asked += sum(audit.num_dropped + len(audit.chunks) for audit in audits)
        self._failures += [failure for audit in audits for failure in audit.failures]
        accelerator, args = self._accelerator, self._args
        state = torch.tensor([[error is not None, self._dropped, self._asked]], device=accelerator.device)
        failed, dropped, asked = accelerator.gather(state).sum(0).tolist()
        if failed:
            return first_failure(error, accelerator.process_index)
        if not is_last:
            return None
        failures, self._failures = self._failures, []
        self._asked = self._dropped = 0
        if dropped <= args.max_failed_chunks * asked:
            return None
        why = next(iter(gather_object(failures)), "no reason given")
        too_few = f"fewer than min_rollouts={args.min_rollouts} rollouts"
        if args.signal != "rollouts":
            too_few = "no mark" if args.signal == "judge" else f"no mark, or {too_few}"
        reason = (
            f"{dropped} of {asked} chunks got {too_few}, more than "
            f"max_failed_chunks={args.max_failed_chunks:g} of the batch. One of the causes: {why}"
        )
        return Failure(TeacherError, reason, is_ours=True)

    def _weigh(
        self, audits: list[Audit], rows: Sequence[PendingAudit], mode: str, is_last: bool
    ) -> torch.Tensor | Failure:
        """The weights of this process's chunks, `(K,)`. With branches, those of the trajectories' own."""
        if self._args.num_branches and mode == "train":
            own = [
                self._advantages(chunk, row.trajectory.seed)[0] / len(chunk.branches)
                for audit, row in zip(audits, rows, strict=True)
                for chunk in audit.chunks
            ]
            return torch.tensor(own, dtype=torch.float32)
        table = torch.tensor([*_columns(audits, rows)], dtype=torch.float64).reshape(-1, 6)
        tables, first, count = [table], 0, len(table)
        if self.chunk_weights.needs_whole_step and self._accelerator.num_processes > 1:
            tables = gather_object([table])
            first = sum(len(other) for other in tables[: self._accelerator.process_index])
        # Number the trajectories uniquely over all processes.
        number = torch.cat([other[:, 0] * len(tables) + process for process, other in enumerate(tables)]).long()
        posteriors, similarities, priors, entropies, lengths = torch.cat(tables)[:, 1:].float().T.contiguous()
        # `Trainer` may replace the callback when it restores a checkpoint, so look it up each time.
        average = next((c for c in self._callbacks.callbacks if isinstance(c, PosteriorAverage)), None)
        step = self._step()
        chunks = StepChunks(
            posteriors,
            number,
            similarities,
            priors,
            entropies,
            lengths.long(),
            step=step,
            seed=random.Random(repr((self._args.seed, "weights", mode, step))).getrandbits(31),
            moving_average=None if average is None else average.value,
        )
        weights, error = torch.zeros(count), None
        try:
            weights = self.chunk_weights(chunks)[first : first + count]
        except Exception as caught:
            if self.custom_weights is None:
                raise
            error = caught
        if self.custom_weights is not None:
            failure = first_failure(error, self._accelerator.process_index)
            if failure is not None:
                return failure
        if average is not None and mode == "train":
            # Update the average after use, and once per generation batch: the baseline of a batch must not depend on
            # the batch. Evaluation does not change it.
            own = posteriors[first : first + count]
            self._posteriors = (self._posteriors[0] + own.sum().item(), self._posteriors[1] + count)
            if is_last:
                average.update(*sum_over_processes(self._accelerator, *self._posteriors))
                self._posteriors = (0.0, 0.0)
        return weights

    def _advantages(self, chunk: ChunkAudit, seed: int) -> list[float]:
        """The advantages of a fork. The control permutes them, seeded by the trajectory's seed and the chunk."""
        advantages = [branch.advantage for branch in chunk.branches]
        if self._args.posterior_baseline == "shuffled":
            random.Random(repr((seed, "branches", chunk.chunk.start))).shuffle(advantages)
        return advantages

    def _weigh_branches(self, chunk: ChunkAudit, seed: int) -> tuple[list[float], list[Suffix]]:
        """The weights of a fork; see `branch_weights`."""
        token_ids = [branch.token_ids for branch in chunk.branches]
        sampled = [branch.sampling_logprobs for branch in chunk.branches]
        return branch_weights(token_ids, self._advantages(chunk, seed), sampled if any(sampled) else ())


def _all_verified(trajectories: Sequence[Trajectory]) -> list[Verified] | None:
    verified = [trajectory.verified for trajectory in trajectories]
    return None if None in verified else [one for one in verified if one is not None]


def _shown(
    audits: list[Audit],
    rows: Sequence[PendingAudit],
    weights: list[float],
    imitated: Sequence[list[list[str | None]]],
) -> Iterator[Shown]:
    rest = iter(weights)
    for audit, row, texts in zip(audits, rows, imitated, strict=True):
        preferences = [preference_of(chunk) for chunk in audit.chunks]
        own = list(islice(rest, len(preferences)))
        entropies = row.scores.entropy.tolist()
        logprobs = row.scores.logprobs.tolist()
        ends = (min(preferences, default=None), max(preferences, default=None))
        yield Shown(row.index, *ends, entropies, own, logprobs, texts if any(texts) else [])


def _columns(audits: list[Audit], rows: Sequence[PendingAudit]) -> Iterator[tuple[float, ...]]:
    """For each chunk: its trajectory, posterior, similarity, prior, entropy at the anchor, and length."""
    for index, (audit, row) in enumerate(zip(audits, rows, strict=True)):
        for chunk in audit.chunks:
            span = chunk.chunk
            entropy = row.scores.entropy[span.anchor].item()
            yield index, chunk.posterior, chunk.mean_similarity, chunk.prior, entropy, span.end - span.start


async def _compute_on(device_index: int) -> None:
    torch.accelerator.set_device_index(device_index)
