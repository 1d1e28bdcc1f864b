"""Every term of both steps of an adVAE, who moves in which step, the score and the threshold; each check also fails on classes with a defect put in."""
import numpy as np
import pytest
import torch
from scipy.stats import gaussian_kde, norm
from torch import nn
from torch.distributions import Normal, kl_divergence

from ad_course.advae import AdVAE, distance, hinge, kde_quantile, kl_gaussians
from ad_course.check import check_detector
from ad_course.detector import isolated, total_loss

SMALL = dict(epochs=1, batch_size=8, code_dim=3, width=1, verbose=False)
# Weights that are all different, and margins that are neither reached by all nor by no image.
STRICT = dict(kl=.3, balance=.7, gamma=.5, margin_x=2.5, margin_z=.7)


def pictures(n=24, seed=0): return np.random.default_rng(seed).random((n, 1, 4, 5), dtype='float32')


def fitted(kind=AdVAE, **params):
    """A detector on small images, in 64 bits, with weights large enough for codes that differ."""
    d = kind(**{**SMALL, **STRICT, **params}).fit(pictures())
    d.nets_.double()
    with torch.no_grad():
        for p in d.nets_.parameters(): p *= 2.5 if p.ndim > 1 else 1
    return d


# ---------------------------------------------------------------- functions
def test_kl_by_hand_and_against_the_library():
    one, zero = torch.ones(1, 1).double(), torch.zeros(1, 1).double()
    assert float(kl_gaussians(zero, zero)) == 0 and float(kl_gaussians(one, zero)) == .5
    np.testing.assert_allclose(float(kl_gaussians(zero, np.log(4) * one)), (3 - np.log(4)) / 2)
    np.testing.assert_allclose(float(kl_gaussians(one, zero, zero, np.log(4) * one)), np.log(2) + 2 / 8 - .5)  # equation (3)
    a, b, c, d = torch.randn(4, 7, 5, generator=torch.Generator().manual_seed(0)).double()
    torch.testing.assert_close(kl_gaussians(a, b, c, d), kl_divergence(Normal(a, (b / 2).exp()), Normal(c, (d / 2).exp())).sum(1))
    assert not torch.allclose(kl_gaussians(a, b, c, d), kl_gaussians(c, d, a, b))


def test_kl_gradient():
    args = tuple(torch.randn(2, 3, generator=torch.Generator().manual_seed(i)).double().requires_grad_() for i in range(4))
    assert torch.autograd.gradcheck(kl_gaussians, args)


def test_distance_is_a_sum_over_pixels_and_hinge_by_hand():
    x, y = torch.zeros(2, 1, 2, 2), torch.tensor([[[[1., 2.], [0., 0.]]], [[[0., 0.], [0., 3.]]]])
    assert distance(x, y).tolist() == [5, 9] and distance(x.bfloat16(), y.bfloat16()).dtype == torch.float32
    assert hinge(2., torch.tensor([0., 1.5, 2., 9.])).tolist() == [2, .5, 0, 0]


def kde_is_right(f):
    scores = np.random.default_rng(0).gamma(3., .01, 60)
    for rule in ('scott', 'silverman'):
        for q in (.05, .5, .95): np.testing.assert_allclose(gaussian_kde(scores, rule).integrate_box_1d(-np.inf, f(scores, q, rule)), q, atol=1e-6)
    np.testing.assert_allclose(f([1., 3.], .5, 'scott'), 2)
    h = np.sqrt(2) * 2**-.2                                   # two scores: a mixture whose tail we know
    t = f([1., 3.], .95, 'scott')
    np.testing.assert_allclose((norm.cdf(t, 1, h) + norm.cdf(t, 3, h)) / 2, .95, atol=1e-6)
    np.testing.assert_allclose(f(1000 * scores, .9, 'scott'), 1000 * f(scores, .9, 'scott'))  # follows the scale


def test_kde_quantile(): kde_is_right(kde_quantile)


def no_scale(scores, q, rule):
    from scipy.optimize import brentq
    scores = np.asarray(scores); n = len(scores)
    return brentq(lambda t: norm.cdf((t - scores) / ((.75 * n)**-.2 if rule == 'silverman' else n**-.2)).mean() - q, -1e6, 1e6)
