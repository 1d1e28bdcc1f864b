"""An encoder for a generator that stands still: losses, phase, score; and mutants of each."""
import numpy as np
import pytest
import torch
from sklearn.exceptions import NotFittedError
from torch import nn

from ad_course.detector import isolated, load, total_loss
from ad_course.fanogan import FAnoGAN, residual
from ad_course.networks import encoder
from ad_course.wgan import WGANGP

from .mutants import assert_caught, changed, each_mutant
from .players import SHAPES, check_any_image, check_explosion, check_refused, moved, ready

X = np.random.default_rng(0).random((40, 1, 4, 4), dtype='float32')
X8 = np.random.default_rng(1).random((24, 1, 8, 8), dtype='float32')
XB = torch.tensor(X)
SMALL = dict(latent_dim=3, width=2, verbose=False)
LOSSES = 'ziz', 'izi', 'izi_f'


def raw(cls=FAnoGAN, **params):
    """An untrained detector, ready for single steps."""
    return ready(cls(**SMALL | dict(epochs=0) | params).fit(X))


class Double(nn.Module):
    """An encoder: twice the first two pixels, times a weight. (b, 1, 1, 3) -> (b, 2)."""
    def __init__(self): super().__init__(); self.w = nn.Parameter(torch.ones(()))
    def forward(self, x): return 2 * self.w * x.flatten(1)[:, :2]


class Shows(nn.Module):
    """A generator: z1, z1 z2, 1, with a weight. (b, 2) -> (b, 1, 1, 3)."""
    def __init__(self): super().__init__(); self.w = nn.Parameter(torch.ones(()))
    def forward(self, z):
        pixels = torch.stack([z[:, 0], z[:, 0] * z[:, 1], z[:, 0] * 0 + 1], 1)
        return self.w * pixels.view(-1, 1, 1, 3)


class Sees(nn.Module):
    """A critic that sees the first pixel squared and three times the last, and answers 0."""
    def __init__(self): super().__init__(); self.w = nn.Parameter(torch.ones(()))
    def features(self, x): return self.w * torch.stack([x[:, 0, 0, 0]**2, 3 * x[:, 0, 0, 2]], 1)
    def forward(self, x): return self.features(x)[:, 0] * 0


def shown(cls=FAnoGAN, **params):
    """The class with the three networks above, on images of three pixels."""
    nets = dict(networks=lambda self, shape: dict(generator=Shows(), critic=Sees(),
                                                  encoder=Double()))
    d = type('Shown', (cls,), nets)(**dict(epochs=0, latent_dim=2, verbose=False) | params)
    return d.fit(np.random.default_rng(1).random((6, 1, 1, 3), dtype='float32'))


THREE = torch.rand(6, 1, 1, 3, generator=torch.Generator().manual_seed(2))


def by_hand(x, w=1.):
    """A_R and A_D of these networks, with the encoder's weight w."""
    a, b, c = x.reshape(-1, 3).T
    u, v = 2 * w * a, 2 * w * b                                         # the code
    image = ((a - u)**2 + (b - u * v)**2 + (c - 1)**2) / 3
    return image, ((a**2 - u**2)**2 + 9 * (c - 1)**2) / 2


# ---------------------------------------------------------------- equations
def check_values(cls):
    """Equations (1) to (3), term by term, with noise from N(0, I)."""
    d = shown(cls, feature_weight=.25)
    image, features = by_hand(THREE)
    with isolated(7): z = torch.randn(6, 2)
    again = 2 * torch.stack([z[:, 0], z[:, 0] * z[:, 1]], 1)
    wanted = dict(ziz=dict(code=(z - again).square().mean(1)), izi=dict(image=image),
                  izi_f=dict(image=image, features=.25 * features))
    for loss, truth in wanted.items():
        d.set_params(encoder_loss=loss)
        with isolated(7): terms = d.encoder_terms(THREE)
        assert sorted(terms) == sorted(truth), f'terms of {loss}'
        for name, value in truth.items():
            assert terms[name].shape == (6,), f'shape of {name}'
            assert torch.allclose(terms[name], value, atol=1e-5), f'value of {name} in {loss}'


