"""Read weights from disk or a URL, recognise a DINO ViT by names and shapes, load it strictly.

    cfg, state, info = load_vit("dinov3_vitl16_pretrain_sat493m-eadcf0ff.pth")
    vit = ViT(**cfg)
    fill(vit, state, info)
    print(info["line"])

Layouts: Meta .pth, Hugging Face .safetensors or folder (shards too), timm, and best.safetensors of
this project; all end with Meta's names. Every refusal is a BadWeights with one line. Files are read
as tensors only: nothing in them is ever executed. This file imports nothing of the project.
"""
import hashlib
import json
import pickle
import re
import struct
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlparse

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open

# One row per parameter: the file's name and ours (= Meta DINOv3). * is the block number, + is
# weight and bias. A block's q, k and v are joined to qkv after renaming. None = not part of the
# backbone, dropped.
META = {
    "register_tokens": "storage_tokens",
    "mask_token": None,
    "blocks.*.attn.qkv.bias_mask": None,
    # In SAT-493M files; pre-training alone used it.
    "local_cls_norm.+": None,
}
# Hugging Face. The DINOv3 models with SwiGLU use the names of the MLP for other layers.
HF_COMMON = {
    "embeddings.cls_token": "cls_token",
    "embeddings.mask_token": None,
    "embeddings.register_tokens": "storage_tokens",
}
HF_DINOV2 = HF_COMMON | {
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection.+": "patch_embed.proj.+",
    "layernorm.+": "norm.+",
    "encoder.layer.*.norm1.+": "blocks.*.norm1.+",
    "encoder.layer.*.norm2.+": "blocks.*.norm2.+",
    "encoder.layer.*.attention.attention.query.+": "blocks.*.attn.q.+",
    "encoder.layer.*.attention.attention.key.+": "blocks.*.attn.k.+",
    "encoder.layer.*.attention.attention.value.+": "blocks.*.attn.v.+",
    "encoder.layer.*.attention.output.dense.+": "blocks.*.attn.proj.+",
    "encoder.layer.*.layer_scale1.lambda1": "blocks.*.ls1.gamma",
    "encoder.layer.*.layer_scale2.lambda1": "blocks.*.ls2.gamma",
    "encoder.layer.*.mlp.fc1.+": "blocks.*.mlp.fc1.+",
    "encoder.layer.*.mlp.fc2.+": "blocks.*.mlp.fc2.+",
    "encoder.layer.*.mlp.weights_in.+": "blocks.*.mlp.w12.+",
    "encoder.layer.*.mlp.weights_out.+": "blocks.*.mlp.w3.+",
    # The same tensors as transformers 5 names them in memory.
    "encoder.layer.*.attention.q_proj.+": "blocks.*.attn.q.+",
    "encoder.layer.*.attention.k_proj.+": "blocks.*.attn.k.+",
    "encoder.layer.*.attention.v_proj.+": "blocks.*.attn.v.+",
    "encoder.layer.*.attention.o_proj.+": "blocks.*.attn.proj.+",
    "encoder.layer.*.mlp.gate_proj.+": "blocks.*.mlp.w1.+",
    "encoder.layer.*.mlp.up_proj.+": "blocks.*.mlp.w2.+",
    "encoder.layer.*.mlp.down_proj.+": "blocks.*.mlp.w3.+",
}
HF_DINOV3 = HF_COMMON | {
    "embeddings.patch_embeddings.+": "patch_embed.proj.+",
    "norm.+": "norm.+",
    "layer.*.norm1.+": "blocks.*.norm1.+",
    "layer.*.norm2.+": "blocks.*.norm2.+",
    "layer.*.attention.q_proj.+": "blocks.*.attn.q.+",
    "layer.*.attention.k_proj.+": "blocks.*.attn.k.+",
    "layer.*.attention.v_proj.+": "blocks.*.attn.v.+",
    "layer.*.attention.o_proj.+": "blocks.*.attn.proj.+",
    "layer.*.layer_scale1.lambda1": "blocks.*.ls1.gamma",
    "layer.*.layer_scale2.lambda1": "blocks.*.ls2.gamma",
    "layer.*.mlp.up_proj.+": "blocks.*.mlp.fc1.+",
    "layer.*.mlp.down_proj.+": "blocks.*.mlp.fc2.+",
}
HF_DINOV3_SWIGLU = HF_DINOV3 | {
    "layer.*.mlp.gate_proj.+": "blocks.*.mlp.w1.+",
    "layer.*.mlp.up_proj.+": "blocks.*.mlp.w2.+",
    "layer.*.mlp.down_proj.+": "blocks.*.mlp.w3.+",
}
# timm, which keeps the other names as Meta has them. It stores a bias for q and v, none for k.
TIMM = {
    "reg_token": "storage_tokens",
    "blocks.*.gamma_1": "blocks.*.ls1.gamma",
    "blocks.*.gamma_2": "blocks.*.ls2.gamma",
    "blocks.*.attn.q_bias": "blocks.*.attn.q.bias",
    "blocks.*.attn.v_bias": "blocks.*.attn.v.bias",
    "blocks.*.mlp.fc1_g.+": "blocks.*.mlp.w1.+",
    "blocks.*.mlp.fc1_x.+": "blocks.*.mlp.w2.+",
}
# DINOv3 S+, H+ and 7B.
TIMM_SWIGLU = TIMM | {"blocks.*.mlp.fc2.+": "blocks.*.mlp.w3.+"}
# DINOv2 g: fc1 holds both halves of SwiGLU.
TIMM_PACKED = TIMM_SWIGLU | {"blocks.*.mlp.fc1.+": "blocks.*.mlp.w12.+"}

