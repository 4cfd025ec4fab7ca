# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""The text that the tokenizers of the tiny models are trained on."""

# Merges are learned from these lines: a word such as "Answer" is a few tokens and not one per byte.
STUDENT_LINES = [
    "Solve the following math problem step by step.",
    "The last line of your response should be of the form Answer: 12",
    "Tom has 3 apples and buys 4 more. How many apples does Tom have now?",
    "First we add 3 and 4. 3 + 4 = 7. So Tom has 7 apples.",
]
TEACHER_LINES = [
    "We count the marbles: five and six are eleven, therefore the answer is eleven.",
    "Let x be the number of marbles in the bag; then x = 5 + 6 and x = 11.",
]