def check_slopes(cls):
    """The encoder is taught through generator and critic: slopes as of the formulas."""
    d = shown(cls, feature_weight=.25)
    with isolated(7): z = torch.randn(6, 2)
    def formula(loss, w):
        image, features = by_hand(THREE, w)
        if loss != 'ziz': return image.mean() + .25 * features.mean() * (loss == 'izi_f')
        again = 2 * w * torch.stack([z[:, 0], z[:, 0] * z[:, 1]], 1)
        return (z - again).square().mean()
    for loss in LOSSES:
        d.set_params(encoder_loss=loss)
        with isolated(7): ours = total_loss(d.encoder_terms(THREE), 6)
        found, = torch.autograd.grad(ours, d.nets_.encoder.w, allow_unused=True)
        w = torch.ones((), requires_grad=True)
        wanted, = torch.autograd.grad(formula(loss, w), w)
        assert found is not None and torch.isclose(found, wanted, atol=1e-4), f'slope of {loss}'


def check_score(cls):
    """Equation (4), whatever the encoder was trained by; the map is the image's residual."""
    x = THREE.numpy()
    image, features = by_hand(THREE)
    for loss in LOSSES:
        d = shown(cls, feature_weight=.25, encoder_loss=loss)
        assert np.allclose(d.decision_function(x), image + .25 * features, rtol=1e-4), 'score'
        rebuilt = d.nets_.generator(d.nets_.encoder(THREE)).detach().numpy()
        assert np.allclose(d.reconstruct(x), rebuilt), 'reconstruction'
        assert np.allclose(d.encode(x), 2 * x.reshape(6, 3)[:, :2]), 'code'
        assert np.allclose(d.anomaly_map(x), ((x - rebuilt)**2).sum(1), atol=1e-6), 'map'
    d = shown(cls, feature_weight=0.)
    assert np.allclose(d.decision_function(x), image, rtol=1e-4), 'without the features'


# ---------------------------------------------------------------- two phases
def check_phases(cls):
    """The game of WGAN-GP, then the encoder alone; all in the history; epochs of each."""
    class Noted(cls):
        def descend(self, player, loss, xb, *yb):
            before = {n: [v.clone() for v in net.state_dict().values()]
                      for n, net in self.nets_.items()}
            terms = super().descend(player, loss, xb, *yb)
            changed = [n for n, net in self.nets_.items()
                       if not all(map(torch.equal, before[n], net.state_dict().values()))]
            self.notes.append((player, *changed))
            return terms
    for loss, names in dict(ziz=['code'], izi=['image'], izi_f=['features', 'image']).items():
        d = Noted(**SMALL, epochs=1, encoder_epochs=2, batch_size=12, encoder_loss=loss,
                  arch='conv')
        d.notes = []
        d.fit(X8)
        critic, generator, enc = ((n, n) for n in ('critic', 'generator', 'encoder'))
        assert d.notes == [critic, critic, generator] + [enc] * 4, 'moves'
        found = {k: len(v) for k, v in d.history_.items() if k.startswith('encoder/')}
        assert found == {f'encoder/{name}': 2 for name in names}, 'history'
        assert len(d.history_['critic/penalty']) == 1, 'history of the game'


def check_frozen(cls):
    """The phase uses the generator as it will score: statistics at rest, and not moved."""
    for loss in LOSSES:
        d = cls(**SMALL, epochs=2, encoder_epochs=3, batch_size=8, encoder_loss=loss, arch='conv')
        seen = []
        kept = lambda: [v.clone() for n in ('generator', 'critic')
                        for v in d.nets_[n].state_dict().values()]
        terms = d.encoder_terms
        def watched(xb):
            if not seen: seen.append(kept())
            seen.append([layer.training for layer in d.nets_.generator.modules()])
            return terms(xb)
        d.encoder_terms = watched
        d.fit(X8)
        assert not any(map(any, seen[1:])), 'the generator is in train mode'
        assert all(map(torch.equal, seen[0], kept())), 'generator or critic has moved'
        means = [v for k, v in d.nets_.generator.state_dict().items() if 'running_mean' in k]
        assert means and all(m.abs().sum() > 0 for m in means), 'the game left no statistics'
        before = kept()
        d.decision_function(X8)
        assert all(map(torch.equal, before, kept())), 'scoring moves it'


