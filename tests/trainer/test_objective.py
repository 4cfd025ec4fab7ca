# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""The trainer's loss and gradient against a dense float64 reference that shares no code with it."""

from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import BitsAndBytesConfig, TrainerState

from tests.support.objective import LORA, check, load
from tests.support.teachers import Agreeing
from tests.support.training import dense_objective, make_trainer, perturb, questions, step_and_gradient, trainable


@pytest.mark.parametrize("normalization", ["tokens", "sum", "components"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_gradient_equals_dense_reference(tmp_path, make_tiny_model, tiny_tokenizer, tied, lora, normalization):
    """Loss, metrics and every weight's gradient: the whole path from trajectory to loss."""
    path = make_tiny_model(seed=5, tie_word_embeddings=tied)
    peft_config = LoraConfig(**LORA) if lora else None
    trainer = make_trainer(tmp_path, path, loss_normalization=normalization, peft_config=peft_config)
    check(trainer, path, tiny_tokenizer)


@pytest.mark.parametrize(("batch_size", "accumulation"), [(1, 8), (2, 4), (8, 1)])
@pytest.mark.parametrize("normalization", ["tokens", "sum", "components"])
def test_gradient_accumulation_is_exact(
    tmp_path, tiny_model_dir, tiny_tokenizer, batch_size, accumulation, normalization
):
    """However the generation batch is split, the step is that of one large batch."""
    trainer = make_trainer(
        tmp_path,
        tiny_model_dir,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        loss_normalization=normalization,
    )
    check(trainer, tiny_model_dir, tiny_tokenizer)


def test_temperature_is_that_of_the_sampling_policy(tmp_path, tiny_model_dir, tiny_tokenizer):
    """Entropies, log-probabilities, prior and KL are of logits divided by the sampling temperature."""
    check(make_trainer(tmp_path, tiny_model_dir, temperature=0.7), tiny_model_dir, tiny_tokenizer)


def test_rollouts_that_are_not_requested(tmp_path, tiny_model_dir, tiny_tokenizer):
    """The posterior is that of Eq. 5 with the rollouts that were obtained, all five or two that are equal."""
    teacher = Agreeing()
    trainer = make_trainer(tmp_path, tiny_model_dir, teacher=teacher, num_rollouts=5, first_rollouts=2)
    logged = check(trainer, tiny_model_dir, tiny_tokenizer)
    chunks, others = (sum(n for n, samples in teacher.asked if samples == size) for size in (2, 3))
    assert 0 < others < chunks
    assert logged["audit/frac_stopped"] == pytest.approx(1 - others / chunks)
    assert logged["audit/num_rollouts"] == pytest.approx(2 + 3 * others / chunks)
    assert logged["audit/dropped_chunks"] == 0
    assert logged["teacher/requests"] == chunks + others


def test_gradient_checkpointing_changes_nothing(tmp_path, tiny_model_dir, tiny_tokenizer):
    """Activations that are computed again give the same gradient, with adapters too."""
    check(make_trainer(tmp_path / "a", tiny_model_dir, gradient_checkpointing=True), tiny_model_dir, tiny_tokenizer)
    lora = make_trainer(tmp_path / "b", tiny_model_dir, gradient_checkpointing=True, peft_config=LoraConfig(**LORA))
    check(lora, tiny_model_dir, tiny_tokenizer)


def test_padding_to_a_multiple_changes_nothing(tmp_path, tiny_model_dir, tiny_tokenizer):
    """More padding, left of prompts and right of completions, is never seen by the loss."""
    trainer = make_trainer(tmp_path, tiny_model_dir, pad_to_multiple_of=64)
    check(trainer, tiny_model_dir, tiny_tokenizer)
    assert trainer.batches[0]["completion_ids"].size(1) == 64


def test_large_beta_is_legal(tmp_path, tiny_model_dir, tiny_tokenizer):
    """beta is the paper's weight, not the interpolation coefficient that the base class bounds by 1."""
    check(make_trainer(tmp_path, tiny_model_dir, beta=7.0), tiny_model_dir, tiny_tokenizer)


def test_reference_of_an_instance_is_the_model_as_it_was_passed(
    tmp_path, tiny_model_dir, make_tiny_model, tiny_tokenizer
):
    """An instance that was changed in memory is its own reference; reading its path again would not be."""
    model = load(tiny_model_dir)
    perturb(model, 0.05)
    changed = tmp_path / "changed"
    model.save_pretrained(changed)
    trainer = make_trainer(tmp_path / "out", model, processing_class=tiny_tokenizer)
    check(trainer, changed, tiny_tokenizer)


def test_adapter_with_its_own_head_keeps_the_original_as_reference(tmp_path, make_tiny_model, tiny_tokenizer):
    """`modules_to_save` trains a copy of the LM head; with adapters off the original one is used."""
    path = make_tiny_model(seed=6, tie_word_embeddings=False)
    trainer = make_trainer(tmp_path, path, peft_config=LoraConfig(**LORA, modules_to_save=["lm_head"]))
    check(trainer, path, tiny_tokenizer)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_without_beta_no_reference_is_loaded(tmp_path, tiny_model_dir, tiny_tokenizer, monkeypatch, lora):
    """`beta=0`: no second model, and the gradient is that of the chunk loss alone."""
    from omniopd_trl.models import reference
    from omniopd_trl.trainer import omniopd_trainer

    def fail(*args, **kwargs):
        raise AssertionError("a reference was loaded")

    monkeypatch.setattr(reference, "create_model_from_path", fail)
    monkeypatch.setattr(omniopd_trainer, "copy", SimpleNamespace(deepcopy=fail))
    peft_config = LoraConfig(**LORA) if lora else None
    model = load(tiny_model_dir)
    trainer = make_trainer(tmp_path, model, beta=0.0, peft_config=peft_config, processing_class=tiny_tokenizer)
    monkeypatch.undo()
    assert trainer.ref_model is None
    perturb(trainer.model)
    gradient, student = step_and_gradient(trainer)
    loss, _ = dense_objective(student, load(tiny_model_dir), trainer.batches[0], tiny_tokenizer, trainer.args)
    loss.backward()
    for name, parameter in student.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(gradient[name].double(), parameter.grad, rtol=1e-3, atol=2e-6)
    assert "kl/unaudited" not in trainer.state.log_history[0]


def test_with_lora_there_is_no_second_copy(tmp_path, tiny_model_dir):
    """The reference of an adapter is its base model, which is there already."""
    trainer = make_trainer(tmp_path, tiny_model_dir, peft_config=LoraConfig(**LORA))
    assert trainer.ref_model is None
    assert trainer.args.beta > 0


def test_batch_baseline_subtracts_the_global_mean(tmp_path, tiny_model_dir, tiny_tokenizer):
    """The weights of all chunks of a batch are centred on their mean, over all micro-batches."""
    plain = make_trainer(tmp_path / "plain", tiny_model_dir)
    perturb(plain.model)
    plain.train()
    mean = plain.state.log_history[0]["audit/posterior"]
    assert mean > 0.03, "nothing to subtract"
    trainer = make_trainer(
        tmp_path / "batch",
        tiny_model_dir,
        posterior_baseline="batch",
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
    )
    check(trainer, tiny_model_dir, tiny_tokenizer, weight_of=lambda posterior: posterior - mean)


def test_trajectory_baseline_subtracts_the_other_chunks(tmp_path, tiny_model_dir):
    """With two chunks, each one's weight is minus the other's; the posterior itself is logged as it is."""
    trainer = make_trainer(tmp_path, tiny_model_dir, posterior_baseline="trajectory")
    trainer.train()
    weights, audited = trainer.batches[0]["weights"], trainer.batches[0]["audited_mask"]
    assert audited.sum() > 0
    for row, mask in zip(weights, audited, strict=True):
        if mask.sum() == 2 * trainer.args.chunk_length:
            assert row.sum().item() == pytest.approx(0.0, abs=1e-6)
            assert row.abs().max() > 0
        else:
            assert row.abs().max() == 0, "a chunk without others has no baseline, and weight 0"
    assert trainer.state.log_history[0]["audit/posterior"] > 0.03


def test_moving_average_is_kept_in_checkpoints(tmp_path, tiny_model_dir):
    """Stopped after two steps and resumed, a run takes the same next steps as one that was not stopped."""
    settings = {
        "posterior_baseline": "moving_average",
        "learning_rate": 0.05,
        "save_steps": 2,
        "dataset": questions(32),
    }
    whole = make_trainer(tmp_path / "whole", tiny_model_dir, max_steps=4, save_strategy="steps", **settings)
    whole.train()
    resumed = make_trainer(tmp_path / "resumed", tiny_model_dir, max_steps=4, save_strategy="steps", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert len(resumed.batches) == 2, "the resumed run repeated steps"
    for first, second in zip(whole.batches[2:], resumed.batches, strict=True):
        torch.testing.assert_close(first["completion_ids"], second["completion_ids"], rtol=0, atol=0)
        torch.testing.assert_close(first["weights"], second["weights"], rtol=0, atol=1e-6)
    torch.testing.assert_close(trainable(resumed.model), trainable(whole.model), rtol=0, atol=1e-6)


def test_an_evaluation_does_not_count_in_the_moving_average(tmp_path, tiny_model_dir):
    settings = {
        "posterior_baseline": "moving_average",
        "learning_rate": 0.05,
        "max_steps": 3,
        "dataset": questions(24),
    }
    plain = make_trainer(tmp_path / "plain", tiny_model_dir, **settings)
    plain.train()
    evaluation = {"eval_strategy": "steps", "eval_steps": 1, "audit_eval": True, "eval_dataset": questions(5)}
    evaluated = make_trainer(tmp_path / "evaluated", tiny_model_dir, **settings, **evaluation)
    evaluated.train()
    assert any(log.get("eval_audit/posterior", 0) > 0 for log in evaluated.state.log_history), "nothing was audited"
    torch.testing.assert_close(trainable(evaluated.model), trainable(plain.model), rtol=0, atol=1e-6)


def test_a_baseline_that_the_checkpoint_does_not_know(tmp_path, tiny_model_dir):
    """It begins with the resumed run, and is in the checkpoints that this saves."""
    settings = {"save_strategy": "steps", "save_steps": 1, "learning_rate": 0.05, "dataset": questions(24)}
    make_trainer(tmp_path, tiny_model_dir, max_steps=1, **settings).train()
    trainer = make_trainer(tmp_path, tiny_model_dir, max_steps=3, posterior_baseline="moving_average", **settings)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    state = TrainerState.load_from_json(str(tmp_path / "checkpoint-3" / "trainer_state.json"))
    assert state.stateful_callbacks["PosteriorAverage"]["attributes"]["weight"] > 0


def test_weights_follow_their_rows_through_shuffle_and_split(tmp_path, tiny_model_dir):
    """TRL shuffles the generation batch and we group it: each micro-batch must hold its own rows' weights."""
    trainer = make_trainer(tmp_path, tiny_model_dir, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    trainer.train()
    batch = trainer.batches[0]
    expected = {tuple(ids.tolist()): w for ids, w in zip(batch["completion_ids"], batch["weights"], strict=True)}
    order = []
    for micro_batch in trainer._buffered_inputs:
        for ids, weights in zip(micro_batch["completion_ids"], micro_batch["weights"], strict=True):
            torch.testing.assert_close(weights, expected[tuple(ids.tolist())], rtol=0, atol=0)
            order.append(tuple(ids.tolist()))
    assert sorted(order) == sorted(expected)
    assert order != list(expected), "no row has moved: this test shows nothing"


def test_quantized_student(tmp_path, make_tiny_model, tiny_tokenizer):
    """QLoRA: the adapter's gradient is that of the dequantized model, after forward passes without gradients."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    path = make_tiny_model(seed=7, hidden_size=64, intermediate_size=128, head_dim=16, num_key_value_heads=4)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    trainer = make_trainer(
        tmp_path, path, quantization_config=quantization, peft_config=LoraConfig(**LORA), max_steps=2, seed=1
    )
    perturb(trainer.model, 0.1)
    trainer.args.max_steps = 1
    before = trainable(trainer.model)
    base = load(path)
    student = get_peft_model(load(path), LoraConfig(**LORA))
    for name, module in trainer.model.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            weight = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            plain = name.removeprefix("base_model.model.")
            base.get_submodule(plain.removesuffix(".base_layer")).weight.data.copy_(weight)
            student.get_submodule(name).weight.data.copy_(weight)
    student.load_state_dict({name: value.float() for name, value in before.items()}, strict=False)
    trainer.train()
    loss, _ = dense_objective(student, base, trainer.batches[0], tiny_tokenizer, trainer.args)
    loss.backward()
    after = trainable(trainer.model)
    ours = torch.cat([(before[name].float() - after[name].float()).flatten() for name in before]).double()
    dense = torch.cat([student.get_parameter(name).grad.flatten() for name in before])
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss.item(), rel=2e-2)
    # TRL keeps the adapters of a quantized model in bfloat16, so a step is rounded to it.
    assert torch.nn.functional.cosine_similarity(ours, dense, dim=0) > 0.98
    assert ours.norm().item() == pytest.approx(dense.norm().item(), rel=0.05)


@pytest.mark.parametrize("prior", ["policy", "reference"])
def test_evaluation_leaves_a_quantized_student_trainable(tmp_path, make_tiny_model, prior):
    """An evaluation, or a pass of the reference, changes no gradient: bitsandbytes would repack the weights in it."""
    pytest.importorskip("bitsandbytes")
    path = make_tiny_model(seed=7, hidden_size=64, intermediate_size=128, head_dim=16, num_key_value_heads=4)
    norms = []
    for evaluates in (False, True):
        trainer = make_trainer(
            tmp_path / str(evaluates),
            path,
            quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32),
            peft_config=LoraConfig(**{**LORA, "init_lora_weights": False}),
            prior=prior,
            eval_on_start=evaluates,
            eval_dataset=questions(),
        )
        layer = next(m for m in trainer.model.modules() if hasattr(m, "quant_state"))
        assert hasattr(layer, "support_avx512bf16_for_cpu"), "bitsandbytes has renamed what keeps it from repacking"
        before = layer.weight.data.clone()
        trainer.train()
        assert torch.equal(layer.weight.data, before)
        norms.append(next(entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry))
    assert norms[0] == pytest.approx(norms[1], rel=1e-6)


def test_dropout_is_off_while_sampling_and_scoring(tmp_path, tiny_model_dir, tiny_tokenizer):
    """The policy that is scored is the one that sampled: with dropout, no two greedy completions would be equal."""
    peft_config = LoraConfig(**LORA, lora_dropout=0.5)
    trainer = make_trainer(tmp_path, tiny_model_dir, peft_config=peft_config)
    perturb(trainer.model, 0.3)
    trainer.model.train()
    prompt_ids = [tiny_tokenizer("Tom has 3 apples and")["input_ids"]]
    trainer.generation_config.do_sample = False
    completions = [trainer._generate_single_turn(prompt_ids, None, {})[0] for _ in range(3)]
    assert completions[0] == completions[1] == completions[2]
    assert trainer.model.training


@pytest.mark.parametrize(("batch_size", "accumulation"), [(2, 4), (8, 1)])
@pytest.mark.parametrize("normalization", ["tokens", "sum", "components"])
def test_truncated_completions_can_be_left_out(
    tmp_path, tiny_model_dir, tiny_tokenizer, batch_size, accumulation, normalization
):
    """The step is that of a batch that never held them, in every normalization and however it is split."""
    trainer = make_trainer(
        tmp_path,
        tiny_model_dir,
        mask_truncated_completions=True,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        loss_normalization=normalization,
    )
    perturb(trainer.model)
    gradient, student = step_and_gradient(trainer)
    whole = trainer.batches[0]
    kept = whole["completion_mask"].bool().any(1)
    # Everything that was generated is in the batch still; only what ended counts.
    assert kept.tolist() == [tiny_tokenizer.eos_token_id in ids for ids in whole["completion_ids"].tolist()]
    assert 4 <= kept.sum() < 8
    batch = {"prompts": [prompt for prompt, k in zip(whole["prompts"], kept, strict=True) if k]}
    for key in ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask"):
        batch[key] = whole[key][kept]
    loss, metrics = dense_objective(student, load(tiny_model_dir), batch, tiny_tokenizer, trainer.args)
    loss.backward()
    for name, parameter in student.named_parameters():
        difference = (gradient[name].double() - parameter.grad).abs()
        assert (difference <= 2e-6 + 1e-3 * parameter.grad.abs()).all(), (name, difference.max())
    logged = trainer.state.log_history[0]
    assert logged["loss"] == pytest.approx(loss.item(), rel=1e-4, abs=1e-6)
    for name in ("chunk_loss", "kl/unaudited", "audit/posterior", "audit/audited_fraction"):
        assert logged[name] == pytest.approx(metrics[name], rel=2e-4), name
