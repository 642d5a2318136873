"""Invertible residual blocks compared with FrEIA's IResNetLayer and normflows' Residual, on the same branch g.

Inverses: all three invert y = x + g(x) for one g, with default settings and then at an equal error; times are medians
of ratios of interleaved rounds. Norms: each library normalises its own convolutions, with the same adversarial
weights, and the norm of the resulting dense map (padding included) is compared with the declared norm.

Run: python benchmarks/iresnet.py            (needs the bench extra: FrEIA, normflows)
"""

from __future__ import annotations

import contextlib
import io
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from invflow.bijections import Residual
from invflow.nets import LipschitzConv, SpectralConv

with contextlib.redirect_stdout(io.StringIO()):
    import normflows as nf
    from FrEIA.modules import IResNetLayer
    from normflows.nets.lipschitz import InducedNormConv2d

ERROR = 1e-6
ROUNDS = 7
BATCH = 16
COEFFICIENT = 0.97
SIZE = 128


class Branch(nn.Module):
    """A g with a known Lipschitz constant that counts its evaluations."""

    def __init__(self, function: Callable[[Tensor], Tensor], bound: float) -> None:
        super().__init__()
        self.function = function
        self.bound = bound
        self.count = 0

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return self.function(x)

    def lipschitz_bound(self) -> float:
        return self.bound


