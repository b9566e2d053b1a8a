"""Every network as an ONNX file: size, time to export, and how far onnxruntime's answers lie from the network's.

    python tests/bench_export.py                        all heads on small ViTs of both families, and the CNNs
    python tests/bench_export.py --only ftunetformer dinov3_vitb16     or any backbone, with --crop 512
"""
import argparse
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from models.export import to_onnx
from models.heads import HEADS, VERSION
from models.nets import NETS, build
from models.vit import PRESETS, preset, spread_taps

CLASSES = 8
SMALL = {
    "dinov3": preset("dinov3", 16, 64, 4, 2),
    "dinov2": preset("dinov2", 14, 64, 4, 2, registers=0, grid=7),
    "dinov2_reg": preset("dinov2", 14, 64, 4, 2, registers=4, grid=7),
}


def specs(only):
    """{name: spec}"""
    found = {}
    for name, backbone in (SMALL | PRESETS).items():
        if name in (only or SMALL):
            taps = spread_taps(backbone["depth"])
            for head in HEADS:
                found[f"{name} {head}"] = dict(name="vit", backbone=backbone, head=head, version=VERSION,
                                               taps=taps, feat_norm=True, classes=CLASSES)
    for name, (_, _, options) in NETS.items():
        if name in (only or NETS):
            found[name] = dict(name=name.removesuffix("-os8"), classes=CLASSES, options=options)
    return found


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--crop", type=int, default=100)
    p.add_argument("--only", nargs="+", metavar="NAME")
    args = p.parse_args()
    meta = dict(norm="imagenet", crop=args.crop, overlap=0.25, classes=[dict(name=str(i)) for i in range(CLASSES)])
    print("network                    MB   seconds   largest difference   equal classes")
    for name, spec in specs(args.only).items():
        torch.manual_seed(0)
        net, began = build(spec).eval(), time.time()
        content, found = to_onnx(net, meta, 30)
        print(f"{name:22} {len(content) / 1e6:6.1f} {time.time() - began:9.1f} "
              f"{found['difference']:20.1e} {found['same']:15.3%}", flush=True)


if __name__ == "__main__":
    main()
