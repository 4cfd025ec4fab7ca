# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""What `first_rollouts` saves and what it costs, for the chunks that a run has recorded.

    omniopd train --config recipes/demo_paper.yaml --learning_rate 0 --num_rollouts 20 --min_anchor_entropy 0.1 \
        --max_steps 2 --logging_steps 2 --output_dir runs/twenty
    python -m benchmarks.first_rollouts runs/twenty [--num_rollouts 10]

The recorded rollouts of a chunk are taken as its distribution: texts v of shares p_v and similarities s_v, of mean mu
and variance sigma^2. With g rollouts first, of at most N, the mean similarity is then known exactly: see `expected`.
"""

import argparse
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from omniopd_trl.journal.browse import list_audits, read_audits


class Expected(NamedTuple):
    """Expected values for one chunk: rollouts, and the bias and the squared error of their mean similarity."""

    rollouts: float
    bias: float
    squared_error: float


def expected(texts: Sequence[str], similarities: Sequence[float], first: int, most: int) -> Expected:
    r"""What `first_rollouts` gives for a chunk.

    The rest is not requested with probability `sum_v p_v^g`, and the mean is then `s_v`:

    - rollouts: `N - (N - g) sum_v p_v^g`
    - bias: `(1 - g / N) sum_v p_v^g (s_v - mu)`
    - squared error: `sum_v p_v^g (s_v - mu)^2`, and if the rest is requested `((N - (N - g) sum_v p_v^g) sigma^2 -
      g^2 sum_v p_v^g (s_v - mu)^2) / N^2`

    Args:
        texts: the recorded rollouts.
        similarities: their similarities; equal texts have equal ones.
        first: g. With `first == most`, all are requested at once.
        most: N.
    """
    shares = {text: count / len(texts) for text, count in Counter(map(str.strip, texts)).items()}
    values = {text.strip(): value for text, value in zip(texts, similarities, strict=True)}
    mean = sum(share * values[text] for text, share in shares.items())
    variance = sum(share * (values[text] - mean) ** 2 for text, share in shares.items())
    if first == most:
        return Expected(most, 0.0, variance / most)
    stopped = {text: share**first for text, share in shares.items()}
    rollouts = most - (most - first) * sum(stopped.values())
    squared = sum(share * (values[text] - mean) ** 2 for text, share in stopped.items())
    bias = (1 - first / most) * sum(share * (values[text] - mean) for text, share in stopped.items())
    return Expected(rollouts, bias, squared + (rollouts * variance - first**2 * squared) / most**2)


def table(chunks: Sequence[tuple[Sequence[str], Sequence[float]]], most: int) -> list[str]:
    """A row for each number of first rollouts, and for as many rollouts at once."""
    lines = [f"{'first':>6}{'rollouts':>10}{'bias':>9}{'largest':>9}{'error':>8}{'error, as many at once':>24}"]
    spread = [expected(*chunk, 1, 1).squared_error for chunk in chunks]
    for first in sorted({2, 3, most // 2, most} - {1}):
        found = [expected(*chunk, first, most) for chunk in chunks]
        rollouts, bias, squared = (sum(values) / len(found) for values in zip(*found, strict=True))
        largest = max((one.bias for one in found), key=abs)
        alone = math.sqrt(sum(spread) / len(spread) / rollouts)
        lines.append(f"{first:6}{rollouts:10.2f}{bias:9.4f}{largest:9.3f}{math.sqrt(squared):8.3f}{alone:24.3f}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("folder", type=Path, metavar="RUN_DIR")
    parser.add_argument("--num_rollouts", type=int, default=10, metavar="N")
    options = parser.parse_args()
    audits = read_audits(options.folder, list_audits(options.folder))
    chunks = [(chunk.rollouts, chunk.similarities) for audit in audits for chunk in audit.chunks if chunk.rollouts]
    print(f"{len(chunks)} chunks of {len(chunks[0][0])} recorded rollouts; at most N = {options.num_rollouts}\n")
    print("\n".join(table(chunks, options.num_rollouts)))


if __name__ == "__main__":
    main()
