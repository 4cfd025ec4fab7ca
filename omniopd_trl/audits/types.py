# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""An audit's input, settings and result."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Protocol

import numpy as np
import torch

from omniopd_trl.accounting.usage import Usage
from omniopd_trl.method.branches import diversity
from omniopd_trl.method.chunks import Chunk, Overlap, Placement, Selection
from omniopd_trl.teachers.base import Prompt
from omniopd_trl.teachers.instruct.judge import Signal


class Tokenizer(Protocol):
    """The part of the student's tokenizer that audits use."""

    def __call__(self, text: list[str], *, add_special_tokens: bool) -> Any: ...

    def decode(
        self, token_ids: list[int] | np.ndarray, *, skip_special_tokens: bool, clean_up_tokenization_spaces: bool
    ) -> Any: ...


@dataclass(frozen=True)
class AuditSettings:
    """The part of the configuration that an audit needs; see `OmniOPDConfig` for the meaning of each field."""

    num_chunks: int
    chunk_length: int
    min_chunk_length: int
    num_rollouts: int
    min_rollouts: int
    prior_strength: float
    chunk_overlap: Overlap
    chunk_placement: Placement
    chunk_selection: Selection
    teacher_temperature: float
    teacher_top_p: float
    keep_special_tokens: bool = False
    min_anchor_entropy: float = 0.0
    num_branches: int = 0
    fork_candidates: int = 0
    scale_advantages: bool = False
    teacher_context_template: str | None = None
    signal: Signal = "rollouts"
    cascade_low: float = 0.3
    cascade_high: float = 0.7
    first_rollouts: int = 0

    @classmethod
    def of(cls, config: Any) -> "AuditSettings":
        """The settings of an `OmniOPDConfig`, by the names of the fields."""
        return cls(**{option.name: getattr(config, option.name) for option in fields(cls)})


@dataclass(frozen=True)
class Branch:
    """One continuation of the student at a fork.

    Attributes:
        token_ids: its tokens, as many as the chunk has, or fewer if it ended.
        text: their text.
        sampling_logprobs: as in [`Trajectory`], for these tokens. Empty if the policy itself sampled, and for the
            trajectory's own chunk.
        similarity: mean similarity to the rollouts, or the mark, in [0, 1]; `None` before the audit.
        advantage: advantage over the other branches of the fork (`leave_one_out`).
    """

    token_ids: tuple[int, ...]
    text: str
    sampling_logprobs: tuple[float | None, ...] = ()
    similarity: float | None = None
    advantage: float = 0.0


@dataclass(frozen=True)
class Fork:
    """A chunk, and what the student writes in its place.

    Attributes:
        chunk: position of the chunk, in tokens.
        branches: the trajectory's own chunk, and then the `num_branches` others.
    """

    chunk: Chunk
    branches: tuple[Branch, ...]

    @property
    def diversity(self) -> float:
        """How much the texts of the branches differ, in [0, 1). The teacher is asked only if it is above 0."""
        return diversity([branch.text for branch in self.branches])


@dataclass(frozen=True)
class Verified:
    """What a verifier says of a trajectory.

    Attributes:
        rewards: score of each reward function, by its name; `None` where it declined to score.
        reward: weighted sum of the scores; `None` if all functions declined.
        advantage: the reward minus the mean of the group (`group_advantages`).
        is_chosen: whether the teacher is asked about the trajectory (`chosen_for_audits`).
    """

    rewards: Mapping[str, float | None]
    reward: float | None
    advantage: float
    is_chosen: bool = True


@dataclass(frozen=True)
class Trajectory:
    """A prompt and the student's completion. The journal keeps everything but the mask.

    Attributes:
        prompt: the prompt, as in the dataset.
        prompt_ids: the rendered prompt, without padding.
        completion_ids: the completion, `T` tokens, without padding.
        mask: `(T,)`, true where the student wrote the token; `None` when it wrote all of them.
        seed: seed of the selection, when it is random, and of the teacher's sampling, when the teacher accepts one.
        sampling_logprobs: log-probabilities that the tokens were sampled with, in nats, `None` for a token where it is
            not known. `None` if the policy itself sampled. It may be shorter or longer than the completion, when an
            end was added or when the completion is excluded.
        forks: the chunks with their branches, in ascending order. `None` without branches: the chunks are then
            selected by the audit.
        teacher_context: what only the teacher sees of the row, beside the prompt; `None` for nothing.
        verified: what the verifier says; `None` without one.
        row: hash of the row of a stream that the verifier has scored; `None` for any other.
    """

    prompt: Prompt
    prompt_ids: list[int]
    completion_ids: list[int]
    mask: torch.Tensor | None = None
    seed: int = 0
    sampling_logprobs: list[float | None] | None = None
    forks: tuple[Fork, ...] | None = None
    teacher_context: str | None = None
    verified: Verified | None = None
    row: str | None = None

    @property
    def is_chosen(self) -> bool:
        """Whether the teacher is asked about it."""
        return self.verified is None or self.verified.is_chosen


