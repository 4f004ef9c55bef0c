import doctest
import subprocess
import sys

import pytest

import nsm_graph.data
from nsm_graph.data import available, load
from nsm_graph.data.tasks import TASKS


def test_unknown_name_lists_the_names():
    with pytest.raises(ValueError, match="unknown dataset 'cifar'; choose one of digits, mnist"):
        load("cifar")


def test_unknown_option_lists_the_options():
    with pytest.raises(ValueError, match="'mnist' has no option 'permute'; its options are perm"):
        load("mnist", permute=True)


def test_options_and_defaults():
    assert list(available()) == ["digits", "mnist", "text", "tu", "zinc", *TASKS]
    assert available()["mqar"]["num_pairs"] == 4
    assert available()["s5"]["train_examples"] == 12_800
    assert available()["digits"] == {"validation_fraction": 0.1}
    assert available()["zinc"] == {"pe": None, "pe_channels": None}


def test_import_leaves_optional_packages_alone():
    code = "import sys, nsm_graph.data; print('sklearn' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_doctest():
    pytest.importorskip("sklearn")
    assert doctest.testmod(nsm_graph.data).failed == 0
