"""The model against transformers, the cache against no cache, strict loading, the tokenizer's segments."""

import itertools
import random

import pytest
import torch
from conftest import BASE, LLAMA_TOKENIZER, random_model

import model as llama
from model import KVCache, LayerCache, Tokenizer
from tasks import METHODS, TASKS, Primer

SHAPES = [
    {},
    {"n_kv_heads": 4},
    {"n_kv_heads": 1, "head_dim": 16},
    {"tie_embeddings": True, "rope_theta": 500_000.0, "norm_eps": 1e-6},
]


@pytest.mark.parametrize("changes", SHAPES)
def test_logits_equal_transformers(changes, tokenizer, tmp_path):
    import transformers

    model = random_model(**changes)
    llama.save(model, tokenizer, tmp_path, dtype=torch.float32)
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    tokens = torch.randint(3, 512, (3, 300), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), theirs(tokens).logits, atol=1e-4, rtol=0)


def test_shipped_base_equals_transformers():
    import transformers

    model, tokenizer = llama.load(BASE)
    theirs = transformers.LlamaForCausalLM.from_pretrained(BASE, dtype=torch.float32).eval()
    context = Primer().training_context(random.Random(0))
    tokens = torch.tensor([tokenizer.start(context[0].text) + tokenizer.segment(context[1].text)])
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), theirs(tokens).logits, atol=1e-4, rtol=0)


