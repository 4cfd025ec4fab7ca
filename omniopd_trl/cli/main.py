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
import math
import os
import signal
import sys
from collections.abc import Sequence

import omniopd_trl
from omniopd_trl.cli import ablate, audits, data, eval, export, hardware, probe, solutions, verify_estimator
from omniopd_trl.cli.cost import cost
from omniopd_trl.cli.options import positive_int
from omniopd_trl.cli.recipes import demo, recipes
from omniopd_trl.errors import ConfigError, OmniOPDError


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
    audits.add_parsers(commands)
    ablate.add_parser(commands)
    verify_estimator.add_parser(commands)
    export.add_parser(commands)
    data.add_parser(commands)
    eval.add_parser(commands)
    solutions.add_parser(commands)
    probe.add_parser(commands)
    cost = commands.add_parser(
        "cost",
        help="forecast tokens, dollars, memory and time of a recipe",
        description="Forecast the tokens and dollars that a recipe takes from its teacher: per trajectory, per step "
        "and for the run, with and without a prompt cache, compared with one solution per prompt (SFT). --gpu adds "
        "memory per GPU and time per step. Prompts are measured with the student's tokenizer; nothing is sent to the "
        "teacher.",
        epilog="Any option of the training command may be added and overrides the recipe: --num_chunks 5.",
        allow_abbrev=False,
    )
    cost.add_argument("--config", metavar="RECIPE", help="the recipe, a YAML file")
    cost.add_argument(
        "--trajectory_length",
        type=_positive_number,
        metavar="L",
        help="mean length of a trajectory in tokens. Defaults to the mean in the logs of the newest checkpoint in "
        "`output_dir`, and without a checkpoint to `max_completion_length`, the upper bound",
    )
    cost.add_argument(
        "--solution_length",
        type=_positive_number,
        metavar="S",
        help="mean length of a solution by the teacher in tokens, for SFT. Defaults to the length of a trajectory",
    )
    prompts = cost.add_mutually_exclusive_group()
    prompts.add_argument(
        "--max_prompts",
        type=positive_int,
        metavar="K",
        help="measure K prompts, evenly spaced in the dataset, instead of all",
    )
    prompts.add_argument(
        "--prompt_length",
        type=_positive_number,
        metavar="T",
        help="mean length of a prompt in tokens. If set, neither the dataset nor the student's tokenizer is loaded, "
        "and `max_steps` is required",
    )
    cost.add_argument(
        "--chunks_per_trajectory",
        type=_positive_number,
        metavar="K",
        help="mean number of chunks per trajectory, logged as `audit/num_chunks`. Defaults to `num_chunks`, or to as "
        "many as fit into a trajectory",
    )
    cost.add_argument(
        "--rollout_tokens",
        type=_positive_number,
        metavar="W",
        help="mean number of tokens per rollout: the logged `teacher/completion_tokens` divided by the prompts per "
        "step, the chunks per trajectory and the rollouts per chunk. Defaults to the maximum of a request",
    )
    cost.add_argument(
        "--rollout_share",
        type=_share,
        metavar="S",
        help="share of the chunks that get rollouts with `signal: cascade`: the logged `judge/frac_rollouts`. "
        "Defaults to 1, the upper bound",
    )
    cost.add_argument(
        "--stopped_share",
        type=_share,
        metavar="S",
        help="share of the chunks that get no more than `first_rollouts`: the logged `audit/frac_stopped`. Defaults "
        "to what a run or a probe in the recipe's `output_dir` has measured, or to 0, the upper bound of the cost",
    )
    cost.add_argument(
        "--num_processes",
        type=positive_int,
        default=1,
        metavar="P",
        help="number of processes of the run (default: 1)",
    )
    hardware.add_options(cost)
    cost.add_argument(
        "--samples_per_request",
        type=positive_int,
        metavar="K",
        help="number of samples per request. Defaults to what the teacher is known to support",
    )
    cost.add_argument(
        "--tokens_per_token",
        type=_positive_number,
        default=1.0,
        metavar="R",
        help="number of teacher tokens per student token (default: 1.0)",
    )
    return parser


def _positive_number(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} must be a number above 0")
    return number


def _share(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a number from 0 to 1")
    return number


def main(args: Sequence[str] | None = None) -> int:
    """The command: parse, run, and turn this package's errors into one line.

    Args:
        args: the command line; `None` uses that of the process.

    Returns:
        The exit code: 0 for success, 2 for invalid settings, 1 for any other error of this package. For
        `omniopd train`, the exit code of the training. argparse itself exits with 2 for an invalid command line.
    """
    arguments = list(sys.argv[1:] if args is None else args)
    try:
        if arguments[:1] == ["train"]:
            from omniopd_trl.cli.launch import train

            return train(arguments[1:])
        if arguments[:1] == ["demo"]:
            return demo(arguments[1:])
        parser = make_parser()
        options, rest = parser.parse_known_args(arguments)
        if options.command == "cost":
            cost(options, rest)
        elif options.command == "eval":
            eval.run(options, rest)
        elif options.command == "solutions":
            solutions.solutions(options, rest)
        elif options.command == "probe":
            probe.run(options, rest)
        elif rest:
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        elif options.command == "recipes":
            recipes(options.name)
        else:
            options.call(options)
    except KeyboardInterrupt as error:
        sys.stderr.write(" ".join(["Interrupted.", *map(str, error.args)]) + "\n")
        return 128 + signal.SIGINT
    except BrokenPipeError:  # such as of `omniopd audits runs/demo --jsonl | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes it at its end
        return 1
    except OmniOPDError as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        return 2 if isinstance(error, ConfigError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
