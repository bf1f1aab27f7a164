"""LoRA by hand (Hu et al. 2021): y = W x + (alpha / rank) B A dropout(x), with W frozen.

Linear layers are wrapped in place from outside, so that model.py knows nothing of it. Adapters are saved and loaded
in the file format of PEFT (adapter_config.json, adapter_model.safetensors).
"""

import contextlib
import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from model import HF_NAMES, LLaMA, Source, UserError, WeightFile, find_folder, hf_name, read_json, write_atomically

BLOCK_LAYERS = ("wq", "wk", "wv", "wo", "w1", "w2", "w3")
LAYERS = (*BLOCK_LAYERS, "output")  # what can be wrapped
PEFT_NAMES = {ours.rpartition(".")[2]: theirs.rpartition(".")[2] for ours, theirs in HF_NAMES.items() if ours.endswith(LAYERS)}


@dataclass
class LoRAConfig:
    rank: int
    alpha: float
    dropout: float = 0.0
    targets: tuple[str, ...] = LAYERS
    rslora: bool = False  # scale by alpha / sqrt(rank) instead of alpha / rank (Kalajdzievski 2023)

    def __post_init__(self):
        if self.rank < 1:
            raise UserError(f"LoRA rank {self.rank}: expected 1 or more")
        unknown = set(self.targets) - set(LAYERS)
        if unknown or not self.targets:
            raise UserError(f"LoRA targets {sorted(unknown) or 'empty'}: expected some of {', '.join(LAYERS)}")

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


class LoRALinear(nn.Module):
    """A linear layer [out, in] with a low-rank update: A [rank, in], B [out, rank]. B is zero at first, so nothing changes.

    A and B are fp32 whatever the dtype of the frozen weight: their updates would be lost in bf16.
    """

    def __init__(self, linear: nn.Linear, c: LoRAConfig):
        super().__init__()
        self.linear = linear
        self.dropout, self.scale = c.dropout, c.scale
        self.strength = 1.0  # in training the update may count for less, see `set_strength`
        device = linear.weight.device
        self.lora_A = nn.Parameter(torch.empty(c.rank, linear.in_features, device=device))
        self.lora_B = nn.Parameter(torch.zeros(linear.out_features, c.rank, device=device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        out, inside = self.linear.weight.shape
        if not self.dropout and out * inside <= 5 * len(self.lora_A) * (out + inside):
            # Of a small layer the whole weight costs no more than the detour by A and B, and is one product instead of three.
            with torch.autocast(x.device.type, enabled=False):
                weight = torch.addmm(self.linear.weight.float(), self.lora_B, self.lora_A, alpha=self.scale * self.strength)
            return F.linear(x, weight if torch.is_autocast_enabled(x.device.type) else weight.to(x.dtype), self.linear.bias)
        y = self.linear(x)
        if self.dropout:
            x = F.dropout(x, self.dropout, self.training)
        if not torch.is_autocast_enabled(x.device.type):  # which would see to the dtypes
            x = x.to(self.lora_A.dtype)
        return y + F.linear(F.linear(x, self.lora_A) * (self.scale * self.strength), self.lora_B).to(y.dtype)

    def to_linear(self) -> nn.Linear:
        """A plain layer with the update added to a copy of the weight: in fp32, then cast. The wrapped layer is untouched."""
        out, inside = self.linear.weight.shape
        merged = nn.Linear(inside, out, bias=False, device="meta")
        weight = self.linear.weight.float() + self.scale * self.lora_B @ self.lora_A
        merged.weight = nn.Parameter(weight.to(self.linear.weight.dtype).detach(), requires_grad=False)
        merged.bias = self.linear.bias
        return merged


def wrap(model: LLaMA, c: LoRAConfig) -> LLaMA:
    """Freeze the model and wrap the chosen layers, of every block and after them, in place. Only A and B are left trainable."""
    if lora_layers(model):
        raise ValueError("the model already has LoRA layers")
    model.requires_grad_(False)
    parts = [part for block in model.layers for part in (block.attention, block.feed_forward)]
    for part in (*parts, model):
        for name, layer in list(part.named_children()):
            if name in c.targets:
                setattr(part, name, LoRALinear(layer, c))
    return model


def lora_layers(model: LLaMA) -> dict[str, LoRALinear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


def set_strength(model: LLaMA, strength: float) -> None:
    """Multiply every update by this: 1 at evaluation. Neither saved nor merged."""
    for layer in lora_layers(model).values():
        layer.strength = strength


@contextlib.contextmanager
def disabled(model: LLaMA) -> Iterator[None]:
    """For a while no update counts, and the model is its base."""
    layers = lora_layers(model).values()
    strengths = [layer.strength for layer in layers]
    set_strength(model, 0.0)
    try:
        yield
    finally:
        for layer, strength in zip(layers, strengths, strict=True):
            layer.strength = strength


def merge(model: LLaMA) -> dict[str, LoRALinear]:
    """Replace each wrapped layer by its merged one, in place; returns what `unmerge` needs. With none left, does nothing."""
    wrapped = lora_layers(model)
    for name, layer in wrapped.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.to_linear())
    return wrapped


def unmerge(model: LLaMA, wrapped: dict[str, LoRALinear]) -> None:
    """Put the wrapped layers back: exact, as their weights were never touched (in bf16 subtracting would not be)."""
    for name, layer in wrapped.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)


def fingerprint(model: LLaMA) -> str:
    """Tells bases apart: a hash of one row of every frozen matrix, in bf16 so that it does not depend on the dtype loaded."""
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]  # wrapped or not, in the same order
    rows = [model.tok_embeddings.weight[-1], *(layer.weight[0] for layer in layers), model.norm.weight]
    digest = hashlib.sha256()
    for row in rows:
        digest.update(row.detach().to("cpu", torch.bfloat16).contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def lora_state(model: LLaMA) -> dict[str, Tensor]:
    """A and B of every wrapped layer, under PEFT's names."""
    state = {}
    for name, layer in lora_layers(model).items():
        for part in ("lora_A", "lora_B"):
            state[f"base_model.model.{hf_name(name)}.{part}.weight"] = getattr(layer, part)
    return state


def save_adapter(model: LLaMA, path: str | Path, c: LoRAConfig, base: str) -> None:
    """Write an adapter folder that PEFT can read. `base` is the path or name of the base, for adapter_config.json."""
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": c.rank,
        "lora_alpha": c.alpha,
        "lora_dropout": c.dropout,
        "target_modules": [PEFT_NAMES[t] for t in c.targets],
        "bias": "none",
        "use_rslora": c.rslora,
        "use_dora": False,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "modules_to_save": None,
    }
    state = {n: p.detach().to("cpu", copy=True).contiguous() for n, p in lora_state(model).items()}
    # One entry: safetensors writes several in no fixed order, and the same run should give the same file.
    metadata = {"base_fingerprint": fingerprint(model)}
    write_atomically(path / "adapter_model.safetensors", lambda p: save_file(state, p, metadata=metadata))
    write_atomically(path / "adapter_config.json", lambda p: p.write_text(json.dumps(config, indent=2) + "\n"))


