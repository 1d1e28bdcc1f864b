"""Skip-GANomaly: the U-Net and its shortcuts, the losses, the score, who moves whom, how much
passes; mutants of each."""
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ad_course.detector import load, total_loss
from ad_course.ganomaly import contextual, feature_matching
from ad_course.skipganomaly import SkipGANomaly, UNet, passed_share, pieces

from .mutants import assert_caught, each_mutant
from .players import (SHAPES, Scale, altered, check_any_image, check_explosion, check_refused,
                      moved, ready, without)

X = np.random.default_rng(0).random((40, 1, 4, 4), dtype='float32')
XB = torch.tensor(X)
SMALL = dict(code_dim=3, width=2, verbose=False)


def raw(cls, **params):
    """An untrained detector, ready for single steps."""
    return ready(cls(**SMALL | dict(epochs=0) | params).fit(X))


class Watch(Scale):
    """A critic that sees three weighted pixels and answers with their sum."""
    def features(self, x): return Scale.forward(self, x)
    def head(self, seen): return seen.sum(1, keepdim=True)
    def forward(self, x): return self.features(x).sum(1)


W = dict(generator=[.5, 1., 3.], critic=[1., -2., 3.])
PIXELS = torch.rand(6, 1, 1, 3, generator=torch.Generator().manual_seed(2))


def shown(cls, **params):
    """The class with networks that can be worked out, on images of three pixels."""
    def networks(self, shape):
        return dict(generator=Scale(W['generator'], 1, 1, 3), critic=Watch(W['critic'], 3))
    d = type('Shown', (cls,), dict(networks=networks))(epochs=0, verbose=False, **params)
    return d.fit(np.random.default_rng(1).random((6, 1, 1, 3), dtype='float32'))


def generator_truth(x, weights=(1., 40., 1.), w=W):
    """Equation (1) term by term, (b,) each."""
    g, c = (torch.as_tensor(w[k]) for k in ('generator', 'critic'))
    pixels = x.flatten(1)
    fake = pixels * g
    terms = (F.softplus(-(fake * c).sum(1)), (pixels - fake).abs().mean(1),
             (pixels * c - fake * c).square().mean(1))
    return dict(zip(('adversarial', 'contextual', 'latent'),
                    (weight * term for weight, term in zip(weights, terms))))


# ---------------------------------------------------------------- equations
def check_values(cls):
    """Each term on known networks, for the default weights and for others."""
    chosen = dict(adversarial_weight=2., contextual_weight=3., latent_weight=5.)
    for params, expected in (({}, (1., 40., 1.)), (chosen, (2., 3., 5.))):
        d, truth = shown(cls, **params), generator_truth(PIXELS, expected)
        terms = d.generator_loss(PIXELS)
        assert terms.keys() == truth.keys(), 'names of the terms'
        for name, value in truth.items():
            assert terms[name].shape == (6,), f'shape of {name}'
            assert torch.allclose(terms[name], value, atol=1e-5), f'value of {name}'
    c, g = torch.tensor(W['critic']), torch.tensor(W['generator'])
    pixels = PIXELS.flatten(1)
    truth = dict(real=F.softplus(-pixels @ c), fake=F.softplus((pixels * g) @ c))
    for extra in (0., 2.):
        terms = shown(cls, critic_latent_weight=extra).critic_loss(PIXELS)
        if extra: truth['latent'] = extra * ((pixels - pixels * g) * c).square().mean(1)
        assert terms.keys() == truth.keys(), 'names of the terms of the critic'
        for name, value in truth.items():
            assert torch.allclose(terms[name], value, atol=1e-5), f'value of {name}'


def check_slopes(cls):
    """Equation (1) pulls at the generator as autograd says of the formula."""
    d = shown(cls)
    w = {k: torch.tensor(v, requires_grad=k == 'generator') for k, v in W.items()}
    expected, = torch.autograd.grad(total_loss(generator_truth(PIXELS, w=w), 6), [w['generator']])
    found, = torch.autograd.grad(total_loss(d.generator_loss(PIXELS), 6), [d.nets_.generator.w],
                                 allow_unused=True)
    assert found is not None and torch.allclose(found, expected, atol=1e-4), 'slope'


