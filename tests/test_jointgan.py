"""The joint encoder: its term and whom it moves, both parts of the score; mutants of each."""
import math

import numpy as np
import pytest
import torch
from torch import nn

from ad_course.cnngan import min_max, origin_distance
from ad_course.data import digits
from ad_course.detector import isolated, load, total_loss
from ad_course.jointgan import JointGAN, image_distance, stretched_residual
from ad_course.metrics import auroc
from ad_course.wgan import WGANGP, wasserstein_generator

from .mutants import assert_caught, each_mutant
from .players import (SHAPES, Scale, altered, check_any_image, check_explosion, check_refused,
                      moved, ready, without)

X = np.random.default_rng(0).random((40, 1, 4, 4), dtype='float32')
XB = torch.tensor(X)
SMALL = dict(latent_dim=3, width=2, verbose=False)
TOGETHER = {'generator', 'encoder'}
SOURCE = dict(residual_weight=.05, standardized=False)


def raw(cls, **params):
    """An untrained detector, ready for single steps."""
    return ready(cls(**SMALL | dict(epochs=0) | params).fit(X))


class Answer(nn.Module):
    """A critic: a weighted sum of three pixels."""
    def __init__(self): super().__init__(); self.w = nn.Parameter(torch.tensor(W['critic']))
    def forward(self, x): return x.flatten(1) @ self.w


W = dict(encoder=[.8, -.3, .5], generator=[.5, 1., 2.], critic=[1., -.2, .3])
PIXELS = torch.rand(6, 1, 1, 3, generator=torch.Generator().manual_seed(2))
NOISE = torch.randn(6, 3, generator=torch.Generator().manual_seed(3))


def shown(cls, **params):
    """The class with networks and noise that can be worked out, on images of three pixels."""
    def networks(self, shape):
        return dict(encoder=Scale(W['encoder'], 3), generator=Scale(W['generator'], 1, 1, 3),
                    critic=Answer())
    def fake(self, n): return self.nets_.generator(NOISE[:n])
    kind = type('Shown', (cls,), dict(networks=networks, fake=fake))
    return kind(epochs=0, latent_dim=3, verbose=False, **params).fit(PIXELS)


def worked_out(w=W, weight=.7):
    """Both terms of the generator's turn, without networks: (b,) each."""
    w = {k: torch.as_tensor(v) for k, v in w.items()}
    fake = NOISE * w['generator']
    copied = fake * w['encoder'] * w['generator']
    return dict(fooling=-fake @ w['critic'],
                image=weight * (fake - copied).abs().sum(1) / math.sqrt(3))


# ---------------------------------------------------------------- the game
def check_values(cls):
    """Both terms of equation (1) on known networks, with the weight."""
    terms = shown(cls, image_weight=.7).generator_loss(PIXELS)
    truth = worked_out()
    assert terms.keys() == truth.keys(), 'names of the terms'
    for name, value in truth.items():
        assert terms[name].shape == (6,), f'shape of {name}'
        assert torch.allclose(terms[name], value, atol=1e-5), f'value of {name}'


def check_slopes(cls):
    """The term pulls at encoder and generator as autograd says of the formula."""
    w = {k: torch.tensor(v, requires_grad=True) for k, v in W.items()}
    truth = sum(t.mean() for t in worked_out(w).values())
    names = 'encoder', 'generator'
    truth = torch.autograd.grad(truth, [w[k] for k in names])
    d = shown(cls, image_weight=.7)
    found = torch.autograd.grad(total_loss(d.generator_loss(PIXELS), 6),
                                [d.nets_[k].w for k in names], allow_unused=True)
    for name, a, b in zip(names, found, truth):
        assert a is not None and torch.allclose(a, b, atol=1e-5), f'slope of the {name}'


def check_players(cls):
    """Each step moves its own player, all of it, and nobody else; copies come nearer."""
    d = raw(cls)
    assert moved(d, 'critic', d.critic_loss, XB) == {'critic'}, 'step of the critic'
    assert moved(d, 'generator', d.generator_loss, XB) == TOGETHER, 'step of the generator'
    def miss():
        with isolated(1), torch.no_grad():
            fake, copied = d.copies(40)
            return float((fake - copied).abs().mean())
    before = miss()
    moved(d, 'generator', d.generator_loss, XB, 60)
    assert miss() < before, 'copies come no nearer'


def check_turns(cls):
    """The critic on each batch, the others on every second; every term is recorded."""
    turns = [(player, loss.__name__, *every) for player, loss, *every in cls(**SMALL).turns()]
    assert turns == [('critic', 'critic_loss'), ('generator', 'generator_loss', 2)], 'turns'
    history = cls(**SMALL, epochs=2, batch_size=8).fit(X).history_
    names = {'critic/real', 'critic/fake', 'critic/penalty', 'generator/fooling',
             'generator/image', 'seconds'}
    assert {k for k, v in history.items() if len(v) == 2} == names, 'records'


