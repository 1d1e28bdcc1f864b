"""The compared: right values of each loss, equal networks, and labels that matter."""
import numpy as np
import pytest
import torch
from torch.nn import functional as F

from ad_course.check import check_detector
from ad_course.data import label_anomalies
from ad_course.deepsad import DeepSAD
from ad_course.detector import load
from ad_course.deviation import Classifier
from ad_course.dra import DRA
from ad_course.feature_maps import remembered, top_mean
from ad_course.metrics import auroc
from ad_course.openset import (
    FLOS, MLEP, SAOE, MapSAD, all_triplets, focal_loss, triplet_margin)
from ad_course.surfaces import surfaces
from tests.labelled import check_labels_needed
from tests.mutants import assert_caught, each_mutant

SMALL = dict(backbone=None, epochs=40, batch_size=32, device='cpu', verbose=False)
QUICK = dict(epochs=2, hidden=8, device='cpu', verbose=False)
ALL = [FLOS, SAOE, MLEP, MapSAD]


def draws(*shape, seed=0): return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope='module')
def cloth():
    """Surfaces with six labelled anomalies of the two seen kinds."""
    return label_anomalies(surfaces(n_train=60, n_test=80, size=32, seed=0), 6, seed=0)


@pytest.fixture(scope='module')
def fitted(cloth):
    return {cls: cls(**QUICK).fit(cloth.x_train, cloth.y_train) for cls in ALL}


# ---------------------------------------------------------------- the focal loss
def focal_by_hand(f):
    """Probabilities 1/2, 9/10 and 1/10 of an anomaly, for both labels."""
    s, y = torch.tensor([0., 0, np.log(9), np.log(9)]), torch.tensor([0, 1, 0, 1])
    wanted = [.75 * .25 * np.log(2), .25 * .25 * np.log(2),
              .75 * .81 * -np.log(.1), .25 * .01 * -np.log(.9)]
    torch.testing.assert_close(f(s, y), torch.tensor(wanted))


def at_gamma_0_it_is_weighted_cross_entropy(f):
    s, y = 3 * draws(20), torch.arange(20) % 3 == 0
    weight = torch.where(y, .3, .7)
    wanted = weight * F.binary_cross_entropy_with_logits(s, y.float(), reduction='none')
    torch.testing.assert_close(f(s, y, 0., .3), wanted)


def easy_images_weigh_less(f):
    s, y = torch.tensor([4., 4]), torch.tensor([1, 0])       # an easy anomaly, a hard normal image
    easy, hard = (f(s, y, 2., .5) / f(s, y, 0., .5)).tolist()
    assert easy < .01 and hard > .95, (easy, hard)


def focal_signs(f):
    s, y = torch.tensor([-3., 0, 3, -3, 0, 3], dtype=torch.float64), torch.tensor([0] * 3 + [1] * 3)
    s.requires_grad_()
    f(s, y).sum().backward()
    assert s.grad.sign().tolist() == [1] * 3 + [-1] * 3
    assert torch.autograd.gradcheck(lambda v: f(v, y), s)


def focal_is_stable(f):
    s = torch.tensor([500., -500, 500, -500], requires_grad=True)
    loss = f(s, torch.tensor([0, 1, 1, 0]))
    loss.sum().backward()
    torch.testing.assert_close(loss.detach(), torch.tensor([375., 125, 0, 0]))
    torch.testing.assert_close(s.grad, torch.tensor([.75, -.25, 0, 0]))


def shapes_are_refused(f):
    for s, y in ((draws(4, 1), torch.ones(4)), (draws(4), torch.ones(4, 1)),
                 (draws(4), torch.ones(3)), (torch.zeros(()), torch.ones(()))):
        with pytest.raises(ValueError, match=r'must both be \(b,\); got'): f(s, y)


FOCAL = [focal_by_hand, at_gamma_0_it_is_weighted_cross_entropy, easy_images_weigh_less,
         focal_signs, focal_is_stable, shapes_are_refused]


@pytest.mark.parametrize('promise', FOCAL, ids=lambda f: f.__name__)
def test_focal_loss(promise): promise(focal_loss)


def without_gamma(s, y, gamma=2., alpha=.25): return focal_loss(s, y, 0., alpha)
def alpha_swapped(s, y, gamma=2., alpha=.25): return focal_loss(s, y, gamma, 1 - alpha)
def turned(s, y, gamma=2., alpha=.25): return focal_loss(s, 1 - y.long(), gamma, alpha)
def hard_weigh_less(s, y, gamma=2., alpha=.25):
    right = (2 * y.to(s.dtype) - 1) * s
    return focal_loss(s, y, 0., alpha) * torch.sigmoid(right).pow(gamma)
