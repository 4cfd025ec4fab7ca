# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""The numbers of a probe against plain loops, and the verdict from the numbers alone."""

import math
import random
from dataclasses import asdict, replace
from itertools import combinations

import numpy as np
import pytest
import torch

from omniopd_trl import OmniOPDConfig
from omniopd_trl.audits.types import Audit, Branch, ChunkAudit, Fork, PolicyScores, Trajectory
from omniopd_trl.evals.probe import Estimate, Form, Measured, Signal, estimate, judge, measure, measure_marks
from omniopd_trl.evals.probe.measurement import _found
from omniopd_trl.method.chunks import Chunk
from tests.support.audits import audit_settings
from tests.support.training import similarity as edit

LENGTH = 8
SETTINGS = audit_settings(
    num_chunks=3, chunk_length=LENGTH, min_chunk_length=4, num_rollouts=2, min_rollouts=2, num_branches=3
)
FORM = Form(
    num_chunks=3,
    num_rollouts=4,
    min_rollouts=1,
    num_branches=7,
    fork_candidates=0,
    teacher_temperature=1.0,
    min_anchor_entropy=0.0,
    posterior_baseline="none",
    prior="policy",
    scale_advantages=False,
    max_failed_chunks=0.2,
)
UNKNOWN = Estimate(0.0, math.inf)
GOOD = Signal(
    "exact",
    10,
    matched=0.5,
    unrelated=0.0,
    gap=Estimate(0.5, 0.05),
    spread=0.4,
    spread_unrelated=0.0,
    variance=0.17,
    signal=Estimate(0.17, 0.01),
    decided=0.4,
    decided_centered=0.7,
    noise=0.01,
    preferred=0.165,
    repeated=Estimate(0.9, 0.03),
)
NUMBERS = Measured(
    num_trajectories=32,
    num_forks=96,
    num_agreed=30,
    num_asked=66,
    num_dropped=0,
    chunks_per_trajectory=3.0,
    asked_per_trajectory=2.1,
    completion_tokens=90.0,
    signals=(GOOD,),
    self_agreement=0.9,
    duplicates=0.9,
    student_agreement=0.5,
    difference=Estimate(0.4, 0.03),
    own_chunk=Estimate(0.0, 0.01),
    gates=((0.05, 0.2, 0.0), (0.1, 0.4, 0.04), (0.2, 0.5, 0.2), (0.5, 0.8, 0.7)),
    found=((3, 0.8), (7, 1.0)),
)
EDIT = replace(GOOD, similarity="edit")
SMALL = replace(EDIT, spread=0.04, variance=0.003, signal=Estimate(0.002, 0.0003))
WEAK = replace(EDIT, signal=Estimate(0.0001, 0.0005), spread=0.03, variance=0.002)


MARKS = replace(GOOD, similarity="marks", unrelated=None, gap=None)
MARKED = replace(NUMBERS, signals=(MARKS,), difference=UNKNOWN, middling=0.0)
JUDGE, CASCADE = (replace(FORM, signal=signal) for signal in ("judge", "cascade"))


def with_marks(middling=0.0, **changes):
    return replace(MARKED, signals=(replace(MARKS, **changes),), middling=middling)


def with_signals(*signals):
    return replace(NUMBERS, signals=signals)