def check_learns(cls):
    """Each loss falls where it is minimized, and codes are found again."""
    for loss in LOSSES:
        d = raw(cls, encoder_loss=loss, encoder_lr=3e-3, feature_weight=1.)
        def value():
            with isolated(3), torch.no_grad():
                return float(total_loss(FAnoGAN.encoder_terms(d, XB), 40))
        before = value()
        assert moved(d, 'encoder', d.encoder_terms, XB, 60) == {'encoder'}, 'who moves'
        assert value() < .97 * before, f'{loss} does not learn'


def check_interruptions(cls):
    """Before the encoder has moved: nothing is left. After: what it has learned."""
    def stopped(hook, call):
        calls = []
        def interrupted(self, xb):
            calls.append(1)
            if len(calls) == call: raise KeyboardInterrupt
            return getattr(cls, hook)(self, xb)
        return changed(cls, **{hook: interrupted})(**SMALL, epochs=2, batch_size=10)
    for hook, call in (('critic_loss', 1), ('generator_loss', 3), ('encoder_terms', 1)):
        d = stopped(hook, call)
        try: d.fit(X)
        except KeyboardInterrupt: pass
        assert not hasattr(d, 'threshold_'), 'a threshold from an untrained encoder'
        assert not hasattr(d, 'nets_'), 'something is left'
    for call in (2, 5):
        d = stopped('encoder_terms', call)
        with pytest.warns(UserWarning, match='fit was interrupted'): d.fit(X)
        scores = d.decision_function(X)
        assert np.isclose(d.threshold_, np.quantile(scores, .95), rtol=1e-4), 'threshold'
        fresh = cls(**SMALL, epochs=0).fit(X)
        same = [torch.equal(a, b) for a, b in zip(d.nets_.encoder.parameters(),
                                                  fresh.nets_.encoder.parameters())]
        assert not any(same), 'the encoder has learned nothing'


CHECKS = (check_values, check_slopes, check_score, check_phases, check_frozen, check_learns,
          check_interruptions)


@pytest.mark.parametrize('check', CHECKS)
def test_the_chapter_keeps(check): check(FAnoGAN)


# ---------------------------------------------------------------- mutants


def other_terms(change):
    """A class whose loss has other terms: change(self, xb, terms) -> terms."""
    def encoder_terms(self, xb): return change(self, xb, FAnoGAN.encoder_terms(self, xb))
    return encoder_terms


def broken(name, **methods): return changed(FAnoGAN, name, **methods)


def lost(term):
    return lambda self, xb, terms: {k: v * (k != term) for k, v in terms.items()}


def sums(self, xb, terms):
    return {k: v * dict(image=xb[0].numel(), code=self.latent_dim, features=2)[k]
            for k, v in terms.items()}


def constant(self, xb, terms): return {k: v.detach() for k, v in terms.items()}
def flipped(self, xb, terms): return {k: -v for k, v in terms.items()}
def unweighted(self, xb, terms):
    return {k: v / (self.feature_weight if k == 'features' else 1) for k, v in terms.items()}


NO = {term: broken(f'No_{term}', encoder_terms=other_terms(lost(term)))
      for term in ('code', 'image', 'features')}
SUMS, CONSTANT, FLIPPED, UNWEIGHTED = (
    broken(change.__name__, encoder_terms=other_terms(change))
    for change in (sums, constant, flipped, unweighted))


class Absolute(FAnoGAN):
    def encoder_terms(self, xb):
        return dict(image=(xb - self.reconstruction(xb)).abs().flatten(1).mean(1))

class OfImages(FAnoGAN):
    """ziz that encodes the real images, whose noise nobody knows."""
    def encoder_terms(self, xb):
        if self.encoder_loss != 'ziz': return super().encoder_terms(xb)
        z = torch.randn(len(xb), self.latent_dim)
        return dict(code=residual(z, self.code(xb)))

class Uniform(FAnoGAN):
    def encoder_terms(self, xb):
        if self.encoder_loss != 'ziz': return super().encoder_terms(xb)
        z = torch.rand(len(xb), self.latent_dim)
        return dict(code=residual(z, self.code(self.nets_.generator(z))))

class SameNoise(FAnoGAN):
    def encoder_terms(self, xb):
        if self.encoder_loss != 'ziz': return super().encoder_terms(xb)
        z = self.draws(len(xb))
        return dict(code=residual(z, self.code(self.nets_.generator(z))))

class Answers(FAnoGAN):
    """Compares what the critic says, not what it sees."""
    def feature_residual(self, xb, rebuilt):
        return (self.critic_output(xb) - self.critic_output(rebuilt)).square()