def from_probabilities(s, y, gamma=2., alpha=.25):
    p, y = torch.sigmoid(s), y.to(s.dtype)
    right = p * y + (1 - p) * (1 - y)
    return -(alpha * y + (1 - alpha) * (1 - y)) * (1 - right).pow(gamma) * right.log()
def weight_without_gradient(s, y, gamma=2., alpha=.25):
    right = (2 * y.to(s.dtype) - 1) * s
    return focal_loss(s, y, 0., alpha) * torch.sigmoid(-right).detach().pow(gamma)


@pytest.mark.parametrize('mutant, promise', [
    (without_gamma, focal_by_hand), (without_gamma, easy_images_weigh_less),
    (alpha_swapped, focal_by_hand), (alpha_swapped, at_gamma_0_it_is_weighted_cross_entropy),
    (turned, focal_by_hand), (turned, focal_signs), (hard_weigh_less, easy_images_weigh_less),
    (from_probabilities, focal_is_stable), (weight_without_gradient, focal_signs)],
    ids=lambda f: f.__name__)
def test_mutant_of_the_focal_loss_is_caught(mutant, promise):
    assert_caught(promise, mutant, kinds=(AssertionError, RuntimeError))


# ---------------------------------------------------------------- triplets
def at_the_margin(f):
    """Positive at 1; negative at 0, just inside, at the margin, beyond."""
    far = torch.tensor([0., 2.9, 3, 9], requires_grad=True)
    near = torch.ones(4, requires_grad=True)
    losses = f(near, far, 2.)
    torch.testing.assert_close(losses, torch.tensor([3., .1, 0, 0]))
    losses[[0, 1, 3]].sum().backward()
    assert far.grad.tolist() == [-1, -1, 0, 0] and near.grad.tolist() == [1, 1, 0, 0]


def margin_of_the_other_sign(near, far, margin=1.): return triplet_margin(near, far, -margin)
def exchanged(near, far, margin=1.): return triplet_margin(far, near, margin)
def without_rest(near, far, margin=1.): return margin + near - far


def test_triplet(): at_the_margin(triplet_margin)


@pytest.mark.parametrize('mutant', [margin_of_the_other_sign, exchanged, without_rest])
def test_mutant_of_the_triplet_is_caught(mutant): assert_caught(at_the_margin, mutant)


def one_by_one(f):
    """All triplets, in three loops."""
    for n, m in ((5, 3), (2, 1)):
        z, y = draws(n + m, 4, seed=n), torch.tensor([0] * n + [1] * m)
        order = torch.randperm(n + m, generator=torch.Generator().manual_seed(1))
        apart, losses = lambda a, b: (a - b).square().mean(), []
        for a in range(n):
            for p in range(n):
                for q in range(n, n + m):
                    if a == p: continue
                    losses.append((.8 + apart(z[a], z[p]) - apart(z[a], z[q])).clamp(min=0))
        torch.testing.assert_close(f(z[order], y[order], .8), torch.stack(losses).mean())


def nothing_without_a_triplet(f):
    for y in ([0, 0, 0], [1, 1, 1], [0, 1, 1]):
        z = draws(3, 2).requires_grad_()
        loss = f(z, torch.tensor(y))
        loss.backward()
        assert loss == 0 and not z.grad.any()


TRIPLETS = [one_by_one, nothing_without_a_triplet]


@pytest.mark.parametrize('promise', TRIPLETS, ids=lambda f: f.__name__)
def test_all_triplets(promise): promise(all_triplets)


def labels_turned(z, y, margin=1.): return all_triplets(z, 1 - y, margin)
def itself_as_positive(z, y, margin=1.):
    normal, bad = z[y == 0], z[y == 1]
    apart = lambda a, b: (a[:, None] - b[None]).square().mean(2)
    near, far = apart(normal, normal), apart(normal, bad)
    return triplet_margin(near[:, :, None], far[:, None, :], margin).mean()
def anchor_and_negative_exchanged(z, y, margin=1.):
    normal, bad = z[y == 0], z[y == 1]
    apart = lambda a, b: (a[:, None] - b[None]).square().mean(2)
    losses = triplet_margin(apart(bad, normal)[:, :, None], apart(bad, normal)[:, None, :], margin)
    another = ~torch.eye(len(normal), dtype=torch.bool)
    return losses[:, another].mean()
