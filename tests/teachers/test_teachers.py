# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""The local teacher against plain generation, and the scripted one."""

import asyncio
import copy
import math
from collections import Counter
from itertools import takewhile
from unittest.mock import Mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    Gemma2Config,
    Gemma2ForCausalLM,
    OpenAIGPTConfig,
    OpenAIGPTLMHeadModel,
    RwkvConfig,
    RwkvForCausalLM,
    T5Config,
)

from omniopd_trl.errors import DataError, OmniOPDError
from omniopd_trl.models.prefix_tree import MOST_OWN, cache_name, prefill
from omniopd_trl.teachers import (
    LocalTeacher,
    Prefix,
    SamplingRequest,
    ScriptedTeacher,
    Teacher,
    TeacherReply,
    Usage,
    load_teacher,
    local,
)
from omniopd_trl.teachers.base import common_prefix_length

QUESTION = [{"role": "user", "content": "How many marbles are in the bag?"}]
SOLUTION = "We count the marbles: five and six are eleven. Ünïcödé 漢字 too, so x = 5 + 6."
# Nested, with one that ends inside a word and one that is empty; the last is another question.
PREFIXES = [Prefix(QUESTION, SOLUTION[:n]) for n in (0, 2, 9, 30, 52, len(SOLUTION))]


@pytest.fixture(scope="module")
def teacher(tiny_teacher_dir) -> LocalTeacher:
    """A teacher whose checkpoint brings sampling defaults that must not leak."""
    model = AutoModelForCausalLM.from_pretrained(tiny_teacher_dir, dtype=torch.float32)
    model.generation_config.update(do_sample=True, top_k=1, top_p=0.1, temperature=0.01, repetition_penalty=3.0)
    return LocalTeacher(model, AutoTokenizer.from_pretrained(tiny_teacher_dir))


def sample(teacher: Teacher, prefixes: list[Prefix], **request) -> list[TeacherReply]:
    """One call, waited for."""
    settings = {"num_samples": 1, "max_tokens": 12, **request}
    return asyncio.run(teacher.sample(prefixes, SamplingRequest(**settings)))


@pytest.fixture(params=[0, 10**6], ids=["copied trunks", "trees"])
def in_tree(request, teacher, monkeypatch):
    """Whether the rollouts of a trajectory are written in one row, which has many more columns than its trunk here."""
    monkeypatch.setattr(local, "MOST_IN_A_TREE", request.param)
    return bool(request.param)


def plain_logits(model: torch.nn.Module, token_ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([token_ids])).logits[0]


def greedy(teacher: LocalTeacher, prefix: Prefix, max_tokens: int) -> str:
    """Plain greedy decoding, a whole forward pass for each token."""
    token_ids, new_ids = teacher.encode(prefix), []
    while len(new_ids) < max_tokens:
        new_ids.append(int(plain_logits(teacher.model, token_ids + new_ids)[-1].argmax()))
        if new_ids[-1] in teacher.eos_token_ids:
            break
    return teacher.tokenizer.decode(new_ids, skip_special_tokens=True)


def test_greedy_decoding_equals_plain_generation(teacher, in_tree):
    """Token for token, for every prefix of two trajectories that share batches. Equal rollouts are computed once."""
    others = [Prefix("Let x be the number", text) for text in ("", " of marbles", " of marbles in the bag; then")]

    async def both(num_samples):
        request = SamplingRequest(num_samples, max_tokens=12, temperature=0)
        return await asyncio.gather(teacher.sample(PREFIXES, request), teacher.sample(others, request))

    one, three = (asyncio.run(both(num_samples)) for num_samples in (1, 3))
    for prefixes, replies in zip((PREFIXES, others), three, strict=True):
        for prefix, reply in zip(prefixes, replies, strict=True):
            assert [r.text for r in reply.rollouts] == [greedy(teacher, prefix, 12)] * 3
    assert [[reply.usage for reply in row] for row in three] == [[reply.usage for reply in row] for row in one]


