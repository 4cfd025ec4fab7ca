# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Evaluation and sampling in a lower precision than that of the weights."""

from contextlib import nullcontext

import pytest
import torch
from peft import LoraConfig
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support.objective import LORA
from tests.support.training import make_trainer, questions


@pytest.mark.case("R6")
@pytest.mark.parametrize("option", ["bf16_full_eval", "fp16_full_eval"])
@pytest.mark.parametrize("peft_config", [None, LoraConfig(**LORA)], ids=["full", "lora"])
def test_evaluation_does_not_change_the_weights(tmp_path, tiny_model_dir, option, peft_config):
    """Evaluations before and after training, and a prediction, compute in the lower precision."""
    settings = {"eval_dataset": questions(5), "peft_config": peft_config, option: True}
    trainer = make_trainer(tmp_path, tiny_model_dir, **settings)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    seen = []
    trainer.model.get_decoder().layers[0].mlp.up_proj.register_forward_hook(lambda m, i, out: seen.append(out.dtype))
    trainer.evaluate()
    trainer.predict(questions(3))
    assert set(seen) == {torch.bfloat16 if option == "bf16_full_eval" else torch.float16}
    for name, value in trainer.model.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, before[name]), name
    seen.clear()
    trainer.train()
    assert set(seen) == {torch.float32}
    trained = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.evaluate()
    assert all(torch.equal(value, trained[name]) for name, value in trainer.model.state_dict().items())
    assert getattr(trainer.args, option) is True


class Casts(TorchDispatchMode):
    """Counts how often each parameter is cast to another data type."""

    def __init__(self, model):
        super().__init__()
        self.counts = {parameter.data_ptr(): 0 for parameter in model.parameters()}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._to_copy.default and args[0].data_ptr() in self.counts:
            self.counts[args[0].data_ptr()] += 1
        return func(*args, **(kwargs or {}))


def test_completions_are_sampled_with_weights_that_are_cast_once(tmp_path, tiny_model_dir, monkeypatch):
    """Not once for each token, with the same completions."""
    trainer = make_trainer(tmp_path, tiny_model_dir, bf16=True, max_steps=1)
    sample, seen = trainer._sample, []

    def sampled(*args, **kwargs):
        with Casts(trainer.model) as casts:
            completions = sample(*args, **kwargs)
        with monkeypatch.context() as patch:
            patch.setattr(trainer.accelerator, "autocast", nullcontext)
            with Casts(trainer.model) as casts_per_token:
                assert sample(*args, **kwargs) == completions
        seen.append((max(casts.counts.values()), max(casts_per_token.counts.values())))
        assert max(map(len, completions[0])) > 10
        return completions

    trainer._sample = sampled
    trainer.train()
    [(counts, per_token)] = seen
    assert counts == 1
    assert per_token > 10
