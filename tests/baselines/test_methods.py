# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""The baselines: TRL's own trainers, evaluated and counted as a run of OmniOPD."""

import json
import logging
import math
import shutil
import sys

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM
from trl import DistillationConfig, DistillationTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from omniopd_trl import OmniOPDConfig, OmniOPDTrainer
from omniopd_trl.accounting.usage import Usage
from omniopd_trl.baselines.grpo import with_same_prompts
from omniopd_trl.baselines.make import make_baseline
from omniopd_trl.baselines.sft import load_solutions
from omniopd_trl.errors import ConfigError, DataError
from omniopd_trl.journal.browse import read_logs, read_settings
from omniopd_trl.journal.reader import spent
from omniopd_trl.report.page import write_page
from omniopd_trl.report.runs import Run
from tests.support.commands import run_process, succeeded
from tests.support.training import questions

SOLUTION = "We add. Answer: {}"
COMMON = {
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "save_strategy": "no",
    "gradient_checkpointing": False,
    "disable_tqdm": True,
    "max_completion_length": 16,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "max_steps": 1,
    "logging_steps": 1,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "constant",
}


def settings(folder, **changes):
    """A configuration of one step on 8 prompts."""
    return OmniOPDConfig(str(folder), **{**COMMON, "chunk_length": 8, **changes})


def solutions(folder, usage=None):
    """A file of solutions of the questions, and its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "solutions.jsonl"
    rows = [
        {"prompt": q["prompt"], "completion": [{"role": "assistant", "content": SOLUTION.format(q["answer"])}]}
        for q in questions()
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def teacher_dir(make_tiny_model):
    """A teacher with the student's tokenizer."""
    return make_tiny_model(seed=5)


def make(
    method,
    tmp_path,
    student,
    teacher="scripted",
    section=None,
    eval_dataset=None,
    funcs=None,
    evaluate_teacher=False,
    peft_config=None,
    **changes,
):
    if method == "sft":
        solutions(tmp_path / "out" / "solutions")
    return make_baseline(
        method,
        model=str(student),
        args=settings(tmp_path / "out", teacher_model_name_or_path=str(teacher), **changes),
        section=section,
        train_dataset=questions(),
        eval_dataset=eval_dataset,
        reward_funcs=funcs,
        evaluate_teacher=evaluate_teacher,
        peft_config=peft_config,
    )


def by_hand(method, tmp_path, student, teacher):
    """TRL's trainer of a method, called as its documentation does."""
    folder = str(tmp_path / "by_hand")
    if method == "sft":
        return SFTTrainer(
            str(student),
            SFTConfig(folder, **{k: v for k, v in COMMON.items() if k != "max_completion_length"}),
            train_dataset=load_solutions(str(solutions(tmp_path / "again"))).dataset,
        )
    if method == "opd":
        args = DistillationConfig(folder, beta=0.5, **COMMON)
        return DistillationTrainer(str(student), str(teacher), args, train_dataset=questions())
    args = GRPOConfig(folder, num_generations=2, **{**COMMON, "gradient_accumulation_steps": 4})
    return GRPOTrainer(str(student), reward, args, train_dataset=questions())


def reward(completions, **kwargs):
    """A reward that differs between random completions."""
    return [float(len(completion[0]["content"]) % 5) for completion in completions]


SECTIONS = {"sft": None, "opd": None, "grpo": {"num_generations": 2}}


@pytest.mark.parametrize("method", SECTIONS)
def test_first_step_is_that_of_trl(method, tmp_path, tiny_model_dir, teacher_dir):
    """Loss, gradient norm and updated weights are those of TRL's trainer with the same settings."""
    ours = make(method, tmp_path, tiny_model_dir, teacher_dir, SECTIONS[method], funcs=[reward])
    ours.train()
    theirs = by_hand(method, tmp_path, tiny_model_dir, teacher_dir)  # which sets the seed
    theirs.train()
    first, expected = ours.state.log_history[0], theirs.state.log_history[0]
    for name in ("loss", "grad_norm", "entropy"):
        assert first[name] == pytest.approx(expected[name], rel=1e-5), name
    weights = dict(theirs.model.named_parameters())
    assert first["grad_norm"] > 0
    for name, parameter in ours.model.named_parameters():
        assert torch.equal(parameter, weights[name]), name


