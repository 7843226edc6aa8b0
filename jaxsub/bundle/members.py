"""What a manifest says of each member, written once where all members are alike. Plain data in, plain data out.

500 adapters of one base and of the same targets would else have a quarter of their bundle's bytes in such words.
"""

ID, PATH = "id", "path"
MAX_PATH = 65536  # characters around an id


def packed(records, ids):
    """Records of members as a table.

    Args:
        records: list of dicts with "id", in any order.
        ids: the bundle's model ids.

    Returns:
        {"alike": fields that all records have with one value, "each": other fields as lists, None where a record lacks
        one}. Ids that are the bundle's are left out, and paths that only differ by them: "around" holds what stands
        before and after. None where the records are no such table.
    """
    if not records or any(ID not in record or None in record.values() for record in records):
        return None
    names = list(dict.fromkeys(name for record in records for name in record))
    each = {name: [record.get(name) for record in records] for name in names}
    alike = {n: column[0] for n, column in each.items() if n != ID and all(value == column[0] for value in column)}
    each = {name: column for name, column in each.items() if name not in alike}
    table = {"alike": alike, "each": each}
    if each.get(ID) == list(ids):
        del each[ID]
        around = _around(each.get(PATH), ids)
        if around:
            del each[PATH]
            table["around"] = around
    return table


def unpacked(table, ids):
    """The records of a table by `packed`.

    Raises:
        KeyError, ValueError, TypeError: a table that `packed` cannot have made.
    """
    each = dict(table["each"])
    each = each if ID in each else {ID: list(ids), **each}
    if "around" in table:
        before, after = table["around"]
        if len(before) + len(after) > MAX_PATH:  # once for every member
            raise ValueError("paths longer than any")
        each[PATH] = [before + one + after for one in each[ID]]
    columns = list(zip(*each.values(), strict=True))
    records = [dict(zip(each, values, strict=True)) for values in columns]
    return [{**{n: v for n, v in record.items() if v is not None}, **table["alike"]} for record in records]


def _around(paths, ids):
    """(before, after) such that every path is before + id + after, or None."""
    if not paths or ids[0] not in paths[0]:
        return None
    before, _, after = paths[0].rpartition(ids[0])
    return [before, after] if all(p == before + i + after for p, i in zip(paths, ids, strict=True)) else None
