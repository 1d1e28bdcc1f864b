"""The sparse autoencoder: the divergence against independent formulas, the loss against mutants."""
import math

import numpy as np
import pytest
import torch
from scipy.special import expit, rel_entr
from torch.nn import functional as F

from ad_course.ae import AE
from ad_course.data import digits
from ad_course.check import check_detector
from ad_course.metrics import auroc
from ad_course.sae import SAE, log_activity, one_layer, sparsity_kl
from tests.mutants import assert_caught

TASK = digits(anomalous=8)
X = TASK.x_train[:96]


def logits_of(*shape, scale=3, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed)) * scale


# ---------------------------------------------------------------- the divergence
@pytest.mark.parametrize('p', [.01, .05, .5, .9])
def test_divergence_agrees_with_scipy(p):
    z = logits_of(40, 9)
    q = expit(z.numpy()).mean(0)
    expected = rel_entr(p, q) + rel_entr(1 - p, 1 - q)
    np.testing.assert_allclose(sparsity_kl(z, p), expected, rtol=1e-10)


def test_log_activity_is_the_logarithm_of_the_mean_and_of_its_complement():
    z = logits_of(30, 5)
    on, off = log_activity(z)
    torch.testing.assert_close(on.exp(), z.sigmoid().mean(0))
    torch.testing.assert_close(off.exp(), 1 - z.sigmoid().mean(0))


def test_gradient_by_finite_differences_and_its_closed_form():
    z = logits_of(6, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: sparsity_kl(z, .05), z)
    a = z.detach().sigmoid()
    q = a.mean(0)
    grad, = torch.autograd.grad(sparsity_kl(z, .05).sum(), z)
    torch.testing.assert_close(grad, (.95 / (1 - q) - .05 / q) * a * (1 - a) / 6)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('logit', [-1e4, -200., -20., 20., 200., 1e4])
def test_dead_and_saturated_units_have_a_finite_value_and_a_gradient(dtype, logit):
    z = torch.full((8, 1), logit, dtype=dtype, requires_grad=True)
    value = sparsity_kl(z, .05)
    grad, = torch.autograd.grad(value.sum(), z)
    assert value.isfinite().all() and value > 0
    expected = torch.tensor(expit(logit) - .05, dtype=dtype)
    torch.testing.assert_close(grad.sum(), expected, atol=1e-3, rtol=0)


def test_half_precision_is_widened():
    z = logits_of(512, 3, dtype=torch.float32)
    assert sparsity_kl(z.bfloat16(), .05).dtype == torch.float32
    half, full = sparsity_kl(z.bfloat16(), .05), sparsity_kl(z, .05)
    torch.testing.assert_close(half, full, rtol=.02, atol=1e-3)


def test_zero_exactly_at_p_and_positive_elsewhere():
    q = torch.linspace(.01, .99, 99, dtype=torch.float64)
    value = sparsity_kl(torch.logit(q)[None], .3)
    assert value[29].abs() < 1e-12 and (value[torch.arange(99) != 29] > 0).all()


def test_columns_not_rows():
    """Three codes with the same means: one unit for each image, a hum, all units for one image."""
    eye, crowd = torch.eye(20, dtype=torch.float64), torch.zeros(20, 20, dtype=torch.float64)
    crowd[3] = 1
    for code in (eye, torch.full_like(eye, .05), crowd):
        assert sparsity_kl(torch.logit(code, eps=1e-12), .05).abs().max() < 1e-8


def test_small_batches_cost_more_and_repeated_images_cost_the_same():
    z = logits_of(64, 8)
    def mean_of(b): return torch.stack([sparsity_kl(part, .05).sum() for part in z.split(b)]).mean()
    means = [mean_of(b) for b in (1, 4, 16, 64)]
    assert (np.diff(means) < 0).all()
    torch.testing.assert_close(sparsity_kl(z.repeat(3, 1), .05), sparsity_kl(z, .05))


# ---------------------------------------------------------------- the loss, and its mutants
def check_loss(cls):
    """The terms of the loss against numpy, for weights that training left behind."""
    params = dict(code_dim=10, p=.1, sparsity_weight=.7, weight_decay=.01)
    d = cls(**params, epochs=2, batch_size=32, verbose=False).fit(X)
    d.nets_.double()
    terms = d.loss(torch.tensor(X).double())
    (W, b), (V, c) = ([p.detach().numpy() for p in net.parameters()]
                      for net in (d.nets_.encoder, d.nets_.decoder))
    rows = X.reshape(len(X), -1)
    a = expit(rows @ W.T + b)
    q = a.mean(0)
    expected = dict(reconstruction=((rows - expit(a @ V.T + c))**2).mean(),
                    decay=.01 * ((W**2).sum() + (V**2).sum()),
                    sparsity=.7 * (rel_entr(.1, q) + rel_entr(.9, 1 - q)).sum())
    total = {k: float(v.detach().mean()) for k, v in terms.items()}
    assert set(total) == set(expected), 'names of the terms'
    for k, v in expected.items(): np.testing.assert_allclose(total[k], v, rtol=1e-9, err_msg=k)
    code = d.code(torch.tensor(X).double()).detach()
    np.testing.assert_allclose(code, a, rtol=1e-9, err_msg='code')


def changed(name, f):
    """A mutant: one term of the loss replaced by f(detector, xb, term)."""
    def loss(self, xb):
        terms = SAE.loss(self, xb)
        return {**terms, name: f(self, xb, terms[name])}
    return type('Mutant', (SAE,), dict(loss=loss))


def sparsity_as(penalty):
    """A mutant of the second term: sparsity_weight times penalty(detector, xb)."""
    return changed('sparsity', lambda self, xb, term: self.sparsity_weight * penalty(self, xb))


