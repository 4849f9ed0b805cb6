"""What people do with a model, for every form that a model has here: each cell is right, or refused by a sentence.

`test_matrix.py` proves `matrix.json`, and the page nbs/about/right_or_refused.ipynb shows it. After a change that is
meant: `python tests/matrix.py` fills the file again.
"""
import argparse
import contextlib
import copy
import io
import json
import multiprocessing
import pickle
import shutil
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path
from unittest.mock import patch

import torch
from torch import nn

FILE = Path(__file__).with_name("matrix.json")
WIDE = dict(hidden_size=32, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4)
WORDS = WIDE | dict(vocab_size=96, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2)
LLAMA = WORDS | dict(num_key_value_heads=2)
MOE = LLAMA | dict(head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
GPT2 = dict(vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=64, pad_token_id=0, bos_token_id=1, eos_token_id=2)
T5 = dict(vocab_size=96, d_model=32, d_kv=8, d_ff=80, num_layers=1, num_heads=4, pad_token_id=0, eos_token_id=2,
          decoder_start_token_id=0)
TRANSFORMERS = {
    "Llama": ("LlamaForCausalLM", LLAMA),
    "Llama, tied": ("LlamaForCausalLM", LLAMA | dict(tie_word_embeddings=True)),
    "GPT-2": ("GPT2LMHeadModel", GPT2), "T5": ("T5ForConditionalGeneration", T5),
    "Qwen3 MoE": ("Qwen3MoeForCausalLM", MOE), "BERT": ("BertModel", WORDS),
    "ViT": ("ViTForImageClassification", WIDE | dict(image_size=8, patch_size=4, num_labels=5))}
MODELS = (*TRANSFORMERS, "ViT of timm", "own module")
WRITES = ("Llama", "Llama, tied", "GPT-2", "T5", "Qwen3 MoE") # what generates
FORMS = ("factors", "pruned", "codes", "coded factors", "packed", "int8", "coded")


class Net(nn.Module):
    "A module of one's own."
    def __init__(self):
        super().__init__()
        self.inward = nn.Linear(12, 32)
        self.blocks = nn.ModuleList(nn.ModuleDict(dict(up=nn.Linear(32, 64), down=nn.Linear(64, 32))) for _ in range(2))
        self.head = nn.Linear(32, 5)

    def forward(self, x):
        x = self.inward(x)
        for b in self.blocks: x = x + b["down"](nn.functional.gelu(b["up"](x)))
        return self.head(x.mean(1))


def make(name):
    "The dense model, of which nothing is trivial."
    import timm
    import transformers
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if name == "own module": model = Net()
        elif name == "ViT of timm": model = timm.create_model("vit_tiny_patch16_224", img_size=8, patch_size=4, embed_dim=32,
                                                              depth=2, num_heads=2, num_classes=5)
        else:
            cls, config = TRANSFORMERS[name]
            cls = getattr(transformers, cls)
            model = cls(cls.config_class(**config))
        for p in model.parameters(): p.data.add_(.5/(p.shape[-1] if p.ndim > 1 else 25)**.5*torch.randn_like(p))
    return model.eval()


def inputs(name, n=2, seed=0):
    "Keyword arguments of a call."
    g = torch.Generator().manual_seed(seed)
    if name == "own module": return dict(x=torch.randn(n, 6, 12, generator=g))
    if "ViT" in name: return {"x" if "timm" in name else "pixel_values": torch.randn(n, 3, 8, 8, generator=g)}
    tokens = dict(input_ids=torch.randint(3, 96, (n, 12), generator=g))
    return tokens | (dict(decoder_input_ids=torch.randint(3, 96, (n, 6), generator=g)) if name == "T5" else {})


def tensor_of(out):
    "What counts in what a model gives."
    if torch.is_tensor(out): return out
    return out.last_hidden_state if getattr(out, "logits", None) is None else out.logits


@torch.no_grad()
def outputs(model, x):
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    return tensor_of(model(**{k: t.to(dtype) if t.is_floating_point() else t for k, t in x.items()})).float()


def close(got, want, rate=1e-4):
    "Whether two outputs are equal but for so much of their norm."
    assert got.shape == want.shape, f"the shape {tuple(got.shape)} instead of {tuple(want.shape)}"
    far = ((got.float() - want.float()).norm()/want.float().norm()).item()
    assert far <= rate, f"outputs are {far:.2g} off"


# ---- forms ----

def compressed(name, form):
    "The model `name` compressed to `form`, as `compress` returns it."
    import fips_nb
    batches = [inputs(name, 8, seed) for seed in range(4)]
    if name in ("ViT of timm", "own module"): batches = [b["x"] for b in batches]
    preset = "pruning" if form == "pruned" else "fips-als"
    method = f"{preset}:levels=2" + (",targets=attn" if name == "Qwen3 MoE" else "")
    how = dict(bits=7.) if form == "codes" else dict(params=.8, method=method)
    if form == "coded factors": how["bits"] = 6.
    with patch("fips_nb.round.sizes.SPARE_BYTES", .5): return fips_nb.compress(make(name), batches, epochs=0, **how)


SOURCE = dict(packed="factors", int8="codes", coded="codes") # forms that a folder of another one is opened as


class Case:
    "A model in a form: opened from its folder, as often as asked for."
    def __init__(self, name, form, root, elsewhere):
        self.name, self.form, self.elsewhere = name, form, elsewhere
        self.x, self.root = inputs(name), Path(root)
        self.folder = self.root/f"{name}-{SOURCE.get(form, form)}"
        if not self.folder.exists(): self._write(self.folder)
        self.want = torch.load(self.folder.with_suffix(".pt"))

    def _write(self, folder):
        from fips_nb.store.hub import load, save
        from fips_nb.store.values import round_rest
        res = compressed(self.name, SOURCE.get(self.form, self.form))
        round_rest(res.model)
        save(res, folder)
        torch.save(outputs(res.model, self.x), folder.with_suffix(".pt"))
        assert load(folder, **self.fresh)

    @property
    def fresh(self): return dict(model=Net()) if self.name == "own module" else {}

    @property
    def held(self): return self.form in ("int8", "coded")

    @property
    def factors(self): return self.form in ("factors", "pruned", "coded factors", "packed")

    @property
    def rate(self): return .05 if self.form == "int8" else 1e-4

    def model(self):
        from fips_nb.store.hub import load
        from fips_nb.speed.packing import pack
        model = load(self.folder, mode=self.form if self.held else "dense", **self.fresh)
        return pack(model) if self.form == "packed" else model

    def new(self):
        "The path of a folder that does not exist."
        return Path(tempfile.mkdtemp(dir=self.root))/"new"

    def right(self, model, rate=None, want=None):
        "Whether `model` gives what it should."
        close(outputs(model, self.x), self.want if want is None else want, rate or self.rate)

    def again(self, folder, rate=None, want=None, how="load"):
        "Whether another process gets from `folder` what it should."
        got = self.elsewhere.ask(how, str(folder), self.name)
        close(got, self.want if want is None else want, rate or self.rate)


# ---- another process ----

def _answer(how, what, name):
    import fips_nb
    x = inputs(name)
    if how == "unpickle": return outputs(pickle.loads(what), x)
    if how == "load": return outputs(fips_nb.load(what, **(dict(model=Net()) if name == "own module" else {})), x)
    import transformers
    cls = getattr(transformers, json.loads((Path(what)/"config.json").read_text())["architectures"][0])
    return outputs(cls.from_pretrained(what).eval(), x)


def quiet():
    "One thread, and no bars."
    import transformers
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def serve(pipe):
    "Answer until the pipe closes."
    quiet()
    warnings.simplefilter("ignore")
    while True:
        try: question = pipe.recv()
        except EOFError: return
        try: pipe.send(_answer(*question))
        except BaseException as e: pipe.send(f"{type(e).__name__}: {e}")


class Elsewhere:
    "A process that was started afresh, and opens what it is told to."
    def __init__(self):
        self.pipe, other = multiprocessing.Pipe()
        self.process = multiprocessing.get_context("spawn").Process(target=serve, args=(other,), daemon=True)
        self.process.start()

    def ask(self, *question):
        self.pipe.send(question)
        assert self.pipe.poll(120), "no answer"
        got = self.pipe.recv()
        assert torch.is_tensor(got), got
        return got


# ---- what people do ----

OPERATIONS = {}


def operation(title, models=MODELS):
    "Enter a function of a Case under `title`."
    def enter(f):
        OPERATIONS[title] = f, models
        return f
    return enter


@operation("load")
def _(c): c.right(c.model())


@operation("load, in a new process")
def _(c):
    if c.held or c.form == "packed": return c.right(c.model())
    c.again(c.folder)
    if c.name in TRANSFORMERS: c.again(c.folder, how="from_pretrained")


@operation("save")
def _(c):
    from fips_nb.store.hub import save
    c.again(save(c.model(), c.new()))


@operation("save over itself")
def _(c):
    from fips_nb.store.hub import load, save
    folder = shutil.copytree(c.folder, c.new())
    if c.held or c.form == "packed": model = c.model()
    else: model = load(folder, **c.fresh)
    try: save(model, folder, overwrite=True)
    finally: c.again(folder)


@operation("save_pretrained", TRANSFORMERS)
def _(c):
    c.model().save_pretrained(folder := c.new())
    c.again(folder)
    c.again(folder, how="from_pretrained")


@operation("save_pretrained over more shards", TRANSFORMERS)
def _(c):
    make(c.name).save_pretrained(folder := c.new(), max_shard_size="20KB")
    model = c.model()
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    try: model.save_pretrained(folder)
    except ValueError:
        assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
        raise
    c.again(folder)
    c.again(folder, how="from_pretrained")


@operation("save_pretrained of what compress returned", TRANSFORMERS)
def _(c):
    if c.form in SOURCE: return c.model().save_pretrained(c.new())
    res = compressed(c.name, c.form)
    want = outputs(res.model, c.x)
    res.model.save_pretrained(folder := c.new())
    c.again(folder, 1e-3, want, "from_pretrained")


@operation("state_dict, load_state_dict")
def _(c):
    state = {k: t.clone() for k, t in c.model().state_dict().items()}
    for assign in (False, True):
        other = c.model()
        for p in other.parameters():
            if p.is_floating_point(): p.data.zero_()
        other.load_state_dict(state, assign=assign)
        c.right(other)


@operation("load_state_dict, then save")
def _(c):
    from fips_nb.store.hub import save
    other = c.model()
    other.load_state_dict(c.model().state_dict(), assign=True)
    c.again(save(other, c.new()))


@operation("deepcopy, then save")
def _(c):
    from fips_nb.store.hub import save
    c.right(other := copy.deepcopy(c.model()))
    c.again(save(other, c.new()))


@operation("deepcopy")
def _(c): c.right(copy.deepcopy(c.model()))


@operation("pickle to another process")
def _(c):
    got = c.elsewhere.ask("unpickle", pickle.dumps(c.model()), c.name)
    close(got, c.want, c.rate)


def _cast(c, cast):
    model = getattr(c.model(), cast)()
    c.right(model, .1)
    return model


@operation("half()")
def _(c): _cast(c, "half")


@operation("bfloat16()")
def _(c): _cast(c, "bfloat16")


@operation("float(), double()")
def _(c):
    _cast(c, "float")
    if c.name != "Qwen3 MoE": _cast(c, "double") # the kernels of the dense one know no 64 bits


@operation("bfloat16(), float(), then save")
def _(c):
    from fips_nb.store.codes import folder_bytes
    from fips_nb.store.hub import save
    model = c.model().bfloat16().float()
    c.right(model, .05)
    folder = save(model, c.new())
    c.again(folder, .05)
    assert folder_bytes(folder) < 1.1*folder_bytes(c.folder), "the file has grown"


@operation("float(), then a mode")
def _(c):
    from fips_nb.round.modes import hold_as
    from fips_nb.speed.packing import pack
    if c.held: return hold_as(c.model().float(), "coded")
    if c.form == "packed": return pack(c.model().float())
    model = c.model().bfloat16().float()
    if c.factors: return c.right(pack(model), .05)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        held = hold_as(model, "coded")
    c.right(held, .05)
    assert any("parametrizations" in k for k in held.state_dict())


@operation("to('meta')", [m for m in MODELS if m not in ("GPT-2", "Qwen3 MoE")]) # which cannot be dense either
def _(c):
    x = {k: t.to("meta") for k, t in c.x.items()}
    got = tensor_of(c.model().to("meta")(**x))
    assert got.is_meta and got.shape == c.want.shape


@operation("to('meta'), then save")
def _(c):
    from fips_nb.store.hub import save
    c.again(save(c.model().to("meta"), c.new()))


@operation("from_pretrained(dtype=)", TRANSFORMERS)
def _(c):
    import transformers
    cls = getattr(transformers, TRANSFORMERS[c.name][0])
    if c.held or c.form == "packed": return c.right(c.model())
    for dtype, rate in (("auto", 1e-4), (torch.float32, 1e-4), (torch.bfloat16, .1), (torch.float16, .05)):
        model = cls.from_pretrained(c.folder, dtype=dtype).eval()
        assert dtype == "auto" or model.dtype == dtype
        c.right(model, rate)


@operation("torch.compile")
def _(c):
    torch._dynamo.reset()
    c.right(torch.compile(c.model(), backend="aot_eager"))


class Plain(nn.Module):
    "A model with positional inputs and one tensor as output, as what records it wants it."
    def __init__(self, model, names):
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *x):
        more = dict(use_cache=False) if hasattr(self.model, "generate") else {}
        return tensor_of(self.model(**dict(zip(self.names, x, strict=True)), **more))


