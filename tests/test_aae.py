"""The adversarial autoencoder: every term, who moves whom, its score; and mutants of each."""
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ad_course.aae import AAE, CodeCritic, critic_terms, fooling_terms, standardized_sum
from ad_course.ae import AE
from ad_course.detector import total_loss
from ad_course.metrics import energy_distance
from ad_course.networks import squared_weights

from .mutants import assert_caught, each_mutant
from .players import moved, ready, weights

X = np.random.default_rng(0).random((40, 1, 4, 4), dtype='float32')
XB = torch.tensor(X)
SMALL = dict(code_dim=3, width=2, critic_width=8, verbose=False)


def raw(cls, **params):
    """An untrained detector, ready for single steps."""
    return ready(cls(**SMALL | dict(epochs=0) | params).fit(X))


# ---------------------------------------------------------------- equations
def check_critic(cls):
    """Equation (2): draws of N(0, I) are class 1, codes class 0; by torch's own cross-entropy."""
    d = raw(cls)
    with torch.no_grad():
        torch.manual_seed(5); terms = d.critic_loss(XB)
        torch.manual_seed(5); z = torch.randn(40, 3)
        logits = [d.nets_.critic.layers(v)[:, 0].double() for v in (z, d.code(XB))]
    assert sorted(terms) == ['codes', 'prior'], 'terms of the critic'
    assert all(t.shape == (40,) for t in terms.values()), 'shapes'
    for name, u, truth in zip(('prior', 'codes'), logits, (torch.ones(40), torch.zeros(40))):
        expected = F.binary_cross_entropy_with_logits(u, truth.double(), reduction='none')
        assert torch.allclose(terms[name].double(), expected, atol=1e-6), name


class Replies(nn.Module):
    """A critic that always gives these logits."""
    def __init__(self, logits): super().__init__(); self.logits = logits
    def forward(self, codes): return self.logits


def check_fooling(cls):
    """Equation (3): -log D of the codes, with the gradient -(1 - D) for each logit."""
    d = raw(cls)
    u = torch.linspace(-8, 8, 40, dtype=torch.float64, requires_grad=True)
    d.nets_.critic = Replies(u)
    loss = total_loss(d.fooling_loss(XB), 40)
    assert torch.isclose(loss, -torch.log(torch.sigmoid(u)).mean()), 'fooling: value'
    g, = torch.autograd.grad(loss, u)
    assert torch.allclose(g, -(1 - torch.sigmoid(u)).detach() / 40), 'fooling: gradient'


class Table(nn.Module):
    """A decoder that multiplies the code by a fixed matrix."""
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.linspace(-1, 1, 48).view(3, 16))
    def forward(self, code): return (code @ self.w).view(-1, 1, 4, 4)


def linear(self, shape):
    """Linear encoder and decoder, for which (5) has a closed form."""
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(16, 3, bias=False))
    return dict(encoder=encoder, decoder=Table(), critic=CodeCritic(3, 8))


def check_autoencoder(cls):
    """Mean squared error; (5) with the gradient through both codes; the decay of both networks."""
    d = raw(type('Linear', (cls,), dict(networks=linear)), consistency_weight=.7, weight_decay=.3)
    d.nets_.double()
    x = XB.double()
    U, V, rows = d.nets_.encoder[1].weight, d.nets_.decoder.w, x.flatten(1)
    z = rows @ U.T
    terms = d.loss(x)
    assert sorted(terms) == ['consistency', 'decay', 'reconstruction'], 'terms of the autoencoder'
    error = (rows - z @ V).square().mean()
    assert torch.isclose(terms['reconstruction'].mean(), error), 'reconstruction'
    expected = .7 * (z - z @ V @ U.T).square().mean()
    assert torch.isclose(terms['consistency'].mean(), expected), 'consistency: value'
    grads = lambda term: torch.autograd.grad(term, [U, V], retain_graph=True)
    for ours, theirs in zip(grads(terms['consistency'].mean()), grads(expected)):
        assert torch.allclose(ours, theirs), 'consistency: gradient'
    both = (U.square().sum() + V.square().sum()).double()
    assert torch.isclose(terms['decay'].double(), .3 * both), 'decay: of encoder and decoder alone'
    assert sorted(raw(cls).loss(XB)) == ['reconstruction'], 'no weight, no term'


