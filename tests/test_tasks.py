"""Addition's oracle, text formats, sampling and judging; what the primer does not hold."""

import random
import re
from collections import Counter

import pytest

from model import UserError
from tasks import METHODS, TASKS, Addition, Primer, Segment, held_out, return_value


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


@pytest.mark.parametrize("method", METHODS)
def test_evaluation_problems_are_never_trained_on(method):
    rng = random.Random(1)
    for _ in range(20_000):
        text = Addition.training_context(rng, method)[0].text.partition("\n")[0]
        p = Addition.from_text(text)
        assert p.length == 1 or not Addition.held_out(p)
    for length in (2, 3, 15, 60):
        assert all(Addition.held_out(Addition.sample(rng, length)) for _ in range(50))


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
    rng, compared = random.Random(3), 0
    for _ in range(3000):
        context = Primer(40).training_context(rng)
        whole = "".join(s.text for s in context)
        assert not re.search(r"parity|subsequence|dp array|Solution: Call: ", whole)
        for ask, reply in zip(context[::2], context[1::2], strict=True):
            asked = {int(x) for x in re.findall(r"\d{4,}", ask.text) if len(set(x)) > 4}  # 111 + 111 is no sum
            sums = {a + b for a in asked for b in asked}
            replied = {int(x) for x in re.findall(r"\d{4,}", reply.text)}
            assert not sums & replied
            compared += len(sums)
    assert compared > 1000


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
