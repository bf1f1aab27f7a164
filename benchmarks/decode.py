"""Recursive decoding, rung by rung, against `transformers`: the same weights, the same problems, one run, one table.

    python benchmarks/decode.py --task addition --length 15 --n 16

(a) the way of the paper's release: `generate` for one context at a time, all of it encoded again after each return;
(b) the best with `transformers`: batched `generate` over all contexts of the same depth, padded on the left;
(c) ours: without a cache; with one, but a suspended context is encoded again; its cache kept; many problems at once; a subproblem
that several have solved once; guesses.

Prints a table, and one JSON object (--json). Needs transformers (requirements-dev.txt).
"""

import json
import random
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))

import lora  # noqa: E402
import model as llama  # noqa: E402
from recurse import Decoder, Engine, Limits, bounds, load_solver  # noqa: E402
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
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "float32"
    """in fp32 every rung must write the same tokens"""
    json: bool = False
    """print a JSON object too"""


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

    def nbytes_for(self, rows, chunks) -> int:
        return 0

    @torch.inference_mode()
    def feed(self, rows, chunks, wanted=None):
        out = []
        for row, chunk, w in zip(rows, chunks, wanted, strict=True):
            self.contexts[row] = self.contexts[row] + chunk
            self.forwarded += len(self.contexts[row])
            logits = self.model(torch.tensor([self.contexts[row]], device=self.model.device))[0, -1]
            out.append([int(logits.argmax())] if w else [])
        return out


class Release:
    """(a) One context after the other, each `generate` from the whole of it."""

    def __init__(self, theirs, tokenizer: llama.Tokenizer, limit: int):
        self.theirs, self.tokenizer, self.limit = theirs, tokenizer, limit
        self.forwarded = 0

    def generate(self, contexts: list[list[int]]) -> list[list[int]]:
        """What each context is continued by, without the EOS."""
        longest = max(map(len, contexts))
        pad, eos = self.tokenizer.sp.unk_id(), self.tokenizer.eos_id
        ids = torch.tensor([[pad] * (longest - len(c)) + c for c in contexts], device=self.theirs.device)
        mask = torch.tensor([[0] * (longest - len(c)) + [1] * len(c) for c in contexts], device=self.theirs.device)
        out = self.theirs.generate(
            input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=self.limit, pad_token_id=pad, eos_token_id=eos
        )
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


def ours(engine: Engine, tokenizer: llama.Tokenizer, limits: Limits, prompts: list[str]) -> tuple[Contexts, int]:
    """Contexts and forwarded tokens."""
    decoder = Decoder(engine, tokenizer, limits, keep_frames=True)
    results = sorted(tqdm(decoder.solve(prompts), total=len(prompts), disable=None, leave=False), key=lambda r: r.index)
    return [[f.tokens for f in r.frames] for r in results], sum(r.counts.tokens_forwarded for r in results)


def main(c: Config) -> None:
    import transformers

    task, rng = TASKS[c.task], random.Random(f"benchmark-{c.task}-{c.length}")
    problems = [task.sample(rng, c.length) for _ in range(c.n)]
    prompts = [task.prompt(p, "retuning") for p in problems]
    device = llama.pick_device(c.device)
    dtype = llama.pick_dtype(c.dtype, device)
    model, tokenizer = load_solver(c.adapter or lora.find_adapter(c.task, "retuning"), None, device, dtype)
    with tempfile.TemporaryDirectory() as folder:  # the very same weights for transformers
        llama.save(model, tokenizer, Path(folder), dtype=dtype)
        theirs = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
    limit = bounds(task, problems, "retuning", tokenizer)
    release, batched = (way(theirs, tokenizer, limit["max_segment_tokens"]) for way in (Release, Batched))

    def rung(engine: type[Engine], n: int, **limits) -> Callable[[], tuple[Contexts, int]]:
        def run() -> tuple[Contexts, int]:
            e = engine(model)
            contexts, forwarded = ours(e, tokenizer, Limits(**limit | limits), prompts[:n])
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
    }
    release.generate([tokenizer.start(prompts[0])])  # warm up
    ours(Engine(model), tokenizer, Limits(**limit), prompts[:1])
    release.forwarded = 0
    rows, all_contexts = [], {}
    for name, (n, run) in rungs.items():
        began = time.perf_counter()
        contexts, forwarded = run()
        speed = n / (time.perf_counter() - began)
        all_contexts[name] = contexts
        rows.append({"rung": name.strip(), "problems": n, "problems_per_second": speed, "forwarded_per_problem": forwarded / n})
    reference = all_contexts["(b) transformers, batched"]
    for row, contexts in zip(rows, all_contexts.values(), strict=True):
        if sum(map(len, contexts)) == sum(map(len, reference[: len(contexts)])):
            row["same_tokens"] = contexts == reference[: len(contexts)]
        else:  # what was shared was run for one problem alone
            row["same_tokens"] = {tuple(x) for p in contexts for x in p} == {tuple(x) for p in reference for x in p}
    print(f"{c.task}, length {c.length}, {dtype} on {device}, {torch.get_num_threads()} threads")
    print(f"{'':<36}{'problems/s':>12}{'forwarded each':>16}{'x (a)':>9}{'x (b)':>9}  same tokens")
    for name, row in zip(rungs, rows, strict=True):
        speed = row["problems_per_second"]
        row["over_release"], row["over_batched"] = (speed / rows[i]["problems_per_second"] for i in (0, 1))
        print(
            f"{name:<36}{speed:>12.3f}{row['forwarded_per_problem']:>16.0f}{row['over_release']:>9.1f}{row['over_batched']:>9.1f}"
            f"  {'yes' if row['same_tokens'] else 'NO'}"
        )
    if c.json:
        print(json.dumps({"task": c.task, "length": c.length, "dtype": str(dtype), "device": str(device), "rungs": rows}))


if __name__ == "__main__":
    config = tyro.cli(Config)
    llama.run_script(lambda: main(config))
