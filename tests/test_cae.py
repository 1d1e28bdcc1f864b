"""The contractive autoencoder: three ways to one squared norm, the loss against mutants."""
from functools import partial

import numpy as np
import pytest
import torch
from scipy.special import expit
from torch import nn
from torch.autograd.functional import jacobian
from torch.func import vjp

from ad_course.cae import (CAE, Bias, TiedAE, closed_squared_norm, exact_squared_norm,
                           random_squared_norm)
from ad_course.data import digits
from ad_course.check import check_detector
from ad_course.detector import isolated
from ad_course.metrics import auroc
from ad_course.networks import mlp
from tests.mutants import assert_caught

TASK = digits(anomalous=8)
X = TASK.x_train[:48]


def layer(m=7, d=64, seed=0):
    with isolated(seed): return nn.Sequential(nn.Flatten(), nn.Linear(d, m)).double()


def sigmoid_of(net): return lambda x: net(x).sigmoid()


# ---------------------------------------------------------------- three ways
def reference(f, xb):
    """Image by image and entry by entry, with autograd's older interface."""
    return torch.stack([jacobian(lambda x: f(x[None])[0], x).square().sum() for x in xb])


def test_closed_and_exact_agree_with_autograd_and_finite_differences():
    net, xb = layer(), torch.tensor(X[:6]).double()
    f = sigmoid_of(net)
    torch.testing.assert_close(closed_squared_norm(f(xb), net[1].weight), reference(f, xb))
    torch.testing.assert_close(exact_squared_norm(f, xb), reference(f, xb))
    steps = 1e-6 * torch.eye(64).double().view(64, 1, 8, 8)
    with torch.no_grad(): rows = [((f(x + steps) - f(x - steps)) / 2e-6).square().sum() for x in xb]
    torch.testing.assert_close(exact_squared_norm(f, xb), torch.stack(rows), rtol=1e-6, atol=0)


def test_by_hand():
    W = torch.tensor([[3., 4.]])
    f, x = (lambda x: (x.flatten(1) @ W.T).sigmoid()), torch.zeros(2, 1, 1, 2)
    for norm in (closed_squared_norm(f(x), W), exact_squared_norm(f, x), random_squared_norm(f, x)):
        torch.testing.assert_close(norm, torch.tensor([1.5625, 1.5625]))


def test_exact_of_a_deep_network_and_of_a_linear_map():
    with isolated(0): deep = nn.Sequential(nn.Flatten(), mlp((64, 16, 5), nn.Tanh)).double()
    xb = torch.tensor(X[:4]).double()
    torch.testing.assert_close(exact_squared_norm(deep, xb), reference(deep, xb))
    net = layer()
    torch.testing.assert_close(exact_squared_norm(net, xb), net[1].weight.square().sum().expand(4))


@pytest.mark.parametrize('directions', [1, 3])
def test_random_is_unbiased_with_the_variance_that_theory_gives(directions):
    net, xb = layer(), torch.tensor(X[:5]).double()
    f = sigmoid_of(net)
    with isolated(0), torch.no_grad():
        draws = torch.stack([random_squared_norm(f, xb, directions) for _ in range(2000)])
    J = torch.stack([jacobian(lambda x: f(x[None])[0], x).flatten(1) for x in xb])
    S = (J @ J.transpose(1, 2)).square()
    variance = 2 * (S.sum((1, 2)) - S.diagonal(dim1=1, dim2=2).sum(1)) / directions
    error = (variance / 2000)**.5
    assert ((draws.mean(0) - reference(f, xb)).abs() < 4 * error).all()
    np.testing.assert_allclose(draws.var(0), variance, rtol=.25)


def test_random_draws_are_signs_and_differ_between_images():
    """Units that see different pixels: signs leave no error. Equal images: other draws."""
    f = lambda x: x.flatten(1)
    assert (random_squared_norm(f, torch.rand(3, 1, 4, 4)) == 16).all()
    net, xb = layer(), torch.tensor(X[:1]).double().repeat(6, 1, 1, 1)
    with isolated(0): draws = random_squared_norm(sigmoid_of(net), xb)
    assert len(set(draws.tolist())) == 6


def test_batch_normalization_is_refused_in_training():
    with isolated(0): net = nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.BatchNorm1d(4))
    with pytest.raises((RuntimeError, ValueError)): exact_squared_norm(net, torch.tensor(X))
    assert exact_squared_norm(net.eval(), torch.tensor(X)).shape == (48,)
    for arch in ('mlp', 'conv'):
        nets = CAE(arch=arch, tied=False, epochs=0).fit(X).nets_
        assert not any('BatchNorm' in type(m).__name__ for m in nets.modules())


