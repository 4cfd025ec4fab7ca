# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Branches in the trainer: the step, its gradient, the journal and the metrics."""

import json
import math
import re
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest
import torch
from peft import LoraConfig
from transformers import (
    AutoModelForCausalLM,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)
from transformers.utils import logging

from omniopd_trl import OmniOPDTrainer
from omniopd_trl.audits.types import Branch, PolicyScores, Trajectory
from omniopd_trl.cli.main import main
from omniopd_trl.errors import ConfigError, TeacherError
from omniopd_trl.journal.browse import list_audits, read_audits
from omniopd_trl.journal.store import Journal
from omniopd_trl.method import Suffix
from omniopd_trl.models.tree_attention import attention_window, last_hidden_states, why_not_packed
from omniopd_trl.report.terminal import chunks_of
from omniopd_trl.teachers import ScriptedTeacher
from omniopd_trl.trainer import objective
from omniopd_trl.trainer.audit_table import data_frame, table_row, trace_of
from omniopd_trl.trainer.batches import BranchedBatch, PackedBatch
from omniopd_trl.trainer.generation import sample_branches
from omniopd_trl.trainer.step_audits import StepAudits
from tests.support import training
from tests.support.judge import judge, mark_of
from tests.support.objective import LORA, compare, load
from tests.support.ranks import Ranks
from tests.support.teachers import Agreeing, Here, Remote
from tests.support.training import (
    FOUR_MICRO_BATCHES,
    FOUR_STEPS,
    Imitation,
    RecordingTrainer,
    cut_rollouts,
    kept_log_mass,
    make_trainer,
    normalized,
    perturb,
    questions,
    similarity,
    step_and_gradient,
    trainable,
)

K = 3
BRANCHES = {"num_branches": K, "chunk_length": 6, "min_chunk_length": 4, "num_rollouts": 2}
IMITATION = {"rollout_imitation": 0.5, "min_anchor_entropy": 0.1}


def keep_forks(trainer):
    """Let the trainer keep the trajectories with their forks, by prompt."""
    forks = {}
    original = trainer.step_audits.submit

    def submit(trajectories, scores, mode):
        forks.update({trajectories[i].prompt[-1]["content"]: trajectories[i] for i in scores})
        return original(trajectories, scores, mode)

    trainer.step_audits.submit = submit
    return forks


def dense(student, reference, batch, trajectories, tokenizer, args, sampled=None):
    """The loss in float64, one branch at a time in a row with its whole prefix, and the expected metrics.

    The marks of `tests.support.judge` decide where the settings ask for them.
    """
    student, reference = student.double().eval(), reference.double().eval()
    chunk_sum, kl_sum, num_audited, num_unaudited = torch.zeros((), dtype=torch.float64), 0.0, 0, 0
    num_forks = num_agreed = 0
    advantages = []
    imitation = Imitation(student, tokenizer, args)

    def logp_of(model, ids):
        return (model(torch.tensor([ids])).logits[0] / args.temperature).log_softmax(-1)

    for b, prompt in enumerate(batch["prompts"]):
        question = prompt[-1]["content"]
        prompt_ids = batch["prompt_ids"][b][batch["prompt_mask"][b].bool()].tolist()
        completion = batch["completion_ids"][b][batch["completion_mask"][b].bool()].tolist()
        logp = logp_of(student, prompt_ids + completion)[len(prompt_ids) - 1 : -1]
        with torch.no_grad():
            ref = logp_of(reference, prompt_ids + completion)[len(prompt_ids) - 1 : -1]
        audited = torch.zeros(len(completion), dtype=torch.bool)
        for fork in trajectories[question].forks:
            chunk = fork.chunk
            audited[chunk.start : chunk.end] = True
            branches = [list(branch.token_ids) for branch in fork.branches]
            assert branches[0] == completion[chunk.start : chunk.end]
            assert len(branches) == args.num_branches + 1
            before = tokenizer.decode(completion[: chunk.start], skip_special_tokens=True).rstrip("\ufffd")
            texts = []
            for ids in branches:
                whole = tokenizer.decode(completion[: chunk.start] + ids, skip_special_tokens=True)
                texts.append(whole.rstrip("\ufffd")[len(before) :])
            num_forks += 1
            if len({text.strip() for text in texts}) == 1:
                num_agreed += 1
                continue
            values = []
            for text in texts:
                rollouts = cut_rollouts(prompt, before, text, chunk.end - chunk.start, tokenizer, args)
                values.append(sum(similarity(text, rollout) for rollout in rollouts) / len(rollouts))
            marks = [mark_of(text) for text in texts]
            is_clear = not any(args.cascade_low < mark < args.cascade_high for mark in marks)
            if args.signal == "judge" or (args.signal == "cascade" and is_clear):
                values = marks
            else:
                length = chunk.end - chunk.start
                rollouts = cut_rollouts(prompt, before, texts[0], length, tokenizer, args)
                imitation.add(prompt_ids + completion[: chunk.start], rollouts, length)
            mean = sum(values) / len(values)
            sigma = math.sqrt(sum((v - mean) ** 2 for v in values) / len(values))
            for j, ids in enumerate(branches):
                others = values[:j] + values[j + 1 :]
                advantage = values[j] - sum(others) / len(others)
                advantages.append(advantage)
                if args.scale_advantages:
                    advantage = advantage / sigma if sigma > 1e-9 else 0.0
                rows = logp_of(student, prompt_ids + completion[: chunk.start] + ids)[-len(ids) - 1 : -1]
                scored, ratio = rows[range(len(ids)), ids], 1.0
                if sampled is not None:
                    known = sampled(trajectories[question], fork, j)
                    ratio = (scored.detach() - torch.tensor(known).double()).exp()
                    ratio = ratio.clamp(max=args.importance_sampling_clip_max)
                elif args.sampling_filters:
                    mass = torch.stack([kept_log_mass(row, token, args) for row, token in zip(rows, ids, strict=True)])
                    scored, ratio = scored - mass, mass.detach().exp()
                chunk_sum = chunk_sum - advantage * (ratio * scored).sum() / len(branches)
        kl_sum = kl_sum + ((ref.exp() * (ref - logp)).sum(-1) * ~audited).sum()
        num_audited += int(audited.sum())
        num_unaudited += int((~audited).sum())
    total = chunk_sum + imitation.sum
    return normalized(total, kl_sum, num_audited, num_unaudited, len(batch["prompts"]), args), {
        "chunk_loss": chunk_sum.item() / num_audited,
        "kl/unaudited": kl_sum.item() / num_unaudited,
        "audit/audited_fraction": num_audited / (num_audited + num_unaudited),
        "branches/agreed": num_agreed / num_forks,
        "branches/advantage_std": statistics.pstdev(advantages),
        **imitation.metrics(),
    }


