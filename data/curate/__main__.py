"""Find wrong labels, decide about them in a browser, choose what to label next.

No file of a data set is ever changed.

    python -m data.curate folds ROOT --out O            models that have not seen what they judge
    python -m data.curate suspects DIR... --out O       regions where models contradict the labels
    python -m data.curate review O/suspects.json        a page to decide about them
    python -m data.curate apply decisions.json --out M  all masks anew, with what was decided
    python -m data.curate verify M                      is everything as it was written?
    python -m data.curate revert M --region 17          take regions back, or all
    python -m data.curate next DIR --budget 50          which images to label next
    python -m data.curate tile ROOT --out T             big scenes as a data set of tiles
    python -m data.curate merge ROOT ROOT --out M       several data sets as one, images linked
    python -m data.curate stats ROOT --out O            which classes are in which images and splits
    python -m data.curate filter ROOT --class water --at-most 50% --out O     a split file
    python -m data.curate replicate ROOT --class pool --share 5% --out O      a list to repeat

DIR: what eval.py RUN --split S --probabilities DIR has written.
"""
import argparse
import sys
from pathlib import Path

if not __package__:  # started by its path: let "data" be found, not this folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from data.check.flags import Parser, count, exit_code, whole
from data.common import number, print_anything
from data.curate import programs
from data.public import SETS


def parse_args(argv=None):
    p = Parser(description=__doc__, prog="python -m data.curate",
               formatter_class=argparse.RawDescriptionHelpFormatter)
    # Without a sub-command there is nothing sensible to do, so argparse lists them all.
    parsers = p.add_subparsers(required=True, metavar="PROGRAM")

    # What a program does stands beside its flags: args.act(args) in main() calls it.
    def add(name, act, help):
        program = parsers.add_parser(name, help=help, description=help)
        program.set_defaults(act=act)
        return program

    label_programs(add)
    set_programs(add)
    words = sys.argv[1:] if argv is None else argv
    if not words:  # nothing asked: say what can be asked
        words = ["--help"]
    return p.parse_args(words)


def label_programs(add) -> None:
    # wrong labels, and what to label next
    q = add("folds", programs.make_folds,
            "split files by which no model judges labels that it was trained on")
    add_data(q)
    q.add_argument("--number", type=count, default=3, help="of folds (default: 3)")
    q.add_argument("--seed", type=whole, default=0, help="of the draw of scenes (default: 0)")
    q.add_argument("--out", type=Path, required=True, help="folder for the split files")
    add_overwrite(q)

    q = add("suspects", programs.find_suspects,
            "regions where models contradict the labels")
    q.add_argument("folders", nargs="+", metavar="DIR", help="written by eval.py --probabilities")
    q.add_argument("--root", help="data folder (as eval.py had it)")
    q.add_argument("--out", type=Path, help="folder for the results (default: DIR/suspects)")
    add_overwrite(q)

    q = add("review", programs.make_page,
            "one HTML page to decide about suspect regions; needs no network")
    q.add_argument("suspects", type=Path, help="suspects.json")
    q.add_argument("--root", help="data folder (as when suspects were searched)")
    q.add_argument("--limit", type=count, default=500,
                   help="regions, the most suspect (default: 500)")
    # 20 tell an error rate of 5 % from one of 30 %, not from one of 10 %.
    q.add_argument("--controls", type=whole, default=20,
                   help="regions of known label among them, to tell how often the reviewer errs "
                        "(default: 20)")
    q.add_argument("--seed", type=whole, default=0, help="of order and drawing (default: 0)")
    add_overwrite(q)

    q = add("apply", programs.apply_decisions,
            "carry decisions out in a new folder of masks; the originals stay")
    q.add_argument("decisions", type=Path,
                   help="what the page exports: regions with verdict accept, keep, skip or other")
    q.add_argument("--out", type=Path, required=True, help="new folder for all masks")
    q.add_argument("--root", help="data folder (as when suspects were searched)")
    q.add_argument("--dry-run", action="store_true", help="say what would change, write nothing")
    # Off: scores on changed labels cannot be compared with those of before.
    q.add_argument("--including-heldout", action="store_true",
                   help="also change labels of val and test")

    q = add("revert", programs.revert_decisions,
            "take decisions back: masks are again what they were")
    q.add_argument("masks", type=Path, help="folder that apply has written")
    q.add_argument("--region", type=whole, nargs="+", help="numbers of regions (default: all)")

    q = add("verify", programs.verify_masks,
            "compare masks and their originals with the sha256 of the manifest")
    q.add_argument("masks", type=Path, help="folder that apply has written")

    q = add("next", programs.choose_next,
            "images to label next: of which a model is unsure, and that look like no others")
    q.add_argument("folders", nargs="+", metavar="DIR",
                   help="written by eval.py --probabilities and --features, or by predict.py "
                        "--probabilities")
    q.add_argument("--budget", type=count, required=True, help="number of images")
    q.add_argument("--labelled", metavar="DIR",
                   help="features of the images that have labels: eval.py RUN --split train "
                        "--features DIR")
    q.add_argument("--root", help="data folder (as eval.py had it)")
    q.add_argument("--out", type=Path, help="folder for the results (default: DIR/next)")
    add_overwrite(q)


