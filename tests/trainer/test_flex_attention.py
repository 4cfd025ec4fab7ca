# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Students with FlexAttention: the mask of packed branches, the states, and the step of the trainer."""

import copy
import random
from collections.abc import Iterator

import pytest
import torch
from peft import LoraConfig
from torch.nn.attention.flex_attention import create_block_mask
from transformers import AutoModelForCausalLM
from transformers.integrations import flex_attention as integration
from transformers.utils import logging

from omniopd_trl.method import Suffix
from omniopd_trl.models.prefix_tree import why_no_tree
from omniopd_trl.models.tree_attention import TreeMask, last_hidden_states, sampling_attention, why_not_packed
from omniopd_trl.trainer.batches import BranchedBatch, PackedBatch
from tests.support.flex_attention import FLEX, materialized, reference_flex_attention
from tests.support.objective import LORA, check
from tests.support.training import FOUR_MICRO_BATCHES, make_trainer, questions, step_and_gradient

BRANCHES = {"num_branches": 3, "chunk_length": 6, "min_chunk_length": 4, "num_rollouts": 2}


def random_tree(seed: int) -> tuple[PackedBatch, BranchedBatch, list[list[tuple[list[int], list[int]]]]]:
    """Packed rows of several lengths, with suffixes that often begin at the same token.

    Also, for each row, the columns of each suffix's inputs, and the columns of the text before it.
    """
    rng = random.Random(seed)
    num_rows = rng.randint(1, 3)
    prompts = [rng.randint(1, 20) for _ in range(num_rows)]
    sizes = [rng.choice([1, 7, rng.randint(90, 300)]) for _ in range(num_rows)]
    most = max(sizes)
    batch = {
        "prompt_ids": torch.randint(1, 60, (num_rows, 20)),
        "prompt_mask": (torch.arange(20) >= 20 - torch.tensor(prompts)[:, None]).long(),
        "completion_ids": torch.randint(1, 60, (num_rows, most)),
        "completion_mask": (torch.arange(most) < torch.tensor(sizes)[:, None]).long(),
        "audited_mask": torch.zeros(num_rows, most, dtype=torch.bool),
        "weights": torch.zeros(num_rows, most),
    }
    tokens = PackedBatch.of(batch, pad_token_id=0)
    suffixes: list[list[Suffix]] = []
    columns: list[list[tuple[list[int], list[int]]]] = []
    for prompt, size in zip(prompts, sizes, strict=True):
        starts = [rng.randrange(size) for _ in range(2)]
        suffixes.append([])
        columns.append([])
        first = tokens.input_ids.size(1)
        for _ in range(rng.randint(0, 5)):
            start, length = rng.choice(starts), rng.choice([1, 2, rng.randint(3, 150)])
            suffixes[-1].append(Suffix(start, tuple(rng.randrange(1, 60) for _ in range(length)), rng.random() - 0.5))
            columns[-1].append(([*range(first, first + length - 1)], [*range(prompt + start)]))
            first += length - 1
    return tokens, BranchedBatch.of(tokens, prompts, suffixes, 0, is_packed=True), columns


@pytest.mark.parametrize("seed", range(12))
def test_both_masks_are_those_of_the_tree(seed):
    """Each token attends to its prefix and to its own suffix so far. Padding is attended by padding only."""
    tokens, rows, columns = random_tree(seed)
    mask = rows.attention_mask
    dense = mask.dense()
    length = rows.input_ids.size(1)
    for row, of_row in enumerate(columns):
        text = int(tokens.attention_mask[row].sum())
        expected = {query: {*range(query + 1)} for query in range(text)}
        for own, prefix in of_row:
            for t, query in enumerate(own):
                expected[query] = {*prefix, *own[: t + 1]}
        for query in range(length):
            found = set(dense[row, 0, query].nonzero()[:, 0].tolist())
            if query in expected:
                assert found == expected[query], (row, query)
            else:
                assert query in found, "a softmax over nothing is NaN"
    assert torch.equal(materialized(mask.blocks()), dense)


