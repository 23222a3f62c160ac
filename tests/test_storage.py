"""What storage.py promises: a directory that exists is whole, whatever kills the writer or fills the disk."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from litgpt.errors import InputError, MachineError, MissingError
from litgpt.storage import FORMAT_VERSION, MANIFEST, atomic_dir, atomic_file, inside, recover, require_version, verify

# Runs `write` in a forked child that dies at its n-th file-system call, for every n; prints what stood there each time.
KILLER = """
import os, sys
from pathlib import Path
from litgpt.storage import atomic_dir, atomic_file, recover, verify

def write(target, text):
    with atomic_dir(target, overwrite=True) as new:
        (new / "a.safetensors").write_text(text)
        (new / "sub").mkdir()
        (new / "sub" / "b.json").write_text(text)

def write_file(target, text):
    with atomic_file(target) as new:
        new.write_text(text)

def read(target):
    found = recover(target)
    if found.is_file():
        return found.read_text()
    if not found.exists():
        return "nothing"
    verify(found, full=True)
    texts = {p.read_text() for p in (found / "a.safetensors", found / "sub" / "b.json")}
    assert len(texts) == 1, texts
    return texts.pop()

def die_at(n):
    seen = 0
    def count(event, args):
        nonlocal seen
        if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree", "fsync", "os.listdir"):
            seen += 1
            if seen == n:
                os._exit(137)
    fsync = os.fsync
    os.fsync = lambda descriptor: (sys.audit("fsync"), fsync(descriptor))
    sys.addaudithook(count)

job, target, before = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
job = {"dir": write, "file": write_file}[job]
for n in range(1, 1000):
    if before:
        job(target, before)
    child = os.fork()
    if child == 0:
        die_at(n)
        job(target, "new")
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    shown = [p.name for p in target.parent.iterdir() if not p.name.startswith(".")]
    print(read(target), *shown)
    job(target, "again")
    assert read(target) == "again"
    assert [p.name for p in target.parent.iterdir()] == [target.name], "leftovers"
    if status == 0:
        break
    if not before:
        os.system(f"rm -r '{target}'")
"""

TROUBLE = """
import os, resource, sys
from litgpt.errors import MachineError
from litgpt.storage import atomic_dir
if sys.argv[2] == "full":
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
elif os.getuid() == 0:  # root may write anywhere
    os.setuid(65534)
try:
    with atomic_dir(sys.argv[1], overwrite=True) as new:
        (new / "a.safetensors").write_bytes(bytes(500))
        (new / "b.safetensors").write_bytes(bytes(5000))
except MachineError as error:
    print(error)
