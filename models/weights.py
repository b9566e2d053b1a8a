"""Read weights from disk or a URL, recognise a DINO ViT by names and shapes alone, use Meta's names, load strictly.

    cfg, state, info = load_vit("dinov3_vitl16_pretrain_sat493m-eadcf0ff.pth")
    vit = ViT(**cfg); fill(vit, state, info); print(info["line"])

Layouts: Meta .pth, Hugging Face .safetensors or folder (shards too), timm, and best.safetensors of this project.
Every refusal is a BadWeights with one line. Files are read as tensors only: nothing in them is ever executed.
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

# One row per parameter: our name (= Meta DINOv3) and the file's name. * is the block number, + is weight and bias.
# A block's q, k and v are joined to qkv after renaming; None = not part of the backbone, dropped.
META = {"register_tokens": "storage_tokens", "mask_token": None, "blocks.*.attn.qkv.bias_mask": None,
        "local_cls_norm.+": None}  # SAT-493M files: used in pre-training only
HF_COMMON = {
    "embeddings.cls_token": "cls_token", "embeddings.mask_token": None, "embeddings.register_tokens": "storage_tokens"}
HF_DINOV2 = HF_COMMON | {
    "embeddings.position_embeddings": "pos_embed", "layernorm.+": "norm.+",
    "embeddings.patch_embeddings.projection.+": "patch_embed.proj.+",
    "encoder.layer.*.norm1.+": "blocks.*.norm1.+", "encoder.layer.*.norm2.+": "blocks.*.norm2.+",
    "encoder.layer.*.attention.attention.query.+": "blocks.*.attn.q.+",
    "encoder.layer.*.attention.attention.key.+": "blocks.*.attn.k.+",
    "encoder.layer.*.attention.attention.value.+": "blocks.*.attn.v.+",
    "encoder.layer.*.attention.output.dense.+": "blocks.*.attn.proj.+",
    "encoder.layer.*.layer_scale1.lambda1": "blocks.*.ls1.gamma",
    "encoder.layer.*.layer_scale2.lambda1": "blocks.*.ls2.gamma",
    "encoder.layer.*.mlp.fc1.+": "blocks.*.mlp.fc1.+", "encoder.layer.*.mlp.fc2.+": "blocks.*.mlp.fc2.+",
    "encoder.layer.*.mlp.weights_in.+": "blocks.*.mlp.w12.+", "encoder.layer.*.mlp.weights_out.+": "blocks.*.mlp.w3.+",
    # the same as transformers 5 names them in memory
    "encoder.layer.*.attention.q_proj.+": "blocks.*.attn.q.+",
    "encoder.layer.*.attention.k_proj.+": "blocks.*.attn.k.+",
    "encoder.layer.*.attention.v_proj.+": "blocks.*.attn.v.+",
    "encoder.layer.*.attention.o_proj.+": "blocks.*.attn.proj.+",
    "encoder.layer.*.mlp.gate_proj.+": "blocks.*.mlp.w1.+", "encoder.layer.*.mlp.up_proj.+": "blocks.*.mlp.w2.+",
    "encoder.layer.*.mlp.down_proj.+": "blocks.*.mlp.w3.+",
}
HF_DINOV3 = HF_COMMON | {
    "embeddings.patch_embeddings.+": "patch_embed.proj.+", "norm.+": "norm.+",
    "layer.*.norm1.+": "blocks.*.norm1.+", "layer.*.norm2.+": "blocks.*.norm2.+",
    "layer.*.attention.q_proj.+": "blocks.*.attn.q.+", "layer.*.attention.k_proj.+": "blocks.*.attn.k.+",
    "layer.*.attention.v_proj.+": "blocks.*.attn.v.+", "layer.*.attention.o_proj.+": "blocks.*.attn.proj.+",
    "layer.*.layer_scale1.lambda1": "blocks.*.ls1.gamma", "layer.*.layer_scale2.lambda1": "blocks.*.ls2.gamma",
    "layer.*.mlp.up_proj.+": "blocks.*.mlp.fc1.+", "layer.*.mlp.down_proj.+": "blocks.*.mlp.fc2.+",
}
HF_DINOV3_SWIGLU = HF_DINOV3 | {
    "layer.*.mlp.gate_proj.+": "blocks.*.mlp.w1.+", "layer.*.mlp.up_proj.+": "blocks.*.mlp.w2.+",
    "layer.*.mlp.down_proj.+": "blocks.*.mlp.w3.+"}
TIMM = {
    "reg_token": "storage_tokens", "blocks.*.gamma_1": "blocks.*.ls1.gamma", "blocks.*.gamma_2": "blocks.*.ls2.gamma",
    "blocks.*.attn.q_bias": "blocks.*.attn.q.bias", "blocks.*.attn.v_bias": "blocks.*.attn.v.bias",
    "blocks.*.mlp.fc1_g.+": "blocks.*.mlp.w1.+", "blocks.*.mlp.fc1_x.+": "blocks.*.mlp.w2.+"}
TIMM_SWIGLU = TIMM | {"blocks.*.mlp.fc2.+": "blocks.*.mlp.w3.+"}  # DINOv3 S+, H+, 7B
TIMM_PACKED = TIMM | {"blocks.*.mlp.fc1.+": "blocks.*.mlp.w12.+", "blocks.*.mlp.fc2.+": "blocks.*.mlp.w3.+"}  # DINOv2 g

HEADS = {4096: 32}  # by width, where a head is not 64 wide (DINOv3 7B)
SHA_NORM = {"eadcf0ff": "sat", "a6675841": "sat", "8aa4cbdd": "imagenet", "a955f4ea": "imagenet"}  # Meta's ViT-L and 7B
SHA_IN_NAME = re.compile(r"-(?=\d*[a-f])([0-9a-f]{8})\.(pth|pt|safetensors)$")  # digits alone are rather a date


class BadWeights(ValueError):
    """A weight file that cannot be used; the message is one line that says why and what to do."""


# ---- reading

def locate(path: str) -> Path:
    """A file or folder on disk; a URL is downloaded once into torch's hub cache."""
    if not path.startswith(("http://", "https://")):
        if not Path(path).is_file() and not Path(path).is_dir():
            raise BadWeights(f"{path}: no such file or folder; pass --weights a .pth, .safetensors, folder or URL")
        return Path(path)
    target = Path(torch.hub.get_dir()) / "checkpoints" / Path(urlparse(path).path).name
    if not target.exists():
        suffix = SHA_IN_NAME.search(target.name)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            # writes beside the target, compares the hash, then renames
            torch.hub.download_url_to_file(path, str(target), hash_prefix=suffix and suffix[1])
        except (OSError, RuntimeError) as e:
            raise BadWeights(f"{path}: download failed ({e}); download it in a browser and pass the file") from None
    return target


