"""ACHC: equations (7) to (9) and algorithm 3.2, and mutants that each check must catch."""
import warnings
from dataclasses import dataclass
import numpy as np
import pytest
import torch
from torch import nn
from ad_course.achc import ACHC
from ad_course.data import digits
from ad_course.check import check_detector
from ad_course.detector import isolated, total_loss
from ad_course.surfaces import surfaces

TASK = digits(normal=3)
X = np.concatenate([TASK.x_train[:60], TASK.x_reserve[:20]])
Y = np.repeat([0, 1], [60, 20])
TINY = dict(arch='mlp', width=2, code_dim=3, batch_size=40, epochs=2, pretrain_epochs=2, warm_up=2, wraps=60, gcn=False, verbose=False)


def in_play(Kind, **settings):
    """A detector in the middle of its game, with wrapping points, and a batch."""
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        d = Kind(**TINY | settings).fit(X, Y)
    d.make_wraps(d.as_batches(X, Y))
    with isolated(0), torch.no_grad():   # a sphere that parts every group, so that no term is idle
        groups = [d.code(torch.tensor(X[Y == 0])), d.code(torch.tensor(X[Y == 1])), d.nets_.encoder(d.invent(40)), d.nets_.encoder(d._bank)]
        center = torch.stack([g.mean(0) for g in groups]).mean(0)
        radius = max(min((g - center).norm(dim=1).quantile(.6) for g in groups), max((g - center).norm(dim=1).min() for g in groups) * 1.05)
    d.center_, d.radius_ = nn.Parameter(center), nn.Parameter(torch.as_tensor(radius).clone())
    d.optimizers_ = d.optimizers() | dict(sphere=torch.optim.SGD([d.center_, d.radius_], lr=d.sphere_lr))
    return d, torch.tensor(X[::3]), torch.tensor(Y[::3])


def by_hand(d, xb, yb, invented, wraps):
    """All terms of equation (8), image by image, in float64."""
    net = lambda images: d.nets_.encoder(images).detach().double().numpy()
    c, R2 = d.center_.detach().double().numpy(), float(d.radius_.detach())**2
    codes, made, around, y = net(xb), net(invented), net(wraps), yb.numpy()
    away = lambda z: ((z - c)**2).sum(-1)
    normal = [0 if label else 1 / (1 - Y.mean()) for label in y]
    decay = sum(float((p.detach().double()**2).sum()) for p in d.nets_.encoder.parameters() if p.ndim > 1)
    return dict(radius=R2, outside=np.mean([w * max(0, away(z) - R2) / d.nu for w, z in zip(normal, codes)]),
                decay=d.weight_decay / 2 * decay, wrapping=np.mean([max(0, R2 - away(z)) for z in around]) / d.mu,
                unknown=np.mean([label / Y.mean() * max(0, R2 - away(z)) / d.mu for label, z in zip(y, codes)]),
                generated=d.omega1 * np.mean([max(0, R2 - away(z)) for z in made]),
                similarity=-d.omega2 * np.mean([w * ((z - x)**2).sum() for w, z, x in zip(normal, made, codes)]))


def check_terms(kind):
    d, xb, yb = in_play(kind, omega2=.3, weight_decay=.1)
    with isolated(3), torch.no_grad(): terms = d.loss(xb, yb)
    with isolated(3), torch.no_grad(): wraps, invented = d.some_wraps(len(xb)), d.invent(len(xb))   # the order of the draws in the loss
    expected = by_hand(d, xb, yb, invented, wraps)
    assert set(terms) == set(expected)
    for name, value in expected.items():
        assert float(terms[name].mean()) == pytest.approx(value, rel=1e-4, abs=1e-6), name
        assert value != 0, f'{name}: this batch does not test it'


def photograph(d):
    parts = dict(encoder=d.nets_.encoder.parameters(), generator=d.nets_.generator.parameters(), center=[d.center_], radius=[d.radius_])
    return {name: torch.cat([p.detach().flatten().clone() for p in ps]) for name, ps in parts.items()}


def moves(d, act):
    before = photograph(d)
    act()
    return {name for name, now in photograph(d).items() if not torch.equal(now, before[name])}


