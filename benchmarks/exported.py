# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""The gain in the demo of runs that train from the export of another run, without a teacher.

    python -m benchmarks.exported [--run DIR] [--rows NAME ...]

The command runs `recipes/demo_paper.yaml`, exports it, and trains from the export with the options of each row below.
It prints pass@1 on the 512 test problems before and after, and the drift at the last logged step: the KL of the
current student from the one that sampled the trajectories, in nats per token. The error of one pass@1 is about 0.02.
"""

import argparse
import tempfile
from pathlib import Path

from benchmarks.demo_over_vllm import Run, run_demo
from omniopd_trl.journal.browse import read_logs
from omniopd_trl.report.export import write_export
from omniopd_trl.report.runs import Run as RecordedRun

ROWS = {
    "the same settings": (),
    "another similarity": ("--similarity", "edit", "--posterior_baseline", "batch"),
    "another seed": ("--seed", "1"),
    "without correction": (
        *("--similarity", "edit", "--posterior_baseline", "batch", "--importance_sampling_correction", "false"),
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--run", type=Path, help="folder of a finished run of the recipe; without it, one is made")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="NAME", help="only these rows")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        original = options.run or folder / "original"
        print(f"{'run':24}  before  after  off_policy/kl", flush=True)
        if options.run is None:
            _show("the exported run", run_demo(original), original)
        write_export(RecordedRun(original), folder / "export")
        from_export = ("--teacher_model_name_or_path", f"export:{folder / 'export'}", "--evaluate_teacher", "false")
        for row in options.rows:
            _show(row, run_demo(folder / row, *from_export, *ROWS[row]), folder / row)


def _show(name: str, run: Run, folder: Path) -> None:
    drifts = [entry["off_policy/kl"] for entry in read_logs(folder) if "off_policy/kl" in entry]
    drift = f"{drifts[-1]:.5f}" if drifts else "-"
    print(f"{name:24}  {run.before:.3f}   {run.after:.3f}  {drift:>13}", flush=True)


if __name__ == "__main__":
    main()