def check_players(cls):
    """Each step moves its own player and nobody else, in the right direction."""
    d = raw(cls)
    assert moved(d, 'critic', d.critic_loss, XB) == {'critic'}, 'step of the critic'
    assert moved(d, 'generator', d.generator_loss, XB) == {'generator'}, 'step of the generator'
    def gap():
        with torch.no_grad():
            return float((d.nets_.critic(XB) - d.nets_.critic(d.reconstruction(XB))).mean())
    before = gap(); moved(d, 'critic', d.critic_loss, XB, 30)
    assert gap() > before + .01, 'the critic does not learn to tell them apart'
    def residual():
        with torch.no_grad(): return float((XB - d.reconstruction(XB)).abs().mean())
    before = residual(); moved(d, 'generator', d.generator_loss, XB, 100)
    assert residual() < .95 * before, 'the images do not come together'


def check_turns(cls):
    """One turn each, critic first; every term is recorded."""
    turns = [(player, loss.__name__) for player, loss in cls(**SMALL).turns()]
    assert turns == [('critic', 'critic_loss'), ('generator', 'generator_loss')], 'turns'
    recorded = {k for k, v in cls(**SMALL, epochs=2).fit(X).history_.items() if len(v) == 2}
    assert recorded == {'critic/real', 'critic/fake', 'generator/adversarial', 'seconds',
                        'generator/contextual', 'generator/latent'}, 'records'


def check_score(cls):
    """Equation (2) from the networks' weights; the map is the residual's."""
    g, c, pixels = torch.tensor(W['generator']), torch.tensor(W['critic']), PIXELS.flatten(1)
    missed, unlike = pixels - pixels * g, (pixels - pixels * g) * c
    for share in (.9, 1., .2):
        expected = share * missed.abs().mean(1) + (1 - share) * unlike.square().mean(1)
        score = shown(cls, residual_weight=share).decision_function(PIXELS)
        assert np.allclose(score, expected, atol=1e-5), f'score at {share}'
    maps = shown(cls).anomaly_map(PIXELS)
    assert np.allclose(maps, missed.view(6, 1, 3).square(), atol=1e-5), 'map'


def check_scoring_moves_nothing(cls):
    """Not a weight, not a statistic of a batch, whatever mode the networks were left in; and a
    score is the same alone and in a batch."""
    x = np.random.default_rng(3).random((24, 1, 8, 8), dtype='float32')
    d = cls(**SMALL, arch='conv', epochs=2).fit(x)
    before, scores = {k: v.clone() for k, v in d.nets_.state_dict().items()}, None
    for mode in (False, True):
        d.nets_.train(mode)
        first = d.decision_function(x)
        scores = first if scores is None else scores
        assert np.allclose(first, scores, rtol=1e-4), 'the mode decides'
        alone = np.concatenate([d.decision_function(x[i:i + 1]) for i in range(3)])
        assert np.allclose(alone, scores[:3], rtol=1e-4), 'its company decides'
    after = d.nets_.state_dict()
    assert all(torch.equal(v, after[k]) for k, v in before.items()), 'scoring moves something'


CHECKS = (check_values, check_slopes, check_players, check_turns, check_score,
          check_scoring_moves_nothing)


@pytest.mark.parametrize('check', CHECKS)
def test_the_chapter_keeps(check): check(SkipGANomaly)


# ---------------------------------------------------------------- mutants
def flipped(term): return lambda terms: {k: v * (-1 if k == term else 1) for k, v in terms.items()}


TERMS = 'adversarial', 'contextual', 'latent'
MISSING = [altered(SkipGANomaly, 'generator_loss', without(k), f'No_{k}') for k in TERMS]
NEGATIVE = [altered(SkipGANomaly, 'generator_loss', flipped(k), f'Negative_{k}') for k in TERMS]
COLUMN, DETACHED, NO_REAL, NO_FAKE, HELPFUL = (
    altered(SkipGANomaly, hook, change, name) for hook, change, name in (
        ('generator_loss', lambda terms: {k: v[:, None] for k, v in terms.items()}, 'Column'),
        ('generator_loss', lambda terms: {k: v.detach() for k, v in terms.items()}, 'Detached'),
        ('critic_loss', without('real'), 'NoReal'), ('critic_loss', without('fake'), 'NoFake'),
        ('critic_loss', lambda terms: {k: -v for k, v in terms.items()}, 'Helpful')))


class Swapped(SkipGANomaly):
    """Rebuilt images are called 1, real ones 0."""
    def critic_loss(self, xb):
        a, b = self.nets_.critic(xb), self.nets_.critic(self.reconstruction(xb))
        return dict(real=F.softplus(a), fake=F.softplus(-b))

class CriticFeelsLatent(SkipGANomaly):
    """As the official code: the features' distance in the critic's loss, always."""
    def critic_loss(self, xb):
        see = self.nets_.critic.features
        apart = feature_matching(see(xb), see(self.reconstruction(xb)))
        return super().critic_loss(xb) | dict(latent=apart)

