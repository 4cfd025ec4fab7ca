# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""What ships with the package, as commands show it: recipes, the demo, the help; and an installed wheel."""

import logging
import os
import re
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import pytest
import yaml

import omniopd_trl
from omniopd_trl.cli import noise, train
from omniopd_trl.cli.main import main
from omniopd_trl.cli.recipe import make_parser, option_groups
from omniopd_trl.cli.recipes import FOLDER, recipe_files
from omniopd_trl.trainer.omniopd_config import OmniOPDConfig
from tests.support import ROOT


class TestRecipes:
    """`omniopd recipes`."""

    def test_list(self, capsys):
        """One line each, with what the file says of itself."""
        assert main(["recipes"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert [line.split()[0] for line in lines[:-2]] == sorted(path.stem for path in FOLDER.glob("*.yaml"))
        (demo,) = [line for line in lines if line.startswith("demo ")]
        assert demo.endswith("The demo: a small student learns from a teacher's text not to forget carries.")

    @pytest.mark.parametrize("name", ["demo", "demo.yaml"])
    def test_copy(self, tmp_path, monkeypatch, capsys, name):
        """A copy is the file itself, and replaces nothing."""
        monkeypatch.chdir(tmp_path)
        assert main(["recipes", name]) == 0
        copy = tmp_path / "demo.yaml"
        assert copy.read_bytes() == recipe_files()["demo"].read_bytes()
        copy.write_text("mine")
        assert main(["recipes", name]) == 2
        assert "There is a file demo.yaml in the current folder" in capsys.readouterr().err
        assert copy.read_text() == "mine"

    def test_unknown(self, capsys):
        """A name that is none, and an option that is none."""
        assert main(["recipes", "dmeo"]) == 2
        assert "There is no recipe 'dmeo'. Did you mean `demo`?" in capsys.readouterr().err
        assert main(["recipes", "xyz"]) == 2
        assert "There are code_qwen3_1.7b_from_qwen3_32b, " in capsys.readouterr().err
        assert main(["recipes", "--all"]) == 2
        assert "There is no option `all`" in capsys.readouterr().err


class TestDemo:
    """`omniopd demo`."""

    def test_arguments(self, monkeypatch, capsys):
        """It runs the recipe that ships, with the options that are given, and returns the exit code of the run."""
        calls = []
        monkeypatch.setattr(train, "run", lambda *given: calls.append(given) or 7)
        assert main(["demo", "--seed", "1"]) == 7
        assert calls == [(["--config", str(recipe_files()["demo"]), "--seed", "1"], "omniopd demo")]
        assert capsys.readouterr().out.startswith("Training the student of the demo on the CPU")

    @pytest.mark.case("U9")
    def test_runs_in_any_folder(self):
        """The recipe names nothing by a path of the clone, and writes into the current folder."""
        recipe = yaml.safe_load(recipe_files()["demo"].read_text())
        names = ("model_name_or_path", "teacher_model_name_or_path", "dataset_name")
        assert [recipe[name] for name in names] == ["demo:student", "demo:teacher", "demo:problems"]
        assert recipe["output_dir"] == "runs/demo"
        assert recipe["env"] == {"OMP_NUM_THREADS": "1"}


@pytest.mark.case("U9")
def test_version(capsys):
    """`omniopd --version`."""
    with pytest.raises(SystemExit) as exit_info:
        main(["--version"])
    assert exit_info.value.code == 0
    assert capsys.readouterr().out == f"omniopd_trl {omniopd_trl.__version__}\n"


class TestHelp:
    """`python -m omniopd_trl.train --help`."""

    def test_ours_first(self):
        """The options of this package come first, by what they control; then those of TRL and transformers."""
        titles = re.findall(r"^(\w.*):$", make_parser().format_help(), re.MULTILINE)
        ours = ["Student, teacher and data", "Method and baselines", "Parameters that control the audits"]
        assert titles[:4] == ["options", *ours]
        first_inherited = next(i for i, title in enumerate(titles) if title.startswith("Inherited from"))
        assert all(title.startswith("Inherited from ") for title in titles[first_inherited:])
        assert titles[first_inherited] == "Inherited from trl: DistillationConfig"

    def test_every_option_once(self):
        """No option is lost or shown twice, and each of this package's is in a group of its own."""
        parser = make_parser()
        shown = [id(action) for group in parser._action_groups for action in group._group_actions]
        assert sorted(shown) == sorted(map(id, parser._actions))
        assert [action.dest for action in parser._optionals._group_actions] == ["help"]
        groups = option_groups()
        ours = {name for title, names in groups.items() if not title.startswith("Inherited") for name in names}
        own = {name for name in OmniOPDConfig.__annotations__ if not name.startswith("_")}
        assert {*own, "prompt_template", "evaluate_teacher"} <= ours


GRADIENT_CHECKPOINTING = "`{}` is deprecated and will be removed in v6. Use `activation_checkpointing` instead."


class TestNoise:
    """Messages of other packages that say nothing here."""

    @pytest.fixture(autouse=True)
    def restored(self, monkeypatch):
        """Filters are left as they were."""
        monkeypatch.setenv("TQDM_DELAY", "0")
        monkeypatch.delenv("OMNIOPD_VERBOSE", raising=False)
        loggers = [logging.getLogger(name) for name in noise._MESSAGES]
        before = [list(logger.filters) for logger in loggers]
        for logger in loggers:
            logger.filters.clear()
        with warnings.catch_warnings():
            yield
        for logger, filters in zip(loggers, before, strict=True):
            logger.filters[:] = filters

    @staticmethod
    def shown():
        """Which of the messages are shown, and how many others of the same places."""
        with warnings.catch_warnings(record=True) as caught:
            for name in ("gradient_checkpointing", "is_gradient_checkpointing", "gradient_checkpointing_enable"):
                warnings.warn_explicit(GRADIENT_CHECKPOINTING.format(name), FutureWarning, "x.py", 1, registry={})
            warnings.warn_explicit("`other` is deprecated and will be removed in v6.", FutureWarning, "x.py", 1)
        records = [
            logging.getLogger(name).filter(logging.LogRecord(name, 30, "x.py", 1, text, None, None))
            for name, text in (
                ("bitsandbytes.backends.cpu.ops", "Failed to load CPU gemm_4bit_forward from kernels-community: x"),
                ("transformers.trainer_utils", "The tokenizer has new PAD/BOS/EOS tokens that differ from the model"),
                ("DeepSpeed", "Setting accelerator to CPU. If you have GPU or other accelerator"),
            )
        ]
        others = [
            logging.getLogger(name).filter(logging.LogRecord(name, 30, "x.py", 1, "Something else", None, None))
            for name in noise._MESSAGES
        ]
        assert all(others)
        return len(caught), sum(map(bool, records))

    @pytest.mark.case("U9")
    def test_left_out(self):
        """Those messages, and no other of the same loggers and of the same kind; filters are added once."""
        warnings.simplefilter("always")
        assert self.shown() == (4, 3)
        for _ in range(2):
            noise.filter_noise([], {})
        assert self.shown() == (1, 0)
        assert [len(logging.getLogger(name).filters) for name in noise._MESSAGES] == [1, 1, 1]

    def test_quantized(self):
        """A quantized student is slower without that kernel, which is said."""
        noise.filter_noise(["--load_in_4bit", "true"], {})
        assert self.shown()[1] == 1

    @pytest.mark.parametrize(("words", "variable"), [(["--log_level", "debug"], "0"), ([], "1")])
    def test_verbose(self, monkeypatch, words, variable):
        """Both switches show everything."""
        monkeypatch.setenv("OMNIOPD_VERBOSE", variable)
        warnings.simplefilter("always")
        noise.filter_noise(words, {})
        assert self.shown() == (4, 3)


@pytest.mark.slow
class TestWheel:
    """The package as it is installed, in an empty folder."""

    @pytest.fixture(scope="class")
    def python(self, tmp_path_factory):
        """Python of a new environment with the wheel, and with this environment's other packages."""
        folder = tmp_path_factory.mktemp("wheel")
        build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, ROOT]
        subprocess.run(build, check=True, timeout=300)
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True, timeout=120)
        (site,) = (folder / "venv").glob("lib/python*/site-packages")
        (wheel,) = folder.glob("*.whl")
        zipfile.ZipFile(wheel).extractall(site)
        others = Path(yaml.__file__).parents[1]
        (site / "others.pth").write_text(f"{others}\n")
        return folder / "venv" / "bin" / "python"

    @pytest.fixture
    def omniopd(self, python, tmp_path):
        """A function that runs `omniopd ...` of the wheel in an empty folder."""
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

        def run(*words):
            command = [python, "-m", "omniopd_trl.cli.main", *words]
            return subprocess.run(
                command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600, check=False
            )

        return run

    def test_demo(self, omniopd, tmp_path):
        """`omniopd demo` trains, and says nothing that is not about the run."""
        words = "--max_steps 1 --logging_steps 1 --eval_strategy no --eval_on_start false --evaluate_teacher false"
        done = omniopd("demo", *words.split(), "--disable_tqdm", "true")
        assert done.returncode == 0, done.stderr
        assert "model saved to         runs/demo" in done.stdout
        assert (tmp_path / "runs" / "demo" / "model.safetensors").exists()
        assert done.stderr == ""

    def test_recipes(self, omniopd, tmp_path):
        """Recipes are copied, and run where they were copied to; accelerate's configurations are found."""
        assert omniopd("recipes", "demo").returncode == 0
        done = omniopd("cost", "--config", "demo.yaml", "--max_prompts", "8")
        assert done.returncode == 0, done.stderr
        assert "8 of 4,096 measured" in done.stdout
        assert "zero3" in omniopd("train", "--help").stdout
        done = omniopd("train", "--config", "demo.yaml", "--accelerate_config", "cpu_3")
        assert (done.returncode, "Did you mean `cpu_2`?" in done.stderr) == (2, True)
