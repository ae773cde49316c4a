"""Damaged safetensors files give one line, never a crash; written ones are what others read."""

import json
import os
import struct

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import GDN, same, tensor, write
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ahn_mlx.checkpoints.directory import check_finite, read_tensors
from ahn_mlx.checkpoints.safetensors import (
    Layout,
    TensorWriter,
    bits,
    is_finite,
    mended,
    not_finite,
    read_header,
)
from ahn_mlx.errors import AHNError

SMALL = GDN / "ahn_only"

# Every example writes the same file anew, so the fixture may be shared.
fuzz = settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def one_line(error: pytest.ExceptionInfo[AHNError]) -> str:
    message = str(error.value)
    assert "\n" not in message and len(message) < 700
    return message


def test_tensors_of_a_written_file_are_aligned(tmp_path):
    """The widest first, as the format's own writer does, behind a header of whole words."""
    layout = {
        name: Layout(dtype, (3,))
        for name, dtype in (("a", mx.uint8), ("b", mx.float16), ("c", mx.float32), ("d", mx.uint8))
    }
    with TensorWriter(tmp_path / "x.safetensors", layout) as writer:
        for name, (dtype, shape) in layout.items():
            writer.put(name, mx.zeros(shape, dtype=dtype))
    (length,) = struct.unpack("<Q", (tmp_path / "x.safetensors").read_bytes()[:8])
    header = read_header(tmp_path / "x.safetensors")
    assert length % 8 == 0 and list(header) == ["c", "b", "a", "d"]
    for name, (dtype, _) in layout.items():
        assert header[name].begin % dtype.size == 0


@pytest.mark.parametrize("more", [-1, 1])
def test_a_tensor_has_as_many_bytes_as_its_shape(tmp_path, more):
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8 + more]}
    raw = json.dumps({"x": entry}).encode()
    (tmp_path / "x").write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(8 + more))
    with pytest.raises(AHNError, match=f"tensor 'x' needs 8 bytes and has {8 + more}"):
        read_header(tmp_path / "x")
    raw = b"{}"
    (tmp_path / "y").write_bytes(struct.pack("<Q", len(raw) + 1) + raw)
    with pytest.raises(AHNError, match="its header claims 3 bytes, the file has 10"):
        read_header(tmp_path / "y")


def test_written_file_is_what_others_read(tmp_path):
    safetensors = pytest.importorskip("safetensors")
    tensors = {
        "half": mx.array([1.5, -2.0, 3.0], mx.float16),  # 6 bytes
        "b": mx.random.normal((5, 7)).astype(mx.bfloat16),
        "scalar": mx.array(3.0),
        "full": mx.random.normal((3, 3)).T,  # not contiguous
        "none": mx.zeros((0, 4)),
    }
    file = tmp_path / "model.safetensors"
    layout = {name: Layout(x.dtype, x.shape) for name, x in tensors.items()}
    with TensorWriter(file, layout) as writer:
        for name in sorted(tensors):  # not the order of the file
            writer.put(name, tensors[name])
    assert same(mx.load(str(file)), tensors)
    with safetensors.safe_open(file, "numpy") as f:
        assert f.metadata() == {"format": "mlx"}
        assert np.array_equal(f.get_tensor("full"), np.array(tensors["full"]))
    assert file.read_bytes()[8:42] == b'{"__metadata__":{"format":"mlx"},"'
    # Where others map the file, every number lies at a multiple of its size.
    assert struct.unpack("<Q", file.read_bytes()[:8])[0] % 8 == 0
    assert all(i.begin % 4 == 0 for i in read_header(file).values() if i.dtype == "F32")


def test_written_file_is_what_was_promised(tmp_path):
    layout = {"a": Layout(mx.float32, (2, 3)), "b": Layout(mx.uint32, (2,))}
    with (
        pytest.raises(RuntimeError, match="b was promised"),
        TensorWriter(tmp_path / "half", layout) as writer,
    ):
        writer.put("a", mx.zeros((2, 3)))
    for x in (mx.zeros((3, 2)), mx.zeros((2, 3), mx.float16)):
        with pytest.raises(RuntimeError, match="not what was promised"):
            TensorWriter(tmp_path / f"{x.dtype}", layout).put("a", x)


def test_a_file_is_on_the_disk_before_it_is_said_to_be(tmp_path, monkeypatch):
    """Whole, and not in a buffer: some disks report that they are full only then."""
    seen, real = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: seen.append(os.fstat(fd).st_size) or real(fd))
    with TensorWriter(tmp_path / "a", {"a": Layout(mx.float32, (2, 3))}) as writer:
        writer.put("a", mx.ones((2, 3)))
    assert seen == [os.path.getsize(tmp_path / "a")]


