"""Three games: every term, who moves whom, the thermostat, the nearest image; mutants of each."""
import numpy as np
import pytest
import torch
from scipy.stats import norm
from sklearn.exceptions import NotFittedError
from torch import nn
from torch.nn import functional as F

from ad_course.aae import critic_terms
from ad_course.detector import isolated, load, total_loss
from ad_course.gan import (BEGAN, GAN, LSGAN, cross_entropy_critic, cross_entropy_generator,
                           equilibrium, least_squares_critic, least_squares_generator)
from ad_course.metrics import energy_distance
from ad_course.networks import Critic, decoder

from .mutants import assert_caught, each_mutant
from .players import altered, check_explosion, moved, ready, without

X = np.random.default_rng(0).random((40, 1, 4, 4), dtype='float32')
XB = torch.tensor(X)
SMALL = dict(latent_dim=3, width=2, n_draws=50, verbose=False)


def raw(cls, **params):
    """An untrained detector, ready for single steps."""
    return ready(cls(**SMALL | dict(epochs=0) | params).fit(X))


class Pixels(nn.Module):
    """A generator that shows its noise: (b, 3) -> (b, 1, 1, 3)."""
    def __init__(self): super().__init__(); self.w = nn.Parameter(torch.ones(3))
    def forward(self, z): return (self.w * z).view(-1, 1, 1, 3)


class Linear(nn.Module):
    """A critic whose answer is the first pixel less twice the second: (b, 1, 1, 3) -> (b,)."""
    def __init__(self): super().__init__(); self.w = nn.Parameter(torch.tensor([1., -2., 0.]))
    def forward(self, x): return x.flatten(1) @ self.w


def shown(cls):
    """The class with the two networks above, on images of three pixels."""
    nets = dict(networks=lambda self, shape: dict(generator=Pixels(), critic=Linear()))
    d = type('Shown', (cls,), nets)(epochs=0, latent_dim=3, n_draws=2, verbose=False)
    return d.fit(np.random.default_rng(1).random((6, 1, 1, 3), dtype='float32'))


TRUTHS = {
    GAN: dict(real=lambda u: F.binary_cross_entropy_with_logits(u, u * 0 + 1, reduction='none'),
              fake=lambda u: F.binary_cross_entropy_with_logits(u, u * 0, reduction='none'),
              fooling=lambda u: -torch.log(torch.sigmoid(u))),
    LSGAN: dict(real=lambda u: (u - 1)**2 / 2, fake=lambda u: u**2 / 2,
                fooling=lambda u: (u - 1)**2 / 2)}


def kind_of(cls): return LSGAN if issubclass(cls, LSGAN) else GAN


# ---------------------------------------------------------------- equations
def check_values(cls):
    """Each term on known answers, with noise from N(0, I)."""
    d, truth = shown(cls), TRUTHS[kind_of(cls)]
    xb = torch.rand(6, 1, 1, 3, generator=torch.Generator().manual_seed(2))
    answer = lambda x: x.reshape(-1, 3) @ torch.tensor([1., -2., 0.])
    with isolated(7): z = torch.randn(6, 3)
    with isolated(7): terms = d.critic_loss(xb)
    assert sorted(terms) == ['fake', 'real'], 'terms of the critic'
    with isolated(7): terms |= d.generator_loss(xb)
    for name, u in dict(real=answer(xb), fake=answer(z), fooling=answer(z)).items():
        assert terms[name].shape == (6,), f'shape of {name}'
        assert torch.allclose(terms[name], truth[name](u), atol=1e-5), f'value of {name}'


