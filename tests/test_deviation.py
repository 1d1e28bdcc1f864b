"""The deviation loss: right values, labels that matter, and heads that look at the top."""
import numpy as np
import pytest
import torch

from ad_course.check import check_detector
from ad_course.data import label_anomalies
from ad_course.detector import load
from ad_course.deviation import DevNet, deviation_loss, deviations, top_mean
from ad_course.metrics import auroc
from ad_course.surfaces import surfaces
from tests.labelled import check_labels_needed
from tests.mutants import assert_caught

SMALL = dict(backbone=None, epochs=40, batch_size=32, device='cpu', verbose=False)


def draws(*shape, seed=0): return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope='module')
def cloth():
    """Surfaces with six labelled anomalies of the two seen kinds."""
    return label_anomalies(surfaces(n_train=80, n_test=120, size=32, seed=0), 6, seed=0)


# ---------------------------------------------------------------- the loss
def by_hand(f):
    dev = deviations(torch.tensor([2., -3, 2, 7, -1]), torch.tensor([-1., 0, 1]))
    terms = f(dev, torch.tensor([0, 0, 1, 1, 1]))
    assert terms['normal'].tolist() == [2, 3, 0, 0, 0]
    assert terms['anomalies'].tolist() == [0, 0, 3, 0, 6]
    squared = f(dev, torch.tensor([0, 0, 1, 1, 1]), power=2)
    assert sum(squared.values()).tolist() == [4, 9, 9, 0, 36]
    assert f(dev, torch.ones(5), margin=2.)['anomalies'].tolist() == [0, 5, 0, 0, 3]


def signs_of_the_gradient(f):
    """Normal scores go to 0 from both sides; anomalies rise to the margin and rest."""
    s = torch.tensor([-2., 1, 8, -2, 4.9, 5.1], dtype=torch.float64, requires_grad=True)
    y = torch.tensor([0, 0, 0, 1, 1, 1])
    sum(f(s, y).values()).sum().backward()
    assert s.grad.sign().tolist() == [-1, 1, 1, -1, -1, 0]
    p = torch.tensor([-2., 1, 8, -2, 4.9], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: sum(f(v, y[:5], power=2).values()), p)


def labels_belong_to_their_image(f):
    s = draws(8).requires_grad_()
    y = torch.tensor([0, 0, 1, 0, 1, 0, 0, 0])
    slope = lambda labels: torch.autograd.grad(sum(f(s, labels).values()).mean(), s)[0]
    assert not torch.equal(slope(y), slope(y.flip(0)))
    assert (slope(y)[y == 1] < 0).all()


def shapes_are_refused(f):
    for dev, y in ((draws(4, 1), torch.ones(4)), (draws(4), torch.ones(4, 1)),
                   (draws(4), torch.ones(3)), (torch.zeros(()), torch.ones(()))):
        with pytest.raises(ValueError, match=r'must both be \(b,\); got'): f(dev, y)


LOSS = [by_hand, signs_of_the_gradient, labels_belong_to_their_image, shapes_are_refused]


@pytest.mark.parametrize('promise', LOSS, ids=lambda f: f.__name__)
def test_loss(promise): promise(deviation_loss)


def exchanged(dev, y, margin=5., power=1):
    return deviation_loss(y.to(dev.dtype), dev, margin, power)

def spread(dev, y, margin=5., power=1):
    y = y.to(dev.dtype)[:, None]
    normal, far = dev.abs().pow(power), (margin - dev).clamp(min=0).pow(power)
    return dict(normal=((1 - y) * normal).mean(0), anomalies=(y * far).mean(0))

def one_sided(dev, y, margin=5., power=1):
    return deviation_loss(dev, y, margin, power) | dict(
        normal=(1 - y.to(dev.dtype)) * dev.clamp(min=0).pow(power))

def without_rest(dev, y, margin=5., power=1):
    return deviation_loss(dev, y, margin, power) | dict(
        anomalies=y.to(dev.dtype) * (margin - dev).abs().pow(power))

def turned(dev, y, margin=5., power=1): return deviation_loss(dev, 1 - y, margin, power)

