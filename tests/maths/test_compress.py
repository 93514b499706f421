"""Laws of compression and of effective ranks."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from farss.maths.compress import compress, effective_rank


@pytest.mark.parametrize("rank", [None, 3])
def test_compress_is_the_best_of_its_rank(rank):
    left, right = (
        torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(s)) for s, shape in enumerate([(9, 6), (6, 7)])
    )
    b, a, lost, _ = compress(left, right, rank)
    sigma = torch.linalg.svdvals(left @ right)
    expected = 0.0 if rank is None else (sigma[rank:].norm() / sigma.norm()).item()
    assert lost == pytest.approx(expected, abs=1e-12)
    assert ((b @ a - left @ right).norm() / sigma.norm()).item() == pytest.approx(expected, abs=1e-12)
    torch.testing.assert_close(b.norm(dim=0), a.norm(dim=1))


@pytest.mark.parametrize("energy", [0.3, 0.9, 1.0])
def test_compress_keeps_the_fewest_directions_with_the_energy(energy):
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((9, 5), (5, 7)))
    squares = torch.linalg.svdvals(left @ right)[:5].square()
    shares = squares.cumsum(0) / squares.sum()
    b, _, lost, _ = compress(left, right, energy=energy)
    kept = b.shape[1]
    assert shares[kept - 1] >= energy - 1e-12
    assert kept == 1 or shares[kept - 2] < energy
    assert lost == pytest.approx((1 - shares[kept - 1]).clamp_min(0).sqrt().item(), abs=1e-6)


def test_compress_nothing():
    b, a, lost, counting = compress(torch.zeros(4, 2), torch.zeros(2, 3))
    assert (b.shape, a.shape, lost, counting) == ((4, 0), (0, 3), 0.0, 0.0)


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=8), st.floats(0.01, 100))
def test_the_effective_rank_lies_between_one_and_the_rank_and_has_no_scale(values, scale):
    sigma = torch.tensor(values, dtype=torch.float64)
    assert 1 - 1e-9 <= effective_rank(sigma) <= len(values) + 1e-9
    assert effective_rank(scale * sigma) == pytest.approx(effective_rank(sigma))
    assert effective_rank(torch.cat([sigma, torch.zeros(3, dtype=torch.float64)])) == pytest.approx(effective_rank(sigma))


def test_equal_singular_values_all_count_and_none_counts_for_nothing():
    assert effective_rank(torch.full((5,), 0.3)) == pytest.approx(5)
    assert effective_rank(torch.tensor([2.0, 0.0])) == 1
    assert effective_rank(torch.zeros(4)) == 0


def test_a_product_has_the_effective_rank_of_its_singular_values():
    torch.manual_seed(0)
    left, right = torch.randn(20, 5, dtype=torch.float64), torch.randn(5, 30, dtype=torch.float64)
    sigma = torch.linalg.svdvals(left @ right)
    assert compress(left, right).effective_rank == pytest.approx(effective_rank(sigma[:5]))
    assert compress(left, right, rank=2).effective_rank == pytest.approx(effective_rank(sigma[:2]))
