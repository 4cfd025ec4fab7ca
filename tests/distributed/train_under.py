# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: E402 (the device that makes FSDP2 shard on a CPU comes before anything that makes a state)
"""Train the same steps under one back end for each kind of student, and write the results.

    python train_under.py BACK_END RESULT.json MODELS.json

MODELS.json is a list of `{"name", "path"}`, each with optional arguments of `train` and settings of the configuration.
The weights are written to `NAME.safetensors` beside the result.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from inspect import getclosurevars
from pathlib import Path
from typing import Any
from zlib import crc32

from tests.support.back_ends import LOGGED, STEPS, train_each, training_arguments, whole

BACK_END = sys.argv[1]
if BACK_END == "fsdp2":
    import tests.support.fsdp2_on_cpu  # noqa: F401

import torch
from accelerate.utils import gather_object
from peft import LoraConfig
from safetensors.torch import save_file
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BitsAndBytesConfig

from omniopd_trl import OmniOPDConfig, OmniOPDTrainer
from omniopd_trl.audits.types import Branch
from omniopd_trl.models import offloading
from omniopd_trl.teachers import ScriptedTeacher
from tests.support.judge import judge
from tests.support.teachers import Agreeing
from tests.support.training import questions, within

NUM_STEPS, PROMPTS = 3, 8


class Trainer(OmniOPDTrainer):
    """Cuts completions to lengths that depend on their prompts: the same for every back end."""

    writes = True

    def _generate_single_turn(self, prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> list[list[int]]:
        completions = super()._generate_single_turn(prompt_ids, *args, **kwargs)
        if not self.writes:
            completions = [[crc32(bytes([i, len(ids)])) % 290 + 3 for i in range(40)] for ids in prompt_ids]
        lengths = [(40, 31, 5, 17, 9, 36, 24, 1)[sum(prompt) % 8] for prompt in prompt_ids]
        if self.args.num_generations > 1:  # the completions of a group are equal but for their lengths
            first = self.accelerator.process_index * len(prompt_ids)
            lengths = [40, 31, 5, 17, 19, 36, 24, 1][first : first + len(prompt_ids)]
        completions = [
            ids if len(ids) <= length else [*ids[: length - 1], self.eos]
            for length, ids in zip(lengths, completions, strict=True)
        ]
        if self.model.training:
            self.completions += completions
        return completions

    def _sample_branches(self, prefixes: list[tuple[list[int], int]], **kwargs: Any) -> list[list[Branch]]:
        """Branches that depend on their prefix only, in place of those that the back end has sampled."""
        branches = super()._sample_branches(prefixes, **kwargs)
        assert [len(of_one) for of_one in branches] == [self.args.num_branches] * len(prefixes)
        return [
            [
                Branch(tuple(crc32(bytes([k, t, sum(ids) % 251])) % 290 + 3 for t in range(length)), "")
                for k in range(self.args.num_branches)
            ]
            for ids, length in prefixes
        ]

    @property
    def eos(self) -> int:
        return self._tokenizer.eos_token_id


class Observed(Trainer):
    """Notes in which dtype each part of the computation is done, on completions that are given."""

    writes = False
    phase = "generation"  # or "scores", "reference", "loss", and "backward", when layers are computed again

    def observe(self) -> None:
        self.seen: set[tuple[str, str, str]] = set()
        self.weights_kept: list[bool] = []
        self.losses_in_float32: list[bool] = []
        models = [self.model] if self.ref_model is None else [self.model, self.ref_model]
        for model in models:
            for name, module in self.accelerator.unwrap_model(model).named_modules():
                if isinstance(module, nn.Linear) and "lm_head" not in name:
                    module.register_forward_hook(self.note)
        within(self.objective, "score", lambda: self.during("scores"))
        within(self.objective, "run_reference", lambda: self.during("reference"))
        evaluate = self.objective.evaluate

        def note_weights(student: Any, tokens: Any, *args: Any) -> torch.Tensor:
            arrived = tokens.weights.unique()
            self.weights_kept.append(torch.equal(arrived, self.asked) and (len(arrived) == 1 or exact(arrived)))
            return evaluate(student, tokens, *args)

        self.objective.evaluate = note_weights

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        before, self.phase = self.phase, phase
        yield
        self.phase = before

    def note(self, module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        self.seen.add((self.phase, str(inputs[0].dtype), str(output.dtype)))

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> list[list[int]]:
        self.phase = "generation"
        return super()._generate_single_turn(*args, **kwargs)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        self.phase = "loss"
        self.asked = inputs["weights"].unique()
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        self.phase = "backward"  # until something else begins
        self.losses_in_float32.append(loss.dtype == torch.float32 and (exact(loss.detach()) or not loss))
        return loss

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        with Gathers(self) as gathers:
            loss = super().training_step(*args, **kwargs)
        self.heads_gathered = gathers.heads  # of the last micro-batch: DeepSpeed has learnt by then what comes when
        return loss

    def observations(self) -> dict[str, Any]:
        model = self.accelerator.unwrap_model(self.model_wrapped)
        return {
            "dtypes": sorted(set(gather_object(list(self.seen)))),
            "weights_kept": all(gather_object(self.weights_kept)),
            "losses_kept": all(gather_object(self.losses_in_float32)),
            "master_weights": str(master_weights(model).dtype),
            "heads_gathered": self.heads_gathered,
            "quantized": any(getattr(module, "quant_state", None) is not None for module in model.modules()),
        }


class Gathers(TorchDispatchMode):
    """Counts how often an LM head is gathered, in each phase: the student's or the reference's, of the same size."""

    def __init__(self, trainer: Observed):
        super().__init__()
        self.trainer = trainer
        head = trainer.accelerator.unwrap_model(trainer.model).get_output_embeddings().weight
        vocabulary, hidden = getattr(head, "ds_shape", head.shape)
        self.sizes = {vocabulary * hidden, (vocabulary + 1) * hidden}  # FSDP2 may gather the last norm with it
        self.heads: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        whole = None
        if func is torch.ops.c10d._allgather_base_.default:
            whole = args[0]
        elif func is torch.ops._c10d_functional.all_gather_into_tensor.default:  # of a `DTensor`
            whole = result
        if whole is not None and whole.numel() in self.sizes:
            self.heads[self.trainer.phase] = self.heads.get(self.trainer.phase, 0) + 1
        return result


def by_length(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    """A reward of 0, 0.5 or 1."""
    return [len(ids) % 3 / 2 for ids in completion_ids]


def exact(values: torch.Tensor) -> bool:
    """Whether they are float32 and have not been rounded to bfloat16 on the way."""
    return values.dtype == torch.float32 and not torch.equal(values, values.bfloat16().float())


def train(
    folder: Path,
    name: str,
    path: str,
    lora: dict[str, Any] | None = None,
    teacher: str | None = None,
    quantization: dict[str, Any] | None = None,
    observed: bool = False,
    num_prompts: int = PROMPTS * NUM_STEPS,
    resume: str | None = None,
    verified: bool = False,
    **settings: Any,
) -> dict[str, Any]:
    num_processes = 1 if BACK_END == "one" else 2
    args = OmniOPDConfig(
        **{
            "output_dir": str(folder / name),
            "max_completion_length": 40,
            "gradient_accumulation_steps": PROMPTS // 2 // num_processes,
            "max_steps": NUM_STEPS,
            "learning_rate": 1e-2,
            **STEPS,
            **training_arguments(BACK_END),
            **settings,
        }
    )
    trainer = (Observed if observed else Trainer)(
        model=path,
        teacher_model=teacher or (Agreeing() if args.first_rollouts else ScriptedTeacher(judge)),
        args=args,
        train_dataset=questions(num_prompts),
        reward_funcs=by_length if verified else None,
        quantization_config=BitsAndBytesConfig(**quantization) if quantization else None,
        peft_config=LoraConfig(r=4, lora_alpha=16, target_modules="all-linear", **lora) if lora is not None else None,
    )
    trainer.completions = []
    if args.ref_model_offload:
        be_away_between_uses(trainer)
    if observed:
        trainer.observe()
    compare, checks = trainer.objective.compare_with_forward, []
    trainer.objective.compare_with_forward = lambda *arguments: checks.append(compare(*arguments)) or checks[-1]
    before = weights(trainer)
    trainer.train(resume_from_checkpoint=resume)
    after = weights(trainer)
    if trainer.accelerator.is_main_process:
        save_file({k: v.contiguous().clone() for k, v in after.items()}, str(folder / f"{name}.safetensors"))
    logs = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    compared = (*LOGGED, "imitation/loss", "imitation/tokens", "reward")
    # Before the next forward, which leaves the weights of FSDP2's root module gathered, and in bf16.
    observations = trainer.observations() if observed else None
    _, own, ours = compare(trainer.model_wrapped, torch.arange(5, 21, device=args.device)[None], 8)
    return {
        "checks": bool(checks),
        "compared": (own - ours).abs().max().item(),
        "steps": [{key: float(entry[key]) for key in compared if key in entry} for entry in logs],
        "moved": max((after[key] - before[key]).abs().max().item() for key in after) if after else 0.0,
        "completions": sorted(map(str, gather_object(trainer.completions))),
        "sharded": sharded(trainer),
        "optimizer": optimizer(trainer),
        "reentrant": reentrant(trainer),
        "reference_is_a_copy": trainer.ref_model is not None,
        "reference_rests_on_cpu": rests_on_cpu(trainer),
        "asked": trainer.teacher_usage.completion_tokens,
        "observed": observations,
    }


def weights(trainer: OmniOPDTrainer) -> dict[str, torch.Tensor]:
    """The trainable weights, whole, by the names that they have in one process."""
    wrapped = trainer.model_wrapped
    # DeepSpeed's own copy, once there is one: what the layers compute with may be rounded to bf16.
    value = updated if BACK_END.startswith("zero") and hasattr(wrapped, "optimizer") else whole
    named = trainer.accelerator.unwrap_model(wrapped).named_parameters()
    return {name: value(parameter).clone().float().cpu() for name, parameter in named if parameter.requires_grad}


def master_weights(model: nn.Module) -> torch.Tensor:
    """What the optimizer updates, of one trainable parameter."""
    parameter = next(p for p in model.parameters() if p.requires_grad)
    return updated(parameter) if BACK_END.startswith("zero") else parameter.detach()


def updated(parameter: nn.Parameter) -> torch.Tensor:
    """DeepSpeed's own copy of a parameter, whole."""
    from deepspeed.utils import safe_get_full_fp32_param

    return safe_get_full_fp32_param(parameter)


