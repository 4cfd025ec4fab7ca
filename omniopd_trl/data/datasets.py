# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Loading of datasets, their splits and columns."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import datasets
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict

from omniopd_trl.errors import DataError, first_line
from omniopd_trl.models.loading import what_is_beside

AnyDataset = TypeVar("AnyDataset", Dataset, DatasetDict, IterableDataset, IterableDatasetDict)

_BUILDERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}


def local_builder(name: str) -> tuple[str, str] | None:
    """The builder of `datasets.load_dataset` that reads the local file `name`, or what `Dataset.save_to_disk` wrote.

    Args:
        name: a path or the id of a dataset.

    Returns:
        `"json"`, `"parquet"` or `"arrow"`, with the path or pattern of the files; `None` if it is neither.

    Raises:
        DataError: when `name` has a file ending and no such file exists, or is a file of another type.
    """
    path = Path(name).expanduser()
    if (path / datasets.config.DATASET_STATE_JSON_FILENAME).is_file():
        return "arrow", str(path / "*.arrow")
    builder = _BUILDERS.get(path.suffix.lower())
    if path.is_file() and builder is None:
        raise DataError(
            f"The dataset file {name!r} ends in {path.suffix or 'nothing'!r}; only {', '.join(_BUILDERS)} files are "
            "read. Convert it, for example with `datasets.Dataset.to_parquet`."
        )
    if builder is not None and not path.is_file():
        raise DataError(
            f"There is no dataset file {name!r} (looked in {Path.cwd()}). Check the path; a dataset of the Hub is "
            "named without a file ending."
        )
    return None if builder is None else (builder, str(path))


def load_dataset_or_files(
    name: str, config: str | None = None, streaming: bool = False, **options: Any
) -> DatasetDict | IterableDatasetDict:
    """Load a dataset of the Hub, a local file, or a local folder of files.

    Args:
        name: id of a dataset on the Hub; or a `.json`, `.jsonl` or `.parquet` file, which becomes the split
            `"train"`; or a folder of such files, whose names tell their splits (`train.jsonl`, `test.jsonl`,
            `train-00000-of-00002.parquet`, ...), as in a dataset repository on the Hub; or a folder that
            `save_to_disk` has written, of a single `Dataset` as the split `"train"`.
        config: name of the dataset's configuration.
        streaming: whether to read rows on demand instead of preparing all of them first.
        **options: for a dataset of the Hub, other arguments of `datasets.load_dataset`, such as `revision`.

    Returns:
        The splits by name.

    Raises:
        DataError: when there is no such dataset, or it cannot be read.
    """
    path = Path(name).expanduser()
    if not path.exists() and name.startswith(("/", "./", "../", "~")):
        raise DataError(f"There is no dataset file or folder {name!r} (looked in {Path.cwd()}). Check the path.")
    local = local_builder(name)
    if local is not None and config is not None:
        raise DataError(
            f"The configuration {config!r} of the dataset is set, and the local dataset {name!r} has none. Leave it "
            "out."
        )
    try:
        if local is not None:
            loaded = datasets.load_dataset(local[0], data_files={"train": local[1]}, streaming=streaming)
        else:
            source = str(path) if path.is_dir() else name
            loaded = datasets.load_dataset(source, name=config, streaming=streaming, **options)
        if not streaming and path.exists():
            for split in loaded.values():
                split.data.validate(full=True)  # text that is not UTF-8 would be found when its row is read
        return loaded
    except (datasets.exceptions.DatasetsError, OSError, ValueError, StopIteration) as error:
        # `datasets` wraps the actual error in a generic one ("An error occurred while generating the dataset").
        cause = error.__cause__ or error
        reason = first_line(cause)
        if isinstance(error, StopIteration) or "corresponds to no data" in reason:
            reason = "it has no rows"
        elif "Config name is missing" in reason:
            reason = " ".join(str(cause).splitlines()[:2])  # the second line lists them
        elif "column names don't match" in str(cause):
            reason = "its files have different columns"
        if local is not None:
            advice = "Check that every line is one JSON object in UTF-8, and that all have the same fields."
            if local[0] != "json":
                advice = "Check that the file is complete."
        elif path.is_dir():
            advice = "The folder must hold .json, .jsonl or .parquet files such as train.jsonl and test.jsonl."
        else:
            advice = (
                "It is neither a local file nor a local folder, so it was looked up on the Hub: check the name, the "
                "configuration and, without a network, whether it is in the cache."
            )
            nearby = what_is_beside(str(path)).strip()
            advice += f" {nearby[:1].upper()}{nearby[1:]}" if nearby else ""
        raise DataError(f"The dataset {name!r} could not be loaded ({reason}). {advice}") from error


def get_split(splits: Mapping[str, Any], split: str, option: str) -> Any:
    """One split of a dataset.

    Args:
        splits: the splits by name.
        split: name of the split.
        option: the option that sets the split, for the message.

    Raises:
        DataError: when there is no such split. The message lists the splits of the dataset.
    """
    if split not in splits:
        raise DataError(
            f"The dataset has no split {split!r} (it has: {', '.join(map(repr, splits))}). Set `{option}` to one of "
            "these."
        )
    return splits[split]


def only_split(splits: Mapping[str, Any], otherwise: str) -> str:
    """The name of the only split, or `otherwise` if there are several. A single file is `train`, whatever it holds."""
    return next(iter(splits)) if len(splits) == 1 else otherwise


def column_names(dataset: Dataset | IterableDataset) -> list[str]:
    """The column names. A stream without declared columns is read up to its first row; an empty one gives `[]`.

    Raises:
        DataError: when the first row of a stream cannot be read.
    """
    if dataset.column_names is not None:
        return list(dataset.column_names)
    try:
        return list(next(iter(dataset), {}))
    except DataError:  # such as a row without a question
        raise
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        raise DataError(
            f"The first row of the stream cannot be read ({first_line(error.__cause__ or error)}). Check that every "
            "line of the file is one JSON object."
        ) from error


def named_datasets(train_dataset: Any, eval_dataset: Any) -> Iterator[tuple[str, Any]]:
    """The datasets of a trainer, each with its name in messages."""
    if train_dataset is not None:
        yield "train_dataset", train_dataset
    if isinstance(eval_dataset, dict):
        for name, dataset in eval_dataset.items():
            yield f"eval_dataset[{name!r}]", dataset
    elif eval_dataset is not None:
        yield "eval_dataset", eval_dataset
