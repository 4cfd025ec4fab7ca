# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""OmniOPD: on-policy distillation from teachers that return only text, as a trainer in TRL's style.

    from omniopd_trl import OmniOPDConfig, OmniOPDTrainer

The names below are imported on first use: `import omniopd_trl` loads neither torch nor TRL.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from omniopd_trl.trainer.omniopd_config import OmniOPDConfig
    from omniopd_trl.trainer.omniopd_trainer import OmniOPDTrainer

__version__ = "0.1.0.dev0"

__all__ = ["OmniOPDConfig", "OmniOPDTrainer", "__version__"]

_LAZY = {
    "OmniOPDConfig": "omniopd_trl.trainer.omniopd_config",
    "OmniOPDTrainer": "omniopd_trl.trainer.omniopd_trainer",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_LAZY[name]), name)
    globals()[name] = value  # later accesses bypass `__getattr__`
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
