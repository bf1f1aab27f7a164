"""The base and the adapters that ship."""

import random

import pytest
import torch
from conftest import BASE
from safetensors.torch import load_file

import lora
import model as llama
from recurse import Decoder, Engine
from tasks import METHODS, TASKS, Addition, Parity
from train import encode


def test_shape_and_dtype():
    model, _ = llama.load(BASE)
    assert 1e6 < sum(p.numel() for p in model.parameters()) < 4e6
    assert {t.dtype for t in load_file(BASE / "model.safetensors").values()} == {torch.bfloat16}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_adapters_belong_to_the_base(task, method):
    model, _ = llama.load(BASE)
    lora.load_adapter(model, BASE / f"adapters/{task.name}-{method}")


@pytest.mark.parametrize(("task", "length"), [(Addition, 20), (Parity, 30)], ids=["addition", "parity"])
def test_the_shipped_adapter_solves_problems_longer_than_any_it_has_seen(task, length):
    """At least 18 of 20 held-out problems, others each time; training stopped at 15 digits, and at 21 bits."""
    assert length > task.train_lengths[-1]
    model, tokenizer = llama.load(BASE)
    lora.load_adapter(model, BASE / f"adapters/{task.name}-retuning")
    lora.merge(model)
    seed = random.SystemRandom().randrange(10**9)
    rng = random.Random(seed)
    problems = [task.sample(rng, length) for _ in range(20)]
    results = Decoder(Engine(model), tokenizer).solve([task.prompt(p, "retuning") for p in problems])
    right = sum(r.ending == "answer" and task.judge(problems[r.index], r.text, "retuning") for r in results)
    assert right >= 18, f"{right} of 20 right; the problems' seed was {seed}"


def test_the_longest_scratchpad_that_fits(tokenizer):
    """80 digits, as the README says."""
    sizes = {n: len(encode(Addition.context(Addition.problem("9" * n, "9"), "scratchpad"), tokenizer).tokens) for n in (80, 81)}
    assert sizes[80] <= llama.config_from_hf(BASE / "config.json").max_seq_len < sizes[81]


@pytest.mark.parametrize("task", [Addition, Parity], ids=["addition", "parity"])
def test_greedy_text_equals_pefts(task):
    """Contexts, decoded token by token by transformers and peft from the same ids."""
    import peft
    import transformers

    adapter = BASE / f"adapters/{task.name}-retuning"
    theirs = peft.PeftModel.from_pretrained(transformers.LlamaForCausalLM.from_pretrained(BASE, dtype=torch.float32), adapter)
    model, tokenizer = llama.load(BASE)
    lora.load_adapter(model, adapter)
    rng = random.Random(0)
    for _ in range(5):
        ids = tokenizer.start(task.prompt(task.sample(rng, 8), "retuning"))
        with torch.no_grad():
            out = theirs.eval().generate(
                input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long), do_sample=False,
                max_new_tokens=40, pad_token_id=0, eos_token_id=tokenizer.eos_id,
            )[0].tolist()  # fmt: skip
        engine = Engine(model)
        engine.reset(1)
        token, ours = engine.feed([0], [ids])[0][0], list(ids)
        while token != tokenizer.eos_id and len(ours) < len(ids) + 40:
            ours.append(token)
            token = engine.feed([0], [[token]])[0][0]
        assert tokenizer.decode(ours) == tokenizer.decode([t for t in out if t != tokenizer.eos_id])
