# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Metrics of a run, as ratios of sums over processes and micro-batches, and warnings that are logged once."""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from trl.trainer.utils import nanstd

from omniopd_trl.accounting.budget import Budget
from omniopd_trl.audits.auditor import TEACHER_TOKENS_PER_STUDENT_TOKEN
from omniopd_trl.audits.types import Audit, PolicyScores, Trajectory
from omniopd_trl.errors import NonFiniteError, WarnOnce
from omniopd_trl.evals.copying import num_quotes
from omniopd_trl.journal.schema import Shown
from omniopd_trl.method.branches import diversity, leave_one_out
from omniopd_trl.models.vllm_logprobs import LARGE_DIFFERENCE, sampling_difference
from omniopd_trl.report.runs import text_of_prompt
from omniopd_trl.teachers import OUTCOMES, Usage
from omniopd_trl.teachers.base import REQUEST_MILLISECONDS
from omniopd_trl.trainer.omniopd_config import OmniOPDConfig

# In nats per token. Rounding in bfloat16 gives about 1e-4 for a student that equals its reference.
LARGE_FIRST_KL = 0.05

# A warning is logged after this many steps in a row without a signal.
STEPS_WITHOUT_SIGNAL = 5
# A step has no signal when the posteriors of its chunks have a smaller standard deviation than this: the prior alone
# gives about 0.02 with ten rollouts.
LEAST_SPREAD = 0.02
# Without a baseline also when it is smaller than this share of their mean. The update is then the mean weight times
# the score of the student's own tokens, which is noise, with more than 40 times the variance of the rest. In the demo,
# the share is 0.56 with a similarity that learns and 0.10 with one that needs a baseline.
LEAST_RELATIVE_SPREAD = 0.15

# Rollouts of at least this many characters. Equal shorter ones may be the only way to continue.
LONG_ROLLOUT = 40
# An anchor with less entropy, in nats, is hardly a choice: the student writes the same token nearly always.
LOW_ENTROPY = 0.1

# A warning is logged when more of the long rollouts of a batch are duplicates.
MANY_DUPLICATES = 0.8
# A warning is logged when more of the rollouts of a batch cannot be imitated.
MANY_LEFT_OUT = 0.2


