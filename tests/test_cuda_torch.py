"""PyTorch's CUDA tensors, and arrays that only a real GPU can hold."""

from __future__ import annotations

import fastadam
import numpy as np
import pytest
from cases import bits
from gpu import skip_or_fail
from test_cuda import F32, same

pytestmark = [pytest.mark.gpu, pytest.mark.parametrize("gpu", ["real"], indirect=True)]


@pytest.fixture
def torch(request):
    found = pytest.importorskip("torch")
    if not found.cuda.is_available():
        skip_or_fail(request.config, "needs a GPU that PyTorch sees")
    return found


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_tensors_on_a_stream_of_torch(gpu, torch, dtype):
    rng = np.random.RandomState(0)
    start, gradient = rng.standard_normal((2, 20000)).astype(F32)
    on_host = torch.tensor(start, dtype=getattr(torch, dtype))
    ours, theirs = fastadam.Adam(0.01, clipnorm=1.0), fastadam.Adam(0.01, clipnorm=1.0)
    with torch.cuda.stream(torch.cuda.Stream()):
        twin = torch.nn.Parameter(on_host.cuda())
        for _ in range(3):
            ours.apply_gradients([(torch.tensor(gradient, dtype=on_host.dtype), on_host)])
            theirs.apply_gradients([(torch.tensor(gradient, dtype=on_host.dtype).cuda(), twin)])
        assert torch.equal(on_host, twin.detach().cpu())
        m = theirs.get_slot(twin, "m")
        assert isinstance(m, torch.Tensor)
        assert m.device == twin.device
        assert np.array_equal(bits(ours.get_slot(on_host, "m")), bits(m.cpu().numpy()))


def test_sparse_gradients_of_an_embedding(gpu, torch):
    weight = torch.randn(100, 8)
    twin = torch.nn.Embedding.from_pretrained(weight.clone().cuda(), freeze=False, sparse=True)
    table = torch.nn.Embedding.from_pretrained(weight, freeze=False, sparse=True)
    ours, theirs = (fastadam.Adam(0.01, sparse_update="deferred") for _ in range(2))
    for step in range(5):
        ids = torch.tensor([step, 7, 7, 99])
        for layer, optimizer, given in ((table, ours, ids), (twin, theirs, ids.cuda())):
            layer.weight.grad = None
            layer(given).sum().backward()
            optimizer.apply_gradients([(layer.weight.grad, layer.weight)])
    ours.sync()
    theirs.sync()
    assert torch.equal(table.weight.detach(), twin.weight.detach().cpu())


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
def test_a_step_in_a_graph_of_torch_is_refused(gpu, torch):
    weight, gradient = torch.ones(1000, device="cuda"), torch.full((1000,), 0.5, device="cuda")
    optimizer = fastadam.Adam(0.01)
    optimizer.apply_gradients([(gradient, weight)])
    with (
        pytest.raises(RuntimeError, match="apply_gradients: a CUDA graph is"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        optimizer.apply_gradients([(gradient, weight)])
    assert int(optimizer.iterations) == 1


def test_more_than_2_31_elements(gpu):
    cupy, size = gpu.cupy, 2**31 + 17
    w, gradient = cupy.ones(size, cupy.float16), cupy.full(size, 0.5, cupy.float16)
    optimizer = fastadam.Adam(0.1, clipnorm=1e30)
    optimizer.apply_gradients([(gradient, w)])
    few = np.ones(4, np.float16)
    fastadam.Adam(0.1, clipnorm=1e30).apply_gradients([(np.full(4, 0.5, np.float16), few)])
    assert bool((w == few[0]).all())
    assert same(w[-4:].get(), few)
