# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""The `omniopd` command, as a user runs it."""

import json
import math
import re
import subprocess
import sys

import pytest
import yaml
from transformers import TrainerState

from omniopd_trl.cli.main import main
from omniopd_trl.cli.recipe import load_splits, parse_args
from omniopd_trl.data.prompts import prepare_prompts
from omniopd_trl.teachers import TeacherOptions, load_teacher
from omniopd_trl.teachers.instruct.prompt import render_messages
from omniopd_trl.trainer.omniopd_config import OmniOPDConfig
from omniopd_trl.trainer.plan import _per_step, length_of, plan
from tests.support import ROOT
from tests.support.training import make_trainer, questions

QUESTIONS = ["What is 3 + 4?", "What is five and six?", "Tom has 3 apples and buys 4 more. How many has he now?"]


@pytest.fixture
def recipe(tmp_path, tiny_model_dir):
    """A function that writes a recipe for nine questions and a teacher behind a service, and returns its path."""
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"question": text, "answer": "7"}) + "\n" for text in 3 * QUESTIONS))

    def write(**settings):
        path = tmp_path / "recipe.yaml"
        values = {
            "model_name_or_path": str(tiny_model_dir),
            "teacher_model_name_or_path": "anthropic:claude-haiku-4-5",
            "dataset_name": str(data),
            "output_dir": str(tmp_path / "out"),
            "bf16": True,
            "report_to": "none",
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 4,
            "max_steps": 5,
            "max_completion_length": 6340,
            **settings,
        }
        path.write_text(yaml.safe_dump({key: value for key, value in values.items() if value is not None}))
        return str(path)

    return write


@pytest.fixture
def forecast(recipe, capsys):
    """A function that runs `omniopd cost` and returns its lines, by their names."""

    def run(*options, **settings):
        code = main(["cost", "--config", recipe(**settings), *map(str, options)])
        captured = capsys.readouterr()
        assert code == 0, captured.err
        rows = {}
        for line in captured.out.splitlines():
            name, _, values = line.strip().partition("  ")
            rows[name] = values.strip()
        return rows

    return run


def numbers(row):
    """The numbers of a row: trajectory, step, run, SFT."""
    return [float(word.replace(",", "")) for word in row.split()]


