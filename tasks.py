"""The tasks: problems, oracles, the text of every context, and the parser of answers.

A *context* is a list of segments, each given to the model or written by it. The same contexts are used for training
(loss on the written segments alone) and are rebuilt by the decoder in recurse.py, segment by segment.
A task is one class: `sample` draws a problem, `context` writes what each method is trained on, `prompt` is how a
problem is put to a model, and `judge` compares what came back with the oracle. `TASKS` lists them.
"""

import hashlib
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, replace

from model import UserError

METHODS = ("baseline", "scratchpad", "retuning")

# The protocol of a recursive context, shared by all tasks and used by the decoder (recurse.py). A written segment that
# holds CALL and ends with a newline is a call; the callee's prompt is what follows CALL.
CALL = "Call: "
SOLUTION = "\nSolution: "  # ends the prompt of a context that may think: scratchpad, retuning
ANSWER = "\nAnswer: "  # ends the prompt of a baseline


@dataclass(frozen=True)
class Segment:
    text: str
    written: bool  # by the model (these carry the loss), or given to it
    meaning: str | None = None  # of a lesson: the same in words that the base knows, in as many tokens
    ends: bool = True  # it is to be learned that the model stops after what it has written


Context = list[Segment]


def given(text: str) -> Segment:
    return Segment(text, written=False)


def written(text: str) -> Segment:
    return Segment(text, written=True)


def returned(value: str) -> str:
    """The given segment that carries a callee's value back into the suspended context."""
    return f"Return: {value}{ANSWER}"


def return_value(text: str) -> str:
    """What a finished context returns to its caller: what follows the last `Answer: ` that the model wrote, or all of it."""
    return text.rpartition("Answer: ")[2]


def held_out(key: str) -> bool:
    """A fixed tenth of all problems, by hash: these are evaluated and never trained on."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest()) % 10 == 0


class Addition:
    """Integer addition of two operands, zero-padded to the same number of digits."""

    name = "addition"
    example = "73199 + 21439"
    train_lengths = range(1, 16)
    ood_lengths = (5, 10, 15, 20, 30, 45, 60)

    @dataclass(frozen=True)
    class Problem:
        a: str
        b: str

        @property
        def length(self) -> int:
            return len(self.a)

    @staticmethod
    def problem(a: str, b: str) -> "Addition.Problem":
        """Two strings of decimal digits; the shorter is padded with zeros."""
        for x in (a, b):
            if not (isinstance(x, str) and x.isascii() and x.isdigit() and len(x) <= 4000):  # Python's int() takes 4300
                raise UserError(f"addition: expected operands that are strings of at most 4000 decimal digits, found {x!r:.60}")
        n = max(len(a), len(b))
        return Addition.Problem(a.zfill(n), b.zfill(n))

    @staticmethod
    def from_json(fields: dict) -> "Addition.Problem":
        missing = {"a", "b"} - fields.keys()
        if missing:
            raise UserError(
                f"addition: the field {min(missing)!r} is missing; expected {{'task': 'addition', 'a': '73199', 'b': '21439'}}"
            )
        return Addition.problem(fields["a"], fields["b"])

    @staticmethod
    def from_text(text: str) -> "Addition.Problem | None":
        a, plus, b = text.partition(" + ")
        if plus and all(x.isascii() and x.isdigit() for x in (a, b)):
            return Addition.problem(a, b)
        return None

    @staticmethod
    def held_out(p: "Addition.Problem") -> bool:
        """In either order of the operands. One-digit problems are only a hundred, and base cases: none is held out."""
        return p.length > 1 and held_out(f"{min(p.a, p.b)}+{max(p.a, p.b)}")

    @staticmethod
    def sample(rng: random.Random, length: int) -> "Addition.Problem":
        """A problem to evaluate: both operands have exactly `length` digits, so the first is not 0 (unless length is 1)."""
        low = 10 ** (length - 1) if length > 1 else 0
        while True:
            p = Addition.Problem(str(rng.randrange(low, 10**length)), str(rng.randrange(low, 10**length)))
            if length == 1 or Addition.held_out(p):
                return p

    @staticmethod
    def oracle(p: "Addition.Problem") -> str:
        return str(int(p.a) + int(p.b))

    @staticmethod
    def level(p: "Addition.Problem") -> tuple[int, str]:
        """Carry and output of adding the operands as they stand: the output has as many digits as they have."""
        total = str(int(p.a) + int(p.b)).zfill(p.length + 1)
        return int(total[0]), total[1:]

    @staticmethod
    def prompt(p: "Addition.Problem", method: str) -> str:
        return f"{p.a} + {p.b}" + (ANSWER if method == "baseline" else SOLUTION)

    @staticmethod
    def context(p: "Addition.Problem", method: str) -> Context:
        """The context of one problem; for retuning, of one level: deeper levels are problems of their own."""
        start = given(Addition.prompt(p, method))
        if method == "baseline":
            return [start, written(Addition.oracle(p))]
        suffix = [Addition.Problem(p.a[-k:], p.b[-k:]) for k in range(1, p.length + 1)]
        value = ["Carry {}, Output {}".format(*Addition.level(q)) for q in suffix]
        if method == "scratchpad":
            return [start, written("\n".join(value))]
        if p.length == 1:
            return [start, written(value[0])]
        return [start, written(f"{CALL}{p.a[1:]} + {p.b[1:]}\n"), given(returned(value[-2])), written(value[-1])]

    @staticmethod
    def levels(p: "Addition.Problem", method: str) -> list["Addition.Problem"]:
        """The problem and, for retuning, every smaller one that it calls."""
        n = p.length if method == "retuning" else 1
        return [Addition.Problem(p.a[k:], p.b[k:]) for k in range(n)]

    @staticmethod
    def solved(p: "Addition.Problem", method: str) -> list["Addition.Problem"]:
        """The problems whose solution its context holds: none of them may be held out if it is trained on."""
        n = {"baseline": 1, "retuning": min(2, p.length), "scratchpad": p.length}[method]
        return [Addition.Problem(p.a[k:], p.b[k:]) for k in range(n)]

    @staticmethod
    def digits(rng: random.Random, n: int) -> str:
        """An operand to train on, of n digits; a quarter of the time each digit is likely to be that before it."""
        stay = 0.5 if rng.random() < 0.25 else 0.0
        digits = rng.choice("123456789" if n > 1 else "0123456789")
        while len(digits) < n:
            digits += digits[-1] if rng.random() < stay else rng.choice("0123456789")
        return digits

    @staticmethod
    def training_context(rng: random.Random, method: str) -> Context:
        """One training example. Every method sees the same lengths: 1 to 15, each about equally often.

        Operands have up to 15 digits and need not be equally long; a level is their last n digits, so that
        leading zeros occur as they do in the levels of a longer problem. A quarter of the operands have many runs, as 7755556:
        that is where a digit is lost or doubled in copying, and uniform digits seldom have them.
        """
        n = rng.choice(Addition.train_lengths)
        while True:
            longest = rng.randint(n, Addition.train_lengths[-1])
            sizes = [longest, longest if rng.random() < 0.7 else rng.randint(1, longest)]
            rng.shuffle(sizes)
            a, b = (Addition.digits(rng, size).zfill(longest)[-n:] for size in sizes)
            p = Addition.Problem(a, b)
            if not any(map(Addition.held_out, Addition.solved(p, method))):
                return Addition.context(p, method)

    @staticmethod
    def parse(text: str, method: str) -> str | None:
        """The sum in a finished context's text, or None where it holds none."""
        if method == "baseline":
            return text if text.isascii() and text.isdigit() else None
        line = return_value(text).rpartition("\n")[2]
        carry, comma, output = line.removeprefix("Carry ").partition(", Output ")
        if not (line.startswith("Carry ") and comma and carry in ("0", "1") and output.isascii() and output.isdigit()):
            return None
        return "1" + output if carry == "1" else output

    @staticmethod
    def judge(p: "Addition.Problem", text: str, method: str) -> bool:
        """Right means the number is right; leading zeros, which padded operands bring, do not matter."""
        found = Addition.parse(text, method)
        return found is not None and (found.lstrip("0") or "0") == Addition.oracle(p)


def integers(text: str) -> tuple[int, ...] | None:
    """The integers of a list written as Python writes it, `[3, -2, 5]`; None for anything else."""
    if not (text.startswith("[") and text.endswith("]") and text.isascii()):
        return None
    items = text[1:-1].split(", ")
    if not all(re.fullmatch(r"0|-?[1-9][0-9]{0,17}", item) for item in items):
        return None
    return tuple(map(int, items))


