"""PANDA: compactness, springs, the Fisher information, still statistics; mutants of each."""
import functools

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.nn import functional as F

from ad_course import panda as module
from ad_course.backbones import backbone
from ad_course.data import label_anomalies
from ad_course.detector import load
from ad_course.feature_maps import remembered
from ad_course.metrics import auroc
from ad_course.panda import (PANDA, PooledView, classifier, compactness, elastic, fisher_diagonal,
                             flat, samplewise_stop)
from ad_course.pretrained import DN2
from ad_course.surfaces import surfaces

from .mutants import assert_caught, changed, each_mutant

QUIET = dict(device='cpu', verbose=False, size=32)
CLOTH = label_anomalies(surfaces(n_train=30, n_test=40, size=64, seed=0), 4, seed=0)
NORMAL = CLOTH.x_train[CLOTH.y_train == 0]


@pytest.fixture(scope='module', autouse=True)
def seen_once():
    """The same few images are looked at again and again."""
    with remembered(): yield


def draws(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double()


# ---------------------------------------------------------------- equations
@settings(deadline=None, max_examples=20)
@given(st.integers(1, 6), st.integers(1, 5), st.integers(0, 99))
def test_compactness_is_a_sum_of_squares(n, d, seed):
    rows, center = draws(n, d, seed=seed), draws(d, seed=seed + 1)
    wanted = np.square(rows.numpy() - center.numpy()).sum(1)
    np.testing.assert_allclose(compactness(rows, center), wanted)


def check_fisher(f):
    """The closed form of a logistic regression: given classes exactly, drawn ones nearly."""
    w, x = draws(3, 4).requires_grad_(), draws(40, 4, seed=1)
    ask, p, y = (lambda x: x @ w.T), (x @ w.T).softmax(1).detach(), torch.arange(40) % 3
    wanted = (F.one_hot(y, 3) - p).square().T @ x.square() / 40
    assert torch.allclose(f(ask, [w], x, y=y), wanted.flatten()), 'given classes'
    closed = ((p * (1 - p)).T @ x.square() / 40).flatten()
    found = f(ask, [w], x.repeat(25, 1), torch.Generator().manual_seed(0))
    assert (found - closed).norm() < .15 * closed.norm(), 'drawn classes'


def of_the_batch(logits, parameters, x, rng=None, y=None):
    """The square of the mean slope."""
    log_p = logits(x).log_softmax(1)
    if y is None: y = torch.multinomial(log_p.detach().exp(), 1, generator=rng)[:, 0]
    total = log_p.gather(1, y[:, None]).mean()
    return flat(torch.autograd.grad(total, parameters)).square()

def of_the_surest(logits, parameters, x, rng=None, y=None):
    return fisher_diagonal(logits, parameters, x, y=logits(x).argmax(1) if y is None else y)

def of_the_probability(logits, parameters, x, rng=None, y=None):
    """The slope of p in place of log p."""
    return fisher_diagonal(lambda x: logits(x).softmax(1), parameters, x, rng, y)

def summed(*args, **kwargs): return 40 * fisher_diagonal(*args, **kwargs)


def test_fisher_is_the_closed_form(): check_fisher(fisher_diagonal)


@each_mutant({'given classes': (of_the_batch, of_the_probability, summed),
              'drawn classes': (of_the_surest,)})
def test_wrong_fisher_is_caught(why, broken): assert_caught(check_fisher, broken, why)


def test_springs_are_a_parabola_with_its_slope():
    theta, anchor, f = draws(5).requires_grad_(), draws(5, seed=1), draws(5, seed=2).square()
    value = elastic(theta, anchor, f)
    assert value.item() == pytest.approx(.5 * (f * (theta - anchor)**2).sum().item())
    slope, = torch.autograd.grad(value, theta)
    assert torch.allclose(slope, (f * (theta - anchor)).detach())
    assert torch.allclose(elastic(theta, anchor, torch.ones(())), .5 * (theta - anchor).norm()**2)


def test_flat_knows_no_memory_order():
    a = draws(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    assert torch.equal(flat([a, draws(2)]), torch.cat([a.contiguous().view(-1), draws(2)]))


def test_largest_ratio_of_some_moments():
    scores, own = draws(3, 7).abs().numpy(), draws(3, 5, seed=1).abs().numpy()
    wanted = [max(scores[t, i] / own[t].mean() for t in range(3)) for i in range(7)]
    np.testing.assert_allclose(samplewise_stop(scores, own), wanted)


# ---------------------------------------------------------------- the network
def test_rows_are_those_of_the_backbone_and_logits_those_of_the_whole():
    view, whole = PooledView((3, 32, 32), size=32), backbone('efficientnet_lite0', size=32)
    view.load()
    xb = torch.tensor(CLOTH.x_test[:4])
    with torch.no_grad():
        assert torch.allclose(view(xb), whole(xb), atol=1e-5)
        net = module._load_pretrained('efficientnet_lite0').eval()
        logits = classifier('efficientnet_lite0')(view(xb))
        assert torch.allclose(logits, net(whole.prepare(xb)), atol=1e-4)
    assert logits.shape == (4, 1000)
    assert not any(p.requires_grad for p in view.fixed.parameters())
    assert all(p.requires_grad for p in view.learning.parameters())


# ---------------------------------------------------------------- the detector
def fit(cls=PANDA, **params): return cls(**QUIET | params).fit(CLOTH.x_train, CLOTH.y_train)


@functools.cache
def before():
    """Fitted without a training."""
    return fit(epochs=0, penalty=None)


def statistics(d):
    return torch.cat([b.flatten() for k, b in d.nets_.view.named_buffers() if 'running' in k])


def check_training(cls):
    """Center of the start, springs at rest and then pulling back, statistics still."""
    raw, d = before(), fit(cls, epochs=2, penalty='l2sp', lr=1e-4)
    with torch.no_grad(): rows = raw.rows(torch.tensor(NORMAL))
    assert torch.allclose(rows.mean(0), raw.center_, atol=1e-5), 'center'
    assert torch.allclose(d.center_, raw.center_, atol=1e-5), 'center'
    assert torch.equal(statistics(d), statistics(raw)), 'statistics'
    with torch.no_grad(): m = d.nets_.view.frozen(torch.tensor(NORMAL))
    terms = d.map_loss(m, torch.zeros(len(m)))
    away = (flat(d.nets_.view.learning.parameters()) - d.anchor_).square().sum()
    assert away > 0, 'anchor'
    assert torch.allclose(terms['elastic'], 10 / 2 * away, rtol=1e-3), 'elastic'
    now = (d.bank_ - d.center_).square().sum(1)
    assert torch.allclose(terms['compactness'], now, atol=1e-5), 'compactness'
    assert now.mean() < (rows - raw.center_).square().sum(1).mean(), 'fell'
    assert d.map_loss(m, torch.ones(len(m)))['compactness'].sum() == 0, 'labels'


class Usual(PooledView):
    def train(self, mode=True): return nn.Module.train(self, mode)

def moving(self, shape): return dict(view=Usual(shape, self.backbone, self.size, self.thaw))

def unlabelled(self, m, yb): return PANDA.map_loss(self, m, 0 * yb)

def without_half(self, m, yb):
    terms = PANDA.map_loss(self, m, yb)
    return terms | ({'elastic': 2 * terms['elastic']} if 'elastic' in terms else {})

def away(self, m, yb):
    terms = PANDA.map_loss(self, m, yb)
    return terms | dict(compactness=-terms['compactness'])

def drifting(self, m, yb):
    """The center follows."""
    self.center_ = self.map_rows(m).detach().mean(0)
    return PANDA.map_loss(self, m, yb)


MUTANTS = {'statistics': dict(networks=moving), 'labels': dict(map_loss=unlabelled),
           'elastic': dict(map_loss=without_half), 'compactness|fell': dict(map_loss=away),
           'center': dict(map_loss=drifting)}


def test_training_is_that_of_the_equations(): check_training(PANDA)


@each_mutant({why: (changed(PANDA, **methods),) for why, methods in MUTANTS.items()})
def test_wrong_trainings_are_caught(why, broken): assert_caught(check_training, broken, why)


def test_without_training_it_is_dn2():
    a, b = before(), fit(DN2)
    np.testing.assert_allclose(a.decision_function(CLOTH.x_test), b.decision_function(CLOTH.x_test),
                               rtol=1e-3)
    assert a.threshold_ == pytest.approx(b.threshold_, rel=1e-3)


def test_springs_by_fisher_have_mean_one_and_hold(tmp_path):
    params = dict(epochs=2, lr=3e-4, n_fisher_images=2)
    free, held = fit(penalty=None, **params), fit(elastic_weight=1000., **params)
    assert float(held.stiffness_.mean()) == pytest.approx(1, rel=1e-3)
    assert held.stiffness_.min() >= 0 and held.stiffness_.max() > 100
    spread = lambda d: float(d.bank_.var(0).sum())
    assert spread(free) < .5 * spread(before()) and spread(held) > spread(free)
    held.save(tmp_path/'panda.safetensors')
    again = load(tmp_path/'panda.safetensors')
    np.testing.assert_array_equal(again.decision_function(CLOTH.x_test),
                                  held.decision_function(CLOTH.x_test))


def test_better_than_its_untrained_network():
    """That nobody has trained on photographs, with the same loss."""
    a, b = (fit(epochs=2, penalty=None, weights=w) for w in ('imagenet', 'random'))
    seen, blind = (auroc(CLOTH.y_test, d.decision_function(CLOTH.x_test)) for d in (a, b))
    assert seen > max(.7, blind + .05), (seen, blind)


@pytest.mark.parametrize('wrong', [dict(thaw=0), dict(thaw=5), dict(penalty='early'),
                                   dict(elastic_weight=-1.), dict(n_fisher_images=0),
                                   dict(backbone=None), dict(backbone='vit_b_16')])
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))): PANDA(**wrong).check_params()
