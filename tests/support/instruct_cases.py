# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Example answers of instructed models, and solutions that tests split at any point."""

from typing import NamedTuple


class Case(NamedTuple):
    """One answer and its expected repair.

    Attributes:
        name: short description of the answer.
        prefix: text of the student.
        output: answer of the model.
        text: expected text after the repair.
        outcome: expected outcome of the repair.
        prompt: the problem, if it matters.
    """

    name: str
    prefix: str
    output: str
    text: str
    outcome: str = "ok"
    prompt: str = ""


APPLES = "Let x be the number of apples that Tom has. He gives away 3 of them, so"
LEO = "Leo has 8 stickers. He buys 3 packs with 2 stickers each. How many stickers does Leo have now?"
TO_LEO = "Leo starts with 8 stickers. He buys 3 packs with 2 stickers each, so he"
STEPS = "Step 1: Write the equation.\n2x + 3 = 11\n\nStep 2: Subtract 3 from both sides.\n2x ="
CODE = "We can write it as a loop:\n\n```python\ndef total(values):\n    result = 0\n"

CASES = [
    # Exact continuations stay as they are.
    Case("exact, next word", "The sum of the", " angles is 180.", " angles is 180."),
    Case("exact, mid-word", "We continue with the contin", "uation of the proof.", "uation of the proof."),
    Case("exact, mid-word after a whole word", "By the", "orem 3 we are done.", "orem 3 we are done."),
    Case("exact, two words that make one", "We put x in", "to the equation.", "to the equation."),
    Case("exact, mid-number", "The total is 12", "34 dollars.", "34 dollars."),
    Case("exact, decimal point", "It costs 3", ".50 dollars", ".50 dollars"),
    Case("exact, thousands", "They pay 1,", "250 in total.", "250 in total."),
    Case("exact, ordinal", "This is the 2", "nd case.", "nd case."),
    Case("exact, punctuation", "Therefore x = 4", ". This is the answer.", ". This is the answer."),
    Case("exact, new line", "x = 4", "\ny = 5", "\ny = 5"),
    Case("exact, second half of a blank line", "So x = 4.\n", "\nNow y.", "\nNow y."),
    Case("exact, apostrophe", "Tom", "'s apples", "'s apples"),
    # Beginnings that equal the end of the prefix but are not repetitions.
    Case("same digit continues", "The result is 1", "1 apples", "1 apples"),
    Case("same number starts the answer", "x = 4", "4 + 2", "4 + 2"),
    Case("same word is meant", "It is very very", " very large.", " very large."),
    Case("sum of equal terms", "2 + 2 +", " 2 + 2 = 8", " 2 + 2 = 8"),
    Case("square of a bracket", "= (x-1)", "(x-1)(x+2)", "(x-1)(x+2)"),
    Case("equal fractions", "\\frac{1}{3} + ", "\\frac{1}{3} + \\frac{1}{3}", "\\frac{1}{3} + \\frac{1}{3}"),
    Case("rows of a matrix", "0 & 0 \\\\\n", "0 & 0 \\\\\n0 & 1", "0 & 0 \\\\\n0 & 1"),
    Case("equal words in brackets", "= (ab)", "(ab)c", "(ab)c"),
    Case("equal tags", "One line.<br>", "<br>Another line.", "<br>Another line."),
    Case("a loop continues", "Row, row, row, ", "row, row your boat", "row, row your boat"),
    # Repetitions.
    Case("repeats the last word", "The answer is therefore", "therefore 42.", " 42."),
    Case("repeats the last words", "The sum of the angles", "the angles is 180.", " is 180."),
    Case("repeats the last words, space first", "The sum of the angles", " of the angles is 180.", " is 180."),
    Case(
        "repeats the last sentence",
        "We know a = 3. Then the area is half of the base",
        "Then the area is half of the base times the height.",
        " times the height.",
    ),
    Case(
        "repeats the last paragraph",
        "First we add.\n\nThen we multiply both sides by two and",
        "Then we multiply both sides by two and get x = 8.",
        " get x = 8.",
    ),
    Case("repeats the whole prefix", APPLES, APPLES + " he has x - 3 left.", " he has x - 3 left."),
    Case(
        "repeats the whole prefix with other line breaks",
        "We add:\n\n2 + 3 = 5\n\nThen we",
        "We add:\n2 + 3 = 5\nThen we double it.",
        " double it.",
    ),
    Case("repeats in another case", "we see that the total cost", "The total cost is 7.", " is 7."),
    Case("repeats a begun word", "This is the contin", "continuation of the text.", "uation of the text."),
    Case("repeats words and a begun word", "The sum of the ang", "the angles is 180.", "les is 180."),
    Case("repeats an equation", "so that x = 4 + 2", "= 4 + 2 = 6.", " = 6."),
    Case("repeats a sum up to its sign", "so that x = 4 + ", "x = 4 + 2 = 6", " 2 = 6"),
    Case("repeats the left side", "We know x - 3 = 0, so x = ", "x = 3.", " 3."),
    Case("repeats a result", "so that x = 4", "= 4 + 2", " + 2"),
    Case("repeats after an ellipsis", "The sum of the ang", "...the angles is 180.", "les is 180."),
    Case("repeats across a line break", "It follows that\nthe sum", "that the sum is 9", " is 9"),
    Case("repeats, then a newline", "The answer is five.\n", "The answer is five.\nCheck it.", "\nCheck it."),
    Case("repeats everything and stops", "The final answer is 42.", "The final answer is 42.", "", "empty"),
    # Greetings and meta lines.
    Case("greets", "The sum of the ang", "Sure! les is 180.", "les is 180."),
    Case("announces", "The sum of the ang", "Here is the continuation:\n\nles is 180.", "les is 180."),
    Case("greets and announces", "so that x", "Sure, here's the continuation:\n\n= 4.", "= 4."),
    Case(
        "announces and repeats",
        "The sum of the ang",
        "Certainly! Continuing from where the text left off:\n\nthe angles is 180.",
        "les is 180.",
    ),
    Case("promises to continue, on its own line", "x = ", "I'll continue from where it stopped:\n7", "7"),
    Case("label in bold", "x = ", "**Continuation:**\n7", "7"),
    Case("German", "Die Summe der Wink", "Natürlich, hier ist die Fortsetzung:\n\nel ist 180.", "el ist 180."),
    Case("French", "La somme des ang", "Bien sûr, voici la suite :\n\nles est 180.", "les est 180."),
    Case("Spanish", "La suma de los áng", "Claro, aquí está la continuación:\nulos es 180.", "ulos es 180."),
    Case("Chinese", "三角形的内角", "好的,以下是续写内容:\n和是180度。", "和是180度。"),
    Case("Japanese", "三角形の内角の", "はい、続きは次のとおりです:\n和は180度です。", "和は180度です。"),
    Case("Russian", "Сумма уг", "Конечно, вот продолжение:\nлов равна 180.", "лов равна 180."),
    Case("not a greeting", "They found the trea", "sure.\nIt was gold.", "sure.\nIt was gold."),
    Case("not a greeting either", "x > 0. ", "Of course, y > 0 too.", "Of course, y > 0 too."),
    # Fences.
    Case("fence", "so that x ", "```\n= 4.\n```", "= 4."),
    Case("fence with a language", "so that x ", "```markdown\n= 4.\n```", "= 4."),
    Case("fence of LaTeX", "so that $x ", "```latex\n= \\frac{1}{2}$.\n```", "= \\frac{1}{2}$."),
    Case("fence after an announcement", "so x ", "Here is the continuation:\n```\n= 4.\n```", "= 4."),
    Case("fence without an end", "so that x ", "```\n= 4 because", "= 4 because"),
    Case("the solution's own code block", "The code:\n", "```python\nx = 1\n```", "```python\nx = 1\n```"),
    Case("its own code block, trimmed", "The code:", "```python\nx = 1\n```", "```python\nx = 1\n```"),
    Case(
        "opens the code block again",
        CODE,
        "```python\n    for value in values:\n```",
        "    for value in values:\n```",
    ),
    Case("closes the code block, trimmed", CODE + "    return result", "```\nIt is linear.", "```\nIt is linear."),
    Case("fence inside a code block", CODE + "    result +=", "```\n value\n```", " value\n```"),
    Case("closes the code block", CODE + "    return result\n", "```\nIt is linear.", "```\nIt is linear."),
    # Quotation marks and tags.
    Case("quotes", "The sum of the ang", '"les is 180."', "les is 180."),
    Case("curly quotes", "The sum of the ang", "“les is 180.”", "les is 180."),
    Case("quotes around a repetition", "The sum of the angles", '"the angles is 180."', " is 180."),
    Case("a quotation that is meant", "The answer is ", '"yes"', '"yes"'),
    Case("closes a quotation", 'She said "yes', '" and left "early"', '" and left "early"'),
    Case("tag echoed", "The sum of the ang", "<partial_solution>les is 180.</partial_solution>", "les is 180."),
    Case("tag of its own", "The sum of the ang", "<continuation>\nles is 180.\n</continuation>", "les is 180."),
    Case("closing tag only", "The sum of the ang", "les is 180.</partial_solution>", "les is 180."),
    Case("a tag of the solution", "<output>4</output>\n", "<output>5</output>", "<output>5</output>"),
    # White space between the prefix and the continuation is kept.
    Case("no space is added", "The value of the", "answer is 4.", "answer is 4."),
    Case("one space too many", "The sum is ", " 42.", " 42."),
    Case("newline after a space", "The sum is: ", "\n42", "\n42"),
    Case("second half of an operator", "if a % 2 =", "= 0:", "= 0:"),
    # Restarts.
    Case("starts over like the prefix", APPLES, APPLES[:60] + " 4", APPLES[:60] + " 4", "restarted"),
    Case("starts the problem over", APPLES, "Let's solve this problem.", "Let's solve this problem.", "restarted"),
    Case("to solve this problem", APPLES, "To solve this problem, we", "To solve this problem, we", "restarted"),
    Case("greets and begins", APPLES, "Sure, let's", "Sure, let's", "restarted"),
    Case("greets after a sentence", APPLES + " x.", "Sure! Let's solve", "Let's solve", "restarted"),
    Case("greets and announces the next", APPLES + " x.", "Certainly! Here's a", "Here's a", "restarted"),
    Case("greets and defines", "", "Sure!\nLet x be 4.", "Let x be 4."),
    Case("approves and begins", APPLES, "Okay, to solve this problem,", "Okay, to solve this problem,", "restarted"),
    Case("mentions the request at its end", APPLES, "Given the partial", "Given the partial", "restarted"),
    Case("speaks to the user", APPLES, "It seems like you provided", "It seems like you provided", "restarted"),
    Case("speaks of the user's text", APPLES, "You have provided a", "You have provided a", "restarted"),
    Case("promises to continue", APPLES, "Let me continue", "Let me continue", "restarted"),
    Case("you in a solution", "To see it, ", "you have given x.", "you have given x."),
    Case("opens a tag for a solution", APPLES, "<solution>", "<solution>", "restarted"),
    Case("opens the tag of the problem", APPLES, "<problem>\nTom has", "<problem>\nTom has", "restarted"),
    Case("mentions the request", APPLES, "A partial solution is", "A partial solution is", "restarted"),
    Case("mentions the request, cut", APPLES, "To begin with the partia", "To begin with the partia", "restarted"),
    Case("begins like the problem", TO_LEO, "Leo has 14 stickers. Leo", "Leo has 14 stickers. Leo", "restarted", LEO),
    Case("next sentence like the problem", TO_LEO + " has 14. ", "Leo has 14 now.", "Leo has 14 now.", "ok", LEO),
    Case("repeats the problem", TO_LEO + " has 14.", LEO[:50], LEO[:50], "restarted", LEO),
    Case("back to step 1", STEPS, "Step 1: Write 2x = 8.", "Step 1: Write 2x = 8.", "restarted"),
    Case(
        "talks about the task", APPLES, "The partial solution is wrong.", "The partial solution is wrong.", "restarted"
    ),
    Case(
        "says what it will do",
        APPLES,
        "I will continue the solution. x",
        "I will continue the solution. x",
        "restarted",
    ),
    Case("full solution", APPLES, "Here is the full solution: x = 7", "Here is the full solution: x = 7", "restarted"),
    Case("opening inside a sentence", APPLES, "We need to find x.", "We need to find x.", "restarted"),
    Case("an opening after a sentence", APPLES + " x - 3.", " To find x, we add.", " To find x, we add."),
    Case("begins the solution, nothing written", "", "To solve this problem, we", "To solve this problem, we"),
    Case("step 1 when it is due", "We go step by step:\n\n", "Step 1: Add.", "Step 1: Add."),
    # Nothing, white space, refusals.
    Case("empty", "The sum is", "", "", "empty"),
    Case("white space only", "The sum is", " \n\n ", "", "empty"),
    Case("only a greeting", "The sum is", "Sure, here is the continuation:\n", "", "empty"),
    Case("only ellipses", "The sum is", "..." * 1000, "", "empty"),
    Case("one ellipsis", "x = 0.333", "...", "..."),
    Case("refusal", "The sum is", "I'm sorry, but I can't assist with that.", "", "refused"),
    Case("refusal without an apology", "The sum is", "I cannot assist with this.", "", "refused"),
    Case("refusal in two sentences", "The sum is", "I’m sorry. I can’t continue this text.", "", "refused"),
    Case("not a refusal", "As x is 0, ", "I can't divide by it.", "I can't divide by it."),
    # LaTeX.
    Case("LaTeX, inside a command", "so $\\fr", "ac{1}{2}$ is", "ac{1}{2}$ is"),
    Case("LaTeX, inside braces", "so $\\frac{1", "}{2}$ remains.", "}{2}$ remains."),
    Case("LaTeX, display", "Hence\n\\[\nx^2 + ", "2x + 1 = 0\n\\]", "2x + 1 = 0\n\\]"),
    Case("LaTeX, repeated from its relation", "so $x = \\frac{1}{2}", "= \\frac{1}{2} + 1$", " + 1$"),
    Case("LaTeX, repeated display", "\\[\nx^2 + 2x =", "\\[\nx^2 + 2x = 8\n\\]", " 8\n\\]"),
    Case("LaTeX, boxed", "The answer is $\\boxed{1", "5}$.", "5}$."),
    # Code.
    Case("code, indentation", CODE, "    for value in values:\n", "    for value in values:\n"),
    Case("code, last space of an indentation", CODE + "   ", " return result", " return result"),
    Case("code, white space after an indentation", CODE + "    ", "    return result", "    return result"),
    Case("code, line repeated", CODE + "    for value in", "    for value in values:", " values:"),
    Case("code, name continues", CODE + "    result", "_list = []", "_list = []"),
    # Lists and tables.
    Case("bullets", "- one apple\n- two apples\n", "- three apples\n", "- three apples\n"),
    Case("bullet repeated", "- one apple\n- two app", "- two apples\n- three", "les\n- three"),
    Case("numbered step", "1. Add them.\n2.", "Divide by two.", "Divide by two."),
    Case("numbered step repeated", "1. Add them.\n2. Divide by", "2. Divide by two.", " two."),
    Case("table", "| x | y |\n|---|---|\n| 1 | ", "1 |\n| 2 | 4 |", "1 |\n| 2 | 4 |"),
    Case("table, row repeated", "| x | y |\n| apples | pears |", "| apples | pears |\n| 2 |", "\n| 2 |"),
    # Unicode.
    Case("Chinese, exact", "三角形的内角", "和是180度。", "和是180度。"),
    Case("Chinese, repeated", "因为三角形的内角和", "三角形的内角和是180度。", "是180度。"),
    Case("Chinese, doubled word", "我们一步", "一步地计算。", "一步地计算。"),
    Case("Japanese, repeated", "したがって答えは", "したがって答えは4です。", "4です。"),
    Case("accents, mid-word", "La récapitul", "ation est complète.", "ation est complète."),
    Case("accents, repeated", "Donc la somme des côtés", "la somme des côtés vaut 12.", " vaut 12."),
    Case("emoji", "Great job 🎉", "🎉 Now the next.", "🎉 Now the next."),
    Case("emoji repeated with words", "This is the end 🎉", "This is the end 🎉 of it.", " of it."),
]

