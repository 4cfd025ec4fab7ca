# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""The interface of a teacher: one method that continues a batch of prefixes and returns text."""

import hashlib
import inspect
import json
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from omniopd_trl.accounting.usage import NO_LEDGER, Ledger, Usage
from omniopd_trl.errors import DataError, TeacherError

if TYPE_CHECKING:
    from omniopd_trl.accounting.budget import Budget

# Counts of a reply besides its rollouts. A refused, filtered or empty sample is not a rollout. A restarted sample is
# one: an instructed model started the solution over. A failed request was given up after its last attempt.
# A reasoned sample has reasoning in front, which is removed, or is reasoning only and counts as empty, too.
OUTCOMES = ("requests", "retries", "failed_requests", "refused", "filtered", "empty", "restarted", "reasoned")
# Beside these counts: the time from each request to its answer or failure, in milliseconds.
REQUEST_MILLISECONDS = "request_milliseconds"

Messages = list[dict[str, Any]]
Prompt = str | Messages


@dataclass(frozen=True)
class Prefix:
    """What the teacher continues: the problem and the beginning of an answer to it.

    Attributes:
        prompt: plain text, or a list of chat messages. The teacher renders it with its own template. Content that is a
            list of text parts is replaced by their text, so adapters see text only.
        completion: the student's text so far. The assistant's turn begins with it, byte for byte.
        is_question: whether the prompt is a question that the teacher answers in its own words, without a completion.
            No instruction to continue a text is added to it.

    Raises:
        DataError: when a message holds a part that is not text.
    """

    prompt: Prompt
    completion: str = ""
    is_question: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.prompt, str) and any(isinstance(m.get("content"), list | tuple) for m in self.prompt):
            messages = [{**m, "content": text_of_content(m.get("content"))} for m in self.prompt]
            object.__setattr__(self, "prompt", messages)

    @property
    def messages(self) -> Messages:
        """The prompt as messages with a role and a content, in a new list. Plain text is one message of the user.

        Other keys are left out, since services refuse those that they do not know. `datasets` adds each key that a
        message of any row has to all messages, as `None`.
        """
        if isinstance(self.prompt, str):
            return [{"role": "user", "content": self.prompt}]
        return [{key: message[key] for key in ("role", "content")} for message in self.prompt]


def split_system(messages: Messages) -> tuple[str, Messages]:
    """The text of the messages of the system and of a developer, joined by blank lines, and the other messages."""
    above = ("system", "developer")
    system = "\n\n".join(str(message["content"]) for message in messages if message["role"] in above)
    return system, [message for message in messages if message["role"] not in above]


def text_of_content(content: Any) -> Any:
    """The text of a message's content. Parts are joined by line breaks; other content is returned unchanged.

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


def clean_text(text: str) -> str:
    """Replace lone surrogates by U+FFFD. JSON can hold them, and no tokenizer accepts them.

    Example:
        >>> clean_text("7 \\ud83d")
        '7 \ufffd'
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def common_prefix_length(first: Sequence[Any], second: Sequence[Any]) -> int:
    """Length of the common prefix of two texts, or of two lists of tokens.

    Binary search: slices are fast to compare, and both inputs may be long.
    """
    return bisect_left(range(min(len(first), len(second))), True, key=lambda n: first[: n + 1] != second[: n + 1])


@dataclass(frozen=True)
class SamplingRequest:
    """How to sample the continuations of every prefix of a batch.

    Attributes:
        num_samples: independent continuations per prefix.
        max_tokens: maximum length of a continuation, in the teacher's tokens.
        temperature: sampling temperature; 0 asks for greedy decoding.
        top_p: nucleus sampling mass.
        seed: seed of the sampling, for a teacher that accepts one; `None` for no seed. A later request for more
            samples of the same prefixes has another one.
        ledger: records the cost of each request as soon as it is answered. For a teacher that does not call it, the
            usage of the replies is counted.
        top_k: number of the most likely tokens that are kept; 0 keeps all. For a teacher in this process, as `min_p`.
        min_p: tokens are kept if their probability is at least this share of the highest; 0 keeps all.
    """

    num_samples: int
    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    ledger: Ledger = field(default=NO_LEDGER, compare=False, repr=False)
    top_k: int = 0
    min_p: float = 0.0


