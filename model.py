"""A LLaMA in one file, to be read from leaf to root.

RMSNorm, rotary embedding, attention, feed-forward, block, LLaMA; then the KV cache, the tokenizer, and
`load` / `save` for checkpoint folders in the Hugging Face layout (config.json, model.safetensors, tokenizer.model).
Inside, names are Meta's (wq, wk, wv, wo, w1, w2, w3); the table `HF_NAMES` is the only place that knows the others.

Shapes in comments: B rows, T new tokens, S cached positions, D model width, H query heads, K key/value heads, hd head width.
"""

import json
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import sentencepiece
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class UserError(ValueError):
    """Something the user can put right. The scripts print it as one line and exit with status 1."""


def run_script(main) -> None:
    """Run a script's main() -> exit status (None: 0). What the user can put right is one line, without a traceback."""
    try:
        status = main()
    except UserError as e:
        sys.exit(f"error: {e}")
    except BrokenPipeError:  # the reader of our output has gone, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = 130
    sys.exit(status)


def find_folder(path: Path) -> Path:
    """A folder as given, or below this repository where there is none such in the working directory."""
    beside = Path(__file__).parent / path
    return beside if not path.exists() and beside.exists() else path


def pick_device(name: str) -> torch.device:
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(n for n, there in available.items() if there)
    if not available[name]:
        raise UserError(
            f"--device {name}: there is none on this machine; expected one of {', '.join(n for n in available if available[n])}"
        )
    return torch.device(name)


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of matrix products; auto takes bf16 only where the hardware multiplies it faster than fp32."""
    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if fast else torch.float32


@dataclass
class ModelConfig:
    vocab_size: int
    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    hidden_dim: int  # width of the feed-forward layer
    norm_eps: float = 1e-5
    rope_theta: float = 10_000.0
    max_seq_len: int = 2048  # the longest context, in tokens
    tie_embeddings: bool = False


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * F.rms_norm(x.float(), (x.shape[-1],), eps=self.eps).type_as(x)


def rotary_angles(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the rotation of each position, [B, T] -> twice [B, T, 1, hd/2] in fp32 (RoFormer, section 3.4.2).

    They are computed for the positions at hand, not looked up: positions may be fractional (see `stretch` in train.py),
    and no table can be overrun. bf16 cannot hold integers above 256, hence fp32.
    """
    frequencies = theta ** (-torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim)
    angles = positions.float()[:, :, None, None] * frequencies
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (i, i + hd/2) of x [B, T, heads, hd]: the order of Hugging Face checkpoints."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).type_as(x)


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of q [B, H, T, hd] over k, v [B, K, T, hd] of the same length."""
    B, H, T, hd = q.shape
    if q.is_cuda:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=H != k.shape[1])
    # On a CPU plain matrix products beat the fused kernel at the lengths we train on (its backward pass above all).
    # The heads that share a key/value head are stacked along T, so that no key is copied.
    K = k.shape[1]
    hidden = torch.full((T, T), float("-inf"), dtype=q.dtype, device=q.device).triu(1)
    scores = (q.reshape(B, K, -1, hd) * hd**-0.5) @ k.transpose(2, 3)  # [B, K, (H / K) T, T]
    weights = torch.softmax(scores.view(B, H, T, T) + hidden, dim=-1)
    return (weights.view(B, K, -1, T) @ v).view(B, H, T, hd)


class Attention(nn.Module):
    """Grouped-query attention: H query heads share K <= H key/value heads."""

    def __init__(self, c: ModelConfig):
        super().__init__()
        self.n_heads, self.n_kv_heads, self.head_dim = c.n_heads, c.n_kv_heads, c.head_dim
        self.wq = nn.Linear(c.dim, c.n_heads * c.head_dim, bias=False)
        self.wk = nn.Linear(c.dim, c.n_kv_heads * c.head_dim, bias=False)
        self.wv = nn.Linear(c.dim, c.n_kv_heads * c.head_dim, bias=False)
        self.wo = nn.Linear(c.n_heads * c.head_dim, c.dim, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cached: "LayerCache | None") -> Tensor:
        B, T, _ = x.shape
        q = rotate(self.wq(x).view(B, T, self.n_heads, self.head_dim), cos, sin).transpose(1, 2)  # [B, H, T, hd]
        k = rotate(self.wk(x).view(B, T, self.n_kv_heads, self.head_dim), cos, sin).transpose(1, 2)  # [B, K, T, hd]
        v = self.wv(x).view(B, T, self.n_kv_heads, self.head_dim).transpose(1, 2)
        if cached is None:
            # Padding is on the right, so a causal mask hides it from every real token.
            y = causal_attention(q, k, v)
        else:
            k, v = cached.append(k, v)  # [B, K, S, hd]
            if T == 1:
                # One new token: the heads that share a key/value head become its queries, and no key is copied.
                q = q.view(B, self.n_kv_heads, self.n_heads // self.n_kv_heads, self.head_dim)
                y = F.scaled_dot_product_attention(q, k, v, attn_mask=cached.mask).view(B, self.n_heads, 1, self.head_dim)
            else:
                gqa = self.n_heads != self.n_kv_heads
                y = F.scaled_dot_product_attention(q, k, v, attn_mask=cached.mask, enable_gqa=gqa)
        return self.wo(y.transpose(1, 2).reshape(B, T, -1))


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x)."""

    def __init__(self, c: ModelConfig):
        super().__init__()
        self.w1 = nn.Linear(c.dim, c.hidden_dim, bias=False)
        self.w2 = nn.Linear(c.hidden_dim, c.dim, bias=False)
        self.w3 = nn.Linear(c.dim, c.hidden_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    def __init__(self, c: ModelConfig):
        super().__init__()
        self.attention_norm = RMSNorm(c.dim, c.norm_eps)
        self.attention = Attention(c)
        self.ffn_norm = RMSNorm(c.dim, c.norm_eps)
        self.feed_forward = FeedForward(c)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cached: "LayerCache | None" = None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin, cached)
        return x + self.feed_forward(self.ffn_norm(x))


