"""Read weights from disk or a URL, recognise a DINO ViT by names and shapes, load it strictly.

    cfg, state, info = load_vit("dinov3_vitl16_pretrain_sat493m-eadcf0ff.pth")
    vit = ViT(**cfg)
    fill(vit, state, info)
    print(info["line"])

Layouts: Meta .pth, Hugging Face .safetensors or folder (shards too), timm, and best.safetensors of
this project, as published or anywhere inside a training checkpoint; all end with Meta's names.
Every refusal is a BadWeights with one line. Files are read as tensors only: nothing in them is ever
executed, and what they claim is compared with their size. It copies with data/common.py alone.
"""
import functools
import hashlib
import os
import re
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from urllib.request import Request, urlopen

import torch
import torch.nn.functional as F
from safetensors import safe_open

from data.common import (
    BadInput, check_file, file_sha256, first_few, parse_json, progress, read_json, replace)

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

# How the name of the patch embedding ends in these layouts, and with what a ViT's names begin. The
# last two are of networks unlike ours, which must not load without them.
VIT = r"patch_embed\.proj\.weight|embeddings\.patch_embeddings\.(projection\.)?weight"
VIT_PARTS = {
    "cls_token", "pos_embed", "patch_embed", "blocks", "norm", "local_cls_norm", "rope_embed",
    "register_tokens", "storage_tokens", "reg_token", "mask_token",
    "embeddings", "encoder", "layer", "layernorm", "cls_norm", "norm_pre"}
# What other files hold, by a name in them; the first that fits is told.
OTHERS = (
    (r"flat_param", "a part of an FSDP checkpoint (save it with FULL_STATE_DICT)"),
    (r"downsample_layers\.|stages\.\d+\..*(dwconv|conv_dw|gamma)", "a ConvNeXt"),
    (r"(^|\.)layer1\.0\.conv1", "a ResNet"),
    (r"relative_position_bias_table", "a Swin transformer"),
    (r"\.(ls1\.gamma|gamma_1|lambda1)$", "a ViT whose patch_embed.proj.weight is missing"),
    (r"cls_token|class_token", "a ViT without LayerScale, so neither DINOv2 nor DINOv3"),
)
# As VIT and VIT_PARTS, of torchvision's ResNets.
RESNET = r"layer1\.0\.conv1\.weight"
RESNET_PARTS = {"conv1", "bn1", "layer1", "layer2", "layer3", "layer4", "fc"}

# What DDP, torch.compile, FSDP, checkpointing and Lightning put into names, at any place.
WRAPPER = r"(?:module|_[a-z_]*mod(?:ule)?)\."
# Inside a network: what to cut out of names, in this order.
EXTRA = (
    rf"(?<![^.]){WRAPPER}",
    r"(?<=^blocks\.)\d+\.(?=\d+\.)",  # Meta's chunks: blocks.0.11 is block 11
    r"^model\.(?=layer\.)",  # transformers 5 in memory
)
# Words that name a copy whose weights are an average over training steps, and one that is not
# wanted where there is another.
AVERAGED = {"ema", "swa", "average", "averaged", "shadow", "momentum", "target"}
LAST = {"student", "online", "optimizer"}

# Number of heads by width, where a head is not 64 wide (DINOv3 7B).
ATTENTION_HEADS = {4096: 32}
# The first digits of a file's sha256 -> what normalises its input: Meta's ViT-L and 7B.
SHA_NORM = {"eadcf0ff": "sat", "a6675841": "sat", "8aa4cbdd": "imagenet", "a955f4ea": "imagenet"}
# Eight digits without a letter are rather a date.
SHA_IN_NAME = re.compile(r"-(?=\d*[a-f])([0-9a-f]{8})\.(pth|pt|safetensors)$")

