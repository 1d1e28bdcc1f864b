"""AnoGAN: the search, its losses, its starts, what it must not move; mutants of each."""
import copy
import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn

from ad_course.anogan import AnoGAN, minimize, residual, with_own_weights
from ad_course.data import digits
from ad_course.detector import isolated, load
from ad_course.networks import generator
from ad_course.wgan import WGANGP

from .mutants import assert_caught, changed, each_mutant
from .players import SHAPES, check_any_image, check_refused

SMALL = dict(latent_dim=3, width=2, n_draws=40, steps=8, verbose=False)
X = np.random.default_rng(0).random((20, 2, 6, 6), dtype='float32')
SETTINGS = (dict(), dict(feature_weight=.6), dict(prior_weight=2.), dict(steps=0), dict(steps=1),
            dict(n_starts=3), dict(generator_lr=.05), dict(n_starts=2, generator_lr=.05),
            dict(n_starts=3, prior_weight=2.), dict(generator_lr=.05, prior_weight=2.))


def fitted(cls, **params): return cls(**SMALL | dict(epochs=2) | params).fit(X)


# ---------------------------------------------------------------- against a plain loop
def by_loop(d, x, start):
    """The end of one search for one image: code, image, what is left, written out."""
    critic, net = copy.deepcopy(d.nets_.critic).eval(), copy.deepcopy(d.nets_.generator).eval()
    x, z = torch.tensor(x[None]), d.codes_[start][None].clone().requires_grad_()
    weights = [*net.parameters()] if d.generator_lr else []
    optimizer = torch.optim.Adam([z], d.step_lr)
    following = torch.optim.Adam(weights, d.generator_lr) if weights else None
    def left():
        fake = net(z)
        pixels = (x - fake).abs().sum()
        seen = (critic.features(x) - critic.features(fake)).abs().sum()
        return fake, (1 - d.feature_weight) * pixels + d.feature_weight * seen
    for step in range(d.steps):
        rate = (1 + math.cos(math.pi * step / d.steps)) / 2
        optimizer.param_groups[0]['lr'] = d.step_lr * rate
        optimizer.zero_grad()
        if following:
            following.param_groups[0]['lr'] = d.generator_lr * rate
            following.zero_grad()
        (left()[1] + d.prior_weight / 2 * (z**2).sum()).backward()
        optimizer.step()
        if following: following.step()
    fake, loss = left()
    return z.detach()[0].numpy(), fake.detach()[0].numpy(), loss.item()


def check_search(cls):
    """Codes, images, scores and maps are those of a loop over single images and starts."""
    for params in SETTINGS:
        d = fitted(cls, **params)
        bank = d.bank_.flatten(1).numpy()
        codes, images = d.encode(X[:4]), d.reconstruct(X[:4])
        scores, maps = d.decision_function(X[:4]), d.anomaly_map(X[:4])
        for i, x in enumerate(X[:4]):
            near = np.linalg.norm(bank - x.reshape(-1), axis=1).argsort()[:d.n_starts]
            z, fake, left = min((by_loop(d, x, int(k)) for k in near), key=lambda end: end[2])
            assert np.isclose(scores[i], left, rtol=1e-3), f'score, {params}'
            assert np.allclose(codes[i], z, atol=1e-2), f'code, {params}'
            assert np.allclose(images[i], fake, atol=1e-2), f'image, {params}'
            assert np.allclose(maps[i], np.abs(x - fake).sum(0), atol=1e-2), f'map, {params}'


# ---------------------------------------------------------------- what may not move
def check_stillness(cls):
    """Scoring moves no weight and no statistic, leaves no slope, and depends on the image alone:
    not on its company, its place, the mode in which networks were left, or the draws of others."""
    for params in (dict(arch='conv'), dict(arch='conv', generator_lr=.01, n_starts=2)):
        d = fitted(cls, **params)
        before, first = {k: v.clone() for k, v in d.nets_.state_dict().items()}, None
        d.nets_.zero_grad(set_to_none=True)
        for mode in (False, True):
            d.nets_.train(mode)
            scores = d.decision_function(X)
            first = scores if first is None else first
            assert np.allclose(scores, first, rtol=1e-4), 'the mode decides, or scores change'
            d.nets_.train(mode)
            turned = d.decision_function(X[::-1].copy())[::-1]
            assert np.allclose(turned, first, rtol=1e-4), 'order'
            alone = np.concatenate([d.decision_function(x[None]) for x in X[:3]])
            assert np.allclose(alone, first[:3], rtol=1e-4), 'its company decides'
        after = d.nets_.state_dict()
        assert all(torch.equal(v, after[k]) for k, v in before.items()), 'a network moved'
        assert all(p.grad is None for p in d.nets_.parameters()), 'slopes are left'
        assert np.ptp(d.reconstruct(X), axis=0).max() > 1e-3, 'one image for all'


