"""Hostile folders, killed processes and failing disks, counted by outcome.

`python tests/trial.py folders 1000 --seed 1` and so on; `make trial` runs all of it for hours and records the
counts in results/trial.json, and test_trial.py runs a minute of it.
"""
import argparse, copy, errno, hashlib, json, os, pickle, random, select, shutil, signal, string
import struct, sys, tempfile, time, traceback, warnings
from collections import Counter
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fips_nb.run import cli
from fips_nb.run.folders import info
from fips_nb.store import hub
from fips_nb.round.sizes import bits_to_bytes
from fips_nb.round.code import code_model
from fips_nb.data.demo import demo_images, demo_vit
from fips_nb.share.pipeline import compress
from fips_nb.share.planner import Plan, make_plan
from fips_nb.store.shards import checksum

PACKAGE = Path(hub.__file__).parents[1]

# ---- honest folders ----

SETTINGS = dict(als=dict(levels=2, group_size=4), pruning=dict(preset="pruning", levels=2), svd=dict(preset="svd"))


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(0)
    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
                 max_position_embeddings=64)
    return LlamaForCausalLM(LlamaConfig(**sizes)).eval()


class Block(torch.nn.Module):
    def __init__(self, d, h):
        super().__init__()
        self.norm = torch.nn.LayerNorm(d)
        self.mlp = torch.nn.Sequential(torch.nn.Linear(d, h), torch.nn.GELU(), torch.nn.Linear(h, d))

    def forward(self, x): return x + self.mlp(self.norm(x))


class Net(torch.nn.Module):
    "A module of nobody's library: tied weights, a block in two places, a buffer."
    def __init__(self):
        super().__init__()
        first = Block(32, 64)
        self.blocks = torch.nn.ModuleList([first, Block(32, 64), first])
        self.embed, self.head = torch.nn.Embedding(40, 32), torch.nn.Linear(32, 40, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.linspace(1, 2, 32))

    def forward(self, x):
        x = self.embed(x)*self.scale
        for b in self.blocks: x = b(x)
        return self.head(x)


def own_folders(root):
    "Honest folders of a module that only this file has."
    out = {}
    words = list(torch.randint(0, 32, (4, 16, 8), generator=torch.Generator().manual_seed(0)))
    torch.manual_seed(0)
    net = Net().eval()
    made, size = compress(net, words, .6, levels=2, distill_epochs=0), bits_to_bytes(net, 8.)
    out["own-als"] = hub.save(made, root/"own-als")
    out["own-coded"] = hub.save(code_model(net, words, size, 0), root/"own-coded")
    made = code_model(made.model, words, size, 0, teacher=net)
    out["own-factors"] = hub.save(made, root/"own-factors")
    return out


def make_folders(root):
    "Honest folders of each kind: name -> folder."
    images = list(demo_images("train")[0][:100].split(50))
    tokens = list(torch.randint(0, 64, (2, 2, 16), generator=torch.Generator().manual_seed(0)))
    out = {}
    for name, how in SETTINGS.items():
        for kind, model, batches in (("timm", demo_vit(), images), ("llama", llama(), tokens)):
            made = compress(model, batches, .4, distill_epochs=0, **how)
            more = dict(rest="keep") if name == "svd" else {}
            if kind == "llama" and name == "als": more["max_shard_size"] = "20KB"
            out[f"{kind}-{name}"] = hub.save(made, root/f"{kind}-{name}", **more)
    for kind, model, batches in (("timm", demo_vit(), images), ("llama", llama(), tokens)):
        made = code_model(model, batches, bits_to_bytes(model, 6.), 0)
        out[f"{kind}-coded"] = hub.save(made, root/f"{kind}-coded")
        factors = compress(model, batches, .4, levels=2, group_size=1 if kind == "llama" else 5, distill_epochs=0).model
        made = code_model(factors, batches, bits_to_bytes(model, 6.), 0, teacher=model)
        out[f"{kind}-factors"] = hub.save(made, root/f"{kind}-factors")
    return out | own_folders(root)


def loaded(folder):
    "Load a folder of any kind; the module for one of its own kind is made here."
    return hub.load(folder, model=Net() if "own" in folder.name else None)


# ---- mutations ----

def json_paths(x, at=()):
    "Every place in a JSON value, down to a depth of ten."
    yield at
    if len(at) == 10: return
    for k, v in x.items() if isinstance(x, dict) else enumerate(x) if isinstance(x, list) else ():
        yield from json_paths(v, (*at, k))


