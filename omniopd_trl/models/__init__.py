# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Utilities for transformers models: the LM head, the frozen reference, offloading, and log-probabilities of vLLM."""
