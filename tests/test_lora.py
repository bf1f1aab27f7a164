"""LoRA: what it changes and what it does not, and the file format against PEFT."""

import json

import pytest
import torch
from conftest import random_model
from safetensors.torch import load_file

import lora
import model as llama
from model import UserError

CONFIG = lora.LoRAConfig(rank=4, alpha=6.0, targets=("wq", "wv", "w2"))
ALL = lora.LoRAConfig(rank=4, alpha=6.0)


def trained(config=CONFIG, seed=0):
    """A model whose adapter is not zero."""
    model = lora.wrap(random_model(seed), config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for layer in lora.lora_layers(model).values():
            layer.lora_B.copy_(torch.randn(layer.lora_B.shape, generator=generator) * 0.1)
    return model


TOKENS = torch.randint(3, 512, (2, 40), generator=torch.Generator().manual_seed(1))


def test_a_new_adapter_changes_nothing():
    before = random_model()(TOKENS)
    assert torch.equal(lora.wrap(random_model(), CONFIG)(TOKENS), before)


def test_only_a_and_b_train():
    model = lora.wrap(random_model(), CONFIG)
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    assert len(names) == 2 * 3 * 2 and all(n.endswith(("lora_A", "lora_B")) for n in names)
    with pytest.raises(ValueError, match="already"):
        lora.wrap(model, CONFIG)


def test_merge_is_w_plus_scaled_ba_and_unmerge_is_exact():
    model = trained()
    before = model(TOKENS)
    layer = model.layers[1].attention.wq
    expected = layer.linear.weight + 1.5 * layer.lora_B @ layer.lora_A
    wrapped = lora.merge(model)
    torch.testing.assert_close(model.layers[1].attention.wq.weight, expected)
    torch.testing.assert_close(model(TOKENS), before, atol=1e-4, rtol=0)
    assert lora.merge(model) == {}, "merging twice changes nothing"
    lora.unmerge(model, wrapped)
    assert torch.equal(model(TOKENS), before)


@pytest.mark.parametrize("rank", [8, 1])
def test_a_strength_weakens_the_update_until_it_is_put_back(rank):
    """Whichever way the product takes: by the whole weight, or by A and B one after the other."""
    linear = torch.nn.Linear(48, 64, bias=False)
    layer = lora.LoRALinear(linear, lora.LoRAConfig(rank=rank, alpha=6.0))
    torch.nn.init.normal_(layer.lora_B)
    x = torch.randn(5, 48)
    plain, whole = linear(x), layer(x)
    layer.strength = 0.25
    torch.testing.assert_close(layer(x), plain + 0.25 * (whole - plain))
    torch.testing.assert_close(layer.to_linear()(x), whole)
    model = trained()
    before = model(TOKENS)
    lora.set_strength(model, 0.0)
    assert torch.equal(model(TOKENS), random_model(0)(TOKENS))
    lora.set_strength(model, 1.0)
    assert torch.equal(model(TOKENS), before)


def test_the_output_layer_alone_and_tied_to_the_embeddings(tokenizer, tmp_path):
    model = random_model(tie_embeddings=True)
    embeddings = model.tok_embeddings.weight.clone()
    lora.wrap(model, lora.LoRAConfig(rank=4, alpha=4.0, targets=("output",)))
    ((name, layer),) = lora.lora_layers(model).items()
    assert name == "output"
    before = model(TOKENS)
    torch.nn.init.normal_(layer.lora_B)
    after = model(TOKENS)
    assert not torch.allclose(after, before)
    lora.merge(model)
    torch.testing.assert_close(model(TOKENS), after, atol=1e-4, rtol=1e-4)
    assert torch.equal(model.tok_embeddings.weight, embeddings)
    llama.save(model, tokenizer, tmp_path, dtype=torch.float32)  # no longer tied
    torch.testing.assert_close(llama.load(tmp_path)[0](TOKENS), after, atol=1e-4, rtol=1e-4)


def test_save_and_load(tmp_path):
    model = trained(ALL)
    lora.save_adapter(model, tmp_path, ALL, base="some/base")
    again = random_model()
    assert lora.load_adapter(again, tmp_path) == ALL
    assert torch.equal(again(TOKENS), model(TOKENS))
    assert lora.read_adapter_config(tmp_path) == (ALL, "some/base")
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1, "who may read one file may read all"


@pytest.fixture
def base_and_adapter(tmp_path, tokenizer):
    model = trained()
    bare = random_model()
    llama.save(bare, tokenizer, tmp_path / "base", dtype=torch.float32)
    lora.save_adapter(model, tmp_path / "adapter", CONFIG, base=str(tmp_path / "base"))
    return tmp_path / "base", tmp_path / "adapter", model


def test_ours_in_peft(base_and_adapter, tmp_path):
    import peft
    import transformers

    base, adapter, model = base_and_adapter[0], tmp_path / "all", trained(ALL)
    lora.save_adapter(model, adapter, ALL, base=str(base))
    theirs = transformers.LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(theirs, adapter).eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(TOKENS).logits, model(TOKENS), atol=1e-4, rtol=0)


