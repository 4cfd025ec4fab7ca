# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Code that several test modules share, and the scripts that they start."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
