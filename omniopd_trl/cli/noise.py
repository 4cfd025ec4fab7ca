# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Messages of other packages that say nothing to the user of the command, and that the command leaves out.

Each filter names one message. The environment variable `OMNIOPD_VERBOSE=1` and `--log_level debug` show them all.
"""

import logging
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from omniopd_trl.cli.options import settings_of

# transformers calls its own option by a new name, TRL by the old one. A recipe can change neither call.
_WARNING = r"`(is_)?gradient_checkpointing(_\w+)?` is deprecated and will be removed in v6"

# Logger, and how the message starts.
_MESSAGES = {
    # Only quantized students are slower without it.
    "bitsandbytes.backends.cpu.ops": r"Failed to load CPU gemm_4bit_forward",
    # The trainer takes the tokenizer's, as it should.
    "transformers.trainer_utils": r"The tokenizer has new PAD/BOS/EOS tokens",
    # On import, where there is no GPU, whether or not DeepSpeed is used.
    "DeepSpeed": r"Setting accelerator to CPU\.",
}


def filter_noise(arguments: Sequence[str], recipe: Mapping[str, Any]) -> None:
    """Leave these messages out of this process, before the packages that write them are imported.

    Args:
        arguments: the command line.
        recipe: as YAML reads it.
    """
    settings = settings_of(arguments, recipe, ("log_level", "load_in_4bit"))
    if os.environ.get("OMNIOPD_VERBOSE", "0") not in ("", "0") or settings["log_level"] == "debug":
        return
    # A progress bar shows after a second. Those of small files would flash: "Writing model shards", "Loading weights".
    os.environ.setdefault("TQDM_DELAY", "1")
    warnings.filterwarnings("ignore", message=_WARNING, category=FutureWarning)
    for name, start in _MESSAGES.items():
        if name.startswith("bitsandbytes") and settings["load_in_4bit"]:
            continue
        logging.getLogger(name).addFilter(_StartsWith(start))


class _StartsWith(logging.Filter):
    """Drops the records whose message starts as given."""

    def __init__(self, start: str):
        super().__init__()
        self.start = re.compile(start)

    def __eq__(self, other: object) -> bool:  # a filter that is added twice is one
        return isinstance(other, _StartsWith) and self.start == other.start

    __hash__ = None  # type: ignore[assignment]

    def filter(self, record: logging.LogRecord) -> bool:
        return not self.start.match(record.getMessage())
