# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""A verifier beside the teacher: the step and its gradient, what the teacher is asked, records and resuming."""

import json
import re

import pandas as pd
import pytest
import torch
from datasets import Dataset
from transformers.utils import logging

from omniopd_trl import OmniOPDConfig
from omniopd_trl.cli.main import main
from omniopd_trl.errors import ConfigError, DataError
from omniopd_trl.journal.browse import list_audits, read_audits
from omniopd_trl.report.page import OUTCOMES, _details
from omniopd_trl.report.runs import Run
from omniopd_trl.trainer.plan import Requests, forecast_run
from tests.support.objective import check, compare, load
from tests.support.teachers import Here, Remote
from tests.support.training import (
    FOUR_MICRO_BATCHES,
    FOUR_STEPS,
    RecordingTrainer,
    dense_objective,
    make_trainer,
    perturb,
    questions,
    step_and_gradient,
    trainable,
)

BRANCHES = {"num_branches": 3, "chunk_length": 6, "min_chunk_length": 4, "num_rollouts": 2}


def by_length(completion_ids, **kwargs):
    """1 for every third length, else 0 or 0.5; nothing for one length, which trajectories without a chunk have."""
    return [None if len(ids) == 9 else (len(ids) % 3) / 2 for ids in completion_ids]


def short(completion_ids, **kwargs):
    return [float(len(ids) < 20) for ids in completion_ids]


VERIFIER = {"reward_funcs": by_length, "num_generations": 4, "reward_weight": 0.7}


