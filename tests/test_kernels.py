"""Sparse kernels and packed layers: every format over shapes, densities and dtypes, against the dense product and scipy; faults and fallbacks."""
import copy, json, os, pickle, subprocess, sys, threading, warnings
from pathlib import Path

import pytest, torch
import torch.nn.functional as F
from torch import nn

from fips_nb import sparse_kernels as sk
from fips_nb.sparse_factors import FactorLinear, factor_layers, fan_in_mask, nm_mask
from fips_nb.sparse_kernels import (FORMATS, Condensed, Csr, Dense, PackedLinear, Tiles, TwoFour, bench, choice_table, format_bytes,
                                    kernels, optimize, pack, resident_bytes, unpack)

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.filterwarnings("error")
SHAPES = [(1, 1), (5, 7), (32, 64), (33, 65), (64, 256), (100, 257), (257, 100), (3, 700)]
DENSITIES = [0., .02, .1, .25, .6, 1.]
FAST = [Csr, Condensed, Tiles]
needs_kernels = pytest.mark.skipif(not kernels(), reason="no C++ compiler here, so there are no CPU kernels to test")


def sparse(o, i, density, seed=0, dtype=torch.float32):
    "A matrix whose values are exact in 16 bits, with the given share of entries."
    g = torch.Generator().manual_seed(seed + 1000*o + i)
    return (torch.randn(o, i, generator=g).half().to(dtype))*(torch.rand(o, i, generator=g) < density)


def close(y, ref, k):
    "Compare with a double-precision reference; the error of a sum of `k` products of order one in `y`'s precision."
    tol = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[y.dtype]
    torch.testing.assert_close(y.double(), ref, rtol=tol, atol=tol*max(k, 1)**.5 + 1e-6)


def run(code, **env):
    "Run `code` in a fresh interpreter from the repository."
    res = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)} | env, capture_output=True, text=True)
    assert res.returncode == 0, res.stdout + res.stderr
    return res.stdout + res.stderr


# ---- formats ----

