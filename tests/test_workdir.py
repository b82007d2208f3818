"""Workdirs in a bucket, for which a folder stands in: machines see each other's files and overwrite none."""

import errno
import fcntl
import os
import shutil

import pytest

from lsrs_jax.runtime import files, workdir
from lsrs_jax.runtime.errors import UserError
from support.commands import QUICK, ended, finish, refused, run, start, without_time


@pytest.fixture
def machines(tmp_path):
    """The folder of the bucket, and its copies on two machines."""
    remote = tmp_path / "remote"
    (remote / "checkpoints" / "3").mkdir(parents=True)
    (remote / "checkpoints" / "3" / "weights").write_text("large")
    (remote / "config.json").write_text("{}")
    copies = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        copies.append(workdir.Workdir(tmp_path / name, f"file://{remote}"))
    return remote, *copies


def test_small_files_travel_and_checkpoints_stay(machines):
    remote, one, two = machines
    assert (one.path / "config.json").read_text() == "{}"
    assert not (one.path / "checkpoints").exists()
    assert str(workdir.checkpoints(one.path)) == str(remote / "checkpoints")
    folder = one.path / "certify" / "default"
    folder.mkdir(parents=True)
    (folder / "votes.1.tsv").write_text("a")
    (folder / ".lock").write_text("")
    one.push()
    two.pull()
    assert (two.path / "certify" / "default" / "votes.1.tsv").read_text() == "a"
    assert not (remote / "certify" / "default" / ".lock").exists()
    (folder / "votes.1.tsv").write_text("ab")
    one.push()
    two.pull()
    assert (two.path / "certify" / "default" / "votes.1.tsv").read_text() == "ab"


def test_what_was_written_here_is_not_overwritten(machines):
    _, one, two = machines
    (one.path / "own").write_text("theirs")
    one.push()
    (two.path / "own").write_text("mine")
    two.pull()
    assert (two.path / "own").read_text() == "mine"
    (two.path / "config.json").write_text("mine")
    two.pull()
    assert (two.path / "config.json").read_text() == "mine"


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_called_so(tmp_path, monkeypatch, number):
    """Only the numbers that say so mean another process; any other error keeps its own words."""

    def refuses(number):
        monkeypatch.setattr(fcntl, "flock", lambda *_: fail(number))
        with files.locked(tmp_path / ".lock", "training"):
            pass

    def fail(number):
        raise OSError(number, os.strerror(number))

    words = rf"the file system of {tmp_path}/.lock has no locks \({os.strerror(number)}\); .*--workdir=file:///"
    with pytest.raises(UserError, match=words):
        refuses(number)
    for held in (errno.EWOULDBLOCK, errno.EACCES, errno.EAGAIN):
        with pytest.raises(UserError, match="another process is training"):
            refuses(held)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)) as failed:
        refuses(errno.EIO)
    assert failed.value.filename == f"{tmp_path}/.lock"


def test_the_url_of_a_folder_begins_at_the_root():
    assert "from the root on" in refused("certify", "--workdir=file://relative")


def test_a_local_workdir_is_used_in_place(tmp_path):
    with workdir.opened(tmp_path) as opened:
        opened.push()
        opened.pull()
        assert opened.path == tmp_path
    assert not list(tmp_path.iterdir())
    assert str(workdir.checkpoints(tmp_path)) == str(tmp_path / "checkpoints")


def test_what_is_written_last_is_copied_whatever_ends_the_block(tmp_path):
    def work():
        with workdir.opened(f"file://{tmp_path}") as opened:
            (opened.path / "a").write_text("1")
            raise KeyError

    with pytest.raises(KeyError):
        work()
    assert (tmp_path / "a").read_text() == "1"


def test_a_bucket_out_of_reach_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot read or write file://"), workdir.opened(f"file://{tmp_path}/file"):
        pass
    assert "neither a folder nor the URL of one" in refused("certify", "--workdir=ftp://x/y")
    assert "neither a folder nor the URL of one" in refused("certify", "--workdir=gs:///x")


def test_the_commands_work_in_a_bucket(tmp_path):
    remote, local = tmp_path / "remote", tmp_path / "local"
    first = start("train", *QUICK, "--config.train.checkpoint_every=10", f"--workdir=file://{remote}")
    while first.poll() is None and not list(remote.glob("checkpoints/10")):
        pass
    first.kill()
    finish(first)
    assert "next: python -m lsrs_jax.certify" in run("train", *QUICK, f"--workdir=file://{remote}")
    assert (remote / "metrics.jsonl").read_text().count('"loss"') >= 2
    shutil.copytree(remote, local)
    assert run("certify", f"--workdir=file://{remote}").endswith(f"file://{remote}/certify/default/certificates.tsv\n")
    assert f" file://{remote}/certify/default holds certificates of another run" in refused(
        "certify", f"--workdir=file://{remote}", "--config.certify.n=5"
    )
    run("certify", f"--workdir={local}")
    table = "certify/default/certificates.tsv"
    assert without_time(remote / table) == without_time(local / table)
    assert "verified: 40 certificates" in run("certify", f"--workdir=file://{remote}", "--verify")
    assert "already trained" in run("train", *QUICK, f"--workdir=file://{remote}")


def test_a_bucket_that_cannot_be_written_is_found_with_the_first_samples(trained, tmp_path, monkeypatch):
    remote, write = tmp_path / "remote", workdir.write_atomic
    shutil.copytree(trained, remote, ignore=shutil.ignore_patterns("certify"))

    def refuses(path, content):
        if str(path).startswith(str(remote)):
            raise PermissionError(13, "Permission denied", str(path))
        write(path, content)

    monkeypatch.setattr(workdir, "write_atomic", refuses)
    code, out, err = ended("certify", f"--workdir=file://{remote}")
    assert code == 2
    assert "images decided" not in out
    assert err.startswith(f"error: cannot read or write file://{remote} (PermissionError")


def test_links_and_pipes_of_a_mount_are_left_out(machines):
    """A bucket has neither; a reader of a pipe would wait, and a link to its own folder has no end."""
    remote, one, _ = machines
    (remote / "loop").symlink_to(".")
    (remote / "elsewhere").symlink_to(remote / "config.json")
    os.mkfifo(remote / "pipe")
    (remote / "new").write_text("new")
    one.pull()
    assert sorted(path.name for path in one.path.iterdir()) == [".bucket", "config.json", "new"]