def read_adapter_config(path: str | Path) -> tuple[LoRAConfig, str]:
    """(LoRA settings, base) of an adapter folder; refuses settings that this LoRA does not have."""
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"{path}: no such adapter folder; expected adapter_config.json and adapter_model.safetensors in it")
    file = path / "adapter_config.json"
    c = read_json(file)
    if c.get("peft_type") != "LORA":
        raise UserError(f"{file}: peft_type is {c.get('peft_type')!r}, expected 'LORA'")
    for key in (
        "use_dora",
        "fan_in_fan_out",
        "modules_to_save",
        "rank_pattern",
        "alpha_pattern",
        "layers_to_transform",
        "alora_invocation_tokens",
    ):
        if c.get(key):
            raise UserError(f"{file}: {key} is {c[key]!r}, which is not supported")
    start = str(c.get("init_lora_weights", True)).lower()
    if start.startswith(("pissa", "olora", "corda", "lora_ga", "loftq")):
        raise UserError(
            f"{file}: init_lora_weights is {start!r}, by which the base's own weights were changed; let PEFT save it as plain "
            "LoRA (save_pretrained with path_initial_model_for_weight_conversion)"
        )
    if c.get("bias", "none") != "none":
        raise UserError(f"{file}: bias is {c['bias']!r}, expected 'none'")
    if not (path / "adapter_model.safetensors").is_file():
        raise UserError(f"{path}/adapter_model.safetensors: no such file")
    for key, kind in (("r", int), ("lora_alpha", (int, float)), ("lora_dropout", (int, float))):
        if not isinstance(c.get(key, 0), kind) or isinstance(c.get(key), bool):
            raise UserError(f"{file}: {key} is {c[key]!r}, expected a number")
    ours = {theirs: name for name, theirs in PEFT_NAMES.items()}
    try:
        targets = c["target_modules"]
        if targets == "all-linear":  # all but the output layer, as in PEFT
            targets = [PEFT_NAMES[name] for name in BLOCK_LAYERS]
        if isinstance(targets, list):  # PEFT writes names of modules, or of each layer's: whether all are meant, the tensors say
            targets = [str(t).rpartition(".")[2] for t in targets]
        unknown = set(targets) - set(ours) if isinstance(targets, list) else {str(targets)}
        if unknown:
            raise UserError(f"{file}: target module {min(unknown)!r}, expected some of {', '.join(ours)}")
        names = tuple(name for name in LAYERS if PEFT_NAMES[name] in targets)
        config = LoRAConfig(c["r"], c["lora_alpha"], c.get("lora_dropout", 0.0), names, bool(c.get("use_rslora")))
        return config, c.get("base_model_name_or_path") or ""
    except KeyError as e:
        raise UserError(f"{file}: the key {e} is missing") from None


