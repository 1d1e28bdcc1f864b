"""ALAD: three critics and who heeds them, the score of D_xx, bounded critics; mutants of each."""
import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrize import is_parametrized

from ad_course.alad import ALAD, TwinCritic, lipschitz
from ad_course.bigan import BiGAN
from ad_course.data import digits
from ad_course.detector import isolated, load, total_loss
from ad_course.metrics import auroc

from .mutants import assert_caught, each_mutant
from .players import (SHAPES, Scale, altered, check_any_image, check_explosion, check_refused,
                      moved, ready, without)

X = np.random.default_rng(0).random((40, 1, 4, 4), dtype='float32')
XB = torch.tensor(X)
SMALL = dict(latent_dim=3, width=2, verbose=False)
CRITICS = {'critic', 'critic_xx', 'critic_zz'}
BOTH = {'encoder', 'generator'}


def raw(cls, **params):
    """An untrained detector, ready for single steps."""
    return ready(cls(**SMALL | dict(epochs=0) | params).fit(X))


class Watch(Scale):
    """A critic of two things: it sees three weighted sums and answers with a weighted sum."""
    def features(self, a, b): return a.flatten(1) * self.w + b.flatten(1).square() * self.w.flip(0)
    def forward(self, a, b): return self.features(a, b) @ self.w


W = dict(encoder=[1., -1., .5], generator=[.5, 1., 3.], critic=[1., -.2, .3],
         critic_xx=[.4, .7, -1.], critic_zz=[-.3, 1., .2])
PIXELS = torch.rand(6, 1, 1, 3, generator=torch.Generator().manual_seed(2))
NOISE = torch.randn(6, 3, generator=torch.Generator().manual_seed(3))


def shown(cls, **params):
    """The class with networks and noise that can be worked out, on images of three pixels."""
    def networks(self, shape):
        return dict(encoder=Scale(W['encoder'], 3), generator=Scale(W['generator'], 1, 1, 3),
                    **{name: Watch(W[name]) for name in sorted(CRITICS)})
    def fake_pairs(self, n): return self.nets_.generator(NOISE[:n]), NOISE[:n]
    kind = type('Shown', (cls,), dict(networks=networks, fake_pairs=fake_pairs))
    return kind(epochs=0, latent_dim=3, verbose=False, **params).fit(PIXELS)


def worked_out(w=W):
    """Answers to both kinds of pairs of the three critics, and the copies, without networks."""
    w = {k: torch.as_tensor(v) for k, v in w.items()}
    x = PIXELS.flatten(1)
    def ask(name, a, b): return (a * w[name] + b.square() * w[name].flip(0)) @ w[name]
    code, fake = x * w['encoder'], NOISE * w['generator']
    copied, recoded = code * w['generator'], fake * w['encoder']
    return dict(xz=(ask('critic', x, code), ask('critic', fake, NOISE)),
                xx=(ask('critic_xx', x, x), ask('critic_xx', x, copied)),
                zz=(ask('critic_zz', NOISE, NOISE), ask('critic_zz', NOISE, recoded))), copied


def ce(u, label):
    return F.binary_cross_entropy_with_logits(u, torch.full_like(u, label), reduction='none')


# ---------------------------------------------------------------- equations
def check_values(cls):
    """All terms of both losses on known networks against PyTorch's cross-entropy."""
    said, _ = worked_out()
    tails = dict(xz='', xx='_xx', zz='_zz')
    critic = {f'real{t}': ce(said[k][0], 1.) for k, t in tails.items()}
    critic |= {f'fake{t}': ce(said[k][1], 0.) for k, t in tails.items()}
    generator = dict(encoded=ce(said['xz'][0], 0.), generated=ce(said['xz'][1], 1.),
                     xx=.7 * ce(said['xx'][1], 1.), zz=2. * ce(said['zz'][1], 1.))
    d = shown(cls, x_weight=.7, z_weight=2.)
    for loss, expected in ((d.critic_loss, critic), (d.generator_loss, generator)):
        terms = loss(PIXELS)
        assert terms.keys() == expected.keys(), 'names of the terms'
        for name, value in expected.items():
            assert terms[name].shape == (6,), f'shape of {name}'
            assert torch.allclose(terms[name], value, atol=1e-5), f'value of {name}'