def seed_of_sample(seed: int, prefix: Prefix, index: int) -> int:
    """The seed of one sample of a prefix, from 0 to 2^31 - 1: the same in any batch, for any model and on any machine.

    Args:
        seed: seed of the request.
        prefix: the prefix.
        index: index of the sample.
    """
    key = json.dumps([seed, prefix.prompt, prefix.completion, index], sort_keys=True)
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:4]) >> 1


@dataclass(frozen=True, slots=True)
class Rollout:
    """One continuation.

    Attributes:
        text: what the teacher wrote next, without special tokens. Lone surrogates are replaced by U+FFFD.
        finish_reason: `"stop"` when the teacher ended its turn, `"length"` when it was cut at `max_tokens`.
    """

    text: str
    finish_reason: str = "stop"

    def __post_init__(self) -> None:
        if isinstance(self.text, str):  # `replies_of` reports anything else
            object.__setattr__(self, "text", clean_text(self.text))


@dataclass(frozen=True, slots=True)
class TeacherReply:
    """The continuations of one prefix.

    Attributes:
        rollouts: at most `num_samples` rollouts. Fewer, or none, is not an error: the teacher may refuse, or the
            prefix may exceed its context.
        usage: tokens that this prefix used.
        failure: reason for missing rollouts; `None` when none are missing.
        outcomes: counts of events, under the names of `OUTCOMES`, and `REQUEST_MILLISECONDS`.
        models: names of the models that answered, as a service reports them.
    """

    rollouts: tuple[Rollout, ...] = ()
    usage: Usage = field(default_factory=Usage)
    failure: str | None = None
    outcomes: Mapping[str, int] = field(default_factory=dict)
    models: tuple[str, ...] = ()

    def __add__(self, more: "TeacherReply") -> "TeacherReply":
        """This reply, and the reply to a later request for more continuations of the same prefix."""
        failures = [reply.failure for reply in (self, more) if reply.failure is not None]
        return TeacherReply(
            (*self.rollouts, *more.rollouts),
            self.usage + more.usage,
            "; ".join(failures) or None,
            Counter(self.outcomes) + Counter(more.outcomes),
            tuple(sorted({*self.models, *more.models})),
        )


class Teacher(ABC):
    """Base class of all teachers.

    A custom teacher subclasses it and implements `sample`. The trainer takes an instance as `teacher_model`.

    Attributes:
        name: name of the teacher in logs and in the model card. It also identifies recorded answers, together with the
            code of the class and the attributes that are named like parameters of `__init__`: a resumed run replays
            the answers of the same teacher. Change the name when something else changes the answers.
        is_remote: whether the teacher computes outside this process, so audits may overlap with training. A model in
            this process shares the student's device and random numbers.
        budget: what the teacher may still spend and has in flight; `None` for a teacher without a budget.
    """

    name: str
    is_remote: bool = False
    budget: "Budget | None" = None

    @abstractmethod
    async def sample(self, prefixes: Sequence[Prefix], request: SamplingRequest) -> list[TeacherReply]:
        """Continue each prefix.

        Args:
            prefixes: usually those of the chunks of one trajectory in ascending order. Each one then begins with the
                one before it. Calls for several trajectories run concurrently.
            request: how to sample, for all prefixes of the call.

        Returns:
            One reply per prefix, in the order of `prefixes`.

        Raises:
            TeacherError: when asking again will not help.
        """

    def check_prompt(self, prompt: Prompt) -> None:
        """Check that the teacher can render `prompt`, without a request.

        Called for every prompt of a map-style dataset before training, and for each prompt before the student answers
        it.

        Raises:
            DataError: when it cannot render the prompt.
        """

    def probe(self, prompt: Prompt) -> None:
        """Check, before anything expensive starts, that the teacher can continue an answer to `prompt`.

        Raises:
            DataError: when it cannot render the prompt.
            NoRolloutError: when it returns nothing for this prompt. The trainer then tries other prompts.
            TeacherError: when it cannot answer at all.
        """

    async def aclose(self) -> None:
        """Release connections. `sample` may be called again afterwards, for an evaluation or more training."""


