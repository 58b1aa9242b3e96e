"""Real images that install from the package index, and the small vision models that are trained on them.

* scikit-learn's 1,797 handwritten digits (8 x 8), upsampled to 32 x 32, turned, moved and laid on crops of
  scikit-image's photographs, and crops of six textures among the photographs: 16 classes. Every fifth digit is held
  out, and so is the right quarter of every photograph. Nothing is downloaded: both packages carry the files (extra
  ``vision``).
* The models of :data:`RECIPES` are trained by ``examples/vit/train.py`` in minutes and cached under a name that holds a
  hash of the recipe, so that a changed recipe is another model.
* Folders of images (one folder a class) and data sets of the Hub are read into the same form.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hfq.errors import DataError
from hfq.integrations import demo_models

__all__ = [
    "CLASSES",
    "RECIPES",
    "Images",
    "Recipe",
    "demo_images",
    "demo_views",
    "demo_vision",
    "digits",
    "labels_for",
    "model_folder",
    "open_images",
    "processor",
    "warped",
]  # fmt: skip

SIZE = 32
# Textures that are classes; photographs that lie behind the digits.
TEXTURES = ("brick", "coins", "grass", "gravel", "hubble_deep_field", "immunohistochemistry")
BACKGROUNDS = ("astronaut", "camera", "chelsea", "coffee", "rocket")
CLASSES = (*(str(digit) for digit in range(10)), *TEXTURES)
VIEWS = 3  # of every held-out digit
TEXTURE_CROPS = 60  # held-out crops of every texture
DATA_VERSION = 3  # part of the hash of every recipe: raise it when images change
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".gif")
_SCRIPT = Path(__file__).resolve().parents[1] / "examples" / "vit" / "train.py"


@dataclass(frozen=True)
class Recipe:
    """What a demo model is and how it is trained; ``options`` are those of its configuration class."""

    architecture: str
    options: dict[str, Any]
    steps: int
    batch: int = 128
    lr: float = 2e-3
    muon_lr: float = 0.02

    def digest(self) -> str:
        """Eight hexadecimal digits that change with the recipe and with the images."""
        return demo_models.digest(asdict(self), DATA_VERSION, CLASSES, SIZE)


RECIPES: dict[str, Recipe] = {
    "vit": Recipe("ViTForImageClassification", {
        "hidden_size": 128, "num_hidden_layers": 6, "num_attention_heads": 4, "intermediate_size": 512,
        "image_size": SIZE, "patch_size": 4,
    }, steps=1300, batch=64),
    "swin": Recipe("SwinForImageClassification", {
        "image_size": SIZE, "patch_size": 4, "embed_dim": 64, "depths": [2, 4], "num_heads": [4, 8], "window_size": 4,
        "drop_path_rate": 0.0,
    }, steps=1700, batch=64),
    "resnet": Recipe("ResNetForImageClassification", {
        "embedding_size": 32, "hidden_sizes": [32, 64, 128], "depths": [2, 2, 2], "layer_type": "basic",
    }, steps=700, batch=64),
    "repvgg": Recipe("RepVGGForImageClassification", {
        "hidden_sizes": [24, 24, 48, 96], "depths": [2, 3, 2], "strides": [1, 2, 2, 2],
    }, steps=500, batch=64),
}  # fmt: skip


@dataclass(frozen=True)
class Images:
    """Images of any size with labels.

    Attributes:
        items: PIL images or uint8 arrays ``[H, W, 3]``.
        labels: index into ``names`` of each.
        names: of the classes.
        title: what they are in a few words.
    """

    items: Sequence[Any]
    labels: Sequence[int]
    names: tuple[str, ...]
    title: str = ""

    def __len__(self) -> int:
        return len(self.items)

    def take(self, count: int | None, seed: int | None = None) -> Images:
        """The first ``count`` images, or ``count`` drawn with ``seed``; all if there are no more."""
        if count is None or count >= len(self):
            return self
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed)) if seed is not None else None
        keep = range(count) if order is None else sorted(order[:count].tolist())
        return Images([self.items[i] for i in keep], [self.labels[i] for i in keep], self.names, self.title)

    def pixels(self, prepare: Any, chunk: int = 64) -> Tensor:
        """``pixel_values`` float32 ``[N, C, H, W]`` as the model's image processor makes them.

        Raises:
            DataError: no image, or the processor gives images of different sizes.
        """
        if not len(self):
            raise DataError("there is no image")
        found = [prepare(images=list(self.items[i : i + chunk]), return_tensors="pt")["pixel_values"]
                 for i in range(0, len(self), chunk)]  # fmt: skip
        if len({part.shape[1:] for part in found}) > 1:
            sizes = sorted({tuple(part.shape[-2:]) for part in found})
            raise DataError(f"the processor leaves images of sizes {sizes[:3]}: it must resize or crop to one size")
        return torch.cat(found)


def processor() -> Any:
    """The image processor of the demo models: 32 x 32, range [-1, 1]."""
    from transformers import ViTImageProcessor

    return ViTImageProcessor(size={"height": SIZE, "width": SIZE}, image_mean=[0.5] * 3, image_std=[0.5] * 3)


def demo_images(split: str = "test", count: int | None = None, seed: int = 0) -> Images:
    """Digits on photographs, and textures.

    Args:
        split: "test" is always the same 1,440 images: three views of each of 360 held-out digits, 60 held-out crops
            of each texture. "train" is drawn anew for every seed, three digits to one texture.
        count: of images; of "test", a balanced part.
        seed: of "train".

    Raises:
        DataError: scikit-learn or scikit-image is missing, or another split is asked.
    """
    if split not in ("train", "test"):
        raise DataError(f"split {split!r}: 'train' and 'test' are there")
    if split == "train":
        pixels, labels = demo_views(1437 if count is None else count, torch.Generator().manual_seed(seed + 1))
    else:
        pixels, labels = _test_views()
        if count is not None and count < len(labels):  # a stride that no view or class divides spreads over all
            keep = torch.arange(count) * len(labels) // count
            pixels, labels = pixels[keep], labels[keep]
    title = f"digits on photographs and textures ({'held out' if split == 'test' else 'training'})"
    return Images(list(pixels.permute(0, 2, 3, 1).numpy()), labels.tolist(), CLASSES, title)


def demo_views(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """``count`` new training images uint8 ``[N, 3, 32, 32]`` and their labels ``[N]``."""
    images, targets = digits()
    kept = torch.tensor([i for i in range(len(targets)) if i % 5])
    textures = count // 4
    rows = kept[torch.randint(len(kept), (count - textures,), generator=generator)]
    which = torch.randint(len(TEXTURES), (textures,), generator=generator)
    drawn = _on_photographs(images[rows], "train", generator)
    images = torch.cat([drawn, _crops([TEXTURES[i] for i in which.tolist()], "train", generator)])
    return _bytes(images, generator), torch.cat([targets[rows], which + 10])


@lru_cache(maxsize=1)
def _test_views() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images, targets = digits()
    rows = torch.arange(0, len(targets), 5).repeat_interleave(VIEWS)
    names = [name for name in TEXTURES for _ in range(TEXTURE_CROPS)]
    images = torch.cat([_on_photographs(images[rows], "test", generator), _crops(names, "test", generator)])
    which = torch.arange(len(TEXTURES)).repeat_interleave(TEXTURE_CROPS)
    return _bytes(images, generator), torch.cat([targets[rows], which + 10])


def _on_photographs(digits: Tensor, split: str, generator: torch.Generator) -> Tensor:
    """Digits ``[N, 8, 8]`` in [0, 1] turned, scaled, moved and drawn over photographs: ``[N, 3, 32, 32]`` in [0, 1]."""

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=generator)

    count = len(digits)
    ink = warped(digits, uniform(-0.2, 0.2), uniform(0.85, 1.15), uniform(-0.15, 0.15), uniform(-0.15, 0.15), SIZE)
    names = [BACKGROUNDS[i] for i in torch.randint(len(BACKGROUNDS), (count,), generator=generator).tolist()]
    behind = 0.2 * _crops(names, split, generator)
    colour = uniform(0.7, 1.0, 3, 1, 1)
    image = behind * (1 - ink) + colour * ink
    negative = (torch.rand(count, generator=generator) < 0.5).view(-1, 1, 1, 1)
    return torch.where(negative, 1 - image, image)


def warped(digits: Tensor, angle: Tensor, scale: Tensor, right: Tensor, down: Tensor, size: int) -> Tensor:
    """Digits ``[N, 8, 8]`` turned, scaled and moved on ``size`` x ``size`` pixels: ``[N, 1, size, size]`` in [0, 1].

    Args:
        angle: in radians ``[N]``.
        scale: 1 fills the picture ``[N]``.
        right, down: in halves of the picture ``[N]``, against the direction of the move.
    """
    rows = [torch.stack([angle.cos() / scale, -angle.sin() / scale, right], 1),
            torch.stack([angle.sin() / scale, angle.cos() / scale, down], 1)]  # fmt: skip
    grid = F.affine_grid(torch.stack(rows, 1), [len(digits), 1, size, size], align_corners=False)
    return F.grid_sample(digits[:, None], grid, mode="bicubic", align_corners=False).clamp(0, 1)


def _crops(names: Sequence[str], split: str, generator: torch.Generator) -> Tensor:
    """A random crop ``[3, 32, 32]`` of each named photograph at half its size, some mirrored, of other contrast."""
    found = []
    draws = torch.rand(len(names), 4, generator=generator).tolist()
    for name, (top, left, mirror, light) in zip(names, draws, strict=True):
        photograph = _photograph(name)
        height, width = photograph.shape[1:]
        border = 3 * width // 4
        first, last = (0, border - SIZE) if split == "train" else (border, width - SIZE)
        y, x = int(top * (height - SIZE)), first + int(left * (last - first))
        crop = photograph[:, y : y + SIZE, x : x + SIZE]
        crop = crop.flip(-1) if mirror < 0.5 else crop
        found.append(((0.7 + 0.6 * light) * (crop - 0.5) + 0.5).clamp(0, 1))
    return torch.stack(found) if found else torch.zeros(0, 3, SIZE, SIZE)


def _bytes(images: Tensor, generator: torch.Generator) -> Tensor:
    noisy = images + 0.03 * torch.randn(images.shape, generator=generator)
    return (255 * noisy.clamp(0, 1)).round().to(torch.uint8)


@lru_cache(maxsize=1)
def digits() -> tuple[Tensor, Tensor]:
    """Digits float ``[1797, 8, 8]`` in [0, 1] and their classes ``[1797]``."""
    _need("sklearn", "scikit-learn")
    from sklearn.datasets import load_digits

    found = load_digits()
    return torch.tensor(found.images / 16, dtype=torch.float32), torch.tensor(found.target, dtype=torch.long)


@lru_cache(maxsize=len(TEXTURES) + len(BACKGROUNDS))
def _photograph(name: str) -> Tensor:
    """Half-size photograph ``[3, H, W]`` in [0, 1]."""
    _need("skimage", "scikit-image")
    from skimage import data

    found = torch.tensor(getattr(data, name)(), dtype=torch.float32) / 255
    planes = found.expand(3, *found.shape) if found.ndim == 2 else found[..., :3].permute(2, 0, 1)
    return F.avg_pool2d(planes[None], 2)[0]


def _need(module: str, package: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise DataError(f"the demo images come from {package}: pip install 'hfq[vision]'")


def model_folder(name: str) -> Path:
    """Where the trained model of a recipe lies in the cache, or would lie."""
    return demo_models.folder_of("vision", name, RECIPES)


def demo_vision(name: str) -> Path:
    """Folder of a demo vision model, trained on the first call (some minutes) where the training script is at hand.

    Raises:
        DataError: there is no recipe of that name, or the model is not trained yet and the script is not here.
    """
    return demo_models.trained_by(_SCRIPT, name, model_folder(name))


def open_images(source: str | os.PathLike[str] = "demo", split: str = "test", count: int | None = None,
                seed: int | None = None) -> Images:
    """``"demo"``, a folder with one folder of images a class, or the id of a data set of the Hub (``"name:column"``).

    Args:
        split: "train" or "test". A folder may hold these two (or "val", "validation"); else every fifth image of a
            class is "test". On the Hub "test" is the validation split, or the test split if there is none.
        count: of images; drawn with ``seed`` if there is one, else spread evenly over all.

    Raises:
        DataError: no such source, no image in it, or only one class.
    """
    if str(source) == "demo":
        return demo_images(split, count, seed or 0)
    from hfq.integrations import image_files

    found = image_files.read(source, split, count, seed)
    if len(found) and len(set(found.names)) < 2:
        raise DataError(f"{source} holds images of one class ({found.names[0]}): at least two are needed to classify")
    return found


def labels_for(images: Images, model: Any) -> Tensor:
    """Labels int64 ``[N]`` in the numbering of ``model``: by the names of its classes, or by order if the counts agree.

    Raises:
        DataError: neither the names nor the number of classes agree.
    """
    ids = {_plain(name): int(index) for index, name in (getattr(model.config, "id2label", None) or {}).items()}
    names = [_plain(name) for name in images.names]
    if all(name in ids for name in names):
        order = [ids[name] for name in names]
    elif len(names) == model.config.num_labels:
        order = list(range(len(names)))
    else:
        unknown = next(name for name in images.names if _plain(name) not in ids)
        raise DataError(f"the images have {len(names)} classes and the model {model.config.num_labels}, and "
                        f"{unknown!r} is none of the model's: name classes as the model's id2label does")
    return torch.tensor([order[label] for label in images.labels], dtype=torch.long)


def _plain(name: Any) -> str:
    """A class name without synonyms: "tench, Tinca tinca" is "tench"."""
    return str(name).split(",")[0].strip().lower().replace("_", " ")
