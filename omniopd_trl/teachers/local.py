# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""A causal language model of `transformers` as teacher, in this process.

The prefixes of one trajectory are nested, so the longest one is run through the model once (the *trunk*), and its
keys and values serve every chunk and every rollout of that trajectory. Where rollouts are short beside the trunk, they
continue it in one row ([`PrefixTree`]). Otherwise the trunk's keys and values are copied for each rollout.
"""

import asyncio
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    DynamicCache,
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations import deepspeed

from omniopd_trl.accounting.usage import Usage
from omniopd_trl.data.encoding import encode_text, render_chat
from omniopd_trl.errors import DataError, WarnOnce, first_line
from omniopd_trl.method import SamplingFilters
from omniopd_trl.models.growing_cache import growing_cache
from omniopd_trl.models.loading import loading, why_not_loaded
from omniopd_trl.models.padding import why_not_padded
from omniopd_trl.models.prefix_tree import cache_name, cuts_cache, generate_from_tree, prefill, why_no_tree
from omniopd_trl.models.sampling import SeededSampling
from omniopd_trl.teachers.base import (
    Messages,
    Prefix,
    Prompt,
    Rollout,
    SamplingRequest,
    Teacher,
    TeacherReply,
    common_prefix_length,
    seed_of_sample,
)

# Rows of a batch times their length, in tokens. It bounds the keys and values that exist at once: with 8 KV heads of
# 128, 64 layers and bfloat16 (a 32B model) a token takes 256 KiB, so this is 4 GiB of cache.
MAX_BATCH_TOKENS = 16_384

# The rollouts of a trajectory are written in one row if they have at most this many times its trunk's tokens. Each new
# token costs time for all columns of its row, also for those of other rollouts, which a mask hides.
MOST_IN_A_TREE = 16

# The text with which the model is checked when it is loaded.
_TEXT = "Tom has 12 apples and buys 30 more."


@contextmanager
def without_generation_defaults(model: nn.Module) -> Iterator[None]:
    """Make `generate` use nothing but the special tokens of the model's `generation_config.json`.

    Transformers takes every field that the caller leaves at `None` from that file. A file with `min_p`, `typical_p` or
    `suppress_tokens` would silently change the sampled distribution.
    """
    owned = [(module, vars(module).get("generation_config")) for module in model.modules()]
    defaults = [(module, own) for module, own in owned if isinstance(own, GenerationConfig)]
    special = ("bos_token_id", "eos_token_id", "pad_token_id")
    for module, own in defaults:
        vars(module)["generation_config"] = GenerationConfig(**{name: getattr(own, name) for name in special})
    try:
        yield
    finally:
        for module, own in defaults:
            vars(module)["generation_config"] = own


@contextmanager
def _whole() -> Iterator[None]:
    """Load an unpartitioned model, also under ZeRO-3, which partitions models as they are loaded.

    Each process runs its own teacher in a thread, at any time, so the processes cannot gather partitions together.
    """
    reference = deepspeed._hf_deepspeed_config_weak_ref
    config = None if reference is None else reference()
    if config is not None:
        deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if config is not None:
            deepspeed.set_hf_deepspeed_config(config)


def _load(name: str, kwargs: dict[str, Any]) -> PreTrainedModel:
    """Load a model by its architecture. A vision-language model is no `AutoModelForCausalLM`, but continues text."""
    try:
        return AutoModelForCausalLM.from_pretrained(name, **kwargs)
    except ValueError as error:
        try:
            return AutoModelForImageTextToText.from_pretrained(name, **kwargs)
        except ValueError:
            raise error from None


def end_tokens(model_eos: int | list[int] | None, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end an answer: those of a model's generation configuration, and that of its tokenizer."""
    eos_ids = [] if model_eos is None else [model_eos] if isinstance(model_eos, int) else list(model_eos)
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in eos_ids:
        eos_ids.append(tokenizer.eos_token_id)
    return eos_ids


# A waiting call of `sample`, and the future of its replies.
_Call = tuple[Sequence[Prefix], SamplingRequest, asyncio.Future[list[TeacherReply]]]


