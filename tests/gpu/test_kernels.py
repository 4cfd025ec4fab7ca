# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Values and gradients of the LM head projections, against a dense float64 reference on the same device."""

from dataclasses import dataclass, replace

import pytest
import torch

from omniopd_trl.models.lm_head import LMHead, kl_to_reference, logprobs_of
from tests.gpu.bounds import hold, largest, relative

pytestmark = pytest.mark.gpu

# Float32: TF32 is off by default. A logit sums up to 2,048 products, and a log-probability subtracts numbers of some
# tens of nats, each with a relative error of 6e-8.
FLOAT32_VALUE = 1e-4
# A relative error of the norm. The gradient of the head sums up to 20,000 tokens.
FLOAT32_GRADIENT = 1e-5
# bf16: the divergence's kernel keeps logits in float32, so its values are as exact as those of float32 inputs,
# but for the order in which tensor cores add.
BF16_DIVERGENCE = 1e-3
# The log-probabilities' kernel rounds the logits to bf16, by at most 2^-8 of a logit. To first order a log-probability
# then moves by at most twice that (its target's logit and the normalizer), and an entropy H by that times the sum of
# p |log p + H| over the vocabulary.
BF16_ROUNDING = 2.0**-8
# Gradients pass through a tile in bf16, and are rounded to bf16 at the end.
BF16_GRADIENT = 2e-2


@dataclass(frozen=True)
class Case:
    tokens: int
    width: int
    vocabulary: int
    dtype: torch.dtype = torch.float32
    softcap: float | None = None
    scale: float = 1.0
    temperature: float = 1.0
    bias: bool = False
    reference_width: int | None = None  # None: the head of the student, as with LoRA


BF16 = torch.bfloat16
# Tiles have 4,096 tokens, and 4,096 or 32,768 entries of the vocabulary: one more, one less, and neither.
CASES = (
    Case(1, 96, 300),
    Case(1, 2048, 151_936, BF16),
    Case(7, 1000, 32_769, temperature=0.7),
    Case(7, 96, 50_257, BF16, bias=True),
    Case(4095, 96, 32_769, softcap=3.0, scale=0.5),
    Case(4095, 1000, 300, BF16, temperature=0.7),
    Case(4097, 1000, 50_257, bias=True, reference_width=96),
    Case(4097, 2048, 32_769, BF16, softcap=3.0, scale=0.5, temperature=0.7, bias=True),
    Case(4097, 96, 151_936, temperature=0.7, softcap=3.0),
    Case(4096, 2048, 32_768, BF16, reference_width=1000),
    Case(20_000, 96, 300, bias=True, temperature=0.7),
    Case(20_000, 1000, 50_257, BF16, temperature=0.7, reference_width=2048),
    Case(20_000, 96, 32_769, scale=2.0),
    Case(20_000, 2048, 151_936, BF16),
)
# For a dry run. There the kernels' torch form gets 256 tokens at a time.
SMALL = {
    **{1: 1, 7: 7, 4095: 255, 4096: 256, 4097: 257, 20_000: 600},
    **{96: 24, 1000: 50, 2048: 64},
    **{300: 300, 32_768: 4096, 32_769: 4097, 50_257: 5003, 151_936: 9001},
}


@pytest.fixture(params=CASES, ids=str)
def case(request, device) -> Case:
    case = request.param
    if device.type == "cuda":
        return case
    small = {name: SMALL[getattr(case, name)] for name in ("tokens", "width", "vocabulary")}
    return replace(case, **small, reference_width=SMALL.get(case.reference_width))


@pytest.fixture(autouse=True)
def free_memory(device):
    """Give back what a large case used: other processes may test on the same card."""
    yield
    if device.type == "cuda":
        torch.cuda.empty_cache()


def states_and_head(
    case: Case, width: int, generator: torch.Generator, trainable: bool
) -> tuple[torch.Tensor, LMHead]:
    """Hidden states and a head whose logits have a standard deviation of 2."""

    def normal(*shape: int, deviation: float = 1.0) -> torch.Tensor:
        values = torch.randn(shape, generator=generator, device=generator.device) * deviation
        return values.to(case.dtype).requires_grad_(trainable)

    hidden, weight = normal(case.tokens, width), normal(case.vocabulary, width, deviation=2 * width**-0.5)
    bias = normal(case.vocabulary, deviation=0.5) if case.bias else None
    return hidden, LMHead(weight, bias, case.scale, case.softcap)


def token_weights(case: Case, generator: torch.Generator) -> torch.Tensor:
    """Another weight for each token, so tokens that are mixed up show."""
    return torch.rand(case.tokens, generator=generator, device=generator.device) + 0.5


class Dense:
    """Whole logits in float64, for some rows at a time."""

    def __init__(self, hidden: torch.Tensor, head: LMHead):
        self.head = head
        self.hidden = hidden.detach().double().requires_grad_(hidden.requires_grad)
        self.weight = head.weight.detach().double().requires_grad_(head.weight.requires_grad)
        self.bias = None
        if head.bias is not None:
            self.bias = head.bias.detach().double().requires_grad_(head.bias.requires_grad)
        self.largest = 0.0  # of all logits, as they come out of the projection

    def log_softmax(self, rows: slice, temperature: float) -> torch.Tensor:
        logits = self.hidden[rows] @ self.weight.T
        if self.bias is not None:
            logits = logits + self.bias
        self.largest = max(self.largest, logits.detach().abs().max().item())
        logits = logits * self.head.logit_scale
        if self.head.softcap is not None:
            logits = self.head.softcap * torch.tanh(logits / self.head.softcap)
        return (logits / temperature).log_softmax(-1)