def expected(batch, args):
    """Advantage of each trajectory, and whether the teacher is asked about it, with plain loops."""
    lengths = batch["completion_ids_before"]
    scores = [[r for r in (by_length([ids])[0], short([ids])[0]) if r is not None] for ids in lengths]
    if args.reward_weights is None:
        rewards, right = zip(*[(s[0], s[0] >= 1) if len(s) == 2 else (None, False) for s in scores], strict=True)
    else:
        a, b = args.reward_weights
        rewards = [a * s[0] + b * s[1] if len(s) == 2 else b * s[0] for s in scores]
        right = [all(one >= 1 for one in s) for s in scores]
    verified, size = [], args.num_generations
    for i, reward in enumerate(rewards):
        group = [r for r in rewards[i // size * size : i // size * size + size] if r is not None]
        advantage = 0.0 if reward is None or len(set(group)) == 1 else reward - sum(group) / len(group)
        is_chosen = {"all": True, "wrong": not right[i], "mixed": len(set(group)) > 1}[args.audit_trajectories]
        verified.append((advantage, is_chosen))
    return verified


class Trainer(RecordingTrainer):
    """Keeps the completions as the verifier saw them."""

    def _generate_and_score_completions(self, inputs):
        verify, seen = self.verifier.verify, []

        def keep(inputs, batch, *args):
            masks = batch["completion_mask"].bool()
            seen.extend(ids[mask].tolist() for ids, mask in zip(batch["completion_ids"], masks, strict=True))
            return verify(inputs, batch, *args)

        self.verifier.verify = keep
        batch = super()._generate_and_score_completions(inputs)
        self.verifier.verify = verify
        self.batches[-1]["completion_ids_before"] = seen
        return batch


class OtherSampler(Trainer):
    """Completions of the policy, with log-probabilities as if another model had sampled them."""

    def _generate_single_turn(self, *args, **kwargs):
        completion_ids = super()._generate_single_turn(*args, **kwargs)
        generator = torch.Generator().manual_seed(0)
        noise = [torch.rand(len(ids), generator=generator).mul(4).sub(6) for ids in completion_ids]
        self._sampled = [[round(value, 6) for value in row.tolist()] for row in noise]
        return completion_ids


class Lazy:
    """What a test compares with after the step."""

    def __init__(self, trainer):
        self.trainer = trainer

    def __getitem__(self, index):
        return expected(self.trainer.batches[0], self.trainer.args)[index]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"loss_normalization": "components", "audit_trajectories": "wrong", **FOUR_MICRO_BATCHES},
        {"loss_normalization": "sum", "temperature": 0.7, "num_generations": 2, "audit_trajectories": "mixed"},
        {"reward_funcs": [by_length, short], "reward_weights": [0.5, 2.0], "audit_trajectories": "wrong"}
        | {"pad_to_multiple_of": 64},
        {"top_p": 0.7, "loss_normalization": "components"},
        {"teacher": Remote, "audit_trajectories": "wrong", "gradient_checkpointing": True, **FOUR_MICRO_BATCHES},
        {"sampler": OtherSampler, "teacher": Remote, **FOUR_MICRO_BATCHES},
    ],
    ids=["plain", "components", "mixed", "two", "filtered", "overlap", "sampler"],
)
def test_gradient_equals_dense_reference(tmp_path, tiny_model_dir, tiny_tokenizer, settings):
    """Loss, metrics and every weight's gradient, against float64 and rewards by plain loops."""
    settings = {**VERIFIER, **settings}
    teacher, sampler = settings.pop("teacher", lambda: None)(), settings.pop("sampler", Trainer)
    trainer = make_trainer(tmp_path, tiny_model_dir, teacher=teacher, **settings)
    trainer.__class__ = sampler
    sampled = None
    if sampler is OtherSampler:
        generator = torch.Generator().manual_seed(0)
        sampled = [torch.rand(n, generator=generator).mul(4).sub(6).tolist() for n in (40, 31, 5, 17, 9, 40, 24, 1)]
    logged = check(trainer, tiny_model_dir, tiny_tokenizer, sampled=sampled, verified=Lazy(trainer))
    [batch], size = trainer.batches, trainer.args.num_generations
    questions_asked = [prompt[-1]["content"] for prompt in batch["prompts"]]
    assert [len(set(questions_asked[i : i + size])) for i in range(0, 8, size)] == [1] * (8 // size)
    advantages, chosen = zip(*expected(batch, trainer.args), strict=True)
    assert any(advantages)
    assert logged["audit/chosen_trajectories"] == sum(chosen) / 8
    assert (sum(chosen) < 8) == (trainer.args.audit_trajectories != "all")


def test_truncated_completions_count_in_the_group_only(tmp_path, tiny_model_dir, tiny_tokenizer):
    """They have a reward; their own tokens are not trained with `mask_truncated_completions`."""
    trainer = make_trainer(tmp_path, tiny_model_dir, mask_truncated_completions=True, **VERIFIER)
    trainer.__class__ = Trainer
    perturb(trainer.model)
    gradient, student = step_and_gradient(trainer)
    [batch] = trainer.batches
    loss, metrics = dense_objective(
        student, load(tiny_model_dir), batch, tiny_tokenizer, trainer.args, verified=Lazy(trainer)
    )
    loss.backward()
    compare(trainer, gradient, student, loss, {"kl/unaudited": metrics["kl/unaudited"]})
    masked = ~batch["completion_mask"].any(1)
    assert masked.any()
    assert batch["advantages"][~masked].any()
    assert not batch["advantages"][masked].any()


def test_branches_are_left_as_they_are(tmp_path, tiny_model_dir):
    """With branches, the verifier adds its own gradient on the trajectories, and nothing else."""
    gradients = []
    for name, settings in (("plain", {"reward_weight": 0.0}), ("verifier", {})):
        trainer = make_trainer(tmp_path / name, tiny_model_dir, **{**VERIFIER, **BRANCHES, **settings})
        trainer.__class__ = Trainer
        gradient, student = step_and_gradient(trainer)
        gradients.append(gradient)
    [batch], student = trainer.batches, student.double().eval()
    total = torch.zeros((), dtype=torch.float64)
    for b, (advantage, _) in enumerate(expected(batch, trainer.args)):
        prompt = batch["prompt_ids"][b][batch["prompt_mask"][b].bool()]
        completion = batch["completion_ids"][b][batch["completion_mask"][b].bool()]
        logp = student(torch.cat([prompt, completion])[None]).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        total = total - 0.7 * advantage * logp.gather(1, completion[:, None]).sum()
    (total / batch["completion_mask"].sum()).backward()
    assert any(batch["suffixes"])
    for name, parameter in student.named_parameters():
        added = (gradients[1][name] - gradients[0][name]).double()
        torch.testing.assert_close(added, parameter.grad, rtol=1e-3, atol=2e-6, msg=name)


def test_equal_rewards_add_exactly_nothing(tmp_path, tiny_model_dir):
    """The step is that without a verifier, bit by bit, whatever the weight."""
    steps = []
    for name, settings in (("with", {"reward_weight": 5.0}), ("without", {"reward_weight": 0.0})):
        funcs = {"reward_funcs": lambda completions, **kwargs: [0.1] * len(completions)}
        trainer = make_trainer(tmp_path / name, tiny_model_dir, num_generations=4, **funcs, **settings)
        trainer.train()
        steps.append((trainable(trainer.model), trainer.state.log_history[0]["loss"]))
    assert steps[0][1] == steps[1][1]
    assert all(torch.equal(steps[0][0][name], steps[1][0][name]) for name in steps[0][0])


def test_the_teacher_is_asked_about_the_chosen_only(tmp_path, tiny_model_dir):
    """Nothing else is requested or paid; metrics and the table of completions say what was scored."""

    def scored(completion_ids, log_metric, log_extra, **kwargs):
        log_metric("tokens", sum(map(len, completion_ids)) / len(completion_ids))
        log_extra("length", list(map(len, completion_ids)))
        return by_length(completion_ids)

    teacher = Here()
    settings = {**VERIFIER, "reward_weight": 0.0, "audit_trajectories": "wrong", "log_completions": True}
    trainer = make_trainer(tmp_path, tiny_model_dir, teacher=teacher, **{**settings, "reward_funcs": scored})
    trainer.__class__ = Trainer
    trainer.train()
    logged, [batch] = trainer.state.log_history[0], trainer.batches
    lengths = [len(ids) for ids in batch["completion_ids_before"]]
    rewards = pd.Series(by_length(batch["completion_ids_before"]))
    advantages, chosen = zip(*expected(batch, trainer.args), strict=True)
    # Those of 5 and 17 tokens have the reward 1, and that of 1 token has no chunk.
    assert lengths[2:5] == [5, 17, 9]
    assert lengths[7] == 1
    assert chosen == (True, True, False, False, True, True, True, True)
    assert teacher.calls == 5
    assert batch["audited_mask"].any(1).tolist() == [True, True, False, False, True, True, True, False]
    assert "advantages" not in batch
    assert logged["rewards/scored/mean"] == logged["reward"] == pytest.approx(rewards.mean())
    assert logged["rewards/scored/std"] == logged["reward_std"] == pytest.approx(rewards.std())
    assert logged["frac_reward_zero_std"] == 0
    assert logged["audit/chosen_trajectories"] == 6 / 8
    assert logged["tokens"] == pytest.approx(sum(lengths) / 8)
    table = pd.read_parquet(tmp_path / "completions" / "rewards_00001.parquet")
    assert table["scored"].dropna().tolist() == rewards.dropna().tolist()
    assert table["length"].tolist() == lengths
    assert table["advantage"].tolist() == pytest.approx(advantages)


# ---- Records ----


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_model_dir):
    """A run of one step with a verifier that chooses and trains."""
    settings = {**VERIFIER, "audit_trajectories": "wrong"}
    trainer = make_trainer(tmp_path_factory.mktemp("run"), tiny_model_dir, teacher=Here(), **settings)
    trainer.__class__ = Trainer
    trainer.train()
    return trainer


