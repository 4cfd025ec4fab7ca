# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""The paper's Table 8, cell by cell, under two readings of its formulas, and with one sample per request.

    python -m benchmarks.table8

The command prints the tables of docs/table8.md.
"""

import sys
from typing import NamedTuple

from omniopd_trl.accounting.forecast import Forecast, forecast

# Prompt, trajectory and teacher solution, in tokens (Section 9).
PROMPT, TRAJECTORY, SOLUTION = 200, 6340, 8000


class Row(NamedTuple):
    """One row of the table as printed in the paper."""

    num_chunks: int
    num_rollouts: int
    chunk_length: int
    prompt_tokens: int
    completion_tokens: int
    relative_effort: float

    def predict(self, *, num_rollouts: int, samples_per_request: int) -> Forecast:
        """The formulas for this row, with the given number of rollouts instead of the printed one."""
        return forecast(
            prompt_tokens=PROMPT,
            trajectory_length=TRAJECTORY,
            solution_length=SOLUTION,
            num_chunks=self.num_chunks,
            chunk_length=self.chunk_length,
            num_rollouts=num_rollouts,
            samples_per_request=samples_per_request,
            asked_per_token=1.0,  # the paper's value
        )

    def as_printed(self) -> Forecast:
        """The paper's formulas unchanged: N as printed, all samples in one request."""
        return self.predict(num_rollouts=self.num_rollouts, samples_per_request=self.num_rollouts)

    def doubled(self) -> Forecast:
        """Twice the printed N, twenty samples per request."""
        return self.predict(num_rollouts=2 * self.num_rollouts, samples_per_request=20)

    def one_sample(self) -> Forecast:
        """N as printed, one sample per request, no prompt cache."""
        return self.predict(num_rollouts=self.num_rollouts, samples_per_request=1)

    def cells(self, reading: Forecast) -> dict[str, bool]:
        """Whether a reading reproduces each cell, to the printed digits."""
        return {
            "input": round(reading.trajectory.prompt_tokens) == self.prompt_tokens,
            "output": round(reading.trajectory.completion_tokens) == self.completion_tokens,
            "effort": f"{reading.relative_effort:.2f}" == f"{self.relative_effort:.2f}",
        }


TABLE_8 = (
    Row(5, 10, 50, 16_850, 5_000, 0.88),
    Row(10, 10, 25, 33_700, 5_000, 1.13),
    Row(10, 10, 50, 33_700, 10_000, 1.75),
    Row(10, 10, 100, 33_700, 20_000, 3.00),
    Row(10, 20, 50, 67_400, 20_000, 3.50),
    Row(20, 10, 50, 67_400, 20_000, 3.50),
    Row(10, 20, 100, 67_400, 40_000, 6.00),
)


def _cell(number: str, is_printed: bool) -> str:
    return number if is_printed else f"**{number}**"


def table(name: str) -> str:
    """The rows under one reading, as Markdown. Cells that differ from the paper's are bold."""
    lines = ["| M, N, C | input | output | relative effort |", "|---|---|---|---|"]
    for row in TABLE_8:
        reading: Forecast = getattr(row, name)()
        cells = row.cells(reading)
        columns = [
            f"{row.num_chunks}, {row.num_rollouts}, {row.chunk_length}",
            _cell(f"{reading.trajectory.prompt_tokens:,.0f}", cells["input"]),
            _cell(f"{reading.trajectory.completion_tokens:,.0f}", cells["output"]),
            _cell(f"{reading.relative_effort:.2f}", cells["effort"]),
        ]
        lines.append(f"| {' | '.join(columns)} |")
    return "\n".join(lines)


def main() -> None:
    """Print every reading."""
    for name in ("as_printed", "doubled", "one_sample"):
        cells = [cell for row in TABLE_8 for cell in row.cells(getattr(row, name)()).values()]
        sys.stdout.write(f"{name}: {sum(cells)} of {len(cells)} cells as printed\n\n{table(name)}\n\n")


if __name__ == "__main__":
    main()
