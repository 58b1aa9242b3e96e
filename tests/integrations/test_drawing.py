"""Pictures drawn as calls were recorded, and digests of what conditions a model."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

pytest.importorskip("diffusers")

import hfq
from hfq.errors import CheckpointError, DataError
from hfq.integrations.conditioning import check_conditioning, digest
from hfq.integrations.drawing import Surroundings, draw


def test_pictures_are_those_of_the_recording(zoo, tmp_path):
    pipe = zoo.unconditional()
    calls = hfq.record_calls(pipe, samples=3, seed=4, num_inference_steps=2, folder=tmp_path / "calls")
    assert calls.record.prompts is None and calls.record.sampling == {"num_inference_steps": 2}
    again = hfq.RecordedCalls.load(tmp_path / "calls")
    assert again.record == calls.record
    pictures = Surroundings(pipe, "unet", again).draw(5, batch_size=2)
    assert pictures.shape == (5, 3, 8, 8) and pictures.min() >= 0 and pictures.max() <= 1
    assert torch.equal(pictures, draw(pipe, [None] * 5, seed=4, batch_size=2, num_inference_steps=2))
    classes = zoo.class_conditional()
    calls = hfq.record_calls(classes, "transformer", [1, 2], num_inference_steps=2)
    assert calls.record.prompts == [1, 2] and Surroundings(classes, "transformer", calls).draw(3).shape[0] == 3
    assert "prompts" not in calls.descriptor  # what is saved with a model does not say them


def test_data_that_does_not_say_how(zoo):
    pipe = zoo.unconditional()
    for data in ([{"sample": torch.randn(1, 3, 8, 8)}], hfq.record_calls(pipe, samples=1, num_inference_steps=1,
                                                                         return_dict=True)[:1]):
        if isinstance(data, hfq.RecordedCalls):
            data.record = data.record.__class__(**{**vars(data.record), "sampling": None})
        with pytest.raises(DataError, match="does not say how"):
            Surroundings(pipe, "unet", data).draw(1)


def test_digests(zoo, tmp_path):
    one, other = torch.randn(3, 2), torch.randn(4)
    assert digest([one, other]) == digest([other, one]) != digest([one, other.bfloat16()])
    assert digest([one]) != digest([one.reshape(2, 3)])
    assert not Surroundings(zoo.unconditional(), "unet", None).conditioning()
    (tmp_path / "unet").mkdir()
    (tmp_path / "text_encoder").mkdir()
    files = [str(tmp_path / "unet" / "model.safetensors")]
    known = {"text_encoder": digest([one, other]), "text_encoder_2": "of an encoder that is not there"}
    check_conditioning(files, known)  # nothing to compare with
    check_conditioning(files, None)
    for number, tensor in enumerate((one, other)):  # in two files
        save_file({f"any.name.{number}": tensor}, tmp_path / "text_encoder" / f"model-{number}.safetensors")
    check_conditioning(files, known)
    with pytest.raises(CheckpointError, match="another text_encoder"):
        check_conditioning(files, {"text_encoder": digest([one])})
    (tmp_path / "text_encoder" / "model-0.safetensors").write_bytes(b"no")
    with pytest.raises(CheckpointError, match="damaged"):
        check_conditioning(files, known)
