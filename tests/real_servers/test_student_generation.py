# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""The demo's student, whose embeddings are tied, writes its trajectories with a real vLLM.

Colocate mode is TRL's as it is. In server mode the server is real and was started by TRL's command, and only the
transfer of the weights is replaced (`folder_sync.py`): TRL's goes through NCCL, needs a GPU, and is not tested here.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from transformers.utils import logging

from benchmarks.servers import BLOCK, ENVIRONMENT, Server, command
from omniopd_trl.demo import asset_path
from omniopd_trl.models.vllm_logprobs import LARGE_DIFFERENCE
from tests.real_servers.folder_sync import FolderSync
from tests.real_servers.generations import SETTINGS, Generation, make
from tests.support.back_ends import finish, free_port, start

HERE = Path(__file__).resolve().parent
LORA = LoraConfig(r=8, lora_alpha=32, target_modules="all-linear")
# LoRA moves by less at the same rate.
KINDS = {"full": {}, "lora": {"learning_rate": 0.02}}

# Nats, of any token. In float32 on both sides it is some 1e-4 at most.
CLOSE = 0.01


def assert_in_sync(generations: list[Generation], steps: list[tuple[str, int]]) -> None:
    """Each generation was one of the student as it was then, although an update had changed it by far more."""
    assert [(g.mode, g.step) for g in generations] == steps
    assert all(g.tokens > 100 for g in generations)
    assert max(g.largest for g in generations) < CLOSE
    assert min(g.stale for g in generations[1:]) > 10 * CLOSE


def report(capsys, what: str, generations: list[Generation]) -> None:
    """The numbers of docs/generation.md."""
    means, stale = [g.mean for g in generations], [g.stale for g in generations[1:]]
    with capsys.disabled():
        print(  # noqa: T201, a result
            f"\n{what}: from vLLM to the student {min(means):.1g} to {max(means):.1g} nats per token, at most "
            f"{max(g.largest for g in generations):.1g}; to the student before {min(stale):.2f} to {max(stale):.2f}"
        )


# Evaluation after every second of four steps. It comes before the next step's generation, which needs no update then.
STEPS = [("train", 0), ("train", 1), ("eval", 2), ("train", 2), ("train", 3), ("eval", 4)]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """For so small a model, threads that wait for each other, and for the server, cost more than they compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def student_dir(tmp_path_factory):
    """The demo's student, with defaults for sampling beside it: servers apply them to what a request leaves open."""
    path = tmp_path_factory.mktemp("student") / "model"
    shutil.copytree(asset_path("student"), path)
    defaults = path / "generation_config.json"
    hostile = {"do_sample": True, "temperature": 0.2, "top_p": 0.1, "top_k": 1, "repetition_penalty": 1.5}
    defaults.write_text(json.dumps({**json.loads(defaults.read_text()), **hostile}))
    return path


def student_run(back_end, model, folder, dtype, kind, **settings):
    """What `student_run.py` saw: on each process, the generations and the rest."""
    environment = {
        **ENVIRONMENT,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "VLLM_USE_AOT_COMPILE": "0",
    }
    settings = {"vllm_mode": "colocate", **KINDS[kind], **settings}
    arguments = (str(model), str(folder), dtype, kind, json.dumps(settings))
    process = start(back_end, HERE / "student_run.py", folder, *arguments, **environment)
    code, output = finish(process, 240)
    assert code == 0, output[-5000:]
    seen = [json.loads((folder / f"seen-{i}.json").read_text()) for i in range(1 if back_end == "one" else 2)]
    return [([Generation(**generation) for generation in own.pop("generations")], own) for own in seen]


def colocated_run(model, folder, dtype, kind, **settings):
    """What one process saw, and where its checkpoints are."""
    ((generations, seen),) = student_run("one", model, folder, dtype, kind, **settings)
    return generations, {**seen, "folder": folder}


def logged(log, name):
    """The values of a metric, in order."""
    return [entry[name] for entry in log if name in entry]


