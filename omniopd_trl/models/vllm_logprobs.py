# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""The student's generation by vLLM: what the trainer wants of TRL's engine besides the tokens."""

import math
from typing import Any

import torch
from trl.generation.vllm_generation import VLLMGeneration

# Mean absolute difference in nats from which on a warning is logged. In bf16 the two differ by about a hundredth.
LARGE_DIFFERENCE = 0.1


class SamplingLogprobs:
    """Keeps the log-probabilities that vLLM sampled with, which the base class neither asks for nor hands on.

    Args:
        generation: TRL's engine, in either mode. It is told to return them, and to stop where the trainer does: vLLM
            knows the ends that its own copy of the model names, which a `processing_class` may add to.
        eos_token_ids: the tokens that end a completion.
    """

    def __init__(self, generation: VLLMGeneration, eos_token_ids: list[int]):
        generation.logprobs = 0  # of the sampled token, and of no other
        generation.generation_kwargs = {"stop_token_ids": eos_token_ids, **generation.generation_kwargs}
        self._generate = generation.generate
        generation.generate = self._generate_and_keep
        self._kept: list[list[float]] | None = None

    def _generate_and_keep(self, *args: Any, **kwargs: Any) -> tuple:
        output = self._generate(*args, **kwargs)
        _, completion_ids, logprobs, token_ids = output
        self._kept = None
        if logprobs is not None:
            rows = zip(completion_ids, token_ids, logprobs, strict=True)
            self._kept = [[_of(*position) for position in zip(*row, strict=True)] for row in rows]
        return output

    def take(self) -> list[list[float]] | None:
        """Those of the last generation, per sequence and token, in nats; `None` when there was none since."""
        kept, self._kept = self._kept, None
        return kept


def _of(token: int, candidates: list[int], logprobs: list[float | None]) -> float:
    """The sampled token's: `generation_kwargs={"logprobs": N}` asks for more. One that is no number comes as None."""
    value = logprobs[candidates.index(token)]
    return math.nan if value is None else value


def sampling_difference(sampled: list[list[float]], logprobs: list[torch.Tensor]) -> torch.Tensor:
    """How far the log-probabilities that an engine sampled with are from the student's own.

    Args:
        sampled: per sequence, of its tokens, in nats.
        logprobs: per sequence `(T,)`, in nats. An empty completion has got an end since, which nobody sampled; one
            that is left out of the training may be shorter than what was sampled.

    Returns:
        `(N,)`, float64, absolute differences of all tokens that both have, in nats.
    """
    pairs = zip(map(torch.tensor, sampled), logprobs, strict=True)
    return torch.cat([(row[: len(ids)].double().cpu() - ids[: len(row)].double()).abs() for ids, row in pairs])
