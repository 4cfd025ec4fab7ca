# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Write the tables of docs/configuration.md from the configuration classes.

    python -m scripts.configuration_reference           # write
    python -m scripts.configuration_reference --check   # exit 1 if the page is out of date

The text outside of the two marks in the page is written by hand and is kept.
"""

import argparse
import dataclasses
import json
import re
import sys
import typing
from pathlib import Path
from typing import Any

from trl import ModelConfig

from omniopd_trl.cli.recipe import OmniOPDScriptArguments
from omniopd_trl.trainer.help_texts import entries_of
from omniopd_trl.trainer.omniopd_config import OmniOPDConfig
from scripts.pages import update

PAGE = Path(__file__).parents[1] / "docs" / "configuration.md"
BEGIN = "<!-- Written by `make docs`; do not edit below this line. -->"
END = "<!-- Written by `make docs`; do not edit above this line. -->"

# Inherited options that runs with this trainer usually set, in groups. `--help` lists the others.
INHERITED: dict[str, tuple[type, tuple[str, ...]]] = {
    "Inherited: the student's model": (
        ModelConfig,
        (
            *("model_name_or_path", "model_revision", "dtype", "attn_implementation"),
            *("use_peft", "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules"),
            *("load_in_4bit", "load_in_8bit"),
        ),
    ),
    "Inherited: loading the student and the teacher": (
        OmniOPDConfig,
        (
            *("model_init_kwargs", "trust_remote_code", "disable_dropout"),
            *("teacher_model_name_or_path", "teacher_model_revision", "teacher_model_init_kwargs"),
        ),
    ),
    "Inherited: the data": (
        OmniOPDScriptArguments,
        ("dataset_config", "dataset_train_split", "dataset_test_split", "dataset_streaming"),
    ),
    "Inherited: the student's generation": (
        OmniOPDConfig,
        (
            *("max_completion_length", "temperature", "top_p", "top_k", "min_p", "repetition_penalty"),
            *("generation_kwargs", "chat_template_kwargs", "cache_implementation", "ds3_gather_for_generation"),
        ),
    ),
    "Inherited: the student's generation with vLLM": (
        OmniOPDConfig,
        (
            *("use_vllm", "vllm_mode", "vllm_model_impl", "vllm_gpu_memory_utilization", "vllm_max_model_length"),
            *("vllm_tensor_parallel_size", "vllm_enable_sleep_mode", "vllm_server_base_url", "vllm_server_host"),
            *("vllm_server_port", "vllm_server_timeout", "vllm_group_port", "vllm_structured_outputs_regex"),
        ),
    ),
    "Inherited: batches and optimization": (
        OmniOPDConfig,
        (
            *("per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs", "max_steps"),
            *("learning_rate", "lr_scheduler_type", "warmup_steps", "optim", "weight_decay", "max_grad_norm"),
            *("gradient_checkpointing", "bf16", "fp16", "use_cpu", "seed", "shuffle_dataset"),
        ),
    ),
    "Inherited: evaluation, logging and checkpoints": (
        OmniOPDConfig,
        (
            *("output_dir", "run_name", "eval_strategy", "eval_steps", "eval_on_start", "per_device_eval_batch_size"),
            *("logging_steps", "report_to", "log_unique_prompts"),
            *("save_strategy", "save_steps", "save_total_limit", "resume_from_checkpoint"),
            *("load_best_model_at_end", "metric_for_best_model", "greater_is_better"),
            *("push_to_hub", "hub_model_id", "hub_strategy", "hub_always_push", "hub_private_repo", "hub_revision"),
        ),
    ),
}


def groups_of(config: type) -> dict[str, list[str]]:
    """The fields that a configuration class itself defines, in the groups of its docstring.

    Raises:
        ValueError: when the docstring and the class do not name the same fields.
    """
    groups: dict[str, list[str]] = {}
    for title, name, _ in entries_of(config):
        groups.setdefault(title, []).append(name)
    documented = {name for group in groups.values() for name in group}
    own = set(own_fields(config))
    if documented != own:
        raise ValueError(
            f"The docstring of {config.__name__} and its fields differ: {sorted(documented ^ own)}. Every field that "
            "the class defines has one entry, in a group that begins with `> Parameters that control`."
        )
    return groups


def own_fields(config: type) -> list[str]:
    """The names of the dataclass fields that the class itself defines or redefines, without those it inherits."""
    return [field.name for field in dataclasses.fields(config) if field.name in config.__annotations__]


def table(config: type, names: typing.Iterable[str]) -> str:
    """A Markdown table of the named fields, own or inherited."""
    hints = typing.get_type_hints(config)
    fields = {field.name: field for field in dataclasses.fields(config)}
    rows = ["| option | type | default | meaning |", "|---|---|---|---|"]
    for name in names:
        field = fields[name]
        hint = hints[name]
        kind = hint.__name__ if isinstance(hint, type) else re.sub(r"\b(?:\w+\.)+(?=\w)", "", str(hint))
        default: Any = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        # Percent signs are doubled for argparse, and a help text may be wrapped.
        meaning = " ".join(field.metadata["help"].split()).replace("%%", "%")
        cells = [f"`{name}`", f"`{kind}`", f"`{json.dumps(default)}`", meaning]
        # A pipe would end the cell.
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows)


def render() -> str:
    """The part of the page between the marks: the options of this package first, then the inherited ones."""
    parts = []
    for title, names in groups_of(OmniOPDConfig).items():
        parts += [f"## {title}", table(OmniOPDConfig, names)]
    parts += ["## Options of the training command", table(OmniOPDScriptArguments, own_fields(OmniOPDScriptArguments))]
    for title, (config, inherited) in INHERITED.items():
        parts += [f"## {title}", table(config, inherited)]
    return "\n\n".join(parts)


def main(argv: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description="Write the tables of docs/configuration.md.")
    parser.add_argument("--check", action="store_true", help="only report whether the page is up to date")
    args = parser.parse_args(argv)
    return update(PAGE, BEGIN, END, render(), check=args.check)


if __name__ == "__main__":
    sys.exit(main())