def test_records_show_what_was_verified(run, capsys, tmp_path):
    """The journal, `omniopd audits` and the report."""
    folder = run.args.output_dir
    audits = list(read_audits(folder, list_audits(folder)))
    known = expected(run.batches[0], run.args)
    assert [one.verified["advantage"] for one in audits] == pytest.approx([advantage for advantage, _ in known])
    assert [one.verified["is_chosen"] for one in audits] == [is_chosen for _, is_chosen in known]
    assert [one.verified["rewards"] for one in audits] == [
        {"by_length": by_length([ids])[0]} for ids in run.batches[0]["completion_ids_before"]
    ]
    left_out = dict(OUTCOMES)["left out by audit_trajectories"]
    assert [bool(left_out(one)) for one in audits] == [not is_chosen for _, is_chosen in known]
    facts = [", ".join(_details(Run(folder), one)["facts"]) for one in audits]
    assert f"reward 0.5 (by_length 0.5), advantage {known[0][0]:+.3g}" in facts[0]
    assert facts[2].endswith(f"reward 1 (by_length 1), advantage {known[2][0]:+.3g}, left out by audit_trajectories")
    assert facts[4].endswith("reward none (by_length none), advantage +0")
    assert main(["audits", folder, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert rows
    assert all(row["trajectory_verified"] == audits[row["index"]].verified for row in rows)
    assert main(["audits", folder]) == 0
    assert "reward 0.5" in " ".join(capsys.readouterr().out.split())


def test_an_export_carries_the_rewards(run, tmp_path, tiny_model_dir):
    """A run that trains from it takes the same step, without the functions; it may audit fewer trajectories."""
    source = f"export:{tmp_path / 'export'}"
    assert main(["export", run.args.output_dir, "--output", str(tmp_path / "export")]) == 0
    settings = {name: value for name, value in VERIFIER.items() if name != "reward_funcs"}
    again = make_trainer(tmp_path / "again", tiny_model_dir, teacher=source, **settings)
    again.train()
    there = trainable(run.model)
    assert all(torch.equal(weights, there[name]) for name, weights in trainable(again.model).items())
    fewer = make_trainer(tmp_path / "few", tiny_model_dir, teacher=source, audit_trajectories="mixed", **settings)
    fewer.train()
    logged = fewer.state.log_history[0]
    assert logged["rewards/by_length/mean"] == run.state.log_history[0]["rewards/by_length/mean"]
    for changes, words in (
        ({"num_generations": 2}, "num_generations=2: each prompt of the export"),
        ({"reward_funcs": by_length}, "`reward_funcs` has no effect with an export"),
        ({"reward_weights": [1.0, 2.0]}, "reward_weights=[1.0, 2.0] has 2 numbers, and there are 1 reward functions"),
    ):
        with pytest.raises(ConfigError, match=re.escape(words)):
            make_trainer(tmp_path / "other", tiny_model_dir, teacher=source, **{**settings, **changes})


def test_an_export_without_rewards_is_refused(tmp_path, tiny_model_dir):
    make_trainer(tmp_path / "plain", tiny_model_dir, num_generations=4).train()
    assert main(["export", str(tmp_path / "plain")]) == 0
    source = f"export:{tmp_path / 'plain' / '_export'}"
    with pytest.raises(ConfigError, match=r"reward_weight=0.5.* holds no rewards"):
        make_trainer(tmp_path, tiny_model_dir, teacher=source, num_generations=4, reward_weight=0.5)


def test_a_resumed_run_replays_the_rewards(tmp_path, tiny_model_dir):
    """Neither the functions nor the teacher are asked again. Another function replays nothing."""
    calls = []

    def counted(completion_ids, **kwargs):
        calls.append(len(completion_ids))
        return by_length(completion_ids)

    settings = {**FOUR_STEPS, **VERIFIER, "reward_funcs": counted, "audit_trajectories": "wrong"}
    first = make_trainer(tmp_path, tiny_model_dir, teacher=Remote(), **settings)
    first.train()
    assert calls == [8] * 4
    again = make_trainer(tmp_path, tiny_model_dir, teacher=Remote.silent(), **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    there = trainable(first.model)
    assert all(torch.equal(weights, there[name]) for name, weights in trainable(again.model).items())
    assert calls == [8] * 4
    other = make_trainer(tmp_path, tiny_model_dir, teacher=Remote(), **{**settings, "reward_funcs": short})
    other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert other.teacher.calls > 0


# ---- Settings ----


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"reward_weight": 0.5}, "reward_weight=0.5 with num_generations=1: the advantage"),
        ({"audit_trajectories": "mixed"}, "audit_trajectories='mixed' with num_generations=1: the rewards"),
        ({"audit_trajectories": "right"}, "audit_trajectories='right' is unknown; choose one of all, wrong, mixed"),
        ({"num_generations": 0}, "num_generations=0 must be a whole number of at least 1"),
        ({"num_generations": 3}, "num_generations=3 does not divide the 8 trajectories of a step"),
        ({"reward_weight": -1.0}, "reward_weight=-1.0 must not be negative"),
        ({"reward_weights": 0.5}, "reward_weights=0.5 must hold one finite number for each"),
        ({"reward_weights": ["1"]}, "reward_weights=['1'] must hold one finite number for each"),
        ({"reward_weights": [1.0, 2.0], "reward_funcs": by_length}, "reward_weights=[1.0, 2.0] has 2 numbers"),
        (
            {"reward_weights": [0], "reward_weight": 0.5, "num_generations": 2},
            "reward_weights=[0] with reward_weight=0.5",
        ),
        (
            {"reward_weights": [-1, 0], "audit_trajectories": "wrong"},
            "no reward function counts. Give one a weight above 0",
        ),
        ({"reward_funcs": 3}, "`reward_funcs` holds 3, which is neither a function nor a reward model"),
        (
            {"audit_trajectories": "wrong", "dataset": questions().remove_columns("answer")},
            "reward_weight=0, audit_trajectories='wrong' needs a reward: the training set has neither",
        ),
    ],
)
def test_settings_without_a_meaning_are_refused(tmp_path, tiny_model_dir, settings, words):
    with pytest.raises(ConfigError, match=re.escape(words)):
        make_trainer(tmp_path, tiny_model_dir, **settings)


