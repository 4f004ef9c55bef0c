"""What every test has: one thread, a fixed seed, hypothesis without deadlines."""

import pytest
import torch
from hypothesis import settings

settings.register_profile("nsm_graph", deadline=None, database=None, derandomize=True)
settings.load_profile("nsm_graph")
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def poisoned_memory():
    """Fills every tensor that torch leaves uninitialised with NaN."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
