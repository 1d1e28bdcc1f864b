"""ALAE: three updates and whom they move, R1, codes that come back, three scores; mutants."""
import numpy as np
import pytest
import torch
from torch.nn import functional as F

from ad_course.alae import ALAE, r1_penalty
from ad_course.data import digits
from ad_course.detector import isolated, load, total_loss
from ad_course.metrics import auroc
from ad_course.networks import gradient_norm

from .mutants import assert_caught, each_mutant
from .players import (SHAPES, Scale, altered, check_any_image, check_explosion, check_refused,
                      moved, ready, without)

X = np.random.default_rng(0).random((40, 1, 4, 4), dtype='float32')
XB = torch.tensor(X)
SMALL = dict(latent_dim=3, code_dim=3, width=2, verbose=False)


def raw(cls, **params):
    """An untrained detector, ready for single steps."""
    return ready(cls(**SMALL | dict(epochs=0) | params).fit(X))


class Bent(Scale):
    """A critic of codes: a weighted sum and half the squared length."""
    def forward(self, w): return w @ self.w + w.square().sum(1) / 2


W = dict(mapping=[2., -1., .5], generator=[.5, 1., 3.], encoder=[1., -1., .5],
         critic=[1., -.2, .3])
PIXELS = torch.rand(6, 1, 1, 3, generator=torch.Generator().manual_seed(2))


def shown(cls, **params):
    """The class with networks that can be worked out, on images of three pixels."""
    def networks(self, shape):
        return dict(mapping=Scale(W['mapping'], 3), generator=Scale(W['generator'], 1, 1, 3),
                    encoder=Scale(W['encoder'], 3), critic=Bent(W['critic']))
    kind = type('Shown', (cls,), dict(networks=networks))
    return kind(**dict(epochs=0, latent_dim=3, code_dim=3, verbose=False) | params).fit(PIXELS)


def worked_out(w=W, gamma=.7):
    """All terms of all losses for the noise of seed 7, without networks."""
    m, g, e, c = (torch.as_tensor(w[k]) for k in ('mapping', 'generator', 'encoder', 'critic'))
    with isolated(7): style = torch.randn(6, 3) * m
    x, back = PIXELS.flatten(1), style * g * e
    said = lambda code: code @ c + code.square().sum(1) / 2
    slope = c * e + x * e**2
    return dict(
        critic=dict(real=F.softplus(-said(x * e)), fake=F.softplus(said(back)),
                    r1=gamma / 2 * slope.square().sum(1)),
        generator=dict(fooling=F.softplus(-said(back))),
        reciprocity=dict(latent=(style - back).square().mean(1)),
        image=dict(image=(x - x * e * g).square().mean(1)))


PLAYERS = dict(critic=('encoder', 'critic'), generator=('mapping', 'generator'),
               reciprocity=('encoder', 'generator'))


def losses(d):
    """Player -> its loss."""
    return {player: getattr(d, f'{player}_loss') for player in PLAYERS}


# ---------------------------------------------------------------- equations
def check_values(cls):
    """All terms on known networks."""
    d, expected = shown(cls, r1_weight=.7), worked_out()
    pairs = {name: (loss, expected[name]) for name, loss in losses(d).items()}
    control = shown(cls, reciprocity='image')
    pairs['control'] = control.reciprocity_loss, expected['image']
    for player, (loss, truth) in pairs.items():
        with isolated(7): terms = loss(PIXELS)
        assert terms.keys() == truth.keys(), f'names of the {player}'
        for name, value in truth.items():
            assert terms[name].shape == (6,), f'shape of {name}'
            assert torch.allclose(terms[name], value, atol=1e-5), f'value of {name}'
    assert 'r1' not in shown(cls, r1_weight=0.).critic_loss(PIXELS), 'penalty of weight 0'


def check_slopes(cls):
    """Each loss pulls at its own networks as autograd says of the formula."""
    d = shown(cls, r1_weight=.7)
    for player, loss in losses(d).items():
        w = {k: torch.tensor(v, requires_grad=True) for k, v in W.items()}
        total = sum(v.mean() for v in worked_out(w)[player].values())
        truth = torch.autograd.grad(total, [w[k] for k in PLAYERS[player]])
        with isolated(7): mine = total_loss(loss(PIXELS), 6)
        found = torch.autograd.grad(mine, [d.nets_[k].w for k in PLAYERS[player]],
                                    allow_unused=True)
        for name, a, b in zip(PLAYERS[player], found, truth):
            assert a is not None and torch.allclose(a, b, atol=1e-4), f'{player}: slope of {name}'


