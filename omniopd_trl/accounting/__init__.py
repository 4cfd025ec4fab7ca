# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Tokens and dollars: what was used, what it costs, what may be spent, what a run will need."""
