# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""The options of a recipe and of the command line, and the checks that need neither torch nor TRL."""

import argparse
import json
import math
import os
import re
import shlex
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from omniopd_trl.cli.hints import SECTIONS, describe_type, option_hints, section_hints
from omniopd_trl.cli.recipes import recipe_files
from omniopd_trl.demo import ASSETS, JUDGE, asset_path
from omniopd_trl.errors import ConfigError, DataError, did_you_mean

METHODS = ("omniopd", *SECTIONS)
# What a section may not set, since it holds for the whole run: the folder, the evaluation, the student and its engine.
_OF_THE_RUN = re.compile(
    r"output_dir|run_name|resume_from_checkpoint|hub_.*|(do_|per_device_|bf16_full_|fp16_full_|batch_)?eval.*|"
    r"load_best_model_at_end|metric_for_best_model|greater_is_better|use_vllm|vllm_(?!importance).*|"
    r"(teacher_)?model_.*|use_cpu|deepspeed|fsdp.*|max_completion_length|num_generations_eval"
)

# Options that hold a mapping, and no path of a file with one.
_MAPPING = re.compile(r"_(kwargs|body|headers)$")
# Options that name a model or a dataset.
LOADED = ("model_name_or_path", "teacher_model_name_or_path", "teacher_tokenizer_name_or_path", "dataset_name")
_DATA_FILES = (".json", ".jsonl", ".parquet")
_DEMO = "demo:"

# YAML nodes of a recipe, each alias counted with what it stands for. The recipes that ship have fewer than a hundred.
_MAX_NODES = 10_000

# Option names that a key would have, and the environment variable that holds it.
_KEYS = {
    "ANTHROPIC_API_KEY": ("anthropic", "claude"),
    "OPENAI_API_KEY": ("openai",),
    "GEMINI_API_KEY": ("gemini", "google"),
    "HF_TOKEN": ("hf", "hub", "huggingface"),
}

_BOOLEANS = {"yes", "true", "t", "y", "1", "no", "false", "f", "n", "0"}  # as TRL's parser reads them


def split_config(args: Iterable[str]) -> list[str]:
    """The command line with `--config=x.yaml` split into two words, since TRL only reads `--config x.yaml`."""
    return [part for arg in args for part in (arg.split("=", 1) if arg.startswith("--config=") else [arg])]


