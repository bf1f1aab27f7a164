"""Evaluate adapters by problem length, above all out of distribution.

    python eval.py --ood
    torchrun --nproc-per-node 2 -- eval.py --ood     # on two GPUs: half of the problems each

One loop and one decoding policy (greedy, the call-stack decoder of recurse.py) for all methods, which are asked the same
problems. The task parses and judges. Prints a table, and writes <out>/ood.json and <out>/ood.png.
"""

import hashlib
import json
import math
import os
import random
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from datetime import timedelta
from pathlib import Path
from typing import Literal

import torch
import tyro
from torch import distributed
from tqdm import tqdm

import lora
import model as llama
from model import UserError
from recurse import Counts, Decoder, Engine, Limits, bounds, cache_bytes, load_solver
from tasks import METHODS, TASKS


@dataclass
class EvalConfig:
    """Evaluate the newest adapter of each task and method (under runs/, else the shipped one)."""

    ood: bool = False
    """out of distribution: lengths beyond training, and the far end of the training lengths for comparison"""
    task: Literal[tuple(TASKS)] | None = None
    """one task only"""
    method: Literal["baseline", "scratchpad", "retuning"] | None = None
    """one method only"""
    lengths: tuple[int, ...] = ()
    """lengths of the problems (default: the task's own list)"""
    n: int = 50
    """problems per length"""
    seed: int = 0
    """of the problems, which are drawn from those held out of training"""
    problems: Path | None = None
    """your own problems instead: one JSON object a line, {"task": "addition", "a": "73199", "b": "21439"}"""
    out: Path = Path("results")
    """folder for the results"""
    runs: Path = Path("runs")
    """folder with the adapters that train.py made"""
    adapter: Path | None = None
    """folder of one adapter (with --task and --method)"""
    base: Path | None = None
    """folder of the base model (default: the one that an adapter was trained on)"""
    kv_budget: float | None = None
    """GiB for keys and values, of all processes of a CPU; a suspended context that does not fit is encoded again (default: by the
    free memory)"""
    batch: int = Limits.batch
    """contexts at once"""
    share: bool = True
    """solve a subproblem that several problems have once"""
    processes: int = 0
    """that share the problems out on a CPU (default: one a core, where there is enough to do; for GPUs there is torchrun)"""
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"


@dataclass
class Cell:
    """One task, method, adapter and length, and its problems."""

    task: str
    method: str
    adapter: Path
    length: int
    problems: list

    @property
    def key(self) -> str:
        """Names the work, so that an interrupted evaluation finds what is done: a changed adapter or problem is other work."""
        digest = hashlib.sha256((self.adapter / "adapter_model.safetensors").read_bytes())
        digest.update("\n".join(TASKS[self.task].prompt(p, self.method) for p in self.problems).encode())
        return f"{self.task}-{self.method}-{self.length}-{digest.hexdigest()[:16]}"


def wilson(correct: int, n: int) -> tuple[float, float]:
    """95 % interval of a proportion (Wilson 1927)."""
    z, p = 1.959964, correct / n
    centre = p + z * z / (2 * n)
    spread = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, (centre - spread) / (1 + z * z / n)), min(1.0, (centre + spread) / (1 + z * z / n))


# --- what is to be evaluated -------------------------------------------------------------------------------------


