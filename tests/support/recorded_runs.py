# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""The folder of a run with made-up audits."""

import shutil
from pathlib import Path

from transformers import AutoTokenizer

from omniopd_trl.audits.types import Audit, Branch, ChunkAudit, Trajectory
from omniopd_trl.demo import asset_path
from omniopd_trl.journal.schema import Shown
from omniopd_trl.method.chunks import Chunk
from omniopd_trl.teachers import Usage
from tests.support.journals import journal

# The second one is hostile: markup, half of a surrogate pair, a line separator, a reversal of the order, and NUL.
PROMPTS = (
    "Leo has 42 stickers and wins 9. How many?",
    "<!-- <script> --></script><script>document.title='hacked'</script> \ud83d \u2028 \u202egnorw\u202c \0",
)
STUDENT = "Leo wins 9: 42 + 9 = "
WRONG, RIGHT = "61, so Leo has 61 stickers", "51, so Leo has 51 stickers"
# Markup of HTML and of rich, commands of terminals, and a word that is wider than any screen.
HOSTILE = (
    "<img src=x onerror=\"document.title='hacked'\">\x1b[2J\x9b2J[blink]b[/blink] [link=http://evil.example]l[/] "
    + 400 * "w"
)
MODEL = "gpt-<b>5</b>-\x1b[31m"


def record_run(
    folder: Path,
    steps: int = 3,
    per_step: int = 4,
    student: str = STUDENT,
    different_prompts: int = 0,
    imitated: list[list[str | None]] | None = None,
    branches: tuple[Branch, ...] = (),
    **overrides,
) -> Path:
    """Record audits of `steps` steps, `per_step` trajectories each. Every second one is right.

    The prompts are `PROMPTS`, or this many others.

    The first chunk of each trajectory is a part of the equation, with its fork after two tokens. The second one is the
    result, which has the `branches`. `imitated` holds what is imitated of each of their rollouts.
    """
    tokenizer = AutoTokenizer.from_pretrained(asset_path("student"))
    with journal(folder, num_processes=1, settings={"num_chunks": 2, "num_rollouts": 4, "seed": 0}, **overrides) as j:
        for step in range(steps):
            texts = [student + (RIGHT if index % 2 else WRONG) for index in range(per_step)]
            ids = [tokenizer(text)["input_ids"] for text in texts]
            prompts = [PROMPTS[index // 2 % 2] for index in range(per_step)]
            if different_prompts:
                numbers = range(step * per_step, (step + 1) * per_step)
                prompts = [f"Problem {number % different_prompts}" for number in numbers]
            j.record_trajectories(
                step, [Trajectory([{"role": "user", "content": p}], [1], i) for p, i in zip(prompts, ids, strict=True)]
            )
            for index, tokens in enumerate(ids):
                start = len(tokenizer(student)["input_ids"])
                text = texts[index][len(student) :]
                similar = 1.0 if text == RIGHT else 0.25
                before, after = tokenizer.decode(tokens[:3]), tokenizer.decode(tokens[3:8])
                equation = ChunkAudit(Chunk(3, 8, 5), before, after, (HOSTILE,) * 4, (0.0,) * 4, 0.9, 0.18)
                result = ChunkAudit(
                    Chunk(start, len(tokens), start),
                    student,
                    text,
                    (RIGHT,) * 3 + (WRONG,),
                    (similar,) * 3 + (1.25 - similar,),
                    0.8,
                    0.2 + similar / 2,
                    branches,
                )
                j.record_usage(step, index, Usage(100, 10, 30, 0), 0.001)
                whole = Audit(
                    (equation, result),
                    num_dropped=int(index == 0),
                    num_rollouts=8,
                    num_set_aside=2 * int(index == 1),
                    failures=(f"one was refused: {HOSTILE}",),
                    outcomes={"requests": 2, "request_milliseconds": 2500, "refused": int(index == 2)},
                    models=(MODEL,),
                )
                j.record(step, index, whole)
                if imitated is not None:
                    j.record_shown(step, [Shown(index, 0.18, 0.7, [], [0.1, 0.2], imitated=imitated)])
    shutil.copy(Path(asset_path("student")) / "tokenizer.json", folder / "tokenizer.json")
    return folder
