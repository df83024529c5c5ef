"""What VQGAN adds to the pixel error so that textures stay sharp (Esser et al. 2021, section 3.1). Both are optional.

Perceptual: distance between the features of a VGG-16 that the user brings (a file of torchvision's weights), each
feature vector normalised, layers weighted alike: LPIPS (Zhang et al. 2018) without its learned weights.
Adversarial: hinge loss against PatchGAN (Isola et al. 2017), weighted so that its gradient at the decoder's last layer
is as long as that of the reconstruction (VQGAN, equation 7).
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megamug.errors import UserError

_VGG16 = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))  # channels; pooling in between
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, as torchvision's weights expect


class PerceptualLoss(nn.Module):
    """`weights`: torchvision's vgg16-*.pth. Raises `UserError` where the file is missing or holds something else."""

    def __init__(self, weights: str | Path) -> None:
        super().__init__()
        self.stages = nn.ModuleList()
        inward, tensors, number = 3, _load_vgg(weights), 0
        for widths in _VGG16:
            stage = nn.Sequential()
            for width in widths:
                convolution = nn.Conv2d(inward, width, 3, padding=1)
                for kind in ("weight", "bias"):
                    name = f"features.{number}.{kind}"
                    found = tensors.get(name)
                    if found is None or found.shape != getattr(convolution, kind).shape:
                        raise UserError(f"{weights}: {name} is not that of torchvision's VGG-16; give its vgg16-*.pth")
                    getattr(convolution, kind).data.copy_(found)
                stage.extend([convolution, nn.ReLU()])
                inward, number = width, number + 2  # torchvision counts the ReLU too
            self.stages.append(stage)
            number += 1  # and the pooling
        self.register_buffer("mean", torch.tensor(_MEAN).view(1, 3, 1, 1) * 2 - 1)
        self.register_buffer("std", torch.tensor(_STD).view(1, 3, 1, 1) * 2)
        self.requires_grad_(False)

    def forward(self, made: Tensor, original: Tensor) -> Tensor:
        """Images [b, 3, S, S] in [-1, 1] -> mean distance, a number."""
        x, y = ((images - self.mean) / self.std for images in (made, original))
        total = 0.0
        for i, stage in enumerate(self.stages):
            if i:
                x, y = F.max_pool2d(x, 2), F.max_pool2d(y, 2)
            x, y = stage(x), stage(y)
            total = total + (F.normalize(x) - F.normalize(y)).square().sum(1).mean()
        return total


def _load_vgg(path: str | Path) -> dict[str, Tensor]:
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; give torchvision's vgg16-*.pth, or no perceptual weights") from None
    except Exception as error:  # torch.load raises what pickle, zipfile and itself raise
        kind = type(error).__name__
        raise UserError(f"{path}: not a file of torch weights ({kind}); give torchvision's vgg16-*.pth") from None
    if not isinstance(tensors, dict):
        raise UserError(f"{path}: holds a {type(tensors).__name__}, not the state dict of torchvision's VGG-16")
    return tensors


class PatchDiscriminator(nn.Module):
    """Images [b, 3, S, S] -> a score for each patch [b, 1, S/8 - 2, S/8 - 2]; above 0 means "original".

    GroupNorm for the paper's BatchNorm, so that a score depends on its own image alone, on any number of processes.
    """

    def __init__(self, channels: int = 64) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for i, stride in enumerate((2, 2, 1)):
            inward, outward = channels << i, channels << (i + 1)
            layers += [
                nn.Conv2d(inward, outward, 4, stride=stride, padding=1, bias=False),
                nn.GroupNorm(min(32, outward // 4), outward), nn.LeakyReLU(0.2),
            ]  # fmt: skip
        self.layers = nn.Sequential(*layers, nn.Conv2d(channels << 3, 1, 4, padding=1))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0, 0.02)

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


def hinge_loss(originals: Tensor, made: Tensor) -> Tensor:
    """The discriminator's loss, from its scores."""
    return (F.relu(1 - originals).mean() + F.relu(1 + made).mean()) / 2


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, last_layer: Tensor, reduce) -> Tensor:
    """|d reconstruction / d last layer| / |d adversarial / d last layer|, at most 10^4 (VQGAN, equation 7).

    `reduce` makes a tensor its mean over the processes, in place.
    """
    norms = []
    for loss in (reconstruction, adversarial):
        (gradient,) = torch.autograd.grad(loss, last_layer, retain_graph=True)
        gradient = gradient.detach().clone()
        reduce(gradient)
        norms.append(gradient.norm())
    return (norms[0] / (norms[1] + 1e-4)).clamp(max=1e4)
