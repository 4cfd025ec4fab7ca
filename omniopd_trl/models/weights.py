# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Identify a model by its weights."""

import hashlib
import json
from pathlib import Path

import torch

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")
# Other files of a checkpoint with the same suffixes. A copy without them is the same student.
_NO_WEIGHTS = ("training_args", "optimizer", "scheduler", "rng_state", "scaler", "reference.")


def hash_of_folder(source: str) -> str | None:
    """A hash of the weight files of a folder; `None` when there are none.

    It covers the name and size of each file and samples of its content, which is fast and sufficient, since training
    changes most of the weights. Dates do not count, since copying a folder changes them.
    """
    folder = Path(source)
    if not source or not folder.is_dir():
        return None
    files = [f for f in sorted(folder.iterdir()) if f.suffix in _WEIGHTS and not f.name.startswith(_NO_WEIGHTS)]
    return _hash([[f.name, f.stat().st_size, _sampled(f)] for f in files]) if files else None


def hash_of_model(model: torch.nn.Module) -> str:
    """A hash of the parameters of a model in memory: the name and shape of each, and 64 evenly spaced values of it."""
    parts = []
    for name, weight in model.state_dict().items():
        flat = weight.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // 64)]
        # Weights that are offloaded to the disk count by their shapes.
        values = [] if sample.is_meta else sample.to("cpu", torch.float64).tolist()
        parts.append([name, list(weight.shape), values])
    return _hash(parts)


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _sampled(path: Path) -> str:
    """A hash of the last MiB of a file, and of 256 evenly spaced blocks of 4 KiB before it."""
    size, end, block = path.stat().st_size, 2**20, 2**12
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for place in range(0, max(size - end, 0), max((size - end) // 256, block)):
            file.seek(place)
            digest.update(file.read(block))
        file.seek(max(size - end, 0))
        digest.update(file.read(end))
    return digest.hexdigest()
