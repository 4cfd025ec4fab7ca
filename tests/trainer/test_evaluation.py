# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Evaluations and predictions: each counts its own samples, and nothing of another one."""

import asyncio
import math
import re
from functools import partial

import pytest
import torch
from datasets import Dataset
from transformers import (
    AutoModelForSequenceClassification,
    Qwen3Config,
    Qwen3ForSequenceClassification,
    TrainerCallback,
)

from omniopd_trl.errors import ConfigError, DataError
from omniopd_trl.journal.file import journal_path
from omniopd_trl.teachers import ScriptedTeacher
from tests.support.training import make_trainer, questions


def always(score):
    def reward(completions, **kwargs):
        return [score] * len(completions)

    return reward


def by_length(prompts, completions, answer, **kwargs):
    """1 for every sample of a set of five problems, 0 for those of the larger one."""
    return [float(int(a) < 30) for a in answer]


EASY, HARD = questions(5), questions(20).select(range(10, 20))


@pytest.mark.case("R1")
class TestEachCountsItsOwn:
    """Metrics of an evaluation or prediction are those of its samples."""

    def test_evaluate_predict_evaluate(self, tmp_path, tiny_model_dir):
        """A prediction reports its own pass@1, and does not change the next evaluation."""
        trainer = make_trainer(tmp_path, tiny_model_dir, eval_dataset=EASY, eval_reward_funcs=by_length)
        first = trainer.evaluate()
        predicted = trainer.predict(HARD).metrics
        second = trainer.evaluate()
        assert first["eval_pass@1"] == second["eval_pass@1"] == 1.0
        assert predicted["test_pass@1"] == 0.0
        assert predicted["test_completions/mean_length"] > 0
        assert not any(name.startswith("eval_") for name in predicted)

    def test_a_prediction_takes_as_many_samples_as_an_evaluation(self, tmp_path, tiny_model_dir):
        """`num_eval_generations` holds for `predict` too."""
        seen = []

        def reward(answer, **kwargs):
            seen.extend(answer)
            return [1.0] * len(answer)

        trainer = make_trainer(tmp_path, tiny_model_dir, eval_reward_funcs=reward, num_eval_generations=3)
        assert trainer.predict(questions(2)).metrics["test_pass@1"] == 1.0
        assert len(seen) == 6
        trainer.eval_dataset = {"a": questions(2)}  # as do sets that take the place of the constructor's
        trainer.evaluate()
        trainer.evaluate("a")
        assert len(seen) == 18

    def test_options_of_the_loader(self, tmp_path, tiny_model_dir):
        """Persistent workers belong to one set, and no sample is dropped."""
        options = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True, "dataloader_drop_last": True}
        trainer = make_trainer(tmp_path, tiny_model_dir, eval_dataset=EASY, eval_reward_funcs=by_length, **options)
        assert trainer.evaluate()["eval_pass@1"] == 1.0
        assert trainer.evaluate(HARD)["eval_pass@1"] == 0.0
        assert trainer.args.dataloader_drop_last
        assert trainer.args.dataloader_persistent_workers

    @pytest.mark.parametrize(
        ("dataset", "message"),
        [
            ([{"prompt": "Tom has"}], "is a list; it must be a `datasets.Dataset`"),
            (Dataset.from_list([{"question": "Tom has"}]), "has no `prompt` column"),
            (Dataset.from_list([{"prompt": "Tom has", "tools": "[]"}]), "has a column `tools`"),
            (questions(2), "has no column 'hint'"),
        ],
    )
    def test_sets_are_checked(self, tmp_path, tiny_model_dir, dataset, message):
        """Those that are passed to `evaluate` and `predict`, and those that replace the constructor's."""
        train = questions().add_column("hint", ["It is 12."] * 8)
        settings = {"teacher_context_column": "hint", "audit_eval": True}
        trainer = make_trainer(tmp_path, tiny_model_dir, dataset=train, **settings)
        with pytest.raises(DataError, match=f"`test_dataset` {message}"):
            trainer.predict(dataset)
        with pytest.raises(DataError, match=f"`eval_dataset` {message}"):
            trainer.evaluate(dataset)
        trainer.eval_dataset = dataset
        with pytest.raises(DataError, match=f"`eval_dataset` {message}"):
            trainer.evaluate()

    def test_a_prefix_is_used_as_it_is(self, tmp_path, tiny_model_dir):
        """`evaluate(other, metric_key_prefix="test")` and `predict(other, metric_key_prefix="final")`."""
        trainer = make_trainer(tmp_path, tiny_model_dir, eval_dataset=EASY, eval_reward_funcs=by_length)
        metrics = trainer.evaluate(HARD, metric_key_prefix="test")
        assert metrics["test_pass@1"] == 0.0
        assert "test_kl/unaudited" in metrics
        assert not any(name.startswith("eval_") for name in metrics)
        assert trainer.predict(EASY, metric_key_prefix="final").metrics["final_pass@1"] == 1.0
        assert trainer.state.log_history[-1]["test_pass@1"] == 0.0

    @pytest.mark.parametrize("where", ["reward", "audit"])
    def test_an_interrupted_evaluation_leaves_nothing(self, tmp_path, tiny_model_dir, where):
        """The samples before the interruption do not count in the next evaluation, nor do their audits."""
        calls = []

        def reward(answer, **kwargs):
            calls.append(len(answer))
            if where == "reward" and len(calls) == 2:
                raise KeyboardInterrupt
            return [float(len(calls) > 2)] * len(answer)

        trainer = make_trainer(
            tmp_path,
            tiny_model_dir,
            eval_dataset=EASY,
            eval_reward_funcs=reward,
            per_device_eval_batch_size=2,
            audit_eval=True,
        )
        if where == "audit":
            collect, count = trainer.step_audits.collect, []

            def interrupted(*args, **kwargs):
                count.append(1)
                if len(count) == 2:
                    raise KeyboardInterrupt
                return collect(*args, **kwargs)

            trainer.step_audits.collect = interrupted
        with pytest.raises(KeyboardInterrupt):
            trainer.evaluate()
        calls.extend([0] * 3)
        metrics = trainer.evaluate()
        assert metrics["eval_pass@1"] == 1.0
        assert metrics["eval_audit/num_chunks"] > 0

    def test_an_interrupted_training_leaves_nothing(self, tmp_path, tiny_model_dir):
        """Neither in an evaluation nor in the metrics of the next training."""

        class Interrupt(TrainerCallback):
            def on_substep_end(self, args, state, control, **kwargs):
                raise KeyboardInterrupt

        trainer = make_trainer(
            tmp_path,
            tiny_model_dir,
            eval_dataset=EASY,
            eval_reward_funcs=by_length,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            save_audits=False,
        )
        interrupt = Interrupt()
        trainer.add_callback(interrupt)
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
        assert not trainer.is_in_train
        assert trainer.evaluate()["eval_pass@1"] == 1.0
        trainer.remove_callback(interrupt)
        trainer.add_callback(clean := Sums(trainer))
        trainer.train()
        assert clean.at_start == [0, 0]
        logged = next(entry for entry in trainer.state.log_history if "audit/num_chunks" in entry)
        assert logged["completions/mean_length"] == pytest.approx(
            sum(batch["completion_mask"].sum().item() for batch in trainer.batches[-1:]) / 8
        )

    def test_the_best_checkpoint_is_that_of_the_evaluation_set(self, tmp_path, tiny_model_dir):
        """A callback that predicts on another set does not change what `load_best_model_at_end` chooses."""

        def falling(answer, trainer_state, **kwargs):
            # On the evaluation set the score falls with each step; on the other set it rises.
            easy = int(answer[0]) < 30
            return [1.0 - trainer_state.global_step / 10 if easy else trainer_state.global_step / 10] * len(answer)

        class Predict(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                predicted.append(trainer.predict(HARD).metrics["test_pass@1"])

        predicted = []
        trainer = make_trainer(
            tmp_path,
            tiny_model_dir,
            eval_dataset=EASY,
            eval_reward_funcs=falling,
            dataset=questions(16),
            max_steps=2,
            eval_strategy="steps",
            eval_steps=1,
            save_strategy="steps",
            save_steps=1,
            load_best_model_at_end=True,
            metric_for_best_model="eval_pass@1",
            greater_is_better=True,
            learning_rate=1e-3,
        )
        trainer.add_callback(Predict())
        trainer.train()
        assert predicted == pytest.approx([0.1, 0.2])
        assert trainer.state.best_metric == pytest.approx(0.9)
        assert trainer.state.best_model_checkpoint.endswith("checkpoint-1")


class Sums(TrainerCallback):
    """Notes how many metrics of an earlier run there are when training begins."""

    def __init__(self, trainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        metrics = self.trainer.step_metrics
        self.at_start = [len(metrics._sums["train"]), len(metrics._logged["train"])]


def test_the_first_evaluation_is_logged_once(tmp_path, tiny_model_dir):
    """All metrics are in the log and in the result, each once."""
    trainer = make_trainer(tmp_path, tiny_model_dir, eval_dataset=EASY)
    metrics = trainer.evaluate()
    (logged,) = trainer.state.log_history
    assert {k: v for k, v in logged.items() if k not in ("epoch", "step")} == {
        k: v for k, v in metrics.items() if k != "epoch"
    }
    assert math.isfinite(metrics["eval_loss"])


# ---- Reward functions ----


def plain_questions(count: int) -> Dataset:
    return Dataset.from_list([{"prompt": f"{n} + {n} =", "answer": str(2 * n)} for n in range(count)])


class Slow:
    """An asynchronous callable object."""

    async def __call__(self, answer, **kwargs):
        await asyncio.sleep(0)
        return [1.0] * len(answer)


async def also_slow(answer, **kwargs):
    await asyncio.sleep(0)
    return [0.25] * len(answer)


async def with_weight(answer, weight, **kwargs):
    return [weight] * len(answer)


@pytest.mark.case("R14")
class TestRewardFunctions:
    """`eval_reward_funcs` has the signature of TRL's `reward_funcs`, and is checked when the trainer is made."""

    def test_asynchronous_functions(self, tmp_path, tiny_model_dir):
        """Functions, objects and partials, beside a synchronous one, for the student and the teacher."""
        funcs = [always(0.5), Slow(), also_slow, partial(with_weight, weight=0.75)]
        trainer = make_trainer(tmp_path, tiny_model_dir, eval_dataset=EASY, eval_reward_funcs=funcs)
        expected = {"reward": 0.5, "Slow": 1.0, "also_slow": 0.25, "with_weight": 0.75}
        metrics = trainer.evaluate()
        assert {name: metrics[f"eval_pass@1/{name}"] for name in expected} == expected
        assert trainer.evaluate_teacher() == {f"pass@1/{name}": value for name, value in expected.items()}

    def test_a_process_without_a_problem_opens_its_journal(self, tmp_path, tiny_model_dir):
        """All processes open their journals together: with fewer problems than processes, some have none to ask."""
        trainer = make_trainer(tmp_path, tiny_model_dir, eval_dataset=EASY, eval_reward_funcs=also_slow)
        trainer.eval_dataset = trainer.eval_dataset.select([])
        assert trainer.evaluate_teacher() == {}
        assert journal_path(tmp_path, 0).exists()

    def test_an_asynchronous_function_in_a_running_loop(self, tmp_path, tiny_model_dir):
        """As in a notebook, whose cells run in an event loop."""
        trainer = make_trainer(tmp_path, tiny_model_dir, eval_dataset=EASY, eval_reward_funcs=also_slow)

        async def cell():
            return trainer.evaluate()

        assert asyncio.run(cell())["eval_pass@1"] == 0.25

    def test_log_metric_and_log_extra(self, tmp_path, tiny_model_dir):
        """A metric is averaged over all calls; extra columns are in the table of completions."""

        def reward(completions, answer, log_metric, log_extra, trainer_state, **kwargs):
            log_metric("answers/mean", sum(map(int, answer)) / len(answer))
            log_extra("right", answer)
            assert trainer_state.global_step == 0
            return [0.5] * len(answer)

        trainer = make_trainer(
            tmp_path,
            tiny_model_dir,
            eval_dataset=questions(4),
            eval_reward_funcs=reward,
            per_device_eval_batch_size=2,
            log_completions=True,
        )
        metrics = trainer.evaluate()
        assert metrics["eval_answers/mean"] == (0 + 2 + 6 + 12) / 4
        table = Dataset.from_parquet(str(tmp_path / "completions" / "eval_00000.parquet"), cache_dir=str(tmp_path))
        assert set(table.column_names) == {"prompt", "completion", "pass@1", "right"}
        assert sorted(table["right"]) == ["0", "12", "2", "6"]
        assert trainer.evaluate_teacher() == {"pass@1": 0.5, "answers/mean": 5.0}

    def test_functions_of_one_name_are_kept_apart(self, tmp_path, tiny_model_dir):
        """Two lambdas, two closures, or a name that a number would produce again."""
        two = always(0.25)
        two.__name__ = "reward_2"
        funcs = [always(1.0), always(0.0), two, lambda answer, **_: [0.5] * len(answer), lambda **_: [None] * 5]
        trainer = make_trainer(tmp_path, tiny_model_dir, eval_dataset=EASY, eval_reward_funcs=funcs)
        metrics = {k: v for k, v in trainer.evaluate().items() if "pass@1" in k}
        assert metrics == {
            "eval_pass@1/reward": 1.0,
            "eval_pass@1/reward_3": 0.0,
            "eval_pass@1/reward_2": 0.25,
            "eval_pass@1/<lambda>": 0.5,
        }

    @pytest.mark.parametrize("column", ["completions", "prompts", "completion_ids", "trainer_state", "log_metric"])
    def test_a_column_with_the_name_of_an_argument(self, tmp_path, tiny_model_dir, column, caplog):
        """The argument is what TRL promises, and a warning names the column."""
        seen = {}

        def reward(**kwargs):
            seen.update(kwargs)
            return [1.0] * 5

        dataset = EASY.add_column(column, ["mine"] * 5)
        trainer = make_trainer(tmp_path, tiny_model_dir, eval_dataset=dataset, eval_reward_funcs=reward)
        assert f"'{column}'" in caplog.text
        trainer.evaluate()
        assert seen[column] != ["mine"] * 5
        assert seen["completions"][0][0]["role"] == "assistant"

    @pytest.mark.parametrize("prompts", [questions, plain_questions], ids=["conversations", "plain"])
    def test_a_column_named_completion(self, tmp_path, tiny_model_dir, prompts):
        """Whether samples are conversations depends on the prompts alone."""
        kinds = set()

        def reward(completions, completion, **kwargs):
            assert completion == ["7"] * len(completions)
            kinds.update(map(type, completions))
            return [1.0] * len(completions)

        trainer = make_trainer(
            tmp_path,
            tiny_model_dir,
            dataset=prompts(8),
            eval_dataset=prompts(3).add_column("completion", ["7"] * 3),
            eval_reward_funcs=reward,
            teacher=ScriptedTeacher(lambda prefix, index: "7"),
        )
        trainer.evaluate()
        assert kinds == {list if prompts is questions else str}

    @pytest.mark.parametrize(
        ("func", "words"),
        [
            (lambda completions, answer: [], "cannot be called: got an unexpected keyword argument"),
            (lambda completions, right, **kwargs: [], "missing a required argument: 'right'"),
            (lambda self, completions, **kwargs: [], "missing a required argument: 'self'"),
            (7, "holds 7, which is neither a function nor a reward model"),
            ("no/such-model", "The reward model 'no/such-model' of `eval_reward_funcs` cannot be loaded"),
        ],
    )
    def test_what_cannot_be_called_is_refused_before_training(self, tmp_path, tiny_model_dir, func, words):
        """In one line, when the trainer is made."""
        with pytest.raises(ConfigError, match=re.escape(words)) as caught:
            make_trainer(tmp_path, tiny_model_dir, eval_dataset=EASY, eval_reward_funcs=func)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("returned", [None, 1.0, ["right"] * 5, [[1.0]] * 5])
    def test_what_holds_no_numbers_is_refused(self, tmp_path, tiny_model_dir, returned):
        """With the name of the function."""
        trainer = make_trainer(
            tmp_path, tiny_model_dir, eval_dataset=EASY, eval_reward_funcs=lambda **kwargs: returned
        )
        with pytest.raises(ConfigError, match=r"<lambda> returned .* does not hold numbers"):
            trainer.evaluate()

    @pytest.mark.parametrize("as_instance", [False, True], ids=["path", "instance"])
    def test_a_reward_model(self, tmp_path, tiny_model_dir, reward_model_dir, tiny_teacher_tokenizer, as_instance):
        """Its score of the rendered conversation, for every sample, whatever the padding."""
        model = AutoModelForSequenceClassification.from_pretrained(reward_model_dir)
        trainer = make_trainer(
            tmp_path,
            tiny_model_dir,
            eval_dataset=EASY,
            eval_reward_funcs=[model if as_instance else str(reward_model_dir), always(0.5)],
        )
        metrics = trainer.evaluate()
        (batch,) = trainer.batches
        scores = []
        for prompt, ids, mask in zip(batch["prompts"], batch["completion_ids"], batch["completion_mask"], strict=True):
            text = trainer.processing_class.decode(ids[mask.bool()], skip_special_tokens=True)
            rendered = tiny_teacher_tokenizer.apply_chat_template(
                [*prompt, {"role": "assistant", "content": text}], tokenize=False
            )
            ids = tiny_teacher_tokenizer(rendered, return_tensors="pt", add_special_tokens=False).input_ids
            scores.append(model.eval()(ids).logits.item())
        assert metrics[f"eval_pass@1/{reward_model_dir.name}"] == pytest.approx(sum(scores) / 5, rel=1e-4)

    def test_a_model_that_was_never_trained_to_score_is_refused(self, tmp_path, tiny_model_dir, tiny_teacher_dir):
        """Its head would be random."""
        with pytest.raises(ConfigError, match=r"has no trained score\.weight, but it must be a"):
            make_trainer(tmp_path, tiny_model_dir, eval_dataset=EASY, eval_reward_funcs=str(tiny_teacher_dir))


@pytest.fixture(scope="module")
def reward_model_dir(tmp_path_factory, tiny_teacher_tokenizer):
    """A tiny sequence classification model with another tokenizer than the student's."""
    folder = tmp_path_factory.mktemp("reward")
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = Qwen3ForSequenceClassification(
            Qwen3Config(
                vocab_size=len(tiny_teacher_tokenizer),
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=1,
                num_attention_heads=4,
                num_key_value_heads=2,
                head_dim=8,
                num_labels=1,
                initializer_range=0.3,
                pad_token_id=tiny_teacher_tokenizer.pad_token_id,
            )
        )
    model.save_pretrained(folder)
    tiny_teacher_tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.case("R21")
def test_the_lenient_reading_is_an_option_of_the_evaluation(tmp_path, tiny_model_dir, caplog):
    """For the student and the teacher; the log says which reading counts."""
    repeats = ScriptedTeacher(lambda prefix, index: f"Answer: {prefix.prompt.removesuffix('=')}")
    for lenient in (False, True):
        trainer = make_trainer(
            tmp_path,
            tiny_model_dir,
            dataset=plain_questions(8),
            eval_dataset=plain_questions(3),
            eval_lenient_answers=lenient,
            teacher=repeats,
        )
        assert trainer.evaluate_teacher() == {"pass@1": float(lenient)}
        assert ("lenient" in caplog.text) == lenient


def test_an_evaluation_has_its_own_seed(tmp_path, tiny_model_dir):
    """Runs with other seeds evaluate equal weights on equal samples, in every evaluation; batches differ."""
    texts = []

    def reward(completions, **kwargs):
        texts.extend(completion[0]["content"] for completion in completions)
        return [1.0] * len(completions)

    for seed in (1, 2):
        trainer = make_trainer(
            tmp_path / str(seed),
            tiny_model_dir,
            eval_dataset=questions(2),
            eval_reward_funcs=reward,
            num_eval_generations=2,
            per_device_eval_batch_size=1,
            seed=seed,
        )
        trainer.evaluate()
    trainer.evaluate()
    assert texts[:4] == texts[4:8] == texts[8:]
    assert len(set(texts)) == 4  # the samples of a problem are in batches of their own