class PixelsOnly(FAnoGAN):
    def image_score(self, xb): return self.score_parts(xb)[0]

class Unweighted(FAnoGAN):
    def image_score(self, xb): return sum(self.score_parts(xb))

class Subtracts(FAnoGAN):
    def image_score(self, xb):
        image, features = self.score_parts(xb)
        return image - self.feature_weight * features

class BySetting(FAnoGAN):
    """Scores the features only where the encoder was trained with them."""
    def image_score(self, xb):
        image, features = self.score_parts(xb)
        return image + self.feature_weight * features * (self.encoder_loss == 'izi_f')

class FromBank(FAnoGAN):
    def generate_bank(self): WGANGP.generate_bank(self)
    def code(self, xb): return WGANGP.code(self, xb)

class MapOfAll(FAnoGAN):
    def pixel_score(self, xb): return self.errors(xb).sum(1) + self.image_score(xb)[:, None, None]

class EncoderFirst(FAnoGAN):
    def train(self, data):
        """The encoder, then the game."""
        self.train_encoder(data)
        WGANGP.train(self, data)

class AllAtOnce(FAnoGAN):
    """The encoder is trained beside the players, on a generator that still moves."""
    def turns(self):
        """All three on each batch."""
        return [*super().turns(), ('encoder', self.encoder_terms)]
    def train(self, data):
        """One phase."""
        WGANGP.train(self, data)

class NoEncoder(FAnoGAN):
    def train_encoder(self, data): pass

class Thawed(FAnoGAN):
    def optimizers(self):
        """The encoder's step moves the generator as well."""
        return super().optimizers() | dict(encoder=self.adam('encoder', 'generator'))

class InTrainMode(FAnoGAN):
    """Trap: `nets_.train()` before each epoch."""
    def encoder_terms(self, xb):
        self.nets_.train()
        return super().encoder_terms(xb)

class MovesStatistics(FAnoGAN):
    """A look at the generator in train mode, outside of any move."""
    def train_encoder(self, data):
        super().train_encoder(data)
        self.nets_.generator.train()
        with torch.no_grad(): self.fake(8)

class Finishes(FAnoGAN):
    """Goes on after an interruption, with whatever encoder there is."""
    def train(self, data):
        """An interruption ends the phase only."""
        try: super().train(data)
        except KeyboardInterrupt: self.tell('fit was interrupted')


@each_mutant({'value of code in ziz': [NO['code'], OfImages, Uniform, SameNoise],
              'value of image in izi': [NO['image'], SUMS, FLIPPED],
              'value of features': [NO['features'], UNWEIGHTED, Answers], 'terms of': [Absolute]})
def test_wrong_losses_are_caught(why, broken):
    pattern = 'value of (code|image)' if broken in (SUMS, FLIPPED) else why
    assert_caught(check_values, broken, pattern)


@each_mutant({'slope of ziz': [NO['code'], FLIPPED, OfImages], 'slope of izi': [NO['image']],
              'slope of izi_f': [NO['features'], UNWEIGHTED]})
def test_wrong_slopes_are_caught(why, broken): assert_caught(check_slopes, broken, why)


def test_a_loss_without_a_slope_is_caught():
    assert_caught(check_slopes, CONSTANT, 'does not require grad', RuntimeError)


@each_mutant({'score': [PixelsOnly, Unweighted, Subtracts, BySetting, Answers], 'map': [MapOfAll]})
def test_wrong_scores_are_caught(why, broken): assert_caught(check_score, broken, why)


def test_a_score_by_search_is_caught():
    assert_caught(check_score, FromBank, 'score|code|reconstruction')


@each_mutant({'moves': [EncoderFirst, AllAtOnce, NoEncoder, Thawed]})
def test_wrong_phases_are_caught(why, broken): assert_caught(check_phases, broken, why)


@each_mutant({'train mode': [InTrainMode, Thawed], 'has moved': [MovesStatistics]})
def test_a_generator_that_is_not_frozen_is_caught(why, broken):
    assert_caught(check_frozen, broken, why)


@each_mutant({'does not learn': [FLIPPED], 'who moves': [Thawed]})
def test_an_encoder_that_learns_nothing_is_caught(why, broken):
    assert_caught(check_learns, broken, why)