def two_grids(scores, q, rule):
    scores = np.asarray(scores); n = len(scores)
    h = scores.std(ddof=1) * ((.75 * n)**-.2 if rule == 'silverman' else n**-.2)
    grid, other = np.linspace(scores.min() - 3*h, scores.max() + 3*h, 1024), np.linspace(scores.min(), scores.max(), 1024)
    return other[np.argmax(norm.cdf((grid[:, None] - scores) / h).mean(1) > q)]


KDE_MUTANTS = dict(no_scale=no_scale, two_grids=two_grids, plain_quantile=lambda s, q, rule: np.quantile(s, q),
                   rules_swapped=lambda s, q, rule: kde_quantile(s, q, 'scott' if rule == 'silverman' else 'silverman'),
                   other_tail=lambda s, q, rule: kde_quantile(s, 1 - q, rule))


@pytest.mark.parametrize('mutant', KDE_MUTANTS)
def test_kde_mutants_are_caught(mutant):
    with pytest.raises(AssertionError): kde_is_right(KDE_MUTANTS[mutant])


def test_kde_of_equal_or_single_scores_and_wrong_q():
    assert kde_quantile([2., 2., 2.], .9) == 2 and kde_quantile([5.], .5) == 5
    for q in (0, 1, -1):
        with pytest.raises(ValueError, match='between 0 and 1'): kde_quantile([1., 2.], q)


# ---------------------------------------------------------------- every term
def reference(d, x, seed):
    """Equations (1) and (2) once more, by torch.distributions, in the order of the random draws."""
    k = d.code_dim
    gauss = lambda out: Normal(out[:, :k], (5 * torch.tanh(out[:, k:] / 10)).exp())
    E = lambda x: gauss(d.nets_.encoder(x))
    T = lambda p: gauss(d.nets_.transformer(torch.cat([p.loc, 2 * p.scale.log()], 1)))
    G = lambda p: d.nets_.decoder(p.loc + p.scale * torch.randn_like(p.loc))
    K = lambda p: kl_divergence(p, Normal(0., 1.)).sum(1)
    far = lambda a, b: ((a - b)**2).sum((1, 2, 3))
    plus = lambda a: torch.where(a > 0, a, torch.zeros_like(a))
    with isolated(seed):
        with torch.no_grad(): p = E(x)
        t = T(p); xr = G(p); xt = G(t)
        first = dict(near=kl_divergence(p, t).sum(1), rebuilt=d.balance * far(x, xr), passes=d.balance * d.gamma * K(E(xr)),
                     apart=d.balance * plus(d.margin_x - far(xr, xt)), exposed=d.balance * d.gamma * plus(d.margin_z - K(E(xt))))
        p = E(x); xr = G(p)
        with torch.no_grad(): xt = G(T(p))
        second = dict(rebuilt=far(x, xr), prior=d.kl * K(p), caught=d.gamma * plus(d.margin_z - K(E(xr.detach()))), exposed=d.gamma * plus(d.margin_z - K(E(xt))))
    return dict(first=first, second=second)


def gradients(d, term):
    """The gradient of a term with respect to every network, name -> flat tensor."""
    grads = torch.autograd.grad(term.mean(), list(d.nets_.parameters()), retain_graph=True, allow_unused=True)
    names = [n for n, net in d.nets_.items() for _ in net.parameters()]
    return {n: torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p, m in zip(grads, d.nets_.parameters(), names) if m == n]) for n in d.nets_}


