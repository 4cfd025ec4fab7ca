# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""`omniopd eval --engine vllm` measures the same model as `transformers` does."""

import sys

from benchmarks.servers import ENVIRONMENT
from omniopd_trl.cli.main import main
from omniopd_trl.evals.results import EvalResult, compare
from tests.support.commands import run_process, succeeded


def test_vllm_and_transformers_agree(tmp_path):
    """The demo's student on 24 problems: equal prompts, and a difference that is within noise."""
    common = ("--dataset", "demo:problems", "--limit", "24", "--num_samples", "4", "--max_completion_length", "160")
    options = ("eval", "--model", "demo:student", *common, "--dtype", "float32")
    # On the CPU, vLLM fails when it splits the prompt of a request with a seed.
    engine = ("--engine", "vllm", "--model_init_kwargs", '{"enforce_eager": true, "max_num_batched_tokens": 32768}')
    command = (sys.executable, "-m", "omniopd_trl.cli.main", *options, *engine, "--output_dir", "vllm")
    succeeded(run_process(*command, cwd=tmp_path, env={**ENVIRONMENT, "VLLM_USE_AOT_COMPILE": "0"}))
    assert main([*options, "--output_dir", str(tmp_path / "transformers")]) == 0
    results = [EvalResult.load(tmp_path / name) for name in ("vllm", "transformers")]
    assert [result.settings["engine"] for result in results] == ["vllm", "transformers"]
    comparison = compare(*results)
    assert comparison.differences.keys() == {"engine"}
    assert comparison.test.p_value > 0.001
    assert all(0.2 < score < 0.7 for score in (comparison.first, comparison.second))
    # Equal lengths show that both end at the same tokens.
    tokens = [result.metrics["mean_tokens"] for result in results]
    assert abs(tokens[0] - tokens[1]) < 6
    assert results[0].metrics["truncated"] == results[1].metrics["truncated"] == 0
