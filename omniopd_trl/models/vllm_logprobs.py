# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities from the student's generation with vLLM, which TRL's engine does not return."""

import math
from typing import Any

import torch
from trl.generation.vllm_generation import VLLMGeneration

# A warning is logged if the mean absolute difference exceeds this value, in nats. In bf16 it is about 0.01.
LARGE_DIFFERENCE = 0.1


class SamplingLogprobs:
    """Keeps the log-probabilities that vLLM sampled with. TRL's trainer neither requests nor returns them.

    Args:
        generation: TRL's engine, in either mode. It is configured to return log-probabilities and to stop at
            `eos_token_ids`: by default vLLM stops only at those of its own copy of the model, and the
            `processing_class` may add others.
        eos_token_ids: the tokens that end a completion.
    """

    def __init__(self, generation: VLLMGeneration, eos_token_ids: list[int]):
        generation.logprobs = 0  # only the sampled token
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
        """Return the log-probabilities of the last generation, and discard them.

        Returns:
            One list per sequence, in nats. `None` if there was no generation since the last call.
        """
        kept, self._kept = self._kept, None
        return kept


def _of(token: int, candidates: list[int], logprobs: list[float | None]) -> float:
    """The log-probability of the sampled token among the candidates, NaN if vLLM returned `None`.

    There are several candidates with `generation_kwargs={"logprobs": N}`.
    """
    value = logprobs[candidates.index(token)]
    return math.nan if value is None else value


def sampling_difference(sampled: list[list[float]], logprobs: list[torch.Tensor]) -> torch.Tensor:
    """Absolute differences between the log-probabilities of the engine and those of the student.

    Args:
        sampled: log-probabilities of the engine, one list per sequence, in nats.
        logprobs: log-probabilities of the student, `(T,)` per sequence, in nats. Lengths may differ from `sampled`:
            an empty completion gets an end token that was not sampled, and an excluded one may be shorter.

    Returns:
        `(N,)`, float64, in nats, one value for each token that both have.
    """
    pairs = zip(map(torch.tensor, sampled), logprobs, strict=True)
    return torch.cat([(row[: len(ids)].double().cpu() - ids[: len(row)].double()).abs() for ids, row in pairs])
