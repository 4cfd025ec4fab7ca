# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""What is replayed was asked under the same circumstances, and nothing else keeps it from being replayed."""

import copy
import os
import shutil
import subprocess
import sys
from functools import partial

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from omniopd_trl.method.similarity import get_similarity
from omniopd_trl.teachers import ScriptedTeacher
from omniopd_trl.teachers.load import remote_teacher
from omniopd_trl.trainer.fingerprint import SINCE_EARLIER_RECORDS, fingerprint, identity_of, replay_key
from tests.support import ROOT
from tests.support.teachers import Here
from tests.support.training import FOUR_STEPS, make_trainer, trainable

HALF = 0.5


def constant(chunk, rollout):
    """One number."""
    return 0.5


def documented(chunk, rollout):
    """Another text, and the same code."""
    # and a comment
    return 0.5


documented.__qualname__ = constant.__qualname__


def with_number(chunk, rollout):
    return HALF


def helper(chunk):
    return len(chunk) / 100


def with_helper(chunk, rollout):
    return helper(chunk)


def known_words(chunk, rollout):
    return float(chunk in {"a", "b", "c", "d", "e", "f"})


class Scale:
    def __init__(self, factor):
        self.factor = factor

    def __call__(self, chunk, rollout):
        return self.factor

    def method(self, chunk, rollout):
        return self.factor


def scaled(factor):
    return lambda chunk, rollout: factor


def settings_of(trainer, **changes):
    args = copy.copy(trainer.args)
    for name, value in changes.items():
        setattr(args, name, value)
    return replay_key(args, trainer.train_dataset, trainer.model, trainer.teacher, trainer.auditor.similarity)


# ---- The similarity ----


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (lambda a, b: 1.0, lambda a, b: 0.0),
        (lambda a, b: float(a in {"x"}), lambda a, b: float(a in {"y"})),
        (lambda a, b: max(x for x in (0.1, 0.2)), lambda a, b: max(x for x in (0.1, 0.3))),  # nested code
        (lambda a, b: min(0.5, len(a)), lambda a, b: max(0.5, len(a))),  # the same but for a name
        (lambda a, b, c=0.5: c, lambda a, b, c=0.6: c),
        (lambda a, b, *, c=0.5: c, lambda a, b, *, c=0.6: c),
        (scaled(0.5), scaled(0.6)),
        (partial(scaled(0.5), "x"), partial(scaled(0.5), "y")),
        (Scale(0.5), Scale(0.6)),
        (Scale(0.5).method, Scale(0.6).method),
        (Scale(0.5), Scale(0.5).method),
        (constant, with_number),
        (len, max),
    ],
)
def test_functions_that_compute_something_else_are_others(one, other):
    """By code, constants, names, defaults, closures and attributes."""
    assert identity_of(one) == identity_of(one)
    assert identity_of(one) != identity_of(other)


def test_what_a_function_refers_to_counts(monkeypatch):
    """A number of its module, and another function of it."""
    before = identity_of(with_number), identity_of(with_helper)
    monkeypatch.setitem(globals(), "HALF", 0.6)
    monkeypatch.setitem(globals(), "helper", lambda chunk: len(chunk) / 50)
    assert identity_of(with_number) != before[0]
    assert identity_of(with_helper) != before[1]


def test_docstrings_and_comments_do_not_count():
    """What was paid for under a function is valid after it was described."""
    assert identity_of(documented) == identity_of(constant)


def test_the_identity_is_the_same_in_every_process():
    """The order of a set is not, and nor is the place of an object in memory."""
    code = (
        "import tests.trainer.test_fingerprint as t; "
        "print(t.identity_of(t.known_words), t.identity_of(t.Scale(0.5)), t.identity_of(t.scaled(0.5)), sep='|')"
    )
    seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"  # other than that of this process
    there = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()[-1]
    assert there == "|".join(map(identity_of, (known_words, Scale(0.5), scaled(0.5))))


def test_another_similarity_is_requested_again(tmp_path, tiny_model_dir):
    """Audits hold similarities: those of another phi are not replayed; those of the same one are."""
    settings = {**FOUR_STEPS, "max_steps": 1, "save_strategy": "no"}
    make_trainer(tmp_path, tiny_model_dir, teacher=Here(), **settings).train()
    other = make_trainer(tmp_path, tiny_model_dir, teacher=Here(), similarity=constant, **settings)
    other.train(resume_from_checkpoint=True)
    assert other.teacher.calls > 0
    assert other.state.log_history[0]["audit/similarity"] == pytest.approx(0.5)
    same = make_trainer(tmp_path, tiny_model_dir, teacher=Here.silent(), similarity=constant, **settings)
    same.train(resume_from_checkpoint=True)


# ---- The student ----


@pytest.fixture
def folders(tmp_path, tiny_model_dir):
    """A student, a copy of it with other dates, and one that was trained on under the same size."""
    for name in ("one", "copied", "retrained"):
        shutil.copytree(tiny_model_dir, tmp_path / name, copy_function=shutil.copyfile)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "retrained")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.001)
    model.save_pretrained(tmp_path / "retrained")
    (tmp_path / "copied" / "optimizer.pt").write_bytes(b"x")  # as in a checkpoint
    return tmp_path


