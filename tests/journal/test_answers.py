# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""An audit that is cut off in the middle: what was answered for it is kept, and only the rest is asked for."""

import asyncio
import shutil
from collections import Counter
from types import SimpleNamespace

import pytest

from omniopd_trl.accounting.pricing import Price
from omniopd_trl.accounting.usage import NO_LEDGER
from omniopd_trl.audits.types import Audit
from omniopd_trl.errors import TeacherError
from omniopd_trl.journal.resume import audit_or_replay
from omniopd_trl.teachers import Prefix, SamplingRequest, Teacher, TeacherReply, Usage
from omniopd_trl.teachers.base import Rollout
from omniopd_trl.teachers.remote.answers import Response, Sample
from omniopd_trl.teachers.remote.failures import Failure
from omniopd_trl.teachers.remote.settings import Capabilities
from tests.support.journals import journal, trajectory
from tests.support.services import FINAL, TRANSIENT, FailedError, Scripted, short_waits

__all__ = ["short_waits"]  # a fixture

PREFIXES = [Prefix("question", "word" * n) for n in range(3)]
NUM_SAMPLES = 5
TEN, ONE = (Capabilities("raw", samples_per_request=n) for n in (10, 1))


class Service(Scripted):
    """Sample `i` of a prefix is the same however requests are split: the seed says where a request starts."""

    def __init__(self, capabilities, gives=99, write=Sample, **settings):
        super().__init__(capabilities=capabilities, **{"most": 1, "price": Price(1.0, 1.0), **settings})
        self.gives = gives
        self.write = write

    async def request(self, prefix, num_samples, request):
        await super().request(prefix, num_samples, request)
        samples = tuple(self.write(f" {request.seed + i}") for i in range(min(num_samples, self.gives)))
        return Response(samples, Usage(10, 4, len(samples)))


def asking(teacher, prefixes=PREFIXES, num_samples=NUM_SAMPLES):
    """An auditor that keeps the teacher's replies instead of scoring them."""

    async def ask(trajectory, scores, ledger=NO_LEDGER):
        replies.extend(await teacher.sample(prefixes, SamplingRequest(num_samples, 70, seed=7, ledger=ledger)))

    async def score_later(answered):
        return Audit(usage=sum((reply.usage for reply in replies), Usage()))

    replies: list[TeacherReply] = []
    return SimpleNamespace(ask=ask, score_later=score_later, replies=replies)


def run(folder, teacher, prefixes=PREFIXES):
    """Audit one trajectory, in a process of its own as far as the journal can tell."""
    auditor = asking(teacher, prefixes)
    with journal(folder) as j:
        if j.trajectories(0) is None:
            j.record_trajectories(0, [trajectory()])
        audit = asyncio.run(audit_or_replay(auditor, None, None, j, 0, 0))
        assert j.audit(0, 0) is not None
        assert j.answers(0, 0) == {}, "what is in the audit is kept twice"
        return auditor.replies, audit, j.usage()


def texts(replies):
    return [[rollout.text for rollout in reply.rollouts] for reply in replies]


SERVICES = {
    "all in one request": lambda **kwargs: Service(TEN, **kwargs),
    "one by one": lambda **kwargs: Service(ONE, **kwargs),
    "one by one, a cache": lambda **kwargs: Service(
        Capabilities("raw", samples_per_request=1, min_cached_prefix=1), **kwargs
    ),
    "two in each": lambda **kwargs: Service(Capabilities("raw", samples_per_request=2), **kwargs),
    "fewer than asked for": lambda **kwargs: Service(TEN, gives=2, **kwargs),
    "none": lambda **kwargs: Service(TEN, gives=0, **kwargs),
    "refusals": lambda **kwargs: Service(ONE, write=lambda text: Sample("", "stop", "refused"), **kwargs),
    "started over": lambda **kwargs: Service(ONE, write=lambda text: Sample(text, "length", "restarted"), **kwargs),
}


