"""Series to pretrain on, the optimizer that reads them, and what a step sees."""

import numpy as np
import pytest
import torch

from experiments.training import synthetic
from experiments.training.muon import Muon


@pytest.mark.parametrize("family", [*synthetic.SINGLE, *synthetic.PAIRS])
def test_families_make_finite_series_that_a_seed_decides(family):
    made, again = (family(np.random.default_rng(7), 24, 150) for _ in range(2))
    assert np.isfinite(made).all()
    assert made.shape == ((24, 2, 150) if family in synthetic.PAIRS else (24, 150))
    assert np.array_equal(made, again)
    assert len(np.unique(made.reshape(24, -1), axis=0)) > 12


def test_groups_have_pairs_that_belong_together_only_if_asked_for():
    x, together = synthetic.groups(np.random.default_rng(0), 300, 176)
    assert x.shape == (300, 2, 176)
    np.testing.assert_allclose(x.mean(2), 0, atol=1e-3)
    alone = synthetic.groups(np.random.default_rng(0), 300, 176, pairs=False)[1]
    assert 0.1 < alone.mean() < together.mean() < 0.5


def test_steps_of_muon_are_those_of_torch_up_to_its_bf16():
    x = torch.randn(3, 40, 24, generator=torch.Generator().manual_seed(0))
    ours, theirs = (torch.nn.Parameter(x[0].clone()) for _ in range(2))
    muon, of_torch = Muon([ours], 0.1, 0.01), torch.optim.Muon([theirs], 0.1, 0.01, adjust_lr_fn="match_rms_adamw")
    for gradient in x[1:]:
        ours.grad = theirs.grad = gradient
        muon.step()
        of_torch.step()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0.05 * (ours - x[0]).abs().max().item())