# ---------------------------------------------------------------- the score
def parts(x=PIXELS):
    """Both parts of the score of the known networks, in float64."""
    x = x.flatten(1).double().numpy()
    code = x * W['encoder']
    def stretch(v): return (v - v.min(1, keepdims=True)) / np.ptp(v, axis=1)[:, None]
    apart = stretch(x) - stretch(code * W['generator'])
    return np.sqrt((apart**2).sum(1)) / 3, -np.sqrt((code**2).sum(1) / 3)


def check_score(cls):
    """Equations (4) and (6), for several weights, from the networks' weights."""
    residual, origin = parts()
    for weight in (0., .05, .4, 1.):
        d = shown(cls, residual_weight=weight, standardized=False)
        truth = weight * residual + (1 - weight) * origin
        assert np.allclose(d.decision_function(PIXELS), truth, atol=1e-5), 'score by (4)'
        a, b = ((t - t.mean()) / t.std() for t in (residual, origin))
        d = shown(cls, residual_weight=weight)
        truth = weight * a + (1 - weight) * b
        assert np.allclose(d.decision_function(PIXELS), truth, atol=1e-3), 'score by (6)'
        few = PIXELS[:2]
        assert np.allclose(d.decision_function(few), truth[:2], atol=1e-3), 'scale of the batch'
    half = shown(cls).decision_function(PIXELS)
    assert np.allclose(half, (a + b) / 2, atol=1e-3), 'default score'
    copied = PIXELS.flatten(1) * torch.tensor(W['encoder']) * torch.tensor(W['generator'])
    squares = (PIXELS.flatten(1) - copied).square().reshape(6, 1, 3)
    assert np.allclose(d.anomaly_map(PIXELS), squares, atol=1e-5), 'map'


def check_scoring_moves_nothing(cls):
    """Whatever mode the networks were left in; alone, in a batch, twice, in any order."""
    x = np.random.default_rng(3).random((24, 1, 8, 8), dtype='float32')
    d = cls(**SMALL, arch='conv', epochs=2, batch_size=8).fit(x)
    before = {k: v.clone() for k, v in d.nets_.state_dict().items()}
    scores = d.decision_function(x)
    d.nets_.train()
    assert np.allclose(d.decision_function(x), scores, atol=1e-4), 'the mode decides'
    assert np.allclose(d.decision_function(x[::-1].copy())[::-1], scores, atol=1e-4), 'order'
    alone = np.concatenate([d.decision_function(x[i:i + 1]) for i in range(3)])
    assert np.allclose(alone, scores[:3], atol=1e-4), 'its company decides'
    after = d.nets_.state_dict()
    assert all(torch.equal(v, after[k]) for k, v in before.items()), 'scoring moves something'


CHECKS = (check_values, check_slopes, check_players, check_turns, check_score,
          check_scoring_moves_nothing)


@pytest.mark.parametrize('check', CHECKS)
def test_the_chapter_keeps(check): check(JointGAN)


# ---------------------------------------------------------------- mutants
NO_IMAGE, NO_FOOLING = (altered(JointGAN, 'generator_loss', without(term), f'No_{term}')
                        for term in ('image', 'fooling'))
OBEDIENT = altered(JointGAN, 'generator_loss',
                   lambda t: t | dict(fooling=-t['fooling']), 'Obedient')
PLAIN_SUM = altered(JointGAN, 'generator_loss',
                    lambda t: t | dict(image=t['image'] * 3**.5), 'PlainSum')
MEAN_TERM = altered(JointGAN, 'generator_loss',
                    lambda t: t | dict(image=t['image'] / 3**.5), 'MeanTerm')

class Unweighted(JointGAN):
    def generator_loss(self, xb):
        terms = super().generator_loss(xb)
        return terms | dict(image=terms['image'] / self.image_weight)

class OfRealImages(JointGAN):
    """An autoencoder's term: real images and their copies."""
    def generator_loss(self, xb):
        return super().generator_loss(xb) | dict(
            image=self.image_weight * image_distance(xb, self.reconstruction(xb)))

class OfCodes(JointGAN):
    """Noise and its code are compared, as in ClusterGAN."""
    def generator_loss(self, xb):
        fake = self.fake(len(xb))
        return wasserstein_generator(self.critic_output(fake)) | dict(
            image=self.image_weight * image_distance(NOISE[:len(xb)], self.code(fake)))

class FixedDrawing(JointGAN):
    """The drawing is held still: the term moves the second use of the generator only."""
    def generator_loss(self, xb):
        fake, copied = self.copies(len(xb))
        return wasserstein_generator(self.critic_output(fake)) | dict(
            image=self.image_weight * image_distance(fake.detach(), copied))