def check(trainer, initial, tokenizer, **options):
    """One step equals one step along the dense gradient. Returns the logged metrics."""
    perturb(trainer.model)
    kept = keep_forks(trainer)
    gradient, student = step_and_gradient(trainer)
    loss, metrics = dense(student, load(initial), trainer.batches[0], kept, tokenizer, trainer.args, **options)
    loss.backward()
    logged = compare(trainer, gradient, student, loss, metrics)
    assert any(fork.diversity for t in kept.values() for fork in t.forks)
    return logged


@pytest.mark.parametrize(
    "settings",
    # With seed 1 no branch begins inside a character, whose rollouts the reference does not cut.
    [
        {"loss_normalization": "components", **IMITATION, **FOUR_MICRO_BATCHES},
        {"loss_normalization": "sum", "temperature": 0.7, "scale_advantages": True},
        {"fork_candidates": 4, "min_anchor_entropy": 3.0, "chunk_placement": "center", **FOUR_MICRO_BATCHES}
        | {"teacher": Agreeing, "num_rollouts": 5, "first_rollouts": 2, "seed": 1},
        {"top_p": 0.7, "chunk_overlap": "merge", "num_chunks": 4, **IMITATION, "rollout_imitation_tokens": 5},
        {"mask_truncated_completions": True, "pad_to_multiple_of": 64, "gradient_checkpointing": True, "seed": 1},
        {"teacher": Remote, **FOUR_MICRO_BATCHES},
        {"teacher": lambda: ScriptedTeacher(judge), "signal": "judge", "num_chunks": 4},
        {"teacher": lambda: ScriptedTeacher(judge), "signal": "cascade", "cascade_low": 0.4, "num_chunks": 4}
        | {"seed": 1, **IMITATION},
    ],
    ids=["components", "scaled", "candidates", "filtered", "truncated", "overlap", "judge", "cascade"],
)
def test_gradient_equals_dense_reference(tmp_path, tiny_model_dir, tiny_tokenizer, settings):
    """Loss, metrics and every weight's gradient, with shifted chunks and ended branches."""
    settings = {**BRANCHES, **settings}
    teacher = settings.pop("teacher", lambda: None)()
    check(make_trainer(tmp_path, tiny_model_dir, teacher=teacher, **settings), tiny_model_dir, tiny_tokenizer)


def test_adapters(tmp_path, tiny_model_dir, tiny_tokenizer):
    """With LoRA, the packed rows go through the adapters of the student."""
    trainer = make_trainer(tmp_path, tiny_model_dir, peft_config=LoraConfig(**LORA), **BRANCHES)
    check(trainer, tiny_model_dir, tiny_tokenizer)


