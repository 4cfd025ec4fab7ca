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
"""A run that asks a service, for a test to kill.

python tests/run_until_killed.py FOLDER MODEL URL [SETTINGS]

SETTINGS is JSON, and wins over what stands here.
"""

import json
import sys
from pathlib import Path

from trainer_utils import make_trainer, questions

SETTINGS = {
    "teacher": "openai:gpt-6-luna",
    "teacher_input_price": 1.0,
    "teacher_output_price": 1.0,
    "teacher_max_concurrency": 4,
}


def main(folder, model, url, overrides="{}"):
    settings = {**SETTINGS, "teacher_base_url": url, "dataset": questions(16), **json.loads(overrides)}
    make_trainer(Path(folder), Path(model), **settings).train()


if __name__ == "__main__":
    main(*sys.argv[1:])