@pytest.mark.parametrize("kind", SERVICES)
def test_only_what_is_missing_is_asked_for(tmp_path, kind):
    """Stopped after each of its requests in turn: every sample is paid for once, and the replies are the same."""
    clean = SERVICES[kind]()
    expected, _, whole = run(tmp_path / "clean", clean)
    for stop in range(len(clean.seen)):
        folder = tmp_path / str(stop)
        first = SERVICES[kind](fault=lambda number, _, stop=stop: FINAL if number >= stop else None)
        with pytest.raises(TeacherError, match="refused"):
            run(folder, first)
        second = SERVICES[kind]()
        replies, audit, paid = run(folder, second)
        assert texts(replies) == texts(expected)
        assert [reply.failure for reply in replies] == [reply.failure for reply in expected]
        counts = [dict(reply.outcomes).get("refused", 0) for reply in replies]
        assert counts == [dict(reply.outcomes).get("refused", 0) for reply in expected]
        used = first.budget.used + second.budget.used
        assert used.completion_tokens == whole.completion_tokens
        # The worst case of a request that had just begun when the others were stopped counts as well.
        lost = first.budget.forfeited_tokens
        assert paid.prompt_tokens + paid.completion_tokens == used.prompt_tokens + used.completion_tokens + lost
        # What was answered before is not counted again, neither in the budget nor for the log.
        assert audit.usage == sum((reply.usage for reply in replies), Usage()) == second.budget.used
        if kind != "fewer than asked for":  # which has to be learned again
            assert used == whole
            asked = Counter((text, request.seed) for text, _, request in [*first.seen[:stop], *second.seen])
            assert asked == Counter((text, request.seed) for text, _, request in clean.seen)


def test_what_was_learned_does_not_matter(tmp_path):
    """Samples that were asked for one by one, as several were refused, are found by a run that asks for several."""
    one_sample = Failure("one_sample", "n is not supported")

    class Refuses(Service):
        async def request(self, prefix, num_samples, request):
            if num_samples > 1:
                raise FailedError(one_sample)
            return await super().request(prefix, num_samples, request)

    with pytest.raises(TeacherError):
        run(tmp_path, Refuses(TEN, fault=lambda number, _: FINAL if number >= 7 else None))
    second = Service(TEN)
    replies, _, _ = run(tmp_path, second)
    assert texts(replies) == [[f" {n}" for n in seeds] for seeds in _seeds()]
    assert [num_samples for _, num_samples, _ in second.seen] == [3, 5]


def _seeds():
    teacher = Service(ONE)
    asyncio.run(asking(teacher).ask(None, None))
    seeds = [request.seed for _, _, request in teacher.seen]
    return [seeds[i : i + NUM_SAMPLES] for i in range(0, len(seeds), NUM_SAMPLES)]


def test_answers_around_a_given_up_request(tmp_path):
    """A request that was given up is asked again, between those that were answered; its failures cost nothing."""
    first = Service(
        ONE, fault=lambda number, _: FINAL if number >= 6 else [None, TRANSIENT][number == 1], max_attempts=1
    )
    with pytest.raises(TeacherError):
        run(tmp_path, first)
    second = Service(ONE)
    replies, _, _ = run(tmp_path, second)
    assert texts(replies) == [[f" {n}" for n in seeds] for seeds in _seeds()]
    assert len(second.seen) == 3 * NUM_SAMPLES - 5


def test_equal_prefixes_have_answers_of_their_own(tmp_path):
    """Two chunks may begin after the same text. They want different samples, and no answer replaces another."""
    twice = [PREFIXES[1], PREFIXES[1]]
    numbers = iter(range(100))

    class Counting(Service):
        async def request(self, prefix, num_samples, request):
            response = await super().request(prefix, num_samples, request)
            return response._replace(samples=tuple(Sample(f" {next(numbers)}") for _ in response.samples))

    with pytest.raises(TeacherError):
        run(tmp_path, Counting(ONE, fault=lambda number, _: FINAL if number >= 9 else None), twice)
    replies, _, _ = run(tmp_path, Counting(ONE), twice)
    assert sorted(int(text) for reply in texts(replies) for text in reply) == list(range(10))


def test_kept_answers_need_no_room_in_the_budget(tmp_path):
    """What is left of the budget is for what is missing."""
    with pytest.raises(TeacherError):
        run(tmp_path, Service(ONE, fault=lambda number, _: FINAL if number >= 14 else None))
    one_request = 8 + 12 + 512 + 70 + 10
    replies, _, _ = run(tmp_path, Service(ONE, max_tokens=one_request))
    assert [len(reply.rollouts) for reply in replies] == [5, 5, 5]


