"""CWD-SVDD: the radius against a search, every term against hand values and closed-form gradients, what each set may touch; and mutants that each check must catch."""
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from ad_course.cwdsvdd import CWDSVDD, OnlyNormal, Rows, balanced_radius
from ad_course.data import digits
from ad_course.deepsvdd import contrast_normalize, quantile_radius
from ad_course.check import loss_values
from ad_course.detector import total_loss
from ad_course.wrapping import ImageWrapper, density_epsilon

TASK = digits(normal=3)
X = np.concatenate([TASK.x_train[:60], TASK.x_reserve[:20]])
Y = np.repeat([0, 1], [60, 20])
SMALL = dict(arch='mlp', code_dim=4, width=2, batch_size=32, epochs=2, pretrain_epochs=1, warm_up=1, wraps=100, verbose=False)
CODES, LABELS = torch.tensor([[1., 0], [1, 1], [4, 0], [1, -2], [1, 0], [2, 0]], dtype=torch.float64), torch.tensor([0, 0, 0, 0, 1, 1])
BANK = torch.tensor([[2., 0], [1, 2], [1, 1]], dtype=torch.float64)


def by_hand(cls, **params):
    """Center (1, 0), R = 2; the encoder doubles the second number; normal distances 0, 1, 9, 4, foreign 0, 1, wraps 1, 16, 4."""
    d = cls(**{**dict(nu=.5, mu=.25, weight_decay=.1), **params})
    d.nets_ = nn.ModuleDict(dict(encoder=nn.Linear(2, 2, bias=False).double()))
    d.nets_.encoder.weight.data = torch.diag(torch.tensor([1., 2.], dtype=torch.float64))
    d.center_, d.radius_, d.unknown_share_, d.some_wraps = torch.tensor([1., 0.], dtype=torch.float64), 2., 1 / 3, lambda b: BANK
    return d


# ---------------------------------------------------------------- the radius
@pytest.mark.parametrize('nu, mu, sizes', [(.1, .1, ()), (.1, .1, (50,)), (.03, 1., (7, 90)), (.7, .01, (1, 2))])
def test_the_radius_minimizes(nu, mu, sizes):
    g = np.random.default_rng(0)
    d, repelled = g.gamma(2, size=83), [g.gamma(3, size=m) for m in sizes]
    loss = lambda R2: R2 + np.maximum(0, d - R2).mean() / nu + sum(np.maximum(0, R2 - r).mean() / mu for r in repelled)
    R2 = balanced_radius(d, nu, mu, repelled)**2
    assert all(loss(R2) <= loss(other) + 1e-9 for other in np.concatenate([d, *repelled, [0, R2 + 1e-3, R2 - 1e-3]]))
    if not sizes: assert np.isclose(R2, quantile_radius(d, nu)**2)
    out, inside = [[(s > R2 + e).mean() - 0 for s in (d,)] + [sum((r < R2 + e).mean() for r in repelled)] for e in (1e-9, -1e-9)]
    assert out[0] <= nu * (1 + out[1] / mu) + 1e-9 and inside[0] >= nu * (1 + inside[1] / mu) - 1e-9, 'the share outside'


def test_the_radius_of_odd_sets():
    assert balanced_radius([4.]) == 2 and balanced_radius([0., 0, 0]) == 0 and balanced_radius([1, 4], .5, .5, [[]]) == 1
    with pytest.raises(ValueError, match='at least one'): balanced_radius([])


# ---------------------------------------------------------------- checks of the class
def check_terms(cls):
    """Names, shapes and values of the five terms."""
    terms = by_hand(cls).terms(CODES, LABELS)
    assert list(terms) == ['radius', 'outside', 'decay', 'wrapping', 'unknown'], f'names {list(terms)}'
    want = dict(radius=4, outside=5 / (.5 * 4), decay=.05 * 5, wrapping=3 / (.25 * 3), unknown=(4 + 3) / (.25 * 2))
    for name, value in want.items(): assert np.isclose(float(terms[name].detach().mean()), value), f'{name}: {float(terms[name].detach().mean())}, not {value}'
    assert terms['outside'].shape == terms['unknown'].shape == (6,), 'one number an image'
    assert 'decay' not in by_hand(cls, weight_decay=0).terms(CODES, LABELS), 'decay of weight 0'


def check_gradients(cls):
    """Pulls and pushes in closed form; a code on the right side feels nothing."""
    d, z = by_hand(cls), CODES.clone().requires_grad_()
    g, = torch.autograd.grad(total_loss(d.terms(z, LABELS), 6), z)
    factor = torch.tensor([0, 0, 2 / (.5 * 4), 0, -2 / (.25 * 2), -2 / (.25 * 2)], dtype=torch.float64)
    assert torch.allclose(g, factor[:, None] * (CODES - d.center_)), 'gradient of the codes'
    V = d.nets_.encoder.weight
    g, = torch.autograd.grad(total_loss(d.terms(CODES, LABELS), 6), V)
    want = -2 / (.25 * 3) * torch.outer(V @ BANK[0] - d.center_, BANK[0]) + .1 * V
    assert torch.allclose(g, want), 'gradient of the weights'


