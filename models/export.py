"""A trained network as an ONNX file that QGIS' Deepness plug-in and WebODM's GeoDeep open as it is.

    content, compared = to_onnx(net, meta, resolution=30)     cm per pixel of the training images

Input (1, 3, S, S) float, bytes divided by 255; output (1, K, S, S) probabilities; S is the crop of
training. Normalisation, temperature and softmax are in the graph, since GeoDeep knows neither. What the two
programs must know stands in the metadata. Needs the package onnx; onnxruntime, where it is
installed, compares the file with the network.

Deepness keeps its own resolution, overlap and threshold until "Load default parameters" is pressed,
and takes only maps in metres. GeoDeep smooths the classes by a median of 5 x 5 pixels. Of the same
windows both find the classes of predict.py, which blends windows where they overlap; they cut there.
"""
import copy
import importlib
import io
import json
import warnings

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from data import public
from data.common import BadInput
from data.datasets import NORMS, normalise
from data.raster import open_raster
from data.source import Source

from .vit import ViT

OPSET = 17  # version of ONNX' operators, which both programs know
LARGEST = 2**31  # bytes of a protobuf, which an ONNX file is
SAME = 0.99  # share of pixels whose class the file must share with the network
IMAGES = 4  # that the two are compared on


# ---- the network as a program of fixed size

class Program(nn.Module):
    """x (1, 3, S, S), bytes divided by 255 -> probabilities (1, K, S, S)."""

    def __init__(self, net: nn.Module, norm: str, temperature: float):
        super().__init__()
        self.net = net
        self.temperature = temperature
        mean, std = NORMS[norm]
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (self.net((x - self.mean) / self.std) / self.temperature).softmax(1)


def fix_positions(net: nn.Module, side: int) -> None:
    """DINOv2's table of positions, resized for images of side x side: ONNX has no such resizing."""
    for vit in net.modules():
        if isinstance(vit, ViT) and vit.pos_embed is not None:
            patches = -(-side // vit.patch)  # rounded up
            vit.pos_embed = nn.Parameter(vit.positions(patches, patches))
            vit.grid = patches


def pooling_matrix(n: int, cells: int) -> Tensor:
    """(cells, n) fp32: row i takes the mean over the pixels that adaptive pooling gives cell i."""
    matrix = np.zeros((cells, n), np.float32)
    for i in range(cells):
        start = i * n // cells
        end = -(-(i + 1) * n // cells)  # rounded up
        matrix[i, start:end] = 1 / (end - start)
    return torch.from_numpy(matrix)


class FixedSize(TorchFunctionMode):
    """While the exporter watches: sizes are plain numbers, and pooling is a product of matrices.

    Otherwise sizes would be computed in the graph, where networks that round them fail.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.adaptive_avg_pool2d and args[1] != 1:
            # ONNX pools into cells of equal size alone.
            x, cells = args
            rows, columns = [pooling_matrix(int(n), cells) for n in x.shape[-2:]]
            return rows @ x @ columns.T
        found = func(*args, **(kwargs or {}))
        # Within a trace these are tensors.
        if func in (Tensor.shape.__get__, Tensor.size):
            whole = isinstance(found, torch.Size)  # not of one dimension
            return torch.Size([int(n) for n in found]) if whole else int(found)
        return found


# ---- the file

def metadata(meta: dict, resolution: float) -> dict:
    """What Deepness and GeoDeep read; resolution: cm per pixel, to which they resample a map."""
    names = {str(i): c["name"] for i, c in enumerate(meta["classes"])}
    return dict(
        model_type="Segmentor",
        class_names=names,
        resolution=resolution,
        # Deepness' code reads the first, its documentation names the second.
        tile_size=meta["crop"],
        tiles_size=meta["crop"],
        tiles_overlap=round(100 * meta["overlap"]),  # per cent
        # Pixels below a threshold would become class 0.
        seg_thresh=0,
        seg_small_segment=0,
    )


def training_resolution(meta: dict) -> float | None:
    """cm per pixel of the first training image, where the data set is there and georeferenced."""
    kind = meta["source"] if meta["source"] in public.SETS else "folder"
    try:
        d = Source(kind, meta["root"], meta["variant"], need=(), need_masks=False)
        image, *_ = next(iter(d.pairs.values()))
        georef = open_raster(image).georef
    except BadInput:  # moved, or changed since
        return None
    area, _ = georef.pixel_area() if georef else (None, "")
    return None if area is None else round(100 * area ** 0.5, 2)


def needed(name: str):
    """An optional package."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise BadInput(f"--export needs the package {name}; type pip install {name}") from None


def to_onnx(net: nn.Module, meta: dict, resolution: float,
            temperature: float = 1.0) -> tuple[bytes, dict | None]:
    """Network in eval mode on the CPU, its meta -> bytes of the ONNX file, compare()'s numbers.

    None without onnxruntime. A file that answers otherwise than the network is a BadInput.
    """
    onnx = needed("onnx")
    size = 4 * sum(p.numel() for p in net.parameters())
    if size >= LARGEST:
        raise BadInput(f"--export: {size / 2**30:.1f} GiB of weights, and an ONNX file holds 2; "
                       "export a run with a smaller backbone")
    side = meta["crop"]
    program = Program(copy.deepcopy(net), meta["norm"], temperature).eval()
    with torch.no_grad():
        fix_positions(program, side)

    graph = io.BytesIO()
    image = torch.zeros(1, 3, side, side)
    with warnings.catch_warnings(), FixedSize():
        warnings.simplefilter("ignore")  # that sizes are fixed, as they should be
        torch.onnx.export(program, (image,), graph, dynamo=False, opset_version=OPSET,
                          input_names=["input"], output_names=["output"])
    model = onnx.load_model_from_string(graph.getvalue())
    values = metadata(meta, resolution)
    onnx.helper.set_model_props(model, {key: json.dumps(value) for key, value in values.items()})
    content = model.SerializeToString()

    try:
        runtime = importlib.import_module("onnxruntime")
    except ImportError:
        return content, None
    compared = compare(runtime, content, net, meta, temperature)
    if compared["same"] < SAME:
        raise BadInput(f"--export: onnxruntime finds the network's class in {compared['same']:.1%} "
                       "of the pixels; report it with the versions of torch, onnx and onnxruntime")
    return content, compared


@torch.inference_mode()
def compare(runtime, content: bytes, net: nn.Module, meta: dict, temperature: float) -> dict:
    """File and network on random images: largest difference, share of equal classes."""
    session = runtime.InferenceSession(content, providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(0)
    side = meta["crop"]
    largest, same = 0.0, 0.0
    for _ in range(IMAGES):
        # Pixels in blocks of eight: areas and edges.
        blocks = rng.integers(0, 256, (-(-side // 8), -(-side // 8), 3), np.uint8)
        image = blocks.repeat(8, 0).repeat(8, 1)[:side, :side]
        x = image.transpose(2, 0, 1)[None].astype(np.float32) / 255
        (found,) = session.run(None, {"input": x})
        logits = net(normalise(image, meta["norm"])[None])
        wanted = (logits / temperature).softmax(1).numpy()
        largest = max(largest, float(np.abs(found - wanted).max()))
        same += float((found.argmax(1) == wanted.argmax(1)).mean()) / IMAGES
    return dict(difference=largest, same=same)
