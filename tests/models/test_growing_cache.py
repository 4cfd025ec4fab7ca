# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""A cache with room for more tokens holds what the cache of transformers holds."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, Qwen3Config
from transformers.cache_utils import DynamicLayer

from omniopd_trl.models.growing_cache import ROOM, GrowingLayer, growing_cache
from omniopd_trl.models.prefix_tree import cache_name


def layers(num_tokens):
    """A layer of each kind, with the same tokens."""
    pair = DynamicLayer(), GrowingLayer()
    append(pair, num_tokens)
    return pair


def append(pair, num_tokens, rows=3):
    new = torch.rand(2, rows, 2, num_tokens, 4)
    results = [layer.update(*new) for layer in pair]
    assert all(torch.equal(*tensors) for tensors in zip(*results, strict=True))


@torch.no_grad()
def test_holds_what_the_other_holds():
    """After a prompt and more tokens than there is room for. Only some tokens copy the others."""
    pair = layers(5)
    places = set()
    for _ in range(2 * ROOM):
        append(pair, 1)
        assert pair[0].get_seq_length() == pair[1].get_seq_length()
        places.add(pair[1].keys.data_ptr())
    assert len(places) == 2
    append(pair, ROOM + 7)


CHANGES = {
    "crop": (lambda layer: layer.crop(-3), 3),
    "choose": (lambda layer: layer.batch_select_indices(torch.tensor([2, 0])), 2),
    "repeat": (lambda layer: layer.batch_repeat_interleave(2), 6),
    "reorder": (lambda layer: layer.reorder_cache(torch.tensor([1, 1, 0])), 3),
    "offload": (lambda layer: layer.offload(), 3),
    "reset": (lambda layer: layer.reset(), 3),
}


@pytest.mark.parametrize("name", CHANGES)
@torch.no_grad()
def test_what_replaces_keys_and_values_is_kept(name):
    """The next tokens follow the changed ones, and a copy from before the change keeps its own."""
    pair = layers(6)
    append(pair, 1)
    before = copy.deepcopy(pair)
    change, rows = CHANGES[name]
    for layer in pair:
        change(layer)
    append(pair, 2, rows)
    append(pair, 1, rows)
    append(before, 1)


def test_with_gradients_nothing_is_overwritten():
    """A backward through three updates has the gradient of the concatenated keys and values."""
    layer, new = GrowingLayer(), torch.rand(3, 1, 2, 1, 4, requires_grad=True)
    total = sum((index + 1) * layer.update(keys, keys)[0].square().sum() for index, keys in enumerate(new))
    total.backward()
    assert torch.allclose(new.grad, 2 * new.detach() * torch.tensor([6.0, 5.0, 3.0]).view(3, 1, 1, 1, 1))


def test_generates_the_same_tokens():
    """Left-padded rows, sampled with one seed. Outside of the context, the cache is that of transformers."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = Qwen3Config(**sizes, head_dim=8, intermediate_size=32, vocab_size=60, eos_token_id=None, pad_token_id=0)
    model = AutoModelForCausalLM.from_config(config).eval()
    ids = torch.randint(3, 60, (4, 9))
    mask = torch.ones_like(ids)
    mask[1, :5] = 0

    def sample():
        torch.manual_seed(1)
        options = {"do_sample": True, "max_new_tokens": ROOM + 9, "return_dict_in_generate": True}
        return model.generate(input_ids=ids, attention_mask=mask, **options)

    with growing_cache():
        found = sample()
    expected = sample()
    caches = found[cache_name(model)], expected[cache_name(model)], DynamicCache(config=config)
    kinds = [type(cache.layers[0]) for cache in caches]
    assert kinds == [GrowingLayer, DynamicLayer, DynamicLayer]
    assert torch.equal(found["sequences"], expected["sequences"])