def check_search_gets_nearer(cls):
    """A longer search leaves less, and one with a prior ends nearer to the middle."""
    d = fitted(cls, epochs=30)
    left = [copy.copy(d).set_params(steps=steps).decision_function(X) for steps in (0, 5, 60)]
    assert (left[1] < left[0]).mean() > .8 and (left[2] < left[1]).mean() > .8, 'nearer'
    tight = copy.copy(d).set_params(steps=60, prior_weight=50.)
    norms = [np.linalg.norm(m.encode(X), axis=1).mean() for m in (d, tight)]
    assert norms[1] < .5 * norms[0], 'the prior does nothing'


CHECKS = check_search, check_stillness, check_search_gets_nearer


@pytest.mark.parametrize('check', CHECKS)
def test_the_chapter_keeps(check): check(AnoGAN)


@dataclass(kw_only=True, eq=False, repr=False)
class OnWGANGP(AnoGAN, WGANGP):
    """The search in a generator that has played another game."""
    beta1: float = 0.


def test_the_search_works_in_another_generator():
    check_search(OnWGANGP)
    assert OnWGANGP().get_params().items() >= WGANGP().get_params().items()
    turns = [(player, loss.__func__) for player, loss, *_ in OnWGANGP().turns()]
    assert turns == [('critic', WGANGP.critic_loss), ('generator', WGANGP.generator_loss)]


# ---------------------------------------------------------------- mutants
def weighted(pixels, features):
    """A loss of the search with other weights: functions of lambda."""
    def mapping_loss(self, x, seen, fake):
        apart = residual(seen, self.nets_.critic.features(fake))
        return (pixels(self.feature_weight) * residual(x, fake)
                + features(self.feature_weight) * apart)
    return mapping_loss


def by_means(self, x, seen, fake):
    near, apart = (x - fake).abs(), (seen - self.nets_.critic.features(fake)).abs()
    return ((1 - self.feature_weight) * near.flatten(1).mean(1)
            + self.feature_weight * apart.mean(1))


def by_squares(self, x, seen, fake):
    near, apart = (x - fake).square(), (seen - self.nets_.critic.features(fake)).square()
    return ((1 - self.feature_weight) * near.flatten(1).sum(1)
            + self.feature_weight * apart.sum(1))


def of_answers(self, x, seen, fake):
    """The critic's answers in place of its features."""
    a, b = (self.nets_.critic(v)[:, None] for v in (x.expand_as(fake), fake))
    return (1 - self.feature_weight) * residual(x, fake) + self.feature_weight * residual(a, b)


def with_losses(name, loss): return changed(AnoGAN, name, mapping_loss=loss)


LOSSES = [with_losses(name, weighted(*both)) for name, both in {
    'NoResidual': (lambda w: 0., lambda w: w), 'NoFeatures': (lambda w: 1 - w, lambda w: 0.),
    'Swapped': (lambda w: w, lambda w: 1 - w), 'OneAndLambda': (lambda w: 1., lambda w: w),
    'Flipped': (lambda w: 1 - w, lambda w: -w)}.items()]
LOSSES += [with_losses('Means', by_means), with_losses('Squares', by_squares),
           with_losses('Answers', of_answers)]


class Farthest(AnoGAN):
    """Starts at the farthest of the draws."""
    def start(self, xb):
        far = torch.cdist(xb.flatten(1), self.bank_.flatten(1)).topk(self.n_starts).indices
        return self.codes_[far]

