"""Addition's oracle, text formats, sampling and judging; what the primer does not hold."""

import itertools
import random
import re
from collections import Counter

import pytest

from model import UserError
from tasks import DP, METHODS, TASKS, Addition, Parity, Primer, Segment, held_out, integers, return_value


def marked(context):
    """The paper's notation: what the model writes is in asterisks."""
    return "".join(f"*{s.text}*" if s.written else s.text for s in context).replace("\n", "⏎")


def test_the_papers_formats():
    """The examples of the paper's text formats, letter for letter."""
    p, one = Addition.problem("73199", "21439"), Addition.problem("9", "1")
    assert marked(Addition.context(p, "retuning")) == (
        "73199 + 21439⏎Solution: *Call: 3199 + 1439⏎*Return: Carry 0, Output 4638⏎Answer: *Carry 0, Output 94638*"
    )
    assert marked(Addition.context(one, "retuning")) == "9 + 1⏎Solution: *Carry 1, Output 0*"
    p = Addition.problem("9999", "1")
    assert marked(Addition.context(p, "scratchpad")) == (
        "9999 + 0001⏎Solution: *Carry 1, Output 0⏎Carry 1, Output 00⏎Carry 1, Output 000⏎Carry 1, Output 0000*"
    )
    assert marked(Addition.context(p, "baseline")) == "9999 + 0001⏎Answer: *10000*"


def test_the_papers_formats_of_parity_and_dp():
    p = Parity.Problem((0, 1, 1))
    assert marked(Parity.context(p, "retuning")) == (
        "What is the parity of [0, 1, 1]?⏎Solution: *Call: What is the parity of [1, 1]?⏎*Return: 0⏎Answer: *0*"
    )
    assert marked(Parity.context(Parity.Problem((1,)), "retuning")) == "What is the parity of [1]?⏎Solution: *1*"
    assert marked(Parity.context(p, "scratchpad")) == (
        "What is the parity of [0, 1, 1]?⏎Solution: *Compute one element at a time. 0 1 0*"
    )
    assert marked(Parity.context(p, "baseline")) == "What is the parity of [0, 1, 1]?⏎Answer: *0*"
    whole, sums, _, one, marks, *_, last = DP.levels(DP.Problem((3, 2, 1)), "retuning")
    assert marked(DP.context(whole, "retuning")) == (
        "Compute the maximum sum of nonadjacent subsequences of [3, 2, 1]⏎Solution: *Call: Create dp array [3, 2, 1]⏎*"
        "Return: [4, 2, 1]⏎Answer: *Call: Create chosen indices array: sum array [4, 2, 1], item array [3, 2, 1], "
        "can use item True⏎*Return: [1, 2, 1]⏎Answer: *[1, 2, 1]*"
    )
    assert marked(DP.context(sums, "retuning")) == (
        "Create dp array [3, 2, 1]⏎Solution: *Call with array minus first element. Call: Create dp array [2, 1]⏎*Return: [2, 1]⏎"
        "Answer: *Append max(return[0], array[0] + return[1]) to return.⏎Answer: [4, 2, 1]*"
    )
    assert marked(DP.context(one, "retuning")) == (
        "Create dp array [1]⏎Solution: *Return [0] if negative else element.⏎Answer: [1]*"
    )
    rule = "If there is only 1 item, return 1 if we should use it else 2."
    assert marked(DP.context(marks, "retuning")) == (
        "Create chosen indices array: sum array [4, 2, 1], item array [3, 2, 1], can use item True⏎Solution: "
        f"*{rule} If we should use the first item to get the sum, call False else True. "
        "Call: Create chosen indices array: sum array [2, 1], item array [2, 1], can use item False⏎*"
        "Return: [2, 1]⏎Answer: *Append 1 if False else 2.⏎Answer: [1, 2, 1]*"
    )
    assert marked(DP.context(last, "retuning")).endswith(f"⏎Solution: *{rule}⏎Answer: [1]*")


