"""Features of EfficientNet-Lite0: `features` and `feature_maps` against plain timm loops.

Images a second, memory.

    python tests/benchmarks/look.py --images 64 --sizes 96 160 448 --rounds 3

All have the same network, weights, images, batches and threads. The plain loops resize and
normalize as the network wants, call timm's network in eval mode without gradients, and keep what
it gives; that of maps is built by timm to end at stride 16. Every measurement is a process of its
own; the contestants take turns."""
import json
import statistics
import time

import bench

# Name -> (what is wanted, by whom). The plain loop of a kind is what it is compared with.
CONTESTANTS = {
    'features, plain timm': ('features', 'timm'), 'features, ours': ('features', 'ours'),
    'maps, plain timm': ('maps', 'timm'), 'maps, ours': ('maps', 'ours'),
}
BATCH = 16


def plain(what, size):
    """timm's network with the official weights, and the loop around it: images -> tensor."""
    import timm
    import torch
    from ad_course.backbones import load_packaged
    from torchvision.transforms import InterpolationMode, functional as TF
    whole = load_packaged('efficientnet_lite0')
    if what == 'features': whole.classifier = torch.nn.Identity()
    else:
        state = whole.state_dict()
        whole = timm.create_model('tf_efficientnet_lite0', features_only=True, out_indices=(3,))
        whole.load_state_dict(state, strict=False)
    whole.eval()
    def look(x):
        found = []
        with torch.no_grad():
            for xb in x.split(BATCH):
                seen = TF.resize(xb, [size, size], InterpolationMode.BICUBIC, antialias=True)
                out = whole((255 * seen - 127) / 128)
                found.append(out if what == 'features' else out[0])
        return torch.cat(found)
    return look


def ours(what, size):
    """The course's functions: images -> array."""
    from ad_course.backbones import backbone, features
    from ad_course.feature_maps import feature_maps
    b = backbone('efficientnet_lite0', size=size)
    if what == 'features': return lambda x: features(b, x, BATCH)
    return lambda x: feature_maps(b, x, (16,), BATCH)[0]


def measure(contestant, n, size, threads):
    """All numbers of one contestant, as a dict."""
    import torch
    torch.set_num_threads(threads)
    what, who = CONTESTANTS[contestant]
    look = dict(timm=plain, ours=ours)[who](what, size)
    x = torch.rand(n, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    look(x[:2])                                 # warm-up
    bench.forget_peak()
    before, start = bench.peak(), time.perf_counter()
    found = look(x)
    seconds = time.perf_counter() - start
    check = float(torch.as_tensor(found).double().abs().mean())
    return dict(rate=n / seconds, memory=bench.peak() - before, check=check)


HEAD = ['pixels', 'contestant', 'images a second', 'best', 'ratio', 'peak, MiB', 'mean of |answer|']


def table(results):
    """Markdown. results: (size, contestant) -> measurements, one a round."""
    rows = []
    for (size, name), found in results.items():
        base = next(n for n, (what, _) in CONTESTANTS.items() if what == CONTESTANTS[name][0])
        middle, of_base = (bench.median(results[size, k], 'rate') for k in (name, base))
        rows.append([size, name, f'{middle:.1f}', f'{max(m["rate"] for m in found):.1f}',
                     f'{middle / of_base:.2f}', f'{bench.median(found, "memory"):.0f}',
                     f'{statistics.median(m["check"] for m in found):.5f}'])
    return bench.markdown(HEAD, rows)


def main():
    """The command line."""
    parser = bench.arguments(__doc__, rounds=3)
    parser.add_argument('--images', type=int, default=64)
    parser.add_argument('--sizes', type=int, nargs='+', default=[96, 160, 448])
    parser.add_argument('--threads', type=int, default=1)
    args = parser.parse_args()
    if args.measure:
        return print(json.dumps(measure(args.measure, args.images, args.sizes[0], args.threads)))
    fresh = lambda size, name: bench.in_a_process_of_its_own(
        __file__, name, args.threads, images=args.images, sizes=size)
    say = lambda found: f'{found["rate"]:.1f} images a second'
    keys = [(size, name) for size in args.sizes for name in CONTESTANTS]
    results = bench.rounds(args.rounds, keys, fresh, say)
    import timm
    import torch
    print(f'\n{args.images} images, batches of {BATCH}, {args.threads} threads, {args.rounds} '
          f'rounds; torch {torch.__version__}, timm {timm.__version__}\n')
    print(table(results))


if __name__ == '__main__': main()