@pytest.mark.parametrize(
    ("numbers", "form", "kind", "words"),
    [
        (NUMBERS, FORM, "will teach", "prefers some branches"),
        (replace(NUMBERS, num_trajectories=0), FORM, "uncertain", "--max_usd"),
        (replace(NUMBERS, num_forks=0, num_asked=0), FORM, "will not", "have no chunk"),
        (replace(NUMBERS, num_agreed=96, num_asked=0, found=()), FORM, "will not", "have one text"),
        (replace(NUMBERS, num_dropped=14), FORM, "will not", "max_failed_chunks=0.2 (the service said no)"),
        (replace(NUMBERS, num_dropped=13), FORM, "will teach", "prefers some branches"),
        (replace(NUMBERS, num_trajectories=8), FORM, "uncertain", "--num_prompts"),
        (
            replace(NUMBERS, num_agreed=95, num_asked=1, signals=()),
            FORM,
            "uncertain",
            "fewer than two forks were answered",
        ),
        (replace(NUMBERS, own_chunk=Estimate(0.3, 0.03)), FORM, "will not", "repeats text that it has seen"),
        # A chunk at the end of a trajectory knows that it ended: a small difference is no echo.
        (replace(NUMBERS, own_chunk=Estimate(0.1, 0.03)), FORM, "will teach", ""),
        (with_signals(replace(GOOD, spread=0.0, variance=0.0)), FORM, "will not", "agree equally"),
        (with_signals(replace(GOOD, gap=Estimate(0.01, 0.05))), FORM, "will not", "no more than with those"),
        (with_signals(replace(GOOD, gap=Estimate(0.2, 0.15))), FORM, "uncertain", "too small to be sure"),
        (with_signals(replace(GOOD, signal=Estimate(-0.1, 0.01))), FORM, "will not", "no better than unrelated"),
        (with_signals(replace(GOOD, signal=Estimate(0.1, 0.06))), FORM, "uncertain", "too small to be sure"),
        (replace(NUMBERS, difference=Estimate(0.05, 0.03)), FORM, "uncertain", "writes what the student writes"),
        (with_signals(replace(GOOD, decided=0.009)), FORM, "will teach", ""),
        (with_signals(replace(GOOD, decided=0.009)), replace(FORM, num_branches=0), "uncertain", "the rest is noise"),
        (
            with_signals(replace(GOOD, decided=0.009)),
            replace(FORM, num_branches=0, posterior_baseline="batch"),
            "will teach",
            "",
        ),
        (with_signals(WEAK, GOOD), FORM, "will not", "'exact' with chunks of 10 tokens sees a difference"),
        # The same rules for marks, which have no gap and no difference of texts.
        (MARKED, JUDGE, "will teach", "the judge prefers some branches"),
        (MARKED, CASCADE, "will teach", "the judge prefers some branches"),
        (replace(MARKED, num_dropped=14), JUDGE, "will not", "21% of the forks got no marks"),
        (replace(MARKED, num_dropped=14), CASCADE, "will not", "got no marks"),
        (replace(MARKED, signals=()), JUDGE, "uncertain", "fewer than two forks were marked twice"),
        (replace(MARKED, own_chunk=Estimate(0.3, 0.03)), JUDGE, "will not", "prefers what the solution continues"),
        (with_marks(spread=0.0, spread_unrelated=0.0), JUDGE, "will not", "have equal marks"),
        # Two marks that depend on the order alone: their mean is the same for all.
        (with_marks(spread=0.0, spread_unrelated=0.4, signal=Estimate(-0.1, 0.01)), JUDGE, "will not", "not repeat"),
        (with_marks(signal=Estimate(0.001, 0.01)), JUDGE, "will not", "does not repeat its marks"),
        (with_marks(signal=Estimate(0.1, 0.06)), JUDGE, "uncertain", "too small to be sure"),
        (with_marks(signal=Estimate(0.001, 0.01)), CASCADE, "will not", "does not repeat its marks"),
        (with_marks(signal=Estimate(0.001, 0.01), middling=0.6), CASCADE, "uncertain", "60% of the forks would get"),
        (with_marks(signal=Estimate(0.001, 0.01), middling=0.6), JUDGE, "will not", "does not repeat its marks"),
        (
            replace(with_marks(middling=0.6), own_chunk=Estimate(0.3, 0.03)),
            CASCADE,
            "will not",
            "prefers what the solution continues",
        ),
        (with_marks(decided=0.009), replace(JUDGE, num_branches=0), "uncertain", "marks are 0.50 on average"),
    ],
)
def test_verdict(numbers, form, kind, words):
    verdict = judge(numbers, form, "the service said no")
    assert verdict.kind == kind
    assert words in verdict.reason
    assert "\n" not in verdict.reason


def test_no_verdict_depends_on_the_reason_for_failures():
    assert judge(NUMBERS, FORM) == judge(NUMBERS, FORM, "a reason")


