"""Plans: their size, what they refuse, and what they do to a model."""
import copy
import dataclasses
import json

import pytest
import torch
from small import first_blocks

from fips_nb.share.budgets import planned_bytes, planned_parameters
from fips_nb.data.demo import demo_images, demo_vit
from fips_nb.grouping import find_modules, group_modules
from fips_nb.share.pipeline import compress
from fips_nb.share.planner import (Plan, allocate, dense_size, error_curve, make_plan, uniform,
                                   with_densities)
from fips_nb.sparse_factors import factor_layers
from fips_nb.store.state import digest

pytestmark = pytest.mark.usefixtures('one_thread', 'timed_once')
SIZES = {'parameters': planned_parameters, 'bytes': planned_bytes}


@pytest.fixture(scope='module')
def model():
    return demo_vit()


@pytest.fixture(scope='module')
def batches():
    return list(demo_images('train')[0][:160].split(16))


def groups_of(model, size):
    return group_modules(find_modules(model), size)


def an_about(model):
    return dict(model=digest(model), targets='mlp', levels=3, count='parameters', budget=.5,
                size=1, dense_size=dense_size(model), divergence=.1, predicted=.1, trials={})


def densities(plan):
    return [q for x in plan for q in x.densities]


@pytest.mark.parametrize('count', SIZES)
@pytest.mark.parametrize('r', [0, .5, 3])
def test_the_size_is_never_exceeded_and_nearly_used(model, count, r):
    g, size = torch.Generator().manual_seed(0), SIZES[count]
    for B, share in ((1, .3), (4, .5), ('all', .7)):
        groups = groups_of(model, B)
        plan, most = uniform(groups, r, share, count), share * dense_size(model, count)
        if plan is None:
            assert (r, B) == (3, 1) or r * .5 >= share  # the bases alone are too large
            continue
        before = densities(plan)
        slopes = torch.rand(len(before), generator=g).add(.01).tolist()
        curves = [error_curve((q, .1), (.8 * q, .3)) for q in before]
        new = allocate(plan, slopes, curves, most, count)
        full = all(q == 1 for q in before)  # a narrow basis cannot use it all
        assert size(plan) <= most and size(new) <= most
        assert full or size(new) > .97 * most
        for x, y in zip(before, densities(new)):
            assert x / 1.5 - 1e-9 <= y <= min(1, 1.5 * x) + 1e-9


def test_densities_of_a_plan_are_those_of_the_model(model, batches):
    plan = uniform(groups_of(model, 4), 2, .5)
    plan = with_densities(plan, [q * (.6 + .1 * (i % 8)) for i, q in enumerate(densities(plan))])
    res = compress(model, batches[:2], plan=plan, levels=2, distill_epochs=0)
    fs = factor_layers(res.model)
    for x in plan:
        assert len({id(fs[l.name].U) for l in x.group.linears}) == 1
        for l, q in zip(x.group.linears, x.densities):
            V = fs[l.name].V
            assert V.shape[0] == x.rank and abs(int((V != 0).sum()) - q * V.numel()) <= 1
    budget = planned_parameters(plan) / dense_size(model)
    assert abs(res.report['budget'] - budget) < 1e-9
    assert abs(res.report['mlp_budget'] - budget) < 1e-3


@pytest.mark.parametrize('change, said', [
    (lambda p: p.update(format='x'), 'no plan of fips_nb'),
    (lambda p: p.update(version=2), 'format version 2'),
    (lambda p: p.pop('trials'), "required field `trials`"),
    (lambda p: p['groups'][0].pop('rank'), "required field `rank`"),
    (lambda p: p['groups'][0]['linears'][0].pop('density'), "required field `density`"),
])
def test_files_that_are_no_plans(model, tmp_path, change, said):
    path = tmp_path / 'p.json'
    Plan(uniform(groups_of(model, 4), 2, .5), an_about(model)).save(path)
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=said):
        Plan.read(path)


@pytest.mark.parametrize('content', [
    [], 3, None, 'text', dict(groups=3), dict(groups=[3]), dict(groups=[dict(linears=3)]),
])
def test_files_of_other_json(model, tmp_path, content):
    path = tmp_path / 'p.json'
    if isinstance(content, dict):
        content = dict(format='fips_nb plan', version=1, **an_about(model), **content)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match='no plan of fips_nb'):
        Plan.read(path)


def test_what_compress_refuses_of_a_plan(model, batches):
    plan = uniform(groups_of(model, 4), 2, .5)
    x, replace = plan[0], dataclasses.replace
    with pytest.raises(ValueError, match="needs fit='als'"):
        compress(model, batches, plan=plan, preset='svd')
    with pytest.raises(ValueError, match='rank 2.5'):
        compress(model, batches, plan=[replace(x, rank=2.5)])
    n = len(x.densities)
    for bad, said in ((x.densities[:-1], 'not one for each linear'),
                      ((0.,) * n, r'density 0\.0 .* above 0'),
                      ((1.1,) * n, r'density 1\.1 .* at most 1')):
        with pytest.raises(ValueError, match=said):
            compress(model, batches, plan=[replace(x, densities=bad)])
    other = copy.deepcopy(model)
    other.blocks[1].mlp.fc1 = torch.nn.Linear(40, 44)
    with pytest.raises(ValueError, match='blocks.1.mlp.fc1 is 40 -> 160 in it, and 40 -> 44 here'):
        compress(other, batches, plan=plan)


def test_another_plan_does_not_resume(model, batches, tmp_path):
    kw = dict(levels=2, distill_epochs=0, state=tmp_path)
    plan, other = (uniform(groups_of(model, 4), 2, share) for share in (.5, .6))
    compress(model, batches[:2], plan=plan, **kw)
    with pytest.raises(ValueError, match='cannot resume.*settings'):
        compress(model, batches[:2], plan=other, resume=True, **kw)


def test_a_plan_leaves_the_model_alone_and_uses_a_basis_where_it_helps(batches):
    model = first_blocks(12)
    before = digest(model)
    plan = make_plan(model, batches, .25, ranks=(2, 3), levels=(15,))
    assert digest(model) == before and not factor_layers(model)
    assert all(p.grad is None for p in model.parameters())
    assert set(plan.about['trials']) == {'pruning', 'groups of 12, rank 2 d',
                                         'groups of 12, rank 3 d'}
    assert max(x.rank for x in plan.groups) > 0
    names = [l.name for x in plan.groups for l in x.group.linears]
    assert sorted(names) == sorted(l.name for m in find_modules(model) for l in m.linears)
    assert plan.about['divergence'] <= min(plan.about['trials'].values())


def test_a_narrow_limit_leaves_out_what_is_dear(batches):
    model = first_blocks(6)
    plan = make_plan(model, batches, .5, operations=3.6e9)
    assert set(plan.about['trials']) <= {'pruning'} and {x.rank for x in plan.groups} == {0}
    assert plan.about['levels'] < 60
    plan = make_plan(model, batches, .5, memory=1e-3)
    assert set(plan.about['trials']) == {'pruning'}  # a shared basis would not fit


def test_sixteen_bits(batches):
    model = first_blocks(6).bfloat16()
    plan = make_plan(model, batches[:4], .3, ranks=(2,), levels=(5,))
    assert plan.about['divergence'] < 1
    res = compress(model, batches, plan=plan.groups, levels=2, distill_epochs=0)
    assert next(res.model.parameters()).dtype == torch.bfloat16
