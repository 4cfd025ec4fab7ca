# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Launching: `omniopd train` with real processes, accelerate's configurations by name, and processes that get lost."""

import os
import re
import signal
import subprocess
import sys
import time
import tomllib
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import yaml

from omniopd_trl.cli import launch, recipes
from omniopd_trl.cli.main import main
from omniopd_trl.errors import ConfigError, MissingExtraError
from omniopd_trl.trainer import distributed
from omniopd_trl.trainer.distributed import Started, lost_processes
from tests.support import ROOT
from tests.support.commands import ENVIRONMENT, run_process, succeeded

NAMES = ["cpu_2", "fsdp2", "multi_gpu", "single_gpu", "zero2", "zero3"]
LAUNCHERS = ("simple_launcher", "multi_gpu_launcher", "deepspeed_launcher")


def omniopd(*args, cwd, env=None):
    """`omniopd ...`, in a process of its own."""
    return run_process(sys.executable, "-m", "omniopd_trl.cli.main", *args, cwd=cwd, env=env)


@pytest.fixture
def launched(monkeypatch):
    """What would have been launched: accelerate's launchers note the command line instead of starting anything."""
    calls = []

    def noting(name):
        return lambda args: calls.append(SimpleNamespace(by=name, **vars(args)))

    for name in LAUNCHERS:
        monkeypatch.setattr(f"accelerate.commands.launch.{name}", noting(name))
    # A configuration of the developer must not count.
    monkeypatch.setattr("accelerate.commands.launch.default_config_file", "/nowhere/default_config.yaml")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return calls


@pytest.fixture
def four_gpus(monkeypatch):
    """A machine with four GPUs and DeepSpeed, as far as the launch can see."""
    monkeypatch.setattr("torch.accelerator.device_count", lambda: 4)
    monkeypatch.setattr(launch, "import_extra", lambda module, extra: None)


@pytest.fixture
def script(tmp_path, monkeypatch):
    """A function that puts a few lines in the place of the training, which takes seconds to import."""

    def write(source):
        (tmp_path / "stand_in.py").write_text(source)
        monkeypatch.setattr(launch, "MODULE", "stand_in")
        monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")
        monkeypatch.chdir(tmp_path)

    return write


