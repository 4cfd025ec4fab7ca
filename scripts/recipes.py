# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Write the recipes of the paper's Tables 1 and 2, and their tables in two pages, from one table.

python -m scripts.recipes           # write
python -m scripts.recipes --check   # exit 1 if a file is out of date
"""

import math
import sys
import tempfile
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from omniopd_trl.accounting.forecast import Forecast, Load
from omniopd_trl.accounting.hardware import GIB, TEACHER_GPUS, known_shape, teacher_servers
from omniopd_trl.accounting.job import Job
from omniopd_trl.cli.hardware import job_of
from omniopd_trl.cli.recipe import parse_args
from omniopd_trl.teachers.options import TeacherOptions
from omniopd_trl.teachers.providers.capabilities import capabilities_of
from omniopd_trl.trainer.plan import Requests, forecast_run
from scripts.pages import page_with

FOLDER = Path(__file__).parents[1] / "recipes"
PAGE = FOLDER / "README.md"
COSTS = FOLDER.parent / "docs" / "reproduce.md"
BEGIN = "<!-- Written by `make docs` from scripts/recipes.py; do not edit below this line. -->"
END = "<!-- Written by `make docs` from scripts/recipes.py; do not edit above this line. -->"

PROMPT = 1024  # tokens of a sequence of 20K that are left to the prompt
SOLUTION = 14_336  # `max_completion_length` for solutions of 20K teacher tokens
# The paper's means in tokens (Section 9).
MEAN_PROMPT, MEAN_TRAJECTORY = 200, 6340
# Steps of 16 prompts of about one epoch: of the paper's 17K problems, and of the 26,758 programming problems of Eurus.
EPOCH = 1000
EPOCHS = {"math": EPOCH, "code": 1700}

Options = Mapping[str, Any]  # option -> value; a tuple has the comment of the line beside it


@dataclass(frozen=True)
class Tier:
    """Hardware and the options that fit it.

    Attributes:
        name: in words.
        gpu: name in `omniopd cost --gpu`.
        options: options that differ from the first tier, which is the file itself.
        accelerate_config: launch configuration. One process is named as well: on a machine with several GPUs there would
            be as many, and a step would have as many times the prompts.
        num_gpus: number of GPUs.
    """

    name: str
    gpu: str
    options: Options
    accelerate_config: str = "single_gpu"
    num_gpus: int = 1

    def command(self, name: str) -> str:
        """The command of `omniopd train` with a recipe."""
        words = [f"omniopd train --accelerate_config {self.accelerate_config}"]
        if self.num_gpus > 1:
            words.append(f"--num_processes {self.num_gpus}")
        words.append(f"--config recipes/{name}.yaml")
        return " ".join([*words, *(f"--{option} {_plain(value)}" for option, value in self.options.items())])


# Ours: ten times the rate of full fine-tuning, as usual with LoRA; without dropout, as the formulas assume.
_LORA: Options = {
    "use_peft": True,
    "lora_r": 32,
    "lora_target_modules": "all-linear",
    "lora_dropout": 0,
    "learning_rate": "1e-5",
}


@dataclass(frozen=True)
class Student:
    """A student, with its hardware.

    Attributes:
        name: id on the Hub, without the namespace.
        base: pass@1 in percent before training, on mathematics (Table 1).
        grpo: the same after GRPO.
        options: options of the first tier, with their comments.
        tiers: other hardware.
        opd: hardware for OPD, where the teacher is on the student's GPU.
    """

    name: str
    base: str
    grpo: str
    options: Options
    tiers: tuple[Tier, ...]
    opd: Tier


STUDENTS = {
    "qwen3_1.7b": Student(
        "Qwen3-1.7B",
        *("51.87", "62.41"),
        options={
            "optim": ("adamw_torch_fused", "ours: not in the paper"),
            "vllm_gpu_memory_utilization": (0.4, "ours: vLLM's share of the GPU, which it releases during training"),
        },
        tiers=(
            Tier(
                "One card of 24 GB, LoRA",
                "rtx4090",
                {
                    **_LORA,
                    "per_device_train_batch_size": 1,
                    "gradient_accumulation_steps": 16,
                    "vllm_gpu_memory_utilization": 0.5,
                },
            ),
            Tier(
                "Eight cards of 80 GB, all weights",
                "h100-80",
                {"gradient_accumulation_steps": 1},
                "multi_gpu",
                8,
            ),
        ),
        opd=Tier("One H200, all weights", "h200", {"vllm_gpu_memory_utilization": 0.15}),
    ),
    "qwen3_4b": Student(
        "Qwen3-4B",
        *("54.01", "70.24"),
        options={
            "optim": ("adamw_bnb_8bit", "ours: 6 bytes less per weight, which makes it fit. Needs `bitsandbytes`"),
            "ref_model_offload": (True, "ours: the reference is in the CPU's memory between uses"),
            "vllm_gpu_memory_utilization": (0.35, "ours: vLLM's share of the GPU, which it releases during training"),
        },
        tiers=(
            Tier(
                "One card of 80 GB, LoRA",
                "h100-80",
                {
                    **_LORA,
                    "optim": "adamw_torch_fused",
                    "ref_model_offload": False,
                    "vllm_gpu_memory_utilization": 0.5,
                },
            ),
            Tier(
                "Eight cards of 80 GB, all weights, ZeRO-3",
                "h100-80",
                {
                    "gradient_accumulation_steps": 1,
                    "optim": "adamw_torch_fused",
                    "ref_model_offload": False,
                    "vllm_gpu_memory_utilization": 0.5,
                },
                "zero3",
                8,
            ),
        ),
        opd=Tier(
            "One H200, LoRA",
            "h200",
            {
                **_LORA,
                "optim": "adamw_torch_fused",
                "ref_model_offload": False,
                "vllm_gpu_memory_utilization": 0.15,
            },
        ),
    ),
}


@dataclass(frozen=True)
class Teacher:
    """A teacher.

    Attributes:
        title: its name in words.
        name: `teacher_model_name_or_path`.
        why: comment about the choice.
        key: environment variable of its key; `None` for a server of your own.
        note: lines of the header.
        takes_temperature: whether the service takes `teacher_temperature`, and the comment of that line.
        budget: dollars, and the forecast without a cache for 50 steps; `None` for a server of your own.
        requests: requests per minute, tokens per minute, and the comment about the number of requests.
        needs: what the page says that it needs.
        served: id on the Hub of a model behind vLLM; OPD loads it.
    """

    title: str
    name: str
    why: str
    key: str | None = None
    note: str = ""
    takes_temperature: str | None = "ours: the paper gives only the student's"
    budget: tuple[int, str] | None = None
    requests: tuple[int, str, str] = (1000, "4_000_000", "one sample per request makes 80,000 requests")
    needs: str = ""
    served: str | None = None


def _server(model: str) -> str:
    return (
        "# Start the teacher's server on its own GPUs, in an environment with vLLM. It accepts local connections only:\n"
        "# from another machine, use a tunnel (ssh -L 8000:127.0.0.1:8000 HOST).\n"
        "#\n"
        f"#   vllm serve {model} --host 127.0.0.1 --port 8000 --enable-prefix-caching "
        "--enable-prompt-tokens-details --max-model-len 24576 --tensor-parallel-size 2\n"
        "#\n"
        "# Prefix caching reuses the common prefix of a trajectory's chunks. `--enable-prompt-tokens-details` reports the\n"
        "# cached tokens (`teacher/cached_tokens`). 24,576 tokens hold a sequence of 20K and a rollout.\n"
    )


def _needs_server(model: str) -> str:
    shape = known_shape(model)
    assert shape is not None
    size = 2 * shape.parameters / 1e9
    return f"the extra `openai`; for the teacher's server, two GPUs of 80 GB that hold its {size:.1f} GB and a cache"


TEACHERS = {
    "qwen3_32b": Teacher(
        "Qwen3-32B",
        "vllm:Qwen/Qwen3-32B",
        "Section 5.1",
        needs=_needs_server("Qwen/Qwen3-32B"),
        served="Qwen/Qwen3-32B",
    ),
    "qwen3_30b_a3b": Teacher(
        "Qwen3-30B-A3B-Instruct",
        "vllm:Qwen/Qwen3-30B-A3B-Instruct-2507",
        "Section 5.1; ours: the only release of this name. It does not think, and continues the student's thought",
        needs=_needs_server("Qwen/Qwen3-30B-A3B-Instruct-2507"),
        served="Qwen/Qwen3-30B-A3B-Instruct-2507",
    ),
    "claude_haiku_4_5": Teacher(
        "Claude Haiku 4.5",
        "anthropic:claude-haiku-4-5",
        "Section 5.1. It continues the student's text exactly (prefill) and accepts a temperature",
        key="ANTHROPIC_API_KEY",
        budget=(350, "298"),
        needs="the extra `anthropic`, `ANTHROPIC_API_KEY`, money",
    ),
    "claude_haiku_5_5": Teacher(
        "Claude Haiku 5.5",
        "anthropic:claude-haiku-5-5",
        "Ours: the cheapest current Claude. It refuses a prefill and is instructed: check `teacher/restarted` in the log",
        key="ANTHROPIC_API_KEY",
        note="# The paper is older than this teacher, which costs a ninth of Haiku 4.5.\n",
        takes_temperature=None,
        budget=(40, "33"),
        needs="the extra `anthropic`, `ANTHROPIC_API_KEY`, money",
    ),
    "gemini_3.5_flash_lite": Teacher(
        "Gemini 3.5 Flash-Lite",
        "gemini:gemini-3.5-flash-lite",
        "Ours: Google's replacement for 2.5 Flash. It is instructed, and thinks at the level `minimal`",
        key="GOOGLE_API_KEY",
        note=(
            "# The paper's teacher, Gemini 2.5 Flash, shuts down on 2026-12-01. Until then,\n"
            "# --teacher_model_name_or_path gemini:gemini-2.5-flash selects it. It continues a prefill, and returns eight\n"
            "# samples per request. Check `teacher/restarted` and `teacher/empty` in the log of its successor.\n"
        ),
        takes_temperature="ours. According to Google, this model ignores it and uses its default temperature",
        budget=(125, "103"),
        needs="the extra `gemini`, `GOOGLE_API_KEY`, money",
    ),
    "gpt_6_luna": Teacher(
        "GPT-6 Luna",
        "openai:gpt-6-luna",
        "Ours: the cheapest current OpenAI model whose reasoning can be disabled. It is instructed",
        key="OPENAI_API_KEY",
        note="# The paper uses no OpenAI teacher. Check `teacher/restarted` in the log.\n",
        budget=(12, "9"),
        requests=(500, "2_000_000", "eight samples per request make 16,000 requests"),
        needs="the extra `openai`, `OPENAI_API_KEY`, money",
    ),
}


@dataclass(frozen=True)
class Row:
    """A recipe: a pair of the paper, or one beside it.

    Attributes:
        task: `math` or `code`.
        student: key of `STUDENTS`.
        teacher: key of `TEACHERS`.
        paper: pass@1 in percent that the paper reports, by method; empty for a teacher that it does not have.
        with_teacher: the teacher that the paper reports them with, if it is another.
    """

    task: str
    student: str
    teacher: str
    paper: Options
    with_teacher: str = ""

    @property
    def name(self) -> str:
        """Name of the file, without its suffix."""
        return f"{self.task}_{self.student}_from_{self.teacher}"

    @property
    def place(self) -> str:
        """The table of the paper."""
        return "Table 1" if self.task == "math" else "Table 2"


ROWS = (
    Row("math", "qwen3_1.7b", "qwen3_32b", {"omniopd": "60.67", "opd": "61.70", "sft": "53.76"}),
    Row("math", "qwen3_4b", "qwen3_32b", {"omniopd": "69.08", "opd": "64.16", "sft": "63.80"}),
    Row("math", "qwen3_4b", "qwen3_30b_a3b", {"omniopd": "72.32", "opd": "56.22", "sft": "49.77"}),
    Row("math", "qwen3_4b", "claude_haiku_4_5", {"omniopd": "74.92", "sft": "67.52"}),
    Row("math", "qwen3_4b", "gemini_3.5_flash_lite", {"omniopd": "75.67", "sft": "73.51"}, "Gemini 2.5 Flash"),
    Row("math", "qwen3_4b", "claude_haiku_5_5", {}),
    Row("math", "qwen3_4b", "gpt_6_luna", {}),
    Row("code", "qwen3_1.7b", "qwen3_32b", {"omniopd": "47.93", "opd": "47.06", "sft": "40.44"}),
    Row("code", "qwen3_4b", "qwen3_32b", {"omniopd": "63.78", "opd": "65.26", "sft": "62.03"}),
)

_SETS = {
    "math": "AIME 2024 and 2025, AMC 2023, MATH-500 and OlympiadBench",
    "code": "APPS, CodeContests, TACO and Codeforces",
}
_METHODS = {"omniopd": "OmniOPD", "opd": "OPD", "sft": "SFT", "grpo": "GRPO"}


def _value(value: Any) -> Any:
    return value[0] if isinstance(value, tuple) else value


def _plain(value: Any) -> str:
    value = _value(value)
    return str(value).lower() if isinstance(value, bool) else str(value)


def body(row: Row) -> str:
    """The options of a recipe, in blocks with a heading, each line with its source."""
    student, teacher = STUDENTS[row.student], TEACHERS[row.teacher]
    is_limited = teacher.key is not None
    models = [
        "# Models",
        f"model_name_or_path: Qwen/{student.name} # Section 5.1. Its template enables thinking, as in Section 11.1",
        f"# {teacher.why}.",
        f"teacher_model_name_or_path: {teacher.name}",
    ]
    limits = ["# The teacher's limits (ours)"]
    if is_limited:
        assert teacher.budget is not None
        requests, tokens, comment = teacher.requests
        budget, forecast = teacher.budget
        limits += [
            f"teacher_budget_usd: {budget} # the forecast without a cache is {forecast} (README.md); retries are extra",
            f"teacher_requests_per_minute: {requests} # set the limit of your account; {comment}",
            f"teacher_tokens_per_minute: {tokens} # set the limit of your account",
            "teacher_max_concurrency: 64 # the default; the limits per minute are reached before it",
        ]
    else:
        models += [
            "# Ours: the server above. If it requires a key, set the environment variable VLLM_API_KEY.",
            "teacher_base_url: http://127.0.0.1:8000/v1",
            "# Ours: the teacher continues inside the student's thought. `false`, the default of `vllm:` teachers, would",
            "# insert an empty thought before it.",
            "teacher_chat_template_kwargs:",
            "  enable_thinking: true # ours",
        ]
        limits += [
            "teacher_max_concurrency: 64 # the default: requests of 10 samples each; a step has 160 of them",
            "teacher_timeout: 300 # includes the time in the server's queue",
            "teacher_max_seconds: 1200",
        ]
    if teacher.takes_temperature is not None:
        models.append(f"teacher_temperature: 1.0 # {teacher.takes_temperature}")
    limits += [
        "min_rollouts: 5 # a chunk with fewer than half of its rollouts is dropped",
        "max_failed_chunks: 0.2 # the default: the run stops if a larger share of a batch's chunks is lost",
    ]
    if row.task == "math":
        data = [
            "# Data: DAPO-Math-17K (Section 5.1), in the form whose `prompt` is the problem and whose `solution` the answer",
            "dataset_name: open-r1/DAPO-Math-17k-Processed",
            "dataset_config: en # ours: the English problems",
            "prompt_template: math # Table 7",
        ]
    else:
        data = [
            "# Data: the programming problems of PRIME-RL's compilation (Section 5.1), with its prompts; the paper states none",
            "dataset_name: benchmark:eurus_code",
        ]
    method = [
        "# The method",
        "num_chunks: 10 # M, Section 5.1",
        "chunk_length: 50 # C, Section 5.1; 100 was better and more expensive (71.58, Table 4)",
        "num_rollouts: 10 # N, Section 5.1",
        "similarity: edit # phi, Section 5.1"
        + ("; rouge1 was better for this student (62.87, Table 5)" if row.name.startswith("math_qwen3_1.7b") else ""),
        "prior_strength: 1.0 # alpha, Fig. 2: the best value, used for the 69.08 of Table 1",
        "prior: policy # Eq. 4. Section 1 and Algorithm 1 use the base model, which would be `reference`",
        "beta: 0.1 # Section 5.1",
        "posterior_baseline: none # Eq. 8 unchanged",
        "chunk_selection: entropy # Section 3.2.3",
        "chunk_overlap: resample # Section 3.2.3 allows both; resampling keeps M chunks of C tokens, as in Section 3.2.1",
    ]
    length = (
        f"max_steps: 50 # {'Section 5.1' if row.paper else 'ours: the value of Section 5.1'}, for closed teachers"
        if is_limited
        else "num_train_epochs: 1 # Section 5.1"
    )
    training = [
        "# Training",
        "learning_rate: 1.0e-6 # Section 5.1",
        length,
        "per_device_train_batch_size: 2 # Section 5.1",
        "gradient_accumulation_steps: 8 # ours: not in the paper. 16 prompts per step; with P processes, set 8 / P",
        "temperature: 1.0 # Section 5.1",
        f"max_completion_length: {20 * 1024 - PROMPT} # Section 5.1: 20K tokens per sequence; ours: 1K of them for the prompt",
        "lr_scheduler_type: constant # ours: not in the paper",
        "gradient_checkpointing: true # ours: saves memory at 20K tokens",
        "bf16: true # ours: computation only. Weights stay in float32 (the default): updates of 1e-6 are lost in bf16",
    ]
    hardware = [
        "# The student's generation, and the hardware at the top",
        "use_vllm: true # ours: generation with transformers takes hours per step. Needs the extra `vllm`",
        "vllm_mode: colocate # ours: on the student's GPU",
        "vllm_enable_sleep_mode: true # ours: vLLM's memory is released during training",
        f"vllm_max_model_length: {20 * 1024} # Section 5.1: 20K tokens",
        *(f"{option}: {_plain(value)} # {value[1]}" for option, value in student.options.items()),
    ]
    output = [
        "# Output (ours)",
        f"output_dir: outputs/{row.name}",
        "logging_steps: 1",
        f"save_steps: {10 if is_limited else 25}",
        "save_total_limit: 2",
    ]
    return "\n\n".join("\n".join(block) for block in (models, limits, data, method, training, hardware, output)) + "\n"


def tiers_of(row: Row) -> tuple[Tier, ...]:
    """The hardware of a recipe: the file itself, then the other tiers."""
    full = "8-bit Adam" if "bnb" in str(STUDENTS[row.student].options["optim"]) else "AdamW"
    return Tier(f"One card of 80 GB, all weights, {full}", "h100-80", {}), *STUDENTS[row.student].tiers


def opd_tier(row: Row) -> Tier | None:
    """The hardware of OPD; `None` for a teacher that returns text."""
    served, tier = TEACHERS[row.teacher].served, STUDENTS[row.student].opd
    if served is None:
        return None
    return Tier(tier.name, tier.gpu, {"method": "opd", "teacher_model_name_or_path": served, **tier.options})


def parsed(row: Row, options: Options) -> tuple[Any, ...]:
    """The arguments of a recipe with other options."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "recipe.yaml")
        plain = {option: _value(value) for option, value in options.items()}
        path.write_text(yaml.safe_dump(yaml.safe_load(body(row)) | plain))
        return parse_args(["--config", str(path), "--use_cpu", "true"])


