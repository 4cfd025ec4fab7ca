# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Prompt tokens served by vLLM's prefix cache, relative to the maximum for nested prefixes.

    python -m benchmarks.prefix_cache [--trajectories 16] [--samples 1 10]
    python -m benchmarks.prefix_cache --url http://127.0.0.1:8000/v1 --model NAME --tokenizer PATH --block-size 16

Trajectories of the demo's student, several solutions long, are audited as in training: ten chunks each, and all chunks
of all trajectories in flight at once, up to the engine's limit. Without `--url` the demo's teacher is served by the
vLLM of this environment (that of `make test-vllm`). The exit code is 1 if a ratio is below 0.9.

**The bound.** The prefixes of a trajectory are nested, `p_1` in `p_2` in ... in `p_M`, of `L_1 < ... < L_M` tokens,
prompt included. When `p_m` arrives, at most the tokens that it shares with `p_(m-1)` are already computed: `s_m`
tokens, which is `L_(m-1)`, minus one if the cut splits a token. At least one token of a prompt is computed, since it
gives the first logits. Of the `sum L_m` tokens, a cache can therefore serve

    A = sum_(m > 1) min(s_m, L_m - 1)                   token by token
    A_B = sum_(m > 1) floor(min(s_m, L_m - 1) / B) B    in whole blocks of B tokens, as vLLM keeps them

For equally spaced prefixes after a short prompt, `A / sum L_m` is near `1 - 2 / (M + 1)`: 0.82 for ten prefixes. Whole
blocks lose `B / 2` tokens per prefix on average. The printed ratios are the served tokens over `A_B` and over `A`.

With n samples in a request, the server looks up the prompt once per sample. Each further sample finds all whole blocks
of the first one, `floor((L_m - 1) / B) B` tokens, independent of the nesting. These are subtracted before the ratio.

The ratio may exceed 1 by a few blocks, since two problems may have a common beginning.

