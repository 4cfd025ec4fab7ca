# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""The recipes say what the paper says, name teachers that exist, and cost what their page says.

That they parse is in `test_docs.py`.
"""

import copy
import re
import shlex
import socket
from datetime import date
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import trl
import yaml
from transformers import AutoModelForCausalLM, Qwen3Config

from omniopd_trl.cli.main import main
from omniopd_trl.cli.recipe import parse_args
from omniopd_trl.errors import ConfigError
from omniopd_trl.teachers import TeacherOptions, load_teacher
from omniopd_trl.teachers.base import Prefix
from omniopd_trl.teachers.providers.anthropic import AnthropicTeacher
from omniopd_trl.teachers.providers.capabilities import capabilities_of
from omniopd_trl.teachers.providers.gemini import GeminiTeacher
from omniopd_trl.teachers.providers.openai import OpenAITeacher
from tests.support import ROOT

FOLDER = ROOT / "recipes"
PAGE = (FOLDER / "README.md").read_text(encoding="utf-8")
RECIPES = sorted(path.name for path in FOLDER.glob("*.yaml"))
MATH = [name for name in RECIPES if name.startswith("math_")]
LIMITED = [
    "math_qwen3_4b_anthropic.yaml",
    "math_qwen3_4b_haiku_5_5.yaml",
    "math_qwen3_4b_gemini.yaml",
    "math_qwen3_4b_openai.yaml",
]
SERVICES = {
    "math_qwen3_4b_vllm.yaml": OpenAITeacher,
    "math_qwen3_4b_anthropic.yaml": AnthropicTeacher,
    "math_qwen3_4b_haiku_5_5.yaml": AnthropicTeacher,
    "math_qwen3_4b_gemini.yaml": GeminiTeacher,
    "math_qwen3_4b_openai.yaml": OpenAITeacher,
}

# Where the paper gives the value: option -> (value, place).
PAPER = {
    "model_name_or_path": ("Qwen/Qwen3-4B", "Section 5.1"),
    "prompt_template": ("math", "Table 7"),
    "num_chunks": (10, "Section 5.1"),
    "chunk_length": (50, "Section 5.1"),
    "num_rollouts": (10, "Section 5.1"),
    "similarity": ("edit", "Section 5.1"),
    "prior_strength": (1.0, "Fig. 2"),
    "prior": ("policy", "Eq. 4"),
    "beta": (0.1, "Section 5.1"),
    "posterior_baseline": ("none", "Eq. 8"),
    "chunk_selection": ("entropy", "Section 3.2.3"),
    "learning_rate": (1e-6, "Section 5.1"),
    "per_device_train_batch_size": (2, "Section 5.1"),
    "temperature": (1.0, "Section 5.1"),
}
# Table 1: what each student reaches, by its teacher in the paper.
TABLE_1 = {
    "math_qwen3_4b.yaml": "69.08",
    "math_qwen3_4b_vllm.yaml": "69.08",
    "math_qwen3_4b_anthropic.yaml": "74.92",
    "math_qwen3_4b_gemini.yaml": "75.67",
}


def text_of(name):
    return (FOLDER / name).read_text(encoding="utf-8")


def settings_of(name):
    return yaml.safe_load(text_of(name))


def arguments_of(name):
    """The parsed options, on a machine without a GPU."""
    return parse_args(["--config", str(FOLDER / name), "--use_cpu", "true"])


@pytest.fixture
def offline(monkeypatch):
    """No key and no connection."""

    def refuse(*args, **kwargs):
        raise AssertionError("a connection was opened")

    for name in ("ANTHROPIC_API_KEY", "GOOGLE_API_KEY", "GEMINI_API_KEY", "OPENAI_API_KEY", "VLLM_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(socket.socket, "connect", refuse)


class TestPaper:
    """The values, and where they come from."""

    @pytest.mark.parametrize("option", PAPER)
    @pytest.mark.parametrize("name", MATH)
    def test_value(self, name, option):
        """What the paper gives is what the recipe has, and the line says where the paper gives it."""
        value, place = PAPER[option]
        settings = settings_of(name)
        found = type(value)(settings[option])
        assert found == value
        line = next(line for line in text_of(name).splitlines() if line.startswith(f"{option}:"))
        assert place in line

    @pytest.mark.parametrize("name", MATH)
    def test_length(self, name):
        """One epoch, or 50 steps with a closed teacher; sequences of 20K tokens with their prompt."""
        _, args, _, _ = arguments_of(name)
        assert args.max_completion_length + 1024 == 20 * 1024
        assert args.max_steps == (50 if name in LIMITED else -1)
        assert args.num_train_epochs == (3.0 if name in LIMITED else 1)

    @pytest.mark.parametrize("name", MATH)
    def test_every_value_has_a_source(self, name):
        """A line, the comment above it, or the heading of its block says where in the paper it stands, or "ours"."""
        heading, above, missing = "", "", []
        for line in text_of(name).splitlines():
            code, _, comment = line.partition("#")
            if not line:
                heading = above = ""
            elif not code:
                heading, above = heading or comment, above + comment
            else:
                if not re.search(r"Section|Table|Fig\.|Eq\.|[Oo]urs", comment or above) and "(ours)" not in heading:
                    missing.append(line)
                above = ""
        assert missing == []

    @pytest.mark.parametrize("name", TABLE_1)
    def test_reported(self, name):
        """The paper's number is in the recipe and beside it on the page."""
        row = next(line for line in PAGE.splitlines() if line.startswith(f"| [{name}]"))
        assert TABLE_1[name] in row
        assert TABLE_1[name] in text_of(name)
        assert "not run it" in text_of(name).replace("\n# ", " ")


