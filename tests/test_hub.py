"""Saved timm models: round trips over presets, shapes, dtypes, architectures; broken files."""
import copy
import hashlib
import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from small import blank_picture, first_blocks, put_codes
from torch import nn

from fips_nb.store import codes, state, timm_folders
from fips_nb.data.demo import demo_images, demo_vit
from fips_nb.store.format import VERSION, read_config
from fips_nb.store.codes import dense_bytes, file_parts, folder_bytes
from fips_nb.store.values import narrow, outside, round_rest
from fips_nb.grouping import find_mlps, group_modules, weights
from fips_nb.store.hub import export, load, save
from fips_nb.share.pipeline import compress, round_factors
from fips_nb.share.report import size_report
from fips_nb.sparse_factors import factor_layers, factorize, topk_mask
from fips_nb.svd_init import svd_init

pytestmark = pytest.mark.usefixtures("one_thread", "timed_once", "blank_pictures")


@pytest.fixture
def blank_pictures(monkeypatch): monkeypatch.setattr("fips_nb.store.cards.plot_layers", blank_picture)


@pytest.fixture(scope="module")
def batches(): return list(demo_images("train")[0][:200].split(50))


@pytest.fixture(scope="module")
def packed(batches): return compress(demo_vit(), batches, .4, levels=2, distill_epochs=0)


@pytest.fixture(scope="module")
def saved(packed, tmp_path_factory): return save(packed, tmp_path_factory.mktemp("saved")/"m")


@pytest.fixture
def folder(saved, tmp_path): return shutil.copytree(saved, tmp_path/"m")


def factored(model, r=6, density=.3, size=4, quick=False, rounded=True):
    """Factorise `model` in place without training: pruned SVD factors, or projections on a random
    basis if `quick`. Unless `rounded` is false, the rest is rounded to what a folder stores, so
    that round trips are exact."""
    for g in group_modules(find_mlps(model), size):
        Ws = weights(model, g)
        if quick:
            U = torch.linalg.qr(torch.randn(g.d, r)).Q
            Vs = [U.T@W for W in Ws]
        else:
            U, Vs = svd_init(Ws, r)
        factorize(model, g, U, [V*topk_mask(V.abs(), density) for V in Vs])
    return (round_rest(model) if rounded else model).eval()


def same(a, b, x=None):
    "Assert that two models hold the same bits, share bases alike, and give the same outputs."
    sa, sb = a.state_dict(), b.state_dict()
    assert sa.keys() == sb.keys()
    for k in sa:
        assert sa[k].dtype == sb[k].dtype and sa[k].stride() == sb[k].stride(), k
        assert torch.equal(sa[k], sb[k]), k
    for (k, p), (_, q) in zip(a.named_buffers(), b.named_buffers(), strict=True):
        assert p.dtype == q.dtype and torch.equal(p, q), k
    assert len(list(a.parameters())) == len(list(b.parameters())) # shared ones count once
    assert shared(a) == shared(b)
    if x is None: return
    with torch.no_grad(): assert torch.equal(a.eval()(x), b(x))


def shared(model):
    "Which factor layers of `model` share their basis."
    layers = factor_layers(model).values()
    return [[f.U is g.U for g in layers] for f in layers]


# ---- round trips ----

@pytest.mark.parametrize("preset,kw", [
    ("fips-als", dict(levels=2, group_size=3)), ("pruning", dict(levels=2)), ("svd", {}),
    ("basis-sharing", {}), ("aafm", {}), ("fips-als", dict(levels=2, pattern=(2, 4))),
    ("fips-als", dict(levels=2, scope="global"))])
def test_presets(preset, kw, batches, tmp_path):
    res = compress(first_blocks(8), batches, .4, preset=preset, distill_epochs=0, **kw)
    round_rest(res.model) # a preset may have added biases
    save(res, tmp_path/"m")
    back = load(tmp_path/"m")
    same(res.model, back, demo_images("test")[0][:50])
    assert not back.training and back.fips_config["report"]["preset"] == preset
    parts, said = file_parts(tmp_path/"m"), size_report(res.model)["mlp_bytes"]
    assert sum(parts.values()) == folder_bytes(tmp_path/"m") < dense_bytes(res.model)
    assert parts["U"] + parts["V"] + parts["mask"] <= 1.02*said


def test_biases_that_came_and_went(tmp_path, monkeypatch):
    "A factor layer may have lost its bias, or have one that the architecture has not (AAFM)."
    m, build = factored(demo_vit()), timm_folders.build
    m.blocks[0].mlp.fc1.bias = None

    def unbiased(*args):
        fresh = build(*args)
        fresh.blocks[1].mlp.fc1.bias = None
        return fresh
    monkeypatch.setattr(timm_folders, "build", unbiased)
    same(m, load(save(m, tmp_path/"m")), demo_images("test")[0][:5])