def check_slopes(cls):
    """Equation (4) pulls at encoder and generator as autograd says of the formula."""
    names = 'encoder', 'generator'
    w = {k: torch.tensor(v, requires_grad=True) for k, v in W.items()}
    said, _ = worked_out(w)
    truth = ce(said['xz'][0], 0.) + ce(said['xz'][1], 1.) + .7 * ce(said['xx'][1], 1.)
    truth = torch.autograd.grad((truth + 2. * ce(said['zz'][1], 1.)).mean(), [w[k] for k in names])
    d = shown(cls, x_weight=.7, z_weight=2.)
    found = torch.autograd.grad(total_loss(d.generator_loss(PIXELS), 6),
                                [d.nets_[k].w for k in names], allow_unused=True)
    for name, a, b in zip(names, found, truth):
        assert a is not None and torch.allclose(a, b, atol=1e-5), f'slope of the {name}'


# ---------------------------------------------------------------- the game
def check_players(cls):
    """Each step moves its own player, all of it, and nobody else; copies begin to fool."""
    d = raw(cls)
    assert moved(d, 'critic', d.critic_loss, XB) == CRITICS, 'step of the critics'
    assert moved(d, 'generator', d.generator_loss, XB) == BOTH, 'step of the generator'
    moved(d, 'critic', d.critic_loss, XB, 60)
    def said():
        """Mean answers to copies of images and of codes."""
        with isolated(1), torch.no_grad():
            xb, _, copied, _, z, recoded = d.cycles(XB)
            return (float(d.nets_.critic_xx(xb, copied).mean()),
                    float(d.nets_.critic_zz(z, recoded).mean()))
    before = said()
    moved(d, 'generator', d.generator_loss, XB, 40)
    after = said()
    assert after[0] > before[0] and after[1] > before[1], 'copies do not fool'


def check_turns(cls):
    """One turn each, critics first; every term is recorded."""
    turns = [(player, loss.__name__) for player, loss in cls(**SMALL).turns()]
    assert turns == [('critic', 'critic_loss'), ('generator', 'generator_loss')], 'turns'
    names = {f'critic/{k}{t}' for k in ('real', 'fake') for t in ('', '_xx', '_zz')}
    names |= {f'generator/{k}' for k in ('encoded', 'generated', 'xx', 'zz')}
    history = cls(**SMALL, epochs=2).fit(X).history_
    assert {k for k, v in history.items() if len(v) == 2} == names | {'seconds'}, 'records'


def check_nobody_heeds(cls):
    """With weights of 0 the critics learn on, and the losses are BiGAN's."""
    d = raw(cls, x_weight=0., z_weight=0.)
    assert d.generator_loss(XB).keys() == {'encoded', 'generated'}, 'heeded with a weight of 0'
    assert moved(d, 'critic', d.critic_loss, XB) == CRITICS, 'a spectator does not learn'
    one = raw(cls, z_weight=0.).generator_loss(XB)
    assert one.keys() == {'encoded', 'generated', 'xx'}, 'heeded with a weight of 0'


def check_bigans_losses(cls):
    """Unheeded and not normalized: BiGAN's losses, with the same networks and noise."""
    d, bigan = raw(cls, x_weight=0., z_weight=0., spectral=False), raw(BiGAN)
    for name in bigan.nets_: bigan.nets_[name] = copy.deepcopy(d.nets_[name])
    for loss in ('generator_loss', 'critic_loss'):
        terms = []
        for game in (d, bigan):
            with isolated(3): terms.append(getattr(game, loss)(XB))
        for name, value in terms[1].items():
            assert torch.allclose(terms[0][name], value, atol=1e-5), f"BiGAN's {name}"


