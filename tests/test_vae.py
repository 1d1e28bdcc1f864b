"""The variational autoencoder against closed forms and scikit-learn; its terms against mutants."""
import math

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from sklearn.exceptions import NotFittedError
from torch import nn
from torch.distributions import MultivariateNormal, Normal, kl_divergence

from ad_course import vae
from ad_course.ae import AE
from ad_course.data import digits
from ad_course.check import check_detector
from ad_course.detector import isolated
from ad_course.vae import (SCORINGS, VAE, PixelNoise, active_units, kl_units, log_normal, log_ratio,
                           reparametrize)
from tests.mutants import assert_caught, mutant

K, SIGMA = 3, .3
X = torch.tensor(digits(normal=3).x_train[:20])


def linear(cls, **params):
    """Fitted, untrained, with linear networks in float64 and weights from a fixed seed."""
    class Linear(cls):
        def networks(self, shape):
            inward, outward = nn.Linear(64, 2 * K), nn.Linear(K, 64)
            return dict(encoder=nn.Sequential(nn.Flatten(), inward), noise=PixelNoise(self.sigma),
                        decoder=nn.Sequential(outward, nn.Unflatten(1, shape)))
    settings = dict(code_dim=K, sigma=SIGMA, epochs=0, verbose=False)
    d = Linear(**{**settings, **params}).fit(X)
    d.nets_.double()
    with torch.no_grad():
        if not list(d.nets_.noise.parameters()): d.nets_.noise.log.fill_(math.log(SIGMA))
    return d


def model(d):
    """W, b of the decoder; mean, variance of q(z|x); both from the raw layers."""
    out, h = d.nets_.decoder[0], d.nets_.encoder(X.double())
    return out.weight, out.bias, h[:, :K], h[:, K:].exp()


def log_evidence(d):
    W, b, *_ = model(d)
    covariance = W @ W.T + SIGMA**2 * torch.eye(64).double()
    return MultivariateNormal(b, covariance).log_prob(X.double().flatten(1)).detach()


def true_posterior(d):
    """Mean and covariance of p(z|x), from the rules for normal distributions."""
    W, b, *_ = model(d)
    precision = torch.eye(K).double() + W.T @ W / SIGMA**2
    return ((X.double().flatten(1) - b) @ W / SIGMA**2) @ precision.inverse(), precision.inverse()


# ---------------------------------------------------------------- what a right class does
def check_loss(cls):
    """Both terms and their weights against torch; the mean over the noise in closed form."""
    for beta in (1., 2.5):
        d = linear(cls, beta=beta)
        W, b, mu, var = model(d)
        xb = X.double()[:2].repeat(2000, 1, 1, 1)
        with isolated(0): terms = {k: v.detach() for k, v in d.loss(xb).items()}
        assert set(terms) == {'reconstruction', 'kl'}
        for i in (0, 1):
            error = (X[i].double().flatten() - mu[i] @ W.T - b).square().sum()
            error = error + (W.square().sum(0) * var[i]).sum()      # its mean over the noise
            constant = 64 * math.log(SIGMA) + 32 * math.log(2 * math.pi)
            mine = terms['reconstruction'][i::2]
            gap = mine.mean() - (error / (2 * SIGMA**2) + constant)
            assert abs(gap) < 5 * mine.std() / 2000**.5 + 1e-9
            assert mine.std() > 1e-3, 'no noise in the code'
            kl = beta * kl_divergence(Normal(mu[i], var[i].sqrt()), Normal(0., 1.)).sum()
            torch.testing.assert_close(terms['kl'][i], kl.detach())


def check_gradients(cls):
    """Gradients by mu and log sigma^2: of the KL exactly, of the rest within its sampling error."""
    d, noisy = linear(cls, beta=1.5), []
    W, b, mu, var = (t.detach() for t in model(d))
    by = d.nets_.encoder[1].bias
    with isolated(0):
        for _ in range(20):
            terms = d.loss(X.double()[:1].repeat(500, 1, 1, 1))
            mean = terms['reconstruction'].mean()
            noisy.append(torch.autograd.grad(mean, by, retain_graph=True)[0])
    residual = mu[0] @ W.T + b - X[0].double().flatten()
    exact = torch.cat([residual @ W, W.square().sum(0) * var[0] / 2]) / SIGMA**2
    noisy = torch.stack(noisy)
    assert ((noisy.mean(0) - exact).abs() < 6 * noisy.std(0) / 20**.5).all()
    assert (noisy.std(0) > 0).all()
    of_kl, = torch.autograd.grad(terms['kl'].mean(), by)
    torch.testing.assert_close(of_kl, 1.5 * torch.cat([mu[0], (var[0] - 1) / 2]))


