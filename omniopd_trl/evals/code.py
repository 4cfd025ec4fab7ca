# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Reward function for programs, in TRL's signature: a program is right if it passes all tests."""

import asyncio
import json
import logging
import math
import os
import re
import secrets
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from omniopd_trl.errors import DataError, first_line
from omniopd_trl.evals.math import text_of_completion
from omniopd_trl.evals.sandbox import Limits, Sandbox, make_sandbox

logger = logging.getLogger(__name__)

# A program that is nearly too slow on each of hundreds of tests ends here.
_PROGRAM_SECONDS = 300.0

# A block, with what follows its opening fence. Blocks of other languages are matched too: their closing fences would
# be read as opening ones.
_BLOCK = re.compile(r"^[ \t]*```([^\n`]*)\n(.*?)(?:^[ \t]*```|\Z)", re.MULTILINE | re.DOTALL)

# What LeetCode imports before a solution, which APPS and TACO took their functions from.
_IMPORTS = (
    "import bisect, collections, functools, heapq, itertools, math, operator, random, re, string, sys\n"
    "from bisect import *\nfrom collections import *\nfrom functools import *\nfrom heapq import *\n"
    "from itertools import *\nfrom math import *\nfrom typing import *\n"
)

# Characters of tests that are parsed before a run.
_PARSED = 100_000_000

# The harness prints to the real standard output, and what the program prints goes to the standard error.
_CALLS = """\
import json, os, sys
_out = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
_name = {name!r}
_tests = json.loads(sys.stdin.readline())
_space = {{"__name__": "__main__"}}
exec(compile({imports!r}, "imports", "exec"), _space)
exec(compile({program!r}, "main.py", "exec"), _space)
_function = _space.get(_name)
if _function is None:
    _function = getattr(_space["Solution"](), _name)
for _arguments in _tests:
    _out.write(json.dumps(_function(*_arguments)) + "\\n")
    _out.flush()
"""

# The token is read after the tests: a program that exits early, or prints, does not pass.
_CHECK = """\
import os, sys
_out = os.dup(1)
os.dup2(2, 1)
_space = {{"__name__": "__main__"}}
exec(compile({program!r}, "main.py", "exec"), _space)
exec(compile({check!r}, "check.py", "exec"), _space)
_space["check"](_space[{entry_point!r}])
os.write(_out, sys.stdin.readline().encode())
"""


@dataclass(frozen=True)
class Verdict:
    """How a program did.

    Attributes:
        passed: whether it passed all tests.
        tests: number of tests.
        failed: number of the first test that it did not pass, from 0; `None` if it passed all.
        reason: why it did not pass, in a few words; empty if it passed.
    """

    passed: bool
    tests: int
    failed: int | None = None
    reason: str = ""


def program_of(completion: str) -> str:
    """The program in a completion: its last block of Python, or else its last block without a language, or all of it.

    A block that the completion does not close counts too; it is cut off, and fails by itself.
    """
    blocks: dict[str, str] = {}
    for language, text in _BLOCK.findall(completion):
        name = language.strip().lower()
        blocks["python" if name in ("python3", "py") else name] = text
    return next((blocks[name] for name in ("python", "") if name in blocks), completion)


