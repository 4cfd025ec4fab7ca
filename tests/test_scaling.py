# Copyright 2026 The omniopd_trl Authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""The planning of docs/scaling.md: its formulas against the models' own code, DeepSpeed's estimates, and the page."""

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.scaling import BACK_ENDS, TOKENS, check, gathered, memory_table, state_bytes, time_table
from benchmarks.shapes import QWEN3

PAGE = Path(__file__).parents[1] / "docs" / "scaling.md"


@pytest.mark.parametrize("student", QWEN3, ids=lambda student: student.name)
def test_formulas_are_those_of_the_code(student):
    """At the real widths, two layers deep: parameters and a forward exactly, a backward and the memory to 1 in 20."""
    for _, name, formula, code in check((replace(student, layers=2),), TOKENS):
        assert formula == pytest.approx(code, rel=0 if name in ("parameters", "forward") else 0.05), name


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


@pytest.mark.parametrize("table", [memory_table, time_table])
def test_the_page_has_the_tables_that_are_printed(table):
    """Line by line."""
    assert "\n".join(table()) in PAGE.read_text()
