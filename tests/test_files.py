import hashlib
import tracemalloc

from support import files


def test_sha256_does_not_read_the_file_into_memory(tmp_path):
    content = bytes(range(256)) * 40_000                        # 10 MB, which is not a multiple of what is read at once
    (tmp_path / "a").write_bytes(content)
    tracemalloc.start()
    try:
        assert files.sha256(tmp_path / "a") == hashlib.sha256(content).hexdigest()
        assert tracemalloc.get_traced_memory()[1] < 4e6
    finally:
        tracemalloc.stop()
