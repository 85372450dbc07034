"""Attached weights of fastadam.torch: however PyTorch reads or writes one, it finds every row after all steps."""

from __future__ import annotations

import ast
import copy
import functools
import io
import multiprocessing.reduction
import pickle
from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import fastadam  # noqa: E402
import fastadam.torch  # noqa: E402
import torch.distributed.checkpoint as dcp  # noqa: E402
from torch.distributed.checkpoint.state_dict import get_model_state_dict  # noqa: E402
from torch.nn import functional  # noqa: E402
from torch.nn.utils import parametrize, prune  # noqa: E402
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402
from torch_twins import in_memory  # noqa: E402

pytestmark = pytest.mark.usefixtures("rows_wait")
ROWS, WIDTH = 200, 3
ALL = torch.arange(ROWS)


class Training:
    """An attached module that is trained, and what a dense optimizer on NumPy makes of the same gradients."""

    def __init__(self, cls=torch.nn.Embedding, mode="deferred", dtype=torch.float32, **options):
        torch.manual_seed(0)
        self.module = cls(ROWS, WIDTH, sparse=True, dtype=dtype, **options)
        self.expected = self.module.weight.detach().numpy().copy()
        self.optimizer = fastadam.torch.Adam(self.module.parameters(), lr=0.1, sparse_update=mode)
        self.optimizer.attach(self.module)
        self.dense = fastadam.Adam(0.1, epsilon=1e-8)

    def train(self, steps, look_up=None):
        for k in steps:
            ids = torch.tensor([[k % 7, 10, k % 7]])
            self.optimizer.zero_grad()
            (self.module if look_up is None else look_up)(ids).square().sum().backward()
            gradient = self.module.weight.grad
            if gradient.is_sparse:
                values, rows = gradient._values().numpy(), gradient._indices()[0].numpy()
                gradient = fastadam.IndexedSlices(values.copy(), rows.copy())
            else:
                gradient = gradient.numpy().copy()
            self.dense.apply_gradients([(gradient, self.expected)])
            self.optimizer.step()
        return self

    def requires_waiting(self):
        assert not np.array_equal(in_memory(self.module.weight), self.expected)
        return self


def is_same(found, expected):
    return torch.equal(torch.as_tensor(found, dtype=torch.as_tensor(expected).dtype), torch.as_tensor(expected))


def through_file(value, weights_only=False):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)


def through_pickle(value):
    return pickle.loads(pickle.dumps(value))


def through_checkpoint(module, path):
    dcp.save({"model": get_model_state_dict(module)}, checkpoint_id=path, no_dist=True)
    found = {"model": {"weight": torch.empty(ROWS, WIDTH)}}
    dcp.load(found, checkpoint_id=path, no_dist=True)
    return found["model"]["weight"]


def through_shared_memory(weight):
    """What a process that is sent the weight gets."""
    file = io.BytesIO()
    multiprocessing.reduction.ForkingPickler(file).dump(weight)
    return pickle.loads(file.getvalue())


def converted_by_swapping(module, dtype):
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        return copy.deepcopy(module).to(dtype).weight
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def averaged(module):
    """The average, over equal values, of a copy whose values were others."""
    model = AveragedModel(module, avg_fn=lambda average, new, count: new)
    model.n_averaged += 1
    with torch.no_grad():
        model.module.weight.zero_()
    model.update_parameters(module)
    return model.module.weight


def averaged_at_once(module):
    model = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(0.0))
    model.n_averaged += 1
    with torch.no_grad():
        model.module.weight.zero_()
    model.update_parameters(module)
    return model.module.weight


def parametrized(module):
    parametrize.register_parametrization(module, "weight", torch.nn.Identity())
    return module.weight


def pruned(module):
    prune.identity(module, "weight")
    return module.weight


def in_state(state):
    return state["weight"]


