"""Saved models: bit-for-bit round trips over presets, shapes, dtypes and architectures, and what happens when files are broken."""
import json, shutil

import pytest, timm, torch
from safetensors.torch import load_file, save_file
from torch import nn

from fips_nb import blockwise_opt, hub
from fips_nb.blockwise_opt import compress, size_report
from fips_nb.demo import demo_images, demo_vit
from fips_nb.grouping import find_mlps, group_mlps, weights
from fips_nb.hub import dense_bytes, file_parts, folder_bytes, load, read_config, save
from fips_nb.sparse_factors import factor_layers, factorize, topk_mask
from fips_nb.svd_init import svd_init


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def batches(): return list(demo_images("train")[0][:200].split(50))


@pytest.fixture(scope="module")
def packed(batches): return compress(demo_vit(), batches, .4, levels=2, match_epochs=0)


@pytest.fixture
def folder(packed, tmp_path): return save(packed, tmp_path/"m")


def factored(model, r=6, density=.3, size=4, quick=False):
    "Factorise `model` in place without training: pruned SVD factors, or projections on a random basis if `quick`."
    for g in group_mlps(find_mlps(model), size):
        Ws = weights(model, g)
        U = torch.linalg.qr(torch.randn(g.d, r)).Q if quick else None
        U, Vs = (U, [U.T@W for W in Ws]) if quick else svd_init(Ws, r)
        factorize(model, g, U, [V*topk_mask(V.abs(), density) for V in Vs])
    return model.eval()


def same(a, b, x=None):
    "Assert that two models hold the same bits, share bases alike, and answer alike."
    sa, sb = a.state_dict(), b.state_dict()
    assert sa.keys() == sb.keys()
    for k in sa: assert sa[k].dtype == sb[k].dtype and sa[k].stride() == sb[k].stride() and torch.equal(sa[k], sb[k]), k
    for (k, p), (_, q) in zip(a.named_buffers(), b.named_buffers(), strict=True): assert p.dtype == q.dtype and torch.equal(p, q), k
    assert len(list(a.parameters())) == len(list(b.parameters())) # shared ones count once
    share = lambda m: [[f.U is g.U for g in factor_layers(m).values()] for f in factor_layers(m).values()]
    assert share(a) == share(b)
    if x is None: return
    with torch.no_grad(): assert torch.equal(a.eval()(x), b(x))


# ---- round trips ----

@pytest.mark.parametrize("preset,kw", [("fips", dict(levels=2)), ("sparse", dict(levels=2)), ("svd", {}), ("basis-sharing", {}), ("aafm", {}),
                                       ("fips", dict(levels=2, pattern=(2, 4))), ("fips", dict(levels=2, scope="global"))])
def test_presets(preset, kw, batches, tmp_path):
    res = compress(demo_vit(), batches, .4, preset=preset, match_epochs=0, **kw)
    save(res, tmp_path/"m")
    back = load(tmp_path/"m")
    same(res.model, back, demo_images("test")[0][:50])
    assert not back.training and back.fips_config["report"]["preset"] == preset
    parts, said = file_parts(tmp_path/"m"), size_report(res.model)["mlp_bytes"]
    assert sum(parts.values()) == folder_bytes(tmp_path/"m") < dense_bytes(res.model)
    assert parts["U"] + parts["V"] + parts["mask"] <= 1.02*said


def test_biases_that_came_and_went(tmp_path, monkeypatch):
    "A factor layer may have lost its bias, or have one where the architecture has none (AAFM adds it)."
    m, build = factored(demo_vit()), hub._build
    m.blocks[0].mlp.fc1.bias = None

    def unbiased(origin):
        fresh = build(origin)
        fresh.blocks[1].mlp.fc1.bias = None
        return fresh
    monkeypatch.setattr(hub, "_build", unbiased)
    same(m, load(save(m, tmp_path/"m")), demo_images("test")[0][:5])