# ---------------------------------------------------------------- the game
def check_players(cls):
    """Each update moves its two networks and nobody else, in the right direction."""
    d = raw(cls)
    for player, loss in losses(d).items():
        assert moved(d, player, loss, XB) == {*PLAYERS[player]}, f'step of the {player}'
    moved(d, 'critic', d.critic_loss, XB, 40)
    def on_fake():
        with isolated(1), torch.no_grad(): return float(d.critic_output(d.fake(200)).mean())
    def away():
        with isolated(1), torch.no_grad(): return float(d.reciprocity_loss(XB)['latent'].mean())
    before = on_fake()
    moved(d, 'generator', d.generator_loss, XB, 20)
    assert on_fake() > before, 'generated images do not fool'
    before = away()
    moved(d, 'reciprocity', d.reciprocity_loss, XB, 100)
    assert away() < .8 * before, 'codes do not come back'


def check_turns(cls):
    """One turn each, in the paper's order; the third can be left out; every term is recorded."""
    def turns(**params): return [(p, loss.__name__) for p, loss in cls(**SMALL, **params).turns()]
    three = [(p, f'{p}_loss') for p in PLAYERS]
    assert turns() == turns(reciprocity='image') == three, 'turns'
    assert turns(reciprocity='none') == three[:2], 'turns without the third'
    history = cls(**SMALL, epochs=2).fit(X).history_
    assert {k for k, v in history.items() if len(v) == 2} == {
        'critic/real', 'critic/fake', 'critic/r1', 'generator/fooling', 'reciprocity/latent',
        'seconds'}, 'records'


def check_noise(cls):
    """Training has fresh noise at each call; `sample` the same, by way of the mapping."""
    d = raw(cls)
    with isolated(4), torch.no_grad():
        assert not torch.equal(d.styles(5), d.styles(5)), 'noise is not fresh'
        z = torch.randn(5, 3, generator=d.rng())
        images = d.nets_.generator(d.nets_.mapping(z)).numpy()
    assert np.allclose(d.sample(5), images, atol=1e-6), 'samples'
    with isolated(4), torch.no_grad(): w = shown(cls).styles(4000)
    assert torch.allclose(w.std(0), torch.tensor(W['mapping']).abs(), rtol=.1), 'spread of F(z)'


# ---------------------------------------------------------------- the score
def check_score(cls):
    """Each of the three scores from the networks' weights, and the map."""
    e, g, c = (torch.tensor(W[k]) for k in ('encoder', 'generator', 'critic'))
    x = PIXELS.flatten(1)
    code, copy = x * e, x * e * g
    truth = dict(image=(x - copy).square().mean(1), latent=(code - copy * e).square().mean(1),
                 critic=-(code @ c + code.square().sum(1) / 2))
    for name, value in truth.items():
        d = shown(cls, score_by=name)
        assert np.allclose(d.decision_function(PIXELS), value, atol=1e-5), f'score by {name}'
    squares = (x - copy).square().reshape(6, 1, 3)
    assert np.allclose(d.anomaly_map(PIXELS), squares, atol=1e-5), 'map'
    assert np.allclose(d.reconstruct(PIXELS), copy.reshape(6, 1, 1, 3)), 'reconstruction'
    assert cls().score_by == 'image', 'default score'


def check_scoring_moves_nothing(cls):
    """Not a weight, whatever mode the networks were left in; a score is the same alone."""
    x = np.random.default_rng(3).random((24, 1, 8, 8), dtype='float32')
    d = cls(**SMALL, arch='conv', epochs=2, batch_size=8).fit(x)
    before, scores = {k: v.clone() for k, v in d.nets_.state_dict().items()}, None
    for mode in (False, True):
        d.nets_.train(mode)
        first = d.decision_function(x)
        scores = first if scores is None else scores
        assert np.allclose(first, scores, rtol=1e-4), 'the mode decides'
        d.nets_.train(mode)
        alone = np.concatenate([d.decision_function(x[i:i + 1]) for i in range(3)])
        assert np.allclose(alone, scores[:3], rtol=1e-4), 'its company decides'
    after = d.nets_.state_dict()
    assert all(torch.equal(v, after[k]) for k, v in before.items()), 'scoring moves something'


CHECKS = (check_values, check_slopes, check_players, check_turns, check_noise, check_score,
          check_scoring_moves_nothing)