def assert_logged(runs):
    """The metric is that of the tokens of all processes, and each has it."""
    # Per step, what each process generated.
    steps = list(zip(*([g for g in generations if g.mode == "train"] for generations, _ in runs), strict=True))
    means = [sum(g.mean * g.tokens for g in step) / sum(g.tokens for g in step) for step in steps]
    for name, expected in (("mean", means), ("max", [max(g.largest for g in step) for step in steps])):
        for _, seen in runs:
            values = logged(seen["log"], f"sampling/sampling_logp_difference/{name}")
            assert values == pytest.approx(expected, abs=1e-5)


@pytest.fixture(scope="module")
def colocated(tmp_path_factory, student_dir):
    """A run of each kind, on the same prompts in the same order, with a seed of its own."""
    settings = {"shuffle_dataset": False, "save_strategy": "steps", "save_steps": 2}
    return {
        kind: colocated_run(student_dir, tmp_path_factory.mktemp(kind), "float32", kind, seed=seed, **settings)
        for seed, kind in enumerate(KINDS)
    }


@pytest.mark.parametrize("kind", KINDS)
def test_colocated_student_is_the_one_that_is_trained(colocated, capsys, kind):
    """At every step, at evaluation, and after the weights changed outside of training; the metric says the same."""
    generations, seen = colocated[kind]
    report(capsys, f"colocated, {kind}, float32", generations)
    assert_in_sync(generations, [*STEPS, ("eval", 4)])
    # The last evaluation comes after a change that no step made. The one before it ran with the weights until then.
    assert seen["change"] > 10 * CLOSE
    assert_logged([(generations, seen)])
    # Adapters are merged for the transfer and taken out again: the reference is the base model.
    assert seen["drift"] < 1e-6
    assert seen["teacher_tokens"] > 0


def test_seeds_differ(colocated):
    """LoRA begins with the student as it is: to the same prompts the same student writes something else."""
    full, lora = (seen["first"] for _, seen in colocated.values())
    assert [prompt for prompt, _ in full] == [prompt for prompt, _ in lora]
    assert [ids for _, ids in full] != [ids for _, ids in lora]


def test_a_resumed_colocated_run_draws_what_an_uninterrupted_one_would(colocated, tmp_path, student_dir):
    """Without a journal: the engine's samples depend on the seed and the step, and not on what was drawn before."""
    whole, seen = colocated["full"]
    checkpoint = str(seen["folder"] / "checkpoint-2")
    settings = {"shuffle_dataset": False, "seed": 0, "eval_strategy": "no", "resume_from_checkpoint": checkpoint}
    resumed, _ = colocated_run(student_dir, tmp_path, "float32", "full", **settings)
    texts = {g.step: g.text for g in whole if g.mode == "train"}
    assert {g.step: g.text for g in resumed if g.mode == "train"} == {2: texts[2], 3: texts[3]}
    assert len(set(texts.values())) == 4


def test_colocated_engine_in_its_own_precision(tmp_path, student_dir, capsys):
    """As TRL starts it, in the bfloat16 of the model's folder, while the trainer computes in float32."""
    generations, seen = colocated_run(student_dir, tmp_path, "auto", "full")
    report(capsys, "colocated, full, bfloat16", generations)
    assert_logged([(generations, seen)])
    assert max(g.mean for g in generations) < LARGE_DIFFERENCE / 2
    assert min(g.stale for g in generations[1:]) > 2 * LARGE_DIFFERENCE


BRANCHES = {"num_branches": 3, "num_chunks": 2, "max_steps": 2, "eval_strategy": "no"}


def assert_branches(branches, log):
    """Each fork has K continuations by the student as it is at that step, and they are trained."""
    assert len(branches) >= 2 * 8
    assert all(len(of_fork) == BRANCHES["num_branches"] for _, of_fork, _ in branches)
    assert max(difference for *_, difference in branches) < CLOSE
    assert len({len(set(map(tuple, of_fork))) for _, of_fork, _ in branches} - {1}) > 0, "all branches are equal"
    assert len(logged(log, "branches/agreed")) == 2
    # Tokens of branches are sampled with the weights of their step, as those of trajectories.
    assert max(logged(log, "sampling/sampling_logp_difference/max")) < CLOSE