@cache
def job(name: str, tier_name: str) -> Job:
    """The job of a recipe on a tier, by its name."""
    row = next(row for row in ROWS if row.name == name)
    tiers = [*tiers_of(row), opd_tier(row)]
    return job_on(row, next(tier for tier in tiers if tier is not None and tier.name == tier_name))


def job_on(row: Row, tier: Tier) -> Job:
    """The job of a recipe on a tier, by the formulas of `omniopd cost --gpu`."""
    script_args, args, model_args, _ = parsed(row, tier.options)
    launch = Namespace(gpu=tier.gpu, num_processes=tier.num_gpus, accelerate_config=tier.accelerate_config)
    return job_of(launch, script_args, args, model_args, PROMPT)


# Options of forms that are not in the paper and ask for less. `edit` needs `scale_advantages`.
_BRANCHES: Options = {"num_branches": 7, "min_anchor_entropy": 0.1, "min_rollouts": 1}
# A mask for each pair of tokens of two rows would not fit beside all weights.
_ONE_ROW: Options = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 16}
_ONE_ROLLOUT: Options = {**_BRANCHES, "scale_advantages": True, "num_rollouts": 1}
_JUDGE: Options = {**_BRANCHES, "signal": "judge"}


def cheap(row: Row) -> tuple[str, Options]:
    """The cheaper form of a paid recipe, in words, and its options with a budget of 1.2 times the forecast.

    A model that continues the student's text writes one rollout for each fork. One that has to be instructed marks the
    branches instead, which it can do as well as any other model, and for less.
    """
    teacher = TEACHERS[row.teacher]
    words, options = "marks for the branches, in one request per trajectory (docs/judge.md)", dict(_JUDGE)
    if capabilities_of(*teacher.name.split(":", 1)).continuation != "instruct":
        words, options = "one greedy rollout", dict(_ONE_ROLLOUT)
    if teacher.takes_temperature is not None:
        options["teacher_temperature"] = 0
    _, usd = paid(row.name, options)
    return words, {**options, "teacher_budget_usd": math.ceil(1.2 * usd)}


