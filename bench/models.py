"""Sizes of the parameters of models that people train, tensor by tensor, in the order of their modules."""

from __future__ import annotations


def resnet50() -> list[int]:
    """torchvision's: 161 tensors, 25 557 032 numbers."""
    sizes = [64 * 3 * 7 * 7, 64, 64]
    channels = 64
    for planes, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            out = 4 * planes
            sizes += [channels * planes, planes, planes, planes * planes * 9, planes, planes, planes * out, out, out]
            if block == 0:
                sizes += [channels * out, out, out]
            channels = out
    return [*sizes, 2048 * 1000, 1000]


def gpt2() -> list[int]:
    """GPT-2 124M: 148 tensors, 124 439 808 numbers."""
    width = 768
    block = [width, width, 3 * width * width, 3 * width, width * width, width]
    block += [width, width, 4 * width * width, 4 * width, 4 * width * width, width]
    return [50257 * width, 1024 * width, *block * 12, width, width]


def llama(layers: int = 8) -> list[int]:
    """The shapes of Llama 3.2 1B with fewer layers."""
    width, keys, hidden = 2048, 512, 8192
    block = [width * width, width * keys, width * keys, width * width, *[width * hidden] * 3, width, width]
    return [128256 * width, *block * layers, width]