def test_rollouts_that_branches_share(tmp_path, tiny_model_dir, tiny_tokenizer, monkeypatch):
    """Rollouts that begin as the trajectory, as a branch and as another rollout: each token is trained once."""
    monkeypatch.setattr(training, "script", training.repeat)
    settings = {**BRANCHES, **IMITATION, "num_rollouts": 3, "rollout_imitation_tokens": 6, **FOUR_MICRO_BATCHES}
    trainer = make_trainer(tmp_path, tiny_model_dir, **settings)
    trainer.__class__ = training.Repeating
    check(trainer, tiny_model_dir, tiny_tokenizer)
    suffixes = [suffix for batch in trainer.batches for row in batch["suffixes"] for suffix in row]
    assert any(suffix.weight and suffix.imitation for suffix in suffixes)
    assert any(suffix.weight and not suffix.imitation for suffix in suffixes)
    assert trainer.batches[0]["imitation"].count_nonzero() > 20


class OtherSampler(RecordingTrainer):
    """Completions and branches of the policy, with log-probabilities as if another model had sampled them."""

    def _sample(self, *args, **kwargs):
        completion_ids, _ = super()._sample(*args, **kwargs)
        generator = torch.Generator().manual_seed(len(completion_ids))
        noise = [torch.rand(len(ids), generator=generator).mul(4).sub(6) for ids in completion_ids]
        return completion_ids, [[round(value, 6) for value in row.tolist()] for row in noise]


def test_branches_of_another_sampler(tmp_path, tiny_model_dir, tiny_tokenizer):
    """As vLLM reports them: truncated ratios for each token. A shared token has the ratio of the trajectory's."""
    trainer = make_trainer(tmp_path, tiny_model_dir, **BRANCHES, **IMITATION)
    trainer.__class__ = OtherSampler

    def sampled(trajectory, fork, j):
        own, branch = fork.branches[0].token_ids, fork.branches[j]
        shared = next((t for t, (a, b) in enumerate(zip(own, branch.token_ids, strict=False)) if a != b), len(own))
        first = trainer._sampled[trainer.batches[0]["prompts"].index(trajectory.prompt)][fork.chunk.start :]
        known = [*first[:shared], *branch.sampling_logprobs[shared:]] if j else first
        return known[: len(branch.token_ids)]

    check(trainer, tiny_model_dir, tiny_tokenizer, sampled=sampled)


# ---- Rows ----


def in_float64(path, **options):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64, **options).eval()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("is_packed", [True, False], ids=["packed", "separate"])
def test_rows_hold_the_states_of_each_branch(tiny_model_dir, attention, is_packed):
    """Padded rows, none, one and several suffixes, of one token and of more, against a row for each branch."""
    model = in_float64(tiny_model_dir, attn_implementation=attention)
    prompts, completions = [[5, 6, 7], [8], [9, 10]], [[11, 12, 13, 14], [15, 16, 17, 18, 19, 20, 21], [22]]
    suffixes = [
        [Suffix(1, (30, 31, 32), 0.5), Suffix(3, (33,), -1.0, (-0.5,))],
        [Suffix(0, (34, 35, 36, 37), 1.0, (-1.0, None)), Suffix(0, (38, 39), 2.0), Suffix(6, (40,), 3.0)],
        [],
    ]
    size = max(map(len, completions))
    batch = {
        "prompt_ids": torch.tensor([[0] * (3 - len(ids)) + ids for ids in prompts]),
        "prompt_mask": torch.tensor([[0] * (3 - len(ids)) + [1] * len(ids) for ids in prompts]),
        "completion_ids": torch.tensor([ids + [0] * (size - len(ids)) for ids in completions]),
        "completion_mask": torch.tensor([[1] * len(ids) + [0] * (size - len(ids)) for ids in completions]),
        "audited_mask": torch.zeros(3, size, dtype=torch.bool),
        "weights": torch.zeros(3, size),
    }
    tokens = PackedBatch.of(batch, pad_token_id=0)
    rows = BranchedBatch.of(tokens, [len(ids) for ids in prompts], suffixes, 0, is_packed)
    states = last_hidden_states(model, rows.input_ids, rows.attention_mask, rows.position_ids)
    assert len(states) == (3 if is_packed else 6), "a suffix of one token needs no row"
    if is_packed:
        assert states.size(1) == tokens.input_ids.size(1) + 4, "shared prefixes are in the row once"
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        alone = model.base_model(torch.tensor([prompt + completion])).last_hidden_state[0]
        torch.testing.assert_close(states[row, : len(alone)], alone, rtol=0, atol=1e-12)

    found = list(zip(states[tuple(rows.predictors)], rows.targets.tolist(), rows.weights.tolist(), strict=True))
    for prompt, completion, of_row in zip(prompts, completions, suffixes, strict=True):
        for suffix in of_row:
            ids = prompt + completion[: suffix.start] + list(suffix.token_ids)
            alone = model.base_model(torch.tensor([ids])).last_hidden_state[0]
            for t, token in enumerate(suffix.token_ids):
                state, target, weight = found.pop(0)
                assert (target, weight) == (token, suffix.weight)
                expected = alone[len(prompt) + suffix.start + t - 1]
                torch.testing.assert_close(state, expected, rtol=0, atol=1e-12)
    assert not found
    assert rows.position_ids.max() == tokens.input_ids.size(1) - 1, "padding has a position beyond the trajectories"
    nan = math.nan
    expected = [nan, nan, nan, -0.5, -1.0, nan, nan, nan, nan, nan, nan]
    torch.testing.assert_close(rows.sampling_logprobs, torch.tensor(expected), equal_nan=True)


