# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Evaluate a model or a teacher on a set of problems, without a trainer.

Whatever generates is asked as a teacher is: a model in this process, vLLM, or a service. In `output_dir`,

- `settings.json` holds what determines the samples, from the start;
- `samples.jsonl` gets a line per problem as soon as its samples are there: the prompt and the texts;
- `_audits/` is a journal. It holds the answers of a service as they arrive, and what they cost;
- `results.json` is the result ([`results`]).

The same call continues an evaluation that was interrupted: problems with a line are not generated again, and answers
in the journal are not paid for again.
"""

import asyncio
import hashlib
import json
import platform
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import Future, as_completed
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging
from trl.trainer.utils import get_callable_name

from omniopd_trl.accounting.usage import NO_LEDGER, Ledger, Usage
from omniopd_trl.audits.event_loop import EventLoopThread, release
from omniopd_trl.audits.types import Trajectory
from omniopd_trl.data.checks import check_dataset
from omniopd_trl.errors import ConfigError, DataError, TeacherError
from omniopd_trl.evals.math import as_votes, has_right_answer, math_accuracy, read_answers
from omniopd_trl.evals.results import SAMPLES, EvalResult, Problem, nothing_to_score, write_json
from omniopd_trl.evals.rewards import Rewards, RewardSource
from omniopd_trl.journal.file import journal_path, journals_of
from omniopd_trl.journal.reader import spent
from omniopd_trl.journal.recorder import Recorder
from omniopd_trl.journal.resume import AuditLedger
from omniopd_trl.models.weights import hash_of_folder, hash_of_model
from omniopd_trl.teachers.base import (
    Prefix,
    Prompt,
    SamplingRequest,
    Teacher,
    TeacherReply,
    address_of,
    replies_of,
)
from omniopd_trl.teachers.context import NO_CONTEXT, TeacherContext
from omniopd_trl.teachers.load import is_local, is_service, load_teacher
from omniopd_trl.teachers.local import InProcessTeacher, LocalTeacher
from omniopd_trl.teachers.options import TeacherOptions
from omniopd_trl.teachers.remote.engine import RemoteTeacher

Engine = Literal["transformers", "vllm"]

# Columns with the right answer, in order of precedence.
_GOLDS = ("answer", "solution")
# Columns of problems that are no mathematics. `Rewards` chooses the function that scores them.
_OTHERS = ("tests", "gym")
# Samples that reward functions score together. A reward model scores them in one batch.
_SCORED = 64

SETTINGS = "settings.json"

_PACKAGES = (
    *("omniopd_trl", "torch", "transformers", "vllm", "math-verify", "sympy"),
    *("openai", "anthropic", "google-genai"),
)

_Answered: TypeAlias = "tuple[int, TeacherReply, bool]"


@dataclass(frozen=True)
class EvalSettings:
    """How a model is evaluated.

    Attributes:
        num_samples: samples per problem.
        max_tokens: maximum length of a sample, in the model's tokens.
        temperature: sampling temperature; 0 is greedy decoding.
        top_p: nucleus sampling mass.
        top_k: number of the most likely tokens that are kept; 0 keeps all. For a model in this process, as `min_p`.
        min_p: tokens are kept if their probability is at least this share of the highest; 0 keeps all.
        seed: seed of all samples, from 0 to 2^31 - 1. The same for all models that are compared.
        lenient: argument of [`math_accuracy`].
        max_batch_tokens: rows of a batch times their length in tokens, for a model in this process. It bounds the
            memory, and does not change the samples. `None` for the default of [`LocalTeacher`].

    Raises:
        ConfigError: when a value is out of range.
    """

    num_samples: int = 16
    max_tokens: int = 4096
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0
    lenient: bool = False
    max_batch_tokens: int | None = None

    def __post_init__(self) -> None:
        for name, rule, holds in (
            ("num_samples", "at least 1", self.num_samples >= 1),
            ("max_tokens", "at least 1", self.max_tokens >= 1),
            ("temperature", "at least 0, and finite", 0 <= self.temperature < float("inf")),
            ("top_p", "above 0 and at most 1", 0 < self.top_p <= 1),
            ("top_k", "at least 0", self.top_k >= 0),
            ("min_p", "from 0 to 1", 0 <= self.min_p <= 1),
            ("seed", "from 0 to 2^31 - 1", 0 <= self.seed < 2**31),
            ("max_batch_tokens", "at least 1", self.max_batch_tokens is None or self.max_batch_tokens >= 1),
        ):
            if not holds:
                raise ConfigError(f"{name}={getattr(self, name)} must be {rule}.")


def evaluate(
    model: "str | PreTrainedModel | Teacher",
    tokenizer: PreTrainedTokenizerBase | None = None,
    dataset: Dataset | None = None,
    *,
    settings: EvalSettings | None = None,
    output_dir: str | Path | None = None,
    engine: Engine = "transformers",
    options: TeacherOptions | None = None,
    reward_funcs: RewardSource | Sequence[RewardSource] | None = None,
    context: TeacherContext = NO_CONTEXT,
) -> EvalResult:
    """Sample `num_samples` answers per problem, and score them.

    A sample of a model in this process depends on the seed, its prompt and its index only, not on the batch size, the
    other problems or their order, up to rounding. Two such models therefore use the same random numbers for the same
    sample. vLLM and services that accept a seed get one per sample.

    Args:
        model: path or id of a model, an instance, the name of a service's model such as
            `"anthropic:claude-haiku-4-5"`, or a [`Teacher`]. An instance is left as it was.
        tokenizer: tokenizer of a model in this process. Loaded from the model's path or id when it is not given.
        dataset: the problems, with a column `prompt`, plain text or conversational, and `answer`, `solution` or
            `tests`, or what `reward_funcs` read. A column `id` names the problems.
        settings: how to sample and to score.
        output_dir: folder of the results, which makes the evaluation resumable. `None` keeps nothing.
        engine: what generates for a model by path or id.
        options: options of a teacher. `teacher_model_revision`, `teacher_model_init_kwargs`, the chat template's
            arguments and `device` also hold for a model in this process.
        reward_funcs: what scores samples, as the trainer's `eval_reward_funcs`: a function with the signature of TRL's
            `reward_funcs`, a reward model, or several. The first one is `pass@1`; each of several is also
            `pass@1/NAME`. Functions get no `completion_ids`. `None` for [`math_accuracy`], or what fits the set.
        context: a column that the model sees beside the prompt, as the teacher of a run does.

    Raises:
        ConfigError: when a setting is out of range, or `output_dir` belongs to something else.
        DataError: when the model or the dataset cannot be used.
        TeacherError: when a service cannot answer, at all or for some problems. What it answered is kept.

    Example:
        ```python
        result = evaluate("Qwen/Qwen3-0.6B", dataset=problems, settings=EvalSettings(num_samples=4))
        result.metrics["pass@1"]
        ```
    """
    settings = settings or EvalSettings()
    rows = _rows(dataset, has_function=reward_funcs is not None)
    options = options or TeacherOptions()
    device = options.device or torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    rewards = Rewards(
        reward_funcs,
        dataset,
        device=torch.device(device),
        trust_remote_code=options.trust_remote_code,
        chat_template_kwargs=options.chat_template_kwargs,
    )
    if not rewards:
        raise ConfigError(f"reward_funcs={reward_funcs!r} names nothing to score with. Leave it out for math-verify.")
    # The answers themselves are known only where math-verify reads them.
    reads_answers = rewards.functions == [math_accuracy]
    if reads_answers and not has_right_answer(rows):
        raise nothing_to_score(len(rows))
    context.check(dataset, "dataset")
    asked = [{**row, "prompt": context.prompt(row)} for row in rows]
    folder = None if output_dir is None else Path(output_dir)
    if folder is not None:
        _check_folder(folder)
    if options.device is None and isinstance(model, str):
        options = replace(options, device=device)
    earlier = spent(folder) if folder is not None and is_service(model) else None
    keys = _keys(rows)
    with _unchanged(model):
        teacher = _load(model, tokenizer, engine, options, settings, earlier)
        group_size = _check_prompts(teacher, [row["prompt"] for row in asked], settings)
        described = _described(teacher, options, settings, keys, asked)
        if context.identity:
            described["teacher_context"] = context.identity
        described["reward_funcs"] = [get_callable_name(function) for function in rewards.functions]
        lines = _sample(teacher, asked, keys, settings, group_size, folder, _decisive(described))
    problems = _score(rows, keys, lines, settings, None if reads_answers else rewards)
    described["served_models"] = sorted({name for line in lines for name in line["models"]})
    cost: dict[str, Any] = {}
    if teacher.budget is not None:
        used, usd = teacher.budget.used, teacher.budget.usd_spent if teacher.budget.price is not None else None
        cost = {"prompt_tokens": used.prompt_tokens, "completion_tokens": used.completion_tokens, "usd": usd}
    result = EvalResult(problems, described, package_versions(), reads_answers, cost)
    if folder is not None:
        result.save(folder)
    return result


# ---- Before anything is generated ----


def _rows(dataset: Dataset | None, has_function: bool) -> list[dict[str, Any]]:
    if not isinstance(dataset, Dataset) or not len(dataset):
        raise DataError(
            f"dataset={dataset!r:.200}: an evaluation needs a `datasets.Dataset` with at least one problem."
        )
    columns = dataset.column_names
    if "prompt" not in columns:
        raise DataError(
            f"The dataset has no column `prompt` (it has: {', '.join(columns)}). `prepare_prompts` makes it from "
            "`question` or `problem`."
        )
    if not has_function and not {*_GOLDS, *_OTHERS} & set(columns):
        raise DataError(
            f"The dataset has neither a column `answer` nor `solution` (it has: {', '.join(columns)}). Add one, or "
            "pass `reward_funcs`."
        )
    check_dataset(dataset, "dataset")
    return list(dataset)


def _keys(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What identifies each problem in results of other models, and of the same model with another prompt.

    Raises:
        DataError: when a problem occurs twice. It would count twice, and its samples would be the same.
    """
    first: dict[str, int] = {}
    for index, row in enumerate(rows):
        name = row.get("id")
        key = _hash([row["prompt"] if name is None else str(name), *(row.get(column) for column in _GOLDS)])
        if (earlier := first.setdefault(key, index)) != index:
            raise DataError(
                f"Row {index} of the dataset repeats row {earlier}, and a problem counts once. Remove it, or give the "
                "rows different values of `id`."
            )
    return list(first)


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _check_folder(folder: Path) -> None:
    if journals_of(folder) and not (folder / SETTINGS).exists():
        raise ConfigError(
            f"output_dir={str(folder)!r} is the folder of a training run, whose journal an evaluation must not touch. "
            f"Choose another folder, such as {str(folder / 'eval')!r}."
        )


