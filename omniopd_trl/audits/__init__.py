# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""From a trajectory to its posteriors: chunks, rollouts, similarities."""
