# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""The report in a real browser: the audit browser, the keyboard, small screens, accessibility, hostile texts."""

import json
import re
import time

import pytest
from datasets import Dataset
from transformers import AutoTokenizer

from omniopd_trl.audits.types import Audit, Branch, ChunkAudit, Trajectory
from omniopd_trl.cli.main import main
from omniopd_trl.demo import asset_path
from omniopd_trl.evals.evaluate import EvalSettings, evaluate
from omniopd_trl.method.chunks import Chunk
from omniopd_trl.teachers import ScriptedTeacher
from scripts.chromium import emulate, open_page, until, use_theme
from tests.support.journals import journal
from tests.support.pages import put, texts
from tests.support.recorded_runs import HOSTILE, RIGHT, STUDENT, WRONG, record_run


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs with logged metrics; the second one has more steps."""
    folders = [record_run(tmp_path_factory.mktemp(name), steps) for name, steps in (("first", 3), ("second", 5))]
    for folder in folders:
        history = [
            {"step": step, "chunk_loss": 1 / (step + 1), "kl/unaudited": 0.01 * step, "eval_pass@1": 0.1 * step}
            for step in range(4)
        ]
        (folder / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    return folders


def write(folder, *runs, options=()):
    path = folder / "report.html"
    assert main(["report", *map(str, runs), "-o", str(path), *options]) == 0
    return path


@pytest.fixture
def page(browser):
    """A function that opens a page, and checks at the end that it logged no error and asked nothing of a network."""
    browser.get_log("browser")
    browser.get_log("performance")

    def visit(path, fragment=""):
        return open_page(browser, f"{path.as_uri()}{fragment}")

    yield visit
    assert browser.get_log("browser") == []
    sent = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    addresses = [each["params"]["request"]["url"] for each in sent if each["method"] == "Network.requestWillBeSent"]
    assert [address for address in addresses if not address.startswith(("file:", "data:", "about:"))] == []


def values(browser, selector):
    return browser.execute_script(
        "return [...document.querySelectorAll(arguments[0])].map((element) => element.value)", selector
    )


@pytest.fixture(scope="module")
def report(runs, tmp_path_factory):
    """The report of the first run, with the folder `figures` beside it."""
    folder = tmp_path_factory.mktemp("report")
    return write(folder, runs[0], options=["--figures", str(folder / "figures")])


@pytest.fixture(scope="module")
def both(runs, tmp_path_factory):
    return write(tmp_path_factory.mktemp("both"), *runs)


def test_a_click_shows_the_rollouts_of_a_chunk(report, page):
    browser = page(report)
    browser.find_elements("css selector", "#list a")[1].click()
    until(lambda: texts(browser, "article h3")[0] == "step 0, trajectory 1")
    assert texts(browser, "article > .text")[0].endswith(RIGHT)
    links = browser.find_elements("css selector", "article .chunk")
    assert [link.text.strip() for link in links][1] == RIGHT
    links[1].click()
    until(lambda: texts(browser, ".panel h3") == ["Chunk 2 of 2"])
    rows = [re.sub(r"\s+", " ", row) for row in texts(browser, ".rollouts tbody tr")]
    assert rows[0] == f"the student wrote{RIGHT}"
    assert rows[1] == f"31.000{RIGHT}"  # three times, similarity 1
    assert texts(browser, ".rollouts del") == ["51", "51"]
    assert texts(browser, ".rollouts ins") == ["61", "61"]
    facts = dict(zip(texts(browser, ".panel dt"), texts(browser, ".panel dd"), strict=True))
    assert facts["k_sem, sum of similarities"] == "3.250 of 4"
    assert facts["posterior"] == "0.700"
    (usage,) = texts(browser, ".facts")
    for fact in (
        "100 tokens read (10 from a cache)",
        "30 written",
        "1.2 s per request",
        "0.00100 dollars",
        "rollouts set aside: 2",
    ):
        assert fact in usage


def test_a_link_leads_to_a_chunk(report, page):
    browser = page(report, "#t=0.1.0.0&c=1")
    until(lambda: texts(browser, ".panel h3") == ["Chunk 2 of 2"])
    assert texts(browser, ".head h3") == ["step 1, trajectory 0"]
    (current,) = browser.find_elements("css selector", ".chunk[aria-current]")
    assert current.text.strip() == WRONG


def test_what_is_imitated_and_the_branches_of_a_fork(tmp_path, page):
    """Parts are below their rollouts. Branches are in a second table, equal ones in one row, its own text first.

    Chunks are compared by their advantage: one below 0 is red, and other chunks are green.
    """
    own, other = Branch((1,), WRONG, (), 0.25, -0.5), Branch((2,), RIGHT, (), 1.0, 0.25)
    imitated = [[HOSTILE[:9]] * 4, [" 51"] * 3 + [None]]
    run = record_run(tmp_path, 1, imitated=imitated, branches=(own, other, other))
    (tmp_path / "trainer_state.json").write_text(
        json.dumps({"log_history": [{"step": step, "branches/advantage_std": 0.5 / step} for step in (1, 2)]})
    )
    browser = page(write(tmp_path, run), "#t=0.0.0.0&c=1")
    until(lambda: texts(browser, ".panel h3") == ["Chunk 2 of 2"])
    rollouts, branches = browser.find_elements("css selector", ".rollouts")
    assert "advantage" not in rollouts.text
    assert texts(browser, ".rollouts small") == ['imitated: " 51"', "left out of the imitation"]
    head, *rows = [re.sub(r"\s+", " ", row.text) for row in branches.find_elements("css selector", "tr")]
    assert head == "times similarity advantage branches of the student (words that differ are marked)"
    assert rows == [f"1 0.250 -0.500 {WRONG}", "2 1.000 +0.250 " + RIGHT.replace("51", "6151")]
    wrong = browser.find_element("css selector", ".chunk[aria-current]")
    assert (wrong.get_attribute("class"), wrong.get_attribute("title")) == ("chunk low", "Chunk 2, advantage -0.500")
    assert texts(browser, ".legend span")[0] == "advantage below 0above"
    assert "A chunk's advantage from " in texts(browser, "#filters label")
    put(browser, "high", "-0.4")
    assert texts(browser, "#count") == ["4 of 4 trajectories."]
    put(browser, "high", "-0.6")
    assert texts(browser, "#count") == ["0 of 4 trajectories."]
    (figure,) = browser.find_elements("css selector", "figure img[alt^='Spread of the advantages']")
    assert figure.get_attribute("alt").endswith("advantages from 0.5 to 0.25.")
    browser.get(browser.current_url.replace("c=1", "c=0"))
    until(lambda: texts(browser, ".panel h3") == ["Chunk 1 of 2"])
    assert len(browser.find_elements("css selector", ".rollouts")) == 1


def test_a_mark_without_rollouts(tmp_path, page):
    """No table of what the teacher wrote; the judge's answer is not called missing."""
    chunk = ChunkAudit(Chunk(0, 2, 0), "", "It is 4", (), (0.75,), 0.5, 0.625, mark=0.75)
    with journal(tmp_path, num_processes=1) as j:
        j.record_trajectories(0, [Trajectory("2 + 2", [1], [2, 3])])
        j.record(0, 0, Audit((chunk,), answers=("1: 7.5",), failures=("one was refused",)))
    browser = page(write(tmp_path, tmp_path))
    until(lambda: texts(browser, ".panel h3"))
    assert texts(browser, ".panel dd") == ["0.750", "0.500", "0.625", "–"]
    assert texts(browser, ".rollouts") == []
    assert texts(browser, ".note") == ["the judge wrote: 1: 7.5", "missing: one was refused"]


