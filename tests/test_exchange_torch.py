"""Moments of any format between fastadam.Adam and state dicts of PyTorch and fastadam.torch; malformed ones are refused."""

from __future__ import annotations

import copy

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import fastadam.torch  # noqa: E402
from fastadam import exchange  # noqa: E402
from small_states import gradients  # noqa: E402


def trained_core(moments):
    w = np.linspace(-1, 1, 6000, dtype=np.float32).reshape(60, 100)
    optimizer = fastadam.Adam(0.01, moments=moments, seed=5)
    for step in range(3):
        optimizer.apply_gradients([(gradients(step, w.size).reshape(w.shape), w)])
    return optimizer, w


@pytest.mark.parametrize("moments", ["float32", "bfloat16", "8bit"])
def test_a_core_optimizer_writes_its_moments_as_float32_for_pytorch(moments):
    optimizer, w = trained_core(moments)
    saved = exchange.to_torch_state_dict(optimizer, [w], epsilon=1e-8)
    for key, name in (("exp_avg", "m"), ("exp_avg_sq", "v")):
        expected = np.asarray(optimizer.get_slot(w, name), np.float32)
        np.testing.assert_array_equal(saved["state"][0][key].numpy(), expected)
    torch.optim.Adam([torch.nn.Parameter(torch.from_numpy(w.copy()))]).load_state_dict(saved)


@pytest.mark.parametrize("options", [{"master": "split"}, {"stochastic_rounding": True}], ids=str)
def test_what_pytorch_does_not_have_is_not_written(options):
    optimizer = fastadam.Adam(**options)
    w = np.ones(3, np.float32)
    optimizer.build([w])
    with pytest.raises(ValueError, match=f"optimizer: .*'{next(iter(options))}'.* option that PyTorch does not have"):
        exchange.to_torch_state_dict(optimizer, [w], epsilon=1e-8)


@pytest.mark.parametrize("strides", [(100, 1), (1, 60)], ids=["C", "F"])
@pytest.mark.parametrize("moments", ["float32", "bfloat16", "8bit"])
def test_a_core_optimizer_reads_the_states_of_fastadam_torch(moments, strides):
    parameter = torch.nn.Parameter(torch.ones(6000).as_strided((60, 100), strides))
    theirs = fastadam.torch.Adam([parameter], moments=moments)
    parameter.grad = torch.from_numpy(gradients(0, 6000).reshape(60, 100).copy())
    theirs.step()
    wide = fastadam.torch.Adam([torch.nn.Parameter(torch.ones(60, 100))], moments="float32")
    wide.load_state_dict(theirs.state_dict())
    w = np.ones((60, 100), np.float32)
    optimizer = fastadam.Adam()
    exchange.from_torch_state_dict(optimizer, theirs.state_dict(), [w], epsilon=1e-8)
    (expected,) = wide.state.values()
    np.testing.assert_array_equal(optimizer.get_slot(w, "m"), expected["exp_avg"].numpy())
    np.testing.assert_array_equal(optimizer.get_slot(w, "v"), expected["exp_avg_sq"].numpy())


def test_codes_without_scales_are_refused_by_name():
    parameter = torch.nn.Parameter(torch.ones(6000))
    theirs = fastadam.torch.Adam([parameter], moments="8bit")
    parameter.grad = torch.ones(6000)
    theirs.step()
    saved = copy.deepcopy(theirs.state_dict())
    del saved["state"][0]["exp_avg_sq_scale"]
    w = np.ones(6000, np.float32)
    optimizer = fastadam.Adam()
    with pytest.raises(ValueError, match="state of parameter 0: without 'exp_avg_sq_scale', expected exp_avg_sq and"):
        exchange.from_torch_state_dict(optimizer, saved, [w], epsilon=1e-8)
    assert not optimizer.get_slot_names() or len(optimizer.get_weights()) == 1


MALFORMED = {
    "state": (lambda d: d["state"].update({0: torch.ones(2)}), "state of parameter 0: Tensor, expected a dict"),
    "empty state": (lambda d: d["state"].update({0: {}}), r"parameters \[0\] have no state"),
    "no step": (
        lambda d: d["state"][0].pop("step"),
        "state of parameter 0: without 'step', expected step, exp_avg and",
    ),
    "step": (lambda d: d["state"][0].update(step=torch.ones(2)), "state_dict: step: Tensor, expected a number"),
    "meta": (
        lambda d: d["state"][0].update(exp_avg=torch.ones(9, device="meta")),
        "exp_avg: .* on meta, expected a dense",
    ),
    "groups": (
        lambda d: d.update(param_groups=torch.ones(2)),
        "state_dict: param_groups: Tensor, expected a list of dicts",
    ),
    "no group": (lambda d: d.update(param_groups=[]), "state_dict: param_groups: empty, expected"),
    "params": (lambda d: d["param_groups"][0].update(params=3), r"param_groups\[0\]: params: int, expected a list"),
    **{
        f"{name} {type(value).__name__}": (
            lambda d, name=name, value=value: d["param_groups"][0].update({name: value}),
            rf"param_groups\[0\]: {name}: {type(value).__name__}, expected",
        )
        for name in ("lr", "eps", "weight_decay", "betas", "amsgrad", "maximize", "decoupled_weight_decay")
        for value in (torch.ones(2), object())
    },
}


@pytest.mark.parametrize("kind", MALFORMED)
def test_a_malformed_state_dict_is_refused_by_name(kind):
    optimizer, w = trained_core("8bit")
    change, message = MALFORMED[kind]
    saved = copy.deepcopy(exchange.to_torch_state_dict(optimizer, [w], epsilon=1e-8))
    change(saved)
    before = optimizer.get_weights()
    with pytest.raises((TypeError, ValueError), match=message):
        exchange.from_torch_state_dict(optimizer, saved, [w], epsilon=1e-8)
    assert all(map(np.array_equal, optimizer.get_weights(), before))
