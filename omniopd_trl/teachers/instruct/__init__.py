# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Continuations by chat models that cannot continue a given beginning: an instruction, and a repair of the answer."""
