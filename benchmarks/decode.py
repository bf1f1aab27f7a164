"""Recursive decoding, rung by rung, against `transformers`: the same weights, the same problems, one run, one table.

    python benchmarks/decode.py --task addition --length 15 --n 16
    python benchmarks/decode.py --task addition --length 40 --n 64 --slow 1 --shape 7b    # random weights of LLaMA's shape

(a) the way of the paper's release: `generate` for one context at a time, all of it encoded again after each return;
(b) the best with `transformers`: batched `generate` over all contexts of the same depth, padded on the left;
(c) ours: without a cache; with one, but a suspended context is encoded again; its cache kept; many problems at once; a subproblem
that several have solved once; guesses. And the last of them again, in a tenth of the memory for keys and values that it took;
and, on a CPU, in a process for each thread, as eval.py does it.

Problems on which the adapter goes astray, calling on and on, are left out: only our decoder has limits for them.

With random weights every forward pass is made, but what it writes is replaced by what a perfect model would write, so that the
calls are those of the task. "arithmetic" is the share of a large matrix product's speed on this device that the tokens fed come
to (2 operations a parameter), "memory" the share of the speed of reading memory that the weights, read once a pass, come to.

Prints a table, one JSON object (--json), and where the time of the last rung but one goes (--profile). Needs transformers
(requirements-dev.txt).
"""

import json
import random
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import tyro
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))

from shapes import SHAPES, bytes_per_second, flops_of_a_product, in_transformers, random_model, synchronize  # noqa: E402

import lora  # noqa: E402
import model as llama  # noqa: E402
import train  # noqa: E402
from recurse import Decoder, Engine, Limits, bounds, free_bytes, load_solver  # noqa: E402
from tasks import CALL, SOLUTION, TASKS, return_value, returned  # noqa: E402

Contexts = list[list[list[int]]]  # the ids of every context of every problem, in the order they were opened


@dataclass
class Config:
    """Time one task at one length."""

    task: Literal[tuple(TASKS)] = "addition"
    length: int = 15
    n: int = 16
    """problems"""
    slow: int = 4
    """problems for the rungs that decode one at a time"""
    batch: int = 128
    """problems at once in (c); (b) takes all"""
    adapter: Path | None = None
    shape: Literal[("shipped", *SHAPES)] = "shipped"
    """other than shipped: random weights, that are made to write what a perfect model would (give --dtype bfloat16)"""
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "float32"
    """in fp32 every rung must write the same tokens"""
    rungs: tuple[str, ...] = ()
    """of (c) only those whose names contain one of these (default: all)"""
    json: bool = False
    """print a JSON object too"""
    profile: bool = False
    """run the fastest way once more, in torch's profiler"""


class Uncached(Engine):
    """Every step encodes its contexts from the start, as if there were no cache."""

    def reset(self, n_rows: int) -> None:
        super().reset(n_rows)
        self.contexts: list[list[int]] = [[] for _ in range(n_rows)]
        self.forwarded = 0

    def clear(self, row: int) -> None:
        self.contexts[row] = []

    def take(self, row: int):
        return torch.tensor(self.contexts[row]), torch.tensor([])

    def put(self, row: int, saved) -> None:
        self.contexts[row] = saved[0].tolist()

    def row_bytes(self, length: int) -> int:
        return 1

    def nbytes_for(self, rows, chunks) -> int:
        return 0

    @torch.inference_mode()
    def feed(self, rows, chunks, wanted=None):
        out = []
        for row, chunk, w in zip(rows, chunks, wanted, strict=True):
            self.contexts[row] = self.contexts[row] + chunk
            self.forwarded += len(self.contexts[row])
            logits = self.model(torch.tensor([self.contexts[row]], device=self.model.device))[0, -1:]
            out.append(self.choose(logits) if w else [])
        return out


class Oracle:
    """What a perfect model writes next."""

    def __init__(self, task, tokenizer: llama.Tokenizer):
        self.task, self.tokenizer = task, tokenizer
        self.recent: list[train.Example] = []  # contexts take turns

    def __call__(self, ids: list[int]) -> int:
        example = next((e for e in self.recent if ids == e.tokens[: len(ids)]), None)
        if example is None:
            problem = self.task.from_text(self.tokenizer.sp.decode(ids).partition(SOLUTION)[0])
            example = train.encode(self.task.context(problem, "retuning"), self.tokenizer)
            self.recent = [example, *self.recent[:255]]
        return example.labels[len(ids) - 1]


