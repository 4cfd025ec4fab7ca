# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""What a run reports: ratios of sums over processes and micro-batches, and warnings that are given once."""

from collections import Counter, defaultdict
from collections.abc import Iterator

import torch
from accelerate import Accelerator

from omniopd_trl.audits.auditor import TEACHER_TOKENS_PER_STUDENT_TOKEN
from omniopd_trl.audits.types import Audit, PolicyScores
from omniopd_trl.teachers import OUTCOMES, Usage
from omniopd_trl.trainer.omniopd_config import OmniOPDConfig


def metric_dtype(device: torch.device) -> torch.dtype:
    """The widest float that a device has: Apple's GPUs have no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def sum_over_processes(accelerator: Accelerator, *values: float) -> list[float]:
    """Each value, summed over processes. Every process has to come here, with as many values."""
    local = torch.tensor([values], dtype=metric_dtype(accelerator.device), device=accelerator.device)
    return accelerator.gather(local).sum(0).tolist()


class Ratios:
    """Metrics that are ratios of sums, of training and of evaluation."""

    def __init__(self, accelerator: Accelerator):
        self._accelerator = accelerator
        self._sums: dict[str, defaultdict[str, list[float]]] = {
            "train": defaultdict(lambda: [0.0, 0.0]),
            "eval": defaultdict(lambda: [0.0, 0.0]),
        }

    def add(
        self, mode: str, ratios: dict[str, tuple[float, float]], prefix: str = "", others: tuple[float, ...] = ()
    ) -> list[float]:
        """Add numerators and denominators, summed over processes. Every process names the same metrics.

        Returns:
            `others`, summed over processes in the same exchange.
        """
        numbers = (number for ratio in ratios.values() for number in ratio)
        totals = sum_over_processes(self._accelerator, *others, *numbers)
        first = len(others)
        for name, numerator, denominator in zip(ratios, totals[first::2], totals[first + 1 :: 2], strict=True):
            self.add_global(mode, prefix + name, numerator, denominator)
        return totals[:first]

    def add_global(self, mode: str, name: str, numerator: float, denominator: float) -> None:
        """Add what is a sum over processes already."""
        entry = self._sums[mode][name]
        entry[0] += numerator
        entry[1] += denominator

    def take(self, mode: str) -> dict[str, float]:
        """The metrics since the last time; those without a denominator are left out."""
        taken = {name: numerator / count for name, (numerator, count) in self._sums[mode].items() if count}
        self._sums[mode].clear()
        return taken


def audit_ratios(
    audits: list[Audit], scored: list[PolicyScores], waited: float, steps: float, num_processes: int, is_remote: bool
) -> dict[str, tuple[float, float]]:
    """Metrics of the audits of one process, as numerators and denominators.

    Args:
        audits: of one batch or micro-batch.
        scored: of the same trajectories, in nats.
        waited: seconds that the audits were waited for.
        steps: optimizer steps, or evaluation batches, that this is a part of; over all processes and micro-batches
            they add up to one for each.
        num_processes: how many wait at the same time.
        is_remote: whether the teacher counts outcomes.
    """
    chunks = [(s, chunk) for s, audit in zip(scored, audits, strict=True) for chunk in audit.chunks]
    num_chunks, num_tokens = len(chunks), sum(len(s.entropy) for s in scored)
    num_audited = sum(c.chunk.end - c.chunk.start for _, c in chunks)
    num_dropped = sum(audit.num_dropped for audit in audits)
    usage = sum((audit.usage for audit in audits), Usage())
    outcomes = sum((Counter(audit.outcomes) for audit in audits), Counter())
    # The paper's form, whatever the baseline. The policy has not moved since, so it is that of the update.
    loss = -sum(c.posterior * s.logprobs[c.chunk.start : c.chunk.end].sum().item() for s, c in chunks)
    return {
        "chunk_loss": (loss, num_audited),
        "entropy": (sum(s.entropy.double().sum().item() for s in scored), num_tokens),
        "audit/posterior": (sum(c.posterior for _, c in chunks), num_chunks),
        "audit/similarity": (sum(c.mean_similarity for _, c in chunks), num_chunks),
        "audit/prior": (sum(c.prior for _, c in chunks), num_chunks),
        "audit/anchor_entropy": (sum(s.entropy[c.chunk.anchor].item() for s, c in chunks), num_chunks),
        "audit/num_chunks": (num_chunks, len(audits)),
        "audit/audited_fraction": (num_audited, num_tokens),
        "audit/dropped_chunks": (num_dropped, num_chunks + num_dropped),
        "audit/short_rollouts": (sum(a.num_short for a in audits), sum(a.num_rollouts for a in audits)),
        "teacher/wait_seconds": (waited, steps * num_processes),
        "teacher/prompt_tokens": (usage.prompt_tokens, steps),
        "teacher/cached_tokens": (usage.cached_tokens, steps),
        "teacher/completion_tokens": (usage.completion_tokens, steps),
        **{f"teacher/{name}": (outcomes[name], steps) for name in OUTCOMES if is_remote},
    }


def audit_warnings(audits: list[Audit], step: int, args: OmniOPDConfig) -> Iterator[tuple[str, str]]:
    """What a user should know about the audits of a batch or micro-batch: a kind of warning, and its text."""
    if not any(audit.chunks for audit in audits):
        yield (
            "no chunks",
            f"No chunk of a batch could be audited at step {step}: the completions are shorter than "
            f"min_chunk_length={args.min_chunk_length} tokens, or all were cut off and mask_truncated_completions "
            "leaves them out, or the teacher answered nothing. Such a batch trains on the KL anchor alone.",
        )
    num_short, num_rollouts = sum(a.num_short for a in audits), sum(a.num_rollouts for a in audits)
    if num_short > 0.1 * num_rollouts:
        yield (
            "short",
            f"{num_short} of {num_rollouts} rollouts were cut off before they filled their chunk: the teacher's "
            f"tokens are shorter than {1 / TEACHER_TOKENS_PER_STUDENT_TOKEN:.2f} of a student token. Similarities are "
            "lower than they should be.",
        )
    failures = [failure for audit in audits for failure in audit.failures]
    if failures:
        yield "failures", f"Some rollouts are missing, for example: {failures[0]}."