def test_numbers_of_any_size_as_bits():
    for dtype, one in ((mx.uint8, 1), (mx.bfloat16, 0x3F80), (mx.float32, 0x3F800000)):
        assert bits(mx.ones((2,), dtype)).tolist() == [one, one]


# --- damaged files ---


@fuzz
@given(data=st.data())
def test_truncated_anywhere(tmp_path, data):
    raw = (SMALL / "model.safetensors").read_bytes()
    (header,) = struct.unpack("<Q", raw[:8])
    cut = data.draw(
        st.one_of(
            st.integers(0, len(raw) - 1), st.integers(0, 16), st.integers(header, header + 16)
        )
    )
    (tmp_path / "model.safetensors").write_bytes(raw[:cut])
    with pytest.raises(AHNError, match="damaged") as error:
        read_tensors(tmp_path)
    assert "model.safetensors" in one_line(error)


@fuzz
@given(data=st.data())
def test_flipped_bytes_in_header(tmp_path, data):
    raw = bytearray((SMALL / "model.safetensors").read_bytes())
    (header,) = struct.unpack("<Q", raw[:8])
    places = st.one_of(st.integers(0, 7), st.integers(8, 8 + header - 1))
    for place in data.draw(st.lists(places, min_size=1, max_size=3)):
        # digits and brackets do more harm than random bytes, which are mostly not JSON
        raw[place] = data.draw(st.one_of(st.integers(0, 255), st.sampled_from(b'0123456789[]{}",')))
    (tmp_path / "model.safetensors").write_bytes(raw)
    try:
        tensors = read_tensors(tmp_path)
        mx.eval(tensors)
    except AHNError as e:
        assert "\n" not in str(e)


HEADERS = {
    "not an object": ([], b"", "not an object"),
    "not JSON": (b"{nonsense", b"", "not valid JSON"),
    "not UTF-8": (b'{"\xff": 1}', b"", "not valid JSON"),
    "UTF-16": ('{"a": {}}'.encode("utf-16"), b"", "not valid JSON"),
    "surrogate": (b'{"\\ud800": {}}', b"", "not valid JSON"),
    "deep": (b"[" * 200_000, b"", "not valid JSON"),
    "huge number": (b'{"a": ' + b"9" * 10_000 + b"}", b"", "not valid JSON"),
    "NaN": (b'{"a": NaN}', b"", "NaN is not JSON"),
    "name twice": (b'{"a": {}, "a": {}}', b"", "appears twice"),
    "metadata": ({"__metadata__": {"format": 1}}, b"", "__metadata__"),
    "entry": ({"a": 3}, b"", "lacks dtype"),
    "no offsets": ({"a": {"dtype": "F32", "shape": [2]}}, b"", "lacks dtype"),
    "dtype": ({"a": tensor("F64", [1])}, b"12345678", "'F64', which MLX cannot load"),
    "dtype number": ({"a": tensor(7)}, b"12345678", "has dtype 7"),
    "negative": ({"a": tensor(shape=[-2])}, b"12345678", "shape"),
    "two negatives": ({"a": tensor(shape=[-1, -2])}, b"12345678", "shape"),
    "bool": ({"a": tensor(shape=[2, True])}, b"12345678", "shape"),
    "fraction": ({"a": tensor(shape=[2.0])}, b"12345678", "shape"),
    "int32 overflow": ({"a": tensor(shape=[2**32, 0], offsets=[0, 0])}, b"", "shape"),
    "dimensions": ({"a": tensor(shape=[1] * 10_000, offsets=[0, 4])}, b"1234", "shape"),
    "size": ({"a": tensor(shape=[3])}, b"12345678", "needs 12 bytes and has 8"),
    "backwards": ({"a": tensor(offsets=[8, 0])}, b"12345678", "offsets"),
    "three offsets": ({"a": tensor(offsets=[0, 8, 8])}, b"12345678", "offsets"),
    "beyond the end": ({"a": tensor(offsets=[8, 16])}, b"12345678", "ends at byte 16 of 8"),
    "overlap": ({"a": tensor(), "b": tensor(offsets=[4, 12])}, b"x" * 12, "'b' overlaps"),
    "the same bytes": ({"a": tensor(), "b": tensor()}, b"x" * 8, "overlaps"),
    "gap": ({"a": tensor(), "b": tensor(offsets=[12, 20])}, b"x" * 20, "'b' leaves a gap"),
    "bytes left over": ({"a": tensor()}, b"x" * 9, "1 bytes after the last"),
    "escape codes": ({"\x1b[2J\nname": 3}, b"", r"'\\x1b\[2J\\nname' lacks"),
    "endless name": ({"n" * 9999: 3}, b"", "lacks dtype"),
}


