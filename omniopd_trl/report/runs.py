# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""What a run left in its folder: settings, logged metrics, and audits."""

import fnmatch
import json
import math
import os
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from omniopd_trl.errors import DataError
from omniopd_trl.journal.browse import (
    AuditedTrajectory,
    AuditPlace,
    list_audits,
    read_logs,
    read_settings,
    read_spent,
)
from omniopd_trl.journal.reader import spent
from omniopd_trl.teachers.base import OUTCOMES, REQUEST_MILLISECONDS, text_of_content

# The result of `omniopd probe`, in its folder.
PROBE = "probe.json"


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
        self._known: dict[int, str] = {}  # texts of tokens

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The settings that the run's last process recorded, by name."""
        return read_settings(self.folder)

    @property
    def control(self) -> str | None:
        """What a control did to the numbers of its audits; `None` for another run."""
        return control_of(self.settings.get("posterior_baseline"), bool(self.settings.get("num_branches")))

    @cached_property
    def logs(self) -> list[dict[str, Any]]:
        """The logged metrics, in order; those of the newest checkpoint when the journal has none."""
        logs = read_logs(self.folder)
        if logs:
            return logs
        states = [*self.folder.glob("checkpoint-*/trainer_state.json"), *self.folder.glob("trainer_state.json")]
        try:
            newest = max(states, key=lambda path: path.stat().st_mtime, default=None)
            return [] if newest is None else json.loads(newest.read_text("utf-8")).get("log_history", [])
        except (OSError, ValueError) as error:
            raise DataError(
                f"The logged metrics of {self.folder} cannot be read from trainer_state.json: {error}. If the run is "
                "saving a checkpoint, try again; otherwise remove the damaged file."
            ) from error

    @cached_property
    def probe(self) -> dict[str, Any] | None:
        """The result of `omniopd probe`; `None` in the folder of a run."""
        try:
            result: dict[str, Any] = json.loads((self.folder / PROBE).read_text("utf-8"))
            return result
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise DataError(
                f"{self.folder / PROBE} cannot be read ({error}). Repeat `omniopd probe`, which asks and pays for "
                "nothing twice."
            ) from error

    def series(self, metric: str) -> list[tuple[float, float]]:
        """Steps and values of a metric. The last value of a step counts.

        Besides the logged metrics there are `total/prompt_tokens`, `total/completion_tokens` and `total/usd`: what the
        teacher has been paid up to a step, as the journal counts it; and `share/NAME` for each outcome of a teacher:
        its share of the samples that were asked for.
        """
        kind, _, name = metric.partition("/")
        if kind == "total":
            amounts = [usd if name == "usd" else getattr(usage, name) for _, usage, usd in self._spent]
            totals = accumulate(amount or 0 for amount in amounts)
            known = any(amount is not None for amount in amounts)
            return [(step, total) for (step, *_), total in zip(self._spent, totals, strict=True)] if known else []
        if kind == "share":
            asked = dict(self._samples())
            counts = self.series(f"teacher/{name}")
            return [(step, count / asked[step]) for step, count in counts if asked.get(step)]
        return series(self.logs, metric)

    def names(self, pattern: str) -> list[str]:
        """The logged metrics whose names match a pattern of `fnmatch`, such as `eval_*pass@1*`."""
        return fnmatch.filter(sorted({name for entry in self.logs for name in entry}), pattern)

    def _samples(self) -> Iterator[tuple[float, float]]:
        """How many samples an optimizer step asks the teacher for, by logged step. Not known with a judge."""
        rollouts = None if "signal" in self.settings else self.settings.get("num_rollouts")
        steps = len({place.step for place in self.places})
        if not rollouts or not steps:
            return
        trajectories = len(self.places) / steps
        dropped, obtained = (dict(self.series(f"audit/{name}")) for name in ("dropped_chunks", "num_rollouts"))
        for step, kept in self.series("audit/num_chunks"):
            share = 1 - dropped.get(step, 0.0)
            if share > 0:
                yield step, kept / share * trajectories * obtained.get(step, rollouts)

    @cached_property
    def _spent(self) -> list[tuple[int, Any, float | None]]:
        return read_spent(self.folder)

    @cached_property
    def places(self) -> list[AuditPlace]:
        """The audited trajectories by step, process and index."""
        return list_audits(self.folder)

    def pieces(self, trajectory: AuditedTrajectory) -> list[str]:
        """The text of each token of a completion; empty when the run has saved no tokenizer yet.

        A token that is a part of a character has no text, and the token that completes the character has all of it.
        """
        return [] if self._tokenizer is None else token_texts(self._tokenizer, trajectory.completion_ids, self._known)

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
        for name in self.names("eval_*pass@1*"):
            if not (scores := self.series(name)):
                continue
            (first, before), (last, after) = scores[0], scores[-1]
            ends = f"{before:.3f}" if first == last else f"{before:.3f} → {after:.3f}"
            rows[name.removeprefix("eval_").replace("_", " ")] = ends
        if self.logs:
            total = self.settings.get("max_steps") or 0
            step = max(entry.get("step", 0) for entry in self.logs)
            rows["step"] = f"{step:,} of {total:,}" if total > 0 else f"{step:,}"
        rows["trajectories"] = f"{len(self.places):,}"
        rows["teacher tokens read"] = f"{usage.prompt_tokens:,}"
        rows["teacher tokens written"] = f"{usage.completion_tokens:,}"
        if usd:
            rows["US dollars"] = f"{usd:,.2f}" if usd >= 1 else f"{usd:.4f}"
        return rows