def own_problems(path: Path) -> dict[tuple[str, int], list]:
    """Problems of a JSON-lines file by task and length."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected JSON lines with problems")
    found: dict[tuple[str, int], list] = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as e:
        raise UserError(f"{path}: not UTF-8 text ({e})") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
            if not isinstance(fields, dict) or not isinstance(fields.get("task"), str) or fields["task"] not in TASKS:
                raise UserError(f'expected an object with "task" one of {", ".join(TASKS)}, found {line[:60]}')
            problem = TASKS[fields["task"]].from_json(fields)
        except KeyError as e:
            raise UserError(f"{path}, line {number}: the field {e} is missing") from None
        except (ValueError, RecursionError) as e:  # of json, or a UserError
            raise UserError(f"{path}, line {number}: {e}") from None
        found.setdefault((fields["task"], problem.length), []).append(problem)
    if not found:
        raise UserError(f"{path}: no problems in it")
    return found


def find_adapters(c: EvalConfig) -> list[tuple[str, str, Path]]:
    """(task, method, folder) of all adapters that there are, within the choice made by the flags."""
    if c.adapter:
        if not (c.task and c.method):
            raise UserError("--adapter needs --task and --method, which the folder does not tell")
        return [(c.task, c.method, c.adapter)]
    found, missing = [], None
    for task in [c.task] if c.task else TASKS:
        for method in [c.method] if c.method else METHODS:
            try:
                found.append((task, method, lora.find_adapter(task, method, c.runs)))
            except UserError as e:
                missing = e
    if not found and missing:
        raise missing
    return found


def draw(task: str, length: int, rng: random.Random, n: int) -> list:
    """n different problems, held out from training; fewer where there are not so many (of short lists, above all)."""
    problems: dict = {}  # in the order drawn
    for _ in range(20 * n):
        if len(problems) < n:
            problems[TASKS[task].sample(rng, length)] = None
    return list(problems)


def cells(c: EvalConfig) -> list[Cell]:
    found = find_adapters(c)
    if c.problems:
        groups = own_problems(c.problems)
    else:
        groups = {}
        for task in {task: None for task, _, _ in found}:
            for length in c.lengths or (TASKS[task].ood_lengths if c.ood else TASKS[task].train_lengths):
                rng = random.Random(f"eval-{c.seed}-{task}-{length}")  # the same problems for all methods
                groups[task, length] = draw(task, length, rng, c.n)
    for task, _ in groups:
        if task not in {t for t, _, _ in found}:
            raise UserError(f"there is no adapter for {task}; make one with: python train.py --task {task}")
    return [Cell(t, m, a, length, p) for t, m, a in found for (task, length), p in sorted(groups.items()) if task == t]


# --- the evaluation ----------------------------------------------------------------------------------------------


class Partial:
    """What is done so far, a line a problem, so that an interrupted evaluation goes on where it stopped.

    Every process writes to a file of its own, and reads them all when it starts.
    """

    def __init__(self, folder: Path, name: str):
        self.paths, self.done = lambda: sorted(folder.glob(f"{name}.*.partial.jsonl")), {}
        rank, size = llama.processes()
        path = folder / f"{name}.{rank}.partial.jsonl"
        own = {}
        for p in self.paths():
            for line in p.read_text().splitlines():
                try:
                    r = json.loads(line)
                except ValueError:
                    break  # cut off while it was written
                self.done[r["cell"], r["index"]] = r
                if p == path:
                    own[r["cell"], r["index"]] = r
        if size > 1:
            distributed.barrier()  # before any of the files is written again
        llama.write_atomically(path, lambda p: p.write_text("".join(json.dumps(r) + "\n" for r in own.values())))
        self.file = path.open("a")

    def waiting(self, cell: Cell, key: str) -> list[int]:
        """Indices of the problems of a cell that this process is to solve."""
        rank, size = llama.processes()
        return [i for i in range(len(cell.problems)) if (key, i) not in self.done][rank::size]

    def add(self, record: dict) -> None:
        self.done[record["cell"], record["index"]] = record
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()

    def remove(self) -> None:
        self.file.close()
        for path in self.paths():
            path.unlink()


def run_cell(cell: Cell, key: str, waiting: list[int], decoder: Decoder, partial: Partial) -> Iterator[dict]:
    """Decode the problems of a cell with these indices; yields a record a problem."""
    task = TASKS[cell.task]
    before = time.monotonic()
    for result in decoder.solve([task.prompt(cell.problems[i], cell.method) for i in waiting]):
        index, now = waiting[result.index], time.monotonic()
        record = {
            "cell": key,
            "index": index,
            "correct": result.ending == "answer" and task.judge(cell.problems[index], result.text, cell.method),
            "ending": result.ending,
            **asdict(result.counts),
            "peak_cache_bytes": decoder.peak_bytes,
            "seconds": now - before,  # since the one before: they sum up to the cell's
        }
        before = now
        partial.add(record)
        yield record


def summary(cell: Cell, records: list[dict]) -> dict:
    n, correct = len(records), sum(r["correct"] for r in records)
    return {
        "task": cell.task,
        "method": cell.method,
        "adapter": str(cell.adapter),
        "length": cell.length,
        "n": n,
        "correct": correct,
        "accuracy": correct / n,
        "ci95": [round(x, 4) for x in wilson(correct, n)],
        "endings": dict(Counter(r["ending"] for r in records)),
        **{f.name: sum(r[f.name] for r in records) for f in fields(Counts)},
        "peak_cache_bytes": max(r["peak_cache_bytes"] for r in records),
        "seconds": round(sum(r["seconds"] for r in records), 2),
    }


def evaluate(c: EvalConfig, todo: list[Cell], partial: Partial) -> list[dict]:
    """A summary of each cell, in all processes; each decodes its share of every cell, so that all have about as much to do."""
    device = llama.pick_device(c.device)
    dtype = llama.pick_dtype(c.dtype, device)
    rank, size = llama.processes()
    memory = cache_bytes(c.kv_budget, device) // (size if device.type == "cpu" else 1)
    keys = [cell.key for cell in todo]
    waiting = [partial.waiting(cell, key) for cell, key in zip(todo, keys, strict=True)]
    loaded, engine = None, None
    bar = tqdm(total=sum(map(len, waiting)), unit="problem", disable=True if rank else None)
    for cell, key, indices in zip(todo, keys, waiting, strict=True):
        if not indices:
            continue
        if loaded != cell.adapter:
            model, tokenizer = load_solver(cell.adapter, c.base, device, dtype)
            engine, loaded = Engine(model), cell.adapter
        limits = bounds(TASKS[cell.task], cell.problems, cell.method, tokenizer)
        limits = Limits(cache_bytes=memory, batch=c.batch, share=c.share, **limits)
        right, count, began = 0, 0, time.monotonic()
        for record in run_cell(cell, key, indices, Decoder(engine, tokenizer, limits), partial):
            right, count = right + record["correct"], count + 1
            bar.set_description(f"{cell.task} {cell.method} {cell.length}: {right}/{count} right")
            bar.update()
        if bar.disable and rank == 0:
            share = f" (a share of 1 in {size})" if size > 1 else ""
            seconds = time.monotonic() - began
            print(f"{cell.task} {cell.method} length {cell.length}{share}: {right}/{count} right, {seconds:.0f} s", flush=True)
    bar.close()
    if size > 1:
        shares: list = [None] * size
        distributed.all_gather_object(shares, partial.done)
        partial.done = {place: record for share in shares for place, record in share.items()}
    return [
        summary(cell, [partial.done[key, i] for i in range(len(cell.problems))]) for cell, key in zip(todo, keys, strict=True)
    ]


# --- the report --------------------------------------------------------------------------------------------------


def table(results: list[dict]) -> str:
    """Accuracy and its 95 % interval, in per cent, by length and method."""
    lines = []
    for task in dict.fromkeys(r["task"] for r in results):
        methods = [m for m in METHODS if any(r["task"] == task and r["method"] == m for r in results)]
        lines += ["", f"{task}, trained on lengths {TASKS[task].train_lengths[0]} to {TASKS[task].train_lengths[-1]}"]
        lines += ["length " + "".join(f"{m:>20}" for m in methods) + "      n"]
        for length in sorted({r["length"] for r in results if r["task"] == task}):
            row = {r["method"]: r for r in results if r["task"] == task and r["length"] == length}
            texts = []
            for m in methods:
                low, high = (100 * x for x in row[m]["ci95"])
                texts.append(f"{100 * row[m]['accuracy']:.1f} ({low:.1f}-{high:.1f})")
            lines.append(f"{length:<7}" + "".join(f"{t:>20}" for t in texts) + f"{next(iter(row.values()))['n']:>7}")
    return "\n".join(lines)


def reach(results: list[dict]) -> list[dict]:
    """How far each method gets: the longest length up to which all that were evaluated are at 90 % or more (None: none), and
    the accuracy at 1, 2 and 4 times the longest training length (None: not evaluated)."""
    found = []
    for task, method in dict.fromkeys((r["task"], r["method"]) for r in results):
        accuracy = {r["length"]: r["accuracy"] for r in results if (r["task"], r["method"]) == (task, method)}
        longest = None
        for length in sorted(accuracy):
            if accuracy[length] < 0.9:
                break
            longest = length
        trained = TASKS[task].train_lengths[-1]
        times = {f"{k}x": accuracy.get(k * trained) for k in (1, 2, 4)}
        found.append({"task": task, "method": method, "reach": longest, **times})
    return found


def reach_table(rows: list[dict]) -> str:
    def cell(x: float | None) -> str:
        return "-" if x is None else f"{100 * x:.1f}"

    lines = ["", f"{'at the longest training length, and times it':<46}{'1x':>7}{'2x':>7}{'4x':>7}   90 % up to"]
    for r in rows:
        lines.append(
            f"{r['task'] + ' by ' + r['method']:<46}"
            + "".join(f"{cell(r[k]):>7}" for k in ("1x", "2x", "4x"))
            + f"{r['reach'] or '-':>13}"
        )
    return "\n".join(lines)


def plot(results: list[dict], path: Path) -> bool:
    """Accuracy against length, a panel a task, a line a method. False where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    tasks = list(dict.fromkeys(r["task"] for r in results))
    figure, axes = plt.subplots(1, len(tasks), figsize=(6 * len(tasks), 4), squeeze=False)
    for axis, task in zip(axes[0], tasks, strict=True):
        lengths = TASKS[task].train_lengths
        axis.axvspan(lengths[0], lengths[-1], color="0.9", label="training lengths")
        for method, marker in zip(METHODS, "sov", strict=True):
            rows = sorted((r for r in results if r["task"] == task and r["method"] == method), key=lambda r: r["length"])
            if rows:
                y = [100 * r["accuracy"] for r in rows]
                error = [[max(0, v - 100 * r["ci95"][0]) for v, r in zip(y, rows, strict=True)],
                         [max(0, 100 * r["ci95"][1] - v) for v, r in zip(y, rows, strict=True)]]  # fmt: skip
                axis.errorbar([r["length"] for r in rows], y, yerr=error, marker=marker, capsize=2, label=method)
        axis.set(title=task, xlabel="length of the problem", ylabel="accuracy (%)", ylim=(-3, 103))
        axis.grid(alpha=0.3)
        axis.legend()
    figure.tight_layout()
    llama.write_atomically(path, lambda p: figure.savefig(p, dpi=120, format="png"))
    plt.close(figure)
    return True