def test_models_that_cannot_pack(tiny_model_dir):
    """A recurrent model, an attention without masks, and a model that adds its own mask to any: all are found."""
    assert why_not_packed(in_float64(tiny_model_dir)) is None
    assert why_not_packed(load(tiny_model_dir).to(torch.bfloat16).eval()) is None
    sizes = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2}
    recurrent = MambaForCausalLM(MambaConfig(**sizes, state_size=4)).eval()
    assert "refuses the mask" in why_not_packed(recurrent) or "differ" in why_not_packed(recurrent)
    model = in_float64(tiny_model_dir)
    original = model.model.forward
    model.model.forward = lambda attention_mask, **inputs: original(**inputs)
    assert "differ by" in why_not_packed(model)
    model.config._attn_implementation = "flash_attention_2"
    assert "takes no mask of this form" in why_not_packed(model)


def test_sharded_processes_check_rows_together(monkeypatch):
    """A forward of a sharded student needs all of them: also one with shorter rows, or without any branch."""
    ranks, checked = Ranks(), ([], [])
    monkeypatch.setattr(objective, "attention_window", lambda model: None)
    monkeypatch.setattr(objective, "why_not_packed", lambda model, text, n: checked[ranks.local.rank].append(n))
    accelerator = SimpleNamespace(gather=ranks.gather, state=SimpleNamespace(deepspeed_plugin=object()))
    parts = {"accelerator": accelerator, "args": SimpleNamespace(corrected_filters=None), "pad_token_id": 0}
    branch = [Suffix(1, (5, 6, 7), 1.0)]
    steps = [(4, branch), (5, []), (20, branch)], [(9, []), (3, branch), (2, [])]

    def run(rank):
        ranks.local.rank = rank
        one, found = objective.Objective(None, 1.0, **parts, redirect=None, hidden_states=None), []
        for length, suffixes in steps[rank]:
            ids = torch.ones(1, length, dtype=torch.long)
            batch = dict.fromkeys(("prompt_ids", "prompt_mask", "completion_ids", "completion_mask"), ids)
            batch |= {"audited_mask": ids.bool(), "weights": ids.float(), "suffixes": [suffixes]}
            found.append(one._branched(torch.nn.Identity(), PackedBatch.of(batch, 0), batch).input_ids.size(1))
        return found

    with ThreadPoolExecutor(2) as pool:
        assert [*pool.map(run, (0, 1))] == [[10, 10, 42], [18, 8, 4]]
    assert checked == ([18, 42], [18, 42])


def test_attention_windows(tiny_model_dir):
    """None for full attention; the shortest one otherwise."""
    model = load(tiny_model_dir)
    assert attention_window(model) is None
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    mistral = MistralForCausalLM(MistralConfig(vocab_size=60, intermediate_size=16, sliding_window=12, **sizes))
    assert attention_window(mistral) == 12
    model.config.layer_types = ["full_attention", "sliding_attention"]
    model.config.sliding_window = 9
    assert attention_window(model) == 9


def test_separate_rows_take_the_same_step(tmp_path, tiny_model_dir, tiny_tokenizer, monkeypatch, caplog):
    """Rows beyond a sliding window are not packed: the step is that of the dense reference, and a warning says so."""
    logging.enable_propagation()
    monkeypatch.setattr(objective, "attention_window", lambda model: 8)
    trainer = make_trainer(tmp_path, tiny_model_dir, **BRANCHES, **IMITATION, **FOUR_MICRO_BATCHES)
    check(trainer, tiny_model_dir, tiny_tokenizer)
    assert caplog.text.count("Each branch is computed in a row") == 1
    assert "longer than the attention window of 8" in caplog.text


def test_windows_over_columns(tmp_path, tiny_tokenizer, caplog):
    """GPT-Neo's local attention counts columns: a branch far behind its prefix is found, and gets a row of its own."""
    logging.enable_propagation()
    sizes = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_position_embeddings": 256, "vocab_size": 300}
    student = GPTNeoForCausalLM(
        GPTNeoConfig(**sizes, attention_types=[[["global", "local"], 1]], window_size=90, initializer_range=0.3)
    )
    assert why_not_packed(student.eval()) is None
    assert "differ by" in why_not_packed(student, [1, 2, 3, 4, 5, 6], 120)
    student.save_pretrained(tmp_path / "student")
    tiny_tokenizer.save_pretrained(tmp_path / "student")
    trainer = make_trainer(tmp_path, tmp_path / "student", **{**BRANCHES, "num_branches": 7})
    check(trainer, tmp_path / "student", tiny_tokenizer)
    assert "since the states of packed branches differ" in caplog.text


