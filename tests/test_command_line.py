"""What a user can get wrong gives one clear line and a non-zero exit; nothing half-written stays."""

import shutil
import subprocess
import sys

import pytest
from conftest import BASE, ROOT


def run(script, *args):
    return subprocess.run([sys.executable, ROOT / script, *map(str, args)], capture_output=True, text=True, timeout=100)


ADAPTER = ["--adapter", str(BASE / "adapters/addition-retuning")]

CASES = [
    ("train.py", ["--base", "nowhere"], "nowhere: no such folder"),
    ("train.py", ["--task", "primer"], "--full"),
    ("train.py", ["--from-scratch"], "--full"),
    ("train.py", ["--full"], "leave out --full"),
    ("train.py", ["--steps", "0"], "--steps 0: expected 1 or more"),
    ("train.py", ["--lr", "-1"], "--lr -1.0: expected 0 to 1000"),
    ("train.py", ["--alpha", "nan"], "--alpha nan"),
    ("train.py", ["--targets", "wq", "wx"], "'wx'"),
    ("train.py", ["--resume"], "no unfinished run"),
    ("recurse.py", [""], "the prompt is empty"),
    ("recurse.py", ["   "], "the prompt is empty"),
    ("recurse.py", ["hello"], "expected one such as: 73199 + 21439"),
    ("recurse.py", ["1 + 2\nSolution: Call: x"], "no problem of a known task"),
    ("recurse.py", ["1 + " + "9" * 3000, *ADAPTER], "tokens, the model takes"),
    ("recurse.py", ["1 + " + "9" * 5000], "at most 4000 decimal digits"),
    ("recurse.py", ["1 + 2", "--seed", "9" * 30], "--seed"),
    ("recurse.py", ["1 + 2", *ADAPTER, "--base", "nowhere"], "nowhere: no such folder"),
    ("recurse.py", ["1 + 2", "--adapter", "nowhere"], "nowhere: no such adapter folder"),
    ("recurse.py", ["1 + 2", "--temperature", "-1"], "--temperature and --seed of 0 or more"),
    ("eval.py", ["--adapter", "nowhere"], "--adapter needs --task and --method"),
    ("eval.py", ["--problems", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
    ("recurse.py", ["1 + 2", "--temperature", "nan"], "--temperature and --seed of 0 or more"),
    ("eval.py", ["--n", "0"], "1 or more"),
    ("eval.py", ["--runs", "nowhere"], "--runs nowhere: no such folder"),
    ("eval.py", ["--lengths", "5000"], "lengths of 1 to 4000"),
]


@pytest.mark.parametrize(("script", "args", "message"), CASES, ids=lambda x: str(x)[:30])
def test_one_clear_line(script, args, message, tmp_path):
    extra = ["--out", tmp_path / "out"] if script != "recurse.py" else []
    done = run(script, *args, *extra)
    assert done.returncode == 1
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: ") and message in line
    assert done.stdout == "" and not (tmp_path / "out").exists()


@pytest.mark.parametrize("args", [["train.py", "--task", "magic"], ["eval.py", "--task", "magic"], ["recurse.py"]])
def test_what_the_command_line_itself_refuses(args):
    done = run(*args)
    assert done.returncode == 2 and "Traceback" not in done.stderr


@pytest.mark.parametrize("script", ["train.py", "recurse.py", "eval.py"])
def test_help(script):
    done = run(script, "--help")
    assert done.returncode == 0 and "--device" in done.stdout


def test_damaged_adapter_and_foreign_base(tmp_path, small_base):
    adapter = tmp_path / "adapter"
    shutil.copytree(BASE / "adapters/addition-retuning", adapter)
    done = run("recurse.py", "1 + 2", "--adapter", adapter, "--base", small_base)
    assert done.returncode == 1 and "the base needs" in done.stderr and "Traceback" not in done.stderr
    config = adapter / "adapter_config.json"
    config.write_text(config.read_text().replace("checkpoints/tiny", "someone/a-base"))
    done = run("recurse.py", "1 + 2", "--adapter", adapter)
    assert done.returncode == 1 and "its base, someone/a-base, is no folder here" in done.stderr and "--base" in done.stderr
    shutil.copy(BASE / "adapters/addition-retuning/adapter_config.json", config)
    file = adapter / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    done = run("recurse.py", "1 + 2", "--adapter", adapter)
    assert done.returncode == 1 and "not a readable file of weights" in done.stderr and "Traceback" not in done.stderr
