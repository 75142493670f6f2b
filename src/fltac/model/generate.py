"""What a causal language model writes behind a prompt, token by token, with an adapter in its first lane."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fltac.model.backbone import at_least_float32
from fltac.model.lanes import LaneModel

MEMORY = ("cache", "past_key_values")
"""What a model calls the keys and values that it keeps of the tokens before, as argument and in its output."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        max_new_tokens: The most that are written.
        temperature: 0 for the most likely token; else logits are divided by it and a token is drawn.
        top_p: Only the most likely tokens that together have this probability are drawn (arXiv 1904.09751).
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0


@torch.no_grad()
def generate(
    model: LaneModel,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    end: int | None,
    draws: Sequence[np.random.Generator],
) -> list[list[int]]:
    """Writes an answer to each prompt.

    Args:
        model: A causal language model with one adapter loaded.
        prompts: Token numbers, at least one each; with what is written they have to fit into the model's context.
        sampling: How.
        end: The token that ends an answer; it is not part of what is returned.
        draws: A generator for each prompt, so that an answer does not depend on what else is in the batch.

    Returns:
        For each prompt the token numbers of its answer.
    """
    model.lanes.active, model.lanes.packed = 1, None
    backbone, device = model.backbone.model, model.backbone.device
    takes = inspect.signature(backbone.forward).parameters
    longest = max(len(prompt) for prompt in prompts)
    # On the left, so that all rows go on at the same place.
    ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    answers: list[list[int]] = [[] for _ in prompts]
    memory_name = next((name for name in MEMORY if name in takes), MEMORY[0])
    writing, memory = set(range(len(prompts))), None
    while writing:
        fresh = ids if memory is None else ids[:, -1:]
        options: dict[str, Any] = {"use_cache": True, memory_name: memory}
        if "position_ids" in takes:
            options["position_ids"] = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, -fresh.shape[1] :]
        if "logits_to_keep" in takes:
            options["logits_to_keep"] = 1
        out = backbone(input_ids=fresh, attention_mask=mask, **options)
        memory = getattr(out, memory_name, None)  # without any, all is read again
        chosen = [0] * len(prompts)
        logits = at_least_float32(out.logits[:, -1])
        for row in sorted(writing):
            token = choose(logits[row], sampling, draws[row])
            chosen[row] = token
            if token == end:
                writing.discard(row)
                continue
            answers[row].append(token)
            if len(answers[row]) == sampling.max_new_tokens:
                writing.discard(row)
        ids = torch.cat([ids, torch.tensor(chosen, device=device).unsqueeze(1)], dim=1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
    model.lanes.active = 0
    return answers


def choose(logits: Tensor, sampling: Sampling, draw: np.random.Generator) -> int:
    """The next token, of ``[vocabulary]`` logits."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    values = logits.double().cpu().numpy() / sampling.temperature
    order = np.argsort(-values, kind="stable")
    shares = np.exp(values[order] - values[order[0]])
    shares /= shares.sum()
    # The first token is always there, and the one that reaches top_p is the last.
    kept = 1 + int(np.searchsorted(np.cumsum(shares), sampling.top_p - 1e-12))
    reached = np.cumsum(shares[:kept])
    place = int(np.searchsorted(reached, draw.random() * reached[-1], side="right"))
    return int(order[min(place, len(reached) - 1)])
