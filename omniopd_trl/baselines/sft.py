# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""SFT on complete solutions of the teacher."""

from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from omniopd_trl.accounting.usage import Usage
from omniopd_trl.baselines.base import Baseline
from omniopd_trl.data.datasets import column_names, get_split, load_dataset_or_files
from omniopd_trl.errors import DataError
from omniopd_trl.journal.reader import spent

# The file that `omniopd solutions` writes into its folder.
SOLUTIONS_FILE = "solutions.jsonl"


class Solutions(NamedTuple):
    """Solutions to train on, and what they have cost.

    Attributes:
        dataset: columns `prompt` and `completion`.
        usage: tokens of all requests, for solutions that were not kept too; zero when it is not recorded.
        usd: their cost in US dollars; 0 without a price.
    """

    dataset: Dataset
    usage: Usage
    usd: float


def load_solutions(name: str | Path, chat_template_kwargs: dict[str, Any] | None = None) -> Solutions:
    """Load the solutions of a teacher.

    Args:
        name: folder that `omniopd solutions` has written, or any dataset with the columns `prompt` and `completion`. A
            `Path` is never looked up on the Hub.
        chat_template_kwargs: arguments of the student's chat template, as for its own prompts.

    Raises:
        DataError: when there are no solutions.
    """
    folder = Path(name).expanduser()
    is_ours = (folder / SOLUTIONS_FILE).is_file()
    if isinstance(name, Path) and not is_ours:
        raise DataError(
            f"There are no solutions in {str(name)!r}. Collect them from the teacher with `omniopd solutions` and the "
            "same options, or set `solutions` to their folder or to a dataset with the columns `prompt` and "
            "`completion`."
        )
    dataset = get_split(load_dataset_or_files(str(folder / SOLUTIONS_FILE if is_ours else name)), "train", "solutions")
    missing = {"prompt", "completion"} - set(column_names(dataset))
    if missing:
        raise DataError(
            f"The solutions {str(name)!r} have no column {' and '.join(sorted(missing))} (they have: "
            f"{', '.join(column_names(dataset))}). `omniopd solutions` writes both."
        )
    dataset = dataset.select_columns(["prompt", "completion"])
    if chat_template_kwargs:
        dataset = dataset.add_column("chat_template_kwargs", [chat_template_kwargs] * len(dataset))
    usage, usd = spent(folder) if is_ours else (Usage(), 0.0)
    return Solutions(dataset, usage, usd)


class SFT(Baseline, SFTTrainer):
    """TRL's [`~trl.SFTTrainer`], evaluated as [`OmniOPDTrainer`]. `teacher_usage` is that of all solutions.

    The log spreads the tokens of the solutions evenly over the steps.
    """

    method = "sft"
    config = SFTConfig
    # TRL's `shuffle_dataset` shuffles once, besides the sampler; unused columns are those beside the tokens.
    unlike = ("shuffle_dataset", "remove_unused_columns")

    def cost_until(self: Any, step: int) -> tuple[Usage, float]:
        share = min(1.0, step / max(1, self.state.max_steps))
        used, (_, usd) = self.teacher_usage, self.teacher_dollars or (0.0, 0.0)
        spread = Usage(
            prompt_tokens=round(used.prompt_tokens * share), completion_tokens=round(used.completion_tokens * share)
        )
        return spread, usd * share
