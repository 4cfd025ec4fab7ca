# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Checks of the inputs before a model is loaded, and whether the teacher answers."""

import re
from collections.abc import Iterable
from itertools import islice
from typing import Any

import transformers
from accelerate.utils import is_peft_model
from datasets import Dataset, IterableDataset
from torch import nn
from transformers import AutoConfig, BitsAndBytesConfig, PretrainedConfig, PreTrainedTokenizerBase
from transformers.integrations import get_reporting_integration_callbacks
from transformers.utils import logging
from trl.trainer.utils import get_config_model_id

from omniopd_trl.data.checks import check_dataset, check_prompt_lengths, prompts_per_step
from omniopd_trl.data.datasets import named_datasets
from omniopd_trl.data.encoding import special_tokens_of_answers
from omniopd_trl.errors import ConfigError, DataError, NoRolloutError, find_extra, first_line
from omniopd_trl.models.loading import load_tokenizer, why_not_loaded
from omniopd_trl.teachers import Teacher
from omniopd_trl.teachers.context import NO_CONTEXT, TeacherContext
from omniopd_trl.teachers.instruct.judge import Passage, render_question
from omniopd_trl.trainer.distributed import warn_about_lost_processes
from omniopd_trl.trainer.omniopd_config import OmniOPDConfig
from omniopd_trl.trainer.plan import num_steps

logger = logging.get_logger(__name__)

# Prompts that the teacher is asked with at the start, when it returns nothing for the ones before.
PROBE_PROMPTS = 3
# What a judge is asked to mark before there is a trajectory.
_NOTHING = [Passage("", "", ("",))]


def check_inputs(
    model: Any,
    args: OmniOPDConfig,
    train_dataset: Any,
    eval_dataset: Any,
    processing_class: PreTrainedTokenizerBase | None,
    quantization_config: Any,
) -> PreTrainedTokenizerBase:
    """Check the settings, the data and the student's configuration before a model is loaded.

    Returns:
        The student's tokenizer, which is loaded when `processing_class` is `None`.

    Raises:
        ConfigError: when settings contradict each other, or do not fit the data or the student.
        DataError: when the data cannot be used.
        MissingExtraError: when an optional dependency is not installed.
    """
    warn_about_lost_processes(args.world_size)
    check_reporting(args)
    check_bitsandbytes(args, quantization_config)
    for name, dataset in named_datasets(train_dataset, eval_dataset):
        check_dataset(dataset, name)
        if dataset is train_dataset or args.audit_eval:
            args.teacher_context.check(dataset, name)
    config = config_of(model, args)
    processing_class = processing_class or tokenizer_of(model, args)
    if not isinstance(processing_class, PreTrainedTokenizerBase):
        raise ConfigError(
            f"processing_class is a {type(processing_class).__name__}, but only text is supported yet. Pass the "
            "tokenizer."
        )
    check_student_config(model, config, args)
    check_tokenizer(processing_class, config)
    warn_about_special_tokens(processing_class, args)
    check_vllm_can_follow(config, args, quantization_config)
    context_length = context_length_of(config)
    if args.use_vllm and args.vllm_mode == "colocate" and args.vllm_max_model_length is not None:
        context_length = min(args.vllm_max_model_length, context_length or args.vllm_max_model_length)
    for name, dataset in named_datasets(train_dataset, eval_dataset):
        check_prompt_lengths(
            dataset,
            processing_class,
            name=name,
            chat_template_kwargs=args.chat_template_kwargs,
            context_length=context_length,
            max_completion_length=args.max_completion_length,
            vocab_size=getattr(config.get_text_config(), "vocab_size", None),
        )
    if isinstance(train_dataset, IterableDataset) and args.data_seed is not None:
        raise ConfigError(
            f"data_seed={args.data_seed} has no effect on a streaming dataset, which is shuffled with `seed`. Leave "
            "it out."
        )
    sizes = (args.per_device_train_batch_size, args.gradient_accumulation_steps, args.world_size)
    prompts_per_step(*sizes, args.num_generations)
    if train_dataset is not None:
        rows = len(train_dataset) if isinstance(train_dataset, Dataset) else None
        num_steps(args, rows, args.world_size, args.num_generations)
    return processing_class


def check_reporting(args: OmniOPDConfig) -> None:
    """Create the integrations that `report_to` names once, as the base class does after it has loaded the student.

    Raises:
        ConfigError: when there is no such integration, or its package is not installed.
    """
    try:
        for integration in get_reporting_integration_callbacks(args.report_to):
            integration()
    except (RuntimeError, ValueError, ImportError) as error:
        raise ConfigError(
            f"report_to={args.report_to!r} cannot be used: {first_line(error)} Otherwise leave it out of `report_to`."
        ) from error


def check_bitsandbytes(args: OmniOPDConfig, quantization_config: Any) -> None:
    """Check the package of a quantized student, or of an optimizer that is otherwise missed when training begins.

    Raises:
        MissingExtraError: when it is not installed.
    """
    optimizers = r"paged_|\w*bnb|(adamw|lion|ademamix)_(8|32)bit|ademamix"
    if isinstance(quantization_config, BitsAndBytesConfig) or re.match(optimizers, args.optim):
        find_extra("bitsandbytes", "bitsandbytes")


