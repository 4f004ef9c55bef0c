"""Rules in SQL: the built-in rules said as queries, the algebra, features, biases, bad input."""

import copy
import os
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from edge_sets import edges_of
from hypothesis import given, settings
from hypothesis import strategies as st

import nsm_graph as nsm
from nsm_graph import topology
from nsm_graph.relation import Relation
from nsm_graph.topology import NodeSet

pytest.importorskip("duckdb", reason="topology.sql needs DuckDB: pip install 'nsm-graph[sql]'")

PAIRS = "SELECT k.id AS src, q.id AS dst FROM nodes q JOIN nodes k ON k.example = q.example"
BETWEEN = PAIRS.replace("nodes q", "targets q").replace("nodes k", "sources k")
COUNTED = f"WITH n AS (SELECT *, count(*) OVER (PARTITION BY example) AS many FROM nodes) {PAIRS}"
COUNTED = COUNTED.replace("nodes q", "n q").replace("nodes k", "n k")

# Each built-in rule, and the same as a query.
SAME = {
    "complete": (topology.complete(), PAIRS),
    "self_loops": (topology.self_loops(), "SELECT id AS src, id AS dst FROM nodes"),
    "window": (topology.window(2), f"{PAIRS} AND k.pos BETWEEN q.pos - 2 AND q.pos"),
    "band": (topology.band(2), f"{PAIRS} WHERE abs(k.pos - q.pos) <= 2"),
    "causal": (topology.causal(), f"{PAIRS} WHERE k.pos <= q.pos; -- itself and all before"),
    "path": (topology.path(), f"{PAIRS} WHERE abs(k.pos - q.pos) = 1"),
    "dilated": (topology.dilated(1, 3), f"{PAIRS} WHERE k.pos - q.pos IN (-3, 0, 3)"),
    "star": (topology.star(), f"{PAIRS} WHERE k.id <> q.id AND least(k.slot, q.slot) = 0"),
    "tree": (
        topology.tree(2),
        f"{PAIRS} WHERE k.id <> q.id AND (k.pos = (q.pos - 1) // 2 OR q.pos = (k.pos - 1) // 2)",
    ),
    "ring": (
        topology.ring(),
        f"{COUNTED} WHERE k.id <> q.id AND (k.pos - q.pos + q.many) % q.many IN (1, q.many - 1)",
    ),
    "blocks": (
        topology.blocks(2),
        f"{COUNTED} WHERE k.pos * 2 // k.many = q.pos * 2 // q.many",
    ),
}


@pytest.mark.parametrize("name", SAME)
@given(st.lists(st.sampled_from([0, 2, 3, 4, 7]), max_size=4))
@settings(max_examples=30)
def test_a_query_is_the_rule_it_says(name, counts):
    rule, query = SAME[name]
    assert edges_of(topology.sql(query), counts) == edges_of(rule, counts)


def test_the_closure_of_a_path_is_causal():
    rule = topology.sql("""
        WITH RECURSIVE reached AS (
            SELECT id AS src, id AS dst FROM nodes
            UNION
            SELECT r.src, n.id FROM reached r JOIN nodes m ON m.id = r.dst
            JOIN nodes n ON n.example = m.example AND n.pos = m.pos + 1
        )
        FROM reached
    """)
    assert edges_of(rule, [5, 1, 4]) == edges_of(topology.causal(), [5, 1, 4])


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=4))
@settings(max_examples=15)
def test_between_two_sets(counts):
    sources, targets = (NodeSet.from_counts([pair[side] for pair in counts]) for side in (0, 1))
    query = f"{BETWEEN} AND k.pos BETWEEN q.pos - 2 AND q.pos + 2"
    rule, band = topology.sql(query), topology.band(2)
    for kinds in ("", " AND k.kind = 'token' AND q.kind = 'state' AND k.slot IS NULL"):
        found = topology.sql(query + kinds)(sources, targets)
        assert found.size == (sources.num_nodes, targets.num_nodes)
        assert found.edge_index.equal(band(sources, targets).edge_index)
    back = rule.reverse()(targets, sources)
    assert back.edge_index.equal(band(targets, sources).edge_index)
    assert rule(sources).edge_index.equal(band(sources).edge_index)