def test_a_text_that_is_read_from_the_right(tmp_path, page):
    """It begins at the right, and its full stop is at the left."""
    text = "مريم لديها ملصقا."
    chunk = ChunkAudit(Chunk(0, 2, 0), "", text, (text,), (1.0,), 0.5, 0.5)
    with journal(tmp_path, num_processes=1) as j:
        j.record_trajectories(0, [Trajectory(text, [1], [2, 3])])
        j.record(0, 0, Audit((chunk,)))
    browser = page(write(tmp_path, tmp_path))
    until(lambda: texts(browser, ".panel h3"))
    places = """
        const answer = document.querySelector("article > .text");
        const text = document.createTreeWalker(answer, NodeFilter.SHOW_TEXT).nextNode();
        return [0, text.length - 1].map((at) => {
          const range = document.createRange();
          range.setStart(text, at);
          range.setEnd(text, at + 1);
          return range.getBoundingClientRect().left;
        });"""
    first, last = browser.execute_script(places)
    assert first > last


def test_the_fork_is_marked(report, page):
    browser = page(report, "#t=0.0.0.0")
    until(lambda: texts(browser, "article .chunk"))
    tokenizer = AutoTokenizer.from_pretrained(asset_path("student"))
    tokens = tokenizer(STUDENT)["input_ids"]
    assert texts(browser, ".chunk")[0] == tokenizer.decode(tokens[3:8])
    assert texts(browser, ".chunk:first-of-type .fork") == [tokenizer.decode(tokens[5:8])]