def read(path: Path) -> dict[str, torch.Tensor]:
    """Tensors of one file, or of a Hugging Face folder with one file or an index of shards."""
    if path.is_dir():
        index = path / "model.safetensors.index.json"
        if index.exists():
            try:
                shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            except (ValueError, LookupError, TypeError):
                raise BadWeights(f"{path}: {index.name} is not readable (truncated?); download it again") from None
        else:
            usual = ("model.safetensors", "pytorch_model.bin", "best.safetensors")
            shards = [n for n in usual if (path / n).exists()][:1]
        if not shards:
            raise BadWeights(f"{path}: a folder without model.safetensors or its index; pass the weight file itself")
        absent = [n for n in shards if not (path / n).exists()]
        if absent:
            raise BadWeights(f"{path}: shard {absent[0]} is listed in the index but missing; download it again")
        return {k: v for shard in shards for k, v in read(path / shard).items()}
    with open(path, "rb") as f:
        head = f.read(200)
    safe = head[8:9] == b"{"  # .safetensors: 8 bytes of header length, then JSON
    if head.startswith(b"version https://git-lfs"):
        raise BadWeights(f"{path}: a Git-LFS pointer, not the weights; run `git lfs pull` or download the file itself")
    if not safe and head.lstrip(b"\xef\xbb\xbf \r\n\t").startswith(b"<"):
        raise BadWeights(f"{path}: a web page (HTML/XML), not weights: the download link was refused or has expired; "
                         "download it again")
    if head and not safe and not head.startswith((b"PK\x03\x04", b"\x80")):  # zip, or a pickle of torch before 1.6
        raise BadWeights(f"{path}: neither a .pth nor a .safetensors file, it begins with {head[:24]!r}; "
                         "download it again")
    try:
        if safe:
            with safe_open(path, "pt") as f:
                state = {k: f.get_tensor(k) for k in f.keys()}
        else:
            state = flatten(torch.load(path, map_location="cpu", weights_only=True))
    except pickle.UnpicklingError:
        raise BadWeights(f"{path}: holds Python objects beside tensors, which are never run here; "
                         "save the plain state_dict or a .safetensors file") from None
    except (SafetensorError, RuntimeError, EOFError, OSError, ValueError, LookupError, struct.error) as e:
        why = (str(e) or type(e).__name__).splitlines()[0][:120]
        raise BadWeights(f"{path}: not a readable weight file ({path.stat().st_size} bytes, truncated?): {why}; "
                         "download it again") from None
    for k, t in state.items():  # DINOv3's key biases may be NaN under their mask, and are not used
        if t.is_floating_point() and not k.endswith(("qkv.bias", "bias_mask")) and not t.isfinite().all():
            raise BadWeights(f"{path}: {k} holds NaN or infinity; take an earlier file")
    return state