def by_brute_force(items):
    """(marks, sum) by trying every choice: the largest sum, then the smallest marks."""
    allowed = [m for m in itertools.product((1, 2), repeat=len(items)) if (1, 1) not in zip(m, m[1:], strict=False)]
    total = {m: sum(i for i, mark in zip(items, m, strict=True) if mark == 1) for m in allowed}
    best = min(allowed, key=lambda m: (-total[m], m))
    return list(best), total[best]


def check_dp(items):
    marks, total = by_brute_force(items)
    p = DP.Problem(items)
    assert DP.oracle(p) == str(marks)
    sums = integers(DP.oracle(DP.Problem(items, "sums")))
    assert sums[0] == total
    for method in METHODS:
        assert DP.judge(p, DP.context(p, method)[-1].text, method)
    return p


def test_dp_agrees_with_brute_force():
    """On all lists of up to 4 items, and on longer random ones. (All of 5 items: `PYTHONPATH=. python tests/test_tasks.py`.)"""
    for n in range(1, 5):
        for items in itertools.product(DP.VALUES, repeat=n):
            check_dp(items)
    rng = random.Random(0)
    for _ in range(300):
        check_dp(tuple(rng.choices(DP.VALUES, k=rng.randint(5, 10))))


def test_parity_agrees_with_xor():
    rng = random.Random(0)
    for _ in range(10_000):
        bits = tuple(rng.choices((0, 1), k=rng.randint(1, 100)))
        expected = 0
        for bit in bits:
            expected ^= bit
        p = Parity.Problem(bits)
        assert Parity.oracle(p) == str(expected)
        for method in METHODS:
            assert Parity.judge(p, Parity.context(p, method)[-1].text, method)


@pytest.mark.parametrize("task", [DP, Parity], ids=["dp", "parity"])
def test_training_problems_of_dp_and_parity(task):
    """No longer than the training lengths; those held out for evaluation are never among them, at any level."""
    rng, lengths = random.Random(0), Counter()
    for method in METHODS:
        for _ in range(3000):
            text = re.split("\n(?:Solution|Answer): ", task.training_context(rng, method)[0].text)[0]
            p = task.from_text(text)
            lengths[p.length] += 1
            assert not any(map(task.held_out, task.solved(p, method)))
    assert max(lengths) == task.train_lengths[-1] and min(lengths) == 1
    for length in (task.train_lengths[-1], 30):
        assert all(task.held_out(task.sample(rng, length)) for _ in range(50))


def test_judging_parity_and_dp():
    p = Parity.Problem((0, 1, 1))
    for text in ("", "1", "00", "2", "0 ", "zero"):
        assert not Parity.judge(p, text, "retuning"), text
    steps = "Compute one element at a time. "
    for text in ("0", "0 1 0", f"{steps}0", f"{steps}0 1 1", steps, f"{steps}0  0"):
        assert not Parity.judge(p, text, "scratchpad"), text
    p = DP.Problem((3, 2, 1))
    for text in ("", "[1, 2, 2]", "1, 2, 1", "[1,2,1]", "[1, 2, 1", "[1, 2, 1] ", "[1, 2, 01]"):
        assert not DP.judge(p, text, "retuning"), text
    for fields in ({}, {"bits": []}, {"bits": [0, 2]}, {"bits": [True]}, {"bits": "011"}):
        with pytest.raises(UserError, match="parity: "):
            Parity.from_json(fields)
    for fields in ({}, {"items": []}, {"items": [1.5]}, {"items": "321"}):
        with pytest.raises(UserError, match="dp: "):
            DP.from_json(fields)


def schoolbook(a: str, b: str) -> str:
    """Addition digit by digit: independent of the oracle and of the contexts."""
    carry, digits = 0, []
    for x, y in zip(reversed(a), reversed(b), strict=True):
        carry, digit = divmod("0123456789".index(x) + "0123456789".index(y) + carry, 10)
        digits.append(str(digit))
    return ((str(carry) if carry else "") + "".join(reversed(digits))).lstrip("0") or "0"


