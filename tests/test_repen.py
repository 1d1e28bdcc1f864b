"""REPEN: random subsets, pseudo-outliers, roles of a triplet, and the matrix behind them."""
import math
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from hypothesis.extra.numpy import arrays
from sklearn.neighbors import NearestNeighbors

from ad_course.check import check_detector
from ad_course.detector import load
from ad_course.repen import (REPEN, LeSiNN, Triplets, draw_subsets, lesinn, pseudo_outliers,
                             query_hinge, rank_weights, scatter_gap)
from tests.mutants import assert_caught, each_mutant, mutant
from tests.players import check_refused

SMALL = dict(epochs=3, device='cpu', verbose=False)


def draws(*shape, seed=0): return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rows(n=80, d=6, moved=6, seed=0):
    """Rows as images (n, 1, 1, d) of which the first few are moved, and their labels."""
    y = (np.arange(n) < moved).astype(int)
    z = draws(n, d, seed=seed).numpy()
    z[:, :2] += 5 * y[:, None]
    return (.5 + z / 20).clip(0, 1).astype('float32')[:, None, None], y


# ---------------------------------------------------------------- LeSiNN
def check_lesinn(f):
    """Against scikit-learn's search in each subset; nobody is a neighbor of its own."""
    x, new = draws(20, 3), draws(5, 3, seed=1)
    own = draw_subsets(20, 7, 4, torch.Generator().manual_seed(0))
    search = lambda s, z: NearestNeighbors(n_neighbors=1).fit(x[s]).kneighbors(z)[0][:, 0]
    wanted = np.mean([search(s, new) for s in own], 0)
    assert np.allclose(f(new, x[own]), wanted, rtol=1e-4), 'new rows'
    others = [[s[s != i] for s in own] for i in range(20)]
    wanted = [np.mean([search(s, x[i:i + 1]) for s in others[i]]) for i in range(20)]
    assert np.allclose(f(x, x[own], own), wanted, rtol=1e-4), 'its own neighbor'


def only_one_subset(x, bank, own=None): return lesinn(x, bank[:1], None if own is None else own[:1])
def farthest(x, bank, own=None): return -lesinn(-x, bank, own)
def joined(x, bank, own=None):
    return lesinn(x, bank.flatten(0, 1)[None], None if own is None else own.flatten()[None])
def finds_itself(x, bank, own=None): return lesinn(x, bank)
def squares(x, bank, own=None): return lesinn(x, bank, own).square()


def test_lesinn(): check_lesinn(lesinn)


@each_mutant({'new rows': (only_one_subset, farthest, joined, squares),
              'its own neighbor': (finds_itself,)})
def test_wrong_distances_are_caught(why, broken): assert_caught(check_lesinn, broken, why)


@settings(max_examples=25, deadline=None)
@given(st.integers(3, 9), st.data())
def test_all_subsets_are_a_weighted_knn(n, data):
    size = data.draw(st.integers(1, n - 1))
    x, new = draws(n, 2, seed=n), draws(3, 2, seed=1)
    every = torch.tensor(list(combinations(range(n), size)))
    wanted = torch.cdist(new, x).sort(1).values.double() @ rank_weights(n, size)
    assert np.allclose(lesinn(new, x[every]), wanted, rtol=1e-3)


@pytest.mark.parametrize('n, size', [(5, 1), (5, 5), (40, 7), (2000, 8)])
def test_weights_of_ranks(n, size):
    w = rank_weights(n, size)
    by_hand = [math.comb(n - k, size - 1) / math.comb(n, size) for k in range(1, n + 1)]
    assert np.allclose(w, by_hand, rtol=1e-6)
    assert np.isclose(w @ np.arange(1, n + 1), (n + 1) / (size + 1))


