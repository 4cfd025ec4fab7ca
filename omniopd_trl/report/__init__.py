# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""What a run learned and paid, for people: a table in the terminal, and a page."""
