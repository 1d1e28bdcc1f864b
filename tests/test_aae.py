"""The adversarial autoencoder: every term of its losses, who moves whom, the balance of its score; and mutants that each check must catch."""
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ad_course.aae import AAE, critic_terms, fooling_terms
from ad_course.ae import AE
from ad_course.detector import isolated, total_loss
from ad_course.metrics import energy_distance
from ad_course.networks import mlp

X = np.random.default_rng(0).random((40, 1, 4, 4), dtype='float32')
XB = torch.tensor(X)


def raw(cls, **params):
    """An untrained detector with its optimizers, ready for single steps."""
    d = cls(**{**dict(code_dim=3, epochs=0, verbose=False, width=2, critic_width=8), **params}).fit(X)
    d.optimizers_ = d.optimizers()
    return d


def weights(d, name): return torch.cat([p.detach().flatten() for p in d.nets_[name].parameters()])


def moved(d, player, loss, steps=1):
    before = {name: weights(d, name).clone() for name in d.nets_}
    with isolated(0):
        for _ in range(steps): d.descend(player, loss, XB)
    return {name for name in d.nets_ if not torch.equal(before[name], weights(d, name))}


# ---------------------------------------------------------------- equations
def check_critic(cls):
    """Equation (2): draws of N(0, I) are class 1, codes class 0, the mean over each; in float64 against torch's own cross-entropy."""
    d = raw(cls)
    with torch.no_grad():
        torch.manual_seed(5); terms = d.critic_loss(XB)
        torch.manual_seed(5); z = torch.randn(40, 3)
        on_prior, on_codes = (d.nets_.critic(v)[:, 0].double() for v in (z, d.code(XB)))
    assert sorted(terms) == ['codes', 'prior'] and all(t.shape == (40,) for t in terms.values()), 'terms of the critic'
    assert torch.allclose(terms['prior'].double(), F.binary_cross_entropy_with_logits(on_prior, torch.ones(40).double(), reduction='none'), atol=1e-6), 'prior'
    assert torch.allclose(terms['codes'].double(), F.binary_cross_entropy_with_logits(on_codes, torch.zeros(40).double(), reduction='none'), atol=1e-6), 'codes'


def check_fooling(cls):
    """Equation (3): -log D of the codes, with the gradient -(1 - D) with respect to each logit."""
    d = raw(cls)
    u = torch.linspace(-8, 8, 40, dtype=torch.float64, requires_grad=True)
    d.critic = lambda codes: u
    loss = total_loss(d.fooling_loss(XB), 40)
    assert torch.isclose(loss, -torch.log(torch.sigmoid(u)).mean()), 'fooling: value'
    g, = torch.autograd.grad(loss, u)
    assert torch.allclose(g, -(1 - torch.sigmoid(u)).detach() / 40), 'fooling: gradient'


class Table(nn.Module):
    """A decoder that multiplies the code by a fixed matrix."""
    def __init__(self): super().__init__(); self.w = nn.Parameter(torch.linspace(-1, 1, 48).view(3, 16))
    def forward(self, code): return (code @ self.w).view(-1, 1, 4, 4)


class Linear(AAE):
    """Linear encoder and decoder, for which (5) has a closed form."""
    def networks(self, shape):
        return dict(encoder=nn.Sequential(nn.Flatten(), nn.Linear(16, 3, bias=False)), decoder=Table(), critic=mlp((3, 8, 1)))


def check_autoencoder(cls):
    """The reconstruction is the mean squared error; (5) is its weight times the mean squared difference of both codes, with the gradient through both."""
    kind = type('L', (cls,), dict(networks=Linear.networks))
    d = raw(kind, consistency=.7)
    d.nets_.double()
    x = XB.double()
    U, V = d.nets_.encoder[1].weight, d.nets_.decoder.w
    rows = x.flatten(1)
    z = rows @ U.T
    terms = d.loss(x)
    assert sorted(terms) == ['consistency', 'reconstruction'], 'terms of the autoencoder'
    assert torch.isclose(terms['reconstruction'].mean(), (rows - z @ V).square().mean()), 'reconstruction'
    expected = .7 * (z - z @ V @ U.T).square().mean()
    assert torch.isclose(terms['consistency'].mean(), expected), 'consistency: value'
    for ours, theirs in zip(torch.autograd.grad(terms['consistency'].mean(), [U, V], retain_graph=True), torch.autograd.grad(expected, [U, V])):
        assert torch.allclose(ours, theirs), 'consistency: gradient'
    assert 'consistency' not in raw(cls).loss(XB), 'no weight, no term'


