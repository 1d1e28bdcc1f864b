"""BiGAN: the losses of pairs, who moves whom, the score of EGBAD, inverse maps; mutants of each."""
import numpy as np
import pytest
import torch
from scipy.stats import norm
from torch import nn
from torch.nn import functional as F

from ad_course.bigan import BiGAN, PairCritic, fooling_pairs
from ad_course.data import digits
from ad_course.detector import isolated, load, total_loss
from ad_course.networks import encoder, generator

from .mutants import assert_caught, each_mutant
from .players import (SHAPES, Scale, altered, check_any_image, check_explosion, check_refused,
                      moved, ready, without)

X = np.random.default_rng(0).random((40, 1, 4, 4), dtype='float32')
XB = torch.tensor(X)
SMALL = dict(latent_dim=3, width=2, verbose=False)
BOTH = {'encoder', 'generator'}


def raw(cls, **params):
    """An untrained detector, ready for single steps."""
    return ready(cls(**SMALL | dict(epochs=0) | params).fit(X))


class Watch(Scale):
    """A critic of pairs that sees three weighted sums and answers with their sum."""
    def features(self, x, z): return x.flatten(1) * self.w + z * self.w.flip(0)
    def forward(self, x, z): return self.features(x, z).sum(1)


W = dict(encoder=[1., -1., .5], generator=[.5, 1., 3.], critic=[1., -2., 3.])
PIXELS = torch.rand(6, 1, 1, 3, generator=torch.Generator().manual_seed(2))
NOISE = torch.randn(6, 3, generator=torch.Generator().manual_seed(3))


def shown(cls, **params):
    """The class with networks and noise that can be worked out, on images of three pixels."""
    def networks(self, shape):
        return dict(encoder=Scale(W['encoder'], 3), generator=Scale(W['generator'], 1, 1, 3),
                    critic=Watch(W['critic']))
    def fake_pairs(self, n): return self.nets_.generator(NOISE[:n]), NOISE[:n]
    broken = vars(cls).get('fake_pairs') if cls is not BiGAN else None   # of a mutant
    kind = type('Shown', (cls,), dict(networks=networks, fake_pairs=broken or fake_pairs))
    return kind(epochs=0, latent_dim=3, verbose=False, **params).fit(PIXELS)


def worked_out(w=W):
    """Code, rebuilt pixels, and the critic's answers to both kinds of pairs, without networks."""
    w = {k: torch.as_tensor(v) for k, v in w.items()}
    x, c = PIXELS.flatten(1), w['critic']
    answer = lambda x, z: x @ c + z @ c.flip(0)
    code = x * w['encoder']
    return (code, code * w['generator'], answer(x, code),
            answer(NOISE * w['generator'], NOISE))


# ---------------------------------------------------------------- equations
def check_values(cls):
    """Both losses on known networks against PyTorch's cross-entropy."""
    *_, on_encoded, on_generated = worked_out()
    def ce(u, label):
        return F.binary_cross_entropy_with_logits(u, torch.full_like(u, label), reduction='none')
    d = shown(cls)
    expected = dict(critic=dict(real=ce(on_encoded, 1.), fake=ce(on_generated, 0.)),
                    generator=dict(encoded=ce(on_encoded, 0.), generated=ce(on_generated, 1.)))
    for player, loss in (('critic', d.critic_loss), ('generator', d.generator_loss)):
        terms = loss(PIXELS)
        assert terms.keys() == expected[player].keys(), f'names of the {player}'
        for name, value in expected[player].items():
            assert terms[name].shape == (6,), f'shape of {name}'
            assert torch.allclose(terms[name], value, atol=1e-5), f'value of {name}'


def check_slopes(cls):
    """Equation (3) pulls at encoder and generator as autograd says of the formula."""
    d, names = shown(cls), ('encoder', 'generator')
    w = {k: torch.tensor(v, requires_grad=True) for k, v in W.items()}
    *_, u, v = worked_out(w)
    truth = torch.autograd.grad((F.softplus(u) + F.softplus(-v)).mean(), [w[k] for k in names])
    ours = [d.nets_[k].w for k in names]
    found = torch.autograd.grad(total_loss(d.generator_loss(PIXELS), 6), ours, allow_unused=True)
    for name, a, b in zip(names, found, truth):
        assert a is not None and torch.allclose(a, b, atol=1e-5), f'slope of the {name}'


