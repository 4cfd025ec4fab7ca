# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Loss, metrics and gradient of the trainer on the GPU, against the dense float64 reference on the CPU."""

import copy
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, TrainerCallback

from omniopd_trl.audits.types import PolicyScores
from tests.gpu.bounds import hold
from tests.support.flex_attention import FLEX, reference_flex_attention
from tests.support.training import RecordingTrainer, dense_objective, make_trainer, perturb, questions

pytestmark = pytest.mark.gpu

LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"}
# The bounds of the CPU's test of float32: an absolute and a relative error of each weight's gradient, and relative
# errors of the loss and of the metrics.
GRADIENT_ABSOLUTE, GRADIENT_RELATIVE = 2e-6, 1e-3
FLOAT32_LOSS, FLOAT32_METRIC = 1e-4, 2e-4
# bf16: a number is right to 0.4 percent, and each layer rounds its input and its output.
BF16_LOSS, BF16_NORM, BF16_COSINE = 0.02, 0.03, 0.01  # relative, relative, one minus the cosine
# In nats, the largest and the mean of all completion tokens. The logits of these students have a standard deviation of
# about 2 and come from hidden states with an error of 1 percent.
BF16_SCORE, BF16_MEAN_SCORE = 0.3, 0.04
# A KL, in nats, beside the relative error: errors of some 0.03 nats in the logits of both models, each squared.
BF16_KL = 2e-3


class KeepGradient(TrainerCallback):
    """Copies the gradient of each trainable weight to the CPU, before the optimizer steps."""

    def __init__(self) -> None:
        self.gradient: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model = kwargs["model"]
        self.gradient = {name: p.grad.double().cpu() for name, p in model.named_parameters() if p.grad is not None}


def load(path: Path) -> torch.nn.Module:
    """The initial student, on the CPU: its reference."""
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def one_step(
    trainer: RecordingTrainer, device: torch.device, scale: float = 0.02
) -> tuple[dict[str, torch.Tensor], torch.nn.Module, dict[str, Any]]:
    """Take one step on the device; the gradient, the student as it was before and the batch, on the CPU."""
    perturb(trainer.model, scale)
    student = copy.deepcopy(trainer.model).cpu()
    assert {p.device.type for p in trainer.model.parameters()} == {device.type}
    keeper = KeepGradient()
    trainer.add_callback(keeper)
    trainer.train()
    batch = {key: value.cpu() if torch.is_tensor(value) else value for key, value in trainer.batches[0].items()}
    return keeper.gradient, student, batch


def gradient_of(loss: torch.Tensor, student: torch.nn.Module) -> dict[str, torch.Tensor]:
    loss.backward()
    return {name: p.grad for name, p in student.named_parameters() if p.requires_grad}


def check_float32(record_property, trainer, device, path, tokenizer) -> None:
    """Entropies, chunks, posteriors, loss and gradients, all from the dense reference."""
    gradient, student, batch = one_step(trainer, device)
    loss, metrics = dense_objective(student, load(path), batch, tokenizer, trainer.args)
    dense = gradient_of(loss, student)
    assert gradient.keys() == dense.keys()
    assert max(g.abs().max() for g in dense.values()) > 1e-3, "the reference has no gradient to compare with"
    excess = 0.0  # of the error, in units of what is allowed
    for name, value in dense.items():
        allowed = GRADIENT_ABSOLUTE + GRADIENT_RELATIVE * value.abs()
        excess = max(excess, ((gradient[name] - value).abs() / allowed).max().item())
    logged = trainer.state.log_history[0]
    hold(record_property, "loss", abs(logged["loss"] / loss.item() - 1), FLOAT32_LOSS)
    for name, value in metrics.items():
        hold(record_property, name, abs(logged[name] / value - 1), FLOAT32_METRIC)
    hold(record_property, "gradient", excess, 1.0)
    assert metrics["kl/unaudited"] > 1e-3, "the student does not differ from its reference"


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_float32(tmp_path, device, make_tiny_model, tiny_tokenizer, record_property, tied, lora):
    path = make_tiny_model(seed=5, tie_word_embeddings=tied)
    peft_config = LoraConfig(**LORA) if lora else None
    trainer = make_trainer(tmp_path, path, peft_config=peft_config, use_cpu=device.type == "cpu")
    check_float32(record_property, trainer, device, path, tiny_tokenizer)