def test_invariance_that_the_penalty_lacks_and_the_other_has():
    """Encoder over ten, decoder times ten: f has a hundredth, g(f) the same."""
    rows = torch.tensor(X).double().flatten(1) - .5
    U = torch.linalg.svd(rows, full_matrices=False)[2][:4]
    f = lambda eps: lambda x: (eps * x @ U.T).sigmoid()
    r = lambda eps: lambda x: 4 / eps * (f(eps)(x) - .5) @ U
    a, b = (exact_squared_norm(f(eps), rows).mean() for eps in (.01, .001))
    assert abs(a / b - 100) < 1
    a, b = (exact_squared_norm(r(eps), rows) for eps in (.01, .001))
    torch.testing.assert_close(a, b, rtol=1e-3, atol=0)


# ---------------------------------------------------------------- the loss, and its mutants
def close_terms(terms, want, weights):
    """Terms of a loss and their gradients are those of `want`, name by name."""
    assert set(terms) == set(want), 'names of the terms'
    for name in want:
        got = terms[name].mean()
        np.testing.assert_allclose(got.item(), want[name].item(), rtol=1e-8, err_msg=name)
        assert got.requires_grad, f'{name} has no gradient'
        how = dict(retain_graph=True, allow_unused=True, materialize_grads=True)
        grads = (torch.autograd.grad(v, weights, **how) for v in (got, want[name]))
        for p, q in zip(*grads):
            np.testing.assert_allclose(p, q, rtol=1e-6, atol=1e-10, err_msg=f'gradient of {name}')


SMALL = dict(code_dim=9, contraction_weight=.7, weight_decay=.01, epochs=2, batch_size=16)


def check_loss(cls, tied=True, penalize='code', jacobian='exact'):
    """The terms and their gradients against independent formulas."""
    d = cls(tied=tied, penalize=penalize, jacobian=jacobian, **SMALL, verbose=False).fit(X)
    d.nets_.double()
    x, encoder = torch.tensor(X[:8]).double(), d.nets_.encoder[1]
    W, b = encoder.weight, encoder.bias
    h = torch.special.expit(x.flatten(1) @ W.T + b)
    V = W if tied else d.nets_.decoder[0].weight.T
    y = torch.special.expit(h @ V + d.nets_.decoder[0].bias)
    s = h * (1 - h)
    if penalize == 'code': J = torch.einsum('nj,ji->nji', s, W)
    else: J = torch.einsum('nk,jk,nj,ji->nki', y * (1 - y), V, s, W)
    squares = W.square().sum() + (0 if tied else V.square().sum())
    want = dict(reconstruction=(x.flatten(1) - y).square().mean(), decay=.01 * squares,
                contraction=.7 * J.square().sum((1, 2)).mean())
    close_terms(d.loss(x), want, list(d.nets_.parameters()))


WAYS = [dict(jacobian='closed'), dict(jacobian='auto'), dict(jacobian='exact'), dict(tied=False),
        dict(tied=False, jacobian='closed'), dict(penalize='reconstruction'),
        dict(penalize='reconstruction', tied=False)]


@pytest.mark.parametrize('way', WAYS, ids=str)
def test_loss_is_the_equation(way): check_loss(CAE, **way)


def check_deep_loss(cls, penalize='code'):
    """The terms of a network with hidden layers, written out layer by layer."""
    d = cls(arch='mlp', tied=False, penalize=penalize, jacobian='exact', width=2, **SMALL,
            verbose=False).fit(X)
    d.nets_.double()
    x, (enc, dec) = torch.tensor(X[:8]).double(), (d.nets_.encoder, d.nets_.decoder)
    W, V = ([m for m in net.modules() if isinstance(m, nn.Linear)] for net in (enc, dec))
    def code(x): return torch.special.expit(W[1](W[0](x.flatten(1)).clamp(min=0)))
    def rebuilt(x): return torch.special.expit(V[1](V[0](code(x)).clamp(min=0)))
    f = code if penalize == 'code' else rebuilt
    J = [jacobian(lambda x: f(x[None])[0], one, create_graph=True).square().sum() for one in x]
    want = dict(reconstruction=(x.flatten(1) - rebuilt(x)).square().mean(),
                decay=.01 * sum(m.weight.square().sum() for m in W + V),
                contraction=.7 * torch.stack(J).mean())
    close_terms(d.loss(x), want, list(d.nets_.parameters()))


@pytest.mark.parametrize('penalize', ['code', 'reconstruction'])
def test_loss_of_a_deep_network_is_the_equation(penalize): check_deep_loss(CAE, penalize)


@pytest.mark.parametrize('arch', ['layer', 'mlp'])
@pytest.mark.parametrize('penalize', ['code', 'reconstruction'])
def test_random_way_estimates_the_norm_that_is_asked_for(arch, penalize):
    check_random(CAE, arch, penalize)


