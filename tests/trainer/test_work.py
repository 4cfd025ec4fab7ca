# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Work per step: how often models run and heads project, as docs/benchmarks.md counts it, and how much is padding."""

import re
from collections import Counter
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM
from trl import DistillationConfig, DistillationTrainer

from omniopd_trl import OmniOPDConfig, OmniOPDTrainer
from omniopd_trl.teachers import ScriptedTeacher
from tests.support import ROOT
from tests.support.training import NUM_PROMPTS, make_trainer, questions, script, within

PAGE = ROOT / "docs" / "benchmarks.md"
VOCABULARY = 331  # no other size in the model: a matrix product with this dimension is one with the head
TOKENS, ROWS = 32, 4
END = 1  # the end token of the tiny models
GENERATION, SCORING, FORWARD, BACKWARD = "generation", "scoring", "loss, forward", "loss, backward"


class HeadProducts(TorchDispatchMode):
    """Counts rows of matrix products in which the vocabulary is a dimension, and tokens of decoders, by phase."""

    def __init__(self):
        super().__init__()
        self.phase = "other"
        self.rows: Counter[str] = Counter()
        self.decoder_tokens: Counter[tuple[str, str]] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            a, b = [x for x in args if isinstance(x, torch.Tensor)][-2:]
            sizes = [*a.shape, b.shape[1]]
            if VOCABULARY in sizes:
                sizes.remove(VOCABULARY)
                sizes.remove(32)  # the hidden size
                self.rows[self.phase] += sizes[0]
        return func(*args, **(kwargs or {}))

    @contextmanager
    def during(self, phase):
        before, self.phase = self.phase, phase
        try:
            yield
        finally:
            self.phase = before

    def watch(self, trainer, models):
        for name, model in models.items():

            def count(module, args, kwargs, name=name):
                self.decoder_tokens[self.phase, name] += kwargs["input_ids"].numel()

            model.model.register_forward_pre_hook(count, with_kwargs=True)
        within(trainer, "_generate_single_turn", partial(self.during, GENERATION))
        within(trainer, "compute_loss", partial(self.during, FORWARD))
        if isinstance(trainer, OmniOPDTrainer):
            within(trainer.objective, "score", partial(self.during, SCORING))
        within(trainer.accelerator, "backward", partial(self.during, BACKWARD))


@pytest.fixture
def student(make_tiny_model):
    path = make_tiny_model(seed=8, vocab_size=VOCABULARY)
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def settings(path):
    """For both trainers; completions never end before their length."""
    return {
        "output_dir": str(path),
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "max_completion_length": TOKENS,
        "generation_kwargs": {"suppress_tokens": [END]},
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 1,
    }


def one_question():
    """The same prompt in each row: nothing is padded, so every token that is counted is a real one."""
    data = questions(1)
    return data.select([0] * ROWS)


def measured(trainer, other):
    """Counts of one step, per token: decoder passes of student and other model, and products with a head."""
    count = HeadProducts()
    count.watch(trainer, {"student": trainer.model, "other": other})
    with count:
        trainer.train()
    prompt = trainer._buffered_inputs[0]["prompt_ids"].size(1)
    whole = ROWS * (prompt + TOKENS)
    passes = {key: tokens / whole for key, tokens in count.decoder_tokens.items()}
    # The last new token is never fed, and all others once.
    fed = count.decoder_tokens[GENERATION, "student"]
    assert fed == ROWS * (prompt + TOKENS - 1)
    passes[GENERATION, "student"] = 1.0
    products = {phase: rows / (ROWS * TOKENS) for phase, rows in count.rows.items()}
    return passes, products


