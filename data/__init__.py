"""Images, labels, data sets and scores. Nothing here knows a network.

common                     the ignore index, the error a user can mend, the atomic writer, progress
files                      what folders hold, and what lists and tables call it
tiff raster                windows of any TIFF, with GDAL's values; any picture file as it is stored
io ranges cache            images and masks without guessing; input ranges; decoded images on disk
datasets public demo       dataset.json, seven public sets, procedural scenes
source scenes points       a data set, opened: images and masks; class folders; point labels
views                      fixed views of images, and files that keep a backbone's features of them
crops augment samplers     what happens to a sample on its way to the network, and which is drawn
classmap                   classes of one model in terms of another's
metrics plots              one confusion matrix, and the pictures of a run
check                      python -m data.check ROOT: draft a dataset.json, and check it
"""