@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("density", DENSITIES)
def test_formats_are_exact_and_weigh_what_arithmetic_says(shape, density):
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        A = sparse(*shape, density, dtype=dtype); A[A.shape[0]//2:] *= (torch.rand(A.shape[0] - A.shape[0]//2, 1) < .5) # some empty rows
        for kind, F_ in FORMATS.items():
            if kind == "2:4": continue
            P = F_(A); B = P.dense()
            assert torch.equal(A, B) and B.dtype == dtype
            assert P.nbytes() == sum(t.untyped_storage().nbytes() for t in P.buffers()) == format_bytes(kind, A != 0, P.values.element_size())


@pytest.mark.parametrize("shape", [(1, 8), (5, 16), (33, 64), (100, 264)], ids=str)
def test_two_four_is_exact(shape):
    for keep in (0, 1, 2):
        A = sparse(*shape, 1.)*nm_mask(torch.rand(shape), keep, 4, dim=1) if keep else torch.zeros(shape)
        P = TwoFour(A); assert torch.equal(P.dense(), A) and P.nbytes() == format_bytes("2:4", A != 0)
        torch.testing.assert_close(P(torch.ones(2, shape[1])), F.linear(torch.ones(2, shape[1]), A))
    with pytest.raises(ValueError, match="3 entries in one run"): TwoFour(torch.tensor([[1., 1., 1., 0., 0, 0, 0, 0]]))
    with pytest.raises(ValueError, match="multiple of 8"): TwoFour(torch.zeros(2, 12))


def test_values_take_the_narrowest_exact_type_and_round_only_when_told():
    A = torch.randn(40, 50)*(torch.rand(40, 50) < .3)
    assert Csr(A).values.dtype == torch.float32 and torch.equal(Csr(A).dense(), A)
    assert Csr(A*2**-120, torch.bfloat16).values.dtype == torch.bfloat16
    P = Tiles(A, torch.float16); assert torch.equal(P.dense(), A.half().float()) and P.nbytes() < Tiles(A).nbytes()


def test_too_many_columns_are_refused():
    A = torch.zeros(1, 65_537); A[0, -1] = 1
    for F_ in (Csr, Condensed):
        with pytest.raises(ValueError, match="65537 columns"): F_(A)
    assert torch.equal(Tiles(A).dense(), A) and torch.equal(Csr(A[:, 1:]).dense(), A[:, 1:])
    with pytest.raises(ValueError, match="infinity"): Tiles(torch.tensor([[float("inf")]]))
    with pytest.raises(ValueError, match="'coo' is not one of"): format_bytes("coo", A != 0)


# ---- products ----

@needs_kernels
@pytest.mark.parametrize("F_", FAST)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_over_shapes_densities_and_rows(F_, shape):
    o, i = shape
    for density in (0., .1, .6):
        A = sparse(o, i, density); P = F_(A); b = torch.randn(o)
        for n in (1, 3, 4, 17, 33, 70):
            x = torch.randn(n, i); close(P(x, b), F.linear(x.double(), A.double(), b.double()), density*i)
    for lead in ((0,), (2, 0), (1, 1, 1), (2, 3)): # empty, nested
        x = torch.randn(*lead, i); y = P(x); assert y.shape == (*lead, o)
        close(y, F.linear(x.double(), A.double()), i)


@needs_kernels
@pytest.mark.parametrize("F_", FAST)
@pytest.mark.parametrize("n", [16, 31, 32, 48, 64, 100, 112, 160, 197, 208, 209, 512, 832, 833, 1700])
def test_products_over_many_rows(F_, n):
    A = sparse(70, 130, .3); x, b = torch.randn(n, 130), torch.randn(70)
    close(F_(A)(x, b), F.linear(x.double(), A.double(), b.double()), 40)


@needs_kernels
@pytest.mark.parametrize("F_", FAST)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("values", [torch.float32, torch.float16, torch.bfloat16])
def test_products_over_dtypes(F_, dtype, values):
    A = sparse(65, 130, .3).to(values).float(); P = F_(A, values); assert P.values.dtype == values
    for n in (1, 5, 40, 230):
        for bias in (None, torch.randn(65), torch.randn(65).bfloat16()):
            x = torch.randn(n, 130).to(dtype); y = P(x, bias); assert y.dtype == dtype
            close(y, F.linear(x.double(), A.double(), None if bias is None else bias.double()), 40)


@needs_kernels
def test_half_precision_extremes():
    "Denormals and the largest numbers of float16, ties of bfloat16, with denormals flushed or not."
    A = torch.tensor([[2.**-24, 65504., 1., 0.]]); x = torch.eye(4)
    old = torch.set_flush_denormal(True)
    try:
        for F_ in FAST: assert torch.equal(F_(A)(x)[:, 0], A[0]) and F_(A).values.dtype == torch.float16
    finally: torch.set_flush_denormal(False)
    B = torch.tensor([[1., 2**-8]]); X = torch.tensor([[1., 1.], [1 + 2**-7, 1.]]).bfloat16() # ties go to even
    for F_ in FAST: assert torch.equal(F_(B)(X), F.linear(X.float(), B).bfloat16())


@needs_kernels
@pytest.mark.parametrize("F_", FAST)
@pytest.mark.parametrize("n", [2, 40])
def test_nan_and_infinity_pass_as_in_dense(F_, n):
    A = sparse(50, 70, .2); b = torch.randn(50)
    for bad in (float("nan"), float("inf"), -float("inf")):
        x = torch.randn(n, 70); x[1, 3] = bad
        y, ref = F_(A)(x, b), F.linear(x, A, b); assert torch.equal(y.isnan(), ref.isnan()) and y[1].isnan().any()
        torch.testing.assert_close(y, ref, rtol=1e-4, atol=1e-4, equal_nan=True)


@needs_kernels
@pytest.mark.parametrize("F_", FAST)
def test_strides(F_):
    A = sparse(40, 70, .3); P = F_(A); big = torch.randn(60, 3, 140)
    for x in (big[:, 1, ::2], big[:, 0, :70], big[..., 70:], torch.randn(70, 9).T, torch.randn(70).expand(5, 70), torch.randn(1, 1, 70).expand(2, 4, 70)):
        torch.testing.assert_close(P(x), F.linear(x, A), rtol=1e-4, atol=1e-4)
    bias = torch.randn(80)[::2]; torch.testing.assert_close(P(big[:, 0, :70], bias), F.linear(big[:, 0, :70], A, bias), rtol=1e-4, atol=1e-4)
    for wrong in (torch.randn(3, 71), torch.randn(69)):
        with pytest.raises(ValueError, match="for a matrix of 70 columns"): P(wrong)
    assert P(torch.randn(70)).shape == (40,)


@needs_kernels
def test_against_scipy():
    scipy_sparse = pytest.importorskip("scipy.sparse", reason="scipy is not installed")
    for density in (.03, .3):
        A = sparse(300, 500, density); S = scipy_sparse.csr_matrix(A.double().numpy()); x = torch.randn(50, 500)
        for F_ in FAST: close(F_(A)(x), torch.from_numpy((S@x.double().numpy().T).T.copy()), 150)


@needs_kernels
def test_threads_agree_and_share_a_layer():
    A = sparse(4000, 1200, .3); x = torch.randn(60, 1200); old =  torch.get_num_threads()
    try:
        for F_ in FAST:
            P = F_(A); ref = {}
            for t in (1, 2, 3): torch.set_num_threads(t); ref[t] = P(x), P(x[:3])
            assert all(torch.equal(a, b) for t in (2, 3) for a, b in zip(ref[1], ref[t]))
            bad = []
            def work():
                for _ in range(5):
                    if not (torch.equal(P(x), ref[1][0]) and torch.equal(P(x[:3]), ref[1][1])): bad.append(1)
            ts = [threading.Thread(target=work) for _ in range(3)]
            for t in ts: t.start()
            for t in ts: t.join()
            assert not bad
    finally: torch.set_num_threads(old)


@needs_kernels
@pytest.mark.skipif(sys.platform != "linux", reason="torch's OpenMP is found this way on Linux only")
def test_kernels_find_the_threads_of_torch():
    assert sk._load().fips_threads() == 1


# ---- fallbacks ----

PROBE = """
import warnings, torch, torch.nn.functional as F
from fips_nb.sparse_kernels import Csr, Condensed, Tiles, kernels
A = torch.randn(40, 70)*(torch.rand(40, 70) < .3); x = torch.randn(5, 70)
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter('always')
    for F_ in (Csr, Condensed, Tiles):
        for _ in range(2): torch.testing.assert_close(F_(A)(x), F.linear(x, A), rtol=1e-4, atol=1e-4)
print(kernels(), [str(w.message) for w in said])
"""


def test_off_switch():
    assert run(PROBE, FIPS_NB_KERNELS="off").strip() == "False []"


def test_no_compiler_runs_dense_and_says_so_once(tmp_path):
    out = run(PROBE.replace("import warnings", "import fips_nb.sparse_kernels as k; k._compilers = lambda: []\nimport warnings"), XDG_CACHE_HOME=str(tmp_path))
    assert out.startswith("False") and out.count("no C++ compiler") == 1 and "pip install" in out


def test_broken_compiler_runs_dense_and_says_why(tmp_path):
    cxx = tmp_path/"c++"; cxx.write_text("#!/bin/sh\necho it is broken >&2\nexit 1\n"); cxx.chmod(0o755)
    out = run(PROBE.replace("import warnings", "import fips_nb.sparse_kernels as k, os; k._compilers = lambda: [[os.environ['CXX']]]\nimport warnings"), XDG_CACHE_HOME=str(tmp_path), CXX=str(cxx))
    assert out.startswith("False") and out.count("it is broken") == 1


@needs_kernels
def test_unwritable_cache_folder(tmp_path):
    (tmp_path/"file").write_text("")
    assert run(PROBE, XDG_CACHE_HOME=str(tmp_path/"file")).startswith("True []")


@needs_kernels
def test_compiled_once_and_shared(tmp_path):
    out = run("from fips_nb import sparse_kernels as k; import pathlib, time\nassert k.kernels(); (f,) = pathlib.Path(__import__('os').environ['XDG_CACHE_HOME'], 'fips_nb').iterdir(); print(f.stat().st_mtime_ns)", XDG_CACHE_HOME=str(tmp_path))
    again = run("from fips_nb import sparse_kernels as k; import pathlib\nk._compilers = lambda: []\nassert k.kernels(); (f,) = pathlib.Path(__import__('os').environ['XDG_CACHE_HOME'], 'fips_nb').iterdir(); print(f.stat().st_mtime_ns)", XDG_CACHE_HOME=str(tmp_path))
    assert out == again


@needs_kernels
def test_double_precision_falls_back_and_says_so_once(monkeypatch):
    monkeypatch.setattr(sk, "_said", set()); A = sparse(9, 20, .5)
    with pytest.warns(UserWarning, match="float64") as said:
        for F_ in FAST: torch.testing.assert_close(F_(A)(torch.ones(2, 20).double()), F.linear(torch.ones(2, 20).double(), A.double()))
    assert len(said) == 1


# ---- layers and models ----

class Gated(nn.Module):
    "A gated MLP whose three linears share a basis."
    def __init__(self, d=48, h=100, r=24, density=.25):
        super().__init__(); U = nn.Parameter(torch.randn(d, r).half().float()/5)
        V = lambda: sparse(r, h, density, seed=int(torch.randint(1000, ())))
        self.gate, self.up, self.down = FactorLinear(U, V(), "up"), FactorLinear(U, V(), "up"), FactorLinear(U, V(), "down")
    def forward(self, x): return self.down(F.silu(self.gate(x))*self.up(x))


def gated(n=2, **kwargs):
    torch.manual_seed(0); return nn.Sequential(*[Gated(**kwargs) for _ in range(n)]).eval()


@pytest.mark.parametrize("kind", sk.KINDS)
def test_packed_models_agree_and_come_back(kind):
    model = gated()
    if kind == "2:4":
        for f in factor_layers(model).values(): f.V.data.mul_(nm_mask(f.V.data.abs(), 2, 4, dim=0 if f.role == "up" else 1))
        for m in model: m.down.V = nn.Parameter(F.pad(m.down.V.data, (0, 4))); m.gate.V = nn.Parameter(F.pad(m.gate.V.data, (0, 4))); m.up.V = nn.Parameter(F.pad(m.up.V.data, (0, 4)))
    x = torch.randn(7, 48)
    with torch.no_grad(): ref = model(x)
    packed = pack(copy.deepcopy(model), kind)
    torch.testing.assert_close(packed(x), ref, rtol=1e-3, atol=1e-4)
    assert not factor_layers(packed)
    for other in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))): torch.testing.assert_close(other(x), ref, rtol=1e-3, atol=1e-4)
    if kind == "materialised": return
    back = unpack(packed); torch.testing.assert_close(back(x).detach(), ref)
    for n, f in factor_layers(back).items(): assert torch.equal(f.V, model.get_submodule(n).V) and f.V.requires_grad
    for m in back: assert m.gate.U is m.up.U is m.down.U