def forced(engine: type[Engine], oracle: Oracle) -> type[Engine]:
    """An engine that makes every forward pass, and then writes what the oracle says."""

    class Forced(engine):
        def reset(self, n_rows: int) -> None:
            super().reset(n_rows)
            self.texts: list[list[int]] = [[] for _ in range(n_rows)]

        def clear(self, row: int) -> None:
            super().clear(row)
            self.texts[row] = []

        def keep(self, rows: list[int], n_rows: int) -> None:
            super().keep(rows, n_rows)
            self.texts = [self.texts[row] for row in rows] + [[] for _ in range(n_rows - len(rows))]

        def take(self, row: int):
            return *super().take(row), torch.tensor(self.texts[row])

        def put(self, row: int, saved) -> None:
            super().put(row, saved[:2])
            self.texts[row] = saved[2].tolist()

        def feed(self, rows, chunks, wanted=None):
            todo = list(zip(rows, chunks, wanted or [1] * len(rows), strict=True))
            self.choices: dict[int, list[int]] = {}
            for row, chunk, w in todo:
                guesses = chunk[len(chunk) - w + 1 :] if w else []
                self.texts[row] = self.texts[row] + chunk[: len(chunk) - len(guesses)]
                choices = [oracle(self.texts[row])] if w else []
                for guess in guesses:
                    right = guess == choices[-1]
                    if right:
                        self.texts[row] = [*self.texts[row], guess]
                    choices.append(oracle(self.texts[row]) if right else -1)
                self.choices[row] = choices
            order = sorted(rows) if 2 * len(rows) > len(self.texts) else rows  # as `feed` does
            self.queue = deque(x for row in order for x in self.choices[row])
            return super().feed(rows, chunks, wanted)

        def choose(self, logits):
            return [self.queue.popleft() for _ in super().choose(logits)]

    return Forced


