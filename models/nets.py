"""From a name to a network: built, filled with weights, loaded from a run, split into groups for the optimiser.

    net, spec, info = make("vit", classes=6, weights="dinov3_vitl16_pretrain_sat493m-eadcf0ff.pth")
    net, meta = load_run("runs/demo")                  in eval mode, with what best.safetensors says of it
    AdamW(param_groups(net, lr=1e-3, backbone_lr=1e-4, layer_decay=0.8, weight_decay=0.05))

A spec is the "model" entry of best.safetensors: plain JSON, all that build() needs.
"""
from contextlib import suppress
from pathlib import Path

from torch import nn

from data.common import BadInput
from data.datasets import NORMS

from . import classify, deeplab, efficientnet_unet, unetformer
from .checkpoint import load_weights
from .classify import ChannelMeans, Classifier, Knn, cnn
from .heads import HEADS, VERSION, Segmenter
from .vit import PRESETS, ViT, arch_name, spread_taps
from .weights import (
    RESNET, RESNET_PARTS, BadWeights, config_of, fill, is_url, load_vit, open_weights, select,
    short)

# What --model may name beside vit: class, loader of published files, arguments of the class.
NETS = {
    "deeplabv3": (deeplab.DeepLabV3, deeplab.load_pretrained, {"output_stride": 16}),
    "deeplabv3-os8": (deeplab.DeepLabV3, deeplab.load_pretrained, {"output_stride": 8}),
    "unetformer": (unetformer.UNetFormer, unetformer.load_pretrained, {}),
    "ftunetformer": (unetformer.FTUNetFormer, unetformer.load_pretrained, {}),
    "effunet": (efficientnet_unet.EfficientNetUnet, efficientnet_unet.load_pretrained, {}),
}
# What a spec may hold.
SPEC = {"name", "cnn", "stem", "fold", "classes", "options", "backbone", "head", "version", "taps",
        "feat_norm", "features", "bank", "k", "temperature"}
# How the names of backbone parameters begin, which --backbone-lr is for: of a ViT "backbone.",
# the others are those of CNNs.
TRUNKS = ("backbone.", "encoder.", "stem.", "stages.", "conv1.", "bn1.", "layer")
SCRATCH = dict(norm="imagenet", path=None, sha256=None,
               line="FROM RANDOM WEIGHTS: what is learned is from these images (--weights loads "
                    "trained ones)")


def build(spec: dict) -> nn.Module:
    """spec -> network with random weights, for segmentation or classification."""
    name = spec["name"]
    if name == "cnn":
        # Runs of before this network folded its input say nothing of it.
        return cnn(spec["cnn"], spec["stem"], spec["classes"], spec.get("fold", 1))
    if "features" in spec:
        return build_classifier(spec)
    if name != "vit":
        return NETS[name][0](spec["classes"], **spec["options"])
    vit = ViT(**spec["backbone"])
    name = spec["head"]
    if name == "fpn" and "version" not in spec:
        name = "tokens"  # what was called so before it saw the image
    head = HEADS[name](vit.dim, len(spec["taps"]), spec["classes"], vit.patch)
    return Segmenter(vit, head, spec["taps"], spec["feat_norm"])


def build_classifier(spec: dict) -> Classifier:
    """A backbone's features under a linear head, or a k-NN head where spec has the size of its "bank"."""
    backbone = ChannelMeans() if spec["name"] == "mean" else ViT(**spec["backbone"])
    width = backbone.dim
    if spec["features"] == "cls+patch":
        width *= 2
    if "bank" in spec:
        unit = spec["features"] != "mean"
        head = Knn(spec["bank"], width, spec["classes"], spec["k"], spec["temperature"], unit=unit)
    else:
        head = nn.Linear(width, spec["classes"])
    return Classifier(backbone, head, spec["features"])


def make(model: str, classes: int, weights: str = "none", arch: str = "nano8",
         head: str = "fpn") -> tuple[nn.Module, dict, dict]:
    """--model, K, --weights, --arch, --head -> network, its spec, info (line, norm, path, sha256) of the weights.

    arch and head are for model "vit"; weights "none" leaves everything random.
    """
    scratch = weights == "none"
    if model != "vit":
        cls, load, options = NETS[model]
        spec = dict(name=model.removesuffix("-os8"), classes=classes, options=options)
        net = cls(classes, **options)
        return net, spec, SCRATCH if scratch else load(net, weights)
    backbone, state, info = (PRESETS[arch], None, SCRATCH) if scratch else load_vit(weights)
    taps = spread_taps(backbone["depth"])
    spec = dict(name="vit", backbone=backbone, head=head, version=VERSION, taps=taps,
                feat_norm=True, classes=classes)
    net = build(spec)
    if state is not None:
        fill(net.backbone, state, info)
    return net, spec, info


