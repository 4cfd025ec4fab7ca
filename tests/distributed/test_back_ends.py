# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Every back end trains the same as one process, and resumes exactly.

Each back end is launched once for all kinds of student, and once more in new processes to resume from checkpoints,
since imports take most of the time.
"""

import importlib.util
import json
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.support.back_ends import BACK_ENDS, SCRIPTS, back_ends, needs, run

SCRIPT = SCRIPTS / "train_under.py"
TOLERANCE = 1e-4
QUANTIZES = importlib.util.find_spec("bitsandbytes") is not None

TRAINED = (
    *("tied_full", "tied_lora", "untied_full", "untied_lora"),
    *("local_teacher_full", "offloaded_reference_full", "branches_full", "cascade_lora", "verifier_full"),
)
LORA = {"init_lora_weights": False}
# What a run has that sets neither. Comparisons to 1e-4 have to do without the first.
DEFAULT = {"bf16": True, "gradient_checkpointing": True}
# Limits on gradient norms. Some steps of these students are above theirs: adapters, sharded weights, branches, marks.
UNCLIPPED = 0.5
CLIPPED = {"tied_lora": 0.5, "untied_lora": 0.5, "untied_full": 0.2, "branches_full": 0.5, "cascade_lora": 0.5}
# Completions that are given, and chunks that no rounding moves to another place: one for each long completion.
GIVEN = {"observed": True, "chunk_length": 40, "num_chunks": 1, "min_chunk_length": 20, "prior": "reference"}
# Everything that a checkpoint has to bring back: completions and dropout that are drawn, a learning rate that falls, a
# baseline that remembers, and two epochs of two steps.
DRAWN = {
    "top_k": 0,
    "num_prompts": 16,
    "max_steps": 4,
    "lr_scheduler_type": "linear",
    "posterior_baseline": "moving_average",
}
# Step, and whether the journal has the rest of the run. The second epoch begins after step 2.
RESUMED = {"full": [(1, True), (2, False)], "lora": [(2, True), (3, False)]}

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def trained(make_tiny_model, tiny_teacher_dir, tmp_path_factory) -> Callable[[str], tuple[dict[str, Any], Path]]:
    """A function from a back end to what it trained: results by name, and the folder with weights and checkpoints."""
    tied, untied = str(make_tiny_model(seed=0)), str(make_tiny_model(seed=0, tie_word_embeddings=False))
    wide = str(make_tiny_model(seed=7, hidden_size=64, intermediate_size=128, head_dim=16, num_key_value_heads=4))
    kinds = {"full": None, "lora": LORA}
    students: list[dict[str, Any]] = [
        {"name": f"{head}_{kind}", "path": path, "lora": lora}
        for head, path in (("tied", tied), ("untied", untied))
        for kind, lora in kinds.items()
    ]
    # The likeliest rollout: what a teacher draws depends on the process that asks it.
    greedy = {"teacher": str(tiny_teacher_dir), "teacher_temperature": 0.0, "num_rollouts": 1}
    students.append({**students[0], "name": "local_teacher_full", **greedy})
    students.append({**students[0], "name": "offloaded_reference_full", "ref_model_offload": True})
    # Some chunks stop after two equal rollouts, on one process and not on the other.
    branches = {"num_branches": 3, "learning_rate": 3e-2, "rollout_imitation": 0.5, "min_anchor_entropy": 0.1}
    students.append({**students[0], "name": "branches_full", **branches, "first_rollouts": 2})
    students[-1] |= {"loss_normalization": "components", "fork_candidates": 4}
    students.append({**students[1], "name": "cascade_lora", **branches, "signal": "cascade"})
    students[-1] |= {"loss_normalization": "sum"}
    # One group is spread over all processes. Those of two lengths are right, and not audited.
    verifier = {"verified": True, "num_generations": 8, "reward_weight": 0.5, "audit_trajectories": "wrong"}
    students.append({**students[0], "name": "verifier_full", **verifier})
    for student in students:
        student["max_grad_norm"] = CLIPPED.get(student["name"], UNCLIPPED)
    more: list[dict[str, Any]] = []
    for kind, lora in kinds.items():
        common = {"path": tied, "lora": lora, "max_steps": 2}
        more.append({**common, "name": f"bf16_{kind}", **DEFAULT, **GIVEN})
        for reentrant in (True, False):
            name = f"checkpointing_{'reentrant_' if reentrant else ''}{kind}"
            settings = {"gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
            more.append({**common, "name": name, "gradient_checkpointing": True, **settings})
        dropout = {**LORA, "lora_dropout": 0.1} if lora else None
        saving = {"save_strategy": "steps", "save_steps": 1}
        more.append({**common, "name": f"drawn_{kind}", **DEFAULT, **DRAWN, **saving, "lora": dropout})
    if QUANTIZES:
        quantization = {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_compute_dtype": "bfloat16",
            "bnb_4bit_quant_storage": "bfloat16",
        }
        settings = {"lora": LORA, "quantization": quantization, "max_steps": 2, **DEFAULT, **GIVEN}
        more.append({"name": "quantized_lora", "path": wide, **settings})

    @cache
    def launch(back_end: str) -> tuple[dict[str, Any], Path]:
        needs(back_end)
        folder = tmp_path_factory.mktemp(back_end)
        chosen = students + more
        if back_end == "one":  # what the others' bf16, with checkpointing, has to be near to
            chosen += [
                {**student, "name": student["name"].replace("bf16", "float32"), **dict.fromkeys(DEFAULT, False)}
                for student in more
                if student["name"].startswith("bf16")
            ]
        (folder / "models.json").write_text(json.dumps(chosen))
        return run(back_end, SCRIPT, folder / "result.json", str(folder / "models.json")), folder

    return launch


def shards(back_end: str) -> bool:
    """Whether it spreads the weights themselves over the processes."""
    return back_end.startswith("zero3") or back_end == "fsdp2"


def assert_same_weights(folder: Path, name: str, other_folder: Path, other: str, tolerance: float) -> None:
    weights, wanted = load_file(folder / f"{name}.safetensors"), load_file(other_folder / f"{other}.safetensors")
    assert weights.keys() == wanted.keys()
    for key, value in wanted.items():
        torch.testing.assert_close(weights[key], value, rtol=0, atol=tolerance, msg=f"{name}: {key}")


@back_ends(*BACK_ENDS[1:])
def test_agrees_with_one_process(back_end, trained):
    """Within 1e-4, over steps that move the weights by a hundred times as much, clipped gradients among them."""
    results, folder = trained(back_end)
    expected, one = trained("one")
    # Where the reference rests between uses changes nothing.
    assert results["offloaded_reference_full"]["steps"] == results["tied_full"]["steps"]
    for name in TRAINED:
        result, other = results[name], expected[name]
        assert result["completions"] == other["completions"], name
        assert len(other["steps"]) == 3
        for step, (here, there) in enumerate(zip(result["steps"], other["steps"], strict=True)):
            assert here == pytest.approx(there, rel=TOLERANCE, abs=TOLERANCE), (name, step)
        assert_same_weights(folder, name, one, name, TOLERANCE)
        assert other["moved"] > 100 * TOLERANCE
        limit = CLIPPED.get(name, UNCLIPPED)
        assert any(step["grad_norm"] > limit for step in other["steps"]) == (name in CLIPPED)
        # The student's own forward, too, on weights that are gathered for it.
        assert result["compared"] < TOLERANCE
        assert result["checks"] == (back_end != "ddp"), "checked when the trainer is made, or when training begins"
        # It is what it says it is, and LoRA pays for no second copy.
        assert result["sharded"] == shards(back_end)
        assert result["optimizer"] == (back_end if back_end.startswith("zero") else None)
        assert result["reference_is_a_copy"] == name.endswith("full")
        assert result["reference_rests_on_cpu"] == name.startswith("offloaded")


@pytest.mark.parametrize("kind", ["full", "lora"])
@back_ends(*BACK_ENDS)
def test_bf16_computes_in_bf16(back_end, kind, trained):
    """The layers do; the chunks' weights and the loss are not rounded, nor is what the optimizer updates."""
    result = trained(back_end)[0][f"bf16_{kind}"]
    seen = result["observed"]
    outputs = {(phase, output) for phase, _, output in seen["dtypes"] if phase != "generation"}
    assert outputs == {(phase, "torch.bfloat16") for phase in ("scores", "loss", "reference", "backward")}
    assert seen["weights_kept"]
    assert seen["losses_kept"]
    assert seen["master_weights"] == "torch.float32"
    # A number in bf16 is right to 0.4 percent; gradients add up many of them.
    expected = trained("one")[0][f"float32_{kind}"]
    assert {output for _, _, output in expected["observed"]["dtypes"]} == {"torch.float32"}
    assert len(expected["steps"]) == 2
    for here, there in zip(result["steps"], expected["steps"], strict=True):
        assert here["loss"] == pytest.approx(there["loss"], rel=1e-2)
        assert here["chunk_loss"] == pytest.approx(there["chunk_loss"], rel=1e-2)
        assert here["grad_norm"] == pytest.approx(there["grad_norm"], rel=5e-2)
        assert here["loss"] != pytest.approx(there["loss"], rel=1e-6)


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("back_end", ["zero3", "fsdp2"])
def test_a_head_is_gathered_no_more_than_it_has_to_be(back_end, kind, trained):
    """Of one micro-batch. A forward gathers it, tied to the embeddings, and `lm_head_of` does not once more.

    FSDP2 keeps what its root module gathered until the backward is over. ZeRO-3 frees the student's for the backward,
    and the reference's at the end of its own forward, too: the KL's kernel gathers that, and in its backward both.
    LoRA's reference is the student, whose head is still there.
    """
    reference = {"reference": 1} if kind == "full" else {}
    expected = {"loss": 1, **reference}
    if back_end == "zero3":
        expected = {"loss": 1 + (kind == "full"), **reference, "backward": 1 + (kind == "full")}
    assert trained(back_end)[0][f"bf16_{kind}"]["observed"]["heads_gathered"] == expected


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("checkpointing", ["checkpointing", "checkpointing_reentrant"])
@back_ends(*BACK_ENDS)
def test_gradient_checkpointing_changes_nothing(back_end, checkpointing, kind, trained):
    """Losses and gradient norms are those without it, to 1e-4."""
    results = trained(back_end)[0]
    result, plain = results[f"{checkpointing}_{kind}"], results[f"tied_{kind}"]
    # With adapters under ZeRO-3, TRL knows one way only.
    only_reentrant = back_end.startswith("zero3") and kind == "lora"
    assert result["reentrant"] == (only_reentrant or checkpointing.endswith("reentrant"))
    assert plain["reentrant"] is None
    assert len(result["steps"]) == 2
    for here, there in zip(result["steps"], plain["steps"][:2], strict=True):
        assert here == pytest.approx(there, rel=TOLERANCE, abs=TOLERANCE)