@pytest.mark.parametrize('check', CHECKS)
def test_the_chapter_keeps(check): check(ALAE)


# ---------------------------------------------------------------- mutants
NO_REAL, NO_FAKE, NO_R1 = (altered(ALAE, 'critic_loss', without(term), f'No{term}')
                           for term in ('real', 'fake', 'r1'))
WHOLE_GAMMA = altered(ALAE, 'critic_loss', lambda t: t | dict(r1=2 * t['r1']), 'WholeGamma')
NORM = altered(ALAE, 'critic_loss', lambda t: t | dict(r1=(t['r1'] * .35).sqrt()), 'Norm')
OBEDIENT = altered(ALAE, 'generator_loss', lambda t: {k: -v for k, v in t.items()}, 'Obedient')
NO_RETURN = altered(ALAE, 'reciprocity_loss', lambda t: {k: 0 * v for k, v in t.items()},
                    'NoReturn')
SUMMED = altered(ALAE, 'reciprocity_loss', lambda t: {k: 3 * v for k, v in t.items()}, 'Summed')


class AtFakes(ALAE):
    """The penalty at generated images."""
    def critic_loss(self, xb):
        with isolated(7), torch.no_grad(): fake = self.fake(len(xb))
        slope = r1_penalty(self.critic_output, fake)
        return super().critic_loss(xb) | dict(r1=self.r1_weight / 2 * slope)

class InCodes(ALAE):
    """The slope with respect to codes, not to pixels."""
    def critic_loss(self, xb):
        slope = r1_penalty(self.nets_.critic, self.code(xb))
        return super().critic_loss(xb) | dict(r1=self.r1_weight / 2 * slope)

class ToOne(ALAE):
    """The target of WGAN-GP: a slope of 1."""
    def critic_loss(self, xb):
        slope = (gradient_norm(self.critic_output, xb) - 1).square()
        return super().critic_loss(xb) | dict(r1=self.r1_weight / 2 * slope)

class FixedSlope(ALAE):
    """The penalty is a number, and moves nobody."""
    def critic_loss(self, xb):
        terms = super().critic_loss(xb)
        return terms | dict(r1=terms['r1'].detach())

class Saturating(ALAE):
    def generator_loss(self, xb):
        return dict(fooling=-F.softplus(self.critic_output(self.fake(len(xb)))))

class FixedGenerator(ALAE):
    """The third update sees generated images as given."""
    def reciprocity_loss(self, xb):
        w = self.styles(len(xb))
        return dict(latent=(w - self.code(self.nets_.generator(w).detach())).square().mean(1))

class Noise(ALAE):
    """z shall come back, not w."""
    def reciprocity_loss(self, xb):
        z = torch.randn(len(xb), self.latent_dim)
        again = self.code(self.nets_.generator(self.nets_.mapping(z)))
        return dict(latent=(z - again).square().mean(1))

class EncodedReturn(ALAE):
    """The codes of real images shall come back."""
    def reciprocity_loss(self, xb):
        if self.reciprocity == 'image': return super().reciprocity_loss(xb)
        return dict(latent=self.score_terms(xb)['latent'])

def holding(player, *names):
    """A class in which one player's Adam holds other networks."""
    def optimizers(self):
        return ALAE.optimizers(self) | {player: self.adam(*names, betas=(.5, .999))}
    return type(f'{player}Holds' + '_'.join(names), (ALAE,), dict(optimizers=optimizers))

LATE_MAPPING = holding('reciprocity', 'encoder', 'generator', 'mapping')
ONE_SIDED = holding('reciprocity', 'encoder')
BARE_CRITIC = holding('critic', 'critic')
STILL_MAPPING = holding('generator', 'generator')
ENCODER_FOOLS = holding('generator', 'mapping', 'generator', 'encoder')

class ReturnFirst(ALAE):
    def turns(self):
        """The other way round."""
        return super().turns()[::-1]

class AlwaysThree(ALAE):
    def turns(self):
        """The third update, wanted or not."""
        return [*super().turns()[:2], ('reciprocity', self.reciprocity_loss)]

class OneNoise(ALAE):
    """The same noise at each call."""
    def styles(self, n): return self.draws(n)

class NoMapping(ALAE):
    """Noise goes to the generator as it is."""
    def styles(self, n): return torch.randn(n, self.latent_dim)

class RawSample(ALAE):
    """Samples pass by the mapping."""
    def draws(self, n): return torch.randn(n, self.latent_dim, generator=self.rng())

