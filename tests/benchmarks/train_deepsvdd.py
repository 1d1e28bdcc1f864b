"""Deep SVDD and ACHC: `fit` against a plain PyTorch loop on the same network, PyOD's and DeepOD's: processor time, memory, AUROC.

    python tests/benchmarks/train_deepsvdd.py --digits 2 5 --epochs 20 --rounds 2

One digit is normal: 70 % of it among the 10,000 MNIST test images are for training; the rest of it and all others are scored.
Every measurement is a process of its own; the contestants take turns, round by round, so that a busy minute hits all alike."""
import argparse
import json
import os
import statistics
import subprocess
import sys
import time

from train_ae import ROOT, forget_peak, peak

CODE_DIM, WIDTH, BATCH, LR, PRETRAIN_LR, DECAY = 128, 16, 64, 3e-4, 1e-3, 1e-6

# Name -> who trains it. The first is what the others are compared with.
CONTESTANTS = {
    'plain loop, our network': 'loop',
    'ours': 'fit',
    'ours, ACHC': 'achc',
    'plain loop, no warm start': 'loop cold',
    'ours, no warm start': 'fit cold',
    "ours, PyOD's layers": 'fit layers',
    'PyOD DeepSVDD': 'pyod',
    'DeepOD DeepSVDD': 'deepod',
    'PCA, 30 components': 'pca',
}
PEERS = {'PyOD DeepSVDD': ('pyod.models.deep_svdd', "pip install -e '.[peers]'"), 'DeepOD DeepSVDD': ('deepod.models.tabular', 'pip install pandas, then pip install --no-deps deepod')}


# ---------------------------------------------------------------- what is measured, in a process of its own

def data(digit, limit=None):
    """(training images, test images, test labels, what they are): MNIST where it lies, else made-up surfaces."""
    import numpy as np
    if not (data_root()/'MNIST').exists():
        task = surfaces(limit or 300, 200, size=28, seed=digit)
        return task.x_train, task.x_test, task.y_test, 'surfaces of 28x28 (MNIST is not in AD_COURSE_DATA)'
    task = mnist(normal=digit)
    x, y = task.x_test.astype('float32') / 255, task.y_test
    normal = np.random.default_rng(0).permutation(np.flatnonzero(y == 0))
    train = normal[:int(.7 * len(normal))][:limit]
    rest = np.setdiff1d(np.arange(len(x)), normal[:int(.7 * len(normal))])
    return x[train], x[rest], y[rest], 'MNIST test images, 70 % of a digit'


def train_plainly(x, epochs, warm):
    """The loop as people write it, with all the rules of Deep SVDD; a function from images to scores."""
    import numpy as np
    import torch
    from torch.utils.data import DataLoader, TensorDataset
    from ad_course.datasets import data_root, mnist
    from ad_course.networks import decoder, encoder
    torch.manual_seed(0)
    def contrast(x):
        x = torch.from_numpy(x)
        x = x - x.mean((1, 2, 3), keepdim=True)
        return x / x.abs().mean((1, 2, 3), keepdim=True).clamp(min=1e-3)
    z = contrast(x)
    low, high = z.min(), z.max()
    loader = DataLoader(TensorDataset((z - low) / (high - low)), batch_size=BATCH, shuffle=True)
    net = encoder(x.shape[1:], CODE_DIM, 'conv', WIDTH, bias=False)
    if warm:
        dec = decoder(x.shape[1:], CODE_DIM, 'conv', WIDTH)
        optimizer = torch.optim.Adam([*net.parameters(), *dec.parameters()], lr=PRETRAIN_LR)
        for epoch in range(epochs):
            running = 0.
            for (batch,) in loader:
                optimizer.zero_grad()
                loss = (dec(net(batch)) - batch).square().mean()
                loss.backward()
                optimizer.step()
                running += loss.item() * len(batch)
    net.eval()
    with torch.no_grad(): c = torch.cat([net(b) for (b,) in loader]).mean(0)
    c[(c.abs() < .1) & (c < 0)] = -.1
    c[(c.abs() < .1) & (c >= 0)] = .1
    optimizer = torch.optim.Adam(net.parameters(), lr=LR, weight_decay=DECAY)
    for epoch in range(epochs):
        net.train()
        running = 0.
        for (batch,) in loader:
            optimizer.zero_grad()
            loss = (net(batch) - c).square().sum(1).mean()
            loss.backward()
            optimizer.step()
            running += loss.item() * len(batch)
    net.eval()
    def score(images):
        with torch.no_grad(): return torch.cat([(net((contrast(b.numpy()) - low) / (high - low)) - c).square().sum(1) for b in torch.from_numpy(images).split(BATCH)]).numpy()
    np.quantile(score(x), .95)
    return score


