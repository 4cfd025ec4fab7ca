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
"""One objective under every back end: loss, gradient norm and weights after three steps are those of one process."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from back_ends import BACK_ENDS, HERE, run
from safetensors.torch import load_file

SCRIPT = HERE / "train_under.py"
TOLERANCE = 1e-4
# DeepSpeed builds an operator for communication on a CPU the first time.
DEEPSPEED = importlib.util.find_spec("deepspeed") is not None and shutil.which("g++") is not None

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def models(make_tiny_model, tiny_teacher_dir, tmp_path_factory) -> Path:
    """The file that names the students: tied and untied heads, full and LoRA, a local teacher, offloading."""
    students = [
        {"name": f"{head}_{kind}", "path": str(path), "lora": {"init_lora_weights": False} if kind == "lora" else None}
        for head, path in (
            ("tied", make_tiny_model(seed=0)),
            ("untied", make_tiny_model(seed=0, tie_word_embeddings=False)),
        )
        for kind in ("full", "lora")
    ]
    # The likeliest rollout: what a teacher draws depends on the process that asks it.
    greedy = {"teacher": str(tiny_teacher_dir), "teacher_temperature": 0.0, "num_rollouts": 1}
    students.append({**students[0], "name": "local_teacher_full", **greedy})
    students.append({**students[0], "name": "offloaded_reference_full", "ref_model_offload": True})
    path = tmp_path_factory.mktemp("models") / "models.json"
    path.write_text(json.dumps(students))
    return path


@pytest.fixture(scope="module")
def one_process(models, tmp_path_factory) -> tuple[dict, Path]:
    """What one process trains: the others have to agree with it."""
    folder = tmp_path_factory.mktemp("one")
    return run("one", SCRIPT, folder / "result.json", str(models)), folder


@pytest.mark.parametrize("back_end", BACK_ENDS[1:])
def test_agrees_with_one_process(back_end, models, one_process, tmp_path):
    """Within 1e-4, over steps that move the weights by a hundred times as much, clipped gradients among them."""
    if back_end.startswith("zero") and not DEEPSPEED:
        pytest.skip("needs DeepSpeed and a C++ compiler")
    expected, folder = one_process
    results = run(back_end, SCRIPT, tmp_path / "result.json", str(models))
    assert results.keys() == expected.keys()
    # Where the reference rests between uses changes nothing.
    assert results["offloaded_reference_full"]["steps"] == results["tied_full"]["steps"]
    for name, result in results.items():
        other = expected[name]
        assert result["completions"] == other["completions"], name
        for step, (here, there) in enumerate(zip(result["steps"], other["steps"], strict=True)):
            assert here == pytest.approx(there, rel=TOLERANCE, abs=TOLERANCE), (name, step)
        weights, wanted = (load_file(f / f"{name}.safetensors") for f in (tmp_path, folder))
        assert weights.keys() == wanted.keys()
        for key, value in wanted.items():
            torch.testing.assert_close(weights[key], value, rtol=0, atol=TOLERANCE, msg=f"{name}: {key}")
        assert other["moved"] > 100 * TOLERANCE
        assert any(step["grad_norm"] > 0.5 for step in other["steps"]) == name.endswith("lora")
        # It is what it says it is, and LoRA pays for no second copy.
        assert result["sharded"] == (back_end.startswith("zero3") or back_end == "fsdp2")
        assert result["reference_is_a_copy"] == name.endswith("full")
        assert result["reference_rests_on_cpu"] == name.startswith("offloaded")
