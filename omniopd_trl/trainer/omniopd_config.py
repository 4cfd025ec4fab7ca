# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Configuration of the [`OmniOPDTrainer`]."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, get_args

from transformers import GenerationConfig
from transformers.utils import logging
from trl import DistillationConfig

from omniopd_trl.errors import ConfigError, find_extra
from omniopd_trl.method.chunks import Overlap, Placement, Selection
from omniopd_trl.method.importance import SamplingFilters
from omniopd_trl.method.loss import NORMALIZATIONS
from omniopd_trl.method.posterior import Prior
from omniopd_trl.method.rewards import AUDIT_TRAJECTORIES
from omniopd_trl.method.similarity import get_similarity
from omniopd_trl.method.weights import BASELINES
from omniopd_trl.teachers.context import TeacherContext
from omniopd_trl.teachers.instruct.judge import Signal
from omniopd_trl.teachers.remote.settings import Continuation
from omniopd_trl.trainer.credentials import check_credentials
from omniopd_trl.trainer.help_texts import with_help

logger = logging.get_logger(__name__)

# Keys of `generation_kwargs` that are refused, with the field of the configuration to use instead: None for a field of
# the same name, "" for no field. Other end tokens than the trainer's would leave padding among the trained tokens.
# Search methods do not sample from the student's distribution.
_REFUSED_GENERATION_KWARGS = {
    **dict.fromkeys(("temperature", "top_p", "top_k", "min_p", "repetition_penalty"), None),
    **dict.fromkeys(("max_new_tokens", "max_length", "max_tokens", "max_time"), "max_completion_length"),
    **dict.fromkeys(("do_sample", "num_beams", "num_return_sequences", "n", "best_of"), ""),
    **dict.fromkeys(("eos_token_id", "pad_token_id", "bos_token_id", "stop_strings", "ignore_eos"), ""),
}
# Keys that depend on where a completion begins. An engine takes a branch for a completion of its own.
_OF_WHOLE_COMPLETIONS = {"min_new_tokens", "min_tokens", "begin_suppress_tokens", "exponential_decay_length_penalty"}
# Keys that do not change the sampling distribution.
_HARMLESS_GENERATION_KWARGS = {
    *("use_cache", "cache_implementation", "cache_config", "prefill_chunk_size", "disable_compile", "compile_config"),
    *("logprobs", "prompt_logprobs", "detokenize", "skip_special_tokens", "spaces_between_special_tokens", "stop"),
    *("include_stop_str_in_output", "output_kind", "skip_reading_prefix_cache", "do_sample"),
}

_CHOICES = {
    "prior": get_args(Prior),
    "chunk_overlap": get_args(Overlap),
    "chunk_placement": get_args(Placement),
    "chunk_selection": get_args(Selection),
    "loss_normalization": NORMALIZATIONS,
    "posterior_baseline": BASELINES,
    "vllm_mode": ("colocate", "server"),  # TRL's
    "teacher_continuation": (None, *get_args(Continuation)),
    "signal": get_args(Signal),
    "audit_trajectories": AUDIT_TRAJECTORIES,
}

_COUNTS = (
    *("num_chunks", "chunk_length", "min_chunk_length", "num_rollouts", "num_eval_generations", "min_rollouts"),
    *("teacher_max_concurrency", "teacher_max_attempts", "teacher_budget_tokens"),
    *("rollout_imitation_tokens", "num_generations"),
    *("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"),
)

_SWITCHES = (
    *("ref_model_offload", "mask_truncated_completions", "save_audits", "audit_eval", "keep_special_tokens"),
    *("eval_lenient_answers", "importance_sampling_correction", "scale_advantages"),
)

# Options that must be at least 0, and options that must be above 0.
_AT_LEAST_ZERO = (
    *("beta", "prior_strength", "teacher_temperature", "max_failed_chunks", "teacher_max_retry_after"),
    *("teacher_input_price", "teacher_output_price", "teacher_cached_price", "min_p", "min_anchor_entropy"),
    *("cascade_low", "cascade_high", "rollout_imitation", "reward_weight"),
)
_POSITIVE = (
    *("temperature", "top_p", "teacher_top_p", "teacher_timeout", "teacher_max_seconds", "teacher_budget_usd"),
    *("teacher_requests_per_minute", "teacher_tokens_per_minute", "repetition_penalty"),
    "importance_sampling_clip_max",
)