def plain(c): return Plain(c.model(), list(c.x)).eval()


@operation("torch.export")
def _(c):
    x = tuple(c.x.values())
    with torch.no_grad(): close(torch.export.export(plain(c), x).module()(*x), c.want, c.rate)


@operation("torch.jit.trace")
def _(c):
    with torch.no_grad():
        traced = torch.jit.trace(plain(c), tuple(c.x.values()), check_trace=False)
        for x in (c.x, inputs(c.name, seed=9)): close(traced(*x.values()), outputs(c.model(), x), c.rate)


@operation("torch.onnx.export", [m for m in MODELS if m not in ("T5", "Qwen3 MoE")]) # likewise
def _(c):
    x = tuple(c.x.values())
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        program = torch.onnx.export(plain(c), x, dynamo=True, verbose=False)
    from onnxruntime import InferenceSession
    run = InferenceSession(program.model_proto.SerializeToString())
    names = [i.name for i in run.get_inputs()]
    got = run.run(None, dict(zip(names, (t.numpy() for t in x), strict=True)))[0]
    close(torch.from_numpy(got), c.want, max(c.rate, 1e-3))


@operation("DataParallel")
def _(c): c.right(nn.DataParallel(c.model()))


@operation("autocast, inference_mode")
def _(c):
    with torch.inference_mode(): c.right(c.model())
    model = c.model()
    with torch.inference_mode(): c.right(model)
    with torch.autocast("cpu", torch.bfloat16): c.right(model, .1)
    c.right(model)