class TestCost:
    """`omniopd cost`."""

    @pytest.mark.parametrize(
        ("settings", "step", "most"),
        [
            ({}, ["a step    8 prompts x up to 10 chunks x 10 rollouts"], ""),
            (
                {"num_branches": 7, "num_rollouts": 1},
                [
                    "a step    8 prompts x up to 10 forks x 1 rollout",
                    "branches  the student writes 7 more at each fork; the teacher is asked where they differ",
                ],
                "at most ",
            ),
        ],
    )
    def test_the_plan_of_the_run_has_the_same_numbers(self, forecast, recipe, tiny_tokenizer, settings, step, most):
        """What the trainer prints when training begins."""
        settings = {"teacher_budget_usd": 100.0, "bf16": False, "use_cpu": True, **settings}
        rows = forecast(**settings)
        script_args, args, _, dataset_args = parse_args(["--config", recipe(**settings)])
        dataset = prepare_prompts(load_splits(script_args, dataset_args)["train"], None)
        lines = plan(
            args,
            TrainerState(max_steps=5, global_step=2),
            student="tiny",
            teacher=load_teacher("anthropic:claude-haiku-4-5", TeacherOptions.of(args)),
            tokenizer=tiny_tokenizer,
            dataset=dataset,
            num_processes=1,
            recorded=(3, 20),
        ).splitlines()
        run = {name: rows[name].split()[2] for name in ("requests", "prompt tokens", "completion tokens")}
        usd = rows["dollars, no prompt cache"].split()[2]
        assert lines == [
            "student   tiny",
            "teacher   anthropic:claude-haiku-4-5",
            *step,
            "the run   5 steps (2 done)",
            f"forecast  {most}{run['prompt tokens']} tokens read and {run['completion tokens']} written by the "
            "teacher, with completions of 6,340 tokens (max_completion_length)",
            f"requests  {most}{run['requests']}, for 1 sample each",
            f"price     {most}{usd} dollars without a prompt cache, and the budget is 100.00",
            "replayed  3 recorded steps with 20 finished audits, which are not paid again",
        ]

    def test_a_verifier(self, forecast, capsys, recipe):
        """Groups share a prompt, and what a choice of trajectories saves is not known."""
        settings = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "max_steps": 5}
        plain, rows = forecast(**settings), forecast(num_generations=4, **settings)
        assert plain["run"] == "5 steps of 8 prompts"
        assert rows["run"] == "5 steps of 2 prompts, 4 trajectories each"
        assert rows["requests"].split()[:3] == plain["requests"].split()[:3]
        path = recipe(audit_trajectories="mixed", num_generations=4, **settings)
        assert main(["cost", "--config", path]) == 0
        assert "audit_trajectories='mixed' audits a part of the trajectories" in capsys.readouterr().out
        args = OmniOPDConfig("out", use_cpu=True, bf16=False, audit_trajectories="mixed", num_generations=4)
        assert _per_step(args, 8) == "2 prompts x 4 completions, of which the mixed are audited,"

    def test_what_is_left_out(self, forecast):
        """Branches and a gate leave out chunks that the forecast counts. A measured number has none of these."""
        settings = {"num_branches": 7, "min_anchor_entropy": 0.1, "num_rollouts": 1}
        note = (
            "min_anchor_entropy=0.1 leaves out chunks where the student is certain, and num_branches=7 leaves out "
            "forks whose branches have one text. All are counted, the upper bound: pass the logged audit/num_chunks "
            "with --chunks_per_trajectory."
        )
        for options, requests, is_noted in (([], 10, True), (["--chunks_per_trajectory", 3], 3, False)):
            rows = forecast(*options, **settings)
            assert numbers(rows["requests"])[0] == requests
            assert (note in rows) is is_noted

    def test_table(self, forecast, tiny_tokenizer):
        """Real prompt lengths, the model's price and its samples per request; step and run follow from the recipe."""
        rows = forecast("--trajectory_length", 2000)
        chats = [[{"role": "user", "content": text}] for text in QUESTIONS]
        encoded = tiny_tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, tokenize=True, return_dict=True
        )["input_ids"]
        mean = sum(map(len, encoded)) / 3
        prompt = 100 * (mean + 1000)
        assert rows["samples per request"] == "1 of N = 10"
        assert rows["price"].startswith("1 in, 5 out, 0.1 read from the cache, 1.25 written to it")
        assert rows["prompts"].startswith(f"9 of 9 measured: {mean:.1f} tokens on average")
        assert rows["trajectory length"] == "2,000 tokens, as given"
        assert rows["run"] == "5 steps of 8 prompts"
        assert numbers(rows["requests"]) == [100, 800, 4000, 9]
        assert numbers(rows["prompt tokens"])[:3] == pytest.approx([prompt, 8 * prompt, 40 * prompt], abs=1)
        assert numbers(rows["prompt tokens"])[3] == pytest.approx(9 * mean, abs=1)
        assert numbers(rows["completion tokens"]) == [7000, 56_000, 280_000, 18_000]
        assert numbers(rows["of them compared"]) == [5000, 40_000, 200_000, 18_000]
        usd = (prompt + 7000 * 5) / 1e6
        assert numbers(rows["dollars, no prompt cache"])[:3] == pytest.approx([usd, 8 * usd, 40 * usd], abs=0.005)
        assert numbers(rows["dollars, no prompt cache"])[3] == pytest.approx((9 * mean + 18_000 * 5) / 1e6, abs=1e-4)
        # Prompts of about a thousand tokens are too short for this model's cache.
        assert numbers(rows["a cache per chunk serves"])[0] == 0

    def test_marks(self, forecast, capsys, recipe):
        """One request reads the whole trajectory; a cascade adds a share of the rollouts."""
        plain, judge = (forecast("--trajectory_length", 2000, **s) for s in ({}, {"signal": "judge"}))
        half = forecast("--trajectory_length", 2000, "--rollout_share", 0.5, signal="cascade")
        branches = forecast("--trajectory_length", 2000, signal="judge", num_branches=7)
        assert judge["samples per request"] == "1, with all marks of a trajectory"
        assert numbers(judge["requests"])[0] == 1
        assert numbers(judge["completion tokens"])[0] == 50
        assert numbers(branches["completion tokens"])[0] == 400
        read = {name: numbers(rows["prompt tokens"])[0] for name, rows in (("plain", plain), ("judge", judge))}
        assert 2000 < read["judge"] < read["plain"] / 25
        assert numbers(branches["prompt tokens"])[0] > read["judge"] + 80 * 50
        assert numbers(half["prompt tokens"])[0] == pytest.approx(read["judge"] + read["plain"] / 2, abs=2)
        assert numbers(half["requests"])[0] == 51
        assert main(["cost", "--config", recipe(), "--rollout_share", "0.5"]) == 2
        assert "--rollout_share 0.5 has no effect with signal='rollouts'" in capsys.readouterr().err

    def test_first_rollouts(self, forecast, capsys, recipe, tmp_path):
        """The share of chunks that stop is given, or measured by a run or a probe, or 0, the upper bound."""
        settings = {"first_rollouts": 3, "output_dir": str(tmp_path)}

        def rollouts(*options):
            rows = forecast("--trajectory_length", 2000, *options, **settings)
            return numbers(rows["requests"])[0], rows["first rollouts"]

        assert rollouts() == (100, "3, and no more for 0% of the chunks, assumed: the upper bound of the cost")
        assert rollouts("--stopped_share", 0.5) == (65, "3, and no more for 50% of the chunks, as given")
        probe = tmp_path / "probe" / "probe.json"
        probe.parent.mkdir()
        probe.write_text(json.dumps({"measured": {"duplicates": 0.5}}))
        assert rollouts() == (82, f"3, and no more for 25% of the chunks, measured in {probe}")
        state = tmp_path / "checkpoint-2" / "trainer_state.json"
        state.parent.mkdir()
        state.write_text(json.dumps({"log_history": [{"audit/frac_stopped": share} for share in (0.2, 0.4)]}))
        assert rollouts() == (79, f"3, and no more for 30% of the chunks, measured in {state.parent}")
        assert main(["cost", "--config", recipe(), "--stopped_share", "0.5"]) == 2
        assert "--stopped_share 0.5 has no effect with first_rollouts=0" in capsys.readouterr().err

    def test_cache(self, forecast):
        """Longer prompts are cached, and a cache makes the run cheaper."""
        rows = forecast("--trajectory_length", 16_000, max_completion_length=16_000)
        none, chunk, trajectory = (
            numbers(rows[f"dollars, {name}"])[2]
            for name in ("no prompt cache", "a cache per chunk", "a cache per trajectory")
        )
        assert none > chunk > trajectory
        assert 0 < numbers(rows["a cache per chunk serves"])[0] < numbers(rows["a cache per trajectory serves"])[0]

    def test_options_win_over_the_recipe(self, forecast):
        """Any option of the training command may follow."""
        rows = forecast(
            "--num_chunks",
            5,
            "--max_steps=2",
            "--num_processes",
            3,
            "--samples_per_request",
            4,
            gradient_accumulation_steps=1,
        )
        assert rows["chunks"] == "at most M = 5 of C = 50 tokens"
        assert rows["run"] == "2 steps of 6 prompts"
        assert numbers(rows["requests"])[0] == 15

    @pytest.mark.parametrize(
        ("epochs", "batch", "accumulation", "steps"),
        # Of nine rows, those that do not fill a step are left out of each epoch.
        [(1, 1, 2, 4), (3, 1, 2, 12), (0.5, 1, 2, 2), (2, 2, 2, 4), (1.5, 1, 1, 14), (2, 9, 1, 2), (2, 5, 1, 2)],
    )
    def test_steps_from_epochs(self, forecast, tmp_path, tiny_model_dir, epochs, batch, accumulation, steps):
        """Without `max_steps`, there are as many as a run of the same settings really takes."""
        settings = {
            "num_train_epochs": epochs,
            "per_device_train_batch_size": batch,
            "gradient_accumulation_steps": accumulation,
        }
        rows = forecast(max_steps=None, **settings)
        assert rows["run"] == f"{steps} steps of {batch * accumulation} prompts"
        trainer = make_trainer(
            tmp_path / "run", tiny_model_dir, dataset=questions(9), max_steps=-1, max_completion_length=10, **settings
        )
        trainer.train()
        assert trainer.state.global_step == steps

    def test_steps_of_several_processes(self, forecast):
        """Each process has its part of a step: of nine rows, two steps of four."""
        rows = forecast("--num_processes", 2, max_steps=None, gradient_accumulation_steps=1)
        assert rows["run"] == "6 steps of 4 prompts"

    def test_length_of_trajectories(self, forecast, tmp_path):
        """Assumed from the recipe; measured where a checkpoint says; given where it is."""
        assert forecast()["trajectory length"].startswith("6,340 tokens, assumed")
        folder = tmp_path / "out" / "checkpoint-2"
        folder.mkdir(parents=True)
        history = [{"completions/mean_length": 900.0}, {"loss": 1.0}, {"completions/mean_length": 1100.0}]
        (folder / "trainer_state.json").write_text(json.dumps({"log_history": history}))
        rows = forecast()
        assert rows["trajectory length"] == f"1,000 tokens, measured in {folder}"
        assert forecast("--trajectory_length", 50)["trajectory length"] == "50 tokens, as given"
        (folder / "trainer_state.json").write_text("{")
        assert "assumed" in forecast()["trajectory length"]

    def test_some_prompts(self, forecast):
        """Measuring some prompts changes no number of steps."""
        rows = forecast(
            "--max_prompts",
            2,
            max_steps=None,
            num_train_epochs=4,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=1,
        )
        assert rows["prompts"].startswith("2 of 9 measured")
        assert rows["run"] == "36 steps of 1 prompts"

    def test_stream(self, forecast):
        """Of a stream the first prompts are measured."""
        rows = forecast("--max_prompts", 2, dataset_streaming=True)
        assert rows["prompts"].startswith("2 of a stream measured")

    @pytest.mark.parametrize("teacher", ["anthropic:claude-haiku-4-5", "openai:gpt-6-luna"])
    def test_without_dataset_and_tokenizer(self, recipe, capsys, teacher):
        """A prompt length that is given needs neither the dataset nor the student, and says what it assumes."""
        settings = {"model_name_or_path": "no/model", "dataset_name": "no/data", "teacher_model_name_or_path": teacher}
        command = ["cost", "--config", recipe(**settings), "--prompt_length", "200", "--trajectory_length", "6340"]
        assert main(command) == 0
        printed = capsys.readouterr().out
        assert re.search(r"^prompts +200 tokens, as given$", printed, re.MULTILINE)
        assert re.search(r"^run +5 steps of 8 prompts$", printed, re.MULTILINE)
        assert ("at 4 letters per token" in printed) == teacher.startswith("openai:")
        if teacher.startswith("anthropic:"):
            assert re.search(r"^prompt tokens +337,000 ", printed, re.MULTILINE)

    def test_instruction_of_a_cascade(self, recipe, capsys):
        """A teacher that continues exactly is instructed as a judge only."""
        settings = {"teacher_model_name_or_path": "anthropic:claude-haiku-4-5", "signal": "cascade", "num_branches": 7}
        path = recipe(**settings, min_anchor_entropy=0.1)
        assert main(["cost", "--config", path, "--prompt_length", "200", "--trajectory_length", "6340"]) == 0
        assert re.search(r"at 4 letters per token: [1-9]\d* tokens", capsys.readouterr().out)

    @pytest.mark.case("F7")
    @pytest.mark.parametrize(
        ("settings", "samples", "price"),
        [
            ({"teacher_model_name_or_path": "azure:gpt-6-luna"}, 8, "0.1 in, 0.5 out"),
            (
                {"teacher_model_name_or_path": "bedrock:us.anthropic.claude-haiku-4-5-20251001-v1:0"},
                1,
                "1.1 in, 5.5 out",
            ),
            ({"teacher_model_name_or_path": "vertex:gemini-2.5-flash"}, 8, "0.3 in, 2.5 out"),
            (
                {
                    "teacher_model_name_or_path": "openai:openai/gpt-6-luna",
                    "teacher_base_url": "https://openrouter.ai/api/v1",
                },
                8,
                "0.1 in, 0.5 out",
            ),
        ],
        ids=lambda value: value["teacher_model_name_or_path"] if isinstance(value, dict) else "",
    )
    def test_clouds_and_routers(self, forecast, settings, samples, price):
        """Their names have the capabilities and the price of the model, without a key or a package of theirs."""
        rows = forecast("--prompt_length", 200, **settings)
        assert rows["samples per request"] == f"{samples} of N = 10"
        assert rows["price"].startswith(price)

    def test_letters_per_token(self, tiny_tokenizer):
        """The instruction's estimate is that of its letters."""
        instruction = render_messages("", "So the")
        assert 200 < length_of(instruction, None) < length_of(instruction, tiny_tokenizer)

    def test_chunks_of_a_log(self, forecast):
        """What a run has logged replaces what is assumed of its chunks."""
        rows = forecast("--trajectory_length", 2000, "--chunks_per_trajectory", 7.5, "--rollout_tokens", 90)
        assert rows["chunks"].endswith("7.5 on average, as given; 90 tokens per rollout, as given")
        assert numbers(rows["requests"])[0] == 75
        assert numbers(rows["completion tokens"])[0] == 75 * 90

    @pytest.mark.parametrize("teacher", ["openai:gpt-6-luna", "vllm:Qwen/Qwen3-32B", "some/model"])
    def test_prices_of_the_recipe(self, forecast, teacher):
        """Prices of the recipe win over the table, and price a self-hosted server."""
        rows = forecast(
            teacher_model_name_or_path=teacher, teacher_input_price=2.0, teacher_output_price=3.0, num_rollouts=1
        )
        assert rows["price"].startswith("2 in, 3 out (dollars per million tokens, from the recipe")
        prompt, completion = numbers(rows["prompt tokens"])[2], numbers(rows["completion tokens"])[2]
        assert numbers(rows["dollars, no prompt cache"])[2] == pytest.approx(
            (prompt * 2 + completion * 3) / 1e6, rel=0.01
        )

    def test_instruction(self, forecast):
        """A teacher that has to be instructed reads the instruction with every prompt."""
        prefilled = forecast(teacher_model_name_or_path="anthropic:claude-haiku-4-5")
        instructed = forecast(teacher_model_name_or_path="anthropic:claude-haiku-4-5", teacher_continuation="instruct")
        assert numbers(instructed["prompt tokens"])[0] > numbers(prefilled["prompt tokens"])[0] + 100 * 50

    def test_no_price(self, forecast):
        """Without a price there are tokens, and a line that says what to set."""
        rows = forecast(teacher_model_name_or_path="vllm:Qwen/Qwen3-32B")
        assert "teacher_input_price" in rows["price"]
        assert "dollars, no prompt cache" not in rows
        for teacher in ("some/model", "scripted"):
            assert forecast(teacher_model_name_or_path=teacher)["price"] == "none: the teacher is not behind a service"
        assert rows["samples per request"] == "10 of N = 10"

    @pytest.mark.parametrize(("usd", "verdict"), [(1e6, "is enough"), (0.01, "is not enough")])
    def test_budget(self, recipe, capsys, usd, verdict):
        """The forecast is held against the budget of the recipe."""
        assert main(["cost", "--config", recipe(teacher_budget_usd=usd)]) == 0
        assert f"teacher_budget_usd={usd:g} {verdict}" in capsys.readouterr().out

    def test_more_that_costs(self, recipe, capsys):
        """What the forecast leaves out is said where the recipe asks for it."""
        assert main(["cost", "--config", recipe(audit_eval=True, chunk_overlap="merge")]) == 0
        printed = capsys.readouterr().out
        assert "requests during evaluation (audit_eval, evaluate_teacher) come on top" in printed
        assert "chunk_overlap='merge'" in printed
        given = ["--chunks_per_trajectory", "6", "--rollout_tokens", "120"]
        assert main(["cost", "--config", recipe(chunk_overlap="merge"), *given]) == 0
        assert "chunk_overlap='merge'" not in capsys.readouterr().out

    def test_reasoning(self, recipe, capsys):
        """A model that always reasons may write more than the forecast has, which is said unless it was measured."""
        path = recipe(teacher_model_name_or_path="gemini:gemini-2.5-pro")
        assert main(["cost", "--config", path]) == 0
        assert "cannot be switched off: a sample may take up to 256" in capsys.readouterr().out
        assert main(["cost", "--config", path, "--rollout_tokens", "150"]) == 0
        assert "cannot be switched off" not in capsys.readouterr().out


