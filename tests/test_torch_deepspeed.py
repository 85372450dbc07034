"""fastadam.torch.DeepSpeedCPUAdam: DeepSpeed's arguments, states and subgroups, alone and under ZeRO-Offload."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import subprocess
import sys
import weakref

import pytest

torch = pytest.importorskip("torch")

from absent import need  # noqa: E402
from compiled import ROOT  # noqa: E402
from fastadam.torch import Adam, AdamW, DeepSpeedCPUAdam  # noqa: E402
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook  # noqa: E402

SHAPES = [(5, 3), (300,), ()]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def params(dtype=torch.float32, shapes=SHAPES):
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes]


def give_gradients(parameters, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def stepped(optimizer, steps=range(5)):
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for seed in steps:
        give_gradients(parameters, seed)
        optimizer.step()
    return parameters


def bits_of(optimizer):
    """Every value that a step can change."""
    of_params = [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]
    return of_params, copy.deepcopy([(k if isinstance(k, int) else 0, v) for k, v in optimizer.state.items()])


def check_bits(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


# ---- the rule and the state ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("adamw", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_it_has_the_bits_of_adam(adamw, amsgrad, dtype):
    options = {"lr": 0.01, "weight_decay": 0.1, "amsgrad": amsgrad}
    ours = stepped(DeepSpeedCPUAdam(params(dtype), adamw_mode=adamw, **options))
    expected = stepped(Adam(params(dtype), decoupled_weight_decay=adamw, moments="float32", **options))
    check_bits(ours, expected)


@pytest.mark.parametrize("adamw", [False, True])
def test_without_bias_correction(adamw):
    (ours,) = stepped(DeepSpeedCPUAdam(params(shapes=[(50,)]), 0.01, False, weight_decay=0.1, adamw_mode=adamw))
    (p,) = params(shapes=[(50,)])
    w, m, v = p.detach().double(), 0.0, 0.0
    for seed in range(5):
        give_gradients([p], seed)
        g = p.grad.double() + (0 if adamw else 0.1 * w)
        m, v = m + (g - m) * 0.1, v + (g * g - v) * 0.001
        w = w * (1 - 0.01 * 0.1 * adamw) - 0.01 * m / (v.sqrt() + 1e-8)
    torch.testing.assert_close(ours.detach().double(), w, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_state_is_deepspeeds(dtype, full):
    optimizer = DeepSpeedCPUAdam(params(dtype), fp32_optimizer_states=full)
    for parameter in stepped(optimizer):
        state = optimizer.state[parameter]
        assert list(state) == ["step", "exp_avg", "exp_avg_sq"]
        assert type(state["step"]) is int
        assert state["step"] == 5
        expected = torch.float32 if full else dtype
        assert {state["exp_avg"].dtype, state["exp_avg_sq"].dtype} == {expected}
    group = optimizer.param_groups[0]
    assert list(group) == ["params", "lr", "betas", "eps", "weight_decay", "bias_correction", "amsgrad"]


def test_small_second_moments_of_bfloat16_fall_in_the_mean():
    """Rounded to nearest, they would stay where large gradients have left them."""
    (p,) = params(torch.bfloat16, [(4096,)])
    optimizer = DeepSpeedCPUAdam([p], lr=0.0, fp32_optimizer_states=False)
    p.grad = torch.ones_like(p)
    optimizer.step()
    p.grad = torch.zeros_like(p)
    for _ in range(100):
        optimizer.step()
    assert optimizer.state[p]["exp_avg_sq"].float().mean() == pytest.approx(0.001 * 0.999**100, rel=0.01)


@pytest.mark.parametrize("how", ["load", "pickle", "deepcopy"])
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_it_resumes_to_the_bit(dtype, full, how):
    whole = DeepSpeedCPUAdam(params(dtype), adamw_mode=False, fp32_optimizer_states=full, weight_decay=0.1)
    stepped(whole, range(3))
    if how == "load":
        parameters = [torch.nn.Parameter(p.detach().clone()) for p in whole.param_groups[0]["params"]]
        other = DeepSpeedCPUAdam(parameters, lr=9.0, adamw_mode=False, fp32_optimizer_states=full)
        other.load_state_dict(whole.state_dict())
    else:
        other = copy.deepcopy(whole) if how == "deepcopy" else pickle.loads(pickle.dumps(whole))
    stepped(whole, range(3, 6))
    stepped(other, range(3, 6))
    check_bits(bits_of(other), bits_of(whole))


def test_it_continues_torchs_state():
    theirs = torch.optim.AdamW(params(), weight_decay=0.1)
    stepped(theirs, range(3))
    ours = DeepSpeedCPUAdam([torch.nn.Parameter(p.detach().clone()) for p in theirs.param_groups[0]["params"]])
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(stepped(ours, range(3, 6)), stepped(theirs, range(3, 6)), rtol=1e-5, atol=1e-6)
    assert {type(state["step"]) for state in ours.state.values()} == {int}


def test_it_is_freed_when_it_is_dropped():
    parameters = params()
    optimizer = DeepSpeedCPUAdam(parameters)
    stepped(optimizer)
    moment = weakref.ref(optimizer.state[parameters[0]]["exp_avg"])
    dropped = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert dropped() is None
    assert moment() is None


# ---- subgroups -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"amsgrad": True}, {"bias_correction": False}, {"adamw_mode": False}], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_steps_of_a_subgroup_are_undone_to_the_bit(dtype, options):
    optimizer = DeepSpeedCPUAdam(params(dtype, [(1000,)]), lr=0.01, weight_decay=0.1, **options)
    (p,) = optimizer.param_groups[0]["params"]
    history = []
    for seed in range(8):
        history.append(bits_of(optimizer))
        give_gradients([p], seed)
        optimizer.step_subgroup(3)
    for seed in (7, 6, 5, 4):
        give_gradients([p], seed)
        optimizer.param_groups[0]["lr"] = 5.0  # that of the step counts
        optimizer.rollback_subgroup(3)
        check_bits(bits_of(optimizer), history[seed])


def test_a_large_subgroup_keeps_one_step():
    optimizer = DeepSpeedCPUAdam(params(shapes=[(2**18 + 1,)]))
    (p,) = optimizer.param_groups[0]["params"]
    give_gradients([p], 0)
    for _ in range(2):
        optimizer.step_subgroup(0)
    optimizer.rollback_subgroup(0)
    with pytest.raises(RuntimeError, match="sub_group_id 0: nothing is kept of step 1, expected one of the last steps"):
        optimizer.rollback_subgroup(0)


def test_a_rollback_reads_memory_that_has_moved():
    """As SuperOffload's worker does: every task has a new parameter and a copy of the gradient."""
    optimizer = DeepSpeedCPUAdam(params(shapes=[(100,)]))
    (before,) = params(shapes=[(100,)])
    values = before.detach().clone()
    give_gradients([before], 0)
    for method in (optimizer.step_subgroup, optimizer.rollback_subgroup):
        parameter = torch.nn.Parameter(values.clone())
        parameter.grad = before.grad.clone()
        optimizer.param_groups[0]["params"] = [parameter]
        method(7)
        values = parameter.detach()
    check_bits(values, before.detach())


