"""Labels, stretched positions, the loss over micro-batches, gradients, and runs that are killed and resumed."""

import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from dataclasses import replace

import pytest
import torch
from conftest import BASE, ROOT, random_model
from safetensors.torch import load_file

import lora
import model as llama
import train
from tasks import DP, METHODS, TASKS, Addition, Segment, written

CONFIG = lora.LoRAConfig(rank=4, alpha=4.0)


def test_labels(tokenizer):
    """Loss on what the model writes and on the end of each segment; the end is a label, never an input."""
    context = Addition.context(Addition.problem("42", "17"), "retuning")
    e = train.encode(context, tokenizer)
    assert len(e.tokens) == len(e.labels) == len(e.positions)
    assert tokenizer.eos_id not in e.tokens and e.tokens[0] == tokenizer.bos_id
    assert tokenizer.sp.decode(e.tokens) == "".join(s.text for s in context)
    predicted, at = [], 0
    for i, s in enumerate(context):
        n = len(tokenizer.segment(s.text) if i else tokenizer.start(s.text))
        if s.written:
            predicted.append(e.labels[at - 1 : at + n])
            e.labels[at - 1 : at + n] = [train.IGNORE] * (n + 1)
        at += n
    assert predicted == [[*tokenizer.segment(s.text), tokenizer.eos_id] for s in context if s.written]
    assert set(e.labels) == {train.IGNORE}, "a label outside of what the model writes"


def test_an_empty_written_segment_is_one_label(tokenizer):
    e = train.encode([Segment("rest of 7: ", False), Segment("", True), Segment("\n7", False)], tokenizer)
    assert e.labels.count(tokenizer.eos_id) == 1 == len(e.labels) - e.labels.count(train.IGNORE)


def test_stretched_positions(tokenizer):
    boundary = train.boundaries(tokenizer)
    rng, seen = random.Random(0), set()
    for _ in range(300):
        e = train.encode(Addition.training_context(rng, "retuning"), tokenizer)
        n = len(e.tokens)
        train.stretch(e, boundary, rng, 8.0)
        steps = [b - a for a, b in zip(e.positions, e.positions[1:], strict=False)]
        assert len(e.positions) == n and min(steps) > 0 and e.positions[0] >= 0
        seen.add("plain" if e.positions[-1] == n - 1 else "even" if max(steps) - min(steps) < 1e-6 else "uneven")
    assert seen == {"plain", "even", "uneven"}
    e = train.encode(Addition.training_context(rng, "retuning"), tokenizer)
    before = list(e.positions)
    for _ in range(20):
        train.stretch(e, boundary, rng, 1.0)
    assert e.positions == before, "a factor of 1 is off"


def examples(tokenizer, n=12):
    rng = random.Random(5)
    return [train.encode(Addition.training_context(rng, "retuning"), tokenizer) for _ in range(n)]


def gradients(model, batch, max_tokens, checkpointing=False):
    model.train()
    total = 0.0
    for group in train.micro_batches(batch, max_tokens):
        loss = train.loss_sum(model, train.pack(group, model), checkpointing) / train.n_targets(batch)
        loss.backward()
        total += loss.item()
    found = {n: p.grad.clone() for n, p in train.trainable(model).items()}
    model.zero_grad()
    return total, found


@pytest.mark.parametrize("max_tokens", [1, 150, 100_000])
def test_micro_batches_do_not_change_the_loss_or_its_gradient(tokenizer, max_tokens):
    """The mean is over the targets of the step; one context a pass (no padding) is the reference."""
    model = lora.wrap(random_model(), CONFIG)
    batch = examples(tokenizer)
    reference, expected = 0.0, {}
    for e in batch:
        logits = model(torch.tensor([e.tokens]))[0]
        losses = torch.nn.functional.cross_entropy(logits, torch.tensor(e.labels), ignore_index=train.IGNORE, reduction="sum")
        (losses / train.n_targets(batch)).backward()
        reference += losses.item() / train.n_targets(batch)
    expected = {n: p.grad.clone() for n, p in train.trainable(model).items()}
    model.zero_grad()
    loss, found = gradients(model, batch, max_tokens)
    assert abs(loss - reference) < 1e-5
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], atol=1e-5, rtol=1e-3)
    assert sum(map(len, train.micro_batches(batch, max_tokens))) == len(batch)


