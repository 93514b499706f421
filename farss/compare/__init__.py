"""Several methods side by side: one table, and who is ahead."""

from farss.compare.comparison import compare, run_within, write_so_far
from farss.compare.entrants import check_labels, plans_of

__all__ = ["check_labels", "compare", "plans_of", "run_within", "write_so_far"]
