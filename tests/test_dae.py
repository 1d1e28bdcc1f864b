"""The denoising autoencoders against hand values, closed forms and autograd.

Each check runs on the real class, which passes, and on mutants, which must not."""
import itertools

import numpy as np
import pytest
import torch
from scipy.stats import binom, chisquare
from sklearn.linear_model import Ridge
from torch import nn
from torch.nn import functional as F

from ad_course.ae import AE
from ad_course.dae import DAE, SDAE, Stack, add_noise, linear_denoiser, noisy_moments, zero_out
from ad_course.data import digits
from ad_course.detector import isolated
from ad_course.networks import squared_weights
from tests.mutants import assert_caught, each_mutant

X = digits(normal=3).x_train[:48]
XB = torch.tensor(X)


def fitted(cls, **params): return cls(**{'epochs': 0, 'verbose': False, **params}).fit(X)
def close(a, b, why):
    assert a.shape == b.shape and torch.allclose(a.detach(), b.detach(), rtol=1e-5,
                                                 atol=1e-7), f'{why}: {a} is not {b}'


# ---------------------------------------------------------------- corruption
def check_mask(cls):
    """Binomial with p, independent, fresh at each call, kept values untouched."""
    d, x = cls(p=.3), torch.rand(6000, 1, 4, 4, generator=torch.Generator().manual_seed(1)) + .1
    with isolated(0): a, b = d.corrupt(x), d.corrupt(x)
    zeroed = (a == 0).flatten(1)
    counts = np.bincount(zeroed.sum(1).numpy(), minlength=17)
    want = 6000 * binom.pmf(np.arange(17), 16, .3)
    some = want >= 5
    test = chisquare(counts[some], want[some] * counts[some].sum() / want[some].sum())
    assert test.pvalue > 1e-3, 'the number of zeros is not binomial'
    correlation = np.corrcoef(zeroed.T.numpy()) - np.eye(16)
    assert abs(correlation).max() < 5 / 6000**.5, 'values are not zeroed independently'
    off = abs(zeroed.float().mean(0) - .3).max()
    assert off < 5 * (.21 / 6000)**.5, 'some places are zeroed more often than others'
    assert torch.equal(a[a != 0], x[a != 0]), 'kept values were changed'
    assert not torch.equal(a, b), 'the same mask twice'


class Dropout(DAE):
    # pt-sdae: rescales
    def corrupt(self, x): return F.dropout(x, self.p)
class KeepsP(DAE):
    def corrupt(self, x): return zero_out(x, 1 - self.p)
class OneMask(DAE):
    # for the whole batch
    def corrupt(self, x): return x * (torch.rand(1, *x.shape[1:]) >= self.p)
class WholeImage(DAE):
    def corrupt(self, x): return x * (torch.rand(len(x), 1, 1, 1) >= self.p)
class Frozen(DAE):
    def corrupt(self, x): return zero_out(x, self.p, torch.Generator().manual_seed(0))
class ExactShare(DAE):
    def corrupt(self, x):
        order = torch.rand(x.shape).flatten(1).argsort(1).reshape(x.shape)
        return x * (order >= int(.3 * x[0].numel()))


@pytest.mark.parametrize('cls', (DAE, SDAE))
def test_mask(cls): check_mask(cls)


@pytest.mark.parametrize('mutant', (Dropout, KeepsP, OneMask, WholeImage, Frozen, ExactShare))
def test_wrong_masks_are_caught(mutant):
    assert_caught(check_mask, mutant)


def check_gaussian(cls):
    d, x = cls(corruption='gaussian', sigma=.2), torch.full((4000, 1, 4, 4), .5)
    with isolated(0): noise = d.corrupt(x) - x
    assert abs(noise.mean()) < 5 * .2 / noise.numel()**.5, 'not N(0, sigma^2)'
    assert abs(noise.std() - .2) < .003, 'not N(0, sigma^2)'
    assert abs((noise**4).mean() / .2**4 - 3) < .2, 'not Gaussian'


