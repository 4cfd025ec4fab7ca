# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""`omniopd ablate`: plans, runs that continue, and the table."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import psutil
import pyarrow
import pyarrow.parquet
import pytest
import yaml

from omniopd_trl.cli.ablate import command, processes
from omniopd_trl.cli.ablate.plan import (
    _SOLUTIONS_KEYS,
    FINISHED,
    LOG,
    RECIPE,
    Plan,
    Row,
    distinct,
    jobs_of,
    read_plan,
)
from omniopd_trl.cli.ablate.processes import words_of
from omniopd_trl.cli.ablate.results import Result, markdown, read_result, summarize
from omniopd_trl.cli.main import main, make_parser
from omniopd_trl.errors import ConfigError, DataError
from omniopd_trl.evals.copying import copied_share
from omniopd_trl.journal.file import journals_of
from omniopd_trl.report.runs import Run
from omniopd_trl.teachers import Usage
from tests.support import ROOT
from tests.support.commands import ENVIRONMENT
from tests.support.journals import journal
from tests.support.training import questions

PLANS = sorted((ROOT / "recipes" / "plans").glob("*.yaml"))


@pytest.fixture(autouse=True, scope="module")
def _control_c():
    """A shell that starts pytest in the background makes it ignore the signal, and with it all that it starts."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.stem)
def test_the_shipped_plans_are_valid(path, tmp_path):
    plan = read_plan(str(path))
    jobs = jobs_of(plan, tmp_path)
    assert len(jobs) == len(plan.rows) * len(plan.seeds)
    assert len(plan.rows) >= 2
    assert len(plan.seeds) >= 3
    assert len({job.folder for job in jobs}) == len(jobs)
    # Each row but the first differs from the recipe.
    assert all(any(plan.recipe.get(k) != v for k, v in row.options.items()) for row in plan.rows[1:])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": []}, "needs `rows`"),
        ({"rows": None}, "needs `rows`"),
        ({"row": []}, "`row`"),
        ({"rows": [{"options": {}}]}, "it needs a `name`"),
        ({"rows": [{"name": "a", "option": {}}]}, "`option`"),
        ({"rows": [{"name": "a"}, {"name": "A!"}]}, "the same name"),
        ({"rows": [{"name": "a", "options": {"num_chunk": 3}}]}, "num_chunk"),
        ({"options": {"num_chunk": 3}}, "num_chunk"),
        ({"options": ["num_chunks"]}, "must be a mapping"),
        ({"options": {"num_chunks": "many"}}, "must be of type int"),
        ({"rows": [{"name": "a", "options": ["num_chunks"]}]}, "must be a mapping"),
        ({"rows": [{"name": "a", "options": {"num_chunks": "many"}}]}, "must be of type int"),
        ({"rows": [{"name": "a", "options": {"method": "gpro"}}]}, "method='gpro' is unknown"),
        ({"rows": [{"name": "a", "options": {"grpo": {"num_generation": 4}}}]}, "num_generation"),
        ({"rows": [{"name": "a", "solutions": 64}]}, "must be a mapping"),
        ({"rows": [{"name": "a", "solutions": {"num_promts": 64}}]}, "num_promts"),
        ({"seeds": []}, "`seeds` is"),
        ({"seeds": "0"}, "`seeds` is"),
        ({"config": "nowhere.yaml"}, "nowhere.yaml"),
        ({"config": None}, "`config` is None"),
    ],
)
def test_a_plan_that_cannot_be_used_is_refused(tmp_path, change, message):
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump({"config": "demo", "rows": [{"name": "a"}], **change}))
    with pytest.raises(ConfigError, match=message):
        read_plan(str(path))


def test_rows_and_seeds_can_be_chosen(tmp_path):
    plan = read_plan(str(PLANS[0]), seeds=[7], names=[read_plan(str(PLANS[0])).rows[2].name])
    assert [row.name for row in plan.rows] == [read_plan(str(PLANS[0])).rows[k].name for k in (0, 2)]
    assert [job.recipe["seed"] for job in jobs_of(plan, tmp_path)] == [7, 7]
    with pytest.raises(ConfigError, match="has no row 'x'"):
        read_plan(str(PLANS[0]), names=["x"])


def test_other_settings_in_the_same_folder_are_refused(tmp_path):
    evaluated = {"eval_strategy": "steps"}
    plan = Plan({"beta": 0.1, **evaluated}, [0], [Row("a", {})])
    (job,) = jobs_of(plan, tmp_path)
    job.folder.mkdir(parents=True)
    (job.folder / RECIPE).write_text(yaml.safe_dump(dict(job.recipe)))
    assert jobs_of(plan, tmp_path) == [job]
    with pytest.raises(ConfigError, match=r"`beta` was 0.1 and is 0.2.*--output_dir"):
        jobs_of(Plan({"beta": 0.2, **evaluated}, [0], [Row("a", {})]), tmp_path)


def test_other_solutions_in_the_same_folder_are_refused(tmp_path, monkeypatch):
    """A finished run would otherwise be shown as one on the new solutions."""

    def plan(solutions):
        return Plan({"method": "sft", "eval_strategy": "steps"}, [0], [Row("a", {}, solutions)])

    monkeypatch.setattr(processes._Run, "_start", lambda run: None)
    (job,) = jobs_of(plan({"num_prompts": 2}), tmp_path)
    processes._Run(job, None, "spawn", main)
    assert jobs_of(plan({"num_prompts": 2}), tmp_path) == [job]
    with pytest.raises(ConfigError, match=r"`solutions` was \{'num_prompts': 2\} and is \{'num_prompts': 4\}"):
        jobs_of(plan({"num_prompts": 4}), tmp_path)


def test_the_options_of_solutions_are_those_of_the_command():
    words = words_of(dict.fromkeys(_SOLUTIONS_KEYS, 1) | {"batch": True, "verified": True})
    options, rest = make_parser().parse_known_args(["solutions", "--config", "recipe.yaml", *words])
    assert not rest
    assert all(getattr(options, key) for key in _SOLUTIONS_KEYS)


@pytest.mark.parametrize(("visible", "devices"), [("0,2", ["0", "2"]), ("", []), ("-1", [])])
def test_the_devices(monkeypatch, visible, devices):
    """A machine whose GPUs are hidden has none."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert command._devices() == devices