# ---- Sampling ----


class Processes:
    """An accelerator of two processes, where the other one has these sizes."""

    device = torch.device("cpu")

    def __init__(self, *other):
        self.other = torch.tensor([other]) if other else None

    def gather(self, sizes):
        return sizes if self.other is None else torch.cat([sizes, self.other])


def sample(prefixes, accelerator, max_tokens=1000, from_trees=False, **options):
    calls = []

    def generate(prompts, limit):
        calls.append((prompts, limit))
        return [[len(ids), *range(limit)][:limit] for ids in prompts], options.get("logprobs")

    filler = {"filler": [1], "accelerator": accelerator}
    limits = {"num_branches": 2, "max_tokens": max_tokens, "from_trees": from_trees}
    return sample_branches(generate, prefixes, **limits, **filler), calls


def test_each_prefix_gets_its_branches():
    """Rows of similar length together, cut to the length of their own chunk."""
    branches, calls = sample([([7] * 3, 4), ([8] * 5, 2)], Processes(), max_tokens=27)
    assert [[b.token_ids for b in of_one] for of_one in branches] == [[(3, 0, 1, 2)] * 2, [(5, 0)] * 2]
    assert calls == [([[8] * 5, [8] * 5, [7] * 3], 4), ([[7] * 3], 4)]


def test_prefixes_of_a_trajectory_stay_together():
    """A batch counts the longest prefix of each trajectory once, and holds one trajectory at least."""
    prefixes = [([7], 4), ([7, 8, 9], 4), ([5] * 6, 2), ([6] * 2, 3)]
    branches, calls = sample(prefixes, Processes(), max_tokens=28, from_trees=True)
    assert [[b.token_ids[0] for b in of_one] for of_one in branches] == [[1, 1], [3, 3], [6, 6], [2, 2]]
    two = [[[7], [7], [7, 8, 9], [7, 8, 9]], [[5] * 6, [5] * 6, [6] * 2, [6] * 2]]  # 3 + 4 * 4, and 2 * (6 + 2 * 4)
    assert calls == [(rows, 4) for rows in two]
    _, calls = sample(prefixes, Processes(), max_tokens=1, from_trees=True)
    assert [len(rows) for rows, _ in calls] == [4, 2, 2]


def test_every_process_generates_as_many_batches():
    """Each with the longest chunk of all processes, as forward passes may be collective. Fillers are dropped."""
    branches, calls = sample([([7] * 3, 4)], Processes(3, 5, 6))
    assert calls == [([[7] * 3] * 2, 6), ([[1]], 6), ([[1]], 6)]
    assert [b.token_ids for b in branches[0]] == [(3, 0, 1, 2)] * 2
    assert sample([], Processes(1, 3, 4)) == ([], [([[1]], 4)])
    assert sample([], Processes()) == ([], [])


def test_an_engine_of_all_processes_gets_equally_many_rows():
    """One batch, which vLLM's server divides by the number of processes."""
    branches, calls = sample([([7] * 3, 4)], Processes(1, 5, 4), max_tokens=None)
    assert calls == [([[7] * 3, [7] * 3, [1], [1], [1]], 4)]
    assert len(branches[0]) == 2


@pytest.mark.parametrize("from_trees", [True, False], ids=["tree", "whole prefixes"])
def test_branches_are_draws_of_the_policy(tmp_path, tiny_model_dir, tiny_tokenizer, monkeypatch, caplog, from_trees):
    """At the temperature and with the filters of the trajectories: frequencies of first tokens, and their support."""
    logging.enable_propagation()
    if not from_trees:
        monkeypatch.setattr(objective, "why_no_tree", lambda *_: "of the test")
    trainer = make_trainer(tmp_path, tiny_model_dir, num_branches=1000, temperature=0.5, top_k=4, chunk_length=6)
    trainer.model.train()
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.mul_(1.5)
    batch = {"prompt_ids": torch.ones(1, 2, dtype=torch.long), "prompt_mask": torch.ones(1, 2)}
    batch = {k: v.repeat(1000, 1) for k, v in batch.items()}
    prefix = tiny_tokenizer("Tom has 3 apples")["input_ids"]
    passes = []
    trainer.model.get_input_embeddings().register_forward_pre_hook(lambda _, args: passes.append(len(args[0])))
    _, branches = trainer._sample_branches([(prefix[:-1], 1), (prefix, 2)], batch, 0)
    assert max(passes) == (1 if from_trees else 2000)
    logits = trainer.model(torch.tensor([prefix])).logits[0, -1] / 0.5
    top = logits.topk(4)
    frequency = torch.tensor([[b.token_ids[0] for b in branches].count(i) / 1000 for i in top.indices.tolist()])
    assert frequency.sum() == 1
    assert (frequency - top.values.softmax(-1)).abs().max() < 0.06
    _, again = trainer._sample_branches([(prefix[:-1], 1), (prefix, 2)], batch, 0)
    assert again == branches, "a step is not reproducible"
    _, other = trainer._sample_branches([(prefix[:-1], 1), (prefix, 2)], batch, 1)
    assert other != branches
    assert trainer.generation_config.max_new_tokens == 40
    # Batches of one part have seeds of their own, or equal rows would get equal branches.
    trainer.args.num_branches, original, purposes = 2, trainer._sample, []
    trainer._sample = lambda *args, **kwargs: purposes.append(kwargs["purpose"]) or original(*args, **kwargs)
    trainer._sample_branches([([5] * 20, 6), ([6] * 20, 6)], {k: v[:1] for k, v in batch.items()}, 0)
    assert len({*purposes}) == len(purposes) == (2 if from_trees else 4)
    assert caplog.text.count("sampled from its whole prefix, since of the test") == (not from_trees)