READS = {  # of a module, for which some functions need a folder
    "deepcopy": lambda m, _: copy.deepcopy(m).weight,
    "deepcopy of a model": lambda m, _: copy.deepcopy(torch.nn.Sequential(m))[0].weight,
    "deepcopy of the weight": lambda m, _: copy.deepcopy(m.weight),
    "deepcopy of a list of parameters": lambda m, _: copy.deepcopy(list(m.parameters()))[0],
    "copy": lambda m, _: copy.copy(m).weight,
    "pickle": lambda m, _: through_pickle(m).weight,
    "pickle of the weight": lambda m, _: through_pickle(m.weight),
    "shared memory": lambda m, _: through_shared_memory(m.weight),
    "share_memory": lambda m, _: copy.copy(m).share_memory().weight,
    "torch.save": lambda m, _: through_file(torch.nn.Sequential(m))[0].weight,
    "torch.save of the weight": lambda m, _: through_file(m.weight, weights_only=True),
    "state_dict": lambda m, _: in_state(m.state_dict()),
    "state_dict of a model": lambda m, _: torch.nn.Sequential(m).state_dict()["0.weight"],
    "state_dict with variables": lambda m, _: in_state(m.state_dict(keep_vars=True)),
    "deepcopy of state_dict": lambda m, _: in_state(copy.deepcopy(m.state_dict())),
    "torch.save of state_dict": lambda m, _: in_state(through_file(m.state_dict(), weights_only=True)),
    "torch.save of state_dict with variables": lambda m, _: in_state(through_file(m.state_dict(keep_vars=True))),
    "get_model_state_dict": lambda m, _: in_state(get_model_state_dict(m)),
    "dcp.save": through_checkpoint,
    "AveragedModel": lambda m, _: AveragedModel(m).module.weight,
    "update_parameters": lambda m, _: averaged(m),
    "update_parameters at once": lambda m, _: averaged_at_once(m),
    "to": lambda m, _: m.to(torch.float64).weight,
    "half": lambda m, _: copy.copy(m).half().weight,
    "to by swapping": lambda m, _: converted_by_swapping(m, torch.float64),
    "parameters_to_vector": lambda m, _: torch.nn.utils.parameters_to_vector(m.parameters()).view(ROWS, WIDTH),
    "named_parameters": lambda m, _: {name: p.clone() for name, p in m.named_parameters()}["weight"],
    "_parameters": lambda m, _: m._parameters["weight"].clone(),
    "detach": lambda m, _: m.weight.detach(),
    "data": lambda m, _: m.weight.data,
    "clone": lambda m, _: m.weight.clone(),
    "numpy": lambda m, _: m.weight.detach().numpy(),
    "numpy of data": lambda m, _: np.asarray(m.weight.data),
    "numpy of the weight": lambda m, _: np.asarray(m.weight.requires_grad_(False)),
    "dlpack": lambda m, _: torch.from_dlpack(m.weight.detach()),
    "list": lambda m, _: torch.tensor(m.weight.tolist()),
    "iteration": lambda m, _: torch.stack(list(m.weight)),
    "rows": lambda m, _: m.weight[ALL],
    "index_select": lambda m, _: torch.index_select(m.weight, 0, ALL),
    "unwrapped function": lambda m, _: torch.embedding(m.weight, ALL),
    "embedding": lambda m, _: functional.embedding(ALL, m.weight),
    "embedding of a view": lambda m, _: functional.embedding(ALL, m.weight.view(ROWS, WIDTH)),
    "embedding by name": lambda m, _: functional.embedding(input=ALL, weight=m.weight),
    "embedding_bag": lambda m, _: functional.embedding_bag(ALL[:, None], m.weight, mode="sum"),
    "tied weights": lambda m, _: (torch.eye(WIDTH) @ m.weight.T).T,
    "linear": lambda m, _: functional.linear(torch.eye(WIDTH), m.weight).T,
    "in a list": lambda m, _: torch.cat([m.weight, m.weight])[ROWS:],
    "foreach": lambda m, _: torch._foreach_mul([m.weight], 1.0)[0],
    "out": lambda m, _: torch.mul(m.weight.detach(), 1.0, out=torch.empty(ROWS, WIDTH)),
    "functional_call": lambda m, _: torch.func.functional_call(m, dict(m.named_parameters()), (ALL,)),
    "stateless": lambda m, _: torch.nn.utils.stateless._functional_call(m, dict(m.named_parameters()), (ALL,)),
    "grad of another": lambda m, _: torch.func.grad_and_value(
        lambda x: ((x @ m.weight.T).sum(), x @ m.weight.T), has_aux=True
    )(torch.eye(WIDTH))[1][1].T,
    "grad with a lookup": lambda m, _: torch.func.grad_and_value(
        lambda x: ((m(ALL) * x).sum(), m(ALL)), has_aux=True
    )(torch.ones(1))[1][1],
    "jvp": lambda m, _: torch.func.jvp(lambda x: m.weight.T @ x, (torch.eye(ROWS),), (torch.eye(ROWS),))[0].T,
    "jacrev": lambda m, _: torch.func.jacrev(lambda x: m.weight @ x)(torch.ones(WIDTH)),
    "functionalize": lambda m, _: torch.func.functionalize(m)(ALL),
    "counted": lambda m, _: _counted(m),
    "inference_mode": lambda m, _: torch.inference_mode()(m)(ALL).clone(),
    "checkpoint": lambda m, _: torch.utils.checkpoint.checkpoint(m, ALL, use_reentrant=False),
    "export": lambda m, _: torch.export.export(m, (ALL,)).module()(ALL),
    "state of an exported program": lambda m, _: torch.export.export(m, (ALL,)).state_dict["weight"],
    "storage": lambda m, _: torch.empty(0).set_(m.weight.untyped_storage()).view(ROWS, WIDTH),
    "set_": lambda m, _: torch.empty(0).set_(m.weight.detach()),
    "as_subclass": lambda m, _: m.weight.as_subclass(torch.Tensor),
    "vmap": lambda m, _: torch.func.vmap(m)(ALL),
    "vmap of vmap": lambda m, _: torch.func.vmap(torch.func.vmap(m))(ALL.view(-1, 2)).view(ROWS, WIDTH),
    "vmap in another axis": lambda m, _: torch.func.vmap(m, in_dims=1, out_dims=1)(ALL.view(-1, 2)).view(ROWS, WIDTH),
    "vmap of the weight": lambda m, _: torch.func.vmap(lambda row: row * 1)(m.weight),
    "vmap beside the weight": lambda m, _: torch.func.vmap(lambda x: m.weight.T @ x, out_dims=1)(torch.eye(ROWS)).T,
    "parametrize": lambda m, _: parametrized(m),
    "prune": lambda m, _: pruned(m),
    "from_pretrained": lambda m, _: torch.nn.Embedding.from_pretrained(m.weight).weight,
    "Parameter": lambda m, _: torch.nn.Parameter(m.weight),
    "type": lambda m, _: type(m.weight)(m.weight.data, requires_grad=False),
    "repr": lambda m, _: _printed(m.weight),
}  # fmt: skip


