# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Training from the export of an earlier run: nothing is asked, and the steps are those of that run."""

import json
import re
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from omniopd_trl.cli.main import main
from omniopd_trl.errors import ConfigError, DataError
from omniopd_trl.journal.browse import list_audits, read_audits
from omniopd_trl.method import get_similarity
from omniopd_trl.teachers import load_teacher
from omniopd_trl.trainer.exported import Export
from tests.support.objective import check, load
from tests.support.teachers import Here
from tests.support.training import FOUR_STEPS, make_trainer, perturb, questions, trainable

SETTINGS = {**FOUR_STEPS, "max_steps": 3, "save_strategy": "no", "rollout_imitation": 0.5, "min_anchor_entropy": 0.1}


def export(trainer) -> Path:
    """The export of a finished run."""
    assert main(["export", str(trainer.args.output_dir)]) == 0
    return Path(trainer.args.output_dir, "_export")


@pytest.fixture(scope="module")
def first(tmp_path_factory, tiny_model_dir):
    """A run of three steps."""
    trainer = make_trainer(tmp_path_factory.mktemp("run"), tiny_model_dir, teacher=Here(), **SETTINGS)
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def folder(first):
    return export(first)


def retrain(path, model, folder, *, resume=None, **changes):
    trainer = make_trainer(path, model, teacher=f"export:{folder}", **{**SETTINGS, **changes})
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def same_weights(one, other):
    there = trainable(other.model)
    return all(torch.equal(weights, there[name]) for name, weights in trainable(one.model).items())


def test_the_same_settings_give_the_same_weights(first, folder, tmp_path, tiny_model_dir, caplog, capsys):
    """Bit for bit, at every step: the student is then the one that sampled, and its drift is 0. Nothing is asked."""
    logging.enable_propagation()
    calls = first.teacher.calls
    dataset = questions(8)  # not used, whatever it is
    again = retrain(tmp_path, tiny_model_dir, folder, dataset=dataset, eval_dataset=dataset, eval_strategy="steps")
    assert same_weights(again, first)
    entries = [entry for entry in again.state.log_history if "loss" in entry]
    for entry, there in zip(entries, first.state.log_history, strict=False):
        assert entry["loss"] == there["loss"]
        assert entry["imitation/loss"] == there["imitation/loss"] > 0
        assert entry["off_policy/kl"] == entry["off_policy/truncated"] == 0
        assert entry["teacher/completion_tokens"] == 0
    assert len(entries) == 3
    assert any("eval_pass@1" in entry for entry in again.state.log_history)
    assert first.teacher.calls == calls
    assert again.teacher_usage.prompt_tokens == again.teacher_usage.completion_tokens == 0
    assert caplog.text.count("no teacher is asked") == 1
    plan = capsys.readouterr().out
    assert re.search(r"(?m)^the run +3 steps$", plan)
    assert "forecast" not in plan
    again.create_model_card()
    assert "(export, off-policy)" in Path(again.args.output_dir, "README.md").read_text()


def test_the_rollouts_are_scored_again(first, folder, tmp_path, tiny_model_dir):
    """With another similarity and alpha, the similarities are those of the recorded texts, in the journal too."""
    again = retrain(
        tmp_path, tiny_model_dir, folder, seed=5, similarity="rouge1", prior_strength=3.0, posterior_baseline="batch"
    )
    assert not same_weights(again, first)
    phi = get_similarity("rouge1")
    audits = list(read_audits(tmp_path, list_audits(tmp_path)))
    rows = load_dataset(str(folder), split="train")
    assert len(audits) == len(rows) == 24
    compared = 0
    for audit, row in zip(audits, rows, strict=True):
        assert (audit.prompt, list(audit.completion_ids)) == (row["prompt"], row["completion_ids"])
        for chunk, recorded in zip(audit.chunks, row["chunks"], strict=True):
            similarities = [phi(recorded["text"], rollout["text"]) for rollout in recorded["rollouts"]]
            assert chunk.similarities == pytest.approx(similarities)
            expected = (sum(similarities) + 3 * chunk.prior) / (len(similarities) + 3)
            assert chunk.posterior == pytest.approx(expected)
            compared += chunk.similarities != tuple(r["similarity"] for r in recorded["rollouts"])
    assert compared
    # The first step is still on-policy, and later ones are not. What sampled them is recorded, for another export.
    drifts = [entry["off_policy/kl"] for entry in again.state.log_history if "off_policy/kl" in entry]
    assert drifts[0] == 0 < drifts[1]
    assert list(audits[-1].sampling_logprobs) == rows[-1]["logprobs"]


