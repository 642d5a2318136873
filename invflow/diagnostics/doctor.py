"""What a machine has and lacks: versions, extras, devices, data, a compiler, plug-ins; and the fix beside each."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, entry_points, metadata, requires, version
from pathlib import Path

import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from ..data.vision import MISSING, Digits, Torchvision
from ..errors import InvflowError, NumericsError
from ..fields import cut
from ..numerics.backend import trust
from ..plugins import load_plugin
from ..registry import REGISTRIES, UnknownTag, data
from ..source import DATA_VARIABLE, Request

PACKAGE = "invflow"
NEEDED_EXTRA = "train"
NEEDED_DATA = "mnist"  # most specs that ship are trained on it, or on the digits
UNUSABLE = {"torch": SpecifierSet("!=2.13.0")}
"""What the requirements allow and nobody should use: torchvision does not import beside that torch."""
COMPILE_SECONDS = 180
_LONGEST = 300

_COMPILE = """
import sys, time, torch, invflow
chain = invflow.build({"input": {"shape": [2]}, "layers": [{"type": "affine"}]}).to(sys.argv[1])
x, start = torch.ones(4, 2, device=sys.argv[1]), time.perf_counter()
try:
    torch.testing.assert_close(torch.compile(chain)(x), chain(x))
except Exception as error:
    lines = f"{type(error).__name__}: {error}".splitlines()
    sys.exit(print(next((line for line in lines if "error:" in line), lines[0])) or 1)  # the compiler's own words
print(f"in {time.perf_counter() - start:.0f} s")
"""
_IN_HASTE = {"TORCHINDUCTOR_COMPILE_THREADS": "1", "TORCHINDUCTOR_VEC_ISA_OK": "1"}
"""No pool of processes, and no trial of vector instructions: they take longer than the chain."""


@dataclass(frozen=True)
class Finding:
    """One fact about a machine.

    Attributes:
        topic: "versions", "extras", "devices", "numerics", "compiler", "data" or "plug-ins".
        name: what it is about.
        found: what is there.
        fix: what to do about it; empty if there is nothing to do.
        problem: whether something that this library promises does not work.
    """

    topic: str
    name: str
    found: str
    fix: str = ""
    problem: bool = False


def examine(root: Path | None = None, plugins: Sequence[Path] = ()) -> Iterator[Finding]:
    """Looks at this machine.

    Args:
        root: the data root; None for that of the environment.
        plugins: Python files to load, beside all plug-ins that are installed.
    """
    topics: dict[str, Callable[[Callable[..., Finding]], Iterator[Finding]]] = {
        "versions": _versions,
        "extras": _extras,
        "devices": _devices,
        "numerics": _numerics,
        "compiler": _compiler,
        "data": partial(_data, root),
        "plug-ins": partial(_plug_ins, plugins),
    }
    for topic, look in topics.items():
        try:
            yield from look(partial(Finding, topic))
        except Exception as error:  # whatever is broken on a broken machine: the other topics are still told
            yield Finding(topic, "", _line(error), "repair what raises this", problem=True)


def _line(error: Exception) -> str:
    name = "" if isinstance(error, InvflowError) else f"{type(error).__name__}: "
    return _cut(f"{name}{error}")


def _cut(text: str) -> str:
    """A library's message as one line that is not too long."""
    return cut(" ".join(text.split()), _LONGEST)


def _required(extra: str = "") -> list[Requirement]:
    """What an extra installs in addition, or what is installed in any case."""

    def asks(package: Requirement, extra: str) -> bool:
        return package.marker is None or package.marker.evaluate({"extra": extra})

    packages = map(Requirement, requires(PACKAGE) or ())
    return [one for one in packages if asks(one, extra) and not (extra and asks(one, ""))]


def _allowed(package: Requirement) -> SpecifierSet:
    return package.specifier & UNUSABLE.get(package.name, SpecifierSet())


def _installed(package: Requirement) -> tuple[str, bool]:
    """The version of a package or that it is missing, and whether it will do."""
    try:
        found = version(package.name)
    except PackageNotFoundError:
        return "not installed", False
    fits = _allowed(package).contains(found, prereleases=True)
    return found if fits else f"{found}, expected {_allowed(package)}", fits


def _versions(finding: Callable[..., Finding]) -> Iterator[Finding]:
    yield finding(PACKAGE, f"{version(PACKAGE)}, {Path(__file__).parents[1]}")
    yield finding("python", f"{platform.python_version()}, {sys.executable}")
    for package in _required():
        found, fits = _installed(package)
        along = " torchvision" if package.name == "torch" else ""  # each torchvision is built for one torch
        fix = f"pip install --upgrade '{package.name}{_allowed(package)}'{along}"
        yield finding(package.name, found, "" if fits else fix, problem=not fits)


def _extras(finding: Callable[..., Finding]) -> Iterator[Finding]:
    for extra in metadata(PACKAGE).get_all("Provides-Extra") or ():
        packages = [(package.name, *_installed(package)) for package in _required(extra)]
        whole = all(fits for *_, fits in packages)
        found = ", ".join(f"{name} {found}" for name, found, _ in packages)
        fix = "" if whole else f"pip install '{PACKAGE}[{extra}]'"
        yield finding(extra, found, fix, problem=not whole and extra == NEEDED_EXTRA)


