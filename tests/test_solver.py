"""Ranks, starts, masks, refits and damping over odd sizes."""
import itertools

import pytest
import torch

from fips_nb.blockwise_opt import refit_u, refit_v
from fips_nb.sparse_factors import fan_in_mask, global_masks, nm_mask, rigl_mask, topk_mask
from fips_nb.share.statistics import Metric
from fips_nb.svd_init import BudgetTooSmall, copy_rows, rank_for_budget, regularize, svd_init

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("d, H", list(itertools.product([1, 3, 17, 192], [1, 7, 130, 4097])))
@pytest.mark.parametrize("p", [.037, .25, .5, 1.])
@pytest.mark.parametrize("s", [0., .31, .75, .99])
def test_rank_is_the_largest_that_fits(d, H, p, s):
    cost = lambda r: d*r + (1-s)*r*H
    if cost(1) > p*d*H*(1 + 1e-12):
        with pytest.raises(BudgetTooSmall, match="too small"): rank_for_budget(p, d, H, s)
        return
    r = rank_for_budget(p, d, H, s)
    assert cost(r) <= p*d*H*(1 + 1e-6) and cost(r+1) > p*d*H*(1 - 1e-6)


@pytest.mark.parametrize("d, H, s", [(8, 40, 0.), (16, 128, .75), (5, 11, .5)])
def test_smallest_budget_named_works(d, H, s):
    with pytest.raises(BudgetTooSmall) as e: rank_for_budget(1e-6, d, H, s)
    assert rank_for_budget(e.value.least*1.001, d, H, s) == 1
    said = float(str(e.value).rsplit(" ", 1)[1])
    assert said == pytest.approx(e.value.least, rel=1e-3)


SHAPES = [(1, 1), (1, 7), (7, 1), (5, 3), (8, 8), (13, 29), (64, 33)]


def scores(shape):
    r, h = shape
    return torch.rand(r, h, generator=torch.Generator().manual_seed(r*h))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("density", [0., .13, .5, .77, 1.])
def test_largest_entries_over_odd_shapes(shape, density):
    (r, h), x = shape, scores(shape)
    for score in (x, torch.ones(r, h)): # also where all are alike
        m = topk_mask(score, density)
        assert m.shape == shape and int(m.sum()) == round(density*r*h)
    m = topk_mask(x, density)
    if 0 < m.sum() < m.numel(): assert x[m].min() >= x[~m].max()
    a, b = global_masks([x, 2*x.T], density)
    assert int(a.sum() + b.sum()) == round(density*2*r*h) and b.shape == (h, r)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("n, m", [(1, 2), (2, 4), (1, 4), (4, 4), (3, 5)])