class Variance(DAE):
    def corrupt(self, x): return x + self.sigma**.5 * torch.randn_like(x)
class Uniform(DAE):
    def corrupt(self, x): return x + self.sigma * 12**.5 * (torch.rand_like(x) - .5)
class Clipped(DAE):
    def corrupt(self, x): return add_noise(x - .3, self.sigma).clip(0, 1) + .3


def test_gaussian(): check_gaussian(DAE)


@pytest.mark.parametrize('mutant', (Variance, Uniform, Clipped))
def test_wrong_noise_is_caught(mutant):
    assert_caught(check_gaussian, mutant)


def test_corruption_takes_a_generator_and_keeps_dtype_and_shape():
    x = torch.rand(3, 2, 5, 4).double()
    for f in (zero_out, add_noise):
        a, b = (f(x, .5, torch.Generator().manual_seed(3)) for _ in range(2))
        assert torch.equal(a, b) and a.dtype == x.dtype and a.shape == x.shape
        assert torch.equal(f(x, 0.), x)


# ---------------------------------------------------------------- the loss
def check_loss(cls):
    """Equation (1): clean target, corrupted input, mean over all; the decay; the clean score."""
    for params in (dict(p=.4), dict(corruption='gaussian', sigma=.3)):
        d = fitted(cls, weight_decay=.1, **params)
        with isolated(5): q = zero_out(XB, .4) if d.corruption == 'zero' else add_noise(XB, .3)
        with isolated(5): terms = d.loss(XB)
        assert set(terms) == {'reconstruction', 'decay'}, 'the terms of the loss'
        rebuilt = d.nets_.decoder(d.nets_.encoder(q))
        close(terms['reconstruction'], ((XB - rebuilt)**2).sum() / XB.numel(), 'equation (1)')
        close(terms['decay'], .1 * squared_weights(d.nets_), 'the decay')
        whole, parts = torch.autograd.grad(sum(terms.values()),
                                           [*d.nets_.parameters()]), [*d.nets_.parameters()]
        want = torch.autograd.grad(((XB - rebuilt)**2).mean() + .1 * sum((w**2).sum() for w in parts
                                                                         if w.ndim > 1), parts)
        for a, b in zip(whole, want): close(a, b, 'the gradient')
        score = ((XB - d.nets_.decoder(d.nets_.encoder(XB)))**2).flatten(1).mean(1)
        with isolated(1): close(d.image_score(XB), score, 'the score of the clean image')
        close(d.pixel_score(XB), ((XB - d.nets_.decoder(d.nets_.encoder(XB)))**2).sum(1),
              'the map of the clean image')


# the official ALOCC code
class CorruptedTarget(DAE):
    def loss(self, xb):
        q = self.corrupt(xb)
        return {**super().loss(xb), 'reconstruction': (q - self.reconstruction(q)).square().mean()}
class CleanInput(DAE):
    def loss(self, xb): return {**super().loss(xb), 'reconstruction': self.errors(xb).mean()}
class CorruptedCode(DAE):   # pt-sdae
    def loss(self, xb):
        rebuilt = self.nets_.decoder(self.corrupt(self.code(xb)))
        return {**super().loss(xb), 'reconstruction': (xb - rebuilt).square().mean()}


def scaled(name, factor):
    """A DAE with one term of its loss times a factor."""
    class Scaled(DAE):
        def loss(self, xb):
            terms = super().loss(xb)
            return terms | {name: terms[name] * factor}
    Scaled.__name__ = f'{name}_times_{factor}'
    return Scaled


class Summed(DAE):
    def loss(self, xb):
        terms = super().loss(xb)
        return terms | dict(reconstruction=terms['reconstruction'] * xb[0].numel())
class Absolute(DAE):
    def loss(self, xb):
        return {'reconstruction': (xb - self.reconstruction(self.corrupt(xb))).abs().mean(),
                'decay': self.weight_decay * squared_weights(self.nets_)}
class Detached(DAE):
    def loss(self, xb):
        nothing = 0 * sum(p.sum() for p in self.nets_.parameters())
        return {name: term.detach() + nothing for name, term in super().loss(xb).items()}