# ---------------------------------------------------------------- the game
def check_players(cls):
    """Each step moves its own player and lowers its own loss; codes gain by the encoder's steps and lose by the critic's."""
    d = raw(cls)
    assert moved(d, 'autoencoder', d.loss) == {'encoder', 'decoder'}, 'step of the autoencoder'
    assert moved(d, 'critic', d.critic_loss) == {'critic'}, 'step of the critic'
    assert moved(d, 'encoder', d.fooling_loss) == {'encoder'}, 'step of the encoder'
    with torch.no_grad():
        z = torch.randn(200, 3, generator=torch.Generator().manual_seed(0))
        errors, logits, gap = (lambda: d.errors(XB).mean(), lambda: d.critic(d.code(XB)).mean(), lambda: d.critic(z).mean() - d.critic(d.code(XB)).mean())
        before = gap(); moved(d, 'critic', d.critic_loss, 30)
        assert gap() > before + .1, 'the critic does not learn to tell them apart'
        before = logits(); moved(d, 'encoder', d.fooling_loss, 30)
        assert logits() > before + .1, 'the encoder does not learn to fool'
        before = errors(); moved(d, 'autoencoder', d.loss, 30)
        assert errors() < before, 'the autoencoder does not learn to draw'


def check_step(cls):
    """One call of step is one turn for each of the three, and all terms are recorded."""
    d = raw(cls)
    calls = []
    d.descend = lambda player, loss, xb: calls.append((player, loss.__name__)) or {player: torch.zeros(())}
    assert set(d.step(XB)) == {'autoencoder', 'critic', 'encoder'}, 'terms to record'
    assert calls == [('autoencoder', 'loss'), ('critic', 'critic_loss'), ('encoder', 'fooling_loss')], 'turns'


def check_match(cls):
    """Trained on images with codes of one number, the codes come to have about the mean and spread of the prior; without a game they do not."""
    x = np.random.default_rng(1).random((256, 1, 1, 2)).astype('float32')
    d = cls(code_dim=1, epochs=60, batch_size=64, width=4, critic_width=16, lr=1e-4, verbose=False).fit(x)
    code = torch.tensor(d.encode(x))
    z = torch.randn(500, 1, generator=torch.Generator().manual_seed(0))
    assert energy_distance(code, z) < .15, f'energy distance {energy_distance(code, z):.2f}: the codes do not follow the prior'


# ---------------------------------------------------------------- the score
def check_score(cls):
    """Equation (6) with statistics of the training images, against numpy; the length counts for lambda, and 0 ranks as the error does."""
    d = cls(code_dim=3, epochs=2, width=2, critic_width=8, prior_weight=.5, verbose=False).fit(X)
    new = np.random.default_rng(7).random((15, 1, 4, 4), dtype='float32') ** 3

    def parts(x):
        z, xhat = d.encode(x).astype(float), d.reconstruct(x)
        return np.stack([((x - xhat)**2).mean((1, 2, 3)), (z**2).mean(1)], 1)
    train = parts(X)
    expected = (parts(new) - train.mean(0)) / train.std(0) @ [1, .5]
    assert np.allclose(d.decision_function(new), expected, rtol=1e-3, atol=1e-3), 'score'
    assert np.allclose(d.decision_function(X).mean(), 0, atol=1e-4), 'training scores are centered'
    plain = cls(code_dim=3, epochs=2, width=2, critic_width=8, verbose=False).fit(X)
    error = ((new - plain.reconstruct(new))**2).mean((1, 2, 3))
    assert (np.argsort(plain.decision_function(new)) == np.argsort(error)).all(), 'lambda 0 must rank as the error does'


CHECKS = dict(critic=check_critic, fooling=check_fooling, autoencoder=check_autoencoder, players=check_players, step=check_step, match=check_match, score=check_score)


@pytest.mark.parametrize('name', CHECKS)
def test_the_chapter_keeps(name): CHECKS[name](AAE)