def test_gradient_checkpointing_reaches_every_b_and_changes_nothing(tokenizer):
    model = lora.wrap(random_model(), CONFIG)
    batch = examples(tokenizer)
    _, plain = gradients(model, batch, 500)
    _, found = gradients(model, batch, 500, checkpointing=True)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, plain[name], atol=1e-6, rtol=1e-4)
        if name.endswith("lora_B"):
            assert gradient.abs().max() > 0, f"{name} got no gradient"


def test_a_packed_context_does_not_see_its_neighbours(tokenizer):
    model = lora.wrap(random_model(), CONFIG)
    contexts = examples(tokenizer, 5)
    other = [*contexts]
    other[2] = train.Example([t % 400 + 50 for t in contexts[2].tokens], contexts[2].labels, contexts[2].positions)
    batches = [train.pack(group, model) for group in (contexts, other)]
    sizes = [*batches[0].lengths, len(batches[0].tokens) - sum(batches[0].lengths)]
    assert sizes[-1] > 0, "there is padding behind them"
    before, after = (model(b.tokens, positions=b.positions, lengths=b.lengths).split(sizes) for b in batches)
    for i, (x, y) in enumerate(zip(before, after, strict=True)):
        assert torch.equal(x, y) == (i != 2), f"context {i}"
    alone = model(
        torch.tensor(contexts[0].tokens), positions=torch.tensor(contexts[0].positions), lengths=[len(contexts[0].tokens)]
    )
    assert (before[0][: len(alone)] - alone).abs().max() < 1e-4, "nor its padding"


@pytest.mark.parametrize("rslora", [False, True])
def test_gradients_and_five_steps_equal_pefts(tokenizer, small_base, tmp_path, rslora):
    """The same adapter and batches: gradients within 1e-5 in fp32, and five steps of AdamW with the same losses."""
    import peft
    import transformers

    config = lora.LoRAConfig(rank=4, alpha=6.0, rslora=rslora)
    model, _ = llama.load(small_base)
    lora.wrap(model, config)
    with torch.no_grad():
        for layer in lora.lora_layers(model).values():  # as after some training: with B zero, A has no gradient
            layer.lora_B.normal_(std=0.05)
    lora.save_adapter(model, tmp_path / "adapter", config, base=str(small_base))
    theirs = transformers.LlamaForCausalLM.from_pretrained(small_base, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter", is_trainable=True).train()
    batch = examples(tokenizer, 8)
    length = max(len(e.tokens) for e in batch)
    pads = [length - len(e.tokens) for e in batch]
    tokens = torch.tensor([e.tokens + [0] * n for e, n in zip(batch, pads, strict=True)])
    labels = torch.tensor([e.labels + [train.IGNORE] * n for e, n in zip(batch, pads, strict=True)])
    mask = torch.tensor([[1] * (length - n) + [0] * n for n in pads])

    def our_loss():
        return train.loss_sum(model, train.pack(batch, model)) / train.n_targets(batch)

    def their_loss():
        logits = theirs(input_ids=tokens, attention_mask=mask).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=train.IGNORE)

    our_loss().backward()
    their_loss().backward()
    found = {n: p.grad for n, p in lora.lora_state(model).items()}
    expected = {n.replace(".default", ""): p.grad for n, p in theirs.named_parameters() if p.requires_grad}
    assert found.keys() == expected.keys() and len(found) == 2 * (2 * 7 + 1)
    for name, gradient in expected.items():
        assert gradient.abs().max() > 1e-4, "the comparison should be about something"
        torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-5)

    def losses(loss_of, parameters):
        optimizer, values = torch.optim.AdamW(parameters, lr=5e-3, weight_decay=0.01), []
        for _ in range(5):
            optimizer.zero_grad()
            loss = loss_of()
            loss.backward()
            optimizer.step()
            values.append(loss.item())
        return values

    ours = losses(our_loss, list(train.trainable(model).values()))
    assert ours == pytest.approx(losses(their_loss, [p for p in theirs.parameters() if p.requires_grad]), abs=1e-4)
    assert ours[4] < ours[0] - 0.05