def check_scores(cls):
    """The four scores against sums over the same draws, whatever beta weighs in the loss."""
    for beta in (1., 2.5): check_scores_with(linear(cls, n_draws=7, beta=beta))


def check_scores_with(d):
    W, b, mu, var = model(d)
    eps, x = d.draws(7).double(), X.double().flatten(1)
    assert eps.shape == (7, K) and torch.equal(eps, d.draws(7).double())
    z, q, p = mu + var.sqrt() * eps[:, None], Normal(mu, var.sqrt()), Normal(0., 1.)    # (7, n, K)
    likelihood = Normal(z @ W.T + b, SIGMA).log_prob(x).sum(-1)                         # (7, n)
    weights = likelihood + p.log_prob(z).sum(-1) - q.log_prob(z).sum(-1)
    want = dict(reconstruction=(x - mu @ W.T - b).square().mean(1), probability=-likelihood.mean(0),
                elbo=-likelihood.mean(0) + kl_divergence(q, p).sum(1),
                importance=-weights.exp().mean(0).log())
    for scoring in SCORINGS:
        mine = d.set_params(scoring=scoring).image_score(X.double())
        torch.testing.assert_close(mine, want[scoring])


def at_true_posterior(d):
    """The encoder made to give p(z|x), diagonal for a decoder with orthogonal columns."""
    with torch.no_grad():
        q, _ = torch.linalg.qr(d.nets_.decoder[0].weight)
        d.nets_.decoder[0].weight[:] = q * torch.tensor([1.5, 1., .5]).double()
        W, b, *_ = model(d)
        mean, cov = true_posterior(d)
        V = W @ cov / SIGMA**2
        d.nets_.encoder[1].weight[:] = torch.cat([V.T, 0 * V.T])
        d.nets_.encoder[1].bias[:] = torch.cat([-V.T @ b, cov.diagonal().log()])
    torch.testing.assert_close(model(d)[2], mean)
    return d, -log_evidence(d)


def check_bounds(cls):
    """At the true posterior both bounds give log p(x); elsewhere the ELBO is off by a KL."""
    d, exact = at_true_posterior(linear(cls, n_draws=5))
    def score(): return d.image_score(X.double()).detach()
    d.scoring = 'importance'
    torch.testing.assert_close(score(), exact)
    points = torch.eye(K).double() * K**.5                        # mean 0, variance 1, exactly
    d.draws, d.n_draws, d.scoring = lambda n: torch.cat([points, -points]), 2 * K, 'elbo'
    torch.testing.assert_close(score(), exact)
    with torch.no_grad(): d.nets_.encoder[1].bias[K:] += 1.
    torch.testing.assert_close(score(), exact + K * (math.e - 1 - 1) / 2)


def check_importance_converges(cls):
    """With a spoiled encoder it falls at every doubling on the same draws, toward -log p(x)."""
    d, exact = at_true_posterior(linear(cls, scoring='importance', n_draws=512))
    shift = torch.tensor([.05] * K + [1.] * K).double()
    with torch.no_grad(): d.nets_.encoder[1].bias += shift
    eps, falls = d.draws(512).double(), []
    for L in (1, 8, 64, 512):
        scores = []
        for group in eps.split(L):
            d.draws, d.n_draws = (lambda n, group=group: group), L
            scores.append(d.image_score(X.double()).detach())
        falls.append(torch.stack(scores).mean(0))
    assert all((b <= a + 1e-9).all() for a, b in zip(falls, falls[1:]))
    assert (falls[0] - exact).mean() > .3 and (falls[-1] - exact).abs().mean() < .15


def check_noise_is_shared(cls):
    """Every image sees the same draws wherever it stands, and every call the same."""
    d = linear(cls, n_draws=3)
    for scoring in SCORINGS:
        s = d.set_params(scoring=scoring).image_score(X.double())
        torch.testing.assert_close(d.image_score(X.double()), s, rtol=0, atol=0)
        torch.testing.assert_close(d.image_score(X.double().flip(0)).flip(0), s)
        torch.testing.assert_close(d.image_score(X.double()[4:5]), s[4:5])


def check_decay(cls):
    d = linear(cls, weight_decay=.3)
    squares = [layer.weight.square().sum() for layer in (d.nets_.encoder[1], d.nets_.decoder[0])]
    torch.testing.assert_close(d.loss(X.double())['decay'], .3 * sum(squares))


