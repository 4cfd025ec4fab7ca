# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""The audit of one trajectory: chunks -> rollouts -> similarity -> posterior.

This module works on text and numbers only and does not depend on the trainer.
"""

import math
from collections import Counter
from collections.abc import Callable

from omniopd_trl.accounting.usage import NO_LEDGER, Ledger, Usage
from omniopd_trl.audits.alignment import Alignment
from omniopd_trl.audits.types import (
    LONG_ROLLOUT,
    Audit,
    AuditSettings,
    ChunkAudit,
    PolicyScores,
    Tokenizer,
    Trajectory,
)
from omniopd_trl.errors import WarnOnce
from omniopd_trl.method.chunks import Chunk, select_chunks
from omniopd_trl.method.posterior import chunk_prior, posterior_mean
from omniopd_trl.method.similarity import similarity_matrix
from omniopd_trl.teachers.base import Prefix, SamplingRequest, Teacher, TeacherReply, replies_of

# Chunks with several long rollouts that are compared before a warning.
COMPARED_CHUNKS = 20

# The teacher has its own tokenizer. Rollouts are requested with this many times the chunk's length, and are then cut
# to the chunk's length in student tokens.
TEACHER_TOKENS_PER_STUDENT_TOKEN = 1.4


class Auditor:
    """Audits trajectories with one teacher.

    Args:
        teacher: teacher that continues the prefixes.
        tokenizer: the student's tokenizer. Student and teacher exchange text only.
        settings: settings of chunks, rollouts and posterior.
        similarity: similarity phi in [0, 1], as `get_similarity` returns it.
    """

    def __init__(
        self,
        teacher: Teacher,
        tokenizer: Tokenizer,
        settings: AuditSettings,
        similarity: Callable[[str, str], float],
    ):
        self.teacher = teacher
        self.alignment = Alignment(tokenizer)
        self.settings = settings
        self.similarity = similarity
        self._warn_once = WarnOnce(__name__)
        self._compared = self._all_equal = 0  # chunks with several long rollouts, and those where all are equal

    def select(self, trajectory: Trajectory, scores: PolicyScores) -> list[Chunk]:
        """The chunks of a trajectory (Eq. 7)."""
        settings = self.settings
        return select_chunks(
            scores.entropy,
            trajectory.mask,
            num_chunks=settings.num_chunks,
            chunk_length=settings.chunk_length,
            min_chunk_length=settings.min_chunk_length,
            overlap=settings.chunk_overlap,
            placement=settings.chunk_placement,
            selection=settings.chunk_selection,
            seed=trajectory.seed,
        )

    async def audit(self, trajectory: Trajectory, scores: PolicyScores, ledger: Ledger = NO_LEDGER) -> Audit:
        """Audit one trajectory.

        Args:
            trajectory: trajectory with a completion of `T` tokens.
            scores: scores of these tokens, `(T,)`.
            ledger: records the cost of the teacher's requests.

        Raises:
            TeacherError: when the teacher cannot answer and asking again will not help.
        """
        chunks = self.select(trajectory, scores)
        if not chunks:
            return Audit()
        texts = self.alignment.split_texts(trajectory.completion_ids, chunks)
        request = SamplingRequest(
            num_samples=self.settings.num_rollouts,
            max_tokens=math.ceil(TEACHER_TOKENS_PER_STUDENT_TOKEN * max(chunk.end - chunk.start for chunk in chunks)),
            temperature=self.settings.teacher_temperature,
            top_p=self.settings.teacher_top_p,
            seed=trajectory.seed,
            ledger=ledger,
        )
        replies = await replies_of(self.teacher, [Prefix(trajectory.prompt, prefix) for prefix, _ in texts], request)
        return self.score(trajectory, scores, chunks, texts, replies)

    def score(
        self,
        trajectory: Trajectory,
        scores: PolicyScores,
        chunks: list[Chunk],
        texts: list[tuple[str, str]],
        replies: list[TeacherReply],
    ) -> Audit:
        """Compute posteriors from the teacher's replies (Eq. 3, 4, 5). A chunk with too few rollouts is dropped."""
        chunk_texts = [text for _, text in texts]
        rollouts, num_short = self.alignment.cut(
            trajectory.completion_ids, chunks, chunk_texts, [reply.rollouts for reply in replies]
        )
        matrix = similarity_matrix(chunk_texts, rollouts, self.similarity)
        audits = []
        for chunk, (prefix, text), answers, similarities in zip(chunks, texts, rollouts, matrix, strict=True):
            if len(answers) < self.settings.min_rollouts:
                continue
            prior = chunk_prior(scores.prior_logprobs[chunk.start : chunk.end])
            posterior = posterior_mean(sum(similarities), len(answers), prior, self.settings.prior_strength)
            audits.append(
                ChunkAudit(chunk, prefix, text, tuple(answers), tuple(similarities), float(prior), float(posterior))
            )
        longer = [texts for texts in map(_long, rollouts) if len(texts) > 1]
        self._compare(longer)
        return Audit(
            chunks=tuple(audits),
            num_dropped=len(chunks) - len(audits),
            num_rollouts=sum(map(len, rollouts)),
            num_short=num_short,
            num_long=sum(map(len, longer)),
            num_duplicates=sum(len(texts) - len(set(texts)) for texts in longer),
            usage=sum((reply.usage for reply in replies), Usage()),
            failures=tuple(reply.failure for reply in replies if reply.failure is not None),
            outcomes=dict(sum((Counter(reply.outcomes) for reply in replies), Counter())),
            models=tuple(sorted({name for reply in replies for name in reply.models})),
        )

    def _compare(self, longer: list[list[str]]) -> None:
        """Warn once when the long rollouts of most chunks are all equal although they are sampled."""
        self._compared += len(longer)
        self._all_equal += sum(len(set(texts)) == 1 for texts in longer)
        is_sampled = self.settings.teacher_temperature > 0
        if is_sampled and self._compared >= COMPARED_CHUNKS and self._all_equal > self._compared / 2:
            self._warn_once(
                f"All rollouts are equal in {self._all_equal} of {self._compared} chunks, although "
                f"teacher_temperature={self.settings.teacher_temperature:g}: the teacher {self.teacher.name} or a "
                "gateway before it returns one sample several times, so N rollouts count as N observations but are "
                "one. Disable the gateway's cache of answers, check that the server samples and honours seeds, or "
                "set num_rollouts=1.",
                "duplicates",
            )


def _long(rollouts: list[str]) -> list[str]:
    return [text for text in map(str.strip, rollouts) if len(text) >= LONG_ROLLOUT]
