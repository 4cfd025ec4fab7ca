# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""The training command, as a user runs it: real processes, tiny models, local files, a hub on this machine."""

import json
import os
import re
import signal
import sys
import time
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from omniopd_trl.cli.main import main as cli
from omniopd_trl.cli.recipe import parse_args
from omniopd_trl.cli.train import main, resolve_checkpoint, run, summarize
from omniopd_trl.errors import ConfigError, DataError, TeacherError
from omniopd_trl.evals.math import math_accuracy
from omniopd_trl.trainer.omniopd_trainer import OmniOPDTrainer
from tests.support import hub_stub
from tests.support.commands import run_process, succeeded, train
from tests.support.loopback import Fault, Loopback, wire
from tests.support.loopback.teachers import ControlC


class TestRun:
    """Whole runs."""

    def test_trains_evaluates_saves_and_says_so(self, recipe, tmp_path, tiny_model_dir):
        """A recipe of local files trains the student; a table says what it gained and cost."""
        path = recipe(
            eval_on_start=True, evaluate_teacher=True, prompt_template="Solve: {question}", num_eval_generations=2
        )
        process = succeeded(train("--config", path, cwd=tmp_path))
        *table, blank, last = process.stdout.strip().splitlines()[-10:]
        assert (blank, last) == ("", "See what the teacher wrote: omniopd audits out")
        assert re.fullmatch(r"student before, pass@1  \d\.\d{3}", table[0])
        assert re.fullmatch(r"student after, pass@1   \d\.\d{3} \(step 2\)", table[1])
        assert re.fullmatch(r"teacher, pass@1         \d\.\d{3}", table[2])
        assert table[3] == "reading of answers      strict"
        assert table[4] == "optimizer steps         2"
        assert re.fullmatch(r"wall time of training   \d+ min \d+ s", table[5])
        read, written = re.fullmatch(r"teacher tokens          ([\d,]+) read, ([\d,]+) written", table[6]).groups()
        assert int(read.replace(",", "")) > 0
        assert int(written.replace(",", "")) > 0
        assert table[7] == "model saved to          out"
        plan = process.stdout.partition("step 1 of 2")[0].splitlines()
        assert {"teacher   scripted", "a step    4 prompts x up to 2 chunks x 2 rollouts"} <= set(plan)
        assert "A chunk of the first step and one of the last" in process.stdout
        before = AutoModelForCausalLM.from_pretrained(tiny_model_dir).state_dict()
        after = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
        assert any((after[name] != before[name]).any() for name in before)

    def test_command_line_beats_recipe(self, recipe, tmp_path):
        """What the command line says wins over the recipe, and the rest of the recipe stays."""
        process = succeeded(train("--config", recipe(), "--max_steps", "1", "--output_dir", "other", cwd=tmp_path))
        assert "model saved to         other" in process.stdout
        # The dataset has answers: what is missing is the evaluation.
        assert "student, pass@1        not measured: the run evaluates nothing. Set `do_eval: true`" in process.stdout
        assert not (tmp_path / "out").exists()
        assert "step 1 of 1 (epoch 0.25)" in process.stdout

    def test_resume(self, recipe, tmp_path):
        """A run that resumes from its last checkpoint, within an epoch, ends as the one that was never stopped."""
        succeeded(train("--config", recipe(max_steps=4), "--output_dir", "whole", cwd=tmp_path))
        path = recipe(max_steps=4, save_strategy="steps", save_steps=2)
        succeeded(train("--config", path, cwd=tmp_path))
        # As a run that was killed after its second step leaves it.
        for name in ("checkpoint-4", "model.safetensors"):
            succeeded(run_process("rm", "-r", tmp_path / "out" / name, cwd=tmp_path))
        process = succeeded(train("--config", path, "--resume_from_checkpoint", "true", cwd=tmp_path))
        state = json.loads((tmp_path / "out" / "checkpoint-4" / "trainer_state.json").read_text())
        assert [entry["step"] for entry in state["log_history"] if "loss" in entry] == [1, 2, 3, 4]
        # It went on rather than starting again: only two steps are reported, and what is replayed is said.
        assert re.findall(r"^step (\d) of 4 ", process.stdout, re.MULTILINE) == ["3", "4"]
        assert [
            int(step) for step in re.findall(r"step (\d): \d+ of \d+ audits from the journal", process.stderr)
        ] == [2, 3]
        assert "starts over" not in process.stderr
        resumed = load_file(tmp_path / "out" / "model.safetensors")
        whole = load_file(tmp_path / "whole" / "model.safetensors")
        for name in whole:
            assert (resumed[name] - whole[name]).abs().max() < 1e-5, name

    @pytest.mark.case("U1")
    def test_the_same_command_again_starts_over(self, recipe, tmp_path, monkeypatch, caplog):
        """It says so, and that of the message's advice replays."""
        monkeypatch.chdir(tmp_path)
        path = recipe(max_steps=1, save_strategy="no", evaluate_teacher=False)
        assert run(["--config", path]) == 0
        assert "starts over" not in caplog.text
        assert run(["--config", path]) == 0
        (line,) = re.findall(
            r"This run starts over\. 1 recorded step of an earlier run in out/_audits is .*", caplog.text
        )
        assert "audits from the journal" not in caplog.text
        option = re.search(r"`(--resume_from_checkpoint true)`", line)[1].split()
        assert run(["--config", path, *option]) == 0
        assert re.search(r"step 0: (\d+) of \1 audits from the journal", caplog.text)

    def test_a_teacher_that_cannot_be_evaluated(self, recipe, tmp_path, monkeypatch):
        """The student has been trained, and is saved before the teacher is asked."""
        monkeypatch.chdir(tmp_path)

        def fail(trainer):
            raise TeacherError("The account is empty.")

        monkeypatch.setattr(OmniOPDTrainer, "evaluate_teacher", fail)
        assert run(["--config", recipe(max_steps=1, save_strategy="no", evaluate_teacher=True)]) != 0
        assert (tmp_path / "out" / "model.safetensors").exists()

    def test_lora_and_push(self, recipe, tmp_path):
        """The LoRA flags train an adapter, which reaches the Hub byte for byte, without the token or a local path."""
        with hub_stub.serve() as hub:
            path = recipe(push_to_hub=True, hub_model_id="me/student", use_peft=True, lora_r=4, evaluate_teacher=False)
            process = succeeded(train("--config", path, cwd=tmp_path, env=hub.environment))
        repo = hub.repos["me/student"]
        assert not hub.unauthorized
        assert "pushed to me/student" in process.stdout
        assert repo.files["adapter_model.safetensors"] == (tmp_path / "out" / "adapter_model.safetensors").read_bytes()
        assert json.loads(repo.files["adapter_config.json"])["r"] == 4
        assert "model.safetensors" not in repo.files
        # The model and its card: never what a teacher was asked or what it answered.
        assert not [name for name in repo.files if "/" in name or name.endswith((".sqlite", ".lock", ".jsonl"))]
        for name, content in repo.files.items():
            assert hub_stub.TOKEN.encode() not in content, name
        card = repo.files["README.md"].decode()
        assert "omniopd" in card
        assert "2606.01476" in card
        assert str(tmp_path) not in card
        assert "sums" not in card

    def test_a_failed_push_is_no_failure_of_the_run(self, recipe, tmp_path, monkeypatch, caplog, capsys):
        """The run ends with exit code 0, the model on disk, and a warning with the command that repeats the push."""
        monkeypatch.chdir(tmp_path)
        path = recipe(push_to_hub=True, hub_model_id="me/student", evaluate_teacher=False, max_steps=1)
        with hub_stub.serve() as hub:
            hub_stub.connect(monkeypatch, hub)
            hub.fail(500, "/commit/")
            assert run(["--config", path]) == 0
        assert "model saved to         out, not pushed: see the warning" in capsys.readouterr().out
        assert "repeat it with: hf upload me/student out/_push/1 ." in caplog.text
        assert (tmp_path / "out" / "model.safetensors").exists()

    def test_a_refused_token_is_one_line(self, recipe, tmp_path, monkeypatch, capsys):
        """It ends the run before a model is loaded or the teacher is asked."""
        monkeypatch.chdir(tmp_path)
        path = recipe(push_to_hub=True, teacher_model_name_or_path="gone", evaluate_teacher=False)
        with hub_stub.serve() as hub:
            hub_stub.connect(monkeypatch, hub)
            monkeypatch.setenv("HF_TOKEN", "hf_wrong")
            assert run(["--config", path]) == 1
        errors = capsys.readouterr().err
        assert "Traceback" not in errors
        last = errors.strip().splitlines()[-1]
        assert last.startswith("HubError: The run cannot be pushed to the Hub as 'out': HTTP 401 Unauthorized")

    def test_mixture(self, recipe, tmp_path):
        """A mixture of local files, with a split of its own for evaluation."""
        part = {"path": "sums/train.jsonl"}
        path = recipe(dataset_name=..., datasets=[part, part], test_split_size=4, do_eval=True, max_steps=1)
        process = succeeded(train("--config", path, cwd=tmp_path))
        assert "student after, pass@1" in process.stdout

    def test_streaming(self, recipe, tmp_path):
        """A stream trains too, given the number of steps."""
        succeeded(train("--config", recipe(dataset_streaming=True, eval_on_start=True), cwd=tmp_path))

    def test_two_processes(self, recipe, tmp_path):
        """Under `accelerate launch` with two processes the tables are printed once, with the audits of both."""
        tables = {"log_completions": True, "audit_eval": True, "num_completions_to_print": 1}
        path = recipe(eval_on_start=True, evaluate_teacher=True, gradient_accumulation_steps=1, **tables)
        command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", 2]
        command += ["--main_process_port", 0, "-m", "omniopd_trl.train", "--config", path]
        process = succeeded(run_process(*command, cwd=tmp_path))
        assert process.stdout.count("model saved to") == 1
        assert re.findall(r"^(\w*audits), step (\d)", process.stdout, re.MULTILINE) == [
            ("eval_audits", "0"),
            ("audits", "1"),
            ("audits", "2"),
            ("eval_audits", "2"),
        ]
        folder = tmp_path / "out" / "completions"
        audits = pq.read_table(folder / "audits_00002.parquet").to_pylist()
        assert {(row["step"], row["rank"]) for row in audits} == {(1, 0), (1, 1)}
        # Each of the two problems once: the batch of the second process is padding.
        evaluated = pq.read_table(folder / "eval_audits_00002.parquet").to_pylist()
        assert {row["prompt"] for row in evaluated} == {"user: What is 0 + 0?", "user: What is 1 + 1?"}
        assert len({(row["rank"], row["index"]) for row in evaluated}) == 2
        assert "student after, pass@1" in process.stdout


