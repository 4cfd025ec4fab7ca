# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Train a student from a recipe.

    omniopd train --config recipes/demo.yaml
    accelerate launch -m omniopd_trl.train --config recipes/demo.yaml
    python -m omniopd_trl.train --config recipes/demo.yaml --learning_rate 1e-4 --use_peft

A recipe is a YAML file of options, which the command line overrides. The options are the fields of
[`OmniOPDScriptArguments`], [`OmniOPDConfig`], [`~trl.ModelConfig`] and [`~trl.DatasetMixtureConfig`]. `--help` lists
them.
"""

import _thread
import atexit
import logging
import os
import shlex
import signal
import sys
import threading
import time
import typing
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from omniopd_trl.cli.noise import is_verbose
from omniopd_trl.cli.opening import check_writable, drop_output, open_recipe, open_streams
from omniopd_trl.errors import RESUME, ConfigError, HubError, OmniOPDError, first_line

if TYPE_CHECKING:
    from trl import DatasetMixtureConfig, ModelConfig

    from omniopd_trl.cli.recipe import OmniOPDScriptArguments
    from omniopd_trl.trainer.omniopd_config import OmniOPDConfig

logger = logging.getLogger(__name__)


def resolve_checkpoint(value: str | bool | None, output_dir: str) -> str | bool:
    """What to resume from, as `trainer.train` takes it.

    Args:
        value: `True` or `"true"` for the last checkpoint in `output_dir`, the path of a checkpoint, or `None`.
        output_dir: folder of the earlier checkpoints.

    Returns:
        The path of the checkpoint; `True` to replay the journal from step 0; `False` to start over. With several
        processes, `True` stands for the last checkpoint as well: the trainer compares what they find.

    Raises:
        DataError: when there is nothing to resume from.
    """
    from omniopd_trl.trainer.checkpoints import resume_point

    text = str(value).lower()
    if value is None or text in ("false", "none", ""):
        return False
    wanted = True if text == "true" else str(value)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return wanted
    return resume_point(wanted, output_dir) or True


def check_method(method: str, output_dir: str) -> None:
    """Refuse to write the run of one method into the folder of another's run.

    Raises:
        ConfigError: when the last run in the folder was of another method.
    """
    from omniopd_trl.journal.browse import read_settings
    from omniopd_trl.journal.file import journals_of

    if not journals_of(output_dir):
        return
    there = read_settings(output_dir).get("method", "omniopd")
    if there != method:
        raise ConfigError(
            f"method={method!r}: the folder {output_dir!r} holds a run of {there!r}, whose checkpoints and journal "
            "would be mixed with those of this run. Set `output_dir` to another folder."
        )


def summarize(
    log_history: Sequence[Mapping[str, Any]],
    *,
    seconds: float,
    steps: int | None = None,
    usage: Any = None,
    teacher: Mapping[str, float] | None = None,
    evaluates: bool = True,
    lenient: bool = False,
    dollars: tuple[float, float] | None = None,
    saved_to: str,
) -> str:
    """A short table of the results and the cost of a run.

    Args:
        log_history: `trainer.state.log_history`, whose scores of evaluations are shown.
        seconds: wall time of training, in seconds.
        steps: optimizer steps of the run.
        usage: tokens of the teacher, with `prompt_tokens` and `completion_tokens`.
        teacher: scores of the teacher by name; `None` when it was not evaluated.
        evaluates: whether the run has an evaluation set.
        lenient: whether answers were read leniently (`eval_lenient_answers`).
        dollars: US dollars that the teacher has cost, of this run and with all earlier runs in the folder; `None`
            without a price.
        saved_to: path of the saved model.
    """
    from omniopd_trl.evals.results import aligned
    from omniopd_trl.report.runs import series

    rows = []
    # One for each evaluation set, or for each of several reward functions.
    names = dict.fromkeys(name for entry in log_history for name in entry if name.startswith("eval_"))
    for name in (name for name in names if "pass@1" in name):
        label = name.removeprefix("eval_").replace("_pass@1", " pass@1")
        points = series(log_history, name)
        rows += [(f"student before, {label}", f"{score:.3f}") for step, score in points[:1] if step == 0]
        rows += [(f"student after, {label}", f"{score:.3f} (step {step})") for step, score in points[-1:] if step > 0]
    scores = bool(rows)
    if not scores:
        reason = "the run evaluates nothing. Set `do_eval: true`, or `eval_strategy` to steps or epoch"
        if evaluates:
            reason = "it needs an evaluation set with a `solution` or `answer` column"
        rows.append(("student, pass@1", f"not measured: {reason}"))
    if teacher is not None:
        rows += [(f"teacher, {name}", f"{score:.3f}") for name, score in teacher.items() if "pass@1" in name]
    if scores or teacher is not None:
        rows.append(("reading of answers", "lenient" if lenient else "strict"))
    if steps is not None:
        rows.append(("optimizer steps", f"{steps:,}"))
    minutes, rest = divmod(round(seconds), 60)
    rows.append(("wall time of training", f"{minutes} min {rest} s"))
    if usage is not None:
        rows.append(("teacher tokens", f"{usage.prompt_tokens:,} read, {usage.completion_tokens:,} written"))
    if dollars is not None:
        run, job = dollars
        rows.append(("teacher cost", f"${run:.4f}" + (f", ${job:.4f} with earlier runs" if job > run else "")))
    rows.append(("model saved to", saved_to))
    return aligned(rows)


def print_change(output_dir: str) -> None:
    """Print one audited chunk of the first and one of the last step. An error is logged: the run has ended well."""
    from transformers.utils import logging

    try:
        from rich.console import Console

        from omniopd_trl.report.change import first_and_last
        from omniopd_trl.report.runs import Run
        from omniopd_trl.report.terminal import print_audits

        run = Run(output_dir)
        chunks = first_and_last(run)
        if chunks is not None:
            console = Console()
            console.print(
                "\nA chunk of the first step and one of the last: in each step, a quarter of the chunks have a lower "
                f"{chunks[0].order}.",
                highlight=False,
            )
            print_audits(run, chunks, console)
    except Exception as error:
        logging.get_logger(__name__).warning(f"No audited chunk can be shown ({type(error).__name__}: {error}).")


def set_init_kwargs(training_args: "OmniOPDConfig", model_args: "ModelConfig") -> None:
    """Set how student and teacher are loaded, from the options of the model."""
    from omniopd_trl.teachers.load import is_local

    # Keyword arguments in the recipe override those that follow from its other options. Quantization applies to the
    # student only and is passed separately. The teacher keeps the dtype that it was saved in.
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "trust_remote_code": training_args.trust_remote_code,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }
    # The teachers of a service do not use it, and an option that is not used is reported.
    teacher_name = training_args.teacher_model_name_or_path
    if teacher_name is not None and is_local(teacher_name):
        training_args.teacher_model_init_kwargs = {
            "attn_implementation": model_args.attn_implementation,
            **(training_args.teacher_model_init_kwargs or {}),
        }


def main(
    script_args: "OmniOPDScriptArguments",
    training_args: "OmniOPDConfig",
    model_args: "ModelConfig",
    dataset_args: "DatasetMixtureConfig",
) -> None:
    """Train, evaluate, save and push the student, and print the results.

    Raises:
        OmniOPDError: when the settings, the data or the teacher cannot be used.
    """
    if model_args.model_name_or_path is None:
        raise ConfigError("No student is named. Set `model_name_or_path` to a model's id or path.")
    method = script_args.method
    needs_teacher = method in ("omniopd", "opd") or script_args.evaluate_teacher
    if training_args.teacher_model_name_or_path is None and needs_teacher:
        raise ConfigError("No teacher is named. Set `teacher_model_name_or_path` to a model's id or path.")
    if training_args.hub_token is not None:
        raise ConfigError(
            "`hub_token` is set, and a recipe or a command line may be read by others. Set the environment variable "
            "HF_TOKEN, or log in with `hf auth login`."
        )

    from datasets import IterableDataset
    from trl import get_peft_config, get_quantization_config

    from omniopd_trl.cli.recipe import load_functions, load_splits
    from omniopd_trl.data.datasets import get_split
    from omniopd_trl.data.prompts import prepare_prompts, resolve_template
    from omniopd_trl.teachers.load import is_export

    template = script_args.prompt_template
    if template is not None:
        template = resolve_template(template)
    output_dir = str(training_args.output_dir)
    check_writable(output_dir)
    check_method(method, output_dir)
    reward_funcs = load_functions(script_args.reward_funcs)
    checkpoint = resolve_checkpoint(training_args.resume_from_checkpoint, output_dir)
    evaluates = (
        training_args.do_eval
        or training_args.eval_strategy != "no"
        or training_args.eval_on_start
        or script_args.evaluate_teacher
    )
    train_dataset = None
    from_export = is_export(training_args.teacher_model_name_or_path)
    if from_export and script_args.evaluate_teacher:
        raise ConfigError(
            f"evaluate_teacher=True needs a teacher to ask, and {training_args.teacher_model_name_or_path!r} is an "
            "export. Set evaluate_teacher to false."
        )
    if evaluates or not from_export:
        splits = load_splits(script_args, dataset_args)
    if not from_export:
        train_dataset = get_split(splits, script_args.dataset_train_split, "dataset_train_split")
    if isinstance(train_dataset, IterableDataset) and training_args.max_steps <= 0:
        raise ConfigError(
            f"max_steps={training_args.max_steps}: a streaming dataset has no length, so the number of steps must be "
            "given. Set `max_steps`."
        )
    eval_dataset = None
    if evaluates:
        eval_dataset = get_split(splits, script_args.dataset_test_split, "dataset_test_split")
        eval_dataset = prepare_prompts(eval_dataset, template)
    if train_dataset is not None:
        train_dataset = prepare_prompts(train_dataset, template)

    set_init_kwargs(training_args, model_args)
    teacher_name = training_args.teacher_model_name_or_path

    arguments = {
        "model": model_args.model_name_or_path,
        "args": training_args,
        "train_dataset": train_dataset,
        "eval_dataset": eval_dataset,
        "quantization_config": get_quantization_config(model_args),
        "peft_config": get_peft_config(model_args),
    }
    trainer: Any
    try:
        if method == "omniopd":
            from omniopd_trl.trainer.omniopd_trainer import OmniOPDTrainer

            scores_training = training_args.uses_rewards and not from_export
            trainer = OmniOPDTrainer(
                teacher_model=teacher_name,
                eval_reward_funcs=reward_funcs,
                reward_funcs=reward_funcs if scores_training else None,
                **arguments,
            )
        else:
            from omniopd_trl.baselines.make import make_baseline

            trainer = make_baseline(
                method,
                section=getattr(script_args, method),
                solutions=script_args.solutions,
                reward_funcs=reward_funcs,
                evaluate_teacher=script_args.evaluate_teacher,
                **arguments,
            )
    except OmniOPDError:
        raise
    except ValueError as error:  # of the checks of transformers, TRL and PEFT
        if is_verbose():
            raise
        reason = first_line(error).rstrip(".")
        raise ConfigError(
            f"These settings cannot be used: {reason}. Change them. With OMNIOPD_VERBOSE=1, the traceback is shown."
        ) from error

    if script_args.evaluate_teacher:
        training_args.teacher_context.check(eval_dataset, "eval_dataset")

    start = time.perf_counter()
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except KeyboardInterrupt as error:
        raise Interrupted(trainer.state.global_step) from error
    except KeyError as error:
        if is_verbose() or "metric_for_best_model" not in str(error):
            raise
        raise ConfigError(f"{error.args[0]} What is recorded is not paid for again: {RESUME}.") from error
    seconds = time.perf_counter() - start
    # The teacher's tokens and dollars for training, before the evaluation of the teacher adds to them.
    usage = trainer.teacher_usage
    dollars = trainer.step_metrics.dollars() if method == "omniopd" else trainer.teacher_dollars

    # Evaluate unless the last step was evaluated. `load_best_model_at_end` may have loaded the weights of an earlier
    # step.
    evaluated = [entry.get("step") for entry in trainer.state.log_history if "eval_loss" in entry]
    if eval_dataset is not None and (
        training_args.load_best_model_at_end or trainer.state.global_step not in evaluated
    ):
        trainer.evaluate()

    saved_to = output_dir
    name = script_args.dataset_name
    # Only an id on the Hub is of use in the model card.
    card = {"dataset_name": None if name is None or ":" in name or os.path.exists(name) else name}
    if training_args.push_to_hub:
        try:
            trainer.push_to_hub(**card)  # saves the model first
            saved_to += f", pushed to {trainer.hub_model_id}"
        except HubError as error:  # the run has finished, and everything is on disk
            logger.warning(str(error))
            saved_to += ", not pushed: see the warning"
    else:
        trainer.save_model(output_dir)
        trainer.create_model_card(**card)
    # Last: what a teacher that no longer answers ends is saved.
    teacher = trainer.evaluate_teacher() if script_args.evaluate_teacher else None

    if training_args.save_audits and trainer.accelerator.is_main_process:
        print_change(output_dir)
    trainer.accelerator.print(
        "\n"
        + summarize(
            trainer.state.log_history,
            seconds=seconds,
            steps=trainer.state.global_step,
            usage=usage,
            teacher=teacher,
            evaluates=evaluates,
            lenient=training_args.eval_lenient_answers,
            dollars=dollars,
            saved_to=saved_to,
        )
    )
    if training_args.save_audits and method == "omniopd":
        trainer.accelerator.print(f"\nSee what the teacher wrote: omniopd audits {shlex.quote(output_dir)}")
    # Finishes the trackers and destroys the process group.
    trainer.end()


class Interrupted(KeyboardInterrupt):
    """Control-C during training.

    Attributes:
        step: number of finished optimizer steps.
    """

    def __init__(self, step: int):
        super().__init__(f"at step {step}")
        self.step = step


class ControlC:
    """A handler of SIGINT that treats repeated deliveries of one Control-C as one.

    The terminal sends the signal to every process, and a launcher also forwards it to the processes that it started.
    The second delivery must not interrupt the cleanup that the first one started.

    Python ignores what a handler raises during garbage collection, in the callback of a weak reference or a finalizer.
    The signal is then delivered again.

    Attributes:
        last: time of the last delivery; `None` before the first.
        exit_code: set when all is said and done. Another Control-C then ends the process at once.
    """

    def __init__(self) -> None:
        self.last: float | None = None
        self.exit_code: int | None = None

    def __call__(self, number: int, frame: Any) -> None:
        now, last = time.monotonic(), self.last
        self.last = now
        if last is not None and now - last <= 1:
            return
        if self.exit_code is not None:
            os._exit(self.exit_code)
        raise KeyboardInterrupt

    def install(self) -> None:
        """Install the handler, unless SIGINT is ignored, as in a background job."""
        is_main = threading.current_thread() is threading.main_thread()
        if is_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self)
            sys.unraisablehook = self.repeat_if_ignored

    def repeat_if_ignored(self, ignored: "sys.UnraisableHookArgs") -> None:
        """The hook for exceptions that Python ignores."""
        if not isinstance(ignored.exc_value, KeyboardInterrupt):
            sys.__unraisablehook__(ignored)
            return

        def repeat() -> None:
            time.sleep(0.05)  # until the main thread has left the hook
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

        self.last = None
        _thread.start_new_thread(repeat, ())  # takes no lock that the main thread may hold


def describe_interruption(args: "OmniOPDConfig | None", step: int | None) -> str:
    """A line on the state of an interrupted run and how to resume it.

    Args:
        args: configuration of the run; `None` when it was not read yet.
        step: number of finished optimizer steps; `None` outside of training.
    """
    if args is None or step is None:  # maybe within an import, which must not be tried again
        return "Interrupted outside of the training's steps."

    from omniopd_trl.trainer.checkpoints import last_checkpoint

    checkpoint = last_checkpoint(str(args.output_dir))
    kept = "There is no checkpoint." if checkpoint is None else f"The last checkpoint is {checkpoint}."
    if checkpoint is None and not args.save_audits:
        return f"Interrupted at step {step}. {kept} The same command starts over."
    advice = "Resume with --resume_from_checkpoint true"
    if args.save_audits:
        advice += "; what the journal holds is replayed, and not paid for again"
    return f"Interrupted at step {step}. {kept} {advice}."


def wait_for_all() -> None:
    """Wait for all processes: a launcher ends the others, even while they write, as soon as one has ended."""
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        distributed.barrier()
        distributed.destroy_process_group()


def run(args: Sequence[str] | None = None, command: str | None = None) -> int:
    """The command: parse, train, and turn this package's errors into one line.

    Args:
        args: the command line; `None` uses that of the process.
        command: what was typed, for messages. Defaults to the training as a module.

    Returns:
        The exit code: 0 for success, 2 for invalid settings, 1 for any other error of this package, 130 after
        Control-C.
    """
    parsed = None
    open_streams()
    try:
        # The checks without an import of torch and TRL come first, since these imports take many seconds.
        arguments, _ = open_recipe(sys.argv[1:] if args is None else args)

        from omniopd_trl.cli.recipe import parse_args

        parsed = parse_args(arguments, command)
        main(*parsed)
    except KeyboardInterrupt as error:
        if int(os.environ.get("RANK", "0")) == 0:
            step = error.step if isinstance(error, Interrupted) else None
            sys.stderr.write(f"\n{describe_interruption(parsed and parsed[1], step)}\n")
            sys.stderr.flush()
        return 128 + signal.SIGINT
    except BrokenPipeError:
        drop_output()
        sys.stderr.write(f"What reads the output of this run has ended, and so does the run. To continue, {RESUME}.\n")
        return 1
    except OmniOPDError as error:
        # The message is enough, so print no traceback. It is printed once if all processes stop, and otherwise by the
        # process that stops.
        rank = int(os.environ.get("RANK", "0"))
        if rank == 0 or not error.on_every_process:
            sys.stderr.write(f"{'' if rank == 0 else f'[rank {rank}] '}{type(error).__name__}: {error}\n")
            sys.stderr.flush()
        if error.on_every_process:
            wait_for_all()
        return 2 if isinstance(error, ConfigError) else 1
    return 0


def leave(code: int) -> typing.NoReturn:
    """End this process like `sys.exit(code)`, but with several processes skip the interpreter's teardown.

    PyTorch's communication threads outlive the process group and sometimes abort a process during the teardown. The
    launcher would then report a finished run as failed.

    Args:
        code: the exit code.
    """
    if isinstance(handler := signal.getsignal(signal.SIGINT), ControlC):
        handler.exit_code = code
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        sys.exit(code)
    # As the interpreter does before its teardown: wait for other threads, then run the registered exit functions.
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
