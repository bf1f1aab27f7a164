"""Evaluate adapters by problem length, above all out of distribution.

    python eval.py --ood

One loop and one decoding policy (greedy, the call-stack decoder of recurse.py) for all methods, which are asked the same
problems. The task parses and judges. Prints a table, and writes <out>/ood.json and <out>/ood.png (in-distribution.* where no
length is beyond training, problems.* of --problems).
"""

import hashlib
import json
import math
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Literal

import torch
import tyro
from torch import multiprocessing
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
    """out of distribution: lengths beyond training, and some training lengths for comparison"""
    task: Literal[tuple(TASKS)] | None = None
    """one task only"""
    method: Literal["baseline", "scratchpad", "retuning"] | None = None
    """one method only"""
    lengths: tuple[int, ...] = ()
    """lengths of the problems (default: the task's own list)"""
    n: int = 50
    """problems per length"""
    seed: int = 0
    """of the problems, which are held out of training (but for the shortest, see `draw`)"""
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
    """that share the problems out (default: one a GPU or core, where there are 100 problems for each)"""
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

    @cached_property
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
    """n different problems, held out from training; fewer where there are not so many (of short lists, above all). Of the
    shortest there are so few that none is held out: one-digit sums, up to 5 bits, one item.
    """
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
            if c.problems and c.task:
                raise UserError(f"{c.problems}: it has problems of {task}, but --task is {c.task}; leave out --task")
            raise UserError(f"there is no adapter for {task}; make one with: python train.py --task {task}")
    return [Cell(t, m, a, length, p) for t, m, a in found for (task, length), p in sorted(groups.items()) if task == t]


# --- the evaluation ----------------------------------------------------------------------------------------------


class Partial:
    """What is done so far, a line a problem, so that an interrupted evaluation goes on where it stopped."""

    def __init__(self, path: Path):
        self.path, self.done = path, {}
        for line in path.read_text().splitlines() if path.exists() else ():
            try:
                r = json.loads(line)
            except ValueError:
                break  # cut off while it was written
            self.done[r["cell"], r["index"]] = r
        llama.write_atomically(path, lambda p: p.write_text("".join(json.dumps(r) + "\n" for r in self.done.values())))
        self.file = path.open("a")

    def waiting(self, cell: Cell) -> list[int]:
        """Indices of the problems of a cell that are to be solved."""
        return [i for i in range(len(cell.problems)) if (cell.key, i) not in self.done]

    def add(self, record: dict) -> None:
        self.done[record["cell"], record["index"]] = record
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()

    def remove(self) -> None:
        self.file.close()
        self.path.unlink()


def decode(c: EvalConfig, todo: list[Cell], waiting: list[list[int]], share: float = 1.0) -> Iterator[dict]:
    """Solve the problems of each cell with these indices, in this share of the memory; yields a record a problem."""
    device = llama.pick_device(c.device)
    dtype = llama.pick_dtype(c.dtype, device)
    loaded, engine, memory = None, None, None
    for cell, indices in zip(todo, waiting, strict=True):
        if not indices:
            continue
        if loaded != cell.adapter:
            model, tokenizer = load_solver(cell.adapter, c.base, device, dtype)
            engine, loaded = Engine(model), cell.adapter
            memory = memory or int(cache_bytes(c.kv_budget, device) * share)  # of what the weights have left free
        task = TASKS[cell.task]
        limits = bounds(task, cell.problems, cell.method, tokenizer)
        decoder = Decoder(engine, tokenizer, Limits(cache_bytes=memory, batch=c.batch, share=c.share, **limits))
        before = time.monotonic()
        for result in decoder.solve([task.prompt(cell.problems[i], cell.method) for i in indices]):
            index, now = indices[result.index], time.monotonic()
            yield {
                "cell": cell.key,
                "index": index,
                "correct": result.ending == "answer" and task.judge(cell.problems[index], result.text, cell.method),
                "ending": result.ending,
                **asdict(result.counts),
                "peak_cache_bytes": decoder.peak_bytes,
                "seconds": now - before,  # since the one before: they sum up to the cell's, of all processes
            }
            before = now


