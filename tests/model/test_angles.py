"""The numbers behind every family's rotary embedding, against the model's own rotation."""

import pytest
import torch

from kvcalib.model.angles import Angles
from kvcalib.model.selftest import attention_layers
from kvcalib.model.taps import Taps
from kvcalib.runtime.loader import prove
from tests.model.test_families import FAMILIES
from tests.tiny import tiny_family, tiny_llama, tokens


def angles_and_rotation(model, layers=None):
    """Per layer: its angles, and the function that rotates keys `[1, H, T, D]` at positions `[1, T]` as the model."""
    found = {}

    class Look:
        def before(self, tap):
            pass

        def attend(self, call):
            tap = call.tap
            angles = Angles.of(tap.rotation, tap.rotary, call.key.shape[-1])
            x = torch.randn(1, 2, 6, call.key.shape[-1], generator=torch.Generator().manual_seed(1))
            positions = torch.tensor([[0, 1, 7, 64, 300, 511]])
            found[tap.layer] = (angles, x, positions[0], call.rotate_at(x, positions))
            return call.plain(call.rotate_new(call.query), call.rotate_new(call.key), call.value)

    layers = sorted(attention_layers(model)) if layers is None else layers
    with Taps(model, Look(), prove(model, layers)), torch.no_grad():
        model(tokens(1, 8), use_cache=False)
    return found


def turn(angles, x, positions):
    cos, sin = angles.at(positions)
    a, b = x[..., angles.first], x[..., angles.second]
    out = torch.empty_like(x)
    out[..., angles.first] = angles.scale * (a * cos - b * sin)
    out[..., angles.second] = angles.scale * (b * cos + a * sin)
    return out


@pytest.mark.parametrize("family", FAMILIES)
def test_angles_turn_keys_as_the_model_does(family):
    for layer, (angles, x, positions, expected) in angles_and_rotation(tiny_family(family)).items():
        assert angles is not None, f"{family}: layer {layer} has no angles"
        assert sorted(angles.first.tolist() + angles.second.tolist()) == list(range(x.shape[-1]))
        assert torch.allclose(turn(angles, x, positions), expected, atol=2e-4), f"{family}: layer {layer}"


def test_yarn_carries_its_scale():
    rope = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 128}
    for angles, x, positions, expected in angles_and_rotation(tiny_llama(rope_parameters=rope)).values():
        assert float(angles.scale[0]) > 1.05
        assert torch.allclose(turn(angles, x, positions), expected, atol=2e-4)


def test_rotations_that_change_with_the_length_have_no_angles():
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    assert all(angles is None for angles, *_ in angles_and_rotation(tiny_llama(rope_parameters=rope)).values())


def test_a_million_positions_are_exact():
    angles = next(iter(angles_and_rotation(tiny_llama()).values()))[0]
    positions = torch.tensor([999_983, 1_000_000])
    cos, sin = angles.at(positions)
    angle = positions.numpy().astype("longdouble")[:, None] * angles.frequency.numpy().astype("longdouble")
    import numpy as np

    assert np.abs(cos.numpy() - np.cos(angle)).max() < 1e-7
    assert np.abs(sin.numpy() - np.sin(angle)).max() < 1e-7


def test_equal_angles_are_one_object():
    """Tables hang on it: another model of the kind, or the same one attached again, makes no new ones."""
    theta = {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
    first, same, other = (tiny_llama(seed, **more) for seed, more in ((0, {}), (1, {}), (0, theta)))
    found = [[angles for angles, *_ in angles_and_rotation(model).values()] for model in (first, same, other)]
    assert all(angles is found[0][0] for angles in found[0] + found[1])
    assert all(angles is found[2][0] for angles in found[2])
    assert found[2][0] is not found[0][0]
