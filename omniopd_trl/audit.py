# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""One trajectory through the middle of the method: chunks -> rollouts -> similarity -> posterior.

Text and numbers only: nothing here knows of the trainer, and a teacher is anything that continues text.
"""

import asyncio
import inspect
import math
import threading
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, Literal, Protocol, TypeVar

import torch

from omniopd_trl.chunks import Chunk, select_chunks
from omniopd_trl.errors import TeacherError
from omniopd_trl.posterior import chunk_prior, posterior_mean
from omniopd_trl.similarity import similarity_matrix
from omniopd_trl.teachers.base import Prefix, Prompt, Rollout, SamplingRequest, Teacher, TeacherReply, Usage

T = TypeVar("T")

# The teacher counts in tokens of its own. It is asked for this many times the chunk's length, and what it writes is
# then cut to the chunk's length in student tokens.
TEACHER_TOKENS_PER_STUDENT_TOKEN = 1.4


class Tokenizer(Protocol):
    """What is needed of the student's tokenizer."""

    @property
    def all_special_ids(self) -> list[int]: ...

    def __call__(self, text: list[str], *, add_special_tokens: bool) -> Any: ...

    def decode(
        self, token_ids: list[int], *, skip_special_tokens: bool, clean_up_tokenization_spaces: bool
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
    chunk_overlap: Literal["resample", "merge"]
    chunk_placement: Literal["start", "center"]
    chunk_selection: Literal["entropy", "uniform"]
    teacher_temperature: float
    teacher_top_p: float


@dataclass(frozen=True)
class Trajectory:
    """What the student wrote, and how sure it was.

    Attributes:
        prompt: as it stands in the dataset.
        token_ids: the completion, `T` tokens, without padding.
        entropy: `(T,)`, nats, of the distribution that produced each token (Eq. 6).
        prior_logprobs: `(T,)`, nats, of the tokens under the policy that serves as prior (Eq. 4).
        mask: `(T,)`, true where the student wrote the token; `None` when it wrote all of them.
        seed: seeds the selection (when it is random) and the teacher's sampling (when it can be seeded).
    """

    prompt: Prompt
    token_ids: list[int]
    entropy: torch.Tensor
    prior_logprobs: torch.Tensor
    mask: torch.Tensor | None = None
    seed: int = 0


@dataclass(frozen=True)
class ChunkAudit:
    """One chunk, what the teacher wrote in its place, and what follows from it.

    Attributes:
        chunk: where it stands.
        prefix: the student's text before the chunk.
        text: the student's text in the chunk.
        rollouts: the teacher's texts, cut to the chunk's length in student tokens (`Auditor.length_of`).
        similarities: `phi(text, rollout)` for each rollout, in [0, 1].
        prior: geometric mean probability of the chunk's tokens (Eq. 4).
        posterior: posterior mean (Eq. 5).
    """

    chunk: Chunk
    prefix: str
    text: str
    rollouts: tuple[str, ...]
    similarities: tuple[float, ...]
    prior: float
    posterior: float

    @property
    def mean_similarity(self) -> float:
        """The frequentist estimate, `k_sem / n`."""
        return sum(self.similarities) / len(self.similarities)


@dataclass(frozen=True)
class Audit:
    """All chunks of one trajectory.

    Attributes:
        chunks: the chunks with at least `min_rollouts` rollouts, in ascending order.
        num_dropped: chunks that were selected but got fewer. Their tokens count as un-audited.
        num_rollouts: rollouts that came back.
        num_short: rollouts that the teacher was cut off in before they filled their chunk: its tokens are shorter than
            expected, and the similarity suffers.
        usage: tokens used.
        failures: why rollouts are missing, in the teacher's words.
        outcomes: what the teacher counted besides, under the names of `omniopd_trl.teachers.OUTCOMES`.
    """

    chunks: tuple[ChunkAudit, ...] = ()
    num_dropped: int = 0
    num_rollouts: int = 0
    num_short: int = 0
    usage: Usage = field(default_factory=Usage)
    failures: tuple[str, ...] = ()
    outcomes: Mapping[str, int] = field(default_factory=dict)


class Auditor:
    """Audits trajectories with one teacher.

    Args:
        teacher: who continues the prefixes.
        tokenizer: the student's tokenizer; everything between student and teacher is text.
        settings: how many chunks, how long, how many rollouts.
        similarity: phi, as `get_similarity` returns it.
    """

    def __init__(
        self,
        teacher: Teacher,
        tokenizer: Tokenizer,
        settings: AuditSettings,
        similarity: Callable[[str, str], float],
    ):
        self.teacher = teacher
        self.tokenizer = tokenizer
        self.settings = settings
        self.similarity = similarity

    def select(self, trajectory: Trajectory) -> list[Chunk]:
        """The chunks of a trajectory (Eq. 7)."""
        settings = self.settings
        return select_chunks(
            trajectory.entropy,
            trajectory.mask,
            num_chunks=settings.num_chunks,
            chunk_length=settings.chunk_length,
            min_chunk_length=settings.min_chunk_length,
            overlap=settings.chunk_overlap,
            placement=settings.chunk_placement,
            selection=settings.chunk_selection,
            seed=trajectory.seed,
        )

    async def audit(self, trajectory: Trajectory) -> Audit:
        """Audit one trajectory.

        Raises:
            TeacherError: when the teacher cannot answer and asking again will not help.
        """
        chunks = self.select(trajectory)
        if not chunks:
            return Audit()
        texts = [self.split_text(trajectory.token_ids, chunk) for chunk in chunks]
        request = SamplingRequest(
            num_samples=self.settings.num_rollouts,
            max_tokens=math.ceil(TEACHER_TOKENS_PER_STUDENT_TOKEN * max(chunk.end - chunk.start for chunk in chunks)),
            temperature=self.settings.teacher_temperature,
            top_p=self.settings.teacher_top_p,
            seed=trajectory.seed,
        )
        replies = await replies_of(self.teacher, [Prefix(trajectory.prompt, prefix) for prefix, _ in texts], request)
        return self.score(trajectory, chunks, texts, replies)

    def score(
        self,
        trajectory: Trajectory,
        chunks: list[Chunk],
        texts: list[tuple[str, str]],
        replies: list[TeacherReply],
    ) -> Audit:
        """From the teacher's replies to posteriors (Eq. 3, 4, 5). A chunk with too few rollouts is dropped."""
        cut = [
            self.cut(reply.rollouts, self.length_of(trajectory.token_ids, chunk, text))
            for reply, chunk, (_, text) in zip(replies, chunks, texts, strict=True)
        ]
        rollouts = [texts_of_chunk for texts_of_chunk, _ in cut]
        matrix = similarity_matrix([text for _, text in texts], rollouts, self.similarity)
        audits = []
        for chunk, (prefix, text), answers, similarities in zip(chunks, texts, rollouts, matrix, strict=True):
            if len(answers) < self.settings.min_rollouts:
                continue
            prior = chunk_prior(trajectory.prior_logprobs[chunk.start : chunk.end])
            posterior = posterior_mean(sum(similarities), len(answers), prior, self.settings.prior_strength)
            audits.append(
                ChunkAudit(chunk, prefix, text, tuple(answers), tuple(similarities), float(prior), float(posterior))
            )
        return Audit(
            chunks=tuple(audits),
            num_dropped=len(chunks) - len(audits),
            num_rollouts=sum(map(len, rollouts)),
            num_short=sum(short for _, short in cut),
            usage=sum((reply.usage for reply in replies), Usage()),
            failures=tuple(reply.failure for reply in replies if reply.failure is not None),
            outcomes=dict(sum((Counter(reply.outcomes) for reply in replies), Counter())),
        )

    def split_text(self, token_ids: list[int], chunk: Chunk) -> tuple[str, str]:
        """Text before the chunk, and text of the chunk.

        A chunk may begin or end inside a character of several bytes, whose decoding is then a replacement character.
        The prefix ends before such a character and the chunk begins with it, so the two always join to the student's
        own text.
        """
        whole = self._decode(token_ids[: chunk.end])
        prefix = self._decode(token_ids[: chunk.start])
        if not whole.startswith(prefix):  # tokenizers whose decoding depends on what follows
            prefix = _common_prefix(prefix, whole)
        return prefix, whole[len(prefix) :]

    def length_of(self, token_ids: list[int], chunk: Chunk, text: str) -> int:
        """How many student tokens a rollout may have, to be as long as the chunk.

        That is the chunk's own number, unless the tokenizer begins every text with a space that nobody wrote, as
        those of Llama 2 and Mistral do. Then a rollout, which is encoded by itself, has other tokens than the same
        text has within a trajectory, most often one more, and a teacher that repeats the student word for word would
        lose its last token. So the chunk's text is encoded by itself, too. Its tokens without a text, such as the end
        of the sequence, count as before.

        Args:
            token_ids: the completion.
            chunk: where the chunk stands in it.
            text: its text, from [`split_text`].
        """
        if not self._prepends_space:
            return chunk.end - chunk.start
        special = set(self.tokenizer.all_special_ids)
        without_text = sum(token_id in special for token_id in token_ids[chunk.start : chunk.end])
        return len(self.tokenizer([text], add_special_tokens=False)["input_ids"][0]) + without_text

    @cached_property
    def _prepends_space(self) -> bool:
        """Whether a text by itself is encoded as if a space stood before it: then "a a" is twice the same."""
        (token_ids,) = self.tokenizer(["a a"], add_special_tokens=False)["input_ids"]
        half = len(token_ids) // 2
        return bool(token_ids[:half] == token_ids[half:])

    def cut(self, rollouts: Sequence[Rollout], num_tokens: int) -> tuple[list[str], int]:
        """Cut rollouts to `num_tokens` student tokens ([`length_of`]): a teacher token is not a student token.

        Returns:
            The texts, and how many of them the teacher was cut off in before they had that many tokens.
        """
        if not rollouts:
            return [], 0
        encoded = self.tokenizer([rollout.text for rollout in rollouts], add_special_tokens=False)["input_ids"]
        texts, short = [], 0
        for rollout, token_ids in zip(rollouts, encoded, strict=True):
            short += rollout.finish_reason == "length" and len(token_ids) < num_tokens
            texts.append(rollout.text if len(token_ids) <= num_tokens else self._decode(token_ids[:num_tokens]))
        return texts, short

    def _decode(self, token_ids: list[int]) -> str:
        text = self.tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text.rstrip("\ufffd")  # the beginning of a character that goes on in the next token


async def replies_of(teacher: Teacher, prefixes: Sequence[Prefix], request: SamplingRequest) -> list[TeacherReply]:
    """Ask a teacher, and see that what it returns is what a teacher has to return.

    A mistake in a teacher of one's own would otherwise show far from where it was made, or as other numbers.

    Raises:
        TeacherError: when it is not.
    """
    answer: Any = teacher.sample(prefixes, request)  # whoever writes a teacher need not check its types
    replies: Any = None
    if not inspect.isawaitable(answer):
        problem = f"its `sample` is no coroutine (it returned {_shown(answer)}). Write it as `async def sample`"
    else:
        replies = await answer
        problem = _problem_of(replies, len(prefixes), request.num_samples)
    if problem:
        raise TeacherError(
            f"The teacher {getattr(teacher, 'name', type(teacher).__name__)!r} ({type(teacher).__name__}) does not "
            f"keep to `Teacher.sample`: {problem}. See `A teacher of one's own` in docs/teachers.md."
        )
    return list(replies)


def _problem_of(replies: Any, num_prefixes: int, num_samples: int) -> str:
    if not isinstance(replies, list | tuple) or len(replies) != num_prefixes:
        return f"it must return a list of {num_prefixes} replies, one per prefix, and returned {_shown(replies)}"
    for index, reply in enumerate(replies):
        where = f"reply {index} of {num_prefixes}"
        if not isinstance(reply, TeacherReply):
            return f"{where} must be a `TeacherReply`, and is {_shown(reply)}"
        if not isinstance(reply.rollouts, list | tuple):
            return f"{where} must hold a tuple of rollouts, and holds {_shown(reply.rollouts)}"
        if len(reply.rollouts) > num_samples:
            return f"{where} holds {len(reply.rollouts)} rollouts, and at most num_samples={num_samples} are allowed"
        for rollout in reply.rollouts:
            if not isinstance(rollout, Rollout) or not isinstance(rollout.text, str):
                return f"{where} must hold `Rollout(text)` with a text that is a `str`, and holds {_shown(rollout)}"
        if not isinstance(reply.usage, Usage):
            return f"the usage of {where} must be a `Usage`, and is {_shown(reply.usage)}"
        if not isinstance(reply.outcomes, Mapping):
            return f"the outcomes of {where} must be a dictionary of counts, and are {_shown(reply.outcomes)}"
    return ""


def _shown(value: Any) -> str:
    length = f" of {len(value)}" if isinstance(value, list | tuple | dict) else ""
    return f"{value!r:.80} ({type(value).__name__}{length})"


def _common_prefix(first: str, second: str) -> str:
    for n, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return first[:n]
    return min(first, second, key=len)


class EventLoopThread:
    """An event loop in a thread of its own.

    The trainer is synchronous and may itself run inside an event loop (a notebook does), while the clients of remote
    teachers live on one loop for as long as the run takes.
    """

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._cancelled = threading.Event()  # of what has been submitted so far
        self._thread = threading.Thread(target=self._loop.run_forever, name="omniopd-teacher", daemon=True)
        self._thread.start()

    def submit(self, *coroutines: Coroutine[Any, Any, T]) -> "list[Future[T]]":
        """Start coroutines in the same turn of the loop.

        Returns:
            A future for each; its `result()` waits for the coroutine and raises what it raised.
        """
        futures: list[Future[T]] = [Future() for _ in coroutines]
        cancelled = self._cancelled

        async def begin(coroutine: Coroutine[Any, Any, T]) -> T:
            # A teacher that computes here blocks the loop: what waits behind it must not begin after all.
            if cancelled.is_set():
                coroutine.close()
                raise asyncio.CancelledError
            return await _contained(coroutine)

        def start() -> None:
            for coroutine, future in zip(coroutines, futures, strict=True):
                task = self._loop.create_task(begin(coroutine))
                task.add_done_callback(partial(_copy_result, future))

        self._loop.call_soon_threadsafe(start)
        return futures

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Start one coroutine and wait for it."""
        return self.submit(coroutine)[0].result()

    def cancel(self) -> None:
        """Cancel everything that was submitted and is not finished, and wait until it has ended."""

        async def cancel_others() -> None:
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)

        self._cancelled.set()
        self._cancelled = threading.Event()
        self.run(cancel_others())

    def close(self) -> None:
        """Stop the loop and wait for its thread."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()


async def _contained(coroutine: Coroutine[Any, Any, T]) -> T:
    """Turn what is meant to end a process into an error that the trainer can tell the other processes of.

    `SystemExit` would end the loop instead, and everything that is under way would be waited for without end.
    """
    try:
        return await coroutine
    except (Exception, asyncio.CancelledError):
        raise
    except BaseException as error:
        raise RuntimeError(f"a teacher raised {type(error).__name__}({error}), which ends a process") from error


def _copy_result(future: "Future[T]", task: "asyncio.Task[T]") -> None:
    if task.cancelled():
        future.cancel()
        future.set_running_or_notify_cancel()  # who waits for it is not woken by the former alone
    elif (error := task.exception()) is not None:
        future.set_exception(error)
    else:
        future.set_result(task.result())