class NoDecay(DAE):
    def loss(self, xb): return {'reconstruction': super().loss(xb)['reconstruction']}
class NoisyScore(DAE):
    def image_score(self, xb): return super().image_score(self.corrupt(xb))
class NoisyReconstruction(DAE):
    def errors(self, xb): return (xb - self.reconstruction(self.corrupt(xb))).square()
class NoisyMap(DAE):
    def pixel_score(self, xb): return super().pixel_score(self.corrupt(xb))
class NegativeScore(DAE):
    def image_score(self, xb): return -super().image_score(xb)


def test_loss(): check_loss(DAE)


VALUES = (CorruptedTarget, CleanInput, CorruptedCode, Summed, Absolute,
          scaled('reconstruction', 0), scaled('reconstruction', -1))
LOSSES = {'equation \\(1\\)': VALUES, 'the gradient': (Detached,), 'the terms': (NoDecay,),
          'the decay': (scaled('decay', 0), scaled('decay', -1)),
          'the score': (NoisyScore, NoisyReconstruction, NegativeScore), 'the map': (NoisyMap,)}


@each_mutant(LOSSES)
def test_wrong_losses_are_caught(why, broken):
    assert_caught(check_loss, broken, why)


def test_defaults_come_from_the_extended_method():
    assert DAE().epochs == AE().epochs and SDAE().epochs == Stack().epochs
    assert all(getattr(DAE(), name) == getattr(SDAE(), name) for name in ('corruption', 'p',
                                                                          'sigma'))


# ---------------------------------------------------------------- the closed form
ROWS = torch.rand(40, 4, generator=torch.Generator().manual_seed(2)).double()


def masked_loss(W, p):
    """The expected loss over all sixteen masks."""
    masks = torch.tensor(list(itertools.product((0., 1.), repeat=4))).double()
    chance = (1 - p)**masks.sum(1) * p**(4 - masks.sum(1))
    return sum(c * (ROWS - (ROWS * m) @ W.T).square().sum(1).mean() for c, m in zip(chance, masks))


@pytest.mark.parametrize('p', (0., .2, .7))
def test_linear_denoiser_is_the_minimum(p):
    W = linear_denoiser(ROWS, 'zero', p).requires_grad_()
    gradient, = torch.autograd.grad(masked_loss(W, p), W)
    torch.testing.assert_close(gradient, torch.zeros(4, 4).double(), atol=1e-10, rtol=0)
    for seed in range(3):
        step = .01 * torch.randn(4, 4, generator=torch.Generator().manual_seed(seed)).double()
        assert masked_loss(W + step, p) > masked_loss(W, p)


def test_moments_by_enumeration():
    xq, qq = noisy_moments(ROWS, 'zero', .3)
    want_xq, want_qq = torch.zeros(4, 4).double(), torch.zeros(4, 4).double()
    for m in itertools.product((0., 1.), repeat=4):
        chance, q = .7**sum(m) * .3**(4 - sum(m)), ROWS * torch.tensor(m).double()
        want_xq += chance * ROWS.T @ q / 40
        want_qq += chance * q.T @ q / 40
    torch.testing.assert_close(xq, want_xq)
    torch.testing.assert_close(qq, want_qq)


def test_gaussian_denoiser_is_ridge_regression():
    ridge = Ridge(alpha=.5**2 * len(ROWS), fit_intercept=False).fit(ROWS, ROWS)
    np.testing.assert_allclose(linear_denoiser(ROWS, 'gaussian', .5), ridge.coef_, atol=1e-10)


def test_linear_denoiser_by_hand():
    torch.testing.assert_close(linear_denoiser(torch.ones(1, 2).double(), 'zero', .5),
                               torch.full((2, 2), 2 / 3).double())


def test_pixels_that_are_always_black_stay_black():
    W = linear_denoiser(torch.tensor([[1., 0.], [.5, 0.]]).double(), 'zero', .3)
    torch.testing.assert_close(W, torch.tensor([[1., 0.], [0., 0.]]).double())


