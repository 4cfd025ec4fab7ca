# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Tables of the results of `benchmarks.gpu`.

python -m benchmarks.gpu_tables           # write those of docs/results/gpu/*/results.json into docs/benchmarks.md
python -m benchmarks.gpu_tables --check   # exit 1 if the page is out of date
"""

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

from scripts.pages import update

ROOT = Path(__file__).parents[1]
PAGE, RESULTS = ROOT / "docs" / "benchmarks.md", ROOT / "docs" / "results" / "gpu"
BEGIN = "<!-- Written by `make docs` from docs/results/gpu; do not edit below this line. -->"
END = "<!-- Written by `make docs` from docs/results/gpu; do not edit above this line. -->"
NOTHING = "Nothing has been measured on a GPU yet: `docs/results/gpu` holds no results."


def table(titles: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [titles, ["---"] * len(titles), *rows]
    # A pipe would end the cell.
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def measured(results: dict[str, Any], part: str) -> list[tuple[str, dict[str, Any]]]:
    """All measurements of a part, each with the name of its command."""
    commands = results["parts"].get(part, {})
    return [(name, each) for name, entry in commands.items() for each in entry.get("measured", [])]


def markdown(results: dict[str, Any]) -> str:
    """The results of one run of `benchmarks.gpu`, part by part. Parts that did not run are omitted."""
    dry = "Dry run on tiny shapes. " if results["dry_run"] else ""
    return f"{dry}{_software(results)}\n\n**Commands**\n\n{_commands(results)}\n\n{_findings(results)}"


def _software(results: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {v}" for name, v in results["versions"].items() if v is not None)
    where = f"{results['card']}, {results['date']}, commit {results['commit'][:10]}"
    return f"{where}, Python {results['python']}; {versions}."


def _findings(results: dict[str, Any]) -> str:
    parts = {
        "Correctness": _tests(results, "right"),
        "The demo": _demo(results),
        "A step beside TRL's": _steps(results),
        "Memory of scoring and loss": _memory(results),
        "The local teacher's prefill": _prefill(results),
        "A step with branches": _branches(results),
        "Operators of one step": _profile(results),
        "Back ends, one process": _tests(results, "scales"),
    }
    return "\n\n".join(f"**{title}**\n\n{text}" for title, text in parts.items() if text)


def _commands(results: dict[str, Any]) -> str:
    rows = [
        [part, f"`{entry['command']}`", entry["status"], f"{entry.get('seconds', 0):.0f}"]
        for part, commands in results["parts"].items()
        for entry in commands.values()
    ]
    return table(["part", "command", "result", "seconds"], rows)


def _tests(results: dict[str, Any], part: str) -> str:
    tests = [test for _, test in measured(results, part)]
    if not tests:
        return ""
    counts = {kind: sum(test["outcome"] == kind for test in tests) for kind in ("passed", "failed", "skipped")}
    # For each quantity with a bound, the largest error relative to the bound. NaN counts as the largest.
    worst: dict[tuple[str, str], tuple[float, float]] = {}
    for test in tests:
        for name, pair in test["errors"].items():
            key = (test["test"].partition("[")[0], name)
            worst[key] = max(worst.get(key, pair), pair, key=lambda p: math.inf if math.isnan(p[0]) else p[0] / p[1])
    rows = [[f"`{test}`", name, f"{error:.2g}", f"{bound:.2g}"] for (test, name), (error, bound) in worst.items()]
    lines = [", ".join(f"{count} {kind}" for kind, count in counts.items() if count) + "."]
    lines += [f"- `{t['test']}` {t['outcome']}: {t['message'].splitlines()[0][:200]}" for t in tests if t["message"]]
    return "\n".join(lines) + "\n\n" + table(["test", "largest error of", "error", "bound"], rows)


def _demo(results: dict[str, Any]) -> str:
    rows = [
        [f"{e['before']:.3f}", f"{e['after']:.3f}", f"{e['cpu']:.3f} ± {e['noise']:.2f}", f"{e['training_seconds']}"]
        for _, e in measured(results, "learns")
    ]
    titles = ["pass@1 before", "pass@1 after", "on a CPU, mean of three seeds", "seconds of training"]
    return table(titles, rows) if rows else ""


def _steps(results: dict[str, Any]) -> str:
    rows = []
    steps = [each for _, each in measured(results, "fast") if "rest_over_trl" in each]
    for e in sorted(steps, key=lambda e: (e["shape"], e["tokens"])):
        generation = e["seconds"]["generation"]
        seconds = [step - generated for step, generated in zip(e["step"], generation, strict=True)]
        tokens = [e["rows"] * e["tokens"] / each for each in seconds]
        shares = [
            f"{e['limit_seconds'][part] / e['seconds'][part][0]:.0%}"
            for part in ("scoring", "reference", "student", "optimizer")
        ]
        rows.append(
            [
                e["shape"],
                f"{e['tokens']:,}",
                f"{seconds[0]:.2f}, {seconds[1]:.2f}",
                f"{tokens[0]:,.0f}, {tokens[1]:,.0f}",
                f"{e['rest_over_trl']:.3f}",
                "-" if e["peak_gib"] is None else f"{e['peak_gib'][0]:.1f}, {e['peak_gib'][1]:.1f}",
                ", ".join(shares),
                f"{e['method_share']:.2%}",
            ]
        )
    if not rows:
        return ""
    limits = steps[0]["limits"]
    titles = ["student", "tokens", "seconds", "tokens per second", "step over TRL", "peak memory, GiB"]
    titles += ["of the limit: scoring, reference, student, optimizer", "selection and scoring, of a step"]
    first = (
        f"Limits, measured: {limits['flops'] / 1e12:.0f} TFLOP/s in {steps[0]['dtype'].removeprefix('torch.')}, "
        f"{limits['bandwidth'] / 1e12:.2f} TB/s. Completions are replayed, and steps are without generation. "
        "Pairs are OmniOPD's and TRL's."
    )
    return f"{first}\n\n{table(titles, rows)}"


def _memory(results: dict[str, Any]) -> str:
    rows = [
        [
            f"{e['hidden']:,}",
            f"{e['tokens']:,}",
            f"{e['vocabulary']:,}",
            f"{e['peak'] / 2**20:,.0f}",
            f"{e['head'] / 2**20:,.0f}",
            f"{e['dense_bytes'] / 2**20:,.0f}",
            f"{e['peak'] / e['dense_bytes']:.3f}",
            f"{e['seconds']:.1f}",
        ]
        for _, e in measured(results, "fast")
        if "dense_bytes" in e
    ]
    titles = ["width", "T", "V", "peak, MiB", "head's gradients, MiB", "dense, MiB", "ratio", "seconds"]
    return table(titles, rows) if rows else ""


def _prefill(results: dict[str, Any]) -> str:
    rows = [
        [e["shape"], f"{e['chunks']}"]
        + [f"{e[way]:,}" for way in ("one_each", "once_for_rollouts", "local_teacher")]
        + [f"{e['time_ratio']:.3f}"]
        for _, e in measured(results, "fast")
        if "local_teacher" in e
    ]
    titles = ["teacher", "M", "one generation per prefix", "each prefix once for its rollouts", "local teacher"]
    return table([*titles, "time over the first"], rows) if rows else ""


def _branches(results: dict[str, Any]) -> str:
    rows = []
    for _, e in measured(results, "fast"):
        if "branches" in e:
            pairs = (e["step"], e["seconds"]["generation"], e["seconds"]["student"])
            ratios = [f"{e['time_ratio']:.2f}", f"{e['peak_ratio']:.2f}"]
            rows.append(
                [e["shape"], e["attention"], f"{e['tokens']:,}", f"{e['branches']}", f"{e['added']:,}"]
                + [f"{own:.2f} / {other:.2f}" for own, other in pairs]
                + ratios
            )
    titles = ["student", "attention", "T", "K", "tokens added", "step, s", "sampling, s", "loss, s"]
    titles += ["time ratio", "memory ratio"]
    return table(titles, rows) if rows else ""


def _profile(results: dict[str, Any]) -> str:
    texts = []
    for _, e in measured(results, "profile"):
        rows = [
            [f"`{row['name'][:80]}`", f"{row['calls']}", f"{row['ms']:.1f}", f"{row['share']:.1%}"]
            for row in e["rows"]
        ]
        first = f"{e['shape']}, {e['tokens']:,} tokens, in {e['dtype'].removeprefix('torch.')}."
        texts.append(f"{first}\n\n{table(['operator or kernel', 'calls', 'ms', 'of all'], rows)}")
    return "\n\n".join(texts)


def page_part() -> str:
    """All committed results: for each card, the newest measurements of each part, and the outcome of every run."""
    runs = [(path.parent.name, json.loads(path.read_text())) for path in sorted(RESULTS.glob("*/results.json"))]
    texts = []
    for card in sorted({results["card"] for _, results in runs}):
        of_card = [(name, results) for name, results in runs if results["card"] == card]
        newest: dict[str, Any] = {"parts": {}}
        rows = []
        for name, results in of_card:
            for part, commands in results["parts"].items():
                if any(entry.get("measured") for entry in commands.values()):
                    newest["parts"][part] = commands
                outcome = "; ".join(f"{command}: {entry['status']}" for command, entry in commands.items())
                rows.append([name, results["commit"][:7], part, outcome])
        runs_table = table(["run", "commit", "part", "result"], rows)
        texts.append(f"### {card}\n\n{_software(of_card[-1][1])}\n\n{_findings(newest)}\n\n**Runs**\n\n{runs_table}")
    return "\n\n".join(texts) or NOTHING


def main(argv: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description="Write the GPU tables of docs/benchmarks.md.")
    parser.add_argument("--check", action="store_true", help="only report whether the page is up to date")
    options = parser.parse_args(argv)
    return update(PAGE, BEGIN, END, page_part(), check=options.check)


if __name__ == "__main__":
    sys.exit(main())
