"""What tests of the contract share: a bijection as a newcomer writes it, and short specs."""

from __future__ import annotations

import json

from invflow import Bijection


def spec_of(*layers, shape=(4,), **top):
    return {"input": {"shape": json.loads(json.dumps(shape))}, "layers": list(layers), **top}


class Doubling(Bijection):
    """y = 2 x, for images and vectors alike."""

    def forward(self, x, context=None):
        return 2 * x

    def inverse(self, y, context=None):
        return y / 2

    def forward_and_log_det(self, x, context=None):
        return self(x), x.flatten(1).new_full((len(x),), 0.6931471805599453) * x[0].numel()

    def inverse_and_log_det(self, y, context=None):
        return self.inverse(y), -self.forward_and_log_det(y)[1]
