"""``telemetry=True``: what each step did to each parameter, joined over groups and sets."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import fastadam  # noqa: E402
import fastadam.torch  # noqa: E402
from torch_twins import parameters  # noqa: E402

SHAPES = ((33,), (5, 7), (), (3000,))
SUMS = 1e-6  # the promise of Telemetry


def groups_of(params, *, named=False):
    items = [(f"layer.{k}", param) for k, param in enumerate(params)] if named else params
    return [{"params": items[:2]}, {"params": items[2:], "lr": 0.1}]


def set_gradients(params, k, scale=1.0):
    generator = torch.Generator().manual_seed(k)
    for param in params:
        param.grad = (torch.randn(param.shape, generator=generator) * scale).to(param.dtype)


def rms(tensor):
    return float(tensor.double().square().mean().sqrt())


def assert_reports(report, params, before, names):
    assert isinstance(report, fastadam.Telemetry)
    assert report.names == names
    assert report.size.tolist() == [param.numel() for param in params]
    assert not report.not_finite.any()
    np.testing.assert_allclose(report.gradient_norm, [float(p.grad.double().norm()) for p in params], rtol=SUMS)
    np.testing.assert_allclose(report.parameter_rms, [rms(p.detach()) for p in params], rtol=SUMS)
    moved = [p.detach() - b for p, b in zip(params, before, strict=True)]
    same = [float((each == 0).double().mean()) for each in moved]
    np.testing.assert_allclose(report.update_rms, [rms(each) for each in moved], rtol=1e-3)  # of rounded differences
    np.testing.assert_allclose(report.unchanged, same)


@pytest.mark.parametrize(
    "options", [{}, {"global_clipnorm": 1.0}, {"skip_nonfinite": True}, {"amsgrad": True}], ids=str
)
@pytest.mark.parametrize("named", [False, True])
def test_every_step_is_measured_and_has_the_bits_of_one_that_is_not(looked_up, options, named):
    params, plain = (parameters(*SHAPES, dtype=torch.float32) for _ in range(2))
    opt = fastadam.torch.AdamW(groups_of(params, named=named), lr=0.01, telemetry=True, **options)
    reference = fastadam.torch.AdamW(groups_of(plain), lr=0.01, **options)
    names = [f"layer.{k}" for k in range(4)] if named else ["0.0", "0.1", "1.0", "1.1"]
    for k in range(6):
        before = [param.detach().clone() for param in params]
        for each in (params, plain):
            set_gradients(each, k)
        opt.step()
        reference.step()
        assert all(map(torch.equal, params, plain))
        assert_reports(opt.telemetry(), params, before, names)
    assert len(looked_up) < 2 * 2 * 6  # the last steps were repeated natively


def test_parameters_that_step_apart_are_in_the_order_of_the_groups():
    """Those with other turns or step counts, and without those that have no gradient."""
    params = parameters((4,), (4,), (4,), (4,), dtype=torch.float32)
    opt = fastadam.torch.Adam(params, lr=0.01, telemetry=True)
    set_gradients(params, 0)
    params[1].grad = None
    opt.step()
    assert opt.telemetry().names == ["0.0", "0.2", "0.3"]
    for k in range(1, 4):  # the count of params[1] differs
        set_gradients(params, k)
        before = [param.detach().clone() for param in params]
        opt.step()
        assert_reports(opt.telemetry(), params, before, ["0.0", "0.1", "0.2", "0.3"])
    opt.state[params[0]]["step"] = opt.state[params[2]]["step"]  # shared: the two step one after another
    before = [param.detach().clone() for param in params]
    opt.step()
    assert_reports(opt.telemetry(), params, before, ["0.0", "0.1", "0.2", "0.3"])


def test_of_masters_the_share_of_unchanged_copies_is_reported():
    params = parameters((3000,), dtype=torch.bfloat16)
    opt = fastadam.torch.AdamW(params, lr=1e-3, telemetry=True, master_weights=True)
    for k in range(6):
        before = params[0].detach().clone()
        set_gradients(params, k)
        opt.step()
        report = opt.telemetry()
        assert report.unchanged[0] == pytest.approx(float((params[0] == before).double().mean()))
        np.testing.assert_allclose(report.parameter_rms, [rms(opt.state[params[0]]["master"])], rtol=SUMS)
        assert 0.1 < report.unchanged[0] < 0.99


@pytest.mark.parametrize("steps", [0, 5], ids=["new", "repeated"])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("options", [{}, {"global_clipnorm": 1.0}], ids=str)
def test_a_skipped_step_reports_what_was_not_finite(steps, groups, options):
    params = parameters(*SHAPES, dtype=torch.float32)
    given = groups_of(params) if groups == 2 else params
    opt = fastadam.torch.Adam(given, lr=0.01, telemetry=True, skip_nonfinite=True, **options)
    for k in range(steps):
        set_gradients(params, k)
        opt.step()
    set_gradients(params, steps)
    params[1].grad[2, :3] = float("nan")
    params[3].grad[7] = float("inf")
    before = [param.detach().clone() for param in params]
    for _ in range(2):
        opt.step()
        assert opt.last_step_skipped
        report = opt.telemetry()
        assert report.not_finite.tolist() == [0, 3, 0, 1]
        assert not report.update_rms.any()
        assert (report.unchanged == 1).all()
        np.testing.assert_allclose(report.parameter_rms, [rms(each) for each in before], rtol=SUMS)
        assert report.gradient_norm[0] == pytest.approx(float(params[0].grad.norm()), rel=SUMS)
        assert report.total()["not_finite"] == 4
    set_gradients(params, steps + 1)
    opt.step()
    assert opt.telemetry().total()["not_finite"] == 0


def test_gradients_are_reported_without_the_scale_of_the_loss():
    params = parameters(*SHAPES, dtype=torch.float32)
    opt = fastadam.torch.Adam(params, fused=True, telemetry=True)
    set_gradients(params, 0, scale=8.0)
    opt.grad_scale, opt.found_inf = torch.tensor(8.0), torch.tensor(0.0)
    opt.step()
    np.testing.assert_allclose(
        opt.telemetry().gradient_norm, [float(p.grad.double().norm()) for p in params], rtol=SUMS
    )


def test_a_report_is_the_same_after_later_steps():
    params = parameters(*SHAPES, dtype=torch.float32)
    opt = fastadam.torch.Adam(params, telemetry=True)
    set_gradients(params, 0)
    opt.step()
    report = opt.telemetry()
    known = report.gradient_norm.copy()
    for k in range(1, 5):
        set_gradients(params, k)
        opt.step()
    assert (report.gradient_norm == known).all()
    assert (opt.telemetry().gradient_norm != known).all()


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_the_option_is_copied_and_the_report_is_not(how):
    params = parameters(*SHAPES, dtype=torch.float32)
    opt = fastadam.torch.Adam(params, telemetry=True)
    set_gradients(params, 0)
    opt.step()
    assert "telemetry" not in opt.state_dict()["param_groups"][0]
    again = copy.deepcopy(opt) if how == "deepcopy" else pickle.loads(pickle.dumps(opt))
    with pytest.raises(RuntimeError, match="no step was measured yet, expected a call of step first"):
        again.telemetry()
    copies = again.param_groups[0]["params"]
    set_gradients(copies, 1)
    again.step()
    assert again.telemetry().names == ["0.0", "0.1", "0.2", "0.3"]


def test_a_step_without_gradients_reports_nothing():
    opt = fastadam.torch.Adam(parameters(*SHAPES), telemetry=True)
    opt.step()
    assert opt.telemetry().names == []
    assert opt.telemetry().total()["gradient_norm"] == 0


@pytest.mark.filterwarnings("ignore")  # of Dynamo
def test_a_compiled_step_is_measured():
    params = parameters(*SHAPES, dtype=torch.float32)
    opt = fastadam.torch.Adam(params, telemetry=True)
    set_gradients(params, 0)
    torch.compile(lambda: opt.step(), backend="eager")()
    assert opt.telemetry().gradient_norm.all()
    torch._dynamo.reset()


# ---- refusals --------------------------------------------------------------------------------------------------------


def test_without_the_option_there_is_no_report():
    opt = fastadam.torch.Adam(parameters((2,)))
    with pytest.raises(RuntimeError, match="telemetry: the optimizer measures no steps, expected telemetry=True"):
        opt.telemetry()


@pytest.mark.parametrize("wrong", [1, None, "all"])
def test_the_option_is_a_bool(wrong):
    with pytest.raises(TypeError, match="telemetry: .*, expected a bool"):
        fastadam.torch.Adam(parameters((2,)), telemetry=wrong)


@pytest.mark.parametrize("mode", ["dense", "lazy", "deferred"])
@pytest.mark.parametrize("steps", [0, 4])
def test_sparse_gradients_are_refused_and_change_nothing(mode, steps):
    params = parameters((6, 3), (4,), dtype=torch.float32)
    named = [("words", params[0]), ("bias", params[1])]
    opt = fastadam.torch.Adam(named, telemetry=True, sparse_update=mode)
    for k in range(steps):
        set_gradients(params, k)
        opt.step()
    before = [param.detach().clone() for param in params]
    params[0].grad = torch.sparse_coo_tensor([[1, 2]], torch.ones(2, 3), (6, 3), check_invariants=True)
    params[1].grad = torch.ones(4)
    with pytest.raises(ValueError, match="telemetry: True with a sparse gradient of parameter 'words', expected dense"):
        opt.step()
    assert all(map(torch.equal, before, params))


@pytest.mark.parametrize("early", [False, True])
def test_a_step_in_buckets_is_measured(early):
    params = parameters(*SHAPES, dtype=torch.float32)
    opt = fastadam.torch.Adam(groups_of(params), lr=0.01, telemetry=True, skip_nonfinite=True, global_clipnorm=1.0)
    for k in range(5):
        set_gradients(params, k)
        if k == 3:
            params[0].grad[1] = float("nan")
        before = [param.detach().clone() for param in params]
        opt.begin_step(early=early)
        opt.step_bucket([params[2], params[0]])
        opt.end_step()
        if k == 3:
            assert opt.last_step_skipped
            assert opt.telemetry().not_finite.tolist() == [1, 0, 0, 0]
        else:
            assert_reports(opt.telemetry(), params, before, ["0.0", "0.1", "1.0", "1.1"])
