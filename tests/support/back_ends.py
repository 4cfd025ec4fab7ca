# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Start a script under each back end: one process, or two processes with DDP, ZeRO-1, 2 and 3, or FSDP2."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from benchmarks.servers import free_port
from tests.support import ROOT

if TYPE_CHECKING:  # scripts must choose their device before they import torch
    import torch

SCRIPTS = ROOT / "tests" / "distributed"
BACK_ENDS = ("one", "ddp", "zero1", "zero1_offload", "zero2", "zero2_offload", "zero3", "zero3_offload", "fsdp2")
# They share their code with others: CI has time for those.
EXHAUSTIVE = ("zero1", "zero1_offload", "zero2_offload", "zero3_offload")
# Settings of `OmniOPDConfig` for the steps that are compared.
STEPS: dict[str, Any] = {
    "per_device_train_batch_size": 2,
    "num_chunks": 2,
    "chunk_length": 10,
    "min_chunk_length": 6,
    "num_rollouts": 3,
    "beta": 0.5,
    # Greedy sampling: the samples must not depend on the number of processes. Corrected for, the chunks of a sampler
    # without a choice would have no gradient.
    "top_k": 1,
    "importance_sampling_correction": False,
    # Adam divides by the root of the second moment. With the default, rounding noise in gradients near zero would
    # become full steps.
    "adam_epsilon": 1e-2,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0.5,
    # Rounding in bf16 would hide a mistake.
    "bf16": False,
    "gradient_checkpointing": False,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}
# The logged metrics that are compared for each step.
LOGGED = ("loss", "grad_norm", "chunk_loss", "kl/unaudited", "kl/audited", "entropy", "audit/posterior")


def back_ends(*names: str) -> pytest.MarkDecorator:
    """Run a test for each of these back ends."""
    exhaustive = {name: [pytest.mark.exhaustive] for name in EXHAUSTIVE}
    return pytest.mark.parametrize("back_end", [pytest.param(name, marks=exhaustive.get(name, [])) for name in names])


def needs(back_end: str) -> None:
    """Skip the test if the back end cannot run."""
    if back_end.startswith("zero"):
        if importlib.util.find_spec("deepspeed") is None or shutil.which("g++") is None:
            pytest.skip("needs DeepSpeed and a C++ compiler")
        _build_deepspeed()


@cache
def _build_deepspeed() -> None:
    """Build DeepSpeed's communication operator for CPUs in advance, since a run has a time limit."""
    # One folder per environment: a build for another PyTorch cannot be used, and a build that was killed leaves a lock
    # that the next one would wait for forever.
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix) / "torch_extensions"))
    code = "from deepspeed.comm.torch import build_shm_op; build_shm_op()"
    try:
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=400)
    except subprocess.TimeoutExpired:
        folder = os.environ["TORCH_EXTENSIONS_DIR"]
        raise AssertionError(f"DeepSpeed's operator was not built in time: remove {folder}") from None


def training_arguments(back_end: str) -> dict[str, Any]:
    """Settings of `OmniOPDConfig` for a back end on a machine without a GPU."""
    if back_end == "fsdp2":
        config = {
            "version": 2,
            "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "transformer_layer_cls_to_wrap": ["Qwen3DecoderLayer"],
            "reshard_after_forward": True,
            "state_dict_type": "FULL_STATE_DICT",
        }
        # `use_cpu` would make accelerate fall back to DDP; see `fsdp2_on_cpu`.
        return {"use_cpu": False, "fsdp": True, "fsdp_config": config}
    return {"use_cpu": True}


def zero(stage: int, *, offload: bool = False) -> dict[str, Any]:
    """A DeepSpeed configuration. At stage 3, even the smallest parameters are sharded: tiny models would hide bugs.

    With `offload`, the optimizer is still PyTorch's. DeepSpeed's CPU optimizer would have to be built first, and does
    not continue exactly after a resumption.
    """
    settings: dict[str, Any] = {"stage": stage, "overlap_comm": False, "contiguous_gradients": True}
    if stage == 3:
        settings |= {"stage3_param_persistence_threshold": 0, "stage3_gather_16bit_weights_on_model_save": True}
    if offload:
        settings["offload_optimizer"] = {"device": "cpu"}
    automatic = (
        *("gradient_accumulation_steps", "gradient_clipping", "train_batch_size"),
        "train_micro_batch_size_per_gpu",
    )
    return {
        "zero_optimization": settings,
        "bf16": {"enabled": "auto"},
        "steps_per_print": 10**9,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        **dict.fromkeys(automatic, "auto"),
    }


