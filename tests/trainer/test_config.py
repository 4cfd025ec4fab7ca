# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""The configuration: the paper's defaults, what is refused, and what is said."""

import math
import re
import sys
import traceback

import pytest
from transformers.utils import logging
from trl import TrlParser

from omniopd_trl import OmniOPDConfig
from omniopd_trl.errors import ConfigError, MissingExtraError


def config(**overrides) -> OmniOPDConfig:
    settings = {"output_dir": "unused", "use_cpu": True, "bf16": False, "report_to": "none"}
    return OmniOPDConfig(**{**settings, **overrides})


def test_defaults_are_the_papers():
    """M, C, N, alpha, beta, phi, learning rate and temperature, as sections 3 and 5.1 give them."""
    args = config()
    assert (args.num_chunks, args.chunk_length, args.num_rollouts) == (10, 50, 10)
    assert (args.prior_strength, args.beta, args.similarity) == (1.0, 0.1, "edit")
    assert (args.learning_rate, args.temperature) == (1e-6, 1.0)
    assert (args.chunk_overlap, args.chunk_placement, args.chunk_selection) == ("resample", "start", "entropy")
    assert (args.prior, args.posterior_baseline, args.loss_normalization) == ("policy", "none", "tokens")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_chunks", 0),
        ("num_chunks", 2.5),
        ("num_chunks", True),
        ("num_chunks", "10"),
        ("chunk_length", -1),
        ("chunk_length", 513),
        ("min_chunk_length", 51),
        ("num_rollouts", 0),
        ("num_eval_generations", 0),
        ("prior_strength", -0.1),
        ("prior_strength", math.nan),
        ("prior_strength", "strong"),
        ("beta", -0.1),
        ("beta", math.inf),
        ("beta", None),
        ("temperature", 0.0),
        ("teacher_temperature", -1.0),
        ("teacher_top_p", 0.0),
        ("teacher_top_p", 1.1),
        ("learning_rate", "fast"),
        ("min_p", 3.0),
        ("min_p", -0.1),
        ("top_p", 1.5),
        ("top_k", -5),
        ("top_k", -1),
        ("top_k", 2.5),
        ("top_k", None),
        ("repetition_penalty", -1.0),
        ("repetition_penalty", 0),
        ("per_device_train_batch_size", 0),
        ("per_device_eval_batch_size", 0),
        ("gradient_accumulation_steps", 0),
        ("audit_eval", "no"),
        ("save_audits", "false"),
        ("ref_model_offload", None),
        ("mask_truncated_completions", 1),
        ("max_completion_length", None),
        ("max_completion_length", "512"),
        ("similarity", "levenshtein"),
        ("similarity", len),
        ("prior", "teacher"),
        ("chunk_overlap", "drop"),
        ("chunk_placement", "end"),
        ("chunk_selection", "random"),
        ("loss_normalization", "mean"),
        ("posterior_baseline", "mean"),
        ("vllm_mode", "colocated"),
        ("max_tool_calling_iterations", 3),
        ("label_smoothing_factor", 0.1),
        ("neftune_noise_alpha", 5.0),
        ("remove_unused_columns", True),
        ("auto_find_batch_size", True),
        ("optim", "adalomo"),
        ("optim", "galore_adamw_layerwise"),
        ("accelerator_config", {"split_batches": True}),
        ("generation_kwargs", {"temperature": 0.5}),
        ("generation_kwargs", {"do_sample": False}),
        ("generation_kwargs", '{"num_beams": 4}'),
        ("generation_kwargs", {"top_k": 1}),
        ("generation_kwargs", {"max_new_tokens": 5}),
        ("generation_kwargs", {"eos_token_id": 5}),
        ("generation_kwargs", {"stop_strings": ["x"]}),
        ("generation_kwargs", {"top_kk": 1}),
    ],
)
def test_a_bad_value_is_refused_by_name(field, value):
    """The message names the field and the value, and the error is a ValueError."""
    with pytest.raises(ConfigError) as caught:
        config(**{field: value})
    assert field in str(caught.value)
    shown = "num_beams" if value == '{"num_beams": 4}' else "levenshtein" if value == "levenshtein" else repr(value)
    assert shown in str(caught.value) or str(value) in str(caught.value)
    assert isinstance(caught.value, ValueError)


def test_a_temperature_that_vllm_refuses_is_refused_before():
    """It would say so in the middle of the first step. transformers has no highest one."""
    with pytest.raises(ConfigError, match=r"temperature=2\.1 is more than 2"):
        config(use_vllm=True, temperature=2.1)
    assert config(use_vllm=True, temperature=2).temperature == 2.0
    assert config(temperature=2.1).temperature == 2.1


def test_a_seed_for_vllm_is_refused():
    """It would make samples of the same prompt equal."""
    with pytest.raises(ConfigError, match=r"generation_kwargs=\{'seed': 3\} sets 'seed'"):
        config(use_vllm=True, generation_kwargs={"seed": 3})