def load_trunk(weights: str, arch: str,
               cnn_name: str | None = None) -> tuple[dict | None, dict | None, dict]:
    """--weights for a classifier -> ViT arguments (of `arch` from scratch), tensors or None, info with "size".

    cnn_name: the network if it is a CNN, whose file is torchvision's. size: side of its input, None if any.
    """
    if weights == "none":
        return PRESETS[arch], None, SCRATCH | dict(size=None)
    if cnn_name is None:
        backbone, state, info = load_vit(weights)
        size = 224
        with suppress(BadWeights):  # a run of this project knows the size of its images
            size = load_weights(info["path"], header_only=True)[1].get("size", size)
        return backbone, state, info | dict(size=size)
    if cnn_name == "nano":
        raise BadInput(f"--weights {weights} with --cnn nano, which nobody has published weights "
                       "of; type --cnn resnet18 or resnet50, as the file is")
    file, tensors, digest, hashed = open_weights(weights)
    state, taken = select(tensors, RESNET_PARTS, RESNET)
    return None, state, dict(norm="imagenet", path=str(file), sha256=digest, size=224, taken=taken,
                             line=f"{file}{taken}, {hashed}, a new fc")


def make_classifier(spec: dict, state: dict | None, info: dict) -> nn.Module:
    """spec and what load_trunk gave -> network whose trunk has the weights, and whose head is random."""
    net = build(spec)
    if state is None:
        return net
    if spec["name"] == "cnn":
        trunk = {name: t for name, t in state.items() if not name.startswith("fc.")}
        fill(net, trunk | net.fc.state_dict(prefix="fc."), info)
    else:
        fill(net.backbone, state, info)
    return net


def load_run(run: str | Path, weights: str | None = None,
             task: str | None = None) -> tuple[nn.Module, dict]:
    """Run folder or best.safetensors -> network in eval mode, meta. weights: backbone of a run saved without it.

    task: None for segmentation, "classification"; a run of the other kind is a BadWeights.
    """
    state, meta = load_weights(run)
    if meta.get("task") != task:
        raise BadWeights(f"{run}: of another kind (segmentation or classification); name a run "
                         "that fits")
    if meta["saved"] == "head":
        state |= backbone_of(run, meta["weights"], weights)
    try:
        check_spec(meta["model"], state)
        net = build(meta["model"])
    except Exception as e:  # of any kind, by what the header holds
        raise BadWeights(f"{run}: the network in its header does not fit its tensors "
                         f"({short(e)}); copy the file from its run again") from None
    fill(net, state, dict(path=run))
    return net.eval(), meta


def backbone_of(run: str | Path, known: dict, weights: str | None) -> dict:
    """Tensors of the backbone that a run was saved without; known: its path and sha256."""
    path = weights or known.get("path") or "none"
    # A file must not make this machine fetch what its user has not typed.
    if is_url(path) and not weights:
        raise BadWeights(f"{run}: its backbone is at a URL; to fetch it, type --weights {path!r}")
    _, backbone, info = load_vit(path)
    if info["sha256"] != known.get("sha256"):
        raise BadWeights(f"{info['path']}: not the backbone this head was trained on; pass "
                         f"--weights the file with sha256 {str(known.get('sha256'))[:8]}...")
    return {f"backbone.{name}": t for name, t in backbone.items()}


def check_spec(spec: dict, state: dict) -> None:
    """A BadWeights where a header names what no run builds, or other sizes than the tensors have.

    Nothing is built by its word alone: a depth of a million would fill the memory.
    """
    def need(name, is_right):
        if name in spec and not is_right(spec[name]):
            raise BadWeights(f"{name} is {str(spec[name])[:60]}")

    need("cnn", lambda name: name in classify.CNNS)
    need("fold", lambda n: n == 2)
    need("options", lambda options: options in [known for _, _, known in NETS.values()])
    need("head", lambda name: name in HEADS)
    need("version", lambda n: n == VERSION)
    need("features", lambda kind: kind in ("cls", "cls+patch", "mean"))
    need("k", lambda k: isinstance(k, int) and k > 0)
    need("temperature", lambda t: t > 0)
    need("classes", lambda n: type(n) is int and 0 < n <= 2**16)
    need("feat_norm", lambda value: type(value) is bool)
    need("stem", lambda stem: stem in ("small", "imagenet"))
    strange = spec.keys() - SPEC
    if strange:
        raise BadWeights(f"{min(strange)!r:.60} is unknown")
    if "bank" in spec:
        labels = set(state["head.labels"].tolist())
        need("bank", lambda n: n == len(state["head.labels"]))
        need("classes", lambda n: labels <= set(range(n)))
    if "backbone" not in spec:
        return
    vit = {k.removeprefix("backbone."): t for k, t in state.items() if k.startswith("backbone.")}
    family = "dinov2" if "pos_embed" in vit else "dinov3"
    found = config_of(vit, "meta", family)
    # The tensors do not tell DINOv2's number of heads.
    heads = spec["backbone"]["heads"]
    if family == "dinov2" and found["dim"] % heads == 0:
        found["heads"] = heads
    need("backbone", lambda backbone: backbone == found)
    blocks = range(found["depth"])
    need("taps", lambda taps: taps and taps == [i for i in blocks if i in taps])