# ---- The journal ----

RUN = {**FOUR_STEPS, **BRANCHES, **IMITATION, "max_steps": 2, "save_steps": 1}


def not_sampled(*args, **kwargs):
    raise AssertionError("the student has generated again")


def test_recorded_branches_are_replayed(tmp_path, tiny_model_dir):
    """Same branches, advantages and ratios, and the same step, without a draw and without a request."""
    first = make_trainer(tmp_path, tiny_model_dir, teacher=Remote(), **RUN)
    first.__class__ = OtherSampler
    first.train()
    again = make_trainer(tmp_path, tiny_model_dir, teacher=Remote.silent(), **RUN)
    again.model.generate = not_sampled
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    torch.testing.assert_close(trainable(again.model), trainable(first.model), rtol=0, atol=0)
    for name in ("branches/agreed", "imitation/loss", "imitation/tokens", "imitation/left_out"):
        assert again.state.log_history[1][name] == first.state.log_history[1][name], name


def test_branches_of_unfinished_audits_are_replayed(tmp_path, tiny_model_dir):
    """A teacher that fails after its first answers: the others are asked for the branches that were recorded."""
    settings = {**RUN, "max_steps": 1}
    teacher = Remote()
    failing = make_trainer(tmp_path, tiny_model_dir, teacher=teacher, **settings)
    kept = keep_forks(failing)
    submit = failing.step_audits.submit

    def submit_until_answered(*args):
        for _ in range(1000 * bool(teacher.calls)):
            teacher.is_silent = bool(teacher.finished)
            if teacher.is_silent:
                break
            time.sleep(0.01)
        return submit(*args)

    failing.step_audits.submit = submit_until_answered
    with pytest.raises(TeacherError):
        failing.train()
    teacher = Remote()
    again = make_trainer(tmp_path, tiny_model_dir, teacher=teacher, **settings)
    again.model.generate = not_sampled
    replayed = keep_forks(again)
    again.train(resume_from_checkpoint=True)
    assert {prompt: t.forks for prompt, t in replayed.items()} == {prompt: t.forks for prompt, t in kept.items()}
    num_asked = sum(any(fork.diversity for fork in t.forks) for t in kept.values())
    assert 0 < teacher.calls < num_asked, "what was answered is asked for again, or nothing is"


def test_trajectories_without_recorded_branches_get_new_ones(tmp_path, tiny_model_dir, monkeypatch):
    """A run that was killed between the two samples them again, and gets the same: they have a seed of their own."""
    settings = {**RUN, "max_steps": 1}

    def killed(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Journal, "record_forks", killed)
        make_trainer(tmp_path, tiny_model_dir, teacher=Remote(), **settings).train()
    runs = []
    for folder, resumes in ((tmp_path, True), (tmp_path / "whole", False)):
        trainer = make_trainer(folder, tiny_model_dir, teacher=Remote(), **settings)
        kept = keep_forks(trainer)
        trainer.train(resume_from_checkpoint=resumes)
        runs.append({prompt: t.forks for prompt, t in kept.items()})
    assert runs[0] == runs[1]
    assert any(runs[0].values())


def test_a_process_whose_branches_are_recorded_takes_part(tmp_path, tiny_model_dir):
    """Sampling is collective. After an interruption between two records, one process has branches and one has none."""
    ranks, trainer = Ranks(), make_trainer(tmp_path, tiny_model_dir, **BRANCHES)
    trajectory, calls = Trajectory("What?", [5], [*range(6, 30)]), {0: [], 1: []}

    def process(rank):
        ranks.local.rank = rank
        parts = (trainer.auditor, SimpleNamespace(journal=None), ranks, trainer.args)
        audits = StepAudits(*parts, callbacks=trainer.callback_handler, step=lambda: 0)
        audits._known_forks = {0: ()} if rank == 0 else {}

        def sample(prefixes):
            calls[rank].append(len(prefixes))
            return [[Branch((7, 8), "")] * K for _ in prefixes]

        return audits.fork([trajectory], {0: PolicyScores(*torch.rand(3, 24))}, sample)[0].forks

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(process, (0, 1))
    assert calls == {0: [0], 1: [2]}
    assert first == ()
    assert [branch.token_ids for branch in second[0].branches[1:]] == [(7, 8)] * K


