# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""The checks of the student at the start of a run: what cannot be trained is refused before the teacher is asked."""

import copy
import dataclasses
import json
import os
import shutil
import warnings
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator, ParallelismConfig
from datasets import IterableDataset
from peft import AdaLoraConfig, LoraConfig, PeftMixedModel, PeftModel, get_peft_model, inject_adapter_in_model
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, BitsAndBytesConfig, T5Config
from transformers.utils import logging
from trl import DistillationTrainer
from trl.models.utils import _ForwardRedirection

from omniopd_trl import OmniOPDConfig, OmniOPDTrainer
from omniopd_trl.errors import ConfigError
from omniopd_trl.teachers import ScriptedTeacher
from omniopd_trl.trainer import startup, validation
from omniopd_trl.trainer.objective import Objective
from tests.support.objective import LORA, load
from tests.support.teachers import Unasked
from tests.support.training import make_trainer, questions


def refuse(tmp_path, model, match: str, tokenizer=None, **overrides) -> None:
    """The trainer cannot be made, in one line, and the teacher has not been asked anything."""
    with pytest.raises(ConfigError, match=match) as caught:
        make_trainer(tmp_path, model, teacher=Unasked(), processing_class=tokenizer, **overrides)
    assert "\n" not in str(caught.value)


# ---- The model is the one that the objective computes ----

# Fields of many configurations, of which each architecture takes those that it has.
SIZES = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "embedding_size", "word_embed_proj_dim", "mamba_d_ssm"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "decoder_attention_heads", "num_heads"), 4),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "decoder_ffn_dim"), 64),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts", "mamba_n_heads"), 4),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "rotary_dim"), 4),
    **dict.fromkeys(("head_dim", "v_head_dim", "q_lora_rank", "kv_lora_rank", "mamba_d_head", "mamba_d_state"), 8),
    **dict.fromkeys(("num_key_value_heads", "num_experts_per_tok"), 2),
    **dict.fromkeys(("n_group", "topk_group"), 1),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 64),
    **{"moe_intermediate_size": 16, "state_size": 8, "initializer_range": 0.3, "is_decoder": True},
    **{"vocab_size": 300, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
# Dense, with experts, recurrent; with a bias, a factor or a soft cap at the head.
COMPUTED = (
    *("bloom", "codegen", "cohere2", "deepseek_v3", "ernie4_5", "falcon_h1", "falcon_mamba", "gemma2", "gemma3_text"),
    *("glm4_moe", "gpt2", "gpt_neox", "gpt_oss", "granite", "hyperclovax", "jamba", "lfm2", "llama", "minicpm3"),
    *("ministral", "mixtral", "nanochat", "nemotron", "olmo2", "opt", "phi", "phimoe", "qwen2_moe", "qwen3"),
    *("qwen3_5_text", "qwen3_next", "recurrent_gemma", "rwkv", "smollm3", "stablelm", "starcoder2"),
)
# A dense layer, an activation and a norm before the head.
TRANSFORMED = ("modernbert-decoder", "bert", "roberta", "electra", "megatron-bert", "roformer")


def tiny(architecture: str, **overrides) -> torch.nn.Module:
    """A tiny model of an architecture with random weights."""
    config = CONFIG_MAPPING[architecture]
    names = {field.name for field in dataclasses.fields(config)}
    torch.manual_seed(0)
    settings = {**{name: size for name, size in SIZES.items() if name in names}, **overrides}
    return AutoModelForCausalLM.from_config(config(**settings))


def check_logits(model: torch.nn.Module, tokenizer, dtype: torch.dtype = torch.float32) -> None:
    """The check of a model, as the trainer makes it, without a trainer."""
    model = model.to(dtype)
    trl = SimpleNamespace(model_kwarg_keys=(), _is_vlm=False)
    args = SimpleNamespace(mixed_precision="no", device="cpu", learning_rate=0.0, beta=0.1, corrected_filters=None)
    objective = Objective(
        None,
        0.7,
        accelerator=Accelerator(cpu=True),
        args=args,
        pad_token_id=0,
        redirect=_ForwardRedirection(),
        hidden_states=partial(DistillationTrainer._get_last_hidden_state, trl),
    )
    startup.check_student(model, args, objective._accelerator)
    startup.check_logits(objective, model, tokenizer, args)


def dividing(model: torch.nn.Module, divisor: float) -> torch.nn.Module:
    """A model that divides its logits at the end of its forward, as a custom model may."""
    forward = model.forward

    def divided(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = output.logits / divisor
        return output

    model.forward = divided
    return model


@pytest.mark.case("R3")
@pytest.mark.parametrize("architecture", COMPUTED)
def test_a_model_that_is_computed_passes(tiny_tokenizer, architecture):
    """In float32 and bfloat16; and the check of the same model is not passed by one that divides by 1.1."""
    model = tiny(architecture)
    check_logits(model, tiny_tokenizer)
    with pytest.raises(ConfigError, match="computes other logits"):
        check_logits(dividing(model, 1.1), tiny_tokenizer)
    del model.forward
    check_logits(model, tiny_tokenizer, torch.bfloat16)


@pytest.mark.case("R3")
@pytest.mark.parametrize("architecture", TRANSFORMED)
def test_a_model_that_transforms_its_hidden_states_is_refused(tiny_tokenizer, architecture):
    with pytest.raises(ConfigError, match=r"own forward gives .* -\d+\.\d+ nats, and its last hidden states .* -\d+"):
        check_logits(tiny(architecture), tiny_tokenizer)


@pytest.mark.case("R3")
def test_a_model_with_another_policy_is_refused_before_the_teacher_is_asked(tmp_path, tiny_model_dir, tiny_tokenizer):
    """By path, as an instance, and under LoRA; in bfloat16 too."""
    tiny("modernbert-decoder").save_pretrained(tmp_path / "modernbert")
    tiny_tokenizer.save_pretrained(tmp_path / "modernbert")
    refuse(tmp_path, tmp_path / "modernbert", "computes other logits")
    refuse(tmp_path, dividing(load(tiny_model_dir), 2.0), "computes other logits", tiny_tokenizer)
    lora = LoraConfig(**LORA)
    refuse(tmp_path, dividing(load(tiny_model_dir), 2.0), "computes other logits", tiny_tokenizer, peft_config=lora)
    model = dividing(load(tiny_model_dir).bfloat16(), 1.1)
    refuse(tmp_path, model, "computes other logits", tiny_tokenizer, bf16=True)


@pytest.mark.case("R3")
@pytest.mark.parametrize("kind", ["bias", "hidden", "vocabulary"])
def test_other_forwards_are_refused(tiny_model_dir, tiny_tokenizer, kind):
    """A bias of the logits, scaled hidden states, and logits of a part of the vocabulary."""
    model = load(tiny_model_dir)
    if kind == "hidden":
        model.lm_head.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 0.9,))
    else:
        change = {
            "bias": lambda logits: logits + torch.arange(300) / 300,
            "vocabulary": lambda logits: logits[..., :290],
        }
        model.lm_head.register_forward_hook(lambda module, inputs, logits: change[kind](logits))
    with pytest.raises(ConfigError, match="has a weight of shape" if kind == "vocabulary" else "other logits"):
        check_logits(model, tiny_tokenizer)


