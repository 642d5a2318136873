"""The sections of a report that show pictures, and those that say where a run is from."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from html import escape

from torch import Tensor

from ..diagnostics.plane import DEPTH
from ..diagnostics.walks import clipped_pixels
from ..spec.diff import diff_specs
from .collect import Decisions, Gallery, Missing, PlaneDensity, Portrait, Reconstructions, Samples, Walks
from .figures import table
from .images import coloured, data_uri, picture, png_of
from .sections import letter, missing, names_of, of, side_by_side

PLANE = 300.0
"""The width of a panel of the plane, in units of its drawing."""


def reconstructions(runs: Sequence[Portrait]) -> str:
    """Test images beside what the inverse makes of their features, and the difference."""
    return side_by_side(runs, lambda one: of(one.reconstructions, _reconstructions))


def walks(runs: Sequence[Portrait]) -> str:
    """Walks between test images; a script lets a slider show one step of all walks at a time."""
    found = [one.walks for one in runs if isinstance(one.walks, Walks)]
    steps = found[0].frames.shape[1] if found else 0
    slider = (
        '<div class="slider" hidden><label for="step">Step of the walks</label>'
        f'<input type="range" id="step" min="0" max="{steps - 1}" value="{steps // 2}" step="1">'
        '<output for="step"></output></div>'
    )
    drawn = side_by_side(runs, lambda one: of(one.walks, lambda known: _walks(one, known)))
    said = (
        "<p>Each walk leads from the features of one test image to those of another on a straight line; the chain runs "
        "backwards from each step.</p>"
    )
    return f'<div class="walks">{said}{slider}{drawn}</div>' if found else drawn


def samples(runs: Sequence[Portrait]) -> str:
    """Samples of flows; of classifiers, test images with what they were taken for."""

    def draw(one: Portrait) -> str:
        if isinstance(one.samples, Missing):
            return missing(one.samples.why)
        return _samples(one.samples, letter(runs, runs.index(one)))

    return side_by_side(runs, draw)


def origin(runs: Sequence[Portrait]) -> str:
    """The versions, the seed, the device, the spec and its hash."""
    names = list(dict.fromkeys(name for one in runs for name in _versions(one)))
    rows = [[label, *cells] for label, cells in _facts(runs)]
    rows += [[name, *(_versions(one).get(name, "") for one in runs)] for name in names]
    made = table(["", *names_of(runs)], rows, caption="Versions and origin")
    if len(runs) == 2:
        made += _differences(diff_specs(runs[0].run.spec, runs[1].run.spec))
    return made + side_by_side(runs, _spec)


def warned(runs: Sequence[Portrait]) -> str:
    """The warnings of the training, and of what was measured for the page."""

    def draw(one: Portrait) -> str:
        if not one.warned:
            return "<p>There were none.</p>"
        rows = [[str(entry.get(key, "")) for key in ("kind", "count", "text")] for entry in one.warned]
        return table(["kind", "times", "text"], rows, caption=f"Warnings: {one.name}")

    return side_by_side(runs, draw)


def _differences(lines: Sequence[str]) -> str:
    if not lines:
        return "<p>The specs are the same.</p>"
    listed = "".join(f"<li><code>{escape(line)}</code></li>" for line in lines)
    summary = f"Differences of the specs, from A to B: {len(lines)}"
    return f'<details><summary>{summary}</summary><ul class="lines">{listed}</ul></details>'


def _reconstructions(found: Reconstructions) -> str:
    difference = (found.back.double() - found.originals.double()).abs()
    largest = float(difference.nan_to_num(math.inf).max())
    rows = [("original", found.originals), ("reconstruction", found.back)]
    cells = [[_of_image(kind, i, found.names[i], images[i]) for i in range(len(images))] for kind, images in rows]
    cells.append(
        [
            picture(coloured(one.amax(0), 0, largest or 1.0, "magma"), f"difference of image {i + 1}")
            for i, one in enumerate(difference)
        ]
    )
    heads = ["Original", "Run backwards", "Difference"]
    made = "".join(
        f'<div class="strip" role="group" aria-label="{head}"><p class="row-head">{head}</p>'
        f'<div class="images">{"".join(row)}</div></div>'
        for head, row in zip(heads, cells, strict=True)
    )
    total = found.originals.numel()
    told = (
        f"The largest difference is {largest:.1e}, and the last row is white there" if largest else "No pixel differs"
    )
    rounded = f"rounded to the grey levels of the data, {found.equal:,} of {total:,} pixels are equal"
    return f"<p>{told}; {rounded}.</p>{made}"


def _of_image(kind: str, index: int, name: str, image: Tensor) -> str:
    return picture(image, f"{kind} of test image {index + 1}" + (f", {name}" if name else ""))


def _walks(one: Portrait, found: Walks) -> str:
    steps = found.frames.shape[1]
    made = []
    for index, (walk, (first, last)) in enumerate(zip(found.frames, found.ends, strict=True)):
        name = f"from {first} to {last}" if first or last else f"walk {index + 1}"
        frames = "".join(
            picture(frame, f"{name}, t = {step / (steps - 1):.2g}", "pixels frame") for step, frame in enumerate(walk)
        )
        fraction = found.clipped(index)
        clipped = f"{clipped_pixels(fraction)}." if fraction else "No pixel is outside [0, 1]."
        made.append(
            f'<li><p class="walk-name">{escape(name[:1].upper() + name[1:])}</p>'
            f'<div class="walk"><img class="pixels now" alt="" hidden><div class="frames">{frames}</div></div>'
            f'<p class="small">{clipped}</p></li>'
        )
    return f'<ol class="walk-list" aria-label="Walks of {escape(one.name)}">{"".join(made)}</ol>'


def _samples(found: Samples, which: str) -> str:
    if isinstance(found, Decisions):
        told = "the class that the classifier gives each point of the plane, below the test points"
        return f'<img class="wide" src="{data_uri(found.png)}" alt="{told}">'
    if isinstance(found, Gallery):
        return _gallery(found)
    return "".join(_plane(one, which) for one in found)


def _gallery(found: Gallery) -> str:
    mistakes = sum(found.wrong)
    told = f"<p>{clipped_pixels(found.clipped)}.</p>" if found.clipped else ""
    if any(found.captions) and not found.clipped:
        told = f"<p>{mistakes} of these {len(found.images)} are mistakes.</p>" if mistakes else ""
    entries = []
    for index, (image, caption, wrong) in enumerate(zip(found.images, found.captions, found.wrong, strict=True)):
        made = picture(image, f"sample {index + 1}")
        shown = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
        entries.append(f'<li><figure class="{"wrong" if wrong else "right"}">{made}{shown}</figure></li>')
    return f'{told}<ul class="gallery">{"".join(entries)}</ul>'


def _plane(found: PlaneDensity, which: str) -> str:
    (left, bottom), (right, top) = found.low, found.high
    height = PLANE * min(2.0, max(0.3, (top - bottom) / (right - left)))

    def points(some: Tensor, what: str) -> tuple[str, str]:
        low, wide = some.new_tensor(found.low), some.new_tensor([right - left, top - bottom])
        inside = [(x, y) for x, y in ((some - low) / wide).tolist() if 0 <= x <= 1 and 0 <= y <= 1]
        marks = "".join(f"M{PLANE * x:.1f} {height * (1 - y):.1f}h0" for x, y in inside)
        lost = len(some) - len(inside)
        told = f"{len(some):,} {what}" + (f", {lost} of them outside" if lost else "")
        return told, f'<path class="dots" d="{marks}"/>'

    top_density = float(found.log_density.nan_to_num(-math.inf).max())
    colours = coloured(found.log_density.flip(0), top_density - DEPTH, top_density, "viridis")
    map_ = (
        f'<image href="{data_uri(png_of(colours, len(colours[0])))}" width="{PLANE:.0f}" height="{height:.1f}" '
        'preserveAspectRatio="none"/>'
    )
    name = f"{which}class {found.name}: " if found.name else which
    panels = [points(found.points, "test points"), points(found.drawn, "samples of the flow")]
    panels.append((f"log-density, from {top_density - DEPTH:.1f} (dark) to {top_density:.1f} nats (bright)", map_))
    region = f"from {left:.2g} to {right:.2g} across, from {bottom:.2g} to {top:.2g} upwards"
    drawn = "".join(
        f'<figure><svg viewBox="0 0 {PLANE:.0f} {height:.0f}" role="img" aria-label="{escape(name + told)}">'
        f"{inner}</svg><figcaption>{escape(told)}</figcaption></figure>"
        for told, inner in panels
    )
    head = f"<p><strong>Class {escape(found.name)}</strong></p>" if found.name else ""
    return f'{head}<div class="planes">{drawn}</div><p class="small">The region is {region}.</p>'


def _versions(one: Portrait) -> dict[str, str]:
    known = one.run.record.get("versions")
    return {str(name): str(value) for name, value in known.items()} if isinstance(known, dict) else {}


def _facts(runs: Sequence[Portrait]) -> list[tuple[str, list[str]]]:
    training, records = [one.run.training for one in runs], [one.run.record for one in runs]
    hardware = [found if isinstance(found := record.get("hardware"), dict) else {} for record in records]
    return [
        ("folder", [str(one.run.folder) for one in runs]),
        ("status", [one.run.unfinished or str(record.get("status", "saved by a program"))
                    for one, record in zip(runs, records, strict=True)]),
        ("hash of the spec", [one.run.spec.hash for one in runs]),
        ("seed", [str(options.seed) for options in training]),
        ("optimizer", [f"{options.optimizer.type}, learning rate {options.optimizer.lr:g}" for options in training]),
        ("batch size", [str(options.batch_size) for options in training]),
        ("trained on", [", ".join(f"{key} {value}" for key, value in one.items()) for one in hardware]),
        ("options of the command line", [json.dumps(record.get("overrides") or {}) for record in records]),
    ]  # fmt: skip


def _spec(one: Portrait) -> str:
    text = json.dumps({key: value for key, value in one.run.spec.document.items() if key != "checkpoint"}, indent=2)
    summary = f"The spec<span class='unseen'> of {escape(one.name)}</span>"
    region = f'class="scrolls" tabindex="0" role="region" aria-label="Spec of {escape(one.name)}"'
    return f"<details><summary>{summary}</summary><pre {region}>{escape(text)}</pre></details>"