def game_value(d, xb, yb):
    with isolated(5), torch.no_grad(): return sum(float(t.mean()) for t in d.game(d.code(xb), d.invent(len(xb)), d.shares(yb)[0]).values())


def check_players(kind):
    """Who moves, and that one descends and the other climbs."""
    d, xb, yb = in_play(kind, omega2=.1, generator_lr=1e-3)
    with isolated(0):
        assert moves(d, lambda: d.detector_step(xb, yb)) == {'encoder', 'center', 'radius'}
        assert moves(d, lambda: d.generator_step(xb, yb)) == {'generator'}
        start = game_value(d, xb, yb)
        for _ in range(20): d.generator_step(xb, yb)
        assert game_value(d, xb, yb) > start, 'the generator does not climb'
        with isolated(9), torch.no_grad(): start = float(total_loss(d.loss(xb, yb), len(xb)))
        for _ in range(20): d.detector_step(xb, yb)
        with isolated(9), torch.no_grad(): assert float(total_loss(d.loss(xb, yb), len(xb))) < start, 'the detector does not descend'


def check_round(kind):
    """One step of the game moves all four, in turn, and leaves batch statistics alone."""
    d, xb, yb = in_play(kind, arch='conv')
    norms = lambda: [b.clone() for b in d.nets_.encoder.buffers()]
    d.nets_.train()
    with isolated(0):
        before = norms()
        assert moves(d, lambda: d.step(xb, yb)) == {'encoder', 'generator', 'center', 'radius'}
    assert before and all(torch.equal(a, b) for a, b in zip(before, norms())), 'invented images moved the batch statistics'


def check_gradient_of_radius(kind):
    """d/dR of equation (8): 2R (1 - outside/nu + wraps inside/mu + unknown inside/mu + omega1 inventions inside), in shares."""
    d, xb, yb = in_play(kind)
    with isolated(3): total_loss(d.loss(xb, yb), len(xb)).backward()
    with isolated(3), torch.no_grad():
        wraps, made, R2 = d.to_center(d.some_wraps(len(xb))), d.to_center(d.invent(len(xb))), d.radius_**2
        away, (normal, unknown) = d.distances(xb), d.shares(yb)
        slope = 1 - (normal * (away > R2)).mean() / d.nu + (wraps < R2).float().mean() / d.mu + (unknown * (away < R2)).mean() / d.mu + d.omega1 * (made < R2).float().mean()
    torch.testing.assert_close(d.radius_.grad, 2 * d.radius_.detach() * slope, rtol=1e-3, atol=1e-4)


def check_score(kind):
    """Equation (9): the squared distance, and R^2 as threshold; calibrate brings a quantile."""
    d = kind(**TINY).fit(X, Y)
    codes = d.encode(X).astype('float64')
    np.testing.assert_allclose(d.decision_function(X), ((codes - d.center_.double().numpy())**2).sum(1), rtol=1e-4, atol=1e-6)
    assert d.threshold_ == pytest.approx(d.radius_**2)
    d.calibrate(TASK.x_test[:50])
    assert d.threshold_ == pytest.approx(np.quantile(d.decision_function(TASK.x_test[:50]), 1 - d.contamination))


def check_stop(kind):
    """The game ends when all of weights, center and radius rest, and not before."""
    d = kind(**TINY | dict(epochs=6, tol=1e9)).fit(X, Y)
    assert len(d.history_['outside']) == 2
    assert len(kind(**TINY | dict(epochs=6, tol=0.)).fit(X, Y).history_['outside']) == 6
    d, _, _ = in_play(kind, tol=1e-3)
    for part in ('encoder', 'center', 'radius'):
        d._last = None
        assert d.settle(None) is not True and d.settle(None)
        with torch.no_grad(): dict(encoder=next(d.nets_.encoder.parameters()), center=d.center_, radius=d.radius_)[part].mul_(1.1)
        assert not d.settle(None), f'{part} moved, and the game ended'


CHECKS = [check_terms, check_players, check_round, check_gradient_of_radius, check_score, check_stop]


@pytest.mark.filterwarnings('ignore:.*of the training images lie outside')
@pytest.mark.parametrize('check', CHECKS)
def test_achc(check): check(ACHC)


