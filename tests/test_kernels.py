"""Sparse kernels and packed layers: formats over shapes and dtypes, against dense; fallbacks."""
import copy
import json
import os
import pickle
import subprocess
import sys
import threading
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fips_nb.speed import packing
from fips_nb import sparse_kernels as sk
from fips_nb.speed.packing import (PackedLinear, bench, choice_table, optimize, pack, pack_layer,
                                   random_factors, resident_bytes, unpack)
from fips_nb.sparse_factors import FactorLinear, factor_layers, fan_in_mask, nm_mask, to_dense
from fips_nb.sparse_kernels import (FORMATS, Condensed, Csr, Dense, Tiles, TwoFour, format_bytes,
                                    kernels)

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.filterwarnings("error")
SHAPES = [(1, 1), (5, 7), (32, 64), (33, 65), (64, 256), (100, 257), (257, 100), (3, 700)]
DENSITIES = [0., .02, .1, .25, .6, 1.]
COMPILERS = sk._compilers
FAST = [Csr, Condensed, Tiles]
needs_kernels = pytest.mark.skipif(not kernels(), reason="no C++ compiler here, so no CPU kernels")


def sparse(o, i, density, seed=0, dtype=torch.float32):
    "A matrix whose values are exact in 16 bits, with the given share of entries."
    g = torch.Generator().manual_seed(seed + 1000*o + i)
    values = torch.randn(o, i, generator=g).half().to(dtype)
    return values*(torch.rand(o, i, generator=g) < density)


def close(y, ref, k):
    "Compare with a double-precision reference; the error of a sum of `k` products of order one."
    tol = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[y.dtype]
    torch.testing.assert_close(y.double(), ref, rtol=tol, atol=tol*max(k, 1)**.5 + 1e-6)


def linear(x, A, bias=None):
    "The product in double precision."
    return F.linear(x.double(), A.double(), None if bias is None else bias.double())


def near(y, ref, tol=1e-4): torch.testing.assert_close(y, ref, rtol=tol, atol=tol)


def run(code, *args, **env):
    "Run `code` in a fresh interpreter from the repository."
    res = subprocess.run([sys.executable, "-c", code, *args], cwd=ROOT, capture_output=True, text=True,
                         env=os.environ | {"PYTHONPATH": str(ROOT)} | env)
    assert res.returncode == 0, res.stdout + res.stderr
    return res.stdout + res.stderr


def in_threads(work, args):
    "Run `work(*a)` for each `a` of `args` at the same time."
    threads = [threading.Thread(target=work, args=a) for a in args]
    for t in threads: t.start()
    for t in threads: t.join()


# ---- formats ----

