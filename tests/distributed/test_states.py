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
"""The memory of docs/scaling.md: what a process holds between passes and in them is what the formulas say."""

import importlib.util
import shutil

import pytest

from benchmarks.scaling import LAUNCHES, off_by, states

DEEPSPEED = importlib.util.find_spec("deepspeed") is not None and shutil.which("g++") is not None

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.mark.parametrize("name", LAUNCHES)
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