class FixedCode(JointGAN):
    """No slope reaches the encoder."""
    def reconstruction(self, xb): return self.nets_.generator(self.code(xb).detach())

class EncoderOnly(JointGAN):
    """The generator does not heed the term."""
    def generator_loss(self, xb):
        fake, copied = self.copies(len(xb))
        kept = {k: p.detach() for k, p in self.nets_.generator.named_parameters()}
        copied = torch.func.functional_call(self.nets_.generator, kept, (self.code(fake.detach()),))
        return wasserstein_generator(self.critic_output(fake)) | dict(
            image=self.image_weight * image_distance(fake.detach(), copied))

class EncoderStandsStill(JointGAN):
    def optimizers(self):
        """The encoder is forgotten."""
        return WGANGP.optimizers(self)

class CriticMovesAll(JointGAN):
    def optimizers(self):
        """The critic's Adam holds everything."""
        return super().optimizers() | dict(critic=self.adam(*self.nets_))
    def critic_loss(self, xb):
        copied = self.reconstruction(xb)
        return super().critic_loss(xb) | dict(more=image_distance(xb, copied))

class GeneratorFirst(JointGAN):
    def turns(self):
        """The other way round."""
        return super().turns()[::-1]

class EachBatch(JointGAN):
    def turns(self):
        """The generator has as many turns as the critic."""
        return [turn[:2] for turn in super().turns()]


def other_terms(name, change):
    """A class whose parts of the score are others: change(self, xb, terms) -> terms to replace."""
    def score_terms(self, xb):
        terms = JointGAN.score_terms(self, xb)
        return terms | change(self, xb, terms)
    return type(name, (JointGAN,), dict(score_terms=score_terms))


LONG = other_terms('LongIsAnomalous', lambda d, x, t: dict(origin=-t['origin']))
NO_ROOT = other_terms('NoRoot', lambda d, x, t: dict(origin=t['origin'] / 3**.5))
SQUARED = other_terms('Squared', lambda d, x, t: dict(origin=-t['origin'].square()))
L1_CODE = other_terms('L1Code', lambda d, x, t: dict(origin=-d.code(x).abs().mean(1)))
NOT_STRETCHED = other_terms('NotStretched', lambda d, x, t: dict(
    residual=(x - d.reconstruction(x)).flatten(1).norm(dim=1) / 3))
ROOT_OF_N = other_terms('RootOfN', lambda d, x, t: dict(residual=t['residual'] * 3**.5))
ONE_STRETCHED = other_terms('OneStretched', lambda d, x, t: dict(
    residual=(min_max(x) - d.reconstruction(x)).flatten(1).norm(dim=1) / 3))
OF_BATCH = other_terms('RangeOfBatch', lambda d, x, t: dict(residual=(
    (x - x.min()) / (x.max() - x.min()) - min_max(d.reconstruction(x))).flatten(1).norm(dim=1) / 3))

class WeightsExchanged(JointGAN):
    def image_score(self, xb):
        before = self.residual_weight
        self.residual_weight = 1 - before
        try: return super().image_score(xb)
        finally: self.residual_weight = before

class NeverScaled(JointGAN):
    def image_score(self, xb):
        a, b = self.score_terms(xb).values()
        return self.residual_weight * a + (1 - self.residual_weight) * b

class ScaledByBatch(JointGAN):
    """Mean and deviation of the test batch: a leak."""
    def image_score(self, xb):
        if not self.standardized: return super().image_score(xb)
        a, b = ((t - t.mean()) / t.std(correction=0).clamp(1e-6)
                for t in self.score_terms(xb).values())
        return self.residual_weight * a + (1 - self.residual_weight) * b

class SourceByDefault(JointGAN):
    def image_score(self, xb):
        if self.residual_weight != JointGAN.residual_weight: return super().image_score(xb)
        a, b = self.score_terms(xb).values()
        return .05 * a + .95 * b

class TrainMode(JointGAN):
    """Nobody calls eval() before scoring."""
    def image_score(self, xb):
        self.nets_.train()
        return super().image_score(xb)


@each_mutant({'value of image': (NO_IMAGE, PLAIN_SUM, MEAN_TERM, Unweighted, OfRealImages, OfCodes),
              'value of fooling': (NO_FOOLING, OBEDIENT)})
def test_wrong_losses_are_caught(why, broken): assert_caught(check_values, broken, why)


@each_mutant({'slope of the generator': (FixedDrawing, EncoderOnly),
              'slope of the encoder': (FixedCode, NO_IMAGE)})
def test_wrong_slopes_are_caught(why, broken): assert_caught(check_slopes, broken, why)


@each_mutant({'step of the generator': (EncoderStandsStill,), 'step of the critic': (
    CriticMovesAll,), 'no nearer': (altered(JointGAN, 'generator_loss',
                                           lambda t: t | dict(image=-t['image']), 'Apart'),)})
