"""The call stack: with a scripted model (perfect, nearly perfect, hostile), and with real caches."""

import json
import random
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from conftest import BASE, ROOT, ScriptedEngine, perfect, random_model

import lora
import model as llama
from recurse import ENDINGS, Decoder, Engine, Limits, bounds, load_solver
from tasks import DP, METHODS, TASKS, Addition


def problems(lengths, seed=0, task=Addition):
    rng = random.Random(seed)
    return [task.sample(rng, n) for n in lengths]


def solve(decoder, method, todo, task=Addition):
    results = sorted(decoder.solve([task.prompt(p, method) for p in todo]), key=lambda r: r.index)
    assert [r.index for r in results] == list(range(len(todo)))
    assert all(r.ending in ENDINGS for r in results)
    return results


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_a_perfect_model_is_always_right(task, method, tokenizer):
    """On 69 problems. (On 1,000, lists of 200 items among them: `PYTHONPATH=. python tests/test_recurse.py`.)"""
    longest = 60 if task is DP else 200  # its contexts are long: 60 elements take a minute of Python less than 200
    check_perfect_model(task, method, tokenizer, [1, 2, 3, 15, 40, longest, 7, 1, 30], 60)


def check_perfect_model(task, method, tokenizer, lengths, n_short):
    """All is solved; every context that the decoder builds is the training context, token for token (asserted by `perfect`)."""
    todo = problems([*lengths, *random.Random(0).choices(range(1, 21), k=n_short)], task=task)
    limits = Limits(batch=8, share=False, **bounds(task, todo, method, tokenizer))
    decoder = Decoder(ScriptedEngine(perfect(tokenizer, method, task)), tokenizer, limits, keep_frames=True)
    for p, r in zip(todo, solve(decoder, method, todo, task), strict=True):
        assert r.ending == "answer" and task.judge(p, r.text, method)
        levels = task.levels(p, method)
        assert r.counts.frames == len(levels)
        assert r.deepest == (0 if method != "retuning" else p.length - (task is not DP))
        contexts = [frame.segments for frame in r.frames]
        assert contexts == [task.context(q, method) for q in levels]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_a_single_wrong_token_anywhere_is_noticed(task, method, tokenizer):
    """Each token that a perfect model writes is replaced by another, in turn; the answer is never scored as right."""
    p = next(p for p in problems([4] * 20, seed=1, task=task) if task.oracle(p) != "0")  # "0" is what replaces words
    count = solve(Decoder(ScriptedEngine(perfect(tokenizer, method, task)), tokenizer), method, [p], task)[
        0
    ].counts.tokens_generated
    digits = tokenizer.segment("0123456789")
    for wrong in range(count):
        right, calls = perfect(tokenizer, method, task), 0

        def write(ids, wrong=wrong, right=right):
            nonlocal calls
            calls += 1
            if calls <= wrong:
                return right(ids)
            if calls == wrong + 1:
                token = right(ids)
                return digits[(digits.index(token) + 1) % 10] if token in digits else digits[0]
            try:
                return right(ids)
            except (AssertionError, AttributeError):  # off the script: whatever it writes, it must stop
                return tokenizer.eos_id

        (r,) = solve(Decoder(ScriptedEngine(write), tokenizer), method, [p], task)
        assert r.ending != "answer" or not task.judge(p, r.text, method), f"token {wrong} of {count}"


def writer(tokenizer, *texts):
    """Write these segments, one after the other, whatever is asked (the last one for ever)."""
    state = {"segment": 0, "left": None}

    def write(ids):
        if state["left"] is None:
            state["left"] = [*tokenizer.segment(texts[min(state["segment"], len(texts) - 1)]), tokenizer.eos_id]
        token = state["left"].pop(0)
        if not state["left"]:
            state["segment"] += 1
            state["left"] = None
        return token

    return write


@pytest.mark.parametrize(
    ("texts", "ending"),
    [
        (["Carry 0, Output 3"], "answer"),
        ([""], "no-answer"),
        ([" "], "no-answer"),
        (["Append it.\nAnswer: "], "no-answer"),
        (["Call: 1 + 2"], "bad-call"),
        (["Call: \n"], "bad-call"),
        (["Call:  \n"], "bad-call"),
        (["Call: 1\n2\n"], "bad-call"),
        (["Call: 1 + 2\n"], "max-depth"),
        (["Call: 1 + 2\n", ""], "no-answer"),
        (["Call: 1 + 2\n", "3", "Call: 1 + 2\n"], "max-depth"),
    ],
)
def test_every_ending_has_its_name(texts, ending, tokenizer):
    limits = Limits(max_depth=20, share=False)  # the script is no function of the context
    decoder = Decoder(ScriptedEngine(writer(tokenizer, *texts)), tokenizer, limits, keep_frames=True)
    (r,) = decoder.solve(["1 + 2\nSolution: "])
    assert r.ending == ending
    assert (r.text is not None) == (ending == "answer")
    assert r.frames[-1].ending == ending and all(f.ending for f in r.frames)
    assert decoder.suspended_bytes == 0, "memory of failed frames was not given back"


