"""Seven public data sets, read as they are distributed: unpack the official download, point --root at it.

Each entry of SETS is the description that data/datasets.py begins with, and these keys, all optional there too:
    "variants"    forms of the data set: of every dict one entry is taken, the one on disk or the one in --variant, and
                  its keys become the description's. Two on disk are a question to the user, never a guess
    "unlabelled"  splits whose masks may be missing, since they are hidden or come in another file: for predict.py only
    "select"      the share of train held out to choose the weights, where there is but one other split with labels
    "scene"       regex for the scene in a name: a hold-out keeps scenes whole, data.check finds those in two splits
    "tiles"       side of the square tiles that the split lists mean: NAME_k is the k-th of image NAME, row by row
    "report"      further means under their own names, without the classes listed: {"5_without_clutter": ["clutter"]}
    "warning"     what is known to be wrong with the data, said before every training
An eighth is one more entry. EuroSAT is scene classification, folders of images without masks: see train_cls.py.
"""
from pathlib import Path

from .common import BadInput


def by_id(colors: dict[str, str], first: int = 0) -> list[dict]:  # masks hold first, first + 1, ... in this order
    return [{"name": name, "id": i, "color": color} for i, (name, color) in enumerate(colors.items(), first)]


def by_color(colors: dict[str, str]) -> list[dict]:  # masks hold these colours
    return [{"name": name, "color": color} for name, color in colors.items()]


ISPRS = dict(
    classes=by_color({"impervious": "#FFFFFF", "building": "#0000FF", "low vegetation": "#00FFFF", "tree": "#00FF00",
                      "car": "#FFFF00", "clutter": "#FF0000"}),
    ignore=["#000000"],  # the eroded borders of noBoundary; in the full labels no pixel is black
    report={"5_without_clutter": ["clutter"]}, select=0.1)  # a scene is a tile: 6000 x 6000, or about 2500 x 2000

SETS = {
    "potsdam": dict(
        ISPRS,
        variants=[
            {"rgb": {"images": "2_Ortho_RGB/top_potsdam_*_RGB.tif"},
             "irrg": {"images": "3_Ortho_IRRG/top_potsdam_*_IRRG.tif"},
             "rgbir": {"images": "4_Ortho_RGBIR/top_potsdam_*_RGBIR.tif"}},  # four bands: --bands says which three
            {"full": {"masks": "5_Labels_all/top_potsdam_*_label.tif"},
             "eroded": {"masks": "5_Labels_all_noBoundary/top_potsdam_*_label_noBoundary.tif"},
             "participants": {"masks": "5_Labels_for_participants/top_potsdam_*_label.tif", "unlabelled": ["test"]}}],
        splits={"train": [f"*_potsdam_{t}_*" for t in "2_10 2_11 2_12 3_10 3_11 3_12 4_10 4_11 4_12 5_10 5_11 5_12 6_7 "
                          "6_8 6_9 6_10 6_11 6_12 7_7 7_8 7_9 7_10 7_11 7_12".split()],
                "test": [f"*_potsdam_{t}_*" for t in "2_13 2_14 3_13 3_14 4_13 4_14 4_15 5_13 5_14 5_15 6_13 6_14 6_15 "
                         "7_13".split()]},
        warning="the labels of tile 7_10 are known to be faulty; it is in train, as published"),

    "vaihingen": dict(  # infrared, red, green; the two later archives unpacked into folders of their names
        ISPRS, images="top/top_mosaic_09cm_area*.tif",
        variants=[
            {"participants": {"masks": "gts_for_participants/top_mosaic_09cm_area*.tif", "unlabelled": ["test"]},
             "complete": {"masks": "ISPRS_semantic_labeling_Vaihingen_ground_truth_COMPLETE/"
                                   "top_mosaic_09cm_area*.tif"},
             "eroded": {"masks": "ISPRS_semantic_labeling_Vaihingen_ground_truth_eroded_COMPLETE/"
                                 "top_mosaic_09cm_area*_noBoundary.tif"}}],
        splits={"train": [f"*_area{n}" for n in (1, 3, 5, 7, 11, 13, 15, 17, 21, 23, 26, 28, 30, 32, 34, 37)],
                "test": [f"*_area{n}" for n in (2, 4, 6, 8, 10, 12, 14, 16, 20, 22, 24, 27, 29, 31, 33, 35, 38)]}),

    "loveda": dict(
        images="*/*/images_png/*.png", masks="*/*/masks_png/*.png",
        classes=by_id({"background": "#FFFFFF", "building": "#FF0000", "road": "#FFFF00", "water": "#0000FF",
                       "barren": "#9F81B7", "forest": "#00FF00", "agriculture": "#FFC380"}, first=1),
        ignore=[0],  # no data; the online grader takes 0..6, which is what predict.py --label-out train writes
        splits={"train": "Train/*", "val": "Val/*", "test": "Test/*"}, unlabelled=["test"],
        select=0.1, scene=r"(.*?)\d{1,2}$"),  # scenes are not published: blocks of a hundred neighbouring numbers

    "landcoverai": dict(
        variants=[{"raw": {"images": "images/*.tif", "masks": "masks/*.tif", "tiles": 512},
                   "tiles": {"images": "output/*.jpg", "masks": "output/*_m.png"}}],  # from the official split.py
        classes=by_id({"background": "#D9D2C5", "building": "#D1483D", "woodland": "#1E7B3C", "water": "#2F6FD0",
                       "road": "#7F7F7F"}),
        ignore=[], splits={"train": "train.txt", "val": "val.txt", "test": "test.txt"}, scene=r"([^/]*)_\d+$",
        warning="the official lists spread each orthophoto's tiles over train, val and test: scores are optimistic"),

    "isaid": dict(  # the images are DOTA's, a separate download; masks of absent images are left alone
        images="*/images/P????.png",
        variants=[{"folder": {"masks": "*/Semantic_masks/images/P????_instance_color_RGB.png"},
                   "beside": {"masks": "*/images/P????_instance_color_RGB.png"}}],
        classes=by_color({
            "background": "#000000", "ship": "#00003F", "storage tank": "#003F3F", "baseball diamond": "#003F00",
            "tennis court": "#003F7F", "basketball court": "#003FBF", "ground track field": "#003FFF",
            "bridge": "#007F3F", "large vehicle": "#007F7F", "small vehicle": "#00007F", "helicopter": "#0000BF",
            "swimming pool": "#0000FF", "roundabout": "#00BF7F", "soccer field": "#007FBF", "plane": "#007FFF",
            "harbor": "#00649B"}),
        ignore=[], splits={"train": "train/*", "val": "val/*", "test": "test/*"}, unlabelled=["test"],
        report={"15_without_background": ["background"]}, select=0.1),

    "openearthmap": dict(
        images="*/images/*.tif", masks="*/labels/*.tif",
        variants=[{"all": {"splits": {"train": "train.txt", "val": "val.txt", "test": "test.txt"}},
                   "wo_xbd": {"splits": {"train": "train_wo_xBD.txt", "val": "val_wo_xBD.txt",
                                         "test": "test_wo_xBD.txt"}}}],  # xBD's images are a separate download
        classes=by_id({"bareland": "#800000", "rangeland": "#00FF24", "developed": "#949494", "road": "#FFFFFF",
                       "tree": "#226126", "water": "#0045FF", "agriculture": "#4BB549", "building": "#DE1F07"},
                      first=1),
        ignore=[0], unlabelled=["test"], select=0.1, scene="([^/]*)/"),  # 0 = unknown; a scene is a region

    "aeroscapes": dict(
        images="JPEGImages/*.jpg", masks="SegmentationClass/*.png",
        classes=by_id({"background": "#000000", "person": "#C08080", "bike": "#008000", "car": "#808080",
                       "drone": "#800000", "boat": "#000080", "animal": "#C00080", "obstacle": "#C00000",
                       "construction": "#C08000", "vegetation": "#004000", "road": "#808000", "sky": "#008080"}),
        ignore=[], splits={"train": "ImageSets/trn.txt", "val": "ImageSets/val.txt"},
        report={"11_without_background": ["background"]}, select=0.1, scene=r"([^/]*)_\d+$"),  # a scene is one video
}


