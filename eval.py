"""Score a trained model, or anybody's masks, on one split: every metric, protocol, intervals.

    python eval.py runs/demo                         the reported split, windows as in training
    python eval.py runs/demo --split val --overlap 0.5
    python eval.py runs/demo --split val --calibrate fits how sure it is: RUN/calibration.json
    python eval.py runs/demo --masks predictions --mask-ids train    masks of any program
    python eval.py --masks predictions --mask-ids train --root D     and without a run
    python eval.py runs/a --tta d4 --with runs/b     mean probability of two runs and eight views
    python eval.py --compare runs/a runs/b           the difference, with 95 % intervals
    python eval.py runs/demo --split train --difficulty    for train_kd.py --sampler weighted
    python eval.py --summary runs/*                  one table of what these runs reported
    torchrun --standalone --nproc_per_node=8 eval.py runs/demo    the numbers stay the same

Where python -m data.curate apply has changed masks of the split, the scores on the labels of
before stand beside those on the new ones.

Writes eval.json, scenes.csv (a row per image), matrices.npz (for --compare), confusion.png,
reliability.png and worst.png into RUN/eval-SPLIT, of --masks into RUN/eval-SPLIT-masks, without a
run into MASKS/eval-SPLIT.
Where results of another protocol lie there it stops, unless --overwrite is typed.
"""
import os
from functools import partial
from pathlib import Path

# Read when torch loads: threads that spin while they wait cost sixfold on a shared CPU.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch

from data import boundary, metrics, plots, public, samplers
from data.common import BadInput, Written, nfc, plural, read_json
from data.compare import check_earlier, compare, pack_matrices, read_scored, scene_table
from data.curate.masks import before_review
from data.datasets import scenes_of
from data.io import Labels
from data.masks import find_masks, mask_table, read_masks
from data.raster import open_raster
from data.source import Source
from data.summary import summary
from data.tiff import TiffWriter
from models import calibrate, ensemble, run
from models.checkpoint import load_weights, weights_file
from models.features import MeanFeatures
from models.infer import best_class, predictions
from models.run import COUNT, between
from models.score import Counts, Worst, further, table

# Flags that masks of any program do not follow.
ASK_THE_MODEL = ("calibrate", "probabilities", "features", "tta", "partners", "soup", "overlap",
                 "weights", "amp")
CHANCE = 0.05  # a kappa below it is that of masks which have nothing to do with the labels
HARD_IOU = 0.5  # a class of an image with less is hard, for --difficulty


def parse_args(argv=None):
    p = run.Parser(__doc__)
    p.add_argument("run", nargs="?", help="run folder, or its best.safetensors")
    p.add_argument("--summary", nargs="+", metavar="RUN", help="one Markdown table of these runs")
    p.add_argument("--compare", nargs=2, metavar=("A", "B"),
                   help="runs or folders of results that eval.py has written: B minus A")
    p.add_argument("--split", help="(the one that training reported)")
    p.add_argument("--root", help="data folder (as in training)")
    p.add_argument("--variant", help="form of a public set that has several: rgb,eroded")
    p.add_argument("--split-file", help="JSON {split: [names]}, such as a run's split.json")
    p.add_argument("--masks", help="score the masks NAME.png or .tif in this folder, not the model")
    p.add_argument("--mask-ids", choices=["train", "raw", "color"],
                   help="ids 0..K-1, values as in the data set's masks, or the classes' colours")
    p.add_argument("--ignore-boundary", type=between(0, 1000, int), default=0, metavar="R",
                   help="do not count pixels within R of another label, but for boundary scores")
    p.add_argument("--difficulty", action="store_true",
                   help="also write difficulty.json: hard classes per image")
    p.add_argument("--calibrate", action="store_true",
                   help="fit a temperature on this split, not the reported one")
    p.add_argument("--probabilities", metavar="DIR",
                   help="also write a TIFF per image: K bands, 255 times the probability")
    p.add_argument("--features", metavar="DIR",
                   help="also write features.npy: the backbone's mean features per image")
    p.add_argument("--tta", choices=list(ensemble.VIEWS),
                   help="average over views of every window: 4 flips, d4 8 turns, 3 scales")
    p.add_argument("--with", dest="partners", nargs="+", metavar="RUN",
                   help="average probabilities with these runs of the same classes")
    p.add_argument("--soup", nargs="+", metavar="RUN",
                   help="average weights with these runs of the same start")
    p.add_argument("--overlap", type=between(0, 0.9),
                   help="of windows, as a part of the crop (as in training)")
    p.add_argument("--weights", help="backbone of a run saved with --save head (as in training)")
    p.add_argument("--amp", default="auto", choices=["auto", "bf16", "off"],
                   help="auto: as trained, where fast; off: fp32, without TF32")
    p.add_argument("--device", type=run.device_name, default="auto",
                   help="cpu, cuda or cuda:1; auto: a GPU if there is one")
    p.add_argument("--batch-size", type=COUNT, default=16, help="windows at once")
    p.add_argument("--cache", help="folder for decoded images, or off (~/.cache/nanors)")
    p.add_argument("--workers", type=between(0, 64, int), default=min(4, os.cpu_count() - 1),
                   help="reading processes")
    p.add_argument("--out", help="folder for the results (RUN/eval-SPLIT, or -masks)")
    p.add_argument("--overwrite", action="store_true",
                   help="replace files of others, or changed by hand")
    args = p.parse_args(argv)
    check_flags(p, args)
    return args


