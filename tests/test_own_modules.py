"""Saved modules of the user's own: round trips over presets, codes, kinds of layers; what is refused."""
import copy
import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from test_hub import rewrite, same
from torch import nn
from trial import Net

from fips_nb.run import folders
from fips_nb.run.evaluate import evaluate
from fips_nb.round.sizes import bits_to_bytes
from fips_nb.round.code import code_model
from fips_nb.data.demo import demo_vit
from fips_nb.store.format import VERSION, read_config
from fips_nb.store.values import round_rest
from fips_nb.grouping import Group, LinearSpec, weights
from fips_nb.store.hub import export, load, save
from fips_nb.share.pipeline import compress
from fips_nb.sparse_factors import factor_layers, factorize

pytestmark = pytest.mark.usefixtures("one_thread", "timed_once")
WORDS = torch.randint(0, 40, (64, 8), generator=torch.Generator().manual_seed(0))


def batches(): return list(WORDS.split(16))


@pytest.fixture(scope="module")
def made():
    torch.manual_seed(0)
    res = compress(Net().eval(), batches(), .6, levels=2, distill_epochs=0)
    round_rest(res.model)
    return res


@pytest.fixture(scope="module")
def saved(made, tmp_path_factory): return save(made, tmp_path_factory.mktemp("saved")/"m")


@pytest.fixture
def folder(saved, tmp_path): return shutil.copytree(saved, tmp_path/"m")