def test_oracle_and_every_context_agree_with_schoolbook_addition():
    rng = random.Random(0)
    for _ in range(10_000):
        n = rng.randint(1, 60)
        p = Addition.problem(*(str(rng.randrange(10**n)) for _ in range(2)))
        assert Addition.oracle(p) == schoolbook(p.a, p.b)
        for method in METHODS:
            context = Addition.context(p, method)
            assert Addition.judge(p, context[-1].text, method)
            assert context[0] == Segment(Addition.prompt(p, method), written=False)


def test_levels_are_what_a_context_calls():
    p = Addition.problem("408", "99")
    levels = Addition.levels(p, "retuning")
    assert [(q.a, q.b) for q in levels] == [("408", "099"), ("08", "99"), ("8", "9")]
    for caller, callee in zip(levels, levels[1:], strict=False):
        call, back = Addition.context(caller, "retuning")[1:3]
        assert call.text == f"Call: {callee.a} + {callee.b}\n"
        value = return_value(Addition.context(callee, "retuning")[-1].text)
        assert back.text == f"Return: {value}\nAnswer: "
    assert Addition.levels(p, "scratchpad") == [p]


@pytest.mark.parametrize("method", METHODS)
def test_training_lengths_are_balanced_and_never_exceeded(method):
    rng, counts = random.Random(0), Counter()
    for _ in range(15_000):
        a, b = Addition.training_context(rng, method)[0].text.partition("\n")[0].split(" + ")
        assert len(a) == len(b) <= 15
        counts[len(a)] += 1
    assert sorted(counts) == list(range(1, 16))
    assert max(counts.values()) < 1.3 * min(counts.values())


def solutions_in(context, method):
    """The additions whose solution a context holds, read from its text: the problem, what it calls, or a line each."""
    a, b = context[0].text.partition("\n")[0].split(" + ")
    if method == "scratchpad":
        return [Addition.Problem(a[-k:], b[-k:]) for k in range(1, 1 + len(context[-1].text.split("\n")))]
    calls = [Addition.from_text(s.text.removeprefix("Call: ").removesuffix("\n")) for s in context if "Call" in s.text]
    return [Addition.Problem(a, b), *calls]


@pytest.mark.parametrize("method", METHODS)
def test_evaluation_problems_are_never_trained_on(method):
    """Not even as a part of another one: no solution of a held-out problem is in any context."""
    rng = random.Random(1)
    trained = {p for _ in range(20_000) for p in solutions_in(Addition.training_context(rng, method), method)}
    evaluated = {Addition.sample(rng, length) for length in (2, 3, 4, 15, 60) for _ in range(500)}
    swapped = {Addition.Problem(p.b, p.a) for p in evaluated}
    assert len(trained) > 15_000 and not trained & (evaluated | swapped)
    assert len(evaluated & {Addition.Problem(str(a), str(b)) for a in range(10, 100) for b in range(10, 100)}) > 300


def test_samples_have_exactly_the_length_asked_for():
    rng = random.Random(2)
    for length in (1, 2, 15, 200):
        for _ in range(50):
            p = Addition.sample(rng, length)
            assert len(p.a) == len(p.b) == length
            assert length == 1 or "0" not in (p.a[0], p.b[0])


def test_seeds():
    def draw(seed):
        rng = random.Random(seed)
        return [Addition.training_context(rng, "retuning") for _ in range(20)] + [Primer().training_context(rng)]

    assert draw(1) == draw(1) != draw(2)


def test_held_out_is_a_tenth():
    assert 0.09 < sum(held_out(str(i)) for i in range(20_000)) / 20_000 < 0.115


