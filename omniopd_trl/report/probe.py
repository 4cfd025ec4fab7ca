# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""The numbers of a probe for people, in the terminal and in a page."""

from collections.abc import Mapping, Sequence
from typing import Any


def measured_rows(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What a probe measured, as names and values for people; `result` is the content of `probe.json`."""
    measured, answers = result["measured"], result["answers"]
    if measured is None:
        return []
    forks = f"{measured['num_forks']} forks, {measured['num_asked']} of them with branches that differ"
    rows = [("probed", f"{measured['num_trajectories']} trajectories, {forks}")]
    has_marks = "marked" in answers
    names = ("refused", "malformed" if has_marks else "restarted", "filtered", "empty", "failed_requests")
    counts = ", ".join(f"{answers[name]} {name}" for name in names)
    if has_marks:
        share = f"{answers['marked']} of {answers['samples']} trajectories that the judge was asked about"
        rows.append(("marks", f"read for {share}; answers: {counts}"))
    else:
        rows.append(("samples", f"{answers['samples']} asked for: {counts}; {answers['short']} cut short"))
    if answers["seconds_per_request"] is not None:
        latency = f"{answers['seconds_per_request']:.1f} s per request, {answers['retries']} retries"
        rows.append(("service", f"{latency}, {answers['cached']:.0%} of the prompt tokens from its cache"))
    rows += [("failure", f"{count} x {text}") for text, count in list(result["failures"].items())[:3]]
    if measured["signals"] and not has_marks:
        name = measured["signals"][0]["similarity"]  # the first is the recipe's
        agreement = f"student with itself {measured['student_agreement']:.3f}"
        if measured["self_agreement"] is not None:
            agreement += f", teacher with itself {measured['self_agreement']:.3f}"
            agreement += f" ({measured['duplicates']:.0%} of the pairs are equal)"
        agreement += f", student with teacher {measured['signals'][0]['matched']:.3f}"
        rows.append((f"agreement by {name}", agreement))
    for name, numbers in result["continuations"].items():
        if "failure" in numbers:
            rows.append((f"continuation {name}", f"not compared: {numbers['failure']}"))
            continue
        share = f"{numbers['refused']} refused and {numbers['restarted']} restarted of {numbers['samples']} samples"
        gap = "" if numbers["gap"] is None else f", agreement {numbers['agreement']:.3f}, {numbers['gap'][0]:.3f} "
        rows.append((f"continuation {name}", share + gap + "above unrelated rollouts" * bool(gap)))
    return rows


def cost_rows(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What a trajectory of the recipe costs, and what the probe cost, as names and values for people."""
    rows = []
    costs = result["cost"]
    titles = {"recipe": "price, as it is", "recommended": "price, recommended", "marked": "price, with marks"}
    for name, title in titles.items():
        if name not in costs:
            continue
        one = costs[name]
        text = f"{one['prompt_tokens']:,.0f} tokens read and {one['completion_tokens']:,.0f} written per trajectory"
        text += " that has marks" * (name == "marked")
        if one["usd"] is not None:
            text += f", {one['usd']:.4f} dollars"
        if one.get("run_usd") is not None:
            text += f"; {one['run_usd']:,.2f} for {costs['trajectories']:,} trajectories"
        rows.append((title, text))
    if "rollouts" in costs:
        share = f"{result['measured']['middling']:.1%} of the forks have marks between the thresholds"
        rows.append(("rollouts", f"{share}: {costs['rollouts']:.2f} per trajectory, which are not in the price"))
    paid = result["paid"]
    text = f"{paid['prompt_tokens']:,} tokens read and {paid['completion_tokens']:,} written"
    return [*rows, ("paid for this probe", text + (f", {paid['usd']:.4f} dollars" if paid["usd"] else ""))]


def signal_rows(signals: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """The titles and the rows of the comparison of similarities and chunk lengths, the recipe's first."""
    titles = [
        "similarity",
        "C",
        "agreement",
        "unrelated",
        "spread",
        "unrelated",
        "standard errors above 0: gap",
        "spread",
        "repeated",
    ]
    rows = [
        [signal["similarity"], str(signal["chunk_length"])]
        + [_decimals(signal[name]) for name in ("matched", "unrelated", "spread", "spread_unrelated")]
        + ["-" if signal[name] is None else _sigmas(*signal[name]) for name in ("gap", "signal")]
        + [_with_error(signal.get("repeated"))]  # not there in older files
        for signal in signals
    ]
    return titles, rows


def _decimals(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _with_error(estimate: Sequence[float | None] | None) -> str:
    if estimate is None or estimate[1] is None:
        return "-"
    return f"{estimate[0]:.2f} ± {estimate[1]:.2f}"


def _sigmas(value: float, error: float | None) -> str:
    return "-" if not error else f"{value / error:.1f}"
