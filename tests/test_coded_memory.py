"""Coded models in their modes: what they put out, what they take, and what is refused."""
import copy

import pytest
import torch
from small import first_blocks, put_codes
from torch import nn

from fips_nb.run import folders
from fips_nb.store import hub
from fips_nb.round.modes import Int8Embedding, Int8Linear, bench_modes, hold_as, int8_product
from fips_nb.round.sizes import bits_to_bytes, dense_params
from fips_nb.round.code import code_model
from fips_nb.round.costs import find_parts, measure_costs
from fips_nb.data.demo import demo_images, demo_vit
from fips_nb.learn.distillation import output_loss
from fips_nb.round.entropy import encode
from fips_nb.store.codes import folder_bytes
from fips_nb.speed.packing import optimize, pack, random_factors, resident_bytes
from fips_nb.share.pipeline import compress
from fips_nb.round.rounding import Codes
from fips_nb.sparse_factors import FactorLinear

pytestmark = pytest.mark.usefixtures("timed_once")


def by_hand(module, limit=7, big=()):
    "Codes for all matrices of `module`, put into it; codes at `big` are larger than 8 bits."
    module.fips_codes, g = {}, torch.Generator().manual_seed(0)
    for k, p in module.named_parameters():
        if p.ndim < 2: continue
        q = torch.randint(-limit, limit + 1, p.shape, generator=g).to(torch.int16)
        for at in big: q[at] = 300
        c = Codes(q, *(torch.full((n,), -12, dtype=torch.int16) for n in q.shape))
        p.data, module.fips_codes[k] = c.weight().to(p.dtype), encode(c)
    return module.eval()


def coded_llama(tied, dtype=torch.float32):
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(0)
    sizes = dict(vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    model = LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=tied)).to(dtype)
    return by_hand(model), torch.randint(0, 128, (2, 16), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
def test_language_model(tied, dtype):
    model, x = coded_llama(tied, dtype)
    want, n = model(x).logits, len(model.fips_codes)
    coded, int8 = (hold_as(copy.deepcopy(model), m) for m in ("coded", "int8"))
    assert torch.equal(coded(x).logits, want)
    assert (int8(x).logits - want).norm() < .05*want.norm()
    layers = [m for m in int8.modules() if isinstance(m, Int8Linear)]
    assert len(layers) == 15 and isinstance(int8.model.embed_tokens, Int8Embedding)
    shared = int8.lm_head.q.data_ptr() == int8.model.embed_tokens.q.data_ptr()
    assert shared == tied and n == 15 + (not tied)
    sizes = [resident_bytes(m) for m in (coded, int8, hold_as(model, "dense"))]
    assert sizes == sorted(sizes) and sizes[0] < .5*sizes[2]
    torch.testing.assert_close(int8.lm_head.weight, model.lm_head.weight, rtol=1e-2, atol=0)
    assert torch.equal(coded.generate(x[:, :4], max_new_tokens=8, do_sample=False),
                       model.generate(x[:, :4], max_new_tokens=8, do_sample=False))
    assert int8.generate(x[:, :4], max_new_tokens=8, do_sample=False).shape[1] == 12


def test_dtype_follows():
    model, x = coded_llama(False)
    coded = hold_as(model, "coded").to(torch.bfloat16)
    assert coded(x).logits.dtype == coded.lm_head.weight.dtype == torch.bfloat16
    int8 = hold_as(coded_llama(False)[0], "int8")
    steps = int8.lm_head.rows.clone()
    int8.to(torch.bfloat16)
    assert int8(x).logits.dtype == torch.bfloat16 and torch.equal(int8.lm_head.rows, steps)


def test_attention_that_reads_weights():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.last = nn.MultiheadAttention(32, 4, batch_first=True), nn.Linear(32, 32)
        def forward(self, x): return self.last(self.attention(x, x, x, need_weights=False)[0])
    torch.manual_seed(0)
    net, x = by_hand(Net()), torch.randn(2, 5, 32)
    want = net(x)
    for mode, most in (("coded", 1e-6), ("int8", .05)):
        held = hold_as(copy.deepcopy(net), mode)
        with torch.no_grad(): assert (held(x) - want).norm() <= most*want.norm()
    assert type(held.attention.out_proj) is not Int8Linear and type(held.last) is Int8Linear


def test_codes_beyond_eight_bits_stay_dense():
    net = by_hand(nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 32)), big=[(3, 5)])
    held = hold_as(net, "int8")
    assert [type(m) for m in held] == [nn.Linear, nn.Linear]


