# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""The recipes say what the paper says, name teachers that exist, and cost what their page says.

That they parse is in `test_docs.py`.
"""

import copy
import json
import re
import shlex
import socket
from argparse import Namespace
from datetime import date
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import pytest
import trl
import yaml

from omniopd_trl.accounting.hardware import GIB
from omniopd_trl.cli import train
from omniopd_trl.cli.hardware import job_of
from omniopd_trl.cli.launch import launch_options, split_arguments
from omniopd_trl.cli.main import main
from omniopd_trl.cli.options import option_names
from omniopd_trl.cli.recipe import parse_args
from omniopd_trl.errors import ConfigError
from omniopd_trl.teachers import TeacherOptions, load_teacher
from omniopd_trl.teachers.base import Prefix
from omniopd_trl.teachers.providers.anthropic import AnthropicTeacher
from omniopd_trl.teachers.providers.capabilities import capabilities_of
from omniopd_trl.teachers.providers.gemini import GeminiTeacher
from omniopd_trl.teachers.providers.openai import OpenAITeacher
from scripts import recipes
from tests.support import ROOT

FOLDER = ROOT / "recipes"
PAGE = (FOLDER / "README.md").read_text(encoding="utf-8")
RECIPES = sorted(path.name for path in FOLDER.glob("*.yaml"))
ROWS = {f"{row.name}.yaml": row for row in recipes.ROWS}
PAPERS = [*ROWS]  # all but the demo
LIMITED = [name for name, row in ROWS.items() if recipes.TEACHERS[row.teacher].key is not None]
SERVED = [name for name in ROWS if name not in LIMITED]
ADAPTERS = {
    "vllm": OpenAITeacher,
    "openai": OpenAITeacher,
    "anthropic": AnthropicTeacher,
    "gemini": GeminiTeacher,
}
HAIKU_4_5, HAIKU_5_5 = (f"math_qwen3_4b_from_claude_haiku_{version}.yaml" for version in ("4_5", "5_5"))
GEMINI = "math_qwen3_4b_from_gemini_3.5_flash_lite.yaml"

# Where the paper gives the value: option -> (value, place).
PAPER = {
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
# Tables 1 and 2: what each student reaches: base (Table 1 only), GRPO (likewise), SFT, OPD, OmniOPD.
TABLES = {
    "math_qwen3_1.7b_from_qwen3_32b.yaml": ("51.87", "62.41", "53.76", "61.70", "60.67"),
    "math_qwen3_4b_from_qwen3_32b.yaml": ("54.01", "70.24", "63.80", "64.16", "69.08"),
    "math_qwen3_4b_from_qwen3_30b_a3b.yaml": ("54.01", "70.24", "49.77", "56.22", "72.32"),
    HAIKU_4_5: ("54.01", "70.24", "67.52", "74.92"),
    GEMINI: ("54.01", "70.24", "73.51", "75.67"),
    "code_qwen3_1.7b_from_qwen3_32b.yaml": ("40.44", "47.06", "47.93"),
    "code_qwen3_4b_from_qwen3_32b.yaml": ("62.03", "65.26", "63.78"),
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
    @pytest.mark.parametrize("name", PAPERS)
    def test_value(self, name, option):
        """What the paper gives is what the recipe has, and the line says where the paper gives it."""
        value, place = PAPER[option]
        settings = settings_of(name)
        found = type(value)(settings[option])
        assert found == value
        line = next(line for line in text_of(name).splitlines() if line.startswith(f"{option}:"))
        assert place in line

    @pytest.mark.parametrize("name", PAPERS)
    def test_student_and_data(self, name):
        """The student and the set of its name, with the prompt of Table 7 for mathematics."""
        settings = settings_of(name)
        assert settings["model_name_or_path"].lower().removeprefix("qwen/").replace("-", "_") in name
        data = (settings["dataset_name"], settings.get("prompt_template"))
        is_code = name.startswith("code_")
        assert data == (("benchmark:eurus_code", None) if is_code else ("open-r1/DAPO-Math-17k-Processed", "math"))

    @pytest.mark.parametrize("name", PAPERS)
    def test_length(self, name):
        """One epoch, or 50 steps with a closed teacher; sequences of 20K tokens with their prompt."""
        _, args, _, _ = arguments_of(name)
        assert args.max_completion_length + 1024 == 20 * 1024
        assert args.max_steps == (50 if name in LIMITED else -1)
        assert args.num_train_epochs == (3.0 if name in LIMITED else 1)

    @pytest.mark.parametrize("name", PAPERS)
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

    @pytest.mark.parametrize("name", TABLES)
    def test_reported(self, name):
        """The numbers of the paper are in the recipe, and those of the teacher beside it on the page."""
        row = next(line for line in PAGE.splitlines() if line.startswith(f"| [{name}]"))
        assert set(TABLES[name][-3:] if name in SERVED else TABLES[name][-2:]) <= set(re.findall(r"\d\d\.\d\d", row))
        assert set(re.findall(r"\d\d\.\d\d(?=[,.] |$)", text_of(name).partition("# Models")[0])) == set(TABLES[name])
        assert "not run it" in text_of(name)

    @pytest.mark.parametrize("name", sorted(set(ROWS) - set(TABLES)))
    def test_not_reported(self, name):
        """A teacher that the paper does not have is said to have no number."""
        assert "We know of no number for this teacher" in text_of(name)


def commands_of(name):
    """The commands of `omniopd train` at the top of a recipe, by the line above each, as words."""
    lines = text_of(name).partition("# Models")[0].splitlines()
    found = {}
    for line, above in zip(lines[2:], lines, strict=False):
        if line.startswith("#   omniopd train"):
            found[above if above != "#" and ":" in above else line] = shlex.split(line.removeprefix("#"))[2:]
    return found


class TestGenerated:
    """The files are those of the table, and fit the hardware that they name."""

    def test_up_to_date(self):
        """`make docs` would change nothing."""
        assert list(recipes.outdated()) == []

    def test_out_of_date_is_noticed(self, tmp_path, monkeypatch, capsys):
        """A file that was edited by hand is named, and written again."""
        for name in ("README.md", *ROWS):
            (tmp_path / name).write_text(text_of(name), encoding="utf-8")
        (tmp_path / HAIKU_5_5).write_text(text_of(HAIKU_5_5).replace("beta: 0.1", "beta: 0.2"))
        monkeypatch.setattr(recipes, "FOLDER", tmp_path)
        monkeypatch.setattr(recipes, "PAGE", tmp_path / "README.md")
        assert recipes.main(["--check"]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line == f"{tmp_path / HAIKU_5_5} is out of date. Run `make docs`."
        assert recipes.main([]) == recipes.main(["--check"]) == 0
        assert (tmp_path / HAIKU_5_5).read_text(encoding="utf-8") == text_of(HAIKU_5_5)

    @pytest.mark.parametrize("name", PAPERS)
    def test_fits(self, name):
        """Every command at the top parses, takes 16 prompts per step, and fits the card of the line above it."""
        commands = commands_of(name)
        assert len(commands) == 6  # three for OmniOPD, and GRPO, SFT, and OPD or the cheaper form
        gpus = {"24 GB": "rtx4090", "80 GB": "h100-80", "H200": "h200"}
        for above, words in commands.items():
            launch, training = split_arguments(words, option_names(), launch_options())[::2]
            processes = int(words[words.index("--num_processes") + 1]) if "--num_processes" in words else 1
            training[1] = str(ROOT / training[1])
            script_args, args, model_args, _ = parse_args([*training, "--use_cpu", "true"])
            gpu = next((gpu for card, gpu in gpus.items() if card in above), "h100-80")
            options = Namespace(gpu=gpu, num_processes=processes, accelerate_config=launch)
            job = job_of(options, script_args, args, model_args, 1024)
            assert job.fits, (above, list(job.shortfalls()))
            assert job.rows * job.micro_batches * processes == 16
            if job.method == "omniopd":
                needed, usable = re.search(r": (\d+) of (\d+) GiB", above).groups()
                assert int(needed) == round(max(job.training_bytes, job.generation_bytes) / GIB) < int(usable)
                first, last = re.search(r"(\d+) to (\d+) seconds", above).groups()
                assert (int(first), int(last)) == (round(job.step(6540).total), round(job.step(20_480).total))
            else:
                assert args.output_dir.endswith(job.method)
            # As a file of another launch would: the baselines do not run under DeepSpeed.
            assert launch == ("single_gpu" if processes == 1 else launch)
            assert job.method == "omniopd" or processes == 1


CODE_ROW = {
    "data_source": "apps",
    "prompt": [{"role": "system", "content": "Use actions."}, {"role": "user", "content": "Add two numbers."}],
    "ability": "code",
    "reward_model": {"ground_truth": json.dumps({"inputs": ["1 2\n"], "outputs": ["3\n"]}), "style": "rule"},
    "extra_info": {"index": 0, "split": "dummy"},
}


@pytest.fixture(scope="session")
def long_student(make_tiny_model):
    """A student whose context holds the prompts of the recipes in bytes."""
    return make_tiny_model(max_position_embeddings=2048)


class TestTwoSteps:
    """The recipes run, with a tiny student and the scripted teacher."""

    @pytest.fixture
    def run_two_steps(self, long_student, tmp_path, monkeypatch, capsys):
        """A function that runs a recipe for two steps, and returns what it printed."""
        monkeypatch.chdir(tmp_path)

        def run(name, **options):
            if name.startswith("math"):
                data, rows = (
                    "data.jsonl",
                    [{"prompt": f"What is {i} + {i}?", "solution": str(2 * i)} for i in range(8)],
                )
            else:
                data, rows = "benchmark:eurus_code@./data.jsonl", [CODE_ROW] * 8
            Path("data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            smaller = {
                "model_name_or_path": str(long_student),
                "teacher_model_name_or_path": "scripted",
                "dataset_name": data,
                "use_vllm": False,
                "use_cpu": True,
                "bf16": False,
                "gradient_accumulation_steps": 2,
                "max_completion_length": 24,
                "chunk_length": 8,
                "max_steps": 2,
                "save_strategy": "no",
                "report_to": "none",
                "output_dir": "out",
            }
            settings = {**settings_of(name), **smaller, **options}
            settings.pop("dataset_config", None)  # local files have none
            Path("recipe.yaml").write_text(yaml.safe_dump(settings))
            assert train.run(["--config", "recipe.yaml"]) == 0
            return capsys.readouterr().out

        return run

    @pytest.mark.parametrize(
        "name", [pytest.param(name, marks=[] if name == HAIKU_4_5 else pytest.mark.slow) for name in PAPERS]
    )
    def test_omniopd(self, run_two_steps, name):
        """As it is."""
        printed = run_two_steps(name)
        assert re.search(r"^optimizer steps +2$", printed, re.MULTILINE)
        assert re.search(r"^teacher tokens +[1-9]", printed, re.MULTILINE)

    @pytest.mark.slow
    @pytest.mark.parametrize("name", [PAPERS[0], PAPERS[-1]])
    def test_grpo(self, run_two_steps, name):
        """With the rewards of mathematics and of code."""
        printed = run_two_steps(name, method="grpo", grpo={"num_generations": 2})
        assert re.search(r"^teacher tokens +0 read, 0 written$", printed, re.MULTILINE)

    @pytest.mark.slow
    def test_opd(self, run_two_steps, long_student):
        """With a teacher of the student's tokenizer in the process."""
        printed = run_two_steps(PAPERS[0], method="opd", teacher_model_name_or_path=str(long_student))
        assert re.search(r"^teacher tokens +[1-9][\d,]* read, 0 written$", printed, re.MULTILINE)

    @pytest.mark.slow
    def test_sft(self, run_two_steps, tmp_path):
        """On solutions in the place that `omniopd solutions` writes to."""
        folder = tmp_path / "out" / "solutions"
        folder.mkdir(parents=True)
        rows = [
            {
                "prompt": [{"role": "user", "content": f"What is {i} + {i}?"}],
                "completion": [{"role": "assistant", "content": f"We add. Answer: {2 * i}"}],
            }
            for i in range(8)
        ]
        (folder / "solutions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        assert re.search(r"^optimizer steps +2$", run_two_steps(PAPERS[0], method="sft"), re.MULTILINE)


class TestTeachers:
    """Who the recipes name."""

    @pytest.mark.usefixtures("offline")
    @pytest.mark.parametrize("name", PAPERS)
    def test_adapter(self, name, tmp_path, monkeypatch):
        """The name resolves to the provider's adapter, with the recipe's limits, without a key or a connection."""
        monkeypatch.chdir(tmp_path)
        _, args, _, _ = arguments_of(name)
        teacher = load_teacher(args.teacher_model_name_or_path, TeacherOptions.of(args))
        assert type(teacher) is ADAPTERS[args.teacher_model_name_or_path.partition(":")[0]]
        assert teacher.name == args.teacher_model_name_or_path
        assert teacher.settings.max_concurrency == args.teacher_max_concurrency
        assert teacher.budget.max_usd == args.teacher_budget_usd

    def test_all_are_here(self):
        """Every recipe but those of small models is looked at by the tests of this file."""
        assert sorted([*ROWS, "demo.yaml", "demo_paper.yaml", "smollm2_chain_sum.yaml"]) == RECIPES

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
        name = HAIKU_5_5
        capabilities = capabilities_of("anthropic", "claude-haiku-5-5")
        assert (capabilities.continuation, capabilities.takes_temperature) == ("instruct", False)
        assert settings_of(name)["teacher_model_name_or_path"] == "anthropic:claude-haiku-5-5"
        assert "teacher_temperature" not in settings_of(name)
        plain = {
            cost.recipe: float(cost.dollars[0])
            for cost in costs_of_page()
            if not cost.options and cost.dollars[0] != "none"
        }
        assert plain[HAIKU_4_5] / plain[name] == pytest.approx(9.1, abs=0.1)

    @pytest.mark.case("U7")
    def test_five_chunks(self):
        """The paper's cheaper setting stands on the page with its numbers, and costs half without a cache."""
        assert "68.38" in PAGE
        costs = {(cost.recipe, cost.options): cost for cost in costs_of_page()}
        for name in (HAIKU_4_5, HAIKU_5_5):
            all_chunks, half = (float(costs[name, options].dollars[0]) for options in ((), ("--num_chunks", "5")))
            assert half == pytest.approx(all_chunks / 2, abs=0.01)

    def test_the_papers_gemini(self):
        """The date on which the paper's teacher ends is the one that a run warns of."""
        assert capabilities_of("gemini", "gemini-2.5-flash").shutdown == date(2026, 12, 1)
        assert "2026-12-01" in PAGE
        assert "2026-12-01" in text_of(GEMINI)

    @pytest.mark.parametrize("thinking", [True, False])
    def test_vllm_continues_in_the_thought(self, thinking, tiny_tokenizer, tmp_path, monkeypatch):
        """Under Qwen3's own template the teacher reads the student's prompt and text as they are, and nothing else."""
        monkeypatch.chdir(tmp_path)
        _, args, _, _ = arguments_of(SERVED[0])
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

    @pytest.mark.parametrize("name", SERVED)
    def test_vllm_server(self, name):
        """The server that the recipe starts is the one that it asks, on this machine only, with its cache shown."""
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
        (line,) = [line for line in text_of(name).splitlines() if "omniopd solutions" in line]
        words = line.split()
        solution = 1.4 * int(words[words.index("--max_completion_length") + 1])
        assert 20_000 < solution < int(options["--max-model-len"]) - 1024

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
    def test_reproduce(self, name):
        """docs/reproduce.md has the same tokens and dollars."""
        cost = next(cost for cost in costs_of_page() if cost.recipe == name and not cost.options)
        page = (ROOT / "docs" / "reproduce.md").read_text(encoding="utf-8")
        (line,) = [line for line in page.splitlines() if line.startswith(f"| `{name.removesuffix('.yaml')}` |")]
        read, written = (int(tokens.replace(",", "")) / 1e6 for tokens in cost.tokens[1:])
        no_cache, _, best_cache, sft = cost.dollars
        assert f" | {read:,.1f} + {written:,.1f} M | {best_cache} to {no_cache} dollars | " in line
        assert line.endswith(f" M | {sft} dollars |")

    @pytest.mark.parametrize("name", LIMITED)
    def test_budget_covers_the_forecast(self, name):
        """The budget is above the dearest of the three prices, by no more than half of it."""
        cost = next(cost for cost in costs_of_page() if cost.recipe == name and not cost.options)
        budget = settings_of(name)["teacher_budget_usd"]
        assert 1.1 < budget / float(cost.dollars[0]) < 1.5

    def test_forecast_needs_max_steps(self, capsys):
        """The other recipes have no number of steps until their data is read, which is said."""
        command = ["cost", "--config", str(FOLDER / SERVED[0]), "--prompt_length", "200"]
        assert main(command) == 2
        assert ConfigError.__name__ in capsys.readouterr().err
