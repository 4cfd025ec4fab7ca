# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Exceptions of the package. All derive from `OmniOPDError` and from a built-in exception type.

Every message names the value that was received, the rule that it breaks, and the next step. `WarnOnce` logs problems
that do not end a run, and `did_you_mean` is the next step after a mistyped name.
"""

import difflib
import logging
from collections.abc import Callable, Iterable
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

# The next step after an error that ends a command whose teacher is paid. True with and without a checkpoint.
RESUME = (
    "start the command again, training with resume_from_checkpoint=True (also without a checkpoint): recorded answers "
    "are not paid again"
)


class OmniOPDError(Exception):
    """Root of every error that this package raises on purpose.

    Attributes:
        on_every_process: whether all processes of the run raise it together. One process may then report it for all.
    """

    on_every_process = False


class ConfigError(OmniOPDError, ValueError):
    """A setting is out of range or contradicts another one."""


class DataError(OmniOPDError, ValueError):
    """The dataset, a model path or a tokenizer cannot be used as given."""


class TeacherError(OmniOPDError, RuntimeError):
    """The teacher cannot answer, and asking again will not help."""


class NoRolloutError(TeacherError):
    """The teacher was reached, and returned no rollout for one prompt. It may for another."""


class BudgetError(TeacherError):
    """The next request might exceed the budget and is not sent."""


class NonFiniteError(OmniOPDError, ArithmeticError):
    """The student produced NaN or infinite numbers. Further updates would destroy it."""


class HubError(OmniOPDError, RuntimeError):
    """The Hub refuses a push, or cannot be reached. What was to be pushed is on disk."""


class MissingExtraError(OmniOPDError, ImportError):
    """An optional dependency is not installed; the message holds the pip command."""


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, or its type if it has none. Others' messages may have many lines."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def did_you_mean(
    name: str, known: Iterable[str], otherwise: str | None = None, written: Callable[[str], str] = str
) -> str:
    """Advice on a name that does not exist, for the end of a message.

    Args:
        name: the name that was given.
        known: the names that exist.
        otherwise: the advice if none of them is similar. Defaults to all of them.
        written: function of the most similar name that returns what to write in its place.
    """
    known = list(known)
    for similar in difflib.get_close_matches(name, known, n=1):
        return f"Did you mean `{written(similar)}`?"
    return f"There are {', '.join(known)}." if otherwise is None else otherwise


class WarnOnce:
    """Logs each warning once.

    Args:
        logger: the name of the logger.
    """

    def __init__(self, logger: str):
        self._logger = logging.getLogger(logger)
        self._given: set[str] = set()

    def __call__(self, message: str, kind: str | None = None) -> None:
        """Log a warning, unless one of the same kind was logged before.

        Args:
            message: the warning.
            kind: warnings of one kind count as the same. Defaults to the message.
        """
        if (kind or message) not in self._given:
            self._given.add(kind or message)
            self._logger.warning(message)


def import_extra(module: str, extra: str) -> ModuleType:
    """Import an optional dependency.

    Args:
        module: dotted name of the module, for example `"math_verify"`.
        extra: the extra of this package that installs it, for example `"eval"`.

    Returns:
        The imported module.

    Raises:
        MissingExtraError: when the module is not installed; the message holds the pip command.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise MissingExtraError(
            f"`{module}` is needed here and could not be imported ({error}). "
            f"Install it, in the clone of this package, with: pip install -e '.[{extra}]'"
        ) from error


def find_extra(module: str, extra: str) -> None:
    """Check that an optional dependency is installed, without the time that its import takes.

    Args:
        module: name of the top-level module.
        extra: as in [`import_extra`].

    Raises:
        MissingExtraError: as [`import_extra`].
    """
    if find_spec(module) is None:
        import_extra(module, extra)
