"""Time of a forward pass: a ViT with the fpn head as it is, compiled, in OpenVINO and in onnxruntime.

    python tests/bench_vit.py                            DINOv3 S at 512, DINOv2 B at 518, on the CPU
    python tests/bench_vit.py --batch 8 --profile        and where ours spends its time, by operator
    python tests/bench_vit.py --backbone                 the ViT alone, beside timm and transformers; on a GPU, if any

Ratios within one run, in turns, the minimum of some rounds: a busy machine slows all of them. What is not installed
(pip install openvino onnxruntime) is left out. --cpu counts processor seconds, for a machine shared with others.
"""
import argparse
import copy
import importlib.util
import io
import sys
import time
import warnings
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from models import export, nets
from models.compiled import compiled
from models.run import tune_cpu
from models.vit import PRESETS, ViT

MODES = ("fp32", "bf16")
CLASSES = 8


def side_of(name):
    return 518 if PRESETS[name]["patch"] == 14 else 512


# ---- networks: name -> a function that computes logits (B, K, H, W) of x

def as_onnx(net, x):
    """The network as bytes of an ONNX file, for the shape of x."""
    net = copy.deepcopy(net)
    export.fix_positions(net, x.shape[-1])
    content = io.BytesIO()
    with warnings.catch_warnings(), export.FixedSize():
        warnings.simplefilter("ignore")
        torch.onnx.export(net, (x,), content, dynamo=False, opset_version=export.OPSET,
                          input_names=["input"], output_names=["output"])
    return content.getvalue()


def in_openvino(content, x, mode, threads):
    import openvino
    core = openvino.Core()
    how = dict(INFERENCE_NUM_THREADS=threads, NUM_STREAMS=1,
               INFERENCE_PRECISION_HINT={"fp32": "f32", "bf16": "bf16"}[mode])
    request = core.compile_model(core.read_model(content), "CPU", how).create_infer_request()
    array = x.numpy()

    def run():
        request.infer({0: array})
        return torch.from_numpy(request.get_output_tensor(0).data)
    return run


def in_onnxruntime(content, x, threads):
    import onnxruntime
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    array = x.numpy()
    return lambda: torch.from_numpy(session.run(None, {"input": array})[0])


def networks(name, x, mode, threads, compiles):
    torch.manual_seed(0)
    net = nets.make("vit", CLASSES, arch=name)[0].eval()
    amp = mode == "bf16"

    def ours(network):
        def run():
            with torch.autocast("cpu", torch.bfloat16, enabled=amp):
                return network(x)
        return run

    runs = {"ours": ours(net)}
    if compiles:
        program, note = compiled(net, x.shape[-1], amp)
        print(f"{name}: {note}", flush=True)
        if program is not net:
            runs["compiled"] = ours(program)
    installed = []
    for package in ("onnx", "openvino", "onnxruntime"):
        if importlib.util.find_spec(package):
            installed.append(package)
        else:
            print(f"{package} is not installed: its column is left out")
    content = as_onnx(net, x) if "onnx" in installed else None
    if content and "openvino" in installed:
        runs["openvino"] = in_openvino(content, x, mode, threads)
    if content and "onnxruntime" in installed and not amp:
        runs["onnxruntime"] = in_onnxruntime(content, x, threads)
    return runs


# ---- the backbone alone, in other libraries

def timm_name(name):
    p = PRESETS[name]
    size = {384: "small", 768: "base", 1024: "large"}[p["dim"]]
    return f"vit_{size}_patch{p['patch']}_{p['family']}"


def backbones(name, x, mode):
    """Three random nets of one size; all use torch's sdpa, ours its own bf16 path on a CPU."""
    import timm
    from transformers import Dinov2Config, Dinov2Model, DINOv3ViTConfig, DINOv3ViTModel
    p = PRESETS[name]
    size = dict(hidden_size=p["dim"], num_hidden_layers=p["depth"], num_attention_heads=p["heads"],
                patch_size=p["patch"])
    if p["family"] == "dinov3":
        hf = DINOv3ViTModel(DINOv3ViTConfig(**size, intermediate_size=p["hidden"], num_register_tokens=4))
    else:
        hf = Dinov2Model(Dinov2Config(**size, image_size=518))
    other = timm.create_model(timm_name(name), num_classes=0).eval().to(x.device)
    ours, hf = ViT(**p).eval().to(x.device), hf.eval().to(x.device)

    def run(net):
        with torch.autocast(x.device.type, torch.bfloat16, enabled=mode == "bf16"):
            net(x)
        if x.is_cuda:
            torch.cuda.synchronize()
    return {"ours": lambda: run(ours), "timm": lambda: run(other.forward_features),
            "transformers": lambda: run(hf)}


# ---- rounds and tables

def fastest(runs, rounds, clock):
    """Seconds of each, the minimum of rounds in turns."""
    best = dict.fromkeys(runs, float("inf"))
    for run in runs.values():
        run()  # warm up
    for _ in range(rounds):
        for name, run in runs.items():
            start = clock()
            run()
            best[name] = min(best[name], clock() - start)
    return best


def by_operator(run):
    """Table of torch's profiler: the operators that take the longest."""
    with torch.profiler.profile() as found:
        run()
    return found.key_averages().table(sort_by="self_cpu_time_total", row_limit=12, max_name_column_width=40)


@torch.inference_mode()
def main(args):
    torch.set_num_threads(args.threads)
    tune_cpu()  # as the scripts do
    clock = time.process_time if args.cpu else time.perf_counter
    print(f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, {args.threads} threads, "
          f"batch {args.batch}, minimum of {args.rounds} rounds, {'processor' if args.cpu else 'wall'} seconds")
    # Only the ViT alone runs on a GPU: compiled(), OpenVINO and onnxruntime here are for CPUs.
    on_gpu = args.backbone and not args.cpu and torch.cuda.is_available()
    device = "cuda" if on_gpu else "cpu"
    for name in args.models:
        x = torch.randn(args.batch, 3, side_of(name), side_of(name), device=device)
        for mode in args.modes:
            if args.backbone:
                runs = backbones(name, x, mode)
            else:
                runs = networks(name, x, mode, args.threads, not args.no_compile)
            times = fastest(runs, args.rounds, clock)
            cells = [f"ours {times['ours']:.3f} s"]
            for other in list(runs)[1:]:
                cell = f"{other} {times[other] / times['ours']:.2f}"
                if not args.backbone:
                    cell += f" (differs by {(runs[other]() - runs['ours']()).abs().max():.1e})"
                cells.append(cell)
            print(f"{device} {name} {mode}: " + " | ".join(cells), flush=True)
            if args.profile:
                for which in runs.keys() & {"ours", "compiled"}:
                    print(which, by_operator(runs[which]), sep="\n")


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--models", nargs="+", default=["dinov3_vits16", "dinov2_vitb14"],
                   choices=["dinov3_vits16", "dinov3_vitb16", "dinov2_vits14", "dinov2_vitb14"])
    p.add_argument("--modes", nargs="+", default=["fp32"], choices=MODES)
    p.add_argument("--rounds", type=int, default=7)
    p.add_argument("--batch", type=int, default=1)
    p.add_argument("--threads", type=int, default=torch.get_num_threads())
    p.add_argument("--backbone", action="store_true", help="the ViT alone, beside timm and transformers")
    p.add_argument("--no-compile", action="store_true", help="without the column that compiles for a minute")
    p.add_argument("--profile", action="store_true", help="the operators that take the longest")
    p.add_argument("--cpu", action="store_true", help="not on a GPU; processor seconds of all threads, not wall time")
    main(p.parse_args())
