# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Refuse keys, tokens and passwords in the settings, which are pickled into every checkpoint."""

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from omniopd_trl.errors import ConfigError
from omniopd_trl.teachers.remote.failures import redact

# Matched against names in lower case with underscores. A prefix is allowed, except for `token`: `pad_token` is no
# secret.
_SECRET_NAME = re.compile(
    r"(.*_)?(api_?key|access_key|secret_key|private_key|password|passwd|secret|authorization|credentials"
    r"|(hf|hub|auth|access|api|bearer)_token)|token"
)

# Names in the query of a URL, where shorter ones are usual.
_SECRET_IN_QUERY = re.compile(r"(.*_)?(key|sig|signature|auth|code)")

# Keys by their form: the prefix of a service, and a part with letters and digits. Words after a prefix are no key.
_KEY = re.compile(
    r"(?<![A-Za-z0-9])(sk-|gsk_|hf_|xai-|nvapi-|pplx-|csk-|r8_|gh[pousr]_|github_pat_|tgp_|AIza|AKIA|ASIA|ya29\.|eyJ)"
    r"[\w.-]*?(?=[A-Za-z]*\d)(?=\d*[A-Za-z])[A-Za-z0-9]{10,}"
)
# Shorter values of environment variables may be words.
_SHORTEST_KEY = 12

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
        ConfigError: for a URL with a user name, a password or a key in it, for a string under a key such as `token`,
            for a string that looks like a key or holds the key of an environment variable, and for an extra field or
            header of a request that looks like a key.
    """
    keys = [
        (variable, value)
        for variable, value in os.environ.items()
        if is_secret_name(variable) and len(value) >= _SHORTEST_KEY
    ]
    for name, value in settings.items():
        for path, key, text in _texts(name, value):
            if _has_user(text):
                problem = f"`{path}` is a URL with a user name or a password in it"
                advice = "Leave out the part before the @"
                if name == "teacher_base_url":
                    advice += f", and set a key in the environment variable {_VARIABLES[name]}"
            elif part := _secret_in_query(text):
                problem = f"`{path}` is a URL with a key in its query ({part}=...)"
                advice = "Leave it out"
                if name in _VARIABLES:
                    advice += f", and set the environment variable {_VARIABLES[name]} instead"
            elif (path != name and text and _is_secret(name, key, text)) or _KEY.search(text):
                problem = f"`{path}` looks like a secret"
                advice = f"Leave it out, and set the environment variable {_VARIABLES.get(name, 'HF_TOKEN')} instead"
            elif found := next((variable for variable, value in keys if value in text), None):
                problem = f"`{path}` holds the key of the environment variable {found}"
                advice = "Leave it out"
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


def _is_secret(option: str, key: str, text: str) -> bool:
    """Whether an entry of a dictionary is a secret, by its key or its value."""
    return is_secret_name(key) or (
        option in _SENT and (_SECRET_HEADER.fullmatch(key) is not None or redact(text) != text)
    )


def _secret_in_query(text: str) -> str | None:
    """The name of a parameter in the query of a URL that holds a secret; `None` for none."""
    if "://" not in text or "?" not in text:
        return None
    for name, value in parse_qsl(text.partition("?")[2].partition("#")[0]):
        plain = re.sub(r"\W", "_", name).lower()
        if value and (is_secret_name(name) or _SECRET_IN_QUERY.fullmatch(plain)):
            return name
    return None


def _has_user(text: str) -> bool:
    if "://" not in text or "@" not in text or re.search(r"\s", text):
        return False
    if re.search(r"://[^/@:]+:(?!\d+[/?#])[^@]*@", text):  # a password may hold a / that should be escaped
        return True
    try:
        return "@" in urlsplit(text).netloc
    except ValueError:  # not a valid URL: the code that uses it reports that
        return False
