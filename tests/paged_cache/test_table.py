from paged_cache.table import GONE, BlockTable


def test_positions_stay_where_they_are_when_the_front_is_given_up():
    table = BlockTable()
    table.append([7, 2, 11])
    assert table.trim(2) == [7, 2]
    assert (table.blocks, table.start, table.held) == ([GONE, GONE, 11], 2, [11])
    assert table.trim(1) == []
    table.append([5])
    assert table.trim(9) == [11, 5]
    assert len(table) == 4


def test_clear_returns_the_tail_first():
    table = BlockTable()
    table.append([7, 2, 11])
    table.trim(1)
    assert table.clear() == [11, 2]
    assert (len(table), table.start) == (0, 0)
