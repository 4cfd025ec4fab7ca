# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""`vllm:` against `vllm serve`: the same text as the model in this process, what its cache serves, and a run."""

import math
import threading
import time

import pytest
from transformers import TrainerCallback

from benchmarks.prefix_cache import measure
from benchmarks.servers import BLOCK, Server, vllm_serve
from omniopd_trl.demo import asset_path
from omniopd_trl.errors import TeacherError
from omniopd_trl.journal.reader import spent
from omniopd_trl.teachers import Prefix
from omniopd_trl.teachers.instruct.prompt import render_messages
from omniopd_trl.teachers.instruct.repair import repair
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

# The instruction of an instructed teacher takes a thousand of the demo's short tokens.
CONTEXT = 1536


@pytest.fixture(scope="module")
def started(teacher_dir, tmp_path_factory):
    """The server, once for all tests, and gone after them."""
    server = Server(vllm_serve(teacher_dir, max_model_len=CONTEXT), tmp_path_factory.mktemp("vllm") / "server.log")
    yield server
    server.stop()


@pytest.fixture
def server(started):
    """A server that answers, also after a test that killed it."""
    if not started.is_alive:
        started.start()
    return started


@pytest.fixture
def teacher_of(server, teacher_dir):
    """A function that makes a teacher behind the server."""

    def make(name="vllm:teacher", continuation=None, **settings):
        return remote_teacher(
            name,
            base_url=server.url,
            tokenizer=str(teacher_dir),
            continuation=continuation,
            settings=EngineSettings(timeout=60.0, **settings),
        )

    return make


@pytest.mark.parametrize("continuation", ["raw", "continue_final"])
def test_greedy_continuations_equal_the_local_teacher(local, teacher_of, continuation):
    """Nested prefixes of several trajectories, all in flight at once: token for token the same, prompts included."""
    trajectories = [*nested(local, count=6, step=17), *([prefix] for prefix in awkward())]
    expected = ask(local, trajectories, **GREEDY)
    assert_same(expected, ask(teacher_of(continuation=continuation), trajectories, **GREEDY))


def test_instructed_answers_are_repaired(local, teacher_of):
    """The chat gets the instruction as it is written, its answers are repaired, and its usage is that of what it read.

    The demo's teacher cannot follow an instruction. What it answers there is compared with what it answers here.
    """

    def answers_to(prefixes):
        asked = [[Prefix(render_messages(prefix.prompt, prefix.completion))] for prefix in prefixes]
        return [reply.rollouts[0].text for (reply,) in ask(local, asked, **GREEDY)]

    starts = ("So", "It is ", "We have\n", "- Buying 8, ")
    prefixes = [Prefix(conversation(question), start) for question in problems(4) for start in starts]
    # Whatever it is asked, it begins with much the same words. After those, some answers repeat the end of the prefix.
    prefixes = [Prefix(p.prompt, p.completion + a[:24]) for p, a in zip(prefixes, answers_to(prefixes), strict=True)]
    prefixes += awkward()
    answers = answers_to(prefixes)
    expected = [
        repair(prefix.completion, answer, prefix.prompt) for prefix, answer in zip(prefixes, answers, strict=True)
    ]
    assert any(repaired.text != answer for repaired, answer in zip(expected, answers, strict=True))

    teacher = teacher_of(continuation="instruct")
    replies = [reply for (reply,) in ask(teacher, [[prefix] for prefix in prefixes], **GREEDY)]
    assert [[r.text for r in reply.rollouts] for reply in replies] == [[e.text] if e.text else [] for e in expected]
    assert [reply.outcomes.get("restarted", 0) for reply in replies] == [
        int(e.outcome == "restarted") for e in expected
    ]
    for prefix, reply in zip(prefixes, replies, strict=True):
        read = Prefix(render_messages(prefix.prompt, prefix.completion))
        assert reply.usage.prompt_tokens == len(local.encode(read))
        assert 0 < reply.usage.completion_tokens <= 40


def test_plain_text_is_continued(local, teacher_of):
    """A prompt without a template gets the tokenizer's own first token, there as here."""
    trajectories = [[Prefix(question, " "), Prefix(question, " The answer")] for question in problems(3)]
    assert_same(ask(local, trajectories, **GREEDY), ask(teacher_of(), trajectories, **GREEDY))