class LLaMA(nn.Module):
    def __init__(self, c: ModelConfig):
        super().__init__()
        self.config = c
        self.tok_embeddings = nn.Embedding(c.vocab_size, c.dim)
        self.layers = nn.ModuleList(Block(c) for _ in range(c.n_layers))
        self.norm = RMSNorm(c.dim, c.norm_eps)
        self.output = nn.Linear(c.dim, c.vocab_size, bias=False)
        self.tie()

    def tie(self) -> None:
        """Make the output layer share the embedding, where the config says so (again after a load has replaced tensors)."""
        if self.config.tie_embeddings:
            self.output.weight = self.tok_embeddings.weight

    @property
    def device(self) -> torch.device:
        return self.tok_embeddings.weight.device

    def forward(
        self,
        tokens: Tensor,
        *,
        positions: Tensor | None = None,
        cache: "KVCache | None" = None,
        rows: Tensor | None = None,
        n_new: Tensor | None = None,
        select: Tensor | None = None,
        gradient_checkpointing: bool = False,
    ) -> Tensor:
        """Logits of the next token.

        tokens      [B, T] ids, padded on the right.
        positions   [B, T] for the rotary embedding; by default 0, 1, 2, ... without a cache, and going on from each
                    row's own length with one.
        cache       keys and values of what came before; the new ones are appended to it.
        rows        [B] the rows of the cache that these tokens belong to (default: all, in order).
        n_new       [B] how many of the T tokens are real in each row (default: all T). Only these count as cached.
        select      [B, T] bool: where logits are wanted (the output layer is the largest product of a small step).

        Returns [B, T, vocab_size], or [select.sum(), vocab_size]. Raises ValueError where a row would outgrow
        `max_seq_len`.
        """
        B, T = tokens.shape
        longest = T if cache is None else cache.longest(T if n_new is None else n_new, rows)
        if longest > self.config.max_seq_len:
            raise ValueError(f"a context of {longest} tokens exceeds the model's {self.config.max_seq_len}")
        if cache is None:
            layer_caches = [None] * len(self.layers)
            if positions is None:
                positions = torch.arange(T, device=tokens.device).expand(B, T)
        else:
            slots, layer_caches = cache.open(T, rows)
            if positions is None:
                positions = slots
        cos, sin = rotary_angles(positions, self.config.head_dim, self.config.rope_theta)
        x = self.tok_embeddings(tokens)  # [B, T, D]
        for layer, cached in zip(self.layers, layer_caches, strict=True):
            if gradient_checkpointing and torch.is_grad_enabled():
                # Reentrant checkpointing gives no gradient at all where the inputs need none, as under a frozen base.
                x = checkpoint(layer, x, cos, sin, cached, use_reentrant=False)
            else:
                x = layer(x, cos, sin, cached)
        if cache is not None:
            cache.close(T if n_new is None else n_new, rows)
        if select is not None:
            x = x[select]
        return self.output(self.norm(x))