def check_pull(cls):
    """The generator's loss has the slope of its formula, through the generator."""
    d, truth = shown(cls), TRUTHS[kind_of(cls)]['fooling']
    xb = torch.zeros(6, 1, 1, 3)
    with isolated(3): ours = total_loss(d.generator_loss(xb), 6)
    with isolated(3): z = torch.randn(6, 3)
    w = torch.ones(3, requires_grad=True)
    expected, = torch.autograd.grad(truth((z * w) @ torch.tensor([1., -2., 0.])).mean(), w)
    found, = torch.autograd.grad(ours, d.nets_.generator.w, allow_unused=True)
    assert found is not None and torch.allclose(found, expected, atol=1e-5), 'slope'


# ---------------------------------------------------------------- the game
def check_players(cls):
    """Each step moves its own player and nobody else, in the right direction."""
    d = raw(cls)
    assert moved(d, 'critic', d.critic_loss, XB) == {'critic'}, 'step of the critic'
    assert moved(d, 'generator', d.generator_loss, XB) == {'generator'}, 'step of the generator'
    with isolated(1), torch.no_grad(): z = torch.randn(200, 3)
    fake = lambda: d.critic_output(d.nets_.generator(z)).mean()
    gap = lambda: (d.critic_output(XB).mean() - fake())
    better = -1 if issubclass(cls, BEGAN) else 1      # BEGAN's critic is low for what is real
    if better > 0:
        before = gap(); moved(d, 'critic', d.critic_loss, XB, 30)
        assert gap() > before + .01, 'the critic does not learn to tell them apart'
    before = fake(); moved(d, 'generator', d.generator_loss, XB, 30)
    assert better * fake() > better * before + 1e-3, 'the generator does not learn to fool'


def check_turns(cls):
    """One turn each, critic first; every term is recorded."""
    turns = [(player, loss.__name__) for player, loss in cls(**SMALL).turns()]
    assert turns == [('critic', 'critic_loss'), ('generator', 'generator_loss')], 'turns'
    d = cls(**SMALL, epochs=2).fit(X)
    recorded = {k for k, v in d.history_.items() if len(v) == 2} - {'k', 'convergence'}
    assert recorded == {'critic/real', 'critic/fake', 'generator/fooling', 'seconds'}, 'records'


def check_draws(cls):
    """Played on pixels around .3, the generator comes to draw pixels around .3."""
    x = np.random.default_rng(0).normal(.3, .05, (200, 1, 1, 1)).astype('float32')
    d = cls(latent_dim=2, epochs=80, batch_size=50, width=4, verbose=False).fit(x)
    far, before = (energy_distance(a.reshape(-1, 1), x.reshape(-1, 1))
                   for a in (d.sample(500), cls(epochs=0, verbose=False).fit(x).sample(500)))
    assert far < .25 * before, f'distance {far:.3f}, {before:.3f} before: it does not learn to draw'


# ---------------------------------------------------------------- the score
def check_score(cls):
    """Mean squared error to the nearest of n_draws images, by a plain loop; and its map."""
    d = cls(**SMALL, epochs=2).fit(X)
    new = np.random.default_rng(7).random((15, 1, 4, 4), dtype='float32') ** 2
    bank = d.sample(50)
    errors = ((new[:, None] - bank[None])**2)                                  # (15, 50, 1, 4, 4)
    per_image = errors.mean((2, 3, 4))
    assert np.allclose(d.decision_function(new), per_image.min(1), rtol=1e-4), 'score'
    best = errors[np.arange(15), per_image.argmin(1)].sum(1)
    assert np.allclose(d.anomaly_map(new), best, rtol=1e-4, atol=1e-6), 'map'
    assert np.allclose(d.decision_function(bank), 0, atol=1e-6), 'a generated image is normal'
    with torch.no_grad(): again = d.nets_.generator(torch.tensor(d.encode(new))).numpy()
    assert np.allclose(again, d.reconstruct(new), atol=1e-5), 'code'
    assert np.array_equal(d.sample(50), bank), 'samples are the same at each call'


