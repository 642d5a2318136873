"""In which precision is computed."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor


def own_precision(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """No autocast: a norm or a state in bfloat16 has lost what the inverse needs. The meta device knows no autocast."""
    return contextlib.nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)