def test_branches_of_a_colocated_student(student_dir, tmp_path):
    """In bulk, after each update of the weights."""
    _, seen = colocated_run(student_dir, tmp_path, "float32", "full", **BRANCHES)
    assert_branches(seen["branches"], seen["log"])


SEVERAL = [
    pytest.param("ddp", "full", {"same_prompts": True}, id="ddp"),
    pytest.param("ddp", "full", {"vllm_tensor_parallel_size": 2}, id="tensor-parallel"),
    pytest.param("fsdp2", "lora", {"same_prompts": True}, id="fsdp2"),
]


@pytest.mark.parametrize(("back_end", "kind", "settings"), SEVERAL)
def test_colocated_students_of_two_processes(student_dir, tmp_path, capsys, back_end, kind, settings):
    """Each has an engine, or both share one: what it gets are completions of its own prompts, by the student."""
    runs = student_run(back_end, student_dir, tmp_path, "float32", kind, **settings)
    for generations, seen in runs:
        report(capsys, f"colocated on two processes, {back_end}, {kind}, {settings}", generations)
        assert_in_sync(generations, [*STEPS, ("eval", 4)])
        assert seen["change"] > 10 * CLOSE
        assert seen["drift"] < 1e-6
    assert_logged(runs)
    first, second = (seen["first"] for _, seen in runs)
    if "same_prompts" in settings:  # an engine of its own draws by itself
        assert [prompt for prompt, _ in first] == [prompt for prompt, _ in second]
        assert [ids for _, ids in first] != [ids for _, ids in second]
    else:
        assert not {str(prompt) for prompt, _ in first} & {str(prompt) for prompt, _ in second}


@pytest.fixture(scope="module")
def server(student_dir, tmp_path_factory):
    """By TRL's command, with what the CPU needs besides."""
    arguments = [
        *(command("trl"), "vllm-serve", "--model", str(student_dir), "--dtype", "float32", "--max_model_len", "512"),
        *("--enforce_eager", "true", "--block-size", str(BLOCK)),
    ]
    with Server(arguments, tmp_path_factory.mktemp("vllm") / "server.log") as server:
        yield server


@pytest.fixture
def sync(monkeypatch, tmp_path_factory):
    """See [`FolderSync`]."""
    return FolderSync(monkeypatch, tmp_path_factory.mktemp("weights"))


@pytest.fixture
def trainer_of(server, sync, student_dir, tmp_path):
    """A function that makes a trainer whose student writes on the server."""

    def make_trainer(**settings):
        place = {"vllm_mode": "server", "vllm_server_base_url": server.address, "vllm_server_timeout": 10.0}
        return make(student_dir, tmp_path, **place, **settings)

    return make_trainer


@pytest.mark.parametrize("kind", KINDS)
def test_served_student_is_the_one_that_is_trained(trainer_of, sync, capsys, kind):
    """Likewise, with one update of the weights per step."""
    trainer = trainer_of(peft_config=LORA if kind == "lora" else None, **KINDS[kind])
    trainer.train()
    report(capsys, f"served, {kind}, float32", trainer.generations)
    assert_in_sync(trainer.generations, STEPS)
    assert sync.count == 5  # for steps 0 to 4
    assert len(logged(trainer.state.log_history, "sampling/sampling_logp_difference/mean")) == 4


def test_branches_of_a_served_student(trainer_of, sync):
    """Likewise, by the server."""
    trainer = trainer_of(**{**KINDS["full"], **BRANCHES})
    trainer.train()
    assert_branches(trainer.branches, trainer.state.log_history)


