"""The arguments and options that several verbs share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import InvflowError
from ..plugins import load_plugin

if TYPE_CHECKING:
    from ..spec import Spec


def _load_plugins(paths: list[Path] | None) -> list[Path] | None:
    for path in paths or ():
        load_plugin(path)
    return paths


SpecPath = Annotated[Path, typer.Argument(metavar="SPEC", help="A spec's JSON file, or the folder of a run.")]
RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run, as 'invflow train' writes it.")]
DataRoot = Annotated[Path | None, typer.Option(help="The torchvision root of the data; default: INVFLOW_DATA.")]
Download = Annotated[bool, typer.Option("--download", help="Download a missing data set into the data root.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the answer as JSON on stdout, everything else on stderr.")]
_PLUGIN = "A Python file that registers layers, nets, parts, heads, priors or data; repeat the option for several."
Plugins = Annotated[
    list[Path] | None,
    typer.Option("--plugin", metavar="FILE", callback=_load_plugins, is_eager=True, help=_PLUGIN),
]
PluginFiles = Annotated[list[Path] | None, typer.Option("--plugin", metavar="FILE", help=_PLUGIN)]
"""The same without loading them."""
DataName = Annotated[
    str | None,
    typer.Option("--data", metavar="NAME", help="A data set's name, or its JSON, in the place of the spec's."),
]
Epochs = Annotated[int | None, typer.Option(help="Override the number of epochs.")]
Steps = Annotated[int | None, typer.Option(help="Train for so many steps of the optimizer, in place of epochs.")]
BatchSize = Annotated[int | None, typer.Option(help="Override the batch size.")]
LearningRate = Annotated[float | None, typer.Option(help="Override the learning rate.")]
TrainSize = Annotated[int | None, typer.Option(help="Override the number of training samples.")]
Device = Annotated[str, typer.Option(help="Where to compute: auto, cpu, cuda, cuda:1 or mps.")]


def load_document(source: Path) -> Spec:
    """The spec in a file, or in the folder of a run or a checkpoint."""
    from ..spec import load_spec
    from ..spec.checkpoint import SPEC_FILE

    return load_spec(source / SPEC_FILE if source.is_dir() else source)


def named_data(text: str | None) -> dict[str, Any] | None:
    """The document of a data set that an option names."""
    if text is None or not text.lstrip().startswith("{"):
        return None if text is None else {"name": text}
    try:
        found = json.loads(text)
    except ValueError as error:
        raise InvflowError(f'--data expects a name, or JSON such as {{"name": "moons"}}: {error}') from None
    assert isinstance(found, dict)
    return found