def test_endless_text_and_endless_calls_end(tokenizer):
    digit = tokenizer.segment("7")[0]
    (r,) = Decoder(ScriptedEngine(lambda ids: digit, max_seq_len=300), tokenizer).solve(["1 + 2\nSolution: "])
    assert r.ending == "context-full" and r.counts.tokens_generated < 300
    (r,) = Decoder(ScriptedEngine(lambda ids: digit), tokenizer, Limits(max_tokens=500)).solve(["1 + 2\nSolution: "])
    assert r.ending == "max-tokens" and r.counts.tokens_generated == 500
    (r,) = Decoder(ScriptedEngine(lambda ids: digit), tokenizer, Limits(max_segment_tokens=50)).solve(["1 + 2\nSolution: "])
    assert r.ending == "max-tokens" and r.counts.tokens_generated == 50
    # A binary tree of calls has 2 ** depth frames: the limit on tokens is what ends it.
    texts = ["Call: 1 + 2\n"] * 30 + ["3", "Call: 1 + 2\n"] * 100_000
    limits = Limits(max_tokens=5000, share=False)
    (r,) = Decoder(ScriptedEngine(writer(tokenizer, *texts)), tokenizer, limits).solve(["1 + 2\nSolution: "])
    assert r.ending in ("max-tokens", "max-depth")
    (r,) = Decoder(ScriptedEngine(lambda ids: digit, max_seq_len=5), tokenizer).solve(["1 + 2\nSolution: "])
    assert r.ending == "context-full" and r.counts.tokens_generated == 0, "a prompt longer than the context"


@pytest.mark.parametrize("share", [True, False])
def test_hostile_output(share, tokenizer):
    """10,000 contexts that a hostile model writes: all end, for a named reason, within the limits, and give memory back.

    Random tokens, endless digits, calls to itself, to each other and to longer problems, half a call, nothing but EOS,
    bytes that are not UTF-8.
    """
    calls = [f"Call: {a} + {b}\n" for a in (1, 2, 33, 456) for b in (1, 2, 789)]
    texts = [*calls, "Call: 9", "Call: ", "Return: 1\nAnswer: 2", "7" * 300, "", "3", "Carry 0, Output 3", "\n"]
    not_utf8 = [tokenizer.sp.piece_to_id(f"<0x{b:02X}>") for b in (0xFF, 0xC3, 0xE2, 0x80)]
    plans = {}  # a context -> what is written there: equal contexts go on alike, as a model's do

    def write(ids):
        rest = plans.get(tuple(ids))
        if rest is None:
            rng = random.Random(f"{batch} {ids}")  # so few problems are called that in one batch none may call itself
            noise = rng.choices([*not_utf8, *range(tokenizer.vocab_size)], k=rng.choice((0, 0, 0, 0, 5, 30)))
            rest = [*tokenizer.segment(rng.choice(texts)), *noise, tokenizer.eos_id]
        plans[(*ids, rest[0])] = rest[1:] or None
        return rest[0]

    frames, endings = 0, set()
    for batch in range(15):
        plans.clear()
        limits = Limits(max_depth=4, max_tokens=150, batch=40, share=share)
        decoder = Decoder(ScriptedEngine(write, max_seq_len=120), tokenizer, limits)
        results = list(decoder.solve([f"{batch} + {i}\nSolution: " for i in range(500)]))
        assert len(results) == 500
        assert all(r.deepest < 4 and r.counts.tokens_generated <= 150 for r in results)
        assert decoder.suspended_bytes == 0 and not decoder.suspended and not decoder.shared.at and not decoder.shared.waiting
        frames += sum(r.counts.frames for r in results)
        endings |= {r.ending for r in results}
    assert endings == set(ENDINGS) if not share else endings <= set(ENDINGS) and len(endings) >= 4
    assert frames >= (5_000 if share else 10_000)