def test_a_head_with_other_parameters_is_refused(tiny_tokenizer):
    """Dory's scale of each token is 1 in a new model, and would stay there. A frozen one may."""
    model = tiny("dory")
    with pytest.raises(ConfigError, match="besides its weight and bias, which would not be trained: 'logit_scale'"):
        check_logits(model, tiny_tokenizer)
    model.lm_head.logit_scale.requires_grad_(False)
    check_logits(model, tiny_tokenizer)


def test_a_student_that_reads_later_tokens_is_refused(tiny_tokenizer):
    """As PaliGemma does, whose text without an image is one prefix. The objective would agree with its forward."""
    model = tiny("llama")
    forward, everything = model.model.forward, torch.ones(1, 1, 1, 1, dtype=torch.bool)
    model.model.forward = lambda *args, attention_mask, **kwargs: forward(*args, **kwargs, attention_mask=everything)
    with pytest.raises(ConfigError, match="student is not causal: what follows a token changes its log-probabilities"):
        check_logits(model, tiny_tokenizer)


def test_a_student_that_reads_padding_is_refused(tmp_path, tiny_tokenizer):
    """A recurrent layer that takes no mask, and positions that count the padding. vLLM does not pad."""
    tiny("rwkv").save_pretrained(tmp_path / "rwkv")
    tiny_tokenizer.save_pretrained(tmp_path / "rwkv")
    refuse(tmp_path, tmp_path / "rwkv", "does not generate what its forward computes: its logits after a row")
    model = tiny("gpt2")
    forward = model.forward
    model.forward = lambda *args, position_ids=None, **kwargs: forward(*args, **kwargs)
    refuse(tmp_path, model, "padded on the left differ by", tiny_tokenizer)


