import contextlib
import errno
import os
import pickle
import random
import stat

import pytest
import torch

from model import SimpleUNet
from support import checkpoint, networks
from support.ema import EMA


def teacher_state(channels=8):
    net = SimpleUNet(channels=channels, label_dim=3)
    return dict(
        kind="teacher", step=5, classes=["a", "b", "c"], model_config=net.config, model_ema=net.state_dict(),
        sigma_min=0.002, sigma_max=80.0,
    )


def test_a_saved_model_comes_back_from_its_file_or_folder(tmp_path):
    state = teacher_state()
    checkpoint.save(tmp_path / "checkpoint.pt", state)
    for path in (tmp_path, tmp_path / "checkpoint.pt"):
        net = networks.averaged(checkpoint.load(path, kind="teacher"))
        for name, tensor in net.state_dict().items():
            assert torch.equal(tensor, state["model_ema"][name])
    assert os.listdir(tmp_path) == ["checkpoint.pt"]
    assert not net.training and not any(p.requires_grad for p in net.parameters())


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, teacher_state())
    before = path.read_bytes()

    def full_disk(state, file):
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="No space left on device"):
        checkpoint.save(path, teacher_state())
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["checkpoint.pt"]


@pytest.mark.parametrize("number, stops", [(errno.EINVAL, False), (errno.ENOTSUP, False), (errno.EIO, True)])
def test_a_file_system_that_cannot_flush_folders_has_the_file_all_the_same(tmp_path, monkeypatch, number, stops):
    def fsync(descriptor, real=os.fsync):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError) if stops else contextlib.nullcontext():
        checkpoint.save(tmp_path / "checkpoint.pt", teacher_state())
    assert checkpoint.load(tmp_path)["step"] == 5