def about(info: dict) -> dict:
    """What a run's files say of the weights that it started from."""
    path = str(Path(info["path"]).resolve()) if info["path"] else None
    return dict(weights=dict(path=path, sha256=info["sha256"]))


def name_of(spec: dict) -> str:
    """'dinov3_vitl16 + fpn', 'unetformer', 'resnet18', 'channel means'."""
    if spec["name"] == "cnn":
        return spec["cnn"]
    if spec["name"] == "mean":
        return "channel means"
    if "backbone" not in spec:
        return spec["name"]
    name = arch_name(spec["backbone"])
    return f"{name} + {spec['head']}" if "head" in spec else name


def size_line(net: nn.Module, scratch: bool) -> str:
    """'0.21 M of 86.80 M parameters train'. scratch: they began as random numbers."""
    sizes = [(p.numel(), p.requires_grad) for p in net.parameters()]
    training = sum(n for n, trains in sizes if trains)
    total = sum(n for n, _ in sizes)
    rest = ", THE OTHERS STAY RANDOM" if scratch and training < total else ""
    return f"{training / 1e6:.2f} M of {total / 1e6:.2f} M parameters train{rest}"


def unfreeze(net: nn.Module, blocks: str) -> bool:
    """--unfreeze: "all", or how many of a ViT's last blocks train -> is its backbone frozen? CNNs always train."""
    count = None if blocks == "all" else int(blocks)
    if isinstance(net, (Segmenter, Classifier)):
        depth = net.backbone.depth
        if count is not None and count > depth:
            raise BadInput(f"--unfreeze {count}: the backbone has {depth} blocks; type --unfreeze all, "
                           "or fewer")
        return net.unfreeze(count) == 0
    return False


def freeze_bn(net: nn.Module) -> bool:
    """Keeps BatchNorm's statistics where a batch of one image would be a single value (DeepLabV3) -> done so?"""
    if not isinstance(net, deeplab.DeepLabV3):
        return False
    net.freeze_bn()
    return True


def as_tuple(logits) -> tuple:
    """(logits,), or what a network with an auxiliary head gives in training: (logits, auxiliary logits)."""
    return logits if isinstance(logits, tuple) else (logits,)


def choose_norm(wanted: str, info: dict) -> str:
    """--norm and info of the weights -> a name of NORMS; a file that does not tell is a BadInput."""
    norm = info["norm"] if wanted == "auto" else wanted
    if norm is None:
        raise BadInput(f"{info['path']}: published with two normalisations; type --norm imagenet "
                       "for LVD-1689M, --norm sat for SAT-493M")
    if norm not in list(NORMS):  # a header may hold what no dict takes as a key
        raise BadInput(f"{info['path']}: normalisation {norm!r:.40}; type --norm imagenet or sat")
    return norm


def param_groups(net: nn.Module, lr: float, backbone_lr: float, layer_decay: float,
                 weight_decay: float, trained: bool = False) -> list[dict]:
    """Groups for an optimiser; "scale" is a group's learning rate divided by the head's.

    "layers" is False for norms, biases and tokens, which do not decay. layer_decay: factor per block
    of a ViT below its last. trained: was the backbone loaded? Muon leaves it to AdamW.
    """
    depth = len(getattr(getattr(net, "backbone", None), "blocks", ()))  # 0: no ViT
    groups = {}
    for name, p in net.named_parameters():
        if not p.requires_grad:
            continue
        scale = 1.0
        if name.startswith(TRUNKS):
            scale = backbone_lr / lr
            if depth:
                scale *= layer_decay ** (depth - 1 - block_of(name, depth))
        is_layer = p.ndim > 1 and "token" not in name and "pos_embed" not in name
        loaded = trained and name.startswith(TRUNKS)
        key = scale, is_layer, loaded
        groups.setdefault(key, []).append(p)
    return [dict(params=params, scale=scale, layers=is_layer, trained=loaded,
                 weight_decay=weight_decay * is_layer)
            for (scale, is_layer, loaded), params in groups.items()]


def block_of(name: str, depth: int) -> int:
    """Number of the block that a ViT's parameter belongs to; -1 what comes before, the final norm to the last."""
    _, part, number, *_ = name.split(".") + [""]
    if part == "blocks":
        return int(number)
    return depth - 1 if part == "norm" else -1