def check_flags(p, args):
    asked = sum(map(bool, (args.run, args.summary, args.compare)))
    masks_alone = args.masks and args.root
    if asked > 1 or asked == 0 and not masks_alone:
        p.error("name one run folder, or several after --summary, two after --compare, or --masks "
                "with --root")
    if args.masks and not args.mask_ids:
        p.error("--masks without --mask-ids; type train for ids 0..K-1, which predict.py writes, "
                "raw for values as in the data set's own masks, or color for the classes' colours")
    if args.mask_ids and not args.masks:
        p.error("--mask-ids goes with --masks; leave it out")
    if args.masks:
        asked = [flag for name, flag in p.typed(args).items() if name in ASK_THE_MODEL]
        if asked:
            p.error(f"{' and '.join(asked)} asks the model, --masks does not; leave one of them out")
    several = args.tta or args.partners or args.soup
    if args.summary:
        p.only(args, "--summary reads what runs have reported", ("summary",))
    if args.compare:
        p.only(args, "--compare reads what eval.py has written", ("compare", "split"))
    if several and args.calibrate:
        p.error("--calibrate is of one run as it is; leave --tta, --with and --soup out")
    if args.calibrate and args.ignore_boundary:
        p.error("--calibrate fits all pixels of a map; leave --ignore-boundary out")
    if args.features and (args.tta or args.partners):
        p.error("--features are of one network; leave --tta and --with out")


# ---- data

def open_data(args, meta, folder):
    # -> the data set with the model's classes in the model's order
    public_set = meta["source"] in public.SETS
    variant = args.variant
    if public_set and not variant:
        variant = meta["variant"]
    # The run's own splits count while its data are read as in training.
    own = folder / "split.json"
    split_file = args.split_file
    if not split_file and own.exists() and not (args.root or args.variant):
        split_file = own
    d = Source(meta["source"] if public_set else "folder", args.root or meta["root"], variant,
               split_file, cache=args.cache, need=())
    d.reading = meta["reading"]  # in numbers, whatever dataset.json says by now
    here = {nfc(c["name"]): c for c in d.labels.classes}
    names = ensemble.class_names(meta)
    if set(here) != set(names):
        raise BadInput(f"{d.root}: the classes {', '.join(here)}; the model knows "
                       f"{', '.join(names)}")
    d.labels = Labels([here[name] for name in names], d.labels.ignore, d.labels.threshold)
    d.names = names
    hint = ""
    if args.root or args.variant:
        hint = f", or --split-file {own} for that of training"
    check_split(d, args, hint)
    if not args.masks:
        d.check_kinds(args.split, meta)
    return d


