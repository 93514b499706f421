"""A few eigenpairs are those of the whole decomposition."""

import pytest
import torch

from farss.maths.eigenpairs import CLOSE, FEW, SMALL, largest_pairs

SIZE, COUNT = 400, 8


def matrix(spectrum):
    """A symmetric matrix with these eigenvalues, and its eigenvectors."""
    generator = torch.Generator().manual_seed(1)
    vectors = torch.linalg.qr(torch.randn(SIZE, SIZE, generator=generator, dtype=torch.float64)).Q
    return vectors * spectrum @ vectors.T, vectors


def counted(c):
    """`X -> C X`, which notes how many columns it was given."""
    columns = []

    def times(x):
        columns.append(x.shape[1])
        return c @ x

    return times, columns


SPECTRA = {
    "a power law": torch.arange(1, SIZE + 1).double() ** -1.5,
    "one huge": torch.cat([torch.tensor([1e6]).double(), torch.arange(1, SIZE).double() ** -1.0]),
    "repeated": torch.cat([torch.ones(COUNT + 3), torch.full((SIZE - COUNT - 3,), 1e-3)]).double(),
    "few beside zero": torch.cat([torch.tensor([3.0, 2.0]), torch.zeros(SIZE - 2)]).double(),
}


@pytest.mark.parametrize("spectrum", SPECTRA.values(), ids=SPECTRA)
def test_a_few_pairs_of_a_large_matrix_take_a_few_products(spectrum):
    assert SIZE >= FEW * COUNT
    c, known = matrix(spectrum)
    times, columns = counted(c)
    values, vectors = largest_pairs(times, c, COUNT)
    assert sum(columns) < SIZE / 2
    torch.testing.assert_close(values, spectrum[:COUNT], rtol=1e-9, atol=1e-12 * spectrum[0].item())
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(COUNT).double(), rtol=0, atol=1e-12)
    residuals = (c @ vectors - vectors * values).norm(dim=0)
    assert (residuals <= 2 * CLOSE * spectrum[:COUNT].clamp_min(SMALL * spectrum[0])).all()
    alone = (spectrum[:COUNT, None] - spectrum).abs().fill_diagonal_(1).min(1).values > 1e-3 * spectrum[:COUNT]  # or their vectors are any
    assert (vectors * known[:, :COUNT]).sum(0)[alone].abs() == pytest.approx(1, abs=1e-9)


def test_of_pairs_that_cannot_be_told_apart_soon_everything_is_decomposed():
    spectrum = torch.linspace(1, 0.9, SIZE, dtype=torch.float64)
    c, known = matrix(spectrum)
    times, columns = counted(c)
    values, vectors = largest_pairs(times, c, COUNT)
    assert columns[-1] == SIZE
    torch.testing.assert_close(values, spectrum[:COUNT], rtol=1e-12, atol=0)
    torch.testing.assert_close((known[:, :COUNT].T @ vectors).abs(), torch.eye(COUNT).double(), rtol=0, atol=1e-9)


def test_a_small_matrix_is_decomposed():
    c, _ = matrix(SPECTRA["a power law"])
    times, columns = counted(c[: FEW * COUNT - 1, : FEW * COUNT - 1])
    largest_pairs(times, c[: FEW * COUNT - 1], COUNT)
    assert columns == [FEW * COUNT - 1]


def test_nothing_gives_some_basis():
    c = torch.zeros(SIZE, SIZE, dtype=torch.float64)
    values, vectors = largest_pairs(lambda x: c @ x, c, COUNT)
    assert not values.any()
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(COUNT).double(), rtol=0, atol=1e-12)


def test_the_same_twice():
    c, _ = matrix(SPECTRA["a power law"])
    one, two = (largest_pairs(lambda x: c @ x, c, COUNT) for _ in range(2))
    assert torch.equal(one[0], two[0])
    assert torch.equal(one[1], two[1])
