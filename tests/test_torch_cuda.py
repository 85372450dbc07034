"""fastadam.torch on a GPU: torch's streams, learning rates and graphs."""

from __future__ import annotations

import contextlib

import pytest

torch = pytest.importorskip("torch")

import fastadam.torch  # noqa: E402
from gpu import skip_or_fail  # noqa: E402
from torch_twins import PAIRS  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.parametrize("gpu", ["real"], indirect=True),
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype"),
    pytest.mark.filterwarnings("ignore:The CUDA Graph is empty"),  # of a step that was refused
]


@pytest.fixture(autouse=True)
def _torch_has_cuda(request):
    if not torch.cuda.is_available():
        skip_or_fail(request.config, "needs a GPU that PyTorch sees")


@contextlib.contextmanager
def no_waiting():
    """Within, PyTorch raises where it waits for the GPU."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def pair(name, dtype=torch.float64, **options):
    """With capturable=True PyTorch rounds powers of the betas to float32: without it, it is the reference."""
    torch.manual_seed(0)
    start = [torch.randn(shape, dtype=dtype, device="cuda") for shape in ((1000,), (7, 9), ())]
    found = []
    exact = {key: value for key, value in options.items() if key != "capturable"}
    for cls, given in zip(PAIRS[name], (exact, options), strict=True):
        weights = [torch.nn.Parameter(value.clone()) for value in start]
        found.append((weights, cls(weights, **given)))
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
        weights, optimizer = found[1]
        step = optimizer.state[weights[0]]["step"]
        assert step.device.type == ("cuda" if "capturable" in options else "cpu")
        assert float(step) == 10


def test_a_step_like_the_last_one_exports_no_tensor(gpu, monkeypatch):
    """Each export takes longer than all else that the host does for a parameter."""
    found = pair("Adam", fused=True)
    exported, export = [], torch.Tensor.__dlpack__
    monkeypatch.setattr(torch.Tensor, "__dlpack__", lambda *args, **named: exported.append(1) or export(*args, **named))
    for seed in range(4):
        if seed == 3:
            assert exported
            exported.clear()
        set_gradients(found, seed)  # in new memory
        for _, optimizer in found:
            optimizer.step()
    assert not exported
    check_same(found)


def test_parameters_with_other_memory_are_stepped_there(gpu):
    found = pair("Adam")
    for seed in range(4):
        set_gradients(found, seed)
        for weights, optimizer in found:
            if seed == 2:
                weights[1].data = weights[1].data.clone()
            if seed == 3:
                optimizer.state[weights[0]]["exp_avg"] = torch.zeros_like(weights[0])  # what was there would differ
            optimizer.step()
    check_same(found)


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
    found = pair("Adam", lr=0.01, capturable=True)
    (_, theirs), (weights, ours) = found
    theirs.param_groups[0]["lr"], ours.param_groups[0]["lr"] = float(rate), rate
    set_gradients(found, 0)
    theirs.step()
    ours.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ours.step()
    for round_ in range(5):
        rate.fill_(0.01 * (round_ + 1))
        theirs.param_groups[0]["lr"] = float(rate)
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


# ---- GradScaler -----------------------------------------------------------------------------------------------------


class Scaled:
    """A model of one layer, its optimizer and a scaler; an input that is infinite makes a step that is skipped."""

    def __init__(self, cls, *, sparse=False, **options):
        torch.manual_seed(0)
        embedding = torch.nn.Embedding(50, 4, sparse=sparse, device="cuda")
        self.table, self.optimizer = embedding.weight, cls(embedding.parameters(), lr=0.1, **options)
        self.embedding, self.scaler = embedding, torch.amp.GradScaler("cuda", init_scale=1024.0)
        self.ids = torch.tensor([3, 7, 7], device="cuda")
        self.factor = torch.ones((), device="cuda")

    def backward(self):
        self.scaler.scale((self.embedding(self.ids).pow(2) * self.factor).sum()).backward()

    def step(self, factor=1.0):
        self.factor.fill_(factor)
        self.optimizer.zero_grad()
        self.backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()


def check_same_training(theirs, ours):
    torch.testing.assert_close(ours.table, theirs.table, rtol=1e-5, atol=1e-6)
    assert ours.scaler.get_scale() == theirs.scaler.get_scale()
    counts = [float(model.optimizer.state[model.table]["step"]) for model in (theirs, ours)]
    assert counts[0] == counts[1]


FACTORS = (1.0, float("inf"), 2.0, 0.5, float("nan"), float("inf"), 1.0)


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("options", [{"fused": True}, {"capturable": True}, {}], ids=str)
def test_infinities_as_with_torchs_fused(gpu, name, options):
    theirs, ours = Scaled(PAIRS[name][0], fused=True), Scaled(PAIRS[name][1], **options)
    for factor in FACTORS:
        theirs.step(factor)
        ours.step(factor)
    check_same_training(theirs, ours)
    assert float(ours.optimizer.state[ours.table]["step"]) == 4


def test_infinities_in_rows_as_with_torchs_sparse_adam(gpu):
    theirs = Scaled(torch.optim.SparseAdam, sparse=True)
    ours = Scaled(fastadam.torch.Adam, sparse=True, sparse_update="lazy", fused=True)
    for factor in FACTORS:
        theirs.step(factor)
        ours.step(factor)
    torch.testing.assert_close(ours.table, theirs.table, rtol=1e-5, atol=1e-6)
    assert float(ours.optimizer.state[ours.table]["step"]) == 4


@pytest.mark.parametrize("mode", ["whole", "dense", "lazy"])
def test_a_scaled_step_does_not_wait(gpu, mode):
    sparse = {} if mode == "whole" else {"sparse": True, "sparse_update": mode}
    model = Scaled(fastadam.torch.Adam, fused=True, **sparse)
    for factor in FACTORS[:3]:
        model.step(factor)
    model.optimizer.zero_grad()
    model.backward()
    with no_waiting():
        model.scaler.step(model.optimizer)
    assert float(model.optimizer.state[model.table]["step"]) == 3


def test_a_step_with_counts_on_the_gpu_does_not_wait(gpu):
    (weights, optimizer) = pair("Adam", fused=True)[1]
    for seed in range(2):
        set_gradients([(weights, optimizer)], seed)
        optimizer.step()
    set_gradients([(weights, optimizer)], 2)
    with no_waiting():
        optimizer.step()
    assert float(optimizer.state[weights[0]]["step"]) == 3


@pytest.mark.parametrize("name", PAIRS)
def test_a_graph_reads_scale_and_infinity(gpu, name):
    found = pair(name, dtype=torch.float32, lr=0.01, fused=True, capturable=True)
    (_, theirs), (weights, ours) = found
    scale, found_inf = torch.tensor(4.0, device="cuda"), torch.tensor(0.0, device="cuda")
    for optimizer in (theirs, ours):
        optimizer.grad_scale, optimizer.found_inf = scale, found_inf
    set_gradients(found, 0)
    theirs.step()
    ours.step()
    set_gradients(found, 1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ours.step()
    for round_, skip in enumerate((False, True, False, True, True, False)):
        scale.fill_(2.0**round_)
        found_inf.fill_(float(skip))
        torch.manual_seed(round_)
        for a, b in zip(found[0][0], weights, strict=True):
            a.grad.copy_(torch.randn_like(a))
            b.grad.copy_(a.grad)
        theirs.step()
        graph.replay()
    assert float(ours.state[weights[0]]["step"]) == float(theirs.state[found[0][0][0]]["step"]) == 4
    check_same(found, 1e-5)
    found_inf.fill_(0.0)
    set_gradients(found, 7)
    theirs.step()
    ours.step()
    check_same(found, 1e-5)


def test_a_scaler_in_a_graph(gpu):
    theirs = Scaled(torch.optim.Adam, fused=True)
    ours = Scaled(fastadam.torch.Adam, fused=True, capturable=True)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            ours.step()
    torch.cuda.current_stream().wait_stream(side)
    ours.optimizer.zero_grad()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ours.backward()
        ours.scaler.step(ours.optimizer)
        ours.scaler.update()
    for factor in (1.0, 1.0, 1.0, *FACTORS):
        theirs.step(factor)
    for factor in FACTORS:
        ours.factor.fill_(factor)
        graph.replay()
    check_same_training(theirs, ours)


def test_betas_that_change_with_a_rate_on_the_gpu(gpu):
    rate = torch.tensor(0.01, device="cuda")
    found = pair("Adam", lr=float(rate), capturable=True)
    found[1][1].param_groups[0]["lr"] = rate
    for seed, beta_1 in enumerate((0.9, 0.8, 0.85, 0.9)):
        set_gradients(found, seed)
        for _, optimizer in found:
            optimizer.param_groups[0]["betas"] = (beta_1, 0.999)
            optimizer.step()
    check_same(found)