def hostile_value(r, old):
    "Something else to stand in a place of a JSON file."
    near = [old + 1, old - 1, -old, 2*old, old*1000] if type(old) in (int, float) else []
    word = "".join(r.choices(string.printable, k=r.randrange(12)))
    deep = []
    for _ in range(r.choice((3, 50, 2000))): deep = [deep]
    return r.choice(near + [0, -1, 1, 2**31 - 1, 2**31, 10**9, 2**63, 10**40, .5, -1.5, 1e300, True, False, None, "", word,
                            "\ud800", "x"*r.choice((10, 10**5)), "../x", "/etc/passwd", [], {}, [old], {"a": old}, [old]*3,
                            [0]*r.choice((5, 10**5)), "float64", "int8", "dense", "bits", "coded", "up", "down", "rows", "eager",
                            "somebody/kernels", "LlamaModel", "vit_giant_patch14_224", deep])


def copied(x):
    "A copy of a JSON value; one that is too deep for that is shared."
    try: return copy.deepcopy(x)
    except RecursionError: return x


def change_json(r, value):
    "One to three places of a JSON value changed."
    value = copied(value)
    for _ in range(r.choice((1, 1, 1, 2, 3))):
        path = r.choice([p for p in json_paths(value) if p])
        where = value
        for k in path[:-1]: where = where[k]
        k, way = path[-1], r.randrange(10)
        if way == 0: del where[k]
        elif way == 1 and isinstance(where, list): where.insert(k, copied(where[k]))
        elif way == 2 and isinstance(where, dict): where[r.choice(("auto_map", "attn_implementation", "x", "depth"))] = where[k]
        elif way == 3: # two places change their values
            other = r.choice([p for p in json_paths(value) if p])
            there = value
            for j in other[:-1]: there = there[j]
            try: where[k], there[other[-1]] = copied(there[other[-1]]), copied(where[k])
            except (KeyError, IndexError, TypeError): pass
        else: where[k] = hostile_value(r, where[k])
        if not isinstance(value, (dict, list)) or not value: break
    return value


def dump(value):
    try: return json.dumps(value)
    except (RecursionError, ValueError): return "["*3000


def change_tensors(r, ts):
    "One to three tensors changed, dropped, added, or given another name, shape or dtype."
    for _ in range(r.choice((1, 1, 2, 3))):
        if not ts: return
        k = r.choice(sorted(ts))
        t, way = ts[k], r.randrange(9)
        if way == 0: del ts[k]
        elif way == 1: ts[r.choice(("extra", k + "x", "fips.0.V", "fips.9.U", k.rpartition(".")[0] + ".bias"))] = ts.pop(k)
        elif way == 2: ts[k] = t.reshape(-1)[:r.choice((0, 1, max(0, t.numel() - 1)))].clone()
        elif way == 3: ts[k] = torch.cat([t.reshape(-1), t.reshape(-1)[:r.choice((1, 7))]])
        elif way == 4: ts[k] = t.to(r.choice((torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool)))
        elif way == 5 and t.is_floating_point() and t.numel():
            ts[k] = t.clone()
            ts[k].view(-1)[r.randrange(t.numel())] = r.choice((float("nan"), float("inf"), -float("inf"), 0., 1e30))
        elif way == 6 and t.dtype == torch.uint8: ts[k] = torch.randint(0, 256, (r.choice((1, len(t), 2*len(t))),), dtype=torch.uint8)
        elif way == 7: ts[k] = t.reshape(1, *t.shape)
        elif t.ndim == 2: ts[k] = t.T.contiguous()


def change_bytes(r, raw):
    "Bytes of a file flipped, cut, doubled or moved; or its header edited as text."
    raw, way = bytearray(raw), r.randrange(6)
    if way == 0 and raw: raw[r.randrange(len(raw))] ^= 1 << r.randrange(8)
    elif way == 1: raw = raw[:r.randrange(len(raw) + 1)]
    elif way == 2: raw += bytes(r.randrange(256) for _ in range(r.randrange(1, 50)))
    elif way == 3: raw[:8] = struct.pack("<Q", r.choice((0, 1, len(raw), 2**32, 2**63, r.randrange(1 << 16))))
    else:
        n = int.from_bytes(raw[:8], "little")
        text = bytes(raw[8:8 + n]).decode(errors="replace")
        try: new = dump(change_json(r, json.loads(text))).encode(errors="replace")
        except ValueError: new = text.encode()[::-1]
        raw = bytearray(struct.pack("<Q", len(new))) + new + raw[8 + n:]
    return bytes(raw)