def open_without_run(args):
    # -> the data set, and what a run would say of it
    d = Source("folder", args.root, args.variant, args.split_file, cache=args.cache, need=())
    # Of the images only what is data matters here. Percentiles are not measured, since no train
    # split is needed; any range does.
    if d.percentiles:
        d.reading["input_range"] = [0.0, 1.0]
    d.names = [nfc(name) for name in d.names]
    args.split = args.split or d.reports
    check_split(d, args, "")
    return d, d.about() | dict(norm="imagenet", crop=None, overlap=None, amp="off")


def check_split(d, args, hint):
    # hint: where the splits of the run are, if others are asked
    if args.split in d.description.get("unlabelled", ()) and args.split not in d.splits:
        raise BadInput(f"{d.root}: no masks for {args.split}; predict it: python predict.py "
                       f"{args.run or 'RUN'} IMAGES, with --label-out train or raw as the grader wants")
    if not d.splits.get(args.split):
        raise BadInput(f"{d.root}: no split {args.split!r}; type --split with one of: "
                       f"{', '.join(d.splits)}{hint}")


def own_splits(run_folder, digest):
    # -> splits of these very images that a run has learned from or was chosen by
    _, meta = load_weights(run_folder, header_only=True)
    return [split for split in ("train", meta.get("chosen_on"))
            if digest == meta.get("splits", {}).get(split)]


def scenes_for_intervals(d, names):
    # -> a scene per image: images of one scene resemble each other and are drawn together
    try:
        found = scenes_of(names, d.description.get("scene"))
    except BadInput:  # written for the names of other splits
        found = {name: name for name in names}
    for name in names:
        # A tile without another scene is of the scene of its image.
        image, _, *box = d.pairs[name]
        if box and found[name] == name:
            found[name] = os.path.relpath(image, d.root)
    return [found[name] for name in names]


def check_calibration(args, d, meta, digest, folder):
    # A temperature must not see what is reported, nor what the model was trained on.
    reported = meta["reported"]
    seen = set()
    for split in (reported, "train"):
        if args.split == split or digest == meta["splits"].get(split):
            seen.add(split)
    # Another split may hold some of these images.
    own = folder / "split.json"
    if own.exists() and d.name == meta["dataset"]:
        splits = read_json(own, dict[str, list[str]])
        for split in (reported, "train"):
            if set(splits.get(split, ())) & set(d.splits[args.split]):
                seen.add(split)
    if not seen:
        return
    what = "reported" if reported in seen else "trained on"
    other = meta["chosen_on"]
    advice = f"type --split {other}"
    if other in (None, reported, "train"):
        advice = "hold images out in training (--val-frac) and score on others"
    raise BadInput(f"--calibrate on {args.split}: its images are {what}; {advice}")


# ---- answers: name, labels (H, W) uint8, and ids (H, W) uint8, or a model's logits by rows

def answers_of_masks(args, d, files, data, rank, world, device):
    # files: find_masks()
    values = mask_table(args.mask_ids, d.labels)
    for name, y, ids in read_masks(files, values, data, rank, world):
        yield name, torch.from_numpy(y.copy()).to(device), torch.from_numpy(ids).to(device)


def label_before(reviewed, name, y):
    # -> (H, W) uint8, where data.curate apply has changed the mask; else the same
    if name not in reviewed.names:
        return y
    _, ids = reviewed.read(reviewed.names.index(name))
    return torch.from_numpy(ids.copy()).to(y.device)


# ---- files for other programs

def write_map(maps, name, p, classes, pair):
    # maps: of Written. p: (H, W, K) uint8
    image, _, *box = pair
    # A tile lies elsewhere than its image.
    georef = None if box else open_raster(image).georef
    (maps.folder / name).parent.mkdir(parents=True, exist_ok=True)
    out = TiffWriter(maps.folder / name, p.shape, bands=classes, georef=georef)
    out.start(0, p.shape[1])
    out.append(p)
    maps.replace(name, out.save)
    out.discard()


def fit_calibration(z, y):
    # Logits and labels of a sample of pixels -> what calibration.json says of them.
    temperature = calibrate.fit_temperature(z, y)
    about = dict(temperature=temperature, pixels=len(y))
    right = z.argmax(1) == y
    for when, t in (("before", 1.0), ("after", temperature)):
        bins = metrics.confidence_bins(calibrate.confidence(z.T, t), right)
        about[f"ece_{when}"] = round(metrics.ece(bins), 6)
        about[f"nll_{when}"] = round(calibrate.log_loss(z, y, t), 6)
    return about


