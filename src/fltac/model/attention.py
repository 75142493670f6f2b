"""Attention for packed rows, and a faster one for padded rows on a CPU.

``attend`` takes the place of torch's fused attention in a transformers model. On a CPU the fused kernel's backward
pass is slow for short rows, and in bfloat16 for all; two batched matrix products with the probabilities kept in
between are faster. Where they do not apply, the fused kernel runs in float32.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from fltac.model.packing import Bucket, PackedRows

NAME = "fltac"
"""Of :func:`attend` among transformers' attention implementations."""

LONGEST = {torch.bfloat16: 512, torch.float32: 64, torch.float64: 64}
"""Tokens of a row up to which keeping the probabilities is faster than the fused kernel on a CPU, by dtype."""

HARMLESS = frozenset({"dropout", "scaling", "is_causal", "position_ids", "cache", "past_key_values", "use_cache"})
"""Options of an attention call that packed attention handles or that say nothing about what attends to what."""


class _InFlight(threading.local):
    """The rows of the packed batch that this thread runs a model on, if any.

    A model passes nothing of its caller's to its layers.
    """

    rows: PackedRows | None = None


_in_flight = _InFlight()


class UnpackableError(ValueError):
    """The model asks for something of attention that packed rows cannot give."""


@contextmanager
def attending(rows: PackedRows) -> Iterator[None]:
    """Inside, models that use :func:`attend` take their input for one packed sequence of these rows."""
    before, _in_flight.rows = _in_flight.rows, rows
    try:
        yield
    finally:
        _in_flight.rows = before


def rows_in_flight() -> PackedRows | None:
    """The rows of the packed batch that a model is run on now; None for padded rows."""
    return _in_flight.rows


def use_own_attention(model: PreTrainedModel) -> bool:
    """Switches a model to :func:`attend`, if it uses the fused attention of torch.

    Returns:
        Whether it does now.
    """
    if getattr(model.config, "_attn_implementation", None) not in ("sdpa", NAME):
        return False
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, mask)
    model.set_attn_implementation(NAME)
    return True


