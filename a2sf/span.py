"""A decoder that runs only some of its layers, for callers that know what enters the first of them.

Owns the stand-ins for the layers that are left out. The decoder itself, its weights and its layers
stay untouched: what comes back shares them. Knows nothing of any one family.
"""

import copy
from typing import Any

import torch
from torch import Tensor


class _StandIn(torch.nn.Module):
    """In the place of a layer: hands on what it is given, or what was kept."""

    def __init__(self, layer: torch.nn.Module, kept: Tensor | None = None) -> None:
        super().__init__()
        # Not registered as a child, which would make the layer's weights this module's own.
        object.__setattr__(self, "_layer", layer)
        self._kept = kept
        self.entered: Tensor | None = None
        """[rows, width, hidden], what entered here."""

    def __getattr__(self, name: str) -> Any:
        # Decoders ask their layers for settings, such as the kind of their attention.
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(object.__getattribute__(self, "_layer"), name)

    def forward(self, hidden: Tensor, *_: Any, **__: Any) -> Tensor:
        self.entered = hidden
        return hidden if self._kept is None else self._kept


def from_layer(decoder: Any, first: int, entering: Tensor) -> Any:
    """Return a decoder that starts at layer `first` (1 or more) with what enters it.

    `entering` is [rows, width, hidden]; the ids it is called with say nothing but the shape.
    """
    layers = list(decoder.layers)
    below = [_StandIn(layer) for layer in layers[: first - 1]]
    return _with(decoder, [*below, _StandIn(layers[first - 1], entering), *layers[first:]])


def up_to_layer(decoder: Any, last: int) -> tuple[Any, _StandIn]:
    """Return a decoder that runs the layers below `last`, and what notes their result."""
    layers = list(decoder.layers)
    above = [_StandIn(layer) for layer in layers[last:]]
    return _with(decoder, [*layers[:last], *above]), above[0]


def _with(decoder: Any, layers: list[torch.nn.Module]) -> Any:
    partial = copy.copy(decoder)
    partial._modules = dict(decoder._modules)
    partial.layers = torch.nn.ModuleList(layers)
    return partial
