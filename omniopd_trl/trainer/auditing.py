# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""A generation batch from its prompts to the weights of its tokens, and the trainer's hooks for it."""

from functools import partial
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import IterableDataset
from trl import DistillationTrainer

from omniopd_trl.audits.auditor import Auditor
from omniopd_trl.audits.types import AuditSettings, PolicyScores
from omniopd_trl.evals.rewards import Rewards
from omniopd_trl.method import Similarity, WeightFunction
from omniopd_trl.models.vllm_logprobs import padded_logprobs
from omniopd_trl.teachers import Usage
from omniopd_trl.trainer.audit_table import AuditTable
from omniopd_trl.trainer.batches import TOKEN_KEYS, group_by_length, has_ended, rows_by_length
from omniopd_trl.trainer.distributed import Failure
from omniopd_trl.trainer.exported import Export
from omniopd_trl.trainer.metrics import Metrics, context_ratios, non_finite
from omniopd_trl.trainer.progress import use_readable_lines
from omniopd_trl.trainer.samplers import EpochSampler
from omniopd_trl.trainer.step_audits import PendingAudit, StepAudits
from omniopd_trl.trainer.verifier import Verifier

# Chunk weights up to this size may have a gradient that underflows: differences of equal posteriors, for example.
NEGLIGIBLE_WEIGHT = 1e-6