def mask(*arguments: Any, **options: Any) -> Tensor | None:
    """The mask that :func:`attend` is given: none for packed rows, else that of the fused attention."""
    return None if _in_flight.rows is not None else sdpa_mask(*arguments, **options)


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Scaled dot-product attention.

    Args:
        module: The attention layer; ``is_causal`` and ``num_key_value_groups`` are read.
        query: ``[b, heads, length, width]``; with packed rows b is 1.
        key: The same, perhaps with fewer heads.
        value: As ``key``.
        attention_mask: For padded rows.
        **options: ``scaling`` and what else the model passes.

    Returns:
        ``[b, length, heads, width]`` in the dtype of ``query``, and None for the probabilities.

    Raises:
        UnpackableError: the rows are packed and the model asks for a window, a bias or the like.
    """
    rows = rows_in_flight()
    if rows is not None:
        return _packed(module, query, key, value, attention_mask, options, rows), None
    causal = options.get("is_causal")
    causal = getattr(module, "is_causal", False) if causal is None else causal
    length = query.shape[2]
    short = query.device.type == "cpu" and length <= LONGEST.get(query.dtype, 0)
    if short and attention_mask is None and not causal and key.shape == query.shape and _plain(options):
        return _uniform(query, key, value, _scaling(options, query)).transpose(1, 2), None
    if query.device.type == "cpu" and query.dtype == torch.bfloat16:
        if attention_mask is not None and attention_mask.is_floating_point():
            attention_mask = attention_mask.float()
        out, _ = sdpa_attention_forward(module, query.float(), key.float(), value.float(), attention_mask, **options)
        return out.to(query.dtype), None
    out, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    return out, None


def _plain(options: dict[str, Any]) -> bool:
    return not options.get("dropout") and all(
        value is None or value is False for name, value in options.items() if name not in HARMLESS
    )


def _scaling(options: dict[str, Any], query: Tensor) -> float:
    scaling = options.get("scaling")
    return float(query.shape[-1] ** -0.5 if scaling is None else scaling)


def _uniform(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    shape = query.shape
    q, k, v = (part.reshape(-1, *shape[2:]) for part in (query, key, value))
    return torch.bmm(_shares(q, k, None, scaling, False), v).view(shape)


def _shares(q: Tensor, k: Tensor, bias: Tensor | None, scaling: float, causal: bool) -> Tensor:
    """What each query gives each key: ``[b, length, length]``, rows summing to 1, in the dtype of ``q``."""
    length = q.shape[1]
    added = q.new_empty(()) if bias is None else bias.expand(-1, length, -1)
    scores = torch.baddbmm(added, q, k.transpose(1, 2), beta=0 if bias is None else 1, alpha=scaling)
    if causal:
        later = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(later, float("-inf"))
    # Torch's softmax of bfloat16 is slow on a CPU where rows are not whole vectors.
    exact = torch.float32 if q.dtype == torch.bfloat16 else q.dtype
    return torch.softmax(scores, dim=-1, dtype=exact).to(q.dtype)


def _packed(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    options: dict[str, Any],
    rows: PackedRows,
) -> Tensor:
    if attention_mask is not None or not _plain(options) or query.shape[2] != key.shape[2]:
        asked = sorted(name for name, value in options.items() if value is not None and name not in HARMLESS)
        raise UnpackableError(f"attention of {type(module).__name__} with {asked or 'a mask'} on packed rows")
    if key.shape[1] != query.shape[1]:
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    causal = options.get("is_causal")
    causal = getattr(module, "is_causal", False) if causal is None else causal
    scaling = _scaling(options, query)
    out: Tensor = _PackedAttention.apply(query[0], key[0], value[0], rows, scaling, bool(causal))  # type: ignore[no-untyped-call]
    return out.unsqueeze(0)


class _PackedAttention(torch.autograd.Function):
    """Attention bucket by bucket: ``[heads, tokens, width]`` in, ``[tokens, heads, width]`` out."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, query: Tensor, key: Tensor, value: Tensor, rows: PackedRows, scaling: float, causal: bool
    ) -> Tensor:
        heads, tokens, _ = query.shape
        query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
        out = query.new_empty(tokens, heads, value.shape[-1])
        saved = []
        for bucket in rows.buckets:
            q, k, v = (_gathered(part, bucket) for part in (query, key, value))
            shares = _shares(q, k, bucket.bias(heads, q.dtype), scaling, causal)
            _scatter(out, torch.bmm(shares, v), bucket)
            saved += [q, k, v, shares]
        ctx.save_for_backward(*saved)
        ctx.rows, ctx.scaling = rows, scaling  # type: ignore[attr-defined]
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved, rows, scaling = ctx.saved_tensors, ctx.rows, ctx.scaling
        tokens, heads, _ = grad.shape
        by_head = grad.transpose(0, 1).contiguous()
        dq, dk, dv = (grad.new_empty(tokens, heads, saved[part].shape[-1]) for part in range(3))
        for number, bucket in enumerate(rows.buckets):
            q, k, v, shares = saved[4 * number : 4 * number + 4]
            # Places past a row's end repeat a token, whose gradient must not count again.
            g = _gathered(by_head, bucket)
            if bucket.past is not None:
                g.view(heads, bucket.rows, bucket.length, -1).masked_fill_(bucket.past.transpose(1, 2) < 0, 0.0)
            _scatter(dv, torch.bmm(shares.transpose(1, 2), g), bucket)
            of_shares = torch.bmm(g, v.transpose(1, 2))
            of_scores = torch._softmax_backward_data(of_shares, shares, -1, shares.dtype)
            _scatter(dq, torch.baddbmm(q.new_empty(()), of_scores, k, beta=0, alpha=scaling), bucket)
            of_keys = torch.baddbmm(q.new_empty(()), of_scores.transpose(1, 2), q, beta=0, alpha=scaling)
            _scatter(dk, of_keys, bucket)
        return dq.transpose(0, 1), dk.transpose(0, 1), dv.transpose(0, 1), None, None, None


def _gathered(part: Tensor, bucket: Bucket) -> Tensor:
    """``[heads, tokens, width]`` to ``[heads * rows, length, width]``."""
    picked = part.index_select(1, bucket.gather)
    return picked.view(part.shape[0] * bucket.rows, bucket.length, part.shape[-1])


def _scatter(into: Tensor, values: Tensor, bucket: Bucket) -> None:
    """``[heads * rows, length, width]`` to the bucket's tokens in ``[tokens, heads, width]``."""
    heads, width = into.shape[1], into.shape[2]
    flat = values.view(heads, bucket.rows * bucket.length, width)
    if bucket.places is not None:
        flat = flat.index_select(1, bucket.places)
    into.index_copy_(0, bucket.tokens, flat.transpose(0, 1))