# What `sys` holds outlives all but the interpreter's teardown.
ABORTS = """
import atexit, os, sys, threading, time
from omniopd_trl.train import leave

class Aborts:
    def __del__(self, abort=os.abort):
        abort()

def late():
    time.sleep(0.5)
    print("a thread")

sys.aborts = Aborts()
atexit.register(print, "registered")
threading.Thread(target=late).start()
leave(int(sys.argv[1]))
"""


class TestLeave:
    """The end of the command."""

    @pytest.mark.parametrize("code", [0, 1])
    def test_no_abort_at_the_end_of_one_of_several_processes(self, code, tmp_path):
        """What a launcher sees is the command's own exit code, after threads and exit functions."""
        process = run_process(sys.executable, "-c", ABORTS, code, cwd=tmp_path, env={"WORLD_SIZE": "2"})
        assert process.returncode == code, process.stderr
        assert process.stdout.split("\n") == ["a thread", "registered", ""]

    def test_one_process_ends_as_ever(self, tmp_path):
        """Without this, the test above could not fail."""
        process = run_process(sys.executable, "-c", ABORTS, 0, cwd=tmp_path, env={"WORLD_SIZE": "1"})
        assert process.returncode == -signal.SIGABRT
        assert process.stdout.split("\n") == ["a thread", "registered", ""]