def terms_are_right(kind):
    """Values and gradients of all nine terms against the reference."""
    d, x = fitted(kind), torch.tensor(pictures(12, 1)).double()
    want = reference(d, x, 3)
    with isolated(3): have = dict(first=d.first_terms(x), second=d.second_terms(x))
    for step in want:
        assert list(have[step]) == list(want[step]), f'{step}: names'
        for name, w in want[step].items():
            h = have[step][name]
            assert h.shape == w.shape == (12,), f'{step}/{name}: shape'
            torch.testing.assert_close(h, w, rtol=1e-9, atol=1e-12, msg=f'{step}/{name}: value')
            a, b = gradients(d, h), gradients(d, w)
            # in step 1 the encoder, in step 2 the others are frozen: what reaches them does not count
            for n in ('decoder', 'transformer') if step == 'first' else ('encoder',):
                torch.testing.assert_close(a[n], b[n], rtol=1e-7, atol=1e-12, msg=f'{step}/{name}: gradient of {n}')
            if name in ('apart', 'exposed', 'caught'): assert 0 < (w > 0).sum() < len(w), f'{step}/{name}: the hinge must be open for some images and shut for others'


def test_terms(): terms_are_right(AdVAE)


def mutant(step, name, change):
    """A class in which one term is changed."""
    def terms(self, xb):
        out = getattr(super(cls, self), f'{step}_terms')(xb)
        return {**out, name: change(out[name])}
    cls = type(f'{change.__name__}_{step}_{name}', (AdVAE,), {f'{step}_terms': terms})
    return cls


def zero(t): return 0 * t
def flipped(t): return -t
def averaged(t): return t.mean().expand(len(t))
TERMS = [('first', n) for n in ('near', 'rebuilt', 'passes', 'apart', 'exposed')] + [('second', n) for n in ('rebuilt', 'prior', 'caught', 'exposed')]


@pytest.mark.parametrize('change', [zero, flipped, averaged], ids=lambda f: f.__name__)
@pytest.mark.parametrize('step, name', TERMS, ids=['/'.join(t) for t in TERMS])
def test_changed_terms_are_caught(step, name, change):
    with pytest.raises(AssertionError, match=f'{step}/{name}'): terms_are_right(mutant(step, name, change))


def unhinged(step, name):
    """A class in which one term has lost its hinge: it goes on pulling beyond the margin."""
    def terms(self, xb):
        state = torch.get_rng_state()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr('ad_course.advae.hinge', lambda margin, value: margin - value)
            bare = getattr(super(cls, self), f'{step}_terms')(xb)
        torch.set_rng_state(state)
        return {**getattr(super(cls, self), f'{step}_terms')(xb), name: bare[name]}
    cls = type(f'unhinged_{step}_{name}', (AdVAE,), {f'{step}_terms': terms})
    return cls


HINGED = [t for t in TERMS if t[1] in ('apart', 'caught', 'exposed')]
@pytest.mark.parametrize('step, name', HINGED, ids=['/'.join(t) for t in HINGED])
def test_missing_hinges_are_caught(step, name):
    with pytest.raises(AssertionError, match=f'{step}/{name}'): terms_are_right(unhinged(step, name))


class TDetached(AdVAE):
    """T does not feel what G draws from its codes: it becomes a mere copyist. (E does not feel its reconstructions either.)"""
    def draw(self, mu, logvar): return super().draw(mu.detach(), logvar.detach())
class NotDetached(AdVAE):
    """Drawings are judged with their gradient: E may change the drawing instead of the judgement."""
    def second_terms(self, xb):
        z = self.posterior(xb)
        xr = self.draw(*z)
        with torch.no_grad(): xt = self.draw(*self.transform(*z))
        return dict(rebuilt=distance(xb, xr), prior=self.kl * kl_gaussians(*z), caught=self.gamma * hinge(self.margin_z, self.strangeness(xr)),
                    exposed=self.gamma * hinge(self.margin_z, self.strangeness(xt)))
class OriginalsCaught(AdVAE):
    """E must find the originals strange instead of the drawings."""
    def second_terms(self, xb): return {**super().second_terms(xb), 'caught': self.gamma * hinge(self.margin_z, self.strangeness(xb))}
class ApartFromTheImage(AdVAE):
    """x_T apart from the original x instead of from its reconstruction."""
    def first_terms(self, xb):
        with torch.no_grad(): z = self.posterior(xb)
        zt = self.transform(*z)
        xr, xt = self.draw(*z), self.draw(*zt)
        return dict(near=kl_gaussians(*z, *zt), rebuilt=self.balance * distance(xb, xr), passes=self.balance * self.gamma * self.strangeness(xr),
                    apart=self.balance * hinge(self.margin_x, distance(xb, xt)), exposed=self.balance * self.gamma * hinge(self.margin_z, self.strangeness(xt)))
