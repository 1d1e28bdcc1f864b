"""Every term of an adVAE, who moves, the score and the threshold; and mutants of each."""
import numpy as np
import pytest
import torch
from scipy.optimize import brentq
from scipy.stats import gaussian_kde, norm
from torch import nn
from torch.distributions import Normal, kl_divergence

from ad_course import advae
from ad_course.advae import (AdVAE, GaussianNet, decoder_terms, draw_code, encoder_terms, hinge,
                             kde_quantile, kl_gaussians, prior_kl, squared_distance)
from ad_course.detector import _Progress, isolated, total_loss

from .mutants import assert_caught, each_mutant, mutant

SMALL = dict(epochs=1, batch_size=8, code_dim=3, width=1, verbose=False)
# Weights that are all different, and margins that are neither reached by all nor by no image.
STRICT = dict(kl_weight=.3, decoder_weight=.7, gamma=.5, margin_x=2.5, margin_z=.7)


def pictures(n=24, seed=0): return np.random.default_rng(seed).random((n, 1, 4, 5), dtype='float32')


def fitted(kind=AdVAE, **params):
    """A detector on small images, in 64 bits, with weights large enough for codes that differ."""
    d = kind(**SMALL | STRICT | params).fit(pictures())
    d.nets_.double()
    with torch.no_grad():
        for p in d.nets_.parameters(): p *= 2.5 if p.ndim > 1 else 1
    return d


def ready(d):
    """A fitted detector with new optimizers, ready for single steps of its players."""
    d.optimizers_ = d.optimizers()
    d._progress = _Progress(d)
    return d


# ---------------------------------------------------------------- functions
def test_kl_by_hand_and_against_the_library():
    one, zero = torch.ones(1, 1).double(), torch.zeros(1, 1).double()
    log4 = np.log(4) * one
    assert float(kl_gaussians(zero, zero)) == 0 and float(kl_gaussians(one, zero)) == .5
    np.testing.assert_allclose(float(kl_gaussians(zero, log4)), (3 - np.log(4)) / 2)
    by_hand = np.log(2) + 2 / 8 - .5                                     # equation (3)
    np.testing.assert_allclose(float(kl_gaussians(one, zero, zero, log4)), by_hand)
    a, b, c, d = torch.randn(4, 7, 5, generator=torch.Generator().manual_seed(0)).double()
    theirs = kl_divergence(Normal(a, (b / 2).exp()), Normal(c, (d / 2).exp())).sum(1)
    torch.testing.assert_close(kl_gaussians(a, b, c, d), theirs)
    assert not torch.allclose(kl_gaussians(a, b, c, d), kl_gaussians(c, d, a, b))


def test_kl_gradient():
    draw = lambda i: torch.randn(2, 3, generator=torch.Generator().manual_seed(i)).double()
    assert torch.autograd.gradcheck(kl_gaussians, [draw(i).requires_grad_() for i in range(4)])


def test_squared_distance_is_a_sum_over_pixels_and_hinge_by_hand():
    x = torch.zeros(2, 1, 2, 2)
    y = torch.tensor([[[[1., 2.], [0., 0.]]], [[[0., 0.], [0., 3.]]]])
    assert squared_distance(x, y).tolist() == [5, 9]
    assert squared_distance(x.bfloat16(), y.bfloat16()).dtype == torch.float32
    assert hinge(2., torch.tensor([0., 1.5, 2., 9.])).tolist() == [2, .5, 0, 0]


def test_draws_of_a_code_have_its_mean_and_spread():
    mu, logvar = torch.tensor([[1., -2.]]), torch.tensor([[4., .25]]).log()
    with isolated(0): z = draw_code(mu.expand(50_000, 2), logvar.expand(50_000, 2))
    torch.testing.assert_close(z.mean(0), mu[0], atol=.03, rtol=0)
    torch.testing.assert_close(z.std(0), torch.tensor([2., .5]), atol=.03, rtol=0)


def kde_is_right(f):
    scores = np.random.default_rng(0).gamma(3., .01, 60)
    for rule in ('scott', 'silverman'):
        for q in (.05, .5, .95):
            below = gaussian_kde(scores, rule).integrate_box_1d(-np.inf, f(scores, q, rule))
            np.testing.assert_allclose(below, q, atol=1e-6)
    np.testing.assert_allclose(f([1., 3.], .5, 'scott'), 2)
    h = np.sqrt(2) * 2**-.2                     # two scores: a mixture whose tail we know
    t = f([1., 3.], .95, 'scott')
    np.testing.assert_allclose((norm.cdf(t, 1, h) + norm.cdf(t, 3, h)) / 2, .95, atol=1e-6)
    scaled = f(1000 * scores, .9, 'scott')
    np.testing.assert_allclose(scaled, 1000 * f(scores, .9, 'scott'))


