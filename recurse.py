"""The call stack: how a model that writes `Call: ...` has its own subproblems solved.

    python recurse.py "73199 + 21439"

A *frame* is one context. It starts with nothing but its prompt, in a fresh KV cache. When what the model has written is a
call, the frame is suspended together with its cache, and a frame for the callee is pushed. When a frame ends with an
answer it is popped, the answer is appended as `Return: ...` to its caller's cache, and the caller goes on from there.

`Decoder.solve` runs many problems at once, each with a stack of its own whose top frame is live: it owns a row of the
`Engine`, which holds the model and the KV cache. Read `Frame`, then `Decoder._segment_written`: that is the mechanism.
Around it: `Shared` (the same subproblem is solved once), `Lookup` (guesses, to write several tokens in one forward pass).
"""

import json
import math
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from torch import Tensor

import lora
import model as llama
from model import KVCache, LLaMA, Tokenizer, UserError
from tasks import CALL, SOLUTION, TASKS, Segment, given, return_value, returned, written

# How a frame can end. Only "answer" has a value; any other ending also ends the frames that wait for it, and the problem.
ENDINGS = ("answer", "no-answer", "bad-call", "max-depth", "max-tokens", "context-full")


@dataclass
class Frame:
    """One context, from its prompt to its end."""

    depth: int  # 0 for the problem itself
    segments: list[Segment]  # given and written so far; the first is the prompt
    tokens: list[int]  # ids in the cache
    pending: list[int]  # ids to be fed next: a given segment, or the last token written
    lookup: "Lookup"  # guesses what it writes next
    writing: list[int] = field(default_factory=list)  # ids of the segment being written
    saved: tuple[Tensor, Tensor] | None = None  # keys and values, while suspended
    ending: str | None = None
    value: str | None = None  # what is returned, if the ending is "answer"


@dataclass
class Counts:
    """The work done for a problem."""

    frames: int = 0  # contexts run
    frames_shared: int = 0  # calls answered by a context that was run before, or for another problem
    tokens_generated: int = 0  # written by the model, each end of a segment counted as one
    tokens_forwarded: int = 0  # fed to it: what is given, what it wrote, guesses, and what had to be fed again
    tokens_prompt: int = 0  # given as prompts, of all its frames
    tokens_returned: int = 0  # given as values of calls
    tokens_guessed: int = 0
    tokens_accepted: int = 0  # guesses that the model wrote indeed
    tokens_refed: int = 0  # of contexts whose cache had been given up


@dataclass
class Problem:
    """A prompt, the stack of frames that solve it, and in the end how that went."""

    index: int
    prompt: str
    stack: list[Frame] = field(default_factory=list)
    frames: list[Frame] = field(default_factory=list)  # all of them, in the order they were pushed, if asked for
    ending: str | None = None
    text: str | None = None  # what the first frame wrote last, if the ending is "answer"
    deepest: int = 0
    counts: Counts = field(default_factory=Counts)
    called: str | None = None  # the prompt that its top frame, suspended, waits for: another problem runs it
    parked: bool = False  # has given its row up


@dataclass
class Limits:
    max_depth: int = 512  # frames on a stack
    max_tokens: int = 200_000  # written for one problem, over all its frames
    max_segment_tokens: int = 200_000  # written in one segment
    cache_bytes: int = 2 * 1024**3  # keys and values, of live and suspended frames together
    batch: int = 128  # live frames at once
    share: bool = True  # solve the same subproblem once, under greedy decoding
    draft: int = 11  # tokens guessed at once, to be checked in one forward pass; 0: none


