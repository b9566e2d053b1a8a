"""data/compare.py and data/summary.py: paired differences by hand, what is refused, files that do not fit."""
import io

import numpy as np
import pytest
import torch

from data.common import BadInput, file_sha256, write
from data.compare import compare, intervals, pack_matrices, read_scored, scene_table

NAMES = ["road", "tree", "pool"]
PROTOCOL = dict(dataset="demo", variant=None, split="test", files="12ab", classes=NAMES, ignore=[255],
                ignore_boundary=0, root="/d", overlap=0.25)


def matrices(hits, total=100):
    """(N, 3, 3): of 100 pixels of the first two classes each, so many are right; no third class."""
    out = torch.zeros(len(hits), 3, 3, dtype=torch.int64)
    for i, n in enumerate(hits):
        out[i, 0, 0] = out[i, 1, 1] = n
        out[i, 0, 1] = out[i, 1, 0] = total - n
    return out


def result(folder, cms, scenes=None, **protocol):
    """A folder as eval.py writes it."""
    images = [f"image {i}" for i in range(len(cms))]
    write(folder / "eval.json", dict(confusion=cms.sum(0).tolist(), protocol=PROTOCOL | protocol))
    write(folder / "matrices.npz", pack_matrices(images, scenes or images, cms))
    return folder


def rows(text):
    """{class or mIoU: numbers and words of its line}"""
    return {line.split()[0]: line.split()[1:] for line in text.splitlines()[4:]}


def test_the_difference_is_paired_over_scenes(tmp_path):
    hits = np.random.default_rng(0).integers(20, 70, 30)
    a = read_scored(result(tmp_path / "a", matrices(hits)))
    b = read_scored(result(tmp_path / "b", matrices(hits + 5), overlap=0.5))  # better everywhere
    found = rows(compare(a, b))
    old, new = (n / (200 - n) for n in (hits.mean(), hits.mean() + 5))  # IoU: n of 100 + (100 - n)
    for name in ("mIoU", "road", "tree"):
        assert [float(v) for v in found[name][:3]] == pytest.approx([old, new, new - old], abs=6e-5)
        low, _, high = found[name][3:6]
        assert 0 < float(low) < new - old < float(high) and found[name][6:] == ["B", "is", "better"]
        # The interval of either one is many times as wide: scenes differ more than models.
        alone = intervals(a.matrices, a.scenes, NAMES)["miou"]
        assert alone[1] - alone[0] > 8 * (float(high) - float(low))
    assert found["pool"] == ["nan", "nan", "nan", "-"]
    assert "A is better" in compare(b, a) and "better" not in compare(a, a)
    assert [float(v) for v in rows(compare(a, a))["mIoU"][2:6:1] if v != "to"] == [0, 0, 0]


def test_classes_may_stand_in_another_order(tmp_path):
    a = read_scored(result(tmp_path / "a", matrices([50, 60, 70])))
    order = [2, 0, 1]
    turned = a.matrices[:, order][:, :, order]
    b = read_scored(result(tmp_path / "b", turned, classes=[NAMES[i] for i in order]))
    assert {tuple(v[2:3]) for v in rows(compare(a, b)).values()} == {("+0.0000",), ("nan",)}


@pytest.mark.parametrize("other, said", [
    (dict(dataset="loveda"), "data set: demo and loveda"),
    (dict(variant="rgb"), "variant: None and rgb"),
    (dict(split="val"), "split: test and val"),
    (dict(files="77"), "images of the split: 12ab and 77"),
    (dict(classes=["road", "tree", "sea"]), "classes: .*'pool'.* and .*'sea'"),
    (dict(ignore=[]), r"ignored values: \[255\] and \[\]"),
    (dict(ignore_boundary=3), "--ignore-boundary: 0 and 3")])
def test_what_is_scored_otherwise_is_refused_by_name(tmp_path, other, said):
    a = result(tmp_path / "a", matrices([50, 60]))
    b = result(tmp_path / "b", matrices([50, 60]), **other)
    with pytest.raises(BadInput, match=f"cannot be compared, they differ in {said}"):
        compare(read_scored(a), read_scored(b))


