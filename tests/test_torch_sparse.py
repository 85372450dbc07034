"""Sparse gradients in fastadam.torch: every mode beside torch.optim.Adam, SparseAdam and the dense step."""

from __future__ import annotations

import copy

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import fastadam  # noqa: E402
import fastadam.torch  # noqa: E402
from torch_twins import in_memory  # noqa: E402

ROWS, WIDTH = 2000, 6
USED = 60  # rows that batches draw from


def coo(*arguments):
    return torch.sparse_coo_tensor(*arguments, check_invariants=True)


def embedding(dtype=torch.float64, **options):
    torch.manual_seed(0)
    return torch.nn.Embedding(ROWS, WIDTH, sparse=True, **options).to(dtype)


def batches(count):
    torch.manual_seed(1)
    for _ in range(count):
        ids = torch.randint(0, USED, (5,))
        yield torch.cat([ids, ids[:2]])  # repeated: the gradient is not coalesced


def train(module, optimizer, count, *, dense=False):
    for ids in batches(count):
        optimizer.zero_grad()
        (module(ids) - 1).pow(2).sum().backward()
        assert dense or not module.weight.grad.is_coalesced()
        if dense:
            module.weight.grad = module.weight.grad.to_dense()
        optimizer.step()


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1}, {"amsgrad": True}, {"maximize": True}], ids=str)
@pytest.mark.parametrize("cls", ["Adam", "AdamW"])
def test_dense_is_torch_on_the_dense_gradient(cls, options):
    theirs, ours = embedding(), embedding()
    train(theirs, getattr(torch.optim, cls)(theirs.parameters(), lr=0.1, **options), 30, dense=True)
    train(ours, getattr(fastadam.torch, cls)(ours.parameters(), lr=0.1, **options), 30)
    torch.testing.assert_close(ours.weight, theirs.weight, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"maximize": True}, {"betas": (0.5, 0.9), "eps": 1e-3}], ids=str)
def test_lazy_is_sparse_adam(options):
    theirs, ours = embedding(), embedding()
    train(theirs, torch.optim.SparseAdam(list(theirs.parameters()), lr=0.1, **options), 30)
    optimizer = fastadam.torch.Adam(ours.parameters(), lr=0.1, sparse_update="lazy", **options)
    train(ours, optimizer, 30)
    torch.testing.assert_close(ours.weight, theirs.weight, rtol=1e-12, atol=1e-12)
    assert float(optimizer.state[ours.weight]["step"]) == 30


