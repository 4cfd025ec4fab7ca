# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""A model that vLLM generates with in this process, for evaluations."""

from collections.abc import Sequence
from typing import Any

from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from omniopd_trl.accounting.usage import Usage
from omniopd_trl.errors import DataError, import_extra
from omniopd_trl.models.loading import why_not_loaded
from omniopd_trl.teachers.base import Prefix, Rollout, SamplingRequest, TeacherReply, seed_of_sample
from omniopd_trl.teachers.local import InProcessTeacher, end_tokens
from omniopd_trl.teachers.options import TeacherOptions


class VLLMTeacher(InProcessTeacher):
    """A model in vLLM's offline engine. Each sample is a request with a seed of its own.

    Args:
        model: path or id of the model.
        tokenizer: tokenizer of the model. Loaded from its path or id when it is not given.
        options: `teacher_model_revision`, `trust_remote_code`, the chat template's arguments, and
            `teacher_model_init_kwargs` as keyword arguments of `vllm.LLM`.

    Raises:
        MissingExtraError: when vLLM is not installed.
        DataError: when the model or its tokenizer cannot be loaded.
    """

    # Tokens of the samples that are requested together. vLLM batches them itself; a kill loses what is in flight.
    max_batch_tokens = 2**21
    role = "model"

    def __init__(self, model: str, tokenizer: PreTrainedTokenizerBase | None, options: TeacherOptions):
        vllm = import_extra("vllm", "vllm")
        source: dict[str, Any] = {
            "revision": options.teacher_model_revision,
            "trust_remote_code": options.trust_remote_code,
        }
        try:
            self.tokenizer = tokenizer or AutoTokenizer.from_pretrained(model, **source)
            self._llm = vllm.LLM(model=model, **source, **(options.teacher_model_init_kwargs or {}))
        except (OSError, ValueError) as error:
            raise DataError(f"vLLM cannot load the model {model!r}: {why_not_loaded(model, error)}") from error
        try:
            eos = GenerationConfig.from_pretrained(model, **source).eos_token_id
        except OSError:  # a model without the file
            eos = None
        self.name = model
        self.chat_template_kwargs = options.teacher_chat_template_kwargs or options.chat_template_kwargs or {}
        self.context_length = self._llm.model_config.max_model_len
        self._eos_token_ids = end_tokens(eos, self.tokenizer)
        self._sampling_params = vllm.SamplingParams
        self._waiting = []

    def sample_trajectories(
        self, trajectories: Sequence[Sequence[Prefix]], request: SamplingRequest
    ) -> list[list[TeacherReply]]:
        jobs = [[(prefix, self.encode(prefix)) for prefix in prefixes] for prefixes in trajectories]
        prompts, params = [], []
        for prefix, token_ids in (pair for job in jobs for pair in job):
            for index in range(request.num_samples):
                prompts.append({"prompt_token_ids": token_ids})
                params.append(
                    self._sampling_params(
                        temperature=request.temperature,
                        top_p=request.top_p,
                        top_k=request.top_k,
                        min_p=request.min_p,
                        max_tokens=request.max_tokens,
                        seed=None if request.seed is None else seed_of_sample(request.seed, prefix, index),
                        stop_token_ids=self._eos_token_ids,
                    )
                )
        outputs = iter(self._llm.generate(prompts, params, use_tqdm=False))
        replies: list[list[TeacherReply]] = []
        for job in jobs:
            replies.append([])
            for _, token_ids in job:
                samples = [next(outputs).outputs[0] for _ in range(request.num_samples)]
                usage = Usage(len(token_ids), 0, sum(len(sample.token_ids) for sample in samples))
                rollouts = [Rollout(sample.text, sample.finish_reason) for sample in samples]
                replies[-1].append(TeacherReply(tuple(rollouts), usage))
        return replies