def test_ids_of_targets_go_on_after_those_of_sources():
    sources, targets = NodeSet.from_counts([3]), NodeSet.from_counts([2])
    rule = topology.sql("SELECT 2 AS src, 4 AS dst UNION ALL SELECT 0, 3")
    assert rule(sources, targets).edge_index.tolist() == [[0, 2], [0, 1]]
    seen = topology.sql("SELECT DISTINCT 0 AS src, 3 AS dst FROM nodes WHERE id = 4 AND pos = 1")
    assert seen(sources, targets).num_edges == 1


def test_a_set_with_slots_holds_states():
    tokens = NodeSet.from_counts([2])
    states = replace(NodeSet.from_counts([3]), slots=torch.tensor([5, 7, 9]))
    read = topology.sql(f"{BETWEEN} WHERE q.kind = 'state' AND q.slot > 5 AND k.kind = 'token'")
    assert read(tokens, states).edge_index.tolist() == [[0, 1, 0, 1], [1, 1, 2, 2]]
    back = topology.sql(f"{BETWEEN} WHERE k.kind = 'state' AND k.slot > 5 AND q.kind = 'token'")
    assert back(states, tokens).edge_index.tolist() == [[1, 2, 1, 2], [0, 0, 1, 1]]
    alone = topology.sql(f"{PAIRS} WHERE k.kind = 'state' AND k.slot = 7")
    assert alone(states).edge_index.tolist() == [[1, 1, 1], [0, 1, 2]]


# Attributes and states #################################################################


def test_attributes_are_columns():
    weight = torch.tensor([0.5, 2.0, 1.0, 3.0])
    attributes = {
        "weight": weight.bfloat16(),
        "is_new": weight > 1,
        "Place of it": torch.tensor([[1, 2], [3, 4], [5, 6], [7, 8]]),
        "pos": torch.tensor([10, 30, 20, 40]),
    }
    nodes = NodeSet.from_counts([4], attributes=attributes)
    for condition, expected in {
        "k.weight > q.weight": weight.unsqueeze(0) > weight.unsqueeze(1),
        "k.is_new AND NOT q.is_new": (weight > 1) & (weight <= 1).unsqueeze(1),
        "k.pos > q.pos": attributes["pos"] > attributes["pos"].unsqueeze(1),
        'k."place of it"[2] = 4 AND q.id = 0': torch.zeros(4, 4).index_fill(0, torch.tensor(0), 1)
        * torch.tensor([0, 1, 0, 0]),
    }.items():
        edges = topology.sql(f"{PAIRS} WHERE {condition}")(nodes).edge_index
        assert edges.equal(expected.nonzero().T.flip(0)), condition


def test_by_an_attribute_like_the_built_in_rules():
    pos = torch.tensor([3, 1, 2, 5, 1, 1])
    nodes = NodeSet.from_counts([4, 2], attributes={"pos": pos, "kind": pos % 2})
    window = topology.sql(f"{PAIRS} AND k.pos BETWEEN q.pos - 2 AND q.pos")(nodes)
    assert window.edge_index.equal(topology.window(2, by="pos")(nodes).edge_index)
    kinds = topology.sql(f"{PAIRS} AND k.kind = q.kind")(nodes)
    assert kinds.edge_index.equal(topology.blocks(by="kind")(nodes).edge_index)