def run_tests(program: str, tests: str, sandbox: Sandbox) -> Verdict:
    """Run a program on its tests, up to the first that it does not pass.

    The expected outputs never enter the sandbox, except with `check`, whose assertions run in the program's own
    process: a program that is written to deceive them can.

    Args:
        program: text of the program.
        tests: JSON text, one of

            - `{"inputs": [text, ...], "outputs": [text, ...]}`: the program reads standard input. Outputs are equal
              if their words are: whitespace does not count, and a number with a decimal point may differ by 1e-6;
            - the same with `"fn_name"`: inputs are lists of arguments of that function, or of that method of a class
              `Solution`; outputs are its results, perhaps each in a list of one, as in APPS;
            - `{"check": text, "entry_point": name}`: Python code that defines `check(function)`, as in HumanEval.
        sandbox: where it runs.

    Raises:
        DataError: when the tests cannot be read.
        SandboxError: when the sandbox does not work.
    """
    parsed = _parse(tests)
    if "check" in parsed:
        token = secrets.token_hex(16)
        outcome = sandbox.run(_CHECK.format(program=program, **parsed), token + "\n")
        passed = outcome.stdout.strip() == token
        return Verdict(passed, 1, None if passed else 0, "" if passed else _reason(outcome))
    inputs, outputs = parsed["inputs"], parsed["outputs"]
    if name := parsed.get("fn_name"):
        source = _CALLS.format(name=name, imports=_IMPORTS, program=program)
        outcome = sandbox.run(source, json.dumps([_arguments(given) for given in inputs]) + "\n")
        lines = outcome.stdout.splitlines()
        for index, expected in enumerate(outputs):
            if index >= len(lines):
                return Verdict(False, len(inputs), index, _reason(outcome))
            if not _is_result(lines[index], expected):
                return Verdict(False, len(inputs), index, "wrong result")
        return Verdict(True, len(inputs))
    start = time.monotonic()
    for index, (given, expected) in enumerate(zip(inputs, outputs, strict=True)):
        outcome = sandbox.run(program, _text(given))
        if outcome.exit_code != 0:
            return Verdict(False, len(inputs), index, _reason(outcome))
        if not same_output(outcome.stdout, _text(expected)):
            return Verdict(False, len(inputs), index, "wrong output")
        if time.monotonic() - start > _PROGRAM_SECONDS:
            return Verdict(False, len(inputs), index, "timeout of all tests")
    return Verdict(True, len(inputs))


def same_output(output: str, expected: str) -> bool:
    """Whether two outputs have the same words. A number that is expected with a decimal point may differ by 1e-6,
    relative or absolute."""
    words, right = output.split(), expected.split()
    return len(words) == len(right) and all(map(_same_word, words, right))


def _same_word(word: str, right: str) -> bool:
    if word == right:
        return True
    if "." not in right:
        return False
    try:
        return math.isclose(float(word), float(right), rel_tol=1e-6, abs_tol=1e-6)
    except ValueError:
        return False


def _is_result(line: str, expected: Any) -> bool:
    try:
        result = json.loads(line)
        return _same_value(result, expected) or (
            isinstance(expected, list) and len(expected) == 1 and _same_value(result, expected[0])
        )
    except (ValueError, RecursionError, OverflowError):  # thousands of brackets, a whole number beyond a float
        return False


def _same_value(value: Any, right: Any) -> bool:
    if isinstance(value, list) and isinstance(right, list):
        return len(value) == len(right) and all(map(_same_value, value, right))
    if isinstance(right, float) and isinstance(value, int | float) and not isinstance(value, bool):
        return math.isclose(value, right, rel_tol=1e-6, abs_tol=1e-6)
    # True == 1 in Python, and not in the tests.
    return bool(value == right) and isinstance(value, bool) == isinstance(right, bool)


def _text(value: Any) -> str:
    """A standard input or output. APPS has some as lists of lines."""
    return "\n".join(map(str, value)) if isinstance(value, list) else str(value)


def _arguments(given: Any) -> list[Any]:
    """Arguments of a call. Some sets have them as text with a JSON value per line."""
    return [json.loads(line) for line in given.splitlines()] if isinstance(given, str) else given


def _reason(outcome: Any) -> str:
    if outcome.status != "finished":
        return str(outcome.status)
    last = next((line for line in reversed(outcome.stderr.splitlines()) if line.strip()), "")
    return f"exit code {outcome.exit_code}: {last.strip()[:200]}" if outcome.exit_code else "ended before the tests"


