# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Memory and time of a run: counts of real models, adapters and optimizers, and a step-by-step reference.

That the formulas of activations, states and operations are those of the code is in `benchmarks/test_scaling.py`.
"""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, Mamba2Config, Qwen3Config, Qwen3MoeConfig

from benchmarks.scaling import TOKENS
from benchmarks.shapes import config_of
from omniopd_trl.accounting.hardware import (
    BACK_ENDS,
    GIB,
    GPUS,
    QWEN3,
    Forks,
    Shape,
    forks_flops,
    generation_seconds,
    known_shape,
    layer_bytes,
    mask_bytes,
    state_bytes,
    step_flops,
    work_bytes,
)
from omniopd_trl.accounting.job import LAUNCHES, Job
from omniopd_trl.errors import ConfigError

H100 = GPUS["h100-80"]
SMALL, MIDDLE = QWEN3[:2]
SLEEPS = {"vllm": "colocate", "vllm_sleeps": True}


def on_meta(config):
    """A model of this configuration without memory."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


class TestShape:
    """The sizes of a model."""

    @pytest.mark.parametrize("shape", QWEN3, ids=lambda shape: shape.name)
    def test_of_configuration(self, shape):
        """The known sizes are those of a configuration, and count the parameters of the model."""
        config = config_of(shape)
        assert Shape.of(shape.name, config) == known_shape(f"Qwen/{shape.name}") == shape
        assert on_meta(replace_layers(config, 2)).num_parameters() == replace(shape, layers=2).parameters

    def test_of_experts(self):
        """A mixture of experts, whose tokens use a few of them. Rows of its name are those of Qwen3-30B-A3B."""
        config = Qwen3MoeConfig(
            vocab_size=151_936,
            hidden_size=2048,
            num_hidden_layers=2,
            moe_intermediate_size=768,
            num_attention_heads=32,
            num_key_value_heads=4,
            head_dim=128,
            num_experts=128,
            num_experts_per_tok=8,
            tie_word_embeddings=False,
        )
        shape = known_shape("Qwen/Qwen3-30B-A3B-Instruct-2507")
        assert Shape.of(shape.name, config) == replace(shape, layers=2)
        assert on_meta(config).num_parameters() == replace(shape, layers=2).parameters
        assert shape.parameters / 1e9 == pytest.approx(30.5, abs=0.1)
        active = shape.layers * shape.layer_weights + 2 * shape.head_parameters
        assert active / 1e9 == pytest.approx(3.35, abs=0.1)

    def test_of_llama(self):
        """A configuration with other names: parameters within the norms that Qwen3 has and Llama has not."""
        config = LlamaConfig(num_hidden_layers=2)
        shape = Shape.of("llama", config)
        assert shape.parameters == pytest.approx(on_meta(config).num_parameters(), rel=1e-5)

    def test_without_attention(self):
        """A model whose sizes are others is refused, with what is missing."""
        with pytest.raises(ConfigError, match=r"does not state its intermediate.*Leave out --gpu"):
            Shape.of("mamba", Mamba2Config())

    @pytest.mark.parametrize(
        ("name", "known"),
        [
            ("Qwen/Qwen3-4B", "Qwen3-4B"),
            ("Qwen/Qwen3-4B-Base", "Qwen3-4B"),
            ("Qwen/Qwen3-4B-Thinking-2507", "Qwen3-4B"),
            ("Qwen/Qwen3-4B-AWQ", None),
            ("Qwen3-4B", None),
            ("me/Qwen3-4B", None),
        ],
    )
    def test_known(self, name, known):
        """Ids of the publisher, and none that may have other sizes."""
        shape = known_shape(name)
        assert (None if shape is None else shape.name) == known

    @pytest.mark.parametrize("targets", [None, "all-linear", ["q_proj", "down_proj"]])
    def test_adapter(self, targets):
        """The parameters that PEFT adds."""
        shape = Shape("tiny", 96, 2, 192, 6, kv_heads=3, head_dim=16, vocabulary=384)
        model = get_peft_model(
            AutoModelForCausalLM.from_config(config_of(shape)),
            LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM"),
        )
        assert shape.lora_parameters(4, targets) == model.get_nb_trainable_parameters()[0]


