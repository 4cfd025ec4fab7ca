# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Records as bytes, and back. Without torch: a command that only reads a journal starts in a moment."""

import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from omniopd_trl.journal.file import checksum_of, damage_error
from omniopd_trl.journal.schema import JournalError

# Entropies are recorded as multiples of this, in nats.
ENTROPY_UNIT = 0.02


def encode(value: Any) -> bytes:
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError) as error:
        raise JournalError(f"A record is invalid: {error}. It may hold text and finite numbers only.") from error
    # A teacher may be cut off in the middle of a surrogate pair. Plain UTF-8 cannot encode the half.
    return zlib.compress(text.encode("utf-8", "surrogatepass"), 1)


def decode(path: Path, row: tuple[Any, ...] | None) -> Any:
    return json.loads(zlib.decompress(_payload(path, row)).decode("utf-8", "surrogatepass"))


def decode_first(path: Path, row: tuple[Any, ...] | None) -> Any:
    """The first value of a recorded list, without decompressing all of the rest."""
    payload = _payload(path, row)
    unpacker = zlib.decompressobj()
    text = b""
    while True:
        more = unpacker.decompress(payload, 4096)
        text, payload = text + more, unpacker.unconsumed_tail
        try:
            return json.JSONDecoder().raw_decode(text.decode("utf-8", "surrogatepass"), 1)[0]
        except (json.JSONDecodeError, UnicodeDecodeError):  # the value continues
            if not more:
                raise


def _payload(path: Path, row: tuple[Any, ...] | None) -> bytes:
    """The payload of a row, which is its last value but for the checksum."""
    if row is None:
        raise damage_error(path, "a record is missing")
    *values, checksum = row
    if checksum != checksum_of(values):
        raise damage_error(path, "the checksum of a record does not match")
    payload: bytes = values[-1]
    return payload


def restore_chunks(stored: Iterable[list[Any]]) -> Iterator[tuple[Any, ...]]:
    """The chunks of a stored audit, with their prefixes.

    Yields:
        The span `(start, end, anchor)`, the prefix, the text, the rollouts, their similarities, prior and posterior,
        and the branches, each as a list of the fields of `Branch`.
    """
    before = ""
    for start, end, anchor, shared, added, text, rollouts, similarities, prior, posterior, *branches in stored:
        prefix = before[:shared] + added
        before = prefix + text
        yield (start, end, anchor), prefix, text, tuple(rollouts), tuple(similarities), prior, posterior, branches