def check_bounded(cls):
    """The critics, all their layers, have norm 1 where asked for; nobody else is touched."""
    for arch, shape in (('mlp', (1, 4, 4)), ('conv', (1, 12, 12))):
        x = np.random.default_rng(1).random((24, *shape), dtype='float32')
        d = cls(**SMALL, arch=arch, epochs=15, batch_size=8).fit(x)
        for name, net in d.nets_.items():
            layers = [m for m in net.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
            if name in BOTH:
                assert not any(map(is_parametrized, layers)), 'encoder or generator normalized'
                continue
            assert all(map(is_parametrized, layers)), f'norms of {name}: not all are bounded'
            with torch.no_grad():
                norms = [float(torch.linalg.matrix_norm(m.weight.flatten(1), 2)) for m in layers]
            assert np.allclose(norms, 1, atol=.3), f'norms of {name}: {norms}'   # an estimate
        free = cls(**SMALL, arch=arch, epochs=0, spectral=False).fit(x)
        assert not any(map(is_parametrized, free.nets_.modules())), 'normalized unasked'


# ---------------------------------------------------------------- the score
def check_score(cls):
    """Equation (5), sigma and the residual, each alone and mixed, from the networks' weights."""
    said, copied = worked_out()
    x, w = PIXELS.flatten(1), torch.tensor(W['critic_xx'])
    residual = (x - copied).abs().sum(1)
    features = ((x.square() - copied.square()) * w.flip(0)).abs().sum(1)
    sigma = -torch.sigmoid(said['xx'][1]).log()
    for name, term in dict(features=features, sigma=sigma).items():
        for alpha in (0., .4):
            d = shown(cls, critic_term=name, alpha=alpha)
            truth = alpha * residual + (1 - alpha) * term
            assert np.allclose(d.decision_function(PIXELS), truth, atol=1e-5), f'score with {name}'
    assert np.allclose(shown(cls).decision_function(PIXELS), features, atol=1e-5), 'default score'
    squares = (x - copied).square().reshape(6, 1, 3)
    assert np.allclose(d.anomaly_map(PIXELS), squares, atol=1e-5), 'map'


def check_scoring_moves_nothing(cls):
    """Not a weight, not a step of the power iteration, whatever mode the networks were left in;
    and a score is the same alone, in a batch, twice, and sorted in any way."""
    x = np.random.default_rng(3).random((24, 1, 8, 8), dtype='float32')
    d = cls(**SMALL, arch='conv', epochs=2, batch_size=8).fit(x)
    before, scores = {k: v.clone() for k, v in d.nets_.state_dict().items()}, None
    for mode in (False, True):
        d.nets_.train(mode)
        first = d.decision_function(x)
        scores = first if scores is None else scores
        assert np.allclose(first, scores, rtol=1e-4), 'the mode decides'
        assert np.allclose(d.decision_function(x), scores, rtol=1e-4), 'twice is not once'
        d.nets_.train(mode)
        assert np.allclose(d.decision_function(x[::-1].copy())[::-1], scores, rtol=1e-4), 'order'
        alone = np.concatenate([d.decision_function(x[i:i + 1]) for i in range(3)])
        assert np.allclose(alone, scores[:3], rtol=1e-4), 'its company decides'
    after = d.nets_.state_dict()
    assert all(torch.equal(v, after[k]) for k, v in before.items()), 'scoring moves something'


CHECKS = (check_values, check_slopes, check_players, check_turns, check_nobody_heeds,
          check_bigans_losses, check_bounded, check_score, check_scoring_moves_nothing)


@pytest.mark.parametrize('check', CHECKS)
def test_the_chapter_keeps(check): check(ALAD)


# ---------------------------------------------------------------- mutants
NO_REAL_XX, NO_FAKE_XX, NO_FAKE_ZZ, NO_FAKE = (
    altered(ALAD, 'critic_loss', without(term), f'No{term}')
    for term in ('real_xx', 'fake_xx', 'fake_zz', 'fake'))
NO_XX, NO_ZZ = (altered(ALAD, 'generator_loss', without(term), f'No{term}')
                for term in ('xx', 'zz'))


def other_cycles(name, change):
    """A class whose images, codes, copies and so on are others."""
    def cycles(self, xb): return change(self, *ALAD.cycles(self, xb))
    return type(name, (ALAD,), dict(cycles=cycles))


COPY_OF_FAKE = other_cycles('CopyOfFake', lambda d, x, e, c, f, z, r: (x, e, f, f, z, r))
CODE_OF_REAL = other_cycles('CodeOfReal', lambda d, x, e, c, f, z, r: (x, e, c, f, z, e))
FIXED_COPY = other_cycles('FixedCopy', lambda d, x, e, c, f, z, r: (x, e, c.detach(), f, z, r))
FIXED_CODE = other_cycles('FixedCode', lambda d, x, e, c, f, z, r: (x, e, c, f, z, r.detach()))
HALF_CYCLE = other_cycles(                                  # no slope through the encoder
    'HalfCycle', lambda d, x, e, c, f, z, r: (x, e, d.nets_.generator(e.detach()), f, z, r))

class Exchanged(ALAD):
    """What is told apart from (z, z) is called real."""
    def answers(self, critic, one, other):
        said = super().answers(critic, one, other)
        return said[::-1] if critic == 'critic_zz' else said

class OneOrder(ALAD):
    """The copy first, then the image."""
    def answers(self, critic, one, other):
        return super().answers(critic, one, other[::-1] if critic == 'critic_xx' else other)

class PairsExchanged(ALAD):
    """The images of D_xz beside codes that are not theirs."""
    def answers(self, critic, one, other):
        if critic == 'critic': one, other = (one[0], other[1]), (other[0], one[1])
        return super().answers(critic, one, other)

class WeightsExchanged(ALAD):
    def generator_loss(self, xb):
        terms = super().generator_loss(xb)
        return terms | dict(xx=terms['xx'] * self.z_weight / self.x_weight,
                            zz=terms['zz'] * self.x_weight / self.z_weight)

class Unweighted(ALAD):
    """Heeds both, whatever the weights say."""
    def generator_loss(self, xb):
        before = self.get_params()
        try: return super(Unweighted, self.set_params(x_weight=1., z_weight=1.)).generator_loss(xb)
        finally: self.set_params(**before)

class Obedient(ALAD):
    """Encoder and generator help the critics of copies."""
    def generator_loss(self, xb):
        terms = super().generator_loss(xb)
        return terms | {k: -terms[k] for k in ('xx', 'zz') if k in terms}

class IdleSpectator(ALAD):
    """A critic that nobody heeds does not learn."""
    def critic_loss(self, xb):
        terms = super().critic_loss(xb)
        return terms if self.x_weight else {k: v * ('xx' not in k) for k, v in terms.items()}

class ZZStandsStill(ALAD):
    def optimizers(self):
        """One critic is missing."""
        critics = self.adam('critic', 'critic_xx', lr=self.critic_lr, betas=(.5, .999))
        return super().optimizers() | dict(critic=critics)

class CriticsMoveAll(ALAD):
    def optimizers(self):
        """The critics' Adam holds everything."""
        return super().optimizers() | dict(critic=self.adam(*self.nets_))
    def cycles(self, xb):
        with torch.enable_grad(): return super().cycles(xb)

class GeneratorFirst(ALAD):
    def turns(self):
        """The other way round."""
        return super().turns()[::-1]

def unbound(*names):
    """A class that leaves these critics, or normalizes these others."""
    def networks(self, shape):
        nets = ALAD.networks(self, shape)
        free = ALAD(**self.get_params()).set_params(spectral=False).networks(shape)
        for name in names: nets[name] = free[name] if name in CRITICS else lipschitz(nets[name])
        return nets
    return type('Unbound_' + '_'.join(names), (ALAD,), dict(networks=networks))

class Always(ALAD):
    """Normalized, asked for or not."""
    def networks(self, shape):
        return super().networks(shape) | dict(critic_xx=lipschitz(TwinCritic(shape)))

class HeadFree(ALAD):
    """As in the official code: the last layer of each critic is left alone."""
    def networks(self, shape):
        nets = super().networks(shape)
        if self.spectral: nets['critic_xx'].head = nn.Linear(64, 1)
        return nets

class BothCopies(ALAD):
    """Features of the copy beside itself."""
    def score_terms(self, xb):
        c, seen = self.reconstruction(xb), self.nets_.critic_xx.features
        apart = (seen(xb, xb) - seen(c, c)).abs().sum(1)
        return super().score_terms(xb) | dict(features=apart)

class FeaturesOfPairs(ALAD):
    """Features of D_xz, as in BiGAN."""
    def score_terms(self, xb):
        return super().score_terms(xb) | dict(features=BiGAN.score_terms(self, xb)['features'])

class MeanFeatures(ALAD):
    def score_terms(self, xb):
        terms = super().score_terms(xb)
        return terms | dict(features=terms['features'] / 3)

class SquaredFeatures(ALAD):
    def score_terms(self, xb):
        c, seen = self.reconstruction(xb), self.nets_.critic_xx.features
        apart = (seen(xb, xb) - seen(xb, c)).square().sum(1)
        return super().score_terms(xb) | dict(features=apart)

class SigmaOfSame(ALAD):
    """The answer to (x, x): it knows nothing of the copy."""
    def score_terms(self, xb):
        return super().score_terms(xb) | dict(sigma=F.softplus(-self.nets_.critic_xx(xb, xb)))

class OtherLabel(ALAD):
    def score_terms(self, xb):
        u = self.nets_.critic_xx(xb, self.reconstruction(xb))
        return super().score_terms(xb) | dict(sigma=F.softplus(u))

class ResidualByDefault(ALAD):
    def image_score(self, xb):
        terms = self.score_terms(xb)
        alpha = self.alpha or .9
        return alpha * terms['residual'] + (1 - alpha) * terms[self.critic_term]

class TrainMode(ALAD):
    """Nobody calls eval() before scoring."""
    def image_score(self, xb):
        self.nets_.train()
        return super().image_score(xb)

class PowerIteration(ALAD):
    """D_xx alone is in training mode: its norm is estimated anew at each call."""
    def image_score(self, xb):
        self.nets_.critic_xx.train()
        return super().image_score(xb)

class DropoutOn(ALAD):
    """As in a well-known library: two calls on the same images differ."""
    def score_terms(self, xb):
        c, seen = self.reconstruction(xb), self.nets_.critic_xx.features
        drop = lambda f: F.dropout(f, .2)
        apart = (drop(seen(xb, xb)) - drop(seen(xb, c))).abs().sum(1)
        return super().score_terms(xb) | dict(features=apart)

class MinMax(ALAD):
    """Scores scaled over the batch."""
    def image_score(self, xb):
        s = super().image_score(xb)
        return (s - s.min()) / (s.max() - s.min() + 1e-6)


@each_mutant({'value of real_xx': (NO_REAL_XX,),
              'value of fake_xx': (NO_FAKE_XX, COPY_OF_FAKE, OneOrder),
              'value of fake_zz': (NO_FAKE_ZZ, CODE_OF_REAL), 'value of real_zz': (Exchanged,),
              'value of fake': (NO_FAKE,),
              'value of xx': (NO_XX, Obedient, WeightsExchanged, Unweighted),
              'value of zz': (NO_ZZ,)})
def test_wrong_losses_are_caught(why, broken): assert_caught(check_values, broken, why)


@each_mutant({'slope of the encoder': (NO_XX, NO_ZZ, FIXED_COPY, FIXED_CODE, HALF_CYCLE, Obedient)})
def test_wrong_slopes_are_caught(why, broken): assert_caught(check_slopes, broken, why)


@each_mutant({'step of the critics': (ZZStandsStill, CriticsMoveAll),
              'do not fool': (Obedient,)})
def test_wrong_moves_are_caught(why, broken): assert_caught(check_players, broken, why)


@each_mutant({'turns': (GeneratorFirst,)})
def test_wrong_turns_are_caught(why, broken): assert_caught(check_turns, broken, why)


@each_mutant({'heeded': (Unweighted,), 'a spectator does not learn': (IdleSpectator,)})
def test_heeding_unasked_is_caught(why, broken): assert_caught(check_nobody_heeds, broken, why)


@each_mutant({"BiGAN's fake": (NO_FAKE,), "BiGAN's encoded": (PairsExchanged,)})
def test_other_losses_than_bigans_are_caught(why, broken):
    assert_caught(check_bigans_losses, broken, why)


@each_mutant({'norms of critic:': (unbound('critic'),), 'norms of critic_xx': (
                  unbound('critic_xx'), HeadFree), 'norms of critic_zz': (unbound('critic_zz'),),
              'encoder or generator': (unbound('encoder'), unbound('generator')),
              'unasked': (Always,)})
def test_wrong_norms_are_caught(why, broken): assert_caught(check_bounded, broken, why)


@each_mutant({'score with features': (BothCopies, FeaturesOfPairs, MeanFeatures, SquaredFeatures,
                                      ResidualByDefault),
              'score with sigma': (SigmaOfSame, OtherLabel)})
def test_wrong_scores_are_caught(why, broken): assert_caught(check_score, broken, why)


@each_mutant({'decides|order|moves|twice': (TrainMode, PowerIteration, DropoutOn, MinMax)})
def test_leaks_are_caught(why, broken): assert_caught(check_scoring_moves_nothing, broken, why)


# ---------------------------------------------------------------- pieces
@pytest.mark.parametrize('arch', ('mlp', 'conv'))
def test_a_twin_critic_sees_both_sides(arch):
    torch.manual_seed(0)
    critic = TwinCritic((2, 9, 8), features_dim=7, arch=arch, width=2)
    a, b = torch.rand(2, 4, 2, 9, 8)
    assert critic.features(a, b).shape == (4, 7) and critic(a, b).shape == (4,)
    assert torch.allclose(critic(a, b), critic.head(critic.features(a, b))[:, 0])
    assert not torch.allclose(critic(a, b), critic(b, a))
    for other in (critic(a.flip(0), b), critic(a, b.flip(0))):
        assert not torch.allclose(critic(a, b), other)


def test_a_twin_critic_compares_pixels_at_one_place():
    """Side by side in channels: the first layer can subtract; one above the other it could not."""
    critic = TwinCritic((1, 16, 16), arch='conv', width=2)
    first = critic.body[0][0]
    assert first.in_channels == 2
    with torch.no_grad():
        first.weight[:, 1] = -first.weight[:, 0]
        a = torch.rand(3, 1, 16, 16)
        silent = first(torch.cat([a, a], 1)) - first.bias[:, None, None]
        assert silent.abs().max() < 1e-5


def test_a_bounded_critic_makes_no_difference_longer():
    torch.manual_seed(0)
    critic = TwinCritic((1, 6, 6))
    for p in critic.parameters(): p.data *= 20
    lipschitz(critic).eval()
    a, b, c = torch.rand(3, 300, 1, 6, 6)
    far = (b - c).flatten(1).norm(dim=1)
    with torch.no_grad():
        assert ((critic(a, b) - critic(a, c)).abs() <= 1.02 * far).all()
        apart = critic.features(a, b) - critic.features(a, c)
    assert (apart.norm(dim=1) <= 1.02 * far).all()


def test_lipschitz_changes_the_network_it_gets_and_keeps_directions():
    net = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Conv2d(2, 3, 3))
    plain = copy.deepcopy(net)
    assert lipschitz(net) is net
    for k in (0, 2):
        now, then = (m[k].weight.detach().flatten() for m in (net.eval(), plain))
        assert float(F.cosine_similarity(now, then, dim=0)) > 1 - 1e-5
    assert torch.equal(net[0].bias, plain[0].bias)