def replace_layers(config, layers):
    values = config.to_dict() | {"num_hidden_layers": layers, "layer_types": None}
    return Qwen3Config(**values)


class TestMemory:
    """Bytes per GPU."""

    @pytest.mark.parametrize("launch", LAUNCHES)
    def test_as_in_the_tables(self, launch):
        """A plain job is a row of the page, at its number of GPUs."""
        gpus = 1 if launch == "single_gpu" else 8
        name = "`single_gpu`, `multi_gpu`" if launch in ("single_gpu", "multi_gpu") else f"`{launch}`"
        row = next(back_end for back_end in BACK_ENDS if back_end.name == name)
        job = Job(MIDDLE, H100, gpus, launch, max_tokens=TOKENS, micro_batches=16 / gpus)
        assert job.states == state_bytes(MIDDLE, row, gpus, accumulates=True)
        assert job.work == work_bytes(MIDDLE, row, TOKENS)
        assert job.training_bytes == job.states + job.work

    def test_lora_and_offload_as_in_the_tables(self):
        """The rows that are the same launch with an option; an adapter's 16 bytes come on top."""
        rows = {row.name: row for row in BACK_ENDS}
        lora = Job(MIDDLE, H100, lora_parameters=1000)
        expected = state_bytes(MIDDLE, rows["the same, LoRA"], 1, accumulates=False)
        assert lora.states == expected + 16_000
        assert lora.work == work_bytes(MIDDLE, rows["the same, LoRA"], lora.max_tokens)
        offloaded = Job(MIDDLE, H100, ref_model_offload=True)
        assert offloaded.states == state_bytes(MIDDLE, rows["the same, `ref_model_offload`"], 1, accumulates=False)

    def test_lora_shards(self):
        """Frozen weights are split by what splits weights, in their own precision, and not counted twice."""
        n = MIDDLE.parameters
        sizes = {launch: Job(MIDDLE, H100, 8, launch, lora_parameters=1) for launch in LAUNCHES[1:]}
        whole = {launch: (job.states - 16) / n for launch, job in sizes.items()}
        assert whole["multi_gpu"] == 4
        assert whole["zero2"] == 2
        assert 2 / 8 < whole["zero3"] < 2 / 8 + 0.3  # and a gathered head and layer
        assert 4 / 8 < whole["fsdp2"] < 4 / 8 + 0.3

    def test_reference(self):
        """Without one, in bf16, and in the student's precision."""
        n = MIDDLE.parameters
        none, half, same = (Job(MIDDLE, H100, reference_itemsize=size).states for size in (0, 2, None))
        assert (half - none, same - none) == (2 * n, 4 * n)
        assert Job(MIDDLE, H100, reference_itemsize=0, ref_model_offload=True).states == none

    def test_8bit_optimizer(self):
        """The bytes that bitsandbytes keeps, with moments of embeddings in 32 bits as transformers asks for."""
        bnb = pytest.importorskip("bitsandbytes")
        shape = Shape("tiny", 128, 2, 256, 4, kv_heads=2, head_dim=32, vocabulary=4096)
        model = AutoModelForCausalLM.from_config(config_of(shape))
        matrices = [p for p in model.parameters() if p.ndim > 1]  # vectors below 4,096 numbers stay in 32 bits
        optimizer = bnb.optim.AdamW(matrices, lr=1e-3, optim_bits=8)
        manager = bnb.optim.GlobalOptimManager.get_instance()
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                manager.register_module_override(module, "weight", {"optim_bits": 32})
        for parameter in matrices:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        held = sum(
            value.nbytes
            for state in optimizer.state.values()
            for key, value in state.items()
            if isinstance(value, torch.Tensor) and not key.startswith("qmap")
        )
        whole, short = (Job(shape, H100, optimizer_8bit=bits).states for bits in (False, True))
        vectors = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in matrices)
        assert 8 * (shape.parameters - vectors) - held == pytest.approx(whole - short, rel=0.01)

    def test_rows_and_teacher(self):
        """Trajectories of a micro-batch are as many more tokens, and need a mask; a teacher adds its weights."""
        one, two = Job(MIDDLE, H100, max_tokens=2 * TOKENS), Job(MIDDLE, H100, max_tokens=TOKENS, rows=2)
        assert two.work == one.work + 2 * TOKENS**2
        taught = Job(SMALL, H100, teacher=MIDDLE)
        assert taught.states == Job(SMALL, H100).states + 2 * MIDDLE.parameters
        assert taught.work > Job(SMALL, H100).work

    def test_engine(self):
        """vLLM counts where it is: during generation, and during training unless it sleeps; a server nowhere."""
        share = 0.3 * H100.memory
        awake = Job(MIDDLE, H100, vllm="colocate")
        asleep = replace(awake, vllm_sleeps=True)
        assert awake.training_bytes - asleep.training_bytes == share
        assert awake.generation_bytes == asleep.generation_bytes == awake.states + share
        assert Job(MIDDLE, H100, vllm="server").generation_bytes == awake.states
        per_token = 2 * 36 * 8 * 128 * 2  # keys and values of 36 layers, 8 heads of 128, two bytes
        assert awake.cache_tokens * per_token == pytest.approx(share - 2 * MIDDLE.parameters - 2 * GIB)
        # Two GPUs that share an engine hold half of its weights and of each token.
        shared = replace(awake, num_gpus=2, launch="multi_gpu", vllm_tensor_parallel=2)
        assert shared.cache_tokens * per_token / 2 == pytest.approx(share - MIDDLE.parameters - 2 * GIB)

    def test_too_small_an_engine(self):
        """An engine that cannot hold the longest trajectory is too small, however much memory is free."""
        job = Job(SMALL, H100, vllm="colocate", vllm_sleeps=True, vllm_utilization=0.05)
        ((what, size),) = job.shortfalls()
        assert (what, job.fits) == ("vLLM", False)
        options, other = job.remedies()
        assert options == [f"--vllm_gpu_memory_utilization {other.vllm_utilization:g}"]
        assert other.engine >= job.engine + size
        assert other.fits

    def test_sft_generates_nothing(self):
        """SFT needs no engine."""
        job = Job(SMALL, H100, method="sft", vllm="colocate")
        assert (job.engine, job.generation_bytes, job.step(1000).generation) == (0, 0, 0)

    def test_refused(self):
        """What the formulas do not describe."""
        with pytest.raises(ConfigError, match="mixture of 128 experts"):
            Job(known_shape("Qwen/Qwen3-30B-A3B"), H100)
        with pytest.raises(ConfigError, match=r"optimizer in 8 bits .* not for zero3"):
            Job(MIDDLE, H100, 8, "zero3", optimizer_8bit=True)
        with pytest.raises(ConfigError, match=r"weights in bf16 .* not for fsdp2"):
            Job(MIDDLE, H100, 8, "fsdp2", half=True)