class FirstDraws(AnoGAN):
    """Starts at the same codes for all images."""
    def start(self, xb): return self.codes_[:self.n_starts].expand(len(xb), -1, -1)

class MeanOfStarts(AnoGAN):
    """The score of ADGAN: the mean over the starts."""
    def image_score(self, xb):
        starts = self.start(xb).unbind(1)
        one = copy.copy(self).set_params(n_starts=1)
        ends = []
        for z in starts:
            one.start = lambda _, z=z: z[:, None]
            ends.append(AnoGAN.image_score(one, xb))
        return torch.stack(ends).mean(0)

class FirstChannel(AnoGAN):
    def mapping_loss(self, x, seen, fake):
        features = residual(seen, self.nets_.critic.features(fake))
        pixels = residual(x[:, :1], fake[:, :1])
        return (1 - self.feature_weight) * pixels + self.feature_weight * features

class ChosenWithPrior(AnoGAN):
    """The best start is the best by (4)."""
    def search(self, xb):
        one = copy.copy(self).set_params(n_starts=1)
        ends = []
        for z in self.start(xb).unbind(1):
            one.start = lambda _, z=z: z[:, None]
            ends.append(AnoGAN.search(one, xb))
        z, fake, left = (torch.stack(several, 1) for several in zip(*ends))
        best = (left + self.prior_weight * z.square().sum(2) / 2).argmin(1)
        rows = torch.arange(len(xb))
        return z[rows, best], fake[rows, best], left[rows, best]

class NoPriorOfStarts(AnoGAN):
    """The prior is forgotten where there are several starts, or a generator follows."""
    def prior(self, z): return super().prior(z) * (self.n_starts == 1 and not self.generator_lr)

class PriorInTheScore(AnoGAN):
    def image_score(self, xb):
        z, _, left = self.search(xb)
        return left + self.prior_weight * z.square().sum(1) / 2

class NoPrior(AnoGAN):
    def prior(self, z): return 0 * z.sum(1)

class WholePrior(AnoGAN):
    """Without the half."""
    def prior(self, z): return z.square().sum(1)

class MeanPrior(AnoGAN):
    def prior(self, z): return z.square().mean(1) / 2

class NoSearch(AnoGAN):
    def search(self, xb): return AnoGAN.search(copy.copy(self).set_params(steps=0), xb)

class FixedGenerator(AnoGAN):
    def search(self, xb): return AnoGAN.search(copy.copy(self).set_params(generator_lr=0.), xb)

class OneForAll(AnoGAN):
    """A library's: every image is compared with one reconstruction."""
    def search(self, xb):
        z, fake, _ = AnoGAN.search(self, torch.full_like(xb[:1], .5))
        seen = self.nets_.critic.features(xb)
        return z.expand(len(xb), -1), fake.expand_as(xb), self.mapping_loss(xb, seen, fake)

class SquaredMap(AnoGAN):
    def errors(self, xb): return (xb - self.reconstruction(xb)).square()

class TrainMode(AnoGAN):
    def search(self, xb):
        self.nets_.train()
        return super().search(xb)

class MovesTheGenerator(AnoGAN):
    """The optimizer of the search holds the generator, too, as in a library."""
    def search(self, xb):
        with torch.enable_grad():
            z = self.start(xb)[:, 0].clone().requires_grad_()
            net = self.nets_.generator
            optimizer = torch.optim.Adam([z, *net.parameters()], .01)
            for _ in range(self.steps):
                optimizer.zero_grad()
                self.mapping_loss(xb, self.nets_.critic.features(xb), net(z)).sum().backward()
                optimizer.step()
        left = self.mapping_loss(xb, self.nets_.critic.features(xb), net(z)).detach()
        return z.detach(), net(z).detach(), left

class NewStarts(AnoGAN):
    """Draws its starts anew at every search."""
    def start(self, xb): return torch.randn(len(xb), self.n_starts, self.latent_dim)

class ByPlace(AnoGAN):
    """The starts depend on the place in the batch."""
    def start(self, xb):
        at = torch.arange(len(xb) * self.n_starts) % len(self.codes_)
        return self.codes_[at].view(len(xb), self.n_starts, -1)