def _counted(module):
    with FlopCounterMode(display=False):
        return functional.linear(torch.eye(WIDTH), module.weight).T


def _printed(weight):
    torch.set_printoptions(threshold=10**6, precision=12)
    try:
        text = repr(weight)
    finally:
        torch.set_printoptions(profile="default")
    assert text.startswith("Parameter containing:\ntensor([[")
    values = text.partition("tensor(")[2].rpartition("requires_grad")[0]
    return torch.tensor(ast.literal_eval(values.rstrip(",\n ")))


@pytest.mark.filterwarnings("ignore:torch.distributed is")  # of dcp
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # of jvp
@pytest.mark.parametrize("read", READS)
def test_every_row_that_is_read_is_up_to_date(read, tmp_path):
    training = Training().train(range(12)).requires_waiting()
    training.optimizer.zero_grad()
    found = READS[read](training.module, tmp_path)
    expected = torch.as_tensor(training.expected)
    found = torch.as_tensor(found)
    assert is_same(found.detach(), expected.half() if found.dtype == torch.float16 else expected)


HELD = {  # what a program may have got from a module before it was trained
    "weight": lambda m: m.weight,
    "parameters": lambda m: next(iter(list(m.parameters()))),
    "detach": lambda m: m.weight.detach(),
    "data": lambda m: m.weight.data,
    "detach of data": lambda m: m.weight.data.detach(),
    "state_dict": lambda m: m.state_dict()["weight"],
    "tied module": lambda m: tied(m).weight,
}