def check_bank(cls):
    """Draws from N(0, I) by the seed, n_draws of them, through batch statistics at rest."""
    x = np.random.default_rng(3).random((24, 1, 8, 8), dtype='float32')
    d = cls(**SMALL | dict(n_draws=7, seed=5), arch='conv', epochs=3, batch_size=8).fit(x)
    z = torch.randn(7, 3, generator=torch.Generator().manual_seed(5))
    with torch.no_grad(): images = d.nets_.eval().generator(z)
    same = d.bank_.shape == images.shape and torch.allclose(d.bank_, images, atol=1e-6)
    assert same, 'bank'
    assert np.allclose(d.sample(7), images, atol=1e-6) and not d.nets_.training, 'samples'
    codes = d.encode(x)
    assert np.allclose(codes, z[d.nearest(torch.tensor(x))]), 'codes'
    d.set_params(n_draws=3, seed=1)                # after fit: what was drawn stays what it is
    assert np.array_equal(d.encode(x), codes), 'codes'


def check_networks(cls):
    """Every size reaches both networks; batch normalization in both for 'conv', none for 'mlp'."""
    def shapes(**settings):
        nets = cls(**SMALL | settings).networks((1, 8, 8))
        return {n: sorted(tuple(p.shape) for p in net.parameters()) for n, net in nets.items()}
    for change in (dict(width=3), dict(arch='conv')):
        assert all(shapes()[n] != s for n, s in shapes(**change).items()), f'{change} is not heard'
    for arch, wanted in (('conv', True), ('mlp', False)):
        for name, net in cls(**SMALL, arch=arch).networks((1, 8, 8)).items():
            norms = any('BatchNorm' in type(layer).__name__ for layer in net.modules())
            assert norms == wanted, f'normalization of the {name}'


def check_separate(cls):
    """Real and generated images pass the critic in batches of their own."""
    x = np.random.default_rng(3).random((24, 1, 8, 8), dtype='float32')
    d, xb = cls(**SMALL, arch='conv', epochs=0).fit(x), torch.tensor(x)
    d.nets_.train()
    with isolated(4): terms = d.critic_loss(xb)
    with isolated(4): fake = d.fake(len(xb))
    truth = TRUTHS[kind_of(cls)]
    for name, images in (('real', xb), ('fake', fake)):
        assert torch.allclose(terms[name], truth[name](d.nets_.critic(images)), atol=1e-5), name


CHECKS = (check_values, check_pull, check_players, check_turns, check_draws, check_score,
          check_bank, check_networks, check_separate)


@pytest.mark.parametrize('cls', (GAN, LSGAN))
@pytest.mark.parametrize('check', CHECKS)
def test_the_chapter_keeps(check, cls): check(cls)


@pytest.mark.parametrize('check', (check_players, check_turns, check_score, check_bank,
                                   check_networks))
def test_began_keeps(check): check(BEGAN)


# ---------------------------------------------------------------- mutants


def negative(terms): return {k: -v for k, v in terms.items()}
def tripled(terms): return {k: 3 * v for k, v in terms.items()}
def column(terms): return {k: v[:, None] for k, v in terms.items()}
def detached(terms): return {k: v.detach() for k, v in terms.items()}


BOTH = (GAN, LSGAN)
NO_REAL, NO_FAKE, FLIPPED, SUMMED, COLUMN = (
    [altered(cls, 'critic_loss', change, f'{cls.__name__}{name}') for cls in BOTH]
    for change, name in ((without('real'), 'NoReal'), (without('fake'), 'NoFake'),
                         (negative, 'Flipped'), (tripled, 'Tripled'), (column, 'Column')))
HELPS, SILENT, STRONG = (
    [altered(cls, 'generator_loss', change, f'{cls.__name__}{name}') for cls in BOTH]
    for change, name in ((negative, 'Helps'), (without('fooling'), 'Silent'), (tripled, 'Strong')))


class Swapped(GAN):
    """Real images are called 0, generated ones 1."""
    def critic_loss(self, xb):
        return cross_entropy_critic(self.critic_output(self.fake(len(xb))), self.critic_output(xb))

