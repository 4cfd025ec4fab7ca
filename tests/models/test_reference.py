# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""The anchor's reference is the initial student, whatever the student begins as."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from omniopd_trl.errors import ConfigError
from omniopd_trl.models.lm_head import LMHead
from omniopd_trl.models.reference import REFERENCE_ADAPTER, Reference
from tests.support.objective import check, load
from tests.support.training import dense_objective, make_trainer, perturb, questions, step_and_gradient, trainable

LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"}


def trained_adapter(path, name="default") -> torch.nn.Module:
    """A student that comes with an adapter which was trained before."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(**LORA, lora_dropout=0.0), adapter_name=name)
    perturb(model, 0.1)
    return model


@pytest.mark.parametrize("kind", ["pissa", "olora", False, "trained", "q", "gaussian", True])
def test_an_adapter_that_begins_elsewhere(tmp_path, tiny_model_dir, tiny_tokenizer, kind):
    """Loss, KL and gradient are those to the student as it was, which the base model alone is not."""
    if kind in ("trained", "q"):  # by a name that modules begin with
        student = trained_adapter(tiny_model_dir, "default" if kind == "trained" else kind)
        trainer = make_trainer(tmp_path, student, processing_class=tiny_tokenizer)
    else:
        trainer = make_trainer(tmp_path, tiny_model_dir, peft_config=LoraConfig(**LORA, init_lora_weights=kind))
    has_copy = kind not in ("gaussian", True)
    assert (trainer.objective.reference.adapter == REFERENCE_ADAPTER) is has_copy
    initial = copy.deepcopy(trainer.model)
    perturb(trainer.model)
    gradient, student = step_and_gradient(trainer)
    loss, metrics = dense_objective(student, initial, trainer.batches[0], tiny_tokenizer, trainer.args)
    loss.backward()
    logged = trainer.state.log_history[0]
    assert logged["loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert logged["kl/unaudited"] == pytest.approx(metrics["kl/unaudited"], rel=2e-4)
    for name, parameter in student.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(gradient[name].double(), parameter.grad, rtol=1e-3, atol=2e-6, msg=name)
    # The copy is never trained, and the adapter is still the one that is.
    names = set(trainable(trainer.model))
    assert names == set(gradient)
    assert not any(f".{REFERENCE_ADAPTER}." in name for name in names)
    before = dict(initial.named_parameters())
    for name, parameter in trainer.model.named_parameters():
        if f".{REFERENCE_ADAPTER}." in name:
            assert torch.equal(parameter, before[name])


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_an_adapter_that_trains_biases_of_the_base_model_is_refused(tmp_path, tiny_model_dir, bias):
    config = LoraConfig(**LORA, bias=bias)
    with pytest.raises(ConfigError, match=f"bias='{bias}'.*would move.*beta=0"):
        make_trainer(tmp_path, tiny_model_dir, peft_config=config)
    make_trainer(tmp_path, tiny_model_dir, peft_config=config, beta=0.0)  # no anchor, no reference


def test_what_is_frozen_in_an_adapter_stays_frozen(tmp_path, tiny_model_dir, tiny_tokenizer):
    """PEFT turns gradients on for all of an adapter that it goes back to from the reference."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(**LORA))
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)
    trainer = make_trainer(tmp_path, model, processing_class=tiny_tokenizer, max_steps=2, dataset=questions(16))
    trainer.train()
    factors = {name: p for name, p in trainer.model.named_parameters() if "lora_" in name}
    assert {("lora_B" in name) == p.requires_grad for name, p in factors.items()} == {True}
    assert all(p.grad is None for name, p in factors.items() if "lora_A" in name)


def test_a_kept_head_outlives_the_memory_of_the_shards():
    """FSDP2 gives up the memory that it gathered, after the reference's forward: of weight and bias."""
    reference = object.__new__(Reference)
    reference._fsdp, reference.offloaded = True, None
    weight, bias = torch.randn(5, 3), torch.randn(5)
    expected = weight.clone(), bias.clone()
    kept = reference.kept(LMHead(weight, bias, 1.0, None))
    for tensor in (weight, bias):
        tensor.zero_()
    assert torch.equal(kept.weight, expected[0])
    assert torch.equal(kept.bias, expected[1])