# Downloads: at most this many bytes (the 7B model has 27e9), and a megabyte within so many seconds.
LARGEST = 40 * 10**9
PATIENCE = 30
MEGABYTE = 1 << 20
# A tensor's name has at most so many characters.
LONGEST = 1000
# Weights are in one of these types.
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class BadWeights(ValueError):
    """A weight file that cannot be used; the message is one line that says why and what to do."""


# ---- finding the file

def is_url(path: str) -> bool:
    """Does it name something to download?"""
    return path.lower().startswith(("http://", "https://"))


def check_there(path: str) -> None:
    """BadWeights unless it is a URL, a file or a folder: before any work."""
    if not is_url(path) and not Path(path).is_file() and not Path(path).is_dir():
        raise BadWeights(f"{path}: no such file or folder; pass --weights a .pth, .safetensors, "
                         "folder or URL")


def locate(path: str) -> Path:
    """A file or folder on disk; a URL is downloaded once and kept in torch's hub cache."""
    check_there(path)
    if not is_url(path):
        return Path(path)
    # Other addresses may end with the same name, so each has a folder of its own.
    address = path.encode(errors="surrogateescape")
    folder = hashlib.sha256(address).hexdigest()[:16]
    name = path.split("?")[0].split("#")[0].rpartition("/")[2]
    name = re.sub(r"[^\w.-]", "_", name)[-80:].lstrip(".") or "weights"
    target = Path(torch.hub.get_dir()) / "checkpoints" / folder / name
    if not target.exists():
        replace(target, lambda temporary: download(path, Path(temporary), name))
    return target


