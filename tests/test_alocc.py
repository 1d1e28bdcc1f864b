"""ALOCC and ADAE: their equations, who moves whom, the stop, the scores; mutants of each."""
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ad_course.alocc import ADAE, ALOCC, refinement, twin_critic, twin_generator
from ad_course.dae import add_noise
from ad_course.detector import isolated, load

from .mutants import assert_caught, each_mutant
from .players import (SHAPES, Scale, altered, check_any_image, check_explosion, check_refused,
                      moved, ready, weights, without)

X = np.random.default_rng(0).random((40, 1, 4, 4), dtype='float32')
XB = torch.tensor(X)
SMALL = dict(code_dim=3, width=2, batch_size=16, verbose=False)
PIXELS = torch.rand(6, 1, 1, 3, generator=torch.Generator().manual_seed(2))
E, D, C = [1., 2., -1.], [.5, -.2, .3], torch.tensor([1., -2., 3.])


class Answer(nn.Module):
    """A critic that answers with a weighted sum of three pixels."""
    def __init__(self): super().__init__(); self.w = nn.Parameter(C.clone())
    def forward(self, x): return x.flatten(1) @ self.w


class Twin(nn.Module):
    """A critic that rebuilds each pixel by a factor."""
    def __init__(self):
        super().__init__()
        self.rebuild = Scale([.9, -.4, 1.3], 1, 1, 3)
        self.register_buffer('k', torch.zeros(()))
    def forward(self, x): return (x - self.rebuild(x)).abs().flatten(1).mean(1)


def shown(cls, **params):
    """The class with networks that can be worked out, on images of three pixels."""
    def networks(self, shape):
        critic = Twin() if issubclass(cls, ADAE) else Answer()
        return dict(encoder=Scale(E, 3), decoder=Scale(D, 1, 1, 3), critic=critic)
    kind = type('Shown', (cls,), dict(networks=networks))
    return kind(**dict(epochs=0, batch_size=6, verbose=False) | params).fit(PIXELS)


def near(a, b, why):
    assert torch.allclose(torch.as_tensor(a).double(), torch.as_tensor(b).double(), atol=1e-5), why


def rows(x): return x.flatten(1).double()
PASSED = torch.tensor(E).double() * torch.tensor(D).double()     # what three pixels become
TWIN = torch.tensor([.9, -.4, 1.3]).double()


# ---------------------------------------------------------------- ALOCC
def check_alocc(cls):
    """All terms against formulas in float64, with the noise that was drawn."""
    d = shown(cls, adversarial_weight=.7, refinement_weight=.3, sigma=.5)
    with isolated(3): noisy = rows(add_noise(PIXELS, .5))
    refined, w = noisy * PASSED, C.double()
    with isolated(3): terms = d.critic_loss(PIXELS)
    assert terms.keys() == {'real', 'fake'}, 'names of the critic'
    near(terms['real'], F.softplus(-rows(PIXELS) @ w), 'value of real')
    near(terms['fake'], F.softplus(refined @ w), 'value of fake')
    with isolated(3): terms = d.generator_loss(PIXELS)
    assert terms.keys() == {'fooling', 'refinement'}, 'names of the refiner'
    near(terms['fooling'], .7 * F.softplus(-refined @ w), 'value of fooling')
    wanted = .3 * (rows(PIXELS) - refined).square().sum(1)
    near(terms['refinement'], wanted, 'value of refinement')


def check_alocc_score(cls):
    """Minus the logit of the refined image, without noise; or the residual."""
    d, refined = shown(cls), rows(PIXELS) * PASSED
    near(d.decision_function(PIXELS), -refined @ C.double(), 'the score')
    d = shown(cls, score_by='residual')
    near(d.decision_function(PIXELS), (rows(PIXELS) - refined).square().mean(1), 'the residual')


# ---------------------------------------------------------------- ADAE
def check_adae(cls):
    """Equation (3) in float64, with a fixed weight and with k."""
    x, made = rows(PIXELS), rows(PIXELS) * PASSED
    on_x, on_made = ((v - v * TWIN).abs().mean(1) for v in (x, made))
    for weight, k in ((.3, 9.), (None, .6), (1., 9.), (0., 9.)):
        d = shown(cls, fake_weight=weight)
        d.nets_.critic.k.fill_(k)
        terms = d.critic_loss(PIXELS)
        assert terms.keys() == {'real', 'fake'}, 'names of the critic'
        near(terms['real'], on_x, 'value of real')
        near(terms['fake'], -(k if weight is None else weight) * on_made, 'value of fake')
    terms = d.generator_loss(PIXELS)
    assert terms.keys() == {'rebuilding', 'fooling'}, 'names of the generator'
    near(terms['rebuilding'], (x - made).abs().mean(1), 'value of rebuilding')
    near(terms['fooling'], on_made, 'value of fooling')


