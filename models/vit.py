"""DINOv2 and DINOv3 vision transformers: one class, Meta's parameter names, feature maps of any block at any H and W.

    vit = ViT(**PRESETS["dinov3_vitb16"])
    (a, b), cls = vit(x, blocks=[5, 11])     x (B, 3, H, W) normalised -> two (B, C, h, w) maps and the cls token (B, C)

Weights: models/weights.py. Nothing here is random in train(): no RoPE jitter, no dropout, so train() equals eval().
Sources: facebookresearch/dinov2 and dinov3 (hubconf presets, vision_transformer.py, rope_position_encoding.py).
"""
# B batch, N = 1 cls + R registers + h*w patches, C width, nh heads, hd = C // nh
import math

import torch
import torch.nn.functional as F
from torch import nn


def preset(family: str, patch: int, dim: int, depth: int, heads: int, hidden: int = 0, ffn: str = "mlp",
           registers: int = 4, grid: int = 0, qkv_bias: bool = True) -> dict:
    return dict(family=family, patch=patch, dim=dim, depth=depth, heads=heads, hidden=hidden or 4 * dim, ffn=ffn,
                registers=registers, grid=grid, qkv_bias=qkv_bias)


PRESETS = {
    "nano8": preset("dinov3", 8, 128, 4, 2),  # 0.8 M parameters; these three are ours, for training from scratch
    "mini8": preset("dinov3", 8, 192, 6, 3),  # 2.7 M
    "nano16": preset("dinov3", 16, 128, 4, 2),
    "dinov3_vits16": preset("dinov3", 16, 384, 12, 6),
    "dinov3_vits16plus": preset("dinov3", 16, 384, 12, 6, 1536, "swiglu"),
    "dinov3_vitb16": preset("dinov3", 16, 768, 12, 12),
    "dinov3_vitl16": preset("dinov3", 16, 1024, 24, 16),
    "dinov3_vith16plus": preset("dinov3", 16, 1280, 32, 20, 5120, "swiglu"),
    "dinov3_vit7b16": preset("dinov3", 16, 4096, 40, 32, 8192, "swiglu", qkv_bias=False),
}
for size, dim, depth, heads, hidden, ffn in (("s", 384, 12, 6, 0, "mlp"), ("b", 768, 12, 12, 0, "mlp"),
                                             ("l", 1024, 24, 16, 0, "mlp"), ("g", 1536, 40, 24, 4096, "swiglu")):
    PRESETS[f"dinov2_vit{size}14"] = preset("dinov2", 14, dim, depth, heads, hidden, ffn, registers=0, grid=37)
    PRESETS[f"dinov2_vit{size}14_reg"] = preset("dinov2", 14, dim, depth, heads, hidden, ffn, registers=4, grid=37)


def arch_name(cfg: dict) -> str:
    """The preset's name, or the sizes of a net that is no preset."""
    names = [name for name, known in PRESETS.items() if known == cfg]
    return names[0] if names else "{family} ViT dim {dim}, depth {depth}, heads {heads}, patch {patch}".format(**cfg)


def spread_taps(depth: int) -> list[int]:
    """Four evenly spaced blocks, the last one included; 24 deep: 4, 11, 17, 23 as in Meta's DINOv3 heads."""
    return [4, 11, 17, 23] if depth == 24 else sorted({max(0, (i + 1) * depth // 4 - 1) for i in range(4)})


class Rope(nn.Module):
    """h, w -> sin and cos, each (h*w, hd) fp32: patch centres, each axis scaled to -1..1, over periods 1..100."""

    def __init__(self, head_dim: int):
        super().__init__()
        n = head_dim // 4  # periods per axis; Meta's files store them, some rounded to bf16, and so does the state dict
        self.register_buffer("periods", 100.0 ** (torch.arange(n, dtype=torch.float32) / n))

    def _apply(self, fn, recurse=True):  # net.bfloat16() would round the periods: 2e-3 in the output
        periods = self.periods
        super()._apply(fn, recurse)
        if self.periods.dtype != periods.dtype:
            self.periods = periods.to(self.periods.device)
        return self

    def forward(self, h: int, w: int):
        with torch.autocast(self.periods.device.type, enabled=False):
            y, x = ((torch.arange(n, device=self.periods.device) + 0.5) / n * 2 - 1 for n in (h, w))
            centres = torch.stack(torch.meshgrid(y, x, indexing="ij"), -1).flatten(0, 1)  # (h*w, 2), row by row
            angle = (2 * math.pi * centres[:, :, None] / self.periods).flatten(1).tile(2)  # (h*w, hd)
            return angle.sin(), angle.cos()


def rotate(x, sin, cos):  # (B, nh, N, hd): turns the last h*w tokens; cls and registers have no place in the image
    still, moving = x.split([x.shape[2] - sin.shape[0], sin.shape[0]], dim=2)
    moving = moving.to(torch.promote_types(x.dtype, torch.float32))
    a, b = moving.chunk(2, dim=-1)
    return torch.cat([still, (moving * cos + torch.cat([-b, a], -1) * sin).to(x.dtype)], dim=2)


def attend(q, k, v):  # 3 x (B, nh, N, hd) -> the same
    if q.device.type == "cpu" and q.dtype == torch.float32 and q.shape[2] < 400:
        return (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(-1) @ v  # short: the scores stay in cache
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and not q.requires_grad:
        # sdpa runs bf16 no faster than fp32 on a CPU; head by head the (N, N) scores stay in cache (bench_vit.py)
        heads = zip(*(t.flatten(0, 1) for t in (q * q.shape[-1] ** -0.5, k, v)))
        return torch.stack([(qi @ ki.T).softmax(-1) @ vi for qi, ki, vi in heads]).view_as(q)
    return F.scaled_dot_product_attention(q, k, v)  # divides by sqrt(hd) itself


class NoKeyBias(nn.Linear):
    """qkv projection whose key third of the bias counts as zero (DINOv3's bias_mask, which is not stored here)."""

    def forward(self, x):
        q, k, v = self.bias.chunk(3)
        return F.linear(x, self.weight, torch.cat([q, torch.zeros_like(k), v]))


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int, qkv: nn.Linear):
        super().__init__()
        self.heads, self.qkv, self.proj = heads, qkv, nn.Linear(dim, dim)

    def forward(self, x, rope=None):  # (B, N, C) -> (B, N, C)
        B, N, C = x.shape
        q, k, v = self.qkv(x).view(B, N, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)  # 3 x (B, nh, N, hd)
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        return self.proj(attend(q, k, v).transpose(1, 2).reshape(B, N, C))


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))  # exact GELU: the tanh form is 9e-4 off


class SwiGLU(nn.Module):
    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.w1, self.w2, self.w3 = nn.Linear(dim, hidden), nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x):
        return self.w3(F.silu(self.w1(x)) * self.w2(x))


