# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""An evaluation in a lower precision leaves the weights as they are."""

import pytest
import torch
from peft import LoraConfig

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
