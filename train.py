"""Fine-tune a LLaMA with LoRA on one task by one method; or train all of its parameters, as the shipped base was (--full).

    python train.py --task addition --method retuning
    torchrun --nproc-per-node 2 -- train.py --task addition     # on two devices: the same batch, half of it each

In the order of the pipeline: the configuration, examples (contexts as token ids and labels), batches, the loss, the
optimizer, the loop. A run leaves in runs/<task>-<method>/ the adapter, train_config.json and metrics.jsonl.
"""

import contextlib
import gc
import json
import math
import pickle
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Literal

import sentencepiece
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

import lora
import model as llama
from model import LLaMA, ModelConfig, Tokenizer, UserError
from recurse import Decoder, Engine, Limits, bounds
from tasks import TASKS, Context, Primer, tokenizer_corpus

try:
    import fcntl
except ImportError:  # not on Windows: runs are not locked there
    fcntl = None

IGNORE = -100  # the label where nothing is to be predicted

# The shape of a base from scratch, that of the shipped one: 3.7 million parameters.
TINY = dict(dim=192, n_layers=8, n_heads=4, n_kv_heads=2, head_dim=64, hidden_dim=512, max_seq_len=4096)


@dataclass
class TrainConfig:
    """Train an adapter (or, with --full, a whole model) on one task by one method."""

    task: Literal[(*TASKS, "primer")] = "addition"
    """what to learn; the primer is what the shipped base was trained on"""
    method: Literal["baseline", "scratchpad", "retuning"] = "retuning"
    preset: Literal["tiny", "paper", "base", "base2", "base3", "base4", "base5", "base6", "base7"] = "tiny"
    """defaults for: an adapter of the shipped base; one of a 7B or 13B LLaMA, as in the release; the shipped base itself, from
    scratch, and the six further parts of its training"""
    base: Path = Path("checkpoints/tiny")
    """folder of the base model (config.json, model.safetensors, tokenizer.model)"""
    out: Path = Path("runs")
    """where the run's folder goes: <out>/<task>-<method>, or -2, -3, ... where that exists"""
    resume: bool = False
    """go on with the newest unfinished run of this task and method"""
    seed: int = 0

    full: bool = False
    """train all parameters instead of an adapter"""
    from_scratch: bool = False
    """with --full: start from random weights of a small shape (TINY), and a tokenizer of our own"""
    rank: int = 32
    alpha: float = 32.0
    dropout: float = 0.0
    targets: tuple[str, ...] | None = None
    """linear layers that get an adapter, by Meta's names (default: TASK_DEFAULTS)"""

    steps: int | None = None
    """optimizer steps (default: TASK_DEFAULTS)"""
    batch_size: int | None = None
    """contexts per step (default: TASK_DEFAULTS)"""
    micro_tokens: int = 4096
    """tokens per forward pass, or one context; a step takes as many passes as it needs"""
    lr: float = 3e-3
    """peak learning rate: reached after `warmup` steps, falling linearly to 0 over the last `decay` of the run"""
    warmup: int = 20
    decay: float = 0.7
    beta2: float = 0.99
    """AdamW's decay of the mean of squared gradients, for an adapter"""
    weight_decay: float = 0.0
    clip: float = 1.0
    """largest norm of the gradient"""
    gradient_checkpointing: bool = False
    """recompute each block in the backward pass: less memory, a third more time"""
    fsdp: bool = False
    """with torchrun: share the model out over the devices, block by block, where one does not hold all of it (FSDP2)"""

    stretch: float = 8.0
    """up to which factor positions are stretched in training (1: not at all), see `stretch`"""
    stretched: float = 0.6
    """share of the contexts that are"""
    weaken: float | None = None
    """in each step an adapter's update counts for a random share, from 1 - weaken to 1, so that what it does is done by a margin
    (default: TASK_DEFAULTS)"""
    temperature: float | None = None
    """at the end of the run, from 1 at its start: the loss is of logits divided by it, so that it falls on until what is right is
    ahead by so much wider a margin, and this is the loss that is shown and logged (default: TASK_DEFAULTS)"""
    lessons: float | None = None
    """share of the contexts that teach what a phrase means, for tasks that have such (default: TASK_DEFAULTS; re-tuning only)"""
    taught: float = 0.25
    """share of the run by the end of which these are read as they stand, all but a few, see `Data.lesson`"""
    words: float | None = None
    """share of the other contexts, in the last eighth of the run, whose words alone are to be learned, for tasks that have such,
    see `Data.words` (default: TASK_DEFAULTS; re-tuning only)"""
    replay: float | None = None
    """share of primer contexts among the other examples, so that what the base can do at greater lengths is kept (default:
    TASK_DEFAULTS)"""

    save_every: int = 100
    """steps between checkpoints"""
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """of matrix products (autocast); trained parameters are fp32"""
    base_dtype: Literal["float32", "bfloat16"] = "float32"
    """of the frozen base and of the residual stream: bfloat16 takes half the memory"""


@dataclass
class TaskDefaults:
    """What suits a task on the shipped base: the best of what was tried (see the README), the same for all of its methods.

    But for long scratchpads, which get fewer steps for about as many tokens, and for lessons, which re-tuning alone has.
    """

    steps: int = 1600
    scratchpad_steps: int | None = None  # None: as many
    batch_size: int = 32
    targets: tuple[str, ...] = lora.BLOCK_LAYERS
    weaken: float = 0.0
    temperature: float = 10.0
    lessons: float = 0.0
    words: float = 0.0
    replay: float = 0.3
    focus: str = ""  # of the replayed contexts, see `Primer`
    max_items: int = 128  # in a replayed list


# None of them changes the output layer: where it grows, every margin does, and no word is safer for it.
TASK_DEFAULTS = {
    "primer": TaskDefaults(temperature=1.0, replay=0.0),
    "addition": TaskDefaults(focus="digits"),
    "parity": TaskDefaults(steps=1000, focus="bits"),
    "dp": TaskDefaults(
        steps=3400,
        scratchpad_steps=1230,
        batch_size=24,
        weaken=0.2,
        lessons=0.25,
        words=0.2,
        focus="integers",
        max_items=96,
    ),
}