def tied(module):
    head = torch.nn.Linear(WIDTH, ROWS, bias=False)
    head.weight = module.weight
    return head


READS_OF_TENSORS = {
    "clone": torch.clone,
    "add": lambda tensor: tensor + 0,
    "numpy": lambda tensor: tensor.detach().numpy(),
    "deepcopy": copy.deepcopy,
    "pickle": through_pickle,
    "torch.save": lambda tensor: through_file(tensor, weights_only=True),
    "embedding": lambda tensor: functional.embedding(ALL, tensor),
}


@pytest.mark.parametrize("read", READS_OF_TENSORS)
@pytest.mark.parametrize("held", HELD)
def test_a_tensor_that_was_there_before_the_steps_is_up_to_date_too(held, read):
    training = Training()
    tensor = HELD[held](training.module)
    training.train(range(12)).requires_waiting()
    assert is_same(READS_OF_TENSORS[read](tensor), training.expected)


@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle, through_file], ids=["deepcopy", "pickle", "torch"])
@pytest.mark.parametrize("order", ["module first", "optimizer first", "the weight first", "weight, module, optimizer"])
@pytest.mark.parametrize("mode", ["deferred", "deferred_fast"])
def test_a_module_copied_with_its_optimizer_goes_on_to_the_bit(copied, order, mode):
    training = Training(mode=mode, dtype=torch.float32).train(range(12))
    module, optimizer = training.module, training.optimizer
    parts = {
        "module first": (module, optimizer),
        "optimizer first": (optimizer, module),
        "the weight first": (module.weight, optimizer, module),
        "weight, module, optimizer": (module.weight, module, optimizer),
    }[order]
    copies = copied(parts)
    twin = Training.__new__(Training)
    twin.module = next(each for each in copies if isinstance(each, torch.nn.Module))
    twin.optimizer = next(each for each in copies if isinstance(each, fastadam.torch.Adam))
    twin.dense, twin.expected = copy.deepcopy((training.dense, training.expected))
    assert twin.optimizer.param_groups[0]["params"][0] is twin.module.weight is not module.weight
    assert twin.module.weight.grad is None
    for each in (training, twin):
        each.train(range(3, 20))
    assert np.array_equal(in_memory(twin.module.weight), in_memory(module.weight))
    assert is_same(twin.module.weight.detach(), module.weight.detach())
    if mode == "deferred":
        assert is_same(twin.module.weight.detach(), training.expected)


@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle, through_file], ids=["deepcopy", "pickle", "torch"])
def test_a_module_copied_alone_belongs_to_no_optimizer(copied):
    training = Training().train(range(12))
    other = copied(training.module)
    assert type(other.weight) is torch.nn.Parameter
    assert other.weight.requires_grad
    training.train(range(12, 15))
    assert not is_same(other.weight.detach(), training.expected)
    assert b"fastadam" not in pickle.dumps(training.module)
    assert b"fastadam" not in pickle.dumps(training.module.state_dict())


def test_attributes_of_the_weight_are_pickled_as_without_an_optimizer():
    training = Training()
    training.module.weight.tag = "words"
    assert through_pickle(training.module.weight).tag == "words"


# ---- writes ---------------------------------------------------------------------------------------------------------

VALUES = torch.linspace(-1, 1, ROWS * WIDTH).view(ROWS, WIDTH)


