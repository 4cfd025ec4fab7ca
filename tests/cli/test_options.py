# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""What is checked before torch and TRL are imported."""

import ast
import errno
import io
import os
import subprocess
import sys
import time
from contextlib import suppress

import pytest
from accelerate.commands.launch import launch_command_parser

from omniopd_trl.cli import hints, launch, train
from omniopd_trl.cli.hints import describe_type, hints_of, option_hints
from omniopd_trl.cli.main import main
from omniopd_trl.cli.options import check_arguments, check_paths, resolve_demo_name
from omniopd_trl.cli.recipe import dataclass_types, parse_args
from omniopd_trl.demo import asset_path
from omniopd_trl.errors import ConfigError, DataError
from tests.support import ROOT

HEAVY = {"torch", "transformers", "trl", "datasets", "accelerate"}


class TestSources:
    """Names and types of options, read from source files."""

    def test_options(self):
        """They are those of the dataclasses that make the parser."""
        oracle = hints_of(dataclass_types()) | {"resume_from_checkpoint": str | bool | None}
        found = option_hints()
        assert {n: describe_type(h) for n, h in found.items()} == {n: describe_type(h) for n, h in oracle.items()}
        assert len(found) > 200

    def test_launch_options(self):
        """Those of `accelerate launch` are its parser's."""
        assert launch.launch_options() == {
            option[2:].replace("-", "_"): action.nargs != 0
            for action in launch_command_parser()._actions
            for option in action.option_strings
            if option.startswith("--")
        }

    @pytest.mark.parametrize(
        "source",
        ["", "class TrainingArguments(Unknown):\n    a: int", "class TrainingArguments:\n    a: 3 | 4 | 'x'[0:1]"],
    )
    def test_unknown_version(self, monkeypatch, source):
        """A source file of another form is no error: the dataclasses are asked."""
        expected, read = option_hints(), hints.package_tree

        def tree(package, file):
            return ast.parse(source) if file == "training_args.py" else read(package, file)

        monkeypatch.setattr(hints, "package_tree", tree)
        option_hints.cache_clear()
        try:
            assert option_hints().keys() == expected.keys()
        finally:
            option_hints.cache_clear()


