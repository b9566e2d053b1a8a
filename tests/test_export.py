"""models/export.py: the ONNX file, as onnxruntime runs it, says what the network says; tests/bench_export.py has them all."""
import json
import sys

import numpy as np
import onnxruntime
import pytest
import torch

from data.common import BadInput
from data.datasets import NORMS
from models.export import export
from models.heads import HEADS, Segmenter
from models.vit import ViT, preset

NAMES = ["field", "road", "car"]


def vit(head, family, patch, registers=0, grid=0):
    backbone = ViT(**preset(family, patch, 16, 2, 2, registers=registers, grid=grid))
    return Segmenter(backbone, HEADS[head](16, 2, 3, patch), [0, 1])


# One that fills whole patches, two that do not; DINOv2's positions are resized in two ways.
NETS = {
    "dinov3 fpn 64": lambda: vit("fpn", "dinov3", 16, registers=4),
    "dinov2 linear 60": lambda: vit("linear", "dinov2", 14, grid=7),
    "dinov2 upernet 90": lambda: vit("upernet", "dinov2", 14, registers=4, grid=3),
}


def meta_of(crop, norm="sat"):
    return dict(norm=norm, crop=crop, overlap=0.25, classes=[dict(name=name) for name in NAMES])


@pytest.mark.parametrize("name", NETS)
def test_the_file_says_what_the_network_says(name, tmp_path):
    torch.manual_seed(0)
    net, crop = NETS[name]().eval(), int(name.split()[-1])
    before = {key: t.clone() for key, t in net.state_dict().items()}
    compared = export(net, meta_of(crop), tmp_path / "model.onnx", 30)
    image = np.random.default_rng(1).integers(0, 256, (crop, crop, 3), np.uint8)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    x = (image / 255).astype(np.float32).transpose(2, 0, 1)[None]
    (found,) = session.run(None, {session.get_inputs()[0].name: x})
    mean, std = NORMS["sat"]
    with torch.no_grad():
        z = net(torch.tensor(((image / 255 - mean) / std).transpose(2, 0, 1)[None], dtype=torch.float32))
    want = np.exp(z.numpy()) / np.exp(z.numpy()).sum(1, keepdims=True)
    np.testing.assert_allclose(found, want, atol=1e-5)
    assert found.dtype == np.float32 and found.shape == (1, 3, crop, crop) and np.ptp(found[0, 0]) > 1e-4
    assert compared["same"] > 0.999 and compared["difference"] < 1e-5
    assert all(torch.equal(t, before[key]) for key, t in net.state_dict().items())


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    export(vit("linear", "dinov3", 16, registers=4).eval(), meta_of(32), path, 12.5)
    return path


def test_what_deepness_and_geodeep_look_for(model):
    session = onnxruntime.InferenceSession(model)
    (taken,), (given,) = session.get_inputs(), session.get_outputs()
    assert (taken.type, taken.shape, given.type, given.shape) == (
        "tensor(float)", [1, 3, 32, 32], "tensor(float)", [1, 3, 32, 32])
    found = session.get_modelmeta().custom_metadata_map
    assert {key: json.loads(value) for key, value in found.items()} == dict(
        model_type="Segmentor", class_names={"0": "field", "1": "road", "2": "car"}, resolution=12.5,
        tile_size=32, tiles_size=32, tiles_overlap=25, seg_thresh=0, seg_small_segment=0)


def test_without_the_package_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(BadInput, match="--export needs the package onnx; type pip install onnx$"):
        export(None, meta_of(32), tmp_path / "model.onnx", 30)
    assert not list(tmp_path.iterdir())


def test_a_network_that_no_file_holds_is_refused(tmp_path):
    with torch.device("meta"):
        large = torch.nn.Linear(2**15, 2**15)
    with pytest.raises(BadInput, match="model.onnx: 4.0 GiB of weights, and an ONNX file holds 2"):
        export(large, meta_of(32), tmp_path / "model.onnx", 30)


class Moody(torch.nn.Module):
    """Answers otherwise while it is exported."""

    def forward(self, x):
        return x if torch.jit.is_tracing() else -x


def test_a_file_that_answers_otherwise_is_not_written(tmp_path):
    with pytest.raises(BadInput, match="model.onnx: not written, for it names 0.* of the pixels"):
        export(Moody(), meta_of(32), tmp_path / "model.onnx", 30)
    assert not list(tmp_path.iterdir())


def test_without_onnxruntime_the_file_is_written_and_not_compared(tmp_path, monkeypatch, model):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    net = vit("linear", "dinov3", 16, registers=4).eval()
    assert export(net, meta_of(32), tmp_path / "model.onnx", 12.5) is None
    assert (tmp_path / "model.onnx").stat().st_size == model.stat().st_size
