# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Memory: nothing as large as tokens times vocabulary is ever made, and tiles change no result."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from trl.kernels import chunked_divergence, chunked_logprob

from benchmarks.memory import RATIO_BOUND, Case, trace, traced
from omniopd_trl.method.loss import anchor_kl
from omniopd_trl.models import lm_head
from omniopd_trl.models.lm_head import LMHead, kl_to_reference, logprobs_of
from omniopd_trl.trainer import objective
from tests.support.training import make_trainer, perturb, questions

TOKENS, VOCABULARY = 40, 4000


class LargestTensor(TorchDispatchMode):
    """Keeps the size and the operator of the largest tensor that any operator returns, backward passes included."""

    def __init__(self):
        super().__init__()
        self.numel, self.source, self.backward_ops = 0, "", 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.backward_ops += "backward" in str(func)
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.numel() > self.numel:
                self.numel, self.source = leaf.numel(), f"{func}: {tuple(leaf.shape)}"
        return result


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles that are far smaller than this test's tokens and vocabulary, as the real ones are than real ones."""
    monkeypatch.setattr(lm_head, "VOCAB_TILE", 64)
    monkeypatch.setattr(lm_head, "TORCH_TOKENS", 8)
    monkeypatch.setattr(chunked_logprob, "TOKEN_CHUNK_SIZE", 8)
    monkeypatch.setattr(chunked_divergence, "TOKEN_CHUNK_SIZE", 8)
    monkeypatch.setattr(chunked_divergence, "VOCAB_CHUNK_SIZE", 64)


def largest_of_a_step(tmp_path, make_tiny_model) -> LargestTensor:
    """One step of the trainer: generation, scoring, audits, reference, loss, backward, optimizer."""
    model = make_tiny_model(
        seed=4,
        vocab_size=VOCABULARY,
        hidden_size=8,
        intermediate_size=16,
        num_attention_heads=1,
        num_key_value_heads=1,
    )
    trainer = make_trainer(tmp_path, model, dataset=questions(1), per_device_train_batch_size=1, prior="reference")
    perturb(trainer.model)
    with LargestTensor() as largest:
        trainer.train()
    assert trainer.batches[0]["completion_mask"].sum() == TOKENS
    assert trainer.batches[0]["audited_mask"].sum() == 20
    assert largest.backward_ops, "the backward pass was not looked at"
    return largest


@pytest.mark.usefixtures("small_tiles")
def test_nothing_of_tokens_times_vocabulary(tmp_path, make_tiny_model):
    """Scoring, loss and backward of one trajectory hold nothing near a tensor of shape (T, V), not even a part of it.

    20 of the 40 tokens are audited and 20 are not, so logits of either part alone would be half of it. The
    largest things are the head and its gradient.
    """
    largest = largest_of_a_step(tmp_path, make_tiny_model)
    assert largest.numel < TOKENS * VOCABULARY / 4, largest.source


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("which", ["logprobs_of", "kl_to_reference"])
def test_dense_logits_would_be_noticed(tmp_path, make_tiny_model, monkeypatch, which):
    """The guard above sees logits of the audited half, and of the other half."""

    def dense_logprobs(hidden, head, targets, temperature):
        logprobs = (hidden @ head.weight.T / temperature).log_softmax(-1)
        entropy = -(logprobs.exp() * logprobs).sum(-1)
        return logprobs.gather(1, targets[:, None])[:, 0], entropy.detach()

    def dense_kl(hidden, head, ref_hidden, ref_head, temperature):
        logits, ref_logits = hidden @ head.weight.T, ref_hidden @ ref_head.weight.T
        kl = anchor_kl(ref_logits / temperature, logits / temperature, torch.ones(len(hidden), dtype=torch.bool))
        return kl[None], kl[None].detach()

    monkeypatch.setattr(objective, which, {"logprobs_of": dense_logprobs, "kl_to_reference": dense_kl}[which])
    assert largest_of_a_step(tmp_path, make_tiny_model).numel >= TOKENS * VOCABULARY / 2


@pytest.mark.usefixtures("small_tiles")
def test_tiles_change_nothing():
    """Log-probabilities, entropies, KL and gradients in many tiles, uneven ones too, are those of dense logits."""
    torch.manual_seed(0)
    hidden, ref_hidden = torch.randn(27, 16, requires_grad=True), torch.randn(27, 16)
    weight, ref_weight = torch.randn(150, 16, requires_grad=True), torch.randn(150, 16)
    targets, scale = torch.randint(150, (27,)), torch.rand(27)
    head, ref_head = LMHead(weight, None, 1.0, None), LMHead(ref_weight, None, 1.0, None)

    logprobs, entropy = logprobs_of(hidden, head, targets, 0.7)
    kl, kl_entropy = kl_to_reference(hidden, head, ref_hidden, ref_head, 0.7)
    # Each token with a weight of its own: a mix-up of tokens would otherwise stay hidden in the sum.
    gradient = torch.autograd.grad((scale * (kl - logprobs)).sum(), [hidden, weight])

    wide, wide_weight = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    p = (wide @ wide_weight.T / 0.7).log_softmax(-1)
    q = (ref_hidden.double() @ ref_weight.double().T / 0.7).log_softmax(-1)
    expected = p.gather(1, targets[:, None])[:, 0]
    expected_kl = (q.exp() * (q - p)).sum(-1)
    expected_gradient = torch.autograd.grad((scale * (expected_kl - expected)).sum(), [wide, wide_weight])

    expected_entropy = -(p.exp() * p).sum(-1)
    pairs = [(logprobs, expected), (kl, expected_kl), (entropy, expected_entropy), (kl_entropy, expected_entropy)]
    for value, dense in [*pairs, *zip(gradient, expected_gradient, strict=True)]:
        torch.testing.assert_close(value.double(), dense, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_peak_at_a_real_width():
    """At T = 4,096, V = 151,936 and a width of 2,048, a quarter of dense, most of it the two gradients of the head.

    Storages are counted at a width of 64, where the peak is that of a student with memory: tiles and two gradients.
    (When tensors have no memory there is a third gradient for a moment, which hides the tiles at greater widths.)
    """
    tiles = []
    for vocabulary in (32_768, 151_936):
        case = Case(4096, vocabulary, 64)
        inputs = 4 * 2 * 64 * (4096 + vocabulary)  # hidden states and heads, of student and reference
        tiles.append(traced(case) - inputs - case.head_bytes)
    assert tiles[1] == pytest.approx(tiles[0], rel=0.01)
    wide = Case(4096, 151_936, 2048)
    assert tiles[1] + wide.head_bytes <= RATIO_BOUND * wide.dense_bytes


@pytest.mark.slow
def test_memory_grows_with_hidden_states():
    """From 2,048 to 20,000 tokens, at two vocabularies."""
    assert trace(2048) == 0
