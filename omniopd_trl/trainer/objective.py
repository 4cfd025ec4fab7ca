# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""The forward passes: the scores of the policy, and the loss of a micro-batch (Eq. 8)."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import is_peft_model
from torch import nn
from transformers import PreTrainedModel

from omniopd_trl.audits.types import PolicyScores
from omniopd_trl.errors import ConfigError, WarnOnce
from omniopd_trl.method.importance import importance_weights
from omniopd_trl.method.loss import chunk_loss, combine
from omniopd_trl.models.lm_head import LMHead, kl_to_reference, lm_head_of, log_kept_mass, logprobs_of
from omniopd_trl.models.prefix_tree import why_no_tree
from omniopd_trl.models.reference import Reference
from omniopd_trl.models.tree_attention import (
    attention_kernels,
    attention_window,
    last_hidden_states,
    sampling_attention,
    why_not_packed,
)
from omniopd_trl.trainer.batches import BranchedBatch, PackedBatch
from omniopd_trl.trainer.omniopd_config import OmniOPDConfig

# The sum and the count of each metric that is averaged over tokens, `(2,)`, by name.
Sums = dict[str, torch.Tensor]


class Objective:
    """The computations with the student and the reference, under any back end.

    Args:
        reference: the frozen initial student, for the anchor and for `prior="reference"`.
        temperature: sampling temperature of the student. All distributions are computed at this temperature.
        accelerator: accelerator of the run.
        args: configuration of the run.
        pad_token_id: padding token of the student's tokenizer.
        redirect: TRL's forward redirection, which calls a function inside the forward of a wrapped model.
        hidden_states: TRL's function from `(model, input_ids, attention_mask, length)` to the last `length` hidden
            states that predict a token, `(B, length, H)`.
    """

    def __init__(
        self,
        reference: Reference,
        temperature: float,
        *,
        accelerator: Accelerator,
        args: OmniOPDConfig,
        pad_token_id: int,
        redirect: Callable[..., Any],
        hidden_states: Callable[..., torch.Tensor],
    ):
        self.reference = reference
        self.temperature = temperature
        self._accelerator = accelerator
        self._args = args
        self._filters = args.corrected_filters
        self._pad_token_id = pad_token_id
        self._redirect = redirect
        self._last_hidden_states = hidden_states
        plugins = ("deepspeed_plugin", "fsdp_plugin")
        self._why_apart = ""  # why branches are not packed
        self._checked = 0  # length of the longest packed row with which this was checked
        self._why_no_tree: str | None = None  # why they are not sampled from one cache; "" if they are
        self._warn_once = WarnOnce(__name__)
        self.is_sharded = any(getattr(accelerator.state, plugin, None) is not None for plugin in plugins)

    @torch.no_grad()
    def score(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> PolicyScores:
        """Score completions under the policy that sampled them, without dropout and at the sampling temperature.

        Args:
            model: the student, wrapped by the back end.
            batch: a batch with the keys `TOKEN_KEYS`.

        Returns:
            The scores as float32 tensors `(B, T)`, with 0 on padding.
        """
        tokens = self._packed(batch)
        where = batch["completion_mask"].bool()
        scores = torch.zeros(3, *where.shape, device=where.device)

        def project(model: PreTrainedModel) -> tuple[torch.Tensor, torch.Tensor]:
            hidden = self._hidden_states(model, tokens)
            with lm_head_of(model) as head:
                logprobs, entropy = self._project(hidden, head, tokens, tokens.completion)
            return logprobs.to(scores), entropy.to(scores)

        def score_reference(reference: PreTrainedModel) -> None:
            scores[2, where], _ = project(reference)

        def body(student: PreTrainedModel) -> None:
            scores[0, where], scores[1, where] = project(student)
            scores[2] = scores[0]
            if self._args.prior == "reference" and self._args.prior_strength > 0:
                self.run_reference(student, score_reference)

        with evaluation_mode(self._accelerator.unwrap_model(model)):
            self._inside_forward(model, body)
        return PolicyScores(*scores)

    def compare_with_forward(
        self, model: nn.Module, input_ids: torch.Tensor, num_ranks: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Log-probabilities as the model's own forward computes them, and as this class does.

        Args:
            model: the student, wrapped by the back end.
            input_ids: one sequence without padding, `(1, L)`.
            num_ranks: number of tokens to compare per position. They are at evenly spaced ranks, from the most to the
                least likely token of the model's own forward.

        Returns:
            Token ids, their log-probabilities by the model's own forward, and those by this class, each
            `(L - 1, num_ranks)`. The last have a graph, except those of a sharded model.

        Raises:
            ConfigError: when the hidden states, the LM head and the logits do not fit together.
        """
        mask = torch.ones_like(input_ids)
        found: list[torch.Tensor] = []

        def body(student: PreTrainedModel) -> None:
            plain = student.get_base_model() if is_peft_model(student) else student
            with torch.no_grad():
                # Not called as a module: the hooks of FSDP2 would run a second time.
                own = plain.forward(input_ids=input_ids, attention_mask=mask, use_cache=False).logits[0, :-1].float()
            own = (own / self.temperature).log_softmax(-1)
            ranks = torch.linspace(0, own.size(-1) - 1, num_ranks, device=own.device).long()
            tokens = own.argsort(descending=True)[:, ranks]
            hidden = self._last_hidden_states(student, input_ids, mask, input_ids.size(1) - 1)[0]
            with lm_head_of(student) as head:
                expected = (own.size(-1), hidden.size(-1))
                if head.weight.shape != expected:
                    raise ConfigError(
                        f"The LM head of the student, a {type(plain).__name__}, has a weight of shape "
                        f"{tuple(head.weight.shape)}, but its hidden states and logits need {expected}: its forward "
                        "changes them before or after the head, or the head is quantized, which the objective does "
                        "not support. Use another student."
                    )
                hidden = hidden.repeat_interleave(num_ranks, 0).to(head.weight.device)
                targets = tokens.flatten().to(head.weight.device)
                ours, _ = logprobs_of(hidden, head, targets, self.temperature)
            found.extend((tokens, own.gather(1, tokens), ours.view_as(tokens).to(own.device)))

        with evaluation_mode(self._accelerator.unwrap_model(model)), torch.set_grad_enabled(not self.is_sharded):
            self._inside_forward(model, body)
        tokens, own, ours = found
        return tokens, own, ours

    def loss(self, model: nn.Module, batch: dict[str, Any]) -> tuple[torch.Tensor, Sums]:
        """The loss of one micro-batch (Eq. 8), scaled so that it adds up to the loss of the global batch.

        Args:
            model: the student, wrapped by the back end. Its training mode tells a training batch from an evaluation
                batch.
            batch: a batch with the keys `TOKEN_KEYS`. A training batch also holds `num_items_in_batch` and the other
                counts over the global batch; an evaluation batch is normalized by its own counts. With the key
                `importance`, its `weights` and `advantages` hold importance weights. With branches or imitation,
                `suffixes` holds what is trained of branches and rollouts besides the trajectories, and `imitation` the
                weights `(B, T)` of the trajectories' tokens in the imitation loss. With a verifier, `advantages` holds
                the weight of each token in its policy gradient.

        Returns:
            The loss, a scalar tensor with its graph, and the sums of the metrics `kl/unaudited`, `kl/audited`,
            `entropy`, with branches `chunk_loss`, with imitation `imitation/loss` and `imitation/tokens`, and with
            filters `sampling/importance_sampling_ratio/mean`.
        """
        is_train = model.training
        tokens = self._packed(batch)
        sums: Sums = {}
        kept: list[torch.Tensor] = []

        def body(student: PreTrainedModel) -> torch.Tensor:
            loss = self.evaluate(student, tokens, batch, is_train, sums)
            kept.append(loss.detach())
            return loss

        loss = self._inside_forward(model, body)
        # FSDP2 rounds the result to bf16. Take the gradient from the result, and the value from before the rounding.
        return loss + (kept[0] - loss.detach()), sums

    def evaluate(
        self, student: PreTrainedModel, tokens: PackedBatch, batch: dict[str, Any], is_train: bool, sums: Sums
    ) -> torch.Tensor:
        """The part of [`loss`] that runs inside the student's forward.

        Args:
            student: the unwrapped student.
            tokens: the packed micro-batch.
            batch: the same micro-batch in TRL's format.
            is_train: whether the micro-batch is part of an optimizer step.
            sums: sums of the metrics; filled by this method.

        Returns:
            The loss, a scalar tensor.
        """
        branched = None
        if "suffixes" in batch:
            branched = self._branched(student, tokens, batch)
            states = last_hidden_states(student, branched.input_ids, branched.attention_mask, branched.position_ids)
            hidden = states[: len(tokens.input_ids), : tokens.targets.size(1)]
        else:
            hidden = self._hidden_states(student, tokens)
        with lm_head_of(student) as head:
            device = head.weight.device
            hidden = hidden.to(device)
            parts = (hidden, tokens.targets, tokens.weights, tokens.advantages, tokens.imitation)
            trained = (part[tokens.trained].to(device) for part in parts)
            if branched is not None:
                # Rewards are those of trajectories.
                rest = (branched.weights, torch.zeros_like(branched.weights), branched.imitation)
                added = (states[tuple(branched.predictors)], branched.targets, *rest)
                trained = (torch.cat([own, other.to(device)]) for own, other in zip(trained, added, strict=True))
            predictors, targets, weights, advantages, imitation = trained
            logprobs, _ = logprobs_of(predictors, head, targets, self.temperature)
            num_own = int(tokens.trained.sum())
            of_audited = logprobs[:num_own][tokens.audited[tokens.trained].to(device)].detach()
            if branched is not None and "importance" in batch:
                sampled, clip_max = branched.sampling_logprobs, self._args.importance_sampling_clip_max
                weights[num_own:] *= importance_weights(logprobs[num_own:], sampled.to(device), clip_max)
            chunk_sum, reward_sum = self._policy_losses(
                predictors, head, targets, [weights, advantages], logprobs, "importance" in batch, sums
            )
            if branched is not None:
                sums["chunk_loss"] = torch.stack([chunk_sum.detach(), chunk_sum.new_tensor(len(of_audited))])
            if "imitation" in batch:
                # Nobody sampled these tokens: no ratio, and the log-probabilities are those without filters.
                imitation_sum = chunk_loss(logprobs, imitation)
                sums["imitation/loss"] = torch.stack([imitation_sum.detach(), imitation.sum()])
                of_step = self._accelerator.num_processes * self._args.gradient_accumulation_steps
                sums["imitation/tokens"] = imitation.new_tensor([imitation.count_nonzero(), 1 / of_step])
                chunk_sum = chunk_sum + imitation_sum
            kl_sum = torch.zeros_like(chunk_sum)
            if self._args.beta > 0:
                kl_sum = self._anchor(student, tokens, hidden, head, of_audited, sums)
            elif not is_train and not self._args.audit_eval:
                _, entropy = self._project(hidden, head, tokens, tokens.completion)
                sums["entropy"] = _sum_and_count(entropy)
        # A training micro-batch is part of a global batch; an evaluation batch is normalized by itself.
        num_processes = self._accelerator.num_processes if is_train else 1
        num_micro_batches = self._args.gradient_accumulation_steps if is_train else 1
        local = {"num_audited": tokens.audited.sum(), "num_unaudited": tokens.unaudited.sum()}
        counts = {key: batch.get(key, value).to(hidden.device) for key, value in local.items()}
        num_sequences = tokens.input_ids.size(0) * num_processes * num_micro_batches
        loss = combine(
            chunk_sum,
            kl_sum,
            beta=self._args.beta,
            normalization=self._args.loss_normalization,
            num_tokens=(batch["num_items_in_batch"] if is_train else tokens.completion.sum()).to(hidden.device),
            num_sequences=batch.get("num_sequences", num_sequences),
            reward_sum=reward_sum,
            **counts,
        )
        # The back end averages gradients over processes, so each share is multiplied by their number.
        return loss * num_processes

    def _policy_losses(
        self,
        hidden: torch.Tensor,
        head: LMHead,
        targets: torch.Tensor,
        weights: list[torch.Tensor],
        logprobs: torch.Tensor,
        is_weighted: bool,
        sums: Sums,
    ) -> list[torch.Tensor]:
        """The first term of Eq. 8 over N tokens, for each of several weights.

        With sampling filters, it is that of the filtered policy.

        `hidden` is `(N, H)`, the other tensors are `(N,)`. `is_weighted` tells whether the weights hold the importance
        weights already. They are known otherwise when the policy itself is filtered: the ratio of its probability to
        the sampler's is the probability that is kept.
        """
        if self._filters is None:
            return [chunk_loss(logprobs, one) for one in weights]
        log_mass = log_kept_mass(hidden, head, targets, self.temperature, self._filters)
        if not is_weighted:
            ratio = log_mass.detach().exp()  # at most 1, so nothing to truncate
            is_sampled = torch.stack(weights).ne(0).any(0)  # imitated tokens are not
            sums["sampling/importance_sampling_ratio/mean"] = _sum_and_count(ratio[is_sampled])
            weights = [one * ratio for one in weights]
        return [chunk_loss(logprobs - log_mass, one) for one in weights]

    def _branched(self, student: PreTrainedModel, tokens: PackedBatch, batch: dict[str, Any]) -> BranchedBatch:
        """The batch with its branches and imitated rollouts, packed if the student can."""
        lengths = batch["prompt_mask"].sum(1).tolist()
        rows = partial(BranchedBatch.of, tokens, lengths, batch["suffixes"], self._pad_token_id)
        packed, window, width = rows(is_packed=True), attention_window(student), tokens.input_ids.size(1)
        length = torch.tensor([packed.input_ids.size(1)], device=tokens.input_ids.device)
        if self.is_sharded:  # a forward pass needs all processes
            length = self._accelerator.gather(length)
        if int(length.max()) > self._checked:
            self._checked = int(length.max())
            text = tokens.input_ids[tokens.attention_mask.sum(1).argmax()].tolist()[:window]
            with evaluation_mode(student):
                self._why_apart = why_not_packed(student, text, self._checked) or self._why_apart
        reason = self._why_apart
        if not reason and window is not None and width > window:
            reason = f"a row of {width} tokens is longer than the attention window of {window}"
        if not reason:
            return packed
        if self._accelerator.is_main_process:
            self._warn_once(
                f"Each {'branch' if self._args.num_branches else 'imitated rollout'} is computed in a row that begins "
                f"with its prefix, since {reason}. This is exact, but takes more time and memory than one row with "
                "its trajectory.",
                "branches",
            )
        return rows(is_packed=False)

    def continues_trees(self, model: nn.Module) -> bool:
        """Whether branches can be sampled from the keys and values of their trajectory. It is said once if not.

        Args:
            model: the student, wrapped by the back end. Every process has to call this at the same point.
        """

        def body(student: PreTrainedModel) -> None:
            plain = student.get_base_model() if is_peft_model(student) else student
            # Not called as a module: the hooks of FSDP2 would run a second time.
            with sampling_attention(plain):
                self._why_no_tree = why_no_tree(plain, plain.forward) or ""

        if self._why_no_tree is None:
            with evaluation_mode(self._accelerator.unwrap_model(model)):
                self._inside_forward(model, body)
            if self._why_no_tree and self._accelerator.is_main_process:
                self._warn_once(
                    f"Each branch is sampled from its whole prefix, since {self._why_no_tree}. This takes more time "
                    "and memory than one cache for all branches of a trajectory.",
                    "tree",
                )
        return not self._why_no_tree

    def run_reference(self, student: PreTrainedModel, body: Callable[[PreTrainedModel], None]) -> None:
        """Run `body(reference model)` without gradients and dropout.

        Args:
            student: the unwrapped student, inside its forward. Under PEFT, it is the reference with other adapters.
            body: function of the reference model; it stores its results in a closure.
        """
        reference = self.reference
        with torch.no_grad():
            if reference.model is not None:
                with reference.offloaded.on_device() if reference.offloaded is not None else nullcontext():
                    self._inside_forward(reference.model, body)
                return
            with reference.lent_by(student), evaluation_mode(student):
                body(student)

    def _inside_forward(self, model: nn.Module, body: Callable[[PreTrainedModel], Any]) -> Any:
        """Run `body(unwrapped model)` inside the wrapper's forward, where sharded parameters are gathered.

        Mixed precision has to be entered here, since the redirection replaces the forward that accelerate wrapped.
        Tensors are passed through closures, since FSDP2 rounds every float among the arguments and results.
        """
        unwrapped = self._accelerator.unwrap_model(model)

        def run(_: None) -> Any:
            with self._accelerator.autocast(), attention_kernels(unwrapped):
                return body(unwrapped)

        # On a GPU, FSDP2 of torch before 2.13 fails when it is called without an argument.
        return self._redirect(model, unwrapped, run, None)

    def _packed(self, batch: dict[str, Any]) -> PackedBatch:
        return PackedBatch.of(batch, self._pad_token_id, self._args.pad_to_multiple_of)

    def _hidden_states(self, model: PreTrainedModel, tokens: PackedBatch) -> torch.Tensor:
        """Hidden states that predict `tokens.targets`, `(B, L - 1, H)`."""
        return self._last_hidden_states(model, tokens.input_ids, tokens.attention_mask, tokens.input_ids.size(1) - 1)

    def _project(
        self, hidden: torch.Tensor, head: LMHead, tokens: PackedBatch, where: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities and entropies of the N targets at `where`, `(N,)`; `hidden` is `(B, L - 1, H)`."""
        return logprobs_of(
            hidden[where].to(head.weight.device),
            head,
            tokens.targets[where].to(head.weight.device),
            self.temperature,
        )

    def _anchor(
        self,
        student: PreTrainedModel,
        tokens: PackedBatch,
        hidden: torch.Tensor,
        head: LMHead,
        logprobs: torch.Tensor,
        sums: Sums,
    ) -> torch.Tensor:
        """Sum of the exact `KL(ref || theta)` over un-audited tokens, in nats.

        `logprobs` are the student's log-probabilities on audited tokens, for the metric `kl/audited`.
        """
        unaudited = tokens.unaudited
        # A trajectory without un-audited tokens needs no reference. Sharded models run it nevertheless, since every
        # process has to take part.
        has_unaudited = unaudited.any(1)
        computed = torch.ones_like(has_unaudited) if self.is_sharded else has_unaudited
        if not computed.any():
            return hidden.sum() * 0.0
        rows = tokens.select(computed)
        reference: dict[str, Any] = {}

        def run(model: PreTrainedModel) -> None:
            states = self._hidden_states(model, rows)
            with lm_head_of(model) as ref_head:
                reference["head"] = self.reference.kept(ref_head)
                reference["hidden"] = states[unaudited[computed]].to(hidden.device)
                reference["logprobs"], _ = self._project(states, ref_head, rows, rows.audited)

        self.run_reference(student, run)
        kl, entropy = kl_to_reference(
            hidden[unaudited], head, reference["hidden"], reference["head"], self.temperature
        )
        sums["kl/unaudited"] = _sum_and_count(kl.detach())
        # The metric counts the same trajectories under any back end.
        counted = has_unaudited[:, None].expand_as(tokens.audited)
        theirs = reference["logprobs"].to(logprobs)[counted[computed][rows.audited]]
        sums["kl/audited"] = _sum_and_count(_sampled_kl(theirs - logprobs[counted[tokens.audited]]))
        if not student.training and not self._args.audit_eval:
            sums["entropy"] = _sum_and_count(entropy)
        return kl.sum()


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Context without dropout, for sampling, for scoring and for the reference."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _sum_and_count(values: torch.Tensor) -> torch.Tensor:
    return torch.stack([values.sum(), values.new_tensor(values.numel())])


def _sampled_kl(log_ratio: torch.Tensor) -> torch.Tensor:
    """An estimate of `KL(ref || theta)` at each token that theta sampled, `(N,)`, in nats.

    With `r = ref / theta` at the sampled token, `E_theta[r log r - r + 1] = KL(ref || theta)`, and no term is
    negative. The exact value would project the student's audited tokens a second time.
    """
    return log_ratio.exp() * log_ratio - torch.expm1(log_ratio)