@pytest.mark.parametrize(
    ("filters", "number"),
    [
        ({"step": "1"}, 4),
        ({"prompt": "HOW MANY"}, 6),
        ({"low": "0.4"}, 6),
        ({"low": "0.2", "high": "0.4"}, 6),
        ({"high": "0.1"}, 0),
        ({"outcome": "a sample was refused"}, 3),
        ({"outcome": "a chunk was dropped"}, 3),
        ({"outcome": "a rollout was set aside"}, 3),
        ({"outcome": "a chunk has no similar rollout"}, 12),
        ({"step": "2", "prompt": "script"}, 2),
    ],
)
def test_filters(report, page, filters, number):
    browser = page(report)
    # Only outcomes that occurred can be chosen.
    outcomes = dict(zip(texts(browser, "#outcome option"), values(browser, "#outcome option"), strict=True))
    assert "a rollout started over" not in " ".join(outcomes)
    for name, value in filters.items():
        put(browser, name, outcomes[f"{value} ({number})"] if name == "outcome" else value)
    assert texts(browser, "#count") == [f"{number} of 12 trajectories."]
    assert len(texts(browser, "#list li")) == number
    browser.find_element("css selector", "button[type=reset]").click()
    until(lambda: texts(browser, "#count") == ["12 of 12 trajectories."])


def test_order(report, page):
    browser = page(report)
    put(browser, "order", "best")
    assert texts(browser, "#list li")[0].startswith("step 0, trajectory 1")


def test_the_keyboard(report, page):
    browser = page(report)
    body = browser.find_element("tag name", "body")
    # The first trajectory is open, with its lowest chunk.
    for key, step, index in (("n", 0, 0), ("j", 0, 1), ("j", 0, 2), ("j", 0, 3), ("j", 1, 0), ("k", 0, 3)):
        before = browser.execute_script("return location.hash")
        body.send_keys(key)
        until(lambda before=before: browser.execute_script("return location.hash") != before)
        until(lambda step=step, index=index: texts(browser, ".head h3") == [f"step {step}, trajectory {index}"])
    # Every chunk can be reached with the tabulator, and followed.
    links = browser.find_elements("css selector", "article .chunk")
    browser.execute_script("arguments[0].focus()", links[1])
    links[1].send_keys("\ue007")
    until(lambda: texts(browser, ".panel h3") == ["Chunk 2 of 2"])


