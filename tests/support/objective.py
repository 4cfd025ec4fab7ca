# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Compare a step of the trainer with the dense reference."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.support.training import dense_objective, perturb, step_and_gradient

LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"}


def load(path: Path) -> torch.nn.Module:
    """The initial student, read from disk."""
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def check(trainer, initial: Path, tokenizer, **options) -> dict[str, float]:
    """Check that one step of the trainer equals one step along the dense gradient; return the logged metrics.

    Options are those of `dense_objective`.
    """
    perturb(trainer.model)
    gradient, student = step_and_gradient(trainer)
    loss, metrics = dense_objective(student, load(initial), trainer.batches[0], tokenizer, trainer.args, **options)
    loss.backward()
    logged = compare(trainer, gradient, student, loss, metrics)
    assert metrics["kl/unaudited"] > 1e-3, "the student does not differ from its reference"
    return logged


def compare(trainer, gradient, student, loss, metrics) -> dict[str, float]:
    """Check a step against the gradient that the dense loss has left in `student`; return the logged metrics."""
    dense = {name: p.grad for name, p in student.named_parameters() if p.requires_grad}
    assert max(g.abs().max() for g in dense.values()) > 1e-3, "the reference has no gradient to compare with"
    for name, value in dense.items():
        difference = (gradient[name].double() - value).abs()
        assert (difference <= 2e-6 + 1e-3 * value.abs()).all(), (name, difference.max())
    logged = trainer.state.log_history[0]
    assert logged["loss"] == pytest.approx(loss.item(), rel=1e-4, abs=1e-6)
    for name, value in metrics.items():
        assert logged[name] == pytest.approx(value, rel=2e-4, abs=1e-7), name
    return logged