@pytest.mark.parametrize(("unwilling", "options"), [(0.9, {"signal": "judge"}), (0.1, {}), (0.0, {})])
def test_a_teacher_that_does_not_continue_texts_may_mark_them(unwilling, options):
    """Unless its service failed."""
    verdict = judge(replace(NUMBERS, num_dropped=60), FORM, "a reason", unwilling)
    assert verdict.kind == "will not"
    assert {advice.option: advice.value for advice in verdict.advice} == options


def test_options_of_a_teacher_that_is_sure():
    options = {advice.option: advice.value for advice in judge(NUMBERS, FORM).advice}
    assert options == {
        "signal": "rollouts",
        "similarity": "exact",
        "chunk_length": 10,
        "num_branches": 7,
        "posterior_baseline": "none",
        "min_anchor_entropy": 0.1,
        "num_chunks": 3,
        "num_rollouts": 1,
        "teacher_temperature": 0,
    }


@pytest.mark.parametrize(
    ("form", "more"), [(JUDGE, {"signal": "judge", "teacher_temperature": 0}), (CASCADE, {"signal": "cascade"})]
)
def test_options_of_a_judge_are_those_without_rollouts(form, more):
    """One mark is kept, so it should be the likeliest; the rollouts of a cascade are not measured."""
    options = {advice.option: advice.value for advice in judge(with_marks(middling=0.25), form).advice}
    assert options == more | {
        "num_branches": 7,
        "posterior_baseline": "none",
        "min_anchor_entropy": 0.1,
        "num_chunks": 3,
    }
    (signal,) = (a.reason for a in judge(with_marks(middling=0.25), form).advice if a.option == "signal")
    assert ("25% of the forks" in signal) == (form is CASCADE)


def test_a_judge_that_refuses_is_not_advised_to_mark():
    assert judge(replace(MARKED, num_dropped=60), JUDGE, "a reason", unwilling=0.9).advice == ()


def test_similarities_that_cannot_be_told_apart_are_named():
    """Those of the same chunk length, with the form in which they would train; not one that is clearly worse."""
    worse = replace(EDIT, similarity="rouge1", repeated=Estimate(0.5, 0.05))
    numbers = with_signals(SMALL, GOOD, worse, replace(GOOD, chunk_length=5))
    (advice,) = (advice for advice in judge(numbers, FORM).advice if advice.option == "similarity")
    assert (advice.value, advice.reason) == (
        "edit",
        "two rollouts prefer the same branches by edit with scaled advantages (0.900 ± 0.030). The probe cannot tell "
        "it from exact (0.900 ± 0.030): only training can, with a run of each, at the same price",
    )
    (advice,) = (advice for advice in judge(with_signals(worse, GOOD), FORM).advice if advice.option == "similarity")
    assert (advice.value, advice.reason) == (
        "exact",
        "two rollouts prefer the same branches by exact (0.900 ± 0.030); the recipe has rouge1 (0.500 ± 0.050) on 10 "
        "tokens",
    )