def harmonic(size: int = SIZE) -> tuple[Branch, Tensor]:
    """A symmetric Jacobian with eigenvalues c (+-1/k): few directions near the limit."""
    q = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64))[0]
    k = torch.arange(1, size // 2 + 1, dtype=torch.float64)
    matrix = (q * COEFFICIENT * torch.cat([1 / k, -1 / k])) @ q.T
    return Branch(lambda x: x @ matrix.T, COEFFICIENT), torch.randn(BATCH, size, dtype=torch.float64)


def harmonic_784() -> tuple[Branch, Tensor]:
    """The same with as many dimensions as an MNIST image, so that g costs more than the work around it."""
    return harmonic(784)


def saturating() -> tuple[Branch, Tensor]:
    """Tanh with 5 directions at the limit, the others at 0.2."""
    q = torch.linalg.qr(torch.randn(SIZE, SIZE, dtype=torch.float64))[0]
    values = torch.full((SIZE,), 0.2, dtype=torch.float64)
    values[:5] = COEFFICIENT
    matrix = (q * values) @ q.T
    return Branch(lambda x: torch.tanh(x @ matrix.T), COEFFICIENT), torch.randn(BATCH, SIZE, dtype=torch.float64)


def convolutional() -> tuple[Branch, Tensor]:
    """Three normalised convolutions with weights near the identity: the block stretches almost up to its bound."""
    net = LipschitzConv((16, 8, 8), (16, 8, 8), hidden=[16, 16]).double()
    with torch.no_grad():
        for layer in net.maps:
            middle = layer.weight.shape[-1] // 2
            layer.weight[:, :, middle, middle] += 5 * torch.eye(16)
    net.eval()
    prepared = net.prepared()

    def function(x: Tensor) -> Tensor:
        made: Tensor = COEFFICIENT * prepared(x, None)
        return made

    return Branch(function, COEFFICIENT), torch.randn(BATCH, 16, 8, 8, dtype=torch.float64)


def freia(branch: Branch, x: Tensor, iterations: int = 50) -> Callable[[Tensor], Tensor]:
    """FrEIA's block with this branch."""
    block = IResNetLayer([tuple(x.shape[1:])], fixed_point_iterations=iterations)
    block.residual = branch
    return lambda y: block([y], rev=True, jac=False)[0][0]


def normflows(branch: Branch, tolerance: float = 1e-5) -> Callable[[Tensor], Tensor]:
    """Normflows' block with this branch."""
    block = nf.flows.Residual(branch, reverse=False).iresblock
    return lambda y: block._inverse_fixed_point(y, atol=tolerance, rtol=tolerance)


def ours(branch: Branch, tolerance: float | None = None) -> Callable[[Tensor], Tensor]:
    """Our block with this branch, whose own bound is the coefficient, so that nothing is scaled."""
    block = Residual(Scaled(branch), branch.bound, tolerance=tolerance)
    return block.inverse


class Scaled(nn.Module):
    """A branch divided by its bound: `Residual` multiplies it by the coefficient."""

    def __init__(self, branch: Branch) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.branch(x) / self.branch.bound
        return made

    def lipschitz_bound(self) -> float:
        return 1.0


def measure(invert: Callable[[Tensor], Tensor], branch: Branch, x: Tensor) -> tuple[float, int]:
    """The largest relative error of a round trip, and the number of evaluations of g."""
    with torch.no_grad():
        y = x + branch(x)
        branch.count = 0
        back = invert(y)
    error = (back - x).flatten(1).norm(dim=1) / x.flatten(1).norm(dim=1)
    return float(error.max()), branch.count


def at_equal_error(
    make: Callable[[int], Callable[[Tensor], Tensor]], branch: Branch, x: Tensor
) -> Callable[[Tensor], Tensor]:
    """The cheapest setting of a library that reaches the error."""
    for effort in range(1, 200):
        invert = make(effort)
        if measure(invert, branch, x)[0] <= ERROR:
            return invert
    raise RuntimeError("no setting reaches the error")


def seconds(invert: Callable[[Tensor], Tensor], y: Tensor) -> float:
    """The seconds of one inverse."""
    start = time.perf_counter()
    with torch.no_grad():
        invert(y)
    return time.perf_counter() - start


def inverses() -> None:
    """Errors, evaluations and times."""
    print(
        f"{'inverse, c = ' + str(COEFFICIENT):36} {'error':>9} {'evaluations':>12} {'at 1e-6':>9} {'time / ours':>12}"
    )
    for make in (harmonic, harmonic_784, saturating, convolutional):
        torch.manual_seed(0)
        branch, x = make()
        y = (x + branch(x)).detach()
        efforts = {
            "FrEIA": lambda effort, branch=branch, x=x: freia(branch, x, 10 * effort),
            "normflows": lambda effort, branch=branch: normflows(branch, 10 ** (-5 - effort / 2)),
            "invflow": lambda effort, branch=branch: ours(branch, 10 ** (-5 - effort / 4)),
        }
        default = {"FrEIA": freia(branch, x), "normflows": normflows(branch), "invflow": ours(branch)}
        equal = {name: at_equal_error(effort, branch, x) for name, effort in efforts.items()}
        rounds = [{name: seconds(invert, y) for name, invert in equal.items()} for _ in range(ROUNDS)]
        for name, invert in default.items():
            error, evaluations = measure(invert, branch, x)
            _, needed = measure(equal[name], branch, x)
            ratio = statistics.median(one[name] / one["invflow"] for one in rounds)
            print(f"{make.__name__ + ', ' + name:36} {error:9.1e} {evaluations:12d} {needed:9d} {ratio:12.2f}")


def dense_norm(weight: Tensor, size: int, padding: int) -> float:
    """The norm of a convolution between images of this size, with zero padding."""
    channels = weight.shape[1]
    basis = torch.eye(channels * size**2, dtype=torch.float64).reshape(-1, channels, size, size)
    made = nn.functional.conv2d(basis, weight.detach().double(), padding=padding)
    return float(torch.linalg.matrix_norm(made.flatten(1), 2))


def hostile(kind: str) -> Tensor:
    """Weights of a convolution from 8 to 8 channels."""
    weight = torch.randn(8, 8, 3, 3)
    if kind == "x 20":
        return 20 * weight
    if kind == "rank one":
        return (torch.randn(8, 1) @ torch.randn(1, 72)).reshape(8, 8, 3, 3)
    if kind == "ill-conditioned":
        u, _, v = torch.linalg.svd(weight.flatten(1), full_matrices=False)
        return ((u * (1 - 1e-3 * torch.arange(8))) @ v).reshape(8, 8, 3, 3)
    return weight


def norms() -> None:
    """The true norm over the declared one; 1 is correct, above 1 the inverse may not exist."""
    size, declared = 8, 0.9
    print(f"\n{'true norm / declared, 3x3, 8x8':36} {'FrEIA':>9} {'normflows':>10} {'invflow':>9}")
    for kind in ("random", "x 20", "rank one", "ill-conditioned"):
        torch.manual_seed(0)
        weight = hostile(kind)
        peer = IResNetLayer([(8, size, size)], internal_size=8, spectral_norm_max=declared)
        peer.layers[0].weight.data.copy_(weight)
        peer.lipschitz_correction()
        induced = InducedNormConv2d(8, 8, 3, 1, 1, coeff=declared, n_iterations=5)
        induced.weight.data.copy_(weight)
        induced(torch.zeros(1, 8, size, size))
        mine = SpectralConv(8, 8, 3, (size, size))
        mine.weight.data.copy_(weight)
        found = [
            dense_norm(peer.layers[0].weight, size, 1) / declared,
            dense_norm(induced.compute_weight(update=False), size, 1) / declared,
            dense_norm(mine.normalized_weight(), size, 1),
        ]
        print(f"{kind:36} {found[0]:9.4f} {found[1]:10.4f} {found[2]:9.4f}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    inverses()
    norms()