def positive_int(text: str) -> int:
    """The `type` of an option whose value is a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of at least 1")
    return int(text)


def number(rule: str, fits: Callable[[float], bool]) -> Callable[[str], float]:
    """The `type` of an option whose value is a number.

    Args:
        rule: what the value must be, for the message, such as `"a number above 0"`.
        fits: whether a number is that. It is false for NaN, which stands for a text that is no number.
    """

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not fits(value):
            raise argparse.ArgumentTypeError(f"{text!r} must be {rule}")
        return value

    return parse


def option_names() -> list[str]:
    """All option names that the command line accepts after `--`."""
    hints = option_hints()
    return [*hints, *(f"no_{name}" for name in hints), "config", "help"]


def option_name(argument: str) -> str:
    """The name in `--name`, `--name=value` or `--na-me`, as Python spells it."""
    return argument.partition("=")[0].removeprefix("--").replace("-", "_")


def check_arguments(arguments: Sequence[str]) -> dict[str, Any]:
    """Refuse unknown options on the command line and in its recipe.

    Args:
        arguments: the command line, from [`split_config`].

    Returns:
        The recipe; empty without `--config`.

    Raises:
        ConfigError: for an unknown option, or a recipe that cannot be used.
    """
    if arguments and not arguments[0].startswith("-"):
        raise stray_word(arguments[0])
    options = [argument for argument in arguments if argument.startswith("--")]
    check_names(map(option_name, options), option_names(), "the command line")
    recipe = {}
    if arguments.count("--config") > 1:
        raise ConfigError(
            "`--config` is given twice, and a run has one recipe. Leave out one of them; `omniopd demo` has its own, "
            "and `omniopd train` takes any."
        )
    if "--config" in arguments:
        position = arguments.index("--config") + 1
        if position == len(arguments):
            raise ConfigError("`--config` needs the path of a recipe, such as recipes/demo.yaml.")
        recipe = check_recipe(arguments[position])
    check_method_name(settings_of(arguments, recipe, ["method"])["method"] or "omniopd")
    for name, section in settings_of(arguments, recipe, SECTIONS).items():
        parse_section(name, section)
    for name, value in settings_of(arguments, recipe, filter(_MAPPING.search, option_hints())).items():
        if isinstance(value, str):
            _parse_mapping(name, value)
    return recipe


def check_method_name(method: str) -> None:
    """Refuse a method that does not exist.

    Raises:
        ConfigError: for an unknown method.
    """
    if method not in METHODS:
        raise ConfigError(f"method={method!r} is unknown; choose one of {', '.join(METHODS)}.")


def parse_section(name: str, section: Any) -> dict[str, Any]:
    """The options in the section of a baseline, with numbers in place of texts such as `1e-6`.

    Args:
        name: name of the section, one of `SECTIONS`.
        section: mapping of options to values, the same as JSON, or `None`.

    Raises:
        ConfigError: for anything else, an unknown option, a value of the wrong type, or an option that holds for the
            whole run.
    """
    if section is None:
        return {}
    section = _parse_mapping(name, section, f"options of {SECTIONS[name]}")
    hints, where = section_hints(name), f"the section `{name}`"
    check_names(map(str, section), [*hints], where)
    for key, value in section.items():
        if _OF_THE_RUN.fullmatch(key):
            raise ConfigError(
                f"`{key}` is {value!r:.200} in {where}, but it holds for every method. Set it beside `method`."
            )
    _check_types(section, hints, where)
    return {key: _number(value, hints[key]) for key, value in section.items()}


def _parse_mapping(name: str, value: Any, keys: str = "keys") -> dict[str, Any]:
    """The mapping that an option holds, also as JSON."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise ConfigError(
                f"`{name}` is {value!r:.200}, which is not valid JSON ({error}). Write it as "
                f"--{name} '{{\"KEY\": VALUE}}', with {keys} in double quotes."
            ) from error
    if not isinstance(value, dict):
        raise ConfigError(f"`{name}` is {value!r:.200}; it must be a mapping of {keys} to values.")
    return value


def _number(value: Any, hint: Any) -> Any:
    """A number that YAML reads as a text, as the parser of the command line reads it."""
    kinds = {hint, *typing.get_args(hint)}
    if not isinstance(value, str) or str in kinds:
        return value
    return next((kind(value) for kind in (int, float) if kind in kinds and _converts(value, kind)), value)


def stray_word(word: str) -> ConfigError:
    """The error about a word of the command line that belongs to no option."""
    is_recipe = word.lower().endswith((".yaml", ".yml"))
    advice = f"Name the recipe with `--config {shlex.quote(word)}`." if is_recipe else "`--help` lists the options."
    return ConfigError(f"`{word}` belongs to no option (in the command line). {advice}")


def check_names(names: Iterable[str], known: Sequence[str], where: str) -> None:
    """Refuse unknown options.

    Args:
        names: option names to check.
        known: all option names.
        where: the source of the names, for the message.

    Raises:
        ConfigError: for an unknown option; the message names the most similar option.
    """
    for name in names:
        if name not in known:
            advice = did_you_mean(name, known, otherwise="`--help` lists the options.")
            if re.search(r"(api_?|secret_?|access_?|teacher_)key$|(?<!max)_token$|secret$", name.lower()):
                named = [key for key, words in _KEYS.items() if set(words) & set(name.lower().split("_"))]
                advice = (
                    f"Keys are read from the environment, never from an option: set {', '.join(named or _KEYS)} "
                    "(docs/teachers.md)."
                )
            raise ConfigError(f"There is no option `{name}` (in {where}). {advice}")