@pytest.mark.parametrize("preset", ["fips-als", "pruning", "svd", "basis-sharing", "aafm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_presets_and_dtypes(preset, dtype, tmp_path):
    torch.manual_seed(0)
    net = Net().to(dtype).eval()
    more = dict(levels=2, distill_epochs=0) if preset in ("fips-als", "pruning") else {}
    res = compress(net, batches(), .6, preset, **more)
    round_rest(res.model)
    back = load(save(res.model, tmp_path/"m"), model=Net().to(dtype))
    same(res.model, back, WORDS)
    assert back.blocks[0] is back.blocks[2] and back.head.weight is back.embed.weight
    again = save(back, tmp_path/"n")
    for f in ("model.safetensors", "config.json"):
        assert (again/f).read_bytes() == (tmp_path/"m"/f).read_bytes()
    plain = Net().to(dtype).eval()
    plain.load_state_dict(load_file(export(again, tmp_path/"d")/"model.safetensors"), strict=preset != "aafm")
    if preset == "aafm": return # brings biases and means
    with torch.no_grad(): gap = (plain(WORDS) - back(WORDS)).norm()/back(WORDS).norm()
    assert gap < (.01 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("factors", [False, True])
def test_codes(factors, made, tmp_path):
    torch.manual_seed(0)
    net = Net().eval()
    size = bits_to_bytes(net, 7)
    res = code_model(made.model if factors else net, batches(), size, 0, teacher=net)
    round_rest(res.model)
    back = load(save(res.model, tmp_path/"m"), model=Net())
    same(res.model, back, WORDS)
    assert (tmp_path/"m/model.safetensors").stat().st_size <= size
    assert back.fips_codes.keys() == res.model.fips_codes.keys()
    other = Net().eval()
    other.load_state_dict(load_file(export(tmp_path/"m", tmp_path/"d")/"model.safetensors"))
    with torch.no_grad(): torch.testing.assert_close(other(WORDS), back(WORDS), rtol=1e-4, atol=1e-4)
    filled = load(save(made, tmp_path/"f"), model=other) # codes of another folder do not stay
    assert factor_layers(filled) and not hasattr(filled, "fips_codes")


OTHER = """
import sys, torch
sys.path.insert(0, sys.argv[2])
from trial import Net
from fips_nb import load
x = torch.arange(40).view(5, 8)
with torch.no_grad(): torch.save(load(sys.argv[1], model=Net())(x), sys.argv[3])
"""


def test_another_process(made, folder, tmp_path):
    args = [sys.executable, "-c", OTHER, folder, __file__.rpartition("/")[0], tmp_path/"y.pt"]
    subprocess.run(list(map(str, args)), check=True)
    with torch.no_grad(): want = made.model.eval()(torch.arange(40).view(5, 8))
    assert torch.equal(torch.load(tmp_path/"y.pt"), want)


class Odd(nn.Module):
    "An LSTM, a frozen batch norm, a weight norm, a table that is no state, and transposed linears."
    def __init__(self):
        super().__init__()
        from transformers.pytorch_utils import Conv1D
        self.rnn = nn.LSTM(32, 32, batch_first=True)
        self.bn = nn.BatchNorm1d(32)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(32, 32))
        self.up, self.down = Conv1D(32, 32), Conv1D(32, 32)
        self.register_buffer("table", torch.linspace(0, 1, 32), persistent=False)

    def forward(self, x):
        x = self.normed(self.rnn(x)[0]) + self.table
        return self.down(self.up(self.bn(x.mT).mT.contiguous()).relu())


def odd():
    "A factorised module of unusual layers, and the dense one."
    torch.manual_seed(0)
    dense = Odd().eval()
    dense.bn.running_mean.copy_(torch.randn(32))
    model = copy.deepcopy(dense)
    g = Group("mlp", (LinearSpec("up", "up", 32, 32), LinearSpec("down", "down", 32, 32)))
    U = torch.linalg.qr(torch.randn(32, 32)).Q.half().float()
    factorize(model, g, U, [(U.T@W).half().float() for W in weights(model, g)])
    return round_rest(model), dense


def test_unusual_layers(tmp_path):
    model, dense = odd()
    folder, x = save(model, tmp_path/"m"), torch.randn(2, 5, 32)
    net = Odd()
    old = net.rnn.weight_ih_l0
    back = load(folder, model=net)
    same(model, back, x)
    assert back.rnn.weight_ih_l0 is old # flat weights and optimisers keep their tensors
    assert [f.kind.__name__ for f in factor_layers(back).values()] == ["Conv1D", "Conv1D"]
    assert read_config(folder)["transposed"] == ["up", "down"]
    plain = Odd().eval()
    plain.load_state_dict(load_file(export(folder, tmp_path/"d")/"model.safetensors"))
    with torch.no_grad(): torch.testing.assert_close(plain(x), back(x), rtol=1e-4, atol=1e-4)


def test_frozen_weights_stay_frozen(folder):
    net = Net().requires_grad_(False)
    net.head.requires_grad_(True)
    back = load(folder, model=net)
    assert not any(p.requires_grad for f in factor_layers(back).values() for p in f.parameters())
    assert back.embed.weight.requires_grad


def untied(m): m.head.weight = nn.Parameter(m.head.weight.detach().clone())
def unshared(m): m.blocks[2] = copy.deepcopy(m.blocks[0])
def wider(m): m.blocks[1].mlp[0] = nn.Linear(32, 80)
def double(m): m.double()
def fewer(m): del m.blocks[1].norm
def more(m): m.extra = nn.Linear(2, 2)
def changed(m): m.blocks[1].mlp[2] = nn.Conv1d(64, 32, 1)
def buffer(m): m.register_buffer("scale", m.scale, persistent=False)
def long(m): m.embed = nn.Embedding(41, 32)


@pytest.mark.parametrize("change,match", [
    (untied, "head.weight is tied to embed.weight in the folder and is not tied in the module"),
    (unshared, "blocks.2.mlp.0 is the layer blocks.0.mlp.0 again in the folder"),
    (wider, r"blocks.1.mlp.0 is a linear 32 -> 64 of float32 in the folder and is a linear 32 -> 80"),
    (double, "of float32 in the folder and is a linear 32 -> 64 of float64"),
    (fewer, "blocks.1.norm.weight is float32 .32,. in the folder and is missing in the module"),
    (more, "extra.weight is missing in the folder and is float32 .2, 2. in the module"),
    (changed, "blocks.1.mlp.2 is a linear 64 -> 32 of float32 in the folder and is no linear layer"),
    (buffer, "scale is float32 .32,. in the folder and is missing"),
    (long, r"embed.weight is float32 .40, 32. in the folder and is float32 .41, 32. in the module")])
def test_modules_that_do_not_fit(change, match, folder):
    net = Net()
    change(net)
    before = {k: t.clone() for k, t in net.state_dict().items()}
    with pytest.raises(ValueError, match=match): load(folder, model=net)
    after = net.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[k], t) for k, t in before.items())


def test_biases_on_one_side(made, tmp_path):
    "A preset may add a bias, and a bias may have been removed."
    model = copy.deepcopy(made.model)
    model.blocks[1].mlp[0].bias = None
    model.blocks[0].mlp[2].bias.data.fill_(.5)
    net = Net()
    net.blocks[0].mlp[2] = nn.Linear(64, 32, bias=False)
    same(model, load(save(model, tmp_path/"m"), model=net), WORDS)


def test_how_to_load(made, folder, packed_vit, tmp_path):
    with pytest.raises(ValueError, match=r"class 'Net', which a folder cannot make.*load\(folder, model=Net\(\)\)"):
        load(folder)
    with pytest.raises(ValueError, match="and not <class"): load(folder, model=Net)
    with pytest.raises(ValueError, match="has factors already"): load(folder, model=made.model)
    with torch.device("meta"): ghost = Net()
    with pytest.raises(ValueError, match="no memory yet"): load(folder, model=ghost)
    with pytest.raises(ValueError, match="arch means nothing"): save(made, tmp_path/"x", arch="resnet18")
    with pytest.raises(ValueError, match="does not fit"): load(packed_vit, model=Net())
    vit = demo_vit(pretrained=False)
    same(load(packed_vit), load(packed_vit, model=vit), torch.randn(2, 1, 8, 8))
    assert vit.fips_config["arch"] == "demo-vit"