@pytest.mark.parametrize("modules", [["q_proj", "k_proj", "v_proj", "o_proj"], ["q_proj", "lm_head"], "all-linear"])
def test_theirs_in_ours(base_and_adapter, tmp_path, modules):
    import peft
    import transformers

    base, _, _ = base_and_adapter
    theirs = transformers.LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=modules, init_lora_weights=False)
    theirs = peft.get_peft_model(theirs, config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    ours, _ = llama.load(base)
    lora.load_adapter(ours, tmp_path / "theirs")
    with torch.no_grad():
        torch.testing.assert_close(ours(TOKENS), theirs(TOKENS).logits, atol=1e-4, rtol=0)
    if "lm_head" in modules:  # then PEFT saves the frozen layer too, and a base that is not it is refused
        with pytest.raises(UserError, match="lm_head.base_layer.weight is not the base's"):
            lora.load_adapter(random_model(seed=5), tmp_path / "theirs")


def test_adapters_that_do_not_fit_are_refused(base_and_adapter, tmp_path):
    base, adapter, _ = base_and_adapter
    weights, config = adapter / "adapter_model.safetensors", adapter / "adapter_config.json"
    tensors, saved = load_file(weights), config.read_text()
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"

    def refused(match, model=None):
        with pytest.raises(UserError, match=match) as e:
            lora.load_adapter(model or random_model(), adapter)
        assert "\n" not in str(e.value)

    refused("trained on another base", random_model(seed=5))
    merged = random_model()
    lora.load_adapter(merged, adapter)
    lora.merge(merged)
    refused("trained on another base", merged)
    refused(r"q_proj.lora_A.weight has shape \[4, 32\], the base needs \[4, 40\]", random_model(dim=40))
    refused("layers.2.*missing", random_model(n_layers=3))
    llama.save_file({n: t for n, t in tensors.items() if n != name}, weights)
    refused(rf"{name} \[4, 32\] is missing")
    llama.save_file(tensors | {"odd": torch.zeros(1)}, weights)
    refused(r"unexpected tensor odd \[1\]")
    weights.write_bytes(b"")
    refused("not a readable file of weights")
    weights.unlink()
    refused("no such file")
    llama.save_file(tensors, weights)
    for change, match in [
        ({"peft_type": "IA3"}, "IA3"),
        ({"use_dora": True}, "use_dora"),
        ({"init_lora_weights": "pissa_niter_4"}, "the base's own weights were changed"),
        ({"bias": "all"}, "bias"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "embed_tokens"),
        ({"r": 0}, "rank 0"),
    ]:
        config.write_text(json.dumps(json.loads(saved) | change))
        refused(match)
    config.unlink()
    refused("adapter_config.json: no such file")
    with pytest.raises(UserError, match="no such adapter folder"):
        lora.load_adapter(random_model(), tmp_path / "nowhere")


def test_newest_finished_run_wins(tmp_path):
    def run(name, finished=True):
        (tmp_path / name).mkdir()
        if finished:
            (tmp_path / name / "adapter_config.json").write_text("{}")

    for name in ("addition-retuning", "addition-retuning-2", "addition-retuning-10", "addition-retuning-old"):
        run(name)
    run("addition-retuning-11", finished=False)
    assert lora.find_adapter("addition", "retuning", tmp_path).name == "addition-retuning-10"
    with pytest.raises(UserError, match="python train.py --task dp"):
        lora.find_adapter("dp", "baseline", tmp_path, base=tmp_path)