def test_one_process_uses_one_gpu(tmp_path, tiny_model_dir, caplog):
    """transformers would compute each batch with DataParallel on all that it sees."""
    logging.enable_propagation()
    args = OmniOPDConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none", per_device_train_batch_size=2)
    args._n_gpu = 2
    trainer = OmniOPDTrainer(str(tiny_model_dir), ScriptedTeacher(), args, questions())
    assert trainer.args.train_batch_size == 2
    assert "This process sees 2 GPUs" in caplog.text


def test_other_parallelism_is_refused(tiny_model_dir):
    accelerator = SimpleNamespace(parallelism_config=ParallelismConfig(tp_size=2))
    with pytest.raises(ConfigError, match="tensor, context and sequence parallelism are not supported"):
        startup.check_student(load(tiny_model_dir), None, accelerator)


@pytest.mark.case("R3")
def test_models_without_the_parts_are_refused(tmp_path, tiny_model_dir, tiny_tokenizer):
    """No backbone, no LM head, an encoder-decoder, an adapter of the LM head outside of a PeftModel."""
    with pytest.raises(ConfigError, match="Llama4ForCausalLM, has no backbone"):
        check_logits(tiny("llama4_text", num_attention_heads=4), tiny_tokenizer)
    backbone = load(tiny_model_dir).model
    refuse(tmp_path, backbone, "a Qwen3Model, cannot generate", tiny_tokenizer)
    for architectures, message in (["Qwen3Model"], "a Qwen3Model, cannot generate"), (None, "names no architecture"):
        shutil.copytree(tiny_model_dir, tmp_path / "student", dirs_exist_ok=True)
        config = json.loads((tiny_model_dir / "config.json").read_text())
        (tmp_path / "student" / "config.json").write_text(json.dumps({**config, "architectures": architectures}))
        refuse(tmp_path, tmp_path / "student", message)
    with pytest.raises(ConfigError, match="encoder-decoder"):
        validation.check_student_config("t5", T5Config(), SimpleNamespace(model_init_kwargs=None))
    model = load(tiny_model_dir)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["lm_head", "q_proj"]), model)
    refuse(tmp_path, model, "LM head has an adapter", tiny_tokenizer)


@pytest.mark.case("R3")
def test_a_quantized_student_passes(tmp_path, make_tiny_model):
    pytest.importorskip("bitsandbytes")
    path = make_tiny_model(seed=7, hidden_size=64, intermediate_size=128, head_dim=16, num_key_value_heads=4)
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)
    make_trainer(tmp_path, path, quantization_config=quantization, peft_config=LoraConfig(**LORA))


# ---- What is trainable ----


def frozen_adapter(path, folder) -> torch.nn.Module:
    """An adapter that was saved, and loaded for inference."""
    get_peft_model(load(path), LoraConfig(**LORA)).save_pretrained(folder)
    return PeftModel.from_pretrained(load(path), folder)


@pytest.mark.case("R5")
@pytest.mark.parametrize("kind", ["adapter", "frozen", "disabled", "merged", "elsewhere"])
def test_a_student_that_cannot_be_trained_is_refused(tmp_path, tiny_model_dir, tiny_tokenizer, kind):
    """Nothing is trainable, or nothing that affects the logits."""
    model = load(tiny_model_dir)
    if kind == "adapter":
        model = frozen_adapter(tiny_model_dir, tmp_path / "adapter")
    elif kind == "frozen":
        model.requires_grad_(False)
    elif kind == "elsewhere":
        model.requires_grad_(False)
        model.value_head = torch.nn.Linear(32, 1)
    else:
        model = get_peft_model(model, LoraConfig(**LORA))
        model.merge_adapter() if kind == "merged" else model.disable_adapter_layers()
    match = {
        "elsewhere": "No trainable parameter affects .*'value_head.weight' and 1 more",
        "merged": "No trainable par",
    }
    checkpointing = {"gradient_checkpointing": True}  # embedded inputs then require gradients
    refuse(tmp_path, model, match.get(kind, "has no trainable parameter"), tiny_tokenizer, **checkpointing)


@pytest.mark.case("R5")
@pytest.mark.parametrize("kind", ["zero", "none", "absent"])
def test_a_first_step_without_a_gradient_stops(tmp_path, tiny_model_dir, kind):
    """Parameters that pass the checks may still get no gradient."""
    trainer = make_trainer(tmp_path, tiny_model_dir, max_steps=3, dataset=questions(24))
    if kind == "zero":
        for parameter in trainer.model.parameters():
            parameter.register_hook(torch.zeros_like)
    elif kind == "none":
        trainer.accelerator.backward = lambda loss, **kwargs: None
    else:
        loss = trainer.objective.loss
        trainer.objective.loss = lambda model, batch: (loss(model, batch)[0].detach(), {})
    with pytest.raises(ConfigError, match="at step 0, but the gradient of every trainable parameter is zero"):
        trainer.train()
    assert len(trainer.batches) == 1


