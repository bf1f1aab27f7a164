"""Load a checkpoint of the shape of LLaMA 7B with random weights: how long, and how much memory it takes at its peak.

    python benchmarks/load.py make /tmp/random-7b --tokenizer tokenizer.model
    python benchmarks/load.py measure /tmp/random-7b

`make` writes 13.5 GB in bf16, in shards with an index. `measure` loads it in bf16 on the CPU, then decodes a few tokens of a
recursive addition (noise: the weights are random) and prints one JSON object.
"""

import json
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))

import model as llama  # noqa: E402
from recurse import Decoder, Engine, Limits  # noqa: E402
from tasks import Addition  # noqa: E402


@dataclass
class Config:
    """Make a random checkpoint of 7B shape, or measure how it loads."""

    action: Annotated[Literal["make", "measure"], tyro.conf.Positional]
    folder: Annotated[Path, tyro.conf.Positional]
    tokenizer: Path = Path("checkpoints/tiny/tokenizer.model")
    """for `make`; its vocabulary is the model's (LLaMA's own has 32,000 pieces)"""
    layers: int = 32
    tokens: int = 8
    """for `measure`: how many to decode"""


def make(c: Config) -> None:
    tokenizer = llama.Tokenizer(c.tokenizer)
    config = llama.ModelConfig(tokenizer.vocab_size, 4096, c.layers, 32, 32, 128, 11008, norm_eps=1e-6)
    with torch.device("meta"):
        names = {llama.hf_name(n): p.shape for n, p in llama.LLaMA(config).named_parameters()}
    c.folder.mkdir(parents=True)
    (c.folder / "tokenizer.model").write_bytes(tokenizer.sp.serialized_model_proto())
    generator, where, shard, size = torch.Generator().manual_seed(0), {}, {}, 0
    for i, (name, shape) in enumerate(names.items()):
        std = 1.0 if len(shape) == 1 else shape[1] ** -0.5
        shard[name] = torch.randn(shape, generator=generator).mul_(std).bfloat16()
        size += shard[name].nbytes
        if size > 10**9 or i == len(names) - 1:
            file = f"model-{len(set(where.values())) + 1:05}.safetensors"
            llama.save_file(shard, c.folder / file, metadata={"format": "pt"})
            where |= dict.fromkeys(shard, file)
            shard, size = {}, 0
    (c.folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    (c.folder / "config.json").write_text(json.dumps(llama.config_to_hf(config, tokenizer, torch.bfloat16)))


class PeakMemory(threading.Thread):
    """Watches this process's private memory (RssAnon): pages of the mapped files are not its own, and can be dropped."""

    def __init__(self):
        super().__init__(daemon=True)
        self.peak, self.stopped = 0, threading.Event()

    @staticmethod
    def now() -> int:
        status = Path("/proc/self/status").read_text()
        return int(status.partition("RssAnon:")[2].split()[0]) * 1024

    def run(self) -> None:
        while not self.stopped.wait(0.02):
            self.peak = max(self.peak, self.now())


def measure(c: Config) -> None:
    before = PeakMemory.now()
    watch = PeakMemory()
    watch.start()
    began = time.monotonic()
    model, tokenizer = llama.load(c.folder, dtype=torch.bfloat16)
    seconds = time.monotonic() - began
    peak, size = watch.peak - before, sum(p.nbytes for p in model.parameters())
    began = time.monotonic()
    decoder = Decoder(Engine(model), tokenizer, Limits(max_tokens=c.tokens, batch=1))
    (result,) = decoder.solve([Addition.prompt(Addition.problem("12", "39"), "retuning")])
    decoding = time.monotonic() - began
    watch.stopped.set()
    report = {
        "parameters": sum(p.numel() for p in model.parameters()), "model_gb": round(size / 1e9, 3),
        "load_seconds": round(seconds, 1), "load_peak_private_gb": round(peak / 1e9, 3), "peak_ratio": round(peak / size, 3),
        "tokens": result.counts.tokens_generated, "decode_seconds": round(decoding, 1), "ending": result.ending,
        "peak_private_with_decoding_gb": round((watch.peak - before) / 1e9, 3),
    }  # fmt: skip
    print(json.dumps(report))


if __name__ == "__main__":
    config = tyro.cli(Config)
    llama.run_script(lambda: make(config) if config.action == "make" else measure(config))