def halved(dev, y, margin=5., power=1):
    return {k: .5 * v for k, v in deviation_loss(dev, y, margin, power).items()}


@pytest.mark.parametrize('mutant, promise', [
    (exchanged, by_hand), (exchanged, signs_of_the_gradient),
    (spread, labels_belong_to_their_image),
    (one_sided, by_hand), (one_sided, signs_of_the_gradient), (without_rest, by_hand),
    (turned, by_hand), (turned, signs_of_the_gradient), (halved, by_hand)])
def test_mutant_of_the_loss_is_caught(mutant, promise): assert_caught(promise, mutant)


def test_a_reference_that_has_no_deviation_is_refused():
    for reference in (torch.zeros(9), torch.ones(1)):
        with pytest.raises(ValueError, match='reference must hold different scores; got'):
            deviations(draws(4), reference)


def test_deviations_are_those_of_the_reference():
    reference, s = draws(500) * 3 + 2, draws(7, seed=1)
    wanted = (s.numpy() - reference.numpy().mean()) / reference.numpy().std(ddof=1)
    np.testing.assert_allclose(deviations(s, reference), wanted, rtol=1e-5)


@pytest.mark.parametrize('share, wanted', [
    (.5, [7, 4]), (.3, [9, 8]), (1., [4.5, 2]), (.01, [9, 8]), (.75, [17 / 3, 8 / 3])])
def test_top_mean(share, wanted):
    values = torch.tensor([[[1., 9], [3, 5]], [[0, 0], [0, 8]]])
    torch.testing.assert_close(top_mean(values, share), torch.tensor(wanted, dtype=torch.float32))
    order = torch.randperm(4, generator=torch.Generator().manual_seed(0))
    shuffled = values.flatten(1)[:, order].view(2, 2, 2)
    torch.testing.assert_close(top_mean(shuffled, share), top_mean(values, share))