def check_homogeneous(cls):
    """All but the decay grow with the square of the scale."""
    one, two = by_hand(cls, weight_decay=0), by_hand(cls, weight_decay=0)
    two.nets_.encoder.weight.data *= 3; two.center_, two.radius_ = 3 * two.center_, 6.
    a, b = (total_loss(d.terms(z, LABELS), 6).item() for d, z in ((one, CODES), (two, 3 * CODES)))
    assert np.isclose(9 * a, b), 'not homogeneous'


def check_shares(cls):
    """The mean over batches, some without a labelled image, is the loss of all."""
    d = by_hand(cls)
    value = lambda i: total_loss(d.terms(CODES[i], LABELS[i]), len(i)).item()
    assert np.isclose(np.mean([value([0, 1]), value([2, 4]), value([3, 5])]), value([0, 1, 2, 3, 4, 5])), 'batches do not add up'


def check_radius(cls):
    """After every epoch the radius is the minimizer, with the bank and the labelled images; it is 1 when the game begins."""
    class Watched(cls):
        def after_epoch(self, data, epoch):
            done = super().after_epoch(data, epoch)
            if 'outside' in self.history_:
                d, y = (np.concatenate(p) for p in zip(*self.each_batch(self.distances, data)))
                assert np.isclose(self.radius_, balanced_radius(d[y == 0], self.nu, self.mu, [self.of_bank(), d[y == 1]]), rtol=1e-5), 'radius not refreshed'
            return done
    d = Watched(**{**SMALL, 'lr': 1e-2}).fit(X, Y)
    assert np.isclose(d.history_['radius'][0], 1) and not np.isclose(d.history_['radius'][1], 1), 'radius at the start'
    assert np.isclose(d.threshold_, d.radius_**2), 'threshold is not R^2'


def check_score(cls):
    """The score is the squared distance; calibrate moves the threshold only."""
    d = cls(**SMALL).fit(X, Y)
    s = d.decision_function(X)
    assert np.allclose(s, ((d.encode(X) - d.center_.numpy())**2).sum(1), rtol=1e-4), 'score'
    d.calibrate(X[:60])
    assert np.isclose(d.threshold_, np.quantile(s[:60], .95), rtol=1e-3) and np.allclose(d.decision_function(X), s), 'calibrate'


def check_wraps(cls):
    """The bank comes from what the network sees of normal images, has the asked-for reach, and is gone after training."""
    for params in (dict(reach=2.), dict(reach=.5, features='pca', components=8)):
        d = cls(**{**SMALL, **params}).fit(X, Y)
        assert d._bank is None, 'the bank is kept'
        d.make_wraps(d.as_batches(X, Y))
        views = d.of_normal(d.prepare, d.as_batches(X, Y))
        assert len(views) == 60 and d._bank.shape == (100, *views.shape[1:]), 'shape'
        rows = views.reshape(60, -1).astype(float)
        epsilon = ImageWrapper().fit(views).epsilon_ if views.ndim == 4 else density_epsilon(rows)
        nearest = np.sqrt(((d._bank.numpy().reshape(100, 1, -1) - rows)**2).sum(2))
        assert (np.abs(nearest / (d.reach * epsilon) - 1).min(1) < 1e-3).all(), 'a wrapping point has no parent among the normal images'


def check_refresh(cls):
    """refresh counts epochs between draws; 0 draws once."""
    class Counts(cls):
        def make_wraps(self, data, draw=0):
            self.draws_ = [*getattr(self, 'draws_', []), draw]
            super().make_wraps(data, draw)
            self.sums_ = [*getattr(self, 'sums_', []), float(self._bank[..., 2, 3].sum())]
    small = {**SMALL, 'epochs': 5}
    assert Counts(**small).fit(X[:60]).draws_ == [0], 'refresh=0'
    d = Counts(**small, refresh=2).fit(X[:60])
    assert d.draws_ == [0, 2, 4] and len(set(d.sums_)) == 3, 'refresh=2'


def check_eval_mode(cls):
    """Equation (6) is measured with fixed batch statistics, which the game leaves alone."""
    seen = []
    class Listens(cls):
        def terms(self, codes, yb):
            seen.append(any(m.training for m in self.nets_.modules()))
            return super().terms(codes, yb)
        def make_wraps(self, data, draw=0):
            self.before_ = self.nets_.encoder[1].running_mean.clone()
            super().make_wraps(data, draw)
    d = Listens(**{**SMALL, 'arch': 'conv'}).fit(X, Y)
    assert seen and not any(seen), 'training mode in the game'
    assert torch.equal(d.before_, d.nets_.encoder[1].running_mean), 'batch statistics moved in the game'