def share_out(c: EvalConfig, count: int) -> None:
    """Run main() in this many processes: the steps of a small model have little for several threads to do."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    context = torch.multiprocessing.spawn(process, (count, port, c), count, join=False)
    try:
        while not context.join():
            pass
    except torch.multiprocessing.ProcessExitedException as e:  # it has said why, unless it was killed
        sys.exit(str(e) if e.signal_name else e.exit_code)
    finally:
        for p in context.processes:
            if p.is_alive():
                os.kill(p.pid, signal.SIGINT)
        for p in context.processes:
            p.join(5)
            p.terminate()


def process(rank: int, count: int, port: int, c: EvalConfig) -> None:
    def stop(*_) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's is followed by that of share_out
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, stop)
    torch.set_num_threads(max(1, torch.get_num_threads() // count))
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    try:
        main(c)
    except UserError as e:
        sys.exit(f"error: {e}")
    except KeyboardInterrupt:  # of which the first process speaks
        sys.exit(130)


def main(c: EvalConfig) -> None:
    if c.n < 1 or c.batch < 1 or c.processes < 0 or not (c.kv_budget is None or 0 < c.kv_budget < math.inf):
        raise UserError("expected --n and --batch of 1 or more, --processes of 0 or more, --kv-budget above 0")
    if not all(1 <= length <= 4000 for length in c.lengths):  # Python converts integers of up to 4300 digits
        raise UserError(f"--lengths {' '.join(map(str, c.lengths))}: expected lengths of 1 to 4000")
    todo = cells(c)
    device, (rank, size) = llama.pick_device(c.device), llama.processes()
    if size == 1 and device.type == "cpu":
        count = c.processes or min(torch.get_num_threads(), sum(len(cell.problems) for cell in todo) // 100)
        if count > 1:
            return share_out(c, count)
    llama.join_processes(device, timedelta(days=1))  # a share may take far less than another
    for task, method, adapter in dict.fromkeys((cell.task, cell.method, cell.adapter) for cell in todo):
        lora.read_adapter_config(adapter)
        if rank == 0:
            print(f"{task} by {method}: {adapter}")
    name = "problems" if c.problems else "ood" if c.ood else "in-distribution"
    settings = {
        "base": str(c.base),
        "device": str(device),
        "dtype": str(llama.pick_dtype(c.dtype, device)),
        "batch": c.batch,
        "share": c.share,
    }
    work = hashlib.sha256(json.dumps([settings, [cell.key for cell in todo]]).encode()).hexdigest()[:8]
    try:
        partial = Partial(c.out, f"{name}-{work}")  # another evaluation keeps files of its own
    except OSError as e:
        raise UserError(f"{c.out}: cannot be written to ({e.strerror}); choose another --out") from None
    results = evaluate(c, todo, partial)
    if size > 1:
        distributed.destroy_process_group()
    if rank:
        return  # the first process does the rest
    report = {
        "results": results,
        "reach": reach(results),
        "config": asdict(c) | {k: settings[k] for k in ("device", "dtype")},
        "seed": c.seed,
    }
    text = json.dumps(report, indent=1, default=str) + "\n"
    llama.write_atomically(c.out / f"{name}.json", lambda p: p.write_text(text))
    print(table(results))
    print(reach_table(report["reach"]))
    drawn = plot(results, c.out / f"{name}.png")
    partial.remove()
    print(f"\nwritten: {c.out / name}.json" + (f", {c.out / name}.png" if drawn else " (no figure: matplotlib is not installed)"))


if __name__ == "__main__":
    llama.run_script(lambda: main(tyro.cli(EvalConfig)))
