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
from omniopd_trl.audits.types import Audit, AuditSettings, ChunkAudit, PolicyScores, Tokenizer, Trajectory
from omniopd_trl.method.chunks import Chunk, select_chunks
from omniopd_trl.method.posterior import chunk_prior, posterior_mean
from omniopd_trl.method.similarity import similarity_matrix
from omniopd_trl.teachers.base import Prefix, SamplingRequest, Teacher, TeacherReply, replies_of

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
        self.alignment = Alignment(tokenizer, settings.keep_special_tokens)
        self.settings = settings
        self.similarity = similarity

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
        texts = self.alignment.split_texts(trajectory.completion_ids, chunks, trajectory.prompt_ids)
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
        return Audit(
            chunks=tuple(audits),
            num_dropped=len(chunks) - len(audits),
            num_rollouts=sum(map(len, rollouts)),
            num_short=num_short,
            usage=sum((reply.usage for reply in replies), Usage()),
            failures=tuple(reply.failure for reply in replies if reply.failure is not None),
            outcomes=dict(sum((Counter(reply.outcomes) for reply in replies), Counter())),
        )