TEXT = {
    **dict.fromkeys(("hidden_size", "intermediate_size"), 32),
    **dict.fromkeys(("num_hidden_layers", "num_key_value_heads"), 2),
    **{"vocab_size": 330, "num_attention_heads": 4, "head_dim": 8, "initializer_range": 0.3, "eos_token_id": 5},
}
VISION = {
    **dict.fromkeys(("hidden_size", "intermediate_size", "out_hidden_size", "projection_dim"), 32),
    **{"depth": 1, "num_hidden_layers": 2, "patch_size": 4, "image_size": 16, "deepstack_visual_indexes": [0]},
    **dict.fromkeys(("num_heads", "num_attention_heads"), 2),
}
ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1], "mrope_interleaved": True}
MULTIMODAL = {
    "qwen3_vl": {"text_config": {**TEXT, "rope_parameters": ROPE}, "image_token_id": 6, "video_token_id": 7},
    "mistral3": {"text_config": {**TEXT, "model_type": "mistral"}, "image_token_index": 6},
    "llava": {"text_config": {**TEXT, "model_type": "llama"}, "image_token_index": 6},
    "gemma3": {"text_config": {**TEXT, "sliding_window": 16}, "image_token_index": 6},
}


@pytest.mark.case("R15")
@pytest.mark.parametrize("kind", MULTIMODAL)
def test_a_vision_language_model_by_its_path(tmp_path, tiny_teacher_tokenizer, kind):
    """Loaded by its architecture, in its own precision; it continues text like a plain model of that class."""
    torch.manual_seed(0)
    vision = CONFIG_MAPPING[kind]().vision_config
    sizes = {name: size for name, size in VISION.items() if hasattr(vision, name)}
    config = CONFIG_MAPPING[kind](**MULTIMODAL[kind], vision_config=sizes)
    AutoModelForImageTextToText.from_config(config).save_pretrained(tmp_path)
    tiny_teacher_tokenizer.save_pretrained(tmp_path)
    teacher = load_teacher(str(tmp_path))
    assert type(teacher.model).__name__ == config.architectures[0]
    prefixes = PREFIXES[1::2]
    for prefix, reply in zip(prefixes, sample(teacher, prefixes, temperature=0), strict=True):
        assert [rollout.text for rollout in reply.rollouts] == [greedy(teacher, prefix, 12)]


@pytest.mark.case("R15")
def test_a_model_that_does_not_continue_text_is_refused(tmp_path, tiny_teacher_tokenizer):
    T5Config(**{"d_model": 8, "d_ff": 8, "num_layers": 1, "num_heads": 1, "vocab_size": 330}).save_pretrained(tmp_path)
    with pytest.raises(DataError, match=r"T5Config.*continues text"):
        load_teacher(str(tmp_path))


def test_teacher_forced_logprobs_equal_plain_forward(teacher):
    """What follows a prefix has the same log-probabilities through the shared cache as through the whole prefix."""
    token_ids = [teacher.encode(prefix) for prefix in PREFIXES]
    job = teacher._job(token_ids)
    trunks = prefill(teacher.model, [job.trunk, teacher.encode(Prefix("another trajectory"))])
    continuation = teacher.tokenizer(" therefore eleven", add_special_tokens=False)["input_ids"]
    rows = [(0, ids, shared) for ids, shared in zip(token_ids, job.shared, strict=True)]
    input_ids, attention_mask, cache = teacher.rows_from_trunks(rows, trunks)
    assert cache.get_seq_length() == input_ids.size(1) - max(
        len(ids) - shared for ids, shared in zip(token_ids, job.shared, strict=True)
    ), "the trunk is not reused"
    forced = torch.tensor([continuation] * len(rows))
    mask = torch.cat([attention_mask, torch.ones_like(forced)], dim=1)
    start = cache.get_seq_length()
    with torch.no_grad():
        logits = teacher.model(
            torch.cat([input_ids, forced], dim=1)[:, start:],
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0)[:, start:],
            **{cache_name(teacher.model): cache},
        ).logits
    n = len(continuation)
    for row, ids in enumerate(token_ids):
        expected = plain_logits(teacher.model, ids + continuation)[-n - 1 :].log_softmax(-1)
        torch.testing.assert_close(logits[row, -n - 1 :].log_softmax(-1), expected, rtol=0, atol=1e-4)


