# Copyright 2026 The omniopd_trl Authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""What the demo needs, shipped with the package: a student, two teachers, and two sets of word problems.

`python -m omniopd_trl.demo.build` makes all of it again.
"""

from pathlib import Path

ASSETS = ("student", "teacher", "teacher_shared", "problems")


def asset_path(name: str) -> Path:
    """The folder of one of the demo's assets.

    Args:
        name: `"student"` (the weak student), `"teacher"` (writes in a style and with a tokenizer of its own),
            `"teacher_shared"` (the same, but with the student's tokenizer), or `"problems"` (`train.jsonl` and
            `test.jsonl`, with the columns `question` and `answer`).

    Returns:
        An absolute path, which exists in every installation of the package.

    Raises:
        ValueError: when there is no such asset.
    """
    if name not in ASSETS:
        raise ValueError(f"name={name!r} is not an asset of the demo; choose one of {', '.join(ASSETS)}.")
    return Path(__file__).resolve().parent / "assets" / name