def test_judging():
    p = Addition.problem("99", "1")
    right = {"baseline": "100", "scratchpad": "Carry 1, Output 0\nCarry 1, Output 00", "retuning": "Carry 1, Output 00"}
    for method, text in right.items():
        assert Addition.judge(p, text, method)
    for text in ("", "Carry 0, Output 00", "Carry 1, Output 0", "Carry 1, Output", "Carry 2, Output 00", "Output 00", "100",
                 "Carry 1, Output 00 ", "Carry 1, Output ٠٠", "Carry 1,Output 00", "Carry 1, Output 00\n"):  # fmt: skip
        assert not Addition.judge(p, text, "retuning"), text
    for text in ("", "1 00", "-100", "100.", "１００", "101"):
        assert not Addition.judge(p, text, "baseline"), text
    padded = Addition.problem("01", "02")
    assert Addition.judge(padded, "Carry 0, Output 03", "retuning"), "leading zeros of padded operands do not matter"


def test_user_input():
    assert Addition.from_text("408 + 99") == Addition.problem("408", "099")
    for text in ("", "1", "1+2", "1 + ", "a + b", "1 + 2 + 3", "-1 + 2", "1 + 2\nSolution: x", "١ + ٢"):
        assert Addition.from_text(text) is None, text
    for fields in ({"a": "1"}, {"a": 1, "b": "2"}, {"a": "", "b": "2"}, {"a": "1x", "b": "2"}, {"a": None, "b": "2"}):
        with pytest.raises(UserError, match="addition: "):
            Addition.from_json(fields)


def test_the_primer_holds_no_instance_of_a_task():
    """No reply is the sum of two numbers of several digits in what was asked; no context has the form of a task's."""
    rng, compared, hits = random.Random(3), 0, 0
    for i in range(8000):
        context = Primer(40, stage=i % len(Primer.STAGES)).training_context(rng)
        whole = "".join(s.text for s in context)
        assert not re.search(
            r"is the parity of \[|subsequences of \[|dp array \[|sum array \[.*item array|Solution: Call: ", whole
        )
        for ask, reply in zip(context[::2], context[1::2], strict=True):
            asked = [int(x) for x in re.findall(r"\d{3,}", ask.text)]
            sums = {a + b for a, b in itertools.combinations(asked, 2) if min(a, b) > 99}
            compared += bool(sums)
            hits += bool(sums & {int(x) for x in re.findall(r"\d{3,}", reply.text)})
    assert compared > 1000 and hits == 0


def test_values_of_the_primers_expressions_are_those_that_python_finds():
    """Of lists named before: alone, before a list, and as the last of what is asked for. Past their end are zeros."""
    rng, kinds = random.Random(6), Counter()
    primer, start = Primer(30), r"(?:\w+\[|max\(|False if |1 if )"

    class Lists(dict):
        def __getitem__(self, name):
            return [*super().__getitem__(name), 0, 0]

    for contexts in (primer._lists, primer._values) * 400:
        lists: dict[str, list[int]] = Lists()
        context = contexts(rng)
        for ask, reply in zip(context[::2], context[1::2], strict=True):
            given_lists, _, question = ask.text.strip("\n").rpartition("]\n")
            found = re.findall(r"(?:(\w+) )?(\w+:?) \[([^\]]*)\]", given_lists + "]")
            found.sort(key=lambda f: f[1] == "of")  # mostly lists that do not count
            for before, word, items in found:  # of two words that name a list the other one is shared; the first of a name counts
                name = word.lower().strip(":") if word in Primer.LISTS or ":" in word else before
                lists.setdefault(name, [int(i) for i in items.split(", ")])

            def value(expression: str, lists=lists) -> str:
                python = re.sub(r"(\w+)\[", r"lists['\1'][", expression)
                return str(eval(python, {"max": max, "lists": lists}))

            if m := re.fullmatch(r"(?:\w+: )?Put (.*) before (\w+)(?: as (\w+)\.|\.\n\w+: )", question) or re.fullmatch(
                r"(?:\w+: )?cons (.*(?:[\])]| else 2)) (\w+)(?: as (\w+))?: ", question
            ):
                label = f"{m[3]}: " if m[3] else ""
                assert reply.text == label + str([int(value(m[1])), *lists[m[2]][:-2]])
                kinds["label" if label else "no label"] += 1
            elif m := re.fullmatch(rf"(write) (.*?) ({start}.*): ", question):
                assert reply.text == f"{m[2]} {value(m[3])}"
            elif m := re.fullmatch(rf"(rest|join) (\w+), (\w+)(?:, ([A-Za-z ]+?) ({start}.*))?: ", question):
                cut = m[1] == "rest"
                shown = [str(lists[name][cut:-2]) for name in (m[2], m[3])]
                end = f", {m[4]} {value(m[5])}" if m[4] else ""
                assert re.sub(r"(\w+ )?\w+ \[", "[", reply.text) == ", ".join(shown) + end
            else:
                assert reply.text == value(re.sub("( = |: )$", "", question))
                kinds[f"== {reply.text}"] += "==" in question
            kinds[re.sub(r"^\w+: ", "", m[0]).split()[0] if m else "value"] += 1
    assert (
        min(kinds[k] for k in ("Put", "cons", "rest", "join", "write", "value", "label", "no label", "== True", "== False")) > 30
    ), kinds


