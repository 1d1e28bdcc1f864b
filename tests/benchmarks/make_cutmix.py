"""CutMix pseudo-anomalies: `dra.cutmix`, a batch at once, against a loop over images in PIL.

    python tests/benchmarks/make_cutmix.py --images 256 --sizes 64 256 --rounds 5

Both cut rectangles of the same random sizes, change brightness and contrast, and paste them
elsewhere. PIL works on bytes, a quarter of the memory of floats; its images are made before the
clock starts. A network needs floats: PIL stands once with its answers made into a batch, by
torchvision, and once without. The contestants take turns; the best round of each counts."""
import argparse
import time

import numpy as np
import torch
from PIL import Image, ImageEnhance
from torchvision.transforms.functional import to_tensor

from ad_course.dra import cutmix


def ours(x, rng):
    """The whole batch."""
    return lambda: cutmix(x, rng)


def one_by_one(x, seed=0):
    """Image by image, with PIL."""
    images = [Image.fromarray(np.moveaxis((255 * a).astype('uint8'), 0, -1)) for a in x.numpy()]
    g = np.random.default_rng(seed)
    def make(image):
        w, h = image.size
        share, tall = g.uniform(.02, .15), 3 ** g.uniform(-1, 1)
        sides = np.minimum([w, h], np.maximum(1, np.sqrt([share / tall, share * tall]) * [w, h]))
        sides = sides.astype(int)
        (x0, y0), to = (g.integers(0, np.array([w, h]) - sides + 1) for _ in range(2))
        patch = image.crop((x0, y0, x0 + sides[0], y0 + sides[1]))
        patch = ImageEnhance.Brightness(patch).enhance(g.uniform(.9, 1.1))
        patch = ImageEnhance.Contrast(patch).enhance(g.uniform(.9, 1.1))
        made = image.copy()
        made.paste(patch, tuple(to.tolist()))
        return made
    return lambda: [make(image) for image in images]


def handed_over(make):
    """PIL's answers as one batch of floats."""
    return lambda: torch.stack([to_tensor(image) for image in make()])


def main():
    """The table: images a second."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--images', type=int, default=256)
    parser.add_argument('--sizes', type=int, nargs='+', default=[64, 256])
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--device', default='cpu')
    options = parser.parse_args()
    print('| size | ours, images a second | PIL, to a batch | ratio | PIL, bytes | ratio |\n'
          '|---|--:|--:|--:|--:|--:|')
    for size in options.sizes:
        rng = torch.Generator(options.device).manual_seed(0)
        x = torch.rand(options.images, 3, size, size)
        in_pil = one_by_one(x)
        contestants = ours(x.to(options.device), rng), handed_over(in_pil), in_pil
        best = [np.inf] * len(contestants)
        for _ in range(options.rounds):
            for i, make in enumerate(contestants):
                start = time.perf_counter()
                make()
                if options.device != 'cpu': torch.cuda.synchronize()
                best[i] = min(best[i], time.perf_counter() - start)
        mine, *others = (options.images / seconds for seconds in best)
        cells = ' | '.join(f'{other:.0f} | {mine / other:.2f}' for other in others)
        print(f'| {size} | {mine:.0f} | {cells} |')


if __name__ == '__main__': main()
