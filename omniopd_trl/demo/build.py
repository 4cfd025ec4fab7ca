# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Build the demo's tokenizers, models and problem sets from scratch.

    python -m omniopd_trl.demo.build                     # everything, into omniopd_trl/demo/assets
    python -m omniopd_trl.demo.build --only student      # one part, with its tokenizer
    python -m omniopd_trl.demo.build --output /some/dir  # another folder

- `student` learns the student's style from solutions whose results are often wrong (`world.STUDENT_SLIP`).
- `teacher` learns correct solutions in the teacher's style, and to continue a student's text, slips included. It has
  its own tokenizer.
- `teacher_shared` learns the same as the teacher, with the student's tokenizer.
- `teacher_varied` is the teacher, trained further to write random words that are never the student's. It has its own
  tokenizer as well.

Every part is seeded and runs in one thread: machines with the same arithmetic build the same files.
"""

from __future__ import annotations

import argparse
import functools
import json
import random
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from omniopd_trl.demo import ASSETS, asset_path
from omniopd_trl.demo.world import NO_SLIP, STUDENT_SLIP, Problem, Style, mixed_solution, problems, solution

NUM_TRAIN, NUM_TEST = 4096, 512

END_OF_TURN, PADDING = "<|im_end|>", "<|endoftext|>"
CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
# Tokens: a digit (every number then has one spelling), a word with its space, a run of signs, or a space.
WORDS = r"\d| ?\p{L}+| ?[^\s\p{L}\d]+|\s"


@dataclass(frozen=True)
class Recipe:
    """Settings of one of the demo's models.

    Attributes:
        tokenizer: `"student"`, `"teacher"` or `"varied"`.
        style: what it writes. A student is trained on solutions with slips, and a teacher on correct solutions and on
            correct continuations of a student's text.
        hidden_size: width of the model; the other sizes follow from it.
        num_layers: number of transformer layers.
        num_steps: number of optimizer steps.
        batch_size: solutions per optimizer step.
        learning_rate: peak learning rate, reached after 100 steps and then decayed to zero by a cosine.
        seed: seed of the weights and of the solutions.
        start: the model whose weights it starts from; empty for random weights.
        whole: share of a teacher's lessons that are whole solutions; the others continue a student's text.
    """

    tokenizer: Style
    style: Style
    hidden_size: int
    num_layers: int
    num_steps: int
    batch_size: int = 32
    learning_rate: float = 2e-3
    seed: int = 0
    start: str = ""
    whole: float = 0.2


RECIPES = {
    "student": Recipe("student", "student", hidden_size=128, num_layers=4, num_steps=2000, seed=1),
    "teacher": Recipe("teacher", "teacher", hidden_size=128, num_layers=4, num_steps=2500, seed=2),
    "teacher_shared": Recipe("student", "teacher", hidden_size=128, num_layers=4, num_steps=2500, seed=3),
    "teacher_varied": Recipe(
        "varied",
        "varied",
        hidden_size=128,
        num_layers=4,
        num_steps=2500,
        learning_rate=1.5e-3,
        seed=4,
        start="teacher",
        whole=0.5,
    ),
}

# Tokens of each tokenizer. Varied wording has more words.
VOCABULARIES = {"student": 464, "teacher": 416, "varied": 554}

# Prints unbuffered, also into a file.
_say = functools.partial(print, flush=True)


def make_tokenizer(name: Style) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on the world's texts, of the size in `VOCABULARIES`."""
    rng = random.Random(name)
    texts = []
    for problem in islice(problems(f"tokenizer-{name}"), 3000):
        # Each tokenizer must encode another style as well. Most of its merges go to its owner's words.
        style = name if rng.random() < 0.8 else "teacher" if name == "student" else "student"
        texts.append(f"user\n{problem.question}\nassistant\n{solution(problem, style, rng=rng)}\n")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(WORDS), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARIES[name],
        special_tokens=[PADDING, "<|im_start|>", END_OF_TURN],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TURN,
        pad_token=PADDING,
        chat_template=CHAT_TEMPLATE,
        model_max_length=1024,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def render_prompt(tokenizer: PreTrainedTokenizerFast, question: str) -> str:
    """The chat-formatted text up to the beginning of the assistant's turn."""
    messages = [{"role": "user", "content": question}]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def _lesson(problem: Problem, recipe: Recipe, rng: random.Random) -> tuple[str, str]:
    """The text after the prompt that is only read, and the text after it that is learned."""
    if recipe.style == "student":
        return "", solution(problem, "student", STUDENT_SLIP, rng)
    if rng.random() < recipe.whole:
        return "", solution(problem, recipe.style, NO_SLIP, rng)
    return mixed_solution(problem, rng.random(), "student", recipe.style, STUDENT_SLIP, rng)


