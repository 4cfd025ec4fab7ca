# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Sampling from the student: from its unmodified distribution, and reproducible."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import count
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import set_seed
from trl import DistillationTrainer

from omniopd_trl.audits.types import Branch
from omniopd_trl.data.encoding import encode_prompts
from omniopd_trl.method import importance_weights
from omniopd_trl.models.growing_cache import growing_cache
from omniopd_trl.models.prefix_tree import generating_from_trees
from omniopd_trl.models.tree_attention import sampling_attention
from omniopd_trl.models.vllm_logprobs import SamplingLogprobs
from omniopd_trl.teachers.local import without_generation_defaults
from omniopd_trl.trainer.exported import Export
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
    seeded = _seeded(key, accelerator, args)
    attention = sampling_attention(accelerator.unwrap_model(model))
    with seeded, evaluation_mode(model), without_generation_defaults(model), growing_cache(), attention:
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


# A row to generate: its prefix, the length of its chunk, and the index of the prefix.
_Row = tuple[list[int], int, int]


def sample_branches(
    generate: Generate,
    prefixes: list[tuple[list[int], int]],
    *,
    num_branches: int,
    max_tokens: int | None,
    from_trees: bool,
    filler: list[int],
    accelerator: Accelerator,
) -> list[list[Branch]]:
    """Sample the student's continuations of prefixes. Every process has to call it at the same point.

    Generation is collective under several back ends, so all processes generate equally many batches, with equally many
    tokens per row. One that has fewer batches than another generates a filler, and drops its continuation.

    Args:
        generate: the engine, at the temperature and with the filters of the trajectories.
        prefixes: token ids of each prefix, and the length of its chunk. Those of a trajectory follow each other, the
            shortest first.
        num_branches: number of continuations per prefix, K.
        max_tokens: most tokens of a batch, padding included. At least one row, or with `from_trees` one trajectory, is
            generated at a time. `None` for an engine that limits its batches itself: it gets one batch, with equally
            many rows from each process.
        from_trees: whether a batch keeps what its rows share once; see [`PrefixTree`].
        filler: token ids of a prompt.
        accelerator: accelerator of the run.

    Returns:
        For each prefix its branches, without texts, cut to the length of the chunk.
    """
    rows = [(ids, length, index) for index, (ids, length) in enumerate(prefixes) for _ in range(num_branches)]
    length = max((row[1] for row in rows), default=1)
    groups = _nested(rows) if from_trees else [[row] for row in rows]
    batches = _batches(groups, length, max_tokens)
    sizes = torch.tensor([[len(batches), max(map(len, batches), default=0), length]], device=accelerator.device)
    number, most, length = accelerator.gather(sizes).amax(0).tolist()
    batches += [[]] * (number - len(batches))
    branches: list[list[Branch]] = [[] for _ in prefixes]
    for batch in batches:
        num_fillers = max(1, most if max_tokens is None else 1) - len(batch)
        batch = [*batch, *[(filler, 1, -1)] * num_fillers]
        completions, logprobs = generate([ids for ids, *_ in batch], length)
        for row, ((_, limit, index), ids) in enumerate(zip(batch, completions, strict=True)):
            if index >= 0:
                sampled = () if logprobs is None else tuple(logprobs[row][:limit])
                branches[index].append(Branch(tuple(ids[:limit]), "", sampled))
    return branches


def _nested(rows: list[_Row]) -> list[list[_Row]]:
    """Rows in groups, in each of which every prefix begins with the one before: those of one trajectory."""
    groups: list[list[_Row]] = []
    for row in rows:
        last = groups[-1][-1][0] if groups else None
        if last is not None and row[0][: len(last)] == last:
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


