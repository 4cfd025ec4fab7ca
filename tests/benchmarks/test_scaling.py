# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""The planning of docs/scaling.md: its formulas against the models' own code, DeepSpeed's estimates, and the page."""

from dataclasses import replace

import pytest

from benchmarks.scaling import (
    GPU,
    NUM_GPUS,
    TOKENS,
    check,
    gpu_table,
    measured_table,
    memory_table,
    per_gpu,
    runs,
    step_seconds,
    step_table,
    time_table,
    traced,
    waits,
)
from benchmarks.shapes import Limits
from benchmarks.step_time import PROMPT_TOKENS, Batch, seconds_at_the_limit
from omniopd_trl.accounting.hardware import (
    BACK_ENDS,
    QWEN3,
    gathered,
    mask_bytes,
    moved_seconds,
    state_bytes,
    step_flops,
)
from tests.support import ROOT

LORA = next(back_end for back_end in BACK_ENDS if back_end.adapters)
PAGE = ROOT / "docs" / "scaling.md"


@pytest.mark.parametrize("student", QWEN3, ids=lambda student: student.name)
def test_formulas_are_those_of_the_code(student):
    """At the real widths, two layers deep: parameters and a forward exactly, a backward and the memory to 1 in 20."""
    for _, name, formula, code in check((replace(student, layers=2),), TOKENS):
        assert formula == pytest.approx(code, rel=0 if name in ("parameters", "forward") else 0.05), name


@pytest.mark.parametrize("autocasts", [False, True])
@pytest.mark.parametrize("student", QWEN3[:2], ids=lambda student: student.name)
def test_a_mask_is_that_of_the_code(student, autocasts):
    """What a layer takes more with a mask for each pair of tokens, in the code of PyTorch and transformers."""
    two = replace(student, layers=2)
    plain, masked = (traced(two, TOKENS // 2, autocasts, masked)["layers"] for masked in (False, True))
    assert masked - plain == mask_bytes(two, TOKENS // 2)[1]


@pytest.mark.parametrize("student", QWEN3, ids=lambda student: student.name)
@pytest.mark.parametrize("gpus", [8, 64])
def test_states_are_those_that_deepspeed_estimates(student, gpus):
    """Without the reference, which DeepSpeed knows nothing of.

    Of ZeRO-3 DeepSpeed counts 18 bytes per parameter, as of ZeRO-2, although the weights in bf16 are split, too:
    `python -m benchmarks.scaling --states` finds 20.
    """
    stage2 = pytest.importorskip("deepspeed.runtime.zero.stage_1_and_2").estimate_zero2_model_states_mem_needs
    stage3 = pytest.importorskip("deepspeed.runtime.zero.stage3").estimate_zero3_model_states_mem_needs
    alone = [replace(b, whole_reference=0, split_reference=0) for b in BACK_ENDS]
    ours = {b.name: state_bytes(student, b, gpus, accumulates=False) for b in alone}
    n = student.parameters
    for name, offloads in (("`zero2`", False), ("`zero2`, optimizer on the CPU", True)):
        _, theirs = stage2(n, num_gpus_per_node=8, num_nodes=gpus // 8, cpu_offload=offloads)
        assert ours[name] == pytest.approx(theirs, rel=1e-6)
    for name, offloads, weights in (("`zero3`", False, 2 * n / gpus), ("`zero3`, optimizer on the CPU", True, 0)):
        nodes = {"num_gpus_per_node": 8, "num_nodes": gpus // 8}
        _, theirs, _ = stage3(n, gathered(student), cpu_offload=offloads, cpu_offload_params=False, **nodes)
        assert ours[name] == pytest.approx(theirs + weights, rel=1e-6)


@pytest.mark.parametrize("student", QWEN3, ids=lambda student: student.name)
def test_training_is_the_work_that_benchmarks_hold_against_the_clock(student):
    """`benchmarks.step_time` counts no second pass of the layers as work, which checkpointing adds here."""
    batch = Batch(student, (TOKENS,), micro_batch=1, micro_batches=1)
    limit = seconds_at_the_limit(batch, TOKENS - PROMPT_TOKENS, 2, Limits(1.0, 1.0))
    work = limit["scoring"] + limit["reference"] + limit["student"] + student.forward_flops(TOKENS)
    assert step_flops(student, TOKENS) == pytest.approx(work, rel=0.005)  # prompts are not projected


@pytest.mark.parametrize("student", QWEN3, ids=lambda student: student.name)
def test_a_step_takes_at_least_what_it_waits_for(student):
    """Nothing is sent by one GPU; what waits is part of what moves; LoRA is the fastest."""
    for gpus in NUM_GPUS:
        for back_end in BACK_ENDS:
            sent, over = moved_seconds(student, back_end, GPU, gpus, per_gpu(gpus))
            assert (sent == 0) == (gpus == 1 or back_end.adapters)
            assert over <= waits(student, back_end, gpus) <= sent + over
            assert back_end.adapters or step_seconds(student, back_end, gpus) > step_seconds(student, LORA, gpus)


def test_what_does_not_fit_has_no_time():
    """32 billion parameters on one GPU, in whatever way."""
    assert not any(runs(QWEN3[-1], back_end, 1) for back_end in BACK_ENDS)
    assert [row for row in time_table() if "Qwen3-32B | 1 | no launch fits" in row]
    assert not [row for row in step_table() if "Qwen3-32B | `zero2` |" in row]


@pytest.mark.parametrize("table", [memory_table, time_table, step_table, gpu_table, measured_table])
def test_the_page_has_the_tables_that_are_printed(table):
    """Line by line."""
    assert "\n".join(table()) in PAGE.read_text()
