"""What must hold while masks move, over odd shapes, densities, patterns and seeds; and what sparsify refuses."""
import copy
import itertools
import math

import pytest
import torch
from torch import nn

from fips_nb.speed.packing import PackedLinear
from fips_nb.sparse_factors import (MOVING, Schedule, erk_densities, fan_in_mask,
                                    nm_mask, rigl_mask, srigl_mask)
from fips_nb.research.sparse_training import condense, sparsify

pytestmark = pytest.mark.usefixtures("one_thread")
SHAPES = [(4, 6), (7, 5), (13, 29), (64, 33), (33, 64)]


def drawn(shape, seed, n=2): return torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("gamma", [0., .3, .6, .95, 1.])
@pytest.mark.parametrize("seed", range(4))
def test_srigl_keeps_one_fan_in_and_the_budget(shape, gamma, seed):
    "Updates in a row, with weights and gradients of very different size: the count, the fan-in, and who is dead."
    r, h = shape
    k = 1 + seed*(r - 1)//4
    mask = fan_in_mask(drawn(shape, seed)[0].abs(), k)
    for t in range(6):
        V, grad = drawn(shape, 10*seed + t).pow(5)
        V = V*mask
        new = srigl_mask(V, mask, grad, .3, k, gamma)
        alive, before = new.any(0), mask.any(0)
        n = int(alive.sum())
        assert not (alive & ~before).any() # who is ablated stays so
        assert (new.sum(0)[alive] == k*h//n).all()
        assert n >= math.ceil(k*h/r) # those who are left can hold the budget
        if gamma == 0: assert n == h
        mask = new


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_srigl_ablates_exactly_who_lacks_salient_entries(shape):
    r, h = shape
    k = max(1, r//3)
    for seed, gamma in itertools.product(range(5), (.3, .6, .95)):
        V, grad = drawn(shape, seed).pow(3)
        mask = fan_in_mask(V.abs(), k)
        V = V*mask
        move = min(round(.3*k*h), r*h - k*h)
        keep = V.abs() >= V.abs().flatten().sort(descending=True).values[k*h - move - 1]
        g = grad.abs().masked_fill(mask, -1)
        grow = g >= g.flatten().sort(descending=True).values[move - 1]
        salient = (keep & mask).sum(0) + (grow & ~mask).sum(0)
        want = salient >= gamma*k
        if want.sum() < math.ceil(k*h/r): continue # the budget forbids it
        assert torch.equal(srigl_mask(V, mask, grad, .3, k, gamma).any(0), want)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("n, m", [(1, 2), (2, 4), (1, 4), (3, 5)])
@pytest.mark.parametrize("frac", [0., .1, .3, 1.])
def test_rigl_keeps_the_count_of_every_run(shape, n, m, frac):
    V, grad = drawn(shape, 3)
    mask = nm_mask(V.abs(), n, m)
    new = rigl_mask(V, mask, grad, frac, (n, m))
    for a, b in zip(mask.split(m), new.split(m)): assert torch.equal(a.sum(0), b.sum(0))
    if frac == 0: assert torch.equal(new, mask)
    live = int(mask.sum())
    smallest = (V.abs()*mask).masked_fill(~mask, math.inf).flatten().topk(round(frac*live), largest=False).indices
    gone = set((mask & ~new).flatten().nonzero()[:, 0].tolist())
    assert gone <= set(smallest.tolist()) # nothing goes but the smallest, wherever they are


@pytest.mark.parametrize("density", [.01, .05, .2, .5, .9, .99])
def test_erk_has_the_density_of_all_and_no_layer_above_one(density):
    for seed in range(5):
        shapes = torch.randint(2, 300, (6, 2), generator=torch.Generator().manual_seed(seed)).tolist()
        each, sizes = erk_densities(shapes, density), [r*h for r, h in shapes]
        assert sum(q*n for q, n in zip(each, sizes)) == pytest.approx(density*sum(sizes), rel=1e-9)
        assert 0 < min(each) and max(each) <= 1
        free = [q*r*h/(r + h) for q, (r, h) in zip(each, shapes) if q < 1]
        assert max(free) == pytest.approx(min(free)) # in proportion to (r + h)/(r h)


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(24, 40), nn.ReLU(), nn.Linear(40, 32), nn.ReLU(), nn.Linear(32, 5))


def course(model, pruner, opt, steps, check=lambda t: None):
    "Steps of training on data that depend on the step only."
    for t in steps:
        x = torch.randn(16, 24, generator=torch.Generator().manual_seed(t))
        pruner.before(t)
        opt.zero_grad()
        nn.functional.cross_entropy(model(x), x[:, :5].argmax(1)).backward()
        pruner.step(t, opt)
        check(t)
        opt.step()


PLANS = {"set": dict(method="set"), "rigl": dict(method="rigl"), "rigl, 2:4": dict(method="rigl", pattern=(2, 4)),
         "set, fan-in": dict(method="set", pattern="fan_in"), "srigl": dict(method="srigl"),
         "srigl, ablation": dict(method="srigl", gamma=.9)}
OPTIMISERS = dict(adam=lambda ps: torch.optim.AdamW(ps, lr=.01), sgd=lambda ps: torch.optim.SGD(ps, lr=.1, momentum=.9))


def plan(how, steps=60): return Schedule(0. if "pattern" in how and how["pattern"] == (2, 4) else .75, steps, every=5, fraction=.4, **how)


def moments(opt, p): return [v for v in opt.state.get(p, {}).values() if torch.is_tensor(v) and v.shape == p.shape]


@pytest.mark.parametrize("how", PLANS, ids=str)
@pytest.mark.parametrize("kind", OPTIMISERS)
def test_invariants_of_a_run(how, kind):
    "The density stays; what is dead is zero with zero moments; what grows starts at zero with zero moments."
    model = net()
    pruner = sparsify(model, plan(PLANS[how]), fresh=True)
    opt, first = OPTIMISERS[kind](model.parameters()), [m.clone() for m in pruner.masks]
    last = [m.clone() for m in first]
    moved = 0

    def check(t):
        nonlocal moved
        for i, (p, m) in enumerate(zip(pruner.params, pruner.masks)):
            grown = m & ~last[i]
            assert all((v[~m | grown] == 0).all() for v in [p.detach(), *moments(opt, p)])
            assert (p.grad[~m] == 0).all()
            if how.startswith("srigl"):
                fan_in = m.sum(1)[m.any(1)]
                assert (fan_in == int(first[i].sum())//len(fan_in)).all()
                assert not (m.any(1) & ~last[i].any(1)).any()
            else: assert m.sum() == first[i].sum()
            if "fan-in" in how: assert torch.equal(m.sum(1), first[i].sum(1))
            moved += int(grown.sum())
            last[i] = m.clone()

    course(model, pruner, opt, range(60), check)
    assert moved > 0
    if "ablation" in how: assert any((~m.any(1)).any() for m in pruner.masks)
    assert model[4].weight.ne(0).all() # the last layer was left alone


@pytest.mark.parametrize("how", PLANS, ids=str)
def test_a_stopped_run_goes_on_as_if_nothing_had_been(how):
    def fresh(seed):
        model = net(seed)
        pruner = sparsify(model, plan(PLANS[how]))
        return model, pruner, torch.optim.AdamW(model.parameters(), lr=.01)

    whole = fresh(0)
    course(*whole, range(60))
    part, other = fresh(0), fresh(7)
    course(*part, range(23))
    for a, b in zip(part, other): b.load_state_dict(copy.deepcopy(a.state_dict()))
    course(*other, range(23, 60))
    for a, b in zip(whole[1].masks, other[1].masks): assert torch.equal(a, b)
    for a, b in zip(whole[0].parameters(), other[0].parameters()): assert torch.equal(a, b)


def test_random_growth_is_its_own():
    "Two processes draw the same masks, whatever else they draw; another seed draws others."
    def masks(noise, seed=0):
        model = net()
        pruner = sparsify(model, plan(PLANS["set"]), seed=seed)
        course(model, pruner, torch.optim.SGD(model.parameters(), lr=.1), range(30), lambda t: torch.rand(noise))
        return pruner.masks

    state = torch.get_rng_state()
    assert all(map(torch.equal, masks(1), masks(5)))
    torch.set_rng_state(state)
    assert not all(map(torch.equal, masks(1), masks(1, seed=1)))


@pytest.mark.parametrize("method", MOVING)
def test_named_last_layer_keeps_its_neurons(method):
    model = net()
    how = dict(method=method, gamma=1.) if method == "srigl" else dict(method=method)
    pruner = sparsify(model, plan(how), ["2", "4"])
    course(model, pruner, torch.optim.AdamW(model.parameters(), lr=.01), range(60))
    if method == "srigl":
        assert pruner.masks[1].any(1).all() and not pruner.masks[0].any(1).all()
        assert pruner.masks[1].sum(1).unique().numel() == 1


@pytest.mark.parametrize("densities, match", [([.5], "1 densities for 2"), ([.5, 0.], "density 0 leaves nothing"), ("ER", "'ER'"),
                                              ([.5, 1.5], "density 1.5"), ([.5, .01], "leaves nothing of 40 entries")])
def test_densities_that_cannot_be(densities, match):
    model = net()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=match) as e: sparsify(model, Schedule(.75, method="srigl"), densities=densities)
    assert "\n" not in str(e.value)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()) # nothing was touched


@pytest.mark.parametrize("how", ["rigl", "set, fan-in", "srigl, ablation"])
def test_condensed_layers_give_the_same_outputs(how):
    model = net()
    pruner = sparsify(model, plan(PLANS[how]))
    course(model, pruner, torch.optim.AdamW(model.parameters(), lr=.01), range(40))
    x = drawn((9, 24), 0)[0]
    want = model(x).detach()
    with pytest.raises(ValueError, match="2 of the pruner's 2"): condense(net(), pruner)
    assert condense(model, pruner) is model
    packed = [m for m in model.modules() if isinstance(m, PackedLinear)]
    assert len(packed) == 2 and isinstance(model[4], nn.Linear)
    torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-5)
    for p, w in zip(packed, pruner.params): assert torch.equal(p.A.dense(), w)


def test_global_scope_and_keep_take_no_densities():
    for how in (dict(method="rigl", sparsity=.75, scope="global"), dict(method="keep")):
        pruner = sparsify(net(), Schedule(**how))
        with pytest.raises(ValueError, match="densit"): sparsify(net(), Schedule(**how), densities=[.5, .5])
        live = sum(int(m.sum()) for m in pruner.masks)
        assert live == (560 if how["method"] == "rigl" else 24*40 + 40*32)
