"""Spectral normalisation: linear maps and convolutions of bounded norm, as functions of their weights alone."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from .._torch import is_shard, transforms_active
from ..errors import ShapeError
from ..numerics.backend import own_precision
from ..numerics.integer import CONVOLUTIONS, Convolution
from ..state import TensorShape, shape_of

Map: TypeAlias = Callable[[Tensor], Tensor]

TOLERANCE_POWER = 2 / 3
"""A singular pair has converged when its residual, relative to the norm, is at most ``eps ** TOLERANCE_POWER``: 2e-5 in
float32, 4e-11 in float64. The error of the norm is of second order in it, over the gap to the next singular value; the
error of the gradient is of first order."""

LOOSE = 5e-4
"""If the residual, relative to the norm, is above this, the certified bound replaces the estimate."""

STEPS = 60
"""Lanczos steps before a restart. Each step stores a vector of the smaller side."""

RESTARTS = 5

FRESH_SHARE = 0.01
"""The share of a random vector in the start vector. After an edit of the weights, the last singular vector may still be
singular without being the top one; the iteration would never leave it."""


_CONVOLVE: dict[int, Callable[..., Tensor]] = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}
_TRANSPOSED: dict[int, Callable[..., Tensor]] = {
    1: functional.conv_transpose1d,
    2: functional.conv_transpose2d,
    3: functional.conv_transpose3d,
}
"""By the number of dimensions besides the channels."""


class _Spectral(nn.Module, ABC):
    """A linear map ``A``, its norm (the largest singular value), and the weight divided by ``max(1, norm / bound)``.

    The norm is ``u . A v`` for the top singular vectors u and v of the current weights, found by Lanczos iteration
    (power iteration with a memory, many times faster if singular values cluster). Buffers hold them together with a
    fingerprint of the weights that they belong to. As long as the bits of the weights are the same, u and v are
    reused; after any change, the next call iterates from them to convergence. So the norm is a function of the weights,
    in train mode too, and forward and inverse agree. The gradient of the norm is ``u v^T``.
    Construction does not iterate: the first call does, or the first change of mode.

    In eval mode a call changes no buffer: if the weights were edited after the mode was set, each call iterates and
    discards the result.

    Reference: Miyato, Kataoka, Koyama, Yoshida: Spectral Normalization for Generative Adversarial Networks, 2018,
    https://arxiv.org/abs/1802.05957; Lanczos: An iteration method for the solution of the eigenvalue problem of linear
    differential and integral operators, 1950
    """

    weight: nn.Parameter
    bias: nn.Parameter
    u: Tensor
    v: Tensor
    margin: Tensor
    fingerprint: Tensor

    derived = frozenset({"u", "v", "margin", "fingerprint"})
    """The buffers that follow from the weights."""

    def __init__(
        self, plain: nn.Linear | Convolution, in_shape: TensorShape, out_shape: TensorShape, bound: float
    ) -> None:
        super().__init__()
        self.bound = bound
        self.weight, self.bias = plain.weight, plain.bias  # type: ignore[assignment]  # both have a bias
        self.in_shape = in_shape
        self.out_shape = out_shape
        self.register_buffer("u", torch.zeros(out_shape))
        self.register_buffer("v", torch.zeros(in_shape))
        self.register_buffer("margin", torch.ones(()))
        self.register_buffer("fingerprint", torch.zeros((), dtype=torch.int64))
        self.register_load_state_dict_pre_hook(_without_the_pair)  # type: ignore[no-untyped-call]
        self._where: tuple[Any, ...] = (...,)  # of u and v, where the iteration takes place; they are 0 elsewhere

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """``A x + bias`` for a batch, with the ``A`` of these weights."""
        return self._map(x, weight, bias)

    @abstractmethod
    def _map(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """``A x + bias``."""

    @abstractmethod
    def transposed(self, y: Tensor, weight: Tensor) -> Tensor:
        """``A^T y`` for a batch."""

    @abstractmethod
    def certified_norm(self) -> Tensor:
        """An upper bound of the norm, a few percent above it, that depends on no iteration or random start."""

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x, self.normalized_weight(), self.bias)

    def norm(self) -> Tensor:
        """The norm of the map for the current weights, with its gradient."""
        with own_precision(self.weight):
            u, v, margin = self._pair(keep=self.training)
            weight = _at_least_single(self.weight)
            image = self.linear(v.to(weight.dtype)[None], weight)[0]
            return (margin * (u * image).sum()).to(self.weight.dtype)

    def normalized_weight(self) -> Tensor:
        """The weight, scaled down to the bound if its norm is above it; otherwise unchanged."""
        return self.weight / (self.norm() / self.bound).clamp(min=1.0)

    def train(self, mode: bool = True) -> Any:
        """Set the mode, and update the singular vectors, so that evaluation does not iterate at every call."""
        super().train(mode)
        if not is_shard(self.weight):  # or the next call finds them, which has the whole of it
            self._pair(keep=True)
        return self

    @torch.no_grad()
    def _pair(self, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
        """``u``, ``v`` and the factor by which the norm is enlarged to be safe."""
        weight = self.weight.detach()
        key = _fingerprint(weight)
        if weight.is_meta or bool(key == self.fingerprint):  # meta tensors have no bits
            return self.u.clone(), self.v.clone(), self.margin.clone()
        u, v, margin = (found.to(self.u.dtype) for found in self._iterate(weight, int(key)))
        # Inside a transform of torch.func buffers must not be written: the next call finds the pair again.
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
        weight, after, before = self._fewer_channels(weight)
        # Seeded by the weights themselves, so that weights are orthogonal to it with probability 0.
        generator = torch.Generator().manual_seed(seed)
        last = self.v[self._where].to(weight)
        last = last if before is None else torch.tensordot(before, last, ([0], [0]))
        fresh = torch.randn(last.shape, generator=generator, dtype=torch.float64).to(weight)
        images = (weight.shape[0], *self.u[self._where].shape[1:])
        start = last / last.norm() + FRESH_SHARE * fresh / fresh.norm() if bool(last.norm() > 0.5) else fresh
        tolerance = torch.finfo(weight.dtype).eps ** TOLERANCE_POWER
        u, v, norm, residual = top_singular_pair(
            lambda x: self._map(x.reshape(1, *last.shape), weight).flatten(),
            lambda y: self.transposed(y.reshape(1, *images), weight).flatten(),
            start.flatten(),
            tolerance,
        )
        if residual <= tolerance * norm:
            factor = 1.0
        elif residual <= LOOSE * norm:
            factor = 1.0 + residual / norm
        else:
            factor = float(self.certified_norm() / largest) / norm
        pair = weight.new_zeros(self.out_shape), weight.new_zeros(self.in_shape)
        parts = u.reshape(images), v.reshape(last.shape)
        for whole, part, basis in zip(pair, parts, (after, before), strict=True):
            whole[self._where] = part if basis is None else torch.tensordot(basis, part, 1)
        return *pair, weight.new_tensor(factor)

    def _fewer_channels(self, weight: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The weights of a smaller map with the same norm, and orthonormal bases, in the channels after and before the
        map, on which its singular vectors are those of this one; None stands for all channels.
        """
        return weight, None, None