def control_of(baseline: str | None, has_branches: bool) -> str | None:
    """What a control did to the numbers of its audits before it trained; `None` for another baseline."""
    changes = {"shuffled": "shuffled", "constant": "replaced by their mean"}
    if baseline not in changes:
        return None
    shown = "advantages of a fork" if has_branches else "posteriors of a step"
    return f"This run is a control: it trained with the {shown} {changes[baseline]}, and not as they are shown here."


def series(logs: Iterable[Mapping[str, Any]], metric: str) -> list[tuple[float, float]]:
    """Steps and finite values of a metric. The last value of a step counts."""
    values = {
        entry["step"]: entry[metric]
        for entry in logs
        if "step" in entry and isinstance(entry.get(metric), int | float) and math.isfinite(entry[metric])
    }
    return sorted(values.items())


def token_texts(tokenizer: Tokenizer, token_ids: Sequence[int], known: dict[int, str] | None = None) -> list[str]:
    """The text of each token. One decoding for each different token, since a stream is slow.

    A token that is a part of a character has no text, and the token that completes the character has all of it.

    Args:
        tokenizer: the tokenizer.
        token_ids: the tokens.
        known: texts of tokens, to which new ones are added.
    """
    known = {} if known is None else known
    letter = tokenizer.encode("a", add_special_tokens=False).ids

    def added(ids: list[int]) -> str:
        """What tokens add to a text that ends with a letter."""
        return str(tokenizer.decode([*letter, *ids])).removeprefix(tokenizer.decode(letter))

    ids = list(token_ids)
    for token in {token for token in ids if token not in known}:
        known[token] = added([token])
    pieces = [known[token] for token in ids]
    if ids:
        pieces[0] = tokenizer.decode(ids[:1])  # some tokenizers drop the space before a first word
    first = None  # of consecutive tokens that are parts of characters
    for at, piece in enumerate([*pieces, ""]):
        if "\ufffd" in piece:
            first = at if first is None else first
        elif first is not None:
            pieces[first:at] = [*[""] * (at - first - 1), added(ids[first:at])]
            first = None
    if "".join(pieces) != tokenizer.decode(ids):  # the texts of these tokens depend on their neighbors
        stream = DecodeStream(skip_special_tokens=True)
        pieces = [stream.step(tokenizer, token) or "" for token in ids]
    return pieces