# ---------------------------------------------------------------- the game
def answers(d):
    """Mean logit for encoded and for generated pairs."""
    with isolated(1), torch.no_grad():
        return (float(d.critic_output(XB).mean()),
                float(d.critic_output(*d.fake_pairs(400)).mean()))


def check_players(cls):
    """Each step moves its own player and nobody else, in the right direction."""
    d = raw(cls)
    assert moved(d, 'critic', d.critic_loss, XB) == {'critic'}, 'step of the critic'
    assert moved(d, 'generator', d.generator_loss, XB) == BOTH, 'step of the generator'
    moved(d, 'critic', d.critic_loss, XB, 60)
    before = answers(d)
    assert before[0] > before[1] + .05, 'the critic does not learn to tell them apart'
    moved(d, 'generator', d.generator_loss, XB, 30)
    after = answers(d)
    assert after[0] < before[0], 'encoded pairs do not fool'
    assert after[1] > before[1], 'generated pairs do not fool'


def check_turns(cls):
    """One turn each, critic first; every term is recorded."""
    turns = [(player, loss.__name__) for player, loss in cls(**SMALL).turns()]
    assert turns == [('critic', 'critic_loss'), ('generator', 'generator_loss')], 'turns'
    recorded = {k for k, v in cls(**SMALL, epochs=2).fit(X).history_.items() if len(v) == 2}
    assert recorded == {'critic/real', 'critic/fake', 'generator/encoded', 'generator/generated',
                        'seconds'}, 'records'


def check_pairs(cls):
    """A generated pair is fresh noise from the prior and the generator's answer to it."""
    d = raw(cls)
    d.nets_.eval()
    with isolated(4), torch.no_grad():
        image, z = d.fake_pairs(4000)
        assert torch.allclose(image, d.nets_.generator(z), atol=1e-6), 'image of a pair'
        assert not torch.equal(z, d.fake_pairs(4000)[1]), 'noise is not fresh'
    assert z.shape == (4000, 3) and z.mean(0).abs().max() < .08, 'mean of the prior'
    assert (z.std(0) - 1).abs().max() < .05, 'spread of the prior'


def states(d):
    """Name of each network -> all its numbers, statistics of batches included."""
    as_row = lambda net: torch.cat([v.flatten().double() for v in net.state_dict().values()])
    return {name: as_row(net) for name, net in d.nets_.items()}


class Watched(BiGAN):
    """Notes, for every move of a whole training, which networks have changed."""
    def descend(self, player, loss, xb, *yb):
        before = states(self)
        terms, after = super().descend(player, loss, xb, *yb), states(self)
        self.seen.add((player, *(n for n in after if not torch.equal(after[n], before[n]))))
        return terms


@pytest.mark.parametrize('arch', ('mlp', 'conv'))
def test_who_moves_whom_on_digits_and_scoring_moves_nothing(arch):
    three = digits(normal=3)
    watched = Watched(epochs=1, arch=arch, verbose=False)
    watched.seen = set()
    watched.fit(three.x_train[:64])
    assert watched.seen == {('critic', 'critic'), ('generator', 'encoder', 'generator')}
    frozen = states(watched)
    watched.nets_.train()                                # as if somebody had forgotten
    scores = watched.decision_function(three.x_test)
    assert np.array_equal(watched.decision_function(three.x_test), scores)
    one_by_one = [watched.decision_function(three.x_test[i:i + 1])[0] for i in range(5)]
    assert np.allclose(one_by_one, scores[:5], rtol=1e-4)
    assert all(torch.equal(v, frozen[k]) for k, v in states(watched).items())


def norms(net): return [m for m in net.modules() if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d))]


def check_norm(cls):
    """Encoder and generator normalize each batch they play with; the critic never does."""
    for arch in ('mlp', 'conv'):
        d = ready(cls(**SMALL, epochs=0, arch=arch).fit(np.tile(X, (1, 1, 3, 3))))
        xb = XB.tile(1, 1, 3, 3)
        assert not norms(d.nets_.critic), 'critic with batch statistics'
        for name in sorted(BOTH):
            assert norms(d.nets_[name]), f'norm of the {name}'
            seen = norms(d.nets_[name])[0].running_mean.clone()
            d.nets_.train()
            d.descend('generator', d.generator_loss, xb)
            now = norms(d.nets_[name])[0].running_mean
            assert not torch.equal(now, seen), f'statistics of the {name} stand still'