class Parity:
    """Parity of a list of bits: 1 if the number of ones is odd."""

    name = "parity"
    example = "What is the parity of [0, 1, 1]?"
    train_lengths = range(1, 22)
    ood_lengths = (10, 21, 30, 42, 60, 84)

    @dataclass(frozen=True)
    class Problem:
        bits: tuple[int, ...]

        @property
        def length(self) -> int:
            return len(self.bits)

    @staticmethod
    def from_json(fields: dict) -> "Parity.Problem":
        bits = fields.get("bits")
        if not (isinstance(bits, list) and bits and all(type(b) is int and b in (0, 1) for b in bits)):
            raise UserError(f"parity: expected 'bits', a list of 0 and 1 that is not empty, found {bits!r:.60}")
        return Parity.Problem(tuple(bits))

    @staticmethod
    def from_text(text: str) -> "Parity.Problem | None":
        m = re.fullmatch(r"What is the parity of (\[.*\])\?", text)
        bits = integers(m[1]) if m else None
        return Parity.Problem(bits) if bits and set(bits) <= {0, 1} else None

    @staticmethod
    def held_out(p: "Parity.Problem") -> bool:
        """Of lists of 5 bits and fewer there are too few to hold any out: a model has seen them all."""
        return p.length > 5 and held_out(f"parity {p.bits}")

    @staticmethod
    def sample(rng: random.Random, length: int) -> "Parity.Problem":
        while True:
            p = Parity.Problem(tuple(rng.choices((0, 1), k=length)))
            if length <= 5 or Parity.held_out(p):
                return p

    @staticmethod
    def oracle(p: "Parity.Problem") -> str:
        return str(sum(p.bits) % 2)

    @staticmethod
    def question(p: "Parity.Problem") -> str:
        return f"What is the parity of {list(p.bits)}?"

    @staticmethod
    def prompt(p: "Parity.Problem", method: str) -> str:
        return Parity.question(p) + (ANSWER if method == "baseline" else SOLUTION)

    @staticmethod
    def context(p: "Parity.Problem", method: str) -> Context:
        start = given(Parity.prompt(p, method))
        if method == "scratchpad":
            running = [str(sum(p.bits[: k + 1]) % 2) for k in range(p.length)]
            return [start, written(f"Compute one element at a time. {' '.join(running)}")]
        if method == "baseline" or p.length == 1:
            return [start, written(Parity.oracle(p))]
        rest = Parity.Problem(p.bits[1:])
        return [
            start,
            written(f"{CALL}{Parity.question(rest)}\n"),
            given(returned(Parity.oracle(rest))),
            written(Parity.oracle(p)),
        ]

    @staticmethod
    def levels(p: "Parity.Problem", method: str) -> list["Parity.Problem"]:
        n = p.length if method == "retuning" else 1
        return [Parity.Problem(p.bits[k:]) for k in range(n)]

    @staticmethod
    def solved(p: "Parity.Problem", method: str) -> list["Parity.Problem"]:
        """The problems whose solution its context holds; a scratchpad solves every list that this one starts with."""
        if method == "scratchpad":
            return [Parity.Problem(p.bits[: k + 1]) for k in range(p.length)]
        return Parity.levels(p, method)[:2]

    @staticmethod
    def training_context(rng: random.Random, method: str) -> Context:
        n = rng.choice(Parity.train_lengths)
        while True:
            p = Parity.Problem(tuple(rng.choices((0, 1), k=n)))
            if not any(map(Parity.held_out, Parity.solved(p, method))):
                return Parity.context(p, method)

    @staticmethod
    def parse(text: str, method: str) -> str | None:
        if method == "scratchpad":
            steps = text.removeprefix("Compute one element at a time. ")
            text = steps[-1:] if steps != text and re.fullmatch("[01]( [01])*", steps) else ""
        return text if text in ("0", "1") else None

    @staticmethod
    def judge(p: "Parity.Problem", text: str, method: str) -> bool:
        """By the answer alone; but a scratchpad that did not come to the last bit has none, and would be right half the time."""
        if method == "scratchpad" and text.removeprefix("Compute one element at a time. ").count(" ") != p.length - 1:
            return False
        return Parity.parse(text, method) == Parity.oracle(p)


