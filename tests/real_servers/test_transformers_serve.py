# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""`openai:` with `teacher_base_url` against `transformers serve`, which takes its sampling in a form of its own."""

import math

import pytest

from benchmarks.servers import Server, command
from omniopd_trl.demo import asset_path
from omniopd_trl.errors import TeacherError
from omniopd_trl.teachers import Prefix
from omniopd_trl.teachers.load import remote_teacher
from omniopd_trl.teachers.remote.settings import EngineSettings
from tests.real_servers.questions import (
    GREEDY,
    TRAINING,
    ask,
    ask_one,
    assert_same,
    awkward,
    conversation,
    dataset,
    distance,
    least_sure,
    nested,
    next_token,
    nucleus,
    problems,
)
from tests.support.training import make_trainer, trainable


@pytest.fixture(scope="module")
def server(teacher_dir, tmp_path_factory):
    """The server, once for all tests, and gone after them."""
    arguments = [command("transformers"), "serve", str(teacher_dir), "--dtype", "float32", "--device", "cpu"]
    server = Server(arguments, tmp_path_factory.mktemp("transformers") / "server.log")
    server.start()
    yield server
    server.stop()


@pytest.fixture
def teacher_of(server, teacher_dir):
    """A function that makes a teacher behind the server."""

    def make(name=f"openai:{teacher_dir}", continuation="raw", **settings):
        return remote_teacher(
            name,
            base_url=server.url,
            tokenizer=str(teacher_dir),
            continuation=continuation,
            settings=EngineSettings(timeout=60.0, **settings),
        )

    return make


def test_greedy_continuations_equal_the_local_teacher(local, teacher_of):
    """Nested prefixes of several trajectories, all in flight at once: token for token the same, prompts included."""
    trajectories = [*nested(local, count=3, step=37), *([prefix] for prefix in awkward())]
    expected = ask(local, trajectories, **GREEDY)
    assert_same(expected, ask(teacher_of(), trajectories, **GREEDY))


def test_plain_text_is_continued(local, teacher_of):
    """A prompt without a template gets the tokenizer's own first token, there as here."""
    trajectories = [[Prefix(question, " "), Prefix(question, " The answer")] for question in problems(2)]
    assert_same(ask(local, trajectories, **GREEDY), ask(teacher_of(), trajectories, **GREEDY))


def test_sampling_is_the_one_that_was_asked_for(local, teacher_of):
    """One sample per request, noticed by itself; first tokens follow the exact distribution within the nucleus."""
    prefix = least_sure(local)
    expected = next_token(local, prefix, 1.0)
    teacher = teacher_of(max_concurrency=4)
    reply = ask_one(teacher, prefix, 200, 1, temperature=1.0, seed=0)
    assert len(reply.rollouts) + reply.outcomes.get("empty", 0) == 200
    assert teacher.capabilities.samples_per_request == 1
    assert distance(expected, reply) < 0.15
    inside = nucleus(expected, 0.7)
    reply = ask_one(teacher, prefix, 50, 1, temperature=1.0, top_p=0.7, seed=0)
    texts = {rollout.text for rollout in reply.rollouts}
    assert texts <= inside
    assert len(texts) > 2


def test_a_chat_that_cannot_be_continued_is_noticed(teacher_of, caplog):
    """`continue_final` is refused there: the teacher is instructed from then on, and says so."""
    teacher = teacher_of(continuation="continue_final")
    ask_one(teacher, Prefix(conversation(problems(1)[0]), "Let us"), **GREEDY)
    assert teacher.capabilities.continuation == "instruct"


def test_the_probe(teacher_of):
    """It passes with the right name; with another one the run ends before it starts, in the server's own words."""
    question = conversation(problems(1)[0])
    teacher_of().probe(question)
    with pytest.raises(TeacherError, match="nobody"):
        teacher_of("openai:nobody").probe(question)


def test_the_student_is_taught(tmp_path, server, teacher_dir):
    """Two steps with audits that overlap: finite metrics, and weights that move."""
    trainer = make_trainer(
        tmp_path,
        asset_path("student"),
        teacher=f"openai:{teacher_dir}",
        teacher_base_url=server.url,
        teacher_continuation="raw",
        teacher_max_concurrency=4,
        dataset=dataset(16),
        max_steps=2,
        **TRAINING,
    )
    start = trainable(trainer.model)
    trainer.train()
    assert trainer.step_audits.overlap
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert len(logs) == 2
    for log in logs:
        assert all(math.isfinite(value) for value in log.values() if isinstance(value, float))
        assert log["audit/num_chunks"] > 0
        assert log["audit/dropped_chunks"] == 0
        # The server gives one sample per request.
        assert log["teacher/requests"] >= 4 * 8
    assert any(not value.equal(start[name]) for name, value in trainable(trainer.model).items())
