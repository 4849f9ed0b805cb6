"""Every architecture that the page lists: what is found in it, exactness, rounding, its folder."""
import json
import math

import pytest
import torch

from architectures import LM, REFUSED, TORCH, WORK, causal, refusal
from fips_nb import load, save
from fips_nb.coded_models import code_model, find_parts, stored_bytes
from fips_nb.budgets import GroupPlan
from fips_nb.distillation import predict
from fips_nb.pipeline import compress
from fips_nb.grouping import find_modules, group_modules
from fips_nb.sparse_factors import factor_layers

pytestmark = [pytest.mark.usefixtures("one_thread"),
              pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")]
EXACT = dict(levels=1, distill_epochs=0, dtype=torch.float32)


@torch.no_grad()
def outputs(model, x):
    "What `model` predicts for `x`."
    return predict(model, x)


def factorised(case, model):
    "`model` with bases of full rank and nothing pruned."
    targets = "all" if case.attention else "mlp"
    modules = find_modules(model, targets)[:2 if case.parts else None]
    plans = [GroupPlan(g, g.d, (1.,)*len(g.linears)) for g in group_modules(modules, "all")]
    res = compress(model, case.batches(), plan=plans, targets=targets, **EXACT)
    assert len(factor_layers(res.model)) == sum(len(m.linears) for m in modules)
    return res


@pytest.mark.parametrize("case", WORK, ids=lambda c: c.title)
def test_full_rank_is_the_dense_model_and_comes_back_from_its_folder(case, tmp_path):
    model, x = case.make(), case.batches()[0]
    res = factorised(case, model)
    torch.testing.assert_close(outputs(res.model, x), outputs(model, x), rtol=1e-3, atol=1e-4)
    if case.library == "torch": return # no folder is made of these
    options = dict(arch=case.name, model_args=case.args) if case.library == "timm" else {}
    back = load(save(res, tmp_path/"small", rest="keep", dtype=torch.float32, **options))
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


def rounded(case, model, bits, n=2):
    "`model` with so many bits for each entry that is coded."
    parts = [p for p in find_parts(model) if p.name not in case.idle]
    sizes = {p.name: math.ceil(bits/8*math.prod(p.shape)) for p in parts}
    return code_model(model, case.batches(n), stored_bytes(model, sizes), 0)


@pytest.mark.parametrize("case", [*WORK, *REFUSED], ids=lambda c: c.title)
def test_rounding(case):
    model, x = case.small(), case.batches()[0]
    ref, gone = outputs(model, x), case.small()
    for p in find_parts(gone): # what an error of the size of the weights makes
        W = gone.get_parameter(p.name).data
        W.copy_(W.flatten().flip(0).view_as(W))
    much = (outputs(gone, x) - ref).norm()
    error = {}
    for bits in (6, 12):
        res = rounded(case, model, bits)
        assert res.model.fips_codes.keys() == {p.name for p in find_parts(model)} - set(case.idle)
        error[bits] = (outputs(res.model, x) - ref).norm()/much
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


FOLDERS = ("MixtralForCausalLM", "Qwen3MoeForCausalLM", "ViTForImageClassification",
           "DINOv3ViTModel", "T5ForConditionalGeneration")


@pytest.mark.parametrize("case", [c for c in (*WORK, *REFUSED) if c.title in FOLDERS],
                         ids=lambda c: c.title)
def test_folders_of_codes_whose_names_transformers_would_change(case, tmp_path):
    res, x = rounded(case, case.make(), 6), case.batches()[0]
    back = load(save(res, tmp_path/"exact", rest="keep"))
    assert back.fips_codes.keys() == res.model.fips_codes.keys()
    assert torch.equal(outputs(back, x), outputs(res.model, x))
    small = save(back, tmp_path/"small")
    assert (small/"model.safetensors").stat().st_size <= res.report["target_bytes"]
    assert load(small).fips_codes.keys() == back.fips_codes.keys()


@pytest.mark.parametrize("case", TORCH, ids=lambda c: c.title)
def test_fused_kernels_of_torch_read_the_factors(case):
    model, x = case.make(), case.batches()[0]
    with torch.no_grad():
        torch.testing.assert_close(factorised(case, model).model(x), model(x), rtol=1e-3, atol=1e-4)


def test_records_of_a_convolution_that_is_no_linear_are_refused(tmp_path):
    case = next(c for c in WORK if c.name == "convnext_atto")
    options = dict(arch=case.name, model_args=case.args)
    folder = save(factorised(case, case.make()), tmp_path/"small", **options)
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
