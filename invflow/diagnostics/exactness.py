"""How many images come back without one wrong bit, however they are computed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..numerics.verify import threads, without_onednn
from ..sequential import Sequential

FORWARD_BATCH = 64
INVERSE_BATCHES = (1, 7, 500)


@torch.no_grad()
def images_back(chain: Sequential, images: Tensor) -> dict[str, int]:
    """How many images come back bit-equal, by the way in which they are inverted.

    All go forward in batches of 64. Where the chain is exact, they come back in batches of 1, 7 and 500, laid out
    channels last, with 2 threads, without oneDNN, and in float64; otherwise in the batches that they went in.

    Args:
        chain: in eval mode, on one tensor.
        images: in the chain's dtype, on its grid.
    """
    parts = torch.split(images, FORWARD_BATCH)
    features = [chain(part) for part in parts]
    same = sum(_equal(chain.inverse(z), part) for z, part in zip(features, parts, strict=True))
    found = {f"batches of {FORWARD_BATCH}, the same both ways": same}
    if chain.exactness != "exact":
        return found
    whole = torch.cat(features)

    def back(size: int, convert: Callable[[Tensor], Tensor] = lambda z: z) -> int:
        pairs = zip(torch.split(whole, size), torch.split(images, size), strict=True)
        return sum(_equal(chain.inverse(convert(z)), part) for z, part in pairs)

    for size in INVERSE_BATCHES:
        found[f"batches of {size}"] = back(size)
    largest = INVERSE_BATCHES[-1]
    found["channels last"] = back(largest, lambda z: z.contiguous(memory_format=torch.channels_last))
    with threads(2):
        found["2 threads"] = back(largest)
    with without_onednn():
        found["without oneDNN"] = back(largest)
    dtype = images.dtype
    chain.double()
    found["float64"] = back(largest, torch.Tensor.double)
    chain.to(dtype)
    return found


def _equal(found: Tensor, images: Tensor) -> int:
    return int((found == images).flatten(1).all(1).sum())
