"""The last layer's feed-forward network on first tokens alone, where nothing else of it is read.

With ``cls`` pooling a head reads one token of each row. Attention of the last layer needs all tokens, what comes
after it does not. Where a layer's parts are cut off is found by trying, not by a list of architectures.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fltac.model.attention import rows_in_flight

ATTENTION = ("attention", "self_attn", "attn", "self_attention")
FEED_FORWARD = ("intermediate", "mlp", "ffn", "feed_forward")


@dataclass(frozen=True)
class Cut:
    """Where to leave all but the first tokens behind.

    Attributes:
        path: Of a part of the last layer.
        before: Cut its input; else its output.
    """

    path: str
    before: bool

    @contextmanager
    def made(self, model: nn.Module) -> Iterator[None]:
        """Inside, the model's last hidden states hold, of what is right, only the first tokens.

        Packed rows: ``[1, rows, hidden]``. Padded rows: ``[rows, 1 or length, hidden]``.
        """

        def cut_input(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return (first_tokens(args[0]), *args[1:])

        def cut_output(_: nn.Module, __: Any, out: Any) -> Any:
            return (first_tokens(out[0]), *out[1:]) if isinstance(out, tuple) else first_tokens(out)

        module = model.get_submodule(self.path)
        register = module.register_forward_pre_hook if self.before else module.register_forward_hook
        handle = register(cut_input if self.before else cut_output)  # type: ignore[arg-type]
        try:
            yield
        finally:
            handle.remove()


def first_tokens(states: Tensor) -> Tensor:
    """``[rows, 1, hidden]`` of padded rows, ``[1, rows, hidden]`` of packed ones."""
    rows = rows_in_flight()
    return states[:, :1] if rows is None else states.index_select(1, rows.first_tokens)


def possible_cuts(model: nn.Module, adapted: Sequence[str]) -> list[Cut]:
    """Cuts to try, the one that saves most first; none where the feed-forward network of the last layer is adapted.

    Args:
        model: The backbone.
        adapted: Paths of the adapted modules.
    """
    lists = [(path, part) for path, part in model.named_modules() if isinstance(part, nn.ModuleList) and len(part)]
    if not lists:
        return []
    path, layers = max(lists, key=lambda item: sum(weight.numel() for weight in item[1].parameters()))
    last = f"{path}.{len(layers) - 1}."
    inside = [name.removeprefix(last).split(".")[0] for name in adapted if name.startswith(last)]
    if any(part not in ATTENTION for part in inside):
        return []
    parts = dict(layers[-1].named_children())
    before = [Cut(last + name, True) for name in FEED_FORWARD if name in parts]
    after = [Cut(last + name, False) for name in ATTENTION if name in parts]
    return before + after