def flatten(obj) -> dict[str, torch.Tensor]:  # {"teacher": {...}} or {"model": {...}, "optimizer": {...}} -> tensors
    for key in ("state_dict", "model", "teacher", "net"):
        if isinstance(obj, dict) and isinstance(obj.get(key), dict):
            return flatten(obj[key])
    pairs = obj.items() if isinstance(obj, dict) else ()
    tensors = {k: v for k, v in pairs if isinstance(k, str) and isinstance(v, torch.Tensor)}
    if not tensors:
        raise ValueError(f"no tensors in it, only {type(obj).__name__}")
    return tensors


def sha256(path: Path) -> str:
    """Hex sha256 of a file, or of a folder's .safetensors/.bin files in name order."""
    digest = hashlib.sha256()
    for file in [path] if path.is_file() else sorted(p for p in path.iterdir() if p.suffix in (".safetensors", ".bin")):
        with open(file, "rb") as f:
            while chunk := f.read(1 << 24):
                digest.update(chunk)
    return digest.hexdigest()


def checked_sha256(file: Path) -> tuple[str, bool]:
    """Hex sha256, and whether the file's name confirms it; a name that contradicts it is refused."""
    digest, suffix = sha256(file), SHA_IN_NAME.search(file.name)
    if suffix and not digest.startswith(suffix[1]):
        raise BadWeights(f"{file}: sha256 starts with {digest[:8]}, its name says {suffix[1]}: truncated or altered; "
                         "download it again")
    return digest, bool(suffix)


# ---- recognising and renaming

def unwrap(sd: dict, *more: str) -> dict:
    """Remove the leading prefixes of DDP, torch.compile and `more` where every tensor has them."""
    for prefix in ("module.", "_orig_mod.", "module.", *more):
        if all(k.startswith(prefix) for k in sd):
            sd = {k.removeprefix(prefix): v for k, v in sd.items()}
    return sd


def strip(sd: dict) -> dict:
    """Remove leading wrapper prefixes; out of a whole network keep only its backbone."""
    sd = unwrap(sd, "model.", "dinov2.", "dinov2_with_registers.", "dinov3_vit.")
    if any(k.startswith("backbone.") for k in sd):  # best.safetensors, or a training checkpoint with a DINO head
        sd = {k.removeprefix("backbone."): v for k, v in sd.items() if k.startswith("backbone.")}
    return {re.sub(r"^model\.layer\.", "layer.", k): v for k, v in sd.items()}  # transformers 5 in memory


