# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Run commands in new processes."""

import os
import subprocess
import sys

from tests.support import ROOT

ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": str(ROOT),
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # A terminal that does not cut lines.
    "COLUMNS": "200",
}


def run_process(*command, cwd, env=None):
    """Run a command and return the finished process. A hang fails the test and shows the output so far."""
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**ENVIRONMENT, **(env or {})},
        capture_output=True,
        text=True,
        timeout=240,
    )


def train(*args, cwd, env=None):
    """`python -m omniopd_trl.train`."""
    return run_process(sys.executable, "-m", "omniopd_trl.train", *args, cwd=cwd, env=env)


def succeeded(process):
    assert process.returncode == 0, f"{process.stdout}\n{process.stderr}"
    return process
