# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""The demo in the paper's form with its teacher behind vLLM, against the same run with the teacher in the process."""

import pytest

from benchmarks.demo_over_vllm import band, train
from benchmarks.servers import Server, vllm_serve
from omniopd_trl.demo import asset_path


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The demo's teacher as it ships."""
    log = tmp_path_factory.mktemp("vllm") / "server.log"
    with Server(vllm_serve(asset_path("teacher")), log) as server:
        yield server


# Two training runs of two to four minutes.
@pytest.mark.exhaustive
@pytest.mark.timeout(1800)
def test_the_demo_gains_as_much_over_the_wire(tmp_path, server, capsys):
    """Same student, same seed: pass@1 before is the same, and after 40 steps it differs by no more than noise."""
    local, remote = train(0, tmp_path / "local"), train(0, tmp_path / "vllm", server.url)
    allowed = band([local.after], [remote.after])
    with capsys.disabled():
        print(f"\npass@1 with the teacher here {local}, over the wire {remote}, band {allowed:.3f}")  # noqa: T201, a result
    assert remote.before == local.before
    # The band is a small part of what is gained.
    assert min(local.after, remote.after) - local.before > 2 * allowed
    assert abs(remote.after - local.after) <= allowed