# ---------------------------------------------------------------- the game
def check_players(cls):
    """Each step moves its own player and lowers its own loss."""
    d = raw(cls)
    assert moved(d, 'autoencoder', d.loss, XB) == {'encoder', 'decoder'}, 'step of the autoencoder'
    assert moved(d, 'critic', d.critic_loss, XB) == {'critic'}, 'step of the critic'
    assert moved(d, 'encoder', d.fooling_loss, XB) == {'encoder'}, 'step of the encoder'
    z = torch.randn(200, 3, generator=torch.Generator().manual_seed(0))
    errors, logits = lambda: d.errors(XB).mean(), lambda: d.nets_.critic(d.code(XB)).mean()
    gap = lambda: d.nets_.critic(z).mean() - logits()
    before = gap(); moved(d, 'critic', d.critic_loss, XB, 30)
    assert gap() > before + .1, 'the critic does not learn to tell them apart'
    before = logits(); moved(d, 'encoder', d.fooling_loss, XB, 30)
    assert logits() > before + .1, 'the encoder does not learn to fool'
    before = errors(); moved(d, 'autoencoder', d.loss, XB, 30)
    assert errors() < before, 'the autoencoder does not learn to draw'


def check_turns(cls):
    """Each batch is one turn for each of the three, and all terms are recorded."""
    turns = [(player, loss.__name__) for player, loss in cls(**SMALL).turns()]
    assert turns == [('autoencoder', 'loss'), ('critic', 'critic_loss'),
                     ('encoder', 'fooling_loss')], 'turns'
    d = cls(**SMALL, epochs=2).fit(X)
    recorded = {k for k, v in d.history_.items() if len(v) == 2}
    assert recorded == {'autoencoder/reconstruction', 'critic/prior', 'critic/codes',
                        'encoder/fooling', 'seconds'}, 'terms to record'


def check_match(cls):
    """Codes of one number come to have about the mean and spread of the prior."""
    x = np.random.default_rng(1).random((256, 1, 1, 2)).astype('float32')
    settings = dict(code_dim=1, epochs=60, batch_size=64, width=4, critic_width=16, lr=1e-4)
    d = cls(**settings, verbose=False).fit(x)
    z = torch.randn(500, 1, generator=torch.Generator().manual_seed(0))
    far = energy_distance(torch.tensor(d.encode(x)), z)
    assert far < .15, f'energy distance {far:.2f}: the codes do not follow the prior'


# ---------------------------------------------------------------- the score
def check_score(cls):
    """Equation (6) with statistics of the training images, by numpy; lambda 0 ranks by error."""
    d = cls(**SMALL, epochs=2, prior_weight=.5).fit(X)
    new = np.random.default_rng(7).random((15, 1, 4, 4), dtype='float32') ** 3

    def parts(x):
        z, xhat = d.encode(x).astype(float), d.reconstruct(x)
        return np.stack([((x - xhat)**2).mean((1, 2, 3)), (z**2).mean(1)], 1)
    train = parts(X)
    expected = (parts(new) - train.mean(0)) / train.std(0) @ [1, .5]
    assert np.allclose(d.decision_function(new), expected, rtol=1e-3, atol=1e-3), 'score'
    center = d.decision_function(X).mean()
    assert np.allclose(center, 0, atol=1e-4), 'training scores are centered'
    plain = cls(**SMALL, epochs=2).fit(X)
    error = ((new - plain.reconstruct(new))**2).mean((1, 2, 3))
    same = np.argsort(plain.decision_function(new)) == np.argsort(error)
    assert same.all(), 'lambda 0 must rank as the error does'


CHECKS = dict(critic=check_critic, fooling=check_fooling, autoencoder=check_autoencoder,
              players=check_players, turns=check_turns, match=check_match, score=check_score)


@pytest.mark.parametrize('name', CHECKS)
def test_the_chapter_keeps(name): CHECKS[name](AAE)


# ---------------------------------------------------------------- mutants
class WithCritic(AAE):
    """An AAE with another critic, of the class attribute `critic`."""
    critic = CodeCritic
    def networks(self, shape):
        return super().networks(shape) | dict(critic=self.critic(self.code_dim, self.critic_width))

class CriticFlipped(AAE):
    def critic_loss(self, xb): return {k: -v for k, v in super().critic_loss(xb).items()}

class CriticSwapsClasses(AAE):
    def critic_loss(self, xb):
        z, critic = self.code(xb), self.nets_.critic
        return critic_terms(critic(z), critic(critic.draws(z)))

class CriticWithoutPrior(AAE):
    def critic_loss(self, xb):
        return {k: v * (k == 'codes') for k, v in super().critic_loss(xb).items()}

class CriticWithoutCodes(AAE):
    def critic_loss(self, xb):
        return {k: v * (k == 'prior') for k, v in super().critic_loss(xb).items()}

class CriticSums(AAE):
    def critic_loss(self, xb): return {k: v * len(v) for k, v in super().critic_loss(xb).items()}

class UniformPrior(WithCritic):
    class critic(CodeCritic):
        def draws(self, codes): return torch.rand(codes.shape)

