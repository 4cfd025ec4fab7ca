# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Continuations of rows that begin alike: what rows share is computed once, and kept once.

The longest rows are *trunks*. Their keys and values are computed in one forward pass, and serve all rows that begin
alike. The new tokens of all rows of a trunk are further columns of the trunk's row, with a mask for each. R trunks of
W tokens with S rows each, that get C tokens each, so take R * (W + S * C) tokens of cache instead of R * S * (W + C).
Equal rows, such as several rollouts of one prefix, are one row until they get different tokens.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from omniopd_trl.errors import first_line
from omniopd_trl.models.growing_cache import GrowingLayer
from omniopd_trl.models.tree_attention import difference_of, takes_masks, tree_mask

# Most tokens that a row may have besides those of its trunk. They are computed for each row.
MOST_OWN = 8


def cache_name(model: PreTrainedModel) -> str:
    """The argument for a cache. transformers 5.24 renamed it; the old name still works, with a warning."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def prefill(
    model: PreTrainedModel, trunks: Sequence[Sequence[int]], forward: Callable[..., Any] | None = None
) -> DynamicCache:
    """Keys and values of each trunk, right-padded. Causal masks hide the padding after a token.

    Args:
        model: a causal language model.
        trunks: token ids, at least one each.
        forward: what is called for a forward pass; the model if it is `None`.
    """
    width = max(map(len, trunks))
    padded = [[*trunk, *[trunk[-1]] * (width - len(trunk))] for trunk in trunks]
    cache = DynamicCache(config=model.config)
    (forward or model)(
        input_ids=torch.tensor(padded, device=model.device),
        use_cache=True,
        logits_to_keep=1,
        **{cache_name(model): cache},
    )
    return cache


@torch.no_grad()
def cuts_cache(model: PreTrainedModel, forward: Callable[..., Any] | None = None) -> bool:
    """Whether the model keeps keys and values of each token.

    Sliding-window and recurrent layers keep a state, and some models keep nothing.

    Args:
        model: a causal language model.
        forward: what is called for a forward pass; the model if it is `None`.
    """
    layers = DynamicCache(config=model.config).layers
    if not all(type(layer) in (DynamicLayer, GrowingLayer) for layer in layers):
        return False
    return all(layer.get_seq_length() == 2 for layer in prefill(model, [[1, 2]], forward).layers)


def find_trunks(rows: Sequence[Sequence[int]]) -> tuple[list[int], list[int], list[int]]:
    """Which rows begin alike.

    Args:
        rows: token ids of N rows, at least one each.

    Returns:
        The indices of the rows that are trunks. For each row, the number of its trunk, and how many tokens it takes
        from there. At least the last token is not taken: the first new token is sampled from its output.

    Example:
        >>> find_trunks([[5, 6], [5, 6, 7, 8], [5, 6, 7]])
        ([1], [0, 0, 0], [1, 3, 2])
    """
    trunks: list[int] = []
    width = max(map(len, rows))
    heads = torch.full((len(rows), width), -1)  # the trunks that were found so far come first
    places: dict[tuple[int, ...], tuple[int, int]] = {}
    for index in sorted(range(len(rows)), key=lambda i: -len(rows[i])):
        row = tuple(rows[index])
        if row in places:
            continue
        ids = torch.tensor(row)
        equal = (heads[: len(trunks), : len(row)] == ids).long().cumprod(1).sum(1)
        number = int(equal.argmax()) if trunks else 0
        if not trunks or len(row) - int(equal[number]) > MOST_OWN:
            number = len(trunks)
            trunks.append(index)
            heads[number, : len(row)] = ids
            shared = len(row)
        else:
            shared = int(equal[number])
        places[row] = number, min(shared, len(row) - 1)
    of_rows = [places[tuple(row)] for row in rows]
    return trunks, [number for number, _ in of_rows], [shared for _, shared in of_rows]


class PrefixTree:
    """The keys and values of rows that begin alike.

    Args:
        model: a causal language model for which [`why_no_tree`] is `None`, in evaluation mode.
        rows: token ids of N rows, at least one each.
        forward: what is called for a forward pass; the model if it is `None`.
    """

    def __init__(
        self, model: PreTrainedModel, rows: Sequence[Sequence[int]], forward: Callable[..., Any] | None = None
    ):
        self._model, self._forward = model, forward or model
        trunks, numbers, shared = find_trunks(rows)
        slots: dict[tuple[int, ...], int] = {}
        sizes = [0] * len(trunks)
        keys = [(number, *row) for number, row in zip(numbers, rows, strict=True)]
        for key in keys:
            if key not in slots:
                slots[key] = sizes[key[0]]
                sizes[key[0]] += 1
        device = model.device
        # The trunk of each row, and its slot there. Equal rows have one slot.
        self._place = torch.tensor(numbers, device=device), torch.tensor([slots[key] for key in keys], device=device)
        self._shape = len(trunks), max(sizes)  # R, S
        self._lengths = self._in_slots(torch.tensor([len(row) for row in rows], device=device))
        self._cache = prefill(model, [rows[index] for index in trunks], forward)
        width = self._cache.get_seq_length()
        in_trunk = self._in_slots(torch.tensor(shared, device=device))
        # (R, S, columns): what the next token of each slot attends to
        self._seen = torch.arange(width, device=device) < in_trunk[..., None]
        self._own = [row[taken:] for row, taken in zip(rows, shared, strict=True)]
        self._num_new = 0

    def _in_slots(self, values: torch.Tensor) -> torch.Tensor:
        """`(N, ...)` as `(R, S, ...)`, with 0 in slots without a row. Rows with one slot have equal values."""
        slots = values.new_zeros(*self._shape, *values.shape[1:])
        slots[self._place] = values
        return slots

    def first(self) -> torch.Tensor:
        """Logits of the first new token of each row, `(N, V)`."""
        device = self._model.device
        length = max(map(len, self._own))
        tokens = self._in_slots(
            torch.tensor([[0] * (length - len(own)) + list(own) for own in self._own], device=device)
        )
        sizes = self._in_slots(torch.tensor([len(own) for own in self._own], device=device))
        offset = torch.arange(length, device=device) - length  # of each token to the end of its row
        is_token = offset >= -sizes[..., None]  # (R, S, length)
        num_slots = self._shape[1]
        same = torch.eye(num_slots, dtype=torch.bool, device=device)[:, None, :, None]
        before = torch.ones(length, length, dtype=torch.bool, device=device).tril()[:, None]
        own = (same & before & is_token[:, None, None]).flatten(3)  # (R, S, length, S * length)
        mask = torch.cat([self._seen[:, :, None].expand(-1, -1, length, -1), own], -1)
        positions = (self._lengths[..., None] + offset).clamp(min=0)
        logits = self._run(tokens, positions, mask)
        self._seen = mask[:, :, -1]
        return logits

    def add(self, tokens: torch.Tensor) -> torch.Tensor:
        """Add a token to each row, `(N,)`, and return the logits of the next one, `(N, V)`."""
        self._divide(tokens)
        num_rows, num_slots = self._shape
        own = torch.eye(num_slots, dtype=torch.bool, device=tokens.device).expand(num_rows, -1, -1)
        self._seen = torch.cat([self._seen, own], -1)
        positions = self._lengths + self._num_new
        self._num_new += 1
        return self._run(self._in_slots(tokens)[..., None], positions[..., None], self._seen[:, :, None])

    def _divide(self, tokens: torch.Tensor) -> None:
        """Give rows that shared a slot, and get different tokens, a slot each."""
        (numbers, slots, _), of_row = torch.stack([*self._place, tokens]).unique(dim=1, return_inverse=True)
        sizes = numbers.bincount(minlength=self._shape[0])
        place = numbers, torch.arange(len(numbers), device=numbers.device) - (sizes.cumsum(0) - sizes)[numbers]
        seen, lengths = self._seen[numbers, slots], self._lengths[numbers, slots]
        self._place, self._shape = place, (len(sizes), int(sizes.max()))
        self._seen, self._lengths = self._in_slots(seen), self._in_slots(lengths)
        self._place = place[0][of_row], place[1][of_row]

    def _run(self, tokens: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Logits after the last token of each slot. `tokens` is `(R, S, L)`, `mask` is `(R, S, L, columns)`."""
        _, num_slots, length = tokens.shape
        mask = mask.flatten(1, 2)
        # A softmax over nothing is NaN: every token attends to itself, also where no row is.
        mask[..., -num_slots * length :] |= torch.eye(num_slots * length, dtype=torch.bool, device=mask.device)
        last = torch.arange(length - 1, num_slots * length, length, device=mask.device)
        outputs = self._forward(
            input_ids=tokens.flatten(1),
            position_ids=positions.flatten(1),
            attention_mask=tree_mask(self._model, mask[:, None]),
            use_cache=True,
            logits_to_keep=last,
            **{cache_name(self._model): self._cache},
        )
        logits: torch.Tensor = outputs.logits[self._place]
        return logits


