# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Peak memory of scoring and loss: against dense logits, with the vocabulary, and with the length.

    python -m benchmarks.memory [--hidden 64] [--case 20000 151936] [--retain] [--results FILE]
    python -m benchmarks.memory --traced --hidden 2048

Each case is a process of its own: scoring of T tokens (log-probabilities and entropies, no gradient), then the loss
with 500 audited tokens (10 chunks of 50) and the anchor on the others, forward and backward, from hidden states and
LM heads. What is measured is the peak above what is there before: the hidden states and the heads of student and
reference. On the CPU it is the peak of the process's resident memory, on a GPU what PyTorch has allocated at most.

glibc keeps freed blocks of up to 32 MiB resident, tiles among them, once it has seen one of that size freed. The
processes run with `MALLOC_MMAP_THRESHOLD_`, unless it is set, so that freed memory counts as such; `--retain` measures
without it.

Dense: five float32 tensors of T x V. Logits of the student and of the reference, log-probabilities of both, and the
gradient of the student's logits: the least that a loss on whole logits holds. The first row is such a loss, measured.

Head: the gradient of the student's head, float32 as the kernels add it up, twice: the chunk loss and the anchor each
have one until they are added.

Traced: the same code on tensors without memory (`FakeTensorMode`), where every storage that is alive is counted, in
seconds at any width. Two gradients of the head are added there in a third, since tensors of that kind are not added in
place; growth with T is exact.

The exit code is 1 when a bound is missed: at T = 4,096 and V = 151,936, alone or with the others, a quarter of dense;
the same within 5% of it for every vocabulary once the head is taken off; from T = 2,048 to 20,000 at most four times
the hidden states for each further token, and the same for every vocabulary. On a GPU the latter two are measured from
where its larger tiles are full: from V = 65,536 and T = 10,000.
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
# Tokens and vocabulary from which on memory grows by what is no tile. The anchor takes 256 tokens at a time on a CPU,
# and 4,096 on a GPU, where the cast of a tile is there until that of the next one is.
FULL_TILES = {"cpu": (2048, 32_768), "cuda": (10_000, 65_536)}


@dataclass(frozen=True)
class Case:
    """One process: how many tokens, vocabulary, width, and whether logits are dense."""

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
    """Bytes above those of the beginning. Linux counts `ru_maxrss` in KiB."""

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
    """As the trainer does it, less its copies of the states of audited and of other tokens: slices serve here."""
    with torch.no_grad():
        logprobs_of(hidden, head, targets, 1.0)
    logprobs, _ = logprobs_of(hidden[:AUDITED], head, targets[:AUDITED], 1.0)
    with torch.no_grad():
        logprobs_of(ref_hidden[:AUDITED], ref_head, targets[:AUDITED], 1.0)
    kl, _ = kl_to_reference(hidden[AUDITED:], head, ref_hidden[AUDITED:], ref_head, 1.0)
    return chunk_loss(logprobs, torch.full_like(logprobs, 0.5)) + 0.1 * kl.sum()


def dense(hidden: torch.Tensor, head: LMHead, ref_hidden: torch.Tensor, ref_head: LMHead, targets: torch.Tensor):
    """The same from whole logits, with the package's own dense reference."""
    logits, ref_logits = hidden @ head.weight.T, (ref_hidden @ ref_head.weight.T).detach()
    logprobs = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    audited = torch.arange(len(targets), device=targets.device) < AUDITED
    return chunk_loss(logprobs, 0.5 * audited) + 0.1 * anchor_kl(ref_logits, logits, ~audited)


def measure(case: Case, pipe: Any) -> None:
    """Runs in a process of its own."""
    device, dtype = best_device()
    torch.manual_seed(0)

    def normal(*sizes: int) -> torch.Tensor:
        return torch.randn(*sizes, device=device, dtype=dtype)

    hidden, ref_hidden = normal(case.tokens, case.hidden).requires_grad_(), normal(case.tokens, case.hidden)
    # Of this size logits have the spread of a trained model's.
    weight = (normal(case.vocabulary, case.hidden) / case.hidden**0.5).requires_grad_()
    ref_weight = normal(case.vocabulary, case.hidden) / case.hidden**0.5
    heads = LMHead(weight, None, 1.0, None), LMHead(ref_weight, None, 1.0, None)
    targets = torch.randint(case.vocabulary, (case.tokens,), device=device)
    (normal(8, 8) @ normal(8, 8)).sum()  # libraries that are loaded at the first product
    peak, start = Peak(device), time.perf_counter()
    (dense if case.dense else tiled)(hidden, heads[0], ref_hidden, heads[1], targets).backward()
    result = peak.bytes(), time.perf_counter() - start  # before the check below, which needs memory of its own
    for leaf in (hidden, weight):
        assert leaf.grad is not None
        assert leaf.grad.isfinite().all()
    pipe.send(result)


def run(case: Case, results: Path | None = None) -> int | None:
    """Peak bytes of a case, or `None` when its process ended before it was done; prints its row.

    Args:
        case: what is measured.
        results: a JSON file to add the row to.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=measure, args=(case, theirs))
    process.start()
    theirs.close()
    row = f"{'dense' if case.dense else 'tiled':8}{case.tokens:8,}{case.vocabulary:10,}"
    try:
        peak, seconds = ours.recv()
    except EOFError:  # out of memory: other cases may fit
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
    """Peak bytes of a case that was not computed, heads included."""
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
    """Growth with T at two vocabularies, exactly; 1 when it is more than four states a token or depends on V."""
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
    parser.add_argument("--hidden", type=int, default=64, help="width; small, so that it takes minutes on a CPU")
    parser.add_argument("--case", nargs=2, type=int, metavar=("T", "V"), help="one case alone, with its own bound")
    parser.add_argument("--traced", action="store_true", help="count storages instead of computing")
    parser.add_argument("--retain", action="store_true", help="leave it to glibc which freed memory stays resident")
    parser.add_argument("--results", type=Path, help="a JSON file to add what was measured to")
    options = parser.parse_args()
    hidden = options.hidden
    if not options.retain:
        os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(MIB))  # read by glibc when a process starts
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
        sys.exit("A case failed: there is nothing to hold against the bounds.")
    flat = max(beyond[4096, v] for v in vocabularies) - beyond[4096, smallest]
    # Student's and reference's hidden states, at each further token.
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