class DP:
    """The largest sum of a subsequence without neighbours (Dziri et al. 2023): every item is marked 1, taken, or 2.

    A problem may take nothing, for a sum of 0. Of several best solutions the lexicographically smallest marks count.
    In re-tuning a problem makes two calls: for the array of best sums of every suffix, then for the marks. Both are
    recursive. Their prompts are problems of a kind of their own.
    """

    name = "dp"
    example = "Compute the maximum sum of nonadjacent subsequences of [3, 2, 1]"
    train_lengths = range(2, 6)
    ood_lengths = (2, 3, 4, 5, 10, 20, 30)
    VALUES = range(-5, 6)

    @dataclass(frozen=True)
    class Problem:
        items: tuple[int, ...]
        kind: str = "whole"  # or "sums", or "marks"
        can_use: bool = True  # of "marks": whether the item before was not taken

        @property
        def length(self) -> int:
            return len(self.items)

    @staticmethod
    def from_json(fields: dict) -> "DP.Problem":
        items = fields.get("items")
        if not (isinstance(items, list) and items and all(type(i) is int and abs(i) < 10**9 for i in items)):
            raise UserError(f"dp: expected 'items', a list of integers that is not empty, found {items!r:.60}")
        return DP.Problem(tuple(items))

    @staticmethod
    def from_text(text: str) -> "DP.Problem | None":
        """A whole problem, or what a level calls."""
        for kind, opening in (("whole", "Compute the maximum sum of nonadjacent subsequences of "), ("sums", "Create dp array ")):
            items = integers(text.removeprefix(opening))
            if items and text.startswith(opening):
                return DP.Problem(items, kind)
        m = re.fullmatch(r"Create chosen indices array: sum array (.*), item array (.*), can use item (True|False)", text)
        if m and (items := integers(m[2])) and integers(m[1]) == tuple(DP.sums(items)):
            return DP.Problem(items, "marks", m[3] == "True")
        return None

    @staticmethod
    def held_out(p: "DP.Problem") -> bool:
        """By the list: all kinds of problem about it. Single items are all trained on."""
        return p.length > 1 and held_out(f"dp {p.items}")

    @staticmethod
    def sample(rng: random.Random, length: int) -> "DP.Problem":
        while True:
            p = DP.Problem(tuple(rng.choices(DP.VALUES, k=length)))
            if length == 1 or DP.held_out(p):
                return p

    @staticmethod
    def sums(items: tuple[int, ...]) -> list[int]:
        """The best sum of every suffix: max(leave the first, take it and leave its neighbour), never below 0."""
        dp = [0, 0]
        for item in reversed(items):
            dp.insert(0, max(dp[0], item + dp[1], 0))
        return dp[:-2]

    @staticmethod
    def marks(items: tuple[int, ...], can_use: bool = True) -> list[int]:
        """1 for every item that is taken: if it can be, and a best sum takes it."""
        dp, marks = [*DP.sums(items), 0, 0], []
        for i, item in enumerate(items):
            take = can_use and dp[i] == item + dp[i + 2]
            marks.append(1 if take else 2)
            can_use = not take
        return marks

    @staticmethod
    def oracle(p: "DP.Problem") -> str:
        return str(DP.sums(p.items) if p.kind == "sums" else DP.marks(p.items, p.can_use))

    @staticmethod
    def question(p: "DP.Problem") -> str:
        items = list(p.items)
        if p.kind == "whole":
            return f"Compute the maximum sum of nonadjacent subsequences of {items}"
        if p.kind == "sums":
            return f"Create dp array {items}"
        return f"Create chosen indices array: sum array {DP.sums(p.items)}, item array {items}, can use item {p.can_use}"

    @staticmethod
    def prompt(p: "DP.Problem", method: str) -> str:
        return DP.question(p) + (ANSWER if method == "baseline" else SOLUTION)

    @staticmethod
    def callees(p: "DP.Problem") -> list["DP.Problem"]:
        """The problems that a problem calls, in order."""
        if p.kind == "whole":
            return [DP.Problem(p.items, "sums"), DP.Problem(p.items, "marks")]
        if p.length == 1:
            return []
        can_use = p.kind == "sums" or DP.marks(p.items, p.can_use)[0] == 2
        return [DP.Problem(p.items[1:], p.kind, can_use)]

    @staticmethod
    def context(p: "DP.Problem", method: str) -> Context:
        start = given(DP.prompt(p, method))
        if method == "baseline":
            return [start, written(DP.oracle(p))]
        if method == "scratchpad":
            return [start, written(DP.scratchpad(p))]
        rule = "If there is only 1 item, return 1 if we should use it else 2."
        callees = DP.callees(p)
        if not callees:
            text = "Return [0] if negative else element." if p.kind == "sums" else rule
            return [start, written(f"{text}\nAnswer: {DP.oracle(p)}")]
        before, after = {
            "whole": ("", ""),
            "sums": ("Call with array minus first element. ", "Append max(return[0], array[0] + return[1]) to return.\nAnswer: "),
            "marks": (
                f"{rule} If we should use the first item to get the sum, call False else True. ",
                "Append 1 if False else 2.\nAnswer: ",
            ),
        }[p.kind]
        context = [start]
        for callee in callees:
            context += [written(f"{before}{CALL}{DP.question(callee)}\n"), given(returned(DP.oracle(callee)))]
        return [*context, written(after + DP.oracle(p))]

    @staticmethod
    def scratchpad(p: "DP.Problem") -> str:
        """Every sum with its values put in, from the last to the first; then why each item is taken or not; then the marks."""
        a, n = p.items, p.length
        dp = [*DP.sums(a), 0, 0]
        lines = []
        for i in reversed(range(n)):
            if i == n - 1:
                lines.append(f"dp[{i}] = max(input[{i}], 0) = max({a[i]}, 0) = {dp[i]}")
            elif i == n - 2:
                lines.append(f"dp[{i}] = max(input[{i}], input[{i + 1}], 0) = max({a[i]}, {a[i + 1]}, 0) = {dp[i]}")
            else:
                put_in = f"max({dp[i + 1]}, {a[i]} + {dp[i + 2]}, 0)"
                lines.append(f"dp[{i}] = max(dp[{i + 1}], input[{i}] + dp[{i + 2}], 0) = {put_in} = {dp[i]}")
        for i, mark in enumerate(DP.marks(a)):
            same = dp[i] == a[i] + dp[i + 2]
            left, right = (f"input[{i}]", f"{a[i]}") if i >= n - 2 else (f"input[{i}] + dp[{i + 2}]", f"{a[i]} + {dp[i + 2]}")
            sign = "==" if same else "!="
            lines.append(
                f"Since dp[{i}] {sign} {left} ({dp[i]} {sign} {right}) {'and' if mark == 1 else 'or'} can_use_next_item == "
                f"{mark == 1}, we store output[{i}] = {mark}. We update can_use_next_item = {mark != 1}."
            )
        return "\n".join(lines) + f"\nReconstructing all together, output={DP.marks(a)}."

    @staticmethod
    def levels(p: "DP.Problem", method: str) -> list["DP.Problem"]:
        """The problem and all that it calls, in the order of the calls."""
        called = DP.callees(p) if method == "retuning" else []
        return [p, *(level for callee in called for level in DP.levels(callee, method))]

    @staticmethod
    def solved(p: "DP.Problem", method: str) -> list["DP.Problem"]:
        """The problems whose solution its context holds; a scratchpad finds the sums of every list that it ends with."""
        if method == "scratchpad":
            return [DP.Problem(p.items[k:]) for k in range(p.length)]
        return [p, *(DP.callees(p) if method == "retuning" else ())]

    @staticmethod
    def draw(rng: random.Random, n: int) -> tuple[int, ...]:
        """A list to train on: a third are uniform. Of four ninths it is hard to tell whether a best sum takes the first item, and
        the longer ones of the others return a sum of two digits. In uniform lists as short as these, both are rare.
        """
        kind = rng.choice(("any", "any", "any", "close", "close", "close", "close", "large", "large")) if n > 1 else "any"
        if kind == "close":
            return DP.close(rng, n)
        while True:
            items = tuple(rng.choices(range(2, 6) if kind == "large" else DP.VALUES, k=n))
            if kind == "any" or n < 4 or DP.sums(items)[1] > 9:
                return items

    @staticmethod
    def close(rng: random.Random, n: int) -> tuple[int, ...]:
        """A list whose first item is worth 2 at most more or less than what is lost by taking it: all such pairs as often, where
        they can be had; mostly one before a larger one, as any other that is not negative is taken. (Of uniform lists that begin
        with 0 seven are ties for each in which taking it loses 1.)
        """
        pairs = [(first, lost) for first in range(6) for lost in range(6) if abs(first - lost) <= 2]
        while True:
            first, lost = rng.choice(pairs)
            rising = first < 5 and rng.random() < 0.6
            for _ in range(50):
                rest = rng.choices(DP.VALUES, k=n - 1)
                if rising:
                    rest[0] = rng.randint(first + 1, 5)
                leave, take, *_ = [*DP.sums(rest), 0]
                if leave - take == lost:
                    return (first, *rest)

    @staticmethod
    def training_context(rng: random.Random, method: str) -> Context:
        """Every method sees lists of the same lengths: each about equally often, but for retuning in proportion to its length.

        There are so few short lists that an adapter seems to learn by heart what it is to call with them; scratchpads are learned
        better if they are not that rare (see the README). For retuning marks are more than twice as many as sums: whether a best
        sum takes the first item is decided there, which takes the longest to learn. Whole problems, which leave nothing to be
        decided, are few; so are marks whose first item cannot be used, against those where it can.
        """
        kind = rng.choices(("whole", "sums", "marks"), (4, 9, 20))[0] if method == "retuning" else "whole"
        lengths = range(DP.train_lengths[0] if kind == "whole" else 1, DP.train_lengths[-1] + 1)
        n = rng.choices(lengths, lengths)[0] if method == "retuning" else rng.choice(lengths)
        while True:
            p = DP.Problem(DP.draw(rng, n), kind, can_use=kind != "marks" or rng.random() < 0.65)
            if not any(map(DP.held_out, DP.solved(p, method))):
                return DP.context(p, method)

    # A LLaMA knows what the words of a context mean. The shipped base knows no English, and from decisions alone its adapters
    # learn rules of thumb (compare the first two items), not what is said: take the first item if the best sum needs it.
    # This says it in the base's own words, and in as many tokens.
    MEANINGS = {
        "we should use the first item to get the sum, call False else True. Call: Create chosen indices array:": (
            "rest sum, item, can use item False if sum[0] == item[0] + sum[2] else True:"
        ),
        "sum array [": "sum sum [",
        "item array [": "item item [",
    }

    @staticmethod
    def lesson(rng: random.Random) -> Context:
        """A context of marks as far as the decision on the first item, which alone is to be learned from it.

        Of one that cannot be used the decision is True whatever the sums. That is not what the meaning says: there is none then.
        """
        while True:
            n = rng.choices(DP.train_lengths, DP.train_lengths)[0]
            p = DP.Problem(DP.draw(rng, n), "marks", can_use=rng.random() < 0.75)
            if not any(map(DP.held_out, DP.solved(p, "retuning"))):
                break
        prompt, call, *_ = DP.context(p, "retuning")
        head, space, decision = call.text.rpartition(" ")
        meanings = (DP.meaning(text) if p.can_use else None for text in (prompt.text, head))
        return [*map(Segment, (prompt.text, head), (False, False), meanings), written(space + decision)]

    @staticmethod
    def words(rng: random.Random) -> tuple[Context, int]:
        """A context whose words are to be learned. Each of its lists is some other one, or falls from a number below 100.

        So neither what is in a list nor its length says what follows it. Some end with the first item of a list, which is
        learned too: some of sums, where it is had from the array and what was returned, whosever that is, and all of marks,
        where the decision before it says it. As that is on what was in the lists, it is given.

        With it: how many times over the lists are to be crowded (see `train.crowd`). Which of two lists has come to its end, and
        which of two sentences is next, is told by words before it, attention to which grows thin after long ones.
        """

        def items() -> tuple[int, ...]:
            while True:
                p = DP.Problem(DP.draw(rng, rng.choice(DP.train_lengths)))
                if not DP.held_out(p):
                    return p.items

        def other(_: re.Match) -> str:
            if rng.random() < 0.5:
                top = rng.randrange(10, 100)
                return str(sorted(rng.choices(range(top + 1), k=rng.choice(DP.train_lengths)), reverse=True))
            return str(list(rng.choice((tuple, DP.sums, DP.marks))(items())))

        kind = rng.choices(("whole", "sums", "marks"), (1, 2, 1))[0]
        can_use = kind != "marks" or rng.random() < 0.65
        context = DP.context(DP.Problem(DP.draw(rng, DP.train_lengths[-1]), kind, can_use), "retuning")
        if kind == "marks":
            prompt, call, back, answer = context
            head, space, decision = call.text.rpartition(" ")
            head = Segment(head, written=True, ends=False)
            context = [prompt, head, given(space + decision), back, written(answer.text.partition(",")[0])]
        context = [replace(segment, text=re.sub(r"(?<= )\[.*?\]", other, segment.text)) for segment in context]
        if kind == "sums" and rng.random() < 0.4:
            p, sums = DP.Problem(items(), kind), DP.sums(items())
            context[0], context[2] = given(DP.prompt(p, "retuning")), given(returned(str(sums)))
            before = context[-1].text.rpartition("[")[0]
            context[-1] = written(f"{before}[{max(sums[0], p.items[0] + sums[1])}")
        return context, rng.choice((1, 2, 4, 8, 16))

    @staticmethod
    def meaning(text: str) -> str:
        for phrase, meaning in DP.MEANINGS.items():
            text = text.replace(phrase, meaning)
        return text

    @staticmethod
    def parse(text: str, method: str) -> str | None:
        """The list that is returned, or None."""
        if method == "scratchpad":
            text = text.rpartition("Reconstructing all together, output=")[2].removesuffix(".")
        elif method == "retuning":
            text = return_value(text)
        items = integers(text)
        return str(list(items)) if items else None

    @staticmethod
    def judge(p: "DP.Problem", text: str, method: str) -> bool:
        return DP.parse(text, method) == DP.oracle(p)