@pytest.fixture
def packed_vit(tmp_path):
    from fips_nb.data.demo import demo_images
    images = list(demo_images("train")[0][:100].split(50))
    return save(compress(demo_vit(), images, .4, "svd"), tmp_path/"vit")


def test_commands(folder, tmp_path):
    said = folders.info(folder)
    assert said["arch"] == "Net" and len(said["layers"]) == 4
    for run in (evaluate, folders.bench):
        with pytest.raises(ValueError, match=r"class 'Net', which nothing can make but its class; open it by load\(folder, Net\(\)\)"):
            run(str(folder))
    out = folders.export(folder, tmp_path/"d")
    assert out["arch"] == "Net"
    assert load_file(tmp_path/"d/model.safetensors").keys() == Net().state_dict().keys()


def table(name, **kw): return lambda t, c: c["tensors"][name].update(kw)
def entry(**kw): return lambda t, c: c.update(kw)
def linear(**kw): return lambda t, c: c["groups"][0]["linears"][0].update(kw)
def nan(t, c): t["blocks.0.norm.bias"][0] = torch.nan


@pytest.mark.parametrize("change,match", [
    (table("embed.weight", shape=[40, 31]), "instead of"), (table("embed.weight", dtype="float16"), "in the folder and"),
    (table("scale", shape=[-1]), "shape"), (table("scale", dtype="object"), "dtype: Invalid"),
    (table("scale", shape=[2**31 - 1]*64), "instead of"), (lambda t, c: c["tensors"].pop("scale"), "no place"),
    (entry(arch="demo-vit"), "arch"), (entry(module=""), "module"), (entry(tied={"x": "y"}), "cannot be tied"),
    (entry(shared={"blocks.2.mlp.0": "blocks.1.norm"}), "cannot be shared"), (entry(transposed=["x"]), "there is no x"),
    (entry(coded=["embed.weight"]), "missing"), (entry(version=VERSION + 1), "newer fips_nb"), (nan, "NaN"),
    (linear(role="down"), "is a linear"), (linear(name="blocks.9.mlp.0"), "no linear layer|cannot be shared"),
    (lambda t, c: c.pop("module"), "arch"), (lambda t, c: t.pop("fips.0.V"), "missing")])
def test_hostile_folders(change, match, folder):
    rewrite(folder, change)
    net = Net()
    before = {k: t.clone() for k, t in net.state_dict().items()}
    with pytest.raises(ValueError, match=match): load(folder, model=net)
    assert all(torch.equal(net.state_dict()[k], t) for k, t in before.items())


def test_export_is_bounded_by_its_file(folder, tmp_path):
    def huge(t, c):
        for g in c["groups"]:
            for l in g["linears"]: l.update(shape=[l["shape"][0], 10**8])
    rewrite(folder, huge)
    with pytest.raises(ValueError, match="contradicts itself.*would decode"): export(folder, tmp_path/"d")


def test_a_class_is_never_looked_up(folder, tmp_path):
    c = json.loads((folder/"config.json").read_text())
    (folder/"config.json").write_text(json.dumps(c | dict(module="os.system")))
    with pytest.raises(ValueError, match="class 'os.system'"): load(folder)
    assert load(folder, model=Net()).fips_config["module"] == "os.system"


def regressor(n, **kw):
    "A network with `n` numbers as outputs, far from logits."
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(40, 64), nn.ReLU(), nn.Linear(64, n)).eval()
    net[2].weight.data.mul_(20)
    for k, v in kw.items(): setattr(net, k, v)
    return net


@pytest.mark.parametrize("n", [1, 6])
def test_targets_that_are_numbers_make_a_regression(n):
    x, y = torch.randn(2, 8, 32, 40).unbind()
    net, told = regressor(n), regressor(n, num_classes=0)
    got = code_model(net, list(zip(x, net(x).detach())), 2200, 2)
    want = code_model(told, list(x), 2200, 2)
    assert got.report["divergences"] == want.report["divergences"]
    for k in got.model.fips_codes: assert torch.equal(got.model.fips_codes[k], want.model.fips_codes[k])
    bare = code_model(net, list(x), 2200, 2) # one output is no class either way
    assert (bare.report["divergences"] == got.report["divergences"]) == (n == 1)
