"""Text, perplexity, tasks, samples, `evaluate`: odd sources, faults, architectures, real data."""
import itertools, json, math, os, socket, sys
from pathlib import Path

import pytest, torch
from datasets import Dataset, DatasetDict, IterableDataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (AutoModelForCausalLM, BertConfig, BertForMaskedLM, BertModel,
                          Gemma2Config, GPT2Config, LlamaConfig, OPTConfig,
                          PreTrainedConfig, PreTrainedTokenizerFast, Qwen2Config, ViTConfig,
                          ViTForImageClassification)

from fips_nb.learn.augmentation import own_text
from fips_nb.measure.evaluation import evaluate
from fips_nb.data.calibration import given_batches
from fips_nb.round.code import code_model
from fips_nb.store.hub import load, save
from fips_nb.measure.tasks import evaluate_tasks, repetition, samples
from fips_nb.data.text import (TextBatches, context_length, documents, enough_windows,
                               open_tokenizer, pick_windows, tokenize, window_length)
from fips_nb.measure.perplexity import cosine_similarity, perplexity, window_sums

DATA = os.environ.get("FIPS_NB_DATA")
real = pytest.mark.skipif(not DATA, reason="FIPS_NB_DATA is not set")
DOCS = ["The cat sat on the mat.", "Ein Käse, zwei Käse: größer.", "日本語のテキスト",
        "def f(x):\n    return x\n", "a" * 300, "The dog sat on the log. " * 20,
        " ".join(str(i*i) for i in range(100)), "Quux & Zyx!"]
TOKENS = dict(vocab_size=300, bos_token_id=0, eos_token_id=0)
SMALL = TOKENS | dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                      num_attention_heads=4, pad_token_id=0)


def refused(match): return pytest.raises(ValueError, match=match)


def make_tokenizer(bos=False):
    "A byte-level BPE of 300 tokens; with `bos` it starts each text with it, as Llama's does."
    t = Tokenizer(models.BPE())
    t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    t.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    t.train_from_iterator(DOCS, trainers.BpeTrainer(vocab_size=300, show_progress=False,
                                                    special_tokens=["<|end|>", "<s>"],
                                                    initial_alphabet=alphabet))
    start = dict(single="<s> $A", special_tokens=[("<s>", 1)])
    if bos: t.post_processor = processors.TemplateProcessing(**start)
    more = dict(bos_token="<s>") if bos else {}
    return PreTrainedTokenizerFast(tokenizer_object=t, eos_token="<|end|>", **more)


def llama(**kw):
    config = LlamaConfig(**SMALL | dict(max_position_embeddings=64) | kw)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture(scope="module")
def tok(): return make_tokenizer()


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return llama()


@pytest.fixture(scope="module")
def other():
    torch.manual_seed(1)
    return llama()


# ---- sources ----

def test_file_with_bom_windows_newlines_and_empty_documents(tmp_path):
    text = "\ufeffone\r\ntwo<|endoftext|>\r\n \r\n<|endoftext|>three"
    (tmp_path/"a.txt").write_bytes(text.encode())
    assert documents(tmp_path/"a.txt") == ["one\ntwo", "three"]


def test_folder_takes_text_files_in_order_and_nothing_else(tmp_path):
    (tmp_path/"sub").mkdir()
    files = {"b.md": "B", "sub/c.txt": "C", "a.txt": "A", ".hidden.txt": "no", "x.py": "no",
             "d.jsonl": '{"text": "D"}\n\n{"text": "E"}'}
    for name, text in files.items(): (tmp_path/name).write_text(text)
    assert documents(tmp_path) == ["A", "B", "D", "E", "C"]


def test_strings_are_text_unless_all_are_files(tmp_path):
    (tmp_path/"a.txt").write_text("A")
    name = str(tmp_path/"a.txt")
    assert documents([name]) == ["A"] and documents([name, "other"]) == [name, "other"]
    for text in ("x" * 5000, "nul\0byte", ""): assert documents([text]) == [text]


def test_lines_follow_the_published_rows_of_wikitext(tmp_path):
    (tmp_path/"wiki.txt").write_text(" \n = A = \n \n one\u2028two\x85 \n", encoding="utf-8")
    rows = documents(tmp_path/"wiki.txt", lines=True)
    assert rows == ["", " = A = \n", "", " one\u2028two\x85 \n"] # only newlines end a line
    assert "\n\n".join(rows) == "\n\n = A = \n\n\n\n\n one\u2028two\x85 \n"