@pytest.mark.case("R5")
@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_a_first_step_without_weights_may_have_no_gradient(tmp_path, tiny_model_dir, beta):
    """Every chunk is refused in the first step, and the second step trains."""
    teacher = ScriptedTeacher(lambda *_: "Tom has 7 apples." if trainer.state.global_step else None)
    settings = {"max_failed_chunks": 1.0, "max_steps": 2, "dataset": questions(16)}
    trainer = make_trainer(tmp_path, tiny_model_dir, teacher=teacher, beta=beta, **settings)
    trainer.train()
    norms = [log["grad_norm"] for log in trainer.state.log_history if "grad_norm" in log]
    assert norms[0] < 1e-5 < norms[1]


# ---- Adapters ----


@pytest.mark.case("R8")
@pytest.mark.parametrize("names", [["default", "second"], ["second", "default"], ["second", "third"]], ids=" ".join)
def test_several_active_adapters_are_refused(tmp_path, tiny_model_dir, tiny_tokenizer, names):
    model = get_peft_model(load(tiny_model_dir), LoraConfig(**LORA))
    model.add_adapter("second", LoraConfig(**LORA))
    model.add_adapter("third", LoraConfig(**LORA))
    model.base_model.set_adapter(names)
    refuse(tmp_path, model, f"2 active adapters \\('{names[0]}', '{names[1]}'\\).*set_adapter", tiny_tokenizer)
    refuse(tmp_path, model, "2 active adapters", tiny_tokenizer, beta=0.0)
    model.set_adapter("second")
    make_trainer(tmp_path, model, processing_class=tiny_tokenizer)


@pytest.mark.case("R8")
def test_a_mixed_model_is_refused(tmp_path, tiny_model_dir, tiny_tokenizer):
    model = PeftMixedModel(load(tiny_model_dir), LoraConfig(**LORA), "default")
    refuse(tmp_path, model, "PeftMixedModel", tiny_tokenizer)


def test_an_activated_lora_is_refused(tmp_path, tiny_model_dir):
    adapter = LoraConfig(**LORA, alora_invocation_tokens=[5, 6])
    refuse(tmp_path, tiny_model_dir, "activated LoRA .* would train nothing", peft_config=adapter)


def test_repeated_layers_are_refused(tmp_path, tiny_model_dir):
    adapter = LoraConfig(**LORA, layer_replication=[[0, 2], [0, 2]])
    refuse(tmp_path, tiny_model_dir, r"the 2 `layer_types` .* a qwen3 cannot .* 4 layers", peft_config=adapter)


@pytest.mark.case("R13")
@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_adalora_is_refused(tmp_path, tiny_model_dir, beta):
    config = AdaLoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", total_step=10)
    refuse(tmp_path, tiny_model_dir, "AdaLoRA.*Use LoRA", peft_config=config, beta=beta)


# ---- Precision ----


@pytest.mark.case("R2")
@pytest.mark.parametrize("kind", ["instance", "path", "adapter", "half"])
def test_weights_that_would_not_move_are_named(tmp_path, tiny_model_dir, tiny_tokenizer, kind, caplog):
    """bfloat16 and float16 weights at a low learning rate, wherever the precision comes from."""
    logging.enable_propagation()
    model, settings = tiny_model_dir, {}
    if kind == "path":
        settings = {"model_init_kwargs": {"dtype": "bfloat16"}}
    else:
        model, settings = load(tiny_model_dir), {"processing_class": tiny_tokenizer}
        model = model.half() if kind == "half" else model.bfloat16()
        if kind == "adapter":
            model = get_peft_model(model, LoraConfig(**LORA, init_lora_weights=False), autocast_adapter_dtype=False)
    make_trainer(tmp_path, model, learning_rate=1e-6, **settings)
    dtype = "float16" if kind == "half" else "bfloat16"
    assert f"trainable weights are torch.{dtype}: rounded to it" in caplog.text
    assert "learning_rate=1e-06" in caplog.text


@pytest.mark.case("R2")
@pytest.mark.parametrize(("dtype", "rate"), [(torch.bfloat16, 0.1), (torch.float32, 1e-6), (torch.bfloat16, 0.0)])
def test_weights_that_move_are_not(tmp_path, tiny_model_dir, tiny_tokenizer, dtype, rate, caplog):
    logging.enable_propagation()
    make_trainer(tmp_path, load(tiny_model_dir).to(dtype), learning_rate=rate, processing_class=tiny_tokenizer)
    assert "rounded to it" not in caplog.text