def check_sigma_is_learned(cls):
    """d loss / d log sigma = d - S / sigma^2, S the squared error of an image at its own draw."""
    d = linear(cls, sigma='learned')
    with isolated(0): terms = d.loss(X.double())
    slope, = torch.autograd.grad(terms['reconstruction'].sum(), d.nets_.noise.log)
    s = .1
    S = 2 * s**2 * (terms['reconstruction'] - 64 * (math.log(s) + math.log(2 * math.pi) / 2))
    torch.testing.assert_close(slope, (64 - S / s**2).sum().detach(), rtol=1e-5, atol=1e-5)


def check_looks(cls):
    """Nats of each unit, codes, maps and new images."""
    d = linear(cls)
    W, b, mu, var = (t.detach() for t in model(d))
    d.nets_.float()
    x, close = X.numpy(), dict(rtol=1e-3, atol=1e-5)
    spent = kl_divergence(Normal(mu, var.sqrt()), Normal(0., 1.)).numpy()
    np.testing.assert_allclose(d.kl_per_unit(x), spent, **close)
    np.testing.assert_allclose(d.encode(x), mu.numpy(), **close)
    squares = (X - (mu @ W.T + b).float().view_as(X)).square().numpy()
    np.testing.assert_allclose(d.anomaly_map(x)[:, None], squares, **close)
    s, covariance = d.sample(4000), (W @ W.T).numpy()
    assert s.shape == (4000, 1, 8, 8) and np.array_equal(s, d.sample(4000))
    atol = .12 * covariance.max()
    np.testing.assert_allclose(np.cov(s.reshape(4000, -1).T), covariance, atol=atol)


CHECKS = [check_loss, check_gradients, check_scores, check_bounds, check_importance_converges,
          check_noise_is_shared, check_decay, check_sigma_is_learned, check_looks]


@pytest.mark.parametrize('check', CHECKS, ids=lambda c: c.__name__)
def test_vae(check): check(VAE)


# ---------------------------------------------------------------- mutants: the named check catches
def changed(**terms):
    """VAE with some terms of its loss replaced by a function of the old term."""
    def loss(self, xb):
        return {k: terms.get(k, lambda v: v)(v) for k, v in VAE.loss(self, xb).items()}
    return with_method(loss=loss)


def with_method(**methods): return type('Mutant', (VAE,), methods)


def scored(**change):
    def image_score(self, xb):
        score = VAE.image_score(self, xb)
        return change[self.scoring](score, self, xb) if self.scoring in change else score
    return with_method(image_score=image_score)


def split(log_p, log_ratios):
    """The score of the blog: the sum of two logarithms of means."""
    log_p, log_ratios = torch.stack(log_p), torch.stack(log_ratios)
    return 2 * math.log(len(log_p)) - log_p.logsumexp(0) - log_ratios.logsumexp(0)


def detached(mu, logvar, eps):
    return reparametrize(mu.detach(), logvar.detach(), eps) + 0 * mu   # a graph, but no gradient


def kl_of(self, xb): return kl_units(*self.posterior(xb)).sum(1)
def fresh_draws(self, n): return torch.randn(n, self.code_dim)


def noise_by_place(self, xb):
    mu, logvar = self.posterior(xb)
    eps = torch.randn(mu.shape, generator=self.rng()).to(xb)
    return -self.log_likelihood(xb, reparametrize(mu, logvar, eps))


def no_constant(self, xb, z):
    squares = (xb - self.nets_.decoder(z)).square().flatten(1).sum(1)
    return -squares / (2 * self.nets_.noise.log.exp()**2)


def mean_over_pixels(self, xb, z):
    return log_normal(xb, self.nets_.decoder(z), self.nets_.noise.log).flatten(1).mean(1)


def beta_again(self, xb):
    terms = VAE.loss(self, xb)
    return {**terms, 'kl': self.beta * terms['kl']}


def of_the_batch(self, x): return VAE.kl_per_unit(self, x).mean(0, keepdims=True).repeat(len(x), 0)
def a_third_off(self, xb): return self.nets_.decoder(self.code(xb) + .3)


