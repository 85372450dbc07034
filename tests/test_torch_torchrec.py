"""TorchRec on the CPU: EmbeddingBagCollection with KeyedOptimizer's wrappers, which save and load states by themselves."""

from __future__ import annotations

import copy
import warnings

import pytest
from absent import need

torch = pytest.importorskip("torch")

import fastadam.torch  # noqa: E402

# Of the packages that TorchRec imports: functions of PyTorch that are to be replaced.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("rows_wait")]
SPARSE = [(False, "dense"), (True, "dense"), (True, "lazy"), (True, "deferred"), (True, "deferred_fast")]


@pytest.fixture(scope="module")
def torchrec():
    need("torchrec", "fbgemm_gpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torchrec
        import torchrec.optim.clipping
        import torchrec.optim.warmup
    return torchrec


def model_of(torchrec, sparse):
    torch.manual_seed(0)
    tables = torchrec.EmbeddingBagCollection(
        [
            torchrec.EmbeddingBagConfig(name="of_users", embedding_dim=4, num_embeddings=200, feature_names=["user"]),
            torchrec.EmbeddingBagConfig(
                name="of_items", embedding_dim=4, num_embeddings=100, feature_names=["seen", "liked"]
            ),
        ]
    )
    for bag in tables.embedding_bags.values():
        bag.sparse = sparse
    return torch.nn.ModuleDict({"tables": tables, "head": torch.nn.Linear(12, 1)})


def bags(model):
    return model["tables"].embedding_bags.values()


def loss_of(torchrec, model, step):
    """Of four users, who have none to two items of each kind."""
    generator = torch.Generator().manual_seed(step)
    lengths = torch.randint(0, 3, (12,), generator=generator)
    values = torch.randint(0, 100, (int(lengths.sum()),), generator=generator)
    features = torchrec.KeyedJaggedTensor.from_lengths_sync(["user", "seen", "liked"], values, lengths)
    return model["head"](model["tables"](features).values()).square().sum()


class Training:
    """A model, the optimizers that TorchRec wraps, and its wrapper of both."""

    def __init__(self, torchrec, sparse, make_for_tables, make, wrapped=False):
        self.torchrec, self.model = torchrec, model_of(torchrec, sparse)
        tables, self.of_tables = self.keyed("tables", make_for_tables)
        head, self.of_head = self.keyed("head", make)
        if wrapped:
            optim = torchrec.optim
            stages = [optim.warmup.WarmupStage(optim.warmup.WarmupPolicy.LINEAR, max_iters=4, value=0.1)]
            head = optim.warmup.WarmupOptimizer(head, stages, lr=0.1)
            clip = optim.clipping.GradientClipping
            head = optim.clipping.GradientClippingOptimizer(head, clip.NORM, 0.05)
        self.optimizer = torchrec.optim.keyed.CombinedOptimizer([("tables", tables), ("head", head)])

    def keyed(self, name, make):
        optim = self.torchrec.optim
        parameters = dict(optim.optimizers.in_backward_optimizer_filter(self.model[name].named_parameters()))
        wrapper = optim.keyed.KeyedOptimizerWrapper(parameters, make)
        return wrapper, wrapper._optimizer

    def train(self, steps):
        for step in steps:
            self.optimizer.zero_grad()
            loss_of(self.torchrec, self.model, step).backward()
            self.optimizer.step()
        return self

    def saved(self):
        """Copies: the wrapper gives the tensors themselves. It reads the states first, when rows still wait."""
        states = copy.deepcopy(self.optimizer.state_dict())
        return copy.deepcopy(self.model.state_dict()), states

    def initialised(self):
        """With states for `load` to write to: those of a step without gradients."""
        names = {f"tables.{name}" for name, _ in self.model["tables"].named_parameters()}
        self.optimizer.init_state(names if next(iter(bags(self.model))).sparse else None)
        return self

    def load(self, saved):
        self.model.load_state_dict(saved[0])
        self.optimizer.load_state_dict(saved[1])
        return self

    def load_states_first(self, saved):
        self.optimizer.load_state_dict(saved[1])
        self.model.load_state_dict(saved[0])
        return self


def of_fastadam(torchrec, sparse, mode, wrapped=False):
    training = Training(
        torchrec,
        sparse,
        lambda params: fastadam.torch.AdamW(params, lr=0.1, weight_decay=0.1, sparse_update=mode),
        lambda params: fastadam.torch.AdamW(params, lr=0.1, weight_decay=0.1),
        wrapped,
    )
    training.optimizer.save_param_groups(wrapped)
    for bag in bags(training.model):
        training.of_tables.attach(bag)
    return training


def assert_same(found, expected):
    if isinstance(expected, dict):
        assert list(found) == list(expected)
        for key in expected:
            assert_same(found[key], expected[key])
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected)
        for a, b in zip(found, expected, strict=True):
            assert_same(a, b)
    elif isinstance(expected, torch.Tensor):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    else:
        assert found == expected