def set_data(module):
    module.weight.data = VALUES.clone()


def set_row(module):
    with torch.no_grad():
        module.weight[3] = 0.5


WRITES = {
    "zero_": lambda m: m.weight.detach().zero_(),
    "row": set_row,
    "row of data": lambda m: m.weight.data[150].fill_(0.5),
    "data": set_data,
    "mul_ of data": lambda m: m.weight.data.mul_(0.5),
    "init": lambda m: torch.nn.init.constant_(m.weight, 0.25),
    "out": lambda m: torch.mul(VALUES, 1.0, out=m.weight.data),
    "load_state_dict": lambda m: m.load_state_dict({"weight": VALUES}),
    "vector_to_parameters": lambda m: torch.nn.utils.vector_to_parameters(VALUES.view(-1), m.parameters()),
    "foreach": lambda m: torch._foreach_mul_([m.weight.detach()], 0.5),
}


@pytest.mark.parametrize("write", WRITES)
def test_a_write_comes_after_the_steps_that_rows_wait_for(write):
    training = Training().train(range(12)).requires_waiting()
    WRITES[write](training.module)
    twin = torch.nn.Embedding.from_pretrained(torch.from_numpy(training.expected), freeze=False)
    WRITES[write](twin)
    training.expected[:] = twin.weight.detach().numpy()
    training.train(range(12, 20)).requires_waiting()
    assert is_same(training.module.weight.detach(), training.expected)


@pytest.mark.parametrize("read", ["deepcopy", "pickle", "state_dict", "update_parameters", "embedding", "tied weights"])
@pytest.mark.parametrize("moment", ["exp_avg", "exp_avg_sq"])
def test_a_moment_that_was_written_to_while_rows_wait_is_noticed_by_reads_of_the_weight(moment, read, tmp_path):
    training = Training().train(range(12)).requires_waiting()
    dict.get(training.optimizer.state, training.module.weight)[moment].mul_(0.5)  # as if taken before rows waited
    with pytest.raises(RuntimeError, match=rf"state of .*: {moment}: written to while rows waited .*; call sync\(\)"):
        READS[read](training.module, tmp_path)


@pytest.mark.parametrize("read", ["deepcopy", "pickle", "state_dict", "update_parameters", "embedding", "tied weights"])
def test_a_moment_that_was_replaced_while_rows_wait_counts_from_here_on(read, tmp_path):
    training = Training().train(range(12)).requires_waiting()
    training.optimizer.state[training.module.weight]["exp_avg"] = torch.full((ROWS, WIDTH), 0.5)
    assert is_same(torch.as_tensor(READS[read](training.module, tmp_path)).detach(), training.expected)


# ---- what may be attached -------------------------------------------------------------------------------------------


class Shifted(torch.nn.Embedding):
    """It looks up other rows than it is given, as positional embeddings do."""

    def forward(self, ids):
        return super().forward(ids + 3)


class Normalized(torch.nn.Embedding):
    """It reads all rows."""

    def forward(self, ids):
        return functional.embedding(ids, functional.normalize(self.weight))


class ShiftedBag(torch.nn.EmbeddingBag):
    def forward(self, ids):
        return super().forward(ids + 3)


KINDS = {
    "padding_idx": (torch.nn.Embedding, {"padding_idx": 10}),
    "scale_grad_by_freq": (torch.nn.Embedding, {"scale_grad_by_freq": True}),
    "bag": (torch.nn.EmbeddingBag, {}),
    "bag with padding_idx": (torch.nn.EmbeddingBag, {"padding_idx": 10}),
    "bag of other rows": (ShiftedBag, {}),
    "other rows": (Shifted, {}),
    "all rows": (Normalized, {}),
}


