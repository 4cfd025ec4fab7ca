# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Metrics that say whether there is anything to learn, and what it costs."""

import copy
import statistics
from concurrent.futures import ThreadPoolExecutor

import pyarrow.parquet as pq
import pytest
import torch

from omniopd_trl.audits.types import Audit, Branch, ChunkAudit, PolicyScores
from omniopd_trl.journal.browse import list_audits, read_audits
from omniopd_trl.method.chunks import Chunk
from omniopd_trl.teachers import ScriptedTeacher
from omniopd_trl.trainer import metrics
from omniopd_trl.trainer.metrics import Metrics
from tests.support.loopback import Loopback
from tests.support.loopback.teachers import SERVICES, services
from tests.support.ranks import Ranks
from tests.support.teachers import Remote
from tests.support.training import FOUR_MICRO_BATCHES, make_trainer, questions

__all__ = ["services"]  # a fixture

LONG = "a rollout that is long enough for its duplicates to be no chance at all"


def audit(*chunks: tuple[float, tuple[float, ...], tuple[str, ...]]) -> Audit:
    """An audit of chunks with a posterior, similarities and rollouts."""
    spans = [Chunk(4 * i, 4 * i + 4, 4 * i) for i in range(len(chunks))]
    return Audit(
        tuple(
            ChunkAudit(span, "", "", rollouts, similarities, 0.5, posterior)
            for span, (posterior, similarities, rollouts) in zip(spans, chunks, strict=True)
        )
    )


def logged(trainer, audits: list[Audit], **options) -> dict[str, float]:
    measured = trainer.step_metrics
    scores = [PolicyScores(*torch.ones(3, 16)) for _ in audits]
    measured.add_audits("train", audits, scores, 0.0, False, **options)
    return measured.take("train")


@pytest.fixture(scope="module")
def trainer(tmp_path_factory, tiny_model_dir):
    return make_trainer(tmp_path_factory.mktemp("signal"), tiny_model_dir)


@pytest.mark.case("U3")
class TestSignal:
    """Spread of the posteriors, and shares of chunks without any."""

    def test_shares_and_spread_by_hand(self, trainer):
        """Four chunks: one never matched, one always, one sometimes, one with partial matches."""
        audits = [
            audit((0.1, (0.0, 0.0), ("a", "b")), (0.9, (1.0, 1.0), ("a", "a"))),
            audit((0.5, (0.0, 1.0), ("a", "b")), (0.6, (0.3, 0.9), ("a", "b"))),
        ]
        measured = logged(trainer, audits)
        assert measured["audit/frac_similarity_zero"] == 0.25
        assert measured["audit/frac_similarity_one"] == 0.25
        assert measured["audit/posterior_std"] == pytest.approx(statistics.pstdev([0.1, 0.9, 0.5, 0.6]))

    def test_agreement_of_the_teacher_and_certain_anchors(self, trainer):
        """Of the pairs aa, ab, ab and cc, two are equal. All anchors here have an entropy of 1 nat, then of 0.05."""
        audits = [audit((0.5, (0.5,) * 3, ("a", " a\n", "b")), (0.5, (0.5,) * 2, ("c", "c")))]
        measured = logged(trainer, audits)
        assert measured["audit/rollout_agreement"] == 0.5
        assert measured["audit/frac_low_entropy"] == 0.0
        scores = [PolicyScores(torch.ones(16), torch.tensor([0.05] * 4 + [0.1] * 12), torch.ones(16))]
        trainer.step_metrics.add_audits("train", audits, scores, 0.0, False)
        assert trainer.step_metrics.take("train")["audit/frac_low_entropy"] == 0.5

    def test_only_longer_rollouts_count_as_duplicates(self, trainer):
        """Of four long rollouts two could and one does repeat another; short ones do not count."""
        rollouts = [("a", "a", "a"), (LONG, LONG, "a"), (LONG, LONG + "!", "a"), (LONG, "b", "c")]
        measured = logged(trainer, [audit(*((0.5, (0.5,) * 3, row) for row in rollouts))])
        assert measured["audit/duplicate_rollouts"] == 0.5
        assert "audit/duplicate_rollouts" not in logged(trainer, [audit((0.5, (0.5,), ("a",)))])

    @pytest.mark.parametrize("teacher", [Remote, lambda: None], ids=["overlap", "local"])
    def test_the_spread_is_that_of_the_step(self, tmp_path, tiny_model_dir, teacher):
        """Over all micro-batches, however they arrive, and the mean over the steps between two logs."""
        trainer = make_trainer(
            tmp_path,
            tiny_model_dir,
            teacher=teacher(),
            dataset=questions(16),
            max_steps=2,
            logging_steps=2,
            learning_rate=0.0,
            **FOUR_MICRO_BATCHES,
        )
        posteriors: dict[int, list[float]] = {0: [], 1: []}
        add = trainer.step_metrics.add_audits

        def adding(mode, audits, *args, **kwargs):
            posteriors[trainer.state.global_step] += [c.posterior for a in audits for c in a.chunks]
            return add(mode, audits, *args, **kwargs)

        trainer.step_metrics.add_audits = adding
        trainer.train()
        spreads = [statistics.pstdev(values) for values in posteriors.values()]
        assert trainer.state.log_history[0]["audit/posterior_std"] == pytest.approx(sum(spreads) / 2, abs=1e-6)

    def test_two_processes_have_one_spread(self, trainer, monkeypatch):
        """Not the mean of their own spreads, and both log the same."""
        ranks = Ranks()
        audits = [
            [audit((0.1, (0.0,), ("a",)), (0.2, (0.0,), ("a",)))],
            [audit((0.8, (1.0,), ("a",)), (0.9, (0.5,), ("a",)))],
        ]
        monkeypatch.setattr(trainer, "accelerator", ranks)

        def run(rank):
            ranks.local.rank = rank
            measured = Metrics(ranks, trainer.args, {"train": {}, "eval": {}}, lambda: 0)
            scores = [PolicyScores(*torch.ones(3, 16))]
            measured.add_audits("train", audits[rank], scores, 0.0, False)
            return measured.take("train")

        with ThreadPoolExecutor(2) as pool:
            first, second = pool.map(run, (0, 1))
        assert first == second
        assert first["audit/posterior_std"] == pytest.approx(statistics.pstdev([0.1, 0.2, 0.8, 0.9]))
        assert first["audit/frac_similarity_zero"] == 0.5
        assert first["audit/frac_similarity_one"] == 0.25


