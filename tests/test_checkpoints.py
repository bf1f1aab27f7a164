"""Checkpoints of the LLaMA family: what transformers writes, Meta's layout, and what must be refused."""

import json
import pickle
import shutil
import time

import pytest
import torch
from conftest import BASE, random_model
from safetensors.torch import load_file, save_file

import lora
import model as llama
from model import KVCache, UserError

LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=512)
SMALL = dict(
    vocab_size=512, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=4096
)
FAMILY = {
    "LLaMA 1": dict(rms_norm_eps=1e-6),
    "LLaMA 2 with grouped queries": dict(num_key_value_heads=2, rms_norm_eps=1e-5),
    "Llama 3, scaled and tied": dict(
        num_key_value_heads=2, tie_word_embeddings=True, rope_parameters=LLAMA3 | {"rope_theta": 500_000.0}
    ),
    "linear scaling": dict(rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 10_000.0}),
    "biases": dict(attention_bias=True, mlp_bias=True, num_key_value_heads=1),
    "explicit head_dim": dict(head_dim=32, num_key_value_heads=2),
    "TinyLlama's heads": dict(hidden_size=256, num_attention_heads=32, num_key_value_heads=4),
}


def theirs(changes, *, mistral=False):
    """A model of transformers with weights large enough for a mistake to show in the logits."""
    import transformers

    config = (transformers.MistralConfig if mistral else transformers.LlamaConfig)(**SMALL | changes)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(1.0 if "norm.weight" in name else 0.0, 0.3 if p.dim() == 1 else p.shape[1] ** -0.5)
    return model


def write(model, folder, **how):
    model.save_pretrained(folder, **how)
    shutil.copy(BASE / "tokenizer.model", folder)
    return folder