@needs_kernels
def test_basis_product_is_computed_once_for_gate_and_up():
    model = pack(gated(), "tiles"); calls = []
    class Counting(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if 'matmul' in func.__name__: calls.append(1)
            return func(*args, **(kwargs or {}))
    up = model[0].up
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            x = torch.randn(3, 48)
            calls.clear()
            with Counting(): model[0](x)
            assert len(calls) == 1
            y = model[0].gate(x); x.mul_(2) # changed in between: computed anew
            ref = F.linear(x@up.U, up.A.dense()); torch.testing.assert_close(up(x), ref, rtol=1e-4, atol=1e-4)
            model[0].gate(x); z = torch.randn(3, 48); torch.testing.assert_close(up(z), F.linear(z@up.U, up.A.dense()), rtol=1e-4, atol=1e-4)
            model[0].gate(x); model[0].up(x); assert sk._slot.last is None # nothing is kept


@needs_kernels
def test_gate_and_up_from_two_threads():
    model = pack(gated(), "tiles"); xs = [torch.randn(4, 48) for _ in range(3)]; bad = []
    with torch.no_grad(): refs = [model(x) for x in xs]
    def work(x, ref):
        with torch.no_grad():
            for _ in range(50):
                if not torch.equal(model(x), ref): bad.append(1)
    ts = [threading.Thread(target=work, args=a) for a in zip(xs, refs)]
    for t in ts: t.start()
    for t in ts: t.join()
    assert not bad


def test_training_is_refused():
    model = pack(gated(), "csr"); x = torch.randn(2, 48, requires_grad=True)
    with pytest.raises(RuntimeError, match="unpack"): model.train()
    with pytest.raises(RuntimeError, match="unpack"): model(x).sum().backward()
    assert not model.eval()(x.detach()).requires_grad


@needs_kernels
def test_autocast_and_half():
    model = gated(); x = torch.randn(5, 48); ref = model(x).detach()
    with torch.autocast("cpu", torch.bfloat16): y = pack(copy.deepcopy(model), "tiles")(x)
    torch.testing.assert_close(y.float(), ref, rtol=.05, atol=.05*ref.abs().max().item())
    half = pack(copy.deepcopy(model).bfloat16(), "tiles"); y = half(x.bfloat16()); assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), ref, rtol=.05, atol=.05*ref.abs().max().item())
    late = pack(copy.deepcopy(model), "tiles").bfloat16()(x.bfloat16())
    torch.testing.assert_close(late.float(), ref, rtol=.05, atol=.05*ref.abs().max().item())


