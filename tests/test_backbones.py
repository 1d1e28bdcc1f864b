"""Backbones: frozen, normalized as torchvision does, and never silently another network."""
import hashlib
import sys

import numpy as np
import pytest
import torch
from sklearn.datasets import load_sample_image
from timm.data import ImageNetInfo
from torch import nn
from torchvision import models
from torchvision.transforms import functional as TF

from ad_course import backbones
from ad_course.backbones import (BACKBONES, MEAN, PACKAGED, STD, Backbone, backbone, check_file,
                                 features, load_empty, load_packaged, matched, packaged_file,
                                 weights_entry, weights_file)
from tests.mutants import assert_caught

NAMES = pytest.mark.parametrize('name', BACKBONES)
OF_TORCHVISION = pytest.mark.parametrize('name', sorted(BACKBONES.keys() - PACKAGED.keys()))
LITE = pytest.mark.parametrize('name', PACKAGED)


@pytest.fixture(scope='module')
def net():
    """A random ResNet-18 whose normalization has statistics of its own: a change would show."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = models.resnet18(weights=None).train()
        with torch.no_grad(): net(torch.rand(8, 3, 64, 64))
    return net.state_dict()


def images(*shape, seed=0): return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def make(cls, state, size=64):
    net = models.resnet18(weights=None)
    net.load_state_dict(state)
    return cls(net, 'resnet18', size)


# ---------------------------------------------------------------- promises and their mutants
def frozen(cls, state):
    b, x = make(cls, state), images(4, 3, 64, 64)
    before = {k: v.clone() for k, v in b.state_dict().items()}
    first = b(x)
    whole = nn.ModuleDict(dict(b=b, head=nn.Linear(512, 1))).train()
    whole.head(b(x)).sum().backward()
    assert not any(m.training for m in b.modules()) and whole.head.training
    assert all(torch.equal(v, before[k]) for k, v in b.state_dict().items())
    assert torch.equal(b(x), first)
    assert not any(p.requires_grad or p.grad is not None for p in b.parameters())


def alone_as_in_a_batch(cls, state):
    b, x = make(cls, state), images(5, 3, 64, 64)
    torch.testing.assert_close(b(x[:1]), b(x)[:1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(b(torch.cat([x[:1], 0 * x]))[:1], b(x)[:1], rtol=1e-4, atol=1e-5)


def gray_is_three_copies(cls, state):
    b, x = make(cls, state), images(2, 1, 40, 40)
    torch.testing.assert_close(b(x), b(x.repeat(1, 3, 1, 1)), rtol=1e-4, atol=1e-5)


def normalized_as_torchvision(cls, state):
    b = make(cls, state, 224)
    for side in (40, 224, 300):
        x = images(2, 3, side, side)
        theirs = weights_entry('resnet18').transforms(resize_size=224)(x)
        torch.testing.assert_close(b.prepare(x), theirs, rtol=0, atol=1e-5)
    x = images(2, 3, 50, 90)  # not square: squeezed as a whole
    whole = TF.normalize(TF.resize(x, [224, 224], antialias=True), MEAN, STD)
    torch.testing.assert_close(b.prepare(x), whole, rtol=0, atol=1e-5)


def features_before_the_classifier(cls, state):
    b, x, seen = make(cls, state), images(3, 3, 64, 64), []
    reference = models.resnet18(weights=None).eval()
    reference.load_state_dict(state)
    reference.fc.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad(): reference(TF.normalize(x, MEAN, STD))
    out = b(x)
    assert out.shape == (3, b.dim) and b.dim == 512
    torch.testing.assert_close(out, seen[0], rtol=1e-4, atol=1e-5)


def sees_the_whole_image(cls, state):
    b, x = make(cls, state), images(1, 3, 256, 256).requires_grad_()
    b.prepare(x).square().sum().backward()
    g = x.grad.abs().sum(1)[0]
    assert all(edge.max() > 0 for edge in (g[0], g[-1], g[:, 0], g[:, -1]))


PROMISES = [frozen, alone_as_in_a_batch, gray_is_three_copies, normalized_as_torchvision,
            features_before_the_classifier, sees_the_whole_image]


@pytest.mark.parametrize('promise', PROMISES, ids=lambda f: f.__name__)
def test_promise(promise, net): promise(Backbone, net)


class Obeys(Backbone):
    def train(self, mode=True): return nn.Module.train(self, mode)

class NeverEval(Backbone):
    def __init__(self, *args):
        super().__init__(*args)
        for m in self.modules(): m.training = True
    def train(self, mode=True): return self

class EvalOnlyOnTop(Backbone):
    def train(self, mode=True):
        nn.Module.train(self, mode)
        self.training = False
        return self

class WithGradients(Backbone):
    def __init__(self, *args):
        super().__init__(*args)
        self.requires_grad_(True)

class KeepsItsHead(Backbone):
    def __init__(self, net, *args):
        head = net.fc
        super().__init__(net, *args)
        self.net.fc = head.requires_grad_(False)

class ActivatedAgain(Backbone):
    def forward(self, x): return super().forward(x).tanh()

class NotNormalized(Backbone):
    def prepare(self, x): return super().prepare(x) * self.std + self.mean

class OneHalf(Backbone):
    def prepare(self, x): return (super().prepare(x) * self.std + self.mean - .5) / .5

class BlueFirst(Backbone):
    def prepare(self, x):
        whole = super().prepare(x) * self.std + self.mean
        return (whole - self.mean.flip(0)) / self.std.flip(0)

class NotAntialiased(Backbone):
    def prepare(self, x): return super().prepare(TF.resize(x, [self.size] * 2, antialias=False))

class Nearest(Backbone):
    def prepare(self, x):
        nearest = TF.InterpolationMode.NEAREST
        return super().prepare(TF.resize(x, [self.size] * 2, nearest))

class Crops(Backbone):
    def prepare(self, x):
        large = TF.resize(x, [self.size * 8 // 7] * 2, antialias=True)
        return super().prepare(TF.center_crop(large, [self.size] * 2))

class KeepsProportions(Backbone):
    def prepare(self, x): return super().prepare(TF.center_crop(x, [min(x.shape[-2:])] * 2))

class GrayIsRed(Backbone):
    def prepare(self, x):
        return super().prepare(torch.cat([x, 0 * x, 0 * x], 1) if x.shape[1] == 1 else x)

class ScaledByBatch(Backbone):
    def prepare(self, x): return super().prepare(x / x.max())


MUTANTS = {
    frozen: [Obeys, NeverEval, EvalOnlyOnTop, WithGradients],
    alone_as_in_a_batch: [NeverEval, ScaledByBatch],
    features_before_the_classifier: [KeepsItsHead, ActivatedAgain, NotNormalized],
    normalized_as_torchvision: [NotNormalized, OneHalf, BlueFirst, NotAntialiased, Nearest, Crops,
                                KeepsProportions],
    sees_the_whole_image: [Crops], gray_is_three_copies: [GrayIsRed]}
PAIRS = [(cls, promise) for promise, several in MUTANTS.items() for cls in several]


@pytest.mark.parametrize('broken, promise', PAIRS, ids=lambda m: m.__name__)
def test_mutant_is_caught(broken, promise, net):
    assert_caught(lambda cls: promise(cls, net), broken)


# ---------------------------------------------------------------- all networks
@NAMES
def test_features_have_the_promised_number(name):
    with torch.device('meta'):
        b = backbone(name, weights=None)
        assert b(torch.rand(2, 1, 8, 8)).shape == (2, b.dim) == (2, BACKBONES[name][0])
    tops = {k.split('.')[1] for k in b.state_dict()}
    assert not tops & {'fc', 'classifier', 'heads'}, 'the head is gone'


@OF_TORCHVISION
def test_prepare_is_torchvisions_transform_without_the_crop(name):
    b, x = Backbone(nn.Module(), name), images(2, 3, 60, 60)
    for weights in ('imagenet', 'imagenet-v1'):
        preset = weights_entry(name, weights).transforms
        assert tuple(preset().mean) == MEAN and tuple(preset().std) == STD and preset().antialias
        torch.testing.assert_close(b.prepare(x), preset(resize_size=224)(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize('name', ['efficientnet_b0', 'densenet121', 'efficientnet_lite0'])
def test_real_forward_of_other_families_is_frozen(name):
    b, x = backbone(name, 'random', size=32), images(3, 3, 32, 32)
    before = {k: v.clone() for k, v in b.state_dict().items()}
    assert torch.equal(b.train()(x), b(x)), 'dropout or batch statistics are on'
    assert all(torch.equal(v, before[k]) for k, v in b.state_dict().items())
    torch.testing.assert_close(b(x[:1]), b(x)[:1], rtol=1e-3, atol=1e-4)


def test_first_and_default_weights_are_two_sets():
    assert weights_entry('resnet152').name == 'IMAGENET1K_V2'
    assert weights_entry('resnet152', 'imagenet-v1').name == 'IMAGENET1K_V1'
    files = {weights_file('resnet18', w).name for w in ('imagenet', 'imagenet-v1')}
    assert files == {'resnet18-f37072fd.pth'}


@pytest.mark.parametrize('f', [weights_entry, weights_file])
@pytest.mark.parametrize('name, weights, message', [
    ('resnet19', 'imagenet', "name must be one of resnet18, .*; got 'resnet19'"),
    ('resnet50', 'imagnet', "got 'imagnet'"),
    ('resnet50', 'random', "weights must be 'imagenet' or 'imagenet-v1'; got 'random'"),
    ('resnet50', None, 'got None')])
def test_only_weights_that_exist_have_an_entry(f, name, weights, message):
    with pytest.raises(ValueError, match=message): f(name, weights)


# ---------------------------------------------------------------- sizes, types, devices, seeds
def test_size_zero_leaves_images_as_they_are(net):
    x = images(2, 3, 48, 70)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    assert torch.equal(make(Backbone, net, 0).prepare(x), (x - mean) / std)
    default = make(Backbone, net, None)
    assert default.size == 224 and default.prepare(x).shape == (2, 3, 224, 224)


@pytest.mark.parametrize('name, small', [('resnet18', 32), ('vit_b_16', 224)])
def test_a_shrunk_run_sees_small_images_where_no_size_is_asked_for(monkeypatch, name, small):
    monkeypatch.setenv('AD_COURSE_SMOKE', '1')
    assert backbone(name, weights=None).size == small
    assert backbone(name, weights=None, size=224).size == 224
    monkeypatch.delenv('AD_COURSE_SMOKE')
    assert backbone(name, weights=None).size == 224


def test_input_is_left_alone_and_gradients_reach_it(net):
    x = images(2, 1, 40, 40)
    kept = x.clone()
    b = make(Backbone, net)
    assert not b(x).requires_grad and torch.equal(x, kept)
    x.requires_grad_()
    b(x).sum().backward()
    assert x.grad.abs().sum() > 0


def test_a_block_may_be_thawed_on_purpose(net):
    """As PANDA does: the last block trains, all normalization stays as it is."""
    b, x = make(Backbone, net), images(2, 3, 64, 64)
    b.net.layer4.requires_grad_(True)
    b.train()(x).sum().backward()
    assert b.net.layer4[0].conv1.weight.grad is not None
    assert b.net.layer3[0].conv1.weight.grad is None
    assert not any(m.training for m in b.modules())


def test_double_precision_and_empty_batches(net):
    b, x = make(Backbone, net), images(2, 1, 32, 32)
    assert b(x[:0]).shape == (0, 512)
    double, single = b.double()(x.double()).float(), make(Backbone, net)(x)
    torch.testing.assert_close(double, single, rtol=1e-3, atol=1e-4)


def test_random_weights_follow_the_seed_and_empty_ones_leave_it_alone():
    def draw(seed):
        torch.manual_seed(seed)
        return backbone('efficientnet_b0', 'random', 32).state_dict()
    with torch.random.fork_rng():
        a, b, c = draw(1), draw(1), draw(2)
        assert all(torch.equal(a[k], b[k]) for k in a)
        assert not all(torch.equal(a[k], c[k]) for k in a)
        state = torch.get_rng_state()
        empty = backbone('efficientnet_b0', None, 32)
        assert torch.equal(torch.get_rng_state(), state)
    assert empty(images(1, 3, 32, 32)).isnan().all()
    assert all(p.isnan().all() for p in load_empty('densenet121').parameters())
    empty.load_state_dict(a)
    assert empty(images(1, 3, 32, 32)).isfinite().all()


def test_features_of_many_images(net):
    b, x = make(Backbone, net, 32), (255 * images(7, 1, 8, 8)).byte()
    out = features(b, x.numpy(), batch_size=3)
    assert out.shape == (7, 512) and out.dtype == 'float32'
    for found in (out, features(b, x.numpy() / 255)):
        torch.testing.assert_close(torch.from_numpy(found), b(x / 255), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match='scale float images'):
        features(b, x.numpy().astype('float32'))
    for size in (0, -1, 2.5, True, None):
        with pytest.raises(ValueError, match='batch_size must be a whole number, at least 1; got'):
            features(b, x.numpy(), batch_size=size)


@pytest.mark.parametrize('name, settings, message', [
    ('resnet19', {}, "name must be one of resnet18.*; got 'resnet19'"),
    *(('resnet18', dict(weights=w), 'weights must be one of') for w in (True, 'IMAGENET', 1)),
    *(('resnet18', dict(size=v), f'size must be None .*from 32; got {v!r}')
      for v in (31, -1, True, 64., '64')),
    ('vit_b_16', dict(size=448), 'size must be None, 0 or 224 for vit_b_16; got 448')], ids=str)
def test_wrong_arguments(name, settings, message):
    with pytest.raises(ValueError, match=message): backbone(name, **settings)


SQUARE = images(1, 3, 64, 64)


@pytest.mark.parametrize('x, message', [
    *((images(1, c, 64, 64), f'1 channel .* or 3 .*; got {c}') for c in (2, 4)),
    (images(3, 64, 64), r'images must be \(b, c, h, w\); got shape \(3, 64, 64\)'),
    *((SQUARE * v, r'pixels must be in \[0, 1\]; got') for v in (2, -1, float('nan'))),
    (SQUARE.byte(), 'bytes / 255; got torch.uint8')])
def test_wrong_images(x, message):
    b = Backbone(nn.Module(), 'resnet18')
    with pytest.raises(ValueError, match=message): b(x)


def test_sizes_that_a_network_cannot_see():
    for name, h, w, message in (('resnet18', 31, 64, 'see at least 32 pixels a side; got 31x64'),
                                ('vit_b_16', 32, 32, 'see 224x224 pixels; got 32x32')):
        b = Backbone(nn.Module(), name, 0)
        with pytest.raises(ValueError, match=message): b(images(1, 3, h, w))
    assert b.prepare(images(1, 3, 224, 224)).shape == (1, 3, 224, 224)
    b = Backbone(nn.Module(), 'resnet18', 64)
    b.size = 16
    with pytest.raises(ValueError, match='see at least 32 pixels a side; got 16x16$'):
        b(images(1, 3, 64, 64))


def test_a_whole_number_of_numpy_is_a_size():
    b = Backbone(nn.Module(), 'resnet18', np.int64(64))
    assert type(b.size) is int and b.prepare(images(1, 3, 40, 40)).shape == (1, 3, 64, 64)


# ---------------------------------------------------------------- weights, with files for a server
@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty cache, and a function that makes an address serve a file as weights of resnet18."""
    monkeypatch.setattr(torch.hub, '_hub_dir', str(tmp_path/'cache'))
    def serve(content, digits=None):
        digits = digits or hashlib.sha256(content).hexdigest()[:8]
        file = tmp_path/'server'/f'resnet18-{digits}.pth'
        if content:
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(content)
        monkeypatch.setattr(weights_entry('resnet18').value, 'url', file.as_uri())
        return tmp_path/'cache'/'checkpoints'/file.name
    return serve


