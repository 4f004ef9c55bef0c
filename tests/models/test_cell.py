"""The cell alone: a pure function of states, what was hoisted, and relations."""

import pytest
import torch
from machine_oracle import Options, read_segment, weights_of
from small_machines import make_machine, run
from torch import nn

from nsm_graph import Relation


def hoisted(machine, x, relation):
    place = torch.cat([torch.arange(int(n)) for n in relation.sources.ptr.diff()])
    inputs, weights = machine.cell.hoist(
        x, place, relation, machine.manager.importance, machine.manager.slots
    )
    return machine.cell.connect([inputs], machine.manager.slots)[0], weights


@pytest.mark.parametrize("cell", ["gru", "lstm"])
@pytest.mark.parametrize("mix", ["sum", "bias", "attention", "routing"])
def test_one_call_is_one_segment_of_the_equations(cell, mix):
    machine = make_machine(dtype=torch.double, cell=cell, mix=mix, position=None)
    x, s, c = (torch.randn(n, 4, dtype=torch.double) for n in (5, 6, 6))
    inputs, _ = hoisted(machine, x, Relation.complete([0, 3, 5], [0, 3, 6]))
    carried = c if cell == "lstm" else None
    out = machine.cell(s, carried, inputs)
    w, o = weights_of(machine), Options(3, cell=cell, mix=mix)
    for b, (tokens, rows) in enumerate(((x[:3], slice(0, 3)), (x[3:], slice(3, 6)))):
        before_c = None if carried is None else c[rows]
        states, cells = read_segment(w, o, tokens, s[rows], before_c, [0, 1, 2])
        torch.testing.assert_close(out.states[rows], states, rtol=0, atol=1e-10, msg=str(b))
        if cell == "lstm":
            torch.testing.assert_close(out.propagated.cell[rows], cells, rtol=0, atol=1e-10)
    assert out.attention is None
    assert out.reads is None


def test_it_changes_none_of_its_inputs_and_repeats():
    machine = make_machine()
    x, s = torch.randn(5, 4), torch.randn(6, 4)
    inputs, _ = hoisted(machine, x, Relation.complete([0, 3, 5], [0, 3, 6]))
    before = s.clone()
    first, second = machine.cell(s, None, inputs), machine.cell(s, None, inputs)
    assert torch.equal(s, before)
    assert torch.equal(first.states, second.states)


def test_split_cuts_what_was_hoisted_where_the_steps_are():
    for options in ({}, {"top_k": 1}, {"mix": "bias"}, {"position": "relative", "top_k": 2}):
        machine = make_machine(dtype=torch.double, segment_length=2, **options)
        x = torch.randn(9, 3, dtype=torch.double)
        record = run(machine, x, [5, 0, 4], record=True).record
        assert [r.num_dst for r in record.relations] == [6, 6, 3]
        assert [r.num_src for r in record.relations] == [4, 4, 1]
        for relation, weights in zip(record.relations, record.routing, strict=True):
            assert weights.numel() == relation.num_edges
            total = torch.zeros(relation.num_src, dtype=torch.double)
            total = total.index_add(0, relation.edge_index[0], weights)
            torch.testing.assert_close(total, torch.ones_like(total))


class Running(nn.Module):
    """A scan that adds each token to the state it stands at, and reads the sum so far."""

    gated_channels, gated_dropout = 4, 0.0  # the gates write every channel of the small machine

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.calls = []

    def convolve(self, x, examples, tail):
        return x

    def hoist(self, x, relation, weights, slots, reads):
        # One entry for each group: its tokens, padded.
        return (relation.sources.pad(x * self.scale),)

    def advance(self, states, hoisted, relation):
        rows = relation.sources.unpad(hoisted[0][:, : relation.sources.max_count])
        self.calls.append(rows.size(0))
        src, dst = relation.edge_index
        added = states.new_zeros(states.shape).index_add(0, dst, rows[src])
        return states + added, hoisted[0]


def test_the_seam_for_an_ordered_scan():
    scan = Running()
    machine = make_machine(scan=scan, head="token", segment_length=2, position=None)
    plain = make_machine(head="token", segment_length=2, position=None)
    plain.load_state_dict(machine.state_dict(), strict=False)
    x = torch.randn(5, 3)
    out = run(machine, x, [2, 3])
    assert scan.calls == [4, 1]
    assert (out.out - plain(x, torch.tensor([0, 0, 1, 1, 1]))).abs().max() > 1e-4
    out.out.sum().backward()
    assert scan.scale.grad.abs() > 0
    # The reads of the scan reach the tokens that they belong to.
    with torch.no_grad():
        scan.scale.zero_()
        machine.head.gains.fill_(1.0)  # everything but the scan, as much as without one
    silent = run(machine, x, [2, 3]).out
    torch.testing.assert_close(silent, plain(x, torch.tensor([0, 0, 1, 1, 1])))


def test_router_projection_rests_where_its_sums_are_not_used():
    machine = make_machine(mix="bias")
    assert not machine.cell.router.lin_out.weight.requires_grad
    assert make_machine().cell.router.lin_out.weight.requires_grad