def set_programs(add) -> None:
    # whole data sets: what is in them, and others made of them
    q = add("stats", programs.write_stats,
            "shares of classes per image, split and set: CSV, JSON, bar chart")
    add_data(q)
    q.add_argument("--out", type=Path, required=True, help="folder for the results")
    add_overwrite(q)

    q = add("filter", programs.filter_images,
            "a split file without training images that one class fills")
    add_data(q)
    q.add_argument("--class", dest="name", required=True, help="name of the class")
    q.add_argument("--at-most", type=percent, required=True, metavar="SHARE",
                   help="of an image's labelled pixels, such as 50%%")
    q.add_argument("--out", type=Path, required=True, help="folder for split.json and record.json")
    add_overwrite(q)

    q = add("replicate", programs.replicate_images,
            "a list of training images that have much of some classes, to repeat them")
    add_data(q)
    q.add_argument("--class", dest="names", nargs="+", required=True, help="names of classes")
    q.add_argument("--share", type=percent, required=True,
                   help="of an image's labelled pixels, such as 5%%")
    q.add_argument("--out", type=Path, required=True,
                   help="folder for replicated.txt and record.json")
    add_overwrite(q)

    q = add("tile", programs.cut_tiles,
            "big scenes as overlapping tiles, with georeference: a data set of its own")
    add_data(q)
    q.add_argument("--side", type=count, default=512, help="of a tile, in pixels (default: 512)")
    q.add_argument("--overlap", type=whole, default=64,
                   help="pixels that neighbours share (default: 64)")
    q.add_argument("--out", type=Path, required=True, help="folder for the new data set")
    add_overwrite(q)

    q = add("merge", programs.merge_sets,
            "several data sets under one list of classes; images are linked, not copied")
    q.add_argument("roots", type=Path, nargs="+", metavar="ROOT",
                   help="folders with a dataset.json")
    # Names of classes are the only thing that sets may share; ids and colours never count.
    q.add_argument("--map", type=Path, metavar="JSON",
                   help="{set: {its class: merged class, or null for ignored}} "
                        "(default: classes of one name are one)")
    q.add_argument("--out", type=Path, required=True, help="folder for the merged data set")
    add_overwrite(q)


def add_data(program) -> None:
    program.add_argument("root", type=Path, help="data folder")
    program.add_argument("--dataset", default="folder", choices=["folder", *SETS],
                         help="folder (default): by ROOT/dataset.json; else one of data/public.py")
    program.add_argument("--variant", help="form of a public data set, where it has several")


def add_overwrite(program) -> None:
    program.add_argument("--overwrite", action="store_true",
                         help="replace files of others, or changed by hand")


def percent(text: str) -> float:
    """'50%' -> 0.5."""
    try:
        share = number(text.removesuffix("%")) / 100
    except ValueError:
        # Refused below, like any other number that is no share.
        share = -1.0
    if not text.endswith("%") or not 0 <= share <= 1:
        raise argparse.ArgumentTypeError(f"{text}: expected a percentage such as 50%")
    return share


def main(argv=None) -> int:
    """The exit code: 2 if something must be corrected first."""
    print_anything()
    args = parse_args(argv)
    return exit_code(args.act, args)


if __name__ == "__main__":
    sys.exit(main())