@pytest.mark.parametrize(("cls", "options"), KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_kind_of_embedding_looks_up_and_is_read_up_to_date(cls, options, dtype):
    training = Training(cls, dtype=dtype, **options)
    look_up = None
    if cls is Normalized or options.get("scale_grad_by_freq"):  # which have no sparse gradients
        look_up = functools.partial(functional.embedding, weight=training.module.weight, sparse=True)
    for k in range(12):
        training.train([k], look_up)
        twin = cls(ROWS, WIDTH, dtype=dtype, **options)
        twin.load_state_dict({"weight": torch.from_numpy(training.expected)})
        ids = torch.tensor([[k % 5, 3]])
        assert is_same(training.module(ids).detach(), twin(ids).detach())
    assert is_same(copy.deepcopy(training.module).weight.detach(), training.expected)


def test_a_hook_that_changes_the_ids_is_followed():
    training = Training()
    training.module.register_forward_pre_hook(lambda _, inputs: (inputs[0] + 2,))
    training.train(range(12)).requires_waiting()
    assert is_same(training.module(torch.tensor([3])), training.expected[[5]])


def test_lookups_through_other_functions_train_to_the_bit():
    """Functions of PyTorch that look rows up in the weight, without the module."""
    for look_up in (
        lambda m: lambda ids: functional.embedding(ids, m.weight, sparse=True),
        lambda m: torch.func.vmap(m),
        lambda m: lambda ids: torch.func.functional_call(m, dict(m.named_parameters()), (ids,)),
    ):
        training = Training()
        training.train(range(12), look_up(training.module))
        assert is_same(training.module.weight.detach(), training.expected)


def in_buckets(optimizer, weight, early):
    optimizer.begin_step(early=early)
    optimizer.step_bucket([weight]).result()
    optimizer.end_step()


def overlapped(optimizer):
    fastadam.torch.overlap(optimizer).attach()
    return optimizer.step


STEPS = {
    "in buckets": lambda o, w: lambda: in_buckets(o, w, early=False),
    "in early buckets": lambda o, w: lambda: in_buckets(o, w, early=True),
    "overlapped": lambda o, w: overlapped(o),
    "with a closure": lambda o, w: lambda: o.step(lambda: functional.embedding(torch.tensor([150]), w).sum()),
}


@pytest.mark.parametrize("kind", STEPS)
def test_every_kind_of_step_reads_the_weight_as_it_is(kind):
    training = Training()
    optimizer = training.optimizer
    step = STEPS[kind](optimizer, training.module.weight)
    training.optimizer = SimpleNamespace(step=step, zero_grad=optimizer.zero_grad)
    training.train(range(12)).requires_waiting()
    assert is_same(training.module.weight.detach(), training.expected)


def test_only_the_rows_that_are_looked_up_are_brought_up_to_date():
    training = Training().train(range(12)).requires_waiting()
    before = in_memory(training.module.weight)
    training.module(torch.tensor([1]))
    after = in_memory(training.module.weight)
    assert np.flatnonzero((before != after).any(1)).tolist() == [1]


@pytest.mark.parametrize(
    "use",
    [
        lambda m, o: [p.grad for p in m.parameters()],
        lambda m, o: m.zero_grad(),
        lambda m, o: [(p.shape, p.numel(), p.dtype, p.device, p.requires_grad) for p in m.parameters()],
        lambda m, o: next(m.parameters()).is_floating_point(),
        lambda m, o: [m.weight.register_hook(lambda g: g), hash(m.weight), id(m.weight), len(m.weight), m.weight.ndim],
        lambda m, o: o.zero_grad(),
        lambda m, o: repr(m),
        lambda m, o: torch.optim.lr_scheduler.StepLR(o, 1),
        lambda m, o: m.train().eval().requires_grad_(),
    ],
)
def test_what_reads_no_values_leaves_rows_waiting(use):
    training = Training().train(range(12)).requires_waiting()
    before = in_memory(training.module.weight)
    use(training.module, training.optimizer)
    assert np.array_equal(in_memory(training.module.weight), before)


def test_wrong_ids_are_refused_by_pytorch():
    training = Training().train(range(12))
    for ids, error in ((torch.tensor([ROWS]), IndexError), (torch.tensor([0.5]), RuntimeError), ([1], TypeError)):
        with pytest.raises(error):
            training.module(ids)
    with pytest.raises(TypeError, match="input"):
        training.module()
    assert is_same(training.module(input=torch.tensor([1])), training.expected[[1]])


def test_another_optimizer_takes_the_weight_over():
    training = Training().train(range(12)).requires_waiting()
    other = fastadam.torch.Adam(training.module.parameters(), lr=0.1, sparse_update="deferred")
    other.attach(training.module)
    assert np.array_equal(in_memory(training.module.weight), training.expected)
    training.optimizer, training.dense = other, fastadam.Adam(0.1, epsilon=1e-8)
    training.train(range(12)).requires_waiting()
    assert is_same(training.module.weight.detach(), training.expected)


def test_attaching_twice_changes_nothing():
    training = Training()
    training.optimizer.attach(training.module)
    training.train(range(12)).requires_waiting()
    assert is_same(training.module.weight.detach(), training.expected)


def test_loading_leaves_modules_attached():
    training = Training().train(range(12))
    training.optimizer.load_state_dict(training.optimizer.state_dict())
    training.train(range(12, 20)).requires_waiting()
    assert is_same(training.module.weight.detach(), training.expected)


def test_the_weight_stays_a_parameter():
    module = Training().module
    assert isinstance(module.weight, torch.nn.Parameter)
    assert [name for name, _ in module.named_parameters()] == ["weight"]
    assert torch.equal(module.weight.data, module.weight.detach())
    assert not module._forward_pre_hooks


@pytest.mark.parametrize("mode", ["dense", "lazy"])
def test_where_no_row_waits_the_weight_stays_what_it_is(mode):
    module = torch.nn.Embedding(3, 2, sparse=True)
    fastadam.torch.Adam(module.parameters(), sparse_update=mode).attach(module)
    assert type(module.weight) is torch.nn.Parameter


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
    assert type(table.weight) is torch.nn.Parameter


def test_a_weight_of_another_class_is_refused():
    class Special(torch.nn.Parameter):
        pass

    module = torch.nn.Embedding(3, 2, sparse=True)
    module.weight.__class__ = Special
    with pytest.raises(TypeError, match=r"module: its weight is a Special, expected a torch\.nn\.Parameter"):
        fastadam.torch.Adam(module.parameters(), sparse_update="deferred").attach(module)


# ---- torch.compile --------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")  # of Dynamo
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("cls", [torch.nn.Embedding, torch.nn.EmbeddingBag])
def test_lookups_stay_in_one_graph_of_torch_compile(cls, backend):
    training = Training(cls)
    compiled = torch.compile(training.module, backend=backend, fullgraph=True)
    try:
        training.train(range(12), compiled).requires_waiting()
        assert is_same(compiled(torch.tensor([[1]])).view(1, -1), training.expected[[1]])
        assert not np.array_equal(in_memory(training.module.weight), training.expected)
        assert is_same(training.module.weight.detach(), training.expected)
    finally:
        torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_graph_of_torch_compile_breaks_where_all_rows_are_read(backend):
    training = Training().train(range(12)).requires_waiting()
    module = training.module

    def logits(x):
        return (x * 1) @ module.weight.T * 1

    try:
        found = torch.compile(logits, backend=backend)(torch.eye(WIDTH))
        assert is_same(found.T, training.expected)
        training.train(range(12, 20)).requires_waiting()
        torch._dynamo.reset()
        with pytest.raises(torch._dynamo.exc.Unsupported, match="function_of_all_rows_of_an_attached_weight"):
            torch.compile(logits, backend=backend, fullgraph=True)(torch.eye(WIDTH))
        torch._dynamo.reset()

        def write():
            with torch.no_grad():
                module.weight.mul_(0.5)

        torch.compile(write, backend=backend)()
        assert is_same(module.weight.detach(), training.expected * np.float32(0.5))
    finally:
        torch._dynamo.reset()