@pytest.mark.case("U3")
class TestWarnings:
    """One line, once, with the remedy."""

    @pytest.mark.parametrize(
        ("baseline", "rows", "words"),
        [
            # Of the demo: `edit` without a baseline, and with one; `exact`; nothing at all in either direction.
            ("none", [(0.83, 0.93), (1.0, 0.96)], "posterior_baseline='batch', another `similarity`"),
            ("batch", [(0.83, 0.93), (1.0, 0.96)], None),
            ("none", [(0.3, 1.0), (0.2, 1.0)], None),
            ("batch", [(0.5, 0.51), (0.5, 0.49)], "try the following: another `similarity`"),
            ("none", [(0.5, 0.51), (0.5, 0.49)], "try the following: another `similarity`"),
        ],
    )
    def test_nothing_to_learn_from(self, trainer, caplog, baseline, rows, words):
        """After five steps in a row, and not when a step in between has a signal."""
        measured = Metrics(trainer.accelerator, trainer.args, trainer._metrics, lambda: 7)
        measured._is_plain = baseline == "none"
        flat = [audit(*((posterior, (0.5,), ("a",)) for posterior in row)) for row in rows]
        spread = [audit((0.1, (0.5,), ("a",)), (0.9, (0.5,), ("a",)))] * 2
        scores = [PolicyScores(*torch.ones(3, 16))] * 2
        for audits in (*[flat] * 4, spread, *[flat] * 4):
            measured.add_audits("train", audits, scores, 0.0, False)
        assert "hardly differed" not in caplog.text
        for _ in range(3):
            measured.add_audits("train", flat, scores, 0.0, False)
        assert caplog.text.count("hardly differed") == (words is not None)
        assert words is None or words in caplog.text

    @pytest.mark.parametrize(
        ("scale", "similarity", "warns"), [(False, 0.91, True), (True, 0.91, False), (True, 0.9, True)]
    )
    def test_branches_that_hardly_differ(self, trainer, caplog, scale, similarity, warns):
        """A difference of 0.01 is small, unless advantages are scaled: then only equal similarities are no signal."""
        args = copy.copy(trainer.args)
        args.num_branches, args.scale_advantages = 1, scale
        measured = Metrics(trainer.accelerator, args, trainer._metrics, lambda: 7)
        branches = (Branch((1,), "a", similarity=0.9), Branch((2,), "b", similarity=similarity))
        audits = [Audit((ChunkAudit(Chunk(0, 4, 0), "", "a", ("c",), (0.9,), 0.5, 0.5, branches),))]
        for _ in range(5):
            measured.add_audits("train", audits, [PolicyScores(*torch.ones(3, 16))], 0.0, False)
        assert measured.take("train")["branches/advantage_std"] == pytest.approx(similarity - 0.9)
        assert ("hardly differed" in caplog.text) == warns

    def test_custom_weights_are_not_judged_by_the_mean(self, tmp_path, tiny_model_dir):
        """A function may subtract a baseline of its own."""
        own = make_trainer(tmp_path, tiny_model_dir, chunk_weights=lambda chunks: chunks.posteriors - 0.5)
        assert not own.step_metrics._is_plain

    @pytest.mark.case("P3")
    @pytest.mark.parametrize(("temperature", "warns"), [(1.0, True), (0.0, False)])
    def test_rollouts_that_are_all_equal(self, tmp_path, tiny_model_dir, temperature, warns, caplog, monkeypatch):
        """A cache answers: N observations that are one. Greedy rollouts are equal by design."""
        monkeypatch.setattr(metrics, "LONG_ROLLOUT", 16)
        trainer = make_trainer(
            tmp_path,
            tiny_model_dir,
            teacher=ScriptedTeacher(lambda prefix, index: LONG),
            chunk_length=40,
            teacher_temperature=temperature,
        )
        trainer.train()
        assert ("longer rollouts equal an earlier one of their chunk" in caplog.text) == warns