class TestForks:
    """Branches and imitated rollouts."""

    @pytest.mark.parametrize(
        ("forks", "inputs", "suffixes", "sequences"),
        [
            (Forks(10, 50, 7), 3430, 70, 70),  # 10 * 7 * 49
            (Forks(4, 50, 7, candidates=8), 1372, 28, 56),  # 4 * 7 * 49, and 8 * 7
            (Forks(10, 50, num_imitated=4, imitated_tokens=3), 80, 40, 0),  # 10 * 4 * 2
            (Forks(10, 50, 7, num_imitated=1, imitated_tokens=3), 3450, 80, 70),
            (Forks(4, 50, 7, candidates=8, merges=True), 2800, 28, 56),  # 7 branches of one chunk of 8 * 50
            (Forks(10, 50, 7, num_imitated=1, imitated_tokens=1), 3430, 80, 70),  # a single token predicts nothing
        ],
    )
    def test_counts(self, forks, inputs, suffixes, sequences):
        """Tokens in a row, what is trained, and what is sampled, for a long trajectory."""
        assert (forks.inputs(6340), forks.suffixes(6340), forks.sequences(6340)) == (inputs, suffixes, sequences)
        assert forks.added(6340) == inputs
        assert replace(forks, packing="rows").added(6340) == suffixes * 6340

    def test_short_trajectories(self):
        """A trajectory holds no more chunks than its tokens allow, and one chunk at least."""
        forks = Forks(10, 50, 7, candidates=20)
        assert [forks.inputs(tokens) for tokens in (10, 100, 500)] == [343, 686, 3430]
        assert [forks.sequences(tokens) for tokens in (10, 100, 500, 1000)] == [7, 14, 70, 140]

    def test_tokens_of_a_row(self):
        """Packed branches are further tokens of the student's row; with a block mask nothing else."""
        plain = Job(MIDDLE, H100, max_tokens=6340)
        blocks = replace(plain, forks=Forks(10, 50, 7, packing="blocks"))
        assert blocks.work == replace(plain, max_tokens=9770).work
        rows = replace(plain, forks=Forks(10, 50, 7, packing="rows"))
        assert rows.work == replace(plain, max_tokens=71 * 6340).work

    @pytest.mark.parametrize("rows", [1, 2])
    def test_mask(self, rows):
        """A mask for each pair: a byte, two in a layer, and keys and values for each of the queries' heads."""
        # 9,770 tokens; 32 heads of queries and 8 of keys, of 128.
        assert mask_bytes(MIDDLE, 9770) == (95_452_900, 2 * 95_452_900 + 4 * 9770 * 24 * 128)
        job = Job(MIDDLE, H100, max_tokens=6340, rows=rows, half=True, lora_parameters=1, forks=Forks(10, 50, 7))
        unmasked = 2 * rows * 9770 * 36 * 2560 + layer_bytes(MIDDLE, rows * 9770, False)  # a layer is the peak
        assert job.work == unmasked + rows * sum(mask_bytes(MIDDLE, 9770))

    def test_mask_beside_the_loss(self):
        """Where all weights are trained the loss is the peak, when a layer's copies are gone."""
        job = Job(MIDDLE, H100, max_tokens=6340, half=True, forks=Forks(10, 50, 7))
        assert job.work == replace(job, max_tokens=9770, forks=None).work + 9770**2

    @pytest.mark.parametrize("packing", ["mask", "blocks", "rows"])
    @pytest.mark.parametrize("engine", [{}, SLEEPS])
    @pytest.mark.parametrize("rows", [1, 2])
    def test_more_branches_take_more(self, packing, engine, rows):
        """Memory of training, and time, rise with K; memory of generation does not fall. Imitation adds to both."""
        forks = [None, *(Forks(10, 50, k, packing=packing) for k in (1, 2, 7, 31))]
        forks.append(replace(forks[-1], num_imitated=4, imitated_tokens=3))
        jobs = [Job(MIDDLE, H100, rows=rows, micro_batches=8, forks=each, **engine) for each in forks]
        for less, more in pairwise(jobs):
            assert less.training_bytes < more.training_bytes
            assert less.generation_bytes <= more.generation_bytes
            for tokens in (100, 6540, 20_000):
                assert less.step(tokens).training < more.step(tokens).training
                assert less.step(tokens).generation <= more.step(tokens).generation
        assert jobs[0].step(6540).generation < jobs[1].step(6540).generation

    def test_cache(self):
        """transformers samples branches of several trajectories in the tokens of these, and of one in its tree."""
        one, many = (Job(SMALL, H100, max_tokens=6340, micro_batches=n) for n in (1, 16))
        forks = Forks(10, 50, 7)
        per_token = 2 * 28 * 8 * 128 * 4  # keys and values of 28 layers, 8 heads of 128, in float32
        assert replace(one, forks=forks).generation_bytes == one.generation_bytes + 3500 * per_token
        assert replace(many, forks=forks).generation_bytes == many.generation_bytes
        apart = replace(forks, packing="rows")
        assert replace(one, forks=apart).generation_bytes == one.generation_bytes

    @pytest.mark.parametrize("adapters", [False, True])
    def test_work(self, adapters):
        """The student's loss alone: 4 forwards and 4 products with the head, 1 less each for frozen weights."""
        frozen = 1 if adapters else 0
        linear = (8 - 2 * frozen) * 3430 * 36 * MIDDLE.layer_weights
        head = (8 - 2 * frozen) * 3500 * 151_936 * 2560
        pairs = 4 * 36 * 4 * 32 * 128
        found = {
            packing: forks_flops(MIDDLE, 6340, Forks(10, 50, 7, packing=packing), adapters) - head
            for packing in ("mask", "blocks")
        }
        assert found["mask"] == pytest.approx(linear + pairs * (9770**2 - 6340**2 / 2))
        assert found["blocks"] == pytest.approx(linear + pairs * 3430 * (6340 + 50) / 2)
        rows = forks_flops(MIDDLE, 6340, Forks(10, 50, 7, packing="rows"))
        assert rows == pytest.approx(4 * 70 * MIDDLE.forward_flops(6340) + 8 * 3500 * 151_936 * 2560)
        job = Job(MIDDLE, H100, micro_batches=16, forks=Forks(10, 50, 7), lora_parameters=1000 * frozen)
        flops = step_flops(MIDDLE, 6340, adapters) + found["mask"] + head
        assert job.step(6340).training == pytest.approx(16 * flops / (0.4 * H100.flops))

    @pytest.mark.parametrize(
        ("vllm", "packing", "prefix", "forwards"),
        [
            ("server", "mask", 3170, 1),  # vLLM reads half of the trajectory for each branch
            ("server", "rows", 3170, 1),
            (None, "blocks", 6340 / 70, 1),  # a tree is read once for all
            (None, "rows", 3170, None),
        ],
    )
    def test_sampling(self, vllm, packing, prefix, forwards):
        """70 branches of 50 tokens: a decoding step reads the weights, and keys and values before each branch."""
        job = Job(MIDDLE, H100, max_tokens=20_000, micro_batches=16, vllm=vllm)
        seconds = replace(job, forks=Forks(10, 50, 7, packing=packing)).step(6340).generation
        turns = 16 * 70 / 256  # vLLM decodes 256 at once, and these are also the turns that memory needs
        if vllm is None and packing == "rows":
            turns = max(turns, 16 * 70 * (3170 + 50) / (16 * 20_000))
        read = turns * 2 * MIDDLE.parameters + 16 * 70 * (prefix + 25) * 2 * 36 * 8 * 128 * 2
        written = 50 * read / ((0.5 if vllm else 0.08) * H100.bandwidth)
        flops = 70 * MIDDLE.forward_flops(3170) if forwards is None else MIDDLE.forward_flops(6340)
        expected = written + 16 * flops / (0.4 * H100.flops)
        assert seconds - job.step(6340).generation == pytest.approx(expected)

    def test_remedies(self):
        """Packed rows instead of one for each branch, and a mask for blocks where one for all pairs is too large."""
        job = Job(MIDDLE, H100, optimizer_8bit=True, ref_model_offload=True, vllm="server", forks=Forks(10, 50, 7))
        apart = replace(job, forks=replace(job.forks, packing="rows"))
        assert (job.fits, apart.fits) == (True, False)
        assert apart.remedies() == (["--attn_implementation sdpa"], job)
        tight = replace(job, gpu=replace(H100, memory=(job.training_bytes - 1) / 0.95))
        options, other = tight.remedies()
        assert options == ["--attn_implementation flex_attention"]
        assert other.fits
        assert other.forks == replace(job.forks, packing="blocks")


