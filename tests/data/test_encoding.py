# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""From prompts to what a model continues: templates that raise, roles, blank texts, and tokens around a text."""

import time
from copy import deepcopy

import pytest
from datasets import Dataset, IterableDataset

from omniopd_trl.data import check_dataset, check_prompt_lengths, prepare_prompts
from omniopd_trl.data.encoding import encode_prompts, encode_text, is_blank, special_tokens_of_answers
from omniopd_trl.errors import DataError
from tests.conftest import CHATML
from tests.support.other_tokenizers import appending, channels, llama_2, word_piece

USER = {"role": "user", "content": "What is 1 + 1?"}
SYSTEM = {"role": "system", "content": "Be brief."}
ANSWER = {"role": "assistant", "content": "2"}

# Templates as in Gemma, Mistral and others: the beginning of a template, a prompt that it cannot render, its words.
RAISING = {
    "no system": (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}",
        [SYSTEM, USER],
        "System role not supported",
    ),
    "alternate": (
        "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Conversation roles must alternate') }}{% endif %}{% endfor %}",
        [USER, USER],
        "roles must alternate",
    ),
    "key": (
        "{% if messages|length > 1 %}{{ messages[0]['name']['first'] }}{% endif %}",
        [SYSTEM, USER],
        "has no attribute 'name'",
    ),
    "type": ("{% if messages|length > 1 %}{{ 1 + 'a' }}{% endif %}", [SYSTEM, USER], "unsupported operand"),
}


@pytest.fixture
def with_template(tiny_tokenizer):
    """A function that makes a copy of the student's tokenizer with another chat template."""

    def make(template):
        tokenizer = deepcopy(tiny_tokenizer)
        tokenizer.chat_template = template
        return tokenizer

    return make


class TestTemplates:
    """A chat template that raises an error."""

    @pytest.mark.case("R7")
    @pytest.mark.parametrize("template", RAISING)
    def test_row_is_named(self, with_template, template):
        """The row beyond the first batch is named, with the template's own words, in one line."""
        beginning, prompt, message = RAISING[template]
        rows = [{"prompt": [USER]}] * 1003 + [{"prompt": prompt}]
        with pytest.raises(DataError, match=rf"Row 1003 of `train_dataset`.*{message}") as error:
            check_prompt_lengths(Dataset.from_list(rows), with_template(beginning + CHATML), None, None, 4)
        assert "chat template of the student" in str(error.value)
        assert "\n" not in str(error.value)

    @pytest.mark.case("R7")
    def test_first_row_of_a_stream(self, with_template):
        """Of a stream, the first prompt is rendered at the start and each later one before it is answered."""
        tokenizer = with_template(RAISING["no system"][0] + CHATML)
        stream = IterableDataset.from_generator(lambda: iter([{"prompt": [SYSTEM, USER]}]))
        with pytest.raises(DataError, match="Row 0"):
            check_prompt_lengths(stream, tokenizer, None, None, 4)
        with pytest.raises(DataError, match="System role not supported") as error:
            encode_prompts([[USER], [SYSTEM, USER]], tokenizer, None)
        assert error.value.index == 1

    @pytest.mark.case("R7")
    def test_kinds_in_a_stream(self, tiny_tokenizer):
        """A stream may mix text and conversations, which no batch can."""
        with pytest.raises(DataError, match="plain text and conversations are mixed"):
            encode_prompts(["1 + 1 =", [USER]], tiny_tokenizer, None)

    @pytest.mark.case("R7")
    def test_time(self, tiny_tokenizer):
        """10,000 conversations are rendered and tokenized in seconds."""
        rows = Dataset.from_list([{"prompt": [SYSTEM, {"role": "user", "content": f"{n}?"}]} for n in range(10_000)])
        start = time.process_time()  # the machine may be busy
        check_prompt_lengths(rows, tiny_tokenizer, None, 256, 4)
        assert time.process_time() - start < 10


