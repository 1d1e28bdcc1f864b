"""Feature maps: the network's own layers at four strides, and a memory that is never stale."""
import numpy as np
import pytest
import timm
import torch
from torch import nn
from torchvision.transforms import InterpolationMode

from ad_course import feature_maps as module
from ad_course.backbones import Backbone, backbone, features
from ad_course.batches import Memory
from ad_course.detector import Detector
from ad_course.feature_maps import (STAGED, STRIDES, MapView, feature_maps, fingerprint,
                                    frozen_rows, kept, labelled_rows, maps, remembered, stages,
                                    to_pixels, usual_size)


def images(*shape, seed=0): return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope='module')
def lite(): return backbone('efficientnet_lite0', size=64)


# ---------------------------------------------------------------- maps
@pytest.mark.parametrize('name', STAGED)
def test_four_strides_of_every_network(name):
    with torch.device('meta'):
        b = backbone(name, weights=None, size=64)
        found = maps(b, torch.rand(2, 1, 64, 64), STRIDES)
    assert [m.shape[2:] for m in found] == [(64 // s, 64 // s) for s in STRIDES]
    widths = [m.shape[1] for m in found]
    assert widths == sorted(widths) and widths[0] < widths[2]


@pytest.mark.parametrize('name', STAGED)
def test_stages_hold_each_layer_once_and_all_before_the_head(name):
    b = backbone(name, weights=None, size=64)
    held = [id(p) for stage in stages(b) for p in stage.parameters()]
    assert len(held) == len({*held})
    left = {k.split('.')[0] for k, p in b.net.named_parameters() if id(p) not in {*held}}
    assert left == ({'conv_head', 'bn2'} if 'lite' in name else set())


def test_the_last_map_of_a_densenet_is_what_its_mean_sees():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        b = backbone('densenet121', 'random', 64)
    (m,) = maps(b, images(2, 3, 64, 64), (32,))
    torch.testing.assert_close(m.mean((2, 3)), b(images(2, 3, 64, 64)), rtol=1e-4, atol=1e-5)


def test_maps_of_the_pretrained_network_are_timms(lite):
    x = images(2, 3, 64, 64)
    reference = timm.create_model('tf_efficientnet_lite0', features_only=True,
                                  out_indices=(1, 2, 3, 4))
    reference.load_state_dict(lite.net.state_dict(), strict=False)
    for ours, theirs in zip(maps(lite, x, STRIDES), reference.eval()(lite.prepare(x))):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_order_is_that_of_the_strides_asked_for(lite):
    x = images(2, 1, 64, 64)
    eight, four = maps(lite, x, (8, 4))
    assert four.shape[2:] == (16, 16) and eight.shape[2:] == (8, 8)
    assert torch.equal(eight, maps(lite, x, (8,))[0])


def test_the_network_runs_no_further_than_asked(lite, monkeypatch):
    last = stages(lite)[-1]
    monkeypatch.setattr(last[0][0], 'forward', lambda x: pytest.fail('the last stage ran'))
    maps(lite, images(1, 1, 64, 64), (4, 16))


def test_gradients_reach_the_image_and_nothing_moves(lite):
    x = images(2, 1, 64, 64).requires_grad_()
    before = fingerprint(lite)
    nn.ModuleDict(dict(b=lite)).train()
    maps(lite, x)[0].sum().backward()
    assert x.grad.abs().sum() > 0 and fingerprint(lite) == before


@pytest.mark.parametrize('strides', [(), (2,), (16, 5), (64,)])
def test_other_strides_are_refused(lite, strides):
    with pytest.raises(ValueError, match=r'strides must be some of \(4, 8, 16, 32\); got'):
        maps(lite, images(1, 1, 64, 64), strides)


@pytest.mark.parametrize('strides', [16, 16.])
def test_one_stride_is_no_tuple(lite, tmp_path, strides):
    x = images(1, 1, 64, 64)
    for call in (lambda: maps(lite, x, strides), lambda: feature_maps(lite, x.numpy(), strides),
                 lambda: kept(lite, x.numpy(), strides, tmp_path)):
        with pytest.raises(ValueError, match=r'strides must be a tuple such as \(16,\); got 16'):
            call()
    with pytest.raises(ValueError, match='strides must be some of'):
        kept(lite, x.numpy(), (5,), tmp_path)
    assert len(kept(lite, x.numpy(), [16, 8], tmp_path)) == 2


def test_a_transformer_has_no_stages():
    with pytest.raises(ValueError, match='a network with stages; got vit_b_16'):
        stages(backbone('vit_b_16', None))


# ---------------------------------------------------------------- many images, kept
def test_many_images_in_batches(lite):
    x = (255 * images(5, 1, 64, 64)).byte().numpy()
    four, sixteen = feature_maps(lite, x, (4, 16), batch_size=2)
    assert four.shape == (5, 24, 16, 16) and sixteen.shape == (5, 112, 4, 4)
    (whole,) = maps(lite, torch.from_numpy(x) / 255, (16,))
    np.testing.assert_allclose(sixteen, whole, rtol=1e-4, atol=1e-5)
    for size in (0, True, 1.5):
        with pytest.raises(ValueError, match='batch_size must be a whole number, at least 1'):
            feature_maps(lite, x, (16,), size)


@pytest.fixture
def counted(monkeypatch):
    """How often features were really computed."""
    calls, real = [], module.features
    monkeypatch.setattr(module, 'features', lambda *a: calls.append(1) or real(*a))
    return calls


def test_kept_features_are_computed_once(lite, tmp_path, counted):
    x = images(3, 1, 64, 64).numpy()
    first = kept(lite, x, folder=tmp_path)
    again = kept(lite, x.copy(), folder=tmp_path, batch_size=1)
    assert np.array_equal(again, first) and len(counted) == 1
    np.testing.assert_array_equal(first, features(lite, x))


@pytest.mark.parametrize('what', ['pixel', 'order', 'weight', 'size', 'statistics'])
def test_nothing_stale_comes_back(lite, tmp_path, what):
    x, b = images(3, 1, 64, 64).numpy(), lite
    kept(b, x, folder=tmp_path)
    if what == 'pixel': x = x.copy(); x[0, 0, 0, 0] = 1
    if what == 'order': x = x[::-1].copy()
    if what == 'size': b = backbone(b.name, size=32)
    if what in ('weight', 'statistics'):
        b = backbone(b.name, size=64)
        tensor = b.net.conv_head.weight if what == 'weight' else b.net.bn2.running_mean
        with torch.no_grad(): tensor += .01
    np.testing.assert_array_equal(kept(b, x, folder=tmp_path), features(b, x))
    assert not np.array_equal(features(b, x), features(lite, images(3, 1, 64, 64).numpy()))


def test_maps_of_other_code_are_not_found(lite, tmp_path, monkeypatch):
    x = images(2, 1, 64, 64).numpy()
    (first,) = kept(lite, x, [16], tmp_path)
    real = module.maps
    def maps(b, xb, strides=(16,)): return [2 * m for m in real(b, xb, strides)]
    monkeypatch.setattr(module, 'maps', maps)
    module._code.cache_clear()
    try: (second,) = kept(lite, x, [16], tmp_path)
    finally: module._code.cache_clear()
    np.testing.assert_allclose(second, 2 * first, rtol=1e-5)


@pytest.mark.parametrize('what', ['resizing', 'timm'])
def test_other_resizing_and_another_timm_are_other_code(monkeypatch, what):
    module._code.cache_clear()
    before = module._code()
    if what == 'timm':
        real = module.version
        monkeypatch.setattr(module, 'version', lambda name: '0' if name == 'timm' else real(name))
    else: monkeypatch.setattr(module, 'trained_on', lambda name: 'another way')
    module._code.cache_clear()
    try: assert module._code() != before
    finally: module._code.cache_clear()


def test_code_has_a_digest_without_timm(monkeypatch):
    real = module.version
    def version(name):
        if name == 'timm': raise module.PackageNotFoundError(name)
        return real(name)
    monkeypatch.setattr(module, 'version', version)
    module._code.cache_clear()
    try: assert len(module._code()) == 64
    finally: module._code.cache_clear()


def test_fingerprint_knows_the_resizing():
    b = backbone('efficientnet_lite0', size=64)
    before = fingerprint(b)
    b.interpolation = InterpolationMode.BILINEAR
    assert fingerprint(b) != before


@pytest.mark.parametrize('what', ['mean', 'std'])
def test_fingerprint_knows_the_constants(what):
    b = backbone('efficientnet_lite0', size=64)
    before = fingerprint(b)
    getattr(b, what).mul_(1.01)
    assert fingerprint(b) != before


def test_strides_are_kept_apart(lite, tmp_path):
    x = images(2, 1, 64, 64).numpy()
    (eight,), (four,) = (kept(lite, x, [s], tmp_path) for s in (8, 4))
    assert eight.shape[2:] == (8, 8) and four.shape[2:] == (16, 16)
    assert kept(lite, x, folder=tmp_path).shape == (2, 1280)


def test_a_damaged_file_is_computed_anew(lite, tmp_path, counted):
    x = images(2, 1, 64, 64).numpy()
    first = kept(lite, x, folder=tmp_path)
    (file,) = tmp_path.rglob('output.pkl')
    file.write_bytes(file.read_bytes()[:100])
    again = kept(lite, x, folder=tmp_path)
    assert np.array_equal(again, first) and len(counted) == 2


def test_the_usual_folder(lite, tmp_path, monkeypatch):
    monkeypatch.setenv('AD_COURSE_DATA', str(tmp_path))
    kept(lite, images(2, 1, 64, 64).numpy())
    assert list((tmp_path/'features').rglob('output.pkl'))


# ---------------------------------------------------------------- what a head looks at
def view_of(name='efficientnet_lite0', **kw):
    view = MapView((1, 64, 64), name, **kw)
    view.load()
    return view


@pytest.mark.parametrize('thaw', [0, 1, 3])
def test_a_view_is_the_network_cut_in_two(lite, thaw):
    view, x = view_of(thaw=thaw), images(2, 1, 64, 64)
    (m,) = maps(lite, x, (16,))
    torch.testing.assert_close(view.learned(view.frozen(x)), m)
    assert torch.equal(view(x), view.learned(view.frozen(x))) and view.dim == m.shape[1]
    learn = [k for k, p in view.named_parameters() if p.requires_grad]
    assert all(k.startswith('learning.') for k in learn) and bool(learn) == bool(thaw)


@pytest.mark.parametrize('settings, message', [
    *((dict(thaw=v), f'thaw must be a whole number from 0 to 3; got {v!r}')
      for v in (4, -1, 1.5, True, None)),
    (dict(stride=4, thaw=2), 'thaw must be a whole number from 0 to 1; got 2'),
    *((dict(stride=v), r'stride must be one of \(4, 8, 16, 32\); got') for v in (5, None, '16'))],
    ids=str)
def test_wrong_views_are_refused(settings, message):
    with pytest.raises(ValueError, match=message): MapView((1, 64, 64), **settings)


def test_a_thawed_stage_moves_and_its_statistics_do_not():
    view = view_of(thaw=1)
    before = {k: v.clone() for k, v in view.state_dict().items()}
    view.train()(images(4, 1, 64, 64)).square().mean().backward()
    with torch.no_grad():
        for p in view.parameters():
            if p.grad is not None: p -= .1 * p.grad
    moved = {k for k, v in view.state_dict().items() if not torch.equal(v, before[k])}
    assert moved and all(k.startswith('learning.') for k in moved)
    assert not any('running' in k or 'tracked' in k for k in moved)


def test_the_scale_is_one_number_and_can_be_taken_twice():
    view = view_of()
    m = view(images(6, 1, 64, 64)).detach()
    for _ in range(2):
        view.standardize(view(images(6, 1, 64, 64)).detach())
        torch.testing.assert_close(view.mean, m.mean((0, 2, 3)).view(-1, 1, 1))
        torch.testing.assert_close(view.scale, m.var((0, 2, 3)).mean().sqrt())
    assert view.scale.shape == ()


@pytest.mark.parametrize('shape, size', [((1, 8, 8), 64), ((1, 100, 100), 128),
                                         ((3, 256, 200), 256), ((1, 30, 70), 96)])
def test_usual_sizes(shape, size): assert usual_size(shape) == size


def test_a_network_from_scratch_learns_all():
    view, x = MapView((2, 12, 20), None, width=4), images(3, 2, 12, 20)
    assert view(x).shape == (3, view.dim, 3, 5) == (3, 16, 3, 5)
    assert torch.equal(view.frozen(x), x) and all(p.requires_grad for p in view.parameters())
    view.load()


def test_an_empty_view_says_nan_and_a_loaded_one_keeps_its_words(tmp_path):
    empty, full, x = MapView((1, 64, 64)), view_of(), images(2, 1, 64, 64)
    assert empty(x).isnan().all()
    empty.load_state_dict(full.state_dict())
    assert torch.equal(empty(x), full(x))


def test_to_pixels_keeps_what_is_flat_and_where_it_is():
    flat = to_pixels(torch.full((2, 4, 5), .3), (1, 16, 20))
    assert flat.shape == (2, 16, 20)
    torch.testing.assert_close(flat, torch.full((2, 16, 20), .3))
    m = torch.zeros(1, 4, 4)
    m[0, 1, 2] = 1
    found = to_pixels(m, (1, 32, 32))[0]
    assert tuple(np.unravel_index(found.argmax(), found.shape)) in {(i, j) for i in range(8, 16)
                                                                   for j in range(16, 24)}


def test_to_pixels_by_hand():
    """Bilinear, a place being the middle of its pixels: 0 and 4 become 0, 1, 3, 4."""
    found = to_pixels(torch.tensor([[[0., 4], [0, 4]]]), (1, 4, 4))[0]
    torch.testing.assert_close(found, torch.tensor([0., 1, 3, 4]).expand(4, 4))


def test_frozen_rows_of_a_detector_take_the_scale_from_normal_images():
    x = np.concatenate([images(12, 1, 64, 64).numpy() / 2, np.ones((4, 1, 64, 64), 'float32')])
    y, found = np.repeat([0, 1], [12, 4]), {}

    class Looks(Detector):
        uses_labels, weights = True, 'imagenet'
        def networks(self, shape): return dict(view=MapView(shape))
        def train(self, data): found['rows'], found['y'] = frozen_rows(self, data)
        def image_score(self, xb): return self.nets_.view(xb).mean((1, 2, 3))

    view = Looks(verbose=False).fit(x, y).nets_.view
    assert found['y'].tolist() == y.tolist() and found['rows'].shape == (16, 112, 4, 4)
    normal = view(torch.tensor(x[:12])).detach()
    assert normal.mean((0, 2, 3)).abs().max() < 1e-3
    assert abs(normal.var((0, 2, 3)).mean() - 1) < 1e-2


@pytest.fixture
def looked(monkeypatch):
    """How often a view really looked."""
    calls, real = [], Backbone.prepare
    monkeypatch.setattr(Backbone, 'prepare', lambda *a: calls.append(1) or real(*a))
    return calls


def test_what_was_seen_is_remembered_until_the_end(looked):
    one, other, x = view_of(), view_of(), images(3, 1, 64, 64)
    with torch.no_grad():
        wanted = one.frozen(x)
        with remembered():
            with remembered(): first = one.frozen(x)
            again = other.frozen(x.clone())         # another view, the same weights and pixels
            assert len(looked) == 2 and torch.equal(again, first) and torch.equal(first, wanted)
        one.frozen(x)
    assert len(looked) == 3


@pytest.mark.parametrize('what', ['pixel', 'weight', 'statistics', 'size', 'thaw', 'grad'])
def test_nothing_else_is_taken_for_it(looked, what):
    one, x = view_of(), images(3, 1, 64, 64)
    settings = dict(size=dict(size=96), thaw=dict(thaw=1)).get(what, {})
    other, new = view_of(**settings), x
    with torch.no_grad():
        if what == 'pixel': new = x.clone(); new[0, 0, 0, 0] = 1
        if what == 'weight': other.fixed[0][0].weight[0, 0, 0, 0] += 1
        if what == 'statistics': other.fixed[0][1].running_mean[0] += 1
    if what == 'grad': new = x.clone().requires_grad_()
    with remembered():
        with torch.no_grad(): one.frozen(x)
        found = other.frozen(new)
    assert len(looked) == 2
    torch.testing.assert_close(found, other.frozen(new))
    assert found.requires_grad == (what == 'grad')


def test_labelled_rows_recur_and_are_missed(lite):
    class Learner:
        weights, nets_ = 'imagenet', nn.ModuleDict(dict(view=view_of()))
        def each_batch(self, f, data):
            with torch.no_grad(): yield from ((f(x), y) for x, y in data.batches(8))
    x = images(12, 1, 64, 64)
    y = torch.tensor([0] * 10 + [1, 1])
    rows = labelled_rows(Learner(), Memory(x.numpy(), y), .5)
    assert len(rows) == 20 and torch.bincount(rows.y[rows.order]).tolist() == [10, 10]
    fifth = labelled_rows(Learner(), Memory(x.numpy(), y), .2)
    assert torch.bincount(fifth.y[fifth.order]).tolist() == [10, 2]
    with pytest.raises(ValueError, match='Learner learns from labelled anomalies: .*AE'):
        labelled_rows(Learner(), Memory(x.numpy(), torch.zeros(12, dtype=torch.long)))
