# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""The equations of the paper as pure functions, which depend on torch and numpy only.

Eq. 3: `similarity`. Eqs. 4 and 5: `posterior`. Eq. 6: `entropy`. Eq. 7: `chunks`. Eq. 8: `loss`, with the posteriors
as weights; `weights` has others. Not in the paper: `branches`, `imitation`, `importance` and `rewards`.
"""

from omniopd_trl.method.branches import Suffix, branch_weights, diversity, leave_one_out, most_diverse
from omniopd_trl.method.chunks import Chunk, select_chunks
from omniopd_trl.method.entropy import token_entropy
from omniopd_trl.method.imitation import add_imitation
from omniopd_trl.method.importance import SamplingFilters, importance_weights, kept_log_mass, lowest_kept_logit
from omniopd_trl.method.loss import NORMALIZATIONS, anchor_kl, chunk_loss, combine
from omniopd_trl.method.posterior import chunk_prior, posterior_mean
from omniopd_trl.method.rewards import chosen_for_audits, group_advantages, is_right, total_reward
from omniopd_trl.method.similarity import Similarity, get_similarity, similarity_matrix
from omniopd_trl.method.weights import BASELINES, StepChunks, WeightFunction, get_chunk_weights

__all__ = [
    "BASELINES",
    "NORMALIZATIONS",
    "Chunk",
    "SamplingFilters",
    "Similarity",
    "StepChunks",
    "Suffix",
    "WeightFunction",
    "add_imitation",
    "anchor_kl",
    "branch_weights",
    "chosen_for_audits",
    "chunk_loss",
    "chunk_prior",
    "combine",
    "diversity",
    "get_chunk_weights",
    "get_similarity",
    "group_advantages",
    "importance_weights",
    "is_right",
    "kept_log_mass",
    "leave_one_out",
    "lowest_kept_logit",
    "most_diverse",
    "posterior_mean",
    "select_chunks",
    "similarity_matrix",
    "token_entropy",
    "total_reward",
]
