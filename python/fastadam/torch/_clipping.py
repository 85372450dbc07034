"""Clipped gradients, and steps that are skipped: the options, and the norm of all gradients of several sets."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastadam._core.common.checks import check_bool, check_clip, check_one_norm
from fastadam._core.common.types import Foreign
from fastadam._core.native.plan import Factors, Norms, StepHyper, clip
from fastadam.torch._checks import Group, label_of

__all__ = ["Clipping", "add_shards", "clip_jointly", "is_sharded"]

_CLIPPING = ("clipvalue", "clipnorm", "global_clipnorm", "skip_nonfinite")


class Clipping:
    """The options, checked. They belong to the optimizer, not to its groups: norms are of all groups together."""

    clipvalue: float | None = None
    clipnorm: float | None = None
    global_clipnorm: float | None = None
    skip_nonfinite = False
    is_on = False  # whether any of them asks for anything
    reads_norms = False  # before anything is written

    def set(self, **options: object) -> None:
        """Set some of the options, or raise what is wrong with them and set none."""
        new = {**{name: getattr(self, name) for name in _CLIPPING}, **options}
        for name in ("clipvalue", "clipnorm", "global_clipnorm"):
            new[name] = None if new[name] is None else check_clip(name, new[name])
        check_one_norm(new["clipnorm"], new["global_clipnorm"])
        new["skip_nonfinite"] = check_bool("skip_nonfinite", new["skip_nonfinite"])
        clips_norms = new["clipnorm"] is not None or new["global_clipnorm"] is not None
        new["reads_norms"] = clips_norms or new["skip_nonfinite"]
        new["is_on"] = new["reads_norms"] or new["clipvalue"] is not None
        vars(self).update(new)

    @classmethod
    def of(cls, clipvalue: object, clipnorm: object, global_clipnorm: object, skip_nonfinite: object) -> Clipping:
        """The options that a constructor was given, checked."""
        made = cls()
        if skip_nonfinite is not False or not (clipvalue is clipnorm is global_clipnorm is None):
            made.set(
                clipvalue=clipvalue, clipnorm=clipnorm, global_clipnorm=global_clipnorm, skip_nonfinite=skip_nonfinite
            )
        return made

    def bound(self, hyper: StepHyper) -> StepHyper:
        """The numbers of a step, with these options."""
        if not self.is_on:
            return hyper
        return hyper._replace(
            clip_value=check_clip("clipvalue", self.clipvalue),
            clip_norm=check_clip("clipnorm", self.clipnorm),
            global_clip_norm=check_clip("global_clipnorm", self.global_clipnorm),
            require_finite=self.skip_nonfinite,
            clip_after_dedupe=True,  # as PyTorch sees them: a tensor may be coalesced or not
        )

    def require_host(self, index: int, group: Group, gradients: list[Tensor | None]) -> None:
        """Raise if a parameter with a gradient is on a GPU, where these options are not supported."""
        if not self.is_on:
            return
        for place, (param, gradient) in enumerate(zip(group["params"], gradients, strict=True)):
            if gradient is None or not param.is_cuda:
                continue
            name = next(name for name in _CLIPPING if getattr(self, name) not in (None, False))
            raise ValueError(
                f"{name}: {getattr(self, name)} with {label_of(group, index, place)} on {param.device}, expected "
                "parameters in CPU memory; on a GPU call torch.nn.utils.clip_grad_norm_ before the step"
            )


def clip_jointly(
    norms: Sequence[Norms],
    factors: Sequence[Sequence[float]],
    places: Sequence[tuple[int, int]],
    params: Sequence[Tensor],
    hyper: StepHyper,
) -> list[Factors] | None:
    """The factors of the gradients of several sets that are clipped together.

    Args:
        norms: Of each set the norms of its gradients.
        factors: Of each set what its gradients are multiplied by besides; empty for 1.
        places: Of each parameter of all sets its group and its place there, in which order squares are summed.
        params: The parameters of all sets.
        hyper: The bounds, and the scale of the gradients.

    Returns:
        For each set what its gradients are to be multiplied by altogether; None if the step must be skipped.
    """
    sizes = [len(each) for each in norms]
    sums = np.concatenate(norms)
    others = np.concatenate([each or np.ones(size) for each, size in zip(factors, sizes, strict=True)])
    if is_sharded(params):
        add_shards(params, sums, require_finite=hyper.require_finite)
    order = sorted(range(len(places)), key=places.__getitem__)
    found, is_finite = clip(sums[order], hyper, others[order])
    if hyper.require_finite and not is_finite:
        return None
    clipped = np.empty_like(found)
    clipped[order] = found
    return np.split(clipped, np.cumsum(sizes)[:-1])


# ---- parameters that are distributed over processes ------------------------------------------------------------------


def is_sharded(params: Sequence[Tensor]) -> bool:
    """Whether other processes may have parts of these parameters."""
    return any(hasattr(param, "_local_tensor") for param in params)


def add_shards(params: Sequence[Tensor], sums: Norms, *, require_finite: bool) -> None:
    """Add what the other processes found of their shards; with ``require_finite`` all know of a NaN that one found.

    All processes call it with the same parameters. One collective for each axis of each mesh.

    Raises:
        ValueError: A parameter is kept as a sum over processes, whose norm no process can tell.
    """
    axes: dict[tuple[Foreign, int], list[int]] = {}
    for i, param in enumerate(params):
        if hasattr(param, "_local_tensor"):
            for axis, placement in enumerate(param.placements):
                if placement.is_partial():
                    raise ValueError(
                        f"params: a DTensor with placements {param.placements}, expected shards or replicas"
                    )
                shards = axes.setdefault((param.device_mesh, axis), [])
                if not placement.is_replicate():
                    shards.append(i)
    is_bad = float(require_finite and bool(np.isnan(sums[:, 0]).any()))
    for (mesh, axis), shards in axes.items():
        if shards or require_finite:
            joined = _all_sums([is_bad, *sums[shards].ravel()], mesh, axis)
            is_bad = joined[0]
            sums[shards] = joined[1:].reshape(-1, 3)
    if is_bad:
        sums[:] = np.nan


def _all_sums(numbers: list[float], mesh: Foreign, axis: int) -> npt.NDArray[np.float64]:
    """The sums of these numbers over the processes along an axis of a mesh."""
    group = mesh.get_group(axis)
    kinds = {device.type for device in group._device_types}
    device = "cpu" if "cpu" in kinds else mesh.device_type
    sums = torch.tensor(numbers, dtype=torch.float64, device=device)
    torch.distributed.all_reduce(sums, group=group)
    return np.asarray(sums.cpu(), np.float64)
