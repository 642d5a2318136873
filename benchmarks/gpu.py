"""Invflow on a GPU, in a few minutes and without a network: whether it is right there, how fast, in how much memory.

Every registered layer and every shipped spec is compared with the CPU; exact inverses are compared bit by bit across
batch sizes and devices, with TF32 products allowed; the three backprop policies by their gradients, their time and
their memory. Without a GPU, the same runs on the CPU, which tests the script.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import memory
import torch
from chains import measure, ours, present
from rich.console import Console
from rich.table import Table
from torch import Tensor
from train_step import check_gradients, contenders, step

import invflow
from invflow.models import Flow
from invflow.models.freezing import freeze
from invflow.numerics import Exact, Grid
from invflow.state import leaves, make_state
from invflow.training import run as runs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SPECS = Path(__file__).parent.parent / "specs"
FLOAT64, FLOAT32, BFLOAT16 = 1e-9, 1e-3, 0.1
"""Errors allowed, relative to the largest number: a map of condition number 1e4 in float64, a net in float32."""
BATCH = 4


class Report:
    """A table with a row for each thing measured."""

    def __init__(self) -> None:
        self.table = Table("what", "found", "allowed", "")
        self.wrong = 0

    def add(self, what: str, found: str, allowed: str = "", *, right: bool = True) -> None:
        self.wrong += not right
        self.table.add_row(what, found, allowed, "" if right else "WRONG")
        print(what, found, allowed, "" if right else "WRONG", flush=True)

    def error(self, what: str, errors: dict[str, float], allowed: float) -> None:
        """The largest of some errors, by name."""
        worst = max(errors, key=lambda name: errors[name])
        right = errors[worst] <= allowed
        self.add(f"{what} ({len(errors)})", f"{errors[worst]:.1e} ({worst})", f"{allowed:.0e}", right=right)

    @contextmanager
    def section(self, what: str) -> Iterator[None]:
        """A part whose failure is a row, so that the others still run."""
        started = time.perf_counter()
        try:
            yield
        except Exception as error:
            self.add(what, f"{type(error).__name__}: {str(error).splitlines()[0]}", right=False)
        print(f"# {what}: {time.perf_counter() - started:.0f} s", flush=True)


def relative(found: Any, expected: Any) -> float:
    """The largest difference, by the largest number; infinite if it is no number."""
    flat = (torch.cat([leaf.flatten() for leaf in leaves(state)]) for state in (found, expected))
    one, other = (state.detach().cpu().double() for state in flat)
    error = float((one - other).abs().max() / other.abs().max().clamp(min=1.0))
    return error if error == error else float("inf")


def drawn(shape: Any, domain: str = "reals") -> Any:
    """A batch in float64 on the CPU."""
    generator = torch.Generator().manual_seed(0)

    def draw(leaf: Any) -> Tensor:
        size = (BATCH, *leaf)
        if domain == "reals":
            return torch.randn(size, generator=generator, dtype=torch.float64)
        unit = 0.05 + 0.9 * torch.rand(size, generator=generator, dtype=torch.float64)
        return 2 * unit - 1 if domain == "symmetric" else unit

    return make_state(draw, shape)


def moved(state: Any, **where: Any) -> Any:
    """The state in another dtype or on another device."""
    return tuple(moved(part, **where) for part in state) if isinstance(state, tuple) else state.to(**where)


def layers(report: Report) -> None:
    """Forward, log-determinant and inverse of each registered layer, in float64, against the CPU."""
    errors: dict[str, float] = {}
    for tag, cls in invflow.registered().items():
        for number, (fields, shape) in enumerate(cls.examples):
            torch.manual_seed(0)
            try:
                document = {"input": {"shape": shape}, "layers": [{"type": tag, **fields}]}
                there = invflow.build(document).double().eval()
                x = there.numerics.nearest(drawn(shape, there[0].domain))
                if there.awaits_data:
                    there.initialize(x)
                here = copy.deepcopy(there).to(DEVICE)
                y = there(x)
                found = here(moved(x, device=DEVICE))
                pairs = [(found, y), (here.inverse(moved(y, device=DEVICE)), there.inverse(y))]
                if there.surjective:
                    given = moved(x, device=DEVICE)
                    pairs.append((here.forward_and_log_det(given)[1], there.forward_and_log_det(x)[1]))
                errors[f"{tag} {number}"] = max(relative(*pair) for pair in pairs)
            except Exception as error:
                report.add(f"layer {tag}", f"{type(error).__name__}: {str(error).splitlines()[0]}", right=False)
    report.error("layers in float64, against the CPU", errors, FLOAT64)


def specs(report: Report) -> None:
    """The shipped specs: round trips, and features or log-densities against those of the CPU."""
    for what, dtype, allowed in (("float64", torch.float64, FLOAT64), ("float32", torch.float32, FLOAT32)):
        errors: dict[str, float] = {}
        for path in sorted(SPECS.rglob("*.json")):
            spec = invflow.load_spec(path)
            torch.manual_seed(0)
            model: Any = invflow.build_model(spec).double().eval()
            size = (BATCH, *spec.input_shape)
            x = torch.randint(16, size, generator=torch.Generator().manual_seed(0)).double() / 16
            given = None
            if spec.context_shape is not None:
                given = torch.eye(spec.context_shape[0], dtype=torch.float64)[torch.arange(BATCH) % 2]
            if model.bijection.awaits_data:
                model.bijection.initialize(x, given)
            here = copy.deepcopy(model).to(DEVICE, dtype)
            where = {"device": DEVICE, "dtype": dtype}
            with torch.no_grad():
                there = model(x, given)
                found = here(moved(x, **where), None if given is None else given.to(**where))
                errors[path.stem] = relative(found, there)
        report.error(f"specs in {what}, against the CPU's float64", errors, allowed)


def exactness(report: Report) -> None:
    """Every bit of every image comes back, from any batch, on either device, or it is refused."""
    x = torch.randint(256, (500, 1, 28, 28), generator=torch.Generator().manual_seed(0)) / 256
    for tf32 in (False, True):
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
        for name in ("irevnet_mnist", "irevnet_mnist_augmented"):
            torch.manual_seed(0)
            real = invflow.build(SPECS / f"{name}.json").eval()
            for numerics in (Grid(mode="grid"), Exact(mode="exact")):
                what = f"{name}, {numerics.mode}, TF32 {'allowed' if tf32 else 'off'}"
                try:
                    with torch.no_grad():
                        there = freeze(real, x, numerics)
                        here = copy.deepcopy(there).to(DEVICE)
                        z = here(x.to(DEVICE))
                        back = [torch.cat([here.inverse(part) for part in z.split(size)]) for size in (500, 64, 7, 1)]
                        bits = [int((one.cpu() != x).sum()) for one in back]
                        of_cpu = int((there.inverse(z.cpu()) != x).sum())
                except invflow.errors.NumericsError as error:
                    report.add(what, f"refused: {str(error)[:60]}")
                    continue
                wanted = "0" if numerics.mode == "exact" else ""
                right = sum(bits[:1]) == 0 and (numerics.mode == "grid" or not sum(bits) + of_cpu)
                found = f"wrong pixels at batch 500, 64, 7, 1: {bits}; features of this device on the CPU: {of_cpu}"
                report.add(what, found, wanted, right=right)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


def gradients(report: Report) -> None:
    """The gradients of the policies, plain, under bfloat16 autocast and compiled, against stored activations."""
    spec = invflow.load_spec(SPECS / "irevnet_mnist.json")
    x = torch.rand(64, 1, 28, 28, generator=torch.Generator().manual_seed(0)).to(DEVICE)

    def gradient(backprop: str, *, half: bool = False, compiled: bool = False) -> Tensor:
        torch.manual_seed(0)
        chain: Any = invflow.build(spec.replace(backprop=backprop)).to(DEVICE)
        call = torch.compile(chain) if compiled else chain
        with torch.autocast(DEVICE, torch.bfloat16, enabled=half):
            y = call(x)
        y.float().square().mean().backward()
        return torch.cat([weight.grad.flatten() for weight in chain.parameters()])

    for what, options, allowed in (
        ("float32", {}, FLOAT32),
        ("bfloat16 autocast", {"half": True}, BFLOAT16),
        ("compiled", {"compiled": True}, FLOAT32),
    ):
        expected = gradient("stored", **options)
        errors = {}
        for policy in ("checkpoint", "reversible"):
            found = gradient(policy, **options)
            errors[policy] = float((found - expected).norm() / expected.norm())
        report.error(f"gradients, {what}", errors, allowed)


def times(report: Report, rounds: int) -> None:
    """A training step of eight couplings, by that of hand-written PyTorch, and the inverse by the forward."""
    peers, _ = present()
    for batch, channels, side in ((64, 16, 7), (16, 16, 32), (32, 16, 64), (32, 64, 128)):
        made = contenders(channels, side, 8, [name for name in peers if name != "FrEIA"], DEVICE)
        x = torch.randn(batch, channels, side, side, device=DEVICE)
        check_gradients(made, x)
        works = {n: partial(step, m, torch.optim.SGD(m.parameters(), lr=1e-6), x) for n, m in made.items()}
        ratios = measure(works, rounds)
        found = ", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items())
        report.add(f"training step, batch {batch} of {channels}x{side}x{side}", found)
        with torch.no_grad():
            chain = ours(list(made["invflow"].nets)).eval()
            y = chain(x)
            found_inverse = measure({"forward": partial(chain, x), "inverse": partial(chain.inverse, y)}, rounds)
        report.add("  inverse by forward", f"{found_inverse['inverse']:.2f}")


def sizes(report: Report, depths: list[int]) -> None:
    """The memory of a training step over depth, each in its own process."""
    here, _ = present()
    for name in ("plain", "invflow stored", "invflow checkpoint", "invflow reversible", *here):
        if name != "FrEIA":
            found = ", ".join(f"{depth}: {memory.measure(name, depth):.0f}" for depth in depths)
            report.add(f"memory by depth, {name}", found, "MiB")


def training(report: Report) -> None:
    """The shipped runs of digits and moons, here: test accuracy and negative log-likelihood."""
    for name in ("irevnet_digits", "realnvp_moons"):
        with tempfile.TemporaryDirectory() as folder:
            started = time.perf_counter()
            run = runs.train(
                invflow.load_spec(SPECS / f"{name}.json"),
                Path(folder) / "run",
                overrides={"accelerator": DEVICE},
                progress=False,
            )
            seconds = time.perf_counter() - started
            values = run.metrics[-1]
            score = "test_accuracy" if "test_accuracy" in values else "test_loss"
            limit, right = ("0.95", values[score] > 0.95) if score == "test_accuracy" else ("1.3", values[score] < 1.3)
            report.add(f"training {name}, {seconds:.0f} s", f"{score} {values[score]:.3f}", limit, right=right)


def inverses(report: Report) -> None:
    """The inverse of an i-ResNet, by fixed-point iteration, and samples of a Glow."""
    torch.manual_seed(0)
    chain = invflow.build(SPECS / "iresnet_mnist.json").to(DEVICE).eval()
    x = torch.rand(BATCH, 1, 28, 28, device=DEVICE)
    with torch.no_grad():
        report.error("i-ResNet's round trip", {"float32": relative(chain.inverse(chain(x)), x)}, 1e-4)
    glow: Any = invflow.build_model(SPECS / "published" / "glow_cifar10.json").to(DEVICE).eval()
    assert isinstance(glow, Flow)
    with torch.no_grad():
        x = torch.rand(BATCH, 3, 32, 32, device=DEVICE)
        glow.bijection.initialize(x)
        report.error("Glow's round trip", {"float32": relative(glow.inverse(glow.bijection(x)), x)}, 1e-3)


def main() -> None:
    """Print the table; exit status 1 if something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--depths", type=int, nargs="+", default=[4, 64, 256])
    parser.add_argument("--only", nargs="+", help="names of parts, such as layers")
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    card = torch.cuda.get_device_name() if DEVICE == "cuda" else "the CPU"
    report = Report()
    parts: dict[str, Callable[[Report], None]] = {
        "layers": layers,
        "specs": specs,
        "exactness": exactness,
        "gradients": gradients,
        "inverses": inverses,
        "training": training,
        "times": partial(times, rounds=given.rounds),
        "sizes": partial(sizes, depths=given.depths),
    }
    for name, part in parts.items():
        if not given.only or name in given.only:
            with report.section(name):
                part(report)
    report.table.title = f"{card}, PyTorch {torch.__version__}"
    Console(width=160).print(report.table)
    raise SystemExit(bool(report.wrong))


if __name__ == "__main__":
    main()