class TestMistakes:
    """Mistakes of the user end in one line, before anything expensive, and never in a traceback."""

    def test_process(self, recipe, tmp_path):
        """Data that is not there: exit code 1, one line, nothing written."""
        process = train("--config", recipe(dataset_name="sums.jsonl"), cwd=tmp_path)
        assert process.returncode == 1
        assert "Traceback" not in process.stderr
        assert re.search(r"^DataError: There is no dataset file 'sums.jsonl'", process.stderr, re.MULTILINE)
        assert not (tmp_path / "out").exists()

    def test_missing_extra(self, recipe, tmp_path):
        """Without math-verify an evaluation that needs it says how to install it, before a model is loaded."""
        code = "import sys; sys.modules['math_verify'] = None; import omniopd_trl.train as t; sys.exit(t.run())"
        process = run_process(sys.executable, "-c", code, "--config", recipe(do_eval=True), cwd=tmp_path)
        assert process.returncode == 1
        assert "Traceback" not in process.stderr
        assert re.search(r"^MissingExtraError: .*pip install -e '\.\[eval\]'", process.stderr, re.MULTILINE)
        assert not (tmp_path / "out").exists()

    def test_setting(self, recipe, capsys):
        """A setting that contradicts another: exit code 2."""
        assert run(["--config", recipe(chunk_length=64)]) == 2
        assert capsys.readouterr().err.startswith("ConfigError: chunk_length=64 is larger than max_completion_length")

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"seed": -1}, "These settings cannot be used: Seed must be between 0 and 2**32 - 1. Change them."),
            ({"output_dir": ""}, "`output_dir` is empty. Name a folder."),
            ({"output_dir": "recipe.yaml"}, "recipe.yaml is a file. Choose another folder."),
            ({"output_dir": "recipe.yaml/out"}, "recipe.yaml is a file. Choose another folder."),
            ({"generation_kwargs": "{top_k"}, "`generation_kwargs` is '{top_k', which is not valid JSON"),
            ({"generation_kwargs": "{top_k"}, "Write it as --generation_kwargs '{\"KEY\": VALUE}'"),
            ({"chat_template_kwargs": "5"}, "`chat_template_kwargs` is 5; it must be a mapping of keys to values."),
        ],
    )
    def test_settings_that_another_package_would_refuse(self, recipe, tmp_path, monkeypatch, capsys, changes, message):
        """One line of this package, and the traceback only where it is asked for."""
        monkeypatch.chdir(tmp_path)
        monkeypatch.delenv("OMNIOPD_VERBOSE", raising=False)
        assert run(["--config", recipe(**changes)]) == 2
        assert message in capsys.readouterr().err.splitlines()[-1]

    def test_traceback_on_request(self, recipe, tmp_path, monkeypatch):
        """Of the error of another package."""
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("OMNIOPD_VERBOSE", "1")
        with pytest.raises(ValueError, match=r"^Seed must be between"):
            run(["--config", recipe(seed=-1)])

    def test_a_metric_that_does_not_exist(self, recipe, tmp_path, monkeypatch, capsys):
        """transformers finds out after the first evaluation. The error lists the metrics, and how to continue."""
        monkeypatch.chdir(tmp_path)
        best = {"load_best_model_at_end": True, "metric_for_best_model": "nope", "save_strategy": "steps"}
        best |= {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "max_steps": 1}
        assert run(["--config", recipe(**best)]) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert "'eval_nope', which is not found" in error
        assert "'eval_pass@1'" in error
        assert "recorded answers are not paid again" in error

    def test_every_process_says_it(self, recipe, capsys, monkeypatch):
        """What goes wrong in another process than the first is not lost."""
        monkeypatch.setenv("RANK", "1")
        assert run(["--config", recipe(chunk_length=64)]) == 2
        assert capsys.readouterr().err.startswith("[rank 1] ConfigError: chunk_length=64")

    @pytest.mark.parametrize(("rank", "said"), [("0", "TeacherError: no credit\n"), ("1", "")])
    def test_one_process_speaks_for_all(self, recipe, capsys, monkeypatch, rank, said):
        """What every process stops for is said once, and each returns the same exit code."""

        def stopped(*args):
            error = TeacherError("no credit")
            error.on_every_process = True
            raise error

        monkeypatch.setenv("RANK", rank)
        monkeypatch.setattr("omniopd_trl.cli.train.main", stopped)
        assert run(["--config", recipe()]) == 1
        assert capsys.readouterr().err == said

    def test_argparse(self, recipe, capsys):
        """A value that cannot be converted: argparse's own exit, with a usage line that fits on the screen."""
        with pytest.raises(SystemExit) as exit_info:
            run(["--config", recipe(), "--num_chunks", "ten"])
        assert exit_info.value.code == 2
        usage, error = capsys.readouterr().err.splitlines()
        assert usage == "usage: python -m omniopd_trl.train --config RECIPE.yaml [--OPTION VALUE ...]"
        assert "invalid int value: 'ten'" in error

    @pytest.mark.parametrize("command", ["cost", "demo", "eval", "probe", "solutions", "train"])
    def test_argparse_of_a_command(self, recipe, tmp_path, capsys, command):
        """The usage is that of the command that was typed."""
        options = {"demo": [], "eval": ["--output_dir", str(tmp_path / "eval")]}.get(command, [])
        options += [] if command == "demo" else ["--config", recipe()]
        with pytest.raises(SystemExit) as exit_info:
            cli([command, *options, "--num_chunks", "ten"])
        assert exit_info.value.code == 2
        usage, error = capsys.readouterr().err.splitlines()
        needed = "" if command in ("demo", "eval") else " --config RECIPE.yaml"
        assert usage == f"usage: omniopd {command}{needed} [--OPTION VALUE ...]"
        assert error.startswith(f"omniopd {command}: error: argument --num_chunks")

    def test_control_c_within_an_import(self, tmp_path):
        """The import is not tried again for the message: half of a package may be loaded."""
        code = (
            "import sys, omniopd_trl.cli.train as t\n"
            "class Interrupts:\n"
            "    def find_spec(self, name, *args):\n"
            "        if name in ('trl', 'transformers.trainer'):\n"
            "            raise KeyboardInterrupt\n"
            "sys.meta_path.insert(0, Interrupts())\n"
            "sys.exit(t.run(['--output_dir', 'out']))"
        )
        process = run_process(sys.executable, "-c", code, cwd=tmp_path)
        assert process.returncode == 128 + signal.SIGINT
        assert process.stderr == "\nInterrupted outside of the training's steps.\n"

    def test_control_c_that_python_ignores(self, tmp_path):
        """One in a weak reference's callback, as during garbage collection, is repeated. Nothing delays the end."""
        code = (
            "import atexit, signal, time, weakref, omniopd_trl.cli.train as t\n"
            "handler = t.ControlC()\n"
            "handler.install()\n"
            "def interrupt(*args):\n"
            "    handler.last = None\n"
            "    signal.raise_signal(signal.SIGINT)\n"
            "def hang():\n"
            "    interrupt()\n"
            "    time.sleep(200)\n"
            "atexit.register(hang)\n"
            "try:\n"
            "    kept = weakref.ref(set(), interrupt)\n"
            "    time.sleep(200)\n"
            "except KeyboardInterrupt:\n"
            "    t.leave(130)"
        )
        process = run_process(sys.executable, "-c", code, cwd=tmp_path)
        assert (process.returncode, process.stderr) == (130, "")

    def test_control_c_that_an_import_ignores(self, tmp_path):
        """torch ignores what an import of numpy raises. Whatever fails later is no error of its own."""
        code = (
            "import signal, sys, omniopd_trl.cli.main as m\n"
            "def demo(arguments):\n"
            "    try:\n"
            "        signal.raise_signal(signal.SIGINT)\n"
            "    except KeyboardInterrupt:\n"
            "        raise RecursionError('numpy is imported in part')\n"
            "m.demo = demo\n"
            "sys.argv = ['omniopd', 'demo']\n"
            "sys.exit(m.main())"
        )
        process = run_process(sys.executable, "-c", code, cwd=tmp_path)
        assert (process.returncode, process.stderr) == (130, "Interrupted.\n")

    @pytest.mark.case("A3")
    def test_control_c_while_the_teacher_is_asked(self, recipe, tmp_path, monkeypatch, capsys):
        """The server does not answer the question at the start: one Control-C ends the command."""
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
        with Loopback(wire.openai, lambda *_: Fault(how="hang")) as server:
            teacher = {"teacher_model_name_or_path": "vllm:model", "teacher_base_url": f"{server.url}/v1"}
            path = recipe(**teacher, teacher_continuation="instruct")
            interruption = ControlC(server)
            assert run(["--config", path]) == 130
            assert time.monotonic() - interruption.at < 2
        assert "Interrupted" in capsys.readouterr().err

    def test_other_errors_keep_their_traceback(self, recipe, monkeypatch):
        """A mistake of this package, or of one that it uses, is not passed off as one of the user's."""

        def broken(*args):
            raise RuntimeError("broken")

        monkeypatch.setattr("omniopd_trl.cli.train.main", broken)
        with pytest.raises(RuntimeError, match="broken"):
            run(["--config", recipe()])


