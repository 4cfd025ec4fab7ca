# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""What is done to a transformers model: its LM head, the frozen reference, offloading, generation by vLLM."""