@pytest.mark.skipif(not QUANTIZES, reason="needs bitsandbytes")
@back_ends(*BACK_ENDS[1:])
def test_qlora(back_end, trained):
    """A 4-bit student is trained as in one process, as near as adapters in bf16 can be."""
    result, expected = (trained(name)[0]["quantized_lora"] for name in (back_end, "one"))
    assert result["observed"]["quantized"]
    assert result["moved"] > 1e-2
    assert result["sharded"] == shards(back_end)
    assert len(expected["steps"]) == 2
    for here, there in zip(result["steps"], expected["steps"], strict=True):
        for key in ("loss", "chunk_loss", "kl/unaudited", "grad_norm"):
            assert here[key] == pytest.approx(there[key], rel=2e-2), key


@back_ends(*BACK_ENDS)
def test_a_resumed_run_continues_as_if_nothing_had_happened(back_end, trained, tmp_path):
    """From within an epoch and from its end, with the journal and without: the same completions, steps and weights."""
    results, folder = trained(back_end)
    again = []
    students = {student["name"]: student for student in json.loads((folder / "models.json").read_text())}
    for kind, points in RESUMED.items():
        drawn = folder / f"drawn_{kind}"
        for step, replays in points:
            where = {"output_dir": str(drawn)} if replays else {"save_audits": False}
            changes = {"name": f"{kind}_{step}", "save_strategy": "no", "resume": str(drawn / f"checkpoint-{step}")}
            again.append({**students[f"drawn_{kind}"], **changes, **where})
    (tmp_path / "models.json").write_text(json.dumps(again))
    resumed = run(back_end, SCRIPT, tmp_path / "result.json", str(tmp_path / "models.json"))
    for kind, points in RESUMED.items():
        expected = results[f"drawn_{kind}"]
        assert len(expected["completions"]) == 32
        for step, replays in points:
            name = f"{kind}_{step}"
            result = resumed[name]
            assert (result["asked"] == 0) == replays
            assert Counter(result["completions"]) <= Counter(expected["completions"])
            assert len(result["completions"]) == 8 * (4 - step)
            for here, there in zip(result["steps"], expected["steps"], strict=True):
                assert here == pytest.approx(there, rel=1e-6, abs=1e-6), name
            assert_same_weights(tmp_path, name, folder, f"drawn_{kind}", 1e-6)