class TestPrompts:
    """Prompts that would be trained on silently."""

    @pytest.mark.case("U11")
    @pytest.mark.parametrize("role", ["usr", "human", "gpt", "User", "", None, 3])
    def test_unknown_roles(self, tiny_tokenizer, role):
        """A role that neither the package nor the template knows is refused, and the row named."""
        prompts = [[USER], [{"role": role, "content": "Hi"}, USER]]
        with pytest.raises(DataError, match=f"role {role!r}.*Rename it") as error:
            encode_prompts(prompts, tiny_tokenizer, None)
        assert error.value.index == 1

    @pytest.mark.case("U11")
    def test_known_roles(self, with_template):
        """The usual roles pass, and one that the template names."""
        tokenizer = with_template("{% if messages[0]['role'] == 'documents' %}!{% endif %}" + CHATML)
        for first in ("system", "developer", "user", "assistant", "documents"):
            encode_prompts([[{"role": first, "content": "Hi"}, USER]], tokenizer, None)

    @pytest.mark.case("U11")
    @pytest.mark.parametrize("text", ["", " ", "\n\t", "\u200b", "\ufeff\u00a0", "\x00"])
    def test_blank(self, text):
        """Nothing to read: as plain text, as a message, as parts of a message, and as a question."""
        parts = [{"type": "text", "text": text}, {"type": "text", "text": text}]
        for prompt in (text, [{"role": "user", "content": text}], [{"role": "user", "content": parts}]):
            rows = Dataset.from_list([{"prompt": prompt}])
            with pytest.raises(DataError, match=r"Row 0 of `train_dataset`.*blank"):
                check_dataset(rows)
        with pytest.raises(DataError, match=r"Row 1 has no question.*blank"):
            prepare_prompts(Dataset.from_list([{"question": "1 + 1?"}, {"question": text}]), "math")

    @pytest.mark.case("U11")
    def test_not_blank(self):
        """Other scripts, emoji and combined characters can be read; so can an empty system message be left out."""
        for text in ("1", "漢", "😀", "e\u0301", "∫", " a"):
            assert not is_blank(text)
        check_dataset(Dataset.from_list([{"prompt": [{"role": "system", "content": ""}, USER]}]))

    @pytest.mark.case("U11")
    def test_parts(self, tiny_tokenizer, with_template):
        """A template that knows no parts would write them as a Python list, which is refused."""
        parts = [{"type": "text", "text": "What is"}, {"type": "text", "text": "1 + 1?"}]
        with pytest.raises(DataError, match="writes a message of parts as a list") as error:
            encode_prompts([[USER], [{"role": "user", "content": parts}]], tiny_tokenizer, None)
        assert error.value.index == 1
        knows = CHATML.replace(
            "{{ message['content'] }}",
            "{% if message['content'] is string %}{{ message['content'] }}"
            "{% else %}{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endif %}",
        )
        tokenizer = with_template(knows)
        first, second = encode_prompts(
            [[{"role": "user", "content": "What is1 + 1?"}], [{"role": "user", "content": parts}]], tokenizer, None
        )
        assert first == second
        raises = with_template("{{ 'x' + messages[0]['content'] }}")
        rows = Dataset.from_list([{"prompt": [{"role": "user", "content": parts}]}])
        with pytest.raises(DataError, match=r"Row 0 of `train_dataset`.*cannot render"):
            check_prompt_lengths(rows, raises, None, None, 4)


class TestMessages:
    """Data of whole conversations."""

    @pytest.mark.case("R18")
    def test_prompts(self):
        """The answer at the end is left out, and a conversation without one is the prompt."""
        rows = [{"messages": [SYSTEM, USER, ANSWER]}, {"messages": [USER, ANSWER, USER]}]
        for dataset in (Dataset.from_list(rows), Dataset.from_list(rows).to_iterable_dataset()):
            prepared = list(prepare_prompts(dataset))
            assert [row["prompt"] for row in prepared] == [[SYSTEM, USER], [USER, ANSWER, USER]]
            assert [row["messages"] for row in prepared] == [row["messages"] for row in rows]
        with pytest.warns(UserWarning, match="`prompt_template` has no effect"):
            prepare_prompts(Dataset.from_list(rows), "math")

    @pytest.mark.parametrize("messages", ["hello", ["hello"], None, {"role": "user"}])
    def test_no_messages(self, messages):
        """A column of that name with anything else is refused with the row."""
        with pytest.raises(DataError, match=r"Row 0 of `train_dataset`: (`prompt` must be|a message needs)"):
            check_dataset(prepare_prompts(Dataset.from_list([{"messages": messages}])))

    @pytest.mark.case("R18")
    def test_advice(self):
        """The trainer says how, rather than to rename the column."""
        with pytest.raises(DataError, match=r"It has `messages`.*prepare_prompts\(dataset\)"):
            check_dataset(Dataset.from_list([{"messages": [USER, ANSWER]}]))
        check_dataset(prepare_prompts(Dataset.from_list([{"messages": [USER, ANSWER]}])))