# ---------------------------------------------------------------- the score
def check_score(cls):
    """Equations (4) to (6) in both forms, from the networks' weights; the map is the residual's."""
    code, rebuilt, on_encoded, _ = worked_out()
    x, c = PIXELS.flatten(1), torch.tensor(W['critic'])
    residual = (x - rebuilt).abs().sum(1)
    terms = dict(features=((x - rebuilt) * c).abs().sum(1),
                 sigma=-torch.sigmoid(on_encoded).log())
    for name, term in terms.items():
        for alpha in (.9, .4):
            d = shown(cls, critic_term=name, alpha=alpha)
            truth = alpha * residual + (1 - alpha) * term
            assert np.allclose(d.decision_function(PIXELS), truth, atol=1e-5), f'score with {name}'
    assert np.allclose(d.encode(PIXELS), code, atol=1e-6), 'code'
    assert np.allclose(d.reconstruct(PIXELS), rebuilt.reshape(6, 1, 1, 3), atol=1e-6), 'rebuilt'
    squares = (x - rebuilt).square().reshape(6, 1, 3)
    assert np.allclose(d.anomaly_map(PIXELS), squares, atol=1e-5), 'map'


def check_scoring_moves_nothing(cls):
    """Not a weight, not a statistic of a batch, whatever mode the networks were left in; and a
    score is the same alone, in a batch, twice, and sorted in any way."""
    x = np.random.default_rng(3).random((24, 1, 8, 8), dtype='float32')
    d = cls(**SMALL, arch='conv', epochs=2, batch_size=8).fit(x)
    before, scores = {k: v.clone() for k, v in d.nets_.state_dict().items()}, None
    for mode in (False, True):
        d.nets_.train(mode)
        first = d.decision_function(x)
        scores = first if scores is None else scores
        assert np.allclose(first, scores, rtol=1e-4), 'the mode decides'
        d.nets_.train(mode)
        assert np.allclose(d.decision_function(x[::-1].copy())[::-1], scores, rtol=1e-4), 'order'
        d.nets_.train(mode)
        alone = np.concatenate([d.decision_function(x[i:i + 1]) for i in range(3)])
        assert np.allclose(alone, scores[:3], rtol=1e-4), 'its company decides'
    after = d.nets_.state_dict()
    assert all(torch.equal(v, after[k]) for k, v in before.items()), 'scoring moves something'


CHECKS = (check_values, check_slopes, check_players, check_turns, check_pairs, check_norm,
          check_score, check_scoring_moves_nothing)


@pytest.mark.parametrize('check', CHECKS)
def test_the_chapter_keeps(check): check(BiGAN)


# ---------------------------------------------------------------- mutants
def negated(terms): return {k: -v for k, v in terms.items()}


NO_REAL, NO_FAKE, HELPFUL = (altered(BiGAN, 'critic_loss', change, name) for change, name in
                             ((without('real'), 'NoReal'), (without('fake'), 'NoFake'),
                              (negated, 'Helpful')))
NO_ENCODED, NO_GENERATED, OBEDIENT = (
    altered(BiGAN, 'generator_loss', change, name) for change, name in
    ((without('encoded'), 'NoEncoded'), (without('generated'), 'NoGenerated'),
     (negated, 'Obedient')))
COLUMN = altered(BiGAN, 'generator_loss', lambda t: {k: v[:, None] for k, v in t.items()}, 'Column')

class Swapped(BiGAN):
    """Generated pairs are called 1."""
    def critic_loss(self, xb):
        fake = self.critic_output(*self.fake_pairs(len(xb)))
        return dict(real=F.softplus(self.critic_output(xb)), fake=F.softplus(-fake))

class Saturating(BiGAN):
    """Encoder and generator minimize V itself."""
    def generator_loss(self, xb):
        u, v = self.critic_output(xb), self.critic_output(*self.fake_pairs(len(xb)))
        return dict(encoded=-F.softplus(-u), generated=-F.softplus(v))

class OtherNoise(BiGAN):
    """The code of a generated pair is not the one that made the image."""
    def fake_pairs(self, n):
        return self.nets_.generator(NOISE[:n].flip(0)), NOISE[:n]

class EncodedFake(BiGAN):
    """Generated images get the code of the encoder."""
    def fake_pairs(self, n):
        image = self.nets_.generator(NOISE[:n])
        return image, self.nets_.encoder(image)

