# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""The documentation is true: code runs, recipes parse, commands and links exist, tables say what the code says."""

import argparse
import ast
import dataclasses
import importlib.util
import re
import shlex
import subprocess
import sys
from typing import NamedTuple

import pytest
import torch
import yaml

from omniopd_trl.baselines.base import Baseline
from omniopd_trl.cli.ablate.plan import read_plan
from omniopd_trl.cli.launch import launch_options, resolve_config, split_arguments
from omniopd_trl.cli.main import make_parser
from omniopd_trl.cli.options import check_names, check_recipe, option_names
from omniopd_trl.cli.recipe import OmniOPDScriptArguments, parse_args
from omniopd_trl.method.posterior import posterior_mean
from omniopd_trl.teachers.base import OUTCOMES
from omniopd_trl.trainer.omniopd_config import OmniOPDConfig
from omniopd_trl.trainer.omniopd_trainer import OmniOPDTrainer
from scripts import configuration_reference
from tests.support import ROOT

PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("recipes/**/*.md")])
RECIPES = sorted(ROOT.glob("recipes/*.yaml"))


class Block(NamedTuple):
    """One fenced block of a page."""

    language: str
    line: int
    text: str


def blocks_of(page, language):
    """The fenced blocks of one language, in order."""
    text = page.read_text(encoding="utf-8")
    return [
        Block(match[1], text[: match.start(2)].count("\n") + 1, match[2])
        for match in re.finditer(r"^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
        if match[1] == language
    ]


def page_id(page):
    return str(page.relative_to(ROOT))


def pages_with(language):
    return [page for page in PAGES if blocks_of(page, language)]


@pytest.fixture
def any_machine(monkeypatch):
    """The defaults ask for a GPU with bf16, which a reader of a recipe for one has."""
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)


@pytest.fixture
def trained(monkeypatch):
    """Of each run, in order: the steps that it took, and the tokens that its teacher wrote for it; 1 for baselines."""
    runs = []
    for kind in (OmniOPDTrainer, Baseline):

        def noted(trainer, *args, kind=kind, train=kind.train, **kwargs):
            result = train(trainer, *args, **kwargs)
            # A baseline may have no teacher.
            written = trainer.teacher_usage.completion_tokens if isinstance(trainer, OmniOPDTrainer) else 1
            runs.append((trainer.state.global_step, written))
            return result

        monkeypatch.setattr(kind, "train", noted)
    return runs


@pytest.mark.parametrize("page", pages_with("python"), ids=page_id)
@pytest.mark.usefixtures("any_machine")
def test_python_runs(page, tmp_path, monkeypatch, make_tiny_model, tiny_teacher_tokenizer, trained):
    """The blocks of a page run, one after the other, as a reader would paste them; what trains takes a step."""
    monkeypatch.chdir(tmp_path)
    # Models of the Hub are replaced by small ones; everything else runs as it is written.
    stand_ins = {
        "Qwen/Qwen3-0.6B": str(make_tiny_model(max_position_embeddings=4096)),
        "Qwen/Qwen3-4B": str(make_tiny_model(max_position_embeddings=4096)),
        "Qwen/Qwen3-32B": str(make_tiny_model(1, tiny_teacher_tokenizer, max_position_embeddings=4096)),
    }
    namespace = {"__name__": "__main__"}
    for block in blocks_of(page, "python"):
        text = block.text
        for name, stand_in in stand_ins.items():
            text = text.replace(name, stand_in)
        # Errors show the page and the line in it.
        tree = ast.increment_lineno(ast.parse(text), block.line - 1)
        exec(compile(tree, str(page), "exec"), namespace)
    # A run without a step ends without an error, too, and shows a reader nothing.
    assert len(trained) == sum(block.text.count(".train()") for block in blocks_of(page, "python"))
    assert all(steps >= 1 and tokens > 0 for steps, tokens in trained), trained


