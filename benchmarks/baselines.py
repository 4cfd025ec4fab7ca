# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Train the student of the demo with each method, and compare pass@1 and what the teacher wrote.

    python -m benchmarks.baselines --output_dir runs/baselines --steps 20 --seeds 0

Every run has 32 prompts per step and is evaluated on the same 512 problems. The teacher of `opd` shares the student's
style and tokenizer (`demo:teacher_shared`); that of `omniopd` and `sft` does not (`demo:teacher`). `sft` trains on one
solution for each of its prompts. A run that is finished is not repeated. Results are written to `results.json`.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from omniopd_trl.cli.recipes import recipe_files
from omniopd_trl.report.runs import Run

METHODS = ("sft", "grpo", "omniopd", "opd")
_PROMPTS_PER_STEP = 32
_METRICS = ("eval_pass@1", "eval_kl/unaudited", "eval_completions/mean_length")


def train(method: str, folder: Path, steps: int, seed: int, extra: list[str]) -> None:
    """Train with one method, unless the folder holds its last step."""
    if folder.exists() and any(step == steps for step, _ in Run(folder).series("eval_pass@1")):
        return
    common = ["--config", str(recipe_files()["demo"]), "--output_dir", str(folder), "--seed", str(seed)]
    if method == "sft":
        prompts = ["--num_prompts", str(steps * _PROMPTS_PER_STEP)]
        command(["omniopd_trl.cli.main", "solutions", *common, *prompts, *extra])
    if method == "opd":
        common += ["--teacher_model_name_or_path", "demo:teacher_shared"]
    schedule = ["--max_steps", str(steps), "--eval_steps", str(steps), "--evaluate_teacher", "false"]
    command(["omniopd_trl.train", *common, "--method", method, *schedule, *extra])


def command(arguments: list[str]) -> None:
    """Run a module of the package in a process of its own."""
    subprocess.run([sys.executable, "-m", *arguments], check=True)


def result(method: str, folder: Path, seed: int) -> dict[str, Any]:
    """What a finished run has logged: metrics before and after, and the tokens of the teacher."""
    run = Run(folder)
    metrics = {name: [value for _, value in run.series(name)] for name in _METRICS}
    # Values of a step, averaged since the entry before.
    tokens, before = 0.0, 0.0
    for step, value in run.series("teacher/completion_tokens"):
        tokens, before = tokens + value * (step - before), step
    return {"method": method, "seed": seed, "teacher wrote": round(tokens), **metrics}


def main() -> None:
    """Run all methods and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/baselines"))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    options, extra = parser.parse_known_args()
    results = []
    for seed in options.seeds:
        for method in options.methods:
            folder = options.output_dir / f"{method}-{seed}"
            train(method, folder, options.steps, seed, extra)
            results.append(result(method, folder, seed))
    options.output_dir.mkdir(parents=True, exist_ok=True)
    (options.output_dir / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print("| method | seed | pass@1 before | after | KL to the initial student | tokens per answer | teacher wrote |")
    print("|---|---|---|---|---|---|---|")
    for row in results:
        scores, kl, lengths = (row[name] for name in _METRICS)
        print(
            f"| {row['method']} | {row['seed']} | {scores[0]:.3f} | {scores[-1]:.3f} | {kl[-1]:.3f} | "
            f"{lengths[0]:.0f} to {lengths[-1]:.0f} | {row['teacher wrote']:,} |"
        )


if __name__ == "__main__":
    main()
