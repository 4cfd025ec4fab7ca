# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""`omniopd audits` shows the chunks that were asked for, also while the run writes."""

import json
import re
import subprocess
import sys

import pytest

from omniopd_trl.audits.types import Audit
from omniopd_trl.cli.main import main
from omniopd_trl.journal import browse
from omniopd_trl.journal.schema import Shown
from omniopd_trl.report.runs import visible
from omniopd_trl.teachers import Usage
from tests.support.journals import audit, journal, trajectory
from tests.support.recorded_runs import RIGHT, WRONG, record_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return record_run(tmp_path_factory.mktemp("run"))


def shown(capsys, *arguments):
    assert main(["audits", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def chunks(capsys, *arguments):
    return json.loads(shown(capsys, *arguments, "--json"))


def test_a_chunk_beside_its_rollouts(run, capsys):
    text = shown(capsys, run, "--best", 1)
    for part in ("step 0", RIGHT, "k_sem 3.250 of 4", "posterior 0.700", "100 tokens read", "0.00100 dollars"):
        assert part in text
    assert "Leo wins 9: 42 + 9 = ▏51, so Leo" in text  # the fork is marked
    assert text.count(WRONG) == 1


def test_texts_of_models_are_not_interpreted(run, capsys):
    """Neither by the terminal nor by rich: not in a prompt, a rollout, a failure or the name of a model."""
    text = shown(capsys, run, "--prompt", "hacked", "--worst", 1)
    assert not {"\x1b", "\x9b", "\0", "\u202e", "\u2028", "\ud83d"} & {*text}
    unwrapped = re.sub(r"[│\s]+", "", text)
    assert unwrapped.count(r"\x1b[2J\x9b2J[blink]b[/blink][link=http://evil.example]l[/]") == 2
    assert r"gpt-<b>5</b>-\x1b[31m" in unwrapped
    assert r"\ud83d\u2028\u202egnorw\u202c\x00" in unwrapped
    assert max(map(len, text.splitlines())) <= 80


def test_texts_of_any_language():
    """Spaces of any width and joiners of letters and emojis are left; what reorders a line, or is unseen, is not."""
    kept = "می\u200cخواهم \U0001f469\u200d\U0001f467 贴纸\u3000です 12\u202f%\xa0\n\t"
    assert visible(kept) == kept
    assert visible("\u202e\u2028\u200b\r\x85\ud800\U000e0001") == r"\u202e\u2028\u200b\r\x85\ud800\U000e0001"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"posterior_baseline": "shuffled"}, "the posteriors of a step shuffled"),
        ({"posterior_baseline": "constant"}, "the posteriors of a step replaced by their mean"),
        ({"posterior_baseline": "shuffled", "num_branches": 3}, "the advantages of a fork shuffled"),
        ({"posterior_baseline": "batch"}, None),
        ({"posterior_baseline": "mine.weights (0123456789ab)"}, None),
    ],
)
def test_a_control(tmp_path, capsys, settings, said):
    """Its numbers are from before the control, which both commands say."""
    with journal(tmp_path, num_processes=1, settings=settings) as j:
        j.record_trajectories(0, [trajectory()])
        j.record(0, 0, audit())
    text = " ".join(shown(capsys, tmp_path).split())
    assert main(["report", str(tmp_path)]) == 0
    page = (tmp_path / "report.html").read_text()
    found = "This run is a control: it trained with "
    assert (found in text, page.count(found)) == ((True, 2) if said else (False, 0))
    assert not said or (said in text and said in page)


def test_an_audit_in_numbers(run, capsys):
    """What was lost is shown with the chunks that are left."""
    (chunk,) = chunks(capsys, run, "--step", 2, "--best", 1)
    assert (chunk["index"], chunk["trajectory_set_aside_rollouts"], chunk["trajectory_chunks"]) == (1, 2, 2)
    assert "rollouts set aside: 2" in shown(capsys, run, "--step", 2, "--best", 1)
    (first, *_) = (c for c in chunks(capsys, run, "--step", 2, "--worst", 8) if c["index"] == 0)
    assert first["trajectory_dropped_chunks"] == 1