def test_what_is_shared_is_run_once(tokenizer):
    """The same answers as without sharing, with fewer contexts: in step, one after the other, and for the same problem twice."""
    todo = problems([1, 9, 9, 2, 12, 5] * 10, task=TASKS["parity"])
    todo += todo[:3]

    def run(**limits):
        engine = ScriptedEngine(perfect(tokenizer, "retuning", TASKS["parity"]))
        results = solve(Decoder(engine, tokenizer, Limits(**limits)), "retuning", todo, TASKS["parity"])
        return [(r.ending, r.text) for r in results], results

    plain, apart = run(share=False)
    assert all(ending == "answer" for ending, _ in plain)
    levels = {level.bits for p in todo for level in TASKS["parity"].levels(p, "retuning")[1:]}
    for batch in (1, 7, 63):
        answers, shared = run(batch=batch)
        assert answers == plain
        # Each level that is called is run once; but the problems themselves run whether or not another one has called them.
        assert sum(r.counts.frames for r in shared) <= len(levels) + len(todo) < sum(r.counts.frames for r in apart)
        assert sum(r.counts.frames_shared for r in shared) > 30


def test_problems_that_call_each_other_do_not_wait_for_ever(tokenizer):
    """a calls b and b calls a, and both are asked: each has to find its end by itself."""
    other = {"1 + 2": "2 + 1", "2 + 1": "1 + 2"}

    def write(ids):
        prompt, _, written = tokenizer.sp.decode(ids).partition("\nSolution: ")
        text = [*tokenizer.segment(f"Call: {other[prompt]}\n"), tokenizer.eos_id]
        return text[len(tokenizer.segment(written)) if written else 0]

    limits = Limits(max_depth=9)
    for prompts in (["1 + 2\nSolution: "], ["1 + 2\nSolution: ", "2 + 1\nSolution: "] * 3):
        results = list(Decoder(ScriptedEngine(write), tokenizer, limits).solve(prompts))
        assert [r.ending for r in results] == ["max-depth"] * len(prompts)


class UncachedEngine(ScriptedEngine):
    """The plainest decoding: the whole context is encoded again for every token, one context at a time."""

    def __init__(self, model):
        def write(ids):
            with torch.inference_mode():
                return model(torch.tensor([ids]))[0, -1].argmax().item()

        super().__init__(write, model.config.max_seq_len)


def traces(engine, tokenizer, limits, prompts):
    """The tokens of every context. (Which of them are shared depends on the batch.)"""
    decoder = Decoder(engine, tokenizer, replace(limits, share=False), keep_frames=True)
    results = sorted(decoder.solve(prompts), key=lambda r: r.index)
    return [(r.ending, [(f.depth, f.tokens, f.ending) for f in r.frames]) for r in results]


class ForcedEngine(Engine):
    """The real model and cache, but what is written is the oracle's; the model's own choices are kept."""

    def __init__(self, model, write):
        super().__init__(model)
        self.script, self.texts, self.choices = write, {}, []

    def keep(self, rows, n_rows):
        super().keep(rows, n_rows)
        self.texts = {row: self.texts[old] for row, old in enumerate(rows)}

    def clear(self, row):
        super().clear(row)
        self.texts[row] = []

    def take(self, row):
        return (*super().take(row), torch.tensor(self.texts[row]))

    def put(self, row, saved):
        super().put(row, saved[:2])
        self.texts[row] = saved[2].tolist()

    def feed(self, rows, chunks, wanted):
        chosen = super().feed(rows, chunks, wanted)
        for row, chunk, tokens in zip(rows, chunks, chosen, strict=True):
            self.texts[row] = self.texts[row] + chunk
            self.choices += [(self.texts[row], token) for token in tokens]
        return [[self.script(self.texts[row])] if w else [] for row, w in zip(rows, wanted, strict=True)]


@pytest.mark.parametrize("batch", [1, 2, 5])
@pytest.mark.parametrize("method", METHODS)
def test_every_choice_is_that_of_the_whole_context(method, batch, tokenizer):
    """Rows freed and filled again, suspended and resumed: at each place the model saw just the context at hand."""
    model = random_model()
    engine = ForcedEngine(model, perfect(tokenizer, method))
    todo = problems([4, 1, 6, 3, 5, 2, 7], seed=8)
    limits = Limits(batch=batch, draft=0)  # it is not the model that writes: its guesses cannot be checked
    for p, r in zip(todo, solve(Decoder(engine, tokenizer, limits), method, todo), strict=True):
        assert Addition.judge(p, r.text, method)
    assert len(engine.choices) > 30
    for ids, token in engine.choices:
        with torch.inference_mode():
            logits = model(torch.tensor([ids]))[0, -1]
        assert logits.max() - logits[token] < 1e-3, "not the choice of the model on this context"


