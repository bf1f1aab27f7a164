"""A LLaMA in one file, to be read from leaf to root.

RMSNorm, rotary embedding, attention, feed-forward, block, LLaMA; then the KV cache, the tokenizer, and checkpoints: `load`
reads folders in the layouts of Hugging Face (config.json, *.safetensors) and of Meta (params.json, consolidated.*), `save`
writes the former. Inside, names are Meta's (wq, wk, wv, wo, w1, w2, w3) and rotary embedding rotates Hugging Face's pairs.

Shapes in comments: B rows, T new tokens, S cached positions, D model width, H query heads, K key/value heads, hd head width.
"""

import itertools
import json
import math
import os
import pickle
import re
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import sentencepiece
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, distributed, nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm


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
    """The device of that name (auto: the best there is), with torch set up for it; UserError where there is none."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(n for n, there in available.items() if there)
    if not available[name]:
        raise UserError(
            f"--device {name}: there is none on this machine; expected one of {', '.join(n for n in available if available[n])}"
        )
    if name == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)  # it plans for every new shape, for longer than many a pass takes
    return torch.device(name)


def processes() -> tuple[int, int]:
    """This process's rank and how many there are, as torchrun tells them."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def join_processes(device: torch.device) -> None:
    """Meet the others that torchrun has started, if any; each then has a GPU of its own."""
    if processes()[1] > 1:
        if device.type == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of matrix products; auto takes bf16 only where the hardware multiplies it faster than fp32.

    On an x86 CPU that is AMX, its tiles: by the dot products of AVX-512 alone (vdpbf16ps) bf16 can be the slower one.
    """
    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = device.type == "cpu" and torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if fast else torch.float32


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are lowered for contexts longer than those of pretraining."""

    kind: str  # "linear": all by `factor`; "llama3": the low ones by `factor`, the high ones not at all
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_seq_len: int = 8192


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
    attention_bias: bool = False
    mlp_bias: bool = False
    rope_scaling: RopeScaling | None = None


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        y = self.weight * F.rms_norm(x.float(), (x.shape[-1],), eps=self.eps).type_as(x)
        # Under autocast each of the linear layers that follow would make a copy of its own.
        return y.to(torch.get_autocast_dtype(x.device.type)) if torch.is_autocast_enabled(x.device.type) else y


def rotary_frequencies(c: ModelConfig, device: torch.device) -> Tensor:
    """Radians per position of each pair of dimensions, [hd/2] in fp32, the highest first."""
    # Written like this, and not as theta ** -x, since a difference in the last bit is a radian / 10,000 at position 2,000.
    frequencies = 1.0 / (c.rope_theta ** (torch.arange(0, c.head_dim, 2, device=device, dtype=torch.float32) / c.head_dim))
    if c.rope_scaling is None:
        return frequencies
    scaled = frequencies / c.rope_scaling.factor
    if c.rope_scaling.kind == "linear":
        return scaled
    # Llama 3.1: frequencies with fewer than low_freq_factor turns in the original context are scaled, those with more than
    # high_freq_factor are not, and in between it is a mixture.
    low, high = c.rope_scaling.low_freq_factor, c.rope_scaling.high_freq_factor
    turns = c.rope_scaling.original_max_seq_len * frequencies / (2 * math.pi)
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - smooth) * scaled + smooth * frequencies


def rotary_angles(positions: Tensor, c: ModelConfig) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the rotation of each position, [...] -> twice [..., 1, hd/2] in fp32 (RoFormer, section 3.4.2).

    They are computed for the positions at hand, not looked up: positions may be fractional (see `stretch` in train.py),
    and no table can be overrun. bf16 cannot tell neighbouring integers above 256 apart, hence fp32.
    """
    angles = positions.float()[..., None, None] * rotary_frequencies(c, positions.device)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (i, i + hd/2) of x [..., heads, hd]: the order of Hugging Face checkpoints."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).type_as(x)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of q [B, H, T, hd] over k, v [B, K, S, hd].

    mask        [B, 1, T, S], added to the scores: 0 where a query may look, else -inf; None: causal, with S = T.

    In training on a CPU plain matrix products beat the fused kernel up to some length, above all in the backward pass, and up to
    a greater one in bf16 (see benchmarks/attention.py).
    """
    longest = 1024 if q.dtype == torch.bfloat16 else 512
    if q.is_cuda or (q.is_cpu and (not torch.is_grad_enabled() or q.shape[2] > longest)):
        (B, H, T, hd), (K, S) = q.shape, k.shape[1:3]
        if T == S or H == K or q.is_cuda:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=H != K)
        # A few queries on many keys, as in decoding: heads that share these are stacked along T, so that they are read once.
        mask = mask.repeat(1, 1, H // K, 1)
        return F.scaled_dot_product_attention(q.reshape(B, K, -1, hd), k, v, attn_mask=mask).reshape(B, H, T, hd)
    return plain_attention(q, k, v, mask)


def plain_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """The same in matrix products. Heads that share a key/value head are stacked along T, so that no key is copied."""
    B, H, T, hd = q.shape
    K, S = k.shape[1:3]
    if mask is None:
        mask = torch.full((T, T), float("-inf"), dtype=q.dtype, device=q.device).triu(1)
    scores = (q.reshape(B, K, -1, hd) * hd**-0.5) @ k.transpose(2, 3)  # [B, K, (H / K) T, S]
    weights = torch.softmax(scores.view(B, H, T, S) + mask, dim=-1)
    return (weights.view(B, K, -1, S) @ v).view(B, H, T, hd)


class Attention(nn.Module):
    """Grouped-query attention: H query heads share K <= H key/value heads."""

    def __init__(self, c: ModelConfig):
        super().__init__()
        self.n_heads, self.n_kv_heads, self.head_dim = c.n_heads, c.n_kv_heads, c.head_dim
        self.wq = nn.Linear(c.dim, c.n_heads * c.head_dim, bias=c.attention_bias)
        self.wk = nn.Linear(c.dim, c.n_kv_heads * c.head_dim, bias=c.attention_bias)
        self.wv = nn.Linear(c.dim, c.n_kv_heads * c.head_dim, bias=c.attention_bias)
        self.wo = nn.Linear(c.n_heads * c.head_dim, c.dim, bias=c.attention_bias)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: "Attend") -> Tensor:
        """x [B, T, D], or [N, D]: the real ones of B x T tokens. `attend` knows which of them may look at what."""
        q = rotate(self.wq(x).unflatten(-1, (self.n_heads, self.head_dim)), cos, sin)  # [B, T, H, hd] or [N, H, hd]
        k = rotate(self.wk(x).unflatten(-1, (self.n_kv_heads, self.head_dim)), cos, sin)
        v = self.wv(x).unflatten(-1, (self.n_kv_heads, self.head_dim))
        return self.wo(attend(q, k, v).flatten(-2))