@pytest.mark.case("U10")
@pytest.mark.parametrize("page", [*pages_with("bash"), *RECIPES], ids=page_id)
def test_commands_end_cleanly(page):
    """What is shown to be pasted is `omniopd train`: `accelerate launch` ends every Control-C in its own traceback."""
    if page.parent.name != "accelerate_configs":  # the page about it
        text = page.read_text(encoding="utf-8")
        assert not re.findall(r"^(?:#\s+)?accelerate launch -m omniopd_trl.train.*", text, re.MULTILINE)


# Bytes per parameter: weights, gradient, two moments and the reference in float32; with LoRA the weights; the teacher
# in bf16.
FULL, LORA, TEACHER = 20, 4, 2


@pytest.mark.case("U8")
@pytest.mark.parametrize("page", [*pages_with("python"), ROOT / "omniopd_trl/trainer/omniopd_trainer.py"], ids=page_id)
def test_examples_fit_a_gpu(page):
    """Models that an example loads in one process fit on a GPU with 80 GB, by their parameters."""
    blocks = [block.text for block in blocks_of(page, "python") + blocks_of(page, "yaml")]
    if page.suffix == ".py":
        blocks = [page.read_text(encoding="utf-8")]
    for text in blocks:
        student = re.search(r"\bmodel(?:_name_or_path)?[=:] ?\"?Qwen/Qwen3-([\d.]+)B", text)
        teacher = re.search(r"teacher_model(?:_name_or_path)?[=:] ?\"?Qwen/Qwen3-([\d.]+)B", text)
        gigabytes = TEACHER * float(teacher[1]) if teacher else 0
        if student:
            gigabytes += float(student[1]) * (LORA if "LoraConfig" in text or "use_peft: true" in text else FULL)
        assert gigabytes < 80, text


@pytest.mark.case("U2")
def test_which_way_a_posterior_moves():
    """The bounds of a posterior that the pages explain a run with are those of the function."""
    metrics = (ROOT / "docs/metrics.md").read_text(encoding="utf-8")
    assert "near `audit/prior` and near 1, the similarity is high whatever the teacher writes" in metrics
    none, every = posterior_mean(torch.tensor([0.0, 10.0]), 10, 0.95).tolist()
    page = " ".join((ROOT / "docs/no_improvement.md").read_text(encoding="utf-8").split())
    assert f"a prior of 0.95 it is {none:.2f}" in page
    assert f"Here it is {every:.3f}" in page
    assert none < 0.95 < every


def test_pages_train():
    """The pages that a reader meets first hold an example that trains."""
    for name in ("README.md", "docs/quickstart.md"):
        assert any(".train()" in block.text for block in blocks_of(ROOT / name, "python")), name


@pytest.mark.parametrize("page", pages_with("yaml"), ids=page_id)
@pytest.mark.usefixtures("any_machine")
def test_yaml_parses(page, tmp_path):
    """Every block of YAML holds options that exist, with values that they can have; recipes and plans parse."""
    for block in blocks_of(page, "yaml"):
        path = tmp_path / "recipe.yaml"
        path.write_text(block.text)
        options = yaml.safe_load(block.text)
        if "rows" in options:
            read_plan(str(path))
        elif "model_name_or_path" in options:
            parse_args(["--config", str(path)])
        else:
            check_recipe(str(path))


@pytest.mark.parametrize("path", RECIPES, ids=page_id)
@pytest.mark.usefixtures("any_machine")
def test_recipe_parses(path):
    """Every recipe of the repository parses, and names its student, its teacher and its data."""
    script_args, training_args, model_args, _ = parse_args(["--config", str(path)])
    assert model_args.model_name_or_path
    assert training_args.teacher_model_name_or_path
    assert script_args.dataset_name


def commands_of(page):
    """Every command line of a page's shell blocks, as words."""
    for language in ("bash", "sh", "shell", "console"):
        for block in blocks_of(page, language):
            for line in block.text.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if words:
                    yield words