# Number of heads by width, where a head is not 64 wide (DINOv3 7B).
ATTENTION_HEADS = {4096: 32}
# The first digits of a file's sha256 -> what normalises its input: Meta's ViT-L and 7B.
SHA_NORM = {"eadcf0ff": "sat", "a6675841": "sat", "8aa4cbdd": "imagenet", "a955f4ea": "imagenet"}
# Eight digits without a letter are rather a date.
SHA_IN_NAME = re.compile(r"-(?=\d*[a-f])([0-9a-f]{8})\.(pth|pt|safetensors)$")


class BadWeights(ValueError):
    """A weight file that cannot be used; the message is one line that says why and what to do."""


# ---- reading

def locate(path: str) -> Path:
    """A file or folder on disk; a URL is downloaded once into torch's hub cache."""
    if not path.startswith(("http://", "https://")):
        if not Path(path).is_file() and not Path(path).is_dir():
            raise BadWeights(f"{path}: no such file or folder; pass --weights a .pth, "
                             ".safetensors, folder or URL")
        return Path(path)
    target = Path(torch.hub.get_dir()) / "checkpoints" / Path(urlparse(path).path).name
    if not target.exists():
        suffix = SHA_IN_NAME.search(target.name)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            # This writes beside the target, compares the hash, then renames.
            torch.hub.download_url_to_file(path, str(target), hash_prefix=suffix and suffix[1])
        except (OSError, RuntimeError) as e:
            raise BadWeights(f"{path}: download failed ({e}); download it in a browser and pass "
                             "the file") from None
    return target