def test_forms_of_a_number_have_the_same_words_around_the_lists_that_were_given():
    """Asked for after the lists, or before them; and the reply to a list that comes in later, by the number that came first."""
    rng, words, seen = random.Random(8), {}, Counter()
    primer, a_list = Primer(30), r"(?<!\w)\[[^]]*\](?!\))"  # "[1])" and "array[0]" are among the words
    for _ in range(3000):
        known: list[str] = []
        number = later = None
        for ask in (context := primer._forms(rng))[::2]:
            known += re.findall(a_list, ask.text)
            reply = context[context.index(ask) + 1].text.removesuffix("\n")
            m = re.search(r"form (\d+)(?: if one else (\d+))?", ask.text)
            if m and m[2] and not re.match(r"\[-?\d+\]", re.search(a_list, ask.text)[0]):
                number, later = m[2], False
                seen["not one"] += 1
            else:
                number, later = (m[1], False) if m else (number, True)
                seen["one"] += bool(m and m[2])
            shown = re.findall(a_list, reply)
            rests = {re.sub(r"^\[-?\d+(, )?", "[", x) for x in known}
            assert shown and all(x in known or x in rests for x in shown), (ask, reply)
            frame = re.sub(a_list, "[]", reply)
            assert words.setdefault((number, later), frame) == frame, (number, later)
            seen["later" if later else "leading" if ask.text.startswith("form") else "after"] += 1
    assert min(seen[k] for k in ("later", "leading", "after", "one", "not one")) > 100, seen
    assert len(words) > 1.9 * len(Primer.FORMS)


def test_dp_trains_often_on_what_short_lists_seldom_have():
    """First items of which it is hard to tell whether a best sum takes them, evenly; and returned sums of two digits."""
    rng = random.Random(5)

    def shares(lists):
        dp = [[*DP.sums(x), 0, 0] for x in lists]
        seen = Counter((x[0], d[1] - d[2]) for x, d in zip(lists, dp, strict=True) if d[1] > 0)
        hard = [seen[first, lost] / len(lists) for first in range(6) for lost in range(6) if abs(first - lost) < 3]
        return min(hard), max(hard), sum(d[1] > 9 for d in dp) / len(lists)

    for n in (4, 5):
        drawn, uniform = shares([DP.draw(rng, n) for _ in range(6000)]), shares(random_lists(rng, n))
        assert drawn[0] > 2 * uniform[0] and drawn[1] / drawn[0] < uniform[1] / uniform[0] / 2, (drawn, uniform)
        assert drawn[2] > 0.2 > 4 * uniform[2], (drawn, uniform)
    assert {len(DP.draw(rng, n)) for n in (1, 2, 3) for _ in range(50)} == {1, 2, 3}
    assert all(set(DP.draw(rng, n)) <= set(DP.VALUES) for n in range(1, 6) for _ in range(50))