def test_a_changed_weight_is_kept():
    net = by_hand(nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 32)))
    with torch.no_grad(): net[0].weight[0, 0] += 1
    want, x = net[0].weight.detach().clone(), torch.randn(3, 32)
    with pytest.warns(UserWarning, match="have changed"): held = hold_as(copy.deepcopy(net), "coded")
    assert torch.equal(held[0].weight, want) and torch.equal(held(x), net(x))


@pytest.mark.parametrize("compiled", [True, False])
def test_products(compiled, monkeypatch):
    if not compiled: monkeypatch.setattr("fips_nb.round.modes.library", lambda: None)
    g = torch.Generator().manual_seed(0)
    for n, i, o in ((1, 1, 1), (3, 17, 5), (600, 64, 48), (0, 8, 4)):
        x, q = torch.randn(n, i, generator=g), torch.randint(-127, 128, (o, i), generator=g).to(torch.int8)
        rows, columns, b = (torch.rand(k, generator=g) + .1 for k in (o, i, o))
        want = x@(q*columns*rows[:, None]).T + b
        y = int8_product(x, q, rows, columns, b)
        assert y.shape == want.shape and (y - want).norm() <= .02*want.norm() + 1e-6
    x = torch.randn(3, 64, generator=g)
    x[0], x[1, 3] = 0, float("inf")
    q = torch.ones(2, 64, dtype=torch.int8)
    y = int8_product(x, q, torch.ones(2), torch.ones(64))
    assert (y[0] == 0).all() and y[1].isnan().all() and y[2].isfinite().all()


def test_threads(one_thread):
    x, q = torch.randn(2000, 64), torch.randint(-127, 128, (48, 64)).to(torch.int8)
    one = int8_product(x, q, torch.ones(48), torch.ones(64))
    torch.set_num_threads(3)
    assert torch.equal(int8_product(x, q, torch.ones(48), torch.ones(64)), one)


def test_refusals(tmp_path):
    net = by_hand(nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 32)))
    with pytest.raises(ValueError, match="fast'? is not one of dense, int8, coded"): hold_as(net, "fast")
    with pytest.raises(ValueError, match="no codes"): hold_as(nn.Linear(3, 3), "int8")
    with pytest.raises(ValueError, match="'size' is not 'time' or 'memory'"): bench_modes(net, {}, "size")
    held = hold_as(copy.deepcopy(net), "int8")
    with pytest.raises(ValueError, match="held as int8 already"): hold_as(held, "coded")
    with pytest.raises(RuntimeError, match="no gradients"): held(torch.randn(2, 32, requires_grad=True))
    model, _ = coded_llama(False)
    for mode in ("coded", "int8"):
        held = hold_as(copy.deepcopy(model), mode)
        with pytest.raises(ValueError, match=f"in memory as {mode}"): hub.save(held, tmp_path/"x")
    assert not (tmp_path/"x").exists()


def test_a_loaded_folder(tmp_path):
    model, x = coded_llama(True)
    folder = hub.save(model, tmp_path/"m")
    again = hub.load(folder)
    assert torch.equal(hold_as(again, "coded")(x).logits, model(x).logits)
    rows = bench_modes(hub.load(folder), {16: dict(input_ids=x)}, "memory", repeats=1)["rows"]
    assert [r["mode"] for r in rows if r["choice"]] == ["coded"]
    assert {"batch", "ms", "ratio", "resident_bytes", "difference"} <= rows[0].keys()


def test_nothing_to_code():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)).eval()
    with pytest.raises(ValueError, match="no matrix of at least 1024 entries"): code_model(net, [torch.randn(8, 4)], 60, 0)


@pytest.mark.parametrize("preset", ["fips-als", "pruning"])
def test_entries_of_a_sparse_projection_do_not_make_up_for_each_other(preset):
    model = random_factors(demo_vit(), .5, preset).float()
    costs = measure_costs(model, [demo_images("train")[0][:32]], find_parts(model))
    found = [(k, c.C) for k, c in costs.items() if k.endswith(".V")]
    assert len(found) == 40 and all(torch.equal(C, torch.diag(C.diagonal())) for _, C in found)


# ---- factors ----

def pictures(n, size=20): return list(demo_images("train")[0][:n].split(size))