def test_learning_rate():
    c = train.TrainConfig(steps=100, warmup=10, decay=0.5, lr=1.0)
    rates = [train.learning_rate(c, s) for s in range(100)]
    assert rates[0] == 0.1 and rates[9] == rates[50] == 1.0 and abs(rates[75] - 0.5) < 1e-9 and 0 < rates[99] < 0.03
    assert train.learning_rate(train.TrainConfig(**train.PRESETS["paper"]), 3905) == 2e-4


def test_defaults_of_a_task_give_way_to_flags_and_are_the_same_for_all_methods():
    for task in (*TASKS, "primer", "some new one"):
        chosen = [train.complete(train.TrainConfig(task=task, method=method)) for method in METHODS]
        shared = {(c.batch_size, c.targets, c.replay, c.weaken, c.temperature, c.lr) for c in chosen}
        assert len(shared) == 1 and None not in chosen[0].__dict__.values()
        steps = {c.method: c.steps for c in chosen}
        if task == "dp":  # whole problems in a context: fewer of them, for as many tokens
            assert steps.pop("scratchpad") < steps["retuning"]
        assert len(set(steps.values())) == 1
    given = dict(steps=7, targets=("wq",), replay=0.0, lr=1e-4)
    c = train.complete(train.TrainConfig(task="dp", **given))
    assert {name: getattr(c, name) for name in given} == given


def run(*args, launcher=(), **kwargs):
    command = [sys.executable, *launcher, str(ROOT / "train.py"), "--rank", "2", "--batch-size", "8", "--warmup", "2"]
    command += map(str, args)
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **kwargs)


def test_a_run_and_what_it_leaves(small_base, tmp_path):
    weights = (small_base / "model.safetensors").read_bytes()
    flags = ("--base", small_base, "--steps", 3, "--out", tmp_path / "runs", "--method", "scratchpad")
    for name in ("addition-scratchpad", "addition-scratchpad-2"):
        done = run(*flags)
        assert done.returncode == 0, done.stderr
        folder = tmp_path / "runs" / name
        assert {p.name for p in folder.iterdir()} == {
            "adapter_config.json", "adapter_model.safetensors", "train_config.json", "metrics.jsonl",
        }  # fmt: skip
    config = json.loads((folder / "train_config.json").read_text())
    assert config["seed"] == 0 and config["method"] == "scratchpad" and config["steps"] == 3
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [m["step"] for m in lines if "loss" in m] == [1, 2, 3]
    assert "validation_loss" in lines[-2] and "in_distribution_accuracy" in lines[-1]
    same = [tmp_path / "runs" / n / "adapter_model.safetensors" for n in ("addition-scratchpad", "addition-scratchpad-2")]
    assert same[0].read_bytes() == same[1].read_bytes(), "the same seed gives the same adapter"
    assert (small_base / "model.safetensors").read_bytes() == weights
    model, _ = llama.load(small_base)
    lora.load_adapter(model, folder)


def run_in_a_fork(argv):
    """train.py as of the command line. (In a child of a process that has imported torch: it starts at once.)"""
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    sys.argv = ["train.py", *argv]
    llama.run_script(train.main)


