"""``invflow plot-psi``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import InvflowError
from .options import DataRoot, Download, Plugins, SpecPath, load_document
from .output import out


def plot_psi(
    spec: SpecPath,
    images: Annotated[int, typer.Option(min=1, max=10, help="How many images.")] = 3,
    to: Annotated[Path, typer.Option("--out", help="The picture to write.")] = Path("psi.png"),
    data_root: DataRoot = None,
    download: Download = False,
    plugin: Plugins = None,
) -> None:
    """Draw the channels that a spec's first psi makes of images."""
    from ..diagnostics.check import chain_of
    from ..diagnostics.pictures import first_psi, psi_channels, write_figure
    from ..spec.training import Training
    from ..training.data import load_data

    document = load_document(spec)
    psi = first_psi(chain_of(spec))
    if psi is None:
        raise InvflowError(f"{spec}: plot-psi expects a spec with a psi layer, got one without")
    options = (document.training or Training()).data
    data = load_data(options, data_root, folder=document.folder, download=download)
    write_figure(psi_channels(data.test.first(images).values, psi), to)
    out.print(f"wrote {to}")