def factored_vit(n=4):
    "Blocks of the demo with factors, made without a fit that takes time."
    return compress(first_blocks(n), pictures(50, 50), .4, levels=1, distill_epochs=0, group_size=2).model


def test_factors_are_parts_whatever_their_size():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            U = nn.Parameter(torch.randn(8, 4))
            self.a, self.b = FactorLinear(U, torch.randn(4, 6), "up"), FactorLinear(U, torch.randn(4, 6), "down")
            self.c = nn.Linear(8, 8)
    net = Net()
    assert [(p.name, p.shape) for p in find_parts(net)] == [("a.U", (8, 4)), ("a.V", (4, 6)), ("b.V", (4, 6))]
    assert find_parts(net)[0].uses == (("a", "U"), ("b", "U")) and dense_params(net) == 8*6*2 + 72


@pytest.fixture
def short_search(monkeypatch): monkeypatch.setattr("fips_nb.round.sizes.SPARE_BYTES", .05)


def test_a_teacher_is_followed_and_counted(short_search):
    model, made, batches = first_blocks(3), factored_vit(3), pictures(80, 10)
    nbytes = bits_to_bytes(model, 4)
    alone, told = (code_model(made, batches, nbytes, 4, teacher=t) for t in (None, model))
    assert [r.report["config"]["teacher"] for r in (alone, told)] == ["itself", "given"]
    n = sum(p.numel() for p in model.parameters())
    assert told.report["model_params"] == alone.report["model_params"] == dense_params(made) == n
    assert 8*told.report["coded_bytes"]/n == pytest.approx(told.report["bits"]) and told.report["bits"] <= 4
    held = demo_images("train")[0][200:400]
    with torch.no_grad():
        loss = [output_loss(r.model(held), model(held)).item() for r in (told, alone)]
    assert loss[0] < .9*loss[1] # one of them knows what it stands for
    assert told.report["divergences"][0] > alone.report["divergences"][0]
    names = {f"blocks.{i}.mlp.{k}" for i in range(3) for k in ("fc1.V", "fc2.V")}
    assert names | {f"blocks.{i}.mlp.fc1.U" for i in (0, 2)} <= told.model.fips_codes.keys()


@pytest.mark.parametrize("preset", ["fips-als", "pruning"])
def test_factors_that_no_output_depends_on_are_coded_too(preset, short_search, tmp_path):
    "Else the whole group would be stored in 16 bits, and the file would exceed its size."
    images, dense = pictures(40), first_blocks(4)
    model = compress(dense, images, .4, preset, levels=1, distill_epochs=0).model
    model.blocks[3].mlp.forward = lambda x: torch.zeros_like(x)
    made = code_model(model, images, bits_to_bytes(dense, 5), 0, teacher=dense)
    assert {"blocks.3.mlp.fc1.V", "blocks.3.mlp.fc2.V"} <= made.model.fips_codes.keys()
    del made.model.blocks[3].mlp.forward
    V, W = (m.blocks[3].mlp.fc1.V for m in (model, made.model))
    assert (V - W).norm() < .8*V.norm()
    folder = hub.save(made, tmp_path/"m")
    assert folder_bytes(folder) <= made.report["coded_bytes"] <= bits_to_bytes(dense, 5)


def test_factors_are_not_held_as_codes():
    made = put_codes(factored_vit())
    for mode in ("int8", "coded"):
        with pytest.raises(ValueError, match="blocks.0.mlp.fc1 of this VisionTransformer has factors.*optimize"):
            hold_as(made, mode)
    assert made.fips_codes and not hasattr(made, "fips_mode")
    x = demo_images("test")[0][:3]
    with torch.no_grad(): want, got = made(x), hold_as(copy.deepcopy(made), "dense")(x)
    assert torch.equal(want, got)


def test_bench_packs_coded_factors(tmp_path):
    folder = hub.save(put_codes(factored_vit()), tmp_path/"m")
    row, = folders.bench(str(folder))["rows"]
    assert row["mode"] == "packed" and sum(row["formats"].values()) == 8
    x = demo_images("test")[0][:3]
    model = hub.load(folder)
    choices = optimize(model, x, repeats=1, log=None)
    with torch.no_grad(): torch.testing.assert_close(pack(copy.deepcopy(model), choices)(x), model(x), rtol=1e-4, atol=1e-4)
