"""Choice and batches: laws."""

from farss.batches import batches, calibration_batches, choose, collate
from farss.config import CalibrationConfig


def test_choice_is_seeded_ordered_and_without_replacement() -> None:
    rows = list(range(100))
    drawn = choose(rows, 10, seed=3)
    assert drawn == choose(rows, 10, seed=3) != choose(rows, 10, seed=4)
    assert drawn == sorted(set(drawn))
    assert choose(rows, 100, 0) == choose(rows, 500, 1) == rows


def test_batches_hold_every_row_once() -> None:
    assert list(batches(range(5), 2)) == [[0, 1], [2, 3], [4]]


def test_collate_pads_on_the_right() -> None:
    rows = [{"input_ids": [5, 6, 7], "completion_mask": [0, 1, 1]}, {"input_ids": [8, 9], "completion_mask": [0, 1]}]
    right = collate(rows, pad_id=0)
    assert right["input_ids"].tolist() == [[5, 6, 7], [8, 9, 0]]
    assert right["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert right["labels"].tolist() == [[-100, 6, 7], [-100, 9, -100]]
    assert right["position_ids"].tolist() == [[0, 1, 2], [0, 1, 1]]
    assert collate(rows, pad_id=0, length=4)["input_ids"].tolist() == [[5, 6, 7, 0], [8, 9, 0, 0]]


def test_calibration_looks_at_rows_drawn_with_the_seed() -> None:
    """Of sorted data the first rows are of one kind."""
    rows = [{"input_ids": [number], "completion_mask": [0]} for number in range(100)]

    def seen(seed: int) -> list[int]:
        parts = calibration_batches(rows, CalibrationConfig(examples=10, batch_size=4), 0, seed)
        return sorted(int(number) for part in parts for number in part["input_ids"][:, 0])

    assert seen(1) == choose(list(range(100)), 10, 1) != seen(2)
