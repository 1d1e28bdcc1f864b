"""The contractive autoencoder: three ways to one norm, and every term of the loss against mutants of it."""
import numpy as np
import pytest
import torch
from scipy.special import expit
from torch import nn
from torch.autograd.functional import jacobian
from torch.func import vjp

from ad_course.cae import CAE, Shift, TiedAE, closed_norm, exact_norm, random_norm
from ad_course.data import digits
from ad_course.check import check_detector
from ad_course.detector import isolated
from ad_course.metrics import auroc

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
    torch.testing.assert_close(closed_norm(f(xb), net[1].weight), reference(f, xb))
    torch.testing.assert_close(exact_norm(f, xb), reference(f, xb))
    steps = 1e-6 * torch.eye(64).double().view(64, 1, 8, 8)
    with torch.no_grad(): rows = [((f(x + steps) - f(x - steps)) / 2e-6).square().sum() for x in xb]
    torch.testing.assert_close(exact_norm(f, xb), torch.stack(rows), rtol=1e-6, atol=0)


def test_by_hand():
    W = torch.tensor([[3., 4.]])
    f, x = (lambda x: (x.flatten(1) @ W.T).sigmoid()), torch.zeros(2, 1, 1, 2)
    for norm in (closed_norm(f(x), W), exact_norm(f, x), random_norm(f, x)): torch.testing.assert_close(norm, torch.tensor([1.5625, 1.5625]))


def test_exact_of_a_deep_network_and_of_a_linear_map():
    with isolated(0): deep = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 5)).double()
    xb = torch.tensor(X[:4]).double()
    torch.testing.assert_close(exact_norm(deep, xb), reference(deep, xb))
    net = layer()
    torch.testing.assert_close(exact_norm(net, xb), net[1].weight.square().sum().expand(4))


@pytest.mark.parametrize('directions', [1, 3])
def test_random_is_unbiased_with_the_variance_that_theory_gives(directions):
    net, xb = layer(), torch.tensor(X[:5]).double()
    f = sigmoid_of(net)
    with isolated(0), torch.no_grad(): draws = torch.stack([random_norm(f, xb, directions) for _ in range(2000)])
    J = torch.stack([jacobian(lambda x: f(x[None])[0], x).flatten(1) for x in xb])
    S = (J @ J.transpose(1, 2)).square()
    variance = 2 * (S.sum((1, 2)) - S.diagonal(dim1=1, dim2=2).sum(1)) / directions
    error = (variance / 2000)**.5
    assert ((draws.mean(0) - reference(f, xb)).abs() < 4 * error).all()
    np.testing.assert_allclose(draws.var(0), variance, rtol=.25)


def test_random_draws_are_signs_and_differ_between_images():
    """Units that see different pixels: signs leave no error. One image repeated: other draws for each."""
    f = lambda x: x.flatten(1)
    assert (random_norm(f, torch.rand(3, 1, 4, 4)) == 16).all()
    net = layer()
    with isolated(0): draws = random_norm(sigmoid_of(net), torch.tensor(X[:1]).double().repeat(6, 1, 1, 1))
    assert len(set(draws.tolist())) == 6


def test_batch_normalization_is_refused_in_training():
    with isolated(0): net = nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.BatchNorm1d(4))
    with pytest.raises((RuntimeError, ValueError)): exact_norm(net, torch.tensor(X))
    assert exact_norm(net.eval(), torch.tensor(X)).shape == (48,)
    for arch in ('mlp', 'conv'):
        assert not any('BatchNorm' in type(m).__name__ for m in CAE(arch=arch, tied=False, epochs=0).fit(X).nets_.modules())


def test_invariance_that_the_penalty_lacks_and_the_other_has():
    """Encoder over ten, decoder times ten: the norm of f falls a hundredfold, that of g(f) stays."""
    rows = torch.tensor(X).double().flatten(1) - .5
    U = torch.linalg.svd(rows, full_matrices=False)[2][:4]
    f = lambda eps: lambda x: (eps * x @ U.T).sigmoid()
    r = lambda eps: lambda x: 4 / eps * (f(eps)(x) - .5) @ U
    a, b = (exact_norm(f(eps), rows).mean() for eps in (.01, .001))
    assert abs(a / b - 100) < 1
    torch.testing.assert_close(exact_norm(r(.01), rows), exact_norm(r(.001), rows), rtol=1e-3, atol=0)


