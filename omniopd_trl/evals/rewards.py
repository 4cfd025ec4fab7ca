# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Scores of samples by reward functions and reward models, called with TRL's arguments."""

import asyncio
import inspect
import logging
import math
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Any, TypeAlias

import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from trl.data_utils import apply_chat_template, is_conversational
from trl.trainer.utils import get_callable_name, get_config_model_id, is_async_callable

from omniopd_trl.data.datasets import column_names, named_datasets
from omniopd_trl.errors import ConfigError, find_extra
from omniopd_trl.evals.code import CodeAccuracy, check_tests, code_accuracy
from omniopd_trl.evals.math import has_right_answer, math_accuracy
from omniopd_trl.evals.procedural import check_tasks, reasoning_gym_accuracy

logger = logging.getLogger(__name__)

# Synchronous or asynchronous.
RewardFunc = Callable[..., Any]
# A function, or a sequence classification model, its id or its path.
RewardSource: TypeAlias = RewardFunc | str | PreTrainedModel

# Arguments that every function gets. A column of the dataset with one of these names is not passed.
_ARGUMENTS = ("prompts", "completions", "completion_ids", "trainer_state", "log_metric", "log_extra")
# Without a trainer.
_DROPPED = {"trainer_state": None, "log_metric": lambda name, value: None, "log_extra": lambda column, values: None}