def repair(folder):
    "Let the checksums of `folder` agree with what is there."
    config = folder/"config.json"
    try: c = json.loads(config.read_text())
    except (ValueError, RecursionError): return
    f = folder/"model.safetensors"
    if isinstance(c, dict) and "sha256" in c and f.exists():
        raw = f.read_bytes()
        config.write_text(dump(c | dict(bytes=len(raw), sha256=hashlib.sha256(raw).hexdigest())))


def repair_sums(folder):
    "Let the checksums in the headers of shards agree with their tensors."
    paths, sums = sorted(folder.glob("*.safetensors")), {}
    try: files = [load_file(p) for p in paths]
    except Exception: return
    for ts in files: sums |= {k: checksum(t) for k, t in ts.items()}
    for p, ts in zip(paths, files): save_file(ts, p, dict(format="pt", fips=json.dumps(sums)))


def mutate(r, folder):
    "Change `folder` in one way, and mostly let its checksums agree with that."
    shards, way = sorted(folder.glob("*.safetensors")), r.randrange(4)
    if way < 2:
        f = folder/"config.json"
        c = json.loads(f.read_text())
        part = "quantization_config" if "quantization_config" in c and r.random() < .7 else None
        c = c | {part: change_json(r, c[part])} if part else change_json(r, c)
        f.write_text(dump(c), errors="surrogatepass")
    if way == 0 and r.random() < .7: return
    f = r.choice(shards)
    if way == 3: f.write_bytes(change_bytes(r, f.read_bytes()))
    else:
        ts = load_file(f)
        with safe_open(f, "pt") as s: meta = s.metadata()
        change_tensors(r, ts)
        save_file(ts, f, meta)
    if r.random() < .85:
        if (folder/"config.json").exists() and "llama" not in folder.name: repair(folder)
        else: repair_sums(folder)


# ---- what comes of it ----

def example(model):
    if hasattr(model, "config") or isinstance(model, Net): return torch.arange(12).view(2, 6)
    return torch.linspace(-1, 1, 128).view(2, 1, 8, 8)


def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def export(folder):
    "The plain weights of a folder."
    with tempfile.TemporaryDirectory() as tmp: return weights(hub.export(folder, Path(tmp)/"plain"))


def open_folder(folder, way):
    if way == "info": return info(folder)
    if way == "export": return export(folder)
    if way == "load": return loaded(folder)
    from transformers import AutoModelForCausalLM
    return AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)


def made_up(folder, way, state):
    "Whether a second load, with another random state, gives other values."
    torch.manual_seed(torch.initial_seed() + 1)
    return not same(state, open_folder(folder, way).state_dict())


def of_fips(folder):
    "Whether the configuration still names the format; transformers reads others without the package, and says so."
    about = json.loads((folder/"config.json").read_text()).get("quantization_config")
    return not isinstance(about, dict) or about.get("quant_method") == "fips"


def within_package(error):
    "Whether `error` came by way of code of fips_nb: transformers reads config.json before it asks us."
    frames = traceback.extract_tb(error.__traceback__)
    return any(Path(f.filename).is_relative_to(PACKAGE) for f in frames)


def outcome(folder, way, honest):
    "One word on what `folder` leads to."
    try: model = open_folder(folder, way)
    except (ValueError, OSError, RuntimeError) as e:
        ours = isinstance(e, (ValueError, OSError)) or way == "from_pretrained" # transformers' own
        return "refused" if ours and str(e) else f"exception {type(e).__name__}"
    except Exception as e:
        if way == "from_pretrained" and not within_package(e): return "refused by transformers itself"
        return f"exception {type(e).__name__}"
    if way == "info": return "described"
    state = model if way == "export" else model.state_dict()
    if not all(torch.isfinite(t).all() for t in state.values()): return "loaded, not finite"
    if way == "export": return "exported"
    if made_up(folder, way, state):
        return "loaded, structure missing" if of_fips(folder) else "loaded, not as a folder of fips_nb"
    try:
        with torch.no_grad(): y = model(example(model))
    except Exception as e: return f"loaded, forward {type(e).__name__}"
    y = getattr(y, "logits", y)
    if state.keys() == honest.keys() and same(state, honest): return "loaded, the same"
    return "loaded, other values" if torch.isfinite(y).all() else "loaded, overflow in forward"