class TestQuick:
    """Mistakes are refused without a heavy import, in less than two seconds."""

    @pytest.mark.case("U9")
    @pytest.mark.parametrize(
        ("command", "recipe", "code", "message"),
        [
            (["{train}", "--config", "r.yaml"], "num_chunk: 5", 2, "no option `num_chunk` (in r.yaml). Did you mean"),
            (["train", "--config", "r.yaml"], "num_chunk: 5", 2, "Did you mean `num_chunks`?"),
            (["cost", "--config", "r.yaml"], "num_chunk: 5", 2, "Did you mean `num_chunks`?"),
            (["{train}", "--num_chunk", "5"], "", 2, "no option `num_chunk` (in the command line)"),
            (["train", "--num_proceses", "2"], "", 2, "Did you mean `num_processes`?"),
            (["cost", "--config", "r.yaml", "--num_chunk", "5"], "a: 1", 2, "`num_chunk` (in the command line)"),
            (["train", "--accelerate_config", "zero33"], "", 2, "Did you mean `zero3`?"),
            (["{train}", "--config", "r.yaml"], "beta: [1]", 2, "`beta` is [1] (list) in r.yaml; it must be of type"),
            (["train", "--config", "r.yaml"], "num_chunks: ten", 2, "`num_chunks` is 'ten' (str)"),
            (["train", "--config", "r.yaml"], "model_name_or_path: runs/a/b", 1, "no model folder 'runs/a/b'"),
            (["{train}", "--dataset_name=./none"], "", 1, "no dataset folder './none' (`dataset_name`; looked in"),
            (["train", "--config", "r.yaml"], "dataset_name: demo:problem", 2, "Did you mean `demo:problems`?"),
            (["cost", "--config", "r.yaml"], "dataset_name: none.jsonl", 1, "no dataset file 'none.jsonl'"),
            (
                ["{train}", "--config", "r.yaml"],
                "method: ppo",
                2,
                "method='ppo' is unknown; choose one of omniopd, sft",
            ),
            (["train", "--config", "r.yaml"], "grpo: {num_generation: 4}", 2, "Did you mean `num_generations`?"),
            (["{train}", "--grpo", '{"beta": "x"}'], "", 2, "`beta` is 'x' (str) in the section `grpo`; it must be"),
            (["{train}", "--sft", "{"], "", 2, "`sft` is '{', which is not valid JSON"),
            (["train", "--config", "r.yaml"], "opd: {eval_steps: 5}", 2, "Set it beside `method`."),
            (["solutions", "--config", "r.yaml"], "num_chunk: 5", 2, "Did you mean `num_chunks`?"),
            (["train", "r.yaml"], "", 2, "Name the recipe with `--config r.yaml`."),
            (["{train}", "--teacher_api_key", "x"], "", 2, "Keys are read from the environment"),
            (["--version"], "", 0, "omniopd_trl 0."),
            (["recipes"], "", 0, "demo "),
            (["demo", "--help"], "", 0, "usage: omniopd demo"),
        ],
    )
    def test_refused(self, tmp_path, command, recipe, code, message):
        """One line that names what is wrong. The time is the processor's, as the machine may be busy."""
        (tmp_path / "r.yaml").write_text(recipe)
        module = "omniopd_trl.cli.train" if command[0] == "{train}" else "omniopd_trl.cli.main"
        call = "run" if command[0] == "{train}" else "main"
        script = (
            f"import sys\nfrom {module} import {call}\n"
            f"try:\n    code = {call}({command[command[0] == '{train}' :]!r})\n"
            "except SystemExit as error:\n    code = error.code\n"
            f"assert not {HEAVY!r} & set(sys.modules)\nsys.exit(code)"
        )
        before = os.times()
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        process = subprocess.run(
            [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        after = os.times()
        assert process.returncode == code, process.stderr
        assert message in (process.stdout if code == 0 else process.stderr)
        assert "Traceback" not in process.stderr
        assert after.children_user + after.children_system - before.children_user - before.children_system < 2


class TestPaths:
    """Names that are meant as paths, and those of the demo."""

    @pytest.mark.parametrize(
        "name",
        [
            "gpt2",
            "Qwen/Qwen3-4B",
            "vllm:/models/of/a/server",
            "anthropic:claude-haiku-4-5",
            "scripted",
            "demo:teacher",
        ],
    )
    def test_other_names(self, tmp_path, monkeypatch, name):
        """Ids of the Hub, also beside a folder of that namespace, services, and the demo's names pass."""
        monkeypatch.chdir(tmp_path)
        (tmp_path / "Qwen").mkdir()
        check_paths([], {"teacher_model_name_or_path": name})

    @pytest.mark.parametrize("name", ["./a", "../a", "/nowhere/a", "~/nowhere", "a/b/c", "a/b/"])
    def test_missing(self, name):
        """What has the form of a path has to exist, also where the command line replaces what the recipe says."""
        with pytest.raises(DataError, match=r"`model_name_or_path`; looked in"):
            check_paths(["--model_name_or_path", name], {"model_name_or_path": "gpt2"})
        check_paths(["--model-name-or-path=gpt2"], {"model_name_or_path": name})

    def test_mixture(self):
        """So have the parts of a mixture; values of another type are left to the checks of types."""
        with pytest.raises(DataError, match=r"no dataset file 'none\.jsonl'"):
            check_paths([], {"datasets": [{"path": "trl-lib/tldr"}, {"path": "none.jsonl"}]})
        check_paths([], {"datasets": [{}, 3, {"path": 3}], "dataset_name": 5})

    def test_demo(self, recipe):
        """The demo's names become folders of the package, in a recipe and on the command line."""
        path = recipe(model_name_or_path="demo:student", dataset_name="demo:problems")
        script_args, args, model_args, _ = parse_args(
            ["--config", path, "--teacher_model_name_or_path", "demo:teacher"]
        )
        assert model_args.model_name_or_path == str(asset_path("student"))
        assert args.teacher_model_name_or_path == str(asset_path("teacher"))
        assert script_args.dataset_name == str(asset_path("problems"))
        assert resolve_demo_name(None) is None
        assert resolve_demo_name("demo:judge") == "demo:judge"
        with pytest.raises(ConfigError, match="There are demo:student"):
            resolve_demo_name("demo:unknown")


@pytest.mark.parametrize("env", ["5", "[A]", "{A: [1]}"])
def test_env(tmp_path, env):
    """The environment of a recipe is a mapping of plain values."""
    path = tmp_path / "recipe.yaml"
    path.write_text(f"env: {env}")
    with pytest.raises(ConfigError, match=r"`env` is .*must be a mapping"):
        check_arguments(["--config", str(path)])


class TestWords:
    """Words of the command line that are no options."""

    @pytest.mark.case("U5")
    @pytest.mark.parametrize(
        ("name", "variables"),
        [
            ("teacher_api_key", "ANTHROPIC_API_KEY, OPENAI_API_KEY, GEMINI_API_KEY"),
            ("anthropic_api_key", "ANTHROPIC_API_KEY"),
            ("OPENAI_API_KEY", "OPENAI_API_KEY"),
            ("teacher_key", "ANTHROPIC_API_KEY, OPENAI_API_KEY, GEMINI_API_KEY"),
            ("hf_token", "HF_TOKEN"),
        ],
    )
    def test_keys(self, name, variables):
        """An option that would hold a key leads to the environment variable, not to an option with a similar name."""
        with pytest.raises(ConfigError, match="read from the environment, never from an option") as error:
            check_arguments([f"--{name}", "secret"])
        assert f"set {variables}" in str(error.value)
        assert "Did you mean" not in str(error.value)

    @pytest.mark.case("U5")
    @pytest.mark.parametrize(
        "command",
        [
            ["train", "base.yaml"],
            ["train", "--accelerate_config", "cpu_2", "base.yaml"],
            ["cost", "base.yaml"],
            ["cost", "--max_prompts", "5", "base.yaml"],
            ["train", "base.YML"],
        ],
    )
    def test_recipe_without_its_option(self, command, capsys):
        """A recipe that is named without `--config` is recognized."""
        assert main(command) == 2
        assert f"Name the recipe with `--config {command[-1]}`." in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("command", "meant"),
        [
            (["audits", "run", "--stpe", "3"], "step"),
            (["data", "check", "a", "b", "--threshhold", "1"], "threshold"),
            (["cost", "--max_prompt", "4"], "max_prompts"),
            (["cost", "--num_chunk", "4"], "num_chunks"),
            (["eval", "--num_sample=4"], "num_samples"),
            (["solutions", "--num-solution", "4"], "num_solutions"),
        ],
    )
    def test_options_of_a_command(self, command, meant, capsys):
        """A mistyped option is compared with those of the command, and those of a recipe where it takes them."""
        assert main(command) == 2
        assert f"(in the command line). Did you mean `{meant}`?" in capsys.readouterr().err

    def test_a_word_too_many(self, capsys):
        """The usage is that of the command."""
        with pytest.raises(SystemExit):
            main(["recipes", "demo", "other"])
        assert capsys.readouterr().err.startswith("usage: omniopd recipes [-h] [NAME]\n")

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["other"], "`other` belongs to no option"),
            (["other.yaml"], "Name the recipe with `--config other.yaml`."),
            (["--config", "other.yaml"], "`--config` is given twice"),
        ],
    )
    def test_words_after_a_recipe(self, words, message, recipe):
        """Refused in the words of this package."""
        with pytest.raises(ConfigError, match=message):
            parse_args(["--config", recipe(), *words])

    def test_infinity(self, recipe):
        """`transformers` makes a whole number of it."""
        with pytest.raises(ConfigError, match=r"is too large .*infinity"):
            parse_args(["--config", recipe(save_strategy="steps", save_steps=float("inf"))])

    def test_cost_without_recipe(self, capsys):
        """The forecast needs a recipe, and says so in one line."""
        assert main(["cost", "--num_chunks", "5"]) == 2
        assert capsys.readouterr().err == ("ConfigError: `omniopd cost` needs a recipe: add `--config RECIPE.yaml`.\n")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"beta: caf\xe9", "is not UTF-8 text .*Save it as UTF-8"),
        (b"beta:\t0.1", "line 1, column 6"),
        (b"a: 2026-13-01", "month must"),
    ],
)
def test_a_recipe_that_is_no_text(tmp_path, content, message):
    """Another encoding, a tab, which YAML does not allow, and a month that does not exist."""
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        check_arguments(["--config", str(path)])


