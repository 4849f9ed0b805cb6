"""Plans: their size, what they refuse, and what they do to a model."""
import copy
import json

import pytest
import torch

from fips_nb.blockwise_opt import compress, planned_bytes, planned_parameters
from fips_nb.demo import demo_images, demo_vit
from fips_nb.grouping import find_parts, group_mlps
from fips_nb.planner import Plan, _curve, allocate, dense_size, digest, make_plan, uniform
from fips_nb.sparse_factors import factor_layers

pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.fixture(scope='module')
def model():
    return demo_vit()


@pytest.fixture(scope='module')
def batches():
    return list(demo_images('train')[0][:160].split(16))


def an_about(model):
    return dict(model=digest(model), targets='mlp', levels=3, count='parameters', budget=.5, size=1, dense_size=dense_size(model), divergence=.1, predicted=.1, trials={})


@pytest.mark.parametrize('count, size', [('parameters', planned_parameters), ('bytes', planned_bytes)])
@pytest.mark.parametrize('r', [0, .5, 3])
def test_the_size_is_never_exceeded_and_nearly_used(model, count, size, r):
    g = torch.Generator().manual_seed(0)
    for B, share in ((1, .3), (4, .5), ('all', .7)):
        groups = group_mlps(find_parts(model), B)
        plan, most = uniform(groups, r, share, count), share * dense_size(model, count)
        if plan is None:
            assert (r, B) == (3, 1) or r * .5 >= share  # the bases alone are too large
            continue
        n = sum(len(x.linears) for x in groups)
        slopes = torch.rand(n, generator=g).add(.01).tolist()
        curves = [_curve((q, .1), (.8 * q, .3)) for *_, dn in plan for q in dn]
        new = allocate(plan, slopes, curves, most, count)
        full = all(q == 1 for *_, dn in plan for q in dn)  # a narrow basis cannot use it all
        assert size(plan) <= most and size(new) <= most and (full or size(new) > .97 * most)
        for (_, _, a), (_, _, b) in zip(plan, new):
            assert all(x / 1.5 - 1e-9 <= y <= min(1, 1.5 * x) + 1e-9 for x, y in zip(a, b))


def test_densities_of_a_plan_are_those_of_the_model(model, batches):
    plan = uniform(group_mlps(find_parts(model), 4), 2, .5)
    plan = [(g, r, [q * (.6 + .1 * i) for i, q in enumerate(dn)]) for g, r, dn in plan]
    res = compress(model, batches[:2], plan=plan, levels=2, match_epochs=0)
    fs = factor_layers(res.model)
    for g, r, dn in plan:
        assert len({id(fs[x.name].U) for x in g.linears}) == 1
        for x, q in zip(g.linears, dn):
            V = fs[x.name].V
            assert V.shape[0] == r and abs(int((V != 0).sum()) - q * V.numel()) <= 1
    assert abs(res.report['budget'] - planned_parameters(plan) / dense_size(model)) < 1e-9 and abs(res.report['mlp_budget'] - res.report['budget']) < 1e-3


@pytest.mark.parametrize('change, said', [
    (lambda p: p.update(format='x'), 'no plan of fips_nb'), (lambda p: p.update(version=2), 'format version 2'), (lambda p: p.pop('trials'), "lacks 'trials'"),
    (lambda p: p['groups'][0].pop('rank'), "lacks 'rank'"), (lambda p: p['groups'][0]['linears'][0].pop('density'), "lacks 'density'"),
])
def test_files_that_are_no_plans(model, tmp_path, change, said):
    Plan(uniform(group_mlps(find_parts(model), 4), 2, .5), an_about(model)).save(tmp_path / 'p.json')
    raw = json.loads((tmp_path / 'p.json').read_text())
    change(raw)
    (tmp_path / 'p.json').write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=said):
        Plan.read(tmp_path / 'p.json')


def test_what_compress_refuses_of_a_plan(model, batches):
    plan = uniform(group_mlps(find_parts(model), 4), 2, .5)
    g, r, dn = plan[0]
    with pytest.raises(ValueError, match="needs fit='cg'"):
        compress(model, batches, plan=plan, preset='svd')
    with pytest.raises(ValueError, match='rank 2.5'):
        compress(model, batches, plan=[(g, 2.5, dn)])
    for bad in (dn[:-1], [0.] * len(dn), [1.1] * len(dn)):
        with pytest.raises(ValueError, match='not one for each linear'):
            compress(model, batches, plan=[(g, r, bad)])
    other = copy.deepcopy(model)
    other.blocks[1].mlp.fc1 = torch.nn.Linear(40, 44)
    with pytest.raises(ValueError, match='blocks.1.mlp.fc1 is 40 -> 160 in it, and 40 -> 44 here'):
        compress(other, batches, plan=plan)


def test_another_plan_does_not_resume(model, batches, tmp_path):
    kw = dict(levels=2, match_epochs=0, state=tmp_path)
    compress(model, batches[:2], plan=uniform(group_mlps(find_parts(model), 4), 2, .5), **kw)
    with pytest.raises(ValueError, match='cannot resume.*settings'):
        compress(model, batches[:2], plan=uniform(group_mlps(find_parts(model), 4), 2, .6), resume=True, **kw)


def test_a_plan_leaves_the_model_alone_and_uses_a_basis_where_it_helps(model, batches):
    before = digest(model)
    plan = make_plan(model, batches, .25, ranks=(2, 3))
    assert digest(model) == before and not factor_layers(model) and all(p.grad is None for p in model.parameters())
    assert set(plan.about['trials']) == {'identity', 'groups of 12, rank 2 d', 'groups of 12, rank 3 d'} and max(r for _, r, _ in plan.groups) > 0
    names = [x.name for g, _, _ in plan.groups for x in g.linears]
    assert sorted(names) == sorted(x.name for part in find_parts(model) for x in part.linears)
    assert plan.about['divergence'] <= min(plan.about['trials'].values())


def test_a_narrow_limit_leaves_out_what_is_dear(model, batches):
    plan = make_plan(model, batches, .5, most=1.2e10)
    assert set(plan.about['trials']) <= {'identity'} and {r for _, r, _ in plan.groups} == {0} and plan.about['levels'] < 60
    plan = make_plan(model, batches, .5, room=1e-3)
    assert set(plan.about['trials']) == {'identity'}  # a shared basis would not fit


def test_sixteen_bits(batches):
    model = demo_vit().bfloat16()
    plan = make_plan(model, batches, .3)
    assert plan.about['divergence'] < 1 and next(compress(model, batches, plan=plan.groups, levels=2, match_epochs=0).model.parameters()).dtype == torch.bfloat16