def metric_dtype(device: torch.device) -> torch.dtype:
    """The widest float type of a device: Apple's GPUs have no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def sum_over_processes(accelerator: Accelerator, *values: float) -> list[float]:
    """Each value, summed over processes. Every process has to call it with the same number of values."""
    local = torch.tensor([values], dtype=metric_dtype(accelerator.device), device=accelerator.device)
    return accelerator.gather(local).sum(0).tolist()


class Metrics:
    """Metrics and warnings of training and evaluation. Most metrics are ratios of sums.

    Every process has to call each method at the same point.

    Args:
        accelerator: accelerator of the run.
        args: configuration of the run.
        logged: TRL's lists of values by mode and name. TRL averages them when it logs.
        step: function that returns the current optimizer step.
        budget: budget of the teacher; `None` if it has none.
        custom_weights: whether a custom function turns the posteriors into weights.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        args: OmniOPDConfig,
        logged: dict[str, defaultdict[str, list[float]]],
        step: Callable[[], int],
        budget: Budget | None = None,
        custom_weights: bool = False,
    ):
        self._accelerator = accelerator
        self._args = args
        self._logged = logged
        self._step = step
        self._sums: dict[str, defaultdict[str, list[float]]] = {
            "train": defaultdict(lambda: [0.0, 0.0]),
            "eval": defaultdict(lambda: [0.0, 0.0]),
        }
        self._warn_once = WarnOnce(__name__)
        # Trajectories that are audited, and number, sum and sum of squares of the posteriors, of the current step or
        # evaluation batch, over all processes.
        self._posteriors = [0.0] * 4
        self._without_signal = 0  # steps in a row
        self._is_plain = args.posterior_baseline == "none" and not custom_weights
        self._budget = budget
        self._has_price = budget is not None and budget.price is not None
        self._usd_counted, _ = self._spent()

    def add(self, mode: str, ratios: dict[str, tuple[float, float]], *others: float) -> list[float]:
        """Add numerators and denominators, summed over processes. Every process has to pass the same names.

        Returns:
            `others`, summed over processes in the same exchange.
        """
        numbers = (number for ratio in ratios.values() for number in ratio)
        totals = sum_over_processes(self._accelerator, *others, *numbers)
        first = len(others)
        for name, numerator, denominator in zip(ratios, totals[first::2], totals[first + 1 :: 2], strict=True):
            self.add_global(mode, name, numerator, denominator)
        return totals[:first]

    def add_global(self, mode: str, name: str, numerator: float, denominator: float) -> None:
        """Add a numerator and a denominator that are already summed over processes."""
        entry = self._sums[mode][name]
        entry[0] += numerator
        entry[1] += denominator

    def add_losses(self, mode: str, loss: torch.Tensor, sums: dict[str, torch.Tensor]) -> None:
        """Add the loss and the sums that [`Objective`] returns for a micro-batch.

        Raises:
            NonFiniteError: on every process, when the loss of one process is not finite.
        """
        names: tuple[str, ...] = ("kl/unaudited", "kl/audited", "entropy", "sampling/importance_sampling_ratio/mean")
        if mode == "train" and self._args.num_branches:
            names = (*names, "chunk_loss")
        if mode == "train" and self._args.rollout_imitation:
            names = (*names, "imitation/loss", "imitation/tokens")
        ratios = {name: tuple(sums[name].tolist()) if name in sums else (0.0, 0.0) for name in names}
        (failed,) = self.add(mode, ratios, float(not loss.isfinite()))
        if failed:
            raise non_finite("the loss", self._step())
        kl, count = ratios["kl/unaudited"]
        if mode == "train" and self._step() == 0 and count and kl / count > LARGE_FIRST_KL:
            self._warn_once(
                f"Before the first update the student is {kl / count:.3g} nats per token away from its reference, "
                "which should be the same model. One cause is dropout: set disable_dropout=True; attention dropout "
                "is set in the model's configuration (model_init_kwargs={'attention_dropout': 0.0}). Another cause is "
                "`ref_model_init_kwargs` that load a different model: the anchor then pulls towards that model "
                "instead of the initial student.",
                "first kl",
            )

    def add_audits(
        self,
        mode: str,
        audits: list[Audit],
        scores: list[PolicyScores],
        waited: float,
        is_remote: bool,
        is_last: bool = True,
        num_left_out: int = 0,
    ) -> None:
        """Add the audits of a batch or micro-batch; see [`audit_ratios`].

        `is_last` tells whether this is the end of the generation batch. `num_left_out` of the trajectories were left
        out by `audit_trajectories`.
        """
        num_processes = self._accelerator.num_processes
        per_step = len(audits)
        if mode == "train":
            per_step = self._args.per_device_train_batch_size * self._args.gradient_accumulation_steps
        steps = len(audits) / per_step / num_processes
        ratios = audit_ratios(audits, scores, waited, steps, num_processes, is_remote)
        is_branched = mode == "train" and self._args.num_branches > 0
        if is_branched:
            ratios = {name: ratio for name, ratio in ratios.items() if name not in OF_POSTERIORS}
            ratios |= branch_ratios(audits)
        if self._args.signal != "rollouts":
            ratios |= judge_ratios(audits)
        if self._args.first_rollouts:
            ratios |= stopping_ratios(audits, self._args.first_rollouts)
        usd, tokens = self._spent()
        if self._has_price:
            ratios["teacher/usd"] = (usd - self._usd_counted, steps)
        self._usd_counted = usd
        signal = [chunk.posterior for audit in audits for chunk in audit.chunks]
        if is_branched:
            forks = [[b.similarity or 0.0 for b in chunk.branches] for audit in audits for chunk in audit.chunks]
            # Not divided by their deviation: with `scale_advantages` that of all forks is nearly the same number.
            signal = [advantage for similarities in forks for advantage in leave_one_out(similarities)]
        num_chosen = len(audits) - num_left_out
        moments = (num_chosen, len(signal), sum(signal), sum(value * value for value in signal))
        all_usd, all_tokens, *totals = self.add(mode, ratios, usd, tokens, *moments)
        if mode == "train":
            self._logged[mode] |= {name: [value] for name, value in self._balance(all_usd, all_tokens).items()}
        self._posteriors = [known + new for known, new in zip(self._posteriors, totals, strict=True)]
        if is_last:
            self._add_spread(mode, is_branched)
        for kind, message in audit_warnings(audits, self._args):
            self._warn_once(message, kind)

    def _add_spread(self, mode: str, is_branched: bool) -> None:
        """Add the standard deviation of the posteriors of a step, and warn when it stays too small to learn from.

        With branches, it is that of the advantages before `scale_advantages` divides them, in units of similarity.
        """
        (num_chosen, count, total, squares), self._posteriors = self._posteriors, [0.0] * 4
        if num_chosen and not count:
            self._warn_once(self._why_no_chunks(), "no chunks")
        if count < 2:
            return
        mean = total / count
        spread = math.sqrt(max(squares / count - mean * mean, 0.0))
        self.add_global(mode, "branches/advantage_std" if is_branched else "audit/posterior_std", spread, 1)
        if mode != "train":
            return
        is_plain = self._is_plain and not is_branched
        least = max(LEAST_SPREAD, LEAST_RELATIVE_SPREAD * mean if is_plain else 0.0)
        if is_branched and self._args.scale_advantages:
            least = 0.0  # small differences weigh as much as others
        self._without_signal = self._without_signal + 1 if spread <= least else 0
        if self._without_signal < STEPS_WITHOUT_SIGNAL:
            return
        baseline = "posterior_baseline='batch', " if is_plain and spread >= LEAST_SPREAD else ""
        what = "advantages of the branches" if is_branched else "posteriors of the chunks"
        self._warn_once(
            f"For {STEPS_WITHOUT_SIGNAL} steps the {what} have hardly differed: at step "
            f"{self._step()} their standard deviation is {spread:.3g} around a mean of {mean:.3g}. All get "
            "almost the same weight, and the student learns little. Inspect the rollouts, and try the following: "
            f"{baseline}another `similarity` or `chunk_length`, or a teacher whose style is closer to the student's. "
            "See docs/metrics.md.",
            "no signal",
        )

    def _why_no_chunks(self) -> str:
        args = self._args
        agreed = ", or the branches of each fork have one text" if args.num_branches else ""
        rewards = " and the rewards" if args.reward_weight else ""
        return (
            f"No chunk of a batch could be audited at step {self._step()}: the completions are shorter than "
            f"min_chunk_length={args.min_chunk_length} tokens, or no token's entropy is above "
            f"min_anchor_entropy={args.min_anchor_entropy:g}, or all were truncated and mask_truncated_completions "
            f"excludes them{agreed}, or the teacher returned nothing. Such a batch trains on the KL anchor{rewards} "
            "only."
        )

    def _spent(self) -> tuple[float, int]:
        """US dollars and tokens that count against the budget of this process in this run; 0 without a budget."""
        budget = self._budget
        if budget is None:
            return 0.0, 0
        return budget.usd_spent - budget.usd_before, budget.tokens_spent - budget.tokens_before

    def _balance(self, usd: float, tokens: float) -> dict[str, float]:
        """What the job has spent, and what is left of its limits, when all processes of this run have spent this."""
        budget, balance = self._budget, {}
        if budget is not None and self._has_price:
            balance["teacher/usd_total"] = budget.usd_before + usd
            if budget.max_usd is not None:
                balance["teacher/usd_left"] = max(budget.max_usd - budget.usd_before - usd, 0.0)
        if budget is not None and budget.max_tokens is not None:
            balance["teacher/tokens_left"] = max(budget.max_tokens - budget.tokens_before - tokens, 0.0)
        return balance

    def dollars(self) -> tuple[float, float] | None:
        """US dollars that this run has spent, and with all earlier runs in its folder, over all processes.

        `None` without a price. Every process has to call it at the same point.
        """
        if self._budget is None or not self._has_price:
            return None
        (usd,) = sum_over_processes(self._accelerator, self._spent()[0])
        return usd, self._budget.usd_before + usd

    def add_sampling(self, mode: str, sampled: torch.Tensor, logprobs: torch.Tensor) -> None:
        """Add how well the student that vLLM runs matches the trained student.

        Args:
            mode: `"train"` or `"eval"`.
            sampled: `(B, T)`, log-probabilities of vLLM when it sampled, in nats, NaN where there are none.
            logprobs: `(B, T)`, log-probabilities of the student, in nats, NaN where there are none.
        """
        # With a filter, vLLM renormalizes over the remaining tokens, so its probabilities are larger by design.
        if self._args.sampling_filters:
            return
        difference = sampling_difference(sampled, logprobs)
        total, count = sum_over_processes(self._accelerator, difference.sum().item(), len(difference))
        if not count:
            self._warn_once(
                f"vLLM returned no log-probabilities at step {self._step()}: nothing shows whether it runs the "
                "trained student, and importance_sampling_correction has no effect. See docs/generation.md.",
                "no logprobs",
            )
            return
        largest = torch.tensor([max(difference.tolist(), default=0.0)], device=self._accelerator.device)
        mean = total / count
        name = "sampling/sampling_logp_difference"
        self._logged[mode][f"{name}/mean"].append(mean)
        self._logged[mode][f"{name}/max"].append(self._accelerator.gather(largest).max().item())
        if mean > LARGE_DIFFERENCE:
            self._warn_once(
                f"The log-probabilities that vLLM sampled with at step {self._step()} differ from the "
                f"student's by {mean:.3g} nats per token on average, more than {LARGE_DIFFERENCE}: it does "
                "not run the trained student. Its weights were not updated, or its precision, its sampling "
                "settings (`generation_kwargs`) or, behind a server, `--logprobs-mode processed_logprobs` differ. "
                "See docs/generation.md.",
                "sampling",
            )

    def add_drift(self, sampled: torch.Tensor, logprobs: torch.Tensor) -> None:
        """Add how far the student is from the one that sampled the trajectories of an export.

        Args:
            sampled: `(B, T)`, log-probabilities of the policy that sampled, in nats, NaN where there are none.
            logprobs: `(B, T)`, log-probabilities of the student, in nats, NaN where there are none.
        """
        log_ratio = (logprobs - sampled)[~(logprobs - sampled).isnan()]
        # With `r = theta / sampler` at the sampled token, `E_sampler[r - 1 - log r] = KL(sampler || theta)`.
        kl = torch.expm1(log_ratio) - log_ratio
        truncated = log_ratio > math.log(self._args.importance_sampling_clip_max)
        ratios = {"off_policy/kl": kl.sum().item(), "off_policy/truncated": truncated.sum().item()}
        self.add("train", {name: (value, len(kl)) for name, value in ratios.items()})

    def add_imitation(self, shown: Sequence[Shown]) -> None:
        """Add how many of the rollouts of a batch or micro-batch could not be imitated."""
        imitated = [text for one in shown for of_chunk in one.imitated for text in of_chunk]
        left_out = imitated.count(None)
        self.add("train", {"imitation/left_out": (left_out, len(imitated))})
        if len(imitated) >= 10 and left_out > MANY_LEFT_OUT * len(imitated):
            self._warn_once(
                f"{left_out} of {len(imitated)} rollouts of a batch are not imitated at step {self._step()}: with the "
                "student's tokenizer they do not begin where the student's text ends. See docs/imitation.md.",
                "imitation",
            )

    def add_importance(self, mode: str, ratio: torch.Tensor) -> None:
        """Add truncated importance weights, `(N,)`."""
        self.add(mode, {"sampling/importance_sampling_ratio/mean": (ratio.sum().item(), len(ratio))})

    def add_rewards(
        self, names: Sequence[str], rewards: torch.Tensor, total: torch.Tensor, equal_groups: float
    ) -> None:
        """Add the rewards of a generation batch, under the names of [`~trl.GRPOTrainer`].

        Args:
            names: names of the F reward functions.
            rewards: `(N, F)`, scores of the trajectories of all processes. NaN where there is none.
            total: `(N,)`, their rewards.
            equal_groups: share of the groups whose rewards are all equal.
        """
        columns = {f"rewards/{name}/": scores for name, scores in zip(names, rewards.unbind(1), strict=True)}
        values = {f"{name}mean": scores.nanmean() for name, scores in columns.items()}
        values |= {f"{name}std": nanstd(scores) for name, scores in columns.items()}
        values |= {"reward": total.nanmean(), "reward_std": nanstd(total)}
        for name, value in values.items():
            self._logged["train"][name].append(value.item())
        self._logged["train"]["frac_reward_zero_std"].append(equal_groups)

    def take(self, mode: str) -> dict[str, Any]:
        """The metrics since the last call, TRL's own included, and start again.

        Ratios whose denominator is 0 are left out. A metric of TRL without a value is `None`, as TRL logs it.
        """
        taken: dict[str, Any] = {}
        for name, values in self._logged[mode].items():
            numbers = [value for value in values if not math.isnan(value)]
            taken[name] = sum(numbers) / len(numbers) if numbers else None
        taken |= {name: numerator / count for name, (numerator, count) in self._sums[mode].items() if count}
        self.discard(mode)
        return taken

    def discard(self, mode: str) -> None:
        """Remove what an earlier evaluation, prediction or training has left."""
        self._logged[mode].clear()
        self._sums[mode].clear()
        self._posteriors = [0.0] * 4