def test_float32_of_a_wider_student(tmp_path, device, make_tiny_model, tiny_tokenizer, record_property):
    """Four layers of width 256, in micro-batches, at another temperature, with checkpointing."""
    wide = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "num_hidden_layers": 4}
    path = make_tiny_model(seed=6, tie_word_embeddings=False, initializer_range=0.1, **wide)
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "gradient_checkpointing": True}
    trainer = make_trainer(tmp_path, path, temperature=0.7, use_cpu=device.type == "cpu", **settings)
    check_float32(record_property, trainer, device, path, tiny_tokenizer)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_branches_with_flex_attention(tmp_path, device, make_tiny_model, record_property, lora):
    """Loss and gradient of a step with packed branches are those with `sdpa`. A dry run has no kernels to test."""
    wide = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 64}
    path = make_tiny_model(seed=7, initializer_range=0.1, **wide)
    settings = {"num_branches": 3, "chunk_length": 6, "min_chunk_length": 4, "gradient_checkpointing": True}
    settings |= {"use_cpu": device.type == "cpu", "peft_config": LoraConfig(**LORA) if lora else None}
    steps = []
    for name, attention in (("flex", FLEX), ("sdpa", {})):
        with reference_flex_attention() if device.type == "cpu" else nullcontext():
            trainer = make_trainer(tmp_path / name, path, **settings, **attention)
            gradient, _, batch = one_step(trainer, device)
        assert trainer.objective._why_apart == "", "branches are not packed"
        steps.append((gradient, batch, trainer.state.log_history[0]["loss"]))
    (gradient, batch, loss), (expected, plain, plain_loss) = steps
    # Both sample with sdpa.
    assert torch.equal(batch["completion_ids"], plain["completion_ids"])
    assert torch.equal(batch["audited_mask"], plain["audited_mask"])
    assert any(batch["suffixes"])
    assert gradient.keys() == expected.keys()
    assert max(g.abs().max() for g in expected.values()) > 1e-3, "there is no gradient to compare with"
    excess = max(
        ((gradient[key] - value).abs() / (GRADIENT_ABSOLUTE + GRADIENT_RELATIVE * value.abs())).max().item()
        for key, value in expected.items()
    )
    hold(record_property, "loss", abs(loss - plain_loss) / max(abs(plain_loss), 1e-2), FLOAT32_LOSS)
    hold(record_property, "gradient", excess, 1.0)


def dense_rows(model: torch.nn.Module, batch: dict[str, Any], temperature: float) -> list[torch.Tensor]:
    """`(T, V)` log-probabilities at the completion tokens of each row."""
    rows = []
    for b, mask in enumerate(batch["completion_mask"].bool()):
        prompt = batch["prompt_ids"][b][batch["prompt_mask"][b].bool()]
        input_ids = torch.cat([prompt, batch["completion_ids"][b][mask]])[None]
        logits = model(input_ids).logits[0, len(prompt) - 1 : -1]
        rows.append((logits / temperature).log_softmax(-1))
    return rows


