# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""What decides the trajectories and rollouts of a step: a run replays only what was recorded under the same.

Two mistakes are possible, and both cost. What is left out lets a run replay rollouts that it would not get now. What
is in it and decides nothing makes a run that is resumed with another value pay for everything again.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

from transformers import PreTrainedModel
from trl.trainer.utils import get_config_model_id

from omniopd_trl.method.similarity import Similarity, name_or_function
from omniopd_trl.method.weights import WeightFunction
from omniopd_trl.teachers import Teacher
from omniopd_trl.trainer.credentials import is_secret_name
from omniopd_trl.trainer.omniopd_config import OmniOPDConfig

# Settings that neither the student's tokens nor the teacher's rollouts depend on, by their first letters: a run may be
# resumed with others and still replays what was paid for.
_IRRELEVANT_TO_AUDITS = (
    *("output_dir", "run_name", "project", "log", "report", "save", "push", "hub", "trackio", "eval", "do_"),
    *("load_best", "metric_for", "greater_is", "num_eval", "audit_eval", "per_device_eval", "batch_eval", "include_"),
    *("disable_tqdm", "num_completions", "dataloader", "ddp_", "resume_from", "restore_callback", "use_cpu"),
    *("teacher_max", "teacher_budget", "teacher_timeout", "teacher_requests", "teacher_tokens", "teacher_base_url"),
    *("teacher_input", "teacher_output", "teacher_cached", "max_failed", "full_determinism", "torch_empty"),
    *("skip_memory", "prediction_loss", "local_rank", "deepspeed", "fsdp", "accelerator", "parallelism"),
    # What wrote a trajectory does not matter: all of them sample from the same student.
    *("use_vllm", "vllm_mode", "vllm_model", "vllm_enable", "vllm_server", "vllm_group", "vllm_gpu", "vllm_max"),
    *("vllm_tensor", "ref_model_offload"),
    # Memory and speed: what a run that ran out of memory is resumed with.
    *("gradient_checkpointing", "activation_checkpointing", "torch_compile", "use_liger", "liger_", "use_cache"),
    *("cache_implementation", "pad_to_multiple", "ds3_gather", "auto_find", "bf16_full_eval", "fp16_full_eval"),
    *("enable_jit", "average_tokens", "debug"),
)
# One step has their product of trajectories, however it is divided.
_BATCH = ("per_device_train_batch_size", "gradient_accumulation_steps")

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")
# What a checkpoint holds besides its weights, under the same endings. A copy of the model alone is the same student.
_NO_WEIGHTS = ("training_args", "optimizer", "scheduler", "rng_state", "scaler")


def replay_key(
    args: OmniOPDConfig,
    train_dataset: Any,
    model: PreTrainedModel,
    teacher: Teacher,
    similarity: Similarity,
    chunk_weights: WeightFunction | None = None,
) -> dict[str, Any]:
    """Everything that decides which trajectories and rollouts a step has, besides the checkpoint, by name.

    Args:
        args: the configuration. Limits, logging, where things are and what only saves memory are left out.
        train_dataset: known by the fingerprint that `datasets` gives it; a stream has none.
        model: the student. A saved one is known by its weight files, wherever they lie; one of the Hub by its commit;
            one that was made in memory only by its size.
        teacher: known by its name, and a local one by its weight files.
        similarity: phi, as `get_similarity` returns it.
        chunk_weights: a custom weight function, which takes the place of `posterior_baseline`.

    Returns:
        Values that JSON can hold, without secrets.
    """
    settings = {k: v for k, v in args.to_dict().items() if not k.startswith(_IRRELEVANT_TO_AUDITS) and k not in _BATCH}
    settings[" x ".join(_BATCH)] = args.per_device_train_batch_size * args.gradient_accumulation_steps
    phi = name_or_function(similarity)
    settings["similarity"] = phi if isinstance(phi, str) else identity_of(phi)
    if chunk_weights is not None:
        settings["posterior_baseline"] = identity_of(chunk_weights)
    settings["train_dataset"] = getattr(train_dataset, "_fingerprint", None)
    source = get_config_model_id(model.config)
    weights = _weights(source)
    # Where a folder lies says nothing about the student in it: the run may have been copied to another machine.
    settings["student"] = source if weights is None else None
    settings["student_weights"] = getattr(model.config, "_commit_hash", None) if weights is None else weights
    settings["student_parameters"] = model.num_parameters()
    settings["student_adapters"] = {
        name: {k: v for k, v in adapter.to_dict().items() if k != "base_model_name_or_path"}
        for name, adapter in (getattr(model, "peft_config", None) or {}).items()
    }
    settings["teacher"] = teacher.name
    settings["teacher_weights"] = _weights(teacher.name)
    return {name: _as_json(value) for name, value in sorted(settings.items())}


def fingerprint(settings: Mapping[str, Any]) -> str:
    """Of what [`replay_key`] returns."""
    return _hash(settings)


