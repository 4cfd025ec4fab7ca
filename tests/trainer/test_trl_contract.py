# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""What we rely on in TRL, pinned: a release that changes it fails here first, with a message that says what."""

import inspect
import re

import pytest
import torch
import trl
from transformers import (
    AutoModelForCausalLM,
    Cohere2Config,
    FalconH1Config,
    Gemma2Config,
    GraniteConfig,
    Qwen3Config,
)
from trl import DistillationConfig, DistillationTrainer
from trl.generation.vllm_generation import VLLMGeneration
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction
from trl.kernels.chunked_logprob import ChunkedLogProbFunction
from trl.models.utils import _ForwardRedirection
from trl.trainer.utils import flush_left, maybe_gather_lm_head_ctx, repeat_iterable_dataset, use_adapter

from omniopd_trl.method.entropy import token_entropy
from omniopd_trl.method.loss import anchor_kl
from omniopd_trl.models.lm_head import kl_to_reference, lm_head_of, logit_scale, logprobs_of
from omniopd_trl.trainer.omniopd_trainer import OmniOPDTrainer

HINT = f"TRL {trl.__version__} changed something that OmniOPDTrainer relies on"

# Hooks that we override or call, with the parameters that we pass or receive.
HOOKS = {
    "create_model_card": ["self", "model_name", "dataset_name", "tags"],
    "_generate_and_score_completions": ["self", "inputs"],
    "_generate_single_turn": ["self", "prompt_ids", "images", "multimodal_fields", "has_tool_images"],
    "_get_dataloader": [
        *("self", "dataset", "description", "batch_size", "sampler_fn", "is_training", "dataloader_key"),
    ],
    "_get_eval_sampler": ["self", "eval_dataset"],
    "_get_grad_norm": ["self", "model", "grad_norm"],
    "_get_train_sampler": ["self", "dataset"],
    "_get_last_hidden_state": ["self", "unwrapped_model", "input_ids", "attention_mask", "logits_to_keep"],
    "_prepare_inputs": ["self", "generation_batch"],
    "_push_from_checkpoint": ["self", "checkpoint_folder"],
    "_run_epoch": [
        *("self", "model", "epoch", "train_dataloader", "steps_in_epoch", "num_update_steps_per_epoch", "trial"),
        *("ignore_keys_for_eval", "start_time", "resume_from_checkpoint", "epochs_trained"),
        "steps_trained_in_current_epoch",
    ],
    "_save": ["self", "output_dir", "state_dict"],
    "_save_checkpoint": ["self", "model", "trial"],
    "_save_rng_state": ["self", "output_dir"],
    "_tokenize_prompts": ["self", "prompts"],
    "compute_loss": ["self", "model", "inputs", "return_outputs", "num_items_in_batch"],
    "evaluate": ["self", "eval_dataset", "ignore_keys", "metric_key_prefix"],
    "evaluation_loop": [
        *("self", "dataloader", "description", "prediction_loss_only", "ignore_keys", "metric_key_prefix"),
    ],
    "init_hf_repo": ["self", "token", "private"],
    "log": ["self", "logs", "start_time"],
    "predict": ["self", "test_dataset", "ignore_keys", "metric_key_prefix"],
    "push_to_hub": ["self", "commit_message", "blocking", "token", "revision", "private", "kwargs"],
    "save_model": ["self", "output_dir", "_internal_call"],
}

KERNELS = {
    ChunkedLogProbFunction: [
        *("hidden", "weight", "bias", "targets", "temperature", "chunk_size"),
        *("final_logit_softcapping", "logit_scale", "outputs"),
    ],
    ChunkedDivergenceFunction: [
        *("student_hidden", "student_weight", "student_bias", "teacher_hidden", "teacher_weight", "teacher_bias"),
        *("beta", "temperature", "student_logit_scale", "student_final_logit_softcapping"),
        *("teacher_logit_scale", "teacher_final_logit_softcapping"),
    ],
}


@pytest.mark.parametrize("name", HOOKS)
def test_hooks_have_the_parameters_we_pass(name):
    """Same names in the same order; TRL may add parameters behind them."""
    parameters = list(inspect.signature(getattr(DistillationTrainer, name)).parameters)
    assert parameters[: len(HOOKS[name])] == HOOKS[name], f"{HINT}: {name}{tuple(parameters)}"