def test_subsets_hold_nobody_twice_and_come_from_the_generator():
    a, b = (draw_subsets(12, 40, 5, torch.Generator().manual_seed(3)) for _ in range(2))
    assert a.shape == (40, 5) and torch.equal(a, b) and set(a.flatten().tolist()) == set(range(12))
    assert all(len(set(s)) == 5 for s in a.tolist())
    with pytest.raises(ValueError, match='subset_size must be below .*; got 12 for 12'):
        draw_subsets(12, 2, 12, torch.Generator())


# ---------------------------------------------------------------- pseudo-outliers
@settings(max_examples=60, deadline=None)
@given(arrays('float64', st.integers(2, 40), elements=st.floats(-1e3, 1e3)),
       st.floats(.1, 5))
def test_cantelli(values, alpha):
    r = torch.tensor(values)
    out = pseudo_outliers(r, alpha, share=1e-9)
    above = r > r.mean() + alpha * r.std(correction=0)
    assert 1 <= out.sum() < len(r) or len(r) == 1
    if above.any() and not above.all():
        assert torch.equal(out, above)
        assert out.double().mean() <= 1 / (1 + alpha**2) + 1e-9 or r.std() < 1e-9 * r.abs().max()
    if out.any() and (~out).any(): assert r[out].min() >= r[~out].max()


def check_cut(f):
    r = torch.tensor([1., 1, 1, 1, 1, 1, 1, 9])                  # mean 2, deviation 2.65
    assert f(r).nonzero().flatten().tolist() == [7], 'the cut'
    assert f(r, 2.7).sum() == 1 and f(torch.tensor([0., 1, 0, 1, 1]), share=.4).sum() == 2, 'a rest'
    many = torch.arange(100.).remainder(10) * (1 + torch.arange(100.) / 100)
    assert torch.equal(f(many, 1.), many > many.mean() + many.std(correction=0)), 'the cut'


def far_below(r, alpha=3**.5, share=.05): return pseudo_outliers(-r, alpha, share)
def none_left(r, alpha=3**.5, share=.05): return r > r.mean() + alpha * r.std(correction=0)
def variance(r, alpha=3**.5, share=.05): return r > r.mean() + alpha * r.var(correction=0)


def test_the_cut(): check_cut(pseudo_outliers)


@each_mutant({'the cut': (far_below, variance), 'a rest': (none_left,)})
def test_wrong_cuts_are_caught(why, broken): assert_caught(check_cut, broken, why)


# ---------------------------------------------------------------- triplets
def check_hinge(f):
    q, near, far = [0., 0.], [1., 0.], [0., 3.]
    value = lambda *codes, m=1.: float(f(torch.tensor([codes]), m)[0])
    assert value(q, near, far, m=10.) == 2, 'value'
    assert value(q, near, far, m=7.) == 0 and value(q, far, near) == 9, 'roles'
    assert value(q, [0., 2.], near, far, m=10.) == 10, 'nearest query'
    codes = torch.tensor([[q, near, far]], dtype=torch.float64, requires_grad=True)
    slope, = torch.autograd.grad(f(codes, 10.).sum(), codes)
    assert slope.tolist() == [[[-2, 6], [2, 0], [0, -6]]], 'slopes'
    assert torch.autograd.gradcheck(lambda c: f(c, 50.), draws(3, 5, 2).double().requires_grad_())


def exchanged(codes, m): return query_hinge(codes[:, [*range(codes.shape[1] - 2), -1, -2]], m)
def no_margin(codes, m): return query_hinge(codes, 0.)
def first_query(codes, m): return query_hinge(codes[:, [0, -2, -1]], m)
def no_hinge(codes, m):
    near, far = ((codes[:, i, None] - codes[:, :-2]).square().sum(2).amin(1) for i in (-2, -1))
    return m + near - far
def fixed_queries(codes, m): return query_hinge(torch.cat([codes[:, :-2].detach(),
                                                           codes[:, -2:]], 1), m)


def test_the_hinge(): check_hinge(query_hinge)


@each_mutant({'value': (exchanged, no_margin), 'roles': (no_hinge,),
              'nearest query': (first_query,), 'slopes': (fixed_queries,)})
