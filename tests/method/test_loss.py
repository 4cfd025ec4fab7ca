# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Eq. 8: the chunk loss, the anchor, and how they are combined."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from omniopd_trl.errors import ConfigError
from omniopd_trl.method.loss import NORMALIZATIONS, anchor_kl, chunk_loss, combine

INF, NAN = float("inf"), float("nan")


def random_logits(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).mul(2).to(dtype)


# ---- chunk loss -----------------------------------------------------------------------------------------------------


def test_chunk_loss_constants() -> None:
    """Two chunks in two sequences by hand: 0.5 * (1 + 2) + 0.25 * (4 + 8) = 4.5."""
    logprobs = torch.tensor([[-1.0, -2.0, -100.0, -100.0], [-100.0, -4.0, -8.0, -100.0]])
    weights = torch.tensor([[0.5, 0.5, 0.0, 0.0], [0.0, 0.25, 0.25, 0.0]])
    torch.testing.assert_close(chunk_loss(logprobs, weights), torch.tensor(4.5))


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 3), st.integers(0, 9), st.integers(0, 1000))
def test_chunk_loss_matches_a_loop(batch: int, length: int, seed: int) -> None:
    """The double sum of Eq. 8, token by token; weights may be negative, as with a baseline."""
    logprobs = -random_logits(seed, batch, length).abs()
    weights = random_logits(seed + 1, batch, length)
    expected = -sum(weights[b, t].item() * logprobs[b, t].item() for b in range(batch) for t in range(length))
    torch.testing.assert_close(chunk_loss(logprobs, weights), torch.tensor(expected, dtype=torch.float64))


def test_chunk_loss_gradient_is_minus_the_weight() -> None:
    """And the weight itself has none: the teacher's support is a constant."""
    logprobs = torch.tensor([[-1.0, -2.0, -3.0]], requires_grad=True)
    weights = torch.tensor([[0.25, 0.0, -0.5]], requires_grad=True)
    chunk_loss(logprobs, weights).backward()
    torch.testing.assert_close(logprobs.grad, torch.tensor([[-0.25, 0.0, 0.5]]))
    assert weights.grad is None


@pytest.mark.parametrize("poison", [NAN, -INF, INF])
def test_chunk_loss_ignores_what_is_not_audited(poison: float) -> None:
    """Padding may hold anything: neither the sum nor the gradient sees it."""
    logprobs = torch.tensor([[-1.0, poison]], requires_grad=True)
    loss = chunk_loss(logprobs, torch.tensor([[0.5, 0.0]]))
    loss.backward()
    assert loss.item() == 0.5
    torch.testing.assert_close(logprobs.grad, torch.tensor([[-0.5, 0.0]]))


def test_chunk_loss_shows_nan_where_it_counts() -> None:
    """An audited NaN is not hidden."""
    assert math.isnan(chunk_loss(torch.tensor([[NAN]]), torch.tensor([[0.5]])))


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_chunk_loss_adds_in_float32_or_better(dtype: torch.dtype, expected: torch.dtype) -> None:
    """1,000 times 1 is 1,000, where a bfloat16 sum would stop at 256."""
    loss = chunk_loss(-torch.ones(1, 1000, dtype=dtype), torch.ones(1, 1000, dtype=torch.float32))
    assert (loss.dtype, loss.item()) == (expected, 1000.0)


def test_chunk_loss_shapes() -> None:
    """Shapes that would broadcast to something else are refused."""
    with pytest.raises(ConfigError, match=r"`logprobs` has shape \(2, 3\) and `weights` \(2, 1\)"):
        chunk_loss(torch.zeros(2, 3), torch.zeros(2, 1))


# ---- anchor ---------------------------------------------------------------------------------------------------------