def test_a_kill_before_the_rename_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, teacher_state())
    before = path.read_bytes()

    def kill(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", kill)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(path, teacher_state())
    assert path.read_bytes() == before
    assert checkpoint.load(tmp_path)["step"] == 5   # the leftover temporary file is not picked up


def test_a_slim_compressed_file_is_smaller_by_a_fifth_and_holds_the_rounded_weights(tmp_path):
    state = dict(teacher_state(32), optimizer=torch.zeros(10_000))
    for name, compressed in (("plain.pt", False), ("packed.pt", True)):
        checkpoint.save(tmp_path / name, checkpoint.slim(state), compressed)
    assert os.path.getsize(tmp_path / "packed.pt") < 0.82 * os.path.getsize(tmp_path / "plain.pt")
    back = checkpoint.load(tmp_path / "packed.pt")
    assert "optimizer" not in back and set(os.listdir(tmp_path)) == {"plain.pt", "packed.pt"}
    for name, tensor in state["model_ema"].items():
        assert torch.equal(back["model_ema"][name], tensor.bfloat16())
        assert (back["model_ema"][name].float() - tensor).abs().max() <= tensor.abs().max() * 2**-8


@pytest.mark.parametrize("compressed", [False, True])
def test_cut_and_flipped_files_are_refused(tmp_path, compressed):
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, teacher_state(), compressed)
    whole = path.read_bytes()
    for percent in range(100):
        path.write_bytes(whole[: len(whole) * percent // 100])
        with pytest.raises(checkpoint.CheckpointError, match=r"checkpoint\.pt"):
            checkpoint.load(tmp_path)
    for position in range(len(whole) // 20, len(whole), len(whole) // 10):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 16]) + whole[position + 1 :])
        with pytest.raises(checkpoint.CheckpointError, match=r"checkpoint\.pt"):
            checkpoint.load(tmp_path)


@pytest.mark.parametrize("compressed", [False, True])
def test_a_flipped_bit_is_refused_or_was_in_no_data(tmp_path, compressed):
    """Anywhere in the file, its directory included; what loads in spite of one (a date, padding) is the same."""
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, teacher_state(), compressed)
    whole, wanted = path.read_bytes(), checkpoint.load(path)
    rng, refused = random.Random(0), 0
    places = [rng.randrange(len(whole)) for _ in range(60)] + [rng.randrange(1, 3000) for _ in range(20)]
    places += [len(whole) - rng.randrange(1, 3000) for _ in range(60)]
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        try:
            state = checkpoint.load(path)
        except checkpoint.CheckpointError as error:
            refused += 1
            assert "checkpoint.pt" in str(error) and "\n" not in str(error)
        else:
            assert state.keys() == wanted.keys()
            assert all(torch.equal(state["model_ema"][key], wanted["model_ema"][key]) for key in wanted["model_ema"])
    assert refused > 60


def test_a_damaged_or_lost_checkpoint_is_replaced_by_the_one_before_it_and_that_is_said(tmp_path, capsys):
    newest, previous = tmp_path / "checkpoint.pt", tmp_path / "previous.pt"
    checkpoint.save(newest, teacher_state() | dict(step=4))
    checkpoint.keep_previous(tmp_path)
    checkpoint.save(newest, teacher_state())
    assert checkpoint.load(tmp_path)["step"] == 5 and checkpoint.load(previous)["step"] == 4
    assert capsys.readouterr().err == ""
    whole = newest.read_bytes()
    for damaged, what in ((whole[:-9], "damaged"), (b"", "damaged"), (bytes(len(whole)), "damaged"), (None, "gone")):
        newest.unlink() if damaged is None else newest.write_bytes(damaged)
        assert checkpoint.find(tmp_path) == previous and checkpoint.load(tmp_path)["step"] == 4
        checkpoint.note.cache_clear()
        assert checkpoint.load(tmp_path)["step"] == 4
        assert capsys.readouterr().err.splitlines()[-1] == (
            f"note: {newest} is {what}: taking the save before it, {previous}"
        )
        with pytest.raises(checkpoint.CheckpointError, match=r"checkpoint\.pt"):
            checkpoint.load(newest)                 # the file itself was asked for
    newest.write_bytes(whole[:-9])
    previous.write_bytes(whole[:-9])
    with pytest.raises(checkpoint.CheckpointError, match=r"checkpoint\.pt is"):
        checkpoint.load(tmp_path)


class Killed(BaseException):
    pass


def mortal(function, left):
    """The function, which is killed before its call once nothing is left; each call takes one."""
    def call(*args, **how):
        if not left:
            raise Killed
        left.pop()
        return function(*args, **how)

    return call


@pytest.mark.parametrize("damaged", [False, True])
def test_a_kill_at_any_instant_leaves_a_whole_checkpoint(tmp_path, monkeypatch, damaged):
    """What a run does from its resume to its next save, killed before each thing that it does to files."""
    newest, previous, done = tmp_path / "checkpoint.pt", tmp_path / "previous.pt", False
    for kill in range(99):
        checkpoint.save(previous, teacher_state() | dict(step=3))
        checkpoint.save(newest, teacher_state() | dict(step=4))
        if damaged:
            newest.write_bytes(newest.read_bytes()[:-9])
        least, left = 3 if damaged else 4, [None] * kill
        with monkeypatch.context() as patch:
            for name in ("link", "replace", "rename", "unlink", "fsync"):
                patch.setattr(os, name, mortal(getattr(os, name), left))
            try:
                checkpoint.restore_previous(tmp_path)
                checkpoint.keep_previous(tmp_path)
                checkpoint.save(newest, teacher_state())
                done = True
            except Killed:
                pass
        assert checkpoint.load(tmp_path)["step"] == 5 if done else checkpoint.load(tmp_path)["step"] >= least
        if done:
            break
    assert done and kill >= 5 + damaged
    assert checkpoint.load(previous)["step"] == least and not newest.samefile(previous)


def test_without_hard_links_there_is_no_previous_checkpoint_and_that_is_said(tmp_path, monkeypatch, capsys):
    def link(*args):
        raise OSError(errno.EPERM, "Operation not permitted")

    checkpoint.save(tmp_path / "checkpoint.pt", teacher_state())
    monkeypatch.setattr(os, "link", link)
    checkpoint.keep_previous(tmp_path)
    checkpoint.save(tmp_path / "checkpoint.pt", teacher_state() | dict(step=6))
    assert checkpoint.load(tmp_path)["step"] == 6 and os.listdir(tmp_path) == ["checkpoint.pt"]
    assert f"note: {tmp_path} cannot keep a previous.pt beside checkpoint.pt" in capsys.readouterr().err


def test_a_checkpoint_that_is_a_link_stays_one(tmp_path):
    (tmp_path / "store").mkdir()
    (tmp_path / "run").mkdir()
    target, link = tmp_path / "store" / "a.pt", tmp_path / "run" / "checkpoint.pt"
    link.symlink_to(target)                         # which is not there yet
    for step in (5, 6):
        checkpoint.keep_previous(tmp_path / "run") if step == 6 else None
        checkpoint.save(link, teacher_state() | dict(step=step))
        assert link.is_symlink() and [checkpoint.load(path)["step"] for path in (target, link.parent)] == [step, step]
    assert checkpoint.load(tmp_path / "run" / "previous.pt")["step"] == 5 and os.listdir(tmp_path / "store") == ["a.pt"]


def test_other_files_are_refused_and_no_code_runs(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "code_ran"),)

    torch.save(dict(teacher_state(), format=checkpoint.FORMAT, extra=Evil()), tmp_path / "evil.pt")
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps(Evil()))
    torch.save(dict(step=1), tmp_path / "foreign.pt")
    torch.save(dict(kind="teacher", format=checkpoint.FORMAT), tmp_path / "incomplete.pt")
    (tmp_path / "text.pt").write_text("hello")
    for name in ("evil.pt", "pickle.pt", "foreign.pt", "incomplete.pt", "text.pt", "absent.pt"):
        with pytest.raises(checkpoint.CheckpointError, match=name):
            checkpoint.load(tmp_path / name)
    assert not (tmp_path / "code_ran").exists()
    with pytest.raises(checkpoint.CheckpointError, match=r"no checkpoint\.pt in this folder"):
        checkpoint.load(tmp_path)


