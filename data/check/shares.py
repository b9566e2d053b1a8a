"""The pixels of each class in each split: a table, and what cannot be learned or scored.

`counts` is {split: (K+1,) int pixels}, ignored ones last.
"""
import numpy as np

from ..io import Labels
from .complaints import Complaints


def print_shares(counts: dict[str, np.ndarray], images: dict[str, int], labels: Labels) -> None:
    """A column per split, with the scores of always saying the most frequent class."""
    heads = ["share of labelled pixels", *(f"  {name}" for name in labels.names),
             "ignored of all pixels", "images", "majority class", "  its accuracy", "  its mIoU"]
    columns = [heads]
    for split, pixels in counts.items():
        *of_class, ignored = pixels.tolist()
        labelled = max(1, sum(of_class))
        total = max(1, sum(of_class) + ignored)
        present = max(1, np.count_nonzero(of_class))
        # Saying one class everywhere: its IoU is its share, the other classes have 0.
        accuracy = max(of_class) / labelled
        scores = [labels.names[np.argmax(of_class)], f"{accuracy:.4f}", f"{accuracy / present:.4f}"]
        if not any(of_class):  # no mask could be read, or all is ignored
            scores = ["-"] * 3
        columns.append([split, *(f"{n / labelled:.2%}" for n in of_class), f"{ignored / total:.2%}",
                        images[split], *scores])
    width = max(map(len, heads))
    for head, *cells in zip(*columns):
        print(f"{head:{width}}" + "".join(f" {str(cell)[:14]:>14}" for cell in cells))


def check_absent(counts: dict[str, np.ndarray], everywhere: np.ndarray, labels: Labels,
                 complaints: Complaints) -> None:
    """Classes that a split lacks, where every mask was read. `everywhere`: of all masks, (K+1,)."""
    for i, name in enumerate(labels.names):
        absent = [split for split, pixels in counts.items() if pixels[i] == 0]
        if not everywhere[i]:
            line = f"class {name!r} is in no mask: correct its id or colour, or delete it"
        elif len(absent) == len(counts):
            line = f"class {name!r} is only in images, or parts of them, that are in no split"
        elif absent:
            what = "learned" if "train" in absent else "scored"
            line = (f"class {name!r} is not in {', '.join(absent)}: "
                    f"it cannot be {what} there; move images")
        else:
            continue
        complaints.warning("absent", line)


def check_ignored(counts: dict[str, np.ndarray], labels: Labels, complaints: Complaints) -> None:
    """A value in "ignore" by mistake leaves nothing to learn, or one class only."""
    for split, (*of_class, ignored) in counts.items():
        if ignored and not any(of_class):
            complaints.error("ignored", f"every pixel of {split} is ignored; correct \"ignore\", "
                                        "or the masks")
    *of_class, ignored = sum(counts.values())
    if np.count_nonzero(of_class) == 1 and ignored:  # binary masks whose 255 is ignored
        name = labels.names[np.argmax(of_class)]
        complaints.warning("single", f"every labelled pixel is {name!r}; if {labels.ignore} holds "
                                     'a class, move it from "ignore" to "classes"')
