"""CAVGA: Grad-CAM by hand, its losses, who moves whom, maps, labels; mutants of each."""
import numpy as np
import pytest
import torch
from torch.nn import functional as F

from ad_course.cavga import (CAVGA, WeakCAVGA, attention, expansion, grad_cam, guidance,
                             place_decoder, place_encoder, stretch)
from ad_course.detector import isolated, load
from ad_course.surfaces import surfaces
from ad_course.vae import VAE

from .labelled import check_labels_needed
from .mutants import assert_caught, each_mutant
from .players import altered, check_explosion, check_refused, moved, ready, without

X = np.random.default_rng(0).random((24, 1, 8, 8), dtype='float32')
XB = torch.tensor(X)
Y = np.repeat([0, 1], [16, 8])
YB = torch.tensor(Y)
SMALL = dict(width=2, code_dim=3, batch_size=8, verbose=False)
MAPS = torch.randn(5, 3, 4, 2, generator=torch.Generator().manual_seed(1))
W = torch.tensor([3., -1., .5])


# ---------------------------------------------------------------- Grad-CAM
def check_cam(cam):
    """Hand values: a linear score, a score with unlike slopes, and two images at once."""
    readout = lambda f: torch.einsum('k,bkij->b', W, f) / 8
    wanted = torch.einsum('k,bkij->bij', W, MAPS)
    assert torch.allclose(cam(MAPS, readout), wanted, atol=1e-5), 'linear'
    squares = cam(MAPS, lambda f: f[:, 1].square().sum((1, 2)))
    slopes = 2 * MAPS[:, 1].sum((1, 2), keepdim=True)
    assert torch.allclose(squares, slopes * MAPS[:, 1], atol=1e-4), 'squares'
    alone = cam(MAPS[2:3], lambda f: f[:, 1].square().sum((1, 2)))
    assert torch.allclose(alone, squares[2:3], atol=1e-5), 'company'


def check_slope(cam):
    """The map moves the features, and the weights that Grad-CAM finds as slopes."""
    w, f = W.clone().requires_grad_(), MAPS.clone().requires_grad_()
    a = cam(f, lambda f: torch.einsum('k,bkij->b', w, f) / 8)
    found = torch.autograd.grad(a.sum(), (w, f), allow_unused=True)
    assert found[0] is not None, 'weights'
    assert torch.allclose(found[0], MAPS.sum((0, 2, 3)), atol=1e-4), 'weights'
    assert torch.allclose(found[1], W.view(1, 3, 1, 1).expand_as(f), atol=1e-5), 'features'


def test_grad_cam(): check_cam(grad_cam), check_slope(grad_cam)


def slopes_of(f, score, graph=True):
    f = f if f.requires_grad else f.detach().requires_grad_()
    return torch.autograd.grad(score(f).sum(), f, create_graph=graph)[0], f

def averaged(f, score):
    """alpha divided by the number of places."""
    return grad_cam(f, score) / f[0, 0].numel()

def place_by_place(f, score):
    """Slope times feature, without the sum over places."""
    slope, f = slopes_of(f, score)
    return 8 * (slope * f).sum(1)

def rectified(f, score):
    """Already after ReLU."""
    return grad_cam(f, score).relu()

def shared(f, score):
    """One alpha for all images."""
    slope, f = slopes_of(f, score)
    return (slope.sum((0, 2, 3), keepdim=True) * f).sum(1)

def frozen_weights(f, score):
    """alpha is a constant."""
    slope, f = slopes_of(f, score)
    return (slope.detach().sum((2, 3), keepdim=True) * f).sum(1)

def frozen_features(f, score):
    """The features are constants."""
    slope, f = slopes_of(f, score)
    return (slope.sum((2, 3), keepdim=True) * f.detach()).sum(1) + 0 * f.sum()


@each_mutant({'linear': (averaged, rectified, shared), 'squares': (place_by_place,)})
def test_wrong_maps_are_caught(why, broken): assert_caught(check_cam, broken, why)


@each_mutant({'weights': (frozen_weights,), 'features': (frozen_features,)})
def test_wrong_slopes_are_caught(why, broken): assert_caught(check_slope, broken, why)


def test_without_gradients_the_map_is_the_same_constant():
    score = lambda f: f[:, 1].square().sum((1, 2))
    with torch.no_grad(): a = grad_cam(MAPS, score)
    assert not a.requires_grad and torch.allclose(a, grad_cam(MAPS, score))