class Together(SkipGANomaly):
    """The critic's step reaches the generator."""
    def optimizers(self):
        return super().optimizers() | dict(critic=self.adam('critic', 'generator'))
    def critic_loss(self, xb):
        a, b = self.nets_.critic(xb), self.nets_.critic(self.reconstruction(xb))
        return dict(real=F.softplus(-a), fake=F.softplus(b))

class CriticFirst(SkipGANomaly):
    def turns(self): return super().turns()[::-1]

class Answers(SkipGANomaly):
    """The critic's answers in place of its features."""
    def generator_loss(self, xb):
        a, b = self.nets_.critic(xb), self.nets_.critic(self.reconstruction(xb))
        return super().generator_loss(xb) | dict(latent=(a - b).square())

class OtherShare(SkipGANomaly):
    def image_score(self, xb):
        a, b = self.score_terms(xb).values()
        return (1 - self.residual_weight) * a + self.residual_weight * b

class ResidualAlone(SkipGANomaly):
    def image_score(self, xb): return self.score_terms(xb)['residual']

class AbsoluteMap(SkipGANomaly):
    def errors(self, xb): return (xb - self.reconstruction(xb)).abs()

class InTrainMode(SkipGANomaly):
    def score_terms(self, xb):
        self.nets_.train()
        rebuilt, see = self.reconstruction(xb), self.nets_.critic.features
        return dict(residual=contextual(xb, rebuilt),
                    latent=feature_matching(see(xb).float(), see(rebuilt).float()))


@each_mutant({'value of|names': [*MISSING, *NEGATIVE, COLUMN, Answers, Swapped, NO_REAL, NO_FAKE,
                                 CriticFeelsLatent]})
def test_wrong_values_are_caught(why, broken):
    assert_caught(check_values, broken, f'{why}|shape')


@each_mutant({'slope': [*MISSING, *NEGATIVE]})
def test_wrong_slopes_are_caught(why, broken): assert_caught(check_slopes, broken, why)


def test_a_loss_without_a_slope_is_caught():
    assert_caught(check_slopes, DETACHED, '', (AssertionError, RuntimeError))


@each_mutant({'step of the critic': [Together], 'tell them apart': [HELPFUL]})
def test_wrong_players_are_caught(why, broken): assert_caught(check_players, broken, why)


@each_mutant({'turns': [CriticFirst], 'records': [CriticFeelsLatent]})
def test_wrong_turns_are_caught(why, broken): assert_caught(check_turns, broken, why)


@each_mutant({'score': [OtherShare, ResidualAlone], 'map': [AbsoluteMap]})
def test_wrong_scores_are_caught(why, broken): assert_caught(check_score, broken, why)


@each_mutant({'decides': [InTrainMode]})
def test_a_leaking_score_is_caught(why, broken):
    assert_caught(check_scoring_moves_nothing, broken, why)


# ---------------------------------------------------------------- the U-Net
def check_unet(cls):
    """Shape, levels, what a closed shortcut leaves, and that each open one carries an image."""
    for arch, shape, levels in (('mlp', (1, 8, 8), 1), ('conv', (3, 16, 16), 2),
                                ('conv', (1, 28, 28), 2), ('conv', (1, 32, 20), 3)):
        x = torch.rand(4, *shape)
        whole, bare = (cls(shape, 3, arch, 4, skips).eval() for skips in (None, ()))
        assert whole(x).shape == x.shape, 'shape'
        assert 0 < whole(x).min() and whole(x).max() < 1, 'range'
        assert {*whole.side} == {str(k + 1) for k in range(len(whole.down))}, 'levels'
        assert not [k for k in bare.state_dict() if 'side' in k], 'a closed shortcut has weights'
        state = {k: v for k, v in whole.state_dict().items() if 'side' not in k}
        bare.load_state_dict(state)
        assert not torch.allclose(bare(x), whole(x)), 'the shortcuts carry nothing'
        for level in whole.side:
            one = cls(shape, 3, arch, 4, (int(level),)).eval()
            with torch.no_grad():
                for p in one.top.parameters(): p.zero_()            # the code is silent
            x.requires_grad_()
            slope, = torch.autograd.grad(one(x).sum(), x)
            assert slope.abs().sum() > 0, f'level {level} carries nothing'
            x = x.detach()


class NoSide(UNet):
    def forward(self, x):
        x = self.top(self.views(x)[1])
        for net in self.up: x = net(x)
        return x.sigmoid()

