# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: E402 (the device that makes FSDP2 shard on a CPU comes before anything that makes a state)
"""Run the training command under one back end, with a teacher that fails on the second process.

    python fail_under.py BACK_END RECIPE FOLDER KIND

KIND is the failure: `final`, an error of the teacher within a step; `unexpected`, a bug in the teacher's code;
`probe`, the first question; `evaluation`, the evaluation of the teacher after training; or `nothing`. Each process
writes the exit code of the command to `FOLDER/KIND-RANK`. The process whose rank is in the environment variable `SLOW`
finishes its part of a checkpoint late.
"""

import asyncio
import os
import sys
import time
from pathlib import Path
from typing import Any

BACK_END, RECIPE, FOLDER, KIND = sys.argv[1:]
if BACK_END == "fsdp2":
    import tests.support.fsdp2_on_cpu  # noqa: F401

from omniopd_trl.cli.train import run
from omniopd_trl.errors import TeacherError
from omniopd_trl.teachers import ScriptedTeacher

# Four of each step: this is the third step's last.
FAILS_AT = 12
RANK = int(os.environ["RANK"])


class Failing(ScriptedTeacher):
    """Answers the last of its requests late: the other micro-batch of the step is trained before."""

    calls = 0

    async def sample(self, prefixes: Any, request: Any) -> Any:
        Failing.calls += 1
        # Training asks for two samples, an evaluation of the teacher for one.
        if RANK == 1 and KIND == "evaluation" and request.num_samples == 1:
            raise TeacherError("The account is empty. Top it up.")
        if RANK == 1 and Failing.calls == FAILS_AT:
            await asyncio.sleep(2)
            if KIND == "final":
                raise TeacherError("The key was refused. Set a valid one.")
            if KIND == "unexpected":
                raise RuntimeError("a mistake in the teacher")
        return await super().sample(prefixes, request)

    def probe(self, prompt: Any) -> None:
        if RANK == 1 and KIND == "probe":
            raise TeacherError("There is no key on this machine. Export one.")


def save_slowly() -> None:
    """Give the other process the time to end, and the launcher the time to end this one for it."""
    from transformers import Trainer

    save = Trainer._save_rng_state

    def late(self: Trainer, output_dir: str) -> None:
        time.sleep(5)
        save(self, output_dir)

    Trainer._save_rng_state = late


def main() -> None:
    import omniopd_trl.trainer.preparation

    if os.environ.get("SLOW") == str(RANK):
        save_slowly()
    Failing.is_remote = True
    omniopd_trl.trainer.preparation.load_teacher = lambda *args, **kwargs: Failing()
    code = run(["--config", RECIPE])
    Path(FOLDER, f"{KIND}-{RANK}").write_text(str(code))
    sys.exit(code)


if __name__ == "__main__":
    main()