# ---- Options and tokenizer ----


@pytest.mark.case("R17")
@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("train_sampling_strategy", "group_by_length"),
        ("train_sampling_strategy", "sequential"),
        ("torch_compile", True),
        ("torch_compile_backend", "inductor"),
        ("torch_compile_mode", "reduce-overhead"),
    ],
)
def test_options_without_effect_are_refused(tmp_path, tiny_model_dir, option, value):
    refuse(tmp_path, tiny_model_dir, f"{option}={value!r}", **{option: value})
    assert os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no") == "no"


@pytest.mark.case("R17")
def test_compilation_by_the_launcher_is_refused(tmp_path, tiny_model_dir, monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    refuse(tmp_path, tiny_model_dir, "`dynamo_backend` of accelerate 'INDUCTOR'")


@pytest.mark.case("R17")
def test_data_seed_orders_the_data(tmp_path, tiny_model_dir):
    """The same order as with that `seed`, while the trajectories stay those of `seed`; refused for a stream."""

    def order(**seeds):
        trainer = make_trainer(tmp_path, tiny_model_dir, dataset=questions(32), **seeds)
        return list(trainer._get_train_sampler())

    assert order(data_seed=7) == order(seed=7) != order()
    stream = IterableDataset.from_generator(lambda: iter(questions(16).to_list()))
    refuse(tmp_path, tiny_model_dir, "data_seed=7 has no effect on a streaming", dataset=stream, data_seed=7)


@pytest.mark.case("R17")
@pytest.mark.parametrize("kind", ["instance", "path", "asked", "off"])
def test_a_loss_of_the_routers_is_refused(tmp_path, tiny_tokenizer, kind):
    """If the student's configuration or the loading options ask for it; a coefficient alone asks for nothing."""
    model = tiny("qwen3_moe", output_router_logits=kind in ("instance", "path"))
    settings = {"asked": {"router_aux_loss_coef": 0.01}, "off": {"output_router_logits": False}}
    if kind == "instance":
        refuse(tmp_path, model, "router_aux_loss_coef=0.001.*output_router_logits=False", tiny_tokenizer)
        return
    model.save_pretrained(tmp_path / "student")
    tiny_tokenizer.save_pretrained(tmp_path / "student")
    if kind == "off":
        make_trainer(tmp_path, tmp_path / "student", model_init_kwargs=settings["off"])
    else:
        refuse(tmp_path, tmp_path / "student", "router_aux_loss_coef=0.0", model_init_kwargs=settings.get(kind))


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_noise_of_the_routers_is_named(tmp_path, tiny_tokenizer, caplog, noise):
    logging.enable_propagation()
    tiny("mixtral", router_jitter_noise=0.1).save_pretrained(tmp_path / "student")
    tiny_tokenizer.save_pretrained(tmp_path / "student")
    options = {} if noise else {"model_init_kwargs": {"router_jitter_noise": 0.0}}
    make_trainer(tmp_path, tmp_path / "student", **options)
    assert ("router_jitter_noise=0.1: the routers" in caplog.text) is (noise > 0)


@pytest.mark.case("R19")
@pytest.mark.parametrize("adapter", [None, LoraConfig(**LORA)], ids=["full", "lora"])
@pytest.mark.parametrize("beta", [0.0, 0, 1e-8, 0.1])
def test_an_anchor_that_is_off_is_said_once(tmp_path, tiny_model_dir, beta, adapter, caplog):
    logging.enable_propagation()
    make_trainer(tmp_path, tiny_model_dir, beta=beta, peft_config=adapter)
    assert caplog.text.count("beta=0 turns off the KL anchor") == (beta == 0)


@pytest.mark.case("R12")
def test_a_tokenizer_with_more_tokens_than_the_embedding(tmp_path, tiny_model_dir, tiny_tokenizer, caplog):
    logging.enable_propagation()
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<new>"]})
    make_trainer(tmp_path, tiny_model_dir, processing_class=tokenizer)
    assert "has 301 tokens, and its embedding 300 rows: a prompt with the token '<new>'" in caplog.text


def test_the_usual_configuration_logs_no_deprecation():
    """TRL sets `gradient_checkpointing`, which transformers has renamed."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        args = OmniOPDConfig(output_dir="x", use_cpu=True, bf16=False, report_to="none")
        off = OmniOPDConfig(output_dir="x", use_cpu=True, bf16=False, report_to="none", gradient_checkpointing=False)
    assert args.gradient_checkpointing
    assert not off.gradient_checkpointing
