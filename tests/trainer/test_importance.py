# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""The correction of a sampler that is not the policy, in the trainer."""

import pytest
import torch
from transformers.utils import logging

from omniopd_trl.method import SamplingFilters, kept_log_mass, lowest_kept_logit
from omniopd_trl.models import lm_head
from omniopd_trl.models.lm_head import LMHead, log_kept_mass
from omniopd_trl.teachers import ScriptedTeacher
from omniopd_trl.trainer import objective
from tests.support.objective import check, load
from tests.support.teachers import Remote
from tests.support.training import FOUR_MICRO_BATCHES, RecordingTrainer, make_trainer, questions, trainable

pytestmark = pytest.mark.case("R16")


@pytest.mark.parametrize(
    "settings",
    [
        {"top_p": 0.9},
        {"top_p": 0.6, "temperature": 0.7, "loss_normalization": "components"},
        {"top_k": 5},
        {"min_p": 0.1, "loss_normalization": "sum", **FOUR_MICRO_BATCHES},
        {"top_k": 40, "top_p": 0.8, "min_p": 0.02, **FOUR_MICRO_BATCHES},
    ],
    ids=["top_p", "temperature", "top_k", "min_p", "all"],
)
def test_loss_and_gradient_equal_the_dense_reference(tmp_path, tiny_model_dir, tiny_tokenizer, settings):
    """In float64, with the tokens that the filters keep found one by one."""
    trainer = make_trainer(tmp_path, tiny_model_dir, **settings)
    logged = check(trainer, tiny_model_dir, tiny_tokenizer)
    assert 0.3 < logged["sampling/importance_sampling_ratio/mean"] < 1


class OtherSampler(RecordingTrainer):
    """Completions of the policy, with log-probabilities as if another model had sampled them."""

    def _generate_single_turn(self, *args, **kwargs):
        completion_ids = super()._generate_single_turn(*args, **kwargs)
        if self.model.training and self._sampled is None:
            generator = torch.Generator().manual_seed(self.state.global_step)
            noise = [torch.rand(len(ids), generator=generator).mul(4).sub(6) for ids in completion_ids]
            self._sampled = [[round(value, 6) for value in row.tolist()] for row in noise]
        return completion_ids


def other_sampler(*args, **kwargs):
    trainer = make_trainer(*args, **kwargs)
    trainer.__class__ = OtherSampler
    return trainer


@pytest.mark.parametrize("teacher", [lambda: None, Remote], ids=["local", "overlap"])
def test_known_log_probabilities_of_the_sampler(tmp_path, tiny_model_dir, tiny_tokenizer, teacher):
    """As vLLM reports them: loss and gradient with truncated ratios, through shuffle and split."""
    trainer = other_sampler(tmp_path, tiny_model_dir, teacher=teacher(), **FOUR_MICRO_BATCHES)
    generator = torch.Generator().manual_seed(0)
    sampled = [torch.rand(n, generator=generator).mul(4).sub(6).tolist() for n in (40, 31, 5, 17, 9, 40, 24, 1)]
    logged = check(trainer, tiny_model_dir, tiny_tokenizer, sampled=sampled)
    assert 0 < logged["sampling/importance_sampling_ratio/mean"] < 3
    assert logged["sampling/sampling_logp_difference/mean"] > 0.1