def check_adae_score(cls):
    """Mean square of x - D(G(x)), which is also what is shown as the reconstruction."""
    d, twice = shown(cls), rows(PIXELS) * PASSED * TWIN
    near(d.decision_function(PIXELS), (rows(PIXELS) - twice).square().mean(1), 'the score')
    near(d.reconstruct(PIXELS).reshape(6, 3), twice, 'the reconstruction')


def check_balance(cls):
    """k follows equation (8) of BEGAN after each batch, and stays where the weight is fixed."""
    d = ready(shown(cls, fake_weight=None, gamma=.5, k_rate=.1))
    d._progress.turns = [(*turn, 1) for turn in d.turns()]
    with isolated(0): terms = d.step(PIXELS)
    real, fake = (terms[k].detach().mean() for k in ('critic/real', 'generator/fooling'))
    wanted = (.1 * (.5 * real - fake)).clamp(0, 1)
    near(d.nets_.critic.k, wanted, 'k of the balance')
    d = ready(shown(cls, fake_weight=.2))
    d._progress.turns = [(*turn, 1) for turn in d.turns()]
    with isolated(0): terms = d.step(PIXELS)
    assert not d.nets_.critic.k and 'k' not in terms, 'k moves where it does not count'


# ---------------------------------------------------------------- both games
def raw(cls, **params):
    """An untrained detector, ready for single steps."""
    return ready(cls(**SMALL | dict(epochs=0) | params).fit(X))


def check_players(cls):
    """Each step moves its own player, and no loss of the critic reaches the other."""
    d = raw(cls)
    assert moved(d, 'critic', d.critic_loss, XB) == {'critic'}, 'step of the critic'
    pair = {'encoder', 'decoder'}
    assert moved(d, 'generator', d.generator_loss, XB) == pair, 'step of the generator'
    assert [(player, loss.__name__) for player, loss in d.turns()] == [
        ('critic', 'critic_loss'), ('generator', 'generator_loss')], 'turns'
    groups = {name: o.param_groups[0] for name, o in
              raw(cls, lr=.1, critic_lr=.2, beta1=.3).optimizers_.items()}
    assert {k: g['lr'] for k, g in groups.items()} == dict(generator=.1, critic=.2), 'rates'
    assert all(g['betas'] == (.3, .999) for g in groups.values()), 'memories'


CHECKS = [(check_alocc, ALOCC), (check_alocc_score, ALOCC), (check_adae, ADAE),
          (check_adae_score, ADAE), (check_balance, ADAE), (check_players, ALOCC),
          (check_players, ADAE)]


@pytest.mark.parametrize('check, cls', CHECKS)
def test_the_chapter_keeps(check, cls): check(cls)


# ---------------------------------------------------------------- mutants
def term(cls, hook, name):
    """The class without one term."""
    return altered(cls, hook, without(name), f'No_{name}')

def negative(cls, hook, name):
    """The class with one term turned round."""
    return altered(cls, hook, lambda t: {k: -v if k == name else v for k, v in t.items()},
                   f'Negative_{name}')

class NoisyTarget(ALOCC):
    """As the official code: what is refined is compared with the noisy image."""
    def generator_loss(self, xb):
        noisy = add_noise(xb, self.sigma)
        apart = refinement(noisy, self.reconstruction(noisy))
        with isolated(3): terms = super().generator_loss(xb)
        return terms | dict(refinement=self.refinement_weight * apart)

class Clean(ALOCC):
    """Nobody adds noise."""
    def refined(self, xb): return self.reconstruction(xb)

class Mean(ALOCC):
    """The mean over pixels, not their sum."""
    def generator_loss(self, xb):
        terms = super().generator_loss(xb)
        return terms | dict(refinement=terms['refinement'] / xb[0].numel())

class OfTheImage(ALOCC):
    """The critic is asked of the image itself."""
    def image_score(self, xb): return -self.critic_output(xb)

class Turned(ALOCC):
    """Real scores high."""
    def image_score(self, xb): return -super().image_score(xb)

class NoisyScore(ALOCC):
    """The score adds noise, as training does."""
    def image_score(self, xb): return -self.critic_output(self.refined(xb))

class AlwaysCritic(ALOCC):
    """score_by does nothing."""
    def image_score(self, xb): return -self.critic_output(self.reconstruction(xb))