def copied_from_a_tutorial(self, xb):
    q, p = self.code(xb).sigmoid().mean(1), self.p
    return (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).sum()


def reverse(self, xb):
    q, p = self.code(xb).mean(0), self.p
    return ((q / p).log() * q + ((1 - q) / (1 - p)).log() * (1 - q)).sum()


def image_by_image(self, xb):
    return torch.stack([sparsity_kl(z[None], self.p).sum() for z in self.logits(xb)]).mean()


def all_decay(self, xb, term):
    return self.weight_decay * sum(p.square().sum() for p in self.nets_.parameters())


MUTANTS = {
    'no sparsity': changed('sparsity', lambda self, xb, term: 0 * term),
    'sign of sparsity': changed('sparsity', lambda self, xb, term: -term),
    'mean over units': changed('sparsity', lambda self, xb, term: term / self.code_dim),
    'image by image': sparsity_as(image_by_image),
    'the other direction': sparsity_as(reverse),
    'mean over units, sigmoid twice': sparsity_as(copied_from_a_tutorial),
    'L1': sparsity_as(lambda self, xb: self.code(xb).mean(0).sum()),
    'p forgotten': sparsity_as(lambda self, xb: sparsity_kl(self.logits(xb), .05).sum()),
    'no reconstruction': changed('reconstruction', lambda self, xb, term: 0 * term),
    'sign of reconstruction': changed('reconstruction', lambda self, xb, term: -term),
    'sum over pixels': changed('reconstruction', lambda self, xb, term: term * xb[0].numel()),
    'no decay': changed('decay', lambda self, xb, term: 0 * term),
    'decay of biases too': changed('decay', all_decay),
    'no sigmoid': type('Mutant', (SAE,), dict(code=lambda self, xb: self.logits(xb))),
}


def test_loss_is_the_equation(): check_loss(SAE)


@pytest.mark.parametrize('name', MUTANTS)
def test_mutant_of_the_loss_is_caught(name):
    assert_caught(check_loss, MUTANTS[name])


# ---------------------------------------------------------------- what training makes of it
SMALL = dict(epochs=25, batch_size=128, lr=1e-2, code_dim=64, verbose=False)


def check_sparsifies(cls):
    d = cls(sparsity_weight=3e-3, **SMALL).fit(TASK.x_train)
    c = d.encode(TASK.x_test)
    assert .03 < c.mean() < .2, f'mean activation {c.mean():.3f}'
    assert (c.mean(0) > .02).all(), 'a unit was left behind'
    assert c.std(0).mean() > .05, 'the code says nothing'


def test_training_makes_the_code_sparse_and_keeps_units_alive(): check_sparsifies(SAE)


ESSENTIAL = ['no sparsity', 'mean over units, sigmoid twice', 'no reconstruction']


@pytest.mark.parametrize('name', ESSENTIAL)
def test_without_the_term_it_does_not(name):
    assert_caught(check_sparsifies, MUTANTS[name])


def test_strong_penalty_reaches_p():
    d = SAE(sparsity_weight=100., p=.2, code_dim=8, lr=.03, verbose=False)
    d.set_params(epochs=150, batch_size=2000).fit(X)
    np.testing.assert_allclose(d.encode(X).mean(0), .2, atol=.01)


def test_sparsity_helps_the_wide_code_more_than_any_penalty_does():
    def found(**params):
        d = SAE(**{**SMALL, 'code_dim': 128, 'epochs': 40}, **params).fit(TASK.x_train)
        return auroc(TASK.y_test, d.decision_function(TASK.x_test))
    sparse, none, half = found(), found(sparsity_weight=0), found(p=.5)
    assert sparse > max(none, half) + .03, (sparse, none, half)


# ---------------------------------------------------------------- the contract
def test_without_sparsity_there_is_no_term_and_the_score_is_that_of_an_autoencoder():
    d = SAE(sparsity_weight=0, epochs=1, verbose=False).fit(X)
    assert set(d.history_) == {'reconstruction', 'seconds'}
    assert SAE.image_score is AE.image_score and SAE.pixel_score is AE.pixel_score
    assert SAE.mixes_images


DEEP = [dict(arch='auto', weight_decay=1e-5, epochs=30), dict(arch='conv', epochs=15)]
WRONG = [dict(p=0), dict(p=1), dict(p='a'), dict(p=float('nan')), dict(p=True),
         dict(sparsity_weight=-1), dict(sparsity_weight=float('inf')), dict(sparsity_weight=None),
         dict(sparsity_weight=True), dict(arch='linear')]


@pytest.mark.parametrize('params', DEEP, ids=str)
def test_contract(params): check_detector(SAE(batch_size=32, **params))


@pytest.mark.parametrize('params', WRONG, ids=str)
def test_wrong_parameters_are_named(params):
    with pytest.raises(ValueError, match=next(iter(params))): SAE(**params).fit(X)


@pytest.mark.parametrize('shape', [(1, 8, 8), (3, 5, 7), (1, 28, 28)])
def test_one_layer_fits_every_shape(shape):
    nets = one_layer(shape, 6)
    code = nets['encoder'](torch.rand(2, *shape))
    assert code.shape == (2, 6) and nets['decoder'](code).shape == (2, *shape)


@pytest.mark.parametrize('shape', [(1, 28, 28), (3, 32, 32)])
def test_defaults_work_on_larger_images(shape):
    x = np.random.default_rng(0).random((12, *shape), dtype='float32')
    d = SAE(epochs=2, verbose=False).fit(x)
    assert d.encode(x).shape == (12, 128) and d.anomaly_map(x).shape == (12, *shape[1:])


def test_mixed_precision_trains():
    d = SAE(epochs=3, precision='bfloat16', verbose=False).fit(X)
    assert np.isfinite(d.history_['sparsity']).all()