def save_array(path, array):
    with open(path, "wb") as f:  # of a name alone numpy would make another one
        np.save(f, array)


def beside(report, counts, worst, data, d, groups, args):
    # -> {file: content} of what lies beside eval.json
    title = f"{d.name} {args.split}"
    cm = counts.matrices.sum(0).numpy()
    rows = worst_rows(worst, data, counts)
    found = {
        "scenes.csv": scene_table(data.names, groups, counts.matrices, d.names),
        "matrices.npz": pack_matrices(data.names, groups, counts.matrices),
        "confusion.png": plots.confusion(cm, d.names, title),
        "worst.png": plots.samples(rows, d.names, d.labels.colors),
    }
    if not args.masks:
        bins = [part.numpy() for part in metrics.reliability(counts.bins)]
        heading = f"{title}: calibration error {report['ece']:.3f}"
        found["reliability.png"] = plots.reliability(*bins, heading)
    if args.difficulty:
        hard = samplers.hard_classes(counts.matrices.numpy(), HARD_IOU).tolist()
        found["difficulty.json"] = dict(zip(data.names, hard))
    return found


def worst_rows(worst, data, counts):
    # -> rows of plots.samples()
    rows = []
    for miou, i, ids in worst.rows:
        image, mask = data.read(i)
        oa = metrics.oa(counts.matrices[i])
        rows.append((image, mask, ids, f"{data.names[i]}: mIoU {miou:.3f}, OA {oa:.3f}"))
    return rows


def outputs(args, several):
    # -> the files that are always written, and the folder of them below the run's
    files = ["eval.json", "scenes.csv", "matrices.npz", "confusion.png", "worst.png"]
    if not args.masks:
        files.append("reliability.png")
    if args.difficulty:
        files.append("difficulty.json")
    default = f"eval-{args.split}"
    if args.masks and args.run:
        default += "-masks"
    for flag, value in ensemble.about(**several).items():
        # Of runs there may be many: their names stand in eval.json.
        default += f"-{value}" if flag == "tta" else f"-{flag}"
    return files, default


def protocol_of(args, d, meta, digest, weights, temperature, window, several):
    # -> all that a score depends on; data/compare.py asks it whether two can be compared
    return dict(
        run=args.run and str(args.run), weights=weights, masks=args.masks,
        mask_ids=args.mask_ids,
        dataset=d.name, root=str(d.root), variant=d.description.get("variant"),
        split=args.split, files=digest, images=len(d.splits[args.split]),
        scene=d.description.get("scene"),
        classes=d.names, ignore=d.labels.ignore, ignore_boundary=args.ignore_boundary,
        boundary_iou=f"width {boundary.DILATION} of the diagonal",
        boundary_f1=f"tolerance {boundary.TOLERANCE} pixels", temperature=temperature,
        **meta["reading"], crop=meta["crop"], overlap=window["overlap"],
        amp="bf16" if window["amp"] else "off",
        **({"tta": "none", "with": "none", "soup": "none"} | ensemble.about(**several)))


def earlier_index(folder, about, overwrite):
    # What --probabilities or --features of another call has left in a folder, to be kept beside
    # what comes. Of other weights or images it is a BadInput.
    file = Path(folder) / "index.json"
    before = read_json(file) if file.exists() else about
    differing = [key for key in ("weights", "split", "root", "temperature")
                 if before.get(key) != about[key]]
    if differing and not overwrite:
        raise BadInput(f"{file}: of another {' and '.join(differing)}; name another folder, or type "
                       "--overwrite to replace what is there")
    return {} if differing else before


def write_indexes(args, names, about, features):
    # index.json says what lies in the folders of --probabilities and --features; both may be one.
    if args.features:
        save = partial(save_array, array=features)
        Written(args.features, args.overwrite).replace("features.npy", save)
        write_index(args, args.features, about, dict(features="features.npy", names=names))
    if args.probabilities:
        images = {name: f"{name}.tif" for name in names}
        write_index(args, args.probabilities, about, dict(images=images))


