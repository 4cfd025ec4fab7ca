# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""What is refused, in one line, when a trainer is made: before a model is loaded, or the teacher is asked."""

import sys
from copy import deepcopy
from logging import getLogger
from pathlib import Path

import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.utils import logging

from omniopd_trl import OmniOPDConfig, OmniOPDTrainer
from omniopd_trl.errors import ConfigError, DataError, MissingExtraError, OmniOPDError
from omniopd_trl.teachers import LocalTeacher, Prefix, SamplingRequest, ScriptedTeacher, Teacher
from tests.conftest import CHATML
from tests.support.other_tokenizers import appending, channels
from tests.support.training import make_trainer, questions

SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "What is 1 + 1?"}
NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + CHATML
)


@pytest.fixture
def not_loaded(monkeypatch):
    """No student is loaded: what is refused is refused before."""
    monkeypatch.setattr("trl.trainer.distillation_trainer.create_model_from_path", None, raising=False)
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", None)


def refused(error, message, *args, **kwargs):
    """The message, which is one line."""
    with pytest.raises(error, match=message) as info:
        make_trainer(*args, **kwargs)
    assert isinstance(info.value, OmniOPDError)
    assert "\n" not in str(info.value)
    return str(info.value)


class TestTeachers:
    """What is passed as a teacher."""

    @pytest.mark.case("U4")
    @pytest.mark.usefixtures("not_loaded")
    @pytest.mark.parametrize(
        "teacher",
        [42, lambda prompt: prompt, ScriptedTeacher, Path("teacher"), {"model": "gpt"}, torch.nn.Linear(2, 2), ["a"]],
        ids=["number", "function", "class", "path", "dictionary", "module", "list"],
    )
    def test_no_teacher(self, tmp_path, tiny_model_dir, teacher):
        """Anything else is named, with what a teacher may be."""
        refused(ConfigError, r"teacher_model=.* is no teacher.*subclass", tmp_path, tiny_model_dir, teacher=teacher)

    @pytest.mark.usefixtures("not_loaded")
    @pytest.mark.parametrize("name", ["absent", None, ""])
    def test_no_name(self, tmp_path, tiny_model_dir, name):
        """A custom teacher needs a name, which the journal holds."""
        named = {} if name == "absent" else {"name": name}
        teacher = type("Nameless", (Teacher,), {"sample": ScriptedTeacher.sample, **named})()
        refused(
            ConfigError, "a Nameless, has name=.*identifies its recorded", tmp_path, tiny_model_dir, teacher=teacher
        )

    @pytest.mark.parametrize("kind", ["instance", "adapter", "local"])
    def test_the_student_itself(self, tmp_path, tiny_model_dir, tiny_tokenizer, kind):
        """A teacher that would be trained with the student, whose instance is not frozen by the attempt."""
        student = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
        teacher = LocalTeacher(student, tiny_tokenizer) if kind == "local" else student
        model = get_peft_model(student, LoraConfig(r=2)) if kind == "adapter" else student
        refused(ConfigError, r"has the weights of the student's.*deepcopy\(model\)", tmp_path, model, teacher=teacher)
        assert kind == "local" or any(parameter.requires_grad for parameter in model.parameters())

    @pytest.mark.case("R7")
    def test_template_of_a_local_teacher(self, tmp_path, tiny_model_dir, tiny_teacher_dir):
        """The teacher's template is tried on every prompt at the start, not on the one that it meets in step 7."""
        tokenizer = AutoTokenizer.from_pretrained(tiny_teacher_dir)
        tokenizer.chat_template = NO_SYSTEM
        teacher = LocalTeacher(str(tiny_teacher_dir), tokenizer)
        rows = [{"prompt": [USER]}] * 9 + [{"prompt": [SYSTEM, USER]}]
        message = refused(
            DataError,
            "Row 9 of `train_dataset`.*System role not supported",
            *(tmp_path, tiny_model_dir),
            teacher=teacher,
            dataset=Dataset.from_list(rows),
        )
        assert f"chat template of the teacher {str(tiny_teacher_dir)!r}" in message
        message = refused(
            DataError,
            r"Row 9 of `eval_dataset\['b'\]`.*System role not supported",
            *(tmp_path, tiny_model_dir),
            teacher=teacher,
            eval_dataset={"a": questions(), "b": Dataset.from_list(rows)},
        )

    @pytest.mark.case("R7")
    def test_stream(self, tmp_path, tiny_model_dir, tiny_teacher_dir):
        """Prompts of a stream are rendered before the student answers them, so nothing of the step is wasted."""
        tokenizer = AutoTokenizer.from_pretrained(tiny_teacher_dir)
        tokenizer.chat_template = NO_SYSTEM
        rows = [{"prompt": [USER]}] * 9 + [{"prompt": [SYSTEM, USER]}]
        trainer = make_trainer(
            *(tmp_path, tiny_model_dir),
            teacher=LocalTeacher(str(tiny_teacher_dir), tokenizer),
            dataset=IterableDataset.from_generator(lambda: iter(rows)),
            shuffle_dataset=False,
            max_steps=2,
        )
        with pytest.raises(DataError, match=r"System role not supported.*Be brief"):
            trainer.train()
        assert trainer.state.global_step == 1
        assert len(trainer.batches) == 1