class ColumnLogits(WithCritic):
    class critic(CodeCritic):
        def forward(self, codes): return self.layers(codes)

class CriticMovesEncoder(AAE):
    def optimizers(self): return {**super().optimizers(), 'critic': self.adam('critic', 'encoder')}

class EncoderMovesCritic(AAE):
    def optimizers(self): return {**super().optimizers(), 'encoder': self.adam('encoder', 'critic')}

class AutoencoderMovesCritic(AAE):
    def loss(self, xb): return super().loss(xb) | self.fooling_loss(xb)
    def optimizers(self): return {**super().optimizers(), 'autoencoder': self.adam(*self.nets_)}

class FoolingFlipped(AAE):
    def fooling_loss(self, xb): return {k: -v for k, v in super().fooling_loss(xb).items()}

class FoolingZero(AAE):
    def fooling_loss(self, xb): return {k: v * 0 for k, v in super().fooling_loss(xb).items()}

class Saturating(AAE):
    def fooling_loss(self, xb): return dict(fooling=-F.softplus(self.nets_.critic(self.code(xb))))

class FoolsByDetached(AAE):
    def fooling_loss(self, xb): return fooling_terms(self.nets_.critic(self.code(xb).detach()))

def altered(name, change):
    """A class of which one term of the autoencoder's loss is changed."""
    def loss(self, xb):
        terms = AAE.loss(self, xb)
        return terms | {k: change(v) for k, v in terms.items() if k == name}
    return type(f'{name}_{change.__name__}', (AAE,), dict(loss=loss))

def flipped(term): return -term
def zero(term): return term * 0
def summed(term): return term * 3

class ConsistencyDetached(AAE):
    def loss(self, xb):
        terms, codes = super().loss(xb), self.code(xb).detach()
        again = self.code(self.reconstruction(xb))
        if self.consistency_weight:
            terms['consistency'] = self.consistency_weight * (codes - again).square().mean(1)
        return terms

class DecayCountsTheCritic(AAE):
    def loss(self, xb):
        terms = super().loss(xb)
        if 'decay' in terms: terms['decay'] = self.weight_decay * squared_weights(self.nets_)
        return terms

class SkipsTheCritic(AAE):
    def turns(self):
        """The critic never moves."""
        return [turn for turn in super().turns() if turn[0] != 'critic']

class NoGame(AAE):
    def turns(self):
        """The autoencoder alone."""
        return super().turns()[:1]

class ScalesOverTheBatch(AAE):
    def image_score(self, xb):
        parts = self.score_parts(xb)
        return standardized_sum(parts, parts.mean(0), parts.std(0, correction=0), self.prior_weight)

class Unscaled(AAE):
    def image_score(self, xb): return self.score_parts(xb) @ torch.tensor([1, self.prior_weight])

class LengthSubtracted(AAE):
    def image_score(self, xb):
        return standardized_sum(self.score_parts(xb), self.mean_, self.std_, -self.prior_weight)

class LengthAlways(AAE):
    def image_score(self, xb):
        return standardized_sum(self.score_parts(xb), self.mean_, self.std_, 1.)

class ErrorFlipped(AAE):
    def image_score(self, xb):
        parts, std = self.score_parts(xb), self.std_ * torch.tensor([-1., 1.])
        return standardized_sum(parts, self.mean_, std, self.prior_weight)


LOST = [altered('reconstruction', flipped), altered('reconstruction', zero)]


@each_mutant({
    'prior': (CriticFlipped, CriticSwapsClasses, CriticWithoutPrior, CriticSums, UniformPrior),
    'codes': (CriticWithoutCodes,), 'shapes': (ColumnLogits,)})
def test_wrong_critics_are_caught(why, broken): assert_caught(check_critic, broken, why)


@each_mutant({'fooling: value': (FoolingFlipped, FoolingZero, Saturating)})
def test_wrong_fooling_is_caught(why, broken): assert_caught(check_fooling, broken, why)


@each_mutant({
    'reconstruction': LOST, 'consistency: gradient': (ConsistencyDetached,),
    'consistency: value': [altered('consistency', f) for f in (zero, flipped, summed)],
    'decay: of encoder and decoder alone': (DecayCountsTheCritic,)})
def test_wrong_terms_are_caught(why, broken): assert_caught(check_autoencoder, broken, why)


@each_mutant({
    'tell them apart': (CriticFlipped, CriticSwapsClasses), 'learn to fool': (FoolingFlipped,),
    'learn to draw': LOST[:1], 'step of the critic': (CriticMovesEncoder,),
    'step of the encoder': (EncoderMovesCritic, FoolingZero, FoolsByDetached),
    'step of the autoencoder': (AutoencoderMovesCritic, LOST[1])})