def attend_rows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Each row is a context of its own: q [B, T, H, hd], k and v [B, T, K, hd] -> [B, T, H, hd].

    Padding is on the right, so a causal mask hides it from every real token.
    """
    return attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), None).transpose(1, 2)


class Packed:
    """Contexts one after another: attention stays within each, q [N, H, hd], k and v [N, K, hd] -> [N, H, hd].

    lengths  of the contexts. What is beyond their sum is padding, and gets zeros. Neighbours of one length share a product.
    """

    def __init__(self, lengths: list[int], device: torch.device):
        if device.type == "cuda":  # one padded call: many small kernels would cost more than the padding
            columns = torch.arange(max(lengths), device=device)
            self.real = (columns < torch.tensor(lengths, device=device)[:, None]).nonzero(as_tuple=True)
        self.lengths, self.used = lengths, sum(lengths)
        self.groups = [(length, len(list(same))) for length, same in itertools.groupby(lengths)]
        self.mask: Tensor | None = None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        padding = q.new_zeros(len(q) - self.used, *q.shape[1:])
        q, k, v = (x[: self.used] for x in (q, k, v))
        if q.is_cuda:
            shape = len(self.lengths), max(self.lengths)
            return torch.cat((attend_rows(*(pad(x, self.real, shape) for x in (q, k, v)))[self.real], padding))
        if self.mask is None or self.mask.dtype != q.dtype:  # of the longest, whose upper left corners serve the others
            self.mask = q.new_full((max(self.lengths),) * 2, float("-inf")).triu(1)
        out, sizes = [], [length * count for length, count in self.groups]
        for (n, count), *qkv in zip(self.groups, *(x.split(sizes) for x in (q, k, v)), strict=True):
            qi, ki, vi = (x.unflatten(0, (count, n)).transpose(1, 2) for x in qkv)
            out.append(attention(qi, ki, vi, self.mask[:n, :n]).transpose(1, 2).flatten(0, 1))
        return torch.cat((*out, padding))


def pad(x: Tensor, real: tuple[Tensor, Tensor], shape: tuple[int, int]) -> Tensor:
    """[N, ...] -> [B, T, ...]: each token to its row and column, zeros where there is none."""
    padded = x.new_zeros((*shape, *x.shape[1:]))
    padded[real] = x
    return padded


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x)."""

    def __init__(self, c: ModelConfig):
        super().__init__()
        self.w1 = nn.Linear(c.dim, c.hidden_dim, bias=c.mlp_bias)
        self.w2 = nn.Linear(c.hidden_dim, c.dim, bias=c.mlp_bias)
        self.w3 = nn.Linear(c.dim, c.hidden_dim, bias=c.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    def __init__(self, c: ModelConfig):
        super().__init__()
        self.attention_norm = RMSNorm(c.dim, c.norm_eps)
        self.attention = Attention(c)
        self.ffn_norm = RMSNorm(c.dim, c.norm_eps)
        self.feed_forward = FeedForward(c)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: "Attend", select: tuple[Tensor, ...] | None = None) -> Tensor:
        """`select` indexes x: the places that are wanted, all others are left out of what is returned."""
        x = x + self.attention(self.attention_norm(x), cos, sin, attend)
        if select is not None:  # each place by itself from here on
            x = x[select]
        return x + self.feed_forward(self.ffn_norm(x))