PRESETS: dict[str, dict] = {
    "tiny": {},
    "paper": dict(
        rank=64, alpha=64.0, dropout=0.05, targets=("wq", "wk", "wv", "wo"), lr=2e-4, warmup=1, decay=0.0, clip=10.0,
        weight_decay=0.01, batch_size=128, steps=3906, gradient_checkpointing=True, base_dtype="bfloat16",
        beta2=0.999, stretch=1.0, weaken=0.0, temperature=1.0, lessons=0.0, words=0.0, replay=0.0,
    ),
    "base": dict(
        task="primer", full=True, from_scratch=True, steps=9600, batch_size=64, micro_tokens=32768, lr=3e-3, warmup=50,
        decay=0.6, weight_decay=0.01, temperature=1.0, replay=0.0, save_every=1000,
    ),
    "base2": dict(
        task="primer", full=True, base=Path("runs/primer"), steps=1850, batch_size=64, micro_tokens=8192, lr=2e-3, warmup=50,
        decay=0.8, weight_decay=0.01, temperature=1.0, replay=0.0,
    ),
    "base3": dict(
        task="primer", full=True, base=Path("runs/primer-2"), steps=2500, batch_size=64, micro_tokens=8192, lr=2e-3, warmup=50,
        decay=0.8, weight_decay=0.01, temperature=1.0, replay=0.0,
    ),
    "base4": dict(  # of the same mixture, but other contexts
        task="primer", full=True, base=Path("runs/primer-3"), steps=7337, batch_size=160, micro_tokens=65536, lr=3e-3, warmup=100,
        decay=0.8, weight_decay=0.01, temperature=1.0, replay=0.0, save_every=1000, seed=4,
    ),
    "base5": dict(
        task="primer", full=True, base=Path("runs/primer-4"), steps=10126, batch_size=112, micro_tokens=65536, lr=3e-3,
        warmup=100, decay=0.8, weight_decay=0.01, temperature=1.0, replay=0.0, save_every=1000, seed=5,
    ),
    "base6": dict(
        task="primer", full=True, base=Path("runs/primer-5"), steps=13000, batch_size=112, micro_tokens=65536, lr=3e-3,
        warmup=100, decay=0.8, weight_decay=0.01, stretched=0.3, temperature=1.0, replay=0.0, save_every=1000, seed=6,
    ),
    "base7": dict(
        task="primer", full=True, base=Path("runs/primer-6"), steps=4500, batch_size=112, micro_tokens=65536, lr=3e-3,
        warmup=100, decay=0.8, weight_decay=0.01, temperature=4.0, replay=0.0, save_every=1000, seed=7,
    ),
}  # fmt: skip


def complete(c: TrainConfig) -> TrainConfig:
    """With the defaults that depend on task and method, where nothing else is given."""
    task = TASK_DEFAULTS.get(c.task, TaskDefaults())
    steps = task.steps
    if c.method == "scratchpad" and task.scratchpad_steps:
        steps = task.scratchpad_steps
    names = ("batch_size", "targets", "weaken", "temperature", "lessons", "words", "replay")
    defaults = dict(steps=steps) | {name: getattr(task, name) for name in names}
    if c.method != "retuning":
        defaults |= dict(lessons=0.0, words=0.0)
    return replace(c, **{name: value for name, value in defaults.items() if getattr(c, name) is None})


# --- examples ----------------------------------------------------------------------------------------------------


@dataclass
class Example:
    """One context as a sequence: what goes in, and what is to be predicted from it at each place."""

    tokens: list[int]
    labels: list[int]
    positions: list[float]
    weight: float = 1.0  # of each of its targets in the mean over a step
    meaning: list[int] | None = None  # of a lesson: other ids, as many
    share: float = 0.0  # ... that these have of the embeddings
    alike: list[float] | None = None  # ... and the weights by which its states are to be those of the base that reads these
    crowded: bool = False  # it has the positions of a longer one already


def encode(context: Context, tokenizer: Tokenizer) -> Example:
    """Token ids and labels of a context.

    Labels are kept apart from inputs. After the last token of a written segment the label is EOS, while the next input
    is already the given segment that follows: contexts hold no EOS.
    """
    tokens: list[int] = []
    labels: list[int] = []
    meaning: list[int] = []
    for i, segment in enumerate(context):
        ids, other = (
            tokenizer.segment(text) if i else tokenizer.start(text) for text in (segment.text, segment.meaning or segment.text)
        )
        if len(ids) != len(other):
            raise UserError(
                f"lesson: {segment.meaning!r} has {len(other)} tokens of this base's tokenizer, not the {len(ids)} of what it "
                "stands for; leave lessons out by --lessons 0"
            )
        meaning += other
        tokens += ids
        if segment.written:
            # Labels are those of the *next* token: one place to the left.
            labels[-1:] = [*ids, tokenizer.eos_id if segment.ends else IGNORE]
        else:
            labels += [IGNORE] * len(ids)
    example = Example(tokens, labels, [float(i) for i in range(len(tokens))])
    return replace(example, meaning=meaning) if meaning != tokens else example


def boundaries(tokenizer: Tokenizer) -> list[bool]:
    """For each token id, whether a piece of text may start after it: words and delimiters, not digits or items."""
    pieces = (tokenizer.sp.id_to_piece(i) for i in range(tokenizer.vocab_size))
    return [p == "<0x0A>" or any(c.islower() or c in "+:|;/*?" for c in p) for p in pieces]


