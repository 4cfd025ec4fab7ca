# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""What a user of the trainer meets: evaluation, refusals of bad input, odd batches, the model card."""

import json
import math

import pytest
import torch
from datasets import Dataset, IterableDataset
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from omniopd_trl import OmniOPDConfig, OmniOPDTrainer
from omniopd_trl.errors import ConfigError, DataError, NonFiniteError, OmniOPDError
from omniopd_trl.teachers import LocalTeacher, ScriptedTeacher, Teacher, TeacherReply
from tests.support.teachers import Remote
from tests.support.training import FOUR_MICRO_BATCHES, make_trainer, perturb, questions, script, trainable


class Refusing(Teacher):
    """Must not be asked."""

    name = "refusing"

    async def sample(self, prefixes, request):
        raise AssertionError("the teacher was asked")


def config(tmp_path, **overrides) -> OmniOPDConfig:
    """The least that a configuration needs on a CPU."""
    settings = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False, "report_to": "none"}
    return OmniOPDConfig(**{**settings, "max_completion_length": 64, **overrides})


def refuse(tmp_path, tiny_model_dir, match: str, error: type[OmniOPDError] = DataError, **overrides) -> None:
    """Construction fails with this message, and the teacher has not been asked for anything."""
    with pytest.raises(error, match=match):
        make_trainer(tmp_path, tiny_model_dir, **{"teacher": Refusing(), **overrides})


# ---- Training ----


def test_local_teacher_of_another_tokenizer(tmp_path, tiny_model_dir, tiny_teacher_dir):
    """A whole run with a teacher given as a path: weights move, metrics are there, usage adds up."""
    trainer = make_trainer(
        tmp_path, tiny_model_dir, teacher=str(tiny_teacher_dir), max_steps=2, dataset=questions(16), learning_rate=0.1
    )
    before = trainable(trainer.model)
    trainer.train()
    assert isinstance(trainer.teacher, LocalTeacher)
    assert any((before[name] != value).any() for name, value in trainable(trainer.model).items())
    steps = trainer.state.log_history[:2]
    for log in steps:
        for name in ("chunk_loss", "kl/unaudited", "kl/audited", "entropy", "teacher/wait_seconds"):
            assert 0 <= log[name] < math.inf, name
        assert 0 < log["audit/posterior"] < 1
        assert 0 < log["audit/similarity"] < 1
        assert 0 < log["audit/prior"] < 1
        assert log["audit/anchor_entropy"] > log["entropy"]
        assert 0 < log["audit/audited_fraction"] < 1
        assert log["audit/dropped_chunks"] == 0
    assert trainer.teacher_usage.completion_tokens == sum(log["teacher/completion_tokens"] for log in steps)
    assert trainer.teacher_usage.prompt_tokens == sum(log["teacher/prompt_tokens"] for log in steps)


def test_a_custom_similarity(tmp_path, tiny_model_dir):
    """A function passed to the trainer decides the posteriors."""
    trainer = make_trainer(tmp_path, tiny_model_dir, similarity=lambda chunk, rollout: 1.0, prior_strength=0.0)
    trainer.train()
    weights, audited = trainer.batches[0]["weights"], trainer.batches[0]["audited_mask"]
    assert audited.any()
    assert (weights[audited] == 1).all()
    assert (weights[~audited] == 0).all()


def test_prior_of_the_reference(tmp_path, tiny_model_dir):
    """`prior="reference"` takes the chunk's probability under the initial student, not the current one."""
    logs = []
    for name in ("policy", "reference"):
        trainer = make_trainer(tmp_path / name, tiny_model_dir, prior=name)
        perturb(trainer.model, 0.1)
        trainer.train()
        logs.append((trainer.state.log_history[0]["audit/prior"], trainer.batches[0]))
    assert logs[0][0] != pytest.approx(logs[1][0], rel=1e-3)
    batch = logs[1][1]
    torch.testing.assert_close(batch["completion_ids"], logs[0][1]["completion_ids"], rtol=0, atol=0)
    reference = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float64)
    priors = []
    for b in range(len(batch["prompt_ids"])):
        prompt = batch["prompt_ids"][b][batch["prompt_mask"][b].bool()]
        completion = batch["completion_ids"][b][batch["completion_mask"][b].bool()]
        with torch.no_grad():
            logits = reference(torch.cat([prompt, completion])[None]).logits[0, len(prompt) - 1 : -1]
        logprobs = logits.log_softmax(-1).gather(1, completion[:, None])[:, 0]
        audited = batch["audited_mask"][b][: len(completion)]
        starts = [
            t
            for t in range(len(completion))
            if audited[t] and (t == 0 or batch["weights"][b][t] != batch["weights"][b][t - 1])
        ]
        length = min(trainer.args.chunk_length, len(completion))
        priors += [logprobs[t : t + length].mean().exp().item() for t in starts]
    assert logs[1][0] == pytest.approx(sum(priors) / len(priors), rel=1e-4)


