"""The transformer encoder, and the positions that it attends to."""

import pytest
import torch

import mtl
from mtl.trunks import Transformer


def mask(*lengths: int, longest: int = 6) -> torch.Tensor:
    return torch.arange(longest) < torch.tensor(lengths)[:, None]


@pytest.mark.parametrize("grad", [False, True])  # without gradients torch takes another, fused way
@pytest.mark.parametrize("kind", [torch.bool, torch.int64])
def test_padding_does_not_matter(grad: bool, kind: torch.dtype) -> None:
    torch.manual_seed(0)
    trunk = Transformer(vocabulary=10, max_length=8, num_features=8).eval()
    tokens, there = torch.randint(0, 10, (3, 6)), mask(6, 4, 1)
    others = tokens.where(there, 9 - tokens)
    with torch.set_grad_enabled(grad):
        features = trunk(tokens, there.to(kind))
        torch.testing.assert_close(features, trunk(others, there.to(kind)))
        for sample, length in enumerate((6, 4, 1)):  # nor do the others in the batch
            alone = trunk(tokens[sample : sample + 1, :length])
            torch.testing.assert_close(features[sample], alone[0], rtol=1e-4, atol=1e-5)
        assert not torch.allclose(features, trunk(tokens))


def test_a_sequence_without_tokens_is_zeros_and_leaves_the_gradients_finite() -> None:
    trunk = Transformer(vocabulary=10, max_length=6, num_features=8)
    features = trunk(torch.zeros(2, 6, dtype=torch.int64), mask(0, 3))
    assert torch.equal(features[0], torch.zeros(8))
    features.square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in trunk.parameters())


def test_gradients_reach_all_parameters_and_positions_matter() -> None:
    trunk = Transformer(in_features=5, max_length=6, num_features=12, num_layers=3, num_heads=3, dropout=0.0)
    patches = torch.randn(4, 6, 5)
    features = trunk(patches)
    assert features.shape == (4, trunk.num_features) == (4, 12)
    assert not torch.allclose(features, trunk(patches.flip(1)))
    (features * torch.randn(4, 12)).sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in trunk.parameters())


def test_layers_begin_with_values_of_their_own() -> None:
    first, second = Transformer(in_features=5, max_length=6).layers
    assert not torch.equal(first.self_attn.in_proj_weight, second.self_attn.in_proj_weight)
    assert not torch.equal(first.linear1.weight, second.linear1.weight)


def test_wrong_settings() -> None:
    for given in ({}, {"vocabulary": 3, "in_features": 3}):
        with pytest.raises(
            mtl.UserError, match="set either vocabulary, for sequences of token numbers, or in_features"
        ):
            Transformer(max_length=6, **given)
    with pytest.raises(mtl.UserError, match=r"num_heads is 5; it must divide num_features, 64"):
        Transformer(vocabulary=3, max_length=6, num_heads=5)
    with pytest.raises(mtl.UserError, match=r"max_length is 6, but a sequence has the length 7"):
        Transformer(vocabulary=3, max_length=6)(torch.zeros(1, 7, dtype=torch.int64))