@pytest.mark.parametrize("header, data, reason", HEADERS.values(), ids=HEADERS.keys())
def test_lying_headers(tmp_path, header, data, reason):
    write(tmp_path / "model.safetensors", header, data)
    with pytest.raises(AHNError, match=reason) as error:
        read_tensors(tmp_path)
    assert "model.safetensors: " in one_line(error)


SIZES = {
    **{"bool_": 1, "uint8": 1, "int8": 1, "uint16": 2, "int16": 2, "float16": 2, "bfloat16": 2},
    **{"uint32": 4, "int32": 4, "float32": 4, "uint64": 8, "int64": 8, "complex64": 8},
}


def test_every_dtype_that_mlx_writes_has_its_size(tmp_path):
    arrays = {name: mx.zeros((3,), getattr(mx, name)) for name in SIZES}
    mx.save_safetensors(str(tmp_path / "model.safetensors"), arrays)
    found = read_header(tmp_path / "model.safetensors")
    assert {name: info.end - info.begin for name, info in found.items()} == {
        name: 3 * size for name, size in SIZES.items()
    }
    eight_bits = {"a": tensor("F8_E4M3", [2], [0, 2])}
    assert read_header(write(tmp_path / "a", eight_bits, b"12"))["a"].dtype == "F8_E4M3"


def test_as_many_dimensions_as_mlx_counts_and_as_long(tmp_path):
    for shape in ([1] * 8, [2**31 - 1, 0]):
        end = 0 if 0 in shape else 4
        file = write(tmp_path / "a", {"a": tensor(shape=shape, offsets=[0, end])}, bytes(end))
        assert read_header(file)["a"].shape == tuple(shape)
        bad = [*shape, 1] if end else [2**31, 0]
        file = write(tmp_path / "a", {"a": tensor(shape=bad, offsets=[0, end])}, bytes(end))
        with pytest.raises(AHNError, match="has the shape"):
            read_header(file)


def test_a_header_of_100_megabytes_is_the_largest(tmp_path):
    """As the format has it; of a sparse file."""
    most = 100 << 20
    for length, said in ((most, "header is not"), (most + 1, f"header claims {most + 1} bytes;")):
        file = write(tmp_path / "a", b"", b"", length)
        os.truncate(file, most + 64)
        with pytest.raises(AHNError, match=said):
            read_header(file)


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 101 << 20, 3])
def test_header_length(tmp_path, length):
    with pytest.raises(AHNError, match=r"header (claims|is not)"):
        read_header(write(tmp_path / "a.safetensors", {"a": tensor()}, b"12345678", length))


def test_a_pointer_of_git_lfs_is_named(tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    with pytest.raises(AHNError, match=r"model\.safetensors: is a pointer of git-lfs"):
        read_header(file)


def test_header_is_not_read_when_too_long(tmp_path):
    """A sparse file of 1 TB whose header claims all of it costs nothing."""
    file = write(tmp_path / "model.safetensors", b"", b"", 2**40 - 8)
    os.truncate(file, 2**40)
    with pytest.raises(AHNError, match="claims"):
        read_tensors(tmp_path)


@given(
    shape=st.lists(st.integers(1, 9), max_size=3),
    dtype=st.sampled_from([mx.float32, mx.bfloat16, mx.float16]),
    bad=st.sampled_from([float("nan"), float("inf"), -float("inf")]),
    data=st.data(),
)
def test_not_finite(shape, dtype, bad, data):
    values = np.full(shape, 6e4, np.float32).reshape(-1)  # near float16's largest
    values[0] = -0.0
    x = mx.array(values).reshape(shape).astype(dtype)
    check_finite("a", x)
    values[data.draw(st.integers(0, values.size - 1))] = bad
    with pytest.raises(AHNError, match="'a' holds NaN or infinity"):
        check_finite("a", mx.array(values).reshape(shape).astype(dtype))


def test_not_finite_at_the_end_of_a_large_tensor():
    x = mx.zeros(((1 << 22) + 5,), mx.bfloat16)
    assert is_finite(x) and is_finite(x[:0])
    x[-1] = float("nan")
    assert not is_finite(x)


def test_large_numbers_are_finite_whatever_their_sum_is():
    large, nothing = mx.full((9,), 3e38), mx.array([1, 2], mx.uint32)
    assert not_finite([("a", large), ("b", nothing), ("c", mx.zeros((0,)))]) is None
    assert not_finite([("a", large), ("b", mx.array([mx.inf])), ("c", mx.array([mx.nan]))]) == "b"


def test_who_wrote_a_damaged_file_says_what_to_do():
    for raised, said in (("x: damaged; fetch it again", "x: damaged; train"), ("other", "other")):
        with pytest.raises(AHNError) as refused, mended("train"):
            raise AHNError(raised)
        assert str(refused.value) == said