EVALUATED = {"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True, "per_device_eval_batch_size": 4}


@pytest.fixture(scope="module")
def omniopd_log(tmp_path_factory, tiny_model_dir):
    """What a run of OmniOPD logs before its first step."""
    args = settings(tmp_path_factory.mktemp("omniopd"), **EVALUATED)
    data = {"train_dataset": questions(), "eval_dataset": questions(4)}
    trainer = OmniOPDTrainer(str(tiny_model_dir), "scripted", args, eval_reward_funcs=reward, **data)
    torch.manual_seed(7)
    trainer.train()
    return trainer.state.log_history[0]


@pytest.mark.parametrize("method", SECTIONS)
def test_evaluation_is_that_of_omniopd(method, tmp_path, tiny_model_dir, teacher_dir, omniopd_log):
    """Before training all methods log what a run of OmniOPD logs, under the same names, and the journal holds it."""
    rows = questions(4)
    trainer = make(method, tmp_path, tiny_model_dir, teacher_dir, SECTIONS[method], rows, [reward], **EVALUATED)
    torch.manual_seed(7)
    trainer.train()
    before, ours = omniopd_log, trainer.state.log_history[0]
    times = ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second")
    assert {k: v for k, v in ours.items() if k not in times} == {k: v for k, v in before.items() if k not in times}
    assert {"eval_pass@1", "eval_kl/unaudited", "eval_completions/mean_length"} <= ours.keys()
    after = trainer.state.log_history[2]
    assert after["step"] == 1
    assert after["eval_kl/unaudited"] > 0  # to the student before training
    assert [entry["step"] for entry in read_logs(tmp_path / "out")] == [0, 1, 1, 1]
    assert read_settings(tmp_path / "out")["method"] == method
    run = Run(tmp_path / "out")
    assert [step for step, _ in run.series("eval_pass@1")] == [0, 1]
    assert "pass@1" in write_page([run])


class TestCounts:
    """What the teacher has read and written."""

    def test_opd(self, tmp_path, tiny_model_dir, teacher_dir):
        """The teacher reads every prompt and completion, and writes nothing."""
        trainer = make("opd", tmp_path, tiny_model_dir, teacher_dir, max_steps=2)
        trainer.train()
        entries = [entry for entry in trainer.state.log_history if "teacher/prompt_tokens" in entry]
        assert trainer.teacher_usage == Usage(int(trainer.state.log_history[-2]["num_tokens"]))
        assert sum(entry["teacher/prompt_tokens"] for entry in entries) == trainer.teacher_usage.prompt_tokens
        assert [entry["teacher/completion_tokens"] for entry in entries] == [0, 0]
        assert spent(tmp_path / "out")[0] == trainer.teacher_usage
        assert trainer.teacher_dollars is None

    def test_steps_after_the_last_entry_of_the_log(self, tmp_path, tiny_model_dir, teacher_dir):
        """The entry at the end counts them, also where an evaluation has left the student in evaluation mode."""
        evaluated = {**EVALUATED, "eval_steps": 3, "logging_steps": 2}
        rows = questions(4)
        trainer = make("opd", tmp_path, tiny_model_dir, teacher_dir, eval_dataset=rows, max_steps=3, **evaluated)
        trainer.train()
        assert spent(tmp_path / "out")[0] == trainer.teacher_usage != Usage()

    def test_opd_with_what_only_the_teacher_sees(self, tmp_path, tiny_model_dir, teacher_dir):
        """The loss compares the student after its prompt with the teacher after its own, which holds the answer."""
        context = {"teacher_context_column": "answer", "teacher_context_template": "({context}) {prompt}"}
        trainer = make("opd", tmp_path, tiny_model_dir, teacher_dir, max_grad_norm=0.0, **context)
        batches, original = [], trainer._compute_loss
        trainer._compute_loss = lambda student, inputs, n: batches.append(inputs) or original(student, inputs, n)
        trainer.train()
        tokenizer = trainer.processing_class
        student, teacher = (AutoModelForCausalLM.from_pretrained(path) for path in (tiny_model_dir, teacher_dir))
        total, count, read = 0.0, 0, 0
        known = {
            tokenizer.apply_chat_template(q["prompt"], add_generation_prompt=True, tokenize=False): q
            for q in questions()
        }
        for inputs in batches:
            for index, mask in enumerate(inputs["completion_mask"].bool()):
                ids = inputs["completion_ids"][index][mask]
                prompt = inputs["prompt_ids"][index][inputs["prompt_mask"][index].bool()]
                row = known[tokenizer.decode(prompt)]
                assert "(" not in row["prompt"][0]["content"]
                message = {"role": "user", "content": f"({row['answer']}) {row['prompt'][0]['content']}"}
                theirs = tokenizer.apply_chat_template([message], add_generation_prompt=True, return_dict=True)
                theirs = torch.tensor(theirs["input_ids"])
                own, other = (
                    model(torch.cat([before, ids])[None]).logits[0, len(before) - 1 : -1].log_softmax(-1).double()
                    for model, before in ((student, prompt), (teacher, theirs))
                )
                mean = torch.logaddexp(own, other) - math.log(2)
                divergence = sum((one.exp() * (one - mean)).sum() for one in (own, other)) / 2
                total, count, read = total + divergence.item(), count + len(ids), read + len(theirs) + len(ids)
        logged = next(entry for entry in trainer.state.log_history if "loss" in entry)
        assert logged["loss"] == pytest.approx(total / count, rel=1e-4)
        assert trainer.teacher_usage == Usage(read)

    def test_grpo(self, tmp_path, tiny_model_dir):
        """No teacher is asked or loaded, and each step has all prompts, with several samples each."""
        trainer = make("grpo", tmp_path, tiny_model_dir, "no/such/teacher", {"num_generations": 2})
        trainer.train()
        assert trainer.teacher_usage == Usage()
        assert trainer.args.gradient_accumulation_steps == 4
        assert trainer.args.generation_batch_size == 2 * len(questions())
        assert trainer.evaluator.teacher.name == "none"


@pytest.mark.parametrize(
    ("own", "section", "expected"),
    [
        (1, {}, (8, 16)),
        (1, {"num_generations": 4}, (4, 8)),
        (4, {}, (4, 2)),
        (4, {"num_generations": 8}, (8, 4)),
        (4, {"gradient_accumulation_steps": 3}, (4, None)),
    ],
)
def test_groups_of_grpo(tmp_path, own, section, expected):
    """As many prompts per step as the recipe's step has, whichever of both sets the size of a group."""
    args = OmniOPDConfig(str(tmp_path), use_cpu=True, bf16=False, gradient_accumulation_steps=2, num_generations=own)
    settings = with_same_prompts(args, section)
    assert (settings["num_generations"], settings.get("gradient_accumulation_steps")) == expected


class TestRefused:
    """Settings that a method cannot use, before a model is loaded."""

    @pytest.fixture(autouse=True)
    def _no_model(self, monkeypatch):
        monkeypatch.setattr(
            AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("a model was loaded")
        )

    def test_opd_needs_probabilities(self, tmp_path, tiny_model_dir):
        with pytest.raises(ConfigError, match=r"the teacher 'scripted' returns text\. Set `teacher_model_name"):
            make("opd", tmp_path, tiny_model_dir)
        with pytest.raises(ConfigError, match="the teacher 'openai:gpt-6-luna' returns text"):
            make("opd", tmp_path, tiny_model_dir, "openai:gpt-6-luna")

    def test_opd_needs_the_same_tokens(self, tmp_path, tiny_model_dir, tiny_teacher_dir):
        """TRL compares sizes only, and would train on the probabilities of other tokens."""
        with pytest.raises(ConfigError, match=r"tokenizers of .* differ \(300 and 327 tokens, for example for"):
            make("opd", tmp_path, tiny_model_dir, tiny_teacher_dir)

    @pytest.mark.parametrize(
        ("row", "words"), [({}, "column"), ({"answer": "two"}, "column that math-verify can read")]
    )
    def test_grpo_needs_answers(self, tmp_path, tiny_model_dir, row, words):
        with pytest.raises(ConfigError, match=f"neither a `solution` nor an `answer` {words}\\. Add one"):
            make_baseline(
                "grpo",
                model=str(tiny_model_dir),
                args=settings(tmp_path),
                train_dataset=Dataset.from_list([{"prompt": "1 + 1 =", **row}] * 8),
            )

    def test_sft_needs_solutions(self, tmp_path, tiny_model_dir):
        with pytest.raises(DataError, match=r"no solutions in .*out/solutions'\. Collect .* `omniopd solutions`"):
            make_baseline("sft", model=str(tiny_model_dir), args=settings(tmp_path / "out"), train_dataset=questions())
        path = tmp_path / "other.jsonl"
        path.write_text('{"question": "1 + 1"}\n')
        with pytest.raises(DataError, match="have no column completion and prompt"):
            load_solutions(str(path))

    def test_what_trl_refuses(self, tmp_path, tiny_model_dir):
        """Its message is that of a `ConfigError`, with the method."""
        section = {"num_generations": 3, "generation_batch_size": 8}
        with pytest.raises(ConfigError, match="method='grpo' cannot be used with these settings: generation_batch"):
            make("grpo", tmp_path, tiny_model_dir, section=section)

    @pytest.mark.parametrize("name", ["zero3", "fsdp"])
    def test_a_teacher_that_is_split(self, tmp_path, tiny_model_dir, monkeypatch, name):
        monkeypatch.setattr("omniopd_trl.baselines.make.is_deepspeed_zero3_enabled", lambda: name == "zero3")
        monkeypatch.setenv("ACCELERATE_USE_FSDP", str(name == "fsdp").lower())
        with pytest.raises(ConfigError, match=r"splits its teacher .* Set evaluate_teacher=False, and use `omn"):
            make("opd", tmp_path, tiny_model_dir, evaluate_teacher=True)


def test_evaluation_before_training_under_deepspeed(tmp_path, tiny_model_dir):
    """It is refused: DeepSpeed has not prepared the student."""
    trainer = make("grpo", tmp_path, tiny_model_dir, section={"num_generations": 2}, eval_dataset=questions(4))
    trainer.evaluator.objective.is_sharded = True
    with pytest.raises(ConfigError, match=r"before train\(\), and DeepSpeed and FSDP .* Set eval_on_start=True"):
        trainer.evaluate()


def test_options_without_effect(tmp_path, tiny_model_dir, caplog):
    """Options of OmniOPD that the method does not have are named once; those of the evaluation are not among them."""
    with caplog.at_level(logging.WARNING):
        trainer = make(
            "sft",
            tmp_path,
            tiny_model_dir,
            section={"max_length": 64, "packing": False},
            num_chunks=3,
            beta=0.2,
            num_eval_generations=2,
            teacher_budget_usd=5.0,
            eval_lenient_answers=True,
        )
    (line,) = [message for message in caplog.messages if "without effect" in message]
    assert line.startswith("method='sft': beta, chunk_length, num_chunks, teacher_budget_usd, teacher_model")
    assert "eval" not in line
    assert trainer.args.max_length == 64
    assert trainer.args.learning_rate == 1e-3


def test_what_is_saved(tmp_path, tiny_model_dir):
    """No token, and no copy of the adapter, which the evaluation measures the KL to."""
    peft_config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    changes = {"save_strategy": "steps", "save_steps": 1, "hub_token": "hf_secret"}
    trainer = make("sft", tmp_path, tiny_model_dir, peft_config=peft_config, **changes)
    assert trainer.evaluator.objective.reference.adapter is not None
    trainer.train()
    folder = tmp_path / "out" / "checkpoint-1"
    assert [path.parent for path in folder.rglob("adapter_config.json")] == [folder]
    assert torch.load(folder / "training_args.bin", weights_only=False).hub_token is None
    assert trainer.args.hub_token == "hf_secret"


def test_resume(tmp_path, tiny_model_dir):
    """A run that resumes from its checkpoint ends as one that was not stopped."""
    weights = []
    for name, stopped in (("whole", False), ("stopped", True)):
        changes = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
        make("sft", tmp_path / name, tiny_model_dir, **changes).train()
        if stopped:
            shutil.rmtree(tmp_path / name / "out" / "checkpoint-2")
            for _ in range(2):  # the second time, it has ended
                trainer = make("sft", tmp_path / name, tiny_model_dir, **changes)
                trainer.train(resume_from_checkpoint=True)
                assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry] == [1, 2]
        weights.append(torch.load(tmp_path / name / "out" / "checkpoint-2" / "optimizer.pt"))
    first, second = (weight["state"][0]["exp_avg"] for weight in weights)
    assert torch.equal(first, second)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_two_processes(tmp_path, tiny_model_dir, teacher_dir):
    """Under DDP the evaluation scores each problem once, and the teacher's tokens are those of both processes."""
    rows = questions(16)
    for name, count in (("train", 16), ("test", 3)):
        rows.select(range(count)).to_json(tmp_path / "data" / f"{name}.jsonl")
    options = {
        **COMMON,
        "model_name_or_path": tiny_model_dir,
        "teacher_model_name_or_path": teacher_dir,
        "dataset_name": "data",
        "method": "opd",
        "output_dir": "out",
        "chunk_length": 8,
        "eval_strategy": "steps",
        "eval_on_start": True,
        "per_device_eval_batch_size": 1,
        "log_completions": True,
    }
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", 2]
    command += ["--main_process_port", 0, "-m", "omniopd_trl.train"]
    command += [word for name, value in options.items() for word in (f"--{name}", value)]
    process = succeeded(run_process(*command, cwd=tmp_path))
    assert process.stdout.count("model saved to") == 1
    logs = read_logs(tmp_path / "out")
    assert [entry["step"] for entry in logs] == [0, 1, 1, 1]
    (step,) = [entry for entry in logs if "teacher/prompt_tokens" in entry]
    assert step["teacher/prompt_tokens"] == step["num_tokens"] > 16 * 16
    completions = Dataset.from_parquet(str(tmp_path / "out" / "completions" / "eval_00001.parquet"))
    assert len(completions) == 3