class ImagesOnly(BiGAN):
    """The critic never sees a code."""
    def critic_output(self, xb, code=None):
        return self.nets_.critic(xb, torch.zeros(len(xb), self.latent_dim))

class FixedCode(BiGAN):
    """The slope does not reach the encoder."""
    def generator_loss(self, xb):
        fake = self.fake_pairs(len(xb))
        on_encoded = self.critic_output(xb, self.code(xb).detach())
        return fooling_pairs(on_encoded, self.critic_output(*fake))

class NotTrained(BiGAN):
    """The encoder stands still."""
    def optimizers(self):
        """Its Adam is missing."""
        return super().optimizers() | dict(generator=self.adam('generator'))

class CriticMovesAll(BiGAN):
    def optimizers(self):
        """The critic's Adam holds everything."""
        return super().optimizers() | dict(critic=self.adam(*self.nets_))
    def critic_loss(self, xb):
        u, v = self.critic_output(xb), self.critic_output(*self.fake_pairs(len(xb)))
        return dict(real=F.softplus(-u), fake=F.softplus(v))

class GeneratorMovesAll(BiGAN):
    def optimizers(self):
        """The generator's Adam holds everything."""
        return super().optimizers() | dict(generator=self.adam(*self.nets_))

class WiderNoise(BiGAN):
    """Codes of three times the prior's spread."""
    def fake_pairs(self, n):
        z = 3 * torch.randn(n, self.latent_dim)
        return self.nets_.generator(z), z

class OneNoise(BiGAN):
    """The same noise at each call."""
    def fake_pairs(self, n):
        z = self.draws(n)
        return self.nets_.generator(z), z

def replaced(name, make):
    """A class of which one network is another: make(shape, sizes)."""
    def networks(self, shape):
        sizes = dict(arch=self.arch, width=self.width)
        return BiGAN.networks(self, shape) | {name: make(shape, sizes)}
    return type(f'Other{name}', (BiGAN,), dict(networks=networks))

PLAIN_ENCODER = replaced('encoder', lambda shape, s: encoder(shape, 3, **s, norm=False))
PLAIN_GENERATOR = replaced('generator', lambda shape, s: generator(shape, 3, **s, norm=False))

def normalizing(shape, sizes):
    """A critic of pairs that looks at batches."""
    critic = PairCritic(shape, 3, **sizes)
    critic.image.append(nn.BatchNorm1d(critic.code.out_features))
    return critic

NORMED_CRITIC = replaced('critic', normalizing)

class EvalMode(BiGAN):
    """Encoder and generator play in scoring mode."""
    def generator_loss(self, xb):
        self.nets_.eval()
        return super().generator_loss(xb)

class NoCritic(BiGAN):
    def turns(self):
        """The critic never moves."""
        return super().turns()[1:]

class GeneratorFirst(BiGAN):
    def turns(self):
        """The other way round."""
        return super().turns()[::-1]

class MeanPixels(BiGAN):
    def score_terms(self, xb):
        terms = super().score_terms(xb)
        return terms | dict(residual=terms['residual'] / xb[0].numel())

class RebuiltCode(BiGAN):
    """Features of the rebuilt image with the code of the rebuilt image."""
    def score_terms(self, xb):
        code, rebuilt, seen = self.code(xb), self.reconstruction(xb), self.nets_.critic.features
        apart = seen(xb, code) - seen(rebuilt, self.code(rebuilt))
        return super().score_terms(xb) | dict(features=apart.abs().sum(1))

class SigmaOfRebuilt(BiGAN):
    """As in EGBAD's code."""
    def score_terms(self, xb):
        u = self.critic_output(self.reconstruction(xb), self.code(xb))
        return super().score_terms(xb) | dict(sigma=F.softplus(-u))

class OtherLabel(BiGAN):
    def score_terms(self, xb):
        return super().score_terms(xb) | dict(sigma=F.softplus(self.critic_output(xb)))

class AlphaOfCritic(BiGAN):
    """The two weights the other way round."""
    def image_score(self, xb):
        terms = self.score_terms(xb)
        return (1 - self.alpha) * terms['residual'] + self.alpha * terms[self.critic_term]

class TrainMode(BiGAN):
    """Nobody calls eval() before scoring."""
    def image_score(self, xb):
        self.nets_.train()
        return super().image_score(xb)