def problems_of(words):
    """What a command names that does not exist."""
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    if words[0] == "make":
        yield from (f"no target {word}" for word in words[1:] if "=" not in word and word not in targets)
    if "-m" in words:
        module = words[words.index("-m") + 1]
        if importlib.util.find_spec(module) is None:
            yield f"no module {module}"
        if module == "omniopd_trl.train":
            options = [word[2:].partition("=")[0] for word in words[words.index(module) :] if word.startswith("--")]
            check_names(options, option_names(), "a page")
    if words[:2] in (["omniopd", "eval"], ["omniopd", "probe"]):
        _, rest = make_parser().parse_known_args(words[1:])
        check_names([word[2:] for word in rest if word.startswith("--")], option_names(), "a page")
    if words[:2] == ["omniopd", "train"]:
        config = split_arguments(words[2:], option_names(), launch_options()).accelerate_config
        if config is not None:
            resolve_config(config)
    for word in words:
        if re.match(r"(recipes|docs|scripts|benchmarks|tests)/", word) and not (ROOT / word).exists():
            yield f"no file {word}"


@pytest.mark.parametrize("page", [page for page in PAGES if list(commands_of(page))], ids=page_id)
def test_commands_exist(page):
    """Targets of make, modules, files and options that a page's commands name exist."""
    for words in commands_of(page):
        assert not list(problems_of(words)), words


def test_short_runs_log():
    """A command that runs a recipe for a few steps, to read what they log, logs a line."""
    found = 0
    for words in (words for page in PAGES for words in commands_of(page) if {"--max_steps", "--config"} <= set(words)):
        settings = yaml.safe_load((ROOT / words[words.index("--config") + 1]).read_text())
        settings.update(zip((word.removeprefix("--") for word in words), words[1:], strict=False))
        assert int(settings["logging_steps"]) <= int(settings["max_steps"]), words
        found += 1
    assert found >= 2


def test_commands_are_looked_at():
    """The check itself finds what does not exist."""
    assert list(problems_of(["make", "tset"])) == ["no target tset"]
    assert list(problems_of(["python", "-m", "omniopd_trl.trian"])) == ["no module omniopd_trl.trian"]
    assert list(problems_of(["x", "--config", "recipes/none.yaml"])) == ["no file recipes/none.yaml"]
    with pytest.raises(ValueError, match="num_proces"):
        list(problems_of(["omniopd", "train", "--num_proces", "3"]))
    with pytest.raises(ValueError, match="temprature"):
        list(problems_of(["omniopd", "eval", "--model", "x", "--temprature", "1"]))
    with pytest.raises(ValueError, match="zero4"):
        list(problems_of(["omniopd", "train", "--accelerate_config", "zero4"]))
    with pytest.raises(ValueError, match="num_chunk"):
        list(problems_of(["python", "-m", "omniopd_trl.train", "--num_chunk", "3"]))


def anchors_of(page):
    """The anchors of a page's headings, as renderers make them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_exist(page):
    """Links within the repository lead somewhere, to the heading that they name."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        path = (page.parent / file).resolve() if file else page
        assert path.exists(), target
        if anchor:
            assert anchor in anchors_of(path), target


