# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Datasets: loading, prompt templates, and checks before training."""

from omniopd_trl.data.benchmarks import load_benchmark
from omniopd_trl.data.checks import check_dataset, check_prompt_lengths, check_step_is_filled
from omniopd_trl.data.datasets import (
    column_names,
    get_split,
    load_dataset_or_files,
    local_builder,
    named_datasets,
)
from omniopd_trl.data.prompts import PROMPT_TEMPLATES, QUESTION_COLUMNS, prepare_prompts, resolve_template
from omniopd_trl.data.sets import BENCHMARKS

__all__ = [
    "BENCHMARKS",
    "PROMPT_TEMPLATES",
    "QUESTION_COLUMNS",
    "check_dataset",
    "check_prompt_lengths",
    "check_step_is_filled",
    "column_names",
    "get_split",
    "load_benchmark",
    "load_dataset_or_files",
    "local_builder",
    "named_datasets",
    "prepare_prompts",
    "resolve_template",
]