def non_finite(what: str, step: int) -> NonFiniteError:
    """The error to raise when numbers of the student are NaN or infinite."""
    return NonFiniteError(
        f"{what[0].upper()}{what[1:]} at step {step} hold NaN or infinity. Training stops here, "
        "since one more update would destroy the student. Go back to the last checkpoint with a lower "
        "`learning_rate` or a lower `max_grad_norm`, and check that the model is not run in float16."
    )


def audit_ratios(
    audits: list[Audit], scored: list[PolicyScores], waited: float, steps: float, num_processes: int, is_remote: bool
) -> dict[str, tuple[float, float]]:
    """Metrics of the audits of one process, as numerators and denominators.

    Args:
        audits: audits of one batch or micro-batch.
        scored: scores of the same trajectories, in nats.
        waited: time spent waiting for the audits, in seconds.
        steps: share of an optimizer step or evaluation batch, which adds up to 1 over all processes and micro-batches.
        num_processes: number of processes that wait at the same time.
        is_remote: whether the teacher is behind a service and counts the outcomes of requests.
    """
    chunks = [(s, chunk) for s, audit in zip(scored, audits, strict=True) for chunk in audit.chunks]
    num_chunks, num_tokens = len(chunks), sum(len(s.entropy) for s in scored)
    agreed = [chunk for audit in audits for chunk in audit.agreed]
    num_audited = sum(chunk.end - chunk.start for chunk in [*(c.chunk for _, c in chunks), *agreed])
    num_dropped = sum(audit.num_dropped for audit in audits)
    usage = sum((audit.usage for audit in audits), Usage())
    outcomes = sum((Counter(audit.outcomes) for audit in audits), Counter())
    num_repeated, num_repeatable = _duplicates(chunk.rollouts for _, chunk in chunks)
    anchors = [s.entropy[c.chunk.anchor].item() for s, c in chunks]
    compared = [c.similarities for _, c in chunks if c.rollouts]  # a mark is no similarity
    equal_pairs, pairs = _equal_pairs(chunk.rollouts for _, chunk in chunks)
    # The paper's form, whatever the baseline. The policy is still the one that is updated.
    loss = -sum(c.posterior * s.logprobs[c.chunk.start : c.chunk.end].sum().item() for s, c in chunks)
    return {
        "chunk_loss": (loss, num_audited),
        "entropy": (sum(s.entropy.double().sum().item() for s in scored), num_tokens),
        "audit/posterior": (sum(c.posterior for _, c in chunks), num_chunks),
        "audit/similarity": (sum(c.mean_similarity for _, c in chunks), num_chunks),
        "audit/frac_similarity_zero": (sum(max(row) <= 0.0 for row in compared), len(compared)),
        "audit/frac_similarity_one": (sum(min(row) >= 1.0 for row in compared), len(compared)),
        "audit/duplicate_rollouts": (num_repeated, num_repeatable),
        "audit/prior": (sum(c.prior for _, c in chunks), num_chunks),
        "audit/rollout_agreement": (equal_pairs, pairs),
        "audit/anchor_entropy": (sum(anchors), num_chunks),
        "audit/frac_low_entropy": (sum(entropy < LOW_ENTROPY for entropy in anchors), num_chunks),
        "audit/num_chunks": (num_chunks, len(audits)),
        "audit/audited_fraction": (num_audited, num_tokens),
        "audit/dropped_chunks": (num_dropped, num_chunks + num_dropped),
        "audit/short_rollouts": (sum(a.num_short for a in audits), sum(a.num_rollouts for a in audits)),
        "audit/set_aside_rollouts": (sum(a.num_set_aside for a in audits), steps),
        "teacher/wait_seconds": (waited, steps * num_processes),
        "teacher/prompt_tokens": (usage.prompt_tokens, steps),
        "teacher/cached_tokens": (usage.cached_tokens, steps),
        "teacher/completion_tokens": (usage.completion_tokens, steps),
        "teacher/latency": (outcomes[REQUEST_MILLISECONDS] / 1000, outcomes["requests"]),
        **{f"teacher/{name}": (outcomes[name], steps) for name in OUTCOMES if is_remote},
    }