def write_index(args, folder, about, rows):
    content = earlier_index(folder, about, args.overwrite) | about | rows
    Written(folder, args.overwrite).write("index.json", content)
    print(f"wrote {folder}/index.json and the files that it names")


def main(args):
    if args.summary:
        print(summary(args.summary))
        return
    if args.compare:
        a, b = (read_scored(path, args.split) for path in args.compare)
        if a.path.resolve() == b.path.resolve():
            raise BadInput(f"{a.path}: compared with itself; name two results")
        print(compare(a, b))
        return
    rank, world, device = run.start(wanted=args.device, hours=24)
    say = print if rank == 0 else lambda *words, **how: None

    # ---- data
    weights = temperature = None  # of anybody's masks neither is known
    several = dict(partners=args.partners, soup=args.soup, tta=args.tta)
    if args.run:
        _, meta = load_weights(args.run, header_only=True)
        if meta.get("task") == "classification":
            raise BadInput(f"{args.run}: a run of train_cls.py, which has written its own "
                           f"results.json; type python predict.py {args.run} IMAGES for others")
        runs = ensemble.all_runs(args.run, args.partners, args.soup)
        ensemble.check_runs(runs, args.weights)
        folder = weights_file(args.run).parent
        args.split = args.split or meta["reported"]
        d = open_data(args, meta, folder)
    else:
        d, meta = open_without_run(args)
        folder = Path(args.masks)
    K, names = len(d.names), d.splits[args.split]
    digest = d.about()["splits"][args.split]
    say(f"{plural(len(names), f'{args.split} image')} of {d.root}")
    if args.run and not args.masks:
        for one in runs:
            for split in own_splits(one, digest):
                if split == "train" or not args.calibrate:  # which is what val is for
                    say(f"WARNING: the model's own {split} images ({one})")
        weights = ensemble.identity(args.run, **several)
        temperature = calibrate.read_temperature(folder, weights)
        averaged = any(several.values())
        if temperature is None and not averaged and (folder / "calibration.json").exists():
            say(f"note: {folder}/calibration.json is of other weights, and is not used")
    data = d.part(args.split, meta["norm"])
    if args.masks:
        files_of_masks = find_masks(args.masks, names)

    # ---- what may be written, before any work
    files, default = outputs(args, several)
    out = Written(args.out or folder / default, args.overwrite)
    out.check(files)
    if args.calibrate:
        check_calibration(args, d, meta, digest, folder)
        calibration = Written(folder, args.overwrite)
        calibration.check(["calibration.json"])
    # Of what other programs read, such as data.curate.
    about = dict(run=str(folder), weights=weights, root=str(d.root), source=d.kind,
                 variant=d.description.get("variant"), reading=d.reading, split=args.split,
                 classes=d.names, temperature=temperature)
    if args.probabilities:
        maps = Written(args.probabilities, args.overwrite)
        maps.check(["index.json", *(f"{name}.tif" for name in names)])
    if args.features:
        Written(args.features, args.overwrite).check(["index.json", "features.npy"])
    for place in filter(None, {args.probabilities, args.features}):
        earlier_index(place, about, args.overwrite)
    run.wait()  # what another rank writes from here on is no old file

    # ---- network
    if not args.masks:
        net, meta = ensemble.load_runs(args.run, args.weights, **several)
        net.to(device)
    amp = run.use_bf16(args.amp, meta["amp"], device)
    overlap = meta["overlap"] if args.overlap is None else args.overlap
    window = dict(crop=meta["crop"], overlap=overlap, batch=args.batch_size, amp=amp)
    if device.type == "cuda" and not args.masks:
        say(run.precision(amp, device))
    protocol = protocol_of(args, d, meta, digest, weights, temperature, window, several)
    if not args.overwrite:
        check_earlier(out.folder, protocol, in_run=not args.out)

    # ---- count
    if args.masks:
        answers = answers_of_masks(args, d, files_of_masks, data, rank, world, device)
    else:
        means = MeanFeatures(net) if args.features else None
        answers = predictions(net, data, window, args.workers, args.split)
    counts = Counts(len(names), K, device, args.ignore_boundary, temperature)
    reviewed = before_review(d, args.split)  # None: these labels were never changed
    if reviewed:
        counts_before = Counts(len(names), K, device, args.ignore_boundary)
    worst = Worst()
    sample = calibrate.PixelSample()
    vectors = []  # features of this rank's images
    number = {name: i for i, name in enumerate(names)}
    for name, y, answer in answers:
        i = number[name]
        counted = counts.labels(y)
        if args.masks:
            pred = answer
        else:
            pred = torch.empty_like(y)
            keys = sample.keys(counted, i) if args.calibrate else None
            p = []  # probabilities of some rows after the other
            for rows, logits in answer:
                pred[rows] = best_class(logits)
                counts.add_confidence(logits, y[rows], counted[rows], pred[rows])
                if args.calibrate:
                    sample.add(logits, counted[rows], keys[rows])
                if args.probabilities:
                    p.append(calibrate.probabilities(logits, temperature or 1.0))
        counts.add(i, y, counted, pred)
        worst.add(i, counts.matrices[i], pred)
        if reviewed:
            before = label_before(reviewed, name, y)
            counts_before.add(i, before, counts_before.labels(before), pred)
        if args.features:
            vectors.append(means.take().float())
        if args.probabilities:
            write_map(maps, f"{name}.tif", np.concatenate(p), d.names, d.pairs[name])
    counts.over_ranks()
    worst.over_ranks()
    if reviewed:
        counts_before.over_ranks()
    if not counts.matrices.any():
        check = 'check "ignore" in dataset.json'
        if args.ignore_boundary:
            check = "lower --ignore-boundary"
        raise BadInput(f"{d.root}: every pixel of {args.split} is ignored; {check}")

    # ---- report
    features = None
    if args.calibrate:
        pixels = sample.pixels()
    if args.features:
        part = torch.stack(vectors) if vectors else torch.zeros(0, 0)
        features = run.gather(part, len(names), device).cpu().numpy()
    if rank == 0:
        groups = scenes_for_intervals(d, names)
        report = dict(split=args.split, **counts.report(d.names, groups, meta["report"]))
        print(table(report))
        print(metrics.headline(report, meta["report"]))
        print(further(report))
        if args.masks and report["kappa"] is not None and report["kappa"] < CHANCE:
            print("note: no better than chance; are the masks of this --split and --mask-ids?")
        if reviewed:
            report["before_review"] = old = counts_before.report(d.names, groups, meta["report"])
            print(f"on the labels before data.curate apply, which has changed {len(reviewed)} of "
                  f"{len(names)} masks:\n    {metrics.headline(dict(old, split=args.split))}")
        protocol |= run.facts(device, world)
        out.write("eval.json", report | dict(protocol=protocol))
        for file, content in beside(report, counts, worst, data, d, groups, args).items():
            out.write(file, content)
        print(f"wrote {out.folder}/: {', '.join(files)}")
        if args.difficulty:
            print(f"for train_kd.py --sampler weighted --difficulty {out.folder}/difficulty.json")
        if args.calibrate:
            fit = fit_calibration(*pixels)
            calibration.write("calibration.json", fit | dict(
                weights=weights, split=args.split, images=len(names), files=digest,
                overlap=overlap))
            # The first is what is made smaller; few pixels can make the second larger by it.
            print(f"wrote {folder}/calibration.json: temperature {fit['temperature']:.3f}, "
                  f"log loss {fit['nll_before']:.4f} -> {fit['nll_after']:.4f}, "
                  f"calibration error {fit['ece_before']:.4f} -> {fit['ece_after']:.4f} on a "
                  f"sample of {fit['pixels']} pixels of {args.split}")
            if fit["ece_after"] > fit["ece_before"]:
                print("note: the calibration error has not become smaller: the probabilities were "
                      f"about right; without {folder}/calibration.json they stay as they are")
        write_indexes(args, names, about, features)
    run.end()


if __name__ == "__main__":
    with run.one_line_errors():
        main(parse_args())