class SwappedSquares(LSGAN):
    def critic_loss(self, xb):
        return least_squares_critic(self.critic_output(self.fake(len(xb))), self.critic_output(xb))

class Saturating(GAN):
    def generator_loss(self, xb):
        return dict(fooling=-F.softplus(self.critic_output(self.fake(len(xb)))))

class OtherLoss(LSGAN):
    def generator_loss(self, xb): return GAN.generator_loss(self, xb)

class WantsZero(LSGAN):
    def generator_loss(self, xb):
        return dict(fooling=self.critic_output(self.fake(len(xb))).square() / 2)

class UniformNoise(GAN):
    def fake(self, n): return self.nets_.generator(torch.rand(n, self.latent_dim))

class Detached(GAN):
    def generator_loss(self, xb):
        return cross_entropy_generator(self.critic_output(self.fake(len(xb)).detach()))

class CriticMovesBoth(GAN):
    def optimizers(self): return {**super().optimizers(), 'critic': self.adam(*self.nets_)}

class GeneratorMovesBoth(GAN):
    def optimizers(self): return {**super().optimizers(), 'generator': self.adam(*self.nets_)}

class NoCritic(GAN):
    def turns(self):
        """The critic never moves."""
        return super().turns()[1:]

class NoGenerator(GAN):
    def turns(self):
        """The generator never moves."""
        return super().turns()[:1]

class Farthest(GAN):
    def nearest(self, xb): return torch.cdist(xb.flatten(1), self.bank_.flatten(1)).argmax(1)

class AlwaysTheFirst(GAN):
    def nearest(self, xb): return torch.zeros(len(xb), dtype=torch.long)

class OtherDraws(GAN):
    """The images are made from other noise than the codes say."""
    def set_threshold(self, data):
        super().set_threshold(data)
        self.bank_ = self.bank_.flip(0)

class BankInTraining(GAN):
    def set_threshold(self, data):
        super().set_threshold(data)
        with torch.no_grad(): self.bank_ = self.nets_.train().generator(self.codes_)
        self.nets_.eval()

class AlwaysFifty(GAN):
    def set_threshold(self, data):
        super().set_threshold(data)
        self.codes_ = self.draws(50)
        with torch.no_grad(): self.bank_ = self.nets_.generator(self.codes_)

class OwnSeed(GAN):
    def draws(self, n):
        return torch.randn(n, self.latent_dim, generator=torch.Generator().manual_seed(0))

class UniformDraws(GAN):
    def draws(self, n): return torch.rand(n, self.latent_dim, generator=self.rng())

class SampleInTraining(GAN):
    def sample(self, n):
        with torch.no_grad(): return self.nets_.train().generator(self.draws(n)).numpy()

class DrawsAgain(GAN):
    def code(self, xb): return self.draws(self.n_draws)[self.nearest(xb) % self.n_draws]

def sized(generator={}, critic={}):
    """A GAN of which one network hears other sizes."""
    def networks(self, shape):
        sizes = dict(shape=shape, arch=self.arch, width=self.width)
        return dict(generator=decoder(**dict(code_dim=self.latent_dim) | sizes | generator),
                    critic=Critic(**dict(norm=None) | sizes | critic))
    return type(f'Sized{[*generator, *critic]}', (GAN,), dict(networks=networks))

class OnePass(GAN):
    def critic_loss(self, xb):
        both = self.critic_output(torch.cat([xb, self.fake(len(xb))]))
        return cross_entropy_critic(*both.chunk(2))

class OfTheCritic(GAN):
    def image_score(self, xb): return -self.critic_output(xb)


@each_mutant({'value of real': NO_REAL + FLIPPED + SUMMED + [Swapped, SwappedSquares],
              'value of fake': NO_FAKE + [UniformNoise], 'shape': COLUMN,
              'value of fooling': HELPS + SILENT + STRONG + [Saturating, OtherLoss, WantsZero]})