class TestProcesses:
    """Real runs."""

    def test_cpu_2(self, recipe, tmp_path):
        """`--accelerate_config cpu_2` trains with two processes, on the CPU even where the recipe does not say so."""
        process = succeeded(
            omniopd("train", "--accelerate_config", "cpu_2", "--config", recipe(use_cpu=...), cwd=tmp_path)
        )
        # Two steps of 2 processes x 2 prompts x 2 micro-batches continuece through the sixteen prompts.
        assert re.findall(r"\(epoch ([\d.]+)\)", process.stdout) == ["0.5", "1"]
        assert process.stdout.count("model saved to") == 1
        assert (tmp_path / "out" / "model.safetensors").exists()
        assert "This run trains alone" not in process.stderr

    def test_failure(self, recipe, tmp_path):
        """What the training refuses is its own line and its own exit code, without a traceback of the launcher."""
        path = recipe(dataset_train_split="none")
        process = omniopd("train", "--accelerate_config", "cpu_2", "--config", path, cwd=tmp_path)
        assert process.returncode == 1
        # Of the second process if that is faster: the launcher ends the first one then, maybe before it has spoken.
        problem = r"^(\[rank 1\] )?DataError: The dataset has no split 'none'"
        assert re.search(problem, process.stderr, re.MULTILINE)
        assert "Traceback" not in process.stderr
        assert "ChildFailedError" not in process.stderr

    def test_one_line(self, recipe, tmp_path):
        """An error is one line, the last one, and no notice of accelerate's stands before it."""
        process = omniopd("train", "--config", recipe(dataset_train_split="none"), cwd=tmp_path)
        assert process.returncode == 1
        assert process.stderr.splitlines()[-1].startswith("DataError: The dataset has no split 'none'")
        assert "accelerate" not in process.stderr
        assert "Traceback" not in process.stderr

    @pytest.mark.case("U10")
    @pytest.mark.parametrize(
        ("options", "to_all"),
        [([], True), ([], False), (["--accelerate_config", "cpu_2"], True)],
        ids=["terminal", "kill", "cpu_2"],
    )
    def test_control_c(self, recipe, tmp_path, options, to_all):
        """From the terminal, which signals all processes, or to the command alone: one line says how to continue."""
        path = recipe(max_steps=100_000, num_train_epochs=1, save_strategy="steps", save_steps=1, save_total_limit=2)
        command = [sys.executable, "-m", "omniopd_trl.cli.main", "train", "--config", path, *options]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        process = subprocess.Popen(command, cwd=tmp_path, env=ENVIRONMENT, start_new_session=True, **pipes)
        try:
            deadline = time.monotonic() + 120
            while not list(tmp_path.glob("out/checkpoint-*/trainer_state.json")) and time.monotonic() < deadline:
                time.sleep(0.05)
            (os.killpg if to_all else os.kill)(process.pid, signal.SIGINT)
            _, errors = process.communicate(timeout=60)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        assert process.returncode == 128 + signal.SIGINT, errors
        (line,) = re.findall(r"^Interrupted .*$", errors, re.MULTILINE)
        assert re.fullmatch(
            r"Interrupted at step \d+. The last checkpoint is out/checkpoint-\d+. Resume with "
            r"--resume_from_checkpoint true; what the journal holds is replayed, and not paid for again.",
            line,
        )
        assert "Traceback" not in errors
        assert (tmp_path / re.search(r"out/checkpoint-\d+", line)[0] / "trainer_state.json").exists()

    def test_lost_process(self, recipe, tmp_path):
        """`accelerate launch --cpu --num_processes 2` starts one process, and the run says so and continues."""
        command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", 2]
        command += ["-m", "omniopd_trl.train", "--config", recipe(max_steps=1)]
        process = succeeded(run_process(*command, cwd=tmp_path))
        assert process.stderr.count("`accelerate launch` was asked for 2 processes and has started one") == 1
        assert "omniopd train --accelerate_config cpu_2" in process.stderr
        # It is true: one process has trained with 2 prompts x 2 micro-batches of the sixteen.
        assert re.findall(r"\(epoch ([\d.]+)\)", process.stdout) == ["0.25"]