def test_the_same_prompt_at_two_steps(report, page):
    browser = page(report, "#t=0.0.0.0")
    until(lambda: browser.find_elements("id", "compare"))
    other = browser.find_elements("css selector", "#compare option")[-1]
    browser.execute_script(
        "const e = document.getElementById('compare'); e.value = arguments[0]; e.dispatchEvent(new Event('change'));",
        other.get_attribute("value"),
    )
    until(lambda: len(texts(browser, "article")) == 2)
    assert texts(browser, ".head h3") == ["step 0, trajectory 0", "step 2, trajectory 1"]
    # Both sides show a chunk, and a click opens one of the second.
    assert texts(browser, ".panel h3") == ["Chunk 1 of 2"] * 2
    browser.find_elements("css selector", "article:last-child .chunk")[1].click()
    until(lambda: texts(browser, ".panel h3") == ["Chunk 1 of 2", "Chunk 2 of 2"])


def test_two_runs_side_by_side(runs, both, page):
    browser = page(both)
    assert len(texts(browser, "#summary > h3")) == 2
    put(browser, "run", "1")
    assert texts(browser, "#count") == ["20 of 32 trajectories."]
    names = [folder.name for folder in runs]
    browser.execute_script("location.hash = '#t=0.0.0.0&with=1.0.0.0'")
    until(lambda: len(texts(browser, "article")) == 2)
    assert texts(browser, ".head h3") == [f"{name}, step 0, trajectory 0" for name in names]


def test_texts_of_models_are_not_markup(report, page):
    browser = page(report, "#t=0.0.0.2&c=0")
    until(lambda: texts(browser, ".panel h3"))
    assert browser.title == "OmniOPD: " + browser.title.removeprefix("OmniOPD: ")
    assert browser.title != "hacked"
    assert any("onerror=" in row for row in texts(browser, ".rollouts .words"))
    (prompt,) = texts(browser, ".prompt")
    assert "<script>" in prompt
    # What cannot be seen is shown as an escape.
    assert prompt.endswith(r"\ufffd \u{2028} \u{202e}gnorw\u{202c} \u{0}".replace(r"\ufffd", "\ufffd"))
    assert r"gpt-<b>5</b>-\u{1b}[31m" in texts(browser, ".facts")[0]
    assert r"\u{1b}[2J\u{9b}2J[blink]" in texts(browser, ".note")[0]
    assert browser.find_elements("css selector", ":is(#details, #list) :is(img, script, b)") == []


def test_the_policy_stops_injected_scripts(report, browser):
    """Even if a text became markup, it could not run."""
    open_page(browser, report.as_uri())
    browser.execute_script(
        "document.body.insertAdjacentHTML('beforeend', arguments[0]);"
        "const script = document.createElement('script');"
        "script.textContent = \"document.title = 'hacked'\"; document.body.append(script);",
        HOSTILE,
    )
    time.sleep(0.3)
    assert browser.title != "hacked"
    assert any("Content Security Policy" in entry["message"] for entry in browser.get_log("browser"))


def test_nothing_scrolls_sideways_on_a_phone(both, page):
    browser = page(both, "#t=0.0.0.2")
    emulate(browser, 390, 844)
    try:
        until(lambda: texts(browser, ".panel h3"))
        for fragment in ("#t=0.0.0.2", "#t=0.0.0.2&with=1.0.0.2"):
            browser.execute_script("location.hash = arguments[0]", fragment)
            until(lambda fragment=fragment: len(texts(browser, "article")) == 1 + ("with" in fragment))
            assert browser.execute_script("return document.documentElement.scrollWidth") <= 390
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def violations(browser):
    """What axe-core finds."""
    axe = pytest.importorskip("axe_core_python.selenium", reason="needs axe-core-python")
    # As a debugger's code, since the page's policy allows no other script.
    found = axe.Axe().run(browser)["violations"]
    return [(v["id"], [node["html"][:200] for node in v["nodes"]]) for v in found]


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_accessibility(report, page, theme):
    """With a chunk open."""
    browser = page(report, "#t=0.0.0.1&c=1")
    use_theme(browser, theme)
    until(lambda: texts(browser, ".panel h3"))
    assert violations(browser) == []


