# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Tables of the pages that show results of committed commands.

python -m benchmarks.result_tables           # write those of docs/results into the pages
python -m benchmarks.result_tables --check   # exit 1 if a page is out of date
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.gpu_tables import table
from omniopd_trl.cli.ablate.results import change_of_similarity
from scripts.pages import update

DOCS = Path(__file__).parents[1] / "docs"
BEGIN = "<!-- Written by `make docs` from {}; do not edit below this line. -->"
END = "<!-- Written by `make docs` from {}; do not edit above this line. -->"


def estimator(results: dict[str, Any]) -> str:
    """Accuracy of the estimates of a run, from `omniopd verify-estimator`."""
    titles = ["similarity", "N", "MSE, `k_sem / N`", "MSE, posterior", "r, `k_sem / N`", "r, posterior"]
    parts = []
    for truth, title in (("geometric", "probability per token"), ("total", "probability of the chunk")):
        rows = [row for row in results["rows"] if row["truth"] == truth]
        prior = next(row for row in rows if row["estimate"] == "prior")
        cells = [["(prior alone)", "0", "", _value(prior, "mse", 4), "", _value(prior, "correlation", 2)]]
        pairs = zip(rows[1::2], rows[2::2], strict=True)  # frequentist, Bayesian
        cells += [
            [
                f"`{pair[0]['similarity']}`",
                str(pair[0]["num_rollouts"]),
                *(_value(row, "mse", 4) for row in pair),
                *(_value(row, "correlation", 2) for row in pair),
            ]
            for pair in pairs
        ]
        chosen = f"{results['num_chunks']} chunks of {results['num_trajectories']} trajectories"
        parts.append(f"{chosen}, truth: {title}.\n\n{table(titles, cells)}")
    return "\n\n".join(parts)


def _value(row: dict[str, Any], name: str, digits: int) -> str:
    """A value and half the width of its interval."""
    if row[name] is None:
        return "-"
    low, high = row[f"{name}_interval"]
    return f"{row[name]:.{digits}f} ± {(high - low) / 2:.{digits}f}"


# Dollars per million tokens read and written, in November 2026.
PRICES = {"Claude Haiku 4.5": (1.0, 5.0), "GPT-6 Luna": (0.1, 0.5)}


def ablation(results: dict[str, Any]) -> str:
    """The rows of a plan, from `omniopd ablate`."""
    # Tables of earlier versions have neither.
    has_similarity = any(map(change_of_similarity, results["rows"]))
    has_processor = any(row.get("processor_seconds") for row in results["rows"])
    titles = [
        *("setting", "pass@1 after", "of each seed", "difference to the first row", "p", "KL", "tokens", "copied"),
        *(["similarity"] if has_similarity else []),
        *("teacher read + wrote", *(f"$, {name}" for name in PRICES)),
        *(["processor, s"] if has_processor else []),
    ]
    recipe, first = results["recipe"], results["rows"][0]
    prompts = recipe["per_device_train_batch_size"] * recipe.get("gradient_accumulation_steps", 1)
    seeds = f"Seeds {', '.join(map(str, first['seeds']))}; {recipe['max_steps']} steps of {prompts} prompts"
    before = "" if first["before"] is None else f"; pass@1 before training {first['before']:.3f}"
    rows = [_ablation_row(row, has_similarity, has_processor) for row in results["rows"]]
    return f"{seeds}{before}.\n\n{table(titles, rows)}"


def _ablation_row(row: dict[str, Any], has_similarity: bool, has_processor: bool) -> list[str]:
    test = row["difference"]
    low, high = test["interval"] if test else (0.0, 0.0)
    return [
        row["name"],
        _after(row),
        ", ".join(f"{score:.3f}" for score in row["after_by_seed"]),
        f"{test['value']:+.3f} [{low:+.3f}, {high:+.3f}]" if test else "",
        f"{test['p_value']:.3f}" if test else "",
        "" if row["kl"] is None else f"{row['kl']:.3f}",
        "" if row["length"] is None else f"{row['length']:.0f}",
        f"{row['copied']:.2f}",
        *([change_of_similarity(row)] if has_similarity else []),
        f"{row['read']:,.0f} + {row['written']:,.0f}",
        *(f"{(row['read'] * read + row['written'] * wrote) / 1e6:.2f}" for read, wrote in PRICES.values()),
        *([f"{row['processor_seconds']:.0f}"] if has_processor else []),
    ]


def _after(row: dict[str, Any]) -> str:
    return f"{row['after']:.3f}" + ("" if row["after_std"] is None else f" ± {row['after_std']:.3f}")


# Setting, and its rows in the plans `methods` or `methods_controls`, and `real_model`.
_OVERVIEW = (
    ("the paper's form", "paper's form", "paper's form"),
    ("[branches](docs/branches.md), ours", *["branches, edit, scaled advantages, 8 candidates"] * 2),
    (
        "white-box distillation: needs logits and the student's tokenizer",
        "white-box OPD, teacher of the same style and tokenizer",
        "white-box OPD, the same teacher",
    ),
    (
        "GRPO: needs answers that can be verified",
        "GRPO, 8 samples for each prompt",
        "GRPO, 4 samples for each prompt",
    ),
    (
        "SFT on the teacher's solutions",
        "SFT on one solution for each prompt",
        "SFT on right solutions of the teacher",
    ),
    ("control: branches with shuffled advantages", *["control, advantages shuffled within each fork"] * 2),
)