def check_recipe(path: str) -> dict[str, Any]:
    """Refuse a recipe with unknown keys or with values of the wrong type, which the parser would not check.

    A string counts as what the parser converts it to, as on the command line: `1e-6` is a string in YAML 1.1.

    Args:
        path: path of the YAML file.

    Returns:
        The recipe as loaded from YAML.

    Raises:
        ConfigError: for a file that cannot be read, an unknown key or a value of the wrong type.
    """
    name = Path(path).stem
    shipped = f"`omniopd recipes {name}` copies the recipe of this name here." if name in recipe_files() else ""
    recipe = load_yaml(
        path, "recipe", shipped or "Check the path; `omniopd recipes` lists those that ship with the package."
    )
    if not isinstance(recipe, dict):
        raise ConfigError(f"The recipe {path!r} must be a YAML mapping of options to values, such as `beta: 0.1`.")
    check_options(recipe, path)
    return recipe


def load_yaml(path: str, kind: str, advice: str) -> Any:
    """The content of a YAML file.

    Args:
        path: path of the file.
        kind: what the file is, for messages: `"recipe"` or `"plan"`.
        advice: the next step when there is no such file.

    Raises:
        ConfigError: for a file that cannot be read, is not valid YAML, or is larger than it looks.
    """
    import yaml

    try:
        text = Path(path).read_text(encoding="utf-8")
        _check_nodes(yaml.compose(text, Loader=yaml.SafeLoader), f"The {kind} {path!r}")
        return yaml.safe_load(text)
    except ConfigError:
        raise
    except RecursionError as error:
        raise ConfigError(f"The {kind} {path!r} is nested too deeply. A recipe maps options to values.") from error
    except OSError as error:
        raise ConfigError(f"The {kind} {path!r} cannot be read ({error.strerror}). {advice}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"The {kind} {path!r} is not UTF-8 text ({error}). Save it as UTF-8.") from error
    except (yaml.YAMLError, ValueError) as error:  # the latter of a date such as 2026-13-01
        raise ConfigError(f"The {kind} {path!r} is not valid YAML: {error}") from error


def check_options(options: Mapping[str, Any], where: str) -> None:
    """Refuse unknown options, and values of the wrong type.

    Args:
        options: options by name, as loaded from YAML.
        where: the source of the options, for the message.

    Raises:
        ConfigError: for an unknown name or a value of the wrong type.
    """
    hints = option_hints()
    check_names([str(key) for key in options], [*hints, "env"], where)
    env = options.get("env", {})
    if not isinstance(env, dict) or any(isinstance(value, (dict, list)) for value in env.values()):
        raise ConfigError(
            f"`env` is {env!r} in {where}; it must be a mapping of environment variables to their values."
        )
    _check_types({key: value for key, value in options.items() if key != "env"}, hints, where)


def _check_nodes(root: Any, file: str) -> None:
    """Refuse a file whose aliases stand for more nodes than a recipe can need, or contain themselves.

    Aliases share one node, so such a file loads at once, but would be written out by whatever walks through it.

    Args:
        root: the node graph, from `yaml.compose`.
        file: kind and path of the file, for the message.

    Raises:
        ConfigError: for more than `_MAX_NODES` nodes, and for a key that a mapping has twice.
    """
    sizes: dict[int, float] = {}

    def size(node: Any) -> float:
        if id(node) not in sizes:
            sizes[id(node)] = math.inf  # of a node inside itself
            parts = [] if isinstance(node.value, str) else node.value
            first: dict[str, Any] = {}
            for key in (part[0] for part in parts if isinstance(part, tuple) and isinstance(part[0].value, str)):
                other = first.setdefault(key.value, key)
                if other is not key and key.value != "<<":
                    lines = f"in line {other.start_mark.line + 1} and in line {key.start_mark.line + 1}"
                    raise ConfigError(
                        f"{file} sets `{key.value}` {lines}, and only the last value would count. Remove one of them."
                    )
            sizes[id(node)] = 1 + sum(
                size(n) for part in parts for n in (part if isinstance(part, tuple) else (part,))
            )
        return sizes[id(node)]

    if root is not None and size(root) > _MAX_NODES:
        raise ConfigError(
            f"{file} has aliases that multiply to more than {_MAX_NODES:,} values. Write the values out."
        )


def _check_types(values: Mapping[str, Any], hints: Mapping[str, Any], where: str) -> None:
    for key, value in values.items():
        if not _fits(value, hints[key]):
            expected = describe_type(hints[key])
            advice = ""
            if isinstance(value, bool):
                advice = " YAML reads a bare yes, no, on or off as true or false: put it in quotes."
            raise ConfigError(
                f"`{key}` is {value!r:.200} ({type(value).__name__}) in {where}; it must be of type "
                f"{expected}.{advice}"
            )


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value from YAML fits the type `hint`."""
    if hint is Any:
        return True
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        if isinstance(value, str) and value.lower() in ("none", "null"):
            return True
        return any(_fits(value, part) for part in typing.get_args(hint))
    if isinstance(value, str) and hint in (int, float, bool):
        return _converts(value, hint)
    if isinstance(value, str):
        return True
    if origin is typing.Literal:
        return value in typing.get_args(hint)
    kind = origin or hint
    if isinstance(value, bool):
        return kind is bool
    if isinstance(value, int):
        return kind in (int, float)
    return isinstance(value, kind)


def _converts(text: str, kind: type) -> bool:
    if kind is bool:
        return text.lower() in _BOOLEANS
    try:
        kind(text)
    except ValueError:
        return False
    return True


def settings_of(arguments: Sequence[str], recipe: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """The values of the named options, from the command line or otherwise from the recipe."""
    settings = {name: recipe.get(name) for name in names}
    for i, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if argument.startswith("--") and option_name(name) in settings:
            settings[option_name(name)] = value if equals else next(iter(arguments[i + 1 : i + 2]), None)
    return settings


def check_paths(arguments: Sequence[str], recipe: Mapping[str, Any], options: Iterable[str] = LOADED) -> None:
    """Refuse paths of models and datasets that do not exist.

    A name counts as a path if it starts with `/`, `.` or `~`, has more than one `/`, or has the suffix of a data file.
    A name with one `/` does not, even if a folder with the name of its first part exists: `Qwen/Qwen3-32B` may be on
    the Hub while a folder `Qwen` holds another model.

    Args:
        arguments: the command line, from [`split_config`].
        recipe: the recipe, from [`check_arguments`].
        options: names of the options to check.

    Raises:
        ConfigError: for an unknown part of the demo, such as `demo:studnet`.
        DataError: for a path that does not exist.
    """
    settings = settings_of(arguments, recipe, options)
    named = list(settings.items())
    if "dataset_name" in settings and isinstance(recipe.get("datasets"), list):
        named += [("datasets", part.get("path")) for part in recipe["datasets"] if isinstance(part, dict)]
    for option, name in named:
        if not isinstance(name, str):
            continue
        kind = "dataset" if option.startswith("dataset") else "model"
        if name.startswith(_DEMO):
            resolve_demo_name(name)
        elif _is_path(name, kind) and not Path(name).expanduser().exists():
            what = "dataset file" if name.lower().endswith(_DATA_FILES) else f"{kind} folder"
            raise DataError(
                f"There is no {what} {name!r} (`{option}`; looked in {Path.cwd()}). Check the path; an id on the Hub "
                "has the form NAMESPACE/NAME."
            )


def _is_path(name: str, kind: str) -> bool:
    if ":" in name.partition("/")[0]:  # a provider and its model
        return False
    is_file = kind == "dataset" and name.lower().endswith(_DATA_FILES)
    return name.startswith(("/", ".", "~")) or name.count("/") > 1 or is_file


def resolve_demo_name(name: Any) -> Any:
    """The path of a part of the demo, such as `demo:student` (see `asset_path`), or of a name with `~`.

    Args:
        name: value of an option. Anything but a string that starts with `demo:` or `~` is returned unchanged, and so
            is `demo:judge`, a teacher without a path.

    Raises:
        ConfigError: when the demo has no such part.
    """
    if not isinstance(name, str) or name == JUDGE:
        return name
    if not name.startswith(_DEMO):
        return os.path.expanduser(name)
    part = name.removeprefix(_DEMO)
    if part not in ASSETS:
        advice = did_you_mean(name, [*(_DEMO + asset for asset in ASSETS), JUDGE])
        raise ConfigError(f"{name!r} is no part of the demo. {advice}")
    return str(asset_path(part))


def apply_env(recipe: Mapping[str, Any]) -> None:
    """Set the environment variables of a recipe. Call it before torch is imported, which reads some of them."""
    os.environ.update({str(key): str(value) for key, value in recipe.get("env", {}).items()})