def peak():
    "Resident bytes at present and at most since the last call."
    text = Path("/proc/self/status").read_text()
    read = lambda k: int(text.split(k + ":")[1].split()[0])*1024
    Path("/proc/self/clear_refs").write_text("5")
    return read("VmRSS"), read("VmHWM")


WAYS = dict(timm=("load", "load", "load", "info"), llama=("load", "from_pretrained", "from_pretrained", "info"),
            own=("load", "load", "export", "info"))


def ways(name): return WAYS[name.partition("-")[0]]


def one_folder(seed, folders, honest, root):
    "Mutate one of `folders` by `seed`, open it, and say what came of it."
    r = random.Random(seed)
    name = r.choice(sorted(folders))
    way, m = r.choice(ways(name)), root/f"{name}-{os.getpid()}"
    shutil.copytree(folders[name], m)
    try:
        mutate(r, m)
        before, _ = peak()
        start = time.perf_counter()
        said = outcome(m, way, honest[name])
        took = time.perf_counter() - start
        grown = peak()[1] - before
        if took > 5: said = f"slow ({said})"
        return name, way, said, grown, took
    finally: shutil.rmtree(m, ignore_errors=True)


def one_plan(seed, plan, root):
    "Mutate the text of a plan by `seed`, read it, and say what came of it."
    r, f = random.Random(seed), root/f"plan-{os.getpid()}.json"
    text = dump(change_json(r, plan)) if r.random() < .8 else change_bytes(r, dump(plan).encode()).decode(errors="replace")
    f.write_text(text, errors="surrogatepass")
    start = time.perf_counter()
    try: said = "read, the same" if Plan.read(f) == Plan.read(f) and json.loads(text) == plan else "read, another plan"
    except (ValueError, OSError): said = "refused"
    except Exception as e: said = f"exception {type(e).__name__}"
    if said == "read, another plan":
        try: compress_check(Plan.read(f))
        except ValueError: said = "read, refused by compress"
        except Exception as e: said = f"exception {type(e).__name__} in compress"
    return "plan", "read", said, 0, time.perf_counter() - start


def compress_check(plan):
    from fips_nb.share.budgets import check_plan
    check_plan(demo_vit(), plan.groups)


# ---- processes that may die ----

def forked(work, seconds):
    "Run `work()` in a child; what it returns, or how it ended. Nothing else runs in this process meanwhile."
    r, w = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(r)
        try: said = True, work()
        except Exception: said = False, traceback.format_exc()
        with os.fdopen(w, "wb") as f: pickle.dump(said, f)
        os._exit(0)
    os.close(w)
    with os.fdopen(r, "rb") as f:
        ready, _, _ = select.select([f], [], [], seconds)
        data = f.read() if ready else b""
    if not ready: os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    if not ready: return "hang"
    if not data: return f"crash by signal {os.WTERMSIG(status)}"
    well, said = pickle.loads(data)
    if not well: raise RuntimeError(f"the trial itself failed: {said}") # a defect of the trial, not of the package
    return said


CHUNK = 25 # cases for each child


def in_chunks(one, seeds, progress=False):
    "Results of `one(seed)` for all seeds, in children that may die; a child that dies is looked at case by case."
    out = []
    for i in range(0, len(seeds), CHUNK):
        part = seeds[i:i + CHUNK]
        got = forked(lambda: [one(s) for s in part], 20*CHUNK)
        if isinstance(got, str):
            got = []
            for s in part:
                said = forked(lambda: [one(s)], 60)
                got += [("?", "?", f"{said}, seed {s}", 0, 0.)] if isinstance(said, str) else said
        out += got
        if progress and i//CHUNK%40 == 0: print(f"{i:7} of {len(seeds)}", file=sys.stderr)
    return out


