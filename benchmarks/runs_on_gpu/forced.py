"""forced.py BASE EVAL.pt OUT.json NAME=FOLDER ...: teacher forced accuracy of adapters by re-tuning"""
import os, sys, json, time
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__)))); sys.path.insert(0, sys.path[0] + "/benchmarks")
import numpy as np, torch
from pathlib import Path
import gpu, lora, model as llama
DEV = torch.device("cuda" if torch.cuda.is_available() else "cpu"); cuda = DEV.type == "cuda"
T = time.time()
sets = torch.load(sys.argv[2], weights_only=False)
@torch.no_grad()
def logits(model, st, longest):
    with torch.autocast(DEV.type, torch.bfloat16, enabled=cuda):
        cos, sin = llama.rotary_angles(st["positions"], model.config)
        x = model.tok_embeddings(st["tokens"]); attend = gpu.Attend(st["ends"], longest)
        for layer in model.layers:
            x = layer(x, cos, sin, attend, (st["places"],) if layer is model.layers[-1] else None)
        return model.output(model.norm(x))
def forced(model, items, meta, tok):
    bad, kinds, errors, flags = set(), {}, [], 0
    batches, cur, size = [], [], 0
    for j in sorted(range(len(items)), key=lambda j: len(items[j][0])):
        k = len(items[j][0])
        if size + k > (131072 if cuda else 8192): batches.append(cur); cur, size = [], 0
        cur.append(j); size += k
    batches.append(cur)
    for js in batches:
        tokens = np.concatenate([items[j][0] for j in js]).astype(np.int64); lab = np.concatenate([items[j][1] for j in js]).astype(np.int64)
        ls = [len(items[j][0]) for j in js]; sel = np.nonzero(lab != -100)[0]
        st = dict(tokens=tokens, positions=np.concatenate([np.arange(l) for l in ls]).astype(np.float32), places=sel, ends=np.cumsum([0] + ls).astype(np.int32))
        pred = logits(model, {k: torch.from_numpy(v).to(DEV) for k, v in st.items()}, max(ls)).argmax(-1).cpu().numpy()
        wrong = np.nonzero(pred != lab[sel])[0]; where = np.searchsorted(np.cumsum(ls), sel[wrong], side="right"); seen = set()
        for a, w in zip(wrong, where):
            if w in seen: continue
            seen.add(w); p, kind = meta[js[w]]; bad.add(p); at = sel[a]
            want, got = tok.sp.id_to_piece(int(lab[at])), tok.sp.id_to_piece(int(pred[a])); flags += want.strip("▁") in ("True", "False")
            errors.append((kind, int(p), tok.sp.decode(tokens[max(at - 24, 0):at + 1].tolist())[-60:], want, got)); kinds.setdefault(kind, [0, 0])[0] -= 1
    for _, kind in meta:
        k = kinds.setdefault(kind, [0, 0]); k[0] += 1; k[1] += 1
    n = len({p for p, _ in meta})
    return dict(whole=n - len(bad), n=n, kinds=kinds, flags=flags, errors=errors[:80])
out = {}
for arg in sys.argv[4:]:
    name, folder = arg.split("=")
    model, tok = llama.load(llama.find_folder(Path(sys.argv[1])), device=DEV, dtype=torch.float32)
    lora.load_adapter(model, Path(folder)); lora.merge(model); model.eval()
    task, line = Path(folder).name.split("-")[0], []
    for (t, length), (items, meta) in sets.items():
        if t == task:
            r = forced(model, items, meta, tok); out[f"{name} {task} {length}"] = r
            line.append(f"{length}: {r['whole']}/{r['n']} " + " ".join(f"{k[0]}{v[0]}/{v[1]}" for k, v in r["kinds"].items()) + f" f{r['flags']}")
    print(f"[{time.time()-T:.0f}]", name, task, " | ".join(line), flush=True)
Path(sys.argv[3]).write_text(json.dumps(out))
