"""Every architecture that the page lists: what is found in it, exactness, and its folder."""
import pytest
import torch

from architectures import REFUSED, WORK, refusal
from fips_nb import compress, load, save
from fips_nb.budgets import GroupPlan
from fips_nb.grouping import find_modules, group_modules
from fips_nb.sparse_factors import factor_layers

pytestmark = [pytest.mark.usefixtures("one_thread"),
              pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")]
EXACT = dict(levels=1, distill_epochs=0, dtype=torch.float32)


@torch.no_grad()
def outputs(model, x):
    "What `model` predicts for `x`."
    out = model(x)
    return out if torch.is_tensor(out) else out.get("logits", out[0])


def factorised(case, model):
    "`model` with bases of full rank and nothing pruned."
    targets = "all" if case.attention else "mlp"
    modules = find_modules(model, targets)[:None if case.whole else 2]
    plans = [GroupPlan(g, g.d, (1.,)*len(g.linears)) for g in group_modules(modules, "all")]
    res = compress(model, case.batches(), plan=plans, targets=targets, **EXACT)
    assert len(factor_layers(res.model)) == sum(len(m.linears) for m in modules)
    return res


@pytest.mark.parametrize("case", WORK, ids=lambda c: c.name)
def test_full_rank_is_the_dense_model_and_comes_back_from_its_folder(case, tmp_path):
    model, x = case.make(), case.batches()[0]
    res = factorised(case, model)
    torch.testing.assert_close(outputs(res.model, x), outputs(model, x), rtol=1e-3, atol=1e-4)
    options = dict(arch=case.name, model_args=case.args) if case.library == "timm" else {}
    back = load(save(res, tmp_path/"small", rest="keep", dtype=torch.float32, **options))
    assert factor_layers(back).keys() == factor_layers(res.model).keys()
    assert torch.equal(outputs(back, x), outputs(res.model.eval(), x))


@pytest.mark.parametrize("case", [c for c in WORK if not c.attention], ids=lambda c: c.name)
def test_attention_that_does_not_work_is_refused(case):
    with pytest.raises(ValueError, match="no attention blocks|no input reached"):
        compress(case.make(), case.batches(), 1., "pruning", targets="attn", **EXACT)


@pytest.mark.parametrize("case", REFUSED, ids=lambda c: c.name)
def test_what_is_refused_is_refused_by_name(case):
    assert case.said in refusal(case)
    assert case.library == "timm" or not case.attention or find_modules(case.make(), "attn")