class TestRemedies:
    """Options that make a job fit."""

    @pytest.mark.parametrize(
        "job",
        [
            Job(MIDDLE, H100, rows=2, micro_batches=8),
            Job(MIDDLE, H100, rows=2, micro_batches=8, vllm="colocate"),
            Job(MIDDLE, GPUS["a100-40"], micro_batches=16, **SLEEPS),
            Job(SMALL, GPUS["l4"], rows=2, micro_batches=8, **SLEEPS, vllm_utilization=0.5),
            Job(QWEN3[2], H100, 8, "multi_gpu", micro_batches=2, **SLEEPS),
            Job(QWEN3[2], H100, 8, "multi_gpu", micro_batches=2, optimizer_8bit=True, **SLEEPS),
        ],
        ids=["4B", "4B beside vLLM", "4B in 40 GB", "1.7B in 24 GB", "8B on eight", "8B on eight, 8 bits"],
    )
    def test_fits_and_nothing_is_superfluous(self, job):
        """The job with the options fits, and without any one of them it does not."""
        assert not job.fits
        options, other = job.remedies()
        assert other.fits
        changes = dict(job._changes())
        for left_out in options:
            fewer = {k: v for name in options if name != left_out for k, v in changes[name].items()}
            assert not replace(job, **fewer).fits

    def test_shards(self):
        """DDP's optimizer in 8 bits is not combined with ZeRO-3."""
        options, other = Job(QWEN3[2], H100, 8, "multi_gpu", micro_batches=2, optimizer_8bit=True, **SLEEPS).remedies()
        assert options == ["--accelerate_config zero3 --optim adamw_torch_fused"]
        assert (other.launch, other.optimizer_8bit) == ("zero3", False)

    def test_none(self):
        """A student that fits in no way."""
        assert Job(QWEN3[3], GPUS["l4"], **SLEEPS).remedies() is None


