"""predict.py on GeoTIFFs: windows, georeference, styles, areas; killed, gone on with; files of others."""
import os
import shutil
import signal
import sys
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
import rasterio
import torch
from gloo import FORK
from PIL import Image
from rio_cogeo.cogeo import cog_validate
from runs import read
from torch import nn

import predict
from data.common import Written, file_sha256, write
from data.datasets import normalise
from data.tiff import Tiff, TiffWriter
from models import infer
from models.checkpoint import save_weights
from models.infer import slide

pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
H, W, K, CROP = 1100, 260, 5, 128
NAMES = [f"class {i}" for i in range(K)]
RNG = np.random.default_rng(0)
IMAGE = np.repeat(np.repeat(RNG.integers(1, 256, (H // 10, W // 10, 3)), 10, 0), 10, 1).astype(np.uint8)
IMAGE[200:900, 100:] = 0  # nodata


class Net(nn.Module):
    """Logits of 5 classes that depend on neighbours and on the edge of the window."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Conv2d(3, K, 3, padding=1)

    def forward(self, x):
        return 4 * self.body(x)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder; its network is exchanged for Net()."""
    folder = tmp_path_factory.mktemp("run")
    ids = [10 * i for i in range(K)]
    classes = [dict(name=name, id=i, color=f"#{i:02x}80ff") for name, i in zip(NAMES, ids)]
    meta = dict(model=dict(name="unetformer"), classes=classes, ignore=[], norm="sat", crop=CROP, overlap=0.25,
                amp="off", saved="all", reading=dict(bands=None, input_range=None))
    save_weights(folder / "best.safetensors", {"w": torch.zeros(1)}, meta)
    return folder


def scene(path, pixels=IMAGE, **how):
    path.parent.mkdir(parents=True, exist_ok=True)
    how = dict(crs="EPSG:32632", transform=rasterio.Affine(0.5, 0, 5e5, 0, -0.5, 5e6), nodata=0) | how
    with rasterio.open(path, "w", driver="GTiff", count=3, height=len(pixels), width=pixels.shape[1], dtype="uint8",
                       tiled=True, compress="deflate", **how) as f:
        f.write(pixels.transpose(2, 0, 1))
    return path


def call(*argv, ok=0, patch=None):
    """predict.py in a fork of this process -> what it printed; patch() is called there before."""
    mine, other = FORK.Pipe()
    log = f"/tmp/predict_scene_{os.getpid()}.log"

    def work():
        sys.stdout = sys.stderr = open(log, "w", buffering=1)
        predict.ensemble.load_runs = lambda *args, **how: (
            Net().eval(), predict.load_weights(argv[0], header_only=True)[1])
        infer.ONE_PIECE = 0
        if patch:
            patch()
        with predict.run.one_line_errors():
            predict.main(predict.parse_args([str(word) for word in argv]))

    process = FORK.Process(target=work)
    process.start()
    process.join()
    with open(log) as f:
        text = f.read()
    os.unlink(log)
    assert process.exitcode == ok, text
    return text


def blended():
    with torch.inference_mode():
        return slide(Net().eval(), normalise(IMAGE, "sat"), CROP, 0.25, 16, False)


def read_bands(path):
    with rasterio.open(path) as f:
        return f.read()


def test_a_scene_becomes_a_geotiff_with_colours_style_overlay_and_areas(run, tmp_path):
    file = scene(tmp_path / "in/a.tif")
    write(run / "calibration.json", dict(temperature=2.0, weights=file_sha256(run / "best.safetensors")))
    text = call(run, tmp_path / "in", "--out", tmp_path / "p", "--confidence", "--probabilities")
    (run / "calibration.json").unlink()
    assert "wrote the mask of 1 image" in text and "calibration" not in text
    void = (IMAGE == 0).all(-1)
    logits = blended()
    ids, p = logits.argmax(0).numpy(), 255 * (logits / 2).softmax(0).numpy()
    with rasterio.open(file) as source, rasterio.open(tmp_path / "p/a.tif") as f:
        assert (f.crs, f.transform, f.nodata) == (source.crs, source.transform, 255)
        got = f.read(1)
        assert [f.colormap(1)[i][:3] for i in range(K)] == [(10 * i, 128, 255) for i in range(K)]
    best = np.sort(p, 0)
    clear = best[-1] - best[-2] > 0.1  # sums of floats are rounded in two ways
    assert clear.mean() > 0.99
    assert (got[~void & clear] == ids[~void & clear]).all() and (got[void] == 255).all()
    sure, shares = read_bands(tmp_path / "p/a_confidence.tif")[0], read_bands(tmp_path / "p/a_probabilities.tif")
    assert np.abs(sure - p.max(0))[~void].max() < 0.6 and (sure[void] == 0).all()
    assert np.abs(shares - p)[:, ~void].max() < 0.6 and (shares[:, void] == 0).all()
    assert rasterio.open(tmp_path / "p/a_probabilities.tif").descriptions == tuple(NAMES)
    for name in ("a", "a_confidence", "a_probabilities"):
        assert cog_validate(tmp_path / f"p/{name}.tif", strict=True)[0]

    entries = [(e.get("value"), e.get("label")) for e in ElementTree.parse(tmp_path / "p/a.qml").iter("paletteEntry")]
    assert entries == [(str(i), name) for i, name in enumerate(NAMES)]
    look = Image.open(tmp_path / "p/a_overlay.jpg")
    assert look.width == W and look.height > H  # a legend below
    areas = read(tmp_path / "p/summary.json")
    pixels = dict(zip(NAMES, np.bincount(got.ravel(), minlength=256).tolist()))
    assert areas["images"]["a"]["pixels"] == areas["total"]["pixels"] == pixels
    assert areas["images"]["a"]["without_class"] == void.sum() == 112_000
    assert areas["total"]["m2"] == {name: n / 4 for name, n in pixels.items()}
    names = {f.name for f in (tmp_path / "p").iterdir() if not f.name.startswith(".")}
    assert names == {"a.tif", "a.qml", "a_overlay.jpg", "a_confidence.tif", "a_probabilities.tif", "classes.json",
                     "summary.json"}


def test_raw_ids_and_formats(run, tmp_path):
    file = scene(tmp_path / "a.tif", IMAGE[:150, :150])
    call(run, file, "--out", tmp_path / "ids")
    call(run, file, "--out", tmp_path / "raw", "--label-out", "raw")
    call(run, file, "--out", tmp_path / "png", "--out-format", "png", "--confidence")
    ids = read_bands(tmp_path / "ids/a.tif")[0]
    assert (read_bands(tmp_path / "raw/a.tif")[0] == 10 * ids).all() and len(np.unique(ids)) > 2
    assert (np.asarray(Image.open(tmp_path / "png/a.png")) == ids).all()
    assert Image.open(tmp_path / "png/a_confidence.png").size == (150, 150)
    assert read(tmp_path / "raw/summary.json") == read(tmp_path / "ids/summary.json")
    assert 'value="40"' in (tmp_path / "raw/a.qml").read_text()
    # Georeferenced by a world file; a plain picture only if told so.
    Image.fromarray(IMAGE[:150, :150]).save(tmp_path / "b.png")
    call(run, tmp_path / "b.png", "--out", tmp_path / "plain")
    assert (np.asarray(Image.open(tmp_path / "plain/b.png")) == ids).all()
    (tmp_path / "b.pgw").write_text("0.5\n0\n0\n-0.5\n10.25\n19.75")
    call(run, tmp_path / "b.png", "--out", tmp_path / "world")
    with rasterio.open(tmp_path / "world/b.tif") as f:
        assert (f.read(1) == ids).all() and f.transform == rasterio.Affine(0.5, 0, 10, 0, -0.5, 20)
    assert "not known" in read(tmp_path / "world/summary.json")["total"]["area"]


def killed_in_row(n):
    """Patch: the process is killed when the n-th row of tiles has been written."""
    def patch():
        add_row, rows = TiffWriter.add_row, []

        def add(self, pixels):
            add_row(self, pixels)
            rows.append(1)
            if len(rows) == n:
                os.kill(os.getpid(), signal.SIGKILL)
        TiffWriter.add_row = add
    return patch


def killed_at_rename(n):
    def patch():
        rename, names = os.replace, []

        def count(*args):
            names.append(1)
            if len(names) == n:
                os.kill(os.getpid(), signal.SIGKILL)
            rename(*args)
        os.replace = count
    return patch


@pytest.fixture(scope="module")
def unharmed(run, tmp_path_factory):
    """A scene, and the folder with its result."""
    folder = tmp_path_factory.mktemp("unharmed")
    file = scene(folder / "a.tif")
    call(run, file, "--out", folder / "want", "--confidence")
    return file, folder / "want"


@pytest.mark.parametrize("kill, left", [
    (killed_in_row(1), 0),  # the mask's first tiles are there, those of the confidence not
    (killed_in_row(4), 512),  # the last two rows of the mask are written at once
    (killed_at_rename(2), H),  # the mask's; the first was that of classes.json
], ids=["row 1", "row 4", "mask"])
def test_killed_at_any_time_the_same_command_goes_on_and_ends_with_the_same_bytes(run, unharmed, tmp_path, kill, left):
    file, want = unharmed
    argv = [run, file, "--out", tmp_path / "p", "--confidence"]
    call(*argv, ok=-signal.SIGKILL, patch=kill)
    computed = tmp_path / "rows"

    def note_rows():
        inner = predict.slide_rows

        def outer(*args, first, **how):
            computed.write_text(str(first))
            return inner(*args, first=first, **how)
        predict.slide_rows = outer
    call(*argv, patch=note_rows)
    assert int(computed.read_text()) == left
    for name in ("a.tif", "a_confidence.tif", "a.qml", "a_overlay.jpg", "summary.json", "classes.json"):
        assert (tmp_path / "p" / name).read_bytes() == (want / name).read_bytes()
    assert not list((tmp_path / "p").glob("*.part"))


def test_finished_scenes_are_skipped_only_if_nothing_has_changed(run, tmp_path):
    file = scene(tmp_path / "a.tif", IMAGE[:130, :130])
    argv = [run, file, "--out", tmp_path / "p"]
    call(*argv)
    assert "1 of them by an earlier call" in call(*argv)
    assert "earlier call" not in call(*argv, "--overlap", 0.5)
    scene(file, IMAGE[:130, :140])
    assert "earlier call" not in call(*argv, "--overlap", 0.5)
    assert Tiff(tmp_path / "p/a.tif").shape == (130, 140, 1)


def test_no_image_is_begun_with_a_compiled_network_and_ended_without(run, tmp_path):
    file = scene(tmp_path / "a.tif", IMAGE[:130, :130])
    argv = [run, file, "--out", tmp_path / "p"]

    class Program(predict.Compiled):
        """Answers otherwise than the network, and more clearly than by rounding."""

        def __init__(self, net):
            nn.Module.__init__(self)
            self.net = net

        def forward(self, x):
            return -self.net(x)

    def fake():
        predict.compiled = lambda net, crop, amp: (Program(net), "compiled in no time")

    def fails():
        predict.compiled = lambda net, crop, amp: (net, "not compiled, goes on without")

    def killed():
        fake()
        killed_at_rename(2)()

    assert "begun again" not in call(*argv)
    plain = read_bands(tmp_path / "p/a.tif")
    text = call(*argv, "--compile", patch=fails)
    assert "not compiled" in text and "1 of them by an earlier call" in text  # the very same network
    text = call(*argv, "--compile", patch=fake)
    assert "compiled in no time" in text and "earlier call" not in text
    assert (read_bands(tmp_path / "p/a.tif") != plain).any()
    assert "1 of them by an earlier call" in call(*argv, "--compile", patch=fake)
    assert "earlier call" not in call(*argv)
    assert (read_bands(tmp_path / "p/a.tif") == plain).all()
    argv[-1] = tmp_path / "killed"
    call(*argv, "--compile", ok=-signal.SIGKILL, patch=killed)
    assert "begun by a call with other settings, or before the image changed, and not finished" in call(*argv)
    assert (read_bands(tmp_path / "killed/a.tif") == plain).all()


def test_what_somebody_has_changed_is_not_replaced(run, tmp_path):
    file = scene(tmp_path / "a.tif", IMAGE[:130, :130])
    argv = [run, file, "--out", tmp_path / "p", "--overlap", 0.5]
    call(*argv[:-2])
    for name in ("a.tif", "summary.json"):
        touched = tmp_path / "p" / name
        before = touched.read_bytes()
        touched.write_bytes(before + b"by hand")
        text = call(*argv, ok=2)
        assert f"{touched}: would be overwritten" in text and "--overwrite" in text
        assert touched.read_bytes() == before + b"by hand"
        touched.write_bytes(before)
    (tmp_path / "p/a.tif").write_bytes(b"by hand")
    call(*argv, "--overwrite")
    assert Tiff(tmp_path / "p/a.tif").shape == (130, 130, 1)


def test_what_cannot_be_read_is_named_and_the_rest_is_finished(run, tmp_path):
    for name in "abcd":
        scene(tmp_path / f"in/{name}.tif", IMAGE[:150, :150])
    damaged = scene(tmp_path / "in/e.tif", IMAGE[:700, :150])  # found when its second row of tiles is unpacked
    data = bytearray(damaged.read_bytes())
    middle = int(Tiff(damaged).page.offsets[1]) + 50
    data[middle:middle + 20] = bytes(20)
    damaged.write_bytes(data)
    short, empty = tmp_path / "in/b.tif", tmp_path / "in/c.tif"
    short.write_bytes(short.read_bytes()[:-300])
    empty.write_bytes(b"")
    text = call(run, tmp_path / "in", "--out", tmp_path / "p", ok=2)
    assert f"left out: {short}: truncated TIFF" in text and f"left out: {empty}: " in text
    assert f"left out: {damaged}: damaged TIFF: tile 2 of 3 cannot be unpacked" in text
    assert "wrote the masks of 2 images" in text
    assert sorted(f.name for f in (tmp_path / "p").glob("*.tif*")) == ["a.tif", "d.tif"]
    assert set(read(tmp_path / "p/summary.json")["images"]) == {"a", "d"}


def test_ground_control_points_make_a_geotiff_too(run, tmp_path):
    points = [rasterio.control.GroundControlPoint(r, c, 10 + c / 1e3, 50 - r / 1e3) for r in (0, 63) for c in (0, 63)]
    with rasterio.open(tmp_path / "a.tif", "w", driver="GTiff", count=3, height=64, width=64, dtype="uint8",
                       gcps=points, crs="EPSG:4326") as f:
        f.write(IMAGE[:64, :64].transpose(2, 0, 1))
    (tmp_path / "b.png").write_bytes(b"")
    Image.fromarray(IMAGE[:64, :64]).save(tmp_path / "b.png")
    (tmp_path / "b.pgw").write_text("1\n0\n0\n-1\n5\n6\n")
    text = call(run, tmp_path, "--out", tmp_path / "p")
    with rasterio.open(tmp_path / "p/a.tif") as f:
        found, crs = f.gcps
        assert [(p.row, p.col, p.x, p.y) for p in found] == [(p.row, p.col, p.x, p.y) for p in points]
        assert crs.to_epsg() == 4326
    assert (tmp_path / "p/b.tif").exists() and "no image by its suffix" not in text  # the world file is used


def test_layers_of_an_earlier_call_with_other_settings_are_named(run, tmp_path):
    scene(tmp_path / "a.tif", IMAGE[:64, :64])
    argv = [run, tmp_path / "a.tif", "--out", tmp_path / "p"]
    assert "of an earlier call" not in call(*argv, "--probabilities")
    said = call(*argv)
    assert f"note: {tmp_path}/p/a_probabilities.tif: of an earlier call with other settings" in said
    assert "a.tif: of an earlier" not in said


def test_what_another_process_writes_is_left_out_and_its_tiles_stay(run, tmp_path):
    for name in "ab":
        scene(tmp_path / f"in/{name}.tif", IMAGE[:150, :150])
    part = tmp_path / "p/a.tif.part"
    argv = [run, tmp_path / "in", "--out", tmp_path / "p"]
    with Written(tmp_path / "p").claim("a"):
        TiffWriter(tmp_path / "p/a.tif", (150, 150, 1))
        before = part.read_bytes()
        text = call(*argv, ok=2)
        assert f"left out: {tmp_path}/p/a: another process is writing there; wait for it" in text
        assert part.read_bytes() == before and (tmp_path / "p/b.tif").exists()
    assert "masks of 2 images (1 of them by an earlier call)" in call(*argv)


@pytest.mark.parametrize("ending, n, said", [
    (".tif.part", 3, "a.tif.part: cannot be written (No space left on device); make room"),  # a row of tiles
    (".tif.part", 6, "a.tif.part: cannot be written (No space left on device); make room"),  # of an overview
    (".tmp", 2, "a.tif: cannot be written (No space left on device); is the disk full"),  # the whole file
])
def test_a_full_disk_is_one_line_and_the_same_command_goes_on(run, unharmed, tmp_path, ending, n, said):
    file, want = unharmed
    argv = [run, file, "--out", tmp_path / "p"]

    def full():
        import builtins
        import errno
        inner, count = builtins.open, []

        class Full:
            def __init__(self, file):
                self.file = file

            def __enter__(self):
                return self

            def __exit__(self, *error):
                self.file.close()

            def write(self, data):
                count.append(1)
                if len(count) == n:
                    self.file.write(bytes(data)[:50])
                    raise OSError(errno.ENOSPC, "No space left on device")
                return self.file.write(data)

        def open_(name, mode="r", **how):
            file = inner(name, mode, **how)
            return Full(file) if str(name).endswith(ending) and mode != "rb" else file
        sys.modules["data.tiff"].open = open_
    text = call(*argv, ok=2, patch=full)
    assert text.count("\n") == 1 and said in text
    assert not (tmp_path / "p/a.tif").exists()
    call(*argv)
    assert (tmp_path / "p/a.tif").read_bytes() == (want / "a.tif").read_bytes()


def test_more_classes_than_a_byte_holds_are_refused_at_once(run, tmp_path):
    shutil.copytree(run, tmp_path / "many")
    meta = predict.load_weights(run)[1]
    classes = [dict(name=str(i), id=i) for i in range(300)]
    save_weights(tmp_path / "many/best.safetensors", {"w": torch.zeros(1)}, dict(meta) | dict(classes=classes))
    file = scene(tmp_path / "a.tif", IMAGE[:8, :8])
    text = call(tmp_path / "many", file, "--out", tmp_path / "p", ok=2)
    assert "300 classes; expected 1 to 254" in text and text.count("\n") == 1 and not (tmp_path / "p").exists()