def test_three_ways_into_zero_to_one():
    cam = torch.tensor([[[-2., 0.], [1., 3.]], [[2., 2.], [2., 2.]]])
    assert torch.allclose(stretch(cam)[0], torch.tensor([[0., 0.], [1 / 3, 1.]]))
    assert (stretch(cam)[1] == 0).all()
    assert torch.allclose(attention(cam, relu=False), torch.sigmoid(cam))
    assert attention(cam).min() == .5
    assert torch.allclose(attention(cam)[0, 1], torch.sigmoid(cam[0, 1]))
    assert torch.allclose(expansion(attention(cam)), (1 - attention(cam)).mean((1, 2)))


def check_guidance(loss):
    """Only normal images that are predicted to be so; both maps, with their signs."""
    n, a = torch.rand(4, 2, 3), torch.rand(4, 2, 3)
    found = loss(n, a, torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1]))
    assert found.shape == (4,) and (found[1:] == 0).all(), 'who'
    assert torch.isclose(found[0], 1 - n[0].mean() + a[0].mean()), 'value'


def test_guidance(): check_guidance(guidance)

def everyone(n, a, y, p):
    """Each image counts."""
    return guidance(n, a, 0 * y, 0 * p)
def wrong_too(n, a, y, p):
    """Normal images that are taken for anomalies count."""
    return guidance(n, a, y, 0 * p)
def anomalies_too(n, a, y, p):
    """Anomalies that are taken for normal count."""
    return guidance(n, a, 0 * y, p)
def exchanged(n, a, y, p):
    """The classes' maps are exchanged."""
    return guidance(a, n, y, p)
def half(n, a, y, p):
    """The map of the anomaly is left out."""
    return guidance(n, 0 * a, y, p)

@each_mutant({'who': (everyone, wrong_too, anomalies_too), 'value': (exchanged, half)})
def test_wrong_guidance_is_caught(why, broken): assert_caught(check_guidance, broken, why)


# ---------------------------------------------------------------- the game
def raw(cls, **params):
    """An untrained detector, ready for single steps."""
    d = cls(**SMALL | dict(epochs=0) | params)
    return ready(d.fit(X, Y) if d.uses_labels else d.fit(X))


def check_values(cls):
    """All terms of the autoencoder against formulas, each with its weight."""
    weights = dict(reconstruction_weight=.7, beta=.3, adversarial_weight=.2, attention_weight=.4)
    d = raw(cls, **weights)
    nets = d.nets_.eval()
    with isolated(3): found = d.autoencoder_loss(XB)
    with torch.no_grad():
        f = nets.features(XB)
        mu, logvar = nets.latent(f).chunk(2, dim=1)
        with isolated(3): z = mu + (logvar / 2).exp() * torch.randn_like(mu)
        fake = nets.decoder(z)
        w = nets.latent.weight[:3, :, 0, 0].sum(0)
        a = torch.einsum('k,bkij->bij', w, f).relu()
        wanted = dict(reconstruction=.7 * (XB - fake).square().mean((1, 2, 3)),
                      kl=.3 * ((mu**2 + logvar.exp() - 1 - logvar) / 2).sum((1, 2, 3)) / 64,
                      fooling=-.2 * F.logsigmoid(nets.critic(fake)),
                      attention=.4 * (1 - torch.sigmoid(a)).mean((1, 2)))
    assert found.keys() == wanted.keys(), 'names'
    for name, value in wanted.items():
        assert torch.allclose(found[name], value, rtol=1e-4, atol=1e-6), f'value of {name}'


def check_players(cls):
    """Each turn moves its own networks; attention alone moves features and latent weights."""
    d = raw(cls)
    rest = {'features', 'latent', 'decoder'}
    assert moved(d, 'critic', d.critic_loss, XB) == {'critic'}, 'step of the critic'
    assert moved(d, 'autoencoder', d.autoencoder_loss, XB) == rest, 'step of the autoencoder'
    only = lambda xb: {k: v for k, v in d.autoencoder_loss(xb).items() if k == 'attention'}
    d = raw(cls, lr=1e-2)
    missing = lambda: float(expansion(d.attention_of(d.nets_.eval().features(XB))).mean().detach())
    before = missing()
    d.nets_.train()
    assert moved(d, 'autoencoder', only, XB, 15) == {'features', 'latent'}, 'whom attention moves'
    assert missing() < before, 'attention does not grow'


