"""Configs of the methods of activations and caches, typed wrong: errors that say what, where, and what to do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import hfq
from hfq.errors import ConfigError

WRONG: list[tuple[str, dict[str, Any], tuple[str, ...]]] = [
    ("affinequant", {"epoch": 3}, ("unknown field 'epoch' of AffineQuantConfig", "did you mean 'epochs'")),
    ("affinequant", {"let_lr": "5e-3"}, ("let_lr='5e-3'", "a finite number from 0 to 1")),
    ("affinequant", {"epochs": 2.0}, ("epochs=2.0", "an integer from 0 to 10000 or None")),
    ("affinequant", {"qk_mode": "off", "qk_matrix": True}, ("qk_matrix=True", "qk_mode='off'")),
    ("affinequant", {"maps": "diagonal", "ln_matrix": True}, ("ln_matrix=True", "maps='affine'")),
    ("affinequant", {"activation_bits": 4, "kv_bits": 1}, ("kv_bits=1", "2 bits at least")),
    ("ostquant", {"step": 3}, ("unknown field 'step' of OSTQuantConfig", "did you mean 'steps'")),
    ("ostquant", {"rotate": "yes"}, ("rotate='yes'", "True or False")),
    ("ostquant", {"steps": "150"}, ("steps='150'", "an integer from 0 to 1048576")),
    ("ostquant", {"act_order": True, "group_size": 32}, ("act_order=True", "static_groups=True")),
    ("ostquant", {"kv_bits": 4, "kv_cache": {"kv_bits": 4}}, ("kv_bits=4 and kv_cache", "say it once")),
    ("crossquant", {"alfa": 0.1}, ("unknown field 'alfa' of CrossQuantConfig", "did you mean 'alpha'")),
    ("crossquant", {"alpha": "0.15"}, ("alpha='0.15'", "a finite number from 0 to 1")),
    ("crossquant", {"alpha": float("nan")}, ("alpha=nan", "a finite number")),
    ("crossquant", {"mode": "dynamic", "token_scale": "paper"}, ("token_scale", "mode='static'")),
    ("crossquant", {"mode": "dynamic", "percentile": 99.0}, ("percentile", "mode='static'")),
    ("i_llm", {"qkalpha": 0.5}, ("unknown field 'qkalpha' of ILLMConfig", "did you mean 'qk_alpha'")),
    ("i_llm", {"clip_range": "15"}, ("clip_range='15'", "a finite number from 1 to 64")),
    ("i_llm", {"kv_cache": {"kv_bits": 4}}, ("kv_cache", "use kv_bits")),
    ("i_llm", {"overrides": {"*.v_proj": {"group_size": 32}}}, ("'group_size' of a single module", "only bits")),
    ("kvquant", {"outlier": 0.1}, ("unknown field 'outlier' of KVQuantConfig", "did you mean 'outliers'")),
    ("kvquant", {"outliers": "1%"}, ("outliers='1%'", "a finite number from 0 to 0.2")),
    ("kvquant", {"bits": 4}, ("bits=4", "leaves weights as they are", "kv_cache")),
    ("kvquant", {"group_size": 64}, ("group_size=64", "no groups of weights", "value_group")),
    ("kvquant", {"symmetric": True}, ("symmetric=True", "offset")),
    ("kvquant", {"modules_to_not_convert": ["*.0.*"]}, ("modules_to_not_convert", "one format")),
    ("kvquant", {"overrides": {"*.0.*": {"bits": 8}}}, ("overrides", "one format")),
    ("kvquant", {"window": 64}, ("window=64", "key_axis='channel'", "do not use it")),
    ("kvquant", {"datatype": "int", "iterations": 9}, ("iterations=9", "datatype='int'", "do not use it")),
    ("cfws", {"group_size": 64}, ("group_size=64", "one scale an output channel")),
    ("cfws", {"overrides": {"*": {"group_size": 64}}}, ("['group_size']=64", "one scale an output channel")),
    ("cfws", {"overrides": {"*": {"scale_dtype": "float32"}}}, ("'scale_dtype' of a single module",)),
    ("i_llm", {"group_size": 64}, ("group_size=64", "one scale an output channel")),
    ("kvquant", {"datatype": "int", "qnorm": True}, ("qnorm=True", "datatype='int'")),
    ("kvquant", {"key_axis": "window"}, ("key_axis='window'", "datatype='int'")),
    ("cbq", {"windows": 2}, ("unknown field 'windows' of CBQConfig", "did you mean 'window'")),
    ("cbq", {"rank": "5"}, ("rank='5'", "an integer from 1 to 65536")),
    ("cbq", {"overlap": 2}, ("overlap=2", "less than window=2")),
    ("cbq", {"bits": 16, "attention_bits": 4}, ("attention_bits=4 and bits=16", "bits=8 or less")),
    ("cbq", {"overrides": {"*.v_proj": {"rank": "x"}}}, (r"overrides['*.v_proj']['rank']='x'", "an integer")),
    ("dgq", {"group_size": 64}, ("group_size=64", "one grid an output channel", "groups are those of the inputs")),
    ("dgq", {"groups": 0}, ("groups=0", "an integer from 1 to 256")),
    ("dgq", {"group": 8}, ("unknown field 'group' of DGQConfig", "did you mean 'groups'")),
    ("dgq", {"axis": "channels"}, ("axis='channels'", "spread")),
    ("dgq", {"start_token": True}, ("start_token=True", "auto")),
]


@pytest.mark.parametrize("slug, options, words", WRONG, ids=[f"{slug} {options}" for slug, options, _ in WRONG])
def test_typed_wrong(slug: str, options: dict[str, Any], words: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as error:
        hfq.HfqConfig(method=slug, **options)
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize("slug, options", [
    ("affinequant", {"activation_bits": 4}), ("ostquant", {"activation_bits": 8}),
    ("crossquant", {"activation_bits": 4}),
    ("cbq", {"activation_bits": 8}),
])  # fmt: skip
def test_quantized_inputs_without_packed_layers_are_refused(slug: str, options: dict[str, Any]) -> None:
    model = LlamaForCausalLM(LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, vocab_size=64,
    ))  # fmt: skip
    config = hfq.HfqConfig(method=slug, bits=16, progress=False, calibration_samples=2, calibration_seqlen=8, **options)
    with pytest.raises(ConfigError, match=rf"activation_bits={options['activation_bits']} and bits=16.*bits=8"):
        hfq.quantize(model, config, torch.randint(0, 64, (2, 8)))
