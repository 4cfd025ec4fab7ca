# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Weights of chunks in a run: the controls, functions of the user's, and several processes."""

from concurrent.futures import Future, ThreadPoolExecutor

import pytest
import torch

from omniopd_trl.audits.types import Audit, ChunkAudit, PolicyScores, Trajectory
from omniopd_trl.errors import ConfigError
from omniopd_trl.journal.recorder import Recorder
from omniopd_trl.method import Chunk, StepChunks
from omniopd_trl.trainer import step_audits
from omniopd_trl.trainer.checkpoints import last_checkpoint
from omniopd_trl.trainer.fingerprint import replay_key
from omniopd_trl.trainer.step_audits import PendingAudit
from tests.support.ranks import Ranks
from tests.support.teachers import Here, Remote
from tests.support.training import FOUR_MICRO_BATCHES, make_trainer, questions


def weights_of(trainer, step=0):
    """The weight of each chunk of a generation batch, in the order of rows."""
    batch, found = trainer.batches[step], []
    for weights, audited in zip(batch["weights"], batch["audited_mask"], strict=True):
        chunks = weights[audited].split(trainer.args.chunk_length)
        found += [chunk[0].item() for chunk in chunks if len(chunk)]
    return found


def test_controls_keep_the_numbers_and_not_their_places(tmp_path, tiny_model_dir):
    """`shuffled` trains on the same posteriors in another order, `constant` on their mean."""
    runs = {}
    for baseline in ("none", "shuffled", "constant"):
        trainer = make_trainer(tmp_path / baseline, tiny_model_dir, posterior_baseline=baseline, max_steps=1)
        trainer.train()
        runs[baseline] = weights_of(trainer)
        logged = trainer.state.log_history[0]["audit/posterior"]
        assert logged == pytest.approx(sum(runs["none"]) / len(runs["none"]), rel=1e-5), "it is logged as it is"
    assert len(runs["none"]) == 9
    assert sorted(runs["shuffled"]) == sorted(runs["none"])
    assert runs["shuffled"] != runs["none"]
    assert runs["constant"] == pytest.approx([sum(runs["none"]) / 9] * 9)


def test_each_step_and_seed_has_its_own_permutation(tmp_path, tiny_model_dir):
    """What comes to the first chunk of a batch is not always that of the same other one."""
    seen = []

    def keep(chunks: StepChunks) -> torch.Tensor:
        seen.append((chunks.step, chunks.seed))
        return chunks.posteriors

    for seed in (0, 1):
        settings = {"max_steps": 2, "dataset": questions(16), "seed": seed, "chunk_weights": keep}
        make_trainer(tmp_path / str(seed), tiny_model_dir, **settings).train()
    assert [step for step, _ in seen] == [0, 1, 0, 1]
    assert len({seed for _, seed in seen}) == 4