def check_map(cls):
    """1 - A, drawn large: a hole lights up; alone as in a batch."""
    d = raw(cls)
    f = d.nets_.eval().features(XB)
    w = d.nets_.latent.weight[:3, :, 0, 0].sum(0)
    a = (1 - torch.sigmoid(torch.einsum('k,bkij->bij', w, f).relu())).detach()
    wanted = F.interpolate(a[:, None], (8, 8), mode='bilinear')[:, 0].numpy()
    assert np.allclose(d.anomaly_map(X), wanted, atol=1e-5), 'the map'
    alone = np.concatenate([d.anomaly_map(X[i:i + 1]) for i in range(3)])
    assert np.allclose(alone, d.anomaly_map(X)[:3], atol=1e-6), 'company'


CHECKS = check_values, check_players, check_map

@pytest.mark.parametrize('check', CHECKS)
def test_the_chapter_keeps(check): check(CAVGA)


LOST = {f'value of {k}': (altered(CAVGA, 'autoencoder_loss', without(k), f'No{k}'),)
        for k in ('reconstruction', 'kl', 'fooling', 'attention')}

class Mean(CAVGA):
    """Rebuilt from the mean code."""
    def rebuilt(self, mu, logvar): torch.randn_like(mu); return self.nets_.decoder(mu)

class WholePosterior(CAVGA):
    """Attention of the log variances as well."""
    def latent_score(self, f): return self.nets_.latent(f).sum(1).mean((1, 2))

class ByBatch(CAVGA):
    """Attention is divided by the largest of the batch."""
    def attention_of(self, f):
        cam = grad_cam(f, self.latent_score).relu()
        return cam / cam.max()

class Inverted(CAVGA):
    """Attention itself is the map."""
    def pixel_score(self, xb): return 1 - CAVGA.pixel_score(self, xb)

class CriticMovesAll(CAVGA):
    """The critic's Adam holds everything, and its images are not constants."""
    def optimizers(self):
        """All networks."""
        return super().optimizers() | dict(critic=self.adam(*self.nets_))
    def critic_loss(self, xb):
        fake = self.rebuilt(*self.posterior(self.nets_.features(xb)))
        return dict(real=-self.nets_.critic(xb), fake=self.nets_.critic(fake))

class AutoencoderMovesAll(CAVGA):
    """The autoencoder's Adam holds the critic."""
    def optimizers(self):
        """All networks."""
        return super().optimizers() | dict(autoencoder=self.adam(*self.nets_))

SHRINKING = altered(CAVGA, 'autoencoder_loss',
                    lambda t: t | dict(attention=-t['attention']), 'Shrinking')


@each_mutant(LOST | {'value of (reconstruction|fooling)': (Mean,),
                     'value of attention': (*LOST['value of attention'], WholePosterior, ByBatch)})
def test_wrong_losses_are_caught(why, broken): assert_caught(check_values, broken, why)


@each_mutant({'step of the critic': (CriticMovesAll,),
              'step of the autoencoder': (AutoencoderMovesAll,),
              'attention does not grow': (SHRINKING,)})
def test_wrong_games_are_caught(why, broken): assert_caught(check_players, broken, why)


@each_mutant({'the map': (Inverted, ByBatch, WholePosterior)})
def test_wrong_attention_is_caught(why, broken): assert_caught(check_map, broken, why)


# ---------------------------------------------------------------- labels
def check_weak(cls):
    """Cross-entropy and guidance against formulas; score and map of the anomaly."""
    d = raw(cls, class_weight=.6, guided_weight=.3)
    nets = d.nets_.eval()
    with isolated(3): found = d.autoencoder_loss(XB, YB)
    with torch.no_grad():
        f = nets.features(XB)
        u = nets.head(nets.latent(f)[:, :3]).mean((2, 3))
        V = nets.head.weight[:, :, 0, 0] @ nets.latent.weight[:3, :, 0, 0]
        cams = torch.einsum('ck,bkij->cbij', V, f)
        on = ((YB == 0) & (u.argmax(1) == 0)).float()
        A = torch.sigmoid(cams.relu())
        guided = .3 * on * (1 - A[0] + A[1]).mean((1, 2))
    assert torch.allclose(found['class'], .6 * F.cross_entropy(u, YB, reduction='none')), 'class'
    assert torch.allclose(found['guided'], guided, atol=1e-5), 'guided'
    assert np.allclose(d.decision_function(X), u[:, 1] - u[:, 0], atol=1e-5), 'score'
    big = F.interpolate(cams[1][:, None], (8, 8), mode='bilinear')[:, 0]
    assert np.allclose(d.anomaly_map(X), big, atol=1e-5), 'map'


class OtherClass(WeakCAVGA):
    """The map of the class "normal"."""
    def class_cam(self, f, c): return super().class_cam(f, 1 - c)