def documented():
    """The page's table: row -> (ours, TRL's)."""
    rows = re.findall(r"^\| (.+?) \| ([\d.]+|-) \| ([\d.]+|-) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    return {name: tuple(0.0 if cell == "-" else float(cell) for cell in cells) for name, *cells in rows}


def test_work_of_a_step(tmp_path, student, tiny_tokenizer):
    """Ours: one pass of each kind, every token projected once for scoring and once per model for the loss."""
    args = OmniOPDConfig(**settings(tmp_path), num_chunks=2, chunk_length=8, num_rollouts=2)
    trainer = OmniOPDTrainer(student, ScriptedTeacher(script), args, one_question(), processing_class=tiny_tokenizer)
    passes, products = measured(trainer, trainer.ref_model)
    table = documented()
    assert passes == {
        (GENERATION, "student"): table["student's forward, in generation"][0],
        (SCORING, "student"): table["student's forward without gradients, scoring"][0],
        (FORWARD, "student"): table["student's forward and backward"][0],
        (FORWARD, "other"): table["reference's or teacher's forward"][0],
    }
    audited = 2 * 8 / TOKENS
    backward = (
        audited * table["products with a head, backward, audited token"][0]
        + (1 - audited) * table["products with a head, backward, other token"][0]
    )
    assert products == {
        GENERATION: table["products with a head, generation"][0],
        SCORING: table["products with a head, scoring"][0],
        FORWARD: table["products with a head, loss"][0],
        BACKWARD: backward,
    }


def test_work_of_a_step_of_trl(tmp_path, student, make_tiny_model, tiny_tokenizer):
    """What the page says of TRL's trainer is what this release does."""
    teacher = AutoModelForCausalLM.from_pretrained(make_tiny_model(seed=9, vocab_size=VOCABULARY), dtype=torch.float32)
    args = DistillationConfig(**settings(tmp_path))
    trainer = DistillationTrainer(student, teacher, args, one_question(), processing_class=tiny_tokenizer)
    passes, products = measured(trainer, teacher)
    table = documented()
    assert passes == {
        (GENERATION, "student"): table["student's forward, in generation"][1],
        (FORWARD, "student"): table["student's forward and backward"][1],
        (FORWARD, "other"): table["reference's or teacher's forward"][1],
    }
    assert table["student's forward without gradients, scoring"][1] == table["products with a head, scoring"][1] == 0
    assert products == {
        GENERATION: table["products with a head, generation"][1],
        FORWARD: table["products with a head, loss"][1],
        BACKWARD: table["products with a head, backward, other token"][1],
    }


def test_work_of_branches(tmp_path, student, tiny_tokenizer):
    """What a branch does not share with its trajectory is in the row once, and only the student computes it."""
    rows = {**settings(tmp_path), "per_device_train_batch_size": 1, "gradient_accumulation_steps": ROWS}
    args = OmniOPDConfig(**rows, num_chunks=2, chunk_length=8, num_rollouts=2, num_branches=3)
    trainer = OmniOPDTrainer(student, ScriptedTeacher(script), args, one_question(), processing_class=tiny_tokenizer)
    trainer.objective._checked = 10**9  # the check of the student computes rows of its own
    count, suffixes, compute_loss = HeadProducts(), [], trainer.compute_loss

    def keep(model, inputs, *arguments, **options):
        suffixes.extend(suffix.token_ids for row in inputs["suffixes"] for suffix in row)
        return compute_loss(model, inputs, *arguments, **options)

    trainer.compute_loss = keep
    count.watch(trainer, {"student": trainer.model, "other": trainer.ref_model})
    with count:
        trainer.train()
    whole = ROWS * (trainer._buffered_inputs[0]["prompt_ids"].size(1) + TOKENS)
    audited, trained = ROWS * 2 * 8, sum(map(len, suffixes))
    assert 0 < trained <= 3 * audited
    assert count.decoder_tokens[SCORING, "student"] == count.decoder_tokens[FORWARD, "other"] == whole
    assert count.decoder_tokens[FORWARD, "student"] == whole + trained - len(suffixes)
    assert count.rows[FORWARD] == 2 * ROWS * TOKENS + trained
    assert count.rows[BACKWARD] == 3 * audited + 4 * (ROWS * TOKENS - audited) + 3 * trained


@pytest.mark.parametrize("size", [1, 2, 4])
def test_micro_batches_hold_rows_of_like_lengths(tmp_path, tiny_model_dir, size):
    """Models see each trajectory padded to the longest of its like, in training as in scoring, and nothing more."""
    trainer = make_trainer(
        tmp_path, tiny_model_dir, per_device_train_batch_size=size, gradient_accumulation_steps=NUM_PROMPTS // size
    )
    count = HeadProducts()
    count.watch(trainer, {"student": trainer.model})
    trainer.train()
    batch = trainer.batches[0]
    lengths = sorted((batch["prompt_mask"].sum(1) + batch["completion_mask"].sum(1)).tolist(), reverse=True)
    least = sum(size * max(lengths[i : i + size]) for i in range(0, NUM_PROMPTS, size))
    assert count.decoder_tokens[SCORING, "student"] == least
    assert count.decoder_tokens[FORWARD, "student"] == least
    assert least < NUM_PROMPTS * max(lengths), "there is nothing to save"


def test_a_fully_audited_trajectory_needs_no_reference(tmp_path, tiny_model_dir):
    """The reference runs for the rows that have un-audited tokens."""
    trainer = make_trainer(tmp_path, tiny_model_dir, per_device_train_batch_size=1, gradient_accumulation_steps=8)
    count = HeadProducts()
    count.watch(trainer, {"reference": trainer.ref_model})
    trainer.train()
    batch = trainer.batches[0]
    lengths = batch["prompt_mask"].sum(1) + batch["completion_mask"].sum(1)
    needs = (batch["completion_mask"].bool() & ~batch["audited_mask"]).any(1)
    assert 0 < needs.sum() < NUM_PROMPTS
    assert count.decoder_tokens[FORWARD, "reference"] == lengths[needs].sum()