def test_a_student_is_known_by_its_weights(folders):
    """A copy elsewhere is the same student, and another one in the same place is not."""
    settings = {name: settings_of(make_trainer(folders / "out", folders / name)) for name in ("one", "copied")}
    assert fingerprint(settings["one"]) == fingerprint(settings["copied"])
    shutil.copytree(folders / "retrained", folders / "one", dirs_exist_ok=True)
    again = settings_of(make_trainer(folders / "out", folders / "one"))
    assert {name for name in again if again[name] != settings["one"][name]} == {"student_weights"}


def test_a_student_of_the_hub_is_known_by_its_commit(tmp_path, tiny_model_dir):
    """Its id stays the same when it is uploaded again."""
    trainer = make_trainer(tmp_path, tiny_model_dir)
    trainer.model.config._name_or_path = "someone/student"
    trainer.model.config._commit_hash = "abc"
    before = settings_of(trainer)
    assert before["student"] == "someone/student"
    trainer.model.config._commit_hash = "def"
    assert fingerprint(settings_of(trainer)) != fingerprint(before)


def test_adapters_count(tmp_path, tiny_model_dir):
    """Two adapters of one size train differently."""
    settings = [
        settings_of(make_trainer(tmp_path, tiny_model_dir, peft_config=LoraConfig(r=2, lora_alpha=alpha)))
        for alpha in (2, 2, 4)
    ]
    assert settings[0] == settings[1]
    assert settings[0] != settings[2]


# ---- Settings ----


def test_what_saves_memory_does_not_count(tmp_path, tiny_model_dir):
    """A run that ran out of memory continues with what was paid for."""
    trainer = make_trainer(tmp_path, tiny_model_dir)
    changes = {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "activation_checkpointing": True,
        "torch_compile": True,
        "torch_compile_mode": "reduce-overhead",
        "dataloader_num_workers": 3,
        "bf16_full_eval": True,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4,
    }
    assert settings_of(trainer, **changes) == settings_of(trainer)
    assert settings_of(trainer, gradient_accumulation_steps=2) != settings_of(trainer)


def test_later_settings_do_not_count_at_their_defaults(tmp_path, tiny_model_dir):
    """Records of an earlier version are replayed: they were made without these settings."""
    trainer = make_trainer(tmp_path, tiny_model_dir)
    before = settings_of(trainer)
    assert not before.keys() & set(SINCE_EARLIER_RECORDS)
    assert fingerprint(settings_of(trainer, min_anchor_entropy=0.5)) != fingerprint(before)