@pytest.mark.parametrize("make, word", [
    (lambda d: d/"gone.txt", "no file or folder"),
    (lambda d: "", "goes into a list"),
    (lambda d: "one text " * 999, "goes into a list"),
    (lambda d: DatasetDict(train=Dataset.from_dict(dict(text=["a"]))),
     r"dict of train; pass one of its splits"),
    (lambda d: Dataset.from_dict(dict(body=["a"], id=[1])), "no column 'text'; there are body, id"),
    (lambda d: Dataset.from_dict({}), "no column 'text'"),
    (lambda d: [dict(body="a")], "no column 'text'; there are body"),
])
def test_sources_that_are_refused(tmp_path, make, word):
    with refused(word): list(documents(make(tmp_path)))


def test_stream_without_the_column():
    "A stream from a generator does not say its columns before the first row."
    ds = IterableDataset.from_generator(lambda: iter([dict(body="a")]))
    with refused("no column 'text'; there are body"):
        list(documents(ds))


@pytest.mark.parametrize("line", ['{"body": "b"}', '{"text": ', '["text"]', '3'])
def test_broken_jsonl_names_the_line(tmp_path, line):
    (tmp_path/"a.jsonl").write_text('{"text": "a"}\n' + line)
    with refused("line 2 of .*a.jsonl"):
        documents(tmp_path/"a.jsonl")


def test_missing_values_in_a_column(tok):
    with refused("document 1 is no text but None"):
        tokenize(documents(Dataset.from_dict(dict(text=["a", None]))), tok)


# ---- tokens ----

@pytest.mark.parametrize("bos", [False, True])
def test_marks_between_documents(bos):
    t = make_tokenizer(bos)
    tokens, n_bytes = tokenize(DOCS, t)
    mark = 1 if bos else 0
    assert n_bytes == sum(len(d.encode()) for d in DOCS)
    assert (tokens == mark).sum() == len(DOCS) - (not bos)
    assert (tokens[0] == mark).item() == bos
    assert t.decode(tokens).split("<s>" if bos else "<|end|>")[bos:] == DOCS
    joined, _ = tokenize(DOCS, t, join="\n\n")
    assert t.decode(joined, skip_special_tokens=True) == "\n\n".join(DOCS)
    assert (joined == mark).sum() == bos


def test_more_documents_than_are_encoded_at_once(tok):
    many = [f"{d} {i}" for i in range(20) for d in DOCS]
    assert tok.decode(tokenize(many, tok)[0]).split("<|end|>") == many


def test_long_text_gives_no_warning(tok, caplog):
    t = make_tokenizer()
    t.model_max_length = 8
    tokenize(["word " * 500], t)
    assert not caplog.records


TEMPLATE = ("{% for m in messages %}"
            "{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
            "[{{ m.role }}] {{ m.content }}<|end|>{% endfor %}"
            "{% if add_generation_prompt %}[assistant]{% endif %}")
TALK = [dict(role="user", content="hi"), dict(role="assistant", content="hello")]


def talks(): return Dataset.from_dict(dict(messages=[TALK, TALK]))


@pytest.mark.parametrize("make", [
    lambda: [TALK, TALK], lambda: [dict(messages=TALK)]*2, talks,
    lambda: talks().to_iterable_dataset(),
], ids=["list", "dicts", "dataset", "stream"])
def test_conversations(make):
    t = make_tokenizer(bos=True)
    t.chat_template = TEMPLATE
    tokens, _ = tokenize(documents(make(), chat=True), t, chat=True)
    # no BOS beside the template's own marks
    assert t.decode(tokens) == "[user] hi<|end|>[assistant] hello<|end|>" * 2
    assert TextBatches(make(), t, 4, n=2, chat=True).windows.shape == (2, 4)


def test_conversations_that_are_refused(tok):
    t = make_tokenizer()
    t.chat_template = TEMPLATE
    with refused("conversation 1 does not fit the chat template .*no system role"):
        tokenize([TALK, [dict(role="system", content="x")]], t, chat=True)
    with refused("has no chat template"):
        TextBatches([TALK], tok, 4, n=1, chat=True)
    with refused("texts and conversations are not mixed"):
        tokenize(["a text", TALK], t)
    assert torch.equal(tokenize([TALK], t)[0], tokenize([TALK], t, chat=True)[0])


