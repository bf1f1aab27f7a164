"""The benchmarks run, and what they compare is the same work: every way writes the same tokens. No time is looked at."""

import importlib.util
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conftest import BASE, ROOT

import lora
import model as llama
import train
from tasks import TASKS

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


def test_what_a_call_for_a_row_of_the_cache_takes():
    command = [
        sys.executable,
        ROOT / "benchmarks/attention.py",
        "--cached",
        "--dtype",
        "float32",
        "--lengths",
        "40",
        "64",
        "--repeats",
        "1",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()[3:]]
    assert [row[0] for row in rows] == ["40", "64"] and all(len(row) == 5 for row in rows), done.stdout


def test_attention_to_a_cache_is_the_same_by_row(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    attention, out = importlib.import_module("attention"), []
    for by_row in (False, True):
        torch.manual_seed(0)
        out.append(attention.attend_to_cache(3, 4, 50, (4, 2, 8), torch.float32, by_row)())
    torch.testing.assert_close(*out)


@pytest.mark.parametrize("name", COMMANDS)
def test_same_tokens_in_all_ways(name):
    (script, *flags), n_ways = COMMANDS[name]
    done = subprocess.run([sys.executable, ROOT / "benchmarks" / script, *flags], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    table = done.stdout[done.stdout.index("same tokens") :].splitlines()[1:]
    verdicts = [line.split()[-1] for line in table if line.split()[-1] in ("yes", "NO")]
    assert verdicts and set(verdicts) == {"yes"}, done.stdout
    assert len(verdicts) in n_ways, done.stdout


@pytest.fixture
def gpu(monkeypatch):
    """benchmarks/gpu.py, with room for all contexts of the first steps; models are not saved but kept, and not evaluated."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    gpu = importlib.import_module("gpu")
    of = gpu.Shape.of
    monkeypatch.setattr(gpu.Shape, "of", lambda data: of(data, share=1.0))
    monkeypatch.setattr(train, "evaluate", lambda *_: 0.0)
    monkeypatch.setattr(train, "quick_decode", lambda *_: 0.0)
    gpu.kept = []
    monkeypatch.setattr(llama, "save", lambda model, *_: gpu.kept.append(dict(model.named_parameters())))
    monkeypatch.setattr(lora, "save_adapter", lambda model, *_, **__: gpu.kept.append(train.trainable(model)))
    return gpu


def trained(c, tmp_path):
    """(parameters before, train.py's after it)"""
    model, tokenizer = train.build(c)
    before = {name: p.detach().clone() for name, p in train.trainable(model).items()}
    train.train(c, train.new_run(replace(c, out=tmp_path)), model, tokenizer)
    return before, train.trainable(model)


def assert_same_updates(before, one, other):
    off, size = (sum(((a[n] - b[n]) ** 2).sum().item() for n in before) ** 0.5 for a, b in ((one, other), (one, before)))
    assert size > 0 and off < 0.02 * size, (off, size)


@pytest.mark.parametrize(
    ("task", "changed"),
    [
        ("parity", dict(weaken=0.0, temperature=1.0)),
        ("parity", dict(weaken=0.5, temperature=4.0)),
        ("dp", dict(weaken=0.2, temperature=4.0, lessons=0.7)),
    ],
)
def test_adapters_of_several_seeds_are_those_of_train(gpu, tmp_path, monkeypatch, task, changed):
    """Of the same contexts (lessons too), in steps of the same size; their gradients are clipped one by one."""
    monkeypatch.setitem(train.TASK_DEFAULTS, task, replace(train.TASK_DEFAULTS[task], **changed))
    flags = dict(task=task, method="retuning", base=BASE, steps=3, batch_size=3, device="cpu", dtype="float32")
    gpu.train_adapters(gpu.Adapters(**flags, seeds=(0, 1), out=tmp_path / "many", workers=0))
    many = list(gpu.kept)
    for seed in (0, 1):
        before, alone = trained(train.complete(train.TrainConfig(**flags, seed=seed)), tmp_path)
        assert_same_updates(before, alone, many[seed])
        with pytest.raises(AssertionError):
            assert_same_updates(before, alone, many[1 - seed])


def test_no_run_is_written_over(gpu, tmp_path):
    (tmp_path / "parity-retuning").mkdir()
    for train_it, config in (
        (gpu.train_adapters, gpu.Adapters(task="parity", base=BASE, out=tmp_path, device="cpu")),
        (gpu.train_base, gpu.Base(base=BASE, out=BASE, device="cpu")),
    ):
        with pytest.raises(llama.UserError, match="another --out"):
            train_it(config)


def test_contexts_that_are_compared_in_training_count_alike(monkeypatch):
    """Every target once, and nothing is read as anything else: transformers and peft know no lessons."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    spec = importlib.util.spec_from_file_location("benchmarks_train", ROOT / "benchmarks/train.py")
    benchmark = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, benchmark)
    spec.loader.exec_module(benchmark)
    seen = []
    monkeypatch.setattr(benchmark, "contexts", lambda *args: seen.append(args) or sys.exit())
    for task in TASKS:
        with pytest.raises(SystemExit):
            benchmark.run(benchmark.Config(task=task, base=BASE, steps=1, device="cpu"))
    for c, t, tokenizer, size in seen:
        examples = sum((train.Data(t, tokenizer, size)[i] for i in range(3)), [])
        assert {(e.weight, e.meaning) for e in examples} == {(1.0, None)}, c.task
    assert len(seen) == len(TASKS)


def test_a_base_is_that_of_train(gpu, tmp_path, monkeypatch):
    small = train.PRESETS["base7"] | dict(base=BASE, steps=3, batch_size=3)
    monkeypatch.setitem(train.PRESETS, "base7", small)
    gpu.train_base(gpu.Base(out=tmp_path / "gpu", device="cpu", dtype="float32", workers=0))
    c = train.complete(train.TrainConfig(**small, preset="base7", device="cpu", dtype="float32"))
    before, alone = trained(c, tmp_path)
    assert_same_updates(before, alone, gpu.kept[0])
