# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Rows that begin alike: found, computed once, and continued as `generate` continues whole rows."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    GenerationConfig,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    Qwen3Config,
)

from omniopd_trl.models.prefix_tree import (
    MOST_OWN,
    PrefixTree,
    find_trunks,
    generate_from_tree,
    generating_from_trees,
    why_no_tree,
)

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 60, "head_dim": 8}
SMALL = {**SIZES, "num_key_value_heads": 2, "intermediate_size": 32, "initializer_range": 0.3}
SPECIAL = {"bos_token_id": None, "eos_token_id": 2, "pad_token_id": 0}
MODELS = {
    "llama": LlamaConfig(**SMALL, **SPECIAL),
    "qwen3": Qwen3Config(**SMALL, **SPECIAL),
    "cohere": CohereConfig(**SMALL, **SPECIAL, logit_scale=0.5),  # its logits are scaled after the head
    "gpt2": GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=60, initializer_range=0.3, **SPECIAL),
}


def make(config, attention="sdpa", dtype=torch.float64):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).to(dtype).eval()


def forest():
    """Rows of three trunks, not in order: equal rows, prefixes, one with tokens of its own, and a single token."""
    torch.manual_seed(3)
    long, short, other = (torch.randint(3, 60, (n,)).tolist() for n in (33, 12, 20))
    apart = [*long[:15], 3, 4, 5]
    return [long[:9], short, apart, long, long[:9], other[:1], long[:30], other, short[:11], apart]


def left_padded(rows):
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    return {"input_ids": ids, "attention_mask": torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows])}


def test_trunks():
    """The longest rows, and how many tokens each row takes from one: all but those of its own, of which one is."""
    rows = forest()
    trunks, numbers, shared = find_trunks(rows)
    assert [rows[index] for index in trunks] == [rows[3], rows[7], rows[1]]
    assert numbers == [0, 2, 0, 0, 0, 1, 0, 1, 2, 0]
    assert shared == [8, 11, 15, 32, 8, 0, 29, 19, 10, 15]
    far = [*rows[3][:15], *[4] * (MOST_OWN + 1)]
    assert find_trunks([rows[3], far])[1:] == ([0, 1], [32, len(far) - 1])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_those_of_whole_rows(name, attention):
    """In float64, after each row and after three new tokens. The eager softmax is in float32."""
    model, rows, atol = make(MODELS[name], attention), forest(), {"sdpa": 1e-10, "eager": 1e-5}[attention]
    assert why_no_tree(model) is None
    new = torch.randint(3, 60, (3, len(rows)), generator=torch.Generator().manual_seed(5))
    new[:2, 4], new[:1, 9] = new[:2, 0], new[:1, 2]  # equal rows that part later
    with torch.no_grad():
        tree = PrefixTree(model, rows)
        found = torch.stack([tree.first(), tree.add(new[0]), tree.add(new[1]), tree.add(new[2])], 1)
        for row, ids in enumerate(rows):
            whole = torch.tensor([[*ids, *new[:, row].tolist()]])
            torch.testing.assert_close(found[row], model(whole).logits[0, -4:], rtol=0, atol=atol)


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False},
        {"do_sample": True, "top_k": 0, "temperature": 0.7},
        {"do_sample": True, "top_k": 20, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.2},
    ],
    ids=["greedy", "plain", "filtered"],
)
def test_tokens_equal_those_of_generate(options):
    """For the same seed. Rows that end are padded, and the model's own method is back afterwards."""
    model, inputs = make(MODELS["qwen3"]), left_padded(forest() * 6)
    config = GenerationConfig(max_new_tokens=9, disable_compile=True, eos_token_id=[2, 7], pad_token_id=0, **options)
    torch.manual_seed(1)
    expected = model.generate(**inputs, generation_config=config)
    torch.manual_seed(1)
    with generating_from_trees(model):
        found = model.generate(**inputs, generation_config=config)
    assert torch.equal(found, expected)
    assert "generate" not in vars(model)
    if options["do_sample"]:
        new = found[:, inputs["input_ids"].size(1) :]
        assert ((new == 2) | (new == 7)).any()
        torch.manual_seed(2)
        assert not torch.equal(generate_from_tree(model.generate, **inputs, generation_config=config), expected)


def test_adapters():
    """The wrapper of PEFT, whose adapters count."""
    model = make(MODELS["llama"])
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)).eval()
    model.double()
    inputs = left_padded(forest())
    config = GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    expected = model.generate(**inputs, generation_config=config)
    assert torch.equal(generate_from_tree(model.generate, **inputs, generation_config=config), expected)
    with model.disable_adapter():
        assert not torch.equal(model.generate(**inputs, generation_config=config), expected)


def test_one_forward_pass_for_the_trunks_and_one_per_token(monkeypatch):
    """Each token of a trunk is computed once, however many rows begin with it, and equal rows until they part."""
    model, rows = make(MODELS["qwen3"]), forest() * 10
    sizes = []
    model.register_forward_pre_hook(lambda _, args, kwargs: sizes.append(kwargs["input_ids"].shape), with_kwargs=True)
    config = GenerationConfig(max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0)
    generate_from_tree(model.generate, **left_padded(rows), generation_config=config)
    assert sizes == [(3, 33), (3, 4 * 3), *[(3, 4)] * 4]
    sizes.clear()
    tree = PrefixTree(model, rows[:6] * 2)
    tree.first()
    tree.add(torch.tensor([3, 3, 3, 3, 3, 3, 3, 3, 3, 4, 5, 3]))  # of four rows of the first trunk, two part
    assert sizes[1:] == [(2, 4 * 3), (2, 6)]


def test_models_that_cannot():
    """Other layers, other attention, a forward without masks for each position, or one that ignores them."""
    assert "sliding-window or recurrent" in why_no_tree(make(MistralConfig(**SMALL, sliding_window=8)))
    sizes = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2}
    assert "recurrent" in why_no_tree(make(MambaConfig(**sizes, state_size=4), "eager"))
    model = make(MODELS["llama"])
    original = model.model.forward
    model.model.forward = lambda attention_mask=None, **inputs: original(**inputs)
    assert "differ by" in why_no_tree(model)
    model.config._attn_implementation = "flash_attention_2"
    assert "takes no mask of this form" in why_no_tree(model)
    assert why_no_tree(make(MODELS["llama"], dtype=torch.bfloat16)) is None
