# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Trainers of tiny students, and a dense reference implementation of the objective."""

import copy
import math
import zlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from rapidfuzz.distance import Levenshtein

from omniopd_trl import OmniOPDConfig, OmniOPDTrainer
from omniopd_trl.audits.types import Branch
from omniopd_trl.teachers import Prefix, ScriptedTeacher
from tests.support.corpus import STUDENT_LINES

NUM_PROMPTS = 8


def questions(count: int = NUM_PROMPTS) -> Dataset:
    """Conversational prompts of different lengths, with an answer."""
    rows = []
    for n in range(count):
        text = f"Tom has {n} apples and buys {n * n} more." + " How many now?" * (n % 3)
        rows.append({"prompt": [{"role": "user", "content": text}], "answer": str(n + n * n)})
    return Dataset.from_list(rows)


def script(prefix: Prefix, index: int) -> str:
    """A rollout that depends on the question, on the length of the student's text, and on the index of the sample."""
    question = prefix.prompt[-1]["content"]
    words = ["First we add", "Tom has", question, "apples. So", "Answer: 12"]
    return " ".join(words[(len(prefix.completion) + index + k * len(question)) % 5] for k in range(3))


FOUR_MICRO_BATCHES = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
# A run with two checkpoints.
FOUR_STEPS = {
    "max_steps": 4,
    "save_strategy": "steps",
    "save_steps": 2,
    "learning_rate": 0.05,
    "dataset": questions(32),
    **FOUR_MICRO_BATCHES,
}
# Random weights rarely end a turn, so completions are cut to these lengths. They give padding, a trajectory without
# room for two chunks, one shorter than a chunk, and two shorter than the shortest chunk.
LENGTHS = (40, 31, 5, 17, 9, 40, 24, 1)


# Completions and rollouts of `Repeating` and `repeat`: a rollout begins as the completion does.
LINES = " ".join(STUDENT_LINES)


def repeat(prefix: Prefix, index: int) -> str:
    """What the student writes, then something else: after 12 characters, not at all, or after 3 characters."""
    rest = LINES[len(prefix.completion) :]
    return (rest[:12] + " 7 apples", rest, rest[:3] + "Answer: 12")[index % 3]


class RecordingTrainer(OmniOPDTrainer):
    """A trainer that keeps each generation batch as it was before TRL shuffles and splits it."""

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> list[list[int]]:
        completion_ids = super()._generate_single_turn(*args, **kwargs)
        return [
            ids
            if len(ids) <= length or not self.model.training
            else [*ids[: length - 1], self._tokenizer.eos_token_id]
            for ids, length in zip(completion_ids, LENGTHS * len(completion_ids), strict=False)
        ]

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.batches: list[dict[str, Any]] = []

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super()._generate_and_score_completions(inputs)
        prompts = [example["prompt"] for example in inputs]
        kept = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in batch.items() if k != "audits"}
        self.batches.append({"prompts": prompts, **kept})
        return batch