def test_the_wrong_kind_is_refused(tmp_path):
    checkpoint.save(tmp_path / "checkpoint.pt", teacher_state())
    with pytest.raises(checkpoint.CheckpointError, match="holds a teacher, but a student is needed"):
        checkpoint.load(tmp_path, kind="student")


@pytest.mark.parametrize(("key", "value"), [
    ("classes", ["a", "b"]), ("classes", ["a", "b", "c", "d"]), ("classes", 3), ("classes", [1, 2, 3]), ("classes", []),
    ("model_config", None), ("model_config", {}), ("step", -1), ("step", "5"), ("sigma_min", 90.0), ("sigma_max", "80"),
    ("sigma_max", float("nan")), ("denoising_sigmas", "x"), ("denoising_sigmas", []), ("denoising_sigmas", 80.0),
    ("denoising_sigmas", [0.0]), ("settings", [1]), ("kind", ["teacher"]),
])
def test_fields_that_cannot_be_are_refused(tmp_path, key, value):
    whole = teacher_state() | dict(kind="student", denoising_sigmas=[80.0], settings={})
    checkpoint.save(tmp_path / "whole.pt", whole)
    assert checkpoint.load(tmp_path / "whole.pt")["step"] == 5
    checkpoint.save(tmp_path / "x.pt", whole | {key: value})
    with pytest.raises(checkpoint.CheckpointError, match=r"x\.pt (contradicts itself|is incomplete)"):
        checkpoint.load(tmp_path / "x.pt")


def test_ema_is_the_exponential_average_with_a_young_run_averaged_shorter():
    net = torch.nn.Linear(1, 1, bias=False)
    net.register_buffer("count", torch.zeros(()))
    ema, expected = EMA(net, decay=0.9), net.weight.item()
    for n in range(200):
        with torch.no_grad():
            net.weight.fill_(float(n % 7))
            net.count += 1
        ema.update_parameters(net)
        decay = min(0.9, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * (n % 7)
    assert ema.module.weight.item() == pytest.approx(expected, rel=1e-4)
    assert not ema.module.weight.requires_grad and ema.module.count == 200

    ema.begin_mean()
    expected = ema.module.weight.item()
    for n, value in enumerate([3.0, -1.0, 8.0], 1):
        expected += 4 / (n + 4) * (value - expected)                # Shamir & Zhang, section 4, with eta = 3
        with torch.no_grad():
            net.weight.fill_(value)
        ema.update_parameters(net, mean=True)
    assert ema.module.weight.item() == pytest.approx(expected, rel=1e-5)
