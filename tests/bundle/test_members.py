"""What a manifest says of its members, as a table and back."""

import copy

import pytest

from jaxsub.bundle import members

IDS = ("a/0", "a/1", "b")


def record(one, **more):
    return {"id": one, "path": f"/data/{one}", "format": "peft", "targets": ["q", "v"], **more}


@pytest.mark.parametrize(
    "records",
    [
        [record(i) for i in IDS],
        [record(i) for i in IDS[:1]],
        [record(i) for i in reversed(IDS)],
        [record(i, rank=n) for n, i in enumerate(IDS)],
        [record(IDS[0], task="x"), record(IDS[1]), record(IDS[2], task="y")],
        [record(i, path=f"/{n}") for n, i in enumerate(IDS)],
        [record(i, path="/same") for i in IDS],
        [{"id": i} for i in IDS],
    ],
)
def test_a_table_gives_its_records_back(records):
    before = copy.deepcopy(records)
    ids = tuple(r["id"] for r in records) if len(records) == 1 else IDS
    table = members.packed(records, ids)
    assert members.unpacked(table, ids) == before == records
    assert members.packed(members.unpacked(table, ids), ids) == table


def test_what_is_alike_stands_once():
    table = members.packed([record(i) for i in IDS], IDS)
    assert table == {"alike": {"format": "peft", "targets": ["q", "v"]}, "each": {}, "around": ["/data/", ""]}


@pytest.mark.parametrize("records", [None, [], [{"path": "x"}], [record("a", base=None)]])
def test_what_is_no_table_is_left_alone(records):
    assert members.packed(records, IDS) is None


def test_columns_of_other_lengths_are_refused():
    table = members.packed([record(i, rank=n) for n, i in enumerate(IDS)], IDS)
    table["each"]["rank"].pop()
    with pytest.raises(ValueError, match="argument"):
        members.unpacked(table, IDS)