def test_we_override_few_hooks():
    """Each override is a place where a TRL release can break us: adding one is a decision."""
    inherited = set(dir(DistillationTrainer))
    ours = [cls for cls in OmniOPDTrainer.__mro__ if cls.__module__.startswith("omniopd_trl.")]
    own = {name for cls in ours for name in vars(cls) if name in inherited and not name.startswith("__")}
    overridden = own - {"_tag_names", "_name", "_paper"}
    assert overridden == set(HOOKS) - {"_get_last_hidden_state"} | {"train"}, overridden


def test_the_engine_has_what_we_change_and_read():
    """vLLM's log-probabilities are switched on and kept, and updates forced, through these names."""
    parameters = list(inspect.signature(VLLMGeneration.__init__).parameters)
    assert {"logprobs", "generation_kwargs"} <= set(parameters), HINT
    source = inspect.getsource(VLLMGeneration.generate)
    assert '"logprobs": self.logprobs' in source, HINT
    assert "max_completion_length = self.max_completion_length" in source, HINT
    assert "generation_kwargs.update(self.generation_kwargs)" in source, HINT
    assert "return prompt_ids, completion_ids, logprobs, logprob_token_ids" in source, HINT
    single_turn = inspect.getsource(DistillationTrainer._generate_single_turn)
    assert "self.vllm_generation.generate(" in single_turn, HINT
    assert "self.state.global_step != self._last_loaded_step" in single_turn, HINT


def test_constructor_takes_what_trl_takes():
    """Every argument of the base trainer is there, in its order, as a TRL user expects."""
    base = list(inspect.signature(DistillationTrainer.__init__).parameters)
    ours = list(inspect.signature(OmniOPDTrainer.__init__).parameters)
    assert ours[: len(base)] == base, HINT


def test_batch_keys(tmp_path, tiny_model_dir):
    """The keys of the generation batch, with the batch in dimension 0 of the first: TRL splits by it."""
    from tests.support.training import make_trainer

    trainer = make_trainer(tmp_path, tiny_model_dir)
    trainer.train()
    keys = set(trainer.batches[0]) - {"prompts"}
    trl_keys = {"prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "num_items_in_batch"}
    ours = {"weights", "audited_mask"}
    assert keys == trl_keys | ours, f"{HINT}: the batch holds {sorted(keys)}"
    assert trainer._buffered_inputs is not None, HINT
    assert isinstance(trainer._forward_redirection, _ForwardRedirection), HINT


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.__name__)
def test_kernels_take_the_arguments_we_pass(kernel):
    """autograd functions take no keywords, so the order is the contract."""
    parameters = list(inspect.signature(kernel.forward).parameters)[1:]
    assert parameters == KERNELS[kernel], f"{HINT}: {kernel.__name__}{tuple(parameters)}"


def test_helpers_behave_as_we_assume():
    """`flush_left` moves padding to the right and cuts it; the others exist under their names."""
    mask = torch.tensor([[0, 1, 1, 0, 0], [0, 0, 1, 0, 0]])
    ids = torch.tensor([[9, 1, 2, 9, 9], [9, 9, 3, 9, 9]])
    flushed_mask, flushed_ids = flush_left(mask, ids)
    assert flushed_mask.tolist() == [[1, 1], [1, 0]], HINT
    assert flushed_ids[flushed_mask.bool()].tolist() == [1, 2, 3], HINT
    assert all(map(callable, (maybe_gather_lm_head_ctx, use_adapter, repeat_iterable_dataset))), HINT


def test_loss_is_scaled_by_the_trainer():
    """With it unset, transformers would divide by the accumulation steps once more."""
    assert DistillationTrainer.loss_is_scaled_for_ga is True, HINT


def test_inherited_fields_are_the_ones_that_were_thought_about():
    """A field that TRL adds may have no meaning here, and must then be refused rather than ignored."""
    from transformers import TrainingArguments

    fields = set(DistillationConfig.__dataclass_fields__) - set(TrainingArguments.__dataclass_fields__)
    known = {
        *("model_init_kwargs", "trust_remote_code", "teacher_model_name_or_path", "teacher_model_revision"),
        *("teacher_model_init_kwargs", "disable_dropout", "max_completion_length", "ds3_gather_for_generation"),
        *("shuffle_dataset", "pad_to_multiple_of", "temperature", "top_p", "top_k", "min_p", "generation_kwargs"),
        *("chat_template_kwargs", "repetition_penalty", "cache_implementation", "use_vllm", "vllm_mode"),
        *("vllm_model_impl", "vllm_enable_sleep_mode", "vllm_structured_outputs_regex", "vllm_server_base_url"),
        *("vllm_server_host", "vllm_server_port", "vllm_server_timeout", "vllm_group_port"),
        *("vllm_gpu_memory_utilization", "vllm_max_model_length", "vllm_tensor_parallel_size", "beta"),
        *("max_tool_calling_iterations", "log_completions", "num_completions_to_print", "log_unique_prompts"),
    }
    assert fields == known, f"{HINT}: {sorted(fields ^ known)}"


SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# What each family does to its logits: nothing, a factor, a division, a soft cap, a factor under another name.
FAMILIES = {
    "plain": Qwen3Config(**SMALL, head_dim=8),
    "logit_scale": Cohere2Config(**SMALL, logit_scale=0.25),
    "logits_scaling": GraniteConfig(**SMALL, logits_scaling=4.0),
    "softcap": Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=2.0),
    "lm_head_multiplier": FalconH1Config(
        **SMALL, lm_head_multiplier=0.5, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_projections_equal_the_models_own_logits(family, temperature):
    """Log-probabilities, entropies, KL and its gradient from hidden states, against the model's dense logits."""
    torch.manual_seed(0)
    student = AutoModelForCausalLM.from_config(FAMILIES[family]).float().eval()
    reference = AutoModelForCausalLM.from_config(FAMILIES[family]).float().eval()
    ids = torch.randint(3, 97, (2, 11))

    def hidden(model):
        return model.base_model(ids).last_hidden_state[:, :-1].reshape(-1, 32)

    def logits(model):
        return model(ids).logits[:, :-1].reshape(-1, 97).double() / temperature

    targets = ids[:, 1:].reshape(-1)
    with lm_head_of(student) as head, lm_head_of(reference) as ref_head, torch.no_grad():
        logprobs, entropy = logprobs_of(hidden(student), head, targets, temperature)
        dense = logits(student)
        torch.testing.assert_close(
            logprobs.double(), dense.log_softmax(-1).gather(1, targets[:, None])[:, 0], rtol=0, atol=1e-4
        )
        torch.testing.assert_close(entropy.double(), token_entropy(dense).double(), rtol=0, atol=1e-4)
        assert logprobs.dtype == entropy.dtype == torch.float32
    if family != "plain":
        assert head.logit_scale != 1.0 or head.softcap is not None, "the family's factor is not seen"

    with lm_head_of(student) as head, lm_head_of(reference) as ref_head:
        with torch.no_grad():
            ref_hidden = hidden(reference)
        kl, kl_entropy = kl_to_reference(hidden(student), head, ref_hidden, ref_head, temperature)
        kl.sum().backward()
    gradient = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
    student.zero_grad()
    dense_kl = anchor_kl(logits(reference), logits(student), torch.ones(len(targets), dtype=torch.bool))
    dense_kl.backward()
    assert kl.sum().item() == pytest.approx(dense_kl.item(), rel=1e-4)
    torch.testing.assert_close(kl_entropy, entropy, rtol=0, atol=1e-4)
    assert dense_kl.item() > 0.1
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(gradient[name], parameter.grad, rtol=1e-3, atol=1e-4, msg=name)


def test_no_tokens_at_all_give_empty_results_and_zero_gradients():
    """A micro-batch without audited tokens: no crash, and the graph stays connected."""
    model = AutoModelForCausalLM.from_config(FAMILIES["plain"]).float()
    hidden = torch.randn(5, 32, requires_grad=True)
    none = torch.zeros(5, dtype=torch.bool)
    with lm_head_of(model) as head:
        logprobs, entropy = logprobs_of(hidden[none], head, torch.zeros(0, dtype=torch.long), 1.0)
        kl, _ = kl_to_reference(hidden[none], head, hidden[none].detach(), head, 1.0)
        (logprobs.sum() + kl.sum()).backward()
    assert logprobs.shape == entropy.shape == kl.shape == (0,)
    assert hidden.grad.abs().sum() == 0
    assert head.weight.grad.abs().sum() == 0


def test_logit_scale_names_are_the_ones_trl_knows():
    """TRL reads the factor from the same places; a name that it adds is one that we miss."""
    from trl.trainer import utils

    source = inspect.getsource(utils.add_fused_lm_head)
    names = set(re.findall(r'getattr\(text_config, "(\w+)"', source)) - {
        "final_logit_softcapping",
        "output_router_logits",
        "router_aux_loss_coef",
    }
    ours = set(re.findall(r'"(\w+)"', inspect.getsource(logit_scale)))
    assert names <= ours, f"{HINT}: {sorted(names - ours)}"