def _without_the_pair(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Runs before a load: the fingerprint of weights that come without their pair would make it that of the old one."""
    if not all(f"{prefix}{name}" in state_dict for name in ("u", "v", "margin")):
        state_dict.pop(f"{prefix}fingerprint", None)


class SpectralLinear(_Spectral):
    """``y = W x / max(1, ||W|| / bound) + b``: Lipschitz constant at most the bound.

    Args:
        in_features: the size of x.
        out_features: the size of y.
        bound: the largest norm.

    Examples:
        >>> layer = SpectralLinear(3, 4)
        >>> with torch.no_grad():
        ...     _ = layer.weight.mul_(100)
        >>> f"{torch.linalg.matrix_norm(layer.normalized_weight().detach(), 2).item():.4f}"
        '1.0000'
    """

    def __init__(self, in_features: int, out_features: int, bound: float = 1.0) -> None:
        plain = nn.Linear(in_features, out_features)
        super().__init__(plain, (in_features,), (out_features,), bound)

    def _map(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return functional.linear(x, weight, bias)

    def transposed(self, y: Tensor, weight: Tensor) -> Tensor:
        return y @ weight

    @torch.no_grad()
    def certified_norm(self) -> Tensor:
        return gram_bound(self.weight.detach()[None])


class SpectralConv(_Spectral):
    """A convolution with zero padding, divided by ``max(1, norm / bound)``: Lipschitz constant at most the bound.

    The norm is that of the map between inputs of the given size, with its padding and its stride. It is neither the
    norm of the kernel as a matrix, which may be smaller or larger, nor that of a circular convolution, which is larger.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: the side of the kernel.
        size: (height, width) of the input, or (length,) or (depth, height, width); other sizes are refused, because the
            norm would differ.
        stride: the step between output positions.
        padding: zeros on each side; the default keeps the positions for odd kernels and stride 1.
        bound: the largest norm.

    Examples:
        >>> SpectralConv(2, 3, 3, size=(5, 5))(torch.zeros(1, 2, 5, 5)).shape
        torch.Size([1, 3, 5, 5])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        size: tuple[int, ...],
        stride: int = 1,
        padding: int | None = None,
        bound: float = 1.0,
    ) -> None:
        padding = kernel_size // 2 if padding is None else padding
        after = [(extent + 2 * padding - kernel_size) // stride + 1 for extent in size]
        if min(after) < 1:
            raise ShapeError(f"a kernel of side {kernel_size} expects larger inputs than {' x '.join(map(str, size))}")
        plain = CONVOLUTIONS[len(size) - 1](in_channels, out_channels, kernel_size)
        super().__init__(plain, (in_channels, *size), (out_channels, *after), bound)
        self.stride = stride
        self.padding = padding
        self._dims = len(size)
        # The positions at the end of the input that the stride leaves out; the transposed map adds them again.
        self._left_over = [(extent + 2 * padding - kernel_size) % stride for extent in size]
        if kernel_size == stride == 1 and not padding:
            # One matrix at every position: its norm is that of the map, and any one position attains it.
            self._where = (slice(None), *(slice(1) for _ in size))

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if shape_of(x) != self.in_shape:
            raise ShapeError(
                f"a spectral convolution built for the shape {self.in_shape} got {shape_of(x)}: its norm would differ"
            )
        return super().linear(x, weight, bias)

    def _map(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return _CONVOLVE[self._dims](x, weight, bias, self.stride, self.padding)

    def transposed(self, y: Tensor, weight: Tensor) -> Tensor:
        return _TRANSPOSED[self._dims](y, weight, None, self.stride, self.padding, self._left_over)

    def _fewer_channels(self, weight: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """One position of the output depends on ``n`` numbers of each channel of the input, n the size of the kernel.

        So the outputs lie, at each position, in a space of n times the input's channels, and the inputs that matter in
        one of n times the output's. A block of i-ResNet leads from few channels to many and back.
        """
        after, before, *sides = weight.shape
        size = math.prod(sides)
        if after > before * size:
            basis, rest = torch.linalg.qr(weight.flatten(1))
            return rest.reshape(-1, before, *sides), basis, None
        if before > after * size:
            basis, rest = torch.linalg.qr(weight.transpose(0, 1).flatten(1))
            return rest.reshape(-1, after, *sides).transpose(0, 1), None, basis
        return weight, None, None

    @torch.no_grad()
    def certified_norm(self) -> Tensor:
        """The largest norm of the kernel's Fourier transform at any frequency, on a grid so large that nothing wraps.

        These matrices are the diagonal blocks of the circular convolution on that grid. The convolution with zero
        padding is some rows and columns of it, so its norm is no larger. A stride leaves out further rows.

        Reference: Sedghi, Gupta, Long: The Singular Values of Convolutional Layers, 2018,
        https://arxiv.org/abs/1805.10408
        """
        kernel = _at_least_single(self.weight.detach())
        sizes = [extent + side - 1 for extent, side in zip(self.in_shape[1:], kernel.shape[2:], strict=True)]
        transform = torch.fft.rfftn(kernel, s=sizes, dim=tuple(range(2, kernel.dim())))
        return gram_bound(transform.flatten(2).movedim(2, 0))


def top_singular_pair(
    apply: Map, transpose: Map, start: Tensor, tolerance: float
) -> tuple[Tensor, Tensor, float, float]:
    """The top singular vectors of a map, its norm, and the residual ``|A^T u - norm v|``.

    Lanczos iteration for the top eigenvector of ``A^T A``, or of ``A A^T`` if that is smaller, with full
    reorthogonalization, restarted from its best vector. It is exact when the number of steps reaches the dimension of
    the smaller side. The square costs small singular values their digits, and the largest none.

    Args:
        apply: ``A``, from a vector to a vector.
        transpose: ``A^T``.
        start: the start vector, not zero.
        tolerance: the residual, relative to the norm, at which the iteration stops.
    """
    image = apply(start)
    if not bool(image.norm() > 0):  # zero: a kernel, for example, that only meets the padding
        return torch.zeros_like(image), start / start.norm(), 0.0, 0.0
    if image.numel() < start.numel():  # from the smaller side, which is exhausted first
        v, u, norm, residual = top_singular_pair(transpose, apply, image, tolerance)
        return u, v, norm, residual
    v = start / start.norm()
    scale = float(image.norm() / start.norm())  # so that no square under- or overflows
    for _ in range(RESTARTS):
        v, residual = _top_eigenvector(lambda x: transpose(apply(x) / scale) / scale, v, tolerance)
        if not residual > tolerance:
            break
    image = apply(v)
    norm = float(image.norm())
    return image / norm, v, norm, residual * norm


def _top_eigenvector(gram: Map, v: Tensor, tolerance: float) -> tuple[Tensor, float]:
    """The best vector of at most `STEPS` steps, and ``|G v - value v| / value``, for a symmetric map with ``G v != 0``.

    Args:
        gram: the map, without negative eigenvalues.
        v: the start vector, of length 1.
        tolerance: the residual at which the iteration stops.
    """
    basis = v[None]
    steps = min(STEPS, v.numel())
    largest = 0.0
    projected = torch.zeros(steps, steps, dtype=torch.float64)  # G on the basis, below the diagonal
    # What is left of a product is a rounding error if it is smaller: the space is exhausted.
    floor = 10 * torch.finfo(v.dtype).eps * max(1.0, math.sqrt(v.numel()) / 10)
    for done in range(1, steps + 1):
        w = gram(basis[-1])
        largest = max(largest, float(w.norm()))
        for _ in range(2):  # because of rounding errors
            shares = basis @ w
            w = w - shares @ basis
            projected[done - 1, :done] += shares.to(projected)
        rest = float(w.norm())
        exhausted = done == steps or not rest > floor * largest
        if exhausted or done % 4 == 0:
            values, vectors = torch.linalg.eigh(projected[:done, :done])
            residual = rest * abs(float(vectors[-1, -1])) / float(values[-1])
            if exhausted or residual <= tolerance:
                break
        basis = torch.cat([basis, w[None] / rest])
    v = vectors[:, -1].to(v) @ basis
    return v / v.norm(), residual


def gram_bound(matrices: Tensor, squarings: int = 6) -> Tensor:
    """An upper bound of the largest norm among matrices, ``(number, rows, columns)``.

    ``||M||_2 = ||G||_2^(1/2) <= ||G^k||_F^(1/2k)`` for the Gram matrix ``G = M^* M`` and any k. Here k is a power of
    two, reached by repeated squaring. The bound is at most ``rank^(1/4k)`` times the norm.

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


def _at_least_single(weight: Tensor) -> Tensor:
    return weight.float() if weight.dtype in (torch.float16, torch.bfloat16) else weight


_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _fingerprint(weight: Tensor) -> Tensor:
    """A 64-bit hash of the bits of the weights, the same on every device.

    ``sum_i key_i * bits_i`` modulo 2^64, with an odd pseudo-random key for each position. Sums of integers do not
    depend on their order. Two different weights collide with a probability of about 2^-33.
    """
    bits = weight.contiguous().flatten().view(_BITS[weight.element_size()]).to(torch.int64)
    key = torch.arange(1, bits.numel() + 1, device=bits.device) * -7046029254386353131
    key = ((key >> 32) ^ key) * -4658895280553007687
    key = ((key >> 29) ^ key) | 1
    return (bits * key).sum() + 1