@pytest.mark.parametrize(
    ("numbers", "form", "option", "value"),
    [
        # Another similarity must be clearly repeated better. Its scale says nothing.
        (with_signals(GOOD, replace(EDIT, repeated=Estimate(0.98, 0.03))), FORM, "similarity", "exact"),
        (with_signals(GOOD, replace(EDIT, repeated=Estimate(0.99, 0.03))), FORM, "similarity", "edit"),
        (with_signals(SMALL, GOOD), FORM, "similarity", "edit"),
        (with_signals(replace(SMALL, repeated=None), replace(GOOD, repeated=None)), FORM, "similarity", "edit"),
        (with_signals(GOOD, replace(WEAK, repeated=Estimate(1.0, 0.0))), FORM, "similarity", "exact"),
        (with_signals(WEAK, replace(GOOD, chunk_length=5)), FORM, "chunk_length", 5),
        (replace(NUMBERS, found=((3, 0.95), (7, 1.0))), FORM, "num_branches", 3),
        (with_signals(replace(GOOD, noise=0.4, preferred=0.11)), FORM, "num_rollouts", 4),
        (with_signals(replace(GOOD, noise=0.4, preferred=-0.01)), FORM, "num_rollouts", 10),
        # Five of ten first: of the forks, at least 0.9^4 have five equal ones.
        (with_signals(replace(GOOD, noise=0.4, preferred=-0.01)), FORM, "first_rollouts", 5),
        (
            with_signals(replace(GOOD, noise=0.4, preferred=-0.01)),
            replace(FORM, min_rollouts=4, first_rollouts=0),
            "min_rollouts",
            None,
        ),
        (NUMBERS, replace(FORM, first_rollouts=2), "first_rollouts", 0),
        (
            replace(with_signals(replace(GOOD, noise=0.4, preferred=0.11)), duplicates=0.19),
            FORM,
            "first_rollouts",
            None,
        ),
        (with_signals(replace(GOOD, noise=0.4, preferred=0.11)), FORM, "teacher_temperature", None),
        # Several greedy rollouts would be equal.
        (
            with_signals(replace(GOOD, noise=0.4, preferred=0.11)),
            replace(FORM, teacher_temperature=0.0),
            "teacher_temperature",
            1.0,
        ),
        (NUMBERS, replace(FORM, teacher_temperature=0.0), "teacher_temperature", None),
        (with_signals(replace(GOOD, noise=None)), FORM, "num_rollouts", None),
        (with_signals(replace(GOOD, similarity="edit", spread=0.04)), FORM, "scale_advantages", True),
        (with_signals(replace(GOOD, spread=0.04)), FORM, "scale_advantages", None),
        (NUMBERS, replace(FORM, scale_advantages=True), "scale_advantages", False),
        (NUMBERS, replace(FORM, min_anchor_entropy=0.1), "min_anchor_entropy", None),
        (replace(NUMBERS, gates=((0.05, 0.5, 0.1),)), FORM, "min_anchor_entropy", None),
        (replace(NUMBERS, asked_per_trajectory=1.0), FORM, "fork_candidates", 6),
        (replace(NUMBERS, asked_per_trajectory=1.0), replace(FORM, fork_candidates=4), "fork_candidates", None),
        # The gate or the length limits the chunks, not M: there are no other candidates.
        (replace(NUMBERS, asked_per_trajectory=1.0, chunks_per_trajectory=2.4), FORM, "fork_candidates", None),
        (NUMBERS, replace(FORM, num_branches=0, prior="reference"), "prior", "policy"),
        (NUMBERS, replace(FORM, num_branches=0, posterior_baseline="batch"), "posterior_baseline", "none"),
        (NUMBERS, replace(FORM, min_rollouts=2), "min_rollouts", 1),
        (replace(NUMBERS, num_dropped=60), FORM, "num_chunks", None),  # a teacher that refuses has no good options
        (replace(NUMBERS, own_chunk=Estimate(0.3, 0.03)), FORM, "num_chunks", None),
    ],
)
def test_recommended_options(numbers, form, option, value):
    verdict = judge(numbers, form)
    assert {advice.option: advice.value for advice in verdict.advice}.get(option) == value
    assert all(advice.reason and "\n" not in advice.reason for advice in verdict.advice)
    # They can be pasted: a recipe with them is valid.
    recipe = {"chunk_length": 10, "min_chunk_length": 4, "use_cpu": True, "bf16": False, **asdict(form)}
    OmniOPDConfig("unused", **recipe | {advice.option: advice.value for advice in verdict.advice})


def test_estimate_is_the_standard_error_of_clusters():
    """Against the variance over many samples of clusters, in which members depend on each other."""
    rng = np.random.default_rng(0)
    means, errors = [], []
    for _ in range(400):
        of_group = rng.normal(size=30)
        groups = np.repeat(np.arange(30), 4)
        values = of_group[groups] + 0.3 * rng.normal(size=120)
        result = estimate(values, groups.tolist())
        means.append(result.value)
        errors.append(result.error)
    assert np.mean(errors) == pytest.approx(np.std(means), rel=0.1)


