# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""A reference that stays on the CPU between uses: lent and taken back, and read nowhere else."""

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from omniopd_trl.models import offloading
from omniopd_trl.models.offloading import Offloaded, layers_of
from tests.support.objective import LORA, check
from tests.support.training import make_trainer


@pytest.fixture
def lent(monkeypatch):
    """Another memory than the CPU's, as far as a machine without one can tell: what was copied, by its address."""
    copies = {}

    def copy(host, device):
        copies[host.data_ptr()] = host.clone()
        return copies[host.data_ptr()]

    monkeypatch.setattr(offloading, "_copy", copy)
    return copies


def test_parameters_are_lent_and_taken_back(lent):
    """Elsewhere inside the block, in the same place with the same values outside, also after an error."""
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    values = {name: value.clone() for name, value in module.state_dict().items()}
    offloaded = Offloaded(module, torch.device("cpu"))
    home = [p.data_ptr() for p in module.parameters()]
    for _ in range(2):
        with pytest.raises(RuntimeError, match="stop"), offloaded.on_device():
            assert [p.data_ptr() for p in module.parameters()] == [lent[address].data_ptr() for address in home]
            raise RuntimeError("stop")
        assert [p.data_ptr() for p in module.parameters()] == home
    for name, value in module.state_dict().items():
        assert torch.equal(value, values[name])


def test_layers_are_lent_one_at_a_time(tiny_model_dir, lent):
    """Whatever computes has its parameters, and no other layer has; embeddings and head, tied, are one throughout."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    layers = layers_of(model)
    assert layers == list(model.model.layers)
    assert len(layers) > 1
    ids = torch.arange(1, 9)[None]
    expected = model(ids).logits
    at_home = []

    def look(module, *_):
        moved = [any(p.data_ptr() in {c.data_ptr() for c in lent.values()} for p in x.parameters()) for x in layers]
        at_home.append([moved.count(True), moved.index(True)])

    offloaded = Offloaded(model, torch.device("cpu"), layers)
    for layer in layers:
        layer.mlp.register_forward_hook(look)
    with offloaded.on_device():
        embeddings = model.get_input_embeddings().weight
        assert model.get_output_embeddings().weight is embeddings
        assert any(embeddings.data_ptr() == c.data_ptr() for c in lent.values())
        with torch.no_grad():
            assert torch.equal(model(ids).logits, expected)
    assert at_home == [[1, index] for index in range(len(layers))]
    assert len(lent) == len(list(model.parameters()))


def test_a_layer_that_fails_gives_its_parameters_back(tiny_model_dir, lent):
    """As after an error of memory."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    offloaded = Offloaded(model, torch.device("cpu"), layers_of(model))
    home = [p.data_ptr() for p in model.parameters()]

    def fail(*_):
        raise RuntimeError("out of memory")

    model.model.layers[1].mlp.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"), offloaded.on_device():
        model(torch.arange(1, 9)[None])
    assert [p.data_ptr() for p in model.parameters()] == home


def test_what_shares_memory_with_a_lent_parameter_stays_valid(lent):
    """The anchor's backward reads the head after the reference has gone back."""
    module = torch.nn.Linear(3, 4)
    with Offloaded(module, torch.device("cpu")).on_device():
        kept = module.weight.detach()
    assert kept.data_ptr() == lent[module.weight.data_ptr()].data_ptr()
    assert kept.data_ptr() != module.weight.data_ptr()
    assert torch.equal(kept, module.weight)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_the_reference_is_read_only_while_it_is_lent(tmp_path, make_tiny_model, tiny_tokenizer, monkeypatch, tied):
    """Its weights are NaN everywhere else, and the gradient is that of the dense reference all the same."""
    path = make_tiny_model(seed=5, tie_word_embeddings=tied)
    trainer = make_trainer(tmp_path, path, ref_model_offload=True)
    true = {}
    for parameter in trainer.ref_model.parameters():
        true[parameter.data_ptr()] = parameter.detach().clone()
        parameter.fill_(float("nan"))
    monkeypatch.setattr(offloading, "_copy", lambda host, device: true[host.data_ptr()].clone())
    check(trainer, path, tiny_tokenizer)
    assert all(p.isnan().all() for p in trainer.ref_model.parameters())


def test_lora_has_nothing_to_offload(tmp_path, tiny_model_dir, tiny_tokenizer):
    """The reference is the student without its adapters."""
    trainer = make_trainer(tmp_path, tiny_model_dir, ref_model_offload=True, peft_config=LoraConfig(**LORA))
    assert trainer.ref_model is None
    check(trainer, tiny_model_dir, tiny_tokenizer)
