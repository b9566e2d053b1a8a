"""Describe a folder of images and masks, and check the description against every file.

    python -m data.check ROOT        (from another folder: python /path/to/data/check ROOT)

__main__.py has the flags. Without ROOT/dataset.json draft.py writes a first one: patterns.py finds
which mask belongs to which image, values.py what the masks hold, proposal.py who is in which split,
reading.py which bands and values of the images count.
With it checks.py holds it against the files: images.py reads them, ground.py compares where they
lie, shares.py counts the classes. complaints.py collects what is wrong.
"""