# ---------------------------------------------------------------- the detector
def test_loss_of_rows_is_the_loss_of_images(cloth):
    d = DevNet(epochs=1, margin=3., power=2, n_reference=50, top_share=.5, device='cpu',
               verbose=False).fit(cloth.x_train, cloth.y_train)
    xb, yb = torch.tensor(cloth.x_train[-12:]), torch.tensor(cloth.y_train[-12:])
    with torch.no_grad():
        one, two = d.loss(xb, yb), d.row_loss(d.nets_.view.frozen(xb), yb)
        places = d.nets_.head(d.nets_.view(xb))[:, 0].flatten(1)
        assert places.shape == (12, 16) and len(d.reference_) == 50
        scores = places.sort(1).values[:, 8:].mean(1)
        dev = deviations(scores, d.reference_)
    torch.testing.assert_close(d.image_score(xb), scores)
    for k, v in deviation_loss(dev, yb, 3., 2).items():
        torch.testing.assert_close(one[k], v, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(two[k], v, rtol=1e-4, atol=1e-4)


def test_the_share_of_labelled_ones_is_that_of_an_epoch(cloth):
    seen = []
    class Listens(DevNet):
        def row_loss(self, rows, yb): seen.append(yb); return super().row_loss(rows, yb)
    for share in (.5, .2):
        seen.clear()
        Listens(epochs=1, labelled_share=share, device='cpu', verbose=False, size=32).fit(
            cloth.x_train, cloth.y_train)
        assert abs(torch.cat(seen).float().mean() - share) < .03


def test_places_below_zero_stay_there(cloth):
    d = DevNet(epochs=3, device='cpu', verbose=False).fit(cloth.x_train, cloth.y_train)
    assert d.anomaly_map(cloth.x_test).min() < 0


def test_the_backbone_stays_and_the_head_learns(cloth):
    d, raw = (DevNet(epochs=n, device='cpu', verbose=False).fit(cloth.x_train, cloth.y_train)
              for n in (3, 0))
    for name in ('view', 'head'):
        pairs = zip(d.nets_[name].state_dict().values(), raw.nets_[name].state_dict().values())
        assert all(torch.equal(a, b) for a, b in pairs) == (name == 'view')


def test_thawed_stages_learn(cloth):
    d, raw = (DevNet(epochs=n, thaw=1, device='cpu', verbose=False, size=32)
              .fit(cloth.x_train, cloth.y_train) for n in (1, 0))
    moved = [k for k, v in d.nets_.view.state_dict().items()
             if not torch.equal(v, raw.nets_.view.state_dict()[k])]
    assert moved and all(k.startswith('learning.') for k in moved)
    assert not any('running' in k for k in moved)


def test_seen_kinds_are_found_better_than_untrained(cloth):
    scores = [DevNet(epochs=n, device='cpu', verbose=False).fit(cloth.x_train, cloth.y_train)
              .decision_function(cloth.x_test) for n in (0, 30)]
    part = (cloth.y_test == 0) | np.isin(cloth.kinds_test, ['scratch', 'spot'])
    raw, trained = (auroc(cloth.y_test[part], s[part]) for s in scores)
    assert trained > .9 and trained > raw + .1


def test_a_file_holds_the_backbone_and_the_reference(cloth, tmp_path, monkeypatch):
    d = DevNet(epochs=1, device='cpu', verbose=False).fit(cloth.x_train, cloth.y_train)
    d.save(tmp_path/'d.safetensors')
    monkeypatch.setattr('ad_course.backbones.load_packaged', lambda *a: pytest.fail('loaded'))
    again = load(tmp_path/'d.safetensors')
    assert np.array_equal(again.decision_function(cloth.x_test), d.decision_function(cloth.x_test))
    assert torch.equal(again.reference_, d.reference_) and len(d.reference_) == 5000
    assert (tmp_path/'d.safetensors').stat().st_size < 8e6, 'only the stages that it uses'


def test_maps_light_up_where_the_defect_is():
    t = label_anomalies(surfaces(n_train=80, n_test=60, size=64, seed=0), 6, seed=0)
    d = DevNet(device='cpu', verbose=False).fit(t.x_train, t.y_train)
    spots = t.kinds_test == 'spot'
    maps, masks = d.anomaly_map(t.x_test[spots]), t.masks_test[spots].astype(bool)
    assert maps.shape == masks.shape
    gaps = [m[k].mean() - m[~k].mean() for m, k in zip(maps, masks)]
    assert min(gaps) > 0 and np.mean(gaps) > .5, gaps


def test_labels_are_needed(cloth): check_labels_needed(DevNet, cloth.x_train[:20], **SMALL)


@pytest.mark.parametrize('settings, name', [
    (dict(backbone='resnet19'), 'backbone'), (dict(stride=7), 'stride'), (dict(size=16), 'size'),
    (dict(thaw=4), 'thaw'), (dict(stride=4, thaw=2), 'thaw'), (dict(top_share=0), 'top_share'),
    (dict(top_share=1.1), 'top_share'), (dict(labelled_share=1.), 'labelled_share'),
    (dict(margin=0), 'margin'), (dict(n_reference=1), 'n_reference'), (dict(power=3), 'power'),
    (dict(weights='imagenet-v1'), 'weights'), (dict(backbone='vit_b_16'), 'backbone'),
    (dict(backbone=None, thaw=1), 'thaw'), (dict(width=0), 'width')], ids=str)
def test_wrong_settings(cloth, settings, name):
    with pytest.raises(ValueError, match=f'DevNet: {name} must be .*; got'):
        DevNet(**SMALL | settings).fit(cloth.x_train, cloth.y_train)


class Turned(DevNet):
    """Anomalies are pulled to the mean."""
    def map_loss(self, m, yb): return super().map_loss(m, 1 - yb)

class Deaf(DevNet):
    """Labels of the neighbor."""
    def map_loss(self, m, yb): return super().map_loss(m, yb.roll(1))


class Idle(DevNet):
    """Nothing moves."""
    def descend(self, player, loss, xb, *yb): return loss(xb, *yb)

class Negated(DevNet):
    """Lower is anomalous."""
    def image_score(self, xb): return -super().image_score(xb)


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('cls', [Turned, Deaf, Idle, Negated])
def test_mutant_of_the_detector_is_caught(cls):
    with pytest.raises(AssertionError, match='breaks'):
        check_detector(cls(**SMALL), only=['labels_matter', 'higher_is_anomalous', 'learns'],
                       shape=(1, 16, 16))