def test_plans_share_their_equal_runs(tmp_path):
    recipe = {"beta": 0.1, "eval_strategy": "steps"}
    one = jobs_of(Plan(recipe, [0, 1], [Row("a", {}), Row("b", {"beta": 0.2})]), tmp_path)
    other = jobs_of(Plan(recipe, [1, 2], [Row("a", {}), Row("c", {"beta": 0.3})]), tmp_path)
    assert [job.folder for job in distinct([one, other])] == [
        *(tmp_path / name / f"seed-{seed}" for seed in (0, 1) for name in ("a", "b")),
        *(tmp_path / name for name in ("c/seed-1", "a/seed-2", "c/seed-2")),
    ]
    with pytest.raises(ConfigError, match=r"b/seed-0 .*`beta` was 0.2 and is 0.3.*--output_dir"):
        distinct([one, jobs_of(Plan(recipe, [0], [Row("b", {"beta": 0.3})]), tmp_path)])
    with pytest.raises(ConfigError, match="`solutions` was None and is "):
        distinct([one, jobs_of(Plan(recipe, [0], [Row("a", {}, {"num_prompts": 1})]), tmp_path)])


def test_the_table_is_written_after_each_run(tmp_path, monkeypatch, capsys):
    """Tables of the plans that the run belongs to. One that cannot be read does not stop the other runs."""
    recipe = {"eval_strategy": "steps"}
    plans = [Plan(recipe, [0, 1], [Row("a", {})]), Plan(recipe, [0], [Row("b", {})])]
    grids = [jobs_of(plan, tmp_path) for plan in plans]
    tables = [*zip(plans, grids, [tmp_path / "one", tmp_path / "other"], strict=True)]
    read = {"a": result(0.5, {"p": 0.5})}
    monkeypatch.setattr(command, "read_result", lambda folder: read[folder.parent.name])
    command._update(tables, grids[0][0])  # it failed
    assert not [*tmp_path.iterdir()]
    (tmp_path / "a" / "seed-0").mkdir(parents=True)
    (tmp_path / "a" / "seed-0" / FINISHED).touch()
    command._update(tables, grids[0][0])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "one.json", "one.md"]
    assert json.loads((tmp_path / "one.json").read_text())["rows"][0]["after_by_seed"] == [0.5]

    def fails(folder):
        raise DataError(f"{folder.name} was not evaluated")

    monkeypatch.setattr(command, "read_result", fails)
    command._update(tables, grids[0][0])
    assert capsys.readouterr().out == f"{tmp_path / 'one'}.md: seed-0 was not evaluated\n"