class NoNoise(AdVAE):
    def draw(self, mu, logvar): return self.nets_.decoder(mu)
class Swapped(AdVAE):
    """The divergence the other way round."""
    def first_terms(self, xb):
        with torch.no_grad(): z = self.posterior(xb)
        return {**super().first_terms(xb), 'near': kl_gaussians(*self.transform(*z), *z)}
class HardClip(AdVAE):
    """A clipped log variance: no gradient beyond the clip."""
    @staticmethod
    def parameters_of(out):
        mu, logvar = out.chunk(2, 1)
        return mu.clamp(-3, 3), logvar.clamp(-1, 0)
class MeanOverPixels(AdVAE):
    def first_terms(self, xb): return (lambda o: {**o, 'rebuilt': o['rebuilt'] / xb[0].numel()})(super().first_terms(xb))


@pytest.mark.parametrize('kind', [TDetached, NotDetached, OriginalsCaught, ApartFromTheImage, NoNoise, Swapped, HardClip, MeanOverPixels], ids=lambda k: k.__name__)
def test_defects_are_caught(kind):
    with pytest.raises(AssertionError): terms_are_right(kind)


# ---------------------------------------------------------------- who moves
def right_ones_move(kind):
    d, x = fitted(kind, epochs=0), torch.tensor(pictures()).double()
    d.optimizers_ = d.optimizers()
    for step, movers in dict(first={'decoder', 'transformer'}, second={'encoder'}).items():
        before = {n: [p.clone() for p in net.parameters()] for n, net in d.nets_.items()}
        total_loss(getattr(d, f'{step}_terms')(x), len(x)).backward()
        d.optimizers_[step].step()
        for n, net in d.nets_.items():
            moved = [not torch.equal(p, q) for p, q in zip(before[n], net.parameters())]
            assert all(moved) if n in movers else not any(moved), f'{step}: {n} {moved}'
        d.nets_.zero_grad()


def test_the_right_ones_move(): right_ones_move(AdVAE)


class AllMove(AdVAE):
    def optimizers(self): return dict(first=self.adam('encoder', 'decoder', 'transformer'), second=self.adam('encoder'))
class TStays(AdVAE):
    def optimizers(self): return dict(first=self.adam('decoder'), second=self.adam('encoder'))
class GMovesInBoth(AdVAE):
    def optimizers(self): return dict(first=self.adam('decoder', 'transformer'), second=self.adam('encoder', 'decoder'))
class SharedLayer(AdVAE):
    """The last layer of T is the last layer of E, as in one re-implementation."""
    def networks(self, shape):
        nets = super().networks(shape)
        nets['encoder'][-1] = nn.Linear(nets['encoder'][-1].in_features, 6)
        nets['transformer'] = nn.Sequential(nn.Linear(6, nets['encoder'][-1].in_features), nn.Sigmoid(), nets['encoder'][-1])
        return nets


@pytest.mark.parametrize('kind', [AllMove, TStays, GMovesInBoth, SharedLayer], ids=lambda k: k.__name__)
def test_wrong_movers_are_caught(kind):
    with pytest.raises(AssertionError): right_ones_move(kind)


def test_step_makes_both_updates_and_records_all_terms():
    d = fitted(epochs=2)
    assert set(d.history_) == {f'{s}/{n}' for s, n in TERMS} | {'seconds'} and all(len(v) == 2 for v in d.history_.values())


def step_is_right(kind):
    """Three steps by hand, each update with fresh terms and fresh gradients, must give the same weights."""
    x = torch.tensor(pictures(8))
    one, two = (k(**{**SMALL, **STRICT, 'epochs': 0}).fit(x) for k in (kind, AdVAE))
    for d in (one, two): d.optimizers_ = d.optimizers()
    for i in range(3):
        with isolated(i): one.step(x)
        with isolated(i):
            for name in ('first', 'second'):
                two.nets_.zero_grad(set_to_none=True)
                total_loss(getattr(two, f'{name}_terms')(x), len(x)).backward()
                two.optimizers_[name].step()
    for p, q in zip(one.nets_.parameters(), two.nets_.parameters()): torch.testing.assert_close(p, q)