class TestExitCode:
    """The exit code of the command is that of the training."""

    @pytest.mark.parametrize("options", [[], ["--accelerate_config", "cpu_2"], ["--quiet"]], ids=str)
    def test_code(self, script, options):
        """Whatever launches it, and although accelerate reports every failure as 1."""
        script("import sys; sys.exit(7)")
        assert main(["train", "--output_dir", "out", *options]) == 7

    def test_signal(self, script):
        """A process that was killed counts as in a shell."""
        script("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
        assert main(["train", "--output_dir", "out"]) == 128 + signal.SIGKILL

    def test_success(self, script):
        """Zero is success."""
        script("import sys; assert sys.argv[1:] == ['--output_dir', 'out'], sys.argv")
        assert main(["train", "--output_dir", "out"]) == 0

    def test_terminated(self, script):
        """Ending the command ends the training, and neither trains on alone."""
        script("import os, time; open('ready', 'w').write(str(os.getpid())); time.sleep(60); open('late', 'w')")
        command = (
            "import sys; from omniopd_trl.cli import launch, main; launch.MODULE = 'stand_in'; sys.exit(main.main())"
        )
        process = subprocess.Popen([sys.executable, "-c", command, "train", "--output_dir", "out"])
        try:
            deadline = time.monotonic() + 60
            while not (os.path.exists("ready") and Path("ready").read_text()) and time.monotonic() < deadline:
                time.sleep(0.1)
            process.terminate()
            assert process.wait(30) == 128 + signal.SIGTERM
        finally:
            process.kill()
        assert not psutil.pid_exists(int(Path("ready").read_text()))

    def test_interrupt(self, launched, monkeypatch):
        """Control-C ends without a traceback."""

        def interrupted(args):
            raise KeyboardInterrupt

        monkeypatch.setattr("accelerate.commands.launch.simple_launcher", interrupted)
        assert main(["train", "--output_dir", "out"]) == 128 + signal.SIGINT


class TestConfigs:
    """recipes/accelerate_configs."""

    def test_names(self):
        """The names that the pages promise, found in the clone, and each says in its first line what it is for."""
        assert list(launch.config_files()) == NAMES
        for path in launch.config_files().values():
            assert path.parent == ROOT / "recipes" / "accelerate_configs"
            assert re.match(r"# \w.+\.\n", path.read_text()), path

    def test_installed(self, tmp_path, monkeypatch):
        """A wheel holds them where an installed package looks first."""
        targets = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]
        target = targets["wheel"]["force-include"]["recipes"]
        assert recipes._FOLDERS[0] == Path(recipes.__file__).parents[2] / target
        (tmp_path / "accelerate_configs").mkdir()
        (tmp_path / "accelerate_configs" / "zero3.yaml").write_text("# Installed.\n")
        monkeypatch.setattr(launch, "FOLDER", tmp_path)
        assert launch.config_files() == {"zero3": tmp_path / "accelerate_configs" / "zero3.yaml"}

    @pytest.mark.parametrize(
        ("name", "launcher", "processes"),
        [
            ("single_gpu", "simple_launcher", 1),
            ("multi_gpu", "multi_gpu_launcher", 4),
            ("zero2", "deepspeed_launcher", 4),
            ("zero3", "deepspeed_launcher", 4),
            ("fsdp2", "multi_gpu_launcher", 4),
            ("cpu_2", "multi_gpu_launcher", 2),
        ],
    )
    @pytest.mark.usefixtures("four_gpus")
    def test_launched(self, recipe, launched, name, launcher, processes):
        """Each is read by accelerate, and starts one process per GPU unless it says how many."""
        assert main(["train", "--accelerate_config", name, "--config", recipe()]) == 0
        (call,) = launched
        assert call.by == launcher
        assert call.num_processes == processes
        assert (call.module, call.training_script) == (True, "omniopd_trl.train")
        # The recipe decides; accelerate's `bf16` would switch it on where a recipe switches it off.
        assert call.mixed_precision == "no"
        # Left to the recipe: a value here could contradict it.
        assert call.gradient_accumulation_steps is None
        assert call.gradient_clipping is None

    def test_sharded_models_are_saved_whole(self):
        """What the training processes see of zero3 and fsdp2."""
        from accelerate.commands.launch import _validate_launch_command, launch_command_parser
        from accelerate.utils import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

        def environment_of(name, prepare):
            words = ["--config_file", str(launch.resolve_config(name)), "--num_processes", "2", "-m", "x"]
            args, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
            args.deepspeed_fields_from_accelerate_config = ""
            args.main_process_port = 0
            result = prepare(args)
            return result[1] if isinstance(result, tuple) else result

        zero3 = environment_of("zero3", prepare_deepspeed_cmd_env)
        assert zero3["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == "3"
        assert zero3["ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL"] == "true"
        fsdp2 = environment_of("fsdp2", prepare_multi_gpu_env)
        assert fsdp2["FSDP_VERSION"] == "2"
        assert fsdp2["FSDP_STATE_DICT_TYPE"] == "FULL_STATE_DICT"
        assert fsdp2["FSDP_RESHARD_AFTER_FORWARD"] == "true"

    @pytest.mark.usefixtures("four_gpus")
    def test_processes_on_several_machines(self, recipe, launched):
        """`num_processes` counts those of all machines."""
        options = ["--num_machines", "2", "--main_process_ip", "10.0.0.1", "--main_process_port", "29500"]
        assert main(["train", "--accelerate_config", "zero2", "--config", recipe(), *options]) == 0
        assert launched[0].num_processes == 8

    def test_no_gpu(self, recipe, launched, monkeypatch):
        """A configuration for GPUs says so where there are none, unless the number of processes is given."""
        monkeypatch.setattr("torch.accelerator.device_count", lambda: 0)
        with pytest.raises(ConfigError, match=r"'multi_gpu'.*this machine has none.*cpu_2"):
            launch.train(["--accelerate_config", "multi_gpu", "--config", recipe()])
        assert launch.train(["--accelerate_config", "multi_gpu", "--num_processes=3", "--config", recipe()]) == 0
        assert launched[0].num_processes == 3

    def test_missing_deepspeed(self, recipe, launched, monkeypatch):
        """Without DeepSpeed the message holds the pip command."""
        monkeypatch.setitem(sys.modules, "deepspeed", None)
        with pytest.raises(MissingExtraError, match=r"pip install -e '\.\[deepspeed\]'"):
            launch.train(["--accelerate_config", "zero3", "--num_processes", "2", "--config", recipe()])
        assert not launched

    @pytest.mark.parametrize(
        ("visible", "options", "expected"),
        [(None, [], "0"), ("3,5", [], "3"), ("", [], ""), ("3,5", ["--gpu_ids", "5"], "5")],
    )
    def test_visible_gpus(self, recipe, launched, monkeypatch, visible, options, expected):
        """`single_gpu` takes the first of the GPUs that CUDA_VISIBLE_DEVICES shows, and not the machine's first."""
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert launch.train(["--accelerate_config", "single_gpu", "--config", recipe(), *options]) == 0
        assert launched[0].gpu_ids == expected

    def test_use_cpu(self, recipe, launched):
        """A configuration for the CPU puts the training there; what the command line says still wins."""
        path = recipe(use_cpu=...)
        assert launch.train(["--accelerate_config", "cpu_2", "--config", path]) == 0
        assert launch.train(["--accelerate_config", "cpu_2", "--config", path, "--use-cpu", "false"]) == 0
        assert [call.training_script_args for call in launched] == [
            ["--config", path, "--use_cpu", "true"],
            ["--config", path, "--use-cpu", "false"],
        ]

    @pytest.mark.parametrize(("cores", "threads"), [(8, 4), (2, 1)])
    @pytest.mark.parametrize("options", [[], ["--accelerate_config", "cpu_2"]], ids=str)
    def test_nothing_is_left_to_accelerate(self, recipe, launched, monkeypatch, caplog, cores, threads, options):
        """What it would choose, and list on the terminal, is given to it: the same values, without the list."""
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        monkeypatch.setattr("psutil.cpu_count", lambda logical=True: cores)
        monkeypatch.setattr("accelerate.commands.launch.logger.propagate", True, raising=False)
        assert launch.train(["--config", recipe(), *options]) == 0
        assert "were not passed to `accelerate launch`" not in caplog.text
        (call,) = launched
        assert (call.num_machines, call.mixed_precision, call.dynamo_backend) == (1, "no", "no")
        assert call.num_cpu_threads_per_process == (threads if options else 1)

    def test_several_gpus(self, recipe, launched, four_gpus, caplog):
        """Without a configuration there is one process per GPU, as with accelerate's own defaults."""
        assert launch.train(["--config", recipe()]) == 0
        assert launch.train(["--config", recipe(), "--num_processes", "1"]) == 0
        assert [(call.by, call.num_processes) for call in launched] == [
            ("multi_gpu_launcher", 4),
            ("simple_launcher", 1),
        ]

    def test_path(self, recipe, launched, tmp_path):
        """A custom file works as well as a name."""
        path = tmp_path / "mine.yaml"
        path.write_text(yaml.safe_dump({"distributed_type": "MULTI_CPU", "num_processes": 2, "main_process_port": 1}))
        assert launch.train(["--accelerate_config", str(path), "--config", recipe()]) == 0
        assert (launched[0].by, launched[0].num_processes) == ("simple_launcher", 2)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("distributed_type: MULTI_GPU\nnum_procesess: 2\n", "num_procesess"),
            ("num_processes: 2\n", "distributed_type"),
            ("distributed_type: [\n", "accelerate cannot use"),
            ("- a\n", "accelerate cannot use"),
        ],
    )
    def test_unusable_file(self, recipe, launched, tmp_path, text, message):
        """A file that accelerate cannot read is refused in one line."""
        path = tmp_path / "mine.yaml"
        path.write_text(text)
        with pytest.raises(ConfigError, match=message):
            launch.train(["--accelerate_config", str(path), "--config", recipe()])
        assert not launched


