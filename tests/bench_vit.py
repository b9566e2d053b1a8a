"""Time of one ViT forward pass: ours, timm's and transformers', as ratios within one run (absolute times drift).

    python tests/bench_vit.py                                  DINOv3 S at 512, DINOv2 B at 518; on a GPU too if there
    python tests/bench_vit.py --models dinov3_vitb16 --repeat 9 --batch 8
"""
import argparse
import sys
import time
from pathlib import Path

import timm
import torch
from transformers import Dinov2Config, Dinov2Model, DINOv3ViTConfig, DINOv3ViTModel

sys.path.insert(0, str(Path(__file__).parents[1]))
from models.vit import PRESETS, ViT

MODES = ("fp32", "fp32 medium", "bf16 autocast")


def nets(name):
    """Three random nets of one size; all use torch's sdpa, ours its own bf16 path on a CPU."""
    p = PRESETS[name]
    size = dict(hidden_size=p["dim"], num_hidden_layers=p["depth"], num_attention_heads=p["heads"],
                patch_size=p["patch"])
    if p["family"] == "dinov3":
        hf = DINOv3ViTModel(DINOv3ViTConfig(**size, intermediate_size=p["hidden"], num_register_tokens=4))
    else:
        hf = Dinov2Model(Dinov2Config(**size, image_size=518))
    model = f"vit_{'small' if p['dim'] == 384 else 'base'}_patch{p['patch']}_{p['family']}"
    other = timm.create_model(model, num_classes=0)
    return {"ours": ViT(**p).eval(), "timm": other.eval(), "transformers": hf.eval()}


def seconds(net, x, mode):
    start = time.perf_counter()
    with torch.autocast(x.device.type, torch.bfloat16, enabled=mode == "bf16 autocast"):
        net.forward_features(x) if hasattr(net, "forward_features") else net(x)
    if x.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


@torch.inference_mode()
def main(args):
    print("device model          mode             ours [s]   timm / ours   transformers / ours")
    for device in ["cpu"] + ["cuda"] * torch.cuda.is_available():
        for name in args.models:
            side = 518 if PRESETS[name]["patch"] == 14 else 512
            x = torch.randn(args.batch, 3, side, side, device=device)
            three = {k: net.to(device) for k, net in nets(name).items()}
            for mode in MODES:
                torch.set_float32_matmul_precision("medium" if mode == "fp32 medium" else "highest")
                best = dict.fromkeys(three, float("inf"))
                for i in range(args.repeat + 1):  # in turns: a busy machine slows all three; 0 = warm-up
                    for k, net in three.items():
                        best[k] = min(best[k], seconds(net, x, mode) if i else float("inf"))
                ours, *others = best.values()
                print(f"{device:6} {name:14} {mode:16} {ours:8.3f} {others[0] / ours:13.2f} {others[1] / ours:21.2f}",
                      flush=True)


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--models", nargs="+", default=["dinov3_vits16", "dinov2_vitb14"],
                   choices=["dinov3_vits16", "dinov3_vitb16", "dinov2_vits14", "dinov2_vitb14"])
    p.add_argument("--repeat", type=int, default=5)
    p.add_argument("--batch", type=int, default=1)
    main(p.parse_args())
