"""Opening: pipes, links, folders; reading: exact lengths, and the same file as before."""

import os
import resource

import numpy as np
import pytest

from jaxsub import descriptors, errors, formats
from jaxsub.formats import _files, _hints, safetensors

W = np.arange(6, dtype=np.float32).reshape(2, 3)


def save(path, array=W):
    path.parent.mkdir(parents=True, exist_ok=True)
    safetensors.write(path, {"w": array})
    return path


def test_pipe_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "m.safetensors")
    with pytest.raises(errors.InputError, match="named pipe"):
        formats.open_model(tmp_path / "m.safetensors")


@pytest.mark.parametrize("path", ["/dev/null", "/dev/zero"])
def test_device_is_refused(path):
    with pytest.raises(errors.InputError, match="a device"):
        _files.identify(path)


def test_missing_file_folder_and_nul_are_input_errors(tmp_path):
    (tmp_path / "d.safetensors").mkdir()
    for path in (
        tmp_path / "gone.safetensors",
        tmp_path / "d.safetensors",
        str(tmp_path) + "/a\0b.safetensors",
        tmp_path,
    ):
        with pytest.raises(errors.InputError):
            formats.open_model(path)


def test_link_loop_and_dangling_link(tmp_path):
    (tmp_path / "a.safetensors").symlink_to("b.safetensors")
    (tmp_path / "b.safetensors").symlink_to("a.safetensors")
    with pytest.raises(errors.InputError, match="loop"):
        formats.open_model(tmp_path / "a.safetensors")
    (tmp_path / "c.safetensors").symlink_to("gone")
    with pytest.raises(errors.InputError, match="link to nothing"):
        formats.open_model(tmp_path / "c.safetensors")


def test_links_may_lead_inside_the_collection_or_an_allowed_root_only(tmp_path):
    real = save(tmp_path / "elsewhere" / "x.safetensors")
    inside = save(tmp_path / "zoo" / "store" / "y.safetensors")
    (tmp_path / "zoo" / "m0").mkdir()
    (tmp_path / "zoo" / "m0" / "model.safetensors").symlink_to(real)
    (tmp_path / "zoo" / "m1").mkdir()
    (tmp_path / "zoo" / "m1" / "model.safetensors").symlink_to(inside)
    with pytest.raises(errors.InputError, match="leaves the collection.*--allow_root"):
        formats.open_model(tmp_path / "zoo" / "m0", root=tmp_path / "zoo")
    assert formats.open_model(tmp_path / "zoo" / "m0", root=tmp_path / "zoo", allow_roots=[tmp_path / "elsewhere"])
    assert formats.open_model(tmp_path / "zoo" / "m1", root=tmp_path / "zoo")
    with pytest.raises(errors.InputError, match="leaves the collection"):
        formats.open_model(tmp_path / "zoo" / "m1")  # alone, its own folder is the root
    # A folder that is itself a link is judged by where its files really are.
    (tmp_path / "zoo" / "m2").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(errors.InputError, match="leaves the collection"):
        formats.open_model(tmp_path / "zoo" / "m2", root=tmp_path / "zoo")


def test_neighbouring_folder_with_the_same_beginning_is_outside(tmp_path):
    save(tmp_path / "zoo2" / "x.safetensors")
    (tmp_path / "zoo").mkdir()
    (tmp_path / "zoo" / "x.safetensors").symlink_to("../zoo2/x.safetensors")
    with pytest.raises(errors.InputError, match="leaves the collection"):
        formats.open_model(tmp_path / "zoo" / "x.safetensors", root=tmp_path / "zoo")


@pytest.mark.parametrize(("blob", "good"), [("ab" * 32, True), ("ab" * 20, True), ("model.bin", False)])
def test_hub_cache_layout_works_for_digest_names_only(tmp_path, blob, good):
    entry = tmp_path / "models--org--name"
    save(entry / "blobs" / blob)
    (entry / "snapshots" / "rev").mkdir(parents=True)
    (entry / "snapshots" / "rev" / "model.safetensors").symlink_to(f"../../blobs/{blob}")
    if good:
        model = formats.open_model(entry / "snapshots" / "rev")
        np.testing.assert_array_equal(formats.read(model, model.tensors["w"]), W)
    else:
        with pytest.raises(errors.InputError, match="leaves"):
            formats.open_model(entry / "snapshots" / "rev")


def test_blob_of_another_entry_is_outside(tmp_path):
    save(tmp_path / "other" / "blobs" / ("ab" * 32))
    (tmp_path / "mine" / "snapshots" / "rev").mkdir(parents=True)
    link = tmp_path / "mine" / "snapshots" / "rev" / "model.safetensors"
    link.symlink_to("../../../other/blobs/" + "ab" * 32)
    with pytest.raises(errors.InputError, match="leaves"):
        formats.open_model(link.parent)


def replace(path):
    save(path.with_name("new.safetensors"), W + 1).replace(path)