def _in_threads(n, f):
    errors = []
    def run():
        try: f()
        except BaseException as e: errors.append(e)
    threads = [threading.Thread(target=run) for _ in range(n)]
    for t in threads: t.start()
    for t in threads: t.join()
    if errors: raise errors[0]


@operation("two threads at once")
def _(c):
    model = c.model()
    def use():
        for _ in range(5): c.right(model)
    _in_threads(2, use)


@operation("two loads at once")
def _(c): _in_threads(2, lambda: c.right(c.model()))


@operation("a second model in the process")
def _(c):
    first, second = c.model(), c.model()
    with torch.no_grad():
        for p in second.parameters():
            if p.is_floating_point(): p.mul_(1.01)
    c.right(first)
    c.right(c.model())


@operation("a batch of 64")
def _(c):
    model, many = c.model(), inputs(c.name, 64, 3)
    one = {k: t[5:6] for k, t in many.items()}
    close(outputs(model, many)[5:6], outputs(model, one), 1e-3)


def generate(model, x, **kw):
    how = dict(max_new_tokens=8, min_new_tokens=8, do_sample=False)
    with torch.no_grad(): return model.generate(x["input_ids"], attention_mask=torch.ones_like(x["input_ids"]), **how | kw)


@operation("generate: cache, beams", WRITES)
def _(c):
    model = c.model()
    for kw in (dict(), dict(num_beams=2)):
        assert torch.equal(generate(model, c.x, use_cache=True, **kw), generate(model, c.x, use_cache=False, **kw)), kw
    if c.form != "int8" and c.name != "T5":
        tokens, first = generate(model, c.x), outputs(model, c.x)[:, -1].argmax(-1)
        eos = first == 2
        assert torch.equal(tokens[:, c.x["input_ids"].shape[1]][~eos], first[~eos])


