"""models/export.py: the ONNX file, as onnxruntime runs it, says what the network says; bench_export.py has them all."""
import json
import sys

import geodeep
import numpy as np
import onnxruntime
import pytest
import rasterio
import torch
from rasterio.transform import from_origin
from scipy.ndimage import median_filter

from data.common import BadInput, write
from data.datasets import NORMS
from models.export import to_onnx, training_resolution
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
def test_the_file_says_what_the_network_says(name):
    torch.manual_seed(0)
    net, crop = NETS[name]().eval(), int(name.split()[-1])
    before = {key: t.clone() for key, t in net.state_dict().items()}
    content, compared = to_onnx(net, meta_of(crop), 30)
    image = np.random.default_rng(1).integers(0, 256, (crop, crop, 3), np.uint8)
    session = onnxruntime.InferenceSession(content)
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
def model():
    return to_onnx(vit("linear", "dinov3", 16, registers=4).eval(), meta_of(32), 12.5)[0]


def test_what_deepness_and_geodeep_look_for(model):
    session = onnxruntime.InferenceSession(model)
    (taken,), (given,) = session.get_inputs(), session.get_outputs()
    assert (taken.type, taken.shape, given.type, given.shape) == (
        "tensor(float)", [1, 3, 32, 32], "tensor(float)", [1, 3, 32, 32])
    found = session.get_modelmeta().custom_metadata_map
    assert {key: json.loads(value) for key, value in found.items()} == dict(
        model_type="Segmentor", class_names={"0": "field", "1": "road", "2": "car"}, resolution=12.5,
        tile_size=32, tiles_size=32, tiles_overlap=25, seg_thresh=0, seg_small_segment=0)


def test_geodeep_finds_the_classes_of_the_network(tmp_path):
    torch.manual_seed(0)
    net = vit("fpn", "dinov3", 16, registers=4).eval()
    (tmp_path / "model.onnx").write_bytes(to_onnx(net, meta_of(64), 20)[0])
    # The map's pixels are half as wide as the network's: it is one window of 64 x 64.
    image = np.random.default_rng(0).integers(0, 256, (3, 8, 8), np.uint8).repeat(16, 1).repeat(16, 2)
    with rasterio.open(tmp_path / "map.tif", "w", driver="GTiff", height=128, width=128, count=3, dtype="uint8",
                       crs="EPSG:32632", transform=from_origin(500_000, 5_500_000, 0.1, 0.1), tiled=True) as file:
        file.write(image)
    files = str(tmp_path / "map.tif"), str(tmp_path / "model.onnx")
    found = geodeep.segment(*files)
    polygons = json.loads(geodeep.segment(*files, output_type="geojson"))["features"]
    with rasterio.open(tmp_path / "map.tif") as file:
        x = file.read(out_shape=(3, 64, 64), resampling=rasterio.enums.Resampling.bilinear)
    mean, std = (np.reshape(v, (3, 1, 1)) for v in NORMS["sat"])
    with torch.no_grad():
        z = net(torch.tensor((x / 255 - mean) / std, dtype=torch.float32)[None])
    assert (found == median_filter(z[0].argmax(0).byte().numpy(), 5)).mean() > 0.999
    assert len(np.unique(found)) == 3 and {p["properties"]["class"] for p in polygons} == {*NAMES}


def test_without_the_package_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(BadInput, match="--export needs the package onnx; type pip install onnx$"):
        to_onnx(None, meta_of(32), 30)


def test_a_network_that_no_file_holds_is_refused():
    with torch.device("meta"):
        large = torch.nn.Linear(2**15, 2**15)
    with pytest.raises(BadInput, match="4.0 GiB of weights, and an ONNX file holds 2"):
        to_onnx(large, meta_of(32), 30)


class Moody(torch.nn.Module):
    """Answers otherwise while it is exported."""

    def forward(self, x):
        return x if torch.jit.is_tracing() else -x


def test_a_file_that_answers_otherwise_is_refused():
    with pytest.raises(BadInput, match="onnxruntime finds the network's class in .*% of the pixels"):
        to_onnx(Moody(), meta_of(32), 30)


def test_without_onnxruntime_nothing_is_compared(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    content, compared = to_onnx(torch.nn.Identity(), meta_of(32), 12.5)
    assert compared is None
    x = np.random.default_rng(0).random((1, 3, 32, 32), np.float32)
    (found,) = onnxruntime.InferenceSession(content).run(None, {"input": x})
    mean, std = (np.reshape(v, (3, 1, 1)) for v in NORMS["sat"])
    want = np.exp((x - mean) / std)
    np.testing.assert_allclose(found, want / want.sum(1, keepdims=True), atol=1e-5)


@pytest.mark.parametrize("epsg, pixel, said", [(32632, 0.2, 20.0), (4326, 1e-6, None), (None, 1, None)])
def test_the_size_of_a_pixel_stands_in_a_georeferenced_training_image(tmp_path, epsg, pixel, said):
    for folder, bands in (("images", 3), ("masks", 1)):
        (tmp_path / folder).mkdir()
        georef = dict(crs=f"EPSG:{epsg}", transform=from_origin(9, 48, pixel, pixel)) if epsg else {}
        with rasterio.open(tmp_path / folder / "a.tif", "w", driver="GTiff", height=8, width=8, count=bands,
                           dtype="uint8", **georef) as file:
            file.write(np.zeros((bands, 8, 8), np.uint8))
    write(tmp_path / "dataset.json", dict(
        name="D", images="images/*.tif", masks="masks/*.tif", classes=[dict(name="a", id=0)], ignore=[],
        splits=dict(train="*")))
    assert training_resolution(dict(source="folder", root=str(tmp_path), variant=None)) == said


def test_without_the_training_images_the_size_of_a_pixel_is_not_known(tmp_path):
    assert training_resolution(dict(source="demo", root=str(tmp_path / "moved"), variant=None)) is None