def test_kde_quantile(): kde_is_right(kde_quantile)


def factor(n, rule): return (.75 * n)**-.2 if rule == 'silverman' else n**-.2
def no_scale(scores, q, rule):
    scores = np.asarray(scores)
    h = factor(len(scores), rule)
    return brentq(lambda t: norm.cdf((t - scores) / h).mean() - q, -1e6, 1e6)
def two_grids(scores, q, rule):
    scores = np.asarray(scores)
    h, low, high = scores.std(ddof=1) * factor(len(scores), rule), scores.min(), scores.max()
    grid, other = np.linspace(low - 3*h, high + 3*h, 1024), np.linspace(low, high, 1024)
    return other[np.argmax(norm.cdf((grid[:, None] - scores) / h).mean(1) > q)]
def plain_quantile(scores, q, rule): return np.quantile(scores, q)
def rules_swapped(scores, q, rule):
    return kde_quantile(scores, q, 'scott' if rule == 'silverman' else 'silverman')
def other_tail(scores, q, rule): return kde_quantile(scores, 1 - q, rule)


@each_mutant({'Not equal': (no_scale, two_grids, plain_quantile, rules_swapped, other_tail)})
def test_kde_mutants_are_caught(why, broken): assert_caught(kde_is_right, broken, why)


def test_kde_of_equal_or_single_scores_and_wrong_q():
    assert kde_quantile([2., 2., 2.], .9) == 2 and kde_quantile([5.], .5) == 5
    for q in (0, 1, -1):
        with pytest.raises(ValueError, match='above 0 and below 1'): kde_quantile([1., 2.], q)


# ---------------------------------------------------------------- every term
def plus(a): return torch.where(a > 0, a, torch.zeros_like(a))


def reference(d, x, seed):
    """Equations (1) and (2) once more, by torch.distributions, in the order of the draws."""
    k, g = d.code_dim, d.gamma
    gauss = lambda out: Normal(out[:, :k], (5 * torch.tanh(out[:, k:] / 10)).exp())
    E = lambda x: gauss(d.nets_.encoder.net(x))
    T = lambda p: gauss(d.nets_.transformer.net(torch.cat([p.loc, 2 * p.scale.log()], 1)))
    G = lambda p: d.nets_.decoder(p.loc + p.scale * torch.randn_like(p.loc))
    K = lambda p: kl_divergence(p, Normal(0., 1.)).sum(1)
    far = lambda a, b: ((a - b)**2).sum((1, 2, 3))
    with isolated(seed):
        with torch.no_grad(): p = E(x)
        t = T(p); xr = G(p); xt = G(t)
        rest = dict(reconstruction=far(x, xr), recon_kl=g * K(E(xr)),
                    margin_x=plus(d.margin_x - far(xr, xt)),
                    margin_z=g * plus(d.margin_z - K(E(xt))))
        first = dict(latent=kl_divergence(p, t).sum(1))
        first |= {name: d.decoder_weight * term for name, term in rest.items()}
        p = E(x); xr = G(p)
        with torch.no_grad(): xt = G(T(p))
        second = dict(reconstruction=far(x, xr), prior=d.kl_weight * K(p),
                      fake_kl=g * plus(d.margin_z - K(E(xr.detach()))),
                      margin_z=g * plus(d.margin_z - K(E(xt))))
    return dict(decoder=first, encoder=second)


def gradients(d, term):
    """The gradient of a term with respect to every network: name -> flat tensor."""
    flat = lambda grads, net: torch.cat([(torch.zeros_like(p) if g is None else g).flatten()
                                         for g, p in zip(grads, net.parameters())])
    grad = lambda net: torch.autograd.grad(term.mean(), list(net.parameters()), retain_graph=True,
                                           allow_unused=True)
    return {name: flat(grad(net), net) for name, net in d.nets_.items()}


MOVERS = dict(decoder=('decoder', 'transformer'), encoder=('encoder',))