def check_foreign_images_touch_nothing_else(cls):
    """Range, warm start, center: the same with foreign images as without."""
    loud = np.concatenate([X[:60], np.eye(8)[None, None].repeat(20, 0) * np.linspace(.1, 1, 20).reshape(-1, 1, 1, 1)])
    a, b = cls(**{**SMALL, 'epochs': 0}).fit(X[:60]), cls(**{**SMALL, 'epochs': 0}).fit(loud, Y)
    z = contrast_normalize(torch.tensor(X[:60]))
    assert (a.low_, a.high_) == (b.low_, b.high_) and np.isclose(b.low_, float(z.min())), 'range'
    seen = []
    class Listens(cls):
        def pretrain_loss(self, xb):
            seen.append(len(xb))
            return super().pretrain_loss(xb)
    Listens(**SMALL).fit(loud, Y)
    assert sum(seen) == 60, f'{sum(seen)} images in the warm start'


def check_warm_up(cls):
    """The warm-up lowers the mean distance of normal images, before there is a radius."""
    d = cls(**{**SMALL, 'warm_up': 30, 'epochs': 1, 'lr': 3e-3}).fit(X[:60])
    assert len(d.history_['warm/distance']) == 30 and d.history_['warm/distance'][-1] < .5 * d.history_['warm/distance'][0], 'warm-up'
    assert len(d.history_['outside']) == 1, 'epochs'


def check_labels(cls):
    d = cls(**SMALL).fit(X, Y)
    d.nets_.encoder[-1].weight.data *= 3
    assert not np.isclose(hook_loss(d, X[[0, 70]], np.array([0, 1])), hook_loss(d, X[[0, 70]], np.array([1, 0]))), 'labels do not belong to images'


CHECKS = dict(terms=check_terms, gradients=check_gradients, homogeneous=check_homogeneous, shares=check_shares, radius=check_radius, score=check_score, wraps=check_wraps,
              refresh=check_refresh, eval_mode=check_eval_mode, foreign=check_foreign_images_touch_nothing_else, warm_up=check_warm_up, labels=check_labels)


@pytest.mark.parametrize('name', CHECKS)
def test_the_chapter_keeps(name): CHECKS[name](CWDSVDD)


# ---------------------------------------------------------------- mutants
def changed(name, f):
    """A mutant whose named term is f(term)."""
    return type(name, (CWDSVDD,), dict(terms=lambda self, codes, yb: {k: f(v) if k == name else v for k, v in CWDSVDD.terms(self, codes, yb).items()}))

class MeansOfTheBatch(CWDSVDD):
    def shares(self, yb):
        normal, unknown = (yb == 0), (yb == 1)
        return normal * len(yb) / normal.sum().clamp(min=1), unknown * len(yb) / unknown.sum().clamp(min=1)

class SharesIgnored(CWDSVDD):
    def shares(self, yb): return (yb == 0).double(), (yb == 1).double()

class LabelsIgnored(CWDSVDD):
    def shares(self, yb): return super().shares(yb * 0)

class NotSquared(CWDSVDD):
    def terms(self, codes, yb): return {k: v / self.radius_ if k == 'radius' else v for k, v in super().terms(codes, yb).items()}

class RadiusKept(CWDSVDD):
    def settle(self, data): pass

class RadiusWithoutBank(CWDSVDD):
    def find_radius(self, data):
        bank, self._bank = getattr(self, '_bank', None), None
        super().find_radius(data)
        self._bank = bank

class NoUnitSphere(CWDSVDD):
    def unit_sphere(self, data): self.find_radius(data)

class WrapsOfAll(CWDSVDD):
    def make_wraps(self, data, draw=0): super().make_wraps(Rows(data.x, data.y * 0, 'cpu') if hasattr(data, 'x') else Rows(data.rows, data.y * 0, 'cpu'), draw)

class WrapsOfPixels(CWDSVDD):
    def wrapped(self, views, most, seed): return super().wrapped(X[:60] if views.ndim == 4 else views, most, seed)

class ReachIgnored(CWDSVDD):
    def wrapped(self, views, most, seed):
        reach, self.reach = self.reach, 1.
        try: return super().wrapped(views, most, seed)
        finally: self.reach = reach

class NeverRefreshed(CWDSVDD):
    def after_epoch(self, data, epoch):
        if self.history_.get('outside'): self.settle(data)

class SameDraw(CWDSVDD):
    def make_wraps(self, data, draw=0): super().make_wraps(data, 0)