class TestStreams:
    """Output that cannot be written."""

    @pytest.mark.parametrize("call", [lambda: main(["recipes"]), lambda: train.run(["--help"])])
    def test_encoding_and_closed_streams(self, call, monkeypatch):
        """A character that the terminal's encoding lacks is shown as an escape. A closed stream is no error."""
        raw = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
        monkeypatch.setattr(sys, "stderr", None)
        with suppress(SystemExit):
            call()
        sys.stdout.write("±")
        sys.stdout.flush()
        sys.stderr.write("nowhere")
        sys.stderr.close()
        assert raw.getvalue().endswith(b"\\xb1")

    def test_a_full_disk(self, monkeypatch, capsys):
        """One line, and the traceback on request."""

        class Full(io.StringIO):
            def write(self, text):
                raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(sys, "stdout", Full())
        monkeypatch.delenv("OMNIOPD_VERBOSE", raising=False)
        assert main(["recipes"]) == 1
        assert capsys.readouterr().err.startswith("OSError: [Errno 28] No space left on device. With OMNIOPD_VERBOSE")
        monkeypatch.setenv("OMNIOPD_VERBOSE", "1")
        with pytest.raises(OSError, match="No space left"):
            main(["recipes"])

    def test_the_reader_of_a_run_ends(self, recipe, monkeypatch, capsys):
        """As with `omniopd train ... | head`: the run ends with it, and says how to continue."""

        def closed(*args):
            raise BrokenPipeError

        monkeypatch.setattr(train, "main", closed)
        monkeypatch.setattr(train, "drop_output", lambda: None)
        assert train.run(["--config", recipe()]) == 1
        assert "so does the run. To continue, start the command again, training with" in capsys.readouterr().err


