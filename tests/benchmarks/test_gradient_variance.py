# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""The moments of gradients from inner products, against the gradients themselves."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.gradient_variance import (
    BASELINES,
    BRANCHES_OF_A_DRAW,
    HELD_OUT,
    LEAVE_ONE_OUT,
    NUM_BRANCHES,
    NUM_DRAWS,
    ROLLOUTS_OF_A_DRAW,
    Forks,
    drawn_weights,
    expected_weights,
    moments,
    score,
)
from omniopd_trl.demo import asset_path

CHOICES = "abc"
TOKENS = 7


@pytest.fixture(scope="module")
def world():
    """Five forks with a choice of three one-token texts each, and the logits that are trained."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    logprobs = logits.log_softmax(-1).flatten()
    scores = torch.stack([torch.autograd.grad(x, logits, retain_graph=True)[0].flatten() for x in logprobs]).numpy()
    drawn = torch.multinomial(logits.detach().exp(), NUM_BRANCHES, True, generator=generator)
    rng = np.random.default_rng(0)
    forks = Forks(
        trajectories=np.array([0, 0, 1, 1, 2]),
        branches=(drawn + 3 * torch.arange(5)[:, None]).numpy(),
        fork=np.repeat(np.arange(5), 3),
        texts=list(CHOICES) * 5,
        prefixes=[],
        rollouts=[list(rng.choice(list(CHOICES), NUM_DRAWS * ROLLOUTS_OF_A_DRAW + HELD_OUT)) for _ in range(5)],
        logprobs=logprobs.detach().numpy(),
        priors=logprobs.detach().exp().numpy(),
        gram=scores @ scores.T,
        num_tokens=TOKENS,
    )
    return forks, logits, scores


def test_the_expected_gradient_is_that_of_the_expected_reward(world):
    forks, logits, scores = world
    rewards = np.random.default_rng(1).random(15)
    expected = (logits.softmax(-1).flatten() * torch.from_numpy(rewards)).sum() / TOKENS
    (gradient,) = torch.autograd.grad(expected, logits, retain_graph=True)
    np.testing.assert_allclose(expected_weights(forks, rewards) @ scores, gradient.flatten().numpy(), atol=1e-12)


@pytest.mark.parametrize("same_chunks", [True, False])
@pytest.mark.parametrize("form", [*BASELINES, LEAVE_ONE_OUT])
def test_each_draw_has_the_weights_of_the_method(world, form, same_chunks):
    """Written out for each draw: its chunks, its rollouts, and their weights."""
    forks, _, _ = world
    found = drawn_weights(forks, forks.similarities("exact"), form, same_chunks)

    def similarity(row, draw):
        rollouts = forks.rollouts[forks.fork[row]][ROLLOUTS_OF_A_DRAW * draw : ROLLOUTS_OF_A_DRAW * (draw + 1)]
        return sum(rollout == forks.texts[row] for rollout in rollouts) / ROLLOUTS_OF_A_DRAW

    def posteriors(draw):
        rows = forks.branches[:, 0 if same_chunks else draw]
        return rows, np.array([(4 * similarity(row, draw) + forks.priors[row]) / 5 for row in rows])

    for draw, weights in enumerate(found):
        wanted = np.zeros(15)
        if form == LEAVE_ONE_OUT:
            first = 0 if same_chunks else BRANCHES_OF_A_DRAW * draw
            for branches in forks.branches[:, first : first + BRANCHES_OF_A_DRAW]:
                s = [similarity(row, draw) for row in branches]
                for j, row in enumerate(branches):
                    wanted[row] += (s[j] - (sum(s) - s[j]) / 7) / 8
        else:
            rows, pi = posteriors(draw)
            others = [posteriors(other)[1].mean() for other in range(NUM_DRAWS) if other != draw]
            wanted[rows] = {
                "none": pi,
                "batch": pi - pi.mean(),
                "moving_average": pi - np.mean(others),
                "trajectory": [pi[0] - pi[1], pi[1] - pi[0], pi[2] - pi[3], pi[3] - pi[2], 0],
            }[form]
        np.testing.assert_allclose(weights, wanted / TOKENS, atol=1e-6)


def test_moments_are_those_of_the_gradients(world):
    forks, _, scores = world
    rng = np.random.default_rng(2)
    weights, expected = rng.normal(1.0, 0.1, (6, 15)), rng.random(15)
    gradients, target = weights @ scores, expected @ scores
    target /= np.linalg.norm(target)
    mean = gradients.mean(0)
    trace = gradients.var(0, ddof=1).sum()
    found = moments(forks, weights, expected)
    assert found["trace"] == pytest.approx(trace)
    assert found["squared_norm"] == pytest.approx(mean @ mean - trace / 6)
    assert found["cosine_of_mean"] == pytest.approx(mean @ target / np.linalg.norm(mean))
    assert found["cosine_of_draw"] == pytest.approx(np.mean(gradients @ target / np.linalg.norm(gradients, axis=1)))


def test_scores_are_gradients_of_the_student():
    model = AutoModelForCausalLM.from_pretrained(asset_path("student"), dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(asset_path("student"))
    encode = lambda text: tokenizer(text)["input_ids"]  # noqa: E731
    texts = [("Mia finds 24: 27 + 24 = ", "51, so Mia"), ("Mia finds 24: 27 + 24 = ", "41"), ("Mia", " sells 5")]
    logprobs, gram = score(model, [(encode(prefix), encode(text)) for prefix, text in texts])
    gradients = []
    for (prefix, text), logprob in zip(texts, logprobs, strict=True):
        ids = torch.tensor([encode(prefix) + encode(text)])
        labels = ids.clone()
        labels[:, : len(encode(prefix))] = -100
        model.zero_grad()
        loss = model(input_ids=ids, labels=labels).loss * len(encode(text))
        loss.backward()
        assert logprob == pytest.approx(-loss.item(), rel=1e-4)
        gradients.append(torch.cat([p.grad.reshape(-1) for p in model.parameters()]).double())
    flat = torch.stack(gradients)
    np.testing.assert_allclose(gram, (flat @ flat.T).numpy(), rtol=1e-3, atol=1e-3)