def same_logits(model, reference, n=2100):
    """Prefill, then a chunk and single tokens on top of the cache, beyond position 2048."""
    tokens = torch.randint(3, 512, (1, n), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = reference(tokens).logits
        assert expected.std() > 0.1
        torch.testing.assert_close(model(tokens), expected, atol=1e-4, rtol=0)
        cache = KVCache(model.config, 1, device="cpu", dtype=torch.float32)
        cuts = [0, n - 20, n - 3, n - 2, n - 1, n]
        pieces = [model(tokens[:, a:b], cache=cache) for a, b in zip(cuts, cuts[1:], strict=False)]
        torch.testing.assert_close(torch.cat(pieces, 1), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", FAMILY)
def test_the_family_equals_transformers(name, tmp_path):
    reference = theirs(FAMILY[name])
    model, _ = llama.load(write(reference, tmp_path))
    same_logits(model, reference)


def test_shards_are_one_model(tmp_path):
    reference = theirs({})
    write(reference, tmp_path / "whole")
    write(reference, tmp_path / "shards", max_shard_size="100KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    whole, shards = llama.load(tmp_path / "whole")[0].state_dict(), llama.load(tmp_path / "shards")[0].state_dict()
    assert all(torch.equal(whole[name], shards[name]) for name in whole)


def test_pickled_weights_of_transformers(tmp_path):
    write(theirs({}), tmp_path)
    before = llama.load(tmp_path)[0].state_dict()
    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    after = llama.load(tmp_path)[0].state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_config_of_transformers_4(tmp_path):
    reference = theirs(FAMILY["Llama 3, scaled and tied"])
    write(reference, tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    theta = rope.pop("rope_theta")
    path.write_text(json.dumps(config | {"rope_theta": theta, "rope_scaling": rope, "torch_dtype": config.pop("dtype")}))
    same_logits(llama.load(tmp_path)[0], reference, n=600)


def test_mistral_within_its_window(tmp_path):
    reference = theirs(dict(sliding_window=256, num_key_value_heads=2), mistral=True)
    model, _ = llama.load(write(reference, tmp_path))
    same_logits(model, reference, n=256)
    with pytest.raises(ValueError, match="257 tokens exceeds the model's 256"):
        model(torch.zeros(1, 257, dtype=torch.long))


def test_dtype_and_memory_of_its_own(tmp_path):
    write(theirs({}), tmp_path)
    model, _ = llama.load(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    before = {name: p.clone() for name, p in model.named_parameters()}
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"\0" * weights.stat().st_size)  # in place: a model that were the file's memory would change
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


@pytest.mark.parametrize(
    "name", ["LLaMA 1", "LLaMA 2 with grouped queries", "Llama 3, scaled and tied", "biases", "explicit head_dim"]
)
def test_saved_models_are_read_by_transformers(name, tmp_path):
    """Load, merge an adapter into it, save, load in transformers."""
    import transformers

    model, tokenizer = llama.load(write(theirs(FAMILY[name]), tmp_path / "base"))
    lora.wrap(model, lora.LoRAConfig(4, 8.0))
    for layer in lora.lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.1)
    lora.merge(model)
    llama.save(model, tokenizer, tmp_path / "merged", dtype=torch.float32)
    same_logits(model, transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval(), n=600)


def test_their_rslora_adapter_of_all_layers_in_ours(tmp_path):
    import peft

    reference = theirs(FAMILY["biases"])
    model, _ = llama.load(write(reference, tmp_path / "base"))
    config = peft.LoraConfig(r=8, lora_alpha=16, use_rslora=True, target_modules="all-linear", init_lora_weights=False)
    reference = peft.get_peft_model(reference, config).eval()
    reference.save_pretrained(tmp_path / "adapter")
    lora.load_adapter(model, tmp_path / "adapter")
    same_logits(model, reference, n=200)
    lora.merge(model)
    same_logits(model, reference, n=200)


# --- Meta's layout -----------------------------------------------------------------------------------------------


def to_meta(hf, folder, n_shards, suffix, *, embeddings_by_row=False):
    """Write a Hugging Face folder (of one file) in Meta's layout, as its model-parallel training left it."""
    config, tensors = json.loads((hf / "config.json").read_text()), load_file(hf / "model.safetensors")
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    rows = ("wq", "wk", "wv", "w1", "w3", "output") + (("tok_embeddings",) if embeddings_by_row else ())
    shards = [{"rope.freqs": torch.ones(3)} for _ in range(n_shards)]
    names = {llama.hf_name(f"{ours}.weight"): f"{ours}.weight" for ours in llama.HF_NAMES if "N" not in ours}
    for n in range(config["num_hidden_layers"]):
        ours = [name.replace("N", str(n)) for name in llama.HF_NAMES if "N" in name]
        names |= {llama.hf_name(f"{name}.weight"): f"{name}.weight" for name in ours}
    for theirs_name, name in names.items():
        tensor, part = tensors[theirs_name], name.split(".")[-2]
        if part in ("wq", "wk"):  # row i of a half becomes row 2i, row i of the other 2i + 1
            n = heads if part == "wq" else kv_heads
            first, second = tensor.view(n, 2, -1, tensor.shape[1]).unbind(1)
            tensor = torch.stack((first, second), dim=2).reshape(tensor.shape)
        if part.endswith("norm"):
            pieces = [tensor] * n_shards
        else:
            pieces = tensor.chunk(n_shards, dim=0 if part in rows else 1)
        for shard, piece in zip(shards, pieces, strict=True):
            shard[name] = piece.clone()
    folder.mkdir()
    shutil.copy(hf / "tokenizer.model", folder)
    params = {
        "dim": config["hidden_size"], "n_layers": config["num_hidden_layers"], "n_heads": heads, "n_kv_heads": kv_heads,
        "vocab_size": -1, "multiple_of": 32, "norm_eps": config["rms_norm_eps"],
    }  # fmt: skip
    (folder / "params.json").write_text(json.dumps(params))
    for i, shard in enumerate(shards):
        if suffix == "pth":
            torch.save(shard, folder / f"consolidated.{i:02}.pth")
        else:
            save_file(shard, folder / (f"consolidated.{i:02}.safetensors" if n_shards > 1 else "consolidated.safetensors"))
    return folder


@pytest.fixture(scope="module")
def hf_folder(tmp_path_factory):
    # 176 = 32 * ceil(int(2 * 4 * 64 / 3) / 32) + ...: Meta's rule for the width of the feed-forward layer gives 192
    reference = theirs(dict(intermediate_size=192, num_key_value_heads=2))
    return write(reference, tmp_path_factory.mktemp("hf"))


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize("n_shards", [1, 2])
def test_meta_layout_is_the_same_model_bit_for_bit(n_shards, suffix, hf_folder, tmp_path):
    expected, _ = llama.load(hf_folder)
    model, tokenizer = llama.load(to_meta(hf_folder, tmp_path / "meta", n_shards, suffix, embeddings_by_row=suffix == "pth"))
    tokens = torch.randint(3, 512, (2, 50))
    assert torch.equal(model(tokens), expected(tokens))
    assert tokenizer.vocab_size == model.config.vocab_size == 512
    assert model.config.max_seq_len == 2048  # of LLaMA 1, by its norm_eps


def test_sizes_of_the_real_ones(tmp_path):
    """Widths of the feed-forward layer as in the released 7B, 13B and 65B, Llama 2 70B and Llama 3 8B."""
    for params, hidden in [
        (dict(dim=4096, multiple_of=256), 11008),
        (dict(dim=5120, multiple_of=256), 13824),
        (dict(dim=8192, multiple_of=256), 22016),
        (dict(dim=8192, multiple_of=4096, ffn_dim_multiplier=1.3), 28672),
        (dict(dim=4096, multiple_of=1024, ffn_dim_multiplier=1.3), 14336),
    ]:
        path = tmp_path / "params.json"
        path.write_text(json.dumps(params | dict(n_layers=2, n_heads=32, vocab_size=-1)))
        assert llama.config_from_meta(path, 32000).hidden_dim == hidden


# --- what must be refused ----------------------------------------------------------------------------------------


class Code:
    """Pickled, this is a call of open(..., "w") when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def edit(file, **changes):
    """Change keys of a JSON file; None removes one."""
    value = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in value.items() if v is not None}))


def with_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def shard(folder, **where):
    """Two shards and their index; `where` changes the index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"a.safetensors": names[:5], "b.safetensors": names[5:]}
    for file, part in parts.items():
        save_file({n: tensors[n] for n in part}, folder / file)
    index = {n: file for file, part in parts.items() for n in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index | where}))
    return folder


