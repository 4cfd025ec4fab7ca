# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Refuse keys, tokens and passwords in the settings, which are pickled into every checkpoint."""

import re
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

from omniopd_trl.errors import ConfigError
from omniopd_trl.teachers.remote.failures import redact

# Matched against names in lower case with underscores. A prefix is allowed, except for `token`: `pad_token` is no
# secret.
_SECRET_NAME = re.compile(
    r"(.*_)?(api_?key|access_key|secret_key|private_key|password|passwd|secret|authorization|credentials"
    r"|(hf|hub|auth|access|api|bearer)_token)|token"
)

_KEYS = "VLLM_API_KEY, OPENAI_API_KEY, ANTHROPIC_API_KEY or GOOGLE_API_KEY"
_VARIABLES = {
    "teacher_base_url": "VLLM_API_KEY or OPENAI_API_KEY",
    "teacher_chat_template_kwargs": _KEYS,
    "teacher_extra_body": _KEYS,
    "teacher_extra_headers": _KEYS,
}

# Services take keys under more names in a request than loaders do in their options.
_SENT = ("teacher_extra_body", "teacher_extra_headers")
_SECRET_HEADER = re.compile(r"(.*[-_])?(key|token|cookie|secret)|.*auth.*", re.IGNORECASE)


def is_secret_name(name: str) -> bool:
    """Whether a setting of this name holds a secret: `token`, `HF_TOKEN`, `x-api-key`, `client_secret`."""
    return _SECRET_NAME.fullmatch(re.sub(r"\W", "_", name).lower()) is not None


def check_credentials(settings: Mapping[str, Any]) -> None:
    """Refuse settings that hold a secret. The messages do not show it.

    Args:
        settings: values by name; nested dictionaries and lists are checked as well.

    Raises:
        ConfigError: for a URL with a user name or a password in it, for a string under a key such as `token`, and for
            an extra field or header of a request that looks like a key.
    """
    for name, value in settings.items():
        for path, key, text in _texts(name, value):
            if _has_user(text):
                problem = f"`{path}` is a URL with a user name or a password in it"
                advice = "Leave out the part before the @"
                if name == "teacher_base_url":
                    advice += f", and set a key in the environment variable {_VARIABLES[name]}"
            elif path != name and text and (is_secret_name(key) or (name in _SENT and _is_sent_secret(key, text))):
                problem = f"`{path}` looks like a secret"
                advice = f"Leave it out, and set the environment variable {_VARIABLES.get(name, 'HF_TOKEN')} instead"
            else:
                continue
            raise ConfigError(
                f"{problem}, and settings are written in plain text into every checkpoint (training_args.bin), which "
                f"may be pushed. {advice}."
            )


def _texts(name: str, value: Any) -> Iterator[tuple[str, str, str]]:
    """Every string in a setting, as `(path, key, string)`."""
    pending = [(name, name, value)]
    while pending:
        path, key, item = pending.pop()
        if isinstance(item, str):
            yield path, key, item
        elif isinstance(item, Mapping):
            pending += [(f"{path}[{inner!r}]", str(inner), part) for inner, part in item.items()]
        elif isinstance(item, list | tuple):
            pending += [(path, key, part) for part in item]


def _is_sent_secret(key: str, text: str) -> bool:
    return _SECRET_HEADER.fullmatch(key) is not None or redact(text) != text


def _has_user(text: str) -> bool:
    if "://" not in text or "@" not in text or re.search(r"\s", text):
        return False
    try:
        return "@" in urlsplit(text).netloc
    except ValueError:  # not a valid URL: the code that uses it reports that
        return False
