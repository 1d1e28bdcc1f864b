"""ACHC: equations (7) to (9) and algorithm 3.2, image by image in float64; who moves whom;
and mutants that each check must catch."""
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from ad_course import achc
from ad_course.achc import ACHC, at_rest, equation_7
from ad_course.check import check_detector
from ad_course.data import digits
from ad_course.detector import _Progress, isolated, total_loss
from ad_course.surfaces import surfaces
from tests.mutants import assert_caught, changed, each_mutant, mutant

TASK = digits(normal=3)
X = np.concatenate([TASK.x_train[:60], TASK.x_reserve[:20]])
Y = np.repeat([0, 1], [60, 20])
XB, YB = torch.tensor(X[::3]), torch.tensor(Y[::3])
TINY = dict(arch='mlp', width=2, code_dim=3, batch_size=40, epochs=2, pretrain_epochs=2,
            warm_up=2, wraps=60, gcn=False, verbose=False)
PARTS = {'encoder', 'generator', 'center', 'radius'}

pytestmark = pytest.mark.filterwarnings('ignore:.*follows a rule of its own')


def trained(cls, x=X, y=Y, **settings):
    """A fitted detector of tiny size."""
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return cls(**TINY | settings).fit(x, y)


def in_play(cls, **settings):
    """A detector in the middle of its game, with wrapping points and a sphere that parts every
    group of images, so that no term is idle."""
    d = trained(ACHC, **settings)
    d.__class__ = cls   # a mutant starts from a sound training
    d.draw_bank(d.as_batches(X, Y))
    normal, labelled = torch.tensor(X[Y == 0]), torch.tensor(X[Y == 1])
    with isolated(0), torch.no_grad():
        seen = d.prepare(normal), d.prepare(labelled), d.fake(40), d.bank.points
        groups = [d.nets_.encoder(views) for views in seen]
        center = torch.stack([g.mean(0) for g in groups]).mean(0)
        away = [(g - center).norm(dim=1) for g in groups]
        radius = max(min(a.quantile(.6) for a in away), 1.05 * max(a.min() for a in away))
    d.center_, d.radius_ = nn.Parameter(center), nn.Parameter(torch.as_tensor(radius).clone())
    sphere = torch.optim.SGD([d.center_, d.radius_], lr=d.sphere_lr)
    d.optimizers_ = d.optimizers() | dict(detector=[d.adam('encoder', lr=d.game_lr), sphere])
    d._progress = _Progress(d)
    return d


def one_turn(d, player):
    """A turn of the player on the batch, as `step` has it."""
    loss, = [loss for name, loss, *_ in d.turns() if name == player]
    return d.descend(player, loss, XB, YB)


def by_hand(d, fakes, wraps):
    """All terms of equation (8), image by image, in float64."""
    net = lambda views: d.nets_.encoder(views).detach().double().numpy()
    c, R2 = d.center_.detach().double().numpy(), float(d.radius_.detach())**2
    codes, made, around, y = net(XB), net(fakes), net(wraps), YB.numpy()
    away = lambda z: ((z - c)**2).sum(-1)
    inside = lambda z: max(0, R2 - away(z))
    normal = [0 if label else 1 / (1 - Y.mean()) for label in y]
    squares = [float((p.detach().double()**2).sum()) for p in d.nets_.encoder.parameters()]
    outside = [w * max(0, away(z) - R2) / d.nu for w, z in zip(normal, codes)]
    unknown = [label / Y.mean() * inside(z) / d.mu for label, z in zip(y, codes)]
    apart = [w * ((z - x)**2).sum() for w, z, x in zip(normal, made, codes)]
    return dict(radius=R2, outside=np.mean(outside), decay=d.weight_decay / 2 * sum(squares),
                wrapping=np.mean([inside(z) for z in around]) / d.mu, unknown=np.mean(unknown),
                generated=d.generated_weight * np.mean([inside(z) for z in made]),
                similarity=-d.similarity_weight * np.mean(apart))


# ---------------------------------------------------------------- the equations
def test_equation_7_by_hand():
    fakes, codes = torch.tensor([[0., 1.], [3., 0.]]), torch.tensor([[1., 1.], [0., 0.]])
    terms = equation_7(fakes, codes, torch.zeros(2), 4., torch.tensor([1., 2.]), 3., .5)
    assert terms['generated'].tolist() == [3 * 3, 0] and terms['similarity'].tolist() == [-.5, -9]


