# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""A run that asks a service and is killed by a test.

python tests/support/run_until_killed.py FOLDER MODEL URL [SETTINGS]

SETTINGS is JSON and overrides the settings below.
"""

import json
import sys
from pathlib import Path

from omniopd_trl.journal.file import journals_of
from tests.support.training import make_trainer, questions

SETTINGS = {
    "teacher": "openai:gpt-6-luna",
    "teacher_input_price": 1.0,
    "teacher_output_price": 1.0,
    "teacher_max_concurrency": 4,
}


def main(folder, model, url, overrides="{}"):
    settings = {**SETTINGS, "teacher_base_url": url, "dataset": questions(16), **json.loads(overrides)}
    trainer = make_trainer(Path(folder), Path(model), **settings)
    trainer.train(resume_from_checkpoint=bool(journals_of(folder)))


if __name__ == "__main__":
    main(*sys.argv[1:])