def test_what_people_see_of_branches(tmp_path, tiny_model_dir, capsys):
    """The journal holds the branches of each fork that was asked for.

    `omniopd audits`, the tables of `log_completions` and the export show them. The first two show what is imitated of
    each rollout, too.
    """
    trainer = make_trainer(tmp_path, tiny_model_dir, log_completions=True, **BRANCHES, **IMITATION)
    kept = keep_forks(trainer)
    trainer.train()
    recorded = [*chunks_of(read_audits(tmp_path, list_audits(tmp_path)))]
    table = pq.read_table(tmp_path / "completions" / "audits_00001.parquet").to_pylist()
    assert table == [table_row(chunk, trainer._audit_table.pieces) for chunk in recorded]
    assert [sum(branch["count"] for branch in row["branches"]) for row in table] == [K + 1] * len(recorded)
    assert "advantage" in capsys.readouterr().out
    assert main(["export", str(tmp_path)]) == 0
    exported = pq.read_table(tmp_path / "_export" / "data").to_pylist()
    assert [[b["advantage"] for b in chunk["branches"]] for row in exported for chunk in row["chunks"]] == [
        [branch.advantage for branch in one.chunk.branches] for one in recorded
    ]
    assert [trace_of(one)["metadata"]["branches"] for one in recorded] == [row["branches"] for row in table]
    for text, row in zip(data_frame(table)["branches"], table, strict=True):
        for branch in row["branches"]:
            assert f"{branch['text']} (advantage {branch['advantage']:+.3f})" in text
    asked = 0
    for audit in read_audits(tmp_path, list_audits(tmp_path)):
        forks = {f.chunk.start: f for f in kept[audit.prompt[-1]["content"]].forks if f.diversity}
        asked += len(forks)
        assert {chunk.start for chunk in audit.chunks} == set(forks)
        for chunk in audit.chunks:
            assert [b.text for b in chunk.branches] == [b.text for b in forks[chunk.start].branches]
            assert [b.token_ids for b in chunk.branches] == [b.token_ids for b in forks[chunk.start].branches]
            own = chunk.branches[0]
            assert own.similarity == pytest.approx(sum(chunk.similarities) / len(chunk.similarities))
            assert chunk.weight == pytest.approx(own.advantage / (K + 1))
            assert sum(b.advantage for b in chunk.branches) == pytest.approx(0, abs=1e-12)
            distinct = chunk.distinct_branches()
            assert sum(count for _, count in distinct) == K + 1
            assert distinct[0][0] == own
            assert len(chunk.imitated) == len(chunk.rollouts)
            for rollout, part in zip(chunk.rollouts, chunk.imitated, strict=True):
                assert part is None or (part.strip("\ufffd \n") and rollout.startswith(part.strip("\ufffd \n")))
    assert asked
    # Chunks are ordered by their advantage: the posteriors weight nothing.
    places = list_audits(tmp_path)
    advantages = [[c.branches[0].advantage for c in audit.chunks] for audit in read_audits(tmp_path, places)]
    assert [(place.low, place.high) for place in places] == [
        (min(row, default=None), max(row, default=None)) for row in advantages
    ]
    capsys.readouterr()
    assert main(["audits", str(tmp_path), "--json", "--worst", "1"]) == 0
    [shown] = json.loads(capsys.readouterr().out)
    assert shown["branches"][0]["advantage"] == min(min(row) for row in advantages if row)
    assert sum(branch["count"] for branch in shown["branches"]) == K + 1
    assert all("imitated" in rollout for rollout in shown["rollouts"])
    assert main(["audits", str(tmp_path), "--worst", "1"]) == 0
    printed = capsys.readouterr().out
    assert "advantage" in printed
    assert "imitated" in printed
    assert f"{shown['branches'][0]['advantage']:+.3f}" in printed


class Uncut(RecordingTrainer):
    """Completions as they were sampled."""

    _generate_single_turn = OmniOPDTrainer._generate_single_turn


def test_forks_whose_branches_agree_are_not_asked_for(tmp_path, tiny_model_dir, caplog):
    """A student without a choice: no request, no chunk loss, and the anchor leaves the forks out."""
    logging.enable_propagation()
    teacher = Here()
    trainer = make_trainer(
        tmp_path, tiny_model_dir, teacher=teacher, top_k=1, importance_sampling_correction=False, **BRANCHES
    )
    trainer.__class__ = Uncut
    trainer.train()
    assert teacher.calls == 0
    [batch], logged = trainer.batches, trainer.state.log_history[0]
    assert logged["branches/agreed"] == 1
    assert logged["chunk_loss"] == 0
    assert batch["audited_mask"].any()
    assert not batch["weights"].any()
    assert not any(batch["suffixes"])
    assert logged["audit/audited_fraction"] == pytest.approx(
        (batch["audited_mask"].sum() / batch["completion_mask"].sum()).item()
    )
    assert "audit/posterior" not in logged
    assert "or the branches of each fork have one text" in caplog.text


