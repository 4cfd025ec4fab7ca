# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Generation by vLLM as far as it goes without one; `tests/real_servers/test_student_generation.py` has a real one."""

import copy
import importlib.util
import json
import shutil

import pytest
import torch
from transformers import BitsAndBytesConfig
from transformers.utils import logging
from trl.generation.vllm_generation import VLLMGeneration

from omniopd_trl.errors import ConfigError, DataError, MissingExtraError
from omniopd_trl.models.vllm_logprobs import SamplingLogprobs, padded_logprobs, sampling_difference
from omniopd_trl.teachers import ScriptedTeacher, Usage
from omniopd_trl.trainer.fingerprint import replay_key
from tests.support.training import make_trainer


class Engine(VLLMGeneration):
    """Returns what TRL's engine would: two completions, the second of which ended before its first token."""

    def __init__(self, logprobs, token_ids, generation_kwargs=None):
        self.logprobs = None
        self.generation_kwargs = generation_kwargs or {}
        self._output = ([[1], [2]], [[7, 8], []], logprobs, token_ids)

    def generate(self, *args, **kwargs):
        return self._output


def test_the_sampled_tokens_own_logprob_is_kept():
    """Not that of the likeliest candidate; what is no number is None; each generation is handed out once."""
    engine = Engine([[[-0.5, -2.0], [-1.0, None]], []], [[[3, 7], [3, 8]], []])
    kept = SamplingLogprobs(engine, [2])
    assert kept.take() is None
    assert engine.generate(prompts=[[1], [2]]) == engine._output
    (first, second), empty = kept.take()
    assert first == -2.0
    assert second is None
    assert empty == []
    assert kept.take() is None


def test_an_engine_without_logprobs_keeps_none():
    """`generation_kwargs={"logprobs": None}` switches them off."""
    engine = Engine(None, None)
    kept = SamplingLogprobs(engine, [2])
    engine.generate()
    assert kept.take() is None


def test_the_engine_is_told_what_to_return_and_where_to_stop():
    """The sampled token's log-probability, and the trainer's ends, unless the configuration has its own."""
    settings = {"frequency_penalty": 0.5}
    engine = Engine(None, None, settings)
    SamplingLogprobs(engine, [2, 5])
    assert engine.logprobs == 0
    assert engine.generation_kwargs == {"stop_token_ids": [2, 5], "frequency_penalty": 0.5}
    assert settings == {"frequency_penalty": 0.5}
    engine = Engine(None, None, {"stop_token_ids": [9]})
    SamplingLogprobs(engine, [2, 5])
    assert engine.generation_kwargs == {"stop_token_ids": [9]}


def test_differences_are_absolute_and_of_every_sampled_token():
    """By hand; the end that an empty completion was given was not sampled, and what is left out is not scored."""
    logprobs = padded_logprobs([torch.tensor([-1.0, -2.5]), torch.tensor([-9.0]), torch.tensor([])], [2, 1, 0])
    sampled = padded_logprobs([[-1.25, -2.0], [], [-3.0]], [2, 1, 0])
    assert sampling_difference(sampled, logprobs).tolist() == [0.25, 0.5]


@pytest.mark.parametrize(("settings", "is_logged"), [({}, True), ({"top_p": 0.9}, False)])
def test_the_metric_and_its_warning(tmp_path, tiny_model_dir, caplog, settings, is_logged):
    """Mean and largest difference, and one warning; nothing where a filter makes the two incomparable."""
    logging.enable_propagation()
    trainer = make_trainer(tmp_path, tiny_model_dir, **settings)
    engine = Engine([[[-1.0], [-1.0]], []], [[[7], [8]], []])
    sampling = SamplingLogprobs(engine, [2])
    for _ in range(2):
        engine.generate()
        logprobs = padded_logprobs([torch.tensor([-1.0, -1.5]), torch.tensor([-3.0])], [2, 1])
        trainer.step_metrics.add_sampling("train", padded_logprobs(sampling.take(), [2, 1]), logprobs)
    metrics = {name: values for name, values in trainer._metrics["train"].items() if "sampling" in name}
    name = "sampling/sampling_logp_difference"
    assert metrics == ({f"{name}/mean": [0.25, 0.25], f"{name}/max": [0.5, 0.5]} if is_logged else {})
    assert caplog.text.count("by 0.25 nats per token on average") == (1 if is_logged else 0)


def test_replayed_steps_are_compared_with_nothing(tmp_path, tiny_model_dir):
    """What an evaluation sampled before them is not theirs, and is forgotten."""
    make_trainer(tmp_path, tiny_model_dir).train()
    trainer = make_trainer(tmp_path, tiny_model_dir)
    engine = Engine([[[-1.0], [-1.0]], []], [[[7], [8]], []])
    trainer.sampling_logprobs = SamplingLogprobs(engine, [2])
    engine.generate()
    trainer.train(resume_from_checkpoint=True)
    assert trainer.teacher_usage == Usage(), "the step was not replayed"
    assert not [name for log in trainer.state.log_history for name in log if "sampling" in name]
    assert trainer.sampling_logprobs.take() is None


@pytest.mark.parametrize("given", ["with the trainer", "with the model"])
def test_a_quantized_student_is_refused(tmp_path, tiny_model_dir, given):
    """Merged into four bits, what it learns would be lost on the way to vLLM, and its reference would move."""
    model, settings = tiny_model_dir, {}
    if given == "with the trainer":
        settings["quantization_config"] = BitsAndBytesConfig(load_in_4bit=True)
    else:
        model = tmp_path / "quantized"
        shutil.copytree(tiny_model_dir, model)
        config = json.loads((model / "config.json").read_text())
        config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
        (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="use_vllm=True with a quantized student"):
        make_trainer(tmp_path / "run", model, use_vllm=True, **settings)


def test_what_was_paid_for_stays_valid_with_another_engine(tmp_path, tiny_model_dir):
    """A run that ran out of memory continues with vLLM elsewhere, asleep, or not at all; not with other settings."""
    trainer = make_trainer(tmp_path, tiny_model_dir)

    def of(**changes):
        args = copy.copy(trainer.args)
        for name, value in changes.items():
            setattr(args, name, value)
        similarity = trainer.auditor.similarity
        return replay_key(args, trainer.train_dataset, trainer.model, trainer.teacher, similarity)

    changes = {
        "use_vllm": True,
        "vllm_mode": "server",
        "vllm_server_base_url": "http://127.0.0.1:1",
        "vllm_enable_sleep_mode": True,
        "vllm_gpu_memory_utilization": 0.2,
        "vllm_max_model_length": 512,
        "vllm_tensor_parallel_size": 2,
    }
    assert of(**changes) == of()
    assert of(temperature=0.9) != of()
    assert of(vllm_structured_outputs_regex="a*") != of()


def test_prompts_must_fit_the_engine(tmp_path, tiny_model_dir):
    """A colocated engine may be made for less than the student's context; a server has a limit of its own."""
    with pytest.raises(DataError, match="17"):
        make_trainer(tmp_path, tiny_model_dir, use_vllm=True, vllm_max_model_length=17)


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
def test_a_missing_vllm_is_noticed_before_anything_starts(tmp_path, tiny_model_dir):
    """The message holds the pip command, and the teacher has not been asked."""

    class Refusing(ScriptedTeacher):
        def probe(self, prompt):
            raise AssertionError("the teacher was asked")

    with pytest.raises(MissingExtraError, match=r"pip install -e '\.\[vllm\]'"):
        make_trainer(tmp_path, tiny_model_dir, teacher=Refusing(), use_vllm=True)