class TestStudents:
    """What is passed as a student."""

    @pytest.mark.case("U4")
    def test_adapter(self, tmp_path, tiny_model_dir, tiny_tokenizer):
        """A folder with an adapter leads to the two ways of using it."""
        folder = tmp_path / "lora"
        get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model_dir), LoraConfig(r=2)).save_pretrained(folder)
        tiny_tokenizer.save_pretrained(folder)
        message = refused(DataError, "holds a LoRA adapter and no model", tmp_path, folder)
        assert "merge_and_unload()" in message
        assert "is_trainable=True" in message

    @pytest.mark.case("U4")
    @pytest.mark.usefixtures("not_loaded")
    @pytest.mark.parametrize(
        ("files", "name", "message"),
        [
            ([], "runs/student", "no such folder. The name was looked up on the Hub"),
            (["runs/demo/config.json"], "runs/demos", "'runs' is here and has no 'demos'.*Did you mean `runs/demo`"),
            (["runs/a/notes.txt"], "runs/a", "holds no model"),
            (["runs/checkpoint-4/config.json"], "runs", "Name one of its checkpoints: checkpoint-4"),
            (["runs/a/config.json"], "runs/a", "Check that the folder is a complete model"),
        ],
    )
    def test_folders(self, tmp_path, monkeypatch, files, name, message):
        """What is in the folder of the name, or beside it, is said; a name with one `/` is looked up here first."""
        monkeypatch.chdir(tmp_path)
        for file in files:
            Path(file).parent.mkdir(parents=True, exist_ok=True)
            Path(file).write_text("{}")
        refused(DataError, f"The student '{name}' cannot be loaded: .*{message}", tmp_path, name)

    @pytest.mark.case("U4")
    @pytest.mark.usefixtures("not_loaded")
    @pytest.mark.parametrize("model", [Path("student"), None, 3, torch.nn.Linear(2, 2)])
    def test_no_model(self, model, monkeypatch):
        """With and without a configuration."""
        monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)
        for args in (None, OmniOPDConfig("out", use_cpu=True, bf16=False, report_to="none")):
            with pytest.raises(ConfigError, match="it must be the path of a model"):
                OmniOPDTrainer(model, ScriptedTeacher(), args, questions())

    @pytest.mark.case("U4")
    @pytest.mark.usefixtures("not_loaded")
    @pytest.mark.parametrize("name", ["wandb", "comet_ml", "nonsense"])
    def test_integrations(self, tmp_path, tiny_model_dir, monkeypatch, name):
        """An integration whose package is missing, or that does not exist, is refused before the student is loaded."""
        for package in ("wandb", "comet"):
            monkeypatch.setattr(f"transformers.integrations.integration_utils.is_{package}_available", lambda: False)
        refused(ConfigError, rf"report_to=\['{name}'\] cannot be used: ", tmp_path, tiny_model_dir, report_to=name)

    @pytest.mark.usefixtures("not_loaded")
    @pytest.mark.parametrize("optim", ["adamw_bnb_8bit", "adamw_8bit", "paged_adamw_8bit", "lion_32bit", "ademamix"])
    def test_optimizer(self, tmp_path, tiny_model_dir, monkeypatch, optim):
        """An optimizer whose package is missing is refused before the student is loaded."""
        monkeypatch.setitem(sys.modules, "bitsandbytes", None)
        refused(MissingExtraError, r"pip install -e '\.\[bitsandbytes\]'", tmp_path, tiny_model_dir, optim=optim)

    @pytest.mark.usefixtures("not_loaded")
    def test_stream_without_steps(self, tmp_path, tiny_model_dir):
        """A stream has no length: transformers would say so once the student is loaded."""
        stream = questions().to_iterable_dataset()
        refused(ConfigError, "max_steps=-1: a streaming", tmp_path, tiny_model_dir, dataset=stream, max_steps=-1)

    @pytest.mark.parametrize("settings", [{}, {"peft_config": LoraConfig(r=2)}])
    def test_optimizer_of_other_parameters(self, tmp_path, tiny_model_dir, settings):
        """One of the parameters of another instance, or of those that an adapter freezes, would train nothing."""
        model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
        optimizers = (torch.optim.SGD(model.parameters(), lr=0.1), None)
        student = model if settings else tiny_model_dir
        refused(
            *(ConfigError, "no trainable parameter of the student", tmp_path, student),
            optimizers=optimizers,
            **settings,
        )
        if not settings:
            head = torch.optim.SGD([model.lm_head.weight], lr=0.1)  # a part is enough
            assert make_trainer(tmp_path, model, optimizers=(head, None)).optimizer is head

    def test_quantization(self, tmp_path, tiny_model_dir, monkeypatch):
        """So is a quantized student."""
        quantized = BitsAndBytesConfig(load_in_8bit=True)
        monkeypatch.setitem(sys.modules, "bitsandbytes", None)
        message = r"pip install -e '\.\[bitsandbytes\]'"
        refused(MissingExtraError, message, tmp_path, tiny_model_dir, quantization_config=quantized)

    @pytest.mark.case("U9")
    def test_bars_name_the_model(self, tmp_path, tiny_model_dir, tiny_teacher_dir):
        """Three bars of loading, each with the model that it is about; other bars keep their names."""
        names = []

        def noted(factory, args, kwargs):
            names.append(kwargs.get("desc"))
            return factory(*args, **kwargs)

        before = logging.set_tqdm_hook(noted)
        try:
            make_trainer(tmp_path, tiny_model_dir, teacher=str(tiny_teacher_dir))
            logging.tqdm([], desc="Loading weights")
        finally:
            assert logging.set_tqdm_hook(before) is noted
        models = ["teacher", "student", "reference"]
        assert names == [*(f"Loading weights of the {model}" for model in models), "Loading weights"]

    @pytest.mark.case("R12")
    @pytest.mark.usefixtures("not_loaded")
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            (
                {"pad_token": "<new>"},
                r"pad_token='<new>' with the id 300, .* 300 rows.*pad_token = tokenizer.eos_token",
            ),
            ({"eos_token": "<new>"}, r"eos_token='<new>' with the id 300.*resize_token_embeddings"),
            ({"eos_token": None}, "no end-of-sequence token.*Set `tokenizer.eos_token`"),
            ({"eos_token": None, "pad_token": None}, "no end-of-sequence token"),
        ],
    )
    def test_special_tokens(self, tmp_path, tiny_model_dir, tiny_tokenizer, changes, message):
        """Special tokens that the student has no embedding of, or that do not exist."""
        tokenizer = deepcopy(tiny_tokenizer)
        for name, token in changes.items():
            if token is not None:
                tokenizer.add_tokens([token], special_tokens=True)
            setattr(tokenizer, name, token)
        refused(DataError, message, tmp_path, tiny_model_dir, processing_class=tokenizer)

    @pytest.mark.case("R9")
    @pytest.mark.parametrize("keep", [False, True])
    def test_marks_of_reasoning(self, tmp_path, make_tiny_model, tiny_tokenizer, caplog, monkeypatch, keep):
        """The start of a run says which special tokens the teacher does not get, unless they are kept."""
        tokenizer = channels(tiny_tokenizer)
        monkeypatch.setattr(getLogger("transformers"), "propagate", True)
        monkeypatch.setattr(getLogger("omniopd_trl"), "propagate", True)
        make_trainer(tmp_path, make_tiny_model(tokenizer=tokenizer), keep_special_tokens=keep)
        assert ("special tokens <|channel|>, <|message|> into answers" in caplog.text) != keep

    @pytest.mark.case("R11")
    def test_no_end_before_a_completion(self, tmp_path, make_tiny_model, tiny_tokenizer):
        """The student continues a plain prompt, whatever its tokenizer appends to a text."""
        tokenizer = appending(tiny_tokenizer)
        rows = Dataset.from_list([{"prompt": f"Tom has {n} apples."} for n in range(8)])
        trainer = make_trainer(
            *(tmp_path, make_tiny_model(tokenizer=tokenizer)), teacher=ScriptedTeacher(["x"]), dataset=rows
        )
        trainer.train()
        for ids in trainer.batches[0]["prompt_ids"]:
            assert ids[-1] == tiny_tokenizer.convert_tokens_to_ids(".")

    def test_prompts_are_those_of_the_base_class(self, tmp_path, tiny_model_dir):
        """But for what a tokenizer appends."""
        trainer = make_trainer(tmp_path, tiny_model_dir)
        for prompts in (["Tom has", "a"], [[USER], [SYSTEM, USER]]):
            expected = super(OmniOPDTrainer, trainer)._tokenize_prompts(prompts)
            assert trainer._tokenize_prompts(prompts) == expected