def generate_from_tree(
    generate: Callable[..., Any], input_ids: torch.Tensor, attention_mask: torch.Tensor, **options: Any
) -> torch.Tensor:
    """What `generate` returns for left-padded rows, `(N, L + C)`, with what rows share computed once.

    For the same seed, the tokens are the same up to the rounding of the probabilities.

    Args:
        generate: the method of a causal language model for which [`why_no_tree`] is `None`, or of its PEFT wrapper, in
            evaluation mode.
        input_ids: `(N, L)`.
        attention_mask: `(N, L)`, 0 on the padding.
        options: further arguments of `generate`. Rows are sampled or decoded greedily.
    """
    rows = [ids[mask].tolist() for ids, mask in zip(input_ids, attention_mask.bool(), strict=True)]
    # Forward passes of sharded models are collective, so all processes need equally many.
    is_alone = not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1

    def decode(
        model: Any, input_ids: Any, logits_processor: Any, stopping_criteria: Any, generation_config: Any, **_: Any
    ) -> torch.Tensor:
        """The loop over new tokens, as transformers calls it."""
        tree = PrefixTree(model, rows)
        logits = tree.first()
        going = torch.ones(len(rows), dtype=torch.bool, device=input_ids.device)
        while True:
            scores = logits_processor(input_ids, logits.to(input_ids.device, torch.float32))
            if generation_config.do_sample:
                tokens = torch.multinomial(scores.softmax(-1), num_samples=1)[:, 0]
            else:
                tokens = scores.argmax(-1)
            tokens = torch.where(going, tokens, generation_config.pad_token_id)
            input_ids = torch.cat([input_ids, tokens[:, None]], 1)
            going &= ~stopping_criteria(input_ids, None)
            if input_ids.size(1) >= generation_config.max_length or (is_alone and not going.any()):
                return input_ids
            logits = tree.add(tokens)

    result: torch.Tensor = generate(
        input_ids=input_ids, attention_mask=attention_mask, custom_generate=decode, **options
    )
    return result


