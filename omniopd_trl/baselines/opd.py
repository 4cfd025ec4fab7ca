# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""On-policy distillation from the probabilities of a teacher in this process."""

from typing import Any

import torch
from transformers import AutoTokenizer
from trl import DistillationConfig, DistillationTrainer
from trl.trainer.utils import pad

from omniopd_trl.accounting.usage import Usage
from omniopd_trl.baselines.base import Baseline
from omniopd_trl.errors import ConfigError
from omniopd_trl.teachers import Prefix
from omniopd_trl.teachers.load import is_local
from omniopd_trl.trainer.metrics import sum_over_processes
from omniopd_trl.trainer.omniopd_config import OmniOPDConfig
from omniopd_trl.trainer.validation import tokenizer_of


def check_teacher(student: str, teacher: str | None, args: OmniOPDConfig) -> None:
    """Check that the probabilities of student and teacher can be compared, before a model is loaded.

    Raises:
        ConfigError: when the teacher is not a model in this process, or its tokens are not those of the student.
    """
    check_is_local(teacher)
    own = tokenizer_of(student, args).get_vocab()
    theirs = AutoTokenizer.from_pretrained(
        teacher, revision=args.teacher_model_revision, trust_remote_code=args.trust_remote_code
    ).get_vocab()
    differ = next((token for token, index in own.items() if theirs.get(token) != index), None)
    if differ is not None or len(own) != len(theirs):
        example = "" if differ is None else f", for example for {differ!r}"
        raise ConfigError(
            f"method='opd' compares probabilities of the same tokens, and the tokenizers of {student!r} and "
            f"{teacher!r} differ ({len(own)} and {len(theirs)} tokens{example}). Use a teacher with the "
            "student's tokenizer, or method='omniopd'."
        )


def check_is_local(teacher: str | None) -> None:
    """Check that a teacher is a model in this process.

    Raises:
        ConfigError: when it returns text.
    """
    if teacher is None or teacher == "scripted" or not is_local(teacher):
        raise ConfigError(
            f"method='opd' compares probabilities, and the teacher {teacher!r} returns text. Set "
            "`teacher_model_name_or_path` to a model with the student's tokenizer, or use method='omniopd'."
        )


class OPD(Baseline, DistillationTrainer):
    """TRL's [`~trl.DistillationTrainer`], evaluated as [`OmniOPDTrainer`].

    With `teacher_context_column`, the teacher's probabilities are those after the prompt that only it sees.
    `teacher_usage` counts the tokens that the teacher reads: prompts and completions. It writes none.
    """

    method = "opd"
    config = DistillationConfig
    unlike = ("beta", "teacher_model_init_kwargs", "teacher_model_revision")  # the teacher is an instance

    def _generate_and_score_completions(self: Any, inputs: Any) -> Any:
        batch = super()._generate_and_score_completions(inputs)
        if self.model.training:
            context = self.evaluator.args.teacher_context
            if context.column is not None:
                prompts = [self.evaluator.teacher.encode(Prefix(context.prompt(row))) for row in inputs]
                rows = [torch.tensor(ids, device=batch["prompt_ids"].device) for ids in prompts]
                batch["teacher_ids"] = pad(rows, self._tokenizer.pad_token_id, padding_side="left")
                batch["teacher_mask"] = pad([torch.ones_like(row) for row in rows], 0, padding_side="left")
            mask = batch.get("teacher_mask", batch["prompt_mask"])
            read = (mask.sum() + batch["completion_mask"].sum()).item()
            self.teacher_usage += Usage(int(*sum_over_processes(self.accelerator, read)))
        return batch

    def _compute_loss(self: Any, student: Any, inputs: dict[str, Any], num_items_in_batch: Any) -> Any:
        self._inputs = inputs
        return super()._compute_loss(student, inputs, num_items_in_batch)

    def _get_last_hidden_state(self: Any, model: Any, ids: Any, mask: Any, logits_to_keep: int, **kwargs: Any) -> Any:
        if "teacher_ids" in self._inputs and model is self.accelerator.unwrap_model(self.teacher_model):
            ids = torch.cat([self._inputs["teacher_ids"], self._inputs["completion_ids"]], dim=1)
            mask = torch.cat([self._inputs["teacher_mask"], self._inputs["completion_mask"]], dim=1)
        return super()._get_last_hidden_state(model, ids, mask, logits_to_keep, **kwargs)