def test_kinds_have_names():
    """The example of the documents: states are heard by all, tokens by their neighbours."""
    kind = torch.tensor([1, 0, 0, 0, 1, 0])
    nodes = NodeSet.from_counts([4, 2], attributes={"kind": kind})
    rule = topology.sql(
        f"{PAIRS} WHERE k.kind = 'state' OR k.pos BETWEEN q.pos - 1 AND q.pos",
        kinds=("token", "state"),
    )
    expected = {(0, j) for j in range(4)} | {(1, 1), (1, 2), (2, 2), (2, 3), (3, 3)}
    expected |= {(4, 4), (4, 5), (5, 5)}
    assert set(map(tuple, rule(nodes).edge_index.T.tolist())) == expected
    with pytest.raises(ValueError, match=r"names the kinds 0..1, but .* has row 2: 7, row 3: -1"):
        rule(NodeSet.from_counts([4], attributes={"kind": torch.tensor([0, 1, 7, -1])}))
    with pytest.raises(ValueError, match=r"one integer for each node, but .* torch.float32"):
        rule(NodeSet.from_counts([1], attributes={"kind": torch.zeros(1)}))


def test_nan_is_null():
    values = torch.tensor([1.0, torch.nan, 3.0])
    nodes = NodeSet.from_counts([3], attributes={"f": values})
    rule = topology.sql(f"{PAIRS} AND k.f IS NULL")
    assert rule(nodes).edge_index.tolist() == [[1, 1, 1], [0, 1, 2]]


@given(st.lists(st.integers(0, 5), min_size=1, max_size=3), st.integers(0, 3))
@settings(max_examples=30)
def test_states_are_an_array(counts, seed):
    x = torch.randn(sum(counts), 3, generator=torch.Generator().manual_seed(seed))
    rule = topology.sql(
        f"{PAIRS} WHERE k.id <> q.id AND array_distance(k.x, q.x) <= 1.3", is_dynamic=True
    )
    assert rule.is_dynamic
    assert edges_of(rule, counts, x) == edges_of(topology.radius(1.3), counts, x)
    other = x.roll(1, 0)  # nothing is remembered of other states
    assert edges_of(rule, counts, other) == edges_of(topology.radius(1.3), counts, other)


def test_states_of_two_widths():
    tokens, states = NodeSet.from_counts([2], torch.ones(2, 3)), NodeSet.from_counts([2])
    states = replace(states, x=torch.tensor([[1.0, 0.0], [1.0, 5.0]]))
    both = "FROM nodes k JOIN nodes q ON k.kind = 'token' AND q.kind = 'state'"
    rule = topology.sql(
        f"SELECT k.id AS src, q.id AS dst {both} WHERE k.x[3] < q.x[2] AND len(q.x) = 2",
        is_dynamic=True,
    )
    assert rule(tokens, states).edge_index.tolist() == [[0, 1], [1, 1]]


def test_the_step_is_a_column():
    rule = topology.sql(f"{PAIRS} AND k.pos < q.step", is_dynamic=True)
    nodes = NodeSet.from_counts([3])
    assert [rule(replace(nodes, step=step)).num_edges for step in range(3)] == [0, 3, 6]


# Biases ##############################################################################


def test_a_bias_of_its_own():
    nodes = NodeSet.from_counts([4, 3])
    expected = topology.causal().biased(lambda edges: -0.5 * edges.distance)(nodes)
    query = PAIRS.replace(" FROM", ", -0.5 * (q.pos - k.pos) AS bias FROM", 1)
    relation = topology.sql(f"{query} WHERE k.pos <= q.pos ORDER BY hash(k.id + 10 * q.id)")(nodes)
    assert relation.edge_index.equal(expected.edge_index)
    assert relation.bias.dtype == torch.float64
    assert relation.bias.equal(expected.bias.double())


@pytest.mark.parametrize(
    "form", ["[k.pos, '-infinity'::FLOAT, 0.25]", "array_value(k.pos, -1/0, 0.25)"]
)
def test_a_bias_for_each_head(form):
    relation = topology.sql(PAIRS.replace(" FROM", f", {form} AS Bias FROM", 1))(
        NodeSet.from_counts([2, 3])
    )
    position = torch.tensor([0, 1, 0, 1, 2])[relation.edge_index[0]]
    others = torch.tensor([-torch.inf, 0.25]).expand(13, 2)
    assert relation.bias.equal(torch.cat([position.unsqueeze(1), others], dim=1).double())


