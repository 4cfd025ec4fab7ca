# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""The GPU kit: its dry run from wheels without a network, what it does with late commands, and its tables."""

import json
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest

from benchmarks import gpu, gpu_tables
from benchmarks.results import add_result, read_results
from tests.support.back_ends import needs

ROOT = Path(gpu.__file__).parents[1]
# What the image of such a machine holds of what the kit needs; the packages that these require are there, too.
ON_THE_MACHINE = (
    *("torch", "accelerate", "huggingface_hub", "tokenizers", "safetensors", "numpy", "pandas", "pyarrow", "xxhash"),
    *("pytest", "pytest-timeout", "pytest-xdist", "hypothesis", "sacrebleu", "sympy", "psutil", "pip", "setuptools"),
    *("regex", "typer", "jinja2", "anyio", "h11", "idna", "einops", "msgpack", "ninja", "py-cpuinfo", "requests"),
)


def required(names: tuple[str, ...]) -> Iterator[str]:
    """The installed distributions of these names, and those that they require."""
    waiting, seen = list(names), set()
    while waiting:
        name = re.split(r"[^\w.-]", waiting.pop(), maxsplit=1)[0]
        key = re.sub(r"[-_.]+", "-", name).lower()
        if key in seen:
            continue
        seen.add(key)
        try:
            requires = distribution(name).requires or []
        except PackageNotFoundError:
            continue  # for another platform
        yield name
        waiting += [each for each in requires if "extra ==" not in each]