def layout_of(sd: dict) -> tuple[str, str, dict]:
    """State dict -> layout name, family and renaming table; refuses what is not a DINO ViT."""
    def has(pattern):
        return next((k for k in sd if re.search(pattern, k)), None)

    fc1, fc2 = has(r"mlp\.fc1\.weight$"), has(r"mlp\.fc2\.weight$")
    packed = fc1 and fc2 and sd[fc1].shape[0] == 2 * sd[fc2].shape[-1]  # timm keeps SwiGLU's two halves in fc1
    classifier = has(r"^(head|fc|classifier|heads?\.head|linear_head)\.(weight|bias)$")
    if has(r"\.layer_scale1\.lambda1$"):
        layout, family, table = "hf", "dinov2", HF_DINOV2
        if has(r"^layer\.\d"):
            family, table = "dinov3", HF_DINOV3_SWIGLU if has(r"\.gate_proj\.") else HF_DINOV3
    elif has(r"^blocks\.\d+\.gamma_1$"):
        layout, family, table = "timm", "dinov3", TIMM_SWIGLU if has(r"\.fc1_g\.") else TIMM
    elif has(r"^blocks\.\d+\.ls1\.gamma$"):  # timm names plain DINOv2 as Meta does
        rope = "pos_embed" not in sd and has(r"^rope_embed\.|^storage_tokens$|\.bias_mask$")
        family, table = "dinov3" if rope else "dinov2", TIMM_PACKED if packed else TIMM if "reg_token" in sd else META
        layout = "timm" if table is not META else "meta" if rope or "mask_token" in sd else "meta/timm"
    else:
        kind = ("a ConvNeXt" if has(r"downsample_layers\.|stages\.\d+\..*(dwconv|conv_dw|gamma)") else
                "a ResNet" if has(r"^(backbone\.)?layer1\.0\.conv1") else
                "a Swin transformer" if has("relative_position_bias_table") else
                "a ViT without LayerScale, so neither DINOv2 nor DINOv3" if has("cls_token|class_token") else
                "no network known here")
        raise BadWeights(f"{kind} (first tensors: {', '.join(list(sd)[:3])}); expected a DINOv2 or DINOv3 ViT backbone")
    if classifier:
        raise BadWeights(f"a classifier ({classifier} {tuple(sd[classifier].shape)}); expected a backbone without a "
                         "classification layer: download the *_pretrain file")
    return layout, family, table


def rename(sd: dict, table: dict, family: str) -> tuple[dict, dict, set]:
    """-> tensors under our names with q, k, v joined; {our name before joining: name in the file}; kinds dropped."""
    names = {k.replace("+", s): v and v.replace("+", s) for k, v in table.items() for s in ("weight", "bias")}
    out, origin, dropped = {}, {}, set()
    for key, t in sd.items():
        number = re.search(r"\.(\d+)\.", key)
        new = names.get(re.sub(r"\.\d+\.", ".*.", key, count=1), key)  # an unknown name is stopped by fill()
        if new is None:
            dropped.add(re.sub(r".*\d\.", "", key).removeprefix("embeddings."))
        else:
            new = new.replace("*", number[1]) if "*" in new else new
            out[new], origin[new] = t, key
    for stem, kind in sorted({m.groups() for n in out if (m := re.match(r"(.*\.attn\.)[qkv](\.weight|\.bias)$", n))}):
        parts = [f"{stem}{c}{kind}" for c in "qkv"]
        if family == "dinov3" and kind == ".bias" and parts[0] in out:
            out.setdefault(parts[1], torch.zeros_like(out[parts[0]]))  # no key bias: HF and timm do not store one
        if all(p in out for p in parts):  # otherwise fill() names the one that is missing
            if len({out[p].shape for p in parts}) > 1:
                raise BadWeights(", ".join(f"{origin.get(p, p)} is {tuple(out[p].shape)}" for p in parts)
                                 + "; expected equal shapes")
            out[f"{stem}qkv{kind}"] = torch.cat([out.pop(p) for p in parts])
    for name in [n for n in out if ".mlp.w12." in n]:
        halves = name.replace("w12", "w1"), name.replace("w12", "w2")
        out.update(zip(halves, out.pop(name).tensor_split(2)))
        origin.update(dict.fromkeys(halves, origin[name]))
    return out, origin, dropped