# Samples of two evaluations of three problems, by the problem's number.
SAMPLES = {"before": ["1 2", "2 9", "0 8"], "after": ["1 1", "2 2", "7 8"]}


@pytest.fixture(scope="module")
def evaluations(tmp_path_factory):
    """The folders of two evaluations. A prompt and the samples hold markup."""
    folder = tmp_path_factory.mktemp("evaluations")
    rows = [{"prompt": f"{k} and {HOSTILE}", "answer": str(k)} for k in (1, 2, 3)]
    for name, written in SAMPLES.items():

        def answer(prefix, index, written=written):
            return f"{HOSTILE}\nAnswer: {written[int(prefix.prompt[0]) - 1].split()[index]}"

        settings = EvalSettings(num_samples=2, max_tokens=24)
        evaluate(ScriptedTeacher(answer), dataset=Dataset.from_list(rows), settings=settings, output_dir=folder / name)
    return [folder / name for name in SAMPLES]


def test_evaluations(evaluations, tmp_path, page):
    """Their metrics, the paired test, and the samples of each problem, the hardest first."""
    browser = page(write(tmp_path, *evaluations))
    assert texts(browser, "#summary > table thead th") == ["before", "after"]
    rows = {row[0]: row[1:] for row in (row.split("\t") for row in lines_of(browser, "#summary > table tbody tr"))}
    assert [cell.split(",")[0] for cell in rows["pass@1"]] == ["0.333", "0.667"]
    (compared,) = lines_of(browser, "#comparison tbody tr")
    assert compared.split("\t")[:2] == ["after", "+0.333 [+0.000, +0.500]"]
    assert "2 better, 0 worse of 3" in compared
    assert [text.split()[0] for text in texts(browser, ".problem summary")] == ["0.00,", "0.50,", "0.50,"]
    first = ".problem:first-of-type"
    browser.find_element("css selector", f"{first} summary").click()
    assert texts(browser, f"{first} h3") == ["Prompt", "Right answer", "before", "after"]
    assert texts(browser, f"{first} li .muted") == [f"wrong; answer {answer}" for answer in "0878"]
    assert all("onerror=" in text for text in texts(browser, f"{first} li .text"))
    assert browser.find_elements("css selector", "main :is(img, script, b)") == []
    assert violations(browser) == []
    # A link of the comparison opens its problem.
    (link, _) = browser.find_elements("css selector", "#comparison li a")
    target = link.get_attribute("href").partition("#")[2]
    link.click()
    until(lambda: browser.find_element("id", target).is_displayed())
    emulate(browser, 390, 844)
    try:
        assert browser.execute_script("return document.documentElement.scrollWidth") <= 390
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def lines_of(browser, selector):
    """The cells of rows, with tabs between them."""
    script = "return [...document.querySelectorAll(arguments[0])].map((row) => [...row.cells].map((c) => c.innerText))"
    return ["\t".join(cells) for cells in browser.execute_script(script, selector)]


def test_evaluations_that_cannot_be_shown(evaluations, runs, tmp_path, capsys):
    """Beside runs, unfinished, and without their samples: one line. A limit keeps the hardest problems."""
    before = str(evaluations[0])
    assert main(["report", before, str(runs[0])]) == 2
    assert "holds an evaluation" in capsys.readouterr().err
    (tmp_path / "samples.jsonl").touch()
    assert main(["report", str(tmp_path)]) == 1
    assert "interrupted is finished by the same command" in capsys.readouterr().err
    (tmp_path / "results.json").write_bytes((evaluations[0] / "results.json").read_bytes())
    assert main(["report", str(tmp_path)]) == 1
    assert "no samples of 3 of 3 problems" in capsys.readouterr().err
    path = write(tmp_path, before, options=["--max_mib", "0.0001"])
    assert "the 1 hardest of 3 problems" in path.read_text()