@pytest.mark.parametrize(
    ("envs", "common"),
    [([{"A": 1}, {"A": 1}], {"A": 1}), ([{"A": 1}, {"A": 2}], None), ([{"A": 1}, None], None), ([None, None], None)],
)
def test_variables_of_one_plan_do_not_reach_the_runs_of_another(envs, common, tmp_path):
    plans = [Plan({"eval_strategy": "steps", **({"env": env} if env else {})}, [0], [Row("a", {})]) for env in envs]
    jobs = [job for number, plan in enumerate(plans) for job in jobs_of(plan, tmp_path / str(number))]
    assert command._common_env(jobs) == common


def test_no_run_at_a_time_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["ablate", str(PLANS[0]), "--jobs", "0"])
    assert "argument --jobs: '0' must be a whole number of at least 1" in capsys.readouterr().err


def test_two_plans_of_one_name_are_refused(tmp_path, capsys):
    paths = [tmp_path / name / "plan.yaml" for name in ("one", "two")]
    for path in paths:
        path.parent.mkdir()
        path.write_text(yaml.safe_dump({"config": "demo", "rows": [{"name": "a"}]}))
    assert main(["ablate", *map(str, paths), "-o", str(tmp_path / "runs")]) == 2
    assert "Rename one" in capsys.readouterr().err


def test_a_folder_that_is_a_file_is_refused(capsys):
    assert main(["ablate", str(PLANS[0]), "-o", str(PLANS[0])]) == 2
    assert "is a file. Choose another folder." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({}, "has no `eval_strategy`"),
        ({"eval_strategy": False}, "has no `eval_strategy`"),  # `no` in YAML
        ({"eval_strategy": "no"}, "has no `eval_strategy`"),
        ({"do_eval": True, "save_audits": False}, "`save_audits: false`"),
        ({"do_eval": True, "reward_funcs": ["a.b", "a.c"]}, "has 2 `reward_funcs`"),
    ],
)
def test_runs_that_measure_nothing_are_refused(tmp_path, recipe, message):
    with pytest.raises(ConfigError, match=f"The row 'b' .*{message}"):
        jobs_of(Plan({"do_eval": True}, [0], [Row("a", {}), Row("b", {"do_eval": False, **recipe})]), tmp_path)