@dataclass
@with_help
class OmniOPDConfig(DistillationConfig):
    r"""
    Configuration class for the [`OmniOPDTrainer`].

    This class includes only the parameters that are specific to OmniOPD training. For a full list of training
    arguments, please refer to the [`~transformers.TrainingArguments`] and [`~trl.DistillationConfig`] documentation.
    Note that default values in this class may differ from those in [`~trl.DistillationConfig`].

    Using [`~transformers.HfArgumentParser`] we can turn this class into
    [argparse](https://docs.python.org/3/library/argparse#module-argparse) arguments that can be specified on the
    command line.

    Parameters:
        > Parameters that control the audits

        num_chunks (`int`, *optional*, defaults to `10`):
            Number of audited chunks per trajectory, M in the paper. A trajectory has fewer if it is too short for that
            many.
        chunk_length (`int`, *optional*, defaults to `50`):
            Number of student tokens per chunk, C in the paper. Must not exceed `max_completion_length`.
        min_chunk_length (`int`, *optional*, defaults to `8`):
            Minimum length of an audited trajectory in tokens. A trajectory that is shorter than `chunk_length` gives
            one chunk of its own length. A trajectory that is shorter than this value is not audited.
        num_rollouts (`int`, *optional*, defaults to `10`):
            Number of teacher continuations (rollouts) per chunk, N in the paper.
        first_rollouts (`int`, *optional*, defaults to `0`):
            Number of rollouts per chunk that are requested first. Where they are equal after the cut to the chunk's
            length, the rest of `num_rollouts` is not requested. At least 2, and below `num_rollouts`. `0` requests all
            at once, as in the paper. See docs/money.md.
        similarity (`str`, *optional*, defaults to `"edit"`):
            Similarity of a chunk and a rollout, with values in [0, 1], phi in the paper. One of `"edit"`, `"rouge1"`,
            `"rougeL"`, `"jaccard"`, `"bleu1"`, `"bleu2"`, `"exact"` or `"embedding"`. To use a custom function, pass
            it to the trainer as `similarity`.
        prior_strength (`float`, *optional*, defaults to `1.0`):
            Strength of the Dirichlet-multinomial prior, alpha in the paper. `0` gives the frequentist estimator.
        prior (`str`, *optional*, defaults to `"policy"`):
            Model whose probabilities form the prior of Eq. 4. `"policy"` is the current student, as in the paper's
            equations; `"reference"` is the initial student, as in the paper's text, and costs one forward pass of the
            reference model per trajectory.
        chunk_overlap (`str`, *optional*, defaults to `"resample"`):
            How to handle a chunk that overlaps a selected one. `"resample"` skips it and takes the next-highest
            entropy; `"merge"` selects exactly `num_chunks` anchor tokens and merges windows that overlap or touch.
        chunk_placement (`str`, *optional*, defaults to `"start"`):
            Position of a chunk relative to its anchor token. `"start"` begins the chunk at the anchor; `"center"`
            places the anchor in the middle.
        chunk_selection (`str`, *optional*, defaults to `"entropy"`):
            How to select the anchor tokens. `"entropy"` selects those with the highest entropy of the student;
            `"uniform"` draws them at random (the paper's ablation).
        min_anchor_entropy (`float`, *optional*, defaults to `0.0`):
            Only tokens whose entropy is above this are anchors, in nats. A trajectory then has fewer chunks, or none:
            where the student has no alternative, an answer of the teacher teaches little. `0` is the paper's method,
            without a limit.
        num_branches (`int`, *optional*, defaults to `0`):
            Number of further continuations that the student writes in the place of each chunk, K. They are compared
            with the same rollouts as the chunk, and all of them are trained, each by its advantage over the others.
            The teacher is asked only where they differ. `0` is the paper's method. See docs/branches.md.
        fork_candidates (`int`, *optional*, defaults to `0`):
            Number of chunks per trajectory for which branches are sampled, with `num_branches`. The `num_chunks` with
            the most diverse branches are kept. At least `num_chunks`; `0` samples for `num_chunks` only.
        scale_advantages (`bool`, *optional*, defaults to `False`):
            Whether to divide the advantages of a fork by their standard deviation, with `num_branches`. `"edit"` and
            other similarities with small differences need it.
        signal (`str`, *optional*, defaults to `"rollouts"`):
            What the teacher is asked for. `"rollouts"` are continuations that chunks are compared with, as in the
            paper. `"judge"` asks for a mark of each chunk, or of each branch, with one request per trajectory; the
            mark takes the place of the mean similarity, and counts as one observation. `"cascade"` asks for marks
            first, and for rollouts of the chunks whose marks are between `cascade_low` and `cascade_high`. The
            teacher must be able to follow an instruction. See docs/judge.md.
        cascade_low (`float`, *optional*, defaults to `0.3`):
            Chunks with a mark of at most this get no rollouts, with `signal="cascade"`: they are clearly bad.
        cascade_high (`float`, *optional*, defaults to `0.7`):
            Chunks with a mark of at least this get no rollouts, with `signal="cascade"`: they are clearly good.

        > Parameters that control the loss

        beta (`float`, *optional*, defaults to `0.1`):
            Weight of the anchor, `KL(ref || theta)` on un-audited tokens, beta in the paper. As in
            [`~trl.GRPOConfig`], it is the coefficient of a KL to a reference model, and values above 1 are allowed. It
            is not the interpolation coefficient that has this name in [`~trl.DistillationConfig`]. If `0`, the
            reference model is not loaded.
        loss_normalization (`str`, *optional*, defaults to `"tokens"`):
            How to normalize the loss of Eq. 8. `"tokens"` divides the whole loss by the number of completion tokens in
            the global batch; `"sum"` computes Eq. 8 per sequence and averages over sequences; `"components"` averages
            each of the two terms over its own tokens.
        posterior_baseline (`str`, *optional*, defaults to `"none"`):
            Baseline that is subtracted from the posterior means before they weight the chunk loss. `"none"` is the
            paper's method. `"batch"` subtracts the mean over the global batch; `"trajectory"` subtracts the mean of
            the other chunks of the same trajectory; `"moving_average"` subtracts the mean of earlier batches. The
            guarantees of Theorem 4.1 (a, b) hold for `"none"` only. Two controls replace the posteriors: `"shuffled"`
            permutes them among the chunks of the global batch, and `"constant"` gives every chunk their mean. To use a
            custom function, pass it to the trainer as `chunk_weights`.
        rollout_imitation (`float`, *optional*, defaults to `0.0`):
            Weight of a cross-entropy on the first tokens of the rollouts, after the student's own prefix, in addition
            to the loss of the chunks. It needs `min_anchor_entropy`. `0` is the paper's method, in which no text of
            the teacher is trained. See docs/imitation.md.
        rollout_imitation_tokens (`int`, *optional*, defaults to `3`):
            Number of student tokens of each rollout that are imitated, with `rollout_imitation`.
        importance_sampling_correction (`bool`, *optional*, defaults to `True`):
            Whether to correct the chunk loss where the student's tokens were not sampled from the policy that is
            trained: with `top_p`, `top_k` or `min_p`, and with vLLM, whose log-probabilities differ slightly. Each
            audited token is weighted by the truncated ratio of the two probabilities, as
            `vllm_importance_sampling_correction` does in [`~trl.GRPOConfig`], and with the three filters its
            log-probability is that of the filtered policy. Otherwise the sampler is the policy, and nothing changes.
        importance_sampling_clip_max (`float`, *optional*, defaults to `3.0`):
            Upper bound of the ratio of the policy's probability of a token to the sampler's, as
            `vllm_importance_sampling_clip_max` in [`~trl.GRPOConfig`].
        ref_model_init_kwargs (`str` or `dict[str, Any]`, *optional*):
            Keyword arguments for `AutoModelForCausalLM.from_pretrained` when loading the reference model, in addition
            to `model_init_kwargs`. If set, and the student is passed as an instance, the reference model is loaded
            from the student's path or id instead of copied.
        ref_model_offload (`bool`, *optional*, defaults to `False`):
            Whether to keep the reference model in CPU memory between uses. Each layer is on the device only while it
            computes, and is copied there once per micro-batch. It has no effect with LoRA, which needs no copy of the
            model.
        mask_truncated_completions (`bool`, *optional*, defaults to `False`):
            Whether to exclude completions that were truncated at `max_completion_length` from training. An excluded
            completion is neither audited nor anchored, and its tokens do not count in `loss_normalization`. By
            default, truncated completions are trained on like any other, since the audits judge chunks and not the
            end.

        > Parameters that control the verifier

        num_generations (`int`, *optional*, defaults to `1`):
            Number of trajectories per prompt and step, G, as in [`~trl.GRPOConfig`]. The trajectories of a step
            (`per_device_train_batch_size` x `gradient_accumulation_steps` x processes) must be divisible by it, and a
            step has G times fewer prompts.
        reward_weight (`float`, *optional*, defaults to `0.0`):
            Weight of a policy gradient on rewards, in addition to the loss of Eq. 8. Each completion token is
            reinforced by this times the advantage of its trajectory, the reward minus the mean of its group. Needs
            `num_generations` of at least 2. `0` adds nothing. See docs/verifier.md.
        reward_weights (`list[float]`, *optional*):
            Weight of each reward function in the reward, as in [`~trl.GRPOConfig`]. Defaults to 1 for each.
        audit_trajectories (`str`, *optional*, defaults to `"all"`):
            Trajectories that the teacher is asked about. `"all"` is the paper's method. `"wrong"` leaves out those
            whose reward functions all give at least 1; `"mixed"` leaves out the groups whose rewards are all equal.
            No request is sent for the others, and their tokens are un-audited.

        > Parameters that control the teacher

        teacher_temperature (`float`, *optional*, defaults to `1.0`):
            Sampling temperature of the teacher. `0` is greedy decoding, which makes all rollouts of a chunk equal.
        teacher_top_p (`float`, *optional*, defaults to `1.0`):
            Top-p (nucleus) sampling parameter of the teacher.
        teacher_chat_template_kwargs (`str` or `dict[str, Any]`, *optional*):
            Keyword arguments for the teacher's chat template. A local model and your own server default to the
            student's `chat_template_kwargs`; closed services get none. `{}` passes none.
        teacher_context_column (`str`, *optional*):
            Column of the dataset that only the teacher sees, beside the prompt: a reference solution, an answer, a
            rubric or feedback. The student's prompt is unchanged. Needed in an evaluation set if the teacher is asked
            there (`audit_eval`, `evaluate_teacher`). By default, the teacher sees what the student sees.
        teacher_context_template (`str`, *optional*):
            Template of the teacher's prompt, with `{prompt}` and `{context}` once each. It replaces a prompt of plain
            text, and the content of the last message of the user in a conversation. By default, the context comes
            before the prompt, with the request to neither mention nor quote it.
        keep_special_tokens (`bool`, *optional*, defaults to `False`):
            Whether the teacher's prefix keeps the special tokens inside the student's text, such as gpt-oss's
            `<|channel|>`. By default they are left out, since they mean nothing to a teacher of another family.
        min_rollouts (`int`, *optional*, defaults to `1`):
            Minimum number of rollouts per chunk. A chunk with fewer is dropped, and its tokens count as un-audited.
        max_failed_chunks (`float`, *optional*, defaults to `0.2`):
            Maximum fraction of the chunks of a batch that may be dropped. If more are dropped, the run saves a
            checkpoint and stops.

        > Parameters that control a teacher behind a service

        teacher_base_url (`str`, *optional*):
            Base URL of the service, for example `http://127.0.0.1:8000/v1` for a `vllm:` or `openai:` teacher.
            Defaults to the SDK's own.
        teacher_tokenizer_name_or_path (`str`, *optional*):
            Tokenizer whose chat template renders the prompts of a `raw` continuation, for a `vllm:` or `openai:`
            teacher. Defaults to the teacher's name.
        teacher_continuation (`str`, *optional*):
            How to ask the teacher to continue the student's text: `"raw"`, `"continue_final"`, `"prefill"`,
            `"prefix_flag"` or `"instruct"`. Defaults to what the model is known to support.
        teacher_extra_body (`str` or `dict[str, Any]`, *optional*):
            Fields that are added to the body of each request, for example `{"top_k": 40}`. They replace the teacher's
            own fields of the same name; `null` as a value leaves a field out. No secrets: keys are read from the
            environment.
        teacher_extra_headers (`str` or `dict[str, str]`, *optional*):
            Headers that are added to each request, for example `{"X-Title": "distillation"}`. No secrets: keys are
            read from the environment.
        teacher_max_concurrency (`int`, *optional*, defaults to `64`):
            Maximum number of requests in flight, over all processes of the job.
        teacher_requests_per_minute (`float`, *optional*):
            Maximum number of requests per minute, over all processes of the job. No limit by default.
        teacher_tokens_per_minute (`float`, *optional*):
            Maximum number of prompt and completion tokens per minute, over all processes of the job. No limit by
            default.
        teacher_timeout (`float`, *optional*, defaults to `120.0`):
            Timeout of one attempt of a request, in seconds.
        teacher_max_attempts (`int`, *optional*):
            Maximum number of attempts per request, including the first. Defaults to as many as fit into
            `teacher_max_seconds`, of which at most six may be ones that the service may charge for (no answer, or an
            answer that cannot be read).
        teacher_max_seconds (`float`, *optional*, defaults to `600.0`):
            Maximum time for all attempts of a request, including the waits between them, in seconds.
        teacher_max_retry_after (`float`, *optional*, defaults to `120.0`):
            Longest wait that the service may ask for, in seconds. A longer one stops the run.
        teacher_budget_usd (`float`, *optional*):
            Maximum amount that the job may spend, in US dollars, including earlier runs with the same `output_dir`. A
            request is sent only if its worst case fits into the budget. See docs/money.md for what the budget does not
            cover, such as a service that uses more tokens than requested, or a change of prices.
        teacher_budget_tokens (`int`, *optional*):
            Maximum number of prompt and completion tokens that the job may use, including earlier runs with the same
            `output_dir`. A request is sent only if its worst case fits into the budget (see docs/money.md).
        teacher_input_price (`float`, *optional*):
            Price of prompt tokens, in US dollars per million. Defaults to the price in genai-prices.
        teacher_output_price (`float`, *optional*):
            Price of completion tokens, in US dollars per million. Defaults to the price in genai-prices.
        teacher_cached_price (`float`, *optional*):
            Price of prompt tokens that are read from a cache, in US dollars per million. Defaults to
            `teacher_input_price` if that is set, and to the price in genai-prices otherwise.
        save_audits (`bool`, *optional*, defaults to `True`):
            Whether to write trajectories and audits to a journal in `output_dir` before they are used. A run with
            `resume_from_checkpoint` replays the journal and does not pay for them again.

        > Parameters that control the evaluation

        audit_eval (`bool`, *optional*, defaults to `False`):
            Whether to ask the teacher for audits during evaluation as well. By default, evaluation reports the KL, the
            entropy and, if the evaluation set has a column `answer`, `solution` or `tests`, pass@1.
        num_eval_generations (`int`, *optional*, defaults to `1`):
            Number of samples per evaluation problem. pass@1 is averaged over them.
        eval_lenient_answers (`bool`, *optional*, defaults to `False`):
            Whether an answer that is not a plain number can be right where the right answer is one. By default
            `Answer: 12 + 30 - 5` is wrong where 37 is right, since it may repeat the question.

        > Parameters that control the logging

        log_completions (`bool`, *optional*, defaults to `False`):
            Whether to log the completions and the audited chunks of the last step every `logging_steps` steps, and
            those of each evaluation. Both tables are printed, written to `completions/` in `output_dir`, and sent to
            W&B and Trackio; the audits also to TensorBoard and Comet.
        num_completions_to_print (`int`, *optional*):
            Number of completions, and of audited chunks, to print. Defaults to all completions and five chunks. The
            chunks are evenly spaced by their posterior, and with branches by their advantage.

    > [!NOTE]
    > These parameters have default values different from [`~trl.DistillationConfig`]:
    > - `beta`: Defaults to `0.1` instead of `1.0`, and has another meaning.
    """

    _VALID_DICT_FIELDS = [  # noqa: RUF012 (as the base class declares it; an annotation would make it a field)
        *DistillationConfig._VALID_DICT_FIELDS,
        "ref_model_init_kwargs",
        "teacher_chat_template_kwargs",
        "teacher_extra_body",
        "teacher_extra_headers",
    ]

    # Parameters that control the audits
    num_chunks: int = 10
    chunk_length: int = 50
    min_chunk_length: int = 8
    num_rollouts: int = 10
    first_rollouts: int = 0
    similarity: str = "edit"
    prior_strength: float = 1.0
    prior: str = "policy"
    chunk_overlap: str = "resample"
    chunk_placement: str = "start"
    chunk_selection: str = "entropy"
    min_anchor_entropy: float = 0.0
    num_branches: int = 0
    fork_candidates: int = 0
    scale_advantages: bool = False
    signal: str = "rollouts"
    cascade_low: float = 0.3
    cascade_high: float = 0.7

    # Parameters that control the loss
    beta: float = 0.1
    loss_normalization: str = "tokens"
    posterior_baseline: str = "none"
    rollout_imitation: float = 0.0
    rollout_imitation_tokens: int = 3
    importance_sampling_correction: bool = True
    importance_sampling_clip_max: float = 3.0
    ref_model_init_kwargs: dict[str, Any] | str | None = None
    ref_model_offload: bool = False
    mask_truncated_completions: bool = False

    # Parameters that control the verifier
    num_generations: int = 1
    reward_weight: float = 0.0
    reward_weights: list[float] | None = None
    audit_trajectories: str = "all"

    # Parameters that control the teacher
    teacher_temperature: float = 1.0
    teacher_top_p: float = 1.0
    teacher_chat_template_kwargs: dict[str, Any] | str | None = None
    teacher_context_column: str | None = None
    teacher_context_template: str | None = None
    keep_special_tokens: bool = False
    min_rollouts: int = 1
    max_failed_chunks: float = 0.2

    # Parameters that control a teacher behind a service
    teacher_base_url: str | None = None
    teacher_tokenizer_name_or_path: str | None = None
    teacher_continuation: str | None = None
    teacher_extra_body: dict[str, Any] | str | None = None
    teacher_extra_headers: dict[str, Any] | str | None = None
    teacher_max_concurrency: int = 64
    teacher_requests_per_minute: float | None = None
    teacher_tokens_per_minute: float | None = None
    teacher_timeout: float = 120.0
    teacher_max_attempts: int | None = None
    teacher_max_seconds: float = 600.0
    teacher_max_retry_after: float = 120.0
    teacher_budget_usd: float | None = None
    teacher_budget_tokens: int | None = None
    teacher_input_price: float | None = None
    teacher_output_price: float | None = None
    teacher_cached_price: float | None = None
    save_audits: bool = True

    # Parameters that control the evaluation
    audit_eval: bool = False
    num_eval_generations: int = 1
    eval_lenient_answers: bool = False

    # Parameters that control the logging
    log_completions: bool = False
    num_completions_to_print: int | None = None

    def __post_init__(self):
        self._check_compilation()
        self._check_numbers()
        if self.deepspeed:
            find_extra("deepspeed", "deepspeed")
        for name in ("gradient_checkpointing", "gradient_checkpointing_kwargs"):
            # The names since transformers 5.23. TRL sets the old ones, for which transformers logs a warning.
            renamed = name.replace("gradient", "activation")
            if getattr(self, renamed, "") is None:
                setattr(self, renamed, getattr(self, name))
        self.max_grad_norm = self.max_grad_norm or 0.0  # `None` would raise an error after the first paid batch
        # In the base class, `beta` is an interpolation coefficient, and values outside of [0, 1] are refused.
        beta, self.beta = self.beta, 0.0
        try:
            super().__post_init__()
        except ValueError as error:
            if "bf16/gpu" in str(error):
                name = "bf16" if self.bf16 else "bf16_full_eval"
                raise ConfigError(
                    f"{name}=True needs a GPU with bf16, and this machine has none (`bf16` is on by default). For a "
                    "small student on the CPU, set use_cpu=True and bf16=False."
                ) from error
            raise ConfigError(" ".join(str(error).split())) from error
        self.beta = beta
        # `hub_token` is an option of the Trainer and works as there. The training command refuses it.
        check_credentials({f.name: getattr(self, f.name) for f in fields(self) if f.name != "hub_token"})
        self._check_choices()
        self._check_inherited()
        self._warn_about_policy()
        if self.trackio_static_space_id is None:
            # By default, a push publishes the logs of Trackio, too, whose tables may hold what the teacher wrote.
            self.trackio_static_space_id = False
        if self.ddp_find_unused_parameters is None and (self.gradient_checkpointing_kwargs or {}).get("use_reentrant"):
            # transformers turns on the search for unused parameters for LoRA. Reentrant checkpointing fails with it,
            # and no parameter is unused.
            self.ddp_find_unused_parameters = False

    def _check_compilation(self) -> None:
        """Checked before the base class, which sets environment variables for these options."""
        by_launcher = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no")
        if self.torch_compile or self.torch_compile_backend or self.torch_compile_mode or by_launcher.lower() != "no":
            raise ConfigError(
                f"torch_compile={self.torch_compile}, torch_compile_backend={self.torch_compile_backend!r}, "
                f"torch_compile_mode={self.torch_compile_mode!r}, `dynamo_backend` of accelerate {by_launcher!r}: the "
                "compiled forward would never be called, since the loss is computed from the hidden states. Leave "
                "them out."
            )

    def _check_numbers(self) -> None:
        # YAML keeps a quoted number as a string, and YAML 1.1 reads 1e-6 as a string as well.
        for name in ("learning_rate", *_AT_LEAST_ZERO, *_POSITIVE):
            value = getattr(self, name)
            if value is None and type(self).__dataclass_fields__[name].default is None:
                continue
            try:
                number = float(value)
            except (TypeError, ValueError):
                number = math.nan
            if isinstance(value, bool) or not math.isfinite(number):
                raise ConfigError(f"{name}={value!r} is not a finite number. Give it as a number.")
            if number < 0 or (number == 0 and name in _POSITIVE):
                raise ConfigError(f"{name}={value!r} must {'be above 0' if name in _POSITIVE else 'not be negative'}.")
            setattr(self, name, number)
        for name in _COUNTS:
            value = getattr(self, name)
            if value is None and type(self).__dataclass_fields__[name].default is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name}={value!r} must be a whole number of at least 1.")
        for name in ("num_branches", "fork_candidates", "first_rollouts"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ConfigError(f"{name}={value!r} must be a whole number of at least 0.")
        for name in ("teacher_top_p", "top_p", "min_p", "max_failed_chunks", "cascade_low", "cascade_high"):
            if (getattr(self, name) or 0.0) > 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at most 1.")
        # vLLM accepts -1 for no limit as well.
        least = -1 if self.use_vllm else 0
        if isinstance(self.top_k, bool) or not isinstance(self.top_k, int) or self.top_k < least:
            raise ConfigError(f"top_k={self.top_k!r} must be a whole number of at least 1, or 0 for no limit.")
        for name in _SWITCHES:
            # A string such as "no" would count as true.
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name}={getattr(self, name)!r} must be True or False.")
        if self.min_rollouts > self.num_rollouts:
            raise ConfigError(
                f"min_rollouts={self.min_rollouts} is more than num_rollouts={self.num_rollouts}, so every chunk "
                "would be dropped. Lower it."
            )
        least = max(2, self.min_rollouts)
        if self.first_rollouts and not least <= self.first_rollouts < self.num_rollouts:
            raise ConfigError(
                f"first_rollouts={self.first_rollouts} must be at least {least}, since one rollout cannot agree and "
                f"min_rollouts={self.min_rollouts} are needed, and less than num_rollouts={self.num_rollouts}. Set 0 "
                "to request all at once."
            )
        if (self.teacher_input_price is None) != (self.teacher_output_price is None):
            raise ConfigError(
                f"teacher_input_price={self.teacher_input_price} and teacher_output_price="
                f"{self.teacher_output_price}: give both prices or neither."
            )

    def _check_choices(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ConfigError(
                    f"{name}={getattr(self, name)!r} is unknown; choose one of {', '.join(filter(None, choices))}."
                )
        if not isinstance(self.similarity, str):
            raise ConfigError(
                f"similarity={self.similarity!r} is not a name. Pass a function to the trainer instead: "
                "OmniOPDTrainer(..., similarity=function)."
            )
        if self.similarity != "embedding":  # the embedding similarity would load a model here
            get_similarity(self.similarity)
        if isinstance(self.max_completion_length, bool) or not isinstance(self.max_completion_length, int):
            raise ConfigError(
                f"max_completion_length={self.max_completion_length!r} must be a whole number of tokens: generation "
                "and its memory need a bound."
            )
        if self.chunk_length > self.max_completion_length:
            raise ConfigError(
                f"chunk_length={self.chunk_length} is larger than max_completion_length={self.max_completion_length}, "
                "so no trajectory could hold a whole chunk. Lower `chunk_length` or raise "
                "`max_completion_length`."
            )
        if self.min_chunk_length > self.chunk_length:
            raise ConfigError(
                f"min_chunk_length={self.min_chunk_length} is larger than chunk_length={self.chunk_length}. Lower it: "
                "it is the shortest trajectory that still gives a chunk."
            )
        self._check_branches()
        self._check_verifier()
        TeacherContext(self.teacher_context_column, self.teacher_context_template)
        self._check_signal()
        self._check_imitation()
        if self.prior == "reference" and self.beta == 0 and self.prior_strength > 0:
            raise ConfigError(
                "prior='reference' needs the reference model, which beta=0 does not load. Set `beta` above 0, or "
                "prior='policy'."
            )

    def _check_branches(self) -> None:
        if not self.num_branches:
            for name, off in (("fork_candidates", 0), ("scale_advantages", False)):
                if getattr(self, name):
                    raise ConfigError(
                        f"{name}={getattr(self, name)} has no effect without branches. Set num_branches, to 7 for "
                        f"example, or {name}={off}."
                    )
            return
        if 0 < self.fork_candidates < self.num_chunks:
            raise ConfigError(
                f"fork_candidates={self.fork_candidates} is less than num_chunks={self.num_chunks}, and that many of "
                "them are kept. Raise it, or lower num_chunks."
            )
        if self.posterior_baseline not in ("none", "shuffled"):
            raise ConfigError(
                f"posterior_baseline={self.posterior_baseline!r} and num_branches={self.num_branches}: the mean of "
                "the other branches is the baseline of a branch. Leave it out; 'shuffled' is the control."
            )
        if self.prior == "reference":
            raise ConfigError(
                f"prior='reference' has no effect with num_branches={self.num_branches}: advantages do not use the "
                "prior, and it would cost a pass of the reference. Leave it out."
            )
        whole = sorted(_OF_WHOLE_COMPLETIONS & (self.generation_kwargs or {}).keys())
        if self.use_vllm and self.vllm_structured_outputs_regex is not None:
            whole.append("vllm_structured_outputs_regex")
        if whole:
            raise ConfigError(
                f"{whole[0]} with num_branches={self.num_branches}: it depends on where a completion begins, and a "
                "branch begins inside of one, so branches would be drawn from another distribution. Leave one of them "
                "out."
            )

    def _check_verifier(self) -> None:
        if self.num_generations == 1:
            alone = {
                "reward_weight": (self.reward_weight > 0, "the advantage over a group of one is 0"),
                "audit_trajectories": (self.audit_trajectories == "mixed", "the rewards of a group of one are equal"),
            }
            for name, (is_set, why) in alone.items():
                if is_set:
                    raise ConfigError(
                        f"{name}={getattr(self, name)!r} with num_generations=1: {why}. Set num_generations, to 4 for "
                        "example, or leave it out."
                    )
        weights = self.reward_weights
        if weights is None:
            return
        numbers = weights if isinstance(weights, list | tuple) else []
        is_number = [isinstance(w, int | float) and not isinstance(w, bool) and math.isfinite(w) for w in numbers]
        if not is_number or not all(is_number):
            raise ConfigError(f"reward_weights={weights!r} must hold one finite number for each reward function.")
        if self.uses_rewards and not any(w > 0 if self.audit_trajectories == "wrong" else w for w in numbers):
            raise ConfigError(
                f"reward_weights={weights!r} with reward_weight={self.reward_weight:g} and audit_trajectories="
                f"{self.audit_trajectories!r}: no reward function counts. Give one a weight"
                f"{' above 0' if self.audit_trajectories == 'wrong' else ''}, or leave them out."
            )

    def _check_signal(self) -> None:
        if self.signal != "cascade":
            for name in ("cascade_low", "cascade_high"):
                if getattr(self, name) != type(self).__dataclass_fields__[name].default:
                    raise ConfigError(
                        f"{name}={getattr(self, name):g} has no effect with signal={self.signal!r}. Set "
                        "signal='cascade', or leave it out."
                    )
        elif self.cascade_low >= self.cascade_high:
            raise ConfigError(
                f"cascade_low={self.cascade_low:g} is not below cascade_high={self.cascade_high:g}, so no mark is "
                "between them. Lower it, or set signal='judge'."
            )
        needs_rollouts = {"min_rollouts": self.min_rollouts > 1, "first_rollouts": self.first_rollouts > 0}
        for name in (name for name, is_set in needs_rollouts.items() if is_set and self.signal == "judge"):
            raise ConfigError(
                f"{name}={getattr(self, name)} with signal='judge': a chunk gets one mark and no rollouts. Leave it "
                "out."
            )

    def _check_imitation(self) -> None:
        if not self.rollout_imitation:
            if self.rollout_imitation_tokens != type(self).__dataclass_fields__["rollout_imitation_tokens"].default:
                raise ConfigError(
                    f"rollout_imitation_tokens={self.rollout_imitation_tokens} has no effect without imitation. Set "
                    "rollout_imitation, to 0.5 for example, or leave it out."
                )
            return
        if self.min_anchor_entropy == 0:
            raise ConfigError(
                f"rollout_imitation={self.rollout_imitation:g} without a gate: where the student has no alternative, "
                "it would be trained on the teacher's style. Set min_anchor_entropy, to 0.1 for example."
            )
        if self.signal == "judge":
            raise ConfigError(
                f"rollout_imitation={self.rollout_imitation:g} with signal='judge': there are no rollouts to imitate. "
                "Set signal='cascade' or 'rollouts', or leave it out."
            )
        if self.rollout_imitation_tokens > self.chunk_length:
            raise ConfigError(
                f"rollout_imitation_tokens={self.rollout_imitation_tokens} is more than chunk_length="
                f"{self.chunk_length}, to which rollouts are cut. Lower it."
            )

    def _check_inherited(self) -> None:
        """Refuse inherited options that have no effect here, or a wrong one."""
        self._check_generation_kwargs()
        if self.use_vllm and self.temperature > 2:
            raise ConfigError(
                f"temperature={self.temperature} is more than 2, the highest at which vLLM (since 0.24) generates. "
                "Lower it, or set use_vllm=False."
            )
        if self.use_vllm and "seed" in (self.generation_kwargs or {}):
            raise ConfigError(
                f"generation_kwargs={self.generation_kwargs!r} sets 'seed', which vLLM would use for every prompt "
                "and every step: samples of the same prompt would be equal. Leave it out."
            )
        if self.max_tool_calling_iterations is not None:
            raise ConfigError(
                f"max_tool_calling_iterations={self.max_tool_calling_iterations} has no meaning: tools are not "
                "supported yet. Leave it out."
            )
        if self.label_smoothing_factor:
            raise ConfigError(
                f"label_smoothing_factor={self.label_smoothing_factor} has no meaning: there are no labels, and the "
                "posterior weights the log-probabilities. Leave it out."
            )
        if self.neftune_noise_alpha is not None:
            raise ConfigError(
                f"neftune_noise_alpha={self.neftune_noise_alpha} would train another policy than the one that wrote "
                "the trajectory. Leave it out."
            )
        if "lomo" in self.optim or "layerwise" in self.optim:
            raise ConfigError(
                f"optim={str(self.optim.value)!r} updates weights during the backward pass of a micro-batch, before "
                "the others of the step and the check of the gradient. Use another optimizer."
            )
        if self.accelerator_config.split_batches:
            raise ConfigError(
                "accelerator_config={'split_batches': True} would divide `per_device_train_batch_size` by the number "
                "of processes. Leave it out, and set the size of a device's batch."
            )
        if self.remove_unused_columns:
            raise ConfigError(
                "remove_unused_columns=True would remove the columns that evaluation scores against. Set it to False."
            )
        if "inputs" in (self.include_for_metrics or []):
            raise ConfigError(
                f"include_for_metrics={self.include_for_metrics!r} passes the inputs to `compute_metrics`, and this "
                "trainer has none. Leave it out; `eval_reward_funcs` gets prompts, completions and all columns."
            )
        if self.include_num_input_tokens_seen not in (False, "no"):
            raise ConfigError(
                f"include_num_input_tokens_seen={self.include_num_input_tokens_seen!r} has no effect: the tokens seen "
                "are logged as `num_tokens`. Leave it out."
            )
        if self.train_sampling_strategy != "random":
            raise ConfigError(
                f"train_sampling_strategy={self.train_sampling_strategy!r} has no effect: the trainer has its own "
                "sampler, and groups the trajectories of a step by length. Leave it out; shuffle_dataset=False keeps "
                "the order of the dataset."
            )
        if self.auto_find_batch_size:
            raise ConfigError(
                "auto_find_batch_size=True would run a step again, and pay the teacher for it again, after an "
                "out-of-memory error. Set `per_device_train_batch_size` yourself."
            )

        if self.metric_for_best_model in ("loss", "eval_loss") and not self.audit_eval:
            raise ConfigError(
                f"metric_for_best_model={self.metric_for_best_model!r}, the default of load_best_model_at_end and of "
                "lr_scheduler_type='reduce_lr_on_plateau': without audit_eval the evaluation loss is the distance "
                "from the initial student, and the best model would be the one that has learned least. Set "
                "metric_for_best_model='eval_pass@1' with greater_is_better=True, or another metric."
            )

    def _check_generation_kwargs(self) -> None:
        kwargs: dict[str, Any] = self.generation_kwargs or {}
        for key in kwargs.keys() & _REFUSED_GENERATION_KWARGS.keys():
            if key == "do_sample" and kwargs[key] is True and not self.use_vllm:
                continue  # as the base class samples
            field_name = _REFUSED_GENERATION_KWARGS[key]
            use = f"Use the field `{field_name or key}` of the configuration" if field_name != "" else "Leave it out"
            raise ConfigError(
                f"generation_kwargs={kwargs!r} sets {key!r}, which would change the sampled text or its end, "
                f"while the trained log-probabilities stay those of the plain student. {use}."
            )
        if self.use_vllm:  # vLLM refuses unknown keys itself
            return
        unknown = kwargs.keys() - vars(GenerationConfig()).keys()
        if unknown:
            raise ConfigError(
                f"generation_kwargs={kwargs!r} sets {sorted(unknown)[0]!r}, which is not a field of transformers' "
                "GenerationConfig and would be ignored. Correct its name, or leave it out."
            )

    @property
    def uses_rewards(self) -> bool:
        """Whether rewards have an effect on training: on the loss, or on what the teacher is asked."""
        return self.reward_weight > 0 or self.audit_trajectories != "all"

    def reward_weights_of(self, names: Sequence[str]) -> list[float]:
        """The weight of each reward function.

        Args:
            names: names of the functions.

        Raises:
            ConfigError: when `reward_weights` has another length.
        """
        weights = [1.0] * len(names) if self.reward_weights is None else self.reward_weights
        if len(weights) != len(names):
            raise ConfigError(
                f"reward_weights={weights!r} has {len(weights)} numbers, and there are {len(names)} reward functions: "
                f"{', '.join(names)}. Give one for each."
            )
        return weights

    @property
    def teacher_context(self) -> TeacherContext:
        """What only the teacher sees."""
        return TeacherContext(self.teacher_context_column, self.teacher_context_template)

    @property
    def sampling_filters(self) -> list[str]:
        """The settings in use that change the student's distribution beyond its temperature, as `name=value`."""
        filters = {
            "top_p": self.top_p < 1,
            "top_k": self.top_k > 0,  # -1 means no limit in vLLM
            "min_p": bool(self.min_p),
            "repetition_penalty": self.repetition_penalty != 1,
            "vllm_structured_outputs_regex": self.use_vllm and self.vllm_structured_outputs_regex is not None,
        }
        used = [f"{name}={getattr(self, name)!r}" for name, is_used in filters.items() if is_used]
        kwargs: dict[str, Any] = self.generation_kwargs or {}
        others = {k: v for k, v in kwargs.items() if k not in _HARMLESS_GENERATION_KWARGS and v is not None}
        return used + ([f"generation_kwargs={others!r}"] if others else [])

    @property
    def corrected_filters(self) -> SamplingFilters | None:
        """The filters whose effect on the chunk loss is corrected; `None` when there are none, or others besides."""
        if not self.importance_sampling_correction:
            return None
        names = [used.partition("=")[0] for used in self.sampling_filters]
        if not names or not set(names) <= {"top_k", "top_p", "min_p"}:
            return None
        return SamplingFilters(max(self.top_k, 0), self.top_p, self.min_p or 0.0)

    def _warn_about_policy(self) -> None:
        used = self.sampling_filters
        if used:
            correction = (
                "The chunk loss is corrected for it (importance_sampling_correction)"
                if self.corrected_filters is not None
                else "Nothing corrects this, and the student drifts towards what the filter keeps"
            )
            # The advantages of branches are centered already.
            baseline = " posterior_baseline='batch' also removes most of this drift." if not self.num_branches else ""
            logger.warning(
                f"{', '.join(used)} makes the student sample from a filtered distribution, while entropies and "
                "log-probabilities are those of the full distribution at `temperature`. Training is then not exactly "
                f"on-policy. {correction}.{baseline}"
            )
        if self.teacher_temperature == 0 and self.num_rollouts > 1 and self.signal != "judge":
            logger.warning(
                f"teacher_temperature=0 makes all num_rollouts={self.num_rollouts} rollouts of a chunk equal. Set "
                "num_rollouts=1 to pay for one."
            )