@operation("generate: static cache", ("Llama", "Llama, tied", "GPT-2", "Qwen3 MoE"))
def _(c):
    model = c.model()
    want = generate(model, c.x)
    assert torch.equal(generate(model, c.x, cache_implementation="static", disable_compile=True), want)


@operation("generate: left padding", ("Llama", "Llama, tied", "GPT-2", "Qwen3 MoE"))
def _(c):
    model, x = c.model(), c.x["input_ids"][:1, :7]
    want = generate(model, dict(input_ids=x))[:, 7:]
    padded = torch.cat([torch.zeros(1, 5, dtype=torch.long), x], 1)
    mask = (torch.arange(12) >= 5).long()[None]
    with torch.no_grad():
        got = model.generate(padded, attention_mask=mask, max_new_tokens=8, min_new_tokens=8, do_sample=False)
    assert torch.equal(got[:, 12:], want)


@operation("generate: assisted", ("Llama", "Llama, tied", "GPT-2"))
def _(c):
    model, one = c.model(), dict(input_ids=c.x["input_ids"][:1])
    assert torch.equal(generate(model, one, assistant_model=c.model()), generate(model, one))


@operation("more tokens, then save", ("Llama", "Llama, tied", "GPT-2", "T5", "BERT", "Qwen3 MoE"))
def _(c):
    from fips_nb.store.hub import save
    model = c.model()
    model.resize_token_embeddings(104, mean_resizing=False)
    cut = lambda t: t[..., :96] if c.name != "BERT" else t
    close(cut(outputs(model, c.x)), c.want, c.rate)
    want = outputs(model, c.x)
    c.again(save(model, c.new()), 1e-3, want)
    model.save_pretrained(folder := c.new())
    c.again(folder, 1e-3, want, "from_pretrained")