def test_wrong_losses_are_caught(why, broken): assert_caught(check_values, broken, why)


@each_mutant({'slope': HELPS + SILENT + [Saturating, WantsZero]})
def test_wrong_slopes_are_caught(why, broken): assert_caught(check_pull, broken, why)


@each_mutant({'tell them apart': FLIPPED + [Swapped], 'learn to fool': HELPS,
              'step of the critic': (CriticMovesBoth,),
              'step of the generator': (GeneratorMovesBoth, Detached)})
def test_wrong_moves_are_caught(why, broken): assert_caught(check_players, broken, why)


@each_mutant({'turns': (NoCritic, NoGenerator)})
def test_wrong_turns_are_caught(why, broken): assert_caught(check_turns, broken, why)


@each_mutant({'does not learn to draw': [NoCritic, NoGenerator, *HELPS, *FLIPPED]})
def test_a_game_that_teaches_nothing_is_caught(why, broken):
    assert_caught(check_draws, broken, why)


@each_mutant({'score': (Farthest, AlwaysTheFirst, OfTheCritic), 'code': (OtherDraws,)})
def test_wrong_scores_are_caught(why, broken): assert_caught(check_score, broken, why)


@each_mutant({'bank': (BankInTraining, AlwaysFifty, OwnSeed, UniformDraws),
              'samples': (SampleInTraining,), 'codes': (DrawsAgain,)})
def test_wrong_draws_are_caught(why, broken): assert_caught(check_bank, broken, why)


@each_mutant({'width': (sized(dict(width=2)), sized(critic=dict(width=2))),
              'arch': (sized(dict(arch='auto')), sized(critic=dict(arch='auto'))),
              'of the generator': (sized(dict(norm=False)),),
              'of the critic': (sized(critic=dict(norm=False)),)})
def test_sizes_that_are_not_heard_are_caught(why, broken):
    assert_caught(check_networks, broken, why)


@each_mutant({'real|fake': (OnePass,)})
def test_mixed_batches_are_caught(why, broken): assert_caught(check_separate, broken, why)


# ---------------------------------------------------------------- BEGAN
def check_thermostat(cls):
    """Equations (7) and (8) over ten steps, k worked out by hand from the recorded terms."""
    d = ready(cls(**SMALL | dict(epochs=0), gamma=.4, k_rate=.5).fit(X))
    d._progress.turns = [(*turn, 1) for turn in d.turns()]
    k = 0.
    for _ in range(10):
        with isolated(1): critic = d.critic_loss(XB)
        with isolated(1): loss = lambda x: (x - d.nets_.critic.rebuild(x)).abs().mean((1, 2, 3))
        with isolated(1), torch.no_grad(): fake = d.fake(len(XB))
        with torch.no_grad(): real, made = loss(XB), loss(fake)
        assert torch.allclose(critic['real'], real), 'real'
        assert torch.allclose(critic['fake'], -k * made, atol=1e-6), 'fake'
        with isolated(2): terms = d.step(XB)
        mean = lambda name: float(terms[name].detach().mean())
        ours, theirs = mean('critic/real'), mean('generator/fooling')
        assert np.isclose(float(terms['convergence']), ours + abs(.4 * ours - theirs)), 'M'
        k = min(max(k + .5 * (.4 * ours - theirs), 0), 1)
        assert np.isclose(float(d.nets_.critic.k), k, atol=1e-6), 'k'
        assert terms['k'] == d.nets_.critic.k, 'k is recorded'
        with torch.no_grad(): d.nets_.critic.k.fill_(k := k + .1)      # so that it is seen to act
    return d


