"""fastadam.torch where tensors have no data, as for estimates of memory: FakeTensorMode and the meta device."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

import fastadam.torch  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode  # noqa: E402
from torch_twins import PAIRS  # noqa: E402


def network(device):
    return torch.nn.Sequential(torch.nn.Linear(4, 3, device=device), torch.nn.Linear(3, 1, device=device))


def described(optimizer):
    """Which tensors the states have; the values of those that have some."""
    return [
        {
            name: (tuple(t.shape), t.dtype, t.device, isinstance(t, FakeTensor), name == "step" and str(t))
            for name, t in named.items()
        }
        for named in optimizer.state.values()
    ]


def trained(cls, device, steps=2, **options):
    model = network(device)
    optimizer = cls(model.parameters(), lr=0.1, **options)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.ones(2, 4, device=device)).sum().backward()
        optimizer.step()
    return described(optimizer)


@pytest.mark.parametrize("options", [{}, {"amsgrad": True, "weight_decay": 0.1}], ids=str)
@pytest.mark.parametrize("name", PAIRS)
def test_a_step_on_the_meta_device_makes_the_states(name, options):
    theirs, ours = (trained(cls, "meta", **options) for cls in PAIRS[name])
    assert len(ours) == 4
    assert ours == theirs


@pytest.mark.parametrize("options", [{}, {"amsgrad": True}, {"fused": True}], ids=str)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("name", PAIRS)
def test_a_step_under_fake_tensor_mode_makes_the_states(name, device, options):
    found = []
    for cls in PAIRS[name]:
        with FakeTensorMode():
            if device == "cuda":  # without a GPU, autograd has no backward for it
                weights = [torch.nn.Parameter(torch.empty(shape, device="cuda")) for shape in ((3, 4), (3,))]
                optimizer = cls(weights, **options)
                for _ in range(2):
                    for weight in weights:
                        weight.grad = torch.empty_like(weight)
                    optimizer.step()
                found.append(described(optimizer))
            else:
                found.append(trained(cls, device, **options))
    assert len(found[0]) in (2, 4)
    assert found[1] == found[0]


def test_parameters_with_and_without_data_in_one_group():
    real, meta, twin = torch.ones(3), torch.ones(2, device="meta"), torch.ones(3)
    ours, theirs = fastadam.torch.Adam([real, meta], lr=0.1), torch.optim.Adam([twin], lr=0.1)
    for _ in range(3):
        for weight in (real, meta, twin):
            weight.grad = torch.full_like(weight, 0.5)
        ours.step()
        theirs.step()
    torch.testing.assert_close(real, twin, rtol=1e-6, atol=0)
    assert [float(ours.state[weight]["step"]) for weight in (real, meta)] == [3, 3]
    assert ours.state[meta]["exp_avg"].is_meta


@pytest.mark.parametrize("stepped", [0, 1, 3])
def test_data_is_not_touched_while_operators_are_only_simulated(stepped):
    weight = torch.ones(3)
    weight.grad = torch.ones(3)
    optimizer = fastadam.torch.Adam([weight], lr=0.1)
    for _ in range(stepped):
        optimizer.step()
    before = weight.clone()
    with FakeTensorMode(), pytest.raises(RuntimeError, match="tensors with data under FakeTensorMode, expected Fake"):
        optimizer.step()
    assert torch.equal(weight, before)
    assert float(optimizer.state[weight]["step"] if stepped else 0) == stepped
    optimizer.step()
    assert float(optimizer.state[weight]["step"]) == stepped + 1


def test_devices_that_cannot_be_used_raise_what_torch_raises():
    for cls in PAIRS["Adam"]:
        meta = torch.ones(2, device="meta")
        meta.grad = torch.ones_like(meta)
        with pytest.raises(RuntimeError, match="fused=True"):
            cls([meta], fused=True).step()
        weight = torch.ones(3)
        weight.grad = torch.ones(3)
        optimizer = cls([weight])
        optimizer.step()
        optimizer.state[weight]["exp_avg"] = torch.ones(3, device="meta")
        with pytest.raises(RuntimeError, match="on .*meta|device meta"):
            optimizer.step()