@dataclass
class _Job:
    """One call of `sample`: the tokenized prefixes of one trajectory, and what each shares with the trunk."""

    token_ids: list[list[int]]
    trunk: list[int]
    shared: list[int]
    prefixes: Sequence[Prefix] = ()

    def cached_tokens(self, m: int) -> int:
        """Tokens of prefix `m` that were read from the cache. The prefix that is the trunk reads none."""
        return 0 if m == self.token_ids.index(self.trunk) else self.shared[m]


class InProcessTeacher(Teacher):
    """Base class of teachers that compute in this process. Concurrent calls of `sample` share batches.

    At temperature 0 all samples of a prefix are one text, which is computed and counted once. A subclass sets the
    attributes and implements `sample_trajectories`.

    Attributes:
        tokenizer: tokenizer of the teacher.
        chat_template_kwargs: arguments for its chat template.
        context_length: maximum number of positions; `None` when it is not known.
        max_batch_tokens: rows of a batch times their length, in tokens.
        role: what the model is called in messages. Defaults to "teacher".
    """

    role: str = "teacher"
    tokenizer: PreTrainedTokenizerBase
    chat_template_kwargs: dict[str, Any]
    context_length: int | None
    max_batch_tokens: int
    _waiting: list[_Call]

    @abstractmethod
    def sample_trajectories(
        self, trajectories: Sequence[Sequence[Prefix]], request: SamplingRequest
    ) -> list[list[TeacherReply]]:
        """Continue the prefixes of several trajectories; one reply per prefix, for each trajectory."""

    def check_prompt(self, prompt: Prompt) -> None:
        if not isinstance(prompt, str):
            self._render(prompt)

    def probe(self, prompt: Prompt) -> None:
        self.encode(Prefix(prompt))

    def encode(self, prefix: Prefix) -> list[int]:
        """Token ids of a prefix: the prompt under the teacher's own template, then the student's text unchanged.

        Raises:
            DataError: when the prompt is a conversation and the teacher has no chat template, or its template cannot
                render it.
        """
        token_ids: list[int]
        if isinstance(prefix.prompt, str):
            (token_ids,) = encode_text(self.tokenizer, [prefix.prompt + prefix.completion])
        else:
            rendered = self._render(prefix.prompt)
            token_ids = self.tokenizer(rendered + prefix.completion, add_special_tokens=False)["input_ids"]
        if not token_ids:
            raise DataError(f"An empty prompt leaves the {self.role} nothing to continue. Remove it from the dataset.")
        return token_ids

    def _render(self, prompt: Messages) -> str:
        return render_chat(self.tokenizer, prompt, self.chat_template_kwargs, f"the {self.role} {self.name!r}")

    async def sample(self, prefixes: Sequence[Prefix], request: SamplingRequest) -> list[TeacherReply]:
        # Trajectories arrive as concurrent calls. Calls that arrive in the same iteration of the event loop share
        # batches: a model in this process gains from larger batches, not from concurrency.
        future: asyncio.Future[list[TeacherReply]] = asyncio.get_running_loop().create_future()
        self._waiting.append((prefixes, request, future))
        if len(self._waiting) == 1:
            await asyncio.sleep(0)
            waiting, self._waiting = self._waiting, []
            self._serve(waiting)
        return await future

    def _serve(self, waiting: list[_Call]) -> None:
        try:
            while waiting:
                request = waiting[0][1]
                same = [call for call in waiting if _mergeable(call[1], request)]
                waiting = [call for call in waiting if not _mergeable(call[1], request)]
                copies = request.num_samples if request.temperature == 0 else 1  # greedy samples are one
                part = replace(request, num_samples=request.num_samples // copies)
                replies = self.sample_trajectories([prefixes for prefixes, _, _ in same], part)
                for (_, _, future), of_call in zip(same, replies, strict=True):
                    future.set_result([replace(reply, rollouts=reply.rollouts * copies) for reply in of_call])
        except Exception as error:
            # Every caller gets the error, not only the one that ran the batch.
            for _, _, future in [*same, *waiting]:
                if not future.done():
                    future.set_exception(error)


def _mergeable(first: SamplingRequest, second: SamplingRequest) -> bool:
    """Whether two calls may share a batch: all but the seed is equal. A batch uses the seed of its first call."""
    return replace(first, seed=None) == replace(second, seed=None)


class LocalTeacher(InProcessTeacher):
    """A causal or vision-language model of `transformers`, loaded in this process.

    Args:
        model: path, Hub id, or an instance.
        tokenizer: tokenizer of the teacher. Loaded from the model's path or id when it is not given.
        model_init_kwargs: keyword arguments for `from_pretrained`. `dtype` defaults to the checkpoint's own.
        revision: Hub revision of model and tokenizer.
        trust_remote_code: whether to execute custom code from the model's repository.
        chat_template_kwargs: arguments for the teacher's chat template, for example `{"enable_thinking": False}`.
        device: device of the model, unless `model_init_kwargs` holds a `device_map`.
        max_batch_tokens: maximum rows of a batch times their length in tokens. It bounds the memory of the cache.
        role: what the model is called in messages.

    Attributes:
        seed_per_sample: whether each sample of a request with a seed has a seed of its own, which follows from its
            prefix and its index ([`seed_of_sample`]). A sample is then the same in any batch, up to rounding. Defaults
            to false.
        context_length: maximum number of positions; `None` when the model's configuration does not state it.

    Raises:
        DataError: when the model or its tokenizer cannot be loaded.
    """

    def __init__(
        self,
        model: str | PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        model_init_kwargs: dict[str, Any] | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
        chat_template_kwargs: dict[str, Any] | None = None,
        device: torch.device | str | None = None,
        max_batch_tokens: int = MAX_BATCH_TOKENS,
        role: str = "teacher",
    ):
        self.role = role
        if isinstance(model, str):
            self.name = model
            kwargs: dict[str, Any] = {
                "dtype": "auto",
                "revision": revision,
                "trust_remote_code": trust_remote_code,
                **(model_init_kwargs or {}),
            }
            try:
                with _whole(), loading(role):
                    model = _load(model, kwargs)
            except (ImportError, OSError, ValueError) as error:
                raise DataError(
                    f"The {role} {self.name!r} cannot be loaded: {why_not_loaded(self.name, error)}"
                ) from error
            revision = kwargs["revision"]
        else:
            self.name = model.config._name_or_path or type(model).__name__
            if model_init_kwargs:
                raise DataError(
                    "`teacher_model_init_kwargs` was given, but the teacher is already instantiated. Pass a path or "
                    "an id, or leave out `teacher_model_init_kwargs`."
                )
        if tokenizer is None:
            try:
                tokenizer = AutoTokenizer.from_pretrained(
                    self.name, revision=revision, trust_remote_code=trust_remote_code
                )
            except (OSError, ValueError) as error:
                raise DataError(
                    f"No tokenizer can be loaded for the {role} {self.name!r} ({first_line(error)}). Save one in its "
                    f"folder; in Python, pass `LocalTeacher(model, tokenizer)`."
                ) from error
        if device is not None and not hasattr(model, "hf_device_map"):
            model = model.to(device)
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.chat_template_kwargs = chat_template_kwargs or {}
        self.max_batch_tokens = max_batch_tokens
        self.seed_per_sample = False
        self.eos_token_ids = eos_ids = end_tokens(model.generation_config.eos_token_id, tokenizer)
        # The model reads it in masked columns and after the end of a row: any token of its embedding will do.
        pad_id, vocab_size = tokenizer.pad_token_id, model.get_input_embeddings().weight.shape[0]
        self._pad_id: int = next(n for n in (pad_id, *eos_ids, 0) if n is not None and 0 <= n < vocab_size)
        self.context_length: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self._reuses_cache = cuts_cache(model)
        with without_generation_defaults(model):
            reason = why_not_padded(model, tokenizer(_TEXT, add_special_tokens=False)["input_ids"])
        if reason:
            raise DataError(
                f"The teacher {self.name!r} cannot continue texts of different lengths in one batch: {reason}. Serve "
                "it with vLLM, or use another teacher."
            )
        self._waiting: list[_Call] = []
        self._warn_once = WarnOnce(__name__)

    @torch.no_grad()
    def logprobs(
        self, prefixes: Sequence[Prefix], texts: Sequence[str], temperature: float = 1.0
    ) -> list[torch.Tensor]:
        """Log-probabilities of texts as continuations: what `sample` draws them with.

        Args:
            prefixes: what comes before each text.
            texts: the continuations. A text is encoded alone, since `sample` writes tokens after those of the prefix.
            temperature: sampling temperature.

        Returns:
            For each text, the log-probability of each of its tokens in nats, float32, on the CPU. Empty for a text
            without tokens.

        Raises:
            DataError: as `encode`.
        """
        pairs = [
            (self.encode(prefix), self.tokenizer(text, add_special_tokens=False)["input_ids"])
            for prefix, text in zip(prefixes, texts, strict=True)
        ]
        results = [torch.empty(0)] * len(pairs)
        todo = sorted((n for n, (_, new) in enumerate(pairs) if new), key=lambda n: -sum(map(len, pairs[n])))
        while todo:
            size = max(1, self.max_batch_tokens // sum(map(len, pairs[todo[0]])))
            part, todo = todo[:size], todo[size:]
            rows = [pairs[n][0] + pairs[n][1] for n in part]
            input_ids, attention_mask, _ = self.rows_from_trunks([(0, ids, 0) for ids in rows], None)
            longest = max(len(pairs[n][1]) for n in part)
            logits = self.model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=(attention_mask.cumsum(1) - 1).clamp(min=0),
                use_cache=False,
                logits_to_keep=longest + 1,
            ).logits[:, -longest - 1 : -1]  # some models compute the others as well
            targets = input_ids[:, input_ids.size(1) - longest :, None]
            logprobs = (logits.float() / temperature).log_softmax(-1).gather(2, targets)[..., 0].cpu()
            for row, n in zip(logprobs, part, strict=True):
                results[n] = row[longest - len(pairs[n][1]) :]
        return results

    @torch.no_grad()
    def sample_trajectories(
        self, trajectories: Sequence[Sequence[Prefix]], request: SamplingRequest
    ) -> list[list[TeacherReply]]:
        """Continue the prefixes of several trajectories, in batches of at most `max_batch_tokens`.

        Args:
            trajectories: the prefixes of each trajectory. They need not be nested. Tokens that a prefix shares with
                the longest one are computed once.
            request: how to sample. With a seed, the result is determined by the call as a whole, or with
                `seed_per_sample` by each prefix.

        Returns:
            One reply per prefix, for each trajectory.
        """
        if request.seed is not None:
            devices = [self.model.device] if self.model.device.type == "cuda" else []
            with torch.random.fork_rng(devices=devices):
                torch.manual_seed(request.seed)
                return self._sample_trajectories(trajectories, request)
        return self._sample_trajectories(trajectories, request)

    @growing_cache()
    def _sample_trajectories(
        self, trajectories: Sequence[Sequence[Prefix]], request: SamplingRequest
    ) -> list[list[TeacherReply]]:
        jobs = [self._job([self.encode(prefix) for prefix in prefixes], prefixes) for prefixes in trajectories]
        replies: dict[tuple[int, int], TeacherReply] = {}
        # Sorted by length, the longest first, which keeps padding small.
        order = sorted(range(len(jobs)), key=lambda i: (self._in_tree(jobs[i], request), -len(jobs[i].trunk)))
        for batch in self._batches(order, jobs, request):
            self._sample_batch(batch, jobs, request, replies)
        return [[replies[i, m] for m in range(len(job.token_ids))] for i, job in enumerate(jobs)]

    def _job(self, token_ids: list[list[int]], prefixes: Sequence[Prefix] = ()) -> _Job:
        trunk = max(token_ids, key=len, default=[])
        # At least the last token is computed again: the first new token is sampled from its output.
        shared = [min(common_prefix_length(ids, trunk), len(ids) - 1) for ids in token_ids]
        return _Job(token_ids, trunk, shared if self._reuses_cache else [0] * len(token_ids), prefixes)

    @cached_property
    def _continues_trees(self) -> bool:
        return why_no_tree(self.model) is None

    def _in_tree(self, job: _Job, request: SamplingRequest) -> bool:
        """Whether all rollouts of a trajectory are written in one row."""
        width, new = len(job.trunk), len(job.token_ids) * request.num_samples * request.max_tokens
        fits = new <= MOST_IN_A_TREE * width and width + new <= self.max_batch_tokens
        return fits and self._continues_trees

    def _batches(self, order: list[int], jobs: list[_Job], request: SamplingRequest) -> list[list[int]]:
        """Groups of trajectories whose rows fit in `max_batch_tokens` together. They are written in the same way."""
        batches: list[list[int]] = []
        kinds: list[bool] = []
        for i in order:
            in_tree = self._in_tree(jobs[i], request)
            batch = [*batches[-1], i] if batches and kinds[-1] == in_tree else [i]
            width = len(jobs[batch[0]].trunk)  # the first is the longest
            rows = [len(jobs[j].token_ids) * request.num_samples for j in batch]
            per_row = request.max_tokens
            tokens = len(batch) * (width + max(rows) * per_row) if in_tree else sum(rows) * (width + per_row)
            if len(batch) == 1 or tokens > self.max_batch_tokens:
                batches.append([i])
                kinds.append(in_tree)
            else:
                batches[-1].append(i)
        return batches

    def _sample_batch(
        self,
        batch: list[int],
        jobs: list[_Job],
        request: SamplingRequest,
        replies: dict[tuple[int, int], TeacherReply],
    ) -> None:
        in_tree = self._in_tree(jobs[batch[0]], request)
        copied = self._reuses_cache and not in_tree
        trunks = prefill(self.model, [jobs[i].trunk for i in batch]) if copied else None
        todo: list[tuple[int, int, int]] = []  # index into the batch, trajectory, prefix
        for k, i in enumerate(batch):
            for m, token_ids in enumerate(jobs[i].token_ids):
                length = len(token_ids)
                if self.context_length is not None and length + request.max_tokens > self.context_length:
                    replies[i, m] = self._too_long(length, request)
                else:
                    todo.append((k, i, m))
        # A single trajectory may exceed `max_batch_tokens`. Its prefixes are split, and then the rollouts of a prefix.
        while todo:
            width = max(len(jobs[i].token_ids[m]) for _, i, m in todo) + request.max_tokens
            room = len(todo) * request.num_samples if in_tree else max(1, self.max_batch_tokens // width)
            take = max(1, room // request.num_samples)
            part, todo = todo[:take], todo[take:]
            texts: list[list[Rollout]] = [[] for _ in part]
            written = [0] * len(part)
            samples_left = request.num_samples
            while samples_left:
                samples = min(samples_left, room) if take == 1 else samples_left
                first = request.num_samples - samples_left
                samples_left -= samples
                rows = [(row, first + index) for row in range(len(part)) for index in range(samples)]
                todo_now = [(*part[row], index) for row, index in rows]
                generated = self._generate(todo_now, jobs, trunks, request, in_tree)
                for (row, _), new_ids in zip(rows, generated, strict=True):
                    rollout, num_tokens = self._rollout(new_ids)
                    texts[row].append(rollout)
                    written[row] += num_tokens
            for row, (_, i, m) in enumerate(part):
                usage = Usage(
                    prompt_tokens=len(jobs[i].token_ids[m]),
                    cached_tokens=jobs[i].cached_tokens(m),
                    completion_tokens=written[row],
                )
                replies[i, m] = TeacherReply(tuple(texts[row]), usage)

    def rows_from_trunks(
        self, rows: list[tuple[int, list[int], int]], trunks: DynamicCache | None
    ) -> tuple[torch.Tensor, torch.Tensor, DynamicCache | None]:
        """Left-padded inputs, and a cache of their beginning.

        Args:
            rows: index of the trunk, token ids, and number of tokens shared with the trunk, for each row.
            trunks: keys and values of the trunks, from the prefill; `None` computes every token.

        Returns:
            `input_ids` and `attention_mask` of shape `(rows, width)`, and a cache that holds all but the last few
            columns (`None` when there is nothing to reuse).
        """
        device = self.model.device
        lengths = torch.tensor([len(ids) for _, ids, _ in rows], device=device)
        width = int(lengths.max())
        input_ids = torch.tensor([[self._pad_id] * (width - len(ids)) + ids for _, ids, _ in rows], device=device)
        position = torch.arange(width, device=device) - (width - lengths)[:, None]  # (rows, width), < 0 on padding
        attention_mask = (position >= 0).long()
        # All rows end in the same column, so they recompute the same number of last columns.
        cached = width - max(len(ids) - shared for _, ids, shared in rows)
        if trunks is None or cached <= 0:
            return input_ids, attention_mask, None
        cache = DynamicCache(config=self.model.config)
        trunk_of_row = torch.tensor([trunk for trunk, _, _ in rows], device=device)[:, None]
        source = position[:, :cached].clamp(min=0)
        for index, layer in enumerate(trunks.layers):
            keys = layer.keys.transpose(1, 2)[trunk_of_row.to(layer.keys.device), source.to(layer.keys.device)]
            values = layer.values.transpose(1, 2)[trunk_of_row.to(layer.keys.device), source.to(layer.keys.device)]
            cache.update(keys.transpose(1, 2), values.transpose(1, 2), index)
        return input_ids, attention_mask, cache

    def _generate(
        self,
        todo: list[tuple[int, int, int, int]],  # index into the batch, trajectory, prefix, sample
        jobs: list[_Job],
        trunks: DynamicCache | None,
        request: SamplingRequest,
        in_tree: bool,
    ) -> list[list[int]]:
        rows = [(k, jobs[i].token_ids[m], jobs[i].shared[m]) for k, i, m, _ in todo]
        input_ids, attention_mask, cache = self.rows_from_trunks(rows, trunks)
        greedy = request.temperature == 0
        processors = LogitsProcessorList()
        if self.seed_per_sample and request.seed is not None and not greedy:
            seeds = [seed_of_sample(request.seed, jobs[i].prefixes[m], index) for _, i, m, index in todo]
            filters = SamplingFilters(request.top_k, request.top_p, request.min_p)
            processors.append(SeededSampling(seeds, request.max_tokens, request.temperature, filters))
            greedy = True  # the processor leaves one token to choose from
        config = GenerationConfig(
            max_new_tokens=request.max_tokens,
            do_sample=not greedy,
            temperature=1.0 if greedy else request.temperature,
            top_p=1.0 if greedy else request.top_p,
            top_k=None if greedy else request.top_k,
            min_p=None if greedy else request.min_p or None,
            repetition_penalty=1.0,
            eos_token_id=self.eos_token_ids or None,
            pad_token_id=self._pad_id,
            disable_compile=True,
        )
        generate = partial(generate_from_tree, self.model.generate) if in_tree else self.model.generate
        with without_generation_defaults(self.model):
            output = generate(
                input_ids=input_ids,
                attention_mask=attention_mask,
                generation_config=config,
                logits_processor=processors,
                **({} if cache is None else {cache_name(self.model): cache}),
            )
        new_ids: list[list[int]] = output[:, input_ids.shape[1] :].tolist()
        return new_ids

    def _rollout(self, new_ids: list[int]) -> tuple[Rollout, int]:
        end = next((n for n, token in enumerate(new_ids) if token in self.eos_token_ids), None)
        text_ids = new_ids if end is None else new_ids[:end]
        text = self.tokenizer.decode(text_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return Rollout(text, "length" if end is None else "stop"), len(text_ids) + (end is not None)

    def _too_long(self, length: int, request: SamplingRequest) -> TeacherReply:
        failure = (
            f"a prefix of {length} tokens and {request.max_tokens} more do not fit the teacher's context of "
            f"{self.context_length}"
        )
        message = f"{self.name}: {failure}; such chunks are dropped. Lower `max_completion_length`."
        self._warn_once(message, "context")
        return TeacherReply(failure=failure)