@pytest.mark.parametrize("wrapped", [False, True], ids=["", "with warmup, clipping and groups"])
@pytest.mark.parametrize(("sparse", "mode"), SPARSE)
def test_a_collection_resumes_with_the_bits_of_the_uninterrupted_run(torchrec, sparse, mode, wrapped):
    whole = of_fastadam(torchrec, sparse, mode, wrapped).train(range(3))
    saved = whole.saved()
    expected = whole.train(range(3, 6)).saved()
    assert sum(not torch.equal(a, b) for a, b in zip(saved[0].values(), expected[0].values(), strict=True)) == 4
    resumed = of_fastadam(torchrec, sparse, mode, wrapped).initialised()
    for load in (resumed.load, resumed.load_states_first):  # into states that are new, and into those of a later step
        assert_same(load(saved).saved(), saved)
        assert_same(resumed.train(range(3, 6)).saved(), expected)


def test_states_have_the_names_of_the_parameters(torchrec):
    states = of_fastadam(torchrec, True, "lazy").train(range(1)).optimizer.state_dict()["state"]
    tables = [f"tables.embedding_bags.{name}.weight" for name in ("of_users", "of_items")]
    assert list(states) == [*tables, "head.weight", "head.bias"]
    assert {tuple(state) for state in states.values()} == {("step", "exp_avg", "exp_avg_sq")}


def test_rows_that_wait_for_the_step_of_init_state_take_it_before_the_attached_weight_is_loaded(torchrec):
    training = of_fastadam(torchrec, True, "deferred").train(range(3))
    saved = training.saved()
    resumed = of_fastadam(torchrec, True, "deferred").initialised().load(saved)
    assert_same(resumed.train(range(3, 5)).saved(), training.train(range(3, 5)).saved())


@pytest.mark.parametrize(("sparse", "mode"), SPARSE[:3])
def test_the_numbers_are_torchs(torchrec, sparse, mode):
    """The sparse gradients of this collection, made dense, are those that it has without ``sparse``."""
    theirs = Training(
        torchrec,
        mode == "lazy",
        torch.optim.SparseAdam if mode == "lazy" else torch.optim.Adam,
        lambda params: torch.optim.AdamW(params, lr=0.1),
    )
    ours = Training(
        torchrec,
        sparse,
        lambda params: fastadam.torch.Adam(params, sparse_update=mode),
        lambda params: fastadam.torch.AdamW(params, lr=0.1),
    )
    found, expected = (training.train(range(6)).saved()[0] for training in (ours, theirs))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_tables_are_stepped_in_the_backward_pass(torchrec):
    from torch.distributed.optim import _apply_optimizer_in_backward

    def trained(kind, **options):
        model = model_of(torchrec, sparse=True)
        _apply_optimizer_in_backward(kind, model["tables"].parameters(), {"lr": 0.1, **options})
        left = dict(torchrec.optim.optimizers.in_backward_optimizer_filter(model.named_parameters()))
        assert list(left) == ["head.weight", "head.bias"]
        rest = torchrec.optim.keyed.KeyedOptimizerWrapper(left, lambda params: torch.optim.Adam(params, lr=0.1))
        for step in range(5):
            rest.zero_grad()
            loss_of(torchrec, model, step).backward()
            rest.step()
        return model.state_dict()

    found = trained(fastadam.torch.Adam, sparse_update="lazy")
    torch.testing.assert_close(found, trained(torch.optim.SparseAdam), rtol=1e-4, atol=1e-5)