class TestResult:
    """What is read from the folder of a run."""

    @pytest.fixture
    def record(self, tmp_path):
        """A function that writes what a run leaves: its log, tokens, evaluations by step, and time."""

        def record(logs, evaluations=None):
            with journal(tmp_path, num_processes=1, rank=0) as j:
                for entry in logs:
                    j.record_log(entry)
                j.record_usage(0, 0, Usage(prompt_tokens=100, completion_tokens=10), 0.25)
                j.record_usage(1, 0, Usage(prompt_tokens=50, completion_tokens=5), 0.5)
            (tmp_path / "completions").mkdir()
            for step, scores in (evaluations or {}).items():
                rows = [{"prompt": prompt, "pass@1": score} for prompt, score in scores]
                path = tmp_path / "completions" / f"eval_{step:05d}.parquet"
                pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
            (tmp_path / FINISHED).write_text('{"seconds": 12.5, "processor_seconds": 10}')
            return tmp_path

        return record

    def test_all_numbers(self, record):
        """Of the last evaluation, with several samples of a problem averaged."""
        first = {"step": 0, "eval_pass@1": 0.25, "eval_kl/unaudited": 0.0, "eval_completions/mean_length": 80}
        last = {"step": 20, "eval_pass@1": 0.75, "eval_kl/unaudited": 0.02, "eval_completions/mean_length": 90}
        similarity = [{"step": step, "audit/similarity": step / 8} for step in range(1, 6)]
        folder = record(
            [first, *similarity, {**last, "eval_completions/copied_share": 0.125}],
            {0: [("p", 0.0), ("q", 0.5)], 20: [("p", 1.0), ("q", 1.0), ("p", 0.0), ("q", 1.0)]},
        )
        numbers = {"before": 0.25, "after": 0.75, "kl": 0.02, "length": 90, "copied": 0.125}
        numbers |= {"seconds": 12.5, "processor_seconds": 10}
        paid = {"read": 150, "written": 15, "usd": 0.75}
        quarters = {"similarity_first": 0.1875, "similarity_last": 0.5625}  # two of five steps each
        assert read_result(folder) == Result(problems={"p": 0.5, "q": 1.0}, **numbers, **quarters, **paid)

    def test_the_similarity_of_branches_comes_first(self, record):
        """The trajectory's own chunk is one of them."""
        both = {"step": 1, "audit/similarity": 0.9, "branches/similarity": 0.5}
        found = read_result(record([both, {"step": 20, "eval_pass@1": 1.0}], {20: [("p", 1.0)]}))
        assert (found.similarity_first, found.similarity_last) == (0.5, 0.5)

    def test_without_an_evaluation_at_the_start(self, record):
        found = read_result(record([{"step": 20, "eval_pass@1": 1.0}], {20: [("p", 1.0)]}))
        assert (found.before, found.after, found.kl, found.length, found.copied) == (None, 1.0, None, None, None)
        assert (found.similarity_first, found.similarity_last) == (None, None)

    def test_what_is_no_score(self, record):
        """A problem whose right answer cannot be read, the table of `audit_eval`, and an earlier evaluation."""
        last = [("p", 1.0), ("q", 0.0), ("unreadable", float("nan"))]
        folder = record([{"step": 100_000, "eval_pass@1": 0.5}], {99_999: [("p", 0.0)], 100_000: last})
        audits = pyarrow.Table.from_pylist([{"text": "a"}])
        pyarrow.parquet.write_table(audits, folder / "completions" / "eval_audits_100000.parquet")
        assert read_result(folder).problems == {"p": 1.0, "q": 0.0}

    def test_of_an_earlier_version(self, record):
        """It did not measure the time of a processor."""
        folder = record([{"step": 20, "eval_pass@1": 1.0}], {20: [("p", 1.0)]})
        (folder / FINISHED).write_text('{"seconds": 12.5}')
        found = read_result(folder)
        assert (found.seconds, found.processor_seconds) == (12.5, None)
        (row,) = summarize(Plan({}, [0], [Row("first", {})]), {0: {0: found}})["rows"]
        assert markdown({"rows": [row]}).endswith("| 12 |  |")

    @pytest.mark.parametrize(
        ("logs", "evaluations"),
        [([{"step": 20, "loss": 1.0}], {}), ([{"step": 20, "eval_loss": 1.0}], {20: [("p", 1.0)]})],
        ids=["no evaluation", "no answers"],
    )
    def test_a_run_that_never_evaluated(self, record, logs, evaluations):
        with pytest.raises(DataError, match="was not evaluated"):
            read_result(record(logs, evaluations))


def result(after, problems, **overrides):
    values = {"before": 0.4, "kl": 0.1, "length": 50.0, "copied": 0.0, "read": 100, "written": 20, "usd": 0.5}
    values |= {
        "similarity_first": 0.25,
        "similarity_last": 0.5,
        "seconds": 10.0,
        "processor_seconds": 9.0,
        **overrides,
    }
    return Result(after=after, problems=problems, **values)


def test_the_table():
    """Means, standard deviations and the paired difference, by hand."""
    plan = Plan({}, [0, 1], [Row("first", {}), Row("second", {"beta": 0.0}), Row("alone | x", {}), Row("other", {})])
    results = {
        0: {0: result(0.5, {"p": 0.0, "q": 1.0}), 1: result(0.7, {"p": 0.4, "q": 1.0})},
        1: {0: result(0.6, {"p": 0.2, "q": 1.0}, kl=None), 1: result(1.0, {"q": 1.0, "p": 1.0}, read=300)},
        2: {5: result(0.1, {"p": 0.1, "q": 0.1})},
        3: {0: result(0.1, {"r": 0.1})},
    }
    first, second, alone, other = summarize(plan, results)["rows"]
    assert first["after"] == pytest.approx(0.6)
    assert first["after_std"] == pytest.approx(0.02**0.5)
    assert first["difference"] is None
    assert second["after_by_seed"] == [0.6, 1.0]
    # p: mean 0.6 instead of 0.2; q: no difference.
    assert second["difference"]["value"] == pytest.approx(0.2)
    assert second["difference"]["p_value"] == 1.0  # one problem differs: either sign is as likely
    assert second["kl"] == 0.1
    assert second["read"] == 200
    assert alone["difference"] is None  # no seed in common
    assert alone["after_std"] is None
    text = markdown({"rows": [first, second, {**alone, "no_difference": None}]})
    assert "| second | 2 | 0.400 | 0.800 ± 0.283 | +0.200 [" in text
    assert "| 0.00 | 0.25 to 0.50 | 200 |" in text
    assert text.endswith("| 0.50 | 10 | 9 |")
    assert "\n| alone \\| x | 1 |" in text
    assert text.count("\n") == 4
    assert "No difference" not in text
    *_, prompt, blank, seed = markdown({"rows": [first, other, alone, {**other, "name": "z"}]}).splitlines()
    assert prompt == (
        "No difference of other, z: its evaluation has other prompts than the first row, so no problems can be "
        "paired; compare `after`."
    )
    assert (blank, seed) == ("", "No difference of alone | x: no seed has finished in both this row and the first.")