def test_wrong_moves_are_caught(why, broken): assert_caught(check_players, broken, why)


@each_mutant({'turns': (GeneratorFirst, EachBatch)})
def test_wrong_turns_are_caught(why, broken): assert_caught(check_turns, broken, why)


@each_mutant({r'score by \(4\)': (LONG, NO_ROOT, SQUARED, L1_CODE, NOT_STRETCHED, ROOT_OF_N,
                                  ONE_STRETCHED, OF_BATCH, WeightsExchanged),
              r'score by \(6\)': (NeverScaled,), 'scale of the batch': (ScaledByBatch,),
              'default': (SourceByDefault,)})
def test_wrong_scores_are_caught(why, broken): assert_caught(check_score, broken, why)


@each_mutant({'decides|order|moves': (TrainMode, ScaledByBatch)})
def test_leaks_are_caught(why, broken): assert_caught(check_scoring_moves_nothing, broken, why)


# ---------------------------------------------------------------- pieces
def test_each_image_is_stretched_by_itself():
    x = torch.rand(5, 3, 4, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    stretched = min_max(x).flatten(1)
    assert stretched.amin(1).eq(0).all() and stretched.amax(1).eq(1).all()
    assert torch.allclose(min_max(.3 * x + .2), min_max(x))
    assert torch.allclose(min_max(x[2:3]), min_max(x)[2:3])
    assert not torch.allclose(min_max(-x), min_max(x))


def test_a_constant_image_has_a_finite_score_and_slope():
    x = torch.full((2, 1, 3, 3), .4, requires_grad=True)
    assert min_max(x).eq(0).all()
    min_max(x).sum().backward()
    assert x.grad.isfinite().all()
    d = JointGAN(**SMALL, epochs=1).fit(np.full((8, 1, 4, 4), .5, 'float32'))   # no spread at all
    assert np.isfinite(d.decision_function(X)).all()


@pytest.mark.parametrize('shape', ((1, 8, 8), (3, 5, 4)))
def test_the_residual_is_bounded(shape):
    n = math.prod(shape)
    a, b = torch.rand(2, 50, *shape, generator=torch.Generator().manual_seed(1))
    assert (stretched_residual(a, b) <= n**-.5).all()
    one = torch.zeros(1, *shape)
    one[0, 0, 0, 0] = 1
    assert float(stretched_residual(one, 1 - one)) == pytest.approx(n**-.5)


def test_long_codes_are_normal():
    assert origin_distance(torch.tensor([[2., 0.], [0., 5.]])).diff() < 0


def test_the_settings_the_chapter_speaks_of():
    d = JointGAN()
    assert (d.image_weight, d.residual_weight, d.standardized) == (1, .5, True)
    assert (d.epochs, d.batch_size, d.n_critic, d.latent_dim) == (200, 32, 2, 16)


@pytest.mark.parametrize('params, message', [
    (dict(image_weight=-1), 'image_weight must be a number, at least 0; got -1'),
    (dict(residual_weight=1.5), 'residual_weight'), (dict(standardized=1), 'standardized must be'),
    (dict(image_weight=float('nan')), 'image_weight')])
def test_wrong_settings_are_named(params, message):
    check_refused(JointGAN, message, **SMALL | params)


def test_an_exploding_game_names_player_term_epoch_and_rates():
    check_explosion(JointGAN, "'(critic|generator)/.*epoch .*critic_lr=1e\\+30", **SMALL,
                    critic_lr=1e30)


@pytest.mark.parametrize('shape', SHAPES)
def test_any_image_fits(shape): check_any_image(JointGAN, shape, **SMALL)


def test_a_saved_game_scores_the_same(tmp_path):
    """The scale of both parts belongs to the file."""
    d = JointGAN(**SMALL, epochs=2, batch_size=8).fit(X)
    d.save(tmp_path/'d')
    assert np.array_equal(load(tmp_path/'d').decision_function(X), d.decision_function(X))
    assert np.isclose(d.decision_function(X).mean(), 0, atol=1e-4)


def test_short_codes_tell_anomalies_and_call_pale_images_so():
    """The findings of the chapter, on a digit that it does not use."""
    task = digits(normal=2)
    d = JointGAN(verbose=False).fit(task.x_train)
    def short(x): return -np.linalg.norm(d.encode(x), axis=1)
    untrained = JointGAN(epochs=0, verbose=False).fit(task.x_train)
    before = auroc(task.y_test, -np.linalg.norm(untrained.encode(task.x_test), axis=1))
    assert auroc(task.y_test, short(task.x_test)) > max(.9, before + .2)
    good = task.x_test[task.y_test == 0]
    assert auroc([0] * len(good) + [1] * len(good), np.append(short(good), short(good / 2))) > .9