def open_runs(folders: Sequence[str | Path]) -> list[Run]:
    """The runs in these folders, with distinct names.

    Raises:
        DataError: as `Run`.
    """
    runs = [Run(folder) for folder in folders]
    for run, name in zip(runs, distinct_names(folders), strict=True):
        run.name = name
    return runs


def distinct_names(folders: Sequence[str | Path]) -> list[str]:
    """The ends of paths, with as many folders as tell them apart."""
    paths = [Path(folder).resolve() for folder in folders]
    depth = 1
    while len({path.parts[-depth:] for path in paths}) < len({*paths}):
        depth += 1
    return ["/".join(path.parts[-depth:]) for path in paths]


def text_of_prompt(prompt: Any) -> str:
    """A prompt as text: the messages of a conversation, each with its role."""
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(f"{message.get('role')}: {text_of_content(message.get('content')) or ''}" for message in prompt)


def short_name(name: str) -> str:
    """The name of a model, or the end of its path."""
    path = Path(name)
    return "/".join(("…", *path.parts[-2:])) if path.is_absolute() else name


def without_folders(name: str) -> str:
    """A path says something about a machine, so only its end is published."""
    is_path = name.startswith((".", "~")) or os.path.exists(name) or os.path.isabs(name)
    return os.path.basename(os.path.normpath(name)) if is_path else name


def visible(text: str) -> str:
    """A text with escapes for characters that are not printable, other than line breaks and tabs.

    A terminal obeys some of them, and others change the order in which a line is read.
    """
    return "".join(c if _is_visible(c) else c.encode("unicode_escape").decode() for c in text)


def _is_visible(c: str) -> bool:
    # Wide and narrow spaces; and the two that join letters of Persian and Hindi, or emojis.
    return c.isprintable() or c in "\n\t\u200c\u200d" or unicodedata.category(c) == "Zs"


def facts_of(trajectory: AuditedTrajectory) -> list[str]:
    """What an audit cost, and what happened to its samples, for people."""
    usage = trajectory.usage
    read = f"{usage.prompt_tokens:,} tokens read"
    if usage.cached_tokens:
        read += f" ({usage.cached_tokens:,} from a cache)"
    written = f"{usage.completion_tokens:,} written"
    if usage.reasoning_tokens:
        written += f" ({usage.reasoning_tokens:,} of reasoning)"
    facts = [f"teacher {short_name(trajectory.teacher)}"]
    if trajectory.models:
        facts.append(f"answered by {', '.join(trajectory.models)}")
    facts += [read, written]
    if milliseconds := trajectory.outcomes.get(REQUEST_MILLISECONDS):
        facts.append(f"{milliseconds / 1000 / trajectory.outcomes.get('requests', 1):.1f} s per request")
    if trajectory.usd is not None:
        facts.append(f"{trajectory.usd:.5f} dollars")
    counts: Iterable[tuple[str, int]] = (
        ("chunks dropped", trajectory.num_dropped),
        ("rollouts set aside", trajectory.num_set_aside),
        ("rollouts cut short", trajectory.num_short),
        ("answers of the judge without marks", trajectory.outcomes.get("malformed", 0)),
        *((name.replace("_", " "), count) for name, count in trajectory.outcomes.items() if name in OUTCOMES),
    )
    facts += [f"{name}: {count:,}" for name, count in counts if count]
    if trajectory.verified is not None:
        facts += _facts_of_verifier(**trajectory.verified)
    return facts


def _facts_of_verifier(
    rewards: Mapping[str, float | None], reward: float | None, advantage: float, is_chosen: bool
) -> Iterator[str]:
    scores = [f"{name} {'none' if score is None else f'{score:g}'}" for name, score in rewards.items()]
    yield f"reward {'none' if reward is None else f'{reward:g}'} ({', '.join(scores)})"
    yield f"advantage {advantage:+.3g}"
    if not is_chosen:
        yield "left out by audit_trajectories"
