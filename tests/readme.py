"""README.md from nbs/index.ipynb, without Quarto.   python -m tests.readme

nbdev's own command needs Quarto and writes the pictures of the outputs beside the README; here they
go to nbs/images, and links that hold from nbs/ are rewritten so that they hold from the
repository's root."""
import base64
import posixpath
import re
import sys
from pathlib import Path

from .project import ROOT, settings

TARGET = re.compile(r'''(?P<head>\]\(|\b(?:src|href)=["'])(?P<target>[^)\s"']+)''')
LEFT_ALONE = re.compile(r'^([a-zA-Z][\w+.-]*:|//|#)')
NOTICE = '<!-- Made from {} by `make readme`. Edit the notebook, not this file. -->\n\n'


def rebase(text, folder):
    """Links and images relative to `folder` become relative to the root.

    Addresses, anchors and code stay as they are."""
    def moved(match):
        target = match['target']
        if LEFT_ALONE.match(target): return match[0]
        path, hash_, anchor = target.partition('#')
        return match['head'] + posixpath.normpath(posixpath.join(folder, path)) + hash_ + anchor
    pieces = re.split(r'(^```.*?^```|`[^`\n]+`)', text, flags=re.M | re.S)
    return ''.join(p if i % 2 else TARGET.sub(moved, p) for i, p in enumerate(pieces))


def flags_of(cell):
    """The directives of a cell by name, with the words that follow."""
    if cell.cell_type != 'code': return {}
    found = re.findall(r'^[ \t]*#[ \t]*\|[ \t]*([\w-]+:?)[ \t]*(.*)$', cell.source, re.M)
    return {name: rest.strip() for name, rest in found}


def left_out(cell, flags):
    """Whether a README does not show a cell."""
    hidden = flags.keys() & {'hide', 'default_exp'} or flags.get('include:') == 'false'
    return bool(hidden) or cell.cell_type == 'raw'


def prepared(nb, folder):
    """The notebook's cells as a README shows them, and the pictures by path from the root."""
    cells, pictures = [], {}
    for number, cell in enumerate(nb.cells):
        if left_out(cell, flags := flags_of(cell)): continue
        if cell.cell_type == 'markdown':
            if number == 0:
                cell.source = re.sub(r'^>\s?', '', cell.source, flags=re.M).replace('\n', '\n\n', 1)
            cell.source = rebase(cell.source, folder)
        else:
            cell.source = re.sub(r'^[ \t]*#[ \t]*\|.*\n?', '', cell.source, flags=re.M).strip()
            if flags.get('echo:') == 'false' or 'hide_input' in flags: cell.source = ''
            if flags.get('output:') == 'false' or 'hide_output' in flags: cell.outputs = []
            for i, output in enumerate(cell.outputs):
                data = output.get('data', {})
                png = data.get('image/png')
                if not png: continue
                name = posixpath.join(folder, 'images', f'index_{cell.id}_{i}.png')
                pictures[name] = base64.b64decode(png)
                output.data = {'text/markdown': f'![]({name})'}
        cells.append(cell)
    nb.cells = cells
    nb.metadata['language_info'] = dict(name='python')
    return nb, pictures


def render(root=ROOT):
    """What the README and its pictures should be: bytes by path from the root."""
    import nbformat
    from nbconvert import MarkdownExporter
    folder, name = settings(root)['nbs_path'], 'index.ipynb'
    nb, pictures = prepared(nbformat.read(root/folder/name, as_version=4), folder)
    exporter = MarkdownExporter(exclude_input_prompt=True, exclude_output_prompt=True)
    text, _ = exporter.from_notebook_node(nb)
    text = re.sub(r'^```python\n+```$', '', text, flags=re.M)
    text = re.sub(r'[ \t]+$', '', text, flags=re.M)
    text = re.sub(r'\n{3,}', '\n\n', text).strip()
    text = NOTICE.format(posixpath.join(folder, name)) + text + '\n'
    return {'README.md': text.encode('utf8'), **pictures}


def write(root=ROOT):
    """Writes README.md and its pictures, and says what it wrote."""
    made = render(root)
    images = root/settings(root)['nbs_path']/'images'
    for old in images.glob('index_*.png'):
        if old.relative_to(root).as_posix() not in made: old.unlink()
    for name, data in made.items():
        target = Path(root, name)
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists() or target.read_bytes() != data: target.write_bytes(data)
    return sorted(made)


if __name__ == '__main__':
    if not (ROOT/settings()['nbs_path']/'index.ipynb').exists():
        sys.exit('nbs/index.ipynb, from which README.md is made, is not there')
    print('wrote', ', '.join(write()))