class Release:
    """(a) One context after the other, each `generate` from the whole of it."""

    def __init__(self, theirs, tokenizer: llama.Tokenizer, limit: int, oracle: Oracle | None):
        self.theirs, self.tokenizer, self.limit, self.oracle = theirs, tokenizer, limit, oracle
        self.forwarded = 0

    def force(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """A logits processor: all but the oracle's token are impossible. (A row that has ended is filled with padding.)"""
        eos = self.tokenizer.eos_id
        rows = [ids_[pads:] for ids_, pads in zip(ids.tolist(), self.pads, strict=True)]
        new = [eos if eos in row else self.oracle(row) for row in rows]
        return torch.full_like(scores, float("-inf")).scatter_(1, torch.tensor(new, device=scores.device)[:, None], 0.0)

    def generate(self, contexts: list[list[int]]) -> list[list[int]]:
        """What each context is continued by, without the EOS."""
        longest = max(map(len, contexts))
        pad, eos = self.tokenizer.sp.unk_id(), self.tokenizer.eos_id
        ids = torch.tensor([[pad] * (longest - len(c)) + c for c in contexts], device=self.theirs.device)
        mask = torch.tensor([[0] * (longest - len(c)) + [1] * len(c) for c in contexts], device=self.theirs.device)
        self.pads = [longest - len(c) for c in contexts]
        out = self.theirs.generate(
            input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=self.limit, pad_token_id=pad, eos_token_id=eos,
            logits_processor=[self.force] if self.oracle else None,
        )  # fmt: skip
        new = out[:, longest:].tolist()
        self.forwarded += len(contexts) * (longest + out.shape[1] - longest - 1)  # padding is forwarded too
        return [row[: row.index(eos)] if eos in row else row for row in new]

    def solve(self, prompt: str, opened: list[list[int]]) -> str:
        context = self.tokenizer.start(prompt)
        opened.append(context)
        while True:
            new = self.generate([context])[0]
            context += new
            text = self.tokenizer.decode(new)
            _, call, callee = text.rpartition(CALL)
            if not call:
                return return_value(text)
            context += self.tokenizer.segment(returned(self.solve(callee.removesuffix("\n") + SOLUTION, opened)))

    def run(self, prompts: list[str]) -> Contexts:
        solved: Contexts = []
        for prompt in tqdm(prompts, disable=None, leave=False):
            solved.append([])
            self.solve(prompt, solved[-1])
        return solved


class Batched(Release):
    """(b) All problems in step: every `generate` takes the contexts on top of all stacks that are at the same depth."""

    def run(self, prompts: list[str]) -> Contexts:
        stacks = [[self.tokenizer.start(p)] for p in prompts]
        solved: Contexts = [[stack[0]] for stack in stacks]
        while any(stacks):
            depth = max(map(len, stacks))
            on_top = [i for i, stack in enumerate(stacks) if len(stack) == depth]
            for i, new in zip(on_top, self.generate([stacks[i][-1] for i in on_top]), strict=True):
                stacks[i][-1] += new
                text = self.tokenizer.decode(new)
                _, call, callee = text.rpartition(CALL)
                if call:
                    stacks[i].append(self.tokenizer.start(callee.removesuffix("\n") + SOLUTION))
                    solved[i].append(stacks[i][-1])
                else:
                    stacks[i].pop()
                    if stacks[i]:
                        stacks[i][-1] += self.tokenizer.segment(returned(return_value(text)))
        return solved


def ours(engine: Engine, tokenizer: llama.Tokenizer, limits: Limits, prompts: list[str]) -> tuple[Contexts, int, int]:
    """Contexts, forwarded tokens, and the most bytes of keys and values at once."""
    decoder = Decoder(engine, tokenizer, limits, keep_frames=True)
    results = sorted(tqdm(decoder.solve(prompts), total=len(prompts), disable=None, leave=False), key=lambda r: r.index)
    return [[f.tokens for f in r.frames] for r in results], sum(r.counts.tokens_forwarded for r in results), decoder.peak_bytes


class Processes:
    """Our fastest way in several processes, each with a share of the problems and one thread. They are started beforehand."""

    def __init__(self, count: int, adapter: Path, dtype: torch.dtype, prompt: str):
        self.count = count
        context = torch.multiprocessing.get_context("spawn")
        ready = context.Barrier(count + 1)
        self.pool = context.Pool(count, self.start, (adapter, dtype, prompt, ready))
        ready.wait()

    @staticmethod
    def start(adapter: Path, dtype: torch.dtype, prompt: str, ready) -> None:
        global loaded
        torch.set_num_threads(1)
        loaded = load_solver(adapter, None, torch.device("cpu"), dtype)
        Processes.solve(Limits(), [prompt])  # warm up
        ready.wait()

    @staticmethod
    def solve(limits: Limits, prompts: list[str]) -> tuple[Contexts, int, int, int]:
        model, tokenizer = loaded
        passes = 0

        def count(*_) -> None:
            nonlocal passes
            passes += 1

        handle = model.register_forward_hook(count)
        contexts, forwarded, peak = ours(Engine(model), tokenizer, limits, prompts)
        handle.remove()
        return contexts, forwarded, peak, passes

    def run(self, limits: Limits, prompts: list[str]) -> tuple[Contexts, int, int, int]:
        shares = [
            (replace(limits, cache_bytes=limits.cache_bytes // self.count), prompts[i :: self.count]) for i in range(self.count)
        ]
        parts = self.pool.starmap(self.solve, shares, chunksize=1)
        contexts: Contexts = [[]] * len(prompts)
        for i, (solved, *_) in enumerate(parts):
            contexts[i :: self.count] = solved
        return contexts, *(sum(part[k] for part in parts) for k in (1, 2, 3))

    def close(self) -> None:
        self.pool.close()
        self.pool.join()


def profile(run: Callable) -> None:
    """Print the shares of wall time that torch's operators take themselves, on the device that they run on."""
    with torch.profiler.profile() as profiler:
        began = time.perf_counter()
        run()
        seconds = time.perf_counter() - began
    on_gpu = torch.cuda.is_available()
    times = {e.key: (e.self_device_time_total if on_gpu else e.self_cpu_time_total) / 1e6 for e in profiler.key_averages()}
    print(f"\nwhere {seconds:.1f} s go under the profiler:")
    for name, own in sorted(times.items(), key=lambda item: -item[1])[:10]:
        print(f"{own / seconds:>7.1%}  {name}")
    print(f"{1 - sum(times.values()) / seconds:>7.1%}  outside of torch's operators: Python")


def choose(c: Config, task, decoder: Decoder, rng: random.Random, problems: list) -> list:
    """As many problems that the adapter answers, right or wrong."""
    chosen = []
    for _ in range(8):
        solved = tqdm(decoder.solve([task.prompt(p, "retuning") for p in problems]), total=c.n, disable=None, leave=False)
        chosen += [problems[i] for i in sorted(r.index for r in solved if r.ending == "answer")]
        if len(chosen) >= c.n:
            return chosen[: c.n]
        problems = [task.sample(rng, c.length) for _ in range(c.n)]
    raise llama.UserError(f"the adapter answers only {len(chosen)} of {8 * c.n} problems; choose a smaller --length")


def main(c: Config) -> None:
    task, rng = TASKS[c.task], random.Random(f"benchmark-{c.task}-{c.length}")
    problems = [task.sample(rng, c.length) for _ in range(c.n)]
    device = llama.pick_device(c.device)
    dtype = llama.pick_dtype(c.dtype, device)
    if c.shape == "shipped":
        oracle = None
        model, tokenizer = load_solver(c.adapter or lora.find_adapter(c.task, "retuning"), None, device, dtype)
    else:
        tokenizer = llama.Tokenizer(llama.find_tokenizer(Path("checkpoints/tiny")))
        model, oracle = random_model(c.shape, device, dtype), Oracle(task, tokenizer)
    theirs = in_transformers(model, tokenizer)
    limit = bounds(task, problems, "retuning", tokenizer)
    if oracle is None:
        decoder = Decoder(Engine(model), tokenizer, Limits(**limit, cache_bytes=free_bytes(device), batch=c.batch))
        problems = choose(c, task, decoder, rng, problems)
    prompts = [task.prompt(p, "retuning") for p in problems]
    release, batched = (way(theirs, tokenizer, limit["max_segment_tokens"], oracle) for way in (Release, Batched))
    passes = 0

    def count(*_) -> None:
        nonlocal passes
        passes += 1

    model.register_forward_hook(count)
    theirs.register_forward_hook(count)

    peak = 0

    def rung(engine: type[Engine], n: int, of_peak: float = 0.0, **limits) -> Callable[[], tuple[Contexts, int]]:
        def run() -> tuple[Contexts, int]:
            nonlocal peak
            e = (forced(engine, oracle) if oracle else engine)(model)
            if device.type == "cuda":
                torch.cuda.empty_cache()  # what torch holds after the rung before does not count as free
            memory = int(peak * of_peak) or free_bytes(device)
            contexts, forwarded, peak = ours(e, tokenizer, Limits(**limit | {"cache_bytes": memory} | limits), prompts[:n])
            return contexts, getattr(e, "forwarded", forwarded)

        return run

    slow = min(c.slow, c.n)
    rungs = {
        "(a) transformers, the release's way": (slow, lambda: (release.run(prompts[:slow]), release.forwarded)),
        "(b) transformers, batched": (c.n, lambda: (batched.run(prompts), batched.forwarded)),
        "(c) ours, no cache": (slow, rung(Uncached, slow, batch=1, draft=0, share=False)),
        "    cache within a context": (slow, rung(Engine, slow, batch=1, draft=0, share=False, cache_bytes=0)),
        "    suspended caches kept": (slow, rung(Engine, slow, batch=1, draft=0, share=False)),
        "    many problems at once": (c.n, rung(Engine, c.n, batch=c.batch, draft=0, share=False)),
        "    shared subproblems": (c.n, rung(Engine, c.n, batch=c.batch, draft=0)),
        "    guesses": (c.n, rung(Engine, c.n, batch=c.batch)),
        "    ... in a tenth of the memory": (c.n, rung(Engine, c.n, of_peak=0.1, batch=c.batch)),
    }
    processes, pool = min(torch.get_num_threads(), c.n), None
    if c.shape == "shipped" and device.type == "cpu" and processes > 1:
        pool = Processes(processes, c.adapter or lora.find_adapter(c.task, "retuning"), dtype, prompts[0])

        def in_processes() -> tuple[Contexts, int]:
            nonlocal peak, passes
            limits = Limits(**limit | {"cache_bytes": free_bytes(device), "batch": c.batch})
            contexts, forwarded, peak, passes = pool.run(limits, prompts)
            return contexts, forwarded

        rungs[f"    ... in {processes} processes"] = (c.n, in_processes)
    if c.rungs:
        rungs = {name: r for name, r in rungs.items() if "transformers" in name or any(part in name for part in c.rungs)}
    release.generate([tokenizer.start(prompts[0])])  # warm up
    rung(Engine, 1)()
    release.forwarded = 0
    arithmetic, memory = flops_of_a_product(device, dtype), bytes_per_second(device)
    parameters = sum(p.numel() for p in model.parameters()) - model.tok_embeddings.weight.numel()  # those are looked up
    size = parameters * model.output.weight.element_size()
    rows, all_contexts = [], {}
    for name, (n, run) in rungs.items():
        passes, began = 0, time.perf_counter()
        all_contexts[name], forwarded = run()
        synchronize(device)
        seconds = time.perf_counter() - began
        print(f"{name.strip()}: {n} problems in {seconds:.1f} s", file=sys.stderr, flush=True)
        rows.append({
            "rung": name.strip(), "problems": n, "problems_per_second": n / seconds, "forwarded_per_problem": forwarded / n,
            "passes_per_problem": passes / n, "arithmetic": 2 * parameters * forwarded / seconds / arithmetic,
            "memory": passes * size / seconds / memory, "cache_MB": "" if "transformers" in name else round(peak / 1e6, 1),
        })  # fmt: skip
    if pool:
        pool.close()
    reference = all_contexts["(b) transformers, batched"]
    for row, contexts in zip(rows, all_contexts.values(), strict=True):
        if sum(map(len, contexts)) == sum(map(len, reference[: len(contexts)])):
            row["same_tokens"] = contexts == reference[: len(contexts)]
        else:  # what was shared was run for one problem alone
            row["same_tokens"] = {tuple(x) for p in contexts for x in p} == {tuple(x) for p in reference for x in p}
    print(
        f"{c.task}, length {c.length}, {c.shape} model in {dtype} on {device}, {torch.get_num_threads()} threads; "
        f"a product {arithmetic / 1e9:.0f} GFLOP/s, memory {memory / 1e9:.0f} GB/s"
    )
    columns = f"{'problems/s':>12}{'tokens each':>12}{'passes each':>12}{'arithmetic':>11}{'memory':>8}"
    columns += f"{'cache MB':>9}{'x (a)':>9}{'x (b)':>9}"
    print(f"{'':<36}{columns}  same tokens")
    for name, row in zip(rungs, rows, strict=True):
        speed = row["problems_per_second"]
        row["over_release"], row["over_batched"] = (speed / rows[i]["problems_per_second"] for i in (0, 1))
        print(
            f"{name:<36}{speed:>12.3f}{row['forwarded_per_problem']:>12.0f}{row['passes_per_problem']:>12.1f}"
            f"{row['arithmetic']:>11.1%}{row['memory']:>8.1%}"
            f"{row['cache_MB']:>9}{row['over_release']:>9.1f}{row['over_batched']:>9.1f}"
            f"  {'yes' if row['same_tokens'] else 'NO'}"
        )
    if c.json:
        print(json.dumps({"task": c.task, "length": c.length, "shape": c.shape, "dtype": str(dtype), "device": str(device),
                          "product_flops": arithmetic, "memory_bytes_per_second": memory, "rungs": rows}))  # fmt: skip
    if c.profile:
        profile(rung(Engine, c.n, batch=c.batch))


if __name__ == "__main__":
    config = tyro.cli(Config)
    llama.run_script(lambda: main(config))