@pytest.fixture
def content(net, tmp_path):
    """A file with the weights of `net`, as bytes."""
    torch.save(net, tmp_path/'w.pth')
    return (tmp_path/'w.pth').read_bytes()


def test_pretrained_weights_are_downloaded_checked_kept_and_used(hub, content, net, capfd):
    cached = hub(content)
    state = torch.get_rng_state()
    b = backbone('resnet18', size=64)
    assert torch.equal(torch.get_rng_state(), state)
    assert cached.exists() and cached == weights_file('resnet18')
    x = images(2, 3, 64, 64)
    assert torch.equal(b(x), make(Backbone, net)(x))
    assert not b.training and 'Downloading' in capfd.readouterr().out
    backbone('resnet18')  # from the cache
    assert 'Downloading' not in capfd.readouterr().out


def test_no_network_and_no_cache_is_an_error_that_says_what_to_put_where(hub):
    cached = hub(b'', 'f37072fd')
    with pytest.raises(RuntimeError) as caught: backbone('resnet18')
    said = str(caught.value)
    parts = 'resnet18', str(cached.parent), cached.name, 'file://', "weights='random'"
    assert all(part in said for part in parts), said
    assert caught.value.__cause__ is not None


ERRORS = ConnectionResetError('reset'), TimeoutError('slow'), backbones.HTTPException('odd')