def scoring(name, change):
    """A class with other scores."""
    def score_terms(self, xb): return change(self, xb, ALAE.score_terms(self, xb))
    return type(name, (ALAE,), dict(score_terms=score_terms))

ABSOLUTE = scoring('Absolute', lambda d, xb, t: t | dict(
    image=(xb - d.reconstruction(xb)).abs().flatten(1).mean(1)))
HIGH_REAL = scoring('HighReal', lambda d, xb, t: t | dict(critic=-t['critic']))
OF_COPY = scoring('OfCopy', lambda d, xb, t: t | dict(
    critic=-d.critic_output(d.reconstruction(xb))))
SUMMED_CODE = scoring('SummedCode', lambda d, xb, t: t | dict(latent=3 * t['latent']))

class Swapped(ALAE):
    """Latent and image exchanged."""
    def image_score(self, xb):
        other = dict(image='latent', latent='image').get(self.score_by, self.score_by)
        return self.score_terms(xb)[other]

class TrainMode(ALAE):
    """Nobody calls eval() before scoring."""
    def image_score(self, xb):
        self.nets_.train()
        return super().image_score(xb)


@each_mutant({'value of real': (NO_REAL,), 'value of fake': (NO_FAKE, OneNoise, NoMapping),
              'value of r1': (NO_R1, WHOLE_GAMMA, NORM, AtFakes, ToOne),
              'of r1': (InCodes,), 'value of fooling': (OBEDIENT, Saturating),
              'value of latent': (NO_RETURN, SUMMED, Noise, EncodedReturn)})
def test_wrong_losses_are_caught(why, broken): assert_caught(check_values, broken, why)


@each_mutant({'critic: slope of': (FixedSlope, NO_R1, AtFakes, ToOne),
              'generator: slope of': (OBEDIENT, Saturating),
              'reciprocity: slope of generator': (FixedGenerator,)})
def test_wrong_slopes_are_caught(why, broken): assert_caught(check_slopes, broken, why)


@each_mutant({'step of the critic': (BARE_CRITIC,),
              'step of the generator': (STILL_MAPPING, ENCODER_FOOLS),
              'step of the reciprocity': (LATE_MAPPING, ONE_SIDED, FixedGenerator),
              'do not fool': (OBEDIENT,)})
def test_wrong_moves_are_caught(why, broken): assert_caught(check_players, broken, why)


@each_mutant({'turns': (ReturnFirst,), 'without the third': (AlwaysThree,)})
def test_wrong_turns_are_caught(why, broken): assert_caught(check_turns, broken, why)


@each_mutant({'not fresh': (OneNoise,), 'spread of F': (NoMapping,), 'samples': (RawSample,)})
def test_wrong_noise_is_caught(why, broken): assert_caught(check_noise, broken, why)


@each_mutant({'score by image': (ABSOLUTE, Swapped), 'score by critic': (HIGH_REAL, OF_COPY),
              'score by latent': (SUMMED_CODE,)})
def test_wrong_scores_are_caught(why, broken): assert_caught(check_score, broken, why)


def test_a_leak_is_caught():
    assert_caught(check_scoring_moves_nothing, TrainMode, 'decides|moves')


# ---------------------------------------------------------------- pieces
def test_the_penalty_of_a_linear_and_of_a_flat_critic():
    x = torch.rand(4, 1, 1, 2)
    linear = lambda x: 3 * x[:, 0, 0, 0] - 4 * x[:, 0, 0, 1]
    assert torch.allclose(r1_penalty(linear, x), torch.full((4,), 25.))
    w = torch.zeros(2, requires_grad=True)
    flat = r1_penalty(lambda x: x.flatten(1) @ w, x)
    assert not flat.any() and not torch.autograd.grad(flat.sum(), w)[0].any(), 'flat is free'


def test_a_left_inverse_returns_every_code():
    """E G = 1: the latent score is zero for any image, whatever the copy looks like."""
    d = shown(ALAE, score_by='latent')
    with torch.no_grad(): d.nets_.encoder.w.copy_(1 / d.nets_.generator.w)
    assert d.decision_function(torch.rand(9, 1, 1, 3)).max() < 1e-12


def test_nothing_is_searched():
    scores = [ALAE(**SMALL, epochs=1, n_draws=n).fit(X).decision_function(X) for n in (1, 900)]
    assert np.array_equal(*scores)
    with pytest.raises(NotImplementedError, match='no generated images to search'):
        ALAE(**SMALL, epochs=1).fit(X).nearest(XB)


