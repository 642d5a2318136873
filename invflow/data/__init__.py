"""The sources of data that a spec can name."""

from .given import Given
from .plane import Checkerboard, Circles, Moons, Rings
from .vision import CIFAR10, CIFAR100, KMNIST, MNIST, SVHN, Digits, FashionMNIST

__all__ = [
    "CIFAR10",
    "CIFAR100",
    "KMNIST",
    "MNIST",
    "SVHN",
    "Checkerboard",
    "Circles",
    "Digits",
    "FashionMNIST",
    "Given",
    "Moons",
    "Rings",
]