def shards_of(folder: Path) -> list[Path]:
    """The files of a Hugging Face folder: those of its index, or the usual one."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, LookupError, TypeError):
            raise BadWeights(f"{folder}: {index.name} is not readable (truncated?); download it "
                             "again") from None
    else:
        usual = ("model.safetensors", "pytorch_model.bin", "best.safetensors")
        names = [name for name in usual if (folder / name).exists()][:1]
    if not names:
        raise BadWeights(f"{folder}: a folder without model.safetensors or its index; pass the "
                         "weight file itself")
    for name in names:
        if not (folder / name).exists():
            raise BadWeights(f"{folder}: shard {name} is listed in the index but missing; "
                             "download it again")
    return [folder / name for name in names]


def read(path: Path) -> dict[str, torch.Tensor]:
    """Tensors of one file, or of a Hugging Face folder with one file or an index of shards."""
    if path.is_dir():
        state = {}
        for shard in shards_of(path):
            state |= read(shard)
        return state

    # What is no weight file at all shows in its first bytes. An empty file is told below.
    with open(path, "rb") as f:
        head = f.read(200)
    safe = head[8:9] == b"{"  # .safetensors: 8 bytes of header length, then JSON
    known = safe or head.startswith((b"PK\x03\x04", b"\x80"))  # zip, or a pickle of torch < 1.6
    if head.startswith(b"version https://git-lfs"):
        raise BadWeights(f"{path}: a Git-LFS pointer, not the weights; run `git lfs pull` or "
                         "download the file itself")
    if not safe and head.lstrip(b"\xef\xbb\xbf \r\n\t").startswith(b"<"):
        raise BadWeights(f"{path}: a web page (HTML/XML), not weights: the download link was "
                         "refused or has expired; download it again")
    if head and not known:
        raise BadWeights(f"{path}: neither a .pth nor a .safetensors file, it begins with "
                         f"{head[:24]!r}; download it again")

    # All that the two readers raise for a damaged file, and flatten() for one without tensors.
    unreadable = (SafetensorError, RuntimeError, EOFError, OSError, ValueError, LookupError,
                  struct.error)
    try:
        if safe:
            with safe_open(path, "pt") as f:
                state = {k: f.get_tensor(k) for k in f.keys()}
        else:
            state = flatten(torch.load(path, map_location="cpu", weights_only=True))
    except pickle.UnpicklingError:
        raise BadWeights(f"{path}: holds Python objects beside tensors, which are never run here; "
                         "save the plain state_dict or a .safetensors file") from None
    except unreadable as e:
        why = (str(e) or type(e).__name__).splitlines()[0][:120]
        raise BadWeights(f"{path}: not a readable weight file ({path.stat().st_size} bytes, "
                         f"truncated?): {why}; download it again") from None

    # DINOv3's key biases may be NaN under their mask. They are not used.
    for k, t in state.items():
        masked = k.endswith(("qkv.bias", "bias_mask"))
        if t.is_floating_point() and not masked and not t.isfinite().all():
            raise BadWeights(f"{path}: {k} holds NaN or infinity; take an earlier file")
    return state


def flatten(obj: object) -> dict[str, torch.Tensor]:
    """The tensors of what torch.load gave; a ValueError where it holds none."""
    tensors = {}
    if isinstance(obj, dict):
        # {"teacher": {...}} or {"model": {...}, "optimizer": {...}, "epoch": 3}
        for key in ("state_dict", "model", "teacher", "net"):
            if isinstance(obj.get(key), dict):
                return flatten(obj[key])
        for k, v in obj.items():
            if isinstance(k, str) and isinstance(v, torch.Tensor):
                tensors[k] = v
    if not tensors:
        raise ValueError(f"no tensors in it, only {type(obj).__name__}")
    return tensors


def sha256(path: Path) -> str:
    """Hex sha256 of a file, or of a folder's .safetensors/.bin files in name order."""
    files = [path]
    if not path.is_file():
        files = sorted(p for p in path.iterdir() if p.suffix in (".safetensors", ".bin"))
    digest = hashlib.sha256()
    for file in files:
        with open(file, "rb") as f:
            while chunk := f.read(1 << 24):
                digest.update(chunk)
    return digest.hexdigest()


def checked_sha256(file: Path) -> tuple[str, bool]:
    """Hex sha256, and whether the file's name confirms it; a name that contradicts is refused."""
    digest = sha256(file)
    suffix = SHA_IN_NAME.search(file.name)
    if suffix and not digest.startswith(suffix[1]):
        raise BadWeights(f"{file}: sha256 starts with {digest[:8]}, its name says {suffix[1]}: "
                         "truncated or altered; download it again")
    return digest, bool(suffix)


