"""The variational autoencoder against closed forms, scikit-learn and torch.distributions; and every term of it defended against mutants."""
import math

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from torch import nn
from torch.distributions import MultivariateNormal, Normal, kl_divergence

from ad_course.ae import AE
from ad_course.data import digits
from ad_course.check import check_detector
from ad_course.detector import isolated
from ad_course.vae import SCORINGS, VAE, PixelNoise, kl_units, log_normal

K, SIGMA = 3, .3
X = torch.tensor(digits(normal=3).x_train[:20])


def linear(cls, **params):
    """A fitted, untrained detector of this class with linear networks in float64 and weights from a fixed seed."""
    class Linear(cls):
        def networks(self, shape):
            nets = dict(encoder=nn.Sequential(nn.Flatten(), nn.Linear(64, 2 * K)), decoder=nn.Sequential(nn.Linear(K, 64), nn.Unflatten(1, shape)),
                        noise=PixelNoise(self.sigma))
            return nets
    d = Linear(**{**dict(code_dim=K, sigma=SIGMA, epochs=0, verbose=False), **params}).fit(X)
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
    return MultivariateNormal(b, W @ W.T + SIGMA**2 * torch.eye(64).double()).log_prob(X.double().flatten(1)).detach()


def true_posterior(d):
    """Mean and covariance of p(z|x), from the rules for normal distributions."""
    W, b, *_ = model(d)
    precision = torch.eye(K).double() + W.T @ W / SIGMA**2
    return ((X.double().flatten(1) - b) @ W / SIGMA**2) @ precision.inverse(), precision.inverse()


# ---------------------------------------------------------------- what a right class does
def check_loss(cls):
    """Both terms against torch.distributions, with the expectation over the noise in closed form; weights included."""
    for beta in (1., 2.5):
        d = linear(cls, beta=beta)
        W, b, mu, var = model(d)
        xb = X.double()[:2].repeat(2000, 1, 1, 1)
        with isolated(0): terms = {k: v.detach() for k, v in d.loss(xb).items()}
        assert set(terms) == {'reconstruction', 'kl'}
        for i in (0, 1):
            error = (X[i].double().flatten() - mu[i] @ W.T - b).square().sum() + (W.square().sum(0) * var[i]).sum()   # its mean over the noise
            exact = error / (2 * SIGMA**2) + 64 * math.log(SIGMA) + 32 * math.log(2 * math.pi)
            mine = terms['reconstruction'][i::2]
            assert abs(mine.mean() - exact) < 5 * mine.std() / 2000**.5 + 1e-9
            assert mine.std() > 1e-3, 'no noise in the code'
            kl = beta * kl_divergence(Normal(mu[i], var[i].sqrt()), Normal(0., 1.)).sum()
            torch.testing.assert_close(terms['kl'][i], kl.detach())


def check_gradients(cls):
    """The gradient of each term by mu and log sigma^2: of the KL exactly, of the mean reconstruction within its Monte Carlo error."""
    d, noisy = linear(cls, beta=1.5), []
    W, b, mu, var = (t.detach() for t in model(d))
    by = d.nets_.encoder[1].bias
    with isolated(0):
        for _ in range(20):
            terms = d.loss(X.double()[:1].repeat(500, 1, 1, 1))
            noisy.append(torch.autograd.grad(terms['reconstruction'].mean(), by, retain_graph=True)[0])
    residual = mu[0] @ W.T + b - X[0].double().flatten()
    exact = torch.cat([residual @ W, W.square().sum(0) * var[0] / 2]) / SIGMA**2
    noisy = torch.stack(noisy)
    assert ((noisy.mean(0) - exact).abs() < 6 * noisy.std(0) / 20**.5).all() and (noisy.std(0) > 0).all()
    torch.testing.assert_close(torch.autograd.grad(terms['kl'].mean(), by)[0], 1.5 * torch.cat([mu[0], (var[0] - 1) / 2]))