def test_a_function_of_the_users_gets_the_whole_step(tmp_path, tiny_model_dir):
    """Once for each step, also with a teacher whose audits could overlap; what it returns is trained on."""
    seen: list[StepChunks] = []

    def uncertain(chunks: StepChunks) -> torch.Tensor:
        seen.append(chunks)
        return chunks.posteriors * chunks.entropies

    settings = {"max_steps": 2, "dataset": questions(16), **FOUR_MICRO_BATCHES}
    trainer = make_trainer(tmp_path, tiny_model_dir, teacher=Remote(), chunk_weights=uncertain, **settings)
    assert not trainer.step_audits.overlap
    trainer.train()
    assert [chunks.step for chunks in seen] == [0, 1]
    first, second = seen
    for step, chunks in enumerate(seen):
        assert weights_of(trainer, step) == pytest.approx((chunks.posteriors * chunks.entropies).tolist())
    logged = trainer.state.log_history[0]
    assert first.posteriors.mean().item() == pytest.approx(logged["audit/posterior"])
    assert first.similarities.mean().item() == pytest.approx(logged["audit/similarity"])
    assert first.priors.mean().item() == pytest.approx(logged["audit/prior"])
    assert first.entropies.mean().item() == pytest.approx(logged["audit/anchor_entropy"])
    assert set(first.lengths.tolist()) <= {9, 10}
    per_row = trainer.batches[0]["audited_mask"].sum(1)
    trajectories = [(n + 9) // 10 for n in per_row.tolist() if n]  # rows that are too short for any chunk have none
    assert first.trajectories.unique(return_counts=True)[1].tolist() == trajectories
    assert first.moving_average is None
    assert second.moving_average == pytest.approx(first.posteriors.mean().item())


def test_a_result_that_is_none(tmp_path, tiny_model_dir):
    """The error says what was returned, before a step is taken with it."""
    trainer = make_trainer(tmp_path, tiny_model_dir, chunk_weights=lambda chunks: chunks.posteriors.log() * 0 / 0)
    with pytest.raises(ConfigError, match=r"a tensor of shape \(9,\) that holds nan for 9 chunks"):
        trainer.train()
    assert trainer.state.global_step == 0
    with pytest.raises(ConfigError, match=r"`chunk_weights` is 0\.5, which is neither a name nor a function"):
        make_trainer(tmp_path, tiny_model_dir, chunk_weights=0.5)


def test_a_control_beside_a_function(tmp_path, tiny_model_dir):
    """It would have no effect, and the tables of the run would call it a control."""
    with pytest.raises(ConfigError, match=r"posterior_baseline='shuffled' has no effect beside `chunk_weights`"):
        make_trainer(tmp_path, tiny_model_dir, chunk_weights=lambda c: c.posteriors, posterior_baseline="shuffled")


@pytest.mark.parametrize(
    ("fails", "error", "message"),
    [
        (lambda chunks: chunks.nonsense, AttributeError, None),
        (lambda chunks: chunks.posteriors / 0 * 0, ConfigError, r"Stopped at step 1: .* that holds nan"),
        (lambda chunks: chunks.posteriors[:-1], ConfigError, r"Stopped at step 1: .*a tensor of shape"),
    ],
    ids=["raises", "nan", "too few"],
)
def test_an_error_of_a_function_ends_the_run_with_a_checkpoint(tmp_path, tiny_model_dir, fails, error, message):
    """Like an error of a teacher: the step that was paid for is in the journal, and the message says how to resume."""

    def weigh(chunks):
        return chunks.posteriors if chunks.step == 0 else fails(chunks)

    settings = {"max_steps": 3, "dataset": questions(24), "chunk_weights": weigh}
    trainer = make_trainer(tmp_path, tiny_model_dir, **settings)
    with pytest.raises(error, match=message) as caught:
        trainer.train()
    said = [str(caught.value), *getattr(caught.value, "__notes__", [])][-1]
    assert said.startswith("Stopped at step 1: ")
    assert f"A checkpoint is in {tmp_path}" in said
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-1")


def test_a_function_decides_what_is_replayed(tmp_path, tiny_model_dir):
    """Another function trains another student, whose later steps are not those of the journal."""
    trainer = make_trainer(tmp_path, tiny_model_dir)

    def key(*functions):
        similarity = trainer.auditor.similarity
        return replay_key(trainer.args, trainer.train_dataset, trainer.model, trainer.teacher, similarity, *functions)

    plain, half = key(), key(lambda chunks: chunks.posteriors / 2)
    assert plain == key(None)
    assert {name for name in plain if plain[name] != half[name]} == {"posterior_baseline"}
    assert half != key(lambda chunks: chunks.posteriors / 3)


@pytest.mark.parametrize("baseline", ["batch", "constant", "shuffled", "trajectory"])
def test_two_processes_weigh_the_step_as_one(tmp_path, tiny_model_dir, monkeypatch, baseline):
    """Each gets the weights of its own chunks, among those of both; trajectories are not mixed up."""
    posteriors = [[[0.2, 0.6], [0.5]], [[0.1], [], [0.9, 0.3, 0.4]]]

    def pending(row) -> PendingAudit:
        spans = [Chunk(4 * i, 4 * i + 4, 4 * i) for i in range(len(row))]
        future: Future[Audit] = Future()
        chunks = (ChunkAudit(span, "", "", ("a",), (0.5,), 0.5, value) for span, value in zip(spans, row, strict=True))
        future.set_result(Audit(tuple(chunks)))
        return PendingAudit(0, Trajectory("", [], [0] * 12), PolicyScores(*torch.ones(3, 12)), future)

    def weights(audits, rows):
        collected = audits.collect([pending(row) for row in rows], 12, "train")
        return [collected.weights[b, 4 * i].item() for b, row in enumerate(rows) for i in range(len(row))]

    trainer = make_trainer(tmp_path, tiny_model_dir, teacher=Here(), posterior_baseline=baseline)
    expected = weights(trainer.step_audits, [row for rank in posteriors for row in rank])
    ranks = Ranks()
    monkeypatch.setattr(step_audits, "gather_object", ranks.gather_object)

    def run(rank):
        ranks.local.rank = rank
        arguments = (trainer.auditor, Recorder(lambda: 0), ranks, trainer.args)
        audits = step_audits.StepAudits(*arguments, callbacks=trainer.callback_handler, step=lambda: 0)
        return weights(audits, posteriors[rank])

    with ThreadPoolExecutor(2) as pool:
        both = [weight for of_rank in pool.map(run, (0, 1)) for weight in of_rank]
    assert both == pytest.approx(expected)
    if baseline == "shuffled":
        flat = [value for rank in posteriors for row in rank for value in row]
        assert sorted(both) == pytest.approx(sorted(flat))
        assert any(weight == pytest.approx(value) for weight in both[:3] for value in flat[3:]), "no chunk moved"