def _make_forms(
    rng: random.Random, words: tuple[str, ...], n: int = 48, bare: float = 0, names: tuple[str, ...] = ()
) -> list[tuple[list[str], list[int]]]:
    """For each form what is written before, between and after its lists, and whether a list goes without its first item.

    At least a share `bare` of them end with a list. Where there are names, items of them (name[0]) are among the words.
    """
    if names:
        marks = ("{}[{}]", "{}[{}])", "{}[{}],", "({}[{}],", "{}[{}] +", "{}[{}])")
        places = [mark.format(name, i) for name in names for i in (0, 1, 1, 2) for mark in marks]
        words = (*words, *rng.sample(places, len(words) // 2))
    forms = []
    for _ in range(n):
        cuts = [rng.choice((0, 0, 1)) for _ in range(rng.choice((1, 2, 2)))]
        phrases = [" ".join(rng.choices(words, k=rng.randint(1, 6)))]
        phrases += [rng.choice((",", ".", ":", "")) + " " + " ".join(rng.choices(words, k=rng.randint(1, 6))) for _ in cuts]
        if rng.random() < 0.5:
            phrases[-1] = rng.choice(("", ".", "?"))
        if bare and rng.random() < bare:
            phrases[-1] = ""
        forms.append((phrases, cuts))
    return forms


class Primer:
    """What the shipped base is trained on, in place of a web corpus: handling of text, and small arithmetic.

    Most contexts give one or two *records* (one or two sequences in some notation, joined by a delimiter or named), then ask
    for operations by keyword. Others ask for small arithmetic, values of short expressions of items of named lists, what the
    last of several flags says, or quotations of any text: what a base has never been asked to write is slow to learn for an
    adapter. The only sums are of two digits and a carry, and of an integer and one from -9 to 9. Forms are words around lists,
    known by a number. Every other reply follows from what is given: words straight before a sequence belong to its record, a
    colon ends those that do not.
    """

    name = "primer"
    WORDS = (
        "Solution Answer Return Call Output Carry Input Result Take Given Compute Value Array Item Name Start End State Data "
        "Row Text Alpha Beta Gamma What is the of in a to and for with this Sum List Number Step Next Left Right Create Use "
        "Find Write Total Query Note Task Entry array item sum index True False can use parity maximum chosen"
    ).split()
    DIGITS, LETTERS = "0123456789", "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    DELIMITERS = (" + ", " | ", " ; ", " - ", " and ", " / ", " * ", " to ")
    NOTATIONS = (("", "", ""), ("", " ", ""), ("", "-", ""), ("", ",", ""), ("(", " ", ")"), ("[", ", ", "]"))
    # How often each operation is asked for, among those that a record allows.
    OPERATIONS = {
        "copy": 2, "rest": 4, "chop": 1, "prepend": 3, "append": 1, "cons": 5, "heads": 2, "lasts": 1, "pick": 1,
        "field": 1, "swap": 1, "reverse": 1, "zip": 1, "grow": 1, "headsum": 2, "lastsum": 1, "topsum": 4,
    }  # fmt: skip

    COPIES = ("copy", "rest", "chop", "prepend", "append", "cons", "heads", "lasts", "field")  # operations, with a focus

    @dataclass(frozen=True)
    class Stage:
        """What is asked for in a part of the base's training, or in rehearsal while a task is learned."""

        parts: tuple[int, ...]  # how often contexts are sums, arithmetic, lists, flags, quotations, records, values, forms
        records: tuple[float, float, float] = (0.6, 0.7, 0.8)  # shares, added up: digits, letters, either in a notation
        lists: tuple[str, ...] = ("bits", "bits", "integers", "marks")  # the others
        named: float = 0.3  # share of records with names
        falling: float = 0.0  # share of falling ones among lists of integers
        steps: tuple[int, ...] = (2, 5, 9)  # how far these may fall
        runs: float = 0.0  # share of falling lists that mostly stay the same, and of other lists that have long runs
        few: float = 0.0  # share of lists of integers that have few different ones
        value_first: bool = True  # about named lists: a value is always asked for; else it may be
        several: bool = False  # ... and several, mostly of short lists or of first items; lists may be falling
        drill: bool = False  # arithmetic is a drill of expressions
        # Share of contexts about named lists where values mostly have a place in a longer reply, before a list or after two, and
        # where the lists stand in other text, among lists that do not count; and of forms that come before their lists.
        placed: float = 0.0
        akin: float = 0.0  # share of records and lists whose names share words
        copies: bool = False  # nothing but copies of records, in whole or in part
        forms: int = 48  # so many of the first forms
        choices: float = 0.0  # share of forms before their lists that are one of two, by whether a list has one item

    # A run from scratch begins with copies and single values; then come more arithmetic, whose tokens are few beside those of
    # copies, several values about the same lists, and in its second half all there is, values in longer replies and forms among
    # it. Of the six parts that follow it the first has names that share words, and more copies; the second and third have more
    # values of short lists; the others more forms: first those with items of lists, then long runs of items, then rare words.
    ALL = Stage(
        (5, 6, 24, 5, 3, 29, 18, 10), (0.5, 0.55, 0.62), lists=("bits", "integers", "integers", "integers", "marks"),
        named=0.45, falling=0.4, steps=(1, 2, 4, 5, 9), few=0.5, several=True, drill=True, placed=0.6,
    )  # fmt: skip
    STAGES = (
        Stage((10, 6, 24, 6, 7, 47, 0, 0), value_first=False),
        Stage((8, 28, 26, 6, 7, 25, 0, 0)),
        Stage((6, 14, 24, 6, 5, 27, 18, 0), falling=0.3, several=True, drill=True),
        ALL,
        replace(ALL, parts=(4, 4, 24, 4, 3, 40, 16, 8), records=(0.45, 0.48, 0.55), akin=0.6),
        replace(ALL, parts=(3, 4, 20, 3, 3, 38, 30, 6), records=(0.5, 0.53, 0.58), akin=0.6),
        replace(ALL, parts=(2, 3, 30, 3, 3, 32, 24, 10), records=(0.5, 0.53, 0.58), akin=0.6, forms=96),
        replace(ALL, parts=(2, 3, 32, 2, 2, 34, 13, 14), records=(0.3, 0.33, 0.38), akin=0.6, forms=96, runs=0.4),
        replace(
            ALL, parts=(2, 3, 28, 3, 5, 32, 13, 16), records=(0.3, 0.33, 0.38), akin=0.6, forms=144, runs=0.4, choices=0.3
        ),
    )  # fmt: skip
    STARTS = (0.0, 0.2, 0.35, 0.5)  # of the first stages, in parts of the run from scratch
    FOCUSED = {
        "digits": replace(STAGES[-1], parts=(1, 0, 0, 0, 0, 7, 0, 0), records=(0.6, 0.7, 0.8)),
        "bits": replace(STAGES[-1], parts=(0, 0, 0, 0, 0, 1, 0, 0), records=(0, 0, 0), lists=("bits",), copies=True),
        "integers": replace(
            STAGES[-1], parts=(0, 1, 5, 1, 0, 12, 3, 0), records=(0, 0, 0), lists=("integers", "integers", "marks"), copies=True
        ),
    }

    # Expressions as Python writes them, of items of named lists or of numbers; s is from -9 to 9. How often each is asked for,
    # and how often in the drill.
    EXPRESSIONS = (
        ("{x}", lambda x, y, s: x, 1, 0),
        ("{y} + {s}", lambda x, y, s: y + s, 1, 1),
        ("{s} + {y}", lambda x, y, s: s + y, 2, 2),
        ("max({x}, {y})", lambda x, y, s: max(x, y), 2, 1),
        ("max({x}, {s} + {y})", lambda x, y, s: max(x, s + y), 5, 5),
        ("max({x}, {s} + {y}, 0)", lambda x, y, s: max(x, s + y, 0), 1, 1),
        ("max({s}, 0)", lambda x, y, s: max(s, 0), 1, 0),
        ("{x} == {y}", lambda x, y, s: x == y, 1, 4),
        ("{x} == {s} + {y}", lambda x, y, s: x == s + y, 5, 8),
        ("False if {x} == {s} + {y} else True", lambda x, y, s: x != s + y, 2, 4),
        ("1 if {x} == {s} + {y} else 2", lambda x, y, s: 1 if x == s + y else 2, 2, 2),
    )
    LISTS = ("array", "item", "sum", "index", "return", "input", "value", "data", "x", "y")
    # For quotations; the tasks' own words are among them, and in no order.
    QUOTED = (
        *WORDS, *LISTS, *(
            "Append Append If Since We [0]) [1]) all and at by call chosen_indices dp element else first from get if "
            "indices is it max max maximum min minus negative new next no nonadjacent not of on one only or otherwise "
            "our Reconstructing return should so solve store subsequences subproblem take than that then there time to "
            "together true update us use_next_item was we when which why you"
        ).split(),
    )  # fmt: skip

    # Before named lists; without those that would make a task's prompt of them.
    SCATTERED = tuple(word for word in QUOTED if word not in ("dp", "item", "sum", "parity", "subsequences", "[0])", "[1])"))
    EVENLY = tuple(dict.fromkeys(QUOTED))
    RARE = tuple(sorted({*EVENLY} - {*WORDS, *LISTS}))
    FORMS = [
        *_make_forms(random.Random("forms"), QUOTED),
        *_make_forms(random.Random("places"), QUOTED, names=LISTS),
        *_make_forms(random.Random("rare"), RARE),
    ]
    REPLIES = [  # of the same number, to a list that comes in later
        *_make_forms(random.Random("replies"), QUOTED, bare=0.8),
        *_make_forms(random.Random("replied places"), QUOTED, bare=0.8, names=LISTS),
        *_make_forms(random.Random("replied rare"), RARE, bare=0.8),
    ]

    def __init__(self, max_items: int = 128, focus: str = "", stage: int = -1):
        self.max_items = max_items  # the longest sequence, in items: training lengthens it by and by
        self.stage = self.FOCUSED[focus] if focus else self.STAGES[stage]

    def training_context(self, rng: random.Random, method: str = "") -> Context:
        kinds = (
            self._sums, self._arithmetic, self._lists, self._flags, self._quotation, self._records, self._values, self._forms
        )  # fmt: skip
        return rng.choices(kinds, self.stage.parts)[0](rng)

    def _records(self, rng: random.Random) -> Context:
        """A record and operations on it; other records may come in between."""
        record = self._record(rng, short=False)
        first, latest = record, record
        text, out = "", []
        noise = " ".join(rng.choices(self.WORDS, k=rng.choice((0, 0, 1, 1, 2, 4))))
        head = f"{noise}: " if noise else ""
        budget = 8 * self.max_items  # tokens, roughly: a context need not be longer than the longest task's
        for step in range(rng.choice((1, 2, 2, 3, 4))):
            ask, reply = self._operation(rng, first, latest)
            label = rng.choice(self.WORDS) if rng.random() < 0.3 else ""
            prompt = f"{ask} as {label}: " if label else f"{ask}: "
            reply = f"{label}: {reply}\n" if label else reply
            if step == 0:
                text = (
                    f"{ask} {head}{latest.text}\n{rng.choice(self.WORDS)}: "
                    if not label and rng.random() < 0.3
                    else f"{head}{latest.text}\n{prompt}"
                )
            else:
                text = ("" if out[-1].text.endswith("\n") else "\n") + text + prompt
            out += [given(text), written(reply)]
            budget -= len(text) + len(reply)
            if budget < 3 * len(latest.text):
                break
            text = ""
            if rng.random() < 0.5:  # something new comes in, as a returned value does
                latest = self._record(rng, short=rng.random() < 0.3, like=first)
                text = f"{rng.choice(self.WORDS)}: {latest.text}\n"
        return out

    @dataclass
    class Record:
        fields: list[list[str]]  # items of each field
        names: list[str]  # a name for each field, or empty
        mark: str  # after a single named field
        flag: tuple[str, ...]  # name and value of a last field that is no sequence, or empty
        delimiter: str  # between fields without a name
        notation: tuple[str, str, str]
        alphabet: str

        def field(self, items: list[str]) -> str:
            opening, separator, closing = self.notation
            return opening + separator.join(items) + closing

        def write(self, fields: list[list[str]], flag: str = "") -> str:
            """With other fields, and another flag where one is given."""
            texts = [self.field(items) for items in fields]
            if not self.names:
                return self.delimiter.join(texts)
            texts = [f"{name} {text}" for name, text in zip(self.names, texts, strict=True)]
            if self.flag:
                return ", ".join([*texts, f"{self.flag[0]} {flag or self.flag[1]}"])
            return ", ".join(texts) + (self.mark if len(texts) == 1 else "")

        @property
        def text(self) -> str:
            return self.write(self.fields)

    def _length(self, rng: random.Random, cost: int = 1) -> int:
        longest = max(2, self.max_items // cost)
        return rng.randint(1, longest) if rng.random() < 0.25 else int((longest + 1) ** rng.random())

    def _items(self, rng: random.Random, alphabet: list[str], n: int) -> list[str]:
        """n items; a third of the time of low entropy, since runs and repeats are where copying by content fails."""
        integers = alphabet[0].startswith("-")
        if integers and self.stage.falling and rng.random() < self.stage.falling:
            return [str(i) for i in self._falling(rng, n)]
        if integers and self.stage.runs and rng.random() < self.stage.runs:
            return self._runs(rng, rng.choices(alphabet, k=rng.randint(2, 4)), n, rng.choice((4, 8, 12)))
        r = rng.random()
        if r < 0.66:
            return rng.choices(alphabet, k=n)
        few = rng.choices(alphabet, k=rng.randint(1, 3))
        if r < 0.78:
            return rng.choices(few, k=n)
        if r < 0.90:
            return self._runs(rng, alphabet, n, rng.choice((2, 3, 4, 8)))
        block = rng.choices(alphabet, k=rng.randint(2, 6))
        out = (block * n)[:n]
        for _ in range(rng.randint(0, 3)):
            out[rng.randrange(n)] = rng.choice(alphabet)
        return out

    @staticmethod
    def _runs(rng: random.Random, alphabet: list[str], n: int, longest: int) -> list[str]:
        """n items, the same one up to so many times."""
        out: list[str] = []
        while len(out) < n:
            out += [rng.choice(alphabet)] * rng.randint(1, longest)
        return out[:n]

    @staticmethod
    def _few(rng: random.Random) -> list[str]:
        """Integers around 0 to draw a list from, so few that they come again in it."""
        return [str(i) for i in range(-rng.randint(1, 9), rng.randint(1, 10))]

    def _falling(self, rng: random.Random, n: int) -> list[int]:
        """n integers, none larger than the one before, many the same."""
        step, stay, high = rng.choice(self.stage.steps), 0.0, 9
        if self.stage.runs and rng.random() < self.stage.runs:
            stay, high = rng.choice((0.2, 0.5, 0.8)), 30
        items = [rng.randint(-9, high)]
        while len(items) < n:
            items.append(items[-1] + (0 if stay and rng.random() < stay else max(0, rng.randint(-step, step))))
        return items[::-1]

    def _record(self, rng: random.Random, short: bool, like: "Primer.Record | None" = None) -> "Primer.Record":
        r = rng.random()
        digits, letters, others = self.stage.records
        if like is not None and r < 0.7:
            alphabet, notation = like.alphabet, like.notation
        elif r < digits:
            alphabet, notation = "digits", self.NOTATIONS[0]
        elif r < letters:
            alphabet, notation = "letters", self.NOTATIONS[0]
        elif r < others:
            alphabet, notation = rng.choice(("digits", "letters")), rng.choice(self.NOTATIONS[1:])
        else:
            alphabet, notation = rng.choice(self.stage.lists), self.NOTATIONS[5]
        symbols = {
            "digits": list(self.DIGITS),
            "letters": list(self.LETTERS),
            "bits": ["0", "1"],
            "marks": ["1", "2"],
            "integers": [str(i) for i in range(-9, rng.choice((10, 30, 100)))],
        }[alphabet]
        if alphabet == "integers" and rng.random() < self.stage.few:
            symbols = self._few(rng)
        cost = 1 if notation[1] == "" else 2 if len(notation[1]) == 1 else 3
        if cost == 3:
            cost = 2 if alphabet == "integers" and not self.stage.copies else 1
        count = 1 if short else rng.choice((1, 2, 2))
        n = self._length(rng, cost)
        lengths = [n if rng.random() < 0.8 else self._length(rng, cost) for _ in range(count)]
        fields = [self._items(rng, symbols, k) for k in lengths]
        names: list[str] = []
        words = self._akin(rng)
        if alphabet == "integers" and self.stage.akin and len(fields) == 2 and rng.random() < 0.5:
            fields[rng.randrange(2)] = self._items(rng, self._few(rng), len(fields[0]))
        if rng.random() < self.stage.named:  # named; often a short field before a long one
            if rng.random() < 0.5:
                fields = [[rng.choice(symbols)], fields[-1]]
            longest = 4 if len(fields) == 1 else 2
            names = [self._name(rng, longest, words) for _ in fields]
        flag = (self._name(rng, 3, words), rng.choice(("True", "False"))) if names and rng.random() < 0.5 else ()
        delimiter = rng.choice(self.DELIMITERS) if rng.random() < 0.6 else " + "
        return Primer.Record(fields, names, rng.choice(("", "", "?")), flag, delimiter, notation, alphabet)

    def _name(self, rng: random.Random, longest: int, words: tuple[str, ...] | list[str] = WORDS) -> str:
        return " ".join(rng.choices(words, k=rng.randint(1, rng.randint(1, longest))))

    def _akin(self, rng: random.Random) -> list[str]:
        """The words that names are made of: all, or a few, so that what comes after a list cannot be told by a single word."""
        few = self.stage.akin and rng.random() < self.stage.akin
        return rng.sample(self.WORDS, rng.choice((3, 3, 4, 6))) if few else self.WORDS

    def _operation(self, rng: random.Random, first: "Primer.Record", r: "Primer.Record") -> tuple[str, str]:
        """(keyword, result). `cons` and `topsum` are about the first record as well, all others about the latest alone."""
        f = r.fields
        longest = max(map(len, f))
        digits = {id(x): all(len(field[0]) == 1 and field[0] in self.DIGITS for field in x.fields) for x in (first, r)}
        allowed = {
            "rest": min(map(len, f)) > 1 or r.notation[0] != "",  # nothing that is left is written as nothing
            "chop": min(map(len, f)) > 1 or r.notation[0] != "",
            "cons": first is not r and first.notation == r.notation,
            "field": len(f) == 2,
            "swap": len(f) == 2,
            "reverse": longest <= 32,
            "zip": len(f) == 2 and longest <= 24,
            "grow": len(f[-1]) <= 16,
            "headsum": len(f) == 2 and digits[id(r)],
            "lastsum": len(f) == 2 and digits[id(r)],
            "topsum": first is not r and len(first.fields) == 2 and digits[id(first)],
        }
        operations = self.COPIES if self.stage.copies else self.OPERATIONS
        weights = {op: self.OPERATIONS[op] for op in operations if allowed.get(op, True)}
        (op,) = rng.choices(list(weights), list(weights.values()))
        if op == "copy":
            return op, r.text
        if op == "rest":
            flag = rng.choice(("", "True", "False")) if r.flag else ""
            return f"rest {flag}".rstrip(), r.write([x[1:] for x in f], flag)
        if op == "chop":
            return op, r.write([x[:-1] for x in f])
        if op == "reverse":
            return op, r.write([x[::-1] for x in f])
        if op in ("prepend", "append"):
            x = rng.choice(f[-1])
            new = [x, *f[-1]] if op == "prepend" else [*f[-1], x]
            return f"{op} {x}", r.write([*f[:-1], new])
        if op == "cons":
            return op, r.write([*f[:-1], [first.fields[0][0], *f[-1]]])
        if op == "heads":
            return op, " ".join(x[0] for x in f)
        if op == "lasts":
            return op, " ".join(x[-1] for x in f)
        if op == "pick":
            k, side = rng.randint(1, min(8, *map(len, f))), rng.choice(("left", "right"))
            return f"pick {k} {side}", " ".join(x[k - 1] if side == "left" else x[-k] for x in f)
        if op == "field":
            k = rng.choice((0, 1))
            return f"field {k + 1}", r.field(f[k])
        if op == "swap":
            return op, Primer.Record(f[::-1], r.names[::-1], r.mark, r.flag, r.delimiter, r.notation, r.alphabet).text
        if op == "zip":
            side = rng.choice(("left", "right"))
            a, b = f if side == "left" else (f[0][::-1], f[1][::-1])
            return f"zip {side}", " ".join(x + y for x, y in zip(a, b, strict=False))
        if op == "grow":  # all suffixes, the shortest first, a line each
            return op, "\n".join(r.field(f[-1][-k:]) for k in range(1, len(f[-1]) + 1))
        x, y = [field[-1 if op == "lastsum" else 0] for field in (first if op == "topsum" else r).fields]
        carry = rng.randint(0, 1)
        return f"{op} {carry}", self._sum(x, y, carry)

    @staticmethod
    def _sum(x: str, y: str, carry: int) -> str:
        return "{} {}".format(*divmod(int(x) + int(y) + carry, 10))

    def _sums(self, rng: random.Random) -> Context:
        """Sums of two digits and a carry: of the digits themselves, or of the first or last digits of two sequences."""
        out: Context = []
        for i in range(rng.randint(1, 12)):
            kind, carry = rng.choice(("sum", "headsum", "headsum", "lastsum")), rng.randint(0, 1)
            length = 1 if kind == "sum" else min(12, self._length(rng))
            a, b = ("".join(rng.choices(self.DIGITS, k=length)) for _ in range(2))
            if kind == "sum":
                ask = f"sum {a} {b} {carry}: "
            else:
                ask = f"{a}{rng.choice(self.DELIMITERS)}{b}\n{kind} {carry}: "
            reply = self._sum(*((a[-1], b[-1]) if kind == "lastsum" else (a[0], b[0])), carry)
            out += [given(("\n" if i else "") + ask), written(reply)]
        return out

    def _arithmetic(self, rng: random.Random) -> Context:
        """A small integer added to another one; maxima and order of integers; expressions of numbers."""
        out: Context = []
        drill = self.stage.drill
        kinds = ("add", "expression", "expression", "expression") if drill else ("add", "max", "less", "expression", "expression")
        for i in range(rng.randint(8, 24) if drill else rng.randint(1, 12)):
            kind = rng.choice(kinds)
            a, b = rng.randint(-9, 9), rng.randint(-9, rng.choice((9, 30, 100)))
            if kind == "expression":
                template, value = self._expression(rng, drill)
                x = self._near(rng, template, b, a)
                ask, reply = template.format(x=x, y=b, s=a) + rng.choice((" = ", ": ")), value(x, b, a)
            else:
                if kind != "add" and rng.random() < 0.5:
                    a = b + rng.randint(-3, 3)  # hard to tell apart
                if rng.random() < 0.5:
                    a, b = b, a
                ask, reply = f"{kind} {a} {b}: ", {"add": a + b, "max": max(a, b), "less": a < b}[kind]
            out += [given(("\n" if i else "") + ask), written(str(reply))]
        return out

    def _expression(self, rng: random.Random, drill: bool = False) -> tuple[str, Callable]:
        return rng.choices([e[:2] for e in self.EXPRESSIONS], [e[3 if drill else 2] for e in self.EXPRESSIONS])[0]

    @staticmethod
    def _near(rng: random.Random, template: str, y: int, s: int) -> int:
        """x for an expression: mostly not far from what it is compared with; equal half of the time if that is asked."""
        other = s + y if "{s}" in template else y
        r = rng.random()
        if "==" in template:
            return other if r < 0.5 else other + rng.choice((-3, -2, -1, 1, 2, 3)) if r < 0.9 else rng.randint(-9, 100)
        return other + rng.randint(-6, 6) if r < 0.7 else rng.randint(-9, rng.choice((9, 30, 100)))

    def _lists(self, rng: random.Random) -> Context:
        """Named lists, and what is asked of their first items: values of expressions, alone, before a list, or after lists."""
        out: Context = []
        placed = rng.random() < self.stage.placed
        room = rng.randint(60, 60 + (3 if placed else 2) * self.max_items)  # characters, roughly
        taken: set[str] = set()  # names are not used again: each says which list is meant
        while room > 0 and len(taken) < 8:
            names = rng.sample([n for n in self.LISTS if n not in taken], rng.choice((2, 2, 3)))
            taken |= set(names)
            n = int((max(4, self.max_items // 3) + 1) ** rng.random())
            if self.stage.several and rng.random() < 0.35:
                n = rng.randint(2, 5)
            sizes = [max(1, n + rng.choice((0, 0, -1, 1))) for _ in names]
            high = rng.choice((9, 30, 100))
            lists = {name: [rng.randint(-9, high) for _ in range(size)] for name, size in zip(names, sizes, strict=True)}
            if self.stage.several and rng.random() < 0.4:
                lists[names[1]] = self._falling(rng, sizes[1])
            few = rng.randint(1, 9) if rng.random() < 0.7 else 9
            lists[names[0]] = [rng.randint(-few, few) for _ in range(sizes[0])]  # small integers
            values: dict[str, str] = {}  # of expressions
            used: set[tuple[str, int]] = set()
            for _ in range(rng.randint(2, 5) if self.stage.several else 1):
                template, value = self._expression(rng, drill=placed)
                x, y, s = (self._place(rng, lists, names[1:] if v != "s" else names[:1]) for v in "xys")
                if self.stage.several and rng.random() < 0.5:  # the first ones, most often in demand
                    x, y, s = (x[0], 0), (x[0], rng.choice((1, 1, 2))), (s[0], 0)
                    if not placed or rng.random() < 0.5:
                        y = y[0], min(y[1], len(lists[x[0]]) - 1)
                if x != y and x not in used:
                    lists[x[0]][x[1]] = self._near(rng, template, self._item(lists, y), self._item(lists, s))
                used |= {x, y, s}
                expression = template.format(**{v: f"{name}[{i}]" for v, (name, i) in zip("xys", (x, y, s), strict=True)})
                values[expression] = str(value(*(self._item(lists, place) for place in (x, y, s))))
            expression, result = next(iter(values.items()))
            rng.shuffle(names)
            shown = {name: rng.choice((name, name.capitalize() + ":", f"{rng.choice(self.WORDS)} {name}")) for name in names}
            words = self.WORDS
            if self.stage.akin and rng.random() < self.stage.akin:  # names that share a word with each other and with the flag
                common = rng.choice([w for w in self.WORDS if w not in self.LISTS])
                first = rng.random() < 0.3
                shown = {name: f"{common} {name}" if first else f"{name} {common}" for name in names}
                words = [*names, common, *rng.sample(self.WORDS, 2)]
            separator = rng.choice(("\n", "\n", ", "))
            named = {shown[name]: lists[name] for name in names}
            if placed:
                text = self._scatter(rng, named)
            else:
                text = separator.join(f"{name} {items}" for name, items in named.items()) + "\n"
            asks = rng.sample(("value", "before", "rest", "join", "item"), rng.choice((1, 1, 2)))
            if self.stage.value_first:
                asks = ["value", *asks]
            if result in ("True", "False"):
                asks = ["value" if ask == "before" else ask for ask in asks]
            plan = [(ask, expression) for ask in dict.fromkeys(asks)] + [("value", e) for e in list(values)[1:]]
            if placed:
                numbers, truths = ("value", "before", "before", "before", "rest"), ("value", "write", "rest", "rest", "join")
                plan = [(rng.choice(truths if v in ("True", "False") else numbers), e) for e, v in values.items()]
            for ask, expression in plan:
                result = values[expression]
                word, flag, target = rng.choice(self.WORDS), self._name(rng, 3, words), rng.choice(names)
                two = rng.sample(names, 2)
                if ask == "value":
                    prompt, reply = f"{expression}{rng.choice((' = ', ': '))}", result
                elif ask == "write":
                    prompt, reply = self._phrase(rng, expression, result)
                elif ask == "before":  # the value, then a list
                    prompt = rng.choice((f"cons {expression} {target}: ", f"Put {expression} before {target}.\n{word}: "))
                    reply = f"[{', '.join([result, *map(str, lists[target])])}]"
                    if placed and rng.random() < 0.7:
                        prompt = rng.choice(
                            (f"cons {expression} {target} as {word}: ", f"Put {expression} before {target} as {word}.\n")
                        )
                        reply = f"{word}: {reply}"
                    if placed and rng.random() < 0.4:
                        prompt = f"{rng.choice(self.WORDS)}: {prompt}"
                elif ask == "item":
                    name, i = self._place(rng, lists, names)
                    prompt, reply = f"{name}[{i}]{rng.choice((' = ', ': '))}", str(lists[name][i])
                else:
                    flag = flag if rng.random() < 0.7 or placed else ""
                    prompt, reply = self._join(two, shown, lists, ask == "rest", flag, expression, result)
                out += [given(f"{chr(10) if out else ''}{text}{prompt}"), written(reply)]
                room -= len(text) + len(prompt) + len(reply)
                text = ""
        return out

    def _scatter(self, rng: random.Random, lists: dict[str, list[int]]) -> str:
        """Named lists among words, and among other lists: of a name that was there before, or of none."""

        def words() -> str:  # a colon ends what is no part of a name
            chosen = rng.choices(self.SCATTERED, k=rng.choice((0, 0, 1, 2, 4, 8)))
            return " ".join(chosen) + ": " if chosen else ""

        def between(label: float) -> str:
            after = rng.choice(("\n", "\n", "\n", ", ", ". "))
            return after + (f"{rng.choice(self.WORDS)}: " if rng.random() < label else "")

        text = ""
        before: list[str] = []
        for name, items in lists.items():
            text += f"{words()}{name} {items}"
            before.append(name)
            while rng.random() < 0.35:
                like = rng.choice(before)
                others = lists[like][1:] if rng.random() < 0.7 else self._falling(rng, len(items))
                text += f"{between(0.4)}{words()}{like if rng.random() < 0.5 else 'of'} {others or [0]}"
            text += between(0.3)
        return text[: text.rindex("]") + 1] + "\n"

    def _values(self, rng: random.Random) -> Context:
        """The drill of expressions again, where the numbers are to be found in short named lists."""
        out: Context = []
        free = rng.sample(self.LISTS, rng.randint(4, len(self.LISTS)))
        while len(free) > 1:
            names = [free.pop() for _ in range(min(rng.choice((2, 2, 3)), len(free)))]
            low, high = rng.choice(((0, 4), (0, 9), (-9, 9), (-9, 30), (-9, 100)))
            longest = rng.choice((2, 3, 6))  # easy ones among them, to begin with
            lists = {name: [rng.randint(low, high) for _ in range(rng.randint(2, longest))] for name in names}
            lists[names[0]] = [rng.randint(low, min(high, 9)) for _ in lists[names[0]]]
            places = [(name, i) for name in names[1:] for i in range(min(4, len(lists[name])))]
            new = places  # those in no expression so far
            asks: list[tuple[str, Callable, list[tuple[str, int]]]] = []
            for _ in range(rng.randint(3, 6)):
                if not new:
                    break
                template, value = self._expression(rng, drill=True)
                x = new[0] if rng.random() < 0.5 else rng.choice(new)
                others = [place for place in places if place != x]
                near = [(name, i) for name, i in others if name == x[0] and 0 < i - x[1] < 3]
                if self.stage.placed:
                    near += [(x[0], i) for i in (x[1] + 1, x[1] + 2) if i >= len(lists[x[0]])]
                y = rng.choice(near if near and rng.random() < 0.5 else others)
                s = self._place(rng, lists, names[:1])
                lists[x[0]][x[1]] = self._near(rng, template, self._item(lists, y), self._item(lists, s))
                new = [place for place in new if place not in (x, y)]
                asks.append((template, value, [x, y, s]))
            rng.shuffle(asks)
            separator = rng.choice(("\n", "\n", ", "))
            shown = {name: f"{rng.choice(self.WORDS)} {name}" if rng.random() < self.stage.placed / 2 else name for name in names}
            text = separator.join(f"{shown[name]} {lists[name]}" for name in rng.sample(names, len(names))) + "\n"
            for template, value, xys in asks:
                expression = template.format(**{v: f"{name}[{i}]" for v, (name, i) in zip("xys", xys, strict=True)})
                prompt, reply = f"{expression}{rng.choice((' = ', ': '))}", str(value(*(self._item(lists, xy) for xy in xys)))
                if rng.random() < self.stage.placed:
                    if rng.random() < 0.4:
                        prompt, reply = self._phrase(rng, expression, reply)
                    else:
                        two, rest = rng.sample(names, 2), rng.random() < 0.6
                        prompt, reply = self._join(two, shown, lists, rest, self._name(rng, 3), expression, reply)
                out += [given(f"{chr(10) if out else ''}{text}{prompt}"), written(reply)]
                text = ""
        return out

    def _phrase(self, rng: random.Random, expression: str, result: str) -> tuple[str, str]:
        """(prompt, reply): words to be written, then a value."""
        words = rng.choices(self.QUOTED, k=rng.randint(1, 8))
        phrase = " ".join(words) + rng.choice(("", "", ":", ",", "."))
        return f"write {phrase} {expression}: ", f"{phrase} {result}"

    @staticmethod
    def _join(two: list[str], shown: dict, lists: dict, rest: bool, flag: str, expression: str, result: str) -> tuple[str, str]:
        """(prompt, reply): two of the lists, or what is left of them without their first items; and a value, if it has a name."""
        cut = 1 if rest and min(len(lists[name]) for name in two) > 1 else 0
        end = f", {flag} {expression}" if flag else ""
        prompt = f"{'rest' if cut else 'join'} {two[0]}, {two[1]}{end}: "
        reply = ", ".join(f"{shown[name].rstrip(':')} {lists[name][cut:]}" for name in two)
        return prompt, reply + (f", {flag} {result}" if flag else "")

    @staticmethod
    def _item(lists: dict[str, list[int]], place: tuple[str, int]) -> int:
        """What stands there; 0 past the end of a list."""
        name, i = place
        return lists[name][i] if i < len(lists[name]) else 0

    @staticmethod
    def _place(rng: random.Random, lists: dict[str, list[int]], names: list[str]) -> tuple[str, int]:
        """One of the first four items of one of the lists."""
        name = rng.choice(names)
        return name, min(rng.choices(range(4), (4, 4, 3, 1))[0], len(lists[name]) - 1)

    def _flags(self, rng: random.Random) -> Context:
        """A flag that is set again and again, among lists; what it was first, what it is now, and choices by it."""
        flag, out = self._name(rng, 3), []
        symbols = [str(i) for i in rng.choice((range(1, 3), range(2), range(-9, 10)))]
        first, last, text = None, "", ""
        for _ in range(rng.randint(1, 4)):
            for _ in range(rng.choice((1, 1, 1, 2)) if first else rng.choice((1, 2, 2))):
                last = rng.choice(("True", "False"))
                first = first or last
                items = rng.choices(symbols, k=self._length(rng, 4))
                text += f"{rng.choice(self.WORDS)} [{', '.join(items)}], {flag} {last}\n"
            latest = ""
            if rng.random() < 0.5:
                items = rng.choices(symbols, k=self._length(rng, 4))
                latest = f"[{', '.join(items)}]"
                text += f"{rng.choice(self.WORDS)}: {latest}\n"
            a, b = rng.sample(symbols, 2)
            word, wanted = rng.choice(self.WORDS), rng.choice(("True", "False"))
            if self.stage.several and rng.random() < 0.7:  # by two at once choices are learned late
                wanted = "False"
            choice = a if last == wanted else b
            kind = rng.choice(("last", "first", "if", "if", "before", "before"))
            if kind in ("last", "first"):
                ask, reply = f"{kind} {flag}: ", last if kind == "last" else first
            else:
                ask = f"{a} if {flag} {wanted} else {b}" if rng.random() < 0.5 else f"{a} if {wanted} else {b}"
                ask += rng.choice((": ", f".\n{word}: "))
                if kind == "before" and latest:
                    ask, choice = f"Put {ask}", f"[{choice}, {latest[1:]}"
                reply = choice
            out += [given(("\n" if out else "") + text + ask), written(reply)]
            text = ""
        return out

    def _forms(self, rng: random.Random) -> Context:
        """Lists to be put into forms known by number: words learned by heart, to be gone on with after a long list."""
        if rng.random() < self.stage.placed:
            return self._leading_forms(rng)
        out: Context = []
        lists: list[list[str]] = []
        text, room = "", 2 * self.max_items  # items, roughly
        while room > 0 and len(out) < 8:
            for _ in range(rng.choice((1, 1, 2)) if lists else 2):
                symbols = [str(i) for i in range(-9, rng.choice((10, 30, 100)))]
                if rng.random() < 0.5:
                    symbols = self._few(rng)
                n = len(lists[-1]) if lists and rng.random() < 0.7 else self._length(rng, 2)
                lists.append(self._items(rng, symbols, n))
                text += f"{self._name(rng, 3)}{rng.choice((':', ''))} [{', '.join(lists[-1])}]" + rng.choice(("\n", "\n", ", "))
            number = rng.randrange(self.stage.forms)
            shown = lists[-len(self.FORMS[number][1]) :]
            room -= 2 * sum(map(len, shown))
            out += [given(("\n" if out else "") + text + f"form {number}: "), written(self._fill(self.FORMS[number], shown))]
            text = ""
        return out

    @staticmethod
    def _fill(form: tuple[list[str], list[int]], lists: list[list[str]]) -> str:
        phrases, cuts = form
        shown = [f" [{', '.join(items[cut:])}]{phrase}" for items, cut, phrase in zip(lists, cuts, phrases[1:], strict=True)]
        return phrases[0] + "".join(shown)

    def _leading_forms(self, rng: random.Random) -> Context:
        """The same, where the number comes first, before the lists, and is to be kept in mind when another list comes in."""
        number = rng.randrange(self.stage.forms)
        n = self._length(rng, 3)
        form = f"form {number}"
        if rng.random() < self.stage.choices:
            others = [i for i in range(self.stage.forms) if len(self.FORMS[i][1]) == len(self.FORMS[number][1])]
            other, one = rng.choice(others), rng.random() < 0.4
            form = f"form {number} if one else {other}" if one else f"form {other} if one else {number}"
            n = 1 if one else max(2, n)

        def items() -> list[str]:
            low, high = rng.choice(((-9, 10), (-9, 30), (-9, 100), (10, 30)))  # the last: `[1` is the start of many a list
            symbols = self._few(rng) if rng.random() < 0.4 else [str(i) for i in range(low, high)]
            return self._items(rng, symbols, n if form != f"form {number}" or rng.random() < 0.8 else self._length(rng, 3))

        lists = [items() for _ in self.FORMS[number][1]]
        text = ", ".join(f"{self._name(rng, 3)} [{', '.join(x)}]" for x in lists)
        reply = self._fill(self.FORMS[number], lists)
        out = [given(f"{form} {text}\n{rng.choice(self.WORDS)}: "), written(reply)]
        if rng.random() < 0.7:
            lists = [items(), lists[0]][: len(self.REPLIES[number][1])]
            text = f"{rng.choice(self.WORDS)}: [{', '.join(lists[0])}]\n{rng.choice(self.WORDS)}: "
            out[-1] = written(reply + "\n")  # it ends its line, as something is to follow
            out += [given(text), written(self._fill(self.REPLIES[number], lists))]
        return out

    def _quotation(self, rng: random.Random) -> Context:
        """Words in no order, in lines, with marks and other characters among them, to be written again as they stand."""
        words = rng.choices(self.EVENLY if self.stage.choices else self.QUOTED, k=int(49 ** rng.random()))
        for i in range(len(words)):
            r = rng.random()
            if r < 0.15:
                words[i] = "".join(chr(rng.randint(33, 126)) for _ in range(rng.randint(1, 4)))
            elif r < 0.25:
                words[i] = rng.choice(("=", "==", "!=", "+", "-", "|"))
            elif r < 0.4:
                words[i] += rng.choice(".,:;?!)]=+-_")
            elif r < 0.5:
                words[i] = rng.choice("([_=+-") + words[i]
        text = "".join(word + rng.choices(" \n", (9, 1))[0] for word in words)[:-1]
        ask = rng.choice(("copy", *self.WORDS))
        return [given(f"{text}\n{ask}: " if rng.random() < 0.5 else f"copy {text}\n{ask}: "), written(text)]


TASKS = {task.name: task for task in (Addition, DP, Parity)}


def tokenizer_corpus(seed: int = 0) -> list[str]:
    """Lines to train the shipped tokenizer on: primer text, the words of the task formats, and all of ASCII.

    What other stages alone ask for must draw no number in the first one, or the lines, and the tokenizer, would be others.
    """
    rng = random.Random(f"tokenizer-{seed}")
    lines = [""]
    for max_items in (4, 8, 16):
        for _ in range(4000):
            lines += "".join(s.text for s in Primer(max_items, stage=0).training_context(rng)).split("\n")
    lines += TEMPLATES * 1500
    # Sentencepiece puts a space before each line, but after a newline a word has none: show it such words too.
    lines += [f"={word}: " for word in ("Solution", "Return", "Answer", "Call", "Carry")] * 2000
    lines += ["".join(chr(c) for c in range(33, 127))] * 50
    return [line for line in lines if line]


TEMPLATES = [
    "What is the parity of [0, 1, 1]?",
    "Compute one element at a time. 0 1 0",
    "Compute the maximum sum of nonadjacent subsequences of [3, 2, 1]",
    "Call: Create dp array [3, 2, 1]",
    "Call: Create chosen indices array: sum array [4, 2, 1], item array [3, 2, 1], can use item True",
    "Call with array minus first element. Call: Create dp array [2, 1]",
    "Append max(return[0], array[0] + return[1]) to return.",
    "Return [0] if negative else element.",
    "If there is only 1 item, return 1 if we should use it else 2.",
    "If we should use the first item to get the sum, call False else True. Call: ",
    "Append 1 if False else 2.",
    "Carry 1, Output 00",
]