def check_scores(cls):
    """The four scores against sums over the same draws with torch.distributions, and against the AE."""
    d = linear(cls, samples=7)
    W, b, mu, var = model(d)
    eps = d.draws().double()
    assert eps.shape == (7, K) and torch.equal(eps, d.draws().double())
    z = mu + var.sqrt() * eps[:, None]                                                         # (7, n, K)
    likelihood = Normal(z @ W.T + b, SIGMA).log_prob(X.double().flatten(1)).sum(-1)            # (7, n)
    weights = likelihood + Normal(0., 1.).log_prob(z).sum(-1) - Normal(mu, var.sqrt()).log_prob(z).sum(-1)
    want = dict(reconstruction=(X.double().flatten(1) - mu @ W.T - b).square().mean(1), probability=-likelihood.mean(0),
                elbo=-likelihood.mean(0) + kl_divergence(Normal(mu, var.sqrt()), Normal(0., 1.)).sum(1), importance=-weights.exp().mean(0).log())
    for scoring in SCORINGS: torch.testing.assert_close(d.set_params(scoring=scoring).image_score(X.double()), want[scoring])


def at_true_posterior(d):
    """The encoder made to give p(z|x) itself, which is diagonal for a decoder with orthogonal columns."""
    with torch.no_grad():
        q, _ = torch.linalg.qr(d.nets_.decoder[0].weight)
        d.nets_.decoder[0].weight[:] = q * torch.tensor([1.5, 1., .5]).double()
        W, b, *_ = model(d)
        mean, cov = true_posterior(d)
        V = W @ cov / SIGMA**2
        d.nets_.encoder[1].weight[:], d.nets_.encoder[1].bias[:] = torch.cat([V.T, 0 * V.T]), torch.cat([-V.T @ b, cov.diagonal().log()])
    torch.testing.assert_close(model(d)[2], mean)
    return d, -log_evidence(d)


def check_bounds(cls):
    """Where q is the true posterior, ELBO and importance weights give log p(x) itself; where it is not, the ELBO is off by KL(q || p(z|x))."""
    d, exact = at_true_posterior(linear(cls, samples=5))
    torch.testing.assert_close(d.set_params(scoring='importance').image_score(X.double()).detach(), exact)
    d.draws = lambda: torch.cat([torch.eye(K), -torch.eye(K)]).double() * K**.5                # mean 0, variance 1, exactly
    d.samples = 2 * K
    torch.testing.assert_close(d.set_params(scoring='elbo').image_score(X.double()).detach(), exact)
    with torch.no_grad(): d.nets_.encoder[1].bias[K:] += 1.
    torch.testing.assert_close(d.image_score(X.double()).detach(), exact + K * (math.e - 1 - 1) / 2)


def check_importance_converges(cls):
    """With a spoiled encoder, the importance score falls at every doubling on the same draws, and comes near -log p(x)."""
    d, exact = at_true_posterior(linear(cls, scoring='importance', samples=512))
    with torch.no_grad(): d.nets_.encoder[1].bias += torch.tensor([.05] * K + [1.] * K).double()
    eps, falls = d.draws().double(), []
    for L in (1, 8, 64, 512):
        scores = []
        for group in eps.split(L):
            d.draws, d.samples = (lambda group=group: group), L
            scores.append(d.image_score(X.double()).detach())
        falls.append(torch.stack(scores).mean(0))
    assert all((b <= a + 1e-9).all() for a, b in zip(falls, falls[1:]))
    assert (falls[0] - exact).mean() > .3 and (falls[-1] - exact).abs().mean() < .15


def check_noise_is_shared(cls):
    """Every image sees the same draws wherever it stands, and every call the same."""
    d = linear(cls, samples=3)
    for scoring in SCORINGS:
        s = d.set_params(scoring=scoring).image_score(X.double())
        torch.testing.assert_close(d.image_score(X.double()), s, rtol=0, atol=0)
        torch.testing.assert_close(d.image_score(X.double().flip(0)).flip(0), s)
        torch.testing.assert_close(d.image_score(X.double()[4:5]), s[4:5])


def check_decay(cls):
    d = linear(cls, weight_decay=.3)
    want = .3 * (d.nets_.encoder[1].weight.square().sum() + d.nets_.decoder[0].weight.square().sum())
    torch.testing.assert_close(d.loss(X.double())['decay'], want)


