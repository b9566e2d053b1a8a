"""predict.py on a huge GeoTIFF: peak memory, CPU time, share beyond the network; seams beside others' loops.

    python tests/bench_predict.py                       20,000 x 20,000 pixels, tiled, three bands
    python tests/bench_predict.py --side 4096           a smaller one
    python tests/bench_predict.py --sparse              100,000 x 60,000, mostly nodata, a constant network
    python tests/bench_predict.py --crops               predict(crop) against crop(predict), per overlap
    python tests/bench_predict.py --killed --side 2048 --flags=--compile     killed, and typed again: the same bytes?
    python tests/bench_predict.py --png 512 2048 8192   PNGs, which are read whole: bytes per further pixel

The run is a demo run of a few steps (or --run); what is large is written to --folder and deleted. Where torchgeo is
installed (pip install torchgeo), it is among the loops.
"""
import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
TILE = 512
OVERLAP = 0.25  # of predict.py and torchgeo


# ---- what is predicted

def blocks(run_data, rng):
    """Demo scenes as blocks of 512 x 512 x 3."""
    found = []
    for file in sorted(Path(run_data).glob("*/images/*.png")):
        block = np.asarray(Image.open(file).convert("RGB"))
        times = -(-TILE // block.shape[0])
        found.append(np.tile(block, (times, times, 1))[:TILE, :TILE].clip(1, 255))
    return [found[i] for i in rng.permutation(len(found))[:16]]


def make_scene(path, H, W, data, filled=1.0):
    """A georeferenced GeoTIFF, 512 tiles with deflate; of each row a share of `filled` is not sparse."""
    import rasterio
    from rasterio.windows import Window
    rng = np.random.default_rng(0)
    some = blocks(data, rng)
    how = dict(driver="GTiff", height=H, width=W, count=3, dtype="uint8", crs="EPSG:32632", tiled=True, blockxsize=TILE,
               blockysize=TILE, compress="deflate", zlevel=1, nodata=0, sparse_ok=True, bigtiff="if_safer",
               transform=rasterio.transform.from_origin(500_000, 5_500_000, 0.1, 0.1))
    with rasterio.open(path, "w", **how) as f:
        for top in range(0, H, TILE):
            for left in range(0, W, TILE):
                if rng.random() < filled:
                    h, w = min(TILE, H - top), min(TILE, W - left)
                    block = some[rng.integers(len(some))][:h, :w].transpose(2, 0, 1)
                    f.write(block, window=Window(left, top, w, h))


# ---- predict.py in a process of its own, its parts timed

def child(argv, constant, report):
    sys.path.insert(0, str(ROOT))
    import torch

    import predict
    seconds = dict.fromkeys(("network", "reading", "writing"), 0.0)

    def timed(owner, name, kind):
        inner = getattr(owner, name)

        def outer(*args, **kwargs):
            began = time.process_time()
            try:
                return inner(*args, **kwargs)
            finally:
                seconds[kind] += time.process_time() - began
        setattr(owner, name, outer)

    class Constant(torch.nn.Module):
        def __init__(self, classes):
            super().__init__()
            self.scores = torch.nn.Parameter(torch.arange(float(classes)))

        def forward(self, x):
            return self.scores[None, :, None, None].expand(len(x), -1, *x.shape[-2:])

    load = predict.ensemble.load_runs

    def load_runs(*args, **how):
        net, meta = load(*args, **how)
        if constant:
            net = Constant(len(meta["classes"]))
        timed(net, "forward", "network")
        return net, meta

    predict.ensemble.load_runs = load_runs
    timed(predict.Strips, "read", "reading")
    timed(predict.Strips, "thinned", "reading")
    for name in ("append", "save"):
        timed(predict.TiffWriter, name, "writing")
    began = time.process_time()
    with predict.run.one_line_errors():
        predict.main(predict.parse_args(argv))
    Path(report).write_text(json.dumps(seconds | dict(total=time.process_time() - began)))


def predict(run, image, out, *flags, constant=False):
    """-> seconds by part, peak memory in GB."""
    report = f"{out}.json"
    argv = [str(run), str(image), "--out", str(out), *map(str, flags)]
    command = [sys.executable, __file__, "--child", json.dumps([argv, constant, report])]
    job = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, failed, usage = os.wait4(job.pid, 0)
    if failed:
        sys.exit(f"predict.py failed on {image}")
    return json.loads(Path(report).read_text()), usage.ru_maxrss * 1024 / 1e9  # Linux counts kilobytes


def show(what, H, W, seconds, peak):
    rest = seconds["total"] - seconds["network"] - seconds["reading"] - seconds["writing"]
    print(f"{what}: {H} x {W}  {seconds['total']:.0f} s of CPU time, of which network {seconds['network']:.0f}, "
          f"reading {seconds['reading']:.0f}, writing {seconds['writing']:.0f}, blending and the rest {rest:.0f} "
          f"({rest / max(seconds['network'], 1e-9):.1%} of the network)  peak {peak:.2f} GB", flush=True)


# ---- what a user would write instead

def plain_loop(run, image, result, mode="constant"):
    """Windows side by side, as many a script has them -> seconds.

    mode "reflect" pads as usual examples around segmentation_models_pytorch do: pad, tile, predict, stitch.
    """
    sys.path.insert(0, str(ROOT))
    import rasterio
    import torch
    from rasterio.windows import Window

    from data.datasets import normalise
    from models.nets import load_run
    net, meta = load_run(run)
    size = meta["crop"]
    began = time.process_time()
    with torch.inference_mode(), rasterio.open(image) as f:
        with rasterio.open(result, "w", **f.profile | dict(count=1)) as g:
            for top in range(0, f.height, size):
                for left in range(0, f.width, size):
                    window = Window(left, top, min(size, f.width - left), min(size, f.height - top))
                    pixels = f.read(window=window).transpose(1, 2, 0)
                    beside = (0, size - window.height), (0, size - window.width), (0, 0)
                    x = normalise(np.pad(pixels, beside, mode), meta["norm"])
                    ids = net(x[None])[0].argmax(0).byte().numpy()
                    g.write(ids[None, :window.height, :window.width], window=window)
    return time.process_time() - began


def torchgeo_loop(run, image, result):
    """torchgeo's data set and sampler as in its tutorials; a later window over an earlier one -> seconds."""
    sys.path.insert(0, str(ROOT))
    import rasterio
    import torch
    from torch.utils.data import DataLoader
    from torchgeo.datasets import RasterDataset, stack_samples
    from torchgeo.samplers import GridGeoSampler

    from data.datasets import normalised
    from models.nets import load_run
    net, meta = load_run(run)
    size = meta["crop"]
    began = time.process_time()
    data = RasterDataset(image)
    sampler = GridGeoSampler(data, size, size * (1 - OVERLAP))
    with torch.inference_mode(), rasterio.open(image) as f:
        ids = np.zeros(f.shape, np.uint8)
        for batch in DataLoader(data, 16, sampler=sampler, collate_fn=stack_samples):
            found = net(normalised(batch["image"], meta["norm"])).argmax(1).byte().numpy()
            for window, (columns, rows, _) in zip(found, batch["bounds"]):
                top = round((f.bounds.top - rows.stop) / f.res[1])
                left = round((columns.start - f.bounds.left) / f.res[0])
                # The grid begins at the lower left corner and reaches beyond the upper and the right rim.
                part = ids[max(0, top):top + size, left:left + size]
                part[:] = window[max(0, -top):, :part.shape[1]]
        with rasterio.open(result, "w", **f.profile | dict(count=1)) as g:
            g.write(ids, 1)
    return time.process_time() - began


def seams(ids, reference, rows, columns):
    """Share of pixels on both sides of the windows' borders that differ from the reference; of all pixels."""
    border = np.zeros(ids.shape, bool)
    for i in rows:
        border[i - 1:i + 1] = True
    for i in columns:
        border[:, i - 1:i + 1] = True
    differ = ids != reference
    return differ[border].mean(), differ.mean()


def compare(run, folder, side, data, size):
    import rasterio

    def ids(path):
        with rasterio.open(path) as f:
            return f.read(1)
    image = folder / "small.tif"
    make_scene(image, side, side, data)
    beside = range(size, side, size)
    overlapping = range(int(size * (1 - OVERLAP)), side, int(size * (1 - OVERLAP)))
    # name, map, seconds, rows and columns where a window begins
    found = []
    for what, mode in (("plain rasterio loop", "constant"), ("pad, tile, stitch", "reflect")):
        path = folder / f"{what}.tif"
        found.append((what, path, plain_loop(run, image, path, mode), beside, beside))
    if importlib.util.find_spec("torchgeo"):
        path = folder / "torchgeo.tif"
        from_below = [side - i for i in overlapping]
        found.append(("torchgeo", path, torchgeo_loop(run, image, path), from_below, overlapping))
    ours, _ = predict(run, image, folder / "ours", "--overlap", OVERLAP)
    found.append(("predict.py", folder / "ours/small.tif", ours["total"], overlapping, overlapping))
    predict(run, image, folder / "reference", "--overlap", 0.5)
    reference = ids(folder / "reference/small.tif")
    for what, path, seconds, rows, columns in found:
        at_borders, everywhere = seams(ids(path), reference, rows, columns)
        print(f"{what}: {side} x {side}  {seconds:.0f} s of CPU time  differs from overlap .5 on {at_borders:.2%} "
              f"of the pixels along window borders, {everywhere:.2%} of all", flush=True)


def crops(run, folder, side, data):
    """Share of pixels of an unaligned crop that have the class they have in the whole image."""
    sys.path.insert(0, str(ROOT))
    import torch

    from data.datasets import normalise
    from data.io import read_image
    from models.infer import class_ids, slide
    from models.nets import load_run
    net, meta = load_run(run)
    size = meta["crop"]
    make_scene(folder / "small.tif", side, side, data)
    x = normalise(read_image(folder / "small.tif"), meta["norm"])
    top, left, reach = size // 3 + 1, size // 2 + 3, side - size
    print("overlap   same class, a window or more from the rim   nearer to it")
    for overlap in (0, 0.25, 0.5, 0.75):
        window = dict(crop=size, overlap=overlap, batch=16, amp=False)
        with torch.inference_mode():
            whole = class_ids(slide(net, x, **window))[top:top + reach, left:left + reach]
            part = class_ids(slide(net, x[:, top:top + reach, left:left + reach], **window))
        same, near = whole == part, np.ones(whole.shape, bool)
        near[size:-size, size:-size] = False
        print(f"{overlap:7} {same[~near].mean():45.2%} {same[near].mean():14.2%}", flush=True)


def killed(run, folder, side, data, *flags):
    """Kills predict.py with some of its tiles written; typed again, in another process, it shall end alike."""
    make_scene(folder / "scene.tif", side, side, data)

    def start(out):
        return subprocess.Popen([sys.executable, ROOT / "predict.py", run, folder / "scene.tif", "--out", out, *flags])

    start(folder / "whole").wait()
    size = (folder / "whole/scene.tif").stat().st_size
    part = folder / "out/scene.tif.part"
    job = start(folder / "out")
    while job.poll() is None and not (part.exists() and part.stat().st_size > size / 4):
        time.sleep(0.05)
    job.kill()
    job.wait()
    left = part.stat().st_size
    start(folder / "out").wait()
    same = (folder / "out/scene.tif").read_bytes() == (folder / "whole/scene.tif").read_bytes()
    print(f"killed with {left} of about {size} bytes: {'the same' if same else 'NOT the same'} at the end")


def pngs(run, folder, sides):
    print("pixels a side   seconds   GB at most   bytes per further pixel")
    before = None
    for side in sorted({*sides}):
        noise = np.random.default_rng(0).integers(0, 256, (side // 16, side // 16, 3), np.uint8)
        Image.fromarray(noise).resize((side, side)).save(folder / "image.png", compress_level=1)
        seconds, peak = predict(run, folder / "image.png", folder / f"out{side}")
        more = f"{(peak - before[1]) * 1e9 / (side ** 2 - before[0] ** 2):25.1f}" if before else ""
        print(f"{side:13} {seconds['total']:9.1f} {peak:12.2f}{more}", flush=True)
        before = side, peak


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--run", help="run folder of a trained network")
    p.add_argument("--steps", type=int, default=60, help="of the demo run without --run")
    p.add_argument("--side", type=int, default=20_000, help="of the GeoTIFF")
    p.add_argument("--seams", type=int, default=2_048, help="side of the image for the seams")
    p.add_argument("--constant", action="store_true", help="a network that costs nothing, and no seams")
    p.add_argument("--sparse", action="store_true", help="100,000 x 60,000 pixels, a constant network")
    p.add_argument("--crops", action="store_true", help="crops of an image of --seams pixels a side")
    p.add_argument("--killed", action="store_true", help="killed and typed again")
    p.add_argument("--png", type=int, nargs="+", help="sides of PNGs")
    p.add_argument("--folder", help="where the large files lie for a while")
    p.add_argument("--flags", default="", help="more flags of predict.py, such as '--confidence'")
    p.add_argument("--child", help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.child:
        return child(*json.loads(args.child))
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        folder = Path(folder)
        demo = ["--dataset", "demo", "--root", f"{folder}/demo", "--workers", "0", "--arch", "nano16"]
        run = args.run or f"{folder}/run"
        made = [*demo, "--steps", str(args.steps if not args.run else 1), "--out", f"{folder}/run"]
        subprocess.run([sys.executable, ROOT / "train_seg.py", *made], check=True, stdout=subprocess.DEVNULL)
        data = f"{folder}/demo"
        if args.crops:
            return crops(run, folder, args.seams, data)
        if args.killed:
            return killed(run, folder, args.side, data, *args.flags.split())
        if args.png:
            return pngs(run, folder, args.png)
        if args.sparse:
            make_scene(folder / "scene.tif", 100_000, 60_000, data, 0.01)
            result = predict(run, folder / "scene.tif", folder / "out", *args.flags.split(), constant=True)
            return show("sparse", 100_000, 60_000, *result)
        make_scene(folder / "scene.tif", args.side, args.side, data)
        result = predict(run, folder / "scene.tif", folder / "out", *args.flags.split(), constant=args.constant)
        show("GeoTIFF", args.side, args.side, *result)
        if args.constant:
            return
        sys.path.insert(0, str(ROOT))
        from models.checkpoint import load_weights
        compare(run, folder, args.seams, data, load_weights(run, header_only=True)[1]["crop"])


if __name__ == "__main__":
    main()
