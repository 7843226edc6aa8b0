"""org/name is a model of the local cache of downloads, when it is no path; nothing is fetched."""

import os

import numpy as np
import pytest

import jaxsub
from jaxsub import errors, finding, formats, hubcache
from jaxsub.formats import safetensors

COMMIT, OLDER = "a" * 40, "0123456789" * 4


@pytest.fixture
def cache(tmp_path, monkeypatch):
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "hub"


def put(cache, org, name, value, commit=COMMIT, ref="main", files=("model.safetensors",)):
    """A model as huggingface_hub lays it out: blobs, a ref, a snapshot of links."""
    entry = cache / f"models--{org}--{name}"
    for folder in (entry / "blobs", (entry / "refs" / ref).parent, entry / "snapshots" / commit):
        os.makedirs(folder, exist_ok=True)
    for number, file in enumerate(files):
        blob = f"{int(value * 16) + number:064x}"
        safetensors.write(entry / "blobs" / blob, {"w": np.full((4, 3), value, np.float32)})
        os.symlink(f"../../blobs/{blob}", entry / "snapshots" / commit / file)
    (entry / "refs" / ref).write_text(commit)
    return entry


def test_names_become_models_with_these_names_as_ids(cache):
    for n in range(3):
        put(cache, "org", f"m{n}", n + 1.0)
    put(cache, "org", "m0", 9.0, OLDER, "v1/x")
    names = ["org/m0", "org/m0@v1/x", "org/m1", f"org/m2@{COMMIT}"]
    opened = jaxsub.open_collection(names)
    assert [ref.id for ref in opened.refs] == names
    values = [m.tensors["w"].extent for m in opened.models]
    assert [np.fromfile(e.file.path, "<f4", 1, offset=e.offset)[0] for e in values] == [1, 9, 2, 3]


def test_a_path_comes_first_and_a_list_may_hold_names(cache, tmp_path):
    put(cache, "org", "m0", 1.0)
    (tmp_path / "list.txt").write_text("org/m0\nhere/m1.safetensors\n")
    os.makedirs(tmp_path / "here")
    safetensors.write(tmp_path / "here" / "m1.safetensors", {"w": np.zeros(1)})
    assert [c.id for c in finding.find(tmp_path / "list.txt").candidates] == ["here/m1", "org/m0"]
    os.makedirs(tmp_path / "org" / "m0")
    safetensors.write(tmp_path / "org" / "m0" / "model.safetensors", {"w": np.zeros(1)})
    (found,) = finding.find("org/m0").candidates
    assert found.path == "org/m0"


def test_a_snapshot_of_several_models_is_a_collection(cache):
    put(cache, "org", "zoo", 1.0, files=("a.safetensors", "b.safetensors", "c.safetensors"))
    assert [ref.id for ref in jaxsub.open_collection("org/zoo").refs] == [f"org/zoo/{x}" for x in "abc"]


def test_what_was_looked_for_is_listed(cache):
    with pytest.raises(errors.InputError, match=r"org/none: no such file or folder.*models--org--none\)") as caught:
        finding.find("org/none")
    assert "nothing is fetched" in str(caught.value) and caught.value.rule == "H12"
    entry = put(cache, "org", "m0", 1.0)
    with pytest.raises(errors.InputError, match=r"models--org--m0.*refs/v2\)"):
        finding.find("org/m0@v2")
    with pytest.raises(errors.InputError, match=rf"snapshots/{OLDER}\)"):
        finding.find(f"org/m0@{OLDER}")
    for text in ("", "../../../etc", COMMIT + "/..", "x" * 40, COMMIT * 2):
        (entry / "refs" / "main").write_text(text)
        with pytest.raises(errors.InputError, match="looked for"):
            finding.find("org/m0")


@pytest.mark.parametrize("text", ["org", "org/m@../x", "../m", "org/..", "/org/m", "a/b/c", "org/m--x", "-o/m", "o/m@"])
def test_what_is_no_name_is_only_a_path(cache, text):
    assert not hubcache.is_name(text)
    with pytest.raises(errors.InputError, match="no such file or folder; check --collection"):
        finding.find(text)


def test_links_out_of_a_snapshot_go_to_its_blobs_only(cache, tmp_path):
    entry = put(cache, "org", "m0", 1.0)
    link = entry / "snapshots" / COMMIT / "model.safetensors"
    os.unlink(link)
    safetensors.write(tmp_path / ("f" * 64), {"w": np.zeros(1)})
    os.symlink(tmp_path / ("f" * 64), link)
    with pytest.raises(errors.InputError, match="leaves the collection"):
        jaxsub.open_collection("org/m0", smallest=1, max_quarantined=0)


def test_a_model_of_the_cache_is_written_again_as_plain_files(cache, tmp_path):
    entry = put(cache, "org", "m0", 1.0)
    (entry / "blobs" / ("b" * 40)).write_text("{}")
    os.symlink(f"../../blobs/{'b' * 40}", entry / "snapshots" / COMMIT / "config.json")
    (model,) = jaxsub.open_collection("org/m0", smallest=1).models
    formats.rewrite(model, tmp_path / "new", {"w": np.zeros((4, 3))})
    assert sorted(os.listdir(tmp_path / "new")) == ["config.json", "model.safetensors"]
    assert not any(os.path.islink(tmp_path / "new" / name) for name in os.listdir(tmp_path / "new"))
    assert not safetensors.read(tmp_path / "new" / "model.safetensors")["w"].any()


def test_where_the_cache_is(cache, tmp_path, monkeypatch):
    assert hubcache.folder() == str(cache)
    monkeypatch.delenv("HF_HUB_CACHE")
    assert hubcache.folder() == str(tmp_path / "home" / ".cache" / "huggingface" / "hub")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert hubcache.folder() == "/x/huggingface/hub"
    monkeypatch.setenv("HF_HOME", "~/h")
    assert hubcache.folder() == str(tmp_path / "home" / "h" / "hub")


def test_agrees_with_the_hub_library(cache):
    hub = pytest.importorskip("huggingface_hub")
    put(cache, "org", "m0", 1.0)
    put(cache, "org", "m0", 2.0, OLDER, "v1")
    for revision in (None, "v1", COMMIT):
        wanted = hub.snapshot_download("org/m0", revision=revision, cache_dir=cache, local_files_only=True)
        found, _ = hubcache.locate("org/m0" + (f"@{revision}" if revision else ""))
        assert os.path.realpath(found) == os.path.realpath(wanted)