def config_of(sd: dict, layout: str, family: str) -> dict:
    """Constructor arguments of models/vit.py's ViT from tensors under our names."""
    depth = 1 + max((int(m[1]) for k in sd if (m := re.match(r"blocks\.(\d+)\.", k))), default=-1)
    inner = [t.shape[-1] for k, t in sd.items() if re.search(r"mlp\.(w3|fc2)\.weight$", k)]
    kernel = sd.get("patch_embed.proj.weight")
    if kernel is None or not inner:
        name = "blocks.0.mlp.fc2.weight" if kernel is not None else "patch_embed.proj.weight"
        raise BadWeights(f"tensor {name} is missing; expected a whole DINOv2 or DINOv3 ViT")
    if kernel.dim() != 4:
        raise BadWeights(f"patch_embed.proj.weight is {tuple(kernel.shape)}, expected 4 dimensions")
    dim, _, patch, _ = kernel.shape
    periods = sd.get("rope_embed.periods")
    heads = dim // (4 * len(periods)) if periods is not None else HEADS.get(dim, dim // 64)
    return dict(family=family, patch=patch, dim=dim, depth=depth, heads=max(1, heads), hidden=inner[0],
                ffn="swiglu" if any(".mlp.w3." in k for k in sd) else "mlp",
                registers=sd["storage_tokens"].shape[1] if "storage_tokens" in sd else 4 * (family == "dinov3"),
                grid=round((sd["pos_embed"].shape[1] - 1) ** 0.5) if "pos_embed" in sd else 0,
                qkv_bias=any(k.endswith(".attn.qkv.bias") for k in sd) or layout == "timm" and dim != 4096)


def complete(sd: dict, layout: str, cfg: dict) -> None:
    """Add, in place, what a layout leaves out because it is constant; clear the masked key bias."""
    if cfg["family"] == "dinov2":
        if layout == "timm" and cfg["registers"] and "pos_embed" in sd:  # timm adds the cls position to cls_token
            sd["pos_embed"] = F.pad(sd["pos_embed"], (0, 0, 1, 0))
        return
    if layout != "meta":
        n = cfg["dim"] // cfg["heads"] // 4
        sd.setdefault("rope_embed.periods", 100.0 ** (torch.arange(n, dtype=torch.float32) / n))
    biases = [f"blocks.{i}.attn.qkv.bias" for i in range(cfg["depth"])]
    if layout == "timm" and cfg["qkv_bias"] and not any(name in sd for name in biases):
        zero = sd["patch_embed.proj.weight"].new_zeros(3 * cfg["dim"])  # its plain *_dinov3 leave the all-zero bias out
        sd.update(dict.fromkeys(biases, zero))
    for name in biases:
        if name in sd:  # the masked third may hold anything, NaN too
            sd[name] = sd[name].clone()
            sd[name][cfg["dim"]: 2 * cfg["dim"]] = 0


def load_vit(path: str) -> tuple[dict, dict, dict]:
    """Path, folder or URL -> ViT arguments, state dict under our names, info (line, sha256, norm, origin, path)."""
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
    line = f"layout={layout}, {len(sd)} of {len(sd)} tensors"
    line += f" (not needed: {', '.join(sorted(dropped))})" if dropped else ""
    line += f", {len(raw) - len(sd)} outside the backbone" if len(raw) > len(sd) else ""
    line += f", sha256 {digest[:8]}{' as in the name' if named else ''}"
    norm = norm_of(file, cfg, sd, digest)
    return cfg, state, dict(path=str(file), line=line, sha256=digest, origin=origin, norm=norm)


