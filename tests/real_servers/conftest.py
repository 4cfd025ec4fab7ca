# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Against real servers, in an environment of their own: `make test-vllm`.

The folder is not called `vllm`: `tests` is on the path of every test, and TRL would take it for an installed vLLM.
"""

import json
import shutil
from pathlib import Path

import pytest

from benchmarks.servers import Server
from omniopd_trl.demo import asset_path
from omniopd_trl.teachers import LocalTeacher

HERE = Path(__file__).resolve().parent


def pytest_ignore_collect(collection_path, config):
    """Only when it is asked for by name: `make test` has neither vLLM nor the minutes."""
    base = config.invocation_params.dir
    asked = [(base / argument.partition("::")[0]).resolve() for argument in config.args]
    return None if any(path.is_relative_to(HERE) for path in asked) else True


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """The end of the server's log stands under a test that failed."""
    report = yield
    if report.failed:
        servers = {value for value in getattr(item, "funcargs", {}).values() if isinstance(value, Server)}
        report.sections += [("the end of the server's log", server.tail()) for server in servers]
    return report


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """No proxy, and no key or address that belongs to the machine."""
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    for name in ("OPENAI_BASE_URL", "OPENAI_API_KEY", "VLLM_API_KEY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def teacher_dir(tmp_path_factory):
    """The demo's teacher, made as hard to serve as real ones are.

    Its tokenizer begins every text with a `bos`, which its template writes too, as Llama's does: a server that is not
    told would begin with two. Its folder holds defaults for sampling, which servers apply to whatever a request leaves
    open. Its context is longer than what it was trained on, so there is room for instructions.
    """
    from tokenizers import processors
    from transformers import AutoTokenizer

    path = tmp_path_factory.mktemp("teacher") / "model"
    shutil.copytree(asset_path("teacher"), path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.bos_token = "<|endoftext|>"
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{tokenizer.bos_token} $A", special_tokens=[(tokenizer.bos_token, tokenizer.bos_token_id)]
    )
    tokenizer.save_pretrained(path)
    defaults = path / "generation_config.json"
    hostile = {"do_sample": True, "temperature": 0.2, "top_p": 0.1, "top_k": 1, "repetition_penalty": 1.5}
    defaults.write_text(json.dumps({**json.loads(defaults.read_text()), **hostile}))
    config = path / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "max_position_embeddings": 2048}))
    return path


@pytest.fixture(scope="session")
def local(teacher_dir):
    """The same weights in this process, in the precision in which the servers run them."""
    return LocalTeacher(str(teacher_dir), model_init_kwargs={"dtype": "float32"})
