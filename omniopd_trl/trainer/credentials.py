# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Keys, tokens and passwords have no place in the settings, which are pickled into every checkpoint."""

import re
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

from omniopd_trl.errors import ConfigError

# In lower case and with underscores. The end of a name decides, but for tokens: `pad_token` is no secret.
_SECRET_NAME = re.compile(
    r"(.*_)?(api_?key|access_key|secret_key|private_key|password|passwd|secret|authorization|credentials"
    r"|(hf|hub|auth|access|api|bearer)_token)|token"
)

_VARIABLES = {
    "teacher_base_url": "VLLM_API_KEY or OPENAI_API_KEY",
    "teacher_chat_template_kwargs": "VLLM_API_KEY, OPENAI_API_KEY, ANTHROPIC_API_KEY or GOOGLE_API_KEY",
}


def is_secret_name(name: str) -> bool:
    """Whether a value of this name lets somebody in: `token`, `HF_TOKEN`, `x-api-key`, `client_secret`."""
    return _SECRET_NAME.fullmatch(re.sub(r"\W", "_", name).lower()) is not None


def check_credentials(settings: Mapping[str, Any]) -> None:
    """Refuse settings that hold a secret. No message shows one.

    Args:
        settings: names and values; dictionaries and lists are looked through.

    Raises:
        ConfigError: for an address with a user or a password in it, and for a text under a key such as `token`.
    """
    for name, value in settings.items():
        for path, key, text in _texts(name, value):
            if _has_user(text):
                problem = f"`{path}` is an address with a user name or a password in it"
                advice = "Leave out what stands before the @"
                if name == "teacher_base_url":
                    advice += f", and set a key in the environment variable {_VARIABLES[name]}"
            elif path != name and is_secret_name(key) and text:
                problem = f"`{path}` looks like a secret"
                advice = f"Leave it out, and set the environment variable {_VARIABLES.get(name, 'HF_TOKEN')} instead"
            else:
                continue
            raise ConfigError(
                f"{problem}, and settings are written in clear into every checkpoint (training_args.bin), which may "
                f"be pushed. {advice}."
            )


def _texts(name: str, value: Any) -> Iterator[tuple[str, str, str]]:
    """Every text in a setting: where it stands, under which key, and itself."""
    pending = [(name, name, value)]
    while pending:
        path, key, item = pending.pop()
        if isinstance(item, str):
            yield path, key, item
        elif isinstance(item, Mapping):
            pending += [(f"{path}[{inner!r}]", str(inner), part) for inner, part in item.items()]
        elif isinstance(item, list | tuple):
            pending += [(path, key, part) for part in item]


def _has_user(text: str) -> bool:
    if "://" not in text or "@" not in text or re.search(r"\s", text):
        return False
    try:
        return "@" in urlsplit(text).netloc
    except ValueError:  # no address, and its reader says so
        return False