class TestParsing:
    """`parse_args`: recipes and command lines, in this process."""

    def test_values_arrive(self, recipe):
        """Numbers, texts that are numbers, switches and dictionaries arrive as what they are."""
        path = recipe(similarity="rougeL", model_init_kwargs={"revision": "a"}, prompt_template="math")
        args = [
            "--config=" + path,
            "--beta",
            "0.5",
            "--lora_target_modules",
            "q_proj",
            "v_proj",
            "--no_shuffle_dataset",
        ]
        script_args, training_args, model_args, _ = parse_args(args)
        assert script_args.prompt_template == "math"
        assert training_args.learning_rate == 1e-3
        assert training_args.beta == 0.5
        assert training_args.similarity == "rougeL"
        assert training_args.shuffle_dataset is False
        assert training_args.model_init_kwargs == {"revision": "a"}
        assert model_args.lora_target_modules == ["q_proj", "v_proj"]

    @pytest.mark.parametrize(
        ("args", "message"),
        [
            (["--num_chunk", "5"], "There is no option `num_chunk`.*Did you mean `num_chunks`"),
            (["--num-chunk=5"], "There is no option `num_chunk`"),
            (["--qqqq"], "There is no option `qqqq`.*`--help`"),
            (["--config"], "needs the path of a recipe"),
            (["--config", "nowhere.yaml"], "'nowhere.yaml' cannot be read"),
            (["--output_dir", "out", "--use_cpu", "true", "stray"], "stray"),
        ],
    )
    def test_command_line(self, args, message):
        """Options that do not exist, the abbreviated included, and a recipe that is not there."""
        with pytest.raises(ConfigError, match=message):
            parse_args(args)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"num_chunk": 5}, "There is no option `num_chunk`.*recipe.yaml.*Did you mean `num_chunks`"),
            ({"num_chunks": 2.5}, r"`num_chunks` is 2.5 \(float\).*must be of type int"),
            ({"num_chunks": True}, r"`num_chunks` is True \(bool\)"),
            ({"num_chunks": None}, r"`num_chunks` is None"),
            ({"num_chunks": [5]}, r"`num_chunks` is \[5\] \(list\)"),
            ({"beta": {"value": 1}}, r"`beta` is .*dict"),
            ({"eval_strategy": False}, "`eval_strategy` is False.*bare yes, no, on or off.*quotes"),
            ({"audit_eval": 3}, r"`audit_eval` is 3 \(int\).*bool"),
            ({"run_name": 5}, "`run_name` is 5"),
            ({"lora_target_modules": 5}, "`lora_target_modules` is 5"),
            ({"prior_strength": -1}, "prior_strength=-1"),
            ({"eval_strategy": "sometimes"}, "sometimes"),
        ],
    )
    def test_recipe(self, recipe, changes, message):
        """Keys that do not exist, and values of a type that the option cannot have."""
        with pytest.raises(ConfigError, match=message):
            parse_args(["--config", recipe(**changes)])

    @pytest.mark.parametrize(("text", "message"), [("a: [", "not valid YAML"), ("- a", "must be a YAML mapping")])
    def test_no_recipe(self, tmp_path, text, message):
        """A file that is no YAML, or no mapping."""
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        with pytest.raises(ConfigError, match=message):
            parse_args(["--config", str(path)])

    def test_env(self, recipe, monkeypatch):
        """The `env` of a recipe is set, as TRL does, and is not an option."""
        monkeypatch.setenv("OMNIOPD_TEST_VARIABLE", "before")
        parse_args(["--config", recipe(env={"OMNIOPD_TEST_VARIABLE": "after"})])
        assert os.environ["OMNIOPD_TEST_VARIABLE"] == "after"