def test_at_rest_looks_at_each_part():
    now = [torch.tensor([3., 4.]), torch.tensor(2.)]
    assert not at_rest(now, None, 1e9) and at_rest(now, now, 0.)
    for k in (0, 1):
        moved = [v * (1.1 if i == k else 1) for i, v in enumerate(now)]
        assert at_rest(moved, now, .1001) and not at_rest(moved, now, .0999)


# ---------------------------------------------------------------- checks of the class
def check_terms(cls):
    """The seven terms of a batch, against loops in float64."""
    d = in_play(cls, similarity_weight=.3, generated_weight=2., weight_decay=.1, mu=.2)
    with isolated(3), torch.no_grad(): terms = d.loss(XB, YB)
    with isolated(3), torch.no_grad():   # in the order of the draws in the loss
        wraps, fakes = d.bank.sample(len(XB)), d.fake(len(XB))
    expected = by_hand(d, fakes, wraps)
    assert set(terms) == set(expected)
    assert all(expected.values()), f'a term is idle, and not tested: {expected}'
    for name, value in expected.items():
        got = float(terms[name].mean())
        assert got == pytest.approx(value, rel=1e-4, abs=1e-6), f'{name}: {got}, not {value}'


def photograph(d):
    """Name -> all numbers of a part that may move."""
    parts = {name: list(net.parameters()) for name, net in d.nets_.items()}
    parts |= dict(center=[d.center_], radius=[d.radius_])
    return {name: torch.cat([p.detach().flatten().clone() for p in ps])
            for name, ps in parts.items()}


def moved(d, act):
    """The parts that `act` has moved."""
    before = photograph(d)
    act()
    return {name for name, now in photograph(d).items() if not torch.equal(now, before[name])}


def value_of(d, loss, noise):
    """The loss of the batch, with fixed noise."""
    with isolated(noise), torch.no_grad(): return float(total_loss(loss(XB, YB), len(XB)))


def check_players(cls):
    """Who moves, and that one descends equation (8) and the other climbs (7)."""
    d = in_play(cls, similarity_weight=.1, generator_lr=1e-3)
    seven = lambda xb, yb: d.adversarial_terms(d.code(xb), yb)
    with isolated(0):
        by_detector = moved(d, lambda: one_turn(d, 'detector'))
        assert by_detector == PARTS - {'generator'}, f'the detector moves {by_detector}'
        by_generator = moved(d, lambda: one_turn(d, 'generator'))
        assert by_generator == {'generator'}, f'the generator moves {by_generator}'
        start = value_of(d, seven, 5)
        for _ in range(20): one_turn(d, 'generator')
        assert value_of(d, seven, 5) > start, 'the generator does not climb'
        eight = lambda xb, yb: ACHC.loss(d, xb, yb)
        start = value_of(d, eight, 9)
        for _ in range(20): one_turn(d, 'detector')
        assert value_of(d, eight, 9) < start, 'the detector does not descend'


def gradients(d, term, generator=False):
    """Of a term of the batch's loss: name -> the gradient of a part, all parts."""
    parts = dict(encoder=list(d.nets_.encoder.parameters()), center=[d.center_],
                 radius=[d.radius_], generator=list(d.nets_.generator.parameters()))
    with isolated(3): terms = (d.generator_loss if generator else d.loss)(XB, YB)
    if not terms[term].requires_grad: return {name: 0. for name in parts}
    found = {}
    for name, parameters in parts.items():
        g = torch.autograd.grad(terms[term].mean(), parameters, retain_graph=True,
                                allow_unused=True)
        found[name] = sum(float(v.abs().sum()) for v in g if v is not None)
    return found


PULLED = dict(radius={'radius'}, outside={'encoder', 'center', 'radius'}, decay={'encoder'},
              wrapping={'encoder', 'center', 'radius'}, unknown={'encoder', 'center', 'radius'},
              generated=PARTS, similarity={'encoder', 'generator'})


def check_each_term_pulls(cls):
    """Every term has a slope in what it should move and in nothing else."""
    d = in_play(cls, similarity_weight=.3, weight_decay=.1)
    for term, expected in PULLED.items():
        found = {name for name, g in gradients(d, term).items() if g}
        assert found == expected, f'{term} pulls {sorted(found)}'
    for term in ('generated', 'similarity'):
        assert gradients(d, term, generator=True)['generator'], f'{term} does not pull generator'


