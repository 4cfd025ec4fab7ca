# Copyright 2026 The omniopd_trl Authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""What the tiny models of the tests were made to read."""

# Merges are learned from these lines, so that a word such as "Answer" is a few tokens and not one per byte.
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