def test_biases_in_the_algebra():
    nodes = NodeSet.from_counts([4])
    rule = topology.sql(PAIRS.replace(" FROM", ", k.pos AS bias FROM", 1) + " AND k.pos <= q.pos")
    twice = (rule | topology.ring().biased(lambda edges: edges.distance.float()))(nodes)
    for (i, j), bias in zip(
        twice.edge_index.T.tolist(), twice.bias.flatten().tolist(), strict=True
    ):
        ring = abs(i - j) if abs(i - j) in (1, 3) else 0
        assert bias == (i if i <= j else 0) + ring
    back = rule.reverse()(nodes)
    assert back.bias.flatten().equal(back.edge_index[1].double())
    assert (topology.complete() - rule)(nodes).bias is None


# As a rule among rules #################################################################


@given(st.lists(st.integers(0, 6), max_size=3))
@settings(max_examples=30)
def test_the_algebra(counts):
    query = topology.sql(f"{PAIRS} AND k.pos BETWEEN q.pos - 2 AND q.pos")
    window, path = topology.window(2), topology.path()
    for ours, theirs in (
        (query | path, window | path),
        (path | query, window | path),
        (query & path, window & path),
        (query - path, window - path),
        (path - query, path - window),
        (~query, ~window),
        (query.reverse(), window.reverse()),
        (query.power(2), window.power(2)),
        ((query - topology.self_loops()).with_self(), window),
    ):
        assert edges_of(ours, counts) == edges_of(theirs, counts), ours


def test_the_order_of_rows_does_not_matter():
    query = f"{PAIRS} AND k.pos <= q.pos ORDER BY "
    relations = [
        topology.sql(query + order)(NodeSet.from_counts([5, 4]))
        for order in ("src, dst", "dst DESC, src DESC", "hash(k.id * 31 + q.id)")
    ]
    assert relations[0].edge_index.equal(topology.causal()(NodeSet.from_counts([5, 4])).edge_index)
    for relation in relations[1:]:
        assert relation.edge_index.equal(relations[0].edge_index)
        assert relation.csr.index.equal(relations[0].csr.index)


def test_it_runs_once_for_what_looks_the_same():
    rule = topology.sql(f"{BETWEEN} AND k.f > q.f")
    f = torch.tensor([1.0, 2.0, 3.0])

    def nodes(values, counts=(3,)):
        return NodeSet.from_counts(list(counts), torch.randn(3, 2), attributes={"f": values})

    first = rule(nodes(f))
    assert rule(nodes(f.clone())) is first  # states and step are out of sight
    assert rule(replace(nodes(f), step=4)) is first
    assert rule(nodes(f.flip(0))).edge_index.tolist() == [[0, 0, 1], [1, 2, 2]]
    assert rule(nodes(f, (1, 2))).edge_index.tolist() == [[2], [1]]
    assert rule(nodes(f.double())) is not first
    assert rule(replace(nodes(f), slots=torch.tensor([0, 1, 2]))) is not first
    assert rule(nodes(f), nodes(f)) is not first
    f[2] = 0.0  # in place
    assert rule(nodes(f)).edge_index.tolist() == [[1, 0, 1], [0, 2, 2]]
    assert rule(nodes(torch.tensor([1.0, 2.0, 3.0]))) is first


def test_training_after_an_evaluation_in_inference_mode():
    rule = topology.sql(PAIRS.replace(" FROM", ", -1.0 AS bias FROM", 1))
    with torch.inference_mode():
        assert rule(NodeSet.from_counts([4, 2])).csc.perm.numel() == 20
    relation = rule(NodeSet.from_counts([4, 2]))
    x = torch.randn(6, 2, 4, requires_grad=True)
    nsm.ops.edge_attention(x, x, x, relation).sum().backward()
    relation.sources.pad(x).sum().backward()
    assert x.grad.isfinite().all()