class TestMethods:
    """What the baselines take from a teacher."""

    def test_sft(self, recipe, capsys):
        """The requests of `omniopd solutions`: the column that the forecast of OmniOPD has beside its own."""
        path = recipe(teacher_budget_usd=1.0)
        options = ["--config", path, "--solution_length", "500"]
        assert main(["cost", *options]) == 0
        beside = capsys.readouterr().out
        assert main(["cost", *options, "--method", "sft"]) == 0
        printed = capsys.readouterr().out
        assert re.search(r"^solution length +500 tokens, as given$", printed, re.MULTILINE)
        for name in ("requests", "prompt tokens", "completion tokens", "dollars, no prompt cache"):
            (last,) = re.findall(rf"^{name} .* (\S+)$", beside, re.MULTILINE)
            assert re.search(rf"^{name} +{last}$", printed, re.MULTILINE)
        assert "cached" not in printed
        assert "of them compared" not in printed
        assert re.search(r"^teacher_budget_usd=1 is enough", printed, re.MULTILINE)
        assert "`omniopd solutions` sends the requests" in printed

    @pytest.mark.parametrize(
        ("method", "teacher", "shown"),
        [
            ("grpo", None, "none"),
            ("grpo", "anthropic:claude-haiku-4-5", "none"),
            ("opd", "some/model", "some/model, in the same process"),
        ],
    )
    def test_no_service(self, recipe, capsys, method, teacher, shown):
        """GRPO asks nobody, OPD a model in the process."""
        assert main(["cost", "--config", recipe(method=method, teacher_model_name_or_path=teacher)]) == 0
        printed = capsys.readouterr().out
        assert re.search(rf"^teacher +{shown}", printed, re.MULTILINE)
        assert "requests" not in printed
        assert f"method='{method}' sends no request to a service. --gpu adds memory and time." in printed


