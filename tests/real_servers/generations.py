# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""A trainer that compares, at each generation, the student that vLLM runs with the student that is trained."""

import copy
import zlib
from dataclasses import dataclass
from typing import Any

import torch

from omniopd_trl import OmniOPDConfig, OmniOPDTrainer
from omniopd_trl.audits.types import Branch
from omniopd_trl.teachers import ScriptedTeacher
from tests.real_servers.questions import dataset
from tests.support.training import script

# Two micro-batches per step, evaluation after every second one. AdamW at this rate moves the demo's student by tenths
# of a nat per token in a step.
SETTINGS: dict[str, Any] = {
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "save_strategy": "no",
    "gradient_checkpointing": False,
    "disable_tqdm": True,
    "use_vllm": True,
    "temperature": 0.8,
    "max_completion_length": 100,
    "num_chunks": 3,
    "chunk_length": 10,
    "min_chunk_length": 4,
    "num_rollouts": 3,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "max_steps": 4,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "logging_steps": 1,
    "learning_rate": 3e-3,
    "lr_scheduler_type": "constant",
}


@dataclass
class Generation:
    """One generation: who asked for it, and how far vLLM's log-probabilities of its tokens are from the student's.

    Attributes:
        mode: `"train"` or `"eval"`.
        step: `global_step`.
        tokens: how many were sampled.
        text: stands for what was sampled, token by token.
        largest: largest absolute difference to the student as it is, in nats.
        mean: mean absolute difference to the student as it is, in nats.
        stale: mean absolute difference to the student of the last generation at another step; what `mean` would be,
            had vLLM still had those weights. `None` when there is none.
    """

    mode: str
    step: int
    tokens: int
    text: int
    largest: float
    mean: float
    stale: float | None


@torch.no_grad()
def dense_logprobs(model: torch.nn.Module, prompt: list[int], completion: list[int], temperature: float):
    """`(T,)` from the model's own logits, row by row: nothing of the package's computation is used."""
    was_training = model.training
    logits = model.eval()(torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1]
    model.train(was_training)
    return (logits.double() / temperature).log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0]


class ComparingTrainer(OmniOPDTrainer):
    """Keeps a [`Generation`] for each one that vLLM did."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        # Nothing is split over processes yet.
        self._blank = copy.deepcopy(self.model)
        # TRL asks for no log-probabilities: that they are there is the trainer's doing.
        self.generations: list[Generation] = []
        self._at: tuple[int, torch.nn.Module] | None = None
        self._before: torch.nn.Module | None = None
        self._mode = ""
        self._latest: list[tuple[Any, ...]] = []
        self.first: list[tuple[list[int], list[int]]] = []
        # For each fork, its prefix's length, its branches, and the largest difference of their log-probabilities.
        self.branches: list[tuple[int, list[tuple[int, ...]], float]] = []
        generate = self.vllm_generation.generate

        def compare(prompts, *args, **kwargs):
            output = generate(prompts, *args, **kwargs)
            self._compare(prompts, *output[1:])
            return output

        self.vllm_generation.generate = compare

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> list[list[int]]:
        self._mode = "train" if self.model.training else "eval"
        return super()._generate_single_turn(*args, **kwargs)

    def _sample_branches(self, prefixes: list[tuple[list[int], int]], *args: Any, **kwargs: Any) -> list[list[Branch]]:
        branches = super()._sample_branches(prefixes, *args, **kwargs)
        student = self.copy()
        for (ids, length), of_fork in zip(prefixes, branches, strict=True):
            assert all(0 < len(branch.token_ids) == len(branch.sampling_logprobs) <= length for branch in of_fork)
            own = [dense_logprobs(student, ids, list(branch.token_ids), self.temperature) for branch in of_fork]
            sampled = [value for branch in of_fork for value in branch.sampling_logprobs]
            difference = (torch.cat(own) - torch.tensor(sampled, dtype=torch.float64)).abs().max().item()
            self.branches.append((len(ids), [branch.token_ids for branch in of_fork], difference))
        return branches

    def copy(self) -> torch.nn.Module:
        """The student as it is, whole, on this process alone; all processes have to ask for it together."""
        copied = copy.deepcopy(self._blank)
        weights = self.model.state_dict()
        copied.load_state_dict({k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in weights.items()})
        return copied

    def _compare(self, prompts, completion_ids, logprobs, token_ids) -> None:
        step = self.state.global_step
        if self._at is None or self._at[0] != step:
            self._before = None if self._at is None else self._at[1]
            self._at = (step, self.copy())
        self._latest = list(zip(prompts, completion_ids, logprobs, token_ids, strict=True))
        self.first = self.first or [(prompt, list(ids)) for prompt, ids, *_ in self._latest]
        assert all(ids == [sampled for (sampled,) in tables] for _, ids, _, tables in self._latest)
        now = self.difference_to(self.copy())
        self.generations.append(
            Generation(
                mode=self._mode,
                step=step,
                tokens=len(now),
                text=zlib.crc32(repr([(prompt, list(ids)) for prompt, ids, *_ in self._latest]).encode()),
                largest=now.max().item(),
                mean=now.mean().item(),
                stale=None if self._before is None else self.difference_to(self._before).mean().item(),
            )
        )

    def difference_to(self, model: torch.nn.Module) -> torch.Tensor:
        """From what vLLM sampled the latest generation with to what a model gives its tokens, `(N,)` in nats."""
        own = [dense_logprobs(model, prompt, ids, self.temperature) for prompt, ids, *_ in self._latest]
        sampled = [value for _, _, values, _ in self._latest for (value,) in values]
        return (torch.cat(own) - torch.tensor(sampled, dtype=torch.float64)).abs()


def make(model: Any, output_dir: Any, **overrides: Any) -> ComparingTrainer:
    """The demo's student with a teacher that follows a script. Arguments that are no settings go to the trainer."""
    fields = OmniOPDConfig.__dataclass_fields__
    settings = {k: v for k, v in overrides.items() if k in fields}
    arguments = {k: v for k, v in overrides.items() if k not in fields}
    return ComparingTrainer(
        model=str(model),
        args=OmniOPDConfig(output_dir=str(output_dir), **{**SETTINGS, **settings}),
        **{
            "teacher_model": ScriptedTeacher(script),
            "train_dataset": dataset(16),
            "eval_dataset": dataset(6),
            **arguments,
        },
    )
