# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Sampling from the student: from its unmodified distribution, and reproducible."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.fsdp import FSDPModule

from omniopd_trl.teachers.local import without_generation_defaults
from omniopd_trl.trainer.objective import evaluation_mode
from omniopd_trl.trainer.omniopd_config import OmniOPDConfig

# Seed of every evaluation, whatever the seed of the run: runs with equal weights then have equal scores.
EVALUATION_SEED = 0


@contextmanager
def on_policy(
    model: nn.Module, accelerator: Accelerator, args: OmniOPDConfig, step: int, eval_batch: int
) -> Iterator[None]:
    """Context that samples without dropout, without `generation_config.json`, and with a seed.

    Args:
        model: the student; in training mode for completions of a training step.
        accelerator: accelerator of the run.
        args: configuration of the run.
        step: current optimizer step.
        eval_batch: index of the batch in an evaluation.
    """
    _reshard(model)
    key = (args.seed, "generation", step) if model.training else (EVALUATION_SEED, "evaluation", eval_batch)
    with _seeded(key, accelerator, args), evaluation_mode(model), without_generation_defaults(model):
        yield


def _reshard(model: nn.Module) -> None:
    """Shard the weights of FSDP2 again. A forward without a backward leaves those of the root module gathered.

    TRL sends the shards to vLLM and cannot read gathered weights. Such forwards are those of an evaluation and of the
    check at the start of training.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@contextmanager
def _seeded(key: tuple[Any, ...], accelerator: Accelerator, args: OmniOPDConfig) -> Iterator[None]:
    """Seed the sampling per process, and restore the generator afterwards.

    A training step is then the same whether earlier steps were generated or replayed, so a resumed run continues like
    one that was never interrupted. An evaluation draws the same random numbers at every step and in every run. A
    colocated vLLM engine draws from the generators of its process, and processes that share an engine need the same
    seed. A vLLM server has its own generators.

    Args:
        key: what the seed depends on besides the process.
        accelerator: accelerator of the run.
        args: configuration of the run.
    """
    if args.use_vllm and args.vllm_mode == "server":
        yield
        return
    engine = accelerator.process_index // (args.vllm_tensor_parallel_size if args.use_vllm else 1)
    seed = random.Random(repr((*key, engine))).getrandbits(31)
    device = accelerator.device
    with torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type):
        torch.manual_seed(seed)
        yield