class Audits(DistillationTrainer):
    """The hooks of [`OmniOPDTrainer`] for a generation batch: trajectories -> entropy -> audits -> weights."""

    def _set_up_audits(
        self, similarity: Similarity, chunk_weights: WeightFunction | None, rewards: Rewards | None
    ) -> None:
        """Create the parts that audit, that count and that show it.

        Args:
            similarity: similarity of a chunk and a rollout, a result of `get_similarity`.
            chunk_weights: custom weight function; `None` uses `args.posterior_baseline`.
            rewards: functions that score trajectories, if there are any.
        """
        if isinstance(self.teacher, Export):
            self.shuffle_dataset = False  # a step takes the trajectories of its own number
        if isinstance(self.train_dataset, IterableDataset) and self.args.num_generations > 1:
            self.shuffle_dataset = False  # it is shuffled already
        self.auditor = Auditor(self.teacher, self._tokenizer, AuditSettings.of(self.args), similarity)
        self.teacher_usage = Usage()
        self.step_audits = StepAudits(
            self.auditor,
            self._recorder,
            self.accelerator,
            self.args,
            callbacks=self.callback_handler,
            step=lambda: self.state.global_step,
            chunk_weights=chunk_weights,
            is_stream=isinstance(self.train_dataset, IterableDataset),
        )
        self._audit_table = AuditTable(
            self.accelerator, self.args, self._tokenizer, self.teacher.name, self.callback_handler
        )
        self.step_metrics = Metrics(
            self.accelerator,
            self.args,
            self._metrics,
            lambda: self.state.global_step,
            budget=self.teacher.budget,
            custom_weights=chunk_weights is not None,
        )
        self.verifier: Verifier | None = None
        if rewards is not None or self.args.uses_rewards:
            self.verifier = Verifier(rewards, self.accelerator, self.args, self._tokenizer, self.step_metrics)
        progress, budget = use_readable_lines(self), self.teacher.budget
        if progress is not None and budget is not None:
            self.step_audits.on_wait = lambda: progress.show_in_flight(budget.num_in_flight)

    def _get_train_sampler(self, dataset=None):
        sampler = super()._get_train_sampler(dataset)
        if not isinstance(self.teacher, Export):  # which holds each trajectory of a group
            sampler.mini_repeat_count = self.args.num_generations
            sampler.batch_size //= self.args.num_generations
        if not self.shuffle_dataset:
            return sampler
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return EpochSampler(sampler, seed, lambda: int(self.state.epoch or 0))

    def _generate_and_score_completions(self, inputs):
        mode = "train" if self.model.training else "eval"
        asks = mode == "train" or self.args.audit_eval
        # Prompts of map-style datasets were checked at the start. Those of streams are checked before the student
        # answers them. A judge renders none of them; see `check_prompts`.
        for row in inputs if asks and self.args.signal != "judge" else ():
            self.teacher.check_prompt(self.args.teacher_context.prompt(row))
        if mode == "train":
            self.step_audits.rows = inputs
        batch = super()._generate_and_score_completions(inputs)
        batch["weights"] = torch.zeros_like(batch["completion_mask"], dtype=torch.float32)
        batch["audited_mask"] = torch.zeros_like(batch["completion_mask"], dtype=torch.bool)
        if mode == "train":
            if self.verifier is not None:
                batch["verified"] = self.verifier.verify(
                    inputs, batch, self.step_audits.known_verified, self.state, self.step_audits.ask
                )
            self.step_audits.record(self.step_audits.trajectories(inputs, batch, mode, self._sampled))
            if self.args.mask_truncated_completions:
                self._mask_truncated(batch)
        else:
            self._score_samples(inputs, batch)
        if mode == "train" and self.args.reward_weight > 0:
            advantages = torch.tensor([one.advantage for one in batch["verified"]], device=batch["weights"].device)
            batch["advantages"] = self.args.reward_weight * advantages[:, None] * batch["completion_mask"]
        if asks:
            batch["audits"] = self.start_audits(inputs, batch, mode)
            if "advantages" in batch and "importance" in batch:
                batch["advantages"] *= batch["importance"]
            if mode == "eval" or not self.step_audits.overlap:
                self._finish_audits(batch, mode)
        if mode == "train" and self.args.loss_normalization == "components":
            num_audited = batch["audited_mask"].sum()
            counts = torch.stack([num_audited, batch["completion_mask"].sum() - num_audited])
            batch["num_audited"], batch["num_unaudited"] = self.accelerator.gather(counts[None]).sum(0).unbind()
        return batch

    def _mask_truncated(self, batch: dict[str, Any]) -> None:
        """Exclude truncated completions from the loss and from the counts that normalize it."""
        ended = has_ended(batch, [*self.eos_token_ids, self._tokenizer.pad_token_id])
        batch["completion_mask"] = batch["completion_mask"] * ended
        counts = torch.stack([batch["completion_mask"].sum(), ended.sum()])
        batch["num_items_in_batch"], batch["num_sequences"] = self.accelerator.gather(counts[None]).sum(0).unbind()

    def _prepare_inputs(self, generation_batch):
        before = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        if self._buffered_inputs is not before:  # a new generation batch
            self._buffered_inputs = group_by_length(self._buffered_inputs)
            inputs = self._buffered_inputs[self._step % self.args.gradient_accumulation_steps]
        if "audits" in inputs:
            position = self._step % self.args.gradient_accumulation_steps
            ready = self.step_audits.first_ready([batch["audits"] for batch in self._buffered_inputs[position:]])
            # All micro-batches contribute to one optimizer step, so their order does not matter.
            batches = self._buffered_inputs
            batches[position], batches[position + ready] = batches[position + ready], batches[position]
            inputs = batches[position]
            self._finish_audits(inputs, "train", is_last=position == self.args.gradient_accumulation_steps - 1)
        return inputs

    def start_audits(self, inputs: list[dict[str, Any]], batch: dict[str, Any], mode: str) -> list[PendingAudit]:
        """Score the completions, and start the audit of each trajectory as soon as its chunks are known.

        A subclass may override it to see the audits in flight. Every process calls it at the same point.

        Args:
            inputs: the B rows of the dataset.
            batch: generation batch with the keys `TOKEN_KEYS`.
            mode: `"train"` or `"eval"`.

        Returns:
            The B audits in flight, in the order of the rows.

        Raises:
            NonFiniteError: when a log-probability or an entropy is not finite.
        """
        trajectories = self.step_audits.trajectories(inputs, batch, mode)
        lengths = [len(trajectory.completion_ids) for trajectory in trajectories]
        scores: dict[int, PolicyScores] = {}
        unsent: dict[int, PolicyScores] = {}
        pending: dict[int, PendingAudit] = {}
        for part_index, rows in enumerate(rows_by_length(batch, self.args.per_device_train_batch_size)):
            part = {key: batch[key][rows] for key in TOKEN_KEYS}
            scored = self.objective.score(self.model_wrapped, part)
            if not self.accelerator.gather(scored.is_finite()[None]).all():
                raise non_finite("the student's log-probabilities", self.state.global_step)
            new = dict(zip(rows, scored.rows([lengths[b] for b in rows]), strict=True))
            if mode == "train" and self.args.num_branches:
                sample = partial(self._sample_branches, batch=batch, part=part_index)
                for index, trajectory in self.step_audits.fork(trajectories, new, sample).items():
                    trajectories[index] = trajectory
            unsent |= new
            scores |= unsent
            if self.step_audits.overlap:
                pending |= self.step_audits.submit(trajectories, unsent, mode)
                unsent = {}
        pending |= self.step_audits.submit(trajectories, unsent, mode)
        in_order = range(len(inputs))
        if self._sampled is not None:
            logprobs = padded_logprobs([scores[b].logprobs for b in in_order], lengths)
            self._add_importance(batch, padded_logprobs(self._sampled, lengths), logprobs, mode)
        return [pending[b] for b in in_order]

    def _finish_audits(self, batch: dict[str, Any], mode: str, is_last: bool = True) -> None:
        """Wait for the audits of a batch or micro-batch, and fill in `weights` and `audited_mask`, both `(B, T)`.

        Args:
            batch: batch with the key `audits`, which is removed.
            mode: `"train"` or `"eval"`.
            is_last: whether this is the end of the generation batch.

        Raises:
            TeacherError: on every process, when one of them got a permanent error or too many chunks were dropped.
        """
        device, length = batch["weights"].device, batch["weights"].size(1)
        rows = batch.pop("audits")
        collected = self.step_audits.collect(rows, length, mode, is_last=is_last)
        if isinstance(collected, Failure):
            raise self._stop(collected)
        if self.log_completions:
            self._audit_table.add(rows, collected, mode, self.state.global_step)
        batch["weights"], batch["audited_mask"] = collected.weights.to(device), collected.audited.to(device)
        if "importance" in batch:
            batch["weights"] *= batch["importance"]
        if mode == "train" and (self.args.num_branches or self.args.rollout_imitation):
            batch["suffixes"] = collected.suffixes
        if mode == "train" and self.args.rollout_imitation:
            batch["imitation"] = collected.imitation.to(device)
            self.step_metrics.add_imitation(collected.shown)
        trained = [batch[name] for name in ("weights", "advantages") if name in batch]
        is_weighted = any(collected.suffixes) or any((w.abs() > NEGLIGIBLE_WEIGHT).any() for w in trained)
        if mode == "train" and is_weighted:
            self._is_weighted = True
        audits = collected.audits
        self.step_metrics.add_audits(
            mode,
            audits,
            collected.scores,
            collected.waited,
            self.teacher.is_remote,
            is_last=is_last,
            num_left_out=sum(not row.trajectory.is_chosen for row in rows),
        )
        if self.args.teacher_context_column is not None:
            self.step_metrics.add(mode, context_ratios(audits, [row.trajectory for row in rows]))
        usage = sum((audit.usage for audit in audits), Usage())
        self.teacher_usage = sum(gather_object([usage]), self.teacher_usage)