@pytest.mark.parametrize(
    ("prompt", "completion", "share"),
    [
        ("What is 16 - 53 ?", "16 - 53", 1.0),
        ("What is 16 - 53 ?", "what IS 16 so", 0.75),
        ("What is 16 - 53 ?", "It is -37", 0.0),
        ("16 - 53", "16 - 5", 0.0),
        ("a b c d e", "a b c x c d e", 6 / 7),
        ("a b", "a b", 0.0),
        ("", "a b c", 0.0),
        ("a b c", "", 0.0),
    ],
)
def test_copied_share(prompt, completion, share):
    assert copied_share(prompt, completion) == pytest.approx(share)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("enough", [any, all])
def test_a_run_that_ends_while_the_others_are_counted(enough):
    """Nothing is left to wait for then."""
    codes = iter([None, 0, 0])

    class Process:
        sentinel = -1  # of a process that has ended

        @property
        def exitcode(self):
            return next(codes)

    try:
        processes._wait([SimpleNamespace(process=Process())], enough)
    finally:
        processes._mask_control_c(False)
    assert next(codes, None) is None


def test_words_of_a_command():
    assert words_of({"num_prompts": 64, "verified": True, "dry_run": False}) == ["--num_prompts", "64", "--verified"]


class TestInterrupted:
    """Signals to the command. The training is a few lines, the processes and signals are real."""

    TRAINING = """
import os, sys, time
from pathlib import Path
from omniopd_trl.cli import train

def run(arguments):
    folder = Path(arguments[arguments.index("--config") + 1]).parent
    (folder / "_audits").mkdir(exist_ok=True)
    if folder.parent.name == "first":
        (folder / "_audits" / "rank-0.sqlite").touch()
    (folder / "arguments").write_text(" ".join(arguments[2:]))
    try:
        (folder / "begun").write_text(str(os.getpid()))
        (folder / "begun").rename(folder / "process")
        if "ENDS" in os.environ:
            return 1
        time.sleep(100)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
        time.sleep(0.1)  # for a second signal
        return 130

train.run = run
"""
    COMMAND = (
        "import sys; from omniopd_trl.cli.ablate import processes; processes._IMPORTED = ['training']\n"
        "from omniopd_trl.cli.main import main; sys.exit(main())"
    )

    @pytest.fixture
    def start(self, tmp_path):
        """A function that starts the command on two rows and two seeds, with two runs at a time."""
        (tmp_path / "training.py").write_text(self.TRAINING)
        plan = {"config": "demo", "seeds": [0, 1], "rows": [{"name": "first"}, {"name": "second"}]}
        (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan))

        def start(**environment):
            paths = {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}", "CUDA_VISIBLE_DEVICES": ""}
            return subprocess.Popen(
                [sys.executable, "-c", self.COMMAND, "ablate", "plan.yaml", "--jobs", "2"],
                cwd=tmp_path,
                env={**ENVIRONMENT, **paths, **environment},
                start_new_session=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )

        return start

    @staticmethod
    def processes(tmp_path, number):
        """The processes of the runs, when this many have begun."""
        return wait_for(lambda: len(files := list(tmp_path.rglob("process"))) == number and files)

    @pytest.mark.parametrize("to_all", [True, False], ids=["terminal", "kill"])
    def test_control_c(self, tmp_path, start, to_all):
        """The runs are interrupted once, no other is started, and the same command continues."""
        command = start()
        ids = [int(path.read_text()) for path in self.processes(tmp_path, 2)]
        (os.killpg if to_all else os.kill)(command.pid, signal.SIGINT)
        output, errors = command.communicate(timeout=30)
        assert command.returncode == 128 + signal.SIGINT
        assert errors == "Interrupted. The same command continues.\n"
        assert output == "".join(f"runs/plan/{row}/seed-0: started\n" for row in ("first", "second"))
        assert not any(map(is_running, ids))
        folders = [tmp_path / "runs" / "plan" / row / f"seed-{seed}" for seed in (0, 1) for row in ("first", "second")]
        assert [folder.exists() for folder in folders] == [True, True, False, False]
        assert [(folder / LOG).read_text() for folder in folders[:2]] == ["interrupted\n"] * 2
        output, errors = start(ENDS="1").communicate(timeout=30)
        assert output.count("started") == output.count("FAILED") == 4
        assert "4 of 4 runs failed" in errors
        # Only where there is something to resume from.
        arguments = [(folder / "arguments").read_text() for folder in folders]
        assert arguments == ["--resume_from_checkpoint true", "", "", ""]

    def test_killed(self, tmp_path, start):
        """A run does not survive the command, which could no longer stop it from paying the teacher."""
        command = start()
        ids = [int(path.read_text()) for path in self.processes(tmp_path, 2)]
        command.kill()
        command.communicate(timeout=30)
        assert wait_for(lambda: not any(map(is_running, ids)))