class RewardModel:
    """A sequence classification model as a reward function: its score of the prompt with the completion.

    Args:
        model: model with one label.
        tokenizer: its tokenizer, which must have a chat template for conversational prompts.
        chat_template_kwargs: arguments of the chat template.

    Attributes:
        source: id or path that the model was loaded from.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, chat_template_kwargs: dict[str, Any]
    ):
        self.model = model.eval()
        self.tokenizer = tokenizer
        self._chat_template_kwargs = chat_template_kwargs
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        # The model scores the last token that is not padding.
        model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
        self.source = get_config_model_id(model.config)
        self.__name__ = self.source.rstrip("/").split("/")[-1] or type(model).__name__

    @classmethod
    def of(
        cls, model: str | PreTrainedModel, device: torch.device, trust_remote_code: bool, option: str, **kwargs: Any
    ) -> Any:
        """Load a reward model and its tokenizer.

        Args:
            model: id of a model on the Hub, path of a folder, or the model itself.
            device: device to compute on. The model is not sharded.
            trust_remote_code: whether to run code of the model's folder.
            option: name of the option that names the model, for messages.
            **kwargs: other arguments of the class.

        Raises:
            ConfigError: when the model cannot be loaded, or does not return one score.
        """
        name = model if isinstance(model, str) else get_config_model_id(model.config)
        try:
            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
            missing: Any = ()
            if isinstance(model, str):
                model, info = AutoModelForSequenceClassification.from_pretrained(
                    model, num_labels=1, trust_remote_code=trust_remote_code, output_loading_info=True
                )
                missing = info["missing_keys"] or info["mismatched_keys"]
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"The reward model {name!r} of `{option}` cannot be loaded: it must be a sequence "
                "classification model with its tokenizer, in a folder or on the Hub. Check the name. "
                f"({' '.join(str(error).split())})"
            ) from error
        labels = getattr(model.config, "num_labels", None)
        if missing or labels != 1:
            what = f"has no trained {sorted(map(str, missing))[0]}" if missing else f"has {labels} labels"
            raise ConfigError(
                f"The reward model {name!r} of `{option}` {what}, but it must be a sequence classification "
                "model that was trained with one label: its scores would be meaningless. Choose another model, or "
                "pass a function."
            )
        return cls(model.to(device), tokenizer, **kwargs)

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **kwargs: Any) -> list[float]:
        if is_conversational({"prompt": prompts[0]}):
            messages = [{"messages": p + c} for p, c in zip(prompts, completions, strict=True)]
            texts = [apply_chat_template(m, self.tokenizer, **self._chat_template_kwargs)["text"] for m in messages]
        else:
            texts = [p + c for p, c in zip(prompts, completions, strict=True)]
        inputs = self.tokenizer(
            text=texts, return_tensors="pt", padding=True, padding_side="right", add_special_tokens=False
        ).to(self.model.device)
        with torch.inference_mode():
            scores: list[float] = self.model(**inputs).logits[:, 0].float().tolist()
        return scores


class Rewards:
    """Reward functions, checked when they are given, each with a name of its own.

    Args:
        funcs: one function or model, or several: a function with the signature of TRL's `reward_funcs`, synchronous
            or asynchronous; a sequence classification model; or its id or path. `None` for the one that reads the
            dataset's columns: `code_accuracy` for `tests`, `reasoning_gym_accuracy` for `gym`, [`math_accuracy`] for
            `solution` or `answer`.
        dataset: the dataset or the `dict` of datasets whose columns the functions get.
        device: device of reward models.
        lenient: argument of [`math_accuracy`].
        trust_remote_code: whether to run code of a reward model's folder.
        chat_template_kwargs: arguments of a reward model's chat template.
        option: name of the option that holds the functions, for messages.

    Attributes:
        function_names: name of each function, with a number where an earlier function has the same one.
        names: name of each function's mean in an evaluation.
        reads_nothing: whether math-verify is the default and cannot read the right answers of a dataset.

    Raises:
        ConfigError: when a function cannot be called with what it will get, or a model cannot be used.
        MissingExtraError: when math-verify is needed and not installed.
    """

    @classmethod
    def of(
        cls, config: Any, funcs: RewardSource | Sequence[RewardSource] | None, dataset: Any, **options: Any
    ) -> "Rewards":
        """With the options of an `OmniOPDConfig`."""
        return cls(
            funcs,
            dataset,
            device=config.device,
            lenient=config.eval_lenient_answers,
            trust_remote_code=config.trust_remote_code,
            chat_template_kwargs=config.chat_template_kwargs,
            **options,
        )

    def __init__(
        self,
        funcs: RewardSource | Sequence[RewardSource] | None,
        dataset: Any,
        *,
        device: torch.device,
        lenient: bool = False,
        trust_remote_code: bool = False,
        chat_template_kwargs: dict[str, Any] | None = None,
        option: str = "eval_reward_funcs",
    ):
        datasets = [one for _, one in named_datasets(None, dataset)]
        columns = [column_names(one) for one in datasets]
        self.reads_nothing = False
        if funcs is None:
            funcs = []
            named = {name for names in columns for name in names}
            if "tests" in named:
                funcs = [code_accuracy]
            elif "gym" in named:
                funcs = [reasoning_gym_accuracy]
            elif {"solution", "answer"} & named:
                find_extra("math_verify", "eval")
                funcs = [math_accuracy]
                self.reads_nothing = not all(map(_has_right_answer, datasets))
                if self.reads_nothing:
                    held = " and ".join(sorted({"solution", "answer"} & named))
                    logger.warning(
                        f"math-verify can read none of the first right answers of a dataset ({held}), so its "
                        f"samples will have no score. Set `{option}` to a function that scores them."
                    )
                if lenient:
                    logger.warning(
                        "eval_lenient_answers=True: pass@1 is lenient. Where the right answer is a number, a "
                        "calculation that repeats the question is right too."
                    )
                    funcs = [partial(math_accuracy, lenient=True)]
        elif not isinstance(funcs, (list, tuple)):
            funcs = [funcs]
        load = partial(
            RewardModel.of,
            device=device,
            trust_remote_code=trust_remote_code,
            option=option,
            chat_template_kwargs=chat_template_kwargs or {},
        )
        self._funcs = [load(func) if isinstance(func, (str, PreTrainedModel)) else func for func in funcs]
        for func in self._funcs:
            if not callable(func):
                raise ConfigError(
                    f"`{option}` holds {func!r}, which is neither a function nor a reward model. Pass "
                    "functions with the signature of TRL's `reward_funcs`, or ids of sequence classification models."
                )
            for names in columns:
                _check_signature(func, names)
            # What cannot be scored is refused before anything is generated.
            if isinstance(func, CodeAccuracy):
                check_tests(_cells(datasets, "tests"))
                func.sandbox()
            elif func is reasoning_gym_accuracy:
                check_tasks(_cells(datasets, "gym"))
            if isinstance(func, RewardModel) and func.tokenizer.chat_template is None:
                if any(is_conversational({"prompt": next(iter(one))["prompt"]}) for one in datasets):
                    raise ConfigError(
                        f"The reward model {func.__name__!r} of `{option}` has a tokenizer without a chat "
                        "template, and the prompts are conversations. Use a dataset with plain prompts, or add a "
                        "template to the tokenizer."
                    )
        self.function_names = _unique([get_callable_name(func) for func in self._funcs])
        self.names = ["pass@1"]
        if len(self._funcs) != 1:
            self.names = [f"pass@1/{name}" for name in self.function_names]
        taken = sorted({name for names in columns for name in names} & set(_ARGUMENTS))
        if taken and self._funcs:
            logger.warning(
                f"A dataset has the column {', '.join(map(repr, taken))}, which the functions that score it "
                "do not get: an argument of that name holds something else. Rename the column to pass it."
            )

    def __bool__(self) -> bool:
        return bool(self._funcs)

    @property
    def functions(self) -> list[RewardFunc]:
        """The functions in use, those of reward models included."""
        return list(self._funcs)

    def score(
        self,
        examples: list[dict[str, Any]],
        texts: list[str],
        completion_ids: list[list[int]] | None = None,
        *,
        run: Callable[[Coroutine[Any, Any, list[Any]]], list[Any]],
        **kwargs: Any,
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Scores of samples by each function.

        Args:
            examples: the dataset row of each of the `N` samples.
            texts: the completions.
            completion_ids: token ids of the completions. `None` for completions of a teacher.
            run: function that runs a coroutine and returns its result. Asynchronous functions run in it together.
            **kwargs: passed to the functions: `trainer_state`, `log_metric` and `log_extra`. By default there is no
                state, and what they log is dropped.

        Returns:
            For each function, the metric's name and `(N,)` scores, float64. NaN if the function declines to score.

        Raises:
            ConfigError: when a function does not return one score for each sample.
        """
        prompts = [example["prompt"] for example in examples]
        completions: list[Any] = texts
        if is_conversational({"prompt": prompts[0]}):
            completions = [[{"role": "assistant", "content": text}] for text in texts]
        call: dict[str, Any] = {key: [example[key] for example in examples] for key in examples[0] if key != "prompt"}
        call |= {"prompts": prompts, "completions": completions, "completion_ids": completion_ids} | _DROPPED | kwargs
        is_async = [is_async_callable(func) for func in self._funcs]
        returned = [None if waits else func(**call) for func, waits in zip(self._funcs, is_async, strict=True)]

        async def together() -> list[Any]:
            return await asyncio.gather(
                *(func(**call) for func, waits in zip(self._funcs, is_async, strict=True) if waits)
            )

        if any(is_async):
            answers = iter(run(together()))
            returned = [next(answers) if waits else value for value, waits in zip(returned, is_async, strict=True)]
        for func, name, rewards in zip(self._funcs, self.names, returned, strict=True):
            yield name, _checked(rewards, func, len(examples))


