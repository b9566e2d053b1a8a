"""Seven public data sets, read as they are distributed: unpack the download, point --root at it.

    description = describe("loveda", "D")    for find_pairs and load_splits of data/datasets.py

Each entry of SETS is a description as data/datasets.py explains it, with one more key:
    "variants"    forms of the data set: of every dict one entry is taken, the one on disk or the
                  one in --variant, and its keys become the description's. Two on disk are a
                  question to the user, never a guess
An eighth data set is one more entry. EuroSAT is scene classification, folders of images without
masks: see train_cls.py.
"""
from pathlib import Path

from .common import BadInput
from .datasets import check_command
from .files import check_folder, match


def by_id(colors: dict[str, str], first: int = 0) -> list[dict]:
    """{name: colour} -> classes of masks that hold first, first + 1, ... in this order."""
    named = enumerate(colors.items(), first)
    return [{"name": name, "id": i, "color": color} for i, (name, color) in named]


def by_color(colors: dict[str, str]) -> list[dict]:
    """{name: colour} -> classes of masks that hold these colours."""
    return [{"name": name, "color": color} for name, color in colors.items()]


def patterns(pattern: str, names: str) -> list[str]:
    """One pattern per name: ("*_area{}", "1 3") -> ["*_area1", "*_area3"]."""
    return [pattern.format(name) for name in names.split()]


# ---- ISPRS: a scene is a tile, 6000 x 6000 in Potsdam and about 2500 x 2000 in Vaihingen

ISPRS = {
    "classes": by_color({
        "impervious": "#FFFFFF", "building": "#0000FF", "low vegetation": "#00FFFF",
        "tree": "#00FF00", "car": "#FFFF00", "clutter": "#FF0000"}),
    "ignore": ["#000000"],  # eroded borders of noBoundary; in the full labels no pixel is black
    "report": {"5_without_clutter": ["clutter"]},
    "select": 0.1,
}

POTSDAM = ISPRS | {
    "variants": [
        {"rgb": {"images": "2_Ortho_RGB/top_potsdam_*_RGB.tif"},
         "irrg": {"images": "3_Ortho_IRRG/top_potsdam_*_IRRG.tif"},
         "rgbir": {"images": "4_Ortho_RGBIR/top_potsdam_*_RGBIR.tif"}},  # --bands says which three
        {"full": {"masks": "5_Labels_all/top_potsdam_*_label.tif"},
         "eroded": {"masks": "5_Labels_all_noBoundary/top_potsdam_*_label_noBoundary.tif"},
         "participants": {"masks": "5_Labels_for_participants/top_potsdam_*_label.tif",
                          "unlabelled": ["test"]}}],
    "splits": {
        "train": patterns("*_potsdam_{}_*", "2_10 2_11 2_12 3_10 3_11 3_12 4_10 4_11 4_12 5_10 "
                          "5_11 5_12 6_7 6_8 6_9 6_10 6_11 6_12 7_7 7_8 7_9 7_10 7_11 7_12"),
        "test": patterns("*_potsdam_{}_*", "2_13 2_14 3_13 3_14 4_13 4_14 4_15 5_13 5_14 5_15 6_13 "
                         "6_14 6_15 7_13")},
    "warning": "the labels of tile 7_10 are known to be faulty; it is in train, as published",
}

# The images are infrared, red, green. The two later archives of labels are unpacked into folders
# of their own names.
COMPLETE = "ISPRS_semantic_labeling_Vaihingen_ground_truth_COMPLETE"
ERODED = "ISPRS_semantic_labeling_Vaihingen_ground_truth_eroded_COMPLETE"
VAIHINGEN = ISPRS | {
    "images": "top/top_mosaic_09cm_area*.tif",
    "variants": [
        {"participants": {"masks": "gts_for_participants/top_mosaic_09cm_area*.tif",
                          "unlabelled": ["test"]},
         "complete": {"masks": f"{COMPLETE}/top_mosaic_09cm_area*.tif"},
         "eroded": {"masks": f"{ERODED}/top_mosaic_09cm_area*_noBoundary.tif"}}],
    "splits": {
        "train": patterns("*_area{}", "1 3 5 7 11 13 15 17 21 23 26 28 30 32 34 37"),
        "test": patterns("*_area{}", "2 4 6 8 10 12 14 16 20 22 24 27 29 31 33 35 38")},
}

# ---- the others

LOVEDA = {
    "images": "*/*/images_png/*.png",
    "masks": "*/*/masks_png/*.png",
    "classes": by_id({
        "background": "#FFFFFF", "building": "#FF0000", "road": "#FFFF00", "water": "#0000FF",
        "barren": "#9F81B7", "forest": "#00FF00", "agriculture": "#FFC380"}, first=1),
    "ignore": [0],  # no data. The online grader takes 0..6: predict.py --label-out train writes it
    "splits": {"train": "Train/*", "val": "Val/*", "test": "Test/*"},
    "unlabelled": ["test"],
    "select": 0.1,
    "scene": r"(.*?)\d{1,2}$",  # scenes are not published: blocks of a hundred neighbouring numbers
}

LANDCOVERAI = {
    "variants": [
        {"raw": {"images": "images/*.tif", "masks": "masks/*.tif", "tiles": 512},
         "tiles": {"images": "output/*.jpg", "masks": "output/*_m.png"}}],  # of its own split.py
    "classes": by_id({
        "background": "#D9D2C5", "building": "#D1483D", "woodland": "#1E7B3C", "water": "#2F6FD0",
        "road": "#7F7F7F"}),
    "splits": {"train": "train.txt", "val": "val.txt", "test": "test.txt"},
    "scene": r"([^/]*)_\d+$",
    "warning": "the official lists spread each orthophoto's tiles over train, val and test: "
               "scores are optimistic",
}

