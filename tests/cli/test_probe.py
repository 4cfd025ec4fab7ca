# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""`omniopd probe`: what it measures, what it pays, and what a second start pays."""

import json
import re

import pytest

from omniopd_trl.audits.auditor import Auditor
from omniopd_trl.cli.hints import option_hints
from omniopd_trl.cli.main import main
from omniopd_trl.evals.probe import Form
from omniopd_trl.journal.reader import spent
from tests.support.judge import marks_for
from tests.support.judge import openai as judge_of
from tests.support.loopback import Fault, Loopback, wire
from tests.support.loopback.teachers import services

__all__ = ["services"]  # a fixture


@pytest.fixture
def probe(recipe, tmp_path, monkeypatch, capsys):
    """A function that probes a recipe in this process and returns the exit code and what it printed."""
    monkeypatch.chdir(tmp_path)

    def run(*options, prompts=8, **settings):
        path = recipe(**{"similarity": "edit", **settings})
        code = main(["probe", "--config", path, "--num_prompts", str(prompts), *map(str, options)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def result_of(tmp_path):
    return json.loads((tmp_path / "out" / "probe" / "probe.json").read_text())


def test_without_a_service(probe, tmp_path):
    """A teacher that costs nothing. The numbers are those of a run with branches, and the options can be pasted."""
    code, out, _ = probe(prompts=16)
    assert code == 0
    result = result_of(tmp_path)
    assert result["measured"]["num_trajectories"] == 16
    assert 16 < result["measured"]["num_forks"] <= 32
    assert result["measured"]["signals"][0]["similarity"] == "edit"
    assert result["measured"]["signals"][0]["chunk_length"] == 8
    assert result["paid"]["usd"] == 0
    assert f"verdict  {result['verdict']}: {result['reason']}." in out
    page = (tmp_path / "out" / "probe" / "probe.md").read_text()
    assert out.split("\n\nWrote")[0].strip() in page
    # A random student and a teacher that writes words of the prompt: nothing to learn from.
    assert result["verdict"] in ("will not", "uncertain")
    # It is a run's folder for the other commands.
    assert main(["report", "out/probe", "-o", "page.html"]) == 0
    assert main(["audits", "out/probe"]) == 0
    assert not list(tmp_path.glob("out/probe/checkpoint-*"))


def test_a_verdict_depends_on_what_a_recipe_has():
    assert {*Form.__dataclass_fields__} <= {*option_hints()}


PRICES = {"teacher_input_price": 1.0, "teacher_output_price": 5.0}


def paid(server, name="openai:gpt-6-luna", **settings):
    return {"teacher_model_name_or_path": name, "teacher_base_url": f"{server.url}/v1", **PRICES, **settings}


def test_a_second_start_pays_nothing(probe, tmp_path, services):
    with Loopback(wire.openai) as server:
        code, first, _ = probe(**paid(server))
        asked = len(server.requests)
        bill = spent(tmp_path / "out" / "probe")
        assert code == 0
        assert asked > 8
        result = result_of(tmp_path)
        code, second, _ = probe(**paid(server))
        assert code == 0
        assert len(server.requests) == asked
        assert spent(tmp_path / "out" / "probe") == bill
        assert second == first
        # More prompts are asked for, and the first ones are not asked again.
        assert probe(prompts=16, **paid(server))[0] == 0
        more = result_of(tmp_path)
        assert more["measured"]["num_trajectories"] == 16
        assert asked < len(server.requests) == more["answers"]["requests"] + 1
    assert result["answers"]["requests"] == asked - 1  # without the first question, whether the teacher answers
    assert result["answers"]["cached"] == pytest.approx(0.6)
    assert result["paid"]["usd"] == pytest.approx(asked * 20e-6 + bill[0].completion_tokens * 5e-6)
    assert result["answers"]["seconds_per_request"] > 0
    # The recipe's two rollouts of each chunk, and a run of two steps of four prompts.
    requests = result["answers"]["requests"] / result["measured"]["num_asked"]
    chunks, cost = result["measured"]["chunks_per_trajectory"], result["cost"]["recipe"]
    assert cost["prompt_tokens"] == pytest.approx(chunks * requests * 20)
    assert cost["completion_tokens"] == pytest.approx(chunks * 2 * 3)
    assert cost["usd"] == pytest.approx(chunks * (requests * 20e-6 + 2 * 3 * 5e-6))
    assert cost["run_usd"] == pytest.approx(8 * cost["usd"])
    assert re.search(r"s per request, 0 retries, 60% of the prompt tokens from its cache", first)


def test_the_cap_is_kept(probe, tmp_path, services):
    """A cap below the worst case of the last requests: the probe stops and says so, and what is finished counts."""
    cap = 0.006

    def answer(path, body):
        answered = wire.openai(path, body)
        answered["usage"]["prompt_tokens"] = 400
        return answered

    with Loopback(answer) as server:
        code, out, error = probe("--max_usd", cap, prompts=16, **paid(server))
        assert code == 0, error
        assert "teacher_budget_usd" in result_of(tmp_path)["stopped"]
        assert "The probe stopped early" in out
        assert 0 < spent(tmp_path / "out" / "probe")[1] <= cap
        # The budget of the recipe is a cap as well, for all starts together.
        assert probe(prompts=16, **paid(server, teacher_budget_usd=cap))[0] == 0
        assert result_of(tmp_path)["paid"]["usd"] <= cap
        asked = len(server.requests)
        assert probe(prompts=16, **paid(server))[0] == 0
        assert len(server.requests) > asked
    result = result_of(tmp_path)
    assert result["measured"]["num_trajectories"] == 16
    assert result["stopped"] is None


JUDGE = {"signal": "judge", "num_branches": 3}
MARKS = judge_of(lambda messages: marks_for(messages[-1]["content"]))


def candidates_of(bodies):
    """For each solution, the candidates of each place, in the order of each question about it."""
    orders = {}
    for body in bodies:
        solution, *lists = body["messages"][1]["content"].split("\n\n<candidate ")
        places = re.findall(r'place="(\d+)">(.*?)</candidate>', "".join(lists), re.DOTALL)
        orders.setdefault(solution, []).append([[text for p, text in places if p == q] for q, _ in places])
    return orders


def test_a_judge_is_asked_twice_and_paid_once(probe, tmp_path, services):
    """The second question has the candidates of each fork in reverse order. A cascade needs no other answers."""
    folder = tmp_path / "out" / "probe"
    with Loopback(MARKS) as server:
        recipe = paid(server, **JUDGE, teacher_temperature=0.5)
        assert probe(prompts=16, **recipe)[0] == 0
        asked, result = server.bodies[1:], result_of(tmp_path)  # the first one is the question before a run
        bill = spent(folder), spent(folder / "again")
        assert probe(prompts=16, **recipe)[0] == 0
        assert probe(prompts=16, **{**recipe, "signal": "cascade", "cascade_low": 0.05, "num_rollouts": 4})[0] == 0
        assert len(server.bodies) == len(asked) + 1
        assert (spent(folder), spent(folder / "again")) == bill
        cascade = result_of(tmp_path)
    assert all(body["temperature"] == 0.5 for body in asked)
    questions = candidates_of(asked)
    for first, second in questions.values():
        assert [places[::-1] for places in first] == second != first
    answers, measured, cost = result["answers"], result["measured"], result["cost"]
    assert answers["marked"] == answers["samples"] == answers["requests"] == len(questions)
    assert (answers["malformed"], measured["num_dropped"]) == (0, 0)
    (signal,) = measured["signals"]
    # These marks follow from the texts, so they are repeated exactly.
    assert (signal["similarity"], signal["noise"], signal["spread_unrelated"]) == ("marks", 0, 0)
    assert signal["spread"] > 0.1
    assert signal["gap"] is signal["unrelated"] is None
    # 300 tokens read and 10 written for each question, and the same for the second ones.
    share = len(questions) / 16
    assert cost["recipe"]["usd"] == pytest.approx(share * 350e-6)
    assert cost["recipe"]["run_usd"] == pytest.approx(8 * share * 350e-6)
    assert cost["marked"]["prompt_tokens"] == 300
    assert result["paid"]["usd"] == pytest.approx(bill[0][1] + bill[1][1])
    assert bill[1][1] == pytest.approx(len(questions) * 350e-6)
    middling = cascade["measured"]["middling"]
    assert 0 < middling <= 1
    assert cascade["cost"]["rollouts"] == pytest.approx(4 * middling * measured["asked_per_trajectory"])
    assert cascade["measured"]["signals"] == measured["signals"]
    assert main(["report", "out/probe", "-o", "page.html"]) == 0
    assert main(["audits", "out/probe"]) == 0
    page = (tmp_path / "page.html").read_text()
    assert f"read for {len(questions)} of {len(questions)} trajectories that the judge was asked about" in page


def test_a_judge_is_asked_within_the_cap(probe, tmp_path, services):
    """Both questions about a batch come before the next batch, and an earlier start counts."""
    cap, folder = 0.01, tmp_path / "out" / "probe"
    with Loopback(MARKS) as server:
        for _ in range(2):
            code, _, error = probe("--max_usd", cap, prompts=16, **paid(server, **JUDGE))
            assert code == 0, error
            result = result_of(tmp_path)
            assert "teacher_budget_usd" in result["stopped"]
            assert result["measured"]["signals"]
            assert spent(folder / "again")[1] > 0
            assert spent(folder)[1] + spent(folder / "again")[1] == pytest.approx(result["paid"]["usd"])
            assert result["paid"]["usd"] <= cap
        asked = len(server.requests)
        assert probe(prompts=16, **paid(server, **JUDGE))[0] == 0
    assert len(server.requests) > asked
    for first, *others in candidates_of(server.bodies[1:]).values():
        assert others.count([places[::-1] for places in first]) == 1
    assert result_of(tmp_path)["answers"]["marked"] > result["answers"]["marked"]
    assert result_of(tmp_path)["stopped"] is None


def test_a_judge_without_marks_is_not_asked_again(probe, tmp_path, services):
    with Loopback(judge_of(lambda messages: "They are all good.")) as server:
        code, out, _ = probe(**paid(server, **JUDGE))
        asked = len(server.requests) - 1
    assert code == 0
    result = result_of(tmp_path)
    assert result["answers"]["samples"] * 3 == result["answers"]["malformed"] == asked
    assert result["verdict"] == "will not"
    assert "100% of the forks got no marks" in result["reason"]
    assert "'They are all good.'" in out
    assert result["options"] == {}
    assert spent(tmp_path / "out" / "probe" / "again")[1] == 0


def test_a_service_without_a_price_is_refused(probe, services):
    with Loopback(wire.openai) as server:
        code, _, error = probe(**{**paid(server, "openai:nobody-knows"), **dict.fromkeys(PRICES, ...)})
        assert not server.requests
    assert code == 1
    assert "the price of the teacher is not known" in error


def test_a_service_that_refuses_everything(probe, tmp_path, services):
    """What the service says is the reason. The first question is enough."""
    refused = wire.openai_error(400, "Content Exists Risk", "content_policy_violation")
    with Loopback(wire.openai, fault=lambda number, body: Fault(400, refused)) as server:
        code, out, _ = probe(**paid(server))
    assert code == 0
    assert result_of(tmp_path)["verdict"] == "will not"
    assert "Content Exists Risk" in out


def test_both_continuations_are_compared_where_the_model_allows_both(probe, tmp_path, services, tiny_teacher_dir):
    with Loopback(wire.openai) as server:
        settings = paid(server, "vllm:teacher", teacher_tokenizer_name_or_path=str(tiny_teacher_dir))
        code, out, error = probe(**settings)
        assert code == 0, error
        asked = len(server.requests)
        instructed = [body for body in server.bodies if "partial_solution" in str(body)]
        assert probe(**settings)[0] == 0
        assert len(server.requests) == asked
    compared = result_of(tmp_path)["continuations"]
    assert "instruct" in compared
    assert len(compared) == 2
    assert all(numbers["samples"] for numbers in compared.values())
    assert 0 < len(instructed) < asked
    assert "continuation instruct" in out


def test_both_continuations_share_the_limits(probe, tmp_path, services, tiny_teacher_dir):
    """Half as many tokens more than the recipe's own continuation takes: the other one stops there."""

    def answer(path, body):
        answered = wire.openai(path, body)
        answered["usage"]["prompt_tokens"] = 400
        return answered

    def tokens(folder):
        usage, _ = spent(tmp_path / folder)
        return usage.prompt_tokens + usage.completion_tokens

    with Loopback(answer) as server:
        settings = paid(server, "vllm:teacher", teacher_tokenizer_name_or_path=str(tiny_teacher_dir))
        assert probe("--probe_dir", "free", **settings)[0] == 0
        limit = tokens("free") * 3 // 2
        assert tokens("free") + tokens("free/other") > limit
        assert probe("--probe_dir", "limited", **settings, teacher_budget_tokens=limit)[0] == 0
    assert tokens("limited") == tokens("free")
    assert 0 < tokens("limited/other") <= limit - tokens("limited")


def test_forks_are_those_of_a_run(probe, tmp_path, monkeypatch):
    """With `fork_candidates`, the most diverse ones, and not a part of the candidates at random."""
    forks, calls = Auditor.forks, []

    def keep(auditor, trajectory, scores, chunks, branches):
        kept = forks(auditor, trajectory, scores, chunks, branches)
        calls.append((len(chunks), len(kept)))
        return kept

    monkeypatch.setattr(Auditor, "forks", keep)
    assert probe(num_branches=3, num_chunks=1, fork_candidates=3)[0] == 0
    assert any(candidates > kept for candidates, kept in calls)
    assert result_of(tmp_path)["measured"]["num_forks"] == sum(kept for _, kept in calls)


@pytest.mark.parametrize(
    ("options", "settings", "message"),
    [
        (["--max_usd", "0"], {}, "must be a number of dollars above 0"),
        (["--num_prompts", "0"], {}, "must be a whole number"),
        ([], {"teacher_model_name_or_path": "export:out"}, "is an export"),
        ([], {"teacher_model_name_or_path": ...}, "does not set `teacher_model_name_or_path`"),
        (["--probe_dir", __file__], {}, "test_probe.py is a file. Choose another folder."),
        ([], {"num_chunk": 5}, "Did you mean `num_chunks`?"),
    ],
)
def test_what_cannot_be_probed_is_refused(probe, options, settings, message, capsys):
    try:
        code, _, error = probe(*options, **settings)
    except SystemExit as stop:  # argparse
        code, error = stop.code, capsys.readouterr().err
    assert code == 2
    assert message in error


def test_a_recipe_is_needed(capsys):
    assert main(["probe"]) == 2
    assert "needs a recipe" in capsys.readouterr().err