def test_estimates_at_their_limits():
    assert estimate([1.0, 2.0], ["a", "a"]) == (1.5, math.inf)
    assert Estimate(1.5, math.inf).sigmas == 0
    assert Estimate(0.0, 0.0).sigmas == 0
    assert Estimate(0.1, 0.0).sigmas == math.inf


def words(rng, count):
    return " ".join(rng.choice(["Tom", "has", "7", "apples", "more", "now"]) for _ in range(count))


@pytest.fixture(scope="module")
def audits(tiny_tokenizer):
    """Trajectories with forks of random texts, at the positions of the highest entropy."""
    rng = random.Random(0)
    result = []
    for index in range(6):
        forks, chunks, ids = [], [], []
        for k in range(3):
            own, other, third = (tuple(tiny_tokenizer(words(rng, 8))["input_ids"][:LENGTH]) for _ in range(3))
            tokens = [own, other, own, third] if (index, k) != (0, 0) else [own] * 4
            texts = [tiny_tokenizer.decode(own) for own in tokens]
            chunk = Chunk(k * LENGTH, (k + 1) * LENGTH, k * LENGTH)
            fork = Fork(chunk, tuple(Branch(own, text) for own, text in zip(tokens, texts, strict=True)))
            forks.append(fork)
            ids += tokens[0]
            if fork.diversity and (index, k) != (1, 1):  # the teacher refused that one
                rollouts = tuple(
                    tiny_tokenizer.decode(tiny_tokenizer(words(rng, 2))["input_ids"][:LENGTH]) for _ in range(2)
                )
                chunks.append(ChunkAudit(chunk, "", texts[0], rollouts, (0.0, 0.0), 0.5, 0.5))
        trajectory = Trajectory("How many?", [1, 2], ids, seed=index, forks=tuple(forks))
        entropy = torch.tensor([rng.random() * (t % LENGTH == 0) for t in range(len(ids))])
        audit = Audit(tuple(chunks), num_dropped=index == 1, agreed=(forks[0].chunk,) if index == 0 else ())
        result.append((trajectory, PolicyScores(-entropy, entropy, -entropy), audit))
    return result