class Matrix(DAE):
    def networks(self, shape):
        return dict(encoder=nn.Flatten(), decoder=nn.Sequential(nn.Linear(4, 4, bias=False),
                                                                nn.Unflatten(1, shape)))


def check_arrives(cls):
    """Trained on four pixels, the linear DAE arrives at the closed form, from above."""
    images = ROWS.reshape(-1, 1, 2, 2).float().numpy()
    W = cls(p=.5, epochs=400, batch_size=20, lr=5e-3,
            verbose=False).fit(images).nets_.decoder[0].weight.detach().double()
    best, ours = masked_loss(linear_denoiser(ROWS, 'zero', .5), .5), masked_loss(W, .5)
    assert best <= ours < 1.05 * best, f'{ours:.4f} where the best is {best:.4f}'


def test_training_arrives_at_the_closed_form(): check_arrives(Matrix)


@pytest.mark.parametrize('fault', (CorruptedTarget, CleanInput, Dropout), ids=lambda m: m.__name__)
def test_faulty_training_does_not_arrive(fault):
    assert_caught(check_arrives, type('M', (Matrix, fault), {}))


# ---------------------------------------------------------------- the stack
STACK = dict(widths=(12, 9, 5), p=.4)


def moved_by_phase(cls):
    """What each phase of the training moves: a list of sets of layers."""
    moved = []
    class Watched(cls):
        def run(self, data, epochs, *args, **kwargs):
            before = {k: v.clone() for k, v in self.nets_.state_dict().items()}
            super().run(data, epochs, *args, **kwargs)
            now = self.nets_.state_dict()
            moved.append({k[:9] for k, v in now.items() if not torch.equal(v, before[k])})
    Watched(epochs=12, pretrain=.5, verbose=False, **STACK).fit(X)
    return moved


def check_layers(cls):
    """Equation (5) for each layer: value, frozen layers, corruption of its input alone."""
    for i, (below, act) in enumerate(((0, True), (1, True), (2, False)), 1):
        d = fitted(cls, **STACK)
        seen, plain = [], d.corrupt
        d.corrupt = lambda x: (seen.append(x), plain(x))[1]
        h = XB.flatten(1)
        for j in range(1, i):
            h = torch.relu(F.linear(h, d.nets_.encoder[j][0].weight, d.nets_.encoder[j][0].bias))
        with isolated(5): terms = d.layer_loss(XB, i)
        assert len(seen) == 1, f'layer {i}: corrupted {len(seen)} times'
        close(seen[0], h, f'the input of layer {i} before its corruption')
        with isolated(5): q = zero_out(h, .4)
        up, down = d.nets_.encoder[i][0], d.nets_.decoder[3 - i][0]
        code = F.linear(q, up.weight, up.bias)
        back = F.linear(torch.relu(code) if act else code, down.weight, down.bias)
        close(sum(terms.values()),
              ((h - (torch.sigmoid(back) if i == 1 else torch.relu(back)))**2).sum() / h.numel(),
              f'equation (5), layer {i}')
        moved = moved_by_phase(cls)
        want = {f'encoder.{i}', f'decoder.{3 - i}'}
        assert moved[i - 1] == want, f'training layer {i} moved {moved[i - 1]}'


def check_order(cls):
    """Layers from below, each with its share of the epochs, then the whole, clean."""
    calls = []
    class Watched(cls):
        def layer_loss(self, xb, i): calls.append(i); return super().layer_loss(xb, i)
        def loss(self, xb): calls.append('whole'); return super().loss(xb)
    d = Watched(epochs=7, batch_size=100, verbose=False, pretrain=.5, **STACK).fit(X)
    assert calls == [1, 2, 3] + ['whole'] * 4, f'the order was {calls}'
    assert [(k, len(v)) for k, v in d.history_.items()] == [('layer 1/reconstruction', 1),
                                                            ('seconds', 7),
                                                            ('layer 2/reconstruction', 1),
                                                            ('layer 3/reconstruction', 1),
                                                            ('whole/reconstruction', 4)]
    d = fitted(cls, **STACK)
    with isolated(1): loss = d.loss(XB)['reconstruction']
    close(loss, d.errors(XB).mean(), 'fine-tuning is on the clean image')
    assert len(moved_by_phase(cls)[-1]) == 6, 'fine-tuning must move all layers'