class Decoder:
    """Solves prompts by recursive decoding.

    engine      see `Engine`; tests put a scripted one in its place.
    on_segment  called with (problem, frame, segment) for each segment, given or written, as it is completed,
                and with segment None when the frame ends.
    """

    def __init__(
        self,
        engine: "Engine",
        tokenizer: Tokenizer,
        limits: Limits | None = None,
        *,
        keep_frames: bool = False,
        on_segment: Callable[[Problem, Frame, Segment | None], None] | None = None,
    ):
        self.engine, self.tokenizer, self.limits = engine, tokenizer, limits or Limits()
        self.draft = self.limits.draft if engine.greedy else 0
        self.shared = Shared()
        self.keep_frames, self.on_segment = keep_frames, on_segment or (lambda *_: None)
        self.suspended: dict[int, Frame] = {}  # frames that hold a cache, by id, the oldest first
        self.suspended_bytes = 0
        self.peak_bytes = 0  # of keys and values, live and suspended, in the last `solve`

    def solve(self, prompts: Sequence[str]) -> Iterator[Problem]:
        """Yield each problem as it ends. (An order of its own: `Problem.index` says which prompt it was.)"""
        waiting = deque(Problem(i, prompt) for i, prompt in enumerate(prompts))
        longest = max((len(self.tokenizer.start(p)) for p in prompts), default=1)
        most_rows = min(len(waiting), self.engine.rows_for(longest, self.limits))
        self.engine.reset(most_rows)
        self.shared, self.peak_bytes = Shared(), 0
        live: dict[int, Problem] = {}  # row -> problem
        while waiting or live or self.shared.ready:
            for row in range(self.engine.n_rows):
                while row not in live and (waiting or self.shared.ready):
                    live[row] = (self.shared.ready or waiting).popleft()
                    self._start(row, live[row])
                    self._take_out(live)
            for problem in live.values():
                self._check_limits(problem)
            yield from self._take_out(live)
            if not live:
                continue
            self._fit(live, min(most_rows, len(live) + len(waiting) + len(self.shared.ready)))
            self._step(live)
            yield from self._take_out(live)

    def _step(self, live: dict[int, Problem]) -> None:
        """One forward pass: every live frame is fed some of what is given to it, or its last token and a guess at the next."""
        rows, most = list(live), None
        if any(len(problem.stack[-1].pending) == 1 for problem in live.values()):
            most = 1 + self.draft  # rows that write take few tokens: given segments are fed to the others piece by piece
        if not self.draft:
            # Given segments go ahead of single tokens: the rows that only write would pay for the padding.
            rows, most = [row for row, problem in live.items() if len(problem.stack[-1].pending) > 1] or rows, None
        chunks, n_guessed, wanted = [], [], []
        for row in rows:
            problem, frame = live[row], live[row].stack[-1]
            chunk, guess = frame.pending[:most], []
            if len(chunk) == len(frame.pending) and most:
                room = min(most, self.engine.max_seq_len - len(frame.tokens)) - len(chunk)
                total, segment = problem.counts.tokens_generated, len(frame.writing)  # one more than is guessed will be written
                left = min(self.limits.max_tokens - total, self.limits.max_segment_tokens - segment) - 1
                guess = frame.lookup.guess(min(room, left))
            chunks.append(chunk + guess)
            n_guessed.append(len(guess))
            wanted.append(1 + len(guess) if len(chunk) == len(frame.pending) else 0)
        self._make_room(self.engine.nbytes_for(rows, chunks))
        for row, chunk, guessed, written_ids in zip(rows, chunks, n_guessed, self.engine.feed(rows, chunks, wanted), strict=True):
            problem, frame = live[row], live[row].stack[-1]
            problem.counts.tokens_forwarded += len(chunk)
            problem.counts.tokens_guessed += guessed
            n_given = len(chunk) - guessed
            frame.tokens += frame.pending[:n_given]
            frame.pending = frame.pending[n_given:]
            if not written_ids:
                continue  # there is more to be given
            problem.counts.tokens_generated += len(written_ids)
            problem.counts.tokens_accepted += len(written_ids) - 1
            frame.tokens += written_ids[:-1]  # these are in the cache already; the last one is to be fed
            if written_ids[-1] == self.tokenizer.eos_id:
                frame.writing += written_ids[:-1]
                frame.lookup.extend(written_ids[:-1])
                self._segment_written(row, problem)
            else:
                frame.pending = [written_ids[-1]]
                frame.writing += written_ids
                frame.lookup.extend(written_ids)

    def _start(self, row: int, problem: Problem) -> None:
        """Get a problem going in a row: a new one, or one that has waited for another to be done with what it called."""
        problem.parked = False
        if not problem.stack:
            self._push(row, problem, problem.prompt)
        elif problem.called:
            self._call(row, problem, problem.called)
        else:
            self._restore(row, problem)

    def _take_out(self, live: dict[int, Problem]) -> list[Problem]:
        """Free the rows of the problems that have ended, which are returned, and of those that wait for another one."""
        idle = [row for row, problem in live.items() if problem.ending or problem.parked]
        for row in idle:
            self.engine.clear(row)
        return [problem for problem in map(live.pop, idle) if problem.ending]

    # The mechanism.

    def _push(self, row: int, problem: Problem, prompt: str) -> None:
        """A fresh context for a prompt: nothing of the caller's is in it."""
        self.engine.clear(row)
        ids = self.tokenizer.start(prompt)
        caller = problem.stack[-1].lookup if problem.stack else None  # for guesses only: what is fed is the prompt alone
        frame = Frame(len(problem.stack), [given(prompt)], [], ids, Lookup(ids, caller))
        problem.stack.append(frame)
        problem.counts.frames += 1
        problem.counts.tokens_prompt += len(ids)
        problem.deepest = max(problem.deepest, frame.depth)
        self.shared.begun(problem, prompt)
        if self.keep_frames:
            problem.frames.append(frame)
        self.on_segment(problem, frame, frame.segments[0])

    def _segment_written(self, row: int, problem: Problem) -> None:
        """The model has ended a segment: it is a call, or the frame's answer."""
        frame = problem.stack[-1]
        text, frame.writing = self.tokenizer.decode(frame.writing), []
        frame.segments.append(written(text))
        self.on_segment(problem, frame, frame.segments[-1])
        _, call, callee = text.rpartition(CALL)
        if call:
            if not callee.endswith("\n") or "\n" in callee[:-1] or not callee.strip():
                self._fail(problem, "bad-call")
            elif len(problem.stack) >= self.limits.max_depth:
                self._fail(problem, "max-depth")
            else:
                self._suspend(row, frame)
                self._call(row, problem, callee[:-1] + SOLUTION)
        elif not return_value(text).strip():
            self._fail(problem, "no-answer")
        else:
            frame.ending, frame.value = "answer", return_value(text)
            self.on_segment(problem, frame, None)
            problem.stack.pop()
            for other in self.shared.ended(problem, frame):
                self._return(other, frame.value)
            if problem.stack:
                self._return(problem, frame.value)
                self._restore(row, problem)
            else:
                problem.ending, problem.text = "answer", text

    def _call(self, row: int, problem: Problem, prompt: str) -> None:
        """Have a subproblem solved for the suspended top frame: in a frame of its own, or by what has been or is being done."""
        problem.called = None
        share = self.limits.share and self.engine.greedy
        if share and prompt in self.shared.values:
            problem.counts.frames_shared += 1
            self._return(problem, self.shared.values[prompt])
            self._restore(row, problem)
        elif share and self.shared.wait(problem, prompt):
            problem.called, problem.parked = prompt, True
        else:
            self._push(row, problem, prompt)

    def _return(self, problem: Problem, value: str) -> None:
        """Append a callee's value to the suspended context that called: as a given segment."""
        frame, text = problem.stack[-1], returned(value)
        frame.segments.append(given(text))
        frame.pending = self.tokenizer.segment(text)
        frame.lookup.extend(frame.pending)
        problem.counts.tokens_returned += len(frame.pending)
        self.on_segment(problem, frame, frame.segments[-1])

    def _suspend(self, row: int, frame: Frame) -> None:
        frame.saved = self.engine.take(row)
        self.suspended[id(frame)] = frame
        self.suspended_bytes += _nbytes(frame.saved)
        self._make_room(self.engine.nbytes)

    def _make_room(self, live_bytes: int) -> None:
        """Out of memory: the oldest frames forget their keys and values, as they resume last. They will be fed again."""
        while self.suspended_bytes + live_bytes > self.limits.cache_bytes and self.suspended:
            self._forget(next(iter(self.suspended.values())))
        self.peak_bytes = max(self.peak_bytes, self.suspended_bytes + live_bytes)

    def _fit(self, live: dict[int, Problem], wanted: int) -> None:
        """Fewer rows where the live contexts have outgrown the memory, and more again when there is room for twice as many.

        The longest contexts stay. The others are put back, to be fed again. Where no more than half of the rows are wanted, the
        others go: an idle row is computed with as well, or those in use are copied out at every step.
        """
        n_rows, frames = self.engine.n_rows, {row: problem.stack[-1] for row, problem in live.items()}
        # Not more than this is in use after the next step: it feeds what is pending, or a piece of it, and guesses.
        length = max(len(frame.tokens) + len(frame.pending) for frame in frames.values()) + self.draft
        fit = max(1, self.limits.cache_bytes // self.engine.row_bytes(length))
        if fit < n_rows:
            rows = sorted(live, key=lambda row: len(frames[row].tokens), reverse=True)
            for row in rows[fit:]:
                live[row].parked = True
                self.shared.ready.append(live[row])
            self._take_out(live)
        elif 2 * wanted <= n_rows:
            fit = wanted
        elif n_rows < wanted and fit >= 2 * n_rows:
            fit = min(2 * n_rows, wanted)
        else:
            return
        self.engine.keep(list(live), fit)
        problems = list(live.values())
        live.clear()
        live.update(enumerate(problems))

    def _forget(self, frame: Frame) -> None:
        if frame.saved is not None:
            self.suspended_bytes -= _nbytes(frame.saved)
            frame.saved = None
            del self.suspended[id(frame)]

    def _restore(self, row: int, problem: Problem) -> None:
        """Make the suspended top frame live again: on top of its own cache, or by feeding it once more."""
        frame = problem.stack[-1]
        if self.engine.row_bytes(len(frame.tokens)) * self.engine.n_rows > self.limits.cache_bytes:
            self._forget(frame)  # as long as it is, it would make all rows too long
        if frame.saved is not None:
            self.engine.put(row, frame.saved)
            self._forget(frame)
        else:
            self.engine.clear(row)
            problem.counts.tokens_refed += len(frame.tokens)
            frame.pending, frame.tokens = frame.tokens + frame.pending, []

    def _fail(self, problem: Problem, reason: str) -> None:
        """End the live frame, and with it all that wait for it."""
        while problem.stack:
            frame = problem.stack.pop()
            self._forget(frame)
            frame.ending = reason
            self.shared.ended(problem, frame)
            self.on_segment(problem, frame, None)
        problem.ending = reason

    def _check_limits(self, problem: Problem) -> None:
        frame = problem.stack[-1]
        if len(frame.tokens) + len(frame.pending) > self.engine.max_seq_len:
            self._abandon(problem, "context-full")
        elif problem.counts.tokens_generated >= self.limits.max_tokens or len(frame.writing) >= self.limits.max_segment_tokens:
            self._abandon(problem, "max-tokens")

    def _abandon(self, problem: Problem, reason: str) -> None:
        frame = problem.stack[-1]
        if frame.writing:
            frame.segments.append(written(self.tokenizer.decode(frame.writing)))
            self.on_segment(problem, frame, frame.segments[-1])
        self._fail(problem, reason)


class Shared:
    """What is known of subproblems, and who is at which: so that the same prompt is run once, for all problems that call it.

    Under greedy decoding the value of a frame depends on its prompt alone. A problem waits for another one unless that one,
    in turn, waits for it; where the frame that is waited for fails, those that wait try for themselves.
    """

    def __init__(self):
        self.values: dict[str, str] = {}  # prompt -> value
        self.at: dict[str, Problem] = {}  # prompt -> the problem that runs it
        self.waiting: dict[str, list[Problem]] = {}  # prompt -> problems that wait for its value
        self.ready: deque[Problem] = deque()  # that need wait no longer, and have no row

    def begun(self, problem: Problem, prompt: str) -> None:
        self.at.setdefault(prompt, problem)

    def wait(self, problem: Problem, prompt: str) -> bool:
        """Whether the problem is to wait for another one that runs this prompt."""
        if prompt not in self.at:
            return False
        other = self.at[prompt]
        while other is not None and other is not problem:
            other = self.at.get(other.called) if other.called else None
        if other is problem:  # which would wait for ever
            return False
        self.waiting.setdefault(prompt, []).append(problem)
        return True

    def ended(self, problem: Problem, frame: Frame) -> list[Problem]:
        """A frame has ended: those that waited for it go on. Returns them if there is a value to give them."""
        prompt = frame.segments[0].text
        if frame.ending == "answer":
            self.values[prompt] = frame.value
        if self.at.get(prompt) is not problem:
            return []
        del self.at[prompt]
        released = self.waiting.pop(prompt, [])
        self.ready += released
        if frame.ending != "answer":
            return []
        for other in released:
            other.called = None
            other.counts.frames_shared += 1
        return released


class Lookup:
    """Guesses what a frame writes next, as most of it is copied from what stands before (prompt-lookup decoding).

    It may stand in the caller's context as well. Keeps a few *places* from which the text may be copied on, each with a degree of
    trust: the number of tokens in a row that it foretold. Where one fails, the copy may have left something out, replaced a token
    or put one in, and goes on from near there. A guess costs little where it is wrong, and changes no token: the model checks all
    of it in one forward pass, and what it would have written itself is what counts.
    """

    SIZES = (6, 4, 3, 2)  # of the n-grams that places are looked up by, the longest first
    N_PLACES = 6
    SKIP = 5  # tokens that a copy may leave out: an item of a list

    def __init__(self, ids: list[int], caller: "Lookup | None" = None):
        self.ids: list[int] = caller.ids[caller.start :] if caller else []  # the caller's own, then this frame's
        self.start = len(self.ids)
        self.after: dict[tuple[int, ...], int] = {}  # n-gram -> place after its latest occurrence that something follows
        self.caller = caller  # it is suspended: what it knows stays as it is
        self.places: dict[int, float] = {}  # where the next token may stand -> trust, the most trusted first
        for token in ids:
            self._append(token)
        self.extend([])

    def _append(self, token: int) -> None:
        for n in self.SIZES:  # these occurrences are followed by this token
            if n <= len(self.ids):
                self.after[tuple(self.ids[-n:])] = len(self.ids)
        self.ids.append(token)

    def extend(self, ids: list[int]) -> None:
        for token in ids:
            places = {p + 1: trust + 1 for p, trust in self.places.items() if self.ids[p : p + 1] == [token]}
            failed = [p for p in self.places if p + 1 not in places]
            if failed:
                near = self.ids[failed[0] + 1 : failed[0] + 1 + self.SKIP]
                if token in near:
                    places.setdefault(failed[0] + near.index(token) + 2, 0.5)
                places.setdefault(failed[0] + 1, 0.0)  # replaced: not trusted before it has foretold something
                places.setdefault(failed[0], 0.0)  # put in
            self._append(token)
            self.places = places
        for n in self.SIZES:
            ngram = tuple(self.ids[-n:])
            place = self.after.get(ngram)
            if place is None and self.caller:
                place = self.caller.after.get(ngram, 0) - self.caller.start
                place = place if place > 0 else None  # else: there is none, or it is in the caller's caller
            if place is not None:
                self.places.setdefault(place, 0.3 * n)
                break
        self.places = dict(sorted(self.places.items(), key=lambda x: -x[1])[: self.N_PLACES])

    def guess(self, n_tokens: int) -> list[int]:
        """At most n_tokens; the fewer, the less the place is trusted."""
        for place, trust in self.places.items():
            if n_tokens > 0 and trust > 0 and place < len(self.ids):
                return self.ids[place : place + min(n_tokens, int(1 + 2 * trust))]
        return []


def _nbytes(saved: tuple[Tensor, Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in saved)


class Engine:
    """The model and the KV cache of the live frames, one a row. Greedy, unless temperature is above 0."""

    def __init__(self, model: LLaMA, *, temperature: float = 0.0, seed: int = 0):
        self.model, self.temperature, self.greedy = model.eval(), temperature, temperature <= 0
        self.dtype = model.tok_embeddings.weight.dtype
        self.max_seq_len = model.config.max_seq_len
        self.generator = torch.Generator(device=model.device).manual_seed(seed)
        self.reset(0)

    def reset(self, n_rows: int) -> None:
        self.cache = KVCache(self.model.config, n_rows, device=self.model.device, dtype=self.dtype)

    def rows_for(self, prompt_tokens: int, limits: Limits) -> int:
        """How many problems to begin with: so many that half of the memory takes live contexts of four times their prompts.

        The other half is for suspended contexts. Where live ones grow longer, the decoder makes do with fewer rows.
        """
        return max(1, min(limits.batch, limits.cache_bytes // (2 * self.row_bytes(4 * prompt_tokens))))

    def row_bytes(self, length: int) -> int:
        """What a row of a live cache takes if the longest context has this length."""
        return KVCache.round_up(length) * KVCache.bytes_per_position(self.model.config, self.dtype)

    @property
    def n_rows(self) -> int:
        return len(self.cache.lengths)

    @property
    def nbytes(self) -> int:
        return _nbytes((self.cache.keys, self.cache.values))

    def nbytes_for(self, rows: list[int], chunks: list[list[int]]) -> int:
        """What the live cache will take once these chunks are in."""
        lengths = self.cache.lengths.tolist()
        longest = max(*lengths, *(lengths[row] + len(chunk) for row, chunk in zip(rows, chunks, strict=True)))
        return self.n_rows * self.row_bytes(max(self.cache.capacity, longest))

    def keep(self, rows: list[int], n_rows: int) -> None:
        """These rows alone, numbered from 0, of n_rows in all."""
        self.cache.keep(rows, n_rows)

    def clear(self, row: int) -> None:
        self.cache.lengths[row] = 0

    @torch.inference_mode()  # the cache grows in `feed`, and what is made there can be written to only here
    def take(self, row: int) -> tuple[Tensor, Tensor]:
        return self.cache.take(row)

    @torch.inference_mode()
    def put(self, row: int, saved: tuple[Tensor, Tensor]) -> None:
        self.cache.put(row, saved)

    @torch.inference_mode()
    def feed(self, rows: list[int], chunks: list[list[int]], wanted: list[int] | None = None) -> list[list[int]]:
        """Append chunks[i] to row rows[i]; return the tokens that the model then writes there, for each row.

        wanted[i] says at how many of the last places of the chunk: 0 if more is to be given, 1 (the default), or 1 + g if the
        last g tokens are guesses. Of these only the ones that the model would have written are kept, with the token
        that it writes after them.
        """
        n_rows, device = self.n_rows, self.model.device
        T = max(map(len, chunks))
        wanted = wanted or [1] * len(rows)
        chunks_in, wanted_in = chunks, wanted
        whole = 2 * len(rows) > n_rows
        if whole:  # in the order of the rows; those with nothing to do are fed no tokens: cheaper than copying the others out
            by_row = dict(zip(rows, zip(chunks, wanted, strict=True), strict=True))
            chunks_in, wanted_in = zip(*(by_row.get(r, ([], 0)) for r in range(n_rows)), strict=True)
        tokens = torch.tensor([c + [0] * (T - len(c)) for c in chunks_in], device=device)
        n_new = torch.tensor([len(c) for c in chunks_in], device=device)
        first = torch.tensor([len(c) - w for c, w in zip(chunks_in, wanted_in, strict=True)], device=device)
        place = torch.arange(T, device=device)
        select = (place >= first[:, None]) & (place < n_new[:, None])
        index = None if whole else torch.tensor(rows, device=device)
        logits = self.model(tokens, cache=self.cache, rows=index, n_new=n_new, select=select).float()  # [sum of wanted, V]
        chosen = self.choose(logits)
        results, rejected, start = [], [], 0
        for chunk, w in zip(chunks_in, wanted_in, strict=True):
            choices, guesses = chosen[start : start + w], chunk[len(chunk) - w + 1 :] if w else []
            start += w
            right = 0
            while right < len(guesses) and choices[right] == guesses[right]:
                right += 1
            results.append(choices[: right + 1])
            rejected.append(len(guesses) - right)
        if any(rejected):
            self.cache.shorten(torch.tensor(rejected, device=device), index)
        return [results[r] for r in rows] if whole else results

    def choose(self, logits: Tensor) -> list[int]:
        """The next token at each place, from logits [N, V]."""
        if self.greedy:
            return logits.argmax(dim=-1).tolist()
        logits = (logits - logits.max(dim=-1, keepdim=True).values) / self.temperature
        return torch.multinomial(logits.softmax(-1), 1, generator=self.generator)[:, 0].tolist()


def free_bytes(device: torch.device) -> int:
    """Half of the memory that is free on the device; of a computer at most 8 GiB, so that batches are the same on many, and 2 GiB
    where it cannot be told (not on Linux).
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] // 2
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):  # not on Linux
        return Limits.cache_bytes
    return min(free // 2, 8 * 1024**3)


def cache_bytes(kv_budget: float | None, device: torch.device) -> int:
    """Bytes for keys and values, from a budget in GiB or from what is free."""
    return free_bytes(device) if kv_budget is None else int(kv_budget * 1024**3)


def bounds(task, problems: Sequence, method: str, tokenizer: Tokenizer) -> dict[str, int]:
    """Limits for problems whose solution is known: 100 and 1.25 times the most tokens that the oracle writes for one of
    them, in all and in a segment; on the stack one frame more than it has contexts.

    What goes beyond has gone astray. One context that goes on to the model's end would hold up all that run beside it.
    """
    total = longest = contexts = 0
    for problem in problems:
        levels = task.levels(problem, method)
        sizes = [len(tokenizer.segment(s.text)) + 1 for level in levels for s in task.context(level, method) if s.written]
        total, longest, contexts = max(total, sum(sizes)), max(longest, *sizes), max(contexts, len(levels))
    return dict(max_tokens=100 + total * 5 // 4, max_segment_tokens=100 + longest * 5 // 4, max_depth=contexts + 1)


# --- the command line --------------------------------------------------------------------------------------------


@dataclass
class RecurseConfig:
    """Solve one problem and show the call stack as it grows and shrinks."""

    prompt: Annotated[str, tyro.conf.Positional]
    """the problem, as in: 73199 + 21439"""
    method: Literal["baseline", "scratchpad", "retuning"] = "retuning"
    adapter: Path | None = None
    """folder of an adapter (default: the newest of this task and method under runs/, else the shipped one)"""
    base: Path | None = None
    """folder of the base model (default: the one that the adapter was trained on)"""
    json: bool = False
    """print the frames as one JSON object instead"""
    stats: bool = False
    """print what work was done, too"""
    kv_budget: float | None = None
    """GiB for keys and values; a suspended context that does not fit is encoded again (default: by the free memory)"""
    temperature: float = 0.0
    """0 is greedy; above that, sample"""
    seed: int = 0
    """of the sampling"""
    max_depth: int = Limits.max_depth
    """frames on the stack"""
    max_tokens: int = Limits.max_tokens
    """tokens written, over all frames"""
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"


def load_solver(adapter: Path, base: Path | None, device: torch.device, dtype: torch.dtype) -> tuple[LLaMA, Tokenizer]:
    """A base with an adapter merged into it, and its tokenizer."""
    _, trained_on = lora.read_adapter_config(adapter)
    if base is None and (not trained_on or not llama.find_folder(Path(trained_on)).is_dir()):
        raise UserError(
            f"{adapter}: its base, {trained_on or 'not named'}, is no folder here; name the base's folder with --base"
        )
    model, tokenizer = llama.load(llama.find_folder(base or Path(trained_on)), device=device, dtype=dtype)
    lora.load_adapter(model, adapter)
    lora.merge(model)
    return model, tokenizer


def frame_to_json(frame: Frame) -> dict:
    return {
        "depth": frame.depth,
        "segments": [{"text": s.text, "written": s.written} for s in frame.segments],
        "ending": frame.ending,
        "value": frame.value,
    }


def print_segment(problem: Problem, frame: Frame, segment: Segment | None) -> None:
    """One line a segment, indented by depth; what the model wrote is marked, and bold on a terminal."""
    indent = "  " * frame.depth
    if segment is None:
        if frame.ending != "answer":
            print(f"{indent}ended: {frame.ending}")
        return
    text = segment.text.replace("\n", "⏎")
    if segment.written and sys.stdout.isatty():
        text = f"\033[1m{text}\033[0m"
    print(f"{indent}{'writes' if segment.written else 'given '} {text}", flush=True)


def main(c: RecurseConfig) -> int:
    if not c.prompt.strip():
        raise UserError('the prompt is empty; expected a problem such as "73199 + 21439"')
    if not (0 <= c.temperature < math.inf and c.max_depth >= 1 and c.max_tokens >= 1 and 0 <= c.seed < 2**62):
        raise UserError("expected --temperature and --seed of 0 or more, --max-depth and --max-tokens of 1 or more")
    if c.kv_budget is not None and not 0 < c.kv_budget < math.inf:
        raise UserError(f"--kv-budget {c.kv_budget}: expected GiB above 0")
    found = [(task, p) for task in TASKS.values() if (p := task.from_text(c.prompt)) is not None]
    if not found:
        examples = "; ".join(t.example for t in TASKS.values())
        raise UserError(f"{c.prompt[:60]!r} is no problem of a known task; expected one such as: {examples}")
    task, problem = found[0]
    adapter = c.adapter or lora.find_adapter(task.name, c.method)
    device = llama.pick_device(c.device)
    model, tokenizer = load_solver(adapter, c.base, device, llama.pick_dtype(c.dtype, device))
    prompt = task.prompt(problem, c.method)
    size, most = len(tokenizer.start(prompt)), model.config.max_seq_len
    if size > most:
        raise UserError(f"the prompt has {size} tokens, the model takes {most}; give a shorter problem")
    decoder = Decoder(
        Engine(model, temperature=c.temperature, seed=c.seed),
        tokenizer,
        Limits(max_depth=c.max_depth, max_tokens=c.max_tokens, cache_bytes=cache_bytes(c.kv_budget, device)),
        keep_frames=True,
        on_segment=None if c.json else print_segment,
    )
    began = time.monotonic()
    (result,) = decoder.solve([prompt])
    seconds = time.monotonic() - began
    work = asdict(result.counts) | {
        "peak_cache_bytes": decoder.peak_bytes,
        "seconds": round(seconds, 3),
        "tokens_generated_per_second": round(result.counts.tokens_generated / seconds, 1),
    }
    answer = task.parse(result.text, c.method) if result.ending == "answer" else None
    right = result.ending == "answer" and task.judge(problem, result.text, c.method)
    if c.json:
        report = {
            "task": task.name, "method": c.method, "adapter": str(adapter), "prompt": prompt, "ending": result.ending,
            "answer": answer, "oracle": task.oracle(problem), "correct": right, "deepest": result.deepest,
            "work": work, "frames": [frame_to_json(f) for f in result.frames],
        }  # fmt: skip
        print(json.dumps(report, ensure_ascii=False))
    else:
        unread = "its answer is not readable" if result.ending == "answer" else result.ending
        verdict = f"answer: {answer}" if answer is not None else f"no answer: {unread}"
        truth = "right" if right else f"wrong, it is {task.oracle(problem)}"
        counts = result.counts
        print(f"{verdict} ({truth}); {counts.frames} frames, {counts.tokens_generated} tokens written, by {adapter}")
        if c.stats:
            print("\n".join(f"{key:>28} {value:,}" for key, value in work.items()))
    return 0 if answer is not None else 1


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # not every terminal has the sign for a newline
    llama.run_script(lambda: main(tyro.cli(RecurseConfig)))