@lru_cache(maxsize=8)  # the samples of a prompt follow each other, and tests may have megabytes
def _parse(tests: str) -> dict[str, Any]:
    try:
        parsed = json.loads(tests)
        if "check" in parsed:
            return {"check": str(parsed["check"]), "entry_point": str(parsed["entry_point"])}
        if not parsed["inputs"] or len(parsed["inputs"]) != len(parsed["outputs"]):
            raise ValueError(f"{len(parsed['inputs'])} inputs and {len(parsed['outputs'])} outputs")
        if parsed.get("fn_name"):
            for given in parsed["inputs"]:
                _arguments(given)
        return dict(parsed)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(
            f"`tests` {tests!r:.100} cannot be read ({type(error).__name__}: {first_line(error)}). It must be JSON "
            'text such as {"inputs": ["1 2"], "outputs": ["3"]}.'
        ) from error


def check_tests(column: Iterable[Any]) -> None:
    """Refuse tests that cannot be read.

    Sets of problems have gigabytes of tests, which take a minute and more. After the first 100 million characters only
    the first and the last one of each row are looked at: damaged tests may then be found when they are used.

    Args:
        column: the cells of the column of tests.

    Raises:
        DataError: when one is not JSON text, or not of one of the forms.
    """
    parsed = 0
    for cell in column:
        tests = _json_text(cell)
        if parsed < _PARSED or (tests[:1], tests[-1:]) != ("{", "}"):
            _parse(tests)
            parsed += len(tests)


def _json_text(tests: Any) -> str:
    if not isinstance(tests, str):
        raise DataError(
            f"`tests` {tests!r:.100} is not text. It must be JSON text: write the column with `json.dumps`."
        )
    return tests


class CodeAccuracy:
    """Reward function that scores whether each completion's program passes all tests.

    Programs are run side by side in threads of a pool, and the caller's event loop is not blocked. Equal programs with
    equal tests are run once per call.

    Args:
        sandbox: a sandbox, or its name: see [`make_sandbox`]. It is created, and tried, at the first call. Defaults to
            the name in the environment variable `OMNIOPD_SANDBOX`, and without one to `"auto"`.
        limits: what a program may use, for a sandbox that is named.
        workers: programs at a time. Defaults to the number of CPUs, and at most 32.
    """

    def __init__(self, sandbox: Sandbox | str | None = None, limits: Limits = Limits(), workers: int | None = None):  # noqa: B008
        self.__name__ = "code_accuracy"
        self._sandbox = sandbox
        self._limits = limits
        self._pool = ThreadPoolExecutor(workers or min(os.cpu_count() or 1, 32), thread_name_prefix="sandbox")

    def sandbox(self) -> Sandbox:
        """The sandbox, which runs.

        Raises:
            ConfigError, SandboxError: when there is none that works.
        """
        if isinstance(self._sandbox, str | None):
            return make_sandbox(self._sandbox or os.environ.get("OMNIOPD_SANDBOX") or "auto", self._limits)
        return self._sandbox

    async def __call__(
        self, completions: Sequence[str | list[dict[str, Any]]], tests: Sequence[str | None], **kwargs: Any
    ) -> list[float | None]:
        """Score completions.

        Args:
            completions: plain texts, or conversational completions, of which the last message is scored.
            tests: the dataset's column of tests: see [`run_tests`].
            **kwargs: other columns that TRL passes. Not used.

        Returns:
            1.0 or 0.0 per completion, and `None` where a row has no tests, as in a mixture with mathematics.

        Raises:
            ConfigError, SandboxError: when there is no sandbox that works.
            DataError: when tests cannot be read.
        """
        loop = asyncio.get_running_loop()
        sandbox = await loop.run_in_executor(self._pool, self.sandbox)
        pairs = [
            None if given is None else (program_of(text_of_completion(completion)), _json_text(given))
            for completion, given in zip(completions, tests, strict=True)
        ]
        distinct = [*dict.fromkeys(pair for pair in pairs if pair is not None)]
        running = [loop.run_in_executor(self._pool, run_tests, *pair, sandbox) for pair in distinct]
        verdicts = dict(zip(distinct, await asyncio.gather(*running), strict=True))
        return [None if pair is None else float(verdicts[pair].passed) for pair in pairs]


code_accuracy = CodeAccuracy()