BOMB = "a0: &a0 [1, 2]\n" + "".join(f"a{n + 1}: &a{n + 1} [*a{n}, *a{n}]\n" for n in range(40))
MERGED = "a0: &a0 {x0: 1, y0: 1}\n" + "".join(f"a{n + 1}: &a{n + 1}\n  <<: [*a{n}, *a{n}]\n" for n in range(40))


@pytest.mark.case("U11")
@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, "aliases that multiply"),
        (MERGED, "aliases that multiply"),
        ("beta: &a [*a]", "aliases that multiply"),
        ("generation_kwargs: &a {b: {c: *a}}", "aliases that multiply"),
        ("beta: " + "[" * 1500, "nested too deeply"),
    ],
)
def test_recipe_that_explodes(tmp_path, text, message):
    """A small file that stands for billions of values, or for infinitely many, is refused at once."""
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    start = time.process_time()  # the machine may be busy
    with pytest.raises(ConfigError, match=message):
        check_arguments(["--config", str(path)])
    assert time.process_time() - start < 5


@pytest.mark.parametrize(
    ("text", "lines"),
    [("beta: 0.1\nenv: {A: 1}\nbeta: 0.2", (1, 3)), ("env: {beta: 1, C: 2, beta: 3}", (1, 1))],
    ids=["options", "a section"],
)
def test_an_option_that_is_set_twice(tmp_path, text, lines):
    """YAML would silently read the last value."""
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    first, second = lines
    with pytest.raises(ConfigError, match=f"sets `beta` in line {first} and in line {second}, and only the last"):
        check_arguments(["--config", str(path)])


@pytest.mark.case("U11")
def test_recipe_with_aliases(tmp_path):
    """Ordinary anchors, aliases and merges are read."""
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "model_init_kwargs: &kwargs {revision: a}\nteacher_model_init_kwargs: {<<: *kwargs, dtype: auto, <<: *kwargs}"
    )
    assert check_arguments(["--config", str(path)]) == {
        "model_init_kwargs": {"revision": "a"},
        "teacher_model_init_kwargs": {"revision": "a", "dtype": "auto"},
    }


def test_sections():
    """The options of a baseline are those of TRL's configuration, from a recipe and from the command line."""
    for name, config in hints.SECTIONS.items():
        import trl

        oracle = hints_of([getattr(trl, config)])
        found = hints.section_hints(name)
        assert {n: describe_type(h) for n, h in found.items()} == {n: describe_type(h) for n, h in oracle.items()}
    script_args, *_ = parse_args(
        ["--grpo", '{"num_generations": 4, "learning_rate": "1e-5"}', "--use_cpu", "true", "--bf16", "false"]
    )
    assert script_args.grpo == {"num_generations": 4, "learning_rate": 1e-5}
    assert script_args.sft == {}