def norm_of(file: Path, cfg: dict, sd: dict, digest: str) -> str | None:
    """'imagenet' or 'sat' (DINOv3 SAT-493M), None where nothing in the file, its name or its folder tells."""
    if digest[:8] in SHA_NORM:
        return SHA_NORM[digest[:8]]
    if file.suffix == ".safetensors" and file.is_file():
        with safe_open(file, "pt") as f:
            run = (f.metadata() or {}).get("nanors")  # a best.safetensors says what it was trained with
        if run:
            return json.loads(run)["norm"]
    if "local_cls_norm.weight" in sd and cfg["dim"] == 1024:  # only Meta's SAT ViT-L has it, but both 7B do
        return "sat"
    if named := re.findall("sat[-_]?493m|lvd[-_]?1689m", str(file).lower()):  # the file's own name comes last
        return "sat" if named[-1].startswith("sat") else "imagenet"
    preprocessor = (file if file.is_dir() else file.parent) / "preprocessor_config.json"
    if preprocessor.exists():
        red = json.loads(preprocessor.read_text()).get("image_mean", [0.485])[0]
        return "sat" if abs(red - 0.43) < 0.01 else "imagenet"
    published_twice = cfg["family"] == "dinov3" and cfg["dim"] in (1024, 4096)
    return None if published_twice and not ("mask_token" in sd and cfg["dim"] == 1024) else "imagenet"


# ---- loading

def fill(net: torch.nn.Module, state: dict, info: dict) -> None:
    """load_state_dict(strict=True) whose refusal is one line with the file's own tensor names."""
    want, origin = net.state_dict(), info.get("origin", {})

    def absent(name):  # of a joined qkv: the part that the file does not have
        parts = [name.replace(".qkv.", f".{c}.") for c in "qkv"]
        return next(p for p in parts if p not in state) if any(p in state for p in parts) else name

    missing = [absent(k) for k in want if k not in state]
    unknown = [origin.get(k, k) for k in state if k not in want and not (missing and re.search(r"\.attn\.[qkv]\.", k))]
    wrong = [k for k in want if k in state and state[k].shape != want[k].shape]
    if missing or unknown or wrong:
        say = [f"tensor {missing[0]} is missing ({len(missing)} in all)"] if missing else []
        say += [f"unknown tensor {unknown[0]} ({len(unknown)} in all)"] if unknown else []
        say += [f"{origin.get(k, k)} is {tuple(state[k].shape)}, expected {tuple(want[k].shape)}" for k in wrong[:1]]
        raise BadWeights(f"{info['path']}: {'; '.join(say)}: of another network, or altered; name the right file")
    net.load_state_dict(state)


def load_cnn(net: torch.nn.Module, path: str, convert: Callable, last: tuple[str, ...]) -> dict:
    """Fill a network that is no ViT, strictly, from a file or URL -> info (line, sha256, norm, path).

    convert(tensors) -> layout, tensors under the net's names, kinds not needed, prefixes that such a file leaves out.
    last: prefixes of the layers that give logits; where only the number of classes differs, they stay random.
    """
    file = locate(path)
    digest, named = checked_sha256(file)
    sd = unwrap(read(file), "net.", "model.")
    try:
        layout, state, dropped, new = convert(sd)
    except BadWeights as e:
        raise BadWeights(f"{file}: {e}") from None
    own = net.state_dict()
    other = {k for k in own if k.startswith(last) and k in state and state[k].shape != own[k].shape
             and state[k].shape[1:] == own[k].shape[1:]}
    fresh = {k: t for k, t in own.items() if k in other or k not in state and k.startswith(new)}
    fill(net, {k: t for k, t in state.items() if k not in other} | fresh, dict(path=file))
    line = f"layout={layout}, {len(sd) - len(other)} of {len(sd)} tensors"
    line += f" (not needed: {', '.join(sorted(dropped))})" if dropped else ""
    line += f", sha256 {digest[:8]}{' as in the name' if named else ''}"
    parts = [prefix.rstrip(".") for prefix in new if any(k.startswith(prefix) for k in fresh)]
    line += f"; random: {', '.join(parts)}" if parts else ""
    if other:
        k = min(other)
        line += f"; random: last convolution, {len(state[k])} classes in the file and {len(own[k])} here"
    return dict(path=str(file), line=line, sha256=digest, norm="imagenet")
