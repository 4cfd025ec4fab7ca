# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Write tests/CASES.md: inputs that once failed, and the tests that show what happens now.

    python -m scripts.cases [--check]

The tests are found by their marker, `@pytest.mark.case("T9")`.
"""

import ast
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "tests" / "CASES.md"

CASES = {
    "T1": "400 `Content Exists Risk` for one prompt",
    "T2": "400 with the code `invalid_prompt`, flagged",
    "T3": "403: the model requires moderation and the input was flagged",
    "T4": "400: no room for an answer, `max_tokens must be at least 1`",
    "T5": "400: `Input length exceeds the maximum allowed length`",
    "T6": "422: inputs and new tokens exceed a limit",
    "T7": "400: input length and `max_tokens` exceed the context limit",
    "T8": "413 with an HTML page",
    "T9": "a text with half of a surrogate pair",
    "T10": "content as a list of parts, with thinking parts",
    "T11": "invalid UTF-8, deep nesting, fields of other types",
    "T12": "200 with an error in its body",
    "T13": "200 with HTML or another JSON object",
    "T14": "finish reasons of answers that were broken off",
    "T15": "usage that is no whole number in range",
    "T16": "gzip bombs and endless bodies",
    "T17": "an error message of a megabyte",
    "T18": "an instructed answer of 3,000 periods",
    "T19": "a megabyte of text in place of 70 tokens",
    "T20": "control characters in messages",
    "T21": "redirects to another host",
    "F1": "optional fields that a service refuses",
    "F2": "`max_tokens` or `max_completion_tokens`",
    "F3": "`n` that is refused",
    "F4": "a probe with another `n` than the run",
    "F5": "fields and headers that a service wants",
    "F6": "a row for each service",
    "F7": "names with a vendor before them",
    "P1": "reasoning in the text, or in place of it",
    "P2": "a refusal in words",
    "P3": "all rollouts of a chunk equal; requests to Claude that do not differ",
    "P4": "a served model that changes",
    "P5": "prompts that a server cuts silently",
    "A1": "one refused or empty sample at the probe",
    "A2": "instructed answers that start over",
    "A3": "Control-C during a probe without an answer",
    "A4": "a slow similarity while requests are in flight",
    "A5": "keys in addresses, in encoded forms, under harmless names",
    "A6": "addresses, keys and proxies that cannot be used",
    "A7": "spent quotas under other codes; a request above the limit per minute",
    "A8": "kept-alive connections that were closed",
    "A9": "a wrong address; options without effect that nobody set",
    "R1": "evaluations and predictions after each other",
    "R2": "a student in bf16 at a low learning rate",
    "R3": "a model whose logits are not `scale * softcap(W h)`",
    "R4": "`trainable_token_indices` on a tied student",
    "R5": "nothing trainable",
    "R6": "`bf16_full_eval`, then saved",
    "R7": "a chat template that raises on one row",
    "R8": "two active adapters",
    "R9": "special tokens as marks of reasoning",
    "R10": "the space between a plain prompt and its completion",
    "R11": "a tokenizer that appends the end of the sequence",
    "R12": "special tokens outside the embedding, or none",
    "R13": "AdaLoRA, an adapter named `ref`, a saved reference",
    "R14": "reward functions of other kinds",
    "R15": "a vision-language checkpoint as local teacher",
    "R16": "a sampler that is not the policy",
    "R17": "options silently without effect",
    "R18": "lists, torch datasets, `messages`, `do_sample`",
    "R19": "`beta: 0.0`",
    "R20": "machines that share no folder, another number of processes",
    "R21": "a calculation in place of a number",
    "U1": "a rerun in the same folder",
    "U2": "the meaning of a posterior near the prior",
    "U3": "no metric for the signal",
    "U4": "tracebacks in place of one line",
    "U5": "advice of the commands",
    "U6": "dollars that are never reported",
    "U7": "a recipe for a cheap recent model",
    "U8": "examples that fit no GPU; bf16 on a CPU",
    "U9": "noise and waiting at the start",
    "U10": "Control-C under a launcher",
    "U11": "a full disk, a deleted journal, unknown roles, blank prompts, YAML aliases",
    "U12": "a journal of 200,000 audits",
    "U13": "two sentences without a full stop",
}


# What was seen when the tests were run with the code before the fixes.
PROOF = (
    "On the code before the fixes (82a09a7), a test of each line fails by its assertion, by the error that the input",
    "raised, or by its time limit. T18 fails before edd319f. The tests of F4 and R9 need options that were not there:",
    "they fail on the current code with the fault put back.",
)


def marked(path: Path) -> Iterator[tuple[str, str]]:
    """Case ids and names of the tests in a file."""

    tree = ast.parse(path.read_text("utf-8"))
    tables = {
        target.id: [str(c.value) for c in ast.walk(node.value) if isinstance(c, ast.Constant) and c.value in CASES]
        for node in tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }

    def ids(node: ast.AST) -> Iterator[str]:
        calls = [call for call in ast.walk(node) if isinstance(call, ast.Call)]
        marks = [c for c in calls if "case" in (getattr(c.func, "attr", ""), getattr(c.func, "id", ""))]
        for call in marks:
            yield from (str(argument.value) for argument in call.args if isinstance(argument, ast.Constant))
        if any(not isinstance(argument, ast.Constant) for call in marks for argument in call.args):
            # The ids are in the parameters, or in a table that they are taken from.
            yield from (str(c.value) for c in ast.walk(node) if isinstance(c, ast.Constant) and c.value in CASES)
            for name in (n.id for n in ast.walk(node) if isinstance(n, ast.Name)):
                yield from tables.get(name, [])

    def visit(body: list[ast.stmt], outer: str) -> Iterator[tuple[str, str]]:
        for node in body:
            if isinstance(node, ast.ClassDef):
                name = f"{outer}{node.name}"
                yield from ((case, name) for decorator in node.decorator_list for case in ids(decorator))
                yield from visit(node.body, f"{name}::")
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield from ((case, outer + node.name) for decorator in node.decorator_list for case in ids(decorator))
            elif isinstance(node, ast.Assign) and any(getattr(t, "id", "") == "pytestmark" for t in node.targets):
                yield from ((case, outer.removesuffix("::")) for case in ids(node.value))

    yield from visit(tree.body, "")


def page() -> str:
    """The page.

    Raises:
        SystemExit: when a case has no test, or a marker names an unknown case.
    """
    tests: dict[str, list[str]] = defaultdict(list)
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        where = path.relative_to(ROOT / "tests").as_posix()
        for case, name in marked(path):
            tests[case].append(f"`{where}`" + (f" `{name}`" if name else ""))
    unknown, missing = sorted(tests.keys() - CASES), sorted(CASES.keys() - tests)
    if unknown or missing:
        sys.exit(f"Unknown cases: {unknown}. Cases without a test: {missing}.")
    rows = [f"| {case} | {what} | {'<br>'.join(dict.fromkeys(tests[case]))} |" for case, what in CASES.items()]
    lines = [
        "# Inputs that once failed",
        "",
        "Written by `python -m scripts.cases`. Each test is marked with `@pytest.mark.case`. The letters: answers of "
        "teachers (T),",
        "fields of requests (F), poor answers (P), around a request (A), models and options (R), people (U).",
        "",
        *PROOF,
        "",
        "| id | input | tests |",
        "| --- | --- | --- |",
        *rows,
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    text = page()
    if "--check" in sys.argv:
        if PAGE.read_text("utf-8") != text:
            sys.exit(f"{PAGE} is not current. Run `python -m scripts.cases`.")
    else:
        PAGE.write_text(text, "utf-8")


if __name__ == "__main__":
    main()