@cache
def forecast_of(name: str, options: tuple[tuple[str, Any], ...] = ()) -> Forecast:
    """What `omniopd cost` forecasts for trajectories of mean length."""
    row = next(row for row in ROWS if row.name == name)
    _, args, *_ = parsed(row, dict(options))
    provider, model = TEACHERS[row.teacher].name.split(":", 1)
    return forecast_run(
        args,
        Requests.of(args, capabilities_of(provider, model), None),
        TeacherOptions.of(args).price(provider, model),
        prompt_tokens=[MEAN_PROMPT],
        trajectory_length=MEAN_TRAJECTORY,
        trajectories_per_step=args.per_device_train_batch_size * args.gradient_accumulation_steps,
        steps=steps_of(row, args),
        num_rows=None,
    )


def steps_of(row: Row, args: Any) -> int:
    """Steps of a recipe. One that trains for an epoch does not say how many."""
    return args.max_steps if args.max_steps > 0 else EPOCHS[row.task]


def paid(name: str, options: Options | None = None) -> tuple[float, float]:
    """Requests of a recipe, and dollars without a prompt cache."""
    run = forecast_of(name, tuple((options or {}).items())).run
    assert run.no_cache.usd is not None
    return run.requests, run.no_cache.usd


def estimate(row: Row, tier: Tier) -> str:
    """Memory and time of a recipe on a tier, in words."""
    return estimate_of(job(row.name, tier.name))