def test_what_is_written_into_an_answer_is_no_answer():
    rule = topology.sql(PAIRS.replace(" FROM", ", 2.0 AS bias FROM", 1))
    nodes = NodeSet.from_counts([2])
    rule(nodes).bias.mul_(5)
    assert (rule(nodes).bias == 2).all()
    rule.query = f"{EDGES} FROM nodes"
    assert rule(nodes).edge_index.tolist() == [[0, 1], [0, 1]] and rule(nodes).bias is None
    rule.query = f"{EDGES} FROM nodes WHERE random() < 0.5"
    with pytest.raises(ValueError, match=r"uses random\(\)"):
        rule(nodes)


def test_description_and_drawing():
    rule = topology.sql(SAME["ring"][1])
    summary = rule.describe(8)
    assert summary[1:] == topology.ring().describe(8)[1:]
    assert repr(rule).startswith("sql('WITH n AS (SELECT *, count(*) OVER (PARTITION BY")
    assert len(repr(rule)) < 70 and repr(rule) in str(summary)
    assert repr(topology.sql("SELECT 1 AS src,\n  2 AS dst")) == "sql('SELECT 1 AS src, 2 AS dst')"
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    assert rule.plot(6).get_title() == repr(rule)
    pyplot.close("all")


def test_copies_and_pickles():
    rule = topology.sql(f"{PAIRS} AND k.pos <= q.pos")
    edges = edges_of(rule, [4])
    for other in (copy.deepcopy(rule), pickle.loads(pickle.dumps(rule))):
        assert edges_of(other, [4]) == edges and repr(other) == repr(rule)


def test_threads_and_processes_do_not_meet():
    def ask(width):
        rule = topology.sql(f"{PAIRS} AND k.pos BETWEEN q.pos - {width} AND q.pos")
        return edges_of(rule, [9 + width]) == edges_of(topology.window(width), [9 + width])

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(ask, list(range(8)) * 2))
    if hasattr(os, "fork"):
        child = os.fork()
        if child == 0:
            os._exit(0 if ask(2) else 1)
        assert os.waitpid(child, 0)[1] == 0


# In a machine #########################################################################


def machine(rule):
    torch.manual_seed(0)
    return nsm.NeuralStateMachine(2, 8, 6, 1, segment_length=3, heads=2, communication=rule)


@pytest.mark.parametrize(
    ("rule", "same"),
    [
        (topology.sql(SAME["ring"][1]), topology.ring()),
        (topology.sql(f"{PAIRS} WHERE k.kind = 'state' AND k.slot < 2"), None),
        (
            topology.sql(f"{PAIRS} AND array_distance(k.x, q.x) <= 3", is_dynamic=True),
            topology.radius(3.0).with_self(),
        ),
        (topology.sql(f"{PAIRS} AND k.pos <= q.step", is_dynamic=True), None),
        (
            topology.sql(PAIRS.replace(" FROM", ", [0.5 * k.pos, -q.pos] AS bias FROM", 1))
            | topology.ring(),
            None,
        ),
    ],
)
def test_a_machine_trains_with_it(rule, same):
    ours = machine(rule)
    x, batch = torch.randn(17, 2), torch.tensor([0] * 11 + [1] * 6)
    optimizer = torch.optim.SGD(ours.parameters(), lr=1e-3)
    before = ours(x, batch)
    if same is not None:
        assert torch.allclose(before, machine(same)(x, batch), atol=1e-6)
    before.square().sum().backward()
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    optimizer.step()
    assert ours(x, batch).square().sum() < before.square().sum()
    ours.eval()
    torch.testing.assert_close(
        ours(x, batch), torch.cat([ours(x[:11]), ours(x[11:])]), rtol=1e-4, atol=1e-5
    )