class LLaMA(nn.Module):
    def __init__(self, c: ModelConfig):
        super().__init__()
        self.config = c
        # To be loaded or drawn. nn.Embedding(...) draws it; on the meta device that alone makes torch import its compiler: 1.5 s.
        self.tok_embeddings = nn.Embedding.from_pretrained(torch.zeros(c.vocab_size, c.dim), freeze=False)
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
        lengths: list[int] | None = None,
        reading: tuple[Tensor, Tensor] | None = None,
        gradient_checkpointing: bool = False,
    ) -> Tensor:
        """Logits of the next token.

        tokens      [B, T] ids, padded on the right; with `lengths` [N] ids of several contexts, one after another.
        positions   as tokens, for the rotary embedding; by default 0, 1, 2, ... in each context without a cache, and
                    going on from each row's own length with one.
        cache       keys and values of what came before; the new ones are appended to it.
        rows        [B] the rows of the cache that these tokens belong to (default: all, in order).
        n_new       [B] how many of the T tokens are real in each row (default: all T). Only these count as cached.
        select      as tokens, bool: where logits are wanted. The last feed-forward and the output layer see no other place.
        lengths     of the contexts packed into tokens [N]; what is beyond is padding. They see nothing of each other. Without a
                    cache only.
        reading     (other ids, share from 0 to 1), both as tokens: an embedding is so far on the way to that of the other id.
                    In training only.

        Returns [*tokens.shape, vocab_size], or [select.sum(), vocab_size]. Raises ValueError where a context would outgrow
        `max_seq_len`.
        """
        T = tokens.shape[-1]
        bf16 = torch.is_autocast_enabled(tokens.device.type) or self.tok_embeddings.weight.dtype == torch.bfloat16
        unit = 16 if bf16 and tokens.device.type == "cpu" else 1
        real = None  # rows and columns of the real ones among the B x T tokens, where only these go through the model
        longest = cache.longest(T if n_new is None else n_new, rows) if cache else max(lengths or [T])
        if longest > self.config.max_seq_len:
            raise ValueError(f"a context of {longest} tokens exceeds the model's {self.config.max_seq_len}")
        if cache is None:
            attends: list[Attend] = [Packed(lengths, tokens.device) if lengths else attend_rows] * len(self.layers)
            if positions is None:
                counted = [*lengths, T - sum(lengths)] if lengths else [T]
                positions = torch.cat([torch.arange(n, device=tokens.device) for n in counted]).expand(tokens.shape)
        else:
            if n_new is not None:
                there = (torch.arange(T, device=tokens.device) < n_new[:, None]).nonzero()
                real = fill_up(there, unit)  # what is repeated goes to the same slot again
            slots, attends = cache.open(T, longest, rows, real)
            if positions is None:
                positions = slots
            # In one step many rows go on by a token or two and some take a prompt: padding would be most of the work.
            tokens, positions = (x.flatten() if real is None else x[real] for x in (tokens, positions))
            if select is not None:
                select = select.flatten() if real is None else select[real]
                if real is not None:
                    select[len(there) :] = False
        if select is not None:
            select = select.nonzero()
            n_selected, select = len(select), fill_up(select, unit)
        cos, sin = rotary_angles(positions, self.config)
        x = self.tok_embeddings(tokens)  # [B, T, D], or [N, D] if packed or with a cache
        if reading is not None:
            other, share = reading
            x = x.lerp(self.tok_embeddings(other), share[..., None].to(x.dtype))
        for layer, attend in zip(self.layers, attends, strict=True):
            wanted = select if layer is self.layers[-1] else None
            if gradient_checkpointing and torch.is_grad_enabled():
                # Reentrant checkpointing gives no gradient at all where the inputs need none, as under a frozen base.
                x = checkpoint(layer, x, cos, sin, attend, wanted, use_reentrant=False)
            else:
                x = layer(x, cos, sin, attend, wanted)
        if cache is not None:
            cache.close(T if n_new is None else n_new, rows)
            if select is None:
                x = attends[0].pad(x)
        logits = self.output(self.norm(x))
        return logits if select is None else logits[:n_selected]