@pytest.mark.parametrize("continuation", ["raw", "continue_final"])
def test_ten_samples_in_one_request(server, local, teacher_of, continuation):
    """N rollouts are one request, whose prompt is counted once."""
    prefix = least_sure(local)
    before = server.metric("http_requests_total", 'method="POST"')
    reply = ask_one(teacher_of(continuation=continuation), prefix, 10, 20, temperature=1.0, seed=0)
    assert server.metric("http_requests_total", 'method="POST"') - before == 1
    assert len(reply.rollouts) == 10
    assert reply.failure is None
    assert reply.outcomes["requests"] == 1
    assert len({rollout.text for rollout in reply.rollouts}) > 3
    assert reply.usage.prompt_tokens == len(local.encode(prefix))
    assert 10 < reply.usage.completion_tokens <= 200


def test_greedy_samples_are_all_the_same(local, teacher_of):
    """vLLM refuses to draw several samples without chance; they are there all the same, and are not counted."""
    prefix = Prefix(conversation(problems(1)[0]), "Let us")
    reply = ask_one(teacher_of(), prefix, 10, **GREEDY)
    (expected,) = ask_one(local, prefix, **GREEDY).rollouts
    assert reply.rollouts == (expected,) * 10
    assert reply.outcomes["requests"] == 1
    assert reply.usage.completion_tokens <= 40


