# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""What a teacher is: one method that continues a batch of prefixes and returns text."""

import inspect
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from omniopd_trl.accounting.usage import NO_LEDGER, Ledger, Usage
from omniopd_trl.errors import DataError, TeacherError

if TYPE_CHECKING:
    from omniopd_trl.accounting.budget import Budget

# What a reply may count besides its rollouts. A refused, filtered or empty sample is no rollout; a restarted one (an
# instructed continuation that began the solution anew) is; a failed request was given up after its last attempt.
OUTCOMES = ("requests", "retries", "failed_requests", "refused", "filtered", "empty", "restarted")

Messages = list[dict[str, Any]]
Prompt = str | Messages


@dataclass(frozen=True)
class Prefix:
    """What the teacher continues: the problem and the beginning of an answer to it.

    Attributes:
        prompt: plain text, or a list of chat messages. The teacher renders it with its own template. A message whose
            content is a list of text parts has their text instead: no service's adapter has to know the list.
        completion: the student's text so far. It stands at the beginning of the assistant's turn, byte for byte.

    Raises:
        DataError: when a message holds a part that is not text.
    """

    prompt: Prompt
    completion: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.prompt, str) and any(isinstance(m.get("content"), list | tuple) for m in self.prompt):
            messages = [{**m, "content": text_of_content(m.get("content"))} for m in self.prompt]
            object.__setattr__(self, "prompt", messages)


def text_of_content(content: Any) -> Any:
    """The text of a message's content. Parts are joined by line breaks; what is no list stays as it is.

    Args:
        content: a text, or a list of parts `{"type": "text", "text": ...}`.

    Raises:
        DataError: when a part is not text.

    Example:
        >>> text_of_content([{"type": "text", "text": "What is"}, {"type": "text", "text": "3 + 4?"}])
        'What is\\n3 + 4?'
    """
    if not isinstance(content, list | tuple):
        return content
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise DataError(
                f"A message of the prompt holds {part!r:.200}, and teachers read text only: a part must be "
                '{"type": "text", "text": "..."}. Remove the other parts from the dataset.'
            )
    return "\n".join(part["text"] for part in content)


def common_prefix_length(first: Sequence[Any], second: Sequence[Any]) -> int:
    """Length of the common beginning of two texts, or of two lists of tokens.

    By halving: comparing slices is fast, and both may be long.
    """
    return bisect_left(range(min(len(first), len(second))), True, key=lambda n: first[: n + 1] != second[: n + 1])


@dataclass(frozen=True)
class SamplingRequest:
    """How to sample the continuations of every prefix of a batch.

    Attributes:
        num_samples: independent continuations per prefix.
        max_tokens: longest continuation, in the teacher's own tokens.
        temperature: sampling temperature; 0 asks for greedy decoding.
        top_p: nucleus sampling mass.
        seed: seeds the sampling of a teacher that can be seeded; `None` leaves it to the teacher.
        ledger: where a teacher that pays for requests accounts for each one, as soon as it is answered. A teacher that
            does not call it is counted by the usage of its replies.
    """

    num_samples: int
    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    ledger: Ledger = field(default=NO_LEDGER, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Rollout:
    """One continuation.

    Attributes:
        text: what the teacher wrote next, without special tokens.
        finish_reason: `"stop"` when the teacher ended its turn, `"length"` when it was cut at `max_tokens`.
    """

    text: str
    finish_reason: str = "stop"


@dataclass(frozen=True, slots=True)
class TeacherReply:
    """The continuations of one prefix.

    Attributes:
        rollouts: at most `num_samples` of them. Fewer, or none, is an outcome and not an error: a refusal, a prefix
            longer than the teacher's context.
        usage: tokens that this prefix used.
        failure: why rollouts are missing, in words; `None` when none are.
        outcomes: how often something happened that is worth counting, under the names of `OUTCOMES`.
    """

    rollouts: tuple[Rollout, ...] = ()
    usage: Usage = field(default_factory=Usage)
    failure: str | None = None
    outcomes: Mapping[str, int] = field(default_factory=dict)


class Teacher(ABC):
    """Anything that continues text.

    A teacher of one's own subclasses this and writes `sample`; the trainer takes an instance as `teacher_model`.

    Attributes:
        name: how logs and the model card call the teacher, and what its recorded answers are known by: a run that is
            started again in the same folder replays those of a teacher of the same name without asking. A teacher
            whose answers change (another model, prompt or script) must change its name.
        is_remote: whether its work goes on elsewhere while this process trains, so that audits may overlap with
            training. A model in this process shares its device and its random numbers.
        budget: what it may still spend, and what it has in flight; `None` for a teacher that keeps no such account.
    """

    name: str
    is_remote: bool = False
    budget: "Budget | None" = None

    @abstractmethod
    async def sample(self, prefixes: Sequence[Prefix], request: SamplingRequest) -> list[TeacherReply]:
        """Continue each prefix.

        Args:
            prefixes: usually the chunks of one trajectory in ascending order, so that each prefix begins with the one
                before it. Calls for several trajectories run concurrently.
            request: the same for all prefixes of the call.

        Returns:
            One reply per prefix, in the order of `prefixes`.

        Raises:
            TeacherError: when asking again will not help.
        """

    def probe(self, prompt: Prompt) -> None:
        """Check, before anything expensive starts, that the teacher can continue an answer to `prompt`.

        Raises:
            DataError: when it cannot render the prompt.
            TeacherError: when it cannot answer at all.
        """

    async def aclose(self) -> None:
        """Release connections. The trainer may ask again later, for an evaluation or more training."""


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
