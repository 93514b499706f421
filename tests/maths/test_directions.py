"""Laws of decomposition, scores, selection and start factors."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_models import quadratic_form

from farss.maths.directions import decompose, direction_scores, factors, overlap, select
from farss.maths.fisher import importance, output_energy
from farss.maths.moments import Covariance, Moment, energies, product


def psd(size, seed):
    x = torch.randn(size + 3, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return x.T @ x / (size + 3)


def matrix(m, n, seed=0):
    return torch.randn(m, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def svd(weight):
    parts = decompose(weight)
    return *parts.vectors(), parts.sigma


def assert_decomposes(weight, tolerance=1e-9):
    """Both bases are orthonormal and rebuild the weight."""
    u, v, sigma = svd(weight)
    identity = torch.eye(len(sigma), dtype=torch.float64)
    scale = max(sigma[0].item(), 1e-300)
    torch.testing.assert_close(u.T @ u, identity, rtol=0, atol=tolerance)
    torch.testing.assert_close(v.T @ v, identity, rtol=0, atol=tolerance)
    torch.testing.assert_close((u * sigma) @ v.T / scale, weight / scale, rtol=0, atol=tolerance)
    torch.testing.assert_close(sigma / scale, torch.linalg.svdvals(weight) / scale, rtol=0, atol=tolerance)
    assert (sigma[:-1] >= sigma[1:]).all()


@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (6, 6), (1, 4), (40, 8)])
def test_decomposition_rebuilds_the_weight(shape):
    assert_decomposes(matrix(*shape))
    u, _, _ = svd(matrix(*shape))
    assert (u.gather(0, u.abs().argmax(0)[None]) > 0).all()


def conditioned(shape, condition, seed=0):
    """A matrix whose singular values fall evenly from 1 to 1 / condition."""
    u, v, _ = svd(matrix(*shape, seed))
    sigma = torch.logspace(0, -torch.log10(torch.tensor(condition)).item(), min(shape), dtype=torch.float64)
    return (u * sigma) @ v.T, sigma


@pytest.mark.parametrize("shape", [(12, 9), (9, 12), (10, 10)])
@pytest.mark.parametrize("condition", [1e2, 1e4, 9e4, 1e6, 1e14])
def test_decomposition_of_ill_conditioned_weights(shape, condition):
    weight, sigma = conditioned(shape, condition)
    assert_decomposes(weight, 1e-7)
    torch.testing.assert_close(svd(weight)[2], sigma, rtol=1e-6, atol=1e-14)


@pytest.mark.parametrize("shape", [(23, 9), (9, 23)])
@pytest.mark.parametrize("condition", [1e2, 1e4, 1e14])  # strong, with a weak end, nearly rank-deficient
def test_a_weight_of_many_rows_is_taken_a_few_at_a_time(shape, condition, monkeypatch):
    """As those of large models are."""
    monkeypatch.setattr("farss.maths.directions.CHUNK", 5)
    assert_decomposes(conditioned(shape, condition)[0], 1e-7)


def test_rank_deficient_and_zero_weights():
    assert_decomposes(matrix(8, 2) @ matrix(2, 6))
    assert_decomposes(torch.zeros(4, 3, dtype=torch.float64))
    assert svd(torch.zeros(4, 3))[2].tolist() == [0, 0, 0]


@pytest.mark.parametrize("shape", [(40, 30), (30, 40), (30, 30)])
def test_some_vectors_are_those_of_all(shape):
    weight, _ = conditioned(shape, 1e4)
    parts, which = decompose(weight), torch.tensor([29, 3, 0, 28])
    for some, every in zip(parts.vectors(which), parts.vectors(), strict=True):
        torch.testing.assert_close(some, every[:, which])


@pytest.mark.parametrize("shape", [(60, 40), (40, 60), (50, 50)])
def test_float32_decomposition_is_close_at_the_strong_end(shape):
    weight = matrix(*shape)
    exact, fast = decompose(weight), decompose(weight, torch.float32)
    torch.testing.assert_close(fast.sigma.double(), exact.sigma, rtol=1e-4, atol=1e-4 * exact.sigma[0].item())
    first = torch.arange(5)
    for one, other in zip(exact.vectors(first), fast.vectors(first), strict=True):
        assert ((one * other).sum(0).abs() > 1 - 1e-5).all()


def test_overlap_counts_common_indices():
    assert overlap(torch.tensor([1, 2, 3, 4]), torch.tensor([4, 2, 9, 8])) == 0.5


def test_identity_moments_give_sigma_squared_and_mean_square():
    """Law 1: A = G = I gives s_i = sigma_i^2 and I = mean(W^2)."""
    weight = matrix(7, 5)
    _, _, sigma = svd(weight)
    ones, identity = torch.ones(5, dtype=torch.float64), torch.eye(5, dtype=torch.float64)
    torch.testing.assert_close(direction_scores(sigma, ones, ones), sigma**2)
    assert importance(identity, weight.T @ weight, (7, 5)) == pytest.approx(weight.square().mean().item())


@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (6, 6)])
def test_importance_and_scores_are_the_dense_quadratic_form(shape):
    """Law 1: for random A, G both equal vec(X)^T (A kron G) vec(X)."""
    m, n = shape
    weight, a, g = matrix(m, n), psd(n, 1), psd(m, 2)
    u, v, sigma = svd(weight)
    kronecker = torch.kron(a, g)

    def dense(x):
        flat = x.T.reshape(-1)  # vec stacks columns
        return (flat @ kronecker @ flat).item()

    assert importance(a, weight.T @ g @ weight, shape) == pytest.approx(dense(weight) / (m * n))
    assert importance(weight @ a @ weight.T, g, shape) == pytest.approx(dense(weight) / (m * n))
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
    u, v, sigma = svd(matrix(9, 6))
    chosen = [4, 0, 5]
    b, a = factors(u[:, chosen], sigma[chosen], v[:, chosen], scaling)
    torch.testing.assert_close(scaling * b @ a, (u[:, chosen] * sigma[chosen]) @ v[:, chosen].T)
    torch.testing.assert_close(b.norm(dim=0), a.norm(dim=1))


@pytest.mark.parametrize("size", [1, 7, 31])
def test_a_covariance_has_no_mean_in_it_whatever_the_parts(size):
    rows = matrix(31, 6, 3) + 100 * matrix(1, 6, 4)  # a mean that is far larger than what is left of it
    found = Covariance(torch.float32)
    found.add(rows[:0])
    for part in rows.float().split(size):
        found.add(part)
    centred = rows.float().double() - rows.float().double().mean(0)
    torch.testing.assert_close(found.mean.double(), centred.T @ centred / 31, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [1, 7, 31])
def test_moments_are_means_whatever_the_parts(size):
    rows, basis, through = matrix(31, 6, 3), torch.linalg.qr(matrix(4, 4)).Q, matrix(6, 4)
    plain, mapped = Moment(torch.float64), Moment(torch.float64, through)
    for part in rows.split(size):
        plain.add(part)
        mapped.add(part)
    mean = rows.T @ rows / 31
    torch.testing.assert_close(plain.mean, mean)
    torch.testing.assert_close(mapped.mean, through.T @ mean @ through)
    torch.testing.assert_close(energies(mapped.mean, basis), (basis.T @ mapped.mean @ basis).diagonal())


@pytest.mark.parametrize("shape", [(9, 6), (6, 9)])
def test_after_the_weight_or_on_its_vectors_is_the_same(shape):
    """u_i . delta = v_i . (W^T delta) / sigma_i, and v_i . h = u_i . (W h) / sigma_i."""
    weight = matrix(*shape)
    parts, rows = decompose(weight), matrix(31, 9, 5)
    after, on = Moment(torch.float64, weight if parts.tall else weight.T), Moment(torch.float64, parts.far())
    after.add(rows)
    on.add(rows)
    torch.testing.assert_close(energies(after.mean, parts.near) / parts.sigma**2, on.mean.diagonal())


def test_products_of_bfloat16_values_are_those_of_float32():
    """Wherever they are computed: a bfloat16 product has 16 significant bits, and sums are of 24 or more."""
    x, y = matrix(50, 64).bfloat16(), matrix(64, 20, 1).bfloat16()
    exact = x.double() @ y.double()
    torch.testing.assert_close(product(x, y, torch.float32).double(), exact, rtol=0, atol=2e-6 * 64)
    assert torch.get_float32_matmul_precision() == "highest"
    moment = Moment()
    moment.add(x)
    torch.testing.assert_close(moment.mean.double(), x.double().T @ x.double() / 50, rtol=0, atol=2e-6 * 64)


def test_a_moment_can_be_read_on_the_way():
    rows, moment = matrix(31, 9), Moment(torch.float64)
    for some in rows.split(10):
        moment.add(some)
        seen = rows[: moment.count]
        torch.testing.assert_close(moment.mean, seen.T @ seen / len(seen))


def test_a_direction_that_the_weight_does_not_have_can_be_trained():
    u, v = torch.eye(5, dtype=torch.float64)[:, :3], torch.eye(4, dtype=torch.float64)[:, :3]
    sigma = torch.tensor([2.0, 1e-3, 1e-16], dtype=torch.float64)
    b, a = factors(u, sigma, v, 1.0)
    torch.testing.assert_close(b @ a, u[:, :2] * sigma[:2] @ v[:, :2].T)
    assert torch.equal(a[2], v[:, 2])  # the gradient of B is not zero
    assert not b[:, 2].any()


def test_what_counts_is_the_part_of_the_weight_and_not_the_length_of_its_factors():
    """CorDA's sigma are those of the weight times the inputs' size: small where the inputs are, and its v as much longer."""
    u, v = torch.eye(5, dtype=torch.float64)[:, :2], torch.eye(4, dtype=torch.float64)[:, :2]
    sigma = torch.tensor([2.0, 1e-16], dtype=torch.float64)
    for scale in (1.0, 1e-12):
        b, a = factors(u, scale * sigma, v / scale, 1.0)
        torch.testing.assert_close(b @ a, u[:, :1] * sigma[:1] @ v[:, :1].T)
        assert not b[:, 1].any()


@pytest.mark.parametrize("how", ["high", "medium"])
def test_a_choice_of_fast_products_changes_no_direction(how):
    """Whoever calls the library may have made it, and so may a container."""
    weight, activations = matrix(64, 48).float(), matrix(200, 48, 1).float()
    activations[:, 0] += 30  # a direction that all tokens have in common

    def found():
        parts = decompose(weight, torch.float32)
        moment = Moment()
        moment.add(activations)
        return parts.sigma, parts.far(), energies(moment.mean, parts.near), torch.tensor(output_energy(weight, moment.mean))

    before = found()
    torch.set_float32_matmul_precision(how)
    try:
        after = found()
        assert torch.get_float32_matmul_precision() == how
    finally:
        torch.set_float32_matmul_precision("highest")
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))
