# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""The training command as a module: `python -m omniopd_trl.train`, `accelerate launch -m omniopd_trl.train`."""

from omniopd_trl.cli.train import ControlC, leave, run

if __name__ == "__main__":
    ControlC().install()
    leave(run())
