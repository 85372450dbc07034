"""Where losses of tests get their gradients from."""

from __future__ import annotations

import importlib

import pytest

NUMPY_OF = {"autograd": "autograd.numpy", "jax": "jax.numpy", "torch": "torch"}
NAMES = list(NUMPY_OF)


class Provider:
    """A provider's name, its functions by NumPy's names, and its constants."""

    def __init__(self, name):
        pytest.importorskip(name)
        self.name = name
        self.np = importlib.import_module(NUMPY_OF[name])

    def __call__(self, array):
        return self.np.from_numpy(array) if self.name == "torch" else array