def test_a_batch_where_no_chunk_can_be_formed(tmp_path, tiny_model_dir, caplog):
    """Completions shorter than the shortest chunk: the anchor alone is trained, nothing is asked, and it is said."""
    trainer = make_trainer(
        tmp_path, tiny_model_dir, teacher=Refusing(), max_completion_length=12, chunk_length=12, min_chunk_length=12
    )
    trainer._generate_single_turn = lambda prompt_ids, *a, **k: [
        [5, 6, trainer._tokenizer.eos_token_id] for _ in prompt_ids
    ]
    logging.enable_propagation()
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["loss"] == pytest.approx(0.0, abs=1e-9)  # student and reference are equal
    assert log["audit/num_chunks"] == 0
    assert log["audit/audited_fraction"] == 0
    assert "audit/posterior" not in log
    assert "No chunk of a batch could be audited at step 0" in caplog.text


def test_a_micro_batch_where_no_chunk_can_be_formed(tmp_path, tiny_model_dir, caplog):
    """Other micro-batches of the step have chunks: nothing is said. Each is counted when its own audits are there."""
    logging.enable_propagation()
    trainer = make_trainer(tmp_path, tiny_model_dir, teacher=Remote(), **FOUR_MICRO_BATCHES)
    trainer.train()
    assert trainer.state.log_history[0]["audit/num_chunks"] > 0
    assert "No chunk of a batch" not in caplog.text


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_a_teacher_that_refuses_everything(tmp_path, tiny_model_dir, beta, caplog):
    """Every chunk is dropped, its tokens count as un-audited, and the reason is logged."""
    logging.enable_propagation()
    teacher = ScriptedTeacher(lambda prefix, index: None)
    trainer = make_trainer(tmp_path, tiny_model_dir, teacher=teacher, beta=beta, max_failed_chunks=1.0)
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["audit/dropped_chunks"] == 1.0
    assert log["audit/audited_fraction"] == 0
    assert log["loss"] == pytest.approx(0.0, abs=1e-9)
    assert "the script refused 3 of 3" in caplog.text


def test_an_empty_completion_is_trained_on_without_harm(tmp_path, tiny_model_dir):
    """An engine that returns no token at all: no crash, no NaN, the other rows are audited."""
    from trl import DistillationTrainer

    trainer = make_trainer(tmp_path, tiny_model_dir)
    generate = DistillationTrainer._generate_single_turn

    def with_empty(self, *args, **kwargs):
        completion_ids = generate(self, *args, **kwargs)
        return [[], *completion_ids[1:-1], []]

    DistillationTrainer._generate_single_turn = with_empty
    try:
        trainer.train()
    finally:
        DistillationTrainer._generate_single_turn = generate
    assert math.isfinite(trainer.state.log_history[0]["loss"])
    assert trainer.batches[0]["completion_mask"].sum(1).tolist()[0] == 1
    assert trainer.batches[0]["audited_mask"].any()


