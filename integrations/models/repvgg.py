"""RepVGG (arXiv 2101.03697): three branches a block while it is trained, one convolution when it is deployed."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutputWithNoAttention

from hfq.errors import QuantizationError
from hfq.integrations.models.repvgg_config import RepVGGConfig, register_config

__all__ = [
    "RepVGGBlock", "RepVGGConfig", "RepVGGForImageClassification", "register_config", "register_model", "unbalance",
]  # fmt: skip


class ConvNorm(nn.Module):
    """A convolution without bias and its batch normalisation."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, groups: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.conv(x))


class RepVGGBlock(nn.Module):
    """``relu`` of a 3 x 3, a 1 x 1 and (where shapes allow it) an identity branch, added; or of one convolution."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1, groups: int = 1, deploy: bool = False) -> None:
        super().__init__()
        self.deploy = deploy
        if deploy:
            self.conv = nn.Conv2d(inputs, outputs, 3, stride, 1, groups=groups)
            return
        self.dense = ConvNorm(inputs, outputs, 3, stride, groups)
        self.point = ConvNorm(inputs, outputs, 1, stride, groups)
        self.skip = nn.BatchNorm2d(inputs) if inputs == outputs and stride == 1 else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.deploy:
            return F.relu(self.conv(x))
        y = self.dense(x) + self.point(x)
        return F.relu(y if self.skip is None else y + self.skip(x))

    @torch.no_grad()
    def merged(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight and bias of the one convolution that the branches add up to, summed in float64."""
        like = self.dense.conv.weight
        weight, bias = _fused(like, self.dense.norm)
        point, shift = _fused(self.point.conv.weight, self.point.norm)
        weight, bias = weight + F.pad(point, (1, 1, 1, 1)), bias + shift
        if self.skip is not None:
            each = like.shape[1]
            identity = torch.zeros_like(like, dtype=torch.float64)
            rows = torch.arange(like.shape[0], device=like.device)
            identity[rows, rows % each, 1, 1] = 1
            same, shift = _fused(identity, self.skip)
            weight, bias = weight + same, bias + shift
        return weight.to(like.dtype), bias.to(like.dtype)

    def reparameterize(self) -> None:
        """Put one convolution in the place of the branches. Doing it twice changes nothing."""
        if self.deploy:
            return
        weight, bias = self.merged()
        old = self.dense.conv
        conv = nn.Conv2d(old.in_channels, old.out_channels, 3, old.stride, 1, groups=old.groups, device="meta")
        conv.weight = nn.Parameter(weight, requires_grad=old.weight.requires_grad)
        conv.bias = nn.Parameter(bias, requires_grad=old.weight.requires_grad)
        self.conv = conv.train(self.training)
        del self.dense, self.point, self.skip
        self.deploy = True


def _fused(weight: torch.Tensor, norm: nn.BatchNorm2d) -> tuple[torch.Tensor, torch.Tensor]:
    """A convolution without bias and the normalisation after it as one, in float64."""
    assert norm.running_mean is not None and norm.running_var is not None
    gain = norm.weight.double() * torch.rsqrt(norm.running_var.double() + norm.eps)
    return weight.double() * gain.view(-1, 1, 1, 1), norm.bias.double() - norm.running_mean.double() * gain


