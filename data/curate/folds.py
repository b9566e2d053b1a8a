"""Split files by which every training image is predicted by a model that has not seen its scene.

    fold_splits(source, 3, seed=0)        three of {"train": names, "fold": names, "val": names}
"""
from pathlib import Path
from shlex import quote

import numpy as np

from ..common import BadInput
from ..datasets import scenes_of, script_command
from ..source import Source
from .predicted import curate_command, data_flags


def groups_of_train(source: Source) -> dict[str, str]:
    """{training image: its scene}; a tile belongs to the image that it is cut from."""
    names = source.splits["train"]
    groups = scenes_of(names, source.description.get("scene"))
    for name in names:
        image, _, *box = source.pairs[name]
        # Without a "scene" a tile would be a scene of its own, beside its neighbours.
        if box and groups[name] == name:
            groups[name] = str(image)
    return groups


def deal(groups: dict[str, str], number: int, seed: int) -> list[set[str]]:
    """{name: scene} -> the names in `number` parts of whole scenes, of nearly equal size."""
    # Images of one scene look alike: a model that has seen one knows the labels of all.
    members = {}
    for name, scene in groups.items():
        members.setdefault(scene, []).append(name)
    if not 2 <= number <= len(members):
        raise BadInput(f"--number {number}: expected 2 to {len(members)}, the number of scenes of "
                       'the training images; "scene" in dataset.json says what a scene is')
    # Sorted first: the draw must not depend on the order in which files were found.
    scenes = np.random.default_rng(seed).permutation(sorted(members)).tolist()
    # The largest first, each to the part that is smallest by then.
    scenes.sort(key=lambda scene: -len(members[scene]))
    parts = [set() for _ in range(number)]
    for scene in scenes:
        min(parts, key=len).update(members[scene])
    return parts


def fold_splits(source: Source, number: int, seed: int) -> list[dict[str, list[str]]]:
    """For each part its split file: "fold" is the part, "train" the others, all else as it was."""
    names = source.splits["train"]
    found = []
    for held_out in deal(groups_of_train(source), number, seed):
        fold = [name for name in names if name in held_out]
        rest = [name for name in names if name not in held_out]
        # Val and test stay: weights are chosen as in any other training.
        found.append(source.splits | {"train": rest, "fold": fold})
    return found


def commands(source: Source, out: Path, number: int) -> list[str]:
    """What to type: a training and a scoring for each fold, then the search for suspects."""
    data = data_flags(source.root, source.kind, source.description.get("variant"))
    if not source.splits.get("val") and not source.splits.get("select"):
        data += " --final"  # nothing to choose weights by
    lines = []
    folders = []
    for i in range(1, number + 1):
        run = quote(str(out / f"run_{i}"))
        folder = quote(str(out / f"probabilities_{i}"))
        file = quote(str(out / f"fold_{i}.json"))
        # Each model is asked about the part that it was not trained on.
        lines.append(f"{script_command('train_seg.py')} {data} --split-file {file} --out {run}")
        lines.append(f"{script_command('eval.py')} {run} --split fold --probabilities {folder}")
        folders.append(folder)
    suspects = quote(str(out / "suspects"))
    lines.append(curate_command(f"suspects {' '.join(folders)} --out {suspects}"))
    return lines
