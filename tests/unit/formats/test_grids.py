"""One entry for all kinds of formats: each computes as its own module does."""

import pytest
import torch

from hfq.errors import ConfigError, QuantizationError
from hfq.formats import ActivationSpec, activation, grids, log, twin
from hfq.formats.log import LogSpec
from hfq.formats.twin import TwinSpec

X = torch.linspace(0, 1, 50)
STEP, ZERO = torch.tensor([0.01]), torch.tensor([3.0])
STATIC = ActivationSpec(8, False, "tensor", dynamic=False)


@pytest.mark.parametrize(("spec", "params", "wanted"), [
    (ActivationSpec(4), None, activation.fake(X, ActivationSpec(4))),
    (STATIC, (STEP, ZERO), activation.fake(X, STATIC, (STEP, ZERO))),
    (LogSpec(3), (torch.ones(1), None), log.fake(X, 1.0, LogSpec(3))),
    (TwinSpec(6, 2), (STEP, None), twin.fake(X, STEP, TwinSpec(6, 2))),
])  # fmt: skip
def test_every_kind(spec, params, wanted):
    assert torch.equal(grids.fake(X, spec, params), wanted) and not torch.equal(wanted, X)
    assert grids.from_dict(spec.to_dict()) == spec


def test_what_is_missing_or_unknown_is_refused():
    for spec in (LogSpec(3), TwinSpec(6), STATIC):
        with pytest.raises(QuantizationError):
            grids.fake(X, spec)
    with pytest.raises(ConfigError, match="newer"):
        grids.from_dict({"form": "spiral", "bits": 4})
    with pytest.raises(ConfigError):
        grids.from_dict({"form": "twin", "base": "2"})
