"""Bounds on what a spec may ask for: specs come from strangers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """What a document is refused for, before time or memory is spent on it.

    Attributes:
        text_bytes: the size of the file.
        depth: how deep objects and lists may nest.
        layers: how many layers there may be once every repeat is expanded.
        values: how many JSON values there may be once every variable is substituted.
        parameters: how many numbers all weights and buffers may hold together.
        state: how many numbers one sample may hold in any state.
        tensors: how many tensors a state may be made of.
    """

    text_bytes: int = 2**20
    depth: int = 32
    layers: int = 10_000
    values: int = 1_000_000
    parameters: int = 10**9
    state: int = 2**28
    tensors: int = 1024


DEFAULT_LIMITS = Limits()