def download(url: str, file: Path, name: str) -> None:
    """The body of a URL into `file`; a BadWeights unless it came whole and is a weight file."""
    try:
        request = Request(url, headers={"User-Agent": "nanoRS"})
        with urlopen(request, timeout=PATIENCE) as answer, open(file, "wb") as f:
            size = int(answer.headers.get("Content-Length") or 0)
            blocks = megabytes(answer)
            if size:
                blocks = progress(blocks, f"{name}, megabytes", 1 + size // MEGABYTE)
            for block in blocks:
                f.write(block)
                if max(size, f.tell()) > LARGEST:
                    raise ValueError(f"more than {LARGEST} bytes")
            if size and f.tell() != size:
                raise ValueError(f"cut off: {f.tell()} of {size} bytes came")
        checked_sha256(file, name)
        read(file)
    except (OSError, ValueError, HTTPException) as e:
        why = str(e).replace(f"{file}: ", "") or type(e).__name__
        raise BadWeights(f"{url}: download failed ({why}); nothing was kept; download it in a "
                         "browser and pass the file") from None


def megabytes(answer: HTTPResponse) -> Iterator[bytes]:
    """The body in blocks of a megabyte; a TimeoutError where one takes longer than PATIENCE."""
    while True:
        block = bytearray()
        began = time.monotonic()
        while part := answer.read1(MEGABYTE - len(block)):
            block += part
            if time.monotonic() - began > PATIENCE:
                raise TimeoutError(f"only {len(block)} bytes in {PATIENCE} s")
        if not block:
            return
        yield block


def shards_of(folder: Path) -> list[Path]:
    """The files of a Hugging Face folder: those of its index, or the usual one."""
    if (folder / ".metadata").exists():
        raise BadWeights(f"{folder}: a checkpoint of torch.distributed; make one file of it: "
                         "python -m torch.distributed.checkpoint.format_utils dcp_to_torch "
                         f"{folder} weights.pth")
    index = folder / "model.safetensors.index.json"
    if index.exists():
        table = json_object(index).get("weight_map")
        if not isinstance(table, dict) or not table:
            raise BadWeights(f"{index}: no weight_map with names of files; copy it again, or pass "
                             "a single weight file")
        names = sorted({str(name) for name in table.values()})
    else:
        usual = ("model.safetensors", "pytorch_model.bin", "best.safetensors")
        names = [name for name in usual if (folder / name).exists()][:1]
    if not names:
        raise BadWeights(f"{folder}: a folder without model.safetensors or its index; pass the "
                         "weight file itself")
    for name in names:
        # An index must not lead out of its folder.
        if Path(name).name != name or not (folder / name).is_file():
            raise BadWeights(f"{folder}: shard {name[:80]!r} is listed in the index but missing; "
                             "download that file into the folder")
    return [folder / name for name in names]


def json_object(file: Path) -> dict:
    """A JSON file beside the weights."""
    try:
        return read_json(file)
    except BadInput as e:
        raise BadWeights(f"{e}; copy it again") from None


# ---- reading

def read(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of one file, or of a Hugging Face folder with one file or an index of shards.

    Nested dicts become names with dots. Nothing is executed, and no number is looked at.
    """
    if path.is_dir():
        state = {}
        for shard in shards_of(path):
            state |= read(shard)
        return state
    try:
        check_file(path)
        tensors = read_file(path)
        check_claims(tensors, path.stat().st_size)
    except BadInput as e:
        raise BadWeights(str(e)) from None
    except BadWeights as e:
        raise BadWeights(f"{path}: {e}") from None
    return tensors


def read_file(path: Path) -> dict[str, torch.Tensor]:
    """Tensors of a .safetensors file or of one of torch.save, told by its first bytes."""
    with open(path, "rb") as f:
        head = f.read(200)
    safe = head[8:9] == b"{"  # 8 bytes of header length, then JSON
    zipped = head.startswith(b"PK\x03\x04")
    pickled = head.startswith(b"\x80")  # torch before 1.6
    if not head:
        raise BadWeights("0 bytes; copy or download it again")
    if head.startswith(b"version https://git-lfs"):
        raise BadWeights("a Git-LFS pointer, not the weights; run `git lfs pull` or download the "
                         "file itself")
    if not safe and head.lstrip(b"\xef\xbb\xbf \r\n\t").startswith(b"<"):
        raise BadWeights("a web page (HTML/XML), not weights: the download link was refused or has "
                         "expired; download it again")
    if not (safe or zipped or pickled):
        raise BadWeights("neither a .pth nor a .safetensors file, it begins with "
                         f"{head[:24]!r}; pass the weight file itself")

    if zipped:
        check_zip(path)
    if not safe:
        return flatten(read_torch(path, zipped))
    try:
        # safetensors compares what the header claims with the size of the file.
        with safe_open(path, "pt") as f:
            return {k: f.get_tensor(k) for k in f.keys()}
    except Exception as e:  # of several kinds, by what the header holds
        raise damaged(path, e, bool(re.search("header ?length|incomplete", str(e), re.I))) from None


def damaged(path: Path, e: Exception, ended: bool) -> BadWeights:
    """The error of a file that breaks off, or is otherwise no longer what was written."""
    what = "truncated" if ended else "damaged"
    why = short(e)
    return BadWeights(f"{what}, {path.stat().st_size} bytes ({why}); copy or download it again")


def short(e: Exception) -> str:
    """The first line of an error, or its kind where it says nothing."""
    lines = str(e).splitlines() or [type(e).__name__]
    return lines[0][:120]


def check_zip(path: Path) -> None:
    """Refuses what torch.save did not write, before torch reads it."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except Exception as e:  # of several kinds, by what is damaged
        raise damaged(path, e, ended="not a zip" in str(e)) from None
    names = [m.filename for m in members]
    is_program = any(name.endswith("/constants.pkl") for name in names)
    if is_program or not any(name.endswith("/data.pkl") for name in names):
        what = "a TorchScript program" if is_program else f"a zip file of {str(names[:3])[:80]}"
        raise BadWeights(f"{what}, not weights of torch.save; save its state_dict with torch.save, "
                         "or unpack it")
    # torch.save does not compress, and a megabyte of a bomb would become gigabytes.
    unpacked = sum(m.file_size for m in members)
    if any(m.compress_type for m in members) or unpacked > path.stat().st_size:
        raise BadWeights(f"compressed, {unpacked} bytes when unpacked; load it where you trust it "
                         "and save it anew with torch.save")


def read_torch(path: Path, zipped: bool) -> object:
    """What torch.save wrote, if it is tensors and plain Python values."""
    with open(path, "rb") as f, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of other versions of pickle
        try:
            # Mapped, what is not used, such as an optimizer's state, is never read from the disk.
            source = str(path) if zipped else f
            return torch.load(source, map_location="cpu", weights_only=True, mmap=zipped)
        except Exception as e:  # of any kind, by what the pickle holds
            error, said = e, str(e)
            ended = not zipped and ("EOF" in said or not f.read(1))
    plain = "magic number" in said or "Unsupported operand" in said
    objects = re.search(r"GLOBAL ([\w.]+)", said)
    if not plain and (ended or not objects):
        raise damaged(path, error, ended)
    found = "a plain pickle" if plain else f"Python objects ({objects[1][:60]}) beside tensors"
    raise BadWeights(f"{found}, never run here; where you trust them, save the plain state_dict "
                     "with torch.save, or as .safetensors")


def flatten(content: object) -> dict[str, torch.Tensor]:
    """The tensors in nested dicts and lists of any depth, under their keys joined with dots."""
    tensors = {}
    containers = (dict, list, tuple)
    todo = [("", content)] if isinstance(content, containers) else []  # grows on the way
    seen = set()
    for prefix, node in todo:
        # The same dict under two keys is read once.
        if id(node) in seen:
            continue
        seen.add(id(node))
        items = node.items() if isinstance(node, dict) else enumerate(node)
        for key, value in items:
            if not isinstance(value, (torch.Tensor, *containers)):
                continue
            name = f"{prefix}{key}"
            if len(name) > LONGEST or name in tensors:
                raise BadWeights(f"no plain state_dict, by its key {name[:80]!r}; save that alone")
            if isinstance(value, torch.Tensor):
                tensors[name] = value
            else:
                todo.append((f"{name}.", value))
    if not tensors:
        found = type(content).__name__
        if isinstance(content, dict):
            found = "keys " + ", ".join(str(k)[:40] for k in list(content)[:8])
        raise BadWeights(f"no tensors in it, only {found}; expected a state_dict")
    return tensors


def check_claims(tensors: dict, size: int) -> None:
    """Refuses tensors that are no plain numbers, and more of them than `size` bytes can hold."""
    claimed = 0
    for name, t in tensors.items():
        if not name.isprintable():
            raise BadWeights(f"a tensor is named {name[:80]!r}; save the plain state_dict")
        plain = type(t) in (torch.Tensor, torch.nn.Parameter) and t.layout == torch.strided
        if not plain or t.is_quantized or t.is_nested or t.device.type != "cpu":
            raise BadWeights(f"{name} is quantised, sparse or without values; save plain tensors")
        claimed += t.numel() * t.element_size()
    # A network that is wrapped several times shares its numbers.
    if claimed > 8 * size + 10**6:
        raise BadWeights(f"tensors of {claimed} bytes in a file of {size}; save the plain "
                         "state_dict anew")


def run_meta(file: Path) -> dict | None:
    """What a run of this project wrote into the header of its best.safetensors; None in others."""
    meta = None
    try:
        with safe_open(file, "pt") as f:
            text = (f.metadata() or {}).get("nanors")
        if text is not None:
            meta = dict(parse_json(text))
    except Exception as e:  # of several kinds, by what the header holds
        raise BadWeights(f"{file}: its header is not readable ({short(e)}); expected the "
                         "best.safetensors of a run") from None
    return meta


def sha256(path: Path) -> str:
    """Hex sha256 of a file, or of a folder's .safetensors/.bin files in name order."""
    files = [path]
    if not path.is_file():
        found = [p for p in path.iterdir() if p.is_file()]
        files = sorted(p for p in found if p.suffix in (".safetensors", ".bin"))
    stamps = [(file, os.stat(file)) for file in files]
    return sha256_of(tuple((file, stat.st_size, stat.st_mtime_ns) for file, stat in stamps))


@functools.lru_cache
def sha256_of(stamps: tuple) -> str:
    """Of files (path, size, time) that are asked for several times and take seconds to read."""
    return file_sha256(*(file for file, *_ in stamps))


def checked_sha256(file: Path, name: str) -> tuple[str, bool]:
    """Hex sha256, and whether the file's name confirms it; a name that contradicts is refused."""
    digest = sha256(file)
    suffix = SHA_IN_NAME.search(name)
    if suffix and not digest.startswith(suffix[1]):
        raise BadWeights(f"{file}: sha256 starts with {digest[:8]}, its name says {suffix[1]}: "
                         "truncated or altered; download it again")
    return digest, bool(suffix)


def open_weights(path: str) -> tuple[Path, dict, str, str]:
    """Path, folder or URL -> the file, its tensors, its sha256, the same as words."""
    file = locate(path)
    digest, named = checked_sha256(file, file.name)
    words = f"sha256 {digest[:8]}"
    if named:
        words += " as in the name"
    return file, read(file), digest, words


# ---- one network out of a file

def select(raw: dict, parts: set[str], *patterns: str) -> tuple[dict, str]:
    """All tensors of a file -> those of one network, without its prefix; words that say which.

    patterns: how a name ends that such a network has once; the first one found decides. parts: the
    first words of its names. Where no name ends so, all tensors come back.
    """
    for pattern in patterns:
        # A wrapper may stand between the words, too.
        ending = pattern.replace(r"\.", rf"\.(?:{WRAPPER})*")
        matches = [re.fullmatch(rf"(.*\.|)(?:{ending})", name) for name in raw]
        prefixes = sorted(dict.fromkeys(m[1] for m in matches if m), key=preference)
        if prefixes:
            break
    else:
        return raw, ""
    prefix = prefixes[0]
    names = names_under(prefix, raw, parts)
    # A network that is wrapped twice lies in the file twice. Others are for the user to choose.
    for other in prefixes[1:]:
        if preference(other) > preference(prefix):
            break
        copy = names_under(other, raw, parts)
        if copy.keys() != names.keys() or not all(same(raw[copy[k]], raw[names[k]]) for k in names):
            raise BadWeights(f"several networks: {prefix}, {other}; expected one, or a teacher or "
                             "ema among them; save the one you mean alone with torch.save")

    # All the rest is left out, and said.
    taken = set(names.values())
    rest = {}
    for name in raw:
        if name not in taken:
            rest[place(name, prefix)] = None
    words = ""
    if prefix:
        words += f", taken: {prefix.rstrip('.')}"
    if rest:
        words += f", left out: {first_few(list(rest), 4)}"
    return {k: raw[name] for k, name in names.items()}, words


def preference(prefix: str) -> tuple[int, int]:
    """Sort key of a network's prefix: teacher, averaged weights, others, student.

    A teacher goes before a gram_teacher: the fewer words the better.
    """
    words = re.findall("[A-Z]?[a-z]+|[A-Z]+(?![a-z])", prefix)
    known = {word.lower() for word in words}
    if "teacher" in known:
        return 0, len(words)
    if known & AVERAGED:
        return 1, len(words)
    return (3 if known & LAST else 2), 0


def names_under(prefix: str, raw: dict, parts: set[str]) -> dict[str, str]:
    """Names of a network below its prefix, {name in the network: name in the file}.

    Modules that no such network has, such as a head, are not among them.
    """
    names = {}
    for name in raw:
        if not name.startswith(prefix):
            continue
        inner = name.removeprefix(prefix)
        for pattern in EXTRA:
            inner = re.sub(pattern, "", inner)
        if "." in inner and inner.split(".")[0] not in parts:
            continue
        if inner in names:
            raise BadWeights(f"{names[inner]} and {name} are both {inner} of the network; save its "
                             "plain state_dict")
        names[inner] = name
    return names


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal type, shape and numbers, NaN included."""
    return a.dtype == b.dtype and a.nan_to_num().equal(b.nan_to_num())


def place(name: str, prefix: str) -> str:
    """Where a tensor stands: its name as far as it goes with the prefix, and one word more."""
    words = name.split(".")
    shared = os.path.commonprefix([words, prefix.split(".")])
    return ".".join(words[: len(shared) + 1])[:80]


# ---- recognising and renaming

def layout_of(sd: dict, raw: dict) -> tuple[str, str, dict]:
    """State dict -> layout name, family and renaming table; refuses what is not a DINO ViT.

    raw: all that is in the file.
    """
    def has(pattern):
        return next((k for k in sd if re.search(pattern, k)), None)

    # All have a patch embedding and LayerScale.
    if not has(f"^({VIT})$") or not has(r"(layer_scale1\.lambda1|\d\.gamma_1|ls1\.gamma)$"):
        names = "\n".join(raw)
        kinds = [kind for pattern, kind in OTHERS if re.search(pattern, names, re.M)]
        kind = kinds[0] if kinds else "no network known here"
        first = ", ".join(list(raw)[:3])[:200]
        raise BadWeights(f"{kind} (first tensors: {first}); expected a DINOv2 or DINOv3 ViT "
                         "backbone")
    if has(r"\.layer_scale1\.lambda1$"):
        layout, family, table = "hf", "dinov2", HF_DINOV2
        if has(r"^layer\.\d"):
            family = "dinov3"
            table = HF_DINOV3_SWIGLU if has(r"\.gate_proj\.") else HF_DINOV3
    elif has(r"^blocks\.\d+\.gamma_1$"):
        layout, family = "timm", "dinov3"
        table = TIMM_SWIGLU if has(r"\.fc1_g\.") else TIMM
    else:
        marks = has(r"^rope_embed\.|^storage_tokens$|\.bias_mask$")
        family = "dinov3" if "pos_embed" not in sd and marks else "dinov2"
        # timm keeps SwiGLU's two halves in fc1, which is then twice as high as fc2 is wide.
        fc1, fc2 = has(r"mlp\.fc1\.weight$"), has(r"mlp\.fc2\.weight$")
        if fc1 and fc2 and sd[fc1].shape[:1].numel() == 2 * sd[fc2].shape[-1:].numel():
            layout, table = "timm", TIMM_PACKED
        elif "reg_token" in sd:
            layout, table = "timm", TIMM
        elif family == "dinov3" or "mask_token" in sd:
            layout, table = "meta", META
        else:
            layout, table = "meta/timm", META  # timm names plain DINOv2 as Meta does
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
        if t.dim() == 0:
            raise BadWeights(f"{key} is a single number, expected a tensor of a ViT")
        if number:
            new = new.replace("*", number[1])
        if new in out:
            raise BadWeights(f"{origin[new]} and {key} are the same tensor; expected one of them")
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
        if len({(out[p].shape, out[p].dtype) for p in parts}) > 1:
            shapes = [f"{origin.get(p, p)} is {tuple(out[p].shape)}, {out[p].dtype}" for p in parts]
            raise BadWeights(f"{'; '.join(shapes)}; expected equal shapes and types")
        out[f"{stem}qkv{kind}"] = torch.cat([out.pop(p) for p in parts])


def config_of(sd: dict, layout: str, family: str) -> dict:
    """Constructor arguments of models/vit.py's ViT from tensors under our names."""
    def shape(name, dims):
        if name not in sd:
            raise BadWeights(f"tensor {name} is missing; expected a whole DINOv2 or DINOv3 ViT")
        found = tuple(sd[name].shape)
        if len(found) != dims or 0 in found:
            raise BadWeights(f"{name} is {found}, expected {dims} dimensions")
        return found

    dim, _, patch, _ = shape("patch_embed.proj.weight", 4)
    numbers = {int(m[1]) for m in [re.match(r"blocks\.(\d{1,4})\.", k) for k in sd] if m}
    depth = len(numbers)
    absent = set(range(depth)) - numbers
    if absent:
        raise BadWeights(f"block {min(absent)} is missing, but there is a block {max(numbers)}; "
                         "expected a whole ViT")
    ffn = "swiglu" if any(".mlp.w3." in k for k in sd) else "mlp"
    last = "w3" if ffn == "swiglu" else "fc2"
    _, hidden = shape(f"blocks.0.mlp.{last}.weight", 2)

    # What the file does not tell is what was published.
    heads = max(1, ATTENTION_HEADS.get(dim, dim // 64))
    if "rope_embed.periods" in sd:
        heads = dim // (4 * shape("rope_embed.periods", 1)[0])
    # RoPE turns sine and cosine of two axes.
    unit = 4 if family == "dinov3" else 1
    if heads == 0 or dim % (heads * unit):
        raise BadWeights(f"{heads} heads in a width of {dim}; expected a DINOv2 or DINOv3 ViT")
    registers = 4 if family == "dinov3" else 0
    if "storage_tokens" in sd:
        registers = shape("storage_tokens", 3)[1]
    grid = 0
    if "pos_embed" in sd:
        grid = round((shape("pos_embed", 3)[1] - 1) ** 0.5)
    # Nothing is built that is much larger than the file.
    numbers_in_file = sum(t.numel() for t in sd.values())
    if depth * dim * (4 * dim + 2 * hidden) > 2 * numbers_in_file:
        raise BadWeights(f"{depth} blocks, {dim} wide, need more than the {numbers_in_file} "
                         "numbers in it; of another network, or altered")
    # timm's plain DINOv3 models leave an all-zero bias out. The 7B has none.
    qkv_bias = any(k.endswith(".attn.qkv.bias") for k in sd)
    if layout == "timm" and dim != 4096:
        qkv_bias = True
    return dict(family=family, patch=patch, dim=dim, depth=depth, heads=heads, hidden=hidden,
                ffn=ffn, registers=registers, grid=grid, qkv_bias=qkv_bias)


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
    file, raw, digest, hashed = open_weights(path)
    run = run_meta(file) if file.suffix == ".safetensors" and file.is_file() else None
    if run and run.get("saved") == "head":
        raise BadWeights(f"{file}: of a run with --save head, without its backbone; type --weights with "
                         f"the file of that, {str(run.get('weights', {}).get('path'))[:200]}")
    try:
        sd, taken = select(raw, VIT_PARTS, VIT)
        layout, family, table = layout_of(sd, raw)
        state, origin, dropped = rename(sd, table, family)
        cfg = config_of(state, layout, family)
    except BadWeights as e:
        raise BadWeights(f"{file}: {e}") from None
    complete(state, layout, cfg)

    # What was loaded and what was left out, for the user.
    line = f"layout={layout}, {len(sd)} of {len(raw)} tensors"
    if dropped:
        line += f" (not needed: {', '.join(sorted(dropped))})"
    line += f"{taken}, {hashed}"
    norm = norm_of(file, cfg, sd, digest)
    return cfg, state, dict(path=str(file), line=line, sha256=digest, origin=origin, norm=norm,
                            taken=taken)


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
        run = run_meta(file)
        if run and "norm" in run:
            return run["norm"]
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
        means = json_object(preprocessor).get("image_mean", [0.485])
        try:
            red = float(means[0])
        except (TypeError, ValueError, LookupError):
            raise BadWeights(f"{preprocessor}: image_mean is {str(means)[:40]}, expected three "
                             "numbers; copy it again") from None
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
    common = [k for k in want if k in state]
    wrong = [k for k in common if state[k].shape != want[k].shape]
    other_type = [k for k in common if not same_kind(state[k].dtype, want[k].dtype)]

    faults = []
    if missing:
        faults.append(f"tensor {missing[0]} is missing ({len(missing)} in all)")
    if unknown:
        faults.append(f"unknown tensor {unknown[0]} ({len(unknown)} in all)")
    if wrong:
        k = wrong[0]
        found, expected = tuple(state[k].shape), tuple(want[k].shape)
        faults.append(f"{origin.get(k, k)} is {found}, expected {expected}")
    if other_type:
        k = other_type[0]
        faults.append(f"{origin.get(k, k)} is {state[k].dtype}, expected {want[k].dtype}")
    if faults:
        raise BadWeights(f"{info['path']}: {'; '.join(faults)}{info.get('taken', '')}: of another "
                         "network, or altered; name the right file")
    for k, t in state.items():
        # What the net has already does not come from the file.
        from_file = t.data_ptr() != want[k].data_ptr()
        if from_file and not t.is_meta and not t.to(want[k].dtype).isfinite().all():
            raise BadWeights(f"{info['path']}: {origin.get(k, k)} holds NaN or infinity; take an "
                             "earlier file")
    net.load_state_dict(state)


def same_kind(found: torch.dtype, want: torch.dtype) -> bool:
    """Floats fit floats, whole numbers fit whole numbers; bool, complex and others fit nothing."""
    if want.is_floating_point:
        return found in FLOATS
    return not found.is_floating_point and not found.is_complex and found != torch.bool


def load_cnn(net: torch.nn.Module, path: str, convert: Callable, last: tuple[str, ...],
             whole: str, trunk: str, parts: set[str]) -> dict:
    """Fill a network that is no ViT, strictly, from a file or URL.

    -> info (line, sha256, norm, path). convert(tensors) -> layout, tensors under the net's names,
    kinds not needed, prefixes that such a file leaves out. last: prefixes of the layers that give
    logits; where only the number of classes differs, they stay random. whole, trunk, parts: for
    select(), how a name ends in a whole network or in its trunk, first words of names in both.
    """
    # These steps do not know the file, so its name is added here.
    file, raw, digest, hashed = open_weights(path)
    try:
        sd, taken = select(raw, parts, whole, trunk)
        layout, state, dropped, new = convert(sd)
    except BadWeights as e:
        raise BadWeights(f"{file}: {e}") from None

    own = net.state_dict()
    other = set()  # last layers with another number of classes
    for k in own:
        if k.startswith(last) and k in state:
            found, expected = state[k].shape, own[k].shape
            if len(found) == len(expected) and found[1:] == expected[1:] and found != expected:
                other.add(k)
    fresh = {}  # what stays random
    for k, t in own.items():
        left_out = k not in state and k.startswith(new)
        if k in other or left_out:
            fresh[k] = t
    loaded = {k: t for k, t in state.items() if k not in other}
    fill(net, loaded | fresh, dict(path=file, taken=taken))

    # What was loaded and what was not, for the user.
    line = f"layout={layout}, {len(sd) - len(other)} of {len(raw)} tensors"
    if dropped:
        line += f" (not needed: {', '.join(sorted(dropped))})"
    line += f"{taken}, {hashed}"
    parts = [prefix.rstrip(".") for prefix in new if any(k.startswith(prefix) for k in fresh)]
    if parts:
        line += f"; random: {', '.join(parts)}"
    if other:
        k = min(other)
        line += (f"; random: last convolution, {len(state[k])} classes in the file "
                 f"and {len(own[k])} here")
    return dict(path=str(file), line=line, sha256=digest, norm="imagenet")
