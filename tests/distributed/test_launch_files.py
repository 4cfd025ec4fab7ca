# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""`omniopd train --accelerate_config zero2`, `zero3` and `fsdp2`: training with the files that ship.

The files are used unchanged. The command line adds what a machine without GPUs needs: `--num_processes 2`, since the
default is the number of GPUs; a free port; and `--use_cpu` for ZeRO. For FSDP2, `fsdp2_on_cpu` sets the device
instead, since accelerate would fall back to DDP. The communication backend is gloo.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.support import ROOT
from tests.support.back_ends import STEPS, finish, free_port, needs
from tests.support.training import questions

TOLERANCE = 1e-4
FILES = ("zero2", "zero3", "fsdp2")
# The student is its own reference in the first step: the second one has a divergence, too.
NUM_STEPS, PROMPTS = 2, 8
# The command, with a training that takes notes in the place of `omniopd_trl.train`.
COMMAND = """
import sys
from omniopd_trl.cli import launch, main
launch.MODULE = "tests.distributed.train_from_file"
sys.exit(main.main(sys.argv[1:]))
"""
# DeepSpeed leaves parameters of fewer than 100,000 numbers whole, and the file does not say otherwise: of a student as
# small as in the other tests ZeRO-3 would split nothing. Here the embeddings and all matrices are larger than that.
WIDE = {
    "hidden_size": 352,
    "intermediate_size": 320,
    "head_dim": 88,
    "num_key_value_heads": 4,
    "initializer_range": 0.1,
}
Trained = tuple[list[dict[str, Any]], Path]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def trained(make_tiny_model, tmp_path_factory) -> Callable[[str | None], Trained]:
    """A function from the name of a file, or none, to the notes of each process, and the folder with the students."""
    shared = tmp_path_factory.mktemp("launch_files")
    rows = [json.dumps(row) for row in questions(PROMPTS * NUM_STEPS)]
    (shared / "sums.jsonl").write_text("\n".join(rows))
    recipe = {
        "model_name_or_path": str(make_tiny_model(seed=0, **WIDE)),
        "teacher_model_name_or_path": "scripted",
        "dataset_name": str(shared / "sums.jsonl"),
        "max_steps": NUM_STEPS,
        "max_completion_length": 30,
        "learning_rate": 5e-2,
        **STEPS,
    }
    (shared / "recipe.yaml").write_text(yaml.safe_dump(recipe))

    @cache
    def launch(name: str | None) -> Trained:
        needs(name or "one")
        folder = tmp_path_factory.mktemp(name or "one")
        processes = 1 if name is None else 2
        words = ["--config", str(shared / "recipe.yaml"), "--output_dir", str(folder)]
        words += ["--gradient_accumulation_steps", str(PROMPTS // 2 // processes)]
        words += ["--use_cpu", "false" if name == "fsdp2" else "true"]
        if name is None:
            command = [sys.executable, "-m", "tests.distributed.train_from_file", *words]
        else:
            command = [sys.executable, "-c", COMMAND, "train", "--accelerate_config", name]
            command += ["--num_processes", "2", "--main_process_port", str(free_port()), *words]
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "TORCHDYNAMO_DISABLE": "1",
            "FACTS": str(folder),
        }
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        code, output = finish(subprocess.Popen(command, env=environment, start_new_session=True, **pipes), 280)
        notes = [folder / f"{rank}.json" for rank in range(processes)]
        # A process of DeepSpeed may abort once in a while after everything is done: the result decides.
        assert all(note.exists() for note in notes), f"{name} ended with {code}:\n{output[-8000:]}"
        return [json.loads(note.read_text()) for note in notes], folder

    return launch


def saved_weights(folder: Path) -> dict[str, torch.Tensor]:
    """What a user gets who loads the student that was saved."""
    adapter = folder / "adapter_model.safetensors"
    if adapter.exists():
        return load_file(adapter)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    return dict(model.named_parameters())


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("name", FILES)
def test_trains_what_one_process_trains(name, kind, trained):
    """Losses and gradient norms of every step, and the student that is saved, to 1e-4."""
    notes, folder = trained(name)
    (expected,), one = trained(None)
    for note in notes:
        for step, (here, there) in enumerate(zip(note[kind]["steps"], expected[kind]["steps"], strict=True)):
            assert here == pytest.approx(there, rel=TOLERANCE, abs=TOLERANCE), step
    assert len(expected[kind]["steps"]) == NUM_STEPS
    assert expected[kind]["moved"] > 100 * TOLERANCE
    weights, wanted = saved_weights(folder / kind), saved_weights(one / kind)
    assert weights.keys() == wanted.keys()
    for key, value in wanted.items():
        torch.testing.assert_close(weights[key], value, rtol=0, atol=TOLERANCE, msg=key)


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("name", FILES)
def test_is_what_the_file_says(name, kind, trained):
    """On both processes: the stage, what each keeps of the weights, and how they were loaded."""
    for notes in trained(name)[0]:
        note = notes[kind]
        assert note["processes"] == 2
        assert note["distributed_type"] == ("FSDP" if name == "fsdp2" else "DEEPSPEED")
        assert note["zero_stage"] == {"zero2": 2, "zero3": 3, "fsdp2": None}[name]
        assert note["tied"]
        # Half, and under ZeRO-3 the norms and the adapters, which are small, in full.
        shares = [note["held"]] + ([note["reference_held"]] if kind == "full" else [])
        for share in shares:
            assert share == (1 if name == "zero2" else pytest.approx(0.5, abs=0.05))
        # Under ZeRO-3 no process ever holds all of it; the others split what was loaded whole, or nothing.
        assert note["sharded_while_loaded"] == (name == "zero3")
        # `fsdp_cpu_ram_efficient_loading`: the student is sharded while it is empty, and filled by the first process.
        assert note["filled_from"] == (["meta"] if name == "fsdp2" else None)
