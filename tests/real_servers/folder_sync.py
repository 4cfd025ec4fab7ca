# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Weights go to a vLLM server through a folder, since TRL's way, NCCL, needs a GPU.

Only the transfer is another one. Which weights are sent, under which names and when, is TRL's; the server is told to
read them by a call of its own.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from trl.generation.vllm_client import VLLMClient


class FolderSync:
    """Replaces the two methods of TRL's client that speak NCCL.

    Args:
        monkeypatch: pytest's, which puts them back.
        folder: where the weights pass through.

    Attributes:
        count: how many times the weights were sent.
        enabled: whether they are. Off, the server keeps what it has, silently.
    """

    def __init__(self, monkeypatch, folder: Path):
        self.folder = folder
        self.count = 0
        self.enabled = True

        def init_communicator(client: VLLMClient, device: torch.device) -> None:
            # What the real one asks of a server before it opens the group.
            assert client.get_server_info()["weight_transfer_config"] is not None
            assert client.get_world_size() == 1

        def update_named_params(
            client: VLLMClient, metadata: list, named_params: Iterator[tuple[str, torch.Tensor]]
        ) -> None:
            self._send(client, metadata, named_params)

        monkeypatch.setattr(VLLMClient, "init_communicator", init_communicator)
        monkeypatch.setattr(VLLMClient, "update_named_params", update_named_params)

    def _send(self, client: VLLMClient, metadata: list, named_params: Iterator[tuple[str, torch.Tensor]]) -> None:
        # As many tensors as were announced, under these names, in this order: NCCL would mix them up otherwise.
        tensors = {}
        for (name, dtype, shape), (sent, tensor) in zip(metadata, named_params, strict=True):
            assert (sent, str(tensor.dtype), list(tensor.shape)) == (name, f"torch.{dtype}", shape)
            tensors[name] = tensor.detach().clone().contiguous()
        if not self.enabled:
            return
        save_file(tensors, self.folder / "model.safetensors", metadata={"format": "pt"})
        order = {"method": "reload_weights", "kwargs": {"weights_path": str(self.folder)}}
        client._post(f"{client.base_url}/collective_rpc", json=order, timeout=120)
        self.count += 1