def _accelerate_config(back_end: str, folder: Path) -> Path:
    """Write the configuration files of `accelerate launch` for a ZeRO stage, and return the path of the YAML file."""
    stage = int(back_end[4])
    deepspeed, path = folder / f"{back_end}.json", folder / f"{back_end}.yaml"
    deepspeed.write_text(json.dumps(zero(stage, offload=back_end.endswith("offload"))))
    config = {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": "DEEPSPEED",
        "deepspeed_config": {
            "deepspeed_config_file": str(deepspeed),
            "deepspeed_multinode_launcher": "standard",
            "zero3_init_flag": stage == 3,
        },
        "machine_rank": 0,
        "num_machines": 1,
        "num_processes": 2,
        "main_training_function": "main",
        "rdzv_backend": "static",
        "same_network": True,
        "use_cpu": True,
    }
    path.write_text(json.dumps(config))  # JSON is YAML
    return path


def start(
    back_end: str, script: Path, folder: Path, *arguments: str, num_processes: int = 2, **environment: str
) -> subprocess.Popen[str]:
    """Start a script under a back end in a new process group; configuration files are written to `folder`."""
    command = [sys.executable]
    if back_end.startswith("zero"):
        _build_deepspeed()
        command += ["-m", "accelerate.commands.launch", "--config_file", str(_accelerate_config(back_end, folder))]
        command += [f"--num_processes={num_processes}", f"--main_process_port={free_port()}"]
    elif back_end != "one":
        command += ["-m", "torch.distributed.run", f"--nproc_per_node={num_processes}", "--master_addr=127.0.0.1"]
        command += [f"--master_port={free_port()}"]
    variables = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "TORCHDYNAMO_DISABLE": "1",
        **environment,
    }
    return subprocess.Popen(
        [*command, str(script), back_end, *arguments],
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str], seconds: float) -> tuple[int, str]:
    """Wait for a script and return its exit code and output. After `seconds`, kill it and all its children."""
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        # A launcher starts its processes in new groups. A process that is left would also keep the output open.
        launcher = psutil.Process(process.pid)
        started = launcher.children(recursive=True)
        for each in [launcher, *started]:
            with suppress(psutil.NoSuchProcess):
                each.kill()
        output, _ = process.communicate()
        # A killed process closes its files, which ends the wait above, shortly before it is gone.
        psutil.wait_procs(started, timeout=10)
        raise AssertionError(f"not finished after {seconds:.0f} s:\n{output[-5000:]}") from None
    return process.returncode, output


def run(back_end: str, script: Path, result: Path, *arguments: str, seconds: float = 600.0, **kwargs: Any) -> Any:
    """Run a script to its end, and return the content of the JSON file `result` that it writes."""
    code, output = finish(start(back_end, script, result.parent, str(result), *arguments, **kwargs), seconds)
    # A process of DeepSpeed sometimes aborts after it has finished, so check the result instead of the exit code.
    assert result.exists(), f"{back_end} ended with {code} and no result:\n{output[-8000:]}"
    return json.loads(result.read_text())


def train_each(train: Callable[..., dict[str, Any]]) -> None:
    """`main` of a script: call `train` for each run of a JSON file, and write what it returns to another one.

    The files are the second and the third argument of the script. `train` takes the folder of the results and the
    settings of a run, of which one is its `"name"`.
    """
    import torch
    from accelerate.state import AcceleratorState, GradientState

    result, runs = Path(sys.argv[2]), json.loads(Path(sys.argv[3]).read_text())
    results = {}
    for run in runs:
        torch.manual_seed(0)
        results[run["name"]] = train(result.parent, **run)
        AcceleratorState._reset_state()  # the next one is a run of its own
        GradientState._reset_state()
    rank = 0
    if torch.distributed.is_initialized():
        rank = torch.distributed.get_rank()
        torch.distributed.barrier()
    if rank == 0:
        partial = result.with_suffix(".partial")
        partial.write_text(json.dumps(results))
        partial.rename(result)


def whole(parameter: "torch.nn.Parameter") -> "torch.Tensor":
    """A full copy of a parameter under any back end. Every process has to call it."""
    if hasattr(parameter, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()
    value = parameter.detach()
    return value.full_tensor() if hasattr(value, "full_tensor") else value.clone()