# Solutions in many styles. The text after a split is a true continuation of the text before it.
SOLUTIONS = {
    "word problem": (
        "Natalia sold 48/2 = 24 clips in May.\n"
        "Altogether she sold 48 + 24 = 72 clips in April and May, so that each of her 6 friends can have 72 / 6 "
        "= 12 clips.\n"
        "#### 12"
    ),
    "steps": (
        "To solve this problem, we go step by step.\n\n"
        "Step 1: Find the cost of the notebooks.\n"
        "Each notebook costs $3.50, and there are 4 of them, so the cost is 4 × $3.50 = $14.00.\n\n"
        "Step 2: Find the cost of the pens.\n"
        "The pens cost 2 × $1.25 = $2.50.\n\n"
        "Step 3: Add them.\n"
        "$14.00 + $2.50 = $16.50\n\n"
        "Therefore, the total is **$16.50**."
    ),
    "algebra": (
        "We are given that $x + \\frac{1}{x} = 3$. Squaring both sides, we obtain\n"
        "\\[x^2 + 2 + \\frac{1}{x^2} = 9,\\]\n"
        "so that $x^2 + \\frac{1}{x^2} = 7$. Squaring again,\n"
        "\\[\n"
        "\\begin{aligned}\n"
        "x^4 + \\frac{1}{x^4} &= 7^2 - 2 \\\\\n"
        "&= 49 - 2 \\\\\n"
        "&= 47.\n"
        "\\end{aligned}\n"
        "\\]\n"
        "The answer is $\\boxed{47}$."
    ),
    "geometry": (
        "Let $ABC$ be the triangle, and let $M$ be the midpoint of $BC$. By the Pythagorean theorem, $AM^2 = "
        "AB^2 - BM^2 = 13^2 - 5^2 = 144$, hence $AM = 12$. The area of the isosceles triangle is therefore "
        "$\\frac12 \\cdot 10 \\cdot 12 = 60$. Without loss of generality the orientation of the triangle does "
        "not matter."
    ),
    "thinking": (
        "Okay, so I need to find the number of ways. Hmm, let me think. There are 5 letters, and the first one "
        "can't be a vowel. Wait, that's not what the question says. Let me re-read it.\n\n"
        "So the first letter has to be a consonant: there are 3 of them. Then the others can be anything, which "
        "gives 4! = 24 orders. So 3 × 24 = 72. Let me check that with a smaller case... With 2 letters, one "
        "vowel: 1 × 1 = 1. Yes, that's right.\n\n"
        "So the answer is 72."
    ),
    "probability": (
        "The probability that neither of the two dice shows a six is "
        "$\\left(\\frac{5}{6}\\right)\\left(\\frac{5}{6}\\right) = \\frac{25}{36}$. The probability that at "
        "least one of them shows a six is thus $1 - \\frac{25}{36} = \\frac{11}{36}$, or about 30.6 percent."
    ),
    "number theory": (
        "Note that 2^10 = 1024 ≡ 24 (mod 100), and 24^2 = 576 ≡ 76 (mod 100). Since 76 · 76 = 5776 ≡ 76 (mod "
        "100), every even power of 24 ends in 76. So 2^1000 = (2^10)^100 = 24^100 ≡ 76 (mod 100). The last two "
        "digits are 76."
    ),
    "bullets": (
        "The possible cases are:\n\n"
        "- **Case 1:** both numbers are even. Then their sum is even, and so is their product.\n"
        "- **Case 2:** both numbers are odd. Then their sum is even, but their product is odd.\n"
        "- **Case 3:** one is even and one is odd. Then their sum is odd.\n\n"
        "Only case 2 is possible, so both are odd."
    ),
    "numbered": (
        "1. Multiply the first equation by 2: 4x + 2y = 14.\n"
        "2. Subtract the second equation: 3x = 9.\n"
        "3. Divide by 3: x = 3.\n"
        "4. Substitute x into the first equation: 2(3) + y = 7, so y = 1.\n\n"
        "The solution is (x, y) = (3, 1)."
    ),
    "table": (
        "We list the values in a table:\n\n"
        "| n | n^2 | n^3 |\n"
        "|---|-----|-----|\n"
        "| 1 | 1 | 1 |\n"
        "| 2 | 4 | 8 |\n"
        "| 3 | 9 | 27 |\n"
        "| 4 | 16 | 64 |\n\n"
        "The sum of the cubes is 1 + 8 + 27 + 64 = 100, which is the square of 1 + 2 + 3 + 4 = 10."
    ),
    "python": (
        "We use a sieve:\n\n"
        "```python\n"
        "def primes(limit):\n    "
        "sieve = [True] * (limit + 1)\n    "
        "sieve[0] = sieve[1] = False\n    "
        "for number in range(2, int(limit ** 0.5) + 1):\n        "
        "if sieve[number]:\n            "
        "for multiple in range(number * number, limit + 1, number):\n                "
        "sieve[multiple] = False\n    "
        "return [n for n, prime in enumerate(sieve) if prime]\n"
        "```\n\n"
        "The time is O(n log log n), and the memory is O(n)."
    ),
    "c": (
        "The program:\n\n"
        "```c\n"
        "#include <stdio.h>\n\n"
        "int main(void) {\n    "
        "int sum = 0;\n    "
        "for (int i = 0; i < 10; i++) {\n        "
        "if (i % 3 == 0 || i % 5 == 0) {\n            "
        "sum += i;\n        "
        "}\n    "
        "}\n    "
        'printf("%d\\n", sum);\n    '
        "return 0;\n"
        "}\n"
        "```\n"
        "It prints 23."
    ),
    "Chinese": (
        "解:设这个数为x。根据题意,我们有2x+3=11,所以2x=8,x=4。\n\n"
        "因此,这个数是4。我们一步一步地检验:2×4+3=8+3=11,符合题意。"
    ),
    "Japanese": ("三角形の内角の和は180度です。したがって、残りの角は180-60-70=50度になります。答えは50度です。"),
    "German": (
        "Die Summe der Winkel im Dreieck beträgt 180°. Also ist der dritte Winkel 180° − 65° − 45° = 70°. Damit "
        "ist das Dreieck nicht gleichschenklig. Die Größe des Außenwinkels ist dann 110°."
    ),
    "French": (
        "Soit x le prix d'un stylo. On a 3x + 2 = 14, donc 3x = 12 et x = 4. Le prix d'un stylo est donc de 4 "
        "€. On vérifie : 3 × 4 + 2 = 14, ce qui est bien le résultat cherché."
    ),
    "Russian": (
        "Пусть x — искомое число. Тогда 2x + 5 = 17, откуда 2x = 12 и x = 6. Проверка: 2 · 6 + 5 = 17. Ответ: 6."
    ),
    "matrix": (
        "The matrix is\n"
        "$$\n"
        "A = \\begin{pmatrix} 1 & 0 & 0 \\\\ 0 & 1 & 0 \\\\ 0 & 0 & 1 \\end{pmatrix},\n"
        "$$\n"
        "so that $\\det A = 1$ and $A^{-1} = A$. For every vector $v$ we have $Av = v$, thus all eigenvalues "
        "are equal to $1$."
    ),
    "calculus": (
        "Using integration by parts with $u = x$ and $dv = e^x\\,dx$, we have \\( \\int x e^x \\, dx = x e^x - "
        "\\int e^x \\, dx = x e^x - e^x + C \\). Evaluating from 0 to 1 gives (e - e) - (0 - 1) = 1. 🎉"
    ),
    "json": (
        "The answer as JSON:\n\n"
        "```json\n"
        "{\n  "
        '"steps": [\n    '
        '{"text": "add", "value": 3},\n    '
        '{"text": "double", "value": 6}\n  '
        "],\n  "
        '"answer": 6\n'
        "}\n"
        "```\n"
    ),
    "headings": (
        "## Setting up\n\n"
        "Let `n` be the number of students. There are `n` chairs in each of the `n - 2` rows.\n\n"
        "## Solving\n\n"
        "We have n(n - 2) = 48, so n² - 2n - 48 = 0, and (n - 8)(n + 6) = 0. Since n > 0, n = 8.\n\n"
        "## Answer\n\n"
        "**8 students**"
    ),
}