def overview(results: dict[str, Any]) -> str:
    """The main table and that of the real model, side by side."""
    files = [DOCS / f"results/demo/{name}.json" for name in ("real_model", "methods_controls")]
    if not all(file.exists() for file in files):
        return NOTHING
    real, controls = (json.loads(file.read_text(encoding="utf-8")) for file in files)
    demo = {**results, "rows": results["rows"] + controls["rows"][1:]}
    cells = [["before training", f"{demo['rows'][0]['before']:.3f}", f"{real['rows'][0]['before']:.3f}"]]
    for title, *names in _OVERVIEW:
        rows = [
            next(row for row in part["rows"] if row["name"] == n) for part, n in zip((demo, real), names, strict=True)
        ]
        cells.append([title, *map(_after, rows)])
    titles = [
        f"{name}, {part['recipe']['max_steps']} steps" for name, part in (("demo", demo), ("SmolLM2-135M", real))
    ]
    return table(["pass@1", *titles], cells)


def gradient_variance(results: dict[str, Any]) -> str:
    """Noise of the gradient of each form, from `benchmarks.gradient_variance`."""
    titles = ["similarity", "form", "norm", "deviation", "cosine", "norm", "deviation", "SNR", "cosine", "of a draw"]
    forms: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in results["rows"]:
        forms.setdefault((row["similarity"], row["form"]), []).append(row)
    cells = []
    for (similarity, form), (same, other) in forms.items():
        cells.append([f"`{similarity}`", form, *_norms(same), f"{same['cosine_of_mean']:.2f}", *_norms(other)])
        cells[-1] += [f"{other['squared_norm'] / other['trace']:.3g}", f"{other['cosine_of_mean']:.2f}"]
        cells[-1] += [f"{other['cosine_of_draw']:.2f}"]
    return (
        f"{results['num_trajectories']} trajectories in batches of "
        f"{results['num_trajectories'] // results['num_batches']}, {results['num_forks']} forks, teacher "
        f"`{results['teacher']}`. {results['share_agreed']:.0%} of the chunks have one text in all branches and are "
        f"left out. The texts at a fork have {results['mass']:.1%} of the student's probability. The first three "
        "columns of numbers are for the same chunks, the others for other chunks in each draw.\n\n"
        + table(titles, cells)
    )


def _norms(row: dict[str, Any]) -> list[str]:
    """The norm of the mean gradient, and the root of the trace of the covariance, in thousandths."""
    return [f"{1000 * row[key] ** 0.5:.3g}" for key in ("squared_norm", "trace")]


def wording(results: dict[str, Any]) -> str:
    """What each similarity sees of each teacher, from `benchmarks.wording`."""
    titles = ["teacher", "similarity", "two rollouts", "rollout, right chunk", "rollout, wrong chunk", "ranked"]
    cells = [
        [f"`{row['teacher']}`", f"`{row['similarity']}`"]
        + [f"{row[name]:.2f}" for name in ("rollouts", "right", "wrong", "ranked")]
        for row in results["rows"]
    ]
    return f"{results['num_places']} results, {results['num_rollouts']} rollouts each.\n\n{table(titles, cells)}"


def known_answers(results: dict[str, Any]) -> str:
    """What the real model knows before training, from `benchmarks.known_answers`."""
    cells = [
        [
            f"`{row['beginning'].format(equation='16 + 49 =')}`" if row["beginning"] else "nothing",
            "{:.3f} [{:.3f}, {:.3f}]".format(row["pass@1"], *row["interval"]),
        ]
        for row in results["rows"]
    ]
    problems = f"{results['rows'][0]['problems']} problems, {results['num_samples']} samples of each."
    return f"{problems}\n\n{table(['the answer begins with', 'pass@1'], cells)}"


# Of a plan that has not been run to its end.
NOTHING = "There are no results of this plan yet."

# Page, file of results, and the function that turns the file into Markdown.
TABLES: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("../README.md", "results/demo/methods.json", overview),
    ("demo.md", "results/wording.json", wording),
    ("estimator.md", "results/estimator/entropy.json", estimator),
    ("estimator.md", "results/estimator/uniform.json", estimator),
    ("results.md", "results/demo/methods.json", ablation),
    ("results.md", "results/demo/methods_controls.json", ablation),
    ("results.md", "results/demo/branches.json", ablation),
    ("estimator.md", "results/gradient_variance/demo.json", gradient_variance),
    *(
        ("ablations.md", f"results/demo/{plan}.json", ablation)
        for plan in ("table4", "table5", "table6", "figure2", "baselines_of_the_posterior", "controls")
    ),
    *(
        ("results.md", f"results/demo/{plan}.json", ablation)
        for plan in ("options", "judge", "varied_similarity", "varied_methods", "varied_options", "real_model")
    ),
    ("results.md", "results/demo/real_model_settings.json", ablation),
    ("results.md", "results/demo/real_model_options.json", ablation),
    ("results.md", "results/known_answers.json", known_answers),
    ("results.md", "results/demo/real_model_longer.json", ablation),
    ("estimator.md", "results/gradient_variance/varied.json", gradient_variance),
)


def main() -> int:
    """Write the tables, or compare them."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if a page is out of date")
    options = parser.parse_args()
    code = 0
    for page, path, render in TABLES:
        file, mark = DOCS / path, f"docs/{path}"
        part = render(json.loads(file.read_text(encoding="utf-8"))) if file.exists() else NOTHING
        code |= update(DOCS / page, BEGIN.format(mark), END.format(mark), part, check=options.check)
    return code


if __name__ == "__main__":
    sys.exit(main())