# ---------------------------------------------------------------- the loss, and its mutants
def check_loss(kind, tied=True, penalize='code', jacobian='exact'):
    """The terms and their gradients against independent formulas."""
    d = kind(code_dim=9, contraction=.7, weight_decay=.01, tied=tied, penalize=penalize, jacobian=jacobian, epochs=2, batch_size=16, verbose=False).fit(X)
    d.nets_.double()
    x, encoder = torch.tensor(X[:8]).double(), d.nets_.encoder[1]
    W, b = encoder.weight, encoder.bias
    h = torch.special.expit(x.flatten(1) @ W.T + b)
    V = W if tied else d.nets_.decoder[0].weight.T
    c = d.nets_.decoder[0].bias
    rebuild = lambda z: torch.special.expit(torch.special.expit(z.flatten(1) @ W.T + b) @ V + c)
    s = h * (1 - h)
    if penalize == 'code': norms = torch.einsum('nj,ji->nji', s, W).square().sum((1, 2))
    else:
        y = rebuild(x)
        norms = torch.einsum('nk,jk,nj,ji->nki', y * (1 - y), V, s, W).square().sum((1, 2))
    want = dict(reconstruction=(x.flatten(1) - rebuild(x)).square().mean(), contraction=.7 * norms.mean(),
                decay=.01 * (W.square().sum() + (0 if tied else V.square().sum())))
    terms = d.loss(x)
    assert set(terms) == set(want), 'names of the terms'
    weights = list(d.nets_.parameters())
    for name in want:
        got = terms[name].mean()
        np.testing.assert_allclose(got.item(), want[name].item(), rtol=1e-8, err_msg=name)
        assert got.requires_grad, f'{name} has no gradient'
        pairs = zip(*(torch.autograd.grad(v, weights, retain_graph=True, allow_unused=True, materialize_grads=True) for v in (got, want[name])))
        for p, q in pairs: np.testing.assert_allclose(p, q, rtol=1e-6, atol=1e-10, err_msg=f'gradient of {name}')


@pytest.mark.parametrize('way', [dict(jacobian='closed'), dict(jacobian='auto'), dict(jacobian='exact'), dict(tied=False), dict(tied=False, jacobian='closed'),
                                 dict(penalize='reconstruction'), dict(penalize='reconstruction', tied=False)], ids=str)
def test_loss_is_the_equation(way): check_loss(CAE, **way)


def changed(name, f):
    def loss(self, xb):
        terms = CAE.loss(self, xb)
        return {**terms, name: f(self, xb, terms[name])}
    return type('Mutant', (CAE,), dict(loss=loss))


def with_norms(f): return type('Mutant', (CAE,), dict(norms=f))


def gradient_of_the_sum(self, xb, code):
    """What `code.backward(ones)` gives: J^T 1."""
    code, pull = vjp(self.code, xb)
    return pull(torch.ones_like(code))[0].flatten(1).square().sum(1)


def by_value(self, xb, code): return closed_norm(code, self.nets_.encoder[1].weight.detach())
def no_graph(self, xb, code): return exact_norm(self.code, xb).detach()
def weights_only(self, xb, code): return self.nets_.encoder[1].weight.square().sum().expand(len(xb))
def one_minus(self, xb, code): return ((1 - code).square() * self.nets_.encoder[1].weight.square().sum(1)).sum(1)
def not_squared(self, xb, code): return CAE.norms(self, xb, code).sqrt()
def factor_not_squared(self, xb, code): return ((code * (1 - code)) * self.nets_.encoder[1].weight.square().sum(1)).sum(1)
def tanh_slope(self, xb, code): return ((1 - code.square()).square() * self.nets_.encoder[1].weight.square().sum(1)).sum(1)
def of_logits(self, xb, code): return exact_norm(self.nets_.encoder, xb)
def of_the_wrong_map(self, xb, code): return exact_norm(lambda x: self.reconstruction(x).flatten(1), xb)
def untied_in_secret(self, code): return self.nets_.decoder(code @ self.nets_.encoder[1].weight.detach())


MUTANTS = {
    'no contraction': changed('contraction', lambda self, xb, term: 0 * term), 'sign of contraction': changed('contraction', lambda self, xb, term: -term),
    'sum over images': changed('contraction', lambda self, xb, term: term * len(xb)), 'mean over units': changed('contraction', lambda self, xb, term: term / self.code_dim),
    'no reconstruction': changed('reconstruction', lambda self, xb, term: 0 * term), 'sign of reconstruction': changed('reconstruction', lambda self, xb, term: -term),
    'sum over pixels': changed('reconstruction', lambda self, xb, term: term * xb[0].numel()), 'no decay': changed('decay', lambda self, xb, term: 0 * term),
    'decay counts twice': changed('decay', lambda self, xb, term: 2 * term),
    **{f.__name__: with_norms(f) for f in (gradient_of_the_sum, by_value, no_graph, weights_only, one_minus, not_squared, factor_not_squared, tanh_slope, of_logits, of_the_wrong_map)},
    'tied by value': type('Mutant', (CAE,), dict(draw=untied_in_secret)),
}