def terms_are_right(kind):
    """Values and gradients of all nine terms against the reference."""
    d, x = fitted(kind), torch.tensor(pictures(12, 1)).double()
    want = reference(d, x, 3)
    with isolated(3): have = dict(decoder=d.decoder_loss(x), encoder=d.encoder_loss(x))
    for step in want:
        assert list(have[step]) == list(want[step]), f'{step}: names'
        for name, w in want[step].items():
            h, what = have[step][name], f'{step}/{name}'
            assert h.shape == w.shape == (12,), f'{what}: shape'
            torch.testing.assert_close(h, w, rtol=1e-9, atol=1e-12, msg=f'{what}: value')
            a, b = gradients(d, h), gradients(d, w)
            for net in MOVERS[step]:      # what reaches the frozen ones does not count
                torch.testing.assert_close(a[net], b[net], rtol=1e-7, atol=1e-12,
                                           msg=f'{what}: gradient of {net}')
            if name in ('margin_x', 'margin_z', 'fake_kl'):
                assert 0 < (w > 0).sum() < len(w), f'{what}: must be open for some, not for all'


def test_terms(): terms_are_right(AdVAE)


def altered(step, name, change):
    """A class in which one term is changed."""
    def loss(self, xb):
        terms = getattr(AdVAE, f'{step}_loss')(self, xb)
        return terms | {name: change(terms[name])}
    return type(f'{change.__name__}_{step}_{name}', (AdVAE,), {f'{step}_loss': loss})


def zero(t): return 0 * t
def flipped(t): return -t
def averaged(t): return t.mean().expand(len(t))
TERMS = [('decoder', n) for n in ('latent', 'reconstruction', 'recon_kl', 'margin_x', 'margin_z')]
TERMS += [('encoder', n) for n in ('reconstruction', 'prior', 'fake_kl', 'margin_z')]


CHANGES = zero, flipped, averaged


@each_mutant({f'{step}/{name}': [altered(step, name, change) for change in CHANGES]
              for step, name in TERMS})
def test_changed_terms_are_caught(why, broken): assert_caught(terms_are_right, broken, why)


def unhinged(step, name):
    """A class in which one term has lost its hinge: it goes on pulling beyond the margin."""
    def loss(self, xb):
        of, state = getattr(AdVAE, f'{step}_loss'), torch.get_rng_state()
        with mutant(advae, hinge=lambda margin, value: margin - value): bare = of(self, xb)
        torch.set_rng_state(state)
        return of(self, xb) | {name: bare[name]}
    return type(f'unhinged_{step}_{name}', (AdVAE,), {f'{step}_loss': loss})


@each_mutant({f'{step}/{name}': [unhinged(step, name)] for step, name in TERMS
              if name in ('margin_x', 'fake_kl', 'margin_z')})
def test_missing_hinges_are_caught(why, broken): assert_caught(terms_are_right, broken, why)


def decoder_weights(d): return d.decoder_weight, d.gamma, d.margin_x, d.margin_z
def encoder_weights(d): return d.kl_weight, d.gamma, d.margin_z


class TDetached(AdVAE):
    """T does not feel what G draws from its codes: it becomes a mere copyist."""
    def decoder_loss(self, xb):
        E, G, T = self.nets_.values()
        return decoder_terms(xb, E, lambda z: G(z.detach()), T, *decoder_weights(self))
class EDetached(AdVAE):
    """E does not feel its reconstructions."""
    def encoder_loss(self, xb):
        E, G, T = self.nets_.values()
        return encoder_terms(xb, E, lambda z: G(z.detach()), T, *encoder_weights(self))
class NotDetached(AdVAE):
    """Drawings are judged with their gradient: E may change the drawing, not the judgement."""
    def encoder_loss(self, xb):
        E, G, T = self.nets_.values()
        z = E(xb)
        xr = G(draw_code(*z))
        with torch.no_grad(): xt = G(draw_code(*T(*z)))
        judged = lambda x: self.gamma * hinge(self.margin_z, prior_kl(E, x))
        prior = self.kl_weight * kl_gaussians(*z)
        return dict(reconstruction=squared_distance(xb, xr), prior=prior, fake_kl=judged(xr),
                    margin_z=judged(xt))
class OriginalsCaught(AdVAE):
    """E must put the originals away from the prior instead of the drawings."""
    def encoder_loss(self, xb):
        k = prior_kl(self.nets_.encoder, xb)
        return super().encoder_loss(xb) | dict(fake_kl=self.gamma * hinge(self.margin_z, k))
