# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""`omniopd ablate`: plans, runs that continue, and the table."""

import json

import pytest
import yaml

from omniopd_trl.cli import ablate
from omniopd_trl.cli.ablate import Plan, Result, Row, jobs_of, markdown, read_plan, summarize, words_of
from omniopd_trl.cli.main import main
from omniopd_trl.errors import ConfigError
from omniopd_trl.evals.copying import copied_share
from tests.support import ROOT
from tests.support.training import questions

PLANS = sorted((ROOT / "recipes" / "plans").glob("*.yaml"))


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.stem)
def test_the_shipped_plans_are_valid(path, tmp_path):
    plan = read_plan(str(path))
    jobs = jobs_of(plan, tmp_path)
    assert len(jobs) == len(plan.rows) * len(plan.seeds) >= 9
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
        ({"seeds": []}, "`seeds` is"),
        ({"seeds": "0"}, "`seeds` is"),
        ({"config": "nowhere.yaml"}, "nowhere.yaml"),
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
    plan = Plan({"beta": 0.1}, [0], [Row("a", {})])
    (job,) = jobs_of(plan, tmp_path)
    job.folder.mkdir(parents=True)
    (job.folder / ablate.RECIPE).write_text(yaml.safe_dump(dict(job.recipe)))
    assert jobs_of(plan, tmp_path) == [job]
    with pytest.raises(ConfigError, match=r"`beta` was 0.1 and is 0.2.*--output_dir"):
        jobs_of(Plan({"beta": 0.2}, [0], [Row("a", {})]), tmp_path)


def result(after, problems, **overrides):
    values = {"before": 0.4, "kl": 0.1, "length": 50.0, "copied": 0.0, "read": 100, "written": 20, "usd": 0.5}
    values |= {"seconds": 10.0, **overrides}
    return Result(after=after, problems=problems, **values)


def test_the_table():
    """Means, standard deviations and the paired difference, by hand."""
    plan = Plan({}, [0, 1], [Row("first", {}), Row("second", {"beta": 0.0}), Row("alone", {})])
    results = {
        0: {0: result(0.5, {"p": 0.0, "q": 1.0}), 1: result(0.7, {"p": 0.4, "q": 1.0})},
        1: {0: result(0.6, {"p": 0.2, "q": 1.0}, kl=None), 1: result(1.0, {"q": 1.0, "p": 1.0}, read=300)},
        2: {5: result(0.1, {"p": 0.1, "q": 0.1})},
    }
    first, second, alone = summarize(plan, results)["rows"]
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
    text = markdown({"rows": [first, second, alone]})
    assert "| second | 2 | 0.400 | 0.800 ± 0.283 | +0.200 [" in text
    assert text.count("\n") == 4


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


def test_words_of_a_command():
    assert words_of({"num_prompts": 64, "verified": True, "dry_run": False}) == ["--num_prompts", "64", "--verified"]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_grid_is_trained_and_continued(tmp_path, tiny_model_dir, monkeypatch, capsys):
    """One of three runs fails. Started again with the cause removed, only that one runs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for name in ("train", "test"):
        (tmp_path / "problems").mkdir(exist_ok=True)
        questions(8).to_json(tmp_path / "problems" / f"{name}.jsonl")
    recipe = {
        **{"model_name_or_path": str(tiny_model_dir), "teacher_model_name_or_path": "scripted"},
        **{"dataset_name": "problems", "dataset_test_split": "test", "max_steps": 2, "max_completion_length": 12},
        **{"per_device_train_batch_size": 4, "eval_strategy": "steps", "eval_steps": 2, "eval_on_start": True},
        **{"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": "none"},
        **{"chunk_length": 4, "min_chunk_length": 2, "num_chunks": 2, "save_strategy": "no", "num_rollouts": 2},
    }
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(recipe))
    rows = [{"name": "first"}, {"name": "high beta", "options": {"beta": 0.5}}, {"name": "broken"}]
    rows[2]["options"] = {"model_name_or_path": str(tmp_path / "copy")}
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump({"config": "base.yaml", "rows": rows}))
    assert main(["ablate", "plan.yaml", "--jobs", "2"]) == 1
    shown = capsys.readouterr()
    assert "1 of 3 runs failed: runs/plan/broken/seed-0. Read log.txt" in shown.err
    assert "| high beta | 1 |" in shown.out
    kept = (tmp_path / "runs/plan/first/seed-0/finished.json").stat().st_mtime_ns
    (tmp_path / "copy").symlink_to(tiny_model_dir)
    assert main(["ablate", "plan.yaml"]) == 0
    shown = capsys.readouterr().out
    assert "first/seed-0: started" not in shown
    assert "broken/seed-0: done" in shown
    assert (tmp_path / "runs/plan/first/seed-0/finished.json").stat().st_mtime_ns == kept
    table = json.loads((tmp_path / "runs/plan/plan.json").read_text())
    first, _, same = table["rows"]
    # The same model by another path: the same numbers.
    assert same["after"] == first["after"]
    assert same["difference"]["value"] == 0
    assert same["written"] == first["written"] > 0
    assert (tmp_path / "runs/plan/plan.svg").read_text().count("broken") == 1
