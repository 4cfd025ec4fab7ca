# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""ZeRO-3 and FSDP2 with one process on the GPU: the same step as a plain run, with a sharded model."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.gpu.bounds import hold
from tests.support import ROOT
from tests.support.back_ends import free_port, needs, training_arguments, zero

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]

SCRIPT = Path(__file__).with_name("one_process.py")
SECONDS = 120.0
# That of several processes on a CPU, for losses, norms, metrics and weights, in float32.
TOLERANCE = 1e-4
KINDS: dict[str, Any] = {"full": None, "lora": {"init_lora_weights": False}}


class Run:
    """A back end in a process group, started at once; `results` waits for it."""

    def __init__(self, back_end: str, device: torch.device, student: Path, folder: Path):
        self.back_end, self.folder = back_end, folder
        folder.mkdir()
        settings = {**training_arguments(back_end), "gradient_accumulation_steps": 4, "max_steps": 2}
        if device.type == "cuda":
            settings["use_cpu"] = False
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
            "OMP_NUM_THREADS": "1",
            "TORCHDYNAMO_DISABLE": "1",
        }
        if back_end == "zero3":
            settings["deepspeed"] = zero(3)
        if back_end != "one":  # what a launcher would say
            environment |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
            # There may be no other interface, and a host name that cannot be looked up.
            environment |= {"NCCL_SOCKET_IFNAME": "lo", "GLOO_SOCKET_IFNAME": "lo"}
        models = [{"name": kind, "path": str(student), "lora": lora, **settings} for kind, lora in KINDS.items()]
        (folder / "models.json").write_text(json.dumps(models))
        self.log = folder / "log.txt"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(SCRIPT), back_end, str(folder / "result.json"), str(folder / "models.json")],
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.deadline = time.monotonic() + SECONDS

    def results(self) -> dict[str, Any]:
        result = self.folder / "result.json"
        # It is written last. A process may take its time to end, or abort, after everything is done.
        while not result.exists() and self.process.poll() is None and time.monotonic() < self.deadline:
            time.sleep(0.1)
        if not result.exists():
            code = self.process.poll()
            how = f"was not finished after {SECONDS:.0f} s" if code is None else f"ended with {code}"
            raise AssertionError(f"{self.back_end} {how}:\n{self.log.read_text()[-8000:]}")
        return json.loads(result.read_text())

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def runs(tmp_path_factory, device, make_tiny_model) -> Iterator[dict[str, Run]]:
    """The plain run and those of the back ends, started together: most of their time is start-up."""
    student, folder = make_tiny_model(seed=0), tmp_path_factory.mktemp("runs")
    names = ["one", "fsdp2"]
    with suppress(pytest.skip.Exception):  # the test of ZeRO-3 is skipped, not that of FSDP2
        if device.type == "cpu":
            needs("zero3")  # an operator for communication is built once; a GPU has NCCL
        pytest.importorskip("deepspeed")
        names.append("zero3")
    started = {name: Run(name, device, student, folder / name) for name in names}
    yield started
    for run in started.values():
        run.kill()


@pytest.mark.parametrize("back_end", ["fsdp2", "zero3"])
def test_sharded_is_plain(runs, record_property, back_end):
    """One process keeps all shards, but everything goes through the back end: gathers, its backward, its optimizer."""
    if back_end not in runs:
        pytest.skip("needs DeepSpeed, and on a CPU a C++ compiler")
    results = {name: runs[name].results() for name in ("one", back_end)}
    for kind in KINDS:
        compare(record_property, runs, results, back_end, kind)


def compare(record_property, runs: dict[str, Run], results: dict[str, Any], back_end: str, kind: str) -> None:
    result, plain = results[back_end][kind], results["one"][kind]
    assert result["sharded"]
    assert not plain["sharded"]
    assert result["optimizer"] == ("zero3" if back_end == "zero3" else None)
    assert result["completions"] == plain["completions"]
    assert plain["moved"] > 50 * TOLERANCE
    assert len(result["steps"]) == len(plain["steps"]) == 2
    for name in plain["steps"][0]:
        pairs = [(here[name], there[name]) for here, there in zip(result["steps"], plain["steps"], strict=True)]
        error = max(abs(here - there) / max(abs(there), 1.0) for here, there in pairs)
        hold(record_property, f"{back_end}/{kind}/{name}", error, TOLERANCE)
    weights, expected = (load_file(runs[name].folder / f"{kind}.safetensors") for name in (back_end, "one"))
    assert weights.keys() == expected.keys()
    error = max((weights[name] - value).abs().max().item() for name, value in expected.items())
    hold(record_property, f"{back_end}/{kind}/weights", error, TOLERANCE)
