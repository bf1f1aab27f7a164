"""Train the shipped base, or adapters of it by several seeds at once, on one GPU: the steps of train.py at a GPU's pace.

    python benchmarks/gpu.py base --preset base6 --base runs/primer-5 --out runs/primer-6
    python benchmarks/gpu.py adapters --task dp --seeds 0 1 2 --out runs

A step of so small a model is a few thousand small kernels, and a GPU would wait for Python to start each. Here a step is captured
once as a CUDA graph, and played again with other contexts in the same places. That needs shapes that never change: the contexts
of a step, drawn as in train.py, are packed by worker processes into a fixed number of tokens and of targets; a few that have no
room are left out. Adapters of several seeds go through in one pass, each with its own contexts and its own part of every product.
Elsewhere than on a GPU the same steps are done one by one, for tests. Runs are not resumed: they take minutes. A base is saved on
the way.
"""

import itertools
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import lora
import model as llama
import train
from train import IGNORE, Example, TrainConfig

PAD = 512  # the longest stretch of padding: it is attended to like a context


@dataclass
class Base:
    """Train all parameters on the primer, as `train.py --preset`."""

    preset: Literal["base4", "base5", "base6", "base7"] = "base7"
    base: Path | None = None
    """what to start from (default: the preset's)"""
    out: Path | None = None
    """(default: runs/primer-N, where N is the preset's number)"""
    steps: int | None = None
    """(default: the preset's)"""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    workers: int = 14