def load_adapter(model: LLaMA, path: str | Path) -> LoRAConfig:
    """Wrap the model and load an adapter folder. Strict: what does not fit is named, with both shapes."""
    c, _ = read_adapter_config(path)
    file = WeightFile(Path(path) / "adapter_model.safetensors")
    made_for = (file.file.metadata() or {}).get("base_fingerprint")
    wrap(model, c)
    parameters = lora_state(model)
    for name, parameter in parameters.items():
        if name not in file.shapes:
            raise UserError(f"{file.path}: tensor {name} {list(parameter.shape)} is missing")
        if file.shapes[name] != parameter.shape:
            raise UserError(
                f"{file.path}: tensor {name} has shape {list(file.shapes[name])}, the base needs {list(parameter.shape)}"
            )
    # PEFT saves the frozen weight too where the output layer is wrapped.
    layers = lora_layers(model).items()
    frozen = {f"base_model.model.{hf_name(name)}.base_layer.weight": layer.linear.weight for name, layer in layers}
    for name in file.shapes.keys() & frozen.keys():
        weight = frozen[name]
        if file.shapes[name] != weight.shape or not torch.equal(Source([file], name).read(weight.device, weight.dtype), weight):
            raise UserError(f"{file.path}: tensor {name} is not the base's; only adapters of an unchanged base are supported")
    unexpected = sorted(file.shapes.keys() - parameters.keys() - frozen.keys())
    if unexpected:
        raise UserError(f"{file.path}: unexpected tensor {unexpected[0]} {list(file.shapes[unexpected[0]])}")
    if made_for and made_for != fingerprint(model):
        raise UserError(
            f"{path}: this adapter was trained on another base (fingerprint {made_for}, this one's is {fingerprint(model)}); "
            "name its own with --base"
        )
    for name, parameter in parameters.items():
        parameter.data.copy_(Source([file], name).read(parameter.device, parameter.dtype))
    return c


# --- where adapters are ------------------------------------------------------------------------------------------


def numbered(out: Path, name: str) -> dict[int, Path]:
    """Run folders of this name in the order of their making: 1 is <out>/name, 2 is <out>/name-2, ..."""
    found = {}
    for folder in out.glob(f"{name}*"):
        _, dash, number = folder.name.removeprefix(name).partition("-")
        if folder.is_dir() and (folder.name == name or (dash and number.isdigit() and folder.name == f"{name}-{number}")):
            found[int(number or 1)] = folder
    return dict(sorted(found.items()))


def find_adapter(task: str, method: str, runs: Path = Path("runs"), base: Path = Path("checkpoints/tiny")) -> Path:
    """The newest finished adapter of a task and method under `runs`, else the one that ships with the base."""
    for folder in reversed(numbered(runs, f"{task}-{method}").values()):
        if (folder / "adapter_config.json").exists():
            return folder
    shipped = find_folder(base / "adapters" / f"{task}-{method}")
    if not shipped.is_dir():
        raise UserError(
            f"no adapter for {task} by {method}, neither {runs}/{task}-{method} nor {shipped}; "
            f"make one: python train.py --task {task} --method {method}"
        )
    return shipped
