# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Datasets: loading, prompts, and what is refused before anything expensive starts."""

import json
import warnings

import pytest
from datasets import Dataset, DatasetDict, Features, Image, IterableDataset, IterableDatasetDict, Value

from omniopd_trl.data import (
    PROMPT_TEMPLATES,
    check_dataset,
    check_prompt_lengths,
    get_split,
    load_dataset_or_files,
    local_builder,
    prepare_prompts,
    resolve_template,
)
from omniopd_trl.errors import ConfigError, DataError, OmniOPDError

ROWS = [{"question": "1 + 1?", "answer": "2"}, {"question": "2 + 2?", "answer": "4"}]
CHAT = [{"role": "user", "content": "What is 1 + 1?"}]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    """What `datasets` prepares from local files stays in the test's folder."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def generated(rows):
    """A streaming dataset that declares no columns, as one made from a generator."""
    return IterableDataset.from_generator(lambda: iter(rows))


class TestLoading:
    """`load_dataset_or_files`."""

    @pytest.mark.parametrize("ending", ["jsonl", "json", "parquet"])
    def test_file(self, tmp_path, ending):
        """A local file becomes the split `train`, row for row."""
        path = tmp_path / f"sums.{ending}"
        if ending == "parquet":
            Dataset.from_list(ROWS).to_parquet(path)
        elif ending == "json":
            path.write_text(json.dumps(ROWS))
        else:
            write_lines(path, ROWS)
        splits = load_dataset_or_files(str(path))
        assert list(splits) == ["train"]
        assert splits["train"].to_list() == ROWS

    @pytest.mark.parametrize("streaming", [False, True])
    def test_folder(self, tmp_path, streaming):
        """The files of a folder are the splits that their names tell."""
        folder = tmp_path / "sums"
        folder.mkdir()
        write_lines(folder / "train.jsonl", ROWS)
        write_lines(folder / "test.jsonl", ROWS[:1])
        splits = load_dataset_or_files(str(folder), streaming=streaming)
        assert set(splits) == {"train", "test"}
        assert list(splits["test"]) == ROWS[:1]
        assert isinstance(splits["train"], IterableDataset) == streaming

    def test_shards(self, tmp_path):
        """Shards of a split join to one."""
        folder = tmp_path / "sums"
        folder.mkdir()
        for index, row in enumerate(ROWS):
            Dataset.from_list([row]).to_parquet(folder / f"train-0000{index}-of-00002.parquet")
        assert load_dataset_or_files(str(folder))["train"].to_list() == ROWS

    @pytest.mark.parametrize("streaming", [False, True])
    def test_saved_to_disk(self, tmp_path, streaming):
        """A dataset that was saved by itself is the split `train`; saved splits keep their names."""
        saved = Dataset.from_list(ROWS)
        saved.save_to_disk(tmp_path / "one", num_shards=2)
        DatasetDict(train=saved, test=saved.select([0])).save_to_disk(tmp_path / "two")
        assert list(load_dataset_or_files(str(tmp_path / "one"), streaming=streaming)["train"]) == ROWS
        splits = load_dataset_or_files(str(tmp_path / "two"), streaming=streaming)
        assert {name: list(split) for name, split in splits.items()} == {"train": ROWS, "test": ROWS[:1]}

    @pytest.mark.parametrize("name", ["sums.jsonl", "./sums", "/nowhere/sums", "folder/sums.parquet"])
    def test_missing(self, tmp_path, monkeypatch, name):
        """A path where nothing is says so, and where it looked."""
        monkeypatch.chdir(tmp_path)
        with pytest.raises(DataError, match=r"There is no dataset file.*looked in"):
            load_dataset_or_files(name)

    def test_unknown_on_the_hub(self):
        """A name that is neither local nor on the Hub says both."""
        with pytest.raises(DataError, match=r"neither a local file nor a local folder"):
            load_dataset_or_files("nobody/no-such-dataset")

    def test_empty_folder(self, tmp_path):
        """A folder without data says what it must hold."""
        (tmp_path / "empty").mkdir()
        with pytest.raises(DataError, match=r"must hold \.json, \.jsonl or \.parquet files"):
            load_dataset_or_files(str(tmp_path / "empty"))

    def test_malformed(self, tmp_path):
        """A file that is not what its name says is refused with a hint."""
        path = tmp_path / "sums.jsonl"
        path.write_text('{"question": "1 + 1?"}\n{"question": \n')
        with pytest.raises(DataError, match="every line is one JSON object"):
            load_dataset_or_files(str(path))
        path.write_bytes(b'{"question": "caf\xe9?"}\n')
        with pytest.raises(DataError, match=r"Invalid UTF8 .*is one JSON object in UTF-8"):
            load_dataset_or_files(str(path))
        path = tmp_path / "sums.parquet"
        path.write_bytes(b"PAR1 and nothing else")
        with pytest.raises(DataError, match="the file is complete"):
            load_dataset_or_files(str(path))

    @pytest.mark.case("U4")
    @pytest.mark.parametrize(
        ("name", "text"), [("a.jsonl", ""), ("a.jsonl", "\n \n"), ("a.json", ""), ("a.json", "[]"), ("a.json", "{}")]
    )
    def test_no_rows(self, tmp_path, name, text):
        """A file without rows says so, read at once or as a stream."""
        path = tmp_path / name
        path.write_text(text)
        with pytest.raises(DataError, match=r"'.*' could not be loaded \(it has no rows\)"):
            load_dataset_or_files(str(path))
        with pytest.raises(DataError, match=r"it has no rows|`train_dataset` is empty"):
            check_dataset(load_dataset_or_files(str(path), streaming=True)["train"])

    @pytest.mark.case("U4")
    def test_beside(self, tmp_path, monkeypatch):
        """A name of a folder that is here, but lacks the part after it, is looked up on the Hub; both are said."""
        monkeypatch.chdir(tmp_path)
        (tmp_path / "data" / "gsm8k").mkdir(parents=True)
        with pytest.raises(
            DataError, match=r"looked up on the Hub.*The folder 'data' is here and has no 'gsm8'.*Did you mean"
        ):
            load_dataset_or_files("data/gsm8")

    @pytest.mark.case("U4")
    @pytest.mark.parametrize("text", ['"text"\n', "text\n"])
    def test_stream_of_other_lines(self, tmp_path, text):
        """Lines that are no objects are refused when a stream is read, as when a file is prepared."""
        path = tmp_path / "a.jsonl"
        path.write_text(text)
        with pytest.raises(DataError, match="JSON"):
            load_dataset_or_files(str(path))
        with pytest.raises(DataError, match="one JSON object"):
            check_dataset(load_dataset_or_files(str(path), streaming=True)["train"])

    def test_other_encoding(self, tmp_path):
        """A file that is not UTF-8 is refused when it is loaded, and not by a traceback when its row is read."""
        path = tmp_path / "problems" / "train.jsonl"
        path.parent.mkdir()
        path.write_bytes('{"question": "1"}\n{"question": "caf\xe9"}\n'.encode("latin-1"))
        for name in (path, path.parent):
            with pytest.raises(DataError, match=r"could not be loaded \(.*UTF8"):
                load_dataset_or_files(str(name))

    def test_reasons(self, tmp_path):
        """Splits with different columns, and configurations to choose from, are told in words."""
        (tmp_path / "train.jsonl").write_text('{"question": "a", "answer": "1"}\n')
        (tmp_path / "test.jsonl").write_text('{"question": "a", "solution": "1"}\n')
        with pytest.raises(DataError, match=r"\(its files have different columns\)"):
            load_dataset_or_files(str(tmp_path))
        files = "".join(f"- config_name: {name}\n  data_files: train.jsonl\n" for name in ("easy", "hard"))
        (tmp_path / "README.md").write_text(f"---\nconfigs:\n{files}---\n")
        with pytest.raises(DataError, match=r"Config name is missing\. .*\['easy', 'hard'\]\)"):
            load_dataset_or_files(str(tmp_path))

    def test_other_kind(self, tmp_path):
        """A file of a kind that is not read names the kinds that are."""
        path = tmp_path / "sums.csv"
        path.write_text("question,answer\n")
        with pytest.raises(DataError, match=r"only \.json, \.jsonl, \.parquet files are read"):
            load_dataset_or_files(str(path))

    def test_configuration_of_a_file(self, tmp_path):
        """A file has no configurations: naming one is a mistake, not a wish to be passed over."""
        with pytest.raises(DataError, match="configuration 'main'"):
            load_dataset_or_files(str(write_lines(tmp_path / "a.jsonl", ROWS)), "main")

    def test_local_builder(self, tmp_path):
        """A Hub id has no local builder; a file has its own."""
        assert local_builder("openai/gsm8k") is None
        assert local_builder(str(write_lines(tmp_path / "a.JSONL", ROWS))) == ("json", str(tmp_path / "a.JSONL"))

    def test_split_that_is_missing(self):
        """The message names the option and lists the splits."""
        with pytest.raises(DataError, match=r"no split 'test' \(it has: 'train'\).*`dataset_test_split`"):
            get_split({"train": 1}, "test", "dataset_test_split")


class TestTemplates:
    """`resolve_template` and `prepare_prompts`."""

    def test_math_is_table_7(self):
        """The built-in template is the paper's text, its backslashes included."""
        assert resolve_template("math") == (
            r"Solve the following math problem step by step. The last line of your response should be of the form "
            r"Answer: \$Answer (without quotes) where \$Answer is the answer to the problem."
            "\n\n{question}"
        )
        assert list(PROMPT_TEMPLATES) == ["math"]

    @pytest.mark.parametrize("template", ["maths", "", "Solve: {Question}", "{question} {question}"])
    def test_no_template(self, template):
        """Neither a name nor a text with one placeholder: the message shows what was given."""
        with pytest.raises(ConfigError, match="exactly once") as error:
            resolve_template(template)
        assert repr(template) in str(error.value)

    def test_braces(self):
        """LaTeX in the template and in the question stays as it is, and a question is never a template."""
        dataset = Dataset.from_list([{"question": r"Is \frac{1}{2} = {question}?"}])
        prompt = prepare_prompts(dataset, r"Answer in \boxed{}: {question}")[0]["prompt"]
        assert prompt == [{"role": "user", "content": r"Answer in \boxed{}: Is \frac{1}{2} = {question}?"}]

    @pytest.mark.parametrize("column", ["question", "problem"])
    def test_other_columns_stay(self, column):
        """A question gets a prompt beside it, and the answer is still there to score against."""
        row = {column: "1 + 1?", "answer": "2", "solution": "1 + 1 = 2"}
        (prepared,) = prepare_prompts(Dataset.from_list([row]), "math")
        assert prepared.pop("prompt")[0]["content"].endswith("\n\n1 + 1?")
        assert prepared == row

    def test_without_template(self):
        """Without a template the question is the prompt."""
        prepared = prepare_prompts(Dataset.from_list([{"problem": "1 + 1?"}]))
        assert prepared[0]["prompt"] == [{"role": "user", "content": "1 + 1?"}]

    def test_prompts_are_left_alone(self):
        """A dataset with prompts is returned itself; a template that has no effect is said."""
        for prompt in (CHAT, "1 + 1?"):
            dataset = Dataset.from_list([{"prompt": prompt, "question": "x"}])
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                assert prepare_prompts(dataset) is dataset
        dataset = Dataset.from_list([{"prompt": CHAT, "question": "x"}])
        with pytest.warns(UserWarning, match="`prompt_template` has no effect"):
            assert prepare_prompts(dataset, "math") is dataset

    def test_text_prompts_and_a_template(self):
        """A template that is asked for turns prompts of plain text into conversations."""
        rows = [{"prompt": "1 + 1?", "solution": "2"}, {"prompt": "2 + 2?", "solution": "4"}]
        for dataset in (Dataset.from_list(rows), generated(rows)):
            prepared = list(prepare_prompts(dataset, "Solve: {question}"))
            assert [row["prompt"] for row in prepared] == [
                [{"role": "user", "content": "Solve: 1 + 1?"}],
                [{"role": "user", "content": "Solve: 2 + 2?"}],
            ]
            assert [row["solution"] for row in prepared] == ["2", "4"]

    def test_known_by_what_they_are_made_of(self):
        """The fingerprint decides what a run replays: changing it makes recorded runs pay again, so it is pinned."""
        dataset = Dataset.from_list([{"question": "1 + 1?"}])
        dataset._fingerprint = "0123456789abcdef"
        assert prepare_prompts(dataset)._fingerprint == "d88d293da9a5581b"
        assert prepare_prompts(dataset, "Solve: {question}")._fingerprint == "1258fb4b7c351235"
        dataset._fingerprint = "another"
        assert prepare_prompts(dataset)._fingerprint not in ("d88d293da9a5581b", "1258fb4b7c351235")

    def test_without_question(self):
        """A dataset without any question is left to `check_dataset`, which lists its columns."""
        dataset = Dataset.from_list([{"text": "x"}])
        assert prepare_prompts(dataset, "math") is dataset

    def test_mixture(self):
        """In a mixture one part says `question` and the other `problem`; each row uses its own."""
        dataset = Dataset.from_list([{"question": "a", "problem": None}, {"question": None, "problem": "b"}])
        assert [row[0]["content"] for row in prepare_prompts(dataset)["prompt"]] == ["a", "b"]

    def test_row_without_question(self):
        """A row that asks nothing is named."""
        dataset = Dataset.from_list([{"question": "a"}, {"question": None}])
        with pytest.raises(DataError, match=r"Row 1 has no question"):
            prepare_prompts(dataset)
        with pytest.raises(DataError, match=r"^Row 0 has no question"):
            check_dataset(prepare_prompts(generated([{"question": None}])))

    def test_all_kinds(self):
        """Splits and streams come back as what they were, with the same prompts."""
        rows = [{"question": "a", "answer": "1"}]
        expected = [{"role": "user", "content": "a"}]
        for dataset in (Dataset.from_list(rows), Dataset.from_list(rows).to_iterable_dataset(), generated(rows)):
            prepared = prepare_prompts(dataset)
            assert type(prepared) is type(dataset)
            assert next(iter(prepared)) == {"question": "a", "answer": "1", "prompt": expected}
        for splits in (
            DatasetDict(train=Dataset.from_list(rows)),
            IterableDatasetDict(train=generated(rows)),
        ):
            prepared = prepare_prompts(splits)
            assert type(prepared) is type(splits)
            assert next(iter(prepared["train"]))["prompt"] == expected