def check_slope(cls):
    """Equation (7), left, moves the critic by both of its terms."""
    d = raw(cls)
    d.nets_.critic.k.fill_(.5)
    weights = [*d.nets_.critic.parameters()]
    with isolated(4): ours = total_loss(d.critic_loss(XB), len(XB))
    rebuilt = lambda x: (x - d.nets_.critic.rebuild(x)).abs().mean()
    with isolated(4): fake = d.fake(len(XB)).detach()
    theirs = rebuilt(XB) - .5 * rebuilt(fake)
    ours, theirs = (torch.autograd.grad(loss, weights) for loss in (ours, theirs))
    same = all(torch.allclose(a, b, atol=1e-6) for a, b in zip(ours, theirs))
    assert same, 'slope of the critic'


def test_began_follows_its_thermostat(): check_thermostat(BEGAN)
def test_began_moves_by_both_terms(): check_slope(BEGAN)


def test_code_dim_reaches_the_critic():
    wide, narrow = (BEGAN(**SMALL, code_dim=k).networks((1, 8, 8))['critic'] for k in (5, 2))
    count = lambda net: sum(p.numel() for p in net.parameters())
    assert count(wide) > count(narrow)


@pytest.mark.parametrize('wrong', (dict(gamma=1.5), dict(gamma=0), dict(k_rate=0),
                                   dict(code_dim=0), dict(beta1=1.), dict(latent_dim=0)))
def test_began_refuses(wrong):
    name = [*wrong][0]
    with pytest.raises(ValueError, match=f'BEGAN: {name}'): BEGAN(**SMALL | wrong).fit(X)


class PaysForFakes(BEGAN):
    def critic_loss(self, xb):
        terms = super().critic_loss(xb)
        return terms | dict(fake=-terms['fake'])

class IgnoresK(BEGAN):
    def critic_loss(self, xb):
        return super().critic_loss(xb) | dict(fake=-self.critic_output(self.fake(len(xb))))

class OtherWay(BEGAN):
    def step(self, xb, *yb):
        k = self.nets_.critic.k.clone()
        terms = super().step(xb, *yb)
        self.nets_.critic.k.copy_((2 * k - self.nets_.critic.k).clamp(0, 1))
        return terms

class KStands(BEGAN):
    def step(self, xb, *yb):
        k, terms = self.nets_.critic.k.clone(), super().step(xb, *yb)
        self.nets_.critic.k.copy_(k)
        return terms

class Squared(BEGAN):
    def critic_output(self, xb):
        return (xb - self.nets_.critic.rebuild(xb)).square().mean((1, 2, 3))


class FakesDetached(BEGAN):
    def critic_loss(self, xb):
        return super().critic_loss(xb) | dict(
            fake=-self.nets_.critic.k * self.critic_output(self.fake(len(xb))).detach())


def test_detached_fakes_are_caught(): assert_caught(check_slope, FakesDetached, 'slope')


@each_mutant({'fake': (PaysForFakes, IgnoresK), 'k': (OtherWay, KStands), 'real': (Squared,)})
def test_a_wrong_thermostat_is_caught(why, broken): assert_caught(check_thermostat, broken, why)


def test_the_thermostat_stays_between_0_and_1():
    for k, on_real, on_fake, expected, convergence in (
            (.9, 1., 0., 1., 1.5), (.1, 0., 1., 0., 1.), (.5, .2, .1, .5, .2)):
        k, m = equilibrium(*torch.tensor([k, on_real, on_fake]), gamma=.5, rate=2.)
        assert np.isclose(float(k), expected) and np.isclose(float(m), convergence)


def test_k_is_saved_with_the_model(tmp_path):
    d = BEGAN(**SMALL, epochs=3, k_rate=1.).fit(X)
    d.save(tmp_path/'d')
    assert d.nets_.critic.k > 0 and load(tmp_path/'d').nets_.critic.k == d.nets_.critic.k


# ---------------------------------------------------------------- pieces
def test_the_best_critic_of_both_losses_is_a_ratio_of_densities():
    z = np.linspace(-4, 6, 300)
    p, q = (torch.tensor(norm.pdf(z, m, s)) for m, s in ((0, 1), (2, .7)))
    D = (p / (p + q)).requires_grad_()
    for terms in (cross_entropy_critic(torch.logit(D), torch.logit(D)),
                  least_squares_critic(D, D)):
        slope, = torch.autograd.grad((p * terms['real'] + q * terms['fake']).sum(), D)
        assert slope.abs().max() < 1e-6


