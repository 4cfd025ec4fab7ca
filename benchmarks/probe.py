# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""The verdict of a probe beside what training does, for seven teachers of the demo's student.

    python -m benchmarks.probe [--teachers NAME ...] [--steps 20] [--prompts 16] [-o FILE]

Each teacher is probed with 32 prompts, and then trains the student for 20 steps of 16 prompts with branches. pass@1 is
measured on the 512 test problems before and after, one sample each (binomial error 0.02). A verdict agrees if the gain
is above 0.1 for "will teach", and at most 0.1 for "will not"; "uncertain" claims nothing. The row of each teacher is
written to the file as soon as it is measured, and a teacher with a row is skipped.
"""

import argparse
import hashlib
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from omniopd_trl import OmniOPDConfig, OmniOPDTrainer
from omniopd_trl.data import prepare_prompts
from omniopd_trl.data.datasets import get_split, load_dataset_or_files
from omniopd_trl.demo import asset_path
from omniopd_trl.errors import OmniOPDError
from omniopd_trl.evals.probe import Form, judge, measure
from omniopd_trl.teachers import Prefix, Rollout, SamplingRequest, ScriptedTeacher, Teacher, TeacherReply
from omniopd_trl.trainer.probing import ProbingTrainer

# The recipe of the demo with branches (docs/branches.md).
SETTINGS: dict[str, Any] = {
    "num_chunks": 4,
    "chunk_length": 10,
    "min_chunk_length": 4,
    "num_branches": 7,
    "min_anchor_entropy": 0.1,
    "num_rollouts": 1,
    "teacher_temperature": 0.0,
    "similarity": "exact",
    "learning_rate": 4e-4,
    "lr_scheduler_type": "constant",
    "max_completion_length": 160,
    "temperature": 1.0,
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}
_GEOGRAPHY = (
    "The river rises in the mountains and flows north",
    "Its capital lies on the coast, near the border",
    "Rain falls in winter, and the summers are dry",
    "Most people live in the valleys of the south",
    "The highest peak is a volcano that sleeps",
)


class Echo(Teacher):
    """A teacher that repeats the student's own text, wherever it has been sent it as part of a later prefix."""

    name = "echo"

    async def sample(self, prefixes: Sequence[Prefix], request: SamplingRequest) -> list[TeacherReply]:
        longest = max((prefix.completion for prefix in prefixes), key=len)
        texts = [longest.removeprefix(prefix.completion) or " The end" for prefix in prefixes]
        return [TeacherReply(tuple(Rollout(text) for _ in range(request.num_samples))) for text in texts]


def _geography(prefix: Prefix, index: int) -> str:
    digest = hashlib.sha256(json.dumps([prefix.prompt, prefix.completion, index]).encode()).digest()
    return f" {_GEOGRAPHY[digest[0] % len(_GEOGRAPHY)]}. {_GEOGRAPHY[digest[1] % len(_GEOGRAPHY)]}."


# What makes each teacher, and what it should be judged.
TEACHERS: dict[str, tuple[Callable[[], str | Teacher], str]] = {
    "the demo's": (lambda: str(asset_path("teacher")), "will teach"),
    "the demo's with the student's tokenizer": (lambda: str(asset_path("teacher_shared")), "will teach"),
    "another subject": (lambda: ScriptedTeacher(_geography), "will not"),
    "random words of the prompt": (ScriptedTeacher, "will not"),
    "always refusing": (lambda: ScriptedTeacher(lambda prefix, index: None), "will not"),
    "echo": (Echo, "will not"),
    "the student itself": (lambda: str(asset_path("student")), "uncertain"),
}


def problems(split: str) -> Any:
    """The problems of the demo, as prompts."""
    return prepare_prompts(get_split(load_dataset_or_files(str(asset_path("problems"))), split, "split"))


def probing_trainer(teacher: str | Teacher, folder: str | Path) -> ProbingTrainer:
    """A trainer that probes a teacher of the demo's student with branches."""
    changes = {"num_rollouts": 2, "teacher_temperature": 1.0, "beta": 0.0, "max_failed_chunks": 1.0, "max_steps": 1}
    args = OmniOPDConfig(str(folder), per_device_train_batch_size=8, **{**SETTINGS, **changes})
    return ProbingTrainer(
        forks_per_trajectory=args.num_chunks,
        model=str(asset_path("student")),
        teacher_model=teacher,
        args=args,
        train_dataset=problems("train"),
    )


def verdict_on(teacher: str | Teacher, folder: Path) -> Any:
    """The verdict of a probe with 32 prompts."""
    trainer = probing_trainer(teacher, folder)
    found, _ = trainer.probe(4)
    numbers = measure(
        [row[:3] for row in found], trainer.processing_class, trainer.auditor.settings, SETTINGS["similarity"]
    )
    form = {name: getattr(OmniOPDConfig(str(folder), **SETTINGS), name) for name in (f.name for f in fields(Form))}
    return judge(numbers, Form(**form), next((text for row in found for text in row.audit.failures), None))


def train(teacher: str | Teacher, folder: Path, steps: int, prompts: int, seed: int) -> tuple[float | None, str]:
    """pass@1 after training, and why it stopped, if it did."""
    args = OmniOPDConfig(
        str(folder),
        **SETTINGS,
        per_device_train_batch_size=prompts,
        per_device_eval_batch_size=128,
        num_eval_generations=1,
        max_steps=steps,
        seed=seed,
    )
    trainer = OmniOPDTrainer(
        model=str(asset_path("student")),
        teacher_model=teacher,
        args=args,
        train_dataset=problems("train"),
        eval_dataset=problems("test"),
    )
    stopped = ""
    if steps:
        try:
            trainer.train()
        except OmniOPDError as error:
            stopped = str(error)
    return trainer.evaluate()["eval_pass@1"], stopped


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--teachers", nargs="+", choices=TEACHERS, default=list(TEACHERS), metavar="NAME")
    parser.add_argument("--steps", type=int, default=20, help="steps of each training (default: 20)")
    parser.add_argument("--prompts", type=int, default=16, help="prompts of a step (default: 16)")
    parser.add_argument("--seed", type=int, default=0, help="seed of each training (default: 0)")
    parser.add_argument("-o", "--output", type=Path, default=Path("probe_verdicts.json"), metavar="FILE")
    options = parser.parse_args()
    rows = json.loads(options.output.read_text("utf-8")) if options.output.exists() else {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if "before" not in rows:
            before, _ = train(ScriptedTeacher(), folder / "before", 0, options.prompts, options.seed)
            rows["before"] = {"pass@1": before}
        for index, teacher in enumerate(options.teachers):
            if teacher not in rows:
                make, _ = TEACHERS[teacher]
                verdict = verdict_on(make(), folder / f"probe-{index}")
                after, stopped = train(make(), folder / f"run-{index}", options.steps, options.prompts, options.seed)
                gain = after - rows["before"]["pass@1"] if after is not None else None
                claim = {"will teach": gain is not None and gain > 0.1, "will not": gain is not None and gain <= 0.1}
                rows[teacher] = {
                    "verdict": verdict.kind,
                    "reason": verdict.reason,
                    "pass@1": after,
                    "gain": gain,
                    "agrees": claim.get(verdict.kind),
                    "stopped": stopped,
                }
                options.output.write_text(json.dumps(rows, indent=1) + "\n", "utf-8")
            row = rows[teacher]
            print(f"{teacher:40}  {row['verdict']:10}  {row['gain']:+.3f}  {row['agrees']}", flush=True)


if __name__ == "__main__":
    main()