def overwrite(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def touch(path):
    os.utime(path, ns=(1, 1))


def shorten(path):
    os.truncate(path, path.stat().st_size - 4)


def append(path):
    with path.open("ab") as stream:
        stream.write(b"x")


def remove(path):
    path.unlink()


@pytest.mark.parametrize("change", [replace, overwrite, touch, shorten, append, remove])
def test_changed_input_is_named(tmp_path, change):
    path = save(tmp_path / "m.safetensors")
    model = formats.open_model(path)
    np.testing.assert_array_equal(formats.read(model, model.tensors["w"]), W)
    change(path)
    with pytest.raises(errors.InputChangedError, match=r"m\.safetensors"):
        formats.read(model, model.tensors["w"])


def test_read_into_takes_parts_and_loops_over_short_reads(tmp_path, monkeypatch):
    array = np.arange(1000, dtype=np.float32)
    model = formats.open_model(save(tmp_path / "m.safetensors", array))
    whole = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: whole(fd, [buffers[0][:17]], offset))
    part = np.empty((10, 30), np.float32)
    formats.read_into(model.tensors["w"].extent, 4 * 100, memoryview(part))
    np.testing.assert_array_equal(part.ravel(), array[100:400])


def test_read_past_the_end_is_an_error_not_a_short_array(tmp_path):
    (tmp_path / "f").write_bytes(b"0123")
    assert _files.read_bytes(tmp_path / "f", 1, 3) == b"123"
    with pytest.raises(errors.InputError, match="ends at byte 4"):
        _files.read_bytes(tmp_path / "f", 1, 4)


def test_no_descriptor_stays_open(tmp_path):
    models = [formats.open_model(save(tmp_path / f"{i}.safetensors")) for i in range(30)]
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    for model in models * 3:
        formats.read(model, model.tensors["w"])
    after = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    assert after <= before
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > after


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS"),
        (b"<!DOCTYPE html><html>404</html>", "HTML"),
        (b"  <html>", "HTML"),
        (b"", "empty"),
        (bytes(64), "zeros"),
        (b"\x80\x04\x95abc", "pickle"),
        (b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j", "before 2020"),
        (b"PK\x03\x04abcd", "zip"),
        (b"\x1f\x8b\x08", "gzip"),
        (b"x" * 257 + b"ustar", "tar"),
        (b"GGUF", "GGUF"),
    ],
)
def test_usual_mistakes_are_recognised(tmp_path, data, words):
    assert words in _hints.explain(data, len(data))
    (tmp_path / "m.safetensors").write_bytes(data)
    with pytest.raises(errors.InputError, match=words):
        formats.open_model(tmp_path / "m.safetensors")
    (tmp_path / "m.odd").write_bytes(data)
    with pytest.raises(errors.InputError, match=words):
        formats.open_model(tmp_path / "m.odd")


def test_random_bytes_have_no_explanation():
    assert _hints.explain(b"\x12\x34\x56\x78" * 100, 400) == ""


def test_ending_alone_decides_and_no_second_parser_is_tried(tmp_path):
    save(tmp_path / "m.safetensors").rename(tmp_path / "m.npz")
    with pytest.raises(errors.InputError, match=r"neither \.npy nor \.npz"):
        formats.open_model(tmp_path / "m.npz")
    save(tmp_path / "m.weights")  # an ending that says nothing: by content
    assert formats.open_model(tmp_path / "m.weights").format == "safetensors"


def test_is_model(tmp_path):
    save(tmp_path / "zoo" / "a" / "model.safetensors")
    save(tmp_path / "zoo" / "b.safetensors")
    (tmp_path / "zoo" / "c").mkdir()
    (tmp_path / "zoo" / "c" / "adapter_config.json").write_text("{}")
    (tmp_path / "zoo" / "LICENSE").write_text("")
    found = {p.name: formats.is_model(p) for p in (tmp_path / "zoo").iterdir()}
    assert found == {"a": True, "b.safetensors": True, "c": True, "LICENSE": False}
    assert not formats.is_model(tmp_path / "zoo")
    assert not formats.is_model(tmp_path / "zoo" / ".tmp-1-a.safetensors")


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="no such hint on this system")
def test_headers_and_large_blocks_stop_the_system_from_reading_ahead(tmp_path, monkeypatch):
    path = tmp_path / "f"
    path.write_bytes(bytes(1 << 19))
    given = []
    monkeypatch.setattr(os, "posix_fadvise", lambda fd, offset, count, advice: given.append(advice))
    file = _files.identify(path)
    _files.read_bytes(file, 0, 8)
    _files.read_into(descriptors.Extent(file, 0), 0, memoryview(bytearray(1 << 18)))
    _files.read_into(descriptors.Extent(file, 0), 0, memoryview(bytearray(1 << 10)))  # its neighbours come next
    assert given == [os.POSIX_FADV_RANDOM, os.POSIX_FADV_RANDOM, os.POSIX_FADV_NORMAL]

    def refuse(*_):
        raise OSError(22, "no hints here")

    monkeypatch.setattr(os, "posix_fadvise", refuse)
    assert _files.read_bytes(file, 0, 8) == bytes(8)