def test_a_resumed_run_keeps_the_first_reference(tmp_path, tiny_model_dir):
    """The checkpoint holds it: a new process would take the student as it is now."""
    settings = {
        "peft_config": LoraConfig(**LORA, init_lora_weights="olora"),
        "max_steps": 3,
        "save_strategy": "steps",
        "save_steps": 1,
        "learning_rate": 0.1,
        "dataset": questions(24),
    }
    whole = make_trainer(tmp_path, tiny_model_dir, **settings)
    whole.train()
    again = make_trainer(tmp_path, tiny_model_dir, **settings)
    perturb(again.model)  # as if the new process had begun elsewhere
    for name, parameter in again.model.named_parameters():
        if f".{REFERENCE_ADAPTER}." in name:
            parameter.data.add_(0.1)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    for there, here in zip(whole.state.log_history[1:3], again.state.log_history[1:3], strict=True):
        assert here["kl/unaudited"] == pytest.approx(there["kl/unaudited"], rel=1e-5)
        assert here["loss"] == pytest.approx(there["loss"], rel=1e-5)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_first_step_away_from_the_reference_is_said(tmp_path, tiny_model_dir, tiny_tokenizer, dropout, caplog):
    """Dropout trains another policy than the one that sampled, and than the reference."""
    logging.enable_propagation()
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = dropout
    trainer = make_trainer(tmp_path, model, processing_class=tiny_tokenizer)
    trainer.train()
    assert ("Before the first update the student is" in caplog.text) is (dropout > 0)


@pytest.mark.parametrize("peft_config", [None, LoraConfig(**LORA)], ids=["full", "lora"])
def test_the_reference_has_no_dropout(tmp_path, tiny_model_dir, tiny_tokenizer, peft_config):
    """Also where the student has, and comes in training mode: the reference is what the student is without it."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32).train()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.3
    input_ids = torch.arange(5, 35)[None]
    with torch.no_grad():
        assert not torch.equal(model(input_ids).logits, model(input_ids).logits)
        expected = model.eval()(input_ids).logits
    trainer = make_trainer(tmp_path, model.train(), processing_class=tiny_tokenizer, peft_config=peft_config)
    trainer.model.train()
    logits: list[torch.Tensor] = []
    trainer.objective.run_reference(trainer.model, lambda reference: logits.append(reference(input_ids).logits))
    torch.testing.assert_close(logits, [expected], rtol=0, atol=1e-6)
    assert trainer.model.training


@pytest.mark.case("R4")
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_trainable_tokens(tmp_path, make_tiny_model, tiny_tokenizer, tied):
    """Loss and gradients of an adapter that also trains some tokens' rows, in the embedding and in the tied head."""
    path = make_tiny_model(seed=5, tie_word_embeddings=tied)
    peft_config = LoraConfig(**LORA, trainable_token_indices=[tiny_tokenizer.eos_token_id, 70, 71])
    trainer = make_trainer(tmp_path, path, peft_config=peft_config)
    check(trainer, path, tiny_tokenizer)
    assert any("trainable_tokens_delta" in name for name, p in trainer.model.named_parameters() if p.requires_grad)


@pytest.mark.case("R4")
@pytest.mark.parametrize("kind", ["tokens", "head"])
def test_the_reference_has_the_trained_tokens_and_modules(tmp_path, make_tiny_model, tiny_tokenizer, kind):
    """An adapter whose LoRA factors add nothing may still have trained rows, or a trained head."""
    more = {"trainable_token_indices": [70, 71]} if kind == "tokens" else {"modules_to_save": ["lm_head"]}
    path = make_tiny_model(seed=5, tie_word_embeddings=kind == "tokens")
    model = get_peft_model(load(path), LoraConfig(**LORA, **more)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora" not in name:
                parameter.mul_(1.5)
        expected = model(torch.arange(60, 80)[None]).logits
    trainer = make_trainer(tmp_path, model, processing_class=tiny_tokenizer)
    perturb(trainer.model)
    logits: list[torch.Tensor] = []
    ids = torch.arange(60, 80)[None]
    trainer.objective.run_reference(trainer.model, lambda reference: logits.append(reference(ids).logits))
    torch.testing.assert_close(logits, [expected], rtol=0, atol=1e-6)


@pytest.mark.case("R13")
@pytest.mark.parametrize("name", ["default", REFERENCE_ADAPTER])
def test_only_the_adapter_is_saved(tmp_path, tiny_model_dir, tiny_tokenizer, name):
    """In a checkpoint and by `save_model`: no folder of the reference, also if the adapter has its name."""
    model = get_peft_model(load(tiny_model_dir), LoraConfig(**LORA), adapter_name=name)
    perturb(model, 0.1)
    trainer = make_trainer(tmp_path, model, processing_class=tiny_tokenizer, save_strategy="steps", save_steps=1)
    assert trainer.objective.reference.adapter not in (None, name)
    trainer.train()
    trainer.save_model(tmp_path / "saved")
    for folder in (tmp_path / "checkpoint-1", tmp_path / "saved"):
        found = {path.parent.relative_to(folder).name for path in folder.rglob("adapter_config.json")}
        assert found == {"" if name == "default" else name}
        saved = PeftModel.from_pretrained(load(tiny_model_dir), folder if name == "default" else folder / name)
        ids = torch.arange(5, 20)[None]
        with torch.no_grad():
            torch.testing.assert_close(saved(ids).logits, trainer.model.eval()(ids).logits, rtol=0, atol=1e-5)
    assert (tmp_path / "checkpoint-1" / "reference.pt").exists()
    assert not (tmp_path / "saved" / "reference.pt").exists()