@pytest.mark.parametrize('name', MUTANTS)
def test_mutant_of_the_loss_is_caught(name):
    with pytest.raises(AssertionError): check_loss(MUTANTS[name])


def test_penalty_on_f_instead_of_the_reconstruction_is_caught():
    with pytest.raises(AssertionError): check_loss(with_norms(lambda self, xb, code: exact_norm(self.code, xb)), penalize='reconstruction')


def test_random_way_trains_like_the_closed_one():
    small = dict(code_dim=32, epochs=20, batch_size=128, contraction=3e-3, verbose=False)
    norm = {way: exact_norm(d.code, torch.tensor(X)).mean().item() for way in ('closed', 'random')
            for d in [CAE(jacobian=way, **small).fit(TASK.x_train)]}
    free = exact_norm(CAE(**{**small, 'contraction': 0}).fit(TASK.x_train).code, torch.tensor(X)).mean().item()
    assert abs(norm['random'] / norm['closed'] - 1) < .15 and norm['closed'] < .6 * free, (norm, free)


# ---------------------------------------------------------------- what training makes of it
def test_tied_contraction_helps_a_wide_code_and_free_weights_escape():
    fit = lambda **kw: CAE(epochs=40, batch_size=128, verbose=False, **kw).fit(TASK.x_train)
    nets = dict(plain=fit(contraction=0), tied=fit(), free=fit(tied=False))
    a = {k: auroc(TASK.y_test, d.decision_function(TASK.x_test)) for k, d in nets.items()}
    f = {k: exact_norm(d.code, torch.tensor(X)).mean().item() for k, d in nets.items()}
    r = {k: exact_norm(lambda x: d.reconstruction(x).flatten(1), torch.tensor(X)).mean().item() for k, d in nets.items()}
    assert a['tied'] > a['plain'] + .06, a
    assert f['free'] < f['tied'] < .5 * f['plain'] and r['free'] > r['tied'], (f, r)


def test_reconstruction_of_tied_weights_against_numpy():
    d = TiedAE(code_dim=6, epochs=1, verbose=False).fit(X)
    (W, b), c = ([p.detach().numpy() for p in d.nets_.encoder.parameters()]), d.nets_.decoder[0].bias.detach().numpy()
    h = expit(X.reshape(48, -1) @ W.T + b)
    np.testing.assert_allclose(d.encode(X), h, rtol=1e-4)
    np.testing.assert_allclose(d.reconstruct(X).reshape(48, -1), expit(h @ W + c), rtol=1e-4)
    assert isinstance(d.nets_.decoder[0], Shift) and sum(p.numel() for p in d.nets_.parameters()) == 6 * 64 + 6 + 64


# ---------------------------------------------------------------- the contract
@pytest.mark.parametrize('params', [dict(epochs=40), dict(arch='conv', tied=False, code_dim=16, epochs=10, lr=3e-3, contraction=1e-4, weight_decay=1e-6)], ids=str)
def test_contract(params): check_detector(CAE(batch_size=32, **params))


def test_contract_of_the_other_ways():
    for params in (dict(jacobian='exact', code_dim=8), dict(penalize='reconstruction', directions=2), dict(tied=False)):
        check_detector(CAE(epochs=30, batch_size=32, **params), only=['same_twice', 'alone_as_in_a_batch', 'leaves_global_state', 'save_and_load', 'images_do_not_mix'])


@pytest.mark.parametrize('params', [dict(contraction=-1), dict(contraction=float('nan')), dict(jacobian='numeric'), dict(penalize='g'), dict(directions=0), dict(arch='deep'),
                                    dict(tied=True, arch='conv'), dict(tied=None), dict(jacobian='closed', arch='mlp', tied=False), dict(jacobian='closed', penalize='reconstruction')], ids=str)
def test_wrong_parameters_are_named(params):
    with pytest.raises(ValueError, match=next(iter(params))): CAE(**params).fit(X)


@pytest.mark.parametrize('shape', [(1, 28, 28), (3, 32, 32)])
def test_defaults_work_on_larger_images(shape):
    x = np.random.default_rng(0).random((12, *shape), dtype='float32')
    for d in (CAE(epochs=2, verbose=False).fit(x), CAE(arch='auto', tied=False, epochs=1, verbose=False).fit(x)):
        assert d.encode(x).shape == (12, 128) and d.anomaly_map(x).shape == (12, *shape[1:])


def test_mixed_precision_trains():
    for way in ('closed', 'random', 'exact'):
        d = CAE(epochs=2, code_dim=8, precision='bfloat16', jacobian=way, verbose=False).fit(X)
        assert np.isfinite(d.history_['contraction']).all()
