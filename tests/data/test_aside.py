import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from mmdit.data.aside import whole, write_whole


def test_many_may_write_the_same_file_at_once(tmp_path):
    path = tmp_path / "new" / "file"
    contents = [bytes([i]) * 10_000 for i in range(8)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda data: write_whole(path, data), contents * 5))
    assert path.read_bytes() in contents
    assert [found.name for found in path.parent.iterdir()] == ["file"]


def test_a_write_that_fails_leaves_what_was_there(tmp_path):
    path = tmp_path / "file"
    write_whole(path, b"before")
    with pytest.raises(KeyboardInterrupt), whole(path) as file:
        file.write(json.dumps("after").encode())
        raise KeyboardInterrupt
    assert path.read_bytes() == b"before"
    assert [found.name for found in tmp_path.iterdir()] == ["file"]
