"""Train four small vision models on real images in minutes: ViT, Swin, ResNet, RepVGG.

    python examples/vit/train.py                         # all four, about a quarter of an hour on two cores, cached
    python examples/vit/train.py --models vit,swin
    python examples/vit/train.py --models vit --outliers --output out/vit-outliers
    python examples/vit/train.py --evaluate google/vit-base-patch16-224 --data path/to/imagenet

The images are scikit-learn's handwritten digits on crops of scikit-image's photographs, and crops of six textures
(``hfq.integrations.inputs_vision``): 16 classes, 32 x 32. The accuracy is measured on digits and on parts of the
photographs that no training image came from, and is written beside the weights in ``training.json``.

``--outliers`` writes a model with the channel ranges of large models instead: an exact rescaling by powers of two (see
``hfq.evaluation.rescale`` and ``hfq.integrations.models.repvgg.unbalance``), under which the function is
the same and the activations are harder to quantize. The tables apply the same rescaling when they load a model.
Numbers after a GELU stay as they are: no rescaling of them is exact.

With a network, ``--evaluate`` measures any image classifier of the Hub on a folder of images or a data set of the Hub.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hfq.errors import DataError
from hfq.evaluation.classification import classify
from hfq.integrations import bench_vision, demo_models, measure_vision
from hfq.integrations import inputs_vision as inputs
from hfq.integrations.models import repvgg

TARGET = 0.97  # of the held-out digits


def trained(name: str, output: Path | None = None, steps: int | None = None) -> Path:
    """Folder with the trained model and its image processor; trains on the first call."""
    target = output or inputs.model_folder(name)
    return demo_models.made_once(target, f"vision-{name}", lambda folder: train(name, folder, steps))


def build(recipe: inputs.Recipe) -> Any:
    """The untrained model of a recipe, with the names of the classes."""
    import transformers

    names = dict(enumerate(inputs.CLASSES))
    labels = {"id2label": names, "label2id": {name: i for i, name in names.items()}}
    if recipe.architecture == "RepVGGForImageClassification":
        return repvgg.RepVGGForImageClassification(repvgg.RepVGGConfig(**recipe.options, **labels))
    cls = getattr(transformers, recipe.architecture)
    return cls(cls.config_class(**recipe.options, **labels))


def train(name: str, folder: Path, steps: int | None = None) -> None:
    """Train, measure, save. A run with fewer steps than the recipe's is a trial: its accuracy is not checked."""
    recipe, prepare = inputs.RECIPES[name], inputs.processor()

    def make(count: int) -> tuple[Any, float]:
        model = build(recipe)
        return model, fit(model, recipe, count)

    def quality(model: Any) -> dict[str, Any]:
        found = {**accuracy(model, prepare), "parameters": model.num_parameters()}
        if recipe.architecture == "RepVGGForImageClassification":
            check_merged(model)
        return found

    demo_models.train(name, folder, make, quality, {"digits": TARGET}, steps=recipe.steps, trial=steps,
                      rejected=inputs.model_folder(name).with_suffix(".rejected"), beside=[prepare])


def fit(model: Any, recipe: inputs.Recipe, steps: int) -> float:
    """Fresh images every step."""
    generator = torch.Generator().manual_seed(0)

    def loss(step: int) -> Tensor:
        pixels, labels = inputs.demo_views(recipe.batch, generator)
        logits = model(pixel_values=pixels.float() / 127.5 - 1).logits
        return F.cross_entropy(logits, labels, label_smoothing=0.02)

    steppers = demo_models.optimizers(model.named_parameters(), recipe.lr, recipe.muon_lr)
    return demo_models.fit([model], steppers, loss, steps)


def accuracy(model: Any, prepare: Any) -> dict[str, float]:
    """Top-1 of all held-out images, of the digits among them and of the textures."""
    images = inputs.demo_images("test")
    pixels, labels = images.pixels(prepare), torch.tensor(images.labels)
    digit = labels < 10

    def top1(keep: Tensor) -> float:
        return round(classify(model, pixels[keep], labels[keep]).top1 or 0.0, 4)

    return {"top1": top1(torch.ones_like(digit)), "digits": top1(digit), "textures": top1(~digit)}


def check_merged(model: Any) -> None:
    """Raises unless the branches of a RepVGG can be merged without changing what it computes."""
    import copy

    images = inputs.demo_views(32, torch.Generator().manual_seed(9))[0].float() / 127.5 - 1
    merged = copy.deepcopy(model)
    merged.reparameterize()
    with torch.no_grad():
        before, after = model(images).logits, merged(images).logits
    if (before - after).abs().max() > 1e-3 * before.abs().max():
        raise DataError("merging the branches changed the model: its running statistics are not usable")


def with_outliers(source: Path, output: Path) -> Path:
    """The rescaled model in a folder of its own: the same function on harder numbers."""
    model = measure_vision.load(source)
    images = inputs.demo_views(32, torch.Generator().manual_seed(9))[0].float() / 127.5 - 1
    with torch.no_grad():
        before = model(images).logits
        harder(model)
        after = model(images).logits
    if not torch.allclose(before, after, rtol=1e-3, atol=1e-3):
        raise DataError(f"the rescaling changed logits by {float((before - after).abs().max()):.2g}")
    model.save_pretrained(output)
    measure_vision.load_processor(source).save_pretrained(output)
    return output


def harder(model: Any) -> Any:
    """The exact rescaling that fits the model."""
    bench_vision.rescale_model(model)
    return model


def evaluate(model: str, data: str, count: int) -> str:
    """One line on an image classifier of the Hub, or in a folder, measured on ``data``."""
    loaded = measure_vision.load(model)
    images = inputs.open_images(data, "test", count)
    found = classify(loaded, images.pixels(measure_vision.load_processor(model)), inputs.labels_for(images, loaded))
    return f"{model} on {images.title}: top-1 {100 * (found.top1 or 0):.2f} % of {found.images}"


def main() -> int:
    parser = demo_models.arguments(__doc__, inputs.RECIPES)
    parser.add_argument("--outliers", action="store_true", help="write the rescaled model; needs --output")
    parser.add_argument("--evaluate", metavar="MODEL", help="instead: measure a classifier (folder or Hub id)")
    parser.add_argument("--data", default="demo", help="images for --evaluate: demo, folder, or Hub id")
    parser.add_argument("--count", type=int, default=1000, help="images for --evaluate")

    def run(options: argparse.Namespace, names: list[str]) -> None:
        if options.evaluate:
            print(evaluate(options.evaluate, options.data, options.count))
        elif options.outliers and not options.output:
            parser.error("--outliers needs --output")
        elif options.outliers:
            print(with_outliers(trained(names[0]), options.output))
        else:
            for name in names:
                print(trained(name, options.output, options.steps))

    return demo_models.script(parser, run)


if __name__ == "__main__":
    raise SystemExit(main())