def test_step(): step_is_right(AdVAE)


class NeverZeroed(AdVAE):
    """Gradients that the first step left in the encoder are used in the second."""
    def step(self, xb):
        for name in ('first', 'second'):
            total_loss(getattr(self, f'{name}_terms')(xb), len(xb)).backward()
            self.optimizers_[name].step()
class EncoderFirst(AdVAE):
    def step(self, xb):
        for name in ('second', 'first'):
            terms = getattr(self, f'{name}_terms')(xb)
            self.optimizers_[name].zero_grad(); total_loss(terms, len(xb)).backward(); self.optimizers_[name].step()
class OneLoss(AdVAE):
    """Both losses added, everybody moves by their sum: no game any more."""
    def step(self, xb):
        self.nets_.zero_grad()
        (total_loss(self.first_terms(xb), len(xb)) + total_loss(self.second_terms(xb), len(xb))).backward()
        for o in self.optimizers_.values(): o.step()
class NoSecondStep(AdVAE):
    def step(self, xb):
        self.optimizers_['first'].zero_grad(); total_loss(self.first_terms(xb), len(xb)).backward(); self.optimizers_['first'].step()


@pytest.mark.parametrize('kind', [NeverZeroed, EncoderFirst, OneLoss, NoSecondStep], ids=lambda k: k.__name__)
def test_wrong_steps_are_caught(kind):
    with pytest.raises(AssertionError): step_is_right(kind)


def test_plain_vae_inside_does_not_depend_on_t():
    class OtherT(AdVAE):
        def networks(self, shape):
            nets = super().networks(shape)
            for p in nets['transformer'].parameters(): p.data *= 3
            return nets
    x, plain = pictures(), dict(gamma=0., margin_x=0.)
    a, b = (k(**{**SMALL, 'epochs': 3, **plain}).fit(x).decision_function(x) for k in (AdVAE, OtherT))
    assert np.array_equal(a, b)
    a, b = (k(**{**SMALL, 'epochs': 3, 'margin_x': 9.}).fit(x).decision_function(x) for k in (AdVAE, OtherT))
    assert not np.array_equal(a, b)


# ---------------------------------------------------------------- score, threshold, settings
def score_is_right(kind):
    d, x = fitted(kind, draws=5), torch.tensor(pictures(6, 2)).double()
    with torch.no_grad():
        noise = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).double()
        mu, logvar = d.posterior(x)
        mean = torch.stack([d.nets_.decoder(mu + e * (logvar / 2).exp()) for e in noise]).mean(0)
        torch.testing.assert_close(d.image_score(x), ((x - mean)**2).mean((1, 2, 3)), rtol=1e-9, atol=0)
        torch.testing.assert_close(d.pixel_score(x), ((x - mean)**2).sum(1), rtol=1e-9, atol=0)
        torch.testing.assert_close(d.image_score(x)[4:], d.image_score(x[4:]), rtol=1e-9, atol=0)
        d.set_params(draws=0)
        torch.testing.assert_close(d.image_score(x), ((x - d.nets_.decoder(mu))**2).mean((1, 2, 3)), rtol=1e-9, atol=0)


def test_score(): score_is_right(AdVAE)


class MeanOfErrors(AdVAE):
    def image_score(self, xb):
        if not self.draws: return super().image_score(xb)
        mu, logvar = self.posterior(xb)
        noise = torch.randn(self.draws, self.code_dim, generator=self.rng()).to(mu)
        return torch.stack([((xb - self.nets_.decoder(mu + e * (logvar / 2).exp()))**2).mean((1, 2, 3)) for e in noise]).mean(0)
class NewDraws(AdVAE):
    def reconstruction(self, xb): return torch.stack([self.draw(*self.posterior(xb)) for _ in range(max(self.draws, 1))]).mean(0)