def test_a_run_with_branches(tmp_path, tiny_model_dir, capsys):
    """Its chunks can be trained in the paper's form: those that the teacher was asked about, with its rollouts."""
    settings = {**SETTINGS, "rollout_imitation": 0.0, "max_steps": 1}
    branches = {"num_branches": 3, "fork_candidates": 4, "scale_advantages": True}
    run = make_trainer(tmp_path / "run", tiny_model_dir, teacher=Here(), **branches, **settings)
    run.train()
    folder = export(run)
    without = "--num_branches 0 --fork_candidates 0 --scale_advantages false"
    assert capsys.readouterr().out.endswith(f"--teacher_model_name_or_path export:{folder} {without}\n")
    assert "`num_branches` | `3`" in (folder / "README.md").read_text()
    again = make_trainer(tmp_path / "again", tiny_model_dir, teacher=f"export:{folder}", **settings)
    again.train()
    recorded, chunks = (
        [chunk for audit in read_audits(path, list_audits(path)) for chunk in audit.chunks]
        for path in (tmp_path / "run", tmp_path / "again")
    )
    assert [(chunk.start, chunk.rollouts) for chunk in chunks] == [(one.start, one.rollouts) for one in recorded]
    assert all(chunk.weight == chunk.posterior and not chunk.branches for chunk in chunks)
    assert recorded
    assert not same_weights(again, run)


def test_drift_and_correction_equal_the_dense_reference(tmp_path, tiny_model_dir, tiny_tokenizer):
    """A student that is not the one that sampled: loss and gradient in float64, and its KL from the sampler."""
    # Long chunks: the other student selects the same ones, as the reference does.
    settings = {"chunk_length": 36, "num_chunks": 1}
    run = make_trainer(tmp_path / "run", tiny_model_dir, teacher=Here(), **settings)
    run.train()
    sampled = [list(audit.logprobs) for audit in read_audits(tmp_path / "run", list_audits(tmp_path / "run"))]
    trainer = make_trainer(
        tmp_path / "again", tiny_model_dir, teacher=f"export:{export(run)}", prior_strength=2.0, **settings
    )
    logged = check(trainer, tiny_model_dir, tiny_tokenizer, sampled=sampled)

    student, terms = load(tiny_model_dir).double(), []
    perturb(student)  # as `check` did
    batch = trainer.batches[0]
    for b, before in enumerate(sampled):
        prompt = batch["prompt_ids"][b][batch["prompt_mask"][b].bool()]
        completion = batch["completion_ids"][b][batch["completion_mask"][b].bool()]
        logits = student(torch.cat([prompt, completion])[None]).logits[0, len(prompt) - 1 : -1]
        now = logits.log_softmax(-1).gather(1, completion[:, None])[:, 0]
        for value, other in zip(now.tolist(), before, strict=True):
            ratio = torch.tensor(value - other, dtype=torch.float64).exp().item()
            terms.append(ratio - 1 - (value - other))
    assert logged["off_policy/kl"] == pytest.approx(sum(terms) / len(terms), rel=1e-3)
    assert logged["off_policy/kl"] > 1e-3


def test_resume(first, folder, tmp_path, tiny_model_dir):
    """A resumed run takes the steps that follow."""
    settings = {"save_strategy": "steps", "save_steps": 2}
    retrain(tmp_path, tiny_model_dir, folder, **settings)
    again = retrain(tmp_path, tiny_model_dir, folder, resume=str(tmp_path / "checkpoint-2"), **settings)
    assert same_weights(again, first)


def edited(folder: Path, to: Path, edit=None, about=None) -> Path:
    """A copy of an export with other rows or other settings."""
    shutil.copytree(folder, to)
    (file,) = to.glob("data/*.parquet")
    if edit is not None:
        pq.write_table(edit(pq.read_table(file)), file)
    if about is not None:
        there = json.loads((to / "export.json").read_text())
        (to / "export.json").write_text(json.dumps({**there, **about}))
    return to