def test_other_labels_and_other_scenes_are_refused(tmp_path):
    a = read_scored(result(tmp_path / "a", matrices([50, 60])))
    b = read_scored(result(tmp_path / "b", matrices([50, 60], total=101)))
    with pytest.raises(BadInput, match="differ in labels: the masks hold other numbers of pixels"):
        compare(a, b)
    c = read_scored(result(tmp_path / "c", matrices([50, 60]), ["x", "x"]))
    with pytest.raises(BadInput, match="differ in names or scenes of the images"):
        compare(a, c)


def test_one_scene_has_no_interval(tmp_path):
    a = read_scored(result(tmp_path / "a", matrices([50, 60]), ["x", "x"]))
    text = compare(a, a)
    assert "2 images of one scene: no intervals" in text and rows(text)["road"][2:] == ["+0.0000", "-"]
    assert intervals(a.matrices, a.scenes, NAMES)["miou"] is None


def test_a_run_folder_leads_to_its_results_and_what_is_missing_is_said(tmp_path):
    write(tmp_path / "run/protocol.json", dict(reported="test"))
    for split in ("test", "val"):
        result(tmp_path / f"run/eval-{split}", matrices([50, 60]), split=split)
    run = tmp_path / "run"
    assert read_scored(run).report["protocol"]["split"] == "test"
    assert read_scored(run, "val").report["protocol"]["split"] == "val"
    assert read_scored(run / "eval-val/eval.json").report["protocol"]["split"] == "val"
    with pytest.raises(BadInput, match="eval-val: scores of val, not of --split test"):
        read_scored(run / "eval-val", "test")
    with pytest.raises(BadInput, match=f"type python eval.py {run} --split train first"):
        read_scored(run, "train")
    write(run / "eval-val/matrices.npz", pack_matrices(["a"], ["a"], matrices([1])))
    for content in (b"PK no zip", b""):
        write(run / "eval-test/matrices.npz", content)
        for split in ("val", "test"):
            with pytest.raises(BadInput, match="matrices.npz: does not belong to the eval.json beside it"):
                read_scored(run, split)


def test_results_of_weights_that_are_gone_are_not_compared(tmp_path):
    run = tmp_path / "run"
    write(run / "protocol.json", dict(reported="test"))
    write(run / "best.safetensors", b"first")
    sha = file_sha256(run / "best.safetensors")
    plain, averaged = run / "eval-test", run / "eval-test-d4"
    result(plain, matrices([50, 60]), weights=sha, tta="none")
    result(averaged, matrices([50, 60]), weights="of all views", tta="d4")
    assert read_scored(run).images == read_scored(averaged).images
    write(run / "best.safetensors", b"trained on")
    for named in (run, plain):
        with pytest.raises(BadInput, match=f"earlier weights than {run}/best.safetensors; type python eval.py {run}"):
            read_scored(named)
    write(run / "results.json", dict(accuracy=0.9))
    with pytest.raises(BadInput, match="a run of train_cls.py; --compare is for segmentation"):
        read_scored(run)
    with pytest.raises(BadInput, match="gone: no such folder"):
        read_scored(tmp_path / "gone")


def test_an_array_that_would_run_code_is_refused(tmp_path):
    folder = result(tmp_path / "a", matrices([5, 6]))
    file = io.BytesIO()
    np.savez(file, images=np.array([print, 1], object), scenes=np.array(["a", "b"]), matrices=np.zeros((2, 3, 3)))
    write(folder / "matrices.npz", file.getvalue())
    with pytest.raises(BadInput, match="does not belong"):
        read_scored(folder)


def test_the_table_of_scenes_has_a_row_per_image():
    cms = matrices([50, 100])
    cms[1, 1] = cms[1, :, 1] = 0  # the second image has one class
    text = scene_table(["a", 'b,"c"'], ["s", "s"], cms, NAMES)
    assert text == ("image,scene,mIoU,OA,pixels,IoU road,IoU tree,IoU pool\n"
                    "a,s,0.333333,0.500000,200,0.333333,0.333333,\n"
                    '"b,""c""",s,1.000000,1.000000,100,1.000000,,\n')