class KVCache:
    """Keys and values of several contexts, one a row; each row owns its length, so rows may be at different places.

    Fresh context, fresh cache: `lengths[row] = 0` is all it takes, as nothing beyond a row's length is ever attended to.
    `take` copies a row's used positions out (a suspended context), `put` brings them back.
    """

    def __init__(self, config: ModelConfig, n_rows: int, *, device: torch.device | str, dtype: torch.dtype):
        self.config = config
        shape = (config.n_layers, n_rows, config.n_kv_heads, 0, config.head_dim)  # `reserve` makes room
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
        """Capacities are multiples of 64, and of more where they are large: to grow copies all there is."""
        return round_up(capacity, 64) if capacity else 0

    def reserve(self, capacity: int) -> None:
        """Make room for `capacity` positions a row."""
        more = self.round_up(capacity) - self.capacity
        if more > 0:
            self.keys = F.pad(self.keys, (0, 0, 0, more))
            self.values = F.pad(self.values, (0, 0, 0, more))

    def longest(self, n_new: int | Tensor, rows: Tensor | None) -> int:
        """The most positions that any row will have in use after n_new more."""
        return int(((self.lengths if rows is None else self.lengths[rows]) + n_new).max())

    def open(self, n_tokens: int, total: int, rows: Tensor | None, real: tuple | None) -> tuple[Tensor, "list[LayerCache]"]:
        """The slots [B, T] that n_tokens new tokens a row go to (those that are `real`), and each layer's view of the cache.

        total  positions in use in the longest row once they are in; padding has no slot of its own
        """
        lengths = self.lengths if rows is None else self.lengths[rows]
        self.reserve(total)
        slots = lengths[:, None] + torch.arange(n_tokens, device=lengths.device)
        index = torch.arange(len(self.lengths), device=lengths.device) if rows is None else rows
        place = index[:, None].expand_as(slots), slots
        place = tuple(x.flatten() if real is None else x[real] for x in place)
        views = zip(self.keys, self.values, strict=True)
        if real is not None and self.keys.device.type == "cpu":  # long caches: better many small products than much padding
            spans = row_spans(*place)
            if len(lengths) * n_tokens * total - sum(n * end for _, n, end in spans) > LayerCache.CALL * len(lengths):
                mask = hidden_mask(slots[real], total, self.keys.dtype)[None, None]
                return slots, [LayerCache(k, v, rows, place, slots.shape, mask, real, spans) for k, v in views]
        mask = hidden_mask(slots, total, self.keys.dtype)[:, None]
        return slots, [LayerCache(k, v, rows, place, slots.shape, mask, real) for k, v in views]

    def close(self, n_new: int | Tensor, rows: Tensor | None) -> None:
        if rows is None:
            self.lengths += n_new
        else:
            self.lengths[rows] += n_new

    def shorten(self, n: Tensor, rows: Tensor | None) -> None:
        """Forget the last n positions of each row."""
        self.close(-n, rows)

    def keep(self, rows: list[int], n_rows: int) -> None:
        """These rows alone, numbered from 0, of n_rows in all; with no more room than the longest needs."""
        capacity, more = self.round_up(int(self.lengths[rows].max())), n_rows - len(rows)
        self.keys = F.pad(self.keys[:, rows, :, :capacity], (0, 0, 0, 0, 0, 0, 0, more))
        self.values = F.pad(self.values[:, rows, :, :capacity], (0, 0, 0, 0, 0, 0, 0, more))
        self.lengths = F.pad(self.lengths[rows], (0, more))

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
    """One layer's part of a KVCache during one forward pass: attention to what is cached and to what is new."""

    keys: Tensor  # [all rows, K, capacity, hd]
    values: Tensor
    rows: Tensor | None  # [B] those that are fed (None: all, so that a view serves instead of a copy)
    place: tuple[Tensor, Tensor]  # row and slot in the cache of each of the N real tokens
    shape: tuple[int, int]  # B and T, with padding
    mask: Tensor  # [B, 1, T, S] 0 where a query may look, else -inf; where each row is attended to by itself [1, 1, N, S]
    real: tuple[Tensor, Tensor] | None  # row and column of each of them among the B x T (None: all are real)
    spans: list[tuple[int, int, int]] | None = None  # ... of each row: which it is, new tokens, positions in use

    # So many pairs of a query and a key have to be saved by a call for a row alone. It takes as long as about 1900 do up to 1024
    # positions in fp32, and 3600 in bf16 (`benchmarks/attention.py --cached`, on one thread of a CPU without AMX).
    CALL = 3000

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [N, H, hd], k and v [N, K, hd] -> [N, H, hd]"""
        self.append(k, v)
        if self.spans is not None:
            return self.attend_by_row(q)
        k, v = self.cached()
        y = attention(self.pad(q).transpose(1, 2), k, v, self.mask).transpose(1, 2)
        return y.flatten(0, 1) if self.real is None else y[self.real]  # without what is padding

    def attend_by_row(self, q: Tensor) -> Tensor:
        """No padding, neither of tokens nor of positions."""
        y, start = torch.empty_like(q), 0
        for row, n, end in self.spans:
            new = slice(start, start + n)
            k, v = self.keys[row : row + 1, :, :end], self.values[row : row + 1, :, :end]
            y[new] = attention(q[new].transpose(0, 1)[None], k, v, self.mask[:, :, new, :end])[0].transpose(0, 1)
            start += n
        return y

    def append(self, k: Tensor, v: Tensor) -> None:
        """Store the new k and v [N, K, hd]."""
        rows, slots = self.place
        self.keys[rows, :, slots] = k.to(self.keys.dtype)
        self.values[rows, :, slots] = v.to(self.values.dtype)

    def cached(self) -> tuple[Tensor, Tensor]:
        """All keys and values up to S, [B, K, S, hd]."""
        size = self.mask.shape[-1]
        if self.rows is None:
            return self.keys[:, :, :size], self.values[:, :, :size]
        return self.keys[self.rows, :, :size], self.values[self.rows, :, :size]

    def pad(self, x: Tensor) -> Tensor:
        """[N, ...] -> [B, T, ...]"""
        return x.view(*self.shape, *x.shape[1:]) if self.real is None else pad(x, self.real, self.shape)


def hidden_mask(slots: Tensor, total: int, dtype: torch.dtype) -> Tensor:
    """[*slots.shape, total]: 0 up to a query's own slot, then -inf. SDPA's is_causal is aligned to the first key: wrong here."""
    hidden = torch.arange(total, device=slots.device) > slots[..., None]
    return torch.zeros(hidden.shape, device=slots.device, dtype=dtype).masked_fill_(hidden, float("-inf"))


def row_spans(rows: Tensor, slots: Tensor) -> list[tuple[int, int, int]]:
    """Of tokens [N] in the order of their rows: for each row which it is, how many there are, and the end of the last slot."""
    which, counts = torch.unique_consecutive(rows, return_counts=True)
    ends = slots[counts.cumsum(0) - 1] + 1
    return list(zip(which.tolist(), counts.tolist(), ends.tolist(), strict=True))


Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # queries, keys, values of the new tokens -> what they attend to


def round_up(n: int, unit: int) -> int:
    """To a multiple of the unit, or of an eighth of the power of two at or above n: few numbers are left, and little is added.

    The shapes of products in bf16 should be few on a CPU: for each new one a kernel is compiled, which takes longer than ten
    products (oneDNN).
    """
    unit = max(unit, 2 ** (n - 1).bit_length() // 8)
    return -(-n // unit) * unit


def fill_up(index: Tensor, unit: int) -> tuple[Tensor, ...]:
    """Places [n, dimensions], the last one repeated until their number is a rounded one (unit 1: as they are), for indexing."""
    more = round_up(len(index), unit) - len(index) if unit > 1 and len(index) else 0
    return torch.cat((index, index[-1:].expand(more, -1))).unbind(1)


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
        """Text of a segment that continues a context. Bytes that are not UTF-8 become U+FFFD.

        Ids beyond the tokenizer's (a model may have more embeddings than it has pieces) read as unknown.
        """
        known = [i if i < self.vocab_size else self.sp.unk_id() for i in ids]
        return self.sp.decode([self.newline_id, *known])[1:]


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
    """layers.3.attention.wq -> model.layers.3.self_attn.q_proj (a trailing .weight or .bias stays)."""
    module, dot, leaf = name.rpartition(".")
    if leaf not in ("weight", "bias"):
        module, dot, leaf = name, "", ""
    parts = module.split(".")
    number = next((p for p in parts if p.isdigit()), "N")
    return HF_NAMES[".".join("N" if p.isdigit() else p for p in parts)].replace("N", number) + dot + leaf


def _describe(path: Path) -> str:
    """What a file that could not be read looks like, in a few words."""
    if not path.is_file():
        return "no such file"
    try:
        head = path.open("rb").read(64)
    except OSError as e:
        return str(e.strerror)
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
        temporary.touch()
        mode = temporary.stat().st_mode
        write(temporary)
        if temporary.stat().st_mode != mode:  # safetensors makes files for their owner alone, whatever the umask says
            temporary.chmod(mode)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _weights_error(path: Path, error: Exception) -> UserError:
    reason = str(error).strip().partition("\n")[0][:200]
    return UserError(f"{path}: not a readable file of weights ({reason or type(error).__name__}; {_describe(path)})")


class WeightFile:
    """A file of weights, safetensors or a pickle of tensors: shapes at once, tensors (memory-mapped) when asked for."""

    DTYPES = {"BF16", "F16", "F32", "F64", "torch.bfloat16", "torch.float16", "torch.float32", "torch.float64"}

    def __init__(self, path: Path):
        self.path = path
        try:
            if path.suffix == ".safetensors":
                _refuse_duplicates(path)
                self.file = safe_open(path, framework="pt")
                slices = {name: self.file.get_slice(name) for name in self.file.keys()}
                self.shapes = {name: tuple(s.get_shape()) for name, s in slices.items()}
                dtypes = {name: s.get_dtype() for name, s in slices.items()}
            else:  # weights_only: no code in the file is run
                self.file = torch.load(path, weights_only=True, mmap=True, map_location="cpu")
                if not (isinstance(self.file, dict) and all(isinstance(t, Tensor) for t in self.file.values())):
                    raise ValueError("it holds other things than tensors by name")
                self.shapes = {name: tuple(t.shape) for name, t in self.file.items()}
                dtypes = {name: str(t.dtype) for name, t in self.file.items()}
        except (SafetensorError, OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError, zipfile.BadZipFile) as e:
            raise _weights_error(path, e) from None
        for name, dtype in dtypes.items():
            if dtype not in self.DTYPES:
                raise UserError(f"{path}: tensor {name} is of dtype {dtype}, expected float weights, not quantized ones")

    def get(self, name: str) -> Tensor:
        return self.file[name] if isinstance(self.file, dict) else self.file.get_tensor(name)


def _refuse_duplicates(path: Path) -> None:
    """Of two entries of one name in the header, readers would silently take the last."""

    def unique(pairs: list) -> dict:
        names = [name for name, _ in pairs]
        if len(set(names)) < len(names):
            raise ValueError(f"its header has {max(names, key=names.count)!r} twice")
        return dict(pairs)

    with path.open("rb") as f:
        size = int.from_bytes(f.read(8), "little")
        if size <= 100_000_000:  # else no header: left to safe_open to refuse
            try:
                json.loads(f.read(size), object_pairs_hook=unique)
            except (UnicodeDecodeError, json.JSONDecodeError, RecursionError):
                return  # no header either: safe_open says what is wrong


@dataclass
class Source:
    """Where a parameter is to be found: one tensor, or one a shard to be joined along `dim`."""

    files: list[WeightFile]
    name: str  # as in the files
    dim: int = 0
    heads: int = 0  # if not 0: rows are this many heads' in Meta's rotary order

    @property
    def shape(self) -> tuple[int, ...]:
        shapes = [f.shapes[self.name] for f in self.files]
        if len(shapes) == 1 or self.dim >= len(shapes[0]):
            return shapes[0]
        return (*shapes[0][: self.dim], sum(s[self.dim] for s in shapes), *shapes[0][self.dim + 1 :])

    def read(self, device: torch.device | str, dtype: torch.dtype) -> Tensor:
        """The whole tensor in memory of its own, nothing larger having been held on the way."""
        out = torch.empty(self.shape, device=device, dtype=dtype)
        start = 0
        for f in self.files:
            try:
                part = f.get(self.name)
                out.narrow(self.dim, start, part.shape[self.dim]).copy_(part)
            except (SafetensorError, OSError, RuntimeError) as e:
                raise _weights_error(f.path, e) from None
            start += part.shape[self.dim]
        if not out.sum(dtype=torch.float32).isfinite():
            raise UserError(f"{self.files[0].path}: tensor {self.name} holds NaN or infinity: the file is damaged, get it again")
        if self.heads:  # Meta rotates the pairs (2i, 2i + 1), we rotate (i, i + hd/2)
            rest = out.shape[1:]
            out = out.view(self.heads, -1, 2, *rest).transpose(1, 2).reshape(out.shape)
        return out


def load_model(
    path: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32, vocab_size: int | None = None
) -> LLaMA:
    """Read a model without its tokenizer; `vocab_size` is the tokenizer's, for a params.json that leaves it open.

    Names and shapes of all tensors are checked before any is read; then they are read one by one, each straight to its
    device and dtype. Raises UserError for what does not fit, naming the tensor and both shapes.
    """
    path = Path(path)
    config, sources = _open_meta(path, vocab_size) if _is_meta(path) else _open_hf(path)
    with torch.device("meta"):
        model = LLaMA(config)
    parameters = dict(model.named_parameters())  # a tied output layer is listed once
    missing = [name for name in parameters if name not in sources]
    if missing:
        shape = list(parameters[missing[0]].shape)
        shown = missing[0] if _is_meta(path) else hf_name(missing[0])
        raise UserError(f"{path}: tensor {shown} {shape} is missing from its weights")
    for name, source in sources.items():
        if name not in parameters:
            raise UserError(f"{source.files[0].path}: unexpected tensor {source.name} {list(source.shape)}")
        expected = tuple(parameters[name].shape)
        if source.shape != expected:
            raise UserError(
                f"{source.files[0].path}: tensor {source.name} has shape {list(source.shape)}, expected {list(expected)}"
            )
    state = {}
    total = sum(p.numel() for p in parameters.values()) * dtype.itemsize
    with tqdm(total=total, unit="B", unit_scale=True, delay=2, disable=None, leave=False, desc=f"loading {path.name}") as bar:
        for name in parameters:
            state[name] = sources[name].read(device, dtype)
            bar.update(state[name].nbytes)
    model.load_state_dict(state, assign=True, strict=not config.tie_embeddings)
    model.tie()
    return model.requires_grad_(False).eval()


def load(path: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> tuple[LLaMA, Tokenizer]:
    """Read a checkpoint folder, in the layout of Hugging Face or of Meta, and its sentencepiece tokenizer."""
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"{path}: no such folder; expected one with a checkpoint and its tokenizer.model")
    config_file = path / ("params.json" if _is_meta(path) else "config.json")
    said = read_json(config_file).get("vocab_size", -1)  # before the tokenizer: without it this is no checkpoint at all
    tokenizer = Tokenizer(find_tokenizer(path))
    # Some checkpoints have a few embeddings more than the tokenizer has pieces, for tokens added later or to a round number.
    if isinstance(said, int) and said != -1 and not 0 <= said - tokenizer.vocab_size < 1024:
        raise UserError(f"{config_file} says {said} tokens, tokenizer.model has {tokenizer.vocab_size}: they are not a pair")
    return load_model(path, device=device, dtype=dtype, vocab_size=tokenizer.vocab_size), tokenizer


def find_tokenizer(path: Path) -> Path:
    """tokenizer.model of a checkpoint; where Meta's layout was unpacked as it came, it is in the folder above."""
    places = [path / "tokenizer.model"] + ([path.parent / "tokenizer.model"] if _is_meta(path) else [])
    for file in places:
        if file.is_file():
            return file
    if (path / "tokenizer.json").exists():
        raise UserError(f"{path}: it has a tokenizer.json only; add the sentencepiece tokenizer.model that goes with it")
    raise UserError(f"{places[0]}: no such file; expected the sentencepiece model of the checkpoint")


