"""The sources of data that a spec can name: files of one's own, and images and points that libraries have or make."""

from .arrays import Arrays
from .folder import ImageFolder
from .given import Given
from .plane import Checkerboard, Circles, Moons, Rings
from .table import Table
from .vision import CIFAR10, CIFAR100, KMNIST, MNIST, SVHN, Digits, FashionMNIST

__all__ = [
    "CIFAR10",
    "CIFAR100",
    "KMNIST",
    "MNIST",
    "SVHN",
    "Arrays",
    "Checkerboard",
    "Circles",
    "Digits",
    "FashionMNIST",
    "Given",
    "ImageFolder",
    "Moons",
    "Rings",
    "Table",
]