def test_samples_follow_the_distribution_of_plain_generation(teacher):
    """First and second tokens of 4,000 rollouts: chi-square against the exact distribution."""
    prefix, draws = PREFIXES[3], 4000
    [_, reply] = sample(teacher, [PREFIXES[-1], prefix], num_samples=draws, max_tokens=1, seed=0)
    seen = Counter(rollout.text if rollout.finish_reason == "length" else "<end>" for rollout in reply.rollouts)
    probabilities = plain_logits(teacher.model, teacher.encode(prefix))[-1].softmax(-1)
    expected: Counter[str] = Counter()
    for token, probability in enumerate(probabilities.tolist()):
        text = teacher.tokenizer.decode([token], skip_special_tokens=True)
        expected["<end>" if token in teacher.eos_token_ids else text] += probability * draws
    cells = [text for text in expected if expected[text] >= 20]
    assert len(cells) >= 10
    statistic = sum((seen[text] - expected[text]) ** 2 / expected[text] for text in cells)
    # A chi-square of k degrees of freedom has mean k and variance 2k.
    assert statistic < len(cells) + 5 * math.sqrt(2 * len(cells)), (statistic, len(cells))


def test_rollouts_in_one_row_take_fewer_tokens(teacher, in_tree, monkeypatch):
    """Two trajectories with 16 rollouts each fit in a batch, where copies of their trunks do not. They are equal."""
    width, sizes = len(teacher.encode(PREFIXES[-1])), []
    monkeypatch.setattr(teacher, "max_batch_tokens", 2 * (width + 16 * 3))
    assert teacher._continues_trees
    hook = teacher.model.get_input_embeddings().register_forward_pre_hook(lambda _, args: sizes.append(args[0].shape))
    request = SamplingRequest(num_samples=8, max_tokens=3, temperature=0)
    first, second = teacher.sample_trajectories([PREFIXES[-2:]] * 2, request)
    hook.remove()
    assert first == second
    if in_tree:
        own = sizes[1][1] // 2  # tokens of the shorter prefix that are not those of the trunk
        assert own <= MOST_OWN
        assert sizes == [(1, width), (1, 2 * own), (1, 2), (1, 2)]  # the 32 rollouts are two texts
    else:
        assert len(sizes) > 4 * 4


def test_temperature_and_top_p_of_the_request_are_used(teacher):
    """Nearly greedy at a low temperature or a small nucleus, varied at temperature 1."""
    expected = greedy(teacher, PREFIXES[2], 6)
    for sharp in ({"temperature": 1e-4}, {"top_p": 1e-6}):
        [reply] = sample(teacher, [PREFIXES[2]], num_samples=8, max_tokens=6, **sharp)
        assert {r.text for r in reply.rollouts} == {expected}
    [reply] = sample(teacher, [PREFIXES[2]], num_samples=8, max_tokens=6)
    assert len({r.text for r in reply.rollouts}) > 4


@pytest.mark.parametrize("max_batch_tokens", [1, 300, 10**9])
def test_batch_budget_changes_no_result(teacher, in_tree, monkeypatch, max_batch_tokens):
    """Whether rows are run one by one or all at once: the same greedy rollouts, all of them, in order."""
    monkeypatch.setattr(teacher, "max_batch_tokens", max_batch_tokens)
    replies = sample(teacher, PREFIXES, num_samples=5, temperature=0)
    for prefix, reply in zip(PREFIXES, replies, strict=True):
        assert [r.text for r in reply.rollouts] == [greedy(teacher, prefix, 12)] * 5
        assert reply.usage.prompt_tokens == len(teacher.encode(prefix))


def test_concurrent_trajectories_share_batches(teacher, monkeypatch):
    """Trajectories that arrive together are generated together."""
    calls = []
    generate = teacher.model.generate
    monkeypatch.setattr(teacher.model, "generate", lambda **kw: calls.append(kw["input_ids"].shape) or generate(**kw))

    async def many():
        request = SamplingRequest(num_samples=2, max_tokens=4)
        return await asyncio.gather(*(teacher.sample(PREFIXES[i : i + 2], request) for i in range(4)))

    replies = asyncio.run(many())
    assert [len(r) for r in replies] == [2] * 4
    assert [shape[0] for shape in calls] == [16]


