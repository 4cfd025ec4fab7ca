# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities from the student's generation with vLLM, which TRL's engine does not return."""

import math
from collections.abc import Sequence
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
        self._kept: list[list[float | None]] | None = None

    def _generate_and_keep(self, *args: Any, **kwargs: Any) -> tuple:
        output = self._generate(*args, **kwargs)
        _, completion_ids, logprobs, token_ids = output
        self._kept = None
        if logprobs is not None:
            rows = zip(completion_ids, token_ids, logprobs, strict=True)
            self._kept = [[_of(*position) for position in zip(*row, strict=True)] for row in rows]
        return output

    def take(self) -> list[list[float | None]] | None:
        """Return the log-probabilities of the last generation, and discard them.

        Returns:
            One list per sequence, in nats, with `None` where vLLM has none. `None` if there was no generation since
            the last call.
        """
        kept, self._kept = self._kept, None
        return kept


def _of(token: int, candidates: list[int], logprobs: list[float | None]) -> float | None:
    """The log-probability of the sampled token among the candidates, to six decimals, since the journal keeps it.

    There are several candidates with `generation_kwargs={"logprobs": N}`.
    """
    value = logprobs[candidates.index(token)]
    return None if value is None or not math.isfinite(value) else round(value, 6)


def padded_logprobs(rows: Sequence[Sequence[float | None] | torch.Tensor], lengths: Sequence[int]) -> torch.Tensor:
    """Log-probabilities as a tensor `(B, T)`, float64, with NaN where there are none.

    Args:
        rows: values of each sequence. They may be more or fewer than its length: an empty completion gets an end token
            that was not sampled, and an excluded one may be shorter.
        lengths: number of tokens of each sequence.
    """
    padded = torch.full((len(rows), max(lengths, default=0)), math.nan, dtype=torch.float64)
    for b, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        values = row if isinstance(row, torch.Tensor) else [math.nan if v is None else v for v in row]
        known = torch.as_tensor(values, dtype=torch.float64)[:length]
        padded[b, : len(known)] = known
    return padded


def sampling_difference(sampled: torch.Tensor, logprobs: torch.Tensor) -> torch.Tensor:
    """Absolute differences between the log-probabilities of the engine and those of the student.

    Args:
        sampled: `(B, T)`, log-probabilities of the engine, in nats, NaN where there are none.
        logprobs: `(B, T)`, log-probabilities of the student, in nats, NaN where there are none.

    Returns:
        `(N,)`, in nats, one value for each token that both have.
    """
    difference = (logprobs - sampled).abs()
    return difference[~difference.isnan()]