def double_gradient(optimizer, p):
    p.grad = p.grad * 2


def use_other_parameter(optimizer, p):
    other = torch.nn.Parameter(p.detach() + 100)
    other.grad = p.grad
    optimizer.param_groups[0]["params"] = [other]


def write_parameter(optimizer, p):
    p.data.add_(100)


def write_moment(optimizer, p):
    optimizer.state[0]["exp_avg"].mul_(2)


def switch_amsgrad(optimizer, p):
    optimizer.param_groups[0]["amsgrad"] = True


OTHER_GRADIENT = r"gradient of param_groups\[0\]\['params'\]\[0\]: changed since step_subgroup\(\)"
OTHER_VALUES = r"^param_groups\[0\]\['params'\]\[0\]: it or its state has changed since step_subgroup\(\)"


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (double_gradient, OTHER_GRADIENT),
        (use_other_parameter, OTHER_VALUES),
        (write_parameter, OTHER_VALUES),
        (write_moment, OTHER_VALUES),
        (switch_amsgrad, OTHER_VALUES),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_is_not_as_the_step_left_it_is_not_rolled_back(spoil, message, dtype):
    optimizer = DeepSpeedCPUAdam(params(dtype, shapes=[(100,)]))
    (p,) = optimizer.param_groups[0]["params"]
    give_gradients([p], 0)
    optimizer.step_subgroup(0)
    spoil(optimizer, p)
    after = bits_of(optimizer)
    with pytest.raises(RuntimeError, match=message):
        optimizer.rollback_subgroup(0)
    check_bits(bits_of(optimizer), after)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("factor", [1, 2])