class DrawsForEachImage(AdVAE):
    def reconstruction(self, xb):
        mu, logvar = self.posterior(xb)
        noise = torch.randn(max(self.draws, 1), *mu.shape, generator=self.rng()).to(mu)
        return self.nets_.decoder(mu) if not self.draws else torch.stack([self.nets_.decoder(mu + e * (logvar / 2).exp()) for e in noise]).mean(0)
class SumOverPixels(AdVAE):
    def image_score(self, xb): return self.errors(xb).flatten(1).sum(1)


@pytest.mark.parametrize('kind', [MeanOfErrors, NewDraws, DrawsForEachImage, SumOverPixels], ids=lambda k: k.__name__)
def test_wrong_scores_are_caught(kind):
    with pytest.raises(AssertionError): score_is_right(kind)


def threshold_is_right(kind):
    x = pictures()
    for rule in ('scott', 'silverman', 'quantile'):
        d = kind(**SMALL, rule=rule, contamination=.1).fit(x)
        s = d.decision_function(x).astype(float)
        if rule == 'quantile': np.testing.assert_allclose(d.threshold_, np.quantile(s, .9), rtol=1e-5)
        else: np.testing.assert_allclose(gaussian_kde(s, rule).integrate_box_1d(-np.inf, d.threshold_), .9, atol=1e-4)  # an independent estimate
        kept = pictures(10, 9)
        np.testing.assert_allclose(d.calibrate(kept).threshold_, d.threshold_rule(d.decision_function(kept)), rtol=1e-9)


def test_threshold_rules(): threshold_is_right(AdVAE)


class PlainQuantile(AdVAE):
    def threshold_rule(self, scores): return np.quantile(scores, 1 - self.contamination)
class OtherTail(AdVAE):
    def threshold_rule(self, scores): return np.quantile(scores, .9) if self.rule == 'quantile' else kde_quantile(scores, self.contamination, self.rule)
class OneRule(AdVAE):
    def threshold_rule(self, scores): return np.quantile(scores, .9) if self.rule == 'quantile' else kde_quantile(scores, 1 - self.contamination)
class KDEAlways(AdVAE):
    def threshold_rule(self, scores): return kde_quantile(scores, 1 - self.contamination, self.rule if self.rule != 'quantile' else 'scott')


@pytest.mark.parametrize('kind', [PlainQuantile, OtherTail, OneRule, KDEAlways], ids=lambda k: k.__name__)
def test_wrong_thresholds_are_caught(kind):
    with pytest.raises(AssertionError): threshold_is_right(kind)


def test_variances_stay_finite_and_feel_gradients():
    d, out = fitted(), torch.tensor([[0., 0., 0., 1e6, -1e6, 3.]]).double()
    mu, logvar = d.parameters_of(out)
    assert logvar.abs().max() <= 10 and kl_gaussians(mu, logvar).isfinite().all()
    v = torch.tensor([[0., 0., 0., 25., -25., 3.]]).double().requires_grad_()
    d.parameters_of(v)[1].sum().backward()
    assert (v.grad[0, 3:] > 0).all()


@pytest.mark.parametrize('wrong', [dict(code_dim=0), dict(width=0), dict(draws=-1), dict(draws=1.5), dict(kl=-1), dict(balance=float('inf')), dict(gamma=-.1),
                                   dict(margin_x=float('nan')), dict(margin_z='far'), dict(rule='median'), dict(arch='rnn')], ids=str)
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))): AdVAE(**{**SMALL, **wrong}).fit(pictures())


def test_convolutions_too():
    x = np.random.default_rng(0).random((6, 3, 20, 24), dtype='float32')
    d = AdVAE(epochs=1, width=2, draws=2, verbose=False).fit(x)
    assert d.anomaly_map(x).shape == (6, 20, 24) and np.isfinite(d.decision_function(x)).all()
    assert not any('running' in k for k in d.nets_.state_dict()), 'a running mean moves in the step in which its network is frozen'


def test_promises(): check_detector(AdVAE(epochs=25, batch_size=32, lr=3e-3))