def fuzz(n, seed, root):
    "Counts by outcome for `n` mutated folders and plans, and the largest growth of memory by kind over the honest one."
    folders = make_folders(root)
    honest = {k: {n: t.clone() for n, t in loaded(f).state_dict().items()} for k, f in folders.items()}
    one = lambda s: one_folder(s, folders, honest, root)
    usual = {}
    for k in folders: # memory of an honest load, in a fresh child as well
        def load():
            before, _ = peak()
            model = loaded(folders[k])
            return peak()[1] - before
        usual[k] = forked(load, 60)
    seeds = range(seed*10**7, seed*10**7 + n)
    got = in_chunks(one, seeds, progress=True)
    file = root/"plan.json"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        make_plan(demo_vit(), [demo_images("train")[0][:50]], .6, ranks=(2,), levels=(3,)).save(file)
    plan = json.loads(file.read_text())
    got += in_chunks(lambda s: one_plan(s, plan, root), seeds[:n//8])
    failed = [(s, *g[:3]) for s, g in zip(seeds, got) if g[2] not in GOOD]
    over = [(s, g - 3*usual[k] - SLACK) for s, (k, *_, g, _) in zip(seeds, got) if k in usual and g > 3*usual[k] + SLACK]
    counts = Counter((k.partition("-")[0], way, said) for k, way, said, *_ in got)
    return dict(counts=[dict(kind=k, way=w, outcome=o, n=c) for (k, w, o), c in sorted(counts.items())],
                n=len(got), memory=len(over), over=over[:5], failed=failed[:20], slowest=max(t for *_, t in got))


SLACK = 96 << 20 # bytes: a first load imports what a later one does not


# ---- kills ----

QUICK = ["--params", ".5", "--method", "pruning:levels=3", "--epochs", "1", "--n", "100"]
RUNS = dict(compress=["compress", "demo-vit", "--out", "m", *QUICK],
            overwrite=["compress", "demo-vit", "--out", "m", "--overwrite", *QUICK],
            plan=["compress", "demo-vit", "--out", "m", "--params", ".6", "--method", "fips-als", "--epochs", "0", "--n", "50"])


def run_cli(words, folder):
    "Exit status of the command `words` in `folder`, which says nothing here."
    os.chdir(folder)
    out = os.open(os.devnull, os.O_WRONLY)
    for fd in (1, 2): os.dup2(out, fd)
    return cli.main(words)


def killed(words, folder, after):
    "Run `words` in a child and kill it after so many seconds; whether it was still running."
    pid = os.fork()
    if pid == 0:
        try: run_cli(words, folder)
        finally: os._exit(0)
    time.sleep(after)
    alive = os.waitpid(pid, os.WNOHANG) == (0, 0)
    if alive:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return alive


def weights(folder): return load_file(Path(folder)/"model.safetensors")


def one_kill(r, kind, root, wanted, seconds):
    "One killed run, looked at and resumed: an outcome, and whether it was killed in time."
    d = Path(tempfile.mkdtemp(dir=root))
    words, m = RUNS[kind], d/"m"
    if kind == "overwrite": shutil.copytree(root/"old", m)
    alive = killed(words, d, r.uniform(0, 1.05*seconds))
    if kind == "overwrite" and not m.exists() and not list(d.glob(".m.*.work/old")): return "lost the old one", alive
    if m.exists(): # old or new, complete
        hub.load(m)
        if not (same(weights(m), wanted) or same(weights(m), weights(root/"old"))): return "a mixture", alive
    status = forked(lambda: run_cli([*words, "--resume"], d), 120)
    said = "as without a kill" if status == 0 and same(weights(m), wanted) else f"other weights (exit {status})"
    left = sorted(p.name for p in d.iterdir() if p.name != "m")
    shutil.rmtree(d)
    return f"left {left}" if left else said, alive


def kills(n, seed, root):
    "Counts by outcome for `n` killed runs of each kind of command."
    r, counts, hit = random.Random(seed), Counter(), Counter()
    old = ["compress", "demo-vit", "--out", "m", "--params", ".5", "--method", "svd", "--n", "50"]
    times, made = {}, {}
    for kind, words in (RUNS | dict(old=old)).items():
        d = Path(tempfile.mkdtemp(dir=root))
        start = time.perf_counter()
        assert forked(lambda: run_cli(words, d), 300) == 0
        times[kind], made[kind] = time.perf_counter() - start, weights(d/"m")
        if kind == "old": (d/"m").rename(root/"old")
    for i in range(n):
        kind = sorted(RUNS)[i%len(RUNS)]
        said, alive = one_kill(r, kind, root, made[kind], times[kind])
        counts[kind, said] += 1
        hit[kind] += alive
    return dict(counts=[dict(kind=k, way="kill", outcome=o, n=c) for (k, o), c in sorted(counts.items())], n=n,
                killed=dict(hit))


# ---- failing disks ----

CALLS = {"fsync": (os, "fsync"), "replace": (os, "replace"), "rename": (Path, "rename"), "mkdir": (Path, "mkdir"),
         "open": (os, "open")}
ERRORS = (errno.ENOSPC, errno.EIO, errno.EACCES)


def one_fault(call, error, nth, root):
    "Let the `nth` call fail while an old model is replaced; what is there afterwards."
    d = Path(tempfile.mkdtemp(dir=root))
    m = d/"m"
    shutil.copytree(root/"old", m)
    made, old = hub.load(root/"new"), weights(m)
    owner, name = CALLS[call]
    real, count = getattr(owner, name), [0]

    def failing(*args, **kw):
        count[0] += 1
        if count[0] == nth: raise OSError(error, os.strerror(error))
        return real(*args, **kw)
    setattr(owner, name, failing)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            hub.save(made, m, overwrite=True)
        said = "saved"
    except OSError: said = "refused"
    finally: setattr(owner, name, real)
    now = weights(m)
    good = same(now, old) if said == "refused" else same(now, weights(root/"new"))
    hub.load(m)
    left = [p.name for p in d.iterdir() if p.name != "m"]
    shutil.rmtree(d)
    if count[0] < nth: return None # there are not so many calls
    return f"left {len(left)}" if left and said == "refused" and call not in ("rename",) else said + (", old or new complete" if good else ", BROKEN")


def faults(root):
    "Counts by outcome for every call of the system that replacing a folder makes, each failing in three ways."
    images = list(demo_images("train")[0][:50].split(50))
    for name, budget in (("old", .3), ("new", .4)):
        hub.save(compress(demo_vit(), images, budget, "svd"), root/name)
    counts = Counter()
    for call in CALLS:
        for error in ERRORS:
            nth = 1
            while nth < 40 and (said := forked(lambda: one_fault(call, error, nth, root), 120)) is not None:
                counts[call, said] += 1
                nth += 1
    return dict(counts=[dict(kind=k, way="fault", outcome=o, n=c) for (k, o), c in sorted(counts.items())],
                n=sum(counts.values()))


TRIALS = dict(folders=lambda a, root: fuzz(a.n, a.seed, root), kills=lambda a, root: kills(a.n, a.seed, root),
              faults=lambda a, root: faults(root))


def run(what, n=100, seed=0):
    "The report of one trial, in a temporary folder."
    torch.set_num_threads(1)
    a = argparse.Namespace(n=n, seed=seed)
    with tempfile.TemporaryDirectory() as tmp: out = TRIALS[what](a, Path(tmp))
    return out


GOOD = ("refused", "described", "exported", "loaded, the same", "loaded, other values", "loaded, overflow in forward", "read, the same",
        "read, another plan", "read, refused by compress", "as without a kill", "saved, old or new complete",
        "refused, old or new complete", "refused by transformers itself", "loaded, not as a folder of fips_nb")


def bad(report): return [c for c in report["counts"] if c["outcome"] not in GOOD]


ENTRIES = dict(folders="fuzz", kills="kills", faults="faults")
WRITES = ["store.disk.swapping", "store.state.open_state", "store.schema.conform"]  # is what is tried, see Code.closure


def recorded(a):
    "The report of one trial, kept in results/trial.json with the code behind it."
    from fips_nb.measure.records import record
    return record("trial", dict(trial=a.what, n=a.n), lambda: run(a.what, a.n, a.seed),
                  [f"tests/trial:{ENTRIES[a.what]}", *WRITES], seed=a.seed)


def one(seed):
    "Open the folder of one case, and keep it."
    root = Path(tempfile.mkdtemp())
    folders, r = make_folders(root), random.Random(seed)
    name = r.choice(sorted(folders))
    way, kept = r.choice(ways(name)), root/"case"/name
    shutil.copytree(folders[name], kept)
    mutate(r, kept)
    print(f"{name} in {kept}")
    open_folder(kept, way)


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("what", choices=TRIALS)
    p.add_argument("n", type=int, nargs="?", default=100)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--one", action="store_true", help="of folders: the case with this seed alone, and its folder kept")
    p.add_argument("--record", action="store_true", help="keep the report in results/trial.json")
    a = p.parse_args()
    if a.one: return one(a.seed)
    out = recorded(a) if a.record else run(a.what, a.n, a.seed)
    for c in out["counts"]: print(f"{c['n']:7}  {c['kind']:10} {c['way']:16} {c['outcome']}")
    print({k: v for k, v in out.items() if k not in ("counts", "made", "key")})
    return 1 if bad(out) or out.get("memory") else 0


if __name__ == "__main__": sys.exit(main())