def test_another_teacher_finds_nothing(tmp_path):
    """Answers belong to their teacher."""
    with pytest.raises(TeacherError):
        run(tmp_path, Service(ONE, fault=lambda number, _: FINAL if number >= 5 else None))
    other = Service(ONE)
    other.name = "scripted:other"
    replies, _, _ = run(tmp_path, other)
    assert len(other.seen) == 3 * NUM_SAMPLES
    assert [len(reply.rollouts) for reply in replies] == [5, 5, 5]


@pytest.mark.case("F5")
@pytest.mark.parametrize("extra", ["extra_body", "extra_headers"])
def test_another_request_finds_nothing(tmp_path, extra):
    """An answer to a request without an extra field or header does not stand for one with it."""
    first = Service(ONE, fault=lambda number, prefix: FINAL if number == 4 else None)
    with pytest.raises(TeacherError):
        run(tmp_path / "one", first)
    changed, same = Service(ONE), Service(ONE)
    setattr(changed, extra, {"x-provider": "a"})
    run(shutil.copytree(tmp_path / "one", tmp_path / "two"), changed)
    run(tmp_path / "one", same)
    assert len(changed.seen) == 3 * NUM_SAMPLES
    assert len(same.seen) < 3 * NUM_SAMPLES


def test_a_teacher_that_knows_nothing_of_it(tmp_path):
    """Its usage counts when its audit is finished, and it is asked for a whole trajectory again."""

    class Own(Teacher):
        name = "own"

        async def sample(self, prefixes, request):
            return [TeacherReply((Rollout("x"),), Usage(1, 0, 1)) for _ in prefixes]

    replies, audit, paid = run(tmp_path, Own())
    assert texts(replies) == [["x"]] * 3
    assert audit.usage == paid == Usage(3, 0, 3)


def test_a_teacher_that_wraps_a_service(tmp_path):
    """It hands the request on: the service's requests are counted once, and their answers are kept."""

    class Wrapper(Teacher):
        name = "wrapper"

        def __init__(self, service):
            self.service = service

        async def sample(self, prefixes, request):
            return await self.service.sample(prefixes, request)

    first = Service(ONE, fault=lambda number, _: FINAL if number >= 6 else None)
    with pytest.raises(TeacherError):
        run(tmp_path, Wrapper(first))
    second = Service(ONE)
    _, audit, paid = run(tmp_path, Wrapper(second))
    assert len(second.seen) == 3 * NUM_SAMPLES - 6
    assert audit.usage == second.budget.used
    assert paid.prompt_tokens + paid.completion_tokens == first.budget.tokens_spent + second.budget.tokens_spent


@pytest.mark.case("T9", "T10")
@pytest.mark.parametrize("kept", [[1, [["a", "b", "c", "d", "e", "f"]]], [1, 7], ["x"], {"size": 1}, [1, [None]]])
def test_kept_answers_that_cannot_be_read(tmp_path, kept, caplog):
    """A record of another form is set aside, and no resumed run ends at it again."""
    with pytest.raises(TeacherError):
        run(tmp_path, Service(ONE, fault=lambda number, _: FINAL if number >= 3 else None))
    with journal(tmp_path) as j:
        for request, answers in j.answers(0, 0).items():
            for start in answers:
                j.record_answer(0, 0, request, start, kept, Usage())
    second = Service(ONE)
    replies, _, _ = run(tmp_path, second)
    assert texts(replies) == [[f" {n}" for n in seeds] for seeds in _seeds()]
    # A request that was sent when the record was met is sent again.
    assert len(second.seen) - 3 * NUM_SAMPLES in (0, 1)
    if not isinstance(kept, list) or len(kept) < 2:
        assert "3 answers that the journal holds for trajectory 0 of step 0 cannot be used" in caplog.text


def test_answers_without_usage_are_kept(tmp_path):
    """Their worst case is spent, and once: what it was spent for is there."""

    class Silent(Service):
        async def request(self, prefix, num_samples, request):
            return (await super().request(prefix, num_samples, request))._replace(usage=None)

    first = Silent(ONE, fault=lambda number, _: FINAL if number >= 6 else None)
    with pytest.raises(TeacherError):
        run(tmp_path, first)
    second = Silent(ONE)
    replies, _, paid = run(tmp_path, second)
    assert texts(replies) == [[f" {n}" for n in seeds] for seeds in _seeds()]
    assert len(second.seen) == 3 * NUM_SAMPLES - 6
    assert paid.prompt_tokens + paid.completion_tokens == sum(
        teacher.budget.forfeited_tokens for teacher in (first, second)
    )
