"""GANomaly: the three losses, the score, who moves whom, the two codes; mutants of each."""
import pickle

import numpy as np
import pytest
import torch
from sklearn.base import clone
from torch.nn import functional as F

from ad_course.detector import load, total_loss
from ad_course.ganomaly import GANomaly, contextual, feature_matching, latent_difference
from ad_course.networks import Critic

from .mutants import assert_caught, each_mutant
from .players import (SHAPES, Scale, altered, check_any_image, check_explosion, check_refused,
                      moved, ready, weights, without)

X = np.random.default_rng(0).random((40, 1, 4, 4), dtype='float32')
XB = torch.tensor(X)
SMALL = dict(code_dim=3, width=2, verbose=False)
GENERATOR = {'encoder', 'decoder', 'second_encoder'}


def raw(cls, **params):
    """An untrained detector, ready for single steps."""
    return ready(cls(**SMALL | dict(epochs=0) | params).fit(X))


class Watch(Scale):
    """A critic that sees three weighted pixels and answers with their sum."""
    def features(self, x): return Scale.forward(self, x)
    def forward(self, x): return self.features(x).sum(1)


W = dict(encoder=[1., -1., .5], decoder=[.5, 1., 3.], second_encoder=[3., 2., -1.],
         critic=[1., -2., 3.])
PIXELS = torch.rand(6, 1, 1, 3, generator=torch.Generator().manual_seed(2))


def shown(cls, **params):
    """The class with networks that can be worked out, on images of three pixels."""
    def networks(self, shape):
        shapes = dict(encoder=[3], decoder=[1, 1, 3], second_encoder=[3], critic=[3])
        return {k: (Watch if k == 'critic' else Scale)(W[k], *shapes[k]) for k in W}
    d = type('Shown', (cls,), dict(networks=networks))(epochs=0, verbose=False, **params)
    return d.fit(np.random.default_rng(1).random((6, 1, 1, 3), dtype='float32'))


def worked_out(x, w=W):
    """Code, rebuilt pixels and second code (b, 3) of the networks above, without them."""
    w = {k: torch.as_tensor(v) for k, v in w.items()}
    code = x.flatten(1) * w['encoder']
    rebuilt = code * w['decoder']
    return code, rebuilt, rebuilt * w['second_encoder']


def generator_truth(x, weights=(1., 50., 1.), w=W):
    """Equation (4) term by term, (b,) each."""
    (code, rebuilt, again), c = worked_out(x, w), torch.as_tensor(w['critic'])
    pixels = x.flatten(1)
    terms = (((pixels * c - rebuilt * c)**2).sum(1) / 3, (pixels - rebuilt).abs().sum(1) / 3,
             ((code - again)**2).sum(1) / 3)
    return dict(zip(('adversarial', 'contextual', 'encoder'),
                    (weight * term for weight, term in zip(weights, terms))))


# ---------------------------------------------------------------- equations
def check_values(cls):
    """Each term on known networks, for the default weights and for others."""
    chosen = dict(adversarial_weight=2., contextual_weight=3., encoder_weight=5.)
    for params, expected in (({}, (1., 50., 1.)), (chosen, (2., 3., 5.))):
        d, truth = shown(cls, **params), generator_truth(PIXELS, expected)
        terms = d.generator_loss(PIXELS)
        assert terms.keys() == truth.keys(), 'names of the terms'
        for name, value in truth.items():
            assert terms[name].shape == (6,), f'shape of {name}'
            assert torch.allclose(terms[name], value, atol=1e-5), f'value of {name}'
    critic = torch.tensor(W['critic'])
    on_real, on_fake = PIXELS.flatten(1) @ critic, worked_out(PIXELS)[1] @ critic
    one = torch.ones(6)
    truth = dict(real=F.binary_cross_entropy_with_logits(on_real, one, reduction='none'),
                 fake=F.binary_cross_entropy_with_logits(on_fake, 0 * one, reduction='none'))
    terms = d.critic_loss(PIXELS)
    assert terms.keys() == truth.keys(), 'names of the terms of the critic'
    for name, value in truth.items():
        assert terms[name].shape == (6,), f'shape of {name}'
        assert torch.allclose(terms[name], value, atol=1e-5), f'value of {name}'


