"""FSDP2 in two processes, with and without ``CPUOffloadPolicy``: what one process does with whole parameters."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

import fastadam.torch  # noqa: E402
from gloo_processes import needs_gloo, run_in_two_processes  # noqa: E402

pytestmark = [needs_gloo, pytest.mark.slow]
HALF = torch.bfloat16


def network(dtype):
    torch.manual_seed(0)
    layers = [torch.nn.Linear(8, 7), torch.nn.Tanh(), torch.nn.Linear(7, 5), torch.nn.Linear(5, 1)]
    return torch.nn.Sequential(*layers).to(dtype)


def sharded(dtype=torch.float64, *, offloaded=True):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

    model, mesh = network(dtype), init_device_mesh("cpu", (2,))
    policy = CPUOffloadPolicy(pin_memory=False) if offloaded else OffloadPolicy()
    for layer in model:
        if isinstance(layer, torch.nn.Linear):
            fully_shard(layer, mesh=mesh, offload_policy=policy)
    return fully_shard(model, mesh=mesh, offload_policy=policy)


def train(model, optimizer, steps):
    for step in steps:
        torch.manual_seed(step)
        optimizer.zero_grad()
        inputs = torch.randn(6, 8).to(next(model.parameters()).dtype)
        model(inputs).pow(2).sum().backward()
        optimizer.step()


def check_equal(found, expected):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.full_tensor().detach(), b.detach(), rtol=1e-12, atol=1e-14)


def plain_and_clipped(_folder):
    for offloaded in (True, False):
        for options in ({"weight_decay": 0.1}, {"global_clipnorm": 0.5, "skip_nonfinite": True}, {"clipnorm": 0.3}):
            model, twin = sharded(offloaded=offloaded), network(torch.float64)
            tested = fastadam.torch.AdamW(model.parameters(), lr=0.1, **options)
            train(model, tested, range(5))
            train(twin, fastadam.torch.AdamW(twin.parameters(), lr=0.1, **options), range(5))
            check_equal(model.parameters(), twin.parameters())


def against_torch(_folder):
    """Clipping by torch's function, then AdamW: the same as ours in one step."""
    model, theirs = sharded(), sharded()
    tested = fastadam.torch.AdamW(model.parameters(), lr=0.1, global_clipnorm=0.5)
    reference = torch.optim.AdamW(theirs.parameters(), lr=0.1)
    train(model, tested, range(4))
    reference.register_step_pre_hook(lambda *_: torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5) and None)
    train(theirs, reference, range(4))
    for a, b in zip(model.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.to_local(), b.to_local(), rtol=1e-5, atol=1e-7)  # torch adds 1e-6 to the norm


def masters(folder):
    """Half shards with masters that are shards, saved and loaded with the weights in between."""
    save_and_resume(f"{folder}/masters", "master", torch.float32, master="float32")


def halves(folder):
    """The low halves of masters, and bfloat16 moments, as shards."""
    options = {"moments": "bfloat16", "master": "split", "float32_for": 0, "seed": 5}
    save_and_resume(f"{folder}/halves", "master_low", torch.int16, **options)


def save_and_resume(folder, key, dtype, **options):
    from torch.distributed import checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    def made():
        model = sharded(HALF)
        return model, fastadam.torch.AdamW(model.parameters(), lr=0.01, global_clipnorm=0.5, **options)

    model, optimizer = made()
    train(model, optimizer, range(3))
    for param in model.parameters():
        master = optimizer.state[param][key]
        assert type(master).__name__ == "DTensor"
        assert master.dtype == dtype
        assert key != "master" or torch.equal(master.to_local().to(HALF), param.to_local())
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"weights": weights, "state": state}, checkpoint_id=folder)
    train(model, optimizer, range(3, 6))
    resumed, other = made()
    weights, state = get_state_dict(resumed, other)
    dcp.load({"weights": weights, "state": state}, checkpoint_id=folder)
    set_state_dict(resumed, other, model_state_dict=weights, optim_state_dict=state)
    train(resumed, other, range(3, 6))
    for a, b in zip(resumed.parameters(), model.parameters(), strict=True):
        assert torch.equal(a.to_local(), b.to_local())
        for name, value in optimizer.state[b].items():
            found = other.state[a][name]
            assert found.dtype == value.dtype
            assert name == "step" or torch.equal(found.to_local(), value.to_local())


def codes(_folder):
    """8-bit moments of shards are refused, whether they begin or are loaded."""
    model = sharded(torch.float32)
    plain = fastadam.torch.AdamW(model.parameters())
    train(model, plain, range(1))
    optimizer = fastadam.torch.AdamW(model.parameters(), moments="8bit", float32_for=0)
    for call in (optimizer.step, lambda: optimizer.load_state_dict(plain.state_dict())):
        try:
            call()
        except ValueError as error:
            assert "moments: '8bit' with" in str(error)  # noqa: PT017  in a process without pytest
            assert "a DTensor, whose blocks" in str(error)  # noqa: PT017
        else:
            raise AssertionError("8-bit moments of a DTensor were taken")
    assert not optimizer.state


def computed(_folder):
    """Half shards beside float32 shards; each process reports its own."""
    model = sharded(torch.float32)
    params = list(model.parameters())
    receivers = [torch.zeros_like(param, dtype=HALF, requires_grad=False) for param in params]
    optimizer = fastadam.torch.AdamW([{"params": params, "compute_params": receivers}], lr=0.1, telemetry=True)
    train(model, optimizer, range(3))
    for param, tensor in zip(params, receivers, strict=True):
        assert torch.equal(tensor.to_local(), param.detach().to_local().to(HALF))
    assert optimizer.telemetry().size.tolist() == [param.to_local().numel() for param in params]
    try:
        plain = [torch.zeros(param.shape, dtype=HALF) for param in params]
        optimizer.add_param_group({"params": [torch.nn.Parameter(params[0].detach())], "compute_params": plain[:1]})
    except TypeError as error:
        assert "Tensor, expected" in str(error)  # noqa: PT017  in a process without pytest
    else:
        raise AssertionError("a tensor that is not distributed was taken")


def test_two_processes_do_what_one_does(tmp_path):
    """With all engines, since starting the processes is what takes long."""
    run_in_two_processes((plain_and_clipped, against_torch, masters, halves, codes, computed), tmp_path)
