"""skip_nonfinite of fastadam.torch: a gradient that is not finite, anywhere, changes nothing; and who can see it."""

from __future__ import annotations

import copy
import pickle

import pytest

torch = pytest.importorskip("torch")

import fastadam.torch  # noqa: E402
from test_torch_clipping import check_bits, mixed, mixed_gradients, random_gradients, split, states  # noqa: E402
from torch_twins import parameters  # noqa: E402

NAN, INF = float("nan"), float("inf")
MODES = ["dense", "lazy", "deferred", "deferred_fast"]
NORMS = [{}, {"clipvalue": 0.5}, {"clipnorm": 0.5}, {"global_clipnorm": 0.5}]


def spoil(gradient, value):
    """Put the value into the last element of a gradient of any kind."""
    if gradient.is_sparse:
        gradient = gradient._values()
    if gradient.is_complex():
        gradient = torch.view_as_real(gradient)
    gradient[(-1,) * gradient.dim()] = value


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("place", range(8))
@pytest.mark.parametrize("cuts", [(), (2, 5)], ids=str)
@pytest.mark.parametrize("mode", ["dense", "deferred"])
def test_one_element_anywhere_skips_the_whole_step(value, place, cuts, mode):
    params = mixed()
    optimizer = fastadam.torch.Adam(split(params, cuts), skip_nonfinite=True, sparse_update=mode)
    assert optimizer.last_step_skipped is False
    for step, is_bad in enumerate([True, False, True, False, False, True]):
        before = states(optimizer)
        mixed_gradients(params, step)
        if is_bad:
            spoil(params[place].grad, value)
        optimizer.step()
        assert optimizer.last_step_skipped is is_bad
        if is_bad:
            check_bits(states(optimizer), before)
    assert {float(optimizer.state[param]["step"]) for param in params} == {3.0}
    assert all(bool(param.isfinite().all()) for param in params)


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("cuts", [(), (1, 3)], ids=str)
@pytest.mark.parametrize("norms", NORMS, ids=str)
def test_a_repeated_step_is_skipped_as_well(value, cuts, norms):
    shapes = [(3,), (2, 4), (), (5, 1), (70, 90)]
    ours, theirs = parameters(*shapes, dtype=torch.float32), parameters(*shapes, dtype=torch.float32)
    tested = fastadam.torch.Adam(split(ours, cuts), lr=0.1, skip_nonfinite=True, **norms)
    plain = fastadam.torch.Adam(theirs, lr=0.1, **norms)
    for step in range(20):
        random_gradients(ours, step)
        random_gradients(theirs, step)
        is_bad = step % 4 == 2
        if is_bad:
            spoil(ours[step // 4].grad, value)
        versions = [param._version for param in ours]
        tested.step()
        assert tested.last_step_skipped is is_bad
        assert (versions == [param._version for param in ours]) is is_bad
        if not is_bad:
            plain.step()
        check_bits(states(tested), states(plain))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("norms", NORMS, ids=str)
def test_tables_go_on_as_if_a_skipped_step_had_not_been(mode, norms):
    """With rows that wait, and steps that touch nearly all of them."""
    optimizers = []
    for _ in range(2):
        table, other = parameters((40, 3), (5,), dtype=torch.float32)
        options = {"lr": 0.1, "sparse_update": mode, **norms}
        optimizers.append((fastadam.torch.Adam([table, other], skip_nonfinite=True, **options), table, other))
    for step in range(24):
        is_bad = step % 3 == 1
        for (optimizer, table, other), takes_part in zip(optimizers, (True, not is_bad), strict=True):
            if not takes_part:
                continue
            generator = torch.Generator().manual_seed(step)
            count = 200 if step % 5 == 0 else 6
            rows = torch.randint(0, 40, (1, count), generator=generator)
            values = torch.randn(count, 3, generator=generator)
            table.grad = torch.sparse_coo_tensor(rows, values, (40, 3), check_invariants=True)
            other.grad = torch.randn(5, generator=generator)
            if is_bad:
                spoil(table.grad if step % 2 else other.grad, NAN)
            optimizer.gather(table, rows[0])
            optimizer.step()
            assert optimizer.last_step_skipped is is_bad
        if step % 6 == 5:
            for optimizer, *_ in optimizers:
                optimizer.sync()
            check_bits(states(optimizers[0][0]), states(optimizers[1][0]))


def test_a_skipped_first_step_makes_no_state():
    (param,) = parameters((3,))
    optimizer = fastadam.torch.Adam([param], skip_nonfinite=True)
    for _ in range(4):
        param.grad = torch.full((3,), NAN, dtype=torch.float64)
        optimizer.step()
    assert optimizer.last_step_skipped
    assert not optimizer.state
    for _ in range(4):
        param.grad = torch.ones(3, dtype=torch.float64)
        optimizer.step()
    assert float(optimizer.state[param]["step"]) == 4
    assert not optimizer.last_step_skipped


@pytest.mark.parametrize("cuts", [(), (1,)], ids=str)
def test_a_norm_that_overflows_skips_only_if_it_is_clipped(cuts):
    for norms, is_skipped in (({}, False), ({"global_clipnorm": 1.0}, True)):
        params = parameters((3,), (4,))
        optimizer = fastadam.torch.Adam(split(params, cuts), skip_nonfinite=True, **norms)
        for _ in range(4):
            for param in params:
                param.grad = torch.full_like(param, 1.5e308)
            optimizer.step()
            assert optimizer.last_step_skipped is is_skipped
    for param in params:  # the square is infinite, the norm is not
        param.grad = torch.full_like(param, 1e200)
    optimizer.step()
    assert not optimizer.last_step_skipped
    assert all(bool(param.isfinite().all()) for param in params)


def test_step_counts_that_differ_are_joined_too():
    params = parameters((3,), (4,))
    optimizer = fastadam.torch.Adam(params, skip_nonfinite=True, clipnorm=1.0)
    params[0].grad = torch.ones(3, dtype=torch.float64)
    optimizer.step()
    for is_bad in (True, False, True, False, False, True):
        random_gradients(params, 1)
        if is_bad:
            spoil(params[1].grad, INF)
        before = states(optimizer)
        optimizer.step()
        assert optimizer.last_step_skipped is is_bad
        assert all(map(torch.equal, before, states(optimizer))) is is_bad
    assert [float(optimizer.state[param]["step"]) for param in params] == [4.0, 3.0]


def test_gradients_that_are_not_finite_are_used_unless_asked():
    (param,) = parameters((3,))
    optimizer = fastadam.torch.Adam([param])
    param.grad = torch.full((3,), NAN, dtype=torch.float64)
    optimizer.step()
    assert bool(param.isnan().all())
    assert optimizer.last_step_skipped is False


def test_a_step_that_is_refused_leaves_last_step_skipped():
    (param,) = parameters((3,))
    optimizer = fastadam.torch.Adam([param], skip_nonfinite=True)
    param.grad = torch.full((3,), NAN, dtype=torch.float64)
    optimizer.step()
    optimizer.param_groups[0]["eps"] = -1.0
    with pytest.raises(ValueError, match="eps"):
        optimizer.step()
    assert optimizer.last_step_skipped is True


# ---- who sees it ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"skip_nonfinite": True}, {"global_clipnorm": 1.0}], ids=str)
def test_what_a_scaler_finds_is_seen_with_fused(options):
    """And the gradients of a skipped step stay scaled, as with PyTorch's fused optimizers."""
    params = parameters((3,), (2, 4), dtype=torch.float32)
    optimizer = fastadam.torch.Adam(params, lr=0.1, fused=True, **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(12):
        optimizer.zero_grad()
        scaler.scale(sum((param * param).sum() for param in params)).backward()
        is_bad = step % 4 == 3
        if is_bad:
            spoil(params[0].grad, INF)
        gradients, before = [param.grad.clone() for param in params], states(optimizer)
        scaler.step(optimizer)
        scaler.update()
        assert optimizer.last_step_skipped is is_bad
        if is_bad:
            check_bits(states(optimizer), before)
            check_bits([param.grad for param in params], gradients)


def test_gradients_that_only_skip_nonfinite_finds_stay_scaled():
    """A scaler that did not look, such as one of another library."""
    (param,) = parameters((3,), dtype=torch.float32)
    optimizer = fastadam.torch.Adam([param], fused=True, skip_nonfinite=True)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(8.0), torch.tensor(0.0)
    for _ in range(5):
        param.grad = torch.tensor([8.0, NAN, 8.0])
        optimizer.step()
        assert optimizer.last_step_skipped
        assert param.grad[0] == 8.0
        param.grad = torch.tensor([8.0, 16.0, 8.0])
        optimizer.step()
        assert not optimizer.last_step_skipped
        assert param.grad[0] == 1.0


def test_a_scheduler_can_wait_for_a_step():
    (param,) = parameters((3,))
    optimizer = fastadam.torch.Adam([param], lr=1.0, skip_nonfinite=True)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    rates = []
    for value in (1.0, NAN, 1.0, INF, 1.0):
        param.grad = torch.full((3,), value, dtype=torch.float64)
        optimizer.step()
        if not optimizer.last_step_skipped:
            scheduler.step()
        rates.append(scheduler.get_last_lr()[0])
    assert rates == [0.5, 0.5, 0.25, 0.25, 0.125]


def test_a_copy_has_made_no_step():
    (param,) = parameters((3,))
    optimizer = fastadam.torch.Adam([param], skip_nonfinite=True)
    param.grad = torch.full((3,), NAN, dtype=torch.float64)
    optimizer.step()
    assert optimizer.last_step_skipped
    assert not copy.deepcopy(optimizer).last_step_skipped
    assert not pickle.loads(pickle.dumps(optimizer)).last_step_skipped


@pytest.mark.filterwarnings("ignore")  # of Dynamo
@pytest.mark.parametrize("later", [False, True])
def test_a_compiled_step_is_clipped_and_skipped(later):
    """Also with options that are set after it was compiled."""
    ours, theirs = parameters((3,), (2, 4)), parameters((3,), (2, 4))
    options = {"global_clipnorm": 0.5, "skip_nonfinite": True}
    plain = fastadam.torch.Adam(theirs, lr=0.1, **({} if later else options))
    tested = fastadam.torch.Adam(ours, lr=0.1, **({} if later else options))
    compiled = torch.compile(lambda: tested.step(), backend="eager")
    try:
        for step in range(8):
            if later and step == 3:
                for optimizer in (plain, tested):
                    for name, value in options.items():
                        setattr(optimizer, name, value)
            for params in (ours, theirs):
                random_gradients(params, step)
                if step % 4 == 3:
                    spoil(params[1].grad, NAN)
            compiled()
            plain.step()
            assert tested.last_step_skipped is plain.last_step_skipped is (step % 4 == 3)
            for a, b in zip(states(tested), states(plain), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    finally:
        torch._dynamo.reset()