def test_wrong_moves_are_caught(why, broken): assert_caught(check_players, broken, why)


@each_mutant({'turns': (SkipsTheCritic, NoGame)})
def test_wrong_turns_are_caught(why, broken): assert_caught(check_turns, broken, why)


@each_mutant({'do not follow the prior': (NoGame, FoolingFlipped, CriticFlipped)})
def test_codes_astray_are_caught(why, broken): assert_caught(check_match, broken, why)


@each_mutant({'score': (ScalesOverTheBatch, Unscaled, LengthSubtracted, LengthAlways,
                        ErrorFlipped)})
def test_wrong_scores_are_caught(why, broken): assert_caught(check_score, broken, why)


# ---------------------------------------------------------------- pieces
def test_the_best_critic_is_the_logarithm_of_the_ratio_of_densities():
    z = torch.linspace(-2, 3, 50, dtype=torch.float64)
    normal = torch.distributions.Normal
    p, q = normal(0., 1.).log_prob(z), normal(1.5, .5).log_prob(z)
    u = (p - q).requires_grad_()
    terms = critic_terms(u, u)
    loss = (p.exp() * terms['prior'] + q.exp() * terms['codes']).sum()   # (2), an integral over z
    assert torch.autograd.grad(loss, u)[0].abs().max() < 1e-12


def test_critic_at_rest_has_two_log_two():
    rest = total_loss(critic_terms(torch.zeros(4), torch.zeros(4)), 4)
    assert np.isclose(float(rest), 2 * np.log(2))


def test_losses_stay_finite_for_any_logit():
    big = torch.tensor([-1e4, 1e4])
    terms = critic_terms(big, big) | fooling_terms(big)
    assert all(torch.isfinite(t).all() for t in terms.values())


def test_without_a_game_it_is_the_autoencoder():
    ours, theirs = (kind(code_dim=3, epochs=3, width=2, weight_decay=1e-3, verbose=False).fit(X)
                    for kind in (NoGame, AE))
    for name in ('encoder', 'decoder'):
        torch.testing.assert_close(weights(ours, name), weights(theirs, name))


def test_the_optimizers_have_their_own_rates_and_memories():
    d = raw(AAE, lr=.1, critic_lr=.2, game_lr=.3)
    groups = {name: d.optimizers_[name].param_groups[0] for name in d.optimizers_}
    assert {k: g['lr'] for k, g in groups.items()} == dict(autoencoder=.1, critic=.2, encoder=.3)
    assert [groups[k]['betas'][0] for k in ('autoencoder', 'critic', 'encoder')] == [.9, .5, .5]


@dataclass(kw_only=True, eq=False, repr=False)
class Weighted(AAE):
    weight: float = 1.
    def fooling_loss(self, xb):
        return {k: v * self.weight for k, v in super().fooling_loss(xb).items()}


def test_adam_cancels_a_weight_on_the_fooling_loss():
    a, b = (raw(Weighted, weight=w) for w in (1., 50.))
    for d in (a, b): moved(d, 'encoder', d.fooling_loss, XB)
    torch.testing.assert_close(weights(a, 'encoder'), weights(b, 'encoder'), rtol=1e-3, atol=1e-4)


def statistics(d):
    """Network -> its batch statistics."""
    found = {name: net.state_dict().items() for name, net in d.nets_.items()}
    return {name: torch.cat([v.clone().flatten() for k, v in items if 'running' in k])
            for name, items in found.items() if any('running' in k for k, v in items)}


@pytest.mark.parametrize('player, movers', [('autoencoder', {'encoder', 'decoder'}),
                                            ('critic', set()), ('encoder', {'encoder'})])
def test_batch_statistics_stay_still_in_the_turns_of_others(player, movers):
    """In its turns, and in no others, a network moves its batch statistics."""
    xb = torch.rand(20, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    d = ready(AAE(**SMALL, epochs=0, arch='conv').fit(xb))
    d.nets_.train()
    before, loss = statistics(d), dict(d.turns())[player]
    d.descend(player, loss, xb)
    after = statistics(d)
    assert set(before) == {'encoder', 'decoder'}
    assert {name for name in before if not torch.equal(before[name], after[name])} == movers


def test_statistics_survive_saving(tmp_path):
    d = AAE(**SMALL | dict(code_dim=2, epochs=1, critic_width=4, prior_weight=1.)).fit(X)
    d.save(tmp_path/'m.safetensors')
    again = AAE.load(tmp_path/'m.safetensors')
    assert torch.equal(again.mean_, d.mean_.cpu()) and torch.equal(again.std_, d.std_.cpu())
    assert np.array_equal(again.decision_function(X), d.decision_function(X))