@pytest.mark.case("U6")
def test_dollars_per_step_and_in_total(tmp_path, tiny_model_dir, services):
    """What the budget counts, per step, audit and job, and what is left; without a price there is no metric."""
    service = SERVICES[1]
    settings = {"dataset": questions(16), "max_steps": 2, "learning_rate": 0.0, "teacher_continuation": "instruct"}
    prices = {"teacher_input_price": 1000.0, "teacher_output_price": 2000.0}

    def run(path, **overrides):
        with Loopback(service.answer) as server:
            trainer = make_trainer(
                path, tiny_model_dir, teacher=service.name, teacher_base_url=server.url + service.path, **overrides
            )
            start = trainer.teacher.budget.usd_spent
            trainer.train()
        return trainer, start

    limits = {"teacher_budget_usd": 1e6, "teacher_budget_tokens": 10**9}
    trainer, probe = run(tmp_path / "a", **settings, **prices, **limits, log_completions=True)
    first, second = (entry for entry in trainer.state.log_history if "teacher/usd" in entry)
    assert probe > 0
    assert first["teacher/usd"] > 0
    assert first["teacher/usd_total"] == pytest.approx(probe + first["teacher/usd"])
    assert second["teacher/usd_total"] == pytest.approx(first["teacher/usd_total"] + second["teacher/usd"])
    for entry in (first, second):
        assert entry["teacher/usd_left"] == pytest.approx(1e6 - entry["teacher/usd_total"])
    used = trainer.teacher.budget.used
    assert second["teacher/tokens_left"] == 10**9 - used.prompt_tokens - used.completion_tokens
    # What each audit cost, in memory and in the journal.
    table = pq.read_table(tmp_path / "a" / "completions" / "audits_00002.parquet").to_pylist()
    in_table = {row["index"]: (row["trajectory_usd"], row["trajectory_tokens"]) for row in table}
    recorded = {
        audited.index: (
            pytest.approx(audited.usd),
            audited.usage.prompt_tokens + audited.usage.completion_tokens,
        )
        for audited in read_audits(tmp_path / "a", list_audits(tmp_path / "a", step=1))
        if audited.chunks
    }
    assert in_table == recorded
    assert sum(usd for usd, _ in in_table.values()) == pytest.approx(second["teacher/usd"])
    run_usd, job_usd = trainer.step_metrics.dollars()
    assert job_usd == pytest.approx(second["teacher/usd_total"])
    assert run_usd == pytest.approx(job_usd)
    # A second run in the folder counts what the first one has spent.
    again, _ = run(tmp_path / "a", **settings, **prices, num_rollouts=2)
    assert again.step_metrics.dollars()[1] == pytest.approx(job_usd + again.step_metrics.dollars()[0])


def test_limits_are_those_of_the_documentation():
    """The page of metrics names them."""
    from tests.support import ROOT

    page = (ROOT / "docs" / "metrics.md").read_text()
    assert f"at least {metrics.LONG_ROLLOUT} characters" in page
    assert f"{metrics.STEPS_WITHOUT_SIGNAL} steps in a row" in page