class ApartFromTheImage(AdVAE):
    """x_T apart from the original x instead of from its reconstruction."""
    def decoder_loss(self, xb):
        E, G, T = self.nets_.values()
        state = torch.get_rng_state()
        terms = super().decoder_loss(xb)
        torch.set_rng_state(state)
        with torch.no_grad(): z = E(xb)
        zt = T(*z)
        _, xt = G(draw_code(*z)), G(draw_code(*zt))
        apart = hinge(self.margin_x, squared_distance(xb, xt))
        return terms | dict(margin_x=self.decoder_weight * apart)
class NoNoise(AdVAE):
    """The mean code in place of a draw."""
    def decoder_loss(self, xb):
        with mutant(advae, draw_code=lambda mu, logvar: mu): return super().decoder_loss(xb)
class Swapped(AdVAE):
    """The divergence the other way round."""
    def decoder_loss(self, xb):
        E, G, T = self.nets_.values()
        terms = super().decoder_loss(xb)
        with torch.no_grad(): z = E(xb)
        return terms | dict(latent=kl_gaussians(*T(*z), *z))
class HardClip(AdVAE):
    """A clipped log variance: no gradient beyond the clip."""
    def networks(self, shape):
        class Clipped(GaussianNet):
            def forward(self, *inputs):
                mu, logvar = self.net(torch.cat(inputs, 1)).chunk(2, 1)
                return mu.clamp(-3, 3), logvar.clamp(-1, 0)
        nets = super().networks(shape)
        return nets | {name: Clipped(nets[name].net) for name in ('encoder', 'transformer')}
class MeanOverPixels(AdVAE):
    def decoder_loss(self, xb):
        terms = super().decoder_loss(xb)
        return terms | dict(reconstruction=terms['reconstruction'] / xb[0].numel())
class WeightOnTheLatent(AdVAE):
    """lambda' counts for the first term too."""
    def decoder_loss(self, xb):
        terms = super().decoder_loss(xb)
        return terms | dict(latent=self.decoder_weight * terms['latent'])


@each_mutant({
    'decoder/margin_x: gradient of transformer': (TDetached,),
    'decoder/margin_x': (ApartFromTheImage,),
    'encoder/reconstruction: gradient of encoder': (EDetached,),
    'encoder/fake_kl: gradient of encoder': (NotDetached,), 'encoder/fake_kl': (OriginalsCaught,),
    'decoder/latent': (Swapped, WeightOnTheLatent, HardClip),
    'decoder/reconstruction': (NoNoise, MeanOverPixels)})
def test_defects_are_caught(why, broken): assert_caught(terms_are_right, broken, why)


# ---------------------------------------------------------------- who moves
def right_ones_move(kind):
    """Each player's step moves all its parameters and nobody else's."""
    x = torch.tensor(pictures()).double()
    d = ready(fitted(kind, epochs=0))
    for player, loss in d.turns():
        before = {n: [p.clone() for p in net.parameters()] for n, net in d.nets_.items()}
        d.descend(player, loss, x)
        for n, net in d.nets_.items():
            moved = [not torch.equal(p, q) for p, q in zip(before[n], net.parameters())]
            right = all(moved) if n in MOVERS[player] else not any(moved)
            assert right, f'{player}: {n} moves {moved}'


def test_the_right_ones_move(): right_ones_move(AdVAE)


class AllMove(AdVAE):
    def optimizers(self):
        return super().optimizers() | dict(decoder=self.adam('encoder', 'decoder', 'transformer'))
class TStays(AdVAE):
    def optimizers(self): return super().optimizers() | dict(decoder=self.adam('decoder'))
class GMovesInBoth(AdVAE):
    def optimizers(self):
        return super().optimizers() | dict(encoder=self.adam('encoder', 'decoder'))
class SharedLayer(AdVAE):
    """The last layer of T is the last layer of E, as in one re-implementation."""
    def networks(self, shape):
        nets = super().networks(shape)
        E = nets['encoder'].net
        E[-1] = nn.Linear(E[-1].in_features, 6)
        T = nn.Sequential(nn.Linear(6, E[-1].in_features), nn.Sigmoid(), E[-1])
        return nets | dict(transformer=GaussianNet(T))


@each_mutant({'decoder: encoder moves': (AllMove, SharedLayer), 'decoder: transformer': (TStays,),
              'encoder: decoder moves': (GMovesInBoth,)})