def header(folder, change):
    """Rewrite the header of model.safetensors, a JSON object behind its length in 8 bytes."""
    file = folder / "model.safetensors"
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    text = change(data[8 : 8 + size].decode()).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])


def to_pth(folder, value):
    """Meta's layout with whatever in it."""
    edit(folder / "config.json", hidden_size=None)
    (folder / "config.json").unlink()
    (folder / "model.safetensors").unlink()
    (folder / "params.json").write_text(json.dumps(dict(dim=32, n_layers=2, n_heads=4, vocab_size=-1)))
    with (folder / "consolidated.00.pth").open("wb") as f:
        value(f)


NORM, Q = "model.norm.weight", "model.layers.0.self_attn.q_proj.weight"
DAMAGES = {
    "empty folder": (lambda f: [p.unlink() for p in f.iterdir()], "config.json: no such file"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json: no such file"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no weights; expected model.safetensors"),
    "no tokenizer": (lambda f: (f / "tokenizer.model").unlink(), "tokenizer.model: no such file"),
    "tokenizer.json only": (
        lambda f: (f / "tokenizer.model").rename(f / "tokenizer.json"),
        "tokenizer.json only; add the sentencepiece tokenizer.model",
    ),
    "tiktoken": (lambda f: (f / "tokenizer.model").write_text("IQ== 0\nIg== 1\n"), "tiktoken file, as of Llama 3"),
    "tokenizer is a web page": (lambda f: (f / "tokenizer.model").write_text("<!doctype html>"), "web page"),
    "tokenizer is empty": (lambda f: (f / "tokenizer.model").write_bytes(b""), "not a sentencepiece model .*0 bytes"),
    "folder for a file": (
        lambda f: ((f / "model.safetensors").unlink(), (f / "model.safetensors").mkdir()),
        "model.safetensors: not a readable file of weights",
    ),
    "truncated": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-100]),
        "model.safetensors: not a readable file of weights",
    ),
    "empty weights": (lambda f: (f / "model.safetensors").write_bytes(b""), "not a readable file of weights .*0 bytes"),
    "git-LFS pointer": (
        lambda f: (f / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"),
        "git lfs pull",
    ),
    "weights are a web page": (lambda f: (f / "model.safetensors").write_text("<html>" * 20), "web page"),
    "header lies about its length": (
        lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 7 + b"\x7f" + b"{}"),
        "not a readable file of weights",
    ),
    "header lies about offsets": (
        lambda f: header(f, lambda t: t.replace('"data_offsets":[0,', '"data_offsets":[2,')),
        "not a readable file of weights",
    ),
    "header lies about a shape": (
        lambda f: header(f, lambda t: t.replace('"shape":[32]', '"shape":[31]', 1)),
        "not a readable file of weights",
    ),
    "duplicate tensor": (
        lambda f: header(f, lambda t: t.replace("{", '{"' + NORM + '":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},', 1)),
        f"has '{NORM}' twice",
    ),
    "missing tensor": (lambda f: with_tensors(f, lambda t: t.pop(NORM)), rf"tensor {NORM} \[32\] is missing"),
    "unexpected tensor": (
        lambda f: with_tensors(f, lambda t: t.update(odd=torch.zeros(2, 3))),
        r"unexpected tensor odd \[2, 3\]",
    ),
    "wrong shape": (
        lambda f: with_tensors(f, lambda t: t.update({NORM: torch.zeros(7)})),
        rf"tensor {NORM} has shape \[7\], expected \[32\]",
    ),
    "transposed": (
        lambda f: with_tensors(f, lambda t: t.update({"lm_head.weight": t["lm_head.weight"].T.contiguous()})),
        r"lm_head.weight has shape \[32, 512\], expected \[512, 32\]",
    ),
    "quantized": (
        lambda f: with_tensors(f, lambda t: t.update({Q: torch.zeros(32, 32, dtype=torch.int8)})),
        f"{Q} is of dtype I8",
    ),
    "NaN": (lambda f: with_tensors(f, lambda t: t[Q].view(-1)[7:8].fill_(float("nan"))), f"{Q} holds NaN"),
    "infinity": (lambda f: with_tensors(f, lambda t: t[Q].view(-1)[7:8].fill_(float("inf"))), f"{Q} holds NaN or infinity"),
    "not json": (lambda f: (f / "config.json").write_text("{"), "config.json: not readable as JSON"),
    "a list for a config": (lambda f: (f / "config.json").write_text("[]"), "expected a JSON object, found list"),
    "another architecture": (lambda f: edit(f / "config.json", architectures=["GPT2LMHeadModel"]), "GPT2LMHeadModel, expected"),
    "unknown rope": (lambda f: edit(f / "config.json", rope_scaling={"type": "yarn", "factor": 2.0}), "'yarn' is not supported"),
    "llama3 rope without a factor": (
        lambda f: edit(f / "config.json", rope_scaling={"rope_type": "llama3", "low_freq_factor": 1, "high_freq_factor": 4}),
        "is missing",
    ),
    "activation": (lambda f: edit(f / "config.json", hidden_act="gelu"), "hidden_act is 'gelu'"),
    "quantized config": (lambda f: edit(f / "config.json", quantization_config={"bits": 4}), "quantized"),
    "no width": (lambda f: edit(f / "config.json", hidden_size=None), "'hidden_size' is missing"),
    "negative size": (lambda f: edit(f / "config.json", intermediate_size=-48), "intermediate_size is -48"),
    "a size that is text": (lambda f: edit(f / "config.json", num_hidden_layers="2"), "num_hidden_layers is '2'"),
    "too many layers": (lambda f: edit(f / "config.json", num_hidden_layers=10**9), "expected at most 1000"),
    "huge width": (lambda f: edit(f / "config.json", hidden_size=2**34), "has shape"),
    "heads not divisible": (lambda f: edit(f / "config.json", num_attention_heads=6, head_dim=None), "not divisible by 6"),
    "shared heads not even": (lambda f: edit(f / "config.json", num_key_value_heads=3), "cannot share 3"),
    "odd head": (lambda f: edit(f / "config.json", head_dim=7), "heads are 7 wide"),
    "a flag that is text": (lambda f: edit(f / "config.json", tie_word_embeddings="no"), "expected true or false"),
    "vocabulary too small": (lambda f: edit(f / "config.json", vocab_size=500), "500 tokens, tokenizer.model has 512"),
    "vocabulary too large": (lambda f: edit(f / "config.json", vocab_size=32000), "32000 tokens, tokenizer.model has 512"),
    "missing shard": (lambda f: (shard(f) / "b.safetensors").unlink(), "b.safetensors: no such file.*fetch the"),
    "../ in the index": (lambda f: shard(f, **{NORM: "../b.safetensors"}), "'../b.safetensors', expected the plain name"),
    "absolute path in the index": (lambda f: shard(f, **{NORM: "/etc/passwd.safetensors"}), "'/etc/passwd.safetensors', exp"),
    "a number in the index": (lambda f: shard(f, **{NORM: 3}), "the file 3, expected the plain name"),
    "index against shard": (lambda f: shard(f, **{NORM: "a.safetensors"}), f"{NORM}.*in a.safetensors"),
    "index names more": (lambda f: shard(f, **{"odd": "a.safetensors"}), "tensor odd is missing"),
    "index without map": (
        lambda f: (shard(f) / "model.safetensors.index.json").write_text('{"metadata": {}}'),
        "no weight_map",
    ),
    "pickle with code": (
        lambda f: to_pth(f, lambda file: torch.save({"norm.weight": Code(f / "ran")}, file)),
        "not a readable file of weights",
    ),
    "bare pickle with code": (lambda f: to_pth(f, lambda file: pickle.dump(Code(f / "ran"), file)), "not a readable file"),
    "pickle of something else": (lambda f: to_pth(f, lambda file: torch.save({"step": 3}, file)), "other things than tensors"),
    "truncated pickle": (
        lambda f: to_pth(f, lambda file: file.write(b"PK\x03\x04" + b"\0" * 50)),
        "not a readable file of weights",
    ),
    "gap in Meta's shards": (
        lambda f: (
            to_pth(f, lambda file: torch.save({"norm.weight": torch.ones(32)}, file)),
            (f / "consolidated.00.pth").rename(f / "consolidated.01.pth"),
        ),
        "consolidated.00.pth: missing, though there is consolidated.01.pth",
    ),
}  # fmt: skip


