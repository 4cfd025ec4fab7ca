# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Every back end trains and evaluates each baseline as DDP does. Each back end is launched once for all methods."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.support.back_ends import SCRIPTS, needs, run
from tests.support.training import questions

TOLERANCE = 1e-4
SHARDED = ("zero2", "zero3", "fsdp2")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def trained(make_tiny_model, tmp_path_factory) -> Callable[[str], tuple[dict[str, Any], Path]]:
    """A function from a back end to what it trained: results by name, and the folder with the weights."""
    student, teacher = str(make_tiny_model(seed=0)), str(make_tiny_model(seed=5, tie_word_embeddings=False))
    solutions = tmp_path_factory.mktemp("solutions") / "solutions.jsonl"
    rows = [
        {"prompt": row["prompt"], "completion": [{"role": "assistant", "content": row["answer"]}]}
        for row in questions(16)
    ]
    solutions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    # Adapters have their own kind of checkpointing under ZeRO-3.
    adapters = {"lora": True, "gradient_checkpointing": True}
    runs: list[dict[str, Any]] = [
        {"name": "sft_lora", "method": "sft", "solutions": str(solutions), **adapters},
        {"name": "opd", "method": "opd", "teacher_model_name_or_path": teacher},
        {"name": "grpo", "method": "grpo", "section": {"num_generations": 2, "beta": 0.1}},
    ]
    # What is compared with itself: precision and checkpointing that a run has by default, and a resumed run.
    default = {**runs[-1], "lora": True, "bf16": True, "gradient_checkpointing": True}
    runs.append({**default, "name": "default", "save_strategy": "steps", "save_steps": 1})
    runs.append({**default, "name": "resumed", "resume": "default/checkpoint-1"})
    runs = [{**each, "student": student} for each in runs]

    @cache
    def launch(back_end: str) -> tuple[dict[str, Any], Path]:
        needs(back_end)
        folder = tmp_path_factory.mktemp(back_end)
        (folder / "runs.json").write_text(json.dumps(runs))
        result = run(back_end, SCRIPTS / "baselines_under.py", folder / "result.json", str(folder / "runs.json"))
        return result, folder

    return launch


@pytest.mark.parametrize("name", ["sft_lora", "opd", "grpo"])
@pytest.mark.parametrize("back_end", SHARDED)
def test_agrees_with_ddp(back_end, name, trained):
    """Every metric of both evaluations and of each step, and the weights, within 1e-4."""
    (results, folder), (expected, other) = trained(back_end), trained("ddp")
    assert results[name]["sharded"] == (back_end != "zero2")
    before, first, second, after, *_ = logs = results[name]["logs"]
    for here, there in zip(logs, expected[name]["logs"], strict=True):
        assert here == pytest.approx(there, rel=TOLERANCE, abs=TOLERANCE)
    assert {"loss", "grad_norm"} <= first.keys() & second.keys()
    assert before["eval_kl/unaudited"] == pytest.approx(0, abs=1e-6)
    assert after["eval_kl/unaudited"] > 10 * TOLERANCE
    assert logs[-1]["eval_pass@1"] == after["eval_pass@1"]
    weights, wanted = (load_file(where / f"{name}.safetensors") for where in (folder, other))
    assert weights.keys() == wanted.keys()
    for key, value in wanted.items():
        torch.testing.assert_close(weights[key], value, rtol=0, atol=TOLERANCE, msg=key)


@pytest.mark.parametrize("back_end", SHARDED)
def test_a_resumed_run_continues_as_if_nothing_had_happened(back_end, trained):
    results, folder = trained(back_end)
    step, resumed = (
        [entry for entry in results[name]["logs"] if "loss" in entry][-1] for name in ("default", "resumed")
    )
    assert step["step"] == resumed["step"] == 2
    assert resumed["loss"] == pytest.approx(step["loss"], rel=1e-6, abs=1e-6)
    weights, wanted = (load_file(folder / f"{name}.safetensors") for name in ("resumed", "default"))
    for key, value in wanted.items():
        torch.testing.assert_close(weights[key], value, rtol=0, atol=1e-6, msg=key)
