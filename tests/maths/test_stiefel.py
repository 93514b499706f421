"""Laws of steps on the Stiefel manifold."""

import pytest
import torch

from farss.maths.stiefel import cayley, orthonormal


def off(x):
    """How far the columns are from orthonormal."""
    return (x.double().T @ x.double() - torch.eye(x.shape[1])).abs().max().item()


@pytest.mark.parametrize(("rows", "rank"), [(40, 6), (7, 7), (9, 1)])
@pytest.mark.parametrize("rate", [1e-3, 0.7, 30.0])
def test_the_thin_step_is_the_dense_one(rows, rank, rate):
    """`X+ = (I + a/2 W)^-1 (I - a/2 W) X` with the m x m skew matrix W."""
    torch.manual_seed(0)
    x = torch.linalg.qr(torch.randn(rows, rank, dtype=torch.float64))[0]
    gradient, momentum = torch.randn(2, rows, rank, dtype=torch.float64)
    u = gradient - x @ (x.T @ gradient) / 2
    skew, identity = u @ x.T - x @ u.T, torch.eye(rows, dtype=torch.float64)
    rotation = torch.linalg.solve(identity + rate / 2 * skew, identity - rate / 2 * skew)
    found, carried = cayley(x, gradient, rate, momentum)
    torch.testing.assert_close(found, rotation @ x, rtol=0, atol=1e-12)
    torch.testing.assert_close(carried, rotation @ momentum, rtol=0, atol=1e-11)
    assert off(found) <= 1e-12


def test_it_walks_downhill_and_along_the_tangent():
    """The derivative at rate 0 is minus the projection of the gradient on the tangent space, `D - X sym(X^T D)`."""
    torch.manual_seed(0)
    x, gradient = torch.linalg.qr(torch.randn(12, 4, dtype=torch.float64))[0], torch.randn(12, 4, dtype=torch.float64)
    inner = x.T @ gradient
    tangent = gradient - x @ (inner + inner.T) / 2
    (found,) = cayley(x, gradient, 1e-6)
    torch.testing.assert_close((found - x) / 1e-6, -tangent, rtol=0, atol=1e-5)
    assert (gradient * (found - x)).sum() < 0


def test_a_thousand_steps_in_float32_stay_on_the_manifold():
    torch.manual_seed(0)
    x, worst = orthonormal(48, 8), 0.0
    for _ in range(1000):
        (x,) = cayley(x, torch.randn(48, 8) / 20, 0.1)
        worst = max(worst, off(x))
    assert worst <= 1e-5


def test_a_random_start_is_orthonormal_and_the_seeds():
    torch.manual_seed(3)
    one = orthonormal(20, 5)
    torch.manual_seed(3)
    assert torch.equal(one, orthonormal(20, 5))
    assert off(one) <= 1e-6
    assert one.dtype == torch.float32
    many = torch.stack([orthonormal(3, 2) for _ in range(2000)])
    assert many.mean(0).abs().max() <= 0.05  # no sign and no direction is preferred