@each_mutant({'score|code': [*LOSSES, Farthest, FirstDraws, MeanOfStarts, PriorInTheScore, NoPrior,
                        FirstChannel, ChosenWithPrior, NoPriorOfStarts,
                        WholePrior, MeanPrior, NoSearch, FixedGenerator, OneForAll],
              'map': [SquaredMap]})
def test_wrong_searches_are_caught(why, broken): assert_caught(check_search, broken, why)


@each_mutant({'mode|company|change|order': [TrainMode], 'change|moved|order': [MovesTheGenerator],
              'change|order': [NewStarts], 'order|company': [ByPlace], 'one image': [OneForAll]})
def test_whatever_moves_is_caught(why, broken): assert_caught(check_stillness, broken, why)


@each_mutant({'nearer': [NoSearch], 'prior': [NoPrior]})
def test_searches_that_find_nothing_are_caught(why, broken):
    assert_caught(check_search_gets_nearer, broken, why)


# ---------------------------------------------------------------- pieces
def check_minimize(minimize):
    """Each row goes to its own minimum, whatever the others do; starts stay as they are."""
    target = torch.tensor([[1., 0.], [-3., 2.], [5., 5.]])
    def loss(z, w): return (z - target[:len(z)]).square().sum(1) + (w - 1).abs().sum(1)
    start = [torch.zeros(3, 2), torch.zeros(3, 1)]
    z, w = minimize(loss, start, [.3, .1], 200)
    assert torch.allclose(z, target, atol=.05) and torch.allclose(w, torch.ones(3, 1), atol=.05), \
        'the minimum'
    assert not any(t.any() for t in start), 'starts move'
    assert not z.requires_grad, 'slopes are left'
    alone, _ = minimize(loss, [t[:1] for t in start], [.3, .1], 200)
    assert torch.equal(alone, z[:1]), 'rows feel each other'
    flat = lambda z, w: 1e-7 * loss(z, w)               # slopes as small as what Adam adds to them
    few, many = (minimize(flat, [t[:n] for t in start], [.3, .1], 20)[0][0] for n in (1, 3))
    assert torch.equal(few, many), 'rows count each other'
    slow, _ = minimize(loss, start, [.3, 0.], 1)
    assert torch.allclose(slow[:, 0].abs(), torch.full((3,), .3)), 'the rate'
    one, two = (minimize(loss, start, [.3, .1], n)[0] for n in (1, 2))
    assert torch.allclose((two - one)[1].abs(), torch.full((2,), .15), atol=.01), 'it falls'
    assert torch.equal(minimize(loss, start, [.3, .1], 0)[0], start[0]), 'no steps, no change'


def without_schedule(loss, starts, rates, steps):
    with torch.enable_grad():
        found = [t.detach().clone().requires_grad_() for t in starts]
        optimizer = torch.optim.Adam([dict(params=[t], lr=lr) for t, lr in zip(found, rates)])
        for _ in range(steps):
            for t, g in zip(found, torch.autograd.grad(loss(*found).sum(), found)): t.grad = g
            optimizer.step()
    return [t.detach() for t in found]


def in_place(loss, starts, rates, steps):
    ends = minimize(loss, starts, rates, steps)
    for t, end in zip(starts, ends): t.copy_(end)
    return ends


def together(loss, starts, rates, steps):
    """All rows along the mean of their slopes."""
    shared = lambda *found: loss(*(t * 0 + t.mean(0, keepdim=True) for t in found))
    return minimize(shared, starts, rates, steps)


def by_the_mean(loss, starts, rates, steps):
    return minimize(lambda *z: loss(*z) / len(z[0]), starts, rates, steps)


def upwards(loss, *rest): return minimize(lambda *z: -loss(*z), *rest)
def with_slopes(*args): return [t.requires_grad_() for t in minimize(*args)]


def test_rows_find_their_minimum(): check_minimize(minimize)


@each_mutant({'minimum': [upwards, together], 'falls': [without_schedule],
              'starts move': [in_place], 'count': [by_the_mean], 'slopes': [with_slopes]})
def test_wrong_descents_are_caught(why, broken): assert_caught(check_minimize, broken, why)