def check_random(cls, arch, penalize):
    d = cls(arch=arch, tied=arch == 'layer', penalize=penalize, jacobian='random', directions=4,
            code_dim=9, epochs=2, batch_size=16, verbose=False).fit(X)
    d.nets_.double()
    xb = torch.tensor(X[:4]).double()
    f = d.code if penalize == 'code' else lambda x: d.reconstruction(x).flatten(1)
    with isolated(0), torch.no_grad():
        draws = torch.stack([d.squared_norms(xb, d.code(xb)) for _ in range(500)])
    error = draws.std(0) / len(draws)**.5
    assert ((draws.mean(0) - reference(f, xb)).abs() < 4 * error).all(), (draws.mean(0), error)


def changed(name, f):
    def loss(self, xb):
        terms = CAE.loss(self, xb)
        return {**terms, name: f(self, xb, terms[name])}
    return type('Mutant', (CAE,), dict(loss=loss))


def with_norms(f): return type('Mutant', (CAE,), dict(squared_norms=f))


def matrix(d): return d.nets_.encoder[1].weight


def gradient_of_the_sum(self, xb, code):
    """What `code.backward(ones)` gives: J^T 1."""
    code, pull = vjp(self.code, xb)
    return pull(torch.ones_like(code))[0].flatten(1).square().sum(1)


def by_value(self, xb, code): return closed_squared_norm(code, matrix(self).detach())
def no_graph(self, xb, code): return exact_squared_norm(self.code, xb).detach()
def weights_only(self, xb, code): return matrix(self).square().sum().expand(len(xb))
def one_minus(self, xb, code): return ((1 - code).square() * matrix(self).square().sum(1)).sum(1)
def not_squared(self, xb, code): return CAE.squared_norms(self, xb, code).sqrt()
def of_logits(self, xb, code): return exact_squared_norm(self.nets_.encoder, xb)
def of_f(self, xb, code): return exact_squared_norm(self.code, xb)


def factor_not_squared(self, xb, code):
    return ((code * (1 - code)) * matrix(self).square().sum(1)).sum(1)


def tanh_slope(self, xb, code):
    return ((1 - code.square()).square() * matrix(self).square().sum(1)).sum(1)


def of_the_wrong_map(self, xb, code):
    return exact_squared_norm(lambda x: self.reconstruction(x).flatten(1), xb)


def of_one_layer(self, xb, code):
    """Equation (2) with the last layer's matrix, whatever comes before."""
    return closed_squared_norm(code, self.nets_.encoder[-1].weight)


def random_of_f(self, xb, code): return random_squared_norm(self.code, xb, self.directions)
def untied_in_secret(self, code): return self.nets_.decoder(code @ matrix(self).detach())


WRONG_NORMS = (gradient_of_the_sum, by_value, no_graph, weights_only, one_minus, not_squared,
               factor_not_squared, tanh_slope, of_logits, of_the_wrong_map)
MUTANTS = {
    'no contraction': changed('contraction', lambda self, xb, term: 0 * term),
    'sign of contraction': changed('contraction', lambda self, xb, term: -term),
    'sum over images': changed('contraction', lambda self, xb, term: term * len(xb)),
    'mean over units': changed('contraction', lambda self, xb, term: term / self.code_dim),
    'no reconstruction': changed('reconstruction', lambda self, xb, term: 0 * term),
    'sign of reconstruction': changed('reconstruction', lambda self, xb, term: -term),
    'sum over pixels': changed('reconstruction', lambda self, xb, term: term * xb[0].numel()),
    'no decay': changed('decay', lambda self, xb, term: 0 * term),
    'decay counts twice': changed('decay', lambda self, xb, term: 2 * term),
    **{f.__name__: with_norms(f) for f in WRONG_NORMS},
    'tied by value': type('Mutant', (CAE,), dict(decode=untied_in_secret)),
}
DEEP_MUTANTS = (of_logits, of_the_wrong_map, of_one_layer, no_graph, not_squared,
                gradient_of_the_sum)


@pytest.mark.parametrize('name', MUTANTS)
def test_mutant_of_the_loss_is_caught(name):
    assert_caught(check_loss, MUTANTS[name])


@pytest.mark.parametrize('norms', DEEP_MUTANTS)
def test_mutant_of_the_deep_loss_is_caught(norms):
    assert_caught(check_deep_loss, with_norms(norms))


def test_penalty_on_f_instead_of_the_reconstruction_is_caught():
    whole = dict(penalize='reconstruction')
    assert_caught(partial(check_loss, **whole), with_norms(of_f))
    assert_caught(partial(check_deep_loss, **whole), with_norms(of_f))


