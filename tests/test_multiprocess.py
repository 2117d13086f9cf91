"""Two processes on this machine train as one: the same losses, checkpoints that one process reads,
a stop that both agree on, and a kill that costs nothing but the steps since the last save."""

import os
import random
import signal
import subprocess
import sys
import time

import crash
import jax
import numpy as np
import pytest
import worker
from pages import blocks_of

from lsg_flax import training
from lsg_flax.models import EncoderConfig, Model

pytestmark = pytest.mark.slow


def said(folder):
    return "\n".join((folder / f"{index}.txt").read_text()[-2000:] for index in range(2))


def one_process(folder, *, steps, place):
    """Goes on from `folder` without any mesh, in this process."""
    model = Model(EncoderConfig(**worker.SETTINGS), "masked_lm")
    params = jax.jit(model.init)(jax.random.key(0), np.zeros((1, 3), np.int32))["params"]
    optimizer = worker.optimizer()
    return training.fit(
        training.make_train_step(model, optimizer),
        training.init_state(params, optimizer, jax.random.key(1)),
        training.BatchesAt(worker.batch_of),
        steps=steps,
        saving=training.Saving(place, settings={"model": worker.SETTINGS, "learning_rate": 0.01}),
        logging=training.Logging(folder, progress=False),
    )


def test_two_processes_are_as_one(tmp_path):
    two = tmp_path / "two"
    assert crash.finish(crash.start(two, steps=4, pause=0.0)) == [0, 0], said(two)
    _, expected = one_process(tmp_path / "log", steps=6, place=tmp_path / "one")
    expected = [record["loss"] for record in expected]
    np.testing.assert_allclose(list(crash.losses(two).values()), expected[:4], rtol=1e-6)
    # Written by two, read and continued by one, on one device.
    _, rest = one_process(tmp_path / "log", steps=6, place=two / "state")
    assert [record["step"] for record in rest] == [5, 6]
    np.testing.assert_allclose([r["loss"] for r in rest], expected[4:], rtol=1e-6)


def test_both_processes_stop_at_one_step(tmp_path):
    processes = crash.start(tmp_path, steps=1000)
    deadline = time.monotonic() + crash.PATIENCE
    while not crash.losses(tmp_path):
        assert time.monotonic() < deadline, said(tmp_path)
        time.sleep(0.05)
    processes[1].send_signal(signal.SIGTERM)  # to one of them only
    assert crash.finish(processes) == [143, 143], said(tmp_path)
    last = crash.checkpoints(tmp_path)[-1]
    assert len(crash.losses(tmp_path)) == last
    assert f"stopped after step {last}" in said(tmp_path)


def test_the_documented_lines_join_hosts():
    """Of docs/scaling.md, as Slurm would start them: two processes see all devices."""
    (block,) = (b.text for b in blocks_of("docs/scaling.md") if "distributed" in b.text)
    code = block + "print(jax.process_count(), len(jax.devices()), jax.process_index())"
    job = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_NODELIST": "localhost"}
    job |= {"SLURM_NTASKS": "2", "SLURM_LOCALID": "0", "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env=os.environ | job | {"SLURM_PROCID": str(index)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    try:
        assert [p.communicate(timeout=120)[0] for p in started] == ["2 2 0\n", "2 2 1\n"]
    finally:
        for process in started:
            process.kill()


def test_a_kill_costs_the_steps_since_the_last_save(tmp_path):
    steps = 12
    assert crash.finish(crash.start(tmp_path / "calm", steps=steps, pause=0.0)) == [0, 0]
    crash.crash(tmp_path / "killed", steps=steps, generator=random.Random(5))
    assert crash.losses(tmp_path / "killed") == crash.losses(tmp_path / "calm")