def estimate_of(it: Job) -> str:
    """Memory and time of a job, in words."""
    mean, longest = seconds(it)
    return f"{memory(it)} per GPU, {mean:.0f} to {longest:.0f} seconds per step"


def seconds(it: Job) -> tuple[float, float]:
    """Seconds of a step with trajectories of mean length, and if all have the maximum length."""
    mean, longest = (it.step(tokens).total for tokens in (MEAN_PROMPT + MEAN_TRAJECTORY, it.max_tokens))
    return mean, longest


def memory(it: Job) -> str:
    """Memory of a job, in words."""
    return f"{max(it.training_bytes, it.generation_bytes) / GIB:.0f} of {it.available / GIB:.0f} GiB"


def header(row: Row) -> str:
    """The comment at the top of a recipe."""
    student, teacher = STUDENTS[row.student], TEACHERS[row.teacher]
    what = "mathematics" if row.task == "math" else "programming"
    where = " behind vLLM" if teacher.served is not None else ""
    paper = f"{row.place} of the paper" if row.paper else "a teacher beside the paper's"
    lines = [f"# {student.name} taught by {teacher.title}{where}, {what}: {paper} (arXiv 2606.01476).", "#"]
    if teacher.served is not None:
        lines += [*_server(teacher.served).splitlines(), "#"]
    else:
        lines += [f"#   export {teacher.key}=...", "#"]
    first, *others = tiers_of(row)
    lines += [f"# {first.name}: {estimate(row, first)}:", "#", f"#   {first.command(row.name)}", "#"]
    for tier in others:
        lines += [f"# {tier.name}: {estimate(row, tier)}:", "#", f"#   {tier.command(row.name)}", "#"]
    # Complete solutions take longer than rollouts, and `omniopd solutions` asks for 1.4 times as many tokens as a student
    # may write: 20K (Section 5.1). With a closed teacher, for as many prompts as its 50 steps take.
    solutions = f" --max_completion_length {SOLUTION} --teacher_timeout 1200 --teacher_max_seconds 3600"
    solutions += " --num_prompts 800" if teacher.key is not None else ""
    lines += [
        "# Memory and time are calculated (docs/scaling.md), without the teacher's time; the first number of seconds is for",
        f"# trajectories of {MEAN_TRAJECTORY:,} tokens, the paper's mean, and the second if all have the maximum length.",
        "# `omniopd cost --gpu NAME` calculates them for other GPUs and options. LoRA and its learning rate are ours.",
        "#",
        "# Other methods, on the first hardware:",
        "#",
        f"#   {first.command(row.name)} --method grpo --output_dir outputs/{row.name}_grpo",
        f"#   omniopd solutions --config recipes/{row.name}.yaml --output_dir outputs/{row.name}_sft{solutions}",
        f"#   {first.command(row.name)} --method sft --output_dir outputs/{row.name}_sft",
        "#",
    ]
    if teacher.key is not None:
        words, options = cheap(row)
        (few, usd), (requests, paper_usd) = paid(row.name, options), paid(row.name)
        form = replace(first, options={**options, **_ONE_ROW})
        lines += [
            f"# A cheaper form, not in the paper: seven branches at each fork (docs/branches.md) and {words}.",
            f"# Forecast without a cache: {few:,.0f} requests and {usd:,.2f} dollars, instead of {requests:,.0f} and "
            f"{paper_usd:,.2f} below.",
            "# We have not run it: `omniopd probe` measures first whether it would teach.",
            f"# {first.name}: {estimate_of(job_on(row, form))}:",
            "#",
            f"#   {form.command(row.name)} --output_dir outputs/{row.name}_cheap",
            "#",
        ]
    opd = opd_tier(row)
    if opd is not None:
        lines += [
            "# OPD holds the teacher on the student's GPU.",
            f"# {opd.name}: {estimate(row, opd)}:",
            "#",
            f"#   {opd.command(row.name)} --output_dir outputs/{row.name}_opd",
            "#",
        ]
    if row.paper:
        figures = [f"{_METHODS[method]} {value}" for method, value in row.paper.items()]
        before = f", GRPO {student.grpo}, before training {student.base}" if row.task == "math" else ""
        by = f" with {row.with_teacher}" if row.with_teacher else ""
        lines += [
            f"# The paper reports{by} in its {row.place}, as pass@1 averaged over",
            f"# {_SETS[row.task]}:",
            f"# {', '.join(figures)}{before}. We have not run it.",
        ]
    else:
        lines.append("# We know of no number for this teacher, and have not run it.")
    lines += teacher.note.splitlines()
    if teacher.key is not None:
        lines.append(f"# Costs: README.md. Read the terms of {teacher.title}'s provider first (docs/teachers.md).")
    return "\n".join(lines) + "\n"


