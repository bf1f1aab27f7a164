import sys, os, random; sys.path.insert(0, os.getcwd())
import torch, train, numpy as np, model as llama
from tasks import TASKS
from pathlib import Path
tok=llama.Tokenizer(Path("checkpoints/next/tokenizer.model"))
sets={}; share=float(sys.argv[2]) if len(sys.argv)>2 else 1
for task, lens in (("dp",((3,100),(5,200),(10,150),(20,100),(30,60))),("addition",((40,50),(60,50))),("parity",((40,50),(60,50),(84,50)))):
    T=TASKS[task]
    for n,N in lens:
        rng=random.Random(f"tf-{n}"); N=max(1,int(N*share))
        items,meta=[],[]
        for i in range(N):
            p=T.sample(rng,n)
            for q in T.levels(p,"retuning"):
                e=train.encode(T.context(q,"retuning"),tok)
                items.append((np.array(e.tokens,np.uint16),np.array(e.labels,np.int16))); meta.append((i,getattr(q,"kind","x")))
        sets[task,n]=(items,meta); print(task,n,len(items),sum(len(i[0]) for i in items))
torch.save(sets,sys.argv[1])
