"""GPUs and their streams as two libraries that offload see them, where there is only a host."""

from __future__ import annotations

import contextlib
import warnings

import torch
from absent import need


class OnHost:
    """A stream or an event where nothing runs at the same time."""

    def wait_stream(self, other):
        pass

    def wait(self, stream=None):
        pass

    def record_event(self):
        return self

    def synchronize(self):
        pass


class OfGpu(torch.nn.Parameter):
    """A parameter in CPU memory that says it is on a GPU."""

    is_cuda = True


def replace_streams(monkeypatch):
    empty = torch.empty
    empty_like = torch.empty_like
    monkeypatch.setattr(torch, "empty", lambda *given, pin_memory=False, **named: empty(*given, **named))
    monkeypatch.setattr(torch, "empty_like", lambda *given, pin_memory=False, **named: empty_like(*given, **named))
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    for name, value in {"Stream": OnHost, "current_stream": OnHost, "stream": contextlib.nullcontext}.items():
        monkeypatch.setattr(torch.cuda, name, value)


def torchao_offload(monkeypatch):
    """torchao's CPUOffloadOptimizer, for parameters in CPU memory in place of a GPU's."""
    need("torchao")
    from torchao.optim import cpu_offload

    replace_streams(monkeypatch)
    monkeypatch.setattr(cpu_offload, "get_available_devices", lambda: ["cpu", "cuda"])
    return cpu_offload.CPUOffloadOptimizer


def megatron_offload(monkeypatch):
    """Megatron-Core's HybridDeviceOptimizer, which offloads every `OfGpu`."""
    need("megatron")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of NVIDIA's packages that are not there
        from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer

    replace_streams(monkeypatch)
    return HybridDeviceOptimizer
