"""Variables beside what they must be after every step; for tests that re-express those of TensorFlow and Keras."""

from __future__ import annotations

import fastadam
import numpy as np
from cases import bits


class Checked:
    """Variables of one dtype, and their steps in the float64 reference."""

    def __init__(self, *values, dtype=np.float32, amsgrad=False):
        self.variables = [np.array(value, dtype) for value in values]
        self._expected = [w.astype(np.float64) for w in self.variables]
        vhat = 0.0 if amsgrad else None
        self._slots = [(np.zeros(w.shape), np.zeros(w.shape), vhat) for w in self.variables]

    def gradients(self, *values):
        return [np.array(value, w.dtype) for value, w in zip(values, self.variables, strict=True)]

    def pairs(self, *values):
        return list(zip(self.gradients(*values), self.variables, strict=True))

    def check(self, gradients, float32, which=None, **arguments):
        """After a step with these gradients: `arguments` are those of the reference.

        `float32` are the values that legacy.Adam of TensorFlow 2.15.1 gives in float32. `which` are the places of
        the variables in the step; None means all.
        """
        for i, gradient, golden in zip(which or range(len(self.variables)), gradients, float32, strict=True):
            w = self.variables[i]
            gradient = np.array(gradient, w.dtype)
            exact, *self._slots[i] = fastadam.reference.adam_step(
                self._expected[i], gradient, *self._slots[i], **arguments
            )
            self._expected[i] = exact.astype(w.dtype).astype(np.float64)
            if w.dtype == np.float32:
                np.testing.assert_array_equal(bits(w), bits(np.float32(golden).reshape(w.shape)))
            elif w.dtype == np.float16:  # computed in float32, rounded once
                np.testing.assert_array_equal(bits(w), bits(exact.astype(np.float16)))
            else:  # the last bits of numbers of this size
                np.testing.assert_allclose(w, exact, rtol=1e-12, atol=1e-14)