# ---------------------------------------------------------------- mutants
class CriticFlipped(AAE):
    def critic_loss(self, xb): return {k: -v for k, v in super().critic_loss(xb).items()}

class CriticSwapsClasses(AAE):
    def critic_loss(self, xb):
        z = self.code(xb).detach()
        return critic_terms(self.critic(z), self.critic(self.draws(z)))

class CriticWithoutPrior(AAE):
    def critic_loss(self, xb): return {k: v * (k == 'codes') for k, v in super().critic_loss(xb).items()}

class CriticWithoutCodes(AAE):
    def critic_loss(self, xb): return {k: v * (k == 'prior') for k, v in super().critic_loss(xb).items()}

class CriticSums(AAE):
    def critic_loss(self, xb): return {k: v * len(v) for k, v in super().critic_loss(xb).items()}

class UniformPrior(AAE):
    def draws(self, codes): return torch.rand(codes.shape)

class ColumnLogits(AAE):
    def critic(self, codes): return self.nets_.critic(codes)

class CriticMovesEncoder(AAE):
    def critic_loss(self, xb):
        z = self.code(xb)
        return critic_terms(self.critic(self.draws(z)), self.critic(z))
    def optimizers(self): return {**super().optimizers(), 'critic': self.adam('critic', 'encoder')}

class EncoderMovesCritic(AAE):
    def optimizers(self): return {**super().optimizers(), 'encoder': self.adam('encoder', 'critic')}

class AutoencoderMovesCritic(AAE):
    def loss(self, xb): return dict(super().loss(xb), fooling=self.fooling_loss(xb)['fooling'])
    def optimizers(self): return {**super().optimizers(), 'autoencoder': self.adam(*self.nets_)}

class FoolingFlipped(AAE):
    def fooling_loss(self, xb): return {k: -v for k, v in super().fooling_loss(xb).items()}

class FoolingZero(AAE):
    def fooling_loss(self, xb): return {k: v * 0 for k, v in super().fooling_loss(xb).items()}

class Saturating(AAE):
    def fooling_loss(self, xb): return dict(fooling=-F.softplus(self.critic(self.code(xb))))

class FoolsByDetached(AAE):
    def fooling_loss(self, xb): return fooling_terms(self.critic(self.code(xb).detach()))

class ReconstructionFlipped(AAE):
    def loss(self, xb): return {k: -v if k == 'reconstruction' else v for k, v in super().loss(xb).items()}

class ReconstructionZero(AAE):
    def loss(self, xb): return {k: v * 0 if k == 'reconstruction' else v for k, v in super().loss(xb).items()}

class ConsistencyZero(AAE):
    def loss(self, xb): return {k: v * 0 if k == 'consistency' else v for k, v in super().loss(xb).items()}

class ConsistencyFlipped(AAE):
    def loss(self, xb): return {k: -v if k == 'consistency' else v for k, v in super().loss(xb).items()}

class ConsistencySums(AAE):
    def loss(self, xb): return {k: v * self.code_dim if k == 'consistency' else v for k, v in super().loss(xb).items()}

class ConsistencyDetached(AAE):
    def loss(self, xb):
        terms = AE.loss(self, xb)
        if self.consistency: terms['consistency'] = self.consistency * (self.code(xb).detach() - self.code(self.reconstruction(xb))).square().mean(1)
        return terms

class SkipsTheCritic(AAE):
    def step(self, xb): return {**self.descend('autoencoder', self.loss, xb), **self.descend('encoder', self.fooling_loss, xb)}

class NoGame(AAE):
    def step(self, xb): return self.descend('autoencoder', self.loss, xb)

class ScalesOverTheBatch(AAE):
    def image_score(self, xb):
        parts = self.parts(xb)
        error, length = ((parts - parts.mean(0)) / parts.std(0, correction=0)).unbind(1)
        return error + self.prior_weight * length

class Unscaled(AAE):
    def image_score(self, xb): return self.parts(xb) @ torch.tensor([1, self.prior_weight])

class LengthSubtracted(AAE):
    def image_score(self, xb):
        error, length = ((self.parts(xb) - self.center_) / self.scale_).unbind(1)
        return error - self.prior_weight * length

class LengthAlways(AAE):
    def image_score(self, xb): return ((self.parts(xb) - self.center_) / self.scale_).sum(1)

