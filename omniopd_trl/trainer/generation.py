# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""How the student samples: from its own distribution and nothing else, and the same in a run that is resumed."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from torch import nn

from omniopd_trl.teachers.local import without_generation_defaults
from omniopd_trl.trainer.objective import evaluation_mode
from omniopd_trl.trainer.omniopd_config import OmniOPDConfig


@contextmanager
def on_policy(model: nn.Module, accelerator: Accelerator, args: OmniOPDConfig, step: int) -> Iterator[None]:
    """Sample in this block without dropout, without what `generation_config.json` adds, and from a seed of the step.

    Args:
        model: the student, in training mode while completions of training are sampled.
        accelerator: of the run.
        args: of the run.
        step: the current optimizer step.
    """
    with _seeded(model, accelerator, args, step), evaluation_mode(model), without_generation_defaults(model):
        yield


@contextmanager
def _seeded(model: nn.Module, accelerator: Accelerator, args: OmniOPDConfig, step: int) -> Iterator[None]:
    """Sample completions of training from a seed of this step and process, and leave the generator as it was.

    A step is then the same whether the steps before it were generated or replayed, so that a resumed run continues
    like one that was never interrupted. A colocated vLLM draws from the generators of its process, and processes
    that share an engine have to draw alike; a server has generators of its own.
    """
    if not model.training or (args.use_vllm and args.vllm_mode == "server"):
        yield
        return
    engine = accelerator.process_index // (args.vllm_tensor_parallel_size if args.use_vllm else 1)
    seed = random.Random(repr((args.seed, "generation", step, engine))).getrandbits(31)
    device = accelerator.device
    with torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type):
        torch.manual_seed(seed)
        yield