def test_measured_numbers(audits, tiny_tokenizer):
    """Every number, from the texts, by plain loops."""
    numbers = measure(audits, tiny_tokenizer, SETTINGS, "edit")
    forks = [
        (index, [branch.text for branch in fork.branches], chunk.rollouts, scores.entropy[chunk.chunk.anchor].item())
        for index, (trajectory, scores, audit) in enumerate(audits)
        for fork in trajectory.forks
        for chunk in audit.chunks
        if chunk.chunk == fork.chunk
    ]
    assert numbers.num_forks == 18
    assert numbers.num_agreed == 1
    assert numbers.num_asked == 17
    assert numbers.num_dropped == 1
    assert len(forks) == 16
    assert numbers.chunks_per_trajectory == 3
    assert numbers.asked_per_trajectory == pytest.approx(3 * 17 / 18)
    assert numbers.completion_tokens == 3 * LENGTH
    first = numbers.signals[0]
    assert (first.similarity, first.chunk_length) == ("edit", LENGTH)
    assert {(s.similarity, s.chunk_length) for s in numbers.signals} == {
        (name, length) for name in ("edit", "exact", "rouge1", "rougeL") for length in (8, 4)
    }
    for signal, phi in (
        (first, edit),
        (next(s for s in numbers.signals if s.similarity == "exact"), lambda a, b: float(a.strip() == b.strip())),
    ):
        own, floor, noise, repeated = [], [], [], []
        for k, (_, texts, rollouts, _) in enumerate(forks):
            table = [[phi(text, rollout) for text in texts] for rollout in rollouts]
            own.append([sum(column) / 2 for column in zip(*table, strict=True)])
            unrelated = forks[(k + len(forks) // 2) % len(forks)][2]
            floor.append([sum(phi(text, rollout) for rollout in unrelated) / 2 for text in texts])
            # Two rollouts: half of the squared difference of their verdicts, each without its mean.
            a, b = (np.array(row) - np.mean(row) for row in table)
            noise.append(np.mean((a - b) ** 2) / 2)
            with np.errstate(invalid="ignore"):
                (_, *pair), (*_, same), _ = np.nan_to_num(np.corrcoef([floor[-1], *table]))
                repeated.append(same - np.mean(pair))
        assert signal.matched == pytest.approx(np.mean(own))
        assert signal.unrelated == pytest.approx(np.mean(floor))
        assert signal.gap.value == pytest.approx(np.mean(own) - np.mean(floor))
        assert signal.spread == pytest.approx(np.mean([np.std(row) for row in own]))
        assert signal.spread_unrelated == pytest.approx(np.mean([np.std(row) for row in floor]))
        assert signal.variance == pytest.approx(np.mean([np.var(row) for row in own]))
        difference = [np.var(a) - np.var(b) for a, b in zip(own, floor, strict=True)]
        assert signal.signal == pytest.approx(estimate(difference, [index for index, *_ in forks]))
        assert signal.noise == pytest.approx(np.mean(noise))
        assert signal.repeated == pytest.approx(estimate(repeated, [index for index, *_ in forks]))
        assert signal.preferred == pytest.approx(signal.variance - np.mean(noise) / 2)
        assert signal.decided == pytest.approx(signal.variance / np.mean(np.square(own)) if np.any(own) else 0)
        assert signal.decided_centered == pytest.approx(signal.variance / np.var(own) if np.var(own) else 0)

    groups = [index for index, *_ in forks]
    own = [[np.mean([edit(text, r) for r in rollouts]) for text in texts] for _, texts, rollouts, _ in forks]
    with_itself = [edit(*rollouts) for _, _, rollouts, _ in forks]
    of_student = [
        np.mean([edit(texts[i], texts[j]) for i in range(4) for j in range(4) if i != j]) for _, texts, *_ in forks
    ]
    assert numbers.self_agreement == pytest.approx(np.mean(with_itself))
    assert numbers.student_agreement == pytest.approx(np.mean(of_student))
    assert numbers.duplicates == np.mean([a.strip() == b.strip() for _, _, (a, b), _ in forks])
    difference = [a + b - 2 * np.mean(s) for a, b, s in zip(with_itself, of_student, own, strict=True)]
    assert numbers.difference == pytest.approx(estimate(difference, groups))
    assert numbers.own_chunk == pytest.approx(estimate([s[0] - np.mean(s[1:]) for s in own], groups))
    entropies = [s.entropy[fork.chunk.anchor].item() for t, s, _ in audits for fork in t.forks]
    variances = np.array([np.var(row) for row in own])
    for gate, below, taught in numbers.gates:
        assert below == pytest.approx(np.mean([value <= gate for value in entropies]))
        kept = np.array([entropy <= gate for *_, entropy in forks])
        assert taught == pytest.approx(variances[kept].sum() / variances.sum())
    assert numbers.found[-1] == (3, 1.0)


def test_shorter_chunks_are_those_of_shorter_texts(audits, tiny_tokenizer):
    """Chunks of half the length, measured as shares of long ones, and from texts that are cut before."""
    long = measure(audits, tiny_tokenizer, SETTINGS, "rouge1")
    cut = []
    for trajectory, scores, audit in audits:
        forks, chunks = [], []
        for fork in trajectory.forks:
            chunk = replace(fork.chunk, end=fork.chunk.start + LENGTH // 2)
            kept = [branch.token_ids[: LENGTH // 2] for branch in fork.branches]
            forks.append(Fork(chunk, tuple(Branch(ids, tiny_tokenizer.decode(ids)) for ids in kept)))
            chunks += [replace(c, chunk=chunk) for c in audit.chunks if c.chunk == fork.chunk]
        cut.append((replace(trajectory, forks=tuple(forks)), scores, replace(audit, chunks=tuple(chunks))))
    short = measure(cut, tiny_tokenizer, replace(SETTINGS, chunk_length=LENGTH // 2), "rouge1").signals[0]
    assert next(s for s in long.signals if (s.similarity, s.chunk_length) == ("rouge1", LENGTH // 2)) == short


def test_marks_by_plain_loops(audits, tiny_tokenizer):
    """Two markings in the place of two rollouts. A fork that is marked once is left out."""
    rng = random.Random(1)

    def marked(trajectory):
        chunks = []
        for fork in trajectory.forks:
            mark = {branch.text: rng.randint(0, 10) / 10 for branch in fork.branches}
            branches = tuple(replace(branch, similarity=mark[branch.text]) for branch in fork.branches)
            chunks.append(ChunkAudit(fork.chunk, "", branches[0].text, (), (0.0,), 0.5, 0.5, branches))
        return Audit(tuple(chunks))

    first = [(t, scores, marked(t)) for t, scores, _ in audits]
    again = [marked(t) for t, *_ in audits]
    again[1] = replace(again[1], chunks=again[1].chunks[1:])
    again[2] = None
    settings = replace(SETTINGS, signal="judge")
    numbers = measure_marks(first, again, tiny_tokenizer, settings, (0.1, 0.6))
    assert numbers.num_forks == 18
    assert (numbers.self_agreement, numbers.duplicates, numbers.difference) == (None, None, UNKNOWN)
    pairs, groups, between = [], [], []
    for k, ((*_, one), two) in enumerate(zip(first, again, strict=True)):
        others = {} if two is None else {chunk.chunk: chunk.branches for chunk in two.chunks}
        for chunk in one.chunks:
            between.append(any(0.1 < branch.similarity < 0.6 for branch in chunk.branches))
            if chunk.chunk in others:
                marks = ([b.similarity for b in branches] for branches in (chunk.branches, others[chunk.chunk]))
                pairs.append(np.array([*marks]))
                groups.append(k)
    assert len(pairs) == 14
    assert numbers.middling == np.mean(between)
    (signal,) = numbers.signals
    assert (signal.similarity, signal.chunk_length) == ("marks", LENGTH)
    assert signal.gap is signal.unrelated is None
    assert signal.matched == pytest.approx(np.mean(pairs))
    assert signal.spread == pytest.approx(np.mean([np.std(marks.mean(0)) for marks in pairs]))
    # The variance of a mean of two, without the noise of each, is their covariance.
    covariances = [np.cov(marks, bias=True)[0, 1] for marks in pairs]
    assert signal.signal == pytest.approx(estimate(covariances, groups))
    assert signal.preferred == pytest.approx(np.mean(covariances))
    noise = [np.var(marks[0] - marks[1]) / 4 for marks in pairs]
    assert signal.spread_unrelated == pytest.approx(np.mean(np.sqrt(noise)))
    with np.errstate(invalid="ignore"):
        repeated = [np.nan_to_num(np.corrcoef(marks)[0, 1]) for marks in pairs]
    assert signal.repeated == pytest.approx(estimate(repeated, groups))
    own = [marks.mean(0)[0] - marks.mean(0)[1:].mean() for marks in pairs]
    assert numbers.own_chunk == pytest.approx(estimate(own, groups))


def test_fewer_branches_find_fewer_differences():
    """The expected share over all subsets, by enumeration."""
    texts = ["7", "7", "7", "7", "7", "7", "8", "9"]
    fork = Fork(Chunk(0, 1, 0), tuple(Branch((index,), text) for index, text in enumerate(texts)))
    shares = [len(set(chosen)) > 1 for chosen in combinations(texts, 4)]
    assert dict(_found([fork])) == {3: pytest.approx(np.mean(shares)), 7: 1.0}


def test_nothing_answered(audits, tiny_tokenizer):
    silent = [(trajectory, scores, Audit(num_dropped=3)) for trajectory, scores, _ in audits]
    numbers = measure(silent, tiny_tokenizer, SETTINGS, "edit")
    assert numbers.signals == ()
    assert judge(numbers, FORM).kind == "will not"
    assert judge(measure([], tiny_tokenizer, SETTINGS, "edit"), FORM).kind == "uncertain"