def check_similarity_moves_the_normal_codes(cls):
    """The detector's similarity term moves the codes of normal images too, not the fakes' only."""
    d = in_play(cls)
    codes = d.code(XB).detach().requires_grad_()
    with isolated(3): term = d.adversarial_terms(codes, YB)['similarity'].mean()
    g = torch.autograd.grad(term, codes, allow_unused=True)[0]
    assert g is not None and (g[YB == 0] != 0).any(1).all(), 'normal codes feel nothing'
    assert (g[YB == 1] == 0).all(), 'labelled codes are paired with fakes'


def check_round(cls):
    """A step moves all four, in turn, and leaves the encoder's batch statistics alone."""
    class Listens(cls):
        def train_sphere(self, data):
            """As before, and noted."""
            self.before_ = self.nets_.encoder[1].running_mean.clone()
            super().train_sphere(data)
        def step(self, xb, *yb):
            """As before, and noted."""
            if 'detector' not in self.optimizers_: return super().step(xb, *yb)
            training = [n for n, net in self.nets_.items() for m in net.modules() if m.training]
            assert set(training) <= {'generator'}, f'in training mode: {set(training)}'
            parts = moved(self, lambda: terms.update(super(Listens, self).step(xb, *yb)))
            assert parts == PARTS, f'a step moves {sorted(parts)}'
            return terms
    terms = {}
    d = trained(Listens, arch='conv')
    now = d.nets_.encoder[1].running_mean
    assert torch.equal(d.before_, now), 'fakes moved the batch statistics'


def check_gradient_of_radius(cls):
    """d/dR of (8): 2R (1 - outside/nu + (wraps + unknown inside)/mu + omega_1 fakes inside)."""
    d = in_play(cls, mu=.3, generated_weight=.7)
    with isolated(3): total_loss(d.loss(XB, YB), len(XB)).backward()
    with isolated(3), torch.no_grad():
        wraps, fakes = d.bank.sample(len(XB)), d.fake(len(XB))
        R2, away = d.radius_**2, d.squared_distances(XB)
        share = lambda views: (d.view_squared_distances(views) < R2).float().mean()
        outside = ((YB == 0) / (1 - Y.mean()) * (away > R2)).mean()
        unknown = ((YB == 1) / Y.mean() * (away < R2)).mean()
        slope = 1 - outside / d.nu + (share(wraps) + unknown) / d.mu
        slope = slope + d.generated_weight * share(fakes)
    expected = 2 * d.radius_.detach() * slope
    assert torch.allclose(d.radius_.grad, expected.float(), rtol=1e-3, atol=1e-4), 'slope of R'


def check_score(cls):
    """Equation (9): the squared distance, and R^2 as threshold; calibrate brings a quantile."""
    d = trained(cls)
    away = ((d.encode(X).astype('float64') - d.center_.double().numpy())**2).sum(1)
    assert np.allclose(d.decision_function(X), away, rtol=1e-4, atol=1e-6), 'score'
    assert d.threshold_ == pytest.approx(d.radius_**2), 'threshold'
    unseen = TASK.x_test[:50]
    quantile = np.quantile(d.decision_function(unseen), 1 - d.contamination)
    assert d.calibrate(unseen).threshold_ == pytest.approx(quantile), 'calibrate'


def rounds(d): return len(d.history_['detector/outside'])


def check_stop(cls):
    """The game ends when weights, center and radius all rest, relative to size, not before."""
    assert rounds(trained(cls, epochs=6, tol=1e9)) == 2, 'at rest at once'
    assert rounds(trained(cls, epochs=6, tol=0.)) == 6, 'never at rest'
    d = in_play(cls, tol=1e-3)
    for part in ('encoder', 'center', 'radius'):
        d._last = None
        assert not d.after_epoch(None, 1) and d.after_epoch(None, 2), 'nothing has moved'
        first = dict(encoder=next(d.nets_.encoder.parameters()), center=d.center_,
                     radius=d.radius_)[part]
        with torch.no_grad(): first.mul_(1.1)
        assert not d.after_epoch(None, 3), f'{part} moved, and the game ended'
    with torch.no_grad():   # small numbers: an absolute rule would call them at rest
        for p in (d.center_, d.radius_, *d.nets_.encoder.parameters()): p.mul_(1e-6)
    d._last = None
    d.after_epoch(None, 4)
    with torch.no_grad(): d.radius_.mul_(1.1)
    assert not d.after_epoch(None, 5), 'the rule is not relative to size'