# What is refused #######################################################################

EDGES = "SELECT id AS src, id AS dst"


@pytest.mark.parametrize(
    ("query", "message"),
    [
        # Columns
        ("SELECT id AS src FROM nodes", r"must return the columns src and dst, .* returns src;"),
        (f"{EDGES}, pos FROM nodes", r"but returns src, dst, pos; name them with AS"),
        ("SELECT id AS src, id AS src FROM nodes", r"must return the columns src and dst"),
        ("DESCRIBE nodes", r"must return the columns src and dst, .* column_name, column_type"),
        ("SELECT 0.5 AS src, 1 AS dst", r"integers, but src is DECIMAL\(2,1\); return the column"),
        ("SELECT 0 AS src, kind AS dst FROM nodes", r"integers, but dst is VARCHAR"),
        (f"{EDGES}, kind AS bias FROM nodes", r"one for each head .*, but bias is VARCHAR"),
        # Rows
        (
            "SELECT nullif(id, 1) AS src, id AS dst FROM nodes",
            r"must not return NULL, but 1 of its 7 rows do not: \(NULL -> 1\); exclude such rows",
        ),
        ("SELECT NULL AS src, 0 AS dst", r"must not return NULL, .*: \(NULL -> 0\)"),
        (
            "SELECT id + 5 AS src, id AS dst FROM nodes",
            r"must return ids of the 7 nodes, 0..6, but 5 of its 7 rows do not: \(7 -> 2\), "
            r"\(8 -> 3\), \(9 -> 4\) and 2 more; return the column id",
        ),
        ("SELECT 0 AS src, id - 1 AS dst FROM nodes WHERE id < 2", r"0..6, .*: \(0 -> -1\)"),
        (
            "SELECT k.id AS src, q.id AS dst FROM nodes k, nodes q",
            r"must stay inside each example, but 24 of its 49 rows do not: \(3 -> 0\), \(4 -> 0\)"
            r".* and 21 more; join on k.example = q.example",
        ),
        (
            f"{EDGES} FROM nodes UNION ALL SELECT 2, 2 UNION ALL SELECT 1, 2",
            r"must return every edge once, but 1 of its 9 rows do not: \(2 -> 2\); use SELECT DIST",
        ),
        (f"{EDGES}, nullif(pos, 2) AS bias FROM nodes", r"not return NULL.*\(2 -> 2, bias NULL\)"),
        (f"{EDGES}, 'nan'::DOUBLE AS bias FROM nodes", r"bias that is a number.* -> 0, bias nan\)"),
        (f"{EDGES}, 1 / 0 AS bias FROM nodes", r"bias that is a number.*\(0 -> 0, bias inf\)"),
        (f"{EDGES}, [1, NULL] AS bias FROM nodes", r"not return NULL.*bias 1.0, NULL\)"),
        (f"{EDGES}, NULL::INT[] AS bias FROM nodes", r"not return NULL.*bias NULL\)"),
        (
            f"{EDGES}, CASE id WHEN 3 THEN [1] ELSE [1, 2] END AS bias FROM nodes",
            r"as many biases for every edge \(one for each head\), but 1 of .* \(3 -> 3, bias 1.0",
        ),
        # What DuckDB refuses
        ("SELEC 1", r"Parser Error: syntax error at or near(.|\n)*The query:\nSELEC 1"),
        ("SELECT sloth AS src FROM nodes", r"\"sloth\" not found(.|\n)*id, example, kind, slot"),
        ("SELECT x AS src, 0 AS dst FROM nodes", r"is_dynamic=True adds x, the current states"),
        ("SELECT * FROM edges", r"DuckDB cannot run the query: Catalog Error: Table with name edg"),
        ("SELECT 2::HUGEINT << 70 AS src, 0 AS dst", r"Conversion Error: .* out of range"),
        ("SELECT error('no') AS src, 0 AS dst", r"DuckDB cannot run the query: .*no"),
        ("SELECT $1 AS src, 0 AS dst", r"run the query: .*(not provided|prepared parameter)"),
        # What would reach anything else
        ("CREATE TABLE t AS SELECT 1", r"must be one SELECT, which changes nothing, but is CREATE"),
        ("DELETE FROM nodes", r"must be one SELECT, .* but is DELETE"),
        (
            f"WITH d AS (DELETE FROM nodes RETURNING id) {EDGES} FROM d",
            r"must be one SELECT, which changes nothing, but holds DELETE",
        ),
        (
            f"WITH d AS (UPDATE nodes SET pos = 0 RETURNING id) {EDGES} FROM (FROM d)",
            r"must be one SELECT, which changes nothing, but holds UPDATE",
        ),
        (
            f"WITH d AS (INSERT INTO nodes FROM nodes RETURNING id) {EDGES} FROM d",
            r"must be one SELECT, which changes nothing, but holds INSERT",
        ),
        ("COPY nodes TO 'x.csv'", r"must be one SELECT, .* but is COPY"),
        ("SET threads = 4", r"must be one SELECT, .* but is SET"),
        (f"{EDGES} FROM nodes; DROP TABLE nodes", r"must be one SELECT, .* but holds 2 statements"),
        ("-- nothing", r"must be one SELECT, .* but holds 0 statements"),
        (f"SELECT * FROM read_text('{__file__}')", r"Permission Error: Cannot access file"),
        (f"SELECT * FROM '{__file__}'", r"DuckDB cannot run the query: (Catalog|Permission) Error"),
        ("SELECT * FROM EDGES", r"Table with name EDGES does not exist"),
        # What differs from run to run
        (f"{EDGES} FROM nodes WHERE random() < 0.5", r"uses random\(\), which is not the same"),
        (f"{EDGES} FROM nodes WHERE now() > current_date", r"uses current_date, now\(\), which"),
        (f"{EDGES} FROM nodes USING SAMPLE 3 ROWS", r"uses a sample without a seed \(USING"),
        (f"{EDGES} FROM nodes WHERE current_localtime() > '1:00'", r"uses current_localtime\(\)"),
        (
            f"{EDGES} FROM nodes WHERE current_localtimestamp() > '2020-01-01'",
            r"uses current_localtimestamp\(\), which is not the same",
        ),
        (f"{EDGES} FROM nodes WHERE age('2020-01-01'::TIMESTAMP) > '1 day'", r"age\(\) of one"),
        (f"{EDGES} FROM query('FROM nodes WHERE random() < 1')", r"uses query\(\), whose argument"),
        (f"{EDGES} FROM query_table('nodes')", r"uses query_table\(\), .* write it in its place"),
    ],
)  # fmt: skip
def test_bad_queries(query, message):
    with pytest.raises(ValueError, match=rf"sql\((.|\n)*{message}"):
        topology.sql(query)(NodeSet.from_counts([3, 4]))