def tokenizer_of(model: Any, args: OmniOPDConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of the student's name.

    Raises:
        DataError: when it cannot be loaded.
    """
    name, revision = model, (args.model_init_kwargs or {}).get("revision")
    if not isinstance(model, str):
        name, revision = get_config_model_id(model.config), None
    try:
        return load_tokenizer(name, revision, args.trust_remote_code)
    except DataError as error:
        raise DataError(f"{error} Or pass `processing_class`.") from error


def config_of(model: Any, args: OmniOPDConfig) -> PretrainedConfig:
    """Configuration of the student, without its weights.

    Raises:
        ConfigError: when the student is neither a name nor a model.
        DataError: when there is no model of this name.
    """
    if not isinstance(model, str):
        if not isinstance(getattr(model, "config", None), PretrainedConfig):
            raise ConfigError(
                f"model={model!r:.100} is a {type(model).__name__}; it must be the path of a model, an id on the Hub, "
                "or an instance of a `transformers` model. For a `Path`, pass `str(path)`."
            )
        return model.config
    try:
        return AutoConfig.from_pretrained(
            model,
            revision=(args.model_init_kwargs or {}).get("revision"),
            trust_remote_code=args.trust_remote_code,
        )
    except (OSError, ValueError) as error:
        raise DataError(f"The student {model!r} cannot be loaded: {why_not_loaded(model, error)}") from error


def context_length_of(config: PretrainedConfig) -> int | None:
    """Maximum number of positions of the student; `None` when its configuration does not state it."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def check_student_config(model: Any, config: PretrainedConfig, args: OmniOPDConfig) -> None:
    """Check what the student is, before a model is loaded.

    Args:
        model: name, path or instance of the student.
        config: configuration of the student.
        args: the configuration of the run.

    Raises:
        ConfigError: when the student is not a causal language model, or asks for a loss of its routers.
    """
    if config.is_encoder_decoder:
        raise ConfigError(
            f"The student is an encoder-decoder ({config.model_type}), but its completions have to continue its "
            "prompts. Use a decoder-only model."
        )
    if isinstance(model, str):
        if not config.architectures:
            raise ConfigError(
                f"The configuration of the student {model!r} names no architecture. Save the model again with "
                "`save_pretrained`, or add `architectures` to its config.json."
            )
        kind = getattr(transformers, config.architectures[0], None)  # `None` for custom code
    else:
        kind = type(model.get_base_model() if is_peft_model(model) else model)
    if kind is not None and hasattr(kind, "can_generate") and not kind.can_generate():
        raise ConfigError(
            f"The student, a {kind.__name__}, cannot generate: it has no LM head, or is no GenerationMixin. Use a "
            "causal language model, such as the ...ForCausalLM of the same family."
        )
    text, asked = config.get_text_config(), args.model_init_kwargs or {}
    routed = asked.get("output_router_logits", getattr(text, "output_router_logits", False))
    coefficient = asked.get("router_aux_loss_coef", getattr(text, "router_aux_loss_coef", 0.0) if routed else 0.0)
    if coefficient:
        raise ConfigError(
            f"router_aux_loss_coef={coefficient}: the loss of Eq. 8 has no load-balancing loss of the routers, so it "
            "has no effect. Leave it out of `model_init_kwargs`, and set output_router_logits=False there."
        )
    for name in ("router_jitter_noise", "input_jitter_noise"):
        noise = asked.get(name, getattr(text, name, None))
        if noise and args.process_index == 0:
            logger.warning(
                f"{name}={noise}: the routers of the student's experts are noisy in training, so the gradient is "
                "that of another policy than the one that samples. Set it to 0 with "
                f"model_init_kwargs={{'{name}': 0.0}}."
            )


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> None:
    """Check that the student has an embedding for the tokens of its tokenizer, before a model is loaded.

    Raises:
        DataError: when there is no end-of-sequence token, or it or the padding token has no embedding.
    """
    num_embeddings: int | None = getattr(config.get_text_config(), "vocab_size", None)
    if tokenizer.eos_token_id is None:
        raise DataError(
            "The student's tokenizer has no end-of-sequence token, so no completion could end. Set "
            "`tokenizer.eos_token` to the token that ends an answer, and pass the tokenizer as `processing_class` or "
            "save it with `tokenizer.save_pretrained`."
        )
    if num_embeddings is None:
        return
    for name in ("eos_token", "pad_token"):
        token_id = getattr(tokenizer, f"{name}_id")
        if token_id is not None and not 0 <= token_id < num_embeddings:
            advice = "`tokenizer.pad_token = tokenizer.eos_token`, or " if name == "pad_token" else ""
            raise DataError(
                f"The student's tokenizer has {name}={getattr(tokenizer, name)!r} with the id {token_id}, and the "
                f"student's embedding has {num_embeddings} rows. Set {advice}a token of the model's vocabulary, or "
                "resize the embedding with `model.resize_token_embeddings(len(tokenizer))`."
            )
    if len(tokenizer) > num_embeddings:
        # No error: some models have tokens for images in the tokenizer only.
        logger.warning(
            f"The student's tokenizer has {len(tokenizer)} tokens, and its embedding {num_embeddings} rows: a prompt "
            f"with the token {tokenizer.convert_ids_to_tokens(num_embeddings)!r} or a later one will fail. If you "
            "added tokens, save the student after `model.resize_token_embeddings(len(tokenizer))`."
        )


def warn_about_special_tokens(tokenizer: PreTrainedTokenizerBase, args: OmniOPDConfig) -> None:
    """Say that the teacher does not get special tokens that the student writes into its answers."""
    if args.keep_special_tokens or tokenizer.chat_template is None or args.process_index != 0:
        return
    tokens = special_tokens_of_answers(tokenizer, args.chat_template_kwargs)
    if tokens:
        logger.warning(
            f"The student's chat template puts the special tokens {', '.join(tokens)} into answers, and the teacher "
            "gets the student's text without them. Set keep_special_tokens=True if the teacher is of the same family "
            "and knows them."
        )


def check_vllm_can_follow(config: PretrainedConfig, args: OmniOPDConfig, quantization_config: Any) -> None:
    """Check that the student's weights can be sent to vLLM after each step.

    Raises:
        ConfigError: when the student is quantized. Merging adapters into 4-bit weights rounds most of an update away,
            and each transfer would change the base model, which is the reference.
    """
    if not args.use_vllm:
        return
    held = getattr(config, "quantization_config", None)
    if quantization_config is not None or held is not None:
        raise ConfigError(
            "use_vllm=True with a quantized student: its adapters would be merged into quantized weights for each "
            "transfer, which loses most of the update and changes the reference. Set use_vllm=False, or train LoRA on "
            "a student that is not quantized."
        )


def check_own_weights(model: Any, teacher: Any) -> None:
    """Check that a teacher does not compute with the weights of the student.

    Args:
        model: name, path or instance of the student.
        teacher: name, model or teacher, such as a `LocalTeacher` with a model.

    Raises:
        ConfigError: when it does: it would be trained with the student, or freeze it.
    """
    other = getattr(teacher, "model", teacher)
    if not (isinstance(model, nn.Module) and isinstance(other, nn.Module)):
        return
    weights = {id(parameter) for parameter in model.parameters()}
    if any(id(parameter) in weights for parameter in other.parameters()):
        raise ConfigError(
            "The teacher has the weights of the student's instance, and would be trained with it. Pass the path of "
            "the model as `teacher_model`, or another instance (`copy.deepcopy(model)`)."
        )


def check_prompts(
    teacher: Teacher,
    datasets: Iterable[tuple[str, Any]],
    context: TeacherContext = NO_CONTEXT,
    *,
    signal: str = "rollouts",
) -> None:
    """Check that a teacher can render every prompt of the map-style datasets, without asking it.

    Args:
        teacher: the teacher.
        datasets: the datasets with their names.
        context: what only the teacher sees. An evaluation set need not have it.
        signal: what the teacher is asked for. A judge renders a question about a prompt, and has to have a chat
            template. All questions have the same two turns.

    Raises:
        DataError: when it cannot, with the row.
    """
    if type(teacher).check_prompt is Teacher.check_prompt:
        return
    if signal != "rollouts":
        teacher.check_prompt(render_question("", _NOTHING))
    if signal == "judge":
        return
    for name, dataset in datasets:
        if isinstance(dataset, Dataset):
            seen = context if context.column in dataset.column_names else NO_CONTEXT
            columns = ["prompt"] if seen.column is None else ["prompt", seen.column]
            for index, row in enumerate(dataset.select_columns(columns)):
                try:
                    teacher.check_prompt(seen.prompt(row))
                except DataError as error:
                    raise DataError(f"Row {index} of `{name}`: {error}") from error


def probe_teacher(
    teacher: Teacher,
    datasets: Iterable[tuple[str, Any]],
    context: TeacherContext = NO_CONTEXT,
    *,
    signal: str = "rollouts",
) -> None:
    """Send the teacher one question as a check: the first prompt of the first dataset, or a judge's question about it.

    If the teacher returns nothing for a prompt, it is asked with the next one, `PROBE_PROMPTS` in all. The arguments
    are those of [`check_prompts`].

    Raises:
        DataError: when the teacher cannot render the question.
        TeacherError: when the teacher does not answer.
    """
    for _, dataset in islice(datasets, 1):
        prompts = [context.prompt(row) for row in islice(dataset, PROBE_PROMPTS)]
        if signal == "judge":  # which need not be able to render the prompts themselves
            prompts = [render_question(prompt, _NOTHING) for prompt in prompts]
        for index, prompt in enumerate(prompts, start=1):
            try:
                teacher.probe(prompt)
            except NoRolloutError as error:
                if index == len(prompts):
                    raise
                logger.warning(f"{error} It is asked again, with another prompt of the dataset.")
            else:
                break