def test_the_settings_the_chapter_speaks_of():
    d = ALAD()
    assert (d.alpha, d.critic_term, d.spectral) == (0, 'features', True)
    assert d.x_weight == d.z_weight == 1


@pytest.mark.parametrize('params, message', [
    (dict(x_weight=-1), 'x_weight must be a number, at least 0; got -1'),
    (dict(z_weight=float('inf')), 'z_weight'), (dict(spectral=1), 'spectral must be one of True'),
    (dict(alpha=2), 'alpha'), (dict(critic_term='l2'), 'critic_term'),
    (dict(batch_size=1), 'batch_size')])
def test_wrong_settings_are_named(params, message):
    check_refused(ALAD, message, **SMALL | params)


def test_an_exploding_game_names_player_term_epoch_and_rates():
    check_explosion(ALAD, "'critic/.*epoch 1.*critic_lr=1e\\+30", **SMALL, critic_lr=1e30)


@pytest.mark.parametrize('shape', SHAPES)
def test_any_image_fits(shape): check_any_image(ALAD, shape, **SMALL)


@pytest.mark.parametrize('arch', ('mlp', 'conv'))
def test_a_saved_game_scores_the_same(arch, tmp_path):
    """The estimates of the power iteration belong to the file."""
    d = ALAD(**SMALL, epochs=2, arch=arch, critic_term='sigma', alpha=.3).fit(X)
    d.save(tmp_path/'d')
    assert np.array_equal(load(tmp_path/'d').decision_function(X), d.decision_function(X))


def test_learning_spoils_the_features():
    """The finding of the chapter, on a digit that it does not use."""
    task = digits(normal=6)
    params = dict(latent_dim=8, epochs=15, verbose=False)
    d = ALAD(**params).fit(task.x_train)
    before = ALAD(**params | dict(epochs=0)).fit(task.x_train).nets_.critic_xx
    x = torch.tensor(task.x_test)
    with torch.no_grad():
        terms, c = d.score_terms(x), d.reconstruction(x)
        untrained = (before.features(x, x) - before.features(x, c)).abs().sum(1)
    right = lambda s: auroc(task.y_test, s.numpy())
    assert abs(right(untrained) - right(terms['residual'])) < .1
    assert right(untrained) > right(terms['features']) + .1