def test_a_sample_with_the_seed_that_the_error_names():
    sample = "USING SAMPLE reservoir(3 ROWS)"
    nodes = NodeSet.from_counts([3, 4])
    with pytest.raises(ValueError, match="a sample without a seed") as error:
        topology.sql(f"{EDGES} FROM nodes {sample}")(nodes)
    seeded = f"{sample} REPEATABLE (42)"
    assert seeded in str(error.value)
    first, second = (topology.sql(f"{EDGES} FROM nodes {seeded}")(nodes) for _ in range(2))
    assert first.num_edges == 3 and first.edge_index.equal(second.edge_index)


def test_the_time_between_two_times_is_always_the_same():
    ages = "age('2020-01-02'::TIMESTAMP, '2020-01-01'::TIMESTAMP) > '1 hour'"
    assert topology.sql(f"{EDGES} FROM nodes WHERE {ages}")(NodeSet.from_counts([2])).num_edges == 2


def test_bad_input_between_two_sets():
    sources, targets = NodeSet.from_counts([2, 1]), NodeSet.from_counts([2, 2])
    for query, shown in (("SELECT 3 AS src, 3 AS dst", "3 -> 3"), (PAIRS, "0 -> 0")):
        with pytest.raises(
            ValueError,
            match=rf"of the 3 sources, 0..2, as src and of the 4 targets, 3..6, .*: \({shown}\)",
        ):
            topology.sql(query)(sources, targets)
    with pytest.raises(ValueError, match=r"stay inside each example, .*: \(2 -> 3\), \(2 -> 4\),"):
        topology.sql("SELECT k.id AS src, q.id AS dst FROM sources k, targets q")(sources, targets)
    with pytest.raises(ValueError, match="given 2 examples of sources, but 1 of targets"):
        topology.sql(PAIRS)(sources, NodeSet.from_counts([2]))