def test_a_seed_repeats_the_samples(local, teacher_of):
    """One seed gives the same samples again, another gives others."""
    prefix = least_sure(local)
    first, again, other = (
        ask_one(teacher_of(), prefix, 10, 20, temperature=1.0, seed=seed).rollouts for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_temperature_is_the_one_that_was_asked_for(local, teacher_of, temperature):
    """First tokens follow the exact distribution, and not the defaults that the model's folder holds."""
    prefix = least_sure(local)
    expected = next_token(local, prefix, temperature)
    assert max(expected.values()) < 0.5, "the teacher is too sure of itself here: the test shows nothing"
    reply = ask_one(teacher_of(), prefix, 640, 1, temperature=temperature, seed=3)
    assert distance(expected, reply) < 0.08
    # The other temperature is told apart.
    assert distance(next_token(local, prefix, 3.0 - temperature), reply) > 0.15


def test_top_p_is_the_one_that_was_asked_for(local, teacher_of):
    """Nothing outside of the nucleus is sampled, and everything that is likely inside of it."""
    prefix = least_sure(local)
    expected = next_token(local, prefix, 1.0)
    inside = nucleus(expected, 0.7)
    assert len(inside) > 3, "the teacher is too sure of itself here: the test shows nothing"
    reply = ask_one(teacher_of(), prefix, 320, 1, temperature=1.0, top_p=0.7, seed=4)
    assert {rollout.text for rollout in reply.rollouts} <= inside
    assert {text for text in inside if expected[text] > 0.05} <= {rollout.text for rollout in reply.rollouts}


def test_the_servers_own_defaults_would_be_greedy(server, local, teacher_of):
    """The tests of sampling show something: what a request leaves open is filled from the model's folder."""
    import openai

    prefix = least_sure(local)
    text = local.tokenizer.decode(local.encode(prefix)[1:])
    with openai.OpenAI(base_url=server.url, api_key="none") as client:
        answer = client.completions.create(model="teacher", prompt=text, n=10, max_tokens=10)
    assert len({choice.text for choice in answer.choices}) == 1


def test_a_temperature_out_of_range_is_a_final_error(local, teacher_of):
    """It is not taken for a model without temperatures: the run would continue with the server's own."""
    with pytest.raises(TeacherError, match=r"temperature must be in"):
        ask_one(teacher_of(), least_sure(local), temperature=3.0)


@pytest.mark.parametrize("samples", [1, 10])
def test_nested_prefixes_are_served_from_the_cache(server, teacher_dir, samples):
    """At least 0.9 of what whole blocks allow, though all prefixes of all trajectories are in flight together."""
    result = measure(server.url, "teacher", str(teacher_dir), samples, count=4, block=BLOCK, length=400)
    # Each sample looks its prompt up.
    assert result.looked_up == samples * result.prompt
    assert result.allowed_blocks > 0.6 * result.prompt
    assert 0.9 <= result.ratio < 1.05
    if samples == 1:
        assert result.usage == result.hits


@pytest.mark.parametrize("continuation", ["raw", "continue_final"])
def test_a_prefix_beyond_the_context_is_an_outcome(local, teacher_of, continuation):
    """Its chunk is dropped after one request, with words that say why; its neighbours are continued."""
    question = conversation(problems(1)[0])
    short, fits_without_room = Prefix(question, "Let us"), Prefix(question, "Let us count. " * 40)
    length = len(local.encode(fits_without_room))
    long = Prefix(question, "Let us count. " * 400)
    assert len(local.encode(long)) > CONTEXT > length
    teacher = teacher_of(continuation=continuation)
    (replies,) = ask(teacher, [[short, fits_without_room, long]], 2, CONTEXT - length + 1, seed=0)
    assert [len(reply.rollouts) for reply in replies] == [2, 0, 0]
    for reply in replies[1:]:
        assert "longer than the model's context" in reply.failure
        assert reply.outcomes["failed_requests"] == reply.outcomes["requests"] == 1


@pytest.mark.parametrize("continuation", ["raw", "continue_final", "instruct"])
def test_the_probe(teacher_of, continuation):
    """It passes with the right name; with another one the run ends before it starts, and is told what to check."""
    question = conversation(problems(1)[0])
    teacher_of(continuation=continuation).probe(question)
    with pytest.raises(TeacherError, match=r"no model 'nobody' at this address .*Check teacher and base URL"):
        teacher_of("vllm:nobody", continuation).probe(question)


def run(path, server, teacher_dir, **overrides):
    """A trainer of the demo's student, taught over the wire."""
    settings = {"teacher": "vllm:teacher", "teacher_base_url": server.url, "dataset": dataset(32)}
    settings |= {"teacher_tokenizer_name_or_path": str(teacher_dir), **TRAINING, **overrides}
    return make_trainer(path, asset_path("student"), **settings)


@pytest.mark.parametrize("continuation", ["raw", "continue_final", "instruct"])
def test_the_student_is_taught(tmp_path, server, teacher_dir, continuation):
    """Three steps with audits that overlap: finite metrics, weights that move, and counts that are the server's."""
    counters = [("http_requests_total", 'method="POST"', 'status="2xx"'), ("vllm:generation_tokens_total",)]
    before = [server.metric(*counter) for counter in counters]
    trainer = run(tmp_path, server, teacher_dir, teacher_continuation=continuation, max_steps=3)
    start = trainable(trainer.model)
    trainer.train()
    assert trainer.step_audits.overlap
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert len(logs) == 3
    for log in logs:
        assert all(math.isfinite(value) for value in log.values() if isinstance(value, float))
        assert log["audit/num_chunks"] > 0
        assert log["audit/dropped_chunks"] == 0
        assert log["teacher/failed_requests"] == 0
        assert 0 <= log["audit/posterior"] <= 1
    assert any(not value.equal(start[name]) for name, value in trainable(trainer.model).items())
    requests, tokens = (server.metric(*counter) - count for counter, count in zip(counters, before, strict=True))
    # One more is the probe, which the ledger counts, too.
    assert sum(log["teacher/requests"] for log in logs) == pytest.approx(requests - 1)
    assert spent(tmp_path)[0].completion_tokens == tokens
    assert trainer.teacher_usage.cached_tokens > 0


class KillDuringRequests(TrainerCallback):
    """Kills the server while it works on the requests of the second step."""

    def __init__(self, server: Server):
        self.server = server
        self.killed = threading.Event()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 1:
            threading.Thread(target=self._kill, daemon=True).start()

    def _kill(self) -> None:
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline and not self.server.metric("vllm:num_requests_running"):
            time.sleep(0.01)
        self.server.kill()
        self.killed.set()


def test_a_server_that_is_killed_ends_the_run(tmp_path, server, teacher_dir):
    """Within the time limits, with an error that names the cause and the checkpoint, and not in a hang."""
    trainer = run(
        tmp_path,
        server,
        teacher_dir,
        max_steps=50,
        max_completion_length=160,
        teacher_timeout=5.0,
        teacher_max_seconds=10.0,
        callbacks=[killer := KillDuringRequests(server)],
    )
    start = time.monotonic()
    with pytest.raises(TeacherError, match=r"(?s)Stopped at step \d+: .*no connection"):
        trainer.train()
    assert killer.killed.is_set()
    assert not server.is_alive
    assert time.monotonic() - start < 60
    assert any(tmp_path.glob("checkpoint-*"))
