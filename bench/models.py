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


def small_gpt(width: int = 384, blocks: int = 6, words: int = 4096, context: int = 32, seed: int = 0):
    """A GPT of PyTorch, by default of 12.2 M parameters, whose call on ids returns the loss of the next ids."""
    import torch
    from torch import nn

    class Gpt(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.places = nn.Embedding(words, width), nn.Embedding(context, width)
            for table in (self.words, self.places):
                nn.init.normal_(table.weight, std=0.02)  # as GPT-2: the first loss is about log(words)
            block = nn.TransformerEncoderLayer(
                width, max(1, width // 64), 4 * width, 0.0, "gelu", batch_first=True, norm_first=True
            )
            self.blocks = nn.TransformerEncoder(block, blocks, nn.LayerNorm(width), enable_nested_tensor=False)
            self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(context))

        def forward(self, ids):
            hidden = self.words(ids) + self.places.weight
            hidden = self.blocks(hidden, mask=self.mask, is_causal=True)
            logits = (hidden @ self.words.weight.T).float()
            return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    torch.manual_seed(seed)
    return Gpt()