def test_anchor_constants() -> None:
    """KL(ref || theta), in this direction, by hand."""
    ref = torch.tensor([[0.75, 0.25], [0.5, 0.5]]).log()
    theta = torch.tensor([[0.5, 0.5], [0.9, 0.1]]).log()
    first = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)  # 0.1308
    second = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)  # 0.5108, the other direction is 0.3681
    for mask, expected in (([1, 0], first), ([0, 1], second), ([1, 1], first + second), ([0, 0], 0.0)):
        torch.testing.assert_close(anchor_kl(ref, theta, torch.tensor(mask)), torch.tensor(expected))


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 7), st.integers(0, 1000))
def test_anchor_matches_torch_distributions(batch: int, length: int, vocab: int, seed: int) -> None:
    """The sum over the mask of the divergences that torch computes, and never negative."""
    ref, theta = random_logits(seed, batch, length, vocab), random_logits(seed + 1, batch, length, vocab)
    mask = random_logits(seed + 2, batch, length) > 0
    pairs = torch.distributions.Categorical(logits=ref), torch.distributions.Categorical(logits=theta)
    expected = (torch.distributions.kl_divergence(*pairs) * mask).sum()
    result = anchor_kl(ref, theta, mask)
    torch.testing.assert_close(result, expected)
    assert result >= -1e-12


def test_anchor_gradient() -> None:
    """The gradient is `pi_theta - pi_ref` on the mask, checked by finite differences too; the reference gets none."""
    ref, theta = random_logits(0, 2, 3, 5).requires_grad_(), random_logits(1, 2, 3, 5).requires_grad_()
    mask = torch.tensor([[True, False, True], [False, True, True]])
    anchor_kl(ref, theta, mask).backward()
    expected = (theta.softmax(-1) - ref.softmax(-1)) * mask[..., None]
    torch.testing.assert_close(theta.grad, expected.detach())
    assert ref.grad is None
    torch.autograd.gradcheck(lambda logits: anchor_kl(ref, logits, mask), (theta.detach().requires_grad_(),))


def test_anchor_of_itself_is_zero() -> None:
    """At the reference the divergence and its gradient vanish."""
    theta = random_logits(0, 4, 9, dtype=torch.float32).requires_grad_()
    kl = anchor_kl(theta, theta, torch.ones(4))
    kl.backward()
    assert kl.item() == 0.0
    torch.testing.assert_close(theta.grad, torch.zeros(4, 9), atol=1e-6, rtol=0)


def test_anchor_with_impossible_tokens() -> None:
    """What the reference cannot write costs nothing; what only the student cannot write costs infinitely much."""
    ref = torch.tensor([[0.0, 0.0, -INF]])
    mask = torch.tensor([True])
    for theta_values in ([0.0, 0.0, -INF], [0.0, 0.0, 0.0]):
        theta = torch.tensor([theta_values], requires_grad=True)
        kl = anchor_kl(ref, theta, mask)
        kl.backward()
        expected = math.log((2 if theta_values[2] == -INF else 3) / 2)
        torch.testing.assert_close(kl, torch.tensor(expected))
        assert theta.grad is not None
        assert torch.isfinite(theta.grad).all()
    assert anchor_kl(torch.zeros(1, 3), torch.tensor([[0.0, 0.0, -INF]]), mask) == INF


def test_anchor_ignores_what_is_masked() -> None:
    """NaN in padding, of either model, reaches neither the sum nor the gradient."""
    ref, theta = torch.zeros(2, 3), torch.tensor([[1.0, 0.0, 0.0], [NAN, INF, 0.0]])
    ref[1] = NAN
    theta.requires_grad_()
    kl = anchor_kl(ref, theta, torch.tensor([1, 0]))
    kl.backward()
    assert torch.isfinite(kl)
    assert theta.grad is not None
    assert torch.isfinite(theta.grad).all()


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_anchor_dtype(dtype: torch.dtype, expected: torch.dtype) -> None:
    """Float64 is kept, everything else is computed in float32."""
    assert anchor_kl(torch.zeros(2, 3, dtype=dtype), torch.ones(2, 3, dtype=dtype), torch.ones(2)).dtype == expected


def test_anchor_shapes() -> None:
    """Two vocabularies, or a mask of other tokens, are refused."""
    with pytest.raises(ConfigError, match="Pass the same tokens to all three"):
        anchor_kl(torch.zeros(2, 3), torch.zeros(2, 4), torch.ones(2))
    with pytest.raises(ConfigError, match="Pass the same tokens to all three"):
        anchor_kl(torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(2, 3))