@pytest.mark.parametrize('error', ERRORS)
def test_every_way_to_fail_is_the_same_error(hub, monkeypatch, error):
    hub(b'', 'f37072fd')
    def fail(*args, **kwargs): raise error
    monkeypatch.setattr(torch.hub, 'download_url_to_file', fail)
    with pytest.raises(RuntimeError, match='pretrained weights of resnet18 must be .*; got'):
        backbone('resnet18')


def test_the_weights_asked_for_are_the_weights_that_torchvision_loads(hub, monkeypatch):
    asked = []
    def asked_for(name, weights, progress): asked.append((name, weights.name))
    monkeypatch.setattr(models, 'get_model', asked_for)
    for weights in ('imagenet', 'imagenet-v1'): backbones._load_pretrained('resnet50', weights)
    assert asked == [('resnet50', 'IMAGENET1K_V2'), ('resnet50', 'IMAGENET1K_V1')]


def test_a_download_with_another_digest_is_refused(hub, content):
    cached = hub(content, 'f37072fd')
    with pytest.raises(RuntimeError, match='invalid hash'): backbone('resnet18')
    assert not cached.exists()


def test_a_damaged_file_in_the_cache_is_refused_before_it_is_opened(hub, content, monkeypatch):
    cached = hub(content)
    cached.parent.mkdir(parents=True)
    cached.write_bytes(content[:-1000])
    monkeypatch.setattr(torch, 'load', lambda *a, **k: pytest.fail('the file was opened'))
    with pytest.raises(RuntimeError, match='must begin with .*; got'): backbone('resnet18')