def check_slopes(cls):
    """Equation (4) pulls at all three networks as autograd says of the formula."""
    d = shown(cls)
    w = {k: torch.tensor(v, requires_grad=True) for k, v in W.items()}
    names = 'encoder', 'decoder', 'second_encoder'
    expected = torch.autograd.grad(total_loss(generator_truth(PIXELS, w=w), 6),
                                   [w[k] for k in names])
    ours = [d.nets_[k].w for k in names]
    found = torch.autograd.grad(total_loss(d.generator_loss(PIXELS), 6), ours, allow_unused=True)
    for name, a, b in zip(names, found, expected):
        assert a is not None and torch.allclose(a, b, atol=1e-4), f'slope of the {name}'


# ---------------------------------------------------------------- the game
def check_players(cls):
    """Each step moves its own player and nobody else, in the right direction."""
    d = raw(cls)
    assert moved(d, 'critic', d.critic_loss, XB) == {'critic'}, 'step of the critic'
    assert moved(d, 'generator', d.generator_loss, XB) == GENERATOR, 'step of the generator'
    def gap():
        with torch.no_grad():
            return float((d.nets_.critic(XB) - d.nets_.critic(d.reconstruction(XB))).mean())
    before = gap(); moved(d, 'critic', d.critic_loss, XB, 30)
    assert gap() > before + .01, 'the critic does not learn to tell them apart'
    def residual(d):
        with torch.no_grad(): return float((XB - d.reconstruction(XB)).abs().mean())
    before = residual(d); moved(d, 'generator', d.generator_loss, XB, 100)
    assert residual(d) < .95 * before, 'the images do not come together'
    d = raw(cls, adversarial_weight=0., contextual_weight=0.)
    @torch.no_grad()
    def apart():
        code, rebuilt = d.passage(XB)
        return float((code - d.second_code(rebuilt)).square().mean())
    before = apart(); moved(d, 'generator', d.generator_loss, XB, 30)
    assert apart() < .7 * before, 'the codes do not come together'


def check_turns(cls):
    """One turn each, critic first; every term is recorded."""
    turns = [(player, loss.__name__) for player, loss in cls(**SMALL).turns()]
    assert turns == [('critic', 'critic_loss'), ('generator', 'generator_loss')], 'turns'
    recorded = {k for k, v in cls(**SMALL, epochs=2).fit(X).history_.items() if len(v) == 2}
    assert recorded == {'critic/real', 'critic/fake', 'generator/adversarial', 'seconds',
                        'generator/contextual', 'generator/encoder'}, 'records'


# ---------------------------------------------------------------- the score
def check_score(cls):
    """Equation (5) in both forms, from the networks' weights; the map is the residual's."""
    code, rebuilt, again = worked_out(PIXELS)
    for power in (1, 2):
        expected = ((code - again).abs()**power).sum(1) / 3
        score = shown(cls, score_power=power).decision_function(PIXELS)
        assert np.allclose(score, expected, atol=1e-5), f'score of power {power}'
    d = shown(cls)
    assert np.allclose(d.encode(PIXELS), code, atol=1e-6), 'code'
    second = lambda xb: d.second_code(d.reconstruction(xb))
    assert np.allclose(d.for_each(second, PIXELS), again, atol=1e-5), 'second code'
    residual = (PIXELS - rebuilt.reshape(6, 1, 1, 3)).square().sum(1)
    assert np.allclose(d.anomaly_map(PIXELS), residual, atol=1e-5), 'map'


def check_scoring_moves_nothing(cls):
    """Not a weight, not a statistic of a batch, whatever mode the networks were left in; and a
    score is the same alone, in a batch, twice, and sorted in any way."""
    x = np.random.default_rng(3).random((24, 1, 8, 8), dtype='float32')
    d = cls(**SMALL, arch='conv', epochs=2).fit(x)
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


CHECKS = (check_values, check_slopes, check_players, check_turns, check_score,
          check_scoring_moves_nothing)


@pytest.mark.parametrize('check', CHECKS)
def test_the_chapter_keeps(check): check(GANomaly)


# ---------------------------------------------------------------- mutants
def flipped(term): return lambda terms: {k: v * (-1 if k == term else 1) for k, v in terms.items()}


TERMS = 'adversarial', 'contextual', 'encoder'
MISSING = {k: altered(GANomaly, 'generator_loss', without(k), f'No_{k}') for k in TERMS}
NEGATIVE = {k: altered(GANomaly, 'generator_loss', flipped(k), f'Negative_{k}') for k in TERMS}
NO_REAL, NO_FAKE, HELPFUL = (
    altered(GANomaly, 'critic_loss', change, name)
    for change, name in ((without('real'), 'NoReal'), (without('fake'), 'NoFake'),
                         (lambda terms: {k: -v for k, v in terms.items()}, 'Helpful')))
