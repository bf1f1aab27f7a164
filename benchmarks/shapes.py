"""For the benchmarks: LLaMAs of real sizes with random weights, made where they run, and the same tensors in `transformers`."""

import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import model as llama  # noqa: E402

SHAPES = {  # LLaMA's own; `small` is for trying the scripts out
    "7b": dict(vocab_size=32000, dim=4096, n_layers=32, n_heads=32, n_kv_heads=32, head_dim=128, hidden_dim=11008),
    "13b": dict(vocab_size=32000, dim=5120, n_layers=40, n_heads=40, n_kv_heads=40, head_dim=128, hidden_dim=13824),
    "small": dict(vocab_size=1000, dim=256, n_layers=4, n_heads=4, n_kv_heads=4, head_dim=64, hidden_dim=704),
}


def random_model(shape: str, device: torch.device, dtype: torch.dtype) -> llama.LLaMA:
    """Of a shape of SHAPES, never on another device or in another dtype: 7B in bf16 takes 13.5 GB."""
    with torch.device("meta"):
        model = llama.LLaMA(llama.ModelConfig(**SHAPES[shape], norm_eps=1e-6, max_seq_len=4096)).to(dtype)
    model.to_empty(device=device)
    generator = torch.Generator(device=device).manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:
                p.fill_(1.0)
            else:
                p.normal_(std=p.shape[1] ** -0.5, generator=generator)
    return model.requires_grad_(False)


def in_transformers(model: llama.LLaMA, tokenizer: llama.Tokenizer):
    """The model (without an adapter) as a LlamaForCausalLM that holds the very same tensors."""
    import transformers
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    weights = {llama.hf_name(n): p for n, p in model.named_parameters()}
    dtype = model.tok_embeddings.weight.dtype
    config = transformers.LlamaConfig(**llama.config_to_hf(model.config, tokenizer, dtype) | {"attn_implementation": "sdpa"})
    with torch.device("meta"):
        theirs = transformers.LlamaForCausalLM(config)
    theirs.load_state_dict(weights, strict=not model.config.tie_embeddings, assign=True)
    theirs.tie_weights()
    theirs.model.rotary_emb = LlamaRotaryEmbedding(config).to(model.device)  # not a weight: it was left on meta
    return theirs.eval()


def flops_of_a_product(device: torch.device, dtype: torch.dtype, size: int | None = None) -> float:
    """Floating-point operations per second of a square matrix product, the best of ten: what the device can do at most."""
    size = size or (8192 if device.type == "cuda" else 2048)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / fastest(lambda: a @ b, device)


def bytes_per_second(device: torch.device) -> float:
    """Reading memory, the best of ten sums over 2 GB (256 MB on a CPU)."""
    x = torch.ones(2**30 if device.type == "cuda" else 2**27, device=device, dtype=torch.bfloat16)
    return x.nbytes / fastest(lambda: x.view(torch.float32).sum(), device)


def fastest(work, device: torch.device) -> float:
    seconds = []
    for _ in range(12):
        synchronize(device)
        began = time.perf_counter()
        work()
        synchronize(device)
        seconds.append(time.perf_counter() - began)
    return min(seconds[2:])


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