def test_check_file(tmp_path):
    good = tmp_path/f'net-{hashlib.sha256(b"abc").hexdigest()[:8]}.pth'
    good.write_bytes(b'abc')
    check_file(good)
    good.write_bytes(b'abd')
    with pytest.raises(RuntimeError, match='delete it'): check_file(good)
    for name in ('net-.pth', 'net.pth', 'net-ba7816b.pth', 'net-weights1.pth'):   # no such promise
        (tmp_path/name).write_bytes(b'abc')
        with pytest.raises(RuntimeError, match=f'the name of .*{name} must end in eight digits'):
            check_file(tmp_path/name)


# ---------------------------------------------------------------- weights from packages
SHARP = TF.InterpolationMode.BICUBIC


@pytest.fixture(scope='module')
def palace():
    """The middle square of scikit-learn's photograph of a palace: (1, 3, 427, 427)."""
    image = torch.from_numpy(load_sample_image('china.jpg').copy()).permute(2, 0, 1)[None]
    return TF.center_crop(image, 427) / 255


def first_word(net, x):
    return ImageNetInfo().index_to_description(int(net(x).argmax())).split(',')[0]


@LITE
def test_a_packaged_network_says_palace(name, palace):
    state = torch.get_rng_state()
    net = load_packaged(name)
    assert torch.equal(torch.get_rng_state(), state) and not net.training
    x = Backbone(nn.Module(), name).prepare(palace)
    assert x.shape[-1] == PACKAGED[name]
    with torch.no_grad(): assert first_word(net, x) == 'palace'