class ErrorFlipped(AAE):
    def image_score(self, xb):
        error, length = ((self.parts(xb) - self.center_) / self.scale_).unbind(1)
        return self.prior_weight * length - error


MUTANTS = {'critic': [CriticFlipped, CriticSwapsClasses, CriticWithoutPrior, CriticWithoutCodes, CriticSums, UniformPrior, ColumnLogits],
           'fooling': [FoolingFlipped, FoolingZero, Saturating],
           'autoencoder': [ReconstructionFlipped, ReconstructionZero, ConsistencyZero, ConsistencyFlipped, ConsistencySums, ConsistencyDetached],
           'players': [CriticFlipped, CriticSwapsClasses, CriticMovesEncoder, EncoderMovesCritic, AutoencoderMovesCritic, FoolingFlipped, FoolingZero, ReconstructionFlipped, ReconstructionZero],
           'step': [SkipsTheCritic, NoGame], 'match': [NoGame, FoolingFlipped, CriticFlipped],
           'score': [ScalesOverTheBatch, Unscaled, LengthSubtracted, LengthAlways, ErrorFlipped]}


@pytest.mark.parametrize('name, mutant', [(n, m) for n, ms in MUTANTS.items() for m in ms], ids=lambda v: v if isinstance(v, str) else v.__name__)
def test_mutants_fail(name, mutant):
    with pytest.raises(AssertionError): CHECKS[name](mutant)


def test_fooling_by_detached_codes_is_an_error():
    d = raw(FoolsByDetached)
    assert moved(d, 'encoder', d.fooling_loss) == set()


# ---------------------------------------------------------------- pieces
def test_the_best_critic_is_the_logarithm_of_the_ratio_of_densities():
    z = torch.linspace(-2, 3, 50, dtype=torch.float64)
    p, q = torch.distributions.Normal(0., 1.).log_prob(z), torch.distributions.Normal(1.5, .5).log_prob(z)
    u = (p - q).requires_grad_()
    loss = (p.exp() * critic_terms(u, u)['prior'] + q.exp() * critic_terms(u, u)['codes']).sum()  # (2) as an integral over z
    assert torch.autograd.grad(loss, u)[0].abs().max() < 1e-12


def test_critic_at_rest_has_two_log_two():
    assert np.isclose(float(total_loss(critic_terms(torch.zeros(4), torch.zeros(4)), 4)), 2 * np.log(2))


def test_losses_stay_finite_for_any_logit():
    big = torch.tensor([-1e4, 1e4])
    assert all(torch.isfinite(t).all() for t in (*critic_terms(big, big).values(), *fooling_terms(big).values()))


def test_without_a_game_it_is_the_autoencoder():
    ours = NoGame(code_dim=3, epochs=3, width=2, verbose=False).fit(X)
    theirs = AE(code_dim=3, epochs=3, width=2, verbose=False).fit(X)
    for name in ('encoder', 'decoder'): torch.testing.assert_close(weights(ours, name), weights(theirs, name))


def test_the_optimizers_have_their_own_rates():
    d = raw(AAE, lr=.1, critic_lr=.2, game_lr=.3)
    assert [d.optimizers_[n].param_groups[0]['lr'] for n in ('autoencoder', 'critic', 'encoder')] == [.1, .2, .3]


@dataclass(kw_only=True, eq=False, repr=False)
class Weighted(AAE):
    weight: float = 1.
    def fooling_loss(self, xb): return {k: v * self.weight for k, v in super().fooling_loss(xb).items()}


def test_adam_cancels_a_weight_on_the_fooling_loss():
    a, b = (raw(Weighted, weight=w) for w in (1., 50.))
    for d in (a, b): moved(d, 'encoder', d.fooling_loss)
    torch.testing.assert_close(weights(a, 'encoder'), weights(b, 'encoder'), rtol=1e-3, atol=1e-4)


def test_statistics_survive_saving(tmp_path):
    d = AAE(code_dim=2, epochs=1, width=2, critic_width=4, prior_weight=1., verbose=False).fit(X)
    d.save(tmp_path/'m.safetensors')
    again = AAE.load(tmp_path/'m.safetensors')
    assert torch.equal(again.center_, d.center_.cpu()) and np.array_equal(again.decision_function(X), d.decision_function(X))