def test_minimize_under_no_grad_and_of_a_network_that_is_frozen():
    net = nn.Linear(2, 1).requires_grad_(False)
    with torch.no_grad():
        z, = minimize(lambda z: net(z)[:, 0].square(), [torch.ones(4, 2)], [.1], 5)
        assert not torch.is_grad_enabled()
    assert z.shape == (4, 2) and net.weight.grad is None


@pytest.mark.parametrize('arch', ('mlp', 'conv'))
def test_own_weights_are_those_of_as_many_networks(arch):
    with isolated(0):
        nets = [generator((2, 7, 6), 3, arch=arch, width=2).eval() for _ in range(3)]
        for net in nets[1:]: net.load_state_dict(nets[0].state_dict())
        for net in nets:
            with torch.no_grad():
                for p in net.parameters(): p.add_(.1 * torch.randn_like(p))
        z = torch.randn(3, 3)
    stacked = [torch.stack(several) for several in zip(*(net.parameters() for net in nets))]
    before = {k: v.clone() for k, v in nets[0].state_dict().items()}
    with torch.no_grad():
        whole = with_own_weights(nets[0], z, stacked)
        single = torch.cat([net(row[None]) for net, row in zip(nets, z)])
    assert whole.shape == (3, 2, 7, 6) and torch.allclose(whole, single, atol=1e-5)
    assert all(torch.equal(v, before[k]) for k, v in nets[0].state_dict().items())


def test_residual_is_a_sum_image_by_image():
    a = torch.tensor([[[[1., -2.]], [[0., 4.]]], [[[0., 0.]], [[1., 0.]]]])    # (2, 2, 1, 2)
    assert residual(a, torch.zeros_like(a)).tolist() == [7, 1]
    assert residual(a[:, 0, 0], torch.ones(2, 2)).tolist() == [3, 2]


# ---------------------------------------------------------------- the contract
@pytest.mark.parametrize('params, message', [
    (dict(steps=-1), 'steps must be a whole number, at least 0; got -1'),
    (dict(steps=2.), 'steps'), (dict(step_lr=0), 'step_lr'), (dict(n_starts=0), 'n_starts'),
    (dict(feature_weight=1.1), 'feature_weight'), (dict(feature_weight=-.1), 'feature_weight'),
    (dict(prior_weight=-1), 'prior_weight'), (dict(generator_lr=-1e-3), 'generator_lr'),
    (dict(n_starts=41), 'n_starts must be at most n_draws=40; got 41'),
    (dict(latent_dim=0), 'latent_dim')])
def test_wrong_settings_are_named(params, message):
    check_refused(AnoGAN, message, **SMALL | dict(epochs=0) | params)


@pytest.mark.parametrize('shape', SHAPES)
def test_any_image_fits(shape): check_any_image(AnoGAN, shape, **SMALL)


def test_no_images_no_searches():
    d = fitted(AnoGAN)
    assert d.decision_function(X[:0]).shape == (0,) and d.encode(X[:0]).shape == (0, 3)
    assert d.anomaly_map(X[:0]).shape == (0, 6, 6)


@pytest.mark.parametrize('params', (dict(), dict(generator_lr=.01, n_starts=2)))
def test_a_saved_search_finds_the_same(tmp_path, params):
    d = fitted(AnoGAN, **params)
    d.save(tmp_path/'d')
    assert np.array_equal(load(tmp_path/'d').decision_function(X), d.decision_function(X))


def test_more_starts_leave_no_more():
    d = fitted(AnoGAN, epochs=20)
    left = [copy.copy(d).set_params(n_starts=n).decision_function(X) for n in (1, 2, 5)]
    assert (left[1] <= left[0] + 1e-4).all() and (left[2] <= left[1] + 1e-4).all()
    assert left[2].sum() < left[0].sum()


def test_training_makes_a_detector():
    """Threes are normal: better trained than untrained, in every seed."""
    for seed in range(2):
        t = digits(normal=3, seed=seed)
        x, y = t.x_test[::3], t.y_test[::3]
        trained, untrained = (AnoGAN(epochs=e, seed=seed, verbose=False).fit(t.x_train).score(x, y)
                              for e in (100, 0))
        assert trained > max(.9, untrained + .2), f'{trained:.3f}, {untrained:.3f} untrained'
