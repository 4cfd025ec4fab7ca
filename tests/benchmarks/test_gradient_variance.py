# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""The moments of gradients from inner products, against the gradients themselves."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import gradient_variance
from benchmarks.gradient_variance import (
    BASELINES,
    BRANCHES_OF_A_DRAW,
    HELD_OUT,
    LEAVE_ONE_OUT,
    NUM_BRANCHES,
    NUM_DRAWS,
    ROLLOUTS_OF_A_DRAW,
    Forks,
    collect,
    drawn_weights,
    expected_weights,
    measure,
    moments,
    score,
)
from omniopd_trl.demo import asset_path
from omniopd_trl.journal.browse import AuditedTrajectory, ShownBranch, ShownChunk

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


def test_branches_are_scored_at_their_fork():
    """After the prompt and the completion up to the chunk. Equal branches of a fork are one text."""
    model = AutoModelForCausalLM.from_pretrained(asset_path("student"), dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(asset_path("student"))
    prompt, before, own, other = (tokenizer(text)["input_ids"] for text in ("Mia", " finds 24: 27", " + 24", " - 3"))
    branches = tuple(ShownBranch(name, 0.5, 0.0, tuple(ids)) for name, ids in (("a", own), ("b", other), ("a", own)))
    start, end = len(before), len(before) + len(own)
    chunk = ShownChunk(start, end, start, "prefix", "a", ("c", "d"), (0.0, 0.0), 0.5, 0.5, branches=branches)
    completion = (*before, *own, *own)
    trajectory = AuditedTrajectory(0, 0, 0, "t", "p", completion, (chunk,), prompt_ids=tuple(prompt))
    forks = collect(model, [trajectory, replace(trajectory, chunks=())])
    logprobs, gram = score(model, [([*prompt, *before], ids) for ids in (own, other)])
    np.testing.assert_allclose(forks.logprobs, logprobs)
    np.testing.assert_allclose(forks.gram, gram)
    np.testing.assert_allclose(forks.priors, np.exp(logprobs / [len(own), len(other)]))
    assert (forks.branches.tolist(), forks.fork.tolist(), forks.trajectories.tolist()) == ([[0, 1, 0]], [0, 0], [0])
    assert (forks.texts, forks.prefixes[0].completion, forks.rollouts) == (["a", "b"], "prefix", [("c", "d")])
    assert forks.num_tokens == 2 * len(completion)


def test_the_rewards_of_the_expected_gradient(world, monkeypatch):
    """The teacher's probability of the text for `exact`, and else the mean over rollouts that no draw has."""
    forks = replace(world[0], prefixes=list("vwxyz"))
    probabilities = np.random.default_rng(3).random(15)

    class Teacher:
        def __init__(self, name):
            assert name == "t"

        def logprobs(self, prefixes, texts, temperature):
            assert ("".join(prefixes), texts, temperature) == ("vvvwwwxxxyyyzzz", forks.texts, 0.7)
            return [torch.full((2,), p**0.5, dtype=torch.float64).log() for p in probabilities]

    monkeypatch.setattr(gradient_variance, "LocalTeacher", Teacher)
    monkeypatch.setattr(gradient_variance, "collect", lambda model, trajectories: forks)
    monkeypatch.setattr(gradient_variance, "list_audits", lambda folder: folder)
    monkeypatch.setattr(gradient_variance, "read_audits", lambda folder, places: [SimpleNamespace(step=0)] * 3)
    monkeypatch.setattr(gradient_variance.AutoModelForCausalLM, "from_pretrained", lambda *args, **options: None)
    settings = {"teacher_model_name_or_path": "t", "teacher_temperature": 0.7, "prior_strength": 2.0}
    found = measure(
        SimpleNamespace(settings=settings, folder="f", logs=[{"branches/agreed": 0.25}]), ["exact", "edit"]
    )
    assert (found["num_batches"], found["num_trajectories"], found["num_forks"]) == (1, 3, 5)
    assert len(found["rows"]) == 2 * 2 * 5
    held_out = [forks.rollouts[fork][-HELD_OUT:] for fork in forks.fork]
    shares = [rollouts.count(text) / HELD_OUT for text, rollouts in zip(forks.texts, held_out, strict=True)]
    for row in found["rows"]:
        expected = expected_weights(forks, probabilities if row["similarity"] == "exact" else np.array(shares))
        same_chunks = row["varies"] == "rollouts"
        weights = drawn_weights(forks, forks.similarities("exact"), row["form"], same_chunks, 2.0)
        wanted = moments(forks, weights, expected)
        assert {name: row[name] for name in wanted} == pytest.approx(wanted)