@operation("other number of labels", ("Llama", "GPT-2", "BERT", "ViT"))
def _(c):
    import transformers
    if c.held or c.form == "packed": return c.right(c.model())
    kind = "ForImageClassification" if c.name == "ViT" else "ForSequenceClassification"
    auto = getattr(transformers, f"AutoModel{kind}")
    model = auto.from_pretrained(c.folder, num_labels=3, ignore_mismatched_sizes=True).eval()
    with torch.no_grad(): out = model(**c.x, output_hidden_states=True)
    assert out.logits.shape[-1] == 3 and out.logits.isfinite().all()
    base = c.model()
    with torch.no_grad(): want = base(**c.x, output_hidden_states=True)
    close(out.hidden_states[-1], want.hidden_states[-1])


def zeros(model):
    from fips_nb.sparse_factors import factor_layers
    return {k: f.V == 0 for k, f in factor_layers(model).items()}


class Rows(torch.utils.data.Dataset):
    "Rows with labels."
    def __init__(self, c):
        self.x, self.name = inputs(c.name, 8, 5), c.name

    def __len__(self): return 8

    def __getitem__(self, i):
        row = {k: t[i] for k, t in self.x.items()}
        if self.name == "ViT": return row | dict(labels=torch.tensor(i % 5))
        return row | dict(labels=row.get("decoder_input_ids", row.get("input_ids")))


