"""Describe a folder of images and masks, and check the description against every file.

    python -m data.check ROOT    without ROOT/dataset.json: looks at the masks and writes a draft
    python -m data.check ROOT    with it: checks files, values and splits
    python -m data.check ROOT --masks gt           a draft with one of several folders of masks
    python -m data.check ROOT --dataset potsdam    checks a public data set (data/public.py)

Exit code 2 where training would go wrong.
"""
import argparse
import os
import sys
from pathlib import Path

if not __package__:  # started as `python /path/to/data/check`: let "data" be found, not this folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from data.check.checks import check
from data.check.draft import draft
from data.check.flags import Parser, bands, count, exit_code
from data.common import MAX_PIXELS, PIXELS_VARIABLE, BadInput, print_anything
from data.datasets import read_description
from data.files import check_folder
from data.public import SETS, describe
from data.ranges import parse_range, reading_flags


def parse_args(argv=None):
    p = Parser(description=__doc__, prog="python -m data.check",
               formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("root", type=Path, nargs="?", help="folder that holds images and masks, in any sub-folders")
    p.add_argument("--limit", type=count,
                   help="read only this many files, evenly spread (default: all)")
    p.add_argument("--dataset", default="folder", choices=["folder", *SETS],
                   help="folder (default): by ROOT/dataset.json; else one of data/public.py")
    p.add_argument("--variant", help="form of a public data set, where it has several: irrg,eroded")
    p.add_argument("--bands", type=bands,
                   help="the three to read from images with more, from 1: 4,1,2; "
                        'a draft keeps them (default: "bands" in dataset.json)')
    p.add_argument("--input-range", nargs="+", metavar=("LOW", "HIGH"),
                   help="values that become 0 and 255: two numbers, six for three bands, or "
                        "percentiles of the training images such as p2-98; a draft keeps the "
                        'numbers (default: "input_range" in dataset.json)')
    p.add_argument("--masks", metavar="FOLDER",
                   help="draft with the masks in this folder, where there are several")
    p.add_argument("--force", action="store_true",
                   help="write a new draft over an existing dataset.json")
    p.add_argument("--max-pixels", type=count, metavar="N",
                   help=f"larger images are not read as a whole (default: {MAX_PIXELS})")
    args = p.parse_args(argv)
    if args.max_pixels:
        os.environ[PIXELS_VARIABLE] = str(args.max_pixels)
    if args.root is None and args.input_range:  # --input-range 0 3000 ROOT
        args.root = Path(args.input_range.pop())
    if args.root is None:
        p.error("name the folder that holds images and masks")
    if args.input_range:
        try:
            args.input_range = parse_range(args.input_range)
        except BadInput as e:
            p.error(str(e))
    return args


def draft_or_check(args) -> int:
    """The exit code: 2 if something must be corrected first."""
    typed = {"bands": args.bands, "input_range": args.input_range}
    typed = {key: value for key, value in typed.items() if value}
    check_folder(args.root)
    if args.dataset != "folder":
        description = describe(args.dataset, args.root, args.variant)
    elif args.force or not os.path.lexists(args.root / "dataset.json"):
        return draft(args.root, args.limit, args.masks, typed)
    elif args.masks:
        raise BadInput(f"--masks {args.masks}: for a draft, and {args.root}/dataset.json is "
                       "there; type --force to write it anew")
    else:
        description = read_description(args.root)
    # What the commands to type next must repeat; dataset.json holds the rest.
    flags = reading_flags(args.bands, args.input_range)
    return check(args.root, description | typed, args.limit, args.dataset, flags)


def main(argv=None) -> int:
    """The exit code: 2 if something must be corrected first."""
    print_anything()
    return exit_code(draft_or_check, parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