def test_resident_bytes_are_the_sum_of_the_parts():
    model = gated(4, d=256, h=1024, r=128); packed = pack(model, "tiles")
    parts = [m for m in packed.modules() if isinstance(m, PackedLinear)]
    total = sum(p.A.nbytes() for p in parts) + sum({id(p.U): p.U.nbytes for p in parts}.values())
    assert total == resident_bytes(packed)
    with torch.no_grad(): packed(torch.randn(2, 256))
    assert resident_bytes(packed) == total # a product leaves nothing behind


def test_cached_products_are_counted():
    f = FactorLinear(nn.Parameter(torch.randn(8, 40)), torch.randn(40, 10), "up"); before = resident_bytes(f)
    with torch.no_grad(): f(torch.randn(1, 8)) # multiplies out and keeps it
    assert resident_bytes(f) == before + 8*10*4


# ---- choice ----

def test_choices_can_be_saved_and_applied(tmp_path):
    model = gated(d=64, h=200, r=32); x = torch.randn(3, 64); seen = []
    choices = optimize(model, x, repeats=1, log=seen.append)
    (tmp_path/"kernels.json").write_text(json.dumps(choices)); choices = json.loads((tmp_path/"kernels.json").read_text())
    assert set(choices["layers"]) == set(factor_layers(model)) and seen == [choice_table(choices)] and choices["threads"] == torch.get_num_threads()
    assert all(c in seen[0] for c in ("layer", "density", "bytes", *{r["choice"] for r in choices["rows"]}))
    with torch.no_grad(): ref = model(x)
    torch.testing.assert_close(pack(copy.deepcopy(model), choices)(x), ref, rtol=1e-3, atol=1e-3)
    part = pack(copy.deepcopy(model), {"0.gate": "csr"}); assert isinstance(part[0].gate, PackedLinear) and isinstance(part[0].up, FactorLinear)
    torch.testing.assert_close(part(x).detach(), ref, rtol=1e-3, atol=1e-3)
    for inputs in ((x,), {"input": x}): assert set(optimize(model, inputs, repeats=1, log=None)["layers"]) == set(choices["layers"])