class TestConfigurationPage:
    """docs/configuration.md is written from the code."""

    def test_in_sync(self, capsys):
        """The page is what `make docs` would write."""
        assert configuration_reference.main(["--check"]) == 0, capsys.readouterr().err

    def test_out_of_sync_is_noticed(self, tmp_path, monkeypatch, capsys):
        """A page that differs by a default fails the check, and writing it fixes it."""
        page = tmp_path / "configuration.md"
        text = configuration_reference.PAGE.read_text(encoding="utf-8")
        page.write_text(text.replace("| `num_chunks` | `int` | `10` |", "| `num_chunks` | `int` | `11` |"))
        monkeypatch.setattr(configuration_reference, "PAGE", page)
        assert configuration_reference.main(["--check"]) == 1
        assert "make docs" in capsys.readouterr().err
        assert configuration_reference.main([]) == 0
        assert page.read_text(encoding="utf-8") == text

    def test_undocumented_field_is_noticed(self):
        """A field without an entry in the docstring is an error, not a gap."""

        @dataclasses.dataclass
        class Config:
            """> Parameters that control nothing"""

            forgotten: int = 0

        with pytest.raises(ValueError, match="forgotten"):
            configuration_reference.groups_of(Config)

    @pytest.mark.parametrize("config", [OmniOPDConfig, OmniOPDScriptArguments])
    def test_docstring_defaults(self, config):
        """The defaults that the docstring states are the defaults."""
        stated = re.findall(r"^ *(\w+) \(.*defaults to `(.+)`\):$", config.__doc__, re.MULTILINE)
        assert stated
        defaults = {field.name: field.default for field in dataclasses.fields(config)}
        for name, default in stated:
            assert ast.literal_eval(default) == defaults[name], name


def test_site_is_self_contained(tmp_path):
    """The site builds strictly, every page is in the navigation, and no page loads anything from another host."""
    pytest.importorskip("material", reason="the extra `docs` is not installed")
    pytest.importorskip("mkdocstrings", reason="the extra `docs` is not installed")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    pages = list(tmp_path.glob("**/*.html"))
    assert any("doc-heading" in page.read_text(encoding="utf-8") for page in pages)  # the API reference
    for page in pages:
        text = page.read_text(encoding="utf-8")
        assert not re.findall(r"<(?:script|link|img|iframe)\b[^>]*(?:src|href)=\"?(?:https?:)?//[^>]*>", text), page


def test_overview_lists_every_page():
    """The overview names each guide: a reader of a clone, who has no navigation, finds all of them there."""
    overview = (ROOT / "docs" / "index.md").read_text("utf-8")
    missing = [page.name for page in ROOT.glob("docs/*.md") if f"]({page.name})" not in overview]
    assert missing == ["index.md"], "Add the pages to the tables of docs/index.md."


def test_every_metric_is_documented():
    """Each name that the trainer logs under is on the page of metrics."""
    page = (ROOT / "docs/metrics.md").read_text("utf-8")
    groups = "audit|branches|imitation|judge|kl|off_policy|rollouts|sampling|teacher"
    names = {f"teacher/{name}" for name in OUTCOMES}
    for file in ROOT.glob("omniopd_trl/trainer/*.py"):
        names |= set(re.findall(rf'"((?:{groups})/[\w/]+)"', file.read_text("utf-8")))
    assert len(names) > 40
    assert [name for name in sorted(names) if f"`{name}`" not in page and f"{name}/mean`" not in page] == []


def test_every_flag_is_documented():
    """Each option of a command is on a page, by its long or its short name."""
    pages = "\n".join(page.read_text("utf-8") for page in PAGES)
    parsers, flags = [make_parser()], set()
    while parsers:
        for action in parsers.pop()._actions:
            flags.add("|".join(rf"[ `]{flag}\b" for flag in action.option_strings))
            parsers += action.choices.values() if action.nargs == argparse.PARSER else []
    assert len(flags) > 50
    assert [names for names in flags if not re.search(names, pages)] == []


@pytest.mark.case("F6")
def test_a_row_for_each_service():
    """Each service that users name has a row that says how it works, or that it does not."""
    rows = [row for row in (ROOT / "docs" / "teachers.md").read_text("utf-8").splitlines() if row.startswith("| ")]
    services = "Azure OpenAI, Groq, Cerebras, xAI, Gemini, Bedrock, Vertex, LiteLLM, TGI, Ollama, LM Studio, Together"
    for service in [*services.split(", "), "Fireworks", "SGLang", "llama.cpp"]:
        assert any(service in row.split("|")[1] for row in rows), service
    assert any("SGLang" in row.split("|")[1] and "`vllm:" in row for row in rows)
