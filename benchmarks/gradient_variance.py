# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Noise of the chunk loss's gradient with each baseline of the posterior, and with branches, at the same forks.

    python -m benchmarks.gradient_variance -o docs/results/gradient_variance/demo.json
    python -m benchmarks.gradient_variance -o docs/results/gradient_variance/varied.json -- \\
        --teacher_model_name_or_path demo:teacher_varied

A run without training records batches: their forks, 64 branches of the student at each fork, and 96 rollouts of the
teacher. What follows `--` are options of that run. Sixteen draws of the gradient of a batch combine these:

- *rollouts*: each draw has the chunks of the trajectories, and four other rollouts at each fork;
- *chunks and rollouts*: each draw has another branch in the place of each chunk as well.

A draw of the leave-one-out form has eight branches, so there are eight of them.

The expected gradient is that of the expected similarity at these forks, `sum_y pi(y) R(y) grad log pi(y)`. `y` runs
over all texts among the branches of a fork, with their exact probabilities. `R(y)` is the teacher's probability of the
text for `exact`, and the mean over the 32 rollouts that are in no draw for the others.
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks.results import write_json
from omniopd_trl.cli.recipes import recipe_files
from omniopd_trl.demo import asset_path
from omniopd_trl.evals.estimator import true_support
from omniopd_trl.journal.browse import AuditedTrajectory, list_audits, read_audits
from omniopd_trl.method import StepChunks, get_chunk_weights, leave_one_out, posterior_mean, similarity_matrix
from omniopd_trl.report.runs import Run, without_folders
from omniopd_trl.teachers import Prefix
from omniopd_trl.teachers.local import LocalTeacher

BASELINES = "none", "batch", "moving_average", "trajectory"
LEAVE_ONE_OUT = "leave one out"
NUM_BRANCHES, BRANCHES_OF_A_DRAW = 64, 8
NUM_DRAWS, ROLLOUTS_OF_A_DRAW, HELD_OUT = 16, 4, 32

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Forks:
    """`F` forks of one batch, and the `R` different texts that the student wrote at them.

    Attributes:
        trajectories: `(F,)`, the trajectory of each fork.
        branches: `(F, B)`, the text of each branch, as an index into the `R` texts. The trajectory's own is the first.
        fork: `(R,)`, the fork of each text.
        texts: the texts.
        prefixes: what the teacher continues at each fork.
        rollouts: its rollouts at each fork.
        logprobs: `(R,)`, nats, the student's log-probability of each text.
        priors: `(R,)`, geometric mean of its token probabilities (Eq. 4).
        gram: `(R, R)`, inner products of the gradients of `logprobs`.
        num_tokens: tokens of the batch's completions, the divisor of the loss.
    """

    trajectories: NDArray[np.int64]
    branches: NDArray[np.int64]
    fork: NDArray[np.int64]
    texts: Sequence[str]
    prefixes: Sequence[Prefix]
    rollouts: Sequence[Sequence[str]]
    logprobs: Array
    priors: Array
    gram: Array
    num_tokens: int

    def similarities(self, name: str) -> Array:
        """`(R, N)`, the similarity of each text to each rollout at its fork."""
        return np.array(similarity_matrix(self.texts, [self.rollouts[fork] for fork in self.fork], name))


def record(folder: Path, num_batches: int, extra: Sequence[str]) -> None:
    """Record batches of the demo's recipe with branches, without training the student."""
    options = {
        "learning_rate": 0,
        "max_steps": num_batches,
        "eval_strategy": "no",
        "eval_on_start": "false",
        "evaluate_teacher": "false",
        "num_branches": NUM_BRANCHES - 1,
        "num_rollouts": NUM_DRAWS * ROLLOUTS_OF_A_DRAW + HELD_OUT,
        "output_dir": folder,
    }
    named = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
    recipe = str(recipe_files()["demo_paper"])
    command = [sys.executable, "-m", "omniopd_trl.train", "--config", recipe, *named, *extra]
    subprocess.run(command, check=True, stdout=sys.stderr)