def stretch(example: Example, is_boundary: list[bool], rng: random.Random, factor: float, share: float = 0.6) -> None:
    """Give a training sequence positions such as a longer one would have; at evaluation positions are 0, 1, 2, ...

    After "Randomized Positional Encodings Boost Length Generalization" (Ruoss et al. 2023), for RoPE, in three
    manners: as they are; all distances multiplied by one factor, with jumps where a new piece of text starts (so that
    places within a number can still be counted); and a sorted random subset of a longer range (so that they cannot).
    """
    r = rng.random()
    if factor <= 1 or r < 1 - share:
        return
    n = len(example.tokens)
    scale = factor ** rng.random()
    if r < 1 - share / 12:
        jump = rng.choice((0.0, 0.0, 4.0, 16.0, 64.0))
        position, positions = 0.0, []
        for token in example.tokens:
            positions.append(position)
            position += scale + (rng.random() * jump if jump and is_boundary[token] else 0.0)
        example.positions = positions
    else:
        example.positions = [float(p) for p in sorted(rng.sample(range(int(n * scale) + 1), n))]


def crowd(example: Example, items: list[bool], times: int) -> None:
    """Give each of these tokens several times over, one after another: attention is as thin, and what is before a list as far
    away, as with one so many times as long. (With all copies at one place other words go wrong than do after long lists.)

    What is to be predicted stays: after the last of a token's copies.
    """
    copies = [times if item else 1 for item in items]

    def spread(values: list) -> list:
        return [x for x, n in zip(values, copies, strict=True) for _ in range(n)]

    example.labels = [x for label, n in zip(example.labels, copies, strict=True) for x in [IGNORE] * (n - 1) + [label]]
    example.tokens = spread(example.tokens)
    example.positions = [float(i) for i in range(len(example.tokens))]
    example.crowded = times > 1


def curriculum(progress: float) -> float:
    """How far a base trained from scratch is on the way to long sequences and stretched positions, from 0 to 1.

    Copying is learned several times sooner on short sequences at ordinary positions, so these are all there is at first; from
    half of the run on it has to do with all of it.
    """
    return min(1.0, max(0.0, (progress - 0.15) / 0.35))


class Data:
    """Examples of a run. Those of a step depend on the seed and the step alone, so that a resumed run sees the same."""

    def __init__(self, c: TrainConfig, tokenizer: Tokenizer, max_seq_len: int):
        self.c, self.tokenizer, self.max_seq_len = c, tokenizer, max_seq_len
        self.is_boundary = boundaries(tokenizer)
        self.bracket = tokenizer.sp.piece_to_id("]")
        self.comma = tokenizer.sp.piece_to_id(",")
        pieces = {i: tokenizer.sp.id_to_piece(i) for i in range(tokenizer.vocab_size)}
        self.opening = {i for i, piece in pieces.items() if piece.rfind("[") > piece.rfind("]")}
        self.closing = {i for i, piece in pieces.items() if "]" in piece}
        self.joined = {i for i in self.opening if pieces[i].startswith("[")}
        self.letters = {i for i, piece in pieces.items() if piece[-1:].isalpha()}
        self.replayed = TASK_DEFAULTS.get(c.task, TaskDefaults())

    def __getitem__(self, step: int) -> list[Example]:
        rng = random.Random(f"{self.c.seed}-{step}")
        examples = []
        difficulty = curriculum(step / self.c.steps) if self.c.from_scratch else 1.0
        max_items = int(8 * (self.replayed.max_items / 8) ** difficulty)
        primer = Primer(max_items, self.replayed.focus, self.stage(step))
        for _ in range(self.c.batch_size):
            if self.c.lessons and rng.random() < self.c.lessons:
                examples.append(self.lesson(rng, step))
            elif self.c.words and step >= self.WORDS_FROM * self.c.steps and rng.random() < self.c.words:
                examples.append(self.words(rng))
            elif self.c.task == "primer" or (self.c.replay and rng.random() < self.c.replay):
                examples.append(self.draw(primer, rng))
            else:
                examples.append(self.draw(TASKS[self.c.task], rng))
        for example in examples:
            if not example.crowded:
                stretch(example, self.is_boundary, rng, self.c.stretch**difficulty, self.c.stretched)
        return examples

    def stage(self, step: int) -> int:
        """Of the primer: from scratch one after the other, then one for each part that follows; in rehearsal the last."""
        if self.c.from_scratch:
            return sum(start <= step / self.c.steps for start in Primer.STARTS) - 1
        return len(Primer.STAGES) - {"base2": 5, "base3": 4, "base4": 4, "base5": 3, "base6": 2}.get(self.c.preset, 1)

    def draw(self, task, rng: random.Random) -> Example:
        """An example that the base can take: of the primer another one is drawn, of a task all must fit."""
        while True:
            example = encode(task.training_context(rng, self.c.method), self.tokenizer)
            if len(example.tokens) <= self.max_seq_len:
                return example
            if not isinstance(task, Primer):
                size = len(example.tokens)
                raise UserError(f"a training context has {size} tokens, the base takes {self.max_seq_len} at most")

    LESSON = 50.0  # targets of other contexts: what its decision counts for
    ALIKE = 400.0  # ... and that its states are those of its meaning
    WORDS_FROM = 0.88  # of the run: the sooner, the more copies and sums go wrong that had been right in long lists

    def lesson(self, rng: random.Random, step: int) -> Example:
        """A lesson (see `tasks.DP.lesson`): its words are to do inside the model what the words of its meaning do in the base.

        Its embeddings go over from those of the meaning to those of its own words: an adapter that begins with what the base can
        do follows it there; one that is to find it by itself does not. That the decision is right is not enough, as in lists as
        short as these there are many ways to it, and few of them are right in long ones: so two of its states are compared with
        those that the base has of the meaning (a hint, as of Romero et al. 2015): where it decides, and where `item[0]` has just
        been named, on which that depends. With more of them, or sooner, words that follow long lists are not learned.
        """
        left = 1 - step / max(1.0, self.c.taught * self.c.steps)
        share = min(1.0, max(0.0, left + rng.uniform(-0.15, 0.1))) if rng.random() < 0.85 else 0.0
        example = encode(TASKS[self.c.task].lesson(rng), self.tokenizer)
        decides = next(i for i, label in enumerate(example.labels) if label != IGNORE)  # what follows says nothing new
        labels = [label if i == decides else IGNORE for i, label in enumerate(example.labels)]
        example = replace(example, labels=labels, weight=self.LESSON)
        if example.meaning is None:
            return example
        pairs = enumerate(zip(example.tokens, example.meaning, strict=True))
        _, named, _ = (i for i, (token, other) in pairs if token != other == self.bracket)  # sum[0], item[0], sum[2]
        alike = [self.ALIKE / 2 * (i in (named, decides)) for i in range(len(labels))]
        return replace(example, share=share, alike=alike)

    def words(self, rng: random.Random) -> Example:
        """See `tasks.DP.words`: nothing of a list is to be predicted, neither its brackets nor what is in them, but the item that
        the context ends with. Lists are crowded from their third item on: that item may depend on the first two.
        """
        context, times = TASKS[self.c.task].words(rng)
        example = encode(context, self.tokenizer)
        items = self.items(example.tokens)
        example.labels = [IGNORE if any(items[i : i + 3]) else label for i, label in enumerate(example.labels)]
        end = len(items) - items[::-1].index(False)
        example.labels[end - 1 : -1] = example.tokens[end:]
        later, commas = [], 0
        for token, item in zip(example.tokens, items, strict=True):
            later.append(item and commas > 1)
            commas = commas + (token == self.comma) if item else 0
        crowd(example, later, times)
        return example

    def items(self, tokens: list[int]) -> list[bool]:
        """Which tokens are in the brackets of a list; brackets straight after a letter hold an index (`return[0]`)."""
        out, inside = [], False
        for i, token in enumerate(tokens):
            inside = inside and token not in self.closing
            out.append(inside)
            index = token in self.joined and tokens[i - 1] in self.letters
            inside = inside or (token in self.opening and not index)
        return out

    def validation(self, n: int = 256) -> list[Example]:
        """Contexts from a stream of their own, at ordinary positions."""
        rng = random.Random(f"validation-{self.c.seed}")
        task = Primer(stage=self.stage(self.c.steps)) if self.c.task == "primer" else TASKS[self.c.task]
        return [self.draw(task, rng) for _ in range(n)]