# Metrics of what does not weight the loss of branches.
OF_POSTERIORS = ("chunk_loss", "audit/posterior", "audit/prior")


def branch_ratios(audits: list[Audit]) -> dict[str, tuple[float, float]]:
    """Metrics of the forks of one process, as numerators and denominators, in place of `OF_POSTERIORS`."""
    forks = [chunk.branches for audit in audits for chunk in audit.chunks]
    similarities = [branch.similarity or 0.0 for fork in forks for branch in fork]
    num_agreed = sum(len(audit.agreed) for audit in audits)
    num_forks = num_agreed + len(forks) + sum(audit.num_dropped for audit in audits)
    return {
        "branches/agreed": (num_agreed, num_forks),
        "branches/diversity": (sum(diversity([b.text for b in fork]) for fork in forks), len(forks)),
        "branches/similarity": (sum(similarities), len(similarities)),
    }


def stopping_ratios(audits: list[Audit], first_rollouts: int) -> dict[str, tuple[float, float]]:
    """Metrics of chunks whose first rollouts may be all, of one process, as numerators and denominators."""
    rollouts = [chunk.rollouts for audit in audits for chunk in audit.chunks if chunk.rollouts]
    stopped = sum(len(texts) == first_rollouts and not diversity(texts) for texts in rollouts)
    return {
        "audit/num_rollouts": (sum(map(len, rollouts)), len(rollouts)),
        "audit/frac_stopped": (stopped, len(rollouts)),
    }