class TestOptions:
    """Options of other trainers, and machines without a GPU."""

    @pytest.mark.case("U8")
    @pytest.mark.parametrize("options", [{}, {"bf16": True}, {"bf16_full_eval": True, "bf16": False}])
    def test_bf16_without_gpu(self, monkeypatch, options):
        """The default dtype on a machine without a GPU: one line that says what to set."""
        monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: False)
        with pytest.raises(ConfigError, match=r"needs a GPU with bf16.*use_cpu=True and bf16=False") as error:
            OmniOPDConfig("out", **options)
        assert "\n" not in str(error.value)

    @pytest.mark.case("U8")
    def test_inherited_checks(self):
        """Checks of the inherited configurations raise the package's error, with their own words."""
        with pytest.raises(ConfigError, match=r"logging strategy .* requires non-zero"):
            OmniOPDConfig("out", use_cpu=True, bf16=False, logging_steps=0)

    @pytest.mark.case("R18")
    @pytest.mark.parametrize(
        ("option", "message"),
        [
            ({"include_for_metrics": ["inputs"]}, "this trainer has none.*`eval_reward_funcs`"),
            ({"include_for_metrics": ["loss", "inputs"]}, "this trainer has none"),
            ({"include_num_input_tokens_seen": True}, "logged as `num_tokens`"),
            ({"include_num_input_tokens_seen": "non_padding"}, "logged as `num_tokens`"),
        ],
    )
    def test_metrics(self, option, message):
        """Those that read the inputs as a model's are refused."""
        with pytest.raises(ConfigError, match=message):
            OmniOPDConfig("out", use_cpu=True, bf16=False, **option)

    @pytest.mark.case("R18")
    def test_do_sample(self, tmp_path, tiny_model_dir):
        """What is done anyway may be asked for, and is no filter."""
        trainer = make_trainer(tmp_path, tiny_model_dir, generation_kwargs={"do_sample": True})
        assert trainer.generation_config.do_sample is True
        assert trainer.args.sampling_filters == []
        with pytest.raises(ConfigError, match="sets 'do_sample'"):
            OmniOPDConfig("out", use_cpu=True, bf16=False, generation_kwargs={"do_sample": False})