@dataclass(frozen=True)
class PolicyScores:
    """Scores of completions under the policy that sampled them: tensors of one shape, `(T,)` or `(B, T)`, in nats.

    Attributes:
        logprobs: log-probabilities of the tokens.
        entropy: entropy of the distribution from which each token was sampled (Eq. 6).
        prior_logprobs: log-probabilities of the tokens under the prior's policy (Eq. 4).
    """

    logprobs: torch.Tensor
    entropy: torch.Tensor
    prior_logprobs: torch.Tensor

    def is_finite(self) -> torch.Tensor:
        """A scalar tensor, true when no value is NaN or infinite."""
        return torch.stack([self.logprobs, self.entropy, self.prior_logprobs]).isfinite().all()

    def rows(self, lengths: list[int]) -> "list[PolicyScores]":
        """The scores of each row of a batch on the CPU, `(T_b,)`, cut to its length."""
        table = torch.stack([self.logprobs, self.entropy, self.prior_logprobs]).cpu().unbind(1)
        return [PolicyScores(*row[:, :length]) for row, length in zip(table, lengths, strict=True)]


@dataclass(frozen=True)
class ChunkAudit:
    """One chunk, its rollouts and its posterior.

    Attributes:
        chunk: position of the chunk, in tokens.
        prefix: the student's text before the chunk.
        text: the student's text in the chunk.
        rollouts: the teacher's texts, cut to the chunk's length in student tokens (`Alignment.cut`).
        similarities: `phi(text, rollout)` for each rollout, in [0, 1]. The mark alone for a chunk without rollouts.
        prior: geometric mean probability of the chunk's tokens (Eq. 4).
        posterior: posterior mean (Eq. 5). With branches, it weights nothing.
        branches: the branches of the fork with their similarities and advantages, the trajectory's own chunk first.
            Empty without branches.
        mark: mark of the judge, in [0, 1]; `None` without one. With rollouts, it weights nothing.
    """

    chunk: Chunk
    prefix: str
    text: str
    rollouts: tuple[str, ...]
    similarities: tuple[float, ...]
    prior: float
    posterior: float
    branches: tuple[Branch, ...] = ()
    mark: float | None = None

    @property
    def mean_similarity(self) -> float:
        """The frequentist estimate, `k_sem / n`. The mark, for a chunk without rollouts."""
        return sum(self.similarities) / len(self.similarities)


@dataclass(frozen=True)
class Audit:
    """The audit of one trajectory.

    Attributes:
        chunks: the chunks with at least `min_rollouts` rollouts, in ascending order.
        num_dropped: selected chunks with fewer than `min_rollouts` rollouts, or without the mark that was asked for.
            Their tokens count as un-audited.
        num_rollouts: rollouts that the teacher returned.
        num_short: rollouts that ended at the teacher's token limit before they filled their chunk. The teacher's
            tokens are shorter than expected, and the similarity is less accurate.
        num_set_aside: rollouts that could not be encoded or scored. They are not part of `num_rollouts`.
        usage: tokens used.
        failures: reasons for missing rollouts, as the teacher reports them.
        outcomes: other counts of the teacher, under the names of `omniopd_trl.teachers.OUTCOMES`.
        models: names of the models that answered, as the service reports them.
        usd: US dollars of the requests; `None` without a price.
        agreed: forks whose branches all have one text. The teacher was not asked, and their tokens are neither trained
            nor anchored.
        answers: what the judge wrote, as it wrote it. The last one holds the marks, unless there are none.
    """

    chunks: tuple[ChunkAudit, ...] = ()
    num_dropped: int = 0
    num_rollouts: int = 0
    num_short: int = 0
    num_set_aside: int = 0
    usage: Usage = field(default_factory=Usage)
    failures: tuple[str, ...] = ()
    outcomes: Mapping[str, int] = field(default_factory=dict)
    models: tuple[str, ...] = ()
    usd: float | None = None
    agreed: tuple[Chunk, ...] = ()
    answers: tuple[str, ...] = ()
