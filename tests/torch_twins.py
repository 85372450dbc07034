"""Parameters in two copies, one stepped by torch's optimizer, one by fastadam's, with the same gradients."""

from __future__ import annotations

import copy

import fastadam.torch
import torch

PAIRS = {
    "Adam": (torch.optim.Adam, fastadam.torch.Adam),
    "AdamW": (torch.optim.AdamW, fastadam.torch.AdamW),
}


def parameters(*shapes, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.nn.Parameter(torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype)) for shape in shapes
    ]


def step(optimizer, seed):
    """A step of any optimizer with random gradients."""
    generator = torch.Generator().manual_seed(seed)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            gradient = torch.randn(parameter.shape, dtype=torch.float64, generator=generator)
            parameter.grad = gradient.to(parameter.dtype)
    optimizer.step()


def values(optimizer):
    return [t.detach().clone() for g in optimizer.param_groups for t in g["params"]]


def check_same(a, b, tolerance=1e-12):
    """Two optimizers have equal parameters."""
    for x, y in zip(values(a), values(b), strict=True):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


class Twins:
    """`theirs` and `ours` start as equal clones of `tensors`."""

    def __init__(self, name, tensors, *, only_ours=None, **options):
        self.theirs, self.ours = ([_clone(tensor) for tensor in tensors] for _ in range(2))
        reference, tested = PAIRS[name]
        self.reference = reference(self.theirs, **copy.deepcopy(options))
        self.tested = tested(self.ours, **copy.deepcopy(options), **(only_ours or {}))
        self._generator = torch.Generator().manual_seed(1)

    def step(self, which=None, scale=1.0):
        """One step with new random gradients, of the parameters at the places `which`."""
        for place, (a, b) in enumerate(zip(self.theirs, self.ours, strict=True)):
            a.grad = b.grad = None
            if which is None or place in which:
                gradient = torch.randn(a.shape, dtype=torch.float64, generator=self._generator) * scale
                gradient = gradient + 1j * gradient.flip(0) if a.is_complex() else gradient
                a.grad, b.grad = (_like(gradient, tensor) for tensor in (a, b))
        self.reference.step()
        self.tested.step()

    def difference(self):
        """The largest, relative to 1 or the parameter where that is more."""
        return max(
            float(((a - b).abs() / a.abs().clamp(min=1)).max())
            for a, b in zip(*([t.detach() for t in ts] for ts in (self.theirs, self.ours)), strict=True)
            if a.numel()
        )


def _clone(tensor):
    """With the strides that the tensor has, gaps included."""
    whole = torch.empty(tensor.untyped_storage().nbytes() // tensor.element_size(), dtype=tensor.dtype)
    clone = torch.as_strided(whole, tensor.shape, tensor.stride(), tensor.storage_offset())
    with torch.no_grad():
        clone.copy_(tensor)
    return clone.requires_grad_()


def _like(gradient, tensor):
    return torch.empty_like(tensor, requires_grad=False).copy_(gradient)


def in_memory(weight):
    """The values as they are, rows of an attached weight that wait included."""
    with torch._C.DisableTorchFunctionSubclass():
        return weight.detach().numpy().copy()