@pytest.mark.parametrize("dim", [0, 1])
def test_runs_of_a_pattern_over_odd_shapes(shape, n, m, dim):
    x = scores(shape)
    k = nm_mask(x, n, m, dim)
    assert k.shape == shape
    runs, values = (k if dim else k.T).split(m, 1), (x if dim else x.T).split(m, 1)
    for run, score in zip(runs, values):
        assert (run.sum(1) == min(n, run.shape[1])).all()
        least, most = torch.where(run, score, 2.).amin(1), torch.where(run, -1., score).amax(1)
        assert (least >= most).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_constant_fan_in_over_odd_shapes(shape):
    r, x = shape[0], scores(shape)
    for k in {1, (r+1)//2, r}:
        m = fan_in_mask(x, k)
        least, most = torch.where(m, x, 2.).amin(0), torch.where(m, -1., x).amax(0)
        assert (m.sum(0) == k).all() and (least >= most).all()
    for k in (0, r+1):
        with pytest.raises(ValueError, match="fan-in"): fan_in_mask(x, k)


@pytest.mark.parametrize("shape", [(7, 5), (13, 29), (64, 33)], ids=str)
@pytest.mark.parametrize("frac", [0., .1, .5, 1.])
@pytest.mark.parametrize("fan_in", [False, True])
def test_rigl_keeps_the_count(shape, frac, fan_in):
    V, grad = torch.randn(2, *shape, generator=torch.Generator().manual_seed(3))
    mask = fan_in_mask(V.abs(), 3) if fan_in else topk_mask(V.abs(), .3)
    new = rigl_mask(V, mask, grad, frac, "fan_in" if fan_in else None)
    if fan_in: assert torch.equal(new.sum(0), mask.sum(0))
    else: assert new.sum() == mask.sum()
    moved = int((new & ~mask).sum())
    if not fan_in: assert moved == min(round(frac*int(mask.sum())), int((~mask).sum()))
    if frac == 0: assert torch.equal(new, mask)


def problem(d, r, h, role, seed=0, rows=None):
    "A weight, its metric, a basis, a start and a mask, in float64."
    g = torch.Generator().manual_seed(seed)
    rand = lambda *s: torch.randn(*s, generator=g, dtype=torch.float64)
    W, U, V = rand(d, h), rand(d, r), rand(r, h)
    n = d if role == "up" else h
    X = rand(rows or 2*n, n)*torch.logspace(0, -2, n, dtype=torch.float64)
    C = X.T@X/len(X) + 1e-4*torch.eye(n, dtype=torch.float64)
    metric = Metric(C, None) if role == "up" else Metric(None, C)
    e = metric.cost(W)
    metric = Metric(*(None if c is None else c/e for c in (metric.L, metric.R)))
    return W, metric, U, V, torch.rand(r, h, generator=g) < .4


def descends(costs): return all(b <= a*(1 + 1e-9) + 1e-12 for a, b in zip(costs, costs[1:]))


@pytest.mark.parametrize("role", ["up", "down"])
@pytest.mark.parametrize("d, r, h", [(1, 1, 1), (5, 3, 7), (7, 7, 3), (9, 20, 31), (16, 40, 64)])
def test_refits_descend(d, r, h, role):
    W, metric, U, V, mask = problem(d, r, h, role)
    shared = [refit_v(W, metric, U, V, mask, n) for n in range(8)]
    plain_mask = topk_mask(W.abs(), .4)
    plain = [refit_v(W, metric, None, W, plain_mask, n) for n in range(8)]
    bases = [refit_u([W, 2*W], [metric, metric], U, [V*mask, V], n) for n in range(8)]
    assert all(not (v != 0)[~mask].any() for v in shared)
    assert all(not (v != 0)[~plain_mask].any() for v in plain)
    assert descends([metric.cost(W - U@v) for v in [V*mask, *shared]])
    assert descends([metric.cost(W - v) for v in [W*plain_mask, *plain]])
    both = lambda P: metric.cost(W - P@(V*mask)) + metric.cost(2*W - P@V)
    assert descends([both(P) for P in [U, *bases]])
    if mask.any() and d > 1: assert metric.cost(W - U@shared[-1]) < metric.cost(W - U@(V*mask))


@pytest.mark.parametrize("role", ["up", "down"])
def test_refits_reach_the_least_squares_solution(role):
    W, metric, U, V, mask = problem(6, 4, 9, role)
    V = refit_v(W, metric, U, V, mask, 200).requires_grad_()
    U = refit_u([W], [metric], U, [V.detach()], 200)
    E = W - U@refit_v(W, metric, U, V.detach(), mask, 200)
    assert (mask*(U.T@metric.apply(E))).abs().max() < 1e-8 # no gradient left on the mask
    V = refit_v(W, metric, U, V.detach(), mask, 200)
    U = refit_u([W], [metric], U, [V], 400)
    assert (metric.apply(W - U@V)@V.T).abs().max() < 1e-7


STARTS = [(8, (8,), 3), (8, (3, 2), 8), (8, (5, 9), 40), (12, (7,), 12), (6, (50, 20), 6)]


@pytest.mark.parametrize("d, hs, r", STARTS)
@pytest.mark.parametrize("extend", ["atoms", "copies"])
def test_start_reproduces_the_weights_from_rank_d_on(d, hs, r, extend):
    Ws = [torch.randn(d, h, generator=torch.Generator().manual_seed(h)) for h in hs]
    U, Vs = svd_init(Ws, r, extend=extend)
    assert U.shape == (d, r) and [V.shape for V in Vs] == [(r, h) for h in hs]
    E = torch.cat([W - U@V for W, V in zip(Ws, Vs)], 1)
    tail = torch.linalg.svdvals(torch.cat(Ws, 1))[r:].pow(2).sum()
    torch.testing.assert_close(E.pow(2).sum(), tail, rtol=1e-4, atol=1e-8)


def test_copies_below_the_present_rank():
    with pytest.raises(ValueError, match="rank 2 is below"):
        copy_rows(torch.randn(4, 3), [torch.randn(3, 5)], 2)


SPECTRA = [((1., 1., 1.), .01), ((1., 0., 0.), .01), ((1., 1., -.05), .1), ((1., 1., -.9), 10.),
           ((0., 0., 0.), .01)]


@pytest.mark.parametrize("eigenvalues, damp", SPECTRA)
def test_damping_is_as_large_as_needed(eigenvalues, damp):
    g = torch.Generator().manual_seed(0)
    Q = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64, generator=g)).Q
    diagonal = torch.diag(torch.tensor(eigenvalues, dtype=torch.float64))
    A, got = regularize(Q@diagonal@Q.T)
    assert got == pytest.approx(damp) and torch.linalg.eigvalsh(A)[0] > 0