@dataclass
class Adapters:
    """Train adapters of one task and method, one for each seed, as `train.py --task --method --seed`."""

    task: Literal[tuple(train.TASKS)] = "dp"
    method: Literal["baseline", "scratchpad", "retuning"] = "retuning"
    seeds: tuple[int, ...] = (0, 1, 2)
    base: Path = Path("checkpoints/tiny")
    out: Path = Path("runs")
    """<out>/<task>-<method> for seed 0, <out>/seed1/<task>-<method> for seed 1, ..."""
    steps: int | None = None
    batch_size: int | None = None
    weaken: float | None = None
    temperature: float | None = None
    lessons: float | None = None
    replay: float | None = None
    targets: tuple[str, ...] | None = None
    lr: float | None = None
    device: Literal["auto", "cuda", "cpu"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    workers: int = 4


# --- contexts in fixed places ------------------------------------------------------------------------------------


@dataclass
class Shape:
    """How much a step of one run has room for."""

    tokens: int
    targets: int
    contexts: int  # and stretches of padding

    @staticmethod
    def of(data: train.Data, share: float = 0.95) -> "Shape":
        """Room for all contexts of so many of the first steps, and for most of the others'."""
        steps = [data[step] for step in range(20)]
        tokens = np.quantile([sum(len(e.tokens) for e in examples) for examples in steps], share)
        targets = np.quantile([train.n_targets(examples) for examples in steps], share)
        tokens, targets = llama.round_up(int(tokens), PAD), llama.round_up(int(targets), 256)
        return Shape(tokens, targets, data.c.batch_size + tokens // PAD + 1)


def packed(examples: list[Example], shape: Shape) -> dict[str, np.ndarray]:
    """Contexts one after another, in the order they were drawn, as far as there is room for them.

    tokens, positions [tokens], of lessons `meaning`, its `share` of the embeddings, and the weights of states that are to be
    `alike` too; targets [targets], `places` where they are predicted, and their `weights`; lengths [contexts], in all tokens.
    """
    out = {
        "tokens": np.zeros(shape.tokens, np.int64), "positions": np.zeros(shape.tokens, np.float32),
        "targets": np.full(shape.targets, IGNORE, np.int64), "places": np.zeros(shape.targets, np.int64),
        "meaning": np.zeros(shape.tokens, np.int64), "share": np.zeros(shape.tokens, np.float32),
        "alike": np.zeros(shape.tokens, np.float32),
        "weights": np.zeros(shape.targets, np.float32),
    }  # fmt: skip
    n = m = 0
    lengths = []
    for e in examples:
        labels = np.array(e.labels)
        places = np.flatnonzero(labels != IGNORE)
        if n + len(labels) > shape.tokens or m + len(places) > shape.targets:
            continue
        out["tokens"][n : n + len(labels)], out["positions"][n : n + len(labels)] = e.tokens, e.positions
        out["meaning"][n : n + len(labels)], out["share"][n : n + len(labels)] = e.meaning or e.tokens, e.share
        out["alike"][n : n + len(labels)] = e.alike or 0.0
        out["weights"][m : m + len(places)] = e.weight
        out["targets"][m : m + len(places)], out["places"][m : m + len(places)] = labels[places], places + n
        n, m = n + len(labels), m + len(places)
        lengths.append(len(labels))
    while n < shape.tokens:
        lengths.append(min(PAD, shape.tokens - n))
        n += lengths[-1]
    return out | {
        "lengths": np.array(lengths + [0] * (shape.contexts - len(lengths))),
        "weight": out["weights"].sum(keepdims=True),
    }


class Steps:
    """The steps of several runs, those of a step one after another. `strength` is that of each run's update, see train.py."""

    def __init__(self, runs: list[train.Data], shape: Shape):
        self.runs, self.shape = runs, shape

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        parts = [packed(run[step], self.shape) for run in self.runs]
        for i, part in enumerate(parts):
            part["places"] += i * self.shape.tokens
        joined = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
        ends = np.cumsum(np.insert(joined.pop("lengths"), 0, 0), dtype=np.int32)
        if not self.runs[0].c.lessons:
            del joined["meaning"], joined["share"], joined["alike"]
        strengths = [train.strength(run.c, step) for run in self.runs]
        return {k: torch.from_numpy(v) for k, v in joined.items()} | {
            "ends": torch.from_numpy(ends),
            "strength": torch.tensor(strengths),
        }


# --- the model on them -------------------------------------------------------------------------------------------


class Attend:
    """Attention within contexts: q [N, H, hd], k and v [N, K, hd] -> [N, H, hd]; `ends` [contexts + 1] is where each begins."""

    def __init__(self, ends: Tensor, longest: int):
        self.ends, self.longest = ends, longest

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if not q.is_cuda:
            spans = [slice(a, b) for a, b in itertools.pairwise(self.ends.tolist()) if a < b]
            return torch.cat([llama.attend_rows(q[s][None], k[s][None], v[s][None])[0] for s in spans])
        heads = q.shape[1] // k.shape[1]
        q, k, v = (x.to(torch.bfloat16).contiguous() for x in (q, k.repeat_interleave(heads, 1), v.repeat_interleave(heads, 1)))
        ends, longest = self.ends, self.longest
        return torch.ops.aten._flash_attention_forward(q, k, v, ends, ends, longest, longest, 0.0, True, False)[0]


class Embed(torch.autograd.Function):
    """Rows of a matrix. The gradient is one product: that of an embedding sorts the tokens, which a graph may not be able to."""

    @staticmethod
    def forward(ctx, tokens: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(tokens)
        ctx.rows = len(weight)
        return weight[tokens]

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[None, Tensor]:
        (tokens,) = ctx.saved_tensors
        with torch.autocast(gradient.device.type, enabled=False):
            return None, (tokens == torch.arange(ctx.rows, device=tokens.device)[:, None]).to(gradient.dtype) @ gradient


def through(model: llama.LLaMA, x: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Embeddings [tokens, D] -> logits at the places of the targets, and the states on the way, as `train.states` has them."""
    cos, sin = llama.rotary_angles(batch["positions"], model.config)
    attend = Attend(batch["ends"], model.config.max_seq_len)
    with train.states(model) as states:
        for layer in model.layers:
            x = layer(x, cos, sin, attend, (batch["places"],) if layer is model.layers[-1] else None)
    return model.output(model.norm(x)).float(), states


def losses(model: llama.LLaMA, batch: dict[str, Tensor], dtype: torch.dtype, temperature: Tensor | float = 1.0) -> Tensor:
    """[runs]: weighted mean of the cross-entropy (nats) of logits / temperature over the targets of each; and lessons."""
    runs = len(batch["weight"])
    weight = model.tok_embeddings.weight
    # Casts of weights that are kept for a second use would outlive the step that they belong to.
    with torch.autocast(model.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16, cache_enabled=False):
        x = Embed.apply(batch["tokens"], weight) if weight.requires_grad else weight[batch["tokens"]]
        if "meaning" in batch:
            x = x.lerp(weight[batch["meaning"]], batch["share"][:, None])
        logits, own = through(model, x, batch)
        if "meaning" in batch:
            set_strength(model, torch.zeros_like(batch["strength"]))
            with torch.no_grad():
                _, understood = through(model, weight[batch["meaning"]], batch)
            set_strength(model, batch["strength"])
    loss = F.cross_entropy(logits / temperature, batch["targets"], reduction="none") * batch["weights"]
    loss = loss.view(runs, -1).sum(1)
    if "meaning" in batch:
        loss = loss + (train.unlikeness(own, understood) * batch["alike"]).view(runs, -1).sum(1)
    return loss / batch["weight"]


def set_strength(model: llama.LLaMA, strength: Tensor) -> None:
    for layer in model.modules():
        if isinstance(layer, ManyLoRA):
            layer.strength = strength


class ManyLoRA(nn.Module):
    """A linear layer [out, in] with an update for each run: A [runs, rank, in], B [runs, out, rank]; x [runs * n, in]."""

    def __init__(self, layers: list[lora.LoRALinear]):
        super().__init__()
        if layers[0].linear.bias is not None:
            raise llama.UserError("a base with biases is not for this script; train.py takes it")
        self.register_buffer("weight", layers[0].linear.weight.detach())
        self.scale = layers[0].scale
        self.A = nn.Parameter(torch.stack([layer.lora_A.detach() for layer in layers]))
        self.B = nn.Parameter(torch.stack([layer.lora_B.detach() for layer in layers]))
        self.strength: Tensor | None = None  # [runs]

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            weights = self.weight + self.scale * (self.B * self.strength[:, None, None]) @ self.A
        return (x.unflatten(0, (len(weights), -1)) @ weights.mT).flatten(0, 1)


class Muon:
    """train.Muon with a learning rate on the device, which a captured step can be given another of."""

    def __init__(self, params: list[nn.Parameter], lr: Tensor, weight_decay: float, dtype: torch.dtype, momentum: float = 0.95):
        self.lr, self.weight_decay, self.dtype, self.momentum = lr, weight_decay, dtype, momentum
        shapes = {p.shape: [q for q in params if q.shape == p.shape] for p in params}
        self.groups = [(max(shape), same, torch.zeros(len(same), *shape, device=lr.device)) for shape, same in shapes.items()]

    @torch.no_grad()
    def step(self) -> None:
        for longest, params, mean in self.groups:
            gradient = torch.stack([p.grad for p in params])
            mean.lerp_(gradient, 1 - self.momentum)
            update = train.Muon.orthogonalize(gradient.lerp(mean, self.momentum).to(self.dtype)).float()
            update *= self.lr * (-0.2 * longest**0.5)
            for p, u in zip(params, update, strict=True):
                p.mul_(1 - self.lr * self.weight_decay).add_(u)


# --- the loop ----------------------------------------------------------------------------------------------------


def warm_up(step: Callable[[dict[str, Tensor]], None], batch: dict[str, Tensor], state: Callable[[], list[Tensor]]) -> None:
    """Three steps in which libraries choose their kernels. Then `state` is as before, and zero where it was not there before."""
    before = {x.data_ptr(): x.clone() for x in state()}
    for _ in range(3):
        step(batch)
    for x in state():
        if x.data_ptr() in before:
            x.copy_(before[x.data_ptr()])
        else:  # moments of the gradient, and how many steps they are of
            x.zero_()


def captured(step: Callable[[dict[str, Tensor]], None], batch: dict[str, Tensor], state: Callable[[], list[Tensor]]) -> Callable:
    """A step to be played as a graph, of another batch copied to where the first was. Nothing in `state` is changed by this."""
    if batch["tokens"].device.type != "cuda":
        warm_up(step, batch, state)
        return step
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # what comes into being here must not be of the graph
        warm_up(step, batch, state)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(batch)

    def play(new: dict[str, Tensor]) -> None:
        for key, value in new.items():
            batch[key].copy_(value, non_blocking=True)
        graph.replay()

    return play


def loop(
    c: TrainConfig,
    model: llama.LLaMA,
    runs: list[train.Data],
    params: list[Tensor],
    opts: list,
    lr: Tensor,
    clip: Callable[[], None],
    workers: int,
    save: Callable[[], None] = lambda: None,
) -> list[float]:
    """`c.steps` steps; every `c.save_every` of them it saves. Returns the mean loss of each run over the last tenth."""
    device, dtype = model.device, getattr(torch, c.dtype)
    steps = Steps(runs, Shape.of(runs[0]))
    total = torch.zeros(len(runs), device=device)
    heat = torch.ones((), device=device)

    def step(batch: dict[str, Tensor]) -> None:
        for p in params:
            p.grad = None
        set_strength(model, batch["strength"])
        loss = losses(model, batch, dtype, heat)
        loss.sum().backward()
        total.add_(loss.detach())
        clip()
        for optimizer in opts:
            optimizer.step()

    def state() -> list[Tensor]:
        moments = [
            x for o in opts if isinstance(o, torch.optim.Optimizer) for values in o.state.values() for x in values.values()
        ]
        return [
            *(p.data for p in params),
            *moments,
            *(mean for o in opts if isinstance(o, Muon) for _, _, mean in o.groups),
            total,
        ]

    play = captured(step, {key: x.to(device) for key, x in steps[0].items()}, state)
    cuda = device.type == "cuda"
    batches = DataLoader(
        steps,
        batch_size=None,
        sampler=range(c.steps),
        num_workers=workers,
        pin_memory=cuda,
        prefetch_factor=8 if workers else None,
    )
    bar, last = tqdm(batches, unit="step", mininterval=1.0), max(1, c.steps // 10)
    for i, batch in enumerate(bar):
        if i == c.steps - last:
            total.zero_()
        lr.fill_(train.learning_rate(c, i))
        heat.fill_(train.temperature(c, i))
        play(batch if cuda else {key: x.to(device) for key, x in batch.items()})
        if i % 100 == 99:
            worst = (total / (i + 1 if i < c.steps - last else i + 1 - (c.steps - last))).max().item()
            if not np.isfinite(worst):
                raise llama.UserError(f"step {i}: the loss is not finite; try a smaller learning rate than {c.lr}")
            bar.set_postfix(loss=f"{worst:.5f}")
        if i + 1 < c.steps and (i + 1) % c.save_every == 0:
            save()
    return (total / last).tolist()


def adamw(params: list[Tensor], lr: Tensor, betas: tuple[float, float]) -> torch.optim.AdamW:
    kernels = dict(fused=True, capturable=True) if lr.is_cuda else dict(foreach=False)
    return torch.optim.AdamW(params, lr=lr, betas=betas, weight_decay=0.0, **kernels)


def check(t: TrainConfig, device: torch.device) -> None:
    """Refuse settings that no run could have, or none of this script's."""
    train.check(t)
    if device.type == "cuda" and t.dtype != "bfloat16":
        raise llama.UserError(f"--dtype {t.dtype}: attention is in bf16 here; train.py trains in {t.dtype}")


def train_base(c: Base) -> None:
    device = llama.pick_device(c.device)
    out = c.out or Path(f"runs/primer-{c.preset.removeprefix('base')}")
    preset = train.PRESETS[c.preset] | {"preset": c.preset, "device": device.type}
    preset |= {"dtype": str(llama.pick_dtype(c.dtype, device)).removeprefix("torch.")}
    preset |= {key: value for key, value in (("base", c.base), ("steps", c.steps)) if value is not None}
    t = train.complete(TrainConfig(**preset))
    check(t, device)
    if out.resolve() == t.base.resolve():
        raise llama.UserError(f"{out}: the base to start from would be overwritten; give another --out")
    model, tokenizer = train.build(t)
    data = train.Data(t, tokenizer, model.config.max_seq_len)
    matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and "layers." in name]
    others = [p for name, p in model.named_parameters() if not (p.dim() == 2 and "layers." in name)]
    lr = torch.zeros((), device=device)
    opts = [Muon(matrices, lr, t.weight_decay, getattr(torch, t.dtype)), adamw(others, lr, (0.9, 0.98))]
    params = [*matrices, *others]

    def clip() -> None:
        torch.nn.utils.clip_grad_norm_(params, t.clip, foreach=True)

    def save() -> None:
        llama.save(model, tokenizer, out)

    loop(t, model, [data], params, opts, lr, clip, c.workers, save)
    save()
    loss = train.evaluate(model, data.validation(), getattr(torch, t.dtype), 8192)
    print(f"validation loss {loss:.5f} nats per target token\nwritten: {out}")


def train_adapters(c: Adapters) -> None:
    device = llama.pick_device(c.device)
    names = ("steps", "batch_size", "weaken", "temperature", "lessons", "replay", "targets", "lr")
    given = {name: getattr(c, name) for name in names}
    extra = {key: value for key, value in given.items() if value is not None}  # the others as train.py would have them
    dtype = str(llama.pick_dtype(c.dtype, device)).removeprefix("torch.")
    settings = [
        train.complete(
            TrainConfig(task=c.task, method=c.method, seed=seed, base=c.base, device=device.type, dtype=dtype, **extra)
        )
        for seed in c.seeds
    ]
    t = settings[0]
    folders = [(c.out / f"seed{s.seed}" if s.seed else c.out) / f"{c.task}-{c.method}" for s in settings]
    for s, folder in zip(settings, folders, strict=True):
        check(s, device)
        if folder.exists():
            raise llama.UserError(f"{folder}: there is a run already; give another --out")
    models = []
    for s in settings:
        model, tokenizer = train.build(s)
        models.append(model)
    runs = [train.Data(s, tokenizer, model.config.max_seq_len) for s in settings]
    layers = [lora.lora_layers(model) for model in models]
    model = models[0]
    many = {name: ManyLoRA([of_run[name] for of_run in layers]) for name in layers[0]}
    for name, layer in many.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)
    params = [p for layer in many.values() for p in (layer.A, layer.B)]
    lr = torch.zeros((), device=device)

    @torch.no_grad()
    def clip() -> None:  # the gradient of each run by itself
        norms = torch.stack([p.grad.flatten(1).square().sum(1) for p in params]).sum(0).sqrt()
        for p in params:
            p.grad.mul_((t.clip / (norms + 1e-6)).clamp(max=1.0)[:, None, None])

    final = loop(t, model, runs, params, [adamw(params, lr, (0.9, t.beta2))], lr, clip, c.workers)
    for i, (s, of_run, folder) in enumerate(zip(settings, layers, folders, strict=True)):
        with torch.no_grad():
            for name, layer in of_run.items():
                layer.lora_A.copy_(many[name].A[i])
                layer.lora_B.copy_(many[name].B[i])
        for name, layer in of_run.items():  # in the first run's model too
            parent, _, child = name.rpartition(".")
            setattr(models[i].get_submodule(parent), child, layer)
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(asdict(s), indent=2, default=str) + "\n"
        llama.write_atomically(folder / "train_config.json", lambda path, text=text: path.write_text(text))
        lora.save_adapter(models[i], folder, train.lora_config(s), base=str(c.base))
        print(f"loss {final[i]:.5f} over the last tenth\nwritten: {folder}")


def main() -> None:
    c = tyro.cli(Annotated[Base, tyro.conf.subcommand("base")] | Annotated[Adapters, tyro.conf.subcommand("adapters")])
    began = time.monotonic()
    train_base(c) if isinstance(c, Base) else train_adapters(c)
    print(f"{time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    llama.run_script(main)