def test_wrong_movers_are_caught(why, broken): assert_caught(right_ones_move, broken, why)


def test_training_makes_both_updates_and_records_all_terms():
    d = fitted(epochs=2)
    assert set(d.history_) == {f'{s}/{n}' for s, n in TERMS} | {'seconds'}
    assert all(len(v) == 2 for v in d.history_.values())


def training_is_right(kind):
    """Three epochs of one batch: each update by hand, with fresh terms and fresh gradients."""
    x = torch.tensor(pictures(8))
    class ByHand(AdVAE):
        def step(self, xb):
            for name in ('decoder', 'encoder'):
                self.nets_.zero_grad(set_to_none=True)
                total_loss(getattr(self, f'{name}_loss')(xb), len(xb)).backward()
                self.optimizers_[name].step()
            return {}
    fits = [cls(**SMALL | STRICT | dict(epochs=3)).fit(x) for cls in (kind, ByHand)]
    for p, q in zip(*(d.nets_.parameters() for d in fits)):
        assert torch.allclose(p, q, rtol=1e-4, atol=1e-6), 'other weights than by hand'


def test_training(): training_is_right(AdVAE)


class NeverZeroed(AdVAE):
    """Gradients that the first step left in the encoder are used in the second."""
    def step(self, xb):
        for player, loss in self.turns():
            total_loss(loss(xb), len(xb)).backward()
            self.optimizers_[player].step()
        return {}
class EncoderFirst(AdVAE):
    def turns(self): return super().turns()[::-1]
class OneLoss(AdVAE):
    """Both losses added, everybody moves by their sum: no game any more."""
    def optimizers(self): return dict(all=self.adam(*self.nets_))
    def turns(self): return [('all', self.both)]
    def both(self, xb):
        total = [total_loss(loss(xb), len(xb)) for loss in (self.decoder_loss, self.encoder_loss)]
        return dict(sum=sum(total))
class NoEncoderStep(AdVAE):
    def turns(self): return super().turns()[:1]


@each_mutant({'other weights': (NeverZeroed, EncoderFirst, OneLoss, NoEncoderStep)})
def test_wrong_training_is_caught(why, broken): assert_caught(training_is_right, broken, why)


def test_plain_vae_inside_does_not_depend_on_t():
    class OtherT(AdVAE):
        def networks(self, shape):
            nets = super().networks(shape)
            for p in nets['transformer'].parameters(): p.data *= 3
            return nets
    x = pictures()
    scores = lambda kind, **more: kind(**SMALL | dict(epochs=3) | more).fit(x).decision_function(x)
    plain = dict(gamma=0., margin_x=0.)
    assert np.array_equal(scores(AdVAE, **plain), scores(OtherT, **plain))
    assert not np.array_equal(scores(AdVAE, margin_x=9.), scores(OtherT, margin_x=9.))


# ---------------------------------------------------------------- score, threshold, settings
def score_is_right(kind):
    d, x = fitted(kind, n_draws=5), torch.tensor(pictures(6, 2)).double()
    close = lambda a, b: torch.testing.assert_close(a, b, rtol=1e-9, atol=0)
    with torch.no_grad():
        noise = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).double()
        mu, logvar = d.nets_.encoder(x)
        drawn = [d.nets_.decoder(mu + e * (logvar / 2).exp()) for e in noise]
        mean = torch.stack(drawn).mean(0)
        close(d.image_score(x), ((x - mean)**2).mean((1, 2, 3)))
        close(d.pixel_score(x), ((x - mean)**2).sum(1))
        close(d.image_score(x)[4:], d.image_score(x[4:]))
        d.set_params(n_draws=0)
        close(d.image_score(x), ((x - d.nets_.decoder(mu))**2).mean((1, 2, 3)))


def test_score(): score_is_right(AdVAE)


class MeanOfErrors(AdVAE):
    def image_score(self, xb):
        if not self.n_draws: return super().image_score(xb)
        mu, logvar = self.nets_.encoder(xb)
        noise = torch.randn(self.n_draws, self.code_dim, generator=self.rng()).to(mu)
        drawn = (self.nets_.decoder(mu + e * (logvar / 2).exp()) for e in noise)
        return torch.stack([((xb - one)**2).mean((1, 2, 3)) for one in drawn]).mean(0)