class TestArguments:
    """Options of accelerate and of the recipe on one command line."""

    def test_told_apart(self, recipe, launched):
        """Each goes where it belongs, in either spelling and any order; a name that both know is the recipe's."""
        path = recipe()
        words = ["--num-processes", "2", "--max_steps", "-1", f"--config={path}", "--main_process_port=0"]
        words += ["--lora_target_modules", "q_proj", "v_proj", "--gradient_accumulation_steps", "4", "--multi_gpu"]
        assert launch.train([*words, "--no_shuffle_dataset"]) == 0
        (call,) = launched
        assert (call.by, call.num_processes, call.main_process_port) == ("multi_gpu_launcher", 2, 0)
        assert call.gradient_accumulation_steps is None
        assert call.training_script_args == [
            *("--max_steps", "-1", "--config", path, "--lora_target_modules", "q_proj", "v_proj"),
            *("--gradient_accumulation_steps", "4", "--no_shuffle_dataset"),
        ]

    def test_default(self, recipe, launched):
        """Without options of its own it launches what `accelerate launch -m omniopd_trl.train` does."""
        from accelerate.commands.launch import launch_command, launch_command_parser

        path = recipe()
        assert launch.train(["--config", path]) == 0
        launch_command(launch_command_parser().parse_args(["-m", "omniopd_trl.train", "--config", path]))
        assert launched[0] == launched[1]

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["--num_proceses", "2"], "There is no option `num_proceses`.*Did you mean `num_processes`"),
            (["--num_chunk", "5"], "There is no option `num_chunk`.*Did you mean `num_chunks`"),
            (["--accelerate_confg", "zero3"], "Did you mean `accelerate_config`"),
            (["--accelerate_config", "zero33"], "'zero33'.*neither a file nor one of cpu_2.*Did you mean `zero3`"),
            (["--accelerate_config", "qqqq"], "neither a file nor one of .*path of a file"),
            (["--accelerate_config"], "`--accelerate_config` needs a value"),
            (["--num_processes"], "`--num_processes` needs a value"),
            (["--config_file", "zero3.yaml"], "`--accelerate_config`"),
            (["--module"], "script of your own"),
            (["stray"], "`stray` belongs to no option"),
            (["--no_max_steps"], "`--no_max_steps` belongs to no option"),
            (["--config", "nowhere.yaml"], "'nowhere.yaml' cannot be read"),
            (["--config", "elsewhere/demo.yaml"], "`omniopd recipes demo` copies"),
            (["--num_processes", "0"], "`--num_processes` is 0; it must be at least 1"),
            (["--num_machines", "-1"], "`--num_machines` is -1; it must be at least 1"),
            (["--cpu", "--multi_gpu"], "accelerate cannot launch this: You can only use one of"),
        ],
    )
    def test_refused(self, launched, words, message):
        """Before anything is launched."""
        with pytest.raises(ConfigError, match=message):
            launch.train(["--output_dir", "out", *words])
        assert not launched

    def test_recipe_is_checked(self, recipe, launched):
        """So are the recipe's names and types."""
        with pytest.raises(ConfigError, match="Did you mean `num_chunks`"):
            launch.train(["--config", recipe(num_chunk=5)])
        assert not launched

    @pytest.mark.parametrize("words", [["--num_processes", "two"], ["--num_chunks", "ten"]])
    def test_argparse(self, launched, words, capsys):
        """A value of the wrong type: argparse's own exit, with a usage line that fits on the screen."""
        with pytest.raises(SystemExit) as exit_info:
            launch.train(["--output_dir", "out", *words])
        assert exit_info.value.code == 2
        usage, error = capsys.readouterr().err.splitlines()[-2:]
        assert usage == "usage: omniopd train --config RECIPE.yaml [--OPTION VALUE ...]"
        assert f"invalid int value: '{words[1]}'" in error
        assert not launched

    def test_text_in_the_recipe(self, recipe, launched):
        """A text in a recipe that is no number is refused as early as one on the command line."""
        with pytest.raises(ConfigError, match=r"`num_chunks` is 'ten' \(str\).*must be of type int"):
            launch.train(["--config", recipe(num_chunks="ten")])
        assert not launched

    def test_help(self, capsys):
        """The help says what there is, and loads nothing heavy for it; nothing at all is answered by it, too."""
        code = "import sys; from omniopd_trl.cli.main import main; c = main(sys.argv[1:])\n"
        code += "assert not {'torch', 'trl', 'accelerate'} & set(sys.modules); sys.exit(c)"
        process = subprocess.run([sys.executable, "-c", code, "train", "--help"], capture_output=True, text=True)
        assert process.returncode == 0, process.stderr
        for name in (*NAMES, "--accelerate_config", "--num_processes", "--config"):
            assert name in process.stdout
        assert max(map(len, process.stdout.splitlines())) <= 119
        assert main(["train"]) == 2
        assert "usage: omniopd train" in capsys.readouterr().out
        with pytest.raises(SystemExit):
            main(["--help"])
        assert re.search(r"^ +train ", capsys.readouterr().out, re.MULTILINE)


