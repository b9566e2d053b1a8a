"""DINOv2 and DINOv3 vision transformers: one class, Meta's parameter names, maps of any block.

    vit = ViT(**PRESETS["dinov3_vitb16"])
    (middle, last), cls = vit(x, blocks=[5, 11])

x (B, 3, H, W) is normalised and of any size; a map is (B, C, h, w), the cls token (B, C).
Weights: models/weights.py. Nothing here is random in train(): no RoPE jitter, no dropout, so
train() equals eval().

On a CPU without AMX torch.set_float32_matmul_precision("medium"), which models/run.py's start()
calls, keeps fp32 and doubles the speed of its products. Sources: facebookresearch/dinov2
and dinov3 (hubconf presets, vision_transformer.py, rope_position_encoding.py).
"""
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Has this CPU tiles for bf16 matrix products? Private API: False where this torch does not have it.
AMX = getattr(torch.cpu, "_is_amx_tile_supported", bool)()

# B batch, C width, nh heads, hd = C // nh, H W pixels, h w patches.
# N tokens: 1 cls + R registers + h*w patches, in this order.


def preset(family: str, patch: int, dim: int, depth: int, heads: int, hidden: int = 0,
           ffn: str = "mlp", registers: int = 4, grid: int = 0, qkv_bias: bool = True) -> dict:
    """Arguments of ViT; hidden 0 stands for four times the width."""
    if hidden == 0:
        hidden = 4 * dim
    return dict(family=family, patch=patch, dim=dim, depth=depth, heads=heads, hidden=hidden,
                ffn=ffn, registers=registers, grid=grid, qkv_bias=qkv_bias)


PRESETS = {
    # The first three are ours, for training from scratch: 0.8, 2.7 and 0.9 M parameters.
    # family, patch, width, depth, heads, and where they are not the usual ones hidden and ffn
    "nano8": preset("dinov3", 8, 128, 4, 2),
    "mini8": preset("dinov3", 8, 192, 6, 3),
    "nano16": preset("dinov3", 16, 128, 4, 2),
    "dinov3_vits16": preset("dinov3", 16, 384, 12, 6),
    "dinov3_vits16plus": preset("dinov3", 16, 384, 12, 6, 1536, "swiglu"),
    "dinov3_vitb16": preset("dinov3", 16, 768, 12, 12),
    "dinov3_vitl16": preset("dinov3", 16, 1024, 24, 16),
    "dinov3_vith16plus": preset("dinov3", 16, 1280, 32, 20, 5120, "swiglu"),
    "dinov3_vit7b16": preset("dinov3", 16, 4096, 40, 32, 8192, "swiglu", qkv_bias=False),
}
# Every size of DINOv2 was published without and with registers, trained on 37 x 37 patches.
DINOV2_SIZES = {
    "s": (384, 12, 6),
    "b": (768, 12, 12),
    "l": (1024, 24, 16),
    "g": (1536, 40, 24, 4096, "swiglu"),
}
for letter, size in DINOV2_SIZES.items():
    name = f"dinov2_vit{letter}14"
    PRESETS[name] = preset("dinov2", 14, *size, registers=0, grid=37)
    PRESETS[f"{name}_reg"] = preset("dinov2", 14, *size, registers=4, grid=37)


def arch_name(cfg: dict) -> str:
    """The preset's name, or the sizes of a net that is no preset."""
    for name, known in PRESETS.items():
        if known == cfg:
            return name
    sizes = "dim {dim}, depth {depth}, heads {heads}, patch {patch}".format(**cfg)
    return f"{cfg['family']} ViT {sizes}"