def test_generation_kwargs_that_change_the_policy_are_said(caplog):
    """Of every sampler: they count as filters. Those that change nothing do not."""
    logging.enable_propagation()
    changed = config(use_vllm=True, generation_kwargs={"frequency_penalty": 0.1, "logprobs": 0})
    assert changed.sampling_filters == ["generation_kwargs={'frequency_penalty': 0.1}"]
    assert "frequency_penalty" in caplog.text
    assert config(generation_kwargs={"typical_p": 0.5}).sampling_filters == ["generation_kwargs={'typical_p': 0.5}"]
    assert config(generation_kwargs={"use_cache": True}).sampling_filters == []


def test_the_best_model_is_not_the_one_that_moved_least():
    """The default metric is the evaluation loss, which is the anchor alone unless the teacher is asked."""
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 5}
    best |= {"save_steps": 5}
    with pytest.raises(ConfigError, match=r"metric_for_best_model='loss'.*eval_pass@1"):
        config(**best)
    assert config(**best, metric_for_best_model="eval_pass@1").greater_is_better
    assert config(**best, audit_eval=True).metric_for_best_model == "loss"
    plateau = {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps", "eval_steps": 5}
    for early in (
        {"metric_for_best_model": "eval_loss"},
        plateau,
    ):  # a callback may stop early, or the rate be reduced
        with pytest.raises(ConfigError, match=r"metric_for_best_model='(eval_)?loss'.*eval_pass@1"):
            config(**early)
    assert config(**plateau, metric_for_best_model="pass@1").lr_scheduler_type == "reduce_lr_on_plateau"


def test_no_clipping():
    """`None` is what `0` is. transformers compares it with a number when the first gradient is there."""
    assert config(max_grad_norm=None).max_grad_norm == config(max_grad_norm=0.0).max_grad_norm == 0.0


def test_no_limit_is_no_filter():
    """The values that switch a filter off are accepted and not reported; with vLLM `top_k=-1` is one of them."""
    assert config(top_k=0, min_p=0, top_p=1, repetition_penalty=1).sampling_filters == []
    assert config(use_vllm=True, top_k=-1, min_p=None).sampling_filters == []
    assert config(use_vllm=True, top_k=20, min_p="0.1").sampling_filters == ["top_k=20", "min_p=0.1"]
    with pytest.raises(ConfigError, match=r"top_k=-2 must be a whole number of at least 1, or 0 for no limit"):
        config(use_vllm=True, top_k=-2)


def test_beta_above_one_and_zero_are_legal():
    """The base class would refuse the former; the paper lets beta grow without bound."""
    assert config(beta=25.0).beta == 25.0
    assert config(beta=0).beta == 0.0
    with pytest.raises(ConfigError, match="needs the reference model"):
        config(beta=0, prior="reference")
    assert config(beta=0, prior="reference", prior_strength=0).prior == "reference"


def test_numbers_as_yaml_reads_them():
    """YAML 1.1 reads 1e-4 as a string."""
    args = config(beta="1e-1", prior_strength=2, learning_rate="1e-4")
    assert (args.beta, args.prior_strength, args.learning_rate) == (0.1, 2.0, 1e-4)


def test_dictionaries_from_the_command_line():
    """JSON on the command line, as for the fields of TRL."""
    [args] = TrlParser([OmniOPDConfig]).parse_args_and_config(
        [
            *("--output_dir", "unused", "--use_cpu", "--bf16", "false", "--beta", "2.5"),
            *("--ref_model_init_kwargs", '{"dtype": "bfloat16"}'),
            *("--teacher_chat_template_kwargs", '{"enable_thinking": false}'),
        ]
    )
    assert args.ref_model_init_kwargs == {"dtype": "bfloat16"}
    assert args.teacher_chat_template_kwargs == {"enable_thinking": False}
    assert args.beta == 2.5


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("top_p", 0.9, "not exactly on-policy"),
        ("top_k", 20, "not exactly on-policy"),
        ("min_p", 0.1, "not exactly on-policy"),
        ("repetition_penalty", 1.1, "not exactly on-policy"),
        ("teacher_temperature", 0.0, "num_rollouts=1"),
    ],
)
def test_what_weakens_the_method_is_said(caplog, field, value, words):
    """Legal, but another distribution than the one that is trained, or money for nothing."""
    logging.enable_propagation()
    config(**{field: value})
    assert words in caplog.text
    assert f"{field}={value:g}" in caplog.text.replace(".0", "")


def test_every_field_is_documented():
    """In the class's docstring, from which the help of the command line is taken."""
    own = set(OmniOPDConfig.__annotations__)
    assert len(own) > 15
    for name in own:
        field = OmniOPDConfig.__dataclass_fields__[name]
        assert field.metadata["help"], name
        entry = re.search(rf"^ *{name} \(`(.*)", OmniOPDConfig.__doc__, re.MULTILINE)  # Python 3.13 removes the indent
        assert entry, name
        assert "[`" not in field.metadata["help"], name
        if not isinstance(field.default, str) and field.default is not None:
            assert f"defaults to `{field.default}`" in entry[1], name