def test_an_export_without_log_probabilities(folder, tmp_path, tiny_model_dir):
    """It trains, without drift and correction."""

    def without(table):
        empty = pa.nulls(len(table), table.schema.field("logprobs").type)
        return table.set_column(table.column_names.index("logprobs"), "logprobs", empty)

    again = retrain(
        tmp_path / "again", tiny_model_dir, edited(folder, tmp_path / "edited", without), similarity="rouge1"
    )
    assert "off_policy/kl" not in again.state.log_history[1]
    assert again.state.log_history[1]["chunk_loss"] > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_chunks": 3}, r"num_chunks is 3 and was 2\. Restore"),
        ({"chunk_length": 12, "num_rollouts": 4}, "chunk_length is 12 and was 10, num_rollouts is 4 and was 3"),
        ({"teacher_temperature": 0.5}, "teacher_temperature is 0.5 and was 1.0"),
        ({"max_steps": 4}, "max_steps=4 .*holds 3 such steps, and its first step has 8 trajectories"),
        ({"max_steps": -1, "num_train_epochs": 2.0}, "num_train_epochs=2 .*holds 3 such steps"),
        ({"gradient_accumulation_steps": 2}, "4 trajectories per step.* holds 0 such steps"),
        ({"audit_eval": True}, "audit_eval=True needs a teacher"),
        ({"signal": "cascade"}, "signal is 'cascade' and was 'rollouts'"),
        ({"first_rollouts": 2}, "first_rollouts is 2 and was 0"),
        ({"num_branches": 3}, r"num_branches=3: .* are another student's. Set num_branches=0 to"),
        ({"min_anchor_entropy": 0.2}, r"min_anchor_entropy is 0\.2 and was 0\.1"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_cannot_be_reused(folder, tmp_path, tiny_model_dir, monkeypatch, changes, message):
    """Refused in one line, before a model is loaded."""
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
    with pytest.raises(ConfigError, match=message) as caught:
        make_trainer(tmp_path, tiny_model_dir, teacher=f"export:{folder}", **{**SETTINGS, **changes})
    assert "\n" not in str(caught.value)


def test_fewer_steps(folder, tmp_path, tiny_model_dir):
    assert retrain(tmp_path, tiny_model_dir, folder, max_steps=1).state.global_step == 1


def test_other_rows(folder, tmp_path, tiny_model_dir):
    """Rows that are missing or not in order; another format; filters without the probabilities that they need."""

    def opened(name, edit=None, about=None, **changes):
        there = edited(folder, tmp_path / name, edit, about)
        return make_trainer(tmp_path / "run", tiny_model_dir, teacher=f"export:{there}", **{**SETTINGS, **changes})

    with pytest.raises(ConfigError, match="holds 2 such steps"):  # a step of a run that still writes
        opened("unfinished", lambda table: table.slice(0, 20))
    with pytest.raises(ConfigError, match="holds 0 such steps"):
        opened("later", lambda table: table.slice(8))
    with pytest.raises(DataError, match="not in the order of step"):
        opened("reversed", lambda table: table.take(list(range(23, -1, -1))))
    with pytest.raises(DataError, match="has the format 99"):
        opened("new", about={"format": 99})
    settings = json.loads((folder / "export.json").read_text())["settings"]
    with pytest.raises(ConfigError, match=r"min_rollouts is 1 and was 2, and can only rise"):
        opened("fewer", about={"settings": {**settings, "min_rollouts": 2}})
    with pytest.raises(ConfigError, match="recorded with different chunk_length, so"):
        opened("mixed", about={"mixed": ["chunk_length", "teacher_context_template"]})
    with pytest.raises(ConfigError, match=r"top_p=0\.9: .* without this filter"):
        opened("filtered", about={"settings": {**settings, "top_p": 0.9}}, top_p=0.9)
    del settings["min_anchor_entropy"]
    with pytest.raises(ConfigError, match=r"min_anchor_entropy is 0\.1 and was 0\.0"):
        opened("ungated", about={"settings": settings})
    marks = {"signal": "judge", "rollout_imitation": 0.0, "min_anchor_entropy": 0.0}
    with pytest.raises(ConfigError, match="signal='judge' needs a teacher to ask"):
        opened("marks", about={"settings": {**settings, "signal": "judge"}}, **marks)


def test_another_tokenizer(folder, tmp_path, make_tiny_model, tiny_teacher_tokenizer, monkeypatch):
    model = make_tiny_model(tokenizer=tiny_teacher_tokenizer)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
    with pytest.raises(DataError, match=r"prompts of step 0 .* have other tokens"):
        make_trainer(tmp_path, model, teacher=f"export:{folder}", **SETTINGS)


@pytest.mark.parametrize("name", ["nowhere", "./nowhere", "me/nothing"])
def test_no_export(name, tmp_path, tiny_model_dir, first):
    with pytest.raises(DataError, match=name):
        make_trainer(tmp_path, tiny_model_dir, teacher=f"export:{name}", **SETTINGS)
    with pytest.raises(DataError, match="Give the folder that `omniopd export RUN_DIR` wrote"):
        Export(str(first.args.output_dir))


def test_an_export_cannot_be_asked(folder, tmp_path, capsys):
    """It has no cost to forecast either."""
    with pytest.raises(ConfigError, match="cannot be asked anything else"):
        load_teacher(f"export:{folder}")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model_name_or_path: demo:student\nteacher_model_name_or_path: export:{folder}\ndataset_name: demo:problems\n"
        "use_cpu: true\nbf16: false\n"
    )
    assert main(["cost", "--config", str(recipe)]) == 2
    assert "asks no teacher and costs nothing" in capsys.readouterr().err
