"""3x3 convolutions with a quarter of the multiplications, for browsers, which are slow at them: F(4x4, 3x3) of
Lavin & Gray 2015 ("Fast Algorithms for Convolutional Neural Networks", arXiv 1509.09308, section 4.3).
"""

import torch
import torch.nn.functional as F
from torch import nn

# Their matrices: a tile of 4x4 pixels is A^T [(G g G^T) * (B^T d B)] A, for the filter g and its 6x6 pixels d.
B_T = [[4, 0, -5, 0, 1, 0], [0, -4, -4, 1, 1, 0], [0, 4, -4, -1, 1, 0],
       [0, -2, -1, 2, 1, 0], [0, 2, -1, -2, 1, 0], [0, 4, 0, -5, 0, 1]]
G = [[1 / 4, 0, 0], [-1 / 6, -1 / 6, -1 / 6], [-1 / 6, 1 / 6, -1 / 6],
     [1 / 24, 1 / 12, 1 / 6], [1 / 24, -1 / 12, 1 / 6], [0, 0, 1]]
A_T = [[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]]
TILE = 4
PLAIN = dict(kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), dilation=(1, 1), groups=1, padding_mode="zeros")


class Winograd(nn.Module):
    """A 3x3 convolution with padding 1: [B, Cin, H, H] -> [B, Cout, H, H], with another one's weight and bias."""

    def __init__(self, conv):
        super().__init__()
        self.weight, self.bias = conv.weight, conv.bias

    def forward(self, x):
        (n, c, size, _), o = x.shape, len(self.weight)
        tiles = -(-size // TILE)                    # T, in a row; what hangs over the edge is zero
        into, out = [[0] * 6 * tiles for _ in range(size)], [[0] * size for _ in range(6 * tiles)]
        for tile in range(tiles):
            for k in range(6):
                for i, row in enumerate(B_T):
                    if 0 <= (at := TILE * tile + k - 1) < size:
                        into[at][tiles * i + tile] = row[k]
                for i, row in enumerate(A_T):
                    if (at := TILE * tile + i) < size:
                        out[tiles * k + tile][at] = row[k]
        into, out = torch.tensor(into).float(), torch.tensor(out).float()           # B^T for all tiles, A^T likewise
        g = torch.tensor(G)
        # A 1x1 convolution: computed once, when the file is loaded, it needs no copy in another order, and less memory.
        u = F.conv2d(self.weight.flatten(2).permute(2, 0, 1)[None], torch.kron(g, g)[..., None, None])
        v = (x @ into).transpose(2, 3) @ into                                       # [B, Cin, 6 T, 6 T]
        v = v.reshape(n, c, 6, tiles, 6, tiles).permute(4, 2, 1, 0, 3, 5).reshape(1, 36, c, n * tiles * tiles)
        y = (u @ v).reshape(6, 6, o, n, tiles, tiles).permute(3, 2, 1, 4, 0, 5).reshape(n, o, 6 * tiles, 6 * tiles)
        return (y @ out).transpose(2, 3) @ out + self.bias[:, None, None]


def plain(module):
    """Whether Winograd computes what this module computes: a subclass of Conv2d may do something else besides."""
    return (
        type(module) is nn.Conv2d and module.bias is not None
        and all(getattr(module, name) == value for name, value in PLAIN.items())
    )


def replace(net):
    """Let a network compute its plain 3x3 convolutions so, where they have enough channels to gain by it."""
    for parent in list(net.modules()):
        for name, conv in list(parent.named_children()):
            if plain(conv) and min(conv.weight.shape[:2]) >= 16:
                setattr(parent, name, Winograd(conv))