def hinge_of_the_means(z, y, margin=1.):
    """As in the official code."""
    normal, bad = z[y == 0], z[y == 1]
    apart = lambda a, b: (a[:, None] - b[None]).square().mean(2)
    near = apart(normal, normal)[~torch.eye(len(normal), dtype=torch.bool)].mean()
    return triplet_margin(near, apart(normal, bad).mean(), margin)


@pytest.mark.parametrize('mutant', [labels_turned, itself_as_positive, hinge_of_the_means,
                                    anchor_and_negative_exchanged], ids=lambda f: f.__name__)
def test_mutant_of_all_triplets_is_caught(mutant): assert_caught(one_by_one, mutant)


# ---------------------------------------------------------------- the detectors
def batch(t): return torch.tensor(t.x_train[-12:]), torch.tensor(t.y_train[-12:])


@pytest.mark.parametrize('cls', ALL)
def test_loss_of_rows_is_the_loss_of_images(cls, cloth, fitted):
    d, (xb, yb) = fitted[cls], batch(cloth)
    with torch.no_grad(): one, two = d.loss(xb, yb), d.row_loss(d.nets_.view.frozen(xb), yb)
    for k in one: torch.testing.assert_close(one[k], two[k], rtol=1e-4, atol=1e-4)


def flos_is_focal(cls):
    t = label_anomalies(surfaces(n_train=30, n_test=10, size=32, seed=0), 6, seed=0)
    d = cls(**QUICK, gamma=1.5, alpha=.3).fit(t.x_train, t.y_train)
    xb, yb = batch(t)
    with torch.no_grad():
        s = top_mean(d.nets_.head(d.nets_.view(xb))[:, 0], d.top_share)
        torch.testing.assert_close(d.loss(xb, yb)['focal'], focal_loss(s, yb, 1.5, .3))


class Plain(FLOS):
    """gamma is ignored."""
    def map_loss(self, m, yb): return dict(focal=focal_loss(self.map_score(m), yb, 0., self.alpha))

class Swapped(FLOS):
    """alpha weighs the normal images."""
    def map_loss(self, m, yb):
        return dict(focal=focal_loss(self.map_score(m), yb, self.gamma, 1 - self.alpha))


def test_flos_uses_gamma_and_alpha(): flos_is_focal(FLOS)


@pytest.mark.parametrize('cls', [Plain, Swapped])
def test_mutant_of_flos_is_caught(cls): assert_caught(flos_is_focal, cls)


def test_at_gamma_0_with_equal_weights_it_is_the_classifier(cloth):
    """Half of its loss: Adam, which divides by the size of gradients, does not notice."""
    scores = [d.fit(cloth.x_train, cloth.y_train).decision_function(cloth.x_test)
              for d in (FLOS(**QUICK, gamma=0., alpha=.5), Classifier(**QUICK))]
    np.testing.assert_allclose(*scores, rtol=1e-3, atol=1e-3)


def test_when_nothing_is_made_it_is_the_classifier(cloth):
    plain, nothing, made = (
        d.fit(cloth.x_train, cloth.y_train).decision_function(cloth.x_test)
        for d in (Classifier(**QUICK), SAOE(**QUICK, n_pseudo=0), SAOE(**QUICK)))
    np.testing.assert_allclose(nothing, plain, rtol=1e-4, atol=1e-5)
    assert abs(made - plain).max() > 1e-2


def made_ones_are_anomalies(cls):
    t = label_anomalies(surfaces(n_train=30, n_test=10, size=32, seed=0), 6, seed=0)
    d = cls(**QUICK).fit(t.x_train, t.y_train)
    m = d.nets_.view(torch.tensor(t.x_train[:3]))
    with torch.no_grad():
        loss, s = d.map_loss(m, torch.tensor([0, 1, 2]))['entropy'], d.map_score(m)
    wanted = F.binary_cross_entropy_with_logits(s, torch.tensor([0., 1, 1]), reduction='none')
    torch.testing.assert_close(loss, wanted)


class MadeAreNormal(SAOE):
    """Pseudo-anomalies labelled normal."""
    def map_loss(self, m, yb): return super().map_loss(m, yb % 2)

class Ignored(SAOE):
    """Pseudo-anomalies cost nothing, as at DRA's seen head."""
    def map_loss(self, m, yb):
        return {k: v * (yb < 2) for k, v in super().map_loss(m, yb).items()}


def test_made_ones_are_anomalies(): made_ones_are_anomalies(SAOE)


@pytest.mark.parametrize('cls', [MadeAreNormal, Ignored])
def test_mutant_of_saoe_is_caught(cls): assert_caught(made_ones_are_anomalies, cls)