def random_lists(rng, n):
    return [tuple(rng.choices(DP.VALUES, k=n)) for _ in range(6000)]


@pytest.mark.parametrize("method", METHODS)
def test_how_often_dp_trains_on_lists_of_each_length(method):
    """About equally often, by retuning in proportion to the length."""
    rng = random.Random(9)
    starts = [DP.training_context(rng, method)[0].text for _ in range(6000)]
    lengths = Counter(len(integers(re.search(r"\[.*?\]", start)[0])) for start in starts)
    shares = [lengths[n] / (n if method == "retuning" else 1) for n in range(2, 6)]
    assert max(shares) < 1.3 * min(shares) and sum(lengths[n] for n in range(2, 6)) > 0.9 * len(starts), lengths


@pytest.mark.parametrize("focus", ["bits", "integers"])
def test_a_primer_of_one_kind_of_lists_holds_no_task(focus):
    """Lists of the kind alone, longer than a task's in training, and nothing that has the form of a task's context."""
    rng, lengths, asked = random.Random(3), [], set()
    for _ in range(3000):
        context = Primer(128, focus=focus).training_context(rng)
        whole = "".join(s.text for s in context)
        assert not re.search(r"the parity of \[|subsequences of \[|dp array \[|sum array \[.*item array|Solution: Call: ", whole)
        lists = [integers(x) for x in re.findall(r"\[-?\d[^\]]*, [^\]]*\]", whole)]
        assert all(lists)
        if focus == "bits":
            assert {i for x in lists for i in x} <= {0, 1}
        lengths += map(len, lists)
        asked |= {op for op in Primer.OPERATIONS if re.search(rf"\b{op}\b", whole)}
    assert max(lengths) > (120 if focus == "bits" else 60)
    assert not asked & {"reverse", "zip", "grow", "swap", "pick", "headsum", "lastsum", "topsum"}


def test_what_a_task_writes_has_been_written_in_the_primer(tokenizer):
    """Every token, and not by chance alone: what a base has never written is slow to learn for an adapter."""
    rng = random.Random(4)

    def tokens(contexts):
        return Counter(t for context in contexts for s in context if s.written for t in tokenizer.segment(s.text))

    known = tokens(Primer(20, stage=stage).training_context(rng) for stage in range(len(Primer.STAGES)) for _ in range(2000))
    for task, method in itertools.product(TASKS.values(), METHODS):
        needed = tokens(task.training_context(rng, method) for _ in range(300))
        rare = {tokenizer.sp.id_to_piece(t): known[t] for t in needed if known[t] < 10}
        assert not rare, (task.name, method, rare)


def test_every_task_has_the_interface():
    for name, task in TASKS.items():
        assert task.name == name
        rng = random.Random(0)
        p = task.sample(rng, task.train_lengths[-1])
        assert p.length == task.train_lengths[-1]
        assert task.from_text(task.example) is not None
        for method in METHODS:
            for q in task.levels(p, method):
                assert any(s.written for s in task.context(q, method))


if __name__ == "__main__":
    for five in itertools.product(DP.VALUES, repeat=5):
        check_dp(five)
    print(f"all {len(DP.VALUES) ** 5:,} lists of 5 items agree with brute force")
    longer = random.Random(0)
    for _ in range(10_000):
        check_dp(tuple(longer.choices(DP.VALUES, k=longer.randint(6, 12))))
    print("and so do 10,000 random lists of 6 to 12 items")
    test_parity_agrees_with_xor()
    print("10,000 random lists of 1 to 100 bits agree with xor")
    test_oracle_and_every_context_agree_with_schoolbook_addition()
    print("10,000 random sums of 1 to 60 digits agree with schoolbook addition")