# What accelerate's launcher of one process sets, and what it adds when more were asked for.
ONE = {"ACCELERATE_USE_CPU": "True", "ACCELERATE_DYNAMO_MODE": "default"}
MEETING_POINT = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
PYTHON = Started({}, ["python", "train.py"])


class TestLostProcesses:
    """`lost_processes`: what the way a process was started says."""

    @pytest.mark.parametrize(
        ("environment", "launcher", "expected"),
        [
            # As accelerate starts them.
            (ONE, Started({}, ["accelerate", "launch", "--cpu", "train.py"]), None),
            ({**ONE, **MEETING_POINT}, Started({}, ["accelerate", "launch", "--num_processes", "2"]), "2 processes"),
            ({**ONE, **MEETING_POINT}, Started({}, ["accelerate", "launch", "--num-processes=3"]), "3 processes"),
            ({**ONE, **MEETING_POINT}, Started({}, ["accelerate", "launch", "train.py"]), "more than one process"),
            # A meeting point that was there before says nothing by itself.
            ({**ONE, **MEETING_POINT}, Started(MEETING_POINT, ["accelerate", "launch", "--cpu"]), None),
            ({**ONE, **MEETING_POINT}, Started(MEETING_POINT, ["x", "--num_processes", "1"]), None),
            ({**ONE, **MEETING_POINT}, Started(MEETING_POINT, ["x", "--num_processes", "2"]), "2 processes"),
            # Other ways to start one process.
            ({}, Started({}, ["bash"]), None),
            (MEETING_POINT, Started({}, ["bash", "--num_processes", "2"]), None),
            # torchrun, whose processes do not find each other.
            ({"WORLD_SIZE": "2", "LOCAL_RANK": "0"}, Started({}, ["torchrun"]), "2 processes were started"),
            ({"WORLD_SIZE": "1", "LOCAL_RANK": "0"}, Started({}, ["torchrun"]), None),
        ],
    )
    def test_cases(self, environment, launcher, expected):
        """Each with a launcher right above it, and with a wrapper in between."""
        started = Started(environment, ["python", "train.py"])
        for lineage in ([started, launcher, PYTHON], [started, Started(environment, ["sh"]), launcher]):
            message = lost_processes(iter(lineage))
            assert message is None if expected is None else expected in message

    def test_no_launcher(self):
        """A launcher that has ended, or that cannot be seen, leaves it unsaid."""
        assert lost_processes(iter([Started({**ONE, **MEETING_POINT}, [])])) is None

    def test_this_process(self):
        """The lineage of this process is what started it: its own variables and command line first."""
        own = next(distributed.lineage())
        assert "PATH" in own.environment
        assert any("python" in word for word in own.command)

    def test_never_fails(self, monkeypatch, caplog):
        """A system that does not show how processes were started changes nothing."""

        def denied():
            raise PermissionError

        monkeypatch.setattr(distributed, "lineage", denied)
        distributed.warn_about_lost_processes.cache_clear()
        distributed.warn_about_lost_processes(1)
        assert not caplog.records

    def test_warns_once(self, monkeypatch, caplog):
        """Once per process, and not at all where processes train together."""
        started = [Started({"WORLD_SIZE": "2"}, [])]
        monkeypatch.setattr(distributed, "lineage", lambda: iter(started))
        distributed.warn_about_lost_processes.cache_clear()
        distributed.warn_about_lost_processes(2)
        assert not caplog.records
        distributed.warn_about_lost_processes(1)
        distributed.warn_about_lost_processes(1)
        assert len(caplog.records) == 1
        distributed.warn_about_lost_processes.cache_clear()