def _batches(groups: list[list[_Row]], length: int, max_tokens: int | None) -> list[list[_Row]]:
    """Groups of rows in batches of at most `max_tokens`, if each group keeps its longest prefix once."""
    # Groups of similar size together, which keeps padding small.
    groups = sorted(groups, key=lambda group: (-len(group), -len(group[-1][0])))
    batches: list[list[list[_Row]]] = []
    for group in groups:
        batch = [*batches[-1], group] if batches else [group]
        width, most = max(len(g[-1][0]) for g in batch), max(map(len, batch))
        if not batches or (max_tokens is not None and len(batch) * (width + most * length) > max_tokens):
            batches.append([group])
        else:
            batches[-1].append(group)
    return [[row for group in batch for row in group] for batch in batches]


class Generates(DistillationTrainer):
    """The hooks of [`OmniOPDTrainer`] for the student's completions and branches."""

    def _set_up_sampling(self) -> None:
        """Create what reads the engine's log-probabilities, and seed a colocated engine."""
        self.sampling_logprobs: SamplingLogprobs | None = None
        # Log-probabilities that the last completions were sampled with, if another model than the policy sampled them.
        self._sampled: list[list[float | None]] | None = None
        self._eval_batch = 0  # index of the next batch in an evaluation
        if self.use_vllm:
            self.sampling_logprobs = SamplingLogprobs(self.vllm_generation, self.eos_token_ids)
        if self.use_vllm and self.vllm_mode == "colocate":
            # The engine draws from this process's generators and has seeded them with a constant: all runs would draw
            # the same samples, whatever their `seed`. Processes that share an engine need the same seed.
            set_seed(self.args.seed + self.accelerator.process_index // self.args.vllm_tensor_parallel_size)

    def _tokenize_prompts(self, prompts):
        # The base class would let a tokenizer append the end of the sequence to a plain prompt.
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
        # Each forward of a prepared model autocasts by itself. An outer context keeps the cast weights from one token
        # to the next, which costs 2 bytes per parameter while completions are sampled.
        keeps_casts = nullcontext() if self.use_vllm else self.accelerator.autocast()
        policy = on_policy(self.model, self.accelerator, self.args, self.state.global_step, self._eval_batch, purpose)
        try:
            with policy, keeps_casts:
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
        from_trees = not self.use_vllm and self.objective.continues_trees(self.model_wrapped)

        def generate(prompts: list[list[int]], max_tokens: int) -> Any:
            student = self.accelerator.unwrap_model(self.model_wrapped)
            with (
                self._completion_limit(max_tokens),
                generating_from_trees(student) if from_trees else nullcontext(),
            ):
                return self._sample(prompts, None, {}, purpose=f"branches {part}.{next(calls)}")

        return sample_branches(
            generate,
            prefixes,
            num_branches=self.args.num_branches,
            max_tokens=None if self.use_vllm else max_tokens,
            from_trees=from_trees,
            filler=batch["prompt_ids"][0][batch["prompt_mask"][0].bool()].tolist(),
            accelerator=self.accelerator,
        )

    def _add_importance(
        self, batch: dict[str, torch.Tensor], sampled: torch.Tensor, logprobs: torch.Tensor, mode: str
    ) -> None:
        """Compare the student with what sampled the completions, and add the importance weights to the batch.

        Args:
            batch: the generation batch.
            sampled: `(B, T)`, log-probabilities that the completions were sampled with, in nats, NaN where unknown.
            logprobs: `(B, T)`, log-probabilities of the student, in nats, NaN where there are none.
            mode: `"train"` or `"eval"`.
        """
        if isinstance(self.teacher, Export) and mode == "train":
            self.step_metrics.add_drift(sampled, logprobs)
        else:
            self.step_metrics.add_sampling(mode, sampled, logprobs)
        if self.args.importance_sampling_correction:
            ratio = importance_weights(logprobs, sampled, self.args.importance_sampling_clip_max)
            self.step_metrics.add_importance(mode, ratio[~(logprobs - sampled).isnan()])
            batch["importance"] = torch.ones_like(batch["weights"])
            batch["importance"][:, : ratio.size(1)] = ratio.to(batch["weights"])

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