class TestTeachers:
    """Who the recipes name."""

    @pytest.mark.usefixtures("offline")
    @pytest.mark.parametrize("name", SERVICES)
    def test_adapter(self, name, tmp_path, monkeypatch):
        """The name resolves to the provider's adapter, with the recipe's limits, without a key or a connection."""
        monkeypatch.chdir(tmp_path)
        _, args, _, _ = arguments_of(name)
        teacher = load_teacher(args.teacher_model_name_or_path, TeacherOptions.of(args))
        assert type(teacher) is SERVICES[name]
        assert teacher.name == args.teacher_model_name_or_path
        assert teacher.settings.max_concurrency == args.teacher_max_concurrency
        assert teacher.budget.max_usd == args.teacher_budget_usd

    def test_all_services_are_here(self):
        """A recipe with a teacher behind a service is looked at by the tests of this file."""
        teachers = {name: settings_of(name)["teacher_model_name_or_path"] for name in RECIPES}
        named = {name for name, teacher in teachers.items() if ":" in teacher and not teacher.startswith("demo:")}
        assert named == set(SERVICES)

    @pytest.mark.parametrize("name", LIMITED)
    def test_current(self, name):
        """A closed teacher has a budget, no announced end that is known, and reasoning that is off or minimal."""
        settings = settings_of(name)
        assert settings["teacher_budget_usd"] > 0
        capabilities = capabilities_of(*settings["teacher_model_name_or_path"].split(":"))
        assert capabilities.shutdown is None
        assert capabilities.reasoning_headroom == 0

    @pytest.mark.case("U7")
    def test_haiku(self):
        """The later Haiku is instructed, takes no temperature, and costs a ninth."""
        name = "math_qwen3_4b_haiku_5_5.yaml"
        capabilities = capabilities_of("anthropic", "claude-haiku-5-5")
        assert (capabilities.continuation, capabilities.takes_temperature) == ("instruct", False)
        assert settings_of(name)["teacher_model_name_or_path"] == "anthropic:claude-haiku-5-5"
        assert "teacher_temperature" not in settings_of(name)
        plain = {
            cost.recipe: float(cost.dollars[0])
            for cost in costs_of_page()
            if not cost.options and cost.dollars[0] != "none"
        }
        assert plain["math_qwen3_4b_anthropic.yaml"] / plain[name] == pytest.approx(9.1, abs=0.1)

    @pytest.mark.case("U7")
    def test_five_chunks(self):
        """The paper's cheaper setting stands on the page with its numbers, and costs half without a cache."""
        assert "68.38" in PAGE
        costs = {(cost.recipe, cost.options): cost for cost in costs_of_page()}
        for name in ("math_qwen3_4b_anthropic.yaml", "math_qwen3_4b_haiku_5_5.yaml"):
            all_chunks, half = (float(costs[name, options].dollars[0]) for options in ((), ("--num_chunks", "5")))
            assert half == pytest.approx(all_chunks / 2, abs=0.01)

    def test_the_papers_gemini(self):
        """The date on which the paper's teacher ends is the one that a run warns of."""
        assert capabilities_of("gemini", "gemini-2.5-flash").shutdown == date(2026, 12, 1)
        assert "2026-12-01" in PAGE
        assert "2026-12-01" in text_of("math_qwen3_4b_gemini.yaml")

    @pytest.mark.parametrize("thinking", [True, False])
    def test_vllm_continues_in_the_thought(self, thinking, tiny_tokenizer, tmp_path, monkeypatch):
        """Under Qwen3's own template the teacher reads the student's prompt and text as they are, and nothing else."""
        monkeypatch.chdir(tmp_path)
        _, args, _, _ = arguments_of("math_qwen3_4b_vllm.yaml")
        if not thinking:
            args.teacher_chat_template_kwargs = None
        tokenizer = copy.deepcopy(tiny_tokenizer)
        template = Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja"
        tokenizer.chat_template = template.read_text(encoding="utf-8")
        args.teacher_tokenizer_name_or_path = tokenizer
        teacher = load_teacher(args.teacher_model_name_or_path, TeacherOptions.of(args))
        prompt = [{"role": "user", "content": "What is 3 + 4?"}]
        own = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
        text = "<think>\nOkay, 3 +"
        rendered, _ = teacher._render(Prefix(prompt, text))
        assert (rendered == own + text) == thinking

    def test_vllm_server(self):
        """The server that the recipe starts is the one that it asks, on this machine only, with its cache shown."""
        name = "math_qwen3_4b_vllm.yaml"
        (line,) = [line for line in text_of(name).splitlines() if "vllm serve" in line]
        words = shlex.split(line.removeprefix("#"))
        settings = settings_of(name)
        options = dict(pairwise(words))
        assert settings["teacher_model_name_or_path"] == f"vllm:{words[2]}"
        assert settings["teacher_base_url"] == f"http://{options['--host']}:{options['--port']}/v1"
        assert options["--host"] == "127.0.0.1"
        assert {"--enable-prefix-caching", "--enable-prompt-tokens-details"} <= set(words)
        longest = settings["max_completion_length"] + 1024 + 1.4 * settings["chunk_length"]
        assert longest < int(options["--max-model-len"])

    @pytest.mark.parametrize("name", RECIPES)
    def test_no_key(self, name):
        """No recipe holds anything that could be a key, nor an option for one."""
        text = text_of(name)
        assert not re.search(r"(sk-|hf_|AIza)\w", text)
        assert not re.search(r"_API_KEY=(?!\.\.\.)", text)
        assert not [option for option in settings_of(name) if re.search(r"token$|key|secret|password", option)]


