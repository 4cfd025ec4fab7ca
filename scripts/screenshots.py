# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""The screenshots of the documentation, from the report of a run of the demo.

    python -m scripts.screenshots runs/demo

writes `docs/images/report-*.png`. Selenium, Chromium and its driver must be installed.
"""

import argparse
import io
import tempfile
from pathlib import Path

from PIL import Image

from omniopd_trl.journal.browse import AuditedTrajectory, read_audits
from omniopd_trl.report.page import write_page
from omniopd_trl.report.runs import Run
from scripts.chromium import chromium, emulate, open_page, use_theme

FOLDER = Path("docs/images")
# Name, width, height, scale and theme, and what is at the top of the picture.
PICTURES = (
    ("report-audits", 1200, 942, 1.5, "light", "#audits"),
    ("report-audits-dark", 1200, 942, 1.5, "dark", "#audits"),
    ("report-dynamics-dark", 1200, 760, 1.5, "dark", "header"),
    ("report-phone", 390, 844, 1.0, "light", "article .text"),
)
COLORS = 256  # the pictures are flat, and in full color several times as large


def corrected(trajectory: AuditedTrajectory) -> int | None:
    """The number of a chunk that every rollout corrects in the same few words, beside one that they all repeat."""
    if not any(min(chunk.similarities) == 1 for chunk in trajectory.chunks):
        return None
    for number, chunk in enumerate(trajectory.chunks):
        words = chunk.text.split()
        if len(words) > 4 and len({*chunk.rollouts}) == 1:
            others = chunk.rollouts[0].split()
            if len(others) == len(words) and sum(a != b for a, b in zip(words, others, strict=True)) == 2:
                return number
    return None


def link(run: Run) -> str:
    """The address of the first such chunk, in the page of one run."""
    for place, trajectory in zip(run.places, read_audits(run.folder, run.places), strict=True):
        if (chunk := corrected(trajectory)) is not None:
            return f"#t=0.{place.step}.{place.rank}.{place.index}&c={chunk}"
    raise SystemExit(f"No chunk of {run.folder} is corrected by all of its rollouts: give the folder of a demo run.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="RUN_DIR", help="the `output_dir` of a run of the demo")
    run = Run(parser.parse_args().folder)
    FOLDER.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary, chromium() as driver:
        page = Path(temporary) / "report.html"
        page.write_text(write_page([run]), "utf-8")
        for name, width, height, scale, theme, top in PICTURES:
            emulate(driver, width, height, scale)
            use_theme(driver, theme)
            open_page(driver, page.as_uri() + link(run))
            driver.execute_script(
                "scrollBy(0, document.querySelector(arguments[0]).getBoundingClientRect().top - 8)", top
            )
            shot = Image.open(io.BytesIO(driver.get_screenshot_as_png())).convert("RGB")
            picture = shot.quantize(COLORS, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
            path = FOLDER / f"{name}.png"
            picture.save(path, optimize=True)
            print(f"{path}: {path.stat().st_size / 1000:.0f} kB")  # noqa: T201


if __name__ == "__main__":
    main()
