"""Points of the plane, made on demand: densities with holes, edges and several pieces."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace
from typing import Annotated, TypeAlias

import torch
from pydantic import Field
from torch import Tensor

from ..errors import DataError
from ..registry import register_data
from ..samples import DataSet, InMemory
from ..source import Request, Source

Noise: TypeAlias = Annotated[float, Field(ge=0, le=10)]

_POINTS = 4096  # the default number of points: enough for a mean log-density with an error of 1 or 2 %
_MOST_POINTS = 10**6  # a spec may come from a stranger
_RINGS = 4


class _Points(Source):
    """Points ``(2,)``, determined by their number and a seed: 0 for training, 1 for the test, 2 for validation."""

    class_names: tuple[str, ...] = ("0",)

    @abstractmethod
    def draw(self, count: int, seed: int) -> tuple[Tensor, Tensor]:
        """Points ``(count, 2)`` and their labels ``(count,)``."""

    def load(self, request: Request) -> DataSet:
        sizes = [request.train_size, request.test_size]
        sizes += [] if request.validation_size is None else [request.validation_size]
        counts = [size if isinstance(size, int) else round(_POINTS * (size or 1)) for size in sizes]
        if max(counts) > _MOST_POINTS:
            raise DataError(f"{self.tag} has at most {_MOST_POINTS} points, the spec asks for {max(counts)}")
        parts = [InMemory(*self.draw(count, seed)) for seed, count in enumerate(counts)]
        return replace(request, train_size=None, test_size=None, validation_size=None).data_set(
            *parts, class_names=self.class_names
        )


@register_data("moons")
class Moons(_Points):
    """Two half circles that reach into one another, with noise, as in scikit-learn.

    Args:
        noise: the standard deviation of the noise.

    Examples:
        >>> Moons(noise=0.05).load(Request("moons", train_size=100)).shape
        (2,)
    """

    class_names = ("upper", "lower")

    def __init__(self, noise: Noise = 0.1) -> None:
        self.noise = noise

    def draw(self, count: int, seed: int) -> tuple[Tensor, Tensor]:
        from sklearn.datasets import make_moons  # slow to import

        points, labels = make_moons(count, noise=self.noise, random_state=seed)
        return torch.tensor(points, dtype=torch.float32), torch.tensor(labels)


@register_data("circles")
class Circles(_Points):
    """Two circles around one another, of radius 1 and 1/2, with noise, as in scikit-learn.

    Args:
        noise: the standard deviation of the noise.
    """

    class_names = ("outer", "inner")

    def __init__(self, noise: Noise = 0.1) -> None:
        self.noise = noise

    def draw(self, count: int, seed: int) -> tuple[Tensor, Tensor]:
        from sklearn.datasets import make_circles  # slow to import

        points, labels = make_circles(count, noise=self.noise, random_state=seed, factor=0.5)
        return torch.tensor(points, dtype=torch.float32), torch.tensor(labels)


@register_data("rings")
class Rings(_Points):
    """Four circles around one another, of radius 1/4 to 1, equally likely, with noise along the radius.

    Args:
        noise: the standard deviation of the noise.
    """

    class_names = tuple(map(str, range(_RINGS)))

    def __init__(self, noise: Noise = 0.03) -> None:
        self.noise = noise

    def draw(self, count: int, seed: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        ring = torch.randint(_RINGS, (count,), generator=generator)
        radius = (ring + 1) / _RINGS + self.noise * torch.randn(count, generator=generator)
        angle = 2 * torch.pi * torch.rand(count, generator=generator)
        return torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1), ring


@register_data("checkerboard")
class Checkerboard(_Points):
    """Uniform points on the dark squares of a 4 x 4 board over [-2, 2)^2: a density with edges, in 8 pieces."""

    def draw(self, count: int, seed: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        column = torch.randint(4, (count,), generator=generator)
        row = 2 * torch.randint(2, (count,), generator=generator) + column % 2
        points = torch.stack([column, row], dim=1) - 2 + torch.rand(count, 2, generator=generator)
        return points, torch.zeros(count, dtype=torch.long)
