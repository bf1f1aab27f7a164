"""The benchmarks run, and what they compare is the same work: every way writes the same tokens. No time is looked at."""

import subprocess
import sys

import pytest
from conftest import ROOT

COMMANDS = {
    "steps": (
        ["steps.py", "--shape", "small", "--rows", "3", "--steps", "8", "--repeats", "1", "--ways", "eager", "static"],
        {2},
    ),
    "decode": (
        ["decode.py", "--shape", "small", "--length", "2", "--n", "2", "--slow", "1"],
        {9, 10},
    ),  # 9 with one thread: no way by several processes
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_attention_has_the_same_gradients_in_both_ways(dtype):
    flags = ["--dtype", dtype, "--lengths", "40", "64", "--tokens", "100", "--repeats", "1"]
    command = [sys.executable, ROOT / "benchmarks/attention.py", *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines() if line.endswith("of the largest")]
    assert [row[:2] for row in rows] == [["40", "2"], ["64", "1"]]
    assert all(float(row[5]) < (1e-4 if dtype == "float32" else 0.05) for row in rows), done.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_same_tokens_in_all_ways(name):
    (script, *flags), n_ways = COMMANDS[name]
    done = subprocess.run([sys.executable, ROOT / "benchmarks" / script, *flags], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    table = done.stdout[done.stdout.index("same tokens") :].splitlines()[1:]
    verdicts = [line.split()[-1] for line in table if line.split()[-1] in ("yes", "NO")]
    assert verdicts and set(verdicts) == {"yes"}, done.stdout
    assert len(verdicts) in n_ways, done.stdout