COLUMN = altered(GANomaly, 'generator_loss',
                 lambda terms: {k: v[:, None] for k, v in terms.items()}, 'Column')
DETACHED = altered(GANomaly, 'generator_loss',
                   lambda terms: {k: v.detach() for k, v in terms.items()}, 'Detached')


class Swapped(GANomaly):
    """Rebuilt images are called 1, real ones 0."""
    def critic_loss(self, xb):
        a, b = self.nets_.critic(xb), self.nets_.critic(self.reconstruction(xb))
        return dict(real=F.softplus(a), fake=F.softplus(-b))

class ComparesAnswers(GANomaly):
    """The critic's answers in place of its features, as one library has it."""
    def generator_loss(self, xb):
        a, b = self.nets_.critic(xb), self.nets_.critic(self.reconstruction(xb))
        return super().generator_loss(xb) | dict(adversarial=(a - b).square())

class MatchesMeans(GANomaly):
    def generator_loss(self, xb):
        a, b = (self.nets_.critic.features(x).mean(0) for x in (xb, self.reconstruction(xb)))
        apart = (a - b).square().mean().expand(len(xb))
        return super().generator_loss(xb) | dict(adversarial=apart)

class SquaredPixels(GANomaly):
    def generator_loss(self, xb):
        square = self.errors(xb).flatten(1).mean(1) * self.contextual_weight
        return super().generator_loss(xb) | dict(contextual=square)

class OfTheImage(GANomaly):
    """The second encoder reads the image, not what was rebuilt."""
    def generator_loss(self, xb):
        again = latent_difference(self.code(xb), self.second_code(xb), 2) * self.encoder_weight
        return super().generator_loss(xb) | dict(encoder=again)
    def image_score(self, xb):
        return latent_difference(self.code(xb), self.second_code(xb), self.score_power)

class FirstTwice(GANomaly):
    """The first encoder reads what was rebuilt, too."""
    def second_code(self, rebuilt): return self.nets_.encoder(rebuilt)

class FixedCode(GANomaly):
    """The encoder loss does not reach the first encoder."""
    def generator_loss(self, xb):
        again = self.nets_.second_encoder(self.reconstruction(xb))
        apart = latent_difference(self.code(xb).detach(), again, 2)
        return super().generator_loss(xb) | dict(encoder=apart)

class NotTrained(GANomaly):
    """The second encoder stands still."""
    def optimizers(self):
        """Its Adam is missing."""
        generator = self.adam('encoder', 'decoder')
        return dict(critic=self.adam('critic'), generator=generator)

class CriticMovesAll(GANomaly):
    def optimizers(self):
        """The critic's Adam holds everything."""
        return super().optimizers() | dict(critic=self.adam(*self.nets_))
    def critic_loss(self, xb):
        a, b = self.nets_.critic(xb), self.nets_.critic(self.reconstruction(xb))
        return dict(real=F.softplus(-a), fake=F.softplus(b))

class GeneratorMovesAll(GANomaly):
    def optimizers(self):
        """The generator's Adam holds everything."""
        return super().optimizers() | dict(generator=self.adam(*self.nets_))

class NoCritic(GANomaly):
    def turns(self):
        """The critic never moves."""
        return super().turns()[1:]

class NoGenerator(GANomaly):
    def turns(self):
        """The generator never moves."""
        return super().turns()[:1]

class Residual(GANomaly):
    def image_score(self, xb): return contextual(xb, self.reconstruction(xb))

class OfTheRebuilt(GANomaly):
    """The score of a survey: of the rebuilt image."""
    def image_score(self, xb): return super().image_score(self.reconstruction(xb))

class Negated(GANomaly):
    def image_score(self, xb): return -super().image_score(xb)

class AlwaysSquares(GANomaly):
    def image_score(self, xb):
        code, rebuilt = self.passage(xb)
        return latent_difference(code, self.second_code(rebuilt), 2)

class TrainMode(GANomaly):
    """Nobody calls eval() before scoring."""
    def image_score(self, xb):
        self.nets_.train()
        return super().image_score(xb)

class MinMax(GANomaly):
    """Scores scaled over the batch."""
    def image_score(self, xb):
        s = super().image_score(xb)
        return (s - s.min()) / (s.max() - s.min() + 1e-9)