def test_forks_without_rollouts_are_anchored(tmp_path, tiny_model_dir):
    """A fork that the teacher refuses is not trained, and its tokens are un-audited."""
    refusing = ScriptedTeacher(lambda prefix, i: training.script(prefix, i) if len(prefix.completion) % 2 else None)
    trainer = make_trainer(tmp_path, tiny_model_dir, teacher=refusing, max_failed_chunks=1.0, **BRANCHES)
    trainer.train()
    audits, [batch] = [*read_audits(tmp_path, list_audits(tmp_path))], trainer.batches
    audited = torch.zeros_like(batch["audited_mask"])
    for audit in audits:
        for chunk in audit.chunks:
            audited[audit.index, chunk.start : chunk.end] = True
    assert torch.equal(batch["audited_mask"], audited)
    assert all(audited[row, suffix.start] for row, of_row in enumerate(batch["suffixes"]) for suffix in of_row)
    assert any(batch["suffixes"])
    assert any(audit.num_dropped for audit in audits)


def test_the_control_permutes_the_advantages_of_a_fork(tmp_path, tiny_model_dir):
    """The rollouts and the advantages in the journal are those of the plain run; the weights are others.

    The journal holds the weights that were used: those of a chunk's last token, if no branch is equal to the chunk.
    """
    steps = []
    for baseline in ("none", "shuffled"):
        trainer = make_trainer(tmp_path / baseline, tiny_model_dir, posterior_baseline=baseline, **BRANCHES)
        trainer.train()
        audits = [*read_audits(tmp_path / baseline, list_audits(tmp_path / baseline))]
        advantages = [[b.advantage for b in chunk.branches] for audit in audits for chunk in audit.chunks]
        for audit in audits:
            used = trainer.batches[0]["weights"][audit.index]
            assert [chunk.weight for chunk in audit.chunks] == pytest.approx(
                [used[chunk.end - 1].item() for chunk in audit.chunks]
            )
        steps.append((advantages, trainer.batches[0]["weights"], trainer.state.log_history[0]["branches/similarity"]))
    assert steps[0][0] == steps[1][0]
    assert steps[0][2] == steps[1][2]
    assert not torch.equal(steps[0][1], steps[1][1])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_branches": -1}, "num_branches=-1 must be a whole number of at least 0"),
        ({"num_branches": True}, "num_branches=True must be a whole number"),
        (
            {"fork_candidates": 8},
            "fork_candidates=8 has no effect without branches. Set num_branches, to 7 for example, or fork_",
        ),
        ({"scale_advantages": True}, "scale_advantages=True has no effect without branches"),
        ({"num_branches": 3, "fork_candidates": 1}, "fork_candidates=1 is less than num_chunks=2"),
        ({"num_branches": 3, "posterior_baseline": "batch"}, "posterior_baseline='batch' and num_branches=3"),
        ({"num_branches": 3, "prior": "reference"}, "prior='reference' has no effect with num_branches=3"),
        (
            {"num_branches": 3, "generation_kwargs": {"min_new_tokens": 5}},
            "min_new_tokens with num_branches=3: it dep",
        ),
        (
            {"num_branches": 3, "use_vllm": True, "vllm_structured_outputs_regex": "a*"},
            "vllm_structured_outputs_regex with num_branches=3",
        ),
        ({"num_branches": 3, "chunk_weights": lambda chunks: chunks.posteriors}, "`chunk_weights` cannot be used"),
        ({"min_anchor_entropy": -1.0}, "min_anchor_entropy=-1.0 must not be negative"),
    ],
)
def test_settings_without_a_meaning_are_refused(tmp_path, tiny_model_dir, settings, words):
    with pytest.raises(ConfigError, match=re.escape(words)):
        make_trainer(tmp_path, tiny_model_dir, **settings)


def test_an_evaluation_audits_chunks_as_in_the_paper(tmp_path, tiny_model_dir):
    """It asks for `num_chunks` chunks, not for the candidates, imitates nothing, and logs the paper's metrics."""
    settings = {**BRANCHES, **IMITATION, "fork_candidates": 4, "num_chunks": 1, "audit_eval": True}
    trainer = make_trainer(tmp_path, tiny_model_dir, eval_dataset=questions(4), **settings)
    trainer._sample_branches = not_sampled
    logged = trainer.evaluate()
    assert logged["eval_audit/num_chunks"] == 1
    assert logged["eval_audit/posterior"] > 0
    assert not {"eval_branches/agreed", "eval_imitation/loss"} & set(logged)