def address_of(teacher: Teacher) -> str | None:
    """The address of a service, without what may be a secret in it; `None` for the provider's own."""
    url = getattr(teacher, "base_url", None)
    if not url:
        return None
    try:
        parts = urlsplit(str(url).strip())
        port = f":{parts.port}" if parts.port else ""
    except ValueError:  # not a valid URL: the code that uses it reports that
        return str(url)
    return f"{parts.scheme}://{parts.hostname or ''}{port}{parts.path.rstrip('/')}"


async def replies_of(teacher: Teacher, prefixes: Sequence[Prefix], request: SamplingRequest) -> list[TeacherReply]:
    """Call `teacher.sample` and validate its return value.

    Without this check, a bug in a custom teacher would surface far from its cause, or as wrong numbers.

    Raises:
        TeacherError: when the return value is invalid.
    """
    answer: Any = teacher.sample(prefixes, request)  # a custom teacher may not be type-checked
    replies: Any = None
    if not inspect.isawaitable(answer):
        problem = f"its `sample` is not a coroutine (it returned {_shown(answer)}). Write it as `async def sample`"
    else:
        replies = await answer
        problem = _problem_of(replies, len(prefixes), request.num_samples)
    if problem:
        raise TeacherError(
            f"The teacher {getattr(teacher, 'name', type(teacher).__name__)!r} ({type(teacher).__name__}) does not "
            f"follow `Teacher.sample`: {problem}. See `A custom teacher` in docs/teachers.md."
        )
    return list(replies)


def _problem_of(replies: Any, num_prefixes: int, num_samples: int) -> str:
    if not isinstance(replies, list | tuple) or len(replies) != num_prefixes:
        return f"it must return a list of {num_prefixes} replies, one per prefix, but returned {_shown(replies)}"
    for index, reply in enumerate(replies):
        where = f"reply {index} of {num_prefixes}"
        if not isinstance(reply, TeacherReply):
            return f"{where} must be a `TeacherReply`, but is {_shown(reply)}"
        if not isinstance(reply.rollouts, list | tuple):
            return f"{where} must hold a tuple of rollouts, but holds {_shown(reply.rollouts)}"
        if len(reply.rollouts) > num_samples:
            return f"{where} holds {len(reply.rollouts)} rollouts, but at most num_samples={num_samples} are allowed"
        for rollout in reply.rollouts:
            if not isinstance(rollout, Rollout) or not isinstance(rollout.text, str):
                return f"{where} must hold `Rollout(text)` with a text that is a `str`, but holds {_shown(rollout)}"
        if not isinstance(reply.usage, Usage):
            return f"the usage of {where} must be a `Usage`, but is {_shown(reply.usage)}"
        if not isinstance(reply.outcomes, Mapping):
            return f"the outcomes of {where} must be a dictionary of counts, but are {_shown(reply.outcomes)}"
        if not isinstance(reply.models, list | tuple) or not all(isinstance(name, str) for name in reply.models):
            return f"the models of {where} must be a tuple of names, but are {_shown(reply.models)}"
    return ""


def _shown(value: Any) -> str:
    length = f" of {len(value)}" if isinstance(value, list | tuple | dict) else ""
    return f"{value!r:.80} ({type(value).__name__}{length})"