SECRET = "s3cr3t-4Fz8QmTnW2bLxVYc"


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("model_init_kwargs", {"token": SECRET}, "model_init_kwargs['token']"),
        ("model_init_kwargs", f'{{"token": "{SECRET}"}}', "model_init_kwargs['token']"),
        ("ref_model_init_kwargs", {"use_auth_token": SECRET}, "ref_model_init_kwargs['use_auth_token']"),
        ("teacher_model_init_kwargs", {"hf": {"API-Key": SECRET}}, "teacher_model_init_kwargs['hf']['API-Key']"),
        ("teacher_chat_template_kwargs", {"tools": [{"password": SECRET}]}, "teacher_chat_template_kwargs['tools']"),
        ("chat_template_kwargs", {"headers": {"Authorization": f"Bearer {SECRET}"}}, "['Authorization']"),
        ("model_init_kwargs", {"env": {"MY_OPENAI_API_KEY": SECRET}}, "model_init_kwargs['env']['MY_OPENAI_API_KEY']"),
        ("generation_kwargs", {"proxy": f"http://user:{SECRET}@proxy:8080"}, "generation_kwargs['proxy']"),
        ("teacher_base_url", f"http://user:{SECRET}@127.0.0.1:8000/v1", "teacher_base_url"),
        ("teacher_base_url", f"https://{SECRET}@host/v1", "teacher_base_url"),
        ("vllm_server_base_url", f"http://:{SECRET}@host", "vllm_server_base_url"),
        *(
            pytest.param(*row, marks=pytest.mark.case("A5"))
            for row in [
                ("teacher_base_url", f"http://user:a@{SECRET}@127.0.0.1:8000/v1", "teacher_base_url"),
                ("teacher_base_url", f"http://user:a/{SECRET}@127.0.0.1:8000/v1", "teacher_base_url"),
                ("teacher_base_url", f"https://host/v1?key={SECRET}", "(key=...)"),
                ("teacher_base_url", f"https://host/v1?api-version=1&subscription-key={SECRET}", "(subscription-key="),
                ("teacher_base_url", f"https://host/v1?access_token={SECRET}#a", "(access_token="),
                ("vllm_server_base_url", f"https://host/v1?sig={SECRET}", "(sig=...)"),
                ("run_name", f"sk-proj-{SECRET}", "run_name"),
                ("chat_template_kwargs", {"note": f"AIzaSy{SECRET}"}, "chat_template_kwargs['note']"),
                ("chat_template_kwargs", {"notes": ["x", f"use hf_{SECRET}"]}, "chat_template_kwargs['notes']"),
                ("chat_template_kwargs", {"note": SECRET}, "MY_SERVICE_API_KEY"),
                ("run_name", f"run of {SECRET}", "MY_SERVICE_API_KEY"),
            ]
        ),
    ],
)
def test_secrets_are_refused(name, value, words, monkeypatch):
    """They would stand in every checkpoint. The message names the place and the way out, and shows no secret."""
    if words == "MY_SERVICE_API_KEY":
        monkeypatch.setenv(words, SECRET)
    with pytest.raises(ConfigError) as caught:
        config(**{name: value})
    message = str(caught.value)
    assert words in message
    assert "Leave" in message
    assert ("environment variable" in message) == (name != "vllm_server_base_url" and "proxy" not in words)
    assert SECRET not in message
    assert SECRET not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model_init_kwargs", {"token": True, "use_auth_token": None, "revision": "main"}),
        ("model_init_kwargs", {"pad_token": "<pad>", "eos_token_id": 2, "dtype": "float32"}),
        ("chat_template_kwargs", {"bos_token": "<s>", "token_type": "x", "secret_santa": "y", "key": "C major"}),
        ("chat_template_kwargs", {"max_tokens": "7", "stop": ["a@b"]}),
        ("teacher_base_url", "http://127.0.0.1:8000/v1"),
        ("teacher_base_url", "http://host/v1?mail=a@b"),
        ("run_name", "me@home"),
        ("run_name", "sk-learn-baseline-2026"),
        ("run_name", "hf_transfer_1"),
        ("teacher_base_url", "http://host:8000/v1?api-version=2026-10-01"),
        ("teacher_base_url", "http://host:8000/a@b"),
    ],
)
def test_what_looks_like_a_secret_and_is_none(name, value):
    """Names of special tokens, counts of tokens, and addresses without a password stay."""
    assert getattr(config(**{name: value}), name) == value


def test_missing_deepspeed(monkeypatch):
    """A configuration of DeepSpeed without the package names the extra; `transformers` would not."""
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(MissingExtraError, match=r"pip install -e '\.\[deepspeed\]'"):
        config(deepspeed={"zero_optimization": {"stage": 2}})
