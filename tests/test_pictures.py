"""Pictures show what their titles say, and interpolation starts and ends at its images."""

from __future__ import annotations

import copy
import errno
import os

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from sklearn.datasets import load_digits

from invflow import InvflowError, build
from invflow.bijections import Psi
from invflow.diagnostics import pictures
from invflow.diagnostics.interpolation import interpolate

RELATIVE = 1e-6
"""Relative to the largest magnitude: 8 eps of float32 for four couplings forward and back; 1 was measured."""

PAIRS, STEPS = 3, 5


@pytest.fixture(scope="module")
def digits():
    """The first handwritten digits, value/16, (32, 1, 8, 8), and their labels."""
    data = load_digits()
    return torch.tensor(data.images[:32], dtype=torch.float32)[:, None] / 16, torch.tensor(data.target[:32])


def chain(norm=None, merge=True):
    """Untrained and in train mode; without a merge its states are pairs."""
    torch.manual_seed(0)
    coupling = {"type": "additive_coupling", "net": {"type": "conv", "hidden": [8], "norm": norm}}
    layers = [{"type": "psi", "block_size": 2}, {"type": "split"}, coupling, coupling, coupling, coupling]
    return build(
        {"spec_version": 1, "input": {"shape": [1, 8, 8]}, "layers": layers + ([{"type": "merge"}] if merge else [])}
    )


@pytest.fixture(scope="module")
def walks(digits):
    images, _ = digits
    return interpolate(chain().eval(), images[:PAIRS], images[PAIRS : 2 * PAIRS], STEPS)


def with_images(figure):
    return [axis for axis in figure.axes if axis.images]


def titles(figure):
    return [axis.get_title() for axis in with_images(figure)]


