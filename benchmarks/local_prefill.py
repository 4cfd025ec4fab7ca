# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Savings of the local teacher's cache: prompt tokens in its forward passes, and the time of audits.

    python -m benchmarks.local_prefill [--tokens 500] [--prompt 100] [--rounds 3] [--chunks 1,2,3,5,10]
                                       [--results FILE]

A teacher with random weights continues one trajectory before each of M chunks, with N = 10 rollouts of 50 tokens each.
Three counts are compared:

- the local teacher: the longest prefix is computed once, and all chunks and rollouts share its keys and values.
- one generation per prefix, without use of the nesting: each prefix is computed for each of its rollouts, since
  `generate` repeats the prompt for each sample.
- in between: each prefix is computed once for all of its rollouts.

Tokens are counted in the forward passes: every input token before the first new token of a generation. Chunks are
spread evenly over the trajectory. The first two ways alternate, and the median ratio of their times is printed (CPU
time on a CPU). The exit code is 1 if at M = 10 the local teacher computes more than a third of the tokens of the third
count.
"""

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from benchmarks.results import add_result
from benchmarks.shapes import best_device, model_of, now, tokenizer
from omniopd_trl.accounting.hardware import QWEN3, Shape
from omniopd_trl.teachers import LocalTeacher, Prefix, SamplingRequest

CHUNK, ROLLOUTS = 50, 10
BOUND, BOUND_AT = 3.0, 10  # the factor, and the number of chunks
TEACHER = Shape("small", 256, 4, 768, 4, kv_heads=2, head_dim=64, vocabulary=4096)


class Prefilled:
    """Counts the input tokens of a model's forward passes before the first new token of a generation."""

    def __init__(self, model: Any):
        self.tokens = 0
        self._begins = self._has_trunks = False
        self._generate = model.generate
        model.generate = self._generating
        model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _generating(self, *args, **kwargs):
        self._begins = True
        return self._generate(*args, **kwargs)

    def _count(self, module, args, kwargs):
        input_ids, mask = kwargs["input_ids"], kwargs.get("attention_mask")
        in_tree = mask is not None and mask.dim() == 4
        # After the first pass of a generation, the input has one column, the new token of each row. The first pass
        # also has one column if the cache holds all of a prefix except its last token. In a tree, the first pass
        # computes the trunks, and the second one what rows do not share with them.
        if self._begins or (self._has_trunks if in_tree else input_ids.size(1) > 1):
            padding = 0 if mask is None or in_tree else int((mask[:, -input_ids.size(1) :] == 0).sum())
            self.tokens += input_ids.numel() - padding
        self._begins, self._has_trunks = False, mask is None

    def take(self) -> int:
        tokens, self.tokens = self.tokens, 0
        return tokens


def one_generation_per_prefix(teacher: LocalTeacher, prefixes: list[Prefix], request: SamplingRequest) -> None:
    """Each prefix separately, with `generate` and its `num_return_sequences`."""
    config = GenerationConfig(
        max_new_tokens=request.max_tokens,
        do_sample=True,
        top_k=0,
        num_return_sequences=request.num_samples,
        eos_token_id=None,
        pad_token_id=teacher.tokenizer.pad_token_id,
        disable_compile=True,
    )
    for prefix in prefixes:
        ids = torch.tensor([teacher.encode(prefix)], device=teacher.model.device)
        with torch.no_grad():
            teacher.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config)


def from_one_cache(teacher: LocalTeacher, prefixes: list[Prefix], request: SamplingRequest) -> None:
    """All prefixes together, as in the trainer."""
    teacher.sample_trajectories([prefixes], request)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--tokens", type=int, default=500, help="tokens of the trajectory")
    parser.add_argument("--prompt", type=int, default=100, help="tokens of the problem")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--chunks", default="1,2,3,5,10", help="values of M")
    parser.add_argument("--results", type=Path, help="a JSON file to which the results are added")
    options = parser.parse_args()
    device, dtype = best_device()
    shape = QWEN3[0] if device.type == "cuda" else TEACHER
    words = tokenizer(shape.vocabulary)
    teacher = LocalTeacher(model_of(shape, device, dtype), words)
    teacher.eos_token_ids = []  # both ways generate the same number of tokens
    once = SamplingRequest(num_samples=1, max_tokens=1, temperature=1.0, top_p=1.0)
    teacher.sample_trajectories([[Prefix("warm-up")]], once)  # with the check of the model
    counter = Prefilled(teacher.model)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(300, shape.vocabulary, (options.prompt + options.tokens,), generator=generator)
    prompt, solution = words.decode(ids[: options.prompt]), ids[options.prompt :]
    request = SamplingRequest(num_samples=ROLLOUTS, max_tokens=CHUNK, temperature=1.0, top_p=1.0, seed=0)
    print(f"{'':4}{'one per':>12}{'the same,':>12}{'local':>12}{'fewer':>10}{'fewer':>10}{'time over':>12}")
    print(f"{'M':4}{'prefix':>12}{'once for N':>12}{'teacher':>12}{'':>10}{'once for N':>10}{'one each':>12}")
    holds = True
    for chunks in map(int, options.chunks.split(",")):
        starts = [(options.tokens - CHUNK) * (m + 1) // chunks for m in range(chunks)]
        prefixes = [Prefix(prompt, words.decode(solution[:start])) for start in starts]
        once = sum(len(teacher.encode(prefix)) for prefix in prefixes)
        ratios = []
        for _ in range(options.rounds):
            seconds = []
            for way in (one_generation_per_prefix, from_one_cache):
                start = now(device)
                way(teacher, prefixes, request)
                seconds.append((now(device) - start, counter.take()))
            (plain_seconds, plain), (local_seconds, local) = seconds
            ratios.append(local_seconds / plain_seconds)
        least = once / local
        print(
            f"{chunks:<4}{plain:12,}{once:12,}{local:12,}{plain / local:10.2f}{least:10.2f}"
            f"{statistics.median(ratios):12.3f}",
            flush=True,
        )
        if options.results:
            tokens = {"one_each": plain, "once_for_rollouts": once, "local_teacher": local}
            where = {"shape": shape.name, "device": device.type, "chunks": chunks}
            add_result(options.results, {**where, **tokens, "time_ratio": statistics.median(ratios)})
        if chunks == BOUND_AT:
            print(f"\n{'fewer than once for N at M = 10':72}{least:8.2f}   bound {BOUND}")
            holds = least >= BOUND
    sys.exit(0 if holds else 1)


if __name__ == "__main__":
    main()