def test_losses_stay_finite_for_any_logit():
    big = torch.tensor([-1e4, 1e4])
    terms = cross_entropy_critic(big, big) | cross_entropy_generator(big)
    assert all(torch.isfinite(t).all() for t in terms.values())


def test_the_game_is_that_of_the_adversarial_autoencoder():
    a, b = torch.randn(2, 9, generator=torch.Generator().manual_seed(0))
    ours, theirs = cross_entropy_critic(a, b), critic_terms(a, b)
    torch.testing.assert_close([*ours.values()], [*theirs.values()])


def test_least_squares_punish_what_is_called_too_real():
    u = torch.tensor([3.], requires_grad=True)
    by_squares, = torch.autograd.grad(least_squares_generator(u)['fooling'].sum(), u)
    by_logarithm, = torch.autograd.grad(cross_entropy_generator(u)['fooling'].sum(), u)
    assert by_squares > 0 > by_logarithm


def test_rates_and_memory_reach_the_optimizers():
    d = raw(GAN, lr=.1, critic_lr=.2, beta1=.3)
    groups = {name: o.param_groups[0] for name, o in d.optimizers_.items()}
    assert {k: g['lr'] for k, g in groups.items()} == dict(generator=.1, critic=.2)
    assert all(g['betas'] == (.3, .999) for g in groups.values())
    assert raw(GAN, beta1=0).optimizers_['critic'].param_groups[0]['betas'][0] == 0   # an int works


@pytest.mark.parametrize('wrong', (-1, 2.5, 'a', None, True))
def test_sample_wants_a_number(wrong):
    with pytest.raises(ValueError, match='n must be a whole number'): GAN().sample(wrong)


def test_the_losses_of_a_game_need_not_fall():
    assert GAN.loss_falls is LSGAN.loss_falls is BEGAN.loss_falls is False


def test_sample_needs_a_fit():
    with pytest.raises(NotFittedError, match='call fit'): GAN().sample(3)


def test_nearest_needs_a_fit():
    with pytest.raises(NotFittedError, match='call fit\\(x\\) before nearest'):
        GAN(**SMALL).nearest(torch.tensor(X))


def test_an_exploding_game_names_player_term_epoch_and_rates():
    check_explosion(LSGAN, "'critic/real'.*epoch 1.*critic_lr=1e\\+30", **SMALL, critic_lr=1e30)


def test_what_an_epoch_has_learned_is_kept_when_the_game_explodes(tmp_path):
    class Late(GAN):
        """Fine for two epochs, then not a number."""
        def generator_loss(self, xb):
            broken = float('nan') if len(self.history_.get('seconds', [])) > 1 else 1
            return {k: v * broken for k, v in super().generator_loss(xb).items()}
    d = GAN(**SMALL, epochs=1).fit(X)
    scores = d.decision_function(X)
    late = Late(**SMALL, epochs=5)
    with pytest.raises(FloatingPointError, match="'generator/fooling'.*epoch 3"):
        late.fit(X, checkpoint=tmp_path/'run')
    assert (tmp_path/'run').exists() and not hasattr(late, 'nets_')
    np.testing.assert_array_equal(d.decision_function(X), scores)


@pytest.mark.parametrize('shape', [(1, 1, 1), (1, 2, 1), (3, 5, 7), (1, 28, 28)])
def test_any_size_of_image(shape):
    x = np.random.default_rng(0).random((10, *shape), dtype='float32')
    d = GAN(**SMALL, epochs=1, batch_size=5).fit(x)
    assert d.sample(3).shape == (3, *shape) and d.decision_function(x).shape == (10,)