def test_wrong_hinges_are_caught(why, broken): assert_caught(check_hinge, broken, why)


def check_triplets(cls):
    """Queries and the normal row differ; outliers come by weight, labelled ones by share."""
    source = cls(torch.arange(6.)[:, None], torch.tensor([[10.], [20.]]), torch.tensor([1., 3.]),
                 torch.tensor([[99.]]), n_queries=2, share=.25)
    g = torch.Generator().manual_seed(0)
    found = torch.cat([xb for _ in range(400) for xb, _ in source.batches(4, g)])[..., 0]
    assert len(source) == 6 and found.shape == (2400, 4)
    assert (found[:, :3].sort(1).values.diff(dim=1) > 0).all(), 'different rows'
    assert found[:, :3].max() < 6 and found[:, 3].min() >= 10, 'roles'
    share = [(found[:, 3] == v).float().mean().item() for v in (99, 10, 20)]
    assert np.allclose(share, (1 / 4, 3 / 16, 9 / 16), atol=.04), 'shares'
    plain = cls(torch.arange(6.)[:, None], torch.tensor([[10.]]), torch.ones(1), torch.zeros(0, 1))
    assert all((xb[:, -1] == 10).all() and len(xb) == len(yb) for xb, yb in plain.batches(4, g))


class Even(Triplets):
    """All outliers equally often."""
    def __init__(self, *args, **kw): super().__init__(*args, **kw); self.weights[:] = 1

class LabelsOnly(Triplets):
    """Where there are labels, nothing else is drawn."""
    def __init__(self, *args, **kw): super().__init__(*args, **kw | dict(share=1.))

class Turned(Triplets):
    """The outlier first."""
    def batches(self, size, rng=None):
        for xb, yb in super().batches(size, rng): yield xb.flip(1), yb

class Again(Triplets):
    """A query is also the normal row."""
    def batches(self, size, rng=None):
        for xb, yb in super().batches(size, rng):
            xb[:, -2] = xb[:, 0]
            yield xb, yb


def test_triplets(): check_triplets(Triplets)


@each_mutant({'shares': (Even, LabelsOnly), 'roles': (Turned,), 'different rows': (Again,)})
def test_wrong_triplets_are_caught(why, broken): assert_caught(check_triplets, broken, why)


def check_gap(f):
    """All triplets of a linear layer with a hinge that is never silent: value and slope."""
    inliers, outliers = draws(5, 3).double(), draws(3, 3, seed=1).double() + 1
    w, W = torch.tensor([1., 2, 5]).double(), draws(2, 3, seed=2).double().requires_grad_()
    total = 0.
    for i in range(5):
        for j in set(range(5)) - {i}:
            for p, o in zip(w / w.sum(), outliers):
                codes = torch.stack([inliers[i], inliers[j], o]) @ W.T
                total = total + p / 20 * query_hinge(codes[None], 100.)[0]
    M = f(inliers, outliers, w)
    assert torch.allclose(total, 100 - torch.trace(W @ M @ W.T), rtol=1e-8), 'value'
    assert torch.allclose(torch.autograd.grad(total, W)[0], -2 * W @ M), 'slope'


def unweighted(a, b, w): return scatter_gap(a, b, torch.ones_like(w))
def no_means(a, b, w): return scatter_gap(a - a.mean(0), b - (w / w.sum()) @ b, w)
def one_half(a, b, w): return scatter_gap(a, b, w) + 2 / (len(a) - 1) * torch.cov(a.T, correction=0)
def reversed_gap(a, b, w): return -scatter_gap(a, b, w)


def test_the_gap(): check_gap(scatter_gap)


@each_mutant({'value': (unweighted, no_means, one_half, reversed_gap)})
def test_wrong_gaps_are_caught(why, broken): assert_caught(check_gap, broken, why)


