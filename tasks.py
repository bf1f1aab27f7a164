"""The tasks: problems, oracles, the text of every context, and the parser of answers.

A *context* is a list of segments, each given to the model or written by it. The same contexts are used for training
(loss on the written segments alone) and are rebuilt by the decoder in recurse.py, segment by segment.
A task is one class: `sample` draws a problem, `context` writes what each method is trained on, `prompt` is how a
problem is put to a model, and `judge` compares what came back with the oracle. `TASKS` lists them.
"""

import hashlib
import random
from dataclasses import dataclass

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
    ood_lengths = (5, 10, 15, 20, 30, 40, 50, 60)

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
            if not (isinstance(x, str) and x.isascii() and x.isdigit()):
                raise UserError(f"addition: expected operands that are strings of decimal digits, found {x!r}")
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
    def training_context(rng: random.Random, method: str) -> Context:
        """One training example. Every method sees the same lengths: 1 to 15, each about equally often.

        Operands have up to 15 digits and need not be equally long; a level is their last n digits, so that
        leading zeros occur as they do in the levels of a longer problem.
        """
        while True:
            n = rng.choice(Addition.train_lengths)
            longest = rng.randint(n, Addition.train_lengths[-1])
            sizes = [longest, longest if rng.random() < 0.7 else rng.randint(1, longest)]
            rng.shuffle(sizes)
            a, b = (str(rng.randrange(10 ** (s - 1) if s > 1 else 0, 10**s)).zfill(longest)[-n:] for s in sizes)
            p = Addition.Problem(a, b)
            if not Addition.held_out(p):
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