def check_stack(cls): check_mask(cls); check_layers(cls); check_order(cls)


class NotFrozen(SDAE):
    def optimizers(self):
        """Every layer's player holds all layers."""
        return {name: self.adam(*self.nets_) for name in super().optimizers()}
    def layer_loss(self, xb, i):
        below, up, down = self.layer(i)
        h = below(xb)
        return dict(reconstruction=(h.detach() - down(up(self.corrupt(h)))).square().mean())
class CorruptsAllFloors(SDAE):
    def layer_loss(self, xb, i):
        h, (_, up, down) = xb, self.layer(i)
        for j in range(i): h = self.nets_.encoder[j](self.corrupt(h) if j else h)
        return dict(reconstruction=(h - down(up(self.corrupt(h)))).square().mean())
class CorruptsTheImage(SDAE):
    def layer_loss(self, xb, i):
        below, up, down = self.layer(i)
        h = below(xb)
        return dict(reconstruction=(h - down(up(below(self.corrupt(xb))))).square().mean())
# pt-sdae
class CorruptsTheCode(SDAE):
    def layer_loss(self, xb, i):
        below, up, down = self.layer(i)
        h = below(xb).detach()
        return dict(reconstruction=(h - down(self.corrupt(up(h)))).square().mean())
class NoisyTarget(SDAE):
    def layer_loss(self, xb, i):
        below, up, down = self.layer(i)
        q = self.corrupt(below(xb).detach())
        return dict(reconstruction=(q - down(up(q))).square().mean())
# pt-sdae
class LastLayerClean(SDAE):
    def layer_loss(self, xb, i):
        below, up, down = self.layer(i)
        h = below(xb).detach()
        q = h if i == len(self.widths) else self.corrupt(h)
        return dict(reconstruction=(h - down(up(q))).square().mean())
class NoLayerLoss(SDAE):
    def layer_loss(self, xb, i): return {k: 0 * v for k, v in super().layer_loss(xb, i).items()}
class LayersUphill(SDAE):
    def layer_loss(self, xb, i): return {k: -v for k, v in super().layer_loss(xb, i).items()}
class WrongDecoder(SDAE):
    def layer(self, i): return self.nets_.encoder[:i], self.nets_.encoder[i], self.nets_.decoder[-2]
class InOrder(SDAE):
    order = (1, 2, 3)
    def train(self, data):
        """Layers in an order of our own, then the whole for what is left of seven epochs."""
        for i in self.order:
            turn = f'layer {i}', lambda xb: self.layer_loss(xb, i)
            self.run(data, 1, turns=[turn], label=f'layer {i}/')
        self.run(data, 7 - len(self.order), label='whole/')
class FromAbove(InOrder):
    order = (3, 2, 1)
class NoFineTuning(InOrder):
    order = (1, 1, 2, 2, 3, 3, 3)
class CorruptedFineTuning(SDAE):
    def loss(self, xb):
        return dict(reconstruction=(xb - self.reconstruction(self.corrupt(xb))).square().mean())
class NoWholeLoss(SDAE):
    def loss(self, xb): return {k: 0 * v for k, v in super().loss(xb).items()}
class WholeUphill(SDAE):
    def loss(self, xb): return {k: -v for k, v in super().loss(xb).items()}
class FrozenWhole(SDAE):
    def optimizers(self):
        """The whole moves the decoder alone."""
        return super().optimizers() | dict(all=self.adam('decoder'))


class OtherCorruption(SDAE):
    """Another kind and rate than asked."""
    def corrupt(self, x): return add_noise(x, .1)


