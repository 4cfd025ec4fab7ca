# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""What the real model knows before training: its pass@1 when the first words of an answer are given.

    python -m benchmarks.known_answers -o docs/results/known_answers.json

Training on the recipe `smollm2_chain_sum` teaches a form of the answer, and perhaps sums. With the beginning of an
answer in the teacher's form, the initial model shows what the form alone is worth. The problems, the temperature and
the scoring are those of the recipe.
"""

import argparse
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from benchmarks.results import write_json
from omniopd_trl.cli.options import check_recipe
from omniopd_trl.cli.recipes import recipe_files
from omniopd_trl.data.benchmarks import load_benchmark
from omniopd_trl.evals.math import math_accuracy
from omniopd_trl.evals.statistics import bootstrap_interval

RECIPE = "smollm2_chain_sum"
# Nothing, the form of the teacher, and the equation up to its result.
BEGINNINGS = "", "The answer is", "{equation}"
NUM_SAMPLES = 4


def measure(model: Any, tokenizer: Any, recipe: dict[str, Any], beginning: str) -> dict[str, Any]:
    """pass@1 of the model on the recipe's evaluation set after the beginning of an answer."""
    problems = load_benchmark(recipe["dataset_name"], recipe["dataset_test_split"])
    set_seed(0)
    scores: list[float] = []
    for batch in problems.iter(recipe["per_device_eval_batch_size"]):
        given = [beginning.format(equation=question.rpartition(": ")[2]) for question in batch["question"]]
        messages = [
            [{"role": "user", "content": recipe["prompt_template"].format(question=question)}]
            for question in batch["question"]
        ]
        prompts = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        texts = [prompt + text for prompt, text in zip(prompts, given, strict=True)]
        inputs = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
        written = model.generate(
            **inputs,
            do_sample=True,
            temperature=recipe["temperature"],
            top_k=0,
            max_new_tokens=recipe["max_completion_length"],
            num_return_sequences=NUM_SAMPLES,
        )
        rest = tokenizer.batch_decode(written[:, inputs["input_ids"].size(1) :], skip_special_tokens=True)
        answers = [given[k // NUM_SAMPLES] + text for k, text in enumerate(rest)]
        right = math_accuracy(answers, answer=[batch["answer"][k // NUM_SAMPLES] for k in range(len(rest))])
        scores += np.reshape([float(score or 0) for score in right], (-1, NUM_SAMPLES)).mean(1).tolist()
    interval = bootstrap_interval(scores)
    return {
        "beginning": beginning,
        "pass@1": statistics.fmean(scores),
        "interval": [*interval],
        "problems": len(scores),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="file for the results, as JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)
    recipe = check_recipe(str(recipe_files()[RECIPE]))
    name = recipe["model_name_or_path"]
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left")
    rows = [measure(model, tokenizer, recipe, beginning) for beginning in BEGINNINGS]
    for row in rows:
        print(f"{row['beginning']!r}: {row['pass@1']:.3f} [{row['interval'][0]:.3f}, {row['interval'][1]:.3f}]")
    if options.output:
        write_json(options.output, {"recipe": RECIPE, "num_samples": NUM_SAMPLES, "rows": rows})


if __name__ == "__main__":
    main()
