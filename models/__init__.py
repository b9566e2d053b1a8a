"""Networks, how they learn, and what surrounds a training loop. Nothing here knows a script.

vit heads deeplab unetformer efficientnet_unet classify     networks, each file by itself
weights     files of others: DINO in every layout, recognised and loaded strictly
nets        --model, --weights, --head -> network; a run -> network; groups for the optimiser
recipes     what a run does where its flags do not say: from scratch, frozen, tuned
losses      cross-entropy, focal, Dice, Lovasz, boundary, KL; exact over ranks and micro-batches
muon        the optimiser of what starts from random weights
lookahead   slow weights, warm restarts
infer       sliding windows over images of any size; the confusion matrix of a split
features    what a backbone says of images: means, and maps of fixed views that are kept
compiled    a network compiled for a long prediction on a CPU
ensemble    averages of views (--tta), of several runs, of their weights
export      a run as an ONNX file for other programs
checkpoint  best.safetensors and last.pt
run         flags, processes, signals, the run folder, averaged weights
"""