def reference(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids]))[0]


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_in_training_equals_torchs(kv_heads, masked):
    """Outputs and gradients of the plain products, and of whichever way is taken on either side of both lengths."""
    generator = torch.Generator().manual_seed(3)
    for dtype, n in itertools.product((torch.float32, torch.bfloat16), (7, 512, 513, 1025)):
        q, k, v = (torch.randn(1, h, n, 16, generator=generator).to(dtype).requires_grad_() for h in (4, kv_heads, kv_heads))
        mask = torch.full((n, n), float("-inf"), dtype=dtype).triu(1) if masked else None
        repeated = [x.repeat_interleave(4 // kv_heads, dim=1).float() for x in (k, v)]
        out = torch.nn.functional.scaled_dot_product_attention(q.float(), *repeated, is_causal=True)
        expected = [out, *torch.autograd.grad(out.square().sum(), (q, k, v))]
        tolerance = dict(atol=1e-4, rtol=1e-4) if dtype == torch.float32 else dict(atol=0.15, rtol=0.05)
        for attend in (llama.attention, llama.plain_attention):
            out = attend(q, k, v, mask)
            found = [out, *torch.autograd.grad(out.float().square().sum(), (q, k, v))]
            for a, b in zip(found, expected, strict=True):
                torch.testing.assert_close(a.float(), b.float(), **tolerance)


@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("changes", SHAPES)
def test_cache_equals_no_cache(changes, by_row, monkeypatch):
    """One token, many tokens, many onto a non-empty cache, in ragged rows, on some rows only; padded, and each row by itself."""
    alone = []
    attend_by_row = LayerCache.attend_by_row
    monkeypatch.setattr(LayerCache, "CALL", 0 if by_row else 1e9)
    monkeypatch.setattr(LayerCache, "attend_by_row", lambda *x: alone.append(x) or attend_by_row(*x))
    model = random_model(**changes)
    rng = random.Random(2)
    sequences = [[rng.randrange(3, 512) for _ in range(60)] for _ in range(3)]
    expected = [reference(model, s) for s in sequences]
    cache = KVCache(model.config, 3, device="cpu", dtype=torch.float32)
    done = [0, 0, 0]
    for sizes in [(5, 17, 1), (1, 1, 1), (9, 3, 20), (1, 1, 1), (0, 4, 2), (4, 1, 7)]:
        width = max(sizes)
        chunks = [s[d : d + n] + [0] * (width - n) for s, d, n in zip(sequences, done, sizes, strict=True)]
        with torch.no_grad():
            logits = model(torch.tensor(chunks), cache=cache, n_new=torch.tensor(sizes))
        for row, n in enumerate(sizes):
            torch.testing.assert_close(logits[row, :n], expected[row][done[row] : done[row] + n], atol=2e-4, rtol=1e-4)
            done[row] += n
    rows = torch.tensor([2, 0])
    with torch.no_grad():
        tokens = torch.tensor([[sequences[r][done[r]]] for r in (2, 0)])
        logits = model(tokens, cache=cache, rows=rows, n_new=torch.tensor([1, 1]))
    assert len(alone) == (7 * model.config.n_layers if by_row else 0)
    for i, r in enumerate((2, 0)):
        torch.testing.assert_close(logits[i, 0], expected[r][done[r]], atol=2e-4, rtol=1e-4)
    assert cache.lengths.tolist() == [done[0] + 1, done[1], done[2] + 1]


def test_suspended_context_goes_on_exactly():
    """take, use the row for something else, put: the cache is the same bit for bit, the logits an undisturbed context's."""
    model = random_model()
    cache = KVCache(model.config, 2, device="cpu", dtype=torch.float32)
    ids = torch.arange(10, 40)[None].expand(2, -1)
    with torch.no_grad():
        model(ids, cache=cache)
        saved = cache.take(0)
        assert saved[0].shape[2] == 30, "a suspended context holds only the positions in use"
        cache.lengths[0] = 0
        model(torch.full((2, 50), 7), cache=cache, n_new=torch.tensor([50, 0]))
        assert not torch.equal(cache.take(0)[0][:, :, :30], saved[0])
        cache.put(0, saved)
        assert all(torch.equal(a, b) for a, b in zip(cache.take(0), saved, strict=True))
        logits = model(torch.full((2, 1), 9), cache=cache)
    torch.testing.assert_close(logits[0], logits[1], atol=1e-4, rtol=0)  # rows of a product may round differently


def test_outgrowing_the_context_is_an_error():
    model = random_model(max_seq_len=16)
    with pytest.raises(ValueError, match="exceeds"):
        model(torch.zeros(1, 17, dtype=torch.long))
    cache = KVCache(model.config, 1, device="cpu", dtype=torch.float32)
    model(torch.zeros(1, 16, dtype=torch.long), cache=cache)
    with pytest.raises(ValueError, match="exceeds"):
        model(torch.zeros(1, 1, dtype=torch.long), cache=cache)


def test_logits_only_where_selected():
    model = random_model()
    tokens = torch.randint(3, 512, (2, 9))
    select = torch.rand(2, 9) < 0.5
    assert torch.equal(model(tokens, select=select), model(tokens)[select])


def test_save_and_load(tokenizer, tmp_path):
    model = random_model()
    llama.save(model, tokenizer, tmp_path)
    again, tokens = llama.load(tmp_path)
    assert tokens.vocab_size == 512
    for (name, a), (_, b) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(a.bfloat16().float(), b), name
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")], "temporary files left"


needs_llamas_tokenizer = pytest.mark.skipif(not LLAMA_TOKENIZER.is_file(), reason=f"{LLAMA_TOKENIZER} is not there")


@pytest.mark.parametrize(
    "path", [BASE / "tokenizer.model", pytest.param(LLAMA_TOKENIZER, marks=needs_llamas_tokenizer)], ids=["shipped", "llama"]
)
def test_segments_stitch_to_the_text(path):
    """Stitched segments decode to the whole text; the ids are sentencepiece's where a boundary touches a newline or digit."""
    tokenizer, rng = Tokenizer(path), random.Random(0)
    for task, method in itertools.product(TASKS.values(), METHODS):
        for _ in range(40):
            context = task.training_context(rng, method)
            ids, text = tokenizer.start(context[0].text), context[0].text
            for segment in context[1:]:
                ids += tokenizer.segment(segment.text)
                assert tokenizer.decode(tokenizer.segment(segment.text)) == segment.text
                whole = tokenizer.start(text + segment.text)
                if text[-1] in "\n0123456789" or segment.text[0] in "\n0123456789":
                    assert tokenizer.start(text) + tokenizer.segment(segment.text) == whole
                text += segment.text
            assert tokenizer.sp.decode(ids) == text
    a, b = "73199 + 21439\nSolution: ", "9"  # a digit follows
    assert tokenizer.start(a) + tokenizer.segment(b) == tokenizer.start(a + b)
    assert tokenizer.start("1 + 2\n") + tokenizer.segment("Return: 3") == tokenizer.start("1 + 2\nReturn: 3")
    assert len(tokenizer.segment("4638")) == 4, "digits are single pieces, without a space before them"
    assert tokenizer.segment("") == []


@needs_llamas_tokenizer
def test_ids_of_llamas_own_tokenizer():
    """Those of the templates, pinned: an adapter trained by others knows them, and no other."""
    tokenizer = Tokenizer(LLAMA_TOKENIZER)
    pinned = {
        "73199 + 21439\nSolution: ": (
            [29955, 29941, 29896, 29929, 29929, 718, 29871, 29906, 29896, 29946, 29941, 29929, 13, 13296, 918, 29901, 29871]
        ),
        "Call: 3199 + 1439\n": [5594, 29901, 29871, 29941, 29896, 29929, 29929, 718, 29871, 29896, 29946, 29941, 29929, 13],
        "Return: Carry 0, Output 4638\nAnswer: ": (
            [11609, 29901, 1704, 719, 29871, 29900, 29892, 10604, 29871, 29946, 29953, 29941, 29947, 13, 22550, 29901, 29871]
        ),
        "Carry 0, Output 94638": [8179, 719, 29871, 29900, 29892, 10604, 29871, 29929, 29946, 29953, 29941, 29947],
        "What is the parity of [0, 1]?\nAnswer: ": (
            [5618, 338, 278, 610, 537, 310, 518, 29900, 29892, 29871, 29896, 29962, 29973, 13, 22550, 29901, 29871]
        ),
        "Create dp array [3, -2]": [4391, 270, 29886, 1409, 518, 29941, 29892, 448, 29906, 29962],
    }
    for text, ids in pinned.items():
        assert tokenizer.segment(text) == ids, text


def test_decode_never_fails(tokenizer):
    rng = random.Random(0)
    for _ in range(300):
        assert isinstance(tokenizer.decode([rng.randrange(600) for _ in range(rng.randrange(30))]), str)