def test_a_penalty_alone_is_a_reward():
    """Its weight is negative. Only the choice of the wrong trajectories needs one above 0."""
    OmniOPDConfig(reward_weights=[-0.5], reward_weight=1.0, num_generations=2, use_cpu=True, bf16=False)


def test_a_training_set_must_fill_a_step(tmp_path, tiny_model_dir):
    """With groups, a step takes fewer prompts."""
    make_trainer(tmp_path / "a", tiny_model_dir, num_generations=4, dataset=questions(2))
    with pytest.raises(DataError, match=r"has 1 rows, and a step takes 2 .*, divided by num_generations=4"):
        make_trainer(tmp_path / "b", tiny_model_dir, num_generations=4, dataset=questions(1))


@pytest.mark.parametrize(
    ("returned", "words"),
    [([1.0], "returned 1 scores for 8 samples"), ([float("inf")] * 8, "returned an infinite score")],
)
def test_functions_that_do_not_score_end_the_run(tmp_path, tiny_model_dir, returned, words):
    """As in an evaluation, before anything is recorded or paid."""
    teacher = Remote()
    trainer = make_trainer(tmp_path, tiny_model_dir, teacher=teacher, reward_funcs=lambda **kwargs: returned)
    with pytest.raises(ConfigError, match=words):
        trainer.train()
    assert teacher.calls == 0