@pytest.mark.parametrize("where", ["generation", "scoring", "loss"])
def test_nan_stops_and_names_the_step(tmp_path, tiny_model_dir, where):
    """NaN logits, on any process, end the run with the step in the message."""
    trainer = make_trainer(tmp_path, tiny_model_dir, max_steps=3, dataset=questions(24), learning_rate=0.01)
    poisoned = trainer.model.get_output_embeddings().weight

    def poison() -> None:
        with torch.no_grad():
            poisoned.fill_(float("nan"))

    if where == "generation":
        poison()
        step = 0
    elif where == "scoring":
        generate = trainer._generate_single_turn

        def then_poison(*args, **kwargs):
            ids = generate(*args, **kwargs)
            if trainer.state.global_step == 1:
                poison()
            return ids

        trainer._generate_single_turn = then_poison
        step = 1
    else:
        score = trainer._generate_and_score_completions

        def then_poison(inputs):
            batch = score(inputs)
            if trainer.state.global_step == 1:
                poison()
            return batch

        trainer._generate_and_score_completions = then_poison
        step = 1
    with pytest.raises(NonFiniteError, match=rf"at step {step} .*NaN.*learning_rate"):
        trainer.train()


@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
def test_a_gradient_that_is_not_finite_is_not_applied(tmp_path, tiny_model_dir, max_grad_norm):
    """The loss is finite, the gradient is not: the weights stay, and so does the last good checkpoint."""
    trainer = make_trainer(
        tmp_path,
        tiny_model_dir,
        max_steps=3,
        dataset=questions(24),
        max_grad_norm=max_grad_norm,
        save_strategy="steps",
        save_steps=1,
        save_total_limit=1,
    )
    weight = dict(trainer.model.named_parameters())["model.layers.0.mlp.up_proj.weight"]
    weight.register_hook(lambda grad: grad * float("nan") if trainer.state.global_step == 1 else grad)
    with pytest.raises(NonFiniteError, match="gradients at step 1 hold NaN"):
        trainer.train()
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]


def test_a_stream_is_resumed_in_a_later_pass(tmp_path, tiny_model_dir):
    """Twelve rows, eight a step: the run goes through them more than twice, and resumes where it was."""
    settings = {"max_steps": 5, "save_strategy": "steps", "save_steps": 1, "learning_rate": 0.01, "save_audits": False}

    def trainer(path):
        stream = IterableDataset.from_generator(lambda: iter(questions(12).to_list()))
        return make_trainer(path, tiny_model_dir, dataset=stream, **settings)

    whole = trainer(tmp_path / "whole")
    whole.train()
    again = trainer(tmp_path / "again")
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    for there, here in zip(whole.batches[3:], again.batches, strict=True):
        assert here["prompts"] == there["prompts"]
        assert torch.equal(here["completion_ids"], there["completion_ids"])
    assert whole.batches[0]["prompts"] != whole.batches[3]["prompts"]


FILTERS = {
    "min_p": {"min_p": 0.9},
    "typical_p": {"typical_p": 0.05},
    "suppress_tokens": {"suppress_tokens": list(range(3, 290))},
    "min_new_tokens": {"min_new_tokens": 30},
}


@pytest.mark.parametrize("name", FILTERS)
def test_sampling_takes_nothing_from_the_models_folder(tmp_path, tiny_model_dir, name):
    """What a folder's `generation_config.json` adds is no part of the policy, and is kept for those who use it."""
    plain = make_trainer(tmp_path, tiny_model_dir)
    trainer = make_trainer(tmp_path, tiny_model_dir)
    trainer.model.generation_config.update(**FILTERS[name])
    ids = plain._tokenizer("Tom has")["input_ids"]

    def samples(trainer):
        trainer.model.train()
        # Not the recording trainer's, which cuts completions.
        return OmniOPDTrainer._generate_single_turn(trainer, [ids] * 16, None, {})

    assert samples(trainer) == samples(plain)
    assert getattr(trainer.model.generation_config, name) == FILTERS[name][name]


def test_streaming_dataset(tmp_path, tiny_model_dir):
    """Iterable datasets train, and evaluate on repeated samples."""
    stream = IterableDataset.from_generator(lambda: iter(questions(16).to_list()))
    trainer = make_trainer(
        tmp_path, tiny_model_dir, dataset=stream, max_steps=2, eval_dataset=stream.take(3), num_eval_generations=2
    )
    trainer.train()
    metrics = trainer.evaluate()
    assert trainer.state.global_step == 2
    assert metrics["eval_pass@1"] in {n / 6 for n in range(7)}