@contextmanager
def generating_from_trees(model: Any) -> Iterator[None]:
    """Context in which `model.generate` is [`generate_from_tree`]."""
    own = vars(model).get("generate")  # that of a model's repository
    vars(model)["generate"] = partial(generate_from_tree, model.generate)
    try:
        yield
    finally:
        del vars(model)["generate"]
        if own is not None:
            vars(model)["generate"] = own


@torch.no_grad()
def why_no_tree(model: PreTrainedModel, forward: Callable[..., Any] | None = None) -> str | None:
    """Why the model cannot continue rows that begin alike from one cache; `None` when it can.

    The log-probabilities of short rows are compared with those of plain forward passes. The model should be in
    evaluation mode.

    Args:
        model: a causal language model.
        forward: what is called for a forward pass; the model if it is `None`.
    """
    forward = forward or model
    if not takes_masks(model):
        return f"attn_implementation={model.config._attn_implementation!r} takes no mask of this form"
    if not cuts_cache(model, forward):
        return "sliding-window or recurrent layers keep no state of a shorter prefix"
    rows = [[1, 2, 3, 4, 5, 6], [1, 2, 3], [1, 2, 9, 8]]
    new = torch.tensor([7, 8, 9], device=model.device)
    expected = [
        forward(input_ids=torch.tensor([[*row, token]], device=model.device), use_cache=False).logits[0, -2:]
        for row, token in zip(rows, new.tolist(), strict=True)
    ]
    try:
        tree = PrefixTree(model, rows, forward)
        found = torch.stack([tree.first(), tree.add(new)], 1)
    except Exception as error:  # whatever a model does with a mask that it does not know
        return f"its forward refuses the mask ({type(error).__name__}: {first_line(error)})"
    difference = difference_of(model, found.log_softmax(-1), torch.stack(expected).log_softmax(-1))
    return difference and f"the logits of rows from one cache differ by {difference} from those of whole rows"