@operation("Trainer, one step, then save", ("Llama", "Llama, tied", "GPT-2", "T5", "Qwen3 MoE", "ViT"))
def _(c):
    from transformers import Trainer, TrainingArguments
    from fips_nb.sparse_factors import factor_layers
    from fips_nb.run.folders import info
    model, folder = c.model(), c.new()
    dead = {} if c.form == "packed" else zeros(model)
    args = TrainingArguments(str(folder), max_steps=2, per_device_train_batch_size=4, report_to=[], learning_rate=1e-2,
                             save_strategy="no", use_cpu=True, disable_tqdm=True, logging_strategy="no")
    with contextlib.redirect_stdout(io.StringIO()):
        trainer = Trainer(model=model, args=args, train_dataset=Rows(c))
        trainer.train()
        trainer.save_model(str(folder))
    model = trainer.model.eval()
    want = outputs(model, c.x)
    assert not torch.allclose(want, c.want), "nothing was learnt"
    for k, f in factor_layers(model).items(): assert not f.V[dead[k]].any(), "zeros have grown"
    c.again(folder, 1e-2, want, "from_pretrained")
    if "quantization_config" in (folder/"config.json").read_text(): # else nothing of ours is left
        c.again(folder, 1e-2, want)
        info(folder) # its report agrees with its files


@operation("a step by hand, then save", ("ViT of timm", "own module", "BERT"))
def _(c):
    from fips_nb.run.folders import info
    from fips_nb.store.hub import save
    model = c.model()
    dead = {} if c.form == "packed" else zeros(model)
    model.train()
    opt = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=.9, weight_decay=.1)
    for _ in range(2):
        opt.zero_grad()
        tensor_of(model(**c.x)).square().mean().backward()
        opt.step()
    model.eval()
    for k, z in zeros(model).items(): assert z[dead[k]].all(), "zeros have grown"
    folder = save(model, c.new())
    c.again(folder, 1e-2, outputs(model, c.x))
    info(folder)


@operation("gradient checkpointing", ("Llama", "GPT-2", "T5", "BERT", "ViT"))
def _(c):
    def gradients(how):
        model = c.model()
        if how: model.gradient_checkpointing_enable(dict(use_reentrant=False))
        model.train()
        for m in model.modules():
            if isinstance(m, nn.Dropout): m.p = 0.
        torch.manual_seed(0)
        tensor_of(model(**c.x)).square().mean().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    close(gradients(True), gradients(False))


def _adapter(c, model):
    from peft import LoraConfig, get_peft_model
    from fips_nb.store.lora import lora_config
    if c.form in ("factors", "pruned", "coded factors"): config = lora_config(model, r=2)
    else: config = LoraConfig(r=2, target_modules=dict(zip(TRANSFORMERS, (
        ["q_proj", "down_proj"], ["q_proj", "down_proj"], ["c_attn", "c_fc"], ["q", "wo"], ["q_proj"], ["query", "dense"],
        ["fc1"])))[c.name] if c.name in TRANSFORMERS else ["fc1", "up"], init_lora_weights=True)
    if c.name == "ViT" and not c.factors: config.target_modules = ["q_proj", "query", "fc1", "dense"]
    return get_peft_model(model, config)


def _tuned(c):
    model = _adapter(c, c.model())
    model.train()
    opt = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.)
    for _ in range(2):
        opt.zero_grad()
        tensor_of(model(**c.x)).square().mean().backward()
        opt.step()
    model.eval()
    assert (outputs(model, c.x) - c.want).norm() > 1e-4*c.want.norm(), "the adapter does nothing"
    return model


@operation("LoRA: train, disable, unload")
def _(c):
    model = _tuned(c)
    with model.disable_adapter(): c.right(model)
    c.right(model.unload())


@operation("LoRA: merge, then save")
def _(c):
    from fips_nb.store.hub import save
    model = _tuned(c)
    want = outputs(model, c.x)
    merged = model.merge_and_unload()
    close(outputs(merged, c.x), want, 1e-3)
    c.again(save(merged, c.new()), 1e-2, want)


