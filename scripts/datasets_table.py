# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Write the table of docs/datasets.md from the named sets.

python -m scripts.datasets_table           # write
python -m scripts.datasets_table --check   # exit 1 if the page is out of date
"""

import sys
from pathlib import Path

from omniopd_trl.data.sets import BENCHMARKS
from scripts.pages import update

PAGE = Path(__file__).parents[1] / "docs" / "datasets.md"
BEGIN = "<!-- Written by `make docs`; do not edit below this line. -->"
END = "<!-- Written by `make docs`; do not edit above this line. -->"


def render() -> str:
    """The tables of the sets to train on and to evaluate on."""
    parts = []
    for purpose in ("training", "evaluation"):
        rows = ["| name | source, split | scored by | license | left out |", "|---|---|---|---|---|"]
        for name, benchmark in BENCHMARKS.items():
            if benchmark.purpose == purpose:
                source = f"[{benchmark.source}](https://huggingface.co/datasets/{benchmark.source})"
                where = ", ".join(filter(None, (source, benchmark.config, benchmark.split)))
                left_out = benchmark.left_out or "nothing"
                if benchmark.sample is not None:
                    left_out += f"; {benchmark.sample} problems are drawn"
                rows.append(f"| `{name}` | {where} | {benchmark.scorer} | {benchmark.license} | {left_out} |")
        parts += [f"### Sets for {purpose}", "\n".join(rows)]
    return "\n\n".join(parts)


if __name__ == "__main__":
    sys.exit(update(PAGE, BEGIN, END, render(), check="--check" in sys.argv))