# ---- recognising and renaming

def unwrap(sd: dict, *more: str) -> dict:
    """Remove the leading prefixes of DDP, torch.compile and `more` where every tensor has them."""
    # Either of the two may be the outer one.
    for prefix in ("module.", "_orig_mod.", "module.", *more):
        if all(k.startswith(prefix) for k in sd):
            sd = {k.removeprefix(prefix): v for k, v in sd.items()}
    return sd


def strip(sd: dict) -> dict:
    """Remove leading wrapper prefixes; out of a whole network keep only its backbone."""
    sd = unwrap(sd, "model.", "dinov2.", "dinov2_with_registers.", "dinov3_vit.")
    # A best.safetensors, or a training checkpoint with a DINO head.
    inside = {k: v for k, v in sd.items() if k.startswith("backbone.")}
    if inside:
        sd = {k.removeprefix("backbone."): v for k, v in inside.items()}
    # transformers 5 has one more prefix in memory.
    return {re.sub(r"^model\.layer\.", "layer.", k): v for k, v in sd.items()}


def layout_of(sd: dict) -> tuple[str, str, dict]:
    """State dict -> layout name, family and renaming table; refuses what is not a DINO ViT."""
    def has(pattern):
        return next((k for k in sd if re.search(pattern, k)), None)

    if has(r"\.layer_scale1\.lambda1$"):
        layout, family, table = "hf", "dinov2", HF_DINOV2
        if has(r"^layer\.\d"):
            family = "dinov3"
            table = HF_DINOV3_SWIGLU if has(r"\.gate_proj\.") else HF_DINOV3
    elif has(r"^blocks\.\d+\.gamma_1$"):
        layout, family = "timm", "dinov3"
        table = TIMM_SWIGLU if has(r"\.fc1_g\.") else TIMM
    elif has(r"^blocks\.\d+\.ls1\.gamma$"):
        marks = has(r"^rope_embed\.|^storage_tokens$|\.bias_mask$")
        family = "dinov3" if "pos_embed" not in sd and marks else "dinov2"
        # timm keeps SwiGLU's two halves in fc1, which is then twice as high as fc2 is wide.
        fc1, fc2 = has(r"mlp\.fc1\.weight$"), has(r"mlp\.fc2\.weight$")
        if fc1 and fc2 and sd[fc1].shape[0] == 2 * sd[fc2].shape[-1]:
            layout, table = "timm", TIMM_PACKED
        elif "reg_token" in sd:
            layout, table = "timm", TIMM
        elif family == "dinov3" or "mask_token" in sd:
            layout, table = "meta", META
        else:
            layout, table = "meta/timm", META  # timm names plain DINOv2 as Meta does
    else:
        if has(r"downsample_layers\.|stages\.\d+\..*(dwconv|conv_dw|gamma)"):
            kind = "a ConvNeXt"
        elif has(r"^(backbone\.)?layer1\.0\.conv1"):
            kind = "a ResNet"
        elif has("relative_position_bias_table"):
            kind = "a Swin transformer"
        elif has("cls_token|class_token"):
            kind = "a ViT without LayerScale, so neither DINOv2 nor DINOv3"
        else:
            kind = "no network known here"
        first = ", ".join(list(sd)[:3])
        raise BadWeights(f"{kind} (first tensors: {first}); expected a DINOv2 or DINOv3 ViT "
                         "backbone")

    classifier = has(r"^(head|fc|classifier|heads?\.head|linear_head)\.(weight|bias)$")
    if classifier:
        raise BadWeights(f"a classifier ({classifier} {tuple(sd[classifier].shape)}); expected a "
                         "backbone without a classification layer: download the *_pretrain file")
    return layout, family, table