class Equal(ADAE):
    """The weight is always 1."""
    def critic_loss(self, xb):
        made = self.generated(xb).detach()
        return twin_critic(self.nets_.critic(xb), self.nets_.critic(made), 1.)

class Same(ADAE):
    """G is asked how D rebuilds the image."""
    def generator_loss(self, xb):
        return super().generator_loss(xb) | dict(fooling=self.nets_.critic(xb))

class Squares(ADAE):
    """Squares for absolute values."""
    def generator_loss(self, xb):
        square = (xb - self.generated(xb)).square().flatten(1).mean(1)
        return super().generator_loss(xb) | dict(rebuilding=square)

class FirstAlone(ADAE):
    """The image passes G only."""
    def reconstruction(self, xb): return self.generated(xb)

class SecondAlone(ADAE):
    """The image passes D only."""
    def reconstruction(self, xb): return self.nets_.critic.rebuild(xb)

class BalancedAgainst(ADAE):
    """gamma stands at what G made."""
    def step(self, xb, *yb):
        terms = super().step(xb, *yb)
        if self.fake_weight is not None: return terms
        real, fake = (terms[k].detach().mean() for k in ('critic/real', 'generator/fooling'))
        self.nets_.critic.k.copy_((self.k_rate * (real - self.gamma * fake)).clamp(0, 1))
        return terms

class AlwaysBalanced(ADAE):
    """k moves, whatever the weight is."""
    def step(self, xb, *yb):
        terms = super().step(xb, *yb)
        if self.fake_weight is not None: self.nets_.critic.k.fill_(.3)
        return terms

def moves_all(cls, player):
    """The class in which one player's Adam holds everything."""
    def optimizers(self):
        """Everybody."""
        return cls.optimizers(self) | {player: self.adam(*self.nets_)}
    return type(f'{cls.__name__}_{player}_moves_all', (cls,), dict(optimizers=optimizers))

class CriticReaches(ALOCC):
    """The critic's Adam holds all, and its loss reaches the refiner."""
    def optimizers(self):
        """Everybody."""
        return super().optimizers() | dict(critic=self.adam(*self.nets_))
    def critic_loss(self, xb):
        real, fake = self.critic_output(xb), self.critic_output(self.refined(xb))
        return dict(real=F.softplus(-real), fake=F.softplus(fake))

class GeneratorFirst(ADAE):
    """The turns are the other way round."""
    def turns(self):
        """Generator, critic."""
        return super().turns()[::-1]


@each_mutant({f'value of {name}': (term(ALOCC, hook, name), negative(ALOCC, hook, name))
              for name, hook in dict(real='critic_loss', fake='critic_loss',
                                     fooling='generator_loss', refinement='generator_loss').items()}
             | {'refinement': (NoisyTarget, Mean), 'value of fake|fooling': (Clean,)})
def test_wrong_refiners_are_caught(why, broken): assert_caught(check_alocc, broken, why)


@each_mutant({'the score': (OfTheImage, Turned, NoisyScore), 'residual': (AlwaysCritic,)})
def test_wrong_scores_are_caught(why, broken): assert_caught(check_alocc_score, broken, why)


@each_mutant({f'value of {name}': (term(ADAE, hook, name), negative(ADAE, hook, name))
              for name, hook in dict(real='critic_loss', fake='critic_loss',
                                     fooling='generator_loss', rebuilding='generator_loss').items()}
             | {'value of fake': (Equal,), 'fooling': (Same,), 'rebuilding': (Squares,)})
def test_wrong_twins_are_caught(why, broken): assert_caught(check_adae, broken, why)


@each_mutant({'the score': (FirstAlone, SecondAlone)})
def test_half_a_passage_is_caught(why, broken): assert_caught(check_adae_score, broken, why)


@each_mutant({'k of the balance': (BalancedAgainst,), 'does not count': (AlwaysBalanced,)})
def test_wrong_balances_are_caught(why, broken): assert_caught(check_balance, broken, why)


@each_mutant({'of the critic': (CriticReaches,), 'turns': (GeneratorFirst,),
              'of the generator': (moves_all(ALOCC, 'generator'), moves_all(ADAE, 'generator'))})
def test_wrong_moves_are_caught(why, broken): assert_caught(check_players, broken, why)