# --- batches and the loss ----------------------------------------------------------------------------------------


def micro_batches(examples: list[Example], max_tokens: int) -> list[list[Example]]:
    """Group examples of like length, at most max_tokens tokens a group (or one example); those with a meaning apart."""
    groups: list[list[Example]] = []
    for e in sorted(examples, key=lambda e: (e.meaning is None, len(e.tokens))):
        alike = groups and (groups[-1][0].meaning is None) == (e.meaning is None)
        if alike and sum(len(x.tokens) for x in groups[-1]) + len(e.tokens) <= max_tokens:
            groups[-1].append(e)
        else:
            groups.append([e])
    return groups


def fair_shares(examples: list[Example], n: int) -> list[list[Example]]:
    """n parts of about as many tokens: the longest first, each to the part that has least so far."""
    shares: list[list[Example]] = [[] for _ in range(n)]
    for e in sorted(examples, key=lambda e: -len(e.tokens)):
        min(shares, key=lambda share: sum(len(x.tokens) for x in share)).append(e)
    return shares


@dataclass
class Batch:
    """Examples packed one after another, N tokens in all with a little padding."""

    tokens: Tensor  # [N]
    labels: Tensor  # [N]
    positions: Tensor  # [N]
    lengths: list[int]  # of the examples, padded; what is left of N is padding too
    weights: Tensor  # [N]
    meaning: tuple[Tensor, Tensor, Tensor] | None  # [N] other ids, their share, the weights of their states; None: no lessons


def pack(examples: list[Example], model: LLaMA) -> Batch:
    """Lengths and their sum are rounded up, so that shapes are few; examples of one length are attended to in one product."""
    device, longest = model.device, model.config.max_seq_len
    lengths = [min(longest, llama.round_up(len(e.tokens), 32)) for e in examples]
    tokens, labels, positions, weights, meaning, share, alike = [], [], [], [], [], [], []
    for e, n in zip(examples, lengths, strict=True):
        more = n - len(e.tokens)
        tokens += e.tokens + [0] * more
        labels += e.labels + [IGNORE] * more
        positions += e.positions + [0.0] * more
        weights += [e.weight] * n
        meaning += (e.meaning or e.tokens) + [0] * more
        share += [e.share] * n
        alike += (e.alike or [0.0] * len(e.tokens)) + [0.0] * more
    end = -len(tokens) % 512

    def padded(values: list, pad: int = 0) -> Tensor:
        dtype = torch.float32 if isinstance(values[0], float) else torch.long
        return torch.tensor(values + [pad] * end, dtype=dtype, device=device)

    taught = (padded(meaning), padded(share), padded(alike)) if any(e.meaning for e in examples) else None
    return Batch(padded(tokens), padded(labels, IGNORE), padded(positions), lengths, padded(weights), taught)


def n_targets(examples: list[Example]) -> int:
    return sum(label != IGNORE for e in examples for label in e.labels)


def weight(examples: list[Example]) -> float:
    """What the targets of a step count for together."""
    return sum(e.weight * n_targets([e]) for e in examples)


