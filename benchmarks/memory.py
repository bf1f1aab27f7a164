"""What an example costs in training, by task and method: tokens, and memory that the backward pass needs.

    python benchmarks/memory.py

Re-tuning trains on one level of a problem at a time, a scratchpad on all of them in one sequence. The first table is about the
training lengths: tokens of an example, and of all the contexts of one problem. The second is about the longest context of a
problem as it grows. Memory is what autograd has kept when the forward pass is done, measured on the shipped base
(without gradient checkpointing), and for LLaMA 7B by a formula: with checkpointing each block keeps its input, layers x width
x 2 bytes a token, and one block at a time is computed again, about 2 x (10 width + 4 hidden) bytes a token in bf16.

Writes <out>/memory.json and, where matplotlib is installed, <out>/memory.png: memory against length.
"""

import json
import random
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))

import model as llama  # noqa: E402
import train  # noqa: E402
from tasks import METHODS, TASKS  # noqa: E402


@dataclass
class Config:
    """Measure all tasks and methods."""

    base: Path = Path("checkpoints/tiny")
    n: int = 200
    """examples and problems for the first table"""
    lengths: tuple[int, ...] = (5, 10, 20, 40, 60)
    """problem lengths for the second"""
    out: Path = Path("results")


def kept_bytes(model, examples: list[train.Example]) -> int:
    """Memory of the tensors that autograd keeps for the backward pass, parameters left out, each storage once."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = train.loss_sum(model, train.pack(examples, model))
    del loss
    return sum(storages.values())


def formula_7b(tokens: int) -> float:
    """Bytes of activations for LLaMA 7B (32 layers, width 4096, hidden 11008) with gradient checkpointing in bf16."""
    return tokens * (32 * 4096 * 2 + 2 * (10 * 4096 + 4 * 11008))


def main(c: Config) -> None:
    t = train.complete(train.TrainConfig(base=c.base, device="cpu", dtype="float32"))
    model, tokenizer = train.build(t)
    model.train()
    rows, longest = [], []
    for name, task in TASKS.items():
        for method in METHODS:
            rng = random.Random(f"memory-{name}")
            examples = [train.encode(task.training_context(rng, method), tokenizer) for _ in range(c.n)]
            problems = [task.sample(rng, rng.choice(task.train_lengths)) for _ in range(c.n)]

            def size(p, task=task, method=method) -> int:
                return len(train.encode(task.context(p, method), tokenizer).tokens)

            tokens = [len(e.tokens) for e in examples]
            rows.append({
                "task": name, "method": method, "example_mean": sum(tokens) / c.n, "example_max": max(tokens),
                "problem_mean": sum(size(q) for p in problems for q in task.levels(p, method)) / c.n,
                "batch_bytes": kept_bytes(model, examples[:32]),
            })  # fmt: skip
            for length in c.lengths:
                p = task.sample(rng, length)
                level = max(task.levels(p, method), key=size)
                example = train.encode(task.context(level, method), tokenizer)
                fits = len(example.tokens) <= model.config.max_seq_len
                longest.append({
                    "task": name, "method": method, "length": length, "tokens": len(example.tokens),
                    "bytes": kept_bytes(model, [example]) if fits else None, "bytes_7b": formula_7b(len(example.tokens)),
                })  # fmt: skip
    print("training lengths: tokens of an example, of a problem's contexts together; MB kept for a batch of 32 examples")
    print(f"{'':<24}{'mean':>8}{'max':>8}{'problem':>9}{'MB':>9}")
    for r in rows:
        print(
            f"{r['task']:<12}{r['method']:<12}{r['example_mean']:>8.0f}{r['example_max']:>8}{r['problem_mean']:>9.0f}"
            f"{r['batch_bytes'] / 1e6:>9.0f}"
        )
    print("\nthe longest context of one problem: tokens / MB kept / GB for 7B by the formula")
    print(f"{'':<24}" + "".join(f"{f'length {length}':>22}" for length in c.lengths))
    for name in TASKS:
        for method in METHODS:
            cells = [r for r in longest if (r["task"], r["method"]) == (name, method)]
            texts = [
                f"{r['tokens']} / {'-' if r['bytes'] is None else round(r['bytes'] / 1e6)} / {r['bytes_7b'] / 1e9:.1f}"
                for r in cells
            ]
            print(f"{name:<12}{method:<12}" + "".join(f"{text:>22}" for text in texts))
    text = json.dumps({"examples": rows, "longest": longest}, indent=1) + "\n"
    c.out.mkdir(parents=True, exist_ok=True)
    llama.write_atomically(c.out / "memory.json", lambda p: p.write_text(text))
    drawn = plot(longest, c.out / "memory.png")
    print(f"\nwritten: {c.out}/memory.json" + (f", {c.out}/memory.png" if drawn else " (no figure: matplotlib is not installed)"))


def plot(longest: list[dict], path: Path) -> bool:
    """Memory that the longest context of a problem takes, against the problem's length. False without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(TASKS), figsize=(5 * len(TASKS), 3.5), sharey=True)
    for axis, task in zip(axes, TASKS, strict=True):
        for method, marker in zip(METHODS, "sov", strict=True):
            points = [r for r in longest if (r["task"], r["method"]) == (task, method) and r["bytes"]]
            axis.plot([r["length"] for r in points], [r["bytes"] / 1e6 for r in points], marker=marker, label=method)
        axis.set(title=task, xlabel="length of the problem", ylabel="memory of its longest context (MB)", yscale="log")
        axis.grid(alpha=0.3)
        axis.legend()
    figure.tight_layout()
    llama.write_atomically(path, lambda p: figure.savefig(p, dpi=100, format="png"))
    plt.close(figure)
    return True


if __name__ == "__main__":
    main(tyro.cli(Config))
