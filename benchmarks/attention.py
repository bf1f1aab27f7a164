"""Attention in training on a CPU, forward and backward: plain matrix products against torch's fused kernel, by length.

    python benchmarks/attention.py                      # heads of the shipped base, bf16
    python benchmarks/attention.py --shape 7b --dtype float32
    python benchmarks/attention.py --cached --dtype float32

The two take turns on the same tensors; the best of the repeats counts. `model.attention` goes by what this prints.

With --cached, attention to a cache in decoding: all rows in one call against a call for each row, by length of the cache. A call
takes as long as so many pairs of a query and a key do, which is what padding is weighed against (`model.LayerCache.CALL`).
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
    cached: bool = False
    """in decoding instead: 16 rows, 4 new tokens each; a length is that of the cache"""


def fused_attention(q, k, v, mask):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1])


def attend_to_cache(rows: int, new: int, size: int, shape: tuple[int, int, int], dtype: torch.dtype, by_row: bool):
    """What attends once, from the last `new` of `size` positions of each row."""
    heads, kv_heads, width = shape
    keys, values = (torch.randn(rows, kv_heads, size, width).to(dtype) for _ in range(2))
    slots = torch.arange(size - new, size).expand(rows, new)
    place = tuple(x.flatten() for x in (torch.arange(rows)[:, None].expand_as(slots), slots))
    mask = llama.hidden_mask(slots, size, dtype)
    mask, spans = (mask.flatten(0, 1)[None, None], llama.row_spans(*place)) if by_row else (mask[:, None], None)
    layer = llama.LayerCache(keys, values, None, place, slots.shape, mask, None, spans)
    q, k, v = (torch.randn(rows * new, h, width).to(dtype) for h in (heads, kv_heads, kv_heads))
    return lambda: layer(q, k, v)


def cached(c: Config) -> None:
    """A row's call costs a share of what calls for all take longer than one; a pair, of what twice the cache adds to that one."""
    dtype, (heads, kv_heads, width), rows, new = getattr(torch, c.dtype), HEADS[c.shape], 16, 4
    print(f"{c.shape} heads, {c.dtype}, {torch.get_num_threads()} threads, {rows} rows of {new} new tokens; us\n")
    print("cache  one call  twice the cache  a call for each row   a call takes as long as this many pairs")
    for n in c.lengths:
        best = [float("inf")] * 3
        sizes = ((n, False), (2 * n, False), (n, True))
        ways = [attend_to_cache(rows, new, size, (heads, kv_heads, width), dtype, by_row) for size, by_row in sizes]
        for repeat in range(30 * c.repeats):
            for i, attend in enumerate(ways):
                began = time.perf_counter()
                attend()
                if repeat:
                    best[i] = min(best[i], time.perf_counter() - began)
        together, twice, apart = best
        pairs = (apart - together) / rows / ((twice - together) / (rows * new * n))
        print(f"{n:5d}  {1e6 * together:8.0f}  {1e6 * twice:15.0f}  {1e6 * apart:19.0f}   {pairs:.0f}")


def main(c: Config) -> None:
    if c.cached:
        return cached(c)
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
