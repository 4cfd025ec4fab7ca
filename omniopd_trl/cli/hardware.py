# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Memory per GPU and time per step of a recipe, for `omniopd cost --gpu`."""

import argparse
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from omniopd_trl.accounting.hardware import GIB, GPUS, Forks, Packing, Shape, known_shape
from omniopd_trl.accounting.job import LAUNCHES, Job, Launch
from omniopd_trl.errors import ConfigError, DataError

if TYPE_CHECKING:
    from omniopd_trl.accounting.forecast import Load
    from omniopd_trl.trainer.omniopd_config import OmniOPDConfig

_8BIT = ("adamw_bnb_8bit", "adamw_8bit")
_ADAMW = ("adamw_torch", "adamw_torch_fused", *_8BIT)
_PACKINGS: dict[str, Packing] = {"sdpa": "mask", "eager": "mask", "flex_attention": "blocks"}
_HALF = ("bfloat16", "float16", "auto")  # the checkpoints of today's students are in bfloat16


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options about GPUs to the parser of `omniopd cost`."""
    parser.add_argument(
        "--gpu",
        choices=GPUS,
        metavar="NAME",
        help="add the memory per GPU and the seconds per step on `num_processes` GPUs of this kind, and whether the "
        f"recipe fits: one of {', '.join(GPUS)}",
    )
    parser.add_argument(
        "--accelerate_config",
        choices=LAUNCHES,
        metavar="NAME",
        help=f"with --gpu: how the run is launched, one of {', '.join(LAUNCHES)} (default: single_gpu, or multi_gpu "
        "with several processes)",
    )


def job_of(
    options: argparse.Namespace, script_args: Any, args: "OmniOPDConfig", model_args: Any, longest_prompt: float
) -> Job:
    """The job of a recipe on the GPUs of the command line.

    Args:
        options: options of the command.
        script_args: see `parse_args`, also for `args` and `model_args`.
        longest_prompt: length of the longest prompt in tokens.

    Raises:
        ConfigError: for settings that the formulas do not describe.
        DataError: when the configuration of a model cannot be loaded.
    """
    launch: Launch = options.accelerate_config or ("single_gpu" if options.num_processes == 1 else "multi_gpu")
    if launch == "single_gpu" and options.num_processes > 1:
        raise ConfigError(
            f"--accelerate_config single_gpu is for one process, and --num_processes is {options.num_processes}. "
            "Leave out one of them."
        )
    if not args.gradient_checkpointing:
        raise ConfigError(
            "gradient_checkpointing=False: the memory of all layers' activations is not known. Set it to true, or "
            "leave out --gpu."
        )
    if model_args.load_in_4bit or model_args.load_in_8bit:
        raise ConfigError("The memory of a quantized student is not known. Leave out --gpu, or the quantization.")

    def shape(name: str, revision: str | None) -> Shape:
        return known_shape(name) or _shape_of(name, revision, args.trust_remote_code)

    student = shape(model_args.model_name_or_path, model_args.model_revision)
    teacher = None
    if script_args.method == "opd" or (script_args.method == "omniopd" and _is_model(args.teacher_model_name_or_path)):
        assert args.teacher_model_name_or_path is not None
        teacher = shape(args.teacher_model_name_or_path, args.teacher_model_revision)
    is_half = (_dtype_of(args.model_init_kwargs) or model_args.dtype) in _HALF
    max_tokens = int(longest_prompt) + int(args.max_completion_length or 0)
    if args.use_vllm and args.vllm_max_model_length:
        max_tokens = min(max_tokens, args.vllm_max_model_length)
    num_generations = 1
    if script_args.method == "grpo":
        from omniopd_trl.baselines.grpo import with_same_prompts

        # `micro_batches` counts the recipe's own trajectories per prompt already.
        num_generations = max(1, with_same_prompts(args, script_args.grpo)["num_generations"] // args.num_generations)
    lora_parameters = 0
    if model_args.use_peft:
        lora_parameters = student.lora_parameters(model_args.lora_r, model_args.lora_target_modules)
        if not lora_parameters:
            raise ConfigError(
                f"lora_target_modules={model_args.lora_target_modules!r}: the size of the adapter is not known. Name "
                "projections such as q_proj, or all-linear, or leave out --gpu."
            )
    return Job(
        student,
        GPUS[options.gpu],
        options.num_processes,
        launch,
        method=script_args.method,
        max_tokens=max_tokens,
        rows=args.per_device_train_batch_size,
        micro_batches=args.gradient_accumulation_steps,
        num_generations=num_generations,
        half=is_half and launch in ("single_gpu", "multi_gpu"),
        lora_parameters=lora_parameters,
        reference_itemsize=_reference_itemsize(args),
        ref_model_offload=args.ref_model_offload,
        optimizer_8bit=args.optim in _8BIT,
        teacher=teacher,
        vllm=args.vllm_mode if args.use_vllm else None,
        vllm_utilization=args.vllm_gpu_memory_utilization,
        vllm_sleeps=args.vllm_enable_sleep_mode,
        vllm_tensor_parallel=args.vllm_tensor_parallel_size,
        forks=_forks_of(args, model_args) if script_args.method == "omniopd" else None,
    )


def _forks_of(args: "OmniOPDConfig", model_args: Any) -> Forks | None:
    """What a recipe trains beside its trajectories; `None` for nothing."""
    if not args.num_branches and not args.rollout_imitation:
        return None
    return Forks(
        args.num_chunks,
        args.chunk_length,
        args.num_branches,
        args.fork_candidates,
        num_imitated=args.num_rollouts if args.rollout_imitation else 0,
        imitated_tokens=args.rollout_imitation_tokens,
        merges=args.chunk_overlap == "merge",
        packing=_PACKINGS.get(_attention_of(args, model_args), "rows"),
    )


def _attention_of(args: "OmniOPDConfig", model_args: Any) -> str:
    options = {"attn_implementation": model_args.attn_implementation, **(args.model_init_kwargs or {})}
    return options["attn_implementation"] or "sdpa"


def _is_model(teacher: str | None) -> bool:
    from omniopd_trl.teachers.load import is_local

    return teacher not in (None, "scripted") and is_local(str(teacher))


def _reference_itemsize(args: "OmniOPDConfig") -> int | None:
    if args.beta == 0:
        return 0
    dtype = _dtype_of(args.ref_model_init_kwargs)
    return None if dtype is None else 2 if dtype in _HALF else 4


def _dtype_of(init_kwargs: Any) -> str | None:
    dtype = (init_kwargs or {}).get("dtype")
    return None if dtype is None else str(dtype).removeprefix("torch.")


def _shape_of(name: str, revision: str | None, trust_remote_code: bool) -> Shape:
    from transformers import AutoConfig

    from omniopd_trl.models.loading import why_not_loaded

    try:
        config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise DataError(
            f"--gpu needs the sizes of {name!r}, and its configuration cannot be loaded: "
            f"{why_not_loaded(name, error)} Without --gpu they are not needed."
        ) from error
    return Shape.of(name, config.get_text_config())


def describe(
    job: Job, args: "OmniOPDConfig", model_args: Any, tokens: float, requested: "Load | None"
) -> tuple[list[tuple[str, str]], list[str]]:
    """Rows and notes about memory and time.

    Args:
        job: the job.
        args: configuration of the run.
        model_args: see `parse_args`.
        tokens: mean length of a trajectory with its prompt, in tokens.
        requested: load of a step on a teacher behind a service; `None` without one.
    """
    count = "" if job.num_gpus == 1 else f"{job.num_gpus} x "
    kind = "LoRA" if job.lora_parameters else "full fine-tuning"
    available, optim = job.available / GIB, getattr(args.optim, "value", args.optim)
    rows = [("hardware", f"{count}{job.gpu.name}, {available:.1f} GiB of it usable; {job.launch}, {kind}, {optim}")]
    held = "weights, gradients, optimizer and reference" + (" and teacher" if job.teacher is not None else "")
    training = f"{job.states / GIB:.1f} {held}, {job.work / GIB:.1f} activations"
    if job.forks is not None:
        training += f" ({(job.work - replace(job, forks=None).work) / GIB:.1f} of them for branches and imitation)"
    if job.vllm == "colocate" and job.generates and not job.vllm_sleeps:
        training += f", {job.engine / GIB:.1f} vLLM"
    rows.append(("memory of training", f"{job.training_bytes / GIB:.1f} GiB per GPU: {training}"))
    if job.generates:
        rest = (job.generation_bytes - job.states) / GIB
        if job.vllm == "colocate":
            other = f"{rest:.1f} vLLM, whose cache holds {job.cache_tokens:,.0f} tokens"
        else:
            other = "vLLM is on other GPUs" if job.vllm == "server" else f"{rest:.1f} cache"
        rows.append(
            ("memory of generation", f"{job.generation_bytes / GIB:.1f} GiB per GPU: {job.states / GIB:.1f}, {other}")
        )
    rows.append(("fits", _verdict(job)))
    for length in dict.fromkeys((tokens, float(job.max_tokens))):
        step = job.step(length)
        parts = [f"{step.generation:,.0f} generation"] if job.generates else []
        parts += [f"{step.training:,.0f} training"]
        if step.waiting >= 0.5:
            parts.append(f"{step.waiting:,.0f} communication")
        label = "seconds per step" if length == tokens else "  all at the longest"
        with_prompt = "solutions" if not job.generates else "trajectories"
        rows.append(
            (label, f"{step.total:,.0f}: {', '.join(parts)}; {with_prompt} of {length:,.0f} tokens with prompt")
        )
    if requested is not None:
        minutes = [
            (requested.requests, args.teacher_requests_per_minute),
            (requested.prompt_tokens + requested.completion_tokens, args.teacher_tokens_per_minute),
        ]
        least = max((60 * number / limit for number, limit in minutes if limit), default=0.0)
        if least:
            rows.append(("the teacher's limits", f"at least {least:,.0f} seconds per step for its requests"))
    notes = ["Memory and time are calculated, not measured (docs/scaling.md): an H200 needed 7 to 16% less memory."]
    if optim not in _ADAMW:
        notes.append(f"optim={optim} is counted as AdamW with moments in 32 bits.")
    if job.lora_parameters and model_args.lora_dropout:
        notes.append(
            f"lora_dropout={model_args.lora_dropout:g} keeps a copy of what an adapter reads, up to 40% of a layer's "
            "activations, which are not counted. Set it to 0."
        )
    if job.forks is not None:
        notes += _fork_notes(job, job.forks, _attention_of(args, model_args))
    if job.teacher is not None and job.method == "omniopd":
        notes.append("The time and the cache of the teacher in the same process are not counted.")
    if job.vllm == "server":
        notes.append("The vLLM server is counted as one GPU of the same kind per process.")
    return rows, notes


def _fork_notes(job: Job, forks: Forks, attention: str) -> list[str]:
    more = f"At most {forks.added(job.max_tokens):,.0f} tokens are computed beside a trajectory"
    if forks.num_branches:
        more += f", and {forks.sequences(job.max_tokens) * forks.chunk_length:,.0f} are sampled for its branches"
    notes = [f"{more}: equal branches are merged, and forks whose branches agree are dropped."]
    if forks.packing == "rows":
        notes.append(
            f"attn_implementation={attention}: each branch is a row with its prefix. Set sdpa or flex_attention."
        )
    elif attention == "eager":
        notes.append("attn_implementation=eager: its scores for each pair of tokens and head are not counted.")
    return notes


def _verdict(job: Job) -> str:
    short = [f"{size / GIB:.1f} GiB short in {what}" for what, size in job.shortfalls()]
    if not short:
        return "yes"
    found = job.remedies()
    without = ""
    if job.forks is not None and replace(job, forks=None).fits:
        without = "; without branches and imitation it fits"
    if found is None:
        return (
            f"no: {', '.join(short)}; no option makes it fit on this GPU. More memory, more GPUs or a smaller "
            f"student{without}"
        )
    options, other = found
    needed = max(other.training_bytes, other.generation_bytes) / GIB
    return f"no: {', '.join(short)}; with {' '.join(options)} it takes {needed:.1f} GiB and fits{without}"
