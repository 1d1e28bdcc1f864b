"""Installs the package from settings.ini, the one place where it is described."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
config = ConfigParser(delimiters=['='])
config.read(here/'settings.ini', encoding='utf8')
cfg = config['DEFAULT']
words = lambda key: cfg.get(key, '').split()

setup(
    name=cfg['lib_name'], version=cfg['version'], description=cfg['description'], keywords=cfg['keywords'],
    author=cfg['author'], author_email=cfg['author_email'], url=cfg['git_url'], license='Apache-2.0',
    long_description=(here/'README.md').read_text(encoding='utf8') if (here/'README.md').exists() else cfg['description'],
    long_description_content_type='text/markdown',
    packages=find_packages(include=[cfg['lib_name'], f"{cfg['lib_name']}.*"]), include_package_data=True,
    python_requires=f">={cfg['min_python']}", install_requires=words('requirements'),
    extras_require=dict(dev=words('dev_requirements'), peers=words('peers_requirements'), browser=words('browser_requirements')),
    entry_points={'nbdev': [f"{cfg['lib_name']}={cfg['lib_name']}._modidx:d"]},
    zip_safe=False,
    classifiers=['Development Status :: 3 - Alpha', 'Intended Audience :: Education', 'Intended Audience :: Science/Research',
                 'Natural Language :: English',
                 'Programming Language :: Python :: 3', 'Topic :: Scientific/Engineering :: Artificial Intelligence'],
)