def test_a_failure_reaches_every_waiting_trajectory(teacher, monkeypatch):
    """No caller waits forever for a batch that failed in another one's turn."""

    def fail(**kwargs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(teacher.model, "generate", fail)

    async def many():
        request = SamplingRequest(num_samples=2, max_tokens=4)
        calls = (teacher.sample(PREFIXES[:2], request) for _ in range(3))
        return await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), timeout=30)

    assert [str(error) for error in asyncio.run(many())] == ["out of memory"] * 3


def test_a_seed_makes_sampling_repeatable_and_leaves_the_global_stream_alone(teacher, in_tree):
    """The student's own sampling does not depend on how much the teacher sampled."""
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    first = sample(teacher, PREFIXES, num_samples=4, seed=7)
    torch.testing.assert_close(torch.rand(3), expected, rtol=0, atol=0)
    assert first == sample(teacher, PREFIXES, num_samples=4, seed=7)
    assert first != sample(teacher, PREFIXES, num_samples=4, seed=8)


def test_usage_counts_the_trunk_once(teacher):
    """What is served from the cache is told apart from what was computed."""
    replies = sample(teacher, PREFIXES, num_samples=3, temperature=0)
    lengths = [len(teacher.encode(prefix)) for prefix in PREFIXES]
    assert [reply.usage.prompt_tokens for reply in replies] == lengths
    computed = sum(reply.usage.prompt_tokens - reply.usage.cached_tokens for reply in replies)
    assert max(lengths) < computed < max(lengths) + 5 * len(PREFIXES)


def test_a_prefix_beyond_the_context_has_no_rollouts(teacher):
    """An outcome with a reason: the chunk is dropped and the others are answered."""
    long = Prefix(QUESTION, "marbles and " * 200)
    short, refused = sample(teacher, [PREFIXES[1], long])
    assert len(short.rollouts) == 1
    assert short.failure is None
    assert refused.rollouts == ()
    assert "context of 256" in refused.failure


def test_the_students_text_follows_the_teachers_own_template(teacher):
    """Byte for byte, behind the teacher's template and not the student's."""
    rendered = teacher.tokenizer.decode(teacher.encode(PREFIXES[-1]))
    assert rendered == f"<s>[USER] {QUESTION[0]['content']} [END][ASSISTANT] {SOLUTION}"
    plain = teacher.tokenizer.decode(teacher.encode(Prefix("1 + 1 =", " 2 \n ")), skip_special_tokens=True)
    assert plain == "1 + 1 = 2 \n "