def objective_of_spans(
    student: torch.nn.Module, reference: torch.nn.Module, batch: dict[str, Any], args: Any
) -> tuple[torch.Tensor, dict[str, float]]:
    """Eq. 8 per token, with the audited spans and their weights as the trainer has them.

    In bf16, entropies are rounded and chunks may lie elsewhere: what is compared is the objective of the same chunks.
    """
    chunk_sum = kl_sum = torch.zeros((), dtype=torch.float64)
    student_rows = dense_rows(student, batch, args.temperature)
    with torch.no_grad():
        reference_rows = dense_rows(reference, batch, args.temperature)
    for b, (logp, ref) in enumerate(zip(student_rows, reference_rows, strict=True)):
        mask = batch["completion_mask"][b].bool()
        audited, weights = batch["audited_mask"][b][mask], batch["weights"][b][mask].double()
        token_logp = logp.gather(1, batch["completion_ids"][b][mask][:, None])[:, 0]
        chunk_sum = chunk_sum - (weights * token_logp)[audited].sum()
        kl_sum = kl_sum + (ref.exp() * (ref - logp)).sum(-1)[~audited].sum()
    mask = batch["completion_mask"].bool()
    num_audited = batch["audited_mask"][mask].sum()
    num_unaudited = mask.sum() - num_audited
    metrics = {"chunk_loss": (chunk_sum / num_audited).item(), "kl/unaudited": (kl_sum / num_unaudited).item()}
    return (chunk_sum + args.beta * kl_sum) / mask.sum(), metrics


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("weights", ["float32_weights", "bf16_weights"])
def test_bf16(tmp_path, device, make_tiny_model, record_property, weights, tied, lora):
    """Autocast with float32 weights, and weights in bf16; the reference is exact for the weights as they are."""
    path = make_tiny_model(seed=5, tie_word_embeddings=tied, dtype="bfloat16")
    trainer = make_trainer(
        tmp_path,
        path,
        bf16=True,
        # Rounding averages out over tokens.
        dataset=questions(32),
        per_device_train_batch_size=32,
        use_cpu=device.type == "cpu",
        peft_config=LoraConfig(**LORA) if lora else None,
        model_init_kwargs={"dtype": "bfloat16"} if weights == "bf16_weights" else None,
    )
    dtype = torch.bfloat16 if weights == "bf16_weights" else torch.float32
    assert trainer.model.get_input_embeddings().weight.dtype == dtype
    scored: list[tuple[dict[str, torch.Tensor], torch.Tensor]] = []
    score = trainer.objective.score

    def keep_scores(model: torch.nn.Module, part: dict[str, torch.Tensor]) -> PolicyScores:
        scores = score(model, part)
        kept = torch.stack([scores.logprobs, scores.entropy]).cpu()
        scored.append(({key: value.cpu() for key, value in part.items()}, kept))
        return scores

    trainer.objective.score = keep_scores
    # Far enough that the KL is larger than its rounding; adapters change less.
    gradient, student, batch = one_step(trainer, device, 0.1 if lora else 0.05)
    student, reference = student.double().eval(), load(path).double().eval()

    errors = []  # of log-probabilities and of entropies
    for part, scores in scored:
        with torch.no_grad():
            rows = dense_rows(student, part, trainer.args.temperature)
        for b, (logp, mask) in enumerate(zip(rows, part["completion_mask"].bool(), strict=True)):
            token_logp = logp.gather(1, part["completion_ids"][b][mask][:, None])[:, 0]
            expected = torch.stack([token_logp, -(logp.exp() * logp).sum(-1)])
            errors.append((scores[:, b, mask] - expected).abs())
    error = torch.cat(errors, dim=1)
    for name, values in zip(("logprobs", "entropy"), error, strict=True):
        hold(record_property, name, values.max().item(), BF16_SCORE)
        hold(record_property, f"{name}/mean", values.mean().item(), BF16_MEAN_SCORE)

    loss, metrics = objective_of_spans(student, reference, batch, trainer.args)
    dense = gradient_of(loss, student)
    assert gradient.keys() == dense.keys()
    assert batch["audited_mask"].any()
    assert metrics["kl/unaudited"] > 1e-3, "the student does not differ from its reference"
    logged = trainer.state.log_history[0]
    hold(record_property, "loss", abs(logged["loss"] / loss.item() - 1), BF16_LOSS)
    hold(record_property, "chunk_loss", abs(logged["chunk_loss"] / metrics["chunk_loss"] - 1), BF16_LOSS)
    kl = metrics["kl/unaudited"]
    hold(record_property, "kl/unaudited", abs(logged["kl/unaudited"] - kl), BF16_LOSS * kl + BF16_KL)
    ours, exact = (torch.cat([values[name].flatten() for name in dense]) for values in (gradient, dense))
    cosine = torch.nn.functional.cosine_similarity(ours, exact, dim=0).item()
    hold(record_property, "gradient/cosine", 1 - cosine, BF16_COSINE)
    hold(record_property, "gradient/norm", abs((ours.norm() / exact.norm()).item() - 1), BF16_NORM)
