"""Shared fixtures: a random model small enough for any test, and a scripted engine that stands in for a perfect one."""

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run in a process a core

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import model as llama  # noqa: E402
import train  # noqa: E402
from tasks import ANSWER, SOLUTION, Addition  # noqa: E402

BASE = ROOT / "checkpoints/tiny"
LLAMA_TOKENIZER = Path(os.environ.get("LLAMA_TOKENIZER", ROOT.parent / "shared/llama-tokenizer.model"))


def random_model(seed: int = 0, **changes) -> llama.LLaMA:
    """Two layers, grouped queries, large weights, so that a mistake shows in the logits."""
    torch.manual_seed(seed)
    shape = dict(vocab_size=512, dim=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, hidden_dim=48, max_seq_len=1024)
    model = llama.LLaMA(llama.ModelConfig(**shape | changes))
    for p in model.parameters():
        torch.nn.init.normal_(p, mean=1.0 if p.dim() == 1 else 0.0, std=0.25)
    return model.requires_grad_(False).eval()


@pytest.fixture(scope="session")
def tokenizer() -> llama.Tokenizer:
    return llama.Tokenizer(BASE / "tokenizer.model")


@pytest.fixture
def small_base(tmp_path, tokenizer) -> Path:
    """A folder with a random base."""
    llama.save(random_model(), tokenizer, tmp_path / "base")
    return tmp_path / "base"


class ScriptedEngine:
    """In place of recurse.Engine: contexts are lists of ids, and `write(ids so far)` gives the next one."""

    def __init__(self, write, max_seq_len: int = 100_000):
        self.write, self.max_seq_len, self.nbytes, self.greedy = write, max_seq_len, 0, True
        self.fed = 0

    def reset(self, n_rows):
        self.rows = [[] for _ in range(n_rows)]

    def rows_for(self, prompt_tokens, limits):
        return limits.batch

    def nbytes_for(self, rows, chunks):
        return 0

    def row_bytes(self, length):
        return 1

    @property
    def n_rows(self):
        return len(self.rows)

    def keep(self, rows, n_rows):
        self.rows = [self.rows[row] for row in rows] + [[] for _ in range(n_rows - len(rows))]

    def clear(self, row):
        self.rows[row] = []

    def take(self, row):
        return torch.tensor(self.rows[row], dtype=torch.long), torch.tensor([], dtype=torch.long)

    def put(self, row, saved):
        self.rows[row] = saved[0].tolist()

    def feed(self, rows, chunks, wanted=None):
        results = []
        for row, chunk, w in zip(rows, chunks, wanted or [1] * len(rows), strict=True):
            assert chunk, "a row was fed nothing"
            self.fed += len(chunk)
            n_given = len(chunk) - max(0, w - 1)
            self.rows[row] = self.rows[row] + chunk[:n_given]
            written = [self.write(self.rows[row])] if w else []
            for guess in chunk[n_given:]:
                if guess != written[-1]:
                    break
                self.rows[row] = [*self.rows[row], guess]
                written.append(self.write(self.rows[row]))
            results.append(written)
        return results


def perfect(tokenizer, method, task=Addition):
    """A writer that plays the oracle: it writes just what the training context of its prompt holds.

    Whatever it is asked to go on from must equal that training context token for token, or it fails.
    """
    recent = []  # examples, the latest first: contexts take turns, and to decode a long one for each token takes its time

    def write(ids):
        example = next((e for e in recent if ids == e.tokens[: len(ids)]), None)
        if example is None:
            head = tokenizer.sp.decode(ids).partition(ANSWER if method == "baseline" else SOLUTION)[0]
            example = train.encode(task.context(task.from_text(head), method), tokenizer)
            assert ids == example.tokens[: len(ids)], "the decoder's context is not the training context"
            recent.insert(0, example)
            del recent[64:]
        label = example.labels[len(ids) - 1]
        assert label != train.IGNORE, "the model was asked where nothing is to be predicted"
        return label

    return write