def loss_sum(model: LLaMA, b: Batch, gradient_checkpointing: bool = False, temperature: float = 1.0) -> Tensor:
    """Weighted sum of the cross-entropy (nats) of logits / temperature over the labelled places. No other logits are computed.

    To it comes, for lessons, how far their states are from those of the base alone, reading the meaning.
    """
    select = b.labels != IGNORE
    where = dict(positions=b.positions, lengths=b.lengths, select=select)
    with states(model) if b.meaning else contextlib.nullcontext([]) as own:
        logits = model(b.tokens, reading=b.meaning and b.meaning[:2], gradient_checkpointing=gradient_checkpointing, **where)
    losses = F.cross_entropy(logits.float() / temperature, b.labels[select], reduction="none")
    loss = losses @ b.weights[select]
    if b.meaning is None or not (counted := b.meaning[2] > 0).any():
        return loss
    ids, _, weights = b.meaning
    base = getattr(model, "module", model)  # DistributedDataParallel is for what has a gradient
    with torch.no_grad(), lora.disabled(base), states(base) as understood:
        base(ids, **where)
    return loss + unlikeness([x[counted] for x in own], [y[counted] for y in understood]) @ weights[counted]


@contextlib.contextmanager
def states(model: nn.Module) -> Iterator[list[Tensor]]:
    """The residual stream [N, D] after every second block, the last left out, filled in as the model goes through them."""
    out: list[Tensor] = []
    layers = getattr(model, "module", model).layers
    hooks = [layer.register_forward_hook(lambda _, __, x: out.append(x)) for layer in layers[1:-1:2] or layers[:-1]]
    try:
        yield out
    finally:
        for hook in hooks:
            hook.remove()


def unlikeness(own: list[Tensor], understood: list[Tensor]) -> Tensor:
    """[N]: how far states are from others, squared, in units of the squared length of these; the mean over the blocks."""
    apart = [(x.float() - y.float()).square().sum(-1) / y.float().square().sum(-1) for x, y in zip(own, understood, strict=True)]
    return torch.stack(apart).mean(0)


def autocast(model: LLaMA, dtype: torch.dtype) -> torch.autocast:
    return torch.autocast(model.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)


@torch.no_grad()
def evaluate(model: LLaMA, examples: list[Example], dtype: torch.dtype, max_tokens: int) -> float:
    """Mean loss (nats per target token)."""
    model.eval()
    total = 0.0
    for group in micro_batches(examples, max_tokens):
        with autocast(model, dtype):
            total += loss_sum(model, pack(group, model)).item()
    return total / n_targets(examples)


# --- the model and its optimizer ---------------------------------------------------------------------------------


def train_tokenizer(path: Path) -> None:
    """The shipped base's sentencepiece model, with LLaMA's settings: single digits, byte fallback, nothing normalized."""

    def write(temporary: Path) -> None:
        with temporary.open("wb") as f:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(tokenizer_corpus()), model_writer=f, model_type="bpe", vocab_size=512,
                byte_fallback=True, split_digits=True, allow_whitespace_only_pieces=True,
                normalization_rule_name="identity", remove_extra_whitespaces=False, add_dummy_prefix=True,
                character_coverage=1.0, unk_id=0, bos_id=1, eos_id=2, pad_id=-1, num_threads=1, minloglevel=2,
            )  # fmt: skip

    llama.write_atomically(path, write)


def init_weights(model: LLaMA) -> None:
    """Normal, of variance 1 / fan-in; less for what is added to the residual stream, so that tokens stay to be told in it."""
    for name, p in model.named_parameters():
        if p.dim() == 2:
            std = p.shape[1] ** -0.5 if "layers." in name else 0.5 if "tok_embeddings" in name else 0.02
            torch.nn.init.normal_(p, std=std * (0.3 if name.endswith(("wo.weight", "w2.weight")) else 1.0))


def build(c: TrainConfig) -> tuple[LLaMA, Tokenizer]:
    """The model to train: only what is trained requires gradients."""
    torch.manual_seed(c.seed)
    device = torch.device("cpu" if c.fsdp else c.device)  # to be shared out from there
    if c.from_scratch:
        with tempfile.TemporaryDirectory() as folder:
            train_tokenizer(Path(folder) / "tokenizer.model")
            tokenizer = Tokenizer(Path(folder) / "tokenizer.model")
        model = LLaMA(ModelConfig(vocab_size=tokenizer.vocab_size, **TINY))
        init_weights(model)
        return model.to(device), tokenizer
    # A frozen base may be in bf16; parameters that are trained are fp32, or small updates would be rounded away.
    base_dtype = "float32" if c.full else c.base_dtype
    model, tokenizer = llama.load(llama.find_folder(c.base), device=device, dtype=getattr(torch, base_dtype))
    if c.full:
        model.requires_grad_(True)
    else:
        lora.wrap(model, lora_config(c))
    return model, tokenizer


def lora_config(c: TrainConfig) -> lora.LoRAConfig:
    return lora.LoRAConfig(c.rank, c.alpha, c.dropout, c.targets)


def trainable(model: LLaMA) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


