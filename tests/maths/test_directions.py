"""Laws of decomposition, scores, selection and start factors."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from farss.maths.directions import decompose, direction_scores, factors, is_accurate, select
from farss.maths.fisher import importance, quadratic_form
from farss.maths.moments import Moment


def psd(size, seed):
    x = torch.randn(size + 3, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return x.T @ x / (size + 3)


def matrix(m, n, seed=0):
    return torch.randn(m, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (6, 6), (1, 4), (40, 8)])
def test_decomposition_rebuilds_the_weight(shape):
    weight = matrix(*shape)
    u, sigma, v = decompose(weight)
    torch.testing.assert_close((u * sigma) @ v.T, weight)
    torch.testing.assert_close(sigma, torch.linalg.svdvals(weight))
    assert is_accurate(weight, decompose(weight), 1e-9)
    assert (u.gather(0, u.abs().argmax(0)[None]) > 0).all()


@pytest.mark.parametrize("condition", [1e2, 1e6, 1e14])
def test_decomposition_of_ill_conditioned_weights(condition):
    u, _, v = decompose(matrix(12, 9))
    sigma = torch.logspace(0, -torch.log10(torch.tensor(condition)).item(), 9, dtype=torch.float64)
    weight = (u * sigma) @ v.T
    assert is_accurate(weight, decompose(weight))
    torch.testing.assert_close(decompose(weight).sigma, sigma, rtol=1e-6, atol=1e-14)


def test_rank_deficient_and_zero_weights():
    thin = matrix(8, 2) @ matrix(2, 6)
    assert is_accurate(thin, decompose(thin))
    assert decompose(torch.zeros(4, 3)).sigma.tolist() == [0, 0, 0]


def test_identity_moments_give_sigma_squared_and_mean_square():
    """Law 1: A = G = I gives s_i = sigma_i^2 and I = mean(W^2)."""
    weight = matrix(7, 5)
    _, sigma, _ = decompose(weight)
    ones, identity = torch.ones(5, dtype=torch.float64), torch.eye(5, dtype=torch.float64)
    torch.testing.assert_close(direction_scores(sigma, ones, ones), sigma**2)
    assert importance(sigma, identity, identity, (7, 5)) == pytest.approx(weight.square().mean().item())


@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (6, 6)])
def test_importance_and_scores_are_the_dense_quadratic_form(shape):
    """Law 1: for random A, G both equal vec(X)^T (A kron G) vec(X)."""
    m, n = shape
    weight, a, g = matrix(m, n), psd(n, 1), psd(m, 2)
    u, sigma, v = decompose(weight)
    kronecker = torch.kron(a, g)

    def dense(x):
        flat = x.T.reshape(-1)  # vec stacks columns
        return (flat @ kronecker @ flat).item()

    assert importance(sigma, v.T @ a @ v, u.T @ g @ u, shape) == pytest.approx(dense(weight) / (m * n))
    assert quadratic_form(weight, a, g).item() == pytest.approx(dense(weight))
    scores = direction_scores(sigma, (v.T @ a @ v).diagonal(), (u.T @ g @ u).diagonal())
    for i in range(len(sigma)):
        assert scores[i].item() == pytest.approx(dense(sigma[i] * torch.outer(u[:, i], v[:, i])))


@given(st.lists(st.integers(0, 5), min_size=1, max_size=20), st.data())
def test_selection_orders_by_score_then_index(values, data):
    rank = data.draw(st.integers(1, len(values)))
    scores = torch.tensor(values, dtype=torch.float64)
    ascending = sorted(range(len(values)), key=lambda i: (values[i], i))
    assert select(scores, rank, "least").tolist() == ascending[:rank][::-1]
    assert select(scores, rank, "most").tolist() == ascending[-rank:][::-1]


@pytest.mark.parametrize("scaling", [0.25, 1.0, 2.0, 128.0])
def test_factors_are_exactly_the_chosen_part(scaling):
    u, sigma, v = decompose(matrix(9, 6))
    chosen = [4, 0, 5]
    b, a = factors(u[:, chosen], sigma[chosen], v[:, chosen], scaling)
    torch.testing.assert_close(scaling * b @ a, (u[:, chosen] * sigma[chosen]) @ v[:, chosen].T)
    torch.testing.assert_close(b.norm(dim=0), a.norm(dim=1))


@pytest.mark.parametrize("shape", [(20, 5), (9, 6), (6, 6)])
def test_moments_in_the_basis_whichever_way_they_are_summed(shape):
    size, directions = shape
    basis = torch.linalg.qr(matrix(size, directions)).Q
    rows = matrix(31, size, 3)
    moment = Moment(basis, torch.float64)
    for part in rows.split(7):
        moment.add(part)
    assert moment.projects == (size > 1.62 * directions)
    torch.testing.assert_close(moment.in_basis(), basis.T @ (rows.T @ rows / 31) @ basis)