def test_rows_in_any_order_and_padding_beyond_the_longest_context():
    model = random_model(max_seq_len=128)
    engine, parallel = Engine(model), Engine(model)
    engine.reset(2)
    parallel.reset(2)
    a, b = list(range(10, 110)), list(range(200, 203))
    assert engine.feed([1, 0], [a, b]) == parallel.feed([0, 1], [b, a])[::-1]
    assert (
        engine.feed([0, 1], [list(range(300, 350)), [7] * 10]) == parallel.feed([1, 0], [[7] * 10, list(range(300, 350))])[::-1]
    )
    with pytest.raises(ValueError, match="exceeds"):
        engine.feed([1], [[7] * 50])


@pytest.fixture(scope="module")
def solver():
    adapter = BASE / "adapters/addition-retuning"
    model, tokenizer = llama.load(BASE)
    lora.load_adapter(model, adapter)
    lora.merge(model)
    return model, tokenizer


def test_cached_equals_uncached_equals_batch_of_one(solver):
    """Token for token, in fp32, on 100 problems with the shipped adapter."""
    model, tokenizer = solver
    prompts = [Addition.prompt(p, "retuning") for p in problems([1 + i % 6 for i in range(100)], seed=3)]
    batched = traces(Engine(model), tokenizer, Limits(batch=32), prompts)
    assert sum(ending == "answer" for ending, _ in batched) >= 95, "the comparison should be about real call stacks"
    assert batched == traces(Engine(model), tokenizer, Limits(batch=1), prompts)
    assert batched == traces(Engine(model), tokenizer, Limits(batch=100, draft=0), prompts), "guessing changed a token"
    assert batched == traces(UncachedEngine(model), tokenizer, Limits(batch=8, draft=0), prompts)


def test_little_memory_gives_the_same_tokens(solver):
    """With room for next to nothing, suspended frames are forgotten and fed again; the cache stays within its bound."""
    model, tokenizer = solver
    prompts = [Addition.prompt(p, "retuning") for p in problems([9] * 6, seed=4)]
    plenty = traces(Engine(model), tokenizer, Limits(), prompts)
    engine = Engine(model)
    bound = 6 * 128 * llama.KVCache.bytes_per_position(model.config, torch.float32)
    engine.rows_for = lambda *_: 6
    decoder = Decoder(engine, tokenizer, Limits(cache_bytes=bound, share=False), keep_frames=True)
    most, feed = 0, engine.feed

    def watch(rows, chunks, wanted):
        nonlocal most
        tokens = feed(rows, chunks, wanted)
        most = max(most, decoder.suspended_bytes + engine.nbytes)
        return tokens

    engine.feed = watch
    results = sorted(decoder.solve(prompts), key=lambda r: r.index)
    assert [(r.ending, [(f.depth, f.tokens, f.ending) for f in r.frames]) for r in results] == plenty
    assert most <= bound
    assert decoder.peak_bytes == most
    full = list(Decoder(Engine(model), tokenizer, Limits(share=False)).solve(prompts))
    refed = sum(r.counts.tokens_refed for r in results)
    assert refed > 0 == sum(r.counts.tokens_refed for r in full), "nothing was fed again"


def test_number_of_problems_at_once_follows_the_memory():
    engine = Engine(random_model())
    position = llama.KVCache.bytes_per_position(engine.model.config, torch.float32)
    assert position == 2 * 2 * 2 * 8 * 4
    assert engine.rows_for(16, Limits(cache_bytes=position * 64 * 2 * 10)) == 10, "half of it for four times the prompts"
    assert engine.rows_for(17, Limits(cache_bytes=position * 128 * 2 * 10)) == 10, "in steps of 64"
    assert engine.rows_for(20, Limits(cache_bytes=1)) == 1
    assert not list(Decoder(engine, llama.Tokenizer(BASE / "tokenizer.model")).solve([]))