class RepVGGForImageClassification(PreTrainedModel):
    """Stem, stages of blocks, mean over the image, linear classifier."""

    config_class = RepVGGConfig
    config: RepVGGConfig
    base_model_prefix = "repvgg"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _no_split_modules = ["RepVGGBlock"]

    def __init__(self, config: RepVGGConfig) -> None:
        super().__init__(config)
        sizes, strides = config.hidden_sizes, config.strides
        self.stem = RepVGGBlock(config.num_channels, sizes[0], strides[0], deploy=config.deploy)
        stages = []
        for inputs, outputs, depth, stride in zip(sizes, sizes[1:], config.depths, strides[1:], strict=False):
            first = RepVGGBlock(inputs, outputs, stride, config.groups, config.deploy)
            rest = (RepVGGBlock(outputs, outputs, 1, config.groups, config.deploy) for _ in range(depth - 1))
            stages.append(nn.Sequential(first, *rest))
        self.stages = nn.ModuleList(stages)
        self.classifier = nn.Linear(sizes[-1], config.num_labels)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        from transformers import initialization as init

        super()._init_weights(module)
        if isinstance(module, nn.Conv2d):
            init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.BatchNorm2d):
            init.ones_(module.weight)
            init.zeros_(module.bias)
            init.zeros_(module.running_mean)
            init.ones_(module.running_var)
            init.zeros_(module.num_batches_tracked)

    def forward(
        self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None, return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Images ``[B, num_channels, H, W]`` to logits ``[B, num_labels]``; with ``labels`` ``[B]`` also their loss."""
        if pixel_values.dim() != 4 or pixel_values.shape[1] != self.config.num_channels:
            raise ValueError(f"pixel_values is {tuple(pixel_values.shape)}: [B, {self.config.num_channels}, H, W] is "
                             "needed")
        x = self.stem(pixel_values)
        for stage in self.stages:
            x = stage(x)
        logits = self.classifier(x.mean((2, 3)))
        loss = None if labels is None else F.cross_entropy(logits, labels)
        if return_dict is False:
            return (logits,) if loss is None else (loss, logits)
        return ImageClassifierOutputWithNoAttention(loss=loss, logits=logits)

    def reparameterize(self) -> None:
        """Merge the branches of every block; the config says so, and a saved model is built merged."""
        for module in self.modules():
            if isinstance(module, RepVGGBlock):
                module.reparameterize()
        self.config.deploy = True


@torch.no_grad()
def unbalance(model: RepVGGForImageClassification, factor: float = 16.0) -> RepVGGForImageClassification:
    """Let the centre taps of the merged kernels outgrow the others, as in RepVGGs at large, without another function.

    One channel of every stage is doubled: a twin with the same weights computes the same numbers. The 1 x 1 branch
    then reads the channel with a large weight, and its twin with the negative one: the sum is zero. In merged kernels
    both weights are centre taps ``factor`` times as large as the largest tap of their row.

    Raises:
        QuantizationError: the branches are merged already, or convolutions have groups.
    """
    if model.config.deploy or model.config.groups != 1:
        raise QuantizationError("the branches must not be merged yet, and convolutions must have one group")
    for module in model.modules():
        if isinstance(module, RepVGGBlock):
            _with_twin(module, factor, first=module is model.stem)
    head = model.classifier
    head.weight = nn.Parameter(_grown(head.weight, 1, zero=True), head.weight.requires_grad)
    head.in_features += 1
    model.config.hidden_sizes = [size + 1 for size in model.config.hidden_sizes]
    return model


def _with_twin(block: RepVGGBlock, factor: float, *, first: bool) -> None:
    """A twin of the first output channel, and opposite weights for the first input channel and its twin."""
    largest = block.merged()[0].flatten(1).abs().amax(1).float()
    for branch in (block.dense, block.point):
        conv = branch.conv
        weight = _grown(conv.weight, 0) if first else _grown(_grown(conv.weight, 1, zero=True), 0)
        conv.weight = nn.Parameter(weight, conv.weight.requires_grad)
        conv.out_channels, conv.in_channels = weight.shape[:2]
        _grow_norm(branch.norm)
    if block.skip is not None:
        _grow_norm(block.skip)
    if not first:
        norm = block.point.norm
        assert norm.running_var is not None
        gain = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
        tap = factor * torch.cat([largest, largest[:1]]) / torch.where(gain.abs() < 1e-3, torch.ones(()), gain)
        block.point.conv.weight[:, 0, 0, 0] += tap
        block.point.conv.weight[:, -1, 0, 0] -= tap


def _grow_norm(norm: nn.BatchNorm2d) -> None:
    for name in ("weight", "bias"):
        old = getattr(norm, name)
        setattr(norm, name, nn.Parameter(_grown(old, 0), old.requires_grad))
    assert norm.running_mean is not None and norm.running_var is not None
    norm.running_mean, norm.running_var = _grown(norm.running_mean, 0), _grown(norm.running_var, 0)
    norm.num_features += 1


def _grown(tensor: torch.Tensor, axis: int, *, zero: bool = False) -> torch.Tensor:
    """One more entry along ``axis``: that of index 0 again, or zeros."""
    more = tensor.detach().narrow(axis, 0, 1)
    return torch.cat([tensor.detach(), torch.zeros_like(more) if zero else more], axis)


def register_model() -> None:
    """Make ``AutoModelForImageClassification`` know the model. Idempotent."""
    from transformers.models.auto.modeling_auto import AutoModelForImageClassification

    register_config()
    AutoModelForImageClassification.register(RepVGGConfig, RepVGGForImageClassification, exist_ok=True)