def test_plain_text_prompts(tmp_path, tiny_model_dir):
    """A prompt that is a string reaches the teacher as that string."""
    asked = []

    def listen(prefix, index):
        asked.append(prefix.prompt)
        return "Tom has 7 apples."

    rows = Dataset.from_list([{"prompt": f"Tom has {n} apples and"} for n in range(8)])
    make_trainer(tmp_path, tiny_model_dir, teacher=ScriptedTeacher(listen), dataset=rows).train()
    assert set(asked) <= set(rows["prompt"])
    assert len(set(asked)) > 3


# ---- Evaluation ----


def always(value):
    """A reward function in TRL's signature."""

    def reward(prompts, completions, completion_ids, answer, **kwargs):
        assert len(prompts) == len(completions) == len(completion_ids) == len(answer)
        assert completions[0][0]["role"] == "assistant"
        return [value] * len(completions)

    return reward


def test_evaluation_does_not_ask_the_teacher(tmp_path, tiny_model_dir):
    """KL, entropy and pass@1, but no audit."""
    trainer = make_trainer(tmp_path, tiny_model_dir, teacher=Refusing(), eval_dataset=questions(5))
    metrics = trainer.evaluate()
    assert metrics["eval_kl/unaudited"] == pytest.approx(0.0, abs=1e-9)
    assert 3 < metrics["eval_entropy"] < math.log(300)
    assert metrics["eval_pass@1"] == 0.0
    assert not any("audit/" in name or "teacher" in name or "chunk" in name for name in metrics)


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_evaluation_entropy_is_exact(tmp_path, tiny_model_dir, beta):
    """The mean over all completion tokens, over batches of unequal size, with and without a reference."""
    trainer = make_trainer(
        tmp_path, tiny_model_dir, beta=beta, eval_dataset=questions(5), per_device_eval_batch_size=3
    )
    metrics = trainer.evaluate()
    entropies = []
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float64)
    for batch in trainer.batches:
        for b in range(len(batch["prompt_ids"])):
            prompt = batch["prompt_ids"][b][batch["prompt_mask"][b].bool()]
            completion = batch["completion_ids"][b][batch["completion_mask"][b].bool()]
            with torch.no_grad():
                logits = model(torch.cat([prompt, completion])[None]).logits[0, len(prompt) - 1 : -1]
            entropies += torch.distributions.Categorical(logits=logits).entropy().tolist()
    assert len(trainer.batches) == 2
    assert metrics["eval_entropy"] == pytest.approx(sum(entropies) / len(entropies), rel=1e-5)
    assert ("eval_kl/unaudited" in metrics) == (beta > 0)


def test_evaluation_with_audits(tmp_path, tiny_model_dir):
    """`audit_eval` reports what training reports."""
    trainer = make_trainer(tmp_path, tiny_model_dir, audit_eval=True, eval_dataset=questions(5))
    metrics = trainer.evaluate()
    assert 0 < metrics["eval_audit/posterior"] < 1
    assert metrics["eval_chunk_loss"] > 0
    assert metrics["eval_loss"] > 0


def test_pass_at_1_is_the_mean_over_samples(tmp_path, tiny_model_dir):
    """Over all samples of all problems, not over batches of unequal size; declined samples do not count."""
    seen = []

    def reward(prompts, completions, answer, **kwargs):
        scores = [None if a == "0" else float(a == "2") for a in answer]
        seen.extend(answer)
        return scores

    trainer = make_trainer(
        tmp_path,
        tiny_model_dir,
        eval_dataset=questions(5),
        num_eval_generations=3,
        per_device_eval_batch_size=4,
        eval_reward_funcs=reward,
    )
    metrics = trainer.evaluate()
    assert sorted(seen) == sorted([str(n + n * n) for n in range(5)] * 3)
    assert metrics["eval_pass@1"] == pytest.approx(3 / 12)