@pytest.mark.parametrize("rows", [2.5, 1.0])
def test_live_contexts_that_outgrow_the_memory_are_put_back(rows):
    """Scratchpads are much longer than their prompts: fewer run at once, the same tokens come out, and rows come back."""
    model, tokenizer = load_solver(BASE / "adapters/addition-scratchpad", None, torch.device("cpu"), torch.float32)
    rng = random.Random(6)
    lengths = [2, 9, 3, 9, 1, 2, 4, 3, 1, 2, 1, 1]
    prompts = [Addition.prompt(Addition.sample(rng, n), "scratchpad") for n in lengths]
    solve_limits = Limits(batch=8, max_tokens=1000)
    plenty = traces(Engine(model), tokenizer, solve_limits, prompts)
    longest = max(len(tokens) for _, frames in plenty for _, tokens, _ in frames)
    engine = Engine(model)
    engine.rows_for = lambda *_: 8
    bound, numbers = int(rows * engine.row_bytes(longest)), []
    decoder = Decoder(engine, tokenizer, replace(solve_limits, cache_bytes=bound, share=False), keep_frames=True)
    feed = engine.feed

    def watch(*args):
        written = feed(*args)
        assert engine.nbytes <= bound or engine.n_rows == 1
        numbers.append(engine.n_rows)
        return written

    engine.feed = watch
    results = sorted(decoder.solve(prompts), key=lambda r: r.index)
    assert [(r.ending, [(f.depth, f.tokens, f.ending) for f in r.frames]) for r in results] == plenty
    assert sum(r.counts.tokens_refed for r in results) > 0
    assert min(numbers) <= max(1, rows), "rows were not taken away"
    assert any(before < after for before, after in pairwise(numbers)), "rows did not return"


def test_rows_that_are_not_wanted_go():
    """Where most problems have ended, no idle rows are computed with; what is written stays the same."""
    model, tokenizer = load_solver(BASE / "adapters/addition-scratchpad", None, torch.device("cpu"), torch.float32)
    rng = random.Random(7)
    prompts = [Addition.prompt(Addition.sample(rng, n), "scratchpad") for n in (1, 1, 2, 1, 9, 2, 1, 7)]
    one_by_one = traces(Engine(model), tokenizer, Limits(batch=1), prompts)
    engine, used = Engine(model), []
    feed = engine.feed

    def watch(rows, *args):
        used.append((len(rows), engine.n_rows))
        return feed(rows, *args)

    engine.feed = watch
    assert traces(engine, tokenizer, Limits(batch=8, draft=0), prompts) == one_by_one
    assert used[0] == (8, 8) and used[-1] == (1, 1)
    assert all(n_rows < 2 * n for n, n_rows in used), "half of the rows or more were idle"


def test_loading_leaves_torchs_compiler_alone():
    """To import it takes longer than all else that `recurse.py` does before it prints."""
    code = (
        "import sys; from pathlib import Path; import torch; from recurse import load_solver;"
        f"load_solver(Path({str(BASE)!r}) / 'adapters/addition-retuning', None, torch.device('cpu'), torch.float32);"
        "print('torch._dynamo' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "False\n", done.stdout + done.stderr


def test_sampling_is_seeded():
    tokenizer = llama.Tokenizer(BASE / "tokenizer.model")

    def draw(seed, temperature=1.0):
        engine = Engine(random_model(), temperature=temperature, seed=seed)
        return traces(engine, tokenizer, Limits(max_depth=3, max_tokens=60), ["1 + 2\nSolution: "] * 3)

    assert draw(1) == draw(1) != draw(2)
    assert draw(1, 0.0) == draw(2, 0.0)


def run(*args):
    return subprocess.run([sys.executable, ROOT / "recurse.py", *args], capture_output=True, text=True, timeout=100)


def test_command_line():
    adapter = ("--adapter", BASE / "adapters/addition-retuning", "--dtype", "float32")
    out = run("7319 + 439", *adapter)
    assert out.returncode == 0 and out.stderr == ""
    lines = out.stdout.splitlines()
    assert lines[0] == "given  7319 + 0439⏎Solution: "
    assert lines[1] == "writes Call: 319 + 439⏎"
    assert lines[2] == "  given  319 + 439⏎Solution: "
    assert lines[-1].startswith("answer: 7758 (right); 4 frames")
    report = json.loads(run("7319 + 439", "--json", *adapter).stdout)
    assert report["correct"] and report["answer"] == report["oracle"] == "7758" and len(report["frames"]) == 4
    assert report["frames"][3]["segments"][1] == {"text": "Carry 1, Output 8", "written": True}


if __name__ == "__main__":
    shipped = llama.Tokenizer(BASE / "tokenizer.model")
    for task in TASKS.values():
        for method in METHODS:
            check_perfect_model(task, method, shipped, [40, 60, 100, 200], 996)
            print(
                f"{task.name} by {method}: 1,000 problems of up to length 200, all contexts as in training, all solved",
                flush=True,
            )