def test_no_tokenizer_in_the_folder(tmp_path, model):
    model.save_pretrained(tmp_path)
    with refused("no tokenizer in .*tokenizer.json"):
        open_tokenizer(tmp_path)
    (tmp_path/"tokenizer.json").write_text("{")
    with refused("cannot be opened"):
        open_tokenizer(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    ids = [t("The cat")["input_ids"] for t in (open_tokenizer(str(tmp_path)), make_tokenizer())]
    assert ids[0] == ids[1]


# ---- windows ----

@pytest.mark.parametrize("n_tokens, length, n", [
    (64, 64, 1), (640, 64, 10), (641, 64, 10), (5000, 64, 3), (130, 64, None),
])
def test_windows_do_not_overlap(n_tokens, length, n):
    for seed in range(5):
        w = pick_windows(n_tokens, length, n, seed)
        assert len(w) == (n or 2) and w[0] >= 0 and w[-1] + length <= n_tokens
        assert all(b - a >= length for a, b in zip(w, w[1:]))


def test_a_context_that_is_none():
    "XLNet says -1."
    odd = torch.nn.Module()
    odd.config = PreTrainedConfig(max_position_embeddings=-1)
    assert context_length(odd) is None and window_length(odd, 64) == 64 and window_length(odd) == 2048


def test_windows_are_uniform():
    "All 10 positions of one window are equally likely: 4000 draws, 5 standard deviations."
    starts = torch.tensor([pick_windows(19, 10, 1, s)[0] for s in range(4000)])
    seen = torch.bincount(starts, minlength=10)
    assert (seen - 400).abs().max() < 5*(4000*.1*.9)**.5


def test_too_little_text(tok, model):
    n = len(tokenize(DOCS, tok)[0])
    with refused(f"100 windows of 64 tokens need 6400 tokens, and the text has {n}; .*n={n//64}"):
        TextBatches(DOCS, tok, 64, n=100)
    with refused("a window of 64 tokens needs 64 tokens, and the text has 3"):
        TextBatches(torch.tensor([1, 2, 3]), length=64, n=None)
    assert TextBatches(DOCS, tok, 64, n=100, overlap=True).windows.shape == (100, 64)
    assert len(set(pick_windows(n, 64, 100, overlap=True))) == 100
    assert TextBatches(DOCS, tok, 64, n=100, fewer=True).windows.shape == (n//64, 64)
    for empty in ([], [""], ["\n \n"]):
        with refused("text is empty"):
            TextBatches(empty, tok, 4, n=1)
        with refused("text is empty"):
            perplexity(model, tok, empty)


def test_batches_are_seeded_and_follow_the_model(tok, model):
    a, b, c = (TextBatches(DOCS, tok, n=4, batch_size=3, seed=s, model=model) for s in (0, 0, 1))
    assert a.length == 64 and [len(x) for x in a] == [3, 1] and len(a) == 2
    assert torch.equal(a.windows, b.windows) and torch.equal(a.windows, torch.cat(list(a)))
    assert not torch.equal(a.windows, c.windows)
    wrong = ((dict(length=65), "longer than the model's context of 64"),
             (dict(length=1), "predicts nothing"), (dict(rows=1), "no option 'rows'"))
    for kw, word in wrong:
        with refused(word): TextBatches(DOCS, tok, **kw, model=model)
    with refused("belongs to another model"):
        TextBatches(torch.arange(301), length=8, n=2, model=model)


def test_only_the_text_that_is_needed_is_read(tok):
    read = []
    def stream():
        for i in range(10**6):
            read.append(i)
            yield f"story {i} " * 20
    assert TextBatches(stream(), tok, 32, n=10).windows.shape == (10, 32) and len(read) < 100


def test_moments_are_collected_over_the_windows(tok):
    "160 tokens of windows make 160 rows of the second moment."
    from fips_nb.grouping import LinearSpec
    from fips_nb.share.statistics import collect_moments
    m = llama()
    name = "model.layers.0.mlp.up_proj"
    windows = TextBatches(DOCS, tok, 16, n=10, model=m)
    got = collect_moments(m, windows, [LinearSpec(name, "up", 32, 48)])[name]
    assert got.n == 160 and got.C.shape == (32, 32)


# ---- perplexity ----

@pytest.mark.parametrize("config", [
    LlamaConfig(**SMALL, max_position_embeddings=64),
    Qwen2Config(**SMALL, max_position_embeddings=64, num_key_value_heads=2),
    Gemma2Config(**SMALL, max_position_embeddings=64, head_dim=8, num_key_value_heads=2,
                 query_pre_attn_scalar=8),
    GPT2Config(**TOKENS, n_embd=32, n_layer=1, n_head=4, n_positions=64),
    OPTConfig(**TOKENS, hidden_size=32, ffn_dim=48, num_hidden_layers=1, num_attention_heads=4,
              max_position_embeddings=64, word_embed_proj_dim=32, pad_token_id=0),
], ids=lambda c: c.model_type)
def test_architectures_agree_with_their_own_loss(config, tok):
    m = AutoModelForCausalLM.from_config(config).train()
    tokens, _ = tokenize(DOCS, tok)
    got = perplexity(m, tok, DOCS)
    assert m.training and context_length(m) == 64 == got["window"]
    m.eval()
    with torch.no_grad():
        parts = [(m(w[None], labels=w[None]).loss.item(), len(w) - 1)
                 for w in tokens.split(64) if len(w) > 1]
    assert got["n_tokens"] == sum(n for _, n in parts)
    assert got["loss"] == pytest.approx(sum(l*n for l, n in parts)/got["n_tokens"], rel=1e-5)


def test_window_of_one_token_at_the_end_predicts_nothing(model):
    got = perplexity(model, None, torch.arange(65) + 5)
    assert (got["n_tokens"], got["n_windows"], got["stderr"]) == (63, 1, None)
    assert "bits_per_byte" not in got


def test_given_windows(model):
    w = torch.randint(300, (7, 20), generator=torch.Generator().manual_seed(0))
    got = perplexity(model, None, w)
    assert (got["n_tokens"], got["n_windows"], got["window"]) == (7*19, 7, 20)
    assert perplexity(model, None, w.flatten(), length=20) == pytest.approx(got)
    with refused("have 20 tokens, not 10"):
        perplexity(model, None, w, length=10)
    with refused("context of 64"):
        perplexity(model, None, torch.ones(2, 65, dtype=torch.long))


def test_bos_in_front_of_each_window(model):
    t = make_tokenizer(bos=True)
    tokens, n_bytes = tokenize(DOCS, t)
    got = perplexity(model, t, DOCS, bos=True)
    assert got["n_tokens"] == len(tokens) - 1 # all but the BOS that the text began with
    assert got["n_bytes"] == n_bytes
    assert got["bits_per_byte"] == pytest.approx(got["loss"]*got["n_tokens"]/math.log(2)/n_bytes)
    rows = [torch.cat([torch.tensor([1]), w]) for w in tokens[1:].split(63)]
    with torch.no_grad():
        want = sum(nn.functional.cross_entropy(model(r[None]).logits[0, :-1], r[1:],
                                               reduction="sum").item() for r in rows)
    assert got["loss"]*got["n_tokens"] == pytest.approx(want, rel=1e-5)
    with refused("has a BOS token"):
        perplexity(model, make_tokenizer(), DOCS, bos=True)


def test_comparison_does_not_depend_on_batches(tok, model, other):
    a, b = (perplexity(model, tok, DOCS, length=32, dense=other, batch_size=k) for k in (1, 7))
    assert a == pytest.approx(b, rel=1e-4)
    assert a["difference"] == pytest.approx(a["loss"] - a["dense_loss"])
    swapped = perplexity(other, tok, DOCS, length=32, dense=model)
    assert swapped["difference"] == pytest.approx(-a["difference"], rel=1e-4)
    assert swapped["difference_stderr"] == pytest.approx(a["difference_stderr"], rel=1e-4)
    assert a["dense_perplexity"] == pytest.approx(swapped["perplexity"], rel=1e-5)


def test_float32_copies_of_logits_are_small():
    "A vocabulary of Llama 3's size: nothing in float32 is larger than the pieces asked for."
    class Largest(TorchDispatchMode):
        most = 0
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            wide = torch.is_tensor(out) and out.dtype in (torch.float32, torch.float64)
            if wide and "view" not in str(func): self.most = max(self.most, out.numel())
            return out
    g = torch.Generator().manual_seed(0)
    V = 128256
    z, ref = (torch.randn(1, 40, V, generator=g).bfloat16() for _ in range(2))
    x = torch.randint(V, (1, 40), generator=g)
    with Largest() as seen:
        got = window_sums(z, x, ref, most=8*V)
    assert seen.most == 8*V
    q, p = z[0, :-1].float().log_softmax(-1), ref[0, :-1].float().log_softmax(-1)
    y = x[0, 1:, None]
    want = torch.stack([-q.gather(1, y).sum(), -p.gather(1, y).sum(), (p.exp()*(p - q)).sum(),
                        (p.argmax(1) == q.argmax(1)).float().sum()])
    torch.testing.assert_close(got[0].float(), want, rtol=1e-4, atol=1e-3)


def test_masked_vocabulary_does_not_break_the_divergence():
    z = torch.randn(1, 5, 9)
    z[..., 7:] = -math.inf
    got = window_sums(z, torch.zeros(1, 5, dtype=torch.long), z.clone())
    assert got.isfinite().all() and got[0, 2] == 0 and got[0, 3] == 4


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_broken_logits_are_named_with_their_window(tok, value):
    m = llama()
    tokens, _ = tokenize(DOCS, tok)
    early = tokens[:128].tolist()
    # window k//64 is the first that sees this token
    k = next(i for i, t in enumerate(tokens.tolist()) if i > 130 and t not in early)
    m.get_input_embeddings().weight.data[tokens[k]] = value
    for size in (1, 3):
        with refused(f"logits of the model hold NaN or infinity in window {k//64}"):
            perplexity(m, tok, DOCS, batch_size=size)
    with refused("logits of the dense model"):
        perplexity(llama(), tok, DOCS, dense=m)


def test_models_without_a_perplexity(tok):
    config = BertConfig(**SMALL, max_position_embeddings=64)
    with refused("BertForMaskedLM sees the tokens"):
        perplexity(BertForMaskedLM(config), tok, DOCS)
    with refused("BertModel gives no logits"):
        perplexity(BertModel(config), tok, DOCS)
    with refused(r"gives logits \(\d+, 2\)"):
        pooled = nn.Sequential(nn.Embedding(300, 4), nn.Flatten(), nn.Linear(4*16, 2))
        perplexity(pooled, tok, DOCS, length=16)


@pytest.mark.parametrize("call, word", [
    (lambda m, t: perplexity(m, t, DOCS, length=65), "context of 64; take 64 or fewer"),
    (lambda m, t: perplexity(m, None, DOCS), "needs the model's tokenizer"),
    (lambda m, t: perplexity(llama(vocab_size=256), t, DOCS),
     "outside the model's vocabulary 0..255: this tokenizer belongs to another model"),
    (lambda m, t: perplexity(m, None, torch.tensor([3, -100, 4])), "token -100 is outside"),
    (lambda m, t: perplexity(m, None, torch.rand(9)), "tokens are integers"),
    (lambda m, t: perplexity(m, None, torch.zeros(0, dtype=torch.long)), "text is empty"),
    (lambda m, t: perplexity(m, t, ["a"]), "needs 2 tokens, and the text has 1"),
    (lambda m, t: perplexity(m, t, DOCS, joined=" "), "no option 'joined'; it has column, lines"),
    (lambda m, t: samples(m, t, [""]), "prompt is empty"),
    (lambda m, t: samples(m, t, ["a"], n_tokens=64), "exceed the context of 64; pass n_tokens=63"),
    (lambda m, t: samples(nn.Embedding(300, 300), t, ["a"]), "cannot generate"),
    (lambda m, t: samples(m, t, [TALK]), "has no chat template"),
])
def test_what_is_refused(call, word, model, tok):
    with refused(word): call(model, tok)


# ---- calibration of large models ----

def test_a_large_model_gets_the_windows_that_can_be_computed():
    shape = dict(vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
                 num_attention_heads=32, num_key_value_heads=8, tie_word_embeddings=True)
    with torch.device("meta"): big = AutoModelForCausalLM.from_config(LlamaConfig(**shape))
    n = enough_windows(big, 2048)
    assert 8 <= n < 32 and n * 2048 > 16_000 # a CPU has hours, not days
    assert enough_windows(big, 2048, "cuda") == 128


@pytest.mark.parametrize("source", [lambda t: DOCS, lambda t: tokenize(DOCS, t)[0]])
def test_windows_that_start_with_bos(source):
    t = make_tokenizer(bos=True)
    w = TextBatches(source(t), t, 8, n=20, bos=True).windows
    assert w.shape == (20, 8) and (w[:, 0] == 1).all()
    with refused("has a BOS token"): TextBatches(source(t), make_tokenizer(), 8, n=20, bos=True)


def test_joined_text_is_calibrated_in_its_order(tok):
    whole, _ = tokenize(DOCS, tok, join="\n\n")
    w = TextBatches(DOCS, tok, 50, n=None, join="\n\n").windows
    text = whole.tolist()
    assert all(any(text[i:i+50] == r for i in range(len(text))) for r in w.tolist())


# ---- encoders ----

def test_cosine_similarity_takes_no_notice_of_padding(tok):
    torch.manual_seed(0)
    a, b = (BertModel(BertConfig(**SMALL, max_position_embeddings=64)).train() for _ in range(2))
    one, many = (cosine_similarity(a, tok, DOCS, dense=b, batch_size=k) for k in (1, 5))
    assert a.training and b.training and one == pytest.approx(many, abs=1e-5) and one["n"] == 8
    rows = [dict(body=d) for d in DOCS]
    assert cosine_similarity(a, tok, rows, dense=b, column="body") == pytest.approx(one, abs=1e-5)
    with refused("document 0 is no text"): cosine_similarity(a, tok, [3], dense=b)


# ---- one function for all ----

def test_evaluate_chooses_by_model_and_data(tok, model, other, tmp_path):
    (tmp_path/"a.txt").write_text(DOCS[5])
    for data in (str(tmp_path/"a.txt"), tmp_path/"a.txt", [DOCS[5]], iter([DOCS[5]]),
                 Dataset.from_dict(dict(text=[DOCS[5]]))):
        got = evaluate(model, data, tokenizer=tok, length=32)
        assert got == perplexity(model, tok, [DOCS[5]], length=32)
    assert evaluate(model, [TALK], other, chat_tokenizer(), chat=True)["n_tokens"] > 1
    assert evaluate(model, torch.arange(100), device="cpu")["n_tokens"] == 98


def chat_tokenizer():
    t = make_tokenizer()
    t.chat_template = TEMPLATE
    return t


def test_evaluate_knows_vision_models_of_transformers():
    config = ViTConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=1, image_size=32,
                       num_attention_heads=2, num_labels=3)
    m, x = ViTForImageClassification(config), torch.randn(5, 3, 32, 32)
    assert evaluate(m, [(x, torch.tensor([0, 1, 2, 0, 1]))])["classes"] == 3
    rows = [dict(pixel_values=x, labels=torch.tensor([0, 1, 2, 0, 1]))]
    assert evaluate(m, rows, dense=m)["agreement"] == 1
    with refused("takes images, and the data is text; pass ImageBatches"):
        evaluate(m, DOCS)


@pytest.mark.parametrize("call, word", [
    (lambda m, t: evaluate(m, DOCS), "pass tokenizer="),
    (lambda m, t: evaluate(m, [torch.rand(2, 3, 8, 8)]), "reads tokens"),
    (lambda m, t: evaluate(m, torch.rand(2, 3, 8, 8)), "pass a list of batches"),
    (lambda m, t: evaluate(m, [torch.ones(2, 8).long()]), "torch.cat"),
    (lambda m, t: evaluate(m.model, DOCS, tokenizer=t), "LlamaModel is an encoder, .* pass dense="),
    (lambda m, t: evaluate(m, DOCS, tokenizer=t, dense=BertModel(BertConfig(**SMALL))),
     "gives no logits"),
    (lambda m, t: evaluate(m, DOCS, tokenizer=t, lenght=3), "perplexity has no option 'lenght'"),
    (lambda m, t: evaluate("small", DOCS), "open a folder with fips_nb.load"),
])
def test_evaluate_names_the_mend(call, word, model, tok):
    with refused(word): call(model, tok)


# ---- samples ----

def test_samples_side_by_side(tok, model, other):
    rows = samples(model, tok, ["The cat", "def f"], dense=other, n_tokens=20)
    assert [r["prompt"] for r in rows] == ["The cat", "def f"]
    for r, s in zip(rows, samples(other, tok, ["The cat", "def f"], n_tokens=20)):
        assert (r["dense_text"], r["dense_repeats"]) == (s["text"], s["repeats"])


def test_samples_of_a_conversation_begin_with_the_answer(model):
    t = make_tokenizer()
    t.chat_template = TEMPLATE
    got = samples(model, t, [TALK[:1]], n_tokens=5)[0]
    x = t("[user] hi<|end|>[assistant]", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        first = model(x).logits[0, -1].argmax()
    assert got["text"].startswith(t.decode([first], skip_special_tokens=True))


def test_the_models_own_settings_are_put_back(tok):
    m = llama().train()
    own = m.generation_config
    samples(m, tok, ["The"], n_tokens=3)
    with pytest.raises(ValueError): samples(m, tok, ["The"], n_tokens=999)
    assert m.generation_config is own and m.training


@pytest.mark.parametrize("settings", [
    dict(temperature=.3), dict(top_p=.5), dict(min_p=.1), dict(repetition_penalty=2.), dict(no_repeat_ngram_size=1),
    dict(num_return_sequences=3, do_sample=True), dict(num_beams=2), dict(return_dict_in_generate=True, output_scores=True),
    dict(stop_strings=["a"]), dict(suppress_tokens=[5, 6]), dict(begin_suppress_tokens=[3, 4]), dict(max_time=1e-4),
    dict(sequence_bias=[[[5], 9.]]), dict(guidance_scale=2.), dict(cache_implementation="static")], ids=str)
def test_text_of_its_own_takes_no_settings_of_the_model(model, settings):
    m, windows = llama(), torch.randint(1, 300, (3, 12), generator=torch.Generator().manual_seed(0))
    m.load_state_dict(model.state_dict())
    def text():
        torch.manual_seed(0)
        return own_text(m, windows)
    want, own = text(), m.generation_config
    own.update(**settings)
    assert torch.equal(text(), want) and m.generation_config is own


def test_invalid_settings_of_generation_do_not_stop_a_save(tmp_path):
    llama().save_pretrained(tmp_path/"dense")
    settings = dict(do_sample=False, temperature=.6, top_p=.9, eos_token_id=0)
    (tmp_path/"dense"/"generation_config.json").write_text(json.dumps(settings))
    m = AutoModelForCausalLM.from_pretrained(tmp_path/"dense").eval()
    n = sum(p.numel() for p in m.parameters())
    res = code_model(m, list(torch.randint(1, 300, (4, 2, 48))), 6*n//8, 0)
    folder = save(res.model, tmp_path/"small")
    kept = json.loads((folder/"generation_config.json").read_text())
    assert {k: kept[k] for k in settings} == settings
    assert load(folder).generation_config.temperature == .6


@pytest.mark.parametrize("tokens, n, want", [
    ([], 4, 0.), ([1, 2, 3], 4, 0.), ([1, 2, 3, 4], 4, 0.), ([1]*7, 4, .75),
    ([1, 2, 3]*4, 3, 1 - 3/10),
])
def test_repetition(tokens, n, want): assert repetition(tokens, n) == pytest.approx(want)


# ---- tasks ----

def test_missing_lm_eval_names_the_extra(monkeypatch, tok, model):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ImportError, match=r"fips_nb\[eval\]"): evaluate_tasks(model, tok, ["any"])


def write_task(folder, rows, name="cloze"):
    lines = [json.dumps(dict(start=s, ends=e)) for s, e in rows]
    (folder/f"{name}.jsonl").write_text("\n".join(lines))
    (folder/f"{name}.yaml").write_text(f"""task: {name}
dataset_path: json
dataset_kwargs: {{data_files: "{folder}/{name}.jsonl", cache_dir: "{folder}/cache"}}
test_split: train
output_type: multiple_choice
doc_to_text: start
doc_to_choice: ends
doc_to_target: 0
target_delimiter: ""
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
""")


def refuse(*args, **kwargs): raise AssertionError("the network was touched")


@pytest.fixture
def offline(monkeypatch):
    for name in ("getaddrinfo", "create_connection"): monkeypatch.setattr(socket, name, refuse)


def test_bridge_to_lm_eval(tmp_path, offline, tok, model):
    pytest.importorskip("lm_eval", reason="lm_eval is not installed (pip install 'fips_nb[eval]')")
    words = itertools.product(("cat", "dog"), ("mat", "log"), ("x", "Käse", "return"))
    rows = [(f"The {a} sat on the", [f" {b}.", f" {c}."]) for a, b, c in words]
    write_task(tmp_path, rows)
    model.train()
    state = torch.get_rng_state()
    got = evaluate_tasks(model, tok, ["cloze"], folder=tmp_path)
    assert model.training and torch.equal(state, torch.get_rng_state())
    model.eval()
    def score(s, e):
        x = torch.tensor(tok(s + e)["input_ids"])
        k = len(x) - len(tok(s)["input_ids"])
        with torch.no_grad():
            p = model(x[None, :-1]).logits[0].log_softmax(-1)
        return p[-k:].gather(1, x[-k:, None]).sum().item()
    right = sum(score(s, e[0]) > score(s, e[1]) for s, e in rows)
    error = got["cloze"]["acc_stderr"]
    assert got == {"cloze": dict(acc=pytest.approx(right/12), acc_stderr=error, n=12)}
    assert evaluate_tasks(model, tok, ["cloze"], folder=tmp_path, limit=5)["cloze"]["n"] == 5
    with refused("there is no task 'close'; the nearest are cloze"):
        evaluate_tasks(model, tok, ["close"], folder=tmp_path)


# ---- real weights and text ----

@pytest.fixture(scope="module")
def stories():
    d = Path(DATA)/"stories260k"
    return AutoModelForCausalLM.from_pretrained(d), open_tokenizer(d)


@real
def test_real_perplexity(stories):
    """A row of the page Perplexity, and the figure that came with the data: blank lines, whole
    windows only, 512 tokens counted in each."""
    m, t = stories
    first = documents(Path(DATA)/"text/tinystories_eval.txt")[:100]
    got = perplexity(m, t, first)
    assert got["perplexity"] == pytest.approx(4.416, abs=.002)
    assert (got["n_tokens"], got["window"]) == (45666, 512)
    tokens, _ = tokenize(first, t, join="\n\n")
    whole = perplexity(m, None, tokens[:len(tokens)//512*512])
    assert math.exp(whole["loss"]*511/512) == pytest.approx(4.66, abs=.005)


@real
def test_real_calibration(stories):
    m, t = stories
    calib = TextBatches(Path(DATA)/"text/tinystories_calib.txt", t, n=64, batch_size=16, model=m)
    assert calib.windows.shape == (64, 512)
    assert perplexity(m, None, calib.windows)["perplexity"] == pytest.approx(4.5, abs=.3)


@real
def test_real_task(tmp_path, offline, stories):
    "The end of a story against the end of the next: a trained model knows which."
    pytest.importorskip("lm_eval", reason="lm_eval is not installed (pip install 'fips_nb[eval]')")
    m, t = stories
    every = documents(Path(DATA)/"text/tinystories_eval.txt")
    docs = [d for d in every if 400 < len(d) < 900][:100]
    cut = [(d[:d.rfind(" ", 0, 200)], d[d.rfind(" ", 0, 200):][:80]) for d in docs]
    write_task(tmp_path, [(s, [e, cut[(i + 1) % len(cut)][1]]) for i, (s, e) in enumerate(cut)])
    got = evaluate_tasks(m, t, ["cloze"], folder=tmp_path)["cloze"]
    assert got["acc"] > .8 and got["n"] == len(docs)


def test_rows_of_files_are_parsed(tmp_path):
    "Text never keeps the syntax of its file, and conversations are found without being announced."
    said = ["one", "two\nlines"]
    chat = [[dict(role="user", content=s)] for s in said]
    (tmp_path/"a.jsonl").write_text("\n".join(json.dumps(dict(messages=m)) for m in chat))
    (tmp_path/"b.json").write_text(json.dumps([dict(text=s, n=1) for s in said]))
    (tmp_path/"c.json").write_text(json.dumps(said))
    (tmp_path/"d.csv").write_text('id,text\n1,one\n2,"two\nlines"\n')
    assert documents(tmp_path/"a.jsonl") == chat
    for name in ("b.json", "c.json", "d.csv"): assert documents(tmp_path/name) == said
    (tmp_path/"e.json").write_text('{"text": "one"}')
    with pytest.raises(ValueError, match="e.json is no list of texts"): documents(tmp_path/"e.json")
    (tmp_path/"f.csv").write_text("id,body\n1,one\n")
    with pytest.raises(ValueError, match="no column 'text'; there are id, body"): documents(tmp_path/"f.csv")
    pyarrow = pytest.importorskip("pyarrow") # comes with datasets, of the test extra
    from pyarrow import parquet
    parquet.write_table(pyarrow.table(dict(text=said)), tmp_path/"g.parquet")
    assert documents(tmp_path/"g.parquet") == said


def test_rows_of_token_ids_are_batches():
    rows = [dict(input_ids=[1, 2, 3]), dict(input_ids=[4, 5, 6]), dict(input_ids=[7])]
    batches, n = given_batches(rows, 2)
    assert n == 3 and batches[0].tolist() == [[1, 2, 3], [4, 5, 6]] and batches[1].tolist() == [[7]]
    (padded,), _ = given_batches(rows, 3)
    assert padded["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 1], [1, 0, 0]]
    assert padded["input_ids"].tolist() == [[1, 2, 3], [4, 5, 6], [7, 0, 0]]


def test_strings_without_a_tokenizer_are_refused_by_its_name(home):
    import fips_nb
    from transformers import AutoModelForCausalLM
    with pytest.raises(ValueError, match="read with its tokenizer; pass that as processor="):
        fips_nb.compress(AutoModelForCausalLM.from_pretrained(home/"llama"), ["some text"])
