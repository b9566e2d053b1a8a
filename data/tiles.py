"""Sliding windows over images of any size, and the weights that blend them without seams."""
import torch


def windows(H: int, W: int, size: int, overlap: float) -> list[tuple[int, int, int, int]]:
    """(top, left, h, w) of windows that cover H x W; the last of a row or column is shifted inwards."""
    def starts(n):
        if n <= size:
            return [0]
        step = max(1, int(size * (1 - overlap)))
        return [*range(0, n - size, step), n - size]

    h, w = min(size, H), min(size, W)
    return [(top, left, h, w) for top in starts(H) for left in starts(W)]


def blend_weight(h: int, w: int) -> torch.Tensor:
    """(h, w) Hann weights, above zero everywhere: the middle of a window counts most, its edge still counts."""
    y, x = (torch.hann_window(n + 2, periodic=False)[1:-1].clamp(min=1e-3) for n in (h, w))
    return y[:, None] * x
