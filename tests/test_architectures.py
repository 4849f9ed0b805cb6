"""Every architecture that the page lists: what is found in it, exactness, rounding, its folder."""
import json
import math
import re
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch

import transformers
from architectures import BARTS, LM, PAIR, PIXELS, REFUSED, SEEN, TORCH, WORK, Case, causal, refusal
from fips_nb.measure.accuracy import output_similarity
from fips_nb.store.hub import export, load, save
from fips_nb.round.code import code_model
from fips_nb.round.costs import expert_rows, find_parts, measure_costs
from fips_nb.round.sizes import stored_bytes
from fips_nb.share.budgets import GroupPlan
from fips_nb.share.statistics import collect_moments
from fips_nb.learn.distillation import predict
from fips_nb.share.pipeline import compress
from fips_nb.grouping import find_modules, group_modules
from fips_nb.sparse_factors import factor_layers

pytestmark = [pytest.mark.usefixtures("one_thread", "timed_once"),
              pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")]
EXACT = dict(levels=1, distill_epochs=0, dtype=torch.float32)


@torch.no_grad()
def outputs(model, x):
    "What `model` predicts for `x`."
    return predict(model, x)


def noted(case):
    "What a folder of `case` needs to be told."
    return dict(arch=case.name, model_args=case.args) if case.library == "timm" else {}


def opened(case, folder):
    "What `folder` holds of `case`; nothing may stay of a module of one's own that is filled."
    if case.library != "torch": return load(folder)
    fresh = case.make()
    for p in fresh.parameters(): p.data.normal_()
    return load(folder, model=fresh)


def factorised(case, model):
    "`model` with bases of full rank and nothing pruned."
    targets = "all" if case.attention else "mlp"
    modules = find_modules(model, targets)
    if case.parts: modules = modules[:1 + case.attention] # of a large model
    plans = [GroupPlan(g, g.d, (1.,)*len(g.linears)) for g in group_modules(modules, "all")]
    res = compress(model, case.batches(), plan=plans, targets=targets, **EXACT)
    assert len(factor_layers(res.model)) == sum(len(m.linears) for m in modules)
    return res


@pytest.mark.parametrize("case", WORK, ids=lambda c: c.title)
def test_full_rank_is_the_dense_model_and_comes_back_from_its_folder(case, tmp_path):
    model, x = case.make(), case.batches()[0]
    res = factorised(case, model)
    torch.testing.assert_close(outputs(res.model, x), outputs(model, x), rtol=1e-3, atol=1e-4)
    back = opened(case, save(res.model, tmp_path/"small", rest="keep", dtype=torch.float32, **noted(case)))
    assert factor_layers(back).keys() == factor_layers(res.model).keys()
    assert torch.equal(outputs(back, x), outputs(res.model.eval(), x))


@pytest.mark.parametrize("case", [c for c in WORK if not c.attention], ids=lambda c: c.title)
def test_attention_that_does_not_work_is_refused(case):
    with pytest.raises(ValueError, match="no attention blocks|no input reached|MultiheadAttention"):
        compress(case.make(), case.batches(), 1., "pruning", targets="attn", **EXACT)


@pytest.mark.parametrize("case", REFUSED, ids=lambda c: c.title)
def test_what_is_refused_is_refused_by_name(case):
    assert case.said in refusal(case)
    assert case.library == "timm" or not case.attention or find_modules(case.make(), "attn")


def rounded(case, model, bits, n=2, spare=1.):
    """`model` with at most so many bits for each entry that is coded.

    Where all the room may stay unused, the search for a step ends at the first that fits."""
    sizes = {p.name: math.ceil(bits/8*math.prod(p.shape)) for p in find_parts(model)}
    with patch("fips_nb.round.sizes.SPARE_BYTES", spare):
        return code_model(model, case.batches(n), stored_bytes(model, sizes), 0)


def distance(case, model, res):
    "How far the outputs went, as a share of how far an error of the size of the weights takes them."
    x, gone = case.batches()[0], case.small()
    for p in find_parts(gone):
        W = gone.get_parameter(p.name).data
        W.copy_(W.flatten().flip(0).view_as(W))
    ref = outputs(model, x)
    return (outputs(res.model, x) - ref).norm()/(outputs(gone, x) - ref).norm()


@pytest.mark.parametrize("case", [*WORK, *REFUSED], ids=lambda c: c.title)
def test_rounding(case):
    model = case.small()
    res = rounded(case, model, 10)
    assert res.model.fips_codes.keys() == {p.name for p in find_parts(model)}
    assert 0 < distance(case, model, res) < .03


SEARCHED = ("vit_tiny_patch16_224", "LlamaForCausalLM")


@pytest.mark.parametrize("case", [c for c in WORK if c.title in SEARCHED], ids=lambda c: c.title)
def test_rounding_to_a_size_that_is_reached(case):
    model, error = case.make(), {}
    for bits in (6, 12):
        res = rounded(case, model, bits, spare=.03)
        target, sizes = res.report["target_bytes"], {k: len(c) for k, c in res.model.fips_codes.items()}
        assert .97*target <= stored_bytes(model, sizes) <= target
        error[bits] = distance(case, model, res)
    assert 0 < error[6] < .1 and error[12] < .02 and error[12] < error[6]


def test_experts_that_are_seen_too_rarely_are_rounded_at_the_mean_cost():
    case = causal("Mixtral", LM | dict(num_local_experts=5))
    model, name = case.make(), "model.layers.0.mlp.experts"
    for gate in (model.model.layers[i].mlp.gate for i in range(2)): # the last is never chosen
        w = gate.weight.data[0].clone()
        gate.weight.data.copy_(torch.stack([2*w, -2*w, w, -w, 0*w]))
    res = rounded(case, model, 6, n=8)
    note = next(n for n in res.report["notes"] if n.startswith(name))
    assert "experts 4 (0 rows) read fewer rows of the calibration data than their 32" in note
    key = f"{name}.gate_up_proj"
    wrong = (res.model.get_parameter(key) - model.get_parameter(key)).square().mean((1, 2)).sqrt()
    assert .6 < wrong[4]/wrong[:4].mean() < 1.6 and key in res.model.fips_codes


class Listed(torch.nn.Module):
    "Three experts in a list, the last of which nobody asks."
    num_classes = 40

    def __init__(self):
        super().__init__()
        self.experts = torch.nn.ModuleList(torch.nn.Linear(32, 32) for _ in range(3))
        self.head = torch.nn.Linear(32, 40)

    def forward(self, x):
        return self.head(torch.stack([f(x) for f in self.experts[:2]]).sum(0))


def test_experts_in_a_list_that_are_never_asked_are_rounded_like_the_others():
    torch.manual_seed(0)
    model, batches = Listed(), list(torch.randn(4, 16, 32))
    assert expert_rows(model, batches)["experts"].tolist() == [64, 64, 0]
    res = code_model(model, batches, 2**12, 0)
    assert any("experts 2 (0 rows) read fewer rows" in n for n in res.report["notes"])
    name = "experts.{}.weight".format
    wrong = [(res.model.get_parameter(name(i)) - model.get_parameter(name(i))).norm() for i in range(3)]
    assert .8 < wrong[2]/wrong[0] < 1.25 and name(2) in res.model.fips_codes


NAMED = dict(BertModel="pooler", SiglipVisionModel="head")


@pytest.mark.parametrize("case", [c for c in WORK if c.title in NAMED], ids=lambda c: c.title)
def test_what_no_output_depends_on_is_named_before_the_work_and_rounded_like_the_rest(case):
    said = f"depends on {NAMED[case.title]} ("
    with pytest.warns(UserWarning, match=re.escape(said)): res = rounded(case, case.make(), 6, spare=.03)
    assert any(said in n for n in res.report["notes"])
    bits = {x["name"]: x["bits"] for x in res.report["layers"]}
    unseen = [v for k, v in bits.items() if k.startswith(("pooler", "head"))]
    assert all(.6 < v/(sum(bits.values())/len(bits)) < 1.4 for v in unseen)


def test_fewer_tokens_than_inputs_are_told_before_the_work_and_padding_is_none():
    model, text = causal("Llama").make(), torch.randint(3, 90, (2, 30))
    coded = lambda batch: code_model(model, [batch], 5*sum(p.numel() for p in model.parameters())//8, 0)
    with pytest.warns(UserWarning, match=r"linears, such as .*down_proj, have more inputs \(80\)"):
        notes = coded(text).report["notes"]
    assert any("more inputs (80) than calibration has rows (60)" in n for n in notes)
    twice = torch.cat([text, text], 1)
    assert not any("more inputs" in n for n in coded(twice).report["notes"])
    mask = (torch.arange(60) >= 30).long().expand(2, 60)
    padded = coded(dict(input_ids=twice, attention_mask=mask))
    assert any("calibration has rows (60)" in n for n in padded.report["notes"])


def test_tables_that_transformers_makes_anew_are_not_coded(tmp_path):
    case = Case("MarianMTModel", BARTS, "MarianConfig", inputs=PAIR)
    res, x = rounded(case, case.make(), 8), case.batches()[0]
    assert not any("positions" in k for k in res.model.fips_codes)
    plain = export(save(res.model, tmp_path/"small"), tmp_path/"plain")
    fresh = transformers.MarianMTModel.from_pretrained(plain).eval()
    want = load(tmp_path/"small")
    for half in ("encoder", "decoder"):
        table = getattr(want.model, half).embed_positions
        table.weight.data.copy_(table.create_weight())
    torch.testing.assert_close(outputs(fresh, x), outputs(want, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", ["dense", "int8", "coded"])
def test_another_default_dtype_does_not_change_what_is_read(mode, tmp_path):
    case = causal("Llama")
    res, x = rounded(case, case.make(), 6), case.batches()[0]
    want = load(save(res.model, tmp_path/"small"), mode=mode)
    torch.set_default_dtype(torch.bfloat16)
    try:
        got = load(tmp_path/"small", mode=mode)
        assert torch.equal(outputs(got, x), outputs(want, x)) or mode == "int8"
    finally: torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(outputs(got, x), outputs(want, x), rtol=.02, atol=.02)


def test_masks_that_a_model_draws_are_the_same_each_time():
    case = Case("ViTMAEModel", SEEN, "ViTMAEConfig", inputs=PIXELS)
    model, x, state = case.make(), case.batches()[0], torch.get_rng_state()
    assert torch.equal(outputs(model, x), outputs(model, x)) and torch.equal(torch.get_rng_state(), state)
    assert output_similarity(model, [x], model)["least_cosine"] > .9999


class TwoTowers(torch.nn.Module):
    "Images take another way than texts, and nobody gives any."
    num_classes = 40

    def __init__(self):
        super().__init__()
        self.text, self.head = torch.nn.Linear(32, 64), torch.nn.Linear(64, 40)
        self.tower = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.ReLU(), torch.nn.Linear(64, 64))

    def forward(self, x, image=None):
        return self.head(self.text(x) + (0 if image is None else self.tower(image)))


def test_a_tower_that_calibration_never_reaches_is_rounded_and_not_worn_down():
    torch.manual_seed(0)
    model, alone = TwoTowers().eval(), [dict(x=x) for x in torch.randn(8, 64, 32)]
    model.tower[0].weight.data *= 50 # no matter how large its weights are
    n = sum(p.numel() for p in model.parameters())
    with pytest.warns(UserWarning, match=r"depends on tower \(.*% of the parameters\)"):
        first, res = (code_model(model, alone, 5*n//8, epochs) for epochs in (0, 4))
    for k in ("tower.0.weight", "tower.2.weight"):
        W = model.get_parameter(k)
        assert 0 < (res.model.get_parameter(k) - W).norm() < .15*W.norm()
        assert torch.equal(res.model.get_parameter(k), first.model.get_parameter(k)) # distilled as it was
    both = [*alone[1:], alone[0] | dict(image=torch.randn(64, 32))] # one batch is enough
    assert not any("tower" in n for n in code_model(model, both, 5*n//8, 0).report["notes"])


FOLDERS = ("vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "convnext_tiny", "ViTForImageClassification",
           "DINOv3ViTModel", "CLIPModel", "T5ForConditionalGeneration", "WhisperForConditionalGeneration",
           "GPT2LMHeadModel", "BertModel", "MixtralForCausalLM", "Qwen3MoeForCausalLM", "MambaForCausalLM",
           "TransformerEncoderLayer")
WIDER = dict(convnext_tiny=dict(dims=(32, 32, 64, 64)), # matrices that are large enough to be coded
             swin_tiny_patch4_window7_224=dict(embed_dim=32))


@pytest.mark.parametrize("title", FOLDERS)
def test_folders_of_codes(title, tmp_path):
    "Transformers would change the names of some of them."
    case = next(c for c in (*WORK, *REFUSED) if c.title == title)
    case = replace(case, args=case.args | WIDER.get(title, {}))
    res, x = rounded(case, case.make(), 6), case.batches()[0]
    ref = outputs(res.model, x)
    back = opened(case, save(res.model, tmp_path/"exact", rest="keep", **noted(case)))
    assert back.fips_codes.keys() == res.model.fips_codes.keys()
    assert torch.equal(outputs(back, x), ref)
    small = save(back, tmp_path/"small")
    assert (small/"model.safetensors").stat().st_size <= res.report["target_bytes"]
    again = opened(case, small)
    assert again.fips_codes.keys() == back.fips_codes.keys()
    for k in back.fips_codes: assert torch.equal(again.get_parameter(k), res.model.get_parameter(k)), k
    assert (outputs(again, x) - ref).norm() < 2e-3*ref.norm() # what is not coded is stored in 16 bits


@pytest.mark.parametrize("case", TORCH, ids=lambda c: c.title)
def test_fused_kernels_of_torch_read_the_factors(case):
    model, x = case.make(), case.batches()[0]
    with torch.no_grad():
        torch.testing.assert_close(factorised(case, model).model(x), model(x), rtol=1e-3, atol=1e-4)


def test_records_of_a_convolution_that_is_no_linear_are_refused(tmp_path):
    case = next(c for c in WORK if c.name == "convnext_atto")
    folder = save(factorised(case, case.make()), tmp_path/"small", **noted(case))
    config = json.loads((folder/"config.json").read_text())
    for name in ("stages.0.blocks.0.conv_dw", "stem.0"):
        config["groups"][0]["linears"][0]["name"] = name
        (folder/"config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=f"{name} is no linear layer"): load(folder)


def test_masks_of_padding_are_those_of_the_decoder():
    case = next(c for c in WORK if c.title == "BartForConditionalGeneration")
    batch = dict(case.batches()[0])
    batch["attention_mask"] = torch.ones(2, 16, dtype=torch.long) # as long as what is decoded
    batch["input_ids"] = batch["input_ids"][:, :16]
    batch["attention_mask"][0, 9:] = 0
    assert predict(case.make(), batch).shape == (2, 16, 96)
    batch["decoder_attention_mask"] = batch["attention_mask"].flip(0)
    assert predict(case.make(), batch).shape == (9 + 16, 96)


@pytest.mark.parametrize("title", ["LlamaForCausalLM", "BertModel", "T5ForConditionalGeneration"])
def test_padding_counts_in_no_statistics(title):
    case = next(c for c in WORK if c.title == title)
    model, x = case.make(), torch.randint(3, 90, (2, 24), generator=torch.Generator().manual_seed(0))
    ones = torch.ones(2, 24, dtype=torch.long)
    longer = lambda t: torch.nn.functional.pad(t, (0, 16)) # with token 0
    plain, padded = dict(input_ids=x, attention_mask=ones), dict(input_ids=longer(x), attention_mask=longer(ones))
    for b in (plain, padded) if title.startswith("T5") else (): b["decoder_input_ids"] = x[:, :12]
    parts = find_parts(model)
    want, got = (measure_costs(model, [b], parts) for b in (plain, padded))
    assert want.keys() == got.keys()
    for k in want.keys() - {"lm_head.weight"}: # whose gradients are drawn where there is padding
        for at in ("C", "g"):
            a, b = getattr(want[k], at), getattr(got[k], at)
            torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-4*a.abs().max().item(), msg=lambda m: f"{k}.{at}: {m}")
    linears = [l for m in find_modules(model) for l in m.linears]
    want, got = (collect_moments(model, [b], linears) for b in (plain, padded))
    for k in want:
        torch.testing.assert_close(got[k].C, want[k].C, rtol=1e-3, atol=1e-5)
        assert got[k].n == want[k].n


class Towers(torch.nn.Module):
    "Twelve layers of odd widths, of which the second and its inputs are dead."
    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(7, 161)
        self.layers = torch.nn.ModuleList(torch.nn.Sequential(torch.nn.Linear(161, 33), torch.nn.ReLU(),
                                                              torch.nn.Linear(33, 161)) for _ in range(12))
        self.layers[1][0].bias.data.fill_(-100.) # no input of the next linear ever fires

    def forward(self, x):
        x = self.first(x)
        for f in self.layers: x = x + f(x)
        return x


def test_dead_inputs_and_odd_widths(tmp_path):
    torch.manual_seed(0)
    model, x = Towers().eval(), torch.randn(4, 32, 7)
    x[..., 3] = 0 # never fires
    n = sum(p.numel() for p in model.parameters())
    with pytest.warns(UserWarning) as said: both = [code_model(model, list(x), 5*n//8, 1) for _ in range(2)]
    keys = {p.name for p in find_parts(model)}
    for res in both: # the same each time, and nothing is left out
        assert res.model.fips_codes.keys() == keys
        assert all(p.isfinite().all() for p in res.model.parameters())
        assert any("depends on layers.1.0 (" in note for note in res.report["notes"])
        assert not any("layers.10" in note for note in res.report["notes"])
    for k in keys: assert torch.equal(both[0].model.fips_codes[k], both[1].model.fips_codes[k])
    folder = save(both[0].model, tmp_path/"small")
    assert (folder/"model.safetensors").stat().st_size <= 5*n//8
    assert (both[0].model(x) - model(x)).norm() < .2*model(x).norm()
    some = code_model(model, list(x), 15.5*n//8, 0, filter_fn=lambda name, m: name.startswith("layers.1."))
    assert some.model.fips_codes.keys() == {"layers.1.0.weight", "layers.1.2.weight"}
