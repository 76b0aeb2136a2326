"""Values along their principal axes: what the axes are, what turning costs, and that attention does not notice."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

from kvcalib.quant.basis import Basis

HEADS, DIM = 3, 8


def values(tokens: int = 200, seed: int = 0) -> torch.Tensor:
    """`[n, H, D]` whose channels vary together, about a mean."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(HEADS, DIM, DIM, generator=generator)
    return torch.einsum("nhd,hde->nhe", torch.randn(tokens, HEADS, DIM, generator=generator), mixed) + 3


def test_axes_are_those_of_scikit_learn():
    x = values()
    for head, axes in enumerate(Basis.principal(x).matrix):
        expected = PCA().fit(x[:, head].double().numpy())
        overlap = np.abs(expected.components_ @ axes.double().numpy())
        np.testing.assert_allclose(overlap, np.eye(DIM), atol=1e-5)
        turned = (x[:, head] @ axes).double().numpy()
        np.testing.assert_allclose(turned.var(0, ddof=1), expected.explained_variance_, rtol=1e-4)


def test_one_sample_has_one_basis_whatever_the_signs():
    matrix = Basis.principal(values()).matrix
    assert bool((matrix.gather(1, matrix.abs().argmax(1, keepdim=True)) > 0).all())
    assert torch.equal(matrix, Basis.principal(values()).matrix)
    assert torch.allclose(matrix, Basis.principal(-values()).matrix, atol=1e-5)


@pytest.mark.parametrize("tokens", [1, 2, 5])
def test_few_tokens_have_whole_axes(tokens):
    matrix = Basis.principal(values(tokens)).matrix
    assert torch.allclose(matrix.transpose(1, 2) @ matrix, torch.eye(DIM).expand(HEADS, -1, -1), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_there_and_back(dtype):
    x = values(30).to(dtype)
    basis = Basis.principal(x)
    forth = basis.rows_forth(x)
    assert forth.dtype == x.dtype
    within = 4 * torch.finfo(dtype).eps * float(x.abs().max()) if dtype.itemsize < 4 else 1e-5
    assert torch.allclose(basis.rows_back(forth), x, atol=within)
    expected = torch.einsum("nhd,hde->nhe", x.double(), basis.matrix.double())
    assert torch.allclose(forth.double(), expected, atol=within)
    stacked = x.view(5, 6, HEADS, DIM).transpose(1, 2)
    assert torch.equal(basis.forth(stacked).transpose(1, 2).reshape(forth.shape), basis.rows_forth(x))


def test_attention_over_turned_values_turns_back():
    """Two query heads a KV head: softmax weights do not see the axes."""
    x = values(12).double()
    basis = Basis.principal(x)
    weights = torch.rand(2, 4, 2 * HEADS, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    heads = torch.arange(2 * HEADS) // 2
    out, over = (torch.einsum("bqhn,nhd->bqhd", weights, v[:, heads]) for v in (x, basis.rows_forth(x)))
    assert torch.allclose(basis.output_back(over), out, atol=1e-5)
    assert not torch.allclose(over, out, atol=1e-1)


def test_the_loss_does_not_depend_on_the_axes():
    basis = Basis.principal(values())
    gradient, error = torch.randn(2, HEADS, 50, DIM, generator=torch.Generator().manual_seed(2)).double()
    curvature = gradient.transpose(1, 2) @ gradient
    turned = (error @ basis.matrix.double())[..., None]
    plain = error[..., None]
    before = (plain.transpose(2, 3) @ curvature[:, None] @ plain)[..., 0, 0]
    after = (turned.transpose(2, 3) @ basis.curvature_forth(curvature)[:, None] @ turned)[..., 0, 0]
    assert torch.allclose(before, after, rtol=1e-4)


@pytest.mark.parametrize(
    "x", [torch.zeros(0, 2, 4), torch.full((3, 2, 4), torch.nan), torch.full((1, 1, 1), torch.inf)]
)
def test_no_basis_of_what_is_no_sample(x):
    with pytest.raises(ValueError, match="finite values of 1 token or more"):
        Basis.principal(x)


@pytest.mark.parametrize("shape", [(4, 4), (2, 4, 3)])
def test_a_matrix_for_each_head(shape):
    with pytest.raises(ValueError, match="expected a square matrix"):
        Basis(torch.zeros(shape))
