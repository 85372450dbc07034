"""The lines of README's table for PyTorch, its trainers and engines: each trains a layer as torch.optim.AdamW does.

More is tested in test_torch_trainers.py, test_torch_engines.py, test_torch_apart.py and test_torch_deepspeed.py.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from types import SimpleNamespace

import fastadam
import numpy as np
import pytest
from absent import need
from readme_lines import GUIDE, line, slow, written

torch = pytest.importorskip("torch")
from gloo_processes import needs_gloo, run_in_two_processes  # noqa: E402
from on_host import OfGpu, megatron_offload, torchao_offload  # noqa: E402

# ---- PyTorch ---------------------------------------------------------------------------------------------------------


def network():
    torch.manual_seed(0)
    return torch.nn.Linear(8, 512)  # torchao offloads tensors of 4096 elements or more


def losses(model, count=3):
    for number in range(count):
        generator = torch.Generator().manual_seed(number)
        yield model(torch.randn(6, 8, generator=generator)).square().mean()


def train(model, opt, step=None):
    for loss in losses(model):
        opt.zero_grad()
        loss.backward()
        (step or opt.step)()


def assert_as_torch(model, opt, **options):
    """The optimizer, or the one that it wraps, is fastadam's and has made the three steps of torch's."""
    assert type(getattr(opt, "optimizer", opt)) is fastadam.torch.AdamW
    twin = network()
    train(twin, torch.optim.AdamW(twin.parameters(), lr=1e-3, **options))
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        whole = a.full_tensor() if hasattr(a, "full_tensor") else a
        torch.testing.assert_close(whole.detach(), b.detach(), rtol=1e-5, atol=1e-7)


def test_torch():
    model = network()
    opt = written("PyTorch", model=model)
    train(model, opt)
    assert_as_torch(model, opt)


@pytest.mark.filterwarnings("ignore")  # of Dynamo
def test_torch_compile():
    model = network()
    opt = written("PyTorch", model=model)
    inductor = torch.compile
    torch.compile = lambda function: inductor(function, backend="aot_eager")  # which calls no C++ compiler
    try:
        step = written("PyTorch, `torch.compile`", torch=torch, opt=opt)
        train(model, opt, step)
    finally:
        torch.compile = inductor
        torch._dynamo.reset()
    assert_as_torch(model, opt)


def sharded(_folder):
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model = network()
    opt = written("PyTorch, FSDP2", model=model, fully_shard=fully_shard)
    train(model, opt)
    assert_as_torch(model, opt)
    model = network()
    opt = written("PyTorch, ZeRO", model=model, ZeroRedundancyOptimizer=ZeroRedundancyOptimizer)
    train(model, opt)
    assert_as_torch(model, opt.optim)


@slow
@needs_gloo
def test_torch_in_two_processes(tmp_path):
    run_in_two_processes((sharded,), tmp_path)


# ---- trainers and engines --------------------------------------------------------------------------------------------


@slow
@pytest.mark.filterwarnings("ignore")  # of the trainer
@pytest.mark.parametrize("given", ["class", "optimizer"])
def test_hugging_face(given, tmp_path):
    transformers = pytest.importorskip("transformers")
    need("accelerate")

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = network()

        def forward(self, number):
            return {"loss": list(losses(self.inner))[int(number)]}

    model = Model()
    named = {
        "Trainer": transformers.Trainer,
        "model": model,
        "data": [{"number": number} for number in range(3)],
        "args": transformers.TrainingArguments(
            tmp_path,
            max_steps=3,
            per_device_train_batch_size=1,
            train_sampling_strategy="sequential",
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
        ),
    }
    if given == "class":
        trainer = written("Hugging Face Trainer", **named)
    else:
        opt = written("PyTorch", model=model)
        scheduler = torch.optim.lr_scheduler.ConstantLR(opt, factor=1.0)
        trainer = written("Hugging Face Trainer, your own scheduler", opt=opt, scheduler=scheduler, **named)
    trainer.train()
    assert_as_torch(model.inner, trainer.optimizer, weight_decay=trainer.optimizer.param_groups[0]["weight_decay"])


@pytest.mark.filterwarnings("ignore")
def test_accelerate():
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    model, opt = written("Accelerate", model=network(), accelerator=accelerate.Accelerator(cpu=True))
    train(model, opt)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    assert_as_torch(model, opt)


@slow
@pytest.mark.filterwarnings("ignore")
def test_lightning():
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.inner = network()

        def training_step(self, number, _):
            return list(losses(self.inner))[int(number)]

        def configure_optimizers(self):
            return written("Lightning, in `configure_optimizers`", self=self)

    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(accelerator="cpu", max_epochs=1, enable_checkpointing=False, **quiet)
    module = Module()
    trainer.fit(module, [0, 1, 2])
    assert_as_torch(module.inner, trainer.optimizers[0])


def test_skorch():
    skorch = pytest.importorskip("skorch")

    class Module(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = torch.nn.Linear(4, 2)

        def forward(self, x):
            return self.inner(x).softmax(-1)

    net = written("skorch", Module=Module, NeuralNetClassifier=skorch.NeuralNetClassifier)
    x = np.random.default_rng(0).uniform(-1, 1, (40, 4)).astype(np.float32)
    net.set_params(verbose=0, max_epochs=30, lr=0.1).fit(x, (x.sum(1) > 0).astype(np.int64))
    assert type(net.optimizer_) is fastadam.torch.AdamW
    assert net.score(x, x.sum(1) > 0) > 0.9


DEEPSPEED = """
import os, sys
os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", DS_ACCELERATOR="cpu")
import deepspeed, fastadam, torch

sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # it would be compiled, and gloo does without
torch.distributed.init_process_group("gloo", init_method=f"file://{{sys.argv[1]}}/rendezvous", rank=0, world_size=1)
deepspeed.init_distributed("gloo")
torch.manual_seed(0)
model = torch.nn.Linear(8, 1)
config = {{
    "train_micro_batch_size_per_gpu": 4,
    "bf16": {{"enabled": True}},
    "zero_optimization": {{"stage": 2, "offload_optimizer": {{"device": "cpu"}}}},
    {settings}
}}
{line}
assert type(engine.basic_optimizer) is fastadam.torch.DeepSpeedCPUAdam
before = [p.clone() for p in model.parameters()]
engine.backward(engine(torch.ones(4, 8).bfloat16()).float().square().mean())
engine.step()
assert all(not torch.equal(a, b) for a, b in zip(model.parameters(), before))
"""


@slow
def test_deepspeed(tmp_path):
    """With the settings that the guide names."""
    need("deepspeed", "ninja")
    settings = ", ".join(re.findall(r'`("zero_\w+": (?:true|false))`', GUIDE))
    assert settings.count(":") == 2
    settings = settings.replace("true", "True").replace("false", "False")
    code = DEEPSPEED.format(line=line("DeepSpeed, ZeRO-Offload"), settings=settings)
    command = [sys.executable, "-W", "ignore", "-c", code, os.fspath(tmp_path)]
    found = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert found.returncode == 0, found.stderr[-3000:]


def test_torchao(monkeypatch):
    kind, model = torchao_offload(monkeypatch), network()
    opt = written("torchao", model=model, CPUOffloadOptimizer=kind)
    train(model, opt)
    assert_as_torch(model, next(iter(opt.optim_dict.values())))


@slow
def test_megatron(monkeypatch):
    """The optimizer that Megatron-Core makes of its settings, without the wrapper that needs a GPU."""
    megatron_offload(monkeypatch)
    import megatron.core.optimizer as library

    monkeypatch.setattr(library, "CPUAdam", library.CPUAdam)  # which puts it back
    monkeypatch.setattr(library, "FP32Optimizer", lambda optimizer, *_: optimizer)
    written("Megatron-Core with `optimizer_cpu_offload`", megatron=sys.modules["megatron"])
    options = {"optimizer_cpu_offload": True, "optimizer_offload_fraction": 1.0}
    config = library.OptimizerConfig(optimizer="adam", lr=1e-3, weight_decay=0.01, **options)
    model = network()
    model.weight, model.bias = (OfGpu(p.detach()) for p in model.parameters())
    opt = library._get_megatron_optimizer_based_on_param_groups(
        config=config,
        model_chunks=[],
        param_groups=[{"params": list(model.parameters())}],
        pg_collection=SimpleNamespace(tp=None),
    )
    train(model, opt)
    assert_as_torch(model, opt.sub_optimizers[0])


@slow
@pytest.mark.filterwarnings("ignore")  # of the packages that it imports
def test_torchrec():
    need("torchrec", "fbgemm_gpu")
    from torchrec.optim.keyed import KeyedOptimizerWrapper
    from torchrec.optim.optimizers import in_backward_optimizer_filter

    model = network()
    names = {
        "KeyedOptimizerWrapper": KeyedOptimizerWrapper,
        "in_backward_optimizer_filter": in_backward_optimizer_filter,
    }
    opt = written("TorchRec, unsharded", model=model, **names)
    train(model, opt)
    assert_as_torch(model, opt._optimizer)
