# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Assets of the demo, shipped with the package: a student, three teachers, and two sets of word problems.

`python -m omniopd_trl.demo.build` rebuilds all of them.
"""

from pathlib import Path

# The name of a teacher that marks the student's text by the rules of the world (`judge.py`), and continues it with the
# model `teacher`. It is no asset.
JUDGE = "demo:judge"

ASSETS = ("student", "teacher", "teacher_shared", "teacher_varied", "problems")


def asset_path(name: str) -> Path:
    """The folder of one of the demo's assets.

    Args:
        name: `"student"` (the weak student), `"teacher"` (with another style and another tokenizer),
            `"teacher_shared"` (the same with the student's tokenizer), `"teacher_varied"` (with random words that are
            never the student's), or `"problems"` (`train.jsonl` and `test.jsonl`, with the columns `question` and
            `answer`).

    Returns:
        An absolute path. It exists in every installation of the package.

    Raises:
        ValueError: when there is no such asset.
    """
    if name not in ASSETS:
        raise ValueError(f"name={name!r} is not an asset of the demo; choose one of {', '.join(ASSETS)}.")
    return Path(__file__).resolve().parent / "assets" / name