@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("density", DENSITIES)
def test_formats_are_exact_and_weigh_what_arithmetic_says(shape, density):
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        A = sparse(*shape, density, dtype=dtype)
        A[A.shape[0]//2:] *= (torch.rand(A.shape[0] - A.shape[0]//2, 1) < .5) # some empty rows
        for kind, Format in FORMATS.items():
            if kind == "2:4": continue
            P = Format(A)
            B = P.dense()
            assert torch.equal(A, B) and B.dtype == dtype
            stored = sum(t.untyped_storage().nbytes() for t in P.buffers())
            said = format_bytes(kind, A != 0, P.values.element_size())
            assert P.nbytes() == stored == said


@pytest.mark.parametrize("shape", [(1, 8), (5, 16), (33, 64), (100, 264)], ids=str)
def test_two_four_is_exact(shape):
    for keep in (0, 1, 2):
        A = torch.zeros(shape)
        if keep: A = sparse(*shape, 1.)*nm_mask(torch.rand(shape), keep, 4, dim=1)
        P = TwoFour(A)
        assert torch.equal(P.dense(), A) and P.nbytes() == format_bytes("2:4", A != 0)
        x = torch.ones(2, shape[1])
        torch.testing.assert_close(P(x), F.linear(x, A))
    with pytest.raises(ValueError, match="3 entries in one run"):
        TwoFour(torch.tensor([[1., 1., 1., 0., 0, 0, 0, 0]]))
    with pytest.raises(ValueError, match="multiple of 8"): TwoFour(torch.zeros(2, 12))


def test_values_take_the_narrowest_exact_type_and_round_only_when_told():
    A = torch.randn(40, 50)*(torch.rand(40, 50) < .3)
    assert Csr(A).values.dtype == torch.float32 and torch.equal(Csr(A).dense(), A)
    assert Csr(A*2**-120, torch.bfloat16).values.dtype == torch.bfloat16
    P = Tiles(A, torch.float16)
    assert torch.equal(P.dense(), A.half().float()) and P.nbytes() < Tiles(A).nbytes()


def test_too_many_columns_are_refused():
    A = torch.zeros(1, 65_537)
    A[0, -1] = 1
    for Format in (Csr, Condensed):
        with pytest.raises(ValueError, match="65537 columns"): Format(A)
    assert torch.equal(Tiles(A).dense(), A) and torch.equal(Csr(A[:, 1:]).dense(), A[:, 1:])
    with pytest.raises(ValueError, match="infinity"): Tiles(torch.tensor([[float("inf")]]))
    with pytest.raises(ValueError, match="'coo' is not one of"): format_bytes("coo", A != 0)


# ---- products ----

@needs_kernels
@pytest.mark.parametrize("Format", FAST)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_over_shapes_densities_and_rows(Format, shape):
    o, i = shape
    for density in (0., .1, .6):
        A = sparse(o, i, density)
        P = Format(A)
        b = torch.randn(o)
        for n in (1, 3, 4, 17, 33, 70):
            x = torch.randn(n, i)
            close(P(x, b), linear(x, A, b), density*i)
    for lead in ((0,), (2, 0), (1, 1, 1), (2, 3)): # empty, nested
        x = torch.randn(*lead, i)
        y = P(x)
        assert y.shape == (*lead, o)
        close(y, linear(x, A), i)


@needs_kernels
@pytest.mark.parametrize("Format", FAST)
@pytest.mark.parametrize("n", [16, 31, 32, 48, 64, 100, 112, 160, 197, 208, 209, 512, 832, 833,
                               1700])
def test_products_over_many_rows(Format, n):
    A = sparse(70, 130, .3)
    x, b = torch.randn(n, 130), torch.randn(70)
    close(Format(A)(x, b), linear(x, A, b), 40)


@needs_kernels
@pytest.mark.parametrize("Format", FAST)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("values", [torch.float32, torch.float16, torch.bfloat16])
def test_products_over_dtypes(Format, dtype, values):
    A = sparse(65, 130, .3).to(values).float()
    P = Format(A, values)
    assert P.values.dtype == values
    for n in (1, 5, 40, 230):
        for bias in (None, torch.randn(65), torch.randn(65).bfloat16()):
            x = torch.randn(n, 130).to(dtype)
            y = P(x, bias)
            assert y.dtype == dtype
            close(y, linear(x, A, bias), 40)


@needs_kernels
def test_half_precision_extremes():
    "Denormals and the largest numbers of float16, ties of bfloat16, with denormals flushed or not."
    A = torch.tensor([[2.**-24, 65504., 1., 0.]])
    x = torch.eye(4)
    torch.set_flush_denormal(True)
    try:
        for Format in FAST:
            P = Format(A)
            assert torch.equal(P(x)[:, 0], A[0]) and P.values.dtype == torch.float16
    finally: torch.set_flush_denormal(False)
    B = torch.tensor([[1., 2**-8]])
    X = torch.tensor([[1., 1.], [1 + 2**-7, 1.]]).bfloat16() # ties go to even
    for Format in FAST: assert torch.equal(Format(B)(X), F.linear(X.float(), B).bfloat16())


@needs_kernels
@pytest.mark.parametrize("Format", FAST)
@pytest.mark.parametrize("n", [2, 40])
def test_nan_and_infinity_pass_as_in_dense(Format, n):
    A = sparse(50, 70, .2)
    b = torch.randn(50)
    for bad in (float("nan"), float("inf"), -float("inf")):
        x = torch.randn(n, 70)
        x[1, 3] = bad
        y, ref = Format(A)(x, b), F.linear(x, A, b)
        assert torch.equal(y.isnan(), ref.isnan()) and y[1].isnan().any()
        torch.testing.assert_close(y, ref, rtol=1e-4, atol=1e-4, equal_nan=True)


@needs_kernels
@pytest.mark.parametrize("Format", FAST)
def test_strides(Format):
    A = sparse(40, 70, .3)
    P = Format(A)
    big = torch.randn(60, 3, 140)
    inputs = [big[:, 1, ::2], big[:, 0, :70], big[..., 70:], torch.randn(70, 9).T,
              torch.randn(70).expand(5, 70), torch.randn(1, 1, 70).expand(2, 4, 70)]
    for x in inputs: near(P(x), F.linear(x, A))
    bias = torch.randn(80)[::2]
    near(P(big[:, 0, :70], bias), F.linear(big[:, 0, :70], A, bias))
    for wrong in (torch.randn(3, 71), torch.randn(69)):
        with pytest.raises(ValueError, match="for a matrix of 70 columns"): P(wrong)
    assert P(torch.randn(70)).shape == (40,)


@needs_kernels
def test_against_scipy():
    scipy_sparse = pytest.importorskip("scipy.sparse", reason="scipy is not installed")
    for density in (.03, .3):
        A = sparse(300, 500, density)
        S = scipy_sparse.csr_matrix(A.double().numpy())
        x = torch.randn(50, 500)
        ref = torch.from_numpy((S@x.double().numpy().T).T.copy())
        for Format in FAST: close(Format(A)(x), ref, 150)


@needs_kernels
def test_threads_agree_and_share_a_layer():
    A = sparse(4000, 1200, .3)
    x = torch.randn(60, 1200)
    old = torch.get_num_threads()
    try:
        for Format in FAST:
            P = Format(A)
            ref = {}
            for t in (1, 2, 3):
                torch.set_num_threads(t)
                ref[t] = P(x), P(x[:3])
            assert all(torch.equal(a, b) for t in (2, 3) for a, b in zip(ref[1], ref[t]))
            bad = []
            def work():
                for _ in range(5):
                    if not torch.equal(P(x), ref[1][0]): bad.append("many rows")
                    if not torch.equal(P(x[:3]), ref[1][1]): bad.append("few rows")
            in_threads(work, [()]*3)
            assert not bad
    finally: torch.set_num_threads(old)


@needs_kernels
@pytest.mark.skipif(sys.platform != "linux", reason="torch's OpenMP is found so on Linux only")
def test_kernels_find_the_threads_of_torch():
    assert sk._load().fips_threads() == 1


# ---- tensors that do not fit are refused before a kernel reads them ----

def change(P, name, value, at=-1):
    "Set one entry of a buffer."
    P.get_buffer(name).view(-1)[at] = value


HOSTILE = [("csr", "columns", 70, 3), ("csr", "starts", -5, 3), ("csr", "starts", 2**31 - 1, -1),
           ("csr", "starts", 10**6, 5), ("condensed", "columns", 70, 3), ("tiles", "columns", 64, 3),
           ("tiles", "columns", 40, -1), ("tiles", "starts", -1, 2), ("tiles", "starts", 10**6, -1)]


@pytest.mark.parametrize("kind, name, value, at", HOSTILE)
@pytest.mark.parametrize("way", ["in place", "state dict", "after a product"])
def test_indices_outside_the_matrix_are_refused(kind, name, value, at, way):
    P, x = sk.FORMATS[kind](sparse(40, 70, 1. if name == "columns" else .3)), torch.ones(3, 70)
    if way == "after a product": P(x)
    if way == "state dict":
        state = {k: t.clone() for k, t in P.state_dict().items()}
        state[name].view(-1)[at] = value
        P.load_state_dict(state)
    else: change(P, name, value, at)
    for product in (lambda: P(x), P.dense):
        with pytest.raises(ValueError, match="column|starts"): product()


def test_lengths_that_do_not_fit_are_refused():
    A, x = sparse(40, 70, .3), torch.ones(3, 70)
    for kind in ("csr", "condensed", "tiles"):
        for name in ("values", "columns"):
            P = sk.FORMATS[kind](A)
            P._buffers[name] = P._buffers[name][:-1].clone()
            with pytest.raises(ValueError, match=kind[:4].title()[:3] + "|starts"): P(x)
        P = sk.FORMATS[kind](A)
        for n in (1, 39, 41):
            with pytest.raises(ValueError, match=f"a bias \\({n},\\)"): P(x, torch.ones(n))
        with pytest.raises(ValueError, match="69 features"): P(x[:, :-1])
    U = torch.nn.Parameter(torch.ones(9, 40))
    with pytest.raises(ValueError, match="bias"):
        PackedLinear(U, sk.Csr(A), "down", torch.ones(1))
    with pytest.raises(ValueError, match="bias"): FactorLinear(None, A, "up", torch.ones(1))


# ---- fallbacks ----

@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """Kernels that are looked for anew, in a cache folder of the test, by a compiler that takes no time.

    `fresh.built()` counts its calls; what it gives is the library of this session.
    """
    lib, log = sk._load(), tmp_path/"log"
    clear = lambda: (sk._load.cache_clear(), sk._say.cache_clear())
    def compiler(code, name="c++"):
        cxx = tmp_path/name
        cxx.write_text(f"#!/bin/sh\necho called >> {log}\n{code}\n")
        cxx.chmod(0o755)
        monkeypatch.setattr(sk, "_compilers", lambda: [[str(cxx)]])
    for k in ("HOME", "XDG_CACHE_HOME"): monkeypatch.setenv(k, str(tmp_path/k.lower()))
    compiler(f"for last; do :; done\ncp {lib and lib._name} $last")
    clear()
    yield SimpleNamespace(compiler=compiler, clear=clear, built=lambda: log.exists() and len(log.read_text().split()),
                          folder=tmp_path/"xdg_cache_home"/"fips_nb")
    clear()


def probe():
    "Whether there are kernels, and what was said, when each format multiplied twice."
    A, x = sparse(40, 70, .3), torch.randn(5, 70)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for Format in FAST:
            for _ in range(2): near(Format(A)(x), F.linear(x, A))
    return kernels(), [str(w.message) for w in said]


def test_off_switch(fresh, monkeypatch):
    monkeypatch.setenv("FIPS_NB_KERNELS", "off")
    assert probe() == (False, []) and not fresh.built()


def test_no_compiler_runs_dense_and_says_so_once(fresh, monkeypatch):
    monkeypatch.setattr(sk, "_compilers", lambda: [])
    there, (said,) = probe()
    assert not there and "no C++ compiler" in said and "pip install" in said


def test_broken_compiler_runs_dense_and_says_why(fresh):
    fresh.compiler("echo it is broken >&2\nexit 1")
    there, (said,) = probe()
    assert not there and "it is broken" in said and fresh.built() == 1


@needs_kernels
def test_unwritable_cache_folder(fresh, monkeypatch, tmp_path):
    (tmp_path/"file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path/"file"))
    assert probe() == (True, []) and fresh.built() == 1


ONCE = """
import fips_nb.sparse_kernels as k
k._compilers = lambda: []
print(k.kernels() and k.library()._name)
"""


@needs_kernels
def test_compiled_once_and_shared_by_processes(fresh, monkeypatch):
    "The one test that compiles, by whatever compiler is here."
    monkeypatch.setattr(sk, "_compilers", COMPILERS)
    assert probe() == (True, []) and not fresh.built()
    (lib,) = fresh.folder.glob("*.so")
    assert run(ONCE).strip() == sk.library()._name == str(lib)


@needs_kernels
@pytest.mark.parametrize("damage", ["none", "cut", "altered", "digest", "writable"])
def test_a_broken_library_is_compiled_again_and_never_opened(damage, fresh):
    assert probe() == (True, []) and fresh.built() == 1
    (lib,) = fresh.folder.glob("*.so")
    good = lib.read_bytes()
    lib.unlink() # it is open in this process
    lib.write_bytes(dict(cut=good[:5000], altered=good[:-1] + bytes([good[-1] ^ 1])).get(damage, good))
    lib.chmod(0o777 if damage == "writable" else 0o700)
    if damage == "digest": lib.with_suffix(".sha256").unlink()
    fresh.clear()
    assert probe() == (True, []) and fresh.built() == (1 if damage == "none" else 2)
    assert lib.read_bytes() == good and lib.stat().st_mode & 0o777 == 0o700


FOREIGN = """
import os, sys, torch, torch.nn.functional as F
import fips_nb.sparse_kernels as k
cxx, planted, *homes = sys.argv[1:]
k._compilers = lambda: [[cxx]]
A, x = torch.randn(40, 70)*(torch.rand(40, 70) < .3), torch.randn(5, 70)
for home in [*homes, homes[0]]:
    os.environ['XDG_CACHE_HOME'] = home
    k._load.cache_clear()
    assert k.kernels()
    torch.testing.assert_close(k.Csr(A)(x), F.linear(x, A), rtol=1e-4, atol=1e-4)
    print('mine', flush=True)
    if home == homes[-1]: os.chmod(planted, 0o700)
"""


@needs_kernels
def test_foreign_cache_folders_are_not_used(fresh, tmp_path):
    """A planted library of the right name is not opened: it ends the process with status 7.

    The folder is one that others can write to, a link to it, or a relative path to it; once it is
    private, the library is taken, which shows that it was refused for that alone."""
    assert probe()[0]
    (name,) = (p.name for p in fresh.folder.glob("*.so"))
    planted, link, evil = tmp_path/"there"/"fips_nb", tmp_path/"link", tmp_path/"evil.cpp"
    for d in (planted, link): d.mkdir(parents=True)
    evil.write_text("#include <cstdlib>\n__attribute__((constructor)) void f() { _Exit(7); }\n")
    assert sk._compile(COMPILERS()[0], evil, planted/name) is None
    (planted/name).chmod(0o700)
    (planted/name).with_suffix(".sha256").write_text(sk._digest(planted/name))
    planted.chmod(0o777)
    (link/"fips_nb").symlink_to(planted)
    homes = [planted.parent, link, os.path.relpath(planted.parent, ROOT)]
    words = [str(w) for w in (tmp_path/"c++", planted, *homes)]
    res = subprocess.run([sys.executable, "-c", FOREIGN, *words], cwd=ROOT, capture_output=True, text=True,
                         env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert (res.returncode, res.stdout.split()) == (7, ["mine"]*3), res.stderr


@needs_kernels
def test_double_precision_falls_back_and_says_so_once():
    sk._say.cache_clear()
    A = sparse(9, 20, .5)
    x = torch.ones(2, 20).double()
    with pytest.warns(UserWarning, match="float64") as said:
        for Format in FAST: torch.testing.assert_close(Format(A)(x), linear(x, A))
    assert len(said) == 1


# ---- layers and models ----

class Gated(nn.Module):
    "A gated MLP whose three linears share a basis."
    def __init__(self, d=48, h=100, r=24, density=.25):
        super().__init__()
        U = nn.Parameter(torch.randn(d, r).half().float()/5)
        def V(): return sparse(r, h, density, seed=int(torch.randint(1000, ())))
        self.gate, self.up = FactorLinear(U, V(), "up"), FactorLinear(U, V(), "up")
        self.down = FactorLinear(U, V(), "down")
    def forward(self, x): return self.down(F.silu(self.gate(x))*self.up(x))


def gated(n=2, **kwargs):
    torch.manual_seed(0)
    return nn.Sequential(*[Gated(**kwargs) for _ in range(n)]).eval()


def fit_two_four(model):
    "Prune the projections of a gated model to 2:4 in reading direction, and pad them to eights."
    for f in factor_layers(model).values():
        f.V.data.mul_(nm_mask(f.V.data.abs(), 2, 4, dim=0 if f.role == "up" else 1))
        f.V = nn.Parameter(F.pad(f.V.data, (0, 4)))


@pytest.mark.parametrize("kind", packing.KINDS)
def test_packed_models_agree_and_come_back(kind):
    model = gated()
    if kind == "2:4": fit_two_four(model)
    x = torch.randn(7, 48)
    with torch.no_grad(): ref = model(x)
    packed = pack(copy.deepcopy(model), kind)
    torch.testing.assert_close(packed(x), ref, rtol=1e-3, atol=1e-4)
    assert not factor_layers(packed)
    for other in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        torch.testing.assert_close(other(x), ref, rtol=1e-3, atol=1e-4)
    if kind == "materialised": return
    back = unpack(packed)
    torch.testing.assert_close(back(x).detach(), ref)
    for n, f in factor_layers(back).items():
        assert torch.equal(f.V, model.get_submodule(n).V) and f.V.requires_grad
    for m in back: assert m.gate.U is m.up.U is m.down.U


def test_unpacked_layers_still_know_what_they_stand_for():
    Conv1D = pytest.importorskip("transformers.pytorch_utils").Conv1D
    f = FactorLinear(nn.Parameter(torch.randn(8, 3)), torch.randn(3, 10), "up", torch.zeros(10))
    f.kind = Conv1D
    model = unpack(pack(nn.Sequential(f).eval(), "csr"))
    assert isinstance(to_dense(model)[0], Conv1D)


@needs_kernels
def test_basis_product_is_computed_once_for_gate_and_up():
    model = pack(gated(), "tiles")
    calls = []
    class Counting(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if "matmul" in func.__name__: calls.append(1)
            return func(*args, **(kwargs or {}))
    gate, up = model[0].gate, model[0].up
    assert gate.shared is up.shared and gate.shared is not model[1].gate.shared
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            x = torch.randn(3, 48)
            calls.clear()
            with Counting(): model[0](x)
            assert len(calls) == 1
            gate(x)
            x.mul_(2) # changed in between: computed anew
            near(up(x), F.linear(x@up.U, up.A.dense()))
            gate(x)
            z = torch.randn(3, 48)
            near(up(z), F.linear(z@up.U, up.A.dense()))
            gate(x)
            up(x)
            assert gate.shared.local.last is None # nothing is kept


def test_only_packed_neighbours_share_a_product():
    "A layer that stays, or is materialised, never asks for the product, so nothing waits for it."
    for choices in ({"0.gate": "csr"}, {"0.gate": "csr", "0.up": "materialised"}):
        assert pack(gated(), choices)[0].gate.shared is None
    copied = copy.deepcopy(pack(gated(), "csr"))
    assert copied[0].gate.shared is copied[0].up.shared is not None


@needs_kernels
def test_gate_and_up_from_two_threads():
    model = pack(gated(), "tiles")
    xs = [torch.randn(4, 48) for _ in range(3)]
    bad = []
    with torch.no_grad(): refs = [model(x) for x in xs]
    def work(x, ref):
        with torch.no_grad():
            for _ in range(50):
                if not torch.equal(model(x), ref): bad.append(1)
    in_threads(work, list(zip(xs, refs)))
    assert not bad


def test_training_is_refused():
    model = pack(gated(), "csr")
    x = torch.randn(2, 48, requires_grad=True)
    with pytest.raises(RuntimeError, match="unpack"): model.train()
    with pytest.raises(RuntimeError, match="unpack"): model(x).sum().backward()
    assert not model.eval()(x.detach()).requires_grad


@needs_kernels
def test_autocast_and_half():
    model = gated()
    x = torch.randn(5, 48)
    ref = model(x).detach()
    largest = float(ref.abs().max())
    def alike(y): torch.testing.assert_close(y.float(), ref, rtol=.05, atol=.05*largest)
    with torch.autocast("cpu", torch.bfloat16): y = pack(copy.deepcopy(model), "tiles")(x)
    alike(y)
    y = pack(copy.deepcopy(model).bfloat16(), "tiles")(x.bfloat16())
    assert y.dtype == torch.bfloat16
    alike(y)
    alike(pack(copy.deepcopy(model), "tiles").bfloat16()(x.bfloat16()))


def test_resident_bytes_are_the_sum_of_the_parts():
    packed = pack(gated(4, d=256, h=1024, r=128), "tiles")
    parts = [m for m in packed.modules() if isinstance(m, PackedLinear)]
    bases = {id(p.U): p.U.nbytes for p in parts}
    total = sum(p.A.nbytes() for p in parts) + sum(bases.values())
    assert total == resident_bytes(packed)
    with torch.no_grad(): packed(torch.randn(2, 256))
    assert resident_bytes(packed) == total # a product leaves nothing behind


def test_cached_products_are_counted():
    f = FactorLinear(nn.Parameter(torch.randn(8, 40)), torch.randn(40, 10), "up")
    before = resident_bytes(f)
    with torch.no_grad(): f(torch.randn(1, 8)) # multiplies out and keeps it
    assert resident_bytes(f) == before + 8*10*4


# ---- choice ----

def test_choices_can_be_saved_and_applied(tmp_path):
    model = gated(d=64, h=200, r=32)
    x = torch.randn(3, 64)
    seen = []
    choices = optimize(model, x, repeats=1, log=seen.append)
    path = tmp_path/"kernels.json"
    path.write_text(json.dumps(choices))
    choices = json.loads(path.read_text())
    assert set(choices["layers"]) == set(factor_layers(model)) and seen == [choice_table(choices)]
    assert choices["threads"] == torch.get_num_threads()
    chosen = {r["choice"] for r in choices["rows"]}
    assert all(c in seen[0] for c in ("layer", "density", "bytes", *chosen))
    with torch.no_grad(): ref = model(x)
    near(pack(copy.deepcopy(model), choices)(x), ref, 1e-3)
    part = pack(copy.deepcopy(model), {"0.gate": "csr"})
    assert isinstance(part[0].gate, PackedLinear) and isinstance(part[0].up, FactorLinear)
    near(part(x).detach(), ref, 1e-3)
    for inputs in ((x,), {"input": x}):
        again = optimize(model, inputs, repeats=1, log=None)
        assert set(again["layers"]) == set(choices["layers"])


def test_lines_of_the_table_of_choices_are_aligned():
    lines = choice_table(optimize(gated(), torch.randn(2, 48), repeats=1, log=None)).splitlines()
    assert len({len(line) for line in lines[1:]}) == 1 and len(lines) == 4


def test_optimize_leaves_no_product_behind():
    model = gated(d=48, h=100, r=40) # a rank at which a factor layer multiplies out
    optimize(model, torch.randn(2, 48), repeats=1, log=None)
    assert all(f.cached is None for f in factor_layers(model).values())


def test_layers_of_one_kind_are_timed_once():
    rows = optimize(gated(4), torch.randn(2, 48), repeats=1, log=None)["rows"]
    assert sorted(len(r["layers"]) for r in rows) == [4, 8]


def test_wrong_choices():
    with pytest.raises(ValueError, match="no factor layer 'x'"): pack(gated(), {"x": "csr"})
    with pytest.raises(ValueError, match="'bsr' is not one of"): pack(gated(), {"0.up": "bsr"})
    with pytest.raises(ValueError, match="'bsr' is not one of"):
        pack_layer(gated()[0].up, "bsr")
    with pytest.raises(ValueError, match="compress it first"): pack(nn.Linear(3, 3))
    with pytest.raises(ValueError, match="multiple of 8"): pack(gated(d=48, h=100, r=23), "2:4")
    with pytest.raises(ValueError, match="training mode"):
        optimize(gated().train(), torch.randn(2, 48))


def test_without_kernels_only_dense_ways_are_candidates(monkeypatch):
    monkeypatch.setattr(sk, "_load", lambda: None)
    for r in optimize(gated(), torch.randn(2, 48), repeats=1, log=None)["rows"]:
        assert set(r["ms"]) == {"materialised", "dense"}


def test_bench_leaves_the_model_alone():
    model = gated()
    before = copy.deepcopy(model.state_dict())
    res = bench(model, {n: torch.randn(n, 48) for n in (1, 5)}, repeats=1)
    assert [r["batch"] for r in res["rows"]] == [1, 5] and json.loads(json.dumps(res)) == res
    assert {"device", "threads", "rows", "dense_bytes"} <= res.keys()
    assert {"batch", "dense_ms", "packed_ms", "ratio", "resident_bytes"} <= res["rows"][0].keys()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert len(factor_layers(model)) == 6


# ---- GPU kernels, without a GPU ----

TRITON = """
import torch, torch.nn.functional as F
import fips_nb.sparse_kernels as k
torch.manual_seed(0)
for o, i, density in ((1, 8, 1.), (13, 70, .3), (50, 600, .25), (30, 20, .1)):
    A = torch.randn(o, i).half().float()*(torch.rand(o, i) < density)
    P = k.Condensed(A)
    live = (A != 0).any(1)
    b = torch.randn(o)
    for n in (1, 3):
        for dtype, tol in ((torch.float32, 1e-4), (torch.float16, 2e-2)):
            x = torch.randn(n, i).to(dtype)
            for bias in (None, b):
                y = k._triton(P, x, None if bias is None else bias[live])
                ref = F.linear(x.float(), A, bias)[:, live]
                torch.testing.assert_close(y.float(), ref, rtol=tol, atol=tol)
    x[0, 0] = float('nan')
    assert k._triton(P, x)[0].isnan().all()
assert k._triton(P, torch.randn(2, 0, 20)) is None
print('same')
"""


def test_triton_kernel_in_the_interpreter():
    pytest.importorskip("triton", reason="triton is not installed")
    assert run(TRITON, TRITON_INTERPRET="1").strip().endswith("same")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: see the interpreter")
def test_on_a_gpu():
    A = sparse(256, 512, 1.).half()
    x = torch.randn(4, 512, device="cuda").half()
    B = A*fan_in_mask(torch.rand(512, 256), 128).T
    ref = linear(x, B.cuda())
    close(Condensed(B).cuda()(x), ref, 128)
    close(Dense(B).cuda()(x), ref, 128)
    B = A*nm_mask(torch.rand(256, 512), 2, 4, dim=1)
    X = torch.randn(64, 512, device="cuda").half()
    P = TwoFour(B).cuda()
    close(P(X), linear(X, B.cuda()), 256)
    assert torch.equal(P.dense().cpu(), B)


def test_bench_script(tmp_path):
    out = tmp_path/"r.json"
    words = ["--device", "cpu", "--quick", "--rows", "1,3", "--repeats", "1", "--out", out]
    res = subprocess.run([sys.executable, ROOT/"scripts/bench_kernels.py", *words],
                         env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert res.returncode == 0, res.stdout + res.stderr
    got = json.loads(out.read_text())
    assert [r["rows"] for r in got["products"]] == [1, 3] and got["device"] and got["layers"]
    assert all(e < 1e-4 for r in got["products"] for e in r["max_error"].values())


# ---- fips bench ----

def fips(capsys, *words):
    from fips_nb.run import cli
    return (cli.main([str(w) for w in words]), *capsys.readouterr())


@pytest.mark.filterwarnings("default")
def test_bench_command(capsys, tmp_path):
    from fips_nb.store import hub
    from fips_nb.data.demo import demo_vit
    words = ("bench", "demo-vit", "--batch", "1,3", "--params", ".5", "--json")
    status, out, _ = fips(capsys, *words)
    res = json.loads(out)
    assert status == 0 and abs(res["budget"] - .227) < 1e-3 and [r["batch"] for r in res["rows"]] == [1, 3]
    assert res["threads"] == torch.get_num_threads() and res["device"]
    wanted = {"dense_ms", "packed_ms", "ratio", "resident_bytes"}
    assert all(wanted <= r.keys() for r in res["rows"])
    hub.save(random_factors(demo_vit(), .5, group_size=4), tmp_path/"m", arch="demo-vit")
    status, out, _ = fips(capsys, "bench", tmp_path/"m", "--prefer", "memory")
    assert status == 0 and "dense ms" in out and "budget" not in out


@pytest.mark.parametrize("words, said", [
    (("demo-vti",), "nearest"), (("no/such",), "no folder"),
    (("demo-vit", "--batch", "0"), "less than 1"), (("demo-vit", "--batch", "a"), "batch"),
    (("demo-vit", "--params", "2"), "--params 2 is outside"),
    (("{folder}", "--params", ".5"), "already")], ids=str)
def test_wrong_arguments_of_the_bench_command(capsys, tmp_path, words, said):
    from fips_nb.store import hub
    from fips_nb.data.demo import demo_vit
    if "{folder}" in words:
        hub.save(random_factors(demo_vit(), .5, group_size=4), tmp_path/"m", arch="demo-vit")
    words = [w.format(folder=tmp_path/"m") for w in words]
    status, out, err = fips(capsys, "bench", *words)
    assert status == 2 and out == "" and said in err, err
    assert err.startswith("fips: error: ") and err.count("\n") == 1, err


def test_random_factors_meet_the_budget():
    from fips_nb.data.demo import demo_vit
    model = random_factors(demo_vit(), .3, group_size=4, sparsity=.8)
    fs = factor_layers(model).values()
    bases = {id(f.U): f.U.numel() for f in fs}
    kept = sum(int((f.V != 0).sum()) for f in fs) + sum(bases.values())
    whole = sum(f.in_features*f.out_features for f in fs)
    assert abs(kept/whole - .3) < .01
    assert all(abs((f.V != 0).float().mean() - .2) < .02 for f in fs)
    pruned = factor_layers(random_factors(demo_vit(), .3, "pruning"))
    assert all(f.U is None for f in pruned.values())
