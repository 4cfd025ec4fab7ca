# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Overhead of the rollout engine over the SDK and over the latency bound.

    python -m benchmarks.teacher_engine [--trajectories 64] [--latency 0.5] [--rounds 2]

A loopback server in a separate process answers each chat completion after a fixed latency. The same audits (10 chunks
per trajectory, 10 rollouts per chunk, 64 concurrent requests) run through the engine and through the bare SDK with a
semaphore, in turn, with 10 samples per request and with one. Ratios are from a single run.
"""

import argparse
import asyncio
import gc
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Awaitable, Callable
from typing import Any

from openai import AsyncOpenAI

from omniopd_trl.teachers.base import Prefix, SamplingRequest
from omniopd_trl.teachers.instruct.prompt import render_messages
from omniopd_trl.teachers.load import remote_teacher
from omniopd_trl.teachers.remote.settings import EngineSettings

CHUNKS, ROLLOUTS, CONCURRENCY = 10, 10, 64


def serve(latency: float, pipe: Any) -> None:
    """An HTTP server that answers every request after `latency` seconds with the requested number of samples."""
    bodies: dict[int, bytes] = {}

    def response(n: int) -> bytes:
        if n not in bodies:
            message = {"role": "assistant", "content": "and so the sum is 42", "refusal": None}
            choices = [{"index": i, "message": message, "finish_reason": "length", "logprobs": None} for i in range(n)]
            usage = {"prompt_tokens": 200, "completion_tokens": 50 * n, "total_tokens": 200 + 50 * n}
            body = {"id": "x", "object": "chat.completion", "created": 1, "model": "m", "choices": choices}
            data = json.dumps({**body, "usage": usage}).encode()
            head = f"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n"
            bodies[n] = head.encode() + data
        return bodies[n]

    async def connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while head := await reader.readuntil(b"\r\n\r\n"):
            length = next(
                int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")
            )
            body = await reader.readexactly(length)
            marker = body.find(b'"n":')
            n = int(body[marker + 4 :].split(b",")[0].split(b"}")[0]) if marker >= 0 else 1
            await asyncio.sleep(latency)
            writer.write(response(n))

    async def quiet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await connection(reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    async def run() -> None:
        server = await asyncio.start_server(quiet, "127.0.0.1", 0, backlog=256)
        pipe.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(run())


def trajectories(count: int) -> list[list[Prefix]]:
    """Nested prefixes of realistic length: about 1,500 characters at the end."""
    prompt = [{"role": "user", "content": "Solve the following math problem step by step. " * 4}]
    solution = "We add the numbers of the first row and carry the one. " * 30
    return [[Prefix(prompt, solution[: 150 * (m + 1)]) for m in range(CHUNKS)] for _ in range(count)]


async def through_engine(url: str, work: list[list[Prefix]], per_request: int) -> None:
    teacher = remote_teacher(
        "openai:bench",
        base_url=url,
        continuation="instruct",
        settings=EngineSettings(max_concurrency=CONCURRENCY),
    )
    teacher.capabilities = teacher.capabilities.__class__("instruct", samples_per_request=per_request)
    request = SamplingRequest(ROLLOUTS, 70)
    try:
        answers = await asyncio.gather(*(teacher.sample(prefixes, request) for prefixes in work))
    finally:
        await teacher.aclose()
    assert all(len(reply.rollouts) == ROLLOUTS for replies in answers for reply in replies)


async def through_sdk(url: str, work: list[list[Prefix]], per_request: int) -> None:
    semaphore = asyncio.Semaphore(CONCURRENCY)
    async with AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:

        async def one(prefix: Prefix) -> int:
            async with semaphore:
                answer = await client.chat.completions.create(
                    model="bench",
                    messages=render_messages(prefix.prompt, prefix.completion),  # type: ignore[arg-type]
                    n=per_request,
                    max_tokens=70,
                    temperature=1.0,
                    top_p=1.0,
                    # The engine sets these fields too, to override the server's defaults.
                    presence_penalty=0.0,
                    frequency_penalty=0.0,
                    extra_body={"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0},
                )
            return len(answer.choices)

        prefixes = [p for part in work for p in part for _ in range(ROLLOUTS // per_request)]
        counts = await asyncio.gather(*map(one, prefixes))
    assert sum(counts) == ROLLOUTS * sum(map(len, work))


def timed(run: Callable[[], Awaitable[None]]) -> tuple[float, float]:
    """Wall and CPU seconds."""
    gc.collect()  # objects of the previous run
    wall, cpu = time.perf_counter(), time.process_time()
    asyncio.run(run())  # type: ignore[arg-type]
    return time.perf_counter() - wall, time.process_time() - cpu


def measure(url: str, count: int, per_request: int, rounds: int, latency: float) -> dict[str, float]:
    work = trajectories(count)
    requests = count * CHUNKS * ROLLOUTS // per_request
    pairs = []
    for _ in range(rounds):
        engine = timed(lambda: through_engine(url, work, per_request))
        pairs.append((engine, timed(lambda: through_sdk(url, work, per_request))))
    bound = -(-requests // CONCURRENCY) * latency
    return {
        "samples_per_request": per_request,
        "requests": requests,
        "engine_seconds": statistics.median(engine[0] for engine, _ in pairs),
        "sdk_seconds": statistics.median(sdk[0] for _, sdk in pairs),
        "bound_seconds": bound,
        "engine_over_sdk": statistics.median(engine[0] / sdk[0] for engine, sdk in pairs),
        "engine_over_bound": statistics.median(engine[0] for engine, _ in pairs) / bound,
        "cpu_ms_added_per_request": statistics.median(1e3 * (engine[1] - sdk[1]) / requests for engine, sdk in pairs),
        "cpu_ms_of_sdk_per_request": statistics.median(1e3 * sdk[1] / requests for _, sdk in pairs),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--trajectories", type=int, default=64)
    parser.add_argument("--latency", type=float, default=0.5)
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    os.environ.setdefault("OPENAI_API_KEY", "none")
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    server = multiprocessing.get_context("spawn").Process(target=serve, args=(options.latency, theirs), daemon=True)
    server.start()
    url = f"http://127.0.0.1:{ours.recv()}/v1"
    # Excludes the objects of imported libraries from garbage collection: full collections at random moments would take
    # longer than the measured overhead.
    gc.freeze()
    try:
        for per_request in (ROLLOUTS, 1):
            # Ten samples per request make a tenth of the requests. More rounds compensate for the noise.
            rounds = options.rounds * (4 if per_request > 1 else 1)
            result = measure(url, options.trajectories, per_request, rounds, options.latency)
            for name, value in result.items():
                print(f"{name:28} {value:10.3f}" if isinstance(value, float) else f"{name:28} {value:10d}")
            print()
    finally:
        server.terminate()
        server.join()


if __name__ == "__main__":
    main()
