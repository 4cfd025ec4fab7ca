# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""The teacher whose words are random: what similarities see of it, and which changes of its words they cannot see."""

import re
from dataclasses import replace

import pytest
import torch
from transformers import AutoTokenizer

from benchmarks.wording import compare, cut, places, sample
from omniopd_trl import OmniOPDConfig, OmniOPDTrainer
from omniopd_trl.data import load_dataset_or_files, prepare_prompts
from omniopd_trl.demo import asset_path
from omniopd_trl.method import similarity_matrix
from omniopd_trl.teachers import Teacher
from omniopd_trl.teachers.local import LocalTeacher

# Words that the teacher writes and the student does not, and others that are cut alike: they have as many tokens of
# the student, and the first token is a bare space or not, as before.
OTHER_WORDS = {
    **{"hence": "qqqq", "Thus": "qqq", "which": "mqqq", "means": "mqqx", "pieces": "mqqqq", "there": "mqq"},
    **{"are": "mqx", "we": "mq", "owns": "qqx", "hand": "mqz", "all": "mqv", "they": "mx", "hold": "qqqx"},
    **{"find": "mz", "this": "mv", "brings": "mqqz", "comes": "mj"},
}


@pytest.fixture(scope="module")
def where():
    return places(32)


@pytest.fixture(scope="module")
def rollouts(where):
    return sample("teacher_varied", where, count=4)


@pytest.fixture(scope="module")
def renamed():
    """Replaces each of `OTHER_WORDS` in a text."""
    tokenizer = AutoTokenizer.from_pretrained(asset_path("student"))
    for pair in OTHER_WORDS.items():
        one, other = (tokenizer.tokenize(f" {word}") for word in pair)
        assert (len(one), one[0] == "Ġ") == (len(other), other[0] == "Ġ"), pair
    words = re.compile(rf"(?<= )({'|'.join(OTHER_WORDS)})\b")
    return lambda text: words.sub(lambda match: OTHER_WORDS[match[0]], text)


def test_rollouts_differ_and_only_a_similarity_of_parts_sees_the_result(where, rollouts):
    found = {name: compare(where, cut(where, rollouts), name) for name in ("exact", "edit", "rouge1")}
    assert max(found["exact"][name] for name in ("rollouts", "right", "wrong")) < 0.1
    assert abs(found["exact"]["ranked"] - 0.5) < 0.05
    for name in ("edit", "rouge1"):
        assert found[name]["rollouts"] < 0.8
        assert found[name]["ranked"] > 0.8
    fixed = compare(where, cut(where, sample("teacher", where, count=2)), "exact")
    assert fixed["rollouts"] > 0.8
    assert fixed["right"] > 0.8 > 0.2 > fixed["wrong"]


@pytest.mark.parametrize(
    ("name", "sees_it"),
    [(name, False) for name in ("rouge1", "rougeL", "jaccard", "bleu1", "bleu2", "exact")] + [("edit", True)],
)
def test_a_similarity_of_words_does_not_see_which_other_words_the_teacher_writes(
    where, rollouts, renamed, name, sees_it
):
    """The premise of Theorem 4.4: words that the chunk does not have are replaced by others."""
    other = [[replace(rollout, text=renamed(rollout.text)) for rollout in given] for given in rollouts]
    assert all(list(a) != b for a, b in zip(rollouts, other, strict=True))
    chunks = [place.right for place in where]
    before, after = (similarity_matrix(chunks, cut(where, given), name) for given in (rollouts, other))
    assert (before != after) is sees_it


class Renamed(Teacher):
    """Another teacher, in other words."""

    name = "renamed"
    is_remote = False

    def __init__(self, inner, rename):
        self.inner, self.rename = inner, rename

    async def sample(self, prefixes, request):
        replies = await self.inner.sample(prefixes, request)
        return [
            replace(reply, rollouts=tuple(replace(each, text=self.rename(each.text)) for each in reply.rollouts))
            for reply in replies
        ]


def test_a_step_is_the_same_with_a_teacher_in_other_words(renamed, tmp_path):
    """The conclusion of Theorem 4.4: the same update, bit by bit."""
    problems = prepare_prompts(load_dataset_or_files(str(asset_path("problems"))))["train"].select(range(4))
    weights = []
    for rename in (lambda text: text, renamed):
        args = OmniOPDConfig(
            output_dir=str(tmp_path / f"{len(weights)}"),
            max_steps=1,
            learning_rate=1e-3,
            per_device_train_batch_size=4,
            max_completion_length=48,
            num_chunks=2,
            chunk_length=10,
            num_rollouts=2,
            similarity="rouge1",
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            bf16=False,
        )
        teacher = Renamed(LocalTeacher(str(asset_path("teacher_varied"))), rename)
        trainer = OmniOPDTrainer(
            model=str(asset_path("student")), teacher_model=teacher, args=args, train_dataset=problems
        )
        trainer.train()
        weights.append(torch.cat([parameter.detach().reshape(-1) for parameter in trainer.model.parameters()]))
    assert torch.equal(*weights)