def decode_in_processes(c: EvalConfig, todo: list[Cell], waiting: list[list[int]], count: int) -> Iterator[dict]:
    """decode() by several processes, each with a share of every cell, so that all have about as much to do.

    On a CPU because the steps of a small model have little for several threads to do; on GPUs to use them all.
    """
    context = multiprocessing.get_context("spawn")
    workers = {}
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited: a terminal's Ctrl-C is for this process alone
    try:
        for rank in range(count):
            share = [indices[rank::count] for indices in waiting]
            records, sent = context.Pipe(duplex=False)
            workers[records] = context.Process(target=work, args=(sent, rank, count, c, todo, share), daemon=True)
            workers[records].start()
            sent.close()  # here, so that the end of the process ends the records
    finally:
        signal.signal(signal.SIGINT, handler)
    try:
        while workers:
            for records in wait(list(workers)):
                try:
                    record = records.recv()
                except EOFError:
                    worker = workers.pop(records)
                    worker.join()
                    if worker.exitcode:
                        raise UserError(
                            f"a process of {count} ended by itself (exit code {worker.exitcode}; -9: for want of memory); "
                            "nothing is lost: the same command goes on, with fewer --processes in less memory"
                        ) from None
                    continue
                if isinstance(record, UserError):
                    raise record
                yield record
    finally:
        for worker in workers.values():
            worker.terminate()
        for worker in workers.values():
            worker.join()


def work(records: Connection, rank: int, count: int, c: EvalConfig, todo: list[Cell], waiting: list[list[int]]) -> None:
    """One of the processes."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # in good order
    on_gpu = llama.pick_device(c.device).type == "cuda"
    if on_gpu:
        torch.cuda.set_device(rank)
    else:
        torch.set_num_threads(max(1, torch.get_num_threads() // count))
    try:
        for record in decode(c, todo, waiting, share=1.0 if on_gpu else 1 / count):
            records.send(record)
    except UserError as e:
        records.send(e)
    except BrokenPipeError:  # the first process has been killed
        pass


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
    """A summary of each cell."""
    waiting = [partial.waiting(cell) for cell in todo]
    count = c.processes or max(1, min(devices(c), sum(map(len, waiting)) // 100))
    solved = decode_in_processes(c, todo, waiting, count) if count > 1 else decode(c, todo, waiting)
    names = {cell.key: f"{cell.task} {cell.method} {cell.length}" for cell in todo}
    left = {cell.key: len(indices) for cell, indices in zip(todo, waiting, strict=True)}
    right, n, seconds = Counter(), Counter(), Counter()
    with tqdm(total=sum(left.values()), unit="problem", disable=None) as bar, closing(solved):
        for record in solved:
            partial.add(record)
            key = record["cell"]
            left[key], right[key], n[key] = left[key] - 1, right[key] + record["correct"], n[key] + 1
            seconds[key] += record["seconds"]
            so_far = f"{names[key]}: {right[key]}/{n[key]} right"
            bar.set_description(so_far)
            bar.update()
            if bar.disable and not left[key]:
                print(f"{so_far}, {seconds[key]:.0f} s", flush=True)
    return [summary(cell, [partial.done[cell.key, i] for i in range(len(cell.problems))]) for cell in todo]


def devices(c: EvalConfig) -> int:
    """GPUs, or the threads that torch takes on a CPU."""
    kind = llama.pick_device(c.device).type
    return {"cuda": torch.cuda.device_count, "mps": lambda: 1, "cpu": torch.get_num_threads}[kind]()


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


def main(c: EvalConfig) -> None:
    if c.n < 1 or c.batch < 1 or c.processes < 0 or not (c.kv_budget is None or 0 < c.kv_budget < math.inf):
        raise UserError("expected --n and --batch of 1 or more, --processes of 0 or more, --kv-budget above 0")
    if not all(1 <= length <= 4000 for length in c.lengths):  # Python converts integers of up to 4300 digits
        raise UserError(f"--lengths {' '.join(map(str, c.lengths))}: expected lengths of 1 to 4000")
    if c.runs != EvalConfig.runs and not c.runs.is_dir():
        raise UserError(f"--runs {c.runs}: no such folder")
    device = llama.pick_device(c.device)
    if device.type == "cuda" and c.processes > torch.cuda.device_count():
        raise UserError(f"--processes {c.processes}: expected one a GPU at most, of which there are {torch.cuda.device_count()}")
    todo = cells(c)
    for task, method, adapter in dict.fromkeys((cell.task, cell.method, cell.adapter) for cell in todo):
        lora.read_adapter_config(adapter)
        print(f"{task} by {method}: {adapter}")
    beyond = any(cell.length > max(TASKS[cell.task].train_lengths) for cell in todo)
    name = "problems" if c.problems else "ood" if c.ood or beyond else "in-distribution"
    settings = {
        "base": str(c.base),
        "device": str(device),
        "dtype": str(llama.pick_dtype(c.dtype, device)),
        "batch": c.batch,
        "share": c.share,
    }
    work_key = hashlib.sha256(json.dumps([settings, [cell.key for cell in todo]]).encode()).hexdigest()[:8]
    try:
        partial = Partial(c.out / f"{name}-{work_key}.partial.jsonl")  # another evaluation keeps a file of its own
    except OSError as e:
        raise UserError(f"{c.out}: cannot be written to ({e.strerror}); choose another --out") from None
    results = evaluate(c, todo, partial)
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