@pytest.mark.parametrize("merge", [True, False], ids=["tensor", "pair"])
@pytest.mark.parametrize("norm", [None, "batch"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_a_walk_starts_and_ends_at_its_images(digits, merge, norm, training):
    images, _ = digits
    bijection = chain(norm, merge).train(training)
    walk = interpolate(bijection, images[:4], images[4:8], STEPS)
    largest = max(1.0, *(leaf.abs().max().item() for leaf in states(bijection, images[:8])))
    assert walk.shape == (4, STEPS, 1, 8, 8)
    assert (walk[:, 0] - images[:4]).abs().max() <= RELATIVE * largest
    assert (walk[:, -1] - images[4:8]).abs().max() <= RELATIVE * largest


def states(bijection, x):
    from invflow.state import leaves

    with torch.no_grad():
        return [leaf for state in copy.deepcopy(bijection).trace(x) for leaf in leaves(state)]


def test_features_of_a_walk_lie_on_a_straight_line(digits):
    images, _ = digits
    bijection = chain().double().eval()
    first, last = images[:4].double(), images[4:8].double()
    walk = interpolate(bijection, first, last, 5)
    with torch.no_grad():
        quarter = 0.75 * bijection(first) + 0.25 * bijection(last)
        torch.testing.assert_close(bijection(walk[:, 1]), quarter)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_interpolation_leaves_the_bijection_as_it_is(digits, training):
    images, _ = digits
    bijection = chain("batch").train(training)
    before = copy.deepcopy(bijection.state_dict())
    walk = interpolate(bijection, images[:4], images[4:8], STEPS)
    assert bijection.training == training
    assert not walk.requires_grad
    for name, tensor in bijection.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_a_wrong_prediction_is_red_and_shows_both(digits):
    images, labels = digits
    predictions = labels.clone()
    predictions[1] = 7
    figure = pictures.samples(images[:10], labels[:10], predictions[:10])
    assert titles(figure) == ["0", "1 → 7", *map(str, range(2, 10))]
    assert [axis.title.get_color() == "red" for axis in with_images(figure)] == [k == 1 for k in range(10)]


def test_few_samples_leave_no_empty_columns(digits):
    images, labels = digits
    assert len(pictures.samples(images[:3], labels[:3]).axes) == 3


@pytest.mark.parametrize("layout", ["block", "channel"])
@pytest.mark.parametrize("colours", [1, 3])
def test_psi_shows_each_channel_under_the_place_its_pixels_come_from(digits, layout, colours):
    images = digits[0][:2] * torch.linspace(0.5, 1, colours)[:, None, None]
    shown = with_images(pictures.psi_channels(images, Psi(2, layout)))
    count = 4 * colours
    assert [axis.get_title().split("\n")[0] for axis in shown[: count + 1]] == ["image", *map(str, range(count))]
    for number, axis in enumerate(shown):
        image, channel = divmod(number, count + 1)
        if channel:
            words = shown[channel].get_title().replace("(", "").replace(")", "").replace("\n", ", ").split(", ")[1:]
            place = {name: int(value) for name, value in (word.split("=") for word in words)}
            pixels = images[image, place.get("c", 0), place["i"] :: 2, place["j"] :: 2]
            assert torch.equal(torch.as_tensor(axis.images[0].get_array()).reshape(4, 4).float(), pixels)
        assert axis.images[0].get_clim() == (0, 1)


def test_many_psi_channels_go_to_further_rows(digits):
    images, _ = digits
    shown = with_images(pictures.psi_channels(images[:2], Psi(8)))
    assert len(shown) == 2 * (1 + 64)
    cut = pictures.psi_channels(images[:2], Psi(8), most=5)
    assert len(with_images(cut)) == 2 * (1 + 5)
    assert "the first 5 of 64" in cut.get_suptitle().replace("\n", " ")


METRICS = [
    {"epoch": 0, "train_loss": 2.0, "train_accuracy": 0.3, "test_loss": 2.1, "test_accuracy": 0.25},
    {"epoch": 1, "train_loss": 1.0, "test_loss": None, "test_accuracy": None},
    {"epoch": 2, "train_loss": 0.5, "train_accuracy": 0.9, "test_loss": 0.75, "test_accuracy": 0.8125},
]


def test_curves_skip_what_is_missing_and_name_the_final_test_accuracy():
    loss, accuracy = pictures.training_curves(METRICS).axes
    assert loss.get_yscale() == "log"
    points = {axis: [line.get_xydata().tolist() for line in axis.lines] for axis in (loss, accuracy)}
    assert points[loss] == [[[1, 2.0], [2, 1.0], [3, 0.5]], [[1, 2.1], [3, 0.75]]]
    assert points[accuracy] == [[[1, 30], [3, 90]], [[1, 25], [3, 81.25]]]
    assert [text.get_text() for text in accuracy.texts] == ["81.25 %"]
    for axis in (loss, accuracy):
        assert [text.get_text().split(":")[0] for text in axis.get_legend().get_texts()] == ["train", "test"]


def test_a_validation_part_has_a_curve():
    rows = [{name.replace("test", "val"): value for name, value in row.items()} for row in METRICS]
    for axis in pictures.training_curves(rows).axes:
        assert [text.get_text().split(":")[0] for text in axis.get_legend().get_texts()] == ["train", "val"]
    assert [text.get_text() for text in axis.texts] == ["81.25 %"]


def test_the_curve_of_one_epoch_can_be_seen():
    for axis in pictures.training_curves(METRICS[:1]).axes:
        assert all(line.get_marker() != "None" for line in axis.lines)
        assert all(float(tick).is_integer() for tick in axis.get_xticks())


def test_reconstructions_report_the_largest_difference_and_count_equal_elements(digits):
    originals = digits[0][:4]
    returned = originals.clone()
    returned[0, 0, 0, 0] += 2.0**-20
    figure = pictures.reconstructions(originals, returned)
    title = figure.get_suptitle().replace("\n", " ")
    assert "largest difference 9.5e-07" in title
    assert "255 of 256 elements bit-equal" in title
    assert len(with_images(figure)) == 12
    assert figure.axes[-1].get_yticks().tolist() == [0.0, 2.0**-21, 2.0**-20]


def test_an_exact_reconstruction_has_a_scale_of_zero_alone(digits, tmp_path):
    figure = pictures.reconstructions(digits[0][:4], digits[0][:4].clone())
    assert "256 of 256 elements bit-equal" in figure.get_suptitle().replace("\n", " ")
    assert figure.axes[-1].get_yticks().tolist() == [0.0]
    pictures.write_figure(figure, tmp_path / "exact.png")


def test_a_strip_is_labelled_with_t_and_with_the_classes_at_its_ends(walks):
    figure = pictures.interpolation_strip(walks, [(0, 3), (1, 4), (2, 5)])
    axes = with_images(figure)
    assert titles(figure)[:STEPS] == ["t = 0", "t = 0.25", "t = 0.5", "t = 0.75", "t = 1"]
    assert [axis.get_ylabel() for axis in axes[::STEPS]] == ["0", "1", "2"]
    assert [axis.get_ylabel() for axis in axes[STEPS - 1 :: STEPS]] == ["3", "4", "5"]


def test_a_gif_goes_there_and_back(walks, tmp_path):
    frames = pictures.interpolation_frames(walks.clamp(0, 1))
    factor = pictures.GIF_HEIGHT // 8
    assert [frame.size for frame in frames] == [(PAIRS * 8 * factor, 8 * factor)] * (2 * STEPS - 2)
    assert frames[1].tobytes() == frames[-1].tobytes()
    pictures.write_gif(frames, tmp_path / "new" / "walk.gif")
    with Image.open(tmp_path / "new" / "walk.gif") as gif:
        assert (gif.n_frames, gif.size, gif.info["loop"]) == (2 * STEPS - 2, frames[0].size, 0)


def test_pictures_of_walks_say_what_they_clip(walks):
    half = torch.full_like(walks, 0.5)
    assert "clipped" not in pictures.interpolation_strip(half).get_suptitle()
    half[:, 1:-1, :, :2] = 1.25  # a quarter of the pixels between the ends
    said = "25 % of the pixels lie outside [0, 1] and are drawn clipped"
    assert said in pictures.interpolation_strip(half).get_suptitle()
    captioned, plain = pictures.interpolation_frames(half)[0], pictures.interpolation_frames(half.clamp(0, 1))[0]
    assert captioned.height > plain.height
    assert captioned.crop((0, 0, *plain.size)).tobytes() == plain.tobytes()
    below = captioned.crop((0, plain.height, plain.width, captioned.height))
    assert {(0, 0, 0), (255, 255, 255)} <= {colour for _, colour in below.getcolors(2**16)}
    assert said in pictures.gallery(half[:, 1], "Samples").get_suptitle().replace("\n", " ")


def test_a_comparison_shows_each_seed_and_the_mean():
    rows = [
        {"name": "a", "scores": [75.0, 81.25], "parameters": 58090},
        {"name": "b", "scores": [87.5], "parameters": 7},
    ]
    (axis,) = pictures.comparison(rows).axes
    dots = [dots.get_offsets()[:, 1].tolist() for dots in axis.collections if len(dots.get_offsets())]
    assert [75.0, 81.25] in dots
    assert [87.5] in dots
    assert [text.get_text() for text in axis.texts] == ["78.12\n± 4.42", "87.50"]
    assert [tick.get_text() for tick in axis.get_xticklabels()] == ["a\n58,090 parameters", "b\n7 parameters"]


def test_a_comparison_does_not_blow_up_noise():
    (axis,) = pictures.comparison([{"name": "a", "scores": [85.01, 85.02], "parameters": 1}]).axes
    low, high = axis.get_ylim()
    assert high - low >= pictures.NARROWEST * (1 - 1e-9)  # the sum of two halves rounds
    assert low < 85.01 < 85.02 < high


def test_images_of_any_float_dtype_with_gradients_are_drawn(digits):
    images, labels = digits
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        assert isinstance(pictures.samples(images[:2].to(dtype).requires_grad_(), labels[:2]), Figure)


def test_a_picture_has_the_size_of_its_figure(digits, tmp_path):
    figure = pictures.samples(*(part[:8] for part in digits))
    pictures.write_figure(figure, tmp_path / "new" / "samples.png")
    with Image.open(tmp_path / "new" / "samples.png") as image:
        image.load()
        assert image.format == "PNG"
        assert image.size == tuple(round(130 * inches) for inches in figure.get_size_inches())
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["samples.png"]


@pytest.mark.parametrize("name", ["old.png", "old.gif"])
def test_an_interrupted_write_leaves_the_old_picture_alone(walks, tmp_path, monkeypatch, name):
    def full_disk(descriptor):
        raise OSError(errno.ENOSPC, "no space left on device")

    (tmp_path / name).write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", full_disk)
    if name.endswith("png"):
        write, picture = pictures.write_figure, Figure()
    else:
        write, picture = pictures.write_gif, pictures.interpolation_frames(walks)
    with pytest.raises(OSError, match="no space"):
        write(picture, tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_bytes() == b"old"


IMAGES, LABELS = torch.zeros(2, 1, 8, 8), torch.zeros(2, dtype=torch.long)
WALKS = torch.zeros(2, 3, 1, 8, 8)
MISTAKES = {
    "two channels": (lambda: pictures.samples(IMAGES.expand(-1, 2, -1, -1), LABELS), "1 or 3 channels"),
    "no channels": (lambda: pictures.psi_channels(IMAGES[:, 0], Psi(2)), "1 or 3 channels"),
    "no images": (lambda: pictures.samples(IMAGES[:0], LABELS[:0]), "at least one"),
    "few labels": (lambda: pictures.samples(IMAGES, LABELS[:1]), "labels .* 2, got 1"),
    "few predictions": (lambda: pictures.samples(IMAGES, LABELS, LABELS[:1]), "predictions .* 2, got 1"),
    "other batch": (lambda: pictures.reconstructions(IMAGES, IMAGES[:1]), "same shape"),
    "images as walks": (lambda: pictures.interpolation_frames(IMAGES), "pairs, steps"),
    "one step": (lambda: pictures.interpolation_strip(WALKS[:, :1], [(0, 1)] * 2), "at least 2 steps"),
    "few pairs of labels": (lambda: pictures.interpolation_strip(WALKS, [(0, 1)]), "labels .* 2, got 1"),
    "walks of two channels": (lambda: pictures.interpolation_frames(WALKS.expand(-1, -1, 2, -1, -1)), "channels"),
    "nothing to compare": (lambda: pictures.comparison([]), "at least one spec"),
    "nothing trained": (
        lambda: pictures.comparison([{"name": "a", "scores": [], "parameters": 1}]), "a score of each",
    ),
    "a walk of one step": (lambda: interpolate(Psi(2), IMAGES, IMAGES, 1), "at least 2 steps"),
    "ends that would broadcast": (lambda: interpolate(Psi(2), IMAGES, IMAGES[:1], 3), "same shape"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_told_in_one_line(mistake):
    call, words = MISTAKES[mistake]
    with pytest.raises(InvflowError, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_an_empty_gif_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(InvflowError, match="at least one picture"):
        pictures.write_gif([], tmp_path / "new" / "walk.gif")
    assert not list(tmp_path.iterdir())