def check_sigma_is_learned(cls):
    """d loss / d log sigma = d - S / sigma^2, S the squared error of an image at its own draw."""
    d = linear(cls, sigma='learned')
    with isolated(0): terms = d.loss(X.double())
    slope, = torch.autograd.grad(terms['reconstruction'].sum(), d.nets_.noise.log)
    s = .1
    S = 2 * s**2 * (terms['reconstruction'] - 64 * (math.log(s) + math.log(2 * math.pi) / 2))
    torch.testing.assert_close(slope, (64 - S / s**2).sum().detach(), rtol=1e-5, atol=1e-5)


def check_looks(cls):
    """rates, active units, samples and maps."""
    d = linear(cls)
    W, b, mu, var = (t.detach() for t in model(d))
    d.nets_.float()
    x = X.numpy()
    np.testing.assert_allclose(d.rates(x), kl_divergence(Normal(mu, var.sqrt()), Normal(0., 1.)).numpy(), rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(d.encode(x), mu.numpy(), rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(d.anomaly_map(x)[:, None], (X - (mu @ W.T + b).float().view_as(X)).square().numpy(), rtol=1e-3, atol=1e-5)
    least = float(np.sort(mu.numpy().var(0))[-2:].mean())
    assert d.active_units(x, least).sum() == 1
    s = d.sample(4000)
    assert s.shape == (4000, 1, 8, 8) and np.array_equal(s, d.sample(4000))
    np.testing.assert_allclose(np.cov(s.reshape(4000, -1).T), (W @ W.T).numpy(), atol=.12 * float((W @ W.T).max()))


CHECKS = [check_loss, check_gradients, check_scores, check_bounds, check_importance_converges, check_noise_is_shared, check_decay, check_sigma_is_learned, check_looks]


@pytest.mark.parametrize('check', CHECKS, ids=lambda c: c.__name__)
def test_vae(check): check(VAE)


# ---------------------------------------------------------------- mutants: each must be caught by the named check
def changed(**terms):
    """VAE with some terms of its loss replaced by a function of the old term."""
    def loss(self, xb): return {k: terms.get(k, lambda v: v)(v) for k, v in VAE.loss(self, xb).items()}
    return type('Mutant', (VAE,), dict(loss=loss))


def with_method(**methods): return type('Mutant', (VAE,), methods)


def weigh(noise=lambda e: e, ratio=lambda r: r, likelihood=lambda v: v, logvar=lambda v: v):
    def f(self, xb, mu, lv, eps):
        a, b = VAE.weigh(self, xb, mu, logvar(lv), noise(eps))
        return likelihood(a), ratio(b)
    return with_method(weigh=f)


def detached(self, xb, mu, logvar, eps):
    a, b = VAE.weigh(self, xb, mu.detach(), logvar.detach(), eps)
    return a + 0 * mu.sum(1), b                        # still a graph, but no gradient in it


def split(self, xb):
    """The score of the blog: the sum of two logarithms of means."""
    if self.scoring != 'importance': return VAE.image_score(self, xb)
    a, b = (torch.stack(p) for p in zip(*[self.weigh(xb, *self.posterior(xb), e) for e in self.draws().to(xb)]))
    return 2 * math.log(self.samples) - a.logsumexp(0) - b.logsumexp(0)


def scored(**change):
    def image_score(self, xb): return change.get(self.scoring, lambda s, *_: s)(VAE.image_score(self, xb), self, xb)
    return with_method(score=score)


def fresh_draws(self): return torch.randn(self.samples, self.code_dim)


def noise_by_place(self, xb):
    mu, logvar = self.posterior(xb)
    z = mu + (logvar / 2).exp() * torch.randn(mu.shape, generator=self.rng()).to(xb)
    return -self.log_likelihood(xb, z)


def no_constant(self, xb, z): return -(xb - self.nets_.decoder(z)).square().flatten(1).sum(1) / (2 * self.nets_.noise.log.exp()**2)


def mean_over_pixels(self, xb, z): return log_normal(xb, self.nets_.decoder(z), self.nets_.noise.log).flatten(1).mean(1)


MUTANTS = {
    'no KL': (check_loss, changed(kl=lambda v: 0 * v)),
    'KL with the wrong sign': (check_loss, changed(kl=lambda v: -v)),
    'KL clamped at a capacity of 0, as in PyOD 3.6.7': (check_loss, changed(kl=lambda v: v.clamp(0, 0))),
    'KL averaged over units': (check_loss, changed(kl=lambda v: v / K)),
    'no reconstruction': (check_loss, changed(reconstruction=lambda v: 0 * v)),
    'reconstruction with the wrong sign': (check_loss, changed(reconstruction=lambda v: -v)),
    'likelihood averaged over pixels': (check_loss, with_method(log_likelihood=mean_over_pixels)),
    'likelihood without log sigma': (check_loss, with_method(log_likelihood=no_constant)),
    'log sigma not in the likelihood: sigma cannot be learned': (check_sigma_is_learned, with_method(log_likelihood=no_constant)),
    'no noise in the code': (check_loss, weigh(noise=lambda e: 0 * e)),
    'variance taken for the deviation': (check_loss, weigh(logvar=lambda v: 2 * v)),
    'reconstruction cut from the encoder: no reparametrization': (check_gradients, with_method(weigh=detached)),
    'gradient of the KL lost': (check_gradients, changed(kl=lambda v: v.detach() + 0 * v)),
    'beta applied twice': (check_loss, with_method(loss=lambda self, xb: {k: v * (self.beta if k == 'kl' else 1) for k, v in VAE.loss(self, xb).items()})),
    'decay forgotten': (check_decay, changed(decay=lambda v: 0 * v)),
    'decay with the wrong sign': (check_decay, changed(decay=lambda v: -v)),
    'ELBO without the KL': (check_scores, scored(elbo=lambda s, self, xb: s - kl_units(*self.posterior(xb)).sum(1))),
    'ELBO upside down': (check_bounds, scored(elbo=lambda s, self, xb: -s)),
    'probability upside down': (check_scores, scored(probability=lambda s, self, xb: -s)),
    'reconstruction summed': (check_scores, scored(reconstruction=lambda s, self, xb: s * 64)),
    'importance without 1/L': (check_bounds, scored(importance=lambda s, self, xb: s - math.log(self.samples))),
    'importance without p(z)/q(z|x)': (check_bounds, weigh(ratio=lambda r: 0 * r)),
    'importance with the ratio upside down': (check_importance_converges, weigh(ratio=lambda r: -r)),
    'importance as a sum of two logarithms, as in the blog': (check_importance_converges, with_method(score=split)),
    'fresh noise at each call, as in PyOD': (check_noise_is_shared, with_method(draws=fresh_draws)),
    'noise by the place in the batch': (check_noise_is_shared, with_method(score=noise_by_place)),
    'KL of the batch instead of the image': (check_looks, with_method(rates=lambda self, x: VAE.rates(self, x).mean(0, keepdims=True).repeat(len(x), 0))),
    'samples from too narrow a prior': (check_looks, with_method(sample=lambda self, n: VAE.sample(self, n) * .5)),
    'map of a noisy reconstruction': (check_looks, with_method(reconstruction=lambda self, xb: self.nets_.decoder(self.code(xb) + .3))),
}


@pytest.mark.parametrize('name', MUTANTS)
def test_mutants_are_caught(name):
    check, mutant = MUTANTS[name]
    with pytest.raises(AssertionError): check(mutant)


# ---------------------------------------------------------------- and the rest
def test_kl_and_density_by_hand():
    assert kl_units(torch.tensor(1.), torch.tensor(0.)) == .5 and kl_units(torch.tensor(0.), torch.tensor(0.)) == 0
    torch.testing.assert_close(kl_units(torch.tensor(0.), torch.tensor(2.).log()), torch.tensor((1 - math.log(2)) / 2))
    torch.testing.assert_close(log_normal(torch.tensor(1.), torch.tensor(0.), torch.tensor(0.)), torch.tensor(-.5 - math.log(2 * math.pi) / 2))


def test_kl_gradient_in_float64():
    mu, logvar = torch.randn(2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.autograd.gradcheck(kl_units, (mu, logvar))
    for mine, theirs in zip(torch.autograd.grad(kl_units(mu, logvar).sum(), (mu, logvar)),
                            torch.autograd.grad(kl_divergence(Normal(mu, (logvar / 2).exp()), Normal(0., 1.)).sum(), (mu, logvar))):
        torch.testing.assert_close(mine, theirs)


def test_probabilistic_pca_is_where_training_rests(monkeypatch):
    """At the maximum-likelihood weights and noise of probabilistic PCA the gradient of the whole loss is zero (Lucas et al. 2019)."""
    d, x = linear(VAE, sigma='learned'), X.double()
    pca = PCA().fit(x.flatten(1).numpy())
    lam = torch.tensor(pca.explained_variance_ * (len(x) - 1) / len(x))              # maximum likelihood divides by n
    noise, u = lam[K:].sum() / (64 - K), torch.tensor(pca.components_[:K].T.copy())
    W, V, b = u * (lam[:K] - noise).sqrt(), u * (lam[:K] - noise).sqrt() / lam[:K], torch.tensor(pca.mean_)
    even = torch.cat([torch.eye(K), -torch.eye(K)]).double() * K**.5                  # mean 0, variance 1, exactly
    monkeypatch.setattr(torch, 'randn_like', lambda mu: even.repeat_interleave(len(x), 0))
    with torch.no_grad():
        d.nets_.decoder[0].weight[:], d.nets_.decoder[0].bias[:] = W, b
        d.nets_.encoder[1].weight[:], d.nets_.encoder[1].bias[:] = torch.cat([V.T, 0 * V.T]), torch.cat([-V.T @ b, (noise / lam[:K]).log()])
        d.nets_.noise.log.fill_(noise.log() / 2)
    def slopes(): return torch.cat([g.flatten() for g in torch.autograd.grad(sum(t.mean() for t in d.loss(x.repeat(2 * K, 1, 1, 1)).values()), list(d.nets_.parameters()))])
    assert slopes().abs().max() < 1e-8
    d.beta = 1.5
    assert slopes().abs().max() > .1


def test_importance_memory_does_not_grow_with_samples():
    d, seen = linear(VAE, scoring='importance', samples=50), []
    handle = d.nets_.decoder.register_forward_hook(lambda net, args, out: seen.append(len(args[0])))
    d.image_score(X.double())
    handle.remove()
    assert seen == [len(X)] * 50      # one decoding of the batch at a time


def test_a_large_beta_collapses_the_code():
    x = digits(normal=3).x_train
    on, off = (VAE(beta=beta, sigma=.1, epochs=30, batch_size=32, lr=3e-3, verbose=False).fit(x) for beta in (1, 100))
    assert on.active_units(x).all() and on.rates(x).sum(1).mean() > 5
    assert not off.active_units(x).any() and off.rates(x).sum(1).mean() < .05


@pytest.mark.parametrize('params, word', [(dict(beta=-1), 'beta'), (dict(beta=float('nan')), 'beta'), (dict(beta=True), 'beta'), (dict(sigma=0), 'sigma'), (dict(sigma='fixed'), 'sigma'),
                                          (dict(sigma=float('inf')), 'sigma'), (dict(scoring='kl'), 'scoring'), (dict(samples=0), 'samples'), (dict(samples=1.5), 'samples')])
def test_wrong_settings(params, word):
    with pytest.raises(ValueError, match=word): VAE(**params).fit(X)


def test_contract_with_fixed_sigma(): check_detector(VAE(epochs=20, batch_size=32, sigma=.2, samples=4, scoring='importance', weight_decay=1e-3, lr=3e-3))


def test_reconstruction_score_is_that_of_the_autoencoder():
    d = linear(VAE, scoring='reconstruction')
    torch.testing.assert_close(d.image_score(X.double()), AE.image_score(d, X.double()))