class Primer:
    """What the shipped base is trained on, in place of a web corpus: handling of text, and sums of single digits.

    A context gives one or two *records* (one or two sequences in some notation, joined by a delimiter or named), then asks for
    operations by keyword. It holds no multi-digit addition, no parity and no dynamic programming.
    """

    name = "primer"
    WORDS = (
        "Solution Answer Return Call Output Carry Input Result Take Given Compute Value Array Item Name Start End State Data "
        "Row Text Alpha Beta Gamma What is the of in a to and for with this Sum List Number Step Next Left Right Create Use "
        "Find Write Total Query Note Task Entry"
    ).split()
    DIGITS, LETTERS = "0123456789", "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    DELIMITERS = (" + ", " | ", " ; ", " - ", " and ", " / ", " * ", " to ")
    NOTATIONS = (("", "", ""), ("", " ", ""), ("", "-", ""), ("", ",", ""), ("(", " ", ")"), ("[", ", ", "]"))

    def __init__(self, max_items: int = 128, sums: float = 0.0):
        self.max_items = max_items  # the longest sequence, in items: training lengthens it by and by
        self.sums = sums  # share of contexts that drill sums of single digits

    def training_context(self, rng: random.Random, method: str = "") -> Context:
        if self.sums and rng.random() < self.sums:
            return self._sums(rng)
        if rng.random() < 0.06:
            return self._arithmetic(rng)
        record = self._record(rng, short=False)
        first, latest = record, record
        text, out = "", []
        noise = " ".join(rng.choices(self.WORDS, k=rng.choice((0, 0, 1, 1, 2, 4))))
        head = f"{noise}{rng.choice((' ', ': '))}" if noise else ""
        budget = 9 * self.max_items  # tokens, roughly: a context need not be longer than the longest task's
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
        delimiter: str
        notation: tuple[str, str, str]
        alphabet: str

        def write(self, fields: list[list[str]]) -> str:
            opening, separator, closing = self.notation
            texts = [opening + separator.join(items) + closing for items in fields]
            if self.names:
                return ", ".join(f"{name} {text}" for name, text in zip(self.names, texts, strict=True))
            return self.delimiter.join(texts)

        @property
        def text(self) -> str:
            return self.write(self.fields)

    def _length(self, rng: random.Random, cost: int) -> int:
        longest = max(2, self.max_items // cost)
        return rng.randint(1, longest) if rng.random() < 0.5 else int(longest ** rng.random())

    def _items(self, rng: random.Random, alphabet: list[str], n: int) -> list[str]:
        """n items; a third of the time of low entropy, since long runs and repeats are where copying by content fails."""
        r = rng.random()
        if r < 0.66:
            return rng.choices(alphabet, k=n)
        few = rng.choices(alphabet, k=rng.randint(1, 3))
        if r < 0.78:
            return rng.choices(few, k=n)
        if r < 0.90:  # runs
            out: list[str] = []
            while len(out) < n:
                out += [rng.choice(alphabet)] * rng.randint(1, rng.choice((3, 8, 20)))
            return out[:n]
        block = rng.choices(alphabet, k=rng.randint(2, 6))
        out = (block * n)[:n]
        for _ in range(rng.randint(0, 3)):
            out[rng.randrange(n)] = rng.choice(alphabet)
        return out

    def _record(self, rng: random.Random, short: bool, like: "Primer.Record | None" = None) -> "Primer.Record":
        r = rng.random()
        if like is not None and r < 0.7:
            alphabet, notation = like.alphabet, like.notation
        elif r < 0.6:
            alphabet, notation = "digits", self.NOTATIONS[0]
        elif r < 0.7:
            alphabet, notation = "letters", self.NOTATIONS[0]
        elif r < 0.8:
            alphabet, notation = rng.choice(("digits", "letters")), rng.choice(self.NOTATIONS[1:])
        else:
            alphabet, notation = rng.choice(("bits", "bits", "integers", "marks")), self.NOTATIONS[5]
        symbols = {
            "digits": list(self.DIGITS),
            "letters": list(self.LETTERS),
            "bits": ["0", "1"],
            "marks": ["1", "2"],
            "integers": [str(i) for i in range(-9, rng.choice((10, 30, 100)))],
        }[alphabet]
        cost = 1 if notation[1] == "" else 2 if len(notation[1]) == 1 else 3 + (alphabet == "integers")
        count = 1 if short else rng.choice((1, 2, 2))
        n = self._length(rng, cost)
        lengths = [n if rng.random() < 0.8 else self._length(rng, cost) for _ in range(count)]
        fields = [self._items(rng, symbols, k) for k in lengths]
        names: list[str] = []
        if rng.random() < 0.3:  # named; often a short field before a long one
            if rng.random() < 0.5:
                fields = [[rng.choice(symbols)], fields[-1]]
            names = rng.sample(self.WORDS, len(fields))
        return Primer.Record(fields, names, rng.choice(self.DELIMITERS) if rng.random() < 0.6 else " + ", notation, alphabet)

    def _operation(self, rng: random.Random, first: "Primer.Record", r: "Primer.Record") -> tuple[str, str]:
        """(keyword, result). All but `cons` are about the latest record."""
        f = r.fields
        two = len(f) == 2
        all_digits = all(len(x) == 1 and x in self.DIGITS for x in (f[0][0], f[-1][0]))
        ops = [
            "copy",
            "rest",
            "rest",
            "rest",
            "chop",
            "prepend",
            "prepend",
            "append",
            "heads",
            "lasts",
            "pick",
            "reverse",
        ]
        if two:
            ops += ["field", "swap", "zip"]
            if all_digits:
                ops += ["headsum", "headsum", "lastsum"]
        if first is not r and first.notation == r.notation:
            ops += ["cons"] * 4
        if len(f[-1]) <= 16:
            ops += ["grow", "grow"]
        op = rng.choice(ops)
        if op == "copy":
            return "copy", r.text
        if op == "rest":
            return "rest", r.write([x[1:] for x in f])
        if op == "chop":
            return "chop", r.write([x[:-1] for x in f])
        if op == "reverse":
            return "reverse", r.write([x[::-1] for x in f])
        if op in ("prepend", "append"):
            x = rng.choice(f[-1])
            new = [x, *f[-1]] if op == "prepend" else [*f[-1], x]
            return f"{op} {x}", r.write([*f[:-1], new])
        if op == "cons":
            return "cons", r.write([*f[:-1], [first.fields[0][0], *f[-1]]])
        if op == "heads":
            return "heads", " ".join(x[0] for x in f)
        if op == "lasts":
            return "lasts", " ".join(x[-1] for x in f)
        if op == "pick":
            k, side = rng.randint(1, min(20, *map(len, f))), rng.choice(("left", "right"))
            return f"pick {k} {side}", " ".join(x[k - 1] if side == "left" else x[-k] for x in f)
        if op == "field":
            k = rng.choice((0, 1))
            opening, separator, closing = r.notation
            return f"field {k + 1}", opening + separator.join(f[k]) + closing
        if op == "swap":
            swapped = Primer.Record(f[::-1], r.names[::-1], r.delimiter, r.notation, r.alphabet)
            return "swap", swapped.text
        if op == "zip":
            side = rng.choice(("left", "right"))
            a, b = f if side == "left" else (f[0][::-1], f[1][::-1])
            return f"zip {side}", " ".join(x + y for x, y in zip(a[:40], b[:40], strict=False))
        if op in ("headsum", "lastsum"):
            x, y = (f[0][0], f[1][0]) if op == "headsum" else (f[0][-1], f[1][-1])
            carry = rng.choice((0, 1))
            total = int(x) + int(y) + carry
            return f"{op} {carry}", f"{total // 10} {total % 10}"
        # grow: all suffixes, the shortest first, a line each
        opening, separator, closing = r.notation
        return "grow", "\n".join(opening + separator.join(f[-1][-k:]) + closing for k in range(1, len(f[-1]) + 1))

    def _arithmetic(self, rng: random.Random) -> Context:
        """Sums of single digits with a carry; sums, maxima and order of small integers."""
        out: Context = []
        for i in range(rng.randint(1, 8)):
            kind = rng.choice(("digits", "digits", "add", "max", "less"))
            a, b, c = rng.randint(-9, 20), rng.randint(-9, 20), rng.randint(0, 1)
            if kind == "digits":
                a, b = a % 10, b % 10
                ask, reply = f"sum {a} {b} {c}", f"{(a + b + c) // 10} {(a + b + c) % 10}"
            elif kind == "add":
                ask, reply = f"add {a} {b}", str(a + b)
            elif kind == "max":
                ask, reply = f"max {a} {b}", str(max(a, b))
            else:
                ask, reply = f"less {a} {b}", str(a < b)
            out += [given(("\n" if i else "") + ask + ": "), written(reply)]
        return out

    def _sums(self, rng: random.Random) -> Context:
        """Sums of two digits and a carry; half of them of the first digits of two sequences."""
        out: Context = []
        for i in range(rng.randint(1, 16)):
            x, y, carry = rng.choice(self.DIGITS), rng.choice(self.DIGITS), rng.randint(0, 1)
            ask = f"sum {x} {y} {carry}: "
            if rng.random() < 0.5:
                a, b = (d + "".join(rng.choices(self.DIGITS, k=rng.randint(0, 12))) for d in (x, y))
                ask = f"{a}{rng.choice(self.DELIMITERS)}{b}\nheadsum {carry}: "
            carry, digit = divmod(int(x) + int(y) + carry, 10)
            out += [given(("\n" if i else "") + ask), written(f"{carry} {digit}")]
        return out


TASKS = {task.name: task for task in (Addition,)}


def tokenizer_corpus(seed: int = 0) -> list[str]:
    """Lines to train the shipped tokenizer on: primer text, the words of the task formats, and all of ASCII."""
    rng = random.Random(f"tokenizer-{seed}")
    lines = [""]
    for max_items in (4, 8, 16):
        for _ in range(4000):
            lines += "".join(s.text for s in Primer(max_items).training_context(rng)).split("\n")
    lines += TEMPLATES * 300
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