@pytest.mark.parametrize("shuffle", [True, False])
def test_groups_of_a_stream(tmp_path, tiny_model_dir, shuffle):
    """The trajectories of a group follow each other, in the order of a map-style dataset without shuffling."""
    settings = {"num_generations": 4, "shuffle_dataset": shuffle, "max_steps": 3, **FOUR_MICRO_BATCHES}
    dataset = questions(5).to_iterable_dataset()
    trainer = make_trainer(tmp_path, tiny_model_dir, dataset=dataset, reward_funcs=short, **settings)
    trainer.train()
    prompts = [prompt[-1]["content"] for batch in trainer.batches for prompt in batch["prompts"]]
    assert len(prompts) == 24
    groups = [prompts[i : i + 4] for i in range(0, 24, 4)]
    assert all(len(set(group)) == 1 for group in groups)
    order = [row["prompt"][-1]["content"] for row in questions(5)]
    seen = [group[0] for group in groups]
    assert (seen == [*order, order[0]]) != shuffle


def test_a_stream_with_other_answers(tmp_path, tiny_model_dir, caplog):
    """What was recorded with other right answers is neither replayed nor rewarded as before."""
    logging.enable_propagation()

    def trained(answer):
        stream = Dataset.from_list([{**row, "answer": answer} for row in questions(8)]).to_iterable_dataset()
        trainer = make_trainer(tmp_path, tiny_model_dir, teacher=Here(), dataset=stream, learning_rate=0.0, **settings)
        trainer.train(resume_from_checkpoint=any(tmp_path.iterdir()))
        return trainer.teacher_usage.completion_tokens, trainer.batches[0]["advantages"].abs().sum()

    def is_even(answer, completion_ids, **kwargs):
        return [float(one == "even" and len(ids) % 2 == 0) for one, ids in zip(answer, completion_ids, strict=True)]

    settings = {**VERIFIER, "reward_funcs": is_even, "per_device_train_batch_size": 4}
    tokens, advantage = trained("even")
    assert advantage > 0
    assert trained("even") == (0, advantage)
    assert "not replayed" not in caplog.text
    assert trained("none") == (tokens, 0)
    assert "or other columns for a verifier, and is not replayed" in caplog.text


def test_the_forecast_counts_groups(run):
    """A step of eight trajectories has two prompts, whose SFT solutions are counted once."""
    requests = Requests.of(run.args, None, None)
    load = forecast_run(
        run.args,
        requests,
        None,
        prompt_tokens=[10.0],
        trajectory_length=40,
        trajectories_per_step=8,
        steps=3,
        num_rows=None,
    )
    assert load.step.requests == 8 * load.trajectory.requests
    assert load.sft_run.requests == 6
