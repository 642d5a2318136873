"""Random changes of training images: affine maps, smooth deformations, stroke widths, different for each image."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torchvision.transforms.v2 import functional

from ..draws import drawn
from ..spec.training import Augmentation, Elastic, RandomAffine, Stroke

_STROKE_BLUR = 0.85  # pixels: the weights of three pixels are about 1/4, 1/2, 1/4


class Augment(nn.Module):
    """A random affine map, a random smooth deformation and a random stroke width for each image of a batch.

    The parameters are those of torchvision's RandomAffine and ElasticTransform, which draw one change for a whole
    batch; here each image has its own, and one bilinear sampling applies both. Pixels from outside of the image are
    black. Random numbers are drawn on the CPU, so that they are the same for images on every device.

    Args:
        options: the spec's augmentation.
    """

    def __init__(self, options: Augmentation) -> None:
        super().__init__()
        self.options = options

    def forward(self, images: Tensor) -> Tensor:
        """Change ``(batch, channels, height, width)``, with random numbers of torch's global generator."""
        count, _, height, width = images.shape
        maps = _affine_maps(self.options.affine or RandomAffine(), count)
        grid = nn.functional.affine_grid(maps, list(images.shape), align_corners=False)
        if self.options.elastic is not None:
            grid = grid + _displacements(self.options.elastic, count, height, width)
        changed = nn.functional.grid_sample(images, grid.to(images), align_corners=False)
        return changed if self.options.stroke is None else _restroked(changed, self.options.stroke)


def _affine_maps(options: RandomAffine, count: int) -> Tensor:
    """Maps of the square [-1, 1]^2 from pixels to the places that they are sampled from, ``(count, 2, 3)``."""

    def uniform(low: float, high: float) -> Tensor:
        return drawn(torch.rand, (count,)) * (high - low) + low

    angle = uniform(-options.degrees, options.degrees) * (math.pi / 180)
    slant = torch.tan(uniform(-options.shear, options.shear) * (math.pi / 180))
    one, zero = torch.ones(count), torch.zeros(count)
    rotation = _matrices(angle.cos(), -angle.sin(), angle.sin(), angle.cos())
    forward = rotation @ _matrices(one, slant, zero, one) * uniform(*options.scale)[:, None, None]
    shift = 2 * torch.stack([uniform(-options.translate, options.translate) for _ in range(2)], dim=-1)
    backward = torch.linalg.inv(forward)
    return torch.cat([backward, -backward @ shift[:, :, None]], dim=2)


def _matrices(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    return torch.stack([a, b, c, d], dim=-1).reshape(-1, 2, 2)


def _restroked(images: Tensor, options: Stroke) -> Tensor:
    """``clamp((blur(x) - grey) * contrast + 1/2, 0, 1)`` for some of the images: a darker grey thickens the strokes."""
    one_each = (len(images), 1, 1, 1)
    grey = 0.5 + options.shift * (2 * drawn(torch.rand, one_each).to(images.device) - 1)
    blurred = functional.gaussian_blur(images, [3, 3], [_STROKE_BLUR, _STROKE_BLUR])
    restroked = ((blurred - grey) * options.contrast + 0.5).clamp(0, 1)
    return torch.where(drawn(torch.rand, one_each).to(images.device) < options.probability, restroked, images)


def _displacements(options: Elastic, count: int, height: int, width: int) -> Tensor:
    """The displacement of each pixel on [-1, 1]^2: smoothed uniform noise, ``(count, height, width, 2)``."""
    noise = drawn(torch.rand, (count, 2, height, width)) * 2 - 1
    reach = min(math.ceil(4 * options.sigma), height - 1, width - 1)  # the reflected border must fit into the image
    length = 2 * reach + 1
    # First the rows, then the columns: the Gaussian is separable, and 2 x 41 weights are fewer than 41 x 41.
    smooth: Tensor = functional.gaussian_blur(noise, [length, 1], [options.sigma, options.sigma])
    smooth = functional.gaussian_blur(smooth, [1, length], [options.sigma, options.sigma])
    return smooth.permute(0, 2, 3, 1) * options.alpha / torch.tensor([width, height])
