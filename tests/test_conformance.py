"""Every public detector of the package keeps the contract: none can be forgotten.

They are enumerated, not listed. Where the chapter that exports a detector holds it to all promises
itself, in a cell that the tests run, that is enough. The others are held to them here, with SMALL
settings on digits of 8x8, unless a table says otherwise; other settings are the business of a
chapter's tests."""
import ast
import importlib
import inspect

import numpy as np
import pytest

from ad_course.check import check_detector, needed_settings
from ad_course.detector import Detector, known_detectors
from ad_course.feature_maps import remembered

from .project import modules, notebooks, settings

LIB = settings()['lib_path']
MODULES = {name: importlib.import_module(f'{LIB}.{name}') for name in modules()}


def title(cls):
    """'deepsvdd.LeNetSVDD' for a class of the package."""
    return f'{cls.__module__.rpartition(".")[2]}.{cls.__name__}'


# What most detectors need to learn something of 120 small images, in a second or two.
SMALL = dict(epochs=40, batch_size=32)
# Those that need something else, in the place of SMALL: mostly the settings of their chapters.
# Trained faster, the official network ranks worse than an untrained one: many small steps.
LENET = dict(epochs=8, pretrain_epochs=8, batch_size=20, lr=2e-4, pretrain_lr=2e-4)
SETTINGS = {
    'achc.ACHC': dict(width=8, wraps=500, epochs=10, warm_up=10),
    'advae.AdVAE': dict(epochs=25, batch_size=32, lr=3e-3, n_draws=2),
    'alad.ALAD': dict(epochs=60, width=8),
    'bigan.BiGAN': dict(epochs=60),
    'cwdsvdd.CWDSVDD': dict(arch='mlp'),
    'dae.SDAE': dict(epochs=60, batch_size=32),
    'deepsvdd.DeepSVDD': dict(),
    'deepsvdd.LeNetSVDD': LENET,
    'ganomaly.GANomaly': dict(epochs=60),
    'localize.MapAE': dict(epochs=40, batch_size=32, smoothing=1, top=.1),
    'localize.SSIMAE': dict(epochs=30, batch_size=32, top=.2),
    'msc.MSC': dict(size=32, lr=1e-4, epochs=4, batch_size=64, n_views=2),
    'panda.PANDA': dict(size=32, lr=1e-4, epochs=2, batch_size=64, n_fisher_images=2),
    'pretrained.DN2': dict(size=32),
    'pretrained.Mahalanobis': dict(size=32),
    'pretrained.NearestPatches': dict(),
    'rda.RDA': dict(epochs=20, batch_size=32, lr=3e-3),
}
# (c, h, w) of the images for those that do not take 8x8.
SHAPES = {'deepsvdd.LeNetSVDD': (1, 28, 28)}
# Classes that others complete: there is nothing to fit.
BASES = {'ae.Reconstructor', 'baselines.ClosedForm', 'classical.Kernelized', 'classical.OnFeatures',
         'feature_maps.OnMaps', 'localize.MapScore', 'own_backbone.OnOwn',
         'pretrained.OnPooled'}

OWN = {title(c): c for c in known_detectors() if c.__module__.startswith(f'{LIB}.')}
DETECTORS = sorted(OWN)


def held(tree):
    """Names of the classes that a cell holds to all promises: `check_detector(AE(...))`."""
    calls = [c for c in ast.walk(tree) if isinstance(c, ast.Call) and c.args
             and isinstance(c.func, ast.Name) and c.func.id == 'check_detector']
    whole = [c.args[0] for c in calls if len(c.args) == 1
             and not any(k.arg in (None, 'only') for k in c.keywords)]
    return {m.func.id for m in whole if isinstance(m, ast.Call) and isinstance(m.func, ast.Name)}


# Promises that are proven where the class is written; they need no second proof here.
CHAPTERS = {f'{n.module}.{name}' for n in notebooks() for c in n.code_cells if c.runs()
            for name in held(c.tree)}


def exported():
    """Title -> class, of all detectors that the modules export."""
    things = [getattr(module, name) for module in MODULES.values() for name in module.__all__]
    classes = [c for c in things if inspect.isclass(c) and issubclass(c, Detector)]
    return {title(c): c for c in classes if c is not Detector}


# One promise fits images that are all alike, one gives an image two labels: both are warned of.
@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('name', sorted({*DETECTORS} - CHAPTERS))
def test_keeps_every_promise(name):
    detector = OWN[name](**SETTINGS.get(name, SMALL))
    with remembered():   # some look through a frozen network, at the same images in each fit
        check_detector(detector, shape=SHAPES.get(name, (1, 8, 8)))


@pytest.mark.parametrize('cell, found', [
    ("print(len(check_detector(AE(epochs=3))), 'kept')", {'AE'}),
    ('check_detector(AE(), shape=(1, 16, 16))', {'AE'}),
    ("check_detector(AE(), only=['learns'])", set()),
    ("check_detector(AE(), ['learns'])", set()),
    ('check_detector(AE(), **some)', set()),
    ('check_detector(trial)', set()),
    ('def check_detector(AE): pass', set())])
def test_a_cell_that_holds_a_class_to_all_promises(cell, found):
    assert held(ast.parse(cell)) == found


# Other modes of a method, in which each hyper-parameter must act as well.
MODES = {
    'aae.AAE': [dict(consistency_weight=.5, prior_weight=.5)],
    'cae.CAE': [dict(jacobian='random', penalize='reconstruction'), dict(arch='mlp', tied=False)],
    'classical.OCSVM': [dict(kernel='linear', components=.9)],
    'cwdsvdd.CWDSVDD': [dict(features='pca', rule='connected')],
    'dae.DAE': [dict(corruption='gaussian')],
    'deepsvdd.DeepSVDD': [dict(objective='soft-boundary', arch='mlp')],
    'rsrae.RSRAE': [dict(alternate=True)],
    'vae.VAE': [dict(scoring='importance', sigma=.3), dict(scoring='reconstruction', beta=0.)],
}


@pytest.mark.parametrize('name, mode', [(name, mode) for name in MODES for mode in MODES[name]])
def test_every_hyper_parameter_acts_in_every_mode(name, mode):
    detector = OWN[name](**SETTINGS.get(name, SMALL) | mode)
    check_detector(detector, only=['parameters_act'])


def test_every_exported_detector_is_examined_or_known_to_be_a_base():
    public = exported().keys()
    assert len(DETECTORS) > 20 and not set(DETECTORS) - public
    assert not (offered := BASES & OWN.keys()), f'offered as detectors: {offered}'
    assert not (forgotten := public - set(DETECTORS) - BASES), f'not examined: {forgotten}'
    assert not (gone := BASES - public), f'no such bases: {gone}'


def test_the_tables_name_detectors_that_exist():
    wrong = (SETTINGS.keys() | SHAPES.keys() | MODES.keys()) - set(DETECTORS)
    assert not wrong, f'no such detectors: {sorted(wrong)}'


@pytest.mark.parametrize('name', DETECTORS)
def test_what_needs_other_settings_names_hyper_parameters(name):
    params = OWN[name]().get_params().keys()
    needs = needed_settings(OWN[name])
    named = needs.keys() | {k for beside in needs.values() for k in beside or ()}
    assert not (unknown := named - params - {'max_gb'}), f'no such hyper-parameters: {unknown}'


@pytest.mark.parametrize('name', sorted(BASES))
def test_a_base_has_nothing_to_fit(name):
    images = np.random.default_rng(0).random((10, 8, 8))
    with pytest.raises(NotImplementedError): exported()[name](verbose=False).fit(images)
