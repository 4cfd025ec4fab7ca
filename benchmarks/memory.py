# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Peak memory of scoring and loss: compared with dense logits, and as a function of vocabulary and length.

    python -m benchmarks.memory [--hidden 64] [--case 20000 151936] [--retain] [--results FILE]
    python -m benchmarks.memory --traced --hidden 2048

Each case runs in a separate process: scoring of T tokens (log-probabilities and entropies, no gradient), then the loss
with 500 audited tokens (10 chunks of 50) and the anchor on the others, forward and backward, from hidden states and
LM heads. The peak is measured relative to the memory before: the hidden states and the heads of student and reference.
On the CPU it is the peak resident memory of the process, on a GPU the peak memory that PyTorch allocated.

After freeing a block of up to 32 MiB, glibc keeps blocks of that size resident, among them tiles. The processes set
`MALLOC_MMAP_THRESHOLD_`, unless it is already set, to return freed memory. `--retain` measures without it.

Dense: five float32 tensors of T x V: logits of the student and of the reference, log-probabilities of both, and the
gradient of the student's logits. This is the minimum of a loss on whole logits. The first row measures such a loss.

Head: the gradient of the student's head, accumulated by the kernels in float32, twice: the chunk loss and the anchor
each have one until they are added.

Traced: the same code on tensors without memory (`FakeTensorMode`). Every live storage is counted, which takes seconds
at any width. The sum of the two head gradients is a third tensor there, since fake tensors are not added in place.
Growth with T is exact.

The exit code is 1 if a bound is missed:

- at T = 4,096 and V = 151,936, alone or with the others, the peak is at most a quarter of dense.
- at T = 4,096, the peak without the head differs by at most 5% between vocabularies.
- from T = 2,048 to 20,000, each further token adds at most four times its hidden states, for every vocabulary.

On a GPU the last two are measured from V = 65,536 and T = 10,000, where its larger tiles are full.
"""

import argparse
import multiprocessing
import os
import resource
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks.results import add_result
from benchmarks.shapes import QWEN_VOCABULARY, best_device, synchronize
from omniopd_trl.method.loss import anchor_kl, chunk_loss
from omniopd_trl.models.lm_head import LMHead, kl_to_reference, logprobs_of

AUDITED = 500
MIB = 2**20
DENSE_COPIES = 5
RATIO_BOUND, FLAT_BOUND, SLOPE_BOUND = 0.25, 0.05, 4.0
LONGEST = 20_000
# Tokens and vocabulary above which tiles are full, and memory grows by other tensors only. The anchor takes 256 tokens
# at a time on a CPU. On a GPU it takes 4,096, and the cast of a tile is kept until the next one is created.
FULL_TILES = {"cpu": (2048, 32_768), "cuda": (10_000, 65_536)}


@dataclass(frozen=True)
class Case:
    """One process: tokens, vocabulary and width, and whether logits are dense."""

    tokens: int
    vocabulary: int
    hidden: int
    dense: bool = False

    @property
    def head_bytes(self) -> int:
        return 2 * 4 * self.vocabulary * self.hidden

    @property
    def dense_bytes(self) -> int:
        return DENSE_COPIES * 4 * self.tokens * self.vocabulary


class Peak:
    """Peak bytes relative to the start. Linux counts `ru_maxrss` in KiB."""

    def __init__(self, device: torch.device):
        self.device = device
        if device.type == "cuda":
            synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            self._before = torch.cuda.memory_allocated(device)
        else:
            self._before = psutil.Process().memory_info().rss

    def bytes(self) -> int:
        if self.device.type == "cuda":
            synchronize(self.device)
            return torch.cuda.max_memory_allocated(self.device) - self._before
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - self._before


def tiled(hidden: torch.Tensor, head: LMHead, ref_hidden: torch.Tensor, ref_head: LMHead, targets: torch.Tensor):
    """Scoring and loss as in the trainer, with slices instead of copies of the audited and the other states."""
    with torch.no_grad():
        logprobs_of(hidden, head, targets, 1.0)
    logprobs, _ = logprobs_of(hidden[:AUDITED], head, targets[:AUDITED], 1.0)
    with torch.no_grad():
        logprobs_of(ref_hidden[:AUDITED], ref_head, targets[:AUDITED], 1.0)
    kl, _ = kl_to_reference(hidden[AUDITED:], head, ref_hidden[AUDITED:], ref_head, 1.0)
    return chunk_loss(logprobs, torch.full_like(logprobs, 0.5)) + 0.1 * kl.sum()


def dense(hidden: torch.Tensor, head: LMHead, ref_hidden: torch.Tensor, ref_head: LMHead, targets: torch.Tensor):
    """The same loss from whole logits, with the package's dense reference."""
    logits, ref_logits = hidden @ head.weight.T, (ref_hidden @ ref_head.weight.T).detach()
    logprobs = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    audited = torch.arange(len(targets), device=targets.device) < AUDITED
    return chunk_loss(logprobs, 0.5 * audited) + 0.1 * anchor_kl(ref_logits, logits, ~audited)