def test_a_subgroup_is_not_rolled_back_into_another_parameter(factor, dtype):
    a, b = params(dtype, [(4,), (4,)])
    optimizer = DeepSpeedCPUAdam([a, b], lr=0.1)
    for subgroup, (p, gradient) in enumerate([(a, 1), (b, factor)]):
        a.grad = b.grad = None
        p.grad = torch.full_like(p, gradient)
        optimizer.step_subgroup(subgroup)
    after = bits_of(optimizer)
    with pytest.raises(RuntimeError, match="changed since step_subgroup"):
        optimizer.rollback_subgroup(0)
    check_bits(bits_of(optimizer), after)


def test_a_step_with_a_sparse_gradient_is_undone():
    (p,) = params(shapes=[(4, 3)])
    optimizer, before = DeepSpeedCPUAdam([p]), p.detach().clone()
    p.grad = torch.eye(4)[:, :3].to_sparse(1)
    optimizer.step_subgroup(0)
    optimizer.rollback_subgroup(0)
    check_bits(p.detach(), before)
    optimizer.step_subgroup(0)
    p.grad = p.grad * 2
    with pytest.raises(RuntimeError, match=OTHER_GRADIENT):
        optimizer.rollback_subgroup(0)


def test_what_cannot_be_rolled_back():
    optimizer = DeepSpeedCPUAdam(params(shapes=[(10,)]))
    stepped(optimizer, range(1))
    with pytest.raises(RuntimeError, match="Cannot rollback optimizer state for sub_group_id 0: it has no state"):
        optimizer.rollback_subgroup(0)
    optimizer.step_subgroup(0)
    optimizer.rollback_subgroup(0)
    with pytest.raises(RuntimeError, match="Cannot rollback sub_group_id 0: step count is 0, expected 1 or more"):
        optimizer.rollback_subgroup(0)


def test_a_subgroup_is_one_parameter():
    optimizer = DeepSpeedCPUAdam(params())
    give_gradients(optimizer.param_groups[0]["params"], 0)
    with pytest.raises(ValueError, match="step_subgroup: 3 parameters with gradients, expected one"):
        optimizer.step_subgroup(0)
    assert not optimizer.state


