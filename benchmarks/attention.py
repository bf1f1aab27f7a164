"""Attention in training on a CPU, forward and backward: plain matrix products against torch's fused kernel, by length.

    python benchmarks/attention.py                      # heads of the shipped base, bf16
    python benchmarks/attention.py --shape 7b --dtype float32

The two take turns on the same tensors; the best of the repeats counts. `model.attention` goes by what this prints.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))

import model as llama  # noqa: E402

HEADS = {"shipped": (4, 2, 64), "7b": (32, 32, 128)}  # of queries, of keys and values; their width


@dataclass
class Config:
    shape: Literal["shipped", "7b"] = "shipped"
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    lengths: tuple[int, ...] = (256, 512, 768, 1024, 1536, 2048)
    """of the contexts, in tokens"""
    tokens: int = 2048
    """in all: as many contexts of a length as fit"""
    repeats: int = 7


def fused_attention(q, k, v, mask):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1])


def main(c: Config) -> None:
    dtype, (heads, kv_heads, width) = getattr(torch, c.dtype), HEADS[c.shape]
    print(f"{c.shape} heads, {c.dtype}, {torch.get_num_threads()} threads; ms, forward and backward\n")
    print("tokens  contexts     plain     fused   plain is faster by   largest difference of a gradient")
    for n in c.lengths:
        count = max(1, c.tokens // n)
        tensors = [torch.randn(count, h, n, width).to(dtype).requires_grad_() for h in (heads, kv_heads, kv_heads)]
        mask = torch.full((n, n), float("-inf"), dtype=dtype).triu(1)
        ways = (llama.plain_attention, fused_attention)
        best, gradients = [float("inf")] * 2, [[], []]
        for repeat in range(c.repeats + 1):
            for i, attend in enumerate(ways):
                began = time.perf_counter()
                with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):  # as in training
                    loss = attend(*tensors, mask).float().square().sum()
                gradients[i] = torch.autograd.grad(loss, tensors)
                if repeat:  # the first is a warm-up
                    best[i] = min(best[i], time.perf_counter() - began)
        plain, fused = (1000 * seconds for seconds in best)
        error = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(*gradients, strict=True))
        print(f"{n:6d}  {count:8d}  {plain:8.1f}  {fused:8.1f}  {fused / plain:19.2f}   {error:.1e} of the largest")


if __name__ == "__main__":
    config = tyro.cli(Config, description=__doc__)
    llama.run_script(lambda: main(config))