def test_layers_of_one_kind_are_timed_once():
    rows = optimize(gated(4), torch.randn(2, 48), repeats=1, log=None)["rows"]
    assert sorted(len(r["layers"]) for r in rows) == [4, 8]


def test_wrong_choices():
    with pytest.raises(ValueError, match="no factor layer 'x'"): pack(gated(), {"x": "csr"})
    with pytest.raises(ValueError, match="'bsr' is not one of"): pack(gated(), {"0.up": "bsr"})
    with pytest.raises(ValueError, match="compress it first"): pack(nn.Linear(3, 3))
    with pytest.raises(ValueError, match="multiple of 8"): pack(gated(d=48, h=100, r=23), "2:4")
    with pytest.raises(ValueError, match="training mode"): optimize(gated().train(), torch.randn(2, 48))


def test_without_kernels_only_dense_ways_are_candidates(monkeypatch):
    monkeypatch.setattr(sk, "_load", lambda: None)
    for r in optimize(gated(), torch.randn(2, 48), repeats=1, log=None)["rows"]: assert set(r["ms"]) == {"materialised", "dense"}


def test_bench_leaves_the_model_alone():
    model = gated(); before = copy.deepcopy(model.state_dict()); res = bench(model, {n: torch.randn(n, 48) for n in (1, 5)}, repeats=1)
    assert [r["batch"] for r in res["rows"]] == [1, 5] and json.loads(json.dumps(res)) == res
    assert {"device", "threads", "rows", "dense_bytes"} <= res.keys() and {"batch", "dense_ms", "packed_ms", "ratio", "resident_bytes"} <= res["rows"][0].keys()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()) and len(factor_layers(model)) == 6


# ---- GPU kernels, without a GPU ----