def _is_meta(path: Path) -> bool:
    """Where both are there, as Mistral ships them, the Hugging Face layout is taken."""
    return (path / "params.json").exists() and not (path / "config.json").exists()


class Fields:
    """A JSON object whose values are checked as they are taken."""

    def __init__(self, path: Path):
        self.path, self.values = path, read_json(path)

    def get(self, key: str, default=None):
        value = self.values.get(key)
        return default if value is None else value

    def number(self, key: str, default=None, kind: type = int):
        """A positive number."""
        value = self.get(key, default)
        if value is None:
            raise UserError(f"{self.path}: the key {key!r} is missing")
        if isinstance(value, bool) or not isinstance(value, kind if kind is int else (int, float)) or not 0 < value < 2**40:
            raise UserError(f"{self.path}: {key} is {value!r}, expected a positive {kind.__name__}")
        return kind(value)

    def flag(self, key: str) -> bool:
        value = self.get(key, False)
        if not isinstance(value, bool):
            raise UserError(f"{self.path}: {key} is {value!r}, expected true or false")
        return value

    def heads(self, dim: int, heads: str, kv_heads: str) -> tuple[int, int, int]:
        """(query heads, key/value heads, width of a head)."""
        h = self.number(heads)
        k = self.number(kv_heads, h)
        if h % k:
            raise UserError(f"{self.path}: {h} attention heads cannot share {k} key/value heads evenly")
        if self.get("head_dim") is None and dim % h:
            raise UserError(f"{self.path}: a width of {dim} is not divisible by {h} attention heads")
        hd = self.number("head_dim", dim // h)
        if hd % 2:
            raise UserError(f"{self.path}: heads are {hd} wide, expected an even number")
        return h, k, hd

    def layers(self, key: str) -> int:
        n = self.number(key)
        if n > 1000:  # they are built before the weights are looked at
            raise UserError(f"{self.path}: {key} is {n}, expected at most 1000")
        return n


def config_from_hf(path: Path) -> ModelConfig:
    """Read a Hugging Face config.json (of transformers 4 or 5); refuse what this model cannot run."""
    c = Fields(path)
    found = c.get("architectures") or [c.get("model_type")]
    if found not in (["LlamaForCausalLM"], ["llama"], ["MistralForCausalLM"], ["mistral"]):
        raise UserError(f"{path}: architecture {found[0] if isinstance(found, list) else found}, expected LlamaForCausalLM")
    if c.get("hidden_act", "silu") != "silu":
        raise UserError(f"{path}: hidden_act is {c.get('hidden_act')!r}, expected 'silu'")
    if c.get("quantization_config"):
        raise UserError(f"{path}: the weights are quantized, expected bf16, fp16 or fp32 ones")
    dim = c.number("hidden_size")
    n_heads, n_kv_heads, head_dim = c.heads(dim, "num_attention_heads", "num_key_value_heads")
    max_seq_len = c.number("max_position_embeddings", 2048)
    if c.get("sliding_window") is not None:  # attention would have to forget beyond it: no context may be longer
        max_seq_len = min(max_seq_len, c.number("sliding_window"))
    theta, scaling = _rope_from_hf(c)
    return ModelConfig(
        vocab_size=c.number("vocab_size"),
        dim=dim,
        n_layers=c.layers("num_hidden_layers"),
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        hidden_dim=c.number("intermediate_size"),
        norm_eps=c.number("rms_norm_eps", 1e-6, float),
        rope_theta=theta,
        max_seq_len=max_seq_len,
        tie_embeddings=c.flag("tie_word_embeddings"),
        attention_bias=c.flag("attention_bias"),
        mlp_bias=c.flag("mlp_bias"),
        rope_scaling=scaling,
    )


def _rope_from_hf(c: Fields) -> tuple[float, RopeScaling | None]:
    """Version 4 has rope_theta and rope_scaling; version 5 has both in rope_parameters."""
    rope = c.get("rope_parameters") or c.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise UserError(f"{c.path}: rope parameters are {rope!r}, expected an object")
    kind = rope.get("rope_type", rope.get("type", "default"))
    fields = Fields.__new__(Fields)
    fields.path, fields.values = c.path, {"rope_theta": c.get("rope_theta"), **rope}
    theta = fields.number("rope_theta", 10_000.0, float)
    if kind == "default":
        return theta, None
    if kind == "linear":
        return theta, RopeScaling(kind, fields.number("factor", kind=float))
    if kind == "llama3":
        low, high = fields.number("low_freq_factor", kind=float), fields.number("high_freq_factor", kind=float)
        if low >= high:
            raise UserError(f"{c.path}: low_freq_factor {low} is not below high_freq_factor {high}")
        original = fields.number("original_max_position_embeddings")
        return theta, RopeScaling(kind, fields.number("factor", kind=float), low, high, original)
    raise UserError(f"{c.path}: rope scaling {kind!r} is not supported, expected default, linear or llama3")


def _open_hf(path: Path) -> tuple[ModelConfig, dict[str, Source]]:
    """Configuration, and our parameter names with where to read them."""
    config = config_from_hf(path / "config.json")
    ours = {hf_name(name): name for name in _parameter_names(config)}
    sources = {}
    for file, name in _hf_tensors(path):
        if name.endswith("rotary_emb.inv_freq") or (config.tie_embeddings and name == "lm_head.weight"):
            continue
        sources[ours.get(name, name)] = Source([file], name)
    return config, sources


def _hf_tensors(path: Path) -> Iterator[tuple[WeightFile, str]]:
    """(file, tensor) of all weights: of one file, or of the shards that an index names."""
    for single in ("model.safetensors", "pytorch_model.bin"):
        index = path / f"{single}.index.json"
        if index.exists():
            break
        if (path / single).exists():
            file = WeightFile(path / single)
            yield from ((file, name) for name in file.shapes)
            return
    else:
        raise UserError(f"{path}: no weights; expected model.safetensors, or shards with model.safetensors.index.json")
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not where:
        raise UserError(f"{index}: no weight_map, expected one from tensor to file")
    suffix = Path(single).suffix
    for file in dict.fromkeys(where.values()):
        # A plain name: an index must not reach out of its folder. (Links are fine: the hub's cache consists of them.)
        if not isinstance(file, str) or "\\" in file or Path(file).name != file or not file.endswith(suffix):
            raise UserError(f"{index}: the file {file!r}, expected the plain name of a {suffix} file in the same folder")
        if not (path / file).is_file():
            raise UserError(f"{path / file}: no such file, though {index.name} names it; fetch the missing shard")
    files = {file: WeightFile(path / file) for file in dict.fromkeys(where.values())}
    for file, weights in files.items():
        for name in weights.shapes:
            if where.get(name) != file:
                raise UserError(f"{path / file}: it has tensor {name}, which {index.name} has in {where.get(name)}")
    for name, file in where.items():
        if name not in files[file].shapes:
            raise UserError(f"{path / file}: tensor {name} is missing, though {index.name} has it there")
        yield files[file], name


def _open_meta(path: Path, vocab_size: int | None) -> tuple[ModelConfig, dict[str, Source]]:
    """As `_open_hf`, for params.json and consolidated.*: shards are model-parallel parts of every tensor."""
    files = [WeightFile(f) for f in _meta_files(path)]
    config = config_from_meta(path / "params.json", vocab_size)
    sources = {}
    for name, shape in files[0].shapes.items():
        if name == "rope.freqs":
            continue
        for f in files[1:]:
            if name not in f.shapes:
                raise UserError(f"{f.path}: tensor {name} is missing, though {files[0].path.name} has its part of it")
        part = name.removesuffix(".weight").rpartition(".")[2]
        heads = {"wq": config.n_heads, "wk": config.n_kv_heads}.get(part, 0)
        if part.endswith("norm"):
            sources[name] = Source(files[:1], name)
        elif part in ("wo", "w2") or (
            part == "tok_embeddings" and shape[1:] != (config.dim,)
        ):  # LLaMA 1 and 2; Llama 3 splits rows
            sources[name] = Source(files, name, dim=1)
        else:
            sources[name] = Source(files, name, heads=heads)
    extra = [(f, n) for f in files[1:] for n in f.shapes if n not in files[0].shapes]
    if extra:
        raise UserError(f"{extra[0][0].path}: unexpected tensor {extra[0][1]}, which {files[0].path.name} does not have")
    return config, sources


def _meta_files(path: Path) -> list[Path]:
    if (path / "consolidated.safetensors").exists():
        return [path / "consolidated.safetensors"]
    for suffix in ("safetensors", "pth"):
        found = {int(f.name.split(".")[1]): f for f in path.glob(f"consolidated.[0-9][0-9].{suffix}")}
        if found:
            for i in range(max(found) + 1):
                if i not in found:
                    raise UserError(f"{path}/consolidated.{i:02}.{suffix}: missing, though there is {found[max(found)].name}")
            return [found[i] for i in sorted(found)]
    raise UserError(f"{path}: no weights; expected consolidated.safetensors, consolidated.NN.safetensors or .pth")


def config_from_meta(path: Path, vocab_size: int | None) -> ModelConfig:
    """Read a params.json. It does not say how long contexts were in training: 2048 with LLaMA 1, 4096 with 2, 8192 with 3."""
    c = Fields(path)
    dim = c.number("dim")
    n_heads, n_kv_heads, head_dim = c.heads(dim, "n_heads", "n_kv_heads")
    hidden = c.get("hidden_dim")
    if hidden is None:
        hidden = int(c.number("ffn_dim_multiplier", 1.0, float) * int(2 * 4 * dim / 3))
        multiple = c.number("multiple_of", 256)
        hidden = multiple * -(-hidden // multiple)
    else:
        hidden = c.number("hidden_dim")
    tokens = c.get("vocab_size", -1)
    if tokens == -1:
        if vocab_size is None:
            raise UserError(f"{path}: vocab_size is -1, to be taken from the tokenizer, which was not given")
        tokens = vocab_size
    else:
        tokens = c.number("vocab_size")
    theta, norm_eps = c.number("rope_theta", 10_000.0, float), c.number("norm_eps", 1e-5, float)
    scaling = None
    if c.flag("use_scaled_rope"):
        if c.get("rope_scaling_factor") is None:  # older files leave it to the code that goes with them
            raise UserError(f'{path}: use_scaled_rope without its factor; add "rope_scaling_factor": 8 (Llama 3.1), 32 (3.2)')
        scaling = RopeScaling("llama3", c.number("rope_scaling_factor", kind=float))
    guess = 8192 if theta >= 500_000 else 4096 if norm_eps > 1e-6 else 2048
    max_seq_len = c.number("max_seq_len", guess)
    if c.get("sliding_window") is not None:
        max_seq_len = min(max_seq_len, c.number("sliding_window"))
    return ModelConfig(
        vocab_size=tokens,
        dim=dim,
        n_layers=c.layers("n_layers"),
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        hidden_dim=hidden,
        norm_eps=norm_eps,
        rope_theta=theta,
        max_seq_len=max_seq_len,
        rope_scaling=scaling,
    )


def _parameter_names(config: ModelConfig) -> list[str]:
    with torch.device("meta"):
        return [name for name, _ in LLaMA(config).named_parameters()]


def config_to_hf(c: ModelConfig, tokenizer: Tokenizer, dtype: torch.dtype) -> dict:
    """A config.json that transformers 4 and 5 read."""
    scaling = None
    if c.rope_scaling:
        scaling = {"rope_type": c.rope_scaling.kind, "factor": c.rope_scaling.factor}
        if c.rope_scaling.kind == "llama3":
            scaling |= {
                "low_freq_factor": c.rope_scaling.low_freq_factor,
                "high_freq_factor": c.rope_scaling.high_freq_factor,
                "original_max_position_embeddings": c.rope_scaling.original_max_seq_len,
            }
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
        "rope_scaling": scaling,
        "max_position_embeddings": c.max_seq_len,
        "tie_word_embeddings": c.tie_embeddings,
        "attention_bias": c.attention_bias,
        "mlp_bias": c.mlp_bias,
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }


def save(model: LLaMA, tokenizer: Tokenizer, path: str | Path, *, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write a checkpoint folder in the Hugging Face layout, each file atomically."""
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    write_atomically(path / "tokenizer.model", lambda p: p.write_bytes(tokenizer.sp.serialized_model_proto()))
    state = {hf_name(n): p.detach().to("cpu", dtype).contiguous() for n, p in model.named_parameters()}
    write_atomically(path / "model.safetensors", lambda p: save_file(state, p, metadata={"format": "pt"}))
    tied = model.output.weight is model.tok_embeddings.weight  # no longer where an adapter of the output layer was merged
    # Last, as a folder that has it counts as complete.
    config = config_to_hf(replace(model.config, tie_embeddings=tied), tokenizer, dtype)
    write_atomically(path / "config.json", lambda p: p.write_text(json.dumps(config, indent=2) + "\n"))