class LayerScale(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))  # Meta starts at 1e-5, which small nets need too long to leave

    def forward(self, x):
        return x * self.gamma


class Block(nn.Module):
    def __init__(self, dim: int, heads: int, hidden: int, ffn: str, qkv: nn.Linear, eps: float):
        super().__init__()
        self.norm1, self.attn, self.ls1 = nn.LayerNorm(dim, eps), Attention(dim, heads, qkv), LayerScale(dim)
        mlp = SwiGLU if ffn == "swiglu" else Mlp
        self.norm2, self.mlp, self.ls2 = nn.LayerNorm(dim, eps), mlp(dim, hidden), LayerScale(dim)

    def forward(self, x, rope=None):  # (B, N, C) -> (B, N, C); under autocast the residual x stays fp32
        x = x + self.ls1(self.attn(self.norm1(x), rope))
        return x + self.ls2(self.mlp(self.norm2(x)))


class ViT(nn.Module):
    """DINOv2 (learned positions on a grid x grid table) or DINOv3 (RoPE) backbone; sizes from PRESETS or free."""

    def __init__(self, family: str, patch: int, dim: int, depth: int, heads: int, hidden: int, ffn: str,
                 registers: int, grid: int, qkv_bias: bool):
        super().__init__()
        self.family, self.patch, self.dim, self.depth, self.grid = family, patch, dim, depth, grid
        self.prefix = 1 + registers
        rope, eps = family == "dinov3", 1e-5 if family == "dinov3" else 1e-6
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.storage_tokens = nn.Parameter(torch.zeros(1, registers, dim)) if registers else None
        self.pos_embed = None if rope else nn.Parameter(torch.zeros(1, 1 + grid * grid, dim))
        self.rope_embed = Rope(dim // heads) if rope else None
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, dim, patch, patch)})
        linear = NoKeyBias if rope and qkv_bias else nn.Linear
        self.blocks = nn.ModuleList(Block(dim, heads, hidden, ffn, linear(dim, 3 * dim, bias=qkv_bias), eps)
                                    for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps)
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.trunc_normal_(m.weight, std=0.02)
                if m.bias is not None:
                    nn.init.zeros_(m.bias)
        for token in (self.cls_token, self.storage_tokens, self.pos_embed):
            if token is not None:
                nn.init.normal_(token, std=0.02)

    def positions(self, h: int, w: int):  # (1, 1 + h*w, C): Meta's bicubic rule, which Hugging Face and timm change
        if h == w == self.grid:
            return self.pos_embed
        table = self.pos_embed[:, 1:].float().view(1, self.grid, self.grid, self.dim).permute(0, 3, 1, 2)
        if self.storage_tokens is None:  # the plain models were released with an offset of 0.1 in the scale
            scale = (h + 0.1) / self.grid, (w + 0.1) / self.grid
            table = F.interpolate(table, scale_factor=scale, mode="bicubic")
        else:
            table = F.interpolate(table, size=(h, w), mode="bicubic", antialias=True)
        return torch.cat([self.pos_embed[:, :1], table.flatten(2).transpose(1, 2).to(self.pos_embed.dtype)], dim=1)

    def forward(self, x, blocks: list[int] | None = None, norm: bool = True):
        """x (B, 3, H, W) -> maps of `blocks` in rising order (default: the last), each (B, C, h, w), and cls (B, C).

        H and W are padded with zeros at the right and bottom: h = ceil(H / patch). `norm`: final norm on every map.
        """
        H, W = x.shape[-2:]
        x = self.patch_embed["proj"](F.pad(x, (0, -W % self.patch, 0, -H % self.patch)))
        B, C, h, w = x.shape
        x = torch.cat([self.cls_token.expand(B, -1, -1), x.flatten(2).transpose(1, 2)], dim=1)
        if self.pos_embed is not None:
            x = x + self.positions(h, w)
        if self.storage_tokens is not None:  # after the positions: registers have none
            x = torch.cat([x[:, :1], self.storage_tokens.expand(B, -1, -1), x[:, 1:]], dim=1)
        rope = self.rope_embed(h, w) if self.rope_embed is not None else None
        blocks, maps = blocks or [self.depth - 1], []
        for i, block in enumerate(self.blocks[: blocks[-1] + 1]):
            x = block(x, rope)
            if i in blocks:
                tokens = self.norm(x) if norm else x
                maps.append(tokens[:, self.prefix:].transpose(1, 2).reshape(B, C, h, w))
        return maps, tokens[:, 0]
