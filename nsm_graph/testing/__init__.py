"""Assertions that users can call on layers of their own."""

from nsm_graph.testing.assertions import assert_batch_invariant as assert_batch_invariant
from nsm_graph.testing.assertions import assert_close_to_norm as assert_close_to_norm
from nsm_graph.testing.assertions import assert_matches_reference as assert_matches_reference
from nsm_graph.testing.assertions import random_relation as random_relation