@pytest.mark.parametrize("change", DAMAGES)
def test_damaged_checkpoints_are_refused(change, small_base):
    damage, expected = DAMAGES[change]
    damage(small_base)
    before = sorted(small_base.rglob("*"))
    began = time.monotonic()
    with pytest.raises(UserError, match=expected) as e:
        llama.load(small_base)
    assert time.monotonic() - began < 5
    assert "\n" not in str(e.value) and len(str(e.value)) < 500
    assert sorted(small_base.rglob("*")) == before, "something was written, or code in the file was run"


def test_a_file_for_a_folder_and_no_folder(small_base):
    for path in (small_base / "config.json", small_base / "nowhere"):
        with pytest.raises(UserError, match="no such folder"):
            llama.load(path)


def test_the_undamaged_one_loads(small_base):
    """And so do its two shards: the table above fails for the reason it says."""
    llama.load(small_base)
    llama.load(shard(small_base))


def test_llama_3_runs_without_its_tokenizer(tmp_path, small_base):
    (small_base / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")
    assert llama.load_model(small_base)(torch.zeros(1, 3, dtype=torch.long)).shape == (1, 3, 512)


ADAPTER_DAMAGES = {
    "NaN": (lambda f, t: t.update({k: v * float("nan") for k, v in t.items()}), "holds NaN"),
    "integers": (lambda f, t: t.update({k: v.to(torch.int32) for k, v in t.items()}), "of dtype I32"),
    "other modules": (lambda f, t: edit(f / "adapter_config.json", target_modules=["q_proj"]), "unexpected tensor"),
    "more modules": (
        lambda f, t: [t.pop(k) for k in list(t) if "down_proj" in k],
        r"down_proj.lora_A.weight \[4, 48\] is missing",
    ),
    "a rank that is not its": (
        lambda f, t: edit(f / "adapter_config.json", r=8),
        r"has shape \[4, 32\], the base needs \[8, 32\]",
    ),
    "a pattern for modules": (lambda f, t: edit(f / "adapter_config.json", target_modules=".*q_proj"), "target module"),
    "ranks by pattern": (lambda f, t: edit(f / "adapter_config.json", rank_pattern={"q_proj": 2}), "rank_pattern"),
}


@pytest.mark.parametrize("change", ADAPTER_DAMAGES)
def test_damaged_adapters_are_refused(change, tmp_path):
    damage, expected = ADAPTER_DAMAGES[change]
    config = lora.LoRAConfig(4, 8.0)
    lora.save_adapter(lora.wrap(random_model(), config), tmp_path, config, base="base")
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    damage(tmp_path, tensors)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(UserError, match=expected) as e:
        lora.load_adapter(random_model(), tmp_path)
    assert "\n" not in str(e.value)