@pytest.mark.parametrize("r", [1, 83])
@pytest.mark.parametrize("kind", ["sparse", "empty rows", "zero", "dense", "mixed",
                                  "negative zeros"])
def test_shapes(r, kind, tmp_path):
    torch.manual_seed(r)
    m = first_blocks(9)
    for g in group_modules(find_mlps(m), 7):
        Vs = [torch.randn(r, l.h).half().float() for l in g.linears]
        for k, V in enumerate(Vs): thin_out(V, kind, k)
        factorize(m, g, torch.randn(g.d, r).half().float(), Vs)
    same(m, load(save(m, tmp_path/"m")), demo_images("test")[0][:9])
    codecs = {g["codec"] for g in read_config(tmp_path/"m")["groups"]}
    assert codecs == {"dense"} if kind == "dense" else "dense" not in codecs
    if kind == "zero": assert file_parts(tmp_path/"m")["V"] == 0


def thin_out(V, kind, k):
    "Set entries of the `k`-th projection to zero."
    if kind == "sparse": V *= torch.rand_like(V) < .15
    if kind == "empty rows":
        V[::2] = 0
        V[:, 5:9] = 0
    if kind == "zero": V.zero_()
    if kind == "mixed": V *= torch.rand_like(V) < (0, 1, .02, .9)[k%4]
    if kind == "negative zeros": V *= -(torch.rand_like(V) < .5).float()