def test_several_evaluation_sets_and_functions(tmp_path, tiny_model_dir):
    """Metrics carry the name of their set, and of the function where there are several."""
    right, wrong = always(1.0), always(0.0)
    wrong.__name__ = "wrong"
    trainer = make_trainer(
        tmp_path,
        tiny_model_dir,
        eval_dataset={"easy": questions(2), "hard": questions(3)},
        eval_reward_funcs=[right, wrong],
    )
    metrics = trainer.evaluate()
    for name in ("easy", "hard"):
        assert metrics[f"eval_{name}_pass@1/reward"] == 1.0
        assert metrics[f"eval_{name}_pass@1/wrong"] == 0.0
        assert f"eval_{name}_entropy" in metrics


def test_sets_that_are_handed_over_are_sampled_as_often_as_others(tmp_path, tiny_model_dir):
    """`evaluate(dict)` comes back once for each set: samples are counted once, not squared."""
    seen = []

    def reward(prompts, answer, **kwargs):
        seen.extend(answer)
        return [1.0] * len(prompts)

    trainer = make_trainer(tmp_path, tiny_model_dir, num_eval_generations=3, eval_reward_funcs=reward)
    metrics = trainer.evaluate({"a": questions(2), "b": questions(3)})
    assert len(seen) == 3 * 5
    assert metrics["eval_a_pass@1"] == metrics["eval_b_pass@1"] == 1.0


def test_teacher_is_evaluated_like_the_student(tmp_path, tiny_model_dir, caplog):
    """pass@1 of a teacher that is right on its first sample of two. A sample that it refuses is wrong, and a problem
    whose requests failed is left out with a warning."""
    answers = {row["prompt"][-1]["content"]: row["answer"] for row in questions()}
    others = ["Answer: unknown"]

    def solve(prefix, index):
        assert prefix.completion == ""
        return f"Answer: {answers[prefix.prompt[-1]['content']]}" if index == 0 else others[0]

    trainer = make_trainer(
        tmp_path,
        tiny_model_dir,
        teacher=ScriptedTeacher(solve),
        eval_dataset=questions(5),
        num_eval_generations=2,
    )
    assert trainer.evaluate_teacher() == {"pass@1": 0.5}
    assert trainer.teacher_usage.completion_tokens == 2 * 2 * 5
    others[0] = None
    assert trainer.evaluate_teacher() == {"pass@1": 0.5}
    sample = trainer.teacher.sample

    async def failing(prefixes, request):
        replies = await sample(prefixes, request)
        return [TeacherReply(failure="HTTP 500", outcomes={"failed_requests": 2}), *replies[1:]]

    trainer.teacher.sample = failing
    assert "did not answer" not in caplog.text
    assert trainer.evaluate_teacher() == {"pass@1": 0.5}
    assert "did not answer 1 of 5 problems, which are not in its scores. The first: HTTP 500." in caplog.text
    with pytest.raises(DataError, match="evaluated on one map-style dataset"):
        make_trainer(tmp_path, tiny_model_dir).evaluate_teacher()


def test_a_reward_function_of_the_wrong_length_is_refused(tmp_path, tiny_model_dir):
    """It would be averaged into a wrong pass@1."""
    trainer = make_trainer(
        tmp_path, tiny_model_dir, eval_dataset=questions(5), eval_reward_funcs=lambda completions, **kwargs: [1.0]
    )
    with pytest.raises(ConfigError, match="returned 1 scores for 5 samples"):
        trainer.evaluate()


# ---- Bad input ----


def test_no_prompt_column(tmp_path, tiny_model_dir):
    refuse(tmp_path, tiny_model_dir, "prompt", dataset=Dataset.from_list([{"text": "x"}]))


def test_empty_dataset(tmp_path, tiny_model_dir):
    refuse(tmp_path, tiny_model_dir, "empty", dataset=Dataset.from_dict({"prompt": []}))


def test_fewer_rows_than_one_step_takes(tmp_path, tiny_model_dir):
    """They would be left out, and the run would end well without a step."""
    refuse(
        tmp_path,
        tiny_model_dir,
        r"7 rows, and a step takes 8 .*=4 x .*=2 x 1 processes",
        dataset=questions(7),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
    )
    make_trainer(tmp_path, tiny_model_dir, dataset=questions(8)).train()


