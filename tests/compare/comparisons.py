"""What the tests of comparisons read."""

import json


def read(folder):
    """The table of a comparison, as it is stored."""
    return json.loads((folder / "comparison.json").read_text())
