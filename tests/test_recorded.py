"""Recorded steps are the plain ones. Without a GPU a replay runs the step again, on the memory of the recording."""

import signal

import pytest
import torch
from conftest import TINY, call, interrupted, log_of, teacher_flags

import train
import train0
from support import checkpoint, recorded
from support.randomness import StepRandom
from support.recorded import WARM_UP, Recorded


class OnCPU(Recorded):
    """What a GPU does, with Python for its graph: the same memory in, and the same memory out."""

    def warm_up(self, call):
        return call()

    def record(self, call):
        memory = []

        def replay():
            result = call()
            memory.append(result) if not memory else memory[0].copy_(result)
            return memory[0]

        return replay


def calls(step, n=WARM_UP + 4):
    """What n calls return, with another argument of each kind in each."""
    return [step([StepRandom(3, i)], torch.full((2,), i), i / 2, i % 2 == 0, None) for i in range(n)]


def test_replays_take_new_numbers_tensors_and_floats_and_leave_what_they_gave():
    def step(rngs, tensor, number, even, nothing):
        rng, = rngs
        noise = rng.normal(2) if even else rng.uniform(2)
        runs.append(even)
        return dict(sum=(noise + rng.integers(0, 9, 2) + tensor).sum() * number, other=tensor.float().mean())

    runs = []
    expected, runs = calls(step, 12), []
    replayed = OnCPU(step)
    assert calls(replayed, 12) == expected                          # compared after the last call
    assert set(replayed.recordings) == {((2,), float, even, None) for even in (True, False)}
    assert len({log["sum"].item() for log in expected}) == 12


@pytest.mark.parametrize("kind", ["shape", "kind", "more"])
def test_a_step_that_asks_for_other_numbers_than_before_is_refused(kind):
    def step(rngs, *_):
        rng, = rngs
        asked.append(1)
        changed = len(asked) > WARM_UP
        rng.uniform(3 if changed and kind == "shape" else 2) if not changed or kind != "kind" else rng.normal(2)
        if changed and kind == "more":
            rng.uniform(2)
        return dict(x=torch.zeros(()))

    asked, replayed = [], OnCPU(step)
    with pytest.raises(RuntimeError, match="asked for"):
        for i in range(WARM_UP + 1):
            replayed([StepRandom(0, i)])


def test_no_recording_without_a_gpu_or_where_it_is_not_wanted():
    def step():
        pass

    for device, wanted in (("cpu", True), ("cuda", False)):
        assert recorded.recorded(torch.device(device), wanted)(step) is step
    assert isinstance(recorded.recorded(torch.device("cuda"), True)(step), Recorded)


# Rates that are the same in float32, as which a recording holds them.
RATES = ["--warmup_steps", "4", "--lr_schedule", "constant"]
TEACHER = ["--lr", str(2**-10), "--label_dropout", "0.3"]
STUDENT = ["--generator_lr", str(2**-11), "--guidance_lr", str(2**-10), "--dfake_gen_update_ratio", "2"]
STUDENT += ["--gen_cls_loss_weight", "1e-2", "--num_denoising_steps", "2", "--cfg_scale", "2"]
STUDENT += ["--cfg_interval", "0.1", "10", "--autoguidance_scale", "2", "--fit_steps", "2", "--ode_pairs", "4"]


@pytest.mark.parametrize(("script", "optimizer"), [(train0, "adam"), (train0, "muon"), (train, "adam")])
def test_recorded_training_stopped_and_resumed_is_the_plain_one(
    tmp_path, tree, trained_teacher, script, optimizer, monkeypatch
):
    flags = [*teacher_flags(tree), *TEACHER] if script is train0 else ["--teacher", trained_teacher, *TINY, *STUDENT]
    flags += [*RATES, "--optimizer", optimizer, "--precision", "fp32", "--sample_every", "100", "--seed", "1"]
    plain, resumed = str(tmp_path / "plain"), str(tmp_path / "resumed")
    flags += ["--gan_steps", "12", "--discriminator_warmup_steps", "4"] if script is train else []
    assert call(script, *flags, "--steps", "24", "--run_dir", plain) == 0
    made = []
    monkeypatch.setattr(script, "recorded", lambda device, wanted: lambda step: made.append(OnCPU(step)) or made[-1])
    monkeypatch.setattr(recorded, "WARM_UP", 1)
    with monkeypatch.context() as patch:
        interrupted(patch, script, 3, signal.SIGTERM)
        assert call(script, *flags, "--steps", "24", "--run_dir", resumed) == 143
    assert call(script, "--resume", "--run_dir", resumed, "--device", "cpu") == 0

    # A teacher has one graph. A student has one for the fit, whose two steps train the same evaluation; two each for
    # DMD2 and the GAN, with or without the generator. The fit ends before the resume.
    recordings = [[recording.replay is not None for recording in one.recordings.values()] for one in made]
    wanted = [[True], [], [True] * 2, [True] * 2] if script is train else [[True], [True]]
    assert [recordings[0], *recordings[-(len(wanted) - 1):]] == wanted
    ours, theirs = checkpoint.load(resumed), checkpoint.load(plain)
    for name in ("model", "model_ema"):
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=0)
    assert log_of(resumed, speed=False) == log_of(plain, speed=False)