def test_prompt_longer_than_the_context(tmp_path, tiny_model_dir):
    rows = [{"prompt": "short"}, {"prompt": "Tom has many apples. " * 200}]
    refuse(tmp_path, tiny_model_dir, "256", dataset=Dataset.from_list(rows))


def test_conversation_without_a_chat_template(tmp_path, tiny_model_dir, tiny_tokenizer):
    import copy

    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = None
    refuse(tmp_path, tiny_model_dir, "chat template", processing_class=tokenizer)


def test_images_are_refused(tmp_path, tiny_model_dir):
    rows = [{"prompt": "x", "image": "y.png"}]
    refuse(tmp_path, tiny_model_dir, "image", dataset=Dataset.from_list(rows))


def test_tools_are_refused(tmp_path, tiny_model_dir):
    refuse(tmp_path, tiny_model_dir, "not supported yet", ConfigError, tools=[print])


def test_unknown_student(tmp_path):
    refuse(tmp_path, tmp_path / "nowhere", r"student .*nowhere.*Check the path")


def test_unknown_teacher(tmp_path, tiny_model_dir):
    refuse(tmp_path, tiny_model_dir, r"teacher .*nowhere.*Check the path", teacher=str(tmp_path / "nowhere"))


def test_no_teacher(tmp_path, tiny_model_dir):
    with pytest.raises(ConfigError, match="There is no teacher"):
        OmniOPDTrainer(model=str(tiny_model_dir), args=config(tmp_path), train_dataset=questions())


def test_unscorable_evaluation_is_refused_before_training(tmp_path, tiny_model_dir, monkeypatch):
    """An evaluation set with answers needs math-verify, and the message holds the pip command."""
    import sys

    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(ImportError, match=r"pip install -e '\.\[eval\]'"):
        make_trainer(tmp_path, tiny_model_dir, eval_dataset=questions())


# ---- What is saved ----


def test_model_card_and_tags(tmp_path, tiny_model_dir):
    """The card cites the paper."""
    trainer = make_trainer(tmp_path, tiny_model_dir)
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert "OmniOPD: Logit-Free On-Policy Distillation via Speculative Verification" in card
    assert "2606.01476" in card
    assert "- omniopd" in card
    assert "- trl" in card


def test_save_and_resume_take_the_same_steps(tmp_path, tiny_model_dir):
    """A checkpoint is a whole state: the resumed run ends with the weights of the uninterrupted one."""
    settings = {
        "max_steps": 4,
        "save_steps": 2,
        "learning_rate": 0.05,
        "optim": "adamw_torch",
        "dataset": questions(32),
    }
    whole = make_trainer(tmp_path / "whole", tiny_model_dir, save_strategy="steps", **settings)
    whole.train()
    resumed = make_trainer(tmp_path / "resumed", tiny_model_dir, save_strategy="steps", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    torch.testing.assert_close(trainable(resumed.model), trainable(whole.model), rtol=0, atol=1e-6)
    state = json.loads((tmp_path / "resumed" / "checkpoint-4" / "trainer_state.json").read_text())
    assert state["log_history"][-1]["loss"] == pytest.approx(whole.state.log_history[3]["loss"], abs=1e-6)


def test_two_runs_with_one_seed_are_equal(tmp_path, tiny_model_dir):
    """Everything that is random hangs on the seed."""
    runs = []
    for n in range(2):
        runs.append(make_trainer(tmp_path / str(n), tiny_model_dir, chunk_selection="uniform"))
        runs[n].train()
    torch.testing.assert_close(runs[0].batches[0]["weights"], runs[1].batches[0]["weights"], rtol=0, atol=0)
    other = make_trainer(tmp_path / "other", tiny_model_dir, chunk_selection="uniform", seed=43)
    other.train()
    assert not torch.equal(runs[0].batches[0]["completion_ids"], other.batches[0]["completion_ids"])


def test_script_is_what_the_dense_reference_assumes():
    """The rollouts of the tests' script differ between samples, prefixes and questions."""
    from omniopd_trl.teachers import Prefix

    prompt = questions()[1]["prompt"]
    texts = {script(Prefix(prompt, "x" * n), i) for n in range(3) for i in range(3)}
    assert len(texts) >= 4