# The images are DOTA's, a separate download; masks of absent images are left alone.
ISAID = {
    "images": "*/images/P????.png",
    "variants": [
        {"folder": {"masks": "*/Semantic_masks/images/P????_instance_color_RGB.png"},
         "beside": {"masks": "*/images/P????_instance_color_RGB.png"}}],
    "classes": by_color({
        "background": "#000000", "ship": "#00003F", "storage tank": "#003F3F",
        "baseball diamond": "#003F00", "tennis court": "#003F7F", "basketball court": "#003FBF",
        "ground track field": "#003FFF", "bridge": "#007F3F", "large vehicle": "#007F7F",
        "small vehicle": "#00007F", "helicopter": "#0000BF", "swimming pool": "#0000FF",
        "roundabout": "#00BF7F", "soccer field": "#007FBF", "plane": "#007FFF",
        "harbor": "#00649B"}),
    "splits": {"train": "train/*", "val": "val/*", "test": "test/*"},
    "unlabelled": ["test"],
    "report": {"15_without_background": ["background"]},
    "select": 0.1,
}

OPENEARTHMAP = {
    "images": "*/images/*.tif",
    "masks": "*/labels/*.tif",
    "variants": [  # xBD's images are a separate download
        {"all": {"splits": {"train": "train.txt", "val": "val.txt", "test": "test.txt"}},
         "wo_xbd": {"splits": {"train": "train_wo_xBD.txt", "val": "val_wo_xBD.txt",
                               "test": "test_wo_xBD.txt"}}}],
    "classes": by_id({
        "bareland": "#800000", "rangeland": "#00FF24", "developed": "#949494", "road": "#FFFFFF",
        "tree": "#226126", "water": "#0045FF", "agriculture": "#4BB549", "building": "#DE1F07"},
        first=1),
    "ignore": [0],  # unknown
    "unlabelled": ["test"],
    "select": 0.1,
    "scene": "([^/]*)/",  # a region
}

AEROSCAPES = {
    "images": "JPEGImages/*.jpg",
    "masks": "SegmentationClass/*.png",
    "classes": by_id({
        "background": "#000000", "person": "#C08080", "bike": "#008000", "car": "#808080",
        "drone": "#800000", "boat": "#000080", "animal": "#C00080", "obstacle": "#C00000",
        "construction": "#C08000", "vegetation": "#004000", "road": "#808000", "sky": "#008080"}),
    "splits": {"train": "ImageSets/trn.txt", "val": "ImageSets/val.txt"},
    "report": {"11_without_background": ["background"]},
    "select": 0.1,
    "scene": r"([^/]*)_\d+$",  # a video
}

SETS = {"potsdam": POTSDAM, "vaihingen": VAIHINGEN, "loveda": LOVEDA, "landcoverai": LANDCOVERAI,
        "isaid": ISAID, "openearthmap": OPENEARTHMAP, "aeroscapes": AEROSCAPES}


# ---- which form is on disk

def files_of(d: dict) -> list[str]:
    """Every pattern and list of a description, or of a part of one."""
    files = [d[key] for key in ("images", "masks") if key in d]
    for split, rules in d.get("splits", {}).items():
        if split in d.get("unlabelled", ()):  # may be left out of a download
            continue
        if isinstance(rules, str):
            rules = [rules]
        files += [rule for rule in rules if rule.endswith(".txt")]
    return files


def absent(root: Path, d: dict) -> list[str]:
    """Of files_of, what matches nothing in root."""
    return [pattern for pattern in files_of(d) if not any(match(root, pattern))]


def describe(name: str, root: str | Path, variant: str | None = None) -> dict:
    """The description of a set in the form found in root.

    Its "variant": the forms taken, joined by commas, as --variant takes them.
    """
    root = Path(root)
    check_folder(root)
    if (root / "img_dir").is_dir() and (root / "ann_dir").is_dir():
        raise BadInput(f"{root}: img_dir and ann_dir, as mmsegmentation converts {name}; expected "
                       f"the official download, or describe this one: {check_command(root)}")
    choices = SETS[name].get("variants", [])
    asked = variant.lower().replace(",", " ").split() if variant else []
    check_variant(name, asked, choices)
    description = {"name": name, "ignore": [], **SETS[name]}
    description.pop("variants", None)

    taken = []
    several = []
    for forms in choices:
        here = [f for f in forms if f in asked]
        if not here:
            hidden = {"unlabelled": description.get("unlabelled", ())}
            here = [f for f in forms if not absent(root, hidden | forms[f])]
        if not here:
            first_files = " or ".join(files_of(f)[0] for f in forms.values())
            raise BadInput(f"{root}: no {name} in one of the forms {', '.join(forms)}; "
                           f"expected {first_files}: unpack it there, or correct --root")
        if len(here) > 1:
            several.append(f"{name} in the forms {' and '.join(here)}")
        taken.append(here[0])
        description |= forms[here[0]]
    if several:
        raise BadInput(f"{root}: {'; '.join(several)}; type --variant with one of each, "
                       f"such as {','.join(taken)}")
    gone = absent(root, description)
    if gone:
        raise BadInput(f"{root}: no {gone[0]} there, which {name} has; unpack the official "
                       "download, or correct --root or --variant")
    return description | {"variant": ",".join(taken)}


def check_variant(name: str, asked: list[str], choices: list[dict]) -> None:
    """Every word of --variant is a form of the data set."""
    known = []
    for forms in choices:
        known += forms
    unknown = set(asked) - set(known)
    if unknown:
        raise BadInput(f"--variant {min(unknown)}: {name} comes as "
                       f"{', '.join(known) or 'one form only'}")
