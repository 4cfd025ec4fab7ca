# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""The trainer and its configuration: TRL's on-policy loop around the functions of this package."""