@pytest.mark.parametrize("name,kw", [
    ("vit_tiny_patch16_224", dict(depth=2, num_classes=5)),
    ("vit_tiny_patch16_224", dict(depth=2, img_size=64, in_chans=1, global_pool="avg")),
    ("swin_tiny_patch4_window7_224", dict(depths=(1, 2, 1, 1), num_classes=3)),
    ("eva02_tiny_patch14_224", dict(depth=2)), ("mixer_s16_224", {}),
    ("deit_tiny_distilled_patch16_224", dict(depth=2))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_architectures(name, kw, dtype, tmp_path): check_architecture(name, kw, dtype, tmp_path)


def test_bfloat16_model(tmp_path):
    check_architecture("eva02_tiny_patch14_224", dict(depth=1), torch.bfloat16, tmp_path)


def check_architecture(name, kw, dtype, tmp_path):
    m = factored(timm.create_model(name, **kw), size="stage", quick="vit" not in name).to(dtype)
    before = torch.random.get_rng_state()
    save(m, tmp_path/"m")
    back = load(tmp_path/"m")
    assert torch.equal(before, torch.random.get_rng_state()) # building draws no numbers of ours
    x = torch.randn(1, kw.get("in_chans", 3), *[kw.get("img_size", 224)]*2, dtype=dtype)
    same(m, back, x)
    assert type(back) is type(m) and back.num_classes == m.num_classes
    want, got = (timm.data.resolve_data_config(model=o) for o in (m, back))
    assert want == got
    config = read_config(tmp_path/"m")
    values = {g["values"] for g in config["groups"]}
    assert values == {"float32" if dtype == torch.float32 else str(dtype)[6:]}
    assert config["rest"] == ("16bit" if dtype == torch.float32 else "keep")
    save(back, tmp_path/"n")
    assert read_config(tmp_path/"n") == config


def test_whole_size_of_a_real_architecture(tmp_path):
    m = timm.create_model("vit_tiny_patch16_224")
    m = factored(m, r=190, density=.25, size=12, quick=True).half()
    parts = file_parts(save(m, tmp_path/"m"))
    said = size_report(m)["mlp_bytes"] + parts["rest"]
    assert said < folder_bytes(tmp_path/"m") < 1.02*said
    assert folder_bytes(tmp_path/"m") < dense_bytes(m)


def values(folder): return {g["values"] for g in read_config(folder)["groups"]}


def test_value_dtypes(tmp_path):
    m, x = factored(demo_vit()), demo_images("test")[0][:5]
    assert values(save(m, tmp_path/"a")) == {"float32"} # not representable in 16 bits: kept
    same(m, load(tmp_path/"a"), x)
    assert values(save(m, tmp_path/"b", dtype=torch.float16)) == {"float16"}
    round_factors(m, torch.float16)
    same(m, load(tmp_path/"b"), x)
    assert values(save(m, tmp_path/"c")) == {"float16"}
    assert values(save(m, tmp_path/"d", dtype=torch.float32)) == {"float32"}
    for k in "cd": same(m, load(tmp_path/k), x)
    assert folder_bytes(tmp_path/"c") < folder_bytes(tmp_path/"d")
    round_factors(m, torch.bfloat16)
    V = m.blocks[0].mlp.fc1.V.data
    V[0, 0] = 2.**100
    assert values(save(m, tmp_path/"e")) == {"bfloat16"}
    same(m, load(tmp_path/"e"))
    with pytest.raises(ValueError, match="blocks.0.mlp.fc1.*not finite"):
        save(m, tmp_path/"f", dtype=torch.float16)
    V[0, 0] = float("nan")
    with pytest.raises(ValueError, match="not finite"): save(m, tmp_path/"f")
    assert not (tmp_path/"f").exists()


# ---- what is outside the factors ----

def varied():
    "A factorised demo whose rest needs 32 bits."
    m = demo_vit()
    for p in m.parameters(): p.data.mul_(1 + 1e-3*torch.randn_like(p))
    return factored(m, rounded=False)


def test_the_rest_is_rounded_to_16_bits_once(tmp_path):
    torch.manual_seed(0)
    m, x = varied(), demo_images("test")[0][:5]
    save(m, tmp_path/"a", report=dict(preset="svd"))
    back = load(tmp_path/"a")
    assert {p.dtype for p in back.parameters()} == {torch.float32}
    stored = load_file(tmp_path/"a/model.safetensors")
    for k, t in outside(m.state_dict(), factor_layers(m)).items():
        assert stored[k].dtype == torch.float16
        assert torch.equal(back.state_dict()[k], t.half().float()), k
    config = read_config(tmp_path/"a")
    assert config["rest"] == "16bit" and 0 < config["report"]["rest_error"] < 2**-11
    assert config["report"]["preset"] == "svd"
    save(back, tmp_path/"b")
    again = load(tmp_path/"b")
    same(back, again, x)
    assert read_config(tmp_path/"b") == config
    same(round_rest(m), back, x)


def test_the_rest_is_kept_on_request(tmp_path):
    m, x = varied(), demo_images("test")[0][:5]
    same(m, load(save(m, tmp_path/"a", rest="keep")), x)
    config = read_config(tmp_path/"a")
    assert config["rest"] == "keep" and config["report"] is None
    sizes = [file_parts(save(m, tmp_path/k, rest=k))["rest"] for k in ("keep", "16bit")]
    assert sizes[0] == 2*sizes[1]
    with pytest.raises(ValueError, match="rest '8bit' is not one of 16bit, keep"):
        save(m, tmp_path/"c", rest="8bit")
    assert not (tmp_path/"c").exists()


def test_tensors_that_float16_does_not_hold(tmp_path):
    m = factored(demo_vit())
    m.norm.weight.data[0] = 1e5 # overflows in float16
    m.blocks[0].norm1.bias.data = 1e-6*torch.rand(40) # has few bits left in float16
    m.blocks[1].norm1.bias.data[0] = 3.4e38 # overflows in both
    m.blocks[2].norm1.bias = nn.Parameter(m.blocks[2].norm1.bias.detach().half()) # is narrow here
    m.register_buffer("fine", torch.rand(3).double())
    own = outside(m.state_dict(), factor_layers(m))
    tensors, about, _ = timm_folders.pack_model(m, own, {})
    names = ("norm.weight", "blocks.0.norm1.bias", "blocks.1.norm1.bias", "blocks.2.norm1.bias")
    assert [str(tensors[k].dtype)[6:] for k in (*names, "fine")] == [
        "bfloat16", "bfloat16", "float32", "float16", "float64"]
    assert set(about["own"]) == {"blocks.2.norm1.bias", "fine"}
    del m.fine
    back = load(save(m, tmp_path/"m"))
    assert back.blocks[2].norm1.bias.dtype == torch.float16 and back.norm.weight[0] == 99840
    for k in names[:3]: assert back.get_parameter(k).dtype == torch.float32
    assert torch.equal(back.blocks[1].norm1.bias, m.blocks[1].norm1.bias)
    same(back, load(save(back, tmp_path/"n")))


@pytest.mark.parametrize("scale", [1e-30, 1e-8, 1e-6, 1e-3, 1., 1e4, 1e5, 1e30, 1e38])
def test_rounding_twice_is_rounding_once(scale):
    g = torch.Generator().manual_seed(0)
    t = scale*torch.randn(1000, generator=g).clamp(-3.3, 3.3) # float32 ends at 3.4e38
    once = narrow(t)
    assert once.dtype != torch.float32 or scale == 1e38
    assert torch.equal(narrow(once.float()).float(), once.float())
    assert ((once.float() - t).abs() <= 2**-8*t.abs() + 2**-25*(once.dtype == torch.float16)).all()


def test_tied_weights_are_stored_once(tmp_path):
    m = factored(demo_vit())
    m.blocks[1].attn.qkv.weight = m.blocks[0].attn.qkv.weight
    m.blocks[3].norm1.weight = nn.Parameter(m.norm.weight.detach()) # the same memory
    save(m, tmp_path/"m")
    back = load(tmp_path/"m")
    assert back.blocks[1].attn.qkv.weight is back.blocks[0].attn.qkv.weight
    tied = read_config(tmp_path/"m")["tied"]
    assert tied["blocks.1.attn.qkv.weight"] == "blocks.0.attn.qkv.weight"
    for k, t in m.state_dict().items(): assert torch.equal(t, back.state_dict()[k]), k
    export(tmp_path/"m", tmp_path/"d") # plain weights have no word for it
    plain = demo_vit(pretrained=False)
    plain.load_state_dict(load_file(tmp_path/"d/model.safetensors"))
    assert torch.equal(plain.blocks[1].attn.qkv.weight, m.blocks[0].attn.qkv.weight)


def test_parameters_that_are_views(tmp_path):
    m = factored(demo_vit())
    both = torch.randn(2, 40).half().float()
    m.norm.weight, m.norm.bias = nn.Parameter(both[0]), nn.Parameter(both[1]) # one memory for two
    for rest in ("16bit", "keep"):
        same(m, load(save(m, tmp_path/rest, rest=rest)), demo_images("test")[0][:5])


def test_buffers_that_are_no_state(tmp_path):
    "A rotary table that was changed is stored; an untouched one is not."
    m = factored(timm.create_model("eva02_tiny_patch14_224", depth=1))
    save(m, tmp_path/"a")
    assert not [k for k in load_file(tmp_path/"a/model.safetensors") if "rope" in k]
    names = [k for k, b in m.named_buffers() if "rope" in k and k not in m.state_dict()]
    table = m.get_buffer(names[0])
    table.copy_((1.5*table).half())
    same(m, load(save(m, tmp_path/"b")), torch.randn(1, 3, 224, 224))
    table.mul_(1 + 1e-5)
    same(m, load(save(m, tmp_path/"c", rest="keep")), torch.randn(1, 3, 224, 224))


# ---- coded factors ----

CODED = [("fips-als", dict(levels=2, group_size=3)), ("fips-als", dict(levels=2, targets="all")), ("pruning", dict(levels=2)),
         ("svd", {}), ("basis-sharing", {}), ("aafm", {})]


@pytest.fixture(scope="module")
def coded_model(batches):
    model = compress(demo_vit(), batches, .4, levels=2, group_size=5, distill_epochs=0).model
    return round_rest(put_codes(model, -28))


@pytest.fixture(scope="module")
def saved_codes(coded_model, tmp_path_factory): return save(coded_model, tmp_path_factory.mktemp("saved")/"m")


@pytest.fixture
def coded(saved_codes, tmp_path): return shutil.copytree(saved_codes, tmp_path/"m")


@pytest.mark.parametrize("preset,kw", CODED, ids=lambda x: x if isinstance(x, str) else "-".join(x))
def test_coded_factors(preset, kw, batches, tmp_path):
    model = compress(first_blocks(8), batches, .4, preset=preset, distill_epochs=0, **kw).model
    round_rest(put_codes(model))
    back = load(save(model, tmp_path/"m"))
    same(model, back, demo_images("test")[0][:50])
    assert all(torch.equal(data, back.fips_codes[k]) for k, data in model.fips_codes.items())
    config, parts = read_config(tmp_path/"m"), file_parts(tmp_path/"m")
    assert {g["codec"] for g in config["groups"]} == {"coded"}
    assert sum(parts.values()) == folder_bytes(tmp_path/"m")
    assert parts["codes"] > 0 and parts["U"] == parts["V"] == parts["mask"] == 0
    save(back, tmp_path/"n")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path/"m"/name).read_bytes() == (tmp_path/"n"/name).read_bytes()
    with torch.no_grad():
        plain = first_blocks(8)
        for p in plain.parameters(): p.normal_() # nothing of them may stay
        if preset != "aafm": # which adds biases
            plain.load_state_dict(load_file(export(tmp_path/"m", tmp_path/"d")/"model.safetensors"))
            x = demo_images("test")[0][:9]
            torch.testing.assert_close(plain(x), model(x), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_coded_factors_of_a_model_of_16_bits(dtype, batches, tmp_path):
    model = compress(first_blocks(8), batches, .4, levels=2, distill_epochs=0).model.to(dtype)
    same(put_codes(model), load(save(model, tmp_path/"m")))
    assert {g["dtype"] for g in read_config(tmp_path/"m")["groups"]} == {str(dtype)[6:]}


def test_memory_order_of_coded_factors_is_kept(coded_model, tmp_path):
    m = copy.deepcopy(coded_model)
    layers = list(factor_layers(m).values())
    U, first = nn.Parameter(layers[0].U.detach().T.contiguous().T), layers[0].U
    for f in layers:
        if f.U is first: f.U = U
    layers[3].V = nn.Parameter(layers[3].V.detach().T.contiguous().T)
    back = load(save(m, tmp_path/"m"))
    same(m, back)
    assert not back.blocks[0].mlp.fc1.U.is_contiguous()


@pytest.mark.parametrize("name", ["blocks.0.mlp.fc1.U", "blocks.3.mlp.fc2.V"])
@pytest.mark.parametrize("rest", ["16bit", "keep"])
def test_a_group_that_has_changed_is_stored_in_16_bits(name, rest, coded_model, tmp_path):
    m = copy.deepcopy(coded_model)
    with torch.no_grad(): m.get_parameter(name)[0, 0] += 1e-3
    with pytest.warns(UserWarning, match=f"1 of {len(m.fips_codes)} .* such as {name}"):
        save(m, tmp_path/"m", rest=rest)
    config = read_config(tmp_path/"m")
    kinds = [g["codec"] == "coded" for g in config["groups"]]
    assert kinds == [False, True, True, True]
    ours = {f"blocks.{i}.mlp.fc{j}.{k}" for i in range(5) for j in (1, 2) for k in "UV"}
    assert not ours & set(config["coded"]) and len(config["coded"]) == len(m.fips_codes) - 11
    assert config["groups"][0]["values"] == ("float16" if rest == "16bit" else "float32")
    back = load(tmp_path/"m")
    for k, p in m.named_parameters():
        if rest == "keep" or k not in ours: assert torch.equal(p, back.get_parameter(k)), k
        else: torch.testing.assert_close(p, back.get_parameter(k), rtol=1e-3, atol=1e-6)
    same(back, load(save(back, tmp_path/"n", rest=rest)))


def test_codes_of_a_part_of_a_group_are_dropped(coded_model, tmp_path):
    m = copy.deepcopy(coded_model)
    del m.fips_codes["blocks.7.mlp.fc1.V"]
    same(load(save(m, tmp_path/"m")), load(save(load(tmp_path/"m"), tmp_path/"n")))
    assert [g["codec"] == "coded" for g in read_config(tmp_path/"m")["groups"]] == [True, False, True, True]


def without(name): 
    return lambda t, c: (t.pop(name.rpartition(".")[0] + ".coded." + name[-1]), c["coded"].remove(name))


def add_code(name):
    "A code under another name, and that name among the coded parameters."
    def change(t, c):
        t[name.rpartition(".")[0] + ".coded." + name[-1]] = t["blocks.0.mlp.fc1.coded.V"].clone()
        c["coded"].append(name)
    return change


def codec(i, kind): return lambda t, c: c["groups"][i].update(codec=kind)


def wider(t, c):
    "Records of a basis that no file of this size could hold."
    g = c["groups"][0]
    g.update(r=64*40)
    for l in g["linears"]: l["shape"][0] = 64*40


V, U = "blocks.0.mlp.fc1.V", "blocks.0.mlp.fc1.U"


@pytest.mark.parametrize("change,match", [
    (without(V), "fc1.V is not among the coded parameters"), (without(U), "fc1.U is not among"),
    (lambda t, c: c["coded"].remove(V), "not among the coded"),
    (codec(0, "gaps"), "no record says that it is coded"), (codec(0, "dense"), "no record says"),
    (codec(1, "lossless"), "codec is 'lossless'"),
    (lambda t, c: c["coded"].append(V), "occurs twice"),
    (add_code("blocks.0.mlp.fc2.U"), "fc2.U is among the coded parameters, and no record"),
    (add_code("blocks.0.mlp.fc3.V"), "fc3.V is coded, and the model has no such parameter"),
    (lambda t, c: c["groups"].pop(), "no such parameter|missing"),
    (lambda t, c: t.pop("blocks.0.mlp.fc1.coded.V"), "fc1.coded.V is missing"),
    (lambda t, c: t.update({"fips.0.U": torch.ones(2, 2)}), "fips.0.U has no place"),
    (lambda t, c: t.update({V: torch.ones(2, 2)}), "fc1.V has no place"),
    (lambda t, c: t.update({"blocks.0.mlp.fc1.coded.V": t["blocks.0.mlp.fc2.coded.V"].clone()}), "non-zeros instead|cannot be used"),
    (lambda t, c: t.update({"blocks.0.mlp.fc1.coded.V": t["blocks.0.mlp.fc1.coded.V"][:-1].clone()}), "ends too early|does not end"),
    (lambda t, c: t.update({"blocks.0.mlp.fc1.coded.V": t["blocks.0.mlp.fc1.coded.V"].half()}), "a code is bytes"),
    (lambda t, c: t.update({"blocks.0.mlp.fc1.coded.V": t["blocks.0.mlp.fc1.coded.V"][None]}), "instead of None"),
    (lambda t, c: c["groups"][0]["linears"][0].update(nnz=5), "non-zeros instead of 5"),
    (lambda t, c: c["groups"][0]["linears"][0].update(shape=[39, 160]), "39 rows"),
    (lambda t, c: c["groups"][0].update(d=41), "in the records"),
    (lambda t, c: (c["groups"][0].update(r=0), [l["shape"].__setitem__(0, 40) for l in c["groups"][0]["linears"]]),
     "fc1.U is among the coded"),
    (wider, "cannot be used|would decode"), (lambda t, c: c["groups"][0].update(dtype="float17"), "float17")])
def test_coded_factors_that_do_not_fit(change, match, coded):
    rewrite(coded, change)
    with pytest.raises(ValueError, match=match): load(coded)


def test_coded_factors_are_bounded_by_their_files(coded, monkeypatch):
    monkeypatch.setattr(codes, "MOST_DECODED", .1)
    monkeypatch.setattr(codes, "SPARE", 0)
    with pytest.raises(ValueError, match="would decode to"): load(coded)


def test_codes_that_could_not_be_read_are_not_written(coded_model, tmp_path, monkeypatch):
    monkeypatch.setattr(codes, "MOST_DECODED", .1)
    monkeypatch.setattr(codes, "SPARE", 0)
    with pytest.raises(ValueError, match="would decode to"): save(coded_model, tmp_path/"x")
    assert not (tmp_path/"x").exists()


def test_codes_of_dense_weights(tmp_path):
    model = round_rest(put_codes(demo_vit()))
    back = load(save(model, tmp_path/"b"))
    assert back.fips_codes.keys() == model.fips_codes.keys()
    for k in model.fips_codes: assert torch.equal(back.get_parameter(k), model.get_parameter(k)), k


# ---- what is refused when saving ----

def test_refused_models(tmp_path):
    with pytest.raises(ValueError, match="compress it first"): save(demo_vit(), tmp_path/"m")
    args = dict(img_size=8, patch_size=4, embed_dim=64, depth=1, num_heads=2)
    plain, arch = factored(timm.models.VisionTransformer(**args)), "vit_tiny_patch16_224"
    with pytest.raises(ValueError, match="arch="): save(plain, tmp_path/"m")
    with pytest.raises(ValueError, match="model_args="): save(plain, tmp_path/"m", arch=arch)
    back = load(save(plain, tmp_path/"m", arch=arch, model_args=args))
    same(plain, back, torch.randn(2, 3, 8, 8))
    other = factored(timm.create_model(arch, depth=1))
    other.blocks[0].attn.num_heads = 6 # the same tensors, another function
    with pytest.raises(ValueError, match="num_heads is 6"): save(other, tmp_path/"n")
    with pytest.raises(ValueError, match="nearest"):
        save(other, tmp_path/"n", arch="vit_tini_patch16_224")
    with pytest.raises(ValueError, match="pretrained"):
        save(other, tmp_path/"n", model_args=dict(pretrained=True))
    with pytest.raises(ValueError, match="unknown option of save 'archs'.*arch"):
        save(other, tmp_path/"n", archs=arch)
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_cards(packed, tmp_path):
    "The same model gives the same card, which counts in no size and is replaced only as it was written."
    m = save(packed, tmp_path/"m", report=packed.report | dict(source=dict(model="x", n_calib=200, unit="images")))
    text = (m/"README.md").read_bytes()
    back = load(m)
    assert (save(back, tmp_path/"n")/"README.md").read_bytes() == text
    assert folder_bytes(m) == (m/"model.safetensors").stat().st_size
    for word in (b"library_name: timm", b"200 `images`", f"{folder_bytes(m):,}".encode(), b"load('FOLDER')"):
        assert word in text
    assert b"base_model" not in text and str(tmp_path).encode() not in text
    save(packed, m, overwrite=True) # its own card
    (m/"README.md").write_bytes(text + b"My remarks.")
    for wrong in (text + b"My remarks.", b"", text.replace(b"Size", b"size"), b"\xff\xfe"):
        (m/"README.md").write_bytes(wrong)
        with pytest.raises(FileExistsError, match="README.md was written or changed"):
            save(packed, m, overwrite=True)
        assert (m/"README.md").read_bytes() == wrong
    same(load(m), load(tmp_path/"n")) # and it may say what it likes


def test_pictures(packed, tmp_path, monkeypatch):
    "The same model gives the same picture, which counts in no size and is replaced only if nobody else drew it."
    monkeypatch.undo() # they are drawn here
    m = save(packed, tmp_path/"m")
    drawn = (m/"layers.png").read_bytes()
    assert "](layers.png)" in (m/"README.md").read_text() and len(drawn) < 30_000
    assert (save(load(m), tmp_path/"n")/"layers.png").read_bytes() == drawn
    assert folder_bytes(m) == (m/"model.safetensors").stat().st_size
    save(packed, m, overwrite=True)
    (m/"layers.png").write_bytes(b"mine")
    with pytest.raises(FileExistsError, match="layers.png was written or changed"): save(packed, m, overwrite=True)
    assert (m/"layers.png").read_bytes() == b"mine"
    same(load(m), load(tmp_path/"n"))
    plain = save(packed, tmp_path/"plain", report=dict(preset="svd")) # a report without layers
    assert not (plain/"layers.png").exists() and "layers.png" not in (plain/"README.md").read_text()


def test_a_picture_needs_no_display_and_leaves_no_state(packed, tmp_path):
    code = ("import sys; from fips_nb.store.hub import load, save; save(load(sys.argv[1]), sys.argv[2]); "
            "assert 'matplotlib.pyplot' not in sys.modules")
    m, env = save(packed, tmp_path/"m"), {k: v for k, v in os.environ.items() if k not in ("DISPLAY", "MPLBACKEND")}
    res = subprocess.run([sys.executable, "-c", code, m, tmp_path/"n"], capture_output=True, text=True, env=env)
    assert res.returncode == 0, res.stderr
    assert (tmp_path/"n/layers.png").is_file()


def test_base_model_of_a_card(tmp_path):
    "The command line says where weights came from; nobody else does for models of timm."
    m = factored(timm.create_model("vit_tiny_patch16_224", depth=1), quick=True)
    base = lambda folder: "base_model: " in (folder/"README.md").read_text()
    source = dict(model="vit_tiny_patch16_224", weights=None)
    first = save(m, tmp_path/"a", report=dict(source=source))
    name = 'base_model: "timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k"'
    assert name in (first/"README.md").read_text()
    again = save(load(first), tmp_path/"b")
    assert (again/"README.md").read_bytes() == (first/"README.md").read_bytes()
    assert not base(save(m, tmp_path/"c", report=dict(source=source | dict(weights="mine.safetensors"))))
    assert not base(save(m, tmp_path/"d", report=dict(preset="svd")))


def test_folders_that_are_not_ours_are_left_alone(packed, tmp_path):
    m = tmp_path/"m"
    m.mkdir()
    with pytest.raises(FileExistsError, match="overwrite=True"): save(packed, m)
    save(packed, m, overwrite=True) # empty
    save(packed, m, overwrite=True) # ours
    (m/"thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match="thesis.tex"): save(packed, m, overwrite=True)
    other, bert = tmp_path/"other", '{"model_type": "bert"}'
    other.mkdir()
    (other/"config.json").write_text(bert)
    with pytest.raises(FileExistsError, match="left alone"): save(packed, other, overwrite=True)
    with pytest.raises(FileExistsError, match="is a file"):
        save(packed, m/"thesis.tex", overwrite=True)
    with pytest.raises(FileExistsError, match="exists"): export(m, other)
    assert (m/"thesis.tex").read_text() == "years of work"
    assert (other/"config.json").read_text() == bert
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m", "other"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("where", ["tensors", "config", "rename"])
def test_nothing_half_written_stays(error, where, packed, folder, monkeypatch):
    old = {p.name: p.read_bytes() for p in folder.iterdir()}

    def fail(*args, **kw): raise error
    rename = pathlib.Path.rename
    half = lambda a, b: fail() if a.name == "new" else rename(a, b)
    if where == "tensors": monkeypatch.setattr(state, "save_file", fail)
    if where == "config": monkeypatch.setattr(pathlib.Path, "write_text", fail)
    if where == "rename": monkeypatch.setattr(pathlib.Path, "rename", half)
    for target, kw in ((folder, dict(overwrite=True)), (folder.parent/"fresh", {})):
        with pytest.raises(type(error)): save(packed.model, target, **kw)
    monkeypatch.undo()
    assert [p.name for p in folder.parent.iterdir()] == ["m"]
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == old
    load(folder)


# ---- what is refused when loading ----

def rewrite(folder, change):
    "Change the tensors of `folder` and let its checksum agree."
    f, c = folder/"model.safetensors", folder/"config.json"
    ts, config = load_file(f), json.loads(c.read_text())
    change(ts, config)
    save_file(ts, f)
    sha = hashlib.sha256(f.read_bytes()).hexdigest()
    c.write_text(json.dumps(config | dict(bytes=f.stat().st_size, sha256=sha)))


def test_truncated_and_altered(folder):
    f = folder/"model.safetensors"
    good = f.read_bytes()
    for n in (0, 5, 1000, len(good) - 1):
        f.write_bytes(good[:n])
        with pytest.raises(ValueError, match="incomplete"): load(folder)
    for at in (3, 100, len(good)//2, len(good) - 1):
        f.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at+1:])
        with pytest.raises(ValueError, match="altered"): load(folder)
    f.unlink()
    with pytest.raises(FileNotFoundError, match="model.safetensors"): load(folder)


@pytest.mark.parametrize("change,match", [
    (dict(version=VERSION + 1), "newer fips_nb"), (dict(version=VERSION - 1), "compress the model again"),
    (dict(version="6"), "no format version"), (dict(version=None), "no format version"),
    (dict(format="gguf"), "saved by fips_nb"), (dict(rest="8bit"), "8bit"),
    (dict(arch="hf-hub:someone/something"), "no architecture"), (dict(arch="vit_tini"), "nearest"),
    (dict(model_args=dict(checkpoint_path="x.pth")), "checkpoint_path"),
    (dict(model_args=dict(colour=1)), "cannot be made"),
    (dict(model_args=dict(depth=3)), "does not fit"), (dict(dtype="float17"), "dtype is 'float17'"),
    (dict(dtype="int8"), "dtype is 'int8'"), (dict(groups=[]), "no factors and of no codes"),
    (dict(groups=7), "groups is 7"), (dict(groups=[7]), r"groups\[0\] is 7"),
    (dict(tied={"norm.weight": "nowhere"}), "cannot be tied"), (dict(tied=[1]), "tied is"),
    (dict(sha256="0"*63), "sha256"), (dict(bytes=-1), "bytes is -1"), (dict(num_classes="10"), "num_cl"),
    (dict(model_args=dict(depth=10**6)), "more than 65536"),
    (dict(model_args=dict(depth=5000)), "too many modules"),
    (dict(model_args=dict(embed_dim=40000)), "does not fit"),
    (dict(arch="vit_giant_patch14_224", model_args={}), "does not fit"),
    (dict(tied={"norm.weight": "norm.bias", "norm.bias": "norm.weight"}), "cannot be tied")])
def test_other_configs(change, match, folder):
    f = folder/"config.json"
    f.write_text(json.dumps(json.loads(f.read_text()) | change))
    with pytest.raises(ValueError, match=match): load(folder)


def test_no_config(folder, tmp_path):
    for text, match in (('{"format": "fips', "not valid JSON"), ("[]", "saved by fips_nb"),
                        ("["*100000, "not valid JSON")):
        (folder/"config.json").write_text(text)
        with pytest.raises(ValueError, match=match): load(folder)
    (folder/"config.json").unlink()
    with pytest.raises(FileNotFoundError, match="config.json"): load(folder)
    with pytest.raises(FileNotFoundError, match="no folder .*nowhere"): load(tmp_path/"nowhere")


def linear(**kw): return lambda t, c: c["groups"][0]["linears"][0].update(kw)


@pytest.mark.parametrize("change,match", [
    (lambda t, c: t.pop("norm.weight"), "norm.weight is missing"),
    (lambda t, c: t.pop("fips.0.U"), "fips.0.U is missing"),
    (lambda t, c: t.pop("fips.1.mask"), "fips.1.mask is missing"),
    (lambda t, c: t.update(extra=torch.ones(1)), "extra has no place"),
    (lambda t, c: t.update({"norm.weight": torch.ones(41)}),
     r"norm.weight is \(41,\) instead of \(40,\)"),
    (lambda t, c: t.update({"blocks.0.mlp.fc1.bias": torch.ones(1)}),
     r"fc1.bias is \(1,\) instead of \(160,\)"),
    (lambda t, c: t.update({"fips.0.V": t["fips.0.V"][:-1]}), r"fips.0.V is \(\d+,\) instead"),
    (lambda t, c: t.update({"fips.0.mask": t["fips.0.mask"][:-9]}), "does not end"),
    (lambda t, c: t.update({"fips.0.U": t["fips.0.U"][:, 1:].contiguous()}),
     r"fips.0.U is \(40, \d+\) instead of \(40, \d+\)"),
    (lambda t, c: t.update({"fips.0.U": t["fips.0.U"][1:].contiguous()}),
     r"fips.0.U is \(39, \d+\) instead of \(40, \d+\)"),
    (lambda t, c: c["groups"][0].update(d=39), "39 -> 160 in the records"),
    (lambda t, c: c["groups"][0].update(codec="runs"), "codec is 'runs'"),
    (linear(shape=[3, 160]), "3 rows"), (linear(shape=[10**5, 10**5]), "100000 rows"),
    (linear(nnz=5), "instead of"), (linear(nnz=10**9), "non-zeros of"),
    (lambda t, c: t["fips.0.V"].fill_(float("nan")), "not finite"),
    (lambda t, c: t["norm.bias"].fill_(float("inf")), "norm.bias holds NaN or infinity"),
    (lambda t, c: c["groups"].append(c["groups"][0]), "occurs twice"),
    (lambda t, c: c["groups"][0]["linears"].pop(), "instead of"),
    (lambda t, c: t["fips.0.V"].index_fill_(0, torch.tensor([3]), 0), "non-zeros instead of"),
    (linear(role="sideways"), "sideways"), (linear(name="blocks.0.norm1"), "no linear layer")])
def test_tensors_that_do_not_fit(change, match, folder):
    rewrite(folder, change)
    with pytest.raises(ValueError, match=match): load(folder)


def test_only_four_files_without_pickle(folder):
    assert sorted(p.name for p in folder.iterdir()) == ["README.md", "config.json", "layers.png", "model.safetensors"]
    assert json.loads((folder/"config.json").read_text())["format"] == "fips_nb"
    shutil.move(folder, folder.parent/"moved")
    same(load(folder.parent/"moved"), load(str(folder.parent/"moved")))