class TestCheckDataset:
    """`check_dataset`."""

    @pytest.mark.parametrize("prompt", ["1 + 1?", CHAT, [{"role": "system", "content": "Be brief."}, *CHAT]])
    def test_good(self, prompt):
        """Text and messages pass, in a dataset and in a stream."""
        rows = [{"prompt": prompt, "answer": "2"}]
        check_dataset(Dataset.from_list(rows))
        check_dataset(generated(rows))

    def test_empty(self):
        """No rows is an error, in whatever form."""
        for dataset in (Dataset.from_dict({"prompt": []}), Dataset.from_list([]), generated([])):
            with pytest.raises(DataError, match="`train_dataset` is empty"):
                check_dataset(dataset)

    def test_no_prompt(self):
        """The message lists the columns and says what to do."""
        with pytest.raises(DataError, match=r"no `prompt` column \(it has: text, label\).*Rename"):
            check_dataset(Dataset.from_list([{"text": "x", "label": 1}]))
        with pytest.raises(DataError, match=r"It has `problem`.*prepare_prompts"):
            check_dataset(generated([{"problem": "x"}]))

    @pytest.mark.parametrize("column", ["image", "images", "tools"])
    def test_columns_that_come_later(self, column):
        """Images and tools are refused with the way to continue without them."""
        with pytest.raises(DataError, match=rf"column `{column}`.*not supported yet.*remove_columns\('{column}'\)"):
            check_dataset(Dataset.from_list([{"prompt": "x", column: ["y"]}]))

    def test_images_of_any_name(self):
        """A column of images is refused, however it is called."""
        features = Features({"prompt": Value("string"), "figure": Image()})
        for streamed in (False, True):
            rows = Dataset.from_dict({"prompt": ["x"], "figure": [None]}, features)
            with pytest.raises(DataError, match=r"column `figure`.*not supported yet"):
                check_dataset(rows.to_iterable_dataset() if streamed else rows)

    @pytest.mark.parametrize(
        ("prompt", "message"),
        [
            ("", "the prompt is empty"),
            (None, "must be text or a list of messages"),
            ([], "no message"),
            (["x"], "must be text or a list of messages"),
            ([{"content": "x"}], "needs `role` and `content`"),
            ([{"role": "user", "content": None}], "content of a message must be text"),
            ([{"role": "user", "content": [{"type": "image"}]}], "parts of type image"),
            ([{"role": "user", "content": [{"type": "text", "text": None}]}], "a part of a message has no text"),
            ([{"role": "tool", "content": "x"}], "tools are not supported yet"),
            ([{"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]}], "tools are not supported yet"),
            ([*CHAT, {"role": "assistant", "content": "2"}], "nothing is left to answer"),
        ],
    )
    def test_bad_prompts(self, prompt, message):
        """Each prompt that cannot be answered is refused, and the row named."""
        with pytest.raises(DataError, match=message) as error:
            check_dataset(generated([{"prompt": prompt}]), "eval_dataset")
        assert str(error.value).startswith("Row 0 of `eval_dataset`: ")

    def test_every_row_is_looked_at(self):
        """A bad row far down is found in a dataset that can be read through."""
        dataset = Dataset.from_list([{"prompt": "x"}] * 20 + [{"prompt": ""}])
        with pytest.raises(DataError, match="Row 20"):
            check_dataset(dataset)

    @pytest.mark.case("R18")
    @pytest.mark.parametrize("rows", [[{"prompt": "x"}], ({"prompt": "x"},), "rows.jsonl", 3])
    def test_no_dataset(self, rows):
        """A list, a text or anything else that is no dataset is refused, with the call that makes one."""
        with pytest.raises(DataError, match=r"is a \w+; it must be a `datasets.Dataset`.*Dataset.from_list"):
            check_dataset(rows)

    @pytest.mark.case("R18")
    def test_splits(self):
        """All splits together are refused, with the way to pass one."""
        splits = DatasetDict(train=Dataset.from_list([{"prompt": "x"}]), test=Dataset.from_list([{"prompt": "y"}]))
        for several in (splits, dict(splits), IterableDatasetDict(train=generated([{"prompt": "x"}]))):
            with pytest.raises(DataError, match=r"holds several datasets.*`train_dataset=splits\['train'\]`"):
                check_dataset(several)

    def test_text_parts_pass(self):
        """A message whose content is a list of text parts is text."""
        check_dataset(Dataset.from_list([{"prompt": [{"role": "user", "content": [{"type": "text", "text": "x"}]}]}]))


class TestCheckPromptLengths:
    """`check_prompt_lengths`."""

    def check(self, rows, tokenizer, context_length, max_completion_length=4, kwargs=None):
        check_prompt_lengths(
            Dataset.from_list(rows), tokenizer, kwargs, context_length, max_completion_length, "train_dataset"
        )

    def test_boundary(self, tiny_tokenizer):
        """One token must be left for the completion: a prompt of the context's length is refused, one less passes."""
        rows = [{"prompt": "a"}, {"prompt": "What is 12 + 30?"}]
        length = len(tiny_tokenizer("What is 12 + 30?")["input_ids"])
        self.check(rows, tiny_tokenizer, length + 1, 1)
        with pytest.raises(DataError, match=rf"Row 1 .* has {length} tokens.* holds {length}"):
            self.check(rows, tiny_tokenizer, length, 1)

    def test_conversational(self, tiny_tokenizer):
        """A chat counts with its template, the beginning of the answer included."""
        ids = tiny_tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=True)["input_ids"]
        self.check([{"prompt": CHAT}], tiny_tokenizer, len(ids) + 1, 1)
        with pytest.raises(DataError, match=rf"has {len(ids)} tokens"):
            self.check([{"prompt": CHAT}], tiny_tokenizer, len(ids), 1)

    def test_template_arguments(self, tiny_tokenizer):
        """What the trainer passes to the template counts as well."""
        template = tiny_tokenizer.chat_template
        tiny_tokenizer.chat_template = "{{ preface }}" + template
        try:
            self.check([{"prompt": CHAT}], tiny_tokenizer, 60)
            with pytest.raises(DataError, match="Row 0"):
                self.check([{"prompt": CHAT}], tiny_tokenizer, 60, kwargs={"preface": "!" * 60})
        finally:
            tiny_tokenizer.chat_template = template

    def test_completion_does_not_fit(self, tiny_tokenizer):
        """Prompt and completion together beyond the context: a warning that gives the length that fits."""
        rows = [{"prompt": "a" * 10}, {"prompt": "b" * 20}]
        with pytest.warns(UserWarning, match=r"1 of 2 prompts \(the longest has 20 tokens\).* to 80 or less"):
            self.check(rows, tiny_tokenizer, 100, 85)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            self.check(rows, tiny_tokenizer, 100, 80)
            self.check(rows, tiny_tokenizer, 100, None)

    def test_no_chat_template(self, tiny_teacher_tokenizer):
        """A chat needs a template, in a stream too; plain text needs none, nor does an unknown context."""
        template, tiny_teacher_tokenizer.chat_template = tiny_teacher_tokenizer.chat_template, None
        try:
            for dataset in (Dataset.from_list([{"prompt": CHAT}]), generated([{"prompt": CHAT}])):
                with pytest.raises(DataError, match="no chat template"):
                    check_prompt_lengths(dataset, tiny_teacher_tokenizer, {}, None, 4, "eval_dataset")
            self.check([{"prompt": "x"}], tiny_teacher_tokenizer, 100)
        finally:
            tiny_teacher_tokenizer.chat_template = template

    def test_beyond_one_batch(self, tiny_tokenizer):
        """The row is named by its place in the dataset, not in the batch."""
        with pytest.raises(DataError, match="Row 1005"):
            self.check([{"prompt": "a"}] * 1005 + [{"prompt": "a" * 60}], tiny_tokenizer, 50)

    def test_streams_are_not_read_through(self, tiny_tokenizer):
        """A stream may be endless: only its first row is read."""

        def rows():
            yield {"prompt": "a"}
            raise AssertionError("a second row was read")

        dataset = IterableDataset.from_generator(rows)
        check_prompt_lengths(dataset, tiny_tokenizer, None, 50, 4)
        check_dataset(dataset)


def test_errors_are_standard_ones():
    """A caller who knows nothing of this package catches them as ValueError."""
    assert issubclass(DataError, ValueError)
    assert issubclass(DataError, OmniOPDError)
