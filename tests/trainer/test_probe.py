# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""The question at the start of a run: asked again with another prompt of the data where the model refuses one."""

import pytest
from datasets import Dataset

from omniopd_trl.accounting.usage import NO_LEDGER
from omniopd_trl.errors import NoRolloutError, TeacherError
from omniopd_trl.teachers.base import Teacher, TeacherReply
from omniopd_trl.trainer.omniopd_config import OmniOPDConfig
from omniopd_trl.trainer.preparation import prepare_teacher
from omniopd_trl.trainer.validation import PROBE_PROMPTS, probe_teacher
from tests.support.loopback import Fault, Loopback, wire
from tests.support.loopback.teachers import services

__all__ = ["services"]  # a fixture

pytestmark = pytest.mark.usefixtures("services")

PROMPTS = [f"question {n}" for n in range(9)]


def start(server, tmp_path, prompts=PROMPTS):
    """Prepare a teacher as a run does."""
    args = config(tmp_path, teacher_base_url=server.url + "/v1", teacher_continuation="instruct")
    teacher = prepare_teacher("vllm:teacher", args, NO_LEDGER)
    probe_teacher(teacher, [("train", Dataset.from_dict({"prompt": prompts}))])


def config(tmp_path, **settings):
    return OmniOPDConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to=[], **settings)


def chat(**message):
    """An answer whose samples hold these fields instead of a text."""

    def answer(body):
        whole = wire.openai("/v1/chat/completions", body)
        for choice in whole["choices"]:
            choice["message"].update(content=None, **message)
        return Fault(200, whole)

    return answer


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(chat(refusal="I cannot help with a question of this kind."), marks=pytest.mark.case("A1")),
        pytest.param(chat(), marks=pytest.mark.case("A1")),
        pytest.param(
            lambda body: Fault(400, wire.openai_error(400, "Content Exists Risk")), marks=pytest.mark.case("A1")
        ),
        pytest.param(lambda body: Fault(413, "<html>Too Large</html>"), marks=pytest.mark.case("A1")),
    ],
    ids=["refused", "empty", "filtered", "too large"],
)
def test_asked_again_with_another_prompt(fault, tmp_path, caplog):
    """A question that the model refuses, or leaves without an answer, does not end the start; the reason is quoted."""
    with Loopback(wire.openai, lambda _, body: fault(body) if PROMPTS[0] in str(body) else None) as server:
        start(server, tmp_path)
    assert [PROMPTS[1] in str(body) for body in server.bodies] == [False, True]
    (line,) = [message for message in caplog.messages if "asked again" in message]
    assert "returned nothing" in line


@pytest.mark.case("A1", "U13")
@pytest.mark.parametrize("prompts", [PROMPTS, PROMPTS[:1]])
def test_refused_every_time(prompts, tmp_path):
    """After some prompts the start ends, and the message quotes the refusal's own text."""
    with Loopback(wire.openai, lambda _, body: chat(refusal="I cannot do\x1b[1m that.")(body)) as server:
        with pytest.raises(NoRolloutError, match=r"a sample was refused \(I cannot do\\x1b\[1m that\.\)"):
            start(server, tmp_path, prompts)
    assert len(server.requests) == min(len(prompts), PROBE_PROMPTS)


@pytest.mark.case("A1")
def test_a_custom_teacher():
    """It may say the same of a prompt. Any other error ends the start at once."""

    class Custom(Teacher):
        name = "custom"

        def __init__(self, error):
            self.error, self.asked = error, []

        async def sample(self, prefixes, request):
            return [TeacherReply() for _ in prefixes]

        def probe(self, prompt):
            self.asked.append(prompt)
            if prompt == PROMPTS[0]:
                raise self.error

    dataset = [("train", Dataset.from_dict({"prompt": PROMPTS}))]
    probe_teacher(teacher := Custom(NoRolloutError("nothing")), dataset)
    assert teacher.asked == PROMPTS[:2]
    with pytest.raises(TeacherError):
        probe_teacher(teacher := Custom(TeacherError("out of order")), dataset)
    assert teacher.asked == PROMPTS[:1]