def machine_like_python(folder: Path) -> Path:
    """An interpreter that has what the machine has, and nothing else."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    for name in required(ON_THE_MACHINE):
        found = distribution(name)
        tops = {Path(file).parts[0] for file in found.files or () if not str(file).startswith((".", "/"))}
        for top in tops - {"__pycache__"}:
            source = Path(str(found.locate_file(top)))
            if source.exists() and not (packages / top).exists():
                (packages / top).symlink_to(source)
    return folder / "bin" / "python"


def without_network() -> list[str]:
    """A command that runs another one in a network of its own, where only the loopback interface is."""
    alone = ["unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]
    tried = subprocess.run([*alone, "true"], capture_output=True, check=False) if shutil.which("unshare") else None
    return alone if tried is not None and tried.returncode == 0 else []


def cpu_seconds() -> float:
    """CPU time of all child processes that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_dry_run_from_wheels_without_a_network(tmp_path):
    """Every part runs on tiny shapes, from the wheels and what such a machine has, and writes the same files."""
    needs("zero3")  # builds its operator for CPUs, which would count against the time of a part
    wheels, out = tmp_path / "wheels", tmp_path / "out"
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    subprocess.run(["bash", str(ROOT / "scripts/gpu_wheels.sh"), str(wheels), version], check=True)
    python = machine_like_python(tmp_path / "python")
    missing = subprocess.run([python, "-c", "import trl"], capture_output=True, text=True, check=False)
    assert "No module named 'trl'" in missing.stderr
    environment = {
        **{key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
        **{"WHEELS": str(wheels), "OUT": str(out), "PYTHON": str(python), "COMMIT": "0123456789abcdef"},
        "TORCH_EXTENSIONS_DIR": str(Path(sys.prefix) / "torch_extensions"),
    }
    before = cpu_seconds()
    run = subprocess.run(
        [*without_network(), "bash", str(ROOT / "benchmarks/gpu.sh"), "--dry-run", "--seconds", "1500"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-3000:]
    assert {path.name for path in out.iterdir()} == {"results.json", "results.md", "log.txt"}
    results = json.loads((out / "results.json").read_text())
    assert list(results["parts"]) == list(gpu.PARTS)
    entries = [entry for part in results["parts"].values() for entry in part.values()]
    assert {entry["status"] for entry in entries} == {"ok"}
    assert results["commit"] == "0123456789abcdef"
    tests = [test for part in ("right", "scales") for _, test in gpu_tables.measured(results, part)]
    # The first and the last parameters of each.
    assert {test["test"].split("::")[0] for test in tests} == {
        path.stem for path in (ROOT / "tests/gpu").glob("test_*.py")
    }
    assert len(tests) > 10
    assert {test["outcome"] for test in tests} == {"passed"}
    assert sum(len(test["errors"]) for test in tests) > 20
    assert (out / "results.md").read_text() == gpu_tables.markdown(results)
    # Five minutes on two idle cores. Other tests run beside this one, so the CPU time is compared.
    assert cpu_seconds() - before < 2 * 300


def test_a_late_command_ends_with_all_that_it_started(tmp_path, capsys):
    """Its output is kept, later commands run, and what it left running is killed."""
    kit = gpu.Kit(tmp_path, 60, dry_run=True)
    started = tmp_path / "started"
    code = (
        "import subprocess, sys, time; "
        f"p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']); "
        f"open({str(started)!r}, 'w').write(str(p.pid)); print('before', flush=True); time.sleep(600)"
    )
    kit.run("fast", "late", ["-c", code], 5)
    kit.run("fast", "failing", ["-c", "raise SystemExit('said at the end')"], 5)
    kit.run("fast", "good", ["-c", "print(1)"], 5)
    results = json.loads((tmp_path / "results.json").read_text())
    assert [e["status"] for e in results["parts"]["fast"].values()] == ["late", "exit code 1", "ok"]
    assert "before" in (tmp_path / "log.txt").read_text()
    assert "said at the end" in capsys.readouterr().out
    state = Path(f"/proc/{started.read_text()}/stat")
    assert not state.exists() or state.read_text().split()[2] == "Z"


def test_nothing_starts_without_time(tmp_path):
    """A part for which no time is left is named, and not run."""
    kit = gpu.Kit(tmp_path / "out", 0, dry_run=True)
    kit.run("fast", "it", ["-c", f"open({str(tmp_path / 'ran')!r}, 'w')"], 5)
    assert "no time was left" in (tmp_path / "out" / "results.md").read_text()
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(("after", "status"), [("0.800", "ok"), ("0.700", "bound missed")])
def test_gain_of_the_demo(tmp_path, after, status):
    """What the training command prints is read, and held against the CPU's."""
    output = (
        f"student before, pass@1  0.414\nstudent after, pass@1   {after} (step 40)\nteacher, pass@1         0.93\n"
        "wall time of training   1 min 5 s\n"
    )
    kit = gpu.Kit(tmp_path, 60, dry_run=True)
    kit.run("learns", "demo", ["-c", f"print({output!r})"], 5, read=gpu.gain_of)
    (entry,) = kit.results["parts"]["learns"].values()
    assert entry["status"] == status
    (measured,) = entry["measured"]
    assert (measured["before"], measured["after"], measured["teacher"]) == (0.414, float(after), 0.93)
    assert measured["training_seconds"] == 65
    assert f"| 0.414 | {after} |" in (tmp_path / "results.md").read_text()


def test_junit_files_are_read(tmp_path):
    """Outcomes, messages, and what each test held against a bound; NaN counts as the worst."""
    (tmp_path / "junit").write_text(
        """<testsuites><testsuite>
        <testcase classname="tests.gpu.test_kernels" name="test_kl[a]" time="1.5"><properties>
        <property name="error:kl" value="nan"/><property name="bound:kl" value="0.1"/></properties></testcase>
        <testcase classname="tests.gpu.test_kernels" name="test_kl[b]" time="0.5"><properties>
        <property name="error:kl" value="0.05"/><property name="bound:kl" value="0.1"/></properties>
        <failure message="assert 1 == 2">trace</failure></testcase>
        <testcase classname="tests.gpu.test_x" name="test_y" time="0"><skipped message="no card"/></testcase>
        </testsuite></testsuites>"""
    )
    first, second, third = read_results(tmp_path / "junit")
    assert first["test"] == "test_kernels::test_kl[a]"
    assert (second["outcome"], second["message"], second["errors"]) == ("failed", "assert 1 == 2", {"kl": [0.05, 0.1]})
    assert (third["outcome"], third["message"]) == ("skipped", "no card")
    results = {
        **gpu.machine(),
        "dry_run": True,
        "parts": {"right": {"tests": {"command": "", "status": "", "seconds": 1}}},
    }
    results["parts"]["right"]["tests"]["measured"] = [first, second, third]
    text = gpu_tables.markdown(results)
    assert "1 passed, 1 failed, 1 skipped" in text
    assert "| `test_kernels::test_kl` | kl | nan | 0.1 |" in text


def test_results_are_added_to_a_file(tmp_path):
    """A reader finds all measurements so far."""
    path = tmp_path / "results.json"
    assert read_results(path) == []
    add_result(path, {"a": 1})
    add_result(path, {"b": 2})
    assert read_results(path) == [{"a": 1}, {"b": 2}]


def test_the_page_has_the_committed_results(capsys):
    """The tables of docs/benchmarks.md are those of the committed results."""
    assert gpu_tables.main(["--check"]) == 0, capsys.readouterr().err