class TestText:
    """Plain text, which the model continues."""

    @pytest.mark.case("R11")
    @pytest.mark.parametrize(
        ("before", "after"), [("", "<|im_end|>"), ("<|endoftext|>", "<|im_end|>"), ("<|im_start|>", "")]
    )
    def test_no_end(self, tiny_tokenizer, before, after):
        """What the tokenizer puts before a text is kept; what it puts after it is left out."""
        tokenizer = appending(tiny_tokenizer, before, after)
        texts = ["Tom has", "a", "What is 12 + 30?"]
        plain = tiny_tokenizer(texts, add_special_tokens=False)["input_ids"]
        first = [tiny_tokenizer.convert_tokens_to_ids(before)] if before else []
        assert tokenizer("a")["input_ids"] != plain[1]
        assert encode_text(tokenizer, texts) == [[*first, *ids] for ids in plain]
        assert encode_prompts(texts, tokenizer, None) == [[*first, *ids] for ids in plain]

    @pytest.mark.case("R11")
    def test_other_families(self, tiny_tokenizer):
        """As BERT's and Llama's; a text that ends with the token itself keeps it."""
        pieces = appending(word_piece(), "", "[SEP]")
        assert encode_text(pieces, ["the angle"]) == [pieces("the angle", add_special_tokens=False)["input_ids"]]
        llama = appending(llama_2(), "", "</s>")
        assert encode_text(llama, ["Tom has"]) == [llama("Tom has", add_special_tokens=False)["input_ids"]]
        written = "Tom<|im_end|>"
        ids = tiny_tokenizer(written)["input_ids"]
        assert encode_text(appending(tiny_tokenizer), [written]) == encode_text(tiny_tokenizer, [written]) == [ids]
        assert ids[-1] == tiny_tokenizer.eos_token_id


class TestSpecialTokens:
    """Special tokens that a student writes inside its answer."""

    @pytest.mark.case("R9")
    def test_of_answers(self, tiny_tokenizer, tiny_teacher_tokenizer, with_template):
        """Those between the prompt and the answer's text are found; those of turns are not."""
        assert special_tokens_of_answers(tiny_tokenizer, None) == []
        assert special_tokens_of_answers(tiny_teacher_tokenizer, None) == []
        assert special_tokens_of_answers(channels(tiny_tokenizer), None) == ["<|channel|>", "<|message|>"]
        # Only where there are thoughts, as in Magistral.
        thinks = channels(tiny_tokenizer)
        thinks.chat_template = CHATML.replace(
            "{{ message['content'] }}",
            "{% if message['thinking'] %}<|start|>{{ message['thinking'] }}<|end|>{% endif %}{{ message['content'] }}",
        )
        assert special_tokens_of_answers(thinks, None) == ["<|start|>", "<|end|>"]
        # A template that takes no answers says nothing.
        refuses = "{% if messages[-1]['role'] == 'assistant' %}{{ raise_exception('no') }}{% endif %}" + CHATML
        assert special_tokens_of_answers(with_template(refuses), None) == []


@pytest.mark.case("R12")
def test_tokens_beyond_the_embedding(tiny_tokenizer):
    """A prompt with a token that was added without resizing the embedding is refused, and the row named."""
    tokenizer = channels(tiny_tokenizer)
    rows = Dataset.from_list([{"prompt": "a"}, {"prompt": "a<|channel|>"}])
    with pytest.raises(DataError, match=r"Row 1 .*'<\|channel\|>' \(301\).*embedding has 300 rows.*resize"):
        check_prompt_lengths(rows, tokenizer, None, 256, 4, vocab_size=300)
    check_prompt_lengths(rows, tokenizer, None, 256, 4, vocab_size=304)