def check_rates(cls):
    """Network, sphere and generator move at their own rates, the network slower in the game."""
    rates = {}
    class Watched(cls):
        def descend(self, player, loss, xb, *yb):
            """As before, and noted."""
            of = self.optimizers_[player]
            of = of if isinstance(of, list) else [of]
            rates.setdefault(player, set()).add(tuple(o.param_groups[0]['lr'] for o in of))
            return super().descend(player, loss, xb, *yb)
    own = dict(lr=3e-3, game_lr=2e-4, sphere_lr=5e-2, generator_lr=7e-3, pretrain_lr=6e-3)
    trained(Watched, **own)
    expected = dict(autoencoder={(6e-3,)}, all={(3e-3,)}, detector={(2e-4, 5e-2)},
                    generator={(7e-3,)})
    assert rates == expected, f'rates {rates}'


def check_noise(cls):
    """Each draw of noise gives another fake, of as many numbers as `latent_dim` says."""
    d = in_play(cls, latent_dim=5)
    with isolated(0), torch.no_grad(): fakes = d.fake(30)
    assert fakes.shape == (30, 1, 8, 8), 'shape'
    assert len(fakes.flatten(1).unique(dim=0)) == 30, 'one fake for all noise'
    assert next(d.nets_.generator.parameters()).shape[1] == 5, 'latent_dim'


CHECKS = [check_terms, check_players, check_each_term_pulls,
          check_similarity_moves_the_normal_codes, check_round, check_gradient_of_radius,
          check_score, check_stop, check_rates, check_noise]


@pytest.mark.parametrize('check', CHECKS, ids=lambda check: check.__name__)
def test_achc(check): check(ACHC)


# ---------------------------------------------------------------- mutants
def with_term(name, f):
    """ACHC with one term of its loss changed, whichever equation gives it."""
    def other(terms): return {k: f(v) if k == name else v for k, v in terms.items()}
    return changed(
        ACHC, f'other_{name}',
        sphere_terms=lambda self, *args: other(ACHC.sphere_terms(self, *args)),
        adversarial_terms=lambda self, *args: other(ACHC.adversarial_terms(self, *args)))


TERMS = 'radius', 'outside', 'decay', 'wrapping', 'unknown', 'generated', 'similarity'
WRONG = lambda t: t * 0, lambda t: -t, lambda t: 2 * t


@each_mutant({f'{name}:': [with_term(name, f) for f in WRONG] for name in TERMS})
def test_every_term_is_defended(why, broken): assert_caught(check_terms, broken, why)


def no_hinge(fakes, codes, center, R2, normal=1., generated_weight=1., similarity_weight=1.):
    terms = equation_7(fakes, codes, center, R2, normal, generated_weight, similarity_weight)
    return terms | dict(generated=generated_weight * (R2 - (fakes - center).square().sum(1)))


def pairs_with_labelled(fakes, codes, center, R2, normal, *weights):
    return equation_7(fakes, codes, center, R2, torch.ones_like(normal), *weights)


def lost_norm(fakes, codes, center, R2, normal, a, b):
    """Equation (7) as it is printed."""
    terms = equation_7(fakes, codes, center, R2, normal, a, b)
    return terms | dict(similarity=-b * normal * (fakes.sum(1) - codes.square().sum(1)))


def exchanged(fakes, codes, center, R2, normal, a, b):
    return equation_7(fakes, codes, center, R2, normal, b, a)


def codes_detached(fakes, codes, *rest): return equation_7(fakes, codes.detach(), *rest)
def fakes_detached(fakes, *rest): return equation_7(fakes.detach(), *rest)
def sphere_detached(fakes, codes, center, R2, *rest):
    return equation_7(fakes, codes, center.detach(), R2.detach(), *rest)


@pytest.mark.parametrize('check, equation, why', [
    (check_terms, no_hinge, 'generated'), (check_terms, pairs_with_labelled, 'similarity'),
    (check_terms, lost_norm, 'similarity'), (check_terms, exchanged, 'generated'),
    (check_similarity_moves_the_normal_codes, codes_detached, 'feel nothing'),
    (check_similarity_moves_the_normal_codes, pairs_with_labelled, 'labelled codes'),
    (check_each_term_pulls, fakes_detached, 'generated pulls'),
    (check_each_term_pulls, sphere_detached, 'generated pulls')])
def test_a_wrong_equation_7_is_caught(check, equation, why):
    with mutant(achc, equation_7=equation): assert_caught(check, ACHC, why)