def test_sliding_window_models_are_prefilled_per_prefix(teacher):
    """Layers whose state cannot be cut back fall back to plain generation, with the same result."""
    config = Gemma2Config(
        vocab_size=len(teacher.tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=8,
        max_position_embeddings=256,
        eos_token_id=teacher.tokenizer.eos_token_id,
        initializer_range=0.3,
    )
    torch.manual_seed(0)
    sliding = LocalTeacher(Gemma2ForCausalLM(config).float(), teacher.tokenizer)
    assert not sliding._reuses_cache
    replies = sample(sliding, PREFIXES, temperature=0)
    for prefix, reply in zip(PREFIXES, replies, strict=True):
        assert reply.rollouts[0].text == greedy(sliding, prefix, 12)
        assert reply.usage.cached_tokens == 0


def test_a_model_that_reads_padding_is_refused(tiny_teacher_tokenizer):
    """It would continue other texts than those of the shorter prefixes of a batch."""
    config = RwkvConfig(vocab_size=330, hidden_size=32, num_hidden_layers=2, attention_hidden_size=32)
    with pytest.raises(DataError, match="cannot continue texts of different lengths in one batch"):
        LocalTeacher(RwkvForCausalLM(config), tiny_teacher_tokenizer)


def test_a_model_without_a_cache(teacher):
    """GPT-1 keeps nothing of a prefix: it is computed again."""
    config = OpenAIGPTConfig(vocab_size=330, n_positions=256, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3)
    plain = LocalTeacher(OpenAIGPTLMHeadModel(config), teacher.tokenizer)
    replies = sample(plain, PREFIXES, temperature=0)
    for prefix, reply in zip(PREFIXES, replies, strict=True):
        assert reply.rollouts[0].text == greedy(plain, prefix, 12)


def test_conversations_need_a_chat_template(tiny_teacher_dir):
    """Said before anything is generated."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_teacher_dir)
    tokenizer.chat_template = None
    teacher = LocalTeacher(str(tiny_teacher_dir), tokenizer)
    teacher.probe("plain text")
    with pytest.raises(DataError, match="no chat template"):
        teacher.probe(QUESTION)


def test_a_path_that_does_not_exist_is_refused(tmp_path):
    """By an error that names the path and is also a ValueError."""
    with pytest.raises(DataError, match=r"nowhere.*cannot be loaded.*Check the path"):
        load_teacher(str(tmp_path / "nowhere"))
    assert issubclass(DataError, ValueError)
    assert issubclass(DataError, OmniOPDError)


def test_a_package_that_is_missing_for_a_teacher(tiny_teacher_dir, monkeypatch):
    """The reason of `transformers` is quoted, and the folder is not suspected."""
    missing = Mock(side_effect=ImportError("FlashAttention2 cannot be used: it doesn't seem to be installed."))
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", missing)
    with pytest.raises(DataError, match=r"The teacher .* cannot be loaded: FlashAttention2 .* installed\.$"):
        LocalTeacher(str(tiny_teacher_dir))


def test_scripted_teacher_is_deterministic():
    """The same on every machine, which a constant shows; other texts for other prefixes and samples."""
    replies = sample(ScriptedTeacher(), PREFIXES, num_samples=2)
    assert replies == sample(load_teacher("scripted"), PREFIXES, num_samples=2)
    texts = [rollout.text for reply in replies for rollout in reply.rollouts]
    assert len(set(texts)) == len(texts)
    assert texts[0].startswith("marbles many in are How in many bag"), texts[0]


def test_scripted_teacher_follows_texts_and_functions():
    """Texts in turn; a function of prefix and index, whose `None` is a refusal."""
    [reply] = sample(ScriptedTeacher(["a b", "c"]), [PREFIXES[0]], num_samples=3)
    assert [r.text for r in reply.rollouts] == ["a b", "c", "a b"]
    assert reply.usage == Usage(prompt_tokens=7, completion_tokens=5)
    [reply] = sample(ScriptedTeacher(lambda p, i: None if i else p.completion), [PREFIXES[1]], num_samples=3)
    assert [r.text for r in reply.rollouts] == ["We"]
    assert "refused 2 of 3" in reply.failure
    with pytest.raises(ValueError, match="empty"):
        ScriptedTeacher([])


@given(st.text("ab", max_size=9), st.text("ab", max_size=9))
def test_common_prefixes(first, second):
    """Of texts and of lists: as many as are equal one by one."""
    expected = len([*takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False))])
    assert common_prefix_length(first, second) == common_prefix_length([*first], [*second]) == expected


@pytest.mark.parametrize("keeps_all", [False, True])
def test_logprobs_are_those_of_each_token_in_float64(teacher, monkeypatch, keeps_all):
    """Against one forward per token in float64, for texts of different lengths, in batches of any size.

    Some models take no `logits_to_keep`, and return all logits.
    """
    prefixes = [Prefix(QUESTION, text) for text in ("", "Tom has", "Tom has 3 apples. So", "Tom")]
    texts = [" 3 apples and buys 9 more.", "", "x", " So the answer is 12"]
    model = copy.deepcopy(teacher.model).double()
    expected = []
    for prefix, text in zip(prefixes, texts, strict=True):
        ids, values = teacher.encode(prefix), []
        for token in teacher.tokenizer(text, add_special_tokens=False)["input_ids"]:
            logits = model(torch.tensor([ids])).logits[0, -1]
            values.append((logits / 0.7).log_softmax(-1)[token].item())
            ids = [*ids, token]
        expected.append(values)
    if keeps_all:
        forward = teacher.model.forward
        monkeypatch.setattr(teacher.model, "forward", lambda logits_to_keep, **kwargs: forward(**kwargs))
    for size in (1, 100, 10_000):
        monkeypatch.setattr(teacher, "max_batch_tokens", size)
        found = teacher.logprobs(prefixes, texts, temperature=0.7)
        for row, values in zip(found, expected, strict=True):
            torch.testing.assert_close(row.double(), torch.tensor(values, dtype=torch.double), atol=1e-4, rtol=0)