@each_mutant({f'value of {k}': (MISSING[k], NEGATIVE[k]) for k in TERMS}
             | {'value of real': (NO_REAL, HELPFUL, Swapped), 'value of fake': (NO_FAKE,),
                'shape': (COLUMN,), 'of adversarial': (ComparesAnswers, MatchesMeans),
                'of contextual': (SquaredPixels,), 'of encoder': (OfTheImage, FirstTwice)})
def test_wrong_losses_are_caught(why, broken): assert_caught(check_values, broken, why)


@each_mutant({'slope of the encoder': (FixedCode, *MISSING.values(), *NEGATIVE.values()),
              'slope': (OfTheImage, FirstTwice)})
def test_wrong_slopes_are_caught(why, broken): assert_caught(check_slopes, broken, why)


@each_mutant({'tell them apart': (HELPFUL, Swapped), 'step of the critic': (CriticMovesAll,),
              'step of the generator': (GeneratorMovesAll, NotTrained),
              'images do not': (MISSING['contextual'], NEGATIVE['contextual']),
              'do not come together': (NEGATIVE['encoder'],)})
def test_wrong_moves_are_caught(why, broken): assert_caught(check_players, broken, why)


def test_a_loss_that_reaches_nobody_is_refused():
    d = raw(DETACHED)
    with pytest.raises(ValueError, match="'generator' must depend"):
        d.descend('generator', d.generator_loss, XB)


@each_mutant({'turns': (NoCritic, NoGenerator)})
def test_wrong_turns_are_caught(why, broken): assert_caught(check_turns, broken, why)


@each_mutant({'score': (Residual, OfTheRebuilt, Negated), 'score of power 1': (AlwaysSquares,),
              'score of power': (OfTheImage, FirstTwice)})
def test_wrong_scores_are_caught(why, broken): assert_caught(check_score, broken, why)


@each_mutant({'decides': (TrainMode, MinMax)})
def test_leaks_are_caught(why, broken):
    assert_caught(check_scoring_moves_nothing, broken, 'decides|order|moves')


# ---------------------------------------------------------------- pieces
def test_equations_by_hand():
    a, b = torch.tensor([[0., 3.], [1., 1.]]), torch.tensor([[2., -1.], [1., 0.]])
    assert latent_difference(a, b, 1).tolist() == [3, .5]
    assert latent_difference(a, b, 2).tolist() == [10, .5] == feature_matching(a, b).tolist()
    assert contextual(a.view(2, 1, 1, 2), b.view(2, 1, 1, 2)).tolist() == [3, .5]


def test_both_forms_of_the_score_can_disagree():
    code = torch.tensor([[1., 1.], [0., 1.8]])
    assert latent_difference(code, 0 * code, 1).argmax() == 0
    assert latent_difference(code, 0 * code, 2).argmax() == 1


def test_without_a_weight_the_critic_is_not_heard():
    """It still learns, but what it says changes nothing."""
    scores = [GANomaly(**SMALL, epochs=3, adversarial_weight=0., critic_lr=lr).fit(X)
              .decision_function(X) for lr in (1e-4, 1e-1)]
    assert np.allclose(*scores, rtol=1e-5)
    heard = [GANomaly(**SMALL, epochs=3, adversarial_weight=10., critic_lr=lr).fit(X)
             .decision_function(X) for lr in (1e-4, 1e-1)]
    assert not np.allclose(*heard, rtol=1e-3)


def test_rates_and_memory_reach_the_optimizers():
    d = raw(GANomaly, lr=.1, critic_lr=.2, beta1=.3)
    groups = {name: o.param_groups[0] for name, o in d.optimizers_.items()}
    assert {k: g['lr'] for k, g in groups.items()} == dict(generator=.1, critic=.2)
    assert all(g['betas'] == (.3, .999) for g in groups.values())


@pytest.mark.parametrize('params, message', [
    (dict(code_dim=0), 'code_dim must be a whole number, at least 1; got 0'),
    (dict(width=0), 'width'), (dict(score_power=3), 'score_power must be one of 1, 2; got 3'),
    (dict(score_power=1.), 'score_power'), (dict(beta1=1.), 'beta1'),
    (dict(critic_lr=0), 'critic_lr'),
    (dict(adversarial_weight=-1), 'adversarial_weight'), (dict(contextual_weight=-1), 'contextual'),
    (dict(encoder_weight=float('nan')), 'encoder_weight'), (dict(arch='cnn'), 'arch'),
    (dict(encoder_weight=0), 'encoder_weight must be above 0, or nothing teaches the second .* 0')])