def wait_for(condition, seconds=60):
    """What a condition returns, once it is true."""
    deadline = time.monotonic() + seconds
    while not (result := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return result


def is_running(process):
    return psutil.pid_exists(process) and psutil.Process(process).status() != psutil.STATUS_ZOMBIE


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_grid_is_interrupted_and_continued(tmp_path, tiny_model_dir, monkeypatch, capsys):
    """A run in a forked process that is interrupted and resumed has the numbers of one in a fresh process.

    The second run fails at first. Started again with the cause removed, only that one runs.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for name in ("train", "test"):
        (tmp_path / "problems").mkdir(exist_ok=True)
        questions(8).to_json(tmp_path / "problems" / f"{name}.jsonl")
    recipe = {
        **{"model_name_or_path": str(tiny_model_dir), "teacher_model_name_or_path": "scripted"},
        **{"dataset_name": "problems", "dataset_test_split": "test", "max_steps": 4, "max_completion_length": 12},
        **{"per_device_train_batch_size": 4, "eval_strategy": "steps", "eval_steps": 4, "eval_on_start": True},
        **{"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": "none", "logging_steps": 1},
        **{"chunk_length": 4, "min_chunk_length": 2, "num_chunks": 2, "save_strategy": "no", "num_rollouts": 2},
        "learning_rate": 0.01,
    }
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(recipe))
    # Libraries read their variables when they are imported, so a row that sets one gets a fresh process.
    fresh = {"model_name_or_path": str(tmp_path / "copy"), "env": {"OMP_NUM_THREADS": "1"}}
    rows = [{"name": "forked"}, {"name": "fresh", "options": fresh}]
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump({"config": "base.yaml", "rows": rows}))
    folders = [tmp_path / "runs" / "plan" / row["name"] / "seed-0" for row in rows]

    def interrupt():
        wait_for(lambda: journals_of(folders[0]), 120)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    assert main(["ablate", "plan.yaml", "--jobs", "1"]) == 128 + signal.SIGINT
    assert capsys.readouterr().err.endswith("Interrupted. The same command continues.\n")
    assert "Interrupted at step" in (folders[0] / LOG).read_text()
    assert not folders[1].exists()
    assert main(["ablate", "plan.yaml", "--jobs", "2"]) == 1
    shown = capsys.readouterr()
    assert "1 of 2 runs failed: runs/plan/fresh/seed-0. Read log.txt" in shown.err
    assert "| forked | 1 |" in shown.out
    kept = (folders[0] / FINISHED).stat().st_mtime_ns
    (tmp_path / "copy").symlink_to(tiny_model_dir)
    assert main(["ablate", "plan.yaml"]) == 0
    shown = capsys.readouterr().out
    assert "forked/seed-0: started" not in shown
    assert "fresh/seed-0: done" in shown
    assert (folders[0] / FINISHED).stat().st_mtime_ns == kept
    forked, fresh = (replace(read_result(folder), seconds=0, processor_seconds=0) for folder in folders)
    assert forked == fresh
    assert fresh.written > 0
    for folder in folders:
        finished = json.loads((folder / FINISHED).read_text())
        # It does not wait for long, and imports by several threads may take more than one processor.
        assert 0.5 < finished["processor_seconds"] < 2 * finished["seconds"]
    for name in ("loss", "grad_norm", "eval_kl/unaudited"):
        series = [Run(folder).series(name) for folder in folders]
        assert series[0] == series[1]
        assert series[0][-1][1] > 0
    table = json.loads((tmp_path / "runs/plan/plan.json").read_text())
    assert table["rows"][1]["difference"]["value"] == 0
    assert (tmp_path / "runs/plan/plan.svg").read_text().count("fresh") == 1
