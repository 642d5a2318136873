"""How exact an inverse is: the levels, the grid, and the conditioners that keep a promise."""

from .conditioners import same_batch
from .grid import snap
from .options import LEVELS, Exact, Float, Grid, Numerics, Snap

__all__ = ["LEVELS", "Exact", "Float", "Grid", "Numerics", "Snap", "same_batch", "snap"]