class TrainingMode(CWDSVDD):
    def step(self, xb, yb):
        self.nets_.train()
        terms = self.loss(xb, yb)
        self.optimizers_['all'].zero_grad(); total_loss(terms, len(xb)).backward(); self.optimizers_['all'].step()
        return terms

class ThresholdQuantile(CWDSVDD):
    def threshold_rule(self, scores): return np.quantile(scores, .95)

class ThresholdRadius(CWDSVDD):
    def threshold_rule(self, scores): return self.radius_

class ThresholdForever(CWDSVDD):
    def threshold_rule(self, scores): return self.radius_**2

class MinusRadius(CWDSVDD):
    def image_score(self, xb): return self.distances(xb) - self.radius_**2

class RangeOfAll(CWDSVDD):
    def only_normal(self, data): return data

class NoWarmUp(CWDSVDD):
    def warm_step(self, xb, yb): return dict(distance=self.distances(xb))


MUTANTS = [*[('terms', changed(name, lambda v: 0 * v)) for name in ('radius', 'outside', 'decay', 'wrapping', 'unknown')],
           *[('gradients', changed(name, lambda v: -v)) for name in ('outside', 'decay', 'wrapping', 'unknown')], ('terms', changed('radius', lambda v: -v)),
           *[('terms', changed(name, lambda v: v.sum())) for name in ('outside', 'unknown')], ('terms', changed('outside', lambda v: v.mean())), ('terms', changed('wrapping', lambda v: v * 3)),
           ('shares', MeansOfTheBatch), ('terms', SharesIgnored), ('terms', LabelsIgnored), ('homogeneous', NotSquared), ('radius', RadiusKept), ('radius', RadiusWithoutBank),
           ('radius', NoUnitSphere), ('wraps', WrapsOfAll), ('wraps', WrapsOfPixels), ('wraps', ReachIgnored), ('refresh', NeverRefreshed), ('refresh', SameDraw),
           ('eval_mode', TrainingMode), ('radius', ThresholdQuantile), ('radius', ThresholdRadius), ('score', ThresholdForever), ('score', MinusRadius), ('foreign', RangeOfAll),
           ('warm_up', NoWarmUp), ('labels', LabelsIgnored)]


@pytest.mark.parametrize('name, cls', MUTANTS, ids=lambda v: v if isinstance(v, str) else v.__name__)
def test_a_mutant_is_caught(name, cls):
    with pytest.raises(AssertionError): CHECKS[name](cls)


# ---------------------------------------------------------------- bad input, odd input
@pytest.mark.parametrize('params, match', [(dict(nu=0), 'nu'), (dict(nu=1), 'nu'), (dict(mu=0), 'mu'), (dict(mu=float('nan')), 'mu'), (dict(reach=0), 'reach'), (dict(wraps=-1), 'wraps'),
                                           (dict(refresh=1.5), 'refresh'), (dict(objective='one-class'), 'objective'), (dict(features='resnet19'), 'features'), (dict(components=0), 'components'),
                                           (dict(features='pca', components=90), '90 components'), (dict(rule='far'), 'rule'), (dict(weights=None), 'weights')])
def test_bad_settings_are_named(params, match):
    with pytest.raises(ValueError, match=match): CWDSVDD(**{**SMALL, **params}).fit(X[:60])


def test_constant_images_and_overlap():
    for params in (dict(), dict(features='pca', gcn=False, components=2)):
        with pytest.raises(ValueError, match='contrast|same'): CWDSVDD(**{**SMALL, **params}).fit(np.full((9, 8, 8), .3))
    with pytest.warns(UserWarning, match='^2 images'): CWDSVDD(**SMALL).fit(np.concatenate([X, X[:2]]), np.append(Y, [1, 1]))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        CWDSVDD(**SMALL).fit(np.concatenate([X, X[60:]]), np.append(Y, Y[60:]))


def test_rows_and_only_normal():
    rows = Rows(torch.arange(12.).view(6, 2), torch.tensor([0, 1, 1, 0, 0, 1]), 'cpu')
    some = OnlyNormal(rows, 3)
    assert len(some) == 3 and torch.cat([x for x, _ in some.batches(2)])[:, 0].tolist() == [0, 6, 8] and all((y == 0).all() for _, y in some.batches(2))


def test_features_of_a_backbone():
    """Features are extracted once, the backbone stays as it is, and the file holds all."""
    d = CWDSVDD(**{**SMALL, 'features': 'resnet18', 'weights': 'random', 'components': 4}).fit(X[:8])
    before = {k: v.clone() for k, v in d.nets_.backbone.state_dict().items()}
    assert d.mean_.shape == (512,) and d.axes_.shape == (4, 512) and np.isfinite(d.decision_function(X[:3])).all()
    assert all(torch.equal(v, d.nets_.backbone.state_dict()[k]) for k, v in before.items())