def test_bad_arguments_and_attributes():
    for query in ("", "  \n", None, 3):
        with pytest.raises(ValueError, match="sql takes a SELECT statement as text, but got"):
            topology.sql(query)
    with pytest.raises(ValueError, match="kinds must be a sequence of names, but is 'token'"):
        topology.sql(PAIRS, kinds="token")
    rule = topology.sql(PAIRS)
    for name, holds in {"ID": "ids", "example": "examples"}.items():
        nodes = NodeSet.from_counts([2], attributes={name: torch.zeros(2)})
        with pytest.raises(ValueError, match=f"called '{name}', but .* holds {holds}; give it ano"):
            rule(nodes)
    nodes = NodeSet.from_counts([2], attributes={"a": torch.zeros(2), "A": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"called 'A', but .* holds the attribute 'a'"):
        rule(nodes)
    for values in (torch.zeros(2, 3, 4), torch.zeros(2, 0), torch.zeros(2, dtype=torch.cfloat)):
        with pytest.raises(ValueError, match=r"holds numbers, or at least one .* 'a' has shape"):
            rule(NodeSet.from_counts([2], attributes={"a": values}))
    for values in (torch.zeros(3), torch.tensor(0.0), torch.zeros(1, 2)):
        nodes = replace(NodeSet.from_counts([2]), attributes={"a": values})
        with pytest.raises(ValueError, match=r"'a' must have one row for each of the 2 nodes, but"):
            rule(nodes)
    with pytest.raises(ValueError, match="an attribute is called '', which no column"):
        rule(NodeSet.from_counts([2], attributes={"": torch.zeros(2)}))
    nodes = NodeSet.from_counts([2], torch.zeros(2, 1), attributes={"x": torch.zeros(2)})
    assert rule(nodes).num_edges == 4
    with pytest.raises(ValueError, match=r"called 'x', but .* holds the current states"):
        topology.sql(PAIRS, is_dynamic=True)(nodes)
    with pytest.raises(ValueError, match="a node set has no x, hence the table neither"):
        topology.sql(f"{PAIRS} AND k.x[1] > 0", is_dynamic=True)(NodeSet.from_counts([2]))


def test_no_edges_and_no_nodes():
    nothing = topology.sql(f"{PAIRS} WHERE k.pos > 100")
    assert isinstance(nothing(NodeSet.from_counts([3, 0])), Relation)
    for counts in ([3, 0], [0, 0], []):
        assert edges_of(nothing, counts) == []
    biased = topology.sql(PAIRS.replace(" FROM", ", [1, 2] AS bias FROM", 1) + " AND k.pos > 100")
    assert biased(NodeSet.from_counts([3])).num_edges == 0


def test_it_says_what_it_needs(monkeypatch):
    monkeypatch.setitem(sys.modules, "duckdb", None)
    rule = topology.sql(PAIRS)
    with pytest.raises(ImportError, match=r"sql\(.*needs DuckDB: pip install 'nsm-graph\[sql\]'"):
        rule(NodeSet.from_counts([2]))