def test_characters_outside_the_basic_plane(tmp_path, page):
    """Python and JavaScript count them differently, and the outlines are in the right place."""
    record_run(tmp_path, 1, student="😀 Leo 👩‍🚀 wins 9: 42 + 9 = ")
    browser = page(write(tmp_path, tmp_path), "#t=0.0.0.0")
    assert texts(browser, "article > .text")[0].startswith("😀 Leo 👩‍🚀 wins")
    assert texts(browser, ".chunk")[1] == WRONG


def test_a_part_of_a_large_run(tmp_path, page):
    """What is left out is stated, and each prompt that is shown has all its trajectories in all runs."""
    runs = [record_run(tmp_path / name, 12, different_prompts=6) for name in ("a", "b")]
    browser = page(write(tmp_path, *runs, options=["--max_mib", "0.02"]))
    (said,) = texts(browser, "#left-out")
    kept = int(re.fullmatch(r"This file holds (\d+) of 96 audited trajectories.*", said)[1])
    assert 0 < kept < 96
    assert kept % 16 == 0  # 8 of each of 6 prompts in both runs
    assert len(texts(browser, "#compare option")) == 16


def test_a_run_without_a_tokenizer(tmp_path, page):
    (record_run(tmp_path, 1) / "tokenizer.json").unlink()
    browser = page(write(tmp_path, tmp_path), "#t=0.0.0.0")
    assert texts(browser, ".chunk")[1] == WRONG


def test_a_probe(tmp_path, page):
    """Its verdict, the recommended options with their reasons, and what was measured."""
    signal = {"similarity": "edit", "chunk_length": 8, "matched": 0.5, "unrelated": 0.25, "spread": 0.125}
    signal |= {"spread_unrelated": 0.0, "gap": [0.25, 0.05], "signal": [0.125, None]}
    signal["repeated"] = [0.875, 0.0625]
    measured = {"num_trajectories": 8, "num_forks": 32, "num_asked": 9, "student_agreement": 0.5}
    measured |= {"self_agreement": None, "duplicates": None, "signals": [signal]}
    answers = dict.fromkeys(("samples", "refused", "restarted", "filtered", "empty", "failed_requests", "short"), 0)
    result = {
        **{"verdict": "will teach", "reason": HOSTILE, "options": {"num_branches": 7}, "continuations": {}},
        **{"reasons": {"num_branches": "of 9 forks"}, "failures": {}, "cost": {}, "measured": measured},
        "answers": {**answers, "seconds_per_request": None},
        "paid": {"prompt_tokens": 100, "completion_tokens": 10, "usd": 0.5},
    }
    (record_run(tmp_path, 1) / "probe.json").write_text(json.dumps(result))
    browser = page(write(tmp_path, tmp_path))
    (said,) = texts(browser, "#probe > p")
    assert said.startswith("will teach: ")
    rows = [row.split("\t") for row in lines_of(browser, "#probe tbody tr")]
    assert ["num_branches", "7", "of 9 forks"] in rows
    assert ["paid for this probe", "100 tokens read and 10 written, 0.5000 dollars"] in rows
    assert ["edit", "8", "0.500", "0.250", "0.125", "0.000", "5.0", "-", "0.88 ± 0.06"] in rows
    assert browser.find_elements("css selector", "#probe :is(img, script, b)") == []
    assert len(texts(browser, "#list li")) == 4  # the audits are below


def test_figures(report, page):
    browser = page(report)
    descriptions = [image.get_attribute("alt") for image in browser.find_elements("css selector", "figure img")]
    assert descriptions[0] == "Chunk loss over 3 steps: chunk loss from 1 to 0.25."
    widths = browser.execute_script("return [...document.querySelectorAll('figure img')].map((i) => i.naturalWidth)")
    assert all(widths)
    names = {path.name for path in (report.parent / "figures").iterdir()}
    written = ("chunk_loss", "kl", "pass_at_1", "tokens_total", "dollars")
    assert names == {f"{name}.{kind}" for name in written for kind in ("svg", "png")}
    # The last two count what the journal holds: four trajectories at each of three steps.
    assert "Cost so far over 2 steps: dollars from 0.004 to 0.012." in descriptions
