# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Sampling from the student: from its unmodified distribution, and reproducible."""

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.fsdp import FSDPModule
from trl import DistillationTrainer

from omniopd_trl.audits.types import Branch
from omniopd_trl.data.encoding import encode_prompts
from omniopd_trl.teachers.local import without_generation_defaults
from omniopd_trl.trainer.metrics import non_finite
from omniopd_trl.trainer.objective import evaluation_mode
from omniopd_trl.trainer.omniopd_config import OmniOPDConfig

# Seed of every evaluation, whatever the seed of the run: runs with equal weights then have equal scores.
EVALUATION_SEED = 0


@contextmanager
def on_policy(
    model: nn.Module,
    accelerator: Accelerator,
    args: OmniOPDConfig,
    step: int,
    eval_batch: int,
    purpose: str = "generation",
) -> Iterator[None]:
    """Context that samples without dropout, without `generation_config.json`, and with a seed.

    Args:
        model: the student; in training mode for completions of a training step.
        accelerator: accelerator of the run.
        args: configuration of the run.
        step: current optimizer step.
        eval_batch: index of the batch in an evaluation.
        purpose: what is sampled in a training step. Each purpose has its own seed.
    """
    _reshard(model)
    key = (args.seed, purpose, step) if model.training else (EVALUATION_SEED, "evaluation", eval_batch)
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


# Function from prompts and the most tokens of a completion to the completions, and their log-probabilities if another
# model than the policy sampled them.
Generate = Callable[[list[list[int]], int], tuple[list[list[int]], list[list[float | None]] | None]]


def sample_branches(
    generate: Generate,
    prefixes: list[tuple[list[int], int]],
    *,
    num_branches: int,
    max_tokens: int,
    filler: list[int],
    accelerator: Accelerator,
) -> list[list[Branch]]:
    """Sample the student's continuations of prefixes. Every process has to call it at the same point.

    Generation is collective under several back ends. All processes therefore generate equally many rows in equally
    many batches: one that has fewer prefixes than another adds fillers, and drops their continuations.

    Args:
        generate: the engine, at the temperature and with the filters of the trajectories.
        prefixes: token ids of each prefix, and the length of its chunk.
        num_branches: number of continuations per prefix, K.
        max_tokens: most tokens of a batch, padding included. At least one row is generated at a time.
        filler: token ids of a prompt.
        accelerator: accelerator of the run.

    Returns:
        For each prefix its branches, without texts, cut to the length of the chunk.
    """
    rows = [(ids, length, index) for index, (ids, length) in enumerate(prefixes) for _ in range(num_branches)]
    rows.sort(key=lambda row: -len(row[0]))  # similar lengths together, which keeps padding small
    sizes = [
        *(len(rows), max((len(ids) for ids, *_ in rows), default=1), max((row[1] for row in rows), default=1)),
        -max_tokens,
    ]
    gathered = accelerator.gather(torch.tensor([sizes], device=accelerator.device))
    number, longest, length, max_tokens = gathered.amax(0).tolist()
    rows += [(filler, 1, -1)] * (number - len(rows))
    branches: list[list[Branch]] = [[] for _ in prefixes]
    size = max(1, -max_tokens // (longest + length))
    for start in range(0, number, size):
        batch = rows[start : start + size]
        completions, logprobs = generate([ids for ids, *_ in batch], length)
        for row, ((_, limit, index), ids) in enumerate(zip(batch, completions, strict=True)):
            if index >= 0:
                sampled = () if logprobs is None else tuple(logprobs[row][:limit])
                branches[index].append(Branch(tuple(ids[:limit]), "", sampled))
    return branches


class Generates(DistillationTrainer):
    """The hooks of [`OmniOPDTrainer`] for the student's completions and branches."""

    def _tokenize_prompts(self, prompts):
        # The base class would let a tokenizer append the end of the sequence to a plain prompt. Prompts of map-style
        # datasets were checked at the start; those of streams are checked here, before the student answers them.
        for prompt in prompts:
            self.teacher.check_prompt(prompt)
        return encode_prompts(prompts, self._tokenizer, self.chat_template_kwargs), None, {}

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        replayed = self.step_audits.replay(prompt_ids) if self.model.training else None
        if replayed is not None:
            if self.sampling_logprobs is not None:
                self.sampling_logprobs.take()  # discard those of an evaluation
            known = [trajectory.sampling_logprobs for trajectory in replayed]
            self._sampled = None if any(row is None for row in known) else known
            return [trajectory.completion_ids for trajectory in replayed]
        completion_ids, self._sampled = self._sample(prompt_ids, *args, **kwargs)
        return completion_ids

    def _sample(
        self, prompt_ids: list[list[int]], *args: Any, purpose: str = "generation", **kwargs: Any
    ) -> tuple[list[list[int]], list[list[float | None]] | None]:
        """Completions of the student, and their log-probabilities if another model than the policy sampled them."""
        try:
            with on_policy(self.model, self.accelerator, self.args, self.state.global_step, self._eval_batch, purpose):
                completion_ids = super()._generate_single_turn(prompt_ids, *args, **kwargs)
            self._eval_batch += not self.model.training
        except RuntimeError as error:
            if "probability tensor contains" in str(error):  # torch.multinomial
                raise non_finite("the student's next-token probabilities", self.state.global_step) from error
            raise
        sampled = self.sampling_logprobs.take() if self.sampling_logprobs is not None else None
        # An engine may return an empty completion, but the base class reads the last token of each.
        return [ids or [self._tokenizer.eos_token_id] for ids in completion_ids], sampled

    def _sample_branches(
        self, prefixes: list[tuple[list[int], int]], batch: dict[str, torch.Tensor], part: int
    ) -> list[list[Branch]]:
        """Branches of the student after the prefixes; see [`sample_branches`].

        Args:
            prefixes: token ids of each prefix, and the length of its chunk.
            batch: the generation batch. A batch of branches has no more tokens than it may have; vLLM limits its
                batches itself.
            part: index of the part of the generation batch that the prefixes are from.
        """
        calls = count()
        batch_size, prompt_length = batch["prompt_ids"].shape
        max_tokens = batch_size * (prompt_length + self.max_completion_length)

        def generate(prompts: list[list[int]], max_tokens: int) -> Any:
            with self._completion_limit(max_tokens):
                return self._sample(prompts, None, {}, purpose=f"branches {part}.{next(calls)}")

        return sample_branches(
            generate,
            prefixes,
            num_branches=self.args.num_branches,
            max_tokens=sys.maxsize if self.use_vllm else max_tokens,
            filler=batch["prompt_ids"][0][batch["prompt_mask"][0].bool()].tolist(),
            accelerator=self.accelerator,
        )

    @contextmanager
    def _completion_limit(self, max_tokens: int) -> Iterator[None]:
        """Context in which the engine generates at most `max_tokens` tokens."""
        owner, name = self.generation_config, "max_new_tokens"
        if self.use_vllm:
            owner, name = self.vllm_generation, "max_completion_length"
        before = getattr(owner, name)
        setattr(owner, name, max_tokens)
        try:
            yield
        finally:
            setattr(owner, name, before)