def test_twenty_kills_change_nothing(small_base, tmp_path, monkeypatch):
    """SIGKILL at random moments; a resumed run ends with the very same adapter."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # for the server, which has to find what it is to import beforehand
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload(["train"])
    flags = ["--base", small_base, "--steps", 24, "--save-every", 2, "--dropout", 0.1]
    argv = [*map(str, flags), "--rank", "2", "--batch-size", "8", "--warmup", "2", "--out"]

    def start(out, *extra):
        process = forks.Process(target=run_in_a_fork, args=([*argv, str(tmp_path / out), *extra],))
        process.start()
        return process

    start("warm").join()  # the server itself starts here
    began = time.monotonic()
    whole = start("whole")
    whole.join()
    duration = time.monotonic() - began
    assert whole.exitcode == 0
    expected = (tmp_path / "whole/addition-retuning/adapter_model.safetensors").read_bytes()
    seed = random.SystemRandom().randrange(10**9)
    rng, kills, resumed, finished = random.Random(seed), 0, 0, 0
    folder = tmp_path / "killed/addition-retuning"
    while not (enough := kills >= 20 and resumed >= 5) or not finished:  # how many fall after a checkpoint is chance
        assert kills < 200, f"{resumed} resumed; the moments' seed was {seed}"
        going = (folder / "train_config.json").exists()
        process = start("killed", *(["--resume"] if going else []))
        process.join(None if enough else rng.uniform(0, duration))
        process.kill()
        process.join()
        kills += process.exitcode == -signal.SIGKILL
        resumed += going and (folder / "checkpoint.pt").exists()
        assert process.exitcode in (0, -signal.SIGKILL), f"exit code {process.exitcode}; the moments' seed was {seed}"
        if (folder / "adapter_config.json").exists():
            assert (folder / "adapter_model.safetensors").read_bytes() == expected, f"the moments' seed was {seed}"
            if process.exitcode == 0:
                steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
                assert steps == [*range(1, 25), 24, 24]
            finished += 1
            shutil.rmtree(tmp_path / "killed")
    again = run(*flags, "--out", tmp_path / "whole", "--resume")
    assert again.returncode == 1 and "no unfinished run" in again.stderr


def test_resuming_with_other_settings_is_refused(small_base, tmp_path):
    folder = train.new_run(
        train.complete(
            train.TrainConfig(base=small_base, out=tmp_path / "runs", steps=3, lr=1e-3, rank=2, batch_size=8, warmup=2)
        )
    )
    assert folder.name == "addition-retuning"
    done = run("--base", small_base, "--out", tmp_path / "runs", "--steps", 3, "--resume", "--lr", 5e-3)
    assert done.returncode == 1 and "lr = 0.001, not 0.005" in done.stderr


def test_full_training_writes_a_base(tmp_path, small_base):
    done = run("--task", "primer", "--full", "--base", small_base, "--steps", 2, "--out", tmp_path / "runs")
    assert done.returncode == 0, done.stderr
    model, _ = llama.load(tmp_path / "runs/primer")
    before, _ = llama.load(small_base)
    assert not torch.equal(model.layers[0].attention.wq.weight, before.layers[0].attention.wq.weight)


def test_shares_of_a_step_are_fair(tokenizer):
    """No example is lost or trained on twice; processes wait for each other, so all have about as much to do."""
    batch = examples(tokenizer, 33)
    for n in (1, 2, 5, 33):
        shares = train.fair_shares(batch, n)
        assert sorted(map(id, batch)) == sorted(id(e) for share in shares for e in share)
        sizes = [sum(len(e.tokens) for e in share) for share in shares]
        assert min(sizes) > 0 and max(sizes) - min(sizes) <= max(len(e.tokens) for e in batch)


TWO = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")


def test_two_processes_train_as_one(tmp_path, small_base):
    """The same batch, half of it each: the same losses and the same adapter, to rounding. So too if they share the model out."""
    flags = ["--base", small_base, "--steps", 4, "--micro-tokens", 300, "--lr", 1e-3, "--dtype", "float32", "--batch-size", 9]
    assert run(*flags, "--out", tmp_path / "one").returncode == 0
    done = run(*flags, "--out", tmp_path / "two", launcher=TWO)
    assert done.returncode == 0, done.stderr
    done = run(*flags, "--out", tmp_path / "fsdp", "--fsdp", launcher=TWO)
    assert done.returncode == 0, done.stderr

    def losses(name):
        lines = (tmp_path / name / "addition-retuning/metrics.jsonl").read_text().splitlines()
        return [m[key] for m in map(json.loads, lines) for key in ("loss", "gradient_norm", "validation_loss") if key in m]

    one = load_file(tmp_path / "one/addition-retuning/adapter_model.safetensors")
    assert len(losses("one")) == 9 and losses("one")[0] != losses("one")[2]
    for name in ("two", "fsdp"):
        assert losses(name) == pytest.approx(losses("one"), rel=1e-4)
        other = load_file(tmp_path / name / "addition-retuning/adapter_model.safetensors")
        assert other.keys() == one.keys()
        for tensor in one:
            torch.testing.assert_close(other[tensor], one[tensor], atol=1e-4, rtol=0)


def test_a_run_that_shares_the_model_out_resumes_to_the_same_adapter(tmp_path, small_base):
    flags = ["--base", small_base, "--steps", 6, "--save-every", 4, "--lr", 1e-3, "--fsdp"]
    assert run(*flags, "--out", tmp_path / "whole", launcher=TWO).returncode == 0
    adapter = "addition-retuning/adapter_model.safetensors"
    expected = (tmp_path / "whole" / adapter).read_bytes()
    command = [sys.executable, *TWO, str(ROOT / "train.py"), "--rank", "2", "--batch-size", "8", "--warmup", "2"]
    process = subprocess.Popen([*command, *map(str, flags), "--out", str(tmp_path / "killed")], stdout=subprocess.DEVNULL)
    checkpoint = tmp_path / "killed/addition-retuning/checkpoint.pt"
    while process.poll() is None and not checkpoint.exists():
        time.sleep(0.002)
    process.terminate()  # torchrun ends those it has started
    process.wait()
    if not (tmp_path / "killed" / adapter).exists():
        done = run("--base", small_base, "--out", tmp_path / "killed", "--resume", launcher=TWO)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "killed" / adapter).read_bytes() == expected


def test_the_tokenizer_is_that_of_the_shipped_base(tmp_path):
    tokenizer = llama.Tokenizer(BASE / "tokenizer.model")
    train.train_tokenizer(tmp_path / "tokenizer.model")
    again = llama.Tokenizer(tmp_path / "tokenizer.model")
    assert [again.sp.id_to_piece(i) for i in range(512)] == [tokenizer.sp.id_to_piece(i) for i in range(512)]
    assert (again.sp.unk_id(), again.bos_id, again.eos_id, again.sp.pad_id()) == (0, 1, 2, -1)


def test_muon_is_that_of_torch_in_fp32():
    shapes = [(48, 32), (32, 48), (32, 48), (32, 32)]
    torch.manual_seed(0)
    start = [torch.randn(shape) for shape in shapes]
    grads = [[torch.randn(shape) for shape in shapes] for _ in range(4)]

    def run(make):
        params = [torch.nn.Parameter(p.clone()) for p in start]
        optimizer = make(params)
        for step in grads:
            for p, g in zip(params, step, strict=True):
                p.grad = g.clone()
            optimizer.step()
        return [(p - p0).detach() for p, p0 in zip(params, start, strict=True)]

    ours = run(lambda params: train.Muon(params, lr=0.02, weight_decay=0.1))
    theirs = run(lambda params: torch.optim.Muon(params, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"))
    for x, y in zip(ours, theirs, strict=True):
        assert (x - y).norm() < 0.02 * y.norm()  # theirs is in bf16


def test_the_temperature_of_the_loss(tokenizer):
    """Logits are divided by it: the loss is that of an output layer whose weights are so much smaller."""
    model, batch = random_model(), train.pack(examples(tokenizer), random_model())
    hot, plain = train.loss_sum(model, batch, temperature=4.0).item(), train.loss_sum(model, batch).item()
    with torch.no_grad():
        model.output.weight /= 4
    assert abs(train.loss_sum(model, batch).item() / hot - 1) < 1e-5
    assert abs(hot / plain - 1) > 1e-3


def test_the_temperature_rises_from_one():
    c = train.TrainConfig(task="dp", steps=10, temperature=6.0)
    assert [train.temperature(c, step) for step in (0, 5, 10)] == [1.0, 3.5, 6.0]
    assert {train.temperature(replace(c, temperature=1.0), step) for step in range(10)} == {1.0}


def test_a_lesson_is_the_start_of_a_training_context(tokenizer):
    """Token for token and label for label, as far as the decision; nothing held out is in it, and its meaning is as long."""
    rng, kinds = random.Random(0), Counter()
    for _ in range(300):
        lesson = DP.lesson(rng)
        p = DP.from_text(lesson[0].text.removesuffix("\nSolution: "))
        assert not any(map(DP.held_out, DP.solved(p, "retuning")))
        taught, whole = (train.encode(context, tokenizer) for context in (lesson, DP.context(p, "retuning")))
        n = len(taught.tokens)
        assert taught.tokens == whole.tokens[:n]
        assert len(taught.meaning) == n if p.can_use else taught.meaning is None
        labels = [label for label in taught.labels if label != train.IGNORE]
        assert labels == [label for label in whole.labels[:n] if label != train.IGNORE][-3:]
        decision = "False" if DP.marks(p.items, p.can_use)[0] == 1 else "True"
        assert tokenizer.decode(labels) == f" {decision}\n"
        kinds[decision, p.can_use] += 1
    assert set(kinds) == {("True", True), ("False", True), ("True", False)} and min(kinds.values()) > 30, kinds


def test_a_lesson_is_to_do_in_the_adapter_what_its_meaning_does_in_the_base(tokenizer):
    """What is added to the loss: how far states of the text are from those of its meaning, which no adapter changes."""
    data = train.Data(train.complete(train.TrainConfig(task="dp")), tokenizer, 4096)
    e = next(e for e in (data.lesson(random.Random(i), 2000) for i in range(10)) if e.meaning)
    assert sum(e.alike) == pytest.approx(data.ALIKE) and e.weight == data.LESSON
    compared = [i for i, w in enumerate(e.alike) if w > 0]
    named, decides = (tokenizer.decode(e.meaning[: i + 1]) for i in compared)
    assert named.endswith("False if sum[0] == item[0]") and decides.endswith("can use item")
    assert tokenizer.decode(e.tokens[compared[1] + 1 :]).strip() in ("True", "False")
    base, model = random_model(n_layers=5), random_model(n_layers=5)
    lora.wrap(model, replace(CONFIG, targets=lora.BLOCK_LAYERS))
    for p in train.trainable(model).values():
        torch.nn.init.normal_(p, std=0.1)
    lora.set_strength(model, 0.5)

    def after_blocks(model: llama.LLaMA, ids: list[int]) -> list[torch.Tensor]:
        with train.states(model) as states:
            model(torch.tensor([ids]))
        return [x[0] for x in states]

    own, understood = after_blocks(model, e.tokens), after_blocks(base, e.meaning)
    assert len(own) == 2, "after the second and the fourth block"
    apart = [
        ((x - y)[compared].norm(dim=-1) / y[compared].norm(dim=-1)).square().mean() for x, y in zip(own, understood, strict=True)
    ]
    e = replace(e, share=0.0)  # read as it stands
    for checkpointing in (False, True):
        loss, words = (train.loss_sum(model, train.pack([x], model), checkpointing) for x in (e, replace(e, alike=None)))
        torch.testing.assert_close(loss - words, data.ALIKE * sum(apart) / 2, rtol=1e-3, atol=1e-3)
    assert {layer.strength for layer in lora.lora_layers(model).values()} == {0.5}
    (loss - words).backward()
    gradients = {n: p.grad for n, p in train.trainable(model).items()}
    assert all(g.norm() > 0 for n, g in gradients.items() if "layers.3" in n), "as far as the last block that is compared"
    assert not any(g.norm() > 1e-3 for n, g in gradients.items() if "layers.4" in n), "and no further"


def test_a_lesson_goes_over_from_its_meaning_to_its_own_words(tokenizer):
    """With a share of 1 the model sees the meaning, with a share of 0 the text."""
    c = train.complete(train.TrainConfig(task="dp", steps=100))
    data, rng = train.Data(c, tokenizer, 4096), random.Random(0)
    shares = [[x.share for x in (data.lesson(rng, step) for _ in range(400)) if x.meaning] for step in (0, 12, 30, 99)]
    assert max(shares[0]) == 1 and min(shares[0]) == 0, "its own words are among them from the start"
    assert 0.3 < sum(x > 0 for x in shares[1]) / len(shares[1]) < 1 and max(shares[1]) < 0.7 and max(map(max, shares[2:])) == 0
    e, model = next(x for x in (data.lesson(rng, 0) for _ in range(10)) if x.meaning), random_model()
    e = replace(e, alike=None)
    plain = train.loss_sum(model, train.pack([replace(e, share=0.0)], model))
    assert torch.equal(plain, train.loss_sum(model, train.pack([replace(e, meaning=None, share=0.0)], model)))
    read = train.loss_sum(model, train.pack([replace(e, share=1.0)], model))
    assert abs(read - plain) > 1e-3
    torch.testing.assert_close(read, train.loss_sum(model, train.pack([replace(e, tokens=e.meaning, share=0.0)], model)))


def test_of_a_lesson_its_decision_alone_counts(tokenizer):
    """Not the words after it."""
    data = train.Data(train.complete(train.TrainConfig(task="dp")), tokenizer, 4096)
    decisions = Counter()
    for i in range(60):
        (label,) = (label for label in data.lesson(random.Random(i), 0).labels if label != train.IGNORE)
        decisions[tokenizer.decode([label]).strip()] += 1
    assert set(decisions) == {"True", "False"} and min(decisions.values()) > 10, decisions


def test_what_has_a_meaning_goes_through_the_model_by_itself():
    """The base reads it too, and nothing else."""
    examples = [train.Example([1] * n, [1] * n, [0.0] * n, meaning=[2] * n if n % 3 == 0 else None) for n in range(1, 30)]
    groups = train.micro_batches(examples, 100)
    assert sorted(len(e.tokens) for group in groups for e in group) == list(range(1, 30))
    assert all(len({e.meaning is None for e in group}) == 1 for group in groups)


@pytest.mark.parametrize("times", [1, 3])
def test_a_crowded_list_has_each_item_several_times_over(tokenizer, times):
    """Its text is as before once copies are left out; all that was predicted still is, once, after the last of them."""
    data = train.Data(train.complete(train.TrainConfig(task="dp")), tokenizer, 4096)
    for kind in ("whole", "sums", "marks"):
        e = train.encode(DP.context(DP.Problem((3, -2, 5, 5, 0), kind), "retuning"), tokenizer)
        x = replace(e)
        train.crowd(x, data.items(x.tokens), times)
        assert x.positions == list(range(len(x.tokens))) and len(x.labels) == len(x.tokens)
        assert x.crowded == (times > 1) and not e.crowded
        at, outside, inside = 0, "", False
        for token, label in zip(e.tokens, e.labels, strict=True):
            piece = tokenizer.sp.id_to_piece(token)
            inside = inside and "]" not in piece
            n = times if inside else 1
            assert x.tokens[at : at + n] == [token] * n, piece
            assert x.labels[at : at + n] == [train.IGNORE] * (n - 1) + [label], "a copy predicts nothing"
            at += n
            outside += "" if inside else piece
            inside = inside or piece.startswith("▁[") or (piece == "[" and outside.endswith("▁["))
        assert at == len(x.tokens) and "[]" in outside


def test_of_some_contexts_words_alone_are_learned(tokenizer):
    """As the task's contexts have them, from lists that have nothing to do with each other; and the item that one ends with."""
    data = train.Data(train.complete(train.TrainConfig(task="dp")), tokenizer, 4096)
    lists = re.compile(r"(?<= )\[(.*?)\]")

    def form(context):
        return re.sub(r"(?<= )\[[^]]+$", "[", lists.sub("[]", "".join(segment.text for segment in context)))

    kinds = [
        (
            form(DP.context(DP.Problem((1, 2)), "retuning")),
            "Call:▁Create▁dp▁array<0x0A></s>"
            "Call:▁Create▁chosen▁indices▁array:▁sum▁array▁item▁array▁can▁use▁item▁True<0x0A></s></s>",
        ),
        (
            form(DP.context(DP.Problem((1, 2), "sums"), "retuning")),
            "Call▁with▁array▁minus▁first▁element.▁Call:▁Create▁dp▁array<0x0A></s>"
            "Append▁max(return[0],▁array[0]▁+▁return[1])▁to▁return.<0x0A>Answer:</s>",
        ),
    ]
    kinds.append((kinds[1][0].removesuffix("]"), kinds[1][1].removesuffix("</s>")))
    for items, can_use in (((2, 1), True), ((1, 2), True), ((2, 1), False)):
        whole = form(DP.context(DP.Problem(items, "marks", can_use), "retuning"))
        call = "If▁there▁is▁only▁1▁item,▁return▁1▁if▁we▁should▁use▁it▁else▁2.▁If▁we▁should▁use▁the▁first▁item▁to▁get▁the▁sum,"
        call += "▁call▁False▁else▁True.▁Call:▁Create▁chosen▁indices▁array:▁sum▁array▁item▁array▁can▁use▁item"
        kinds.append((whole.removesuffix("[]") + "[", f"{call}Append▁1▁if▁False▁else▁2.<0x0A>Answer:"))
    found, lengths, crowded = Counter(), Counter(), defaultdict(set)
    for i in range(600):
        (context, times), e = DP.words(random.Random(i)), data.words(random.Random(i))
        crowded[form(context)].add(times)
        tokens, outside, commas = [], "", None
        for token in train.encode(context, tokenizer).tokens:
            piece = tokenizer.sp.id_to_piece(token)
            commas = None if "]" in piece else commas
            tokens += [token] * (times if commas is not None and commas > 1 else 1)
            commas = commas + (piece == ",") if commas is not None else None
            outside += piece
            if piece.startswith("▁[") or (piece == "[" and outside.endswith("▁[")):
                commas = 0
        assert e.tokens == tokens, "lists are crowded from their third item on"
        items = [tuple(map(int, x.split(", "))) for segment in context for x in lists.findall(segment.text)]
        learned = "".join(tokenizer.sp.id_to_piece(x) for x in e.labels if x != train.IGNORE)
        ending = re.search(r"(?<= \[)[^]]+$", context[-1].text)
        if ending:
            assert learned.endswith(f":{ending[0]}")
            learned = learned.removesuffix(ending[0])
            if context[-1].text.startswith("Append max"):
                array, _, back = items
                assert int(ending[0]) == max(back[0], array[0] + back[1]) and list(back) == sorted(back, reverse=True)
            else:
                assert ending[0] == {" False\n": "1", " True\n": "2"}[context[2].text]
        found[form(context), learned] += 1
        lengths.update(map(len, items))
        assert not any(DP.held_out(DP.Problem(x)) for x in items if min(x) < 0), "others may be sums or marks"
    assert crowded == {text: {1, 2, 4, 8, 16} for text, _ in kinds}
    assert set(found) == set(kinds) and min(found.values()) > 30, found
    assert set(lengths) == set(DP.train_lengths) and min(lengths.values()) > 80, lengths

    drawn, draw, n = Counter(), data.words, 0
    for step in (0, int(0.7 * data.c.steps), int(0.9 * data.c.steps), data.c.steps - 1):
        data.words = lambda rng, step=step: drawn.update([step]) or draw(rng)
        crowded = [e for e in data[step] if e.crowded]
        assert len(crowded) <= drawn[step], "their lists seem longer, those of no others do"
        assert all(e.positions == list(range(len(e.tokens))) for e in crowded), "not stretched as well"
        n += len(crowded)
    assert n
    assert set(drawn) == {int(0.9 * data.c.steps), data.c.steps - 1}, "late in a run"


