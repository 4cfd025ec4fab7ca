# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""`omniopd ablate`: train a grid of settings and seeds, and compare the results in one table and one figure."""