def test_a_replayed_step_has_the_weights_of_the_first(tmp_path, tiny_model_dir):
    """The journal keeps the log-probabilities of the sampler, since a replay generates nothing."""
    settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "dataset": questions(16)}
    first = other_sampler(tmp_path, tiny_model_dir, learning_rate=0.05, **settings)
    first.train()
    again = make_trainer(tmp_path, tiny_model_dir, learning_rate=0.05, **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    after, expected = trainable(again.model), trainable(first.model)
    assert all(torch.equal(after[name], expected[name]) for name in expected)


def test_the_correction_can_be_switched_off(tmp_path, tiny_model_dir, tiny_tokenizer):
    """Eq. 8 as it is, whatever sampled."""
    check(
        other_sampler(tmp_path / "other", tiny_model_dir, importance_sampling_correction=False),
        tiny_model_dir,
        tiny_tokenizer,
    )


def test_on_policy_nothing_is_computed(tmp_path, tiny_model_dir, monkeypatch):
    """The path is skipped, and the step is the same bit by bit."""
    monkeypatch.setattr(objective, "log_kept_mass", None)
    steps = []
    for name, corrects in (("on", True), ("off", False)):
        trainer = make_trainer(
            tmp_path / name, tiny_model_dir, top_p=1.0, top_k=0, importance_sampling_correction=corrects
        )
        trainer.train()
        assert "importance" not in trainer.batches[0]
        steps.append(trainable(trainer.model))
    assert all(torch.equal(steps[0][name], steps[1][name]) for name in steps[0])


def test_drift_with_a_teacher_without_information(tmp_path, tiny_model_dir, tiny_tokenizer):
    """top_p=0.9 and a constant similarity: the distance from the reference falls by more than ten times."""

    def distance(**settings):
        model = load(tiny_model_dir)
        # Few parameters: the noise of the gradient would hide the drift.
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name == "model.norm.weight")
        trainer = make_trainer(
            tmp_path / str(settings),
            model,
            processing_class=tiny_tokenizer,
            teacher=ScriptedTeacher(lambda prefix, index: "x"),
            similarity=lambda chunk, rollout: 0.5,
            dataset=questions(64),
            prior_strength=0.0,
            num_rollouts=1,
            max_completion_length=16,
            num_chunks=1,
            chunk_length=16,
            per_device_train_batch_size=64,
            max_steps=10,
            learning_rate=2.0,
            top_p=0.9,
            beta=0.0,
            save_audits=False,
            **settings,
        )
        trainer.__class__ = RecordingTrainer.__base__  # completions are not cut
        trainer.train()
        reference = load(tiny_model_dir)
        ids = torch.randint(3, 300, (16, 30), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            before, after = reference(ids).logits.log_softmax(-1), trainer.model.eval()(ids).logits.log_softmax(-1)
        return (before.exp() * (before - after)).sum(-1).mean().item()

    assert distance() < distance(importance_sampling_correction=False) / 10


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("blocks", [1, 4])
def test_the_kept_mass_of_the_head(softcap, has_bias, blocks, monkeypatch):
    """Value and all gradients equal those of dense logits in float64, in one block or several."""
    generator = torch.Generator().manual_seed(1)
    tokens, width, vocabulary = 12, 8, 50
    if blocks > 1:
        monkeypatch.setattr(lm_head, "_BLOCK_LOGITS", tokens // blocks * vocabulary)
    hidden = torch.randn(tokens, width, generator=generator)
    weight = torch.randn(vocabulary, width, generator=generator)
    bias = torch.randn(vocabulary, generator=generator) if has_bias else None
    given = [x.requires_grad_() if x is not None else None for x in (hidden, weight, bias)]
    dense = [x.detach().double().requires_grad_() if x is not None else None for x in given]
    filters, scale, temperature = SamplingFilters(top_k=30, top_p=0.8), 0.7, 1.3
    upstream = torch.randn(tokens, generator=generator)

    product = dense[0] @ dense[1].T + (0 if bias is None else dense[2])
    logits = product * scale
    logits = (logits if softcap is None else softcap * torch.tanh(logits / softcap)) / temperature
    lowest = lowest_kept_logit(logits.detach(), filters)
    expected = kept_log_mass(logits, lowest)
    targets = logits.argmax(-1)
    (expected * upstream).sum().backward()

    head = LMHead(given[1], given[2], scale, softcap)
    mass = log_kept_mass(given[0], head, targets, temperature, filters)
    (mass * upstream).sum().backward()
    torch.testing.assert_close(mass.double(), expected, atol=1e-5, rtol=1e-4)
    for ours, reference in zip(given, dense, strict=True):
        if ours is not None:
            torch.testing.assert_close(ours.grad.double(), reference.grad, atol=2e-5, rtol=1e-3)


def test_no_tokens_and_sampled_tokens_outside():
    """A batch without audited tokens works; a sampled token counts as kept even below the threshold."""
    weight = torch.randn(20, 4, generator=torch.Generator().manual_seed(2), requires_grad=True)
    head = LMHead(weight, None, 1.0, None)
    hidden = torch.randn(3, 4, generator=torch.Generator().manual_seed(3))
    log_kept_mass(hidden[:0], head, torch.empty(0, dtype=torch.long), 1.0, SamplingFilters(top_k=1)).sum().backward()
    assert weight.grad.abs().max() == 0
    least = (hidden @ weight.T).argmin(-1)
    mass = log_kept_mass(hidden, head, least, 1.0, SamplingFilters(top_k=1))
    torch.testing.assert_close(mass, torch.zeros(3), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"top_p": 0.9}, "The chunk loss is corrected for it"),
        ({"top_k": 3, "min_p": 0.1}, "The chunk loss is corrected for it"),
        ({"top_p": 0.9, "importance_sampling_correction": False}, "Nothing corrects this"),
        ({"top_p": 0.9, "repetition_penalty": 1.1}, "Nothing corrects this"),
        ({"generation_kwargs": {"typical_p": 0.9}}, "Nothing corrects this"),
    ],
)
def test_the_warning_names_the_remedy(tmp_path, caplog, settings, words):
    """Whether the loss is corrected, and the baseline."""
    logging.enable_propagation()
    from omniopd_trl import OmniOPDConfig

    OmniOPDConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", **settings)
    assert words in caplog.text
    assert "posterior_baseline='batch'" in caplog.text