def measure(case: Case, pipe: Any) -> None:
    """Measure one case, in a separate process."""
    device, dtype = best_device()
    torch.manual_seed(0)

    def normal(*sizes: int) -> torch.Tensor:
        return torch.randn(*sizes, device=device, dtype=dtype)

    hidden, ref_hidden = normal(case.tokens, case.hidden).requires_grad_(), normal(case.tokens, case.hidden)
    # With this scale, logits have the spread of a trained model's.
    weight = (normal(case.vocabulary, case.hidden) / case.hidden**0.5).requires_grad_()
    ref_weight = normal(case.vocabulary, case.hidden) / case.hidden**0.5
    heads = LMHead(weight, None, 1.0, None), LMHead(ref_weight, None, 1.0, None)
    targets = torch.randint(case.vocabulary, (case.tokens,), device=device)
    (normal(8, 8) @ normal(8, 8)).sum()  # the first product loads libraries
    peak, start = Peak(device), time.perf_counter()
    (dense if case.dense else tiled)(hidden, heads[0], ref_hidden, heads[1], targets).backward()
    result = peak.bytes(), time.perf_counter() - start  # before the check below, which allocates memory
    for leaf in (hidden, weight):
        assert leaf.grad is not None
        assert leaf.grad.isfinite().all()
    pipe.send(result)