# ---------------------------------------------------------------- the detector
def check_company(cls):
    """Scores rest on training rows drawn once: no company, no second call changes them."""
    x, _ = rows()
    d, new = cls(**SMALL).fit(x), rows(seed=5)[0]
    scores = d.decision_function(new)
    assert np.array_equal(scores, d.decision_function(new)), 'twice'
    alone = np.concatenate([d.decision_function(x[None]) for x in new])
    assert np.allclose(alone, scores, rtol=1e-4), 'company'
    codes = torch.as_tensor(d.for_each(d.codes, new))
    assert np.allclose(lesinn(codes, d.bank_), scores, rtol=1e-4), 'the score'
    codes = torch.as_tensor(d.for_each(d.codes, x))
    assert torch.equal(codes[d.own_], d.bank_), 'training rows'
    assert np.isclose(d.threshold_, np.quantile(lesinn(codes, d.bank_, d.own_), .95)), 'threshold'


class OfTheBatch(REPEN):
    """As in a library: subsets of the rows that are scored."""
    def image_score(self, xb):
        codes = self.codes(xb)
        own = torch.stack([torch.arange(len(xb))[:8]] * 3)
        return lesinn(codes, codes[own])

class DrawnAnew(REPEN):
    """Other subsets at each call."""
    def image_score(self, xb):
        keep = torch.randint(len(self.bank_), (2,))
        return lesinn(self.codes(xb), self.bank_[keep])

class InInputSpace(REPEN):
    """The layer is learned and not used."""
    def image_score(self, xb): return lesinn(xb.flatten(1)[:, :20], xb.flatten(1)[None, :1] * 0)

class OwnNeighbor(REPEN):
    """Training rows find themselves in the subsets."""
    def training_scores(self, data):
        codes, y = self.all_codes(data)
        return lesinn(codes, self.bank_).numpy(), y


@pytest.mark.parametrize('cls', [LeSiNN, REPEN])
def test_a_score_has_no_company(cls): check_company(cls)


@each_mutant({'company': (OfTheBatch,), 'twice': (DrawnAnew,), 'the score': (InInputSpace,),
              'threshold': (OwnNeighbor,)})
def test_wrong_scores_are_caught(why, broken): assert_caught(check_company, broken, why)


def check_pseudo(cls):
    """Training rows are scored without themselves, and the outliers' scores are their weights."""
    x, _ = rows(60)
    d, z = cls(**SMALL | dict(epochs=0)).fit(x), draws(60, 5)
    source = d.triplets(z, torch.zeros(60, dtype=int))
    own = draw_subsets(60, d.subsets, d.subset_size, d.rng())
    wanted = lesinn(z, z[own], own)
    assert torch.equal(d.pseudo_, pseudo_outliers(wanted, d.alpha, d.contamination)), 'who'
    assert torch.allclose(source.weights, wanted[d.pseudo_]), 'weights'


class FindsItself(REPEN):
    """A row in a subset is its own neighbor there."""
    def triplets(self, rows, y):
        source = super().triplets(rows, y)
        own = draw_subsets(len(rows), self.subsets, self.subset_size, self.rng())
        r = lesinn(rows, rows[own])
        self.pseudo_ = out = pseudo_outliers(r, self.alpha, self.contamination)
        source.weights = r[out]
        return source

class AllAlike(REPEN):
    """No outlier counts more than another."""
    def triplets(self, rows, y):
        source = super().triplets(rows, y)
        source.weights = torch.ones_like(source.weights)
        return source


def test_pseudo_outliers_are_scored_without_themselves(): check_pseudo(REPEN)


@each_mutant({'weights': (FindsItself, AllAlike)})
def test_wrong_pseudo_outliers_are_caught(why, broken): assert_caught(check_pseudo, broken, why)