# ---- mistakes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": "0.1"}, "lr: str, expected a number"),
        ({"betas": 0.9}, "betas: 0.9, expected a pair"),
        ({"betas": (0.9, 1.0)}, "beta parameter at index 1"),
        ({"adamw_mode": 1}, "adamw_mode: "),
        ({"bias_correction": "no"}, "bias_correction: "),
        ({"adam_w_mode": False}, "adam_w_mode"),
    ],
    ids=str,
)
def test_wrong_options(options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        DeepSpeedCPUAdam(params(), **options)


def test_a_refused_step_changes_nothing():
    optimizer = DeepSpeedCPUAdam(params())
    parameters = stepped(optimizer, range(1))
    before = bits_of(optimizer)
    optimizer.state[parameters[-1]]["exp_avg"] = torch.zeros(7)
    with pytest.raises(ValueError, match=r"exp_avg: shape \(7,\), expected \(\)"):
        optimizer.step()
    optimizer.state[parameters[-1]]["exp_avg"] = before[1][-1][1]["exp_avg"]
    check_bits(bits_of(optimizer), before)


def test_parameters_elsewhere_are_refused():
    optimizer = DeepSpeedCPUAdam([torch.nn.Parameter(torch.ones(2, device="meta"))])
    optimizer.param_groups[0]["params"][0].grad = torch.ones(2, device="meta")
    with pytest.raises(RuntimeError, match="on meta, expected CPU memory, as with ZeRO's offload_optimizer"):
        optimizer.step()


# ---- hooks of torch ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [AdamW, DeepSpeedCPUAdam])
def test_hooks_and_profilers_see_the_step(cls):
    optimizer = cls(params())
    seen = []
    handles = [
        optimizer.register_step_pre_hook(lambda *_: seen.append("before")),
        optimizer.register_step_post_hook(lambda *_: seen.append("after")),
        register_optimizer_step_pre_hook(lambda *_: seen.append("any before")),
        register_optimizer_step_post_hook(lambda *_: seen.append("any after")),
    ]
    stepped(optimizer, range(1))
    for handle in handles:
        handle.remove()
    assert seen == ["any before", "before", "after", "any after"]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        stepped(optimizer, range(1))
    assert f"Optimizer.step#{cls.__name__}.step" in {event.key for event in profile.key_averages()}
    assert seen == ["any before", "before", "after", "any after"]


# ---- DeepSpeed -----------------------------------------------------------------------------------------------------

ENGINES = """
import os, pathlib, sys
os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", DS_ACCELERATOR="cpu")
import deepspeed, torch
from deepspeed.ops.adam import DeepSpeedCPUAdam
from deepspeed.ops.op_builder import CPUAdamBuilder
import fastadam.torch

# Both sources as one, because each includes all of PyTorch's headers, and optimized less: compiling is what takes long.
flags, sources = CPUAdamBuilder.cxx_args, CPUAdamBuilder.sources
def one_source(self):
    one = pathlib.Path(os.environ["TORCH_EXTENSIONS_DIR"], "sources.cpp")
    one.parent.mkdir(parents=True, exist_ok=True)
    one.write_text("".join(f'#include "{self.deepspeed_src_path(path)}"\\n' for path in sources(self)))
    return [os.fspath(one)]
CPUAdamBuilder.sources = one_source
CPUAdamBuilder.cxx_args = lambda self: [*flags(self), "-O1", "-g0"]
sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # it would be compiled, and gloo does without
torch.distributed.init_process_group("gloo", init_method=f"file://{sys.argv[1]}/rendezvous", rank=0, world_size=1)
deepspeed.init_distributed("gloo")


def engine(optimizer_class, stage):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4))
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "bf16": {"enabled": True},
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": stage, "offload_optimizer": {"device": "cpu"}},
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
    }
    optimizer = optimizer_class(model.parameters(), lr=0.01, weight_decay=0.1)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def train(engine, steps):
    for step in steps:
        torch.manual_seed(step)
        engine.backward(engine(torch.randn(4, 8).bfloat16()).float().square().mean())
        engine.step()


def masters(engine):
    zero = engine.optimizer
    of_stage_3 = getattr(zero, "fp32_partitioned_groups_flat", None)
    return [each.clone() for each in of_stage_3 or zero.single_partition_of_fp32_groups]


for stage in (1, 2, 3):
    ours, theirs = engine(fastadam.torch.DeepSpeedCPUAdam, stage), engine(DeepSpeedCPUAdam, stage)
    assert type(ours.basic_optimizer) is fastadam.torch.DeepSpeedCPUAdam
    start = masters(ours)
    train(ours, range(5))
    train(theirs, range(5))
    torch.testing.assert_close(masters(ours), masters(theirs), rtol=1e-5, atol=1e-6)
    assert not torch.equal(masters(ours)[0], start[0])
    ours.save_checkpoint(f"{sys.argv[1]}/{stage}")
    train(ours, range(5, 8))
    resumed = engine(fastadam.torch.DeepSpeedCPUAdam, stage)
    resumed.load_checkpoint(f"{sys.argv[1]}/{stage}")
    train(resumed, range(5, 8))
    torch.testing.assert_close(masters(resumed), masters(ours), rtol=0, atol=0)
    print("stage", stage, "is done")
"""


@pytest.mark.weekly  # test_readme_torch.py trains with the engine alone
def test_engines_of_deepspeed_train_and_resume(tmp_path):
    """ZeRO 1 to 3 with offload_optimizer, beside DeepSpeed's own optimizer, which it compiles when it is first used."""
    need("deepspeed", "ninja")
    built = {"TORCH_EXTENSIONS_DIR": os.fspath(ROOT / "build" / "tests-deepspeed"), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-W", "ignore", "-c", ENGINES, os.fspath(tmp_path)]
    found = subprocess.run(command, env={**os.environ, **built}, capture_output=True, text=True, timeout=600)
    assert found.returncode == 0, found.stderr[-3000:]
    assert found.stdout.count("is done") == 3
