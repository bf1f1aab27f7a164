"""The evaluation: intervals, files, interruption. On the shipped adapters, with few short problems."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
from conftest import BASE, ROOT

import eval as evaluation
from model import UserError


def run(*args):
    command = [sys.executable, ROOT / "eval.py", "--dtype", "float32", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=200)


def empty(folder):
    """A folder without runs, so that the shipped adapters are what is evaluated."""
    (folder / "none").mkdir(exist_ok=True)
    return folder / "none"


@pytest.mark.parametrize(
    ("correct", "n", "low", "high"), [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (50, 100, 0.4038, 0.5962)]
)
def test_wilson(correct, n, low, high):
    """Values of the textbook formula, computed elsewhere."""
    assert evaluation.wilson(correct, n) == pytest.approx((low, high), abs=1e-4)


def test_reach():
    def row(length, accuracy, method="retuning"):
        return {"task": "addition", "method": method, "length": length, "accuracy": accuracy}

    rows = [row(30, 0.9), row(5, 1.0), row(15, 0.95), row(60, 0.89), row(80, 0.95), row(15, 0.5, "baseline")]
    expected = {"task": "addition", "method": "retuning", "reach": 30, "1x": 0.95, "2x": 0.9, "4x": 0.89}
    none = {"task": "addition", "method": "baseline", "reach": None, "1x": 0.5, "2x": None, "4x": None}
    assert evaluation.reach(rows) == [expected, none]
    assert evaluation.reach_table([none]).splitlines()[-1].split() == ["addition", "by", "baseline", "50.0", "-", "-", "-"]


def test_ood(tmp_path):
    done = run("--ood", "--lengths", "3", "5", "--n", "4", "--out", tmp_path, "--runs", empty(tmp_path))
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "ood.json").read_text())
    assert [(r["task"], r["method"], r["length"]) for r in report["results"]] == [
        (task, m, n) for task in ("addition", "dp", "parity") for m in ("baseline", "scratchpad", "retuning") for n in (3, 5)
    ]
    for r in report["results"]:
        assert r.keys() == {
            "task", "method", "adapter", "length", "n", "correct", "accuracy", "ci95", "endings", "tokens_generated",
            "tokens_forwarded", "tokens_prompt", "tokens_returned", "tokens_guessed", "tokens_accepted", "tokens_refed", "frames",
            "frames_shared", "peak_cache_bytes", "seconds",
        }  # fmt: skip
        assert r["n"] == 4 == sum(r["endings"].values()) and r["accuracy"] == r["correct"] / 4
        assert r["ci95"][0] <= r["accuracy"] <= r["ci95"][1]
        assert f"checkpoints/tiny/adapters/{r['task']}-{r['method']}" in r["adapter"]
    assert report["seed"] == 0 and report["config"]["n"] == 4
    assert "baseline" in done.stdout and "retuning" in done.stdout
    assert not list(tmp_path.glob("*.partial.jsonl"))
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        assert "matplotlib is not installed" in done.stdout
    else:
        assert (tmp_path / "ood.png").read_bytes().startswith(b"\x89PNG")


def test_all_methods_get_the_same_problems_and_seeds_differ(tmp_path):
    def todo(seed):
        return evaluation.cells(evaluation.EvalConfig(ood=True, n=5, seed=seed, runs=tmp_path))

    by_method = {}
    for cell in todo(0):
        by_method.setdefault(cell.method, []).append((cell.task, cell.length, cell.problems))
    assert by_method["baseline"] == by_method["scratchpad"] == by_method["retuning"]
    assert [c.problems for c in todo(0)] == [c.problems for c in todo(0)] != [c.problems for c in todo(1)]


def test_your_own_problems(tmp_path):
    file = tmp_path / "mine.jsonl"
    file.write_text('{"task": "addition", "a": "7319", "b": "2143"}\n\n{"task": "addition", "a": "5", "b": "17"}\n')
    done = run("--problems", file, "--method", "retuning", "--out", tmp_path, "--runs", empty(tmp_path))
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "problems.json").read_text())["results"]
    assert [(r["length"], r["n"]) for r in results] == [(2, 1), (4, 1)]


def test_problems_without_an_adapter_are_an_error(tmp_path, monkeypatch):
    file = tmp_path / "mine.jsonl"
    file.write_text('{"task": "addition", "a": "1", "b": "2"}\n{"task": "dp", "items": [3, -2, 5]}\n')
    adapter = BASE / "adapters/addition-retuning"
    flags = dict(problems=file, method="retuning")
    with pytest.raises(UserError, match="problems of dp, but --task is addition"):
        evaluation.cells(evaluation.EvalConfig(**flags, task="addition", adapter=adapter))
    monkeypatch.setattr(evaluation, "find_adapters", lambda c: [("addition", "retuning", adapter)])
    with pytest.raises(UserError, match="no adapter for dp"):
        evaluation.cells(evaluation.EvalConfig(**flags))


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    done = run("--n", 1, "--lengths", 1, "--out", tmp_path / "file/results")
    assert done.returncode == 1 and "cannot be written to" in done.stderr and "Traceback" not in done.stderr


def test_no_problem_is_asked_twice():
    rng = random.Random(0)
    for task, length, n in (("addition", 2, 200), ("dp", 2, 100), ("parity", 6, 100), ("addition", 40, 50)):
        problems = evaluation.draw(task, length, rng, n)
        assert len(set(problems)) == len(problems) <= n
        assert len(problems) == n or task != "addition"
    assert len(problems) == 50


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ('{"task": "addition", "a": "1"}', "line 1.*'b' is missing"),
        ('{"task": "addition", "a": "1", "b": "2"}\n{"task": "addition", "a": "x", "b": "2"}', "line 2.*decimal digits"),
        ('{"task": "magic", "a": "1", "b": "2"}', "line 1.*one of addition"),
        ('{"task": "addition", "a": 1, "b": 2}', "decimal digits"),
        ('{"task": ["addition"]}', "one of addition"),
        ("[" * 100_000, "line 1"),
        ("[1, 2]", "line 1.*object"),
        ("{", "line 1"),
        ("", "no problems"),
        ("\udcff\udcfe", "not UTF-8"),
    ],
)
def test_malformed_problem_files(text, match, tmp_path):
    file = tmp_path / "mine.jsonl"
    file.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match=match) as e:
        evaluation.own_problems(file)
    assert "\n" not in str(e.value)
    with pytest.raises(UserError, match="no such file"):
        evaluation.own_problems(tmp_path / "nowhere")


def test_what_is_free_is_measured_when_the_weights_are_in_memory(tmp_path, monkeypatch):
    """Once: what is loaded later takes the place of what was loaded first."""
    events = []

    def log(name):
        original = getattr(evaluation, name)
        monkeypatch.setattr(evaluation, name, lambda *args: (events.append(name), original(*args))[1])

    log("load_solver")
    log("cache_bytes")
    c = evaluation.EvalConfig(task="addition", lengths=(1,), n=2, runs=tmp_path, device="cpu", dtype="float32")
    cells = evaluation.cells(c)
    assert len({cell.adapter for cell in cells}) == 3
    assert len(list(evaluation.decode(c, cells, [[0, 1]] * 3))) == 6
    assert events == ["load_solver", "cache_bytes", "load_solver", "load_solver"]


def test_an_interrupted_evaluation_goes_on(tmp_path, monkeypatch):
    """Problems that are done are not decoded again, and the results are those of an uninterrupted evaluation."""
    c = evaluation.EvalConfig(
        ood=True, method="retuning", lengths=(3, 4), n=6, out=tmp_path / "a", dtype="float32", runs=tmp_path
    )
    evaluation.main(c)
    whole = json.loads((tmp_path / "a/ood.json").read_text())["results"]

    c.out = tmp_path / "b"
    real, count = evaluation.Partial.add, 0

    def add(self, record):
        nonlocal count
        real(self, record)
        count += 1
        if count == 8:
            raise KeyboardInterrupt

    monkeypatch.setattr(evaluation.Partial, "add", add)
    with pytest.raises(KeyboardInterrupt):
        evaluation.main(c)
    (partial,) = (tmp_path / "b").glob("ood-*.partial.jsonl")
    with partial.open("a") as f:
        f.write('{"cell": "cut o')  # as a kill in the middle of a write leaves it
    assert not (tmp_path / "b/ood.json").exists()
    evaluation.main(c)
    assert count == sum(r["n"] for r in whole) == 36, "done problems were decoded again"
    again = json.loads((tmp_path / "b/ood.json").read_text())["results"]
    assert outcome(whole) == outcome(again)


def outcome(results):
    """What does not depend on the batches: they decide what is shared, and how fast."""
    return [{k: r[k] for k in ("task", "method", "length", "n", "correct", "endings")} for r in results]


def test_two_processes_share_the_problems(tmp_path):
    flags = ("--lengths", 3, 4, "--n", 7, "--method", "retuning", "--runs", empty(tmp_path))
    assert run(*flags, "--out", tmp_path / "one").returncode == 0
    done = run(*flags, "--out", tmp_path / "two", "--processes", 2)
    assert done.returncode == 0 and not done.stderr, done.stderr
    one, two = (json.loads((tmp_path / name / "in-distribution.json").read_text())["results"] for name in ("one", "two"))
    assert outcome(one) == outcome(two) and [r["n"] for r in two] == [7] * 6
    assert not list((tmp_path / "two").glob("*.partial.jsonl"))


def test_interrupted_processes_stop_in_one_line_and_go_on(tmp_path):
    """By `kill -INT` to the first process, which stops the others."""
    flags = "--task addition --method retuning --lengths 2 16 --n 30 --processes 2 --dtype float32".split()
    command = [sys.executable, ROOT / "eval.py", *flags, "--out", tmp_path, "--runs", empty(tmp_path)]
    started = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # it is ignored in what a shell runs in the background
    )  # fmt: skip
    while started.poll() is None and not any(p.stat().st_size for p in tmp_path.glob("*.partial.jsonl")):
        time.sleep(0.05)
    os.kill(started.pid, signal.SIGINT)
    _, errors = started.communicate(timeout=60)
    assert (started.returncode, errors) == (130, "interrupted\n")
    done = sum(len(p.read_text().splitlines()) for p in tmp_path.glob("*.partial.jsonl"))
    assert 0 < done < 60
    again = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert again.returncode == 0, again.stderr
    assert [r["n"] for r in json.loads((tmp_path / "ood.json").read_text())["results"]] == [30, 30]