def _load(
    model: "str | PreTrainedModel | Teacher",
    tokenizer: PreTrainedTokenizerBase | None,
    engine: Engine,
    options: TeacherOptions,
    settings: EvalSettings,
    earlier: tuple[Usage, float] | None,
) -> Teacher:
    if not is_local(model):
        if settings.top_k or settings.min_p:
            raise ConfigError(
                f"top_k={settings.top_k} and min_p={settings.min_p:g} are for a model in this process: a teacher gets "
                "a temperature and `top_p` only. Set both to 0."
            )
        return load_teacher(model, options, earlier)
    if engine == "vllm":
        from omniopd_trl.evals.vllm_engine import VLLMTeacher

        if not isinstance(model, str):
            raise ConfigError("engine='vllm' loads a model itself. Pass its path or id instead of an instance.")
        return VLLMTeacher(model, tokenizer, options)
    teacher = load_teacher(model, options, tokenizer=tokenizer, role="model")
    assert isinstance(teacher, LocalTeacher)
    teacher.seed_per_sample = True
    if settings.max_batch_tokens is not None:
        teacher.max_batch_tokens = settings.max_batch_tokens
    return teacher


@contextmanager
def _unchanged(model: Any) -> Iterator[None]:
    """Restore the modes and the trainable parameters of an instance, which a teacher freezes."""
    if not isinstance(model, torch.nn.Module):
        yield
        return
    modes = [(module, module.training) for module in model.modules()]
    trained = [(weight, weight.requires_grad) for weight in model.parameters()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for weight, mode in trained:
            weight.requires_grad_(mode)


def _check_prompts(teacher: Teacher, prompts: Sequence[Prompt], settings: EvalSettings) -> int:
    """Check that the model can be asked every prompt.

    Returns:
        The number of problems to ask for together: as many as fill a batch, or all of them for a service.
    """
    longest = 0
    for index, prompt in enumerate(prompts):
        try:
            teacher.check_prompt(prompt)
            if isinstance(teacher, InProcessTeacher):
                longest = max(longest, len(teacher.encode(Prefix(prompt))))
        except DataError as error:
            raise DataError(f"Row {index} of the dataset: {error}") from error
    if not isinstance(teacher, InProcessTeacher):
        return len(prompts) if teacher.is_remote else 1
    context = teacher.context_length
    if context is not None and longest + settings.max_tokens > context:
        advice = f"Lower it to at most {context - longest}." if longest < context else "Remove such prompts."
        raise ConfigError(
            f"max_tokens={settings.max_tokens} (`--max_completion_length`): with the longest prompt, of {longest} "
            f"tokens, a sample does not fit the model's context of {context}. {advice}"
        )
    return max(1, teacher.max_batch_tokens // (settings.num_samples * (longest + settings.max_tokens)))


def _described(
    teacher: Teacher,
    options: TeacherOptions,
    settings: EvalSettings,
    keys: Sequence[str],
    rows: Sequence[dict[str, Any]],
) -> dict[str, Any]:
    """What determines the samples and their scores. It holds no secret, since it is written to files."""
    described: dict[str, Any] = {"model": teacher.name, "engine": type(teacher).__name__, **asdict(settings)}
    for name in ("top_k", "min_p"):  # evaluations from before these settings have no entry, and can be continued
        if not described[name]:
            del described[name]
    if isinstance(teacher, InProcessTeacher):
        template = teacher.tokenizer.chat_template
        described["chat_template"] = None if template is None else _hash(template)
        described["chat_template_kwargs"] = teacher.chat_template_kwargs
        described["revision"] = options.teacher_model_revision
        described["weights"] = hash_of_folder(teacher.name)
    if isinstance(teacher, LocalTeacher):
        described["engine"] = "transformers"
        described["weights"] = hash_of_model(teacher.model)
        described["parameters"] = sum(weight.numel() for weight in teacher.model.parameters())
        described["dtype"] = str(teacher.model.dtype).removeprefix("torch.")
        described["revision"] = getattr(teacher.model.config, "_commit_hash", None) or described["revision"]
    elif isinstance(teacher, InProcessTeacher):
        described["engine"] = "vllm"
    elif isinstance(teacher, RemoteTeacher):
        described["engine"] = "service"
        described["continuation"] = teacher.capabilities.continuation
        described["base_url"] = address_of(teacher)
        described["chat_template_kwargs"] = getattr(teacher, "chat_template_kwargs", None) or None
        # The values may be secrets.
        described["extra"] = _hash([teacher.extra_body, teacher.extra_headers])
    described["problems"] = {
        "number": len(keys),
        "keys": _hash(keys),
        "prompts": _hash([row["prompt"] for row in rows]),
    }
    return described


def _decisive(described: dict[str, Any]) -> dict[str, Any]:
    """The settings that determine the samples, as JSON. The others may change when an evaluation is continued."""
    others = {"lenient", "max_batch_tokens", "reward_funcs"}
    if described.get("weights") is not None:
        others.add("model")  # a folder may be moved
    values = {name: value for name, value in described.items() if name not in others}
    decisive: dict[str, Any] = json.loads(json.dumps(values, default=str))
    return decisive


def _compare_settings(folder: Path, now: dict[str, Any]) -> None:
    """Compare the settings with those of the evaluation that is continued, if there is one.

    Raises:
        ConfigError: when they differ. The samples of two models must not get into one result.
    """
    path = folder / SETTINGS
    if not path.exists():
        return
    try:
        was = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise DataError(f"{str(path)!r} is damaged ({error}). Choose another output_dir.") from error
    for name in sorted({*was, *now}):
        if was.get(name) != now.get(name):
            raise ConfigError(
                f"output_dir={str(folder)!r} holds an evaluation with {name}={was.get(name)!r:.100}, and now it is "
                f"{now.get(name)!r:.100}. Choose another output_dir for another evaluation, or restore the setting "
                "to continue this one."
            )


def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages that a result depends on, those that are installed."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


# ---- Samples ----


def _sample(
    teacher: Teacher,
    rows: Sequence[dict[str, Any]],
    keys: Sequence[str],
    settings: EvalSettings,
    group_size: int,
    folder: Path | None,
    decisive: dict[str, Any],
) -> list[dict[str, Any]]:
    """The line of each problem: those that the folder holds, and new ones, which are written as they arrive.

    Raises:
        TeacherError: when some problems were not answered.
    """
    prompts = [row["prompt"] for row in rows]
    lines: dict[int, dict[str, Any]] = {}
    missing: list[str] = []
    with ExitStack() as stack:
        ledgers: Callable[[int], Ledger] = lambda index: NO_LEDGER  # noqa: E731
        file = None
        if folder is not None:
            _compare_settings(folder, decisive)
            ledgers = stack.enter_context(_journal(folder, teacher, decisive, prompts))
            file = stack.enter_context(_Lines(folder / SAMPLES))
            places = {key: index for index, key in enumerate(keys)}
            lines = {places[line["key"]]: line for line in file.read() if line["key"] in places}
        todo = [index for index in range(len(rows)) if index not in lines]
        bar = stack.enter_context(logging.tqdm(total=len(rows), initial=len(lines), desc="problems", unit=""))
        for index, reply, is_counted in _generate(teacher, prompts, todo, settings, ledgers, group_size):
            bar.update()
            if reply.outcomes.get("failed_requests"):
                missing.append(str(reply.failure))
                continue
            lines[index] = _line(keys[index], rows[index], reply, settings.num_samples, is_counted)
            if file is not None:
                file.write(lines[index])
    if missing:
        raise TeacherError(
            f"{teacher.name} did not answer {len(missing)} of {len(rows)} problems: {missing[0]}. "
            + ("The others are kept: the same command asks for these again." if folder else "Evaluate again.")
        )
    return [lines[index] for index in range(len(rows))]


@contextmanager
def _journal(
    folder: Path, teacher: Teacher, decisive: dict[str, Any], prompts: Sequence[Prompt]
) -> Iterator[Callable[[int], Ledger]]:
    """Context with an open journal, which yields the function from a problem's index to its ledger.

    The journal also keeps other processes out of the folder, so the settings of a new evaluation are written then.
    """
    recorder = Recorder(lambda: 0)
    settings: dict[str, Any] = {"run": folder.name, "teacher": teacher.name, "rank": 0, "num_processes": 1}
    with recorder.open(journal_path(folder, 0), teacher.budget, replay=True, fingerprint=_hash(decisive), **settings):
        journal = recorder.journal
        assert journal is not None
        if not (folder / SETTINGS).exists():
            write_json(folder / SETTINGS, decisive)
        if journal.trajectories(0) is None:
            journal.record_trajectories(0, [Trajectory(prompt, [], []) for prompt in prompts])
        yield lambda index: AuditLedger(journal, 0, index)


def _generate(
    teacher: Teacher,
    prompts: Sequence[Prompt],
    todo: Sequence[int],
    settings: EvalSettings,
    ledgers: Callable[[int], Ledger],
    group_size: int,
) -> Iterator[_Answered]:
    """The replies for some prompts as they arrive, with their indices and whether their usage is that of all samples.

    Raises:
        TeacherError: when asking again will not help. What is in flight is cancelled, and counted.
    """
    request = SamplingRequest(
        settings.num_samples,
        settings.max_tokens,
        settings.temperature,
        settings.top_p,
        settings.seed,
        top_k=settings.top_k,
        min_p=settings.min_p,
    )

    # Enough for all slots of a service. The requests of all problems of a large set would take gigabytes.
    slots = teacher.settings.max_concurrency if isinstance(teacher, RemoteTeacher) else group_size
    problems = asyncio.Semaphore(slots)

    async def ask(index: int) -> _Answered:
        async with problems:
            ledger = ledgers(index)
            prefix = Prefix(prompts[index], is_question=True)
            (reply,) = await replies_of(teacher, [prefix], replace(request, ledger=ledger))
        is_counted = True
        if isinstance(ledger, AuditLedger):
            is_counted = not ledger.num_kept
            if ledger.usage == Usage() and is_counted:  # a teacher that does not account for its requests
                ledger.paid(reply.usage, None)
        return index, reply, is_counted

    loop = EventLoopThread()
    try:
        for start in range(0, len(todo), group_size):
            coroutines: list[Coroutine[Any, Any, _Answered]] = [ask(i) for i in todo[start : start + group_size]]
            futures: list[Future[_Answered]] = loop.submit(*coroutines)
            error: BaseException | None = None
            for future in as_completed(futures):
                if future.cancelled():
                    continue
                if (failed := future.exception()) is None:
                    yield future.result()
                elif error is None:
                    # What was answered before is still yielded, and kept.
                    error = failed
                    loop.cancel()
            if error is not None:
                raise error
    finally:
        release(teacher, loop)
        loop.close()


def _line(key: str, row: dict[str, Any], reply: TeacherReply, num_samples: int, is_counted: bool) -> dict[str, Any]:
    """A problem and its samples, as JSON. Samples that the model did not give are empty."""
    samples = [{"text": rollout.text, "finish_reason": rollout.finish_reason} for rollout in reply.rollouts]
    samples += [{"text": "", "finish_reason": "none"}] * (num_samples - len(samples))
    return {
        "key": key,
        "id": None if row.get("id") is None else str(row["id"]),
        "prompt": row["prompt"],
        **{name: row[name] for name in _GOLDS if name in row},
        "samples": samples,
        "tokens": (reply.usage.completion_tokens or None) if is_counted else None,
        "failure": reply.failure,
        "models": list(reply.models),
    }


class _Lines:
    """A file of JSON lines that survives a kill: a line that was not written to its end is removed.

    Args:
        path: the file. It is created when it does not exist.
    """

    def __init__(self, path: Path):
        self._path = path

    def __enter__(self) -> "_Lines":
        self._file = open(self._path, "a+b")
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def read(self) -> list[dict[str, Any]]:
        """All lines.

        Raises:
            DataError: when a line is damaged.
        """
        self._file.seek(0)
        content = self._file.read()
        end = content.rfind(b"\n") + 1
        self._file.truncate(end)
        lines = []
        for number, line in enumerate(content[:end].split(b"\n")[:-1], start=1):
            try:
                lines.append(json.loads(line))
            except ValueError as error:
                raise DataError(
                    f"Line {number} of {str(self._path)!r} is damaged ({error}). Remove it: its problem is generated "
                    "again."
                ) from error
        return lines

    def write(self, line: dict[str, Any]) -> None:
        """Add a line. It is in the file when this returns."""
        self._file.write(json.dumps(line, default=str).encode() + b"\n")
        self._file.flush()


# ---- Scores ----


def _score(
    rows: Sequence[dict[str, Any]],
    keys: Sequence[str],
    lines: Sequence[dict[str, Any]],
    settings: EvalSettings,
    rewards: Rewards | None,
) -> list[Problem]:
    """The problems with the scores of their samples: those of `rewards`, or with `None` of the answers read."""
    n = settings.num_samples
    texts = [sample["text"] for line in lines for sample in line["samples"]]
    repeated = [row for row in rows for _ in range(n)]
    answers: list[str | None] = [None] * len(texts)
    timed_out = [False] * len(texts)
    scored: dict[str, list[float | None]] = {}
    if rewards is None:
        columns = {name: [row[name] for row in repeated] for name in _GOLDS if name in repeated[0]}
        readings = read_answers(texts, **columns, lenient=settings.lenient)
        scores = [reading.score for reading in readings]
        parts = [slice(start, start + n) for start in range(0, len(texts), n)]
        read = [reading.answer for reading in readings]
        votes = as_votes([read[part] for part in parts], [scores[part] for part in parts], lenient=settings.lenient)
        answers = [answer for row in votes for answer in row]
        timed_out = [reading.problem is not None for reading in readings]
    else:
        scored = _rewards(rewards, repeated, texts)
        scores = scored[rewards.names[0]]
    problems = []
    for index, line in enumerate(lines):
        part = slice(index * n, (index + 1) * n)
        problems.append(
            Problem(
                key=keys[index],
                id=line["id"],
                scores=scores[part],
                answers=answers[part],
                truncated=[sample["finish_reason"] == "length" for sample in line["samples"]],
                answered=[sample["finish_reason"] != "none" for sample in line["samples"]],
                timed_out=timed_out[part],
                characters=[len(text) for text in texts[part]],
                tokens=line["tokens"],
                rewards={name: values[part] for name, values in scored.items()} if len(scored) > 1 else {},
            )
        )
    return problems


def _rewards(rewards: Rewards, rows: list[dict[str, Any]], texts: list[str]) -> dict[str, list[float | None]]:
    """The scores of each function, by the name of its metric; `None` where it declines to score."""
    scores: dict[str, list[float | None]] = {name: [] for name in rewards.names}
    loop = EventLoopThread()
    try:
        for start in range(0, len(texts), _SCORED):
            part = slice(start, start + _SCORED)
            for name, values in rewards.score(rows[part], texts[part], run=loop.run):
                scores[name] += [None if value != value else value for value in values.tolist()]
    finally:
        loop.close()
    return scores
