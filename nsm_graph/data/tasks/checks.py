r"""Checks of the numbers that describe a task."""


def check_at_least(task: str, option: str, value: object, minimum: int) -> None:
    """Raises unless the value is an integer of at least :obj:`minimum`."""
    # bool is an int to Python, but nobody means num_pairs=True.
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise ValueError(f"{task}: {option} is {value!r}; give an integer of at least {minimum}")


def check_is_bool(task: str, option: str, value: object) -> None:
    """Raises unless the value is true or false."""
    if not isinstance(value, bool):
        raise ValueError(f"{task}: {option} is {value!r}; give True or False")
