"""Windows of blocks: what flows in and out of them, what leaves, and continuing after a kill."""

from __future__ import annotations

import copy
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from hfq.calibration import walk, windows
from hfq.calibration.capture import quiet
from hfq.errors import CheckpointError, QuantizationError
from hfq.formats import QuantSpec, affine
from hfq.graph import read
from hfq.report import Report

SPEC = QuantSpec(4, 16)


class Killed(Exception):
    pass


class Learner(nn.Module):
    """Counts how often its block was in a window, and adds random numbers of every one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = nn.Parameter(torch.zeros(2))


def run(model, batches, stop=None, size=2, overlap=1, **options):
    """Pack every block with a scale that depends on the windows it was in; dies while packing block ``stop``."""
    report, log = Report(), []
    for window in windows.walk(read(model), batches, size=size, overlap=overlap, report=report, **options):
        for step in window.entering:
            window.keep(step, Learner())
        names = [step.index for step in window.steps]
        if not window.fitted:
            noise = torch.rand(2, generator=walk.generator(0, window.index))
            with torch.no_grad():
                for step in window.steps:
                    window.learners[step.block.name].seen += noise + window.targets[0].mean().abs()
        left = []
        for step in window.leaving():
            factor = 1 + 0.1 * float(window.learners[step.block.name].seen.detach().sum())
            for i, site in enumerate(step.block.sites):
                if stop == step.index and i == 2:
                    raise Killed
                step.swap(site, affine.quantize(site.weight.data.float() * factor, SPEC))
            report.curves[step.block.name] = [factor]
            left.append(step.index)
        log.append((names, left, window.fitted))
    return report, log


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert list(a) == list(b) and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


@pytest.mark.parametrize(
    ("blocks", "size", "overlap", "first"),
    [(4, 2, 1, [0, 1, 2]), (4, 1, 0, [0, 1, 2, 3]), (5, 2, 0, [0, 2, 4]), (6, 3, 1, [0, 2, 4]), (2, 4, 3, [0]),
     (5, 3, 2, [0, 1, 2])],
)  # fmt: skip
def test_where_windows_start(blocks, size, overlap, first):
    assert windows.starts(blocks, size, overlap) == first


def test_order(llama, batches):
    report, log = run(llama(num_hidden_layers=4), batches())
    assert log == [([0, 1], [0], False), ([1, 2], [1], False), ([2, 3], [2, 3], False)]
    assert all(row.tokens == 60 for row in report.packed) and len(report.packed) == 28
    _, log = run(llama(num_hidden_layers=4), batches(), size=3, overlap=0)
    assert log == [([0, 1, 2], [0, 1, 2], False), ([3], [3], False)]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("size", "overlap"), [(2, 1), (3, 1), (1, 0)])
def test_what_flows(llama, batches, rounded, size, overlap, padded):
    """Inputs, targets and the plain outputs of every window against hooks on whole passes."""
    model, data = llama(num_hidden_layers=4), batches(padded=padded)
    reference = copy.deepcopy(model)
    checked = 0
    for window in windows.walk(read(model), data, size=size, overlap=overlap):
        names = [step.block.name for step in window.steps]
        hidden = [_hidden(reference, data, names[-1]), _hidden(model, data, names[-1])]
        _equal(window.targets, hidden[0])
        _equal(list(windows.outputs_of(window)), hidden[1])
        seen = _hidden(model, data, names[0], output=False)
        for i, given in enumerate(seen):
            assert torch.equal(window.inputs[i][0][0][0][0], given)
            mask = data[i].get("attention_mask")
            assert (window.mask(i) is None) == (mask is None or bool(mask.all()))
        checked += len(names)
        for step in window.leaving():
            rounded(step)
    assert checked == {(2, 1): 6, (3, 1): 5, (1, 0): 4}[size, overlap]


def _hidden(model, batches, name, output=True):
    found = []
    module = model.get_submodule(name)

    def hook(_, args, kwargs, result):
        found.append((result[0] if isinstance(result, tuple) else result) if output else args[0])

    handle = module.register_forward_hook(hook, with_kwargs=True)
    with torch.no_grad(), quiet(model):
        for batch in batches:
            model(**batch)
    handle.remove()
    return found


def _equal(a, b):
    assert len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_only_the_window_is_in_memory(llama, batches):
    model, inside, most = llama(num_hidden_layers=5), [], []

    @contextmanager
    def placement(module):
        inside.append(module)
        most.append(len(inside))
        yield
        inside.remove(module)

    run(model, batches(), placement=placement)
    assert max(most) == 2 and len(most) == 5 and not inside
    with pytest.raises(Killed):
        run(llama(num_hidden_layers=4), batches(), stop=1, placement=placement)
    assert not inside


@pytest.mark.parametrize(("size", "overlap"), [(2, 1), (3, 1), (2, 0)])
@pytest.mark.parametrize("stop", [0, 1, 2, 3])
def test_resume(llama, batches, tmp_path, stop, size, overlap):
    options = {"size": size, "overlap": overlap}
    whole = llama(num_hidden_layers=4)
    report, _ = run(whole, batches(), **options)
    with pytest.raises(Killed):
        run(llama(num_hidden_layers=4), batches(), stop, progress_dir=tmp_path, **options)
    assert len(list(tmp_path.glob("block-*"))) == stop
    resumed = llama(num_hidden_layers=4)
    again, log = run(resumed, batches(), progress_dir=tmp_path, **options)
    assert [i for _, left, _ in log for i in left] == list(range(stop, 4))
    assert log[0][2] == (stop not in windows.starts(4, size, overlap))
    same(whole, resumed)
    assert again.to_dict() == report.to_dict()
    third = llama(num_hidden_layers=4)
    assert run(third, batches(), progress_dir=tmp_path, **options)[1] == []
    same(whole, third)


def test_another_window_is_another_run(llama, batches, tmp_path):
    with pytest.raises(Killed):
        run(llama(), batches(), 2, progress_dir=tmp_path)
    with pytest.raises(CheckpointError, match="window"):
        run(llama(), batches(), progress_dir=tmp_path, size=3)


def test_blocks_that_left_are_not_touched(llama, batches):
    model, kept = llama(num_hidden_layers=4), {}
    for window in windows.walk(read(model), batches()):
        for name, state in kept.items():
            now = model.get_submodule(name).state_dict()
            assert all(torch.equal(now[key], tensor) for key, tensor in state.items())
            assert name not in {step.block.name for step in window.steps}
        for step in window.leaving():
            for site in step.block.sites:
                step.swap(site, affine.quantize(site.weight.data, SPEC))
            kept |= {step.block.name: copy.deepcopy(step.block.module.state_dict())}
    assert len(kept) == 4


def test_ranges_of_inputs(llama, batches, rounded):
    """Measured on the float stream, without padded rows."""
    model, data = llama(), batches(padded=True)
    reference, seen = copy.deepcopy(model), {}
    observe = lambda block: {f"{block.name}.mlp.down_proj": block.module.mlp.down_proj}  # noqa: E731
    for window in windows.walk(read(model), data, observe=observe):
        for step in window.entering:
            name = f"{step.block.name}.mlp.down_proj"
            seen[name] = window.ranges[step.block.name].range(name)
        for step in window.leaving():
            rounded(step)
    assert len(seen) == 3
    for name, (low, high) in seen.items():
        rows = []
        hook = lambda _, args, rows=rows: rows.append(args[0])  # noqa: E731
        handle = reference.get_submodule(name).register_forward_pre_hook(hook)
        with torch.no_grad(), quiet(reference):
            for batch in data:
                reference(**batch)
        handle.remove()
        kept = torch.cat([x[batch["attention_mask"].bool()] if "attention_mask" in batch else x.flatten(0, 1)
                          for x, batch in zip(rows, data, strict=True)])  # fmt: skip
        assert torch.equal(low, kept.amin(0)) and torch.equal(high, kept.amax(0))


def test_images(rounded):
    """Any chain of blocks has windows."""
    from transformers import ViTConfig, ViTModel

    model = ViTModel(ViTConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
                               image_size=16, patch_size=4)).eval()  # fmt: skip
    reference, data = copy.deepcopy(model), [{"pixel_values": torch.randn(2, 3, 16, 16)} for _ in range(2)]
    sizes = []
    for window in windows.walk(read(model), data):
        _equal(window.targets, _hidden(reference, data, window.steps[-1].block.name))
        sizes.append(len(window.steps))
        for step in window.leaving():
            rounded(step)
    assert sizes == [2, 2]


@pytest.mark.parametrize("driver", ["auto", "capture"])
def test_encoder_and_decoder_and_no_chain(batches, rounded, driver):
    """Two stacks have windows of their own; blocks that feed each other in no order we know come one by one."""
    from transformers import T5Config, T5ForConditionalGeneration

    model = T5ForConditionalGeneration(T5Config(vocab_size=100, d_model=32, d_ff=48, num_layers=2, num_heads=4, d_kv=8,
                                                decoder_start_token_id=0)).eval()  # fmt: skip
    reference = copy.deepcopy(model)
    data = [{**batch, "decoder_input_ids": batch["input_ids"][:, :5]} for batch in batches()]
    report, sizes = Report(), []
    for window in windows.walk(read(model), data, driver=driver, report=report):
        _equal(window.targets, _hidden(reference, data, window.steps[-1].block.name))
        _equal(list(windows.outputs_of(window)), _hidden(model, data, window.steps[-1].block.name))
        sizes.append(len(window.steps))
        for step in window.leaving():
            rounded(step)
    assert sizes == ([2, 2] if driver == "auto" else [1, 1, 1, 1])
    assert any("windows of one block" in note for note in report.notes) == (driver == "capture")


def test_blocks_without_sites(llama, batches):
    """In between they belong to windows like all others; behind the last block with sites nothing is to be done."""
    plan = read(llama(num_hidden_layers=5), skip=["model.layers.1.*", "model.layers.3.*", "model.layers.4.*"])
    seen = []
    for window in windows.walk(plan, batches()):
        seen.append([step.index for step in window.steps])
        for step in window.leaving():
            for site in step.block.sites:
                step.swap(site, affine.quantize(site.weight.data, SPEC))
    assert seen == [[0, 1], [1, 2]]


def test_misuse(llama, batches):
    for size, overlap in ((0, 0), (2, 2), (2, -1)):
        with pytest.raises(QuantizationError, match="window"):
            windows.walk(read(llama()), batches(), size=size, overlap=overlap)
    with pytest.raises(QuantizationError, match="leaving"):
        for _ in windows.walk(read(llama()), batches()):
            pass