def score(model: PreTrainedModel, texts: Iterable[tuple[Sequence[int], Sequence[int]]]) -> tuple[Array, Array]:
    """The student's log-probability of each text after its prefix, and the inner products of their gradients.

    Args:
        model: the student.
        texts: token ids of each prefix and of its text, `R` in all.

    Returns:
        `(R,)`, nats, and `(R, R)`.
    """
    parameters = list(model.parameters())
    logprobs, gradients = [], []
    for prefix, text in texts:
        ids = torch.tensor([[*prefix, *text]])
        logits = model(input_ids=ids, logits_to_keep=len(text) + 1).logits[0, :-1]
        logprob = logits.float().log_softmax(-1).gather(1, ids[0, -len(text) :, None]).sum()
        gradients.append(torch.cat([part.reshape(-1) for part in torch.autograd.grad(logprob, parameters)]))
        logprobs.append(logprob.item())
    flat = torch.stack(gradients)
    return np.array(logprobs), (flat @ flat.T).double().numpy()


def collect(model: PreTrainedModel, trajectories: Sequence[AuditedTrajectory]) -> Forks:
    """The forks of a recorded batch. Chunks where all branches have one text have no rollouts, and are left out."""
    found = [(owner, chunk) for owner, trajectory in enumerate(trajectories) for chunk in trajectory.chunks]
    rows: dict[tuple[int, tuple[int, ...]], int] = {}  # the index of a text, from its fork and tokens
    branches, texts, sources = [], [], []
    for fork, (owner, chunk) in enumerate(found):
        trajectory = trajectories[owner]
        for branch in chunk.branches:
            if (fork, branch.token_ids) not in rows:
                rows[fork, branch.token_ids] = len(rows)
                texts.append(branch.text)
                prefix = *trajectory.prompt_ids, *trajectory.completion_ids[: chunk.start]
                sources.append((prefix, branch.token_ids))
        branches.append([rows[fork, branch.token_ids] for branch in chunk.branches])
    logprobs, gram = score(model, sources)
    return Forks(
        np.array([owner for owner, _ in found]),
        np.array(branches),
        np.array([fork for fork, _ in rows]),
        texts,
        [Prefix(trajectories[owner].prompt, chunk.prefix) for owner, chunk in found],
        [chunk.rollouts for _, chunk in found],
        logprobs,
        np.exp(logprobs / [len(text) for _, text in sources]),
        gram,
        sum(len(trajectory.completion_ids) for trajectory in trajectories),
    )


def expected_weights(forks: Forks, rewards: Array) -> Array:
    """`(R,)`, weights of the texts' gradients in that of the expected reward at each fork.

    The mean reward of the fork is subtracted. This changes nothing where the texts are all that the student can write,
    and else it is the best guess of what the others get.
    """
    probabilities = np.exp(forks.logprobs)
    mass = np.bincount(forks.fork, probabilities)
    mean = np.bincount(forks.fork, probabilities * rewards) / mass
    return probabilities * (rewards - mean[forks.fork]) / forks.num_tokens


def drawn_weights(
    forks: Forks, similarities: Array, form: str, same_chunks: bool, prior_strength: float = 1.0
) -> Array:
    """`(D, R)`, the weights of the texts' gradients in each draw: minus the gradient of the chunk loss.

    Args:
        forks: the forks.
        similarities: `(R, N)`, of each text to each rollout.
        form: one of `BASELINES`, or `LEAVE_ONE_OUT`.
        same_chunks: whether all draws have the trajectories' own chunks, or the first eight branches.
        prior_strength: alpha of Eq. 5.
    """
    of_draw = similarities[:, : NUM_DRAWS * ROLLOUTS_OF_A_DRAW].reshape(len(similarities), NUM_DRAWS, -1)
    if form == LEAVE_ONE_OUT:
        groups = forks.branches.reshape(len(forks.branches), -1, BRANCHES_OF_A_DRAW)
        weights = np.zeros((groups.shape[1], len(similarities)))
        for draw, row in enumerate(weights):
            for group in groups[:, 0 if same_chunks else draw]:
                np.add.at(row, group, leave_one_out(of_draw[group, draw].mean(-1)))
        return weights / BRANCHES_OF_A_DRAW / forks.num_tokens
    chosen = np.repeat(forks.branches[:, :1], NUM_DRAWS, axis=1) if same_chunks else forks.branches[:, :NUM_DRAWS]
    draws = np.arange(NUM_DRAWS)
    posteriors = posterior_mean(
        torch.from_numpy(of_draw[chosen, draws].sum(-1)),
        ROLLOUTS_OF_A_DRAW,
        torch.from_numpy(forks.priors[chosen]),
        prior_strength,
    )
    weights = np.zeros((NUM_DRAWS, len(similarities)))
    for draw in draws:
        # The average of earlier batches, which do not depend on this draw.
        earlier = posteriors[:, draws != draw].mean().item()
        chunks = StepChunks(posteriors[:, draw], torch.from_numpy(forks.trajectories), moving_average=earlier)
        weights[draw, chosen[:, draw]] = get_chunk_weights(form)(chunks).numpy()
    return weights / forks.num_tokens


