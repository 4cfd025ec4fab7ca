# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""The main directions of docs/results.md, docs/ablations.md and docs/estimator.md, with fewer steps and problems.

Only effects of many times the noise are here. Tables 4 (M, N, C) and 6, and Fig. 2 (alpha) are not: after 20 steps,
their rows differ from the paper's form by 0.006 to 0.13, and the seeds of one row by up to 0.13.
"""

import json

import pytest
import yaml

from omniopd_trl.cli import train
from omniopd_trl.cli.ablate.plan import read_plan
from omniopd_trl.cli.main import main
from omniopd_trl.data import load_dataset_or_files
from omniopd_trl.demo import asset_path
from tests.support import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

PAPER, SHUFFLED = "paper's form", "control, posteriors shuffled over the step"
SFT = "SFT on one solution for each prompt"
EDIT, EDIT_BASELINE = "edit", "edit, batch baseline"
BRANCHES, SHUFFLED_BRANCHES = "branches, one greedy rollout", "control, advantages shuffled within each fork"
IMITATION = "gate, one greedy rollout, imitation"

# Rows of the shipped plans, with their steps here.
ROWS = {
    "methods": {PAPER: 14, SFT: 8},
    "methods_controls": {SHUFFLED: 14},
    "table5": {EDIT: 10, EDIT_BASELINE: 10},
    "varied_options": {BRANCHES: 12, SHUFFLED_BRANCHES: 12, IMITATION: 8},
}
PROBLEMS = 256  # of 512


def reduced(folder):
    """One plan with these rows."""
    splits = load_dataset_or_files(str(asset_path("problems")))
    (folder / "problems").mkdir()
    splits["train"].to_json(folder / "problems" / "train.jsonl")
    splits["test"].select(range(PROBLEMS)).to_json(folder / "problems" / "test.jsonl")
    rows = []
    for name, steps in ROWS.items():
        plan = read_plan(str(ROOT / "recipes" / "plans" / f"{name}.yaml"), names=list(steps))
        for row in plan.rows:
            if row.name in steps:  # the first row of a plan is always read
                options = {
                    **plan.recipe,
                    **row.options,
                    "eval_on_start": False,
                    "dataset_name": str(folder / "problems"),
                }
                options["max_steps"] = options["eval_steps"] = steps[row.name]
                rows.append({"name": row.name, "options": options})
                if row.solutions:
                    prompts = steps[row.name] * options["per_device_train_batch_size"]
                    rows[-1]["solutions"] = {**row.solutions, "num_prompts": prompts}
    return {"config": "demo_paper", "seeds": [3], "rows": rows}


@pytest.fixture(scope="module")
def after(tmp_path_factory):
    """pass@1 of each row, from one `omniopd ablate`."""
    folder = tmp_path_factory.mktemp("reduced")
    (folder / "plan.yaml").write_text(yaml.safe_dump(reduced(folder)))
    assert main(["ablate", str(folder / "plan.yaml"), "--jobs", "1", "--output_dir", str(folder / "runs")]) == 0
    return {row["name"]: row["after"] for row in json.loads((folder / "runs" / "plan.json").read_text())["rows"]}


@pytest.mark.parametrize(
    ("better", "worse", "least"),
    [
        pytest.param(PAPER, SHUFFLED, 0.1, id="the gain is the teacher's"),
        pytest.param(PAPER, SFT, 0.2, id="SFT on a foreign style fails"),
        pytest.param(EDIT_BASELINE, EDIT, 0.05, id="edit needs a baseline"),
        pytest.param(BRANCHES, SHUFFLED_BRANCHES, 0.1, id="the gain of branches is the teacher's"),
        pytest.param(BRANCHES, IMITATION, 0.2, id="imitation of foreign words fails"),
    ],
)
def test_direction(after, better, worse, least):
    """Seed 3 has differences of 0.238, 0.418, 0.176, 0.254 and 0.496, with binomial errors of 0.031 to 0.038.

    They are at least 3.8 errors above the bounds. The third is 0.207 with seed 4.
    """
    assert after[better] - after[worse] > least


class TestEstimator:
    """Table 3, with 256 chunks instead of 512 and 10 rollouts instead of 20."""

    @pytest.fixture(scope="class")
    def rows(self, tmp_path_factory):
        """Rows of `omniopd verify-estimator`, by truth, estimate, similarity and number of rollouts."""
        folder = tmp_path_factory.mktemp("estimator")
        record = "--learning_rate 0 --num_rollouts 10 --max_steps 2 --eval_strategy no --eval_on_start false"
        words = [*record.split(), "--evaluate_teacher", "false", "--output_dir", str(folder / "run")]
        assert train.run(["--config", str(ROOT / "recipes" / "demo_paper.yaml"), *words]) == 0
        compare = ["verify-estimator", str(folder / "run"), "--similarity", "rouge1", "edit", "exact"]
        assert main([*compare, "--num_rollouts", "1", "10", "--output", str(folder / "table.json")]) == 0
        table = json.loads((folder / "table.json").read_text())
        assert table["num_chunks"] > 200
        return {
            (row["truth"], row["estimate"], row.get("similarity"), row.get("num_rollouts")): row
            for row in table["rows"]
        }

    @pytest.mark.parametrize(
        ("number", "larger", "smaller"),
        [
            ("mse", ("geometric", "frequentist", "exact", 10), ("geometric", "frequentist", "edit", 10)),
            ("mse", ("geometric", "frequentist", "edit", 10), ("geometric", "frequentist", "rouge1", 10)),
            ("mse", ("geometric", "frequentist", "exact", 1), ("geometric", "bayesian", "exact", 1)),
            ("mse", ("total", "frequentist", "exact", 1), ("total", "frequentist", "exact", 10)),
            ("correlation", ("geometric", "frequentist", "rouge1", 10), ("geometric", "frequentist", "edit", 10)),
        ],
        ids=[
            "exact is far from the probability per token",
            "ROUGE-1 is near it",
            "the prior brings exact nearer to it",
            "more rollouts bring exact nearer to the probability of the chunk",
            "edit correlates worst",
        ],
    )
    def test_direction(self, rows, larger, smaller, number):
        """The 95% intervals do not overlap."""
        assert rows[larger][f"{number}_interval"][0] > rows[smaller][f"{number}_interval"][1]