CLASSES = {
    'no KL': (check_loss, changed(kl=lambda v: 0 * v)),
    'KL with the wrong sign': (check_loss, changed(kl=lambda v: -v)),
    'KL clamped at 0, as in PyOD 3.6.7': (check_loss, changed(kl=lambda v: v.clamp(0, 0))),
    'KL averaged over units': (check_loss, changed(kl=lambda v: v / K)),
    'no reconstruction': (check_loss, changed(reconstruction=lambda v: 0 * v)),
    'wrong sign of reconstruction': (check_loss, changed(reconstruction=lambda v: -v)),
    'mean over pixels': (check_loss, with_method(log_likelihood=mean_over_pixels)),
    'no log sigma': (check_loss, with_method(log_likelihood=no_constant)),
    'sigma not learned': (check_sigma_is_learned, with_method(log_likelihood=no_constant)),
    'no gradient of the KL': (check_gradients, changed(kl=lambda v: v.detach() + 0 * v)),
    'beta applied twice': (check_loss, with_method(loss=beta_again)),
    'no decay': (check_decay, changed(decay=lambda v: 0 * v)),
    'wrong sign of decay': (check_decay, changed(decay=lambda v: -v)),
    'ELBO without KL': (check_scores, scored(elbo=lambda s, d, xb: s - kl_of(d, xb))),
    'ELBO with beta': (check_scores, scored(elbo=lambda s, d, xb: s + (d.beta - 1) * kl_of(d, xb))),
    'probability with beta': (check_scores, scored(probability=lambda s, d, xb: s * d.beta)),
    'ELBO upside down': (check_bounds, scored(elbo=lambda s, d, xb: -s)),
    'probability upside down': (check_scores, scored(probability=lambda s, d, xb: -s)),
    'reconstruction summed': (check_scores, scored(reconstruction=lambda s, d, xb: s * 64)),
    'no 1/L': (check_bounds, scored(importance=lambda s, d, xb: s - math.log(d.n_draws))),
    'fresh noise, as in PyOD': (check_noise_is_shared, with_method(draws=fresh_draws)),
    'noise by place': (check_noise_is_shared, with_method(image_score=noise_by_place)),
    'KL of the batch': (check_looks, with_method(kl_per_unit=of_the_batch)),
    'narrow prior': (check_looks, with_method(sample=lambda self, n: VAE.sample(self, n) * .5)),
    'map of a noisy reconstruction': (check_looks, with_method(reconstruction=a_third_off)),
}
FUNCTIONS = {   # of the module: name, (check, mutant)
    'no noise in the code': ('reparametrize', check_loss, lambda mu, lv, e: mu + 0 * lv),
    'variance taken for the deviation': ('reparametrize', check_loss,
                                         lambda mu, lv, e: reparametrize(mu, 2 * lv, e)),
    'no reparametrization': ('reparametrize', check_gradients, detached),
    'no p(z)/q(z|x)': ('log_ratio', check_bounds, lambda *a: 0 * log_ratio(*a)),
    'ratio upside down': ('log_ratio', check_importance_converges, lambda *a: -log_ratio(*a)),
    'sum of two logarithms': ('importance_score', check_importance_converges, split),
}


@pytest.mark.parametrize('name', CLASSES)
def test_mutants_are_caught(name):
    check, broken = CLASSES[name]
    assert_caught(check, broken)


@pytest.mark.parametrize('name', FUNCTIONS)
def test_mutants_of_the_equations_are_caught(name):
    function, check, wrong = FUNCTIONS[name]
    with mutant(vae, **{function: wrong}): assert_caught(check, VAE)


# ---------------------------------------------------------------- and the rest
def test_kl_and_density_by_hand():
    zero, one, two = torch.tensor([0., 1., 2.])
    assert kl_units(one, zero) == .5 and kl_units(zero, zero) == 0
    torch.testing.assert_close(kl_units(zero, two.log()), torch.tensor((1 - math.log(2)) / 2))
    by_hand = torch.tensor(-.5 - math.log(2 * math.pi) / 2)
    torch.testing.assert_close(log_normal(one, zero, zero), by_hand)


def test_kl_gradient_in_float64():
    rng = torch.Generator().manual_seed(0)
    mu, logvar = torch.randn(2, 6, dtype=torch.float64, generator=rng).requires_grad_()
    assert torch.autograd.gradcheck(kl_units, (mu, logvar))
    theirs = kl_divergence(Normal(mu, (logvar / 2).exp()), Normal(0., 1.))
    slopes = [torch.autograd.grad(f.sum(), (mu, logvar)) for f in (kl_units(mu, logvar), theirs)]
    for a, b in zip(*slopes): torch.testing.assert_close(a, b)


