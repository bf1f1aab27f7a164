"""Part four of the base on one GPU, as it was run: `train.py --preset base4`, but contexts are drawn and packed by worker processes and
attended to in one call of a kernel for sequences of different lengths (checked against train.py's gradient first).

    python benchmarks/base.py SECONDS OUT [device]      # as many steps as fit; BATCH, LR, SEED, DECAY, WORKERS in the environment
"""
import json, os, sys, time, math, itertools
HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, HERE)
import torch, numpy as np
from pathlib import Path
from torch.utils.data import DataLoader
import model as llama, train
from dataclasses import replace
BUDGET, OUT = float(sys.argv[1]), Path(sys.argv[2])
DEV = torch.device(sys.argv[3] if len(sys.argv) > 3 else "cuda")
BATCH = int(os.environ.get("BATCH", 160)); LR = float(os.environ.get("LR", 3e-3))
t0 = time.time()
def log(*a):
    print(f"[{time.time()-t0:6.1f}]", *a, flush=True)

class Varlen:
    """packed attention by cumulative lengths"""
    mode = "varlen"
    def __init__(self, lengths, device):
        self.lengths = lengths
    def __call__(self, q, k, v):
        b = Varlen.batch
        if Varlen.mode == "varlen":
            r = q.shape[1] // k.shape[1]
            k, v = (x.repeat_interleave(r, 1) for x in (k, v))
            return torch.ops.aten._flash_attention_forward(q.contiguous(), k.contiguous(), v.contiguous(), b["cu"], b["cu"], b["longest"], b["longest"], 0.0, True, False)[0]
        outs, start, groups = [], 0, b["groups"]
        for n, count in groups:
            qi, ki, vi = (x[start:start + n * count].unflatten(0, (count, n)) for x in (q, k, v))
            outs.append(llama.attend_rows(qi, ki, vi).flatten(0, 1)); start += n * count
        outs.append(q.new_zeros(len(q) - start, *q.shape[1:]))
        return torch.cat(outs)