def train(who, x, epochs):
    """One contestant; a function from images to scores."""
    kind, *how = who.split()
    flat = lambda images: images.reshape(len(images), -1)
    if kind == 'loop': return train_plainly(x, epochs, not how)
    if kind == 'fit' and how == ['layers']:   # linear layers of 64 and 32 units, no warm start: as PyOD has them
        from ad_course.deepsvdd import DeepSVDD
        return DeepSVDD(epochs=2 * epochs, pretrain_epochs=0, batch_size=BATCH, arch='mlp', width=8, code_dim=32, device='cpu', verbose=False).fit(x).decision_function
    if kind == 'fit':
        from ad_course.deepsvdd import DeepSVDD
        return DeepSVDD(epochs=epochs, pretrain_epochs=0 if how else epochs, batch_size=BATCH, lr=LR, pretrain_lr=PRETRAIN_LR, weight_decay=DECAY, code_dim=CODE_DIM,
                        width=WIDTH, device='cpu', verbose=False).fit(x).decision_function
    if kind == 'achc':   # as many passes over the images: half before the game, half in it
        from ad_course.achc import ACHC
        return ACHC(epochs=epochs, warm_up=epochs, batch_size=BATCH, width=WIDTH, device='cpu', verbose=False).fit(x).decision_function
    if kind == 'pca':
        from ad_course.baselines import PCA
        return PCA(components=min(30, len(x) - 1), device='cpu').fit(x).decision_function
    if kind == 'pyod':
        from pyod.models.deep_svdd import DeepSVDD
        d = DeepSVDD(n_features=flat(x).shape[1], epochs=2 * epochs, batch_size=BATCH, random_state=0, verbose=0).fit(flat(x))
    else:
        from deepod.models.tabular import DeepSVDD
        d = DeepSVDD(epochs=2 * epochs, batch_size=BATCH, device='cpu', random_state=42, verbose=0).fit(flat(x))
    return lambda images: d.decision_function(flat(images))


def measure(contestant, digit, limit, epochs, threads):
    """All numbers of one contestant, as a dict."""
    import contextlib
    import torch
    torch.set_num_threads(threads)
    from ad_course.metrics import auroc
    from ad_course.surfaces import surfaces
    import ad_course.achc, ad_course.baselines  # imports count for nobody
    if contestant in PEERS: __import__(PEERS[contestant][0])
    who = CONTESTANTS[contestant]
    x, x_test, y_test, name = data(digit, limit)
    with contextlib.redirect_stdout(sys.stderr):
        forget_peak()
        before = peak()
        train(who, x[:2 * BATCH], 1)      # warm-up: kernels are chosen and buffers made at the first use
        start, cpu = time.perf_counter(), time.process_time()
        score = train(who, x, epochs)
        whole, cpu, memory = time.perf_counter() - start, time.process_time() - cpu, peak() - before
        return dict(whole=whole, cpu=cpu, memory=memory, auroc=auroc(y_test, score(x_test)), data=f'{name}: {len(x)} images')


# ---------------------------------------------------------------- the rounds and the table

def run(contestant, digit, args):
    """`measure` in a fresh process."""
    command = [sys.executable, __file__, '--measure', contestant, '--digits', str(digit), '--epochs', str(args.epochs), '--threads', str(args.threads)]
    if args.images: command += ['--images', str(args.images)]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get('PYTHONPATH')]))
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, 'OMP_NUM_THREADS': str(args.threads), 'PYTHONPATH': path, 'CUDA_VISIBLE_DEVICES': ''})
    if done.returncode: raise SystemExit(f'{contestant} failed:\n{done.stderr}')
    return json.loads(done.stdout.splitlines()[-1])


def present(args):
    """The contestants that can take part; a line about each that cannot."""
    out = dict(CONTESTANTS)
    for name, (module, install) in PEERS.items():
        if args.no_peers: del out[name]
        elif subprocess.run([sys.executable, '-c', f'import {module}'], capture_output=True).returncode:
            print(f'{name}: left out, it is not installed ({install})')
            del out[name]
    return out


def table(results, digits):
    """Markdown. results: (contestant, digit) -> measurements, one a round."""
    lines = ['| contestant | its CPU s, min | ratio | whole fit, s, median | peak, MiB | ' + ' | '.join(f'AUROC {k}' for k in digits) + ' |', '|:--|' + '--:|' * (4 + len(digits))]
    names = list(dict.fromkeys(name for name, _ in results))
    cpu = lambda name: statistics.mean(min(m['cpu'] for m in results[name, k]) for k in digits)
    for name in names:
        found = [m for k in digits for m in results[name, k]]
        base = 'plain loop, no warm start' if name == 'ours, no warm start' else names[0]
        lines.append(f'| {name} | {cpu(name):.2f} | {cpu(name) / cpu(base):.2f} | {statistics.median(m["whole"] for m in found):.2f} | {statistics.median(m["memory"] for m in found):.0f} | '
                     + ' | '.join(f'{statistics.median(m["auroc"] for m in results[name, k]):.3f}' for k in digits) + ' |')
    return '\n'.join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--digits', type=int, nargs='+', default=[2, 5], help='each in turn is normal; the defaults of the method were chosen on 3 and 8')
    parser.add_argument('--images', type=int, help='at most so many training images')
    parser.add_argument('--epochs', type=int, default=20, help='of the warm start, and as many of Deep SVDD; the peers, which have none, get the sum')
    parser.add_argument('--rounds', type=int, default=2, help='measurements of each contestant')
    parser.add_argument('--threads', type=int, default=1)
    parser.add_argument('--no-peers', action='store_true', help='leave PyOD and DeepOD out')
    parser.add_argument('--measure', help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure: return print(json.dumps(measure(args.measure, args.digits[0], args.images, args.epochs, args.threads)))
    contestants = present(args)
    results = {(name, digit): [] for digit in args.digits for name in contestants}
    for turn in range(args.rounds):
        for name, digit in results:
            found = run(name, digit, args)
            results[name, digit].append(found)
            print(f'round {turn + 1}, {digit}, {name}: {found["cpu"]:.2f} CPU s, AUROC {found["auroc"]:.3f}', file=sys.stderr, flush=True)
    import torch
    print(f'\n{found["data"]}, batches of {BATCH}, {args.epochs} + {args.epochs} epochs, {args.rounds} rounds, {args.threads} thread(s); torch {torch.__version__}\n')
    print(table(results, args.digits))


if __name__ == '__main__': main()
