# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Token usage, prices, budgets and forecasts of teacher requests."""