class DetachedRadius(ACHC):
    def sphere_terms(self, codes, yb):
        kept, self.radius_ = self.radius_, self.radius_.detach()
        try: return super().sphere_terms(codes, yb)
        finally: self.radius_ = kept


class DetachedCenter(ACHC):
    def sphere_terms(self, codes, yb):
        kept, self.center_ = self.center_, self.center_.detach()
        try: return super().sphere_terms(codes, yb)
        finally: self.center_ = kept


def kept(name):
    """ACHC that puts a part of its sphere back after each turn."""
    def descend(self, player, *args):
        part = getattr(self, name)
        before = part.detach().clone()
        terms = ACHC.descend(self, player, *args)
        part.data.copy_(before)
        return terms
    return changed(ACHC, f'{name}kept', descend=descend)


class IdleGenerator(ACHC):
    def descend(self, player, *args):
        return {} if player == 'generator' else super().descend(player, *args)


class Descends(ACHC):
    """The generator makes equation (7) smaller."""
    def generator_loss(self, xb, yb):
        return {name: -term for name, term in super().generator_loss(xb, yb).items()}


class DetectorClimbs(ACHC):
    def loss(self, xb, yb): return {name: -term for name, term in super().loss(xb, yb).items()}


class GeneratorMovesAll(ACHC):
    def descend(self, player, *args):
        terms = super().descend(player, *args)
        if player == 'generator':
            with torch.no_grad(): next(self.nets_.encoder.parameters()).mul_(1.01)
        return terms


@each_mutant({
    'the detector moves': [kept('center_'), kept('radius_')],
    'the generator moves': [IdleGenerator, GeneratorMovesAll], 'does not climb': [Descends],
    'does not descend': [DetectorClimbs]})
def test_wrong_players_are_caught(why, broken): assert_caught(check_players, broken, why)


@each_mutant({'outside pulls|radius pulls': [DetachedRadius, DetachedCenter]})
def test_a_detached_sphere_is_caught(why, broken):
    assert_caught(check_each_term_pulls, broken, why)


def test_a_detached_radius_has_another_slope():
    assert_caught(check_gradient_of_radius, DetachedRadius, 'slope', (AssertionError, RuntimeError))


class TrainingStatistics(ACHC):
    def run(self, data, epochs, *args, **kwargs):
        """In training mode."""
        return super().run(data, epochs, *args, **kwargs | dict(batch_statistics=True))


class OnlyDetector(ACHC):
    def turns(self):
        """One player."""
        return super().turns()[:1]


@each_mutant({'training mode': [TrainingStatistics], 'a step moves': [OnlyDetector]})
def test_a_wrong_round_is_caught(why, broken): assert_caught(check_round, broken, why)


def quantile(self, scores): return np.quantile(scores, 1 - self.contamination)
def forever(self, scores): return float(self.radius_)**2
def signed(self, xb): return self.squared_distances(xb) - self.radius_**2
def rooted(self, xb): return self.squared_distances(xb).sqrt()


@each_mutant({
    'threshold': [changed(ACHC, threshold_rule=quantile)],
    'calibrate': [changed(ACHC, threshold_rule=forever)],
    'score': [changed(ACHC, image_score=signed), changed(ACHC, image_score=rooted)]})
def test_a_wrong_score_is_caught(why, broken): assert_caught(check_score, broken, why)


@pytest.mark.parametrize('rule, why', [
    (lambda now, last, tol: at_rest(now[:1], last, tol), 'center moved|radius moved'),
    (lambda now, last, tol: at_rest(now[1:], last and last[1:], tol), 'encoder moved'),
    (lambda now, last, tol: False, 'at rest at once'),
    (lambda now, last, tol: last is not None, 'never at rest'),
    (lambda now, last, tol: last is not None and all((a - b).norm() <= tol for a, b
                                                     in zip(now, last)), 'not relative')])
def test_a_wrong_rest_is_caught(rule, why):
    with mutant(achc, at_rest=rule): assert_caught(check_stop, ACHC, why)


def one_rate(self, *names, lr=None, betas=(.9, .999)):
    return super(ACHC, self).adam(*names, betas=betas)


def sphere_at_rest(self, data):
    self.sphere_lr = 1e-2
    ACHC.train_sphere(self, data)


@each_mutant({'rates': [changed(ACHC, adam=one_rate), changed(ACHC, train_sphere=sphere_at_rest)]})
def test_wrong_rates_are_caught(why, broken): assert_caught(check_rates, broken, why)


