# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""From a prompt to the text or the tokens that a model continues."""

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from omniopd_trl.errors import DataError, first_line

# Roles of messages. A chat template may know others.
ROLES = ("system", "developer", "user", "assistant")


class PromptError(DataError):
    """A prompt cannot be used.

    Attributes:
        index: its position in the prompts that were passed.
    """

    def __init__(self, message: str, index: int):
        super().__init__(message)
        self.index = index


def encode_prompts(
    prompts: Sequence[Any], tokenizer: PreTrainedTokenizerBase, chat_template_kwargs: Mapping[str, Any] | None
) -> list[list[int]]:
    """Token ids of prompts for the student, up to where its completion begins.

    Args:
        prompts: prompts, all of them plain text or all of them conversations.
        tokenizer: tokenizer of the student.
        chat_template_kwargs: arguments for its chat template.

    Raises:
        PromptError: when a prompt cannot be answered, or the chat template cannot render it.
    """
    for index, prompt in enumerate(prompts):
        problem = prompt_problem(prompt) or _role_problem(prompt, tokenizer)
        if isinstance(prompt, str) != isinstance(prompts[0], str):
            problem = "plain text and conversations are mixed. Make all prompts lists of messages."
        if problem is not None:
            raise PromptError(problem, index)
    if isinstance(prompts[0], str):
        return encode_text(tokenizer, prompts)

    def rendered(index: int) -> str:
        try:
            return render_chat(tokenizer, prompts[index], chat_template_kwargs, "the student")
        except DataError as error:
            raise PromptError(str(error), index) from error

    for index, prompt in enumerate(prompts):
        parts = [str(message["content"]) for message in prompt if isinstance(message["content"], list)]
        text = rendered(index) if parts else ""
        if any(part in text for part in parts):
            problem = "the student's chat template writes a message of parts as a list. Make its content a text."
            raise PromptError(problem, index)
    try:
        token_ids: list[list[int]] = tokenizer.apply_chat_template(
            list(prompts), add_generation_prompt=True, tokenize=True, return_dict=True, **(chat_template_kwargs or {})
        )["input_ids"]
    except Exception:  # a template may raise anything
        for index in range(len(prompts)):
            rendered(index)
        raise
    return token_ids


def encode_text(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of texts that a model continues.

    Tokens that the tokenizer puts before a text, such as the beginning of a sequence, are kept. Those that it puts
    after it, such as the end of a sequence, are left out.
    """
    token_ids: list[list[int]] = tokenizer(list(texts))["input_ids"]
    whole, plain = token_ids[0], tokenizer(texts[0], add_special_tokens=False)["input_ids"]
    num_after = 0
    for start in range(len(whole) - len(plain) + 1):
        if plain and whole[start : start + len(plain)] == plain:
            num_after = len(whole) - start - len(plain)
            break
    return [ids[: len(ids) - num_after] for ids in token_ids]


def render_chat(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Any], kwargs: Mapping[str, Any] | None, model: str
) -> str:
    """Text of a conversation up to where the model's answer begins.

    Args:
        tokenizer: tokenizer with the chat template.
        messages: the messages.
        kwargs: arguments for the template.
        model: whose template it is, for messages.

    Raises:
        DataError: when there is no template, or the template raises an error.
    """
    if tokenizer.chat_template is None:
        raise DataError(
            f"The prompts are conversations, but the tokenizer of {model} has no chat template. Set "
            "`tokenizer.chat_template`, use a chat model, or make the prompts plain text."
        )
    try:
        text: str = tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, tokenize=False, **(kwargs or {})
        )
    except Exception as error:  # a template may raise anything
        roles = ", ".join(str(message.get("role")) for message in messages)
        raise DataError(
            f"The chat template of {model} cannot render a prompt with the roles {roles} ({first_line(error)}). "
            "Remove or rewrite it, for example without a system message, or use another model. The prompt: "
            f"{messages!r:.200}"
        ) from error
    return text


def special_tokens_of_answers(tokenizer: PreTrainedTokenizerBase, kwargs: Mapping[str, Any] | None) -> list[str]:
    """Special tokens that a chat template puts into an answer, such as `<|channel|>` before a final answer.

    A model that was trained with the template writes them, and decoding leaves them out.

    Args:
        tokenizer: tokenizer with the chat template.
        kwargs: arguments for the template.
    """
    question = {"role": "user", "content": "question"}
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    found: list[str] = []
    for thoughts in ({}, {"reasoning_content": "thoughts", "thinking": "thoughts"}):
        messages = [question, {"role": "assistant", "content": "answer", **thoughts}]
        try:
            prompt = render_chat(tokenizer, [question], kwargs, "the student")
            whole = tokenizer.apply_chat_template(messages, tokenize=False, **(kwargs or {}))
        except Exception:  # a template need not accept answers: then nothing is known about them
            continue
        pairs = enumerate(zip(prompt, whole, strict=False))
        shared = next((n for n, (first, second) in pairs if first != second), len(prompt))
        written = whole[shared:].rpartition("answer")[0]
        found += [token for token in special if token in written and token not in found]
    return found


def prompt_problem(prompt: Any) -> str | None:
    """The problem of a prompt that no model can answer, in words; `None` when there is none."""
    if isinstance(prompt, str):
        return "the prompt is empty or blank. Remove the row." if is_blank(prompt) else None
    if not isinstance(prompt, list) or not all(isinstance(message, dict) for message in prompt):
        return f"`prompt` must be text or a list of messages, got {prompt!r:.200}. Fix or remove the row."
    if not prompt:
        return "the prompt has no message. Remove the row."
    for message in prompt:
        if "role" not in message or "content" not in message:
            return f"a message needs `role` and `content`, got {message!r:.200}. Fix or remove the row."
        if message["role"] == "tool" or message.get("tool_calls"):
            return "a message calls or answers a tool: tools are not supported yet. Remove the row."
        content = message["content"]
        if isinstance(content, list):
            kinds = sorted({str(part.get("type")) if isinstance(part, dict) else repr(part) for part in content})
            if kinds != ["text"]:
                return f"a message holds parts of type {', '.join(kinds)}: only text is supported yet. Remove the row."
            if not all(isinstance(part.get("text"), str) for part in content):
                return f"a part of a message has no text, got {content!r:.200}. Fix or remove the row."
        elif not isinstance(content, str):
            return f"the content of a message must be text, got {content!r:.200}. Fix or remove the row."
        text = content if isinstance(content, str) else "".join(part["text"] for part in content)
        if message["role"] == "user" and is_blank(text):
            return "a message of the user is empty or blank. Remove the row."
    if prompt[-1]["role"] == "assistant":
        return "the last message is the assistant's, so nothing is left to answer. End the prompt with a user message."
    return None


def _role_problem(prompt: Any, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The problem of a role that a chat template does not know by name. Most templates would render any role."""
    for message in [] if isinstance(prompt, str) else prompt:
        role = message["role"]
        template = str(tokenizer.chat_template)
        if role not in ROLES and f"'{role}'" not in template and f'"{role}"' not in template:
            return (
                f"a message has the role {role!r}, which is none of {', '.join(ROLES)}, and the chat template does "
                "not name it. Rename it."
            )
    return None


def is_blank(text: str) -> bool:
    """Whether a text has nothing to read: white space, control and zero-width characters only."""
    return not any(character.isprintable() and not character.isspace() for character in text)
