"""How many images come back bit-equal, inverted in various ways."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from ..numerics.verify import Call, Way, channels_last, in_parts, on_threads, onednn_off
from ..sequential import Sequential

FORWARD_BATCH = 64
INVERSE_BATCHES = (1, 7, 500)


@torch.no_grad()
def images_back(chain: Sequential, images: Tensor) -> dict[str, int]:
    """The number of images that come back bit-equal, by the way in which they are inverted.

    All go forward in batches of 64, and come back in the same batches. If the chain is exact, they also come back in
    batches of 1, 7 and 500, in channels-last layout, with 2 threads, without oneDNN, and in float64.

    Args:
        chain: in eval mode, on one tensor.
        images: in the chain's dtype, on its grid.
    """
    chain.admit(images)
    parts = torch.split(images, FORWARD_BATCH)
    features = [chain(part) for part in parts]
    same = sum(_equal(chain.inverse(z), part) for z, part in zip(features, parts, strict=True))
    found = {f"batches of {FORWARD_BATCH}, the same both ways": same}
    if chain.exactness != "exact":
        return found
    whole, large = torch.cat(features), in_parts(INVERSE_BATCHES[-1])
    ways: dict[str, Call] = {f"batches of {size}": in_parts(size)(chain.inverse) for size in INVERSE_BATCHES}
    others: dict[str, Way] = {"channels last": channels_last, "2 threads": on_threads(2)}
    others["without oneDNN"] = onednn_off()
    ways |= {name: large(way(chain.inverse)) for name, way in others.items()}
    found |= {name: _equal(back(whole, None), images) for name, back in ways.items()}
    in_float64 = large(copy.deepcopy(chain).double().inverse)(whole.double(), None)
    return found | {"float64": _equal(in_float64, images)}


def _equal(found: Tensor, images: Tensor) -> int:
    return int((found == images).flatten(1).all(1).sum())