class TestMain:
    """What `main` refuses before a model is loaded."""

    @pytest.mark.parametrize(
        ("changes", "error", "message"),
        [
            ({"model_name_or_path": ...}, ConfigError, "No student is named"),
            ({"teacher_model_name_or_path": ...}, ConfigError, "No teacher is named"),
            ({"hub_token": "hf_x"}, ConfigError, "HF_TOKEN"),
            ({"dataset_name": ...}, ConfigError, "No dataset is named"),
            (
                {"teacher_model_name_or_path": "export:x", "evaluate_teacher": True},
                ConfigError,
                "evaluate_teacher=True needs a teacher to ask, and 'export:x' is an export",
            ),
            ({"datasets": [{"path": "x"}]}, ConfigError, "Both `datasets` and `dataset_name`"),
            ({"dataset_name": ..., "datasets": [{"path": "x.jsonl"}]}, DataError, "no dataset file 'x.jsonl'"),
            ({"prompt_template": "maths"}, ConfigError, "`prompt_template` is 'maths'"),
            ({"resume_from_checkpoint": True}, DataError, "'out' holds neither a complete checkpoint nor"),
            ({"dataset_name": "benchmark:math_50"}, ConfigError, "Did you mean `math_500`"),
            ({"dataset_name": "benchmark:math_500", "dataset_streaming": True}, ConfigError, "are not streamed"),
            ({"dataset_train_split": "training"}, DataError, "no split 'training'.*`dataset_train_split`"),
            ({"do_eval": True, "dataset_test_split": "dev"}, DataError, "no split 'dev'.*`dataset_test_split`"),
            ({"dataset_streaming": True, "max_steps": -1}, ConfigError, "Set `max_steps`"),
        ],
    )
    def test_refused(self, recipe, tmp_path, monkeypatch, changes, error, message):
        """Each with its own message."""
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
        monkeypatch.setattr("omniopd_trl.trainer.omniopd_trainer.OmniOPDTrainer", None)
        with pytest.raises(error, match=message):
            main(*parse_args(["--config", recipe(**changes)]))