class Normal(WeakCAVGA):
    """The probability of being normal."""
    def image_score(self, xb): return -super().image_score(xb)

class Unguided(WeakCAVGA):
    """Guidance is recorded, and zero."""
    def autoencoder_loss(self, xb, yb): return without('guided')(super().autoencoder_loss(xb, yb))

class Unlabelled(WeakCAVGA):
    """All are taken for normal."""
    def autoencoder_loss(self, xb, yb): return super().autoencoder_loss(xb, 0 * yb)


def test_the_weak_form(): check_weak(WeakCAVGA)

@each_mutant({'score': (Normal,), 'guided': (Unguided, OtherClass), 'class': (Unlabelled,)})
def test_wrong_weak_forms_are_caught(why, broken): assert_caught(check_weak, broken, why)


def test_the_weak_form_moves_its_head_and_learns_from_labels_alone():
    d = raw(WeakCAVGA)
    with isolated(0): d.descend('autoencoder', d.autoencoder_loss, XB, YB)
    y = np.repeat([0, 1], 12)
    x = X.copy()
    x[12:, :, 2:5, 2:5] = 1.
    right = WeakCAVGA(**SMALL, epochs=15, lr=1e-2).fit(x, y).decision_function(x)
    assert right[12:].mean() > right[:12].mean() + 1


# ---------------------------------------------------------------- pieces
@pytest.mark.parametrize('shape', [(1, 1), (2, 9), (28, 28), (33, 32)])
def test_any_image_fits(shape):
    x = np.random.default_rng(0).random((5, 3, *shape), dtype='float32')
    for levels in (1, 3):
        f = place_encoder((3, *shape), 2, levels)(torch.tensor(x))
        assert f.shape[2:] == tuple(-(-s // 2**levels) for s in shape)
        assert place_decoder((3, *shape), f.shape[1], 2, levels)(f).shape == x.shape
    d = CAVGA(**SMALL, epochs=1).fit(x)
    assert d.reconstruct(x).shape == x.shape and d.anomaly_map(x).shape == (5, *shape)
    assert d.encode(x).shape == (5, 3 * np.prod([-(-s // 4) for s in shape]))


def test_turns_and_records():
    turns = [(player, loss.__name__) for player, loss in CAVGA(**SMALL).turns()]
    assert turns == [('critic', 'critic_loss'), ('autoencoder', 'autoencoder_loss')]
    plain = CAVGA(**SMALL, epochs=1, attention_weight=0., adversarial_weight=0.).fit(X)
    assert {k for k in plain.history_ if 'auto' in k} == {'autoencoder/reconstruction',
                                                          'autoencoder/kl'}
    assert not issubclass(CAVGA, VAE)


def test_scoring_leaves_the_networks_alone():
    d = CAVGA(**SMALL, epochs=1).fit(X)
    before = {k: v.clone() for k, v in d.nets_.state_dict().items()}
    d.anomaly_map(X), d.decision_function(X)
    assert all(torch.equal(v, before[k]) for k, v in d.nets_.state_dict().items())
    assert all(p.grad is None or not p.grad.isnan().any() for p in d.nets_.parameters())


@pytest.mark.parametrize('params, message', [
    (dict(beta=-1.), 'beta must be a number, at least 0'), (dict(levels=0), 'levels'),
    (dict(attention_weight=-1.), 'attention_weight'), (dict(relu=1), 'relu must be one of True'),
    (dict(critic_lr=0.), 'critic_lr must be a number above 0')])
def test_wrong_settings_are_named(params, message):
    check_refused(CAVGA, message, **SMALL | params)


def test_labels_are_needed(): check_labels_needed(WeakCAVGA, X, **SMALL)


def test_an_exploding_game_names_player_and_rates():
    check_explosion(CAVGA, 'critic_lr=1e\\+30', width=2, code_dim=3, verbose=False, critic_lr=1e30)


def test_saved_it_draws_the_same_map(tmp_path):
    d = CAVGA(**SMALL, epochs=2).fit(X)
    d.save(tmp_path/'d')
    assert np.array_equal(load(tmp_path/'d').anomaly_map(X), d.anomaly_map(X))


def test_attention_fills_normal_images():
    t = surfaces(30, 16, texture='weave', seed=5)
    d = CAVGA(verbose=False, width=4, epochs=12, batch_size=16, lr=3e-3).fit(t.x_train)
    missing = d.history_['autoencoder/attention']
    assert missing[-1] < missing[0] / 3
    assert d.anomaly_map(t.x_test[t.y_test == 0]).mean() < .25