@pytest.mark.parametrize(("back_end", "kind"), [("ddp", "full"), ("fsdp2", "lora")])
def test_served_students_of_two_processes(server, student_dir, tmp_path, capsys, back_end, kind):
    """One process speaks to the server for both; each gets the completions of its own prompts.

    An update that is missed shows on both, and the metric is the mean over their tokens.
    """
    place = {"vllm_mode": "server", "vllm_server_base_url": server.address, "vllm_server_timeout": 10.0}
    runs = student_run(back_end, student_dir, tmp_path, "", kind, **place)
    for generations, seen in runs:
        report(capsys, f"served to two processes, {back_end}, {kind}", [g for g in generations if g.step != 3])
        # Another process's completions would be far from what the student makes of these prompts.
        (missed,) = (g for g in generations if g.step == 3)
        assert missed.mean > LARGE_DIFFERENCE
        in_sync = [("train", 0), ("train", 1), ("eval", 2), ("train", 2), ("eval", 4), ("eval", 4)]
        assert_in_sync([g for g in generations if g is not missed], in_sync)
        assert seen["drift"] < 1e-6
    assert_logged(runs)
    assert [seen["sent"] for _, seen in runs] == [5, 0]  # for steps 0, 1, 2, 4, and after the change
    first, second = ({str(prompt) for prompt, _ in seen["first"]} for _, seen in runs)
    assert len(first) == len(second) == 8
    assert not first & second


def test_missing_updates_are_noticed(trainer_of, sync, caplog):
    """With a server that keeps its first weights the comparison fails, and the trainer warns once."""
    logging.enable_propagation()
    trainer = trainer_of(eval_strategy="no")
    sync.enabled = False
    trainer.train()
    assert min(g.mean for g in trainer.generations[1:]) > LARGE_DIFFERENCE
    means = logged(trainer.state.log_history, "sampling/sampling_logp_difference/mean")
    assert means == pytest.approx([g.mean for g in trainer.generations], abs=1e-4)
    assert caplog.text.count("it does not run the trained student") == 1


def test_replayed_steps_generate_nothing_and_the_next_one_is_in_sync(trainer_of, sync, tmp_path):
    """After a crash two steps come from the journal, without the engine; it is brought up to date for the third."""

    class Crash(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 3

    settings = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "no"}
    first = trainer_of(callbacks=[Crash()], **settings)
    first.train()
    assert sync.count == 3

    # The engine's own settings may change: what is in the journal stays as good as it was.
    again = trainer_of(vllm_max_model_length=512, **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert again.state.global_step == 4
    assert [(g.mode, g.step) for g in again.generations] == [("train", 3)]
    assert again.generations[0].largest < CLOSE
    assert sync.count == 4
    served_until_then = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-2", dtype=torch.float32)
    assert again.difference_to(served_until_then).mean() > 10 * CLOSE
    # That of the first step is the checkpoint's, and those of the replayed steps come from the journal.
    assert len(logged(again.state.log_history, "sampling/sampling_logp_difference/mean")) == 4


GREEDY = {"top_k": {"top_k": 1}, "top_p": {"top_p": 1e-6}, "min_p": {"min_p": 1.0}}


@pytest.mark.parametrize("name", [*GREEDY, "repetition_penalty", "end"])
def test_settings_of_the_sampling_reach_the_engine(trainer_of, student_dir, name):
    """Each leaves one choice: token for token what transformers writes without any. So does another end of a turn."""
    tokenizer = AutoTokenizer.from_pretrained(student_dir, padding_side="left")
    penalty = 1.3 if name == "repetition_penalty" else 1.0
    if name == "end":  # a text of the student's, so the engine's own tokenizer would continue
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(tokenizer.encode(".")[-1])
    trainer = trainer_of(
        temperature=2.0, processing_class=tokenizer, repetition_penalty=penalty, **GREEDY.get(name, {"top_k": 1})
    )
    prompt_ids, *_ = trainer._tokenize_prompts([example["prompt"] for example in trainer.eval_dataset])
    written = trainer._generate_single_turn(prompt_ids, None, {})
    greedy = {"do_sample": False, "max_new_tokens": SETTINGS["max_completion_length"], "repetition_penalty": penalty}
    for prompt, ids in zip(prompt_ids, written, strict=True):
        prompt = torch.tensor([prompt])
        expected = trainer.model.generate(prompt, **greedy, eos_token_id=trainer.eos_token_ids, top_k=None, top_p=None)
        assert ids == expected[0, prompt.shape[1] :].tolist()
    if name == "end":
        assert {ids[-1] for ids in written} == {tokenizer.eos_token_id}
