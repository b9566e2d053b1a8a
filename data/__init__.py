"""Images, labels, data sets and scores. Nothing here knows a network.

common                     the ignore index, the error a user can mend, the atomic writer, progress
files io cache             what folders hold; reading files without guessing; decoded images on disk
datasets public demo       dataset.json, seven public sets, procedural scenes
source scenes points       a data set, opened: images and masks; class folders; point labels
crops augment samplers     what happens to a sample on its way to the network, and which is drawn
classmap                   classes of one model in terms of another's
metrics plots              one confusion matrix, and the pictures of a run
check                      python -m data.check ROOT: draft a dataset.json, and check it
"""