class Cost(NamedTuple):
    """One row of the table of costs."""

    recipe: str
    options: tuple[str, ...]
    tokens: tuple[str, ...]  # requests, prompt tokens, completion tokens
    dollars: tuple[str, ...]  # without a cache, with one per chunk, with one per trajectory, SFT


def costs_of_page():
    table = PAGE.partition("## Cost of the paid teachers")[2]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line[:1] == "|"]
    return [
        Cost(cells[0], tuple(cells[1].strip("`").split()), tuple(cells[2:5]), tuple(cells[5:9])) for cells in rows[2:]
    ]


class TestPage:
    """recipes/README.md."""

    def test_lists_every_recipe(self):
        """Once each, with a link."""
        assert sorted(re.findall(r"^\| \[(\S+\.yaml)\]\(\1\)", PAGE, re.MULTILINE)) == RECIPES

    @pytest.mark.case("U7")
    def test_every_paid_recipe_has_its_cost(self):
        """As it stands, without options."""
        plain = {cost.recipe for cost in costs_of_page() if not cost.options}
        assert set(LIMITED) <= plain

    @pytest.mark.usefixtures("offline")
    @pytest.mark.parametrize("cost", costs_of_page(), ids=lambda cost: " ".join([cost.recipe, *cost.options]))
    def test_cost(self, cost, capsys, tmp_path, monkeypatch):
        """The table has what the page's command prints; dollars only where the table of prices is the page's."""
        (command,) = re.findall(r"^omniopd (cost .+)$", PAGE, re.MULTILINE)
        words = shlex.split(command)
        words[words.index("--config") + 1] = str(FOLDER / cost.recipe)
        monkeypatch.chdir(tmp_path)
        assert main([*words, *cost.options]) == 0
        printed = capsys.readouterr().out

        def column(row, number):
            match = re.search(rf"^{row} +(.+)$", printed, re.MULTILINE)
            return match[1].split()[number] if match else "none"

        tokens = tuple(column(row, 2) for row in ("requests", "prompt tokens", "completion tokens"))
        advice = f"recipes/README.md must be brought up to date: {cost.recipe} {' '.join(cost.options)}\n{printed}"
        assert tokens == cost.tokens, advice
        if f"genai-prices {version('genai-prices')} " in PAGE:
            caches = ("no prompt cache", "a cache per chunk", "a cache per trajectory")
            dollars = (*(column(f"dollars, {cache}", 2) for cache in caches), column("dollars, no prompt cache", 3))
            assert dollars == cost.dollars, advice

    @pytest.mark.parametrize("name", LIMITED)
    def test_budget_covers_the_forecast(self, name):
        """The budget is above the dearest of the three prices, by no more than half of it."""
        cost = next(cost for cost in costs_of_page() if cost.recipe == name and not cost.options)
        budget = settings_of(name)["teacher_budget_usd"]
        assert 1.1 < budget / float(cost.dollars[0]) < 1.5

    def test_forecast_needs_max_steps(self, capsys):
        """The other recipes have no number of steps until their data is read, which is said."""
        command = ["cost", "--config", str(FOLDER / "math_qwen3_4b_vllm.yaml"), "--prompt_length", "200"]
        assert main(command) == 2
        assert ConfigError.__name__ in capsys.readouterr().err

    def test_memory(self):
        """The page's gigabytes are those of the models' shapes."""
        common = {"head_dim": 128, "num_key_value_heads": 8, "vocab_size": 151_936}
        student = {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32}
        teacher = {
            "hidden_size": 5120,
            "intermediate_size": 25_600,
            "num_hidden_layers": 64,
            "num_attention_heads": 64,
        }
        with torch.device("meta"):
            sizes = [
                AutoModelForCausalLM.from_config(
                    Qwen3Config(**common, **shape, tie_word_embeddings=tied)
                ).num_parameters()
                for shape, tied in ((student, True), (teacher, False))
            ]
        # Five numbers of four bytes for each weight of the student, one of two bytes for each of the teacher.
        assert f"{sizes[0] / 1e9:.2f} billion" in PAGE
        assert f"{5 * 4 * sizes[0] / 1e9:.1f} GB" in PAGE
        assert f"{2 * sizes[1] / 1e9:.1f} GB" in PAGE