class MinMax(BiGAN):
    """Scores scaled over the batch."""
    def image_score(self, xb):
        s = super().image_score(xb)
        return (s - s.min()) / (s.max() - s.min() + 1e-6)


@each_mutant({'value of real': (NO_REAL, HELPFUL, Swapped, ImagesOnly),
              'value of fake': (NO_FAKE, OtherNoise, EncodedFake), 'shape': (COLUMN,),
              'value of encoded': (NO_ENCODED, OBEDIENT, Saturating),
              'value of generated': (NO_GENERATED,)})
def test_wrong_losses_are_caught(why, broken): assert_caught(check_values, broken, why)


@each_mutant({'slope of the encoder': (NO_ENCODED, FixedCode, OBEDIENT, Saturating, ImagesOnly),
              'slope of the generator': (NO_GENERATED, OtherNoise)})
def test_wrong_slopes_are_caught(why, broken): assert_caught(check_slopes, broken, why)


@each_mutant({'tell them apart': (HELPFUL, Swapped), 'step of the critic': (CriticMovesAll,),
              'step of the generator': (GeneratorMovesAll, NotTrained, FixedCode),
              'do not fool': (OBEDIENT,)})
def test_wrong_moves_are_caught(why, broken): assert_caught(check_players, broken, why)


@each_mutant({'turns': (NoCritic, GeneratorFirst)})
def test_wrong_turns_are_caught(why, broken): assert_caught(check_turns, broken, why)


@each_mutant({'spread of the prior': (WiderNoise,), 'not fresh': (OneNoise,),
              'image of a pair': (OtherNoise,)})
def test_wrong_pairs_are_caught(why, broken): assert_caught(check_pairs, broken, why)


@each_mutant({'norm of the encoder': (PLAIN_ENCODER,), 'norm of the generator': (PLAIN_GENERATOR,),
              'stand still': (EvalMode,), 'critic with batch statistics': (NORMED_CRITIC,)})
def test_wrong_norms_are_caught(why, broken): assert_caught(check_norm, broken, why)


@each_mutant({'score with features': (MeanPixels, RebuiltCode, AlphaOfCritic),
              'score with sigma': (SigmaOfRebuilt, OtherLabel)})
def test_wrong_scores_are_caught(why, broken): assert_caught(check_score, broken, why)


@each_mutant({'decides|order|moves': (TrainMode, MinMax)})
def test_leaks_are_caught(why, broken): assert_caught(check_scoring_moves_nothing, broken, why)


# ---------------------------------------------------------------- pieces
def test_equation_by_hand():
    terms = fooling_pairs(torch.tensor([0.]), torch.tensor([np.log(3.)], dtype=torch.float32))
    assert np.allclose([float(v) for v in terms.values()], [np.log(2), np.log(4 / 3)], atol=1e-6)


@pytest.mark.parametrize('arch', ('mlp', 'conv'))
def test_a_pair_critic_hears_image_and_code(arch):
    torch.manual_seed(0)
    critic = PairCritic((2, 9, 8), 5, features_dim=7, arch=arch, width=2).eval()
    x, z = torch.rand(4, 2, 9, 8), torch.randn(4, 5)
    assert critic.features(x, z).shape == (4, 7) and critic(x, z).shape == (4,)
    assert torch.allclose(critic(x, z), critic.head(critic.features(x, z))[:, 0])
    assert not torch.allclose(critic(x, z), critic(x, z.flip(0)))
    assert not torch.allclose(critic(x, z), critic(x.flip(0), z))
    gap = critic(x, z) - critic(x, 0 * z) - critic(0 * x, z) + critic(0 * x, 0 * z)
    assert gap.abs().max() > 1e-4, 'image and code are judged apart, never together'


def test_the_layers_of_a_pair_critic():
    """Image and code meet in 32 * width units; both layers behind them are leaky."""
    critic, x, z = PairCritic((1, 8, 8), 5), torch.rand(4, 1, 8, 8), torch.randn(4, 5)
    meet = critic.image(x) + critic.code(z)
    assert meet.shape == (4, 32 * 16) and critic.features(x, z).shape == (4, 64)
    hidden = F.leaky_relu(critic.joined[1](F.leaky_relu(meet, .2)), .2)
    assert torch.allclose(critic.features(x, z), hidden, atol=1e-6) and (hidden < 0).any()
    for width in (2, 3):
        conv = PairCritic((1, 28, 28), 5, arch='conv', width=width)
        assert conv.image[0].out_channels == width and conv.code.out_features == 32 * width