def rename(sd: dict, table: dict, family: str) -> tuple[dict, dict, set]:
    """-> tensors under our names, with q, k, v joined; names in the file; kinds dropped.

    names in the file: {our name before joining: the file's}, for messages.
    """
    # The table with + written out.
    names = {}
    for theirs, ours in table.items():
        for leaf in ("weight", "bias"):
            names[theirs.replace("+", leaf)] = None if ours is None else ours.replace("+", leaf)

    # The first number of a name is that of its block. A name that no table knows stays
    # as it is, and fill() stops at it.
    out, origin, dropped = {}, {}, set()
    for key, t in sd.items():
        number = re.search(r"\.(\d+)\.", key)
        new = names.get(re.sub(r"\.\d+\.", ".*.", key, count=1), key)
        if new is None:
            dropped.add(re.sub(r".*\d\.", "", key).removeprefix("embeddings."))
            continue
        if "*" in new:
            new = new.replace("*", number[1])
        out[new] = t
        origin[new] = key

    join_qkv(out, origin, family)
    # Both halves of a SwiGLU in one tensor.
    for name in [n for n in out if ".mlp.w12." in n]:
        halves = name.replace("w12", "w1"), name.replace("w12", "w2")
        out.update(zip(halves, out.pop(name).tensor_split(2)))
        origin.update(dict.fromkeys(halves, origin[name]))
    return out, origin, dropped


def join_qkv(out: dict, origin: dict, family: str) -> None:
    """Replace, in place, every block's attn.q, attn.k and attn.v by attn.qkv."""
    found = set()
    for name in out:
        match = re.match(r"(.*\.attn\.)[qkv](\.weight|\.bias)$", name)
        if match:
            found.add(match.groups())
    for stem, kind in sorted(found):
        parts = [f"{stem}{c}{kind}" for c in "qkv"]
        # Hugging Face and timm do not store DINOv3's key bias, which counts as zero.
        if family == "dinov3" and kind == ".bias" and parts[0] in out:
            out.setdefault(parts[1], torch.zeros_like(out[parts[0]]))
        # Where a part is missing, fill() names it.
        if not all(p in out for p in parts):
            continue
        if len({out[p].shape for p in parts}) > 1:
            shapes = ", ".join(f"{origin.get(p, p)} is {tuple(out[p].shape)}" for p in parts)
            raise BadWeights(f"{shapes}; expected equal shapes")
        out[f"{stem}qkv{kind}"] = torch.cat([out.pop(p) for p in parts])


