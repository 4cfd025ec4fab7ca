# Copyright 2026 The omniopd_trl Authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""A reference that stays on the CPU between uses: lent and taken back, and read nowhere else."""

import pytest
import torch
from peft import LoraConfig
from test_trainer_objective import LORA, check
from trainer_utils import make_trainer
from transformers import AutoModelForCausalLM

from omniopd_trl import offload
from omniopd_trl.offload import Offloaded


@pytest.fixture
def lent(monkeypatch):
    """Another memory than the CPU's, as far as a machine without one can tell; the addresses that were lent."""
    addresses = set()

    def lend(host, device):
        copy = host.clone()
        addresses.add(copy.data_ptr())
        return copy

    monkeypatch.setattr(offload, "_lend", lend)
    return addresses


def test_parameters_are_lent_and_taken_back(lent):
    """Elsewhere inside the block, in the same place with the same values outside, also after an error."""
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    values = {name: value.clone() for name, value in module.state_dict().items()}
    offloaded = Offloaded(module, torch.device("cpu"))
    home = [p.data_ptr() for p in module.parameters()]
    for _ in range(2):
        with pytest.raises(RuntimeError, match="stop"), offloaded.on_device():
            assert {p.data_ptr() for p in module.parameters()} <= lent
            raise RuntimeError("stop")
        assert [p.data_ptr() for p in module.parameters()] == home
    for name, value in module.state_dict().items():
        assert torch.equal(value, values[name])


def test_tied_weights_stay_tied(tiny_model_dir, lent):
    """One parameter under two names is lent once."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    with Offloaded(model, torch.device("cpu")).on_device():
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
        assert model.get_output_embeddings().weight.data_ptr() in lent
        assert len(lent) == len(list(model.parameters()))
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_what_shares_memory_with_a_lent_parameter_stays_valid(lent):
    """The anchor's backward reads the head after the reference has gone back."""
    module = torch.nn.Linear(3, 4)
    with Offloaded(module, torch.device("cpu")).on_device():
        kept = module.weight.detach()
    assert kept.data_ptr() in lent
    assert module.weight.data_ptr() not in lent
    assert torch.equal(kept, module.weight)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_the_reference_is_read_only_while_it_is_lent(tmp_path, make_tiny_model, tiny_tokenizer, monkeypatch, tied):
    """Its weights are NaN everywhere else, and the gradient is that of the dense reference all the same."""
    path = make_tiny_model(seed=5, tie_word_embeddings=tied)
    trainer = make_trainer(tmp_path, path, ref_model_offload=True)
    true = {}
    for host in trainer._offloaded_ref._host:
        true[host.data_ptr()] = host.clone()
        host.fill_(float("nan"))
    monkeypatch.setattr(offload, "_lend", lambda host, device: true[host.data_ptr()].clone())
    assert all(p.isnan().all() for p in trainer.ref_model.parameters())
    check(trainer, path, tiny_tokenizer)


def test_lora_has_nothing_to_offload(tmp_path, tiny_model_dir, tiny_tokenizer):
    """The reference is the student without its adapters."""
    trainer = make_trainer(tmp_path, tiny_model_dir, ref_model_offload=True, peft_config=LoraConfig(**LORA))
    assert trainer.ref_model is None
    check(trainer, tiny_model_dir, tiny_tokenizer)