def test_the_settings_the_chapter_speaks_of():
    d = BiGAN()
    assert (d.critic_lr, d.lr, d.batch_size, d.latent_dim) == (3e-3, 1e-3, 32, 16)
    assert (d.alpha, d.critic_term) == (.9, 'sigma')


def test_nothing_is_searched():
    scores = [BiGAN(**SMALL, epochs=1, n_draws=n).fit(X).decision_function(X) for n in (1, 900)]
    assert np.array_equal(*scores)
    d = BiGAN(**SMALL, epochs=1).fit(X)
    assert not hasattr(d, 'bank_') and d.sample(3).shape == (3, 1, 4, 4)
    with pytest.raises(NotImplementedError, match='BiGAN has no generated images .* encode') as e:
        d.nearest(torch.tensor(X))
    assert 'fit' not in str(e.value), 'it is fitted'


def test_a_number_of_draws_is_not_ignored_silently(recwarn):
    BiGAN(**SMALL, epochs=1).fit(X)
    assert not recwarn, 'a word where nothing was asked for'
    with pytest.warns(UserWarning, match='n_draws does nothing'):
        BiGAN(**SMALL, epochs=1, n_draws=5).fit(X)


@pytest.mark.parametrize('code', (torch.zeros(40, 5), torch.zeros(3, 3), torch.zeros(40)))
def test_a_code_of_the_wrong_size_is_named(code):
    d = BiGAN(**SMALL, epochs=1).fit(X)
    with pytest.raises(ValueError, match=r'codes must be \(40, 3\), one for each image; got'):
        d.critic_output(XB, code)


def test_rates_and_memory_reach_the_optimizers():
    d = raw(BiGAN, lr=.1, critic_lr=.2, beta1=.3)
    groups = {name: o.param_groups[0] for name, o in d.optimizers_.items()}
    assert {k: g['lr'] for k, g in groups.items()} == dict(generator=.1, critic=.2)
    assert all(g['betas'] == (.3, .999) for g in groups.values())


@pytest.mark.parametrize('params, message', [
    (dict(latent_dim=0), 'latent_dim must be a whole number, at least 1; got 0'),
    (dict(alpha=1.5), 'alpha must be a number, at least 0 and at most 1; got 1.5'),
    (dict(alpha=float('nan')), 'alpha'), (dict(critic_term='fm'), "one of 'sigma', 'features'"),
    (dict(batch_size=1), 'batch_size'), (dict(width=0), 'width'), (dict(beta1=1.), 'beta1'),
    (dict(critic_lr=0), 'critic_lr'), (dict(arch='cnn'), 'arch')])
def test_wrong_settings_are_named(params, message):
    check_refused(BiGAN, message, **SMALL | params)


def test_an_exploding_game_names_player_term_epoch_and_rates():
    check_explosion(BiGAN, "'critic/.*epoch 1.*critic_lr=1e\\+30", **SMALL, critic_lr=1e30)


@pytest.mark.parametrize('shape', SHAPES)
def test_any_image_fits(shape): check_any_image(BiGAN, shape, **SMALL)


def test_a_saved_game_scores_the_same(tmp_path):
    d = BiGAN(**SMALL, epochs=2, critic_term='sigma', alpha=.3).fit(X)
    d.save(tmp_path/'d')
    assert np.array_equal(load(tmp_path/'d').decision_function(X), d.decision_function(X))


def test_on_a_line_encoder_and_generator_become_inverse():
    """The optimum is known: a rising or a falling line; and nobody learns it without the game."""
    z = norm.ppf((np.arange(300) + .5) / 300)
    x = (.5 + .12 * z).reshape(-1, 1, 1, 1).astype('float32')
    line = dict(latent_dim=1, batch_size=50, beta1=0., verbose=False)
    def off(d): return float(np.abs(x - d.reconstruct(x)).mean())
    for seed in range(2):
        d = BiGAN(**line, epochs=100, seed=seed).fit(x)
        assert off(d) < .06 < off(BiGAN(**line, epochs=0, seed=seed).fit(x))
        assert abs(np.corrcoef(d.encode(x)[:, 0], z)[0, 1]) > .98