def test_smaller_micro_batches_replay(tmp_path, tiny_model_dir):
    """The same trajectories in other portions: nothing is asked, and the student learns the same."""
    settings = {**FOUR_STEPS, "max_steps": 2, "save_strategy": "no"}
    whole = {**settings, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
    first = make_trainer(tmp_path, tiny_model_dir, teacher=Here(), **whole)
    first.train()
    again = make_trainer(tmp_path, tiny_model_dir, teacher=Here.silent(), **settings)
    again.train(resume_from_checkpoint=True)
    torch.testing.assert_close(trainable(again.model), trainable(first.model), rtol=0, atol=1e-5)


def test_no_secrets(tmp_path, tiny_model_dir):
    """A token lets someone in; another one gets the same answers, and none is written down."""
    trainer = make_trainer(tmp_path, tiny_model_dir)
    with_token = settings_of(
        trainer,
        teacher_model_init_kwargs={"dtype": torch.float32, "token": "hf_abc", "headers": {"Authorization": "hf_abc"}},
        hub_token="hf_abc",
    )
    assert "hf_abc" not in str(with_token)
    another = {"dtype": torch.float32, "token": "hf_new", "headers": {"Authorization": "hf_new"}}
    assert with_token == settings_of(trainer, teacher_model_init_kwargs=another)
    assert with_token["teacher_model_init_kwargs"] == {"dtype": "float32", "headers": {}}


@pytest.mark.case("F5")
def test_extra_fields_count(tmp_path, tiny_model_dir):
    """A field or a header may change the answers, and those of another request are not replayed."""
    trainer = make_trainer(tmp_path, tiny_model_dir, teacher=ScriptedTeacher(["x"]))
    before = fingerprint(settings_of(trainer))
    assert fingerprint(settings_of(trainer, teacher_extra_body={"top_k": 40})) != before
    assert fingerprint(settings_of(trainer, teacher_extra_headers={"X-Provider": "a"})) != before


def test_a_teacher_is_known_by_its_name(tmp_path, tiny_model_dir):
    """Another name is another teacher, and so is another script."""
    teacher = ScriptedTeacher(["x"])
    trainer = make_trainer(tmp_path, tiny_model_dir, teacher=teacher)
    before = settings_of(trainer)
    teacher.name = "scripted, another prompt"
    assert settings_of(trainer) != before
    assert teacher_key(trainer, ScriptedTeacher(["x"])) != teacher_key(trainer, ScriptedTeacher(["y"]))


def teacher_key(trainer, teacher):
    trainer.teacher = teacher
    settings = settings_of(trainer)
    return {name: settings[name] for name in ("teacher", "teacher_base_url", "teacher_code")}


# Each defines `Own` again, as a cell of a notebook does.
BASE = """
from omniopd_trl.teachers import Rollout, Teacher, TeacherReply
WORDS = 3
def words(text): return text.split()[:WORDS]
class Own(Teacher):
    name = "own"
    style = "short"
    def __init__(self, prompt="Go on.", key=None, examples=()):
        self.prompt, self._examples, self.key = prompt, examples, key
        self.calls = 0
    async def sample(self, prefixes, request):
        return [TeacherReply(tuple(map(Rollout, words(self.prompt)))) for _ in prefixes]
"""


def own(source=BASE, call="Own()"):
    namespace = {"__name__": "notebook"}
    exec(source, namespace)
    return eval(call, namespace)


@pytest.mark.case("U1")
@pytest.mark.parametrize(
    "changed",
    [
        own(BASE.replace("words(self.prompt)", "words(self.prompt)[::-1]")),  # the method
        own(BASE.replace("WORDS = 3", "WORDS = 4")),  # a number of its module
        own(BASE.replace(".split()", ".split(' ')")),  # a function of its module
        own(BASE.replace('style = "short"', 'style = "long"')),  # an attribute of the class
        own(call="Own('Continue.')"),
        own(call="Own(examples=['2 + 2 = 4'])"),
        own(call="type('Own', (Own,), {'style': 'short'})()"),
    ],
)
def test_a_custom_teacher_is_known_by_its_code_and_configuration(tmp_path, tiny_model_dir, changed):
    """What is edited in a notebook is another teacher, under the same name."""
    trainer = make_trainer(tmp_path, tiny_model_dir)
    before = teacher_key(trainer, own())
    assert teacher_key(trainer, own()) == before
    assert before["teacher_code"].startswith("notebook.Own (")
    after = teacher_key(trainer, changed)
    assert {name for name in before if before[name] != after[name]} == {"teacher_code"}


@pytest.mark.case("U1")
def test_the_state_of_a_custom_teacher_does_not_count(tmp_path, tiny_model_dir):
    """Counters, keys and comments change no answer: a run that is resumed in the same process replays."""
    trainer = make_trainer(tmp_path, tiny_model_dir)
    before = teacher_key(trainer, own())
    teacher = own(BASE.replace("async def", "# a comment\n    async def"), "Own()")
    teacher.calls = 7
    teacher.api_key = "another"
    assert teacher_key(trainer, teacher) == before
    teacher.style = "long"  # replaces the attribute of the class
    assert teacher_key(trainer, teacher) != before


@pytest.mark.case("U1")
@pytest.mark.parametrize(
    ("name", "variable"),
    [
        ("openai:model", "OPENAI_BASE_URL"),
        ("anthropic:model", "ANTHROPIC_BASE_URL"),
        ("gemini:model", "GOOGLE_GEMINI_BASE_URL"),
        ("vllm:model", None),
    ],
)
def test_a_service_is_known_by_its_address(tmp_path, tiny_model_dir, monkeypatch, name, variable):
    """From the setting or the environment, without what may be a secret in it."""
    trainer = make_trainer(tmp_path, tiny_model_dir)

    def address(url=None):
        return teacher_key(trainer, remote_teacher(name, base_url=url, continuation="instruct"))["teacher_base_url"]

    here = address("http://127.0.0.1:8000/v1")
    assert here == "http://127.0.0.1:8000/v1"
    assert address("http://127.0.0.1:8000/v1/") == here
    assert address("http://user:secret@127.0.0.1:8000/v1?key=secret#secret") == here
    assert len({here, address(), address("http://127.0.0.1:8001/v1"), address("http://127.0.0.1:8000/v2")}) == 4
    if variable is not None:
        monkeypatch.setenv(variable, "http://127.0.0.1:8000/v1")
        assert address() == here


@pytest.mark.case("U1")
def test_a_teacher_in_a_teacher_counts(tmp_path, tiny_model_dir):
    """A wrapper is known by what it wraps."""
    source = BASE.replace("prompt=", "service, prompt=").replace("self.calls = 0", "self.service = service")
    trainer = make_trainer(tmp_path, tiny_model_dir)
    keys = []
    for url in ("http://127.0.0.1:8000", "http://127.0.0.1:8000", "http://127.0.0.1:8001"):
        wrapper = own(source, "Own")(remote_teacher("openai:gpt-6-luna", base_url=url))
        keys.append(teacher_key(trainer, wrapper)["teacher_code"])
    assert keys[0] == keys[1] != keys[2]


def test_named_similarities(tmp_path, tiny_model_dir):
    """By name, whether it came from the configuration or as an argument."""
    by_argument = settings_of(make_trainer(tmp_path, tiny_model_dir, similarity=get_similarity("rouge1")))
    by_name = settings_of(make_trainer(tmp_path, tiny_model_dir))
    assert by_argument["similarity"] == "rouge1"
    assert by_name["similarity"] == "edit"
