"""One decoding step at a fixed shape, made in four ways: what Python, and asking the device for sizes, cost.

    python benchmarks/steps.py                                   # the shipped base
    python benchmarks/steps.py --shape 7b --dtype bfloat16       # random weights of LLaMA's shape, for a GPU

Every row of a batch goes on from a prompt of random tokens by one greedy token a step.

eager       the model and the cache as recurse.py uses them: each step asks how long the longest row has become
static      a cache of fixed size and a mask over all of it: nothing is asked of the device, but more positions are looked at
compiled    the static step by torch.compile
graph       the static step as a captured CUDA graph: one call a step (CUDA only)

All must write the same tokens (in fp32; in bf16 a compiled step may round in other places). Prints a table, and one JSON object
(--json).
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))

from shapes import SHAPES, bytes_per_second, random_model, synchronize  # noqa: E402

import model as llama  # noqa: E402
from model import KVCache, LayerCache  # noqa: E402


@dataclass
class Config:
    shape: Literal[("shipped", *SHAPES)] = "shipped"
    base: Path = Path("checkpoints/tiny")
    """where the shape is `shipped`"""
    rows: int = 16
    prompt: int = 64
    """tokens in the cache of each row at first"""
    steps: int = 64
    """tokens that each row writes"""
    repeats: int = 5
    """of all the steps, the ways taking turns; the median counts"""
    ways: tuple[Literal["eager", "static", "compiled", "graph"], ...] = ("eager", "static", "compiled", "graph")
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "float32"
    json: bool = False
    """print a JSON object too"""


class StaticCache(KVCache):
    """Of a size that never changes. What would be asked of the device is not asked: the caller sees to it that all fits."""

    def longest(self, n_new, rows) -> int:
        return 0

    def open(self, n_tokens: int, total: int, rows: None, real: None) -> tuple[Tensor, list[LayerCache]]:
        slots = self.lengths[:, None] + torch.arange(n_tokens, device=self.lengths.device)
        mask = llama.hidden_mask(slots, self.capacity, self.keys.dtype)[:, None]
        place = torch.arange(len(slots), device=slots.device)[:, None].expand_as(slots).flatten(), slots.flatten()
        views = zip(self.keys, self.values, strict=True)
        return slots, [LayerCache(k, v, None, place, slots.shape, mask, None) for k, v in views]


class Decoding:
    """`rows` contexts, a greedy token at a time: `reset` to the prompt, `step`, and at last what was `written`."""

    def __init__(self, c: Config, model: llama.LLaMA, cache: type[KVCache]):
        device, config = model.device, model.config
        self.model, self.prompt = model, c.prompt
        self.cache = cache(config, c.rows, device=device, dtype=model.output.weight.dtype)
        self.cache.reserve(c.prompt + c.steps)
        generator = torch.Generator().manual_seed(0)
        prompt = torch.randint(3, config.vocab_size, (c.rows, c.prompt), generator=generator).to(device)
        self.first = model(prompt, cache=self.cache)[:, -1:].argmax(-1)
        self.tokens, self.count = self.first.clone(), torch.zeros(1, 1, dtype=torch.long, device=device)
        self.written = torch.zeros(c.rows, c.steps, dtype=torch.long, device=device)

    def reset(self) -> None:
        self.cache.lengths.fill_(self.prompt)
        self.tokens.copy_(self.first)
        self.count.zero_()

    def step(self) -> None:
        """In place throughout, so that a captured one can be played again."""
        self.written.scatter_(1, self.count.expand(len(self.tokens), 1), self.tokens)
        self.tokens.copy_(self.model(self.tokens, cache=self.cache).argmax(-1))
        self.count.add_(1)


def captured(decoding: Decoding) -> Callable[[], None]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # libraries choose their kernels in the first calls, which must not be captured
        for _ in range(3):
            decoding.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        decoding.step()
    return graph.replay


@torch.inference_mode()
def main(c: Config) -> None:
    device = llama.pick_device(c.device)
    dtype = llama.pick_dtype(c.dtype, device)
    if c.shape == "shipped":
        model, _ = llama.load(llama.find_folder(c.base), device=device, dtype=dtype)
        model.requires_grad_(False)
    else:
        model = random_model(c.shape, device, dtype)
    if c.prompt + c.steps > model.config.max_seq_len:
        raise llama.UserError(f"--prompt {c.prompt} and --steps {c.steps}: more than the model's {model.config.max_seq_len}")
    ways: dict[str, tuple[Decoding, Callable[[], None]]] = {}
    for way in dict.fromkeys(c.ways):
        if way == "graph" and device.type != "cuda":
            print("graph: left out, as there is no CUDA device")
            continue
        decoding = Decoding(c, model, KVCache if way == "eager" else StaticCache)
        step = decoding.step
        if way == "compiled":
            step = torch.compile(step)
        if way == "graph":
            step = captured(decoding)
        began = time.perf_counter()
        decoding.reset()
        step()
        synchronize(device)
        if way == "compiled":
            print(f"compiling took {time.perf_counter() - began:.0f} s")
        ways[way] = decoding, step
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(c.repeats):
        for way, (decoding, step) in ways.items():
            decoding.reset()
            synchronize(device)
            began = time.perf_counter()
            for _ in range(c.steps):
                step()
            synchronize(device)
            seconds[way].append(time.perf_counter() - began)
    size = sum(p.numel() for n, p in model.named_parameters() if "tok_embeddings" not in n) * dtype.itemsize
    speed = bytes_per_second(device)
    reference = next(iter(ways.values()))[0].written
    rows = []
    for way, (decoding, _) in ways.items():
        each = statistics.median(seconds[way]) / c.steps
        rows.append({
            "way": way, "ms_per_step": 1e3 * each, "over_first": statistics.median(seconds[next(iter(ways))]) / c.steps / each,
            "bandwidth": size / each / speed, "same_tokens": torch.equal(decoding.written, reference),
        })  # fmt: skip
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    print(f"{c.shape} model in {dtype} on {name}, {c.rows} rows, {c.steps} steps from {c.prompt} tokens on")
    print(f"{'':<10}{'ms a step':>10}{'faster by':>11}{'bandwidth':>11}  same tokens")
    for r in rows:
        same = "yes" if r["same_tokens"] else "NO"
        print(f"{r['way']:<10}{r['ms_per_step']:>10.3f}{r['over_first']:>11.2f}{r['bandwidth']:>11.1%}  {same}")
    if c.json:
        print(json.dumps({"shape": c.shape, "dtype": str(dtype), "device": name, "rows": c.rows, "steps": c.steps, "ways": rows}))


if __name__ == "__main__":
    config = tyro.cli(Config, description=__doc__)
    llama.run_script(lambda: main(config))