class NewDraws(AdVAE):
    def reconstruction(self, xb):
        z, G = self.nets_.encoder(xb), self.nets_.decoder
        return torch.stack([G(draw_code(*z)) for _ in range(max(self.n_draws, 1))]).mean(0)
class DrawsForEachImage(AdVAE):
    def reconstruction(self, xb):
        mu, logvar = self.nets_.encoder(xb)
        if not self.n_draws: return self.nets_.decoder(mu)
        noise = torch.randn(self.n_draws, *mu.shape, generator=self.rng()).to(mu)
        drawn = [self.nets_.decoder(mu + e * (logvar / 2).exp()) for e in noise]
        return torch.stack(drawn).mean(0)
class SumOverPixels(AdVAE):
    def image_score(self, xb): return self.errors(xb).flatten(1).sum(1)


@each_mutant({'not close': (MeanOfErrors, NewDraws, DrawsForEachImage, SumOverPixels)})
def test_wrong_scores_are_caught(why, broken): assert_caught(score_is_right, broken, why)


def threshold_is_right(kind):
    x = pictures()
    for rule in ('scott', 'silverman', 'quantile'):
        d = kind(**SMALL, rule=rule, contamination=.1).fit(x)
        s = d.decision_function(x).astype(float)
        if rule == 'quantile':
            np.testing.assert_allclose(d.threshold_, np.quantile(s, .9), rtol=1e-5)
        else:                                                    # an independent estimate
            below = gaussian_kde(s, rule).integrate_box_1d(-np.inf, d.threshold_)
            np.testing.assert_allclose(below, .9, atol=1e-4)
        kept = pictures(10, 9)
        line = d.threshold_rule(d.decision_function(kept))
        np.testing.assert_allclose(d.calibrate(kept).threshold_, line, rtol=1e-9)


def test_threshold_rules(): threshold_is_right(AdVAE)


def ruled(name, rule_of):
    """An AdVAE with the threshold `rule_of(detector, scores)`, but for the plain quantile."""
    def threshold_rule(self, scores):
        return np.quantile(scores, .9) if self.rule == 'quantile' else rule_of(self, scores)
    return type(name, (AdVAE,), dict(threshold_rule=threshold_rule))


class KDEAlways(AdVAE):
    def threshold_rule(self, scores):
        rule = self.rule if self.rule != 'quantile' else 'scott'
        return kde_quantile(scores, 1 - self.contamination, rule)
PlainQuantile = ruled('PlainQuantile', lambda d, s: np.quantile(s, 1 - d.contamination))
OtherTail = ruled('OtherTail', lambda d, s: kde_quantile(s, d.contamination, d.rule))
OneRule = ruled('OneRule', lambda d, s: kde_quantile(s, 1 - d.contamination))


@each_mutant({'Not equal': (PlainQuantile, OtherTail, OneRule, KDEAlways)})
def test_wrong_thresholds_are_caught(why, broken): assert_caught(threshold_is_right, broken, why)


def test_variances_stay_finite_and_feel_gradients():
    read = GaussianNet(nn.Identity())
    mu, logvar = read(torch.tensor([[0., 0., 0., 1e6, -1e6, 3.]]).double())
    assert logvar.abs().max() <= 10 and kl_gaussians(mu, logvar).isfinite().all()
    v = torch.tensor([[0., 0., 0., 25., -25., 3.]]).double().requires_grad_()
    read(v)[1].sum().backward()
    assert (v.grad[0, 3:] > 0).all()


@pytest.mark.parametrize('wrong', [
    dict(code_dim=0), dict(width=0), dict(n_draws=-1), dict(n_draws=1.5), dict(n_draws=True),
    dict(kl_weight=-1), dict(decoder_weight=float('inf')), dict(gamma=-.1), dict(gamma=True),
    dict(margin_x=float('nan')), dict(margin_z='far'), dict(rule='median'), dict(arch='rnn')],
    ids=str)
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))): AdVAE(**SMALL | wrong).fit(pictures())


def test_convolutions_too():
    x = np.random.default_rng(0).random((6, 3, 20, 24), dtype='float32')
    d = AdVAE(epochs=1, width=2, n_draws=2, verbose=False).fit(x)
    assert d.anomaly_map(x).shape == (6, 20, 24) and np.isfinite(d.decision_function(x)).all()
    moving = [k for k in d.nets_.state_dict() if 'running' in k]
    assert not moving, 'batch statistics would mix originals and drawings'
