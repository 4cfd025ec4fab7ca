# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Hide messages of other packages that are irrelevant for the user of the command.

Each filter hides one message. The environment variable `OMNIOPD_VERBOSE=1` and `--log_level debug` show them all.
"""

import logging
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from omniopd_trl.cli.options import settings_of

# TRL passes an option that transformers has renamed. A recipe cannot change that.
_WARNING = r"`(is_)?gradient_checkpointing(_\w+)?` is deprecated and will be removed in v6"

# The logger, and the start of its message.
_MESSAGES = {
    # Only matters for quantized students, which are slower without it.
    "bitsandbytes.backends.cpu.ops": r"Failed to load CPU gemm_4bit_forward",
    # The trainer uses the tokenizer's tokens, as intended.
    "transformers.trainer_utils": r"The tokenizer has new PAD/BOS/EOS tokens",
    # Logged on import without a GPU, even if DeepSpeed is not used.
    "DeepSpeed": r"Setting accelerator to CPU\.",
}


def is_verbose() -> bool:
    """Whether everything is shown, also tracebacks of other packages' errors."""
    return os.environ.get("OMNIOPD_VERBOSE", "0") not in ("", "0")


def filter_noise(arguments: Sequence[str], recipe: Mapping[str, Any]) -> None:
    """Hide these messages in this process. Call it before the packages that log them are imported.

    Args:
        arguments: the command line.
        recipe: the recipe as loaded from YAML.
    """
    settings = settings_of(arguments, recipe, ("log_level", "load_in_4bit"))
    if is_verbose() or settings["log_level"] == "debug":
        return
    # Show progress bars after a second only. Those of small files would flash by.
    os.environ.setdefault("TQDM_DELAY", "1")
    warnings.filterwarnings("ignore", message=_WARNING, category=FutureWarning)
    for name, start in _MESSAGES.items():
        if name.startswith("bitsandbytes") and settings["load_in_4bit"]:
            continue
        logging.getLogger(name).addFilter(_StartsWith(start))


class _StartsWith(logging.Filter):
    """Drop records whose message matches a pattern at its start."""

    def __init__(self, start: str):
        super().__init__()
        self.start = re.compile(start)

    def __eq__(self, other: object) -> bool:  # adding an equal filter twice has no effect
        return isinstance(other, _StartsWith) and self.start == other.start

    __hash__ = None  # type: ignore[assignment]

    def filter(self, record: logging.LogRecord) -> bool:
        return not self.start.match(record.getMessage())