def test_wrong_settings_are_named(params, message):
    check_refused(GANomaly, message, **SMALL | params)


def test_an_exploding_game_names_player_term_epoch_and_rates():
    check_explosion(GANomaly, "'critic/real'.*epoch 1.*lr=1e\\+30", **SMALL, lr=1e30)


@pytest.mark.parametrize('shape', SHAPES)
def test_any_image_fits(shape): check_any_image(GANomaly, shape, **SMALL)


def test_a_saved_game_scores_the_same(tmp_path):
    d = GANomaly(**SMALL, epochs=2, score_power=2).fit(X)
    d.save(tmp_path/'d')
    assert np.array_equal(load(tmp_path/'d').decision_function(X), d.decision_function(X))


def test_training_makes_a_detector():
    """Bright stripes among rows, dark columns: better trained than untrained, in every seed."""
    rng = np.random.default_rng(0)
    def stripes(n, axis):
        base = np.zeros((n, 1, 6, 6), 'float32')
        for i, at in enumerate(rng.integers(6, size=n)): base[i, 0].swapaxes(0, axis)[at] = .8
        return (base + .1 * rng.random(base.shape)).astype('float32')
    x, y = np.concatenate([stripes(60, 0), stripes(60, 1)]), np.repeat([0, 1], 60)
    rows = stripes(200, 0)
    for seed in range(2):
        trained, untrained = (GANomaly(epochs=e, lr=2e-3, seed=seed, verbose=False).fit(rows)
                              .score(x, y) for e in (60, 0))
        assert trained > max(.9, untrained + .2), f'{trained:.3f}, {untrained:.3f} untrained'


# ---------------------------------------------------------------- what else must hold
X8 = np.random.default_rng(0).random((24, 1, 8, 8), dtype='float32')


@pytest.mark.parametrize('arch', ('mlp', 'conv'))
def test_four_networks_of_the_right_form_share_nothing(arch):
    d = GANomaly(code_dim=3, width=2, arch=arch, epochs=0, verbose=False).fit(X8)
    own = [{id(p) for p in net.parameters()} for net in d.nets_.values()]
    assert len(set.union(*own)) == sum(map(len, own))
    shapes = lambda net: {k: v.shape for k, v in net.state_dict().items()}
    first, second, critic = (d.nets_[n] for n in ('encoder', 'second_encoder', 'critic'))
    assert shapes(first) == shapes(second)
    assert not all(map(torch.equal, first.parameters(), second.parameters()))
    assert shapes(critic) == shapes(Critic((1, 8, 8), arch=arch, width=2, norm=None))


def test_images_and_rebuilt_ones_pass_the_critic_apart():
    d = GANomaly(code_dim=3, width=2, arch='conv', epochs=0, verbose=False).fit(X8)
    d.nets_.train()
    xb = torch.tensor(X8)
    with torch.no_grad():
        fake, see = d.reconstruction(xb), d.nets_.critic.features
        apart = (see(xb) - see(fake)).square().mean(1)
        assert torch.allclose(d.generator_loss(xb)['adversarial'], apart)
        on_fake = F.softplus(d.nets_.critic(fake))
        assert torch.allclose(d.critic_loss(xb)['fake'], on_fake)


def test_defaults_and_what_is_refused():
    assert GANomaly().score_power == 1 and GANomaly.loss_falls is False
    assert contextual(torch.ones(1, 3, 1, 2), torch.zeros(1, 3, 1, 2)).item() == 1
    silent = dict.fromkeys(('encoder_weight', 'adversarial_weight', 'contextual_weight'), 0.)
    for wrong in (dict(lr=-1.), silent):
        with pytest.raises(ValueError, match=f'GANomaly: {[*wrong][0]}'):
            GANomaly(epochs=0, verbose=False, **wrong).fit(X8)


# ---------------------------------------------------------------- one passage for both players
class EachAnew(GANomaly):
    """The same game, in which each loss rebuilds the batch."""
    def passage(self, xb):
        code = self.code(xb)
        return code, self.nets_.decoder(code)
    def step(self, xb, *yb): return super(GANomaly, self).step(xb, *yb)

class OutOfDate(GANomaly):
    """What has passed is kept when the generator has moved."""
    def descend(self, player, loss, xb, *yb):
        return super(GANomaly, self).descend(player, loss, xb, *yb)

