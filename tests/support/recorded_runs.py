# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""The folder of a run with made-up audits."""

import shutil
from pathlib import Path

from transformers import AutoTokenizer

from omniopd_trl.audits.types import Audit, ChunkAudit, Trajectory
from omniopd_trl.demo import asset_path
from omniopd_trl.method.chunks import Chunk
from omniopd_trl.teachers import Usage
from tests.support.journals import journal

# The second one is hostile, and holds half of a surrogate pair.
PROMPTS = ("Leo has 42 stickers and wins 9. How many?", "</script><script>document.title='hacked'</script> \ud83d")
STUDENT = "Leo wins 9: 42 + 9 = "
WRONG, RIGHT = "61, so Leo has 61 stickers", "51, so Leo has 51 stickers"
HOSTILE = "<img src=x onerror=\"document.title='hacked'\">\x1b[2J"


def record_run(folder: Path, steps: int = 3, per_step: int = 4, **overrides) -> Path:
    """Record audits of `steps` steps, `per_step` trajectories each. Every second one is right.

    The first chunk of each trajectory is a part of the equation, with its fork after two tokens. The second one is the
    result.
    """
    tokenizer = AutoTokenizer.from_pretrained(asset_path("student"))
    with journal(folder, num_processes=1, settings={"num_chunks": 2, "seed": 0}, **overrides) as j:
        for step in range(steps):
            texts = [STUDENT + (RIGHT if index % 2 else WRONG) for index in range(per_step)]
            ids = [tokenizer(text)["input_ids"] for text in texts]
            prompts = [PROMPTS[index // 2 % 2] for index in range(per_step)]
            j.record_trajectories(
                step, [Trajectory([{"role": "user", "content": p}], [1], i) for p, i in zip(prompts, ids, strict=True)]
            )
            for index, tokens in enumerate(ids):
                start = len(tokenizer(STUDENT)["input_ids"])
                text = texts[index][len(STUDENT) :]
                similar = 1.0 if text == RIGHT else 0.25
                before, after = tokenizer.decode(tokens[:3]), tokenizer.decode(tokens[3:8])
                equation = ChunkAudit(Chunk(3, 8, 5), before, after, (HOSTILE,) * 4, (0.0,) * 4, 0.9, 0.18)
                result = ChunkAudit(
                    Chunk(start, len(tokens), start),
                    STUDENT,
                    text,
                    (RIGHT,) * 3 + (WRONG,),
                    (similar,) * 3 + (1.25 - similar,),
                    0.8,
                    0.2 + similar / 2,
                )
                j.record_usage(step, index, Usage(100, 10, 30, 0), 0.001)
                j.record(step, index, Audit((equation, result), num_rollouts=8, failures=("one was refused",)))
    shutil.copy(Path(asset_path("student")) / "tokenizer.json", folder / "tokenizer.json")
    return folder
