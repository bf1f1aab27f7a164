"""Fine-tuning against `transformers` with `peft`: the same weights, contexts, LoRA, optimizer, dtype, checkpointing; one table.

    python benchmarks/train.py --task addition
    python benchmarks/train.py --task addition --shape 7b       # random weights of LLaMA's shape, with the paper's preset

* the way of the paper's release: a context is one training sequence for every segment that the model writes, each with all
  that comes before it, in batches padded to the longest; logits at every place;
* the best with `transformers`: one sequence a context, groups of like length, SDPA, logits at every place;
* ours: contexts packed without padding, logits at target places alone.

Every way runs in a process of its own; on a CPU they take turns, step by step, so that what else the machine does is felt by all
of them alike. Peak memory is that of the process beyond what it had before its first step (on a GPU: all that was allocated, the
weights too); the losses of the last step say that the work is the same. Utilization is useful
floating-point operations against those of a large matrix product on the same device: 4 a parameter and token for the frozen base
(forward, and the gradient of activations), 6 for LoRA and for attention; what checkpointing computes again does not count.
Needs transformers and peft (requirements-dev.txt).
"""

import contextlib
import ctypes
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
import tyro
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))

from shapes import SHAPES, flops_of_a_product, in_transformers, random_model, synchronize  # noqa: E402

import lora  # noqa: E402
import model as llama  # noqa: E402
import train  # noqa: E402
from tasks import TASKS  # noqa: E402
from train import IGNORE, Example  # noqa: E402

WAYS = {"release": "transformers, the release's way", "best": "transformers, its best", "ours": "ours"}


@dataclass
class Config:
    """Time one task by one method."""

    task: Literal[tuple(TASKS)] = "addition"
    method: Literal["baseline", "scratchpad", "retuning"] = "retuning"
    base: Path = Path("checkpoints/tiny")
    shape: Literal[("shipped", *SHAPES)] = "shipped"
    """other than shipped: random weights, LoRA as in the paper's preset"""
    context_tokens: int = 0
    """if above 0: contexts of so many random tokens, the last quarter to be predicted, instead of the task's"""
    steps: int = 10
    batch_size: int = 32
    micro_tokens: int = 4096
    """tokens a pass, padding included"""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    gradient_checkpointing: bool = True
    json: bool = False
    """print a JSON object too"""
    way: Literal[(*WAYS, "all")] = "all"
    """one way alone prints one JSON object"""
    paced: bool = False
    """with one way: wait for a line of input before each step, and print an empty one after it"""


def split(example: Example) -> list[Example]:
    """The release's training sequences: one for each written segment, with all that comes before it."""
    starts = [i for i, label in enumerate(example.labels) if label != IGNORE and (i == 0 or example.labels[i - 1] == IGNORE)]
    sequences = []
    for start in starts:
        end = start
        while end < len(example.labels) and example.labels[end] != IGNORE:
            end += 1
        labels = [IGNORE] * start + example.labels[start:end]
        sequences.append(Example(example.tokens[:end], labels, example.positions[:end]))
    return sequences


def padded(examples: list[Example], max_tokens: int, grouped: bool) -> Iterator[list[Example]]:
    """Micro-batches by padded size; in the order given, or of like length."""
    group: list[Example] = []
    for e in sorted(examples, key=lambda e: len(e.tokens)) if grouped else examples:
        if group and (len(group) + 1) * max(len(x.tokens) for x in [*group, e]) > max_tokens:
            yield group
            group = []
        group.append(e)
    yield group


def peft_model(c: Config, theirs, folder: Path):
    """The base in transformers, and our adapter, as yet untrained, in peft: the very same A and B."""
    import peft

    if c.gradient_checkpointing:
        theirs.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        theirs.config.use_cache = False
    return peft.PeftModel.from_pretrained(theirs, folder, is_trainable=True, autocast_adapter_dtype=True).train()