def test_a_backbone_gives_what_the_classifier_got(palace):
    b, net = backbone('efficientnet_lite0'), load_packaged('efficientnet_lite0')
    x = b.prepare(palace)
    wanted = net.forward_head(net.forward_features(x), pre_logits=True)
    torch.testing.assert_close(b(palace), wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(net.classifier(b(palace)), net(x), rtol=1e-5, atol=1e-5)


@LITE
def test_input_of_the_official_code(name):
    """(255 x - 127) / 128, bicubic, with antialiasing."""
    b, x = Backbone(nn.Module(), name), images(2, 3, 60, 80)
    seen = (255 * TF.resize(x, [PACKAGED[name]] * 2, SHARP, antialias=True) - 127) / 128
    torch.testing.assert_close(b.prepare(x), seen, rtol=0, atol=1e-5)


@pytest.mark.parametrize('broken', ['fewer', 'shape', 'name'])
def test_weights_that_do_not_match_are_refused(broken):
    place = {'a.weight': torch.zeros(3, 2), 'a.bias': torch.zeros(3)}
    found = {'x.weight': torch.ones(3, 2), 'x.bias': torch.ones(3)}
    assert torch.equal(matched(found, place)['a.bias'], torch.ones(3))
    if broken == 'fewer': found.pop('x.bias')
    if broken == 'shape': found['x.weight'] = torch.ones(2, 3)
    if broken == 'name': found = {'x.weight': found['x.weight'], 'x.running_mean': torch.ones(3)}
    with pytest.raises(ValueError, match='must be .*; got'): matched(found, place)


def test_packaged_weights_are_checked(monkeypatch, tmp_path):
    damaged = tmp_path/packaged_file('efficientnet_lite0').name
    damaged.write_bytes(packaged_file('efficientnet_lite0').read_bytes()[:-1])
    monkeypatch.setattr(backbones, 'packaged_file', lambda name: damaged)
    with pytest.raises(RuntimeError, match='The file is damaged'):
        backbone('efficientnet_lite0')


def test_a_packaged_network_is_read_once_and_everyone_gets_his_own():
    first, second = (load_packaged('efficientnet_lite0') for _ in range(2))
    with torch.no_grad(): first.conv_stem.weight.zero_()
    for net in (second, load_packaged('efficientnet_lite0')): assert net.conv_stem.weight.any()
    before = backbones._read.cache_info().misses
    load_packaged('efficientnet_lite0')
    assert backbones._read.cache_info().misses == before


def test_without_the_extra_an_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(backbones.importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(RuntimeError, match=r"pip install 'ad_course\[backbones\]'"):
        backbone('efficientnet_lite1')
    monkeypatch.setitem(sys.modules, 'timm', None)
    for weights in ('random', None):
        with pytest.raises(RuntimeError, match=r"must have timm.*ad_course\[backbones\]"):
            backbone('efficientnet_lite1', weights)


@LITE
def test_one_set_of_weights_and_no_entry_of_torchvision(name):
    with pytest.raises(ValueError, match="weights must be 'imagenet' for"):
        backbone(name, 'imagenet-v1')
    with pytest.raises(ValueError, match="come in a package"): weights_entry(name)
