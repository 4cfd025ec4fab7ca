# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Baselines: SFT on the teacher's solutions, white-box distillation, and GRPO, each by TRL's own trainer."""