class TestFromRecipeToTrainer:
    """What `main` hands to the trainer."""

    @pytest.mark.case("A9")
    @pytest.mark.parametrize(
        ("teacher", "changes", "expected"),
        [
            ("vllm:model", {}, None),
            ("anthropic:claude-haiku-4-5", {}, None),
            ("scripted", {}, None),
            ("vllm:model", {"teacher_model_init_kwargs": {"dtype": "float32"}}, {"dtype": "float32"}),
            ("./teacher", {}, {"attn_implementation": "eager"}),
            (
                "./teacher",
                {"teacher_model_init_kwargs": {"attn_implementation": "sdpa"}},
                {"attn_implementation": "sdpa"},
            ),
        ],
    )
    def test_attention_of_the_teacher(self, recipe, tmp_path, monkeypatch, teacher, changes, expected):
        """The student's implementation is that of a local teacher. Other teachers get no option that nobody set."""
        built = []

        def build(**kwargs):
            built.append(kwargs["args"])
            raise InterruptedError

        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
        monkeypatch.setattr("omniopd_trl.trainer.omniopd_trainer.OmniOPDTrainer", build)
        path = recipe(teacher_model_name_or_path=teacher, attn_implementation="eager", **changes)
        with pytest.raises(InterruptedError):
            main(*parse_args(["--config", path]))
        assert built[0].teacher_model_init_kwargs == expected
        assert built[0].model_init_kwargs["attn_implementation"] == "eager"

    @pytest.mark.parametrize(
        ("changes", "trains"),
        [({}, False), ({"audit_trajectories": "wrong"}, True), ({"reward_weight": 0.5, "num_generations": 2}, True)],
    )
    def test_rewards_train_only_if_the_recipe_says_so(self, recipe, tmp_path, monkeypatch, changes, trains):
        """`reward_funcs` alone scores the evaluation, as before there was a verifier."""
        built = []

        def build(**kwargs):
            built.append(kwargs)
            raise InterruptedError

        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
        monkeypatch.setattr("omniopd_trl.trainer.omniopd_trainer.OmniOPDTrainer", build)
        path = recipe(reward_funcs=["omniopd_trl.evals.math.math_accuracy"], reward_weights=[2.0], **changes)
        with pytest.raises(InterruptedError):
            main(*parse_args(["--config", path]))
        assert built[0]["eval_reward_funcs"] == [math_accuracy]
        assert built[0]["reward_funcs"] == ([math_accuracy] if trains else None)
        assert built[0]["args"].reward_weights == [2.0]