**Source of the numbers.** Hits are read from the server's counter `vllm:prefix_cache_hits_total`. With one sample per
request the `usage` of the answers agrees with it. With more samples it does not: its `cached_tokens` is the number
that the last sample of a request found, including blocks that the first sample had to compute. It does not measure the
cost and is printed for comparison only.
"""

import argparse
import asyncio
import itertools
import random
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from benchmarks.servers import BLOCK, Server, metric, vllm_serve
from omniopd_trl.audits.auditor import Auditor
from omniopd_trl.audits.types import AuditSettings, PolicyScores, Trajectory
from omniopd_trl.demo import asset_path
from omniopd_trl.demo.world import STUDENT_SLIP, problems, solution
from omniopd_trl.method.similarity import get_similarity
from omniopd_trl.teachers import Prefix, SamplingRequest, Teacher, TeacherReply
from omniopd_trl.teachers.load import remote_teacher
from omniopd_trl.teachers.remote.settings import EngineSettings

NUM_CHUNKS, CHUNK_LENGTH = 10, 20
# Student tokens of a trajectory. With the prompt they fit into the context of the demo's teacher.
LENGTH = 640
REQUIRED = 0.9


@dataclass(frozen=True)
class Result:
    """Requests of one round of audits, and the tokens that the cache served.

    Attributes:
        samples: samples per request.
        requests: number of answered requests.
        prompt: prompt tokens of all requests, each request counted once.
        allowed_tokens: `A`, in tokens.
        allowed_blocks: `A_B`, in tokens.
        repeated: cached tokens found by the second and later samples of the requests.
        looked_up: tokens that the server looked up, by its counter.
        hits: tokens that the server found in its cache, by its counter.
        usage: cached tokens in the `usage` of the answers.
    """

    samples: int
    requests: int
    prompt: int
    allowed_tokens: int
    allowed_blocks: int
    repeated: int
    looked_up: int
    hits: int
    usage: int

    @property
    def served(self) -> int:
        """Cached tokens found by the first sample of each request."""
        return self.hits - self.repeated

    @property
    def ratio(self) -> float:
        """Served tokens relative to `A_B`."""
        return self.served / self.allowed_blocks

    def rows(self) -> Iterator[tuple[str, str]]:
        """Names and values for the printed table."""
        yield "samples per request", f"{self.samples}"
        yield "requests", f"{self.requests}"
        yield "prompt tokens", f"{self.prompt:,}"
        yield "allowed, token by token", f"{self.allowed_tokens:,} ({self.allowed_tokens / self.prompt:.3f})"
        yield "allowed, in whole blocks", f"{self.allowed_blocks:,} ({self.allowed_blocks / self.prompt:.3f})"
        yield "served", f"{self.served:,} ({self.served / self.prompt:.3f})"
        yield "ratio, of whole blocks", f"{self.ratio:.3f}"
        yield "ratio, of tokens", f"{self.served / self.allowed_tokens:.3f}"
        yield "cached_tokens in the usage", f"{self.usage:,}"
        yield "counted by the server", f"{self.hits:,} of {self.looked_up:,}"


class Recorder(Teacher):
    """Forwards requests to a teacher, and records prefixes and replies."""

    def __init__(self, teacher: Teacher):
        self.teacher = teacher
        self.name = teacher.name
        self.asked: list[tuple[Sequence[Prefix], list[TeacherReply]]] = []

    async def sample(self, prefixes: Sequence[Prefix], request: SamplingRequest) -> list[TeacherReply]:
        replies = await self.teacher.sample(prefixes, request)
        self.asked.append((prefixes, replies))
        return replies


def trajectories(
    count: int, name: str, tokenizer: PreTrainedTokenizerBase, length: int
) -> list[tuple[Trajectory, PolicyScores]]:
    """Student texts of `length` tokens, each for a different problem. `name` seeds the problems.

    The entropies are random: chunks may be anywhere, as in training.
    """
    rng = random.Random(name)
    generator = torch.Generator().manual_seed(rng.getrandbits(32))
    stream = problems(name)
    found = []
    for index, problem in enumerate(itertools.islice(stream, count)):
        text, token_ids = "", []
        for further in itertools.chain([problem], stream):
            text += solution(further, "student", STUDENT_SLIP, rng) + "\n"
            token_ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            if len(token_ids) >= length:
                break
        prompt = [{"role": "user", "content": problem.question}]
        logprobs = torch.full((length,), -0.1)
        scores = PolicyScores(logprobs, torch.rand(length, generator=generator), logprobs)
        found.append((Trajectory(prompt, [], token_ids[:length], seed=index), scores))
    return found


def auditor(teacher: Teacher, tokenizer: PreTrainedTokenizerBase, samples: int) -> Auditor:
    """An auditor with the trainer's settings and ten chunks."""
    settings = AuditSettings(
        num_chunks=NUM_CHUNKS,
        chunk_length=CHUNK_LENGTH,
        min_chunk_length=CHUNK_LENGTH,
        num_rollouts=samples,
        min_rollouts=1,
        prior_strength=1.0,
        chunk_overlap="resample",
        chunk_placement="start",
        chunk_selection="entropy",
        teacher_temperature=1.0,
        teacher_top_p=1.0,
    )
    return Auditor(teacher, tokenizer, settings, get_similarity("exact"))


