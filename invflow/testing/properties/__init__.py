"""The promises that every bijection keeps, one function each."""

from .base import Broken, Property
from .conduct import (
    batch_independence,
    determinism,
    dtype_kept,
    empty_batch,
    input_untouched,
    memory_layout,
    module_untouched,
    nan_contained,
    no_memory,
    plain_call,
)
from .inversion import context, inverse_round_trip, round_trip, shapes
from .pytorch import autocast, compiles, deepcopies, meta_device, pickles, state_dict
from .volume import gradients, inverse_gradients, inverse_log_det, log_det, log_det_form, vmap

MATHEMATICS: tuple[Property, ...] = (
    round_trip,
    inverse_round_trip,
    context,
    shapes,
    log_det,
    inverse_log_det,
    log_det_form,
    plain_call,
    gradients,
    inverse_gradients,
)
"""What makes a map a bijection with the right log-determinant."""

CONDUCT: tuple[Property, ...] = (
    input_untouched,
    module_untouched,
    determinism,
    no_memory,
    batch_independence,
    empty_batch,
    nan_contained,
    memory_layout,
    dtype_kept,
)
"""How it behaves towards its caller."""

PYTORCH: tuple[Property, ...] = (deepcopies, pickles, state_dict, meta_device, vmap, autocast, compiles)
"""What PyTorch does with it."""

PROPERTIES = MATHEMATICS + CONDUCT + PYTORCH

__all__ = ["CONDUCT", "MATHEMATICS", "PROPERTIES", "PYTORCH", "Broken", "Property"]