def changed(name, change):
    """ACHC with one term of its loss changed."""
    class Mutant(ACHC):
        def terms(self, *args):
            out = super().terms(*args)
            return {**out, name: change(out[name])} if name in out else out
        def game(self, *args):
            out = super().game(*args)
            return {**out, name: change(out[name])} if name in out else out
    return Mutant


TERMS = ('radius', 'outside', 'decay', 'wrapping', 'unknown', 'generated', 'similarity')

@pytest.mark.parametrize('name', TERMS)
@pytest.mark.parametrize('what', ['zero', 'sign', 'double'])
def test_every_term_is_defended(name, what):
    with pytest.raises(AssertionError): check_terms(changed(name, dict(zero=lambda t: t * 0, sign=lambda t: -t, double=lambda t: 2 * t)[what]))


class NoHinge(ACHC):
    def game(self, codes, invented, normal):
        z = self.nets_.encoder(invented)
        return super().game(codes, invented, normal) | dict(generated=self.omega1 * (self.radius_**2 - (z - self.center_).square().sum(1)))

class PairsWithLabelled(ACHC):
    def game(self, codes, invented, normal): return super().game(codes, invented, torch.ones_like(normal))

class LostNorm(ACHC):
    """Equation (7) as it is printed."""
    def game(self, codes, invented, normal):
        return super().game(codes, invented, normal) | dict(similarity=-self.omega2 * normal * (self.nets_.encoder(invented).sum(1) - codes.square().sum(1)))

class FrozenRadius(ACHC):
    def detector_step(self, xb, yb):
        kept = self.radius_.detach().clone()
        terms = super().detector_step(xb, yb)
        self.radius_.data.copy_(kept)
        return terms

class DetachedRadius(ACHC):
    def terms(self, codes, yb):
        kept, self.radius_ = self.radius_, self.radius_.detach()
        try: return super().terms(codes, yb)
        finally: self.radius_ = kept

class FrozenCenter(ACHC):
    def detector_step(self, xb, yb):
        kept = self.center_.detach().clone()
        terms = super().detector_step(xb, yb)
        self.center_.data.copy_(kept)
        return terms

class IdleGenerator(ACHC):
    def generator_step(self, xb, yb): pass

class Descends(ACHC):
    """The generator makes equation (7) smaller."""
    def game(self, *args): return {k: -v for k, v in super().game(*args).items()} if self.climbing else super().game(*args)
    climbing = False
    def generator_step(self, xb, yb):
        self.climbing = True
        try: super().generator_step(xb, yb)
        finally: self.climbing = False

class GeneratorMovesAll(ACHC):
    def generator_step(self, xb, yb):
        super().generator_step(xb, yb)
        with torch.no_grad(): next(self.nets_.encoder.parameters()).mul_(1.01)

class NotDetached(ACHC):
    def optimizers(self): return super().optimizers() | dict(all=self.adam('encoder', 'generator'))
    def invent(self, b):
        made = super().invent(b)
        made.detach = lambda: made
        return made

class TrainingStatistics(ACHC):
    def step(self, xb, yb):
        self.nets_.train()
        return self.detector_step(xb, yb) | (self.generator_step(xb, yb) or {})

class QuantileThreshold(ACHC):
    def threshold_rule(self, scores): return np.quantile(scores, 1 - self.contamination)

class NeverCalibrates(ACHC):
    def threshold_rule(self, scores): return float(self.radius_)**2

class SignedScore(ACHC):
    def image_score(self, xb): return self.distances(xb) - self.radius_**2

class RootScore(ACHC):
    def image_score(self, xb): return self.distances(xb).sqrt()

class WatchesWeightsOnly(ACHC):
    def settle(self, data):
        now = torch.cat([p.detach().flatten() for p in self.nets_.encoder.parameters()])
        last, self._last = self._last, now
        return last is not None and bool((now - last).norm() <= self.tol * last.norm())

class NeverStops(ACHC):
    def settle(self, data): return False


CAUGHT = {NoHinge: check_terms, PairsWithLabelled: check_terms, LostNorm: check_terms, FrozenRadius: check_players, DetachedRadius: check_gradient_of_radius,
          FrozenCenter: check_players, IdleGenerator: check_players, Descends: check_players, GeneratorMovesAll: check_players, NotDetached: check_players,
          TrainingStatistics: check_round, QuantileThreshold: check_score, NeverCalibrates: check_score, SignedScore: check_score, RootScore: check_score,
          WatchesWeightsOnly: check_stop, NeverStops: check_stop}