def context_ratios(audits: list[Audit], trajectories: list[Trajectory]) -> dict[str, tuple[float, float]]:
    """The share of rollouts that quote what only the teacher saw, as numerator and denominator: `num_quotes`."""
    quoted = total = 0
    for audit, trajectory in zip(audits, trajectories, strict=True):
        prompt = text_of_prompt(trajectory.prompt)
        for chunk in audit.chunks:
            total += len(chunk.rollouts)
            quoted += num_quotes(trajectory.teacher_context or "", chunk.rollouts, f"{prompt}\n{chunk.prefix}")
    return {"rollouts/context_quoted": (quoted, total)}


def judge_ratios(audits: list[Audit]) -> dict[str, tuple[float, float]]:
    """Metrics of the marks of one process, as numerators and denominators."""
    chunks = [chunk for audit in audits for chunk in audit.chunks if chunk.mark is not None]
    answers = sum(len(audit.answers) for audit in audits)
    return {
        "judge/mark": (sum(chunk.mark or 0.0 for chunk in chunks), len(chunks)),
        "judge/frac_rollouts": (sum(bool(chunk.rollouts) for chunk in chunks), len(chunks)),
        "judge/malformed": (sum(audit.outcomes.get("malformed", 0) for audit in audits), answers),
    }


def _duplicates(chunks: Iterable[Sequence[str]]) -> tuple[int, int]:
    """The number of long rollouts that equal an earlier one of their chunk, and of those that could."""
    repeated = repeatable = 0
    for rollouts in chunks:
        long = [text for text in map(str.strip, rollouts) if len(text) >= LONG_ROLLOUT]
        repeated += len(long) - len(set(long))
        repeatable += max(len(long) - 1, 0)
    return repeated, repeatable