def bounds(prompts: list[list[int]], block: int) -> tuple[int, int]:
    """`A` and `A_B` for the prefixes of one trajectory, in ascending order."""
    shared = [
        min(
            next((n for n, (a, b) in enumerate(zip(shorter, longer, strict=False)) if a != b), len(shorter)),
            len(longer) - 1,
        )
        for shorter, longer in itertools.pairwise(prompts)
    ]
    return sum(shared), sum(length // block * block for length in shared)


def measure(
    url: str, model: str, tokenizer_path: str, samples: int, count: int, block: int, length: int = LENGTH
) -> Result:
    """Audit new trajectories, and read the server's counters before and after.

    Args:
        url: address of the server, with its `/v1`. The server must have no other clients.
        model: name of the model on the server.
        tokenizer_path: path of the teacher's tokenizer.
        samples: samples per request.
        count: number of trajectories.
        block: tokens per block of the server's cache.
        length: length of a trajectory, in student tokens.
    """
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_path)
    students = AutoTokenizer.from_pretrained(asset_path("student"))
    work = trajectories(count, f"prefix cache, {samples} samples", students, length)
    teacher = remote_teacher(
        f"vllm:{model}", base_url=url, tokenizer=tokenizer_path, settings=EngineSettings(timeout=300.0)
    )
    recorder = Recorder(teacher)
    audits = auditor(recorder, students, samples)

    async def run() -> None:
        try:
            await asyncio.gather(*(audits.audit(*one) for one in work))
        finally:
            await teacher.aclose()

    queries, hits = metric(url, "vllm:prefix_cache_queries_total"), metric(url, "vllm:prefix_cache_hits_total")
    asyncio.run(run())
    queries = metric(url, "vllm:prefix_cache_queries_total") - queries
    hits = metric(url, "vllm:prefix_cache_hits_total") - hits

    prompts_of = [
        [
            tokenizer(
                str(tokenizer.apply_chat_template(p.prompt, add_generation_prompt=True, tokenize=False))
                + p.completion,
                add_special_tokens=False,
            )["input_ids"]
            for p in prefixes
        ]
        for prefixes, _ in recorder.asked
    ]
    replies = [reply for _, answers in recorder.asked for reply in answers]
    lengths = [len(prompt) for prompts in prompts_of for prompt in prompts]
    assert all(len(prompts) == NUM_CHUNKS for prompts in prompts_of), "a trajectory has room for fewer chunks"
    assert not any(reply.outcomes.get("failed_requests") for reply in replies), "a request failed"
    assert [reply.usage.prompt_tokens for reply in replies] == lengths, "the server reads other prompts"
    tokens, blocks = (sum(numbers) for numbers in zip(*(bounds(p, block) for p in prompts_of), strict=True))
    return Result(
        samples=samples,
        requests=len(replies),
        prompt=sum(lengths),
        allowed_tokens=tokens,
        allowed_blocks=blocks,
        repeated=(samples - 1) * sum((length - 1) // block * block for length in lengths),
        looked_up=round(queries),
        hits=round(hits),
        usage=sum(reply.usage.cached_tokens for reply in replies),
    )


@contextmanager
def server(options: argparse.Namespace) -> Iterator[tuple[str, str, str, int]]:
    """Address, model, tokenizer and block size of the given server, or of a new one."""
    if options.url is not None:
        yield options.url, options.model, options.tokenizer or options.model, options.block_size
        return
    path = asset_path("teacher")
    with tempfile.TemporaryDirectory() as folder:
        arguments = vllm_serve(path, max_model_len=1024)
        with Server(arguments, Path(folder) / "server.log") as started:
            yield started.url, "teacher", str(path), BLOCK


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--trajectories", type=int, default=16)
    parser.add_argument("--samples", type=int, nargs="+", default=[1, 10])
    parser.add_argument("--url", help="address of a running server, with its /v1; by default one is started")
    parser.add_argument("--model", default="teacher", help="name of the model on that server")
    parser.add_argument("--tokenizer", help="path or id of its tokenizer; the model's name by default")
    parser.add_argument("--block-size", type=int, default=BLOCK, help="block size of that server")
    options = parser.parse_args()
    passed = True
    with server(options) as (url, model, tokenizer, block):
        for samples in options.samples:
            result = measure(url, model, tokenizer, samples, options.trajectories, block)
            for label, value in result.rows():
                print(f"{label:28} {value}")
            print()
            passed &= result.ratio >= REQUIRED
    sys.exit(None if passed else f"The cache serves less than {REQUIRED:g} of what nested prefixes allow.")


if __name__ == "__main__":
    main()
