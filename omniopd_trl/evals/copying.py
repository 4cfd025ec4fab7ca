# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""How much of a completion repeats its prompt."""

RUN = 3  # words


def copied_share(prompt: str, completion: str) -> float:
    """Share of a completion's words that are in a run of three or more words of the prompt.

    A student that is rewarded for agreement may learn to repeat the question, on which every teacher agrees. pass@1
    alone does not show it.

    Args:
        prompt: the prompt.
        completion: the completion.

    Returns:
        A number in [0, 1]; 0 for a completion without words. Words are separated by white space, and case is ignored.

    Example:
        >>> copied_share("What is 16 - 53 ?", "16 - 53 = -37")
        0.6
    """
    source, words = prompt.lower().split(), completion.lower().split()
    runs = {tuple(source[start : start + RUN]) for start in range(len(source) - RUN + 1)}
    copied = bytearray(len(words))
    for start in range(len(words) - RUN + 1):
        if tuple(words[start : start + RUN]) in runs:
            copied[start : start + RUN] = b"\x01" * RUN
    return sum(copied) / len(words) if words else 0.0