def _equal_pairs(chunks: Iterable[Sequence[str]]) -> tuple[int, int]:
    """The number of pairs of equal rollouts of one chunk, apart from outer white space, and that of all pairs."""
    equal = pairs = 0
    for rollouts in chunks:
        equal += sum(math.comb(count, 2) for count in Counter(map(str.strip, rollouts)).values())
        pairs += math.comb(len(rollouts), 2)
    return equal, pairs


def audit_warnings(audits: list[Audit], args: OmniOPDConfig) -> Iterator[tuple[str, str]]:
    """Warnings about the audits of a batch or micro-batch, as pairs of kind and message."""
    num_short, num_rollouts = sum(a.num_short for a in audits), sum(a.num_rollouts for a in audits)
    if num_short > 0.1 * num_rollouts:
        yield (
            "short",
            f"{num_short} of {num_rollouts} rollouts were cut off before they filled their chunk: the teacher's "
            f"tokens are shorter than {1 / TEACHER_TOKENS_PER_STUDENT_TOKEN:.2f} of a student token. Similarities are "
            "lower than they should be.",
        )
    repeated, repeatable = _duplicates(chunk.rollouts for audit in audits for chunk in audit.chunks)
    if args.teacher_temperature > 0 and repeatable >= 10 and repeated > MANY_DUPLICATES * repeatable:
        yield (
            "duplicates",
            f"{repeated} of {repeatable} longer rollouts equal an earlier one of their chunk, although "
            f"teacher_temperature={args.teacher_temperature:g}: {args.num_rollouts} rollouts count as many "
            "observations, and are one. Switch off the cache of the service or of a gateway before it, check that it "
            "samples and follows `seed`, or set num_rollouts=1 to pay for one.",
        )
    failures = [failure for audit in audits for failure in audit.failures]
    if failures:
        what = "rollouts" if args.signal == "rollouts" else "rollouts or marks"
        yield "failures", f"Some {what} are missing, for example: {failures[0]}."
