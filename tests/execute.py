"""Runs notebooks again and keeps their new outputs.

  python -m tests.execute [nbs/1_autoencoders/11_ae.ipynb ...]

Without a name, all notebooks in order. Cells that nbdev_test leaves out (notest, slow, cuda, eval:
false) keep the outputs they have; AD_COURSE_RUN=slow runs those of that flag too. Pictures are kept
with a palette of 256 colors, at less than half the size. A notebook is written only when all its
cells have passed, and in one step: one that fails stays as it was."""
import base64
import io
import os
import sys
import time
from pathlib import Path

from . import sync
from .project import QUIET, ROOT, SMOKE_FLAGS, Cell, environment, notebook_paths


def small(png):
    """A base64 PNG with a palette of 256 colors.

    No pixel changes visibly, by 5 of 255 at most on the course's figures."""
    from PIL import Image
    raw, new = base64.b64decode(png), io.BytesIO()
    image = Image.open(io.BytesIO(raw)).convert('RGB')
    method, dither = Image.Quantize.MAXCOVERAGE, Image.Dither.NONE
    image.quantize(256, method=method, dither=dither).save(new, 'PNG', optimize=True)
    return base64.b64encode(min(raw, new.getvalue(), key=len)).decode() + '\n'


def execute(path, limit=1800):
    """Runs the notebook at `path` in a fresh kernel, in its own folder.

    It replaces the file when all went well."""
    import nbformat
    from nbclient import NotebookClient
    asked = os.environ.get('AD_COURSE_RUN', '').replace(',', ' ').split()
    left_out = {'notest', *SMOKE_FLAGS} - {*asked}

    class Client(NotebookClient):
        async def async_execute_cell(self, cell, cell_index, **kwargs):
            if not Cell(cell_index, cell).runs(left_out): return cell
            return await super().async_execute_cell(cell, cell_index, **kwargs)

    nb = nbformat.read(path, as_version=4)
    # As a person sees it, but without bars and live widgets; the kernel chooses the inline backend.
    env = environment(**{**QUIET, 'MPLBACKEND': None})
    where = dict(metadata=dict(path=str(Path(path).parent)))
    client = Client(nb, timeout=limit, kernel_name='python3', resources=where,
                    coalesce_streams=True, store_widget_state=False, record_timing=False)
    client.execute(env=env)
    for output in (o for c in nb.cells for o in c.get('outputs', [])):
        data = output.get('data', {})
        if 'image/png' in data: data['image/png'] = small(data['image/png'])
    new = Path(path).with_name(f'.{Path(path).name}.new')
    try:
        new.write_text(nbformat.writes(nb) + '\n', encoding='utf8', newline='\n')
        os.replace(new, path)
    finally: new.unlink(missing_ok=True)


def main(names):
    """Executes the notebooks named, or all, cleans and exports; stops at the first that fails."""
    paths = [Path(n).resolve() for n in names] or notebook_paths()
    missing = [str(p) for p in paths if not p.is_file()]
    if missing or not paths:
        sys.exit(f'no such notebook: {", ".join(missing)}' if missing else 'there is no notebook')
    # Later notebooks import what earlier ones export.
    sync.run_nbdev(ROOT)
    for path in paths:
        start = time.time()
        print(path.relative_to(ROOT).as_posix(), end=' ', flush=True)
        try: execute(path)
        except Exception as e: sys.exit(f'failed and was left as it was:\n{e}')
        print(f'{time.time() - start:.1f} s, {path.stat().st_size // 1024} KB', flush=True)
    sync.main([])


if __name__ == '__main__': main(sys.argv[1:])