def text(row: Row) -> str:
    """The file of a recipe."""
    return f"{header(row)}\n{body(row)}"


def table() -> str:
    """The tables of recipes/README.md: the recipes, and the hardware of each student."""
    lines = [
        "| recipe | student | teacher | needs, in addition to the student's GPU | the paper reports |",
        "|---|---|---|---|---|",
    ]
    for row in ROWS:
        student, teacher = STUDENTS[row.student], TEACHERS[row.teacher]
        cells = [f"[{row.name}.yaml]({row.name}.yaml)", student.name, teacher.title, teacher.needs, reported(row)]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| student | hardware | memory per GPU | seconds per step |", "|---|---|---|---|"]
    for student_name, student in STUDENTS.items():
        row = next(row for row in ROWS if row.student == student_name)
        opd = opd_tier(row)
        assert opd is not None
        tiers = [*tiers_of(row), replace(opd, name=f"{opd.name}, for OPD with {TEACHERS[row.teacher].title}")]
        for tier, shown in zip([*tiers_of(row), opd], tiers, strict=True):
            size, seconds = estimate(row, tier).split(" per GPU, ")
            lines.append(f"| {student.name} | {shown.name} | {size} | {seconds.removesuffix(' seconds per step')} |")
    return "\n".join(lines)


def reported(row: Row) -> str:
    """What the paper reports for a recipe, in words."""
    figures = ", ".join(f"{_METHODS[method]} {value}" for method, value in row.paper.items())
    by = f" with {row.with_teacher}" if row.with_teacher else ""
    return f"{figures}{by}" if figures else "no teacher of this generation"