class Repeating(RecordingTrainer):
    """Completions that begin as `LINES`, and branches of which one is `repeat`'s last rollout."""

    def _generate_single_turn(self, prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> list[list[int]]:
        self.prompt_ids = prompt_ids
        line = self._tokenizer(LINES, add_special_tokens=False)["input_ids"]
        return [line[:length] for _, length in zip(prompt_ids, LENGTHS, strict=True)]

    def _sample_branches(self, prefixes: list[tuple[list[int], int]], **kwargs: Any) -> list[list[Branch]]:
        line = self._tokenizer(LINES, add_special_tokens=False)["input_ids"]
        found = []
        for ids, length in prefixes:
            start = next(len(ids) - len(prompt) for prompt in self.prompt_ids if ids[: len(prompt)] == prompt)
            before = self._tokenizer.decode(line[:start])
            last = self._tokenizer(before + repeat(Prefix("", before), 2), add_special_tokens=False)["input_ids"]
            own = line[start : start + length]
            branches = [last[start : start + length], own, [*own[:1], 40, *own[2:]]]
            found.append([Branch(tuple(tokens), "") for tokens in branches[: self.args.num_branches]])
        return found


def make_trainer(
    path: Path, model: Any, *, teacher: Any = None, dataset: Dataset | None = None, **overrides: Any
) -> RecordingTrainer:
    """A trainer with plain SGD and learning rate 1, whose step is minus the gradient.

    Keyword arguments that are fields of the configuration are passed to it, the others to the trainer.
    """
    settings: dict[str, Any] = {
        "output_dir": str(path),
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "max_completion_length": 40,
        "num_chunks": 2,
        "chunk_length": 10,
        "min_chunk_length": 6,
        "num_rollouts": 3,
        "beta": 0.5,
        "per_device_train_batch_size": NUM_PROMPTS,
        "gradient_accumulation_steps": 1,
        "max_steps": 1,
        "logging_steps": 1,
        "optim": "sgd",
        "learning_rate": 1.0,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
    }
    fields = OmniOPDConfig.__dataclass_fields__
    arguments = {k: v for k, v in overrides.items() if k not in fields or callable(v)}
    settings.update({k: v for k, v in overrides.items() if k not in arguments})
    return RecordingTrainer(
        model=str(model) if isinstance(model, Path) else model,
        teacher_model=teacher if teacher is not None else ScriptedTeacher(script),
        args=OmniOPDConfig(**settings),
        train_dataset=dataset if dataset is not None else questions(),
        **arguments,
    )


def within(owner: Any, method: str, context: Callable[[], AbstractContextManager[Any]]) -> None:
    """Wrap a method of an object in a context."""
    original = getattr(owner, method)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with context():
            return original(*args, **kwargs)

    setattr(owner, method, wrapped)


def perturb(model: torch.nn.Module, scale: float = 0.02) -> None:
    """Add noise to the trainable weights, which moves the student away from its reference."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(scale * noise.to(parameter.device))


def trainable(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Copies of the trainable weights."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def similarity(chunk: str, rollout: str) -> float:
    """The default phi, implemented independently."""
    chunk, rollout = chunk.strip(), rollout.strip()
    longest = max(len(chunk), len(rollout))
    return 1.0 - Levenshtein.distance(chunk, rollout) / longest if longest else 1.0


def kept_log_mass(logp: torch.Tensor, token: int, args: OmniOPDConfig) -> torch.Tensor:
    """The log-probability that transformers' filters keep, in the order in which it applies them, token by token.

    `token` is kept with all that are likelier: the tests end completions with a token that was not sampled.
    """
    order = logp.argsort(descending=True).tolist()
    probabilities = logp.detach().exp().tolist()
    kept = order[: args.top_k] if args.top_k > 0 else order
    if args.top_p < 1:
        total, mass, nucleus = sum(probabilities[v] for v in kept), 0.0, []
        for v in kept:
            if mass >= args.top_p * total:
                break
            nucleus.append(v)
            mass += probabilities[v]
        kept = nucleus
    if args.min_p:
        kept = [v for v in kept if probabilities[v] >= args.min_p * probabilities[order[0]]]
    return logp[sorted({*kept, *(v for v in order if probabilities[v] >= probabilities[token])})].logsumexp(0)


def agrees(before: str) -> bool:
    """Whether `tests.support.teachers.Agreeing` writes one text after this one, time and again."""
    return zlib.crc32(before.encode()) % 2 == 0


def cut_rollouts(prompt: Any, before: str, text: str, length: int, tokenizer: Any, args: OmniOPDConfig) -> list[str]:
    """The teacher's rollouts in the place of the student's `text`, cut to as many tokens as its chunk has.

    With `first_rollouts`, those of `Agreeing`. A rollout is cut as if the white space before it were the chunk's. The
    tokens of these students are random, so the tokens of a chunk's text differ from those of the chunk.
    """
    space = text[: len(text) - len(text.lstrip())] if text.strip() else None
    rollouts = []
    stops = args.first_rollouts > 0 and agrees(before)
    for i in range(args.first_rollouts if stops else args.num_rollouts):
        rollout = script(Prefix(prompt, before), 0 if stops else i)
        rollout = rollout if space is None else space + rollout.lstrip()
        rollouts.append(tokenizer.decode(tokenizer(rollout, add_special_tokens=False)["input_ids"][:length]))
    return rollouts


class Imitation:
    """The imitation loss, one rollout at a time in a row with its whole prefix, and its metrics of one step."""

    def __init__(self, student: torch.nn.Module, tokenizer: Any, args: OmniOPDConfig):
        self.student, self.tokenizer, self.args = student, tokenizer, args
        self.sum, self.weight, self.num_tokens = torch.zeros((), dtype=torch.float64), 0.0, 0
        self.num_rollouts = self.num_left_out = 0

    def add(self, before: list[int], rollouts: list[str], length: int) -> None:
        """Add the rollouts of a chunk of this length, after these tokens. Their white space is that of the chunk."""
        text = self.tokenizer.decode(before)
        known = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        beginnings = set()
        for rollout in rollouts if self.args.rollout_imitation else []:
            ids = self.tokenizer(text + rollout, add_special_tokens=False)["input_ids"]
            tokens = ids[len(known) :][: min(self.args.rollout_imitation_tokens, length)]
            is_left_out = text.endswith("\ufffd") or ids[: len(known)] != known
            self.num_rollouts, self.num_left_out = self.num_rollouts + 1, self.num_left_out + is_left_out
            if is_left_out:
                continue
            logits = self.student(torch.tensor([before + tokens])).logits[0, -len(tokens) - 1 : -1]
            logp = (logits / self.args.temperature).log_softmax(-1)[range(len(tokens)), tokens]
            weight = self.args.rollout_imitation / len(rollouts)
            self.sum, self.weight = self.sum - weight * logp.sum(), self.weight + weight * len(tokens)
            beginnings |= {tuple(tokens[: t + 1]) for t in range(len(tokens))}
        self.num_tokens += len(beginnings)

    def metrics(self) -> dict[str, float]:
        if not self.args.rollout_imitation:
            return {}
        assert self.weight, "no rollout is imitated"
        return {
            "imitation/loss": self.sum.item() / self.weight,
            "imitation/tokens": self.num_tokens,
            "imitation/left_out": self.num_left_out / self.num_rollouts,
        }


def normalized(
    chunk_sum: torch.Tensor,
    kl_sum: Any,
    num_audited: int,
    num_unaudited: int,
    num_rows: int,
    args: OmniOPDConfig,
    reward_sum: Any = 0.0,
) -> torch.Tensor:
    """Eq. 8 from the sums of its terms, and of the term of a verifier."""
    num_tokens = num_audited + num_unaudited
    if args.loss_normalization == "tokens":
        return (chunk_sum + args.beta * kl_sum + reward_sum) / num_tokens
    if args.loss_normalization == "sum":
        return (chunk_sum + args.beta * kl_sum + reward_sum) / num_rows
    return chunk_sum / num_audited + args.beta * kl_sum / num_unaudited + reward_sum / num_tokens


def dense_objective(
    student: torch.nn.Module,
    reference: torch.nn.Module,
    batch: dict[str, Any],
    tokenizer: Any,
    args: OmniOPDConfig,
    weight_of: Callable[[float], float] = lambda posterior: posterior,
    sampled: list[list[float]] | None = None,
    mark_of: Callable[[str], float | None] = lambda text: None,
    verified: list[tuple[float, bool]] | None = None,
) -> tuple[torch.Tensor, dict[str, float]]:
    """Eq. 3 to 8 for one generation batch, one row at a time, with all logits in float64.

    It shares no code with the package: entropies, chunks (the greedy selection, with chunks that start at their
    anchors), texts, rollouts, similarities, priors, posteriors, importance weights and both terms of the loss are
    computed here. `sampled` are log-probabilities of another sampler, one per token. `mark_of` is a judge;
    where it returns `None`, rollouts decide. `verified` has the advantage of each trajectory, and whether the teacher
    is asked about it.

    Returns:
        The loss, with its graph to the weights of `student`, and the metrics that the trainer logs.
    """
    student, reference = student.double().eval(), reference.double().eval()
    chunk_sum, kl_sum, posteriors = torch.zeros((), dtype=torch.float64), 0.0, []
    num_audited = num_unaudited = 0
    plain_chunk_sum, reward_sum = 0.0, torch.zeros((), dtype=torch.float64)
    sampled_kl: list[float] = []
    imitation = Imitation(student, tokenizer, args)
    for b, prompt in enumerate(batch["prompts"]):
        prompt_ids = batch["prompt_ids"][b][batch["prompt_mask"][b].bool()]
        completion = batch["completion_ids"][b][batch["completion_mask"][b].bool()]
        input_ids = torch.cat([prompt_ids, completion])[None]
        where = slice(len(prompt_ids) - 1, -1)
        logp = (student(input_ids).logits[0, where] / args.temperature).log_softmax(-1)
        with torch.no_grad():
            ref = (reference(input_ids).logits[0, where] / args.temperature).log_softmax(-1)
        token_logp = logp.gather(1, completion[:, None])[:, 0]
        entropy = -(logp.exp() * logp).sum(-1).detach()

        length, chunk_length = len(completion), min(args.chunk_length, len(completion))
        chosen: list[int] = []
        advantage, is_chosen = (0.0, True) if verified is None else verified[b]
        if length >= args.min_chunk_length and is_chosen:
            for t in sorted(range(length), key=lambda t: (-entropy[t].item(), t)):
                start = min(t, length - chunk_length)
                if len(chosen) < args.num_chunks and all(abs(start - other) >= chunk_length for other in chosen):
                    chosen.append(start)

        scored, ratio = token_logp, torch.ones(length, dtype=torch.float64)
        if sampled is not None:
            other = torch.tensor(sampled[b], dtype=torch.float64)[:length]
            ratio = (scored.detach() - other).exp().clamp(max=args.importance_sampling_clip_max)
        elif args.sampling_filters:
            log_mass = torch.stack([kept_log_mass(logp[t], completion[t].item(), args) for t in range(length)])
            scored, ratio = scored - log_mass, log_mass.detach().exp()
        reward_sum = reward_sum - args.reward_weight * advantage * (ratio * scored).sum()
        audited = torch.zeros(length, dtype=torch.bool)
        for start in chosen:
            end = start + chunk_length
            before = tokenizer.decode(completion[:start], skip_special_tokens=True).rstrip("\ufffd")
            text = tokenizer.decode(completion[:end], skip_special_tokens=True).rstrip("\ufffd")[len(before) :]
            rollouts = cut_rollouts(prompt, before, text, chunk_length, tokenizer, args)
            prior = math.exp(token_logp[start:end].detach().mean().item())
            k_sem, count = sum(similarity(text, rollout) for rollout in rollouts), len(rollouts)
            imitation.add(input_ids[0, : len(prompt_ids) + start].tolist(), rollouts, chunk_length)
            if (mark := mark_of(text)) is not None:
                k_sem, count = mark, 1
            posterior = (k_sem + args.prior_strength * prior) / (count + args.prior_strength)
            posteriors.append(posterior)
            chunk_sum = chunk_sum - weight_of(posterior) * (ratio * scored)[start:end].sum()
            plain_chunk_sum -= posterior * token_logp[start:end].sum().item()
            audited[start:end] = True
        kl_sum = kl_sum + ((ref.exp() * (ref - logp)).sum(-1) * ~audited).sum()
        if not audited.all():
            log_r = (ref.gather(1, completion[:, None])[:, 0] - token_logp.detach())[audited]
            sampled_kl += (log_r.exp() * log_r - (log_r.exp() - 1)).tolist()
        num_audited += int(audited.sum())
        num_unaudited += int((~audited).sum())

    chunk_sum = chunk_sum + imitation.sum
    loss = normalized(chunk_sum, kl_sum, num_audited, num_unaudited, len(batch["prompts"]), args, reward_sum)
    metrics = {
        "chunk_loss": plain_chunk_sum / num_audited,
        "kl/unaudited": kl_sum.item() / num_unaudited,
        "kl/audited": sum(sampled_kl) / max(len(sampled_kl), 1),
        "audit/posterior": sum(posteriors) / len(posteriors),
        "audit/audited_fraction": num_audited / (num_audited + num_unaudited),
        "audit/num_chunks": len(posteriors) / len(batch["prompts"]),
        **imitation.metrics(),
    }
    return loss, metrics


def step_and_gradient(trainer: RecordingTrainer) -> tuple[dict[str, torch.Tensor], torch.nn.Module]:
    """Take one step and return the gradient, which is minus the step, and a copy of the student before the step."""
    before = copy.deepcopy(trainer.model)
    weights = trainable(trainer.model)
    trainer.train()
    after = trainable(trainer.model)
    return {name: weights[name] - after[name] for name in weights}, before