ORDERS = dict(default='cg', repeated='ccgcg', first='gc', patient='c' * 5 + 'g')


def in_order(cls, order):
    """The class with other turns on each batch: c and g."""
    def turns(self):
        """In that order."""
        both = dict(c=('critic', self.critic_loss), g=('generator', self.generator_loss))
        return [both[player] for player in order]
    return type(cls.__name__, (cls,), dict(turns=turns))


def check_shared(cls, order, **params):
    """Not a bit differs from a game in which each loss rebuilds the batch, statistics included."""
    a, b = (in_order(c, order)(**SMALL | dict(epochs=2, batch_size=8) | params).fit(X8)
            for c in (cls, EachAnew))
    for (name, v), w in zip(a.nets_.state_dict().items(), b.nets_.state_dict().values()):
        assert torch.equal(v, w), f'{name} differs'
    assert a.history_.keys() == b.history_.keys(), 'terms'
    assert all(a.history_[k] == b.history_[k] for k in a.history_ if k != 'seconds'), 'terms'


@pytest.mark.parametrize('params', [dict(arch='mlp'), dict(arch='conv'),
                                    dict(arch='conv', precision='bfloat16')])
@pytest.mark.parametrize('order', ORDERS.values(), ids=ORDERS)
def test_a_shared_passage_changes_nothing(order, params): check_shared(GANomaly, order, **params)


def test_a_passage_out_of_date_is_caught():
    assert_caught(lambda cls: check_shared(cls, 'gc'), OutOfDate, 'differs')


def test_a_batch_passes_once():
    """Encoder and decoder are called once a batch, and batch statistics move once."""
    class Counted(GANomaly):
        def networks(self, shape):
            nets = super().networks(shape)
            for name, net in nets.items(): net.register_forward_hook(self.note(name))
            return nets
        def note(self, name): return lambda *_: calls.append(name)
        def step(self, xb, *yb):
            calls.clear()
            terms = super().step(xb, *yb)
            by_batch.append({name: calls.count(name) for name in GENERATOR})
            return terms
    calls, by_batch = [], []
    d = Counted(**SMALL, arch='conv', epochs=2, batch_size=8).fit(X8)
    assert by_batch == 6 * [dict.fromkeys(GENERATOR, 1)]
    moved = {int(v) for name in GENERATOR for k, v in d.nets_[name].state_dict().items()
             if k.endswith('num_batches_tracked')}
    assert moved == {6}
    calls.clear()
    d.decision_function(X8)
    assert {name: calls.count(name) for name in GENERATOR} == dict.fromkeys(GENERATOR, 3)


def test_nothing_of_a_passage_is_left(tmp_path):
    """Not after a fit, an interruption, or a step that fails; copies of all kinds still work."""
    class Interrupted(GANomaly):
        def generator_loss(self, xb):
            if len(self.history_.get('seconds', [])) == 2: raise KeyboardInterrupt
            return super().generator_loss(xb)
    class Fails(GANomaly):
        def generator_loss(self, xb): raise ZeroDivisionError
    for cls in (GANomaly, Interrupted):
        d = cls(**SMALL, epochs=4, batch_size=8)
        d.fit(X8, checkpoint=tmp_path/cls.__name__)
        assert 'passed' not in vars(d) and d.passed is None and len(d.history_['seconds']) >= 2
    d = GANomaly(**SMALL, epochs=2).fit(X8)
    again = pickle.loads(pickle.dumps(d))
    assert np.array_equal(again.decision_function(X8), d.decision_function(X8))
    assert 'passed' not in clone(d).get_params()
    d = ready(Fails(**SMALL, epochs=0).fit(X8))
    d._progress.turns = [(*turn, 1) for turn in d.turns()]
    with pytest.raises(ZeroDivisionError): d.step(torch.tensor(X8))
    assert 'passed' not in vars(d)


def test_losses_can_be_asked_alone():
    """Twice the same; that of the critic pulls at nobody else."""
    d, xb = raw(GANomaly), torch.tensor(X)
    for loss in (d.critic_loss, d.generator_loss):
        once, twice = loss(xb), loss(xb)
        assert all(torch.equal(v, twice[k]) for k, v in once.items())
    pulled = [*d.nets_.encoder.parameters(), *d.nets_.decoder.parameters()]
    slopes = torch.autograd.grad(total_loss(d.critic_loss(xb), len(xb)), pulled, allow_unused=True)
    assert slopes == (None,) * len(pulled)