def row_slices(case: Case) -> list[slice]:
    """At most half a gigabyte of float64 logits at a time."""
    rows = max(1, 2**26 // case.vocabulary)
    return [slice(start, start + rows) for start in range(0, case.tokens, rows)]


def hold_gradients(record_property, name: str, hidden: torch.Tensor, head: LMHead, dense: Dense) -> None:
    bound = FLOAT32_GRADIENT if hidden.dtype == torch.float32 else BF16_GRADIENT
    hold(record_property, f"{name}/grad_hidden", relative(hidden.grad, dense.hidden.grad), bound)
    hold(record_property, f"{name}/grad_weight", relative(head.weight.grad, dense.weight.grad), bound)
    if head.bias is not None:
        hold(record_property, f"{name}/grad_bias", relative(head.bias.grad, dense.bias.grad), bound)


def test_logprobs(case, device, record_property):
    """Log-probabilities, entropies, and the gradient of a weighted sum of log-probabilities."""
    generator = torch.Generator(device).manual_seed(0)
    hidden, head = states_and_head(case, case.width, generator, trainable=True)
    targets = torch.randint(case.vocabulary, (case.tokens,), generator=generator, device=device)
    targets[0], targets[-1] = 0, case.vocabulary - 1
    weights = token_weights(case, generator)

    dense = Dense(hidden, head)
    expected, expected_entropy, amplification = [], [], 1.0
    for rows in row_slices(case):
        logp = dense.log_softmax(rows, case.temperature)
        picked = logp.gather(1, targets[rows, None])[:, 0]
        (weights[rows].double() * picked).sum().backward()
        expected.append(picked.detach())
        logp = logp.detach()
        expected_entropy.append(-(logp.exp() * logp).sum(-1))
        slope = (logp.exp() * (logp + expected_entropy[-1][:, None]).abs()).sum(-1)
        amplification = max(amplification, slope.max().item())
        del logp, picked

    logprobs, entropy = logprobs_of(hidden, head, targets, case.temperature)
    (weights * logprobs).sum().backward()
    assert logprobs.dtype == entropy.dtype == torch.float32
    bounds = FLOAT32_VALUE, FLOAT32_VALUE
    if case.dtype == BF16:
        roundings = 1 + case.bias  # which is added to what is rounded
        error = roundings * BF16_ROUNDING * dense.largest * case.scale / case.temperature
        bounds = 2 * error, amplification * error
    hold(record_property, "logprobs", largest(logprobs, torch.cat(expected)), bounds[0])
    hold(record_property, "entropy", largest(entropy, torch.cat(expected_entropy)), bounds[1])
    hold_gradients(record_property, "logprobs", hidden, head, dense)


def test_kl(case, device, record_property):
    """The divergence from the reference, the entropy, and the gradient of a weighted sum of the divergence."""
    generator = torch.Generator(device).manual_seed(1)
    hidden, head = states_and_head(case, case.width, generator, trainable=True)
    if case.reference_width is None:
        noise = torch.randn(hidden.shape, generator=generator, device=device)
        ref_hidden = (hidden.detach() + 0.3 * noise).to(case.dtype)
        ref_head = replace(head, weight=head.weight.detach(), bias=None if head.bias is None else head.bias.detach())
    else:
        ref_hidden, ref_head = states_and_head(case, case.reference_width, generator, trainable=False)
        # Another scale than the student's.
        ref_head = replace(ref_head, logit_scale=0.75)
    weights = token_weights(case, generator)

    dense, reference = Dense(hidden, head), Dense(ref_hidden, ref_head)
    expected, expected_entropy = [], []
    for rows in row_slices(case):
        logp = dense.log_softmax(rows, case.temperature)
        with torch.no_grad():
            ref = reference.log_softmax(rows, case.temperature)
        kl = (ref.exp() * (ref - logp)).sum(-1)
        (weights[rows].double() * kl).sum().backward()
        expected.append(kl.detach())
        expected_entropy.append(-(logp.detach().exp() * logp.detach()).sum(-1))
        del logp, ref, kl

    divergence, entropy = kl_to_reference(hidden, head, ref_hidden, ref_head, case.temperature)
    (weights * divergence).sum().backward()
    assert divergence.dtype == entropy.dtype == torch.float32
    assert torch.cat(expected).mean() > 1e-3, "the reference does not differ from the student"
    bound = FLOAT32_VALUE if case.dtype == torch.float32 else BF16_DIVERGENCE
    hold(record_property, "kl", largest(divergence, torch.cat(expected)), bound)
    hold(record_property, "entropy", largest(entropy, torch.cat(expected_entropy)), bound)
    hold_gradients(record_property, "kl", hidden, head, dense)