class TestResolveCheckpoint:
    """`resume_from_checkpoint`, as YAML and the command line give it."""

    def test_last(self, tmp_path):
        """`true`, in both spellings, is the last checkpoint by number."""
        for step in (2, 10):
            (tmp_path / f"checkpoint-{step}").mkdir()
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
        for value in (True, "true", "True"):
            assert resolve_checkpoint(value, str(tmp_path)) == str(tmp_path / "checkpoint-10")
        assert resolve_checkpoint(str(tmp_path / "checkpoint-2"), "elsewhere") == str(tmp_path / "checkpoint-2")

    @pytest.mark.parametrize("state", [None, "", '{"global_step": 4'])
    def test_cut_off(self, tmp_path, state):
        """A run that was killed while it saved resumes from the checkpoint before; without one, from step 0."""
        (tmp_path / "checkpoint-4").mkdir()
        (tmp_path / "checkpoint-4" / "model.safetensors").touch()
        if state is not None:
            (tmp_path / "checkpoint-4" / "trainer_state.json").write_text(state)
        with pytest.raises(DataError, match="neither a complete checkpoint nor a journal"):
            resolve_checkpoint("true", str(tmp_path))
        (tmp_path / "_audits").mkdir()
        (tmp_path / "_audits" / "rank-0.sqlite").touch()
        assert resolve_checkpoint("true", str(tmp_path)) is True
        (tmp_path / "checkpoint-2").mkdir()
        (tmp_path / "checkpoint-2" / "trainer_state.json").write_text("{}")
        assert resolve_checkpoint("true", str(tmp_path)) == str(tmp_path / "checkpoint-2")

    def test_none(self, tmp_path):
        """Nothing and `false` start from the beginning."""
        for value in (None, False, "false", "none", ""):
            assert resolve_checkpoint(value, str(tmp_path)) is False

    def test_missing(self, tmp_path):
        """A checkpoint that is not there is an error, not a new run."""
        with pytest.raises(DataError, match="neither a complete checkpoint nor a journal"):
            resolve_checkpoint("true", str(tmp_path))
        with pytest.raises(DataError, match="no such folder"):
            resolve_checkpoint("checkpoint-7", str(tmp_path))
        with pytest.raises(DataError, match=r"which holds no complete checkpoint\. Give the path of a checkpoint-N"):
            resolve_checkpoint(str(tmp_path), str(tmp_path))


