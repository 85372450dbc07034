"""fastadam.torch on a GPU: torch's streams, learning rates and graphs."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

import fastadam.torch  # noqa: E402
from torch_twins import PAIRS  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.parametrize("gpu", ["real"], indirect=True),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA build of PyTorch"),
]


def pair(name, dtype=torch.float64, **options):
    torch.manual_seed(0)
    start = [torch.randn(shape, dtype=dtype, device="cuda") for shape in ((1000,), (7, 9), ())]
    found = []
    for cls in PAIRS[name]:
        weights = [torch.nn.Parameter(value.clone()) for value in start]
        found.append((weights, cls(weights, **options)))
    return found


def set_gradients(found, seed):
    for weights, _ in found:
        torch.manual_seed(seed)
        for weight in weights:
            weight.grad = torch.randn_like(weight)


def check_same(found, tolerance=1e-12):
    for a, b in zip(found[0][0], found[1][0], strict=True):
        torch.testing.assert_close(b.detach(), a.detach(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize(
    "options", [{}, {"weight_decay": 0.1, "amsgrad": True}, {"maximize": True}, {"capturable": True}], ids=str
)
def test_steps_on_a_stream_of_torch(gpu, name, options):
    with torch.cuda.stream(torch.cuda.Stream()):
        found = pair(name, lr=0.01, **options)
        for seed in range(10):
            set_gradients(found, seed)
            for _, optimizer in found:
                optimizer.step()
        check_same(found)
        steps = [optimizer.state[weights[0]]["step"] for weights, optimizer in found]
        assert steps[0].device == steps[1].device
        assert float(steps[1]) == 10


@pytest.mark.parametrize("mode", ["dense", "lazy"])
def test_embeddings(gpu, mode):
    tables = [torch.nn.Embedding(50, 4, sparse=True, device="cuda", dtype=torch.float64) for _ in range(2)]
    tables[1].load_state_dict(tables[0].state_dict())
    theirs = torch.optim.SparseAdam if mode == "lazy" else torch.optim.Adam
    optimizers = [theirs(list(tables[0].parameters())), fastadam.torch.Adam(tables[1].parameters(), sparse_update=mode)]
    for step in range(5):
        for table, optimizer in zip(tables, optimizers, strict=True):
            optimizer.zero_grad()
            table(torch.tensor([step, 7, 7], device="cuda")).pow(2).sum().backward()
            if theirs is torch.optim.Adam and table is tables[0]:
                table.weight.grad = table.weight.grad.to_dense()
            optimizer.step()
    torch.testing.assert_close(tables[1].weight, tables[0].weight, rtol=1e-12, atol=1e-12)


def test_deferred_tables_are_refused(gpu):
    weight = torch.nn.Parameter(torch.ones(3, 2, device="cuda"))
    weight.grad = torch.ones(3, 2, device="cuda")
    with pytest.raises(ValueError, match="sparse_update: 'deferred' with .* on cuda:0, expected CPU memory"):
        fastadam.torch.Adam([weight], sparse_update="deferred").step()


def test_a_graph_counts_its_steps(gpu):
    rate = torch.tensor(0.01, device="cuda")
    found = pair("Adam", lr=rate, capturable=True)
    (_, theirs), (weights, ours) = found
    set_gradients(found, 0)
    theirs.step()
    ours.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ours.step()
    for round_ in range(5):
        rate.fill_(0.01 * (round_ + 1))
        theirs.step()
        graph.replay()
    assert float(ours.state[weights[0]]["step"]) == 6
    theirs.step()
    ours.step()
    check_same(found)
    assert float(ours.state[weights[0]]["step"]) == 7


def test_a_capture_without_capturable_is_refused(gpu):
    found = pair("Adam")[1]
    set_gradients([found], 0)
    found[1].step()
    with pytest.raises(RuntimeError, match="expected capturable=True"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        found[1].step()
