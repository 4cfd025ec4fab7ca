# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""`omniopd train`: `accelerate launch -m omniopd_trl.train`, with configurations by name.

    omniopd train --accelerate_config zero3 --config recipes/math_qwen3_4b_from_qwen3_32b.yaml

What can be checked without a model is checked once, before any process is started.
"""

import argparse
import ast
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from omniopd_trl.cli.hints import package_tree
from omniopd_trl.cli.opening import open_recipe
from omniopd_trl.cli.options import check_names, option_name, option_names, split_config, stray_word
from omniopd_trl.cli.recipes import FOLDER
from omniopd_trl.errors import ConfigError, did_you_mean, import_extra

MODULE = "omniopd_trl.train"
# Options of `accelerate launch` that the command sets itself, and what to do instead.
_OURS = {
    "config_file": "Name the file with `--accelerate_config`; the recipe with `--config`.",
    "module": f"`omniopd train` launches {MODULE}; for a script of your own there is `accelerate launch`.",
    "no_python": f"`omniopd train` launches {MODULE}; for a script of your own there is `accelerate launch`.",
}
_SHORT = {"-h": "--help", "-q": "--quiet", "-t": "--tee"}


def config_files() -> dict[str, Path]:
    """The configurations of accelerate that ship with the package, by name."""
    return {path.stem: path for path in sorted((FOLDER / "accelerate_configs").glob("*.yaml"))}


def resolve_config(value: str) -> Path:
    """The file of an accelerate configuration.

    Args:
        value: name of a configuration that ships with the package, or a path.

    Raises:
        ConfigError: when there is no such name or file.
    """
    files = config_files()
    if value in files:
        return files[value]
    if os.path.isfile(value):
        return Path(value)
    raise ConfigError(
        f"`accelerate_config` is {value!r}, which is neither a file nor one of {', '.join(files)}. "
        + did_you_mean(value, files, otherwise="Give one of the names, or the path of a file.")
    )


def make_help() -> str:
    """The help of the command, without slow imports."""
    files = config_files()
    width = max(map(len, files), default=0)
    configs = []
    for name, path in files.items():
        # The first line of each file says what it is for.
        first = path.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")
        configs.append(f"      {name:<{width}}  {first.partition(' `num_processes`')[0]}")
    return "\n".join(
        [
            "usage: omniopd train --config RECIPE [--accelerate_config NAME_OR_PATH] [--OPTION VALUE ...]",
            "",
            f"Train a student from a recipe: `accelerate launch -m {MODULE}`, with configurations by name.",
            "",
            "  --config RECIPE",
            "      the recipe, a YAML file of options; `omniopd recipes` lists those that ship with the package",
            "  --accelerate_config NAME_OR_PATH",
            "      how to launch: a file written by `accelerate config`, or one of these names. Defaults to",
            "      accelerate's default configuration if there is one, and to one process per GPU otherwise",
            *configs,
            "  --num_processes N",
            "      total number of processes (default: as in the configuration, or one per visible GPU)",
            "  --main_process_port PORT, --gpu_ids 0,1, --num_machines N, ...",
            "      any other option of `accelerate launch`; `accelerate launch --help` lists them",
            "  --learning_rate 1e-6, --num_chunks 5, --output_dir student, --use_peft, ...",
            "      any option of a recipe, whose value in the recipe it overrides;",
            f"      `python -m {MODULE} --help` and docs/configuration.md list them",
            "",
            "An option of both (`debug`, `gradient_accumulation_steps`) goes to the training. The exit code is that",
            "of the training.",
            "",
        ]
    )


@cache
def launch_options() -> dict[str, bool]:
    """Options of `accelerate launch` by name, and whether they take a value. Does not import accelerate."""
    options: dict[str, bool] = {}
    for node in ast.walk(package_tree("accelerate", "commands/launch.py")):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "add_argument":
            action = next((ast.unparse(k.value) for k in node.keywords if k.arg == "action"), "")
            has_value = not action.strip("'\"").startswith(("store_", "help"))
            for name in node.args:
                if isinstance(name, ast.Constant) and str(name.value).startswith("--"):
                    options[str(name.value)[2:].replace("-", "_")] = has_value
    return options


class Split(NamedTuple):
    """A command line, split into its parts."""

    accelerate_config: str | None
    launch: list[str]  # options of `accelerate launch`
    training: list[str]  # options of the training


def split_arguments(arguments: Iterable[str], names: Sequence[str], options: Mapping[str, bool]) -> Split:
    """Split the command line into the options of accelerate and those of the training.

    Args:
        arguments: the command line, with `--config` and its path as two words.
        names: names of all options of the training.
        options: options of `accelerate launch` by name, and whether they take a value.

    Raises:
        ConfigError: for an unknown option, and for an option of accelerate without its value.
    """
    config: str | None = None
    launch: list[str] = []
    training: list[str] = []
    words = iter(arguments)
    for word in words:
        word = _SHORT.get(word, word)
        name = option_name(word)
        # The training's parser reports a value that belongs to no option.
        if not word.startswith("--") or name in names:
            training.append(word)
            continue
        if name in _OURS:
            raise ConfigError(f"`--{name}` cannot be given here. {_OURS[name]}")
        check_names([name], [*names, *options, "accelerate_config"], "the command line")
        value: str | None = None
        if name == "accelerate_config" or options[name]:
            _, equals, value = word.partition("=")
            value = value if equals else next(words, None)
            if value is None:
                raise ConfigError(f"`--{name}` needs a value.")
        if name == "accelerate_config":
            config = value
        else:
            launch += [word] if value is None else [f"--{name}", value]
    return Split(config, launch, training)


def train(arguments: Sequence[str]) -> int:
    """Check the command line and the recipe, launch the training, and wait for it.

    Args:
        arguments: the command line after `omniopd train`.

    Returns:
        The exit code of the training. With several processes, that of the process that failed first. When a signal
        ended it, 128 plus the number of the signal.

    Raises:
        ConfigError: for options that do not exist, and settings that cannot be launched.
        MissingExtraError: when the configuration needs DeepSpeed and it is not installed.
    """
    if not arguments or {"-h", "--help"} & set(arguments):
        sys.stdout.write(make_help())
        return 0 if arguments else 2

    # The checks without an import of torch, TRL or accelerate come first, since these imports are slow.
    value, launch, training = split_arguments(split_config(arguments), option_names(), launch_options())
    training, recipe = open_recipe(training)
    path = None if value is None else resolve_config(value)

    from accelerate.commands.launch import launch_command_parser

    from omniopd_trl.cli.recipe import make_parser

    parser = make_parser(command="omniopd train --config RECIPE.yaml")
    launch_parser = launch_command_parser()
    # The generated usage line would list some two hundred options.
    launch_parser.prog, launch_parser.usage = "omniopd train", parser.usage
    _check_training(parser, recipe, training)

    config = None if path is None else _load(path)
    if path is not None:
        launch = ["--config_file", str(path), *launch]
    if config is not None and config.use_cpu and not {"use_cpu", "no_use_cpu"} & set(map(option_name, training)):
        # Otherwise the processes would look for GPUs, and without GPUs each would train alone.
        training = [*training, "--use_cpu", "true"]
    args = launch_parser.parse_args([*launch, "-m", MODULE, *training])
    for name in ("num_processes", "num_machines"):
        if (number := getattr(args, name)) is not None and number < 1:
            raise ConfigError(f"`--{name}` is {number}; it must be at least 1.")
    # accelerate's `quiet` would hide the exit code.
    args.quiet = None
    if config is not None:
        _complete(args, config, str(value))
    if args.use_deepspeed or (config is not None and config.distributed_type == "DEEPSPEED" and not args.cpu):
        import_extra("deepspeed", "deepspeed")
    _spell_out(args, config)
    return _launch(args)


def _check_training(parser: argparse.ArgumentParser, recipe: Mapping[str, Any], training: Sequence[str]) -> None:
    """Refuse invalid values and stray words here, before every process would refuse them after importing TRL.

    Checks of several settings together are left to the processes, since they may need the device.
    """
    parser.set_defaults_with_config(**{key: value for key, value in recipe.items() if key != "env"})  # type: ignore[attr-defined]
    position = training.index("--config") if "--config" in training else len(training)
    _, strays = parser.parse_known_args([*training[:position], *training[position + 2 :]])
    if strays:
        raise stray_word(strays[0])


def _load(path: Path) -> Any:
    """The configuration in a file, loaded by accelerate."""
    from accelerate.commands.config.config_args import load_config_from_file
    from yaml import YAMLError

    try:
        return load_config_from_file(str(path))
    except (OSError, ValueError, TypeError, AttributeError, YAMLError) as error:
        raise ConfigError(
            f"`accelerate_config` is {str(path)!r}, which accelerate cannot use ({error}). Write one with `accelerate "
            f"config --config_file FILE`, or give one of the names {', '.join(config_files())}."
        ) from error


def _complete(args: argparse.Namespace, config: Any, value: str) -> None:
    """Fill in the number of processes and the GPUs where the configuration leaves them to the machine."""
    if args.num_processes is None and config.num_processes == -1:
        import torch

        count = torch.accelerator.device_count()
        if count == 0:
            raise ConfigError(
                f"`accelerate_config` is {value!r}, which is for GPUs, and this machine has none. "
                "`--accelerate_config cpu_2` trains on the CPU; `--num_processes N` starts N processes anyway."
            )
        args.num_processes = count * (args.num_machines or config.num_machines)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    chosen = "all" if config.gpu_ids is None else str(config.gpu_ids)
    if args.gpu_ids is None and chosen != "all" and value in config_files() and visible is not None:
        # accelerate would replace the GPUs of the variable instead of choosing from them.
        devices = visible.split(",")
        args.gpu_ids = ",".join(devices[int(i)] for i in chosen.split(",") if int(i) < len(devices))


def _spell_out(args: argparse.Namespace, config: Any) -> None:
    """Set accelerate's own defaults explicitly. Otherwise it prints a list of them before the training starts."""
    import psutil
    import torch
    from accelerate.commands import launch as accelerate_launch

    if config is None:
        if os.path.isfile(accelerate_launch.default_config_file) and not args.cpu:
            return  # the user's default configuration sets these values
        count = torch.accelerator.device_count()
        if args.num_processes is None:
            args.num_processes = count
        others = (args.multi_gpu, args.cpu, args.tpu, args.use_deepspeed, args.use_fsdp)
        if args.num_processes > 1 and count > 1 and not any(others):
            args.multi_gpu = True
        for name, value in (("num_machines", 1), ("mixed_precision", "no"), ("dynamo_backend", "no")):
            if getattr(args, name) is None:
                setattr(args, name, value)
    on_cpu = args.cpu if config is None else config.use_cpu
    if on_cpu and args.num_cpu_threads_per_process is None and not os.environ.get("OMP_NUM_THREADS"):
        processes = args.num_processes or getattr(config, "num_processes", None) or 1
        machines = args.num_machines or getattr(config, "num_machines", None) or 1
        cores = psutil.cpu_count(logical=False) or 1
        args.num_cpu_threads_per_process = max(cores // max(processes // machines, 1), 1)


def _launch(args: argparse.Namespace) -> int:
    """Start the processes, wait for them, and return the exit code."""
    from accelerate.commands.launch import launch_command
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    # A signal to the command is meant for the training. With one process, accelerate would leave it running, and it
    # would continue to pay for the teacher. The launcher of several processes ends them itself. On Control-C, this
    # process waits until the training has ended.
    previous = {}
    if threading.current_thread() is threading.main_thread():
        previous = {number: signal.signal(number, _hand_on) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        launch_command(args)
    except subprocess.CalledProcessError as error:
        return _exit_code(error.returncode)
    except ChildFailedError as error:
        # The launcher ended the others because of this one.
        return _exit_code(error.get_first_failure()[1].exitcode)
    except SignalException as error:
        return _exit_code(-error.sigval)
    except KeyboardInterrupt:
        return _exit_code(-signal.SIGINT)
    except (ValueError, ImportError, ConnectionError) as error:
        # Only the launcher runs in this process, so the error is its own.
        raise ConfigError(f"accelerate cannot launch this: {error}") from error
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    return 0


def _hand_on(number: int, frame: Any) -> None:
    """Forward a signal to the processes that were started."""
    import psutil

    for process in psutil.Process().children():
        with suppress(psutil.NoSuchProcess):
            process.send_signal(number)


def _exit_code(code: int) -> int:
    """The exit code as a shell reports it. In Python, a process that a signal ended has a negative code."""
    return code if code >= 0 else 128 - code
