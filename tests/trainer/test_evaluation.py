# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Evaluations and predictions: each counts its own samples, and nothing of another one."""

import math

import pytest
from transformers import TrainerCallback

from tests.support.training import make_trainer, questions


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