class TestHardware:
    """`--gpu`."""

    def test_the_page(self, capsys, tmp_path, monkeypatch):
        """What docs/scaling.md shows is what its command prints, and what another GPU says."""
        page = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
        command = re.search(r"^omniopd (cost .+)$", page, re.MULTILINE)[1].split()
        command[2] = str(ROOT / command[2])
        shown, other = re.findall(r"^```text\n(.+?)\n```$", page, re.MULTILINE | re.DOTALL)
        monkeypatch.chdir(tmp_path)
        assert main(command) == 0
        assert shown in capsys.readouterr().out
        assert main([*command[:-1], "a100-40"]) == 0
        assert other in capsys.readouterr().out

    def test_small_student(self, forecast, tiny_model_dir):
        """Any student whose configuration can be read; generation with transformers; lengths of the data."""
        rows = forecast("--gpu", "l4", "--trajectory_length", 900)
        assert rows["hardware"].startswith("L4, 21.2 GiB of it usable; single_gpu, full fine-tuning, adamw_torch")
        assert rows["fits"] == "yes"
        prompt = float(re.search(r"([\d.]+) tokens on average, at most (\d+)", rows["prompts"])[1])
        longest = int(re.search(r"at most (\d+)", rows["prompts"])[1])
        assert rows["seconds per step"].endswith(f"trajectories of {900 + prompt:,.0f} tokens with prompt")
        assert rows["all at the longest"].endswith(f"trajectories of {6340 + longest:,} tokens with prompt")

    def test_launch(self, forecast):
        """Several GPUs are DDP, unless another launch is named."""
        two = {"gradient_accumulation_steps": 1}
        hardware = forecast("--gpu", "l4", "--num_processes", 2, **two)["hardware"]
        assert hardware.startswith("2 x L4, 21.2 GiB of it usable; multi_gpu,")
        words = ("--num_processes", 2, "--accelerate_config", "zero3", "--use_peft", "true")
        rows = forecast("--gpu", "l4", *words, **two)
        assert "; zero3, LoRA," in rows["hardware"]
        words = ("--num_processes", 2, "--accelerate_config", "fsdp2", "--gpu", "h100-80")
        ours, *others = (forecast(*words, method=method, **two) for method in ("omniopd", "sft", "grpo"))
        assert all(other["memory of training"] == ours["memory of training"] for other in others), "an upper bound"

    def test_engine(self, forecast):
        """A colocated vLLM that sleeps, a server, and a limit that is reached before the GPU's."""
        settings = {"use_vllm": True, "vllm_enable_sleep_mode": True, "teacher_requests_per_minute": 60}
        rows = forecast("--gpu", "h100-80", "--trajectory_length", 2000, **settings)
        assert "22.4 vLLM, whose cache holds" in rows["memory of generation"]
        assert "vLLM" not in rows["memory of training"]
        assert rows["the teacher's limits"] == "at least 800 seconds per step for its requests"
        rows = forecast("--gpu", "h100-80", use_vllm=True, vllm_mode="server", vllm_max_model_length=2048)
        assert rows["memory of generation"].endswith("vLLM is on other GPUs")
        assert rows["all at the longest"].split(";")[1] == " trajectories of 2,048 tokens with prompt"

    @pytest.mark.parametrize(
        ("settings", "note"),
        [
            ({"optim": "adafactor"}, "optim=adafactor is counted as AdamW"),
            ({"use_peft": True}, "lora_dropout=0.05 keeps a copy"),
            ({"num_branches": 2}, "At most 980 tokens are computed beside a trajectory, and 1,000 are sampled"),
            (
                {"rollout_imitation": 0.5, "min_anchor_entropy": 0.1},
                "At most 200 tokens are computed beside a trajectory:",
            ),
            ({"num_branches": 2, "attn_implementation": "eager"}, "attn_implementation=eager: its scores"),
            ({"num_branches": 2, "attn_implementation": "flash_attention_2"}, "each branch is a row with its prefix"),
            ({"teacher_model_name_or_path": "Qwen/Qwen3-1.7B"}, "teacher in the same process are not counted"),
            ({"use_vllm": True, "vllm_mode": "server"}, "counted as one GPU of the same kind"),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_notes(self, recipe, capsys, settings, note):
        """What is not counted is said."""
        assert main(["cost", "--config", recipe(**settings), "--gpu", "h200"]) == 0
        assert note in capsys.readouterr().out

    def test_branches(self, capsys):
        """A recipe that fits without branches and not with them, and what it takes; the baselines have none."""
        name = str(ROOT / "recipes" / "math_qwen3_4b_from_claude_haiku_5_5.yaml")
        lengths = ["--prompt_length", "200", "--trajectory_length", "6340", "--gpu", "h100-80"]
        branches = ["--num_branches", "7", "--min_anchor_entropy", "0.1", "--scale_advantages", "true"]

        def printed(*options):
            assert main(["cost", "--config", name, *lengths, *options]) == 0
            lines = capsys.readouterr().out.splitlines()
            return {line[:22].strip(): line[22:] for line in lines if line[20:22] == "  "}, "\n".join(lines)

        rows, text = printed()
        assert rows["fits"] == "yes"
        assert "branches" not in text
        rows, text = printed(*branches)
        size = re.search(r"no: ([\d.]+) GiB short in training; with (.+) it takes", rows["fits"])
        assert rows["fits"].endswith("fits; without branches and imitation it fits")
        assert size[2] == "--per_device_train_batch_size 1 --gradient_accumulation_steps 16"
        rows, text = printed(*branches, *size[2].split())
        assert rows["fits"] == "yes"
        assert re.search(r"activations \([\d.]+ of them for branches and imitation\)", rows["memory of training"])
        rows, text = printed(*branches, *size[2].split(), "--attn_implementation", "flash_attention_2")
        assert "with --attn_implementation sdpa it takes" in rows["fits"]
        plain, branched = (printed("--method", "grpo", *options)[1] for options in ([], branches))
        assert branched == plain

    @pytest.mark.parametrize(
        ("settings", "options", "code", "message"),
        [
            ({"gradient_checkpointing": False}, [], 2, "gradient_checkpointing=False: the memory of all layers'"),
            ({"use_peft": True, "load_in_4bit": True}, [], 2, "memory of a quantized student is not known"),
            ({}, ["--accelerate_config", "single_gpu", "--num_processes", "2"], 2, "Leave out one of them"),
            ({"optim": "adamw_bnb_8bit"}, ["--accelerate_config", "zero3"], 2, "known for single_gpu and multi_gpu"),
            ({"use_peft": True, "lora_target_modules": ["x"]}, [], 2, "the size of the adapter is not known"),
            ({"model_name_or_path": "no/model", "max_steps": 1}, ["--prompt_length", "9"], 1, "sizes of 'no/model'"),
            ({"method": "opd"}, [], 2, "the teacher 'anthropic:claude-haiku-4-5' returns text"),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_refused(self, recipe, capsys, settings, options, code, message):
        """What the formulas do not describe is one line."""
        assert main(["cost", "--config", recipe(**settings), "--gpu", "h100-80", *options]) == code
        captured = capsys.readouterr()
        assert message in captured.err.splitlines()[-1]
        assert "measured" not in captured.out

    def test_a_launch_without_a_gpu(self, recipe, capsys):
        assert main(["cost", "--config", recipe(), "--accelerate_config", "zero3"]) == 2
        assert "--accelerate_config zero3 has no effect without --gpu" in capsys.readouterr().err

    def test_unknown(self, recipe, capsys):
        """The error of an unknown GPU lists the known ones."""
        with pytest.raises(SystemExit):
            main(["cost", "--config", recipe(), "--gpu", "h300"])
        assert "h100-80" in capsys.readouterr().err


class TestErrors:
    """What goes wrong is one line, and an exit code."""

    @pytest.mark.parametrize(
        ("settings", "options", "code", "message"),
        [
            ({"model_name_or_path": None}, [], 2, "does not set `model_name_or_path`"),
            ({"teacher_model_name_or_path": None}, [], 2, "does not set `teacher_model_name_or_path`"),
            ({"model_name_or_path": "./none"}, [], 1, "no model folder './none' (`model_name_or_path`; looked in"),
            ({"model_name_or_path": "no/model"}, [], 1, "No tokenizer can be loaded for the student 'no/model'"),
            ({"model_name_or_path": "no/model"}, [], 1, "length of a prompt with `--prompt_length`"),
            ({"dataset_name": "./none.jsonl"}, [], 1, "no dataset file"),
            ({"dataset_name": None}, [], 2, "No dataset is named"),
            ({"dataset_train_split": "none"}, [], 1, "no split 'none'"),
            (
                {"per_device_train_batch_size": 3},
                [],
                1,
                "Nothing would be trained: the training set has 9 rows, and a",
            ),
            ({"max_steps": None}, ["--num_processes", "2"], 1, "step takes 16 (per_device_train_batch_size=2 x"),
            ({"dataset_streaming": True, "max_steps": None}, [], 2, "streaming dataset has no length"),
            ({"num_chunk": 3}, [], 2, "Did you mean `num_chunks`?"),
            ({}, ["--num_chunk", "3"], 2, "Did you mean `num_chunks`?"),
            ({"max_steps": None}, ["--prompt_length", "200"], 2, "Add `--max_steps`"),
            ({}, ["--chunks_per_trajectory", "12"], 2, "chunks_per_trajectory=12.0 must be between 0 and num_chunks"),
            ({"teacher_cached_price": 1.0}, [], 2, "teacher_cached_price=1.0, without teacher_input_price"),
        ],
    )
    def test_refused(self, recipe, capsys, settings, options, code, message):
        """Settings that cannot be used give 2, data that cannot be read 1, and no table."""
        assert main(["cost", "--config", recipe(**settings), *options]) == code
        captured = capsys.readouterr()
        assert message in captured.err
        assert captured.out == ""

    @pytest.mark.case("U5")
    @pytest.mark.parametrize("missing", ["model_name_or_path", "dataset_name"])
    def test_without_a_network(self, recipe, capsys, missing):
        """A student or a dataset of the Hub that is not in the cache: the option that needs neither is named."""
        assert main(["cost", "--config", recipe(**{missing: "Nobody/nothing"})]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("DataError: ")
        assert "'Nobody/nothing'" in line
        assert "give the mean length of a prompt with `--prompt_length`, and the steps with `--max_steps`" in line

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ([], "COMMAND"),
            (["costs"], "invalid choice"),
            (["cost", "--config", "x", "--trajectory_length", "0"], "must be a number above 0"),
            (["cost", "--config", "x", "--trajectory_length", "nan"], "must be a number above 0"),
            (["cost", "--config", "x", "--max_prompts", "1.5"], "must be a whole number"),
            (["cost", "--config", "x", "--max_prompts", "1", "--prompt_length", "9"], "not allowed with"),
        ],
    )
    def test_command_line(self, capsys, arguments, message):
        """A command line that cannot be parsed exits with 2 and says why."""
        with pytest.raises(SystemExit) as exit_:
            main(arguments)
        assert exit_.value.code == 2
        assert message in capsys.readouterr().err

    def test_missing_recipe(self, capsys):
        """So does a recipe that is not there."""
        assert main(["cost", "--config", "none.yaml"]) == 2
        assert "'none.yaml' cannot be read" in capsys.readouterr().err


def test_help_is_quick():
    """`--help` loads neither torch nor a model library."""
    code = (
        "import sys\nfrom omniopd_trl.cli.main import main\n"
        "try:\n    main(['cost', '--help'])\nexcept SystemExit as e:\n    assert e.code == 0\n"
        "print(sorted({'torch', 'transformers', 'trl', 'datasets'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60, cwd=ROOT
    )
    assert done.stdout.rstrip().endswith("[]")
    assert "--trajectory_length" in done.stdout


def test_nothing_is_sent(forecast, monkeypatch):
    """No key is needed, and no connection is opened."""
    import socket

    def refuse(*args, **kwargs):
        raise AssertionError("a connection was opened")

    monkeypatch.delenv("ANTHROPIC_API_KEY", raising=False)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    assert math.isfinite(numbers(forecast()["dollars, no prompt cache"])[2])