def contexts(c: Config, t: train.TrainConfig, tokenizer: llama.Tokenizer, max_seq_len: int) -> list[list[Example]]:
    """Examples of each step, and of one before them to warm up."""
    if not c.context_tokens:
        return [train.Data(t, tokenizer, max_seq_len)[i] for i in range(c.steps + 1)]
    rng, n = random.Random(0), c.context_tokens

    def example() -> Example:
        tokens = rng.choices(range(3, tokenizer.vocab_size), k=n + 1)
        labels = [IGNORE if i < n * 3 // 4 else token for i, token in enumerate(tokens[1:])]
        return Example(tokens[:n], labels, [float(i) for i in range(n)])

    return [[example() for _ in range(c.batch_size)] for _ in range(c.steps + 1)]


def flops(model, config: llama.ModelConfig, examples: list[Example]) -> float:
    """Useful floating-point operations of one step (see above). Attention sees half of the square of a context."""
    adapter = sum(p.numel() for p in model.parameters() if p.requires_grad)
    base = sum(p.numel() for p in model.parameters()) - adapter - config.vocab_size * config.dim  # embeddings are looked up
    attention = 6 * 2 * config.n_layers * config.n_heads * config.head_dim
    sizes = [len(e.tokens) for e in examples]
    return (4 * base + 6 * adapter) * sum(sizes) + attention * sum(n * n / 2 for n in sizes)


def run(c: Config) -> dict:
    """One way, in this process."""
    device = llama.pick_device(c.device)
    shipped = c.shape == "shipped"
    t = train.complete(train.TrainConfig(
        task=c.task, method=c.method, base=c.base, batch_size=c.batch_size, lr=1e-3, stretch=1.0, lessons=0.0, device=device.type,
        dtype=str(llama.pick_dtype(c.dtype, device)).removeprefix("torch."), gradient_checkpointing=c.gradient_checkpointing,
    ))  # fmt: skip
    if shipped:
        model, tokenizer = llama.load(llama.find_folder(c.base), device=device)
    else:
        paper = train.PRESETS["paper"]
        t = replace(t, replay=0.0, **{k: paper[k] for k in ("rank", "alpha", "targets", "lr", "clip")})
        model, tokenizer = random_model(c.shape, device, getattr(torch, t.dtype)), llama.Tokenizer(llama.find_tokenizer(c.base))
    config, dtype = model.config, getattr(torch, t.dtype)
    steps = contexts(c, t, tokenizer, config.max_seq_len)
    theirs = in_transformers(model, tokenizer) if c.way != "ours" else None
    torch.manual_seed(0)
    lora.wrap(model, train.lora_config(t))
    if theirs is not None:
        with tempfile.TemporaryDirectory() as folder:
            lora.save_adapter(model, folder, train.lora_config(t), base=str(c.base))
            model = peft_model(c, theirs, Path(folder))
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=t.lr, weight_decay=0.0, fused=True)

    def their_loss(group: list[Example]) -> torch.Tensor:
        T = max(len(e.tokens) for e in group)
        rows = [(e.tokens + [0] * (T - len(e.tokens)), e.labels + [IGNORE] * (T - len(e.tokens))) for e in group]
        tokens, labels = (torch.tensor(x, device=device) for x in zip(*rows, strict=True))
        mask = torch.tensor([[1] * len(e.tokens) + [0] * (T - len(e.tokens)) for e in group], device=device)
        logits = model(input_ids=tokens, attention_mask=mask).logits
        return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="sum")

    def step(examples: list[Example]) -> float:
        targets, total = train.n_targets(examples), 0.0
        if c.way == "ours":
            groups = train.micro_batches(examples, c.micro_tokens)
        elif c.way == "best":
            groups = padded(examples, c.micro_tokens, grouped=True)
        else:
            groups = padded([s for e in examples for s in split(e)], c.micro_tokens, grouped=False)
        for group in groups:
            with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
                if c.way == "ours":
                    loss = train.loss_sum(model, train.pack(group, model), c.gradient_checkpointing)
                else:
                    loss = their_loss(group)
            (loss / targets).backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(parameters, t.clip)
        optimizer.step()
        optimizer.zero_grad()
        return total / targets

    product = flops_of_a_product(device, dtype)  # now: later on, another way may be at its steps
    model.train()
    ctypes.CDLL(None).malloc_trim(0)  # what loading has left behind is not the training's
    before = memory(device, peak=False)
    step(steps[0])
    synchronize(device)
    seconds = 0.0
    for examples in tqdm(steps[1:], desc=WAYS[c.way], disable=c.paced or None, leave=False):
        if c.paced:
            print(flush=True)
            sys.stdin.readline()
        began = time.perf_counter()
        loss = step(examples)
        synchronize(device)
        seconds += time.perf_counter() - began
    if c.paced:
        print(flush=True)
    peak = memory(device, peak=True) - before
    work = sum(flops(model, config, examples) for examples in steps[1:])
    return {
        "way": c.way,
        "utilization": work / seconds / product,
        "examples_per_second": c.steps * c.batch_size / seconds,
        "tokens_per_second": sum(len(e.tokens) for examples in steps[1:] for e in examples) / seconds,
        "target_tokens_per_second": sum(map(train.n_targets, steps[1:])) / seconds,
        "peak_bytes": peak,
        "final_loss": loss,
        "dtype": t.dtype,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
    }