def sharded(trainer: OmniOPDTrainer) -> bool:
    """Whether this process holds less than the whole student between uses."""
    model = trainer.accelerator.unwrap_model(trainer.model_wrapped)
    return any(hasattr(p, "full_tensor") or (hasattr(p, "ds_id") and p.numel() == 0) for p in model.parameters())


def optimizer(trainer: OmniOPDTrainer) -> str | None:
    """Which of DeepSpeed's optimizers steps, by what it does: it passes over a setting that it does not know."""
    if not BACK_END.startswith("zero"):
        return None
    optimizer = trainer.model_wrapped.optimizer
    if BACK_END.startswith("zero3"):
        stage, offloaded = 3, optimizer.offload_optimizer
    else:
        stage, offloaded = 2 if optimizer.partition_gradients else 1, optimizer.cpu_offload
    return f"zero{stage}_offload" if offloaded else f"zero{stage}"


def reentrant(trainer: OmniOPDTrainer) -> bool | None:
    """How gradients are checkpointed; `None` when they are not."""
    for module in trainer.accelerator.unwrap_model(trainer.model_wrapped).modules():
        if getattr(module, "gradient_checkpointing", False):
            return module._gradient_checkpointing_func.keywords["use_reentrant"]
    return None


def be_away_between_uses(trainer: OmniOPDTrainer) -> None:
    """Make the reference NaN wherever it rests: it can then be read only where it was lent to.

    The device of these runs is the CPU, and a move to where a tensor is already is none. ZeRO-3 moves what it gathers
    itself, within one call: see `rests_on_cpu`.
    """
    if trainer.objective.reference.offloaded is None:
        return
    model = trainer.ref_model
    at_rest = here(model)
    true = {tensor.data_ptr(): tensor.clone() for tensor in at_rest}
    for tensor in at_rest:
        tensor.fill_(float("nan"))
    if BACK_END != "fsdp2":
        offloading._copy = lambda host, device: true[host.data_ptr()].clone()
        return
    move = model.to

    def move_and_fill(where: Any) -> nn.Module:
        move(where)
        for tensor in at_rest:
            # The device is an object; the place to rest is called "cpu", and can be told from it by nothing else here.
            tensor.copy_(true[tensor.data_ptr()]) if isinstance(where, torch.device) else tensor.fill_(float("nan"))
        return model

    model.to = move_and_fill