def _accelerators() -> list[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about a driver: _devices tells it
        cuda = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [f"cuda:{index}" for index in range(cuda)] + ["mps"] * torch.backends.mps.is_available()


def _float64(device: str) -> bool:
    try:
        torch.ones(2, dtype=torch.float64, device=device).sum()
    except TypeError:  # of MPS
        return False
    return True


def _devices(finding: Callable[..., Finding]) -> Iterator[Finding]:
    yield finding("cpu", f"{os.cpu_count()} cores, PyTorch threads: {torch.get_num_threads()}, float64")
    there = _accelerators()
    for device in there:
        found = []
        if device != "mps":
            free, total = torch.cuda.mem_get_info(device)
            found = [torch.cuda.get_device_name(device), f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free"]
        yield finding(device, ", ".join([*found, "float64" if _float64(device) else "no float64"]))
    if not there:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            torch.cuda.is_available()
        why = "".join(f": {_cut(str(one.message))}" for one in said[:1])
        built = f"PyTorch is built for {f'CUDA {torch.version.cuda}' if torch.version.cuda else 'the CPU'}"
        yield finding("cuda, mps", f"none; {built}{why}")
    distributed = torch.distributed
    backends = {"gloo": "is_gloo_available", "nccl": "is_nccl_available"}
    have = [name for name, ask in backends.items() if distributed.is_available() and getattr(distributed, ask)()]
    yield finding("distributed", ", ".join(have) or "no backend")


def _numerics(finding: Callable[..., Finding]) -> Iterator[Finding]:
    for device in ("cpu", *_accelerators()):
        dtypes = (torch.float32, torch.float64)[: 1 + _float64(device)]
        try:
            for dtype in dtypes:
                trust(torch.zeros(1, dtype=dtype, device=device))
        except NumericsError as error:
            found, _, fix = str(error).partition("; ")
            yield finding(device, found, fix, problem=device != "mps")  # for which nothing is promised
        else:
            names = " and ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            yield finding(device, f"sums are exact in {names}, as exact numerics need")


def _compiler(finding: Callable[..., Finding]) -> Iterator[Finding]:
    for device in dict.fromkeys(name.partition(":")[0] for name in ("cpu", *_accelerators())):
        seconds = _compiled(device)
        if seconds.startswith("in "):
            yield finding(device, f"torch.compile compiles a chain {seconds}")
            continue
        fix = "apt install g++ python3-dev, or name a C++ compiler in CXX"
        yield finding(device, f"torch.compile fails, and nothing else needs it: {_cut(seconds)}", fix)


def _compiled(device: str) -> str:
    """How long a compilation took ("in 3 s"), or why it failed; in a process that can be ended, with no cache."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as cache:
        environment = {**os.environ, **_IN_HASTE, "TORCHINDUCTOR_CACHE_DIR": cache}
        command = [sys.executable, "-c", _COMPILE, device]
        try:
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, timeout=COMPILE_SECONDS, check=False
            )
        except subprocess.TimeoutExpired:
            return f"no end after {COMPILE_SECONDS} s"
    said = (done.stdout.strip() or done.stderr.strip() or f"exit status {done.returncode}").splitlines()
    return said[-1]


def _data(root: Path | None, finding: Callable[..., Finding]) -> Iterator[Finding]:
    place = Request("", root=root).data_root
    yield finding("root", str(place.resolve()))
    try:
        digits = Digits().load(Request("digits"))
        yield finding("digits", f"{len(digits.train) + len(digits.test):,} images, in scikit-learn")
    except Exception as error:  # a broken installation raises anything
        yield finding("digits", _line(error), f"pip install '{PACKAGE}[{NEEDED_EXTRA}]'", problem=True)
    try:
        import torchvision  # noqa: F401
    except Exception as error:
        fix = "pip install --upgrade torch torchvision"
        yield finding("torchvision", f"does not import: {_line(error)}", fix, problem=True)
        return
    for tag, source in data.registered().items():
        if not issubclass(source, Torchvision):
            continue
        faults = source.faults(place)
        if not faults:
            yield finding(tag, "found")
        elif len(faults) == len(source.files()) and set(faults.values()) == {MISSING}:
            needed = tag == NEEDED_DATA
            fix = f"set {DATA_VARIABLE} to the folder that holds {source.folder}, or train with --download"
            yield finding(tag, "not found", fix if needed else "", problem=needed)
        else:
            found = ", ".join(f"{name} is {fault}" for name, fault in faults.items())
            fix = "delete what is damaged, then train with --download, or copy it again"
            yield finding(tag, found, fix, problem=True)


def _plug_ins(files: Sequence[Path], finding: Callable[..., Finding]) -> Iterator[Finding]:
    advertised = [(one, tag) for one in REGISTRIES for tag in sorted(entry_points(group=one.group).names)]
    if not (files or advertised):
        yield finding("", "none")
    for path in files:
        try:
            load_plugin(path)
        except InvflowError as error:
            yield finding(path.name, _line(error), "repair it, or leave out --plugin", problem=True)
        else:
            yield finding(path.name, "loads")
    for registry, tag in advertised:
        points = entry_points(group=registry.group, name=tag)
        owners = " or ".join(sorted({point.dist.name for point in points if point.dist}))
        try:
            builtin = registry.find(tag).__module__.startswith(f"{PACKAGE}.")
        except UnknownTag as error:
            fix = f"pip install --upgrade {owners}, or pip uninstall {owners}"
            yield finding(tag, _line(error), fix, problem=True)
            continue
        if builtin:
            found = f"that of {owners} never loads: {registry.called(repr(tag))} is built in"
            yield finding(tag, found, f"pip uninstall {owners}", problem=True)
        else:
            yield finding(tag, f"{registry.noun} of {owners}")
