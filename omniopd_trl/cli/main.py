# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""The `omniopd` command.

    omniopd cost --config recipes/math_qwen3_4b_from_qwen3_32b.yaml --trajectory_length 6340 --gpu h100-80

forecasts the tokens and dollars that a recipe takes from its teacher, memory and time, without any request.

    omniopd train --accelerate_config zero3 --config recipes/math_qwen3_4b_from_qwen3_32b.yaml

trains with one process per GPU.

    omniopd eval --model out --dataset problems.jsonl --output_dir out/eval

measures pass@1 of a model or a teacher.

    omniopd probe --config recipes/math_qwen3_4b_from_claude_haiku_4_5.yaml

measures before training, for about a dollar, whether a recipe will teach. `omniopd demo` runs the demo, and
`omniopd recipes` lists the recipes.
"""

import argparse
import signal
import sys
from collections.abc import Iterator, Sequence

import omniopd_trl
from omniopd_trl.cli import audits, cost, data, eval, export, probe, solutions, verify_estimator
from omniopd_trl.cli.ablate import command as ablate
from omniopd_trl.cli.demo import demo
from omniopd_trl.cli.noise import is_verbose
from omniopd_trl.cli.opening import drop_output, open_streams
from omniopd_trl.cli.options import check_names, option_name, option_names, stray_word
from omniopd_trl.cli.recipes import recipes
from omniopd_trl.cli.train import ControlC
from omniopd_trl.errors import ConfigError, OmniOPDError

# Commands that also take the options of the training command.
_WITH_RECIPE = {"cost": cost.run, "eval": eval.run, "probe": probe.run, "solutions": solutions.run}


def make_parser() -> argparse.ArgumentParser:
    """The parser of the command. It has no slow imports, which keeps `--help` fast."""
    parser = argparse.ArgumentParser(
        prog="omniopd", description="On-policy distillation from teachers that return only text.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"omniopd_trl {omniopd_trl.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    # Only for the list of commands in the help: `main` passes their command lines on unchanged.
    commands.add_parser("demo", help="train the small student that ships with the package", add_help=False)
    commands.add_parser("train", help="train a student, on one process or several", add_help=False)
    listing = commands.add_parser(
        "recipes",
        help="list the recipes that ship with the package, or copy one",
        description="List the recipes that ship with the package, or copy one into the current folder.",
        allow_abbrev=False,
    )
    listing.add_argument("name", nargs="?", metavar="NAME", help="the recipe to copy")
    listing.set_defaults(call=lambda options: recipes(options.name))
    audits.add_parsers(commands)
    ablate.add_parser(commands, main)
    for module in (verify_estimator, export, data, eval, solutions, probe, cost):
        module.add_parser(commands)
    for command in commands.choices.values():
        command.set_defaults(parser=command)
    return parser


def _option_strings(parser: argparse.ArgumentParser) -> Iterator[str]:
    """The options of a command and of its actions. argparse has no public way to list them."""
    for action in parser._actions:
        yield from action.option_strings
        if isinstance(action, argparse._SubParsersAction):
            for part in action.choices.values():
                yield from _option_strings(part)


def main(args: Sequence[str] | None = None) -> int:
    """The command: parse, run, and turn this package's errors into one line.

    Args:
        args: the command line; `None` uses that of the process.

    Returns:
        The exit code: 0 for success, 2 for invalid settings, 1 for any other error of this package. For
        `omniopd train`, the exit code of the training. argparse itself exits with 2 for an invalid command line.
    """
    arguments = list(sys.argv[1:] if args is None else args)
    control_c = ControlC()
    if args is None:
        control_c.install()
    open_streams()
    try:
        if arguments[:1] == ["train"]:
            from omniopd_trl.cli.launch import train

            return train(arguments[1:])
        if arguments[:1] == ["demo"]:
            return demo(arguments[1:])
        options, rest = make_parser().parse_known_args(arguments)
        with_recipe = _WITH_RECIPE.get(options.command)
        known = [*map(option_name, _option_strings(options.parser)), *(option_names() if with_recipe else ())]
        check_names([option_name(word) for word in rest if word.startswith("--")], known, "the command line")
        if with_recipe is not None:
            if rest and not rest[0].startswith("-"):
                raise stray_word(rest[0])
            with_recipe(options, rest)
        elif rest:
            options.parser.error(f"unrecognized arguments: {' '.join(rest)}")
        else:
            options.call(options)
    except KeyboardInterrupt as error:
        sys.stderr.write(" ".join(["Interrupted.", *map(str, error.args)]) + "\n")
        return 128 + signal.SIGINT
    except BrokenPipeError:
        drop_output()
        return 1
    except OSError as error:  # such as a full disk
        if is_verbose():
            raise
        sys.stderr.write(f"{type(error).__name__}: {error}. With OMNIOPD_VERBOSE=1, the traceback is shown.\n")
        return 1
    except OmniOPDError as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        return 2 if isinstance(error, ConfigError) else 1
    except Exception:
        # torch imports numpy and ignores what that raises: a Control-C in between is lost, and later imports fail.
        if control_c.last is None or is_verbose():
            raise
        sys.stderr.write("Interrupted.\n")
        return 128 + signal.SIGINT
    return 0


if __name__ == "__main__":
    sys.exit(main())
