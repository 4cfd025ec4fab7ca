# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""The audit of one trajectory: chunks -> rollouts or marks -> similarity -> posterior.

This module works on text and numbers only and does not depend on the trainer.
"""

import asyncio
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import accumulate, islice
from typing import NamedTuple

from omniopd_trl.accounting.usage import NO_LEDGER, Ledger, Tally, Usage
from omniopd_trl.audits.alignment import Alignment
from omniopd_trl.audits.judge import Judged, ask_marks, text_of_candidate
from omniopd_trl.audits.types import (
    Audit,
    AuditSettings,
    Branch,
    ChunkAudit,
    Fork,
    PolicyScores,
    Tokenizer,
    Trajectory,
)
from omniopd_trl.errors import OmniOPDError, WarnOnce
from omniopd_trl.method.branches import diversity, leave_one_out, most_diverse
from omniopd_trl.method.chunks import Chunk, select_chunks
from omniopd_trl.method.posterior import chunk_prior, posterior_mean
from omniopd_trl.method.similarity import similarity_matrix
from omniopd_trl.teachers.base import Prefix, Prompt, Rollout, SamplingRequest, Teacher, TeacherReply, replies_of
from omniopd_trl.teachers.context import with_context
from omniopd_trl.teachers.instruct.judge import Passage, is_middling

# The teacher has its own tokenizer. Rollouts are requested with this many times the chunk's length, and are then cut
# to the chunk's length in student tokens.
TEACHER_TOKENS_PER_STUDENT_TOKEN = 1.4


# From tokens, chunks in them, their texts and their rollouts to the cut rollouts, and the number of short ones; see
# `Alignment.cut`.
Cut = Callable[[list[int], Sequence[Chunk], Sequence[str], Sequence[Sequence[Rollout]]], tuple[list[list[str]], int]]


class Answered(NamedTuple):
    """A trajectory with its chunks, the texts before and in each, the teacher's reply for each, and the cost.

    `is_cut` tells whether the rollouts are already cut to the length of their chunk, as recorded ones are. `judged` is
    what the teacher wrote as a judge; the reply is empty for a chunk that was not asked for.
    """

    trajectory: Trajectory
    scores: PolicyScores
    chunks: list[Chunk]
    texts: list[tuple[str, str]]
    replies: list[TeacherReply]
    usd: float | None = None
    is_cut: bool = False
    judged: Judged | None = None


class Compared(NamedTuple):
    """What the rollouts of a chunk are compared with.

    Attributes:
        tokens: as many tokens as the chunk has.
        text: their text.
    """

    tokens: list[int]
    text: str


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
        # A slow similarity must not delay the event loop, whose requests have time limits. One thread scores one
        # trajectory at a time, since a custom similarity may not be thread-safe.
        self.scoring = ThreadPoolExecutor(1, thread_name_prefix="omniopd-scoring")
        self._warn_once = WarnOnce(__name__)

    def select(self, trajectory: Trajectory, scores: PolicyScores, num_chunks: int | None = None) -> list[Chunk]:
        """The chunks of a trajectory (Eq. 7): `num_chunks` at most, which defaults to the setting.

        None of a trajectory that the verifier leaves out.
        """
        if not trajectory.is_chosen:
            return []
        settings = self.settings
        return select_chunks(
            scores.entropy,
            trajectory.mask,
            num_chunks=num_chunks or settings.num_chunks,
            chunk_length=settings.chunk_length,
            min_chunk_length=settings.min_chunk_length,
            overlap=settings.chunk_overlap,
            placement=settings.chunk_placement,
            selection=settings.chunk_selection,
            seed=trajectory.seed,
            min_anchor_entropy=settings.min_anchor_entropy,
        )

    def candidates(self, trajectory: Trajectory, scores: PolicyScores) -> list[Chunk]:
        """The chunks that may become forks."""
        return self.select(trajectory, scores, self.settings.fork_candidates)

    def forks(
        self,
        trajectory: Trajectory,
        scores: PolicyScores,
        chunks: Sequence[Chunk],
        branches: Iterable[Sequence[Branch]],
    ) -> tuple[Fork, ...]:
        """The `num_chunks` chunks with the most diverse branches, in ascending order.

        Args:
            trajectory: trajectory with a completion of `T` tokens.
            scores: scores of these tokens, `(T,)`.
            chunks: the result of [`candidates`].
            branches: the sampled branches of each candidate. Their texts are filled in here.
        """
        if not chunks:
            return ()
        texts = self.alignment.split_texts(trajectory.completion_ids, chunks, trajectory.prompt_ids)
        forks = []
        for chunk, (_, text), sampled in zip(chunks, texts, branches, strict=True):
            own = Branch(tuple(trajectory.completion_ids[chunk.start : chunk.end]), text)
            before = trajectory.prompt_ids + trajectory.completion_ids[: chunk.start]
            known = {own.token_ids: text}
            for branch in sampled:
                if branch.token_ids not in known:
                    whole = Chunk(0, len(branch.token_ids), 0)
                    ((_, known[branch.token_ids]),) = self.alignment.split_texts([*branch.token_ids], [whole], before)
            forks.append(Fork(chunk, (own, *(replace(branch, text=known[branch.token_ids]) for branch in sampled))))
        entropies = [scores.entropy[chunk.anchor].item() for chunk in chunks]
        kept = most_diverse([fork.diversity for fork in forks], entropies, self.settings.num_chunks)
        return tuple(forks[index] for index in kept)

    async def audit(self, trajectory: Trajectory, scores: PolicyScores, ledger: Ledger = NO_LEDGER) -> Audit:
        """Audit one trajectory.

        Args:
            trajectory: trajectory with a completion of `T` tokens.
            scores: scores of these tokens, `(T,)`.
            ledger: records the cost of the teacher's requests.

        Raises:
            TeacherError: when the teacher cannot answer and asking again will not help.
            Exception: the similarity's own, as [`score`] says.
        """
        return await self.score_later(await self.ask(trajectory, scores, ledger))

    async def ask(self, trajectory: Trajectory, scores: PolicyScores, ledger: Ledger = NO_LEDGER) -> Answered:
        """Ask the teacher for the rollouts or the marks of one trajectory; see [`audit`]."""
        if trajectory.forks is None:
            chunks = self.select(trajectory, scores)
        else:
            chunks = [fork.chunk for fork in trajectory.forks if fork.diversity > 0]
        if not chunks:
            return Answered(trajectory, scores, [], [], [])
        tally = Tally(ledger)
        texts = self.alignment.split_texts(trajectory.completion_ids, chunks, trajectory.prompt_ids)
        settings = self.settings
        prompt = with_context(trajectory.prompt, trajectory.teacher_context, settings.teacher_context_template)
        request = SamplingRequest(
            num_samples=settings.num_rollouts,
            max_tokens=math.ceil(TEACHER_TOKENS_PER_STUDENT_TOKEN * max(chunk.end - chunk.start for chunk in chunks)),
            temperature=settings.teacher_temperature,
            top_p=settings.teacher_top_p,
            seed=trajectory.seed,
            ledger=tally,
        )
        if settings.signal == "rollouts":
            replies = await self._rollouts(trajectory, chunks, texts, prompt, request)
            return Answered(trajectory, scores, chunks, texts, replies, tally.usd)
        judged = await ask_marks(self.teacher, prompt, *self.passages(trajectory, chunks, texts), request)
        replies = [TeacherReply()] * len(chunks)
        asked = [index for index, marks in enumerate(judged.marks) if self._needs_rollouts(marks)]
        if asked:
            of_asked = [chunks[index] for index in asked], [texts[index] for index in asked]
            rollouts = await self._rollouts(trajectory, *of_asked, prompt, request)
            for index, reply in zip(asked, rollouts, strict=True):
                replies[index] = reply
        return Answered(trajectory, scores, chunks, texts, replies, tally.usd, judged=judged)

    async def _rollouts(
        self,
        trajectory: Trajectory,
        chunks: Sequence[Chunk],
        texts: Sequence[tuple[str, str]],
        prompt: Prompt,
        request: SamplingRequest,
    ) -> list[TeacherReply]:
        """The rollouts of each chunk: all at once, or no more than the first ones where these agree."""
        prefixes = [Prefix(prompt, before) for before, _ in texts]
        first = self.settings.first_rollouts
        if not first:
            return await replies_of(self.teacher, prefixes, request)
        replies = await replies_of(self.teacher, prefixes, replace(request, num_samples=first))
        agree = partial(self._agree, trajectory, chunks, texts, replies)
        if self.teacher.is_remote:
            agreed = await asyncio.get_running_loop().run_in_executor(self.scoring, agree)
        else:  # its calls share a batch if they are made together, and nothing else waits for this loop
            agreed = agree()
        others = [index for index, is_agreed in enumerate(agreed) if not is_agreed]
        if others:
            # With another seed, since the same one may return the first rollouts again.
            seed = (trajectory.seed + first) % 2**31
            rest = replace(request, num_samples=request.num_samples - first, seed=seed)
            more = await replies_of(self.teacher, [prefixes[index] for index in others], rest)
            for index, reply in zip(others, more, strict=True):
                replies[index] += reply
        return replies

    def _agree(
        self,
        trajectory: Trajectory,
        chunks: Sequence[Chunk],
        texts: Sequence[tuple[str, str]],
        replies: Sequence[TeacherReply],
    ) -> list[bool]:
        """Whether the first rollouts of each chunk are all there, and equal after the cut.

        Only texts decide, so the rule is the same for every similarity.
        """
        own, given = [text for _, text in texts], [reply.rollouts for reply in replies]
        try:
            kept, _ = self.alignment.cut(trajectory.completion_ids, chunks, own, given)
        except Exception:  # a rollout that cannot be encoded agrees with none, and `score` sets it aside
            return [False] * len(chunks)
        return [len(rollouts) == self.settings.first_rollouts and not diversity(rollouts) for rollouts in kept]

    def _needs_rollouts(self, marks: Mapping[str, float]) -> bool:
        """Whether the rollouts of a chunk are asked for, since its marks decide nothing."""
        settings = self.settings
        return settings.signal == "cascade" and is_middling(marks, settings.cascade_low, settings.cascade_high)

    def passages(
        self, trajectory: Trajectory, chunks: Sequence[Chunk], texts: Sequence[tuple[str, str]]
    ) -> tuple[list[Passage], str]:
        """The chunks of a trajectory as a judge reads them, and the text after the last one."""
        ids, forks = trajectory.completion_ids, {fork.chunk: fork for fork in trajectory.forks or ()}
        starts, ends = [0, *(chunk.end for chunk in chunks)], [*(chunk.start for chunk in chunks), len(ids)]
        gaps = [Chunk(start, end, start) for start, end in zip(starts, ends, strict=True)]
        *between, (_, rest) = self.alignment.split_texts(ids, gaps, trajectory.prompt_ids)
        passages = []
        for chunk, (_, before), (_, text) in zip(chunks, between, texts, strict=True):
            units = _compared(trajectory, chunk, text, forks.get(chunk))
            candidates = {text_of_candidate(unit.text): unit.text for unit in units}
            # Sorted, so the order does not tell which one the student's text continues.
            passages.append(Passage(before, text, tuple(candidates[key] for key in sorted(candidates))))
        return passages, rest

    async def score_later(self, answered: Answered) -> Audit:
        """Score a trajectory in the thread for it; see [`score`]."""
        return await asyncio.get_running_loop().run_in_executor(self.scoring, self.score, answered)

    def score(self, answered: Answered) -> Audit:
        """Compute posteriors from the teacher's replies (Eq. 3, 4, 5). A chunk with too few rollouts is dropped.

        A rollout that cannot be encoded, or for which the similarity raises an error, is set aside: it is counted as
        missing, and a warning quotes it. A similarity that raises an error for each of several rollouts, or returns
        no number in [0, 1], is a bug, and its error is raised.
        """
        trajectory, scores, chunks, texts, replies, usd, is_cut, judged = answered
        forks = {fork.chunk: fork for fork in trajectory.forks or ()}
        compared = [
            _compared(trajectory, chunk, text, forks.get(chunk))
            for chunk, (_, text) in zip(chunks, texts, strict=True)
        ]
        given = [reply.rollouts for reply in replies]
        set_aside: list[str] = []
        cut = _already_cut if is_cut else self.alignment.cut
        try:
            rollouts, num_short, matrices = self._compare_all(cut, compared, given)
        except OmniOPDError:
            raise
        except Exception as error:
            given, set_aside = self._set_aside(cut, compared, given, error)
            rollouts, num_short, matrices = self._compare_all(cut, compared, given)
        audits = []
        marks_of_chunks = [{}] * len(chunks) if judged is None else judged.marks
        for chunk, (prefix, text), units, answers, matrix, marks in zip(
            chunks, texts, compared, rollouts, matrices, marks_of_chunks, strict=True
        ):
            rows = matrix
            if marks and not self._needs_rollouts(marks):
                rows = [[marks[text_of_candidate(unit.text)]] for unit in units]  # one observation for each text
            elif len(answers) < self.settings.min_rollouts:
                continue
            similarities = rows[0]
            prior = chunk_prior(scores.prior_logprobs[chunk.start : chunk.end])
            posterior = posterior_mean(sum(similarities), len(similarities), prior, self.settings.prior_strength)
            branches: tuple[Branch, ...] = ()
            if chunk in forks:
                mean_of = {unit.text: sum(row) / len(row) for unit, row in zip(units, rows, strict=True)}
                branches = self._with_advantages(forks[chunk], mean_of)
            of_teacher = (tuple(answers), tuple(similarities))
            mark = marks.get(text_of_candidate(text))
            audits.append(ChunkAudit(chunk, prefix, text, *of_teacher, float(prior), float(posterior), branches, mark))
        replies = [*replies, *(judged.replies if judged is not None else ())]
        return Audit(
            chunks=tuple(audits),
            num_dropped=len(chunks) - len(audits),
            num_rollouts=sum(map(len, rollouts)),
            num_short=num_short,
            usage=sum((reply.usage for reply in replies), Usage()),
            num_set_aside=len(set_aside),
            failures=(*(reply.failure for reply in replies if reply.failure is not None), *set_aside),
            outcomes=dict(sum((Counter(reply.outcomes) for reply in replies), Counter())),
            models=tuple(sorted({name for reply in replies for name in reply.models})),
            usd=usd,
            agreed=tuple(chunk for chunk, fork in forks.items() if fork.diversity == 0),
            answers=() if judged is None else judged.answers,
        )

    def _with_advantages(self, fork: Fork, similarity_of: Mapping[str, float]) -> tuple[Branch, ...]:
        """The branches of a fork with their similarities and advantages."""
        similarities = [similarity_of[branch.text] for branch in fork.branches]
        advantages = leave_one_out(similarities, self.settings.scale_advantages)
        of_branches = zip(fork.branches, similarities, advantages, strict=True)
        return tuple(replace(branch, similarity=s, advantage=a) for branch, s, a in of_branches)

    def _compare_all(
        self, cut: Cut, compared: Sequence[Sequence[Compared]], rollouts: Sequence[Sequence[Rollout]]
    ) -> tuple[list[list[str]], int, list[list[list[float]]]]:
        """For each chunk, its rollouts, cut for its own text, and their similarities to each of its texts.

        Also returns the number of rollouts that are short, compared with the chunk's own text.
        """
        kept, num_short, first = self._compare(cut, [units[0] for units in compared], rollouts)
        others = [(unit, given) for units, given in zip(compared, rollouts, strict=True) for unit in units[1:]]
        _, _, rows = self._compare(cut, [unit for unit, _ in others], [given for _, given in others])
        rest = iter(rows)
        matrices = [[row, *islice(rest, len(units) - 1)] for row, units in zip(first, compared, strict=True)]
        return kept, num_short, matrices

    def _compare(
        self, cut: Cut, compared: Sequence[Compared], rollouts: Sequence[Sequence[Rollout]]
    ) -> tuple[list[list[str]], int, list[list[float]]]:
        """The cut rollouts of each text, the number of short ones, and their similarities.

        Without any rollout, the texts are not encoded: they are of no use then.
        """
        if not any(rollouts):
            return [[] for _ in compared], 0, [[] for _ in compared]
        ends = list(accumulate(len(unit.tokens) for unit in compared))
        chunks = [Chunk(end - len(unit.tokens), end, end - 1) for unit, end in zip(compared, ends, strict=True)]
        texts = [unit.text for unit in compared]
        kept, num_short = cut([t for unit in compared for t in unit.tokens], chunks, texts, rollouts)
        return kept, num_short, similarity_matrix(texts, kept, self.similarity)

    def _set_aside(
        self,
        cut: Cut,
        compared: Sequence[Sequence[Compared]],
        rollouts: Sequence[Sequence[Rollout]],
        error: Exception,
    ) -> tuple[list[tuple[Rollout, ...]], list[str]]:
        """The rollouts that can be scored, each tried alone, and the reason for each of the others.

        Raises:
            Exception: `error`, when the similarity fails for each of several rollouts.
        """
        kept, reasons, num_encoded, num_failed = [], [], 0, 0
        for units, of_chunk in zip(compared, rollouts, strict=True):
            scored, texts = [], [unit.text for unit in units]
            whole = Chunk(0, len(units[0].tokens), 0)
            for rollout in of_chunk:
                what = "encoded with the student's tokenizer"
                try:
                    ((kept_text,),), _ = cut(units[0].tokens, [whole], texts[:1], [[rollout]])
                    what = "scored by the similarity"
                    num_encoded += 1
                    similarity_matrix(texts, [[kept_text]] * len(texts), self.similarity)
                except OmniOPDError:
                    raise
                except Exception as caught:
                    num_failed += what.startswith("scored")
                    why = f"a rollout cannot be {what} ({type(caught).__name__}: {caught})"
                    reasons.append(why)
                    self._warn_once(
                        f"{why[0].upper()}{why[1:]}, and is set aside, like others of this kind. It is "
                        f"{rollout.text!r:.200}, and its chunk is {texts[0]!r:.200}.",
                        f"{what} {type(caught).__name__}",
                    )
                else:
                    scored.append(rollout)
            kept.append(tuple(scored))
        if num_failed == num_encoded > 1:
            raise error
        return kept, reasons


def _already_cut(
    token_ids: list[int], chunks: Sequence[Chunk], texts: Sequence[str], rollouts: Sequence[Sequence[Rollout]]
) -> tuple[list[list[str]], int]:
    return [[rollout.text for rollout in of_chunk] for of_chunk in rollouts], 0


def _compared(trajectory: Trajectory, chunk: Chunk, text: str, fork: Fork | None) -> list[Compared]:
    """What the rollouts of a chunk are compared with: its own text, and each other text of its fork once."""
    size = chunk.end - chunk.start
    compared = {text: trajectory.completion_ids[chunk.start : chunk.end]}
    for branch in fork.branches[1:] if fork is not None else ():
        # A branch that ended is compared with rollouts of the chunk's length. Its last token has no text.
        padding = [branch.token_ids[-1]] * (size - len(branch.token_ids))
        compared.setdefault(branch.text, [*branch.token_ids, *padding])
    return [Compared(tokens, text) for text, tokens in compared.items()]