def test_triton_kernel_in_the_interpreter():
    pytest.importorskip("triton", reason="triton is not installed")
    out = run("""
import torch, torch.nn.functional as F
from fips_nb.sparse_kernels import Condensed, _triton
torch.manual_seed(0)
for o, i, density in ((1, 8, 1.), (13, 70, .3), (50, 600, .25), (30, 20, .1)):
    A = torch.randn(o, i).half().float()*(torch.rand(o, i) < density); P = Condensed(A); live = (A != 0).any(1); b = torch.randn(o)
    for n in (1, 3):
        for dtype, tol in ((torch.float32, 1e-4), (torch.float16, 2e-2)):
            x = torch.randn(n, i).to(dtype)
            for bias in (None, b): torch.testing.assert_close(_triton(P, x, None if bias is None else bias[live]).float(), F.linear(x.float(), A, bias)[:, live], rtol=tol, atol=tol)
    x[0, 0] = float('nan'); assert _triton(P, x)[0].isnan().all()
assert _triton(P, torch.randn(2, 0, 20)) is None
print('same')
""", TRITON_INTERPRET="1")
    assert out.strip().endswith("same")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: the Triton kernel runs in the interpreter only, and 2:4 only as storage")
def test_on_a_gpu():
    A = sparse(256, 512, 1.).half(); x = torch.randn(4, 512, device="cuda").half()
    B = A*fan_in_mask(torch.rand(512, 256), 128).T; ref = F.linear(x.double(), B.cuda().double())
    close(Condensed(B).cuda()(x), ref, 128); close(Dense(B).cuda()(x), ref, 128)
    B = A*nm_mask(torch.rand(256, 512), 2, 4, dim=1); X = torch.randn(64, 512, device="cuda").half(); P = TwoFour(B).cuda()
    close(P(X), F.linear(X.double(), B.cuda().double()), 256); assert torch.equal(P.dense().cpu(), B)


def test_bench_script(tmp_path):
    out = tmp_path/"r.json"
    res = subprocess.run([sys.executable, ROOT/"scripts/bench_kernels.py", "--device", "cpu", "--quick", "--rows", "1,3", "--repeats", "1", "--out", out],
                         env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert res.returncode == 0, res.stdout + res.stderr
    got = json.loads(out.read_text()); assert [r["rows"] for r in got["products"]] == [1, 3] and got["device"] and got["layers"]
    assert all(e < 1e-4 for r in got["products"] for e in r["max_error"].values())


# ---- fips bench ----

def fips(capsys, *words):
    from fips_nb import cli
    return (cli.main([str(w) for w in words]), *capsys.readouterr())


@pytest.mark.filterwarnings("default")
def test_bench_command(capsys, tmp_path):
    from fips_nb import hub
    from fips_nb.demo import demo_vit
    status, out, _ = fips(capsys, "bench", "demo-vit", "--batch", "1,3", "--budget", ".25", "--json"); res = json.loads(out)
    assert status == 0 and res["budget"] == .25 and [r["batch"] for r in res["rows"]] == [1, 3] and res["threads"] == torch.get_num_threads() and res["device"]
    assert all({"dense_ms", "packed_ms", "ratio", "resident_bytes"} <= r.keys() for r in res["rows"])
    hub.save(sk.random_factors(demo_vit(), .5, group_size=4), tmp_path/"m", "demo-vit")
    status, out, _ = fips(capsys, "bench", tmp_path/"m", "--prefer", "memory"); assert status == 0 and "dense ms" in out and "budget" not in out
    for words, said in ((("bench", tmp_path/"m", "--budget", ".5"), "already"), (("bench", "demo-vti"), "nearest"), (("bench", "no/such"), "no folder"),
                        (("bench", "demo-vit", "--batch", "0"), "less than 1"), (("bench", "demo-vit", "--batch", "a"), "batch"), (("bench", "demo-vit", "--budget", "2"), "outside")):
        status, out, err = fips(capsys, *words); assert status == 2 and out == "" and err.startswith("fips: error: ") and said in err and err.count("\n") == 1, err


def test_random_factors_meet_the_budget():
    from fips_nb.demo import demo_vit
    model = sk.random_factors(demo_vit(), .3, group_size=4, sparsity=.8); fs = factor_layers(model).values()
    kept = sum(int((f.V != 0).sum()) for f in fs) + sum({id(f.U): f.U.numel() for f in fs}.values())
    assert abs(kept/sum(f.in_features*f.out_features for f in fs) - .3) < .01 and all(abs((f.V != 0).float().mean() - .2) < .02 for f in fs)
    assert all(f.U is None for f in factor_layers(sk.random_factors(demo_vit(), .3, "sparse")).values())
