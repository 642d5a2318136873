"""How exact an inverse is: the modes, the grid, and the evaluation of conditioners."""

from .conditioners import draws, same_batch
from .grid import snap
from .modes import FLOAT, LEVELS, NONE, Exact, Float, Grid, Level, Limit, Mode, Numerics, Snap

__all__ = [
    "FLOAT",
    "LEVELS",
    "NONE",
    "Exact",
    "Float",
    "Grid",
    "Level",
    "Limit",
    "Mode",
    "Numerics",
    "Snap",
    "draws",
    "same_batch",
    "snap",
]