@pytest.mark.parametrize("length", [1, 127, 128, 129, 256, 500])
def test_blocks_are_those_of_pytorch(length):
    """The same blocks are computed, masked and skipped as with `create_block_mask`; a query has a block at least."""
    start = torch.zeros(2, length, dtype=torch.long)
    end = start.clone()
    start[1, length // 2 :], end[1, length // 2 :] = length // 8, length // 2
    end[0, -1] = min(1, length - 1)  # a single pair of a block is hidden
    mask = TreeMask(start, end)
    ours = mask.blocks()
    theirs = create_block_mask(mask.rule, 2, None, length, length, device="cpu")
    for name in ("kv", "full_kv", "q", "full_q"):
        assert torch.equal(getattr(ours, f"{name}_num_blocks"), getattr(theirs, f"{name}_num_blocks")), name
    assert torch.equal(ours.to_dense(), theirs.to_dense())
    assert ours.shape == theirs.shape == (2, 1, length, length)
    if length == 500:
        assert ours.full_kv_num_blocks[1].sum() < ours.full_kv_num_blocks[0].sum(), "no block is skipped"


# ---- Models ----


@pytest.fixture
def on_cpu() -> Iterator[None]:
    with reference_flex_attention():
        yield


def students(path, dtype) -> list[torch.nn.Module]:
    """The same student with both kinds of attention."""
    return [
        AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation=attention).eval()
        for attention in ("flex_attention", "sdpa")
    ]


def states_of(model: torch.nn.Module, rows: BranchedBatch) -> torch.Tensor:
    return last_hidden_states(model, rows.input_ids, rows.attention_mask, rows.position_ids)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_states_and_gradients_are_those_of_sdpa(tiny_model_dir, on_cpu, checkpointing):
    """At each token of packed rows, in float64; the gradients are those of PyTorch's reference implementation."""
    tokens, rows, columns = random_tree(3)
    assert sum(map(len, columns)) > 3
    is_token = torch.zeros_like(rows.input_ids, dtype=torch.bool)
    is_token[:, : tokens.input_ids.size(1)] = tokens.attention_mask.bool()
    for row, of_row in enumerate(columns):
        for own, _ in of_row:
            is_token[row, own] = True
    results = []
    for model in students(tiny_model_dir, torch.float64):
        if checkpointing:
            model.train()
            model.gradient_checkpointing_enable()
        states = states_of(model, rows)[is_token]
        (states * torch.linspace(-1, 1, states.numel()).view_as(states)).sum().backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        results.append((states.detach(), gradients))
    (states, gradients), (expected, exact) = results
    torch.testing.assert_close(states, expected, rtol=0, atol=1e-12)
    assert gradients.keys() == exact.keys()
    for name, value in exact.items():
        torch.testing.assert_close(gradients[name], value, rtol=1e-9, atol=1e-12 * value.abs().max().item())


def test_what_flex_attention_can(tiny_model_dir, on_cpu):
    """It packs. A mask that does not reach it is found. It samples with `sdpa`, from trees, and is then as before."""
    model, _ = students(tiny_model_dir, torch.float32)
    assert why_not_packed(model) is None
    assert why_not_packed(copy.deepcopy(model).to(torch.bfloat16)) is None
    assert "takes no mask" in why_no_tree(model)
    with sampling_attention(model):
        assert model.config._attn_implementation == "sdpa"
        assert why_no_tree(model) is None
    assert model.config._attn_implementation == "flex_attention"
    original = model.model.forward
    model.model.forward = lambda attention_mask, **inputs: original(**inputs)
    assert "differ by" in why_not_packed(model)


# ---- The trainer ----


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_a_step_without_branches(tmp_path, tiny_model_dir, tiny_tokenizer, on_cpu, lora):
    """Padded rows of the policy and the reference: loss, metrics and gradient of the dense reference."""
    peft_config = LoraConfig(**LORA) if lora else None
    trainer = make_trainer(tmp_path, tiny_model_dir, peft_config=peft_config, **FLEX)
    assert trainer.model.config._attn_implementation == "flex_attention"
    check(trainer, tiny_model_dir, tiny_tokenizer)