class Muon(torch.optim.Optimizer):
    """Momentum whose update of each matrix is made orthogonal (Jordan et al. 2024, kellerjordan.github.io/posts/muon).

    The arithmetic of torch.optim.Muon(adjust_lr_fn="match_rms_adamw"), in a dtype of choice: bf16, which that one computes in,
    takes more than twice as long as the rest of a step on a CPU without bf16 instructions. Matrices of one shape go through in
    one batch.
    """

    def __init__(self, params: list[nn.Parameter], lr: float, weight_decay=0.0, momentum=0.95, dtype=torch.float32):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))
        self.dtype = dtype  # of the iterations

    @staticmethod
    def orthogonalize(x: Tensor) -> Tensor:
        """[..., rows, columns] -> about U V^T of its singular value decomposition, by five Newton-Schulz iterations."""
        tall = x.shape[-2] > x.shape[-1]
        x = x.mT if tall else x
        x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
        for _ in range(5):
            a = x @ x.mT
            x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
        return x.mT if tall else x

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            same_shape: dict[torch.Size, list[nn.Parameter]] = {}
            for p in group["params"]:
                same_shape.setdefault(p.shape, []).append(p)
            for shape, params in same_shape.items():
                updates = []
                for p in params:
                    state = self.state[p]
                    if not state:
                        state["momentum_buffer"] = torch.zeros_like(p)
                    state["momentum_buffer"].lerp_(p.grad, 1 - group["momentum"])
                    updates.append(p.grad.lerp(state["momentum_buffer"], group["momentum"]))  # Nesterov's
                for p, update in zip(params, self.orthogonalize(torch.stack(updates).to(self.dtype)), strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(update, alpha=-group["lr"] * 0.2 * max(shape) ** 0.5)  # as large as AdamW's


def optimizers(c: TrainConfig, model: LLaMA) -> list[torch.optim.Optimizer]:
    """AdamW; for whole models Muon on the matrices of the blocks, which leaves the plateau before copying is learned sooner."""
    parameters = trainable(model)
    if not c.full:
        betas = 0.9, c.beta2
        return [torch.optim.AdamW(parameters.values(), lr=c.lr, betas=betas, weight_decay=c.weight_decay, fused=True)]
    matrices = [p for name, p in parameters.items() if p.dim() == 2 and "layers." in name]
    others = [p for name, p in parameters.items() if not (p.dim() == 2 and "layers." in name)]
    return [
        Muon(matrices, lr=c.lr, weight_decay=c.weight_decay, dtype=getattr(torch, c.dtype)),
        torch.optim.AdamW(others, lr=c.lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]


def share_out(model: LLaMA, device: torch.device) -> None:
    """FSDP2: every process keeps its part of each block, and has the whole of it only while it computes with it."""
    mesh = distributed.init_device_mesh(device.type, (distributed.get_world_size(),))
    for block in model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def whole(x: Tensor) -> Tensor:
    """A tensor that is shared out over the processes, put together; any other as it is. (All processes have to ask.)"""
    return x.full_tensor() if isinstance(x, DTensor) else x


def shared_out(x: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, shared out as another one is."""
    return distribute_tensor(x, like.device_mesh, like.placements) if isinstance(like, DTensor) else x


def learning_rate(c: TrainConfig, step: int) -> float:
    """Linear warm-up, constant, linear decay."""
    progress = step / c.steps
    rise = min(1.0, (step + 1) / c.warmup) if c.warmup else 1.0
    return c.lr * rise * (1.0 if progress < 1 - c.decay else (1 - progress) / c.decay)


def temperature(c: TrainConfig, step: int) -> float:
    """Of the loss: it rises over the run from 1, at which decisions are learned soonest, to `TrainConfig.temperature`."""
    return 1 + (c.temperature - 1) * step / c.steps


def strength(c: TrainConfig, step: int) -> float:
    """How much of an adapter's update counts in a step, see `TrainConfig.weaken`."""
    return 1 - c.weaken * random.Random(f"strength-{c.seed}-{step}").random()


# --- the run's folder --------------------------------------------------------------------------------------------


def run_name(c: TrainConfig) -> str:
    return c.task if c.task == "primer" else f"{c.task}-{c.method}"


def is_finished(folder: Path) -> bool:
    return (folder / "adapter_config.json").exists() or (folder / "config.json").exists()


def new_run(c: TrainConfig) -> Path:
    """Create the run's folder, under a name not taken, with its configuration in it."""
    number = max(lora.numbered(c.out, run_name(c)), default=0) + 1
    folder = c.out / (run_name(c) if number == 1 else f"{run_name(c)}-{number}")
    try:
        folder.mkdir(parents=True)
    except OSError as e:
        raise UserError(f"{folder}: cannot be made ({e.strerror}); choose another --out") from None
    text = json.dumps(asdict(c), indent=2, default=str) + "\n"
    llama.write_atomically(folder / "train_config.json", lambda p: p.write_text(text))
    return folder


def find_run(c: TrainConfig, given: dict) -> tuple[Path, TrainConfig]:
    """The newest unfinished run of this task and method, with its own configuration; `given` are flags on the command line."""
    folders = lora.numbered(c.out, run_name(c)).values()
    unfinished = [f for f in folders if (f / "train_config.json").exists() and not is_finished(f)]
    if not unfinished:
        raise UserError(f"{c.out}: no unfinished run of {run_name(c)} to resume; leave out --resume to start one")
    folder = unfinished[-1]
    saved = llama.read_json(folder / "train_config.json")
    for key, value in given.items():
        now = json.loads(json.dumps(value, default=str))
        if key not in ("resume", "out") and now != saved.get(key):
            raise UserError(f"{folder}: this run has {key} = {saved.get(key)!r}, not {now!r}; resume it without that flag")
    names = {f.name for f in fields(TrainConfig)}
    if names != saved.keys():
        raise UserError(f"{folder}/train_config.json: unknown or missing keys {sorted(names ^ saved.keys())}")
    saved |= dict(base=Path(saved["base"]), out=c.out, targets=tuple(saved["targets"]), resume=True)
    return folder, TrainConfig(**saved)


def save_checkpoint(folder: Path, step: int, model: LLaMA, optimizers: list, seconds: float) -> None:
    """All that is needed to go on after `step` steps. (Data and dropout are functions of the seed and the step.)"""
    states = [o.state_dict() for o in optimizers]
    for state in states:
        state["state"] = {i: {k: whole(x) for k, x in values.items()} for i, values in state["state"].items()}
    state = {
        "step": step,
        "parameters": {n: whole(p.detach()) for n, p in trainable(model).items()},
        "optimizers": states,
        "seconds": seconds,
    }
    if llama.processes()[0] == 0:
        llama.write_atomically(folder / "checkpoint.pt", lambda p: torch.save(state, p))


def load_checkpoint(folder: Path, model: LLaMA, optimizers: list) -> tuple[int, float]:
    """Returns (steps done, seconds spent); (0, 0) where no checkpoint was reached."""
    path = folder / "checkpoint.pt"
    if not path.exists():
        return 0, 0.0
    try:
        state = torch.load(path, map_location=model.device, weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as e:
        raise UserError(
            f"{path}: damaged ({str(e).splitlines()[0][:80]}); delete it, and --resume starts from the first step"
        ) from None
    with torch.no_grad():
        for name, p in trainable(model).items():
            p.copy_(shared_out(state["parameters"][name], p))
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        params = [p for group in optimizer.param_groups for p in group["params"]]
        for i, values in saved["state"].items():
            saved["state"][i] = {k: shared_out(x, params[i]) if x.shape == params[i].shape else x for k, x in values.items()}
        optimizer.load_state_dict(saved)
    return state["step"], state["seconds"]


class Metrics:
    """metrics.jsonl: one JSON object a line. A resumed run drops the lines after its checkpoint."""

    def __init__(self, path: Path, steps_done: int):
        kept = []
        if path.exists():
            kept = [
                line
                for line in path.read_text().splitlines(True)
                if line.endswith("\n") and (m := json.loads(line))["step"] <= steps_done and "loss" in m
            ]
        llama.write_atomically(path, lambda p: p.write_text("".join(kept)))
        self.file = path.open("a")

    def write(self, **values) -> None:
        self.file.write(json.dumps(values) + "\n")
        self.file.flush()


# --- the loop ----------------------------------------------------------------------------------------------------


class Clock:
    """Seconds spent on each part of the loop. (A GPU's work is queued: its seconds show where the loop waits for it.)"""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self.last = time.perf_counter()

    def lap(self, part: str) -> None:
        now = time.perf_counter()
        self.seconds[part] = self.seconds.get(part, 0.0) + now - self.last
        self.last = now

    def __str__(self) -> str:
        total = sum(self.seconds.values())
        return ", ".join(f"{part} {seconds / total:.1%}" for part, seconds in self.seconds.items())


def train(c: TrainConfig, folder: Path, model: LLaMA, tokenizer: Tokenizer) -> None:
    device, dtype, (rank, size) = model.device, getattr(torch, c.dtype), llama.processes()
    data = Data(c, tokenizer, model.config.max_seq_len)
    if c.fsdp:
        share_out(model, torch.device(c.device))
        device = model.device
    opts = optimizers(c, model)
    start, seconds = load_checkpoint(folder, model, opts)
    parallel = model if size == 1 or c.fsdp else DistributedDataParallel(model)  # either way all get the mean of their gradients
    if rank == 0:
        metrics = Metrics(folder / "metrics.jsonl", start)
        count = sum(p.numel() for p in trainable(model).values())
        where = f"{device}, {size} processes" if size > 1 else str(device)
        print(f"{folder}: {count:,} trained parameters of {sum(p.numel() for p in model.parameters()):,}, {dtype} on {where}")

    began, clock, fed = time.monotonic() - seconds, Clock(), 0
    hidden = True if rank else None  # a bar for the first process, where there is a terminal
    workers = 2 if c.full and device.type == "cuda" else 0  # to draw the examples of a small base takes as long as a step
    batches = DataLoader(data, batch_size=None, sampler=range(start, c.steps), collate_fn=list, num_workers=workers)
    bar = tqdm(batches, initial=start, total=c.steps, unit="step", disable=hidden, mininterval=1.0)
    for step, examples in enumerate(bar, start):
        model.train()
        torch.manual_seed(hash((c.seed, step, rank)) % 2**31)  # dropout
        lora.set_strength(model, strength(c, step))
        heat = temperature(c, step)
        targets, whole_weight, tokens = n_targets(examples), weight(examples), sum(len(e.tokens) for e in examples)
        shares = [micro_batches(share, c.micro_tokens) for share in fair_shares(examples, size)]
        for optimizer in opts:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(c, step)
        clock.lap("data")
        total, groups = torch.zeros((), device=device), shares[rank]
        for i in range(max(map(len, shares)) if c.fsdp else len(groups)):  # what is shared out, all need at the same time
            group, counts = groups[min(i, len(groups) - 1)], i < len(groups)
            gather = parallel.no_sync() if parallel is not model and i + 1 < len(groups) else contextlib.nullcontext()
            with gather:
                with autocast(model, dtype):
                    loss = loss_sum(parallel, pack(group, model), c.gradient_checkpointing, heat) * counts
                clock.lap("forward")
                (loss * (size / whole_weight)).backward()  # in the end the weighted mean over the targets of the whole step
                total += loss.detach()
                clock.lap("backward")
        if size > 1:
            distributed.all_reduce(total)
        mean = total.item() / whole_weight
        norm = whole(torch.nn.utils.clip_grad_norm_(trainable(model).values(), c.clip)).item()
        if not math.isfinite(norm):
            raise UserError(f"step {step}: the gradient is not finite (loss {mean:.3g}); try a smaller --lr than {c.lr}")
        for optimizer in opts:
            optimizer.step()
            optimizer.zero_grad()
        clock.lap("optimizer")
        bar.set_postfix(loss=f"{mean:.4f}")
        if rank == 0:
            metrics.write(
                step=step + 1, loss=mean, lr=learning_rate(c, step), gradient_norm=norm, targets=targets,
                tokens=tokens, seconds=round(time.monotonic() - began, 2),
            )  # fmt: skip
        if (rank == 0 or c.fsdp) and ((step + 1) % c.save_every == 0 or step + 1 == c.steps):
            save_checkpoint(folder, step + 1, model, opts, time.monotonic() - began)
        fed += tokens
        clock.lap("saving")

    lora.set_strength(model, 1.0)
    speed = fed / max(1e-9, sum(clock.seconds.values()))
    if rank == 0 or c.fsdp:
        validation = evaluate(model, data.validation(), dtype, c.micro_tokens)
    trained = {n: whole(p.detach()) for n, p in trainable(model).items()} if c.fsdp else {}
    if rank:
        return  # the first process does the rest
    print(f"validation loss {validation:.5f} nats per target token, after {time.monotonic() - began:.0f} s")
    metrics.write(step=c.steps, validation_loss=validation, seconds=round(time.monotonic() - began, 2))
    if c.fsdp:  # what is written is whole, and a device need not have room for that
        model, _ = build(c)
        model.load_state_dict(trained, strict=False)
        print("not decoded, as a device need not hold the model: see eval.py")
    elif not c.full:
        accuracy = quick_decode(c, model, tokenizer)
        print(f"solves {accuracy:.1%} of held-out problems of the training lengths")
        metrics.write(step=c.steps, in_distribution_accuracy=accuracy)
    if c.full:
        llama.save(model, tokenizer, folder)
    else:
        lora.save_adapter(model, folder, lora_config(c), base=str(c.base))  # last: this is what makes a run finished
    (folder / "checkpoint.pt").unlink(missing_ok=True)
    clock.lap("evaluation")
    print(f"time: {clock}; {speed:,.0f} tokens a second in training")
    print(f"written: {folder}")


def quick_decode(c: TrainConfig, model: LLaMA, tokenizer: Tokenizer, n: int = 60) -> float:
    """Share of in-distribution problems (all training lengths, held out from training) that the new adapter solves."""
    task, rng = TASKS[c.task], random.Random(f"quick-{c.seed}")
    lengths = [task.train_lengths[i * len(task.train_lengths) // n] for i in range(n)]
    problems = [task.sample(rng, length) for length in lengths]
    wrapped = lora.merge(model)
    decoder = Decoder(Engine(model), tokenizer, Limits(**bounds(task, problems, c.method, tokenizer)))
    right, bar = 0, tqdm(total=n, unit="problem", disable=None, desc="in distribution")
    for result in decoder.solve([task.prompt(p, c.method) for p in problems]):
        right += result.ending == "answer" and task.judge(problems[result.index], result.text, c.method)
        bar.update()
    bar.close()
    lora.unmerge(model, wrapped)
    return right / n


def main() -> None:
    """Read the flags on top of the preset's defaults, open or find the run's folder, train."""
    argv = [a for arg in sys.argv[1:] for a in arg.split("=", 1)]
    preset = next((b for a, b in zip(argv, argv[1:], strict=False) if a == "--preset"), "tiny")
    default = TrainConfig(**PRESETS.get(preset, {}) | {"preset": preset if preset in PRESETS else "tiny"})
    c = tyro.cli(TrainConfig, default=default)
    c = complete(c)
    folder = None
    if c.resume:
        flags = {a.lstrip("-").removeprefix("no-").replace("-", "_") for a in argv if a.startswith("--")}
        folder, c = find_run(c, {f.name: getattr(c, f.name) for f in fields(c) if f.name in flags})
    check(c)
    device = llama.pick_device(c.device)
    c.device, c.dtype = device.type, str(llama.pick_dtype(c.dtype, device)).removeprefix("torch.")
    rank, size = llama.processes()
    if c.batch_size < size:
        raise UserError(f"--batch-size {c.batch_size}: fewer contexts a step than the {size} processes")
    llama.join_processes(device)
    model, tokenizer = build(c)  # before a folder is made for a run that cannot be
    if c.lessons:
        for seed in range(20):  # nor can one whose lessons, those that have a meaning, do not fit the tokenizer
            encode(TASKS[c.task].lesson(random.Random(seed)), tokenizer)
    if rank == 0:
        folder = folder or new_run(c)
    if size > 1:
        shared = [folder]
        distributed.broadcast_object_list(shared)
        folder = shared[0]
    with lock(folder) if rank == 0 else contextlib.nullcontext():
        train(c, folder, model, tokenizer)
    if size > 1:
        # The group's threads hold tensors, and one that lets go of its last while Python ends takes the process down.
        del model
        gc.collect()
        distributed.destroy_process_group()


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """One process a run: a second one would write the same files. (Released by the system when the process ends.)"""
    with (folder / "train_config.json").open() as f:
        if fcntl is not None:
            try:
                fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise UserError(f"{folder}: another process is training this run") from None
        yield


def check(c: TrainConfig) -> None:
    """Refuse settings that no run could have."""
    if c.task == "primer" and not c.full:
        raise UserError("the primer trains a whole model: add --full (or --preset base)")
    if c.full and c.task != "primer":
        raise UserError("--full trains a base (--task primer); a task is learned by an adapter: leave out --full")
    if c.fsdp and (c.full or llama.processes()[1] == 1):
        raise UserError("--fsdp shares a frozen base out over several processes: start it by torchrun, without --full")
    if c.from_scratch and not c.full:
        raise UserError("--from-scratch needs --full: an adapter needs a base")
    for name in ("steps", "batch_size", "micro_tokens", "save_every", "rank"):
        if getattr(c, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(c, name)}: expected 1 or more")
    ranges = {
        "lr": (0, 1e3), "warmup": (0, 1e9), "decay": (0, 1), "beta2": (0, 0.99999), "weight_decay": (0, 1), "clip": (0, math.inf),
        "alpha": (0, 1e6), "dropout": (0, 0.99), "stretch": (1, 1e6), "stretched": (0, 1), "weaken": (0, 1), "replay": (0, 1),
        "temperature": (0.01, 1e3), "lessons": (0, 1), "taught": (0, 1), "words": (0, 1), "seed": (0, 2**62),
    }  # fmt: skip
    for name, (low, high) in ranges.items():
        if not low <= getattr(c, name) <= high:
            raise UserError(f"--{name.replace('_', '-')} {getattr(c, name)}: expected {low} to {high}")
    if c.full and c.weaken:
        raise UserError(f"--weaken {c.weaken}: there is no adapter to weaken with --full; leave it out")
    for name, source in (("lessons", "lesson"), ("words", "words")):
        if getattr(c, name) and (c.method != "retuning" or not hasattr(TASKS.get(c.task), source)):
            raise UserError(f"--{name} {getattr(c, name)}: {c.task} by {c.method} has none; leave it out")
    if not c.full:
        lora_config(c)


if __name__ == "__main__":
    llama.run_script(main)
