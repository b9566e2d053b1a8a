"""Find wrong labels, decide about them in a browser, choose what to label next.

    python -m data.curate --help        (from another folder: python /path/to/data/curate --help)

__main__.py has the flags, programs.py what each sub-command does with them. predicted.py reads what
models say of the images, regions.py writes a part of a mask as numbers, suspects.py finds the
regions where models contradict the labels, and folds.py lets no model judge what it was trained on.
review.py makes a page of them, of review.html and review.js, and masks.py carries out what was
decided there. choice.py says which images to label next, shares.py which classes are where;
tiles.py and merge.py make data sets of others.
"""