def config_of(sd: dict, layout: str, family: str) -> dict:
    """Constructor arguments of models/vit.py's ViT from tensors under our names."""
    # Blocks count from 0.
    matches = [re.match(r"blocks\.(\d+)\.", k) for k in sd]
    depth = 1 + max((int(m[1]) for m in matches if m), default=-1)
    inner = [t.shape[-1] for k, t in sd.items() if re.search(r"mlp\.(w3|fc2)\.weight$", k)]
    kernel = sd.get("patch_embed.proj.weight")
    if kernel is None or not inner:
        name = "patch_embed.proj.weight" if kernel is None else "blocks.0.mlp.fc2.weight"
        raise BadWeights(f"tensor {name} is missing; expected a whole DINOv2 or DINOv3 ViT")
    if kernel.dim() != 4:
        raise BadWeights(f"patch_embed.proj.weight is {tuple(kernel.shape)}, expected 4 dimensions")
    dim, _, patch, _ = kernel.shape

    # What the file does not tell is what was published.
    heads = ATTENTION_HEADS.get(dim, dim // 64)
    if "rope_embed.periods" in sd:
        heads = dim // (4 * len(sd["rope_embed.periods"]))
    registers = 4 if family == "dinov3" else 0
    if "storage_tokens" in sd:
        registers = sd["storage_tokens"].shape[1]
    grid = 0
    if "pos_embed" in sd:
        grid = round((sd["pos_embed"].shape[1] - 1) ** 0.5)
    # timm's plain DINOv3 models leave an all-zero bias out. The 7B has none.
    qkv_bias = any(k.endswith(".attn.qkv.bias") for k in sd)
    if layout == "timm" and dim != 4096:
        qkv_bias = True
    ffn = "swiglu" if any(".mlp.w3." in k for k in sd) else "mlp"
    return dict(family=family, patch=patch, dim=dim, depth=depth, heads=max(1, heads),
                hidden=inner[0], ffn=ffn, registers=registers, grid=grid, qkv_bias=qkv_bias)


def complete(sd: dict, layout: str, cfg: dict) -> None:
    """Add, in place, what a layout leaves out because it is constant; clear the masked key bias."""
    dim = cfg["dim"]
    if cfg["family"] == "dinov2":
        # timm adds the position of the cls token to cls_token itself.
        if layout == "timm" and cfg["registers"] and "pos_embed" in sd:
            sd["pos_embed"] = F.pad(sd["pos_embed"], (0, 0, 1, 0))
        return
    # Hugging Face and timm do not store the periods.
    if layout != "meta":
        n = dim // cfg["heads"] // 4
        periods = 100.0 ** (torch.arange(n, dtype=torch.float32) / n)
        sd.setdefault("rope_embed.periods", periods)
    biases = [f"blocks.{i}.attn.qkv.bias" for i in range(cfg["depth"])]
    # timm's plain models, see config_of().
    if layout == "timm" and cfg["qkv_bias"] and not any(name in sd for name in biases):
        zero = sd["patch_embed.proj.weight"].new_zeros(3 * dim)
        sd.update(dict.fromkeys(biases, zero))
    # The masked third may hold anything, NaN too.
    for name in biases:
        if name in sd:
            sd[name] = sd[name].clone()
            sd[name][dim: 2 * dim] = 0


def load_vit(path: str) -> tuple[dict, dict, dict]:
    """Path, folder or URL -> ViT arguments, state dict under our names, info.

    info: line (what was loaded, for the user), sha256, norm, origin, path.
    """
    # From the file's names to ours; these steps do not know the file, so its name is added here.
    file = locate(path)
    digest, named = checked_sha256(file)
    raw = read(file)
    sd = strip(raw)
    try:
        layout, family, table = layout_of(sd)
        state, origin, dropped = rename(sd, table, family)
        cfg = config_of(state, layout, family)
    except BadWeights as e:
        raise BadWeights(f"{file}: {e}") from None
    complete(state, layout, cfg)

    # What was loaded and what was left out, for the user.
    line = f"layout={layout}, {len(sd)} of {len(sd)} tensors"
    if dropped:
        line += f" (not needed: {', '.join(sorted(dropped))})"
    if len(raw) > len(sd):
        line += f", {len(raw) - len(sd)} outside the backbone"
    line += f", sha256 {digest[:8]}"
    if named:
        line += " as in the name"
    norm = norm_of(file, cfg, sd, digest)
    return cfg, state, dict(path=str(file), line=line, sha256=digest, origin=origin, norm=norm)


def norm_of(file: Path, cfg: dict, sd: dict, digest: str) -> str | None:
    """What normalises the input: 'imagenet' or 'sat' (DINOv3 SAT-493M).

    None where nothing in the file, its name or its folder tells.
    """
    if digest[:8] in SHA_NORM:
        return SHA_NORM[digest[:8]]
    # A best.safetensors says what it was trained with.
    if (file / "best.safetensors").is_file():
        file = file / "best.safetensors"
    if file.suffix == ".safetensors" and file.is_file():
        with safe_open(file, "pt") as f:
            run = (f.metadata() or {}).get("nanors")
        if run:
            return json.loads(run)["norm"]
    # Of the two ViT-L, only the SAT one has this norm. Both 7B have it.
    if "local_cls_norm.weight" in sd and cfg["dim"] == 1024:
        return "sat"
    # The file's own name comes last in its path and decides.
    published = re.findall("sat[-_]?493m|lvd[-_]?1689m", str(file).lower())
    if published:
        return "sat" if published[-1].startswith("sat") else "imagenet"
    folder = file if file.is_dir() else file.parent
    preprocessor = folder / "preprocessor_config.json"
    if preprocessor.exists():
        red = json.loads(preprocessor.read_text()).get("image_mean", [0.485])[0]
        return "sat" if abs(red - 0.43) < 0.01 else "imagenet"
    # Only ViT-L and 7B of DINOv3 were published for both. A Meta file of the ViT-L that came so
    # far is the ImageNet one.
    published_twice = cfg["family"] == "dinov3" and cfg["dim"] in (1024, 4096)
    metas_large = "mask_token" in sd and cfg["dim"] == 1024
    if published_twice and not metas_large:
        return None
    return "imagenet"


# ---- loading

def fill(net: torch.nn.Module, state: dict, info: dict) -> None:
    """load_state_dict(strict=True) whose refusal is one line with the file's own tensor names."""
    want = net.state_dict()
    origin = info.get("origin", {})

    def absent(name):
        # Of a qkv that was not joined: the part that the file does not have.
        parts = [name.replace(".qkv.", f".{c}.") for c in "qkv"]
        if any(p in state for p in parts):
            return next(p for p in parts if p not in state)
        return name

    missing = [absent(k) for k in want if k not in state]
    # The other parts of such a qkv are not unknown.
    unknown = []
    for k in state:
        part = missing and re.search(r"\.attn\.[qkv]\.", k)
        if k not in want and not part:
            unknown.append(origin.get(k, k))
    wrong = [k for k in want if k in state and state[k].shape != want[k].shape]

    faults = []
    if missing:
        faults.append(f"tensor {missing[0]} is missing ({len(missing)} in all)")
    if unknown:
        faults.append(f"unknown tensor {unknown[0]} ({len(unknown)} in all)")
    if wrong:
        k = wrong[0]
        found, expected = tuple(state[k].shape), tuple(want[k].shape)
        faults.append(f"{origin.get(k, k)} is {found}, expected {expected}")
    if faults:
        raise BadWeights(f"{info['path']}: {'; '.join(faults)}: of another network, or altered; "
                         "name the right file")
    net.load_state_dict(state)


def load_cnn(net: torch.nn.Module, path: str, convert: Callable, last: tuple[str, ...]) -> dict:
    """Fill a network that is no ViT, strictly, from a file or URL.

    -> info (line, sha256, norm, path). convert(tensors) -> layout, tensors under the net's names,
    kinds not needed, prefixes that such a file leaves out. last: prefixes of the layers that give
    logits; where only the number of classes differs, they stay random.
    """
    # convert does not know the file, so its name is added here.
    file = locate(path)
    digest, named = checked_sha256(file)
    sd = unwrap(read(file), "net.", "model.")
    try:
        layout, state, dropped, new = convert(sd)
    except BadWeights as e:
        raise BadWeights(f"{file}: {e}") from None

    own = net.state_dict()
    other = set()  # last layers with another number of classes
    for k in own:
        if k.startswith(last) and k in state:
            found, expected = state[k].shape, own[k].shape
            if found != expected and found[1:] == expected[1:]:
                other.add(k)
    fresh = {}  # what stays random
    for k, t in own.items():
        left_out = k not in state and k.startswith(new)
        if k in other or left_out:
            fresh[k] = t
    loaded = {k: t for k, t in state.items() if k not in other}
    fill(net, loaded | fresh, dict(path=file))

    # What was loaded and what was not, for the user.
    line = f"layout={layout}, {len(sd) - len(other)} of {len(sd)} tensors"
    if dropped:
        line += f" (not needed: {', '.join(sorted(dropped))})"
    line += f", sha256 {digest[:8]}"
    if named:
        line += " as in the name"
    parts = [prefix.rstrip(".") for prefix in new if any(k.startswith(prefix) for k in fresh)]
    if parts:
        line += f"; random: {', '.join(parts)}"
    if other:
        k = min(other)
        line += (f"; random: last convolution, {len(state[k])} classes in the file "
                 f"and {len(own[k])} here")
    return dict(path=str(file), line=line, sha256=digest, norm="imagenet")