@pytest.mark.parametrize('arch', ['layer', 'mlp'])
def test_random_way_through_the_code_instead_of_the_reconstruction_is_caught(arch):
    check = lambda cls: check_random(cls, arch, 'reconstruction')
    assert_caught(check, with_norms(random_of_f))


def test_random_way_trains_like_the_closed_one():
    def norm(**params):
        d = CAE(code_dim=32, epochs=20, batch_size=128, verbose=False, **params).fit(TASK.x_train)
        return exact_squared_norm(d.code, torch.tensor(X)).mean().item()
    closed, random = (norm(jacobian=way, contraction_weight=3e-3) for way in ('closed', 'random'))
    free = norm(contraction_weight=0)
    assert abs(random / closed - 1) < .15 and closed < .6 * free, (random, closed, free)


# ---------------------------------------------------------------- what training makes of it
def test_tied_contraction_helps_a_wide_code_and_free_weights_escape():
    def fit(**kw): return CAE(epochs=40, batch_size=128, verbose=False, **kw).fit(TASK.x_train)
    def whole(d): return lambda x: d.reconstruction(x).flatten(1)
    def norm(f): return exact_squared_norm(f, torch.tensor(X)).mean().item()
    nets = dict(plain=fit(contraction_weight=0), tied=fit(), free=fit(tied=False))
    a = {k: auroc(TASK.y_test, d.decision_function(TASK.x_test)) for k, d in nets.items()}
    f = {k: norm(d.code) for k, d in nets.items()}
    r = {k: norm(whole(d)) for k, d in nets.items()}
    assert a['tied'] > a['plain'] + .06, a
    assert f['free'] < f['tied'] < .5 * f['plain'] and r['free'] > r['tied'], (f, r)


def test_reconstruction_of_tied_weights_against_numpy():
    d = TiedAE(code_dim=6, epochs=1, verbose=False).fit(X)
    W, b = (p.detach().numpy() for p in d.nets_.encoder.parameters())
    c = d.nets_.decoder[0].bias.detach().numpy()
    h = expit(X.reshape(48, -1) @ W.T + b)
    np.testing.assert_allclose(d.encode(X), h, rtol=1e-4)
    np.testing.assert_allclose(d.reconstruct(X).reshape(48, -1), expit(h @ W + c), rtol=1e-4)
    assert isinstance(d.nets_.decoder[0], Bias)
    assert sum(p.numel() for p in d.nets_.parameters()) == 6 * 64 + 6 + 64


# ---------------------------------------------------------------- the contract
CONV = dict(arch='conv', tied=False, code_dim=16, lr=3e-3, contraction_weight=1e-4,
            weight_decay=1e-6, epochs=10)
OTHER_WAYS = [dict(jacobian='exact', code_dim=8), dict(penalize='reconstruction', directions=2),
              dict(tied=False)]
THESE = ['same_twice', 'alone_as_in_a_batch', 'leaves_global_state', 'save_and_load',
         'images_do_not_mix']
WRONG = [dict(contraction_weight=-1), dict(contraction_weight=float('nan')),
         dict(contraction_weight=True), dict(jacobian='numeric'), dict(penalize='g'),
         dict(directions=0), dict(arch='deep'), dict(tied=True, arch='conv'), dict(tied=None),
         dict(tied=1), dict(jacobian='closed', arch='mlp', tied=False),
         dict(jacobian='closed', penalize='reconstruction')]


def test_contract_of_the_deep_one(): check_detector(CAE(batch_size=32, **CONV))


@pytest.mark.parametrize('params', OTHER_WAYS, ids=str)
def test_contract_of_the_other_ways(params):
    check_detector(CAE(epochs=30, batch_size=32, **params), only=THESE)


@pytest.mark.parametrize('params', WRONG, ids=str)
def test_wrong_parameters_are_named(params):
    with pytest.raises(ValueError, match=next(iter(params))): CAE(**params).fit(X)


@pytest.mark.parametrize('shape', [(1, 28, 28), (3, 32, 32)])
def test_defaults_work_on_larger_images(shape):
    x = np.random.default_rng(0).random((12, *shape), dtype='float32')
    for params in (dict(epochs=2), dict(arch='auto', tied=False, epochs=1)):
        d = CAE(**params, verbose=False).fit(x)
        assert d.encode(x).shape == (12, 128) and d.anomaly_map(x).shape == (12, *shape[1:])


def test_mixed_precision_trains():
    for way in ('closed', 'random', 'exact'):
        d = CAE(epochs=2, code_dim=8, precision='bfloat16', jacobian=way, verbose=False)
        d.fit(X)
        assert np.isfinite(d.history_['contraction']).all()
