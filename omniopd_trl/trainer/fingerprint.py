# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""The settings that determine the trajectories and rollouts of a step. A run replays only records with the same key.

Two mistakes are possible, and both are expensive. If a setting that matters is missing, a run replays rollouts that it
would not get now. If a setting that does not matter is included, a run that is resumed with another value pays for
everything again.
"""

import hashlib
import inspect
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

from transformers import PreTrainedModel
from trl.trainer.utils import get_config_model_id

from omniopd_trl.evals.rewards import RewardModel
from omniopd_trl.method.similarity import Similarity, name_or_function
from omniopd_trl.method.weights import WeightFunction
from omniopd_trl.models.weights import hash_of_folder
from omniopd_trl.teachers import ScriptedTeacher, Teacher
from omniopd_trl.teachers.base import address_of
from omniopd_trl.trainer.credentials import is_secret_name
from omniopd_trl.trainer.omniopd_config import OmniOPDConfig

# Prefixes of settings that affect neither the student's tokens nor the teacher's rollouts. A run that is resumed with
# other values still replays the journal.
_IRRELEVANT_TO_AUDITS = (
    *("output_dir", "run_name", "project", "log", "report", "save", "push", "hub", "trackio", "eval", "do_"),
    *("load_best", "metric_for", "greater_is", "num_eval", "audit_eval", "per_device_eval", "batch_eval", "include_"),
    *("disable_tqdm", "num_completions", "dataloader", "ddp_", "resume_from", "restore_callback", "use_cpu"),
    *("teacher_max", "teacher_budget", "teacher_timeout", "teacher_requests", "teacher_tokens", "teacher_base_url"),
    *("teacher_input", "teacher_output", "teacher_cached", "max_failed", "full_determinism", "torch_empty"),
    *("skip_memory", "prediction_loss", "local_rank", "deepspeed", "fsdp", "accelerator", "parallelism"),
    # The generation engine does not matter: all engines sample from the same student.
    *("use_vllm", "vllm_mode", "vllm_model", "vllm_enable", "vllm_server", "vllm_group", "vllm_gpu", "vllm_max"),
    *("vllm_tensor", "ref_model_offload"),
    # Memory and speed. A run that ran out of memory is resumed with other values of these.
    *("gradient_checkpointing", "activation_checkpointing", "torch_compile", "use_liger", "liger_", "use_cache"),
    *("cache_implementation", "pad_to_multiple", "ds3_gather", "auto_find", "bf16_full_eval", "fp16_full_eval"),
    *("enable_jit", "average_tokens", "debug"),
)
# Settings that did not exist when earlier records were written. Their defaults are what these runs did, and are left
# out: otherwise no record of an earlier version would be replayed.
SINCE_EARLIER_RECORDS = (
    *("min_anchor_entropy", "num_branches", "fork_candidates", "scale_advantages"),
    *("teacher_context_column", "teacher_context_template"),
    *("signal", "cascade_low", "cascade_high", "first_rollouts"),
    *("rollout_imitation", "rollout_imitation_tokens"),
    *("num_generations", "reward_weight", "reward_weights", "audit_trajectories"),
)
# The number of trajectories of a step is the product of these, however it is divided.
_BATCH = ("per_device_train_batch_size", "gradient_accumulation_steps")


def replay_key(
    args: OmniOPDConfig,
    train_dataset: Any,
    model: PreTrainedModel,
    teacher: Teacher,
    similarity: Similarity,
    chunk_weights: WeightFunction | None = None,
    reward_funcs: Sequence[Any] = (),
) -> dict[str, Any]:
    """Everything besides the checkpoint that determines the trajectories and rollouts of a step, by name.

    Args:
        args: the configuration. Limits, logging, paths and options that only save memory are left out.
        train_dataset: the training set, identified by its `datasets` fingerprint. A stream has none.
        model: the student. A saved model is identified by its weight files, wherever they are; a model on the Hub by
            its commit; a model that was created in memory by its size only.
        teacher: the teacher, identified by its name; by its address if it is a service; by its weight files if it is
            local; by its code and configuration if its class is a custom one.
        similarity: the similarity function phi, as `get_similarity` returns it.
        chunk_weights: custom weight function; replaces `posterior_baseline`.
        reward_funcs: functions that score the trajectories, and reward models; empty without a verifier.

    Returns:
        Values that can be written as JSON, without secrets.
    """
    settings = {k: v for k, v in args.to_dict().items() if not k.startswith(_IRRELEVANT_TO_AUDITS) and k not in _BATCH}
    for name in SINCE_EARLIER_RECORDS:
        if settings[name] == type(args).__dataclass_fields__[name].default:
            del settings[name]
    if args.teacher_context_column is not None:  # the text, since the default may change
        settings["teacher_context_column"], settings["teacher_context_template"] = args.teacher_context.identity
    settings[" x ".join(_BATCH)] = args.per_device_train_batch_size * args.gradient_accumulation_steps
    phi = name_or_function(similarity)
    settings["similarity"] = phi if isinstance(phi, str) else identity_of(phi)
    if chunk_weights is not None:
        settings["posterior_baseline"] = identity_of(chunk_weights)
    if args.uses_rewards:  # those that are only logged change nothing
        settings["reward_funcs"] = [*map(_identity_of_reward, reward_funcs)]
    settings["train_dataset"] = getattr(train_dataset, "_fingerprint", None)
    source = get_config_model_id(model.config)
    weights = hash_of_folder(source)
    # The path of a folder does not identify the student: the run may have been copied to another machine.
    settings["student"] = source if weights is None else None
    settings["student_weights"] = getattr(model.config, "_commit_hash", None) if weights is None else weights
    settings["student_parameters"] = model.num_parameters()
    settings["student_adapters"] = {
        name: {k: v for k, v in adapter.to_dict().items() if k != "base_model_name_or_path"}
        for name, adapter in (getattr(model, "peft_config", None) or {}).items()
    }
    settings["teacher"] = teacher.name
    settings["teacher_weights"] = hash_of_folder(teacher.name)
    settings["teacher_base_url"] = address_of(teacher)
    settings["teacher_code"] = _teacher_code(teacher)
    return {name: _as_json(value) for name, value in sorted(settings.items())}


def fingerprint(settings: Mapping[str, Any]) -> str:
    """The hash of the result of [`replay_key`]."""
    return _hash(settings)


def hash_of_row(row: Mapping[str, Any]) -> str:
    """The hash of a row of a dataset."""
    return _hash(_as_json(row))


def teacher_key(teacher: Teacher) -> dict[str, Any]:
    """What identifies a teacher without its weights, by name. The values can be written as JSON, without secrets."""
    return {
        "teacher": teacher.name,
        "teacher_base_url": address_of(teacher),
        "teacher_code": _teacher_code(teacher),
        "teacher_extra_body": getattr(teacher, "extra_body", None) or None,
        "teacher_chat_template_kwargs": getattr(teacher, "chat_template_kwargs", None) or None,
    }


def identity_of(function: Any) -> str:
    """Identify a callable by its name and a hash of its code.

    The hash covers the bytecode with its constants, the defaults, and what the function refers to: functions of the
    same module, and immutable values. For an object, it covers the code of `__call__` and the plain attributes. Code
    that is imported from other modules counts by its name. Comments and docstrings do not count. Another version of
    Python compiles to other bytecode and gives another hash.
    """
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}.{named.__qualname__} ({_hash(_described(function, None, set()))[:12]})"


def _identity_of_reward(func: Any) -> Any:
    """A reward model by its weights, a function of this package by its name, and any other one by its code."""
    if isinstance(func, RewardModel):
        return [func.source, hash_of_folder(func.source)]
    named = func.func if isinstance(func, partial) else func
    if not str(named.__module__).startswith("omniopd_trl."):
        return identity_of(func)
    name = f"{named.__module__}.{getattr(named, '__qualname__', type(named).__qualname__)}"
    return [name, func.keywords] if isinstance(func, partial) else name


def _teacher_code(teacher: Teacher) -> str | None:
    """Identify a custom teacher by its class and a hash of its code and configuration; `None` for one of this package.

    The code is that of all methods, as in [`identity_of`], and the values of class attributes. The configuration is
    the attributes that are named like a parameter of `__init__`, with or without an underscore before it, or like a
    class attribute. Other attributes, such as counters and clients, are the teacher's state and do not count.
    """
    if type(teacher) is ScriptedTeacher:
        return identity_of(teacher.script)
    custom = [
        cls for cls in type(teacher).__mro__ if not cls.__module__.startswith(("omniopd_trl.", "abc", "builtins"))
    ]
    if not custom:
        return None
    named = set(inspect.signature(type(teacher).__init__).parameters)
    attributes = {
        name: _configured(value)
        for name, value in sorted(getattr(teacher, "__dict__", {}).items())
        if (name.lstrip("_") in named or hasattr(type(teacher), name)) and not is_secret_name(name.lstrip("_"))
    }
    kind = type(teacher)
    return f"{kind.__module__}.{kind.__qualname__} ({_hash([*map(_class, custom), attributes])[:12]})"


def _class(cls: type) -> Any:
    members = {}
    for name, value in sorted(vars(cls).items()):
        if isinstance(value, staticmethod | classmethod):
            value = value.__func__
        functions = [value.fget, value.fset] if isinstance(value, property) else [value]
        # Other names with two underscores are the interpreter's, such as the docstring and the line number.
        if isinstance(value, FunctionType) or not name.startswith("__"):
            members[name] = [_described(function, cls.__module__, set()) for function in functions]
    return [cls.__module__, cls.__qualname__, members]


def _configured(value: Any) -> Any:
    """An attribute of a teacher as JSON that is the same on every run."""
    if isinstance(value, Mapping):
        return {str(k): _configured(v) for k, v in value.items() if not is_secret_name(str(k))}
    if isinstance(value, list | tuple):
        return [_configured(v) for v in value]
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Teacher):
        return [value.name, address_of(value), _teacher_code(value)]
    return _described(value, None, set())


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _as_json(value: Any) -> Any:
    """A value for JSON that is the same on every run: sets are sorted, and other types become strings.

    Secrets are left out, such as those in the keyword arguments of a model loader: they change no answer, and the
    journal stores the result.
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


# ---- Functions ----

_PLAIN = (type(None), bool, int, float, complex, str, bytes, type(...))


def _described(value: Any, module: str | None, seen: set[int]) -> Any:
    """A value as JSON that is the same on every run. Mutable values count by their type.

    Args:
        value: any value.
        module: name of the module whose functions are described by their code; functions of other modules count by
            name. `None` describes any function by its code.
        seen: ids of functions and objects that are described already, since functions may call each other.
    """
    if isinstance(value, _PLAIN):
        return repr(value)
    if isinstance(value, tuple):
        return [_described(v, module, seen) for v in value]
    if isinstance(value, frozenset):  # the constant of `x in {"a", "b"}`, whose order differs between processes
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
    call = getattr(kind, "__call__", None)  # noqa: B004 (its code is read)
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
    # A decorator keeps the wrapped function in a cell, whatever module the decorator comes from.
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
