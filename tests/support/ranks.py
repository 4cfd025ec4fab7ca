# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Two processes in one, for tests of what processes exchange."""

import threading

import torch


class Ranks:
    """Two processes that exchange values, as threads."""

    def __init__(self):
        self.barrier, self.values, self.local = threading.Barrier(2, timeout=30), [None, None], threading.local()

    def exchanged(self, value):
        self.values[self.local.rank] = value
        self.barrier.wait()
        values = list(self.values)
        self.barrier.wait()
        return values

    def gather(self, tensor):
        return torch.cat(self.exchanged(tensor))

    def gather_object(self, values):
        return [value for rank in self.exchanged(values) for value in rank]

    num_processes, device = 2, torch.device("cpu")

    @property
    def process_index(self):
        return self.local.rank
