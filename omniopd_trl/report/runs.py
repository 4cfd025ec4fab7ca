# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""What a run left in its folder: settings, logged metrics, and audits."""

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from omniopd_trl.errors import DataError
from omniopd_trl.journal.browse import AuditedTrajectory, AuditPlace, list_audits, read_logs, read_settings
from omniopd_trl.journal.reader import spent


class Run:
    """A run's folder, also while the run writes to it.

    Args:
        folder: the `output_dir` of the run.

    Raises:
        DataError: when it holds no audits.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if not any((self.folder / "_audits").glob("rank-*.sqlite")):
            raise DataError(
                f"{self.folder} holds no audits: there is no `_audits` folder with a journal in it. Give the "
                "`output_dir` of a run with `save_audits: true`, the default."
            )
        self.name = self.folder.resolve().name

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The settings that the run's last process recorded, by name."""
        return read_settings(self.folder)

    @cached_property
    def logs(self) -> list[dict[str, Any]]:
        """The logged metrics, in order; those of the newest checkpoint when the journal has none."""
        logs = read_logs(self.folder)
        if logs:
            return logs
        states = [*self.folder.glob("checkpoint-*/trainer_state.json"), *self.folder.glob("trainer_state.json")]
        newest = max(states, key=lambda path: path.stat().st_mtime, default=None)
        return [] if newest is None else json.loads(newest.read_text("utf-8")).get("log_history", [])

    def series(self, metric: str) -> list[tuple[float, float]]:
        """Steps and values of a metric. The last value of a step counts."""
        values = {
            entry["step"]: entry[metric]
            for entry in self.logs
            if "step" in entry and isinstance(entry.get(metric), int | float)
        }
        return sorted(values.items())

    @cached_property
    def places(self) -> list[AuditPlace]:
        """The audited trajectories by step, process and index."""
        return list_audits(self.folder)

    def pieces(self, trajectory: AuditedTrajectory) -> list[str]:
        """The text of each token of a completion; empty when the run has saved no tokenizer yet.

        A token that is a part of a character has no text, and the token that completes the character has all of it.
        """
        if self._tokenizer is None:
            return []
        stream = DecodeStream(skip_special_tokens=True)
        return [stream.step(self._tokenizer, token) or "" for token in trajectory.completion_ids]

    def text(self, token_ids: Sequence[int], keep_special_tokens: bool = False) -> str | None:
        """The text of tokens of the student; `None` when the run has saved no tokenizer yet."""
        if self._tokenizer is None:
            return None
        return self._tokenizer.decode(list(token_ids), skip_special_tokens=not keep_special_tokens)

    @cached_property
    def _tokenizer(self) -> Tokenizer | None:
        folders = [self.folder / "_audits", self.folder, *sorted(self.folder.glob("checkpoint-*"))]
        path = next((path for folder in folders if (path := folder / "tokenizer.json").exists()), None)
        return None if path is None else Tokenizer.from_file(str(path))

    def summary(self) -> dict[str, str]:
        """The results of the run: names and values for people."""
        usage, usd = spent(self.folder)
        rows = {}
        scores = self.series("eval_pass@1")
        if scores:
            rows["pass@1"] = " → ".join(f"{score:.3f} (step {step:g})" for step, score in (scores[0], scores[-1]))
        rows["audited trajectories"] = f"{len(self.places):,}"
        rows["teacher tokens"] = f"{usage.prompt_tokens:,} read, {usage.completion_tokens:,} written"
        if usd:
            rows["cost"] = f"{usd:,.4f} dollars"
        return rows


def text_of_prompt(prompt: Any) -> str:
    """A prompt as text: the messages of a conversation, each with its role."""
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(f"{message.get('role')}: {message.get('content')}" for message in prompt)