def run(case: Case, results: Path | None = None) -> int | None:
    """Measure a case and print its row.

    Args:
        case: the case.
        results: a JSON file to which the row is added.

    Returns:
        Peak bytes, or `None` if the process failed.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=measure, args=(case, theirs))
    process.start()
    theirs.close()
    row = f"{'dense' if case.dense else 'tiled':8}{case.tokens:8,}{case.vocabulary:10,}"
    try:
        peak, seconds = ours.recv()
    except EOFError:  # probably out of memory; other cases may fit
        process.join()
        print(f"{row}    failed with exit code {process.exitcode}", flush=True)
        return None
    process.join()
    print(
        f"{row}{peak / MIB:10.0f}{case.head_bytes / MIB:10.0f}{(peak - case.head_bytes) / MIB:12.0f}"
        f"{case.dense_bytes / MIB:12.0f}{peak / case.dense_bytes:8.3f}{seconds:8.1f}",
        flush=True,
    )
    if results is not None:
        measured = {"peak": peak, "head": case.head_bytes, "dense_bytes": case.dense_bytes, "seconds": seconds}
        add_result(results, {**asdict(case), "device": best_device()[0].type, **measured})
    return peak


def traced(case: Case) -> float:
    """Peak bytes of a case on fake tensors, heads included."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.distributed._tools.mem_tracker import MemTracker

    with FakeTensorMode():
        hidden, ref_hidden = (
            torch.empty(case.tokens, case.hidden).requires_grad_(),
            torch.empty(case.tokens, case.hidden),
        )
        weight = torch.empty(case.vocabulary, case.hidden).requires_grad_()
        heads = LMHead(weight, None, 1.0, None), LMHead(torch.empty_like(weight), None, 1.0, None)
        targets = torch.zeros(case.tokens, dtype=torch.long)
        tracker = MemTracker()
        with tracker:
            tiled(hidden, heads[0], ref_hidden, heads[1], targets).backward()
    return float(tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"])


def trace(hidden: int) -> int:
    """Print the exact growth with T. Returns 1 if it is above four states per token or depends on the vocabulary."""
    state = 4 * hidden
    print(f"hidden size {hidden}; MiB above T = 2,048, and in states of {state:,} bytes per further token\n")
    print(f"{'V':>10}{'T':>10}{'MiB':>10}{'states':>10}")
    slopes = []
    for vocabulary in (32_768, QWEN_VOCABULARY):
        least = traced(Case(2048, vocabulary, hidden))
        for tokens in (8192, 20_000):
            growth = traced(Case(tokens, vocabulary, hidden)) - least
            slopes.append(growth / (tokens - 2048) / state)
            print(f"{vocabulary:10,}{tokens:10,}{growth / MIB:10.1f}{slopes[-1]:10.3f}", flush=True)
    return int(max(slopes) > SLOPE_BOUND or max(slopes) - min(slopes) > 0.05)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--hidden", type=int, default=64, help="width; the default takes minutes on a CPU")
    parser.add_argument("--case", nargs=2, type=int, metavar=("T", "V"), help="a single case, with its bound")
    parser.add_argument("--traced", action="store_true", help="count storages instead of computing")
    parser.add_argument("--retain", action="store_true", help="let glibc keep freed memory resident")
    parser.add_argument("--results", type=Path, help="a JSON file to which the results are added")
    options = parser.parse_args()
    hidden = options.hidden
    if not options.retain:
        os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(MIB))  # glibc reads it when a process starts
    if options.traced:
        sys.exit(trace(hidden))
    print(f"hidden size {hidden}; MiB\n")
    print(f"{'':8}{'T':>8}{'V':>10}{'peak':>10}{'head':>10}{'beyond it':>12}{'dense':>12}{'ratio':>8}{'seconds':>8}")
    large = Case(4096, QWEN_VOCABULARY, hidden)
    if options.case:
        case = Case(*options.case, hidden)
        peak = run(case, options.results)
        sys.exit(peak is None or (case == large and peak > RATIO_BOUND * case.dense_bytes))
    device, dtype = best_device()
    shortest, smallest = FULL_TILES[device.type]
    vocabularies = [v for v in (32_768, 65_536, QWEN_VOCABULARY) if v >= smallest]
    run(Case(1024, 32_768, hidden, dense=True), options.results)
    cases = [Case(4096, v, hidden) for v in vocabularies]
    cases += [Case(t, v, hidden) for t in (shortest, LONGEST) for v in (smallest, QWEN_VOCABULARY)]
    peaks = {case: run(case, options.results) for case in cases}
    beyond = {(c.tokens, c.vocabulary): peak - c.head_bytes for c, peak in peaks.items() if peak is not None}
    if len(beyond) < len(cases):
        sys.exit("A case failed, so the bounds cannot be checked.")
    flat = max(beyond[4096, v] for v in vocabularies) - beyond[4096, smallest]
    # Hidden states of student and reference for the additional tokens.
    states = (LONGEST - shortest) * 2 * hidden * dtype.itemsize
    slopes = {v: (beyond[LONGEST, v] - beyond[shortest, v]) / states for v in (smallest, QWEN_VOCABULARY)}
    print()
    ratio = (beyond[4096, QWEN_VOCABULARY] + large.head_bytes) / large.dense_bytes
    results = {
        f"peak over dense, T = 4,096, V = {QWEN_VOCABULARY:,}": (ratio, RATIO_BOUND),
        f"growth from V = {smallest:,}, of the peak beyond the head": (flat / beyond[4096, smallest], FLAT_BOUND),
        **{f"growth with T, in hidden states, V = {v:,}": (slope, SLOPE_BOUND) for v, slope in slopes.items()},
    }
    for name, (value, bound) in results.items():
        print(f"{name:56}{value:8.3f}   bound {bound}")
    sys.exit(0 if all(value <= bound for value, bound in results.values()) else 1)


if __name__ == "__main__":
    main()