"""


def run(program: str, *args: object) -> str:
    done = subprocess.run([sys.executable, "-c", program, *map(str, args)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def fill(target: Path, text: str = "old") -> None:
    with atomic_dir(target, overwrite=True) as new:
        (new / "a.safetensors").write_text(text)
        (new / "config.json").write_text("{}")


def interrupt(new: Path) -> None:
    (new / "half" if new.is_dir() else new).write_text("x")
    raise KeyboardInterrupt


def tree(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("job", ["dir", "file"])
@pytest.mark.parametrize("before", ["old", ""])
def test_a_writer_killed_at_any_file_system_call_leaves_the_old_or_the_new_and_a_rerun_repairs(tmp_path, job, before):
    lines = run(KILLER, job, tmp_path / "final", before).splitlines()
    assert len(lines) > (20 if job == "dir" else 4)
    assert {line.split()[0] for line in lines} <= {before or "nothing", "new"}
    assert lines[0].startswith(before or "nothing")
    assert lines[-1] == "new final"
    assert {name for line in lines for name in line.split()[1:]} <= {"final"}


def test_a_full_disk_names_path_and_bytes_and_keeps_the_old_directory(tmp_path):
    fill(tmp_path / "final")
    before = tree(tmp_path)
    line = run(TROUBLE, tmp_path / "final", "full")
    assert str(tmp_path / "final") in line
    assert "bytes" in line
    assert line.count("\n") == 1
    assert tree(tmp_path) == before
    assert [p.name for p in tmp_path.iterdir()] == ["final"]


def test_a_disk_without_the_room_is_refused_before_it_is_filled(tmp_path):
    with pytest.raises(MachineError, match=r"1,000,000,000,000,000 bytes"):
        atomic_dir(tmp_path / "final", need=10**15).__enter__()
    assert not any(tmp_path.iterdir())


def test_a_directory_that_nobody_may_write_to_is_one_line(tmp_path):
    locked = tmp_path / "locked"
    locked.mkdir()
    locked.chmod(0o555)
    tmp_path.parent.chmod(0o711)  # pytest keeps it to one user
    line = run(TROUBLE, locked / "final", "nobody")
    assert line.startswith(f"{locked / 'final'} could not be written: Permission denied")
    assert line.endswith("; what was there before is unchanged; choose another place\n")
    assert ".final.new" not in line
    assert "bytes" not in line  # it is not room that lacks
    assert line.count("\n") == 1
    assert not any(locked.iterdir())


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="no /proc here")
@pytest.mark.parametrize("writer", [atomic_dir, atomic_file])
def test_a_place_where_nothing_can_be_made_is_named_as_it_was_given(writer):
    with pytest.raises(InputError) as caught, writer("/proc/x") as new:
        new.write_text("a")
    assert str(caught.value) == "/proc/x cannot be written: No such file or directory; choose another place"


def test_a_file_that_the_block_misses_is_told_as_it_is(tmp_path):
    with pytest.raises(FileNotFoundError, match="missing") as caught, atomic_file(tmp_path / "final"):
        (tmp_path / "missing").read_text()
    assert not isinstance(caught.value, InputError)


def test_what_fails_inside_a_directory_is_told_by_the_name_that_it_was_to_have(tmp_path):
    with pytest.raises(MachineError) as caught, atomic_dir(tmp_path / "final") as new:
        raise PermissionError(errno.EACCES, "Permission denied", str(new / "sub" / "a"))
    assert f"could not be written: Permission denied at {tmp_path}/final/sub/a; " in str(caught.value)
    assert ".final.new" not in str(caught.value)


def test_a_failing_block_leaves_nothing_and_its_own_error(tmp_path):
    fill(tmp_path / "final")
    before = tree(tmp_path)
    for writer in (atomic_dir(tmp_path / "final", overwrite=True), atomic_file(tmp_path / "final" / "config.json")):
        with pytest.raises(KeyboardInterrupt), writer as new:
            interrupt(new)
    assert tree(tmp_path) == before


def test_a_directory_in_use_is_refused_an_empty_one_is_filled(tmp_path):
    (tmp_path / "final").mkdir()
    with atomic_dir(tmp_path / "final") as new:
        (new / "a.safetensors").write_text("x")
    with pytest.raises(InputError, match=r"not empty.*--overwrite"), atomic_dir(tmp_path / "final"):
        pass
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="is a file"), atomic_dir(tmp_path / "file", overwrite=True):
        pass
    with pytest.raises(InputError, match="file"), atomic_dir(tmp_path / "file" / "below"):
        pass
    with pytest.raises(InputError, match="is a directory"), atomic_file(tmp_path / "final"):
        pass
    assert (tmp_path / "file").read_text() == "mine"


def test_odd_names_work_or_are_refused(tmp_path):
    for name in ["with space", "ünï漢", "x" * 250, "-dash"]:
        fill(tmp_path / name)
        verify(tmp_path / name, full=True)
    with pytest.raises(InputError, match="too long"):
        fill(tmp_path / ("x" * 300))


def test_two_writers_of_one_directory_do_not_mix(tmp_path):
    with atomic_dir(tmp_path / "final") as new:
        (new / "a.safetensors").write_text("first")
        with pytest.raises(InputError, match="another process"), atomic_dir(tmp_path / "final"):
            pass
        recover(tmp_path / "final")
    assert (tmp_path / "final" / "a.safetensors").read_text() == "first"


def test_a_copy_left_aside_is_found_even_where_nothing_may_be_renamed(tmp_path, monkeypatch):
    fill(tmp_path / "final")
    os.rename(tmp_path / "final", tmp_path / ".final.old")

    def refuse(*_):
        raise PermissionError

    with monkeypatch.context() as read_only:
        read_only.setattr(os, "rename", refuse)
        assert recover(tmp_path / "final") == tmp_path / ".final.old"
    assert recover(tmp_path / "final") == tmp_path / "final"
    verify(tmp_path / "final", full=True)


@pytest.mark.parametrize("found", [0, 1, 500, 999])
def test_truncated_weights_are_named_with_both_sizes_on_every_load(tmp_path, found):
    fill(tmp_path / "final", "x" * 1000)
    path = tmp_path / "final" / "a.safetensors"
    os.truncate(path, found)
    with pytest.raises(InputError, match=rf"{path} is damaged: expected 1,000 bytes, found {found:,}"):
        verify(tmp_path / "final")


def test_a_flipped_bit_is_found_by_the_full_check(tmp_path):
    fill(tmp_path / "final", "x" * 1000)
    path = tmp_path / "final" / "a.safetensors"
    path.write_bytes(b"y" + path.read_bytes()[1:])
    verify(tmp_path / "final")
    with pytest.raises(InputError, match=f"{path} is damaged.*sha256"):
        verify(tmp_path / "final", full=True)


def test_a_listed_file_that_is_missing_is_named_and_a_directory_without_manifest_passes(tmp_path):
    fill(tmp_path / "final")
    (tmp_path / "final" / "a.safetensors").unlink()
    with pytest.raises(MissingError, match=r"a\.safetensors is missing"):
        verify(tmp_path / "final")
    (tmp_path / "final" / MANIFEST).unlink()
    verify(tmp_path / "final", full=True)


@pytest.mark.parametrize(
    ("manifest", "word"),
    [
        ({"format_version": 999, "files": {}}, "999.*newer LitGPT"),
        ({"files": {}}, "format_version None"),
        ({"format_version": 1}, "is damaged"),
        ({"format_version": 1, "files": {"a.safetensors": 5}}, "is damaged"),
        ({"format_version": 1, "files": {"../out.safetensors": {"size": 1, "sha256": ""}}}, "leads out"),
        ({"format_version": 1, "files": {"/etc/passwd.bin": {"size": 1, "sha256": ""}}}, "leads out"),
        ({"format_version": 1, "files": {"a.safetensors": {"size": float("inf"), "sha256": ""}}}, "is damaged"),
        ({"format_version": 1, "files": {"a\0.safetensors": {"size": 1, "sha256": ""}}}, "no name of a file"),
        ({"format_version": 1, "files": {"\ud800.safetensors": {"size": 1, "sha256": ""}}}, "no name of a file"),
        ([], "expected an object"),
    ],
)
def test_a_manifest_that_is_newer_broken_or_hostile_is_one_line(tmp_path, manifest, word):
    fill(tmp_path / "final")
    (tmp_path / "final" / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=word) as error:
        verify(tmp_path / "final")
    assert "\n" not in str(error.value)


def test_versions_up_to_ours_are_read(tmp_path):
    for version in range(FORMAT_VERSION + 1):
        require_version({"format_version": version}, tmp_path)
    with pytest.raises(InputError, match="needs a newer LitGPT"):
        require_version({"format_version": FORMAT_VERSION + 1}, tmp_path)


def test_links_may_lead_to_the_blobs_of_a_hub_cache_and_nowhere_else(tmp_path):
    snapshot = tmp_path / "models--a--b" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--a--b" / "blobs").mkdir()
    (tmp_path / "models--a--b" / "blobs" / "sha").write_text("weights")
    (snapshot / "model.safetensors").symlink_to("../../blobs/sha")
    (snapshot / "evil.safetensors").symlink_to("/etc/passwd")
    assert inside(snapshot, "model.safetensors").read_text() == "weights"
    for name in ["evil.safetensors", "../abc2/x", "/etc/passwd", "a/../../x"]:
        with pytest.raises(InputError, match="leads out"):
            inside(snapshot, name)
