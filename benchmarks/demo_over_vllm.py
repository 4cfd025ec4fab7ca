# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""The demo with its teacher behind a real vLLM server, compared with a teacher in the same process.

    python -m benchmarks.demo_over_vllm [--seeds 0 1 2]

The command runs `recipes/demo_paper.yaml` for each seed with both teachers, in the environment of `make test-vllm`. It
prints pass@1 on the test problems before and after. The exit code is 1 if the results differ by more than noise.

**Noise.** A run's pass@1 is a share `p` of 512 problems, one sample each, so its binomial error is at most
`sqrt(p (1 - p) / 512)`, about 0.019. The spread of the seeds around the mean of their teacher, estimated from the runs
themselves, includes the errors of evaluation and training. `sigma` is the larger of the two, since a few seeds may be
close together by chance. The difference of two means over n seeds has the error `sigma sqrt(2 / n)`. The band is three
times this error, which noise exceeds once in 370 comparisons.
"""

import argparse
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.servers import ENVIRONMENT, Server, vllm_serve
from omniopd_trl.demo import asset_path

ROOT = Path(__file__).resolve().parent.parent
PROBLEMS = len((asset_path("problems") / "test.jsonl").read_text().splitlines())


@dataclass(frozen=True)
class Run:
    """pass@1 of the student before and after one run, and the wall time of the command in seconds."""

    before: float
    after: float
    seconds: float


def train(seed: int, folder: Path, url: str | None = None) -> Run:
    """Run the recipe.

    Args:
        seed: seed of the run.
        folder: output folder of the run.
        url: address of a server that serves the demo's teacher as `teacher`. `None` runs the teacher in the process.

    Raises:
        RuntimeError: as [`run_demo`].
    """
    options = ["--seed", str(seed)]
    if url is not None:
        options += ["--teacher_model_name_or_path", "vllm:teacher", "--teacher_base_url", url]
        options += ["--teacher_tokenizer_name_or_path", str(asset_path("teacher"))]
    return run_demo(folder, *options)


def run_demo(folder: Path, *options: str) -> Run:
    """Run the recipe with other options.

    Args:
        folder: output folder of the run.
        options: options of the command line.

    Raises:
        RuntimeError: when the command fails. The message holds the end of its output.
    """
    began = time.monotonic()
    done = subprocess.run(
        [
            *(sys.executable, "-m", "omniopd_trl.train", "--config", "recipes/demo_paper.yaml"),
            *("--output_dir", str(folder), "--disable_tqdm", "true", *options),
        ],
        cwd=ROOT,
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        text=True,
        check=False,
    )
    scores = re.findall(r"^student (?:before|after), pass@1 +([\d.]+)", done.stdout, re.M)
    if done.returncode or len(scores) != 2:
        raise RuntimeError(f"The run ended with exit code {done.returncode}:\n{(done.stdout + done.stderr)[-4000:]}")
    return Run(float(scores[0]), float(scores[1]), time.monotonic() - began)


def sigma(local: Sequence[float], remote: Sequence[float]) -> float:
    """The error of one run's pass@1: the larger of the binomial error and the spread of the seeds."""
    rate = statistics.fmean([*local, *remote])
    binomial = math.sqrt(rate * (1 - rate) / PROBLEMS)
    if len(local) < 2:
        return binomial
    return max(binomial, math.sqrt((statistics.variance(local) + statistics.variance(remote)) / 2))


def band(local: Sequence[float], remote: Sequence[float]) -> float:
    """The difference of the means that noise can explain. Both lists have the same number of seeds."""
    return 3 * sigma(local, remote) * math.sqrt(2 / len(local))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    after: dict[str, list[float]] = {"local": [], "vllm": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with Server(vllm_serve(asset_path("teacher")), folder / "server.log") as server:
            print("seed  teacher  before  after  seconds", flush=True)
            for seed in options.seeds:
                for teacher, url in (("local", None), ("vllm", server.url)):
                    run = train(seed, folder / f"{teacher}-{seed}", url)
                    after[teacher].append(run.after)
                    print(f"{seed:4}  {teacher:7}  {run.before:.3f}   {run.after:.3f}  {run.seconds:7.0f}", flush=True)
    local, remote = after["local"], after["vllm"]
    difference = statistics.fmean(remote) - statistics.fmean(local)
    print(f"mean after: local {statistics.fmean(local):.3f}, vllm {statistics.fmean(remote):.3f}")
    print(f"difference {difference:+.3f}, sigma of a run {sigma(local, remote):.3f}, band {band(local, remote):.3f}")
    if abs(difference) > band(local, remote):
        sys.exit("The two teachers do not lead to the same pass@1.")


if __name__ == "__main__":
    main()