class TestTime:
    """Seconds per step."""

    @pytest.mark.parametrize(("sequences", "tokens"), [(1, 500), (16, 500)])
    def test_generation_step_by_step(self, sequences, tokens):
        """The sum over decoding steps: each reads the weights and the cache so far."""
        seconds = 0.0
        for written in range(tokens):
            read = 2 * MIDDLE.parameters + sequences * 2 * 36 * 8 * 128 * written * 2
            seconds += read / (0.5 * H100.bandwidth)
        assert generation_seconds(MIDDLE, H100, sequences, tokens) == pytest.approx(seconds, rel=0.01)

    def test_turns(self):
        """If the cache holds half of the sequences, the weights are read twice as often."""
        together = generation_seconds(MIDDLE, H100, 16, 500)
        halves = 2 * generation_seconds(MIDDLE, H100, 8, 500)
        assert generation_seconds(MIDDLE, H100, 16, 500, cache_tokens=8 * 500) == pytest.approx(halves)
        assert together < halves

    def test_methods(self):
        """GRPO trains on all samples of a prompt; SFT and OPD do less for each trajectory; a teacher adds its own."""
        jobs = {
            method: Job(SMALL, H100, method=method, micro_batches=16, **SLEEPS) for method in ("omniopd", "sft", "opd")
        }
        grpo = Job(SMALL, H100, method="grpo", micro_batches=16, num_generations=8, **SLEEPS)
        training = {method: job.step(TOKENS).training for method, job in jobs.items()}
        assert training["sft"] < training["opd"] < training["omniopd"]
        assert training["omniopd"] < grpo.step(TOKENS).training / 6
        taught = replace(jobs["opd"], teacher=MIDDLE).step(TOKENS).training - training["opd"]
        assert taught == pytest.approx(16 * MIDDLE.forward_flops(TOKENS) / (0.4 * H100.flops))

    def test_more_gpus(self):
        """Eight GPUs with an eighth of the trajectories each take less time, and nothing waits on one."""
        one = Job(SMALL, H100, micro_batches=16, **SLEEPS).step(TOKENS)
        eight = Job(SMALL, H100, 8, "zero2", micro_batches=2, **SLEEPS).step(TOKENS)
        assert one.waiting == 0 < eight.waiting
        assert eight.training == pytest.approx(one.training / 8)
        assert eight.total < one.total
        assert math.isfinite(one.total)