def test_an_untrained_encoder_is_caught():
    with pytest.warns(UserWarning, match='interrupted'):
        assert_caught(check_interruptions, Finishes, 'a threshold from an untrained encoder')


# ---------------------------------------------------------------- pieces
def test_the_residual_is_a_mean():
    a = torch.tensor([[[[0., 1.], [2., 3.]]]])
    assert residual(a, a + 2).tolist() == [4] and residual(a, a).tolist() == [0]
    assert residual(torch.zeros(2, 3), torch.tensor([[3., 0, 0], [1., 1, 1]])).tolist() == [3, 1]


@pytest.mark.parametrize('arch', ('mlp', 'conv'))
def test_three_losses_share_one_game(arch):
    games = [FAnoGAN(**SMALL, epochs=2, batch_size=8, arch=arch, encoder_loss=loss).fit(X8)
             for loss in LOSSES]
    for name in ('generator', 'critic'):
        first, *others = (d.nets_[name].state_dict() for d in games)
        assert all(torch.equal(v, other[k]) for other in others for k, v in first.items())
    codes = [d.encode(X8) for d in games]
    assert not np.allclose(codes[0], codes[1]) and not np.allclose(codes[1], codes[2])


def test_without_a_game_nothing_is_trained():
    with pytest.warns(UserWarning, match='epochs is 0: without a game no encoder is trained'):
        d = FAnoGAN(**SMALL, epochs=0, encoder_epochs=5).fit(X)
    assert not d.history_ and np.isfinite(d.decision_function(X)).all()


def test_an_untrained_detector_and_a_trained_one_say_nothing(recwarn):
    for params in (dict(epochs=0), dict(epochs=1, encoder_epochs=1)):
        FAnoGAN(**SMALL, **params, batch_size=10).fit(X)
    assert not recwarn.list


def test_epochs_of_the_encoder():
    count = lambda **kw: len(FAnoGAN(**SMALL, batch_size=20, **kw).fit(X).history_['encoder/image'])
    assert (count(epochs=3), count(epochs=3, encoder_epochs=5), count(epochs=1)) == (3, 5, 1)


def test_the_defaults_and_where_they_go():
    d = raw(encoder_lr=.3)
    assert d.optimizers_['encoder'].param_groups[0]['lr'] == .3
    assert d.optimizers_['encoder'].param_groups[0]['betas'] == (.9, .999)
    assert d.optimizers_['critic'].param_groups[0]['betas'] == (0., .999)
    assert FAnoGAN().encoder_loss == 'izi_f' and FAnoGAN().feature_weight == .01
    for arch in ('mlp', 'conv'):
        shapes = lambda net: [p.shape for p in net.parameters()]
        nets = FAnoGAN(latent_dim=5, width=3, arch=arch).networks((1, 8, 8))
        assert shapes(nets['encoder']) == shapes(encoder((1, 8, 8), 5, arch, 3))


def test_nothing_is_searched():
    d = FAnoGAN(**SMALL, epochs=2).fit(X)
    assert not hasattr(d, 'bank_') and d.sample(3).shape == (3, 1, 4, 4)
    same = FAnoGAN(**SMALL, epochs=2, n_draws=7).fit(X)
    assert np.array_equal(d.decision_function(X), same.decision_function(X))


def test_a_save_amid_the_game_is_refused_and_amid_the_phase_kept(tmp_path):
    kept = []
    class Saving(FAnoGAN):
        """Saves itself in the game, and before each step of the encoder but its first."""
        def generator_loss(self, xb):
            with pytest.raises(NotFittedError, match='encoder'): self.save(tmp_path/'d')
            return super().generator_loss(xb)
        def encoder_terms(self, xb):
            if kept: self.save(tmp_path/'e')
            kept.append({k: v.clone() for k, v in self.nets_.encoder.state_dict().items()})
            return super().encoder_terms(xb)
    d = Saving(**SMALL, epochs=2, batch_size=10).fit(X)
    assert not (tmp_path/'d').exists()
    amid = Saving.load(tmp_path/'e')
    assert all(torch.equal(v, kept[-1][k]) for k, v in amid.nets_.encoder.state_dict().items())
    again = [amid.decision_function(X) for _ in range(2)]
    assert np.isfinite(again[0]).all() and np.array_equal(*again)
    assert not np.array_equal(again[0], d.decision_function(X))