class TestSummarize:
    """The table at the end."""

    def test_before_and_after(self):
        """The first evaluation is `before` only if it was at step 0; the last is `after` only if it was not."""
        start, middle, end = ({"step": step, "eval_pass@1": step / 10} for step in (0, 4, 8))
        usage = SimpleNamespace(prompt_tokens=1234567, completion_tokens=89)
        text = summarize(
            [{"step": 1, "loss": 1.0}, start, middle, end],
            seconds=123.4,
            usage=usage,
            teacher={"pass@1": 0.95},
            saved_to="out",
        )
        assert text.splitlines() == [
            "student before, pass@1  0.000",
            "student after, pass@1   0.800 (step 8)",
            "teacher, pass@1         0.950",
            "reading of answers      strict",
            "wall time of training   2 min 3 s",
            "teacher tokens          1,234,567 read, 89 written",
            "model saved to          out",
        ]
        assert "before" not in summarize([middle, end], seconds=1, saved_to="out")
        assert "after" not in summarize([start], seconds=1, saved_to="out")

    def test_several_scores(self):
        """Those of each reward function, or of each evaluation set."""
        log = [{"step": step, "eval_pass@1/a": step / 8, "eval_hard_pass@1": 0.0} for step in (0, 2)]
        lines = summarize(log, seconds=1, teacher={"pass@1/a": 1.0, "length": 3.0}, saved_to="out").splitlines()
        assert [" ".join(line.split()) for line in lines[:5]] == [
            "student before, pass@1/a 0.000",
            "student after, pass@1/a 0.250 (step 2)",
            "student before, hard pass@1 0.000",
            "student after, hard pass@1 0.000 (step 2)",
            "teacher, pass@1/a 1.000",
        ]
        assert "not measured" not in "".join(lines)
        assert "length" not in "".join(lines)

    @pytest.mark.case("U6", "R21")
    @pytest.mark.parametrize(
        ("dollars", "row"),
        [
            ((0.1234, 0.1234), "teacher cost             $0.1234"),
            ((0.5, 12.25), "teacher cost             $0.5000, $12.2500 with earlier runs"),
            ((0.0, 0.0), "teacher cost             $0.0000"),
        ],
    )
    def test_dollars_and_reading(self, dollars, row):
        """What the teacher has cost, and how answers were read."""
        end = {"step": 8, "eval_pass@1": 0.8}
        lines = summarize([end], seconds=1, dollars=dollars, lenient=True, saved_to="out").splitlines()
        assert [" ".join(row.split())] == [" ".join(line.split()) for line in lines if "cost" in line]
        assert any(re.fullmatch("reading of answers +lenient", line) for line in lines)
        assert "cost" not in summarize([end], seconds=1, saved_to="out")

    def test_nothing_measured(self):
        """Without a score it says why there is none."""
        text = summarize([{"step": 1, "eval_loss": 1.0, "eval_pass@1": None}], seconds=1, saved_to="out")
        assert "not measured: it needs an evaluation set with a `solution` or `answer` column" in text
        text = summarize([{"step": 1, "loss": 1.0}], seconds=1, evaluates=False, saved_to="out")
        assert "not measured: the run evaluates nothing. Set `do_eval: true`" in text
