"""What a community expects around the code: citation, changes, how to contribute, templates."""
import re

import pytest
import yaml

from .project import ROOT, notebooks, settings
from .test_site import fault, links

FORMS = sorted((ROOT/'.github'/'ISSUE_TEMPLATE').glob('*.yml'))


def text(name): return (ROOT/name).read_text(encoding='utf8')


def test_the_citation_is_that_of_the_settings_and_of_the_landing_page():
    cite, ini = yaml.safe_load(text('CITATION.cff')), settings()
    assert cite['version'] == ini['version'] and cite['repository-code'] == ini['git_url']
    assert cite['authors'] == [dict(name=ini['author'])] and cite['cff-version'] == '1.2.0'
    assert cite['url'] == ini['doc_host'] + ini['doc_baseurl']
    title = re.search(r'title += \{(.*)\}', text('README.md'))[1].replace('\\_', '_')
    assert cite['title'] == title


def test_the_changes_begin_with_the_version_that_is_here():
    first = re.search(r'^## (.*)$', text('CHANGELOG.md'), re.M)[1]
    assert settings()['version'] in first


@pytest.mark.parametrize('name', ['CONTRIBUTING.md', 'CHANGELOG.md'])
def test_links_of_these_pages_resolve(name):
    assert not [t for t in links(text(name)) if fault(t, ROOT, text(name))]


def test_what_the_page_tells_to_type_exists():
    page, make = text('CONTRIBUTING.md'), text('Makefile')
    targets = set(re.findall(r'(?:^|`)make (\w+)', page, re.M))
    assert {'lab', 'test', 'notebooks', 'sync'} <= targets
    assert not [t for t in targets if not re.search(rf'^{t}:', make, re.M)]
    paths = re.findall(r'nbs/[\w/]+\.\w+', page)
    assert paths and not [p for p in paths if not (ROOT/p).exists()]


def test_the_changes_name_every_part():
    parts = {n.path.parent.name for n in notebooks() if n.path.parent.name[0].isdigit()}
    said = text('CHANGELOG.md')
    assert not [p for p in parts if p[0] != '0' and f'Part {p[0]},' not in said]


@pytest.mark.parametrize('path', [f for f in FORMS if f.stem != 'config'], ids=lambda f: f.stem)
def test_forms_ask_for_what_an_answer_needs(path):
    form = yaml.safe_load(path.read_text(encoding='utf8'))
    assert form['name'] and form['description']
    ids = [field['id'] for field in form['body']]
    assert len(set(ids)) == len(ids) and all(f['attributes']['label'] for f in form['body'])
    assert sum(f.get('validations', {}).get('required', False) for f in form['body']) >= 2


def test_the_workflow_installs_what_the_notebooks_need():
    flow = yaml.safe_load(text('.github/workflows/test.yml'))
    steps = ' '.join(s.get('run', '') for s in flow['jobs']['test']['steps'])
    assert all(extra in steps for extra in ('dev', 'backbones', 'browser', 'python -m tests'))