def here(model: nn.Module) -> list[torch.Tensor]:
    """What this process holds of a model's parameters."""
    values = [parameter.detach() for parameter in model.parameters()]
    return [value.to_local() if isinstance(value, DTensor) else value for value in values]


def rests_on_cpu(trainer: OmniOPDTrainer) -> bool:
    """Whether the reference is kept off the device between uses.

    Under ZeRO-3 what counts is where DeepSpeed was told to keep its part of each parameter: on a machine with one
    memory nothing else shows it.
    """
    if trainer.ref_model is None:
        return False
    if BACK_END.startswith("zero3"):
        # It keeps the device for a parameter of which it was told nothing. The student's may not be moved.
        assert all(isinstance(place, torch.device) for place in places(trainer.model_wrapped))
        return all(isinstance(place, str) and place == "cpu" for place in places(trainer.ref_model))
    if trainer.objective.reference.offloaded is None:
        return False
    return all(tensor.isnan().all().item() for tensor in here(trainer.ref_model))


def places(model: nn.Module) -> list[Any]:
    """Where ZeRO-3 keeps its part of each parameter: its methods know what it was made with."""
    makers = (getclosurevars(parameter.partition).nonlocals["self"] for parameter in model.parameters())
    return [maker.remote_device for maker in makers]


if __name__ == "__main__":
    train_each(train)