def test_a_reader_that_stops(run):
    """A pipe that is closed early ends the command without a traceback."""
    command = [sys.executable, "-m", "omniopd_trl.cli.main", "audits", str(run), "--worst", "24", "--jsonl"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert (process.wait(20), process.stderr.read()) == (1, b"")


def test_the_last_step_is_the_default(run, capsys):
    assert {chunk["step"] for chunk in chunks(capsys, run)} == {2}


@pytest.mark.parametrize(
    ("selection", "posteriors"),
    [(("--worst", 12), {0.18}), (("--best", 6), {0.7}), (("--random", 24), {0.18, 0.7, 0.325})],
)
def test_selections(run, capsys, selection, posteriors):
    found = chunks(capsys, run, *selection)
    assert len(found) == selection[1]
    assert {chunk["posterior"] for chunk in found} == posteriors


def test_filters(run, capsys):
    found = chunks(capsys, run, "--step", 1, "--prompt", "STICKERS", "--random", 99)
    assert [(chunk["step"], chunk["index"]) for chunk in sorted(found, key=lambda c: c["index"])] == [
        (1, index) for index in (0, 0, 1, 1)
    ]


def test_lines_of_json(run, capsys):
    lines = shown(capsys, run, "--jsonl").splitlines()
    assert len(lines) == 5
    first = json.loads(lines[0])
    assert sum(rollout["count"] for rollout in first["rollouts"]) == first["num_rollouts"] == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere holds no audits"),
        (["{run}", "--step", "7"], "there are steps 0 to 2"),
        (["{run}", "--prompt", "Bob"], "No audited chunk matches"),
    ],
)
def test_what_is_not_there(run, capsys, arguments, message):
    assert main(["audits", *(argument.format(run=run) for argument in arguments)]) == 1
    assert message in capsys.readouterr().err


def test_superseded_audits_are_left_out(tmp_path, capsys):
    """A step that was run again counts once, and what followed it does not count."""
    with journal(tmp_path) as j:
        for step, text in ((0, "old"), (1, "old"), (2, "old"), (1, "new")):
            j.record_trajectories(step, [trajectory()])
            j.record(step, 0, audit(text))
    found = chunks(capsys, tmp_path, "--random", 9)
    assert sorted((chunk["step"], chunk["student"]) for chunk in found) == [(0, "old"), (1, "new")]


def test_beside_a_run_that_writes(tmp_path, capsys):
    with journal(tmp_path) as j:
        j.record_trajectories(0, [trajectory(), trajectory()])
        j.record(0, 0, audit())
        assert len(chunks(capsys, tmp_path)) == 1
        j.record_usage(0, 1, Usage(1), 0.5)
        j.record(0, 1, audit())
        assert {chunk["trajectory_usd"] for chunk in chunks(capsys, tmp_path)} == {None, 0.5}


def test_it_starts_without_torch(run):
    code = "import sys; from omniopd_trl.cli.main import main; main(sys.argv[1:]); sys.exit('torch' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code, "audits", str(run)], capture_output=True, check=False).returncode
        == 0
    )


@pytest.mark.parametrize(("selection", "number"), [("--worst", 3 + 4), ("--best", 3 + 4), ("--random", 3)])
def test_a_selection_reads_few_audits(tmp_path, capsys, monkeypatch, selection, number):
    """Only the selected audits are read, and those of the step that is not finished; never those without a chunk."""
    with journal(tmp_path) as j:
        for step in range(5):
            j.record_trajectories(step, [trajectory()] * 4)
            for index in range(4):
                j.record(step, index, audit() if step else Audit())
            if step < 4:
                ends = (1 / 3, 1 / 3) if step else (None, None)
                j.record_shown(step, [Shown(index, *ends, [], [1.0] * bool(step)) for index in range(4)])
    read, places = browse._read, []
    monkeypatch.setattr(browse, "_read", lambda path, db, place: places.append(place) or read(path, db, place))
    assert len(chunks(capsys, tmp_path, selection, 3)) == 3
    assert len(places) == number
