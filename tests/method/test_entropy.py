# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Eq. 6: the entropy of the distribution that a token was sampled from."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from omniopd_trl.errors import ConfigError
from omniopd_trl.method import entropy as entropy_module
from omniopd_trl.method.entropy import token_entropy

INF = float("inf")


def reference(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """One row and one token at a time, in Python floats."""
    rows = []
    for row in logits.reshape(-1, logits.shape[-1]).double().tolist():
        top = max(row)
        weights = [math.exp((logit - top) / temperature) for logit in row]
        probabilities = [weight / sum(weights) for weight in weights]
        rows.append(-sum(p * math.log(p) for p in probabilities if p > 0))
    return torch.tensor(rows).reshape(logits.shape[:-1])


@pytest.mark.parametrize(
    ("logits", "temperature", "nats"),
    [
        ([0.0, 0.0, 0.0, 0.0], 1.0, math.log(4)),
        ([math.log(3), 0.0], 1.0, 0.5623351446),  # probabilities 3/4, 1/4
        ([math.log(9), 0.0], 2.0, 0.5623351446),  # sqrt(9) = 3
        ([7.0], 1.0, 0.0),
        ([100.0, 0.0], 1.0, 0.0),
        ([math.log(2), math.log(1), math.log(1), -INF], 1.0, 1.0397207708),  # 1/2, 1/4, 1/4, 0
    ],
)
def test_constants(logits: list[float], temperature: float, nats: float) -> None:
    """Entropies computed by hand, in nats."""
    torch.testing.assert_close(token_entropy(torch.tensor(logits), temperature), torch.tensor(nats))


@settings(deadline=None, max_examples=60)
@given(
    hnp.arrays("float64", hnp.array_shapes(min_dims=1, max_dims=3, max_side=5), elements=st.floats(-50, 50)),
    st.floats(0.1, 5),
)
def test_matches_float64_reference(logits: object, temperature: float) -> None:
    """Any shape and temperature agree with a slow reference."""
    tensor = torch.as_tensor(logits)
    torch.testing.assert_close(
        token_entropy(tensor, temperature), reference(tensor, temperature).float(), atol=2e-6, rtol=2e-6
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64])
def test_returns_float32(dtype: torch.dtype) -> None:
    """Every dtype is computed in at least float32, of the values it holds, and comes back as float32."""
    logits = (torch.randn(3, 5, 17, generator=torch.Generator().manual_seed(0)) * 4).to(dtype)
    result = token_entropy(logits, 0.7)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, reference(logits, 0.7).float(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", [(5,), (2, 5), (2, 3, 5), (0, 5), (2, 0, 5)])
def test_shape(shape: tuple[int, ...]) -> None:
    """The vocabulary dimension goes, the others stay, also when there are no tokens."""
    assert token_entropy(torch.zeros(shape)).shape == shape[:-1]


def test_impossible_tokens_add_nothing() -> None:
    """Logits of -inf give the entropy over the other tokens, and finite gradients."""
    logits = torch.tensor([[1.0, 2.0, -INF, 0.5, -INF]], requires_grad=True)
    torch.testing.assert_close(token_entropy(logits), token_entropy(torch.tensor([[1.0, 2.0, 0.5]])))
    token_entropy(logits).sum().backward()
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("row", [[float("nan"), 0.0], [-INF, -INF], [INF, 0.0]])
def test_a_row_that_is_no_distribution_is_nan(row: list[float]) -> None:
    """It is NaN, and only it, so the caller can stop."""
    result = token_entropy(torch.tensor([row, [0.0, 0.0]]))
    assert math.isnan(result[0])
    torch.testing.assert_close(result[1], torch.tensor(math.log(2)))


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1.0, 1e6])
def test_extremes_stay_inside_the_bounds(temperature: float) -> None:
    """Huge logits and extreme temperatures neither overflow nor leave [0, log V]."""
    logits = torch.tensor([[1e30, -1e30, 3.0], [88.0, 89.0, -1e4], [1e-30, 0.0, -1e-30]])
    result = token_entropy(logits, temperature)
    assert ((result >= 0) & (result <= math.log(3) + 1e-6)).all()


def test_blocks_bound_the_float32_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """No block holds more logits than the limit, and the blocks give what one piece gives."""
    logits = torch.randn(2, 37, 11, dtype=torch.bfloat16)
    whole = token_entropy(logits)
    sizes: list[int] = []
    one_block = entropy_module._entropy

    def spy(block: torch.Tensor, temperature: float) -> torch.Tensor:
        sizes.append(block.numel())
        return one_block(block, temperature)

    monkeypatch.setattr(entropy_module, "_BLOCK_LOGITS", 40)
    monkeypatch.setattr(entropy_module, "_entropy", spy)
    torch.testing.assert_close(token_entropy(logits), whole, atol=0, rtol=0)
    assert max(sizes) <= 40
    assert sum(sizes) == logits.numel()


@pytest.mark.parametrize("temperature", [0.0, -1.0, INF, float("nan")])
def test_bad_temperature(temperature: float) -> None:
    """A temperature that cannot divide is named."""
    with pytest.raises(ConfigError, match="`temperature` is"):
        token_entropy(torch.zeros(2), temperature)


@pytest.mark.parametrize("shape", [(), (3, 0)])
def test_bad_shape(shape: tuple[int, ...]) -> None:
    """Logits without a vocabulary are refused."""
    with pytest.raises(ConfigError, match="last dimension must be the vocabulary"):
        token_entropy(torch.zeros(shape))
