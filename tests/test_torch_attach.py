"""Modules attached to a fastadam.torch optimizer: pickled, copied, refused."""

from __future__ import annotations

import copy
import io
import pickle

import pytest

torch = pytest.importorskip("torch")

import fastadam.torch  # noqa: E402


def attached():
    torch.manual_seed(0)
    table = torch.nn.Embedding(300, 2, sparse=True, dtype=torch.float64)
    optimizer = fastadam.torch.Adam(table.parameters(), lr=0.1, sparse_update="deferred")
    optimizer.attach(table)
    return table, optimizer


def train(table, optimizer, steps):
    for k in steps:
        optimizer.zero_grad()
        table(torch.tensor([k % 7, 0])).square().sum().backward()
        optimizer.step()


def saved_by_torch(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {"copy": copy.deepcopy, "pickle": lambda value: pickle.loads(pickle.dumps(value)), "torch": saved_by_torch}


@pytest.mark.parametrize("optimizer_first", [True, False])
@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
@pytest.mark.usefixtures("rows_wait")
def test_a_module_copied_with_its_optimizer_is_attached_to_the_copy(copied, optimizer_first):
    table, optimizer = attached()
    train(table, optimizer, range(5))
    optimizer.sync()
    pair = copied((optimizer, table) if optimizer_first else (table, optimizer))
    other, twin = pair[::-1] if optimizer_first else pair
    assert twin.param_groups[0]["params"][0] is other.weight
    train(table, optimizer, range(5, 20))
    train(other, twin, range(5, 20))
    assert table.weight.equal(other.weight)
    for each, owner in ((table, optimizer), (other, twin)):
        waiting = each.weight.detach().clone()
        assert not waiting[6].equal(each(torch.tensor([6]))[0])  # which the hook has brought up to date
        assert not waiting.equal(each.state_dict()["weight"])
        assert owner.gather(each.weight, torch.arange(300)).equal(each.weight)
    assert table.weight.equal(other.weight)


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
@pytest.mark.usefixtures("rows_wait")
def test_a_module_copied_alone_leaves_the_optimizer_behind(copied):
    table, optimizer = attached()
    train(table, optimizer, range(5))
    optimizer.sync()
    other = copied(table)
    assert all(hook.__self__.optimizer is None for hook in other._forward_pre_hooks.values())
    assert other(torch.tensor([1])).equal(table(torch.tensor([1])))
    assert other.state_dict()["weight"].equal(table.weight)
    assert b"fastadam.torch._optimizer" not in pickle.dumps(table)


def test_loading_leaves_modules_attached():
    table, optimizer = attached()
    train(table, optimizer, range(2))
    optimizer.load_state_dict(optimizer.state_dict())
    assert all(hook.__self__.optimizer is optimizer for hook in table._forward_pre_hooks.values())


@pytest.mark.usefixtures("rows_wait")
def test_ids_may_be_given_by_name():
    table, optimizer = attached()
    train(table, optimizer, range(5))
    waiting = table.weight.detach().clone()
    assert not table(input=torch.tensor([1]))[0].equal(waiting[1])
    with pytest.raises(TypeError, match="input"):
        table()
    bag = torch.nn.EmbeddingBag(5, 2, sparse=True)
    fastadam.torch.Adam(bag.parameters()).attach(bag)
    ids, offsets = torch.tensor([1, 2]), torch.tensor([0])
    assert bag(input=ids, offsets=offsets).equal(bag(ids, offsets))


@pytest.mark.parametrize("mode", ["dense", "lazy", "deferred", "deferred_fast"])
@pytest.mark.parametrize("cls", [torch.nn.Embedding, torch.nn.EmbeddingBag])
def test_max_norm_is_refused_where_rows_wait(cls, mode):
    table = cls(3, 2, max_norm=1.5, sparse=True)
    optimizer = fastadam.torch.Adam(table.parameters(), sparse_update=mode)
    if not mode.startswith("deferred"):
        optimizer.attach(table)
        return
    with pytest.raises(ValueError, match=f"module: max_norm=1.5 with sparse_update='{mode}', expected None"):
        optimizer.attach(table)
    assert not table._forward_pre_hooks


@pytest.mark.parametrize("beta_2", [0.999, 0.1, 1e-3, 1e-5])
def test_a_small_beta_2_leaves_what_the_docstring_says(beta_2):
    weight, twin = torch.nn.Parameter(torch.ones(1)), torch.nn.Parameter(torch.ones(1).double())
    pairs = [
        (fastadam.torch.Adam([weight], betas=(0.0, beta_2)), weight),
        (torch.optim.Adam([twin], betas=(0.0, beta_2)), twin),
    ]
    for gradient in (3.0, 1e-4):
        for optimizer, parameter in pairs:
            parameter.grad = torch.full_like(parameter, gradient)
            optimizer.step()
    found, expected = (float(optimizer.state[parameter]["exp_avg_sq"]) for optimizer, parameter in pairs)
    assert abs(found - expected) <= (1.2e-7 / beta_2 + 1.2e-7 / (1 - beta_2)) * expected


def test_a_square_that_overflows():
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = fastadam.torch.Adam([weight])
    for expected in (float("inf"), float("nan")):
        weight.grad = torch.full((1,), 1.9e19)
        optimizer.step()
        found = optimizer.state[weight]["exp_avg_sq"]
        torch.testing.assert_close(found, torch.full((1,), expected), equal_nan=True)