def one_point(self, b): return self.nets_.generator(torch.zeros(b, self.latent_dim))


def test_a_generator_that_ignores_its_noise_is_caught():
    assert_caught(check_noise, changed(ACHC, fake=one_point), 'one fake')


# ---------------------------------------------------------------- other images and settings
@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('size, channels', [(8, 1), (28, 1), (32, 3), (27, 3)])
def test_any_image(size, channels, tmp_path):
    """Memory layouts of convolutions included; a saved game is a finished one."""
    x = surfaces(n_train=40, n_test=10, size=size, channels=channels).x_train
    quick = dict(width=2, epochs=2, pretrain_epochs=1, warm_up=1, wraps=50, verbose=False)
    d = ACHC(**quick).fit(x)
    assert set(d.predict(x)) <= {0, 1}
    assert isinstance(d.radius_, float) and not d.center_.requires_grad and not d.bank
    d.save(tmp_path/'game')
    again = ACHC.load(tmp_path/'game')
    np.testing.assert_array_equal(again.decision_function(x), d.decision_function(x))


WRAPPING = 'epsilon_factor', 'rule', 'redraw_every', 'mu'


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('settings, idle', [
    (dict(features='pca', components=12), ()), (dict(redraw_every=1, precision='bfloat16'), ()),
    (dict(generated_weight=0., wraps=0), WRAPPING),
    (dict(generated_weight=0., similarity_weight=0., wraps=0),
     (*WRAPPING, 'generator_lr', 'latent_dim'))])
def test_promises_of_other_settings(settings, idle):
    """Where nobody repels, or plays, `idle` are the hyper-parameters that have nothing to do."""
    quick = dict(width=8, wraps=300, epochs=10, pretrain_epochs=10, warm_up=5)
    check_detector(changed(ACHC, acts_with=dict.fromkeys(idle))(**quick | settings))


def test_wrapping_points_are_drawn_again_where_they_are_due():
    class Counts(ACHC):
        def draw_bank(self, data, draw=0):
            """As before, and noted."""
            self.draws_ = [*getattr(self, 'draws_', []), draw]
            super().draw_bank(data, draw)
    assert trained(Counts, epochs=5, tol=0., redraw_every=2).draws_ == [0, 2, 4]
    assert trained(Counts, epochs=5, tol=0.).draws_ == [0]


@pytest.mark.filterwarnings('default:.*follows a rule of its own')
def test_a_radius_that_lags_behind_is_reported():
    with pytest.warns(UserWarning, match='of its 60 training images'):
        d = ACHC(**TINY | dict(epochs=3, game_lr=.05)).fit(X, Y)
    unseen = TASK.x_test[TASK.y_test == 0]
    assert d.calibrate(unseen).predict(unseen).mean() < .2


@pytest.mark.parametrize('wrong, words', [
    (dict(generated_weight=-1.), 'generated_weight'),
    (dict(similarity_weight=float('nan')), 'similarity_weight'), (dict(latent_dim=0), 'latent_dim'),
    (dict(generator_lr=0.), 'generator_lr'), (dict(sphere_lr=-1.), 'sphere_lr'),
    (dict(game_lr=-1.), 'game_lr'), (dict(tol=-1.), 'tol'), (dict(nu=1.), 'nu'),
    (dict(contamination=0.), 'contamination'), (dict(objective='one-class'), 'objective'),
    (dict(features='pca', components=70), 'components must'), (dict(features='x'), 'features')])
def test_bad_input(wrong, words):
    d = ACHC(**TINY)
    with pytest.raises(ValueError, match=words): d.set_params(**wrong).fit(X, Y)
    assert not hasattr(d, 'threshold_')


@pytest.mark.filterwarnings('ignore')
def test_one_image_and_copies():
    with pytest.raises(ValueError, match='at least 2'): ACHC(**TINY).fit(X[:1])
    same = np.repeat(X[:1], 20, 0)
    with pytest.raises(ValueError, match='same'):
        ACHC(**TINY | dict(features='pca', components=3)).fit(same)
    twice = np.concatenate([X[:30], X[:30]])
    assert np.isfinite(ACHC(**TINY).fit(twice).decision_function(twice)).all()


def test_the_start_is_a_wide_random_code():
    """The chapter's choice: no autoencoder, and a code wider than any image of the digits."""
    assert ACHC().pretrain_epochs == 0 and ACHC().code_dim > X[0].size