def test_what_the_phases_promise():
    assert FAnoGAN.resumes is True and FAnoGAN.loss_falls == ('encoder',)


def test_half_precision_compares_in_full():
    seen = []
    class Noted(FAnoGAN):
        """Notes the kind of number of each term."""
        def feature_residual(self, xb, rebuilt):
            seen.append(super().feature_residual(xb, rebuilt))
            return seen[-1]
    d = Noted(**SMALL, epochs=1, batch_size=10, precision='bfloat16').fit(X)
    assert seen and {v.dtype for v in seen} == {torch.float32}
    assert np.isfinite(d.decision_function(X)).all()


def test_there_are_no_images_to_search():
    d = FAnoGAN(**SMALL, epochs=1, batch_size=10).fit(X)
    with pytest.raises(NotImplementedError, match='FAnoGAN has no generated images .* encode'):
        d.nearest(XB)


@pytest.mark.parametrize('params, message', [
    (dict(encoder_loss='zizi'), "encoder_loss must be one of 'ziz', 'izi', 'izi_f'; got 'zizi'"),
    (dict(encoder_epochs=0), 'encoder_epochs must be a whole number, at least 1; got 0'),
    (dict(encoder_epochs=1.5), 'encoder_epochs'), (dict(encoder_lr=0), 'encoder_lr'),
    (dict(feature_weight=-1), 'feature_weight must be a number, at least 0; got -1'),
    (dict(feature_weight=float('nan')), 'feature_weight'), (dict(latent_dim=0), 'latent_dim')])
def test_wrong_settings_are_named(params, message):
    check_refused(FAnoGAN, message, **SMALL | params)


def test_an_exploding_encoder_names_term_epoch_and_rates():
    check_explosion(FAnoGAN, "'encoder/.*encoder_lr=1e\\+30", **SMALL, encoder_lr=1e30,
                    encoder_loss='ziz')


@pytest.mark.parametrize('shape', SHAPES)
def test_any_image_fits(shape): check_any_image(FAnoGAN, shape, **SMALL)


@pytest.mark.parametrize('loss', LOSSES)
def test_alone_as_in_a_batch_twice_and_from_a_file(loss, tmp_path):
    d = FAnoGAN(**SMALL, arch='conv', epochs=2, batch_size=8, encoder_loss=loss).fit(X8)
    s = d.decision_function(X8)
    assert np.array_equal(s, d.decision_function(X8))
    alone = np.concatenate([d.decision_function(X8[i:i + 1]) for i in range(len(X8))])
    np.testing.assert_allclose(alone, s, rtol=1e-4)
    d.save(tmp_path/'d')
    assert np.array_equal(load(tmp_path/'d').decision_function(X8), s)


def test_training_makes_a_detector():
    """Rows are normal, columns are not: better than untrained and than a random generator."""
    rng = np.random.default_rng(0)
    def stripes(n, axis):
        base = np.zeros((n, 1, 6, 6), 'float32')
        for i, at in enumerate(rng.integers(6, size=n)): base[i, 0].swapaxes(0, axis)[at] = .8
        return (base + .1 * rng.random(base.shape)).astype('float32')
    x, y = np.concatenate([stripes(60, 0), stripes(60, 1)]), np.repeat([0, 1], 60)
    rows = stripes(200, 0)
    class RandomGenerator(FAnoGAN):
        """The control."""
        def train(self, data):
            """The encoder only."""
            self.train_encoder(data)
    for seed in range(2):
        fit = lambda cls, **kw: cls(seed=seed, verbose=False, **kw).fit(rows).score(x, y)
        trained = fit(FAnoGAN, epochs=40)
        others = fit(FAnoGAN, epochs=0), fit(RandomGenerator, epochs=0, encoder_epochs=40)
        assert trained > max(.9, max(others) + .1), f'{trained:.3f}, others {others}'


def test_what_is_set_after_fit_is_checked_before_a_score():
    d = FAnoGAN(**SMALL | dict(epochs=1)).fit(X)
    before = d.decision_function(X)
    d.set_params(feature_weight=-1)
    for f in (d.decision_function, d.predict, d.anomaly_map, d.encode, d.calibrate):
        with pytest.raises(ValueError, match='FAnoGAN: feature_weight must be .*; got -1'): f(X)
    again = d.set_params(feature_weight=FAnoGAN.feature_weight).decision_function(X)
    assert np.array_equal(again, before)
