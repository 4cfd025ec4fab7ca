# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Teachers that are slow, that fail, or that must not be asked."""

import asyncio
import time

from omniopd_trl.errors import TeacherError
from omniopd_trl.teachers import Rollout, Teacher, TeacherReply, Usage
from tests.support.training import agrees, script


class Remote(Teacher):
    """A slow teacher with the tests' script, which records when its calls finished or were cancelled."""

    name = "remote"
    is_remote = True

    def __init__(self, delay: float = 0.0, fail_at: int | None = None, refuse: bool = False):
        self.delay = delay
        self.fail_at = fail_at
        self.refuse = refuse
        self.calls = 0
        self.finished: list[float] = []
        self.cancelled = 0
        self.is_silent = False

    @classmethod
    def silent(cls) -> "Remote":
        """The same teacher, which must not be asked: any request fails. It replays what the other one answered."""
        teacher = cls()
        teacher.is_silent = True
        return teacher

    async def sample(self, prefixes, request):
        call, self.calls = self.calls, self.calls + 1
        if self.is_silent:
            raise TeacherError("the teacher was asked again")
        try:
            # The first call takes longest: results must not depend on the order of answers.
            await asyncio.sleep(self.delay * (1 + (7 - call) % 8))
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if self.fail_at is not None and call >= self.fail_at:
            raise TeacherError("the key was rejected; set a valid one")
        self.finished.append(time.perf_counter())
        if self.refuse:
            return [TeacherReply(failure="refused", outcomes={"refused": 3}) for _ in prefixes]
        texts = [[script(prefix, i) for i in range(request.num_samples)] for prefix in prefixes]
        return [TeacherReply(tuple(map(Rollout, row)), Usage(5, 0, 7), outcomes={"requests": 1}) for row in texts]


class Here(Remote):
    """The same teacher as a local one: the trainer waits for all answers before it trains."""

    is_remote = False


class Agreeing(Remote):
    """The same teacher with one rollout after some texts, however often it is asked. It is asked for two first."""

    def __init__(self):
        super().__init__()
        self.asked: list[tuple[int, int]] = []  # prefixes and samples of each call

    async def sample(self, prefixes, request):
        self.asked.append((len(prefixes), request.num_samples))
        of_first = request.num_samples == 2
        replies = []
        for prefix in prefixes:
            same = agrees(prefix.completion)
            assert of_first or not same, "more rollouts were requested where the first ones are equal"
            indices = [0 if same else i + 2 * (not of_first) for i in range(request.num_samples)]
            rollouts = tuple(Rollout(script(prefix, i) + " ") for i in indices)
            replies.append(TeacherReply(rollouts, Usage(5, 0, 7), outcomes={"requests": 1}))
        return replies


class Silent(Teacher):
    """A teacher that must not be asked: any request fails."""

    name = "remote"

    async def sample(self, prefixes, request):
        raise TeacherError("the teacher was asked again")


class Unasked(Silent):
    """A teacher that must not even be probed."""

    name = "unasked"

    def probe(self, prompt):
        raise AssertionError("the teacher was asked")
