"""Files of data that tests write, and how they read them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from invflow.errors import DataError
from invflow.spec.training import Data
from invflow.training.data import load_data


def loaded(root, name, path, **fields):
    return load_data(Data(name=name, path=path, **fields), root)


def refused(root, name, path, **fields):
    """The one line that refuses the data."""

    def read():
        data = loaded(root, name, path, **fields)
        for part in (data.train, data.test):
            part.all()

    with pytest.raises(DataError) as caught:
        read()
    message = str(caught.value)
    assert len(message.splitlines()) == 1, message
    return message


def picture(path, size=(8, 8), mode="RGB", colour=None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    made = Image.new(mode, size[::-1], colour or 0)
    made.save(path, **options)
    return path


def pictures(root, classes=("cat", "dog"), each=5, size=(8, 8)):
    """A folder of noise in classes, by which the mean of the red pixels can be told."""
    random = np.random.default_rng(0)
    for number, name in enumerate(classes):
        for index in range(each):
            pixels = random.integers(0, 64, (*size, 3), dtype=np.uint8)
            pixels[..., 0] += 64 * number
            file = root / name / f"{index:04}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(file)
    return root


def peak_memory():
    """The most memory that this process has had, in kB; getrusage would count that of the process which started it."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])


def classifier(folder, data, shape, classes, **training):
    """A spec of a small classifier, in a file."""
    layers = [
        {"type": "split"},
        {"type": "additive_coupling", "net": {"type": "mlp", "hidden": [4]}},
        {"type": "merge"},
    ]
    layers = layers if len(shape) == 1 else [{"type": "psi", "block_size": 2}]
    document = {
        "input": {"shape": shape},
        "layers": layers,
        "head": {"type": "linear", "classes": classes},
        "training": {"data": data, "epochs": 1, **training},
    }
    path = folder / "spec.json"
    path.write_text(json.dumps(document))
    return path