def moments(forks: Forks, weights: Array, expected: Array) -> dict[str, float]:
    """Squared norm of the mean gradient, trace of the covariance, and cosines with the expected gradient.

    Args:
        forks: the forks.
        weights: `(D, R)`, of each draw.
        expected: `(R,)`, of the expected gradient.
    """
    mean = weights.mean(0)
    trace = np.einsum("dr,rs,ds->", weights - mean, forks.gram, weights - mean) / (len(weights) - 1)
    along = weights @ forks.gram @ expected / np.sqrt(expected @ forks.gram @ expected)
    norms = np.sqrt(np.einsum("dr,rs,ds->d", weights, forks.gram, weights))
    cosines = np.divide(along, norms, out=np.zeros_like(along), where=norms > 0)  # 0 for a draw without a gradient
    norm = mean @ forks.gram @ mean
    return {
        # The noise of the draws that are left in their mean is subtracted.
        "squared_norm": float(max(norm - trace / len(weights), 0.0)),
        "trace": float(trace),
        "cosine_of_mean": float(along.mean() / np.sqrt(norm)),
        "cosine_of_draw": float(cosines.mean()),
    }


def measure(run: Run, similarities: Sequence[str]) -> dict[str, Any]:
    """The moments of each similarity, noise and form, as means over the recorded batches."""
    settings = run.settings
    model = AutoModelForCausalLM.from_pretrained(asset_path("student"), dtype=torch.float32)
    teacher = LocalTeacher(settings["teacher_model_name_or_path"])
    audits = list(read_audits(run.folder, list_audits(run.folder)))
    batches = [collect(model, list(group)) for _, group in groupby(audits, key=lambda audit: audit.step)]
    rows = []
    for name in similarities:
        found: dict[tuple[str, str], list[dict[str, float]]] = {}
        for forks in batches:
            table = forks.similarities(name)
            rewards = table[:, -HELD_OUT:].mean(-1)
            if name == "exact":
                prefixes = [forks.prefixes[fork] for fork in forks.fork]
                logprobs = teacher.logprobs(prefixes, forks.texts, settings["teacher_temperature"])
                rewards = true_support([row.numpy() for row in logprobs], "total")
            expected = expected_weights(forks, rewards)
            for varies in ("rollouts", "chunks and rollouts"):
                for form in (*BASELINES, LEAVE_ONE_OUT):
                    weights = drawn_weights(forks, table, form, varies == "rollouts", settings["prior_strength"])
                    found.setdefault((varies, form), []).append(moments(forks, weights, expected))
        for (varies, form), measured in found.items():
            means = {key: float(np.mean([each[key] for each in measured])) for key in measured[0]}
            rows.append({"similarity": name, "varies": varies, "form": form, **means})
    return {
        "teacher": without_folders(settings["teacher_model_name_or_path"]),
        "num_batches": len(batches),
        "num_trajectories": len(audits),
        "num_forks": sum(len(forks.branches) for forks in batches),
        "share_agreed": float(np.mean([log["branches/agreed"] for log in run.logs if "branches/agreed" in log])),
        "mass": float(np.mean(np.concatenate([np.bincount(f.fork, np.exp(f.logprobs)) for f in batches]))),
        "rows": rows,
    }


def main() -> None:
    """Record a run, and write what its gradients show."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE")
    parser.add_argument("--similarities", nargs="+", default=["exact", "edit", "rouge1"], metavar="NAME")
    parser.add_argument("--num_batches", type=int, default=1)
    parser.add_argument("extra", nargs="*", metavar="OPTION", help="options of the recorded run, after `--`")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        record(Path(folder), options.num_batches, options.extra)
        results = measure(Run(folder), options.similarities)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    write_json(options.output, results)


if __name__ == "__main__":
    main()