def in_turn(tmp_path, path, **settings):
    """Gradient, log and trainer of a step with each kind of attention, the first FlexAttention."""
    for name, attention in (("flex", FLEX), ("sdpa", {})):
        trainer = make_trainer(tmp_path / name, path, **settings, **attention)
        gradient, _ = step_and_gradient(trainer)
        yield gradient, trainer


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_a_step_with_branches_is_that_of_sdpa(tmp_path, tiny_model_dir, on_cpu, caplog, lora):
    """The same branches, loss and gradient: packed rows, sampled from trees, without a warning."""
    logging.enable_propagation()
    peft_config = LoraConfig(**LORA, init_lora_weights=False) if lora else None
    settings = {**BRANCHES, **FOUR_MICRO_BATCHES, "gradient_checkpointing": True, "peft_config": peft_config}
    (gradient, trainer), (expected, plain) = in_turn(tmp_path, tiny_model_dir, **settings)
    assert trainer.objective._why_apart == ""
    assert trainer.objective._why_no_tree == ""
    assert trainer.model.config._attn_implementation == "flex_attention"
    assert "Each branch is" not in caplog.text
    assert torch.equal(trainer.batches[0]["completion_ids"], plain.batches[0]["completion_ids"])
    assert trainer.batches[0]["suffixes"] == plain.batches[0]["suffixes"]
    assert any(trainer.batches[0]["suffixes"])
    assert max(value.abs().max() for value in expected.values()) > 1e-3
    for name, value in expected.items():
        assert ((gradient[name] - value).abs() <= 2e-6 + 1e-3 * value.abs()).all(), name
    loss, plain_loss = (each.state.log_history[0]["loss"] for each in (trainer, plain))
    assert loss == pytest.approx(plain_loss, rel=1e-4, abs=1e-6)


@pytest.mark.slow
def test_compiled_states_are_those_of_sdpa(tiny_model_dir):
    """PyTorch's kernels for a CPU, as transformers compiles them: for a first length, and for any."""
    torch._dynamo.reset()
    flex, plain = students(tiny_model_dir, torch.float32)
    with torch.no_grad():
        for seed in (7, 9):  # two rows each
            _, rows, _ = random_tree(seed)
            is_text = rows.input_ids != 0
            torch.testing.assert_close(
                states_of(flex, rows)[is_text], states_of(plain, rows)[is_text], rtol=0, atol=1e-4
            )


@pytest.mark.slow
def test_no_length_is_computed_without_a_kernel(tmp_path, tiny_model_dir, monkeypatch):
    """Batches of many shapes need more kernels than PyTorch's limit of 8, and get them.

    PyTorch's tracer decides about kernels here as it does on a GPU. What it traces runs without generated code.
    """
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *args, **kwargs: compiler(*args, **{**kwargs, "backend": "eager"}))
    monkeypatch.setattr(integration.WrappedFlexAttention, "_instance", None)
    monkeypatch.setattr(torch.nn.attention.flex_attention, "_validate_device", lambda *_: None)
    torch._dynamo.reset()
    uncompiled = []
    monkeypatch.setattr(torch.nn.attention.flex_attention, "_warn_once", lambda *args, **_: uncompiled.append(args))
    settings = {**BRANCHES, **FOUR_MICRO_BATCHES, "max_steps": 3, "dataset": questions(24)}
    trainer = make_trainer(tmp_path, tiny_model_dir, gradient_checkpointing=True, **settings, **FLEX)
    trainer.train()
    counted = torch._dynamo.eval_frame._debug_get_cache_entry_list(torch.nn.attention.flex_attention.flex_attention)
    assert len(counted) > 8
    assert not uncompiled
    torch._dynamo.reset()
