# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""A local teacher on the GPU: its KV cache does not change results, and it shares the GPU with the trained student."""

import math

import pytest
import torch

from omniopd_trl.teachers import LocalTeacher, Prefix, SamplingRequest, local
from tests.gpu.bounds import hold, largest
from tests.support.training import make_trainer, questions

pytestmark = pytest.mark.gpu

MAX_TOKENS = 24
GREEDY = SamplingRequest(num_samples=1, max_tokens=MAX_TOKENS, temperature=0.0)
# In nats: float32, and keys and values that were computed in another batch, with other padding.
LOGPROBS = 1e-4
TEXT = "First we add the two numbers that Tom has: 3 and 9 apples, so there are 12 of them. Answer: 12"


@pytest.fixture(scope="module")
def teacher(device, tiny_teacher_dir) -> LocalTeacher:
    teacher = LocalTeacher(str(tiny_teacher_dir), device=device, model_init_kwargs={"dtype": torch.float32})
    # The first call tries short rows to learn whether the model can continue them from one cache.
    teacher.sample_trajectories([trajectory(0)], GREEDY)
    return teacher


def trajectory(n: int) -> list[Prefix]:
    """Nested prefixes of one answer, from none of it to all."""
    prompt = questions()[n]["prompt"]
    return [Prefix(prompt, TEXT[: end * len(TEXT) // 5]) for end in range(6)]


@torch.no_grad()
def plain(teacher: LocalTeacher, prefix: Prefix) -> tuple[str, torch.Tensor]:
    """What `generate` writes after one prefix alone; and the log-probabilities, `(n, V)`, that one forward gives."""
    token_ids = torch.tensor([teacher.encode(prefix)], device=teacher.model.device)
    output = teacher.model.generate(
        input_ids=token_ids,
        attention_mask=torch.ones_like(token_ids),
        do_sample=False,
        max_new_tokens=MAX_TOKENS,
        eos_token_id=teacher.eos_token_ids,
    )
    length = token_ids.size(1)
    logits = teacher.model(input_ids=output).logits[0, length - 1 : -1]
    return teacher.tokenizer.decode(output[0, length:], skip_special_tokens=True), logits.log_softmax(-1)


def test_greedy_text_is_that_of_generate(teacher, device):
    """Of several trajectories in one batch, whose prefixes take their keys and values from one prefill each."""
    assert {p.device.type for p in teacher.model.parameters()} == {device.type}
    trajectories = [trajectory(n) for n in (0, 1, 5)]
    replies = teacher.sample_trajectories(trajectories, GREEDY)
    cached = 0
    for prefixes, answers in zip(trajectories, replies, strict=True):
        for prefix, reply in zip(prefixes, answers, strict=True):
            assert reply.rollouts[0].text == plain(teacher, prefix)[0]
            cached += reply.usage.cached_tokens
    assert cached > 0, "nothing came from the cache"


@pytest.mark.parametrize("most_in_a_tree", [0, local.MOST_IN_A_TREE], ids=["copied", "tree"])
def test_logprobs_are_those_of_one_forward(teacher, record_property, monkeypatch, most_in_a_tree):
    """At every token that is written, for every prefix of a trajectory, in a row for each prefix or in one for all."""
    monkeypatch.setattr(local, "MOST_IN_A_TREE", most_in_a_tree)
    steps: list[torch.Tensor] = []  # (rows, V) of each forward; the first is the prefill's
    head = teacher.model.get_output_embeddings()
    # One position is kept for each prefix: `(rows, 1, V)`, or `(1, rows, V)` in a tree.
    handle = head.register_forward_hook(lambda module, inputs, output: steps.append(output.flatten(0, 1).float()))
    prefixes = trajectory(2)
    try:
        teacher.sample_trajectories([prefixes], GREEDY)
    finally:
        handle.remove()
    assert len(steps[0]) == 1
    logprobs = torch.stack(steps[1:], dim=1).log_softmax(-1)  # (rows, steps, V)
    assert len(logprobs) == len(prefixes)
    error = 0.0
    for row, prefix in zip(logprobs, prefixes, strict=True):
        _, expected = plain(teacher, prefix)
        error = max(error, largest(row[: len(expected)], expected.double()))
    hold(record_property, "logprobs", error, LOGPROBS)


def test_a_teacher_beside_training(tmp_path, device, tiny_model_dir, tiny_teacher_dir):
    """Two steps with the teacher on the card of the student."""
    trainer = make_trainer(
        tmp_path,
        tiny_model_dir,
        teacher=str(tiny_teacher_dir),
        dataset=questions(16),
        use_cpu=device.type == "cpu",
        max_steps=2,
        learning_rate=0.05,
    )
    trainer.train()
    models = (trainer.model, trainer.ref_model, trainer.teacher.model)
    assert {p.device.type for model in models for p in model.parameters()} == {device.type}
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 2
    for entry in logs:
        assert math.isfinite(entry["loss"])
        assert entry["audit/num_chunks"] > 0
        assert entry["audit/dropped_chunks"] == 0
    assert trainer.teacher_usage.completion_tokens > 0