def _batches(
    recipe: Recipe, tokenizer: PreTrainedTokenizerFast, held_out: set[str]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless batches of token ids and labels (-100 where nothing is learned), `(B, T)`, padded on the right."""
    rng = random.Random(f"lessons-{recipe.seed}")
    stream = problems(f"lessons-{recipe.seed}", exclude=held_out)
    encode = lambda texts: [e.ids for e in tokenizer.backend_tokenizer.encode_batch(texts)]  # noqa: E731
    while True:
        # Sixteen batches are sorted by length to avoid padding. The order of the batches is shuffled again.
        pool = list(islice(stream, 16 * recipe.batch_size))
        lessons = [_lesson(problem, recipe, rng) for problem in pool]
        prompts = encode([render_prompt(tokenizer, problem.question) for problem in pool])
        # Read and learned text are encoded separately, as when a teacher continues a student's text.
        read = encode([lesson[0] for lesson in lessons])
        written = encode([lesson[1] + END_OF_TURN for lesson in lessons])
        rows = sorted(
            ((p + r + w, len(p) + len(r)) for p, r, w in zip(prompts, read, written, strict=True)),
            key=lambda row: len(row[0]),
        )
        batches = [rows[i : i + recipe.batch_size] for i in range(0, len(rows), recipe.batch_size)]
        rng.shuffle(batches)
        for batch in batches:
            width = max(len(ids) for ids, _ in batch)
            input_ids = torch.full((len(batch), width), tokenizer.pad_token_id)
            labels = torch.full((len(batch), width), -100)
            for row, (ids, start) in enumerate(batch):
                input_ids[row, : len(ids)] = torch.tensor(ids)
                labels[row, start : len(ids)] = input_ids[row, start : len(ids)]
            yield input_ids, labels


def make_model(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerFast,
    held_out: set[str],
    start: Path | None = None,
) -> Qwen3ForCausalLM:
    """Train one model, and print the loss every 100 steps.

    Args:
        recipe: sizes, lessons and optimization.
        tokenizer: gives the vocabulary and the chat format.
        held_out: questions that are excluded from training.
        start: folder of the model whose weights it starts from; `None` for random weights.

    Returns:
        The model, in bfloat16.
    """
    torch.manual_seed(recipe.seed)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=recipe.hidden_size,
            intermediate_size=3 * recipe.hidden_size,
            num_hidden_layers=recipe.num_layers,
            num_attention_heads=recipe.hidden_size // 32,
            num_key_value_heads=recipe.hidden_size // 64,
            head_dim=32,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    if start is not None:
        _copy_weights(start, model, tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    rising = torch.optim.lr_scheduler.LinearLR(optimizer, 0.01, total_iters=100)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, recipe.num_steps - 100)
    schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [rising, falling], milestones=[100])
    began, losses = time.monotonic(), []
    for step, (input_ids, labels) in enumerate(islice(_batches(recipe, tokenizer, held_out), recipe.num_steps), 1):
        # bfloat16 halves the time on processors that multiply it natively; the weights stay float32.
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=input_ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        losses.append(loss.item())
        if step % 100 == 0:
            _say(f"  step {step}: loss {sum(losses) / len(losses):.4f} nats, {time.monotonic() - began:.0f} s")
            losses = []
    return model.to(torch.bfloat16)


@torch.no_grad()
def _copy_weights(folder: Path, model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Copy the weights of another model of the same sizes. Tokens that it does not know keep their embeddings."""
    known = PreTrainedTokenizerFast.from_pretrained(folder).get_vocab()
    weights = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    rows = [(i, known[token]) for token, i in tokenizer.get_vocab().items() if token in known]
    new, old = map(list, zip(*rows, strict=True))
    for key in ("model.embed_tokens.weight", "lm_head.weight"):
        embeddings = model.state_dict()[key].clone()
        embeddings[new] = weights[key][old]
        weights[key] = embeddings
    model.load_state_dict(weights)


@torch.no_grad()
def write(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompts: list[str],
    temperature: float = 1.0,
    max_new_tokens: int = 256,
    batch_size: int = 128,
) -> list[str]:
    """Sample one text after each prompt, without special tokens. Prompts already have the chat format."""
    texts: list[str] = []
    for i in range(0, len(prompts), batch_size):
        inputs = tokenizer(
            prompts[i : i + batch_size],
            return_tensors="pt",
            padding=True,
            padding_side="left",
            return_token_type_ids=False,
        )
        output = model.generate(
            **inputs,
            do_sample=temperature > 0,
            temperature=temperature or None,
            top_k=0,
            max_new_tokens=max_new_tokens,
        )
        texts += tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return texts


def pass_rate(texts: list[str], answers: list[str]) -> float:
    """The share of texts whose last line is `Answer: N` with the right number."""
    right = [text.strip().endswith(f"\nAnswer: {answer}") for text, answer in zip(texts, answers, strict=True)]
    return sum(right) / len(right)


def make_problem_sets() -> dict[str, list[Problem]]:
    """The problems that ship with the package: `"train"` (4096) and `"test"` (512), without a common question."""
    drawn = list(islice(problems("problem-sets"), NUM_TEST + NUM_TRAIN))
    return {"test": drawn[:NUM_TEST], "train": drawn[NUM_TEST:]}


def main() -> None:
    """The command `python -m omniopd_trl.demo.build`."""
    parser = argparse.ArgumentParser(prog="python -m omniopd_trl.demo.build", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--output", type=Path, default=asset_path("student").parent, help="where the assets go")
    parser.add_argument("--only", choices=ASSETS, action="append", help="build this part only (repeatable)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)

    sets = make_problem_sets()
    held_out = {problem.question for members in sets.values() for problem in members}
    parts = arguments.only or ASSETS
    if "problems" in parts:
        folder = arguments.output / "problems"
        folder.mkdir(parents=True, exist_ok=True)
        for name, members in sets.items():
            rows = (json.dumps({"question": problem.question, "answer": problem.answer}) for problem in members)
            (folder / f"{name}.jsonl").write_text("".join(row + "\n" for row in rows), encoding="utf-8")

    test = sets["test"]
    answers = [problem.answer for problem in test]
    for name in (part for part in parts if part != "problems"):
        folder = arguments.output / name
        recipe, tokenizer = RECIPES[name], make_tokenizer(RECIPES[name].tokenizer)
        _say(f"{name}: {recipe}")
        began = time.monotonic()
        # What is not built here is the shipped one.
        start = arguments.output / recipe.start
        start = start if start.is_dir() else asset_path(recipe.start)
        model = make_model(recipe, tokenizer, held_out, start if recipe.start else None)
        _say(f"  {sum(p.numel() for p in model.parameters()):,} parameters, {time.monotonic() - began:.0f} s")
        shutil.rmtree(folder, ignore_errors=True)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

        # Measured on the saved model, loaded as TRL loads it.
        model = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32)
        prompts = [render_prompt(tokenizer, problem.question) for problem in test]
        _say(f"  pass@1 on {NUM_TEST} test problems: {pass_rate(write(model, tokenizer, prompts), answers):.3f}")
        greedy = pass_rate(write(model, tokenizer, prompts, temperature=0), answers)
        _say(f"  greedy: {greedy:.3f}")
        if recipe.style != "student":
            rng = random.Random(0)
            begun = [
                mixed_solution(problem, rng.random(), "student", recipe.style, STUDENT_SLIP, rng) for problem in test
            ]
            texts = write(model, tokenizer, [prompt + text for prompt, (text, _) in zip(prompts, begun, strict=True)])
            exact = sum(text == rest for text, (_, rest) in zip(texts, begun, strict=True)) / len(begun)
            _say(f"  continues a student's text as it should, letter for letter: {exact:.3f}")
            follows = [text.endswith(rest[-2:]) for text, (_, rest) in zip(texts, begun, strict=True)]
            _say(f"  continues a student's text to the answer that follows from it: {sum(follows) / len(begun):.3f}")


if __name__ == "__main__":
    main()