def test_ratio_of_prior_and_posterior_against_torch():
    rng = torch.Generator().manual_seed(0)
    mu, logvar, eps = torch.randn(3, 4, 6, dtype=torch.float64, generator=rng)
    q, z = Normal(mu, (logvar / 2).exp()), reparametrize(mu, logvar, eps)
    torch.testing.assert_close((z - mu) / q.stddev, eps)
    want = (Normal(0., 1.).log_prob(z) - q.log_prob(z)).sum(1)
    torch.testing.assert_close(log_ratio(mu, logvar, eps), want)


def test_active_units_are_those_whose_mean_varies():
    codes = np.array([[0., 1., .1], [0., -1., .2], [0., 0., .15]])
    assert active_units(codes).tolist() == [False, True, False]
    assert active_units(codes, .001).tolist() == [False, True, True]
    mu = np.random.default_rng(0).normal(0, (1, 2, 3), (50, 3))
    assert active_units(mu, np.sort(mu.var(0))[-2:].mean()).tolist() == [False, False, True]


def test_probabilistic_pca_is_where_training_rests(monkeypatch):
    """At the optimum of probabilistic PCA the gradient is zero (Lucas et al. 2019)."""
    d, x = linear(VAE, sigma='learned'), X.double()
    pca = PCA().fit(x.flatten(1).numpy())
    lam = torch.tensor(pca.explained_variance_ * (len(x) - 1) / len(x))   # maximum likelihood: / n
    noise, u = lam[K:].sum() / (64 - K), torch.tensor(pca.components_[:K].T.copy())
    b, W = torch.tensor(pca.mean_), u * (lam[:K] - noise).sqrt()
    V, points = W / lam[:K], torch.eye(K).double() * K**.5
    even = torch.cat([points, -points])                                   # mean 0, variance 1
    monkeypatch.setattr(torch, 'randn_like', lambda mu: even.repeat_interleave(len(x), 0))
    inward, outward = d.nets_.encoder[1], d.nets_.decoder[0]
    with torch.no_grad():
        outward.weight[:], outward.bias[:] = W, b
        inward.weight[:] = torch.cat([V.T, 0 * V.T])
        inward.bias[:] = torch.cat([-V.T @ b, (noise / lam[:K]).log()])
        d.nets_.noise.log.fill_(noise.log() / 2)
    def steepest():
        loss = sum(t.mean() for t in d.loss(x.repeat(2 * K, 1, 1, 1)).values())
        return max(g.abs().max() for g in torch.autograd.grad(loss, list(d.nets_.parameters())))
    assert steepest() < 1e-8
    d.beta = 1.5
    assert steepest() > .1


def test_importance_memory_does_not_grow_with_draws():
    d, seen = linear(VAE, scoring='importance', n_draws=50), []
    def note(net, args, out): seen.append(len(args[0]))
    handle = d.nets_.decoder.register_forward_hook(note)
    d.image_score(X.double())
    handle.remove()
    assert seen == [len(X)] * 50      # one decoding of the batch at a time


def test_a_large_beta_collapses_the_code():
    x = digits(normal=3).x_train
    params = dict(sigma=.1, epochs=30, batch_size=32, lr=3e-3, verbose=False)
    on, off = (VAE(beta=beta, **params).fit(x) for beta in (1, 100))
    assert active_units(on.encode(x)).all() and on.kl_per_unit(x).sum(1).mean() > 5
    assert not active_units(off.encode(x)).any() and off.kl_per_unit(x).sum(1).mean() < .05


def test_what_looks_inside_wants_fit():
    for f in (lambda d: d.sample(3), lambda d: d.kl_per_unit(X), lambda d: d.encode(X)):
        with pytest.raises(NotFittedError, match='fit'): f(VAE())


WRONG = [dict(beta=-1), dict(beta=float('nan')), dict(beta=True), dict(sigma=0), dict(sigma=True),
         dict(sigma='fixed'), dict(sigma=float('inf')), dict(scoring='kl'), dict(n_draws=0),
         dict(n_draws=1.5)]


@pytest.mark.parametrize('params', WRONG, ids=str)
def test_wrong_settings(params):
    with pytest.raises(ValueError, match=next(iter(params))): VAE(**params).fit(X)


def test_contract_with_fixed_sigma():
    params = dict(sigma=.2, n_draws=4, scoring='importance', weight_decay=1e-3)
    check_detector(VAE(epochs=20, batch_size=32, lr=3e-3, **params))


def test_reconstruction_score_is_that_of_the_autoencoder():
    d = linear(VAE, scoring='reconstruction')
    torch.testing.assert_close(d.image_score(X.double()), AE.image_score(d, X.double()))