# ---------------------------------------------------------------- pieces
def test_equations_by_hand():
    a, b = torch.tensor([1., 2.]), torch.tensor([3., 5.])
    assert {k: v.tolist() for k, v in twin_critic(a, b, .5).items()} == dict(
        real=[1, 2], fake=[-1.5, -2.5])
    assert {k: v.tolist() for k, v in twin_generator(a, b).items()} == dict(
        rebuilding=[1, 2], fooling=[3, 5])
    assert refinement(a.view(2, 1, 1, 1), b.view(2, 1, 1, 1)).tolist() == [4, 9]


def test_equal_weights_teach_nothing_where_the_game_should_end():
    class Copies(ADAE):
        """G gives the image back."""
        def generated(self, xb): return xb
    slopes = {}
    for w in (0., .25, 1.):
        d = Copies(**SMALL, epochs=0, fake_weight=w).fit(X)
        loss = sum(v.mean() for v in d.critic_loss(XB).values())
        slopes[w] = torch.cat([g.flatten() for g in
                               torch.autograd.grad(loss, [*d.nets_.critic.rebuild.parameters()])])
    assert slopes[1.].abs().max() < 1e-7 < slopes[0.].abs().max()
    assert torch.allclose(slopes[.25], .75 * slopes[0.], atol=1e-6)


def test_without_a_weight_the_refiner_does_not_hear_the_critic():
    """The critic still learns, but the refiner is the same whatever it says."""
    def refiner(lr, weight):
        d = ALOCC(**SMALL, epochs=3, adversarial_weight=weight, critic_lr=lr).fit(X)
        return weights(d, 'decoder'), weights(d, 'critic')
    (a, u), (b, v) = refiner(1e-4, 0.), refiner(1e-1, 0.)
    assert torch.allclose(a, b) and not torch.allclose(u, v)
    assert not torch.allclose(refiner(1e-4, 5.)[0], refiner(1e-1, 5.)[0])


def test_the_stop():
    """It ends after the first pass whose error a pixel is at most stop_error; 0 never does."""
    whole = ALOCC(**SMALL, epochs=12, refinement_weight=.3).fit(X)
    errors = np.array(whole.history_['generator/refinement']) / .3 / 16
    assert len(errors) == 12
    stop = float(errors[5]) * (1 + 1e-6)
    first = int(np.flatnonzero(errors <= stop)[0]) + 1
    short = ALOCC(**SMALL, epochs=12, refinement_weight=.3, stop_error=stop).fit(X)
    assert len(short.history_['seconds']) == first < 12


@pytest.mark.parametrize('cls, params, message', [
    (ALOCC, dict(sigma=-1.), 'sigma'), (ALOCC, dict(adversarial_weight=-1), 'adversarial_weight'),
    (ALOCC, dict(stop_error=-1.), 'stop_error'),
    (ALOCC, dict(score_by='both'), "score_by must be one of 'critic', 'residual'; got 'both'"),
    (ALOCC, dict(adversarial_weight=0., refinement_weight=0.), 'nothing teaches the refiner'),
    (ALOCC, dict(refinement_weight=0., stop_error=.1), 'stop_error must be 0 where'),
    (ADAE, dict(fake_weight=-1.), 'fake_weight'), (ADAE, dict(gamma=0.), 'gamma'),
    (ADAE, dict(gamma=1.5), 'gamma'), (ADAE, dict(k_rate=0), 'k_rate')]
    + [(cls, *case) for cls in (ALOCC, ADAE) for case in (
        (dict(code_dim=0), 'code_dim must be a whole number, at least 1; got 0'),
        (dict(width=0), 'width'), (dict(beta1=1.), 'beta1'), (dict(critic_lr=0), 'critic_lr'),
        (dict(arch='cnn'), 'arch'))])
def test_wrong_settings_are_named(cls, params, message):
    check_refused(cls, message, **SMALL | params)


def test_an_exploding_game_names_player_term_epoch_and_rates():
    settings = {k: v for k, v in SMALL.items() if k != 'batch_size'}
    check_explosion(ALOCC, "'critic/real'.*epoch 1.*lr=1e\\+30", **settings, lr=1e30)


@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('cls', (ALOCC, ADAE))
def test_any_image_fits(cls, shape):
    check_any_image(cls, shape, **{k: v for k, v in SMALL.items() if k != 'batch_size'})


@pytest.mark.parametrize('d', (ALOCC(**SMALL, epochs=2), ADAE(**SMALL, epochs=2, fake_weight=None)),
                         ids=('ALOCC', 'ADAE'))
def test_a_saved_game_scores_the_same(d, tmp_path):
    d.fit(X).save(tmp_path/'d')
    assert np.array_equal(load(tmp_path/'d').decision_function(X), d.decision_function(X))
