"""The README's example of a new task: its class put into tasks.py, then trained and evaluated by the scripts."""

import json
import re
import shutil
import subprocess
import sys

from conftest import ROOT


def test_the_example_of_the_readme(tmp_path):
    for file in ROOT.glob("*.py"):
        shutil.copy(file, tmp_path)
    (example,) = re.findall(r"```python\n(class Maximum:.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    tasks = (tmp_path / "tasks.py").read_text()
    assert tasks.count("\n\nclass Primer:") == 1 and tasks.count("(Addition, DP, Parity)") == 1
    tasks = tasks.replace("\n\nclass Primer:", f"\n\n{example}\n\nclass Primer:")
    (tmp_path / "tasks.py").write_text(tasks.replace("(Addition, DP, Parity)", "(Addition, DP, Parity, Maximum)"))

    def run(*args):
        done = subprocess.run([sys.executable, *args], cwd=tmp_path, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr
        return done.stdout

    base = ("--base", str(ROOT / "checkpoints/tiny"))
    # In so short a run a temperature that rises would leave nothing learned.
    short = ("--warmup", "5", "--temperature", "1", "--replay", "0")
    for method, steps in (("retuning", "40"), ("scratchpad", "2")):
        run("train.py", "--task", "maximum", "--method", method, "--steps", steps, *short, *base)
    run("eval.py", "--ood", "--task", "maximum", "--lengths", "1", "3", "--n", "20", *base)
    results = {(r["method"], r["length"]): r for r in json.loads((tmp_path / "results/ood.json").read_text())["results"]}
    assert results.keys() == {(m, n) for m in ("retuning", "scratchpad") for n in (1, 3)}
    assert results["retuning", 1]["accuracy"] > 0.5, "40 steps are enough to copy a digit"
    assert [r["n"] for r in results.values()] == [10, 20, 10, 20], "of one digit there are only ten problems"
    out = run("recurse.py", "What is the maximum of [7]?", *base)
    assert "answer: 7 (right)" in out