@pytest.mark.filterwarnings('ignore:.*of the training images lie outside')
@pytest.mark.parametrize('mutant', CAUGHT, ids=lambda m: m.__name__)
def test_mutants_are_caught(mutant):
    with pytest.raises((AssertionError, RuntimeError)): CAUGHT[mutant](mutant)


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('size, channels', [(8, 1), (28, 1), (32, 3), (27, 3)])
def test_any_image(size, channels, tmp_path):
    """Memory layouts of convolutions included; a saved game is a finished one."""
    x = surfaces(n_train=40, n_test=10, size=size, channels=channels).x_train
    d = ACHC(width=2, epochs=2, pretrain_epochs=1, warm_up=1, wraps=50, verbose=False).fit(x)
    assert set(d.predict(x)) <= {0, 1} and isinstance(d.radius_, float) and not d.center_.requires_grad
    d.save(tmp_path/'game')
    np.testing.assert_array_equal(ACHC.load(tmp_path/'game').decision_function(x), d.decision_function(x))


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('settings', [dict(features='pca', components=12), dict(omega1=0., omega2=0., wraps=0), dict(omega1=0., wraps=0), dict(refresh=1, precision='bfloat16')])
def test_promises_of_other_settings(settings):
    check_detector(ACHC(**dict(width=8, wraps=300, epochs=10, pretrain_epochs=10, warm_up=5) | settings))


def test_radius_that_lags_behind_is_reported():
    with pytest.warns(UserWarning, match='lie outside of the sphere'):
        d = ACHC(**TINY | dict(epochs=1, lr=.5)).fit(X, Y)
    d.calibrate(TASK.x_test[TASK.y_test == 0])
    assert d.predict(TASK.x_test[TASK.y_test == 0]).mean() < .2


@pytest.mark.parametrize('wrong, words', [(dict(omega1=-1.), 'omega1'), (dict(omega2=float('nan')), 'omega2'), (dict(latent_dim=0), 'latent_dim'), (dict(generator_lr=0.), 'generator_lr'),
                                          (dict(sphere_lr=-1.), 'sphere_lr'), (dict(tol=-1.), 'tol'), (dict(nu=1.), 'nu'), (dict(contamination=0.), 'contamination'), (dict(objective='one-class'), 'objective'),
                                          (dict(features='pca', components=70), 'components need'), (dict(features='pixels'), 'features')])
def test_bad_input(wrong, words):
    d = ACHC(**TINY)
    with pytest.raises(ValueError, match=words): d.set_params(**wrong).fit(X, Y)
    assert not hasattr(d, 'threshold_')


@pytest.mark.filterwarnings('ignore')
def test_one_image_and_copies():
    with pytest.raises(ValueError): ACHC(**TINY).fit(X[:1])
    with pytest.raises(ValueError): ACHC(**TINY | dict(features='pca', components=3)).fit(np.repeat(X[:1], 20, 0))
    x = np.concatenate([X[:30], X[:30]])                                                    # every image twice
    assert np.isfinite(ACHC(**TINY).fit(x).decision_function(x)).all()


def test_the_game_has_a_rate_of_its_own():
    rates = {'warm': set(), 'game': set()}
    class Watched(ACHC):
        def warm_step(self, xb, yb):
            rates['warm'].add(self.optimizers_['all'].param_groups[0]['lr'])
            return super().warm_step(xb, yb)

        def detector_step(self, xb, yb):
            rates['game'].add(self.optimizers_['all'].param_groups[0]['lr'])
            return super().detector_step(xb, yb)

    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        Watched(**TINY, lr=3e-3, game_lr=2e-4).fit(X, Y)
    assert rates == {'warm': {3e-3}, 'game': {2e-4}}
    with pytest.raises(ValueError, match='game_lr'): ACHC(**TINY, game_lr=-1.).fit(X, Y)


def test_the_start_is_a_wide_random_code():
    """The chapter's choice: no autoencoder before the game, and a code wider than any image of the digits."""
    assert ACHC().pretrain_epochs == 0 and ACHC().code_dim > X[0].size