class FirstOnly(UNet):
    def forward(self, x):
        seen, code = self.views(x)
        x = self.top(code)
        for net, level in zip(self.up, range(len(seen), 0, -1)):
            x = net(x)
            if level == 1 and '1' in self.side: x = x + self.side['1'](seen[0])
        return x.sigmoid()

class Unsqueezed(UNet):
    def forward(self, x): return super().forward(x).logit()


def test_the_unet(): check_unet(UNet)


@each_mutant({'nothing': [NoSide, FirstOnly], 'range': [Unsqueezed]})
def test_a_broken_unet_is_caught(why, broken): assert_caught(check_unet, broken, why)


def test_levels_that_are_not_there_are_refused():
    for skips in ((2,), (0,), (1, 5)):
        with pytest.raises(ValueError, match='skips must be levels from 1 to 1'):
            UNet((1, 8, 8), 3, 'mlp', 4, skips)
    check_refused(SkipGANomaly, 'skips must be', **SMALL, skips=(7,))


def test_pieces_lose_no_layer_and_keep_the_order():
    net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 5))
    for how in (dict(ends=nn.ReLU), dict(starts=nn.ReLU)):
        parts = pieces(net, **how)
        assert len(parts) == 3 and [m for part in parts for m in part] == [*net]
    x = torch.rand(2, 2)
    assert torch.equal(nn.Sequential(*pieces(net, ends=nn.ReLU))(x), net(x))


# ---------------------------------------------------------------- how much passes
def check_share(share):
    """Projections, multiples and constants."""
    x = torch.rand(200, 1, 6, 6, generator=torch.Generator().manual_seed(5))
    axes, _ = torch.linalg.qr(torch.randn(36, 36, generator=torch.Generator().manual_seed(1)))
    for k in (3, 20):
        half = axes[:, :k] @ axes[:, :k].T
        found = share(lambda x: (x.flatten(1) @ half).view_as(x), x)
        assert abs(36 * found - k) < .4, f'{k} axes'
    assert abs(share(lambda x: .3 * x + .5, x) - .3) < 1e-3, 'a multiple'
    assert share(torch.zeros_like, x) == 0, 'a constant'
    assert abs(share(lambda x: x.square() / 2, x) - float(x.mean())) < .01, 'a curve'


def of_values(rebuild, x): return float((rebuild(x) * x).sum() / x.square().sum())
def of_lengths(rebuild, x):
    move = .01 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    return float(((rebuild(x + move) - rebuild(x)).norm() / move.norm()))


def test_how_much_passes(): check_share(passed_share)


@each_mutant({'axes|multiple|constant|curve': [of_values, of_lengths]})
def test_other_shares_are_caught(why, broken): assert_caught(check_share, broken, why)


def test_it_is_the_trace_of_the_jacobian():
    net = UNet((1, 4, 4), 3, 'mlp', 2).double().eval()
    x = torch.rand(1, 1, 4, 4, dtype=torch.float64)
    def flat(v): return net(v.view_as(x)).flatten()
    jacobian = torch.autograd.functional.jacobian(flat, x.flatten())
    found = passed_share(net, x.expand(2000, -1, -1, -1), step=1e-4)
    assert abs(found - float(jacobian.trace()) / 16) < .01


# ---------------------------------------------------------------- the rest
@pytest.mark.parametrize('params, message', [
    (dict(code_dim=0), 'code_dim'), (dict(width=0), 'width'), (dict(skips=1), 'skips'),
    (dict(latent_weight=-1), 'latent_weight'), (dict(residual_weight=1.1), 'residual_weight'),
    (dict(critic_lr=0), 'critic_lr'), (dict(beta1=1.), 'beta1'),
    (dict(critic_latent_weight=-.1), 'critic_latent_weight')], ids=str)
def test_wrong_settings_are_named(params, message):
    with pytest.raises(ValueError, match=message): SkipGANomaly(**params).fit(X)


@pytest.mark.parametrize('shape', SHAPES)
def test_any_image_fits(shape): check_any_image(SkipGANomaly, shape, **SMALL)


def test_a_game_that_explodes_is_named():
    check_explosion(SkipGANomaly, 'critic|generator', **SMALL, lr=1e30)


def test_saved_and_loaded(tmp_path):
    d = SkipGANomaly(**SMALL, epochs=1, skips=(1,)).fit(X)
    d.save(tmp_path/'d.safetensors')
    again = load(tmp_path/'d.safetensors')
    assert np.array_equal(again.decision_function(X), d.decision_function(X))
