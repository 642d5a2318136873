"""Spectral normalisation: linear maps and convolutions of norm at most 1, as a function of their weights alone."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from .._torch import transforms_active
from ..errors import ShapeError
from ..numerics.backend import own_precision
from ..state import TensorShape, shape_of

Map: TypeAlias = Callable[[Tensor], Tensor]

TOLERANCE_POWER = 2 / 3
"""The pair is converged when the residual of its singular equations is below ``eps ** TOLERANCE_POWER``: 2e-5 in
float32, 4e-11 in float64. The norm's error is the square of that, over the gap to the next singular value; the
gradient's is of first order."""

LOOSE = 5e-4
"""A residual above this, relative to the norm, is no estimate: the certified bound takes its place."""

STEPS = 60
"""Lanczos steps before a restart: one vector is held for each."""

RESTARTS = 5

FRESH_SHARE = 0.01
"""How much of a random vector is mixed into the last singular vector to start from: where the weights were edited so
that this is singular still, but not the top one any more, it has to be left."""


class _Spectral(nn.Module, ABC):
    """A linear map ``A`` with ``norm(A)``, the largest singular value, and the weight divided by ``max(1, norm(A))``.

    The norm is ``u . A v``, for the top singular vectors u and v of these very weights, found by Golub-Kahan-Lanczos
    iteration (power iteration with a memory, many times faster where singular values cluster). They are kept as
    buffers, with a fingerprint of the weights that they belong to: as long as the weights hold the same bits, u and v
    are those; when the weights have moved, however that happened, the next call iterates from them to convergence. So
    the norm is a function of the weights, in train mode too, and forward and inverse agree. Its gradient is ``u v^T``.

    In eval mode a call moves no buffer: where the weights were edited since the mode was last set, it iterates, and
    does not keep what it found.

    Reference: Miyato, Kataoka, Koyama, Yoshida: Spectral Normalization for Generative Adversarial Networks, 2018,
    https://arxiv.org/abs/1802.05957; Golub, Kahan: Calculating the singular values and pseudo-inverse of a matrix, 1965
    """

    weight: nn.Parameter
    bias: nn.Parameter
    u: Tensor
    v: Tensor
    margin: Tensor
    fingerprint: Tensor

    def __init__(self, weight: Tensor, bias: Tensor, in_shape: TensorShape, out_shape: TensorShape) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(bias)
        self.in_shape = in_shape
        self.out_shape = out_shape
        self.register_buffer("u", torch.zeros(out_shape))
        self.register_buffer("v", torch.zeros(in_shape))
        self.register_buffer("margin", torch.ones(()))
        self.register_buffer("fingerprint", torch.zeros((), dtype=torch.int64))

    @abstractmethod
    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        """A x, without the bias, for a batch."""

    @abstractmethod
    def transposed(self, y: Tensor, weight: Tensor) -> Tensor:
        """A^T y, for a batch."""

    @abstractmethod
    def certified_norm(self) -> Tensor:
        """An upper bound of the norm that no rounding or unlucky start can undercut; up to some percent above it."""

    @abstractmethod
    def apply_weight(self, x: Tensor, weight: Tensor) -> Tensor:
        """A x + bias for a batch, with these weights."""

    def forward(self, x: Tensor) -> Tensor:
        return self.apply_weight(x, self.normalized_weight())

    def norm(self) -> Tensor:
        """The norm of the map as the weights are, with its gradient."""
        with own_precision(self.weight):
            u, v, margin = self._pair(keep=self.training)
            weight = _at_least_single(self.weight)
            image = self.linear(v.to(weight.dtype)[None], weight)[0]
            return (margin * (u * image).sum()).to(self.weight.dtype)

    def normalized_weight(self) -> Tensor:
        """The weight of a map whose norm is at most 1: left as it is where the norm is at most 1 already."""
        return self.weight / self.norm().clamp(min=1.0)

    def settle(self) -> None:
        """Brings the singular vectors to the weights; where these have not moved, nothing happens."""
        self._pair(keep=True)

    def train(self, mode: bool = True) -> Any:
        """Sets the mode, and settles: so evaluation after a training step does not iterate at every call."""
        super().train(mode)
        self.settle()
        return self

    @torch.no_grad()
    def _pair(self, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
        """``u, v`` and the factor that makes their norm a safe one."""
        weight = self.weight.detach()
        if weight.is_meta:  # shapes only
            return self.u.clone(), self.v.clone(), self.margin.clone()
        key = _fingerprint(weight)
        if bool(key == self.fingerprint):
            return self.u.clone(), self.v.clone(), self.margin.clone()
        u, v, margin = (found.to(self.u.dtype) for found in self._iterate(weight, int(key)))
        # Within torch.func nothing outside may be written to; what is found there is found again.
        if keep and not transforms_active():
            for buffer, value in ((self.u, u), (self.v, v), (self.margin, margin), (self.fingerprint, key)):
                buffer.copy_(value)
        return u, v, margin

    def _iterate(self, weight: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        weight = _at_least_single(weight)
        largest = weight.abs().max() if weight.numel() else weight.new_zeros(())
        if not bool(largest > 0):  # zero, or not a number
            return self.u, self.v, largest.clone() + 1
        weight = weight / largest  # no square overflows
        # Seeded by the weights themselves, so that no weights can be orthogonal to it but by a chance of nought.
        generator = torch.Generator().manual_seed(seed)
        fresh = torch.randn(self.in_shape, generator=generator, dtype=torch.float64).to(weight)
        last = self.v.to(weight)
        start = last / last.norm() + FRESH_SHARE * fresh / fresh.norm() if bool(last.norm() > 0.5) else fresh
        tolerance = torch.finfo(weight.dtype).eps ** TOLERANCE_POWER
        u, v, norm, residual = top_singular_pair(
            lambda x: self.linear(x.reshape(1, *self.in_shape), weight).flatten(),
            lambda y: self.transposed(y.reshape(1, *self.out_shape), weight).flatten(),
            start.flatten(),
            tolerance,
        )
        if residual <= tolerance * norm:
            factor = 1.0
        elif residual <= LOOSE * norm:
            factor = 1.0 + residual / norm
        else:
            factor = float(self.certified_norm() / largest) / norm
        return u.reshape(self.out_shape), v.reshape(self.in_shape), weight.new_tensor(factor)


class SpectralLinear(_Spectral):
    """``y = W x / max(1, ||W||) + b``: Lipschitz constant at most 1.

    Args:
        in_features: the size of x.
        out_features: the size of y.

    Examples:
        >>> layer = SpectralLinear(3, 4)
        >>> with torch.no_grad():
        ...     _ = layer.weight.mul_(100)
        >>> f"{torch.linalg.matrix_norm(layer.normalized_weight().detach(), 2).item():.4f}"
        '1.0000'
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        plain = nn.Linear(in_features, out_features)
        super().__init__(plain.weight.detach(), _bias_of(plain), (in_features,), (out_features,))
        self.settle()

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        return x @ weight.mT

    def transposed(self, y: Tensor, weight: Tensor) -> Tensor:
        return y @ weight

    def apply_weight(self, x: Tensor, weight: Tensor) -> Tensor:
        return functional.linear(x, weight, self.bias)

    @torch.no_grad()
    def certified_norm(self) -> Tensor:
        return gram_bound(self.weight.detach()[None])


class SpectralConv2d(_Spectral):
    """A convolution with zero padding, divided by ``max(1, norm)``: Lipschitz constant at most 1.

    The norm is that of the map between images of the size given, with its padding and its stride: neither the norm of
    the kernel as a matrix, which may be smaller or larger, nor that of a circular convolution, which is larger.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: the side of the kernel.
        size: (height, width) of the input; other inputs are refused, for their norm would be another one.
        stride: of the output's positions.
        padding: zeros on each side; by default as many as keep height and width for odd kernels and stride 1.

    Examples:
        >>> SpectralConv2d(2, 3, 3, size=(5, 5))(torch.zeros(1, 2, 5, 5)).shape
        torch.Size([1, 3, 5, 5])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        size: tuple[int, int],
        stride: int = 1,
        padding: int | None = None,
    ) -> None:
        padding = kernel_size // 2 if padding is None else padding
        after = [(extent + 2 * padding - kernel_size) // stride + 1 for extent in size]
        if min(after) < 1:
            raise ShapeError(f"a kernel of side {kernel_size} expects larger images than {size[0]} x {size[1]}")
        plain = nn.Conv2d(in_channels, out_channels, kernel_size)
        super().__init__(plain.weight.detach(), _bias_of(plain), (in_channels, *size), (out_channels, *after))
        self.stride = stride
        self.padding = padding
        # What the stride leaves over at the end of the input, which the transposed map has to be told.
        self._left_over = [(extent + 2 * padding - kernel_size) % stride for extent in size]
        self.settle()

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        return functional.conv2d(x, weight, None, self.stride, self.padding)

    def transposed(self, y: Tensor, weight: Tensor) -> Tensor:
        return functional.conv_transpose2d(y, weight, None, self.stride, self.padding, self._left_over)

    def apply_weight(self, x: Tensor, weight: Tensor) -> Tensor:
        if shape_of(x) != self.in_shape:
            raise ShapeError(
                f"a spectral convolution built for the shape {self.in_shape} got {shape_of(x)}: its norm would differ"
            )
        return functional.conv2d(x, weight, self.bias, self.stride, self.padding)

    @torch.no_grad()
    def certified_norm(self) -> Tensor:
        """The largest norm that the kernel's Fourier transform has at any frequency, on a grid where nothing wraps.

        With zeros around it, the convolution is a part (some rows, some columns) of the circular one on that grid, of
        which these matrices are the blocks: so its norm is no larger. Strides leave rows out.

        Reference: Sedghi, Gupta, Long: The Singular Values of Convolutional Layers, 2018,
        https://arxiv.org/abs/1805.10408
        """
        kernel = _at_least_single(self.weight.detach())
        height, width = (extent + side - 1 for extent, side in zip(self.in_shape[1:], kernel.shape[2:], strict=True))
        transform = torch.fft.rfft2(kernel, s=(height, width))
        return gram_bound(transform.movedim((2, 3), (0, 1)).flatten(0, 1))


def top_singular_pair(
    apply: Map, transpose: Map, start: Tensor, tolerance: float
) -> tuple[Tensor, Tensor, float, float]:
    """The top singular vectors of a map, its norm, and the residual ``|A^T u - norm v|`` of what was found.

    Golub-Kahan-Lanczos bidiagonalization with full reorthogonalization, restarted from its best pair. After as many
    steps as the smaller side has dimensions it is exact.

    Args:
        apply: ``A``, from a vector to a vector.
        transpose: ``A^T``.
        start: where to begin, not zero.
        tolerance: the residual, relative to the norm, at which it stops.
    """
    image = apply(start)
    if not bool(image.norm() > 0):  # no map at all: a kernel, for example, that meets nothing but the border
        return torch.zeros_like(image), start / start.norm(), 0.0, 0.0
    if image.numel() < start.numel():  # from the smaller side, which is exhausted first
        v, u, norm, residual = top_singular_pair(transpose, apply, image, tolerance)
        return u, v, norm, residual
    v = start / start.norm()
    for _ in range(RESTARTS):
        u, v, norm, residual = _bidiagonalize(apply, transpose, v, tolerance)
        if not residual > tolerance * norm:
            break
    return u, v, norm, residual


def _bidiagonalize(apply: Map, transpose: Map, v: Tensor, tolerance: float) -> tuple[Tensor, Tensor, float, float]:
    u = apply(v)
    alpha = float(u.norm())
    if alpha == 0 or not math.isfinite(alpha):
        return torch.zeros_like(u), v, alpha, 0.0
    u = u / alpha
    left, right = u[None], v[None]
    diagonal: list[float] = [alpha]
    above: list[float] = []
    steps = min(STEPS, u.numel(), v.numel())
    # The smallest number that is no rounding: below it, the space is exhausted.
    floor = 10 * torch.finfo(v.dtype).eps * max(1.0, math.sqrt(v.numel()) / 10)
    while True:
        w = _orthogonal(transpose(u) - diagonal[-1] * v, right)
        beta = float(w.norm())
        done = len(diagonal)
        exhausted = done >= steps or beta <= floor * max(diagonal)
        if exhausted or done % 4 == 0:
            band = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
            band += torch.diag(torch.tensor(above, dtype=torch.float64), 1)
            p, values, q = torch.linalg.svd(band)
            residual = beta * abs(float(p[-1, 0]))
            norm = float(values[0])
            if exhausted or residual <= tolerance * norm:
                found = (p[:, 0].to(v) @ left, q[0].to(v) @ right)
                return found[0] / found[0].norm(), found[1] / found[1].norm(), norm, residual
        v = w / beta
        right = torch.cat([right, v[None]])
        u = _orthogonal(apply(v) - beta * u, left)
        alpha = float(u.norm())
        if alpha <= floor * max(diagonal):
            # A v is within what was seen: v adds nothing to the image, and one more column ends the space.
            u = torch.zeros_like(u)
        else:
            u = u / alpha
        left = torch.cat([left, u[None]])
        above.append(beta)
        diagonal.append(alpha)


def _orthogonal(vector: Tensor, basis: Tensor) -> Tensor:
    """The part of a vector that is orthogonal to the rows of a basis; twice, for roundings."""
    for _ in range(2):
        vector = vector - (basis @ vector) @ basis
    return vector


def gram_bound(matrices: Tensor, squarings: int = 6) -> Tensor:
    """An upper bound of the largest norm of some matrices, ``(number, rows, columns)``.

    ``||M||_2 = ||G||_2^(1/2) <= ||G^k||_F^(1/2k)`` for the Gram matrix ``G = M^* M`` and any k, which is a power of two
    here, so that k is reached by squaring: the bound is at most ``rank^(1/4k)`` times the norm.

    Reference: Delattre, Barthelemy, Araujo, Allauzen: Efficient Bound of Lipschitz Constant for Convolutional Layers by
    Gram Iteration, 2023, https://arxiv.org/abs/2305.16173

    Examples:
        >>> 3.0 <= gram_bound(torch.diag(torch.tensor([3.0, 1.0]))[None]) <= 3.01
        tensor(True)
    """
    largest = matrices.abs().max()
    matrices = matrices / largest.clamp(min=torch.finfo(largest.dtype).tiny)  # no square overflows or vanishes
    gram = matrices.mH @ matrices if matrices.shape[-1] <= matrices.shape[-2] else matrices @ matrices.mH
    log_scale = gram.new_zeros(gram.shape[0], dtype=gram.real.dtype)
    for _ in range(squarings):
        norm = torch.linalg.matrix_norm(gram).clamp(min=torch.finfo(gram.real.dtype).tiny)
        gram = gram / norm[:, None, None]
        gram = gram @ gram
        log_scale = 2 * (log_scale + norm.log())
    log_norm = (torch.linalg.matrix_norm(gram).log() + log_scale) / 2 ** (squarings + 1)
    roundings = 1 + 10 * matrices.shape[-1] * torch.finfo(gram.real.dtype).eps
    bound: Tensor = largest * log_norm.max().exp() * roundings
    return bound


def _bias_of(layer: nn.Linear | nn.Conv2d) -> Tensor:
    bias = layer.bias
    assert bias is not None  # both are made with one
    return bias.detach()


def _at_least_single(weight: Tensor) -> Tensor:
    return weight.float() if weight.dtype in (torch.float16, torch.bfloat16) else weight


_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _fingerprint(weight: Tensor) -> Tensor:
    """A number of 64 bits that tells weights apart by their bits, the same on every device.

    ``sum_i key_i * bits_i`` with an odd pseudo-random key for each place, modulo 2^64: sums of integers do not depend
    on their order, and two weights have the same one with a chance of about 2^-33.
    """
    bits = weight.contiguous().flatten().view(_BITS[weight.element_size()]).to(torch.int64)
    key = torch.arange(1, bits.numel() + 1, device=bits.device) * -7046029254386353131
    key = ((key >> 32) ^ key) * -4658895280553007687
    key = ((key >> 29) ^ key) | 1
    found: Tensor = (bits * key).sum() + 1
    return found