def spread_taps(depth: int) -> list[int]:
    """Four evenly spaced blocks, the last one included; fewer in a net of less than four blocks."""
    # Meta's DINOv3 heads read these four.
    if depth == 24:
        return [4, 11, 17, 23]
    quarters = [(i + 1) * depth // 4 - 1 for i in range(4)]
    return sorted({max(0, block) for block in quarters})


class Rope(nn.Module):
    """h, w -> sin and cos, each (h*w, hd) fp32, for the centres of the patches.

    Each axis is scaled to -1..1 and turned over periods from 1 to 100.
    """

    def __init__(self, head_dim: int):
        super().__init__()
        # Two axes, each with sin and cos. The periods stand in the state dict because Meta's
        # files have them, some rounded to bf16.
        n = head_dim // 4
        periods = 100.0 ** (torch.arange(n, dtype=torch.float32) / n)
        self.register_buffer("periods", periods)

    def _apply(self, fn, recurse=True):
        # net.bfloat16() would round the periods, which changes the output by 2e-3.
        periods = self.periods
        super()._apply(fn, recurse)
        if self.periods.dtype != periods.dtype:
            self.periods = periods.to(self.periods.device)
        return self

    def forward(self, h: int, w: int) -> tuple[Tensor, Tensor]:
        device = self.periods.device
        with torch.autocast(device.type, enabled=False):
            y = (torch.arange(h, device=device) + 0.5) / h * 2 - 1
            x = (torch.arange(w, device=device) + 0.5) / w * 2 - 1
            grid = torch.meshgrid(y, x, indexing="ij")
            centres = torch.stack(grid, -1).flatten(0, 1)  # (h*w, 2), row by row
            angle = 2 * math.pi * centres[:, :, None] / self.periods  # (h*w, 2, hd / 4)
            angle = angle.flatten(1).tile(2)  # (h*w, hd)
            return angle.sin(), angle.cos()


def rotate(x: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
    """Turn the last h*w of the tokens (..., N, hd) by their places, in fp32."""
    # The cls token and the registers come first. They have no place in the image, and an angle of
    # zero leaves them as they are.
    prefix = x.shape[-2] - sin.shape[0]
    sin = F.pad(sin, (0, 0, prefix, 0))
    cos = F.pad(cos, (0, 0, prefix, 0), value=1.0)
    moving = x.to(torch.promote_types(x.dtype, torch.float32))
    # Channel i turns together with channel i + hd / 2.
    a, b = moving.chunk(2, dim=-1)
    turned = torch.addcmul(moving * cos, torch.cat([-b, a], -1), sin)
    return turned.to(x.dtype)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(hd)) v, everything (B, nh, N, hd)."""
    cpu = q.device.type == "cpu"
    scale = q.shape[-1] ** -0.5

    # A short sequence on a CPU: written out it is faster, because the scores stay in cache.
    if cpu and q.dtype == torch.float32 and q.shape[2] < 400:
        scores = q * scale @ k.transpose(-2, -1)
        return scores.softmax(-1) @ v

    # Without AMX a CPU's sdpa runs bf16 no faster than fp32. One head at a time the (N, N) scores
    # stay in cache (tests/bench_vit.py). Not in training, where all of them would be kept.
    if cpu and q.dtype == torch.bfloat16 and not q.requires_grad and not AMX:
        heads = zip((q * scale).flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1))
        mixed = [(qi @ ki.T).softmax(-1) @ vi for qi, ki, vi in heads]
        return torch.stack(mixed).view_as(q)

    return F.scaled_dot_product_attention(q, k, v)  # divides by sqrt(hd) itself


class NoKeyBias(nn.Linear):
    """Projection to q, k and v in which the bias of k counts as zero, as under DINOv3's bias_mask.

    The mask itself is not stored.
    """

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.bias.chunk(3)
        return F.linear(x, self.weight, torch.cat([q, torch.zeros_like(k), v]))


class Attention(nn.Module):
    """Self-attention, (B, N, C) -> the same; rope: sin and cos of Rope, or None."""

    def __init__(self, dim: int, heads: int, qkv: nn.Linear):
        super().__init__()
        self.heads = heads
        self.qkv = qkv
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor] | None = None) -> Tensor:
        B, N, C = x.shape
        qkv = self.qkv(x).view(B, N, 3, self.heads, C // self.heads)  # (B, N, 3, nh, hd)
        qkv = qkv.permute(2, 0, 3, 1, 4)  # (3, B, nh, N, hd)
        qk, v = qkv[:2], qkv[2]
        if rope is not None:
            qk = rotate(qk, *rope)  # both in one pass
        q, k = qk
        x = attend(q, k, v).transpose(1, 2).reshape(B, N, C)
        return self.proj(x)


class Mlp(nn.Module):
    """(B, N, C) -> the same."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        # The exact GELU: its tanh form is 9e-4 off.
        return self.fc2(F.gelu(self.fc1(x)))


class SwiGLU(nn.Module):
    """(B, N, C) -> the same (Shazeer 2020)."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.w1 = nn.Linear(dim, hidden)
        self.w2 = nn.Linear(dim, hidden)
        self.w3 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.w3(F.silu(self.w1(x)) * self.w2(x))


class LayerScale(nn.Module):
    """(B, N, C) times one factor per channel."""

    def __init__(self, dim: int):
        super().__init__()
        # Meta starts at 1e-5. Small nets that train from scratch need too long to leave it.
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Block(nn.Module):
    """A transformer block, (B, N, C) -> the same; under autocast the residual x stays fp32."""

    def __init__(self, dim: int, heads: int, hidden: int, ffn: str, qkv: nn.Linear, eps: float):
        super().__init__()
        mlp = SwiGLU if ffn == "swiglu" else Mlp
        self.norm1 = nn.LayerNorm(dim, eps)
        self.attn = Attention(dim, heads, qkv)
        self.ls1 = LayerScale(dim)
        self.norm2 = nn.LayerNorm(dim, eps)
        self.mlp = mlp(dim, hidden)
        self.ls2 = LayerScale(dim)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor] | None = None) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x), rope))
        return x + self.ls2(self.mlp(self.norm2(x)))


class ViT(nn.Module):
    """DINOv2 or DINOv3 backbone; the arguments come from PRESETS or are free.

    family: dinov2 has learned positions on a grid x grid table, dinov3 has RoPE.
    """

    def __init__(self, family: str, patch: int, dim: int, depth: int, heads: int, hidden: int,
                 ffn: str, registers: int, grid: int, qkv_bias: bool):
        super().__init__()
        self.family = family
        self.patch = patch
        self.dim = dim
        self.depth = depth
        self.grid = grid
        self.prefix = 1 + registers  # tokens before those of the patches

        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.storage_tokens = None
        if registers:
            self.storage_tokens = nn.Parameter(torch.zeros(1, registers, dim))
        # The two families differ in their positions, the norms' epsilon and the bias of k.
        if family == "dinov3":
            eps = 1e-5
            linear = NoKeyBias if qkv_bias else nn.Linear
            self.pos_embed = None
            self.rope_embed = Rope(dim // heads)
        else:
            eps = 1e-6
            linear = nn.Linear
            self.pos_embed = nn.Parameter(torch.zeros(1, 1 + grid * grid, dim))
            self.rope_embed = None
        # Meta's names: the convolution is patch_embed.proj, the registers are storage_tokens.
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, dim, patch, patch)})
        self.blocks = nn.ModuleList()
        for _ in range(depth):
            qkv = linear(dim, 3 * dim, bias=qkv_bias)
            self.blocks.append(Block(dim, heads, hidden, ffn, qkv, eps))
        self.norm = nn.LayerNorm(dim, eps)
        self.init_weights()

    def init_weights(self) -> None:
        """Meta's initial values: weights and tokens with a deviation of 0.02, biases 0."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for token in (self.cls_token, self.storage_tokens, self.pos_embed):
            if token is not None:
                nn.init.normal_(token, std=0.02)

    def positions(self, h: int, w: int) -> Tensor:
        """Learned positions of the cls token and of h x w patches, (1, 1 + h*w, C).

        Meta's bicubic rules; Hugging Face and timm have others.
        """
        if h == w == self.grid:
            return self.pos_embed
        cls, table = self.pos_embed[:, :1], self.pos_embed[:, 1:]
        table = table.float().view(1, self.grid, self.grid, self.dim)
        table = table.permute(0, 3, 1, 2)  # (1, C, grid, grid)
        if self.storage_tokens is None:
            # The models without registers were released with an offset of 0.1 in the scale.
            scale = (h + 0.1) / self.grid, (w + 0.1) / self.grid
            table = F.interpolate(table, scale_factor=scale, mode="bicubic")
        else:
            table = F.interpolate(table, size=(h, w), mode="bicubic", antialias=True)
        table = table.flatten(2).transpose(1, 2)  # (1, h*w, C)
        return torch.cat([cls, table.to(cls.dtype)], dim=1)

    def forward(self, x: Tensor, blocks: list[int] | None = None,
                norm: bool = True) -> tuple[list[Tensor], Tensor]:
        """x (B, 3, H, W) -> maps of `blocks`, each (B, C, h, w), and the last one's cls (B, C).

        blocks: in rising order, by default the last one alone. norm: the final norm on every map.
        H and W are padded with zeros at the right and bottom, so h is H / patch rounded up.
        """
        if not blocks:
            blocks = [self.depth - 1]
        if blocks != sorted(set(blocks)) or blocks[0] < 0 or blocks[-1] >= self.depth:
            raise ValueError(f"blocks {blocks}; expected rising numbers of 0..{self.depth - 1}")
        # Only whole patches become tokens.
        H, W = x.shape[-2:]
        x = F.pad(x, (0, -W % self.patch, 0, -H % self.patch))
        x = self.patch_embed["proj"](x)  # (B, C, h, w)
        B, C, h, w = x.shape

        # The registers go in after the positions, because they have none.
        cls = self.cls_token.expand(B, -1, -1)
        x = torch.cat([cls, x.flatten(2).transpose(1, 2)], dim=1)  # (B, 1 + h*w, C)
        if self.pos_embed is not None:
            x = x + self.positions(h, w)
        if self.storage_tokens is not None:
            registers = self.storage_tokens.expand(B, -1, -1)
            x = torch.cat([x[:, :1], registers, x[:, 1:]], dim=1)  # (B, N, C)
        rope = None if self.rope_embed is None else self.rope_embed(h, w)

        # Blocks behind the last one asked for are not run.
        maps = []
        for i, block in enumerate(self.blocks[: blocks[-1] + 1]):
            x = block(x, rope)
            if i in blocks:
                tokens = self.norm(x) if norm else x
                patches = tokens[:, self.prefix:].transpose(1, 2)
                maps.append(patches.reshape(B, C, h, w))
        return maps, tokens[:, 0]