def _cells(datasets: Sequence[Any], column: str) -> Iterator[Any]:
    """The cells of a column that hold something: all of map-style datasets, and the first of streams."""
    for dataset in datasets:
        if column in column_names(dataset):
            cells = dataset[column] if isinstance(dataset, Dataset) else [row[column] for row in islice(dataset, 1)]
            yield from (cell for cell in cells if cell is not None)


def _has_right_answer(dataset: Any) -> bool:
    """Whether math-verify can read one of the first right answers: of 32 rows, or of one row of a stream."""
    named = [name for name in ("answer", "solution") if name in column_names(dataset)]
    rows = dataset.select_columns(named) if isinstance(dataset, Dataset) else islice(dataset, 1)
    given = [*islice((row for row in rows if any(row.get(name) is not None for name in named)), 32)] if named else []
    return not given or has_right_answer(given)


def _check_signature(func: RewardFunc, columns: Sequence[str]) -> None:
    """Check that a function takes what it will get, all by name.

    Raises:
        ConfigError: when it does not.
    """
    try:
        signature = inspect.signature(func)
    except (TypeError, ValueError):  # some functions that are written in C have none
        return
    arguments = dict.fromkeys([*_ARGUMENTS, *(name for name in columns if name != "prompt")])
    try:
        signature.bind(**arguments)
    except TypeError as error:
        raise ConfigError(
            f"The reward function {get_callable_name(func)}{signature} cannot be called: {error}. Functions get "
            f"{', '.join(arguments)} by name, as TRL's reward functions do. Take those that it needs, and **kwargs "
            "for the others."
        ) from None


def _unique(names: list[str]) -> list[str]:
    """The names, with a number where an earlier function has the same one."""
    seen, taken, unique = Counter[str](), set(names), []
    for name in names:
        seen[name] += 1
        number = seen[name]
        numbered = name
        while number > 1 and (numbered := f"{name}_{number}") in taken:
            number += 1
        taken.add(numbered)
        unique.append(numbered)
    return unique


def _checked(rewards: Any, func: RewardFunc, count: int) -> torch.Tensor:
    name = get_callable_name(func)
    try:
        values = [float("nan") if reward is None else float(reward) for reward in rewards]
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"The reward function {name} returned {rewards!r:.200}, which does not hold numbers ({error}). It must "
            "return one number per sample, or None where it declines to score."
        ) from error
    if len(values) != count:
        raise ConfigError(
            f"The reward function {name} returned {len(values)} scores for {count} samples. It must return one per "
            "sample, or None where it declines to score."
        )
    if any(map(math.isinf, values)):
        raise ConfigError(
            f"The reward function {name} returned an infinite score, with which no mean can be calculated. It must "
            "return one finite number per sample, or None where it declines to score."
        )
    return torch.tensor(values, dtype=torch.float64)