# ---- combination ----------------------------------------------------------------------------------------------------

COUNTS = {"num_tokens": 20, "num_sequences": 4, "num_audited": 8, "num_unaudited": 12}


@pytest.mark.parametrize(
    ("normalization", "expected"),
    [
        ("tokens", (6.0 + 0.5 * 24.0) / 20),
        ("sum", (6.0 + 0.5 * 24.0) / 4),
        ("components", 6.0 / 8 + 0.5 * 24.0 / 12),
    ],
)
def test_combine_constants(normalization: str, expected: float) -> None:
    """Each normalization by hand, with counts as numbers and as tensors."""
    sums = torch.tensor(6.0), torch.tensor(24.0)
    counts = {name: torch.tensor(count) for name, count in COUNTS.items()}
    torch.testing.assert_close(combine(*sums, beta=0.5, normalization=normalization, **COUNTS), torch.tensor(expected))
    torch.testing.assert_close(combine(*sums, beta=0.5, normalization=normalization, **counts), torch.tensor(expected))


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("as_tensor", [False, True])
def test_combine_of_nothing_is_zero(normalization: str, as_tensor: bool) -> None:
    """An empty batch, or one without audited or un-audited tokens, is 0 and not 0 / 0; its gradient is finite."""
    chunk_sum = torch.tensor(0.0, requires_grad=True)
    counts = {name: torch.tensor(0) if as_tensor else 0 for name in COUNTS}
    loss = combine(chunk_sum, 0.0, beta=0.1, normalization=normalization, **counts)
    loss.backward()
    assert loss.item() == 0.0
    assert chunk_sum.grad == 1.0


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("micro_batches", [1, 2, 4, 8])
def test_gradient_accumulation_is_exact(normalization: str, micro_batches: int) -> None:
    """With global counts, the gradients of micro-batches of unequal lengths add up to those of one large batch."""
    length = 12
    real = torch.arange(length) < torch.tensor([12, 3, 7, 1, 12, 5, 9, 2])[:, None]
    weights = random_logits(1, 8, length).sigmoid() * (random_logits(2, 8, length) > 0) * real
    unaudited = real & (weights == 0)
    ref, targets = random_logits(3, 8, length, 6), torch.randint(6, (8, length, 1))
    counts = {
        "num_tokens": real.sum(),
        "num_sequences": 8,
        "num_audited": (weights != 0).sum(),
        "num_unaudited": unaudited.sum(),
    }

    def gradient(parts: int) -> Tensor:
        theta = random_logits(4, 8, length, 6).requires_grad_()
        for rows in torch.arange(8).chunk(parts):
            logprobs = theta[rows].log_softmax(-1).gather(-1, targets[rows]).squeeze(-1)
            kl = anchor_kl(ref[rows], theta[rows], unaudited[rows])
            chunk_sum = chunk_loss(logprobs, weights[rows])
            combine(chunk_sum, kl, beta=0.1, normalization=normalization, **counts).backward()
        assert theta.grad is not None
        return theta.grad

    torch.testing.assert_close(gradient(micro_batches), gradient(1), atol=1e-12, rtol=1e-10)


def test_normalizations_point_the_same_way() -> None:
    """`tokens` and `sum` are Eq. 8 times a constant; `components` changes the ratio of the terms."""
    losses = {
        name: combine(torch.tensor(6.0), 24.0, beta=0.5, normalization=name, **COUNTS) for name in NORMALIZATIONS
    }
    assert losses["tokens"] * 20 == losses["sum"] * 4 == 6.0 + 0.5 * 24.0
    # Multiplied by the audited tokens, `components` is Eq. 8 with `beta * num_audited / num_unaudited`.
    assert losses["components"] * 8 == 6.0 + 0.5 * (8 / 12) * 24.0


def test_unknown_normalization() -> None:
    """The message lists the choices."""
    with pytest.raises(ConfigError, match="`normalization` is 'mean', but it must be one of tokens, sum, components"):
        combine(torch.tensor(0.0), 0.0, beta=0.1, normalization="mean", **COUNTS)