def files_of(d: dict) -> list[str]:  # every pattern and list of a description, or of a part of one
    rules = [r for rule in d.get("splits", {}).values() for r in ([rule] if isinstance(rule, str) else rule)]
    return [d[key] for key in ("images", "masks") if key in d] + [r for r in rules if r.endswith(".txt")]


def absent(root: Path, d: dict) -> list[str]:  # of files_of, what matches nothing
    return [pattern for pattern in files_of(d) if not any(root.glob(pattern))]


def describe(name: str, root: str | Path, variant: str | None = None) -> dict:
    """The description of a set in the form found in root, with "variant": the forms taken, joined by commas."""
    d, root, taken, several = {"name": name, "ignore": [], **SETS[name]}, Path(root), [], []
    asked = [word.strip().lower() for word in (variant or "").split(",") if word.strip()]
    known = [f for forms in d.get("variants", []) for f in forms]
    if unknown := set(asked) - set(known):
        raise BadInput(f"--variant {min(unknown)}: {name} comes as {', '.join(known) or 'one form only'}")
    for forms in d.pop("variants", []):
        here = [f for f in forms if f in asked] or [f for f in forms if not absent(root, forms[f])]
        if not here:
            raise BadInput(f"{root}: no {name} in one of the forms {', '.join(forms)}; expected "
                           f"{' or '.join(files_of(f)[0] for f in forms.values())}: unpack it there, or correct --root")
        several += [here] if len(here) > 1 else []
        d |= forms[here[0]]
        taken += here[:1]
    if several:
        told = "; ".join(f"{name} in the forms {' and '.join(here)}" for here in several)
        raise BadInput(f"{root}: {told}; type --variant with one of each, such as {','.join(taken)}")
    if gone := absent(root, d):
        raise BadInput(f"{root}: no {gone[0]} there, which {name} has; unpack the official download, or correct --root "
                       "or --variant")
    return d | {"variant": ",".join(taken)}