def check_learning(cls):
    """Moved rows are the pseudo-outliers; the loss falls, they go far, and the scale is nothing."""
    x, y = rows(200, moved=12)
    d = cls(**SMALL | dict(epochs=30, batch_size=32)).fit(x)
    out = d.pseudo_.numpy()
    assert out.mean() <= 1 / 4 and y[out].mean() > .8, 'who is an outlier'
    assert d.history_['hinge'][-1] < d.history_['hinge'][0], 'the loss'
    raw = cls(**SMALL | dict(epochs=0)).fit(x)
    apart = lambda d: np.median(d.decision_function(x[y == 1])) / \
        np.median(d.decision_function(x[y == 0]))
    assert apart(d) > 1.2 * apart(raw), 'not apart'
    small = cls(**SMALL | dict(epochs=1, margin=20.)).fit(.5 + (x - .5) / 4)
    one = cls(**SMALL | dict(epochs=1, margin=20.)).fit(x)
    assert np.allclose(small.history_['hinge'], one.history_['hinge'], rtol=1e-3), 'the scale'


class InliersAsOutliers(REPEN):
    """The cut the wrong way round."""
    def triplets(self, rows, y):
        with mutant(__import__('ad_course.repen').repen, pseudo_outliers=far_below):
            return super().triplets(rows, y)

class RolesExchanged(REPEN):
    """The outlier is drawn near."""
    def triplet_loss(self, xb, yb): return dict(hinge=exchanged(self.codes(xb), self.margin))

class Unscaled(REPEN):
    """Pixels as they are."""
    def codes(self, xb): return super().codes(xb * self.scale_ + self.mean_)


def test_it_learns_what_it_is_told(): check_learning(REPEN)


@each_mutant({'who is an outlier': (InliersAsOutliers,), 'not apart': (RolesExchanged,),
              'the scale': (Unscaled,)})
def test_wrong_learners_are_caught(why, broken): assert_caught(check_learning, broken, why)


def test_better_than_untrained_where_the_pseudo_labels_are_right():
    (x, _), (new, y) = rows(300, 40, 20), rows(300, 40, 60, seed=7)
    trained, raw = (REPEN(**SMALL | dict(epochs=n)).fit(x).score(new, y) for n in (30, 0))
    assert trained > max(.9, raw + .05)


def test_labelled_anomalies_leave_the_subsets_and_play_the_outlier():
    x, y = rows(60, moved=10)
    d = REPEN(**SMALL).fit(x, y)
    assert not np.isin(d.own_.numpy(), np.flatnonzero(y)).any() and not d.pseudo_[y == 1].any()
    known = d.triplets(torch.tensor(x).flatten(1), torch.tensor(y)).labelled
    assert torch.equal(known, torch.tensor(x[y == 1]).flatten(1))
    mean = x[y == 0].reshape(-1, 6).mean(0)
    assert np.allclose(d.mean_, mean, atol=1e-6)


@pytest.mark.parametrize('params, message', [
    (dict(margin=0.), 'margin must be a number above 0'), (dict(alpha=-1.), 'alpha'),
    (dict(n_queries=0), 'n_queries'), (dict(subset_size=1), 'subset_size must be .* at least 2'),
    (dict(subsets=0), 'subsets'), (dict(code_dim=0), 'code_dim'),
    (dict(labelled_share=1.5), 'labelled_share'),
    (dict(subset_size=40), 'subset_size must be below the number of rows .*; got 40 for 40'),
    (dict(n_queries=39), 'n_queries must be below the number of pseudo-inliers')])
def test_wrong_settings_are_named(params, message):
    check_refused(REPEN, message, **SMALL | params)


def test_copies_of_one_image_are_refused():
    with pytest.raises(ValueError, match='training images must differ'):
        REPEN(**SMALL).fit(np.full((20, 1, 2, 2), .5))


def test_promises_and_files(tmp_path):
    x, _ = rows()
    d = REPEN(**SMALL).fit(x)
    d.save(tmp_path/'d')
    assert np.array_equal(load(tmp_path/'d').decision_function(x), d.decision_function(x))
    assert len(check_detector(LeSiNN(), only=['same_twice', 'alone_as_in_a_batch'])) == 2