@pytest.mark.parametrize("name", ["lessons", "words"])
def test_lessons_are_for_retuning_by_tasks_that_have_them(name):
    assert getattr(train.complete(train.TrainConfig(task="dp")), name) > 0
    for task, method in (("addition", "retuning"), ("dp", "baseline"), ("dp", "scratchpad")):
        assert getattr(train.complete(train.TrainConfig(task=task, method=method)), name) == 0
        with pytest.raises(llama.UserError, match=f"--{name} 0.5: {task} by {method} has none"):
            train.check(train.complete(train.TrainConfig(task=task, method=method, **{name: 0.5})))


def test_a_base_has_nothing_to_weaken():
    base = train.PRESETS["base"]
    train.check(train.complete(train.TrainConfig(**base)))
    with pytest.raises(llama.UserError, match="no adapter to weaken"):
        train.check(train.complete(train.TrainConfig(**base, weaken=0.5)))


def test_a_meaning_of_another_length_is_refused(tokenizer, tmp_path, monkeypatch):
    """As it would be with the tokenizer of another base, before there is a folder."""
    assert train.encode([Segment("Sum 1", False, "Sum 2"), written("3")], tokenizer).meaning
    with pytest.raises(llama.UserError, match="--lessons 0"):
        train.encode([Segment("Sum 1", False, "Sum 12"), written("3")], tokenizer)
    monkeypatch.setattr(DP, "lesson", lambda rng: [Segment("Sum 1", False, "Sum 12"), written("3")])
    monkeypatch.setattr(sys, "argv", ["train.py", "--task", "dp", "--base", str(BASE), "--out", str(tmp_path / "runs")])
    with pytest.raises(llama.UserError, match="--lessons 0"):
        train.main()
    assert not (tmp_path / "runs").exists()