@pytest.mark.parametrize("r", [1, 83])
@pytest.mark.parametrize("kind", ["sparse", "empty rows", "zero", "dense", "mixed", "negative zeros"])
def test_shapes(r, kind, tmp_path):
    torch.manual_seed(r)
    m = demo_vit()
    for i, g in enumerate(group_mlps(find_mlps(m), 7)):
        Vs = [torch.randn(r, l.h).half().float() for l in g.linears]
        for k, V in enumerate(Vs):
            if kind == "sparse": V *= torch.rand_like(V) < .15
            if kind == "empty rows": V[::2] = 0; V[:, 5:9] = 0
            if kind == "zero": V.zero_()
            if kind == "mixed": V *= torch.rand_like(V) < (0, 1, .02, .9)[k%4]
            if kind == "negative zeros": V *= -(torch.rand_like(V) < .5).float()
        factorize(m, g, torch.randn(g.d, r).half().float(), Vs)
    same(m, load(save(m, tmp_path/"m")), demo_images("test")[0][:9])
    codecs = {g["codec"] for g in read_config(tmp_path/"m")["groups"]}
    assert codecs == {"dense"} if kind == "dense" else "dense" not in codecs
    if kind == "zero": assert file_parts(tmp_path/"m")["V"] == 0


@pytest.mark.parametrize("name,kw", [("vit_tiny_patch16_224", dict(depth=2, num_classes=5)), ("vit_tiny_patch16_224", dict(depth=2, img_size=64, in_chans=1, global_pool="avg")),
                                     ("swin_tiny_patch4_window7_224", dict(depths=(1, 2, 1, 1), num_classes=3)), ("eva02_tiny_patch14_224", dict(depth=2)),
                                     ("mixer_s16_224", {}), ("deit_tiny_distilled_patch16_224", dict(depth=2))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_architectures(name, kw, dtype, tmp_path): check_architecture(name, kw, dtype, tmp_path)


def test_bfloat16_model(tmp_path): check_architecture("eva02_tiny_patch14_224", dict(depth=1), torch.bfloat16, tmp_path)


def check_architecture(name, kw, dtype, tmp_path):
    m = factored(timm.create_model(name, **kw), size="stage", quick="vit" not in name).to(dtype)
    before = torch.random.get_rng_state()
    save(m, tmp_path/"m")
    back = load(tmp_path/"m")
    assert torch.equal(before, torch.random.get_rng_state()) # building a model draws no numbers from the caller's generator
    x = torch.randn(1, kw.get("in_chans", 3), *[kw.get("img_size", 224)]*2, dtype=dtype)
    same(m, back, x)
    assert type(back) is type(m) and back.num_classes == m.num_classes
    want, got = (timm.data.resolve_data_config(model=o) for o in (m, back))
    assert want == got
    values = {g["values"] for g in read_config(tmp_path/"m")["groups"]}
    assert values == {"float32" if dtype == torch.float32 else str(dtype)[6:]}
    save(back, tmp_path/"n")
    assert read_config(tmp_path/"n") == read_config(tmp_path/"m")


def test_whole_size_of_a_real_architecture(tmp_path):
    m = factored(timm.create_model("vit_tiny_patch16_224"), r=190, density=.25, size=12, quick=True).half()
    parts = file_parts(save(m, tmp_path/"m"))
    said = size_report(m)["mlp_bytes"] + parts["rest"]
    assert said < folder_bytes(tmp_path/"m") < 1.02*said and folder_bytes(tmp_path/"m") < dense_bytes(m)


def test_value_dtypes(tmp_path):
    m, x = factored(demo_vit()), demo_images("test")[0][:5]
    values = lambda p: {g["values"] for g in read_config(p)["groups"]}
    assert values(save(m, tmp_path/"a")) == {"float32"} # not representable in 16 bits: kept
    same(m, load(tmp_path/"a"), x)
    assert values(save(m, tmp_path/"b", dtype=torch.float16)) == {"float16"}
    blockwise_opt.round_factors(m, torch.float16)
    same(m, load(tmp_path/"b"), x)
    assert values(save(m, tmp_path/"c")) == {"float16"} and values(save(m, tmp_path/"d", dtype=torch.float32)) == {"float32"}
    for k in "cd": same(m, load(tmp_path/k), x)
    assert folder_bytes(tmp_path/"c") < folder_bytes(tmp_path/"d")
    blockwise_opt.round_factors(m, torch.bfloat16)
    m.blocks[0].mlp.fc1.V.data[0, 0] = 2.**100
    assert values(save(m, tmp_path/"e")) == {"bfloat16"}
    same(m, load(tmp_path/"e"))
    with pytest.raises(ValueError, match="blocks.0.mlp.fc1.*not finite"): save(m, tmp_path/"f", dtype=torch.float16)
    m.blocks[0].mlp.fc1.V.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="not finite"): save(m, tmp_path/"f")
    assert not (tmp_path/"f").exists()


def test_tied_weights_are_stored_once(tmp_path):
    m = factored(demo_vit())
    m.blocks[1].attn.qkv.weight = m.blocks[0].attn.qkv.weight
    m.blocks[3].norm1.weight = nn.Parameter(m.norm.weight.detach()) # another parameter over the same memory
    save(m, tmp_path/"m")
    back = load(tmp_path/"m")
    assert back.blocks[1].attn.qkv.weight is back.blocks[0].attn.qkv.weight
    assert read_config(tmp_path/"m")["tied"]["blocks.1.attn.qkv.weight"] == "blocks.0.attn.qkv.weight"
    for k, t in m.state_dict().items(): assert torch.equal(t, back.state_dict()[k]), k


def test_parameters_that_are_views(tmp_path):
    m = factored(demo_vit())
    both = torch.randn(2, 40)
    m.norm.weight, m.norm.bias = nn.Parameter(both[0]), nn.Parameter(both[1]) # one memory for two
    same(m, load(save(m, tmp_path/"m")), demo_images("test")[0][:5])


def test_buffers_that_are_no_state(tmp_path):
    "A rotary table that was changed is stored; an untouched one is not."
    m = factored(timm.create_model("eva02_tiny_patch14_224", depth=1))
    save(m, tmp_path/"a")
    assert not [k for k in load_file(tmp_path/"a/model.safetensors") if "rope" in k]
    name = next(k for k, b in m.named_buffers() if "rope" in k and k not in m.state_dict())
    m.get_buffer(name).mul_(1.5)
    same(m, load(save(m, tmp_path/"b")), torch.randn(1, 3, 224, 224))


# ---- what is refused when saving ----

def test_refused_models(tmp_path):
    with pytest.raises(ValueError, match="compress it first"): save(demo_vit(), tmp_path/"m")
    plain = factored(timm.models.VisionTransformer(img_size=8, patch_size=4, embed_dim=64, depth=1, num_heads=2))
    with pytest.raises(ValueError, match="arch="): save(plain, tmp_path/"m")
    with pytest.raises(ValueError, match="model_args="): save(plain, tmp_path/"m", arch="vit_tiny_patch16_224")
    args = dict(img_size=8, patch_size=4, embed_dim=64, depth=1, num_heads=2)
    same(plain, load(save(plain, tmp_path/"m", arch="vit_tiny_patch16_224", model_args=args)), torch.randn(2, 3, 8, 8))
    other = factored(timm.create_model("vit_tiny_patch16_224", depth=1))
    other.blocks[0].attn.num_heads = 6 # the same tensors, another function
    with pytest.raises(ValueError, match="num_heads is 6"): save(other, tmp_path/"n")
    with pytest.raises(ValueError, match="nearest"): save(other, tmp_path/"n", arch="vit_tini_patch16_224")
    with pytest.raises(ValueError, match="pretrained"): save(other, tmp_path/"n", model_args=dict(pretrained=True))
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_folders_that_are_not_ours_are_left_alone(packed, tmp_path):
    m = tmp_path/"m"
    m.mkdir()
    with pytest.raises(FileExistsError, match="overwrite=True"): save(packed, m)
    save(packed, m, overwrite=True) # empty
    save(packed, m, overwrite=True) # ours
    (m/"thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match="thesis.tex"): save(packed, m, overwrite=True)
    other = tmp_path/"other"
    other.mkdir()
    (other/"config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(FileExistsError, match="left alone"): save(packed, other, overwrite=True)
    with pytest.raises(FileExistsError, match="is a file"): save(packed, m/"thesis.tex", overwrite=True)
    assert (m/"thesis.tex").read_text() == "years of work" and (other/"config.json").read_text() == '{"model_type": "bert"}'
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m", "other"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("where", ["tensors", "config", "rename"])
def test_nothing_half_written_stays(error, where, packed, folder, monkeypatch):
    old = {p.name: p.read_bytes() for p in folder.iterdir()}

    def fail(*args, **kw): raise error
    rename = hub.Path.rename
    if where == "tensors": monkeypatch.setattr(blockwise_opt, "save_file", fail)
    if where == "config": monkeypatch.setattr(hub.Path, "write_text", fail)
    if where == "rename": monkeypatch.setattr(hub.Path, "rename", lambda a, b: fail() if a.name.endswith(".new") else rename(a, b))
    for target, kw in ((folder, dict(overwrite=True)), (folder.parent/"fresh", {})):
        with pytest.raises(type(error)): save(packed, target, **kw)
    monkeypatch.undo()
    assert [p.name for p in folder.parent.iterdir()] == ["m"] and {p.name: p.read_bytes() for p in folder.iterdir()} == old
    load(folder)


# ---- what is refused when loading ----

def rewrite(folder, change):
    "Change the tensors of `folder` and let its checksum agree."
    f, c = folder/"model.safetensors", folder/"config.json"
    ts, config = load_file(f), json.loads(c.read_text())
    change(ts, config)
    save_file(ts, f)
    c.write_text(json.dumps(config | dict(bytes=f.stat().st_size, sha256=hub._sha256(f))))


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
    (dict(version=99), "upgrade"), (dict(format="gguf"), "saved by fips_nb"), (dict(arch="hf-hub:someone/something"), "no architecture"), (dict(arch="vit_tini"), "nearest"),
    (dict(model_args=dict(checkpoint_path="x.pth")), "checkpoint_path"), (dict(model_args=dict(colour=1)), "cannot be made"), (dict(model_args=dict(depth=3)), "does not fit"),
    (dict(dtype="float17"), "does not fit"), (dict(groups=[]), "fc1.weight is missing"), (dict(groups=7), "does not fit"), (dict(tied={"norm.weight": "nowhere"}), "does not fit")])
def test_other_configs(change, match, folder):
    f = folder/"config.json"
    f.write_text(json.dumps(json.loads(f.read_text()) | change))
    with pytest.raises(ValueError, match=match): load(folder)


def test_no_config(folder, tmp_path):
    (folder/"config.json").write_text('{"format": "fips')
    with pytest.raises(ValueError, match="not valid JSON"): load(folder)
    (folder/"config.json").write_text('[]')
    with pytest.raises(ValueError, match="saved by fips_nb"): load(folder)
    (folder/"config.json").unlink()
    with pytest.raises(FileNotFoundError, match="config.json"): load(folder)
    with pytest.raises(FileNotFoundError, match="no folder .*nowhere"): load(tmp_path/"nowhere")


@pytest.mark.parametrize("change,match", [
    (lambda t, c: t.pop("norm.weight"), "norm.weight is missing"), (lambda t, c: t.pop("fips.0.U"), "U of blocks.0.mlp.fc1.* is missing"), (lambda t, c: t.pop("fips.1.mask"), "mask of .* is missing"),
    (lambda t, c: t.update(extra=torch.ones(1)), "extra has no place"), (lambda t, c: t.update({"norm.weight": torch.ones(41)}), r"norm.weight is \(41,\) instead of \(40,\)"),
    (lambda t, c: t.update({"fips.0.V": t["fips.0.V"][:-1]}), "values for"), (lambda t, c: t.update({"fips.0.mask": t["fips.0.mask"][:-9]}), "values for|decoded"),
    (lambda t, c: t.update({"fips.0.U": t["fips.0.U"][:, 1:].contiguous()}), "share a rank"), (lambda t, c: t.update({"fips.0.U": t["fips.0.U"][1:].contiguous()}), "39 -> 160 instead of 40 -> 160"),
    (lambda t, c: c["groups"][0]["linears"][0].update(shape=[3, 160]), "does not fit"), (lambda t, c: c["groups"][0].update(codec="runs"), "unknown codec"),
    (lambda t, c: c["groups"][0]["linears"][0].update(role="sideways"), "sideways")])
def test_tensors_that_do_not_fit(change, match, folder):
    rewrite(folder, change)
    with pytest.raises(ValueError, match=match): load(folder)


def test_only_two_files_without_pickle(folder):
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert json.loads((folder/"config.json").read_text())["format"] == "fips_nb"
    shutil.move(folder, folder.parent/"moved")
    same(load(folder.parent/"moved"), load(str(folder.parent/"moved")))
