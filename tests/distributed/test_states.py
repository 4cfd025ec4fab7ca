# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""The memory of a process, between and within passes, matches the formulas of docs/scaling.md."""

import importlib.util
import shutil

import pytest

from benchmarks.scaling import LAUNCHES, off_by, states

DEEPSPEED = importlib.util.find_spec("deepspeed") is not None and shutil.which("g++") is not None

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

# They differ from another one in one part: CI has time for those.
EXHAUSTIVE = ("`multi_gpu`, LoRA", "`fsdp2`, `sync_each_batch`")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.exhaustive] if name in EXHAUSTIVE else []) for name in LAUNCHES]
)
def test_a_process_holds_what_the_formula_says(name, tmp_path):
    """Student, reference, and what autocast copies or FSDP2 gathers, in bytes per parameter."""
    if "zero" in name and not DEEPSPEED:
        pytest.skip("needs DeepSpeed and a C++ compiler")
    rows = states(name, tmp_path)
    expected = {"student", "reference", "copies", "sent"}
    if "fsdp2" in name:
        expected |= {"gathered", "gathered_reference"}
    assert {what for what, *_ in rows} == expected
    for what, formula, counted in rows:
        assert counted == pytest.approx(formula, abs=off_by(what, formula)), what