class TestLocalTeachers:
    """Tokenizers of local teachers."""

    @pytest.mark.case("R11")
    def test_no_end_in_a_prefix(self, tiny_teacher_dir, tiny_teacher_tokenizer):
        """The student's plain text is continued, whatever the teacher's tokenizer appends to it."""
        plain = LocalTeacher(str(tiny_teacher_dir))
        ending = LocalTeacher(plain.model, appending(tiny_teacher_tokenizer, "<s>", "[END]"))
        prefix = Prefix("Tom has", " 7 apples")
        assert ending.encode(prefix) == [plain.tokenizer.bos_token_id, *plain.encode(prefix)]
        assert ending.encode(Prefix([USER], " 2")) == plain.encode(Prefix([USER], " 2"))

    @pytest.mark.case("R12")
    @pytest.mark.parametrize("changes", [{"pad_token": "<new>"}, {"pad_token": None, "eos_token": None}])
    def test_padding(self, tiny_teacher_dir, changes):
        """A teacher's padding is masked, so its token need not exist; the rollouts are the same."""
        plain = LocalTeacher(str(tiny_teacher_dir))
        tokenizer = AutoTokenizer.from_pretrained(tiny_teacher_dir)
        for name, token in changes.items():
            if token is not None:
                tokenizer.add_tokens([token], special_tokens=True)
            setattr(tokenizer, name, token)
        other = LocalTeacher(plain.model, tokenizer)
        prefixes = [Prefix([USER], " 2"), Prefix([USER], " 2 and some more text")]
        request = SamplingRequest(num_samples=2, max_tokens=6, temperature=0)
        expected, replies = (t.sample_trajectories([prefixes], request)[0] for t in (plain, other))
        assert [r.rollouts for r in replies] == [r.rollouts for r in expected]