def test_saoe_makes_what_dra_makes(cloth):
    xb, made = torch.tensor(cloth.x_train[:4]), []
    for cls in (SAOE, DRA):
        rng = torch.Generator().manual_seed(0)
        made.append(cls().pseudo_anomalies(xb, rng))
    assert torch.equal(*made)


def equation_7(cls):
    """Deep SAD's, of the mean of the worst places' distances."""
    t = label_anomalies(surfaces(n_train=30, n_test=10, size=32, seed=0), 6, seed=0)
    d = cls(**QUICK, eta=3., eps=.01, top_share=.5).fit(t.x_train, t.y_train)
    xb, yb = batch(t)
    with torch.no_grad():
        z = d.nets_.embed(d.nets_.view(xb)).flatten(2).movedim(1, 2).numpy()         # (b, p, k)
        far = ((z - d.center_.numpy()) ** 2).sum(2)
        far = torch.tensor(np.sort(far, 1)[:, far.shape[1] // 2:].mean(1))
        loss = sum(d.loss(xb, yb).values())
    wanted = torch.where(yb == 1, 3 / (far + .01), far)
    torch.testing.assert_close(loss, wanted, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(d.decision_function(t.x_train[-12:]), far, rtol=1e-4, atol=1e-5)


class Inverted(MapSAD):
    """eta divides."""
    def map_loss(self, m, yb):
        loss = super().map_loss(m, yb)
        return loss | dict(anomalies=loss['anomalies'] / self.eta**2)

class Attracts(MapSAD):
    """Anomalies are pulled as well."""
    repulsion = DeepSAD.attraction

class SadTurned(MapSAD):
    """Labels exchanged."""
    def map_loss(self, m, yb): return super().map_loss(m, 1 - yb)

class AllPlaces(MapSAD):
    """The mean of all places."""
    def map_score(self, m): return self.place_scores(m).mean((1, 2))


def test_map_sad(): equation_7(MapSAD)


@pytest.mark.parametrize('cls', [Inverted, Attracts, SadTurned, AllPlaces])
def test_mutant_of_map_sad_is_caught(cls): assert_caught(equation_7, cls)


def test_the_center_is_the_mean_code_of_normal_images_before_training(cloth):
    d = MapSAD(**QUICK | dict(epochs=0), center_guard=0.).fit(cloth.x_train, cloth.y_train)
    normal = torch.tensor(cloth.x_train[cloth.y_train == 0])
    with torch.no_grad(): z = d.nets_.embed(d.nets_.view(normal))
    torch.testing.assert_close(d.center_, z.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    later = MapSAD(**QUICK, center_guard=0.).fit(cloth.x_train, cloth.y_train)
    torch.testing.assert_close(later.center_, d.center_)


def test_the_code_of_a_place_has_no_constant(fitted):
    names = [n for cls in (MapSAD, MLEP) for n, _ in fitted[cls].nets_.embed.named_parameters()]
    assert names == ['0.weight', '2.weight'] * 2


def mlep_by_hand(cls):
    t = label_anomalies(surfaces(n_train=30, n_test=10, size=32, seed=0), 6, seed=0)
    d = cls(**QUICK, margin=2., margin_weight=3.).fit(t.x_train, t.y_train)
    xb, yb = batch(t)
    with torch.no_grad():
        m = d.nets_.view(xb)
        z = d.nets_.embed(m)
        errors = (d.nets_.predict(z) - m).square().mean(1)
        loss = d.loss(xb, yb)
    torch.testing.assert_close(loss['prediction'], torch.where(yb == 0, errors.mean((1, 2)), 0.))
    torch.testing.assert_close(loss['triplets'], 3 * all_triplets(z.mean((2, 3)), yb, 2.))
    np.testing.assert_allclose(d.decision_function(t.x_train[-12:]),
                               top_mean(errors, d.top_share), rtol=1e-4, atol=1e-5)


class PredictsAll(MLEP):
    """Anomalies are predicted too."""
    def map_loss(self, m, yb):
        return super().map_loss(m, yb) | dict(prediction=self.errors(m).mean((1, 2)))

class MarginIgnored(MLEP):
    def map_loss(self, m, yb):
        triplets = self.margin_weight * all_triplets(self.mean_codes(m), yb)
        return super().map_loss(m, yb) | dict(triplets=triplets)

class MlepTurned(MLEP):
    """Labels exchanged."""
    def map_loss(self, m, yb): return super().map_loss(m, 1 - yb)


def test_mlep(): mlep_by_hand(MLEP)


@pytest.mark.parametrize('cls', [PredictsAll, MarginIgnored, MlepTurned])
def test_mutant_of_mlep_is_caught(cls): assert_caught(mlep_by_hand, cls)


def test_distance_is_to_the_mean_code_after_training(cloth):
    d = MLEP(**QUICK, scoring='distance').fit(cloth.x_train, cloth.y_train)
    normal = torch.tensor(cloth.x_train[cloth.y_train == 0])
    with torch.no_grad():
        center = d.nets_.embed(d.nets_.view(normal)).mean((0, 2, 3))
        z = d.nets_.embed(d.nets_.view(torch.tensor(cloth.x_test)))
    far = (z - center[:, None, None]).square().sum(1)
    np.testing.assert_allclose(d.decision_function(cloth.x_test), top_mean(far, d.top_share),
                               rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize('cls', ALL)
def test_the_view_stays_and_the_heads_learn(cls, cloth, fitted):
    raw = cls(**QUICK | dict(epochs=0)).fit(cloth.x_train, cloth.y_train)
    for name, net in fitted[cls].nets_.items():
        pairs = zip(net.state_dict().values(), raw.nets_[name].state_dict().values())
        assert all(torch.equal(a, b) for a, b in pairs) == (name == 'view')


@pytest.mark.parametrize('cls', ALL)
def test_seen_kinds_are_found_better_than_untrained(cls, cloth):
    part = (cloth.y_test == 0) | np.isin(cloth.kinds_test, ['scratch', 'spot'])
    def found(epochs, seed):
        d = cls(epochs=epochs, seed=seed, hidden=32, device='cpu', verbose=False)
        scores = d.fit(cloth.x_train, cloth.y_train).decision_function(cloth.x_test)
        return auroc(cloth.y_test[part], scores[part])
    with remembered(): raw, trained = ([found(n, seed) for seed in range(3)] for n in (0, 30))
    assert min(trained) > .9 and np.mean(trained) > np.mean(raw) + .1, (raw, trained)


@pytest.mark.parametrize('cls', ALL)
def test_a_file_holds_all(cls, cloth, fitted, tmp_path, monkeypatch):
    fitted[cls].save(tmp_path/'d.safetensors')
    monkeypatch.setattr('ad_course.backbones.load_packaged', lambda *a: pytest.fail('loaded'))
    scores = [d.decision_function(cloth.x_test)
              for d in (load(tmp_path/'d.safetensors'), fitted[cls])]
    assert np.array_equal(*scores)


@pytest.mark.parametrize('cls', ALL)
def test_labels_are_needed(cls, cloth): check_labels_needed(cls, cloth.x_train[:20], **SMALL)


@pytest.mark.parametrize('cls, settings, name', [
    (FLOS, dict(gamma=-1), 'gamma'), (FLOS, dict(alpha=0), 'alpha'), (FLOS, dict(alpha=1), 'alpha'),
    (SAOE, dict(heads=('pseudo',)), 'heads'), (SAOE, dict(n_pseudo=-1), 'n_pseudo'),
    (MapSAD, dict(code_dim=0), 'code_dim'), (MapSAD, dict(eta=-1), 'eta'),
    (MapSAD, dict(eps=0), 'eps'), (MapSAD, dict(center_guard=-1), 'center_guard'),
    (MLEP, dict(margin=0), 'margin'), (MLEP, dict(margin_weight=-1), 'margin_weight'),
    (MLEP, dict(scoring='psnr'), 'scoring'), (MLEP, dict(hidden=-1), 'hidden')], ids=str)
def test_wrong_settings(cloth, cls, settings, name):
    with pytest.raises(ValueError, match=f'{cls.__name__}: {name} must be .*; got'):
        cls(**SMALL | settings).fit(cloth.x_train, cloth.y_train)


class Deaf(FLOS):
    """Labels of the neighbor."""
    def map_loss(self, m, yb): return super().map_loss(m, yb.roll(1))

class Turned(FLOS):
    """Labels exchanged."""
    def map_loss(self, m, yb): return super().map_loss(m, 1 - yb)


@pytest.mark.filterwarnings('ignore')
@each_mutant({'breaks': (Deaf, Turned, SadTurned, MlepTurned)})
def test_mutant_of_the_detector_is_caught(why, broken):
    def check(cls):
        check_detector(cls(**SMALL), only=['labels_matter', 'higher_is_anomalous', 'learns'],
                       shape=(1, 16, 16))
    assert_caught(check, broken, why)


@pytest.mark.filterwarnings('ignore')
def test_the_other_score_of_mlep_keeps_the_promises():
    check_detector(MLEP(**SMALL, scoring='distance'), shape=(1, 16, 16))