def identity_of(function: Any) -> str:
    """What a function or another callable computes, as far as it can be seen: its name, and a hash.

    The hash is of the bytecode with its constants, of defaults, and of what it refers to: functions of its own module,
    and values that cannot change. Of an object, it is of the code of `__call__` and of its plain attributes. Code that
    is imported from elsewhere counts by its name. Comments and docstrings do not count; another version of Python
    compiles to other bytecode.
    """
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}.{named.__qualname__} ({_hash(_described(function, None, set()))[:12]})"


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _as_json(value: Any) -> Any:
    """The same on every run: sets in order, everything that JSON has no form for as text.

    Secrets are left out, those among a model loader's keyword arguments for instance: they let somebody in and change
    no answer, and the journal keeps what is in here.
    """
    if isinstance(value, Mapping):
        return {str(k): _as_json(v) for k, v in value.items() if not is_secret_name(str(k))}
    if isinstance(value, set | frozenset):
        return sorted((_as_json(v) for v in value), key=json.dumps)
    if isinstance(value, list | tuple):
        return [_as_json(v) for v in value]
    is_json = (
        value is None or isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value))
    )
    return value if is_json else str(value)


# ---- Weights ----


def _weights(source: str) -> str | None:
    """A hash of the weight files of a folder; `None` where there are none.

    Of each file, its name, its size and samples from all over it, so that it takes no time: whatever trains a model
    changes most of its numbers. Dates do not count, since copying a folder changes them.
    """
    folder = Path(source)
    if not source or not folder.is_dir():
        return None
    files = [f for f in sorted(folder.iterdir()) if f.suffix in _WEIGHTS and not f.name.startswith(_NO_WEIGHTS)]
    return _hash([[f.name, f.stat().st_size, _sampled(f)] for f in files])[:16] if files else None


def _sampled(path: Path) -> str:
    """A hash of the last MiB, and of 256 blocks of 4 KiB in equal distances."""
    size, end, block = path.stat().st_size, 2**20, 2**12
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for place in range(0, max(size - end, 0), max((size - end) // 256, block)):
            file.seek(place)
            digest.update(file.read(block))
        file.seek(max(size - end, 0))
        digest.update(file.read(end))
    return digest.hexdigest()


# ---- Functions ----

_PLAIN = (type(None), bool, int, float, complex, str, bytes, type(...))


def _described(value: Any, module: str | None, seen: set[int]) -> Any:
    """A value as JSON that is the same on every run; of what may change while a run goes on, its type.

    Args:
        value: anything.
        module: whose functions are looked into; those of others count by name. `None` looks into any.
        seen: functions that are described already, which may call each other.
    """
    if isinstance(value, _PLAIN):
        return repr(value)
    if isinstance(value, tuple):
        return [_described(v, module, seen) for v in value]
    if isinstance(value, frozenset):  # a constant of `x in {"a", "b"}`, whose order is another one in each process
        return sorted((_described(v, module, seen) for v in value), key=json.dumps)
    if isinstance(value, CodeType):
        return _code(value, module, seen)
    if isinstance(value, partial):
        keywords = {k: _described(v, module, seen) for k, v in value.keywords.items()}
        return ["partial", *(_described(v, module, seen) for v in (value.func, value.args)), keywords]
    if isinstance(value, MethodType):
        return [_described(value.__func__, module, seen), _described(value.__self__, module, seen)]
    if isinstance(value, FunctionType):
        return _function(value, module, seen)
    if isinstance(value, ModuleType):
        return value.__name__
    if isinstance(value, BuiltinFunctionType | type):
        return [value.__module__, value.__qualname__]
    kind = type(value)
    call = getattr(kind, "__call__", None)  # noqa: B004 (its code is looked at)
    if id(value) in seen or not isinstance(call, FunctionType):
        return [kind.__module__, kind.__qualname__]
    seen.add(id(value))
    attributes = {k: _described(v, kind.__module__, seen) for k, v in sorted(getattr(value, "__dict__", {}).items())}
    return [kind.__module__, kind.__qualname__, attributes, _described(call, kind.__module__, seen)]


def _function(function: FunctionType, module: str | None, seen: set[int]) -> Any:
    name = [function.__module__, function.__qualname__]
    if id(function) in seen or function.__module__ != (module or function.__module__):
        return name
    seen.add(id(function))
    code = function.__code__
    used = {n: function.__globals__[n] for n in sorted(set(_names(code))) if n in function.__globals__}
    referred = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).items(), *_cells(function)]
    # What a decorator wraps is in a cell, whatever module the decorator comes from.
    return [
        *name,
        _code(code, module, seen, function.__doc__),
        [_described(v, None, seen) for v in referred],
        {n: _described(v, function.__module__, seen) for n, v in used.items()},
    ]


def _code(code: CodeType, module: str | None, seen: set[int], doc: str | None = None) -> Any:
    constants = [c for i, c in enumerate(code.co_consts) if i or doc is None or c != doc]
    return [code.co_code.hex(), code.co_names, [_described(c, module, seen) for c in constants]]


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _cells(function: FunctionType) -> Iterable[Any]:
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # not filled yet
            yield None
