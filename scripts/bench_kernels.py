"""Time the formats of fips_nb on this machine: `bench_kernels.py --out results/04_gpu.json`.

Each product `x A^T` is timed dense, in every format that fits, and by torch's CSR, for some rows of
`x`. On a GPU a call is timed twice: eagerly (many calls, one synchronisation) and as a CUDA graph,
which leaves the launches out. Then whole FiPS layers through `optimize`.
"""
import argparse
import functools
import json
import warnings
from datetime import date
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from fips_nb import __version__
from fips_nb.speed.packing import optimize
from fips_nb.sparse_factors import FactorLinear, fan_in_mask, nm_mask
from fips_nb.sparse_kernels import FORMATS, device_name, kernels, stopwatch

SHAPES = [(4096, 2048, .25), (3072, 768, .25), (4096, 2048, .1), (8192, 2048, .25),
          (14336, 4096, .25), (4096, 2048, .5)] # out, in, density
LAYERS = {"DeiT-B 25 %": (768, 3072, 682), "DeiT-B 50 %": (768, 3072, 1365),
          "Llama-3.2-1B 50 %": (2048, 8192, 4096),
          "Llama-3.2-1B r = d/2": (2048, 8192, 1024)} # name -> d, h, r
BURST = 20 # calls that are timed together on a GPU


def burst(f):
    "Call `f` many times."
    for _ in range(BURST): f()


def per_call(calls, device, repeats):
    "Median milliseconds of each call, in turns; on a GPU many calls at a time."
    if device.type != "cuda": return stopwatch(calls, repeats)
    many = {k: functools.partial(burst, f) for k, f in calls.items()}
    return {k: v/BURST for k, v in stopwatch(many, repeats, device=device).items()}


def graphed(f, device, repeats):
    "Milliseconds of one call in a CUDA graph of many, or None where it cannot be captured."
    if device.type != "cuda": return None
    try:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3): f()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph): burst(f)
    except RuntimeError as e:
        print("no graph:", str(e).splitlines()[0])
        torch.cuda.synchronize()
        return None
    return stopwatch({"graph": graph.replay}, repeats, device=device)["graph"]/BURST


def matrices(o, i, density, device):
    "Format -> matrix; unstructured formats get a constant fan-in, 2:4 its own pattern."
    torch.manual_seed(0)
    W = torch.randn(o, i)/i**.5
    A = W*fan_in_mask(W.abs().T, round(density*i)).T
    on_gpu = device.type == "cuda"
    out = {"2:4": W*nm_mask(W.abs(), 2, 4, dim=1)} if density == .5 and on_gpu else {}
    # condensed runs through the kernel of csr on a CPU
    return out | {k: A for k in (("condensed",) if on_gpu else ("csr", "tiles"))}, A


def products(shape, rows, device, dtype, repeats):
    "Time one matrix in all formats."
    o, i, density = shape
    made, A = matrices(o, i, density, device)
    packed = {k: FORMATS[k](M.to(dtype)).to(device) for k, M in made.items()}
    dense = A.to(device, dtype)
    out = []
    for n in rows:
        x = torch.randn(n, i, device=device, dtype=dtype)
        calls = {"dense": functools.partial(F.linear, x, dense)}
        calls |= {k: functools.partial(P, x) for k, P in packed.items()
                  if k != "condensed" or n <= 16}
        try:
            S = dense.to_sparse_csr()
            S@x.T
            calls["torch csr"] = functools.partial(torch.matmul, S, x.T)
        except RuntimeError: pass
        with torch.inference_mode():
            errors = {k: float((calls[k]() - F.linear(x, made[k].to(x))).abs().max())
                      for k in packed if k in calls}
        ms = per_call(calls, device, repeats)
        graph = {}
        if device.type == "cuda":
            with torch.inference_mode():
                graph = {k: graphed(f, device, repeats) for k, f in calls.items()}
        out.append(dict(out=o, cols=i, density=density, rows=n, ms=ms, graph_ms=graph,
                        max_error=errors, bytes={k: P.nbytes() for k, P in packed.items()},
                        dense_bytes=dense.nbytes))
        print(o, i, density, n, {k: round(v, 4) for k, v in (graph or ms).items() if v}, flush=True)
    return out


def layers(name, shape, rows, device, dtype, repeats):
    "Choose formats for the up layer of a FiPS MLP, V 75 % sparse."
    d, h, r = shape
    torch.manual_seed(0)
    V = torch.randn(r, h)*fan_in_mask(torch.rand(r, h), r//4)
    U = nn.Parameter((torch.randn(d, r)/d**.5).to(dtype))
    model = nn.Sequential(FactorLinear(U, V.to(dtype), "up")).to(device).eval()
    out = []
    for n in rows:
        x = torch.randn(n, d, device=device, dtype=dtype)
        out.append(dict(name=name, **optimize(model, x, repeats=repeats)["rows"][0]))
    return out


def triton_version():
    "Version of Triton, or None."
    try: import triton
    except ImportError: return None
    return triton.__version__


def arguments():
    "What the command line says."
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    ap.add_argument("--rows", default="1,16,197,512", help="rows of inputs, comma-separated")
    ap.add_argument("--repeats", type=int, default=15, help="timed calls of each")
    ap.add_argument("--quick", action="store_true", help="one small shape, to try the script out")
    ap.add_argument("--out", type=Path, help="JSON file to write")
    return ap.parse_args()


def main():
    a = arguments()
    device = torch.device(a.device)
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    shapes, mlps = SHAPES, LAYERS
    if a.quick: shapes, mlps = [(96, 64, .5)], {"small": (32, 64, 16)}
    res = dict(device=device_name(device), dtype=str(dtype), threads=torch.get_num_threads(),
               torch=torch.__version__, triton=triton_version(), cpu_kernels=kernels(),
               fips_nb=__version__, repeats=a.repeats, date=str(date.today()))
    options = dict(rows=[int(n) for n in a.rows.split(",")], device=device, dtype=dtype,
                   repeats=a.repeats)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        res["products"] = [row for s in shapes for row in products(s, **options)]
        res["layers"] = [row for k, s in mlps.items() for row in layers(k, s, **options)]
    res["warnings"] = sorted({str(w.message) for w in said})
    if a.out: a.out.write_text(json.dumps(res, indent=1) + "\n")
    for w in res["warnings"]: print("warning:", w)


if __name__ == "__main__": main()
