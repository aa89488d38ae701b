"""Every function of the theory refuses what its rules refuse, by name and before any work."""

import pytest
import torch
from torch import nn

from subtuning_lab.inference.tuned_task import TunedTask
from subtuning_lab.theory.bounds import (
    Bound,
    bound_table,
    full_finetuning_bound,
    geometric_grid,
    selection_price,
    subtuning_bound,
    test_set_bound,
)
from subtuning_lab.theory.linearization import linearization_gap, taylor_logits, tuned_distance
from subtuning_lab.theory.measure import measure_bounds, rank_correlations
from subtuning_lab.theory.pac_bayes import binary_kl, gaussian_kl, kl_inverse, monte_carlo_upper, pac_bayes_bound
from subtuning_lab.theory.per_sample_grads import gradient_norms
from subtuning_lab.theory.rademacher import empirical_rademacher, rademacher_bound, ramp_error
from subtuning_lab.theory.weight_noise import half_prior_bound, noise_grid, noisy_bound, posterior_errors, readout_start
from tests.helpers import tiny_chain, tiny_split

HEAD = nn.Linear(6, 3)
TUNED = TunedTask(tiny_chain(), frozenset(), {"head": dict(HEAD.state_dict())}, ("a", "b", "c"))
IMAGES = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
NOISE = {"tuned": TUNED, "split": tiny_split(6)}
RATE = {"n": 9, "delta": 1.0}
#: function -> valid arguments that it can't do without
FUNCTIONS = {
    Bound: {"name": "a", "value": 0.5, "terms": {"b": 0.5}, "inputs": {}, "confidence": 0.9},
    bound_table: {"bounds": []},
    full_finetuning_bound: {**RATE, "params": 3},
    geometric_grid: {"low": 1, "high": 8},
    selection_price: {"n_blocks": 4, "max_blocks": 2},
    subtuning_bound: {**RATE, "tuned_params": 3, "n_blocks": 4, "max_blocks": 2},
    test_set_bound: {"errors": 1, "n": 5},
    linearization_gap: {"tuned": TUNED, "images": IMAGES},
    taylor_logits: {"tuned": TUNED, "images": IMAGES},
    tuned_distance: {"tuned": TUNED},
    measure_bounds: {"study": None, "subsets": {"a": []}},
    rank_correlations: {"table": None},
    binary_kl: {"q": 0.5, "p": 0.5},
    gaussian_kl: {"delta": 1.0, "sigma": 1.0},
    kl_inverse: {"q": 0.5, "budget": 1.0},
    monte_carlo_upper: {"errors": [0.1, 0.2], "failure": 0.1},
    pac_bayes_bound: {**RATE, "errors": [0.1, 0.2], "sigma": 1.0},
    gradient_norms: {"backbone": tiny_chain(), "head": HEAD, "images": IMAGES},
    empirical_rademacher: {"feature_norms": [1.0], "delta": 1.0},
    rademacher_bound: {**RATE, "feature_norms": 1.0, "margin": 1.0},
    ramp_error: {"margins": [1.0], "margin": 1.0},
    half_prior_bound: {"study": None, "blocks": []},
    noise_grid: {},
    noisy_bound: {**NOISE, "head_start": HEAD.state_dict()},
    posterior_errors: {**NOISE, "sigmas": [0.1], "head_sigmas": [0.1]},
    readout_start: {"tuned": TUNED},
}


@pytest.mark.parametrize(
    ("function", "name"),
    [(own, name) for own in FUNCTIONS for name in own.rules],
    ids=lambda own: getattr(own, "__name__", own),
)
def test_wrong_arguments_are_named(function, name):
    valid = {key: value for key, value in FUNCTIONS[function].items() if value is not None}
    for value in function.rules[name].wrong():
        with pytest.raises((TypeError, ValueError), match=rf"^{name}(\[[^]]*\])* is .*; it must be"):
            function(**valid | {name: value})
