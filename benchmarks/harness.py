# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Score the samples of `omniopd eval` with the metrics of lm-evaluation-harness as well.

    pip install --no-deps --target lm-eval lm-eval antlr4-python3-runtime==4.11.1
    PYTHONPATH=lm-eval python -m benchmarks.harness out/eval

prints pass@1 of each metric on the same outputs, and the samples on which it disagrees with ours. Without a folder it
scores the forms of answers below, on which the metrics differ by design. The functions and patterns are those of the
installed harness: `minerva_math`'s metric `math_verify`, and `gsm8k`'s `strict-match` and `flexible-extract`.
"""

import argparse
import json
import sys
from importlib.metadata import version
from pathlib import Path

import lm_eval
import yaml
from lm_eval.api.metrics import exact_match_hf_evaluate
from lm_eval.filters.extraction import RegexFilter
from lm_eval.tasks.minerva_math import utils as minerva

from omniopd_trl.evals import math_accuracy
from omniopd_trl.evals.results import EvalResult

# A completion and the right answer, and why the metrics differ on it.
FORMS = [
    ("Answer: 42", "42", "the same"),
    ("Answer: 1,234 apples", "1234", "the same"),
    (r"so it is \boxed{\frac{1}{2}}.", "0.5", "gsm8k compares characters"),
    (r"Answer: \frac{1}{2}", "0.5", "gsm8k compares characters"),
    ("Answer: $18.00", "18", "gsm8k compares characters"),
    ("Answer: 12 + 30 - 5", "37", "a calculation is no answer in the strict reading"),
    ("Answer: 37 or 38", "37", "minerva_math accepts any of several numbers"),
    ("Answer: 5\nWait.\nAnswer: 37", "37", "the same"),
    ("Answer: 37\nThat took 3 steps.", "37", "gsm8k reads the last number of the text"),
    ("The cost is 40 - 3 = 37 dollars.", "37", "the same"),
    ("#### 37", "37", "strict-match reads this form only"),
    (r"Answer: \sqrt{12}", r"2\sqrt{3}", "minerva_math reads LaTeX between delimiters only, gsm8k numbers only"),
    (r"Answer: $\sqrt{12}$", r"2\sqrt{3}", "gsm8k reads numbers only"),
    ("I do not know.", "37", "the same"),
]


def gsm8k_scorer(name: str):
    """A function of a completion and a right answer that scores as the task `gsm8k` does with one of its filters."""
    path = Path(lm_eval.__file__).parent / "tasks" / "gsm8k" / "gsm8k.yaml"
    task = yaml.safe_load(path.read_text("utf-8"))
    (chosen,) = (entry for entry in task["filter_list"] if entry["name"] == name)
    settings = {key: value for key, value in chosen["filter"][0].items() if key != "function"}
    extract = RegexFilter(**settings)
    (metric,) = task["metric_list"]
    options = {key: metric[key] for key in ("regexes_to_ignore", "ignore_case", "ignore_punctuation")}

    def score(completion: str, gold: str) -> float:
        ((found,),) = extract.apply([[completion]], [{}])
        return float(exact_match_hf_evaluate(predictions=[found], references=[gold], **options)["exact_match"])

    return score


def minerva_scorer(completion: str, gold: str) -> float:
    """The metric `math_verify` of `minerva_math`, whose right answer is in a box."""
    doc = {"solution": rf"\boxed{{{gold}}}", "answer": gold}
    return float(minerva.process_results(doc, [completion])["math_verify"])


def samples_of(folder: str) -> list[tuple[str, str, float]]:
    """Text, right answer and our score of each scored sample in a folder of `omniopd eval`."""
    problems = {problem.key: problem for problem in EvalResult.load(folder).problems}
    samples = []
    for line in map(json.loads, (Path(folder) / "samples.jsonl").read_text("utf-8").splitlines()):
        gold = str(line["answer"] if line.get("answer") is not None else line["solution"])
        for sample, score in zip(line["samples"], problems[line["key"]].scores, strict=True):
            if score is not None:
                samples.append((sample["text"], gold, score))
    return samples


def main(args=None) -> int:
    """Print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", metavar="DIR", help="the `output_dir` of `omniopd eval`")
    options = parser.parse_args(args)
    scorers = {
        "minerva_math math_verify": minerva_scorer,
        "gsm8k flexible-extract": gsm8k_scorer("flexible-extract"),
        "gsm8k strict-match": gsm8k_scorer("strict-match"),
    }
    print(f"lm-eval {version('lm-eval')}, math-verify {version('math-verify')}")
    if not options.folders:
        texts, golds = [form[0] for form in FORMS], [form[1] for form in FORMS]
        columns = [math_accuracy(texts, answer=golds), math_accuracy(texts, answer=golds, lenient=True)]
        columns += [[score(text, gold) for text, gold in zip(texts, golds, strict=True)] for score in scorers.values()]
        print("| completion | right | ours | lenient | " + " | ".join(scorers) + " | why |")
        print("|" + "---|" * (len(columns) + 3))
        for (text, gold, why), *scores in zip(FORMS, *columns, strict=True):
            shown = text.replace("\n", " ⏎ ")
            print(f"| `{shown}` | `{gold}` | " + " | ".join(f"{score:.0f}" for score in scores) + f" | {why} |")
    for folder in options.folders:
        samples = samples_of(folder)
        ours = [score for _, _, score in samples]
        print(f"{folder}: {len(samples)} samples, pass@1 {sum(ours) / len(ours):.4f}")
        for name, score in scorers.items():
            theirs = [score(text, gold) for text, gold, _ in samples]
            different = [i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b]
            print(f"  {name}: {sum(theirs) / len(theirs):.4f}, {len(different)} samples differ")
            for i in different[:3]:
                print(
                    f"    ours {ours[i]:.0f}, theirs {theirs[i]:.0f}, right {samples[i][1]!r}: {samples[i][0][-80:]!r}"
                )
    return 0


if __name__ == "__main__":
    sys.exit(main())