class IgnoresRate(SDAE):
    """The layers do not listen to lr."""
    def optimizers(self):
        """One Adam each, of its own rate."""
        layers = [(f'layer {i}', self.layer(i)[1:]) for i in (1, 2, 3)]
        own = {name: self.adam(*nets, lr=1e-3) for name, nets in layers}
        return super().optimizers() | own


@pytest.mark.parametrize('params', (dict(), dict(corruption='gaussian', sigma=.4), dict(p=.1)),
                         ids=str)
def test_the_layers_get_the_corruption_that_was_asked_for(params):
    d, h = SDAE(**params), torch.full((500, 9), .5)
    with isolated(3): q = d.corrupt(h)
    with isolated(3): want = DAE(**params).corrupt(h)
    assert torch.equal(q, want)
    with isolated(3): assert not torch.equal(OtherCorruption(**params).corrupt(h), want)


def rate_matters(cls):
    """Whether the first layer learns otherwise at another rate."""
    first = lambda lr: cls(epochs=3, pretrain=1., lr=lr, verbose=False, **STACK).fit(X)
    a, b = (first(lr).nets_.encoder[1][0].weight for lr in (1e-3, 1e-2))
    return not torch.equal(a, b)


def test_the_layers_listen_to_the_rate():
    assert rate_matters(SDAE) and not rate_matters(IgnoresRate)


def test_stack(): check_stack(SDAE)


class RescaledFloors(SDAE):
    # pt-sdae
    def corrupt(self, x): return F.dropout(x, self.p)


STACKS = {'moved': (NotFrozen,), 'corrupted 2 times': (CorruptsAllFloors,),
          'before its corruption': (CorruptsTheImage, CorruptsTheCode),
          'corrupted 0 times': (LastLayerClean,), 'kept values': (RescaledFloors,),
          'equation \\(5\\)': (NoisyTarget, NoLayerLoss, LayersUphill),
          'order|moved': (FromAbove, NoFineTuning), 'must move all': (FrozenWhole,),
          'on the clean image': (CorruptedFineTuning, NoWholeLoss, WholeUphill)}


@each_mutant(STACKS)
def test_wrong_stacks_are_caught(why, broken):
    assert_caught(check_stack, broken, why)


def test_layers_with_the_wrong_decoder_do_not_fit():
    with pytest.raises(RuntimeError, match='multiplied'): check_layers(WrongDecoder)


def test_without_pretraining_it_is_the_stack():
    a, b = (cls(epochs=3, widths=(12, 5), verbose=False, **extra).fit(X) for cls,
            extra in ((SDAE, dict(pretrain=0)), (Stack, {})))
    assert all(torch.equal(p, q) for p, q in zip(a.nets_.parameters(), b.nets_.parameters()))


@pytest.mark.parametrize('shape', ((1, 8, 8), (3, 5, 7), (1, 28, 28)))
def test_any_image_shape(shape):
    x = np.random.default_rng(0).random((12, *shape), dtype='float32')
    for d in (DAE(epochs=1), SDAE(epochs=6, widths=(6, 3)),
              SDAE(epochs=2, widths=[4], activation='sigmoid'),
              DAE(epochs=1, corruption='gaussian')):
        d.set_params(verbose=False).fit(x)
        assert d.reconstruct(x).shape == x.shape and d.anomaly_map(x).shape == (12, *shape[1:])


@pytest.mark.parametrize('wrong', (dict(p=1), dict(p=-.1), dict(p='a'), dict(sigma=-1),
                                   dict(sigma=float('nan')), dict(corruption='salt')))
@pytest.mark.parametrize('cls', (DAE, SDAE))
def test_wrong_corruption_is_refused(cls, wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))): cls(**wrong).fit(X)


@pytest.mark.parametrize('wrong', (dict(widths=()), dict(widths=(4, 0)), dict(widths=8),
                                   dict(widths=(2.5,)), dict(activation='step'), dict(pretrain=1.1),
                                   dict(pretrain=-1)))
def test_wrong_stack_is_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))): SDAE(**wrong).fit(X)