UNIT = 2048
def collate(examples):
    """-> dict of tensors; exact lengths for varlen."""
    examples = sorted(examples, key=lambda e: len(e.tokens))
    if COLL == "bucket":
        def up(n):
            u = 32 if n <= 128 else 64 if n <= 256 else 128 if n <= 512 else 256
            return -(-n // u) * u
        ls = [up(len(e.tokens)) for e in examples]
    else:
        ls = [len(e.tokens) for e in examples]
    n = sum(ls); more = -n % UNIT
    N = n + more
    tok = np.zeros(N, np.int64); lab = np.full(N, -100, np.int64); pos = np.zeros(N, np.float32)
    s = 0
    for e, l in zip(examples, ls):
        m = len(e.tokens)
        tok[s:s+m] = e.tokens; lab[s:s+m] = e.labels; pos[s:s+m] = e.positions
        s += l
    sel = np.nonzero(lab != -100)[0]
    cu = np.cumsum([0] + ls)
    while cu[-1] < N:
        cu = np.append(cu, min(N, cu[-1] + 512))
    return dict(tokens=torch.from_numpy(tok), labels=torch.from_numpy(lab[sel]), positions=torch.from_numpy(pos), select=torch.from_numpy(sel),
                cu=torch.from_numpy(cu.astype(np.int32)), longest=max(max(ls), 512), real=sum(len(e.tokens) for e in examples),
                groups=[(l, len(list(g))) for l, g in itertools.groupby(ls)])
COLL = "varlen"

def forward(model, b):
    """loss sum, as train.loss_sum"""
    Varlen.batch = b
    cos, sin = llama.rotary_angles(b["positions"], model.config)
    x = model.tok_embeddings(b["tokens"])
    attend = Varlen(None, None)
    for layer in model.layers:
        x = layer(x, cos, sin, attend, (b["select"],) if layer is model.layers[-1] else None)
    logits = model.output(model.norm(x))
    return torch.nn.functional.cross_entropy(logits.float(), b["labels"], reduction="sum")

class FastMuon(train.Muon):
    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            if "shapes" not in group:
                shapes = {}
                for p in group["params"]:
                    shapes.setdefault(p.shape, []).append(p)
                group["shapes"] = list(shapes.items())
                group["buffers"] = [torch.zeros(len(ps), *s, device=ps[0].device) for s, ps in group["shapes"]]
            for (shape, ps), buf in zip(group["shapes"], group["buffers"]):
                g = torch.stack([p.grad for p in ps])
                buf.lerp_(g, 1 - group["momentum"])
                u = self.orthogonalize(g.lerp(buf, group["momentum"]).to(self.dtype)).float()
                torch._foreach_mul_(ps, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(ps, list(u.unbind()), alpha=-group["lr"] * 0.2 * max(shape) ** 0.5)

def to(b):
    return {k: v.to(DEV, non_blocking=True) if torch.is_tensor(v) else v for k, v in b.items()}

def main():
    global COLL
    llama.pick_device(DEV.type)
    c = train.complete(train.TrainConfig(**train.PRESETS["base3"] | dict(preset="base3", batch_size=BATCH, lr=LR, base=Path(HERE) / "checkpoints/tiny", seed=int(os.environ.get("SEED", 4)), warmup=100, decay=float(os.environ.get("DECAY", 0.8)))))
    c.device, c.dtype = DEV.type, "bfloat16"
    model, tokenizer = train.build(c)
    data = train.Data(c, tokenizer, model.config.max_seq_len)
    # self test
    ex = data[10**6][:48]
    ac = lambda: torch.autocast(DEV.type, torch.bfloat16)
    ref = 0.0
    for g in train.micro_batches(ex, 4096):
        with ac():
            l = train.loss_sum(model, train.pack(g, model)); l.backward(); ref += l.item()
    gref = torch.cat([p.grad.flatten() for p in model.parameters()]); model.zero_grad()
    for mode in ("varlen", "bucket"):
        try:
            COLL = Varlen.mode = mode
            with ac():
                l = forward(model, to(collate(ex)))
            l.backward()
            g = torch.cat([p.grad.flatten() for p in model.parameters()]); model.zero_grad()
            rel = ((g - gref).norm() / gref.norm()).item()
            log(mode, "loss", l.item(), "ref", ref, "gradient rel err", rel)
            if abs(l.item() - ref) < 0.02 * abs(ref) and rel < 0.1:
                break
        except Exception as e:
            model.zero_grad(); log(mode, "failed:", repr(e)[:300])
    log("attention:", COLL)
    matrices = [p for n, p in model.named_parameters() if p.dim() == 2 and "layers." in n]
    others = [p for n, p in model.named_parameters() if not (p.dim() == 2 and "layers." in n)]
    opts = [FastMuon(matrices, lr=c.lr, weight_decay=c.weight_decay, dtype=torch.bfloat16), torch.optim.AdamW(others, lr=c.lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True)]
    workers = int(os.environ.get("WORKERS", 12))
    loader = DataLoader(data, batch_size=None, sampler=range(0, 10**6), collate_fn=collate, num_workers=workers, prefetch_factor=6 if workers else None, pin_memory=DEV.type == "cuda")
    steps, total, fed, start, waited = 10**9, torch.zeros((), device=DEV), 0, None, 0.0
    params = list(model.parameters())
    mark = time.time()
    it = iter(loader)
    step, losses = 0, []
    while step < steps:
        w = time.time(); b = next(it); waited += time.time() - w
        if step == 20: start = time.time()
        if step == 120:
            per = (time.time() - start) / 100
            steps = max(500, int((BUDGET - (time.time() - T0)) / per)) + 120
            c.steps = steps
            log(f"{per*1e3:.1f} ms a step: {steps} steps")
        c2 = c if step >= 120 else replace(c, steps=10**6)
        lr = train.learning_rate(c2, step)
        for o in opts:
            for g in o.param_groups: g["lr"] = lr
        b = to(b); n = len(b["labels"])
        with ac():
            l = forward(model, b) / n
        l.backward()
        total += l.detach()
        torch.nn.utils.clip_grad_norm_(params, c.clip, foreach=True)
        for o in opts: o.step()
        model.zero_grad(set_to_none=True)
        fed += b["real"]; step += 1
        if step % 100 == 0:
            v = total.item() / 100; total.zero_(); losses.append((step, v))
            if not math.isfinite(v): log("NOT FINITE"); sys.exit(1)
            if step % 500 == 0: log(f"step {step} loss {v:.4f} lr {lr:.2e} tokens {fed/1e6:.1f}M waited {waited:.1f}s")
            if step % 2000 == 0: llama.save(model, tokenizer, OUT)
            if os.environ.get("STOP") and step >= int(os.environ["STOP"]): break
            if time.time() - T0 > BUDGET + 25:
                log("over time, stop at", step); break
    model.eval()
    v = data.validation()
    with torch.no_grad():
        num = den = 0.0
        for g in train.micro_batches(v, 8192):
            with ac():
                num += train.loss_sum(model, train.pack(g, model)).item()
        den = train.n_targets(v)
    log("validation", num / den)
    llama.save(model, tokenizer, OUT)
    (OUT / "log.json").write_text(json.dumps(dict(steps=step, planned=steps, tokens=fed, batch=BATCH, lr=LR, losses=losses, validation=num / den)))
    log("saved", OUT)
T0 = time.time()
main()
