"""How exact an inverse is: the modes, the grid, and the conditioners that keep a promise."""

from .conditioners import same_batch
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
    "same_batch",
    "snap",
]