def costs() -> str:
    """The tables of docs/reproduce.md: what the teacher of each recipe costs, and the time of each student."""
    lines = [
        "| recipe | the paper reports | steps | OmniOPD: the teacher reads + writes | costs | SFT: reads + writes | costs |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in ROWS:
        forecast, steps = forecast_of(row.name), steps_of(row, parsed(row, {})[1])
        cells = [f"`{row.name}`", reported(row), f"{steps:,}"]
        for load in (forecast.run, forecast.sft_run):
            cells += [f"{load.prompt_tokens / 1e6:,.1f} + {load.completion_tokens / 1e6:,.1f} M", price(row, load)]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", f"| student | method | hardware | 50 steps | {EPOCH:,} steps |", "|---|---|---|---|---|"]
    for student_name in STUDENTS:
        row = next(row for row in ROWS if row.student == student_name)
        first, opd = tiers_of(row)[0], opd_tier(row)
        assert opd is not None
        others = [replace(first, options={"method": method}) for method in ("grpo", "sft")]
        for tier in (*tiers_of(row), *others, opd):
            it = job_on(row, tier)
            low, high = (tier.num_gpus * step / 3600 for step in seconds(it))
            hours = [f"{steps * low:,.1f} to {steps * high:,.1f}" for steps in (50, EPOCH)]
            lines.append(f"| {' | '.join([STUDENTS[student_name].name, _METHODS[it.method], tier.name, *hours])} |")
    return "\n".join(lines)


def price(row: Row, load: Load) -> str:
    """Dollars of a load with the best cache and without a cache; GPU-hours if the teacher is self-hosted."""
    if load.no_cache.usd is not None and load.trajectory_cache.usd is not None:
        low, high = (f"{usd:,.2f}" for usd in (load.trajectory_cache.usd, load.no_cache.usd))
        return f"{high} dollars" if low == high else f"{low} to {high} dollars"
    served = TEACHERS[row.teacher].served
    shape = known_shape(served) if served is not None else None
    if shape is None or shape.experts > 1:
        return "not calculated"
    return f"{teacher_servers(load.prompt_tokens, load.completion_tokens) * TEACHER_GPUS / 3600:,.0f} GPU-hours"


def outdated() -> dict[Path, str]:
    """The files that differ from the table, with what they should be."""
    wanted = {FOLDER / f"{row.name}.yaml": text(row) for row in ROWS}
    for page, part in ((PAGE, table), (COSTS, costs)):
        wanted[page] = page_with(page.read_text(encoding="utf-8"), BEGIN, END, part())
    return {path: new for path, new in wanted.items() if not path.exists() or path.read_text(encoding="utf-8") != new}


def main(arguments: list[str]) -> int:
    """Write the files, or with `--check` only compare. Returns 1 if `--check` finds a difference."""
    different = outdated()
    if "--check" in arguments:
        for path in different:
            sys.stderr.write(f"{path} is out of date. Run `make docs`.\n")
        return int(bool(different))
    for path, new in different.items():
        path.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
