# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""All measurements of this package on a GPU within ten minutes, the most important ones first.

    python -m benchmarks.gpu [--out outputs/gpu] [--seconds 540] [--parts right,learns] [--dry-run]

- right: loss, gradients, log-probabilities, entropies, KL and a local teacher against dense float64 references
  (`tests/gpu`).
- learns: the demo recipe, on the card.
- fast: a step compared with TRL's, its memory, the local teacher's prefill, and a step with branches, with two
  kinds of attention, at the shapes of Qwen3-1.7B and 4B.
- profile: the operators with the largest share of a step's time.
- scales: ZeRO-3 and FSDP2 with one process, compared with the plain run.

Each command has its own time limit. Results are printed and written to `results.json`, `results.md` and `log.txt`
after each command, so an interrupted run keeps the results so far. `--dry-run` uses tiny shapes on any device. The
exit code is 1 if a bound is missed, or a command fails or exceeds its limit.

`benchmarks/gpu.sh` runs this on a machine without a network, from wheels fetched by `scripts/gpu_wheels.sh`.
"""

import argparse
import datetime
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_tables import markdown
from benchmarks.results import read_results, write_json

ROOT = Path(__file__).parents[1]
RESULTS = "results.json"
PACKAGES = (
    *("torch", "triton", "transformers", "trl", "accelerate", "peft", "datasets", "deepspeed", "tokenizers"),
    *("huggingface_hub", "numpy", "pyarrow"),
)
# The pass@1 of recipes/demo.yaml on a CPU, the mean of three seeds (docs/demo.md), and the tolerance of a run: two
# standard deviations, from the seeds (0.04) and the 512 problems (0.02) together.
DEMO_CPU, DEMO_NOISE = 0.833, 0.09
# Student, lengths of completions, time limit in seconds.
STEPS = (("qwen3-4b", "8192,20000,2048", 120), ("qwen3-1.7b", "8192,20000,2048", 90))


class Kit:
    """Runs the parts, and stores their results.

    Args:
        out: folder of the results.
        seconds: time limit of all parts together.
        dry_run: whether to use tiny shapes instead of real ones.
    """

    def __init__(self, out: Path, seconds: float, dry_run: bool):
        out.mkdir(parents=True, exist_ok=True)
        self.out, self.dry_run = out, dry_run
        self.deadline = time.monotonic() + seconds
        self.log = (out / "log.txt").open("w")
        self.results: dict[str, Any] = {**machine(), "dry_run": dry_run, "parts": {}}

    def run(
        self,
        part: str,
        name: str,
        command: list[str],
        seconds: float,
        read: Callable[[str], list[dict[str, Any]]] | None = None,
        **environment: str,
    ) -> None:
        """Run one command of a part, and store its measurements.

        Args:
            part: name of the part.
            name: name of the command within the part.
            command: arguments of Python. `{folder}` is replaced by a temporary folder, where the command writes
                `results.json`.
            seconds: time limit of the command on a GPU. A dry run has four times as long: a CPU is slow to start.
            read: extracts the measurements from the output, for commands that write no results file.
            environment: variables in addition to those of this process.
        """
        shown = " ".join(["python", *command]).replace("{folder}/", "")
        entry: dict[str, Any] = {"command": shown, "status": "no time was left"}
        self.results["parts"].setdefault(part, {})[name] = entry
        seconds *= 4 if self.results["dry_run"] else 1
        left = self.deadline - time.monotonic()
        if left < 10:
            self.tell(f"{part}, {name}: no time was left", entry)
            return
        with tempfile.TemporaryDirectory() as folder:
            command = [argument.replace("{folder}", folder) for argument in command]
            start = time.monotonic()
            code, output = self._run_in_group(command, min(seconds, left), environment)
            entry["seconds"] = round(time.monotonic() - start, 1)
            entry["measured"] = read(output) if read is not None else read_results(Path(folder) / RESULTS)
        entry["status"] = {0: "ok", None: "late"}.get(code, f"exit code {code}")
        if not all(each.get("bounds_hold", True) for each in entry["measured"]):
            entry["status"] = "bound missed"
        entry["output"] = output
        self.tell(f"{part}, {name}: {entry['status']} after {entry['seconds']} s", entry)

    def _run_in_group(self, command: list[str], seconds: float, environment: dict[str, str]) -> tuple[int | None, str]:
        """The exit code (`None` after a timeout) and the output. All processes of the group are killed at the end."""
        with tempfile.TemporaryFile("w+") as output:
            process = subprocess.Popen(
                [sys.executable, *command],
                cwd=ROOT,
                env={**os.environ, **environment},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                code: int | None = process.wait(seconds)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                try:
                    os.killpg(process.pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass  # no process is left
                process.wait()
            output.seek(0)
            return code, output.read()

    def tell(self, line: str, entry: dict[str, Any]) -> None:
        """Print a line with the end of the output, and write all results so far."""
        output = entry.pop("output", "")
        self.log.write(f"== {line}\n$ {entry['command']}\n{output}\n")
        self.log.flush()
        failed = entry["status"] != "ok"
        end = [each[:160] for each in output.splitlines() if each.strip()][-(25 if failed else 4) :]
        print(f"== {line}", *end, sep="\n", flush=True)
        write_json(self.out / RESULTS, self.results)
        (self.out / "results.md").write_text(markdown(self.results))


def machine() -> dict[str, Any]:
    """Card, date, commit and versions: the environment of the results."""

    def version_of(package: str) -> str | None:
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    commit = os.environ.get("COMMIT")
    if commit is None:
        command = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
        commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "unknown"
    cuda = torch.cuda.is_available()
    return {
        "card": torch.cuda.get_device_name() if cuda else "CPU",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": commit,
        "python": sys.version.split()[0],
        "versions": {package: version_of(package) for package in PACKAGES},
    }


def pytest_of(*arguments: str) -> list[str]:
    return [
        "-m",
        "pytest",
        "-m",
        "gpu",
        "-p",
        "no:cacheprovider",
        f"--junitxml={{folder}}/{RESULTS}",
        "-q",
        *("-o", "junit_family=xunit1"),  # supports properties
        *arguments,
    ]


def right(kit: Kit) -> None:
    workers = "2" if kit.dry_run else "6"
    tests = pytest_of("tests/gpu", "--ignore=tests/gpu/test_one_process.py", "-n", workers)
    kit.run("right", "tests/gpu", tests, 150, **_dry(kit))


def learns(kit: Kit) -> None:
    command = ["-m", "omniopd_trl.train", "--config", "recipes/demo.yaml", "--output_dir", "{folder}/student"]
    if kit.dry_run:
        command += ["--max_steps", "1", "--eval_strategy", "no", "--eval_on_start", "false"]
        command += ["--evaluate_teacher", "false", "--per_device_train_batch_size", "4"]
    else:
        command += ["--use_cpu", "false"]
    kit.run("learns", "recipes/demo.yaml", command, 150, read=None if kit.dry_run else gain_of)


def gain_of(output: str) -> list[dict[str, Any]]:
    """Parse the summary that the training command prints at its end."""
    found = {
        name: re.search(pattern, output)
        for name, pattern in (
            ("before", r"student before, pass@1 +([\d.]+)"),
            ("after", r"student after, pass@1 +([\d.]+)"),
            ("teacher", r"teacher, pass@1 +([\d.]+)"),
        )
    }
    minutes = re.search(r"wall time of training +(\d+) min (\d+) s", output)
    if minutes is None or not all(found.values()):
        return []  # the command failed, and its exit code reports it
    scores = {name: float(match[1]) for name, match in found.items() if match is not None}
    bounds = {"cpu": DEMO_CPU, "noise": DEMO_NOISE, "bounds_hold": scores["after"] > DEMO_CPU - DEMO_NOISE}
    return [{**scores, "training_seconds": 60 * int(minutes[1]) + int(minutes[2]), **bounds}]


def fast(kit: Kit) -> None:
    results = ["--results", f"{{folder}}/{RESULTS}"]
    if kit.dry_run:
        students: tuple[tuple[str, str, float], ...] = (("tiny", "64", 60),)
        memory, prefill = ["--hidden", "16", "--case", "64", "512"], ["--chunks", "1", "--tokens", "60"]
        branches = ["--shape", "tiny", "--tokens", "64"]
    else:
        students = STEPS
        memory, prefill = ["--hidden", "2048", "--case", "4096", "151936"], ["--chunks", "10"]
        branches = ["--shape", "qwen3-1.7b"]
    kit.run("fast", "memory", ["-m", "benchmarks.memory", *memory, *results], 60)
    for shape, tokens, seconds in students:
        command = ["-m", "benchmarks.step_time", "--shape", shape, "--tokens", tokens, "--steps", "2"]
        kit.run("fast", shape, [*command, "--generation", "replayed", *results], seconds)
    kit.run("fast", "local_prefill", ["-m", "benchmarks.local_prefill", "--rounds", "1", *prefill, *results], 100)
    command = ["-m", "benchmarks.branches", "--steps", "1", *branches, *results]
    kit.run("fast", "branches", command, 80)
    if torch.cuda.is_available():  # PyTorch has no backward pass of it for a CPU
        kit.run("fast", "branches, flex_attention", [*command, "--attention", "flex_attention"], 120)


def profile(kit: Kit) -> None:
    shape = ["--shape", "tiny", "--tokens", "64"] if kit.dry_run else ["--shape", "qwen3-1.7b", "--tokens", "8192"]
    kit.run("profile", "one step", ["-m", "benchmarks.profile_step", *shape, "--results", f"{{folder}}/{RESULTS}"], 80)


def scales(kit: Kit) -> None:
    kit.run("scales", "ZeRO-3 and FSDP2", pytest_of("tests/gpu/test_one_process.py", "-n", "0"), 150, **_dry(kit))


def _dry(kit: Kit) -> dict[str, str]:
    """The variable that runs the tests without a GPU, for dry runs."""
    return {"OMNIOPD_GPU_TESTS_DEVICE": "cpu"} if kit.dry_run and not torch.cuda.is_available() else {}


PARTS: dict[str, Callable[[Kit], None]] = {
    "right": right,
    "learns": learns,
    "fast": fast,
    "profile": profile,
    "scales": scales,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("outputs/gpu"), help="folder of the results")
    parser.add_argument("--seconds", type=float, default=540, help="time limit of everything")
    parser.add_argument("--parts", default=",".join(PARTS), help="the parts to run, in order")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes, on any device")
    options = parser.parse_args()
    if not options.dry_run and not torch.cuda.is_available():
        sys.exit("torch finds no GPU. Run with --dry-run to try everything on the CPU.")
    kit = Kit(options.out, options.seconds, options.dry_run)
    print(f"{kit.results['card']}, {kit.results['versions']}", flush=True)
    for part in options.parts.split(","):
        PARTS[part](kit)
    entries = [entry for part in kit.results["parts"].values() for entry in part.values()]
    print(f"\n{markdown(kit.results)}")
    sys.exit(int(any(entry["status"] != "ok" for entry in entries)))


if __name__ == "__main__":
    main()