def test_a_state_of_sparse_adam_goes_on():
    theirs, ours = embedding(), embedding()
    other = torch.optim.SparseAdam(list(theirs.parameters()), lr=0.1)
    train(theirs, other, 15)
    ours.load_state_dict(theirs.state_dict())
    optimizer = fastadam.torch.Adam(ours.parameters(), sparse_update="lazy")
    optimizer.load_state_dict(other.state_dict())
    train(theirs, other, 15)
    train(ours, optimizer, 15)
    torch.testing.assert_close(ours.weight, theirs.weight, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "options", [{}, {"amsgrad": True}, {"decoupled_weight_decay": True, "weight_decay": 0.1}], ids=str
)
@pytest.mark.parametrize("mode", ["deferred", "deferred_fast"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.usefixtures("rows_wait")
def test_deferred_is_the_dense_step_with_kerass_epsilon(mode, dtype, options):
    table = embedding(dtype)
    expected = table.weight.detach().numpy().copy()
    optimizer = fastadam.torch.Adam(table.parameters(), lr=0.1, sparse_update=mode, **options)
    optimizer.attach(table)
    decay = options.get("weight_decay", 0)
    keras = fastadam.AdamW if decay else fastadam.Adam
    wanted = keras(
        0.1, epsilon=1e-8, amsgrad=options.get("amsgrad", False), **({"weight_decay": decay} if decay else {})
    )
    waited = 0
    for ids in batches(60):
        optimizer.zero_grad()
        (table(ids) - 1).pow(2).sum().backward()
        gradient = table.weight.grad
        slices = fastadam.IndexedSlices(gradient._values().numpy(), gradient._indices()[0].numpy())
        wanted.apply_gradients([(slices, expected)])
        optimizer.step()
        waited += not np.array_equal(in_memory(table.weight), expected)
    assert waited > 50
    bits = mode == "deferred" or dtype == torch.float64
    rows = optimizer.gather(table.weight, torch.tensor([[3, 199], [3, 0]])).numpy()
    np.testing.assert_allclose(rows, expected[[[3, 199], [3, 0]]], rtol=0 if bits else 1e-5, atol=0 if bits else 1e-6)
    optimizer.sync()
    np.testing.assert_allclose(
        table.weight.detach().numpy(), expected, rtol=0 if bits else 1e-5, atol=0 if bits else 1e-6
    )


@pytest.mark.parametrize("mode", ["dense", "lazy", "deferred"])
def test_dense_and_sparse_gradients_in_one_group(mode):
    torch.manual_seed(0)
    model = torch.nn.Sequential(embedding(), torch.nn.Flatten(), torch.nn.Linear(7 * WIDTH, 1).double())
    twin = copy.deepcopy(model)
    optimizer = fastadam.torch.Adam(model.parameters(), lr=0.01, sparse_update=mode)
    optimizer.attach(model[0])
    linear = list(twin[2].parameters())
    rows = fastadam.torch.Adam([twin[0].weight], lr=0.01, sparse_update=mode)
    rows.attach(twin[0])
    others = torch.optim.Adam(linear, lr=0.01)
    for ids in batches(20):
        for layers, together in ((model, [optimizer]), (twin, [rows, others])):
            for each in together:
                each.zero_grad()
            layers(ids[None]).pow(2).sum().backward()
            for each in together:
                each.step()
    optimizer.sync()
    rows.sync()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mode", ["lazy", "deferred"])
def test_gradients_that_two_passes_added_up_and_rows_of_padding(mode):
    tables = [embedding(padding_idx=3) for _ in range(2)]
    optimizers = [fastadam.torch.Adam(t.parameters(), lr=0.1, sparse_update=mode) for t in tables]
    for table, optimizer, split in zip(tables, optimizers, (True, False), strict=True):
        for ids in batches(10):
            ids[0] = 3
            optimizer.zero_grad()
            for part in (ids[:4], ids[4:]) if split else (ids,):
                optimizer.sync()
                table(part).sum().backward()
            optimizer.step()
        optimizer.sync()
    torch.testing.assert_close(tables[0].weight, tables[1].weight, rtol=1e-12, atol=1e-12)
    assert not tables[0].weight[3].any()


def test_an_empty_sparse_gradient():
    table = embedding()
    optimizer = fastadam.torch.Adam(table.parameters(), lr=0.1)
    reference = embedding()
    theirs = torch.optim.Adam(reference.parameters(), lr=0.1)
    for ids in ([1, 2], []):
        for module, each in ((table, optimizer), (reference, theirs)):
            each.zero_grad()
            module(torch.tensor(ids, dtype=torch.int64)).sum().backward()
        reference.weight.grad = reference.weight.grad.to_dense()
        optimizer.step()
        theirs.step()
    torch.testing.assert_close(table.weight, reference.weight, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mode", ["dense", "lazy", "deferred"])
def test_half_tables(mode, dtype):
    """Half moments take a sparse gradient only where all rows move; float32 moments in every mode."""
    table, twin = embedding(dtype), embedding(dtype)
    optimizer = fastadam.torch.Adam(table.parameters(), lr=0.1, sparse_update=mode)
    if mode == "dense":
        train(table, optimizer, 3)
        train(twin, fastadam.torch.Adam(twin.parameters(), lr=0.1), 3, dense=True)
        torch.testing.assert_close(table.weight, twin.weight, rtol=0, atol=0)
    else:
        before = table.weight.detach().clone()
        with pytest.raises(ValueError, match=f"sparse_update='{mode}' and with moments of .*moments='float32'"):
            train(table, optimizer, 1)
        assert torch.equal(table.weight, before)
    wide = fastadam.torch.Adam(twin.parameters(), lr=0.1, sparse_update=mode, moments="float32")
    wide.attach(twin)
    train(twin, wide, 3)
    assert wide.state[twin.weight]["exp_avg"].dtype == torch.float32


def test_two_sparse_axes_are_made_dense():
    weight, twin = (torch.nn.Parameter(torch.ones(3, 4).double()) for _ in range(2))
    weight.grad = coo([[0, 2, 0], [1, 3, 1]], [1.0, -2.0, 3.0], (3, 4)).double()
    twin.grad = weight.grad.to_dense()
    fastadam.torch.Adam([weight], lr=0.1).step()
    fastadam.torch.Adam([twin], lr=0.1).step()
    assert torch.equal(weight, twin)


def test_options_that_rows_do_not_have_are_refused():
    table = embedding()
    optimizer = fastadam.torch.Adam(table.parameters(), sparse_update="lazy", weight_decay=0.1)
    with pytest.raises(ValueError, match="weight_decay: 0.1 with sparse_update='lazy', expected 0 or decoupled"):
        train(table, optimizer, 1)
    assert not optimizer.state
    turned = torch.nn.Parameter(embedding().weight.detach().t().contiguous().t())
    turned.grad = coo([[1]], torch.ones(1, WIDTH), turned.shape).double()
    with pytest.raises(ValueError, match="not contiguous and real"):
        fastadam.torch.Adam([turned], sparse_update="deferred").step()


# ---- tables that wait -----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("rows_wait")
def test_writing_to_a_table_that_waits_is_found():
    table = embedding()
    optimizer = fastadam.torch.Adam(table.parameters(), sparse_update="deferred")
    train(table, optimizer, 1)
    with torch.no_grad():
        table.weight[0] = 0
    for call in (optimizer.sync, optimizer.step, lambda: optimizer.gather(table.weight, torch.tensor([1]))):
        with pytest.raises(RuntimeError, match="written to while rows waited for their steps; call sync"):
            call()


@pytest.mark.usefixtures("rows_wait")
def test_a_state_dict_has_every_row_up_to_date_and_goes_on():
    table, twin = embedding(), embedding()
    optimizer = fastadam.torch.Adam(table.parameters(), lr=0.1, sparse_update="deferred")
    optimizer.attach(table)
    train(table, optimizer, 5)
    saved = copy.deepcopy((optimizer.state_dict(), table.state_dict()))
    resumed = fastadam.torch.Adam(twin.parameters(), lr=0.5, sparse_update="deferred")
    resumed.attach(twin)
    twin.load_state_dict(saved[1])
    resumed.load_state_dict(saved[0])
    train(table, optimizer, 5)
    train(twin, resumed, 5)
    assert torch.equal(table.state_dict()["weight"], twin.state_dict()["weight"])
    assert resumed.sparse_update == "deferred"
    table.load_state_dict(saved[1])  # back, while rows wait: what they waited for is gone
    optimizer.load_state_dict(saved[0])
    train(table, optimizer, 5)
    assert torch.equal(table.state_dict()["weight"], twin.state_dict()["weight"])


@pytest.mark.usefixtures("rows_wait")
def test_betas_that_change_and_dense_gradients_find_the_rows_up_to_date():
    tables = [embedding() for _ in range(2)]
    for table, mode in zip(tables, ("deferred", "dense"), strict=True):
        optimizer = fastadam.torch.Adam(table.parameters(), lr=0.1, eps=1e-300, sparse_update=mode)
        optimizer.attach(table)
        for step, ids in enumerate(batches(12)):
            optimizer.zero_grad()
            (table(ids) - 1).pow(2).sum().backward()
            if step == 7:
                table.weight.grad = table.weight.grad.to_dense()
            optimizer.param_groups[0]["betas"] = (0.9, 0.99 if step < 5 else 0.9)
            optimizer.step()
        optimizer.sync()
    torch.testing.assert_close(tables[0].weight, tables[1].weight, rtol=1e-10, atol=1e-12)


def test_long_histories_find_room():
    table, twin = (torch.nn.Embedding.from_pretrained(torch.ones(3, 2), freeze=False, sparse=True) for _ in range(2))
    for module, mode in ((table, "deferred"), (twin, "dense")):
        optimizer = fastadam.torch.Adam(module.parameters(), lr=1e-3, eps=1e-30, sparse_update=mode)
        for step in range(1100):
            module.weight.grad = coo([[step % 2]], torch.ones(1, 2), (3, 2))
            optimizer.step()
        optimizer.sync()
    torch.testing.assert_close(table.weight, twin.weight, rtol=1e-5, atol=1e-6)


def test_ids_and_modules_that_are_refused():
    table = embedding()
    optimizer = fastadam.torch.Adam(table.parameters(), sparse_update="deferred")
    with pytest.raises(TypeError, match=r"ids: torch.float32, expected a tensor of int32 or int64"):
        optimizer.gather(table.weight, torch.tensor([1.0]))
    with pytest.raises(ValueError, match="ids: 2000 is not a row of param, expected 0 <= id < 2000"):
        optimizer.gather(table.weight, torch.tensor([0, ROWS]))
    with pytest.raises(TypeError, match="module: Linear, expected an Embedding"):
        optimizer.attach(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="module: its weight is not a parameter"):
        optimizer.attach(embedding())
    table.weight.grad = coo([[ROWS - 1]], torch.ones(1, WIDTH), (ROWS, WIDTH)).double()
    table.weight.grad._indices()[0, 0] = ROWS
    with pytest.raises(
        ValueError,
        match=r"grad of param_groups\[0\]\['params'\]\[0\].indices\[0\]: 2000 is not a row of param_groups\[0\]\['params'\]\[0\]",
    ):
        optimizer.step()


# ---- more sparse axes than the first --------------------------------------------------------------------------------

AXES_SHAPE = (70, 4, 3)


def gradient_of_axes(axes, seed, shape=AXES_SHAPE):
    """Uncoalesced, with an element that comes twice."""
    generator = torch.Generator().manual_seed(seed)
    indices = torch.stack([torch.randint(0, n, (5,), generator=generator) for n in shape[:axes]])
    indices = torch.cat([indices, indices[:, :1]], 1)
    values = torch.randn(6, *shape[axes:], dtype=torch.float64, generator=generator)
    return coo(indices, values, shape)


def stepped(optimizer, weight, gradients):
    for gradient in gradients:
        weight.grad = gradient
        optimizer.step()
    return weight.detach()


@pytest.mark.parametrize("axes", [(2,), (3,), (1, 2, 3)], ids=str)
@pytest.mark.parametrize("options", [{}, {"maximize": True}], ids=str)
def test_lazy_moves_the_elements_that_sparse_adam_moves(axes, options):
    gradients = [gradient_of_axes(axes[k % len(axes)], k) for k in range(12)]
    found = []
    for make in (torch.optim.SparseAdam, lambda w, **named: fastadam.torch.Adam(w, sparse_update="lazy", **named)):
        weight = torch.nn.Parameter(torch.ones(AXES_SHAPE, dtype=torch.float64))
        found.append(stepped(make([weight], lr=0.1, **options), weight, gradients))
    torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("axes", [(2,), (3,), (1, 2, 3)], ids=str)
@pytest.mark.parametrize("mode", ["deferred", "deferred_fast"])
@pytest.mark.usefixtures("rows_wait")
def test_deferred_rows_of_elements_get_the_dense_step(mode, axes):
    found = []
    for as_rows in (True, False):
        weight = torch.nn.Parameter(torch.ones(AXES_SHAPE, dtype=torch.float64))
        optimizer = fastadam.torch.Adam([weight], lr=0.1, sparse_update=mode)
        gradients = [gradient_of_axes(axes[k % len(axes)], k) for k in range(12)]
        if as_rows:
            gradients = [g.to_dense().to_sparse(1) for g in gradients]
        for gradient in gradients:
            stepped(optimizer, weight, [gradient])
            optimizer.gather(weight, torch.tensor([0]))
        optimizer.sync()
        found.append(weight.detach())
    torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mode", ["lazy", "deferred"])
@pytest.mark.parametrize("index", [[1, 4], [1, -1], [70, 0], [-1, 3]])
def test_an_element_outside_of_the_parameter_is_refused(mode, index):
    weight = torch.nn.Parameter(torch.ones(70, 4, dtype=torch.float64))
    optimizer = fastadam.torch.Adam([weight], sparse_update=mode)
    indices = torch.tensor([[0, index[0]], [0, index[1]]])
    weight.grad = torch.sparse_coo_tensor(indices, torch.ones(2).double(), weight.shape, check_invariants=False)
    with pytest.raises(ValueError, match="ind"):
        optimizer.step()
    assert bool((weight == 1).all())
    assert not optimizer.state


# ---- torch.compile --------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")  # of Dynamo
@pytest.mark.parametrize("whole", [False, True], ids=["step", "training step"])
@pytest.mark.parametrize("mode", ["dense", "lazy", "deferred"])
def test_sparse_gradients_under_torch_compile_take_the_eager_step(mode, whole):
    """Where the graph breaks; with dense gradients between, whose step is traced."""
    found = []
    for compiles in (False, True):
        torch.manual_seed(0)
        table, head = embedding(), torch.nn.Linear(WIDTH, 1).double()
        optimizer = fastadam.torch.Adam([*table.parameters(), *head.parameters()], lr=0.1, sparse_update=mode)
        optimizer.attach(table)

        def backward(ids):
            optimizer.zero_grad()  # noqa: B023
            head(table(ids)).sum().backward()  # noqa: B023

        def train(ids):
            backward(ids)
            optimizer.step()  # noqa: B023

        step = optimizer.step
        if compiles:
            train = torch.compile(train, backend="eager")
            step = torch.compile(lambda: optimizer.step(), backend="eager")  # noqa: B023
        for k, ids in enumerate(batches(5)):
            if whole:
                train(ids)
                continue
            backward(ids)
            if k in (2, 3):
                table.weight.grad = table.weight.grad.to_dense()
            step()
        optimizer.sync()
        torch._dynamo.reset()
        found.append([table.weight.detach(), head.weight.detach()])
        assert [float(named["step"]) for named in optimizer.state.values()] == [5, 5, 5]
    torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=1e-14)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("spoil", "error", "text"),
    [
        (lambda o: o.param_groups[0].update(differentiable=True), ValueError, "differentiable: True"),
        (lambda o: o.param_groups[0].update(weight_decay=-1.0), ValueError, "Invalid weight_decay value"),
        (lambda o: o.param_groups[0].update(amsgrad=True, capturable=True), ValueError, "capturable: True"),
        (lambda o: next(iter(o.state.values())).pop("exp_avg"), ValueError, "without 'exp_avg'"),
    ],
)
def test_a_refusal_under_torch_compile_is_that_of_the_eager_step(spoil, error, text):
    weight = torch.nn.Parameter(torch.ones(3))
    weight.grad = torch.ones(3)
    optimizer = fastadam.torch.Adam([weight])
    optimizer.step()
    spoil(optimizer)
    with pytest.raises(error, match=text):
        torch.compile(lambda: optimizer.step(), backend="eager")()
    torch._dynamo.reset()