def test_codes_and_noise_may_differ_in_width():
    d = ALAE(**SMALL | dict(latent_dim=5, code_dim=2), epochs=1).fit(X)
    assert d.encode(X).shape == (40, 2) and d.draws(7).shape == (7, 2)
    assert d.sample(3).shape == (3, 1, 4, 4)


def test_rates_and_memory_reach_the_optimizers():
    d = raw(ALAE, lr=.1, critic_lr=.2, reciprocity_lr=.3, beta1=.4)
    groups = {name: o.param_groups[0] for name, o in d.optimizers_.items()}
    assert {k: g['lr'] for k, g in groups.items()} == dict(critic=.2, generator=.1,
                                                           reciprocity=.3)
    assert all(g['betas'] == (.4, .999) for g in groups.values())


@pytest.mark.parametrize('params, message', [
    (dict(code_dim=0), 'code_dim must be a whole number, at least 1; got 0'),
    (dict(r1_weight=-1), 'r1_weight must be a number, at least 0; got -1'),
    (dict(reciprocity='z'), "one of 'latent', 'image', 'none'"),
    (dict(score_by='w'), "one of 'image', 'latent', 'critic'"),
    (dict(reciprocity_lr=0), 'reciprocity_lr'), (dict(critic_lr=0), 'critic_lr'),
    (dict(arch='cnn'), 'arch'), (dict(latent_dim=0), 'latent_dim')])
def test_wrong_settings_are_named(params, message):
    check_refused(ALAE, message, **SMALL | params)


def test_an_exploding_game_names_player_term_epoch_and_rates():
    check_explosion(ALAE, "'critic/.*epoch 1.*critic_lr=1e\\+30", **SMALL, critic_lr=1e30)


@pytest.mark.parametrize('shape', SHAPES)
def test_any_image_fits(shape): check_any_image(ALAE, shape, **SMALL)


def test_a_saved_game_scores_the_same(tmp_path):
    d = ALAE(**SMALL, epochs=2, score_by='latent').fit(X)
    d.save(tmp_path/'d')
    assert np.array_equal(load(tmp_path/'d').decision_function(X), d.decision_function(X))


def test_it_beats_itself_untrained():
    task = digits(normal=0)
    fits = [ALAE(latent_dim=8, code_dim=8, epochs=n, verbose=False).fit(task.x_train)
            for n in (0, 40)]
    before, after = (auroc(task.y_test, d.decision_function(task.x_test)) for d in fits)
    assert after > .9 > before


# ---------------------------------------------------------------- the control
def check_control(cls):
    """With images that come back, encoder and generator are pulled at by autograd's slopes."""
    d, names = shown(cls, reciprocity='image'), PLAYERS['reciprocity']
    w = {k: torch.tensor(v, requires_grad=True) for k, v in W.items()}
    total = sum(v.mean() for v in worked_out(w)['image'].values())
    truth = torch.autograd.grad(total, [w[k] for k in names])
    found = torch.autograd.grad(total_loss(d.reciprocity_loss(PIXELS), 6),
                                [d.nets_[k].w for k in names], allow_unused=True)
    for name, a, b in zip(names, found, truth):
        assert a is not None and torch.allclose(a, b, atol=1e-4), f'slope of {name}'
    fitted = raw(cls, reciprocity='image')
    changed = moved(fitted, 'reciprocity', fitted.reciprocity_loss, XB)
    assert changed == {*names}, 'step of the control'


class DetachedCode(ALAE):
    """The image term does not reach the encoder."""
    def reciprocity_loss(self, xb):
        if self.reciprocity != 'image': return super().reciprocity_loss(xb)
        copy = self.nets_.generator(self.code(xb).detach())
        return dict(image=(xb - copy).square().flatten(1).mean(1))

class DetachedCopy(ALAE):
    """The image term reaches the encoder alone, through codes that do not matter."""
    def reciprocity_loss(self, xb):
        if self.reciprocity != 'image': return super().reciprocity_loss(xb)
        copy = self.reconstruction(xb).detach() + 0 * self.code(xb).sum()
        return dict(image=(xb - copy).square().flatten(1).mean(1))


def test_the_control_keeps(): check_control(ALAE)


@each_mutant({'slope': [DetachedCode, DetachedCopy]})
def test_a_broken_control_is_caught(why, broken): assert_caught(check_control, broken, why)