@operation("fips_nb.finetune")
def _(c):
    import fips_nb
    from fips_nb.run.folders import info
    model, data = c.model(), [inputs(c.name, 4, seed) for seed in range(8)]
    if c.name in ("ViT of timm", "own module"): data = [b["x"] for b in data]
    res = fips_nb.finetune(model, data, dense=make(c.name), epochs=1, lr=1e-3, batch_size=4, **({} if "ViT" not in c.name else dict(views="none")))
    folder = res.save(c.new())
    c.again(folder, 1e-2, outputs(res.model, c.x))
    info(folder)


@operation("fips_nb.export")
def _(c):
    import fips_nb
    out = c.new()
    fips_nb.export(c.model() if c.form in SOURCE else c.folder, out)
    if c.name in TRANSFORMERS:
        assert "quantization_config" not in (out/"config.json").read_text()
        return c.again(out, 1e-3, how="from_pretrained")
    from safetensors.torch import load_file
    plain = make(c.name)
    plain.load_state_dict(load_file(out/"model.safetensors"))
    c.right(plain, 1e-3)


# ---- cells ----

REFUSED = ( # parts of the sentences that refuse
    "cannot be saved", "cannot be traced", "has no memory yet", "nothing compressed is left to save", "the device meta, which holds no", "cannot be pickled",
    "keeps its vocabulary", "learns; load its", "packed layers are for inference", "cannot be merged",
    "is held as", "is packed", "layers of integers have no gradients",
    "is not supported. Currently, only the following modules") # of peft


def cell(case, title):
    "What comes of an operation: 'right', 'refused', or what is wrong."
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            OPERATIONS[title][0](case)
        return "right"
    except AssertionError as e: return f"wrong: {e}"[:300]
    except Exception as e:
        chain = []
        while e is not None:
            chain.append(f"{type(e).__name__}: {e}")
            e = e.__cause__ or e.__context__
        if any(s in t for s in REFUSED for t in chain): return "refused"
        return f"crash: {chain[0]}"[:300]


def fill(models, forms, titles, root):
    "The cells: title -> model -> form -> what came of it."
    quiet()
    elsewhere, out, took = Elsewhere(), {}, {}
    for name in models:
        for form in forms:
            case = Case(name, form, root, elsewhere)
            for title, (_, who) in OPERATIONS.items():
                if name not in who or titles and title not in titles: continue
                start = time.perf_counter()
                got = cell(case, title)
                took[title] = took.get(title, 0) + time.perf_counter() - start
                out.setdefault(title, {}).setdefault(name, {})[form] = got
                if got not in ("right", "refused"): print(f"{name}, {form}, {title}: {got}", flush=True)
    print("seconds:", {k: round(t) for k, t in sorted(took.items(), key=lambda x: -x[1])[:10]})
    return out


def main():
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument("--models", nargs="*", default=MODELS)
    ap.add_argument("--forms", nargs="*", default=FORMS)
    ap.add_argument("--titles", nargs="*", help="operations; all if none is named")
    ap.add_argument("--root", help="where compressed models are kept between runs")
    ap.add_argument("--write", action="store_true", help="take what was found for what is right")
    a = ap.parse_args()
    with tempfile.TemporaryDirectory() as root:
        if a.root: Path(a.root).mkdir(exist_ok=True)
        found = fill(a.models, a.forms, a.titles, a.root or root)
    cells = {(t, n, f): v for t, x in found.items() for n, y in x.items() for f, v in y.items()}
    said = json.loads(FILE.read_text()) if FILE.exists() else {}
    for (t, n, f), v in cells.items():
        if a.write: said.setdefault(t, {}).setdefault(n, {})[f] = v
        elif said.get(t, {}).get(n, {}).get(f) not in (None, v): print(f"{n}, {f}, {t}: {FILE.name} says {said[t][n][f]}")
    if a.write: FILE.write_text(json.dumps(said, indent=1) + "\n")
    bad = sum(v not in ("right", "refused") for v in cells.values())
    print(f"{len(cells)} cells, {bad} neither right nor refused")
    return bool(bad)


if __name__ == "__main__": sys.exit(main())
