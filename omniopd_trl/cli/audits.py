# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""`omniopd audits` and `omniopd report`: what the teacher said, in the terminal and as a page."""

import argparse
import heapq
import json
import random
import sys
from collections.abc import Callable
from operator import attrgetter
from pathlib import Path
from typing import Any

from omniopd_trl.cli.options import number, positive_int
from omniopd_trl.errors import ConfigError, DataError


def add_parsers(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add both commands to the parser of `omniopd`."""
    audits = commands.add_parser(
        "audits",
        help="show chunks beside what the teacher wrote in their place",
        description="Show audited chunks: the student's text, each distinct rollout of the teacher with its count and "
        "similarity, and the posterior. Without a selection: the five chunks with the lowest posterior of the last "
        "step. With branches, advantages are compared in place of posteriors. The run may still be writing.",
        allow_abbrev=False,
    )
    audits.add_argument("folder", metavar="RUN_DIR", help="the `output_dir` of a run")
    audits.add_argument("--step", type=int, metavar="N", help="only audits of this optimizer step")
    audits.add_argument("--prompt", metavar="TEXT", help="only audits whose prompt contains this text")
    choice = audits.add_mutually_exclusive_group()
    lowest = "the K chunks with the lowest posterior, or with branches the lowest advantage"
    choice.add_argument("--worst", type=positive_int, metavar="K", help=lowest)
    choice.add_argument("--best", type=positive_int, metavar="K", help="the K chunks with the highest one")
    choice.add_argument("--random", type=positive_int, metavar="K", help="K random chunks")
    form = audits.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print one JSON list")
    form.add_argument("--jsonl", action="store_true", help="print one JSON object per line")
    audits.set_defaults(call=show_audits)

    report = commands.add_parser(
        "report",
        help="write a run, a probe or evaluations to one HTML file",
        description="Write a page with a run's settings, its dynamics and a browser of its audits; of a probe also "
        "its verdict. With two runs, the page compares them. A run may still be writing. Of evaluations, the page has "
        "the metrics, the paired test against the first, and all samples. The file needs no network.",
        allow_abbrev=False,
    )
    report.add_argument(
        "folders",
        nargs="+",
        metavar="DIR",
        help="the `output_dir` of one run, or of several; the folder of a probe; or those of evaluations",
    )
    report.add_argument("-o", "--output", metavar="FILE", help="the file (default: report.html in the first DIR)")
    report.add_argument("--figures", metavar="DIR", help="also write the figures as PNG and SVG to this folder")
    report.add_argument(
        "--live", action="store_true", help="serve the page on this machine, and update it while the run writes"
    )
    report.add_argument("--port", type=_port, default=8642, metavar="P", help="port of --live (default: 8642; 0: any)")
    report.add_argument(
        "--max_mib",
        # A browser can open no larger file.
        type=number("a number above 0 and at most 400", lambda value: 0 < value <= 400),
        default=20.0,
        metavar="M",
        help="limit of the embedded audits or samples in MiB (default: 20); evenly spaced prompts are kept, or the "
        "hardest problems",
    )
    report.set_defaults(call=write_report)


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number from 0 to 65535")
    return int(text)


def show_audits(options: argparse.Namespace) -> None:
    """Print the selected chunks.

    Raises:
        DataError: when there are none.
        JournalError: when the journal cannot be read.
    """
    from omniopd_trl.journal.browse import AuditPlace, read_audits, read_prompts
    from omniopd_trl.report.runs import Run, text_of_prompt
    from omniopd_trl.report.terminal import AuditedChunk, as_json, chunks_of, print_audits

    run = Run(options.folder)
    places = run.places
    if not places:
        raise DataError(f"{options.folder} holds no finished audit yet.")
    selection = options.worst or options.best or options.random
    step = options.step
    if step is None and selection is None and options.prompt is None:
        step = places[-1].step
    chosen = [place for place in places if step is None or place.step == step]
    if not chosen:
        raise DataError(
            f"No audit of step {step} is recorded in {options.folder}; there are steps {places[0].step} to "
            f"{places[-1].step}."
        )
    chosen = [place for place in chosen if not place.is_empty]
    if options.prompt is not None:
        prompts = zip(chosen, read_prompts(run.folder, chosen), strict=True)
        chosen = [place for place, prompt in prompts if options.prompt.lower() in text_of_prompt(prompt).lower()]
    number = selection or 5
    if options.random:
        random.shuffle(chosen)
        pool: list[AuditedChunk] = []
        for count, trajectory in enumerate(read_audits(run.folder, chosen), 1):
            pool += chunks_of([trajectory])
            if min(count, len(pool)) >= number:
                break
        found = random.sample(pool, min(number, len(pool)))
    else:
        # The chunks are in the trajectories whose own lowest or highest ones are the lowest or highest. An audit
        # of a step that is not finished has no record of them.
        known = [place for place in chosen if place.low is not None]
        unknown = [place for place in chosen if place.low is None]
        select: Callable[..., list[Any]] = heapq.nlargest if options.best else heapq.nsmallest
        end: Callable[[AuditPlace], Any] = lambda place: place.high if options.best else place.low  # noqa: E731
        chunks = chunks_of(read_audits(run.folder, [*select(number, known, key=end), *unknown]))
        found = select(number, chunks, key=attrgetter("preference"))
    if not found:
        raise DataError(
            "No audited chunk matches. Try another --step or --prompt; `omniopd report` also shows trajectories "
            "without a chunk."
        )
    if options.json:
        sys.stdout.write(json.dumps([as_json(chunk) for chunk in found], indent=2) + "\n")
    elif options.jsonl:
        for chunk in found:
            sys.stdout.write(json.dumps(as_json(chunk)) + "\n")
    else:
        from rich.console import Console

        print_audits(run, found, Console())


def write_report(options: argparse.Namespace) -> None:
    """Write the page, and the figures if asked.

    Raises:
        ConfigError: when the port of `--live` cannot be used, a file cannot be written, or evaluations are mixed with
            runs.
        DataError: when a folder holds neither audits nor a finished evaluation.
        JournalError: when a journal cannot be read.
        MissingExtraError: when matplotlib is not installed.
    """
    from omniopd_trl.report.evaluations import is_evaluation, open_evaluations, write_evaluations
    from omniopd_trl.report.figures import Figure
    from omniopd_trl.report.page import write_page
    from omniopd_trl.report.runs import open_runs

    kinds = [is_evaluation(folder) for folder in options.folders]
    if any(kinds) and (not all(kinds) or options.live or options.figures):
        raise ConfigError(
            f"{options.folders[kinds.index(True)]} holds an evaluation, which is shown beside other evaluations only, "
            "without --live and --figures. Write a page of its own for it."
        )
    if options.live:
        if options.output or options.figures:
            raise ConfigError("--live writes no file. Run the command again without it for -o and --figures.")
        serve(options)
        return
    evaluations = open_evaluations(options.folders) if all(kinds) else []
    runs = [] if evaluations else open_runs(options.folders)
    path = Path(options.output or Path(options.folders[0], "report.html"))
    figures = Path(options.figures) if options.figures else None
    try:
        for folder in (path.parent, *([figures] if figures else [])):
            folder.mkdir(parents=True, exist_ok=True)
        if evaluations:
            page = write_evaluations(evaluations, max_mib=options.max_mib)
        else:
            page = write_page(runs, max_mib=options.max_mib)
        path.write_text(page, "utf-8")
        sys.stdout.write(f"Wrote {path}, {len(page) / 2**20:.1f} MiB. Open it in a browser.\n")
        if figures:
            for figure in Figure.all(runs):
                figure.write(figures)
            sys.stdout.write(f"Wrote the figures to {figures}.\n")
    except OSError as error:
        raise ConfigError(
            f"The report cannot be written: {error}. Choose another place with -o or --figures."
        ) from error


def serve(options: argparse.Namespace) -> None:
    """Serve the page until Ctrl-C."""
    from omniopd_trl.report.live import LiveReport, make_server

    with make_server(LiveReport(options.folders, options.max_mib), options.port) as server:
        sys.stdout.write(f"The report is at http://127.0.0.1:{server.server_port}/ until Ctrl-C.\n")
        sys.stdout.flush()
        server.serve_forever()