def memory(device: torch.device, peak: bool) -> int:
    """Bytes in use now, or the most there have been."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() if peak else 0
    if peak:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def take_turns(commands: list[list[str]], n_steps: int) -> list[dict]:
    """What the commands print last, each in a process of its own: one of them at a time makes a step."""
    with contextlib.ExitStack() as stack:
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        ways = []
        for command in commands:
            way = stack.enter_context(subprocess.Popen(command, **pipes))
            stack.callback(way.kill)
            ways.append(way)
            wait(way)  # until it is loaded and warm
        for _ in tqdm(range(n_steps), disable=None, leave=False):
            for way in ways:
                time.sleep(0.3)  # idle threads of the one before may still spin
                print(file=way.stdin, flush=True)
                wait(way)
        return [json.loads(way.stdout.readline()) for way in ways]


def wait(way: subprocess.Popen) -> None:
    if way.stdout.readline() != "\n":
        raise llama.UserError(f"{' '.join(map(str, way.args))}: failed, see above")


def main(c: Config) -> None:
    if c.way != "all":
        print(json.dumps(run(c)))
        return
    flags = [a for a in sys.argv[1:] if a != "--json"]
    commands = [[sys.executable, __file__, *flags, "--way", way] for way in WAYS]
    if llama.pick_device(c.device).type == "cpu":
        results = take_turns([[*command, "--paced"] for command in commands], c.steps)
    else:  # one model at a time may be all that the memory holds
        done = [subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout for command in commands]
        results = [json.loads(text.splitlines()[-1]) for text in done]
    first = results[0]
    print(
        f"{c.task} by {c.method}, {c.shape} base, {c.batch_size} contexts a step, {first['dtype']}, {first['device']}, "
        f"{first['threads']} threads"
    )
    columns = f"{'examples/s':>11}{'tokens/s':>10}{'targets/s':>11}{'used':>7}{'peak MB':>9}{'loss':>9}"
    print(f"{'':<34}{columns}{'speed x':>16}{'memory x':>16}")
    for r in results:
        against = [(r["examples_per_second"] / x["examples_per_second"], r["peak_bytes"] / x["peak_bytes"]) for x in results[:2]]
        speed, size = (" / ".join(f"{a[i]:.2f}" for a in against) for i in (0, 1))
        print(
            f"{WAYS[r['way']]:<34}{r['examples_per_second']:>11.1f}{r['tokens_per_second']:>10.0f}"
            f"{r['target_tokens_per_second']:>11.0f}{r['utilization']:>7.1%}"
            f"{r['peak_bytes'] / 1e6:>9.0f}{r['final_loss']:>9.4f}{speed:>16}{size:>16}"
        )
    print("speed and memory: against the release's way / its best")
    if c.json:
        print(json.dumps({"task": c.task, "method": c.method, "shape": c.shape, "results": results}))


if __name__ == "__main__":
    config = tyro.cli(Config)
    llama.run_script(lambda: main(config))