class KVCache:
    """Keys and values of several contexts, one a row; each row owns its length, so rows may be at different places.

    Fresh context, fresh cache: `lengths[row] = 0` is all it takes, as nothing beyond a row's length is ever attended to.
    `take` copies a row's used positions out (a suspended context), `put` brings them back.
    """

    def __init__(self, config: ModelConfig, n_rows: int, *, device: torch.device | str, dtype: torch.dtype, capacity: int = 0):
        self.config = config
        shape = (config.n_layers, n_rows, config.n_kv_heads, capacity, config.head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)  # [layers, B, K, S, hd]
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.lengths = torch.zeros(n_rows, device=device, dtype=torch.long)  # [B] positions in use

    @staticmethod
    def bytes_per_position(config: ModelConfig, dtype: torch.dtype) -> int:
        return 2 * config.n_layers * config.n_kv_heads * config.head_dim * dtype.itemsize

    @property
    def capacity(self) -> int:
        return self.keys.shape[3]

    @staticmethod
    def round_up(capacity: int) -> int:
        """Capacities are multiples of 64, so that growing is seldom needed."""
        return -(-capacity // 64) * 64

    def reserve(self, capacity: int) -> None:
        """Make room for `capacity` positions a row."""
        more = self.round_up(capacity) - self.capacity
        if more > 0:
            self.keys = F.pad(self.keys, (0, 0, 0, more))
            self.values = F.pad(self.values, (0, 0, 0, more))

    def longest(self, n_new: int | Tensor, rows: Tensor | None) -> int:
        """The most positions that any row will have in use after n_new more."""
        return int(((self.lengths if rows is None else self.lengths[rows]) + n_new).max())

    def open(self, n_tokens: int, rows: Tensor | None) -> tuple[Tensor, "list[LayerCache]"]:
        """The slots [B, T] that n_tokens new tokens a row go to, and each layer's view of the cache."""
        lengths = self.lengths if rows is None else self.lengths[rows]
        total = int(lengths.max()) + n_tokens
        self.reserve(total)
        slots = lengths[:, None] + torch.arange(n_tokens, device=lengths.device)
        # A query sees the slots up to its own. SDPA's is_causal is aligned to the first key and would be wrong here.
        mask = (torch.arange(total, device=lengths.device) <= slots[:, :, None])[:, None]  # [B, 1, T, S]
        index = torch.arange(len(self.lengths), device=lengths.device) if rows is None else rows
        return slots, [
            LayerCache(k, v, index[:, None], slots, mask, whole=rows is None) for k, v in zip(self.keys, self.values, strict=True)
        ]

    def close(self, n_new: int | Tensor, rows: Tensor | None) -> None:
        if rows is None:
            self.lengths += n_new
        else:
            self.lengths[rows] += n_new

    def take(self, row: int) -> tuple[Tensor, Tensor]:
        """A copy of a row's keys and values, [layers, K, length, hd] each: only the positions in use."""
        n = int(self.lengths[row])
        return self.keys[:, row, :, :n].clone(), self.values[:, row, :, :n].clone()

    def put(self, row: int, saved: tuple[Tensor, Tensor]) -> None:
        """Make `saved` (from `take`) the content of a row."""
        n = saved[0].shape[2]
        self.reserve(n)
        self.keys[:, row, :, :n], self.values[:, row, :, :n] = saved
        self.lengths[row] = n


@dataclass
class LayerCache:
    """One layer's part of a KVCache during one forward pass."""

    keys: Tensor  # [all rows, K, capacity, hd]
    values: Tensor
    rows: Tensor  # [B, 1]
    slots: Tensor  # [B, T]
    mask: Tensor  # [B, 1, T, S] what each query may see
    whole: bool  # the rows are all rows, so that a view serves instead of a copy

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new k and v [B, K, T, hd]; return all keys and values up to S, [B, K, S, hd]."""
        self.keys[self.rows, :, self.slots] = k.transpose(1, 2).to(self.keys.dtype)
        self.values[self.rows, :, self.slots] = v.transpose(1, 2).to(self.values.dtype)
        size = self.mask.shape[-1]
        if self.whole:
            return self.keys[:, :, :size], self.values[:, :, :size]
        return self.keys[self.rows[:, 0], :, :size], self.values[self.rows[:, 0], :, :size]


class Tokenizer:
    """SentencePiece, used so that a segment has the same ids in training and in decoding, wherever it stands.

    A context is `start(first segment)` followed by `segment(s)` for each further one: ids are concatenated, text is
    never tokenized again. (SentencePiece puts a dummy space before whatever it is given; `segment` hides that behind a
    newline, which is always a byte piece of its own, and cuts both off.)
    """

    def __init__(self, path: Path):
        try:
            self.sp = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as e:
            raise UserError(f"{path}: not a sentencepiece model ({_describe(path)}); copy the tokenizer.model again") from e
        self.vocab_size = self.sp.vocab_size()
        self.bos_id, self.eos_id = self.sp.bos_id(), self.sp.eos_id()
        self.newline_id = self.sp.piece_to_id("<0x0A>")
        self._prefix = self.sp.encode("\n")  # the dummy space, the newline

    def start(self, text: str) -> list[int]:
        """Ids of a context's first segment: BOS and the text, with sentencepiece's dummy space."""
        return [self.bos_id] + self.sp.encode(text)

    def segment(self, text: str) -> list[int]:
        """Ids of a segment that continues a context."""
        return self.sp.encode("\n" + text)[len(self._prefix) :]

    def decode(self, ids: list[int]) -> str:
        """Text of a segment that continues a context. Bytes that are not UTF-8 become U+FFFD."""
        return self.sp.decode([self.newline_id, *ids])[1:]


# --- checkpoints -------------------------------------------------------------------------------------------------

HF_NAMES = {  # our module -> the Hugging Face module; N is the layer
    "tok_embeddings": "model.embed_tokens",
    "layers.N.attention_norm": "model.layers.N.input_layernorm",
    "layers.N.attention.wq": "model.layers.N.self_attn.q_proj",
    "layers.N.attention.wk": "model.layers.N.self_attn.k_proj",
    "layers.N.attention.wv": "model.layers.N.self_attn.v_proj",
    "layers.N.attention.wo": "model.layers.N.self_attn.o_proj",
    "layers.N.ffn_norm": "model.layers.N.post_attention_layernorm",
    "layers.N.feed_forward.w1": "model.layers.N.mlp.gate_proj",
    "layers.N.feed_forward.w2": "model.layers.N.mlp.down_proj",
    "layers.N.feed_forward.w3": "model.layers.N.mlp.up_proj",
    "norm": "model.norm",
    "output": "lm_head",
}


def hf_name(name: str) -> str:
    """layers.3.attention.wq -> model.layers.3.self_attn.q_proj (a trailing .weight stays)."""
    module, dot, leaf = name.rpartition(".")
    if leaf != "weight":
        module, dot, leaf = name, "", ""
    parts = module.split(".")
    number = next((p for p in parts if p.isdigit()), "N")
    return HF_NAMES[".".join("N" if p.isdigit() else p for p in parts)].replace("N", number) + dot + leaf


def _describe(path: Path) -> str:
    """What a file that could not be read looks like, in a few words."""
    if not path.is_file():
        return "no such file"
    head = path.open("rb").read(64)
    if head.startswith(b"version https://git-lfs"):
        return "it is a git-LFS pointer: fetch the real file with `git lfs pull`"
    if head.lstrip().startswith(b"<"):
        return "it is a web page, not the file"
    if re.match(rb"[A-Za-z0-9+/]+=* \d+\n", head):
        return "it is a tiktoken file, as of Llama 3, which needs another tokenizer"
    return f"{path.stat().st_size} bytes"


def read_json(path: Path) -> dict:
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, ValueError) as e:
        raise UserError(f"{path}: not readable as JSON ({e})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def write_atomically(path: Path, write) -> None:
    """Call write(temporary path), then rename: a reader sees the old file or the new one, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, on the CPU, in the file's dtypes."""
    try:
        with safe_open(path, framework="pt") as f:
            return {name: f.get_tensor(name) for name in f.keys()}
    except (SafetensorError, OSError) as e:
        raise UserError(f"{path}: not a readable safetensors file ({e}; {_describe(path)})") from None


def config_from_hf(path: Path) -> ModelConfig:
    """Read a Hugging Face config.json of architecture LlamaForCausalLM; refuse what this model cannot run."""
    c = read_json(path)
    found = c.get("architectures") or [c.get("model_type")]
    if found not in (["LlamaForCausalLM"], ["llama"]):
        raise UserError(f"{path}: architecture {found[0]!r}, expected 'LlamaForCausalLM'")
    rope = c.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise UserError(f"{path}: rope_parameters is {rope!r}, expected an object")
    kind = rope.get("rope_type", "default")
    if kind != "default" or c.get("rope_scaling"):
        raise UserError(f"{path}: rope scaling {c.get('rope_scaling') or kind!r} is not supported, expected none")
    for key in ("attention_bias", "mlp_bias"):
        if c.get(key):
            raise UserError(f"{path}: {key} is not supported, expected false")
    if c.get("hidden_act", "silu") != "silu":
        raise UserError(f"{path}: hidden_act is {c['hidden_act']!r}, expected 'silu'")

    def number(key: str, value, kind: type = int):
        """A positive number; anything else is named."""
        if isinstance(value, bool) or not isinstance(value, kind if kind is int else (int, float)) or not value > 0:
            raise UserError(f"{path}: {key} is {value!r}, expected a positive {kind.__name__}")
        return kind(value)

    try:
        dim, heads = number("hidden_size", c["hidden_size"]), number("num_attention_heads", c["num_attention_heads"])
        kv_heads = number("num_key_value_heads", c.get("num_key_value_heads") or heads)
        if heads % kv_heads:
            raise UserError(f"{path}: {heads} attention heads cannot share {kv_heads} key/value heads evenly")
        if not c.get("head_dim") and dim % heads:
            raise UserError(f"{path}: hidden_size {dim} is not divisible by {heads} attention heads")
        return ModelConfig(
            vocab_size=number("vocab_size", c["vocab_size"]),
            dim=dim,
            n_layers=number("num_hidden_layers", c["num_hidden_layers"]),
            n_heads=heads,
            n_kv_heads=kv_heads,
            head_dim=number("head_dim", c.get("head_dim") or dim // heads),
            hidden_dim=number("intermediate_size", c["intermediate_size"]),
            norm_eps=number("rms_norm_eps", c.get("rms_norm_eps", 1e-6), float),
            rope_theta=number("rope_theta", rope.get("rope_theta") or c.get("rope_theta") or 10_000.0, float),
            max_seq_len=number("max_position_embeddings", c.get("max_position_embeddings", 2048)),
            tie_embeddings=bool(c.get("tie_word_embeddings", False)),
        )
    except KeyError as e:
        raise UserError(f"{path}: the key {e} is missing") from None


def config_to_hf(c: ModelConfig, tokenizer: Tokenizer, dtype: torch.dtype) -> dict:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": c.vocab_size,
        "hidden_size": c.dim,
        "intermediate_size": c.hidden_dim,
        "num_hidden_layers": c.n_layers,
        "num_attention_heads": c.n_heads,
        "num_key_value_heads": c.n_kv_heads,
        "head_dim": c.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": c.norm_eps,
        "rope_theta": c.rope_theta,
        "max_position_embeddings": c.max_seq_len,
        "tie_word_embeddings": c.tie_embeddings,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }


def load(path: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> tuple[LLaMA, Tokenizer]:
    """Read a checkpoint folder in the Hugging Face layout.

    Strict: a missing, unexpected or misshapen tensor raises UserError naming it and both shapes.
    """
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"{path}: no such folder; expected one with config.json, model.safetensors and tokenizer.model")
    config = config_from_hf(path / "config.json")
    tokenizer = Tokenizer(path / "tokenizer.model")
    if tokenizer.vocab_size != config.vocab_size:
        raise UserError(f"{path}: config.json says {config.vocab_size} tokens, tokenizer.model has {tokenizer.vocab_size}")
    with torch.device("meta"):
        model = LLaMA(config)
    expected = {name: p.shape for name, p in model.named_parameters()}  # a tied output layer is listed once
    tensors = read_tensors(path / "model.safetensors")
    state = {}
    for name, shape in expected.items():
        tensor = tensors.pop(hf_name(name), None)
        if tensor is None:
            raise UserError(f"{path}/model.safetensors: tensor {hf_name(name)} {list(shape)} is missing")
        if tensor.shape != shape:
            raise UserError(
                f"{path}/model.safetensors: tensor {hf_name(name)} has shape {list(tensor.shape)}, expected {list(shape)}"
            )
        state[name] = tensor.to(device=device, dtype=dtype)
    unexpected = [
        n for n in tensors if not n.endswith("rotary_emb.inv_freq") and not (config.tie_embeddings and n == "lm_head.weight")
    ]
    if unexpected:
        raise UserError(f"{path}/model.safetensors: unexpected tensor {unexpected[0]} {list(tensors[unexpected[0]].shape)}")
    model.load_state_dict(state, assign=True, strict=not config.tie_embeddings)
    model.tie()
    return model.requires_grad_(False).eval(), tokenizer


def save(model: LLaMA, tokenizer: Tokenizer, path: str | Path, *, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write a checkpoint folder in the Hugging Face layout, each file atomically."""
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    write_atomically(path / "tokenizer.model", lambda p: p.write_bytes(tokenizer.sp.serialized_model_proto()))
    state = {hf_name(n): p.detach().to("cpu", dtype).contiguous() for n, p in model.named_parameters()}
    write_atomically(path / "model.safetensors", lambda p: save_file(state, p, metadata={"format": "pt"}))
    config = config_to_hf(model.config, tokenizer, dtype)  # last, as a folder that has it counts as complete
    write_atomically(path / "config.json", lambda p: p.write_text(json.dumps(config, indent=2) + "\n"))
