"""What is asked: question sets, the harness task files that ship with the package, and how answers are graded."""
